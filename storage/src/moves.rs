//! What a move of slots takes from one shard to another ([`crate::slots`]), and how it is read, taken over and removed.
//!
//! The source reads its sealed slots in one fixed order ([`read`]), which depends on nothing but the ledger, so that every replica gives the same
//! parts for the same cursors, and a driver may ask one replica now and another one later:
//!
//! | | of each slot | order |
//! |---|---|---|
//! | rows | memories with their vectors, superseded versions, deletions | as the ledger made them: a memory's history comes before it |
//! | places | where deleted memories were, with the versions they ended at | tenant, id |
//! | edges | by their source's slot | tenant, source, relation, target |
//! | keys | idempotency keys by the slot that their command was about | tenant, key |
//!
//! A row becomes a *piece*: bytes that say nothing of where the source had it. The destination gives each piece a position of its own, in the entry that
//! brings it, one item a piece; so do the outcomes under keys, which name positions that a client may ask to see. What arrives is stored, counted and
//! part of the digest like any row, but not shown before it is adopted. A watcher is told of it then, at its new positions, unless it has already
//! been told of something behind those.
//!
//! Removing walks the same order, and keeps in the state how far it is.

use crate::apply::{Applier, Effect};
use crate::codec;
use crate::error::StorageError;
use crate::graph::{self, EDGE, EdgeRow};
use crate::model::*;
use crate::records::months::{self, Months, suffix};
use crate::records::rows::{self, HISTORY, KEY, KeyRow, MEMORY, Place, Stored};
use crate::shard::Shard;
use crate::slots::{Decision, MoveId, Moving, Ranges, Slot, SlotSet};
use crate::vectors::Coded;
use crate::vectors::rows::Kind;
use bincode::{Decode, Encode};
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::BTreeSet;

/// Rows looked for at once.
const BATCH: i64 = 256;
/// So many rows of a tenant are looked through for the slots that it uses.
const LOOKED_THROUGH: i64 = 10_000;

/// A part of what a sealed move takes along.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Leaving {
    pub pieces: Vec<Vec<u8>>,
    /// Sum of the pieces' hashes, modulo 2¹²⁸.
    pub hash: u128,
    /// Where the next part begins.
    pub cursor: Vec<u8>,
    /// Nothing follows.
    pub end: bool,
}

/// A piece: a row of a slot, without the source's position.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
enum Piece {
    Memory { kind: u8, body: Vec<u8>, vector: Vec<u8> },
    History { kind: u8, version: u64, body: Vec<u8> },
    Deleted { tenant: String, id: MemoryId, slot: Slot, month: Month, version: u64 },
    Edge(EdgeRow),
    Key(KeyRow),
}

/// How far slots were read: behind this row.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub(crate) enum At {
    Rows { slot: Slot, position: i64 },
    Places { slot: Slot, tenant: String, id: Vec<u8> },
    Edges { slot: Slot, tenant: String, source: Vec<u8>, relation: String, target: Vec<u8> },
    Keys { slot: Slot, tenant: String, key: String },
    End,
}

impl Default for At {
    fn default() -> At {
        At::Rows { slot: 0, position: 0 }
    }
}

/// What is left to remove of what was released.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Dropping {
    pub(crate) rows: u64,
    at: At,
}

/// A row of a slot.
enum Found {
    Memory(Stored),
    History { version: u64, row: Stored },
    Deleted { tenant: String, id: MemoryId, slot: Slot, place: Place },
    Edge(EdgeRow),
    Key(KeyRow),
}

/// A piece's part of the sum of hashes.
pub fn piece_hash(piece: &[u8]) -> u128 {
    rows::hash_of(b"piece", piece)
}

/// The names of all tables that have rows of memories.
fn tables(months: &Months) -> impl Iterator<Item = (char, Month)> + '_ {
    months.keys().flat_map(|month| [('m', *month), ('h', *month)])
}

/// The slots that may have rows of a move. Of tenants' own slots only those in which they have something: they are few among all who share
/// those slots, unless the tenant is large.
pub(crate) fn touched(db: &Connection, slots: &SlotSet) -> Result<Ranges, StorageError> {
    let mut touched = slots.everybody().clone();
    for (tenant, own) in slots.apart() {
        let number = graph::tenant_number(db, tenant)?;
        let mut statement = db.prepare_cached(
            "SELECT slot FROM directory WHERE tenant = ?1 UNION ALL SELECT slot FROM keys WHERE tenant = ?1
             UNION ALL SELECT slot FROM edges WHERE tenant = ?2 LIMIT ?3",
        )?;
        let mut found = statement.query(params![tenant, number, LOOKED_THROUGH])?;
        let (mut rows, mut some) = (0, BTreeSet::new());
        while let Some(row) = found.next()? {
            rows += 1;
            some.insert(row.get::<_, Slot>(0)?);
        }
        let some = some.into_iter().filter(|slot| own.contains(*slot)).collect();
        touched = touched.union(if rows < LOOKED_THROUGH { &some } else { own });
    }
    Ok(touched)
}

/// Whether a row is one of those that a move takes along.
fn taken_along(slots: &SlotSet, tenant: &str, slot: Slot) -> bool {
    slots.contains(tenant, slot)
        || sim::planted!("move-a-pinned-tenants-memories-with-their-slots")
            && slots.everybody().contains(slot)
}

/// The first slot of a set, from one on, that has rows in one of some tables; each is given as `TABLE` or `TABLE WHERE CONDITION AND`.
fn next_slot(
    db: &Connection,
    slots: &Ranges,
    from: Slot,
    tables: &[String],
) -> Result<Option<Slot>, StorageError> {
    for (first, last) in slots.pairs().iter().filter(|(_, last)| *last >= from) {
        let mut least: Option<Slot> = None;
        for table in tables {
            let sql = format!("SELECT slot FROM {table} slot BETWEEN ?1 AND ?2 ORDER BY slot LIMIT 1");
            let last = least.unwrap_or(*last);
            let found = db
                .prepare_cached(&sql)?
                .query_row([*first.max(&from), last], |row| row.get::<_, Slot>(0))
                .optional()?;
            least = found.or(least);
        }
        if least.is_some() {
            return Ok(least);
        }
    }
    Ok(None)
}

/// Gives the rows of some slots behind `at` to `take`, in the fixed order, until it takes one no more; where the last one that was taken is.
fn read(
    db: &Connection,
    months: &Months,
    slots: &SlotSet,
    mut at: At,
    take: &mut dyn FnMut(Found) -> Result<bool, StorageError>,
) -> Result<At, StorageError> {
    let rows: Vec<String> =
        tables(months).map(|(table, month)| format!("{table}{} WHERE", suffix(month))).collect();
    let places = ["directory WHERE position = 0 AND".to_string()];
    let (edges, keys) = (["edges WHERE".to_string()], ["keys WHERE".to_string()]);
    let touched = touched(db, slots)?;
    loop {
        // Of this slot, then of the next one that has some, then of the next kind.
        let (went_on, stopped) = batch(db, months, (slots, &touched), &mut at, take)?;
        if stopped {
            return Ok(at);
        }
        if went_on {
            continue;
        }
        let (slot, tables) = match &at {
            At::Rows { slot, .. } => (*slot, &rows[..]),
            At::Places { slot, .. } => (*slot, &places[..]),
            At::Edges { slot, .. } => (*slot, &edges[..]),
            At::Keys { slot, .. } => (*slot, &keys[..]),
            At::End => return Ok(at),
        };
        let next = next_slot(db, &touched, slot + 1, tables)?;
        let (text, blob) = (String::new, Vec::new);
        let places = |slot| At::Places { slot, tenant: text(), id: blob() };
        let edges =
            |slot| At::Edges { slot, tenant: text(), source: blob(), relation: text(), target: blob() };
        let keys = |slot| At::Keys { slot, tenant: text(), key: text() };
        at = match (&at, next) {
            (At::Rows { .. }, Some(slot)) => At::Rows { slot, position: 0 },
            (At::Rows { .. }, None) => places(0),
            (At::Places { .. }, Some(slot)) => places(slot),
            (At::Places { .. }, None) => edges(0),
            (At::Edges { .. }, Some(slot)) => edges(slot),
            (At::Edges { .. }, None) => keys(0),
            (At::Keys { .. }, Some(slot)) => keys(slot),
            (At::Keys { .. } | At::End, None) | (At::End, Some(_)) => At::End,
        };
    }
}

/// Some rows of one kind and slot: whether there were any, and whether one was not taken. Those of tenants that do not move are passed over.
fn batch(
    db: &Connection,
    months: &Months,
    (slots, touched): (&SlotSet, &Ranges),
    at: &mut At,
    take: &mut dyn FnMut(Found) -> Result<bool, StorageError>,
) -> Result<(bool, bool), StorageError> {
    let mut any = false;
    macro_rules! offer {
        ($tenant:expr, $slot:expr, $found:expr, $behind:expr) => {
            any = true;
            if taken_along(slots, $tenant, $slot) && !take($found)? {
                return Ok((any, true));
            }
            *at = $behind;
        };
    }
    match at.clone() {
        At::Rows { slot, position } if touched.contains(slot) => {
            let mut found: Vec<(i64, char, Month, String)> = vec![];
            for (table, month) in tables(months) {
                let of = format!("{table}{}", suffix(month));
                let tenant = match table {
                    'm' => format!("(SELECT tenant FROM owners WHERE number = {of}.owner)"),
                    _ => "tenant".to_string(),
                };
                let sql = format!(
                    "SELECT position, {tenant} FROM {of} WHERE slot = ?1 AND position > ?2 ORDER BY position LIMIT ?3"
                );
                let mut statement = db.prepare_cached(&sql)?;
                let mut rows = statement.query(params![slot, position, BATCH])?;
                while let Some(row) = rows.next()? {
                    found.push((row.get(0)?, table, month, row.get(1)?));
                }
            }
            found.sort_unstable();
            found.truncate(BATCH as usize);
            for (position, table, month, tenant) in found {
                let of = suffix(month);
                let row = || match table {
                    'm' => {
                        let sql = format!("SELECT {MEMORY} FROM m{of} WHERE position = ?1");
                        db.prepare_cached(&sql)?.query_row([position], rows::stored).map(Found::Memory)
                    }
                    _ => {
                        let sql = format!("SELECT {HISTORY}, version FROM h{of} WHERE position = ?1");
                        db.prepare_cached(&sql)?.query_row([position], |row| {
                            let version = row.get::<_, i64>(5)? as u64;
                            Ok(Found::History { version, row: rows::stored(row)? })
                        })
                    }
                };
                offer!(&tenant, slot, row()?, At::Rows { slot, position });
            }
        }
        At::Places { slot, tenant, id } if touched.contains(slot) => {
            let mut statement = db.prepare_cached(
                "SELECT tenant, id, month, version FROM directory
                 WHERE position = 0 AND slot = ?1 AND (tenant, id) > (?2, ?3) ORDER BY tenant, id LIMIT ?4",
            )?;
            let mut found = statement.query(params![slot, tenant, id, BATCH])?;
            while let Some(row) = found.next()? {
                let (tenant, id): (String, MemoryId) = (row.get(0)?, row.get(1)?);
                let version = row.get::<_, i64>(3)? as u64;
                let place = Place { month: Month(row.get(2)?), position: 0, version };
                let behind = At::Places { slot, tenant: tenant.clone(), id: id.to_vec() };
                offer!(&tenant.clone(), slot, Found::Deleted { tenant, id, slot, place }, behind);
            }
        }
        At::Edges { slot, tenant, source, relation, target } if touched.contains(slot) => {
            // Tenants in the order of their names: their numbers are this replica's own. Without a source, all of the tenant's are behind us.
            let Some((number, of)) = tenants_of(db, slot)?.into_iter().find_map(|(name, number)| {
                (name > tenant || name == tenant && !source.is_empty()).then_some((number, name))
            }) else {
                return Ok((false, false));
            };
            let after = if of == tenant { (source, relation, target) } else { Default::default() };
            let sql = format!(
                "SELECT {EDGE} FROM edges WHERE slot = ?1 AND tenant = ?2 AND (source, relation, target) > (?3, ?4, ?5)
                 ORDER BY source, relation, target LIMIT ?6"
            );
            let mut statement = db.prepare_cached(&sql)?;
            let mut found = statement.query(params![slot, number, after.0, after.1, after.2, BATCH])?;
            while let Some(row) = found.next()? {
                let edge = graph::edge(row)?;
                let behind = At::Edges {
                    slot,
                    tenant: of.clone(),
                    source: edge.source.to_vec(),
                    relation: edge.relation.clone(),
                    target: edge.target.to_vec(),
                };
                offer!(&of, slot, Found::Edge(EdgeRow { tenant: of.clone(), slot, edge }), behind);
            }
            if !any {
                // This tenant's are all read.
                *at = At::Edges { slot, tenant: of, source: vec![], relation: String::new(), target: vec![] };
                any = true;
            }
        }
        At::Keys { slot, tenant, key } if touched.contains(slot) => {
            let mut statement = db.prepare_cached(&format!(
                "SELECT {KEY} FROM keys WHERE slot = ?1 AND (tenant, key) > (?2, ?3) ORDER BY tenant, key LIMIT ?4"
            ))?;
            let mut found = statement.query(params![slot, tenant, key, BATCH])?;
            while let Some(row) = found.next()? {
                let row = rows::key_row(row)?;
                let behind = At::Keys { slot, tenant: row.tenant.clone(), key: row.key.clone() };
                offer!(&row.tenant.clone(), slot, Found::Key(row), behind);
            }
        }
        _ => {}
    }
    Ok((any, false))
}

/// The tenants that have edges in a slot, by name, with their numbers.
fn tenants_of(db: &Connection, slot: Slot) -> Result<Vec<(String, i64)>, StorageError> {
    let mut found = vec![];
    let mut number = i64::MIN;
    let mut statement = db.prepare_cached(
        "SELECT tenant, (SELECT owner FROM owners WHERE number = edges.tenant) FROM edges
         WHERE slot = ?1 AND tenant > ?2 ORDER BY tenant LIMIT 1",
    )?;
    while let Some((next, owner)) = statement
        .query_row(params![slot, number], |row| Ok((row.get(0)?, row.get::<_, Vec<u8>>(1)?)))
        .optional()?
    {
        number = next;
        found.push((graph::tenant_of(&owner)?, number));
    }
    found.sort_unstable();
    Ok(found)
}

/// How many rows some slots have, those of tenants that do not move included.
fn count(db: &Connection, months: &Months, slots: &SlotSet) -> Result<u64, StorageError> {
    let mut from: Vec<String> =
        tables(months).map(|(table, month)| format!("{table}{} WHERE", suffix(month))).collect();
    from.extend(["directory WHERE position = 0 AND", "edges WHERE", "keys WHERE"].map(String::from));
    let mut rows = 0;
    for (first, last) in touched(db, slots)?.pairs() {
        for table in &from {
            let sql = format!("SELECT count(*) FROM {table} slot BETWEEN ?1 AND ?2");
            rows += db.prepare_cached(&sql)?.query_row([*first, *last], |row| row.get::<_, i64>(0))? as u64;
        }
    }
    Ok(rows)
}

/// The piece of a row. An outcome's position is the source's: it goes without.
fn piece_of(found: Found) -> Result<Piece, StorageError> {
    Ok(match found {
        Found::Memory(row) => Piece::Memory { kind: row.kind, body: row.body, vector: row.vector },
        Found::History { version, row } => Piece::History { kind: row.kind, version, body: row.body },
        Found::Deleted { tenant, id, slot, place } => {
            Piece::Deleted { tenant, id, slot, month: place.month, version: place.version }
        }
        Found::Edge(row) => Piece::Edge(row),
        Found::Key(row) => Piece::Key(placed(row, Position::default())?),
    })
}

/// The key with an outcome of another position.
fn placed(mut row: KeyRow, at: Position) -> Result<KeyRow, StorageError> {
    let mut outcome = codec::decode(&row.outcome).map_err(StorageError::corrupt("a remembered outcome"))?;
    if let Outcome::Done { position, .. } = &mut outcome {
        *position = at;
        row.outcome = codec::encode(&outcome);
    }
    Ok(row)
}

impl Shard {
    /// A part of what a sealed move takes along, of about `bytes_max` bytes and at least one piece, behind a part that gave `cursor` (empty: from
    /// the start). Equal on every replica that has applied the seal. An error of kind [`StorageError::Move`] if that move is not leaving
    /// here, or the cursor is none of ours.
    pub fn leaving(&self, id: MoveId, cursor: &[u8], bytes_max: usize) -> Result<Leaving, StorageError> {
        let reader = self.records.reader();
        let snapshot = reader.unchecked_transaction()?;
        let state = rows::load_state(&snapshot)?;
        let slots = match state.slots.moving() {
            Some((of, Moving::Leaving(slots))) if of == id => slots.clone(),
            _ => return Err(StorageError::Move(format!("move {id} is not leaving this shard"))),
        };
        let from = match cursor {
            [] => At::default(),
            cursor => codec::decode(cursor)
                .map_err(|e| StorageError::Move(format!("the cursor of move {id} is unreadable: {e}")))?,
        };
        let (mut part, mut bytes) = (Leaving::default(), 0);
        let at = read(&snapshot, &months::load(&snapshot)?, &slots, from, &mut |found| {
            if sim::planted!("leave-the-keys-behind-in-a-move") && matches!(found, Found::Key(_)) {
                return Ok(true);
            }
            let piece = codec::encode(&piece_of(found)?);
            if !part.pieces.is_empty() && bytes + piece.len() > bytes_max {
                return Ok(false);
            }
            bytes += piece.len();
            part.hash = part.hash.wrapping_add(piece_hash(&piece));
            part.pieces.push(piece);
            Ok(true)
        })?;
        part.end = at == At::End;
        part.cursor = codec::encode(&at);
        Ok(part)
    }
}

impl Applier<'_> {
    /// Applies a step of a move.
    pub(crate) fn step(&mut self, step: &MoveStep, at: Position) -> Result<Outcome, StorageError> {
        let slots = &self.state.slots;
        let mut done = Outcome::Done { id: [0; 16], version: 0, position: at };
        let decision = match step {
            MoveStep::Own { slots: own } => slots.own(own),
            MoveStep::Seal { id, slots: some } => slots.seal(*id, some),
            MoveStep::Import { id, slots: some, sequence, pieces, cursor } => {
                let hash = pieces.iter().fold(0u128, |sum, piece| sum.wrapping_add(piece_hash(piece)));
                slots.import(*id, some, *sequence, (pieces.len() as u64, hash, cursor))
            }
            MoveStep::Adopt { id, slots: some, pieces, hash } => slots.adopt(*id, some, *pieces, *hash),
            MoveStep::Release { id } => slots.release(*id),
            MoveStep::Drop { id, .. } => slots.dropped(*id),
        };
        let new = match decision {
            Decision::Taken(new) => new,
            Decision::Already => return Ok(done),
            Decision::Refused => return Ok(Outcome::MoveRefused),
        };
        match step {
            // What lies in other slots would never be shown again, nor removed.
            MoveStep::Own { .. } if !self.is_empty()? => return Ok(Outcome::MoveRefused),
            MoveStep::Own { .. } | MoveStep::Seal { .. } => {}
            MoveStep::Import { slots, pieces, .. } => {
                let Some(pieces) = self.sound(slots, pieces)? else { return Ok(Outcome::MoveRefused) };
                for piece in pieces {
                    let at = Position { item: self.next_item, ..at };
                    self.next_item += 1;
                    self.arrive(piece, at)?;
                }
            }
            // The cache may know that something of these slots was deleted when they were here before.
            MoveStep::Adopt { .. } => self.effects.push(Effect::ForgetRecords),
            MoveStep::Release { .. } => {
                if let Some((_, Moving::Left(slots))) = new.moving() {
                    let rows = count(self.db, &self.months, slots)?;
                    self.state.dropping = Some(Dropping { rows, at: At::default() });
                }
            }
            MoveStep::Drop { rows_max, .. } => {
                let left = self.drop_some(*rows_max as usize, at)?;
                if left > 0 {
                    if let Outcome::Done { version, .. } = &mut done {
                        *version = left;
                    }
                    return Ok(done);
                }
                // Nothing is hidden from now on, so nothing that is gone may be known.
                self.effects.push(Effect::ForgetRecords);
            }
        }
        self.state.slots = new;
        self.state.slots_changed += 1;
        Ok(done)
    }

    /// Whether nothing was ever stored here.
    fn is_empty(&self) -> Result<bool, StorageError> {
        let places: bool = self
            .db
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM directory)")?
            .query_row([], |row| row.get(0))?;
        Ok(!places && self.months.is_empty() && self.state.keys == 0 && self.state.edges == 0)
    }

    /// The pieces of an import, if each can be read, belongs to its slots, and is not there yet; a memory's history comes before it.
    fn sound(&self, slots: &SlotSet, pieces: &[Vec<u8>]) -> Result<Option<Vec<Piece>>, StorageError> {
        if self.next_item as usize + pieces.len() >= rows::ITEMS_MAX as usize {
            return Ok(None);
        }
        let mut seen = BTreeSet::new();
        let mut sound = Vec::with_capacity(pieces.len());
        for bytes in pieces {
            let Ok(piece) = codec::decode::<Piece>(bytes) else { return Ok(None) };
            if !self.is_sound(slots, &piece, &mut seen)? {
                return Ok(None);
            }
            sound.push(piece);
        }
        Ok(Some(sound))
    }

    fn is_sound(
        &self,
        slots: &SlotSet,
        piece: &Piece,
        seen: &mut BTreeSet<(u8, Slot, Vec<u8>)>,
    ) -> Result<bool, StorageError> {
        let db = self.db;
        let new_place = |tenant: &str, id: &MemoryId, slot: Slot| -> Result<bool, StorageError> {
            Ok(taken_along(slots, tenant, slot) && rows::place(db, tenant, id, slot)?.is_none())
        };
        let place_key = |tenant: &str, id: &MemoryId, slot| (0, slot, codec::encode(&(tenant, id)));
        let memory_of = |body: &[u8]| {
            let memory = codec::decode::<Memory>(body).ok()?;
            let own = memory.scope != Scope::Global || memory.tenant == GLOBAL_TENANT;
            (own && memory.vector.is_empty() && memory.version > 0).then_some(memory)
        };
        Ok(match piece {
            Piece::Memory { kind, body, vector } => {
                let Some(memory) = memory_of(body) else { return Ok(false) };
                let slot = memory.slot();
                matches!(kind, 1 | 2)
                    && vector.len().is_multiple_of(4)
                    && vector.len() <= 4 * DIMENSION_MAX
                    && rows::vector_from(vector).iter().all(|x| x.is_finite())
                    && new_place(&memory.tenant, &memory.id, slot)?
                    && seen.insert(place_key(&memory.tenant, &memory.id, slot))
            }
            Piece::History { kind, version, body } => {
                let Some(memory) = memory_of(body) else { return Ok(false) };
                let slot = memory.slot();
                let gone = [ChangeKind::Deleted, ChangeKind::Erased].map(|gone| gone as u8);
                let deleted = gone.contains(kind) as u64;
                matches!(kind, 1..=4)
                    && memory.version.checked_add(deleted) == Some(*version)
                    && new_place(&memory.tenant, &memory.id, slot)?
                    && !seen.contains(&place_key(&memory.tenant, &memory.id, slot))
            }
            Piece::Deleted { tenant, id, slot, version, .. } => {
                *version > 0 && new_place(tenant, id, *slot)? && seen.insert(place_key(tenant, id, *slot))
            }
            Piece::Edge(EdgeRow { tenant, slot, edge }) => {
                let there = match graph::tenant_number(db, tenant)? {
                    Some(number) => {
                        let key = (&edge.source, &edge.relation[..], &edge.target);
                        graph::find(db, (*slot, number), key)?.is_some()
                    }
                    None => false,
                };
                let key = codec::encode(&(tenant, edge.source, &edge.relation, edge.target));
                taken_along(slots, tenant, *slot)
                    && edge.weight.is_finite()
                    && !edge.relation.is_empty()
                    && !there
                    && seen.insert((1, *slot, key))
            }
            Piece::Key(row) => {
                let held = rows::find_keys(db, &row.tenant, &row.key)?;
                taken_along(slots, &row.tenant, row.slot)
                    && !row.key.is_empty()
                    && codec::decode::<Outcome>(&row.outcome).is_ok()
                    && held.iter().all(|held| held.slot != row.slot)
                    && seen.insert((2, row.slot, codec::encode(&(&row.tenant, &row.key))))
            }
        })
    }

    /// Stores a sound piece.
    fn arrive(&mut self, piece: Piece, at: Position) -> Result<(), StorageError> {
        let (epoch, position) = (at.epoch, rows::pack(at));
        match piece {
            Piece::Memory { kind, body, vector } => {
                let memory = rows::decode_body(&body)?;
                let row = Stored { epoch, position, kind, body, vector };
                self.store(&row, &memory)?;
                if !row.vector.is_empty() {
                    let coded = Coded::new(&memory, position, rows::vector_from(&row.vector));
                    self.effects.push(Effect::Arrive { coded });
                }
            }
            Piece::History { kind, version, body } => {
                let memory = rows::decode_body(&body)?;
                let row = Stored { epoch, position, kind, body, vector: vec![] };
                self.put_history(&row, &memory, version)?;
            }
            Piece::Deleted { tenant, id, slot, month, version } => {
                rows::put_place(self.db, &tenant, &id, slot, Place { month, position: 0, version })?;
            }
            Piece::Edge(row) => self.restore_edge(&row)?,
            Piece::Key(row) => self.restore_key(&placed(row, at)?)?,
        }
        Ok(())
    }

    /// Removes some rows of what was released; how many are left.
    fn drop_some(&mut self, rows_max: usize, at: Position) -> Result<u64, StorageError> {
        let Some((_, Moving::Left(slots))) = self.state.slots.moving() else { return Ok(0) };
        let slots = slots.clone();
        let Some(dropping) = self.state.dropping.take() else { return Ok(0) };
        let mut some = vec![];
        let to = read(self.db, &self.months, &slots, dropping.at, &mut |found| {
            let wanted = some.len() < rows_max.max(1);
            if wanted {
                some.push(found);
            }
            Ok(wanted)
        })?;
        let rows = dropping.rows.saturating_sub(some.len() as u64);
        for found in some {
            self.drop_row(found, at)?;
        }
        if to == At::End {
            return Ok(0);
        }
        self.state.dropping = Some(Dropping { rows: rows.max(1), at: to });
        Ok(rows.max(1))
    }

    fn drop_row(&mut self, found: Found, at: Position) -> Result<(), StorageError> {
        match found {
            Found::Memory(row) => {
                let memory = rows::decode_body(&row.body)?;
                self.unstore(&row, &memory)?;
                rows::remove_place(self.db, &memory.tenant, &memory.id, memory.slot())?;
                self.remember_dropped(&memory, row.position, at)?;
                let dimension = row.vector.len() / 4;
                if dimension > 0 {
                    self.effects.push(Effect::Leave { memory, position: row.position, dimension });
                }
                Ok(())
            }
            Found::History { row, .. } => {
                let memory = rows::decode_body(&row.body)?;
                // It may have died since the last seal, which nothing else will tell.
                self.remember_dropped(&memory, row.position, at)?;
                self.unput_history(&row, &memory)
            }
            Found::Deleted { tenant, id, slot, .. } => rows::remove_place(self.db, &tenant, &id, slot),
            Found::Edge(row) => {
                let Some(number) = graph::tenant_number(self.db, &row.tenant)? else { return Ok(()) };
                self.remove_edge(number, &row)
            }
            Found::Key(row) => self.forget_key(&row),
        }
    }

    /// Names a version that goes with its slot for the vector view: a segment may have its vector, and the manifest not know that it is dead.
    pub(crate) fn remember_dropped(
        &self,
        memory: &Memory,
        position: i64,
        at: Position,
    ) -> Result<(), StorageError> {
        let kind = Kind { owner: memory.owner(), space: memory.space.clone(), dimension: 0 };
        self.db
            .prepare_cached(
                "INSERT INTO dropped (at, month, kind, id, position) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![
                rows::pack(at),
                Month::of(memory.created).0,
                codec::encode(&kind),
                memory.id,
                position
            ])?;
        Ok(())
    }
}
