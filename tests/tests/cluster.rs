//! A cluster of real processes on loopback: shards are added and removed under load, a node is taken in, one is drained, one is killed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tests::{Directory, Process, Result, addresses, run, run_until_ok, start};

/// A node's file: every node has all roles; the first three keep the cluster map.
fn configure(dir: &Path, id: usize, at: &[String]) -> Result<String> {
    let voters: String = (1..=3).map(|id| format!("{id} = '{}'\n", at[id - 1])).collect();
    let text = format!(
        "name = 'n{id}'\nid = {id}\nshards = 2\nlisten = '{}'\ndata = 'n{id}'\ncluster_secret = 'a secret of sixteen'\n[replicas]\n{voters}",
        at[id - 1]
    );
    let file = format!("n{id}.toml");
    fs::write(dir.join(&file), text)?;
    Ok(file)
}

fn node(dir: &Path, file: &str) -> Result<Process> {
    start(dir, &["node", "--config", file])
}

/// What `loci cluster status` says.
fn shards(json: &str) -> usize {
    json.matches("\"shard\":").count()
}

#[test]
fn no_memory_is_lost_or_doubled_while_shards_and_nodes_come_and_go() -> Result<()> {
    let dir = Directory::new("cluster")?;
    let at = addresses(4)?;
    fs::create_dir_all(dir.0.join("n1"))?;
    let key =
        run_until_ok(&dir.0, &["keys", "add", "acme", "--operator", "--data", "n1"])?.trim().to_string();
    for id in 2..=4 {
        fs::create_dir_all(dir.0.join(format!("n{id}")))?;
        fs::copy(dir.0.join("n1/keys.toml"), dir.0.join(format!("n{id}/keys.toml")))?;
    }
    let files: Vec<String> = (1..=4).map(|id| configure(&dir.0, id, &at)).collect::<Result<_>>()?;
    let mut nodes: Vec<Option<Process>> = vec![];
    for file in &files {
        nodes.push(Some(node(&dir.0, file)?));
    }
    let at_node = |number: usize, args: &[&str]| -> Vec<String> {
        ["--addr", &at[number - 1], "--key", &key].iter().chain(args).map(|a| a.to_string()).collect()
    };
    let go = |number: usize, args: &[&str]| -> Result<String> {
        let args = at_node(number, args);
        run_until_ok(&dir.0, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert_eq!(shards(&go(1, &["cluster", "status", "--json"])?), 2);
    // A node that only its own file names is unknown until it joins; any node takes the command.
    go(2, &["cluster", "join", "4", &at[3]])?;
    go(2, &["cluster", "join", "4", &at[3]])?;

    // Writers: each adds memories for users of its own until it is told to stop, each under its key until it is certain.
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            let (stop, dir, key, addr) = (stop.clone(), dir.0.clone(), key.clone(), at[writer].clone());
            std::thread::spawn(move || -> std::result::Result<Vec<String>, String> {
                let mut written = vec![];
                while !stop.load(Ordering::SeqCst) {
                    let (number, text) = (written.len(), format!("writer {writer} memory {}", written.len()));
                    let (user, key_of) = (format!("user {}", number % 40), format!("{writer}/{number}"));
                    let args = [
                        "--addr",
                        &addr,
                        "--key",
                        &key,
                        "add",
                        &text,
                        "--user",
                        &user,
                        "--idempotency-key",
                        &key_of,
                    ];
                    run_until_ok(&dir, &args).map_err(|e| e.to_string())?;
                    written.push(text);
                }
                Ok(written)
            })
        })
        .collect();

    go(1, &["cluster", "resize", "5"])?;
    assert_eq!(shards(&go(3, &["cluster", "status", "--json"])?), 5);
    go(1, &["cluster", "drain", "3"])?;
    go(1, &["cluster", "remove", "3"])?;
    // The drained node may go for good; a killed one comes back and has what was written meanwhile.
    nodes[2].take().map(Process::stop).transpose()?;
    nodes[3].take().map(Process::kill).transpose()?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    nodes[3] = Some(node(&dir.0, &files[3])?);
    go(4, &["cluster", "resize", "3"])?;
    stop.store(true, Ordering::SeqCst);
    let mut written = vec![];
    for writer in writers {
        written.extend(writer.join().map_err(|_| "a writer panicked")??);
    }
    assert!(written.len() > 50, "only {} memories were written meanwhile", written.len());

    for number in [1, 2, 4] {
        let listed = go(number, &["list", "--json"])?;
        let texts: Vec<&str> =
            listed.lines().filter_map(|line| line.split("\"text\":\"").nth(1)?.split('"').next()).collect();
        let (wanted, found): (BTreeSet<&str>, BTreeSet<&str>) =
            (written.iter().map(String::as_str).collect(), texts.iter().copied().collect());
        assert_eq!(found, wanted, "asked at node {number}");
        assert_eq!(texts.len(), written.len(), "a memory is there twice");
    }
    // A key that was used on a shard that is gone is honoured where its memory is now.
    let args = at_node(1, &["add", "writer 0 memory 0", "--user", "user 0", "--idempotency-key", "0/0"]);
    let again = run(&dir.0, &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(go(1, &["list", "--json"])?.lines().count(), written.len(), "a retried key added again");
    Ok(())
}
