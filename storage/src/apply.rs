//! Applying the ledger: a pure function of the state before and the entry, run inside one transaction.
//!
//! Idempotency and expected versions are decided here, the only place that cannot race. Nothing here looks at a clock
//! or draws a random number.

use crate::codec;
use crate::error::StorageError;
use crate::model::*;
use crate::records::rows::{self, KeyRow, State, Stored};
use rusqlite::Connection;

/// How long an idempotency key is remembered, in milliseconds of ledger time.
pub const KEY_LIFE_MS: i64 = 24 * 60 * 60 * 1000;
/// Old keys forgotten per entry beyond two per command: bounded work that keeps up with any batch.
const KEYS_PURGED: usize = 64;

/// What the vector view and the cache must do once the transaction is committed.
pub enum Effect {
    /// The memory without its vector, and the vector.
    Put { memory: Memory, vector: Vec<f32> },
    /// The memory as it was, and how long its vector was.
    Remove { memory: Memory, dimension: usize },
}

/// One transaction's work.
pub struct Applier<'a> {
    pub db: &'a Connection,
    pub state: State,
    pub effects: Vec<Effect>,
}

impl Applier<'_> {
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
        if key.is_empty() {
            return self.operation(command, at);
        }
        if let Some(row) = rows::find_key(self.db, &command.tenant, key)? {
            if row.hash != command.request_hash {
                return Ok(Outcome::KeyReused);
            }
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
        self.add(rows::key_hash(&row));
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
        }
    }

    fn add_memory(&mut self, tenant: &str, memory: &Memory, at: Position) -> Result<Outcome, StorageError> {
        // No writer asks for this; were one to, nobody may see another tenant's memory for it.
        if memory.tenant != tenant || (memory.scope == Scope::Global && tenant != GLOBAL_TENANT) {
            return Ok(Outcome::NotFound { id: memory.id });
        }
        if let Some(held) = rows::find_body(self.db, &memory.tenant, &memory.id)? {
            let old = rows::decode_body(&held)?;
            if !old.expired(self.state.ledger_time) {
                return Ok(Outcome::AlreadyExists { id: memory.id, version: old.version });
            }
            if let Some(held) = rows::find(self.db, tenant, &memory.id)? {
                self.retire(held, &old)?;
                self.state.memories -= 1;
            }
        }
        // Versions never go backwards: one that was deleted goes on where it ended.
        let version = rows::last_version(self.db, &memory.tenant, &memory.id)? + 1;
        let id = memory.id;
        let memory = Memory { version, ..memory.clone() };
        self.put(memory, ChangeKind::Added as u8, at.epoch, rows::pack(at))?;
        self.state.memories += 1;
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
        if expected.is_some_and(|e| e != memory.version) {
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
        new.updated = now;
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
        self.state.memories -= 1;
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
            self.take(rows::memory_hash("memories", &held));
            memory.access_count = memory.access_count.saturating_add(*count);
            memory.last_access = memory.last_access.max(Some(*last));
            memory.vector = rows::vector_from(&held.vector);
            rows::remove_memory(self.db, held.position)?;
            self.put(memory, held.kind, held.epoch, held.position)?;
        }
        Ok(Outcome::Done { id: [0; 16], version: 0, position: at })
    }

    /// Moves the current row into the history.
    fn retire(&mut self, mut held: Stored, old: &Memory) -> Result<(), StorageError> {
        rows::remove_memory(self.db, held.position)?;
        self.take(rows::memory_hash("memories", &held));
        self.effects.push(Effect::Remove { memory: old.clone(), dimension: held.vector.len() / 4 });
        held.vector.clear();
        self.put_history(&held, old, old.version)
    }

    fn put_history(&mut self, row: &Stored, memory: &Memory, version: u64) -> Result<(), StorageError> {
        rows::put_history(self.db, row, memory, version)?;
        self.add(rows::memory_hash("history", row));
        Ok(())
    }

    fn put(&mut self, mut memory: Memory, kind: u8, epoch: u64, position: i64) -> Result<(), StorageError> {
        let vector = std::mem::take(&mut memory.vector);
        let body = codec::encode(&memory);
        let row = Stored { epoch, position, kind, body, vector: rows::vector_bytes(&vector) };
        rows::put_memory(self.db, &row, &memory)?;
        self.add(rows::memory_hash("memories", &row));
        self.effects.push(Effect::Put { memory, vector });
        Ok(())
    }

    fn forget_old_keys(&mut self, limit: usize) -> Result<(), StorageError> {
        let before = self.state.ledger_time.saturating_sub(KEY_LIFE_MS);
        for row in rows::old_keys(self.db, before, limit)? {
            rows::remove_key(self.db, &row)?;
            self.take(rows::key_hash(&row));
            self.state.keys -= 1;
        }
        Ok(())
    }

    fn add(&mut self, hash: u128) {
        self.state.digest = self.state.digest.wrapping_add(hash);
    }

    fn take(&mut self, hash: u128) {
        self.state.digest = self.state.digest.wrapping_sub(hash);
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
