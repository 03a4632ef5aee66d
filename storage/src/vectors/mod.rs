//! The vector view: a log-structured merge tree, keyed by (month, scope).
//!
//! ```text
//! apply ─► buffer (memory) ──seal──► segments of a month (mapped files) ──merge──► fewer, larger ones, with graphs
//!            │                          │
//!            └────────── search ────────┘    exact over codes, then f32; a graph where a scope has 10,000 in a month
//! ```
//!
//! - [`buffer`]: what no segment has yet. After a restart it is filled again from the records, which have every vector too: so nothing
//!   here is ever lost, and a disk that lies costs time.
//! - [`segment`]: immutable, checksummed, mapped. [`manifest`]: which of them count, and which of their rows are dead.
//! - [`codes`]: vectors as small integers with a proven bound; [`scan`]: exact search with their help; [`dot`]: what decides.
//! - [`product`]: as little as can be kept of vectors that are seldom searched.
//! - [`facets`]: what filters ask of memories, indexed beside their vectors. [`conditions`]: which memories meet a condition that the records
//!   alone can tell, remembered between searches.
//! - [`graph`]: approximate search in large scopes, in which every point is found.
//!
//! **What belongs together.** A search compares vectors of one owner, one embedding space and one dimension only ([`rows::Kind`]); of each
//! month they lie side by side. Filters come before and during the search: never fewer than k while k exist. Equal scores are ordered by id.
//!
//! **A version is a row.** A memory's new version comes with its vector, as a new row, at a new position; the old row is *dead*: a bit
//! in memory, and in the manifest with the next seal. Merging leaves the dead out. Rows are named by id and position, so what is killed
//! twice, or replayed, is killed once.
//!
//! **Building stalls nobody.** Sealing freezes the buffer, which is searched on, and writes it without any lock; merging reads only files.
//! What dies meanwhile is kept in a list (`kills`) and taken over into what was built. The upkeep is driven by [`crate::Shard`].

pub mod buffer;
pub mod codes;
pub mod conditions;
pub mod cpu;
mod dot;
pub mod facets;
pub mod graph;
pub mod manifest;
pub mod product;
pub mod rows;
pub mod scan;
pub mod segment;

pub use dot::{dot, dot_rows};

use crate::error::StorageError;
use crate::model::{Filter, Memory, MemoryId, Month, Owner, Position, Status, UnixMs};
use crate::slots::Slots;
use buffer::Buffer;
pub use buffer::Coded;
use codes::Query;
use conditions::{Conditions, Meeting};
use facets::Met;
use graph::{GraphOptions, Points};
use manifest::{Manifest, Named};
use rows::{Allowed, Bitmap, Hash, Kind, Rows, Wanted};
use scan::{Asked, Best, Fetch, Scored};
use segment::Segment;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

#[derive(Clone, Debug)]
pub struct VectorOptions {
    /// Whether vectors are kept for searching at all; the records have them in any case.
    pub kept: bool,
    /// The buffer is sealed when it has grown to this, in bytes.
    pub buffer_bytes_max: usize,
    /// A scope with so many vectors in a month gets a graph.
    pub graph_rows_min: usize,
    pub graph: GraphOptions,
    /// A search of a graph keeps at least so many nearest.
    pub ef_search: usize,
    /// So many segments of a month and about one size are merged.
    pub merge_segments: usize,
    /// No merge makes a segment of more rows than this. A graph takes about two kilobytes a row while it is built, so that bounds its memory
    /// too; a larger scope has several graphs.
    pub segment_rows_max: usize,
    /// Segments keep the vectors themselves, beside their codes. Else the few that must be compared are read from the records.
    pub originals: bool,
    /// Product codes are made for at least so many vectors of a dimension in a month: fewer do not pay for their points.
    pub product_rows_min: usize,
    /// What meets the filters of searches is remembered in at most so many bytes.
    pub conditions_bytes_max: usize,
}

impl Default for VectorOptions {
    fn default() -> VectorOptions {
        VectorOptions {
            kept: true,
            buffer_bytes_max: 32 << 20,
            graph_rows_min: 10_000,
            graph: GraphOptions::default(),
            ef_search: 48,
            merge_segments: 4,
            segment_rows_max: 1 << 20,
            originals: true,
            product_rows_min: 4096,
            conditions_bytes_max: 32 << 20,
        }
    }
}

/// A segment is merged when this share of its rows is dead.
const DEAD_SHARE: f64 = 0.2;
/// The list of what died since the last seal causes one at this length.
const KILLS_MAX: usize = 100_000;

/// A segment that counts.
pub struct Live {
    pub number: u64,
    pub segment: Arc<Segment>,
    pub dead: Bitmap,
    /// Of these, those that the manifest knows.
    pub sealed_dead: Bitmap,
}

/// A buffer that is being sealed.
pub struct Frozen {
    pub buffer: Arc<Buffer>,
    pub dead: Bitmap,
    /// The position up to which it was filled, and the length of the list of kills then.
    pub position: Position,
    pub kills: u64,
}

/// What died.
#[derive(Clone)]
pub enum Kill {
    Row { month: Month, hash: Hash, id: MemoryId, position: i64 },
    Month(Month),
}

/// What is searched. Changed under a lock of its owner.
pub struct Tree {
    pub options: VectorOptions,
    pub buffer: Buffer,
    pub frozen: Option<Frozen>,
    pub segments: Vec<Live>,
    /// What died since the last seal, or since a merge that is under way began.
    kills: VecDeque<Kill>,
    /// The number of the first of them.
    first_kill: u64,
    /// The number of the first that the manifest does not know.
    pub sealed_kills: u64,
    /// The number of the first that a merge under way needs.
    pub needed_kills: Option<u64>,
    /// The manifest's position, and how far this is applied.
    pub sealed: Position,
    pub applied: Position,
    /// Months whose segments are damaged or contradict the records.
    pub suspects: BTreeSet<Month>,
    /// The number behind the last that an erasure killed: until no segment has a dead row of before it, what is dead is not kept for long.
    pub erased: Option<u64>,
    /// Whoever changes an owner's memories tells it.
    pub conditions: Conditions,
    count: u64,
}

/// One search.
pub struct Scan<'a> {
    /// Each once.
    pub owners: &'a [&'a Owner],
    pub space: &'a str,
    pub vector: &'a [f32],
    pub k: usize,
    pub threshold: Option<f32>,
    pub statuses: &'a [Status],
    pub now: UnixMs,
    /// If given: only what meets it.
    pub filter: Option<(&'a Filter, Meets<'a>)>,
    /// If given: of each owner only these.
    pub allowed: Option<&'a [Arc<Meeting>]>,
    /// If given: only these months.
    pub months: Option<&'a BTreeSet<Month>>,
    /// If given: of GLOBAL memories only those whose slots are shown.
    pub shown: Option<&'a Slots>,
}

/// Whether a memory meets the filter, by its record: by whose it is (a place in the search's owners), and id.
pub type Meets<'a> = &'a dyn Fn(usize, &MemoryId) -> Result<bool, StorageError>;

/// An error, and the month whose segments must be made anew for it, if one's.
pub struct Failed {
    pub month: Option<Month>,
    pub error: StorageError,
}

impl From<StorageError> for Failed {
    fn from(error: StorageError) -> Failed {
        Failed { month: None, error }
    }
}

fn of_month(month: Month) -> impl FnOnce(StorageError) -> Failed {
    move |error| Failed { month: Some(month), error }
}

impl Live {
    pub fn new(number: u64, segment: Arc<Segment>, dead: Bitmap) -> Live {
        Live { number, segment, sealed_dead: dead.clone(), dead }
    }

    /// The rows that a kill means.
    fn killed(&self, kill: &Kill) -> impl Iterator<Item = usize> + use<> {
        let rows = match kill {
            Kill::Row { month, hash, id, position } if *month == self.segment.month => {
                self.segment.row_of(hash, id, *position).map_or(0..0, |row| row..row + 1)
            }
            Kill::Month(month) if *month == self.segment.month => 0..self.segment.rows,
            _ => 0..0,
        };
        rows.into_iter()
    }

    /// How many were not dead yet.
    fn kill(&mut self, kill: &Kill) -> usize {
        self.killed(kill).filter(|row| self.dead.insert(*row)).count()
    }

    /// Marks those as known to the manifest.
    pub fn seal_kill(&mut self, kill: &Kill) {
        for row in self.killed(kill) {
            self.sealed_dead.insert(row);
        }
    }

    /// Of each block: whether product codes are all it has, its dimension and its rows.
    fn blocks(&self) -> impl Iterator<Item = (bool, usize, usize)> {
        let of = |at| (self.segment.is_product(at), self.segment.dimension_of(at), self.segment.rows_of(at));
        (0..self.segment.blocks()).map(of)
    }

    /// Rows that are not known to be dead.
    fn alive(&self) -> usize {
        self.segment.rows - self.sealed_dead.len()
    }

    fn is_product(&self) -> bool {
        self.blocks().any(|(product, ..)| product)
    }

    fn due(&self) -> bool {
        let rows = self.segment.rows;
        !self.sealed_dead.is_empty() && self.sealed_dead.len() as f64 >= DEAD_SHARE * rows as f64
    }
}

impl Tree {
    pub fn new(options: VectorOptions) -> Tree {
        let (buffer, frozen, segments, kills, suspects) = Default::default();
        let (sealed, applied) = Default::default();
        Tree {
            conditions: Conditions::new(options.conditions_bytes_max),
            options,
            buffer,
            frozen,
            segments,
            kills,
            first_kill: 0,
            sealed_kills: 0,
            needed_kills: None,
            sealed,
            applied,
            suspects,
            erased: None,
            count: 0,
        }
    }

    /// How many vectors there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Counts again, of a month, what is not dead.
    pub fn count_of_month(&self, month: Month) -> u64 {
        let segments = self.segments.iter().filter(|live| live.segment.month == month);
        let sealed: usize = segments.map(|live| live.segment.rows - live.dead.len()).sum();
        let buffered: usize = self.buffer.of_month(month).map(|(_, block)| block.rows().len()).sum();
        let frozen = self.frozen.iter().flat_map(|frozen| {
            let alive = |at: &usize| !frozen.dead.contains(*at);
            let rows = |block: &buffer::Block| block.base..block.base + block.rows().len();
            frozen.buffer.of_month(month).map(move |(_, block)| rows(block).filter(alive).count())
        });
        (sealed + buffered + frozen.sum::<usize>()) as u64
    }

    pub fn recount(&mut self) {
        let mut months = self.buffer.months();
        months.extend(self.frozen.iter().flat_map(|frozen| frozen.buffer.months()));
        months.extend(self.segments.iter().map(|live| live.segment.month));
        self.count = months.into_iter().map(|month| self.count_of_month(month)).sum();
    }

    /// A memory's new version has this vector; the version before was removed.
    pub fn put(&mut self, coded: &Coded) {
        if !self.options.kept {
            return;
        }
        self.buffer.insert(coded);
        self.count += 1;
    }

    /// A version of a memory is superseded; how many dimensions its vector had.
    pub fn remove(&mut self, memory: &Memory, position: i64, dimension: usize) {
        if dimension == 0 || !self.options.kept {
            return;
        }
        let kind = Kind { owner: memory.owner(), space: memory.space.clone(), dimension };
        let (hash, month) = (kind.hash(), Month::of(memory.created));
        self.count = self.count.saturating_sub(1);
        if self.buffer.remove(&hash, month, &memory.id) {
            return;
        }
        if sim::planted!("lose-a-tombstone-of-a-segment") {
            return;
        }
        if self.kill(Kill::Row { month, hash, id: memory.id, position }) == 0 {
            // It must have been somewhere.
            self.suspects.insert(month);
        }
    }

    /// A month was dropped.
    pub fn drop_month(&mut self, month: Month) {
        if !self.options.kept {
            return;
        }
        self.count -= self.count_of_month(month);
        self.buffer.remove_month(month);
        self.kill(Kill::Month(month));
    }

    /// How many rows died of it.
    pub fn kill(&mut self, kill: Kill) -> usize {
        let mut died = 0;
        if let Some(frozen) = &mut self.frozen {
            died += match &kill {
                Kill::Row { month, hash, id, position } => {
                    let block = frozen.buffer.block(hash, *month);
                    let row = block.and_then(|block| {
                        let (rows, base) = (block.rows(), block.base);
                        let row = rows.find(id)? as usize;
                        (rows.positions[row] == *position).then_some(base + row)
                    });
                    row.is_some_and(|row| frozen.dead.insert(row)) as usize
                }
                Kill::Month(month) => {
                    let rows = frozen.buffer.of_month(*month);
                    let rows = rows.flat_map(|(_, block)| block.base..block.base + block.rows().len());
                    rows.filter(|row| frozen.dead.insert(*row)).count()
                }
            };
        }
        died += self.segments.iter_mut().map(|live| live.kill(&kill)).sum::<usize>();
        self.kills.push_back(kill);
        died
    }

    /// The number that the next kill gets.
    pub fn next_kill(&self) -> u64 {
        self.first_kill + self.kills.len() as u64
    }

    /// Kills from one number to another.
    pub fn kills(&self, from: u64, to: u64) -> impl Iterator<Item = &Kill> {
        let at = |number: u64| number.saturating_sub(self.first_kill) as usize;
        let from = at(from).min(self.kills.len());
        self.kills.range(from..at(to).clamp(from, self.kills.len()))
    }

    /// Forgets kills that nobody needs any more.
    pub fn forget_kills(&mut self) {
        let to = self.needed_kills.map_or(self.sealed_kills, |needed| needed.min(self.sealed_kills));
        let gone = to.saturating_sub(self.first_kill) as usize;
        self.kills.drain(..gone.min(self.kills.len()));
        self.first_kill = self.first_kill.max(to);
    }

    /// A new segment takes its place; what died while it was built, from a number on, is dead in it.
    pub fn adopt(&mut self, number: u64, segment: Arc<Segment>, kills_from: u64) {
        let mut live = Live::new(number, segment, Bitmap::default());
        for kill in self.kills(kills_from, self.next_kill()) {
            live.kill(kill);
        }
        for kill in self.kills(kills_from, self.sealed_kills) {
            live.seal_kill(kill);
        }
        self.segments.push(live);
        self.segments.sort_by_key(|live| (live.segment.month, live.number));
    }

    pub fn seal_due(&self) -> bool {
        let kills = self.next_kill() - self.sealed_kills;
        self.frozen.is_some()
            || self.buffer.bytes() >= self.options.buffer_bytes_max
            || kills as usize >= KILLS_MAX
            || self.erased.is_some_and(|erased| self.sealed_kills < erased)
    }

    /// The segments that are to be merged next, by number: all of one month, one alone if many of its rows are dead or a scope wants a graph.
    pub fn merge_due(&self) -> Option<Vec<u64>> {
        let mut at = 0;
        while at < self.segments.len() {
            let month = self.segments[at].segment.month;
            let of_month = self.segments[at..].iter().take_while(|live| live.segment.month == month).count();
            // What has product codes cannot be merged, but made again: see [`Tree::product_due`].
            let segments: Vec<&Live> =
                self.segments[at..at + of_month].iter().filter(|live| !live.is_product()).collect();
            at += of_month;
            // What more than half fills a segment stays by itself.
            let rows_max = self.options.segment_rows_max;
            let open = segments.iter().filter(|live| live.alive() <= rows_max / 2);
            // Sizes that differ by less than four times are about the same.
            let tier = |rows: usize| rows.max(1).ilog2() / 2;
            let mut sizes: Vec<(usize, u64)> = open.map(|live| (live.segment.rows, live.number)).collect();
            sizes.sort_unstable();
            for same in sizes.chunk_by(|a, b| tier(a.0) == tier(b.0)) {
                if same.len() < self.options.merge_segments {
                    continue;
                }
                // Smaller ones go with it: they would be merged into it sooner or later. As many as one may hold.
                let (wanted, mut rows) = (tier(same[0].0), 0);
                let fit = |(of, _): &&(usize, u64)| {
                    rows += of;
                    tier(*of) <= wanted && rows <= rows_max
                };
                let together: Vec<u64> = sizes.iter().take_while(fit).map(|(_, number)| *number).collect();
                if together.len() > 1 {
                    return Some(together);
                }
            }
            let erased = |live: &Live| self.erased.is_some() && !live.sealed_dead.is_empty();
            let wanted = |live: &&&Live| live.due() || self.wants_graph(live) || erased(live);
            if let Some(live) = segments.iter().find(wanted) {
                return Some(vec![live.number]);
            }
        }
        None
    }

    /// A month, of those before one, that product codes are to be made of, and for which dimensions.
    pub fn product_due(&self, before: Month) -> Option<(Month, BTreeSet<usize>)> {
        let months: BTreeSet<Month> = self.segments.iter().map(|live| live.segment.month).collect();
        for month in months {
            let of_month = || self.segments.iter().filter(|live| live.segment.month == month);
            // Of each dimension the rows that have product codes, and those that have not.
            let mut rows: BTreeMap<usize, [usize; 2]> = BTreeMap::new();
            for (product, dimension, count) in of_month().flat_map(Live::blocks) {
                rows.entry(dimension).or_default()[!product as usize] += count;
            }
            let many = |[product, not]: &[usize; 2]| product + not >= self.options.product_rows_min;
            let worth = |[product, not]: &[usize; 2]| *not as f64 >= DEAD_SHARE * (product + not) as f64;
            let due = month < before && rows.values().any(|rows| many(rows) && worth(rows))
                || of_month().any(|live| live.is_product() && live.due());
            if due {
                let of = rows.into_iter().filter(|(_, rows)| many(rows)).map(|(dimension, _)| dimension);
                return Some((month, of.collect()));
            }
        }
        None
    }

    fn wants_graph(&self, live: &Live) -> bool {
        let min = self.options.graph_rows_min;
        (0..live.segment.blocks())
            .any(|block| live.segment.rows_of(block) >= min && !live.segment.has_graph(block))
    }

    /// What the manifest says once the kills up to a number are in it.
    pub fn manifest(&self, position: Position, kills_to: u64, without: &[u64]) -> Manifest {
        let named = |live: &Live| {
            let mut dead = live.sealed_dead.clone();
            for kill in self.kills(self.sealed_kills, kills_to) {
                for row in live.killed(kill) {
                    dead.insert(row);
                }
            }
            let (number, month, rows) = (live.number, live.segment.month, live.segment.rows as u64);
            Named { number, month, rows, dead: manifest::pack(&dead) }
        };
        let segments = self.segments.iter().filter(|live| !without.contains(&live.number));
        Manifest { position, segments: segments.map(named).collect() }
    }

    /// How many vectors a search over these owners compares, or has compared for it by a graph.
    pub fn count_of(&self, owners: &[&Owner], space: &str, dimension: usize) -> usize {
        let of = |owner: &&Owner| {
            let hash = Kind { owner: (*owner).clone(), space: space.into(), dimension }.hash();
            let buffers = std::iter::once(&self.buffer).chain(self.frozen.iter().map(|f| &*f.buffer));
            let buffered: usize =
                buffers.flat_map(|b| b.of_kind(&hash)).map(|(_, block)| block.rows().len()).sum();
            let sealed = self.segments.iter().filter_map(|live| {
                let block = live.segment.find(&hash)?;
                Some(live.segment.rows_of(block))
            });
            buffered + sealed.sum::<usize>()
        };
        owners.iter().map(of).sum()
    }

    /// The vector of a memory's version, if it is here itself and not only its codes.
    pub fn get(&self, memory: &Memory, dimension: usize) -> Result<Option<Vec<f32>>, Failed> {
        let kind = Kind { owner: memory.owner(), space: memory.space.clone(), dimension };
        let (hash, month) = (kind.hash(), Month::of(memory.created));
        let here = |rows: &Rows<'_>, dead: Option<(&Bitmap, usize)>| -> Option<Vec<f32>> {
            let row = rows.find(&memory.id)?;
            let alive = dead.is_none_or(|(dead, base)| !dead.contains(base + row as usize));
            rows.original(row).filter(|_| alive).map(<[f32]>::to_vec)
        };
        if let Some(found) = self.buffer.block(&hash, month).and_then(|block| here(&block.rows(), None)) {
            return Ok(Some(found));
        }
        if let Some(frozen) = &self.frozen
            && let Some(block) = frozen.buffer.block(&hash, month)
            && let Some(found) = here(&block.rows(), Some((&frozen.dead, block.base)))
        {
            return Ok(Some(found));
        }
        for live in self.segments.iter().filter(|live| live.segment.month == month) {
            let Some(number) = live.segment.find(&hash) else { continue };
            let block = live.segment.block(number, true).map_err(of_month(month))?;
            if let Some(found) = here(&block.rows, Some((&live.dead, block.base))) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Whether this version of a memory is here, once, with this vector or with its codes.
    pub fn holds(&self, memory: &Memory, position: i64, vector: &[f32]) -> Result<bool, Failed> {
        let kind = Kind { owner: memory.owner(), space: memory.space.clone(), dimension: vector.len() };
        let (hash, month) = (kind.hash(), Month::of(memory.created));
        let (terms, mut found, mut same) = (facets::terms(memory), 0, 0);
        let mut look = |rows: &Rows<'_>, dead: Option<(&Bitmap, usize)>| {
            let Some(row) = rows.find(&memory.id) else { return };
            if dead.is_some_and(|(dead, base)| dead.contains(base + row as usize)) {
                return;
            }
            let (mut codes, mut rests) = (vec![], vec![]);
            let at = row as usize;
            let coded = match &rows.product {
                Some(product) => {
                    product.book.encode(vector, &mut codes);
                    product.codes[at * codes.len()..][..codes.len()] == codes
                }
                None => {
                    let (scale, _) = codes::encode(vector, &mut codes, &mut rests);
                    rows.codes_of(row) == codes && rows.rests_of(row) == rests && rows.scales[at] == scale
                }
            };
            let kept = (rows.positions[at], rows.statuses[at], rows.expires[at]);
            let expires = memory.expires.unwrap_or(UnixMs::MAX);
            found += 1;
            same += (coded
                && rows.facets.has(row, &terms)
                && kept == (position, memory.status as u8, expires)
                && rows.original(row).is_none_or(|original| original == vector)) as usize;
        };
        if let Some(block) = self.buffer.block(&hash, month) {
            look(&block.rows(), None);
        }
        if let Some(frozen) = &self.frozen
            && let Some(block) = frozen.buffer.block(&hash, month)
        {
            look(&block.rows(), Some((&frozen.dead, block.base)));
        }
        for live in self.segments.iter().filter(|live| live.segment.month == month) {
            if let Some(number) = live.segment.find(&hash) {
                let block = live.segment.block(number, true).map_err(of_month(month))?;
                look(&block.rows, Some((&live.dead, block.base)));
            }
        }
        Ok((found, same) == (1, 1))
    }

    /// The k nearest, best first: id, cosine, and the place of its owner in `scan.owners`. Scores from a graph are by twelve-bit integers,
    /// all others exact.
    pub fn search(&self, scan: &Scan<'_>, fetch: Fetch<'_>) -> Result<Vec<(MemoryId, f32, usize)>, Failed> {
        let asked = Asked::new(scan.vector);
        let mut best = Best::new(scan.k, scan.threshold);
        let wanted_month = |month: &Month| scan.months.is_none_or(|months| months.contains(month));
        for (whose, owner) in scan.owners.iter().enumerate() {
            let dimension = scan.vector.len();
            let hash = Kind { owner: (*owner).clone(), space: scan.space.into(), dimension }.hash();
            let allowed = scan.allowed.map(|allowed| Allowed::Ids(&allowed[whose].ids));
            if allowed.is_some_and(|allowed| allowed.is_empty()) {
                continue;
            }
            let shown = scan.shown.filter(|_| **owner == Owner::Global);
            let wanted = Wanted { statuses: scan.statuses, now: scan.now, allowed, shown, dead: None };
            let (filter, ef) = (scan.filter, self.options.ef_search);
            let search = Search { asked: &asked, wanted, filter, whose, fetch, ef };
            for (_, block) in self.buffer.of_kind(&hash).filter(|(month, _)| wanted_month(month)) {
                search.block(&block.rows(), None, None, &mut best)?;
            }
            if let Some(frozen) = &self.frozen {
                for (_, block) in frozen.buffer.of_kind(&hash).filter(|(month, _)| wanted_month(month)) {
                    search.block(&block.rows(), None, Some((&frozen.dead, block.base)), &mut best)?;
                }
            }
            for live in self.segments.iter().filter(|live| wanted_month(&live.segment.month)) {
                let Some(number) = live.segment.find(&hash) else { continue };
                let month = live.segment.month;
                search.segment(live, number, &mut best).map_err(|error| {
                    let damaged =
                        matches!(error, StorageError::Damaged { .. } | StorageError::Corrupt { .. });
                    Failed { month: damaged.then_some(month), error }
                })?;
            }
        }
        Ok(best.into_sorted().into_iter().map(|Scored(score, id, whose)| (id, score, whose)).collect())
    }
}

/// A search within one block.
struct Search<'a> {
    asked: &'a Asked<'a>,
    wanted: Wanted<'a>,
    filter: Option<(&'a Filter, Meets<'a>)>,
    whose: usize,
    fetch: Fetch<'a>,
    ef: usize,
}

impl Search<'_> {
    fn segment(&self, live: &Live, number: usize, best: &mut Best) -> Result<(), StorageError> {
        if live.segment.has_graph(number) {
            let block = live.segment.block(number, false)?;
            let dead = Some((&live.dead, block.base));
            if let Some(graph) = block.graph()
                && self.block(&block.rows, Some(&graph), dead, best)?
            {
                return Ok(());
            }
        }
        let block = live.segment.block(number, true)?;
        self.block(&block.rows, None, Some((&live.dead, block.base)), best).map(drop)
    }

    /// False if the graph that is given could not find enough.
    fn block(
        &self,
        rows: &Rows<'_>,
        graph: Option<&graph::View<'_>>,
        dead: Option<(&Bitmap, usize)>,
        best: &mut Best,
    ) -> Result<bool, StorageError> {
        let Search { asked, whose, fetch, .. } = *self;
        let met;
        let mut wanted = Wanted { dead, ..self.wanted };
        if let Some((filter, meets)) = self.filter {
            met = self.met(rows, &wanted, filter, meets)?;
            wanted.allowed = Some(Allowed::Rows(&met));
        }
        match graph {
            Some(graph) => Ok(near(asked, rows, graph, &wanted, whose, self.ef, best)),
            None => scan::scan(asked, rows, &wanted, whose, best, fetch).map(|()| true),
        }
    }

    /// The rows that meet a filter; of those that the facets leave open, those that are wanted.
    fn met(
        &self,
        rows: &Rows<'_>,
        wanted: &Wanted<'_>,
        filter: &Filter,
        meets: Meets<'_>,
    ) -> Result<Vec<u32>, StorageError> {
        let Met { mut sure, may } = rows.facets.find(filter, rows.len() as u32);
        if sure.len() < may.len() {
            let certain = sure.len();
            for row in may {
                let open = sure[..certain].binary_search(&row).is_err();
                if open && wanted.has(rows, row) && meets(self.whose, &rows.ids[row as usize])? {
                    sure.push(row);
                }
            }
            sure.sort_unstable();
        }
        Ok(sure)
    }
}

/// Searches a graph; false if it could not find enough of what is wanted, and the block must be scanned.
pub fn near(
    asked: &Asked<'_>,
    rows: &Rows<'_>,
    graph: &graph::View<'_>,
    wanted: &Wanted<'_>,
    whose: usize,
    ef: usize,
    best: &mut Best,
) -> bool {
    let k = best.k();
    // Where few are allowed, comparing those is sooner done.
    let share = wanted.allowed.map_or(1.0, |allowed| allowed.len() as f64 / rows.len() as f64);
    if share < 0.125 || k > rows.len() / 4 {
        return false;
    }
    let ef = (ef.max(k + k / 2) as f64 / share.min(1.0)) as usize;
    let query: &Query = &asked.query;
    let mut found = graph.search(&Points::of(rows), query, ef);
    if !wanted.all(rows) {
        found.retain(|(_, row)| wanted.has(rows, *row));
    }
    if found.len() < k {
        return false;
    }
    // Codes are off by about a thousandth: the order among the best is found by the rests.
    for (_, row) in found.into_iter().take(2 * k + 16) {
        let scale = rows.scales[row as usize];
        let score = query.refined(asked.level, rows.codes_of(row), rows.rests_of(row), scale);
        if score >= best.floor() {
            best.push(Scored(score, rows.ids[row as usize], whose));
        }
    }
    true
}
