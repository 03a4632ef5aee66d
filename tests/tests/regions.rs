//! Two regions and a witness as real processes on loopback: the region that writes is killed under load, the other one goes on, the killed one comes back as its
//! follower, gives back what had been lost with it, and is made the primary again.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;
use tests::{Directory, Process, Result, addresses, run, run_until_ok, start};

const NODES: usize = 7;

/// A node's file: three nodes that write, three that follow, one that only votes.
fn configure(dir: &Path, id: usize, at: &[String]) -> Result<String> {
    let voters: String = (1..=NODES).map(|id| format!("{id} = '{}'\n", at[id - 1])).collect();
    let text = format!(
        "name = 'n{id}'\nid = {id}\nlisten = '{}'\ndata = 'n{id}'\ncluster_secret = 'a secret of sixteen'\n[replicas]\n{voters}\
         [regions]\nprimary = 'east'\nwitness = 'north'\nmembers = {{ east = [1, 2, 3], west = [4, 5, 6], north = [7] }}\n\
         policy = {{ lease_ms = 2000, detect_ms = 3000, validate_ms = 3000 }}\n",
        at[id - 1]
    );
    let file = format!("n{id}.toml");
    fs::write(dir.join(&file), text)?;
    Ok(file)
}

fn texts(listed: &str) -> BTreeSet<String> {
    let text = |line: &str| Some(line.split("\"text\":\"").nth(1)?.split('"').next()?.to_string());
    listed.lines().filter_map(text).collect()
}

#[test]
fn a_killed_region_is_replaced_and_comes_back() -> Result<()> {
    let dir = Directory::new("regions")?;
    let at = addresses(NODES)?;
    fs::create_dir_all(dir.0.join("n1"))?;
    let key =
        run_until_ok(&dir.0, &["keys", "add", "acme", "--operator", "--data", "n1"])?.trim().to_string();
    for id in 2..=NODES {
        fs::create_dir_all(dir.0.join(format!("n{id}")))?;
        fs::copy(dir.0.join("n1/keys.toml"), dir.0.join(format!("n{id}/keys.toml")))?;
    }
    let files: Vec<String> = (1..=NODES).map(|id| configure(&dir.0, id, &at)).collect::<Result<_>>()?;
    let node = |id: usize| start(&dir.0, &["node", "--config", &files[id - 1]]);
    let mut nodes: Vec<Option<Process>> = (1..=NODES).map(|id| node(id).map(Some)).collect::<Result<_>>()?;
    let go = |id: usize, args: &[&str]| -> Result<String> {
        run_until_ok(&dir.0, &[&["--addr", &at[id - 1], "--key", &key], args].concat())
    };

    // Once both regions have their replicas, a write is durable in both, whoever takes it.
    let (mut sure, mut acked) = (BTreeSet::new(), BTreeSet::new());
    let mut add = |number: usize, by: usize, elsewhere: bool| -> Result<bool> {
        let (text, key_of) = (format!("memory {number}"), format!("key {number}"));
        let mut args = vec!["--addr", &at[by - 1], "--key", &key, "add", &text, "--idempotency-key", &key_of];
        args.extend(elsewhere.then_some("--durable-elsewhere"));
        let added = run(&dir.0, &args)?;
        let there = elsewhere && added.status.success() && added.stderr.is_empty();
        if there {
            sure.insert(text.clone());
        }
        if added.status.success() {
            acked.insert(text);
        }
        Ok(if elsewhere { there } else { added.status.success() })
    };
    let mut number = 0;
    while number < 20 {
        number += add(number, 1 + number % 6, true)? as usize;
    }
    let status = go(4, &["region", "status", "--json"])?;
    assert!(status.contains("\"primary\":\"east\"") && status.contains("\"epoch\":1"), "{status}");

    // What is written while the other region stands still is durable in one only, and lost with it.
    for west in nodes[3..6].iter().flatten() {
        west.pause()?;
    }
    for _ in 0..5 {
        assert!(add(number, 1, false)?, "the region that writes needs no other one");
        number += 1;
    }
    // Nobody tells the cluster anything.
    for id in 1..=3 {
        nodes[id - 1].take().map(Process::kill).transpose()?;
    }
    for west in nodes[3..6].iter().flatten() {
        west.resume()?;
    }
    while !go(5, &["region", "status", "--json"])?.contains("\"step\":\"done\"") {
        std::thread::sleep(Duration::from_millis(200));
    }
    let status = go(6, &["region", "status", "--json"])?;
    assert!(status.contains("\"primary\":\"west\"") && status.contains("\"epoch\":2"), "{status}");
    for _ in 0..20 {
        while !add(number, 4 + number % 3, false)? {}
        number += 1;
    }

    // The old region follows, and says what it had that the other one has not.
    for id in 1..=3 {
        nodes[id - 1] = Some(node(id)?);
    }
    while !go(4, &["region", "status", "--json"])?.contains("\"resolved\":true") {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(texts(&go(4, &["list", "--json"])?).len(), number - 5, "five were lost");
    for (args, verdict) in [(&["--dry-run"][..], "would be written again"), (&[], "written again")] {
        let told = go(5, &[&["region", "resubmit"], args].concat())?;
        let lines = told.lines().filter(|line| line.contains("acme add") && line.ends_with(verdict)).count();
        assert_eq!(lines, 5, "{told}");
    }
    go(4, &["region", "failback", "--to", "east"])?;
    let status = go(2, &["region", "status", "--json"])?;
    assert!(status.contains("\"primary\":\"east\"") && status.contains("\"epoch\":3"), "{status}");
    while !add(number, 2, false)? {}
    for id in [1, 4, 6] {
        let listed = texts(&go(id, &["list", "--json"])?);
        let lost: Vec<&String> = sure.difference(&listed).collect();
        assert!(lost.is_empty(), "durable in both regions, and lost: {lost:?}\n{status}");
        // The rest was durable in both too, or came back with the old disks.
        let lost: Vec<&String> = acked.difference(&listed).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}\n{status}");
    }
    Ok(())
}
