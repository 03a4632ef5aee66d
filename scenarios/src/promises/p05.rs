//! P5: replicas of a view that publish the same position hold the same logical state.
//!
//! Read so: whenever two replicas, at any times, said the same position, they said the same digest; and in the end each one's digest
//! equals the one recomputed from its tables.

use super::{Violation, violation};
use crate::history::History;
use std::collections::BTreeMap;

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    let mut digests = BTreeMap::new();
    for sample in history.samples.iter().chain(history.finals.iter().map(|f| &f.sample)) {
        let first = digests.entry(sample.index).or_insert(sample);
        if first.digest != sample.digest {
            let what = format!("{} and {} differ at position {}", first.node, sample.node, sample.index);
            found.push(violation("P5", sample.at_ns, what));
        }
    }
    for replica in &history.finals {
        let sample = &replica.sample;
        match &replica.scanned {
            Ok(scanned) if *scanned == sample.digest => {}
            Ok(_) => {
                let what =
                    format!("{}'s digest at {} differs from that of its tables", sample.node, sample.index);
                found.push(violation("P5", sample.at_ns, what));
            }
            Err(error) => found.push(violation("P5", sample.at_ns, format!("{}: {error}", sample.node))),
        }
    }
    found
}
