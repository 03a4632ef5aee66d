//! Shrinking: from a run that fails to the few faults and operations that it takes.
//!
//! The run is settled first, so that nothing is left to be drawn but the scheduler's choices. Then parts are left out, and what still breaks the
//! same promise is kept (delta debugging: Zeller and Hildebrandt, 2002). Leaving something out also changes what the scheduler
//! draws from then on, and a failure that needs an unlucky order may hide; so each attempt is made with several scheduler seeds, and the one
//! that failed goes on. The best so far is written to the file after every step; to go on later, shrink that file.

use super::hunt::gave_away;
use super::runner::{Job, child, side_by_side};
use crate::command::wall_seconds;
use crate::operation::Operation;
use crate::report::{Class, Report};
use crate::settle::settle;
use crate::spec::{self, Draw, Fault, NodeDraw, Scenario};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// Scheduler seeds tried for each attempt, beside the one that failed last.
const SEEDS_MORE: u64 = 3;
/// More for the attempts that are few and gain much.
const SEEDS_MANY: u64 = 11;
/// What an attempt may take, about, in seconds.
const ATTEMPT_S: f64 = 6.0;
/// How closely the ends are cut.
const CUT_MS: u64 = 300;
/// Longer pauses in which nothing begins are shortened to this.
const GAP_MS: u64 = 300;
/// Operations are moved to multiples of these, faults too.
const ROUND_MS: [u64; 4] = [5000, 1000, 500, 100];
/// Nothing is moved before nodes have had the time to elect a leader.
const FIRST_MS: u64 = 2500;

pub struct Shrink {
    pub job: Job,
    pub out: String,
    pub minutes: f64,
    pub jobs: usize,
}

/// A smaller and smaller run that breaks the same promise.
struct State {
    best: Scenario,
    seed: u64,
    report: Report,
    broken: String,
    asked: Shrink,
    scratch: PathBuf,
    began_s: f64,
    runs: u64,
}

impl Shrink {
    /// Shrinks and writes the result; what it came to, for a person.
    pub fn run(self) -> Result<String, String> {
        let began_s = wall_seconds();
        let scenario = spec::find(&self.job.scenario)?;
        let report = child(&self.job, None);
        if matches!(report.class, Class::Pass | Class::Vacuous) {
            let verdict = format!("{:?}", report.verdict).to_lowercase();
            return Err(format!("{} gives '{verdict}': there is nothing to shrink", self.job.command("run")));
        }
        let broken = gave_away(&report);
        let scratch = std::env::temp_dir().join(format!("loci-shrink-{}", std::process::id()));
        std::fs::create_dir_all(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
        let (best, seed) = (settle(&scenario, self.job.seed), self.job.seed);
        let mut state = State { best, seed, report, broken, asked: self, scratch, began_s, runs: 1 };
        println!("{} of {}", state.broken, state.size());
        let done = state.shrink();
        let _ = std::fs::remove_dir_all(&state.scratch);
        done
    }
}

fn size(run: &Scenario) -> (usize, usize) {
    let disk = run.faults.disk.as_ref().map_or(0, Vec::len);
    (run.faults.list.len() + disk, run.operations.as_ref().map_or(0, Vec::len))
}

impl State {
    fn size(&self) -> String {
        let (faults, operations) = size(&self.best);
        format!("{faults} faults and {operations} operations")
    }

    fn late(&self) -> bool {
        wall_seconds() - self.began_s > self.asked.minutes * 60.0
    }

    fn shrink(&mut self) -> Result<String, String> {
        let whole = self.size();
        // However small it gets, it proves what it is kept for.
        let mut small = self.best.clone();
        (small.enough.acked, small.enough.virtual_s) = (0, 0.0);
        small.about = format!("{} broken, shrunk from {}", self.broken, self.asked.job.command("run"));
        self.attempt(small, SEEDS_MANY)?;
        loop {
            self.cut_the_ends()?;
            let before = (size(&self.best), self.best.draw.clone(), self.best.topology.clone());
            self.leave_out_clients()?;
            self.leave_out_operations()?;
            self.leave_out_faults()?;
            self.plainer_system()?;
            if (size(&self.best), self.best.draw.clone(), self.best.topology.clone()) == before || self.late()
            {
                break;
            }
        }
        self.rounder_times()?;
        self.fewer_clients()?;
        let passes = self.prove()?;
        self.write()?;
        let late = if self.late() { "; the time was up: shrink the file to go on" } else { "" };
        Ok(format!(
            "{} of {} -> {} in {:.0} s and {} runs{late}\n{passes}\n{} written; cargo sim run {}{}",
            self.broken,
            whole,
            self.size(),
            wall_seconds() - self.began_s,
            self.runs,
            self.asked.out,
            self.asked.out,
            self.asked.job.mutant.as_ref().map_or(String::new(), |m| format!(" --mutant {m}")),
        ))
    }

    /// Whether `run` still fails in the same way; then it is the best.
    fn attempt(&mut self, run: Scenario, seeds_more: u64) -> Result<bool, String> {
        if self.late() || run == self.best {
            return Ok(false);
        }
        let path = self.scratch.join("attempt.toml").to_string_lossy().into_owned();
        let text = toml::to_string_pretty(&run).map_err(|e| format!("the run cannot be written: {e}"))?;
        std::fs::write(&path, text).map_err(|e| format!("{path}: {e}"))?;
        // Where a run takes long, fewer are better.
        let affordable = (ATTEMPT_S * self.asked.jobs as f64 / self.report.wall_s.max(0.05)) as u64;
        let more = seeds_more.min(affordable.max(1));
        let others = (1..).filter(|seed| *seed != self.seed).take(more as usize);
        let seeds: Vec<u64> = [self.seed].into_iter().chain(others).collect();
        let found = AtomicBool::new(false);
        let (mutant, broken) = (self.asked.job.mutant.as_deref(), &self.broken);
        let reports = side_by_side(&seeds, self.asked.jobs, |seed| {
            if found.load(Ordering::Relaxed) {
                return None;
            }
            let report = child(&Job::new(&path, *seed, mutant), None);
            let same = !matches!(report.class, Class::Pass | Class::Vacuous) && breaks(&report, broken);
            found.fetch_or(same, Ordering::Relaxed);
            Some((same, report))
        });
        self.runs += reports.len() as u64;
        let Some((_, report)) = reports.into_iter().find(|(same, _)| *same) else { return Ok(false) };
        let before = size(&self.best);
        (self.seed, self.best, self.report) = (report.seed, run, report);
        self.best.seed = Some(self.seed);
        self.write()?;
        if size(&self.best) != before {
            println!("{:7.1} s  {} ({} runs)", wall_seconds() - self.began_s, self.size(), self.runs);
        }
        Ok(true)
    }

    /// Nothing from as early a time on as may be, and nothing before as late a time as may be.
    fn cut_the_ends(&mut self) -> Result<(), String> {
        let time = |run: &Scenario| {
            let operations = run.operations.iter().flatten().map(|o| o.at_ms);
            let faults = run.faults.list.iter().chain(run.faults.disk.iter().flatten()).map(|f| f.at_ms);
            operations.chain(faults).fold((u64::MAX, 0), |(first, last), at| (first.min(at), last.max(at)))
        };
        let within = |run: &Scenario, from: u64, to: u64| {
            let mut run = run.clone();
            let keep = |at: u64| (from..=to).contains(&at);
            run.faults.list.retain(|fault| keep(fault.at_ms));
            run.faults.disk.iter_mut().for_each(|disk| disk.retain(|fault| keep(fault.at_ms)));
            run.operations.iter_mut().for_each(|all| all.retain(|operation| keep(operation.at_ms)));
            run
        };
        for end in [true, false] {
            let (mut first, mut last) = time(&self.best);
            while first + CUT_MS < last && !self.late() {
                let middle = first.midpoint(last);
                let run =
                    if end { within(&self.best, 0, middle) } else { within(&self.best, middle, u64::MAX) };
                let fails = self.attempt(run, SEEDS_MANY)?;
                match fails == end {
                    true => last = middle,
                    false => first = middle,
                }
            }
        }
        Ok(())
    }

    fn leave_out_faults(&mut self) -> Result<(), String> {
        let none = Scenario {
            faults: spec::Faults { disk: Some(vec![]), ..self.best.faults.clone() },
            ..self.best.clone()
        };
        self.attempt(none, SEEDS_MANY)?;
        let list = |run: &mut Scenario, faults: Vec<Fault>| run.faults.list = faults;
        self.leave_out(self.best.faults.list.clone(), &list, SEEDS_MANY)?;
        let disk = |run: &mut Scenario, faults: Vec<Fault>| run.faults.disk = Some(faults);
        self.leave_out(self.best.faults.disk.clone().unwrap_or_default(), &disk, SEEDS_MANY)
    }

    fn leave_out_clients(&mut self) -> Result<(), String> {
        for client in 0..self.best.workload.clients {
            let mut run = self.best.clone();
            let Some(all) = &mut run.operations else { continue };
            let before = all.len();
            all.retain(|operation| operation.client != client);
            if all.len() < before {
                self.attempt(run, SEEDS_MORE)?;
            }
        }
        Ok(())
    }

    fn leave_out_operations(&mut self) -> Result<(), String> {
        let set = |run: &mut Scenario, operations: Vec<Operation>| run.operations = Some(operations);
        let few = self.best.operations.as_ref().is_none_or(|all| all.len() < 40);
        let all = self.best.operations.clone().unwrap_or_default();
        self.leave_out(all, &set, if few { SEEDS_MANY } else { SEEDS_MORE })
    }

    /// Delta debugging over a list: ever smaller pieces are left out.
    fn leave_out<T: Clone>(
        &mut self,
        mut items: Vec<T>,
        set: &dyn Fn(&mut Scenario, Vec<T>),
        seeds_more: u64,
    ) -> Result<(), String> {
        let mut piece = items.len().div_ceil(2);
        while piece > 0 && !items.is_empty() {
            let mut from = 0;
            while from < items.len() {
                let mut rest = items.clone();
                rest.drain(from..(from + piece).min(items.len()));
                let mut run = self.best.clone();
                set(&mut run, rest.clone());
                if self.attempt(run, seeds_more)? {
                    items = rest;
                } else {
                    from += piece;
                }
                if self.late() {
                    return Ok(());
                }
            }
            piece = if piece == 1 { 0 } else { piece.div_ceil(2).min(items.len()) };
        }
        Ok(())
    }

    /// The usual sizes and limits instead of what the seed drew.
    fn plainer_system(&mut self) -> Result<(), String> {
        type Change = fn(&mut Scenario);
        let changes: [Change; 9] = [
            |run| run.topology.caches = 0,
            |run| (run.topology.gateways, run.topology.loss) = (0, 0.0),
            |run| run.topology.replicas = run.topology.replicas.min(3),
            |run| run.draw.iter_mut().for_each(|draw| draw.buggify.clear()),
            |run| run.draw.iter_mut().for_each(|draw| draw.product_rows_min = None),
            |run| run.draw.iter_mut().for_each(|draw| draw.nodes.fill(NodeDraw::default())),
            |run| {
                let plain =
                    |node: &mut NodeDraw| *node = NodeDraw { sync_us: node.sync_us, ..NodeDraw::default() };
                run.draw.iter_mut().flat_map(|draw| &mut draw.nodes).for_each(plain);
            },
            |run| {
                let true_clocks =
                    |node: &mut NodeDraw| (node.rate_ppm, node.offset_ms, node.calendar_ms) = (0, 0, 0);
                run.draw.iter_mut().flat_map(|draw| &mut draw.nodes).for_each(true_clocks);
            },
            |run| run.draw = Some(Draw::usual(run.topology.machines())),
        ];
        for change in changes {
            let mut run = self.best.clone();
            change(&mut run);
            let nodes = run.topology.machines();
            run.draw.iter_mut().for_each(|draw| draw.nodes.truncate(nodes));
            self.attempt(run, SEEDS_MORE)?;
        }
        for number in (0..self.best.draw.as_ref().map_or(0, |draw| draw.buggify.len())).rev() {
            let mut run = self.best.clone();
            if let Some(draw) = run.draw.as_mut().filter(|draw| number < draw.buggify.len()) {
                draw.buggify.remove(number);
            }
            self.attempt(run, SEEDS_MORE)?;
        }
        Ok(())
    }

    /// Everything earlier, and at times that a person can read.
    fn rounder_times(&mut self) -> Result<(), String> {
        let mut times: Vec<u64> = self.best.operations.iter().flatten().map(|o| o.at_ms).collect();
        times.extend(
            self.best.faults.list.iter().chain(self.best.faults.disk.iter().flatten()).map(|f| f.at_ms),
        );
        times.extend([FIRST_MS]);
        times.sort_unstable();
        // The last gap first, so that the times before it stay as they are.
        for gap in times.windows(2).rev().filter(|w| w[1] > w[0] + GAP_MS && w[0] >= FIRST_MS) {
            let earlier = |at: &mut u64| *at -= if *at >= gap[1] { gap[1] - gap[0] - GAP_MS } else { 0 };
            let mut run = self.best.clone();
            run.operations.iter_mut().flatten().for_each(|o| earlier(&mut o.at_ms));
            run.faults
                .list
                .iter_mut()
                .chain(run.faults.disk.iter_mut().flatten())
                .for_each(|f| earlier(&mut f.at_ms));
            self.attempt(run, SEEDS_MORE)?;
        }
        for step in ROUND_MS {
            for number in 0..self.best.faults.list.len() {
                let mut run = self.best.clone();
                run.faults.list[number].at_ms = run.faults.list[number].at_ms.next_multiple_of(step);
                // They are played in the order of the list.
                if run.faults.list.is_sorted_by_key(|fault| fault.at_ms) {
                    self.attempt(run, SEEDS_MORE)?;
                }
                let mut run = self.best.clone();
                run.faults.list[number].lasts_ms = run.faults.list[number].lasts_ms.next_multiple_of(step);
                self.attempt(run, SEEDS_MORE)?;
            }
        }
        let mut run = self.best.clone();
        run.operations.iter_mut().flatten().for_each(|o| o.at_ms = o.at_ms.next_multiple_of(100));
        self.attempt(run, SEEDS_MANY).map(drop)
    }

    /// Only the clients that do something, numbered from 0, and only as many tenants as it takes.
    fn fewer_clients(&mut self) -> Result<(), String> {
        let tenant_of = |client: usize| client % self.best.workload.tenants;
        let mut used: Vec<usize> = self.best.operations.iter().flatten().map(|o| o.client).collect();
        used.sort_unstable();
        used.dedup();
        let mut tenants: Vec<usize> = used.iter().map(|client| tenant_of(*client)).collect();
        tenants.sort_unstable();
        tenants.dedup();
        // A client's tenant is what is left of its number, so that it may only take the place of one of the same tenant.
        let mut taken: Vec<usize> = vec![];
        for client in &used {
            let tenant = tenants.iter().position(|t| *t == tenant_of(*client)).unwrap_or(0);
            let place = (tenant..).step_by(tenants.len().max(1)).find(|place| !taken.contains(place));
            taken.extend(place);
        }
        let mut run = self.best.clone();
        run.workload.tenants = tenants.len().max(1);
        for operation in run.operations.iter_mut().flatten() {
            if let Some(at) = used.iter().position(|client| *client == operation.client) {
                operation.client = taken[at];
            }
        }
        run.workload.clients = taken.iter().max().map_or(1, |most| most + 1);
        self.attempt(run, SEEDS_MANY).map(drop)
    }

    /// Without its planted bug the run must pass, or it shows something else.
    fn prove(&mut self) -> Result<String, String> {
        if self.asked.job.mutant.is_none() {
            return Ok(
                "it stays a failing run until its cause is fixed; then keep it in scenarios/regressions"
                    .into(),
            );
        }
        let path = self.scratch.join("proof.toml").to_string_lossy().into_owned();
        let text =
            toml::to_string_pretty(&self.best).map_err(|e| format!("the run cannot be written: {e}"))?;
        std::fs::write(&path, text).map_err(|e| format!("{path}: {e}"))?;
        let clean = child(&Job::new(&path, self.seed, None), None);
        self.runs += 1;
        self.best.enough.acked = clean.acked.min(1);
        Ok(match clean.class {
            Class::Pass => "without the planted bug it passes".into(),
            _ => format!("BUT without the planted bug it is {:?}: {}", clean.class, clean.why),
        })
    }

    fn write(&self) -> Result<(), String> {
        let text =
            toml::to_string_pretty(&self.best).map_err(|e| format!("the run cannot be written: {e}"))?;
        let mutant = self.asked.job.mutant.as_ref().map_or(String::new(), |m| format!(" --mutant {m}"));
        let what = self.report.violations.first().map_or(&self.report.why, |v| &v.what);
        let what: String = what.chars().take(600).map(|c| if c == '\n' { ' ' } else { c }).collect();
        let head = format!("# cargo sim run {}{mutant}\n# {}: {what}\n", self.asked.out, self.broken);
        // Written aside first: a shrinker that is ended leaves the last good file.
        let aside = format!("{}.new", self.asked.out);
        std::fs::write(&aside, head + &text).map_err(|e| format!("{aside}: {e}"))?;
        std::fs::rename(&aside, &self.asked.out).map_err(|e| format!("{}: {e}", self.asked.out))
    }
}

fn breaks(report: &Report, broken: &str) -> bool {
    report.violations.iter().any(|violation| violation.promise == broken) || gave_away(report) == broken
}
