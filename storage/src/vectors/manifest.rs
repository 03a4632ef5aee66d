//! Which segments count: a fact ([`crate::facts`]), replaced as a whole by every seal and every merge. Its replacement is the only commit
//! point; a segment that it does not name was never finished, or is no longer needed, and is removed.

use super::rows::Bitmap;
use crate::codec;
use crate::error::StorageError;
use crate::facts::{self, FactError};
use crate::model::{Month, Position};
use bincode::{Decode, Encode};
use sim::disk::Disk;

/// The fact's name.
pub const MANIFEST: &str = "vectors";

#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Manifest {
    /// The segments hold the vectors of the records as they were here; what came later is in the records.
    pub position: Position,
    pub segments: Vec<Named>,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Named {
    pub number: u64,
    pub month: Month,
    pub rows: u64,
    /// Rows that were superseded or removed by then: how many lie between each and the one before it.
    pub dead: Vec<u32>,
}

/// A segment's file.
pub fn file(dir: &str, number: u64) -> String {
    format!("{dir}/vectors-{number:08}.seg")
}

/// The number in a segment's file name.
pub fn number(name: &str) -> Option<u64> {
    name.strip_prefix("vectors-")?.strip_suffix(".seg")?.parse().ok()
}

pub fn pack(dead: &Bitmap) -> Vec<u32> {
    let mut next = 0;
    let gap = |row: usize| (row - std::mem::replace(&mut next, row + 1)) as u32;
    dead.iter().map(gap).collect()
}

pub fn unpack(dead: &[u32]) -> Bitmap {
    let (mut rows, mut next) = (Bitmap::default(), 0);
    for gap in dead {
        next += *gap as usize;
        rows.insert(next);
        next += 1;
    }
    rows
}

/// `None`: there is none, or it cannot be read; the records have everything.
pub fn load(disk: &dyn Disk, dir: &str) -> Result<Option<Manifest>, StorageError> {
    let unreadable = |problem: String| {
        sim::trace::probe("vectors: manifest unreadable");
        sim::error!("{dir}/{MANIFEST}.meta: {problem}; the segments are made anew from the records");
        Ok(None)
    };
    match facts::get(disk, dir, MANIFEST) {
        Ok(None) => Ok(None),
        Ok(Some(bytes)) => codec::decode(&bytes).map_or_else(|e| unreadable(e.to_string()), |m| Ok(Some(m))),
        Err(FactError::Io(error)) => Err(error.into()),
        Err(error) => unreadable(error.to_string()),
    }
}

pub fn store(disk: &dyn Disk, dir: &str, manifest: &Manifest) -> Result<(), StorageError> {
    Ok(facts::put(disk, dir, MANIFEST, &codec::encode(manifest))?)
}

pub fn remove(disk: &dyn Disk, dir: &str) -> Result<(), StorageError> {
    Ok(facts::remove(disk, dir, MANIFEST)?)
}
