//! One run on real processes.

use super::machines::{Processes, refusal};
use crate::command::wall_seconds;
use crate::play::{self, Machines};
use crate::report::{Class, Report, Verdict, empty};
use crate::settle::settle;
use crate::spec::Scenario;
use nodes::error::Error;
use sim::time::Duration;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a run may take beyond its load and the time in which it must converge: to start, to wait for who is to be hit, to look at what is left.
const MORE_MAX: Duration = Duration::from_secs(240);

/// Runs `scenario` with `seed`; an error if no real machine can. What the nodes wrote is removed, unless the run did not pass.
pub fn run(name: &str, scenario: &Scenario, seed: u64, loci: &Path, live: bool) -> Result<Report, String> {
    let settled = settle(scenario, seed);
    if let Some(why) = refusal(scenario, &settled) {
        return Err(format!("{name} can be played in the simulated world only: {why}"));
    }
    let dir = directory()?;
    let (machines, begun) = (Arc::new(Processes::new(&dir, loci, live)), wall_seconds());
    let limit = Duration::from_secs(settled.workload_s + 3 * settled.promises.converge_s) + MORE_MAX;
    let outcome = {
        let (machines, settled) = (machines.clone(), settled.clone());
        sim::task::run_process(0, async move {
            let played = sim::time::timeout(limit, play::scenes(machines, settled)).await;
            played
                .unwrap_or_else(|_| Err(Error::Internal(format!("not finished after {} s", limit.as_secs()))))
        })
    };
    let took_s = machines.now().as_secs_f64();
    let mut report = match outcome.map_err(|e| format!("no runtime: {e}"))? {
        Ok(seen) => play::judge(seen, took_s, &settled).0,
        Err(error) => {
            let (verdict, class) = (Verdict::Broken, Class::Crash);
            Report { verdict, class, why: error.to_string(), ..empty() }
        }
    };
    // The processes end here.
    drop(machines);
    report.scenario = name.into();
    report.seed = seed;
    report.virtual_s = took_s;
    report.wall_s = wall_seconds() - begun;
    match report.verdict {
        Verdict::Pass => drop(std::fs::remove_dir_all(&dir)),
        _ => report.why.push_str(&format!(" (logs and data: {})", dir.display())),
    }
    Ok(report)
}

/// A new directory for one run.
fn directory() -> Result<PathBuf, String> {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("loci-real-{}-{run}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(dir)
}
