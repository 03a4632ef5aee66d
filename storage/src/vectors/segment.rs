//! An immutable file of vectors, opened by mapping it.
//!
//! ```text
//! LOCISEG2 │ [book …] │ block │ block │ … │ directory │ footer
//! block:     head · codes · rests · scales · ids · positions · expiries · statuses · [order · graph] · facets ┊ [originals]
//!         or head · product codes    · ids · positions · expiries · statuses                      · facets
//! ```
//!
//! A block holds the rows of one kind ([`Kind`]: owner, space, dimension), sorted by id, or, with a graph, in the order in which searches visit
//! them. The directory is sorted by the kinds' hashes. Every section begins at a multiple of 64 bytes; numbers are little-endian.
//!
//! Opening reads the footer and the directory, both with checksums. A block's checksum is verified when it is first used, by reading it once:
//! after that its bytes are believed, as memory is. The originals have a checksum of their own, since few of them are needed; so has a book,
//! the points of [`super::product`] that several blocks share.

use super::codes::{self, Loss};
use super::facets::{Facets, Listed, Lists};
use super::graph::{Graph, View};
use super::product::{self, Book};
use super::rows::{Hash, Index, Kind, Product, Rows};
use crate::codec;
use crate::error::StorageError;
use crate::model::{MemoryId, Month, Status, UnixMs};
use bincode::{Decode, Encode};
use bytemuck::{Pod, Zeroable};
use sim::disk::{Disk, File, Map};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

#[cfg(target_endian = "big")]
compile_error!("segments are little-endian and mapped as they are");

pub const MAGIC: &[u8; 8] = b"LOCISEG2";
const END: &[u8; 8] = b"LOCISEGE";
const ALIGN: usize = 64;
/// Written and verified this many bytes at a time.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;
/// A head that tells of others is garbled; sizes that follow from these do not overflow.
const DIMENSIONS: Range<usize> = 1..1 << 24;

/// What the footer says.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Footer {
    magic: [u8; 8],
    /// Where the directory begins.
    directory: u64,
    rows: u64,
    blocks: u32,
    month: i32,
    directory_crc: u32,
    /// Of this footer up to here.
    crc: u32,
    unused: [u64; 3],
}

/// A block's place.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    hash: Hash,
    offset: u64,
    /// Without the originals, which follow.
    len: u64,
    originals_len: u64,
    rows: u32,
    /// Its first row among the segment's.
    first: u32,
    crc: u32,
    originals_crc: u32,
    dimension: u32,
    flags: u32,
}

const HAS_GRAPH: u32 = 1;
const IS_PRODUCT: u32 = 2;

/// What is kept of the vectors of a block.
#[derive(Clone, Copy)]
pub enum Precision<'a> {
    /// Themselves, beside their codes.
    Full,
    Codes,
    /// Product codes alone, by the points of a book and where that lies. The sources have the vectors themselves.
    Product(&'a [f32], BookAt),
}

/// Where a book lies.
#[derive(Clone, Copy, Encode, Decode)]
pub struct BookAt {
    offset: u64,
    len: u64,
    crc: u32,
}

/// What a block begins with.
#[derive(Encode, Decode)]
struct Head {
    kind: Kind,
    rows: u32,
    /// Norm and what was lost by codes and by rests, at most.
    loss: [f32; 3],
    plain: bool,
    /// Of its graph: levels, and the lengths of links, side list and twins.
    graph: Option<(Vec<u32>, [u32; 3])>,
    /// Of its facets: terms, their bytes, and rows listed.
    facets: [u32; 3],
    product: Option<BookAt>,
}

/// Where a block's sections are, from its beginning.
struct Layout {
    sections: [Range<usize>; 16],
    end: usize,
}

impl Layout {
    /// Sizes that a sound file cannot have give `None`.
    fn of(head_len: usize, head: &Head) -> Option<Layout> {
        let rows = head.rows as usize;
        if !DIMENSIONS.contains(&head.kind.dimension) {
            return None;
        }
        let stride = codes::stride(head.kind.dimension);
        let (order, starts, lengths) = match &head.graph {
            None => (0, 0, [0; 3]),
            Some((levels, lengths)) => {
                let starts: usize = levels.iter().map(|count| *count as usize + 1).sum();
                (rows, starts, lengths.map(|length| length as usize))
            }
        };
        let [links, side, twins] = lengths;
        let [terms, term_bytes, listed] = head.facets.map(|length| length as usize);
        let codes = match head.product {
            Some(_) => [rows.checked_mul(product::parts(head.kind.dimension))?, 0, 0],
            None => [rows.checked_mul(stride)?, rows.checked_mul(stride)? / 2, rows * 4],
        };
        let sizes = [
            codes[0],
            codes[1],
            codes[2],
            rows * 16,
            rows * 8,
            rows * 8,
            rows,
            order * 4,
            starts * 4,
            links * 4,
            side * 4,
            twins * 4,
            terms * 4,
            terms * 4,
            term_bytes,
            listed * 4,
        ];
        let mut at = head_len.next_multiple_of(ALIGN);
        let sections = sizes.map(|size| {
            let section = at..at + size;
            at = section.end.next_multiple_of(ALIGN);
            section
        });
        Some(Layout { sections, end: at })
    }
}

/// A block's rows and what leads to them.
pub struct Block<'a> {
    pub kind: Kind,
    pub rows: Rows<'a>,
    levels: Option<Vec<u32>>,
    starts: &'a [u32],
    links: &'a [u32],
    side: &'a [u32],
    twins: &'a [u32],
    /// Its first row among the segment's.
    pub base: usize,
}

impl Block<'_> {
    pub fn graph(&self) -> Option<View<'_>> {
        let levels = self.levels.as_deref()?;
        Some(View { levels, starts: self.starts, links: self.links, side: self.side, twins: self.twins })
    }
}

pub struct Segment {
    pub month: Month,
    pub rows: usize,
    pub path: String,
    /// Length of the file.
    pub len: u64,
    file: Arc<dyn File>,
    map: Map,
    directory: Range<usize>,
    /// Of each block: bit 0 its columns (and its book) are verified, bit 1 its originals.
    verified: Vec<AtomicU8>,
    /// The offsets of books that are verified.
    books: Mutex<BTreeSet<u64>>,
}

fn damaged(path: &str, problem: impl Into<String>) -> StorageError {
    StorageError::Damaged { what: path.into(), problem: problem.into() }
}

fn read_error(path: &str, error: std::io::Error) -> StorageError {
    damaged(path, format!("it cannot be read: {error}"))
}

impl Segment {
    pub fn open(disk: &dyn Disk, path: &str) -> Result<Segment, StorageError> {
        let file = disk.open(path).map_err(|e| read_error(path, e))?;
        let map = file.map().map_err(|e| read_error(path, e))?;
        let foot = size_of::<Footer>();
        let Some(end) = map.len().checked_sub(foot).filter(|end| end % ALIGN == 0 && map.starts_with(MAGIC))
        else {
            return Err(damaged(path, format!("{} bytes that are no segment", map.len())));
        };
        let footer: Footer = bytemuck::pod_read_unaligned(&map[end..]);
        let summed = std::mem::offset_of!(Footer, crc);
        if footer.magic != *END || crc32c::crc32c(&map[end..end + summed]) != footer.crc {
            return Err(damaged(path, format!("byte {end}: the footer fails its checksum")));
        }
        let directory = footer.directory as usize..end;
        let entries = footer.blocks as usize;
        if directory.start > end
            || directory.len() != entries * size_of::<Entry>()
            || crc32c::crc32c(&map[directory.clone()]) != footer.directory_crc
        {
            return Err(damaged(path, format!("byte {}: the directory fails its checksum", directory.start)));
        }
        let verified = (0..entries).map(|_| AtomicU8::new(0)).collect();
        let (rows, month, len) = (footer.rows as usize, Month(footer.month), map.len() as u64);
        Ok(Segment {
            month,
            rows,
            path: path.into(),
            len,
            file,
            map,
            directory,
            verified,
            books: Mutex::default(),
        })
    }

    fn entries(&self) -> &[Entry] {
        bytemuck::cast_slice(&self.map[self.directory.clone()])
    }

    pub fn blocks(&self) -> usize {
        self.verified.len()
    }

    /// The hashes of its kinds, in order.
    pub fn hashes(&self) -> impl Iterator<Item = &Hash> {
        self.entries().iter().map(|entry| &entry.hash)
    }

    /// The number of the block of a kind.
    pub fn find(&self, hash: &Hash) -> Option<usize> {
        let entries = self.entries();
        // Hashes are spread evenly, so a guess is near; from there by doubling steps.
        let key =
            u64::from_be_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]]);
        let guess = ((key as u128 * entries.len() as u128) >> 64) as usize;
        let (mut low, mut high) = (guess, guess);
        let mut step = 1;
        while low > 0 && entries[low.min(entries.len() - 1)].hash > *hash {
            low = low.saturating_sub(step);
            step *= 2;
        }
        step = 1;
        while high < entries.len() && entries[high].hash < *hash {
            high = (high + step).min(entries.len());
            step *= 2;
        }
        let within = &entries[low..(high + 1).min(entries.len())];
        within.binary_search_by(|entry| entry.hash.cmp(hash)).ok().map(|at| low + at)
    }

    /// Compares a part of the file with its checksum, reading it once.
    fn verify(&self, part: Range<usize>, crc: u32, what: &str) -> Result<(), StorageError> {
        let mut found = 0;
        let mut chunk = vec![0; part.len().min(CHUNK)];
        for at in part.clone().step_by(CHUNK) {
            let chunk = &mut chunk[..CHUNK.min(part.end - at)];
            let read = self.file.read_at(chunk, at as u64).map_err(|e| read_error(&self.path, e))?;
            if read < chunk.len() {
                return Err(damaged(&self.path, "it has become shorter"));
            }
            found = crc32c::crc32c_append(found, chunk);
        }
        if found != crc {
            let problem = format!("byte {}: a block's {what} fail their checksum", part.start);
            return Err(damaged(&self.path, problem));
        }
        Ok(())
    }

    /// A block, its columns verified; with `originals` those too.
    pub fn block(&self, number: usize, originals: bool) -> Result<Block<'_>, StorageError> {
        let entry = self.entries()[number];
        let problem = |text: &str| damaged(&self.path, format!("byte {}: {text}", entry.offset));
        let (from, len) = (entry.offset as usize, entry.len as usize);
        let ends = |from: usize, len: usize| from.checked_add(len).filter(|end| *end <= self.map.len());
        let (Some(end), true) = (ends(from, len), from.is_multiple_of(ALIGN)) else {
            return Err(problem("the block lies outside the file"));
        };
        let verified = self.verified[number].load(Relaxed);
        if verified & 1 == 0 {
            self.verify(from..end, entry.crc, "codes")?;
        }
        let bytes = &self.map[from..end];
        let (head, rest) = codec::unframe(bytes).map_err(|e| problem(&e.to_string()))?;
        let head_len = len - rest.len();
        let head: Head = codec::decode(head).map_err(|e| problem(&e.to_string()))?;
        let layout =
            Layout::of(head_len, &head).filter(|layout| layout.end == len && head.rows == entry.rows);
        let Some(Layout { sections, .. }) = layout else {
            return Err(problem("the block's sections do not fit it"));
        };
        let [
            codes,
            rests,
            scales,
            ids,
            positions,
            expires,
            statuses,
            order,
            starts,
            links,
            side,
            twins,
            lists @ ..,
        ] = sections;
        fn column<T: Pod>(bytes: &[u8], at: Range<usize>) -> &[T] {
            bytemuck::cast_slice(&bytes[at])
        }
        let has_originals = entry.originals_len > 0;
        let mut of_originals: &[f32] = &[];
        if has_originals && (originals || verified & 2 != 0) {
            let expected = head.rows as usize * head.kind.dimension * 4;
            let Some(until) = ends(end, entry.originals_len as usize).filter(|until| until - end == expected)
            else {
                return Err(problem("the block's originals do not fit it"));
            };
            if verified & 2 == 0 {
                self.verify(end..until, entry.originals_crc, "originals")?;
                self.verified[number].fetch_or(2, Relaxed);
            }
            of_originals = bytemuck::cast_slice(&self.map[end..until]);
        }
        let order: &[u32] = column(bytes, order);
        let [norm, coarse, fine] = head.loss;
        let mut of_product = None;
        let mut codes = &bytes[codes];
        if let Some(at) = &head.product {
            let book = self.book(at, head.kind.dimension, verified & 1 == 0).map_err(|e| match e {
                Some(error) => error,
                None => problem("the block's book does not fit it"),
            })?;
            of_product = Some(Product { book: Book::of(book), codes });
            codes = &[];
        }
        let [term_ends, row_ends, terms, listed] = lists;
        let facets = Listed {
            terms: &bytes[terms],
            ends: column(bytes, term_ends),
            rows: column(bytes, listed),
            row_ends: column(bytes, row_ends),
        };
        let rows = Rows {
            dimension: head.kind.dimension,
            product: of_product,
            codes,
            rests: &bytes[rests],
            scales: column(bytes, scales),
            ids: column::<MemoryId>(bytes, ids),
            positions: column(bytes, positions),
            expires: column::<UnixMs>(bytes, expires),
            statuses: &bytes[statuses],
            originals: of_originals,
            loss: Loss { norm, coarse, fine },
            plain: head.plain,
            index: if head.graph.is_some() { Index::Order(order) } else { Index::Sorted },
            facets: Facets::Listed(facets),
        };
        let block = Block {
            kind: head.kind,
            rows,
            levels: head.graph.map(|(levels, _)| levels),
            starts: column(bytes, starts),
            links: column(bytes, links),
            side: column(bytes, side),
            twins: column(bytes, twins),
            base: entry.first as usize,
        };
        if verified & 1 == 0 {
            let in_range = order.iter().all(|row| *row < entry.rows);
            if block.kind.hash() != entry.hash
                || !in_range
                || !facets.sound(entry.rows)
                || block.graph().is_some_and(|graph| !graph.sound(entry.rows as usize))
            {
                return Err(problem(
                    "the block is not the one that its directory tells, or its graph or facets lead nowhere",
                ));
            }
            self.verified[number].fetch_or(1, Relaxed);
        }
        Ok(block)
    }

    /// The points of a book, verified if that was not done before; no error if it lies nowhere.
    fn book(&self, at: &BookAt, dimension: usize, verify: bool) -> Result<&[f32], Option<StorageError>> {
        let place = || {
            let from = usize::try_from(at.offset).ok().filter(|from| from.is_multiple_of(ALIGN))?;
            let len = usize::try_from(at.len).ok().filter(|len| *len == product::numbers(dimension) * 4)?;
            Some(from..from.checked_add(len).filter(|end| *end <= self.map.len())?)
        };
        let place = place().ok_or(None)?;
        if verify {
            let mut books = self.books.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if !books.contains(&at.offset) {
                self.verify(place.clone(), at.crc, "points").map_err(Some)?;
                books.insert(at.offset);
            }
        }
        Ok(bytemuck::cast_slice(&self.map[place]))
    }

    /// Reads what searches use once, so that none has to wait for that: whoever made it does this before it counts.
    pub fn warm(&self) -> Result<(), StorageError> {
        for (number, entry) in self.entries().iter().enumerate() {
            let originals = !self.has_graph(number);
            self.block(number, originals)?;
            let (from, len) = (entry.offset as usize, entry.len as usize);
            let end = from + len + if originals { entry.originals_len as usize } else { 0 };
            let pages = self.map[from..end].iter().step_by(PAGE);
            std::hint::black_box(pages.fold(0, |sum, byte| sum ^ byte));
        }
        Ok(())
    }

    /// The dimensions of its vectors, each once.
    pub fn dimensions(&self) -> BTreeSet<usize> {
        self.entries().iter().map(|entry| entry.dimension as usize).collect()
    }

    /// The row of a memory's vector, among all of the segment's. Nothing is verified but what it finds, by id and by position: that cannot
    /// be another's.
    pub fn row_of(&self, hash: &Hash, id: &MemoryId, position: i64) -> Option<usize> {
        let entry = self.entries()[self.find(hash)?];
        let bytes = self.map.get(entry.offset as usize..(entry.offset + entry.len) as usize)?;
        let (head, rest) = codec::unframe(bytes).ok()?;
        let head_len = bytes.len() - rest.len();
        let head: Head = codec::decode(head).ok()?;
        let Layout { sections, end } = Layout::of(head_len, &head)?;
        if end != bytes.len() || head.rows != entry.rows {
            return None;
        }
        let [_, _, _, ids, positions, _, _, order, ..] = sections;
        let ids: &[MemoryId] = bytemuck::cast_slice(&bytes[ids]);
        let positions: &[i64] = bytemuck::cast_slice(&bytes[positions]);
        let row = match head.graph {
            None => ids.binary_search(id).ok()?,
            Some(_) => {
                let order: &[u32] = bytemuck::cast_slice(&bytes[order]);
                let at = order.binary_search_by(|row| ids.get(*row as usize).cmp(&Some(id))).ok()?;
                order[at] as usize
            }
        };
        (positions.get(row) == Some(&position)).then_some(entry.first as usize + row)
    }

    /// Whether the block has originals.
    pub fn has_originals(&self, number: usize) -> bool {
        self.entries()[number].originals_len > 0
    }

    pub fn has_graph(&self, number: usize) -> bool {
        self.entries()[number].flags & HAS_GRAPH != 0
    }

    /// Whether product codes are all that the block has.
    pub fn is_product(&self, number: usize) -> bool {
        self.entries()[number].flags & IS_PRODUCT != 0
    }

    /// The dimension of a block's vectors, without looking at it.
    pub fn dimension_of(&self, number: usize) -> usize {
        self.entries()[number].dimension as usize
    }

    /// Rows of a block, without looking at it.
    pub fn rows_of(&self, number: usize) -> usize {
        self.entries()[number].rows as usize
    }
}

/// Writes a segment's file, block by block in the order of their hashes.
pub struct Writer {
    file: Arc<dyn File>,
    path: String,
    month: Month,
    waiting: Vec<u8>,
    written: u64,
    crc: u32,
    entries: Vec<Entry>,
    rows: usize,
}

impl Writer {
    pub fn create(disk: &dyn Disk, path: &str, month: Month) -> Result<Writer, StorageError> {
        let file = disk.create(path)?;
        file.set_len(0)?;
        let (path, entries) = (path.to_string(), vec![]);
        let mut writer =
            Writer { file, path, month, waiting: MAGIC.to_vec(), written: 0, crc: 0, entries, rows: 0 };
        writer.align()?;
        Ok(writer)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    fn at(&self) -> u64 {
        self.written + self.waiting.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= CHUNK {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.file.write_at(&self.waiting, self.written)?;
        self.written += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    fn align(&mut self) -> Result<(), StorageError> {
        let missing = self.at().next_multiple_of(ALIGN as u64) - self.at();
        self.push(&[0; ALIGN][..missing as usize])
    }

    /// Writes points that blocks refer to.
    pub fn book(&mut self, points: &[f32]) -> Result<BookAt, StorageError> {
        let offset = self.at();
        self.crc = 0;
        self.push(bytemuck::cast_slice(points))?;
        let at = BookAt { offset, len: self.at() - offset, crc: self.crc };
        self.align()?;
        Ok(at)
    }

    /// Adds a block of rows, `(source, row)` each, in the order in which they shall lie: by id, or as `graph` numbers them.
    pub fn add(
        &mut self,
        kind: &Kind,
        sources: &[Rows<'_>],
        rows: &[(u32, u32)],
        graph: Option<&Graph>,
        precision: Precision<'_>,
    ) -> Result<(), StorageError> {
        let of = |at: &(u32, u32)| (&sources[at.0 as usize], at.1);
        let used: BTreeSet<u32> = rows.iter().map(|(source, _)| *source).collect();
        let loss = used.iter().fold(Loss::default(), |loss, source| loss.max(sources[*source as usize].loss));
        let plain = rows.iter().map(of).all(|(source, row)| {
            source.plain
                || source.statuses[row as usize] == Status::Active as u8
                    && source.expires[row as usize] == UnixMs::MAX
        });
        let lengths = |g: &Graph| [&g.links, &g.side, &g.twins].map(|list| list.len() as u32);
        let shape = graph.map(|g| (g.levels.clone(), lengths(g)));
        let facets = Lists::of(sources, rows);
        let head = Head {
            kind: kind.clone(),
            rows: rows.len() as u32,
            loss: [loss.norm, loss.coarse, loss.fine],
            plain,
            graph: shape,
            facets: [facets.ends.len(), facets.terms.len(), facets.rows.len()].map(|length| length as u32),
            product: match precision {
                Precision::Product(_, at) => Some(at),
                _ => None,
            },
        };
        let offset = self.at();
        self.crc = 0;
        let mut framed = vec![];
        codec::frame(&mut framed, &codec::encode(&head));
        self.push(&framed)?;
        self.align()?;
        let mut column = |write: &mut dyn FnMut(&mut Writer, &Rows<'_>, u32) -> Result<(), StorageError>| {
            for (source, row) in rows.iter().map(of) {
                write(self, source, row)?;
            }
            self.align()
        };
        if let Precision::Product(points, _) = precision {
            let (book, mut codes) = (Book::of(points), vec![]);
            column(&mut |w, source, row| {
                codes.clear();
                book.encode(source.original(row).unwrap_or(&[]), &mut codes);
                w.push(&codes)
            })?;
        } else {
            column(&mut |w, source, row| w.push(source.codes_of(row)))?;
            column(&mut |w, source, row| w.push(source.rests_of(row)))?;
            column(&mut |w, source, row| w.push(&source.scales[row as usize].to_le_bytes()))?;
        }
        column(&mut |w, source, row| w.push(&source.ids[row as usize]))?;
        column(&mut |w, source, row| w.push(&source.positions[row as usize].to_le_bytes()))?;
        column(&mut |w, source, row| w.push(&source.expires[row as usize].to_le_bytes()))?;
        column(&mut |w, source, row| w.push(&[source.statuses[row as usize]]))?;
        if let Some(graph) = graph {
            let mut order: Vec<u32> = (0..rows.len() as u32).collect();
            let id = |row: &u32| {
                let (source, row) = of(&rows[*row as usize]);
                source.ids[row as usize]
            };
            order.sort_by_key(id);
            for numbers in [&order, &graph.starts, &graph.links, &graph.side, &graph.twins] {
                self.push(bytemuck::cast_slice(numbers))?;
                self.align()?;
            }
        }
        for part in [
            bytemuck::cast_slice(&facets.ends),
            bytemuck::cast_slice(&facets.row_ends),
            &facets.terms[..],
            bytemuck::cast_slice(&facets.rows),
        ] {
            self.push(part)?;
            self.align()?;
        }
        let (len, crc) = (self.at() - offset, self.crc);
        self.crc = 0;
        let mut originals_len = 0;
        if matches!(precision, Precision::Full) {
            for (source, row) in rows.iter().map(of) {
                let vector = source.original(row).unwrap_or(&[]);
                self.push(bytemuck::cast_slice(vector))?;
                originals_len += vector.len() as u64 * 4;
            }
        }
        let originals_crc = self.crc;
        self.align()?;
        let hash = kind.hash();
        let (rows, first) = (rows.len() as u32, self.rows as u32);
        self.entries.push(Entry {
            hash,
            offset,
            len,
            originals_len,
            rows,
            first,
            crc,
            originals_crc,
            dimension: kind.dimension as u32,
            flags: if graph.is_some() { HAS_GRAPH } else { 0 }
                | if matches!(precision, Precision::Product(..)) { IS_PRODUCT } else { 0 },
        });
        self.rows += rows as usize;
        Ok(())
    }

    /// Makes the file durable but for its name, and opens it.
    pub fn finish(mut self, disk: &dyn Disk) -> Result<Segment, StorageError> {
        self.align()?;
        let directory = self.at();
        self.crc = 0;
        let entries = std::mem::take(&mut self.entries);
        self.push(bytemuck::cast_slice(&entries))?;
        let mut footer = Footer {
            magic: *END,
            directory,
            rows: self.rows as u64,
            blocks: entries.len() as u32,
            month: self.month.0,
            directory_crc: self.crc,
            crc: 0,
            unused: [0; 3],
        };
        let summed = std::mem::offset_of!(Footer, crc);
        footer.crc = crc32c::crc32c(&bytemuck::bytes_of(&footer)[..summed]);
        self.push(bytemuck::bytes_of(&footer))?;
        self.flush()?;
        if !sim::planted!("name-a-segment-that-is-not-synced") {
            self.file.sync()?;
        }
        Segment::open(disk, &self.path)
    }
}
