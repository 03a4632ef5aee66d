//! P7: no answer ever holds another tenant's data.
//!
//! Read so: every text carries its tenant; no row of an answer names another one than the caller's.

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Response, Row};

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    for op in &history.ops {
        let rows: &[Row] = match &op.response {
            Response::Value { row, .. } => std::slice::from_ref(row),
            Response::Rows(rows) | Response::Walked { rows, .. } => rows,
            _ => continue,
        };
        if let Some(foreign) = rows.iter().find(|row| row.tenant != op.tenant) {
            let what = format!("tenant {} was shown {foreign:?}: {}", op.tenant, describe(op));
            found.push(violation("P7", op.return_ns, what));
        }
    }
    found
}
