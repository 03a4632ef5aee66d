//! What a replica's disk goes through when another region takes over: the real `epochs::turn`, on a real log.

use nodes::control::regions::{End, OldDisk};
use nodes::ledger::epochs::{Held, Place, Plan, Turned, Way, held, keep, term_of, turn};
use nodes::ledger::log_store::encode_entry;
use nodes::ledger::types::{Data, Entry, Types};
use openraft::EntryPayload;
use openraft::alias::{LeaderIdOf, LogIdOf};
use openraft::entry::RaftEntry;
use openraft::vote::RaftLeaderId;
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::collections::BTreeMap;
use std::sync::Arc;
use storage::bases::Bases;
use storage::codec;
use storage::log::{Log, LogOptions};
use storage::model::Batch;

/// The node that led, and another one.
const LED: u64 = 1;
const HERE: u64 = 2;

fn id(term: u64, index: u64) -> LogIdOf<Types> {
    LogIdOf::<Types>::new(LeaderIdOf::<Types>::new(term, LED).to_committed(), index.saturating_sub(1))
}

struct Replica {
    disk: Arc<dyn Disk>,
    log: Log,
    bases: Bases,
    applied: u64,
}

impl Replica {
    /// One of the first epoch with so many entries, of which some were applied.
    fn new(length: u64, applied: u64) -> Replica {
        let disk: Arc<dyn Disk> = SimDisk::new(7);
        let opened =
            (Log::open(disk.clone(), "ledger", LogOptions::default()), Bases::open(disk.clone(), "bases"));
        let (Ok(log), Ok(bases)) = opened else { panic!("a new disk") };
        let replica = Replica { disk, log, bases, applied };
        (1..=length).for_each(|index| replica.append(1, index));
        replica
    }

    fn append(&self, term: u64, index: u64) {
        let data = Data(codec::encode(&Batch { commands: vec![] }).into());
        let entry = Entry::new(id(term, index), EntryPayload::Normal(data));
        let appended = self.log.append(&[(index, &encode_entry(&entry))]).and_then(|()| self.log.sync());
        assert!(appended.is_ok());
    }

    fn turns(&self, epoch: u64, ends: &BTreeMap<u64, End>, way: Way) -> Held {
        let plan =
            Plan { epoch, first: 1, ends: ends.clone(), known: epoch - matches!(way, Way::Halt) as u64, way };
        let turned = turn(&self.disk, &self.log, &self.bases, HERE, &plan, || {
            Ok((self.applied, Some(id(1, self.applied))))
        });
        let Ok(Turned { held, start_over: false, .. }) = turned else { panic!("did not turn") };
        assert!(keep(&self.log, &held).is_ok());
        held
    }

    fn begins(&self, epoch: u64, ends: &BTreeMap<u64, End>) -> Held {
        self.turns(epoch, ends, Way::Begin([(HERE, "here".to_string())].into()))
    }
}

/// The first epoch ended after its first entry.
fn ended_at_1() -> BTreeMap<u64, End> {
    [(1, End { certain: 1, last: 1, ceiling: 10, ..End::default() })].into()
}

#[test]
fn what_an_epoch_lost_is_not_reported_as_part_of_the_next_one() {
    let replica = Replica::new(3, 3);
    let halted = replica.turns(3, &ended_at_1(), Way::Halt);
    let Some(report) = &halted.report else { panic!("no report") };
    let last = Place { term: 1, node: LED, index: 1 };
    assert_eq!((report.last, report.certain), (Some(last), 1));
    assert!(halted.is_halted());
    let old = OldDisk { kept: 1, last: 3, ..OldDisk::default() };
    assert_eq!(halted.taken, vec![(1, old)], "it is an old disk of the first epoch");
}

#[test]
fn a_replica_that_halts_too_late_gives_up_what_the_epoch_has_not() {
    let replica = Replica::new(3, 3);
    let halted = replica.turns(2, &BTreeMap::new(), Way::Halt);
    assert_eq!(halted.report.as_ref().map(|report| report.certain), Some(3));
    let returned = replica.turns(2, &ended_at_1(), Way::Return);
    assert_eq!((replica.log.last_index(), returned.is_halted()), (1, false));
    // Once it follows, nothing more is taken away.
    replica.append(term_of(2), 2);
    assert_eq!((replica.turns(2, &ended_at_1(), Way::Return), replica.log.last_index()), (returned, 2));
}

#[test]
fn who_was_chosen_begins_an_epoch_once() {
    let replica = Replica::new(1, 1);
    replica.turns(2, &BTreeMap::new(), Way::Halt);
    let begun = replica.begins(2, &ended_at_1());
    assert_eq!((replica.log.last_index(), begun.is_halted()), (2, false));
    assert_eq!((replica.begins(2, &ended_at_1()), replica.log.last_index()), (begun, 2));
}

#[test]
fn who_was_chosen_and_lost_its_disk_begins_nothing() {
    let replica = Replica::new(0, 0);
    assert_eq!(held(&replica.log, 1).map(|held| held.epoch).ok(), Some(1));
    let returned = replica.begins(2, &ended_at_1());
    assert_eq!((replica.log.last_index(), returned.epoch, returned.is_halted()), (0, 2, false));
}
