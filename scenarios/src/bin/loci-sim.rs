//! The simulator: `cargo sim list | run | sweep | replay | idle`.

fn main() -> std::process::ExitCode {
    scenarios::main()
}
