//! Simulated machines: the hands of a scenario in a [`World`].

use crate::play::{Machines, Modelled, NewNode, NodeIndex, RarePaths, Session, Waiting};
use crate::report::MENDING;
use crate::spec::{Draw, Fault, FaultKind, Scenario, Topology};
use nodes::auth::Keys;
use nodes::config::NodeConfig;
use nodes::error::Error;
use nodes::node::Node;
use sim::disk::simulated::DiskFaults;
use sim::time::Duration;
use sim::trace::Level;
use sim::world::{ClockModel, Latency, LinkModel, NodeOptions, World};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Of each machine.
const CORES: usize = 2;
/// Where a replica's data lies.
const STORED: [&str; 3] = ["views", "ledger", "bases"];
const RUINED: [&str; 2] = ["views", "bases"];
/// Places harmed by one fault.
const PLACES: usize = 2;
const RUIN_PLACES: usize = 80;
const SLOW_SYNC: Duration = Duration::from_millis(100);

pub struct Simulated {
    topology: Topology,
    world: World,
    /// The links of two machines in one region, and in two.
    links: (LinkModel, LinkModel),
    slowdown: u32,
    disk_bytes_per_s: u64,
    nodes: Mutex<BTreeMap<NodeIndex, Made>>,
}

struct Made {
    told: Arc<Told>,
    addr: String,
    /// How the disk is when it is well.
    disk: DiskFaults,
}

/// What an operator tells a node's process.
#[derive(Default)]
struct Told {
    stop: sim::sync::Notify,
    /// Its machine is a new one: see [`NodeConfig::rejoin`].
    rejoin: AtomicBool,
}

impl Simulated {
    /// The machines of a settled scenario.
    pub fn new(world: &World, scenario: &Scenario) -> Simulated {
        let draw = scenario.draw.clone();
        let draw = draw.unwrap_or_else(|| Draw::usual(scenario.topology.machines()));
        world.set_buggify(draw.buggify);
        let base = Duration::from_micros(draw.latency_us);
        let latency = Latency { base, jitter: base.mul_f64(0.4) };
        let near = LinkModel { latency, loss: scenario.topology.loss, ..LinkModel::default() };
        world.links().set_default(near);
        let mut far = near;
        if let Some(regions) = &scenario.topology.regions {
            let ms = Duration::from_millis;
            let latency = Latency { base: base + ms(regions.latency_ms), jitter: ms(regions.jitter_ms) };
            far = LinkModel { latency, bandwidth: regions.bytes_per_s, loss: regions.loss };
            for from in regions.cluster.members.keys() {
                for to in regions.cluster.members.keys().filter(|to| *to != from) {
                    world.links().set_regions(from, to, far);
                }
            }
        }
        Simulated {
            topology: scenario.topology.clone(),
            world: world.clone(),
            links: (near, far),
            slowdown: scenario.recovery.as_ref().map_or(1, |r| r.cpu_slowdown),
            disk_bytes_per_s: scenario.recovery.as_ref().map_or(0, |r| r.disk_bytes_per_s),
            nodes: Mutex::default(),
        }
    }

    fn with<T>(&self, node: NodeIndex, what: impl FnOnce(&Made) -> T) -> Option<T> {
        self.nodes.lock().unwrap_or_else(|p| p.into_inner()).get(&node).map(what)
    }

    fn add(&self, new: NewNode) -> NodeIndex {
        let NewNode { config, limits, keys } = new;
        let (addr, told) = (config.listen.clone(), Arc::new(Told::default()));
        let clock = ClockModel {
            rate_ppm: limits.rate_ppm,
            offset: Duration::from_millis(limits.offset_ms),
            calendar_ms: limits.calendar_ms,
        };
        let region = match self.topology.region_of(&config.name) {
            "" => "here".into(),
            region => region.to_string(),
        };
        let name = config.name.clone();
        let options = NodeOptions { name, region, cores: CORES, slowdown: self.slowdown, clock };
        let telling = told.clone();
        let node = self.world.add_node(options, move || {
            let mut config = config.clone();
            config.rejoin = telling.rejoin.load(Ordering::SeqCst);
            process(config, keys.clone(), telling.clone())
        });
        let disk = DiskFaults {
            latency: Duration::from_micros(20),
            sync_latency: Duration::from_micros(limits.sync_us),
            bytes_per_s: self.disk_bytes_per_s,
            ..Default::default()
        };
        if let Some(simulated) = self.world.disk(node) {
            simulated.set_faults(disk);
        }
        let mut nodes = self.nodes.lock().unwrap_or_else(|p| p.into_inner());
        nodes.insert(node, Made { told, addr, disk });
        node
    }
}

impl Machines for Simulated {
    fn boot(&self, nodes: Vec<NewNode>) -> Waiting<'_, Result<Vec<NodeIndex>, Error>> {
        let booted = nodes.into_iter().map(|new| self.add(new)).collect();
        Box::pin(std::future::ready(Ok(booted)))
    }

    fn add_client(&self, number: usize, session: Session) {
        let clock = ClockModel::default();
        let (name, region) = (format!("client{number}"), "here".into());
        let options = NodeOptions { name, region, cores: 1, slowdown: 1, clock };
        self.world.add_node(options, session);
    }

    fn now(&self) -> Duration {
        self.world.now()
    }

    fn name(&self, node: NodeIndex) -> String {
        self.world.node_name(node)
    }

    fn note(&self, node: NodeIndex, level: Level, text: &str) {
        self.world.note(node, level, text);
    }

    fn operators_way(&self, node: NodeIndex) -> String {
        self.with(node, |made| made.addr.clone()).unwrap_or_default()
    }

    fn clients_way(&self, node: NodeIndex) -> String {
        self.operators_way(node)
    }

    fn is_running(&self, node: NodeIndex) -> bool {
        self.world.is_running(node)
    }

    fn boots(&self, node: NodeIndex) -> u64 {
        self.world.boots(node)
    }

    fn crash(&self, node: NodeIndex) {
        self.world.crash(node);
    }

    fn start(&self, node: NodeIndex) {
        self.world.start(node);
    }

    fn pause(&self, node: NodeIndex) {
        self.world.pause(node);
    }

    fn resume(&self, node: NodeIndex) {
        self.world.resume(node);
    }

    fn tell_to_stop(&self, node: NodeIndex) {
        self.with(node, |made| made.told.stop.notify_one());
    }

    fn end(&self, node: NodeIndex) {
        self.world.end(node);
    }

    fn replace(&self, node: NodeIndex, told: bool) {
        self.world.replace(node);
        self.with(node, |made| made.told.rejoin.store(told, Ordering::SeqCst));
    }

    fn cut(&self, from: NodeIndex, to: NodeIndex) {
        self.world.links().cut(from, to);
    }

    fn silence(&self, node: NodeIndex) {
        self.world.silence(node);
    }

    fn heal_links(&self) {
        self.world.links().heal_all();
    }

    fn met(&self) -> u64 {
        self.world.links().counters().0
    }

    fn calm(&self) {
        self.world.set_buggify([]);
    }

    fn cores(&self) -> usize {
        CORES
    }

    fn busy(&self, node: NodeIndex) -> Duration {
        self.world.busy(node)
    }

    fn bytes(&self, node: NodeIndex) -> u64 {
        self.world.disk(node).map_or(0, |disk| disk.bytes())
    }

    fn rare_paths(&self, replicas: &[NodeIndex]) -> RarePaths {
        let probes = sim::trace::probes().into_iter();
        let mut taken: BTreeMap<String, u64> = probes.map(|(path, count)| (path.into(), count)).collect();
        let by_node = sim::trace::probes_by_node();
        // Nor is it the disk's fault if a node hears of a shard only when that is no longer new.
        let filled = |node| {
            by_node.contains_key(&("replica: came back with an empty disk", node))
                || by_node.contains_key(&("replica: learned that its group is not new", node))
                || by_node.contains_key(&("epoch: a replica started over", node))
        };
        let mended = by_node.keys().filter(|(path, node)| {
            MENDING.contains(path) && (*path != "log: repaired from peers" || !filled(*node))
        });
        let mended = mended.map(|(path, node)| (self.world.node_name(*node), *path)).collect();
        for disk in replicas.iter().filter_map(|n| self.world.disk(*n)) {
            for (fault, count) in disk.counters().faults().into_iter().filter(|(_, count)| *count > 0) {
                *taken.entry(fault.into()).or_default() += count;
            }
        }
        RarePaths { taken, mended }
    }

    fn modelled(&self) -> Option<&dyn Modelled> {
        Some(self)
    }
}

impl Modelled for Simulated {
    fn power_off(&self, node: NodeIndex, harsh: bool) {
        if let (true, Some(disk)) = (harsh, self.world.disk(node)) {
            disk.lose_all_unsynced();
        }
        self.world.power_off(node);
    }

    fn harm(&self, node: NodeIndex, fault: &Fault) -> bool {
        let Some(disk) = self.world.disk(node) else { return true };
        let within = [fault.within.as_str()];
        let (dirs, places): (&[&str], _) = match fault.kind {
            FaultKind::Ruin => (&RUINED, RUIN_PLACES),
            _ if fault.within.is_empty() => (&STORED, PLACES),
            _ => (&within, PLACES),
        };
        let places = if fault.places > 0 { fault.places } else { places };
        let mut harmed = true;
        for turn in 0..places {
            let dir = dirs[(turn + fault.at_ms as usize) % dirs.len()];
            harmed &= match fault.kind {
                FaultKind::LostSector => disk.lose_a_sector(dir),
                _ => disk.flip_a_bit(dir),
            };
        }
        harmed
    }

    fn disk_fails(&self, node: NodeIndex, fault: &Fault) {
        let Some(disk) = self.world.disk(node) else { return };
        let mut faults = disk.faults();
        match fault.kind {
            FaultKind::Misdirected => {
                (faults.misdirect_one_in, faults.misdirect_in) =
                    (20, if fault.at_ms.is_multiple_of(3) { "bases" } else { "ledger" });
            }
            FaultKind::SyncFailure => faults.sync_fail_one_in = 1,
            FaultKind::FullDisk => faults.full = true,
            FaultKind::SlowDisk => {
                faults.latency *= 20;
                faults.sync_latency = faults.sync_latency * 10 + SLOW_SYNC;
            }
            _ => faults.stuck = true,
        }
        disk.set_faults(faults);
    }

    fn disk_works(&self, node: NodeIndex) {
        if let Some(disk) = self.world.disk(node) {
            disk.set_faults(self.with(node, |made| made.disk).unwrap_or_default());
        }
    }

    fn set_clock(&self, node: NodeIndex, rate_ppm: i64, step_ms: i64) {
        self.world.set_clock(node, rate_ppm, step_ms);
    }

    fn narrow(&self, from: NodeIndex, to: NodeIndex, bytes_per_s: Option<u64>) {
        let region = |node| self.topology.region_of(&self.world.node_name(node)).to_string();
        let usual = if region(from) == region(to) { self.links.0 } else { self.links.1 };
        let model = bytes_per_s.map(|bandwidth| LinkModel { bandwidth, ..usual });
        self.world.links().set_pair(from, to, model);
    }
}

/// The process of a node: what `loci node` does, on this machine's disk.
async fn process(config: NodeConfig, keys: Keys, told: Arc<Told>) {
    let run = async {
        let disk = sim::disk::open(&config.data).map_err(|e| Error::Internal(e.to_string()))?;
        if Keys::load(&*disk).map_err(|e| Error::Internal(e.to_string()))? != keys {
            keys.save(&*disk).map_err(|e| Error::Internal(e.to_string()))?;
        }
        Node::open(config, disk).await?.serve(|_| (), async move { told.stop.notified().await }).await
    };
    if let Err(error) = run.await {
        sim::task::abort(&error.to_string()).await;
    }
}
