//! The vector view: vectors in memory, those of one owner and space side by side, scanned exactly.
//!
//! It is derived from the records: an owner's are loaded when they are first searched, and change right after each transaction from then
//! on; when there are too many, those of the owner that was not searched for longest go. Filters come before
//! the scan (as a set of allowed ids), so a search never returns fewer than k while k exist. Equal scores are ordered by id.

mod dot;

pub use dot::dot;

use crate::model::{Memory, MemoryId, Owner, Status, UnixMs};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What the scan needs to know of a memory.
#[derive(Clone, Copy)]
struct Row {
    id: MemoryId,
    status: Status,
    expires: UnixMs,
}

/// The vectors of one owner in one space.
struct Partition {
    dimension: usize,
    data: Vec<f32>,
    rows: Vec<Row>,
    place: HashMap<MemoryId, usize>,
}

/// Owner, space and dimension: only vectors of the same kind are compared.
type Key = (Owner, String, usize);

pub struct Vectors {
    partitions: BTreeMap<Key, Partition>,
    count: u64,
    /// Owners whose vectors are here, and when they were last searched.
    loaded: BTreeMap<Owner, AtomicU64>,
    uses: AtomicU64,
    bytes: usize,
    bytes_max: usize,
}

/// A score, an id and whose it is (as a place in the scan's owners); the greatest is the worst, so that a heap gives it up first.
struct Scored(f32, MemoryId, usize);

impl Ord for Scored {
    fn cmp(&self, other: &Scored) -> Ordering {
        other.0.total_cmp(&self.0).then_with(|| (self.1, self.2).cmp(&(other.1, other.2)))
    }
}
impl PartialOrd for Scored {
    fn partial_cmp(&self, other: &Scored) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Scored {
    fn eq(&self, other: &Scored) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Scored {}

/// One scan.
pub struct Scan<'a> {
    /// Each once.
    pub owners: &'a [&'a Owner],
    pub space: &'a str,
    pub vector: &'a [f32],
    pub k: usize,
    pub threshold: Option<f32>,
    pub statuses: &'a [Status],
    pub now: UnixMs,
    /// If given: of each owner only these.
    pub allowed: Option<&'a [HashSet<MemoryId>]>,
}

impl Vectors {
    pub fn new(bytes_max: usize) -> Vectors {
        let (partitions, loaded, uses) = Default::default();
        Vectors { partitions, count: 0, loaded, uses, bytes: 0, bytes_max }
    }

    pub fn is_loaded(&self, owner: &Owner) -> bool {
        self.loaded.contains_key(owner)
    }

    /// An owner's vectors come next, and are kept from now on. Others, but not `needed`, may go for them.
    pub fn begin(&mut self, owner: &Owner, needed: &[&Owner]) {
        while self.bytes > self.bytes_max {
            let idle = self.loaded.iter().filter(|(owner, _)| !needed.contains(owner));
            let Some((oldest, _)) = idle.min_by_key(|(_, used)| used.load(Relaxed)) else { break };
            let oldest = oldest.clone();
            self.forget(&oldest);
        }
        self.loaded.insert(owner.clone(), AtomicU64::new(self.uses.fetch_add(1, Relaxed)));
    }

    pub fn note_use(&self, owners: &[&Owner]) {
        let now = self.uses.fetch_add(1, Relaxed);
        owners.iter().filter_map(|owner| self.loaded.get(*owner)).for_each(|used| used.store(now, Relaxed));
    }

    pub fn forget(&mut self, owner: &Owner) {
        self.loaded.remove(owner);
        let keys: Vec<Key> = self
            .partitions
            .range((owner.clone(), String::new(), 0)..)
            .map(|(key, _)| key)
            .take_while(|key| key.0 == *owner)
            .cloned()
            .collect();
        for partition in keys.iter().filter_map(|key| self.partitions.remove(key)) {
            self.count -= partition.rows.len() as u64;
            self.bytes -= partition.data.len() * 4;
        }
    }

    pub fn forget_all(&mut self) {
        *self = Vectors::new(self.bytes_max);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many vectors a scan over these owners compares.
    pub fn count_of(&self, owners: &[&Owner], space: &str, dimension: usize) -> usize {
        let of = |owner: &&Owner| self.partitions.get(&((*owner).clone(), space.to_string(), dimension));
        owners.iter().filter_map(of).map(|p| p.rows.len()).sum()
    }

    /// Puts a memory's vector in place, if its owner's are here; without a vector it has no row.
    pub fn insert(&mut self, memory: &Memory, vector: &[f32]) {
        if vector.is_empty() || !self.is_loaded(&memory.owner()) {
            return;
        }
        let row =
            Row { id: memory.id, status: memory.status, expires: memory.expires.unwrap_or(UnixMs::MAX) };
        let key = (memory.owner(), memory.space.clone(), vector.len());
        let partition = self.partitions.entry(key).or_insert_with(|| Partition {
            dimension: vector.len(),
            data: vec![],
            rows: vec![],
            place: HashMap::new(),
        });
        match partition.place.get(&memory.id) {
            Some(&at) => {
                partition.rows[at] = row;
                partition.data[at * vector.len()..][..vector.len()].copy_from_slice(vector);
            }
            None => {
                partition.place.insert(memory.id, partition.rows.len());
                partition.rows.push(row);
                partition.data.extend_from_slice(vector);
                self.count += 1;
                self.bytes += vector.len() * 4;
            }
        }
    }

    /// Takes a memory's vector away; `memory` is as it was, with the length of the vector that it had.
    pub fn remove(&mut self, memory: &Memory, dimension: usize) {
        let key = (memory.owner(), memory.space.clone(), dimension);
        let Some(partition) = self.partitions.get_mut(&key) else { return };
        let Some(at) = partition.place.remove(&memory.id) else { return };
        self.count -= 1;
        self.bytes -= dimension * 4;
        let last = partition.rows.len() - 1;
        partition.rows.swap_remove(at);
        if at < last {
            partition.data.copy_within(last * dimension..(last + 1) * dimension, at * dimension);
            partition.place.insert(partition.rows[at].id, at);
        }
        partition.data.truncate(last * dimension);
        if last == 0 {
            self.partitions.remove(&key);
        }
    }

    /// The vector held for a memory; `None` if there is none of that length in its place.
    pub fn get(&self, memory: &Memory, dimension: usize) -> Option<&[f32]> {
        let partition = self.partitions.get(&(memory.owner(), memory.space.clone(), dimension))?;
        let at = *partition.place.get(&memory.id)?;
        partition.data.get(at * dimension..(at + 1) * dimension)
    }

    /// The k nearest, best first: id, cosine, and the place of its owner in `scan.owners`.
    pub fn scan(&self, scan: &Scan<'_>) -> Vec<(MemoryId, f32, usize)> {
        let mut best = BinaryHeap::with_capacity(scan.k.min(self.count as usize) + 1);
        for (whose, owner) in scan.owners.iter().enumerate() {
            let allowed = scan.allowed.map(|a| &a[whose]);
            let key = ((*owner).clone(), scan.space.to_string(), scan.vector.len());
            let Some(partition) = self.partitions.get(&key) else { continue };
            let vectors = partition.data.chunks_exact(partition.dimension);
            for (row, vector) in partition.rows.iter().zip(vectors) {
                if row.expires <= scan.now
                    || !scan.statuses.contains(&row.status)
                    || allowed.is_some_and(|a| !a.contains(&row.id))
                {
                    continue;
                }
                let scored = Scored(dot(scan.vector, vector), row.id, whose);
                if scan.threshold.is_some_and(|t| scored.0 < t) {
                    continue;
                }
                if best.len() < scan.k {
                    best.push(scored);
                } else if best.peek().is_some_and(|worst| scored < *worst) {
                    best.pop();
                    best.push(scored);
                }
            }
        }
        best.into_sorted_vec().into_iter().map(|Scored(score, id, whose)| (id, score, whose)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use proptest::prelude::*;

    fn unit(seed: u64) -> Vec<f32> {
        let raw: Vec<f32> = (0..8).map(|i| ((seed * 31 + i * 17) % 97) as f32 / 48.5 - 1.0).collect();
        let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
        raw.into_iter().map(|x| x / norm).collect()
    }

    proptest! {
        #[test]
        fn scan_equals_sorting_everything(ids in proptest::collection::vec(0u64..60, 1..80), gone in proptest::collection::vec(0u64..60, 0..20), k in 1usize..30) {
            let mut vectors = Vectors::new(usize::MAX);
            vectors.begin(&memory("t", 0, "x").owner(), &[]);
            let mut kept = BTreeMap::new();
            for id in ids {
                let m = memory("t", id, "x");
                vectors.insert(&m, &unit(id));
                kept.insert(m.id, unit(id));
            }
            for id in gone {
                let m = memory("t", id, "x");
                vectors.remove(&m, 8);
                kept.remove(&m.id);
            }
            let query = unit(1000);
            let owner = memory("t", 0, "x").owner();
            let scan = Scan {
                owners: &[&owner], space: "s", vector: &query, k, threshold: None,
                statuses: &[Status::Active], now: 0, allowed: None,
            };
            let mut expected: Vec<_> = kept.iter().map(|(id, v)| (*id, dot(&query, v), 0)).collect();
            expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            expected.truncate(k);
            prop_assert_eq!(vectors.scan(&scan), expected);
            prop_assert_eq!(vectors.count(), kept.len() as u64);
        }
    }
}
