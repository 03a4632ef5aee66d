//! From a scenario and a seed to one run with nothing left open.
//!
//! What a scenario does not write down is drawn: its system (sizes, limits, clocks, `buggify` sites), its faults and its operations, each from
//! a stream of its own. [`settle`] writes the draws down, so that a run can be printed, edited and shrunk; what is settled stays as it is.
//! Only the scheduler (the order of tasks, latencies, elections, what a lost power takes) is left to the seed.

use crate::operation::{Act, Operation};
use crate::random::{Random, Stream};
use crate::spec::{Draw, Fault, FaultKind, Generate, NodeDraw, Scenario, Target, Workload};

/// The `buggify` sites of the nodes; each is on in a quarter of the runs.
pub const SITES: [&str; 6] = [
    "before a cache keeps what it read",
    "answer to a write",
    "before a checkpoint",
    "before an apply",
    "before the log's fsync",
    "between a read's position and its read",
];

/// Those that only matter where there are several regions.
pub const REGION_SITES: [&str; 4] = [
    "between the lease and the append",
    "between a renewal and its record",
    "before an epoch is granted",
    "before a chosen replica begins",
];

/// What a bad disk does.
const DISK_FAULTS: [FaultKind; 8] = [
    FaultKind::BitRot,
    FaultKind::Ruin,
    FaultKind::LostSector,
    FaultKind::Misdirected,
    FaultKind::SyncFailure,
    FaultKind::FullDisk,
    FaultKind::SlowDisk,
    FaultKind::StuckDisk,
];

/// How far the calendar steps.
const STEP_MS: i64 = 600_000;

/// Clients begin once nodes have had the time to elect a leader.
const FIRST_MS: f64 = 2000.0;

/// The run of `scenario` with `seed`.
pub fn settle(scenario: &Scenario, seed: u64) -> Scenario {
    let mut run = scenario.clone();
    run.seed = Some(seed);
    let mut random = Random::new(seed, Stream::Draw);
    if std::mem::take(&mut run.swarm) {
        swarm(&mut run, &mut random);
    }
    if run.draw.is_none() {
        run.draw = Some(draw(&run, &mut random));
    }
    if let Some(generate) = run.faults.generate.take() {
        run.faults.list.extend(plan(&generate, &mut Random::new(seed, Stream::Faults), run.workload_s));
    }
    run.faults.list.sort_by_key(|fault| fault.at_ms);
    if run.faults.disk.is_none() {
        let drawn = std::mem::take(&mut run.bad_disk)
            .then(|| disk_plan(&mut Random::new(seed, Stream::Disk), run.workload_s));
        run.faults.disk = Some(drawn.unwrap_or_default());
    }
    if run.operations.is_none() {
        run.operations =
            Some(operations(&run.workload, &mut Random::new(seed, Stream::Operations), run.workload_s));
    }
    run
}

/// This seed's own system: topology, load and kinds of faults.
fn swarm(run: &mut Scenario, random: &mut Random) {
    // Where every disk is well, nothing may have to be mended.
    run.bad_disk &= random.chance(0.7);
    run.topology.replicas = random.pick(&[3, 3, 3, 5]).unwrap_or(3);
    run.topology.gateways = random.below(3) as usize;
    run.topology.loss = random.pick(&[0.0, 0.0, 0.002, 0.01]).unwrap_or(0.0);
    run.workload = Workload {
        clients: random.within(6, 12) as usize,
        tenants: random.within(1, 4) as usize,
        keys_per_tenant: random.within(6, 60),
        key_skew: 1.0 + 2.0 * random.unit(),
        think_ms: random.within(25, 60),
        strong_reads: random.pick(&[0.1, 0.2, 0.4]).unwrap_or(0.2),
        of_views: 0.0,
        erasures: 0.0,
    };
    if let Some(generate) = &mut run.faults.generate {
        let all = generate.kinds.clone();
        generate.kinds.retain(|_| random.chance(0.5));
        if generate.kinds.is_empty() {
            generate.kinds.extend(random.pick(&all));
        }
    }
}

fn draw(run: &Scenario, random: &mut Random) -> Draw {
    // Some clusters have an SSD's fsync, some a rotating disk's: what is under way when the power goes differs much.
    let slow_disks = random.chance(0.3);
    // Some keep product codes alone, of every month as soon as it has a few vectors.
    let product_rows_min = random.chance(0.3).then(|| random.within(10, 70));
    // What is measured is not to wait for a checkpoint at every turn.
    let scale = if run.recovery.is_some() { 8 } else { 1 };
    let node = |random: &mut Random| NodeDraw {
        checkpoint_entries: scale * random.within(60, 260),
        entries_kept: random.below(40),
        segment_bytes_max: scale * random.within(40_000, 160_000),
        base_bytes_min: scale * random.within(20_000, 80_000),
        vector_buffer_bytes: scale * random.within(20_000, 320_000),
        graph_rows_min: random.within(20, 220),
        sync_us: if slow_disks { random.within(5000, 25_000) } else { random.within(250, 1750) },
        rate_ppm: random.within(0, 200) as i64 - 100,
        offset_ms: random.below(1_000_000),
        calendar_ms: random.within(0, 2000) as i64 - 1000,
    };
    let nodes = (0..run.topology.machines()).map(|_| node(random)).collect();
    let mut buggify: Vec<String> =
        SITES.iter().filter(|_| random.chance(0.25)).map(|site| site.to_string()).collect();
    if run.topology.regions.is_some() {
        buggify.extend(REGION_SITES.iter().filter(|_| random.chance(0.25)).map(|site| site.to_string()));
    }
    if run.recovery.is_some() {
        buggify.clear();
    }
    Draw { latency_us: random.pick(&[50, 200, 200, 1000]).unwrap_or(200), product_rows_min, buggify, nodes }
}

/// Faults one after the other; the last one ends before the load does.
fn plan(generate: &Generate, random: &mut Random, workload_s: u64) -> Vec<Fault> {
    let mut plan = vec![];
    let mut at_ms = random.ms(generate.first_s);
    while let Some(kind) = random.pick(&generate.kinds) {
        // Shorter ones hit nobody.
        let lasts_ms = random.ms(generate.lasts_s).max(300);
        if at_ms + lasts_ms + 2000 > workload_s * 1000 {
            break;
        }
        let rate_ppm = random.below(400_001) as i64 - 200_000;
        let step_ms = (random.below(14_400_001) as i64 - 7_200_000) * (random.below(2) as i64);
        let (rate_ppm, step_ms) = match kind {
            FaultKind::Clock => (rate_ppm, step_ms),
            FaultKind::CalendarStep => (0, if random.chance(0.5) { STEP_MS } else { -STEP_MS }),
            _ => (0, 0),
        };
        let target = match generate.target {
            Target::Drawn => random.pick(&[Target::Leader, Target::Any, Target::All]).unwrap_or(Target::Any),
            target => target,
        };
        let (pick, from) = (random.below(1 << 32), generate.from);
        let fault = Fault::new(kind, target, (at_ms, lasts_ms));
        plan.push(Fault { from, pick, rate_ppm, step_ms, ..fault });
        at_ms += lasts_ms.max(random.ms(generate.every_s));
    }
    plan
}

/// A bad disk's plan: this seed's own choice of faults, all on one replica, so that the others stay a quorum that has everything.
fn disk_plan(random: &mut Random, workload_s: u64) -> Vec<Fault> {
    let kinds: Vec<FaultKind> = DISK_FAULTS.into_iter().filter(|_| random.chance(0.5)).collect();
    let (pick, target) = (random.below(1 << 32), Target::Any);
    let mut plan = vec![];
    let mut at_ms = random.ms([4, 14]);
    while let Some(kind) = random.pick(&kinds) {
        let lasts_ms = match kind {
            FaultKind::BitRot | FaultKind::Ruin | FaultKind::LostSector => 100,
            _ => random.ms([1, 6]),
        };
        if at_ms + lasts_ms + 2000 > workload_s * 1000 {
            break;
        }
        plan.push(Fault { pick, ..Fault::new(kind, target, (at_ms, lasts_ms)) });
        at_ms += lasts_ms + random.ms([2, 10]);
    }
    plan
}

/// Each client's operations with exponentially distributed pauses; all clients' in the order of time.
fn operations(load: &Workload, random: &mut Random, workload_s: u64) -> Vec<Operation> {
    let mut all = vec![];
    for client in 0..load.clients {
        let mut at_ms = FIRST_MS;
        loop {
            at_ms += random.pause(load.think_ms as f64);
            if at_ms >= workload_s as f64 * 1000.0 {
                break;
            }
            all.push(operation(load, random, at_ms as u64, client));
        }
    }
    all.sort_by_key(|operation| (operation.at_ms, operation.client));
    all
}

fn operation(load: &Workload, random: &mut Random, at_ms: u64, client: usize) -> Operation {
    let key = (load.keys_per_tenant as f64 * random.unit().powf(load.key_skew)) as u64;
    let other = random.below(load.keys_per_tenant);
    let dice = random.unit();
    // Beside strong reads, the rest in fixed proportions.
    let rest = (dice - load.strong_reads) / (1.0 - load.strong_reads);
    let of_views = load.of_views > 0.0 && random.chance(load.of_views);
    let erases = load.erasures > 0.0 && random.chance(load.erasures);
    let act = match rest {
        _ if erases => Act::Erase,
        _ if of_views && random.chance(0.5) => Act::Search,
        _ if of_views => Act::Walk { key },
        r if r < 0.0 => Act::Get { key },
        r if r < 0.30 => Act::Add { key },
        r if r < 0.58 => Act::Update { key },
        r if r < 0.68 => Act::Delete { key },
        r if r < 0.88 => Act::Get { key },
        r if r < 0.94 => Act::Search,
        r if r < 0.956 => Act::Link { from: key, to: other },
        r if r < 0.96 => Act::Unlink { from: key, to: other },
        r if r < 0.98 => Act::Walk { key },
        _ => Act::List,
    };
    let mut operation = Operation::new(at_ms, client, act);
    match act {
        Act::Add { .. } | Act::Update { .. } | Act::Delete { .. } => {
            operation.expecting = !matches!(act, Act::Add { .. }) && random.chance(0.4);
            operation.again = random.chance(0.05);
        }
        Act::Get { .. } => {
            operation.session = rest >= 0.0;
            operation.gateway = random.chance(0.3).then(|| random.below(8) as usize);
        }
        Act::Walk { .. } => operation.inbound = random.chance(0.3),
        _ => {}
    }
    operation
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{CHAOS, Faults, SHIPPED, SHORT, find};

    #[test]
    fn a_settled_run_repeats_and_survives_being_written_down() -> Result<(), String> {
        for (name, _) in SHIPPED.into_iter().chain(CHAOS).chain(SHORT) {
            let scenario = find(name)?;
            for seed in 0..20 {
                let run = settle(&scenario, seed);
                assert_eq!(run, settle(&scenario, seed));
                assert_eq!(run, settle(&run, seed), "{name}: what is settled must stay so");
                assert!(
                    scenario.faults.generate.is_none() || !run.faults.list.is_empty(),
                    "{name} seed {seed} plans nothing"
                );
                let text = toml::to_string_pretty(&run).map_err(|e| e.to_string())?;
                assert_eq!(toml::from_str::<Scenario>(&text).map_err(|e| e.to_string())?, run);
            }
        }
        Ok(())
    }

    #[test]
    fn every_file_of_regions_is_a_scenario() -> Result<(), String> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("files/regions");
        let files = std::fs::read_dir(dir).map_err(|e| e.to_string())?.flatten();
        let paths: Vec<String> = files.map(|file| file.path().to_string_lossy().into_owned()).collect();
        assert!(paths.len() > 10, "{paths:?}");
        for path in paths {
            let run = settle(&find(&path)?, 1);
            assert!(!run.faults.list.is_empty() || !run.changes.is_empty(), "{path} plans nothing");
        }
        Ok(())
    }

    #[test]
    fn what_is_measured_is_hit_once_after_a_quiet_time_and_by_nothing_else() -> Result<(), String> {
        for (name, _) in CHAOS.into_iter().chain(SHORT) {
            let quiet_s = if name.starts_with("short/") { 7 } else { 11 };
            let scenario = find(name)?;
            let quiet_from_s = scenario.recovery.as_ref().ok_or("no recovery")?.quiet_from_s;
            for seed in 0..20 {
                let run = settle(&scenario, seed);
                assert_eq!(run.faults.list.len(), 1, "{name} seed {seed}");
                assert!(run.faults.list[0].at_ms >= (quiet_from_s + quiet_s) * 1000, "{name} seed {seed}");
                assert_eq!(run.faults.disk, Some(vec![]), "{name} seed {seed}");
                assert!(run.draw.is_some_and(|draw| draw.buggify.is_empty()), "{name} seed {seed}");
            }
        }
        Ok(())
    }

    /// The rows of views aim at less than what the policy of each allows.
    #[test]
    fn views_aim_at_less_than_their_policies_allow() -> Result<(), String> {
        use nodes::roles::Role;
        let rows = [
            ("records-node-failure", Role::Records),
            ("graph-node-failure", Role::Graph),
            ("vector-node-failure", Role::Vector),
            ("cache-node-failure", Role::Cache),
            ("ledger-leader-loss", Role::Ledger),
        ];
        for (name, role) in rows {
            let scenario = find(name)?;
            let aim_s = scenario.recovery.and_then(|recovery| recovery.aim_s).ok_or("no aim")?;
            assert!(aim_s < role.policy().failover_within_s as f64, "{name}: {aim_s} s");
            let with = (1..=(scenario.topology.replicas + scenario.topology.caches) as u64)
                .filter(|node| scenario.topology.roles_of(*node).contains(&role));
            assert!(with.count() >= role.policy().replicas, "{name}: fewer replicas than the policy has");
        }
        Ok(())
    }

    #[test]
    fn one_stream_may_change_while_the_others_stay() -> Result<(), String> {
        let scenario = find("leader-power-loss")?;
        let usual = settle(&scenario, 5);
        let mut quiet = scenario.clone();
        quiet.faults = Faults::default();
        quiet.bad_disk = false;
        let quiet = settle(&quiet, 5);
        assert!(quiet.faults.list.is_empty() && quiet.faults.disk == Some(vec![]));
        assert_eq!((quiet.draw, quiet.operations), (usual.draw, usual.operations));
        Ok(())
    }
}
