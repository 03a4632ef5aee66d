//! The driver: whoever leads the control group carries the map's plans out.
//!
//! A loop each for slots that move between shards, for replicas that move between nodes, for erasures, and for whether the other region has
//! the erasures, and the steps of moves. Each reads the map, takes the next step, and writes down
//! what is done; every step may be repeated, so it does not matter where an earlier driver stopped.
//!
//! A move of slots: the source seals them, the destination imports part after part, the source releases them, the destination adopts them, the map
//! sends callers there, the source drops the rows ([`storage::slots`]). Writers of those slots wait from the seal to the new map; readers
//! only from the release. The copy is throttled to [`COPY_BYTES_PER_S`]. A tenant that is pinned, or unpinned, moves alike, by its own slots
//! ([`ClusterMap::plan_move`]).
//!
//! Where another region follows, it may take over at any moment, each shard with what has arrived of its ledger. So that shards there never disagree about
//! who has the slots, and no memory is between them, a step is taken only when the other region has the one before it: a failover finds the move where a driver
//! that stopped would have left it, but for one step. No move begins while the other region does not follow. If it falls behind in the middle of one, the slots' writers
//! wait for [`PATIENCE`]; then the move goes on, and the map says that the other region lacks a step ([`ClusterMap::lacking`]): it does not take over by itself before
//! it has that.
//!
//! A handover of a replica: the new node opens it by the map ([`super::keeper`]), the ledger's leader takes it in as a learner, and once
//! it has nearly caught up as a voter in place of the old one; then the map says so, and the old node closes its replica. Replicas for views
//! alone ([`crate::roles`]) stay learners, and go by the same way.
//!
//! An erasure: every shard applies it, part after part, when no slots are on their way; then the other region is waited for
//! ([`super::erasures`]). One that an epoch may lack is made again there.

use super::erasures::{Erasure, Part};
use super::map::{ClusterMap, Handover, Learner, Move, NodeId, ShardId};
use super::regions::RegionsConfig;
use super::{Control, TENANT};
use crate::error::Error;
use crate::groups::{CONTROL, Groups, name_of};
use crate::ledger;
use crate::proto::internal::Body;
use crate::router::Router;
use crate::views::{Ask, Found, Freshness, unexpected};
use bincode::{Decode, Encode};
use futures::future::join_all;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use storage::codec;
use storage::model::{Command, Erasure as Listed, ErasureId, MoveStep, Operation, Outcome, Position};
use storage::slots::{Arrived, Moving, SlotSet, Slots};

/// The pause between two looks at the map.
const LOOK: Duration = Duration::from_millis(500);
/// One step's time.
const STEP: Duration = Duration::from_secs(5);
/// How long a step of a move waits for the other region.
const PATIENCE: Duration = Duration::from_secs(10);
/// What one import carries.
const PART_BYTES: usize = 128 << 10;
/// Copies leave room for the callers' own writes.
const COPY_BYTES_PER_S: f64 = 16e6;
/// Rows removed in one entry.
const DROP_ROWS: u32 = 500;
/// Rows that an erasure looks at in one entry.
const ERASE_ROWS: u32 = 500;

#[derive(Clone)]
pub struct Driver {
    pub control: Control,
    pub router: Router,
    pub groups: Groups,
    /// The nodes of a new cluster, how many shards it is to have, and its regions.
    pub first: (BTreeMap<u64, String>, u32, Option<RegionsConfig>),
}

fn soon() -> Instant {
    Instant::now() + STEP
}

impl Driver {
    pub fn start(self) {
        sim::task::spawn(self.clone().each("slots", |driver, map| async move { driver.slots(&map).await }));
        let erasures =
            |driver: Driver, map: std::sync::Arc<ClusterMap>| async move { driver.erasures(&map).await };
        sim::task::spawn(self.clone().each("erasures", erasures));
        let elsewhere = |driver: Driver, map: std::sync::Arc<ClusterMap>| async move {
            driver.erasures_elsewhere(&map).await
        };
        sim::task::spawn(self.clone().each("erasures elsewhere", elsewhere));
        let steps = |driver: Driver, map: std::sync::Arc<ClusterMap>| async move {
            driver.steps_elsewhere(&map).await
        };
        sim::task::spawn(self.clone().each("steps elsewhere", steps));
        sim::task::spawn(self.each("replicas", |driver, map| async move { driver.replicas(&map).await }));
    }

    /// Calls `work` with the map as it is, for ever, while this node leads the control group. `work` says whether there may be more.
    async fn each<F: Future<Output = Result<bool, Error>>>(
        self,
        what: &str,
        work: impl Fn(Driver, std::sync::Arc<ClusterMap>) -> F,
    ) {
        // `settled`: the map's version that leaves nothing to do.
        let (mut told, mut settled) = (None, None);
        loop {
            let leads = self.groups.get(CONTROL).is_some_and(|replica| replica.ledger.raft.is_leader());
            if !leads {
                settled = None;
            }
            let idle = match settled {
                Some(version) => self.control.glance(soon()).await.is_ok_and(|map| map.version == version),
                None => !leads,
            };
            let round = async {
                if idle {
                    return Ok(false);
                }
                let map = self.map().await?;
                let version = map.version;
                let more = work(self.clone(), map).await?;
                settled = (!more).then_some(version);
                Ok(more)
            };
            let more: Result<bool, Error> = round.await;
            match &more {
                Err(error) if told.as_ref() != Some(error) => {
                    sim::debug!("{what}: {error}");
                    told = Some(error.clone());
                }
                Err(_) => {}
                Ok(_) => told = None,
            }
            if !matches!(more, Ok(true)) {
                time::sleep(LOOK).await;
            }
        }
    }

    async fn map(&self) -> Result<std::sync::Arc<ClusterMap>, Error> {
        match self.control.read(soon()).await {
            Err(Error::Unavailable(_)) if self.control.map().version == 0 => {
                let (nodes, shards, regions) = &self.first;
                let map = ClusterMap::found_in(nodes, *shards, regions.as_ref())?;
                if self.control.found(map, soon()).await? {
                    sim::info!("the cluster is founded: {} nodes, {shards} shards", nodes.len());
                }
                self.control.read(soon()).await
            }
            read => read,
        }
    }

    /// Takes the next step of what slots are to do.
    async fn slots(&self, map: &ClusterMap) -> Result<bool, Error> {
        if map.holds_still() {
            return Ok(false);
        }
        if let Some((shard, entry)) = map.shards.iter().find(|(_, entry)| !entry.founded) {
            let (_, at) = self.step(map, *shard, MoveStep::Own { slots: entry.slots.clone() }).await?;
            let alone = serving_alone(map);
            // Nobody follows it yet.
            let founded = |map: &ClusterMap| match alone {
                true => Ok(map.founded(*shard)),
                false => map.founded(*shard).lacking(*shard, at),
            };
            self.control.update(founded, soon()).await?;
            return Ok(true);
        }
        if let Some(moving) = map.moving() {
            return self.carry_out(map, moving).await.map(|()| true);
        }
        let next = self.planned(map, ClusterMap::plan_move).await?;
        if map.resize.is_some() && next.resize.is_none() {
            sim::info!("there are {} shards now", next.shards.len());
        }
        Ok(next.version != map.version)
    }

    async fn carry_out(&self, map: &ClusterMap, moving: &Move) -> Result<(), Error> {
        let Move { id, from, to, slots, switched } = moving.clone();
        if !switched {
            self.followed(map, moving).await?;
            self.settled_step(map, from, MoveStep::Seal { id, slots: slots.clone() }).await?;
            if let Some((pieces, hash)) = self.copy(map, moving).await? {
                // In this order: callers with an old map must never find the slots shown by both.
                self.settled_step(map, from, MoveStep::Release { id }).await?;
                self.settled_step(map, to, MoveStep::Adopt { id, slots: slots.clone(), pieces, hash })
                    .await?;
            }
            self.control.update(|map| Ok(map.switch(id)), soon()).await?;
            sim::info!("slots {slots} moved from shard {from} to shard {to}");
        }
        let dropped = loop {
            let (left, at) = self.step(map, from, MoveStep::Drop { id, rows_max: DROP_ROWS }).await?;
            if left == 0 {
                break at;
            }
            time::sleep(Duration::from_millis(5)).await;
        };
        self.settle(map, from, dropped).await?;
        self.control.update(|map| Ok(map.end_move(id)), soon()).await?;
        Ok(())
    }

    /// Which slots a shard has, as its leader knows it, and where in its ledger that is.
    async fn slots_of(&self, map: &ClusterMap, shard: ShardId) -> Result<(Slots, Position), Error> {
        let (at, none) = (self.router.at(map, shard, &[]), SlotSet::default());
        let asked = at.ask(Ask::Slots, Freshness::Strong, &none, soon()).await?;
        // What it has of older epochs is in this one's ledger too.
        let epoch = epoch_of(map, shard);
        match asked.found {
            Found::State(slots) => Ok((slots, Position { epoch, index: asked.position.index, item: 0 })),
            _ => Err(unexpected()),
        }
    }

    /// What has arrived of a move at its destination, and where in its ledger that is; `None`: it has adopted the slots.
    async fn arrived(&self, map: &ClusterMap, moving: &Move) -> Result<(Option<Arrived>, Position), Error> {
        let (there, at) = self.slots_of(map, moving.to).await?;
        let arrived = match there.moving() {
            Some((of, Moving::Arriving(arrived))) if of == moving.id => Some(arrived.clone()),
            _ if there.owned().includes(&moving.slots) => None,
            _ => Some(Arrived::default()),
        };
        Ok((arrived, at))
    }

    /// That a move may begin, or has begun: the other region has all that the two shards have, or nobody is left of it.
    async fn followed(&self, map: &ClusterMap, moving: &Move) -> Result<(), Error> {
        if serving_alone(map) {
            return Ok(());
        }
        let (here, at) = self.slots_of(map, moving.from).await?;
        if here.moving().is_some_and(|(of, _)| of == moving.id) {
            return Ok(());
        }
        let (_, there) = self.slots_of(map, moving.to).await?;
        for (shard, at) in [(moving.from, at), (moving.to, there)] {
            if map.elsewhere().iter().all(|node| map.is_lost(*node)) {
                self.control.update(|map| map.lacking(shard, at), soon()).await?;
            } else if !self.router.elsewhere(shard, at, soon()).await? {
                let problem = "slots stay where they are while the other region does not follow";
                return Err(Error::Unavailable(problem.into()));
            }
        }
        Ok(())
    }

    /// Waits until the other region has a shard's entries up to a position, or writes down that it may lack them, if who leads the shard says so.
    async fn settle(&self, map: &ClusterMap, shard: ShardId, at: Position) -> Result<(), Error> {
        if serving_alone(map) {
            return Ok(());
        }
        let until = Instant::now() + PATIENCE;
        let lacks = |map: &ClusterMap| map.shards.get(&shard).is_some_and(|entry| entry.lacks.is_some());
        loop {
            let over = Instant::now() >= until;
            match self.router.elsewhere(shard, at, soon()).await {
                Ok(true) => return Ok(()),
                Ok(false) if over || lacks(&self.control.map()) => break,
                Err(error) if over => return Err(error),
                _ => time::sleep(Duration::from_millis(100)).await,
            }
        }
        let lacking = self.control.update(|map| map.lacking(shard, at), soon()).await?;
        sim::trace::probe("slots: a step taken without the other region");
        sim::warn!(
            "{}: slots move on though the other region does not follow; it does not take over by itself before it has entry {}",
            name_of(shard),
            lacking.shards.get(&shard).and_then(|entry| entry.lacks).unwrap_or(at.index)
        );
        Ok(())
    }

    /// Notes that the other region has the steps that it lacked, once it does.
    async fn steps_elsewhere(&self, map: &ClusterMap) -> Result<bool, Error> {
        if map.holds_still() {
            return Ok(false);
        }
        let mut all = true;
        for (shard, entry) in &map.shards {
            let Some(index) = entry.lacks else { continue };
            let at = Position { epoch: entry.epoch, index, item: 0 };
            match self.router.elsewhere(*shard, at, soon()).await? {
                true => {
                    self.control.update(|map| Ok(map.lacks_no_more(*shard, at)), soon()).await?;
                }
                false => all = false,
            }
        }
        match all {
            true => Ok(false),
            false => Err(Error::Unavailable("the other region does not have all steps of moves yet".into())),
        }
    }

    /// Copies what a sealed move takes along; parts that an earlier copy brought are only counted. How many pieces the source has and the sum of
    /// their hashes, which are those of what has arrived. `None`: the destination has adopted them before.
    async fn copy(&self, map: &ClusterMap, moving: &Move) -> Result<Option<(u64, u128)>, Error> {
        let Move { id, from, to, slots, .. } = moving.clone();
        let (arrived, there) = self.arrived(map, moving).await?;
        let Some(arrived) = arrived else {
            self.settle(map, to, there).await?;
            return Ok(None);
        };
        let (here, at) = self.slots_of(map, from).await?;
        if matches!(here.moving(), Some((of, Moving::Left(_))) if of == id) {
            // It was released, so all had arrived.
            self.settle(map, from, at).await?;
            return Ok(Some((arrived.pieces, arrived.hash)));
        }
        let (mut sequence, mut cursor, mut pieces, mut hash) = (0, vec![], 0, 0u128);
        let (at, none, mut told) = (self.router.at(map, from, &[]), SlotSet::default(), Instant::now());
        loop {
            if sequence == arrived.next && sequence > 0 && cursor != arrived.cursor {
                return Err(Error::Internal(format!("move {id} was copied in other parts before")));
            }
            let ask = Ask::Leaving { id, cursor, bytes_max: PART_BYTES };
            let asked = at.ask(ask, Freshness::Strong, &none, soon()).await?;
            let Found::Leaving(part) = asked.found else { return Err(unexpected()) };
            let bytes: usize = part.pieces.iter().map(Vec::len).sum();
            pieces += part.pieces.len() as u64;
            hash = hash.wrapping_add(part.hash);
            cursor = part.cursor.clone();
            // The end may be an empty part, of which only the first must be told.
            if sequence >= arrived.next && (bytes > 0 || sequence == 0) {
                let import = MoveStep::Import {
                    id,
                    slots: slots.clone(),
                    sequence,
                    pieces: part.pieces,
                    cursor: part.cursor,
                };
                self.step(map, to, import).await?;
                time::sleep(Duration::from_secs_f64(bytes as f64 / COPY_BYTES_PER_S)).await;
            }
            sequence += 1;
            if part.end {
                break;
            }
            if told.elapsed() > Duration::from_secs(2) {
                told = Instant::now();
                sim::info!(
                    "slots {slots} on their way from shard {from} to shard {to}: {pieces} pieces so far"
                );
            }
        }
        // There is no way back from the release: first make sure that all is there.
        let (arrived, there) = self.arrived(map, moving).await?;
        self.settle(map, to, there).await?;
        match arrived {
            Some(arrived) if (arrived.pieces, arrived.hash) == (pieces, hash) => Ok(Some((pieces, hash))),
            Some(arrived) => {
                let problem =
                    format!("{} pieces of {pieces} arrived, or others than were sent", arrived.pieces);
                Err(Error::Internal(format!("move {id}: {problem}; it is not carried out")))
            }
            None => Ok(None),
        }
    }

    /// A step that the next one counts on.
    async fn settled_step(&self, map: &ClusterMap, shard: ShardId, step: MoveStep) -> Result<(), Error> {
        let (_, at) = self.step(map, shard, step).await?;
        self.settle(map, shard, at).await
    }

    /// A step's entry in a shard's ledger, and where that is; of a drop, how many rows are left.
    async fn step(&self, map: &ClusterMap, shard: ShardId, step: MoveStep) -> Result<(u64, Position), Error> {
        let what = format!("{step:?}").chars().take(60).collect::<String>();
        let command = Command {
            tenant: TENANT.into(),
            slot: None,
            idempotency_key: String::new(),
            request_hash: [0; 16],
            now: time::calendar_ms(),
            operation: Operation::Move(step),
        };
        let outcomes = self.router.at(map, shard, &[]).reach.propose(vec![command], soon()).await?;
        match outcomes.first() {
            Some(Outcome::Done { version, position, .. }) => Ok((*version, *position)),
            outcome => Err(Error::Internal(format!("{} refused {what}: {outcome:?}", name_of(shard)))),
        }
    }

    /// Goes on with what is to be erased.
    async fn erasures(&self, map: &ClusterMap) -> Result<bool, Error> {
        if map.holds_still() {
            return Ok(false);
        }
        let (mut more, mut last) = (false, Ok(()));
        for (id, erasure) in map.open_erasures() {
            let missing = erasure.parts.iter().filter(|(_, part)| !part.done);
            let steps = missing.map(|(shard, part)| self.erase(map, (id, erasure), (*shard, part)));
            let (mut done, mut failed) = (vec![], None);
            for step in join_all(steps).await {
                match step {
                    Ok(step) => done.push(step),
                    Err(error) => failed = Some(error),
                }
            }
            let applied = |map: &ClusterMap| {
                let each = |map: ClusterMap, (shard, listed, seen): &(ShardId, Listed, Position)| {
                    map.erased(*shard, listed, *seen)
                };
                Ok(done.iter().fold(map.clone(), each))
            };
            if !done.is_empty() {
                more = true;
                self.control.update(applied, soon()).await?;
            }
            last = failed.map_or(last, Err);
        }
        last.map(|()| more)
    }

    /// Erases on one shard: what its list says then, and where that was seen.
    async fn erase(
        &self,
        map: &ClusterMap,
        (id, erasure): (ErasureId, &Erasure),
        (shard, part): (ShardId, &Part),
    ) -> Result<(ShardId, Listed, Position), Error> {
        let waits = |problem: &str| Err(Error::Unavailable(format!("erasure {id} waits: {problem}")));
        if map.moving().is_some() {
            return waits("slots are on their way");
        }
        let founded = map.shards.get(&shard).filter(|entry| entry.founded);
        let Some(epoch) = founded.map(|entry| entry.epoch) else {
            return waits(&format!("shard {shard} is only being founded"));
        };
        let (subject, before) = (erasure.subject(), part.before());
        loop {
            let operation = Operation::Erase {
                erasure: id,
                subject: subject.clone(),
                epoch,
                before,
                rows_max: ERASE_ROWS,
            };
            let command = Command {
                tenant: erasure.tenant.clone(),
                slot: None,
                idempotency_key: String::new(),
                request_hash: [0; 16],
                now: time::calendar_ms(),
                operation,
            };
            let outcomes = self.router.at(map, shard, &[]).reach.propose(vec![command], soon()).await?;
            match outcomes.into_iter().next() {
                Some(Outcome::Erased { erasure, position }) if erasure.next.is_none() => {
                    let (memories, at) = (erasure.memories, position.index);
                    sim::debug!("shard {shard}: erasure {id} is done at {at}: {memories} memories");
                    sim::trace::probe("erasure: applied on a shard");
                    if before.is_some() {
                        sim::trace::probe("erasure: made again in a later epoch");
                    }
                    return Ok((shard, erasure, position));
                }
                Some(Outcome::Erased { .. }) => time::sleep(Duration::from_millis(5)).await,
                outcome => return waits(&format!("{} did not take it: {outcome:?}", name_of(shard))),
            }
        }
    }

    /// Notes of erasures that the other regions have them, once they do.
    async fn erasures_elsewhere(&self, map: &ClusterMap) -> Result<bool, Error> {
        let serving = map.serving();
        let lacks = |part: &Part| part.done && serving.iter().any(|region| !part.regions.contains(*region));
        // Of each shard all that it has seen, and up to where that goes. Indexes go on from epoch to epoch, and what is certain of an old one is in this one.
        let mut waiting: BTreeMap<ShardId, (u64, Vec<ErasureId>)> = BTreeMap::new();
        for (id, erasure) in map.open_erasures() {
            for (shard, part) in erasure.parts.iter().filter(|(_, part)| lacks(part)) {
                let (index, ids) = waiting.entry(*shard).or_default();
                *index = part.seen.1.max(*index);
                ids.push(id);
            }
        }
        if waiting.is_empty() || map.holds_still() {
            return Ok(false);
        }
        let asked = waiting.into_iter().map(|(shard, (index, ids))| {
            let epoch = epoch_of(map, shard);
            let position = Position { epoch, index, item: u32::MAX };
            async move {
                let there = serving_alone(map)
                    || self.router.elsewhere(shard, position, soon()).await.unwrap_or(false);
                (shard, epoch, ids, there)
            }
        });
        let all = join_all(asked).await;
        let there = |map: &ClusterMap| {
            let each = |map: ClusterMap, (shard, epoch, ids): (&ShardId, &u64, &Vec<ErasureId>)| {
                ids.iter().fold(map, |map, id| map.erased_elsewhere(*id, *shard, *epoch))
            };
            let there = all.iter().filter(|(.., there)| *there);
            Ok(there.map(|(shard, epoch, ids, _)| (shard, epoch, ids)).fold(map.clone(), each))
        };
        let next = self.control.update(there, soon()).await?;
        match all.iter().all(|(.., there)| *there) {
            true => Ok(next.version != map.version),
            false => Err(Error::Unavailable("the other region does not have all erasures yet".into())),
        }
    }

    /// Takes the next step of what replicas are to do.
    async fn replicas(&self, map: &ClusterMap) -> Result<bool, Error> {
        if map.holds_still() {
            return Ok(false);
        }
        let next = self.planned(map, ClusterMap::plan_handover).await?;
        let mut last = Ok(false);
        for (shard, entry) in &next.shards {
            let Some(handover) = entry.handover.filter(|_| entry.founded) else { continue };
            let done = |map: &ClusterMap, how: fn(&ClusterMap, ShardId, Handover) -> ClusterMap| {
                Ok(if_still(map.clone(), *shard, entry.epoch, |map| how(map, *shard, handover)))
            };
            if next.is_lost(handover.to) {
                let without = Membership::Without { node: handover.to };
                if self.reconfigure(&next, *shard, &without).await.is_ok() {
                    sim::info!("shard {shard}: node {} is lost before it had its replica", handover.to);
                    self.control.update(|map| done(map, ClusterMap::cancel_handover), soon()).await?;
                    last = Ok(true);
                    continue;
                }
            }
            match self.hand_over(&next, *shard, handover).await {
                Ok(()) => {
                    let (from, to) =
                        (handover.from.map_or("nobody".into(), |id| id.to_string()), handover.to);
                    sim::info!("shard {shard}: its replica went from node {from} to node {to}");
                    self.control.update(|map| done(map, ClusterMap::end_handover), soon()).await?;
                    last = Ok(true);
                }
                Err(error) => last = Err(error),
            }
        }
        let next = self.planned(&next, ClusterMap::plan_learners).await?;
        // A ledger takes one in at a time; one that is not there must not hold up other shards.
        let of_shards = next.shards.iter().map(|(shard, entry)| {
            let next = &next;
            async move {
                let mut taken = vec![];
                for (node, learner) in &entry.learners {
                    taken.push((*node, *learner, self.learner(next, *shard, (*node, *learner)).await));
                }
                taken
                    .into_iter()
                    .map(move |(node, learner, taken)| (*shard, entry.epoch, node, learner, taken))
            }
        });
        let mut ended = vec![];
        for (shard, epoch, node, learner, taken) in join_all(of_shards).await.into_iter().flatten() {
            match taken {
                Ok(false) => {}
                Ok(true) => {
                    let what = if learner == Learner::Joining { "has" } else { "no longer has" };
                    sim::info!("shard {shard}: node {node} {what} a replica for its views");
                    ended.push((shard, epoch, node, learner));
                }
                Err(error) => last = Err(error),
            }
        }
        if !ended.is_empty() {
            let one = |map: ClusterMap, (shard, epoch, node, learner): &(ShardId, u64, NodeId, Learner)| {
                if_still(map, *shard, *epoch, |map| map.end_learner(*shard, *node, *learner))
            };
            self.control.update(|map| Ok(ended.iter().fold(map.clone(), one)), soon()).await?;
            last = last.and(Ok(true));
        }
        last
    }

    /// The map with a plan in it, written down if it is new.
    async fn planned(
        &self,
        map: &ClusterMap,
        plan: fn(&ClusterMap) -> ClusterMap,
    ) -> Result<std::sync::Arc<ClusterMap>, Error> {
        match plan(map) == *map {
            true => Ok(std::sync::Arc::new(map.clone())),
            false => self.control.update(|map| Ok(plan(map)), soon()).await,
        }
    }

    /// Takes a learner in or lets it go, if that is to be done; whether it was.
    async fn learner(
        &self,
        map: &ClusterMap,
        shard: ShardId,
        (node, learner): (NodeId, Learner),
    ) -> Result<bool, Error> {
        let change = match learner {
            Learner::Serving => return Ok(false),
            // It has become a voter, which the map knows.
            Learner::Leaving if map.shards.get(&shard).is_some_and(|e| e.members.contains(&node)) => {
                return Ok(true);
            }
            Learner::Joining => Membership::Learner { to: node, addr: addr_of(map, node)? },
            Learner::Leaving => Membership::Without { node },
        };
        self.reconfigure(map, shard, &change).await.map(|()| true)
    }

    async fn hand_over(&self, map: &ClusterMap, shard: ShardId, handover: Handover) -> Result<(), Error> {
        let Handover { from, to } = handover;
        self.reconfigure(map, shard, &Membership::Voter { to, addr: addr_of(map, to)?, from }).await
    }

    /// Asks a shard's leader, whoever that is, to change who is in its ledger. One of an epoch before may still take itself for the leader.
    async fn reconfigure(&self, map: &ClusterMap, shard: ShardId, change: &Membership) -> Result<(), Error> {
        let body = bytes::Bytes::from(codec::encode(change));
        let mut last = Error::Unavailable(format!("{} has no leader", name_of(shard)));
        let peers = self.router.peers();
        let epoch = epoch_of(map, shard);
        for addr in &map.addrs(shard) {
            let mut client = peers.client(addr).map_err(|e| Error::Internal(e.to_string()))?;
            let request = peers.request(Body { body: body.clone(), group: shard, epoch }, STEP);
            match time::timeout(STEP, client.reconfigure(request)).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(status)) => last = Error::Unavailable(status.message().to_string()),
                Err(_) => last = Error::Unavailable(format!("{addr} did not answer")),
            }
        }
        Err(last)
    }
}

/// What was done in the ledger that a shard had in an epoch, as a change of the map, unless another epoch has begun meanwhile: that knows nothing of it.
fn if_still(
    map: ClusterMap,
    shard: ShardId,
    epoch: u64,
    change: impl FnOnce(&ClusterMap) -> ClusterMap,
) -> ClusterMap {
    match epoch_of(&map, shard) == epoch {
        true => change(&map),
        false => map,
    }
}

/// The epoch of a shard's ledger; 0: there is no such shard.
fn epoch_of(map: &ClusterMap, shard: ShardId) -> u64 {
    map.shards.get(&shard).map_or(0, |entry| entry.epoch)
}

/// There is no other region.
fn serving_alone(map: &ClusterMap) -> bool {
    map.serving().len() == 1
}

fn addr_of(map: &ClusterMap, node: NodeId) -> Result<String, Error> {
    let addr = map.nodes.get(&node).map(|node| node.addr.clone());
    addr.ok_or_else(|| Error::NotFound(format!("node {node}")))
}

/// A change of who is in a shard's ledger.
#[derive(Clone, Debug, Encode, Decode)]
pub enum Membership {
    /// Who votes: one more, in place of another.
    Voter { to: NodeId, addr: String, from: Option<NodeId> },
    /// One more that does not vote.
    Learner { to: NodeId, addr: String },
    /// One less that does not vote.
    Without { node: NodeId },
}

impl ledger::Ledger {
    /// Changes who is in the group; who is new begins as a learner. Only on the leader; to be called again until it is done.
    pub async fn change(&self, change: Membership) -> Result<(), Error> {
        use openraft::async_runtime::WatchReceiver;
        let failed =
            |error: &dyn std::fmt::Display| Error::Unavailable(format!("{}: {error}", name_of(self.group)));
        let metrics = self.raft.metrics().borrow_watched().clone();
        if !self.raft.is_leader() {
            return Err(failed(&"this replica does not lead"));
        }
        let membership = metrics.membership_config.membership();
        let mut voters: std::collections::BTreeSet<u64> = membership.voter_ids().collect();
        let (to, addr, votes, from) = match change {
            Membership::Voter { to, addr, from } => (to, addr, true, from),
            Membership::Learner { to, addr } => (to, addr, false, None),
            Membership::Without { node } => {
                if voters.contains(&node) {
                    return Err(failed(&format!("node {node} votes")));
                }
                if membership.get_node(&node).is_some() {
                    let without = openraft::ChangeMembers::RemoveNodes([node].into());
                    self.raft.change_membership(without, false).await.map_err(|e| failed(&e))?;
                }
                return Ok(());
            }
        };
        let held = membership.get_node(&to).cloned();
        if voters.contains(&to) && from.is_none_or(|from| !voters.contains(&from)) {
            return Ok(());
        }
        if !voters.contains(&to) {
            let node = openraft::BasicNode::new(addr);
            if held.as_ref() != Some(&node) {
                self.raft.add_learner(to, node, false).await.map_err(|e| failed(&e))?;
            }
            let matched = metrics.replication.as_ref().and_then(|all| all.get(&to).cloned().flatten());
            let behind = metrics.last_log_index.unwrap_or(0) - matched.map_or(0, |log_id| log_id.index);
            if matched.is_none() || behind > BEHIND_MAX {
                return Err(failed(&format!("node {to} is {behind} entries behind, and catches up")));
            }
        }
        if !votes {
            let last = metrics.last_log_index.unwrap_or(0);
            return match self.has_all(to, last).await {
                true => Ok(()),
                false => Err(failed(&format!("node {to} has almost all entries, and catches up"))),
            };
        }
        voters.insert(to);
        voters.retain(|voter| Some(*voter) != from);
        self.raft.change_membership(voters, false).await.map_err(|e| failed(&e))?;
        Ok(())
    }

    /// Waits a moment until a replica has the ledger up to an entry. Only on the leader.
    async fn has_all(&self, node: NodeId, index: u64) -> bool {
        use openraft::async_runtime::WatchReceiver;
        let mut metrics = self.raft.metrics();
        let wait = async {
            loop {
                let now = metrics.borrow_watched().clone();
                let matched = now.replication.as_ref().and_then(|all| all.get(&node).cloned().flatten());
                if matched.is_some_and(|log_id| log_id.index >= index) {
                    return true;
                }
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
        };
        time::timeout(ALMOST, wait).await.unwrap_or(false)
    }
}

/// A learner that is so close may vote, or will have all in a moment.
const BEHIND_MAX: u64 = 100;
/// How long that moment may be.
const ALMOST: Duration = Duration::from_millis(500);
