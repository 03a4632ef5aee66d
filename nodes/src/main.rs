//! `loci`: the service and its command line.

// Processes, terminals and files of the user are real by nature: the command line exists in production's build only.
#[cfg(not(madsim))]
mod cli;

#[cfg(not(madsim))]
fn main() -> std::process::ExitCode {
    cli::main()
}

#[cfg(madsim)]
fn main() -> std::process::ExitCode {
    eprintln!("this is the simulated build; the service is `cargo run --release --bin loci`");
    std::process::ExitCode::from(2)
}
