//! Runs in the simulated world: the cluster, its clients, its faults, and the command line that starts them.

mod changes;
mod chaos;
pub mod cli;
mod client;
mod cluster;
mod events;
mod faults;
mod hunt;
mod page;
mod run;
mod runner;
mod shrink;
mod sweep;
mod watch;
