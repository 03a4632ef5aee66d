//! Scenarios on real processes: nodes are killed, stopped and cut off while clients go on, and every promise is judged as in the simulation.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use tests::{Directory, Result, loci, root};

fn real(args: &[&str]) -> Result<Output> {
    let program = loci()?.to_string_lossy().into_owned();
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).arg("real").args(args);
    command.args((args[0] != "list").then_some(["--loci", &program]).into_iter().flatten());
    Ok(command.stdin(Stdio::null()).output()?)
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(&format!("\"{name}\":"))?.1.split([',', '}']).next()
}

/// A kill, and a cut or a stop: the clients lose nothing, and each fault has met somebody.
#[test]
fn acknowledged_writes_survive_faults_of_real_processes() -> Result<()> {
    let dir = Directory::new("real")?;
    let results = dir.0.join("results.jsonl");
    let rows = ["short/ledger-leader-loss", "short/partition-two-way"];
    let path = results.to_string_lossy();
    let output = real(&["chaos", "--seeds", "1", "--json", "--results", &path, "--rows", rows[0], rows[1]])?;
    let table = String::from_utf8_lossy(&output.stdout);
    let all = std::fs::read_to_string(&results)?;
    let runs: Vec<&str> = all.lines().collect();
    let said = format!("{table}\n{}\n{all}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && table.lines().count() == rows.len() && runs.len() == rows.len(),
        "{said}"
    );
    for (run, row) in runs.iter().zip(rows) {
        let is = |name: &str, value: &str| field(run, name) == Some(value);
        assert!(
            is("scenario", &format!("\"{row}\"")) && is("verdict", "\"pass\"") && is("lost", "0"),
            "{said}"
        );
        assert!(field(run, "violations").is_some_and(|first| first.starts_with("[]")), "{said}");
        assert!(is("fired", "true") && !run.contains("\"fired\":false"), "{said}");
        let acked: usize = field(run, "acked").unwrap_or_default().parse()?;
        assert!(acked >= 300, "{said}");
    }
    Ok(())
}

#[test]
fn what_only_a_model_can_suffer_is_refused_before_anything_is_started() -> Result<()> {
    let modelled = [
        ("leader-power-loss", "PowerOff"),
        ("chaos/slow-disk.toml", "SlowDisk"),
        ("regions/saturated-link.toml", "Narrow"),
    ];
    for (scenario, named) in modelled {
        let file = root().join("scenarios/files").join(scenario);
        let name = if file.exists() { file.to_string_lossy().into_owned() } else { scenario.to_string() };
        let output = real(&["run", &name])?;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains(named) && errors.contains("simulated world only"), "{errors}");
    }
    let list = real(&["list"])?;
    let list = String::from_utf8_lossy(&list.stdout);
    assert!(list.contains("short/spot-reclaim") && list.contains("(simulated only: "), "{list}");
    Ok(())
}

/// Processes whose command line names a directory of runs of the process `runner`.
fn nodes_of(runner: u32) -> Result<Vec<PathBuf>> {
    let mark = format!("loci-real-{runner}-");
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(&mark) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[test]
fn no_node_outlives_a_runner_that_is_killed() -> Result<()> {
    // Built, and found, by cargo; run without it, to have the runner's own number.
    real(&["list"])?;
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(["build", "-p", "scenarios", "--bin", "loci-real"]);
    let output = command.args(["--message-format", "json-render-diagnostics"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let named = |line: &str| Some(line.split_once("\"executable\":\"")?.1.split('"').next()?.to_string());
    let program = text.lines().rev().find_map(named).ok_or("cargo named no program")?;
    let mut command = Command::new(program);
    command.args(["run", "short/silent-leader", "--loci"]).arg(loci()?).stdout(Stdio::null());
    let mut runner = command.spawn()?;
    while nodes_of(runner.id())?.len() < 5 {
        assert!(runner.try_wait()?.is_none(), "it ended before its nodes ran");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    runner.kill()?;
    runner.wait()?;
    while !nodes_of(runner.id())?.is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let left = std::env::temp_dir().join(format!("loci-real-{}-0", runner.id()));
    Ok(std::fs::remove_dir_all(left)?)
}
