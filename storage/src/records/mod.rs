//! The records view: memories, their history and the remembered idempotency keys, in SQLite.
//!
//! | table | row | key |
//! |---|---|---|
//! | `memories` | each memory as it is | its last change's position (as row id), (tenant, id) and (owner, id) |
//! | `history` | each superseded version and each deletion | position, and (tenant, id) |
//! | `keys` | each idempotency key of the last 24 hours, with its outcome | (tenant, key), and time |
//! | `state` | one row: how far the ledger is applied, and the digest of all the above | |
//!
//! A position is stored as one integer, `index << 20 | item`, so both tables lie in the order of the ledger (whose index
//! goes on from epoch to epoch) and new rows go to the end.
//! The database runs in WAL mode without an fsync per transaction: a power loss takes back a suffix of transactions as a whole, and
//! `state` says where the ledger must resume.
//!
//! **The write-ahead log never holds stale frames.** SQLite overwrites an old log from its start and tells old frames from new ones,
//! and torn ones from whole ones, by a 64-bit sum that is linear in 32-bit words: two words that differ by 2³¹ cancel each other one
//! time in three. The first frame after a restart is the page of `state`, where the previous log's first frame was that page
//! too; a tear between their sectors, 128 positions apart, passed as whole and took the views back in time (simulation,
//! `all-nodes-power-loss`, seed 7). So pages move into the database only while no one reads, and the log is cut to nothing
//! in the same step, before SQLite could restart it. While a long read goes on the log grows, and is synced instead.

pub mod rows;

use crate::error::StorageError;
use rusqlite::{Connection, OpenFlags};
use sim::disk::{Disk, open_sqlite};
use std::sync::{Arc, Mutex, MutexGuard};

const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS memories (
  position INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, tenant TEXT NOT NULL, id BLOB NOT NULL, owner BLOB NOT NULL,
  kind INTEGER NOT NULL, body BLOB NOT NULL, vector BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS memories_id ON memories (tenant, id);
CREATE INDEX IF NOT EXISTS memories_owner ON memories (owner, id);
CREATE TABLE IF NOT EXISTS history (
  position INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, tenant TEXT NOT NULL, id BLOB NOT NULL,
  version INTEGER NOT NULL, kind INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS history_id ON history (tenant, id, version);
CREATE TABLE IF NOT EXISTS keys (
  tenant TEXT NOT NULL, key TEXT NOT NULL, time INTEGER NOT NULL, hash BLOB NOT NULL, outcome BLOB NOT NULL,
  PRIMARY KEY (tenant, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys_time ON keys (time);
CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one = 1), value BLOB NOT NULL);
";

/// Pages that the write-ahead log may hold before it is moved into the database.
const WAL_PAGES_MAX: i64 = 4000;

/// Pages at which writers wait for a long read to end, rather than fill the disk.
const WAL_PAGES_FULL: i64 = 50 * WAL_PAGES_MAX;

/// Connections that read side by side.
const READERS: usize = 4;

pub struct Records {
    disk: Arc<dyn Disk>,
    path: String,
    writer: Mutex<Connection>,
    readers: Vec<Mutex<Connection>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn configure(connection: &Connection, cache_kib: u32) -> Result<(), rusqlite::Error> {
    connection.set_prepared_statement_cache_capacity(64);
    connection.execute_batch(&format!(
        "PRAGMA page_size=4096; PRAGMA cache_size=-{cache_kib}; PRAGMA temp_store=MEMORY; PRAGMA mmap_size=0;"
    ))
}

impl Records {
    /// Opens the database at `path`, whose directory exists, creating it if there is none.
    pub fn open(disk: Arc<dyn Disk>, path: &str) -> Result<Records, StorageError> {
        let writer = open_sqlite(&*disk, path, OpenFlags::default())?;
        configure(&writer, 32 << 10)?;
        writer.execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0;",
        )?;
        // What a power loss left there goes first: behind its last whole transaction may lie pieces of others.
        truncate_wal(&writer)?;
        let version: i64 = writer.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if version != 0 && version != SCHEMA_VERSION {
            let problem = format!(
                "it has format {version}, this build reads {SCHEMA_VERSION}: use the build that wrote it"
            );
            return Err(StorageError::Corrupt { what: format!("database {path}"), problem });
        }
        if version == 0 {
            writer
                .execute_batch(&format!("BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"))?;
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

    /// Moves the write-ahead log into the database once it is long. SQLite's own way to do this hides a sync that failed, and pages
    /// that a failed sync gave up would later count as durable.
    pub fn bound_wal(&self, writer: &Connection) -> Result<(), StorageError> {
        let mut asked = writer.prepare_cached("PRAGMA wal_checkpoint(NOOP)")?;
        let pages: i64 = asked.query_row([], |row| row.get(1))?;
        if pages > WAL_PAGES_FULL {
            let _readers: Vec<_> = self.readers.iter().map(lock).collect();
            truncate_wal(writer)?;
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
            truncate_wal(writer)?;
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

/// Moves the whole write-ahead log into the database, syncs that, and cuts the log to nothing. No one may be reading.
fn truncate_wal(writer: &Connection) -> Result<(), StorageError> {
    let busy: bool = writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if busy {
        return Err(StorageError::InUse("the records' database".into()));
    }
    Ok(())
}

fn dir_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}
