//! P1: an acknowledged write survives the loss of any one node, and a power loss of all nodes at once.
//!
//! Read so: after everything, every replica shows each memory at a version no lower than the highest that was
//! acknowledged, or does not show it because somebody asked to delete it; and its history has each acknowledged version as
//! the write made it.

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Request, Response};

/// Acknowledged writes whose effect some replica lacks: (acknowledged at, what).
fn missing(history: &History) -> Vec<(u64, String)> {
    let mut missing = vec![];
    for ((tenant, id), ops) in history.by_key() {
        let deletion = ops.iter().any(|op| {
            matches!(op.request, Request::Delete { .. })
                && matches!(op.response, Response::Written { .. } | Response::Unknown)
        });
        for op in ops {
            let Response::Written { version, .. } = op.response else { continue };
            for replica in &history.finals {
                let key = (tenant, id.to_string());
                let made_by = |marker: &String| match &op.request {
                    Request::Add { marker: made, .. } | Request::Update { marker: made, .. } => {
                        marker == made
                    }
                    _ => true,
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
                    let text = format!("{node} shows {shown} in the end{lacks}: {}", describe(op));
                    missing.push((op.return_ns, text));
                    break;
                }
            }
        }
    }
    missing
}

/// How many acknowledged writes are lost.
pub fn lost(history: &History) -> usize {
    missing(history).len()
}

pub fn check(history: &History) -> Vec<Violation> {
    missing(history).into_iter().map(|(at, what)| violation("P1", at, what)).collect()
}
