//! Benchmarks; run them with `cargo bench`. Speeds are given as ratios to a limit of the same machine in the same run.
