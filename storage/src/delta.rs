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
//! | edges, places of deleted memories | a slot's | they are small, and have no order that replicas share |
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
use crate::records::rows::{self, HISTORY, KEY, MEMORY, Place, Stored};
use crate::records::{RECORDS, Records};
use crate::shard::{CONDEMNED, Shard, each};
use crate::slots::Slot;
use crate::snapshot::Piece;
use bincode::{Decode, Encode};
use rusqlite::{Connection, params};
use sim::disk::Disk;
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};

/// Rows of a range, at least.
const RANGE_ROWS_MIN: u64 = 16;
/// Ranges of memories and history, about; there are longer ones rather than more.
const RANGES_MAX: u64 = 1 << 16;
/// So many rows of a range are looked at before it counts as another one than the receiver's.
const ROWS_AHEAD_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub(crate) enum Table {
    Memories,
    History,
    /// Where deleted memories were.
    Places,
    Edges,
    Keys,
}

/// What lies by slots.
const BY_SLOT: [Table; 2] = [Table::Places, Table::Edges];

/// Rows in an order that replicas share: a table's, of a month if it is kept by months.
type Run = (Table, Option<Month>);

/// A row's place in a run: its position, or a key's time, tenant, name and slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub(crate) struct At(i64, String, String, Slot);

/// What the receiver of a snapshot has, and the hash of that.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub(crate) enum Kept {
    /// The rows of a run behind one place and up to another.
    Rows { of: (Table, Option<Month>), after: Option<At>, last: At, hash: u128 },
    /// The rows of a slot.
    Slot { table: Table, slot: Slot, hash: u128 },
}

/// Rows of a run that follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Range {
    /// The last row's place. The first one's is behind the range before.
    last: At,
    /// Sum of the rows' hashes, modulo 2¹²⁸.
    hash: u128,
}

/// What a replica has, as hashes. Of no views: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct RangeHashes {
    runs: BTreeMap<Run, Vec<Range>>,
    slots: BTreeMap<(Table, Slot), u128>,
}

/// The runs that views have.
fn runs(held: &Months) -> Vec<Run> {
    let by_month = [Table::Memories, Table::History].into_iter();
    let by_month = by_month.flat_map(|table| held.keys().map(move |month| (table, Some(*month))));
    by_month.chain([(Table::Keys, None)]).collect()
}

/// Calls `work` for the rows of a run behind one place and up to another, in their order, each as a piece with its place and its hash.
fn each_in_order(
    db: &Connection,
    (table, month): Run,
    (after, last): (Option<&At>, Option<&At>),
    work: &mut dyn FnMut(Piece, At, u128) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let bound = |at: Option<&At>, default| at.map_or(default, |at| at.0);
    let (from, to) = (bound(after, i64::MIN), bound(last, i64::MAX));
    let Some(month) = month else {
        let sql =
            format!("SELECT {KEY} FROM keys WHERE time BETWEEN ?1 AND ?2 ORDER BY time, tenant, key, slot");
        let mut statement = db.prepare_cached(&sql)?;
        let mut found = statement.query(params![from, to])?;
        while let Some(row) = found.next()? {
            let row = rows::key_row(row)?;
            let at = At(row.time, row.tenant.clone(), row.key.clone(), row.slot);
            if after.is_none_or(|after| at > *after) && last.is_none_or(|last| at <= *last) {
                let hash = rows::key_hash(&row);
                work(Piece::Key(row), at, hash)?;
            }
        }
        return Ok(());
    };
    let (columns, letter, name) = match table {
        Table::History => (format!("{HISTORY}, version"), 'h', "history"),
        _ => (MEMORY.to_string(), 'm', "memories"),
    };
    let of = suffix(month);
    let sql = format!(
        "SELECT {columns} FROM {letter}{of} WHERE position > ?1 AND position <= ?2 ORDER BY position"
    );
    let mut statement = db.prepare_cached(&sql)?;
    let mut found = statement.query(params![from, to])?;
    while let Some(found) = found.next()? {
        let row: Stored = rows::stored(found)?;
        let (at, hash) = (At(row.position, String::new(), String::new(), 0), rows::memory_hash(name, &row));
        let piece = match table {
            Table::History => Piece::History { version: found.get::<_, i64>(5)? as u64, row },
            _ => Piece::Memory(row),
        };
        work(piece, at, hash)?;
    }
    Ok(())
}

/// Calls `work` for the rows of a table that lie by slots; only for one slot's if that is given.
fn each_of_slots(
    db: &Connection,
    (table, slot): (Table, Option<Slot>),
    work: &mut dyn FnMut(Piece, Slot, u128) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let only = slot.map_or("TRUE".to_string(), |slot| format!("slot = {slot}"));
    match table {
        Table::Edges => graph::each(db, slot, &mut |edge| {
            let (slot, hash) = (edge.slot, graph::hash(&edge));
            work(Piece::Edge(edge), slot, hash)
        }),
        _ => {
            let sql = format!(
                "SELECT tenant, id, month, version, slot FROM directory WHERE position = 0 AND {only}"
            );
            each(db, &sql, |row| {
                let version = row.get::<_, i64>(3)? as u64;
                let (slot, place) = (row.get(4)?, Place { month: Month(row.get(2)?), position: 0, version });
                let piece = Piece::Deleted { tenant: row.get(0)?, id: row.get(1)?, slot, place };
                let hash = rows::hash_of(b"places", &codec::encode(&piece));
                work(piece, slot, hash)
            })
        }
    }
}

fn hashes(db: &Connection) -> Result<RangeHashes, StorageError> {
    let mut all = RangeHashes::default();
    let held = months::load(db)?;
    let rows: u64 = held.values().map(|month| month.memories + month.history).sum();
    let range_rows = RANGE_ROWS_MIN.max((rows + rows::load_state(db)?.keys) / RANGES_MAX);
    for of in runs(&held) {
        let (mut ranges, mut rows) = (vec![], 0);
        each_in_order(db, of, (None, None), &mut |_, last, hash| {
            if rows % range_rows == 0 {
                ranges.push(Range::default());
            }
            rows += 1;
            if let Some(range) = ranges.last_mut() {
                *range = Range { last, hash: range.hash.wrapping_add(hash) };
            }
            Ok(())
        })?;
        if !ranges.is_empty() {
            all.runs.insert(of, ranges);
        }
    }
    for table in BY_SLOT {
        each_of_slots(db, (table, None), &mut |_, slot, hash| {
            let sum = all.slots.entry((table, slot)).or_default();
            *sum = sum.wrapping_add(hash);
            Ok(())
        })?;
    }
    Ok(all)
}

/// A run on its way, range by range as the receiver has them.
struct Sending<'a> {
    of: Run,
    /// Where the range at hand begins, and its rows so far.
    after: Option<At>,
    rows: Vec<Piece>,
    hash: u128,
    /// Ranges that follow each other and are kept, and their rows.
    kept: Option<(Kept, u64)>,
    send: &'a mut dyn FnMut(Piece, u64) -> Result<(), StorageError>,
}

impl Sending<'_> {
    fn row(&mut self, piece: Piece, hash: u128) -> Result<(), StorageError> {
        self.hash = self.hash.wrapping_add(hash);
        self.rows.push(piece);
        // The receiver's range has fewer.
        if self.rows.len() > ROWS_AHEAD_MAX { self.flush() } else { Ok(()) }
    }

    /// The range at hand is at its end.
    fn end(&mut self, range: &Range) -> Result<(), StorageError> {
        if self.hash == range.hash && !self.rows.is_empty() {
            let more = self.rows.len() as u64;
            self.rows.clear();
            if let Some((Kept::Rows { last, hash, .. }, rows)) = &mut self.kept {
                (*last, *hash, *rows) = (range.last.clone(), hash.wrapping_add(range.hash), *rows + more);
            } else {
                let Range { last, hash } = range.clone();
                self.kept = Some((Kept::Rows { of: self.of, after: self.after.take(), last, hash }, more));
            }
        } else {
            self.flush()?;
        }
        (self.after, self.hash) = (Some(range.last.clone()), 0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        if let Some((kept, rows)) = self.kept.take() {
            (self.send)(Piece::Kept(kept), rows)?;
        }
        self.rows.drain(..).try_for_each(|row| (self.send)(row, 1))
    }
}

fn send_run(
    db: &Connection,
    of: Run,
    there: &RangeHashes,
    send: &mut dyn FnMut(Piece, u64) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let mut ranges = there.runs.get(&of).map_or(&[][..], |ranges| ranges).iter().peekable();
    let mut sending = Sending { of, after: None, rows: vec![], hash: 0, kept: None, send };
    each_in_order(db, of, (None, None), &mut |piece, at, hash| {
        while let Some(range) = ranges.next_if(|range| range.last < at) {
            sending.end(range)?;
        }
        match ranges.peek() {
            Some(_) => sending.row(piece, hash),
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

/// Sends what lies by slots.
fn send_slots(
    db: &Connection,
    table: Table,
    there: &RangeHashes,
    send: &mut dyn FnMut(Piece, u64) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    // Which of the receiver's slots are the same here, and how many rows each has.
    let mut here: BTreeMap<Slot, (u128, u64)> = BTreeMap::new();
    let asked = there.slots.keys().any(|(of, _)| *of == table);
    if asked {
        each_of_slots(db, (table, None), &mut |_, slot, hash| {
            let (sum, rows) = here.entry(slot).or_default();
            (*sum, *rows) = (sum.wrapping_add(hash), *rows + 1);
            Ok(())
        })?;
    }
    here.retain(|slot, (hash, _)| there.slots.get(&(table, *slot)) == Some(hash));
    for (slot, (hash, rows)) in &here {
        send(Piece::Kept(Kept::Slot { table, slot: *slot, hash: *hash }), *rows)?;
    }
    each_of_slots(db, (table, None), &mut |piece, slot, _| match here.contains_key(&slot) {
        true => Ok(()),
        false => send(piece, 1),
    })
}

/// Gives every row that a snapshot has to `send`, or that the receiver has it; each time with the number of rows.
pub(crate) fn send_rows(
    db: &Connection,
    there: &RangeHashes,
    send: &mut dyn FnMut(Piece, u64) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    runs(&months::load(db)?).into_iter().try_for_each(|of| send_run(db, of, there, send))?;
    BY_SLOT.into_iter().try_for_each(|table| send_slots(db, table, there, send))
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
    let (mut rows, mut sum) = (0, 0u128);
    let mut one = |piece: Piece, hash: u128| {
        (rows, sum) = (rows + 1, sum.wrapping_add(hash));
        take(&piece)
    };
    let hash = match kept {
        Kept::Rows { of, after, last, hash } => {
            let held = months::load(db)?;
            if of.1.is_none_or(|month| held.contains_key(&month)) {
                each_in_order(db, *of, (after.as_ref(), Some(last)), &mut |piece, _, hash| one(piece, hash))?;
            }
            hash
        }
        Kept::Slot { table, slot, hash } => {
            each_of_slots(db, (*table, Some(*slot)), &mut |piece, _, hash| one(piece, hash))?;
            hash
        }
    };
    match sum == *hash {
        true => Ok(rows),
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
