//! P3: no write of an epoch is acknowledged after the next one was granted; at most one unreported acknowledged entry per shard and index.
//!
//! Read so: no two acknowledged writes name the same place (shard, epoch, index, item). Two leaders that both
//! acknowledged would. And no write that began after one of a later epoch had been acknowledged is acknowledged in an older one.

use super::{Violation, linearizable::describe, violation};
use crate::history::History;
use std::collections::BTreeMap;

pub fn check(history: &History) -> Vec<Violation> {
    let mut places = BTreeMap::new();
    let mut found = vec![];
    for op in &history.ops {
        let Some(at) = op.response.at() else { continue };
        if let Some(other) = places.insert(at, op) {
            let what = format!("two writes acknowledged at {at:?}: {}; {}", describe(other), describe(op));
            found.push(violation("P3", op.return_ns, what));
        }
    }
    // By shard, when the first write of each epoch was acknowledged.
    let mut first: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    for op in &history.ops {
        let Some(at) = op.response.at() else { continue };
        let acked = first.entry((at.shard, at.epoch)).or_insert(op.return_ns);
        *acked = op.return_ns.min(*acked);
    }
    for op in &history.ops {
        let Some(at) = op.response.at() else { continue };
        let later = first.range((at.shard, at.epoch + 1)..(at.shard + 1, 0)).map(|(_, acked)| *acked).min();
        if later.is_some_and(|acked| acked < op.call_ns) {
            let what =
                format!("acknowledged in epoch {}, after a later one wrote: {}", at.epoch, describe(op));
            found.push(violation("P3", op.return_ns, what));
        }
    }
    found
}
