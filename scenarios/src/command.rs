//! What the command lines of both worlds share: seeds, progress, and a run's report for a person.

use crate::report::Report;
use indicatif::{ProgressBar, ProgressStyle};
use std::ops::Range;

/// As Rust writes ranges; a number alone is one seed.
pub fn seeds(text: &str) -> Result<Range<u64>, String> {
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

/// A bar of progress over `length` runs.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// What came of a run, for a person.
pub fn print_report(report: &Report) {
    println!("{} seed {}: {:?}  {}", report.scenario, report.seed, report.verdict, report.why);
    println!(
        "  {} writes acknowledged, {} lost, {} of unknown outcome; {} reads",
        report.acked, report.lost, report.unknown, report.reads
    );
    println!(
        "  {:.1} virtual s in {:.1} wall s; longest time without an acknowledged write {:.2} s",
        report.virtual_s, report.wall_s, report.write_gap_s
    );
    if report.lost_reported > 0 {
        println!(
            "  {} acknowledged writes lost with a region as was reported, those of {:.2} s",
            report.lost_reported, report.lost_s
        );
    }
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
    if let Some(recovery) = &report.recovery {
        let redundant = recovery.redundancy_s.map_or("never".into(), |s| format!("after {s:.2} s"));
        println!(
            "  recovered after {:.2} s ({} failed, {} degraded, {} late of {}), all replicas there {redundant}",
            recovery.recovery_s, recovery.failed, recovery.degraded, recovery.late, recovery.calls
        );
        if !recovery.last.is_empty() {
            println!("  last: {}", recovery.last);
        }
    }
    for (path, count) in &report.probes {
        println!("  {count:9} x {path}");
    }
    for violation in &report.violations {
        println!("  {} at {:.3} s: {}", violation.promise, violation.at_s, violation.what);
    }
    if let Some((mutant, times)) = &report.mutant {
        println!("  planted bug {mutant}: come upon {times} times");
    }
    match report.trace_hash.as_str() {
        "" => println!("  build {}", report.build),
        hash => println!("  trace {hash}  build {}", report.build),
    }
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
