//! P1: an acknowledged write survives the loss of any one node, and a power loss of all nodes at once.
//!
//! Read so: after everything, every replica shows each memory at a version no lower than the highest that was
//! acknowledged, or does not show it because somebody asked to delete it; and its history has each acknowledged version as
//! the write made it. What was lost with a region is P2's; what may have been erased since nobody misses.

use super::{Violation, linearizable::describe, violation};
use crate::history::{At, History, Op, Request, Response};

/// An acknowledged write whose effect some replica lacks.
pub struct Missing<'a> {
    /// Its place among the operations.
    pub number: usize,
    pub op: &'a Op,
    pub at: At,
    pub elsewhere: bool,
    pub what: String,
}

impl Missing<'_> {
    /// Whether the cluster said that it may be lost, and had not said before that it could not be.
    pub fn is_reported(&self, history: &History) -> bool {
        !self.elsewhere && history.may_be_lost(&self.at)
    }
}

pub fn missing(history: &History) -> Vec<Missing<'_>> {
    let mut missing = vec![];
    let keyed =
        history.ops.iter().enumerate().filter_map(|(number, op)| Some((number, op, op.request.id()?)));
    let deleted: std::collections::BTreeSet<(usize, &String)> = keyed
        .clone()
        .filter(|(_, op, _)| {
            matches!(op.request, Request::Delete { .. })
                && matches!(op.response, Response::Written { .. } | Response::Unknown)
        })
        .map(|(_, op, id)| (op.tenant, id))
        .collect();
    for (number, op, id) in keyed {
        let Response::Written { version, at, elsewhere, .. } = op.response else { continue };
        if history.may_be_erased(op) {
            continue;
        }
        let deletion = deleted.contains(&(op.tenant, id));
        for replica in &history.finals {
            let key = (op.tenant, id.clone());
            let made_by = |marker: &String| match &op.request {
                Request::Add { marker: made, .. } | Request::Update { marker: made, .. } => marker == made,
                // Another write may have this version where this one is lost.
                _ => history.ends.is_empty() || marker.starts_with("deletion"),
            };
            let holds = |(held, marker): &(u64, String)| *held == version && made_by(marker);
            let kept = replica.versions.get(&key).is_some_and(|v| v.iter().any(holds));
            let shown = replica.rows.get(&key).map(|row| row.version);
            let survived = match (&op.request, shown) {
                (Request::Delete { .. }, Some(shown)) => shown > version,
                (Request::Delete { .. }, None) => true,
                (_, Some(shown)) => shown >= version,
                (_, None) => deletion,
            };
            if !survived || !kept {
                let node = &replica.node;
                let shown = shown.map_or("nothing".to_string(), |version| format!("version {version}"));
                let lacks = if kept { "" } else { ", and its history lacks it" };
                let what = format!("{node} shows {shown} in the end{lacks}: {}", describe(op));
                missing.push(Missing { number, op, at, elsewhere, what });
                break;
            }
        }
    }
    missing
}

/// How many acknowledged writes are lost in silence.
pub fn lost(history: &History) -> usize {
    missing(history).iter().filter(|missing| !missing.is_reported(history)).count()
}

pub fn check(history: &History) -> Vec<Violation> {
    let of_epochs = |missing: &Missing| history.ends.contains_key(&(missing.at.shard, missing.at.epoch));
    let missing = missing(history).into_iter().filter(|missing| !of_epochs(missing));
    missing.map(|missing| violation("P1", missing.op.return_ns, missing.what)).collect()
}
