//! Since when a node's disk is there.
//!
//! A replica without anything on its disk was never opened, or it was lost with an older disk. The one may vote like any new member; the other may have
//! acknowledged what it no longer has, and must not ([`crate::ledger::recovery`]). The map alone does not tell them apart: a node that did not answer while a shard
//! was founded finds itself among its members afterwards, just as one does whose disk was replaced. Were the first taken for the second, one lost disk elsewhere
//! would leave a shard of three with two replicas that wait for each other for ever.
//!
//! So each disk notes, once, a version of the map that a majority of the control group confirmed while the disk was there already. A shard that the map got
//! after that version is younger than the disk: what this node has of it, it has here. As long as nothing is noted, or the control group has been recovered
//! since ([`super::recover`]), an empty replica counts as lost.

use super::map::{ClusterMap, ShardEntry};
use super::{Control, DIR, held};
use serde::{Deserialize, Serialize};
use sim::disk::Disk;
use sim::time::{self, Duration, Instant};
use std::io;
use std::sync::{Arc, Mutex};
use storage::{codec, facts};

const FACT: &str = "since";
/// How long one look at the map may take, and how long to wait for the next.
const LOOK: Duration = Duration::from_secs(2);

/// A version of the map, and the incarnation of the control group that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    incarnation: u64,
    version: u64,
}

impl Seen {
    fn is_before(self, entry: &ShardEntry, map: &ClusterMap) -> bool {
        self.incarnation == map.incarnation && self.version < entry.created
    }
}

/// What a node's disk has noted.
#[derive(Clone)]
pub struct Since {
    disk: Arc<dyn Disk>,
    seen: Arc<Mutex<Option<Seen>>>,
}

impl Since {
    /// Reads what was noted. Blocks.
    pub fn open(disk: Arc<dyn Disk>) -> io::Result<Since> {
        let noted = held(&*disk, FACT, "the note of its age")?;
        let seen = noted.and_then(|bytes| codec::decode_serde(&bytes).ok());
        Ok(Since { disk, seen: Arc::new(Mutex::new(seen)) })
    }

    fn seen(&self) -> Option<Seen> {
        *self.seen.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Whether the disk was there before the shard was.
    pub fn is_older_than(&self, entry: &ShardEntry, map: &ClusterMap) -> bool {
        self.seen().is_some_and(|seen| seen.is_before(entry, map))
    }

    /// Notes a version, if none is.
    pub async fn note(self, control: Control) {
        while self.seen().is_none() {
            let asked = Instant::now();
            if let Ok(map) = control.read(asked + LOOK).await {
                let seen = Seen { incarnation: map.incarnation, version: map.version };
                let (disk, bytes) = (self.disk.clone(), codec::encode_serde(&seen));
                match sim::task::blocking(move || facts::put(&*disk, DIR, FACT, &bytes)).await {
                    Ok(()) => *self.seen.lock().unwrap_or_else(|p| p.into_inner()) = Some(seen),
                    Err(error) => sim::warn!("since when this disk is there cannot be noted: {error}"),
                }
            }
            time::sleep_until(asked + LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_came_later_in_the_same_incarnation_is_younger() {
        let seen = Seen { incarnation: 3, version: 7 };
        let younger = |created, incarnation| {
            let entry = ShardEntry { created, ..ShardEntry::new(1, Default::default(), Default::default()) };
            seen.is_before(&entry, &ClusterMap { version: 100, incarnation, ..Default::default() })
        };
        assert!(younger(8, 3));
        assert!(!younger(7, 3), "its first replica may have been on the disk before");
        assert!(!younger(0, 3), "nobody noted when it came");
        assert!(!younger(8, 4), "the control group was recovered meanwhile");
    }
}
