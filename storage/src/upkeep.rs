//! Upkeep of the vector view ([`crate::vectors`]): opening it, sealing its buffer, merging and healing its segments.
//!
//! | step | what is locked meanwhile | durable when |
//! |---|---|---|
//! | *seal*: the buffer becomes segments, one a month | nothing | the manifest names them |
//! | *merge*: some segments of a month become one, with graphs for its large scopes, without the dead | nothing | likewise |
//! | *compress*: an old month's segments are made anew from the records, with product codes alone | nothing | likewise |
//! | *heal*: a month's segments are made anew from the records | seals and merges | likewise |
//!
//! **The order that makes it safe.** A seal freezes the buffer at position S, writes its segments, makes the *records* durable up to S,
//! and only then replaces the manifest by one that says S. So a manifest never knows more than the records will after a power loss, and
//! opening fills the buffer with what the records have behind S, which are at most a buffer's worth. What died behind S follows from the
//! records' history, and what went with a slot from the records' list of that. Merges leave out only what was dead at S. What is made anew from the records leaves out what died until then, so a
//! checkpoint follows before it is named.
//!
//! **It gives way.** Segments are built on threads that yield the cores to searches and writes ([`sim::task::giving_way`]). They hold no
//! lock that those want: checkpoints and changes of the tree, which do, run as what they hold up runs.
//!
//! **What if it is not so.** At every start each month's live rows are counted and compared with what the records count; a month that differs, or
//! whose segments cannot be opened, is made anew, as are all when there is no manifest. A block that fails its checksum
//! when it is first used heals its month there and then, and the search that came upon it is answered from what was made.

use crate::codec;
use crate::error::StorageError;
use crate::model::{Memory, Month, Position};
use crate::records::Records;
use crate::records::months::{self, Months, suffix};
use crate::records::rows;
use crate::shard::{Shard, lock};
use crate::vectors::buffer::Buffer;
use crate::vectors::graph::{Graph, Points};
use crate::vectors::manifest::{self, Manifest};
use crate::vectors::product;
use crate::vectors::rows::{Bitmap, Hash, Kind, Rows};
use crate::vectors::segment::{Block, Precision, Segment, Writer};
use crate::vectors::{Coded, Failed, Frozen, Kill, Live, Tree, VectorOptions, codes};
use rusqlite::{Connection, params};
use sim::disk::Disk;
use sim::time::{Duration, Instant};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

/// A rebuild writes a segment when it has gathered so many times what a buffer may hold.
const REBUILD_BUFFERS: usize = 4;

/// A segment and its number.
type Numbered = (u64, Arc<Segment>);

/// Where vectors are made anew from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Snapshot(&'a Connection),
    /// Nobody's reader is held for long. What is superseded meanwhile may be found or not: what died is taken over afterwards.
    Records(&'a Records),
}

/// How vectors are kept: the dimensions that product codes are made of, and the points that were made for that.
struct Form<'a> {
    options: &'a VectorOptions,
    product: BTreeSet<usize>,
    books: BTreeMap<usize, Vec<f32>>,
}

impl<'a> Form<'a> {
    fn new(options: &'a VectorOptions) -> Self {
        Self { options, product: BTreeSet::new(), books: BTreeMap::new() }
    }
}

/// An owner's number and an id.
type Place = (i64, Vec<u8>);

/// Some of a month's vectors, in the order of owners and ids, and where to go on.
fn gather(
    db: &Connection,
    month: Month,
    up_to: Position,
    (owner, id): Place,
    options: &VectorOptions,
) -> Result<(Buffer, Option<Place>), StorageError> {
    let sql = format!(
        "SELECT body, vector, position, owner, id FROM m{} WHERE (owner, id) > (?1, ?2) AND position <= ?3
         AND vector != x'' ORDER BY owner, id",
        suffix(month)
    );
    let mut statement = db.prepare_cached(&sql)?;
    let mut found = statement.query(params![owner, id, rows::pack(up_to)])?;
    let mut buffer = Buffer::default();
    while let Some(row) = found.next()? {
        let blob = |at| row.get_ref(at)?.as_blob().map_err(rusqlite::Error::from);
        let memory = rows::decode_body(blob(0)?)?;
        buffer.insert(&Coded::new(&memory, row.get(2)?, rows::vector_from(blob(1)?)));
        if buffer.bytes() >= options.buffer_bytes_max.saturating_mul(REBUILD_BUFFERS) {
            return Ok((buffer, Some((row.get(3)?, row.get(4)?))));
        }
    }
    Ok((buffer, None))
}

/// Who may do what at a time.
#[derive(Default)]
pub(crate) struct Upkeep {
    sealing: Mutex<()>,
    /// Held by merges and by healing.
    merging: Mutex<()>,
    /// Held while a manifest is replaced.
    changing: Mutex<()>,
    /// The number of the next segment.
    next: AtomicU64,
}

/// Tells of long work now and then.
struct Progress {
    what: String,
    begun: Instant,
    told: Instant,
}

impl Progress {
    fn new(what: String) -> Progress {
        Progress { what, begun: Instant::now(), told: Instant::now() }
    }

    fn at(&mut self, done: usize, all: usize) {
        if self.told.elapsed() > Duration::from_secs(2) {
            self.told = Instant::now();
            sim::info!("{}: {done} of {all} after {:?}", self.what, self.begun.elapsed());
        }
    }
}

impl Upkeep {
    /// Writes a segment; `None` if nothing was put in. What cannot be finished is removed.
    fn segment(
        &self,
        disk: &dyn Disk,
        dir: &str,
        month: Month,
        put: impl FnOnce(&mut Writer) -> Result<(), StorageError>,
    ) -> Result<Option<Numbered>, StorageError> {
        let number = self.next.fetch_add(1, Relaxed);
        let path = manifest::file(dir, number);
        let write = || {
            let mut writer = Writer::create(disk, &path, month)?;
            put(&mut writer)?;
            if writer.rows() == 0 {
                return Ok(None);
            }
            let segment = writer.finish(disk)?;
            // What cannot be read now is made again when a search finds the same.
            if let Err(error) = segment.warm() {
                sim::error!("{error}");
            }
            Ok(Some((number, Arc::new(segment))))
        };
        let written = write();
        if !matches!(written, Ok(Some(_)))
            && let Err(error) = disk.remove(&path)
        {
            sim::debug!("{path}, which is not needed, stays until the next start: {error}");
        }
        written
    }

    /// Removes segments that no manifest names.
    fn discard(&self, disk: &dyn Disk, made: &[Numbered]) {
        for (_, segment) in made {
            if let Err(error) = disk.remove(&segment.path) {
                sim::debug!("{}, which is not needed, stays until the next start: {error}", segment.path);
            }
        }
    }

    /// Writes what a buffer has of one month as a segment without graphs.
    fn write(
        &self,
        disk: &dyn Disk,
        dir: &str,
        buffer: &Buffer,
        month: Month,
        form: &mut Form,
    ) -> Result<Option<Numbered>, StorageError> {
        self.segment(disk, dir, month, |writer| {
            let mut placed = BTreeMap::new();
            for dimension in &form.product {
                let of = || buffer.of_month(month).filter(|(_, block)| block.kind.dimension == *dimension);
                let vectors: Vec<&[f32]> =
                    of().flat_map(|(_, block)| block.rows().originals.chunks_exact(*dimension)).collect();
                if !vectors.is_empty() {
                    let book = form.books.entry(*dimension).or_insert_with(|| product::train(&vectors));
                    placed.insert(*dimension, writer.book(book)?);
                }
            }
            for (_, block) in buffer.of_month(month) {
                let (rows, dimension) = (block.rows(), block.kind.dimension);
                let mut order: Vec<(u32, u32)> = (0..rows.len() as u32).map(|row| (0, row)).collect();
                order.sort_by_key(|(_, row)| rows.ids[*row as usize]);
                let precision = match (placed.get(&dimension), form.books.get(&dimension)) {
                    (Some(at), Some(book)) => Precision::Product(book, *at),
                    _ if form.options.originals => Precision::Full,
                    _ => Precision::Codes,
                };
                writer.add(&block.kind, &[rows], &order, None, precision)?;
            }
            Ok(())
        })
    }

    /// Makes a month's segments from the records: the vectors that memories got up to a position, as far as they still have them.
    fn rebuild(
        &self,
        disk: &dyn Disk,
        dir: &str,
        source: Source<'_>,
        month: Month,
        up_to: Position,
        mut form: Form,
    ) -> Result<Vec<Numbered>, StorageError> {
        let mut made = vec![];
        let mut gather = || -> Result<(), StorageError> {
            let begun = Instant::now();
            let (mut after, mut done) = (Some((i64::MIN, vec![])), 0);
            while let Some(from) = after {
                let buffer;
                (buffer, after) = match source {
                    Source::Snapshot(db) => gather(db, month, up_to, from, form.options)?,
                    Source::Records(records) => {
                        let reader = records.reader();
                        if !months::load(&reader)?.contains_key(&month) {
                            // It was dropped.
                            break;
                        }
                        gather(&reader, month, up_to, from, form.options)?
                    }
                };
                done += buffer.rows();
                if buffer.rows() > 0 {
                    made.extend(self.write(disk, dir, &buffer, month, &mut form)?);
                }
                if after.is_some() {
                    sim::info!("making the vectors of {month} anew: {done} after {:?}", begun.elapsed());
                }
            }
            Ok(disk.sync_dir(dir)?)
        };
        match gather() {
            Ok(()) => Ok(made),
            Err(error) => {
                self.discard(disk, &made);
                Err(error)
            }
        }
    }

    /// All months' segments, from the records as `db` shows them.
    pub(crate) fn rebuild_all(
        &self,
        disk: &dyn Disk,
        dir: &str,
        db: &Connection,
        position: Position,
        options: &VectorOptions,
    ) -> Result<Vec<Numbered>, StorageError> {
        let mut made = vec![];
        if !options.kept {
            return Ok(made);
        }
        for month in months::load(db)?.keys() {
            made.extend(self.rebuild(
                disk,
                dir,
                Source::Snapshot(db),
                *month,
                position,
                Form::new(options),
            )?);
        }
        Ok(made)
    }

    /// A tree with these segments alone, all of which are durable and as the records are at a position.
    pub(crate) fn tree(options: VectorOptions, segments: Vec<Numbered>, position: Position) -> Tree {
        let mut tree = Tree::new(options);
        (tree.sealed, tree.applied) = (position, position);
        for (number, segment) in segments {
            tree.adopt(number, segment, 0);
        }
        tree.recount();
        tree
    }

    /// Opens the view; what is not there, or cannot be right, is made from the records.
    pub(crate) fn open(
        &self,
        disk: &dyn Disk,
        dir: &str,
        records: &Records,
        applied: Position,
        options: VectorOptions,
    ) -> Result<Tree, StorageError> {
        let names = disk.list(dir)?;
        let last = names.iter().filter_map(|name| manifest::number(name)).max();
        self.next.store(last.map_or(1, |last| last + 1), Relaxed);
        let reader = records.reader();
        let months = months::load(&reader)?;
        let loaded = manifest::load(disk, dir)?;
        let manifest = loaded.clone().filter(|manifest| manifest.position <= applied);
        let behind = match &manifest {
            Some(manifest) => rows_behind(&reader, &months, manifest.position)?,
            None => usize::MAX,
        };
        let kept = options.kept;
        let mut tree = match manifest.filter(|_| kept) {
            Some(manifest) if behind <= rows_in(&options) => {
                self.open_named(disk, dir, &reader, &months, manifest, options, applied)?
            }
            manifest => {
                if kept && (manifest.is_some() || months.values().any(|of| of.vectors > 0)) {
                    sim::trace::probe("vectors: made anew at the start");
                    sim::warn!("{dir}: making all segments of vectors anew from the records");
                }
                drop(reader);
                // What the manifest is about to say must hold after a power loss.
                records.checkpoint()?;
                let reader = records.reader();
                let made = self.rebuild_all(disk, dir, &reader, applied, &options)?;
                Upkeep::tree(options, made, applied)
            }
        };
        tree.applied = applied;
        let manifest = tree.manifest(tree.sealed, tree.sealed_kills, &[]);
        match kept {
            true if loaded.as_ref() != Some(&manifest) => manifest::store(disk, dir, &manifest)?,
            // Were they kept again, they would be made anew.
            false if loaded.is_some() => manifest::remove(disk, dir)?,
            _ => {}
        }
        let named: BTreeSet<u64> = tree.segments.iter().map(|live| live.number).collect();
        for name in disk.list(dir)? {
            if manifest::number(&name).is_some_and(|number| !named.contains(&number)) {
                disk.remove(&format!("{dir}/{name}"))?;
            }
        }
        Ok(tree)
    }

    /// Opens what a manifest names and follows the records from there.
    #[expect(clippy::too_many_arguments, reason = "one call, of what `open` has found")]
    fn open_named(
        &self,
        disk: &dyn Disk,
        dir: &str,
        db: &Connection,
        months: &Months,
        manifest: Manifest,
        options: VectorOptions,
        applied: Position,
    ) -> Result<Tree, StorageError> {
        let mut tree = Tree::new(options);
        (tree.sealed, tree.applied) = (manifest.position, applied);
        let mut suspects = BTreeSet::new();
        for named in manifest.segments.iter().filter(|named| months.contains_key(&named.month)) {
            let path = manifest::file(dir, named.number);
            match Segment::open(disk, &path) {
                Ok(segment) if (segment.month, segment.rows as u64) == (named.month, named.rows) => {
                    let dead = manifest::unpack(&named.dead);
                    tree.segments.push(Live::new(named.number, Arc::new(segment), dead));
                }
                Ok(_) => {
                    sim::error!("{path} is not the segment that the manifest names");
                    suspects.insert(named.month);
                }
                Err(error) => {
                    sim::error!("{error}");
                    suspects.insert(named.month);
                }
            }
        }
        catch_up(&mut tree, db, months)?;
        for (month, state) in months {
            let counted = tree.count_of_month(*month);
            if counted != state.vectors && !suspects.contains(month) {
                sim::trace::probe("vectors: a month was counted wrongly");
                sim::warn!("{dir}: {counted} vectors of {month}, the records have {}", state.vectors);
                suspects.insert(*month);
            }
        }
        for month in suspects {
            sim::trace::probe("vectors: a month made anew");
            sim::warn!("{dir}: making the vectors of {month} anew from the records");
            tree.segments.retain(|live| live.segment.month != month);
            let source = Source::Snapshot(db);
            let made = self.rebuild(disk, dir, source, month, tree.sealed, Form::new(&tree.options))?;
            // What they hold is alive now.
            let kills = tree.next_kill();
            made.into_iter().for_each(|(number, segment)| tree.adopt(number, segment, kills));
        }
        tree.recount();
        Ok(tree)
    }
}

/// About how many rows a buffer holds; twice that, since a seal under way needs its time.
fn rows_in(options: &VectorOptions) -> usize {
    2 * options.buffer_bytes_max / 512 + 1024
}

fn rows_behind(db: &Connection, months: &Months, position: Position) -> Result<usize, StorageError> {
    let mut behind = 0;
    for month in months.keys() {
        let sql = format!("SELECT count(*) FROM m{} WHERE position > ?1", suffix(*month));
        behind +=
            db.prepare_cached(&sql)?.query_row([rows::pack(position)], |row| row.get::<_, i64>(0))? as usize;
    }
    Ok(behind)
}

/// Brings a tree from its manifest's position to where the records are.
fn catch_up(tree: &mut Tree, db: &Connection, months: &Months) -> Result<(), StorageError> {
    let from = rows::pack(tree.sealed);
    let dimensions: BTreeSet<usize> =
        tree.segments.iter().flat_map(|live| live.segment.dimensions()).collect();
    let superseded = |memory: &Memory, months: &mut dyn Iterator<Item = &Month>, tree: &mut Tree| {
        for month in months {
            let sql = format!("SELECT position, body FROM h{} WHERE tenant = ?1 AND id = ?2", suffix(*month));
            let mut statement = db.prepare_cached(&sql)?;
            let mut found = statement.query(params![memory.tenant, &memory.id[..]])?;
            while let Some(row) = found.next()? {
                let (id, position): (_, i64) = (memory.id, row.get(0)?);
                let old = rows::decode_body(row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?)?;
                for dimension in &dimensions {
                    let kind = Kind { owner: old.owner(), space: old.space.clone(), dimension: *dimension };
                    tree.kill(Kill::Row { month: *month, hash: kind.hash(), id, position });
                }
            }
        }
        Ok::<(), StorageError>(())
    };
    for month in months.keys() {
        let sql = format!("SELECT min(position) FROM m{}", suffix(*month));
        let first: Option<i64> = db.prepare_cached(&sql)?.query_row([], |row| row.get(0))?;
        if first.is_none_or(|first| first > from) {
            // Nothing is left of what the segments have, perhaps because the month was dropped and has come back.
            tree.kill(Kill::Month(*month));
        }
        let sql = format!("SELECT body, vector, position FROM m{} WHERE position > ?1", suffix(*month));
        let mut statement = db.prepare_cached(&sql)?;
        let mut found = statement.query([from])?;
        while let Some(row) = found.next()? {
            let blob = |at| row.get_ref(at)?.as_blob().map_err(rusqlite::Error::from);
            let memory = rows::decode_body(blob(0)?)?;
            let vector = rows::vector_from(blob(1)?);
            if !vector.is_empty() {
                tree.put(&Coded::new(&memory, row.get(2)?, vector));
            }
            if memory.version > 1 {
                // It may have been in another month before it was deleted, or had expired.
                superseded(&memory, &mut months.keys(), tree)?;
            }
        }
        let sql = format!("SELECT body FROM h{} WHERE position > ?1 AND kind = 3", suffix(*month));
        let mut statement = db.prepare_cached(&sql)?;
        let mut found = statement.query([from])?;
        while let Some(row) = found.next()? {
            let memory = rows::decode_body(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?)?;
            superseded(&memory, &mut std::iter::once(month), tree)?;
        }
    }
    // What went with a slot has left no history.
    let mut statement = db.prepare_cached("SELECT month, kind, id, position FROM dropped WHERE at > ?1")?;
    let mut found = statement.query([from])?;
    while let Some(row) = found.next()? {
        let kind = row.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
        let kind: Kind = codec::decode(kind).map_err(StorageError::corrupt("the list of dropped vectors"))?;
        let (month, id, position): (_, _, i64) = (Month(row.get(0)?), row.get(2)?, row.get(3)?);
        for dimension in &dimensions {
            let hash = Kind { dimension: *dimension, ..kind.clone() }.hash();
            tree.kill(Kill::Row { month, hash, id, position });
        }
    }
    Ok(())
}

impl Shard {
    /// Replaces the manifest by one without some segments, and with what was made. `kills_from`: what died since then is dead in that.
    /// Called with the lock of changes held.
    fn commit(
        &self,
        made: Vec<Numbered>,
        without: &[u64],
        kills_from: u64,
        sealed: Option<(Position, u64)>,
    ) -> Result<(), StorageError> {
        let next = {
            let tree = self.tree();
            let (position, kills_to) = sealed.unwrap_or((tree.sealed, tree.sealed_kills));
            let mut next = tree.manifest(position, kills_to, without);
            for (number, segment) in &made {
                // What of it died between its beginning and the manifest's position.
                let mut live = Live::new(*number, segment.clone(), Bitmap::default());
                tree.kills(kills_from, kills_to).for_each(|kill| live.seal_kill(kill));
                let (number, month, rows) = (*number, live.segment.month, live.segment.rows as u64);
                let dead = manifest::pack(&live.sealed_dead);
                next.segments.push(manifest::Named { number, month, rows, dead });
            }
            next
        };
        manifest::store(&*self.disk, &self.dir, &next)?;
        let mut tree = self.tree_mut();
        if let Some((position, kills_to)) = sealed {
            let kills: Vec<Kill> = tree.kills(tree.sealed_kills, kills_to).cloned().collect();
            for live in &mut tree.segments {
                kills.iter().for_each(|kill| live.seal_kill(kill));
            }
            (tree.sealed, tree.sealed_kills) = (position, kills_to);
            tree.frozen = None;
        }
        tree.segments.retain(|live| !without.contains(&live.number));
        made.into_iter().for_each(|(number, segment)| tree.adopt(number, segment, kills_from));
        tree.forget_kills();
        drop(tree);
        for number in without {
            self.disk.remove(&manifest::file(&self.dir, *number))?;
        }
        Ok(())
    }

    /// Whether [`Shard::seal`] has something to do that should not wait.
    pub fn seal_due(&self) -> bool {
        self.tree().seal_due()
    }

    /// Writes the vectors that are in memory as segments. Searches and applying go on meanwhile. After an error all is as before, and it can be
    /// tried again.
    pub fn seal(&self) -> Result<(), StorageError> {
        let _sealing = lock(&self.upkeep.sealing);
        let (buffer, position, kills) = {
            let mut tree = self.tree_mut();
            if tree.frozen.is_none() {
                if tree.buffer.rows() == 0 && tree.next_kill() == tree.sealed_kills {
                    return Ok(());
                }
                let mut buffer = std::mem::take(&mut tree.buffer);
                buffer.freeze();
                let (position, kills) = (tree.applied, tree.next_kill());
                let dead = Bitmap::default();
                tree.frozen = Some(Frozen { buffer: Arc::new(buffer), dead, position, kills });
            }
            let Some(frozen) = &tree.frozen else { return Ok(()) };
            (frozen.buffer.clone(), frozen.position, frozen.kills)
        };
        let mut made = vec![];
        let mut write = || {
            sim::task::giving_way(|| {
                for month in buffer.months() {
                    let mut form = Form::new(&self.vector_options);
                    made.extend(self.upkeep.write(&*self.disk, &self.dir, &buffer, month, &mut form)?);
                }
                Ok::<(), StorageError>(self.disk.sync_dir(&self.dir)?)
            })?;
            // Writers wait for this, so it waits for nobody.
            self.records.checkpoint()
        };
        if let Err(error) = write() {
            self.upkeep.discard(&*self.disk, &made);
            return Err(error);
        }
        let _changing = lock(&self.upkeep.changing);
        let (rows, count) = (buffer.rows(), made.len());
        self.commit(made, &[], kills, Some((position, kills)))?;
        sim::trace::probe("vectors: sealed");
        sim::debug!("{rows} vectors sealed up to {} in {count} segments", position.index);
        Ok(())
    }

    /// Merges some segments, if that is due; says whether it was. Searches and applying go on meanwhile.
    pub fn merge(&self) -> Result<bool, StorageError> {
        let suspect = self.tree().suspects.first().copied();
        if let Some(month) = suspect {
            self.heal(month, "it contradicts the records")?;
            return Ok(true);
        }
        let _merging = lock(&self.upkeep.merging);
        let (inputs, kills_from, month) = {
            let mut tree = self.tree_mut();
            let Some(numbers) = tree.merge_due() else {
                tree.erased = tree.erased.filter(|erased| tree.sealed_kills < *erased);
                return Ok(false);
            };
            tree.needed_kills = Some(tree.sealed_kills);
            let chosen = tree.segments.iter().filter(|live| numbers.contains(&live.number));
            let inputs: Vec<_> =
                chosen.map(|live| (live.number, live.segment.clone(), live.sealed_dead.clone())).collect();
            let month = inputs[0].1.month;
            (inputs, tree.sealed_kills, month)
        };
        let merged = sim::task::giving_way(|| self.merged(&inputs, month));
        let numbers: Vec<u64> = inputs.iter().map(|(number, ..)| *number).collect();
        let outcome = self.replace(merged, &numbers, kills_from);
        match outcome {
            Err(StorageError::Damaged { what, problem }) => {
                drop(_merging);
                self.heal(month, &format!("{what}: {problem}"))?;
            }
            outcome => outcome?,
        }
        sim::trace::probe("vectors: merged");
        sim::debug!("{} segments of {month} merged", numbers.len());
        Ok(true)
    }

    /// One segment, or none if nothing is alive, from several of a month.
    fn merged(
        &self,
        inputs: &[(u64, Arc<Segment>, Bitmap)],
        month: Month,
    ) -> Result<Vec<Numbered>, StorageError> {
        let options = &self.vector_options;
        let hashes: BTreeSet<Hash> =
            inputs.iter().flat_map(|(_, segment, _)| segment.hashes().copied()).collect();
        let mut progress = Progress::new(format!("merging {} segments of {month}", inputs.len()));
        let all: usize = inputs.iter().map(|(_, segment, dead)| segment.rows - dead.len()).sum();
        let made = self.upkeep.segment(&*self.disk, &self.dir, month, |writer| {
            for hash in hashes {
                let mut blocks: Vec<(Block<'_>, &Bitmap)> = vec![];
                let mut originals = options.originals;
                for (_, segment, dead) in inputs {
                    if let Some(at) = segment.find(&hash) {
                        originals &= segment.has_originals(at);
                        blocks.push((segment.block(at, true)?, dead));
                    }
                }
                let sources: Vec<Rows<'_>> = blocks.iter().map(|(block, _)| block.rows).collect();
                let mut order: Vec<(u32, u32)> = vec![];
                for (source, (block, dead)) in (0..).zip(&blocks) {
                    let alive = |row: &u32| !dead.contains(block.base + *row as usize);
                    order.extend((0..block.rows.len() as u32).filter(alive).map(|row| (source, row)));
                }
                order.sort_by_key(|(source, row)| sources[*source as usize].ids[*row as usize]);
                let Some((first, _)) = blocks.first().filter(|_| !order.is_empty()) else { continue };
                let kind = &first.kind;
                let graph = (order.len() >= options.graph_rows_min).then(|| {
                    let stride = codes::stride(kind.dimension);
                    let mut codes = Vec::with_capacity(order.len() * stride);
                    let mut rests = Vec::with_capacity(order.len() * stride / 2);
                    let mut scales = Vec::with_capacity(order.len());
                    for (source, row) in &order {
                        codes.extend_from_slice(sources[*source as usize].codes_of(*row));
                        rests.extend_from_slice(sources[*source as usize].rests_of(*row));
                        scales.push(sources[*source as usize].scales[*row as usize]);
                    }
                    let level = crate::vectors::cpu::Level::best();
                    let points = Points { codes: &codes, rests: &rests, scales: &scales, stride, level };
                    let before = writer.rows();
                    Graph::build(&points, options.graph, &mut |done| progress.at(before + done, all))
                });
                let graph = graph.map(|(graph, renumbered, repair)| {
                    sim::debug!(
                        "a graph of {} vectors: {} linked in, {} beside it",
                        order.len(),
                        repair.missed - repair.left,
                        repair.left
                    );
                    order = renumbered.iter().map(|row| order[*row as usize]).collect();
                    graph
                });
                let precision = if originals { Precision::Full } else { Precision::Codes };
                writer.add(kind, &sources, &order, graph.as_ref(), precision)?;
                progress.at(writer.rows(), all);
            }
            Ok(())
        })?;
        self.disk.sync_dir(&self.dir)?;
        Ok(made.into_iter().collect())
    }

    fn rebuilt(
        &self,
        month: Month,
        up_to: Position,
        product: BTreeSet<usize>,
    ) -> Result<Vec<Numbered>, StorageError> {
        let source = Source::Records(&self.records);
        let disk = &*self.disk;
        let form = Form { product, ..Form::new(&self.vector_options) };
        let made = self.upkeep.rebuild(disk, &self.dir, source, month, up_to, form)?;
        // What died since then is not in it, and must not come back to life with a power loss.
        if let Err(error) = self.records.checkpoint() {
            self.upkeep.discard(disk, &made);
            return Err(error);
        }
        Ok(made)
    }

    /// Keeps only product codes of the vectors of one month before another, if there is one of which it does not; says whether there was.
    /// Searches and applying go on meanwhile.
    pub fn compress(&self, before: Month) -> Result<bool, StorageError> {
        let _merging = lock(&self.upkeep.merging);
        let (month, dimensions, numbers, sealed, kills_from) = {
            let mut tree = self.tree_mut();
            let Some((month, dimensions)) = tree.product_due(before) else { return Ok(false) };
            tree.needed_kills = Some(tree.sealed_kills);
            let of_month = tree.segments.iter().filter(|live| live.segment.month == month);
            let numbers: Vec<u64> = of_month.map(|live| live.number).collect();
            (month, dimensions, numbers, tree.sealed, tree.sealed_kills)
        };
        let made = self.rebuilt(month, sealed, dimensions);
        self.replace(made, &numbers, kills_from)?;
        sim::trace::probe("vectors: compressed");
        Ok(true)
    }

    /// Puts what was made in the place of segments, if those are still there.
    fn replace(
        &self,
        made: Result<Vec<Numbered>, StorageError>,
        numbers: &[u64],
        kills_from: u64,
    ) -> Result<(), StorageError> {
        let outcome = made.and_then(|made| {
            let _changing = lock(&self.upkeep.changing);
            // An import, or a dropped month, takes segments away.
            let all_there = {
                let tree = self.tree();
                numbers.iter().all(|number| tree.segments.iter().any(|live| live.number == *number))
            };
            if all_there {
                self.commit(made, numbers, kills_from, None)
            } else {
                self.upkeep.discard(&*self.disk, &made);
                Ok(())
            }
        });
        let mut tree = self.tree_mut();
        tree.needed_kills = None;
        tree.forget_kills();
        outcome
    }

    /// Makes a month's segments anew from the records. Searches and applying go on meanwhile, but for what waits for it.
    pub(crate) fn heal(&self, month: Month, reason: &str) -> Result<(), StorageError> {
        let state = || {
            let tree = self.tree();
            let of = tree.segments.iter().filter(|live| live.segment.month == month);
            (tree.sealed, tree.sealed_kills, of.map(|live| live.number).collect::<Vec<_>>())
        };
        let (_, _, damaged) = state();
        let _merging = lock(&self.upkeep.merging);
        let _changing = lock(&self.upkeep.changing);
        let (sealed, kills, without) = state();
        if without != damaged {
            // Someone else came upon it too.
            return Ok(());
        }
        sim::trace::probe("vectors: a month healed");
        sim::error!("{}: making the vectors of {month} anew from the records ({reason})", self.dir);
        let made = self.rebuilt(month, sealed, BTreeSet::new())?;
        self.commit(made, &without, kills, None)?;
        let mut tree = self.tree_mut();
        tree.suspects.remove(&month);
        tree.recount();
        Ok(())
    }

    /// While it is held, nothing is sealed.
    pub(crate) fn no_seal(&self) -> MutexGuard<'_, ()> {
        lock(&self.upkeep.sealing)
    }

    /// A tree of what a transaction is about to commit.
    pub(crate) fn tree_from(&self, db: &Connection, position: Position) -> Result<Tree, StorageError> {
        let mut made = vec![];
        if !sim::planted!("leave-the-vectors-out-of-a-snapshot") {
            made = self.upkeep.rebuild_all(&*self.disk, &self.dir, db, position, &self.vector_options)?;
        }
        Ok(Upkeep::tree(self.vector_options.clone(), made, position))
    }

    /// Names the segments that took the place of others, and removes those.
    pub(crate) fn forget_tree(&self, old: &Tree) -> Result<(), StorageError> {
        if !self.vector_options.kept {
            return Ok(());
        }
        let _changing = lock(&self.upkeep.changing);
        let manifest = {
            let tree = self.tree();
            tree.manifest(tree.sealed, tree.sealed_kills, &[])
        };
        manifest::store(&*self.disk, &self.dir, &manifest)?;
        for live in &old.segments {
            self.disk.remove(&manifest::file(&self.dir, live.number))?;
        }
        Ok(())
    }

    /// Heals what a read of the vectors came upon; what cannot be healed is its error.
    pub(crate) fn healed(&self, failed: Failed) -> Result<(), StorageError> {
        match failed.month {
            Some(month) => self.heal(month, &failed.error.to_string()),
            None => Err(failed.error),
        }
    }

    /// What the view consists of, for inspection: of each month its segments with rows and dead rows.
    pub fn segments(&self) -> BTreeMap<Month, Vec<(u64, usize, usize)>> {
        let mut found: BTreeMap<Month, Vec<(u64, usize, usize)>> = BTreeMap::new();
        for live in &self.tree().segments {
            let of = found.entry(live.segment.month).or_default();
            of.push((live.number, live.segment.rows, live.dead.len()));
        }
        found
    }
}
