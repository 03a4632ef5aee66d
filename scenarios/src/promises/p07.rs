//! P7: no answer ever holds another tenant's data.
//!
//! Read so: every text carries its tenant; no row of an answer names another one than the caller's.

use super::{Violation, linearizable::describe, violation};
use crate::history::{History, Response, Row, number};

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    for op in &history.ops {
        let rows: &[Row] = match &op.response {
            Response::Value { row, .. } => std::slice::from_ref(row),
            Response::Rows(rows) | Response::Walked { rows, .. } => rows,
            _ => continue,
        };
        if let Some(foreign) = rows.iter().find(|row| row.tenant != op.tenant) {
            let what = {
                let (id, of) = (number(&foreign.id), foreign.tenant);
                format!(
                    "memory {id} of tenant {of}, {foreign}, was shown to tenant {}: {}",
                    op.tenant,
                    describe(op)
                )
            };
            found.push(violation("P7", op.return_ns, what));
        }
    }
    found
}
