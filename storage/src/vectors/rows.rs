//! The rows of one block: the vectors of one owner, space and month, by column.

use super::codes::{self, Loss};
use super::facets::Facets;
use super::product::Book;
use crate::codec;
use crate::model::{GLOBAL_TENANT, MemoryId, Owner, Status, UnixMs};
use crate::slots::{Slots, slot_of};
use bincode::{Decode, Encode};
use std::collections::{HashMap, HashSet};

/// Which vectors lie together: only those of one owner, space and dimension are compared.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Kind {
    pub owner: Owner,
    pub space: String,
    pub dimension: usize,
}

/// A kind as a key of fixed length.
pub type Hash = [u8; 16];

impl Kind {
    pub fn hash(&self) -> Hash {
        let hash = blake3::hash(&codec::encode(self));
        let mut short = [0; 16];
        short.copy_from_slice(&hash.as_bytes()[..16]);
        short
    }
}

/// The columns of a block. All have as many entries as there are rows.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub dimension: usize,
    /// In the place of codes, rests and scales.
    pub product: Option<Product<'a>>,
    /// [`codes::stride`] bytes a row.
    pub codes: &'a [u8],
    /// Half as many.
    pub rests: &'a [u8],
    pub scales: &'a [f32],
    pub ids: &'a [MemoryId],
    /// Where in the ledger the memory got this vector.
    pub positions: &'a [i64],
    pub expires: &'a [UnixMs],
    pub statuses: &'a [u8],
    /// `dimension` floats a row; none where only codes are kept.
    pub originals: &'a [f32],
    /// The most that any row lost.
    pub loss: Loss,
    /// All are active and never expire.
    pub plain: bool,
    pub index: Index<'a>,
    pub facets: Facets<'a>,
}

/// Rows that only [`super::product`] codes are kept of.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub book: Book<'a>,
    /// [`super::product::parts`] bytes a row.
    pub codes: &'a [u8],
}

/// How a row is found by its id.
#[derive(Clone, Copy)]
pub enum Index<'a> {
    /// Rows are in the order of their ids.
    Sorted,
    /// Row numbers in the order of their ids.
    Order(&'a [u32]),
    Map(&'a HashMap<MemoryId, u32>),
}

impl<'a> Rows<'a> {
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub fn find(&self, id: &MemoryId) -> Option<u32> {
        match self.index {
            Index::Sorted => self.ids.binary_search(id).ok().map(|at| at as u32),
            Index::Order(order) => {
                let found = order.binary_search_by_key(id, |row| self.ids[*row as usize]);
                found.ok().map(|at| order[at])
            }
            Index::Map(map) => map.get(id).copied(),
        }
    }

    pub fn codes_of(&self, row: u32) -> &'a [u8] {
        let stride = codes::stride(self.dimension);
        &self.codes[row as usize * stride..][..stride]
    }

    pub fn rests_of(&self, row: u32) -> &'a [u8] {
        let half = codes::stride(self.dimension) / 2;
        &self.rests[row as usize * half..][..half]
    }

    pub fn original(&self, row: u32) -> Option<&'a [f32]> {
        self.originals.get(row as usize * self.dimension..(row as usize + 1) * self.dimension)
    }
}

/// A set of row numbers.
#[derive(Clone, Default, PartialEq)]
pub struct Bitmap {
    words: Vec<u64>,
    count: usize,
}

impl Bitmap {
    pub fn contains(&self, row: usize) -> bool {
        self.words.get(row / 64).is_some_and(|word| word >> (row % 64) & 1 == 1)
    }

    /// Whether it was not there yet.
    pub fn insert(&mut self, row: usize) -> bool {
        if self.contains(row) {
            return false;
        }
        if self.words.len() <= row / 64 {
            self.words.resize(row / 64 + 1, 0);
        }
        self.words[row / 64] |= 1 << (row % 64);
        self.count += 1;
        true
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let bits = |(at, word): (usize, &u64)| {
            let word = *word;
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at * 64 + bit)
        };
        self.words.iter().enumerate().flat_map(bits)
    }
}

/// The rows of a block that meet a search's conditions.
#[derive(Clone, Copy)]
pub enum Allowed<'a> {
    /// These, and other blocks' rows.
    Ids(&'a HashSet<MemoryId>),
    /// In order.
    Rows(&'a [u32]),
}

impl Allowed<'_> {
    pub fn len(&self) -> usize {
        match self {
            Allowed::Ids(ids) => ids.len(),
            Allowed::Rows(rows) => rows.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In order.
    pub fn of(&self, rows: &Rows<'_>) -> Vec<u32> {
        match self {
            Allowed::Ids(ids) => {
                let mut found: Vec<u32> = ids.iter().filter_map(|id| rows.find(id)).collect();
                found.sort_unstable();
                found
            }
            Allowed::Rows(rows) => rows.to_vec(),
        }
    }

    fn has(&self, rows: &Rows<'_>, row: u32) -> bool {
        match self {
            Allowed::Ids(ids) => ids.contains(&rows.ids[row as usize]),
            Allowed::Rows(rows) => rows.binary_search(&row).is_ok(),
        }
    }
}

/// Which rows a search may find.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub statuses: &'a [Status],
    /// What has expired by then is not found.
    pub now: UnixMs,
    /// If given: only these.
    pub allowed: Option<Allowed<'a>>,
    /// If given: of GLOBAL memories, only those whose slots are shown. (Of other owners all memories are in one slot.)
    pub shown: Option<&'a Slots>,
    /// Rows that were superseded, and the number in it of the block's first.
    pub dead: Option<(&'a Bitmap, usize)>,
}

impl Wanted<'_> {
    /// Whether every row of a block is wanted, as far as can be told without looking at them.
    pub fn all(&self, rows: &Rows<'_>) -> bool {
        rows.plain
            && self.statuses.contains(&Status::Active)
            && self.allowed.is_none()
            && self.shown.is_none()
            && self.dead.is_none_or(|(dead, _)| dead.is_empty())
    }

    pub fn has(&self, rows: &Rows<'_>, row: u32) -> bool {
        let at = row as usize;
        !self.dead.is_some_and(|(dead, base)| dead.contains(base + at))
            && (rows.plain && self.statuses.contains(&Status::Active)
                || rows.expires[at] > self.now && self.statuses.iter().any(|s| *s as u8 == rows.statuses[at]))
            && self.allowed.is_none_or(|allowed| allowed.has(rows, row))
            && self
                .shown
                .is_none_or(|slots| slots.shows(GLOBAL_TENANT, slot_of(&Owner::Global, &rows.ids[at])))
    }
}
