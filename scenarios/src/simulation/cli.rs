//! `cargo sim …`: the simulator's command line.

use super::chaos::{self, Chaos};
use super::page::{self, Parted};
use super::run::{Run, run};
use super::runner::{self, Job, jobs};
use super::shrink::Shrink;
use super::sweep::{self, Sweep};
use super::{events, hunt};
use crate::command::{print_report, seeds, wall_seconds};
use crate::mutants::MUTANTS;
use crate::report::Verdict;
use crate::settle::settle;
use crate::spec::{self, CHAOS, SHIPPED};
use clap::{Args, Parser, Subcommand};
use sim::trace::Level;
use sim::world::{self, TraceLine};
use std::ops::Range;
use std::process::ExitCode;

const LINES_BEFORE_PANIC: usize = 40;

#[derive(Parser)]
#[command(name = "cargo sim", about = "Loci in the simulated world", version = nodes::BUILD)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

/// Which run.
#[derive(Args)]
struct Which {
    /// A shipped scenario, or a TOML file.
    scenario: String,
    /// The file's own, or 1.
    #[arg(long)]
    seed: Option<u64>,
    /// A planted bug: see `mutants --list`.
    #[arg(long)]
    mutant: Option<String>,
}

#[derive(Subcommand)]
enum Cmd {
    /// Names the scenarios.
    List,
    /// Runs one scenario with one seed.
    Run {
        #[command(flatten)]
        which: Which,
        /// One JSON line.
        #[arg(long)]
        json: bool,
        /// A file for every event, a line each.
        #[arg(long)]
        events: Option<String>,
    },
    /// Writes a run down with everything that its seed drew, as a scenario that can be edited and run.
    Plan {
        #[command(flatten)]
        which: Which,
    },
    /// Runs scenarios on many seeds, a process each.
    Sweep {
        /// As Rust writes ranges: A..B or A..=B.
        #[arg(long, value_parser = seeds, default_value = "1..=20")]
        seeds: Range<u64>,
        /// Seeds that nobody has run, for so many minutes.
        #[arg(long, value_name = "MINUTES", conflicts_with = "resume")]
        fresh: Option<u64>,
        /// Only these; all if none is named.
        scenarios: Vec<String>,
        /// Processes side by side; all cores if 0.
        #[arg(long, default_value_t = 0)]
        jobs: usize,
        /// One run in so many is done twice, and must give the same trace; 0: none.
        #[arg(long, default_value_t = 20)]
        repeat_every: u64,
        /// A file that gets a JSON line for each run.
        #[arg(long, default_value = "sweeps.jsonl")]
        results: String,
        /// Leaves out the runs that the file of results has of this build.
        #[arg(long)]
        resume: bool,
    },
    /// Hits a cluster with each fault of the chaos table on many seeds, and prints how long its clients felt it.
    Chaos {
        #[arg(long, value_parser = seeds, default_value = "1..=20")]
        seeds: Range<u64>,
        /// Only these; all if none is named. A scenario file with `[recovery]` is a row too.
        #[arg(long, num_args = 1..)]
        rows: Vec<String>,
        /// One JSON line for each row.
        #[arg(long)]
        json: bool,
        /// Processes side by side; all cores if 0.
        #[arg(long, default_value_t = 0)]
        jobs: usize,
    },
    /// Runs one scenario again and prints what happened, line by line.
    Replay {
        #[command(flatten)]
        which: Which,
        /// Debug lines, messages, disk operations and figures too.
        #[arg(long)]
        all: bool,
        /// A page to be looked at in a browser, instead of lines.
        #[arg(long, value_name = "FILE")]
        html: Option<String>,
        /// Where this run and another one of the same scenario part: another seed, or `clean` (without the planted bug).
        #[arg(long, value_name = "SEED")]
        against: Option<String>,
    },
    /// Plants bugs, one at a time, and counts the seeds until each is caught.
    Mutants {
        #[arg(long, value_parser = seeds, default_value = "1..=200")]
        seeds: Range<u64>,
        /// Only these; all if none is named.
        mutants: Vec<String>,
        /// On these scenarios; on all that ship if none is named. A scenario file is one too.
        #[arg(long, num_args = 1..)]
        scenarios: Vec<String>,
        /// One JSON line for each.
        #[arg(long)]
        json: bool,
        /// Names them, and runs nothing.
        #[arg(long)]
        list: bool,
        #[arg(long, default_value_t = 0)]
        jobs: usize,
    },
    /// Finds the few faults and operations that a failing run takes, and writes them down as a scenario.
    Shrink {
        #[command(flatten)]
        which: Which,
        #[arg(long)]
        out: String,
        /// The time after which it stops with what it has.
        #[arg(long, default_value_t = 5.0)]
        minutes: f64,
        #[arg(long, default_value_t = 0)]
        jobs: usize,
    },
    /// Runs every scenario of a folder with its own seed: the failures that were found, shrunk and mended.
    Regressions {
        #[arg(default_value = "scenarios/regressions")]
        folder: String,
        #[arg(long, default_value_t = 0)]
        jobs: usize,
    },
    /// How many virtual seconds an idle cluster passes per second of wall time.
    Idle {
        #[arg(long, default_value_t = 600)]
        virtual_s: u64,
        #[arg(long, default_value_t = 3)]
        nodes: usize,
        #[arg(long, default_value_t = 1)]
        shards: u32,
    },
}

/// The program's main.
pub fn main() -> ExitCode {
    // A run that panics has no report; what led there is printed instead.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // Whoever read the output has seen enough.
        if panic.payload_as_str().is_some_and(|why| why.contains("Broken pipe")) {
            std::process::exit(0);
        }
        world::last_lines(LINES_BEFORE_PANIC).iter().for_each(|line| eprintln!("{}", readable(line)));
        usual(panic);
    }));
    let done = match Cli::parse().command {
        Cmd::List => Ok(list()),
        Cmd::Run { which, json, events } => which.find().and_then(|(scenario, job)| {
            let run = play(&scenario, &job, events.is_some());
            if let Some(path) = events {
                events::write(&run, &path).map_err(|e| format!("{path}: {e}"))?;
            }
            match json {
                true => println!("{}", serde_json::to_string(&run.report).map_err(|e| e.to_string())?),
                false => print_report(&run.report),
            }
            Ok(ExitCode::from(run.report.class.exit_code()))
        }),
        Cmd::Plan { which } => which.find().and_then(|(scenario, job)| {
            let text = toml::to_string_pretty(&settle(&scenario, job.seed)).map_err(|e| e.to_string())?;
            println!("# {}\n{text}", job.command("plan"));
            Ok(ExitCode::SUCCESS)
        }),
        Cmd::Replay { which, all, html, against } => which.find().and_then(|(scenario, job)| {
            let parted = against.map(|other| part(&job, &other)).transpose()?.flatten();
            let run = play(&scenario, &job, all || html.is_some());
            match html {
                Some(path) => {
                    let page = page::page(&run, &job, parted).map_err(|e| e.to_string())?;
                    std::fs::write(&path, page).map_err(|e| format!("{path}: {e}"))?;
                    print_report(&run.report);
                    println!("{path} written");
                }
                None => {
                    timeline(&run, all);
                    parted.iter().for_each(|parted| println!("\n{}", parted.text));
                }
            }
            Ok(ExitCode::from(run.report.class.exit_code()))
        }),
        Cmd::Sweep { seeds, fresh, scenarios, jobs: asked, repeat_every, results, resume } => {
            let (jobs, results) = (jobs(asked), Some(results).filter(|path| !path.is_empty()));
            sweep::sweep(Sweep {
                seeds,
                scenarios,
                jobs,
                fresh_minutes: fresh,
                repeat_every,
                results,
                resume,
            })
        }
        Cmd::Chaos { seeds, rows, json, jobs: asked } => {
            chaos::chaos(Chaos { seeds, rows, json, jobs: jobs(asked) })
        }
        Cmd::Mutants { list: true, .. } => {
            MUTANTS.iter().for_each(|mutant| println!("{:44} {}", mutant.name, mutant.what));
            Ok(ExitCode::SUCCESS)
        }
        Cmd::Mutants { seeds, mutants, scenarios, json, jobs: asked, .. } => {
            hunt::hunt(seeds, mutants, scenarios, jobs(asked), json)
        }
        Cmd::Shrink { which, out, minutes, jobs: asked } => which.find().and_then(|(_, job)| {
            println!("{}", Shrink { job, out, minutes, jobs: jobs(asked) }.run()?);
            Ok(ExitCode::SUCCESS)
        }),
        Cmd::Regressions { folder, jobs: asked } => regressions(&folder, jobs(asked)),
        Cmd::Idle { virtual_s, nodes, shards } => idle(virtual_s, nodes, shards),
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::from(2)
    })
}

impl Which {
    fn find(self) -> Result<(spec::Scenario, Job), String> {
        let scenario = spec::find(&self.scenario)?;
        if let Some(name) = self.mutant.as_ref().filter(|name| !MUTANTS.iter().any(|m| m.name == **name)) {
            return Err(format!("there is no planted bug '{name}'; `cargo sim mutants --list` names them"));
        }
        let seed = self.seed.or(scenario.seed).unwrap_or(1);
        Ok((scenario, Job { scenario: self.scenario, seed, mutant: self.mutant }))
    }
}

/// Plays a run in this process.
fn play(scenario: &spec::Scenario, job: &Job, all: bool) -> Run {
    job.mutant.iter().for_each(|name| sim::planted::plant(name));
    let mut run = run(&job.scenario, scenario, job.seed, all);
    run.report.mutant = job.mutant.clone().map(|name| (name, sim::planted::reached()));
    run
}

/// Where a run and another one part.
fn part(job: &Job, other: &str) -> Result<Option<Parted>, String> {
    let mut against = job.clone();
    match other {
        "clean" => against.mutant = None,
        seed => against.seed = seed.parse().map_err(|_| format!("'{seed}' is neither a seed nor 'clean'"))?,
    }
    let found = events::compare(job, &against)?;
    Ok(found.map(|(number, text)| {
        let first = text.lines().find_map(|line| line.strip_prefix("  < "));
        let at = first.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0.0);
        let text = format!(
            "event {number} is the first that differs from `{}` (>):\n{text}",
            against.command("run")
        );
        Parted { at, text }
    }))
}

fn list() -> ExitCode {
    for (name, _) in SHIPPED.iter().chain(&CHAOS) {
        match spec::find(name) {
            Ok(scenario) => println!("{name:22} {}", scenario.about),
            Err(error) => println!("{name:22} {error}"),
        }
    }
    ExitCode::SUCCESS
}

fn regressions(folder: &str, jobs: usize) -> Result<ExitCode, String> {
    let failed = |error: std::io::Error| format!("{folder}: {error}");
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        files.extend(
            path.extension().is_some_and(|e| e == "toml").then(|| path.to_string_lossy().into_owned()),
        );
    }
    files.sort();
    let jobs_of = files.iter().map(|file| {
        let seed = spec::find(file)?.seed.ok_or_else(|| format!("{file} does not say its seed"))?;
        Ok(Job::new(file, seed, None))
    });
    let all: Vec<Job> = jobs_of.collect::<Result<_, String>>()?;
    let reports = runner::side_by_side(&all, jobs, |job| Some(runner::child(job, None)));
    for report in &reports {
        match report.verdict {
            Verdict::Pass => println!("passes  {}", report.scenario),
            _ => print_report(report),
        }
    }
    println!("{} of {} pass", reports.iter().filter(|r| r.verdict == Verdict::Pass).count(), reports.len());
    let worst = reports.iter().map(|r| r.class).max().unwrap_or_default();
    Ok(ExitCode::from(worst.exit_code()))
}

fn idle(virtual_s: u64, nodes: usize, shards: u32) -> Result<ExitCode, String> {
    let started = wall_seconds();
    let entries = super::run::idle(virtual_s, nodes, shards).map_err(|e| e.to_string())?;
    let wall_s = (wall_seconds() - started).max(0.01);
    let speed = virtual_s as f64 / wall_s;
    println!(
        "{nodes} idle nodes, shards: {shards}; {virtual_s} virtual s in {wall_s:.2} wall s: {speed:.0} virtual s per wall s ({entries} ledger entries)"
    );
    Ok(ExitCode::SUCCESS)
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
    let faults = &run.settled.faults;
    for fault in faults.list.iter().chain(faults.disk.iter().flatten()) {
        let ends = (fault.at_ms + fault.lasts_ms) as f64 / 1e3;
        println!(
            "plan: {:?} on {:?} from {:.3} s to {ends:.3} s",
            fault.kind,
            fault.target,
            fault.at_ms as f64 / 1e3
        );
    }
    match all {
        true => run.events.iter().for_each(|event| println!("{}", events::line(event, &run.nodes))),
        false => run
            .lines
            .iter()
            .filter(|line| line.level <= Level::Info)
            .for_each(|line| println!("{}", readable(line))),
    }
    println!();
    print_report(&run.report);
}
