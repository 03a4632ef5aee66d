//! P10: an idempotency key applies once, across retries and leaders.
//!
//! Read so: the same key sent again got the same answer, unless the first one was lost as was reported; and no write's marker stands in two versions of a memory.

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Response, number};
use std::collections::BTreeMap;

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    for op in &history.ops {
        if let Response::Changed { first_ns, at, .. } = &op.response
            && !at.map_or_else(
                || history.may_be_lost_between(op.call_ns, *first_ns),
                |at| history.may_be_lost(&at),
            )
        {
            found.push(violation(
                "P10",
                op.return_ns,
                format!("a repeated key got another answer: {}", describe(op)),
            ));
        }
    }
    for replica in &history.finals {
        for ((tenant, id), versions) in &replica.versions {
            let mut markers: BTreeMap<&str, u64> = BTreeMap::new();
            for (version, marker) in versions {
                if let Some(first) = markers.insert(marker, *version) {
                    let node = &replica.node;
                    let what = format!(
                        "{marker} was applied as versions {first} and {version} of memory {} of tenant {tenant} at {node}",
                        number(id)
                    );
                    found.push(violation("P10", replica.at_ns, what));
                }
            }
        }
    }
    found
}
