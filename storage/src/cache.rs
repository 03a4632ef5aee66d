//! A bounded cache of records, without their vectors.
//!
//! Apply writes through: after a transaction it stores what changed, deletions too, before the position is published. A reader
//! that missed may store what it read only if nothing is there and nothing was evicted meanwhile, so it can never put back
//! something older than what apply put there.

use crate::model::{Memory, MemoryId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

type Key = (String, MemoryId);
/// Ids are nearly unique across tenants, so each has a short list.
type Slots = HashMap<MemoryId, Vec<(String, Option<Arc<Memory>>)>>;

/// Two generations: when the young one is full, it becomes the old one, and the old one goes.
#[derive(Default)]
struct Generations {
    young: Slots,
    young_bytes: usize,
    old: Slots,
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

fn get(map: &Slots, tenant: &str, id: &MemoryId) -> Option<Option<Arc<Memory>>> {
    map.get(id)?.iter().find(|(t, _)| t == tenant).map(|(_, m)| m.clone())
}

impl Generations {
    fn put(&mut self, (tenant, id): Key, memory: Option<Arc<Memory>>, bytes_max: usize) {
        self.young_bytes += size(&memory);
        let held = self.young.entry(id).or_default();
        match held.iter_mut().find(|(t, _)| *t == tenant) {
            Some((_, slot)) => *slot = memory,
            None => held.push((tenant, memory)),
        }
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

    pub fn get(&self, tenant: &str, id: &MemoryId) -> Lookup {
        let mut state = self.lock();
        let found = match get(&state.young, tenant, id) {
            Some(found) => Some(found),
            None => {
                let found = get(&state.old, tenant, id);
                if let Some(memory) = &found {
                    state.put((tenant.to_string(), *id), memory.clone(), self.bytes_max);
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

    /// Stores what a reader read after a lookup that gave `evictions`.
    pub fn store_read(&self, memory: Arc<Memory>, evictions: u64) {
        let mut state = self.lock();
        let known = get(&state.young, &memory.tenant, &memory.id).is_some()
            || get(&state.old, &memory.tenant, &memory.id).is_some();
        if !known && state.evictions == evictions {
            state.put((memory.tenant.clone(), memory.id), Some(memory), self.bytes_max);
        }
    }

    /// Stores what apply changed; `None`: deleted.
    pub fn store_applied(&self, tenant: &str, id: MemoryId, memory: Option<Arc<Memory>>) {
        self.lock().put((tenant.to_string(), id), memory, self.bytes_max);
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
        let Lookup::Unknown(before) = cache.get("t", &old.id) else { panic!("empty cache knew it") };
        cache.store_applied("t", old.id, None);
        cache.store_read(old.clone(), before);
        assert!(matches!(cache.get("t", &old.id), Lookup::Gone));
        // Nor when the deletion itself has been evicted in between.
        cache.clear();
        cache.store_read(old.clone(), before);
        assert!(matches!(cache.get("t", &old.id), Lookup::Unknown(_)));
    }

    #[test]
    fn the_cache_stays_within_its_bound() {
        let cache = Cache::new(100_000);
        for id in 0..10_000 {
            cache.store_applied("t", memory("t", id, "x").id, Some(Arc::new(memory("t", id, "some text"))));
        }
        let state = cache.lock();
        assert!((state.young.len() + state.old.len()) * 400 <= 101_000);
    }
}
