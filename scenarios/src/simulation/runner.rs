//! The runner: one child process per run, a few side by side, bounded in time and memory.

use super::run::empty;
use crate::report::{Report, Verdict};
use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A run that takes longer, or needs more memory, is broken.
pub const WALL_MAX: Duration = Duration::from_secs(120);
const MEMORY_MAX_KIB: u64 = 4 << 20;

/// Runs every (scenario, seed) in a child; `each` sees reports as they come. They return in the order of `runs`.
pub fn sweep(runs: &[(String, u64)], jobs: usize, each: impl Fn(&Report) + Sync) -> Vec<Report> {
    let next = AtomicUsize::new(0);
    let reports: Vec<Mutex<Option<Report>>> = runs.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some((at, (name, seed))) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    runs.get(at).map(|run| (at, run))
                } {
                    let report = child(name, *seed);
                    each(&report);
                    *reports[at].lock().unwrap_or_else(|p| p.into_inner()) = Some(report);
                }
            });
        }
    });
    reports.into_iter().filter_map(|r| r.into_inner().unwrap_or_else(|p| p.into_inner())).collect()
}

/// One run in a process of its own.
fn child(name: &str, seed: u64) -> Report {
    let broken =
        |why: String| Report { scenario: name.into(), seed, verdict: Verdict::Broken, why, ..empty() };
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return broken(format!("own program not found: {error}")),
    };
    // The shell sets the memory bound and becomes the run.
    let bounded = format!("ulimit -v {MEMORY_MAX_KIB}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.arg("-c").arg(bounded).arg(program).args(["run", name, "--seed", &seed.to_string(), "--json"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = match command.spawn() {
        Ok(process) => process,
        Err(error) => return broken(format!("child not started: {error}")),
    };
    let (mut out, mut err) = (process.stdout.take(), process.stderr.take());
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = out.as_mut().map(|o| o.read_to_string(&mut text));
        text
    });
    let errors = std::thread::spawn(move || {
        let mut bytes = vec![];
        let _ = err.as_mut().map(|e| e.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mut waited = Duration::ZERO;
    let step = Duration::from_millis(10);
    let status = loop {
        match process.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if waited < WALL_MAX => {
                std::thread::sleep(step);
                waited += step;
            }
            _ => {
                let _ = process.kill();
                let _ = process.wait();
                break None;
            }
        }
    };
    let (text, errors) = (reader.join().unwrap_or_default(), errors.join().unwrap_or_default());
    let Some(status) = status else { return broken(format!("not finished after {} s", WALL_MAX.as_secs())) };
    match text.lines().last().map(serde_json::from_str::<Report>) {
        Some(Ok(report)) => report,
        _ => {
            let end: Vec<&str> = errors.lines().filter(|l| !l.trim().is_empty()).collect();
            let end = end[end.len().saturating_sub(6)..].join(" | ");
            broken(format!("ended with {status} and no report: {end}"))
        }
    }
}
