//! The records view: memories, their history and the remembered idempotency keys, in SQLite.
//!
//! | table | row | key |
//! |---|---|---|
//! | `mYYYY_MM` | each memory created in that month, as it is | its last change's position (as row id), (owner, id), and slot |
//! | `hYYYY_MM` | each superseded version and each deletion of those | position, (tenant, id), and slot |
//! | `fYYYY_MM` | the index of metadata ([`fields`]) | (owner, path, kind, value, position) |
//! | `tYYYY_MM`, `vYYYY_MM`, `oYYYY_MM` | the index of words ([`words`]), its terms, and its counts by owner | |
//! | `months` | what is known of each month ([`months`]) | month |
//! | `directory` | where each memory is, or was when it was deleted | (tenant, id, slot); of the deleted ones slot too |
//! | `owners` | owners by number | owner |
//! | `edges` | the graph ([`crate::graph`]) | (slot of the source, tenant, source, relation, target), and (tenant, target) |
//! | `keys` | each idempotency key of the last 24 hours, with its outcome | (tenant, key, slot), slot, and time |
//! | `dropped` | versions that went with a slot, until no manifest of the vector view needs to be told | |
//! | `erasures` | who was erased, where and when ([`crate::erase`]) | number, and time |
//! | `state` | one row: how far the ledger is applied, and the digest of all the above | |
//!
//! A memory is known by (tenant, id, slot): two owners may have chosen one id ([`crate::slots`]). Whatever belongs to a slot has it as a column,
//! and an index on it, so that a move finds what to take along without looking at the rest.
//!
//! A position is stored as one integer, `index << 20 | item`, so memories and history lie in the order of the ledger (whose index
//! goes on from epoch to epoch) and new rows go to the end.
//!
//! **Partitions are tables, not files.** SQLite files that are attached together do not commit as one after a power loss; each would
//! stand at a position of its own, and replaying entries over that needs decisions (keys, versions) that another file has already
//! taken. Tables of one file commit together, so a view has one position, and a month is still pruned and dropped whole.
//! The database runs in WAL mode without an fsync per transaction: a power loss takes back a suffix of transactions as a whole, and
//! `state` says where the ledger must resume.
//!
//! **The write-ahead log never holds stale frames.** SQLite overwrites an old log from its start and tells old frames from new ones,
//! and torn ones from whole ones, by a 64-bit sum that is linear in 32-bit words: two words that differ by 2³¹ cancel each other one
//! time in three. The first frame after a restart is the page of `state`, where the previous log's first frame was that page
//! too; a tear between their sectors, 128 positions apart, passed as whole and took the views back in time (simulation,
//! `all-nodes-power-loss`, seed 7). So pages move into the database only while no one reads, and the log is cut to nothing
//! in the same step, before SQLite could restart it. While a long read goes on the log grows, and is synced instead.
//!
//! **While it moves, the log must be whole.** Power lost in mid-move leaves a database of old and new pages, which the log mends, all of
//! it or nothing: a log that rot has shortened would leave a mixture of pages that are each sound. So the fact `moving` says
//! beforehand how many frames there are, and opening refuses a log that has fewer.

pub mod fields;
pub mod months;
pub mod rows;
pub mod words;

use crate::codec;
use crate::error::StorageError;
use crate::facts;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use sim::disk::{Disk, open_sqlite};
use std::sync::{Arc, Mutex, MutexGuard};

/// The database's name in its directory.
pub const RECORDS: &str = "records.db";
pub const SCHEMA_VERSION: i64 = 4;
/// A database of this format lacks the list of erasures, and is given it.
const WITHOUT_ERASURES: i64 = 3;

const ERASURES: &str = "
CREATE TABLE erasures (id INTEGER PRIMARY KEY, time INTEGER NOT NULL, value BLOB NOT NULL);
CREATE INDEX erasures_time ON erasures (time);
";

const SCHEMA: &str = "
CREATE TABLE months (month INTEGER PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE directory (
  tenant TEXT NOT NULL, id BLOB NOT NULL, slot INTEGER NOT NULL, month INTEGER NOT NULL, position INTEGER NOT NULL,
  version INTEGER NOT NULL, PRIMARY KEY (tenant, id, slot)) WITHOUT ROWID;
CREATE INDEX directory_deleted ON directory (slot, tenant, id) WHERE position = 0;
CREATE TABLE owners (number INTEGER PRIMARY KEY, owner BLOB NOT NULL UNIQUE, tenant TEXT NOT NULL);
CREATE TABLE edges (
  slot INTEGER NOT NULL, tenant INTEGER NOT NULL, source BLOB NOT NULL, relation TEXT NOT NULL, target BLOB NOT NULL,
  weight REAL NOT NULL, valid_from INTEGER, valid_to INTEGER,
  PRIMARY KEY (slot, tenant, source, relation, target)) WITHOUT ROWID;
CREATE INDEX edges_in ON edges (tenant, target);
CREATE TABLE keys (
  tenant TEXT NOT NULL, key TEXT NOT NULL, slot INTEGER NOT NULL, time INTEGER NOT NULL, hash BLOB NOT NULL,
  outcome BLOB NOT NULL, PRIMARY KEY (tenant, key, slot)) WITHOUT ROWID;
CREATE INDEX keys_time ON keys (time);
CREATE INDEX keys_slot ON keys (slot, tenant, key);
CREATE TABLE dropped (
  number INTEGER PRIMARY KEY, at INTEGER NOT NULL, month INTEGER NOT NULL, kind BLOB NOT NULL, id BLOB NOT NULL,
  position INTEGER NOT NULL);
CREATE INDEX dropped_at ON dropped (at);
CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), slots_changed INTEGER NOT NULL, value BLOB NOT NULL);
";

/// The fact that the write-ahead log moves into the database, and how many frames it has.
const MOVING: &str = "moving";

/// Pages that the write-ahead log may hold before it is moved into the database.
const WAL_PAGES_MAX: i64 = 16_000;

/// Pages at which writers wait for a long read to end, rather than fill the disk.
const WAL_PAGES_FULL: i64 = 12 * WAL_PAGES_MAX;

/// Connections that read side by side.
const READERS: usize = 4;

pub struct Records {
    disk: Arc<dyn Disk>,
    path: String,
    writer: Mutex<Connection>,
    readers: Vec<Mutex<Connection>>,
}

/// See [`Records::lazy_reader`].
pub struct LazyReader<'a> {
    records: &'a Records,
    taken: std::cell::OnceCell<MutexGuard<'a, Connection>>,
}

impl LazyReader<'_> {
    pub fn get(&self) -> &Connection {
        self.taken.get_or_init(|| self.records.reader())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn configure(connection: &Connection, cache_kib: u32) -> Result<(), rusqlite::Error> {
    connection.set_prepared_statement_cache_capacity(1024);
    // Statements are planned once, not again for each value that is bound to them.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.execute_batch(&format!(
        "PRAGMA page_size=4096; PRAGMA cache_size=-{cache_kib}; PRAGMA temp_store=MEMORY; PRAGMA mmap_size=0;"
    ))
}

impl Records {
    /// Whether a file in the database's directory is part of it.
    pub fn has(name: &str) -> bool {
        name.starts_with(RECORDS) || name.strip_suffix(".meta") == Some(MOVING)
    }

    /// Opens the database at `path`, whose directory exists, creating it if there is none.
    pub fn open(disk: Arc<dyn Disk>, path: &str) -> Result<Records, StorageError> {
        let writer = open_sqlite(&*disk, path, OpenFlags::default())?;
        configure(&writer, 16 << 10)?;
        writer.execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0;",
        )?;
        let dir = dir_of(path).to_string();
        let log_bytes = match disk.open(&format!("{path}-wal")) {
            Ok(file) => file.len()?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error.into()),
        };
        let damaged = |problem: String| StorageError::Damaged { what: format!("{path}-wal"), problem };
        let moving = facts::get(&*disk, &dir, MOVING).map_err(|e| damaged(format!("{MOVING}.meta: {e}")))?;
        // A log of no length has been moved to its end.
        if let Some(bytes) = moving.filter(|_| log_bytes > 0) {
            let moving: i64 = codec::decode(&bytes).map_err(|e| damaged(e.to_string()))?;
            let frames = frames(&writer)?;
            if frames < moving {
                return Err(damaged(format!("it has {frames} of {moving} frames that were being moved")));
            }
        }
        // What a power loss left there goes first: behind its last whole transaction may lie pieces of others.
        truncate_wal(&*disk, path, &writer)?;
        let version: i64 = writer.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if ![0, WITHOUT_ERASURES, SCHEMA_VERSION].contains(&version) {
            let problem = format!(
                "it has format {version}, this build reads {SCHEMA_VERSION}: use the build that wrote it"
            );
            return Err(StorageError::Version(format!("database {path}: {problem}")));
        }
        let missing = match version {
            0 => format!("{SCHEMA} {ERASURES}"),
            WITHOUT_ERASURES => ERASURES.into(),
            _ => String::new(),
        };
        if !missing.is_empty() {
            writer
                .execute_batch(&format!("BEGIN; {missing} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"))?;
        }
        disk.sync_dir(dir_of(path))?;
        let reader = || -> Result<Mutex<Connection>, StorageError> {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = open_sqlite(&*disk, path, flags)?;
            configure(&connection, 8 << 10)?;
            Ok(Mutex::new(connection))
        };
        let readers = (0..READERS).map(|_| reader()).collect::<Result<_, _>>()?;
        Ok(Records { disk, path: path.to_string(), writer: Mutex::new(writer), readers })
    }

    /// The one connection that writes.
    pub fn writer(&self) -> MutexGuard<'_, Connection> {
        lock(&self.writer)
    }

    /// A connection to read with, another than the other readers' if one is free.
    pub fn reader(&self) -> MutexGuard<'_, Connection> {
        let free = self.readers.iter().find_map(|r| r.try_lock().ok());
        free.unwrap_or_else(|| lock(&self.readers[0]))
    }

    /// A connection to read with, taken when it is first asked for: whoever holds one must not ask for another.
    pub fn lazy_reader(&self) -> LazyReader<'_> {
        LazyReader { records: self, taken: std::cell::OnceCell::new() }
    }

    /// Moves the write-ahead log into the database once it is long. SQLite's own way to do this hides a sync that failed, and pages
    /// that a failed sync gave up would later count as durable.
    pub fn bound_wal(&self, writer: &Connection) -> Result<(), StorageError> {
        let pages = frames(writer)?;
        if pages > WAL_PAGES_FULL {
            let _readers: Vec<_> = self.readers.iter().map(lock).collect();
            truncate_wal(&*self.disk, &self.path, writer)?;
        } else if pages > WAL_PAGES_MAX {
            self.move_wal(writer)?;
        }
        Ok(())
    }

    /// Moves the write-ahead log into the database unless someone reads; says whether it did.
    fn move_wal(&self, writer: &Connection) -> Result<bool, StorageError> {
        let readers: Vec<_> = self.readers.iter().filter_map(|r| r.try_lock().ok()).collect();
        let nobody_reads = readers.len() == self.readers.len();
        if nobody_reads {
            truncate_wal(&*self.disk, &self.path, writer)?;
        }
        Ok(nobody_reads)
    }

    /// Makes every transaction so far durable: moved into the database, or at least in a synced write-ahead log.
    pub fn checkpoint(&self) -> Result<(), StorageError> {
        let writer = self.writer();
        if !self.move_wal(&writer)? {
            self.disk.open(&format!("{}-wal", self.path))?.sync()?;
        }
        Ok(self.disk.sync_dir(dir_of(&self.path))?)
    }
}

/// Frames in the write-ahead log.
fn frames(writer: &Connection) -> Result<i64, StorageError> {
    let mut asked = writer.prepare_cached("PRAGMA wal_checkpoint(NOOP)")?;
    Ok(asked.query_row([], |row| row.get(1))?)
}

/// Moves the whole write-ahead log into the database, syncs that, and cuts the log to nothing. No one may be reading.
fn truncate_wal(disk: &dyn Disk, path: &str, writer: &Connection) -> Result<(), StorageError> {
    let frames = frames(writer)?;
    if frames > 0 {
        // The log must be there as a whole before anything says so.
        disk.open(&format!("{path}-wal"))?.sync()?;
        facts::put(disk, dir_of(path), MOVING, &codec::encode(&frames))?;
    }
    let busy: bool = writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if busy {
        return Err(StorageError::InUse("the records' database".into()));
    }
    Ok(facts::remove(disk, dir_of(path), MOVING)?)
}

fn dir_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}
