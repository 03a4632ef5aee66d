//! Whether the operations on one memory could have happened one at a time.
//!
//! The algorithm of Wing and Gong (1993) with Lowe's memory of what was tried (2017): take any operation that was called before the
//! earliest answer still open, apply it to the model, go on; come back when stuck. A set of taken operations with the state it
//! led to is never tried twice. A write whose outcome is unknown has no answer: it may be taken at any time, or never.

use crate::history::{LAST_LOOK, Op, Refusal, Request, Response};
use std::collections::HashSet;
use std::fmt;

/// Steps after which a history is given up as undecided.
const STEPS_MAX: usize = 2_000_000;

/// One memory: its version and marker, or none and the version of its deletion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    version: u64,
    marker: Option<String>,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.marker {
            Some(marker) => write!(f, "at version {} ({marker})", self.version),
            None => write!(f, "not there, after version {}", self.version),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Linearizable,
    /// The deepest state reached, the operations that no order could continue with, and when the first of them was answered.
    Impossible {
        why: String,
        at_ns: u64,
    },
    Undecided,
}

/// The state after `op`, or `None` if its answer does not fit.
fn step(state: &State, op: &Op) -> Option<State> {
    let exists = state.marker.is_some();
    let expected_ok = |expected: &Option<u64>| expected.is_none_or(|e| e == state.version);
    let next = |marker: Option<&String>| State { version: state.version + 1, marker: marker.cloned() };
    match (&op.request, &op.response) {
        (Request::Update { .. } | Request::Delete { .. }, Response::Refused(Refusal::NotFound)) => {
            (!exists).then(|| state.clone())
        }
        (Request::Add { .. }, Response::Refused(Refusal::AlreadyExists { version })) => {
            (exists && *version == state.version).then(|| state.clone())
        }
        (
            Request::Update { expected, .. } | Request::Delete { expected, .. },
            Response::Refused(Refusal::VersionMismatch { actual }),
        ) => (exists && *actual == state.version && !expected_ok(expected)).then(|| state.clone()),
        (Request::Get { .. }, Response::Value { row, .. }) => (state.marker.as_ref() == Some(&row.marker)
            && row.version == state.version)
            .then(|| state.clone()),
        (Request::Get { .. }, Response::Absent { .. }) => (!exists).then(|| state.clone()),
        (Request::Add { marker, .. }, Response::Written { version, .. }) => {
            (!exists && *version == state.version + 1).then(|| next(Some(marker)))
        }
        (Request::Update { expected, marker, .. }, Response::Written { version, .. }) => {
            (exists && expected_ok(expected) && *version == state.version + 1).then(|| next(Some(marker)))
        }
        (Request::Delete { expected, .. }, Response::Written { version, .. }) => {
            (exists && expected_ok(expected) && *version == state.version + 1).then(|| next(None))
        }
        (Request::Erase, Response::Erased { .. } | Response::Unknown) => {
            Some(if exists { next(None) } else { state.clone() })
        }
        (Request::Add { marker, .. }, Response::Unknown) => {
            Some(if exists { state.clone() } else { next(Some(marker)) })
        }
        (Request::Update { expected, marker, .. }, Response::Unknown) => {
            Some(if exists && expected_ok(expected) { next(Some(marker)) } else { state.clone() })
        }
        (Request::Delete { expected, .. }, Response::Unknown) => {
            Some(if exists && expected_ok(expected) { next(None) } else { state.clone() })
        }
        _ => None,
    }
}

fn answer_ns(op: &Op) -> u64 {
    if op.response == Response::Unknown { u64::MAX } else { op.return_ns }
}

/// Decides one memory's history. `ops` may come in any order.
pub fn check(ops: &[&Op]) -> Verdict {
    let mut ops: Vec<&Op> = ops.to_vec();
    ops.sort_by_key(|op| (op.call_ns, answer_ns(op)));
    let known = ops.iter().filter(|op| op.response != Response::Unknown).count();
    let words = ops.len().div_ceil(64);
    let mut tried: HashSet<(Vec<u64>, State)> = HashSet::new();
    // Each level: what is taken, the state, how many known ones are taken, and where to look next.
    let mut stack = vec![(vec![0u64; words], State::default(), 0usize, 0usize)];
    let (mut deepest, mut steps) = ((0, State::default(), vec![0u64; words]), 0);
    let has = |taken: &[u64], i: usize| taken[i / 64] >> (i % 64) & 1 == 1;
    while let Some((taken, state, done, from)) = stack.last_mut() {
        if *done == known {
            return Verdict::Linearizable;
        }
        steps += 1;
        if steps > STEPS_MAX {
            return Verdict::Undecided;
        }
        if *done > deepest.0 {
            deepest = (*done, state.clone(), taken.clone());
        }
        // Nothing that was called after an open answer can come before it.
        let open =
            (0..ops.len()).filter(|&i| !has(taken, i)).map(|i| answer_ns(ops[i])).min().unwrap_or(u64::MAX);
        let next = (*from..ops.len())
            .take_while(|&i| ops[i].call_ns <= open)
            .find_map(|i| if has(taken, i) { None } else { step(state, ops[i]).map(|s| (i, s)) });
        match next {
            Some((i, state)) => {
                *from = i + 1;
                let (mut taken, done) = (taken.clone(), *done);
                taken[i / 64] |= 1 << (i % 64);
                if tried.insert((taken.clone(), state.clone())) {
                    let done = done + (ops[i].response != Response::Unknown) as usize;
                    stack.push((taken, state, done, 0));
                }
            }
            None => {
                stack.pop();
            }
        }
    }
    let (done, state, taken) = deepest;
    let stuck = (0..ops.len()).filter(|&i| !has(&taken, i) && ops[i].response != Response::Unknown);
    let stuck: Vec<&Op> = stuck.take(3).map(|i| ops[i]).collect();
    let named: Vec<String> = stuck.iter().map(|op| describe(op)).collect();
    Verdict::Impossible {
        why: format!("after {done} operations it is {state}, and none of these fits: {}", named.join("; ")),
        at_ns: stuck.first().map_or(0, |op| op.return_ns),
    }
}

/// An operation as a person reads it.
pub fn describe(op: &Op) -> String {
    let (from, to) = (op.call_ns as f64 / 1e9, op.return_ns as f64 / 1e9);
    let (tenant, node) = (op.tenant, &op.node);
    let client = match op.client {
        LAST_LOOK => "the last look".to_string(),
        client => format!("client {client}"),
    };
    format!("{client} (tenant {tenant}) at {node} {from:.3}–{to:.3} s: {} -> {}", op.request, op.response)
}
