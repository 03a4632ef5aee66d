//! The cost of work. In production a no-op: work costs what it costs. In simulation each node has cores, and work
//! that the model prices keeps one busy, so queues, saturation and recovery times mean something.
//!
//! Costs are debts: a call returns at once while its core is less than a quarter of a millisecond behind, and
//! otherwise sleeps until the core has caught up. So pricing a microsecond does not cost a timer.

use crate::time::Duration;

/// Prices of the common kinds of work, from the benches on 2 cores of an AMD EPYC.
pub mod cost {
    use super::Duration;
    /// One call handled by a server: decoding, routing, encoding.
    pub const RPC: Duration = Duration::from_micros(38);
    /// Applying one memory to the records and vector views.
    pub const APPLY_MEMORY: Duration = Duration::from_micros(25);
    /// Embedding one passage with the lexical embedder.
    pub const EMBED: Duration = Duration::from_micros(15);
    /// Scanning a thousand vectors of 384 dimensions.
    pub const SCAN_THOUSAND: Duration = Duration::from_micros(40);
}

/// Keeps one of this node's cores busy for `cost`.
pub async fn work(cost: Duration) {
    #[cfg(madsim)]
    crate::world::work(cost).await;
    #[cfg(not(madsim))]
    let _ = cost;
}
