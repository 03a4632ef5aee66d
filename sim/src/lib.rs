//! The world: tasks, time, randomness, links, disks, CPU and the trace.
//!
//! Everything above this floor is written once and runs in two worlds. In production this crate is a thin skin over
//! tokio, tonic's HTTP/2 transport and the file system. In simulation (`--cfg madsim`) the same names stand on
//! madsim's seeded executor and on models of ours, and `world` gives a scenario its hands: it starts and kills
//! nodes, cuts power and links, and bends clocks.
//!
//! ```text
//!            task   time   rand   net            disk             cpu        trace
//! production tokio  clocks OS     tonic, HTTP/2  files, fdatasync (no-op)    log lines on stderr
//! simulation madsim drift  seed   link models    lies, power loss cores      one line per event, and a hash
//! ```
//!
//! One seed is one process and one result. What makes that true: one thread; every task, timer, message, disk operation and
//! random draw comes from here; `select!` is always biased; iteration order of hash maps never reaches
//! behaviour. The trace's hash is the run's identity, and two processes with one seed must agree on it.
//!
//! No other crate names madsim, and none looks at a real clock, socket or file but through this one.

pub mod cpu;
pub mod disk;
pub mod net;
pub mod planted;
#[cfg(not(madsim))]
pub mod process;
pub mod raft;
pub mod rand;
pub mod task;
pub mod time;
pub mod trace;
#[cfg(madsim)]
pub mod world;

/// Channels, locks and notifications: pure data structures that need neither clock nor thread.
pub use tokio::sync;

/// Waits on several futures and always polls them in the order written, so that a run repeats.
#[macro_export]
macro_rules! select {
    ($($body:tt)*) => { $crate::export::tokio::select! { biased; $($body)* } };
}

#[doc(hidden)]
pub mod export {
    pub use tokio;
}
