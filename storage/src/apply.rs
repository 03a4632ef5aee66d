//! Applying the ledger: a pure function of the state before and the entry, run inside one transaction.
//!
//! Idempotency and expected versions are decided here, the only place that cannot race. Nothing here looks at a clock
//! or draws a random number.

use crate::codec;
use crate::error::StorageError;
use crate::graph::{self, EdgeRow};
use crate::model::*;
use crate::records::months::{self, MonthState, Months};
use crate::records::rows::{self, KeyRow, Place, State, Stored};
use crate::slots::{SLOTS, Slot};
use crate::vectors::Coded;
use rusqlite::Connection;
use std::collections::BTreeSet;
use std::sync::Arc;

/// How long an idempotency key is remembered, in milliseconds of ledger time.
pub const KEY_LIFE_MS: i64 = 24 * 60 * 60 * 1000;
/// Old keys forgotten per entry beyond two per command: bounded work that keeps up with any batch.
const KEYS_PURGED: usize = 64;

/// What the vector view and the cache must do once the transaction is committed.
pub enum Effect {
    /// The memory without its vector, and that, if it has one.
    Put { memory: Arc<Memory>, coded: Option<Coded> },
    /// The memory as it was, where it was stored, and how long its vector was.
    Remove { memory: Memory, position: i64, dimension: usize },
    /// The memory as it is now; its version and its vector are the same.
    Touch { memory: Arc<Memory> },
    /// A vector that came with a move: not shown yet.
    Arrive { coded: Coded },
    /// The memory as it was of a slot that is gone, and was not shown any more.
    Leave { memory: Memory, position: i64, dimension: usize },
    /// Slots have come or gone: the cache must know nothing of them.
    ForgetRecords,
    /// All of a month was removed.
    DropMonth(Month),
    /// An erasure is done: what it removed should not stay in segments for long.
    Erased,
}

impl Effect {
    /// What is put into the vector view.
    pub fn coded(&self) -> Option<&Coded> {
        match self {
            Effect::Put { coded, .. } => coded.as_ref(),
            Effect::Arrive { coded } => Some(coded),
            _ => None,
        }
    }
}

/// One transaction's work.
pub struct Applier<'a> {
    pub db: &'a Connection,
    /// Whether the index of words is kept.
    words: bool,
    pub state: State,
    pub effects: Vec<Effect>,
    pub months: Months,
    changed: BTreeSet<Month>,
    /// The place in the entry that the next command gets.
    pub next_item: u32,
    /// The slot of the memory that the command is about; [`rows::STAYS`]: it found none.
    about: Slot,
}

impl<'a> Applier<'a> {
    pub fn new(db: &'a Connection, state: State, words: bool) -> Result<Applier<'a>, StorageError> {
        let (effects, months, changed) = (vec![], months::load(db)?, BTreeSet::new());
        Ok(Applier { db, words, state, effects, months, changed, next_item: 0, about: rows::STAYS })
    }

    /// Writes what is known of the months and of all; what is to be done outside.
    pub fn finish(self) -> Result<(State, Vec<Effect>), StorageError> {
        for month in &self.changed {
            if let Some(state) = self.months.get(month) {
                months::save(self.db, *month, state)?;
            }
        }
        rows::save_state(self.db, &self.state)?;
        Ok((self.state, self.effects))
    }

    /// A month's state, about to change; its tables are made if it is new.
    fn month(&mut self, month: Month) -> Result<&mut MonthState, StorageError> {
        if !self.months.contains_key(&month) {
            months::create(self.db, month)?;
        }
        self.changed.insert(month);
        let state = self.months.entry(month).or_default();
        Ok(state)
    }

    /// Applies one entry's commands; what came of each.
    pub fn entry(
        &mut self,
        epoch: u64,
        index: u64,
        batch: Option<&Batch>,
    ) -> Result<Vec<Outcome>, StorageError> {
        let mut outcomes = vec![];
        self.next_item = 0;
        for command in batch.iter().flat_map(|b| &b.commands) {
            self.state.ledger_time = self.state.ledger_time.max(command.now);
            let at = Position { epoch, index, item: self.next_item };
            outcomes.push(self.command(command, at)?);
            // An import has taken up one for each of its pieces.
            self.next_item = self.next_item.max(at.item + 1);
        }
        if !outcomes.is_empty() {
            self.forget_old_keys(KEYS_PURGED + 2 * outcomes.len())?;
        }
        self.state.position = Position { epoch, index, item: u32::MAX };
        Ok(outcomes)
    }

    fn command(&mut self, command: &Command, at: Position) -> Result<Outcome, StorageError> {
        if let Operation::Move(step) = &command.operation {
            return self.step(step, at);
        }
        if !self.is_here(command) {
            return Ok(Outcome::NotHere);
        }
        self.about = match command.operation.plain() {
            Operation::Add(memory) => memory.slot(),
            // What one shard did of these, another one still has to do.
            Operation::Touch(_) | Operation::DropMonth(_) | Operation::Erase { .. } => rows::STAYS,
            _ => command.slot.unwrap_or(rows::STAYS),
        };
        let key = &command.idempotency_key;
        if key.is_empty() || sim::planted!("forget-idempotency-keys") {
            return self.operation(command, &command.operation, at);
        }
        // A key is the tenant's: were it used for another slot that is here, that counts too.
        let mut held = rows::find_keys(self.db, &command.tenant, key)?;
        held.retain(|row| row.slot == rows::STAYS || self.state.slots.shows(&row.tenant, row.slot));
        if let Some(row) = held.iter().min_by_key(|row| row.slot != self.about) {
            if row.hash != command.request_hash {
                return Ok(Outcome::KeyReused);
            }
            sim::trace::probe("apply: a repeated write answered as before");
            return codec::decode(&row.outcome).map_err(StorageError::corrupt("a remembered outcome"));
        }
        let outcome = self.operation(command, &command.operation, at)?;
        self.restore_key(&KeyRow {
            tenant: command.tenant.clone(),
            key: key.clone(),
            slot: self.about,
            time: self.state.ledger_time,
            hash: command.request_hash,
            outcome: codec::encode(&outcome),
        })?;
        Ok(outcome)
    }

    /// Whether a command may be decided here: see [`Command::slot`].
    fn is_here(&self, command: &Command) -> bool {
        let slots = &self.state.slots;
        let takes = |slot: Slot| slot < SLOTS && slots.takes(&command.tenant, slot);
        match (command.operation.plain(), command.slot) {
            (Operation::Touch(_) | Operation::Move(_), _) => true,
            (Operation::DropMonth(_) | Operation::Erase { .. }, _) => slots.moving().is_none(),
            (_, None) => slots.takes_all(),
            (Operation::Add(memory), Some(slot)) => memory.slot() == slot && takes(slot),
            (_, Some(slot)) => takes(slot),
        }
    }

    /// Takes over a key as it is.
    pub fn restore_key(&mut self, row: &KeyRow) -> Result<(), StorageError> {
        rows::put_key(self.db, row)?;
        self.state.digest = self.state.digest.wrapping_add(rows::key_hash(row));
        self.state.keys += 1;
        Ok(())
    }

    pub fn forget_key(&mut self, row: &KeyRow) -> Result<(), StorageError> {
        rows::remove_key(self.db, row)?;
        self.state.digest = self.state.digest.wrapping_sub(rows::key_hash(row));
        self.state.keys -= 1;
        Ok(())
    }

    fn operation(
        &mut self,
        command: &Command,
        operation: &Operation,
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let whose = (&command.tenant[..], command.slot);
        match operation {
            Operation::Add(memory) => self.add_memory(&command.tenant, memory, at),
            Operation::Update { id, expected_version, patch } => {
                self.update(whose, id, *expected_version, patch, command.now, at)
            }
            Operation::Delete { id, expected_version } => self.delete(whose, id, *expected_version, at),
            Operation::Touch(touches) => self.touch(whose, touches, at),
            Operation::UpsertEdges(edges) => self.upsert_edges(whose, edges, at),
            Operation::DeleteEdges(edges) => self.delete_edges(whose, edges, at),
            Operation::DropMonth(month) => self.drop_month(*month, at),
            Operation::Again { last, since, operation } => {
                let Some(id) = operation.id() else { return Ok(Outcome::MoveRefused) };
                let slot = match operation.plain() {
                    Operation::Add(memory) => Some(memory.slot()),
                    _ => command.slot,
                };
                if let Operation::Add(memory) = operation.plain() {
                    let erased = |held: &Erasure| {
                        held.tenant == memory.tenant
                            && held.subject.covers(&memory.user, &memory.agent)
                            && held.position > *since
                    };
                    if rows::erasures(self.db)?.iter().any(erased) {
                        return Ok(Outcome::NotFound { id });
                    }
                }
                let places = rows::places(self.db, whose.0, &id, slot)?;
                let actual = places.iter().map(|(_, place)| place.version).max().unwrap_or(0);
                match actual == *last || sim::planted!("re-submit-over-what-was-written-since") {
                    true => self.operation(command, operation, at),
                    false => Ok(Outcome::VersionMismatch { id, actual }),
                }
            }
            Operation::Move(step) => self.step(step, at),
            Operation::Erase { epoch, .. } if *epoch != at.epoch => Ok(Outcome::NotHere),
            Operation::Erase { erasure, subject, before, rows_max, .. } => {
                let bounds = (*before, *rows_max as usize);
                self.erase((&command.tenant, subject), *erasure, bounds, command.now, at)
            }
        }
    }

    fn add_memory(&mut self, tenant: &str, memory: &Memory, at: Position) -> Result<Outcome, StorageError> {
        // No writer asks for this; were one to, nobody may see another tenant's memory for it.
        if memory.tenant != tenant || (memory.scope == Scope::Global && tenant != GLOBAL_TENANT) {
            return Ok(Outcome::NotFound { id: memory.id });
        }
        // Versions never go backwards: one that was deleted goes on where it ended.
        let slot = self.about;
        let place = rows::place(self.db, tenant, &memory.id, slot)?;
        if let Some(place) = place.filter(|p| p.position != 0) {
            let held = rows::stored_at(self.db, place)?;
            let old = rows::decode_body(&held.body)?;
            if !old.expired(self.state.ledger_time) {
                return Ok(Outcome::AlreadyExists { id: memory.id, version: old.version });
            }
            self.retire(held, &old)?;
            self.remove_edges_of(tenant, &old.id, slot)?;
        }
        let version =
            place.filter(|_| !sim::planted!("forget-a-deletions-version")).map_or(0, |p| p.version) + 1;
        let id = memory.id;
        let memory = Memory { version, ..memory.clone() };
        self.put(memory, ChangeKind::Added as u8, at.epoch, rows::pack(at))?;
        Ok(Outcome::Done { id, version, position: at })
    }

    /// The current row, or what to answer instead: of one slot, or of the smallest that has it.
    fn current(
        &mut self,
        (tenant, slot): (&str, Option<Slot>),
        id: &MemoryId,
        expected: Option<u64>,
    ) -> Result<Result<(Stored, Memory), Outcome>, StorageError> {
        for (slot, place) in rows::places(self.db, tenant, id, slot)? {
            if place.position == 0 || !self.state.slots.takes(tenant, slot) {
                continue;
            }
            let held = rows::stored_at(self.db, place)?;
            let memory = rows::decode_body(&held.body)?;
            // By the ledger's time, whatever a replica's own clock says.
            if memory.expired(self.state.ledger_time) {
                continue;
            }
            self.about = slot;
            if expected.is_some_and(|e| e != memory.version) && !sim::planted!("ignore-the-expected-version")
            {
                return Ok(Err(Outcome::VersionMismatch { id: *id, actual: memory.version }));
            }
            return Ok(Ok((held, memory)));
        }
        Ok(Err(Outcome::NotFound { id: *id }))
    }

    fn update(
        &mut self,
        whose: (&str, Option<Slot>),
        id: &MemoryId,
        expected: Option<u64>,
        patch: &Patch,
        now: UnixMs,
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let (held, old) = match self.current(whose, id, expected)? {
            Ok(found) => found,
            Err(outcome) => return Ok(outcome),
        };
        let mut new = old.clone();
        patch_into(&mut new, patch);
        new.version += 1;
        new.updated =
            if sim::planted!("store-the-replicas-own-time") { sim::time::calendar_ms() } else { now };
        new.vector = match &patch.vector {
            Some((vector, _)) => vector.clone(),
            None => rows::vector_from(&held.vector),
        };
        let version = new.version;
        self.retire(held, &old)?;
        self.put(new, ChangeKind::Updated as u8, at.epoch, rows::pack(at))?;
        Ok(Outcome::Done { id: *id, version, position: at })
    }

    fn delete(
        &mut self,
        whose: (&str, Option<Slot>),
        id: &MemoryId,
        expected: Option<u64>,
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let (held, old) = match self.current(whose, id, expected)? {
            Ok(found) => found,
            Err(outcome) => return Ok(outcome),
        };
        let version = old.version + 1;
        let body = held.body.clone();
        self.retire(held, &old)?;
        let deleted = Stored {
            epoch: at.epoch,
            position: rows::pack(at),
            kind: ChangeKind::Deleted as u8,
            body,
            vector: vec![],
        };
        self.put_history(&deleted, &old, version)?;
        let (place, slot) = (Place { month: Month::of(old.created), position: 0, version }, self.about);
        rows::put_place(self.db, whose.0, id, slot, place)?;
        self.remove_edges_of(whose.0, id, slot)?;
        Ok(Outcome::Done { id: *id, version, position: at })
    }

    /// Counts accesses in place: no new version, no new position.
    fn touch(
        &mut self,
        (tenant, slot): (&str, Option<Slot>),
        touches: &[(MemoryId, u64, UnixMs)],
        at: Position,
    ) -> Result<Outcome, StorageError> {
        for (id, count, last) in touches {
            let places = rows::places(self.db, tenant, id, slot)?;
            let taken =
                |(slot, place): &(Slot, Place)| place.position != 0 && self.state.slots.takes(tenant, *slot);
            let Some((_, place)) = places.into_iter().find(taken) else { continue };
            let held = rows::stored_at(self.db, place)?;
            let mut memory = rows::decode_body(&held.body)?;
            memory.access_count = memory.access_count.saturating_add(*count);
            memory.last_access = memory.last_access.max(Some(*last));
            let month = Month::of(memory.created);
            self.take(month, rows::memory_hash("memories", &held))?;
            let row = Stored { body: codec::encode(&memory), ..held };
            rows::replace_body(self.db, &row, &memory)?;
            self.add(month, rows::memory_hash("memories", &row))?;
            self.effects.push(Effect::Touch { memory: Arc::new(memory) });
        }
        Ok(Outcome::Done { id: [0; 16], version: 0, position: at })
    }

    /// Sets edges, all or none.
    fn upsert_edges(
        &mut self,
        whose: (&str, Option<Slot>),
        edges: &[Edge],
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let mut slots = Vec::with_capacity(edges.len());
        for edge in edges {
            if let Err(outcome) = self.current(whose, &edge.source, None)? {
                return Ok(outcome);
            }
            slots.push(self.about);
        }
        let tenant = whose.0;
        let number = rows::number_owner(self.db, &Owner::Shared { tenant: tenant.into() })?;
        for (edge, slot) in edges.iter().zip(slots) {
            let key = (&edge.source, &edge.relation[..], &edge.target);
            if let Some(edge) = graph::find(self.db, (slot, number), key)? {
                self.remove_edge(number, &EdgeRow { tenant: tenant.into(), slot, edge })?;
            }
            self.put_edge(number, &EdgeRow { tenant: tenant.into(), slot, edge: edge.clone() })?;
        }
        Ok(Outcome::Done { id: [0; 16], version: 0, position: at })
    }

    /// Takes over an edge as it is.
    pub fn restore_edge(&mut self, row: &EdgeRow) -> Result<(), StorageError> {
        let number = rows::number_owner(self.db, &Owner::Shared { tenant: row.tenant.clone() })?;
        self.put_edge(number, row)
    }

    /// Writes an edge that is not there.
    fn put_edge(&mut self, number: i64, row: &EdgeRow) -> Result<(), StorageError> {
        graph::put(self.db, (row.slot, number), &row.edge)?;
        self.state.digest = self.state.digest.wrapping_add(graph::hash(row));
        self.state.edges += 1;
        Ok(())
    }

    fn delete_edges(
        &mut self,
        (tenant, slot): (&str, Option<Slot>),
        edges: &[(MemoryId, String, MemoryId)],
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let Some(number) = graph::tenant_number(self.db, tenant)? else {
            return Ok(Outcome::Done { id: [0; 16], version: 0, position: at });
        };
        for (source, relation, target) in edges {
            // An edge goes with its source, so where none is there is no edge.
            let slots = match slot {
                Some(slot) => vec![slot],
                None => rows::places(self.db, tenant, source, None)?.into_iter().map(|(s, _)| s).collect(),
            };
            for slot in slots {
                if let Some(edge) = graph::find(self.db, (slot, number), (source, relation, target))? {
                    self.about = slot;
                    self.remove_edge(number, &EdgeRow { tenant: tenant.into(), slot, edge })?;
                    break;
                }
            }
        }
        Ok(Outcome::Done { id: [0; 16], version: 0, position: at })
    }

    pub fn remove_edge(&mut self, number: i64, row: &EdgeRow) -> Result<(), StorageError> {
        graph::remove(self.db, (row.slot, number), &row.edge)?;
        self.state.digest = self.state.digest.wrapping_sub(graph::hash(row));
        self.state.edges -= 1;
        Ok(())
    }

    /// Removes a memory's edges, those to it only if no other memory of the tenant has its id. Edges whose slots are not taken here stay, and
    /// lead nowhere.
    pub fn remove_edges_of(&mut self, tenant: &str, id: &MemoryId, slot: Slot) -> Result<(), StorageError> {
        if self.state.edges == 0 {
            return Ok(());
        }
        let Some(number) = graph::tenant_number(self.db, tenant)? else { return Ok(()) };
        for edge in graph::outbound(self.db, number, id, slot)? {
            self.remove_edge(number, &EdgeRow { tenant: tenant.into(), slot, edge })?;
        }
        if sim::planted!("leave-inbound-edges-behind") {
            return Ok(());
        }
        let inbound = graph::inbound(self.db, number, id)?;
        let shows = |slot: Slot| self.state.slots.shows(tenant, slot);
        let other = |(of, place): &(Slot, Place)| *of != slot && place.position != 0 && shows(*of);
        if inbound.is_empty() || rows::places(self.db, tenant, id, None)?.iter().any(other) {
            return Ok(());
        }
        for (slot, edge) in inbound {
            if self.state.slots.takes(tenant, slot) {
                self.remove_edge(number, &EdgeRow { tenant: tenant.into(), slot, edge })?;
            }
        }
        Ok(())
    }

    /// Drops a month with all that is known of its memories: places and edges one by one, the rows whole.
    fn drop_month(&mut self, month: Month, at: Position) -> Result<Outcome, StorageError> {
        let Some(state) = self.months.remove(&month) else {
            return Ok(Outcome::NotFound { id: [0; 16] });
        };
        let only = Months::from([(month, state.clone())]);
        let mut gone = BTreeSet::new();
        rows::each(self.db, &only, ("body", 'm'), &mut |_, row| {
            let memory = rows::decode_body(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?)?;
            let slot = memory.slot();
            gone.insert((memory.tenant, memory.id, slot));
            Ok(())
        })?;
        rows::each(self.db, &only, ("tenant, id, slot", 'h'), &mut |_, row| {
            gone.insert((row.get(0)?, row.get(1)?, row.get(2)?));
            Ok(())
        })?;
        for (tenant, id, slot) in &gone {
            let place = rows::place(self.db, tenant, id, *slot)?;
            if place.is_some_and(|p| p.month == month) {
                rows::remove_place(self.db, tenant, id, *slot)?;
                self.remove_edges_of(tenant, id, *slot)?;
            }
        }
        months::remove(self.db, month)?;
        self.changed.remove(&month);
        self.state.digest = self.state.digest.wrapping_sub(state.digest);
        self.state.memories -= state.memories;
        self.state.vectors -= state.vectors;
        self.effects.push(Effect::DropMonth(month));
        Ok(Outcome::Done { id: [0; 16], version: state.memories, position: at })
    }

    /// Moves the current row into the history.
    fn retire(&mut self, mut held: Stored, old: &Memory) -> Result<(), StorageError> {
        self.unstore(&held, old)?;
        let (position, dimension) = (held.position, held.vector.len() / 4);
        self.effects.push(Effect::Remove { memory: old.clone(), position, dimension });
        held.vector.clear();
        self.put_history(&held, old, old.version)
    }

    /// Removes a memory's row, but not its place. `old` is what the row's body encodes.
    pub fn unstore(&mut self, held: &Stored, old: &Memory) -> Result<(), StorageError> {
        rows::remove_memory(self.db, held.position, old, self.words)?;
        let (month, has_vector) = (Month::of(old.created), !held.vector.is_empty() as u64);
        self.take(month, rows::memory_hash("memories", held))?;
        let of_month = self.month(month)?;
        of_month.memories -= 1;
        of_month.vectors -= has_vector;
        self.state.memories -= 1;
        self.state.vectors -= has_vector;
        Ok(())
    }

    /// Removes a row of the history.
    pub fn unput_history(&mut self, row: &Stored, memory: &Memory) -> Result<(), StorageError> {
        let month = Month::of(memory.created);
        rows::remove_history(self.db, month, row.position)?;
        self.month(month)?.history -= 1;
        self.take(month, rows::memory_hash("history", row))
    }

    pub fn put_history(&mut self, row: &Stored, memory: &Memory, version: u64) -> Result<(), StorageError> {
        let month = Month::of(memory.created);
        let of_month = self.month(month)?;
        of_month.history += 1;
        of_month.position = of_month.position.max(rows::unpack(row.epoch, row.position));
        rows::put_history(self.db, row, memory, version)?;
        self.add(month, rows::memory_hash("history", row))
    }

    fn put(&mut self, mut memory: Memory, kind: u8, epoch: u64, position: i64) -> Result<(), StorageError> {
        let vector = std::mem::take(&mut memory.vector);
        let body = codec::encode(&memory);
        let row = Stored { epoch, position, kind, body, vector: rows::vector_bytes(&vector) };
        self.store(&row, &memory)?;
        let coded = (!vector.is_empty()).then(|| Coded::new(&memory, position, vector));
        self.effects.push(Effect::Put { memory: Arc::new(memory), coded });
        Ok(())
    }

    /// Writes a memory's row and counts it. `memory` is what the row's body encodes.
    pub fn store(&mut self, row: &Stored, memory: &Memory) -> Result<(), StorageError> {
        let (month, has_vector) = (Month::of(memory.created), !row.vector.is_empty() as u64);
        let of_month = self.month(month)?;
        of_month.position = of_month.position.max(rows::unpack(row.epoch, row.position));
        of_month.hold(memory, has_vector);
        self.state.memories += 1;
        self.state.vectors += has_vector;
        rows::put_memory(self.db, row, memory, self.words)?;
        self.add(month, rows::memory_hash("memories", row))
    }

    /// Takes over a row of a snapshot as it is.
    pub fn restore(&mut self, row: &Stored, version: Option<u64>) -> Result<(), StorageError> {
        let memory = rows::decode_body(&row.body)?;
        match version {
            Some(version) => self.put_history(row, &memory, version),
            None => self.store(row, &memory),
        }
    }

    fn forget_old_keys(&mut self, limit: usize) -> Result<(), StorageError> {
        let before = self.state.ledger_time.saturating_sub(KEY_LIFE_MS);
        for row in rows::old_keys(self.db, before, limit, &self.state.slots)? {
            self.forget_key(&row)?;
        }
        Ok(())
    }

    fn add(&mut self, month: Month, hash: u128) -> Result<(), StorageError> {
        let of_month = self.month(month)?;
        of_month.digest = of_month.digest.wrapping_add(hash);
        self.state.digest = self.state.digest.wrapping_add(hash);
        Ok(())
    }

    fn take(&mut self, month: Month, hash: u128) -> Result<(), StorageError> {
        let of_month = self.month(month)?;
        of_month.digest = of_month.digest.wrapping_sub(hash);
        self.state.digest = self.state.digest.wrapping_sub(hash);
        Ok(())
    }
}

fn patch_into(memory: &mut Memory, patch: &Patch) {
    fn set<T: Clone>(field: &mut T, value: &Option<T>) {
        if let Some(value) = value {
            field.clone_from(value);
        }
    }
    set(&mut memory.text, &patch.text);
    set(&mut memory.metadata, &patch.metadata);
    set(&mut memory.kind, &patch.kind);
    set(&mut memory.status, &patch.status);
    set(&mut memory.importance, &patch.importance);
    set(&mut memory.categories, &patch.categories);
    set(&mut memory.links, &patch.links);
    set(&mut memory.event_time, &patch.event_time);
    set(&mut memory.valid_from, &patch.valid_from);
    set(&mut memory.valid_to, &patch.valid_to);
    set(&mut memory.expires, &patch.expires);
    if let Some((_, space)) = &patch.vector {
        memory.space.clone_from(space);
    }
}
