//! The runner: one child process per run, a few side by side, bounded in time and memory.

use crate::report::{Class, Report, Verdict, empty};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// A run that computes longer, or needs more memory, is broken. It is the processor's time that counts: what else a machine does must not
/// decide over a run.
const CPU_MAX_S: u64 = 120;
/// One that waits for ever computes nothing.
const WALL_MAX: Duration = Duration::from_secs(20 * 60);
/// SIGXCPU: how the kernel ends a process whose time is up.
const OUT_OF_TIME: i32 = 24;
const MEMORY_MAX_KIB: u64 = 4 << 20;

/// One run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Job {
    /// A shipped scenario's name, or a file.
    pub scenario: String,
    pub seed: u64,
    pub mutant: Option<String>,
}

impl Job {
    pub fn new(scenario: &str, seed: u64, mutant: Option<&str>) -> Job {
        Job { scenario: scenario.into(), seed, mutant: mutant.map(String::from) }
    }

    /// What a person types to do `verb` with this run.
    pub fn command(&self, verb: &str) -> String {
        let mutant = self.mutant.as_ref().map_or(String::new(), |mutant| format!(" --mutant {mutant}"));
        format!("cargo sim {verb} {} --seed {}{mutant}", self.scenario, self.seed)
    }
}

/// How many processes to run side by side: as asked for, or one for each core.
pub fn jobs(asked: usize) -> usize {
    if asked > 0 { asked } else { std::thread::available_parallelism().map_or(2, |n| n.get()) }
}

/// Does `work` on all items in `jobs` threads; results in the order of the items, as far as they were begun: none is once `work` has
/// said `None`.
pub fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    jobs: usize,
    work: impl Fn(&T) -> Option<R> + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some((at, item)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    items.get(at).map(|item| (at, item))
                } {
                    let Some(result) = work(item) else {
                        next.store(items.len(), Ordering::Relaxed);
                        return;
                    };
                    *results[at].lock().unwrap_or_else(|p| p.into_inner()) = Some(result);
                }
            });
        }
    });
    results.into_iter().filter_map(|r| r.into_inner().unwrap_or_else(|p| p.into_inner())).collect()
}

/// One run in a process of its own. `events`: a file to write every event to.
pub fn child(job: &Job, events: Option<&str>) -> Report {
    let broken = |class: Class, why: String| {
        let (scenario, mutant) = (job.scenario.clone(), job.mutant.clone().map(|m| (m, 0)));
        Report { scenario, seed: job.seed, mutant, verdict: Verdict::Broken, class, why, ..empty() }
    };
    let mut process = match start(job, events) {
        Ok(process) => process,
        Err(error) => return broken(Class::Crash, format!("child not started: {error}")),
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
    let step = Duration::from_millis(5);
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
    let Some(status) = status else {
        return broken(Class::Timeout, format!("not finished after {} s", WALL_MAX.as_secs()));
    };
    if status.signal() == Some(OUT_OF_TIME) {
        return broken(Class::Timeout, format!("not finished after {CPU_MAX_S} s of the processor's time"));
    }
    match text.lines().last().map(serde_json::from_str::<Report>) {
        Some(Ok(report)) => report,
        _ => {
            let end: Vec<&str> = errors.lines().filter(|l| !l.trim().is_empty()).collect();
            let end = end[end.len().saturating_sub(6)..].join(" | ");
            broken(Class::Crash, format!("ended with {status} and no report: {end}"))
        }
    }
}

fn start(job: &Job, events: Option<&str>) -> std::io::Result<Child> {
    // The shell sets the memory bound and becomes the run.
    let bounded = format!("ulimit -v {MEMORY_MAX_KIB}; ulimit -S -t {CPU_MAX_S}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.arg("-c").arg(bounded).arg(std::env::current_exe()?);
    command.args(["run", &job.scenario, "--seed", &job.seed.to_string(), "--json"]);
    if let Some(mutant) = &job.mutant {
        command.args(["--mutant", mutant]);
    }
    if let Some(events) = events {
        command.args(["--events", events]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}
