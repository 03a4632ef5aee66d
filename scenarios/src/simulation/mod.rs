//! Runs in the simulated world: the cluster, its clients, its faults, and the command line that starts them.

pub mod cli;
mod client;
mod cluster;
mod faults;
mod run;
mod runner;
