//! Power is lost at every single operation of a workload over the log, the views (their vectors' buffer, seals, merges and manifest among
//! them; and a slot that leaves, is removed, and comes back from another shard) and the bases, and again while they recover.
//!
//! After each: the log has everything that was synced, the views stand at a position no older than their last checkpoint and hold exactly
//! the logical state of that position, SQLite's structures are sound, every base gives back the state of its position, and what
//! the log still has brings the views to its end. The disk decides by its seed how harsh each loss is: everything unsynced, nothing, a
//! random part, torn sectors, or a tail. Disks that lie about syncs must be caught.

use proofs::{apply, command, digests, ledger, open};
use sim::disk::Disk;
use sim::disk::simulated::{DiskFaults, SimDisk};
use std::sync::{Arc, Mutex};
use storage::bases::Bases;
use storage::log::{Log, LogError, LogOptions};
use storage::model::{Batch, Month, MoveStep, Operation};
use storage::slots::{Ranges, SlotSet};
use storage::{Shard, StorageError, codec};

const ENTRIES: u64 = 26;

type Failure = Box<dyn std::error::Error>;

fn log(disk: &Arc<dyn Disk>) -> Result<Log, LogError> {
    Log::open(disk.clone(), "log", LogOptions { segment_bytes_max: 3000, cache_bytes_max: 500 })
}

/// A ledger whose only slot leaves at its end, is removed, and comes back; a tenant with slots of its own stays.
fn entries() -> Result<Vec<Batch>, StorageError> {
    let mut entries = ledger(ENTRIES);
    let slots: SlotSet = [proofs::memory(0, String::new()).slot()].into_iter().collect();
    let slots = slots.with("pinned", Ranges::default());
    let source = open(&(SimDisk::new(2) as Arc<dyn Disk>), "source")?;
    for (batch, index) in entries.iter().zip(1..) {
        apply(&source, index, batch)?;
    }
    let step = |step| Batch { commands: vec![command(String::new(), Operation::Move(step))] };
    let seal = step(MoveStep::Seal { id: 1, slots: slots.clone() });
    apply(&source, ENTRIES + 1, &seal)?;
    let rows = source.digest_by_scan()?;
    entries.extend([seal, step(MoveStep::Release { id: 1 })]);
    let (mut imports, mut cursor, mut pieces, mut hash) = (vec![], vec![], 0, 0u128);
    for sequence in 0.. {
        let part = source.leaving(1, &cursor, 2200)?;
        cursor.clone_from(&part.cursor);
        pieces += part.pieces.len() as u64;
        hash = hash.wrapping_add(part.hash);
        let (slots, cursor) = (slots.clone(), cursor.clone());
        imports.push(step(MoveStep::Import { id: 2, slots, sequence, pieces: part.pieces, cursor }));
        if part.end {
            break;
        }
    }
    entries.extend((0..4).map(|_| step(MoveStep::Drop { id: 1, rows_max: pieces as u32 / 3 })));
    assert!(imports.len() > 2 && rows == source.digest());
    entries.extend(imports);
    entries.push(step(MoveStep::Adopt { id: 2, slots, pieces, hash }));
    // And life goes on.
    entries.extend(ledger(2));
    // At the 40th the workload's checkpoint would be the log's end, and purging to that keeps nothing for the older base.
    assert!(entries.len() < 40, "{} entries", entries.len());
    Ok(entries)
}

/// What the workload was promised.
#[derive(Default, Debug)]
struct Told {
    synced: u64,
    checkpoint: u64,
}

fn work(disk: &Arc<dyn Disk>, entries: &[Batch], told: &mut Told) -> Result<(), Failure> {
    let log = log(disk)?;
    let bases = Bases::open(disk.clone(), "bases")?;
    let views = open(disk, "views")?;
    for (batch, index) in entries.iter().zip(1..) {
        log.append(&[(index, &codec::encode(batch))])?;
        if index % 2 == 0 {
            told.synced = log.sync()?;
        }
        // Applied before it is synced here, as on a replica whose peers have it.
        apply(&views, index, batch)?;
        // The vectors' buffer, now and then, becomes segments, and those become one.
        if index % 3 == 0 {
            views.seal()?;
        }
        if index % 4 == 0 {
            while views.merge()? {}
        }
        // And then nothing but product codes.
        if index % 7 == 0 {
            while views.compress(Month(i32::MAX))? {}
        }
        if index % 5 == 0 {
            told.checkpoint = views.checkpoint()?.index;
        }
        if index % 8 == 0 {
            bases.write(&views)?;
            log.purge_to(told.checkpoint)?;
            if let Some(oldest) = bases.held().last() {
                log.release_to(oldest.index)?;
            }
        }
        if index % 7 == 0 {
            log.settle()?;
        }
    }
    told.checkpoint = views.checkpoint()?.index;
    Ok(())
}

/// Applies what the log has behind the views, up to `to`.
fn replay(log: &Log, views: &Shard, to: u64) -> Result<(), Failure> {
    let from = views.applied().0.index + 1;
    log.replay(from..to + 1, &mut |index, bytes| -> Result<(), Failure> {
        Ok(apply(views, index, &codec::decode(bytes)?)?)
    })
}

fn check(
    disk: &Arc<dyn Disk>,
    entries: &[Batch],
    digests: &[[u8; 16]],
    told: &Told,
    deep: bool,
) -> Result<(), Failure> {
    let log = log(disk)?;
    let (first, last) = (log.first_index(), log.last_index());
    if last < told.synced {
        return Err(format!("the log ends at {last}, {} was synced", told.synced).into());
    }
    for (index, bytes) in log.read(first..last + 1, usize::MAX)? {
        if *bytes != codec::encode(&entries[index as usize - 1]) {
            return Err(format!("entry {index} of the log is another one").into());
        }
    }
    let bases = Bases::open(disk.clone(), "bases")?;
    let views = open(disk, "views")?;
    let at = views.applied().0.index;
    if at < told.checkpoint || at + 1 < first {
        return Err(format!("the views are at {at}: checkpoint {}, log from {first}", told.checkpoint).into());
    }
    let exact = |views: &Shard| match views.digest() {
        (position, digest) if digest == digests[position.index as usize] => Ok(()),
        (position, _) => Err(format!("the state at {} is none of the history's", position.index)),
    };
    exact(&views)?;
    views.verify()?;
    if at < last {
        replay(&log, &views, last)?;
        exact(&views)?;
    }
    if deep {
        for base in bases.held() {
            let copy = open(disk, "copy")?;
            bases.restore(&base, &copy)?;
            exact(&copy)?;
            if last > base.index {
                replay(&log, &copy, last)?;
                exact(&copy)?;
            }
            copy.verify()?;
        }
    }
    Ok(())
}

/// The number of crash points survived, or the first that was not.
fn crash_everywhere(modes: u64, step: usize, faults: DiskFaults) -> Result<u64, Failure> {
    let entries = entries()?;
    let digests = digests(&entries, SimDisk::new(1))?;
    let mut points = 0;
    for mode in 0..modes {
        for op in (1..).step_by(step) {
            sim::disk::sqlite::begin_run(mode);
            let sim = SimDisk::new(mode * 100_000 + op);
            let disk: Arc<dyn Disk> = sim.clone();
            let lose_power = || {
                sim.power_off();
                sim.power_on();
            };
            sim.set_faults(faults);
            sim.crash_at_op(op);
            let mut told = Told::default();
            let finished = work(&disk, &entries, &mut told).is_ok();
            lose_power();
            // And again while it recovers.
            sim.crash_at_op(1 + (op * 7 + mode) % 60);
            let _recovering = check(&disk, &entries, &digests, &told, false);
            lose_power();
            points += 2;
            let deep = op % 5 == 0;
            check(&disk, &entries, &digests, &told, deep)
                .map_err(|e| format!("mode {mode}, power lost at operation {op} ({told:?}): {e}"))?;
            if finished {
                break;
            }
        }
    }
    Ok(points)
}

/// Rare paths are counted for the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn nothing_that_was_promised_is_lost_to_a_power_loss_at_any_operation() -> Result<(), Failure> {
    let _alone = ONE_AT_A_TIME.lock();
    // What an honest disk never makes necessary: else the order of seals, merges and checkpoints is wrong.
    let mended = || {
        let paths =
            ["a month was counted wrongly", "a month made anew", "a month healed", "manifest unreadable"];
        let probes = sim::trace::probes();
        paths.map(|path| probes.get(&*format!("vectors: {path}")).copied().unwrap_or(0))
    };
    let before = mended();
    let points = crash_everywhere(4, 1, DiskFaults::default())?;
    assert_eq!(mended(), before);
    println!("crash points: {points}");
    assert!(points > 4000, "only {points}: the workload shrank");
    Ok(())
}

#[test]
fn a_disk_that_lies_about_its_syncs_is_caught() {
    let _alone = ONE_AT_A_TIME.lock();
    let lies = DiskFaults { syncs_lie: true, ..DiskFaults::default() };
    let caught = crash_everywhere(1, 1, lies).expect_err("no lie was found out");
    println!("caught: {caught}");
}

/// The views' database without its syncs: the log's and the bases' are done.
#[test]
fn a_checkpoint_that_does_not_sync_is_caught() -> Result<(), StorageError> {
    let _alone = ONE_AT_A_TIME.lock();
    let entries = entries()?;
    let mut caught = 0;
    for seed in 0..20 {
        let sim = SimDisk::new(seed);
        let disk: Arc<dyn Disk> = sim.clone();
        let views = open(&disk, "views")?;
        for (batch, index) in entries.iter().zip(1..) {
            apply(&views, index, batch)?;
        }
        sim.set_faults(DiskFaults { syncs_lie: true, ..DiskFaults::default() });
        let promised = views.checkpoint()?.index;
        sim.set_faults(DiskFaults::default());
        sim.power_off();
        drop(views);
        sim.power_on();
        let kept = open(&disk, "views").map(|views| views.applied().0.index);
        caught += !kept.is_ok_and(|kept| kept >= promised) as u64;
    }
    assert!(caught > 0, "20 power losses took nothing from a checkpoint without a sync");
    Ok(())
}
