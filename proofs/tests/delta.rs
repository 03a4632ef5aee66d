//! A snapshot that leaves out what its receiver has, completed there, is the snapshot, piece for piece: whatever the receiver has, from nothing to all of
//! it, also what another epoch wrote or what is no longer so.

use proofs::{MONTHS, command, edge, ledger, memory, meta, open};
use proptest::prelude::*;
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::sync::Arc;
use storage::bases::{self, Reader, Writer};
use storage::delta::{self, Completed, Material, RangeHashes};
use storage::model::*;
use storage::{Entry, Shard, StorageError, codec};

type Result<T> = std::result::Result<T, StorageError>;

fn disk(seed: u64) -> Arc<dyn Disk> {
    SimDisk::new(seed)
}

fn feed(shard: &Shard, epoch: u64, index: u64, batch: &Batch) -> Result<()> {
    shard.apply(&[Entry { epoch, index, batch: Some(batch) }], &meta(index)).map(|_| ())
}

/// The frames of a snapshot's file, sorted.
fn frames(disk: &Arc<dyn Disk>, path: &str) -> Result<Vec<Vec<u8>>> {
    let mut reader = Reader::open(&**disk, path)?;
    let mut frames = vec![];
    while let Some(chunk) = reader.next_chunk()? {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let (frame, then) = codec::unframe(rest).map_err(|e| StorageError::Snapshot(e.to_string()))?;
            frames.push(frame.to_vec());
            rest = then;
        }
    }
    frames.sort();
    Ok(frames)
}

/// Sends what `from` has to `to`, beside the material that `to` says it has; the bytes sent, those of all, and what came from where.
fn send(from: &Shard, to: &Arc<dyn Disk>, material: &Material) -> Result<(u64, u64, Completed)> {
    let there = material.hashes()?;
    // It travels.
    let there: RangeHashes = codec::decode(&codec::encode(&there)).expect("what was encoded");
    let (sent, _, _) = bases::export(from, &there, &**to, "sent")?;
    let (all, _, _) = bases::export(from, &RangeHashes::default(), &**to, "all")?;
    let done = material.complete(&**to, "sent", "whole")?;
    assert_eq!(frames(to, "whole")?, frames(to, "all")?);
    Ok((sent, all, done))
}

fn install(shard: &Shard, disk: &Arc<dyn Disk>, path: &str) -> Result<()> {
    let mut reader = Reader::open(&**disk, path)?;
    shard.import(&mut || reader.next_chunk())
}

fn some_memory(number: u64, text: &str) -> Memory {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    Memory { id, user: format!("u{}", number % 40), vector: vec![0.5; 64], ..memory(0, text.into()) }
}

fn adding(number: u64) -> Batch {
    Batch {
        commands: vec![command(format!("key {number}"), Operation::Add(some_memory(number, "so and so")))],
    }
}

fn changing(number: u64, text: &str) -> Batch {
    let patch = Patch { text: Some(text.into()), ..Patch::default() };
    let id = some_memory(number, "").id;
    Batch { commands: vec![command(String::new(), Operation::Update { id, expected_version: None, patch })] }
}

/// Two replicas with so many memories, the second one with its disk.
fn two_alike(memories: u64) -> Result<(Shard, Arc<Shard>, Arc<dyn Disk>)> {
    let there = disk(2);
    let (ahead, behind) = (open(&disk(1), "views")?, Arc::new(open(&there, "views")?));
    for number in 1..=memories {
        feed(&ahead, 1, number, &adding(number))?;
        feed(&behind, 1, number, &adding(number))?;
    }
    Ok((ahead, behind, there))
}

#[test]
fn who_lacks_little_is_sent_little() -> Result<()> {
    let (ahead, behind, there) = two_alike(3000)?;
    // One has gone on in an epoch that is over, the other in the next one, at the same places.
    for number in 3001..=3030 {
        feed(&ahead, 2, number, &adding(number + 50))?;
        feed(&behind, 1, number, &adding(number))?;
    }
    feed(&ahead, 2, 3031, &changing(17, "an old one"))?;
    let (sent, all, done) = send(&ahead, &there, &Material::Views(behind.clone()))?;
    println!("sent {sent} of {all} bytes: {done:?}");
    assert!(sent * 20 < all, "{sent} of {all} bytes");
    assert!(done.arrived < 400, "{done:?}");
    install(&behind, &there, "whole")?;
    assert_eq!((behind.digest(), behind.applied()), (ahead.digest(), ahead.applied()));
    assert_eq!(behind.digest_by_scan()?, ahead.digest());
    // Who has nothing is sent all.
    let empty = Arc::new(open(&disk(3), "views")?);
    let (sent, all, done) = send(&ahead, &there, &Material::Views(empty))?;
    assert_eq!((sent, done.kept), (all, 0));
    Ok(())
}

#[test]
fn what_changed_since_it_was_asked_for_is_refused() -> Result<()> {
    let (ahead, behind, there) = two_alike(200)?;
    feed(&ahead, 1, 201, &adding(201))?;
    let material = Material::Views(behind.clone());
    bases::export(&ahead, &material.hashes()?, &*there, "sent")?;
    feed(&behind, 1, 201, &changing(40, "meanwhile"))?;
    let refused = material.complete(&*there, "sent", "whole");
    assert!(matches!(refused, Err(StorageError::Snapshot(_))), "{refused:?}");
    // Nor can what was not completed be installed, or one that leaves out what nobody had.
    let old = behind.digest();
    assert!(matches!(install(&behind, &there, "sent"), Err(StorageError::Snapshot(_))));
    assert_eq!(behind.digest(), old);
    send(&ahead, &there, &material)?;
    install(&behind, &there, "whole")?;
    assert_eq!(behind.digest(), ahead.digest());
    Ok(())
}

#[test]
fn views_that_are_set_aside_are_material_whenever_the_power_is_lost() -> Result<()> {
    let source = open(&disk(9), "views")?;
    for (batch, index) in ledger(20).iter().zip(1..) {
        feed(&source, 1, index, batch)?;
    }
    let (mut whole, mut nothing) = (0, 0);
    for seed in 0..200 {
        let simulated = SimDisk::new(seed);
        let disk: Arc<dyn Disk> = simulated.clone();
        let old = open(&disk, "views")?;
        for (batch, index) in ledger(18).iter().zip(1..) {
            feed(&old, 1, index, batch)?;
        }
        old.checkpoint()?;
        drop(old);
        // In the middle of it, or at its end.
        simulated.crash_at_op(1 + seed % 40);
        let done = delta::set_aside(&*disk, "views", "aside");
        simulated.power_off();
        simulated.power_on();
        let opened = open(&disk, "views").map(|views| views.applied().0.index);
        match (&opened, &done) {
            (Ok(index), Err(_)) => assert_eq!(*index, 18, "seed {seed}"),
            (Err(StorageError::Damaged { .. }), _) => {}
            other => panic!("seed {seed}: views that are neither the old ones nor marked: {other:?}"),
        }
        let views = Arc::new(Shard::open_anew(disk.clone(), "views", proofs::options())?);
        let material = Material::open(&disk, "aside", &views)?;
        let (_, _, done) = send(&source, &disk, &material)?;
        match (material, done.kept) {
            (Material::Aside(_), 1..) => whole += 1,
            _ => nothing += 1,
        }
        install(&views, &disk, "whole")?;
        views.acquit()?;
        assert_eq!(views.digest(), source.digest());
        delta::discard(&*disk, "aside")?;
        assert!(disk.list("aside")?.is_empty());
    }
    println!("{whole} times the old rows were there, {nothing} times not");
    assert!(whole > 20 && nothing > 0, "{whole}, {nothing}");
    Ok(())
}

#[test]
fn what_was_set_aside_and_is_damaged_is_discarded() -> Result<()> {
    let disk = disk(1);
    let views = Arc::new(open(&disk, "views")?);
    disk.create_dir_all("aside")?;
    let file = disk.create("aside/records.db")?;
    file.write_at(&[7; 4096], 0)?;
    assert!(matches!(Material::open(&disk, "aside", &views)?, Material::Views(_)));
    assert!(disk.list("aside")?.is_empty());
    // A snapshot's file that is damaged is refused too.
    let mut writer = Writer::create(&*disk, "sent")?;
    writer.push(&[9; 100])?;
    writer.finish()?;
    assert!(Material::Views(views).complete(&*disk, "sent", "whole").is_err());
    Ok(())
}

/// What happens to a few memories, often.
fn some_command() -> impl Strategy<Value = Command> {
    (0u8..30, 0u8..8, 0u8..12).prop_map(|(id, kind, other)| {
        let operation = match kind {
            0..3 => Operation::Add(memory(id, format!("text {other}"))),
            3 => {
                let patch = Patch { text: Some(format!("new {other}")), ..Patch::default() };
                Operation::Update { id: [id; 16], expected_version: None, patch }
            }
            4 => Operation::Delete { id: [id; 16], expected_version: None },
            5 => Operation::Touch(vec![([id; 16], 1, 5)]),
            6 => Operation::UpsertEdges(vec![edge(id, other, 0.5)]),
            _ if other == 0 => Operation::DropMonth(Month::of(MONTHS[id as usize % 2])),
            _ => Operation::DeleteEdges(vec![([id; 16], "knows".into(), [other; 16])]),
        };
        command(if kind % 2 == 0 { format!("key {other}") } else { String::new() }, operation)
    })
}

fn some_ledger(entries: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Batch>> {
    let batch = proptest::collection::vec(some_command(), 1..6).prop_map(|commands| Batch { commands });
    proptest::collection::vec(batch, entries)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]
    #[test]
    fn whatever_the_receiver_has_the_snapshot_becomes_whole(
        common in some_ledger(0..30), old in some_ledger(0..12), new in some_ledger(1..30),
    ) {
        let run = || -> Result<()> {
            let there = disk(2);
            let (ahead, behind) = (open(&disk(1), "views")?, Arc::new(open(&there, "views")?));
            for (batch, index) in common.iter().zip(1..) {
                feed(&ahead, 1, index, batch)?;
                feed(&behind, 1, index, batch)?;
            }
            for (batch, index) in old.iter().zip(common.len() as u64 + 1..) {
                feed(&behind, 1, index, batch)?;
            }
            for (batch, index) in new.iter().zip(common.len() as u64 + 1..) {
                feed(&ahead, 2, index, batch)?;
            }
            send(&ahead, &there, &Material::Views(behind.clone()))?;
            install(&behind, &there, "whole")?;
            assert_eq!((behind.digest(), behind.digest_by_scan()?), (ahead.digest(), ahead.digest()));
            // And once more, when all is there.
            let (_, _, done) = send(&ahead, &there, &Material::Views(behind.clone()))?;
            assert!(done.arrived <= ahead.erasures()?.len() as u64, "{done:?}");
            Ok(())
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}
