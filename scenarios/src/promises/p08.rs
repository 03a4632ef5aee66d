//! P8: a search never finds fewer than k while k exist; neither it nor a listing shows anything twice.
//!
//! Read so: a strong search by a vector shows as many memories as its tenant certainly had all the while, up to k. One is certainly there from the
//! answer to an add or update of it until somebody asks for its deletion, unless that is refused, or for the erasure of whose it is.

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Op, Request, Response, SEARCH_K, is_a_persons, number};
use std::collections::{BTreeMap, BTreeSet};

/// What happened to one memory, in nanoseconds.
#[derive(Default)]
struct Life {
    /// Writes after which it was there: called, answered.
    put: Vec<(u64, u64)>,
    /// Deletions that may have taken place: called, and when they had, if they did.
    deleted: Vec<(u64, u64)>,
}

impl Life {
    fn is_there(&self, from_ns: u64, to_ns: u64) -> bool {
        let deleted_after =
            |call_ns: u64| self.deleted.iter().any(|(called, done)| *called < to_ns && *done > call_ns);
        self.put.iter().any(|(call_ns, return_ns)| *return_ns <= from_ns && !deleted_after(*call_ns))
    }
}

pub fn check(history: &History) -> Vec<Violation> {
    let mut lives: BTreeMap<usize, BTreeMap<&str, Life>> = BTreeMap::new();
    for op in &history.ops {
        let (Request::Add { id, .. } | Request::Update { id, .. } | Request::Delete { id, .. }) = &op.request
        else {
            continue;
        };
        let life = lives.entry(op.tenant).or_default().entry(id).or_default();
        match (&op.request, &op.response) {
            (_, Response::Refused(_)) => {}
            (Request::Delete { .. }, Response::Written { .. }) => {
                life.deleted.push((op.call_ns, op.return_ns))
            }
            (Request::Delete { .. }, _) => life.deleted.push((op.call_ns, u64::MAX)),
            (_, Response::Written { .. }) => life.put.push((op.call_ns, op.return_ns)),
            _ => {}
        }
    }
    for (tenant, lives) in &mut lives {
        let persons = lives.iter_mut().filter(|(id, _)| is_a_persons(id));
        for (_, life) in persons {
            let done = |op: &Op| match op.response {
                Response::Erased { .. } => op.return_ns,
                _ => u64::MAX,
            };
            life.deleted.extend(history.erasures(*tenant).map(|op| (op.call_ns, done(op))));
        }
    }
    let mut found = vec![];
    for op in &history.ops {
        let (by_vector, rows) = match (&op.request, &op.response) {
            (Request::Search { by_vector }, Response::Rows(rows)) => (*by_vector, rows),
            (Request::List, Response::Rows(rows)) => (false, rows),
            _ => continue,
        };
        let mut shown = BTreeSet::new();
        if let Some(twice) = rows.iter().find(|row| !shown.insert(&row.id)) {
            let what = format!("memory {} was shown twice: {}", number(&twice.id), describe(op));
            found.push(violation("P8", op.return_ns, what));
        }
        let of = lives.get(&op.tenant).into_iter().flat_map(BTreeMap::values);
        let there = of.filter(|life| life.is_there(op.call_ns, op.return_ns)).count();
        if by_vector && rows.len() < there.min(SEARCH_K) {
            let what = format!("{} were found while {there} were there: {}", rows.len(), describe(op));
            found.push(violation("P8", op.return_ns, what));
        }
    }
    found
}
