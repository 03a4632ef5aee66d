//! A bounded cache of records, without their vectors.
//!
//! Apply writes through: after a transaction it stores what changed, deletions too, before the position is published. A reader
//! that missed may store what it read only if nothing is there and nothing was evicted meanwhile, so it can never put back
//! something older than what apply put there.

use crate::model::{Memory, MemoryId};
use crate::slots::Slot;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Few lines of memory are touched by a lookup: most of them are far away.
#[derive(Default)]
struct Generation {
    tenants: HashMap<String, u32>,
    memories: HashMap<(u32, Slot, MemoryId), Option<Arc<Memory>>>,
}

/// Two generations: when the young one is full, it becomes the old one, and the old one goes.
#[derive(Default)]
struct Generations {
    young: Generation,
    young_bytes: usize,
    old: Generation,
    evictions: u64,
}

pub struct Cache {
    bytes_max: usize,
    state: Mutex<Generations>,
}

/// What a lookup found.
pub enum Lookup {
    Found(Arc<Memory>),
    /// Known not to exist.
    Gone,
    /// Not known; the number is for [`Cache::store_read`].
    Unknown(u64),
}

fn size(memory: &Option<Arc<Memory>>) -> usize {
    memory.as_ref().map_or(0, |m| m.text.len() + m.metadata.len()) + 400
}

impl Generation {
    fn get(&self, tenant: &str, slot: Slot, id: &MemoryId) -> Option<Option<Arc<Memory>>> {
        self.memories.get(&(*self.tenants.get(tenant)?, slot, *id)).cloned()
    }

    fn put(&mut self, tenant: &str, slot: Slot, id: MemoryId, memory: Option<Arc<Memory>>) {
        let next = self.tenants.len() as u32;
        let number = match self.tenants.get(tenant) {
            Some(number) => *number,
            None => *self.tenants.entry(tenant.to_string()).or_insert(next),
        };
        self.memories.insert((number, slot, id), memory);
    }
}

impl Generations {
    fn put(
        &mut self,
        (tenant, slot, id): (&str, Slot, MemoryId),
        memory: Option<Arc<Memory>>,
        bytes_max: usize,
    ) {
        self.young_bytes += size(&memory);
        self.young.put(tenant, slot, id, memory);
        if self.young_bytes > bytes_max / 2 {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
            self.evictions += 1;
        }
    }
}

impl Cache {
    pub fn new(bytes_max: usize) -> Cache {
        Cache { bytes_max, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn get(&self, tenant: &str, slot: Slot, id: &MemoryId) -> Lookup {
        let mut state = self.lock();
        let found = match state.young.get(tenant, slot, id) {
            Some(found) => Some(found),
            None => {
                let found = state.old.get(tenant, slot, id);
                if let Some(memory) = &found {
                    state.put((tenant, slot, *id), memory.clone(), self.bytes_max);
                }
                found
            }
        };
        match found {
            Some(Some(memory)) => Lookup::Found(memory),
            Some(None) => Lookup::Gone,
            None => Lookup::Unknown(state.evictions),
        }
    }

    /// The number for [`Cache::store_read`] of whoever reads from a view of the records that is about to be opened.
    pub fn evictions(&self) -> u64 {
        self.lock().evictions
    }

    /// Stores what a reader read of a slot after a lookup that gave `evictions`.
    pub fn store_read(&self, slot: Slot, memory: Arc<Memory>, evictions: u64) {
        let mut state = self.lock();
        let known = state.young.get(&memory.tenant, slot, &memory.id).is_some()
            || state.old.get(&memory.tenant, slot, &memory.id).is_some();
        if !known && state.evictions == evictions {
            let (tenant, id) = (memory.tenant.clone(), memory.id);
            state.put((&tenant, slot, id), Some(memory), self.bytes_max);
        }
    }

    /// Stores what apply changed; `None`: deleted.
    pub fn store_applied(&self, tenant: &str, slot: Slot, id: MemoryId, memory: Option<Arc<Memory>>) {
        self.lock().put((tenant, slot, id), memory, self.bytes_max);
    }

    pub fn clear(&self) {
        let mut state = self.lock();
        let evictions = state.evictions + 1;
        *state = Generations { evictions, ..Generations::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn a_slow_reader_never_puts_back_what_apply_replaced() {
        let cache = Cache::new(1 << 20);
        let old = Arc::new(memory("t", 1, "old"));
        let Lookup::Unknown(before) = cache.get("t", 1, &old.id) else { panic!("empty cache knew it") };
        cache.store_applied("t", 1, old.id, None);
        cache.store_read(1, old.clone(), before);
        assert!(matches!(cache.get("t", 1, &old.id), Lookup::Gone));
        // Nor when the deletion itself has been evicted in between.
        cache.clear();
        cache.store_read(1, old.clone(), before);
        assert!(matches!(cache.get("t", 1, &old.id), Lookup::Unknown(_)));
    }

    #[test]
    fn the_cache_stays_within_its_bound() {
        let cache = Cache::new(100_000);
        for id in 0..10_000 {
            cache.store_applied(
                "t",
                1,
                memory("t", id, "x").id,
                Some(Arc::new(memory("t", id, "some text"))),
            );
        }
        let state = cache.lock();
        assert!((state.young.memories.len() + state.old.memories.len()) * 400 <= 101_000);
    }
}
