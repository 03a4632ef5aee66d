//! P5: replicas of a view that publish the same position hold the same logical state.
//!
//! Read so: whenever two replicas, at any times, said the same position of the same epoch, they said the same digest; and in the end each one's digest
//! equals the one recomputed from its tables.

use super::{Violation, violation};
use crate::history::History;
use std::collections::BTreeMap;

pub fn check(history: &History) -> Vec<Violation> {
    let mut found = vec![];
    let mut digests = BTreeMap::new();
    let finals = history.finals.iter().flat_map(|replica| &replica.shards);
    for sample in history.samples.iter().chain(finals.clone().map(|(sample, _)| sample)) {
        let first = digests.entry((sample.shard, sample.epoch, sample.index)).or_insert(sample);
        if first.digest != sample.digest {
            let what = format!(
                "{} and {} differ at position {} of shard {}",
                first.node, sample.node, sample.index, sample.shard
            );
            found.push(violation("P5", sample.at_ns, what));
        }
    }
    for (sample, scanned) in finals {
        let at = format!("{}, shard {}", sample.node, sample.shard);
        match scanned {
            Ok(scanned) if *scanned == sample.digest => {}
            Ok(_) => {
                let what = format!("{at}: its digest at {} differs from that of its tables", sample.index);
                found.push(violation("P5", sample.at_ns, what));
            }
            Err(error) => found.push(violation("P5", sample.at_ns, format!("{at}: {error}"))),
        }
    }
    found
}
