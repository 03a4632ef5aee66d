//! Properties of the real transition functions, proven by exhaustive or random exploration; see `tests/`. Here is what they share.

use sim::disk::Disk;
use std::sync::Arc;
use storage::model::*;
use storage::vectors::VectorOptions;
use storage::vectors::graph::GraphOptions;
use storage::{Entry, SearchQuery, Shard, ShardOptions, StorageError};

/// 2026-11-01 and 2026-12-01, in milliseconds: memories of two months.
pub const MONTHS: [UnixMs; 2] = [1_793_491_200_000, 1_796_083_200_000];

/// A memory of user `u` of tenant `t`.
pub fn memory(id: u8, text: String) -> Memory {
    Memory {
        id: [id; 16],
        tenant: "t".into(),
        scope: Scope::Private,
        user: "u".into(),
        agent: String::new(),
        session: String::new(),
        text,
        metadata: format!(r#"{{"number": {id}, "parity": "{}"}}"#, ["even", "odd"][id as usize % 2]),
        kind: MemoryType::Semantic,
        status: Status::Active,
        importance: 0.0,
        categories: vec![],
        links: vec![],
        event_time: None,
        valid_from: None,
        valid_to: None,
        created: MONTHS[id as usize % 2] + id as i64,
        updated: MONTHS[id as usize % 2] + id as i64,
        expires: None,
        access_count: 0,
        last_access: None,
        version: 1,
        space: "s".into(),
        tier: Tier::Hot,
        vector: vec![0.6, 0.8],
    }
}

pub fn edge(source: u8, target: u8, weight: f32) -> Edge {
    let relation = ["knows", "follows"][(source ^ target) as usize % 2].to_string();
    Edge { source: [source; 16], relation, target: [target; 16], weight, valid_from: None, valid_to: None }
}

pub fn command(key: String, operation: Operation) -> Command {
    Command {
        tenant: "t".into(),
        slot: None,
        idempotency_key: key,
        request_hash: [7; 16],
        now: MONTHS[1],
        operation,
    }
}

/// A ledger that uses every kind of command, of `length` entries.
pub fn ledger(length: u64) -> Vec<Batch> {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    let mut one = |index: u64| {
        let (id, other) = (below(9) as u8, below(9) as u8);
        let operation = match below(10) {
            0..4 => Operation::Add(memory(
                id,
                format!("step {index} of {}", "a long way ".repeat(below(90) as usize)),
            )),
            4 | 5 => {
                let text = Some(format!("changed in step {index}"));
                let patch = Patch { text, metadata: Some(r#"{"number": -1}"#.into()), ..Patch::default() };
                Operation::Update { id: [id; 16], expected_version: None, patch }
            }
            6 => Operation::Delete { id: [id; 16], expected_version: None },
            7 => Operation::Touch(vec![([id; 16], 1, MONTHS[1])]),
            8 => Operation::UpsertEdges(vec![edge(id, other, index as f32)]),
            _ => Operation::DeleteEdges(vec![([id; 16], "knows".into(), [other; 16])]),
        };
        command(if below(2) == 0 { format!("key {}", below(20)) } else { String::new() }, operation)
    };
    let mut ledger: Vec<Batch> = (1..=length)
        .map(|index| Batch { commands: (0..1 + index % 3).map(|_| one(index)).collect() })
        .collect();
    if let Some(late) = ledger.get_mut(length as usize * 2 / 3) {
        late.commands.push(command(String::new(), Operation::DropMonth(Month::of(MONTHS[0]))));
    }
    ledger
}

/// The bytes that stand for the ledger's own position in the views.
pub fn meta(index: u64) -> Vec<u8> {
    index.to_le_bytes().to_vec()
}

/// Options with which few vectors make many segments, and a handful a graph.
pub fn options() -> ShardOptions {
    let graph = GraphOptions { m: 4, ef_construction: 16 };
    let vectors = VectorOptions {
        kept: true,
        buffer_bytes_max: 2000,
        graph_rows_min: 4,
        graph,
        ef_search: 32,
        merge_segments: 2,
        segment_rows_max: 1 << 20,
        originals: true,
        product_rows_min: 3,
        conditions_bytes_max: 100_000,
    };
    ShardOptions { vectors, ..ShardOptions::default() }
}

pub fn open(disk: &Arc<dyn Disk>, dir: &str) -> Result<Shard, StorageError> {
    Shard::open(disk.clone(), dir, options())
}

/// A search of tenant `t` for the ten nearest of these owners' active memories.
pub fn search(owners: Vec<Owner>, vector: Vec<f32>) -> SearchQuery {
    SearchQuery {
        tenant: "t".into(),
        owners,
        vector,
        space: "s".into(),
        text: String::new(),
        k: 10,
        threshold: None,
        filter: None,
        statuses: vec![Status::Active],
        time: None,
        now: 0,
        with_vector: false,
    }
}

/// Applies entry `index`, counted from 1.
pub fn apply(shard: &Shard, index: u64, batch: &Batch) -> Result<(), StorageError> {
    shard.apply(&[Entry { epoch: 1, index, batch: Some(batch) }], &meta(index)).map(drop)
}

/// The digest of the views at every position of a ledger, 0 included.
pub fn digests(ledger: &[Batch], disk: Arc<dyn Disk>) -> Result<Vec<[u8; 16]>, StorageError> {
    let shard = open(&disk, "reference")?;
    let mut digests = vec![shard.digest().1];
    for (batch, index) in ledger.iter().zip(1..) {
        apply(&shard, index, batch)?;
        digests.push(shard.digest().1);
    }
    shard.verify()?;
    Ok(digests)
}
