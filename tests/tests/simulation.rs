//! The simulated world, built and run from here: `cargo test` alone proves both worlds.

use std::process::{Command, Output, Stdio};
use tests::{Result, root};

/// Seeds that once found a defect, and what it was. A seed names one history only within a build, so a cause that can be pinned has
/// a test of its own beside the code that it was in.
const REGRESSIONS: [(&str, u64); 18] = [
    // A checkpoint named entries that a received snapshot held but openraft had not yet handed over.
    ("leader-power-loss", 13),
    // A torn write over an old write-ahead log passed SQLite's checksum and took a view back in time (`storage::records`).
    ("all-nodes-power-loss", 7),
    // Views that turned out to be damaged when a snapshot was installed were never made anew, and the snapshot came again for ever.
    ("clock-drift", 104),
    // A purge stopped between its fact and its deed; openraft then refused to start (`proofs/tests/damage.rs`).
    ("all-nodes-power-loss", 107),
    // A leader whose views were damaged found out only when it exported them for a peer, again and again.
    ("clock-drift", 12),
    // A leader of an epoch that was over said of a learner that the next epoch had it (`nodes::control::driver`).
    ("scenarios/files/regions/stands-still.toml", 2),
    // Slots moved faster than the other region heard of it: when it took over, its shards did not agree about who had them.
    ("scenarios/files/regions/resharded-behind.toml", 1),
    // A leader whose process had just begun took what it found for new, and more was lost than `throttle` allows.
    ("scenarios/files/regions/throttled-restarted.toml", 2),
    // Views that came with a snapshot were further than their log: another one was chosen, which had less, and those who had more could not vote.
    ("scenarios/files/regions/saturated-link.toml", 12),
    // A read with the position of an epoch that a replica did not know yet ended its process. Later, with another schedule: an entry that ended in zeroes
    // on a lost sector was sound to the log's recovery, and to nobody who read it.
    ("scenarios/files/regions/stands-still.toml", 7),
    // Two of three replicas had said in time what they had, and voted alone: when the disk of one was ruined the other could not be elected, for ever.
    ("scenarios/files/regions/stands-still.toml", 6),
    // What an old leader wrote of itself when it led again, in vain, was reported as lost in place of an entry that was kept.
    ("scenarios/files/regions/resharded-meanwhile.toml", 6),
    // A replica that came back to its group, empty, helped one to lead that had not heard of its leaving.
    ("handed-back", 9),
    // A replica whose disk was lost followed a leader that had been deposed before, and made a majority with it.
    ("deposed-leader", 3),
    // A control node whose disk was lost took its group for new, and helped one to lead that lacked changes of the map.
    ("untold-disk", 4),
    // One took a shard for new that it had led with the disk before, and openraft stopped at an answer that said so.
    ("untold-disk", 5),
    // One learned that its group was not new while a message that came meanwhile gave it the first entry: it was left without a vote, or without the note of it.
    ("resharding", 6),
    // A new leader's first entry made two of three replicas take themselves for ones whose disks were lost: nobody led again.
    ("scenarios/files/regions/lost-witness.toml", 2),
];

fn cargo(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO"));
    // The outer build's settings must not leak into the inner one.
    command.current_dir(root()).args(args).env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(command.stdin(Stdio::null()).output()?)
}

/// What a command printed. Of one that fails only the end is shown, where the reason is: a report of the whole would be cut there.
fn succeeds(args: &[&str]) -> Result<String> {
    let output = cargo(args)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let last = |text: &str, lines: usize| {
            let all: Vec<&str> = text.lines().collect();
            all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        eprintln!("cargo {args:?} failed:\n{}\n{}", last(&errors, 20), last(&text, 60));
        return Err(format!("cargo {args:?}: {}", output.status).into());
    }
    Ok(text)
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(&format!("\"{name}\":"))?.1.split([',', '}']).next()
}

/// Two side by side: a run is one thread.
fn regressions() -> Result<()> {
    let of = |half: &[(&str, u64)]| -> std::result::Result<(), String> {
        half.iter().try_for_each(|(scenario, seed)| {
            succeeds(&["sim", "run", scenario, "--seed", &seed.to_string()])
                .map(drop)
                .map_err(|e| e.to_string())
        })
    };
    let (some, others) = REGRESSIONS.split_at(REGRESSIONS.len() / 2);
    let (here, there) = std::thread::scope(|scope| {
        let there = scope.spawn(|| of(others));
        (of(some), there.join())
    });
    here?;
    Ok(there.map_err(|_| "panicked")??)
}

/// One test, since the parts share a build and both cores.
#[test]
fn the_simulated_world_keeps_its_promises() -> Result<()> {
    // The same unit tests and properties, under the simulated world's configuration.
    succeeds(&["sim-test", "-p", "sim", "-p", "storage", "-p", "nodes", "-p", "scenarios", "-p", "proofs"])?;
    let list = succeeds(&["sim", "list"])?;
    assert!(list.lines().count() >= 5, "{list}");
    // One seed, two processes, one result; another seed, another.
    let run = |seed: &str| succeeds(&["sim", "run", "leader-power-loss", "--seed", seed, "--json"]);
    let (first, again, other) = (run("7")?, run("7")?, run("8")?);
    let hash = |text: &str| field(text, "trace_hash").map(str::to_string);
    assert!(hash(&first).is_some());
    assert_eq!(hash(&first), hash(&again), "one seed gave two results");
    assert_ne!(hash(&first), hash(&other), "two seeds gave one result");
    for name in [
        "scenario",
        "seed",
        "build",
        "verdict",
        "virtual_s",
        "wall_s",
        "acked",
        "lost",
        "faults",
        "violations",
    ] {
        assert!(field(&first, name).is_some(), "no {name} in {first}");
    }
    let replay = succeeds(&["sim", "replay", "leader-power-loss", "--seed", "7"])?;
    assert!(
        replay.contains("power lost") && hash(&first).is_some_and(|h| replay.contains(h.trim_matches('"'))),
        "{replay}"
    );
    regressions()?;
    succeeds(&["sim", "regressions"])?;
    succeeds(&["sim", "sweep", "--seeds", "1..=2", "--results", ""])?;
    Ok(())
}

/// A scenario whose workload is too small to prove anything must not pass.
#[test]
fn a_run_that_proves_nothing_is_vacuous() -> Result<()> {
    let text = std::fs::read_to_string(root().join("scenarios/files/steady.toml"))?;
    let path = std::env::temp_dir().join(format!("loci-vacuous-{}.toml", std::process::id()));
    std::fs::write(&path, text.replace("workload_s = 66", "workload_s = 8"))?;
    let output = cargo(&["sim", "run", &path.to_string_lossy(), "--seed", "1", "--json"])?;
    std::fs::remove_file(&path)?;
    let line = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        field(&line, "verdict"),
        Some("\"vacuous\""),
        "{line} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!output.status.success());
    Ok(())
}

/// Clocks that run further apart than was stated let two regions write, and the checkers see it.
#[test]
fn clocks_beyond_the_stated_bound_break_the_promises() -> Result<()> {
    let file = "scenarios/files/must-fail/clocks-beyond-the-bound.toml";
    let output = cargo(&["sim", "sweep", file, "--seeds", "1..=3", "--repeat-every", "0", "--results", ""])?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("# Safety"), "{text}");
    Ok(())
}

/// An operator recovers the control group where it is only cut off: two regions write, which nothing can mend. But what one of them gives up is reported.
#[test]
fn a_recovery_beside_those_that_still_run_breaks_the_promises() -> Result<()> {
    let output = cargo(&["sim", "run", "scenarios/files/must-fail/recovered-though-they-run.toml"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("\n  P3 at") && !text.contains("\n  P2 at"), "{text}");
    Ok(())
}
