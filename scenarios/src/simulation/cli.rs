//! `cargo sim …`: the simulator's command line.

use super::run::{Run, run};
use super::runner;
use crate::report::{PROBES, Report, Verdict};
use crate::spec::{self, SHIPPED};
use clap::{Parser, Subcommand};
use sim::trace::Level;
use sim::world::{self, TraceLine};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;

const LINES_BEFORE_PANIC: usize = 40;

#[derive(Parser)]
#[command(name = "cargo sim", about = "Loci in the simulated world", version = nodes::BUILD)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Names the scenarios.
    List,
    /// Runs one scenario with one seed.
    Run {
        /// A shipped scenario, or a TOML file.
        scenario: String,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// One JSON line.
        #[arg(long)]
        json: bool,
    },
    /// Runs scenarios on many seeds, a process each.
    Sweep {
        /// As Rust writes ranges: A..B or A..=B.
        #[arg(long, value_parser = seeds, default_value = "1..=20")]
        seeds: Range<u64>,
        /// Only these; all if none is named.
        scenarios: Vec<String>,
        /// Processes side by side; all cores if 0.
        #[arg(long, default_value_t = 0)]
        jobs: usize,
    },
    /// Runs one scenario again and prints what happened, line by line.
    Replay {
        scenario: String,
        #[arg(long)]
        seed: u64,
        /// Debug lines too.
        #[arg(long)]
        all: bool,
    },
    /// How many virtual seconds an idle cluster of three passes per second of wall time.
    Idle {
        #[arg(long, default_value_t = 600)]
        virtual_s: u64,
    },
}

fn seeds(text: &str) -> Result<Range<u64>, String> {
    let number = |t: &str| t.trim().parse::<u64>().map_err(|_| format!("'{t}' is no number"));
    let (from, to, inclusive) = match (text.split_once("..="), text.split_once("..")) {
        (Some((from, to)), _) => (from, to, 1),
        (None, Some((from, to))) => (from, to, 0),
        (None, None) => (text, text, 1),
    };
    let range = number(from)?..number(to)?.saturating_add(inclusive);
    if range.is_empty() { Err(format!("{text} is empty")) } else { Ok(range) }
}

/// Wall time in seconds since some moment: how long runs take is of the machine, not of the simulation. Time functions are
/// simulated inside a world only, and this is called outside.
pub fn wall_seconds() -> f64 {
    std::fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|t| t.split(' ').next()?.parse().ok())
        .unwrap_or(0.0)
}

/// The program's main.
pub fn main() -> ExitCode {
    // A run that panics has no report; what led there is printed instead.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        world::last_lines(LINES_BEFORE_PANIC).iter().for_each(|line| eprintln!("{}", readable(line)));
        usual(panic);
    }));
    match Cli::parse().command {
        Cmd::List => {
            for (name, _) in SHIPPED {
                match spec::find(name) {
                    Ok(scenario) => println!("{name:22} {}", scenario.about),
                    Err(error) => println!("{name:22} {error}"),
                }
            }
            ExitCode::SUCCESS
        }
        Cmd::Run { scenario, seed, json } => with(&scenario, seed, false, |run| {
            if json {
                println!(
                    "{}",
                    serde_json::to_string(&run.report).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
                );
            } else {
                print_report(&run.report);
            }
        }),
        Cmd::Replay { scenario, seed, all } => with(&scenario, seed, true, |run| timeline(&run, all)),
        Cmd::Sweep { seeds, scenarios, jobs } => sweep(seeds, scenarios, jobs),
        Cmd::Idle { virtual_s } => {
            let started = wall_seconds();
            match super::run::idle(virtual_s) {
                Ok(entries) => {
                    let wall_s = (wall_seconds() - started).max(0.01);
                    let speed = virtual_s as f64 / wall_s;
                    println!(
                        "three idle nodes: {virtual_s} virtual s in {wall_s:.2} wall s: {speed:.0} virtual s per wall s ({entries} ledger entries)"
                    );
                    ExitCode::SUCCESS
                }
                Err(error) => fail(&error.to_string()),
            }
        }
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("{message}");
    ExitCode::from(2)
}

fn with(name: &str, seed: u64, all_lines: bool, show: impl FnOnce(Run)) -> ExitCode {
    let scenario = match spec::find(name) {
        Ok(scenario) => scenario,
        Err(error) => return fail(&error),
    };
    let run = run(name, &scenario, seed, all_lines);
    let passed = run.report.verdict == Verdict::Pass;
    show(run);
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_report(report: &Report) {
    println!("{} seed {}: {:?}  {}", report.scenario, report.seed, report.verdict, report.why);
    println!(
        "  {} writes acknowledged, {} lost, {} of unknown outcome; {} reads",
        report.acked, report.lost, report.unknown, report.reads
    );
    println!(
        "  {:.1} virtual s in {:.1} wall s; longest time without an acknowledged write {:.2} s",
        report.virtual_s, report.wall_s, report.write_gap_s
    );
    for fired in &report.faults {
        let fault = &fired.fault;
        let state = if fired.fired { "" } else { "  (never took place)" };
        println!(
            "  {:7.2} s  {:?} on {} for {:.1} s{state}",
            fault.at_ms as f64 / 1e3,
            fault.kind,
            fired.node,
            fault.lasts_ms as f64 / 1e3
        );
    }
    for fired in report.disk_faults.iter().filter(|f| f.fired) {
        let (at_s, lasts_s) = (fired.fault.at_ms as f64 / 1e3, fired.fault.lasts_ms as f64 / 1e3);
        println!("  {at_s:7.2} s  disk of {}: {:?} for {lasts_s:.1} s", fired.node, fired.fault.kind);
    }
    for (path, count) in &report.probes {
        println!("  {count:9} x {path}");
    }
    for violation in &report.violations {
        println!("  {} at {:.3} s: {}", violation.promise, violation.at_s, violation.what);
    }
    println!("  trace {}  build {}", report.trace_hash, report.build);
}

fn readable(line: &TraceLine) -> String {
    let mark = match line.level {
        Level::Error => "!!",
        Level::Warn => " !",
        Level::Info | Level::Debug => "  ",
    };
    format!("{:10.4} s {mark} {:9} {}", line.at.as_secs_f64(), line.node, line.text)
}

fn timeline(run: &Run, all: bool) {
    println!("{} seed {}, build {}", run.report.scenario, run.report.seed, run.report.build);
    for fault in &run.plan {
        let ends = (fault.at_ms + fault.lasts_ms) as f64 / 1e3;
        println!(
            "plan: {:?} on {:?} from {:.3} s to {ends:.3} s",
            fault.kind,
            fault.target,
            fault.at_ms as f64 / 1e3
        );
    }
    run.lines
        .iter()
        .filter(|line| all || line.level <= Level::Info)
        .for_each(|line| println!("{}", readable(line)));
    println!();
    print_report(&run.report);
}

fn sweep(seeds: Range<u64>, scenarios: Vec<String>, jobs: usize) -> ExitCode {
    let names: Vec<String> = match scenarios.is_empty() {
        true => SHIPPED.iter().map(|(name, _)| name.to_string()).collect(),
        false => scenarios,
    };
    if let Some(error) = names.iter().find_map(|name| spec::find(name).err()) {
        return fail(&error);
    }
    let jobs = if jobs > 0 { jobs } else { std::thread::available_parallelism().map_or(2, |n| n.get()) };
    let runs: Vec<(String, u64)> =
        seeds.flat_map(|seed| names.iter().map(move |name| (name.clone(), seed))).collect();
    let bar = indicatif::ProgressBar::new(runs.len() as u64);
    if let Ok(style) = indicatif::ProgressStyle::with_template(
        "{bar:40} {pos}/{len} runs, {elapsed} (about {eta} left) {msg}",
    ) {
        bar.set_style(style);
    }
    let failed = Mutex::new(0);
    let reports = runner::sweep(&runs, jobs, |report| {
        if report.verdict != Verdict::Pass {
            let mut failed = failed.lock().unwrap_or_else(|p| p.into_inner());
            *failed += 1;
            bar.set_message(format!("{failed} not passed"));
            bar.suspend(|| print_report(report));
        }
        bar.inc(1);
    });
    bar.finish();
    table(&reports)
}

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
    let bad = reports.iter().filter(|r| r.verdict != Verdict::Pass);
    let bad: Vec<String> =
        bad.map(|r| format!("cargo sim replay {} --seed {}", r.scenario, r.seed)).collect();
    if bad.is_empty() {
        println!("all {} runs passed", reports.len());
        return ExitCode::SUCCESS;
    }
    println!("{} of {} runs did not pass; see them with:", bad.len(), reports.len());
    bad.iter().take(20).for_each(|line| println!("  {line}"));
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_read_as_rust_reads_ranges() {
        assert_eq!(seeds("1..=200"), Ok(1..201));
        assert_eq!(seeds("3..5"), Ok(3..5));
        assert_eq!(seeds("7"), Ok(7..8));
        assert!(seeds("5..5").is_err() && seeds("a..b").is_err());
    }
}
