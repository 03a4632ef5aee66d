//! P4: a read at a token sees that write; a session never goes back in time; histories per key are linearizable.
//!
//! Read so: each client is a session. Its reads at a token show at least the token's position, and never an older version of a memory
//! than it saw or wrote before. Writes and strong reads of each memory, with what every replica holds in the end as
//! last reads, are linearizable.

use super::linearizable::{Verdict, check as linearize, describe};
use super::{Violation, violation};
use crate::history::{History, LAST_LOOK, Op, Request, Response, number};
use std::collections::BTreeMap;

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = sessions(history);
    for ((tenant, id), ops) in history.by_key() {
        let strong = |op: &&Op| match (&op.request, &op.response) {
            (Request::Get { token, .. }, response) => token.is_none() && *response != Response::Unknown,
            (_, Response::Changed { .. }) => false,
            _ => true,
        };
        let ops: Vec<&Op> = ops.into_iter().filter(strong).collect();
        let last_ns = ops.iter().map(|op| op.return_ns).max().unwrap_or(0);
        let end: Vec<Op> =
            history.finals.iter().map(|replica| last_read(replica, tenant, id, history)).collect();
        let all: Vec<&Op> = ops.iter().copied().chain(&end).collect();
        match linearize(&all) {
            Verdict::Linearizable => {}
            Verdict::Impossible { why, at_ns } => {
                found.push(violation(
                    "P4",
                    at_ns,
                    format!("memory {} of tenant {tenant} is not linearizable: {why}", number(id)),
                ));
            }
            Verdict::Undecided => {
                found.push(violation(
                    "P4",
                    last_ns,
                    format!("{id}: {} operations are too many to decide", all.len()),
                ));
            }
        }
    }
    found
}

/// What a replica holds in the end, as a read after everything else.
fn last_read(replica: &crate::history::Final, tenant: usize, id: &str, history: &History) -> Op {
    let shown = 0;
    let end_ns = history.ops.iter().map(|op| op.return_ns).max().unwrap_or(0).max(replica.at_ns) + 1;
    let response = match replica.rows.get(&(tenant, id.to_string())) {
        Some(row) => Response::Value { row: row.clone(), shown },
        None => Response::Absent { shown },
    };
    Op {
        client: LAST_LOOK,
        tenant,
        node: replica.node.clone(),
        call_ns: end_ns,
        return_ns: end_ns + 1,
        request: Request::Get { id: id.to_string(), token: None },
        response,
    }
}

fn sessions(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    let mut seen: BTreeMap<(usize, &str), u64> = BTreeMap::new();
    for op in &history.ops {
        if let (
            Request::Get { token: Some(token), .. },
            Response::Value { shown, .. } | Response::Absent { shown },
        ) = (&op.request, &op.response)
            && shown < token
        {
            let what = format!("asked for at least {token}, was shown {shown}: {}", describe(op));
            found.push(violation("P4", op.return_ns, what));
        }
        let version = match &op.response {
            Response::Written { version, .. } => *version,
            Response::Value { row, .. } => row.version,
            _ => continue,
        };
        let Some(id) = op.request.id() else { continue };
        let before = seen.entry((op.client, id)).or_insert(0);
        if version < *before {
            let what = format!("session went back from version {before}: {}", describe(op));
            found.push(violation("P4", op.return_ns, what));
        }
        *before = (*before).max(version);
    }
    found
}
