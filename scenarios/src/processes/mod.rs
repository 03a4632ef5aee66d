//! Runs on real processes: the scenario files, clients and checkers of the simulation, and `loci node` in child processes of this machine.
//!
//! ```text
//!            proxies of clients            proxies of each node for each peer
//! clients ─────────────────────► loci node ─────────────────────► loci node
//! operator (no fault concerns it) ─► each node directly
//! ```
//!
//! A crash is `kill -9`, a pause SIGSTOP, a partition or silence what the proxies hold, an orderly stop SIGTERM. Power, disks and clocks of a
//! real machine are nobody's to break, so scenarios that do so are refused before anything is started ([`machines::refusal`]). What the simulation
//! models (cores, disks, links) is here what the machine has, so times are its own; nothing repeats exactly.

pub mod cli;
mod machines;
mod run;
