//! The router: from what is asked to the shards that have it, by the cluster map.
//!
//! ```text
//!   commands ─► slot of each ─► shard of the slot ─► its ledger ─► outcomes, in the order of the commands
//!   question ─► shards that it needs ─► one replica of each, side by side ─► answers
//! ```
//!
//! A map may be old. Every shard decides for itself whether a slot is its own ([`storage::slots`]); what it is not gets NOT_HERE, which means that
//! nothing was done: the router reads the map again and asks elsewhere, until the caller's deadline. So a write lands on one shard only,
//! and an answer that is put together from several shards was given by shards that showed all of what it needed: each is asked
//! whether it shows the slots that the map gives it.
//!
//! Gets that need not be strong are asked of a cache first, where nodes have that role ([`crate::cache`]), and of a replica if it does not answer.
//!
//! A call that names a memory by its id alone must find its slot. Ids that Loci makes carry it ([`with_slot`]); other ids are looked up, and
//! remembered: a memory never changes its slot.

use crate::control::Control;
use crate::control::map::{ClusterMap, ShardId};
use crate::error::Error;
use crate::groups::Groups;
use crate::ledger::left;
use crate::peers::Peers;
use crate::reach::Reach;
use crate::remote::Remote;
use crate::roles::Role;
use crate::views::{Answered, Ask, Found, Freshness, Query};
use futures::future::{join_all, try_join_all};
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use storage::model::*;
use storage::slots::{SLOTS, Slot, SlotSet, slot_of};

/// How long a cache may take before a replica is asked instead.
pub const CACHE_WITHIN: Duration = Duration::from_millis(100);
/// Ids whose slots are remembered.
const LOCATED_MAX: usize = 20_000;

/// How fresh a read must be, on every shard that it asks.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub freshness: Option<Freshness>,
    /// For a session: what it has seen of each shard. A shard that it names not at all may answer as it is.
    pub token: BTreeMap<ShardId, Position>,
    /// The map by which the session's last call was routed.
    pub map_version: u64,
}

impl Reading {
    pub fn strong() -> Reading {
        Reading { freshness: Some(Freshness::Strong), ..Reading::default() }
    }

    pub fn any() -> Reading {
        Reading { freshness: Some(Freshness::Any), ..Reading::default() }
    }

    fn of(&self, shard: ShardId) -> Freshness {
        let seen = self.token.get(&shard).map_or(Freshness::Any, |position| Freshness::AtLeast(*position));
        self.freshness.unwrap_or(seen)
    }
}

/// What came of a command, and on which shard.
pub type Decided = Result<(ShardId, Outcome), Error>;

/// One question to one shard: what is asked, and the slots that it must show.
pub type Part = (ShardId, Ask, SlotSet);

/// The same question to every shard, each of which must show all that is its own.
pub fn everywhere(map: &ClusterMap, ask: impl Fn() -> Ask) -> Vec<Part> {
    map.shards.iter().map(|(id, shard)| (*id, ask(), shard.slots.clone())).collect()
}

#[derive(Clone)]
pub struct Router {
    control: Control,
    groups: Groups,
    peers: Peers,
    here: String,
    /// Of an edge without a place in the map.
    region: Option<String>,
    /// The ways to shards' replicas elsewhere, with what is known of how they answer.
    ways: Arc<Mutex<BTreeMap<ShardId, Vec<Way>>>>,
    /// The nodes that cache, each by itself.
    caches: Arc<Mutex<BTreeMap<String, Remote>>>,
    located: Arc<Mutex<BTreeMap<(String, MemoryId), Seat>>>,
}

/// A slot, and the tenant whose it is: what is GLOBAL lies in other shards than the same slot of a tenant that is pinned.
pub type Seat = (Slot, String);

/// What a shard must show to answer for one slot.
pub fn only((slot, tenant): &Seat) -> SlotSet {
    SlotSet::of_tenant(tenant, [*slot].into_iter().collect())
}

/// The way to those of a shard's replicas that have some roles, by the map of a version.
struct Way {
    version: u64,
    needs: &'static [Role],
    remote: Remote,
}

/// The way to a shard.
pub struct At {
    pub reach: Reach,
}

impl At {
    pub async fn ask(
        &self,
        ask: Ask,
        freshness: Freshness,
        needs: &SlotSet,
        deadline: Instant,
    ) -> Result<Answered, Error> {
        self.reach.query(Query { freshness, wait_ms: 0, ask, needs: needs.clone() }, deadline).await
    }
}

/// A made id with its memory's slot in the twelve bits behind its version.
pub fn with_slot(mut id: MemoryId, slot: Slot) -> MemoryId {
    id[6] = (id[6] & 0xf0) | (slot >> 8) as u8;
    id[7] = slot as u8;
    id
}

/// Where the slot stands in an id that Loci made; in any other it means nothing.
fn slot_in(id: &MemoryId) -> Slot {
    (u16::from(id[6] & 0x0f) << 8 | u16::from(id[7])) % SLOTS
}

/// A shard that was not yet told its slots would take what is not its own.
fn founded(map: &ClusterMap, shard: ShardId) -> Result<(), Error> {
    match map.shards.get(&shard).is_some_and(|entry| entry.founded) {
        true => Ok(()),
        false => Err(Error::NotHere(format!("shard {shard} is only being founded"))),
    }
}

enum Place {
    At(ShardId, Option<Slot>),
    /// No memory with that id is or was.
    Nowhere,
}

impl Router {
    pub fn new(
        control: Control,
        groups: Groups,
        peers: Peers,
        (here, region): (String, Option<String>),
    ) -> Router {
        let (ways, caches, located) = Default::default();
        Router { control, groups, peers, here, region, ways, caches, located }
    }

    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// The way to those of a shard's replicas that have some roles, by a map; without any, to those that vote.
    pub fn at(&self, map: &ClusterMap, shard: ShardId, needs: &'static [Role]) -> At {
        let at = |remote| At { reach: Reach { groups: self.groups.clone(), group: shard, needs, remote } };
        let mut all = self.ways.lock().unwrap_or_else(|p| p.into_inner());
        if !all.contains_key(&shard) {
            all.retain(|shard, _| map.shards.contains_key(shard));
        }
        let ways = all.entry(shard).or_default();
        if let Some(way) = ways.iter().find(|way| way.version == map.version && way.needs == needs) {
            return at(way.remote.clone());
        }
        let mut addrs = if needs.is_empty() { map.addrs(shard) } else { map.addrs_with(shard, needs) };
        addrs.retain(|addr| *addr != self.here);
        // Those of the own region first.
        let region = map.region_at(&self.here).or(self.region.as_deref());
        let is_near = |addr: &String| region.is_none() || map.region_at(addr) == region;
        addrs.sort_by_key(|addr| !is_near(addr));
        let near = addrs.iter().filter(|addr| is_near(addr)).count();
        // What is known of replicas outlives changes that are not theirs, and is shared by all who ask the same ones.
        let known = ways.iter().map(|way| &way.remote).find(|remote| remote.addrs() == addrs).cloned();
        let remote = known.unwrap_or_else(|| Remote::new(self.peers.clone(), shard, addrs, near));
        ways.retain(|way| way.needs != needs);
        ways.push(Way { version: map.version, needs, remote: remote.clone() });
        at(remote)
    }

    /// The cache to ask for a memory, if no replica of this process has it: the same one whoever asks, for as long as the same ones are trusted.
    fn cache(&self, map: &ClusterMap, reach: &Reach, ask: &Ask, freshness: &Freshness) -> Option<Remote> {
        let (Ask::Get { tenant, id, .. }, Freshness::Any | Freshness::AtLeast(_)) = (ask, freshness) else {
            return None;
        };
        let addrs = map.caches();
        if addrs.is_empty() || reach.here(ask).is_some() {
            return None;
        }
        let shard = reach.group;
        let mut caches = self.caches.lock().unwrap_or_else(|p| p.into_inner());
        caches.retain(|addr, _| addrs.contains(addr));
        let of = |addr: String| {
            let new = || Remote::new(self.peers.clone(), shard, vec![addr.clone()], 1);
            caches.entry(addr.clone()).or_insert_with(new).of(shard)
        };
        let all: Vec<Remote> = addrs.into_iter().map(of).collect();
        let trusted: Vec<&Remote> = all.iter().filter(|cache| cache.is_trusted()).collect();
        let mut hash = sim::trace::Hash::default();
        hash.bytes(tenant.as_bytes());
        hash.bytes(id);
        // Rendezvous: whose own hash with the memory's is the greatest.
        let weight = |cache: &&Remote| {
            let mut hash = hash.clone();
            hash.bytes(cache.addrs()[0].as_bytes());
            hash.value()
        };
        trusted.into_iter().max_by_key(weight).cloned()
    }

    /// The parts of a question: two where no replica that the map knows has all that is needed.
    fn parts(&self, map: &ClusterMap, (shard, ask, needs): Part) -> Vec<Part> {
        match ask.split() {
            Some(halves) if map.addrs_with(shard, ask.needs()).is_empty() => {
                halves.into_iter().map(|half| (shard, half, needs.clone())).collect()
            }
            _ => vec![(shard, ask, needs)],
        }
    }

    /// Waits until the region that takes no writes has a position on the disks of a majority of its replicas; false if the time is up before that.
    /// An error: nobody who leads the shard says so.
    pub async fn elsewhere(
        &self,
        shard: ShardId,
        position: Position,
        deadline: Instant,
    ) -> Result<bool, Error> {
        self.at(&self.known(), shard, &[]).reach.elsewhere(position, deadline).await
    }

    /// The way to change the map.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The newest map that this node knows.
    pub fn known(&self) -> Arc<ClusterMap> {
        self.control.map()
    }

    /// A map of at least `version`; waits for the first one.
    pub async fn map(&self, version: u64, deadline: Instant) -> Result<Arc<ClusterMap>, Error> {
        self.control.at_least(version, deadline).await
    }

    /// After a shard said NOT_HERE: reads the map, and waits a little if that is the one that was used.
    async fn look_again(&self, used: u64, pause: &mut Duration, deadline: Instant) -> Result<(), Error> {
        let moving = || Error::Unavailable("what was asked for is on its way to another shard".into());
        let left = left(deadline, moving)?;
        let read = self.control.read(deadline.min(Instant::now() + Duration::from_secs(1))).await;
        if read.is_err() || read.is_ok_and(|map| map.version == used) {
            time::sleep((*pause).min(left)).await;
            *pause = (*pause * 2).min(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Asks the shards that `plan` names by the map, side by side; their answers in that order. A search by vector and words has two
    /// answers where no replica has both.
    pub async fn ask(
        &self,
        reading: &Reading,
        deadline: Instant,
        plan: impl Fn(&ClusterMap) -> Vec<Part>,
    ) -> Result<Vec<(ShardId, Answered)>, Error> {
        let mut pause = Duration::from_millis(5);
        loop {
            let map = self.map(reading.map_version, deadline).await?;
            let parts = plan(&map).into_iter().flat_map(|part| self.parts(&map, part));
            let parts = parts.map(|(shard, ask, needs)| {
                let (at, freshness, founded) =
                    (self.at(&map, shard, ask.needs()), reading.of(shard), founded(&map, shard));
                let cache = self.cache(&map, &at.reach, &ask, &freshness);
                async move {
                    founded?;
                    if let Some(cache) = cache {
                        let query = Query { freshness, wait_ms: 0, ask: ask.clone(), needs: needs.clone() };
                        let within = CACHE_WITHIN.min(deadline - Instant::now());
                        if let Some(answered) = cache.first(&query, within).await {
                            return Ok((shard, answered));
                        }
                    }
                    at.ask(ask, freshness, &needs, deadline).await.map(|answered| (shard, answered))
                }
            });
            match try_join_all(parts).await {
                Err(Error::NotHere(_)) => self.look_again(map.version, &mut pause, deadline).await?,
                answers => return answers,
            }
        }
    }

    /// The same question to every shard.
    pub async fn ask_all(
        &self,
        reading: &Reading,
        deadline: Instant,
        ask: impl Fn() -> Ask,
    ) -> Result<Vec<(ShardId, Answered)>, Error> {
        self.ask(reading, deadline, |map| everywhere(map, &ask)).await
    }

    /// A question about one memory: to the shard that has its slot, or to all if nobody knows of it.
    pub async fn ask_of(
        &self,
        (tenant, id): (&str, &MemoryId),
        reading: &Reading,
        deadline: Instant,
        ask: impl Fn(Option<Slot>) -> Ask,
    ) -> Result<Vec<(ShardId, Answered)>, Error> {
        let map = self.map(reading.map_version, deadline).await?;
        let seat = match map.shards.len() {
            1 => None,
            _ => self.locate(tenant, id, deadline).await?,
        };
        self.ask(reading, deadline, |map| {
            let of = seat.as_ref().and_then(|seat| Some((seat, map.shard_of(&seat.1, seat.0)?)));
            match of {
                Some((seat, shard)) => vec![(shard, ask(Some(seat.0)), only(seat))],
                None => everywhere(map, || ask(None)),
            }
        })
        .await
    }

    /// The slot of a memory that is or was; `None` if there never was one.
    pub async fn locate(
        &self,
        tenant: &str,
        id: &MemoryId,
        deadline: Instant,
    ) -> Result<Option<Seat>, Error> {
        let key = (tenant.to_string(), *id);
        if let Some(seat) = self.located.lock().unwrap_or_else(|p| p.into_inner()).get(&key) {
            return Ok(Some(seat.clone()));
        }
        let ask = || Ask::Locate { tenant: tenant.into(), id: *id };
        let found = |answers: Vec<(ShardId, Answered)>| {
            let seats = answers.into_iter().flat_map(|(_, answered)| match answered.found {
                Found::Slots(seats) => seats,
                _ => vec![],
            });
            seats.min_by_key(|(slot, of)| (*slot, of != tenant))
        };
        // First where a made id says, then everywhere; what a replica that lags knows is true, what it does not know may be.
        let map = self.map(0, deadline).await?;
        let hinted = map.shard_of(tenant, slot_in(id)).map(|shard| (shard, ask(), SlotSet::default()));
        let mut seat =
            found(self.ask(&Reading::any(), deadline, |_| hinted.clone().into_iter().collect()).await?);
        for reading in [Reading::any(), Reading::strong()] {
            if seat.is_none() {
                seat = found(self.ask_all(&reading, deadline, ask).await?);
            }
        }
        if let Some(seat) = &seat {
            let mut located = self.located.lock().unwrap_or_else(|p| p.into_inner());
            if located.len() >= LOCATED_MAX {
                located.clear();
            }
            located.insert(key, seat.clone());
        }
        Ok(seat)
    }

    /// Where a command is decided.
    async fn place(&self, map: &ClusterMap, command: &Command, deadline: Instant) -> Result<Place, Error> {
        let slot = match (command.operation.plain(), command.slot) {
            (_, Some(slot)) => slot,
            (_, None) if map.shards.len() == 1 => {
                return Ok(map.shards.keys().next().map_or(Place::Nowhere, |shard| Place::At(*shard, None)));
            }
            (Operation::Add(memory), None) => slot_of(&memory.owner(), &memory.id),
            (Operation::Update { id, .. } | Operation::Delete { id, .. }, None) => {
                match self.locate(&command.tenant, id, deadline).await? {
                    Some((slot, _)) => slot,
                    None => return Ok(Place::Nowhere),
                }
            }
            (_, None) => {
                return Err(Error::Internal("a command that has no place in a cluster of shards".into()));
            }
        };
        let missing = || Error::Internal(format!("slot {slot} has no shard"));
        let shard = map.shard_of(&command.tenant, slot).ok_or_else(missing)?;
        Ok(Place::At(shard, Some(slot)))
    }

    /// Proposes commands, each where it belongs; what came of each, in order, and the version of the map that led there.
    pub async fn propose(&self, commands: Vec<Command>, deadline: Instant) -> (Vec<Decided>, u64) {
        let mut decided: Vec<Option<Decided>> = commands.iter().map(|_| None).collect();
        let mut pause = Duration::from_millis(5);
        let mut version = 0;
        while decided.iter().any(Option::is_none) {
            let result = self.propose_some(&commands, &mut decided, &mut version, deadline).await;
            let result = match result {
                Ok(true) => self.look_again(version, &mut pause, deadline).await,
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                decided.iter_mut().filter(|d| d.is_none()).for_each(|d| *d = Some(Err(error.clone())));
            }
        }
        (decided.into_iter().flatten().collect(), version)
    }

    /// Proposes what is not decided yet; whether some of it was not where the map says.
    async fn propose_some(
        &self,
        commands: &[Command],
        decided: &mut [Option<Decided>],
        version: &mut u64,
        deadline: Instant,
    ) -> Result<bool, Error> {
        let map = self.map(0, deadline).await?;
        *version = map.version;
        let mut parts: BTreeMap<ShardId, (Vec<usize>, Vec<Command>)> = BTreeMap::new();
        for (at, command) in
            commands.iter().enumerate().filter(|(at, _)| decided[*at].is_none()).collect::<Vec<_>>()
        {
            match self.place(&map, command, deadline).await? {
                Place::At(shard, slot) => {
                    let part = parts.entry(shard).or_default();
                    part.0.push(at);
                    part.1.push(Command { slot, ..command.clone() });
                }
                Place::Nowhere => {
                    let id = command.operation.id().unwrap_or_default();
                    decided[at] = Some(Ok((0, Outcome::NotFound { id })));
                }
            }
        }
        let attempts = parts.into_iter().map(|(shard, (places, commands))| {
            let (at, founded) = (self.at(&map, shard, &[]), founded(&map, shard));
            async move {
                let outcomes = match founded {
                    Ok(()) => at.reach.propose(commands, deadline).await,
                    Err(error) => Err(error),
                };
                (shard, places, outcomes)
            }
        });
        let mut elsewhere = false;
        for (shard, places, outcomes) in join_all(attempts).await {
            match outcomes {
                Ok(outcomes) if outcomes.len() == places.len() => {
                    for (place, outcome) in places.into_iter().zip(outcomes) {
                        match outcome {
                            Outcome::NotHere => elsewhere = true,
                            outcome => decided[place] = Some(Ok((shard, outcome))),
                        }
                    }
                }
                Ok(_) => {
                    let error = Error::Internal("the ledger gave too few outcomes".into());
                    places.into_iter().for_each(|place| decided[place] = Some(Err(error.clone())));
                }
                Err(Error::NotHere(_)) => elsewhere = true,
                Err(error) => places.into_iter().for_each(|place| decided[place] = Some(Err(error.clone()))),
            }
        }
        Ok(elsewhere)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_id_carries_its_slot_and_stays_a_uuid() {
        for slot in [0, 1, 255, 256, SLOTS - 1] {
            let made = uuid::Builder::from_unix_timestamp_millis(1_793_491_200_000, &[0xa5; 10]);
            let id = with_slot(made.into_uuid().into_bytes(), slot);
            assert_eq!(slot_in(&id), slot);
            assert_eq!(uuid::Uuid::from_bytes(id).get_version_num(), 7);
        }
    }
}
