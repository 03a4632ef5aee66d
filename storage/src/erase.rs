//! Erasing all that a person has: the right to be forgotten, in a shard.
//!
//! An erasure goes through all memories of a tenant in the order of their ids, by entries that each look at a bounded number of rows; how far it is stands in
//! the shard's list of erasures. Of whoever it is about it removes every version, with its words, fields, vectors and edges, whatever the memory's scope. What
//! stays of a memory:
//!
//! | what | why |
//! |---|---|
//! | its id and the number of its last version | versions never go backwards, so nothing that is older is taken for what comes after |
//! | one row of kind [`ChangeKind::Erased`] that says whose it was | a watcher and a cache are told; nothing else stands in it |
//! | idempotency keys of its writes, for their 24 hours | a retry of a write from before gets its first answer, and brings nothing back |
//!
//! Writes that come after are allowed, and begin a new life. A key that was never decided before the erasure is decided when it arrives, like any write.
//!
//! **The list** is part of the state: in the digest, in snapshots and bases. Whoever proposes an erasure again (after a lost answer, or in a new epoch that may
//! lack it) gets what the list says, if it is there. Else it is made again, and leaves what was written after the first time ([`Operation::Erase`], `before`). It does not move
//! with slots: no slots move while an erasure is under way, and of what was erased nothing is left to move.
//!
//! **Bytes.** SQLite overwrites what an erasure removes, but for terms in the index of words, which go when that is merged. Segments of vectors that have something
//! dead are made anew soon afterwards (after a restart: once a fifth of them is dead). The ledger and bases have their own lives.

use crate::apply::{Applier, Effect};
use crate::codec;
use crate::error::StorageError;
use crate::model::*;
use crate::records::months::suffix;
use crate::records::rows::{self, HISTORY, Place, Stored};
use crate::slots::Slot;
use rusqlite::params;

/// How long an erasure stands in the list, by ledger time.
pub const KEPT_MS: i64 = 400 * 24 * 60 * 60 * 1000;
/// Erasures that are forgotten in one entry at most.
const FORGOTTEN: usize = 64;

/// Whose memories go, and since when not.
struct Reach<'a> {
    tenant: &'a str,
    subject: &'a Subject,
    before: Option<Position>,
}

impl Reach<'_> {
    fn covers(&self, row: &Stored, memory: &Memory) -> bool {
        let at = rows::unpack(row.epoch, row.position);
        row.kind != ChangeKind::Erased as u8
            && self.before.is_none_or(|before| (at.epoch, at.index) < (before.epoch, before.index))
            && self.subject.covers(&memory.user, &memory.agent)
    }
}

impl Applier<'_> {
    /// Goes on with an erasure; how far it is.
    pub(crate) fn erase(
        &mut self,
        (tenant, subject): (&str, &Subject),
        id: ErasureId,
        (before, rows_max): (Option<Position>, usize),
        now: UnixMs,
        at: Position,
    ) -> Result<Outcome, StorageError> {
        let held = rows::find_erasure(self.db, id)?;
        if let Some(done) = held.as_ref().filter(|held| held.next.is_none()) {
            return Ok(Outcome::Erased { erasure: done.clone(), position: at });
        }
        let mut erasure = match &held {
            Some(held) => held.clone(),
            None => Erasure {
                id,
                tenant: tenant.into(),
                subject: subject.clone(),
                position: at,
                time: 0,
                memories: 0,
                versions: 0,
                next: Some(([0; 16], 0)),
            },
        };
        // What it began with is what it goes on with.
        let subject = erasure.subject.clone();
        let reach = Reach { tenant: &erasure.tenant.clone(), subject: &subject, before };
        self.overwrite(true)?;
        erasure.next = self.erase_some(&reach, &mut erasure, held.is_none(), rows_max, now, at)?;
        self.overwrite(false)?;
        if erasure.next.is_none() {
            self.effects.push(Effect::Erased);
        }
        (erasure.position, erasure.time) = (at, self.state.ledger_time);
        if let Some(held) = &held {
            self.unlist_erasure(held)?;
        }
        self.list_erasure(&erasure)?;
        for old in rows::old_erasures(self.db, self.state.ledger_time.saturating_sub(KEPT_MS), FORGOTTEN)? {
            self.unlist_erasure(&old)?;
        }
        Ok(Outcome::Erased { erasure, position: at })
    }

    /// Whether SQLite overwrites what is removed.
    fn overwrite(&self, on: bool) -> Result<(), StorageError> {
        let sql = if on { "PRAGMA secure_delete=ON" } else { "PRAGMA secure_delete=OFF" };
        self.db.query_row(sql, [], |_| Ok(()))?;
        Ok(())
    }

    /// Takes over an erasure of the list as it is.
    pub(crate) fn list_erasure(&mut self, erasure: &Erasure) -> Result<(), StorageError> {
        rows::put_erasure(self.db, erasure)?;
        self.state.digest = self.state.digest.wrapping_add(rows::erasure_hash(erasure));
        Ok(())
    }

    fn unlist_erasure(&mut self, erasure: &Erasure) -> Result<(), StorageError> {
        rows::remove_erasure(self.db, erasure.id)?;
        self.state.digest = self.state.digest.wrapping_sub(rows::erasure_hash(erasure));
        Ok(())
    }

    /// Erases what some of the tenant's places have; the last of these, `None` if there are no more.
    fn erase_some(
        &mut self,
        reach: &Reach<'_>,
        erasure: &mut Erasure,
        first: bool,
        rows_max: usize,
        now: UnixMs,
        at: Position,
    ) -> Result<Option<(MemoryId, Slot)>, StorageError> {
        let mut looked_at = 0;
        let (mut behind, mut ended) = (erasure.next.unwrap_or_default(), false);
        // The first place of all may have the least id.
        let mut first = first;
        while !ended {
            let batch = self.places_behind(reach.tenant, behind, first)?;
            first = false;
            ended = batch.is_empty();
            for (id, slot, place) in batch {
                looked_at += 1;
                let item = Position { item: self.next_item, ..at };
                let (looked, erased) = self.erase_place(reach, (&id, slot, place), now, item)?;
                looked_at += looked;
                if erased > 0 {
                    erasure.memories += 1;
                    erasure.versions += erased;
                    self.next_item += 1;
                }
                behind = (id, slot);
                if looked_at >= rows_max.max(1) || self.next_item + 1 >= rows::ITEMS_MAX {
                    return Ok(Some(behind));
                }
            }
        }
        Ok(None)
    }

    fn places_behind(
        &self,
        tenant: &str,
        (id, slot): (MemoryId, Slot),
        first: bool,
    ) -> Result<Vec<(MemoryId, Slot, Place)>, StorageError> {
        let than = if first { ">=" } else { ">" };
        let mut statement = self.db.prepare_cached(&format!(
            "SELECT id, slot, month, position, version FROM directory WHERE tenant = ?1 AND (id, slot) {than} (?2, ?3)
             ORDER BY id, slot LIMIT 256"
        ))?;
        let found = statement.query_map(params![tenant, &id[..], slot], |row| {
            let version = row.get::<_, i64>(4)? as u64;
            let place = Place { month: Month(row.get(2)?), position: row.get(3)?, version };
            Ok((row.get(0)?, row.get(1)?, place))
        })?;
        Ok(found.collect::<Result<_, _>>()?)
    }

    /// Erases what is the subject's of a memory: how many rows were looked at, and how many went.
    fn erase_place(
        &mut self,
        reach: &Reach<'_>,
        (id, slot, place): (&MemoryId, Slot, Place),
        now: UnixMs,
        at: Position,
    ) -> Result<(usize, u64), StorageError> {
        let (mut looked, mut erased) = (0, 0);
        let (mut last, mut version) = (None, place.version);
        if place.position != 0 {
            let row = rows::stored_at(self.db, place)?;
            let memory = rows::decode_body(&row.body)?;
            if reach.covers(&row, &memory) {
                self.unstore(&row, &memory)?;
                self.remember_dropped(&memory, row.position, at)?;
                self.remove_edges_of(reach.tenant, id, slot)?;
                let (position, dimension) = (row.position, row.vector.len() / 4);
                self.effects.push(Effect::Remove { memory: memory.clone(), position, dimension });
                if sim::planted!("leave-the-history-of-an-erased-memory") {
                    self.put_history(&Stored { vector: vec![], ..row }, &memory, memory.version)?;
                }
                erased += 1;
                version += 1;
                last = Some(memory);
            }
        }
        let mut marks = vec![];
        let months: Vec<Month> = self.months.keys().copied().collect();
        for month in months {
            let sql = format!(
                "SELECT {HISTORY} FROM h{} WHERE tenant = ?1 AND id = ?2 AND slot = ?3",
                suffix(month)
            );
            let found: Vec<Stored> = self
                .db
                .prepare_cached(&sql)?
                .query_map(params![reach.tenant, &id[..], slot], rows::stored)?
                .collect::<Result<_, _>>()?;
            looked += found.len();
            for row in found {
                let memory = rows::decode_body(&row.body)?;
                if row.kind == ChangeKind::Erased as u8 && memory.version + 1 == version {
                    marks.push((row, memory));
                    continue;
                }
                if !reach.covers(&row, &memory) || sim::planted!("leave-the-history-of-an-erased-memory") {
                    continue;
                }
                self.unput_history(&row, &memory)?;
                // A segment may have its vector, and the manifest not know that it is dead.
                self.remember_dropped(&memory, row.position, at)?;
                erased += 1;
                if place.position == 0 {
                    last.get_or_insert(memory);
                }
            }
        }
        if let Some(of) = last {
            // An erasure before may have left the row of the deletion that this one takes: the new mark stands for both.
            for (row, memory) in marks {
                self.unput_history(&row, &memory)?;
            }
            self.leave_mark(&of, (slot, version), now, at)?;
        }
        Ok((looked, erased))
    }

    /// What stays: that there was something, and whose.
    fn leave_mark(
        &mut self,
        of: &Memory,
        (slot, version): (Slot, u64),
        now: UnixMs,
        at: Position,
    ) -> Result<(), StorageError> {
        let memory = Memory {
            id: of.id,
            tenant: of.tenant.clone(),
            scope: of.scope,
            user: of.user.clone(),
            agent: of.agent.clone(),
            session: String::new(),
            text: String::new(),
            metadata: String::new(),
            kind: MemoryType::Semantic,
            status: Status::Archived,
            importance: 0.0,
            categories: vec![],
            links: vec![],
            event_time: None,
            valid_from: None,
            valid_to: None,
            created: now,
            updated: now,
            expires: None,
            access_count: 0,
            last_access: None,
            version: version.saturating_sub(1),
            space: String::new(),
            tier: of.tier,
            vector: vec![],
        };
        let row = Stored {
            epoch: at.epoch,
            position: rows::pack(at),
            kind: ChangeKind::Erased as u8,
            body: codec::encode(&memory),
            vector: vec![],
        };
        self.put_history(&row, &memory, version)?;
        let place = Place { month: Month::of(now), position: 0, version };
        rows::put_place(self.db, &memory.tenant, &memory.id, slot, place)
    }
}
