//! P2: region failover: the real loss lies within the interim report; the final report is the real loss; nothing acknowledged at REGION is lost.
//!
//! Read so: an acknowledged write of an epoch that is over and whose effect some replica lacks in the end lies where the cluster map says that something
//! may be lost, and its answer did not say that the other region has it. Once a majority of the old disks was read, the map names the entries that are lost: an acknowledged
//! write of that epoch is missing if and only if it is among them. (But for deletions: which one made a version nobody can tell.) What an operator had written again is not missing, unless
//! something of its memory was a conflict.

use super::p01::{Missing, missing};
use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Op, Request};
use std::collections::BTreeSet;

/// Acknowledged writes that are lost as the cluster says.
pub fn reported(history: &History) -> Vec<Missing<'_>> {
    missing(history).into_iter().filter(|missing| missing.is_reported(history)).collect()
}

/// Operations of which nobody can say that they stand, or stood all the time: those; and of what may be lost deletions, what was written again, and what was erased since,
/// of which nothing is left that could say which of both it was.
pub fn doubtful(history: &History) -> Vec<usize> {
    let unsure = |(_, op): &(usize, &Op)| {
        let may_be_lost = op.response.at().is_some_and(|at| history.may_be_lost(&at));
        may_be_lost && leaves_no_trace(history, op)
    };
    let unsure = history.ops.iter().enumerate().filter(unsure).map(|(number, _)| number);
    let all: BTreeSet<usize> =
        reported(history).into_iter().map(|missing| missing.number).chain(unsure).collect();
    all.into_iter().collect()
}

/// Whether the end does not show what became of a write; where the replicas never came to agree (P12) there is no end to look at.
fn leaves_no_trace(history: &History, op: &Op) -> bool {
    history.finals.is_empty()
        || matches!(op.request, Request::Delete { .. })
        || history.is_again(op)
        || history.may_be_erased(op)
}

pub fn check(history: &History) -> Vec<Violation> {
    if history.ends.is_empty() || history.finals.is_empty() {
        return vec![];
    }
    let mut found = vec![];
    let missing = missing(history);
    let gone: BTreeSet<usize> = missing.iter().map(|missing| missing.number).collect();
    for Missing { op, at, elsewhere, what, .. } in &missing {
        let Some(end) = history.ends_from(at).next() else { continue };
        let known: Option<Vec<bool>> = history.ends_from(at).map(|end| end.loses(at.index)).collect();
        let problem = match known {
            _ if *elsewhere => "acknowledged as durable in the other region, and lost".to_string(),
            _ if !history.may_be_lost(at) => {
                format!("lost, though only entries {} to {} may be", end.certain + 1, end.ceiling)
            }
            Some(lost) if !lost.contains(&true) => {
                format!(
                    "lost, though the old disks do not say so ({:?})",
                    history.ends_from(at).collect::<Vec<_>>()
                )
            }
            Some(_) if history.is_wholly_again(op) => "said to be written again, and lost".to_string(),
            _ => continue,
        };
        found.push(violation("P2", op.return_ns, format!("{problem}: {what}")));
    }
    for (_, op) in history.ops.iter().enumerate().filter(|(number, _)| !gone.contains(number)) {
        let Some(at) = op.response.at().filter(|_| !leaves_no_trace(history, op)) else { continue };
        let lost = history.ends_from(&at).find(|end| end.loses(at.index) == Some(true));
        if let Some((kept, last)) = lost.and_then(|end| end.exact) {
            let problem = format!("reported lost with entries {} to {last}, and there", kept + 1);
            found.push(violation("P2", op.return_ns, format!("{problem}: {}", describe(op))));
        }
    }
    found
}
