//! Real processes on loopback: what the simulation proves must also be seen here.

use std::fs;
use tests::{Directory, Result, addresses, root, run, run_until_ok, start};

/// The number before `word` in a text.
fn number_before(text: &str, word: &str) -> Option<usize> {
    let before = text.split(word).next()?;
    before.split_whitespace().last()?.parse().ok()
}

#[test]
fn leader_killed_under_load_loses_no_acknowledged_write() -> Result<()> {
    let dir = Directory::new("demo")?;
    let output = run(&dir.0, &["demo", "--exit"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let acked = number_before(&text, "acknowledged in all").ok_or("no count of writes")?;
    let before = number_before(&text, "writes were acknowledged before").ok_or("no count before the kill")?;
    assert!(before > 20 && acked > before + 20, "writes did not go on: {before} before, {acked} in all");
    assert!(text.contains(&format!("0 of {acked} acknowledged writes are missing")), "{text}");
    assert!(text.contains("0 are missing there"), "{text}");
    Ok(())
}

#[test]
fn service_killed_and_started_again_has_everything() -> Result<()> {
    let dir = Directory::new("up")?;
    let listen = addresses(2)?;
    let up = ["up", "--listen", &listen[0], "--http", &listen[1]];
    let service = start(&dir.0, &up)?;
    run_until_ok(&dir.0, &["status"])?;
    let readme = root().join("README.md");
    let licence = root().join("LICENSE");
    let (readme, licence) = (readme.to_string_lossy(), licence.to_string_lossy());
    let first = run_until_ok(&dir.0, &["import", &readme, &licence, "--json"])?;
    let count = |text: &str, field: &str| -> Option<usize> {
        text.split_once(&format!("\"{field}\":"))?.1.split([',', '}']).next()?.trim().parse().ok()
    };
    let added = count(&first, "added").ok_or("no count of passages")?;
    assert!(added > 20, "{first}");
    let added_one = run_until_ok(&dir.0, &["add", "The spare key is under the blue pot", "--json"])?;
    let id =
        added_one.split("\"id\":\"").nth(1).and_then(|t| t.split('"').next()).ok_or("no id")?.to_string();
    // A second process must not touch the same data.
    let second = run(&dir.0, &up)?;
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"));
    service.kill()?;

    let service = start(&dir.0, &up)?;
    run_until_ok(&dir.0, &["status"])?;
    let listed = run_until_ok(&dir.0, &["list", "--json"])?;
    assert_eq!(listed.lines().count(), added + 1, "memories after kill -9");
    let found = run_until_ok(&dir.0, &["search", "where is the spare key", "-k", "1"])?;
    assert!(found.contains("under the blue pot"), "{found}");
    let granted = run_until_ok(&dir.0, &["search", "grant of patent license", "-k", "3"])?;
    assert!(granted.to_lowercase().contains("patent"), "{granted}");
    let again = run_until_ok(&dir.0, &["import", &readme, &licence, "--json"])?;
    assert_eq!(count(&again, "added"), Some(0), "an import added something twice: {again}");
    run_until_ok(
        &dir.0,
        &["update", &id, "--text", "The spare key is with the neighbour", "--expected-version", "1"],
    )?;
    let stale = run(&dir.0, &["update", &id, "--text", "x", "--expected-version", "1"])?;
    assert!(String::from_utf8_lossy(&stale.stderr).contains("version 2"));
    run_until_ok(&dir.0, &["delete", &id])?;
    let history = run_until_ok(&dir.0, &["history", &id])?;
    assert_eq!(history.lines().count(), 3, "{history}");
    assert!(service.stop()?.success(), "SIGTERM must end it in order");

    let service = start(&dir.0, &up)?;
    run_until_ok(&dir.0, &["status"])?;
    assert_eq!(
        run_until_ok(&dir.0, &["list", "--json"])?.lines().count(),
        added,
        "memories after a clean stop"
    );
    drop(service);
    Ok(())
}

#[test]
fn gateway_apart_from_its_replica_serves() -> Result<()> {
    let dir = Directory::new("apart")?;
    let at = addresses(2)?;
    for name in ["replica", "gateway"] {
        fs::create_dir_all(dir.0.join(name))?;
        run_until_ok(&dir.0, &["keys", "add", "someone", "--data", name])?;
    }
    // The caller's key is known at the gateway, which is all that it talks to.
    let key = run_until_ok(&dir.0, &["keys", "add", "acme", "--data", "gateway"])?.trim().to_string();
    let other = run_until_ok(&dir.0, &["keys", "add", "rival", "--data", "gateway"])?.trim().to_string();
    let common = format!("cluster_secret = 'a secret of sixteen'\n[replicas]\n1 = '{}'\n", at[0]);
    let replica = format!(
        "name = 'replica'\nid = 1\nlisten = '{}'\ndata = 'replica'\nroles = ['ledger', 'records', 'graph', 'vector']\n{common}",
        at[0]
    );
    let gateway = format!(
        "name = 'gateway'\nlisten = '{}'\ndata = 'gateway'\nroles = ['gateway', 'writer', 'reader']\n{common}",
        at[1]
    );
    fs::write(dir.0.join("replica.toml"), replica)?;
    fs::write(dir.0.join("gateway.toml"), gateway)?;
    let _replica = start(&dir.0, &["node", "--config", "replica.toml"])?;
    let _gateway = start(&dir.0, &["node", "--config", "gateway.toml"])?;
    let to = ["--addr", &at[1], "--key", &key];
    let with =
        |args: &[&'static str]| -> Vec<String> { to.iter().chain(args).map(|a| a.to_string()).collect() };
    let go = |args: Vec<String>| run_until_ok(&dir.0, &args.iter().map(String::as_str).collect::<Vec<_>>());
    go(with(&["add", "Ana plays the cello on Thursdays", "--idempotency-key", "cello"]))?;
    go(with(&["add", "Ana plays the cello on Thursdays", "--idempotency-key", "cello"]))?;
    assert!(go(with(&["search", "who plays the cello"]))?.contains("Thursdays"));
    assert_eq!(go(with(&["list", "--json"]))?.lines().count(), 1, "one key, one memory");
    let theirs = run_until_ok(&dir.0, &["--addr", &at[1], "--key", &other, "list", "--json"])?;
    assert_eq!(theirs.lines().count(), 0, "another tenant saw it: {theirs}");
    let refused = run(&dir.0, &["--addr", &at[1], "--key", "loci_no_key", "list"])?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("API key"));
    Ok(())
}
