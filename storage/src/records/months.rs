//! Partitions: the tables of one month each.
//!
//! A memory lies in the month of its creation (UTC) and stays there through all its versions. A month's tables are made by the first
//! memory that needs them and dropped whole. What is known of a month without looking into it ([`MonthState`]) is kept beside, and
//! changes in the same transaction as its rows.

use crate::codec;
use crate::error::StorageError;
use crate::model::{Memory, Month, Position, UnixMs};
use crate::query::{TimeField, TimeRange};
use bincode::{Decode, Encode};
use rusqlite::{Connection, params};
use std::collections::BTreeMap;

/// What one month holds.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct MonthState {
    /// Where it was last changed.
    pub position: Position,
    pub memories: u64,
    pub vectors: u64,
    /// Superseded versions and deletions.
    pub history: u64,
    /// Sum of the hashes of its rows.
    pub digest: u128,
    /// No memory in it was updated later than this.
    pub updated_max: UnixMs,
    /// All event times lie between these, ends included; `None`: there are none.
    pub events: Option<(UnixMs, UnixMs)>,
}

impl MonthState {
    /// One memory more.
    pub fn hold(&mut self, memory: &Memory, vectors: u64) {
        self.memories += 1;
        self.vectors += vectors;
        self.updated_max = self.updated_max.max(memory.updated);
        if let Some(at) = memory.event_time {
            let (first, last) = self.events.unwrap_or((at, at));
            self.events = Some((first.min(at), last.max(at)));
        }
    }

    /// Whether a memory of `month` may lie in the range.
    pub fn may_hold(&self, month: Month, range: &TimeRange) -> bool {
        let (from, to) = (range.from.unwrap_or(UnixMs::MIN), range.to.unwrap_or(UnixMs::MAX));
        match range.field {
            TimeField::Created => from < to && Month::of(from) <= month && month <= Month::of(to),
            TimeField::Updated => from <= self.updated_max && month <= Month::of(to),
            TimeField::EventTime => self.events.is_some_and(|(first, last)| from <= last && first < to),
        }
    }
}

pub type Months = BTreeMap<Month, MonthState>;

/// The end of the names of a month's tables.
pub fn suffix(month: Month) -> String {
    month.to_string().replace('-', "_")
}

pub fn create(db: &Connection, month: Month) -> Result<(), StorageError> {
    let of = suffix(month);
    // What the words' index holds is described in `words`; `fields` has the index of metadata.
    db.execute_batch(&format!(
        "CREATE TABLE m{of} (
           position INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, id BLOB NOT NULL, owner INTEGER NOT NULL,
           slot INTEGER NOT NULL, kind INTEGER NOT NULL, words INTEGER NOT NULL, body BLOB NOT NULL, vector BLOB NOT NULL);
         CREATE UNIQUE INDEX m{of}_owner ON m{of} (owner, id);
         CREATE INDEX m{of}_slot ON m{of} (slot);
         CREATE TABLE h{of} (
           position INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, tenant TEXT NOT NULL, id BLOB NOT NULL,
           slot INTEGER NOT NULL, version INTEGER NOT NULL, kind INTEGER NOT NULL, body BLOB NOT NULL);
         CREATE INDEX h{of}_id ON h{of} (tenant, id, version);
         CREATE INDEX h{of}_slot ON h{of} (slot);
         CREATE TABLE f{of} (
           owner INTEGER NOT NULL, path TEXT NOT NULL, kind INTEGER NOT NULL, value, position INTEGER NOT NULL,
           PRIMARY KEY (owner, path, kind, value, position)) WITHOUT ROWID;
         CREATE TABLE o{of} (owner INTEGER PRIMARY KEY, memories INTEGER NOT NULL, words INTEGER NOT NULL);
         CREATE VIRTUAL TABLE t{of} USING fts5(
           words, content='', contentless_delete=1, detail=none, tokenize=\"ascii tokenchars '_'\");
         CREATE VIRTUAL TABLE v{of} USING fts5vocab('t{of}', 'instance');"
    ))?;
    Ok(())
}

pub fn remove(db: &Connection, month: Month) -> Result<(), StorageError> {
    let of = suffix(month);
    db.execute_batch(&format!(
        "DROP TABLE v{of}; DROP TABLE t{of}; DROP TABLE o{of}; DROP TABLE f{of}; DROP TABLE h{of}; DROP TABLE m{of};"
    ))?;
    db.prepare_cached("DELETE FROM months WHERE month = ?1")?.execute([month.0])?;
    Ok(())
}

pub fn load(db: &Connection) -> Result<Months, StorageError> {
    let mut months = Months::new();
    let mut statement = db.prepare_cached("SELECT month, value FROM months")?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        let month = Month(row.get(0)?);
        let value = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
        let state = codec::decode(value).map_err(StorageError::corrupt(format!("the state of {month}")))?;
        months.insert(month, state);
    }
    Ok(months)
}

pub fn save(db: &Connection, month: Month, state: &MonthState) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT OR REPLACE INTO months VALUES (?1, ?2)")?;
    statement.execute(params![month.0, codec::encode(state)])?;
    Ok(())
}
