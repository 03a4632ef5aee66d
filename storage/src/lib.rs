//! State on a disk: the ledger's log, and the views derived from it.
//!
//! ```text
//! ledger entries ─► log (segments, fsync before acknowledging)
//!                └► Shard::apply ─► records (SQLite) ─► vectors (buffer ─► segments) ─► cache ─► position published
//! ```
//!
//! Nothing here knows of a network or of roles, and all of it blocks: callers run it through `sim::task::blocking`.
//! What a power loss takes from the views, the log gives back; what it takes from the log was never acknowledged.

mod apply;
pub mod bases;
mod cache;
pub mod codec;
pub mod delta;
pub mod embed;
pub mod erase;
mod error;
pub mod facts;
mod filter;
pub mod graph;
pub mod inspect;
pub mod log;
pub mod model;
mod moves;
mod query;
mod records;
mod shard;
mod shown;
pub mod slots;
mod snapshot;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod touched;
mod upkeep;
pub mod vectors;

pub use error::StorageError;
pub use moves::{Leaving, piece_hash};
pub use query::{Hit, ListQuery, Page, Partition, SearchQuery, TimeField, TimeRange};
pub use shard::{Counts, Entry, Shard, ShardOptions};
