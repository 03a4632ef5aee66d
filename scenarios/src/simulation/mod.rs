//! Runs in the simulated world: its machines, and the command line that plays scenarios on them.

mod chaos;
pub mod cli;
mod events;
mod hunt;
mod machines;
mod page;
mod run;
mod runner;
mod shrink;
mod sweep;
