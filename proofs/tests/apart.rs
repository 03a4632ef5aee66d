//! Replicas that keep different views of one ledger: what any of them answers is what one says that keeps all, they decide every command
//! alike and hold the same logical state, whatever becomes of them on the way.

use proofs::{ledger, meta, options};
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::sync::Arc;
use storage::graph::Walk;
use storage::model::*;
use storage::{Entry, Hit, SearchQuery, Shard, ShardOptions, StorageError};

/// Whether a replica keeps words, and vectors.
const KEPT: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];
const WORDS: [&str; 4] = ["step", "way", "changed", "long 7"];

fn kept((words, vectors): (bool, bool)) -> ShardOptions {
    let mut options = options();
    (options.words, options.vectors.kept) = (words, vectors);
    options
}

fn query(text: &str) -> SearchQuery {
    SearchQuery {
        text: text.into(),
        k: 20,
        with_vector: true,
        ..proofs::search(vec![proofs::memory(0, String::new()).owner()], vec![0.6, 0.8])
    }
}

fn told(hits: Vec<Hit>) -> Vec<(MemoryId, u64, String, f32, f32, Vec<f32>)> {
    let one = |hit: Hit| {
        let memory = Memory::clone(&hit.memory);
        (memory.id, memory.version, memory.text, hit.similarity, hit.keywords, memory.vector)
    };
    let mut told: Vec<_> = hits.into_iter().map(one).collect();
    told.sort_by_key(|hit| hit.0);
    told
}

/// Compares what a replica says with what one says that keeps all.
fn compare(all: &Shard, one: &Shard, (words, vectors): (bool, bool)) -> Result<(), StorageError> {
    assert_eq!(one.digest(), all.digest());
    if words {
        for text in WORDS {
            let of_words = told(one.by_words(&query(text))?);
            assert_eq!(of_words, told(all.by_words(&query(text))?), "{text}");
            // A search that asks for both says the same of those that words find.
            let both = told(all.search(&query(text))?);
            assert!(
                of_words.iter().all(|hit| both.contains(hit)),
                "{text}: {of_words:?} are not all in {both:?}"
            );
        }
    }
    if vectors {
        assert_eq!(told(one.search(&query(""))?), told(all.search(&query(""))?));
    }
    let walk = |shard: &Shard| {
        let start = (0..9).map(|id| [id; 16]).collect();
        let (tenant, relations) = ("t".into(), vec![]);
        let walk = Walk {
            tenant,
            start,
            relations,
            hops: 3,
            fan_out: 5,
            inbound: false,
            as_of: 0,
            now: 0,
            include_archived: true,
        };
        shard.walk(&walk)
    };
    assert_eq!(walk(one)?, walk(all)?);
    Ok(())
}

#[test]
fn replicas_apart_answer_and_decide_as_one_that_keeps_all() -> Result<(), StorageError> {
    let disks: Vec<Arc<SimDisk>> = (1..=4).map(SimDisk::new).collect();
    let open = |at: usize| Shard::open(disks[at].clone(), "views", kept(KEPT[at]));
    let mut replicas = (0..4).map(open).collect::<Result<Vec<_>, _>>()?;
    let mut hits = 0;
    for (batch, index) in ledger(120).iter().zip(1..) {
        let mut outcomes = vec![];
        for (at, replica) in replicas.iter().enumerate() {
            let entry = Entry { epoch: 1, index, batch: Some(batch) };
            outcomes.push(replica.apply(&[entry], &meta(index))?);
            if (index as usize + at).is_multiple_of(7) {
                replica.seal()?;
                while replica.merge()? {}
            }
        }
        assert!(outcomes.windows(2).all(|w| w[0] == w[1]), "entry {index} was decided differently");
        for (replica, kept) in replicas.iter().zip(KEPT) {
            compare(&replicas[0], replica, kept)?;
        }
        hits += replicas[0].by_words(&query("step"))?.len();
        if index % 30 == 0 {
            for at in 0..4 {
                replicas[at].checkpoint()?;
                replicas[at].verify()?;
                // One loses its power, the next takes the state of another.
                if at as u64 == index / 30 % 4 {
                    // Nothing of the old one is left.
                    replicas[at] = Shard::open(SimDisk::new(9), "views", kept(KEPT[at]))?;
                    disks[at].power_off();
                    disks[at].power_on();
                    replicas[at] = open(at)?;
                } else {
                    let mut frames = vec![];
                    replicas[(at + 1) % 4].export(&mut |frame| {
                        frames.push(frame.to_vec());
                        Ok(())
                    })?;
                    let mut frames = frames.into_iter();
                    replicas[at].import(&mut || Ok(frames.next()))?;
                }
                replicas[at].verify()?;
            }
        }
    }
    assert!(hits > 200, "only {hits} were found: that compares nothing");
    Ok(())
}

#[test]
fn a_replica_that_is_to_keep_something_else_makes_that_anew() -> Result<(), StorageError> {
    let disk: Arc<dyn Disk> = SimDisk::new(1);
    let apply = |shard: &Shard| {
        let entries = ledger(60);
        entries.iter().zip(1..).try_for_each(|(batch, index)| proofs::apply(shard, index, batch))
    };
    let all = Shard::open(SimDisk::new(2), "views", kept((true, true)))?;
    apply(&all)?;
    let without = Shard::open(disk.clone(), "views", kept((true, false)))?;
    apply(&without)?;
    without.checkpoint()?;
    drop(without);
    // Vectors are made from the records there and then.
    let with = Shard::open(disk.clone(), "views", kept((true, true)))?;
    compare(&all, &with, (true, true))?;
    with.verify()?;
    with.seal()?;
    drop(with);
    let without = Shard::open(disk.clone(), "views", kept((true, false)))?;
    without.verify()?;
    drop(without);
    // Words are not: the views are refused, and made anew from a base and the log.
    let refused = Shard::open(disk.clone(), "views", kept((false, true)));
    assert!(matches!(refused, Err(StorageError::Damaged { .. })));
    let anew = Shard::open_anew(disk.clone(), "views", kept((false, true)))?;
    apply(&anew)?;
    anew.acquit()?;
    drop(anew);
    let again = Shard::open(disk.clone(), "views", kept((false, true)))?;
    compare(&all, &again, (false, true))?;
    drop(again);
    assert!(matches!(Shard::open(disk, "views", kept((true, true))), Err(StorageError::Damaged { .. })));
    Ok(())
}
