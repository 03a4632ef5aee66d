//! Two regions and a witness as real processes on loopback: the region that writes is killed under load, the other one goes on, the killed one comes back as its
//! follower, gives back what had been lost with it, and is made the primary again. All the while any node says which region to talk to, and a webhook hears of what
//! happens.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tests::{Directory, Process, Result, addresses, run, run_until_ok, start, until_holds};

const NODES: usize = 7;

/// A node's file: three nodes that write, three that follow, one that only votes.
fn configure(dir: &Path, id: usize, at: &[String], (http, hook): (&str, &str)) -> Result<String> {
    let voters: String = (1..=NODES).map(|id| format!("{id} = '{}'\n", at[id - 1])).collect();
    let text = format!(
        "name = 'n{id}'\nid = {id}\nlisten = '{}'\nhttp = '{http}'\ndata = 'n{id}'\ncluster_secret = 'a secret of sixteen'\n[replicas]\n{voters}\
         [announce]\nwebhooks = ['http://{hook}/loci']\n\
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

/// What a node's page answers.
fn get(at: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A receiver of webhooks that refuses the first two posts; the ids of the events that it took, in order.
fn receive() -> Result<(String, Arc<Mutex<Vec<String>>>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (at, taken) = (listener.local_addr()?.to_string(), Arc::<Mutex<Vec<String>>>::default());
    let noted = taken.clone();
    std::thread::spawn(move || {
        let mut asked = 0;
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let (mut request, mut part) = (String::new(), [0; 4096]);
            let whole = |request: &str| {
                let (head, body) = request.split_once("\r\n\r\n")?;
                let length =
                    head.to_lowercase().split_once("content-length: ")?.1.lines().next()?.parse::<usize>();
                (body.len() >= length.ok()?).then(|| body.to_string())
            };
            while whole(&request).is_none() {
                match stream.read(&mut part) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.push_str(&String::from_utf8_lossy(&part[..read])),
                }
            }
            asked += 1;
            let id = whole(&request)
                .and_then(|body| Some(body.split("\"event\":\"").nth(1)?.split('"').next()?.to_string()));
            let (status, id) = match id {
                Some(id) if asked > 2 => ("204 No Content", Some(id)),
                _ => ("503 Service Unavailable", None),
            };
            let answered =
                write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            if let (Ok(()), Some(id), Ok(mut taken)) = (answered, id, noted.lock()) {
                taken.push(id);
            }
        }
    });
    Ok((at, taken))
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
    let (pages, (hook, taken)) = (addresses(NODES)?, receive()?);
    let file = |id: usize| configure(&dir.0, id, &at, (&pages[id - 1], &hook));
    let files: Vec<String> = (1..=NODES).map(file).collect::<Result<_>>()?;
    let node = |id: usize| start(&dir.0, &["node", "--config", &files[id - 1]]);
    let mut nodes: Vec<Option<Process>> = (1..=NODES).map(|id| node(id).map(Some)).collect::<Result<_>>()?;
    let go = |id: usize, args: &[&str]| -> Result<String> {
        run_until_ok(&dir.0, &[&["--addr", &at[id - 1], "--key", &key], args].concat())
    };

    // Once both regions have their replicas, a write is durable in both, whoever takes it.
    let (sure, acked) = (RefCell::new(BTreeSet::new()), RefCell::new(BTreeSet::new()));
    let add = |number: usize, by: usize, elsewhere: bool| -> Result<bool> {
        let (text, key_of) = (format!("memory {number}"), format!("key {number}"));
        let mut args = vec!["--addr", &at[by - 1], "--key", &key, "add", &text, "--idempotency-key", &key_of];
        args.extend(elsewhere.then_some("--durable-elsewhere"));
        let added = run(&dir.0, &args)?;
        let there = elsewhere && added.status.success() && added.stderr.is_empty();
        if there {
            sure.borrow_mut().insert(text.clone());
        }
        if added.status.success() {
            acked.borrow_mut().insert(text);
        }
        Ok(if elsewhere { there } else { added.status.success() })
    };
    let mut number = 0;
    while number < 20 {
        number += add(number, 1 + number % 6, true)? as usize;
    }
    let status = go(4, &["region", "status", "--json"])?;
    assert!(status.contains("\"primary\":\"east\"") && status.contains("\"epoch\":1"), "{status}");

    // Each node tells it from its own map, which may be a moment old.
    let until_says = |id: usize, page: &str, what: &str| until_holds(what, || get(&pages[id - 1], page));
    until_says(7, "/regions.json", "\"primary\":\"east\"")?;
    until_says(4, "/regions.json", "\"epoch\":1,\"heard_ms\"")?;
    assert!(get(&pages[0], "/incidents.json")?.contains("\"incidents\":[]"));

    // What is written while the other region stands still is durable in one only, and lost with it.
    for west in nodes[3..6].iter().flatten() {
        west.pause()?;
    }
    for _ in 0..5 {
        assert!(add(number, 1, false)?, "the region that writes needs no other one");
        number += 1;
    }
    // Nobody tells the cluster anything.
    let killed = Instant::now();
    for id in 1..=3 {
        nodes[id - 1].take().map(Process::kill).transpose()?;
    }
    for west in nodes[3..6].iter().flatten() {
        west.resume()?;
    }
    while !add(number, 5, false)? {}
    number += 1;
    let recovered_s = killed.elapsed().as_secs_f64();
    until_holds("\"step\":\"done\"", || go(5, &["region", "status", "--json"]))?;
    let status = go(6, &["region", "status", "--json"])?;
    assert!(status.contains("\"primary\":\"west\"") && status.contains("\"epoch\":2"), "{status}");
    for id in 4..=7 {
        until_says(id, "/regions.json", "\"primary\":\"west\"")?;
    }
    let incident = until_says(7, "/incidents.json", "\"state\":\"recovering\"")?;
    assert!(incident.contains("\"rto_ms\":") && !incident.contains("\"rto_ms\":null"), "{incident}");
    let field = |name: &str| {
        let value =
            incident.split(&format!("\"{name}\":")).nth(1).and_then(|rest| rest.split([',', '}']).next());
        value.unwrap_or("not there").to_string()
    };
    println!(
        "windows of 3 + 3 s: a write was acknowledged {recovered_s:.2} s after the kill; by the incident after {} ms, and at most {} entries are lost",
        field("rto_ms"),
        field("entries_at_most")
    );
    for what in ["west writes, in epoch 2", "RTO: writes were possible again"] {
        until_says(5, "/", what)?;
    }
    // A client that is given all addresses finds one that answers, by itself, and needs no key to ask which region writes.
    let all = at.join(",");
    run_until_ok(&dir.0, &["--addr", &all, "--key", &key, "list"])?;
    assert!(
        run_until_ok(&dir.0, &["--addr", &all, "region", "where"])?.starts_with("west writes, in epoch 2")
    );
    for _ in 0..20 {
        while !add(number, 4 + number % 3, false)? {}
        number += 1;
    }

    // The old region follows, and says what it had that the other one has not.
    for id in 1..=3 {
        nodes[id - 1] = Some(node(id)?);
    }
    until_holds("\"resolved\":true", || go(4, &["region", "status", "--json"]))?;
    assert_eq!(texts(&go(4, &["list", "--json"])?).len(), number - 5, "five were lost");
    for (args, verdict) in [(&["--dry-run"][..], "would be written again"), (&[], "written again")] {
        let told = go(5, &[&["region", "resubmit"], args].concat())?;
        let lines = told.lines().filter(|line| line.contains("acme add") && line.ends_with(verdict)).count();
        assert_eq!(lines, 5, "{told}");
    }
    // Then the incident is closed: every shard has all its replicas again.
    until_holds("\"state\":\"closed\"", || go(4, &["region", "incidents", "--json"]))?;
    let told = go(5, &["region", "incidents"])?;
    assert!(told.contains("RPO: ") && told.contains("MTTR: every shard had all its replicas"), "{told}");
    go(4, &["region", "failback", "--to", "east"])?;
    let status = go(2, &["region", "status", "--json"])?;
    assert!(status.contains("\"primary\":\"east\"") && status.contains("\"epoch\":3"), "{status}");
    while !add(number, 2, false)? {}
    until_says(7, "/regions.json", "\"primary\":\"east\"")?;

    // Every event of both changes was taken, in order, though the leader of the control group died and the receiver refused at first.
    let mut wanted =
        ["validating", "granting", "promoting", "verifying", "done", "accounted", "whole"].to_vec();
    wanted.extend(["granting", "promoting", "verifying", "done"]);
    let mut seen: Vec<String> = vec![];
    for _ in 0..200 {
        seen = taken.lock().map_err(|_| "poisoned")?.clone();
        let mut known = BTreeSet::new();
        seen.retain(|id| known.insert(id.clone()));
        if seen.len() >= wanted.len() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut steps: Vec<&str> = seen.iter().filter_map(|id| id.rsplit('/').next()).collect();
    // Which of the two comes first is the disks' matter.
    steps.get_mut(5..7).ok_or("some are missing")?.sort_unstable();
    assert_eq!(steps.get(..wanted.len()), Some(&wanted[..]), "{seen:?}");
    for id in [1, 4, 6] {
        let listed = texts(&go(id, &["list", "--json"])?);
        let sure = sure.borrow();
        let lost: Vec<&String> = sure.difference(&listed).collect();
        assert!(lost.is_empty(), "durable in both regions, and lost: {lost:?}\n{status}");
        // The rest was durable in both too, or came back with the old disks.
        let acked = acked.borrow();
        let lost: Vec<&String> = acked.difference(&listed).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}\n{status}");
    }

    // The primary and the witness are gone together: nobody but an operator can say so. What is there is what was durable in both regions, and maybe more.
    while !add(number, 2, true)? {}
    for id in [1, 2, 3, 7] {
        nodes[id - 1].take().map(Process::kill).transpose()?;
    }
    let told = go(5, &["control", "recover"])?;
    assert_eq!(told.matches("does not answer").count(), 4, "{told}");
    assert!(told.contains("west would go on"), "{told}");
    assert!(!add(number + 1, 5, false)?, "nobody writes before an operator has decided");
    let told = go(5, &["control", "recover", "--yes"])?;
    assert!(told.contains("in its incarnation 2") && told.contains("west writes, in epoch 1003"), "{told}");
    while !add(number + 1, 4, false)? {}
    // Who comes back follows, and has a say again: then the three that were left are not needed any more.
    for id in [1, 2, 3, 7] {
        nodes[id - 1] = Some(node(id)?);
    }
    while !add(number + 2, 6, true)? {}
    let again = run(&dir.0, &["--addr", &at[4], "--key", &key, "control", "recover"])?;
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("needs no recovery"));
    until_holds("\"incarnation\":2", || go(7, &["cluster", "status", "--json"]))?;
    for id in [1, 4, 7] {
        let listed = texts(&go(id, &["list", "--json"])?);
        let acked = acked.borrow();
        let lost: Vec<&String> = acked.difference(&listed).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    }
    Ok(())
}
