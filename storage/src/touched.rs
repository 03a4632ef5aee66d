//! Which memories lately changed, for caches on other nodes.
//!
//! Each transaction of apply adds the memories that it changed, before its position is published. Only so many are remembered: a cache that has
//! not asked for longer, or that this shard knows nothing of (it was just opened, or filled from a snapshot), must forget all that it has. That a
//! memory was shown (its accesses) is no change.

use crate::model::MemoryId;
use crate::shard::lock;
use std::collections::VecDeque;
use std::sync::Mutex;

/// Ids that are remembered, 16 bytes each.
const IDS_MAX: usize = 16_384;

#[derive(Default)]
struct Ring {
    /// What changed up to this index is not known any more.
    from: u64,
    /// The last index of each transaction, and what it changed.
    all: VecDeque<(u64, Vec<MemoryId>)>,
    ids: usize,
}

pub struct Touched(Mutex<Ring>);

impl Touched {
    pub fn new(from: u64) -> Touched {
        Touched(Mutex::new(Ring { from, ..Ring::default() }))
    }

    /// Anything may have changed up to an index.
    pub fn forget(&self, to: u64) {
        *lock(&self.0) = Ring { from: to, ..Ring::default() };
    }

    /// What a transaction changed whose last entry is `to`.
    pub fn add(&self, to: u64, ids: Vec<MemoryId>) {
        if ids.is_empty() {
            return;
        }
        let mut ring = lock(&self.0);
        ring.ids += ids.len();
        ring.all.push_back((to, ids));
        while ring.ids > IDS_MAX {
            let Some((index, ids)) = ring.all.pop_front() else { break };
            (ring.from, ring.ids) = (index, ring.ids - ids.len());
        }
    }

    /// What changed after an index; `None`: anything may have.
    pub fn after(&self, index: u64) -> Option<Vec<MemoryId>> {
        let ring = lock(&self.0);
        (index >= ring.from).then(|| {
            let later = ring.all.iter().rev().take_while(|(to, _)| *to > index);
            later.flat_map(|(_, ids)| ids.iter().copied()).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told_or_that_it_is_not_known() {
        let touched = Touched::new(10);
        assert_eq!(touched.after(9), None, "before it was opened");
        assert_eq!(touched.after(10), Some(vec![]));
        touched.add(12, vec![[1; 16], [2; 16]]);
        touched.add(15, vec![[3; 16]]);
        assert_eq!(touched.after(10).map(|ids| ids.len()), Some(3));
        assert_eq!(touched.after(11).map(|ids| ids.len()), Some(3), "within a transaction");
        assert_eq!(touched.after(12), Some(vec![[3; 16]]));
        assert_eq!(touched.after(15), Some(vec![]));
        for to in 16..16 + IDS_MAX as u64 {
            touched.add(to, vec![[4; 16]]);
        }
        assert_eq!(touched.after(14), None, "too long ago");
        assert_eq!(touched.after(15).map(|ids| ids.len()), Some(IDS_MAX));
        touched.forget(20_000);
        assert_eq!((touched.after(19_999), touched.after(20_000)), (None, Some(vec![])));
    }
}
