//! Sweeps: many runs, their table, their results in a file.

use super::events;
use super::runner::{Job, child, side_by_side};
use crate::command::{bar, print_report, wall_seconds};
use crate::report::{Class, PROBES, Report, Verdict};
use crate::spec::{self, SHIPPED};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A fresh sweep's seeds are below this: short enough to be typed.
const FRESH_BELOW: u64 = 1 << 32;
const FAILURES_SHOWN: usize = 20;

pub struct Sweep {
    pub seeds: Range<u64>,
    pub scenarios: Vec<String>,
    pub jobs: usize,
    /// Seeds that nobody chose, for so many minutes.
    pub fresh_minutes: Option<u64>,
    /// One run in so many is done twice; none if 0.
    pub repeat_every: u64,
    /// Where results are added, a line each.
    pub results: Option<String>,
    /// Runs that `results` has of this build are not done again.
    pub resume: bool,
}

/// All scenarios, or those named.
pub fn scenarios(named: Vec<String>) -> Result<Vec<String>, String> {
    let names = match named.is_empty() {
        true => SHIPPED.iter().map(|(name, _)| name.to_string()).collect(),
        false => named,
    };
    names.iter().find_map(|name| spec::find(name).err()).map_or(Ok(names), Err)
}

pub fn sweep(asked: Sweep) -> Result<ExitCode, String> {
    let names = scenarios(asked.scenarios)?;
    let begun = wall_seconds();
    let until = asked.fresh_minutes.map(|minutes| begun + minutes as f64 * 60.0);
    let seeds: Vec<u64> = match until {
        // More than can be run.
        Some(_) => (0..100_000).map(|_| RandomState::new().build_hasher().finish() % FRESH_BELOW).collect(),
        None => asked.seeds.collect(),
    };
    let all: Vec<Job> =
        seeds.iter().flat_map(|seed| names.iter().map(|name| Job::new(name, *seed, None))).collect();
    let mut known = match (&asked.results, asked.resume) {
        (Some(path), true) => recorded(path)?,
        _ => BTreeMap::new(),
    };
    let mut reports: Vec<Report> = all.iter().filter_map(|job| known.remove(job)).collect();
    let done: BTreeSet<(String, u64)> = reports.iter().map(|r| (r.scenario.clone(), r.seed)).collect();
    let left: Vec<Job> = all.into_iter().filter(|j| !done.contains(&(j.scenario.clone(), j.seed))).collect();
    if !done.is_empty() {
        println!("{} runs of this build are recorded already, {} are left", done.len(), left.len());
    }
    let results = match &asked.results {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            Some(Mutex::new(file.map_err(|e| format!("{path}: {e}"))?))
        }
        None => None,
    };
    let bar = match until {
        Some(_) => bar(0, "{spinner} {pos} runs, {elapsed} {msg}"),
        None => bar(left.len() as u64, "{bar:40} {pos}/{len} runs, {elapsed} (about {eta} left) {msg}"),
    };
    let (failed, count) = (AtomicU64::new(0), AtomicU64::new(0));
    let fresh = side_by_side(&left, asked.jobs, |job| {
        if until.is_some_and(|until| wall_seconds() > until) {
            return None;
        }
        let mut report = child(job, None);
        let number = count.fetch_add(1, Ordering::Relaxed);
        if asked.repeat_every > 0 && number.is_multiple_of(asked.repeat_every) {
            repeat(job, &mut report);
        }
        if let Some(results) = &results
            && let Err(error) = record(results, &report)
        {
            bar.suspend(|| eprintln!("a result could not be recorded: {error}"));
        }
        if report.verdict != Verdict::Pass {
            let failed = failed.fetch_add(1, Ordering::Relaxed) + 1;
            bar.set_message(format!("{failed} not passed"));
            bar.suspend(|| print_report(&report));
        }
        bar.inc(1);
        Some(report)
    });
    bar.finish_and_clear();
    let (wall_s, runs) = ((wall_seconds() - begun).max(0.01), fresh.len());
    let virtual_s = fresh.iter().fold(0.0, |sum, r| sum + r.virtual_s);
    reports.extend(fresh);
    let code = table(&reports);
    println!(
        "{runs} runs in {wall_s:.0} s, {} side by side: {:.0} a minute, {:.0} virtual seconds per second",
        asked.jobs,
        runs as f64 * 60.0 / wall_s,
        virtual_s / wall_s
    );
    Ok(code)
}

/// Runs a job again: one seed must give one result in every process.
fn repeat(job: &Job, report: &mut Report) {
    let again = child(job, None);
    if again.trace_hash == report.trace_hash {
        return;
    }
    let parted = match events::compare(job, job) {
        Ok(Some((number, text))) => format!("event {number} differs:\n{text}"),
        Ok(None) => "but not two more with all their events kept".into(),
        Err(error) => error,
    };
    (report.verdict, report.class) = (Verdict::Broken, Class::Nondeterminism);
    report.why = format!("two runs gave traces {} and {}: {parted}", report.trace_hash, again.trace_hash);
}

/// The results that a file has of this build.
fn recorded(path: &str) -> Result<BTreeMap<Job, Report>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(format!("{path}: {error}")),
    };
    let mut found = BTreeMap::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|e| format!("{path}: {e}"))?;
        // A sweep that was ended in mid-write leaves half a line; that run is done again.
        if let Ok(report) = serde_json::from_str::<Report>(&line)
            && report.build == nodes::BUILD
        {
            found.insert(Job::new(&report.scenario, report.seed, None), report);
        }
    }
    Ok(found)
}

fn record(results: &Mutex<File>, report: &Report) -> Result<(), String> {
    let mut line = serde_json::to_string(report).map_err(|e| e.to_string())?;
    line.push('\n');
    results.lock().unwrap_or_else(|p| p.into_inner()).write_all(line.as_bytes()).map_err(|e| e.to_string())
}

/// Sums by scenario, rare paths, and what did not pass.
fn table(reports: &[Report]) -> ExitCode {
    let mut rows: BTreeMap<&str, Vec<&Report>> = BTreeMap::new();
    for report in reports {
        rows.entry(&report.scenario).or_default().push(report);
    }
    println!(
        "{:22} {:>5} {:>5} {:>5} {:>5} {:>5} {:>8} {:>5} {:>7} {:>9} {:>10} {:>8}",
        "scenario",
        "runs",
        "pass",
        "fail",
        "vacu.",
        "brok.",
        "acked",
        "lost",
        "faults",
        "max gap s",
        "converge s",
        "wall s"
    );
    for (name, reports) in rows {
        let count = |verdict: Verdict| reports.iter().filter(|r| r.verdict == verdict).count();
        let sum = |of: fn(&Report) -> usize| reports.iter().map(|r| of(r)).sum::<usize>();
        let most = |of: fn(&Report) -> f64| reports.iter().map(|r| of(r)).fold(0.0, f64::max);
        println!(
            "{name:22} {:5} {:5} {:5} {:5} {:5} {:8} {:5} {:7} {:9.2} {:10.2} {:8.1}",
            reports.len(),
            count(Verdict::Pass),
            count(Verdict::Fail),
            count(Verdict::Vacuous),
            count(Verdict::Broken),
            sum(|r| r.acked),
            sum(|r| r.lost),
            sum(|r| r.faults.len()),
            most(|r| r.write_gap_s),
            most(|r| r.converge_s.unwrap_or(0.0)),
            reports.iter().map(|r| r.wall_s).sum::<f64>(),
        );
    }
    println!("rare paths:");
    let taken = |path: &str| reports.iter().filter_map(|r| r.probes.get(path)).sum::<u64>();
    for path in PROBES {
        let count = taken(path);
        println!("  {count:9} x {path}{}", if count == 0 { "  (never reached)" } else { "" });
    }
    let others: BTreeSet<&String> = reports.iter().flat_map(|r| r.probes.keys()).collect();
    for path in others.into_iter().filter(|path| !PROBES.contains(&path.as_str())) {
        println!("  {:9} x {path}  (not in the list)", taken(path));
    }
    let bad: Vec<&Report> = reports.iter().filter(|r| r.verdict != Verdict::Pass).collect();
    if bad.is_empty() {
        println!("all {} runs passed", reports.len());
        return ExitCode::SUCCESS;
    }
    println!("{} of {} runs did not pass; see them with:", bad.len(), reports.len());
    for report in bad.iter().take(FAILURES_SHOWN) {
        let job = Job::new(&report.scenario, report.seed, None);
        println!("  {}  # {:?}", job.command("replay"), report.class);
    }
    let worst = bad.iter().map(|r| r.class).max().unwrap_or_default();
    ExitCode::from(worst.exit_code())
}
