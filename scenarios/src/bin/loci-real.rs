//! `cargo real …`: scenarios on real processes.

fn main() -> std::process::ExitCode {
    scenarios::main_of_processes()
}
