//! The storage of one replica against the limits of its machine, in one run, without network or peers.
//!
//! - group commit: 64 threads, each waiting until its own entry of 256 bytes is durable, against `fdatasync` of such appends one by one;
//! - bytes written per byte stored: log, views, checkpoints and bases together, as the process hands them to the kernel;
//! - applying memories as they come (60 words, 384 dimensions, three fields of metadata), with all indexes, against plain SQLite that inserts the
//!   same bytes into one table without an index, both with 1,000 in a transaction;
//! - keyword search over 1,000,000 memories of 12 words in 1,000 scopes and 12 months;
//! - walks of two hops, 10 edges from each memory, over 1,000,000 edges;
//! - a move of half of 50,000 such memories, with their keys, from one shard to another: reading, taking over, removing;
//! - opening a shard of 5 GB, and the first read and search after it.
//!
//! `LOCI_BENCH_SCALE` shrinks the last three (default 1.0); `cargo bench --bench storage -- WORD…` runs only the parts named so.

use rusqlite::{Connection, params};
use sim::disk::{Disk, open_sqlite};
use sim::time::{Duration, Instant};
use std::error::Error;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use storage::bases::Bases;
use storage::graph::Walk;
use storage::log::{Log, LogOptions};
use storage::model::*;
use storage::slots::SlotSet;
use storage::{Entry, SearchQuery, Shard, ShardOptions, codec};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const WRITERS: usize = 64;
/// 2026-01-01.
const START: UnixMs = 1_767_225_600_000;
const MONTH: i64 = 30 * 86_400_000;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((self.next() as u128 * bound as u128) >> 64) as u64
    }

    /// A word of 20,000, the first ones much more often, as in a language.
    fn word(&mut self) -> String {
        let rank = (20_000f64.powf(self.below(1 << 32) as f64 / (1u64 << 32) as f64)) as u64;
        let mut word = String::new();
        let mut rest = rank.wrapping_mul(0x9e37_79b9) + 40_000;
        while rest > 0 && word.len() < 9 {
            word.push((b'a' + (rest % 26) as u8) as char);
            rest /= 26;
        }
        word
    }

    fn text(&mut self, words: usize) -> String {
        (0..words).map(|_| self.word()).collect::<Vec<_>>().join(" ")
    }
}

/// In the order of time, as the server makes them.
fn id(number: u64) -> MemoryId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    bytes[8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    bytes
}

fn memory(number: u64, user: u64, text: String, dimension: usize) -> Memory {
    let created = START + (number % 12) as i64 * MONTH;
    let value = 1.0 / (dimension.max(1) as f32).sqrt();
    Memory {
        id: id(number),
        tenant: "acme".into(),
        scope: Scope::Private,
        user: format!("user {user}"),
        agent: String::new(),
        session: String::new(),
        text,
        metadata: String::new(),
        kind: MemoryType::Semantic,
        status: Status::Active,
        importance: 0.5,
        categories: vec![],
        links: vec![],
        event_time: None,
        valid_from: None,
        valid_to: None,
        created,
        updated: created,
        expires: None,
        access_count: 0,
        last_access: None,
        version: 1,
        space: "s".into(),
        tier: Tier::Hot,
        vector: vec![value; dimension],
    }
}

fn batch(operations: impl Iterator<Item = Operation>) -> Batch {
    let command = |operation| Command {
        tenant: "acme".into(),
        slot: None,
        idempotency_key: String::new(),
        request_hash: [0; 16],
        now: START,
        operation,
    };
    Batch { commands: operations.map(command).collect() }
}

fn open(disk: &Arc<dyn Disk>) -> Result<Shard> {
    Ok(Shard::open(disk.clone(), "views", ShardOptions::default())?)
}

fn apply(shard: &Shard, index: &mut u64, batch: &Batch) -> Result<()> {
    *index += 1;
    shard.apply(&[Entry { epoch: 1, index: *index, batch: Some(batch) }], b"")?;
    // What a node does beside it.
    if shard.seal_due() {
        shard.seal()?;
    }
    Ok(())
}

/// A directory that goes with the value.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Result<(Dir, Arc<dyn Disk>)> {
        let root = std::env::var_os("LOCI_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = root.join(format!("loci-bench-{name}-{}", std::process::id()));
        let disk = sim::disk::open(&path.to_string_lossy())?;
        Ok((Dir(path), disk))
    }

    fn bytes(&self, dir: &str) -> Result<u64> {
        let entries = std::fs::read_dir(self.0.join(dir))?;
        Ok(entries.map(|e| Ok::<u64, std::io::Error>(e?.metadata()?.len())).sum::<std::io::Result<u64>>()?)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn group_commit(length: Duration) -> Result<()> {
    let (_dir, disk) = Dir::new("log")?;
    let file = disk.create("raw")?;
    let (started, mut count) = (Instant::now(), 0u64);
    while started.elapsed() < length {
        file.write_at(&[7; 256], count * 256)?;
        file.sync()?;
        count += 1;
    }
    let raw = count as f64 / started.elapsed().as_secs_f64();
    println!("fdatasync of 256 B appends                {raw:10.0} /s");
    let log = Arc::new(Log::open(disk, "log", LogOptions::default())?);
    let next = Arc::new(Mutex::new(1u64));
    let done = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            scope.spawn(|| {
                while started.elapsed() < length {
                    let mine = {
                        let mut next = next.lock().unwrap_or_else(|p| p.into_inner());
                        let mine = *next;
                        if log.append(&[(mine, &[7; 256])]).is_err() {
                            return;
                        }
                        *next += 1;
                        mine
                    };
                    if log.sync_to(mine).is_err() {
                        return;
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let commits = done.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
    println!(
        "group commit, {WRITERS} writers                 {commits:10.0} /s   {:.1} x fdatasync",
        commits / raw
    );
    Ok(())
}

/// Bytes that this process has handed to the kernel to write.
fn written() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/io")?;
    let line = text.lines().find_map(|l| l.strip_prefix("wchar: ")).ok_or("no wchar in /proc/self/io")?;
    Ok(line.trim().parse()?)
}

fn full(number: u64, random: &mut Random) -> Memory {
    let mut memory = memory(number, number % 200, random.text(60), 384);
    // As they come: one after the other.
    (memory.created, memory.updated) = (START + number as i64, START + number as i64);
    let (city, year) = (random.word(), random.below(30));
    memory.metadata = format!(r#"{{"city": "{city}", "year": {year}, "paid": true}}"#);
    memory
}

fn rows() -> Result<()> {
    const ROWS: u64 = 40_000;
    let mut random = Random(1);
    let batches: Vec<Batch> = (0..ROWS / 1000)
        .map(|b| batch((b * 1000..(b + 1) * 1000).map(|n| Operation::Add(full(n, &mut random)))))
        .collect();
    let (_dir, disk) = Dir::new("plain")?;
    let db: Connection = open_sqlite(&*disk, "plain.db", Default::default())?;
    db.execute_batch(
        "PRAGMA page_size=4096; PRAGMA cache_size=-32768; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
         PRAGMA wal_autocheckpoint=4000; CREATE TABLE m (position INTEGER PRIMARY KEY, body BLOB, vector BLOB)",
    )?;
    let (started, mut position) = (Instant::now(), 0);
    for batch in &batches {
        db.execute_batch("BEGIN")?;
        let mut insert = db.prepare_cached("INSERT INTO m VALUES (?1, ?2, ?3)")?;
        for command in &batch.commands {
            let Operation::Add(memory) = &command.operation else { continue };
            let vector: Vec<u8> = memory.vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            let body = codec::encode(&Memory { vector: vec![], ..memory.clone() });
            position += 1;
            insert.execute(params![position, body, vector])?;
        }
        db.execute_batch("COMMIT")?;
    }
    let plain = ROWS as f64 / started.elapsed().as_secs_f64();
    println!("plain SQLite inserts, 1,000 a transaction {plain:10.0} /s");
    drop(db);

    let (dir, disk) = Dir::new("rows")?;
    let shard = open(&disk)?;
    let (started, mut index) = (Instant::now(), 0);
    for batch in &batches {
        apply(&shard, &mut index, batch)?;
    }
    let applied = ROWS as f64 / started.elapsed().as_secs_f64();
    println!(
        "memories applied, with all indexes        {applied:10.0} /s   {:.2} x plain inserts",
        applied / plain
    );
    shard.verify()?;
    drop((shard, dir));

    let (dir, disk) = Dir::new("amplification")?;
    let shard = open(&disk)?;
    let log = Log::open(disk.clone(), "log", LogOptions::default())?;
    let bases = Bases::open(disk, "bases")?;
    let (before, mut stored, mut at) = (written()?, 0, 0);
    for batch in &batches {
        // As a busy ledger cuts them.
        for commands in batch.commands.chunks(100) {
            let batch = Batch { commands: commands.to_vec() };
            let payload = codec::encode(&batch);
            stored += payload.len() as u64;
            log.append(&[(at + 1, &payload)])?;
            log.sync()?;
            apply(&shard, &mut at, &batch)?;
        }
        if at % 100 == 0 {
            shard.checkpoint()?;
            if bases.held().first().is_none_or(|b| log.bytes_after(b.index) > b.bytes.max(16 << 20)) {
                bases.write(&shard)?;
            }
        }
    }
    let total = (written()? - before) as f64 / stored as f64;
    let log_share = dir.bytes("log")? as f64 / stored as f64;
    println!(
        "bytes written per byte stored             {total:10.2}      of which the log {log_share:.2}; {:.2} stay on disk",
        (dir.bytes("log")? + dir.bytes("views")? + dir.bytes("bases")?) as f64 / stored as f64
    );
    Ok(())
}

fn percentiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    (at(0.5), at(0.99))
}

fn words_and_edges(scale: f64) -> Result<()> {
    let rows = (1_000_000.0 * scale) as u64;
    let mut random = Random(2);
    let (_dir, disk) = Dir::new("words")?;
    let shard = open(&disk)?;
    let (started, mut index, mut told) = (Instant::now(), 0, Instant::now());
    for first in (0..rows).step_by(1000) {
        let add = |n| Operation::Add(memory(n, n % 1000, random.text(12), 0));
        apply(&shard, &mut index, &batch((first..(first + 1000).min(rows)).map(add)))?;
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            eprintln!("{first} of {rows} memories");
        }
    }
    let rate = rows as f64 / started.elapsed().as_secs_f64();
    println!("memories of 12 words applied              {rate:10.0} /s   {rows} of them");
    shard.checkpoint()?;
    let mut query = SearchQuery {
        tenant: "acme".into(),
        owners: vec![],
        vector: vec![],
        space: "s".into(),
        text: String::new(),
        k: 10,
        threshold: None,
        filter: None,
        statuses: vec![],
        time: None,
        now: 0,
        with_vector: false,
    };
    let (mut times, mut found) = (vec![], 0);
    for _ in 0..3000 {
        let user = format!("user {}", random.below(1000));
        query.owners = vec![Owner::User { tenant: "acme".into(), user }];
        query.text = random.text(3);
        let started = Instant::now();
        found += shard.by_words(&query)?.len();
        times.push(started.elapsed());
    }
    let (p50, p99) = percentiles(times);
    let each = found as f64 / 3000.0;
    println!(
        "keyword search, 3 words, k = 10           p50 {p50:6.0} us  p99 {p99:6.0} us   {each:.1} found"
    );

    let (nodes, edges) = (rows / 10, rows);
    let edge = |from: u64, random: &mut Random| Edge {
        source: id(from),
        relation: "knows".into(),
        target: id(random.below(nodes)),
        weight: random.below(1000) as f32,
        valid_from: None,
        valid_to: None,
    };
    let started = Instant::now();
    for first in (0..edges).step_by(1000) {
        let some: Vec<Edge> = (first..first + 1000).map(|n| edge(n % nodes, &mut random)).collect();
        apply(&shard, &mut index, &batch([Operation::UpsertEdges(some)].into_iter()))?;
    }
    let rate = edges as f64 / started.elapsed().as_secs_f64();
    println!("edges applied                             {rate:10.0} /s   {} of them", shard.counts()?.edges);
    shard.checkpoint()?;
    let (mut times, mut seen) = (vec![], 0);
    for _ in 0..3000 {
        let walk = Walk {
            tenant: "acme".into(),
            start: vec![id(random.below(nodes))],
            relations: vec![],
            hops: 2,
            fan_out: 10,
            inbound: false,
            as_of: START,
            now: 0,
            include_archived: false,
        };
        let started = Instant::now();
        seen += shard.walk(&walk)?.edges.len();
        times.push(started.elapsed());
    }
    let (p50, p99) = percentiles(times);
    let each = seen as f64 / 3000.0;
    println!(
        "walk of two hops, fan-out 10              p50 {p50:6.0} us  p99 {p99:6.0} us   {each:.0} edges each"
    );
    Ok(())
}

fn opening(scale: f64) -> Result<()> {
    let target = (5e9 * scale) as u64;
    let mut random = Random(3);
    let (dir, disk) = Dir::new("opening")?;
    let shard = open(&disk)?;
    let (mut index, mut number, mut told) = (0, 0, Instant::now());
    while dir.bytes("views")? < target {
        // 12 KB of metadata: what is measured is the size.
        let add = |n| {
            let mut memory = memory(n, n % 300, random.text(20), 384);
            memory.metadata = format!(r#"{{"blob": "{}"}}"#, "0123456789abcdef".repeat(750));
            Operation::Add(memory)
        };
        apply(&shard, &mut index, &batch((number..number + 500).map(add)))?;
        number += 500;
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            eprintln!("{:.1} of {:.1} GB", dir.bytes("views")? as f64 / 1e9, target as f64 / 1e9);
        }
    }
    shard.checkpoint()?;
    drop(shard);
    let size = dir.bytes("views")? as f64 / 1e9;
    let started = Instant::now();
    let shard = open(&disk)?;
    let opened = started.elapsed();
    shard.get("acme", None, &id(7), 0)?.ok_or("the memory is not there")?;
    let read = started.elapsed();
    let owners = vec![Owner::User { tenant: "acme".into(), user: "user 7".into() }];
    let value = 1.0 / 384f32.sqrt();
    let query = SearchQuery {
        tenant: "acme".into(),
        owners,
        vector: vec![value; 384],
        space: "s".into(),
        text: String::new(),
        k: 10,
        threshold: None,
        filter: None,
        statuses: vec![],
        time: None,
        now: 0,
        with_vector: false,
    };
    let hits = shard.search(&query)?.len();
    let searched = started.elapsed();
    println!(
        "opening a shard of {size:.1} GB, {number} memories: {:.1} ms; first read after {:.1} ms, first search after {:.1} ms ({hits} hits)",
        opened.as_secs_f64() * 1e3,
        read.as_secs_f64() * 1e3,
        searched.as_secs_f64() * 1e3
    );
    Ok(())
}

/// Moves half of a shard's slots to another shard.
fn moves(scale: f64) -> Result<()> {
    let ((_one, one), (_two, two)) = (Dir::new("source")?, Dir::new("destination")?);
    let (source, destination) = (open(&one)?, open(&two)?);
    let (mut random, mut index) = (Random(3), 0);
    let batches = (50.0 * scale).ceil() as u64;
    for first in (0..batches).map(|b| b * 1000) {
        let adds = (first..first + 1000).map(|n| Operation::Add(full(n, &mut random)));
        let mut batch = batch(adds);
        for (command, n) in batch.commands.iter_mut().zip(first..) {
            command.idempotency_key = format!("key {n}");
        }
        apply(&source, &mut index, &batch)?;
    }
    let slots: SlotSet = (0..4096).step_by(2).collect();
    let mut step = |shard: &Shard, step: MoveStep| -> Result<u64> {
        index += 1;
        let batch = batch(std::iter::once(Operation::Move(step)));
        let outcomes = shard.apply(&[Entry { epoch: 1, index, batch: Some(&batch) }], b"")?;
        if shard.seal_due() {
            shard.seal()?;
        }
        match outcomes.first().and_then(|of| of.first()) {
            Some(Outcome::Done { version, .. }) => Ok(*version),
            other => Err(format!("a step was answered by {other:?}").into()),
        }
    };
    let id = 1;
    step(&destination, MoveStep::Own { slots: SlotSet::default() })?;
    step(&source, MoveStep::Seal { id, slots: slots.clone() })?;
    let (mut read, mut taken) = (Duration::ZERO, Duration::ZERO);
    let (mut cursor, mut count, mut sum, mut bytes) = (vec![], 0, 0u128, 0);
    for sequence in 0.. {
        let started = Instant::now();
        let part = source.leaving(id, &cursor, 1 << 20)?;
        read += started.elapsed();
        count += part.pieces.len() as u64;
        bytes += part.pieces.iter().map(Vec::len).sum::<usize>();
        sum = sum.wrapping_add(part.hash);
        cursor.clone_from(&part.cursor);
        let started = Instant::now();
        let (slots, pieces, cursor) = (slots.clone(), part.pieces, part.cursor);
        step(&destination, MoveStep::Import { id, slots, sequence, pieces, cursor })?;
        taken += started.elapsed();
        if part.end {
            break;
        }
    }
    step(&destination, MoveStep::Adopt { id, slots, pieces: count, hash: sum })?;
    let rate = |time: Duration| count as f64 / time.as_secs_f64();
    println!(
        "a move read                               {:10.0} rows/s   {count} rows, {} MiB",
        rate(read),
        bytes >> 20
    );
    println!("a move taken over                         {:10.0} rows/s", rate(taken));
    let started = Instant::now();
    step(&source, MoveStep::Release { id })?;
    let released = started.elapsed();
    let mut longest = Duration::ZERO;
    while {
        let started = Instant::now();
        let left = step(&source, MoveStep::Drop { id, rows_max: 1000 })?;
        longest = longest.max(started.elapsed());
        left > 0
    } {}
    println!(
        "a move removed                            {:10.0} rows/s   release {released:.1?}, 1,000 rows at most {longest:.1?}",
        rate(started.elapsed())
    );
    Ok(())
}

fn main() -> Result<()> {
    let number =
        |name: &str, default: f64| std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(default);
    let length = Duration::from_secs_f64(number("LOCI_BENCH_SECONDS", 10.0));
    let scale = number("LOCI_BENCH_SCALE", 1.0);
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let wanted = |part: &str| asked.is_empty() || asked.iter().any(|word| part.contains(word.as_str()));
    if wanted("group commit") {
        group_commit(length)?;
    }
    if wanted("rows") {
        rows()?;
    }
    if wanted("keyword search, walks") {
        words_and_edges(scale)?;
    }
    if wanted("moves") {
        moves(scale)?;
    }
    if wanted("opening") {
        opening(scale)?;
    }
    Ok(())
}
