//! P6: a deleted memory never comes back; no answer holds a dangling edge.
//!
//! Read so: both ends of every edge that a walk shows are among the memories that it shows; and none of these is older than a write of it,
//! a deletion included, that was acknowledged before the walk was asked for. (Reads of single memories are P4's.)

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Id, Request, Response};
use std::collections::{BTreeMap, BTreeSet};

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    let mut writes: BTreeMap<(usize, &Id), Vec<(u64, u64)>> = BTreeMap::new();
    for op in &history.ops {
        if let (
            Request::Add { id, .. } | Request::Update { id, .. } | Request::Delete { id, .. },
            Response::Written { version, .. },
        ) = (&op.request, &op.response)
        {
            writes.entry((op.tenant, id)).or_default().push((op.return_ns, *version));
        }
    }
    for op in &history.ops {
        let Response::Walked { rows, edges } = &op.response else { continue };
        let shown: BTreeSet<&Id> = rows.iter().map(|row| &row.id).collect();
        if let Some(edge) = edges.iter().find(|(from, to)| !shown.contains(from) || !shown.contains(to)) {
            let what = format!("an edge to nowhere was shown, {edge:?}: {}", describe(op));
            found.push(violation("P6", op.return_ns, what));
        }
        for row in rows {
            let later = writes.get(&(op.tenant, &row.id)).into_iter().flatten();
            let newest = later.filter(|(at, _)| *at < op.call_ns).map(|(_, version)| *version).max();
            if newest.is_some_and(|newest| newest > row.version) {
                let what =
                    format!("{row:?} was shown after version {newest:?} was acknowledged: {}", describe(op));
                found.push(violation("P6", op.return_ns, what));
            }
        }
    }
    found
}
