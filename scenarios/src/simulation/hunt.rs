//! The hunt for planted bugs: how many seeds each one survives.

use super::runner::{Job, child, side_by_side};
use super::sweep::scenarios;
use crate::command::{bar, wall_seconds};
use crate::mutants::{MUTANTS, Mutant};
use crate::report::{Class, Report};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;

/// A scenario whose first so many seeds never came upon a bug's code, while another one's did, is not run for it any more. That can
/// only add to the count of seeds: a sweep of all scenarios finds the bug no later.
const UNREACHED_MAX: u64 = 2;

/// What came of one planted bug.
#[derive(Serialize)]
struct Caught {
    mutant: &'static str,
    /// A run with it failed that passes without it.
    caught: bool,
    /// How many seeds were tried, on each all scenarios that come upon it, until that one; all if it was not caught.
    seeds_to_detection: u64,
    /// What gave it away: a promise, or how the run ended.
    promise: Option<String>,
    scenario: Option<String>,
    seed: Option<u64>,
    /// In how many runs the code with the bug was come upon.
    runs_reached: u64,
}

/// Plants each bug (or the named ones) and runs seeds of all scenarios (or of the named ones) until one catches it.
pub fn hunt(
    seeds: Range<u64>,
    named: Vec<String>,
    on: Vec<String>,
    jobs: usize,
    json: bool,
) -> Result<ExitCode, String> {
    if let Some(name) = named.iter().find(|name| !MUTANTS.iter().any(|m| m.name == **name)) {
        return Err(format!("there is no planted bug '{name}'; `cargo sim mutants --list` names them"));
    }
    let wanted: Vec<&Mutant> =
        MUTANTS.iter().filter(|m| named.is_empty() || named.iter().any(|name| name == m.name)).collect();
    let scenarios = scenarios(on)?;
    // Runs without a bug are shared by all bugs.
    let clean: Mutex<BTreeMap<Job, bool>> = Mutex::default();
    let begun = wall_seconds();
    let bar = bar(wanted.len() as u64, "{bar:40} {pos}/{len} planted bugs, {elapsed} {msg}");
    let all = side_by_side(&wanted, jobs, |mutant| {
        let caught = one(mutant, seeds.clone(), &scenarios, &clean, &|seed| {
            bar.set_message(format!("{} survives {seed} seeds", mutant.name));
        });
        bar.inc(1);
        bar.suspend(|| if json { print_json(&caught) } else { show(&caught) });
        Some(caught)
    });
    bar.finish_and_clear();
    let caught = all.iter().filter(|found| found.caught).count();
    if !json {
        println!(
            "{caught} of {} planted bugs caught ({:.0} %), within {} seeds each, in {:.0} s",
            all.len(),
            caught as f64 * 100.0 / all.len().max(1) as f64,
            seeds.end - seeds.start,
            wall_seconds() - begun
        );
    }
    Ok(if caught == all.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One planted bug's fate, for a program; as it is known, since the others may take long.
fn print_json(found: &Caught) {
    match serde_json::to_string(found) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("{} cannot be written: {error}", found.mutant),
    }
}

/// One planted bug's fate, for a person.
fn show(found: &Caught) {
    let what = MUTANTS.iter().find(|m| m.name == found.mutant).map_or("", |m| m.what);
    let how = match (&found.promise, &found.scenario, found.seed) {
        (Some(promise), Some(scenario), Some(seed)) => {
            format!("{promise:8} after {:3} seeds, by {scenario} seed {seed}", found.seeds_to_detection)
        }
        _ if found.runs_reached == 0 => {
            format!("SURVIVED {} seeds: its code was never come upon", found.seeds_to_detection)
        }
        _ => format!("SURVIVED {} seeds, come upon in {} runs", found.seeds_to_detection, found.runs_reached),
    };
    println!("{:44} {how}\n    {what}", found.mutant);
}

fn one(
    mutant: &Mutant,
    seeds: Range<u64>,
    scenarios: &[String],
    clean: &Mutex<BTreeMap<Job, bool>>,
    survives: &dyn Fn(u64),
) -> Caught {
    let mut runs_reached = 0;
    // In how many runs of each scenario its code was come upon.
    let mut reached: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in seeds.clone() {
        let tried = seed - seeds.start;
        for scenario in scenarios {
            let here = reached.get(scenario.as_str()).copied().unwrap_or_default();
            if tried >= UNREACHED_MAX && here == 0 && runs_reached > 0 {
                continue;
            }
            let report = child(&Job::new(scenario, seed, Some(mutant.name)), None);
            let here = report.mutant.as_ref().is_none_or(|(_, times)| *times > 0) as u64;
            runs_reached += here;
            *reached.entry(scenario).or_default() += here;
            if matches!(report.class, Class::Pass | Class::Vacuous)
                || !passes(Job::new(scenario, seed, None), clean)
            {
                continue;
            }
            return Caught {
                mutant: mutant.name,
                caught: true,
                seeds_to_detection: seed - seeds.start + 1,
                promise: Some(gave_away(&report)),
                scenario: Some(scenario.clone()),
                seed: Some(seed),
                runs_reached,
            };
        }
        survives(seed - seeds.start + 1);
    }
    let seeds_to_detection = seeds.end - seeds.start;
    let (promise, scenario, seed) = Default::default();
    Caught { mutant: mutant.name, caught: false, seeds_to_detection, promise, scenario, seed, runs_reached }
}

/// The first promise that did not hold, or how the run ended.
pub fn gave_away(report: &Report) -> String {
    match report.violations.first() {
        Some(violation) => violation.promise.clone(),
        None => format!("{:?}", report.class).to_lowercase(),
    }
}

fn passes(job: Job, clean: &Mutex<BTreeMap<Job, bool>>) -> bool {
    let lock = || clean.lock().unwrap_or_else(|p| p.into_inner());
    if let Some(known) = lock().get(&job) {
        return *known;
    }
    let passes = child(&job, None).class == Class::Pass;
    lock().insert(job, passes);
    passes
}
