//! What recovery is measured with, beside the clients' history: when all replicas were there again, and how busy the machines were.

use super::cluster::Cluster;
use super::machines::NodeIndex;
use crate::history::Call;
use crate::recovery::{Measured, Times, measure};
use crate::report::Fired;
use crate::spec::Fault;
use sim::task::JoinHandle;
use sim::time::{self, Duration};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A replica that lags for less than this, or answers this much later, has not gone.
const LAG_MAX: Duration = Duration::from_secs(1);

/// Looks on while a run goes on.
pub struct Watch {
    quiet_from: Duration,
    seen: Arc<Mutex<Looks>>,
    looking: JoinHandle<()>,
}

#[derive(Default)]
struct Looks {
    /// Since when all replicas are there, if they are.
    since: Option<Duration>,
    /// Since when one is missing or lags.
    missed: Option<Duration>,
    /// When a change of the primary region was seen to be done.
    changed: Option<Duration>,
    utilisation: BTreeMap<String, f64>,
}

impl Watch {
    /// The quiet time ends with the first fault of the plan.
    pub fn start(cluster: &Arc<Cluster>, quiet_from_s: u64, plan: &[Fault]) -> Watch {
        let (quiet_from, seen) = (Duration::from_secs(quiet_from_s), Arc::<Mutex<Looks>>::default());
        let quiet_to = Duration::from_millis(plan.first().map_or(0, |fault| fault.at_ms));
        let looking = sim::task::spawn(look(cluster.clone(), (quiet_from, quiet_to), seen.clone()));
        Watch { quiet_from, seen, looking }
    }

    /// The load and the faults have ended, and all replicas agree, or never will.
    pub fn end(&self) {
        self.looking.abort();
    }

    /// What came of it; `None` if no fault took place.
    pub fn measured(self, cluster: &Cluster, calls: &[Call], fired: &[Fired]) -> Option<Measured> {
        let first = fired.first().filter(|first| first.fired)?;
        let ns = |seconds: f64| (seconds * 1e9) as u64;
        let times = Times {
            quiet_from_ns: self.quiet_from.as_nanos() as u64,
            fault_ns: ns(first.began_s),
            undone_ns: ns(first.undone_s),
        };
        // There is one shard, and every replica serves all of it.
        let mut measured = measure(calls, times, |_| true);
        let seen = self.seen.lock().unwrap_or_else(|p| p.into_inner());
        measured.redundancy_s = seen.since.map(|at| (at.as_secs_f64() - first.began_s).max(0.0));
        measured.mttr_s = seen.changed.map(|at| (at.as_secs_f64() - first.began_s).max(0.0));
        measured.utilisation = seen.utilisation.clone();
        let bytes = cluster.replicas.iter().map(|node| cluster.machines.bytes(*node));
        measured.bytes = bytes.max().unwrap_or(0);
        Some(measured)
    }
}

async fn look(cluster: Arc<Cluster>, (from, to): (Duration, Duration), seen: Arc<Mutex<Looks>>) {
    let machines = &cluster.machines;
    let nodes: Vec<NodeIndex> = cluster.nodes().collect();
    time::sleep(from.saturating_sub(machines.now())).await;
    let before: Vec<Duration> = nodes.iter().map(|node| machines.busy(*node)).collect();
    time::sleep(to.saturating_sub(machines.now())).await;
    let whole = (to.saturating_sub(from) * machines.cores() as u32).as_secs_f64();
    for (node, before) in nodes.iter().zip(before) {
        let share = machines.busy(*node).saturating_sub(before).as_secs_f64() / whole;
        seen.lock().unwrap_or_else(|p| p.into_inner()).utilisation.insert(machines.name(*node), share);
    }
    let mut wanted = Default::default();
    loop {
        time::sleep(LOOK_INTERVAL).await;
        let at = machines.now();
        let redundant = cluster.redundant(&mut wanted).await;
        if cluster.has_regions() && seen.lock().unwrap_or_else(|p| p.into_inner()).changed.is_none() {
            let regions = cluster.map().await.and_then(|map| map.regions);
            let done = regions.is_some_and(|regions| regions.past.iter().any(|change| change.step == "done"));
            seen.lock().unwrap_or_else(|p| p.into_inner()).changed = done.then(|| machines.now());
        }
        let mut seen = seen.lock().unwrap_or_else(|p| p.into_inner());
        if redundant {
            (seen.since, seen.missed) = (seen.since.or(Some(at)), None);
        } else if at - *seen.missed.get_or_insert(at) >= LAG_MAX {
            seen.since = None;
        }
    }
}
