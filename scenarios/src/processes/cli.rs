//! `cargo real …`: the command line of runs on real processes.

use super::machines::refusal;
use super::run::run;
use crate::command::{bar, print_report, seeds, wall_seconds};
use crate::recovery::{LATE_MIN_MS, LATE_TIMES, Measured};
use crate::report::{Class, Report, Verdict};
use crate::rows::{Row, rows, seconds};
use crate::settle::settle;
use crate::spec::{self, CHAOS, Recovery, SHIPPED, SHORT};
use clap::{Args, Parser, Subcommand};
use sim::time::Duration;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

const TICK: Duration = Duration::from_millis(500);

#[derive(Parser)]
#[command(name = "cargo real", about = "Loci's scenarios on real processes", version = nodes::BUILD)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

/// The program that is run as nodes.
#[derive(Args)]
struct Program {
    /// The `loci` program; built if none is given.
    #[arg(long, value_name = "PATH")]
    loci: Option<PathBuf>,
    /// Builds it with optimisations.
    #[arg(long, conflicts_with = "loci")]
    release: bool,
}

#[derive(Subcommand)]
enum Cmd {
    /// Names the scenarios, and says of each why real processes cannot play it, if they cannot.
    List,
    /// Runs one scenario, and prints what happens as it does.
    Run {
        /// A shipped scenario, or a TOML file.
        scenario: String,
        /// The file's own, or 1.
        #[arg(long)]
        seed: Option<u64>,
        /// One JSON line, and nothing else.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        program: Program,
    },
    /// Hits real processes with faults of the chaos table, one run after the other, and prints how long clients felt it.
    Chaos {
        /// As Rust writes ranges: A..B or A..=B.
        #[arg(long, value_parser = seeds, default_value = "1..=1")]
        seeds: Range<u64>,
        /// Only these; all short ones if none is named.
        #[arg(long, num_args = 1..)]
        rows: Vec<String>,
        /// What `cargo sim chaos --json` printed of the same rows, to be shown beside.
        #[arg(long, value_name = "FILE")]
        beside: Option<String>,
        /// A file that gets a JSON line for each run.
        #[arg(long, value_name = "FILE")]
        results: Option<String>,
        /// One JSON line for each row.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        program: Program,
    },
}

/// The program's main.
pub fn main() -> ExitCode {
    // A task that panicked, such as a client, would be missed by nobody. The nodes end with this process.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::exit(Class::Crash.exit_code().into());
    }));
    let done = match Cli::parse().command {
        Cmd::List => list(),
        Cmd::Run { scenario, seed, json, program } => spec::find(&scenario).and_then(|found| {
            let seed = seed.or(found.seed).unwrap_or(1);
            let report = run(&scenario, &found, seed, &program.find()?, !json)?;
            match json {
                true => println!("{}", serde_json::to_string(&report).map_err(|e| e.to_string())?),
                false => print_report(&report),
            }
            Ok(ExitCode::from(report.class.exit_code()))
        }),
        Cmd::Chaos { seeds, rows, beside, results, json, program } => {
            chaos(seeds, rows, beside, results, json, &program)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::from(2)
    })
}

impl Program {
    fn find(&self) -> Result<PathBuf, String> {
        let Some(given) = &self.loci else { return build(self.release) };
        std::fs::canonicalize(given).map_err(|e| format!("{}: {e}", given.display()))
    }
}

/// Builds `loci`; cargo says where it put the program.
fn build(release: bool) -> Result<PathBuf, String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "-p", "nodes", "--bin", "loci", "--message-format", "json-render-diagnostics"]);
    cargo.args(release.then_some("--release"));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")));
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|e| format!("cargo build: {e}; give the program by --loci"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().rev().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next();
    program.filter(|_| output.status.success()).ok_or_else(|| "loci does not build".into())
}

fn list() -> Result<ExitCode, String> {
    for (name, _) in SHORT.iter().chain(&SHIPPED).chain(&CHAOS) {
        let scenario = spec::find(name)?;
        match refusal(&scenario, &settle(&scenario, 1)) {
            None => println!("{name:28} {}", scenario.about),
            Some(why) => println!("{name:28} (simulated only: {why})"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn chaos(
    seeds: Range<u64>,
    named: Vec<String>,
    beside: Option<String>,
    results: Option<String>,
    json: bool,
    program: &Program,
) -> Result<ExitCode, String> {
    let rows = rows(named, &SHORT)?;
    let beside = beside.map(|path| read(&path)).transpose()?.unwrap_or_default();
    let runs: Vec<(&str, u64)> =
        rows.iter().flat_map(|(name, _)| seeds.clone().map(move |seed| (name.as_str(), seed))).collect();
    // What cannot be played is refused before anything is.
    for (name, seed) in &runs {
        let scenario = spec::find(name)?;
        if let Some(why) = refusal(&scenario, &settle(&scenario, *seed)) {
            return Err(format!("{name} can be played in the simulated world only: {why}"));
        }
    }
    let mut results = results
        .map(|path| {
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| format!("{path}: {e}"))
        })
        .transpose()?;
    let (loci, begun) = (program.find()?, wall_seconds());
    let bar = bar(runs.len() as u64, "{bar:40} {pos}/{len} runs, {elapsed} (about {eta} left) {msg}");
    bar.enable_steady_tick(TICK);
    let mut reports: Vec<Report> = vec![];
    for (name, seed) in &runs {
        bar.set_message(format!("{name} seed {seed}"));
        let report = run(name, &spec::find(name)?, *seed, &loci, false)?;
        if let Some(file) = &mut results {
            let line = serde_json::to_string(&report).map_err(|e| e.to_string())?;
            writeln!(file, "{line}").map_err(|e| format!("a result could not be recorded: {e}"))?;
        }
        if report.verdict != Verdict::Pass && !json {
            bar.suspend(|| print_report(&report));
        }
        reports.push(report);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let of = |name: &str| reports.iter().filter(|r| r.scenario == name).collect::<Vec<_>>();
    let table: Vec<(Row, &Recovery)> =
        rows.iter().map(|(name, recovery)| (Row::of(name, &of(name)), recovery)).collect();
    if json {
        for (row, _) in &table {
            println!("{}", serde_json::to_string(row).map_err(|e| e.to_string())?);
        }
    } else {
        print(&table, &beside, &reports);
        println!("{} runs in {:.0} s, one after the other", runs.len(), wall_seconds() - begun);
    }
    let worst = reports.iter().map(|report| report.class).max().unwrap_or_default();
    Ok(ExitCode::from(worst.exit_code()))
}

/// The rows that `cargo sim chaos --json` printed, by name.
fn read(path: &str) -> Result<BTreeMap<String, Row>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let row = |line: &str| {
        let row: Row = serde_json::from_str(line)
            .map_err(|e| format!("{path}: {e}; it is to be what `cargo sim chaos --json` prints"))?;
        Ok((row.row.clone(), row))
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(row).collect()
}

fn print(table: &[(Row, &Recovery)], beside: &BTreeMap<String, Row>, reports: &[Report]) {
    println!(
        "{:28} {:>5} {:>14} {:>10} {:>7} {:>5} {:>6} {:>6}   {:>5} {:>14} {:>10}",
        "", "", "recovery", "redundancy", "", "", "", "aim", "sim:", "recovery", "redundancy"
    );
    println!(
        "{:28} {:>5} {:>6} {:>7} {:>10} {:>7} {:>5} {:>6} {:>6}   {:>5} {:>6} {:>7} {:>10}",
        "row",
        "seeds",
        "p50 s",
        "p99 s",
        "p99 s",
        "acked",
        "lost",
        "failed",
        "s",
        "seeds",
        "p50 s",
        "p99 s",
        "p99 s"
    );
    for (row, recovery) in table {
        let of_sim = beside.get(&row.row);
        let of = |value: fn(&Row) -> Option<f64>| seconds(of_sim.and_then(value));
        println!(
            "{:28} {:>5} {:>6} {:>7} {:>10} {:>7} {:>5} {:>6} {:>6}   {:>5} {:>6} {:>7} {:>10}",
            row.row,
            row.seeds,
            seconds(row.recovery_p50_s),
            seconds(row.recovery_p99_s),
            seconds(row.redundancy_p99_s),
            row.acked,
            row.lost,
            row.failed,
            recovery.aim_s.map_or("-".into(), |s| format!("{s}")),
            of_sim.map_or("-".into(), |row| row.seeds.to_string()),
            of(|row| row.recovery_p50_s),
            of(|row| row.recovery_p99_s),
            of(|row| row.redundancy_p99_s),
        );
    }
    for (row, _) in table {
        let worlds = [("", Some(row)), (" in simulation", beside.get(&row.row))];
        for (world, told) in worlds.iter().filter_map(|(world, row)| Some((world, row.as_ref()?.told()?))) {
            println!("{}{world}: {told}", row.row);
        }
    }
    println!(
        "recovery: from the fault to the end of the last call that failed, was degraded, or took more than {LATE_TIMES} times the quiet p99 of \
         its kind and {LATE_MIN_MS} ms, as the clients saw it; real seconds, and beside them the simulation's"
    );
    let measured = |report: &Report| report.recovery.clone().map(|m: Measured| (m, report.seed));
    for (row, _) in table {
        let slowest = reports.iter().filter(|r| r.scenario == row.row).filter_map(measured);
        let slowest = slowest.max_by(|a, b| a.0.recovery_s.total_cmp(&b.0.recovery_s));
        if let Some((measured, seed)) = slowest.filter(|(m, _)| !m.last.is_empty()) {
            println!("slowest {} (seed {seed}): {}", row.row, measured.last);
        }
    }
    let bad = reports.iter().filter(|r| r.verdict != Verdict::Pass).count();
    match bad {
        0 => println!("every run kept its promises"),
        _ => println!("{bad} runs did not pass"),
    }
}
