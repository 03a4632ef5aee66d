//! Erasing a person, by the command line, on a real service.

use tests::{Directory, Result, addresses, run, run_until_ok, start};

/// What stands behind `"FIELD":` in a JSON line, up to the next comma or bracket.
fn field<'a>(line: &'a str, field: &str) -> Option<&'a str> {
    let value = line.split_once(&format!("\"{field}\":"))?.1;
    Some(value.split([',', '}', ']']).next()?.trim_matches('"'))
}

#[test]
fn an_erased_user_is_gone_from_every_answer_and_stays_so_after_kill_9() -> Result<()> {
    let dir = Directory::new("erasure")?;
    let listen = addresses(2)?;
    let up = ["up", "--listen", &listen[0], "--http", &listen[1]];
    let service = start(&dir.0, &up)?;
    run_until_ok(&dir.0, &["status"])?;
    let add = |text: &str, more: &[&str]| -> Result<String> {
        let args = [&["add", text, "--json"], more].concat();
        let line = run_until_ok(&dir.0, &args)?;
        Ok(field(&line, "id").ok_or("no id")?.to_string())
    };
    let changed = add("Ana hid the spare key under the walnut tree", &["--user", "ana"])?;
    run_until_ok(&dir.0, &["update", &changed, "--text", "Ana moved the key to the boathouse"])?;
    let deleted = add("Ana fears heights", &["--user", "ana"])?;
    run_until_ok(&dir.0, &["delete", &deleted])?;
    let shared = add("Ana's birthday is in May", &["--user", "ana", "--scope", "shared"])?;
    let with_agent = add("Ana asked for a reminder", &["--user", "ana", "--agent", "planner"])?;
    let keyed = ["--user", "ana", "--idempotency-key", "once"];
    let once = add("Ana plays the cello", &keyed)?;
    let kept = add("Ben plays the harp", &["--user", "ben"])?;

    for refused in [&["erase", "--user", "ana"][..], &["erase", "--yes"], &["erase"]] {
        assert!(!run(&dir.0, refused)?.status.success(), "{refused:?}");
    }
    assert_eq!(run_until_ok(&dir.0, &["list", "--json"])?.lines().count(), 5, "nothing is gone yet");
    let erase = ["erase", "--user", "ana", "--yes", "--json", "--idempotency-key", "forget ana"];
    let receipt = run_until_ok(&dir.0, &erase)?;
    assert_eq!(
        (field(&receipt, "memories"), field(&receipt, "versions")),
        (Some("5"), Some("7")),
        "{receipt}"
    );
    assert!(receipt.contains("\"leftovers\":[{"), "{receipt}");
    assert_eq!(run_until_ok(&dir.0, &erase)?, receipt, "the same key again");
    let other = ["erase", "--user", "ben", "--yes", "--idempotency-key", "forget ana"];
    assert!(!run(&dir.0, &other)?.status.success(), "another request under that key");

    let check = || -> Result<()> {
        let listed = run_until_ok(&dir.0, &["list", "--json"])?;
        assert_eq!(listed.lines().count(), 1, "{listed}");
        assert!(listed.contains(&kept), "{listed}");
        for id in [&changed, &deleted, &shared, &with_agent, &once] {
            assert!(!run(&dir.0, &["get", id])?.status.success());
            let history = run_until_ok(&dir.0, &["history", id, "--json"])?;
            assert_eq!((history.lines().count(), field(&history, "kind")), (1, Some("erased")), "{history}");
            assert_eq!(field(&history, "text"), Some(""), "{history}");
        }
        let found = run_until_ok(&dir.0, &["search", "where is the key", "--user", "ana", "--json"])?;
        assert!(!found.contains("key"), "{found}");
        Ok(())
    };
    check()?;
    // A retry from before is answered as before, and brings nothing back.
    assert_eq!(add("Ana plays the cello", &keyed)?, once);
    check()?;
    service.kill()?;
    let service = start(&dir.0, &up)?;
    run_until_ok(&dir.0, &["status"])?;
    check()?;
    // Nothing hinders a new life.
    add("Ana is back", &["--user", "ana"])?;
    assert!(run_until_ok(&dir.0, &["search", "who is back", "--user", "ana"])?.contains("Ana is back"));
    let text = run_until_ok(&dir.0, &["erase", "--user", "ana", "--yes"])?;
    assert!(text.contains("1 memories in 1 versions") && text.contains("until"), "{text}");
    assert!(service.stop()?.success());
    Ok(())
}
