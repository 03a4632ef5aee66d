//! What of a shard's rows may be seen: those of slots that it has. While a move is under way, others lie beside them.

use crate::error::StorageError;
use crate::model::{Memory, Owner};
use crate::records::rows::{self, State};
use crate::slots::{Slot, Slots, slot_of};
use rusqlite::Connection;

/// Which slots are shown; `None`: nothing is hidden, so nobody need ask.
pub struct Shown(Option<Slots>);

impl Shown {
    pub fn of(slots: &Slots) -> Shown {
        let hides = slots.hides() && !sim::planted!("show-what-has-not-been-adopted");
        Shown(hides.then(|| slots.clone()))
    }

    /// As a snapshot of the records has it: what was published may be older or newer.
    pub fn in_snapshot(snapshot: &Connection, published: &State) -> Result<Shown, StorageError> {
        if rows::slots_changed(snapshot)? == published.slots_changed {
            return Ok(Shown::of(&published.slots));
        }
        Ok(Shown::of(&rows::load_state(snapshot)?.slots))
    }

    pub fn slot(&self, tenant: &str, slot: Slot) -> bool {
        self.0.as_ref().is_none_or(|slots| slots.shows(tenant, slot))
    }

    /// Whether an owner's memories are; each GLOBAL one must be asked for.
    pub fn owner(&self, owner: &Owner) -> bool {
        *owner == Owner::Global || self.slot(owner.tenant(), slot_of(owner, &[0; 16]))
    }

    pub fn memory(&self, memory: &Memory) -> bool {
        self.slot(&memory.tenant, memory.slot())
    }

    /// What is asked for each GLOBAL memory, if anything.
    pub fn slots(&self) -> Option<&Slots> {
        self.0.as_ref()
    }
}
