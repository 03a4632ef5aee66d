//! P6: a deleted memory never comes back; no answer holds a dangling edge.
//!
//! Read so: both ends of every edge that a walk shows are among the memories that it shows; and no memory that it, or a strong search, shows
//! is older than a write of it, a deletion included, that was acknowledged before it was asked for; and every edge that it shows was set by
//! somebody who was not answered before one of its ends began to be deleted, for a deletion takes a memory's edges with it. (Reads of single
//! memories are P4's.)
//!
//! An erased one never comes back, read so: once an erasure was acknowledged, no strong read, nor one at the token of whoever asked for it, shows a version
//! that was acknowledged before it was asked for; in the end no replica has one, in its history neither. (One that was acknowledged without the other region may be
//! lost with its own, and is made again: of that only the end is judged.)

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Id, Op, Request, Response, Row, is_a_persons, number};
use std::collections::{BTreeMap, BTreeSet};

/// What a read showed, if it may not be behind what was acknowledged to `client`.
fn shown(op: &Op, client: usize) -> &[Row] {
    match (&op.request, &op.response) {
        (Request::Get { token, .. }, Response::Value { row, .. })
            if token.is_none() || op.client == client =>
        {
            std::slice::from_ref(row)
        }
        (Request::Search { by_vector: true } | Request::List, Response::Rows(rows)) => rows,
        (_, Response::Walked { rows, .. }) => rows,
        _ => &[],
    }
}

fn erased(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    // When what each marker stands for was acknowledged.
    let mut written: BTreeMap<(usize, &str), u64> = BTreeMap::new();
    for op in &history.ops {
        if let (Request::Add { id, marker } | Request::Update { id, marker, .. }, Response::Written { .. }) =
            (&op.request, &op.response)
            && is_a_persons(id)
        {
            written.insert((op.tenant, marker), op.return_ns);
        }
    }
    for erasure in history.ops.iter().filter(|op| op.request == Request::Erase) {
        let Response::Erased { elsewhere } = erasure.response else { continue };
        let is_older = |marker: &str| {
            written.get(&(erasure.tenant, marker)).is_some_and(|acked| *acked < erasure.call_ns)
        };
        let stands = elsewhere || history.ends.is_empty();
        let later =
            history.ops.iter().filter(|op| op.tenant == erasure.tenant && op.call_ns > erasure.return_ns);
        for op in later.filter(|_| stands) {
            if let Some(row) = shown(op, erasure.client).iter().find(|row| is_older(&row.marker)) {
                let what = format!(
                    "memory {} was shown as {row}, which was erased: {}; {}",
                    number(&row.id),
                    describe(erasure),
                    describe(op)
                );
                found.push(violation("P6", op.return_ns, what));
            }
        }
        for replica in &history.finals {
            let of_tenant =
                |((tenant, _), _): &(&(usize, Id), &Vec<(u64, String)>)| *tenant == erasure.tenant;
            let rows = replica.rows.iter().filter(|((tenant, _), _)| *tenant == erasure.tenant);
            let rows = rows.map(|((_, id), row)| (id, &row.marker));
            let versions = replica.versions.iter().filter(of_tenant);
            let versions =
                versions.flat_map(|((_, id), all)| all.iter().map(move |(_, marker)| (id, marker)));
            if let Some((id, marker)) = rows.chain(versions).find(|(_, marker)| is_older(marker)) {
                let (id, node) = (number(id), &replica.node);
                let what = format!("{node} has {marker} of memory {id} in the end: {}", describe(erasure));
                found.push(violation("P6", replica.at_ns, what));
            }
        }
    }
    found
}

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = erased(history);
    let mut writes: BTreeMap<(usize, &Id), Vec<(u64, u64)>> = BTreeMap::new();
    // When each memory's deletions began and were acknowledged, and when each edge was certainly not set any more.
    let mut deletions: BTreeMap<(usize, &Id), Vec<(u64, u64)>> = BTreeMap::new();
    let mut links: BTreeMap<(usize, &Id, &Id), Vec<u64>> = BTreeMap::new();
    for op in &history.ops {
        if let (
            Request::Add { id, .. } | Request::Update { id, .. } | Request::Delete { id, .. },
            Response::Written { version, .. },
        ) = (&op.request, &op.response)
        {
            writes.entry((op.tenant, id)).or_default().push((op.return_ns, *version));
        }
        match (&op.request, &op.response) {
            (Request::Delete { id, .. }, Response::Written { .. }) => {
                deletions.entry((op.tenant, id)).or_default().push((op.call_ns, op.return_ns));
            }
            (Request::Link { from, to }, response) => {
                let done_ns = if *response == Response::Linked { op.return_ns } else { u64::MAX };
                links.entry((op.tenant, from, to)).or_default().push(done_ns);
            }
            _ => {}
        }
    }
    for op in &history.ops {
        let (rows, edges): (_, &[(Id, Id)]) = match (&op.request, &op.response) {
            (_, Response::Walked { rows, edges }) => (rows, edges),
            (Request::Search { by_vector: true }, Response::Rows(rows)) => (rows, &[]),
            _ => continue,
        };
        let shown: BTreeSet<&Id> = rows.iter().map(|row| &row.id).collect();
        if let Some(edge) = edges.iter().find(|(from, to)| !shown.contains(from) || !shown.contains(to)) {
            let what = {
                let (from, to) = (number(&edge.0), number(&edge.1));
                format!("an edge to nowhere was shown, from {from} to {to}: {}", describe(op))
            };
            found.push(violation("P6", op.return_ns, what));
        }
        for (from, to) in edges {
            let set = links.get(&(op.tenant, from, to)).into_iter().flatten();
            let gone = [from, to].into_iter().filter_map(|end| deletions.get(&(op.tenant, end))).flatten();
            let gone: Vec<_> = gone.filter(|(_, acked)| *acked < op.call_ns).collect();
            if set.into_iter().all(|done| gone.iter().any(|(began, _)| done < began)) {
                let what = {
                    let (from, to) = (number(from), number(to));
                    format!(
                        "the edge from {from} to {to} went with its memory, and was shown: {}",
                        describe(op)
                    )
                };
                found.push(violation("P6", op.return_ns, what));
            }
        }
        for row in rows {
            let later = writes.get(&(op.tenant, &row.id)).into_iter().flatten();
            let newest = later.filter(|(at, _)| *at < op.call_ns).map(|(_, version)| *version).max();
            if newest.is_some_and(|newest| newest > row.version) {
                let what = format!(
                    "memory {} was shown as {row}, after a later version was acknowledged: {}",
                    number(&row.id),
                    describe(op)
                );
                found.push(violation("P6", op.return_ns, what));
            }
        }
    }
    found
}
