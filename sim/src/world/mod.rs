//! The simulated world: one per process, on one thread.
//!
//! A scenario builds it with [`run`], adds nodes, and then acts on it while they work: [`World::crash`] ends a process (its
//! machine lives, so unsynced writes do too), [`World::power_off`] takes the machine away with everything that its
//! disk had not synced, [`World::start`] boots it again, [`World::links`] bends the network, [`World::set_clock`] the clocks.
//! What a node sees of it, it sees through the other modules of this crate, which ask here for "the current node".
//!
//! Node 0 is the scenario itself: its clocks are true, its links carry nothing.
//!
//! A node that ends itself ([`crate::task::abort`]) is started again by its supervisor after a second.

mod links;
mod node;
mod record;

pub use links::{Arrival, Latency, LinkModel, Links};
pub use node::{ClockModel, NodeOptions};
pub use record::{Event, TraceLine, What};

use crate::disk::simulated::SimDisk;
use crate::net::simulated::Incoming;
use crate::trace::Level;
use node::Node;
use record::Record;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc;

/// A node's place in the order of [`World::add_node`]; 0 is the scenario.
pub type NodeIndex = usize;

/// How long a supervisor waits before it starts a process that ended itself.
const SUPERVISOR_DELAY: Duration = Duration::from_secs(1);
const ABORTED_POLL: Duration = Duration::from_millis(200);

#[derive(Clone)]
pub struct World {
    inner: Arc<Inner>,
}

struct Inner {
    handle: madsim::runtime::Handle,
    state: Mutex<State>,
    links: Links,
    record: Mutex<Record>,
}

struct State {
    seed: u64,
    /// Calendar time at virtual time zero.
    epoch_ms: i64,
    nodes: Vec<Node>,
    index_of: std::collections::HashMap<madsim::task::NodeId, NodeIndex>,
    listeners: BTreeMap<String, Listener>,
    next_incarnation: u64,
    /// The sites that may fire.
    buggify: BTreeSet<String>,
}

struct Listener {
    node: NodeIndex,
    incarnation: u64,
    calls: mpsc::UnboundedSender<Incoming>,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// What a run leaves behind.
pub struct Outcome<T> {
    pub value: T,
    pub trace_hash: u64,
    pub virtual_time: Duration,
    /// Every line if asked for, else the last ones.
    pub lines: Vec<TraceLine>,
    /// Every event if asked for, else none.
    pub events: Vec<Event>,
    /// By [`NodeIndex`].
    pub nodes: Vec<String>,
}

/// Runs a scenario in a fresh world with `seed`. Once per process: a second world would share generators with the first.
/// `all` keeps the whole trace, else only its end is kept.
pub fn run<T, F>(seed: u64, all: bool, scenario: impl FnOnce(World) -> F) -> Outcome<T>
where
    F: Future<Output = T>,
{
    let runtime = madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default());
    crate::disk::sqlite::begin_run(seed);
    let handle = runtime.handle().clone();
    let epoch_ms = 1_760_000_000_000 + (seed % 31_536_000) as i64 * 1000;
    let world = World {
        inner: Arc::new(Inner {
            handle,
            links: Links::new(),
            record: Mutex::new(Record::new(all)),
            state: Mutex::new(State {
                seed,
                epoch_ms,
                nodes: vec![Node::scenario()],
                index_of: Default::default(),
                listeners: BTreeMap::new(),
                next_incarnation: 0,
                buggify: BTreeSet::new(),
            }),
        }),
    };
    WORLD.with(|w| *w.borrow_mut() = Some(world.clone()));
    crate::disk::sqlite::set_time_source(calendar_ms);
    let value = runtime.block_on(async {
        crate::task::spawn(supervise(world.clone()));
        scenario(world.clone()).await
    });
    let virtual_time = runtime.block_on(async { madsim::time::TimeHandle::current().elapsed() });
    // The generator's next number depends on every draw before it, whoever made it.
    let last = runtime.block_on(async { crate::rand::u64() });
    let nodes = world.state().nodes.iter().map(|node| node.name.clone()).collect();
    let mut record = lock(&world.inner.record);
    record.hash.number(last);
    let (lines, events) = record.take();
    Outcome { value, trace_hash: record.hash.value(), virtual_time, lines, events, nodes }
}

/// The last lines of the trace, for a run that ends in a panic; empty if the trace cannot be had at that moment.
pub fn last_lines(count: usize) -> Vec<TraceLine> {
    let world = WORLD.with(|w| w.try_borrow().ok().and_then(|w| w.clone()));
    let Some(world) = world else { return vec![] };
    let lines = world.inner.record.try_lock().map(|r| r.last_lines(count));
    lines.unwrap_or_default()
}

/// Starts nodes again that ended themselves.
async fn supervise(world: World) {
    loop {
        crate::time::sleep(ABORTED_POLL).await;
        let aborted: Vec<NodeIndex> = {
            let mut state = world.state();
            let indexes = 1..state.nodes.len();
            indexes.filter(|&i| std::mem::take(&mut state.nodes[i].aborted)).collect()
        };
        for node in aborted {
            let world = world.clone();
            crate::task::spawn(async move {
                crate::time::sleep(SUPERVISOR_DELAY).await;
                if !world.is_running(node) && world.is_powered(node) {
                    world.start(node);
                }
            });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl World {
    pub(crate) fn current() -> World {
        WORLD
            .with(|w| w.borrow().clone())
            .expect("no simulated world on this thread: start one with sim::world::run")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.inner.state)
    }

    pub fn seed(&self) -> u64 {
        self.state().seed
    }

    /// Virtual time since the world began, on nobody's clock.
    pub fn now(&self) -> Duration {
        self.inner.handle_time()
    }

    /// Switches these buggify sites on and all others off: none, for the phase in which the system must recover.
    pub fn set_buggify(&self, sites: impl IntoIterator<Item = String>) {
        self.state().buggify = sites.into_iter().collect();
    }

    pub fn links(&self) -> &Links {
        &self.inner.links
    }

    /// How often the node's process has ended.
    pub fn boots(&self, node: NodeIndex) -> u64 {
        self.state().nodes[node].boots
    }

    /// Adds a machine and boots it: `init` is its process, started anew at every boot.
    pub fn add_node<F>(&self, options: NodeOptions, init: impl Fn() -> F + Send + Sync + 'static) -> NodeIndex
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let index = self.state().nodes.len();
        let disk = SimDisk::new(self.seed().wrapping_mul(0x9e37_79b9).wrapping_add(index as u64));
        disk.defer_syncs();
        let observer = self.clone();
        disk.set_observer(Box::new(move |event| {
            let mut record = lock(&observer.inner.record);
            record.hash.bytes(event.op.as_bytes());
            record.hash.number(event.content_hash ^ event.offset.rotate_left(32) ^ event.len as u64);
            if !record.keeps_all() {
                return;
            }
            record.event(observer.now(), index, || What::Disk {
                op: event.op,
                path: event.path.to_string(),
                offset: event.offset,
                bytes: event.len as u64,
                hash: event.content_hash,
            });
        }));
        let name = options.name.clone();
        // The node must be known before its process first runs.
        self.state().nodes.push(Node::new(options, disk));
        let node = self.inner.handle.create_node().name(name).build();
        {
            let mut state = self.state();
            state.index_of.insert(node.id(), index);
            state.nodes[index].id = Some(node.id());
            state.nodes[index].init = Some(Arc::new(move || Box::pin(init())));
        }
        self.boot(index);
        index
    }

    fn boot(&self, node: NodeIndex) {
        let (id, init) = {
            let mut state = self.state();
            let entry = &mut state.nodes[node];
            entry.running = true;
            (entry.id, entry.init.clone())
        };
        let (Some(id), Some(init)) = (id, init) else { return };
        if let Some(handle) = self.inner.handle.get_node(id) {
            let world = self.clone();
            let boot = lock(&self.inner.state).nodes[node].boots;
            handle.spawn(async move {
                init().await;
                let mut state = world.state();
                if state.nodes[node].boots == boot {
                    state.nodes[node].running = false;
                }
            });
        }
    }

    /// Ends the node's process; its machine lives on: unsynced writes survive, peers see connections reset.
    pub fn crash(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "process killed");
        self.stop(node, false);
    }

    /// Takes the machine's power: unsynced writes are lost or torn by seed, peers see silence.
    pub fn power_off(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "power lost");
        self.stop(node, true);
    }

    fn stop(&self, node: NodeIndex, power: bool) {
        let (id, disk) = {
            let mut state = self.state();
            let entry = &mut state.nodes[node];
            entry.running = false;
            entry.powered &= !power;
            entry.boots += 1;
            entry.aborted = false;
            state.listeners.retain(|_, l| l.node != node);
            (state.nodes[node].id, state.nodes[node].disk.clone())
        };
        // The disk goes first: destructors that run while the process ends must not reach it any more.
        if let Some(disk) = disk {
            if power { disk.power_off() } else { disk.crash_process() }
        }
        if let Some(id) = id {
            self.inner.handle.kill(id);
        }
    }

    /// The node's process has ended by itself and in good order: what is left of it on this machine goes.
    pub fn end(&self, node: NodeIndex) {
        self.note(node, Level::Info, "process ended");
        self.stop(node, false);
    }

    /// Another machine of the same name takes this one's place, with an empty disk. It is off.
    pub fn replace(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "its machine is gone, with its disk");
        self.stop(node, true);
        if let Some(disk) = self.disk(node) {
            disk.empty();
        }
    }

    /// Boots a machine that is off, or starts its process again.
    pub fn start(&self, node: NodeIndex) {
        let (id, disk, was_off) = {
            let mut state = self.state();
            let entry = &mut state.nodes[node];
            if entry.running {
                return;
            }
            let was_off = !std::mem::replace(&mut entry.powered, true);
            (entry.id, entry.disk.clone(), was_off)
        };
        if let Some(disk) = disk {
            disk.power_on();
        }
        self.note(node, Level::Info, if was_off { "power on" } else { "process started" });
        if let Some(id) = id {
            self.inner.handle.restart(id);
        }
        self.boot(node);
    }

    /// Freezes every task of the node (a stop-the-world pause); clocks and network go on.
    pub fn pause(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "paused");
        if let Some(id) = self.state().nodes[node].id {
            self.inner.handle.pause(id);
        }
    }

    pub fn resume(&self, node: NodeIndex) {
        self.note(node, Level::Info, "resumed");
        if let Some(id) = self.state().nodes[node].id {
            self.inner.handle.resume(id);
        }
    }

    /// Cuts the node off from everyone, both ways, while its process runs; until [`Links::heal_all`].
    pub fn silence(&self, node: NodeIndex) {
        self.note(node, Level::Warn, "answers nobody");
        let others: Vec<NodeIndex> = (1..self.state().nodes.len()).filter(|other| *other != node).collect();
        self.links().partition(&[node], &others);
    }

    /// How long the node's cores have worked, all together.
    pub fn busy(&self, node: NodeIndex) -> Duration {
        self.state().nodes[node].busy
    }

    pub fn is_running(&self, node: NodeIndex) -> bool {
        self.state().nodes[node].running
    }

    pub fn is_powered(&self, node: NodeIndex) -> bool {
        self.state().nodes[node].powered
    }

    pub fn node_name(&self, node: NodeIndex) -> String {
        self.state().nodes[node].name.clone()
    }

    /// The node's disk, for fault settings and counters. The scenario (node 0) has none.
    pub fn disk(&self, node: NodeIndex) -> Option<Arc<SimDisk>> {
        self.state().nodes[node].disk.clone()
    }

    /// Bends the node's monotonic clock: from now on it runs `1 + rate_ppm / 1e6` times as fast. It never jumps.
    /// The calendar clock drifts along, and is stepped by `calendar_step_ms`.
    pub fn set_clock(&self, node: NodeIndex, rate_ppm: i64, calendar_step_ms: i64) {
        let now = self.now();
        self.state().nodes[node].clock.bend(now, rate_ppm, calendar_step_ms);
        self.note(
            node,
            Level::Warn,
            &format!("clock rate {rate_ppm:+} ppm, calendar stepped {calendar_step_ms:+} ms"),
        );
    }

    /// Writes a line of the trace in the name of a node.
    pub fn note(&self, node: NodeIndex, level: Level, text: &str) {
        let at = self.now();
        let name = self.state().nodes[node].name.clone();
        lock(&self.inner.record).line(at, (node, name), level, text);
    }

    /// Numbers that are part of the run's identity but belong to no node, such as a client's observations.
    pub fn identify(&self, value: u64) {
        lock(&self.inner.record).hash.number(value);
    }
}

impl Inner {
    fn handle_time(&self) -> Duration {
        madsim::time::TimeHandle::current().elapsed()
    }
}

// ---- what the other modules of this crate ask for the current node ----

pub(crate) fn current_node() -> NodeIndex {
    let id = madsim::plugin::node();
    World::current().state().index_of.get(&id).copied().unwrap_or(0)
}

/// Whether this thread is in a world.
pub(crate) fn is_here() -> bool {
    WORLD.with(|w| w.borrow().is_some())
}

pub(crate) fn global_ns() -> u64 {
    madsim::time::TimeHandle::current().elapsed().as_nanos() as u64
}

/// Outside a world, as in a plain test on this build, time stands still.
pub(crate) fn monotonic_ns() -> u64 {
    if !is_here() {
        return 0;
    }
    let now = madsim::time::TimeHandle::current().elapsed();
    let node = current_node();
    World::current().state().nodes[node].clock.monotonic_ns(now)
}

pub(crate) fn calendar_ms() -> i64 {
    if !is_here() {
        return 0;
    }
    let now = madsim::time::TimeHandle::current().elapsed();
    let node = current_node();
    let world = World::current();
    let state = world.state();
    state.epoch_ms + state.nodes[node].clock.calendar_ms(now)
}

/// How long this node's `wait` lasts in true time.
pub(crate) fn global_wait(wait: Duration) -> Duration {
    let node = current_node();
    World::current().state().nodes[node].clock.global_wait(wait)
}

pub(crate) fn buggify(site: &'static str, p: f64) -> bool {
    let on = World::current().state().buggify.contains(site);
    on && crate::rand::chance(p)
}

pub(crate) async fn work(cost: Duration) {
    let now = global_ns();
    let behind = {
        let node = current_node();
        let world = World::current();
        let mut state = world.state();
        state.nodes[node].occupy(now, cost)
    };
    if behind > 250_000 {
        crate::time::sleep(Duration::from_nanos(behind)).await;
    }
}

pub(crate) async fn sleep_off_disk_debt() {
    let node = current_node();
    let disk = World::current().state().nodes[node].disk.clone();
    if let Some(disk) = disk {
        let (debt, calls) = disk.take_debt();
        if !debt.is_zero() {
            crate::time::sleep(debt).await;
        }
        disk.slept_off(calls);
    }
}

/// The current node's disk; the scenario has none.
pub(crate) fn current_disk() -> Option<Arc<SimDisk>> {
    let node = current_node();
    World::current().disk(node)
}

pub(crate) fn abort_current_node() {
    let node = current_node();
    let world = World::current();
    world.stop(node, false);
    world.state().nodes[node].aborted = true;
}

pub(crate) fn log(level: Level, text: &str) {
    let node = current_node();
    World::current().note(node, level, text);
}

pub(crate) fn gauge(name: &'static str, value: u64) {
    let (node, world) = (current_node(), World::current());
    let now = world.now();
    lock(&world.inner.record).gauge(now, node, name, value);
}

pub(crate) fn hash_message(bytes: &[u8]) {
    let world = World::current();
    let now = global_ns();
    let mut record = lock(&world.inner.record);
    record.hash.number(now);
    record.hash.bytes(bytes);
}

/// A message that went from one node to another, for the trace.
pub(crate) fn sent(from: NodeIndex, message: impl FnOnce() -> What) {
    let world = World::current();
    let now = world.now();
    lock(&world.inner.record).event(now, from, message);
}

// ---- what the simulated network asks ----

pub(crate) fn resolve(addr: &str) -> Option<NodeIndex> {
    let host = addr.rsplit_once(':').map(|(host, _)| host)?;
    World::current().state().nodes.iter().position(|n| n.name == host)
}

pub(crate) fn powered(node: NodeIndex) -> bool {
    World::current().is_powered(node)
}

pub(crate) fn listener(addr: &str) -> Option<(u64, mpsc::UnboundedSender<Incoming>)> {
    World::current().state().listeners.get(addr).map(|l| (l.incarnation, l.calls.clone()))
}

/// Keeps an address taken; gives it back when dropped.
pub(crate) struct Registration {
    addr: String,
    incarnation: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let world = World::current();
        let mut state = world.state();
        if state.listeners.get(&self.addr).is_some_and(|l| l.incarnation == self.incarnation) {
            state.listeners.remove(&self.addr);
        }
    }
}

pub(crate) fn listen(addr: &str) -> io::Result<(Registration, mpsc::UnboundedReceiver<Incoming>)> {
    let node = current_node();
    let world = World::current();
    let mut state = world.state();
    if state.listeners.contains_key(addr) {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{addr} is taken")));
    }
    if resolve_in(&state, addr) != Some(node) {
        return Err(io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            format!("{addr} is no address of this node"),
        ));
    }
    let (calls, receiver) = mpsc::unbounded_channel();
    state.next_incarnation += 1;
    let incarnation = state.next_incarnation;
    state.listeners.insert(addr.to_string(), Listener { node, incarnation, calls });
    Ok((Registration { addr: addr.to_string(), incarnation }, receiver))
}

fn resolve_in(state: &State, addr: &str) -> Option<NodeIndex> {
    let host = addr.rsplit_once(':').map(|(host, _)| host)?;
    state.nodes.iter().position(|n| n.name == host)
}

pub(crate) fn transmit(from: NodeIndex, to: NodeIndex, bytes: usize, not_before_ns: u64) -> Arrival {
    let world = World::current();
    let regions = {
        let state = world.state();
        (state.nodes[from].region.clone(), state.nodes[to].region.clone())
    };
    world.inner.links.transmit((from, &regions.0), (to, &regions.1), bytes, not_before_ns, global_ns())
}

pub(crate) fn base_latency(from: NodeIndex, to: NodeIndex) -> Duration {
    let world = World::current();
    let regions = {
        let state = world.state();
        (state.nodes[from].region.clone(), state.nodes[to].region.clone())
    };
    world.inner.links.model((from, &regions.0), (to, &regions.1)).latency.base
}

/// Waits until a message has arrived; false if the link stayed cut for longer than TCP would try.
pub(crate) async fn arrive(arrival: Arrival) -> bool {
    let world = World::current();
    links::arrive(&world.inner.links, arrival).await
}

/// Waits until the link from one node to another has carried what was sent so far.
pub(crate) async fn sent_off(from: NodeIndex, to: NodeIndex) {
    let world = World::current();
    links::sent_off(&world.inner.links, from, to).await
}

/// Virtual time since the world began, on nobody's clock: for those who judge, not for those who run.
pub fn true_now() -> Duration {
    madsim::time::TimeHandle::current().elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk as _;
    use crate::disk::simulated::DiskFaults;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// What a dead process's destructor asked of a disk that hung then is not the next process's to wait for.
    #[test]
    fn a_process_does_not_wait_for_what_a_dead_one_asked() {
        struct Asks(Arc<SimDisk>);
        impl Drop for Asks {
            fn drop(&mut self) {
                let _ = self.0.list("");
            }
        }
        let listed = Arc::new(AtomicU64::new(0));
        let counted = listed.clone();
        run(1, false, |world| async move {
            let options = NodeOptions {
                name: "n".into(),
                region: "here".into(),
                cores: 1,
                slowdown: 1,
                clock: ClockModel::default(),
            };
            let node = world.add_node(options, move || {
                let listed = counted.clone();
                async move {
                    let Some(disk) = current_disk() else { return };
                    let _asks = Asks(disk.clone());
                    if crate::task::blocking(move || disk.list("")).await.is_ok() {
                        listed.fetch_add(1, Ordering::SeqCst);
                    }
                    std::future::pending::<()>().await;
                }
            });
            let second = || crate::time::sleep(Duration::from_secs(1));
            second().await;
            let Some(disk) = world.disk(node) else { return };
            disk.set_faults(DiskFaults { stuck: true, ..disk.faults() });
            world.crash(node);
            second().await;
            disk.set_faults(DiskFaults::default());
            world.start(node);
            second().await;
        });
        assert_eq!(listed.load(Ordering::SeqCst), 2);
    }
}
