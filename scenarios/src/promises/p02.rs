//! P2: region failover: the real loss lies within the interim report; the final report is the real loss; nothing acknowledged at REGION is lost.
//!
//! Read so: an acknowledged write of an epoch that is over and whose effect some replica lacks in the end lies where the cluster map says that something
//! may be lost, and its answer did not say that the other region has it. Once an old disk was read, the map names the entries that are lost: an acknowledged
//! write of that epoch is missing if and only if it is among them.

use super::p01::{Missing, missing};
use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Response};
use std::collections::BTreeSet;

/// Acknowledged writes that are lost as the cluster says.
pub fn reported(history: &History) -> Vec<Missing<'_>> {
    missing(history).into_iter().filter(|missing| missing.is_reported(history)).collect()
}

pub fn check(history: &History) -> Vec<Violation> {
    if history.ends.is_empty() || history.finals.is_empty() {
        return vec![];
    }
    let mut found = vec![];
    let missing = missing(history);
    let gone: BTreeSet<usize> = missing.iter().map(|missing| missing.number).collect();
    for Missing { op, at, elsewhere, what, .. } in &missing {
        let Some(end) = history.ends.get(&(at.shard, at.epoch)) else { continue };
        let problem = match end.exact {
            _ if *elsewhere => "acknowledged as durable in the other region, and lost".to_string(),
            _ if history.reported(at).is_none() => {
                format!("lost, though only entries {} to {} may be", end.certain + 1, end.ceiling)
            }
            Some((kept, last)) if at.index <= kept || at.index > last => {
                format!("lost, though an old disk says that entries {} to {last} are", kept + 1)
            }
            _ => continue,
        };
        found.push(violation("P2", op.return_ns, format!("{problem}: {what}")));
    }
    for (number, op) in history.ops.iter().enumerate().filter(|(number, _)| !gone.contains(number)) {
        let Response::Written { at, .. } = op.response else { continue };
        let exact = history.ends.get(&(at.shard, at.epoch)).and_then(|end| end.exact);
        if let Some((kept, last)) = exact.filter(|(kept, last)| (kept + 1..=*last).contains(&at.index)) {
            let problem = format!("reported lost with entries {} to {last}, and there", kept + 1);
            found.push(violation("P2", op.return_ns, format!("{problem}: {}", describe(&history.ops[number]))));
        }
    }
    found
}
