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

/// The same of a node with these roles only.
fn configure_as(dir: &Path, id: usize, at: &[String], roles: &str) -> Result<String> {
    let file = configure(dir, id, at)?;
    let text = fs::read_to_string(dir.join(&file))?;
    fs::write(dir.join(&file), format!("roles = [{roles}]\n{text}"))?;
    Ok(file)
}

/// Makes the nodes' directories and an operator's key that all of them know.
fn prepare(dir: &Path, nodes: usize) -> Result<String> {
    fs::create_dir_all(dir.join("n1"))?;
    let key = run_until_ok(dir, &["keys", "add", "acme", "--operator", "--data", "n1"])?.trim().to_string();
    for id in 2..=nodes {
        fs::create_dir_all(dir.join(format!("n{id}")))?;
        fs::copy(dir.join("n1/keys.toml"), dir.join(format!("n{id}/keys.toml")))?;
    }
    Ok(key)
}

/// A command's arguments, for a node.
fn to<'a>(addr: &'a str, key: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    [&["--addr", addr, "--key", key], args].concat()
}

fn node(dir: &Path, file: &str) -> Result<Process> {
    start(dir, &["node", "--config", file])
}

/// What `loci cluster status` says.
fn shards(json: &str) -> usize {
    json.matches("\"shard\":").count()
}

type Writer = std::thread::JoinHandle<std::result::Result<Vec<String>, String>>;

/// Adds memories for forty users until it is told to stop, each under its key until it is certain.
fn write(writer: usize, dir: &Path, key: &str, addr: &str, stop: &Arc<AtomicBool>) -> Writer {
    let (stop, dir) = (stop.clone(), dir.to_path_buf());
    let (key, addr) = (key.to_string(), addr.to_string());
    std::thread::spawn(move || {
        let mut written = vec![];
        while !stop.load(Ordering::SeqCst) {
            let (number, text) = (written.len(), format!("writer {writer} memory {}", written.len()));
            let (user, key_of) = (format!("user {}", number % 40), format!("{writer}/{number}"));
            let add = ["add", &text, "--user", &user, "--idempotency-key", &key_of];
            run_until_ok(&dir, &to(&addr, &key, &add)).map_err(|e| e.to_string())?;
            written.push(text);
        }
        Ok(written)
    })
}

/// What the writers have written, which is enough to prove something.
fn all_written(writers: Vec<Writer>) -> Result<Vec<String>> {
    let mut written = vec![];
    for writer in writers {
        written.extend(writer.join().map_err(|_| "a writer panicked")??);
    }
    assert!(written.len() > 50, "only {} memories were written meanwhile", written.len());
    Ok(written)
}

/// A listing shows each memory, and none twice.
fn each_once(listed: &str, written: &[String]) -> Result<()> {
    let texts: Vec<&str> =
        listed.lines().filter_map(|line| line.split("\"text\":\"").nth(1)?.split('"').next()).collect();
    let (wanted, found): (BTreeSet<&str>, BTreeSet<&str>) =
        (written.iter().map(String::as_str).collect(), texts.iter().copied().collect());
    assert_eq!(found, wanted);
    assert_eq!(texts.len(), written.len(), "a memory is there twice");
    Ok(())
}

#[test]
fn no_memory_is_lost_or_doubled_while_shards_and_nodes_come_and_go() -> Result<()> {
    let dir = Directory::new("cluster")?;
    let at = addresses(4)?;
    let key = prepare(&dir.0, 4)?;
    let files: Vec<String> = (1..=4).map(|id| configure(&dir.0, id, &at)).collect::<Result<_>>()?;
    let mut nodes: Vec<Option<Process>> = vec![];
    for file in &files {
        nodes.push(Some(node(&dir.0, file)?));
    }
    let go = |number: usize, args: &[&str]| -> Result<String> {
        run_until_ok(&dir.0, &to(&at[number - 1], &key, args))
    };
    assert_eq!(shards(&go(1, &["cluster", "status", "--json"])?), 2);
    // A node that only its own file names is unknown until it joins; any node takes the command.
    go(2, &["cluster", "join", "4", &at[3]])?;
    go(2, &["cluster", "join", "4", &at[3]])?;

    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2).map(|writer| write(writer, &dir.0, &key, &at[writer], &stop)).collect();

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
    let written = all_written(writers)?;
    for number in [1, 2, 4] {
        each_once(&go(number, &["list", "--json"])?, &written)?;
    }
    // A key that was used on a shard that is gone is honoured where its memory is now.
    let add = ["add", "writer 0 memory 0", "--user", "user 0", "--idempotency-key", "0/0"];
    let again = run(&dir.0, &to(&at[0], &key, &add))?;
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(go(1, &["list", "--json"])?.lines().count(), written.len(), "a retried key added again");
    Ok(())
}

/// Whose memories are all in one shard, while others' are not, is what pins are for.
#[test]
fn no_memory_is_lost_or_doubled_while_its_tenant_is_pinned_and_unpinned() -> Result<()> {
    let dir = Directory::new("pins")?;
    let at = addresses(3)?;
    let key = prepare(&dir.0, 3)?;
    let files: Vec<String> = (1..=3).map(|id| configure(&dir.0, id, &at)).collect::<Result<_>>()?;
    let mut nodes = files.iter().map(|file| node(&dir.0, file).map(Some)).collect::<Result<Vec<_>>>()?;
    let go = |number: usize, args: &[&str]| -> Result<String> {
        run_until_ok(&dir.0, &to(&at[number - 1], &key, args))
    };
    let refused = |args: &[&str]| -> Result<String> {
        let done = run(&dir.0, &to(&at[0], &key, args))?;
        assert!(!done.status.success(), "{args:?} was done");
        Ok(String::from_utf8_lossy(&done.stderr).into_owned())
    };
    // How many memories each shard has, as a replica says.
    let memories = || -> Result<Vec<usize>> {
        let status = go(1, &["--json", "status"])?;
        let counts = status.split("\"memories\":").skip(1);
        Ok(counts
            .map(|rest| rest.split([',', '}']).next().unwrap_or_default().trim().parse())
            .collect::<std::result::Result<_, _>>()?)
    };
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2).map(|writer| write(writer, &dir.0, &key, &at[writer], &stop)).collect();
    go(1, &["cluster", "pin", "acme", "1"])?;
    go(2, &["cluster", "pin", "acme", "1"])?;
    let status = go(3, &["cluster", "status"])?;
    assert!(status.contains("tenant acme  pinned to shard 1\n"), "{status}");
    assert!(
        go(3, &["cluster", "status", "--json"])?
            .contains("{\"shard\":1,\"slots_to_move\":0,\"tenant\":\"acme\"}")
    );
    // What others have still moves; the pinned shard may not go.
    go(1, &["cluster", "resize", "3"])?;
    assert!(refused(&["cluster", "resize", "1"])?.contains("tenant acme is pinned to shard 1"));
    nodes[1].take().map(Process::kill).transpose()?;
    go(3, &["cluster", "pin", "acme", "2"])?;
    nodes[1] = Some(node(&dir.0, &files[1])?);
    stop.store(true, Ordering::SeqCst);
    let written = all_written(writers)?;
    for number in [1, 2, 3] {
        each_once(&go(number, &["list", "--json"])?, &written)?;
    }
    // A replica may be behind.
    while memories()? != [0, 0, written.len()] {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    // A key that was used before the pin is honoured behind it, and behind its end.
    let again = ["add", "writer 0 memory 0", "--user", "user 0", "--idempotency-key", "0/0"];
    go(1, &again)?;
    go(1, &["cluster", "unpin", "acme"])?;
    go(2, &["cluster", "unpin", "acme"])?;
    assert!(!go(3, &["cluster", "status"])?.contains("acme"));
    go(1, &again)?;
    each_once(&go(2, &["list", "--json"])?, &written)?;
    while memories()?.contains(&0) || memories()?.iter().sum::<usize>() != written.len() {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(refused(&["cluster", "pin", "", "0"])?.contains("tenant"));
    assert!(refused(&["cluster", "pin", "acme", "7"])?.contains("there is no 7"));
    Ok(())
}

/// Five nodes, of which three vote and two have nothing but vectors: those may die one after the other, and a search finds what it should
/// as long as one of them lives.
#[test]
fn views_live_on_nodes_of_their_own_and_die_alone() -> Result<()> {
    let dir = Directory::new("views")?;
    let at = addresses(5)?;
    let key = prepare(&dir.0, 5)?;
    let mut files = vec![];
    for id in 1..=5 {
        let roles =
            if id <= 3 { "'gateway', 'writer', 'reader', 'ledger', 'records', 'graph'" } else { "'vector'" };
        files.push(configure_as(&dir.0, id, &at, roles)?);
    }
    let mut nodes = files.iter().map(|file| node(&dir.0, file).map(Some)).collect::<Result<Vec<_>>>()?;
    let go = |args: &[&str]| -> Result<String> { run_until_ok(&dir.0, &to(&at[0], &key, args)) };
    go(&["cluster", "join", "4", &at[3], "--roles", "vector"])?;
    go(&["cluster", "join", "5", &at[4], "--roles", "vector"])?;
    go(&["add", "Ana keeps the spare key under the blue pot", "--user", "ana"])?;
    let serving = |status: &str| status.matches("\"state\":\"serving\"").count();
    // Two shards, two nodes for their vectors.
    while serving(&go(&["cluster", "status", "--json"])?) < 4 {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let finds = || -> Result<bool> {
        Ok(go(&["search", "where is the spare key", "--user", "ana", "-k", "1"])?
            .contains("under the blue pot"))
    };
    assert!(finds()?);
    for down in [3, 4] {
        nodes[down].take().map(Process::kill).transpose()?;
        assert!(finds()?, "with node {} dead", down + 1);
        go(&["add", &format!("written while node {} was dead", down + 1), "--user", "ben"])?;
        nodes[down] = Some(node(&dir.0, &files[down])?);
        // It follows again: the other may die now.
        while run(&dir.0, &to(&at[down], &key, &["status"]))?.status.code() != Some(0) {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
    go(&["cluster", "drain", "5"])?;
    go(&["cluster", "remove", "5"])?;
    assert!(finds()?, "with one of two nodes gone for good");
    // Nobody else has vectors.
    let refused = run(&dir.0, &to(&at[0], &key, &["cluster", "drain", "4"]))?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the last with the role vector"));
    nodes[3].take().map(Process::kill).transpose()?;
    let search = ["search", "the spare key", "--user", "ana"];
    assert!(!run(&dir.0, &to(&at[0], &key, &search))?.status.success(), "who has found it?");
    nodes[3] = Some(node(&dir.0, &files[3])?);
    assert!(finds()?);
    Ok(())
}

/// A node that caches answers gets that need not be strong, as far as the ledger lets it; without it, a replica does.
#[test]
fn a_cache_answers_until_the_ledger_says_otherwise_or_it_dies() -> Result<()> {
    let dir = Directory::new("cache")?;
    let at = addresses(5)?;
    let key = prepare(&dir.0, 5)?;
    let mut files = vec![];
    for id in 1..=5 {
        let roles = match id {
            1..=3 => "'ledger', 'records', 'graph', 'vector'",
            4 => "'gateway', 'writer', 'reader'",
            _ => "'cache'",
        };
        files.push(configure_as(&dir.0, id, &at, roles)?);
    }
    let mut nodes = files.iter().map(|file| node(&dir.0, file).map(Some)).collect::<Result<Vec<_>>>()?;
    let go = |number: usize, args: &[&str]| -> Result<String> {
        run_until_ok(&dir.0, &to(&at[number - 1], &key, args))
    };
    go(4, &["cluster", "join", "5", &at[4], "--roles", "cache"])?;
    let added = go(4, &["--json", "add", "The spare key is under the blue pot", "--user", "ana"])?;
    let of = |json: &str, name: &str| -> Result<String> {
        let (_, rest) =
            json.split_once(&format!("\"{name}\":")).ok_or_else(|| format!("no {name} in {json}"))?;
        Ok(rest.split([',', '}']).next().unwrap_or_default().trim_matches('"').to_string())
    };
    let id = of(&added, "id")?;
    let said = || go(4, &["get", &id, "--eventual"]);
    let hits = || -> Result<u64> { Ok(of(&go(5, &["--json", "status"])?, "hits")?.parse()?) };
    while hits()? == 0 {
        assert!(said()?.contains("blue pot"));
    }
    go(4, &["update", &id, "--text", "The spare key is under the red pot"])?;
    while !said()?.contains("red pot") {}
    let before = hits()?;
    while hits()? == before {
        assert!(said()?.contains("red pot"), "it has gone back");
    }
    nodes[4].take().map(Process::kill).transpose()?;
    assert!(said()?.contains("red pot"), "without a cache");
    nodes[4] = Some(node(&dir.0, &files[4])?);
    while hits()? == 0 {
        assert!(said()?.contains("red pot"));
    }
    go(4, &["cluster", "drain", "5"])?;
    go(4, &["cluster", "remove", "5"])?;
    assert!(said()?.contains("red pot"));
    Ok(())
}

/// A first port that has three free ones behind it.
fn four_ports() -> Result<u16> {
    let free =
        |port: &u16| (0..4).all(|more| std::net::TcpListener::bind(("127.0.0.1", port + more)).is_ok());
    let first = 20_000 + (std::process::id() % 3000) as u16 * 10;
    (first..60_000).step_by(10).find(free).ok_or("no four free ports in a row".into())
}

#[test]
fn one_process_serves_a_cluster_of_four() -> Result<()> {
    let dir = Directory::new("four")?;
    let first = four_ports()?;
    let listen = format!("127.0.0.1:{first}");
    let http = format!("127.0.0.1:{}", first + 5);
    let up = ["up", "--nodes", "4", "--listen", &listen, "--http", &http];
    let service = start(&dir.0, &up)?;
    // The fourth node is taken in by itself.
    while run_until_ok(&dir.0, &["cluster", "status", "--json"])?.matches("\"address\":").count() < 4 {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    run_until_ok(&dir.0, &["add", "The spare key is under the blue pot"])?;
    run_until_ok(&dir.0, &["cluster", "resize", "3"])?;
    service.kill()?;
    let refused = run(&dir.0, &["up", "--listen", &listen, "--http", &http])?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--nodes 4"), "data of four, served by one");
    let service = start(&dir.0, &up)?;
    let found = run_until_ok(&dir.0, &["search", "where is the spare key", "-k", "1"])?;
    assert!(found.contains("under the blue pot"), "{found}");
    // A new key is known at every node.
    let key = run_until_ok(&dir.0, &["keys", "add", "acme"])?.trim().to_string();
    let fourth = format!("127.0.0.1:{}", first + 3);
    let listed = run_until_ok(&dir.0, &["--addr", &fourth, "--key", &key, "list", "--json"])?;
    assert_eq!(listed.lines().count(), 0, "another tenant's memories: {listed}");
    assert!(service.stop()?.success(), "SIGTERM must end it in order");
    Ok(())
}

/// A node that stays dead is found out by the cluster itself: its replicas go to the one that has room, and it is a member when it is back.
#[test]
fn a_dead_node_is_replaced_and_may_come_back() -> Result<()> {
    let dir = Directory::new("lost")?;
    let at = addresses(4)?;
    let key = prepare(&dir.0, 4)?;
    let mut files = vec![];
    for id in 1..=4 {
        let file = configure(&dir.0, id, &at)?;
        let text = fs::read_to_string(dir.0.join(&file))?;
        let tuning = "[tuning]\nnode_down_after_ms = 2000\nnode_lost_after_s = 5\n";
        fs::write(dir.0.join(&file), format!("{text}{tuning}"))?;
        files.push(file);
    }
    let mut nodes = files.iter().map(|file| node(&dir.0, file).map(Some)).collect::<Result<Vec<_>>>()?;
    let go = |args: &[&str]| -> Result<String> { run_until_ok(&dir.0, &to(&at[0], &key, args)) };
    go(&["cluster", "join", "4", &at[3]])?;
    go(&["add", "The spare key is under the blue pot", "--user", "ana"])?;
    let is = |id: usize, state: &str, replicas: usize| -> Result<bool> {
        let status = go(&["cluster", "status"])?;
        let line = status.lines().find(|line| line.starts_with(&format!("node {id:3} ")));
        Ok(line.is_some_and(|l| {
            l.contains(&format!(" {state:9} ")) && l.contains(&format!(" {replicas:3} replicas"))
        }))
    };
    assert!(is(2, "member", 2)? && is(4, "member", 0)?, "{}", go(&["cluster", "status"])?);
    nodes[1].take().map(Process::kill).transpose()?;
    // Down, with what it has; then lost, and its replicas are with the fourth.
    while !is(2, "down", 2)? {}
    while !(is(2, "lost", 0)? && is(4, "member", 2)?) {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    // Now another one may die, and nothing waits for it.
    nodes[2].take().map(Process::kill).transpose()?;
    go(&["add", "written with two of four nodes", "--user", "ana"])?;
    nodes[1] = Some(node(&dir.0, &files[1])?);
    while !is(2, "member", 2)? {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let found = go(&["list", "--user", "ana"])?;
    assert!(found.contains("blue pot") && found.contains("two of four"), "{found}");
    Ok(())
}
