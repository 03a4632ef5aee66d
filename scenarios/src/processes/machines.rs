//! Processes of this machine: the hands of a scenario on real nodes.

use crate::play::{Machines, NewNode, NodeIndex, Session, Waiting};
use crate::spec::{Draw, NodeDraw, Regions, Scenario, fast};
use nodes::auth::Keys;
use nodes::config::NodeConfig;
use nodes::error::Error;
use sim::net::proxy::{Proxies, free_address};
use sim::process::{Process, Signal};
use sim::time::{self, Duration, Instant};
use sim::trace::Level;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Where the clients stand among those who connect; nodes are numbered from 1 on.
const CLIENTS: NodeIndex = 0;
/// How long nodes may take to start.
const START_MAX: Duration = Duration::from_secs(90);
/// Of a log, when a node ended by itself.
const LINES_SHOWN: usize = 8;

/// Why no real machine can play this, if none can.
pub fn refusal(written: &Scenario, settled: &Scenario) -> Option<String> {
    let planned = settled.faults.list.iter().chain(settled.faults.disk.iter().flatten());
    if let Some(fault) = planned.map(|fault| fault.kind).find(|kind| kind.is_modelled()) {
        return Some(format!(
            "it plans {fault:?} and real processes have no power, disk, clock or bandwidth of their own to take; they can play crash, pause, partition, \
             partition_in, partition_out, silence, rolling_restart, reclaim and replace"
        ));
    }
    if settled.topology.loss > 0.0 {
        return Some("topology.loss: the loopback loses no messages; leave it out".into());
    }
    let far = |r: &Regions| r.latency_ms > 0 || r.jitter_ms > 0 || r.loss > 0.0 || r.bytes_per_s != fast();
    if settled.topology.regions.as_ref().is_some_and(far) {
        return Some(
            "topology.regions: the loopback has no distances; latency_ms and jitter_ms are 0, and loss and bytes_per_s left out"
                .into(),
        );
    }
    let of_machine = |of: &NodeDraw| (of.sync_us, of.rate_ppm, of.offset_ms, of.calendar_ms);
    let usual = Draw::usual(1);
    let models = written.draw.as_ref().is_some_and(|draw| {
        draw.latency_us != usual.latency_us
            || !draw.buggify.is_empty()
            || draw.nodes.iter().any(|node| of_machine(node) != of_machine(&usual.nodes[0]))
    });
    models.then(|| {
        "draw: latency_us, sync_us, rate_ppm, offset_ms, calendar_ms and buggify are of simulated machines; leave them out".into()
    })
}

pub struct Processes {
    /// Where configurations, data and logs lie.
    dir: PathBuf,
    loci: PathBuf,
    /// Lines are printed as they come.
    live: bool,
    began: OnceLock<Instant>,
    proxies: Proxies,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    nodes: Vec<Machine>,
    /// Where clients reach each node, in the nodes' order.
    clients_ways: Vec<SocketAddr>,
    problems: Vec<String>,
}

struct Machine {
    name: String,
    config: NodeConfig,
    keys: Keys,
    listens: SocketAddr,
    process: Option<Process>,
    boots: u64,
    /// How long its processes worked that are gone.
    worked: Duration,
    /// It was told to stop, so that its end is no surprise.
    told: bool,
}

impl Processes {
    /// Processes of the program `loci` that keep what they have under `dir`.
    pub fn new(dir: &Path, loci: &Path, live: bool) -> Processes {
        Processes {
            dir: dir.into(),
            loci: loci.into(),
            live,
            began: OnceLock::new(),
            proxies: Proxies::default(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn with<T>(&self, node: NodeIndex, what: impl FnOnce(&mut Machine) -> T) -> Option<T> {
        self.state().nodes.get_mut(node.checked_sub(1)?).map(what)
    }

    fn problem(&self, what: String) {
        self.note(0, Level::Error, &what);
        self.state().problems.push(what);
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Lets nobody connect to a node, as if nobody listened there, or everybody again.
    fn refuse(&self, node: NodeIndex, refused: bool) {
        let nodes = self.state().nodes.len();
        (CLIENTS..=nodes)
            .filter(|from| *from != node)
            .for_each(|from| self.proxies.refuse((from, node), refused));
    }

    /// Takes the process of a node, if it has one.
    fn take(&self, node: NodeIndex) -> Option<Process> {
        let taken = self.with(node, |machine| {
            let process = machine.process.take()?;
            machine.boots += 1;
            machine.worked += process.busy().unwrap_or_default();
            Some(process)
        });
        self.refuse(node, true);
        taken.flatten()
    }

    fn kill(&self, node: NodeIndex) {
        if let Some(Err(error)) = self.take(node).map(|mut process| process.kill()) {
            self.problem(format!("{} could not be killed: {error}", self.name(node)));
        }
    }

    fn signal(&self, node: NodeIndex, signal: Signal) {
        let sent = self.with(node, |machine| machine.process.as_ref().map(|process| process.signal(signal)));
        if let Some(Some(Err(error))) = sent {
            self.problem(format!("{} could not be sent {signal:?}: {error}", self.name(node)));
        }
    }

    fn spawn(&self, machine: &mut Machine) -> io::Result<()> {
        let data = PathBuf::from(&machine.config.data);
        fs::create_dir_all(&data)?;
        let disk = sim::disk::open(&machine.config.data)?;
        if Keys::load(&*disk).map_err(io::Error::other)? != machine.keys {
            machine.keys.save(&*disk).map_err(io::Error::other)?;
        }
        let path = self.dir.join(format!("{}.toml", machine.name));
        fs::write(&path, toml::to_string(&machine.config).map_err(io::Error::other)?)?;
        let log = fs::File::options().create(true).append(true).open(self.log(&machine.name))?;
        let mut command = Command::new(&self.loci);
        command.arg("node").arg("--config").arg(path).current_dir(&self.dir);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        machine.process = Some(Process::start(&mut command)?);
        machine.told = false;
        Ok(())
    }

    /// Makes the nodes and the proxies between them, and starts them.
    async fn set_up(&self, new: Vec<NewNode>) -> Result<Vec<NodeIndex>, Error> {
        let failed = |e: io::Error| Error::Internal(format!("{}: {e}", self.dir.display()));
        let mut nodes = vec![];
        for NewNode { mut config, keys, .. } in new {
            let listens = free_address().map_err(failed)?;
            let name = config.name.clone();
            config.advertise = Some(std::mem::replace(&mut config.listen, listens.to_string()));
            config.data = self.dir.join(&name).to_string_lossy().into_owned();
            nodes.push(Machine {
                name,
                config,
                keys,
                listens,
                process: None,
                boots: 0,
                worked: Duration::ZERO,
                told: false,
            });
        }
        let mut clients_ways = vec![];
        for to in 1..=nodes.len() {
            let (listens, advertised) = (nodes[to - 1].listens, nodes[to - 1].config.advertise.clone());
            clients_ways.push(self.proxies.listen((CLIENTS, to), listens).await.map_err(failed)?);
            for from in (1..=nodes.len()).filter(|from| *from != to) {
                let way = self.proxies.listen((from, to), listens).await.map_err(failed)?;
                let advertised = advertised.clone().unwrap_or_default();
                nodes[from - 1].config.via.insert(advertised, way.to_string());
            }
        }
        for machine in &mut nodes {
            self.spawn(machine).map_err(failed)?;
        }
        let all: Vec<(String, SocketAddr)> = nodes.iter().map(|n| (n.name.clone(), n.listens)).collect();
        *self.state() = State { nodes, clients_ways, problems: vec![] };
        let until = Instant::now() + START_MAX;
        for (index, (name, listens)) in all.iter().enumerate() {
            while TcpStream::connect(listens).is_err() {
                if !self.is_running(index + 1) || Instant::now() > until {
                    let log = last_lines(&self.log(name));
                    return Err(Error::Internal(format!("{name} does not start: {log}")));
                }
                time::sleep(Duration::from_millis(20)).await;
            }
        }
        let _ = self.began.set(Instant::now());
        Ok((1..=all.len()).collect())
    }
}

impl Machines for Processes {
    fn boot(&self, nodes: Vec<NewNode>) -> Waiting<'_, Result<Vec<NodeIndex>, Error>> {
        Box::pin(self.set_up(nodes))
    }

    fn add_client(&self, _number: usize, session: Session) {
        sim::task::spawn(session());
    }

    fn now(&self) -> Duration {
        self.began.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    fn name(&self, node: NodeIndex) -> String {
        self.with(node, |machine| machine.name.clone()).unwrap_or_else(|| "-".into())
    }

    fn note(&self, node: NodeIndex, level: Level, text: &str) {
        if self.live && level <= Level::Info {
            println!("{:10.4} s  {:4} {text}", self.now().as_secs_f64(), self.name(node));
        }
    }

    fn operators_way(&self, node: NodeIndex) -> String {
        self.with(node, |machine| machine.listens.to_string()).unwrap_or_default()
    }

    fn clients_way(&self, node: NodeIndex) -> String {
        let ways = &self.state().clients_ways;
        node.checked_sub(1).and_then(|index| ways.get(index)).map_or(String::new(), SocketAddr::to_string)
    }

    fn is_running(&self, node: NodeIndex) -> bool {
        let ended = self.with(node, |machine| match machine.process.as_mut().map(Process::ended) {
            None => Some(None),
            Some(Ok(None)) => None,
            Some(ended) => Some(Some((ended, machine.told))),
        });
        match ended {
            Some(None) => true,
            None | Some(Some(None)) => false,
            Some(Some(Some((ended, told)))) => {
                drop(self.take(node));
                let name = self.name(node);
                match ended {
                    Ok(Some(status)) if told && status.success() => {}
                    Ok(Some(status)) => {
                        let log = last_lines(&self.log(&name));
                        self.problem(format!("{name} ended by itself ({status}): {log}"));
                    }
                    Ok(None) => {}
                    Err(error) => self.problem(format!("{name} could not be waited for: {error}")),
                }
                false
            }
        }
    }

    fn boots(&self, node: NodeIndex) -> u64 {
        self.with(node, |machine| machine.boots).unwrap_or(0)
    }

    fn crash(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "process killed");
        self.kill(node);
    }

    fn start(&self, node: NodeIndex) {
        if self.is_running(node) {
            return;
        }
        self.note(node, Level::Info, "process started");
        if let Some(Err(error)) = self.with(node, |machine| self.spawn(machine)) {
            self.problem(format!("{} could not be started: {error}", self.name(node)));
        }
        self.refuse(node, false);
    }

    fn pause(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "paused");
        self.signal(node, Signal::Stop);
    }

    fn resume(&self, node: NodeIndex) {
        self.note(node, Level::Info, "resumed");
        self.signal(node, Signal::Continue);
    }

    fn tell_to_stop(&self, node: NodeIndex) {
        self.with(node, |machine| machine.told = true);
        self.signal(node, Signal::Terminate);
    }

    fn end(&self, node: NodeIndex) {
        self.note(node, Level::Info, "process ended");
        self.kill(node);
    }

    fn replace(&self, node: NodeIndex, told: bool) {
        self.note(node, Level::Warn, "its machine is gone, with its disk");
        self.kill(node);
        let emptied = self.with(node, |machine| {
            machine.config.rejoin = told;
            fs::remove_dir_all(&machine.config.data)
        });
        if let Some(Err(error)) = emptied {
            self.problem(format!("what {} has could not be removed: {error}", self.name(node)));
        }
    }

    fn cut(&self, from: NodeIndex, to: NodeIndex) {
        self.proxies.hold((from, to));
    }

    fn silence(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "answers nobody");
        let nodes = self.state().nodes.len();
        for other in (CLIENTS..=nodes).filter(|other| *other != node) {
            self.proxies.hold((node, other));
            self.proxies.hold((other, node));
        }
    }

    fn heal_links(&self) {
        self.proxies.release_all();
    }

    fn met(&self) -> u64 {
        self.proxies.met()
    }

    fn cores(&self) -> usize {
        std::thread::available_parallelism().map_or(1, |cores| cores.get())
    }

    fn busy(&self, node: NodeIndex) -> Duration {
        let busy = |machine: &mut Machine| {
            machine.worked + machine.process.as_ref().and_then(Process::busy).unwrap_or_default()
        };
        self.with(node, busy).unwrap_or_default()
    }

    fn bytes(&self, node: NodeIndex) -> u64 {
        let data = self.with(node, |machine| PathBuf::from(&machine.config.data));
        data.map_or(0, |data| bytes_under(&data))
    }

    fn broken(&self) -> Option<String> {
        let names: Vec<String> = self.state().nodes.iter().map(|machine| machine.name.clone()).collect();
        // Whoever has ended is noticed by being looked at.
        (1..=names.len()).filter(|node| self.is_running(*node)).for_each(drop);
        let panicked = |name: &String| {
            let log = fs::read_to_string(self.log(name)).unwrap_or_default();
            log.lines().find(|line| line.contains("panicked at")).map(|line| format!("{name}: {line}"))
        };
        let mut problems = self.state().problems.clone();
        problems.extend(names.iter().filter_map(panicked));
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

fn last_lines(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES_SHOWN)..].join(" | ")
}

/// Bytes of all files under a directory; what cannot be read counts nothing.
fn bytes_under(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_under(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settle::settle;
    use crate::spec::find;

    #[test]
    fn regions_that_are_far_apart_are_refused() -> Result<(), String> {
        let near = find("short/full-region-failure")?;
        let refused = |scenario: &Scenario| refusal(scenario, &settle(scenario, 1));
        assert_eq!(refused(&near), None);
        let far: [fn(&mut Regions); 4] =
            [|r| r.latency_ms = 40, |r| r.jitter_ms = 1, |r| r.loss = 0.001, |r| r.bytes_per_s -= 1];
        for change in far {
            let mut far = near.clone();
            far.topology.regions.iter_mut().for_each(change);
            assert!(refused(&far).is_some_and(|why| why.contains("distances")));
        }
        Ok(())
    }
}
