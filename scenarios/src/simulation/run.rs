//! One run: build the world, load it, hit it, let it recover, look at what is left, judge.

use super::client::{self, Recorded, Recorder};
use super::cluster::{Cluster, host_of};
use super::faults;
use super::watch::Watch;
use crate::history::{Final, History, Row, Sample};
use crate::promises;
use crate::recovery::{Measured, QUIET_CALLS_MIN};
use crate::report::{Class, Fired, MENDING, Report, Verdict};
use crate::settle::settle;
use crate::spec::Scenario;
use nodes::error::Error;
use nodes::ledger::recovery;
use nodes::proto::v1;
use sim::time::{self, Duration};
use sim::trace::Level;
use sim::world::{self, Event, NodeIndex, TraceLine, World};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);

/// Everything that a run gave.
pub struct Run {
    pub report: Report,
    /// What was played, with nothing left open.
    pub settled: Scenario,
    pub history: History,
    pub lines: Vec<TraceLine>,
    /// Every event, if asked for.
    pub events: Vec<Event>,
    /// The nodes' names, by their numbers in events.
    pub nodes: Vec<String>,
}

struct Seen {
    history: History,
    /// Changes of the cluster that were not done in the end.
    undone: usize,
    measured: Option<Measured>,
    fired: Vec<Fired>,
    disk_faults: Vec<Fired>,
    probes: BTreeMap<String, u64>,
    /// What was mended, and the node that did it.
    mended: Vec<(String, &'static str)>,
}

/// Runs `scenario` with `seed` in this process, which must not have run one before. `all` keeps the whole trace.
pub fn run(name: &str, scenario: &Scenario, seed: u64, all: bool) -> Run {
    let started = super::cli::wall_seconds();
    let settled = settle(scenario, seed);
    let to_play = settled.clone();
    let outcome = world::run(seed, all, |world| async move { scenes(world, to_play).await });
    let wall_s = super::cli::wall_seconds() - started;
    let virtual_s = outcome.virtual_time.as_secs_f64();
    let (mut report, history) = match outcome.value {
        Ok(seen) => judge(seen, virtual_s, &settled),
        Err(error) => {
            let (verdict, class) = (Verdict::Broken, Class::Liveness);
            (Report { verdict, class, why: error.to_string(), ..empty() }, History::default())
        }
    };
    report.scenario = name.into();
    report.seed = seed;
    report.trace_hash = format!("{:016x}", outcome.trace_hash);
    report.virtual_s = virtual_s;
    report.wall_s = wall_s;
    Run { report, settled, history, lines: outcome.lines, events: outcome.events, nodes: outcome.nodes }
}

/// A report of nothing, to be filled in.
pub fn empty() -> Report {
    Report {
        scenario: String::new(),
        seed: 0,
        build: nodes::BUILD.into(),
        verdict: Verdict::Broken,
        class: Class::Crash,
        mutant: None,
        trace_hash: String::new(),
        virtual_s: 0.0,
        wall_s: 0.0,
        acked: 0,
        lost: 0,
        faults: vec![],
        violations: vec![],
        reads: 0,
        unknown: 0,
        write_gap_s: 0.0,
        converge_s: None,
        disk_faults: vec![],
        probes: BTreeMap::new(),
        recovery: None,
        why: String::new(),
    }
}

fn judge(seen: Seen, virtual_s: f64, settled: &Scenario) -> (Report, History) {
    use crate::history::Response;
    let enough = settled.enough;
    let Seen { history, measured, fired, disk_faults, probes, mended, undone } = seen;
    let mut violations = promises::check_all(&history);
    if undone > 0 {
        let what = format!("{undone} changes of the cluster were not done in time");
        violations.push(promises::Violation { promise: "P12".into(), what, at_s: virtual_s });
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
    let idle: Vec<String> =
        fired.iter().filter(|f| !f.fired).map(|f| format!("{:?} on '{}'", f.fault.kind, f.node)).collect();
    let safe = violations.iter().all(|violation| violation.promise == "P12");
    let (verdict, why) = if !violations.is_empty() {
        (Verdict::Fail, String::new())
    } else if acked < enough.acked {
        (Verdict::Vacuous, format!("only {acked} acknowledged writes, {} are needed", enough.acked))
    } else if virtual_s < enough.virtual_s {
        (Verdict::Vacuous, format!("only {virtual_s:.0} virtual seconds, {:.0} are needed", enough.virtual_s))
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
async fn scenes(world: World, scenario: Scenario) -> Result<Seen, Error> {
    // Setup.
    let cluster = Arc::new(Cluster::start(&world, &scenario)?);
    let recorder: Recorder = Arc::default();
    // Start: load, faults and samples side by side.
    let running = client::start(&cluster, &scenario, &recorder);
    let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
    let sampler = sim::task::spawn(sample_forever(cluster.clone(), samples.clone()));
    let bad_disk = {
        let (cluster, plan) = (cluster.clone(), scenario.faults.disk.unwrap_or_default());
        sim::task::spawn(async move { faults::play(&cluster, &plan).await })
    };
    let changing = sim::task::spawn(super::changes::play(
        cluster.clone(),
        scenario.topology.clone(),
        scenario.changes.clone(),
    ));
    let watch =
        scenario.recovery.as_ref().map(|r| Watch::start(&cluster, r.quiet_from_s, &scenario.faults.list));
    let fired = faults::play(&cluster, &scenario.faults.list).await;
    let disk_faults = bad_disk.await.map_err(|e| Error::Internal(format!("the disk's faults: {e}")))?;
    let healed = world.now();
    while *running.lock().unwrap_or_else(|p| p.into_inner()) > 0 {
        time::sleep(Duration::from_millis(250)).await;
    }
    sampler.abort();
    // Recover: the system gets its time after the load and the faults, without buggify.
    world.set_buggify([]);
    let healed = healed.max(world.now());
    // What an operator began goes on.
    let until = world.now() + Duration::from_secs(scenario.promises.converge_s);
    while !changing.is_finished() && world.now() < until {
        time::sleep(Duration::from_millis(250)).await;
    }
    let healed = healed.max(world.now().min(until));
    let changes_done = match changing.is_finished() {
        true => changing.await.map_err(|e| Error::Internal(format!("the operator: {e}")))?,
        false => {
            changing.abort();
            0
        }
    };
    world.note(0, Level::Info, "load and faults have ended; the system recovers");
    let limit = Duration::from_secs(scenario.promises.converge_s);
    let mut converged = None;
    while world.now() < healed + limit * 2 {
        if agree(&cluster).await {
            converged = Some(world.now());
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
    let probes = sim::trace::probes().into_iter();
    let mut probes: BTreeMap<String, u64> = probes.map(|(path, count)| (path.into(), count)).collect();
    let by_node = sim::trace::probes_by_node();
    // Nor is it the disk's fault if a node hears of a shard only when that is no longer new.
    let filled = |node| by_node.contains_key(&("replica: came back with an empty disk", node));
    let mended = by_node.keys().filter(|(path, node)| {
        MENDING.contains(path) && (*path != "log: repaired from peers" || !filled(*node))
    });
    let mended = mended.map(|(path, node)| (world.node_name(*node), *path)).collect();
    for disk in cluster.replicas.iter().filter_map(|n| world.disk(*n)) {
        for (fault, count) in disk.counters().faults().into_iter().filter(|(_, count)| *count > 0) {
            *probes.entry(fault.into()).or_default() += count;
        }
    }
    let Recorded { ops, calls } = std::mem::take(&mut *recorder.lock().unwrap_or_else(|p| p.into_inner()));
    world.identify(ops.len() as u64);
    let measured = watch.and_then(|watch| watch.measured(&cluster, &calls, &fired));
    let history = History {
        ops,
        calls,
        samples: std::mem::take(&mut *samples.lock().unwrap_or_else(|p| p.into_inner())),
        finals,
        healed_ns: healed.as_nanos() as u64,
        converged_ns: converged.map(|at| at.as_nanos() as u64),
        converge_limit_ns: limit.as_nanos() as u64,
    };
    let undone = scenario.changes.len() - changes_done;
    Ok(Seen { history, measured, fired, disk_faults, probes, mended, undone })
}

/// Whether all replicas of each shard answer, name one leader and publish the same position, and nothing is under way in the cluster.
async fn agree(cluster: &Cluster) -> bool {
    let Some(map) = cluster.map().await else { return false };
    let pinning = map.pins.iter().any(|pin| pin.slots_to_move > 0);
    if pinning || map.resize.is_some() || map.shards.iter().any(|shard| shard.joining != 0) {
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
    let at_ns = cluster.world.now().as_nanos() as u64;
    let of = |shard: &v1::ShardStatus| Sample {
        at_ns,
        node: status.node.clone(),
        shard: shard.shard,
        index: shard.digest_index,
        digest: shard.digest.clone(),
    };
    status.shards.iter().map(of).collect()
}

/// [`look`], again while the replica makes views anew whose damage was only found by looking. What it says is never asked twice.
async fn look_again(cluster: &Cluster, node: NodeIndex, until: Duration) -> Result<Final, Error> {
    loop {
        let boots = cluster.world.boots(node);
        let seen = look(cluster, node).await;
        let restarted = cluster.world.boots(node) != boots || !cluster.world.is_running(node);
        if !restarted || cluster.world.now() > until {
            return seen;
        }
        while !agree(cluster).await && cluster.world.now() < until {
            time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Reads everything from one replica, tenant by tenant, as its clients would.
async fn look(cluster: &Cluster, node: NodeIndex) -> Result<Final, Error> {
    let unanswered =
        || Error::Internal(format!("{} does not answer after recovery", cluster.world.node_name(node)));
    let addr = cluster.addr(node);
    let at_ns = cluster.world.now().as_nanos() as u64;
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
    let channel = sim::net::connect(&addr).map_err(|e| Error::Internal(e.to_string()))?;
    let (mut rows, mut versions) = (BTreeMap::new(), BTreeMap::new());
    for (tenant, key) in cluster.keys.iter().enumerate() {
        let mut client = v1::memory_service_client::MemoryServiceClient::new(channel.clone());
        let failed = |s: tonic::Status| Error::Internal(format!("{}: {}", host_of(&addr), s.message()));
        let eventual =
            Some(v1::ReadOptions { consistency: v1::Consistency::Eventual as i32, ..Default::default() });
        let list =
            v1::ListRequest { options: eventual.clone(), include_archived: true, ..Default::default() };
        let mut pages = client.list(with_key(list, key)).await.map_err(failed)?.into_inner();
        while let Some(page) = pages.message().await.map_err(failed)? {
            for memory in &page.memories {
                rows.insert((tenant, memory.id.clone()), client::row(memory));
            }
        }
        let ids = known_ids(cluster, tenant);
        for id in ids {
            let request = v1::HistoryRequest { id: id.clone(), options: eventual.clone() };
            let changes = match client.history(with_key(request, key)).await {
                Ok(answer) => answer.into_inner().changes,
                Err(status) if status.code() == tonic::Code::NotFound => continue,
                Err(status) => return Err(failed(status)),
            };
            versions.insert((tenant, id), changes.iter().map(version_of).collect::<Vec<_>>());
        }
    }
    let node = cluster.world.node_name(node);
    Ok(Final { node, at_ns, shards, rows, versions })
}

/// The version of a change and the marker of the write that made it; a deletion's own version is one more than what it deleted.
fn version_of(change: &v1::Change) -> (u64, String) {
    let row = change.memory.as_ref().map_or_else(Row::default, client::row);
    if change.kind == v1::ChangeKind::Deleted as i32 {
        return (row.version + 1, format!("deletion of version {}", row.version));
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

/// Lets three nodes do nothing for a while; how many entries their ledger has then.
pub fn idle(virtual_s: u64) -> Result<u64, Error> {
    let mut scenario = crate::spec::find("steady").map_err(Error::Internal)?;
    scenario.topology.gateways = 0;
    let scenario = settle(&scenario, 1);
    let outcome = world::run(1, false, |world| async move {
        let cluster = Cluster::start(&world, &scenario)?;
        time::sleep(Duration::from_secs(virtual_s)).await;
        let status = cluster.status(cluster.replicas[0], false).await;
        let last = status.and_then(|s| s.shards.first().map(|s| s.last_index));
        last.ok_or_else(|| Error::Internal("the idle cluster does not answer".into()))
    });
    outcome.value
}
