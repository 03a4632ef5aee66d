//! The ledger role: one shard's replicated log, on openraft.
//!
//! ```text
//! propose ─► queue ─► batch ─► openraft ─► log (fsync) ─► quorum ─► apply ─► outcomes back to each caller
//!                              │    ▲                       ▲
//!                              └────┴── peers over gRPC ────┘
//! read_position ─► leader confirms with a quorum that it still leads ─► position
//! ```
//!
//! Commands that arrive while earlier batches are under way share the next entry, so a busy ledger needs fewer fsyncs per command.
//!
//! What can go wrong, and why nothing acknowledged is lost:
//! - *The leader dies or is cut off.* What a majority has on disk survives; what it has not, nobody was told. A caller
//!   whose answer is missing gets OUTCOME_UNKNOWN and retries with its idempotency key, decided at apply.
//! - *A deposed leader is asked.* It can neither commit nor confirm a read position without a majority: it answers with an error.
//! - *A log write or fsync fails.* The process ends and recovers from what its disk really holds ([`log_store`]).
//! - *A replica is far behind.* It gets a snapshot ([`storage::bases`]), without what it has already ([`storage::delta`]).
//! - *A disk has rotted, or is a new one.* See [`recovery`] and [`trust`].
//! - *The region is given up.* The leader and each voter append only while the region has the right to write ([`crate::control::rights`]), and the leader looks
//!   again before it acknowledges: what it cannot be sure of is OUTCOME_UNKNOWN. See [`epochs`] for what becomes of the replicas, and [`elsewhere`] for
//!   what the other region has.

pub mod elsewhere;
pub mod epochs;
pub mod log_store;
pub mod network;
mod pace;
pub mod quarantine;
pub mod recovery;
pub mod service;
pub mod state_machine;
pub mod trust;
pub mod types;

use crate::control::lease;
use crate::control::regions::End;
use crate::control::rights::Rights;
use crate::error::Error;
use crate::groups::{GroupId, name_of};
use crate::peers::Peers;
use crate::proto::internal::Body;
use network::Network;
use openraft::async_runtime::WatchReceiver;
use openraft::error::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{BasicNode, Config, ReadPolicy, SnapshotPolicy};
use recovery::{Keeper, Opened};
use sim::disk::Disk;
use sim::sync::{Notify, Semaphore, mpsc, oneshot};
use sim::time::{Duration, Instant};
use state_machine::StateMachine;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use storage::Shard;
use storage::codec;
use storage::log::{Log, LogOptions};
use storage::model::{Batch, Command, Outcome, Position};
use types::{Data, Raft};

/// Commands in one entry at most.
const BATCH_COMMANDS_MAX: usize = 512;
/// Entries under way at once.
const BATCHES_IN_FLIGHT: usize = 2;
/// Callers waiting for a place in a batch; beyond it they are turned away.
const QUEUE_MAX: usize = 4096;

/// How long a leader may take to confirm a read position before it is asked for again; then twice as long each time.
const READ_POSITION_FIRST: Duration = Duration::from_millis(300);
/// A leader that is told to stop waits so long for another one.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);
/// Who is to take over lacks so many entries at most.
const HAND_OVER_BEHIND_MAX: u64 = 10;

/// How the ledger behaves; the defaults are production's.
#[derive(Clone, Debug)]
pub struct LedgerOptions {
    pub heartbeat: Duration,
    pub election_min: Duration,
    pub election_max: Duration,
    /// Entries between two checkpoints.
    pub checkpoint_entries: u64,
    /// Entries kept below the last checkpoint, for peers that lag a little.
    pub entries_kept: u64,
    /// A base is written only for this many bytes of log since the last one, at least.
    pub base_bytes_min: u64,
    pub log: LogOptions,
}

impl Default for LedgerOptions {
    fn default() -> LedgerOptions {
        LedgerOptions {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(500),
            election_max: Duration::from_millis(1000),
            checkpoint_entries: 5000,
            entries_kept: 1000,
            base_bytes_min: 64 << 20,
            log: LogOptions::default(),
        }
    }
}

impl LedgerOptions {
    /// For a group whose changes are rare and small: it costs little while nothing happens.
    pub fn patient(self) -> LedgerOptions {
        LedgerOptions {
            heartbeat: self.heartbeat * 4,
            election_min: self.election_min * 2,
            election_max: self.election_max * 2,
            ..self
        }
    }
}

/// What is not known of a replica when it is opened, and bears on whether it may vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsure {
    Nothing,
    /// Its disk may be a new one, and its group not ([`Ledger::learns_its_age`]).
    WhetherNew,
    /// It may never have had all that it was to have ([`Ledger::fill`]).
    WhetherFilled,
}

struct Waiting {
    commands: Vec<Command>,
    reply: oneshot::Sender<Result<Vec<Outcome>, Error>>,
}

/// This replica's handle on the shard's ledger. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    pub group: GroupId,
    pub raft: Raft,
    pub shard: Arc<Shard>,
    log: Arc<Log>,
    peers: Peers,
    queue: mpsc::Sender<Waiting>,
    repairing: Arc<AtomicBool>,
    past: trust::Past,
    /// The group is yet to give this replica all that it has ([`Ledger::fill`]).
    fills: Arc<AtomicBool>,
    trust: Arc<trust::Trust>,
    stopping: Arc<AtomicBool>,
    /// Told when it stops: nobody holds on to the views any longer than they must.
    stopped: Arc<Notify>,
    /// Unheard by a majority for so long, this replica no longer takes writes as a leader.
    deposed_after: Duration,
    /// The epoch, and what this replica has of those before.
    pub held: Arc<epochs::Held>,
    /// How those ended.
    ends: Arc<BTreeMap<u64, End>>,
    pub rights: Rights,
    pub lag: elsewhere::Lag,
}

/// What the leader said of a proposal that it did not take.
#[derive(Debug, bincode::Encode, bincode::Decode)]
pub enum Proposed {
    Done(Vec<Outcome>),
    /// Nothing was proposed; the leader's address, if known.
    NotLeader(Option<String>),
    Unknown(String),
    Overloaded(String),
    /// Nothing was proposed: that node has no replica of the group.
    NotHere,
}

fn internal(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Internal(format!("{what}: {error}"))
}

impl Ledger {
    /// Joins the peers with what this replica has on `disk`. `members` are all voters by id: the first start anywhere forms the group from
    /// them, later ones find it on disk. Without members it waits until the group takes it in.
    pub async fn open(
        (group, id, here): (GroupId, u64, String),
        (members, unsure): (Option<BTreeMap<u64, String>>, Unsure),
        disk: Arc<dyn Disk>,
        opened: Opened,
        peers: Peers,
        options: LedgerOptions,
        (rights, ends): (Rights, BTreeMap<u64, End>),
    ) -> Result<Ledger, Error> {
        let config = Config {
            cluster_name: format!("{}-epoch-{}", name_of(group), opened.held.epoch),
            heartbeat_interval: options.heartbeat.as_millis() as u64,
            election_timeout_min: options.election_min.as_millis() as u64,
            election_timeout_max: options.election_max.as_millis() as u64,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(options.checkpoint_entries),
            max_in_snapshot_log_to_keep: options.entries_kept,
            replication_lag_threshold: options.checkpoint_entries + options.entries_kept,
            max_payload_entries: 64,
            // Its own timer would send each group's heartbeats in moments of their own ([`Ledger::beat`]).
            enable_heartbeat: false,
            enable_leader_restore: Some(false),
            enable_pre_vote: Some(true),
            // A replica whose log was damaged comes back with less than it had acknowledged.
            allow_log_reversion: Some(true),
            ..Config::default()
        };
        let config = Arc::new(config.validate().map_err(|e| internal("ledger options", e))?);
        let Opened { log, shard, bases, held } = opened;
        let repair = log.repair().map_err(|e| internal("ledger", e))?;
        let repair = repair.filter(|_| !sim::planted!("vote-with-a-damaged-log"));
        let repairing = Arc::new(AtomicBool::new(repair.is_some()));
        let is_new = unsure == Unsure::WhetherNew && log.last_index() <= recovery::FOUNDED;
        let has = |fact| log.get_meta(fact).map(|fact| fact.is_some()).map_err(|e| internal("ledger", e));
        let fills = unsure == Unsure::WhetherFilled && !has(recovery::FILLED)?;
        let forgot = (repair.is_some() && has(trust::TERM_LOST)?) || (fills && !has(log_store::VOTE)?);
        let store = log_store::LogStore::new(log.clone());
        let base_bytes_min = options.base_bytes_min;
        let keeper = Keeper { disk: disk.clone(), log: log.clone(), bases, base_bytes_min };
        let machine = StateMachine::new(shard.clone(), keeper, held.first).await;
        let machine = machine.map_err(|e| internal("views", e))?;
        let (missed, views) = (store.missed.clone(), Arc::downgrade(&shard));
        let past = trust::Past::new(is_new);
        let (epoch, peers_too) = (held.epoch, peers.clone());
        let network =
            Network { peers: peers_too, disk, group, epoch, here, past: past.clone(), missed, views };
        let raft = Raft::new(id, config, network, store, machine).await.map_err(|e| internal("ledger", e))?;
        if let Some(repair) = repair {
            raft.runtime_config().elect(false);
            sim::warn!(
                "the log lost entries {} to {} to damage: this replica does not vote until its peers have given them back",
                repair.from,
                repair.to
            );
        } else if let Some(members) = members
            && !raft.is_initialized().await.map_err(|e| internal("ledger", e))?
        {
            let nodes: BTreeMap<u64, BasicNode> =
                members.into_iter().map(|(id, addr)| (id, BasicNode::new(addr))).collect();
            // Each member forms the same group; whoever is first is elected, the others' attempt is refused harmlessly.
            if let Err(error) = raft.initialize(nodes).await {
                sim::debug!("group not formed here: {error}");
            }
        }
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        sim::task::spawn(batcher(raft.clone(), (rights.clone(), held.epoch), waiting));
        let stopping = Arc::new(AtomicBool::new(false));
        sim::task::spawn(watch_over(group, raft.clone(), stopping.clone()));
        let deposed_after = options.election_max;
        let (held, ends, lag) = (Arc::new(held), Arc::new(ends), elsewhere::Lag::default());
        let ledger = Ledger {
            group,
            raft,
            shard,
            log,
            peers,
            queue,
            repairing,
            past,
            fills: Arc::new(AtomicBool::new(fills)),
            trust: Arc::new(trust::Trust::new(forgot)),
            stopping,
            stopped: Arc::default(),
            deposed_after,
            held,
            ends,
            rights,
            lag,
        };
        if !ledger.has_begun() {
            // It may have voted in an epoch that is over, among nodes that no longer do.
            ledger.raft.runtime_config().elect(false);
            sim::task::spawn(ledger.clone().wait_for_the_epoch());
        }
        sim::task::spawn(ledger.clone().watch_lag());
        sim::task::spawn(ledger.clone().give_way_when_unheard());
        sim::task::spawn(ledger.clone().beat(options.heartbeat));
        if is_new {
            sim::task::spawn(ledger.clone().hear_of_its_past());
        }
        if fills {
            sim::task::spawn(ledger.clone().fill());
        }
        if repair.is_some() {
            sim::task::spawn(ledger.clone().repair());
        }
        Ok(ledger)
    }

    /// If this replica leads, lets the voter take over that has most of the log, so that nobody waits for an election.
    pub async fn hand_over(&self) {
        self.hand_over_to(0).await;
    }

    /// The same to another one for each attempt, those with most first.
    async fn hand_over_to(&self, attempt: usize) {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let own = *self.raft.node_id();
        let Some(replication) = metrics.replication.filter(|_| self.raft.is_leader()) else { return };
        let voters: Vec<u64> = metrics.membership_config.membership().voter_ids().collect();
        let mut others: Vec<_> =
            replication.into_iter().filter(|(id, _)| *id != own && voters.contains(id)).collect();
        others.sort_by_key(|(id, held)| (std::cmp::Reverse(*held), *id));
        let Some(&(next, _)) = others.get(attempt % others.len().max(1)) else { return };
        self.transfer(next).await;
    }

    /// If this replica leads, and that voter has all but a little of its log, lets it take over; whether it was asked to.
    pub async fn hand_over_to_node(&self, node: u64) -> bool {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let votes = metrics.membership_config.membership().voter_ids().any(|id| id == node);
        let Some(replication) = metrics.replication.filter(|_| votes && self.raft.is_leader()) else {
            return false;
        };
        let held = replication.get(&node).copied().flatten().map_or(0, |held| held.index);
        let close = metrics.last_log_index.unwrap_or(0).saturating_sub(held) <= HAND_OVER_BEHIND_MAX;
        if close {
            self.transfer(node).await;
        }
        close
    }

    async fn transfer(&self, to: u64) {
        let own = *self.raft.node_id();
        if let Err(error) = self.raft.trigger().transfer_leader(to).await {
            return sim::warn!("leadership not handed over: {error}");
        }
        let deadline = Instant::now() + HAND_OVER_MAX;
        while self.leader().is_none_or(|(id, _)| id == own) && Instant::now() < deadline {
            sim::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends this replica's part in the group.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.stopped.notify_waiters();
        if let Err(error) = self.raft.shutdown().await {
            sim::warn!("the ledger did not stop cleanly: {error}");
        }
    }

    /// Sleeps, but not beyond this replica's end.
    async fn rest_until(&self, moment: Instant) {
        sim::select! {
            () = self.stopped.notified() => {}
            () = sim::time::sleep_until(moment) => {}
        }
    }

    /// Whether this replica's log is not yet whole again.
    pub fn is_repairing(&self) -> bool {
        self.repairing.load(Ordering::SeqCst)
    }

    fn vote_again(&self) {
        self.past.has_all_back();
        self.repairing.store(false, Ordering::SeqCst);
        self.raft.runtime_config().elect(self.has_begun());
    }

    pub fn epoch(&self) -> u64 {
        self.held.epoch
    }

    pub fn term(&self) -> u64 {
        self.raft.server_metrics().borrow_watched().vote.leader_id.term
    }

    /// The greatest index that this replica has.
    pub fn reached(&self) -> u64 {
        let last = self.raft.metrics().borrow_watched().last_log_index;
        last.map_or(0, log_store::position_index)
    }

    /// Whether who votes here was decided in this epoch.
    pub fn has_begun(&self) -> bool {
        let metrics = self.raft.server_metrics();
        let seen = metrics.borrow_watched();
        let decided = seen.membership_config.log_id().as_ref().map(|id| id.leader_id.term);
        self.held.epoch == self.held.first
            || decided.is_some_and(|term| term >= epochs::term_of(self.held.epoch))
    }

    async fn wait_for_the_epoch(self) {
        let mut metrics = self.raft.server_metrics();
        while !self.has_begun() {
            if metrics.changed().await.is_err() {
                return;
            }
        }
        self.raft.runtime_config().elect(!self.is_repairing());
    }

    /// What of the ledger a position names: itself, if it is still there; what it names may be lost if its epoch is over.
    pub fn surviving(&self, position: Position) -> Result<Position, Error> {
        let lost = || Error::LostInFailover { epoch: position.epoch, index: position.index };
        if position.epoch > self.held.epoch {
            // It is waited for.
            return Ok(position);
        }
        let mut ends = self.ends.range(position.epoch..self.held.epoch).peekable();
        if position.epoch < self.held.epoch && ends.peek().is_none() {
            let before = self.ends.range(..position.epoch).next_back();
            return match before.filter(|_| !self.held.is_halted()) {
                // Nobody knows that epoch any more: of what it wrote nothing is here.
                Some((_, end)) if position.index > end.certain => Err(lost()),
                Some(_) => Ok(position),
                None => Err(Error::Unavailable("how that epoch ended is not known here yet".into())),
            };
        }
        let gone = ends.any(|(_, end)| position.index > end.certain);
        match gone && !sim::planted!("believe-tokens-of-an-epoch-that-is-over") {
            true => Err(lost()),
            false => Ok(position),
        }
    }

    /// Whether this replica has a vote.
    pub fn votes(&self) -> bool {
        let metrics = self.raft.server_metrics().borrow_watched().clone();
        metrics.membership_config.membership().voter_ids().any(|id| id == *self.raft.node_id())
    }

    /// All members of the group, and their addresses.
    pub fn member_addrs(&self) -> Vec<(u64, String)> {
        let metrics = self.raft.server_metrics();
        let seen = metrics.borrow_watched();
        seen.membership_config.membership().nodes().map(|(id, node)| (*id, node.addr.clone())).collect()
    }

    /// Those who vote, and their addresses.
    pub fn voter_addrs(&self) -> BTreeMap<u64, String> {
        let metrics = self.raft.server_metrics();
        let seen = metrics.borrow_watched();
        let membership = seen.membership_config.membership();
        let addr = |id: u64| membership.get_node(&id).map(|node| (id, node.addr.clone()));
        membership.voter_ids().filter_map(addr).collect()
    }

    /// Address of the current leader; `None` while there is none. This replica's own if it leads.
    pub fn leader(&self) -> Option<(u64, String)> {
        let metrics = self.raft.server_metrics().borrow_watched().clone();
        let leader = metrics.current_leader?;
        let node = metrics.membership_config.membership().get_node(&leader)?.addr.clone();
        Some((leader, node))
    }

    /// Whether this replica leads, but no majority has answered it for as long as a follower waits for its leader.
    fn is_unheard(&self) -> bool {
        let metrics = self.raft.metrics();
        let seen = metrics.borrow_watched();
        // Of two neither can be elected without the other.
        let peers = seen.membership_config.membership().voter_ids().count() > 2;
        peers && seen.last_quorum_acked.is_some_and(|at| at.elapsed() > self.deposed_after)
    }

    /// Sends heartbeats while this replica leads, in the same moments as the node's other groups.
    async fn beat(self, interval: Duration) {
        while !self.stopping.load(Ordering::SeqCst) {
            self.rest_until(self.peers.links.next_beat(interval)).await;
            if self.raft.is_leader() && self.raft.trigger().heartbeat().await.is_err() {
                return;
            }
        }
    }

    /// A leader whose followers hear it, though it does not hear them, would lead for ever and commit nothing: it lets one of them
    /// take over.
    async fn give_way_when_unheard(self) {
        // One that has given way takes no more writes in its term: it goes on until somebody takes over.
        let (mut attempts, mut of) = (0, 0);
        while !self.stopping.load(Ordering::SeqCst) {
            self.rest_until(Instant::now() + self.deposed_after).await;
            let term = self.term();
            if std::mem::replace(&mut of, term) != term {
                attempts = 0;
            }
            match self.raft.is_leader() && (attempts > 0 || self.is_unheard()) {
                true if attempts == 0 => {
                    sim::trace::probe("ledger: an unheard leader gave way");
                    sim::warn!("no majority answers this leader: it lets another one take over");
                }
                true => {}
                false => {
                    attempts = 0;
                    continue;
                }
            }
            self.hand_over_to(attempts).await;
            attempts += 1;
        }
    }

    /// Proposes here; answers `NotLeader` if this replica does not lead.
    pub async fn propose_here(&self, commands: Vec<Command>) -> Proposed {
        if !self.raft.is_leader() {
            let leader = self.leader().filter(|(id, _)| id != self.raft.node_id());
            return Proposed::NotLeader(leader.map(|(_, addr)| addr));
        }
        // Those without commands only ask whether this replica can write.
        if let (false, Err(why)) = (commands.is_empty(), self.throttled().await) {
            return Proposed::Overloaded(why);
        }
        // What is appended next lies at most so far behind what there is.
        let ahead = (BATCHES_IN_FLIGHT + 1) as u64;
        if let Err(refusal) = self.rights.may_append(self.held.epoch, self.reached() + ahead) {
            sim::debug!("{}: a write is not taken: {refusal}", name_of(self.group));
            return Proposed::NotLeader(None);
        }
        sim::rand::buggify_wait("between the lease and the append", 0.02, Duration::from_secs(8)).await;
        // It is on its way out: what it took would wait for ever.
        if self.is_unheard() {
            return Proposed::NotLeader(None);
        }
        let (reply, outcome) = oneshot::channel();
        if self.queue.try_send(Waiting { commands, reply }).is_err() {
            return Proposed::Overloaded(format!("{QUEUE_MAX} writes are waiting already"));
        }
        match outcome.await {
            Ok(Ok(outcomes)) => Proposed::Done(outcomes),
            Ok(Err(Error::Unavailable(_))) => Proposed::NotLeader(self.leader().map(|(_, addr)| addr)),
            Ok(Err(Error::OutcomeUnknown(cause))) => Proposed::Unknown(cause),
            Ok(Err(error)) => Proposed::Unknown(error.to_string()),
            Err(_) => Proposed::Unknown("the ledger stopped".into()),
        }
    }

    /// Proposes wherever the leader is. Only attempts that certainly did nothing are repeated.
    pub async fn propose(&self, commands: Vec<Command>, deadline: Instant) -> Result<Vec<Outcome>, Error> {
        let here = |commands| self.propose_here(commands);
        propose_via((&self.peers, self.group), deadline, commands, here).await
    }

    /// A position at or above every write acknowledged before the call, confirmed by a majority. Only on the leader.
    pub async fn read_position_here(&self) -> Result<Position, Error> {
        if sim::planted!("serve-from-a-deposed-leader") {
            return Ok(self.shard.applied().0);
        }
        match self.raft.get_read_log_id(ReadPolicy::ReadIndex).await {
            Ok((read, _)) => {
                // A majority may be cut off with this leader from a region that went on.
                let right = self.rights.holds(self.held.epoch);
                right.map_err(|refusal| Error::Unavailable(format!("this region may not say: {refusal}")))?;
                let index = log_store::position_index(read.log_id().index);
                let epoch = epochs::epoch_of(self.held.first, read.log_id().leader_id.term);
                Ok(Position { epoch, index, item: u32::MAX })
            }
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => {
                Err(Error::Unavailable("this replica does not lead".into()))
            }
            Err(error) => Err(Error::Unavailable(format!("leadership not confirmed: {error}"))),
        }
    }

    /// As [`Ledger::read_position_here`], wherever the leader is.
    pub async fn read_position(&self, deadline: Instant) -> Result<Position, Error> {
        let (mut pause, mut patience) = (Duration::from_millis(5), READ_POSITION_FIRST);
        loop {
            let left = left(deadline, || Error::Unavailable("no leader confirmed the read in time".into()))?;
            // Whom it followed leads no more, and who leads does not know of it yet.
            if self.stopping.load(Ordering::SeqCst) || !self.has_begun() {
                return Err(Error::Unavailable("this replica waits for its epoch".into()));
            }
            let attempt = async {
                match self.leader() {
                    Some((id, _)) if id == *self.raft.node_id() => self.read_position_here().await,
                    Some((_, addr)) => read_position_at(&self.peers, self.group, &addr, left).await,
                    None => Err(Error::Unavailable("no leader".into())),
                }
            };
            // Who leads may change while the old leader keeps silent.
            match sim::time::timeout(left.min(patience), attempt).await {
                Ok(Ok(position)) => return Ok(position),
                Ok(Err(_)) | Err(_) => sim::time::sleep(pause.min(left)).await,
            }
            pause = (pause * 2).min(Duration::from_millis(200));
            patience *= 2;
        }
    }

    /// Waits until this replica's views publish `position`.
    pub async fn wait_published(&self, position: Position, deadline: Instant) -> Result<(), Error> {
        let slack = sim::planted!("wait-for-one-position-less") as u64;
        let reached = |p: Position| (p.epoch, p.index + slack) >= (position.epoch, position.index);
        if reached(self.shard.applied().0) {
            return Ok(());
        }
        let mut progress = self.raft.watch_apply_progress();
        loop {
            let left = left(deadline, || Error::NotYetVisible)?;
            match sim::time::timeout(left, progress.changed()).await {
                Ok(Ok(())) if reached(self.shard.applied().0) => return Ok(()),
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Error::Unavailable("the ledger stopped".into())),
                Err(_) => return Err(Error::NotYetVisible),
            }
        }
    }
}

/// Time until `deadline`, or the error that its passing means.
pub fn left(deadline: Instant, passed: impl FnOnce() -> Error) -> Result<Duration, Error> {
    let left = deadline - Instant::now();
    if left.is_zero() { Err(passed()) } else { Ok(left) }
}

/// Asks the replica at `addr`, which should lead, for a read position.
pub async fn read_position_at(
    peers: &Peers,
    group: GroupId,
    addr: &str,
    ttl: Duration,
) -> Result<Position, Error> {
    let mut client = peers.client(addr).map_err(|e| internal("peer", e))?;
    let body = Body { group, ..Body::default() };
    let reply = client.read_index(peers.request(body, ttl)).await;
    let reply = reply.map_err(|s| Error::Unavailable(s.message().to_string()))?;
    codec::decode(&reply.into_inner().body).map_err(|e| internal("peer", e))
}

/// Proposes `commands` at the leader: first by `here`, then wherever the answers point. Repeats only attempts that certainly
/// did nothing.
pub async fn propose_via<F: Future<Output = Proposed>>(
    (peers, group): (&Peers, GroupId),
    deadline: Instant,
    commands: Vec<Command>,
    here: impl Fn(Vec<Command>) -> F,
) -> Result<Vec<Outcome>, Error> {
    let (mut pause, mut hint) = (Duration::from_millis(5), None::<String>);
    let (mut commands, mut encoded) = (commands, None);
    loop {
        let left = left(deadline, || Error::Unavailable("no leader took the write in time".into()))?;
        let proposed = match hint.take() {
            None => sim::time::timeout(left, here(commands.clone())).await.unwrap_or_else(|_| late()),
            Some(addr) => {
                let body =
                    encoded.get_or_insert_with(|| bytes::Bytes::from(codec::encode(&commands))).clone();
                propose_at(peers, &addr, Body { body, group, epoch: 0 }, left).await
            }
        };
        match proposed {
            Proposed::Done(outcomes) => {
                // So long that the caller gives up on a write that took place, and asks again.
                sim::rand::buggify_wait("answer to a write", 0.01, Duration::from_secs(4)).await;
                return Ok(outcomes);
            }
            Proposed::Unknown(_) if sim::planted!("repeat-an-uncertain-write-without-its-key") => {
                commands.iter_mut().for_each(|command| command.idempotency_key.clear());
                encoded = None;
            }
            Proposed::Unknown(cause) => {
                sim::trace::probe("ledger: a write's outcome unknown");
                return Err(Error::OutcomeUnknown(cause));
            }
            Proposed::Overloaded(cause) => return Err(Error::Overloaded(cause)),
            Proposed::NotLeader(Some(leader)) => hint = Some(leader),
            Proposed::NotLeader(None) | Proposed::NotHere => {}
        }
        sim::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

fn late() -> Proposed {
    Proposed::Unknown("the deadline passed while the write was under way".into())
}

/// Sends commands to the replica at `addr`. A call that may have reached it is `Unknown`.
pub(crate) async fn propose_at(peers: &Peers, addr: &str, body: Body, ttl: Duration) -> Proposed {
    let Ok(mut client) = peers.client(addr) else { return Proposed::NotLeader(None) };
    match sim::time::timeout(ttl, client.propose(peers.request(body, ttl))).await {
        Ok(Ok(reply)) => match codec::decode(&reply.into_inner().body) {
            Ok(proposed) => proposed,
            Err(error) => Proposed::Unknown(error.to_string()),
        },
        Ok(Err(status)) if crate::error::reason(&status).as_deref() == Some("NOT_HERE") => Proposed::NotHere,
        Ok(Err(status)) => {
            Proposed::Unknown(format!("the leader at {addr} did not answer: {}", status.message()))
        }
        Err(_) => late(),
    }
}

/// Logs each change of the leader that this replica follows. If the ledger stops although nobody asked it to, the process ends too:
/// a replica that neither follows nor leads helps nobody, and the next start recovers.
async fn watch_over(group: GroupId, raft: Raft, stopping: Arc<AtomicBool>) {
    let mut metrics = raft.server_metrics();
    let mut followed = None;
    loop {
        let seen = metrics.borrow_watched().clone();
        let (now, term) = (seen.current_leader, seen.vote.leader_id.term);
        if group == 0 {
            sim::trace::gauge("term", term);
            sim::trace::gauge("leads", if now == Some(*raft.node_id()) { term } else { 0 });
        }
        if now != followed {
            let group = name_of(group);
            match now {
                Some(id) if id == *raft.node_id() => sim::info!("{group}: this replica leads now"),
                Some(id) => sim::info!("{group}: follows replica {id} now"),
                None => sim::info!("{group}: knows no leader"),
            }
            followed = now;
        }
        if metrics.changed().await.is_err() {
            if !stopping.load(Ordering::SeqCst) {
                let why = raft.metrics().borrow_watched().running_state.clone();
                let why = why.map_or_else(|fatal| fatal.to_string(), |()| "it does not say why".into());
                sim::task::abort(&format!("the ledger has stopped: {why}")).await;
            }
            return;
        }
    }
}

/// Gathers waiting commands into entries, a few of which are under way at once.
async fn batcher(raft: Raft, right: (Rights, u64), mut waiting: mpsc::Receiver<Waiting>) {
    let places = Arc::new(Semaphore::new(BATCHES_IN_FLIGHT));
    while let Some(first) = waiting.recv().await {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let mut count = first.commands.len();
        let mut callers = vec![first];
        while count < BATCH_COMMANDS_MAX {
            let Ok(next) = waiting.try_recv() else { break };
            count += next.commands.len();
            callers.push(next);
        }
        let (raft, right) = (raft.clone(), right.clone());
        sim::task::spawn(async move {
            submit(raft, right, callers).await;
            drop(place);
        });
    }
}

async fn submit(raft: Raft, (rights, epoch): (Rights, u64), callers: Vec<Waiting>) {
    let mut replies = Vec::with_capacity(callers.len());
    let mut commands = Vec::new();
    for caller in callers {
        replies.push((caller.commands.len(), caller.reply));
        commands.extend(caller.commands);
    }
    let data = Data(codec::encode(&Batch { commands }).into());
    let result = match raft.client_write(data).await {
        Ok(response) => match rights.outcome(epoch, log_store::position_index(response.log_id.index)) {
            lease::Outcome::Acknowledged => Ok(response.data.0),
            lease::Outcome::Unknown => {
                sim::trace::probe("ledger: the right to write ran out under a write");
                let cause = "the region's right to write ran out meanwhile";
                Err(Error::OutcomeUnknown(cause.into()))
            }
        },
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
            Err(Error::Unavailable("this replica does not lead".into()))
        }
        Err(error) => Err(Error::OutcomeUnknown(format!("the ledger did not confirm the write: {error}"))),
    };
    match result {
        Ok(outcomes) => {
            let mut outcomes = outcomes.into_iter();
            for (count, reply) in replies {
                let own: Vec<Outcome> = outcomes.by_ref().take(count).collect();
                let own = if own.len() == count {
                    Ok(own)
                } else {
                    Err(internal("ledger", "outcomes are missing"))
                };
                let _ = reply.send(own);
            }
        }
        Err(error) => {
            for (_, reply) in replies {
                let _ = reply.send(Err(error.clone()));
            }
        }
    }
}
