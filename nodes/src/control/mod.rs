//! The control group: which nodes and shards there are, and the long operations on them.
//!
//! ```text
//!   loci cluster …, nodes ─► Control::update ─► control group (a ledger like any shard's; its one record is the map)
//!                                                   │ followed by every node (Control::follow), kept on its disk
//!                      ┌────────────────────────────┼──────────────────────────────┐
//!                 router: where to ask        keeper: which replicas to open   driver: what to do next
//!
//!   every node ◄─ is it there? ── liveness (at the control group's leader) ─► Control::update: who is down
//! ```
//!
//! **The map is a record.** The control group is a group like every shard: openraft, a log, views, snapshots, repair of damaged disks. In it
//! lies one memory, whose text is the [`map::ClusterMap`] and whose version orders its changes: each is made from the map that was read, and
//! written with the version that it was made from ([`Control::update`]), so that of two who change it at once one reads again. Its history is
//! the account of every change. Where there are several regions, a second memory beside it says who may write ([`lease::Record`], [`grants`]).
//!
//! **What can go wrong.** *The control group has no leader, or this node is cut off from it*: nodes go on with the map that they have, which
//! is on their disks; nothing can change meanwhile. *A map is old*: whoever routes by it is refused by the replicas themselves
//! ([`storage::slots`]), reads the map again and asks elsewhere. *The driver dies*: the plan and its progress are in the map, the next
//! leader of the control group goes on; *two drivers run*: their steps are the same, and each change is made once.

pub mod announce;
pub mod driver;
pub mod erasures;
pub mod failover;
pub mod grants;
pub mod incidents;
pub mod keeper;
pub mod lease;
pub mod liveness;
pub mod map;
pub mod recover;
pub mod regions;
pub mod rights;
pub mod since;

use crate::convert;
use crate::error::Error;
use crate::groups::{CONTROL, Groups};
use crate::ledger::{Proposed, left};
use crate::peers::Peers;
use crate::proto::v1;
use crate::reach::Reach;
use crate::remote::Remote;
use crate::views::{Answered, Ask, Found, Freshness, Query, unexpected};
use map::ClusterMap;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sim::disk::Disk;
use sim::sync::watch;
use sim::time::{self, Duration, Instant};
use std::io;
use std::sync::{Arc, Mutex};
use storage::codec;
use storage::facts::{self, FactError};
use storage::model::*;
use storage::slots::SlotSet;

/// The tenant that the map's record belongs to; only the control group knows it.
const TENANT: &str = "cluster";
const RECORD: MemoryId = *b"the cluster map!";
/// The record of the right to write, in a cluster of several regions.
const LEASE: MemoryId = *b"the region lease";
/// The directory and the fact in which a node keeps the last map that it saw.
const DIR: &str = "cluster";
const FACT: &str = "map";
/// How often a node looks whether there is a newer map.
const FOLLOW: Duration = Duration::from_millis(1000);
/// How long one look may take.
const LOOK: Duration = Duration::from_secs(2);

/// A node's view of the cluster map, and the way to change it.
#[derive(Clone)]
pub struct Control {
    reach: Reach,
    disk: Arc<dyn Disk>,
    map: watch::Sender<Arc<ClusterMap>>,
    heard: Arc<Mutex<Option<Heard>>>,
}

/// What a node heard last of the map's version, from who led the control group and had its majority behind it.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    pub version: u64,
    pub at: Instant,
}

impl Control {
    /// Begins with the map that the node's disk holds. `voters`: addresses of the control group's replicas.
    pub fn open(
        groups: Groups,
        peers: Peers,
        disk: Arc<dyn Disk>,
        voters: Vec<String>,
        here: String,
    ) -> Result<Control, Error> {
        let failed = |error| Error::Internal(format!("cluster map: {error}"));
        disk.create_dir_all(DIR).map_err(failed)?;
        let held = held(&*disk, FACT, "the cluster map").map_err(failed)?;
        let map: ClusterMap = held.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let others = voters.into_iter().filter(|addr| *addr != here).collect();
        let remote = Remote::new(peers, CONTROL, others, usize::MAX);
        let reach = Reach { groups, group: CONTROL, needs: &[], remote };
        Ok(Control { reach, disk, map: watch::channel(Arc::new(map)).0, heard: Arc::default() })
    }

    /// When this node last heard of the map's version; `None`: not since it started.
    pub fn heard(&self) -> Option<Heard> {
        *self.heard.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// The version was that at a moment.
    pub fn hear(&self, version: u64, at: Instant) {
        let mut heard = self.heard.lock().unwrap_or_else(|p| p.into_inner());
        if heard.is_none_or(|heard| heard.at <= at && heard.version <= version) {
            *heard = Some(Heard { version, at });
        }
    }

    /// The newest map that this node knows; version 0 if it never saw one.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.map.borrow().clone()
    }

    /// Tells of every newer map.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterMap>> {
        self.map.subscribe()
    }

    /// Waits until the map has several regions; false if this node ends before.
    async fn has_regions(&self) -> bool {
        let mut maps = self.watch();
        while maps.borrow_and_update().regions.is_none() {
            if maps.changed().await.is_err() {
                return false;
            }
        }
        true
    }

    async fn learn(&self, map: ClusterMap) -> Arc<ClusterMap> {
        let new = Arc::new(map);
        let newer = self.map.send_if_modified(|held| {
            let newer = new.version > held.version;
            if newer {
                *held = new.clone();
            }
            newer
        });
        if newer {
            let (disk, bytes) = (self.disk.clone(), serde_json::to_vec(&*new).unwrap_or_default());
            // It is a help for the next start, not the truth: the control group has that.
            if let Err(error) = sim::task::blocking(move || facts::put(&*disk, DIR, FACT, &bytes)).await {
                sim::warn!("the cluster map cannot be kept on this disk: {error}");
            }
        }
        self.map()
    }

    /// The map's record and its version; `None`: the cluster is not founded yet.
    async fn record(
        &self,
        freshness: Freshness,
        deadline: Instant,
    ) -> Result<Option<(ClusterMap, u64)>, Error> {
        self.read_record(RECORD, freshness, deadline).await
    }

    async fn read_record<T: DeserializeOwned>(
        &self,
        id: MemoryId,
        freshness: Freshness,
        deadline: Instant,
    ) -> Result<Option<(T, u64)>, Error> {
        record_of(self.reach.query(query_of(id, freshness), deadline).await?)
    }

    /// The record of the right to write, confirmed by a majority after this call.
    pub async fn lease(&self, deadline: Instant) -> Result<(lease::Record, u64), Error> {
        let read = self.read_record(LEASE, Freshness::Strong, deadline).await?;
        read.ok_or_else(|| Error::Unavailable("no region has a right to write yet".into()))
    }

    /// Writes an entry of the right to write; the record as it is then. `None`: it is another leader's, or late. `read`: the record that was just read, if it was.
    pub async fn enter(
        &self,
        entry: &lease::Entry,
        mut read: Option<(lease::Record, u64)>,
        deadline: Instant,
    ) -> Result<Option<lease::Record>, Error> {
        loop {
            let (record, version) = match read.take() {
                Some(read) => read,
                None => self.lease(deadline).await?,
            };
            let Some(next) = record.apply(entry) else { return Ok(None) };
            if self.write(LEASE, &next, version, deadline).await? {
                return Ok(Some(next));
            }
        }
    }

    /// Whether a record of that version was replaced.
    async fn write<T: Serialize>(
        &self,
        id: MemoryId,
        record: &T,
        version: u64,
        deadline: Instant,
    ) -> Result<bool, Error> {
        match self.propose(replacement(id, record, version)?, deadline).await? {
            Outcome::Done { .. } => Ok(true),
            Outcome::VersionMismatch { .. } => Ok(false),
            outcome => {
                Err(Error::Internal(format!("the control group's record was not changed: {outcome:?}")))
            }
        }
    }

    /// Reads the map as it is now.
    pub async fn read(&self, deadline: Instant) -> Result<Arc<ClusterMap>, Error> {
        let asked = Instant::now();
        match self.record(Freshness::Strong, deadline).await? {
            Some((map, _)) => {
                self.hear(map.version, asked);
                Ok(self.learn(map).await)
            }
            None => Err(Error::Unavailable("the cluster is not founded yet".into())),
        }
    }

    /// Reads the map as the nearest replica of the control group has it, which may be behind.
    pub async fn glance(&self, deadline: Instant) -> Result<Arc<ClusterMap>, Error> {
        if let Some((map, _)) = self.record(Freshness::Any, deadline).await? {
            self.learn(map).await;
        }
        Ok(self.map())
    }

    /// A map of at least `version`.
    pub async fn at_least(&self, version: u64, deadline: Instant) -> Result<Arc<ClusterMap>, Error> {
        let mut pause = Duration::from_millis(5);
        loop {
            let map = self.map();
            if map.version >= version.max(1) {
                return Ok(map);
            }
            let left =
                left(deadline, || Error::Unavailable("the cluster map could not be read in time".into()))?;
            match self.read(deadline).await {
                Ok(map) if map.version >= version.max(1) => return Ok(map),
                _ => time::sleep(pause.min(left)).await,
            }
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// Changes the map: `change` makes the next one from the one that is. A change that changes nothing is not written.
    pub async fn update(
        &self,
        change: impl Fn(&ClusterMap) -> Result<ClusterMap, Error>,
        deadline: Instant,
    ) -> Result<Arc<ClusterMap>, Error> {
        if let Some(map) = self.update_here(&change, deadline).await? {
            return Ok(map);
        }
        loop {
            let missing = || Error::Unavailable("the cluster is not founded yet".into());
            let (map, version) = self.record(Freshness::Strong, deadline).await?.ok_or_else(missing)?;
            let next = change(&map)?;
            if next == map {
                return Ok(self.learn(map).await);
            }
            next.check().map_err(Error::Internal)?;
            if self.write(RECORD, &next, version, deadline).await? {
                return Ok(self.learn(next).await);
            }
        }
    }

    /// As [`Control::update`], on the leader of the control group, which need not ask anybody what it has written itself: if there is something newer, it is not the last version,
    /// and the change is refused. `None`: nothing was changed; whether that is right, only a confirmed map can tell.
    async fn update_here(
        &self,
        change: &impl Fn(&ClusterMap) -> Result<ClusterMap, Error>,
        deadline: Instant,
    ) -> Result<Option<Arc<ClusterMap>>, Error> {
        let Some(replica) = self.reach.groups.get(CONTROL).filter(|replica| replica.ledger.raft.is_leader())
        else {
            return Ok(None);
        };
        let Ok(answered) = replica.views.query(query_of(RECORD, Freshness::Any)).await else {
            return Ok(None);
        };
        let Some((map, version)) = record_of::<ClusterMap>(answered)? else { return Ok(None) };
        let Some(next) = change(&map).ok().filter(|next| *next != map && next.check().is_ok()) else {
            return Ok(None);
        };
        let proposed = replica.ledger.propose_here(vec![command(replacement(RECORD, &next, version)?)]);
        let within = left(deadline, || Error::Unavailable("no time is left to change the map".into()))?;
        match time::timeout(within, proposed).await {
            Ok(Proposed::Done(outcomes)) if matches!(outcomes[..], [Outcome::Done { .. }]) => {
                Ok(Some(self.learn(next).await))
            }
            Ok(Proposed::Unknown(cause)) => Err(Error::OutcomeUnknown(cause)),
            Ok(_) => Ok(None),
            Err(elapsed) => Err(Error::OutcomeUnknown(elapsed.to_string())),
        }
    }

    /// Writes the first map, if there is none; whether there was none.
    pub async fn found(&self, map: ClusterMap, deadline: Instant) -> Result<bool, Error> {
        map.check().map_err(Error::Internal)?;
        if let Some(regions) = &map.regions {
            // First this: a cluster that has a map has it.
            let holder = regions.holder(&regions.primary);
            let record = lease::Record { epoch: regions.epoch, holder, ..lease::Record::default() };
            self.add(LEASE, &record, deadline).await?;
        }
        self.add(RECORD, &map, deadline).await
    }

    /// Whether there was no such record.
    async fn add<T: Serialize>(&self, id: MemoryId, record: &T, deadline: Instant) -> Result<bool, Error> {
        let (now, text) = (time::calendar_ms(), text_of(record)?);
        let new = v1::NewMemory { scope: v1::Scope::Shared.into(), text, ..Default::default() };
        let memory = Memory { id, ..convert::new_memory(TENANT, new, "", now)? };
        let outcome = self.propose(Operation::Add(memory), deadline).await?;
        Ok(matches!(outcome, Outcome::Done { .. }))
    }

    async fn propose(&self, operation: Operation, deadline: Instant) -> Result<Outcome, Error> {
        let outcomes = self.reach.propose(vec![command(operation)], deadline).await?;
        outcomes.into_iter().next().ok_or_else(|| Error::Internal("the control group gave no outcome".into()))
    }

    /// Looks for newer maps for ever.
    pub async fn follow(self) {
        loop {
            let _ = self.glance(Instant::now() + LOOK).await;
            let founded = self.map().version > 0;
            let pause = if founded { FOLLOW } else { FOLLOW / 10 };
            time::sleep(pause + pause.mul_f64(sim::rand::unit() / 4.0)).await;
        }
    }
}

/// A fact that the control group tells again: a damaged one counts as none. Blocks.
fn held(disk: &dyn Disk, fact: &str, what: &str) -> io::Result<Option<Vec<u8>>> {
    match facts::get(disk, DIR, fact) {
        Ok(held) => Ok(held),
        Err(FactError::Damaged(problem)) => {
            sim::warn!("{what} on this disk is damaged ({problem}); it is read again from the control group");
            Ok(None)
        }
        Err(FactError::Io(error)) => Err(error),
    }
}

fn query_of(id: MemoryId, freshness: Freshness) -> Query {
    let ask = Ask::Get { tenant: TENANT.into(), slot: None, id, now: 0 };
    Query { freshness, wait_ms: 0, ask, needs: SlotSet::default() }
}

/// Replaces the record of that version.
fn replacement<T: Serialize>(id: MemoryId, record: &T, version: u64) -> Result<Operation, Error> {
    let patch = Patch { text: Some(text_of(record)?), ..Patch::default() };
    Ok(Operation::Update { id, expected_version: Some(version), patch })
}

fn record_of<T: DeserializeOwned>(answered: Answered) -> Result<Option<(T, u64)>, Error> {
    let Found::Memory(found) = answered.found else { return Err(unexpected()) };
    let Some(memory) = found else { return Ok(None) };
    let record = serde_json::from_str(&memory.text).map_err(|e| {
        Error::Internal(format!(
            "the control group's record is written in a way that this build does not know: {e}"
        ))
    })?;
    Ok(Some((record, memory.version)))
}

fn command(operation: Operation) -> Command {
    Command {
        tenant: TENANT.into(),
        slot: None,
        // The key makes a repetition by the ledger itself harmless; nobody else repeats it.
        idempotency_key: sim::rand::uuid_v7().simple().to_string(),
        request_hash: [0; 16],
        now: time::calendar_ms(),
        operation,
    }
}

fn text_of<T: Serialize>(record: &T) -> Result<String, Error> {
    serde_json::to_string(record).map_err(|e| Error::Internal(format!("the control group's record: {e}")))
}

/// Whether another replica of the control group has the map: then this one, if its disk is empty, has lost what it had.
pub async fn founded_elsewhere(peers: &Peers, others: &[String]) -> bool {
    let query = Query { wait_ms: 500, ..query_of(RECORD, Freshness::Any) };
    for addr in others {
        let body =
            crate::proto::internal::Body { body: codec::encode(&query).into(), group: CONTROL, epoch: 0 };
        let Ok(mut client) = peers.client(addr) else { continue };
        let limit = Duration::from_millis(500);
        let Ok(Ok(reply)) = time::timeout(limit, client.query(peers.request(body, limit))).await else {
            continue;
        };
        let answered: Result<crate::views::Answered, _> = codec::decode(&reply.into_inner().body);
        if matches!(answered.map(|a| a.found), Ok(Found::Memory(Some(_)))) {
            return true;
        }
    }
    false
}
