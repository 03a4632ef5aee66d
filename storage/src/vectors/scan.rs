//! The exact scan: codes select what may be among the k best, the vectors themselves decide.

use super::codes::Query;
use super::cpu::Level;
use super::dot::dot_rows;
use super::product::{self, Table};
use super::rows::{Product, Rows, Wanted};
use crate::error::StorageError;
use crate::model::MemoryId;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Rows whose estimates are computed at once.
const CHUNK: usize = 1024;
/// Of rows with nothing but product codes so many times k are scored by f32, and at least so many.
const RESCORED: usize = 8;
const RESCORED_MIN: usize = 64;

/// A score, an id and whose it is (as a place in the search's owners); the greatest is the worst, so that a heap gives it up first.
pub struct Scored(pub f32, pub MemoryId, pub usize);

impl Ord for Scored {
    fn cmp(&self, other: &Scored) -> Ordering {
        other.0.total_cmp(&self.0).then_with(|| (self.1, self.2).cmp(&(other.1, other.2)))
    }
}
impl PartialOrd for Scored {
    fn partial_cmp(&self, other: &Scored) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Scored {
    fn eq(&self, other: &Scored) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Scored {}

/// The k best so far.
pub struct Best {
    k: usize,
    threshold: Option<f32>,
    heap: BinaryHeap<Scored>,
}

impl Best {
    pub fn new(k: usize, threshold: Option<f32>) -> Best {
        Best { k, threshold, heap: BinaryHeap::with_capacity(k.min(1024) + 1) }
    }

    pub fn k(&self) -> usize {
        self.k
    }

    /// Scores below this change nothing.
    pub fn floor(&self) -> f32 {
        let worst = match self.heap.peek() {
            Some(worst) if self.heap.len() == self.k => worst.0,
            _ if self.k == 0 => f32::INFINITY,
            _ => f32::NEG_INFINITY,
        };
        worst.max(self.threshold.unwrap_or(f32::NEG_INFINITY))
    }

    pub fn push(&mut self, scored: Scored) {
        if self.threshold.is_some_and(|t| scored.0 < t) {
            return;
        }
        if self.heap.len() < self.k {
            self.heap.push(scored);
        } else if self.heap.peek().is_some_and(|worst| scored < *worst) {
            self.heap.pop();
            self.heap.push(scored);
        }
    }

    /// Best first.
    pub fn into_sorted(self) -> Vec<Scored> {
        self.heap.into_sorted_vec()
    }
}

/// An f32 that is ordered.
#[derive(PartialEq)]
struct Score(f32);

impl Eq for Score {}
impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Score) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Score {
    fn cmp(&self, other: &Score) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// The k-th best of a stream of estimates.
struct Kth {
    k: usize,
    heap: BinaryHeap<Reverse<Score>>,
}

impl Kth {
    fn new(k: usize) -> Kth {
        Kth { k, heap: BinaryHeap::with_capacity(k.min(1024) + 1) }
    }

    /// The k-th best, once there are so many.
    fn push(&mut self, estimate: f32) -> Option<f32> {
        if self.heap.len() < self.k {
            self.heap.push(Reverse(Score(estimate)));
        } else if let Some(mut worst) = self.heap.peek_mut()
            && worst.0.0 < estimate
        {
            *worst = Reverse(Score(estimate));
        }
        self.heap.peek().filter(|_| self.heap.len() == self.k).map(|worst| worst.0.0)
    }
}

/// A search's vector, as it is and encoded.
pub struct Asked<'a> {
    pub vector: &'a [f32],
    pub query: Query,
    pub level: Level,
}

impl<'a> Asked<'a> {
    pub fn new(vector: &'a [f32]) -> Asked<'a> {
        Asked { vector, query: Query::new(vector), level: Level::best() }
    }

    /// The dot product with one vector.
    pub fn exact(&self, vector: &[f32]) -> f32 {
        let mut out = [0.0];
        dot_rows(self.level, self.vector, vector, &mut out);
        out[0]
    }
}

/// Where the vectors are of rows that have only codes here: by whose they are (a place in the search's owners), and id.
pub type Fetch<'a> = &'a dyn Fn(usize, &MemoryId) -> Result<Vec<f32>, StorageError>;

/// Puts the wanted rows that are among the best into `best`, by f32.
pub fn scan(
    asked: &Asked<'_>,
    rows: &Rows<'_>,
    wanted: &Wanted<'_>,
    whose: usize,
    best: &mut Best,
    fetch: Fetch<'_>,
) -> Result<(), StorageError> {
    // A few are looked up rather than looked for.
    if let Some(allowed) = wanted.allowed.filter(|allowed| allowed.len() < rows.len() / 8) {
        let mut found = allowed.of(rows);
        found.retain(|row| wanted.has(rows, *row));
        return decide(asked, rows, found.into_iter().map(|row| (f32::INFINITY, row)), whose, best, fetch);
    }
    if let Some(product) = &rows.product {
        return scan_product(asked, rows, product, wanted, whose, best, fetch);
    }
    let all = wanted.all(rows);
    let bound = asked.query.bound(&rows.loss);
    let stride = super::codes::stride(rows.dimension);
    let mut kth = Kth::new(best.k);
    let mut candidates: Vec<(f32, u32)> = vec![];
    // Estimates below the cut cannot belong to one of the k best.
    let mut cut = best.floor() - bound;
    let mut sums = [0; CHUNK];
    for first in (0..rows.len()).step_by(CHUNK) {
        let end = rows.len().min(first + CHUNK);
        let sums = &mut sums[..end - first];
        asked.query.sums(asked.level, &rows.codes[first * stride..end * stride], sums);
        for (row, (sum, scale)) in (first as u32..).zip(sums.iter().zip(&rows.scales[first..end])) {
            let estimate = asked.query.estimate(*sum, *scale);
            if estimate >= cut && (all || wanted.has(rows, row)) {
                candidates.push((estimate, row));
                if let Some(worst) = kth.push(estimate) {
                    cut = cut.max(worst - 2.0 * bound);
                }
            }
        }
    }
    candidates.retain(|(estimate, _)| *estimate >= cut);
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let candidates = candidates.into_iter().map(|(estimate, row)| (estimate + bound, row));
    decide(asked, rows, candidates, whose, best, fetch)
}

/// The same where estimates promise nothing: more than the k best of them are scored by f32.
fn scan_product(
    asked: &Asked<'_>,
    rows: &Rows<'_>,
    product: &Product<'_>,
    wanted: &Wanted<'_>,
    whose: usize,
    best: &mut Best,
    fetch: Fetch<'_>,
) -> Result<(), StorageError> {
    let table = Table::new(product.book, asked.vector);
    let all = wanted.all(rows);
    let mut kept = Kth::new((RESCORED * best.k).max(RESCORED_MIN));
    let mut candidates: Vec<(f32, u32)> = vec![];
    let mut cut = f32::NEG_INFINITY;
    for (row, codes) in (0..).zip(product.codes.chunks_exact(product::parts(rows.dimension))) {
        let estimate = table.sum(codes);
        if estimate >= cut && (all || wanted.has(rows, row)) {
            candidates.push((estimate, row));
            cut = kept.push(estimate).unwrap_or(cut);
        }
    }
    candidates.retain(|(estimate, _)| *estimate >= cut);
    decide(asked, rows, candidates.into_iter().map(|(_, row)| (f32::INFINITY, row)), whose, best, fetch)
}

/// Scores candidates by f32. Each comes with what its score is at most, the best first.
pub fn decide(
    asked: &Asked<'_>,
    rows: &Rows<'_>,
    candidates: impl Iterator<Item = (f32, u32)>,
    whose: usize,
    best: &mut Best,
    fetch: Fetch<'_>,
) -> Result<(), StorageError> {
    let bound = asked.query.fine_bound(&rows.loss);
    for (at_most, row) in candidates {
        if at_most < best.floor() {
            break;
        }
        let id = rows.ids[row as usize];
        let score = match rows.original(row) {
            Some(vector) => asked.exact(vector),
            None if rows.product.is_some() => asked.exact(&fetch(whose, &id)?),
            None => {
                let scale = rows.scales[row as usize];
                let refined = asked.query.refined(asked.level, rows.codes_of(row), rows.rests_of(row), scale);
                if refined + bound < best.floor() {
                    continue;
                }
                asked.exact(&fetch(whose, &id)?)
            }
        };
        best.push(Scored(score, id, whose));
    }
    Ok(())
}
