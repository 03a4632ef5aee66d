//! The vector view against a list that is searched by looking at everything, across seals, merges, reopening, power loss and snapshots;
//! and its files against whatever bytes they may hold.

use proofs::{MONTHS, command};
use proptest::prelude::*;
use sim::disk::simulated::SimDisk;
use sim::disk::{Disk, File, SqliteLocation};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::{io, thread};
use storage::model::*;
use storage::vectors::dot;
use storage::vectors::manifest::{self, MANIFEST};
use storage::vectors::segment::Segment;
use storage::{Entry, SearchQuery, Shard, ShardOptions, StorageError};

#[derive(Clone, Debug)]
enum Step {
    /// Several at once, from an id on.
    Add {
        id: u8,
        count: u8,
        seed: u64,
    },
    Update {
        id: u8,
        seed: u64,
    },
    Delete(u8),
    DropMonth(usize),
    Seal,
    Merge,
    Compress,
    Reopen,
    PowerLoss,
    Carry,
    /// Damages a byte of a segment.
    Rot(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 0u8..60;
    prop_oneof![
        10 => (id(), 1u8..20, any::<u64>()).prop_map(|(id, count, seed)| Step::Add { id, count, seed }),
        6 => (id(), any::<u64>()).prop_map(|(id, seed)| Step::Update { id, seed }),
        4 => id().prop_map(Step::Delete),
        1 => (0usize..2).prop_map(Step::DropMonth),
        6 => Just(Step::Seal),
        4 => Just(Step::Merge),
        2 => Just(Step::Compress),
        1 => Just(Step::Reopen),
        2 => Just(Step::PowerLoss),
        1 => Just(Step::Carry),
        1 => any::<u16>().prop_map(Step::Rot),
    ]
}

/// Few directions and many that are equal, of two dimensions and in two spaces.
fn vector(seed: u64) -> (Vec<f32>, String) {
    let angle = |i: u64| ((seed / 4 % 23) * (i + 1)) as f32;
    let dimension = if seed.is_multiple_of(7) { 5 } else { 70 };
    let raw: Vec<f32> = (0..dimension).map(|i| angle(i).sin() + 0.01).collect();
    let norm = dot(&raw, &raw).sqrt();
    let space = if seed.is_multiple_of(5) { "other" } else { "s" };
    (raw.into_iter().map(|x| x / norm).collect(), space.into())
}

fn added(id: u8, seed: u64) -> Memory {
    let (vector, space) = vector(seed);
    let vector = if seed.is_multiple_of(13) { vec![] } else { vector };
    let created = MONTHS[seed as usize / 2 % 2];
    let expires = seed.is_multiple_of(11).then_some(MONTHS[1] + 10_000_000_000);
    let scope = if id.is_multiple_of(3) { Scope::Shared } else { Scope::Private };
    let metadata = if seed.is_multiple_of(4) { String::new() } else { metadata(seed) };
    let base = proofs::memory(id, format!("memory {id}"));
    Memory { created, updated: created, expires, scope, vector, space, metadata, ..base }
}

/// Of some, a text is long, or there are very many numbers.
fn metadata(seed: u64) -> String {
    let (number, parity) = (seed % 10, ["even", "odd"][seed as usize % 2]);
    let note = if number > 3 { "long ".repeat(30) + parity } else { "short".into() };
    let many: Vec<u64> = if number == 7 { (0..100).collect() } else { vec![] };
    format!(
        r#"{{"n": {number}, "parity": "{parity}", "deep": {{"tags": ["t{}"]}}, "note": "{note}", "many": {many:?}}}"#,
        number % 3
    )
}

/// What [`metadata`] gave for `n`.
fn number_of(memory: &Memory) -> Option<u64> {
    let after = memory.metadata.strip_prefix(r#"{"n": "#)?;
    after.split(',').next()?.parse().ok()
}

type List = BTreeMap<u8, Memory>;

fn operations(step: &Step) -> Vec<Operation> {
    match step {
        Step::Add { id, count, seed } => {
            let one = |i: u8| Operation::Add(added((id + i) % 60, seed.rotate_left(i as u32) ^ i as u64));
            (0..*count).map(one).collect()
        }
        Step::Update { id, seed } => {
            let vector = (seed % 3 > 0).then(|| vector(*seed));
            let status = Some(if seed.is_multiple_of(4) { Status::Archived } else { Status::Active });
            let metadata = (seed % 5 < 2).then(|| metadata(seed / 5));
            let patch = Patch { vector, status, metadata, ..Patch::default() };
            vec![Operation::Update { id: [*id; 16], expected_version: None, patch }]
        }
        Step::Delete(id) => vec![Operation::Delete { id: [*id; 16], expected_version: None }],
        Step::DropMonth(month) => vec![Operation::DropMonth(Month::of(MONTHS[*month]))],
        _ => vec![],
    }
}

/// What an operation makes of the list, at a time that is now the latest.
fn apply(list: &mut List, operation: &Operation, now: UnixMs) {
    let alive = |list: &List, id: &MemoryId| list.get(&id[0]).is_some_and(|m| !m.expired(now));
    match operation {
        Operation::Add(memory) if !alive(list, &memory.id) => {
            list.insert(memory.id[0], memory.clone());
        }
        Operation::Update { id, patch, .. } if alive(list, id) => {
            let Some(memory) = list.get_mut(&id[0]) else { return };
            memory.status = patch.status.unwrap_or(memory.status);
            memory.metadata = patch.metadata.clone().unwrap_or(std::mem::take(&mut memory.metadata));
            if let Some((vector, space)) = &patch.vector {
                (memory.vector, memory.space) = (vector.clone(), space.clone());
            }
        }
        Operation::Delete { id, .. } if alive(list, id) => {
            list.remove(&id[0]);
        }
        Operation::DropMonth(month) => list.retain(|_, m| Month::of(m.created) != *month),
        _ => {}
    }
}

/// Searches of every kind, compared with looking at everything: the same memories, the same scores, in the same order. With graphs, whose
/// scores are by twelve bits: as many, and each score as near as those are.
fn compare(shard: &Shard, list: &List, now: UnixMs, graphs: bool) -> Result<(), StorageError> {
    let owners = [Owner::User { tenant: "t".into(), user: "u".into() }, Owner::Shared { tenant: "t".into() }];
    for seed in 0..30u64 {
        let (vector, space) = vector(seed * 9 + 1);
        let statuses =
            if seed % 3 == 0 { vec![Status::Archived] } else { vec![Status::Active, Status::Archived] };
        let created = (seed % 4 == 0).then_some(MONTHS[1]);
        let query = SearchQuery {
            tenant: "t".into(),
            owners: owners[..1 + seed as usize % 2].to_vec(),
            vector: vector.clone(),
            space: space.clone(),
            text: String::new(),
            k: [1, 3, 10, 200][seed as usize % 4],
            threshold: (seed % 5 == 0 && !graphs).then_some(0.2),
            filter: created.map(|from| Filter::Compare {
                field: Field::Created,
                op: CompareOp::Ge,
                value: Value::Number(from as f64),
            }),
            statuses: statuses.clone(),
            time: None,
            now,
            with_vector: true,
        };
        let mut expected: Vec<(f32, u8)> = list
            .values()
            .filter(|m| query.owners.contains(&m.owner()) && !m.expired(now) && statuses.contains(&m.status))
            .filter(|m| m.space == space && m.vector.len() == vector.len())
            .filter(|m| created.is_none_or(|from| m.created >= from))
            .map(|m| (dot(&vector, &m.vector), m.id[0]))
            .filter(|(score, _)| query.threshold.is_none_or(|least| *score >= least))
            .collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        expected.truncate(query.k);
        let found = shard.search(&query)?;
        let scores: Vec<(f32, u8)> = found.iter().map(|hit| (hit.similarity, hit.memory.id[0])).collect();
        if graphs {
            assert_eq!(scores.len(), expected.len(), "search {seed}");
            for (found, expected) in scores.iter().zip(&expected) {
                let own = dot(&vector, &list[&found.1].vector);
                assert!((found.0 - own).abs() < 1e-3 && (found.0 - expected.0).abs() < 1e-3, "search {seed}");
            }
        } else {
            assert_eq!(scores, expected, "search {seed}");
        }
        assert!(found.iter().all(|hit| hit.memory.vector == list[&hit.memory.id[0]].vector));
    }
    assert_eq!(shard.counts()?.vectors, list.values().filter(|m| !m.vector.is_empty()).count() as u64);
    shard.verify()
}

type Meets = fn(Option<u64>) -> bool;

/// Filters on metadata, and what they mean for its number.
fn filters() -> Vec<(Filter, Meets)> {
    let field = |path: &str| Field::Metadata(path.into());
    let (number, text) = (|n: u64| Value::Number(n as f64), |text: &str| Value::Text(text.into()));
    let compare = |path: &str, op, value| Filter::Compare { field: field(path), op, value };
    let n = |op, n| compare("n", op, number(n));
    let even = || compare("parity", CompareOp::Eq, text("even"));
    let not = |filter| Filter::Not(Box::new(filter));
    vec![
        (even(), |n| n.is_some_and(|n| n % 2 == 0)),
        (not(even()), |n| n.is_none_or(|n| n % 2 == 1)),
        (n(CompareOp::Ne, 3), |n| n != Some(3)),
        (n(CompareOp::Lt, 4), |n| n.is_some_and(|n| n < 4)),
        (Filter::And(vec![n(CompareOp::Ge, 2), even()]), |n| n.is_some_and(|n| n >= 2 && n % 2 == 0)),
        (Filter::Or(vec![n(CompareOp::Gt, 7), n(CompareOp::Eq, 0)]), |n| n.is_some_and(|n| n > 7 || n == 0)),
        (Filter::In { field: field("n"), values: vec![number(5), number(7)] }, |n| matches!(n, Some(5 | 7))),
        (Filter::Contains { field: field("deep.tags"), value: text("t1") }, |n| {
            n.is_some_and(|n| n % 3 == 1)
        }),
        (Filter::Contains { field: field("note"), value: text("G EVEN") }, |n| {
            n.is_some_and(|n| n > 3 && n % 2 == 0)
        }),
        (not(Filter::Exists { field: field("n") }), |n| n.is_none()),
    ]
}

/// What meets filters, some asked before and again after each step, and one that the index of metadata does not know.
fn compare_filtered(shard: &Shard, list: &List, now: UnixMs) -> Result<(), StorageError> {
    for (filter, meets) in filters() {
        compare_one(shard, list, now, &filter, meets)?;
        let both = [filter, Filter::Exists { field: Field::Text }];
        compare_one(shard, list, now, &Filter::Not(Box::new(Filter::And(both.to_vec()))), |n| !meets(n))?;
    }
    Ok(())
}

fn compare_one(
    shard: &Shard,
    list: &List,
    now: UnixMs,
    filter: &Filter,
    meets: impl Fn(Option<u64>) -> bool,
) -> Result<(), StorageError> {
    let (vector, space) = vector(1);
    let query = SearchQuery {
        tenant: "t".into(),
        owners: vec![
            Owner::User { tenant: "t".into(), user: "u".into() },
            Owner::Shared { tenant: "t".into() },
        ],
        vector: vector.clone(),
        space: space.clone(),
        text: String::new(),
        k: 100,
        threshold: None,
        filter: Some(filter.clone()),
        statuses: vec![Status::Active, Status::Archived],
        time: None,
        now,
        with_vector: false,
    };
    let meets = |m: &&Memory| {
        !m.expired(now) && m.space == space && m.vector.len() == vector.len() && meets(number_of(m))
    };
    let expected: BTreeMap<u8, f32> =
        list.values().filter(meets).map(|m| (m.id[0], dot(&vector, &m.vector))).collect();
    let found = shard.search(&query)?;
    assert_eq!(
        found.iter().map(|hit| (hit.memory.id[0], hit.similarity)).collect::<BTreeMap<_, _>>(),
        expected,
        "{filter:?}"
    );
    Ok(())
}

fn run(steps: &[Step], seed: u64) -> Result<(), StorageError> {
    let mut options = proofs::options();
    options.vectors.originals = seed.is_multiple_of(2);
    options.vectors.buffer_bytes_max = 20_000;
    let graphs = seed.is_multiple_of(3);
    options.vectors.graph_rows_min = if graphs { 12 } else { 10_000 };
    options.vectors.ef_search = 1000;
    options.vectors.segment_rows_max = if seed.is_multiple_of(5) { 20 } else { 1 << 20 };
    let open = |disk: &Arc<dyn Disk>| {
        Shard::open(disk.clone(), "views", ShardOptions { cache_bytes_max: 5000, ..options.clone() })
    };
    let mut power = SimDisk::new(seed);
    let mut disk: Arc<dyn Disk> = power.clone();
    let mut shard = open(&disk)?;
    let mut history = vec![List::new()];
    let mut batches: Vec<Batch> = vec![];
    let time = |at: usize| MONTHS[0] + at as i64 * 100_000_000;
    let apply_batch = |shard: &Shard, index: usize, batch: &Batch| {
        shard.apply(&[Entry { epoch: 1, index: index as u64 + 1, batch: Some(batch) }], b"").map(drop)
    };
    for (at, step) in steps.iter().enumerate() {
        match step {
            Step::Seal => shard.seal()?,
            Step::Merge => while shard.merge()? {},
            Step::Compress => while shard.compress(Month(i32::MAX))? {},
            Step::Reopen => {
                drop(shard);
                shard = open(&disk)?;
            }
            Step::PowerLoss => {
                power.power_off();
                drop(shard);
                power.power_on();
                shard = open(&disk)?;
                let position = shard.applied().0.index as usize;
                compare(&shard, &history[position], time(at), graphs)?;
                for (index, batch) in batches.iter().enumerate().skip(position) {
                    apply_batch(&shard, index, batch)?;
                }
            }
            Step::Carry => {
                let mut frames = vec![];
                shard.export(&mut |frame| {
                    frames.push(frame.to_vec());
                    Ok(())
                })?;
                // Half of the time over what another replica already had.
                power = SimDisk::new(seed + at as u64);
                disk = power.clone();
                let copy = open(&disk)?;
                for (index, batch) in batches.iter().enumerate().take(batches.len() / 2) {
                    apply_batch(&copy, index, batch)?;
                }
                copy.seal()?;
                let mut frames = frames.into_iter();
                copy.import(&mut || Ok(frames.next()))?;
                shard = copy;
                shard.checkpoint()?;
            }
            Step::Rot(place) => {
                let names = disk.list("views")?;
                let segments: Vec<&String> = names.iter().filter(|name| name.ends_with(".seg")).collect();
                if segments.is_empty() {
                    continue;
                }
                let file = disk.open(&format!("views/{}", segments[*place as usize % segments.len()]))?;
                let at = *place as u64 * 7 % file.len()?;
                let mut byte = [0];
                file.read_at(&mut byte, at)?;
                file.write_at(&[byte[0] ^ (1 << (place % 8))], at)?;
                file.sync()?;
                // What was read before is not read again; the next start finds it.
                drop(shard);
                shard = open(&disk)?;
            }
            step => {
                let mut list = history.last().cloned().unwrap_or_default();
                let operations = operations(step);
                operations.iter().for_each(|operation| apply(&mut list, operation, time(at)));
                history.push(list);
                let timed = |o| Command { now: time(at), ..command(String::new(), o) };
                batches.push(Batch { commands: operations.into_iter().map(timed).collect() });
                apply_batch(&shard, batches.len() - 1, &batches[batches.len() - 1])?;
            }
        }
        if !graphs {
            compare_filtered(&shard, &history[history.len() - 1], time(at))?;
        }
    }
    compare(&shard, &history[history.len() - 1], time(steps.len()), graphs)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn searches_agree_with_a_plain_list(steps in prop::collection::vec(step(), 1..60), seed in 0u64..10_000) {
        run(&steps, seed).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

/// Only an old month is compressed; there is nothing that a search no longer finds, and what is deleted goes.
#[test]
fn an_old_month_keeps_product_codes_alone() -> Result<(), StorageError> {
    let mut options = proofs::options();
    options.vectors.buffer_bytes_max = 60_000;
    options.vectors.product_rows_min = 300;
    let power = SimDisk::new(9);
    let disk: Arc<dyn Disk> = power.clone();
    let mut shard = Shard::open(disk.clone(), "views", options.clone())?;
    let one = |at: u32| {
        let raw: Vec<f32> = (0..30).map(|i| ((at * 37 + i * i * 11) as f32 * 0.61).sin()).collect();
        let norm = dot(&raw, &raw).sqrt();
        let mut memory = Memory { space: "s".into(), ..proofs::memory(0, format!("memory {at}")) };
        memory.id[..4].copy_from_slice(&at.to_be_bytes());
        memory.created = MONTHS[(at % 4 == 3) as usize];
        memory.vector = raw.into_iter().map(|x| x / norm).collect();
        memory
    };
    let apply = |shard: &Shard, index: u64, operations: Vec<Operation>| {
        let commands = operations.into_iter().map(|o| command(String::new(), o)).collect();
        shard.apply(&[Entry { epoch: 1, index, batch: Some(&Batch { commands }) }], b"")
    };
    for batch in 0..12 {
        apply(&shard, batch + 1, (0..100).map(|at| Operation::Add(one(batch as u32 * 100 + at))).collect())?;
        shard.seal()?;
    }
    let check = |shard: &Shard, alive: &dyn Fn(u32) -> bool| -> Result<(), StorageError> {
        let products = |month: UnixMs| {
            let of = shard.segments().remove(&Month::of(month)).unwrap_or_default();
            let opened =
                of.iter().map(|(number, ..)| Segment::open(&*disk, &manifest::file("views", *number)));
            let blocks = opened.map(|segment| {
                let segment = segment?;
                Ok((0..segment.blocks()).map(|at| segment.is_product(at)).collect::<Vec<_>>())
            });
            blocks.collect::<Result<Vec<_>, StorageError>>().map(|found| found.concat())
        };
        let (old, new) = (products(MONTHS[0])?, products(MONTHS[1])?);
        assert!(!old.is_empty() && old.iter().all(|product| *product));
        assert!(!new.is_empty() && new.iter().all(|product| !product));
        for at in (0..1200).filter(|at| alive(*at)).step_by(7) {
            let memory = one(at);
            let query = SearchQuery {
                k: 5,
                now: MONTHS[1],
                with_vector: true,
                ..proofs::search(vec![memory.owner()], memory.vector.clone())
            };
            let hits = shard.search(&query)?;
            assert_eq!(hits.len(), 5);
            let own = hits.iter().find(|hit| hit.memory.id == memory.id);
            assert!(own.is_some_and(|hit| hit.memory.vector == memory.vector), "memory {at}");
        }
        shard.verify()
    };
    let before = Month::of(MONTHS[1]);
    assert!(shard.compress(before)? && !shard.compress(before)?);
    check(&shard, &|_| true)?;
    let deleted = (0..1200).filter(|at| at % 3 == 0);
    let delete = |at| Operation::Delete { id: one(at).id, expected_version: None };
    apply(&shard, 13, deleted.map(delete).collect())?;
    shard.seal()?;
    check(&shard, &|at| at % 3 != 0)?;
    assert!(shard.compress(before)? && !shard.compress(before)?, "a third of it was dead");
    check(&shard, &|at| at % 3 != 0)?;
    power.power_off();
    drop(shard);
    power.power_on();
    shard = Shard::open(disk.clone(), "views", options)?;
    check(&shard, &|at| at % 3 != 0)
}

/// A scope that is larger than a segment may be has several of them, each with its graph, and nothing is lost.
#[test]
fn no_merge_makes_a_segment_of_more_rows_than_it_may_have() -> Result<(), StorageError> {
    const COUNT: usize = 800;
    let mut options = proofs::options();
    options.vectors.segment_rows_max = 100;
    options.vectors.graph_rows_min = 50;
    let disk: Arc<dyn Disk> = SimDisk::new(3);
    let shard = Shard::open(disk.clone(), "views", options)?;
    let one = |at: usize| {
        // Bits of a product, so that no two are near each other.
        let mixed = |i: usize| (at * 20 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let raw: Vec<f32> = (0..20).map(|i| (mixed(i) % 2001) as f32 / 1000.0 - 1.0).collect();
        let norm = dot(&raw, &raw).sqrt();
        let vector = raw.into_iter().map(|x| x / norm).collect();
        let mut memory = Memory { space: "s".into(), vector, ..proofs::memory(0, format!("memory {at}")) };
        memory.id[..8].copy_from_slice(&(at as u64).to_be_bytes());
        memory
    };
    for batch in 0..COUNT / 20 {
        let added = (batch * 20..).take(20).map(|at| command(String::new(), Operation::Add(one(at))));
        let batch_of = Batch { commands: added.collect() };
        shard.apply(&[Entry { epoch: 1, index: batch as u64 + 1, batch: Some(&batch_of) }], b"")?;
        shard.seal()?;
        while shard.merge()? {}
    }
    let segments: Vec<_> = shard.segments().into_values().flatten().collect();
    let rows: Vec<usize> = segments.iter().map(|(_, rows, _)| *rows).collect();
    assert!(rows.iter().all(|rows| *rows <= 100), "{rows:?}");
    assert!(rows.iter().sum::<usize>() == COUNT && rows.len() <= 2 * COUNT / 50, "{rows:?}");
    let graphs = segments.iter().map(|(number, ..)| {
        Ok(Segment::open(&*disk, &manifest::file("views", *number))?.has_graph(0) as usize)
    });
    assert!(graphs.sum::<Result<usize, StorageError>>()? > 4);
    for at in 0..COUNT {
        let memory = one(at);
        let hits = shard
            .search(&SearchQuery { k: 3, ..proofs::search(vec![memory.owner()], memory.vector.clone()) })?;
        assert!(hits.len() == 3 && hits.iter().any(|hit| hit.memory.id == memory.id), "memory {at}");
    }
    shard.verify()
}

/// A disk on which no segment is begun while it is held.
struct Held {
    disk: Arc<SimDisk>,
    /// Whether it is held, and whether somebody waits for it.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Held {
    fn wait_until(&self, until: fn(&(bool, bool)) -> bool) -> MutexGuard<'_, (bool, bool)> {
        let state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.changed.wait_while(state, |state| !until(state)).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Until what it gives is dropped.
    fn hold(&self) -> Holding<'_> {
        self.wait_until(|_| true).0 = true;
        Holding(self)
    }
}

struct Holding<'a>(&'a Held);

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.0.wait_until(|_| true).0 = false;
        self.0.changed.notify_all();
    }
}

impl Disk for Held {
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        if path.ends_with(".seg") {
            self.wait_until(|_| true).1 = true;
            self.changed.notify_all();
            self.wait_until(|(held, _)| !held).1 = false;
        }
        self.disk.create(path)
    }
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.disk.open(path)
    }
    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn exists(&self, path: &str) -> io::Result<bool> {
        self.disk.exists(path)
    }
    fn sqlite(&self, path: &str) -> io::Result<SqliteLocation> {
        self.disk.sqlite(path)
    }
}

/// While a merge, or a seal, has not got further than its beginning, memories are written, found and deleted.
#[test]
fn searches_and_writes_wait_for_no_merge_and_no_seal() -> Result<(), StorageError> {
    let held = Arc::new(Held { disk: SimDisk::new(3), state: Mutex::default(), changed: Condvar::new() });
    let shard = &Shard::open(held.clone(), "views", proofs::options())?;
    let one = |id: u8| added(id, 1);
    let mut index = 0;
    let mut apply = |operation: Operation| {
        index += 1;
        let batch = Batch { commands: vec![command(String::new(), operation)] };
        shard.apply(&[Entry { epoch: 1, index, batch: Some(&batch) }], b"").map(drop)
    };
    let found = |memory: &Memory| -> Result<bool, StorageError> {
        let query = proofs::search(vec![memory.owner()], memory.vector.clone());
        let hits = shard.search(&SearchQuery { k: 100, space: memory.space.clone(), ..query })?;
        Ok(hits.iter().any(|hit| hit.memory.id == memory.id))
    };
    for id in 0..4 {
        apply(Operation::Add(one(id)))?;
        shard.seal()?;
    }
    type Upkeep<'a> = &'a (dyn Fn() -> Result<(), StorageError> + Sync);
    let upkeep: [(u8, Upkeep); 2] = [
        (10, &|| shard.merge().map(|merged| assert!(merged, "there was nothing to merge"))),
        (20, &|| shard.seal()),
    ];
    for (first, work) in upkeep {
        let holding = held.hold();
        thread::scope(|scope| {
            // Let go by a failure, too.
            let holding = holding;
            let worker = scope.spawn(work);
            drop(held.wait_until(|(_, waits)| *waits));
            for id in first..first + 5 {
                apply(Operation::Add(one(id)))?;
                assert!(found(&one(id))? && found(&one(1))?, "memory {id}");
            }
            apply(Operation::Delete { id: [first; 16], expected_version: None })?;
            assert!(!found(&one(first))?);
            assert!(!worker.is_finished());
            drop(holding);
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        assert!(found(&one(first + 1))? && found(&one(1))? && !found(&one(first))?);
    }
    shard.verify()
}

/// A disk with a few segments, one with a graph, one with product codes, and a manifest.
fn sealed() -> Result<Arc<SimDisk>, StorageError> {
    let sim = SimDisk::new(1);
    let disk: Arc<dyn Disk> = sim.clone();
    let shard = Shard::open(disk, "views", proofs::options())?;
    for turn in 0..4u64 {
        let step = Step::Add { id: turn as u8 * 15, count: 15, seed: turn * 12_345 };
        let commands = operations(&step).into_iter().map(|o| command(String::new(), o)).collect();
        shard.apply(&[Entry { epoch: 1, index: turn + 1, batch: Some(&Batch { commands }) }], b"")?;
        shard.seal()?;
        if turn == 1 {
            while shard.compress(Month(i32::MAX))? {}
        }
        if turn == 3 {
            while shard.merge()? {}
        }
    }
    shard.apply(
        &[Entry {
            epoch: 1,
            index: 5,
            batch: Some(&Batch {
                commands: vec![command(
                    String::new(),
                    Operation::Delete { id: [1; 16], expected_version: None },
                )],
            }),
        }],
        b"",
    )?;
    shard.seal()?;
    Ok(sim)
}

/// The same ledger gives the same segments, to the last byte: with graphs, with product codes, sealed, merged and made anew.
#[test]
fn segments_repeat_bit_for_bit() -> Result<(), StorageError> {
    let files = || -> Result<BTreeMap<String, Vec<u8>>, StorageError> {
        let disk = sealed()?;
        let names = disk.list("views")?.into_iter().filter(|name| name.ends_with(".seg"));
        names.map(|name| Ok((name.clone(), content(&*disk, &format!("views/{name}"))?))).collect()
    };
    let (one, two) = (files()?, files()?);
    assert!(one.len() > 1 && one.values().all(|bytes| bytes.len() > 1000));
    assert!(one == two, "{:?} and {:?}", one.keys(), two.keys());
    Ok(())
}

fn content(disk: &dyn Disk, path: &str) -> Result<Vec<u8>, StorageError> {
    let file = disk.open(path)?;
    let mut bytes = vec![0; file.len()? as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Makes all checksums of a segment right, whatever it says.
fn resummed(mut bytes: Vec<u8>) -> Vec<u8> {
    let number = |bytes: &[u8], at: usize, width: usize| {
        let mut number = [0; 8];
        number[..width].copy_from_slice(&bytes[at..at + width]);
        u64::from_le_bytes(number) as usize
    };
    let Some(foot) = bytes.len().checked_sub(64) else { return bytes };
    let directory = number(&bytes, foot + 8, 8);
    if directory > foot {
        return bytes;
    }
    for entry in (directory..foot.saturating_sub(63)).step_by(64) {
        let (offset, len) = (number(&bytes, entry + 16, 8), number(&bytes, entry + 24, 8));
        let originals = number(&bytes, entry + 32, 8);
        if let Some(part) = bytes.get(offset..offset.saturating_add(len)) {
            // Its head is a frame.
            let head = part.get(1..5).map_or(0, |_| number(part, 1, 4));
            if let Some(payload) = part.get(9..9usize.saturating_add(head)) {
                let sum = crc32c_of(&[&part[..5], payload]);
                bytes[offset + 5..offset + 9].copy_from_slice(&sum.to_le_bytes());
            }
            let sum = crc32c_of(&[&bytes[offset..offset + len]]);
            bytes[entry + 48..entry + 52].copy_from_slice(&sum.to_le_bytes());
        }
        if let Some(part) =
            bytes.get(offset.saturating_add(len)..offset.saturating_add(len).saturating_add(originals))
        {
            let sum = crc32c_of(&[part]);
            bytes[entry + 52..entry + 56].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let sum = crc32c_of(&[&bytes[directory..foot]]);
    bytes[foot + 32..foot + 36].copy_from_slice(&sum.to_le_bytes());
    let sum = crc32c_of(&[&bytes[foot..foot + 36]]);
    bytes[foot + 36..foot + 40].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn crc32c_of(parts: &[&[u8]]) -> u32 {
    parts.iter().fold(0, |sum, part| crc32c::crc32c_append(sum, part))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Segments whose checksums are right and whose content is not, as no disk makes them: refused, or searched, without a panic.
    #[test]
    fn a_garbled_segment_never_panics(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        sums in any::<bool>(),
    ) {
        let fail = |e: StorageError| TestCaseError::fail(e.to_string());
        let disk = sealed().map_err(fail)?;
        let names = disk.list("views").map_err(|e| fail(e.into()))?;
        let segments: Vec<&String> = names.iter().filter(|name| name.ends_with(".seg")).collect();
        let path = format!("views/{}", which.get(&segments));
        let mut bytes = content(&*disk, &path).map_err(fail)?;
        let whole = bytes.len();
        for (at, value, heads) in edits {
            // Heads and the directory are where the meaning is.
            let at = if heads { whole - 1 - at.index(whole.min(700)) } else { at.index(whole.min(4096)) };
            bytes[at] = value;
        }
        if let Some(end) = cut {
            bytes.truncate(end.index(whole));
        }
        let bytes = if sums { resummed(bytes) } else { bytes };
        let file = disk.create("views/garbled").map_err(|e| fail(e.into()))?;
        file.write_at(&bytes, 0).map_err(|e| fail(e.into()))?;
        let Ok(segment) = Segment::open(&*disk, "views/garbled") else { return Ok(()) };
        for hash in segment.hashes().copied().collect::<Vec<_>>() {
            let _ = segment.row_of(&hash, &[1; 16], 5);
            let _ = segment.find(&hash);
        }
        for number in 0..segment.blocks() {
            if let Ok(block) = segment.block(number, true) {
                let _ = block.rows.find(&[3; 16]);
                let _ = block.graph().map(|graph| graph.sound(block.rows.len()));
                let vector = vec![0.1; block.rows.dimension];
                let asked = storage::vectors::scan::Asked::new(&vector);
                let wanted = storage::vectors::rows::Wanted { statuses: &[Status::Active], now: 0, allowed: None, shown: None, dead: None };
                let mut best = storage::vectors::scan::Best::new(3, None);
                let _ = storage::vectors::scan::scan(&asked, &block.rows, &wanted, 0, &mut best, &|_, _| Ok(vector.clone()));
                if let Some(graph) = block.graph() {
                    storage::vectors::near(&asked, &block.rows, &graph, &wanted, 0, 10, &mut best);
                }
            }
        }
    }

    #[test]
    fn a_garbled_manifest_never_panics(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let fail = |e: StorageError| TestCaseError::fail(e.to_string());
        let sim = sealed().map_err(fail)?;
        let disk: Arc<dyn Disk> = sim.clone();
        let fact = storage::facts::get(&*disk, "views", MANIFEST).ok().flatten().unwrap_or_default();
        let mut bytes = fact.clone();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        storage::facts::put(&*disk, "views", MANIFEST, &bytes).map_err(|e| fail(e.into()))?;
        let _ = manifest::load(&*disk, "views");
        // Dead rows that are not those that died, with a right checksum, are no disk's doing: verification tells.
        let shard = Shard::open(disk, "views", proofs::options()).map_err(fail)?;
        if let Err(error) = shard.verify() {
            prop_assert!(matches!(error, StorageError::Corrupt { .. }), "{}", error);
        }
    }
}
