//! The driver of the fault plan: each fault begins at its time, lasts, and is undone; whether it took place is written down.

use super::cluster::Cluster;
use crate::report::Fired;
use crate::spec::{Fault, FaultKind, Target};
use sim::time::{self, Duration};
use sim::trace::Level;
use sim::world::NodeIndex;
use std::sync::Arc;

/// How long to look for a leader to hit.
const LEADER_WAIT: Duration = Duration::from_secs(10);

/// Plays the plan in order; returns once the last fault is undone.
pub async fn play(cluster: &Arc<Cluster>, plan: &[Fault]) -> Vec<Fired> {
    let mut fired = vec![];
    for fault in plan {
        let at = Duration::from_millis(fault.at_ms);
        let now = cluster.world.now();
        if at > now {
            time::sleep(at - now).await;
        }
        fired.push(one(cluster, fault).await);
    }
    fired
}

async fn targets(cluster: &Cluster, fault: &Fault) -> Vec<NodeIndex> {
    match fault.target {
        Target::All => cluster.replicas.clone(),
        Target::Any => vec![cluster.replicas[fault.pick as usize % cluster.replicas.len()]],
        Target::Leader => {
            let until = cluster.world.now() + LEADER_WAIT;
            while cluster.world.now() < until {
                if let Some(leader) = cluster.leader().await {
                    return vec![leader];
                }
                time::sleep(Duration::from_millis(100)).await;
            }
            vec![]
        }
    }
}

async fn one(cluster: &Cluster, fault: &Fault) -> Fired {
    let world = &cluster.world;
    let nodes = targets(cluster, fault).await;
    let names: Vec<String> = nodes.iter().map(|n| world.node_name(*n)).collect();
    let lasts = Duration::from_millis(fault.lasts_ms);
    let running = !nodes.is_empty() && nodes.iter().all(|n| world.is_running(*n));
    let others = |node: NodeIndex| cluster.replicas.iter().copied().filter(move |n| *n != node);
    let took_place = match fault.kind {
        FaultKind::PowerOff | FaultKind::Crash => {
            // Alike machines fail alike: every other loss takes from each disk all that it may take.
            let harsh = fault.kind == FaultKind::PowerOff && fault.pick.is_multiple_of(2);
            for &node in &nodes {
                if let (true, Some(disk)) = (harsh, world.disk(node)) {
                    disk.lose_all_unsynced();
                }
                if fault.kind == FaultKind::Crash { world.crash(node) } else { world.power_off(node) }
            }
            time::sleep(lasts).await;
            nodes.iter().for_each(|n| world.start(*n));
            running
        }
        FaultKind::Pause => {
            nodes.iter().for_each(|n| world.pause(*n));
            time::sleep(lasts).await;
            nodes.iter().for_each(|n| world.resume(*n));
            running
        }
        FaultKind::Partition | FaultKind::PartitionIn | FaultKind::PartitionOut => {
            let stalled = world.links().counters().0;
            for &node in &nodes {
                for other in others(node) {
                    if fault.kind != FaultKind::PartitionIn {
                        world.links().cut(node, other);
                    }
                    if fault.kind != FaultKind::PartitionOut {
                        world.links().cut(other, node);
                    }
                }
                world.note(node, Level::Warn, &format!("cut off from its peers ({:?})", fault.kind));
            }
            time::sleep(lasts).await;
            world.links().heal_all();
            nodes.iter().for_each(|n| world.note(*n, Level::Info, "links healed"));
            running && world.links().counters().0 > stalled
        }
        FaultKind::Clock => {
            nodes.iter().for_each(|n| world.set_clock(*n, fault.rate_ppm, fault.step_ms));
            time::sleep(lasts).await;
            nodes.iter().for_each(|n| world.set_clock(*n, 0, 0));
            running
        }
    };
    Fired { fault: fault.clone(), node: names.join("+"), fired: took_place }
}
