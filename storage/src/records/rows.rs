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

/// A row of `memories` or `history`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct MemoryRow {
    pub position: i64,
    pub kind: u8,
    /// Its vector stands apart.
    pub memory: Memory,
    pub vector: Vec<f32>,
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
pub fn memory_hash(table: &str, position: i64, kind: u8, body: &[u8], vector: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(table.as_bytes()).update(&position.to_le_bytes()).update(&[kind]);
    hasher.update(&(body.len() as u64).to_le_bytes()).update(body).update(vector);
    hash16(&hasher)
}

pub fn key_hash(row: &KeyRow) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"keys").update(&codec::encode(row));
    hash16(&hasher)
}

pub fn vector_bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn vector_from(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A memory's body: all but its vector.
pub fn encode_body(memory: &mut Memory) -> Vec<u8> {
    let vector = std::mem::take(&mut memory.vector);
    let body = codec::encode(memory);
    memory.vector = vector;
    body
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

/// A current row as bytes.
pub struct Stored {
    pub position: i64,
    pub kind: u8,
    pub body: Vec<u8>,
    pub vector: Vec<u8>,
}

pub fn stored(row: &Row<'_>) -> Result<Stored, rusqlite::Error> {
    Ok(Stored { position: row.get(0)?, kind: row.get(1)?, body: row.get(2)?, vector: row.get(3)? })
}

pub fn find(db: &Connection, tenant: &str, id: &MemoryId) -> Result<Option<Stored>, StorageError> {
    let mut statement =
        db.prepare_cached("SELECT position, kind, body, vector FROM memories WHERE tenant = ?1 AND id = ?2")?;
    Ok(statement.query_row(params![tenant, &id[..]], stored).optional()?)
}

/// The body alone, for answers that need no vector.
pub fn find_body(db: &Connection, tenant: &str, id: &MemoryId) -> Result<Option<Vec<u8>>, StorageError> {
    let mut statement = db.prepare_cached("SELECT body FROM memories WHERE tenant = ?1 AND id = ?2")?;
    Ok(statement.query_row(params![tenant, &id[..]], |row| row.get(0)).optional()?)
}

/// The last version in the history of a deleted memory.
pub fn last_version(db: &Connection, tenant: &str, id: &MemoryId) -> Result<u64, StorageError> {
    let mut statement =
        db.prepare_cached("SELECT max(version) FROM history WHERE tenant = ?1 AND id = ?2")?;
    let version: Option<i64> = statement.query_row(params![tenant, &id[..]], |row| row.get(0))?;
    Ok(version.unwrap_or(0) as u64)
}

pub fn put_memory(
    db: &Connection,
    row: &Stored,
    tenant: &str,
    id: &MemoryId,
    version: u64,
) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO memories VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
    statement.execute(params![
        row.position,
        tenant,
        &id[..],
        version as i64,
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

pub fn put_history(
    db: &Connection,
    (position, kind, body): (i64, u8, &[u8]),
    tenant: &str,
    id: &MemoryId,
    version: u64,
) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO history VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
    statement.execute(params![position, tenant, &id[..], version as i64, kind, body])?;
    Ok(())
}

/// A remembered key's request hash and encoded outcome.
pub type Remembered = ([u8; 16], Vec<u8>);

pub fn find_key(db: &Connection, tenant: &str, key: &str) -> Result<Option<Remembered>, StorageError> {
    let mut statement = db.prepare_cached("SELECT hash, outcome FROM keys WHERE tenant = ?1 AND key = ?2")?;
    Ok(statement.query_row(params![tenant, key], |row| Ok((row.get(0)?, row.get(1)?))).optional()?)
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
