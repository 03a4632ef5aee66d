//! Applying the ledger is a function of the ledger alone: however its entries are cut into calls, repeated, interrupted by power
//! losses or carried over in a snapshot, every replica ends in the same logical state.

use proofs::memory;
use proptest::prelude::*;
use sim::disk::simulated::SimDisk;
use std::sync::Arc;
use storage::model::*;
use storage::{Entry, Shard, ShardOptions, StorageError};

fn command() -> impl Strategy<Value = Command> {
    (0u8..6, 0u8..4, 0u8..8, any::<bool>()).prop_map(|(id, kind, key, keyed)| {
        let operation = match kind {
            0 => Operation::Add(memory(id, format!("text {key}"))),
            1 => {
                let patch = Patch { text: Some(format!("new {key}")), ..Patch::default() };
                Operation::Update { id: [id; 16], expected_version: None, patch }
            }
            2 => Operation::Delete { id: [id; 16], expected_version: None },
            _ => Operation::Touch(vec![([id; 16], 1, 5)]),
        };
        let idempotency_key = if keyed { format!("key {key}") } else { String::new() };
        Command {
            tenant: "t".into(),
            slot: None,
            idempotency_key,
            request_hash: [kind; 16],
            now: 10,
            operation,
        }
    })
}

fn open(disk: &Arc<SimDisk>) -> Result<Shard, StorageError> {
    Shard::open(disk.clone(), "views", ShardOptions::default())
}

fn feed(shard: &Shard, ledger: &[Batch], from: usize, to: usize) -> Result<(), StorageError> {
    let entries: Vec<Entry<'_>> =
        (from..to).map(|i| Entry { epoch: 1, index: i as u64 + 1, batch: Some(&ledger[i]) }).collect();
    shard.apply(&entries, b"meta").map(|_| ())
}

/// Feeds the ledger in calls of odd sizes, going back now and then, losing power now and then, and changing to a copy once.
fn hard_way(ledger: &[Batch], seed: u64) -> Result<[u8; 16], StorageError> {
    let mut disk = SimDisk::new(seed);
    let mut shard = open(&disk)?;
    let mut random = seed | 1;
    let mut draw = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    while (shard.applied().0.index as usize) < ledger.len() {
        let applied = shard.applied().0.index as usize;
        let from = applied.saturating_sub(draw(3) as usize);
        let to = (applied + 1 + draw(4) as usize).min(ledger.len());
        feed(&shard, ledger, from, to)?;
        match draw(6) {
            0 => {
                disk.power_off();
                drop(shard);
                disk.power_on();
                shard = open(&disk)?;
            }
            1 => {
                shard.checkpoint()?;
            }
            2 => {
                let mut chunks = vec![];
                shard.export(&mut |chunk| {
                    chunks.push(chunk.to_vec());
                    Ok(())
                })?;
                disk = SimDisk::new(seed ^ draw(1 << 40));
                shard = open(&disk)?;
                let mut chunks = chunks.into_iter();
                shard.import(&mut || Ok(chunks.next()))?;
            }
            _ => {}
        }
    }
    let (kept, scanned) = (shard.digest(), shard.digest_by_scan()?);
    assert_eq!(kept, scanned, "the digest drifted from the tables");
    Ok(kept.1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_way_of_applying_a_ledger_ends_in_one_state(
        ledger in proptest::collection::vec(proptest::collection::vec(command(), 1..5), 1..20),
        seed in any::<u64>(),
    ) {
        let ledger: Vec<Batch> = ledger.into_iter().map(|commands| Batch { commands }).collect();
        let straight = || -> Result<[u8; 16], StorageError> {
            let shard = open(&SimDisk::new(0))?;
            (0..ledger.len()).try_for_each(|i| feed(&shard, &ledger, i, i + 1))?;
            Ok(shard.digest().1)
        };
        let failed = |e: StorageError| TestCaseError::fail(e.to_string());
        prop_assert_eq!(straight().map_err(failed)?, hard_way(&ledger, seed).map_err(failed)?);
    }
}
