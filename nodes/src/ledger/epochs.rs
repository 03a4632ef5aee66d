//! Epochs of a shard's ledger: what happens on a replica's disk when another region goes on with it.
//!
//! A shard's log has one numbering of entries from its foundation on. What begins anew with an epoch is who may write it: the epoch's members, and their
//! terms, of which each epoch has 2³² of its own ([`term_of`]), so that a log says of each entry in which epoch it was written ([`epoch_of`]).
//!
//! ```text
//!   replica there:     halt ── no message of an old epoch is taken from now on ── report ─► control group
//!   the one with most: begin ── one more entry behind all that it has: who votes now ──► leads
//!   everybody else:    return ── what the new epoch has not is taken away ──► follows
//! ```
//!
//! A replica that halted takes no message at all until the map says how its epoch begins: then it begins it, or returns, also if it halted too late to be asked. One
//! that halts returns from the epochs that are over first: what they have not must not be taken for part of the one that ends now.
//!
//! Each is done while the replica is closed, between two openings ([`recovery::open`](super::recovery::open)), and may be interrupted anywhere: the fact that
//! names the epoch is written last, and until then the next opening does all of it again.
//!
//! **Return.** What a replica of the old epoch has behind [`End::certain`] is compared with the beginnings of terms that the new epoch recorded there: up to where
//! they agree it has the same entries (a term's entries come from one leader). The rest goes into the [`quarantine`], then the log is cut. Views that
//! had applied more than is left are made anew, from a base that is old enough and the log, not copied from a peer. What lies before `certain` and differs was never
//! applied; the new leader's log replaces it as Raft does.
//!
//! **Epochs that nobody knows.** A control group that lost its majority may have granted epochs of which the survivors never heard; after its recovery the next
//! epoch leaps over them ([`crate::control::recover`]). A replica that was in one is compared with how the last known epoch ended, and only as far as its log was
//! written in known ones: what it has of the others may contradict even what is certain. If its log no longer says how far that is, it starts over.

use super::log_store::{self, decode_entry, encode_entry, position_index};
use super::quarantine::{self, Taken};
use super::recovery::LOG;
use super::types::{Entry, LogId, Types, Vote};
use crate::control::regions::{End, OldDisk};
use crate::error::Error;
use bincode::{Decode, Encode};
use openraft::entry::RaftEntry;
use openraft::vote::RaftLeaderId;
use openraft::{BasicNode, EntryPayload, Membership};
use serde::{Deserialize, Serialize};
use sim::disk::Disk;
use std::collections::BTreeMap;
use std::sync::Arc;
use storage::bases::Bases;
use storage::codec;
use storage::log::{Log, LogError};

/// The first epoch of a cluster.
pub const FIRST_EPOCH: u64 = 1;
/// The fact that names a replica's epoch.
const EPOCH: &str = "epoch";

/// The first term of an epoch.
pub fn term_of(epoch: u64) -> u64 {
    (epoch - 1) << 32
}

/// The epoch of an entry that was written in a term, in a log that was begun in the epoch `first`.
pub fn epoch_of(first: u64, term: u64) -> u64 {
    first.max((term >> 32) + 1)
}

/// An entry's place, and which leader wrote it; ordered as Raft orders logs.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode,
)]
pub struct Place {
    pub term: u64,
    pub node: u64,
    /// The position's index.
    pub index: u64,
}

impl Place {
    pub(super) fn of(entry: &Entry) -> Place {
        Place::at(entry.log_id())
    }

    fn at(id: LogId) -> Place {
        Place { term: id.leader_id.term, node: id.leader_id.node_id, index: position_index(id.index) }
    }

    fn leader(&self) -> (u64, u64) {
        (self.term, self.node)
    }
}

/// What a replica has of an epoch whose end it has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct Report {
    pub last: Option<Place>,
    /// Up to here it had applied.
    pub certain: u64,
    /// The first entry behind that, and each that another leader wrote than the one before it.
    pub runs: Vec<Place>,
}

/// What a replica's disk says of epochs.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Held {
    pub epoch: u64,
    /// The epoch that its log is of: behind `epoch` from its halt until it begins or returns.
    pub of: u64,
    /// The epoch in which its ledger began.
    pub first: u64,
    /// What it had when it halted.
    pub report: Option<Report>,
    /// What returns took away, by epoch.
    pub taken: Vec<(u64, OldDisk)>,
}

impl Held {
    /// It takes no messages.
    pub fn is_halted(&self) -> bool {
        self.of < self.epoch
    }

    pub fn old_disks(&self) -> impl Iterator<Item = (u64, OldDisk)> {
        self.taken.iter().copied()
    }
}

/// How a replica is to be opened.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub epoch: u64,
    /// The epoch in which its ledger begins, if there is nothing on the disk.
    pub first: u64,
    /// How the epochs before ended.
    pub ends: BTreeMap<u64, End>,
    /// The last epoch that the map knows, but for the one that is to be gone over to: those before it that are not in `ends` are unknown to it.
    pub known: u64,
    pub way: Way,
}

#[derive(Clone, Debug, Default)]
pub enum Way {
    /// With what the epoch has; what others have not is taken away.
    #[default]
    Return,
    /// It keeps all that it has, takes no message of an older epoch any more, and waits.
    Halt,
    /// It halted, and was chosen to begin the epoch, with these who vote.
    Begin(BTreeMap<u64, String>),
}

impl Plan {
    /// For a ledger that knows no epochs.
    pub fn first() -> Plan {
        Plan { epoch: FIRST_EPOCH, first: FIRST_EPOCH, known: FIRST_EPOCH, ..Plan::default() }
    }
}

fn failed(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Internal(format!("epoch: {what}: {error}"))
}

/// What the disk says; of one that says nothing, the first epoch.
pub fn held(log: &Log, first: u64) -> Result<Held, Error> {
    match log.get_meta(EPOCH).map_err(|e| failed("fact", e))? {
        Some(bytes) => codec::decode(&bytes).map_err(|e| failed("fact", e)),
        None => Ok(Held { epoch: first, of: first, first, report: None, taken: vec![] }),
    }
}

pub fn keep(log: &Log, held: &Held) -> Result<(), Error> {
    log.put_meta(EPOCH, &codec::encode(held)).map_err(|e| failed("fact", e))
}

pub(super) fn each(log: &Log, from: u64, give: impl FnMut(Entry)) -> Result<(), Error> {
    each_from(log, from.max(log.first_index()), give)
}

/// The first entry at or behind `from` that is still on the disk with all that follow: purged ones stay for a while. One that cannot be read any more is none.
pub(super) fn kept_from(log: &Log, from: u64) -> u64 {
    let (first, kept) = (log.first_index(), from.max(log.kept_from()));
    match kept < first && each_from(log, kept, |_| ()).is_err() {
        true => first,
        false => kept,
    }
}

pub(super) fn each_from(log: &Log, from: u64, mut give: impl FnMut(Entry)) -> Result<(), Error> {
    let end = log.last_index() + 1;
    if from >= end {
        return Ok(());
    }
    log.replay(from..end, &mut |index, bytes| {
        let damaged = |problem| LogError::Corrupt { file: LOG.into(), offset: index, problem };
        give(decode_entry(bytes).map_err(damaged)?);
        Ok::<(), LogError>(())
    })
    .map_err(|e| failed("log", e))
}

/// The last entry that was purged.
fn purged(log: &Log) -> Result<Option<Place>, Error> {
    let purged = log.get_meta(log_store::PURGED).map_err(|e| failed("fact", e))?;
    let purged: Option<LogId> =
        purged.map(|bytes| codec::decode_serde(&bytes)).transpose().map_err(|e| failed("fact", e))?;
    Ok(purged.map(Place::at))
}

/// Views that came with a snapshot can be further than the log that it left ([`super::state_machine`]). What they have was applied, so the log goes on behind that; what it
/// had there itself was never decided.
fn catch_up(log: &Log, applied: LogId) -> Result<(), Error> {
    let (place, mut last) = (Place::at(applied), purged(log)?);
    each(log, log.last_index(), |entry| last = Some(Place::of(&entry)))?;
    if last < Some(place) {
        sim::trace::probe("epoch: views were further than the log");
        let moved = log_store::purge(log, applied).and_then(|()| log.truncate_from(place.index + 1));
        moved.map_err(|e| failed("log", e))?;
    }
    Ok(())
}

/// What a log has, of which `certain` was applied.
pub fn report(log: &Log, certain: u64) -> Result<Report, Error> {
    let (mut last, mut runs): (Option<Place>, Vec<Place>) = (None, vec![]);
    // The last one too if nothing lies behind what was applied.
    each(log, certain.min(log.last_index()), |entry| {
        let place = Place::of(&entry);
        if place.index > certain && runs.last().is_none_or(|run| run.leader() != place.leader()) {
            runs.push(place);
        }
        last = Some(place);
    })?;
    if last.is_none() {
        // All of it is purged: the purge's mark is its last entry.
        last = purged(log)?;
    }
    Ok(Report { last, certain, runs })
}

/// Appends the entry that begins an epoch: these vote from now on.
fn begin(log: &Log, id: u64, epoch: u64, voters: &BTreeMap<u64, String>) -> Result<(), Error> {
    let term = term_of(epoch);
    let mut newest = 0;
    each(log, log.last_index(), |entry| newest = Place::of(&entry).term)?;
    if newest >= term {
        // An earlier attempt was interrupted behind this.
        return Ok(());
    }
    let leader = openraft::alias::LeaderIdOf::<Types>::new(term, id);
    let nodes: BTreeMap<u64, BasicNode> =
        voters.iter().map(|(id, addr)| (*id, BasicNode::new(addr.clone()))).collect();
    let membership =
        Membership::new(vec![voters.keys().copied().collect()], nodes).map_err(|e| failed("members", e))?;
    let id_of_entry = openraft::alias::LogIdOf::<Types>::new(leader.to_committed(), log.last_index());
    let entry = Entry::new(id_of_entry, EntryPayload::Membership(membership));
    // The vote first: an attempt that is interrupted behind the entry is not made again.
    let vote = Vote::new(term, id);
    log.put_meta(log_store::VOTE, &codec::encode_serde(&vote)).map_err(|e| failed("vote", e))?;
    let index = log.last_index() + 1;
    log.append(&[(index, &encode_entry(&entry))]).and_then(|()| log.sync()).map_err(|e| failed("log", e))?;
    Ok(())
}

/// Up to where a log was written in this epoch or before it, as far as it still says so.
fn written_by(log: &Log, epoch: u64) -> Result<u64, Error> {
    let mut written = None;
    each_from(log, kept_from(log, 1), |entry| {
        let place = Place::of(&entry);
        if place.term < term_of(epoch + 1) {
            written = Some(place.index);
        }
    })?;
    Ok(written.unwrap_or(0))
}

/// Up to where a log agrees with what a next epoch has of the one that ended so. `strayed`: it was written on in an epoch that nobody knows.
fn agrees(log: &Log, epoch: u64, end: &End, strayed: bool) -> Result<u64, Error> {
    let mut agreed = end.certain;
    if strayed {
        agreed = agreed.min(written_by(log, epoch)?);
    }
    let mut joins = !sim::planted!("forget-what-was-purged");
    let from = if joins { kept_from(log, agreed + 1) } else { log.first_index().max(agreed + 1) };
    let mut know = |place: Place| {
        agreed = match std::mem::take(&mut joins) && place.index > agreed + 1 {
            true => end.joins(agreed, place),
            false => end.agrees(agreed, place),
        };
    };
    // Of what lies before that only the last one's writer is known.
    if from == log.first_index()
        && let Some(place) = purged(log)?
    {
        know(place);
    }
    each_from(log, from, |entry| know(Place::of(&entry)))?;
    Ok(agreed)
}

/// The epochs that are over and that a replica of `of` has to be brought beyond, and whether it is of one that nobody knows.
fn to_go_over(plan: &Plan, of: u64) -> (u64, bool) {
    let before = plan.ends.range(..of).next_back().map(|(epoch, _)| *epoch);
    match before {
        Some(before) if of < plan.known && !plan.ends.contains_key(&of) => (before, true),
        _ => (of, false),
    }
}

/// Takes away what the epochs before have not that are over.
fn go_over(
    disk: &Arc<dyn Disk>,
    log: &Log,
    bases: &Bases,
    Turned { held, views_max, start_over }: &mut Turned,
    (id, plan): (u64, &Plan),
) -> Result<(), Error> {
    let halted = held.is_halted();
    let (from, strayed) = to_go_over(plan, held.of);
    if strayed {
        sim::trace::probe("epoch: a replica came back from one that nobody knows");
        sim::warn!(
            "this replica is of epoch {}, of which the control group knows nothing any more: what it has beyond epoch {from} is taken away",
            held.of
        );
    }
    // It may have missed several.
    for (epoch, end) in plan.ends.range(from..plan.epoch) {
        let (last, kept) = (log.last_index(), agrees(log, *epoch, end, strayed)?);
        *views_max = (*views_max).min(if strayed { kept } else { kept.max(end.certain) });
        let taken = if last > kept { quarantine::put(disk, log, *epoch, kept)? } else { Taken::default() };
        let Taken { commands, last: lost, written } = taken;
        if last > kept {
            sim::trace::probe("epoch: a returning replica's entries were taken away");
            sim::warn!(
                "entries {} to {last} of epoch {epoch} are not in the next one: {commands} commands go into the quarantine",
                kept + 1
            );
        }
        // One that halted for the epoch that came next followed there: it is no old disk, unless it voted in the one before, or had more.
        // Nor is one that was damaged: it has forgotten what it had.
        let whole = log.repair().map_err(|e| failed("log", e))?.is_none();
        let told = held.taken.iter().any(|(of, _)| of == epoch);
        if !told && whole && (!halted || last > kept || end.voters.contains(&id)) {
            held.taken.push((
                *epoch,
                OldDisk { kept: kept.min(last), last: lost.max(kept.min(last)), commands, written },
            ));
            // Before anything is cut: an attempt that is made again no longer sees it.
            keep(log, held)?;
        }
        *start_over |= log.first_index() > kept + 1;
        if !*start_over {
            log.truncate_from(kept + 1).map_err(|e| failed("log", e))?;
        }
        bases.forget_above(kept).map_err(|e| failed("bases", e))?;
    }
    held.of = plan.ends.range(from..plan.epoch).last().map_or(held.of, |(epoch, _)| epoch + 1);
    Ok(())
}

/// What is left of a closed replica when it has gone over to an epoch.
pub struct Turned {
    pub held: Held,
    /// Views that have applied more must be made anew; bases of more are gone.
    pub views_max: u64,
    /// The log begins behind what is left of it: the replica starts over.
    pub start_over: bool,
}

/// Brings a closed replica's log into an epoch. The caller mends the views, and calls [`keep`] with what this gives back once all is done.
/// `applied`: how far its views are, and the entry there if they say it.
pub fn turn(
    disk: &Arc<dyn Disk>,
    log: &Log,
    bases: &Bases,
    id: u64,
    plan: &Plan,
    applied: impl FnOnce() -> Result<(u64, Option<LogId>), Error>,
) -> Result<Turned, Error> {
    let mut turned = Turned { held: held(log, plan.first)?, views_max: u64::MAX, start_over: false };
    let Held { epoch, of, report: reported, .. } = &turned.held;
    match &plan.way {
        Way::Halt if *epoch < plan.epoch => {
            go_over(disk, log, bases, &mut turned, (id, plan))?;
            // One whose log was damaged, or is gone, has forgotten what others count on.
            let whole = log.repair().map_err(|e| failed("log", e))?.is_none() && !turned.start_over;
            // Of an epoch that nobody knows nothing is certain to those who come back from the one before.
            let known = if turned.held.of > plan.known { written_by(log, plan.known)? } else { u64::MAX };
            turned.held.report = None;
            if whole {
                let (applied, id) = applied()?;
                let certain = applied.min(turned.views_max).min(known);
                if let Some(id) = id.filter(|id| Place::at(*id).index == certain) {
                    catch_up(log, id)?;
                }
                turned.held.report = Some(report(log, certain)?);
            }
            turned.held.epoch = plan.epoch;
            sim::trace::probe("epoch: a replica halted");
        }
        Way::Begin(voters) if *epoch == plan.epoch && turned.held.is_halted() && reported.is_some() => {
            begin(log, id, plan.epoch, voters)?;
            turned.held.of = plan.epoch;
            sim::trace::probe("epoch: begun");
        }
        // Also one that was chosen, and has forgotten what it had.
        Way::Return | Way::Begin(_) if *epoch <= plan.epoch && *of < plan.epoch => {
            go_over(disk, log, bases, &mut turned, (id, plan))?;
            turned.held = Held { epoch: plan.epoch, of: plan.epoch, report: None, ..turned.held };
            sim::trace::probe("epoch: a replica returned");
        }
        _ => {}
    }
    Ok(turned)
}

#[cfg(test)]
mod tests {
    use super::super::types::Data;
    use super::*;
    use sim::disk::simulated::SimDisk;
    use std::collections::BTreeSet;
    use storage::log::LogOptions;
    use storage::model::Batch;

    type Tested = Result<(), Box<dyn std::error::Error>>;

    fn entry(term: u64, node: u64, index: u64) -> Entry {
        let leader = openraft::alias::LeaderIdOf::<Types>::new(term, node).to_committed();
        let id = openraft::alias::LogIdOf::<Types>::new(leader, index - 1);
        Entry::new(id, EntryPayload::Normal(Data(codec::encode(&Batch { commands: vec![] }).into())))
    }

    /// A log whose entries were written by these leaders: (term and node, how many).
    fn log(disk: &Arc<dyn Disk>, leaders: &[(u64, u64)]) -> Result<Log, LogError> {
        let log = Log::open(disk.clone(), LOG, LogOptions::default())?;
        fill(&log, leaders)?;
        Ok(log)
    }

    fn fill(log: &Log, leaders: &[(u64, u64)]) -> Result<(), LogError> {
        for (term, count) in leaders {
            for _ in 0..*count {
                let index = log.last_index() + 1;
                log.append(&[(index, &encode_entry(&entry(*term, *term, index)))])?;
            }
        }
        log.sync().map(drop)
    }

    fn place(term: u64, index: u64) -> Place {
        Place { term, node: term, index }
    }

    fn turned(leaders: &[(u64, u64)], plan: &Plan) -> Result<(Log, Turned), Box<dyn std::error::Error>> {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let (log, bases) = (log(&disk, leaders)?, Bases::open(disk.clone(), "bases")?);
        let turned = turn(&disk, &log, &bases, 7, plan, || Ok((20, None)))?;
        Ok((log, turned))
    }

    #[test]
    fn terms_say_which_epoch_they_are_of() {
        assert_eq!([1, 2, 3].map(term_of), [0, 1 << 32, 2 << 32]);
        assert_eq!(
            [0, 77, (1 << 32) - 1, 1 << 32, (2 << 32) + 5].map(|term| epoch_of(1, term)),
            [1, 1, 1, 2, 3]
        );
        assert_eq!(epoch_of(2, 77), 2, "a ledger that was begun in the second");
    }

    #[test]
    fn who_halts_says_what_it_has_and_where_leaders_changed() -> Tested {
        let plan = Plan { epoch: 2, first: 1, known: 1, way: Way::Halt, ..Plan::default() };
        let (log, halted) = turned(&[(3, 25), (5, 5)], &plan)?;
        let runs = vec![place(3, 21), place(5, 26)];
        let report = Report { last: Some(place(5, 30)), certain: 20, runs };
        assert_eq!(halted.held, Held { epoch: 2, of: 1, first: 1, report: Some(report), taken: vec![] });
        assert_eq!(log.last_index(), 30, "it keeps all");
        // One that has forgotten something says nothing.
        log.start_over()?;
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let bases = Bases::open(disk.clone(), "bases")?;
        assert_eq!(turn(&disk, &log, &bases, 7, &plan, || Ok((0, None)))?.held.report, None);
        Ok(())
    }

    #[test]
    fn what_views_have_beyond_the_log_is_had() -> Tested {
        // A snapshot to 20 came with views at 27; behind 20 the log may hold what a deposed leader wrote.
        for stale in [0, 4, 12] {
            let disk: Arc<dyn Disk> = SimDisk::new(1);
            let (log, bases) = (log(&disk, &[(3, 20)])?, Bases::open(disk.clone(), "bases")?);
            log.put_meta(log_store::PURGED, &codec::encode_serde(&entry(3, 3, 20).log_id()))?;
            log.purge_to(20)?;
            fill(&log, &[(2, stale)])?;
            let halt = Plan { epoch: 2, first: 1, known: 1, way: Way::Halt, ..Plan::default() };
            let applied = entry(3, 3, 27).log_id();
            let held = turn(&disk, &log, &bases, 7, &halt, || Ok((27, Some(applied))))?.held;
            let report = Report { last: Some(place(3, 27)), certain: 27, runs: vec![] };
            assert_eq!((held.report.as_ref(), log.last_index()), (Some(&report), 27), "{stale}");
            keep(&log, &held)?;
            let way = Way::Begin(BTreeMap::from([(7, "a:1".to_string())]));
            let plan = Plan { epoch: 2, first: 1, way, ..Plan::default() };
            turn(&disk, &log, &bases, 7, &plan, || Ok((27, Some(applied))))?;
            assert_eq!((log.first_index(), log.last_index()), (28, 28), "it goes on behind what was applied");
        }
        // A log that is further keeps what it has.
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let (log, bases) = (log(&disk, &[(3, 20)])?, Bases::open(disk.clone(), "bases")?);
        let halt = Plan { epoch: 2, first: 1, known: 1, way: Way::Halt, ..Plan::default() };
        let applied = entry(3, 3, 15).log_id();
        turn(&disk, &log, &bases, 7, &halt, || Ok((15, Some(applied))))?;
        assert_eq!((log.first_index(), log.last_index()), (1, 20));
        Ok(())
    }

    #[test]
    fn who_begins_says_once_who_votes_and_in_the_epochs_own_term() -> Tested {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let (log, bases) = (log(&disk, &[(3, 9)])?, Bases::open(disk.clone(), "bases")?);
        let voters = BTreeMap::from([(7, "a:1".to_string()), (8, "b:1".to_string())]);
        let halt = Plan { epoch: 2, first: 1, known: 1, way: Way::Halt, ..Plan::default() };
        keep(&log, &turn(&disk, &log, &bases, 7, &halt, || Ok((9, None)))?.held)?;
        let plan = Plan { epoch: 2, first: 1, way: Way::Begin(voters), ..Plan::default() };
        for _ in 0..2 {
            // The second time as after a crash before the end.
            assert_eq!(turn(&disk, &log, &bases, 7, &plan, || Ok((9, None)))?.held.of, 2);
            assert_eq!(log.last_index(), 10);
        }
        let mut last = None;
        each(&log, 10, |entry| last = Some(entry))?;
        let last = last.ok_or("no entry")?;
        assert_eq!(Place::of(&last), Place { term: term_of(2), node: 7, index: 10 });
        let EntryPayload::Membership(members) = last.payload else { return Err("no members".into()) };
        assert_eq!(members.voter_ids().collect::<Vec<_>>(), [7, 8]);
        Ok(())
    }

    #[test]
    fn who_returns_gives_back_what_the_next_epoch_has_not() -> Tested {
        // The next epoch goes on with 30 entries: to 25 of term 3, then of term 5.
        let runs = vec![place(3, 21), place(5, 26)];
        let end = End {
            certain: 20,
            last: 30,
            ceiling: 99,
            began: 0,
            runs,
            voters: BTreeSet::new(),
            old_disks: BTreeMap::new(),
        };
        let plan = Plan { epoch: 2, first: 1, ends: BTreeMap::from([(1, end)]), known: 2, way: Way::Return };
        for (leaders, kept, last) in [
            (vec![(3, 25), (5, 5)], 30, 30),
            (vec![(3, 25), (5, 9)], 30, 34),
            // Another leader's entries stood where those of term 5 are now.
            (vec![(3, 25), (4, 7)], 25, 32),
            (vec![(3, 23), (4, 1)], 23, 24),
            (vec![(2, 24)], 20, 24),
            (vec![(3, 12)], 12, 12),
        ] {
            let disk: Arc<dyn Disk> = SimDisk::new(1);
            let (log, bases) = (log(&disk, &leaders)?, Bases::open(disk.clone(), "bases")?);
            for _ in 0..2 {
                // The second time as after a crash before the end.
                let returned = turn(&disk, &log, &bases, 7, &plan, || Ok((20, None)))?;
                assert_eq!(log.last_index(), kept, "{leaders:?}");
                assert_eq!(
                    returned.held.taken,
                    [(1, OldDisk { kept, last, ..OldDisk::default() })],
                    "{leaders:?}"
                );
                assert_eq!((returned.views_max, returned.start_over), (kept.max(20), false), "{leaders:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn who_was_in_an_epoch_that_nobody_knows_keeps_what_was_written_before_it() -> Tested {
        // The next epoch goes on with 30 entries of the first, of which 20 are certain; the second was never heard of.
        let runs = vec![place(3, 21)];
        let end = End { certain: 20, last: 30, ceiling: u64::MAX, runs, ..End::default() };
        let ends = BTreeMap::from([(1, end)]);
        let plan = Plan { epoch: 1001, first: 1, ends, known: 1001, way: Way::Return };
        let stray = term_of(2) + 1;
        for (leaders, kept) in [
            (vec![(3, 25), (stray, 9)], 25),
            (vec![(3, 30), (stray, 9)], 30),
            // It went on from less than what is certain now: what it has in that place is something else.
            (vec![(3, 12), (stray, 15)], 12),
            (vec![(stray, 15)], 0),
        ] {
            let disk: Arc<dyn Disk> = SimDisk::new(1);
            let (log, bases) = (log(&disk, &leaders)?, Bases::open(disk.clone(), "bases")?);
            let last = log.last_index();
            keep(&log, &Held { epoch: 2, of: 2, first: 1, report: None, taken: vec![] })?;
            for _ in 0..2 {
                let returned = turn(&disk, &log, &bases, 7, &plan, || Ok((last, None)))?;
                assert_eq!((log.last_index(), returned.views_max), (kept, kept), "{leaders:?}");
                assert_eq!(
                    returned.held.taken,
                    [(1, OldDisk { kept, last, ..OldDisk::default() })],
                    "{leaders:?}"
                );
                assert_eq!((returned.held.of, returned.start_over), (1001, false), "{leaders:?}");
            }
        }
        // One that does not know any more how far it was written in epochs that are known starts over.
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let (log, bases) = (log(&disk, &[(3, 12), (stray, 15)])?, Bases::open(disk.clone(), "bases")?);
        keep(&log, &Held { epoch: 2, of: 2, first: 1, report: None, taken: vec![] })?;
        log.purge_to(14)?;
        assert!(turn(&disk, &log, &bases, 7, &plan, || Ok((20, None)))?.start_over);
        Ok(())
    }

    #[test]
    fn what_an_epoch_wrote_that_nobody_knows_is_not_certain_to_others() -> Tested {
        let stray = term_of(2) + 1;
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let (log, bases) = (log(&disk, &[(3, 12), (stray, 15)])?, Bases::open(disk.clone(), "bases")?);
        keep(&log, &Held { epoch: 2, of: 2, first: 1, report: None, taken: vec![] })?;
        let plan = Plan { epoch: 1001, first: 1, known: 1, way: Way::Halt, ..Plan::default() };
        let report =
            turn(&disk, &log, &bases, 7, &plan, || Ok((27, None)))?.held.report.ok_or("no report")?;
        assert_eq!((report.certain, report.last), (12, Some(Place { term: stray, node: stray, index: 27 })));
        assert_eq!(report.runs, [Place { term: stray, node: stray, index: 13 }]);
        // Those of the same epoch, and those of the one before, agree with that as far as they have the same.
        let end = End { certain: 12, last: 27, runs: report.runs, ..End::default() };
        let ends = BTreeMap::from([(1, end)]);
        let plan = Plan { epoch: 1001, first: 1, ends, known: 1001, way: Way::Return };
        for (of, leaders, kept) in
            [(2, vec![(3, 12), (stray, 11)], 23), (2, vec![(3, 10), (stray, 11)], 10), (1, vec![(3, 19)], 12)]
        {
            let disk: Arc<dyn Disk> = SimDisk::new(1);
            let (log, bases) = (self::log(&disk, &leaders)?, Bases::open(disk.clone(), "bases")?);
            keep(&log, &Held { epoch: of, of, first: 1, report: None, taken: vec![] })?;
            turn(&disk, &log, &bases, 7, &plan, || Ok((5, None)))?;
            assert_eq!(log.last_index(), kept, "{leaders:?}");
        }
        Ok(())
    }

    #[test]
    fn who_has_purged_what_is_left_starts_over() -> Tested {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let (log, bases) = (log(&disk, &[(3, 40)])?, Bases::open(disk.clone(), "bases")?);
        log.purge_to(30)?;
        let end = End { certain: 20, last: 22, runs: vec![place(3, 21)], ..End::default() };
        let plan = Plan { epoch: 2, first: 1, ends: BTreeMap::from([(1, end)]), known: 2, way: Way::Return };
        let turned = turn(&disk, &log, &bases, 7, &plan, || Ok((20, None)))?;
        assert!(turned.start_over);
        // It still knows what it gives up, since what was purged is still there.
        assert_eq!(turned.held.taken, [(1, OldDisk { kept: 22, last: 40, ..OldDisk::default() })]);
        Ok(())
    }

    #[test]
    fn who_has_even_let_go_of_what_is_left_goes_by_who_wrote_the_rest() -> Tested {
        let end = End { certain: 20, last: 22, runs: vec![place(3, 21)], ..End::default() };
        let plan = Plan { epoch: 2, first: 1, ends: BTreeMap::from([(1, end)]), known: 2, way: Way::Return };
        for (leaders, kept) in [
            (vec![(3, 40)], 22),
            // Another leader came: nobody can say any more what stood there.
            (vec![(3, 25), (5, 15)], 20),
        ] {
            let disk: Arc<dyn Disk> = SimDisk::new(1);
            let small = LogOptions { segment_bytes_max: 200, ..LogOptions::default() };
            let log = Log::open(disk.clone(), LOG, small)?;
            fill(&log, &leaders)?;
            let last = Place { term: if leaders.len() > 1 { 5 } else { 3 }, ..place(3, 30) };
            let leader = openraft::alias::LeaderIdOf::<Types>::new(last.term, last.term).to_committed();
            let id = openraft::alias::LogIdOf::<Types>::new(leader, last.index - 1);
            log.put_meta(log_store::PURGED, &codec::encode_serde(&id))?;
            log.purge_to(30)?;
            log.release_to(30)?;
            assert!(log.kept_from() > 23, "{}", log.kept_from());
            let bases = Bases::open(disk.clone(), "bases")?;
            let turned = turn(&disk, &log, &bases, 7, &plan, || Ok((20, None)))?;
            assert_eq!(turned.held.taken, [(1, OldDisk { kept, last: 40, ..OldDisk::default() })]);
        }
        Ok(())
    }
}
