//! P4: a read at a token sees that write; a session never goes back in time; histories per key are linearizable.
//!
//! Read so: each client is a session. Its reads at a token show at least the token's position, and never an older version of a memory
//! than it saw or wrote before. Writes and strong reads of each memory, with what every replica holds in the end as
//! last reads, are linearizable.
//!
//! Where a region was lost: a read at a token that may be lost says so, and the session begins anew; a session may also go back when what it saw is not there in the end
//! (P2 judges whether that was reported), or was written again by an operator. Of a memory that lost something, or may have, since a write was under way when an epoch ended, only what the first
//! epoch answered must be linearizable. A refusal names no epoch: where it may be of either, and a write was under way, it may tell of what was lost and written again.

use super::linearizable::{Verdict, check as linearize, describe};
use super::{Violation, violation};
use crate::history::{History, LAST_LOOK, Op, Request, Response, number};
use std::collections::{BTreeMap, BTreeSet};

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = sessions(history);
    let next_epochs = next_epochs(history);
    for ((tenant, id), ops) in history.by_key() {
        let strong = |op: &&Op| match (&op.request, &op.response) {
            (Request::Get { token, .. }, response) => token.is_none() && *response != Response::Unknown,
            (_, Response::Changed { .. } | Response::Lost) => false,
            _ => true,
        };
        let mut ops: Vec<&Op> = ops.into_iter().filter(strong).collect();
        let next = next_epochs.first().filter(|_| may_have_lost(history, &ops, &next_epochs));
        let before = next.map(|turn| turn.first_ns);
        let mut open: Vec<Op> = vec![];
        if let Some(before) = before {
            let (ended, later): (Vec<&Op>, Vec<&Op>) = ops.into_iter().partition(|op| op.return_ns < before);
            ops = ended;
            // A write that ended later may have come before, or be lost.
            let began = later.into_iter().filter(|op| op.request.is_write() && op.call_ns < before);
            open.extend(began.map(|op| Op { response: Response::Unknown, ..op.clone() }));
        }
        let all = ops.clone();
        ops.retain(|op| !next_epochs.iter().any(|turn| turn.may_be_of_either(op, &all)));
        ops.extend(&open);
        let last_ns = ops.iter().map(|op| op.return_ns).max().unwrap_or(0);
        let finals = history.finals.iter().filter(|_| before.is_none());
        let end: Vec<Op> = finals.map(|replica| last_read(replica, tenant, id, history)).collect();
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

/// When an epoch gave way to the next one, as far as answers tell.
struct Turn {
    /// All answers that came before are of those before: none of them names this one or a later one, and each came no later than the last that names one before,
    /// since refusals name none.
    first_ns: u64,
    /// All operations that began then or later are of this one or a later one, which had answered.
    last_ns: u64,
}

impl Turn {
    /// Whether both epochs may have refused it, of which one had applied a write to the same memory that the other had not.
    fn may_be_of_either(&self, op: &Op, all: &[&Op]) -> bool {
        let between = |op: &Op| op.call_ns < self.last_ns && op.return_ns >= self.first_ns;
        let refused = |op: &Op| matches!(op.response, Response::Refused(_));
        refused(op)
            && between(op)
            && all.iter().any(|op| op.request.is_write() && !refused(op) && between(op))
    }
}

/// When each epoch but the first began. Empty: there is one epoch.
fn next_epochs(history: &History) -> Vec<Turn> {
    let epoch = |op: &Op| match (&op.request, &op.response) {
        (_, Response::Written { at, .. }) => Some(at.epoch),
        (Request::Get { token: None, .. }, Response::Value { epoch, .. }) => Some(*epoch),
        _ => None,
    };
    // A write that is tried again gets its answer of an epoch from the next one too: for certain that one lasted until the write was asked for.
    let until = |op: &Op| if op.request.is_write() { op.call_ns } else { op.return_ns };
    let named = || history.ops.iter().filter_map(|op| Some((epoch(op)?, op)));
    let begins = |next: u64| {
        let before = named().filter(|(epoch, _)| *epoch < next).map(|(_, op)| until(op));
        let after = named().filter(|(epoch, _)| *epoch >= next).map(|(_, op)| op.return_ns);
        let last_ns = after.min().unwrap_or(u64::MAX);
        Turn { first_ns: last_ns.min(before.max().unwrap_or(0) + 1), last_ns }
    };
    if history.ends.is_empty() {
        return vec![];
    }
    let later: BTreeSet<u64> = named().map(|(epoch, _)| epoch).filter(|epoch| *epoch > 1).collect();
    later.into_iter().map(begins).collect()
}

/// Whether a memory may lack in the end what was seen of it before.
fn may_have_lost(history: &History, ops: &[&Op], next_epochs: &[Turn]) -> bool {
    // Was a write under way when an epoch ended, it may have been seen, be lost, and have been written again by the same key.
    let open = |op: &Op| {
        let over = |turn: &Turn| {
            let answered = op.response != Response::Unknown && op.return_ns < turn.first_ns;
            op.call_ns < turn.first_ns && !answered
        };
        op.request.is_write() && next_epochs.iter().any(over)
    };
    ops.iter().any(|op| open(op) || is_gone(history, op))
}

/// Whether no replica has in the end what an answer showed or said to be written, or has it only since it was written again. Where the replicas never
/// came to agree (P12) nobody knows what is there in the end.
fn is_gone(history: &History, op: &Op) -> bool {
    let unknown = !history.ends.is_empty() && history.finals.is_empty();
    if unknown || history.is_again(op) {
        return true;
    }
    let (version, marker) = match (&op.response, &op.request) {
        (Response::Value { row, .. }, _) => (row.version, Some(&row.marker)),
        (Response::Written { version, .. }, Request::Add { marker, .. } | Request::Update { marker, .. }) => {
            (*version, Some(marker))
        }
        // Another deletion may have made that version since.
        (Response::Written { at, .. }, _) if history.may_be_lost(at) => return true,
        (Response::Written { version, .. }, _) => (*version, None),
        // It is made again, at another time.
        (Response::Erased { elsewhere }, _) => return !elsewhere && !history.ends.is_empty(),
        _ => return false,
    };
    let Some(id) = op.request.id() else { return false };
    let same = |(held, made): &(u64, String)| {
        *held == version && marker.map_or(made.starts_with("deletion"), |marker| marker == made)
    };
    let has = |replica: &crate::history::Final| {
        replica.versions.get(&(op.tenant, id.clone())).is_some_and(|versions| versions.iter().any(same))
    };
    !history.ends.is_empty() && !history.finals.iter().any(has)
}

/// What a replica holds in the end, as a read after everything else.
fn last_read(replica: &crate::history::Final, tenant: usize, id: &str, history: &History) -> Op {
    let (shown, epoch) = (0, 0);
    let end_ns = history.ops.iter().map(|op| op.return_ns).max().unwrap_or(0).max(replica.at_ns) + 1;
    let response = match replica.rows.get(&(tenant, id.to_string())) {
        Some(row) => Response::Value { row: row.clone(), shown, epoch },
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
    // The last version, and whether it is gone with a region.
    let mut seen: BTreeMap<(usize, &str), (u64, bool)> = BTreeMap::new();
    for op in &history.ops {
        if op.response == Response::Lost {
            seen.retain(|(client, _), _| *client != op.client);
        }
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
        let (before, gone) = seen.entry((op.client, id)).or_insert((0, false));
        if version < *before && !*gone {
            let what = format!("session went back from version {before}: {}", describe(op));
            found.push(violation("P4", op.return_ns, what));
        }
        if version >= *before || *gone {
            (*before, *gone) = (version, is_gone(history, op));
        }
    }
    found
}
