//! How long the clients felt a fault, computed from their history alone.
//!
//! **Recovery** runs from the moment of the fault to the end of the last failed, degraded or late call on a range that the victim served; 0 if
//! there was none. Late is what took more than ten times the 99th percentile of its kind in the same run's quiet time, before the
//! fault, and more than a quarter of a second: on a machine whose calls take a millisecond, ten of them are a disk that was slow for a moment,
//! and nobody waits for less. A call is what a client wanted, with all its attempts: one that was refused at first and answered elsewhere in time did not
//! fail. The end of the last *attempt* that got no answer is told as well.
//!
//! **Restored** is the same, but of calls that began before the fault was undone: what comes back and catches up is a disturbance of its own, and a service that goes on
//! without what failed does not wait for it. Where a region is lost that is the RTO.

use crate::history::{Call, Outcome};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Late: more than so many times the quiet 99th percentile.
pub const LATE_TIMES: u64 = 10;
/// What took less is never late.
pub const LATE_MIN_MS: u64 = 250;
/// Calls in the quiet time, at least: with fewer nobody knows what is usual.
pub const QUIET_CALLS_MIN: usize = 500;
/// A kind with fewer calls than this in the quiet time is judged by those of all kinds.
const KIND_CALLS_MIN: usize = 20;

/// The times of a run, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub quiet_from_ns: u64,
    pub fault_ns: u64,
    /// When the fault was undone.
    pub undone_ns: u64,
}

/// What one run measured. Times in virtual seconds from the fault, where nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub recovery_s: f64,
    /// Of calls that began before the fault was undone.
    #[serde(default)]
    pub restored_s: f64,
    /// The end of the last attempt that got no answer.
    pub attempts_s: f64,
    /// The last one that counts, for a person; empty if there was none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last: String,
    /// Calls after the fault: all, and those that count.
    pub calls: usize,
    pub failed: usize,
    pub degraded: usize,
    pub late: usize,
    /// In the quiet time.
    pub quiet_calls: usize,
    pub quiet_p99_ms: BTreeMap<String, f64>,
    /// Until the fault was undone.
    pub undone_s: f64,
    /// From when on all replicas were up, published the same and agreed. `None`: never in this run.
    #[serde(default)]
    pub redundancy_s: Option<f64>,
    /// Where there are several regions, until the change of the primary was done, verified and announced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mttr_s: Option<f64>,
    /// From the first acknowledged write that was lost to the fault; 0 if none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_s: Option<f64>,
    /// What one replica has on its disk in the end.
    #[serde(default)]
    pub bytes: u64,
    /// The share of their time that the cores of the machines worked in the quiet time, by node.
    #[serde(default)]
    pub utilisation: BTreeMap<String, f64>,
}

/// The value below which `share` of the values are, by the nearest rank; `None` of none.
pub fn percentile<T: Copy + PartialOrd>(values: &mut [T], share: f64) -> Option<T> {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.clamp(1, values.len().max(1)) - 1).copied()
}

/// Measures. `served` says whether a call is on a range that the victim served.
pub fn measure(calls: &[Call], times: Times, served: impl Fn(&Call) -> bool) -> Measured {
    let took = |call: &Call| call.return_ns - call.call_ns;
    let quiet = |call: &&Call| call.call_ns >= times.quiet_from_ns && call.return_ns <= times.fault_ns;
    let mut by_kind: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for call in calls.iter().filter(quiet).filter(|call| call.outcome == Outcome::Answered) {
        by_kind.entry(call.kind).or_default().push(took(call));
    }
    let mut all: Vec<u64> = by_kind.values().flatten().copied().collect();
    let quiet_calls = all.len();
    let usual = percentile(&mut all, 0.99).unwrap_or(0);
    let quiet: BTreeMap<&str, u64> = by_kind
        .iter_mut()
        .filter(|(_, took)| took.len() >= KIND_CALLS_MIN)
        .filter_map(|(kind, took)| Some((*kind, percentile(took, 0.99)?)))
        .collect();
    let is_late = |call: &Call| {
        let late = LATE_TIMES * quiet.get(call.kind).copied().unwrap_or(usual);
        took(call) > late.max(LATE_MIN_MS * 1_000_000)
    };
    let since_s = |at_ns: u64| at_ns.saturating_sub(times.fault_ns) as f64 / 1e9;
    let mut measured = Measured {
        quiet_calls,
        quiet_p99_ms: quiet.iter().map(|(kind, ns)| (kind.to_string(), *ns as f64 / 1e6)).collect(),
        undone_s: since_s(times.undone_ns),
        ..Measured::default()
    };
    for call in calls.iter().filter(|call| call.return_ns > times.fault_ns && served(call)) {
        measured.calls += 1;
        let unanswered = call.attempts.iter().filter(|attempt| !attempt.answered);
        let last = unanswered.map(|attempt| attempt.return_ns).max().unwrap_or(0);
        measured.attempts_s = measured.attempts_s.max(since_s(last));
        let what = match call.outcome {
            Outcome::Failed => "failed",
            Outcome::Degraded => "degraded",
            Outcome::Answered if is_late(call) => "late",
            Outcome::Answered => continue,
        };
        match what {
            "failed" => measured.failed += 1,
            "degraded" => measured.degraded += 1,
            _ => measured.late += 1,
        }
        let end_s = since_s(call.return_ns);
        if call.call_ns < times.undone_ns {
            measured.restored_s = measured.restored_s.max(end_s);
        }
        if end_s >= measured.recovery_s {
            measured.recovery_s = end_s;
            let asked: Vec<&str> = call.attempts.iter().map(|attempt| attempt.node.as_str()).collect();
            measured.last = format!(
                "{} of client {} from {:.3} s, {what} after {:.3} s at {}",
                call.kind,
                call.client,
                call.call_ns as f64 / 1e9,
                took(call) as f64 / 1e9,
                asked.join(", ")
            );
        }
    }
    measured
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Attempt;

    const MS: u64 = 1_000_000;
    const TIMES: Times = Times { quiet_from_ns: 1000 * MS, fault_ns: 5000 * MS, undone_ns: 9000 * MS };

    fn call(kind: &'static str, at_ms: u64, took_ms: u64, outcome: Outcome) -> Call {
        let (call_ns, return_ns) = (at_ms * MS, (at_ms + took_ms) * MS);
        let answered = outcome != Outcome::Failed;
        let attempts = vec![Attempt { node: "g1".into(), call_ns, return_ns, answered }];
        Call { client: 0, tenant: 0, kind, key: Some(7), call_ns, return_ns, outcome, attempts }
    }

    /// Four quiet seconds: gets of 4 to 5 ms, and adds of 20 ms.
    fn quiet() -> Vec<Call> {
        let gets = (0..100).map(|i| call("get", 1000 + 30 * i, 4 + i % 2, Outcome::Answered));
        gets.chain((0..100).map(|i| call("add", 1000 + 30 * i, 20, Outcome::Answered))).collect()
    }

    fn with(more: &[Call]) -> Measured {
        let mut calls = quiet();
        calls.extend_from_slice(more);
        measure(&calls, TIMES, |_| true)
    }

    #[test]
    fn a_fault_that_nobody_felt_took_no_recovery() {
        let measured =
            with(&[call("get", 6000, 50, Outcome::Answered), call("add", 6000, 200, Outcome::Answered)]);
        assert_eq!((measured.recovery_s, measured.late, measured.calls), (0.0, 0, 2));
        assert_eq!((measured.quiet_p99_ms["get"], measured.quiet_p99_ms["add"]), (5.0, 20.0));
        assert_eq!((measured.quiet_calls, measured.undone_s), (200, 4.0));
    }

    #[test]
    fn recovery_ends_with_the_last_call_that_failed_was_degraded_or_late() {
        let failed = call("add", 5500, 2000, Outcome::Failed);
        let degraded = call("get", 8000, 4, Outcome::Degraded);
        let late = call("get", 8100, 251, Outcome::Answered);
        assert_eq!(with(std::slice::from_ref(&failed)).recovery_s, 2.5);
        assert_eq!(with(&[failed.clone(), degraded.clone()]).recovery_s, 3.004);
        let all = with(&[late, failed, degraded]);
        assert_eq!((all.recovery_s, all.failed, all.degraded, all.late), (3.351, 1, 1, 1));
        assert!(
            all.last.starts_with("get of client 0 from 8.100 s, late after 0.251 s at g1"),
            "{}",
            all.last
        );
    }

    #[test]
    fn what_was_felt_only_when_the_fault_was_undone_came_after_the_service_was_restored() {
        let measured = with(&[
            call("add", 5500, 2000, Outcome::Failed),
            call("get", 8900, 300, Outcome::Answered),
            call("get", 9100, 300, Outcome::Answered),
        ]);
        assert_eq!((measured.restored_s, measured.recovery_s, measured.late), (4.2, 4.4, 2));
    }

    #[test]
    fn late_is_measured_by_the_calls_own_kind_and_rare_kinds_by_all() {
        // 300 ms are late for a get and not for a slower add; a walk was never seen before.
        let slow = (0..100).map(|i| call("add", 1000 + 30 * i, 40, Outcome::Answered));
        let with = |kind, took_ms| {
            let calls = quiet().into_iter().filter(|call| call.kind == "get").chain(slow.clone());
            let calls: Vec<Call> = calls.chain([call(kind, 6000, took_ms, Outcome::Answered)]).collect();
            measure(&calls, TIMES, |_| true).late
        };
        assert_eq!((with("get", 300), with("add", 300)), (1, 0));
        assert_eq!((with("walk", 400), with("walk", 401)), (0, 1));
    }

    #[test]
    fn nothing_is_late_before_a_quarter_of_a_second() {
        assert_eq!(with(&[call("get", 6000, LATE_MIN_MS, Outcome::Answered)]).late, 0);
        assert_eq!(with(&[call("get", 6000, LATE_MIN_MS + 1, Outcome::Answered)]).late, 1);
    }

    #[test]
    fn what_began_before_the_fault_and_ended_after_it_counts_and_what_ended_before_does_not() {
        assert_eq!(with(&[call("get", 4900, 2000, Outcome::Failed)]).recovery_s, 1.9);
        assert_eq!(with(&[call("get", 2000, 2000, Outcome::Failed)]).recovery_s, 0.0);
        // Nor do many of them say what is usual.
        let failed = [(); 5].map(|()| call("get", 2000, 2000, Outcome::Failed));
        assert_eq!(with(&failed).quiet_p99_ms["get"], 5.0);
    }

    #[test]
    fn an_attempt_without_an_answer_is_told_though_the_call_got_one_in_time() {
        let mut call = call("get", 6000, 40, Outcome::Answered);
        let (call_ns, return_ns) = (6000 * MS, 6010 * MS);
        call.attempts.insert(0, Attempt { node: "g2".into(), call_ns, return_ns, answered: false });
        let measured = with(&[call]);
        assert_eq!((measured.recovery_s, measured.attempts_s), (0.0, 1.01));
    }

    #[test]
    fn other_ranges_do_not_count() {
        let mut calls = quiet();
        calls.push(call("get", 6000, 2000, Outcome::Failed));
        assert_eq!(measure(&calls, TIMES, |call| call.key != Some(7)).recovery_s, 0.0);
        assert_eq!(measure(&calls, TIMES, |call| call.key == Some(7)).recovery_s, 3.0);
    }

    #[test]
    fn percentiles_are_by_the_nearest_rank() {
        let mut values: Vec<u64> = (1..=200).rev().collect();
        assert_eq!(percentile(&mut values, 0.99), Some(198));
        assert_eq!(percentile(&mut values, 0.5), Some(100));
        assert_eq!(percentile(&mut [3.0], 0.99), Some(3.0));
        assert_eq!(percentile::<u64>(&mut [], 0.5), None);
    }
}
