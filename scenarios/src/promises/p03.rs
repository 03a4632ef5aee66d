//! P3: at most one acknowledged entry per shard and index.
//!
//! Read so: no two acknowledged writes name the same place (shard, epoch, index, item). Two leaders that both
//! acknowledged would.

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Response};
use std::collections::BTreeMap;

pub fn check(history: &History) -> Vec<Violation> {
    let mut places = BTreeMap::new();
    let mut found = vec![];
    for op in &history.ops {
        let Response::Written { at, .. } = op.response else { continue };
        if let Some(other) = places.insert(at, op) {
            let what = format!("two writes acknowledged at {at:?}: {}; {}", describe(other), describe(op));
            found.push(violation("P3", op.return_ns, what));
        }
    }
    found
}
