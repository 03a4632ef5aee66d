//! The chaos table: each row is a scenario that measures recovery ([`crate::recovery`]), run on many seeds.

use super::runner::{Job, child, side_by_side};
use crate::command::{bar, print_report, wall_seconds};
use crate::recovery::{LATE_MIN_MS, LATE_TIMES, Measured, percentile};
use crate::report::{Class, Report, Verdict};
use crate::rows::{Row, rows, seconds};
use crate::spec::{CHAOS, Recovery};
use std::collections::BTreeMap;
use std::ops::Range;
use std::process::ExitCode;

const FAILURES_SHOWN: usize = 20;

pub struct Chaos {
    pub seeds: Range<u64>,
    pub rows: Vec<String>,
    pub jobs: usize,
    pub json: bool,
}

pub fn chaos(asked: Chaos) -> Result<ExitCode, String> {
    let rows = rows(asked.rows, &CHAOS)?;
    let begun = wall_seconds();
    let seeds: Vec<u64> = asked.seeds.collect();
    let all: Vec<Job> =
        rows.iter().flat_map(|(name, _)| seeds.iter().map(|seed| Job::new(name, *seed, None))).collect();
    let bar = bar(all.len() as u64, "{bar:40} {pos}/{len} runs, {elapsed} (about {eta} left) {msg}");
    let reports = side_by_side(&all, asked.jobs, |job| {
        let report = child(job, None);
        if report.verdict != Verdict::Pass && !asked.json {
            bar.suspend(|| print_report(&report));
        }
        bar.inc(1);
        Some(report)
    });
    bar.finish_and_clear();
    let mut by_row: BTreeMap<&str, Vec<&Report>> = BTreeMap::new();
    for (job, report) in all.iter().zip(&reports) {
        by_row.entry(&job.scenario).or_default().push(report);
    }
    let table = rows.iter().map(|(name, recovery)| {
        (Row::of(name, by_row.get(name.as_str()).map_or(&[][..], Vec::as_slice)), recovery)
    });
    let table: Vec<(Row, &Recovery)> = table.collect();
    if asked.json {
        for (row, _) in &table {
            println!("{}", serde_json::to_string(row).map_err(|e| e.to_string())?);
        }
    } else {
        print(&table, &by_row);
        println!("{} runs in {:.0} s, {} side by side", all.len(), wall_seconds() - begun, asked.jobs);
    }
    let worst = reports.iter().map(|report| report.class).max().unwrap_or_default();
    Ok(ExitCode::from(worst.exit_code()))
}

fn print(table: &[(Row, &Recovery)], by_row: &BTreeMap<&str, Vec<&Report>>) {
    println!(
        "{:20} {:>5} {:>21} {:>6} {:>6} {:>10} {:>8} {:>5} {:>6} {:>8} {:>9}",
        "", "", "recovery", "seed", "aim", "redundancy", "", "", "", "attempts", "cores"
    );
    println!(
        "{:20} {:>5} {:>6} {:>6} {:>7} {:>6} {:>6} {:>10} {:>8} {:>5} {:>6} {:>8} {:>9}",
        "row",
        "seeds",
        "p50 s",
        "p99 s",
        "max s",
        "s",
        "s",
        "p99 s",
        "acked",
        "lost",
        "failed",
        "p99 s",
        "busy"
    );
    for (row, recovery) in table {
        let reports = by_row.get(row.row.as_str()).map_or(&[][..], Vec::as_slice);
        let measured: Vec<&Measured> = reports.iter().filter_map(|r| r.recovery.as_ref()).collect();
        let mut attempts: Vec<f64> = measured.iter().map(|m| m.attempts_s).collect();
        let kept = row.region.as_ref().map_or(row.recovery_p99_s, |region| region.rto_p99_s);
        let missed = match (recovery.aim_s, kept) {
            (Some(aim), Some(p99)) if p99 > aim => "  misses its aim",
            _ => "",
        };
        println!(
            "{:20} {:>5} {:>6} {:>6} {:>7} {:>6} {:>6} {:>10} {:>8} {:>5} {:>6} {:>8} {:>9}{missed}",
            row.row,
            row.seeds,
            seconds(row.recovery_p50_s),
            seconds(row.recovery_p99_s),
            seconds(row.recovery_max_s),
            recovery.seed_s.map_or("-".into(), |s| format!("{s}")),
            recovery.aim_s.map_or("-".into(), |s| format!("{s}")),
            seconds(row.redundancy_p99_s),
            row.acked,
            row.lost,
            row.failed,
            seconds(percentile(&mut attempts, 0.99)),
            busy(&measured, 'n') + " " + &busy(&measured, 'g'),
        );
    }
    for (row, told) in table.iter().filter_map(|(row, _)| Some((row, row.told()?))) {
        println!("{}: {told}", row.row);
    }
    let all: Vec<&Measured> = by_row.values().flatten().filter_map(|r| r.recovery.as_ref()).collect();
    println!(
        "recovery: from the fault to the end of the last call that failed, was degraded, or took more than {LATE_TIMES} times the quiet p99 of \
         its kind and {LATE_MIN_MS} ms, as the clients saw it; attempts: to the last attempt without an answer, whatever became of its call; RTO: recovery without calls that began when the fault was undone"
    );
    println!(
        "seed: what the requirements state (0 lost in each); redundancy: until all replicas are up, follow one leader and publish the same, \
         lags of less than a second apart"
    );
    if let Some((_, recovery)) = table.first() {
        let mut bytes: Vec<u64> = all.iter().map(|m| m.bytes).collect();
        println!(
            "data: {:.1} MB a replica (median); loading: disks of {:.0} MB/s, links of 1250 MB/s; cores: {} times slower than the benches' machine, \
             so that this load keeps them busy (replicas, gateways)",
            percentile(&mut bytes, 0.5).unwrap_or(0) as f64 / 1e6,
            recovery.disk_bytes_per_s as f64 / 1e6,
            recovery.cpu_slowdown
        );
    }
    let kinds: std::collections::BTreeSet<&String> = all.iter().flat_map(|m| m.quiet_p99_ms.keys()).collect();
    let usual = kinds.into_iter().filter_map(|kind| {
        let mut of: Vec<f64> = all.iter().filter_map(|m| m.quiet_p99_ms.get(kind).copied()).collect();
        Some(format!("{kind} {:.0}", percentile(&mut of, 0.5)?))
    });
    println!("quiet p99 in ms (median of the runs): {}", usual.collect::<Vec<_>>().join(", "));
    for (row, _) in table {
        let reports = by_row.get(row.row.as_str()).map_or(&[][..], Vec::as_slice);
        let slowest = reports.iter().filter_map(|r| Some((r.recovery.as_ref()?, r.seed)));
        let slowest = slowest.max_by(|a, b| a.0.recovery_s.total_cmp(&b.0.recovery_s));
        if let Some((measured, seed)) = slowest.filter(|(m, _)| !m.last.is_empty()) {
            println!("slowest {} (seed {seed}): {}", row.row, measured.last);
        }
    }
    let bad: Vec<&&Report> = by_row.values().flatten().filter(|r| r.verdict != Verdict::Pass).collect();
    for report in bad.iter().take(FAILURES_SHOWN) {
        let job = Job::new(&report.scenario, report.seed, None);
        println!("  {}  # {:?}", job.command("replay"), report.class);
    }
    if bad.is_empty() {
        println!("every run kept its promises");
    } else {
        let worst = bad.iter().map(|r| r.class).max().unwrap_or(Class::Pass);
        println!("{} runs did not pass, the worst of class {worst:?}", bad.len());
    }
}

/// How busy the cores of the nodes were whose names begin so, in the mean.
fn busy(measured: &[&Measured], first: char) -> String {
    let of: Vec<f64> = measured
        .iter()
        .flat_map(|m| m.utilisation.iter().filter(|(name, _)| name.starts_with(first)).map(|(_, busy)| *busy))
        .collect();
    match of.len() {
        0 => "-".into(),
        count => format!("{:.0}%", of.iter().sum::<f64>() / count as f64 * 100.0),
    }
}
