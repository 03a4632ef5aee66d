//! What plays a scenario, on whatever machines: boot them, load them, hit them, let them recover, look at what is left, judge.
//!
//! ```text
//! settled scenario ─► cluster ─┬─ clients ──────────────► calls and operations ─┐
//!                              ├─ faults, changes ──────► what took place       ├─► history ─► promises ─► report
//!                              └─ samples, watch, look ─► what replicas hold ───┘
//!                                     │
//!                              [`Machines`]: of the simulated world, or processes of this machine
//! ```
//!
//! Nothing here knows in which world it is. All that is asked of machines is in one trait, so that a scenario file means the same on both,
//! and what differs between two of its runs is the machines.

mod changes;
mod client;
mod cluster;
mod faults;
mod machines;
mod watch;

pub use cluster::Cluster;
pub use machines::{Machines, Modelled, NewNode, NodeIndex, RarePaths, Session, Waiting};

use crate::history::{End, Final, History, Row, Sample};
use crate::promises;
use crate::recovery::{Measured, QUIET_CALLS_MIN};
use crate::report::{Class, Fired, Report, Verdict, empty};
use crate::spec::Scenario;
use changes::Played;
use client::{Recorded, Recorder};
use nodes::error::Error;
use nodes::ledger::recovery;
use nodes::proto::v1;
use sim::time::{self, Duration};
use sim::trace::Level;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use watch::Watch;

const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);
/// How often a read of the last look is asked for, and the pause between.
const ASKED_MAX: usize = 5;
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What a scenario that was played has shown.
pub struct Seen {
    pub history: History,
    /// Changes of the cluster that were not done in the end.
    undone: usize,
    /// How often another region became the primary.
    region_changes: usize,
    measured: Option<Measured>,
    fired: Vec<Fired>,
    disk_faults: Vec<Fired>,
    probes: BTreeMap<String, u64>,
    /// What was mended, and the node that did it.
    mended: Vec<(String, &'static str)>,
}

/// The report of what was seen, without the names of the run.
pub fn judge(seen: Seen, virtual_s: f64, settled: &Scenario) -> (Report, History) {
    use crate::history::Response;
    let enough = settled.enough;
    let Seen { history, measured, fired, disk_faults, probes, mended, undone, region_changes } = seen;
    let mut violations = promises::check_all(&history);
    if undone > 0 {
        let what = format!("{undone} changes of the cluster were not done in time");
        violations.push(promises::Violation { promise: "P12".into(), what, at_s: virtual_s });
    }
    if let Some(wanted) = settled.promises.region_changes.filter(|wanted| *wanted != region_changes) {
        let what = format!("another region became the primary {region_changes} times, not {wanted}");
        violations.push(promises::Violation { promise: "P14".into(), what, at_s: virtual_s });
    }
    if probes.contains_key(recovery::CONTRADICTION) {
        // A view was made anew because of a bug, not of a disk: what it held is gone, but it was wrong.
        let what = "a replica's views contradicted themselves; see the trace".to_string();
        violations.push(promises::Violation { promise: "P5".into(), what, at_s: virtual_s });
    }
    let of_disks = fired.iter().chain(&disk_faults).filter(|fired| fired.fault.kind.is_of_disks());
    let bad: BTreeSet<&str> = of_disks.flat_map(|fired| fired.node.split('+')).collect();
    if let Some((node, path)) = mended.iter().find(|(node, _)| !bad.contains(node.as_str())) {
        let what =
            format!("the disk of {node} was not bad, but something was mended ({path}); see the trace");
        violations.push(promises::Violation { promise: "P5".into(), what, at_s: virtual_s });
    }
    let acked = history.acked();
    let reported = promises::reported(&history);
    let (lost_reported, first_lost) = (reported.len(), reported.iter().map(|lost| lost.op.return_ns).min());
    // A write may be answered long after it was made, but it is not made before it was asked for.
    let last_lost = reported.iter().map(|lost| lost.op.call_ns).max();
    let lost_s =
        first_lost.zip(last_lost).map_or(0.0, |(first, last)| last.saturating_sub(first) as f64 / 1e9);
    if let Some(within) = settled.promises.lost_within_s.filter(|within| lost_s > *within) {
        let what = format!("lost were the writes of {lost_s:.1} seconds, not of {within:.1} at most");
        violations.push(promises::Violation { promise: "P2".into(), what, at_s: virtual_s });
    }
    let measured = measured.map(|measured| Measured {
        rpo_s: measured.mttr_s.map(|_| {
            let fault_s = fired.first().map_or(0.0, |fired| fired.began_s);
            first_lost.map_or(0.0, |at| (fault_s - at as f64 / 1e9).max(0.0))
        }),
        ..measured
    });
    let idle: Vec<String> =
        fired.iter().filter(|f| !f.fired).map(|f| format!("{:?} on '{}'", f.fault.kind, f.node)).collect();
    let safe = violations.iter().all(|violation| violation.promise == "P12");
    let (verdict, why) = if !violations.is_empty() {
        (Verdict::Fail, String::new())
    } else if acked < enough.acked {
        (Verdict::Vacuous, format!("only {acked} acknowledged writes, {} are needed", enough.acked))
    } else if virtual_s < enough.virtual_s {
        (Verdict::Vacuous, format!("only {virtual_s:.0} virtual seconds, {:.0} are needed", enough.virtual_s))
    } else if lost_s < enough.lost_s {
        (
            Verdict::Vacuous,
            format!("only the writes of {lost_s:.1} s were lost, {:.1} are needed", enough.lost_s),
        )
    } else if let Some(calls) = measured.as_ref().map(|m| m.quiet_calls).filter(|n| *n < QUIET_CALLS_MIN) {
        (Verdict::Vacuous, format!("only {calls} calls before the fault, {QUIET_CALLS_MIN} are needed"))
    } else if !idle.is_empty() {
        (Verdict::Vacuous, format!("planned faults never took place: {}", idle.join(", ")))
    } else {
        (Verdict::Pass, String::new())
    };
    let mut acks: Vec<u64> = history
        .ops
        .iter()
        .filter(|op| matches!(op.response, Response::Written { .. }))
        .map(|op| op.return_ns)
        .collect();
    acks.sort_unstable();
    let gap_ns = acks.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let count = |wanted: fn(&Response) -> bool| history.ops.iter().filter(|op| wanted(&op.response)).count();
    let class = match verdict {
        Verdict::Pass => Class::Pass,
        Verdict::Vacuous => Class::Vacuous,
        Verdict::Fail if safe => Class::Liveness,
        Verdict::Fail | Verdict::Broken => Class::Safety,
    };
    let report = Report {
        verdict,
        class,
        why,
        acked,
        lost: promises::lost(&history),
        lost_reported,
        lost_s,
        faults: fired,
        violations,
        reads: count(|r| {
            matches!(
                r,
                Response::Value { .. }
                    | Response::Absent { .. }
                    | Response::Rows(_)
                    | Response::Walked { .. }
            )
        }),
        unknown: history
            .ops
            .iter()
            .filter(|op| op.request.is_write() && op.response == Response::Unknown)
            .count(),
        write_gap_s: gap_ns as f64 / 1e9,
        converge_s: history.converged_ns.map(|at| at.saturating_sub(history.healed_ns) as f64 / 1e9),
        disk_faults,
        probes,
        recovery: measured,
        ..empty()
    };
    (report, history)
}

/// Plays a settled scenario.
pub async fn scenes(machines: Arc<dyn Machines>, scenario: Scenario) -> Result<Seen, Error> {
    // Setup.
    let cluster = Arc::new(Cluster::start(machines.clone(), &scenario).await?);
    let recorder: Recorder = Arc::default();
    // Start: load, faults and samples side by side.
    let running = client::start(&cluster, &scenario, &recorder);
    let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let sampler = sim::task::spawn(sample_forever(cluster.clone(), samples.clone()));
    let bad_disk = {
        let (cluster, plan) = (cluster.clone(), scenario.faults.disk.unwrap_or_default());
        sim::task::spawn(async move { faults::play(&cluster, &plan).await })
    };
    let changing =
        sim::task::spawn(changes::play(cluster.clone(), scenario.topology.clone(), scenario.changes.clone()));
    let watch =
        scenario.recovery.as_ref().map(|r| Watch::start(&cluster, r.quiet_from_s, &scenario.faults.list));
    let fired = faults::play(&cluster, &scenario.faults.list).await;
    let disk_faults = bad_disk.await.map_err(|e| Error::Internal(format!("the disk's faults: {e}")))?;
    let healed = machines.now();
    while *running.lock().unwrap_or_else(|p| p.into_inner()) > 0 {
        time::sleep(Duration::from_millis(250)).await;
    }
    sampler.abort();
    // Recover: the system gets its time after the load and the faults, without buggify.
    machines.calm();
    let healed = healed.max(machines.now());
    // What an operator began goes on.
    let until = machines.now() + Duration::from_secs(scenario.promises.converge_s);
    while !changing.is_finished() && machines.now() < until {
        time::sleep(Duration::from_millis(250)).await;
    }
    let healed = healed.max(machines.now().min(until));
    let changed = match changing.is_finished() {
        true => changing.await.map_err(|e| Error::Internal(format!("the operator: {e}")))?,
        false => {
            changing.abort();
            Played::default()
        }
    };
    machines.note(0, Level::Info, "load and faults have ended; the system recovers");
    let limit = Duration::from_secs(scenario.promises.converge_s);
    let mut converged = None;
    while machines.now() < healed + limit * 2 {
        if agree(&cluster).await {
            converged = Some(machines.now());
            break;
        }
        time::sleep(Duration::from_millis(200)).await;
    }
    watch.iter().for_each(Watch::end);
    // Check.
    let mut finals = vec![];
    if converged.is_some() {
        for &node in &cluster.replicas {
            finals.push(look_again(&cluster, node, healed + limit * 2).await?);
        }
    }
    if let Some(why) = machines.broken() {
        return Err(Error::Internal(why));
    }
    let RarePaths { taken: probes, mended } = machines.rare_paths(&cluster.replicas);
    let Recorded { ops, calls } = std::mem::take(&mut *recorder.lock().unwrap_or_else(|p| p.into_inner()));
    let measured = watch.and_then(|watch| watch.measured(&cluster, &calls, &fired));
    let map = cluster.map().await.unwrap_or_default();
    let done = |change: &&v1::RegionChange| change.step == "done";
    let region_changes = map.regions.as_ref().map_or(0, |regions| regions.past.iter().filter(done).count());
    let ends = ends(&map);
    let history = History {
        ops,
        calls,
        samples: std::mem::take(&mut *samples.lock().unwrap_or_else(|p| p.into_inner())),
        finals,
        ends,
        resubmitted: changed.resubmitted,
        healed_ns: healed.as_nanos() as u64,
        converged_ns: converged.map(|at| at.as_nanos() as u64),
        converge_limit_ns: limit.as_nanos() as u64,
    };
    let undone = scenario.changes.len() - changed.done;
    Ok(Seen { history, measured, fired, disk_faults, probes, mended, undone, region_changes })
}

/// How the shards' epochs ended, by the cluster map.
fn ends(map: &v1::ClusterResponse) -> BTreeMap<(u32, u64), End> {
    let of = |end: &v1::EpochEnd| {
        let exact = end.resolved.then_some((end.lost_after, end.lost_to));
        End { certain: end.certain_index, ceiling: end.ceiling_index, exact }
    };
    let shards = map.shards.iter();
    shards.flat_map(|shard| shard.ends.iter().map(move |end| ((shard.shard, end.epoch), of(end)))).collect()
}

/// Whether all replicas of each shard answer, name one leader and publish the same position, and nothing is under way in the cluster.
async fn agree(cluster: &Cluster) -> bool {
    let Some(map) = cluster.map().await else { return false };
    let pinning = map.pins.iter().any(|pin| pin.slots_to_move > 0);
    let changing = map.regions.as_ref().is_some_and(|regions| regions.change.is_some());
    if pinning
        || changing
        || map.erasures_open > 0
        || map.resize.is_some()
        || map.shards.iter().any(|shard| shard.joining != 0)
    {
        return false;
    }
    let mut seen: BTreeMap<u32, Vec<(u64, u64, String)>> = BTreeMap::new();
    for &node in &cluster.replicas {
        let Some(status) = cluster.status(node, false).await else { return false };
        for shard in status.shards {
            if shard.repairing || shard.leader.is_empty() {
                return false;
            }
            let published = shard.views.iter().map(|v| v.published_index).min();
            let published = published.unwrap_or(shard.committed_index);
            seen.entry(shard.shard).or_default().push((shard.last_index, published, shard.leader));
        }
    }
    let whole = |shard: &v1::ClusterShard| {
        let replicas = seen.get(&shard.shard).map_or(&[][..], |replicas| replicas);
        let same =
            replicas.windows(2).all(|w| w[0] == w[1]) && replicas.iter().all(|(last, at, _)| last == at);
        same && replicas.len() == shard.members.len() + shard.learners.len()
            && shard.learners.iter().all(|learner| learner.state == "serving")
    };
    seen.len() == map.shards.len() && map.shards.iter().all(whole)
}

async fn sample_forever(cluster: Arc<Cluster>, samples: Arc<Mutex<Vec<Sample>>>) {
    loop {
        time::sleep(SAMPLE_INTERVAL).await;
        for &node in &cluster.replicas {
            let Some(status) = cluster.status(node, false).await else { continue };
            let sample = sample(&cluster, &status);
            samples.lock().unwrap_or_else(|p| p.into_inner()).extend(sample);
        }
    }
}

/// What a replica of each shard published.
fn sample(cluster: &Cluster, status: &v1::StatusResponse) -> Vec<Sample> {
    let at_ns = cluster.machines.now().as_nanos() as u64;
    let of = |shard: &v1::ShardStatus| Sample {
        at_ns,
        node: status.node.clone(),
        shard: shard.shard,
        epoch: shard.epoch,
        index: shard.digest_index,
        digest: shard.digest.clone(),
    };
    status.shards.iter().map(of).collect()
}

/// [`look`], again while the replica makes views anew whose damage was only found by looking. What it says is never asked twice.
async fn look_again(cluster: &Cluster, node: NodeIndex, until: Duration) -> Result<Final, Error> {
    loop {
        let boots = cluster.machines.boots(node);
        let seen = look(cluster, node).await;
        let restarted = cluster.machines.boots(node) != boots || !cluster.machines.is_running(node);
        if !restarted || cluster.machines.now() > until {
            return seen;
        }
        while !agree(cluster).await && cluster.machines.now() < until {
            time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Reads everything from one replica, tenant by tenant, as its clients would.
async fn look(cluster: &Cluster, node: NodeIndex) -> Result<Final, Error> {
    let unanswered =
        || Error::Internal(format!("{} does not answer after recovery", cluster.machines.name(node)));
    let at_ns = cluster.machines.now().as_nanos() as u64;
    let shards = match cluster.status(node, true).await {
        Some(status) => {
            let scanned = status.shards.iter().map(|shard| Ok(shard.digest_by_scan.clone()));
            sample(cluster, &status).into_iter().zip(scanned).collect()
        }
        None => {
            let status = cluster.status(node, false).await.ok_or_else(unanswered)?;
            let problem = "its tables and vectors do not agree, or could not be read";
            sample(cluster, &status).into_iter().map(|sample| (sample, Err(problem.to_string()))).collect()
        }
    };
    let way = cluster.machines.operators_way(node);
    let channel = sim::net::connect(&way).map_err(|e| Error::Internal(e.to_string()))?;
    let boots = cluster.machines.boots(node);
    let again = || cluster.machines.boots(node) == boots && cluster.machines.is_running(node);
    let client = || v1::memory_service_client::MemoryServiceClient::new(channel.clone());
    let (mut rows, mut versions) = (BTreeMap::new(), BTreeMap::new());
    for (tenant, key) in cluster.keys.iter().enumerate() {
        let failed =
            |s: tonic::Status| Error::Internal(format!("{}: {}", cluster.machines.name(node), s.message()));
        let eventual =
            Some(v1::ReadOptions { consistency: v1::Consistency::Eventual as i32, ..Default::default() });
        let list =
            v1::ListRequest { options: eventual.clone(), include_archived: true, ..Default::default() };
        let listed = answered(again, || async {
            let mut pages = client().list(with_key(list.clone(), key)).await?.into_inner();
            let mut rows = vec![];
            while let Some(page) = pages.message().await? {
                rows.extend(page.memories.iter().map(client::row));
            }
            Ok(rows)
        });
        rows.extend(listed.await.map_err(failed)?.into_iter().map(|row| ((tenant, row.id.clone()), row)));
        for id in known_ids(cluster, tenant) {
            let request = v1::HistoryRequest { id: id.clone(), options: eventual.clone() };
            let asked = answered(again, || async { client().history(with_key(request.clone(), key)).await });
            let changes = match asked.await {
                Ok(answer) => answer.into_inner().changes,
                Err(status) if status.code() == tonic::Code::NotFound => continue,
                Err(status) => return Err(failed(status)),
            };
            versions.insert((tenant, id), changes.iter().map(version_of).collect::<Vec<_>>());
        }
    }
    let node = cluster.machines.name(node);
    Ok(Final { node, at_ns, shards, rows, versions })
}

/// A read that is asked again while it gets no answer, a few times, and only `while_whole` the node is the process that it was: a
/// connection to a peer that was restarted breaks at its first call.
async fn answered<T, F: Future<Output = Result<T, tonic::Status>>>(
    while_whole: impl Fn() -> bool,
    ask: impl Fn() -> F,
) -> Result<T, tonic::Status> {
    for _ in 1..ASKED_MAX {
        match ask().await {
            Err(status) if status.code() == tonic::Code::Unavailable && while_whole() => {
                time::sleep(ASK_AGAIN).await;
            }
            other => return other,
        }
    }
    ask().await
}

/// The version of a change and the marker of the write that made it; a deletion's own version is one more than what it deleted.
fn version_of(change: &v1::Change) -> (u64, String) {
    let row = change.memory.as_ref().map_or_else(Row::default, client::row);
    if change.kind == v1::ChangeKind::Deleted as i32 {
        return (row.version + 1, format!("deletion of version {}", row.version));
    }
    if change.kind == v1::ChangeKind::Erased as i32 {
        return (row.version + 1, format!("erasure of version {}", row.version));
    }
    (row.version, row.marker)
}

fn known_ids(cluster: &Cluster, tenant: usize) -> Vec<String> {
    (0..cluster.keys_per_tenant).map(|number| client::id_of(tenant, number)).collect()
}

fn with_key<T>(message: T, key: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if let Ok(value) = format!("Bearer {key}").parse() {
        request.metadata_mut().insert("authorization", value);
    }
    request.set_timeout(Duration::from_secs(10));
    request
}
