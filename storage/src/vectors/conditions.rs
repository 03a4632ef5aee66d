//! Which memories of an owner meet a condition, remembered from one search to the next.
//!
//! An agent asks with the same few filters again and again, and what meets them changes only with the owner's own memories. So what the
//! index of metadata said, and [`crate::filter`] confirmed, is kept until one of those changes.
//!
//! **Why it is never stale.** This belongs to [`super::Tree`] and is changed under its lock: a search holds it for reading while it asks the
//! records and remembers the answer, so no transaction commits in between; whoever commits holds it for writing, and forgets the owners
//! whose memories the transaction changed. A tree that takes another's place begins with nothing remembered.

use crate::model::{MemoryId, Month, Owner};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

/// The memories of an owner that meet a condition, and the months that they are of.
#[derive(Default)]
pub struct Meeting {
    pub ids: HashSet<MemoryId>,
    pub months: BTreeSet<Month>,
}

/// Of each owner, by condition.
type Known = HashMap<Owner, HashMap<Vec<u8>, Arc<Meeting>>>;

/// Two generations, as in [`crate::cache`]: when the young one is full, it becomes the old one, and the old one goes.
#[derive(Default)]
struct Generations {
    young: Known,
    young_bytes: usize,
    old: Known,
}

pub struct Conditions {
    bytes_max: usize,
    state: Mutex<Generations>,
}

impl Conditions {
    pub fn new(bytes_max: usize) -> Conditions {
        Conditions { bytes_max, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What is known of an owner and a condition, as bytes that no other condition has.
    pub fn get(&self, owner: &Owner, condition: &[u8]) -> Option<Arc<Meeting>> {
        let mut state = self.lock();
        if let Some(found) = state.young.get(owner).and_then(|of| of.get(condition)) {
            return Some(found.clone());
        }
        let found = state.old.get_mut(owner).and_then(|of| of.remove(condition))?;
        self.put(&mut state, owner, condition, found.clone());
        Some(found)
    }

    pub fn remember(&self, owner: &Owner, condition: &[u8], meeting: Arc<Meeting>) {
        self.put(&mut self.lock(), owner, condition, meeting);
    }

    fn put(&self, state: &mut Generations, owner: &Owner, condition: &[u8], meeting: Arc<Meeting>) {
        // About what the tables take.
        let bytes = 300 + condition.len() + 32 * meeting.ids.len();
        if bytes > self.bytes_max / 8 {
            return;
        }
        if state.young_bytes + bytes > self.bytes_max / 2 {
            state.old = std::mem::take(&mut state.young);
            state.young_bytes = 0;
        }
        state.young_bytes += bytes;
        state.young.entry(owner.clone()).or_default().insert(condition.to_vec(), meeting);
    }

    /// An owner's memories have changed.
    pub fn forget(&mut self, owner: &Owner) {
        let state = self.state.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Their bytes are counted until the generation ends, so a table never holds more than it may.
        state.young.remove(owner);
        state.old.remove(owner);
    }

    /// Memories of many owners have changed.
    pub fn clear(&mut self) {
        *self = Conditions::new(self.bytes_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(number: u32) -> Owner {
        Owner::User { tenant: "t".into(), user: format!("u{number}") }
    }

    #[test]
    fn what_is_asked_again_stays_and_memory_is_bounded() {
        let mut conditions = Conditions::new(100_000);
        let meeting = Arc::new(Meeting { ids: (0..10).map(|id| [id; 16]).collect(), ..Meeting::default() });
        for number in 0..1000 {
            conditions.remember(&owner(number), b"condition", meeting.clone());
            assert!(conditions.get(&owner(0), b"condition").is_some(), "after {number} others");
            assert!(conditions.get(&owner(number), b"another").is_none());
        }
        let held = |known: &Known| known.values().map(HashMap::len).sum::<usize>();
        let state = conditions.lock();
        assert!(held(&state.young) + held(&state.old) <= 100_000 / 600);
        drop(state);
        conditions.forget(&owner(0));
        assert!(conditions.get(&owner(0), b"condition").is_none());
        assert!(conditions.get(&owner(999), b"condition").is_some());
        let all = Arc::new(Meeting { ids: (0..200).map(|id| [id; 16]).collect(), ..Meeting::default() });
        Conditions::new(10_000).remember(&owner(1), b"condition", all);
        conditions.clear();
        assert!(conditions.get(&owner(999), b"condition").is_none());
    }
}
