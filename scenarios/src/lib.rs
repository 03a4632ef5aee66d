//! Scenarios: what Loci must survive, as data; the clients that load it, the faults that hit it, the promises that judge it.
//!
//! ```text
//! files/*.toml ─► spec ─► fault plan (by seed) ─┐
//!                                               ├─► play: clients, faults on machines ─► history ─► promises ─► verdict
//!                              workload ────────┘         │                                      (one JSON line per run)
//!                                           simulation: a world's, or
//!                                           processes: `loci node`, kill -9, SIGSTOP, proxies
//! ```
//!
//! A run is one process and one seed. The runner starts a child per run, side by side, with bounds on time and memory. A run that
//! proves nothing is not a success: fewer than [`spec::Enough`] acknowledged writes or virtual seconds, or a planned fault that never took
//! place, make it `vacuous`.

pub mod command;
pub mod history;
pub mod mutants;
pub mod operation;
pub mod play;
pub mod promises;
pub mod random;
pub mod recovery;
pub mod report;
pub mod rows;
pub mod settle;
pub mod spec;

// Real processes exist in production's build only.
#[cfg(not(madsim))]
pub mod processes;
// The world's hands exist in the simulated build only; so does what uses them.
#[cfg(madsim)]
pub mod simulation;

/// The command line of the simulator.
#[cfg(madsim)]
pub use simulation::cli::main;

/// The command line of runs on real processes.
#[cfg(not(madsim))]
pub use processes::cli::main as main_of_processes;

/// In the simulated build there are no processes.
#[cfg(madsim)]
pub fn main_of_processes() -> std::process::ExitCode {
    eprintln!(
        "this is the simulated build; run real processes with `cargo real list`, `cargo real run NAME`, …"
    );
    std::process::ExitCode::from(2)
}

/// In production's build there is nothing to simulate with.
#[cfg(not(madsim))]
pub fn main() -> std::process::ExitCode {
    eprintln!(
        "this is the production build; simulate with `cargo sim list`, `cargo sim run NAME --seed N`, …"
    );
    std::process::ExitCode::from(2)
}
