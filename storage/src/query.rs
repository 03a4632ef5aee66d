//! Questions to a shard's views, and their answers.

use crate::model::{Filter, Memory, MemoryId, Month, Owner, Position, Status, UnixMs};
use bincode::{Decode, Encode};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum TimeField {
    Created,
    Updated,
    EventTime,
}

/// From `from` (inclusive) to `to` (exclusive); memories without the field are outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct TimeRange {
    pub field: TimeField,
    pub from: Option<UnixMs>,
    pub to: Option<UnixMs>,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ListQuery {
    pub tenant: String,
    /// Empty: the whole tenant. Owners of other tenants are ignored; [`Owner::Global`] is everyone's.
    pub owners: Vec<Owner>,
    pub filter: Option<Filter>,
    /// Empty: ACTIVE only.
    pub statuses: Vec<Status>,
    pub time: Option<TimeRange>,
    /// Continue after this id.
    pub after: Option<MemoryId>,
    pub limit: usize,
    /// What has expired by then is not found.
    pub now: UnixMs,
    /// Without it the memories found have an empty vector.
    pub with_vector: bool,
}

/// Memories in the order of their ids; `next` is where to continue, `None` at the end.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Page {
    pub memories: Vec<Arc<Memory>>,
    pub next: Option<MemoryId>,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct SearchQuery {
    pub tenant: String,
    /// Whose memories to search. Owners of other tenants are ignored; [`Owner::Global`] is everyone's.
    pub owners: Vec<Owner>,
    /// Unit length.
    pub vector: Vec<f32>,
    pub space: String,
    /// The k memories that its words fit best are found too; may be empty.
    pub text: String,
    pub k: usize,
    /// Least cosine.
    pub threshold: Option<f32>,
    pub filter: Option<Filter>,
    /// Empty: ACTIVE only.
    pub statuses: Vec<Status>,
    pub time: Option<TimeRange>,
    /// What has expired by then is not found.
    pub now: UnixMs,
    /// Without it the memories found have an empty vector.
    pub with_vector: bool,
}

/// A memory that was found.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Hit {
    pub memory: Arc<Memory>,
    /// The cosine of its vector with the query's; 0 if it has none of that space.
    pub similarity: f32,
    /// How well the query's words fit (BM25 over the scopes that were searched), 0 if none does or it was not among the k best.
    pub keywords: f32,
}

/// A month of a shard's memories.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Partition {
    pub month: Month,
    /// Where it was last changed.
    pub applied: Position,
    pub memories: u64,
    pub vectors: u64,
    /// Superseded versions and deletions.
    pub history: u64,
}
