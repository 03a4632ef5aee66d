//! Vectors that no segment has yet, in memory. What they are is in the records too, so nothing is lost with them.

use super::codes::{self, Loss};
use super::facets::{self, Facets, Term};
use super::rows::{Hash, Index, Kind, Rows};
use crate::model::{Memory, MemoryId, Month, Status, UnixMs};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A memory's vector, its codes, and where it belongs: all that can be computed before anything is locked.
pub struct Coded {
    kind: Kind,
    hash: Hash,
    month: Month,
    id: MemoryId,
    position: i64,
    expires: UnixMs,
    status: Status,
    codes: Vec<u8>,
    rests: Vec<u8>,
    scale: f32,
    loss: Loss,
    vector: Vec<f32>,
    terms: Arc<[Term]>,
}

impl Coded {
    pub fn new(memory: &Memory, position: i64, vector: Vec<f32>) -> Coded {
        let kind = Kind { owner: memory.owner(), space: memory.space.clone(), dimension: vector.len() };
        let (mut codes, mut rests) = (vec![], vec![]);
        let (scale, loss) = codes::encode(&vector, &mut codes, &mut rests);
        Coded {
            hash: kind.hash(),
            month: Month::of(memory.created),
            id: memory.id,
            position,
            expires: memory.expires.unwrap_or(UnixMs::MAX),
            status: memory.status,
            terms: facets::terms(memory).into(),
            kind,
            codes,
            rests,
            scale,
            loss,
            vector,
        }
    }
}

/// The vectors of one kind and month.
#[derive(Clone)]
pub struct Block {
    pub kind: Kind,
    codes: Vec<u8>,
    rests: Vec<u8>,
    scales: Vec<f32>,
    ids: Vec<MemoryId>,
    positions: Vec<i64>,
    expires: Vec<UnixMs>,
    statuses: Vec<u8>,
    originals: Vec<f32>,
    loss: Loss,
    plain: bool,
    place: HashMap<MemoryId, u32>,
    facets: facets::Map,
    terms: Vec<Arc<[Term]>>,
    bytes: usize,
    /// The number of its first row among all of a buffer that was frozen.
    pub base: usize,
}

impl Block {
    fn new(kind: Kind) -> Block {
        let (codes, rests, originals) = Default::default();
        let (scales, ids, positions, expires, statuses, loss, place) = Default::default();
        let (facets, terms) = Default::default();
        let (plain, bytes, base) = (true, 0, 0);
        Block {
            kind,
            codes,
            rests,
            scales,
            ids,
            positions,
            expires,
            statuses,
            originals,
            loss,
            plain,
            place,
            facets,
            terms,
            bytes,
            base,
        }
    }

    pub fn rows(&self) -> Rows<'_> {
        Rows {
            dimension: self.kind.dimension,
            product: None,
            codes: &self.codes,
            rests: &self.rests,
            scales: &self.scales,
            ids: &self.ids,
            positions: &self.positions,
            expires: &self.expires,
            statuses: &self.statuses,
            originals: &self.originals,
            loss: self.loss,
            plain: self.plain,
            index: Index::Map(&self.place),
            facets: Facets::Map(&self.facets),
        }
    }

    /// A copy with room for `rows` more, if there is none here.
    fn grown(&self, rows: usize) -> Option<Block> {
        let room = self.ids.len() + rows;
        if room <= self.ids.capacity() {
            return None;
        }
        let (mut copy, room) = (self.clone(), room.next_power_of_two() - self.ids.len());
        let stride = codes::stride(self.kind.dimension);
        copy.codes.reserve_exact(room * stride);
        copy.rests.reserve_exact(room * stride / 2);
        copy.originals.reserve_exact(room * self.kind.dimension);
        copy.scales.reserve_exact(room);
        copy.ids.reserve_exact(room);
        copy.positions.reserve_exact(room);
        copy.expires.reserve_exact(room);
        copy.statuses.reserve_exact(room);
        copy.terms.reserve_exact(room);
        copy.place.reserve(room);
        Some(copy)
    }

    fn push(&mut self, coded: &Coded) {
        let row = self.ids.len() as u32;
        self.place.insert(coded.id, row);
        for term in coded.terms.iter() {
            self.facets.entry(term.clone()).or_default().insert(row);
        }
        self.terms.push(coded.terms.clone());
        self.bytes += self.row_bytes(&coded.terms);
        self.codes.extend_from_slice(&coded.codes);
        self.rests.extend_from_slice(&coded.rests);
        self.scales.push(coded.scale);
        self.ids.push(coded.id);
        self.positions.push(coded.position);
        self.expires.push(coded.expires);
        self.statuses.push(coded.status as u8);
        self.originals.extend_from_slice(&coded.vector);
        self.loss = self.loss.max(coded.loss);
        self.plain &= coded.status == Status::Active && coded.expires == UnixMs::MAX;
    }

    fn remove(&mut self, id: &MemoryId) -> bool {
        let Some(at) = self.place.remove(id) else { return false };
        let (at, last) = (at as usize, self.ids.len() - 1);
        fn swap_out<T: Copy>(column: &mut Vec<T>, at: usize, last: usize, width: usize) {
            column.copy_within(last * width..(last + 1) * width, at * width);
            column.truncate(last * width);
        }
        let stride = codes::stride(self.kind.dimension);
        swap_out(&mut self.codes, at, last, stride);
        swap_out(&mut self.rests, at, last, stride / 2);
        swap_out(&mut self.originals, at, last, self.kind.dimension);
        self.scales.swap_remove(at);
        self.ids.swap_remove(at);
        self.positions.swap_remove(at);
        self.expires.swap_remove(at);
        self.statuses.swap_remove(at);
        let terms = self.terms.swap_remove(at);
        self.bytes -= self.row_bytes(&terms);
        for term in terms.iter() {
            if let Some(rows) = self.facets.get_mut(term)
                && rows.remove(&(at as u32))
                && rows.is_empty()
            {
                self.facets.remove(term);
            }
        }
        if at < last {
            for term in self.terms[at].iter() {
                let rows = self.facets.entry(term.clone()).or_default();
                rows.remove(&(last as u32));
                rows.insert(at as u32);
            }
            self.place.insert(self.ids[at], at as u32);
        }
        true
    }

    /// Bytes of one row in memory, about.
    fn row_bytes(&self, terms: &[Term]) -> usize {
        let of_terms: usize = terms.iter().map(|term| term.len() + 80).sum();
        self.kind.dimension * 4 + codes::stride(self.kind.dimension) * 3 / 2 + 80 + of_terms
    }
}

#[derive(Default)]
pub struct Buffer {
    blocks: BTreeMap<(Hash, Month), Block>,
    rows: usize,
    bytes: usize,
}

impl Buffer {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn block(&self, hash: &Hash, month: Month) -> Option<&Block> {
        self.blocks.get(&(*hash, month))
    }

    /// The blocks of a kind, by month.
    pub fn of_kind(&self, hash: &Hash) -> impl Iterator<Item = (Month, &Block)> {
        let range = self.blocks.range((*hash, Month(i32::MIN))..=(*hash, Month(i32::MAX)));
        range.map(|((_, month), block)| (*month, block))
    }

    /// The blocks of a month, by kind.
    pub fn of_month(&self, month: Month) -> impl Iterator<Item = (&Hash, &Block)> {
        self.blocks.iter().filter(move |((_, of), _)| *of == month).map(|((hash, _), block)| (hash, block))
    }

    pub fn months(&self) -> std::collections::BTreeSet<Month> {
        self.blocks.keys().map(|(_, month)| *month).collect()
    }

    /// Copies of the blocks that have no room for what is to be put here, so that whoever waits for that need not wait for copying.
    pub fn grown<'a>(&self, coded: impl Iterator<Item = &'a Coded>) -> Vec<((Hash, Month), Block)> {
        let mut more: BTreeMap<(Hash, Month), usize> = BTreeMap::new();
        coded.for_each(|coded| *more.entry((coded.hash, coded.month)).or_default() += 1);
        more.into_iter().filter_map(|(key, rows)| Some((key, self.blocks.get(&key)?.grown(rows)?))).collect()
    }

    /// Takes those in, if nothing was sealed meanwhile; what they take the place of is left in them.
    pub fn take_grown(&mut self, grown: &mut [((Hash, Month), Block)]) {
        for (key, block) in grown {
            if let Some(old) = self.blocks.get_mut(key) {
                std::mem::swap(old, block);
            }
        }
    }

    /// Puts a memory's vector here, in the place of one that it had here.
    pub fn insert(&mut self, coded: &Coded) {
        let (hash, month) = (coded.hash, coded.month);
        self.remove(&hash, month, &coded.id);
        let block = self.blocks.entry((hash, month)).or_insert_with(|| Block::new(coded.kind.clone()));
        let before = block.bytes;
        block.push(coded);
        self.rows += 1;
        self.bytes += block.bytes - before;
    }

    /// Whether there was one.
    pub fn remove(&mut self, hash: &Hash, month: Month, id: &MemoryId) -> bool {
        let Some(block) = self.blocks.get_mut(&(*hash, month)) else { return false };
        let before = block.bytes;
        if !block.remove(id) {
            return false;
        }
        self.rows -= 1;
        self.bytes -= before - block.bytes;
        if block.ids.is_empty() {
            self.blocks.remove(&(*hash, month));
        }
        true
    }

    pub fn remove_month(&mut self, month: Month) {
        self.blocks.retain(|(_, of), block| {
            if *of == month {
                self.rows -= block.ids.len();
                self.bytes -= block.bytes;
            }
            *of != month
        });
    }

    /// Numbers the rows: nothing changes here any more.
    pub fn freeze(&mut self) {
        let mut base = 0;
        for block in self.blocks.values_mut() {
            block.base = base;
            base += block.ids.len();
        }
    }
}
