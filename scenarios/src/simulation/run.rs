//! One run in the simulated world.

use super::machines::Simulated;
use crate::history::History;
use crate::play::{self, Cluster};
use crate::report::{Class, Report, Verdict, empty};
use crate::settle::settle;
use crate::spec::Scenario;
use nodes::error::Error;
use sim::time::{self, Duration};
use sim::world::{self, Event, TraceLine};
use std::sync::Arc;

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

/// Runs `scenario` with `seed` in this process, which must not have run one before. `all` keeps the whole trace.
pub fn run(name: &str, scenario: &Scenario, seed: u64, all: bool) -> Run {
    let started = crate::command::wall_seconds();
    let settled = settle(scenario, seed);
    let to_play = settled.clone();
    let outcome = world::run(seed, all, |world| async move {
        let machines = Arc::new(Simulated::new(&world, &to_play));
        let seen = play::scenes(machines, to_play).await?;
        world.identify(seen.history.ops.len() as u64);
        Ok::<_, Error>(seen)
    });
    let wall_s = crate::command::wall_seconds() - started;
    let virtual_s = outcome.virtual_time.as_secs_f64();
    let (mut report, history) = match outcome.value {
        Ok(seen) => play::judge(seen, virtual_s, &settled),
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

/// Lets so many nodes with so many shards do nothing for a while; how many entries the first shard's ledger has then.
pub fn idle(virtual_s: u64, nodes: usize, shards: u32) -> Result<u64, Error> {
    let mut scenario = crate::spec::find("steady").map_err(Error::Internal)?;
    (scenario.topology.gateways, scenario.topology.replicas, scenario.topology.shards) = (0, nodes, shards);
    scenario.check().map_err(Error::Internal)?;
    let scenario = settle(&scenario, 1);
    let outcome = world::run(1, false, |world| async move {
        let machines = Arc::new(Simulated::new(&world, &scenario));
        let cluster = Cluster::start(machines, &scenario).await?;
        time::sleep(Duration::from_secs(virtual_s)).await;
        let status = cluster.status(cluster.replicas[0], false).await;
        let last = status.and_then(|s| s.shards.first().map(|s| s.last_index));
        last.ok_or_else(|| Error::Internal("the idle cluster does not answer".into()))
    });
    outcome.value
}
