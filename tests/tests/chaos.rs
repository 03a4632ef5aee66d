//! The chaos table is printed, with what was measured, and its rows keep their promises.

use std::process::{Command, Output, Stdio};
use tests::{Result, root};

fn sim(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).arg("sim").args(args);
    // The outer build's settings must not leak into the inner one.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(command.stdin(Stdio::null()).output()?)
}

fn number(line: &str, field: &str) -> Option<f64> {
    line.split_once(&format!("\"{field}\":"))?.1.split([',', '}']).next()?.parse().ok()
}

#[test]
fn the_chaos_table_has_a_line_for_each_row_and_nothing_is_lost() -> Result<()> {
    let rows = ["api-node-crash", "ledger-leader-loss"];
    let output = sim(&["chaos", "--seeds", "1..=2", "--json", "--rows", rows[0], rows[1]])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), rows.len(), "{text}");
    for (line, row) in lines.iter().zip(rows) {
        assert!(line.starts_with(&format!("{{\"row\":\"{row}\",\"seeds\":2,")), "{line}");
        let of = |field: &str| number(line, field).ok_or_else(|| format!("no {field} in {line}"));
        assert!(of("acked")? >= 1000.0 && of("lost")? == 0.0 && of("failed")? == 0.0, "{line}");
        let (p50, p99, max) = (of("recovery_p50_s")?, of("recovery_p99_s")?, of("recovery_max_s")?);
        assert!(0.0 <= p50 && p50 <= p99 && p99 <= max && of("redundancy_p99_s")? > 0.0, "{line}");
    }
    // Without its leader a ledger takes no writes for a while, and somebody must have felt it.
    assert!(number(lines[1], "recovery_max_s") > Some(0.3), "{text}");
    Ok(())
}

#[test]
fn a_scenario_that_measures_nothing_is_no_row() -> Result<()> {
    let output = sim(&["chaos", "--seeds", "1", "--rows", "steady"])?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && errors.contains("api-node-crash"), "{errors}");
    Ok(())
}
