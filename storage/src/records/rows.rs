//! Rows of the records view, read and written.

use super::months::{Months, suffix};
use super::{fields, words};
use crate::codec;
use crate::error::StorageError;
use crate::model::*;
use crate::moves::Dropping;
use crate::slots::{SLOTS, Slot, Slots, slot_of};
use bincode::{Decode, Encode};
use rusqlite::{Connection, OptionalExtension, Row, params};

/// Items of one entry fit into this many bits of a stored position.
const ITEM_BITS: u32 = 20;
/// Items of an entry are less than this; the greatest that fits stands for the entry's end.
pub const ITEMS_MAX: u32 = (1 << ITEM_BITS) - 1;
/// The slot of a key that was about no memory: it is in no move.
pub const STAYS: Slot = SLOTS;

pub fn pack(position: Position) -> i64 {
    ((position.index << ITEM_BITS) | position.item.min((1 << ITEM_BITS) - 1) as u64) as i64
}

pub fn unpack(epoch: u64, packed: i64) -> Position {
    let packed = packed as u64;
    Position { epoch, index: packed >> ITEM_BITS, item: (packed & ((1 << ITEM_BITS) - 1)) as u32 }
}

/// How far the ledger is applied, and what follows from it.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct State {
    pub position: Position,
    /// Opaque to the store: the ledger's own position and membership.
    pub meta: Vec<u8>,
    /// Sum of the hashes of all rows: independent of their order.
    pub digest: u128,
    /// The latest calendar time that a command carried; keys age by it.
    pub ledger_time: UnixMs,
    pub memories: u64,
    pub vectors: u64,
    pub keys: u64,
    pub edges: u64,
    pub slots: Slots,
    /// How often they have changed.
    pub slots_changed: u64,
    /// How far the removal is of what was released.
    pub dropping: Option<Dropping>,
}

impl State {
    /// The digest of all that replicas must agree on: the rows', and which slots are whose.
    pub fn whole_digest(&self) -> u128 {
        self.digest.wrapping_add(slots_hash(&self.slots))
    }

    /// Whether two states tell of the same rows.
    pub fn same_rows(&self, other: &State) -> bool {
        let rows = |s: &State| (s.digest, s.memories, s.vectors, s.keys, s.edges);
        rows(self) == rows(other)
    }
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct KeyRow {
    pub tenant: String,
    pub key: String,
    /// Of the memory that its command was about, or [`STAYS`].
    pub slot: Slot,
    pub time: UnixMs,
    pub hash: [u8; 16],
    pub outcome: Vec<u8>,
}

/// What the slots add to the digest of the rows.
pub fn slots_hash(slots: &Slots) -> u128 {
    hash_of(b"slots", &codec::encode(slots))
}

/// The part of the digest of a row of another kind.
pub fn hash_of(kind: &[u8], row: &[u8]) -> u128 {
    hash16(blake3::Hasher::new().update(kind).update(row))
}

fn hash16(hasher: &blake3::Hasher) -> u128 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(bytes)
}

/// A row's part of the digest.
pub fn memory_hash(table: &str, row: &Stored) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(table.as_bytes()).update(&row.epoch.to_le_bytes()).update(&row.position.to_le_bytes());
    hasher
        .update(&[row.kind])
        .update(&(row.body.len() as u64).to_le_bytes())
        .update(&row.body)
        .update(&row.vector);
    hash16(&hasher)
}

pub fn key_hash(row: &KeyRow) -> u128 {
    hash_of(b"keys", &codec::encode(row))
}

pub fn vector_bytes(vector: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; vector.len() * 4];
    bytes.chunks_exact_mut(4).zip(vector).for_each(|(b, x)| b.copy_from_slice(&x.to_le_bytes()));
    bytes
}

pub fn vector_from(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub fn decode_body(bytes: &[u8]) -> Result<Memory, StorageError> {
    codec::decode(bytes).map_err(StorageError::corrupt("a memory's record"))
}

pub fn change_kind(kind: u8) -> Result<ChangeKind, StorageError> {
    match kind {
        1 => Ok(ChangeKind::Added),
        2 => Ok(ChangeKind::Updated),
        3 => Ok(ChangeKind::Deleted),
        4 => Ok(ChangeKind::Erased),
        _ => Err(StorageError::Corrupt { what: "a record".into(), problem: format!("unknown kind {kind}") }),
    }
}

/// A row of `memories` or `history` as bytes. Rows of the history have no vector.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Stored {
    pub epoch: u64,
    pub position: i64,
    pub kind: u8,
    /// The encoded memory, without its vector.
    pub body: Vec<u8>,
    pub vector: Vec<u8>,
}

/// The columns that [`stored`] reads from a month's memories.
pub const MEMORY: &str = "epoch, position, kind, body, vector";
/// The columns that [`stored`] reads from a month's history.
pub const HISTORY: &str = "epoch, position, kind, body, x''";

pub fn stored(row: &Row<'_>) -> Result<Stored, rusqlite::Error> {
    let epoch = row.get::<_, i64>(0)? as u64;
    Ok(Stored { epoch, position: row.get(1)?, kind: row.get(2)?, body: row.get(3)?, vector: row.get(4)? })
}

/// Where a memory is, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Place {
    pub month: Month,
    /// 0: it was deleted.
    pub position: i64,
    pub version: u64,
}

pub fn place(
    db: &Connection,
    tenant: &str,
    id: &MemoryId,
    slot: Slot,
) -> Result<Option<Place>, StorageError> {
    let mut statement = db.prepare_cached(
        "SELECT month, position, version FROM directory WHERE tenant = ?1 AND id = ?2 AND slot = ?3",
    )?;
    let place = |row: &Row<'_>| {
        let version = row.get::<_, i64>(2)? as u64;
        Ok(Place { month: Month(row.get(0)?), position: row.get(1)?, version })
    };
    Ok(statement.query_row(params![tenant, &id[..], slot], place).optional()?)
}

/// Where the tenant's memories with this id are or were, by rising slot; only in one slot if that is given.
pub fn places(
    db: &Connection,
    tenant: &str,
    id: &MemoryId,
    slot: Option<Slot>,
) -> Result<Vec<(Slot, Place)>, StorageError> {
    if let Some(slot) = slot {
        return Ok(place(db, tenant, id, slot)?.map(|place| (slot, place)).into_iter().collect());
    }
    let mut statement = db.prepare_cached(
        "SELECT slot, month, position, version FROM directory WHERE tenant = ?1 AND id = ?2 ORDER BY slot",
    )?;
    let found = statement.query_map(params![tenant, &id[..]], |row| {
        let version = row.get::<_, i64>(3)? as u64;
        Ok((row.get(0)?, Place { month: Month(row.get(1)?), position: row.get(2)?, version }))
    })?;
    Ok(found.collect::<Result<_, _>>()?)
}

pub fn put_place(
    db: &Connection,
    tenant: &str,
    id: &MemoryId,
    slot: Slot,
    place: Place,
) -> Result<(), StorageError> {
    let mut statement =
        db.prepare_cached("INSERT OR REPLACE INTO directory VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
    statement.execute(params![tenant, &id[..], slot, place.month.0, place.position, place.version as i64])?;
    Ok(())
}

pub fn remove_place(db: &Connection, tenant: &str, id: &MemoryId, slot: Slot) -> Result<(), StorageError> {
    db.prepare_cached("DELETE FROM directory WHERE tenant = ?1 AND id = ?2 AND slot = ?3")?
        .execute(params![tenant, &id[..], slot])?;
    Ok(())
}

/// One column, or more, of the memory at a place that is not a deleted one's.
fn at<T>(
    db: &Connection,
    place: Place,
    columns: &str,
    read: impl FnOnce(&Row<'_>) -> Result<T, rusqlite::Error>,
) -> Result<T, StorageError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT {columns} FROM m{} WHERE position = ?1", suffix(place.month)))?;
    let found = statement.query_row([place.position], read).optional()?;
    found.ok_or_else(|| StorageError::Corrupt {
        what: format!("the records of {}", place.month),
        problem: format!("there is no memory at {:?}, where one should be", unpack(0, place.position)),
    })
}

pub fn stored_at(db: &Connection, place: Place) -> Result<Stored, StorageError> {
    at(db, place, MEMORY, stored)
}

pub fn body_at(db: &Connection, place: Place) -> Result<Vec<u8>, StorageError> {
    at(db, place, "body", |row| row.get(0))
}

fn alive(place: Option<Place>) -> Option<Place> {
    place.filter(|p| p.position != 0)
}

pub fn find(
    db: &Connection,
    tenant: &str,
    id: &MemoryId,
    slot: Slot,
) -> Result<Option<Stored>, StorageError> {
    alive(place(db, tenant, id, slot)?).map(|place| stored_at(db, place)).transpose()
}

/// The body alone, for answers that need no vector.
pub fn find_body(
    db: &Connection,
    tenant: &str,
    id: &MemoryId,
    slot: Slot,
) -> Result<Option<Vec<u8>>, StorageError> {
    alive(place(db, tenant, id, slot)?).map(|place| body_at(db, place)).transpose()
}

/// The number of an owner; `None` if it never had a memory.
pub fn owner_number(db: &Connection, owner: &Owner) -> Result<Option<i64>, StorageError> {
    let mut statement = db.prepare_cached("SELECT number FROM owners WHERE owner = ?1")?;
    Ok(statement.query_row([codec::encode(owner)], |row| row.get(0)).optional()?)
}

/// The number of an owner, given now if it had none.
pub fn number_owner(db: &Connection, owner: &Owner) -> Result<i64, StorageError> {
    if let Some(number) = owner_number(db, owner)? {
        return Ok(number);
    }
    db.prepare_cached("INSERT INTO owners (owner, tenant) VALUES (?1, ?2)")?
        .execute(params![codec::encode(owner), owner.tenant()])?;
    Ok(db.last_insert_rowid())
}

/// Writes a memory's row and its indexes, that of words if it is kept. `memory` is what the row's body encodes.
pub fn put_memory(
    db: &Connection,
    row: &Stored,
    memory: &Memory,
    words_kept: bool,
) -> Result<(), StorageError> {
    let (month, of) = (Month::of(memory.created), memory.owner());
    let owner = number_owner(db, &of)?;
    let words = match words_kept {
        true => words::add(db, month, row.position, owner, &memory.text)?,
        false => 0,
    };
    fields::add(db, month, owner, row.position, memory)?;
    let mut statement = db.prepare_cached(&format!(
        "INSERT INTO m{} VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        suffix(month)
    ))?;
    let (epoch, words, slot) = (row.epoch as i64, words as i64, slot_of(&of, &memory.id));
    statement.execute(params![
        row.position,
        epoch,
        &memory.id[..],
        owner,
        slot,
        row.kind,
        words,
        row.body,
        row.vector
    ])?;
    let place = Place { month, position: row.position, version: memory.version };
    put_place(db, &memory.tenant, &memory.id, slot, place)
}

/// Removes a memory's row and what indexes it, but not its place.
pub fn remove_memory(
    db: &Connection,
    position: i64,
    memory: &Memory,
    words_kept: bool,
) -> Result<(), StorageError> {
    let month = Month::of(memory.created);
    let mut statement = db.prepare_cached(&format!(
        "DELETE FROM m{} WHERE position = ?1 RETURNING owner, words",
        suffix(month)
    ))?;
    let (owner, words) = statement.query_row([position], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if words_kept {
        words::remove(db, month, position, owner, words)?;
    }
    fields::remove(db, month, owner, position, memory)
}

/// Replaces the body of a row; nothing that is indexed may differ.
pub fn replace_body(db: &Connection, row: &Stored, memory: &Memory) -> Result<(), StorageError> {
    let month = Month::of(memory.created);
    db.prepare_cached(&format!("UPDATE m{} SET body = ?2 WHERE position = ?1", suffix(month)))?
        .execute(params![row.position, row.body])?;
    Ok(())
}

/// `version` is that of the change: of a deletion, one more than its memory's.
pub fn put_history(db: &Connection, row: &Stored, memory: &Memory, version: u64) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached(&format!(
        "INSERT INTO h{} VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        suffix(Month::of(memory.created))
    ))?;
    let (epoch, version) = (row.epoch as i64, version as i64);
    statement.execute(params![
        row.position,
        epoch,
        memory.tenant,
        &memory.id[..],
        memory.slot(),
        version,
        row.kind,
        row.body
    ])?;
    Ok(())
}

pub fn remove_history(db: &Connection, month: Month, position: i64) -> Result<(), StorageError> {
    db.prepare_cached(&format!("DELETE FROM h{} WHERE position = ?1", suffix(month)))?.execute([position])?;
    Ok(())
}

/// Calls `work` for every row of every month, month by month.
pub fn each(
    db: &Connection,
    months: &Months,
    (columns, table): (&str, char),
    work: &mut dyn FnMut(Month, &Row<'_>) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    for month in months.keys() {
        let mut statement = db.prepare_cached(&format!("SELECT {columns} FROM {table}{}", suffix(*month)))?;
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            work(*month, row)?;
        }
    }
    Ok(())
}

/// The columns that [`key_row`] reads.
pub const KEY: &str = "tenant, key, slot, time, hash, outcome";

/// What is remembered under a tenant's key, by rising slot.
pub fn find_keys(db: &Connection, tenant: &str, key: &str) -> Result<Vec<KeyRow>, StorageError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT {KEY} FROM keys WHERE tenant = ?1 AND key = ?2 ORDER BY slot"))?;
    let rows = statement.query_map(params![tenant, key], key_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn put_key(db: &Connection, row: &KeyRow) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO keys VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
    statement.execute(params![row.tenant, row.key, row.slot, row.time, &row.hash[..], row.outcome])?;
    Ok(())
}

pub fn key_row(row: &Row<'_>) -> Result<KeyRow, rusqlite::Error> {
    Ok(KeyRow {
        tenant: row.get(0)?,
        key: row.get(1)?,
        slot: row.get(2)?,
        time: row.get(3)?,
        hash: row.get(4)?,
        outcome: row.get(5)?,
    })
}

/// Keys older than `before`, oldest first, of slots that are taken: what is sealed must not change, and what has not been adopted is not ours yet.
pub fn old_keys(
    db: &Connection,
    before: UnixMs,
    limit: usize,
    slots: &Slots,
) -> Result<Vec<KeyRow>, StorageError> {
    let mut statement = db.prepare_cached(&format!(
        "SELECT {KEY} FROM keys WHERE time < ?1 ORDER BY time, tenant, key, slot"
    ))?;
    let mut found = statement.query([before])?;
    let mut old = vec![];
    while old.len() < limit
        && let Some(row) = found.next()?
    {
        let (tenant, slot): (String, Slot) = (row.get(0)?, row.get(2)?);
        if slot == STAYS || slots.takes(&tenant, slot) {
            old.push(key_row(row)?);
        }
    }
    Ok(old)
}

pub fn remove_key(db: &Connection, row: &KeyRow) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("DELETE FROM keys WHERE tenant = ?1 AND key = ?2 AND slot = ?3")?;
    statement.execute(params![row.tenant, row.key, row.slot])?;
    Ok(())
}

pub fn erasure_hash(erasure: &Erasure) -> u128 {
    hash_of(b"erasures", &codec::encode(erasure))
}

/// The list of erasures, by their numbers.
pub fn erasures(db: &Connection) -> Result<Vec<Erasure>, StorageError> {
    let mut statement = db.prepare_cached("SELECT value FROM erasures ORDER BY id")?;
    let mut found = statement.query([])?;
    let mut all = vec![];
    while let Some(row) = found.next()? {
        all.push(erasure(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?)?);
    }
    Ok(all)
}

fn erasure(bytes: &[u8]) -> Result<Erasure, StorageError> {
    codec::decode(bytes).map_err(StorageError::corrupt("the list of erasures"))
}

pub fn find_erasure(db: &Connection, id: ErasureId) -> Result<Option<Erasure>, StorageError> {
    let mut statement = db.prepare_cached("SELECT value FROM erasures WHERE id = ?1")?;
    let bytes: Option<Vec<u8>> = statement.query_row([id as i64], |row| row.get(0)).optional()?;
    bytes.map(|bytes| erasure(&bytes)).transpose()
}

/// Erasures of before a time, some of them.
pub fn old_erasures(db: &Connection, before: UnixMs, limit: usize) -> Result<Vec<Erasure>, StorageError> {
    let mut statement =
        db.prepare_cached("SELECT value FROM erasures WHERE time < ?1 ORDER BY time, id LIMIT ?2")?;
    let mut found = statement.query(params![before, limit as i64])?;
    let mut old = vec![];
    while let Some(row) = found.next()? {
        old.push(erasure(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?)?);
    }
    Ok(old)
}

pub fn put_erasure(db: &Connection, erasure: &Erasure) -> Result<(), StorageError> {
    db.prepare_cached("INSERT OR REPLACE INTO erasures VALUES (?1, ?2, ?3)")?.execute(params![
        erasure.id as i64,
        erasure.time,
        codec::encode(erasure)
    ])?;
    Ok(())
}

pub fn remove_erasure(db: &Connection, id: ErasureId) -> Result<(), StorageError> {
    db.prepare_cached("DELETE FROM erasures WHERE id = ?1")?.execute([id as i64])?;
    Ok(())
}

/// Of the list of dropped vectors, forgets some that the vector view's manifest knows by now.
pub fn forget_dropped(db: &Connection, sealed: Position) -> Result<(), StorageError> {
    let sealed = pack(Position { item: u32::MAX, ..sealed });
    let some = "SELECT number FROM dropped WHERE at <= ?1 LIMIT 1000";
    db.prepare_cached(&format!("DELETE FROM dropped WHERE number IN ({some})"))?.execute([sealed])?;
    Ok(())
}

pub fn load_state(db: &Connection) -> Result<State, StorageError> {
    let bytes: Option<Vec<u8>> = db
        .prepare_cached("SELECT value FROM state WHERE one = 1")?
        .query_row([], |row| row.get(0))
        .optional()?;
    bytes.map_or(Ok(State::default()), |b| {
        codec::decode(&b).map_err(StorageError::corrupt("the views' state"))
    })
}

pub fn save_state(db: &Connection, state: &State) -> Result<(), StorageError> {
    db.prepare_cached("INSERT OR REPLACE INTO state VALUES (1, ?1, ?2)")?
        .execute(params![state.slots_changed as i64, codec::encode(state)])?;
    Ok(())
}

/// The state's `slots_changed`, for whoever need not read more.
pub fn slots_changed(db: &Connection) -> Result<u64, StorageError> {
    let mut statement = db.prepare_cached("SELECT slots_changed FROM state WHERE one = 1")?;
    let changed: Option<i64> = statement.query_row([], |row| row.get(0)).optional()?;
    Ok(changed.unwrap_or(0) as u64)
}
