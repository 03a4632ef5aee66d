//! Rows of the records view, read and written.

use crate::codec;
use crate::error::StorageError;
use crate::model::*;
use bincode::{Decode, Encode};
use rusqlite::{Connection, OptionalExtension, Row, params};

/// Items of one entry fit into this many bits of a stored position.
const ITEM_BITS: u32 = 20;

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
    pub keys: u64,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct KeyRow {
    pub tenant: String,
    pub key: String,
    pub time: UnixMs,
    pub hash: [u8; 16],
    pub outcome: Vec<u8>,
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
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"keys").update(&codec::encode(row));
    hash16(&hasher)
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

/// The columns that [`stored`] reads from `memories`.
pub const MEMORY: &str = "epoch, position, kind, body, vector";
/// The columns that [`stored`] reads from `history`.
pub const HISTORY: &str = "epoch, position, kind, body, x''";

pub fn stored(row: &Row<'_>) -> Result<Stored, rusqlite::Error> {
    let epoch = row.get::<_, i64>(0)? as u64;
    Ok(Stored { epoch, position: row.get(1)?, kind: row.get(2)?, body: row.get(3)?, vector: row.get(4)? })
}

pub fn find(db: &Connection, tenant: &str, id: &MemoryId) -> Result<Option<Stored>, StorageError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT {MEMORY} FROM memories WHERE tenant = ?1 AND id = ?2"))?;
    Ok(statement.query_row(params![tenant, &id[..]], stored).optional()?)
}

/// The body alone, for answers that need no vector.
pub fn find_body(db: &Connection, tenant: &str, id: &MemoryId) -> Result<Option<Vec<u8>>, StorageError> {
    let mut statement = db.prepare_cached("SELECT body FROM memories WHERE tenant = ?1 AND id = ?2")?;
    Ok(statement.query_row(params![tenant, &id[..]], |row| row.get(0)).optional()?)
}

/// The last version in the history of a deleted memory.
pub fn last_version(db: &Connection, tenant: &str, id: &MemoryId) -> Result<u64, StorageError> {
    // SQLite prepares max(version) and ORDER BY version anew for every id, which costs more than all the rest of an Add.
    let mut statement = db.prepare_cached("SELECT version FROM history WHERE tenant = ?1 AND id = ?2")?;
    let mut found = statement.query(params![tenant, &id[..]])?;
    let mut last = 0;
    while let Some(row) = found.next()? {
        last = last.max(row.get::<_, i64>(0)?);
    }
    Ok(last as u64)
}

/// The key of an owner's memories.
pub fn owner_key(owner: &Owner) -> Vec<u8> {
    codec::encode(owner)
}

/// `memory` is what the row's body encodes.
pub fn put_memory(db: &Connection, row: &Stored, memory: &Memory) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO memories VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?;
    let (epoch, owner) = (row.epoch as i64, owner_key(&memory.owner()));
    statement.execute(params![
        row.position,
        epoch,
        memory.tenant,
        &memory.id[..],
        owner,
        row.kind,
        row.body,
        row.vector
    ])?;
    Ok(())
}

pub fn remove_memory(db: &Connection, position: i64) -> Result<(), StorageError> {
    db.prepare_cached("DELETE FROM memories WHERE position = ?1")?.execute([position])?;
    Ok(())
}

/// `version` is that of the change: of a deletion, one more than its memory's.
pub fn put_history(db: &Connection, row: &Stored, memory: &Memory, version: u64) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO history VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
    let (epoch, version) = (row.epoch as i64, version as i64);
    statement.execute(params![
        row.position,
        epoch,
        memory.tenant,
        &memory.id[..],
        version,
        row.kind,
        row.body
    ])?;
    Ok(())
}

pub fn find_key(db: &Connection, tenant: &str, key: &str) -> Result<Option<KeyRow>, StorageError> {
    let mut statement = db
        .prepare_cached("SELECT tenant, key, time, hash, outcome FROM keys WHERE tenant = ?1 AND key = ?2")?;
    Ok(statement.query_row(params![tenant, key], key_row).optional()?)
}

pub fn put_key(db: &Connection, row: &KeyRow) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO keys VALUES (?1, ?2, ?3, ?4, ?5)")?;
    statement.execute(params![row.tenant, row.key, row.time, &row.hash[..], row.outcome])?;
    Ok(())
}

pub fn key_row(row: &Row<'_>) -> Result<KeyRow, rusqlite::Error> {
    Ok(KeyRow {
        tenant: row.get(0)?,
        key: row.get(1)?,
        time: row.get(2)?,
        hash: row.get(3)?,
        outcome: row.get(4)?,
    })
}

/// Keys older than `before`, oldest first.
pub fn old_keys(db: &Connection, before: UnixMs, limit: usize) -> Result<Vec<KeyRow>, StorageError> {
    let mut statement = db.prepare_cached(
        "SELECT tenant, key, time, hash, outcome FROM keys WHERE time < ?1 ORDER BY time, tenant, key LIMIT ?2",
    )?;
    let rows = statement.query_map(params![before, limit as i64], key_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn remove_key(db: &Connection, row: &KeyRow) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("DELETE FROM keys WHERE tenant = ?1 AND key = ?2")?;
    statement.execute(params![row.tenant, row.key])?;
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
    db.prepare_cached("INSERT OR REPLACE INTO state VALUES (1, ?1)")?.execute([codec::encode(state)])?;
    Ok(())
}
