//! The driver of the fault plan: each fault begins at its time, lasts, and is undone; whether it took place is written down.

use super::cluster::Cluster;
use super::machines::NodeIndex;
use crate::report::Fired;
use crate::spec::{Fault, FaultKind, Target};
use nodes::control::regions::Step;
use nodes::proto::v1;
use sim::time::{self, Duration};
use sim::trace::Level;
use std::sync::Arc;

/// How long a cut that no message has run into is held beyond its time: elections send some by then.
const UNMET_MAX: Duration = Duration::from_secs(10);
/// The notice before a spot instance goes.
const NOTICE: Duration = Duration::from_secs(120);
/// A node that is told to stop must have ended after this.
const STOP_MAX: Duration = Duration::from_secs(20);
/// A restarted node must have caught up after this.
const CATCH_UP_MAX: Duration = Duration::from_secs(20);

/// How long to wait for a leader, or for a node, to hit.
const LEADER_WAIT: Duration = Duration::from_secs(10);
/// How long to wait for a step of a change of the primary region.
const STEP_WAIT: Duration = Duration::from_secs(150);

/// Plays the plan in order; returns once the last fault is undone.
pub async fn play(cluster: &Arc<Cluster>, plan: &[Fault]) -> Vec<Fired> {
    let (mut fired, mut going_on) = (vec![], vec![]);
    for fault in plan {
        let at = Duration::from_millis(fault.at_ms);
        let now = cluster.machines.now();
        if at > now {
            time::sleep(at - now).await;
        }
        match fault.beside {
            true => {
                let (cluster, fault) = (cluster.clone(), fault.clone());
                going_on.push((fired.len(), sim::task::spawn(async move { one(&cluster, &fault).await })));
            }
            false => fired.push(one(cluster, fault).await),
        }
    }
    // In the order of the plan.
    for (ahead, (place, task)) in going_on.into_iter().enumerate() {
        if let Ok(done) = task.await {
            fired.insert(place + ahead, done);
        }
    }
    fired
}

async fn targets(cluster: &Cluster, target: Target, fault: &Fault) -> Vec<NodeIndex> {
    match target {
        Target::Primary => cluster.in_region(&cluster.primary_and_secondary().await.0),
        Target::Secondary => cluster.in_region(&cluster.primary_and_secondary().await.1),
        Target::Witness => cluster.witness(),
        Target::Follower | Target::Voter => {
            let (primary, secondary) = cluster.primary_and_secondary().await;
            let there = cluster.in_region(if target == Target::Voter { &primary } else { &secondary });
            let there: Vec<NodeIndex> = there.into_iter().filter(|n| cluster.replicas.contains(n)).collect();
            there.get(fault.pick as usize % there.len().max(1)).copied().into_iter().collect()
        }
        Target::Controller => {
            let until = cluster.machines.now() + LEADER_WAIT;
            while cluster.machines.now() < until {
                if let Some(controller) = cluster.controller().await {
                    return vec![controller];
                }
                time::sleep(Duration::from_millis(100)).await;
            }
            vec![]
        }
        Target::Chosen => {
            let map = cluster.map().await;
            let chosen = map.and_then(|map| map.shards.first().map(|shard| shard.chosen as usize));
            let node = chosen.and_then(|id| cluster.replicas.get(id.checked_sub(1)?));
            node.copied().into_iter().collect()
        }
        Target::All => cluster.replicas.clone(),
        Target::Everyone => cluster.nodes().collect(),
        Target::Any | Target::Drawn | Target::Gateway | Target::Machine | Target::Apart | Target::Cache => {
            let all: Vec<NodeIndex> = match target {
                Target::Gateway => cluster.edges.clone(),
                Target::Apart => cluster.apart.clone(),
                Target::Cache => cluster.caches.clone(),
                Target::Machine => cluster.nodes().collect(),
                _ => cluster.replicas.clone(),
            };
            let Some(node) = all.get(fault.pick as usize % all.len().max(1)).copied() else { return vec![] };
            // Its bad disk may have ended it just now; its supervisor starts it again.
            let until = cluster.machines.now() + LEADER_WAIT;
            while !cluster.machines.is_running(node) && cluster.machines.now() < until {
                time::sleep(Duration::from_millis(100)).await;
            }
            vec![node]
        }
        Target::Leader => leader(cluster).await.into_iter().collect(),
        Target::Led => {
            let leader = leader(cluster).await;
            let led: Vec<NodeIndex> =
                cluster.replicas.iter().copied().filter(|n| Some(*n) != leader).collect();
            led.get(fault.pick as usize % led.len().max(1)).copied().into_iter().collect()
        }
    }
}

/// Who leads, once somebody does.
async fn leader(cluster: &Cluster) -> Option<NodeIndex> {
    let until = cluster.machines.now() + LEADER_WAIT;
    while cluster.machines.now() < until {
        // It may have ended since it answered: then somebody else is about to lead.
        let leader = cluster.leader().await;
        if let Some(leader) = leader.filter(|leader| cluster.machines.is_running(*leader)) {
            return Some(leader);
        }
        time::sleep(Duration::from_millis(100)).await;
    }
    None
}

/// How many changes of the primary region have ended.
async fn changes(cluster: &Cluster) -> usize {
    let regions = cluster.map().await.and_then(|map| map.regions);
    regions.map_or(0, |regions| regions.past.len())
}

/// Waits until one of the changes of the primary region after the first `after` has come to a step; of those that ended the last one
/// counts if nothing is said.
async fn wait_for_step(cluster: &Cluster, step: Step, after: Option<usize>) {
    let until = cluster.machines.now() + STEP_WAIT;
    while cluster.machines.now() < until {
        let regions = cluster.map().await.and_then(|map| map.regions);
        let reached = |change: &v1::RegionChange| change.steps.iter().any(|seen| seen.step == step.name());
        let now = regions.is_some_and(|r| {
            let after = after.unwrap_or(r.past.len().saturating_sub(1));
            r.past.iter().chain(&r.change).skip(after).any(reached)
        });
        if now {
            return;
        }
        time::sleep(Duration::from_millis(20)).await;
    }
}

/// As long as it lasts; `after` changes of the primary region had ended when it began.
async fn pass(cluster: &Cluster, fault: &Fault, after: usize) {
    time::sleep(Duration::from_millis(fault.lasts_ms)).await;
    if let Some(step) = fault.until_step {
        wait_for_step(cluster, step, Some(after)).await;
    }
}

async fn one(cluster: &Cluster, fault: &Fault) -> Fired {
    let machines = &*cluster.machines;
    if let Some(step) = fault.at_step {
        wait_for_step(cluster, step, None).await;
    }
    let after = match fault.until_step {
        Some(_) => changes(cluster).await,
        None => 0,
    };
    let nodes = targets(cluster, fault.target, fault).await;
    let from = match fault.from {
        Some(from) => targets(cluster, from, fault).await,
        None => vec![],
    };
    let names: Vec<String> = nodes.iter().map(|n| machines.name(*n)).collect();
    let lasts = Duration::from_millis(fault.lasts_ms);
    let began = machines.now();
    // Of all nodes, one with a bad disk may be down already.
    let running = match fault.target {
        Target::All | Target::Everyone | Target::Primary | Target::Secondary => {
            nodes.iter().any(|n| machines.is_running(*n))
        }
        _ => !nodes.is_empty() && nodes.iter().all(|n| machines.is_running(*n)),
    };
    // Of a region all machines are cut off, from all of the others.
    let wide = nodes.len() > 1 && fault.target.is_of_regions();
    let all: Vec<NodeIndex> = match (from.is_empty(), wide) {
        (false, _) => from,
        (true, true) => cluster.nodes().collect(),
        (true, false) => cluster.replicas.clone(),
    };
    let others = |node: NodeIndex| {
        all.iter().copied().filter(move |n| *n != node).filter(|n| !wide || !nodes.contains(n))
    };
    let step = |node: NodeIndex, rate_ppm: i64, step_ms: i64| {
        machines.modelled().inspect(|modelled| modelled.set_clock(node, rate_ppm, step_ms));
    };
    let took_place = match fault.kind {
        FaultKind::PowerOff | FaultKind::Crash => {
            // Alike machines fail alike: every other loss takes from each disk all that it may take.
            let harsh = fault.pick.is_multiple_of(2);
            for &node in &nodes {
                match machines.modelled().filter(|_| fault.kind == FaultKind::PowerOff) {
                    Some(modelled) => modelled.power_off(node, harsh),
                    None => machines.crash(node),
                }
            }
            pass(cluster, fault, after).await;
            nodes.iter().for_each(|n| machines.start(*n));
            running
        }
        FaultKind::Pause => {
            nodes.iter().for_each(|n| machines.pause(*n));
            pass(cluster, fault, after).await;
            nodes.iter().for_each(|n| machines.resume(*n));
            running
        }
        FaultKind::Partition | FaultKind::PartitionIn | FaultKind::PartitionOut => {
            let met = machines.met();
            for &node in &nodes {
                for other in others(node) {
                    if fault.kind != FaultKind::PartitionIn {
                        machines.cut(node, other);
                    }
                    if fault.kind != FaultKind::PartitionOut {
                        machines.cut(other, node);
                    }
                }
                machines.note(node, Level::Warn, &format!("cut off from its peers ({:?})", fault.kind));
            }
            let met = cut_for(cluster, fault, after, met).await;
            nodes.iter().for_each(|n| machines.note(*n, Level::Info, "links healed"));
            running && met
        }
        FaultKind::BitRot | FaultKind::Ruin | FaultKind::LostSector => {
            let mut harmed = !nodes.is_empty();
            if let Some(modelled) = machines.modelled() {
                nodes.iter().for_each(|node| harmed &= modelled.harm(*node, fault));
            }
            nodes.iter().for_each(|n| machines.note(*n, Level::Warn, &format!("its disk: {:?}", fault.kind)));
            pass(cluster, fault, after).await;
            harmed
        }
        FaultKind::Misdirected
        | FaultKind::SyncFailure
        | FaultKind::FullDisk
        | FaultKind::SlowDisk
        | FaultKind::StuckDisk => {
            for &node in &nodes {
                machines.modelled().inspect(|modelled| modelled.disk_fails(node, fault));
                machines.note(node, Level::Warn, &format!("its disk: {:?}", fault.kind));
            }
            let started = nodes.iter().map(|n| (*n, machines.boots(*n))).collect::<Vec<_>>();
            let mut left = lasts;
            while !left.is_zero() {
                let step = left.min(Duration::from_millis(100));
                time::sleep(step).await;
                left -= step;
                // One failed sync is enough: the process ends, and the next one finds a disk that works.
                if fault.kind == FaultKind::SyncFailure
                    && started.iter().any(|(n, boots)| machines.boots(*n) != *boots)
                {
                    break;
                }
            }
            for &node in &nodes {
                machines.modelled().inspect(|modelled| modelled.disk_works(node));
                machines.note(node, Level::Info, "its disk works again");
                if fault.kind == FaultKind::StuckDisk && machines.is_running(node) {
                    machines.crash(node);
                    machines.start(node);
                }
            }
            running
        }
        FaultKind::Silence => {
            let met = machines.met();
            nodes.iter().for_each(|n| machines.silence(*n));
            let met = cut_for(cluster, fault, after, met).await;
            nodes.iter().for_each(|n| machines.note(*n, Level::Info, "links healed"));
            running && met
        }
        FaultKind::Narrow => {
            let carry = |bytes_per_s: Option<u64>| {
                let Some(modelled) = machines.modelled() else { return };
                for (node, other) in nodes.iter().flat_map(|n| others(*n).map(move |other| (*n, other))) {
                    modelled.narrow(node, other, bytes_per_s);
                    modelled.narrow(other, node, bytes_per_s);
                }
            };
            carry(Some(fault.bytes_per_s));
            let text = format!("its links carry {} bytes a second", fault.bytes_per_s);
            nodes.iter().for_each(|n| machines.note(*n, Level::Warn, &text));
            pass(cluster, fault, after).await;
            carry(None);
            nodes.iter().for_each(|n| machines.note(*n, Level::Info, "its links are as usual"));
            running
        }
        FaultKind::CalendarStep => {
            nodes.iter().for_each(|n| step(*n, 0, fault.step_ms));
            pass(cluster, fault, after).await;
            nodes.iter().for_each(|n| step(*n, 0, -fault.step_ms));
            running
        }
        FaultKind::RollingRestart => {
            let mut in_order = running;
            for &node in &nodes {
                in_order &= cluster.stop(node, STOP_MAX).await;
                machines.end(node);
                time::sleep(lasts).await;
                machines.start(node);
                in_order &= caught_up(cluster, node).await;
            }
            in_order
        }
        FaultKind::Reclaim => {
            let mut in_order = running;
            for &node in &nodes {
                in_order &= cluster.stop(node, NOTICE).await;
                machines.replace(node, true);
            }
            time::sleep((began + lasts).saturating_sub(machines.now())).await;
            nodes.iter().for_each(|n| machines.start(*n));
            in_order
        }
        FaultKind::Replace | FaultKind::EmptyDisk => {
            nodes.iter().for_each(|n| machines.replace(*n, fault.kind == FaultKind::Replace));
            pass(cluster, fault, after).await;
            nodes.iter().for_each(|n| machines.start(*n));
            running
        }
        FaultKind::Clock => {
            nodes.iter().for_each(|n| step(*n, fault.rate_ppm, fault.step_ms));
            pass(cluster, fault, after).await;
            nodes.iter().for_each(|n| step(*n, 0, 0));
            running
        }
    };
    let (began_s, undone_s) = (began.as_secs_f64(), machines.now().as_secs_f64());
    Fired { fault: fault.clone(), node: names.join("+"), fired: took_place, began_s, undone_s }
}

/// Keeps the links cut for as long as it lasts, and on until a message has run into the cut: one that falls between two messages harms nobody.
/// Whether a message has, in the end; `met` is the machines' count from before the cut.
async fn cut_for(cluster: &Cluster, fault: &Fault, after: usize, met: u64) -> bool {
    let machines = &*cluster.machines;
    pass(cluster, fault, after).await;
    let until = machines.now() + UNMET_MAX;
    while machines.met() == met && machines.now() < until {
        time::sleep(Duration::from_millis(100)).await;
    }
    machines.heal_links();
    machines.met() > met
}

/// Waits until a restarted node serves, and, if it is a replica, until all of them agree about what was written before it came back.
async fn caught_up(cluster: &Cluster, node: NodeIndex) -> bool {
    let until = cluster.machines.now() + CATCH_UP_MAX;
    let mut wanted = Default::default();
    while cluster.machines.now() < until {
        let there = match cluster.replicas.contains(&node) {
            true => cluster.redundant(&mut wanted).await,
            false => cluster.status(node, false).await.is_some(),
        };
        if there {
            return true;
        }
        time::sleep(Duration::from_millis(100)).await;
    }
    false
}
