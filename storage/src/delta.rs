//! A snapshot without what its receiver has already: repair by the hashes of ranges.
//!
//! ```text
//! receiver: rows of old views ─► hashes of ranges ─► sender: its rows, range by range ─► pieces where they differ, "as you have it" elsewhere
//!                └───────────────────────────────────────────────────────────────────────────► a whole snapshot, in a file
//! ```
//!
//! A replica that is behind the log, or that an epoch took more from than its bases can give back, has most of the rows that it will be sent. So it
//! says what it has as [`RangeHashes`], and makes the whole snapshot from what arrives and its own rows ([`Material`]). What is installed is
//! that file, like one that arrived whole: nothing behind it knows of ranges.
//!
//! | rows | a range is | since |
//! |---|---|---|
//! | memories and their history, of each month | so many that follow each other by position | they are most of the bytes, and change at their end |
//! | idempotency keys | so many that follow each other by time | likewise |
//! | edges, places of deleted memories | so many that follow each other by slot, whole slots | they are small; in a slot they have no order that replicas share |
//!
//! # What can go wrong
//!
//! - *The old rows change or are removed in between*: each range that is kept names its hash, which is compared when it is read. A snapshot that cannot be
//!   completed is refused, and asked for again.
//! - *The old rows are damaged*: likewise. Views that were set aside are then discarded, and the next snapshot arrives whole.
//! - *Two rows of one hash*: the hashes are sums of 128 bits, those that replicas are compared by anyway.

use crate::bases::{Reader, Writer};
use crate::codec;
use crate::error::StorageError;
use crate::facts;
use crate::graph;
use crate::model::Month;
use crate::records::months::{self, Months, suffix};
use crate::records::rows::{self, HISTORY, KEY, MEMORY, Place};
use crate::records::{RECORDS, Records};
use crate::shard::{CONDEMNED, Shard};
use crate::slots::Slot;
use crate::snapshot::Piece;
use bincode::{Decode, Encode};
use rusqlite::{Connection, params};
use sim::disk::Disk;
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};

/// Rows of a range, at least.
const RANGE_ROWS_MIN: u64 = 16;
/// Ranges, about; there are longer ones rather than more.
const RANGES_MAX: u64 = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub(crate) enum Table {
    Memories,
    History,
    /// Where deleted memories were.
    Places,
    Edges,
    Keys,
}

/// Rows in an order that replicas share: a table's, of a month if it is kept by months.
type Run = (Table, Option<Month>);

/// A row's place in a run: its position, or its slot, or a key's time, tenant, name and slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub(crate) struct At(i64, String, String, Slot);

impl At {
    fn of(piece: &Piece) -> At {
        let at = |at| At(at, String::new(), String::new(), 0);
        match piece {
            Piece::Memory(row) | Piece::History { row, .. } => at(row.position),
            Piece::Deleted { slot, .. } => at((*slot).into()),
            Piece::Edge(row) => at(row.slot.into()),
            Piece::Key(row) => At(row.time, row.tenant.clone(), row.key.clone(), row.slot),
            Piece::Erasure(_) | Piece::Kept(_) | Piece::End { .. } => At::default(),
        }
    }
}

/// What ranges are compared by.
fn hash_of(piece: &Piece) -> u128 {
    match piece {
        // What the digest needs not tell, since it follows from the history.
        Piece::Deleted { .. } => rows::hash_of(b"places", &codec::encode(piece)),
        _ => piece.digest(),
    }
}

/// Rows that the receiver of a snapshot has, and their hash: those of a run behind one place and up to another.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub(crate) struct Kept {
    of: Run,
    after: Option<At>,
    last: At,
    rows: u64,
    hash: u128,
}

/// Rows of a run that follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Range {
    /// The last row's place. The first one's is behind the range before.
    last: At,
    rows: u64,
    /// Sum of the rows' hashes, modulo 2¹²⁸.
    hash: u128,
}

impl Range {
    fn add(&mut self, piece: &Piece) {
        (self.rows, self.hash) = (self.rows + 1, self.hash.wrapping_add(hash_of(piece)));
    }
}

/// What a replica has, as hashes. Of no views: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct RangeHashes(BTreeMap<Run, Vec<Range>>);

/// The runs that views have.
fn runs(held: &Months) -> Vec<Run> {
    let by_month = [Table::Memories, Table::History].into_iter();
    let by_month = by_month.flat_map(|table| held.keys().map(move |month| (table, Some(*month))));
    by_month.chain([Table::Places, Table::Edges, Table::Keys].map(|table| (table, None))).collect()
}

type Work<'a> = dyn FnMut(Piece) -> Result<(), StorageError> + 'a;

/// Calls `work` for the rows of a run behind one place and up to another, in their order.
fn each_in_order(
    db: &Connection,
    (table, month): Run,
    (after, last): (Option<&At>, Option<&At>),
    work: &mut Work<'_>,
) -> Result<(), StorageError> {
    let bound = |at: Option<&At>, default| at.map_or(default, |at| at.0);
    let (from, to) = (bound(after, i64::MIN), bound(last, i64::MAX));
    let of = month.map(suffix).unwrap_or_default();
    let order = match table {
        Table::Memories | Table::History => "position",
        Table::Places | Table::Edges => "slot",
        Table::Keys => "time, tenant, key, slot",
    };
    let sql = match table {
        Table::Memories => format!("SELECT {MEMORY} FROM m{of} WHERE position"),
        Table::History => format!("SELECT {HISTORY}, version FROM h{of} WHERE position"),
        Table::Places => {
            "SELECT tenant, id, month, version, slot FROM directory WHERE position = 0 AND slot".into()
        }
        Table::Edges => format!("{} WHERE slot", graph::rows_of()),
        Table::Keys => format!("SELECT {KEY} FROM keys WHERE time"),
    };
    let mut statement = db.prepare_cached(&format!("{sql} BETWEEN ?1 AND ?2 ORDER BY {order}"))?;
    let mut found = statement.query(params![from, to])?;
    while let Some(row) = found.next()? {
        let piece = match table {
            Table::Memories => Piece::Memory(rows::stored(row)?),
            Table::History => {
                Piece::History { version: row.get::<_, i64>(5)? as u64, row: rows::stored(row)? }
            }
            Table::Places => {
                let version = row.get::<_, i64>(3)? as u64;
                let place = Place { month: Month(row.get(2)?), position: 0, version };
                Piece::Deleted { tenant: row.get(0)?, id: row.get(1)?, slot: row.get(4)?, place }
            }
            Table::Edges => Piece::Edge(graph::row(row)?),
            Table::Keys => Piece::Key(rows::key_row(row)?),
        };
        // The query's bounds are those of what comes first in a place, both ends included.
        let within = after.is_none_or(|after| At::of(&piece) > *after)
            && last.is_none_or(|last| At::of(&piece) <= *last);
        if within {
            work(piece)?;
        }
    }
    Ok(())
}

fn hashes(db: &Connection) -> Result<RangeHashes, StorageError> {
    let mut all = RangeHashes::default();
    let (held, state) = (months::load(db)?, rows::load_state(db)?);
    let rows: u64 = held.values().map(|month| month.memories + month.history).sum();
    let range_rows = RANGE_ROWS_MIN.max((rows + state.keys + state.edges) / RANGES_MAX);
    for of in runs(&held) {
        let mut ranges: Vec<Range> = vec![];
        each_in_order(db, of, (None, None), &mut |piece| {
            let at = At::of(&piece);
            // Rows at one place have no order.
            if ranges.last().is_none_or(|range| range.rows >= range_rows && range.last < at) {
                ranges.push(Range::default());
            }
            if let Some(range) = ranges.last_mut() {
                range.last = at;
                range.add(&piece);
            }
            Ok(())
        })?;
        if !ranges.is_empty() {
            all.0.insert(of, ranges);
        }
    }
    Ok(all)
}

type Send<'a> = dyn FnMut(Piece, u64) -> Result<(), StorageError> + 'a;

/// A run on its way, range by range as the receiver has them.
struct Sending<'a> {
    of: Run,
    /// Where the range at hand begins, what it is so far, and those of its rows that are not sent yet.
    after: Option<At>,
    here: Range,
    waiting: Vec<Piece>,
    /// Ranges that follow each other and are kept.
    kept: Option<Kept>,
    send: &'a mut Send<'a>,
}

impl Sending<'_> {
    /// A row of the range at hand, which is `there` to the receiver.
    fn row(&mut self, piece: Piece, there: &Range) -> Result<(), StorageError> {
        self.here.add(&piece);
        self.waiting.push(piece);
        // The receiver's range has fewer.
        if self.here.rows > there.rows { self.flush() } else { Ok(()) }
    }

    /// The range at hand is at its end.
    fn end(&mut self, there: &Range) -> Result<(), StorageError> {
        if (self.here.rows, self.here.hash) == (there.rows, there.hash) {
            self.waiting.clear();
            let (of, after) = (self.of, self.after.take());
            let none = Kept { of, after, last: At::default(), rows: 0, hash: 0 };
            let kept = self.kept.get_or_insert(none);
            kept.last = there.last.clone();
            (kept.rows, kept.hash) = (kept.rows + there.rows, kept.hash.wrapping_add(there.hash));
        } else {
            self.flush()?;
        }
        (self.after, self.here) = (Some(there.last.clone()), Range::default());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        if let Some(kept) = self.kept.take() {
            let rows = kept.rows;
            (self.send)(Piece::Kept(kept), rows)?;
        }
        self.waiting.drain(..).try_for_each(|row| (self.send)(row, 1))
    }
}

fn send_run<'a>(
    db: &Connection,
    of: Run,
    there: &RangeHashes,
    send: &'a mut Send<'a>,
) -> Result<(), StorageError> {
    let mut ranges = there.0.get(&of).map_or(&[][..], |ranges| ranges).iter().peekable();
    let (here, waiting) = (Range::default(), vec![]);
    let mut sending = Sending { of, after: None, here, waiting, kept: None, send };
    each_in_order(db, of, (None, None), &mut |piece| {
        while let Some(range) = ranges.next_if(|range| range.last < At::of(&piece)) {
            sending.end(range)?;
        }
        match ranges.peek() {
            Some(range) => sending.row(piece, range),
            None => {
                sending.flush()?;
                (sending.send)(piece, 1)
            }
        }
    })?;
    if let Some(range) = ranges.next() {
        sending.end(range)?;
    }
    sending.flush()
}

/// Gives every row that a snapshot has to `send`, or that the receiver has it; each time with the number of rows.
pub(crate) fn send_rows(
    db: &Connection,
    there: &RangeHashes,
    send: &mut Send<'_>,
) -> Result<(), StorageError> {
    let mut all = runs(&months::load(db)?).into_iter();
    all.try_for_each(|of| send_run(db, of, there, &mut |piece, rows| send(piece, rows)))
}

/// The rows that a receiver has.
pub enum Material {
    /// Those of its views.
    Views(Arc<Shard>),
    /// Those of views that could not be used, and were set aside.
    Aside(Box<Records>),
}

/// How many rows of a snapshot came from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completed {
    pub arrived: u64,
    pub kept: u64,
}

impl Material {
    /// The views in `aside`, if some were set aside there, else the given ones.
    pub fn open(disk: &Arc<dyn Disk>, aside: &str, views: &Arc<Shard>) -> Result<Material, StorageError> {
        if !disk.list(aside)?.iter().any(|name| name == RECORDS) {
            return Ok(Material::Views(views.clone()));
        }
        match Records::open(disk.clone(), &format!("{aside}/{RECORDS}")) {
            Ok(records) => Ok(Material::Aside(Box::new(records))),
            Err(StorageError::Io(error)) => Err(error.into()),
            Err(error) => {
                sim::warn!("what was set aside in {aside} cannot be used ({error}): it is discarded");
                discard(&**disk, aside)?;
                Ok(Material::Views(views.clone()))
            }
        }
    }

    fn reader(&self) -> MutexGuard<'_, Connection> {
        match self {
            Material::Views(shard) => shard.records.reader(),
            Material::Aside(records) => records.reader(),
        }
    }

    pub fn hashes(&self) -> Result<RangeHashes, StorageError> {
        hashes(&*self.reader().transaction()?)
    }

    /// Makes a whole snapshot in the file `to` from one in `from` that leaves out what is here.
    pub fn complete(&self, disk: &dyn Disk, from: &str, to: &str) -> Result<Completed, StorageError> {
        let mut reader = self.reader();
        let rows = reader.transaction()?;
        let (mut reader, mut writer) = (Reader::open(disk, from)?, Writer::create(disk, to)?);
        let (mut done, mut whole) = (Completed::default(), vec![]);
        while let Some(chunk) = reader.next_chunk()? {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let refused = |e: codec::CodecError| StorageError::Snapshot(e.to_string());
                let (payload, then) = codec::unframe(rest).map_err(refused)?;
                if let Piece::Kept(kept) = codec::decode(payload).map_err(refused)? {
                    done.kept += keep(&rows, &kept, &mut |piece| {
                        codec::frame(&mut whole, &codec::encode(piece));
                        Ok(writer.push_full(&mut whole)?)
                    })?;
                } else {
                    whole.extend_from_slice(&rest[..rest.len() - then.len()]);
                    done.arrived += 1;
                }
                rest = then;
            }
            writer.push_full(&mut whole)?;
        }
        writer.push(&whole)?;
        writer.finish()?;
        // The last piece is no row.
        done.arrived = done.arrived.saturating_sub(1);
        Ok(done)
    }
}

/// Gives the rows of a range that is kept to `take`; how many.
fn keep(
    db: &Connection,
    kept: &Kept,
    take: &mut dyn FnMut(&Piece) -> Result<(), StorageError>,
) -> Result<u64, StorageError> {
    let mut here = Range::default();
    if kept.of.1.map_or(Ok(true), |month| months::load(db).map(|held| held.contains_key(&month)))? {
        each_in_order(db, kept.of, (kept.after.as_ref(), Some(&kept.last)), &mut |piece| {
            here.add(&piece);
            take(&piece)
        })?;
    }
    match (here.rows, here.hash) == (kept.rows, kept.hash) {
        true => Ok(here.rows),
        false => Err(StorageError::Snapshot(format!("{kept:?} is no longer here as it was"))),
    }
}

/// Moves the rows of views that cannot be used to `aside`, as [`Material`].
pub fn set_aside(disk: &dyn Disk, views: &str, aside: &str) -> Result<(), StorageError> {
    // A crash in between must not leave views that look new.
    facts::put(disk, views, CONDEMNED, b"set aside")?;
    disk.create_dir_all(aside)?;
    discard(disk, aside)?;
    for name in disk.list(views)?.into_iter().filter(|name| Records::has(name)) {
        disk.rename(&format!("{views}/{name}"), &format!("{aside}/{name}"))?;
    }
    disk.sync_dir(aside)?;
    Ok(disk.sync_dir(views)?)
}

/// Removes what was set aside.
pub fn discard(disk: &dyn Disk, aside: &str) -> Result<(), StorageError> {
    let left = disk.list(aside)?;
    for name in &left {
        disk.remove(&format!("{aside}/{name}"))?;
    }
    if !left.is_empty() {
        disk.sync_dir(aside)?;
    }
    Ok(())
}
