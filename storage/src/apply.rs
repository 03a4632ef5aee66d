//! Applying the ledger: a pure function of the state before and the entry, run inside one transaction.
//!
//! Idempotency and expected versions are decided here, the only place that cannot race. Nothing here looks at a clock
//! or draws a random number.

use crate::codec;
use crate::error::StorageError;
use crate::graph;
use crate::model::*;
use crate::records::months::{self, MonthState, Months};
use crate::records::rows::{self, KeyRow, Place, State, Stored};
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
    /// All of a month was removed.
    DropMonth(Month),
}

/// One transaction's work.
pub struct Applier<'a> {
    pub db: &'a Connection,
    pub state: State,
    pub effects: Vec<Effect>,
    months: Months,
    changed: BTreeSet<Month>,
}

impl<'a> Applier<'a> {
    pub fn new(db: &'a Connection, state: State) -> Result<Applier<'a>, StorageError> {
        Ok(Applier { db, state, effects: vec![], months: months::load(db)?, changed: BTreeSet::new() })
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
        for (item, command) in batch.iter().flat_map(|b| &b.commands).enumerate() {
            self.state.ledger_time = self.state.ledger_time.max(command.now);
            outcomes.push(self.command(command, Position { epoch, index, item: item as u32 })?);
        }
        if !outcomes.is_empty() {
            self.forget_old_keys(KEYS_PURGED + 2 * outcomes.len())?;
        }
        self.state.position = Position { epoch, index, item: u32::MAX };
        Ok(outcomes)
    }

    fn command(&mut self, command: &Command, at: Position) -> Result<Outcome, StorageError> {
        let key = &command.idempotency_key;
        if key.is_empty() || sim::planted!("forget-idempotency-keys") {
            return self.operation(command, at);
        }
        if let Some(row) = rows::find_key(self.db, &command.tenant, key)? {
            if row.hash != command.request_hash {
                return Ok(Outcome::KeyReused);
            }
            sim::trace::probe("apply: a repeated write answered as before");
            return codec::decode(&row.outcome).map_err(StorageError::corrupt("a remembered outcome"));
        }
        let outcome = self.operation(command, at)?;
        let row = KeyRow {
            tenant: command.tenant.clone(),
            key: key.clone(),
            time: self.state.ledger_time,
            hash: command.request_hash,
            outcome: codec::encode(&outcome),
        };
        rows::put_key(self.db, &row)?;
        self.state.digest = self.state.digest.wrapping_add(rows::key_hash(&row));
        self.state.keys += 1;
        Ok(outcome)
    }

    fn operation(&mut self, command: &Command, at: Position) -> Result<Outcome, StorageError> {
        match &command.operation {
            Operation::Add(memory) => self.add_memory(&command.tenant, memory, at),
            Operation::Update { id, expected_version, patch } => {
                self.update(&command.tenant, id, *expected_version, patch, command.now, at)
            }
            Operation::Delete { id, expected_version } => {
                self.delete(&command.tenant, id, *expected_version, at)
            }
            Operation::Touch(touches) => self.touch(&command.tenant, touches, at),
            Operation::UpsertEdges(edges) => self.upsert_edges(&command.tenant, edges, at),
            Operation::DeleteEdges(edges) => self.delete_edges(&command.tenant, edges, at),
            Operation::DropMonth(month) => self.drop_month(*month, at),
        }
    }

    fn add_memory(&mut self, tenant: &str, memory: &Memory, at: Position) -> Result<Outcome, StorageError> {
        // No writer asks for this; were one to, nobody may see another tenant's memory for it.
        if memory.tenant != tenant || (memory.scope == Scope::Global && tenant != GLOBAL_TENANT) {
            return Ok(Outcome::NotFound { id: memory.id });
        }
        // Versions never go backwards: one that was deleted goes on where it ended.
        let place = rows::place(self.db, tenant, &memory.id)?;
        if let Some(place) = place.filter(|p| p.position != 0) {
            let held = rows::stored_at(self.db, place)?;
            let old = rows::decode_body(&held.body)?;
            if !old.expired(self.state.ledger_time) {
                return Ok(Outcome::AlreadyExists { id: memory.id, version: old.version });
            }
            self.retire(held, &old)?;
            self.remove_edges_of(tenant, &old.id)?;
        }
        let version =
            place.filter(|_| !sim::planted!("forget-a-deletions-version")).map_or(0, |p| p.version) + 1;
        let id = memory.id;
        let memory = Memory { version, ..memory.clone() };
        self.put(memory, ChangeKind::Added as u8, at.epoch, rows::pack(at))?;
        Ok(Outcome::Done { id, version, position: at })
    }

    /// The current row, or what to answer instead.
    fn current(
        &self,
        tenant: &str,
        id: &MemoryId,
        expected: Option<u64>,
    ) -> Result<Result<(Stored, Memory), Outcome>, StorageError> {
        let Some(held) = rows::find(self.db, tenant, id)? else {
            return Ok(Err(Outcome::NotFound { id: *id }));
        };
        let memory = rows::decode_body(&held.body)?;
        // By the ledger's time, whatever a replica's own clock says.
        if memory.expired(self.state.ledger_time) {
            return Ok(Err(Outcome::NotFound { id: *id }));
        }
        if expected.is_some_and(|e| e != memory.version) && !sim::planted!("ignore-the-expected-version") {
            return Ok(Err(Outcome::VersionMismatch { id: *id, actual: memory.version }));
        }
        Ok(Ok((held, memory)))
    }

    fn update(
        &mut self,
        tenant: &str,
        id: &MemoryId,
        expected: Option<u64>,
        patch: &Patch,
        now: UnixMs,
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let (held, old) = match self.current(tenant, id, expected)? {
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
        tenant: &str,
        id: &MemoryId,
        expected: Option<u64>,
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let (held, old) = match self.current(tenant, id, expected)? {
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
        let place = Place { month: Month::of(old.created), position: 0, version };
        rows::put_place(self.db, tenant, id, place)?;
        self.remove_edges_of(tenant, id)?;
        Ok(Outcome::Done { id: *id, version, position: at })
    }

    /// Counts accesses in place: no new version, no new position.
    fn touch(
        &mut self,
        tenant: &str,
        touches: &[(MemoryId, u64, UnixMs)],
        at: Position,
    ) -> Result<Outcome, StorageError> {
        for (id, count, last) in touches {
            let Some(held) = rows::find(self.db, tenant, id)? else { continue };
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
    fn upsert_edges(&mut self, tenant: &str, edges: &[Edge], at: Position) -> Result<Outcome, StorageError> {
        for edge in edges {
            if let Err(outcome) = self.current(tenant, &edge.source, None)? {
                return Ok(outcome);
            }
        }
        let number = rows::number_owner(self.db, &Owner::Shared { tenant: tenant.into() })?;
        for edge in edges {
            let key = (&edge.source, &edge.relation[..], &edge.target);
            if let Some(old) = graph::find(self.db, number, key)? {
                self.remove_edge(tenant, number, &old)?;
            }
            self.put_edge(tenant, number, edge)?;
        }
        Ok(Outcome::Done { id: [0; 16], version: 0, position: at })
    }

    /// Takes over an edge of a snapshot.
    pub fn restore_edge(&mut self, tenant: &str, edge: &Edge) -> Result<(), StorageError> {
        let number = rows::number_owner(self.db, &Owner::Shared { tenant: tenant.into() })?;
        self.put_edge(tenant, number, edge)
    }

    /// Writes an edge that is not there.
    fn put_edge(&mut self, tenant: &str, number: i64, edge: &Edge) -> Result<(), StorageError> {
        graph::put(self.db, number, edge)?;
        self.state.digest = self.state.digest.wrapping_add(graph::hash(tenant, edge));
        self.state.edges += 1;
        Ok(())
    }

    fn delete_edges(
        &mut self,
        tenant: &str,
        edges: &[(MemoryId, String, MemoryId)],
        at: Position,
    ) -> Result<Outcome, StorageError> {
        if let Some(number) = graph::tenant_number(self.db, tenant)? {
            for (source, relation, target) in edges {
                if let Some(old) = graph::find(self.db, number, (source, relation, target))? {
                    self.remove_edge(tenant, number, &old)?;
                }
            }
        }
        Ok(Outcome::Done { id: [0; 16], version: 0, position: at })
    }

    fn remove_edge(&mut self, tenant: &str, number: i64, edge: &Edge) -> Result<(), StorageError> {
        graph::remove(self.db, number, edge)?;
        self.state.digest = self.state.digest.wrapping_sub(graph::hash(tenant, edge));
        self.state.edges -= 1;
        Ok(())
    }

    /// Removes a memory's edges in both directions.
    fn remove_edges_of(&mut self, tenant: &str, id: &MemoryId) -> Result<(), StorageError> {
        if self.state.edges == 0 {
            return Ok(());
        }
        let Some(number) = graph::tenant_number(self.db, tenant)? else { return Ok(()) };
        for edge in graph::outbound(self.db, number, id)? {
            self.remove_edge(tenant, number, &edge)?;
        }
        if sim::planted!("leave-inbound-edges-behind") {
            return Ok(());
        }
        for edge in graph::inbound(self.db, number, id)? {
            self.remove_edge(tenant, number, &edge)?;
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
            gone.insert((memory.tenant, memory.id));
            Ok(())
        })?;
        rows::each(self.db, &only, ("tenant, id", 'h'), &mut |_, row| {
            gone.insert((row.get(0)?, row.get(1)?));
            Ok(())
        })?;
        for (tenant, id) in &gone {
            let place = rows::place(self.db, tenant, id)?;
            if place.is_some_and(|p| p.month == month) {
                rows::remove_place(self.db, tenant, id)?;
                self.remove_edges_of(tenant, id)?;
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
        rows::remove_memory(self.db, held.position, old)?;
        let (month, has_vector) = (Month::of(old.created), !held.vector.is_empty() as u64);
        self.take(month, rows::memory_hash("memories", &held))?;
        let of_month = self.month(month)?;
        of_month.memories -= 1;
        of_month.vectors -= has_vector;
        self.state.memories -= 1;
        self.state.vectors -= has_vector;
        let (position, dimension) = (held.position, held.vector.len() / 4);
        self.effects.push(Effect::Remove { memory: old.clone(), position, dimension });
        held.vector.clear();
        self.put_history(&held, old, old.version)
    }

    fn put_history(&mut self, row: &Stored, memory: &Memory, version: u64) -> Result<(), StorageError> {
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
    fn store(&mut self, row: &Stored, memory: &Memory) -> Result<(), StorageError> {
        let (month, has_vector) = (Month::of(memory.created), !row.vector.is_empty() as u64);
        let of_month = self.month(month)?;
        of_month.position = of_month.position.max(rows::unpack(row.epoch, row.position));
        of_month.hold(memory, has_vector);
        self.state.memories += 1;
        self.state.vectors += has_vector;
        rows::put_memory(self.db, row, memory)?;
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
        for row in rows::old_keys(self.db, before, limit)? {
            rows::remove_key(self.db, &row)?;
            self.state.digest = self.state.digest.wrapping_sub(rows::key_hash(&row));
            self.state.keys -= 1;
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
