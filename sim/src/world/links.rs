//! Links: what lies between two machines.
//!
//! Each ordered pair of nodes has a [`LinkModel`], its own or that of its regions, and may be cut. The model is TCP's
//! view of a bad network: within a connection bytes arrive in order or not at all; a lost packet is a delay of one
//! retransmission timeout, doubling; a cut link stalls until it heals, or for [`GIVE_UP`], when the connection breaks.

use super::{NodeIndex, lock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::Notify;

/// How long a sender retransmits into a cut link before its connection breaks.
pub const GIVE_UP: Duration = Duration::from_secs(15);
const RETRANSMIT: Duration = Duration::from_millis(200);

/// Latency: `base`, plus an exponentially distributed part of mean `jitter`, capped at 20 times that.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    pub base: Duration,
    pub jitter: Duration,
}

#[derive(Clone, Copy, Debug)]
pub struct LinkModel {
    pub latency: Latency,
    /// Bytes per second.
    pub bandwidth: u64,
    /// Probability that a message must be retransmitted.
    pub loss: f64,
}

impl Default for LinkModel {
    /// One data centre: a tenth of a millisecond, 10 Gbit/s.
    fn default() -> LinkModel {
        let latency = Latency { base: Duration::from_micros(100), jitter: Duration::from_micros(30) };
        LinkModel { latency, bandwidth: 1_250_000_000, loss: 0.0 }
    }
}

/// When a message arrives, in global nanoseconds; `Stalled` while the link is cut.
#[derive(Clone, Copy, Debug)]
pub enum Arrival {
    At(u64),
    Stalled { from: NodeIndex, to: NodeIndex },
}

pub struct Links {
    state: Mutex<LinkState>,
    changed: Notify,
}

#[derive(Default)]
struct LinkState {
    default: LinkModel,
    by_region: BTreeMap<(String, String), LinkModel>,
    by_pair: BTreeMap<(NodeIndex, NodeIndex), LinkModel>,
    cut: BTreeSet<(NodeIndex, NodeIndex)>,
    busy_until: BTreeMap<(NodeIndex, NodeIndex), u64>,
    stalled: u64,
    retransmitted: u64,
}

impl Links {
    pub(super) fn new() -> Links {
        Links { state: Mutex::default(), changed: Notify::new() }
    }

    pub fn set_default(&self, model: LinkModel) {
        lock(&self.state).default = model;
    }

    /// The model from one region to another; the other direction keeps its own.
    pub fn set_regions(&self, from: &str, to: &str, model: LinkModel) {
        lock(&self.state).by_region.insert((from.into(), to.into()), model);
    }

    /// The model of one direction of one pair; `None` returns to the regions'.
    pub fn set_pair(&self, from: NodeIndex, to: NodeIndex, model: Option<LinkModel>) {
        let mut state = lock(&self.state);
        match model {
            Some(model) => state.by_pair.insert((from, to), model),
            None => state.by_pair.remove(&(from, to)),
        };
    }

    /// Cuts one direction. Nothing sent arrives until [`Links::heal`].
    pub fn cut(&self, from: NodeIndex, to: NodeIndex) {
        lock(&self.state).cut.insert((from, to));
    }

    pub fn heal(&self, from: NodeIndex, to: NodeIndex) {
        lock(&self.state).cut.remove(&(from, to));
        self.changed.notify_waiters();
    }

    /// Cuts both directions between every node of `a` and every node of `b`.
    pub fn partition(&self, a: &[NodeIndex], b: &[NodeIndex]) {
        for (&x, &y) in a.iter().flat_map(|x| b.iter().map(move |y| (x, y))) {
            self.cut(x, y);
            self.cut(y, x);
        }
    }

    pub fn heal_all(&self) {
        lock(&self.state).cut.clear();
        self.changed.notify_waiters();
    }

    /// How many messages a cut has stalled, and how many a loss has delayed: proof that such faults took place.
    pub fn counters(&self) -> (u64, u64) {
        let state = lock(&self.state);
        (state.stalled, state.retransmitted)
    }

    pub(super) fn model(&self, from: (NodeIndex, &str), to: (NodeIndex, &str)) -> LinkModel {
        let state = lock(&self.state);
        if let Some(model) = state.by_pair.get(&(from.0, to.0)) {
            return *model;
        }
        if state.by_region.is_empty() {
            return state.default;
        }
        *state.by_region.get(&(from.1.to_string(), to.1.to_string())).unwrap_or(&state.default)
    }

    pub(super) fn transmit(
        &self,
        from: (NodeIndex, &str),
        to: (NodeIndex, &str),
        bytes: usize,
        not_before_ns: u64,
        now_ns: u64,
    ) -> Arrival {
        if from.0 == to.0 {
            return Arrival::At(now_ns.max(not_before_ns));
        }
        let model = self.model(from, to);
        // Draw outside the lock: the draw itself asks the world.
        let jitter = -(1.0 - crate::rand::unit()).max(2e-9).ln();
        let mut delay = model.latency.base + model.latency.jitter.mul_f64(jitter.min(20.0));
        let mut losses = 0;
        while losses < 6 && crate::rand::chance(model.loss) {
            delay += RETRANSMIT * (1 << losses);
            losses += 1;
        }
        let mut state = lock(&self.state);
        if state.cut.contains(&(from.0, to.0)) {
            state.stalled += 1;
            return Arrival::Stalled { from: from.0, to: to.0 };
        }
        state.retransmitted += losses as u64;
        let sending_ns = (bytes as u128 * 1_000_000_000 / model.bandwidth.max(1) as u128) as u64;
        let busy = state.busy_until.entry((from.0, to.0)).or_insert(0);
        *busy = (*busy).max(now_ns) + sending_ns;
        Arrival::At((*busy + delay.as_nanos() as u64).max(not_before_ns))
    }

    /// When all that was sent so far has left for the link, in global nanoseconds.
    pub(super) fn free_ns(&self, from: NodeIndex, to: NodeIndex) -> u64 {
        lock(&self.state).busy_until.get(&(from, to)).copied().unwrap_or(0)
    }

    fn is_cut(&self, from: NodeIndex, to: NodeIndex) -> bool {
        lock(&self.state).cut.contains(&(from, to))
    }
}

pub(super) async fn arrive(links: &Links, arrival: Arrival) -> bool {
    match arrival {
        Arrival::At(ns) => {
            let now = super::global_ns();
            if ns > now {
                true_sleep(Duration::from_nanos(ns - now)).await;
            }
            true
        }
        Arrival::Stalled { from, to } => {
            let healed = async {
                loop {
                    let changed = links.changed.notified();
                    if !links.is_cut(from, to) {
                        break;
                    }
                    changed.await;
                }
                // The next retransmission notices.
                true_sleep(RETRANSMIT.mul_f64(0.1 + crate::rand::unit() * 4.0)).await;
            };
            crate::time::timeout(GIVE_UP, healed).await.is_ok()
        }
    }
}

/// Waits until the link has carried what was sent so far.
pub(super) async fn sent_off(links: &Links, from: NodeIndex, to: NodeIndex) {
    let (free, now) = (links.free_ns(from, to), super::global_ns());
    if free > now {
        true_sleep(Duration::from_nanos(free - now)).await;
    }
}

/// Sleeps on nobody's clock: a signal's travel time does not depend on the node that waits for it.
async fn true_sleep(duration: Duration) {
    let deadline = madsim::time::Instant::now() + duration;
    let mut timer = Box::pin(madsim::time::sleep(Duration::ZERO));
    timer.as_mut().reset(deadline);
    timer.await
}
