//! The driver of the fault plan: each fault begins at its time, lasts, and is undone; whether it took place is written down.

use super::cluster::Cluster;
use crate::report::Fired;
use crate::spec::{Fault, FaultKind, Target};
use sim::time::{self, Duration};
use sim::trace::Level;
use sim::world::{NodeIndex, World};
use std::sync::Arc;

/// Where a replica's data lies.
const STORED: [&str; 3] = ["views", "ledger", "bases"];
const RUINED: [&str; 2] = ["views", "bases"];
/// Places harmed by one fault.
const PLACES: usize = 2;
const RUIN_PLACES: usize = 80;
const SLOW_SYNC: Duration = Duration::from_millis(100);

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
        Target::Everyone => cluster.machines().collect(),
        Target::Any | Target::Drawn | Target::Gateway | Target::Machine | Target::Apart | Target::Cache => {
            let all: Vec<NodeIndex> = match fault.target {
                Target::Gateway => cluster.edges.clone(),
                Target::Apart => cluster.apart.clone(),
                Target::Cache => cluster.caches.clone(),
                Target::Machine => cluster.machines().collect(),
                _ => cluster.replicas.clone(),
            };
            let Some(node) = all.get(fault.pick as usize % all.len().max(1)).copied() else { return vec![] };
            // Its bad disk may have ended it just now; its supervisor starts it again.
            let until = cluster.world.now() + LEADER_WAIT;
            while !cluster.world.is_running(node) && cluster.world.now() < until {
                time::sleep(Duration::from_millis(100)).await;
            }
            vec![node]
        }
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
    let began = world.now();
    // Of all nodes, one with a bad disk may be down already.
    let running = match fault.target {
        Target::All | Target::Everyone => nodes.iter().any(|n| world.is_running(*n)),
        _ => !nodes.is_empty() && nodes.iter().all(|n| world.is_running(*n)),
    };
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
            let met = cut_for(world, lasts, stalled).await;
            nodes.iter().for_each(|n| world.note(*n, Level::Info, "links healed"));
            running && met
        }
        FaultKind::BitRot | FaultKind::Ruin | FaultKind::LostSector => {
            let mut harmed = !nodes.is_empty();
            for disk in nodes.iter().filter_map(|n| world.disk(*n)) {
                let (dirs, places): (&[&str], _) = match fault.kind {
                    FaultKind::Ruin => (&RUINED, RUIN_PLACES),
                    _ => (&STORED, PLACES),
                };
                for turn in 0..places {
                    let dir = dirs[(turn + fault.at_ms as usize) % dirs.len()];
                    harmed &= match fault.kind {
                        FaultKind::LostSector => disk.lose_a_sector(dir),
                        _ => disk.flip_a_bit(dir),
                    };
                }
            }
            nodes.iter().for_each(|n| world.note(*n, Level::Warn, &format!("its disk: {:?}", fault.kind)));
            time::sleep(lasts).await;
            harmed
        }
        FaultKind::Misdirected
        | FaultKind::SyncFailure
        | FaultKind::FullDisk
        | FaultKind::SlowDisk
        | FaultKind::StuckDisk => {
            for &node in &nodes {
                let Some(disk) = world.disk(node) else { continue };
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
                world.note(node, Level::Warn, &format!("its disk: {:?}", fault.kind));
            }
            let started = nodes.iter().map(|n| (*n, world.boots(*n))).collect::<Vec<_>>();
            let mut left = lasts;
            while !left.is_zero() {
                let step = left.min(Duration::from_millis(100));
                time::sleep(step).await;
                left -= step;
                // One failed sync is enough: the process ends, and the next one finds a disk that works.
                if fault.kind == FaultKind::SyncFailure
                    && started.iter().any(|(n, boots)| world.boots(*n) != *boots)
                {
                    break;
                }
            }
            for &node in &nodes {
                let Some(disk) = world.disk(node) else { continue };
                let usual = cluster.disk_faults.get(&node).copied().unwrap_or_default();
                disk.set_faults(usual);
                world.note(node, Level::Info, "its disk works again");
                if fault.kind == FaultKind::StuckDisk && world.is_running(node) {
                    world.crash(node);
                    world.start(node);
                }
            }
            running
        }
        FaultKind::Silence => {
            let stalled = world.links().counters().0;
            nodes.iter().for_each(|n| world.silence(*n));
            let met = cut_for(world, lasts, stalled).await;
            nodes.iter().for_each(|n| world.note(*n, Level::Info, "links healed"));
            running && met
        }
        FaultKind::CalendarStep => {
            nodes.iter().for_each(|n| world.set_clock(*n, 0, fault.step_ms));
            time::sleep(lasts).await;
            nodes.iter().for_each(|n| world.set_clock(*n, 0, -fault.step_ms));
            running
        }
        FaultKind::RollingRestart => {
            let mut in_order = running;
            for &node in &nodes {
                in_order &= cluster.stop(node, STOP_MAX).await;
                world.end(node);
                time::sleep(lasts).await;
                world.start(node);
                in_order &= caught_up(cluster, node).await;
            }
            in_order
        }
        FaultKind::Reclaim => {
            let mut in_order = running;
            for &node in &nodes {
                in_order &= cluster.stop(node, NOTICE).await;
                cluster.replace(node);
            }
            time::sleep((began + lasts).saturating_sub(world.now())).await;
            nodes.iter().for_each(|n| world.start(*n));
            in_order
        }
        FaultKind::Clock => {
            nodes.iter().for_each(|n| world.set_clock(*n, fault.rate_ppm, fault.step_ms));
            time::sleep(lasts).await;
            nodes.iter().for_each(|n| world.set_clock(*n, 0, 0));
            running
        }
    };
    let (began_s, undone_s) = (began.as_secs_f64(), world.now().as_secs_f64());
    Fired { fault: fault.clone(), node: names.join("+"), fired: took_place, began_s, undone_s }
}

/// Keeps the links cut for `lasts`, and on until a message has run into the cut: one that falls between two messages harms nobody.
/// Whether a message has, in the end; `stalled` is the links' count from before the cut.
async fn cut_for(world: &World, lasts: Duration, stalled: u64) -> bool {
    let until = world.now() + lasts + UNMET_MAX;
    time::sleep(lasts).await;
    while world.links().counters().0 == stalled && world.now() < until {
        time::sleep(Duration::from_millis(100)).await;
    }
    world.links().heal_all();
    world.links().counters().0 > stalled
}

/// Waits until a restarted node serves, and, if it is a replica, until all of them agree about what was written before it came back.
async fn caught_up(cluster: &Cluster, node: NodeIndex) -> bool {
    let until = cluster.world.now() + CATCH_UP_MAX;
    let mut wanted = Default::default();
    while cluster.world.now() < until {
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
