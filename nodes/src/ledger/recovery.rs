//! Opening a replica, whatever its disk has become.
//!
//! | what is found | what is done |
//! |---|---|
//! | a torn tail of the log, views that are behind | nothing was lost: the log is cut, and gives the views the rest |
//! | one of a fact's two copies is damaged | healed from the other ([`storage::facts`]) |
//! | views that are damaged, or behind the purged log | made anew from a base and the log ([`storage::bases`]); a damaged base is passed over |
//! | views that no base and log can make | the replica starts over, as below, and a peer sends a snapshot; what sound views have of it already is not sent ([`storage::delta`]) |
//! | a log that is damaged though it was durable | cut there; this replica *does not vote* until it has everything back |
//! | nothing, though the group is not new | the same, and it follows a leader only when others vouch for it ([`trust`](super::trust)) |
//! | an epoch that is over | what the next one has not is taken away ([`epochs`](super::epochs)) |
//! | both copies of a fact are damaged | an error that names the file |
//!
//! **Why it must not vote.** It acknowledged entries that it no longer has. Were it to vote, a candidate without them could win. A leader
//! that a majority of the *others* elected has every committed entry, since each of those was stored by one of that
//! majority, and none of them has forgotten anything. So the replica asks such a leader, confirmed by its quorum after
//! this replica's start, for a read position, follows until its log reaches that far, and only then votes again.
//! A replica without peers cannot: it stops, with an error that says what is damaged.
//!
//! **An empty disk** is that of a new group, or of a replica that has lost everything. The cluster map tells which; the control group's own replica
//! asks the others when it starts, and if none of them answers it takes the group for new. The first message of one that has applied what a new group
//! does not have tells it better ([`Ledger::learns_its_age`]), or the first answer that names a later vote of its own ([`trust`](super::trust::Past)): from
//! then on it is a replica with a damaged log. Only if all that it meets is as new
//! as itself does it not learn of it: `rejoin` in the file of a machine that takes another one's place says it at once.
//!
//! **A replica that comes back to a group** that it has left is empty too: its files went when it left. One of the group that has not heard of its leaving
//! still asks for its vote. It votes for nobody before it is filled ([`Ledger::fill`]).

use super::Ledger;
use super::epochs::{self, FIRST_EPOCH, Held, Plan};
use super::log_store::{self, position_index};
use super::state_machine::{applied_meta, apply_entries, decode_batch};
use super::trust::TERM_LOST;
use crate::error::Error;
use crate::groups::name_of;
use openraft::async_runtime::WatchReceiver;
use openraft::entry::RaftEntry;
use sim::disk::Disk;
use sim::time::{Duration, Instant};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use storage::bases::Bases;
use storage::delta;
use storage::log::{Log, LogError, LogOptions};
use storage::{Shard, ShardOptions, StorageError};

/// The directories of a replica's data.
pub const LOG: &str = "ledger";
pub const VIEWS: &str = "views";
pub const BASES: &str = "bases";
/// Views that could not be used, though they were sound, until a snapshot is completed with them ([`storage::delta`]).
pub const ASIDE: &str = "aside";

/// All members of a new group begin with this entry: who they are.
pub const FOUNDED: u64 = 1;

/// The fact that a replica once had all that its group had.
pub const FILLED: &str = "filled";

/// Entries replayed in one transaction.
const REPLAY_ENTRIES: usize = 256;

/// The probe of a bug: rows that are sound and cannot be. No disk does that.
pub const CONTRADICTION: &str = "views: contradict themselves";

/// Whether views must be made anew after this error.
pub fn is_fatal_to_views(error: &StorageError) -> bool {
    matches!(error, StorageError::Damaged { .. } | StorageError::Corrupt { .. })
}

/// What a replica has on its disk.
pub struct Opened {
    pub log: Arc<Log>,
    pub shard: Arc<Shard>,
    pub bases: Arc<Bases>,
    /// Its epoch, and what it has of those before.
    pub held: Held,
}

/// Writes bases, and lets go of the log that none of them needs.
#[derive(Clone)]
pub struct Keeper {
    pub disk: Arc<dyn Disk>,
    pub log: Arc<Log>,
    pub bases: Arc<Bases>,
    /// A base is worth its cost only for this many bytes of log, at least.
    pub base_bytes_min: u64,
}

impl Keeper {
    /// Called after a checkpoint.
    pub fn keep(&self, shard: &Shard) -> Result<(), StorageError> {
        if shard.applied_index() > 0 {
            delta::discard(&*self.disk, ASIDE)?;
        }
        let newest = self.bases.held().into_iter().next();
        let due =
            newest.is_none_or(|base| self.log.bytes_after(base.index) > base.bytes.max(self.base_bytes_min));
        if due && shard.applied_index() > 0 {
            let base = self.bases.write(shard)?;
            sim::debug!("base at {} written, {} bytes", base.index, base.bytes);
        }
        if let Some(oldest) = self.bases.held().last() {
            self.log.release_to(oldest.index).map_err(|e| StorageError::Io(std::io::Error::other(e)))?;
        }
        Ok(())
    }
}

fn failed(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Internal(format!("{what}: {error}"))
}

/// Opens log, views and bases, and mends what can be mended here. `alone`: there are no peers to give anything back. `forgotten`: the group was
/// there before, so a disk without anything is that of a replica that has lost it all, and must not vote. `id`: the node's. Blocks.
pub fn open(
    disk: &Arc<dyn Disk>,
    log: LogOptions,
    shard: ShardOptions,
    (alone, forgotten): (bool, bool),
    (id, plan): (u64, &Plan),
) -> Result<Opened, Error> {
    // What a crash left of snapshots that were under way between peers.
    let left = disk.list("").map_err(|e| failed("data directory", e))?;
    for name in left.iter().filter(|name| name.starts_with("snapshot-") && name.ends_with(".tmp")) {
        disk.remove(name).map_err(|e| failed(name, e))?;
    }
    let open_log = if alone { Log::open } else { Log::open_or_cut };
    let log = Arc::new(open_log(disk.clone(), LOG, log).map_err(|e| failed("ledger", e))?);
    log_store::finish_purge(&log).map_err(|e| failed("ledger", e))?;
    let vote = log.get_meta(log_store::VOTE).map_err(|e| failed("ledger", e))?;
    if forgotten && vote.is_none() && log.last_index() == 0 && !sim::planted!("vote-with-an-empty-disk") {
        sim::trace::probe("replica: came back with an empty disk");
        sim::warn!(
            "this replica's disk is empty, though its group is not new: it waits for what the others have"
        );
        log.put_meta(TERM_LOST, &[]).and_then(|()| log.start_over()).map_err(|e| failed("ledger", e))?;
    }
    let bases = Arc::new(Bases::open(disk.clone(), BASES).map_err(|e| failed("bases", e))?);
    // What is purged was applied, even if the views can no longer say so.
    let applied = || match Shard::open(disk.clone(), VIEWS, shard.clone()) {
        Ok(views) => {
            let applied = applied_meta(&views).map_err(|e| failed("views", e))?;
            Ok((views.applied_index(), applied.last_log_id))
        }
        Err(error) if is_fatal_to_views(&error) => Ok((log.first_index() - 1, None)),
        Err(error) => Err(failed("views", error)),
    };
    let before = epochs::held(&log, plan.first)?;
    let epochs::Turned { held, views_max, start_over } = epochs::turn(disk, &log, &bases, id, plan, applied)?;
    // The last thing that is written: until then all of it is done again.
    let done = |log: Arc<Log>, shard: Shard, bases: Arc<Bases>, held: &Held| -> Result<Opened, Error> {
        if *held != before || plan.first > FIRST_EPOCH {
            epochs::keep(&log, held)?;
        }
        Ok(Opened { log, shard: Arc::new(shard), bases, held: held.clone() })
    };
    let purged = log.first_index() - 1;
    let opened = Shard::open(disk.clone(), VIEWS, shard.clone());
    let sound = opened.is_ok();
    let problem = match opened {
        opened if start_over => {
            drop(opened);
            "what is left of an old epoch lies before the log's beginning".to_string()
        }
        Ok(views) if (purged..=views_max).contains(&views.applied_index()) => {
            return done(log, views, bases, &held);
        }
        Ok(views) if views.applied_index() > views_max => {
            let applied = views.applied_index();
            format!(
                "the views have applied {applied} entries of an old epoch, of which the next one has {views_max}"
            )
        }
        Ok(views) => {
            format!("the views are at {}, but the log is purged up to {purged}", views.applied_index())
        }
        Err(error) if is_fatal_to_views(&error) => error.to_string(),
        Err(error) => return Err(failed("views", error)),
    };
    // No disk is to blame where an epoch took something away.
    let epoch_over = start_over || views_max < u64::MAX;
    match epoch_over {
        true => sim::trace::probe("epoch: views made anew"),
        false => sim::trace::probe("views: made anew"),
    }
    sim::error!("{problem}; making the views anew");
    if sound && !alone {
        delta::set_aside(&**disk, VIEWS, ASIDE).map_err(|e| failed("views", e))?;
    }
    let started = Instant::now();
    let mut from: Vec<_> = bases.held().into_iter().map(Some).collect();
    from.push(None);
    for base in from.into_iter().filter(|_| !start_over) {
        let views = Shard::open_anew(disk.clone(), VIEWS, shard.clone()).map_err(|e| failed("views", e))?;
        let restored = base.as_ref().map_or(Ok(()), |base| bases.restore(base, &views));
        let name =
            base.map_or("the ledger's start".to_string(), |base| format!("the base at {}", base.index));
        match restored.map_err(|e| e.to_string()).and_then(|()| replay(&log, &views, held.first, purged)) {
            Ok(()) => {
                views.acquit().map_err(|e| failed("views", e))?;
                let (position, _) = views.applied();
                if position.index > 0 {
                    delta::discard(&**disk, ASIDE).map_err(|e| failed("views", e))?;
                }
                sim::info!(
                    "views made anew from {name}, at {} after {:?}",
                    position.index,
                    started.elapsed()
                );
                return done(log, views, bases, &held);
            }
            Err(error) => {
                sim::trace::probe("views: a base could not be used");
                sim::warn!("the views cannot be made from {name}: {error}");
            }
        }
    }
    if alone {
        let problem =
            "neither a base nor the log can make them again, and there are no peers; restore a backup";
        return Err(failed("views", format!("{problem} ({VIEWS}, {BASES}, {LOG} in the data directory)")));
    }
    match epoch_over {
        true => sim::trace::probe("epoch: a replica started over"),
        false => sim::trace::probe("replica: started over"),
    }
    sim::error!(
        "neither a base nor the log can make the views again: starting over with what the peers have"
    );
    log.start_over().and_then(|()| log.remove_meta(log_store::PURGED)).map_err(|e| failed("ledger", e))?;
    let views = Shard::open_anew(disk.clone(), VIEWS, shard).map_err(|e| failed("views", e))?;
    views.acquit().map_err(|e| failed("views", e))?;
    // What it said that it has is gone.
    done(log, views, bases, &Held { report: None, ..held })
}

/// Applies the log's entries from where the views are up to `to`, also purged ones.
fn replay(log: &Log, views: &Shard, first_epoch: u64, to: u64) -> Result<(), String> {
    let mut waiting = vec![];
    let mut told = Instant::now();
    let mut apply = |waiting: &mut Vec<_>| -> Result<(), String> {
        apply_entries(views, first_epoch, waiting).map_err(|e| e.to_string())?;
        waiting.clear();
        if told.elapsed() > Duration::from_secs(2) {
            told = Instant::now();
            sim::info!("replaying the log: {} of {to}", views.applied_index());
        }
        Ok(())
    };
    let from = views.applied_index() + 1 + sim::planted!("catch-up-from-one-entry-later") as u64;
    let damaged =
        |index: u64, problem: String| LogError::Corrupt { file: LOG.into(), offset: index, problem };
    log.replay(from..to + 1, &mut |index, bytes| -> Result<(), LogError> {
        let entry = log_store::decode_entry(bytes).map_err(|e| damaged(index, e))?;
        let batch = decode_batch(&entry).map_err(|e| damaged(index, e))?;
        if position_index(entry.log_id().index) != index {
            return Err(damaged(index, format!("entry {} stands there", entry.log_id())));
        }
        waiting.push((entry, batch));
        if waiting.len() == REPLAY_ENTRIES {
            apply(&mut waiting).map_err(|e| damaged(index, e))?;
        }
        Ok(())
    })
    .map_err(|e| e.to_string())?;
    apply(&mut waiting)
}

/// Ends the process because the views are damaged; the next start makes them anew.
pub async fn give_up_views(shard: &Arc<Shard>, error: StorageError) -> ! {
    sim::trace::probe(match error {
        StorageError::Damaged { .. } => "views: damage found while serving",
        _ => CONTRADICTION,
    });
    let (shard, reason) = (shard.clone(), error.to_string());
    let condemned = sim::task::blocking(move || shard.condemn(&reason)).await;
    let marked = condemned.map_or_else(|e| format!(" (which could not be marked: {e})"), |()| String::new());
    sim::task::abort(&format!("{error}{marked}; this process ends, and its next start makes the views anew"))
        .await
}

impl Ledger {
    /// A peer has applied entries up to `there`: a majority has them. A replica that took its group for new, and has none of them, learns from it that the
    /// group is older: its disk may be one that replaces another, and it must not vote.
    pub(super) fn learns_its_age(&self, there: u64) {
        if !self.past.is_new.load(Ordering::SeqCst) {
            return;
        }
        if self.log.last_index() > FOUNDED {
            self.past.is_new.store(false, Ordering::SeqCst);
            return;
        }
        if there <= FOUNDED || sim::planted!("take-an-old-group-for-new") {
            return;
        }
        self.has_forgotten(there);
    }

    /// This replica's disk is a new one, though its group is not; others have entries up to `there`. All of it at once: the call that brought the news may be
    /// given up at any moment, and others come meanwhile.
    pub(super) fn has_forgotten(&self, there: u64) {
        if !self.repairing.swap(true, Ordering::SeqCst) {
            self.raft.runtime_config().elect(false);
            self.trust.forget();
            // Last: until then it does not claim to remember.
            self.past.is_new.store(false, Ordering::SeqCst);
            sim::trace::probe("replica: learned that its group is not new");
            sim::info!(
                "{}: others have entries up to {there}, and this disk none: this replica does not vote before it has them, since it may have had them before",
                name_of(self.group)
            );
            sim::task::spawn(self.clone().note_its_age(there));
        }
    }

    /// Follows leaders only when that is durable: were it lost, a part of the log would pass for all of it.
    async fn note_its_age(self, there: u64) {
        loop {
            let log = self.log.clone();
            let note = move || log.put_meta(TERM_LOST, &[]).and_then(|()| log.begin_repair(there));
            let Err(error) = sim::task::blocking(note).await else { break };
            sim::error!(
                "{}: that this disk may have been lost cannot be stored ({error}); this replica takes nothing before that",
                name_of(self.group)
            );
            self.rest_until(Instant::now() + Duration::from_secs(1)).await;
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
        }
        self.trust.may_ask();
        self.repair().await;
    }

    /// Whether a vote of this replica says that it has what it may have acknowledged.
    pub(super) fn may_vote(&self) -> Result<(), String> {
        if self.is_repairing() {
            return Err("this replica repairs its log and does not vote yet".into());
        }
        // One that votes by its own log was given all of it before.
        let fills = self.fills.load(Ordering::SeqCst) && !sim::planted!("vote-before-it-has-been-filled");
        match fills && !self.votes() {
            true => Err("this replica is being filled and does not vote yet".into()),
            false => Ok(()),
        }
    }

    /// Follows until everything that was committed when a leader confirmed itself is here; false if this replica stops before.
    async fn catch_up(&self) -> bool {
        let mut pause = Duration::from_millis(50);
        let mut told = Instant::now();
        while !self.stopping.load(Ordering::SeqCst) {
            let deadline = Instant::now() + Duration::from_secs(2);
            if let Ok(position) = self.read_position(deadline).await
                && self.follow_to(position.index, Instant::now() + Duration::from_secs(30)).await
            {
                return true;
            }
            if self.is_repairing() && told.elapsed() > Duration::from_secs(10) {
                told = Instant::now();
                sim::error!(
                    "{}: the log waits for its repair: no leader has given everything back yet",
                    name_of(self.group)
                );
            }
            self.rest_until(Instant::now() + pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        false
    }

    /// Votes again once it has everything back.
    pub(super) async fn repair(self) {
        if !self.catch_up().await {
            return;
        }
        let log = self.log.clone();
        if let Err(error) =
            sim::task::blocking(move || log.remove_meta(TERM_LOST).and_then(|()| log.end_repair())).await
        {
            sim::task::abort(&format!("the end of the repair cannot be stored ({error})")).await;
        }
        self.vote_again();
        sim::trace::probe("log: repaired from peers");
        sim::info!(
            "{}: the log is repaired up to {}: this replica votes again",
            name_of(self.group),
            self.reached()
        );
    }

    /// A replica that the group takes in may have been of it before, and was given up: what it acknowledged then is gone with its files. So it votes for nobody
    /// before it has all that the group had when it came.
    pub(super) async fn fill(self) {
        if !self.catch_up().await {
            return;
        }
        let log = self.log.clone();
        match sim::task::blocking(move || log.put_meta(FILLED, &[])).await {
            Ok(()) => self.fills.store(false, Ordering::SeqCst),
            Err(error) => sim::warn!("{}: that it is filled cannot be stored ({error})", name_of(self.group)),
        }
    }

    /// Waits until this replica has applied, and so has in its log or behind it, everything up to `index`.
    async fn follow_to(&self, index: u64, deadline: Instant) -> bool {
        loop {
            let metrics = self.raft.metrics().borrow_watched().clone();
            let held = metrics.last_applied.map_or(0, |l| position_index(l.index));
            if held >= index {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            sim::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
