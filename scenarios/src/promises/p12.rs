//! P12: after faults stop, every write not reported lost is visible everywhere within a stated time.
//!
//! Read so: within the scenario's limit after the last fault ended, all replicas publish the same position under one leader; that
//! they then hold everything acknowledged is P1.

use super::{Violation, violation};
use crate::history::History;

pub fn check(history: &History) -> Vec<Violation> {
    let limit_ns = history.healed_ns + history.converge_limit_ns;
    match history.converged_ns {
        Some(at) if at <= limit_ns => vec![],
        Some(at) => {
            let late = (at - history.healed_ns) as f64 / 1e9;
            vec![violation("P12", at, format!("replicas agreed only {late:.1} s after the last fault"))]
        }
        None => {
            let limit = history.converge_limit_ns as f64 / 1e9;
            vec![violation(
                "P12",
                limit_ns,
                format!("replicas did not agree within {limit:.0} s of the last fault"),
            )]
        }
    }
}
