//! The cache role: memories that were got lately, in bounded memory, each as true as what a replica that lags a little would say.
//!
//! ```text
//!   gateway ── get ──► cache ── known ──► the memory, and the position up to which that is true
//!                        └── not known ──► a replica with the records; kept, unless it changed meanwhile
//!   replica with the records ── what changed after position p ──► cache forgets that, and is at p' from now on
//! ```
//!
//! A cache has no replica: it hears from the shards' replicas which memories each transaction changed ([`storage::Shard::touched_after`]), and
//! forgets those. So it is never asked by writers, and what it says of a position is what a replica at that position would say:
//!
//! | what can go wrong | what keeps it true |
//! |---|---|
//! | a memory changes while it is being read for the cache | what changed lately is remembered; what was read before its last change is not kept |
//! | the cache, or the replica that it hears from, is cut off | its position stands still: sessions that saw more are not answered, nobody is after [`UNHEARD_MAX`] |
//! | what changed since its position is not known any more (a replica started anew, slots moved) | it forgets all of that shard |
//! | a reader is answered with more than the cache's position shows | the answer names the positions that the memory was read between |
//! | a cache dies | gateways ask the replicas instead, after [`crate::router::CACHE_WITHIN`] once, then at once |
//!
//! Strong and bounded reads are not for it: they need a majority's word for each answer. How often a memory was shown is not cached: it may
//! be shown as it was when the memory was read.

use crate::control::Control;
use crate::control::map::ShardId;
use crate::error::Error;
use crate::ledger::left;
use crate::peers::Peers;
use crate::proto::{internal::Body, v1};
use crate::roles::Role;
use crate::router::Router;
use crate::views::{Answered, Ask, Found, Freshness, Query, Touched, WhatChanged};
use quick_cache::Weighter;
use quick_cache::unsync::Cache;
use sim::sync::watch;
use sim::time::{Duration, Instant};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::{Arc, Mutex, MutexGuard};
use storage::codec;
use storage::model::{Memory, MemoryId, Position};
use storage::slots::{Slot, SlotSet};

/// How long a replica may wait for a change before it says that there was none.
const CHANGE_WITHIN: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(100);
/// A cache that has not heard of a shard for longer does not answer for it.
pub const UNHEARD_MAX: Duration = Duration::from_secs(10);
/// Changes that are remembered of a shard.
const LATELY_MAX: usize = 16_384;
/// What a memory takes beside its texts, in bytes, about.
const OVERHEAD: u64 = 400;

#[derive(Clone, Copy, Debug)]
pub struct CacheOptions {
    pub bytes_max: u64,
    /// What was read longer ago is read again.
    pub ttl: Duration,
}

impl Default for CacheOptions {
    fn default() -> CacheOptions {
        CacheOptions { bytes_max: 256 << 20, ttl: Duration::from_secs(600) }
    }
}

/// An answer to a get.
struct Kept {
    tenant: String,
    slot: Option<Slot>,
    memory: Arc<Memory>,
    /// The position that it was read at, at least.
    epoch: u64,
    index: u64,
    /// And at most.
    seen: Position,
    at: Instant,
}

#[derive(Clone)]
struct Weight;

impl Weighter<(ShardId, MemoryId), Kept> for Weight {
    fn weight(&self, _: &(ShardId, MemoryId), kept: &Kept) -> u64 {
        let memory = &kept.memory;
        (memory.text.len() + memory.metadata.len() + 4 * memory.vector.len()) as u64 + OVERHEAD
    }
}

/// How far the cache has heard of a shard.
struct Heard {
    epoch: u64,
    index: u64,
    slots: SlotSet,
    at: Instant,
    /// How old what it heard was then, as far as the replica knew, in milliseconds.
    age_ms: u64,
    /// The last changes of memories after `lately_from`.
    lately: HashMap<MemoryId, u64>,
    lately_from: u64,
}

/// One order of eviction for one history: no random state.
type Memories = Cache<(ShardId, MemoryId), Kept, Weight, BuildHasherDefault<DefaultHasher>>;

fn memories(bytes_max: u64) -> Memories {
    let items = (bytes_max / (4 * OVERHEAD)).clamp(16, 1 << 24) as usize;
    Cache::with(items, bytes_max, Weight, BuildHasherDefault::default(), Default::default())
}

struct State {
    shards: BTreeMap<ShardId, Heard>,
    memories: Memories,
    hits: u64,
    misses: u64,
}

#[derive(Clone)]
pub struct CacheView {
    name: Arc<str>,
    router: Router,
    ttl: Duration,
    state: Arc<Mutex<State>>,
    /// Told whenever a position has moved.
    moved: Arc<watch::Sender<u64>>,
}

fn at((epoch, index): (u64, u64)) -> Position {
    Position { epoch, index, item: 0 }
}

enum Looked {
    Hit(Box<Answered>),
    /// Where the cache is.
    Miss(Position),
    Behind,
    /// What is asked for is of an epoch that is over.
    Over,
}

impl State {
    /// Takes what a replica told, unless it is behind.
    fn hear(&mut self, shard: ShardId, at: Instant, told: WhatChanged) {
        let (epoch, index, slots) = (told.position.epoch, told.position.index, told.slots);
        // What another region goes on with may lack what was kept.
        if self.shards.get(&shard).is_some_and(|heard| heard.epoch < epoch) {
            self.forget(shard);
        }
        let Some(heard) = self.shards.get_mut(&shard) else {
            let (lately, age_ms) = (HashMap::new(), told.age_ms);
            self.shards.insert(shard, Heard { epoch, index, slots, at, age_ms, lately, lately_from: index });
            return;
        };
        if (epoch, index) < (heard.epoch, heard.index) {
            return;
        }
        match told.changed {
            Some(ids) if heard.slots == slots => {
                for id in ids {
                    heard.lately.insert(id, index);
                    if !sim::planted!("keep-in-a-cache-what-was-changed") {
                        self.memories.remove(&(shard, id));
                    }
                }
                if heard.lately.len() > LATELY_MAX {
                    (heard.lately, heard.lately_from) = (HashMap::new(), index);
                }
            }
            _ => {
                (heard.lately, heard.lately_from) = (HashMap::new(), index);
                self.memories.retain(|(of, _), _| *of != shard);
                sim::trace::probe("cache: all of a shard forgotten");
            }
        }
        (heard.index, heard.slots, heard.at, heard.age_ms) = (index, slots, at, told.age_ms);
    }

    fn forget(&mut self, shard: ShardId) {
        self.shards.remove(&shard);
        self.memories.retain(|(of, _), _| *of != shard);
    }

    /// Keeps what was read at a position, unless it may have changed since.
    fn keep(&mut self, shard: ShardId, id: MemoryId, kept: Kept) {
        let Some(heard) = self.shards.get(&shard) else { return };
        let changed = heard.lately.get(&id).is_some_and(|changed| *changed > kept.index);
        let known = kept.epoch == heard.epoch && kept.index >= heard.lately_from && !changed;
        if known || sim::planted!("keep-in-a-cache-what-changed-meanwhile") {
            self.memories.insert((shard, id), kept);
        }
    }
}

impl CacheView {
    pub fn new(name: &str, router: Router, options: CacheOptions) -> CacheView {
        let memories = memories(options.bytes_max);
        let state = State { shards: BTreeMap::new(), memories, hits: 0, misses: 0 };
        CacheView {
            name: name.into(),
            router,
            ttl: options.ttl,
            state: Arc::new(Mutex::new(state)),
            moved: Arc::new(watch::channel(0).0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    pub fn status(&self) -> v1::CacheStatus {
        let state = self.state();
        let (memories, bytes) = (state.memories.len() as u64, state.memories.weight());
        v1::CacheStatus { memories, bytes, hits: state.hits, misses: state.misses }
    }

    /// Follows all shards that the cluster map has, for ever.
    pub async fn follow(self, control: Control, peers: Peers) {
        let mut maps = control.watch();
        let mut last = None;
        loop {
            let map = maps.borrow_and_update().clone();
            // Numbers of shards rise and are not given twice.
            for &shard in map.shards.keys().filter(|shard| last.is_none_or(|last| **shard > last)) {
                sim::task::spawn(self.clone().hear_of(shard, control.clone(), peers.clone()));
            }
            last = last.max(map.shards.keys().last().copied());
            if maps.changed().await.is_err() {
                return;
            }
        }
    }

    async fn hear_of(self, shard: ShardId, control: Control, peers: Peers) {
        let mut turn = sim::rand::below(1 << 16) as usize;
        loop {
            let map = control.map();
            if !map.shards.contains_key(&shard) {
                return self.state().forget(shard);
            }
            let addrs = map.addrs_with(shard, &[Role::Records]);
            let after = self.state().shards.get(&shard).map(|heard| heard.index);
            let (asked, addr) = (Instant::now(), addrs.get(turn % addrs.len().max(1)));
            let told = match addr {
                Some(addr) => what_changed(&peers, addr, shard, after).await,
                None => {
                    Err(Error::Unavailable(format!("no replica of shard {shard} with the records is known")))
                }
            };
            match told {
                // Another one may know more than one where nothing changes.
                Ok(told) => {
                    turn += after.is_some_and(|after| told.position.index <= after) as usize;
                    self.state().hear(shard, asked, told);
                    self.moved.send_modify(|times| *times += 1);
                }
                Err(_) => {
                    turn += 1;
                    sim::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Answers a get; `NotYetVisible`: ask a replica.
    pub async fn query(&self, shard: ShardId, mut query: Query) -> Result<Answered, Error> {
        let deadline = Instant::now() + Duration::from_millis(query.wait_ms);
        let (Ask::Get { tenant, slot, id, now }, needs) = (&query.ask, &query.needs) else {
            // A probe, of whoever found this cache silent.
            let position = Position::default();
            let (found, replica) = (Found::Slots(vec![]), self.name.to_string());
            return Ok(Answered { found, position, seen: position, staleness_ms: u64::MAX, replica });
        };
        let least = match query.freshness {
            Freshness::Any => Position::default(),
            Freshness::AtLeast(position) => position,
            _ => return Err(Error::NotYetVisible),
        };
        let mut moved = self.moved.subscribe();
        let here = loop {
            moved.borrow_and_update();
            match self.look(shard, (tenant, *slot, id), *now, least, needs) {
                Looked::Hit(answered) => return Ok(*answered),
                Looked::Miss(here) => break here,
                // Whether it survived, replicas know.
                Looked::Over => return Err(Error::NotYetVisible),
                Looked::Behind => {
                    let left = left(deadline, || Error::NotYetVisible)?;
                    sim::time::timeout(left, moved.changed()).await.map_err(|_| Error::NotYetVisible)?.ok();
                }
            }
        };
        let (tenant, slot, id) = (tenant.clone(), *slot, *id);
        query.freshness = Freshness::AtLeast(here.max(least));
        let map = self.router.known();
        let replicas = self.router.at(&map, shard, query.ask.needs());
        let answered = replicas.reach.query(query, deadline).await?;
        if let Found::Memory(Some(memory)) = &answered.found {
            let (memory, Position { epoch, index, .. }) = (memory.clone(), answered.position);
            let kept = Kept { tenant, slot, memory, epoch, index, seen: answered.seen, at: Instant::now() };
            sim::rand::buggify_wait("before a cache keeps what it read", 1.0, Duration::from_millis(75))
                .await;
            self.state().keep(shard, id, kept);
        }
        Ok(answered)
    }

    fn look(
        &self,
        shard: ShardId,
        (tenant, slot, id): (&str, Option<Slot>, &MemoryId),
        now: i64,
        least: Position,
        needs: &SlotSet,
    ) -> Looked {
        let mut state = self.state();
        let Some(heard) = state.shards.get(&shard).filter(|heard| heard.at.elapsed() < UNHEARD_MAX) else {
            return Looked::Behind;
        };
        if !heard.slots.includes(needs) || least.epoch > heard.epoch {
            return Looked::Behind;
        }
        if least.epoch < heard.epoch && least.index > 0 {
            return Looked::Over;
        }
        let (epoch, least) = (heard.epoch, least.index);
        let (here, age_ms) =
            (heard.index, heard.age_ms.saturating_add(heard.at.elapsed().as_millis() as u64));
        let good = |kept: &&Kept| {
            kept.tenant == tenant
                && kept.slot == slot
                && !kept.memory.expired(now)
                && kept.at.elapsed() < self.ttl
        };
        let kept = state.memories.get(&(shard, *id)).filter(good);
        let found = kept.map(|kept| (kept.memory.clone(), kept.index.max(here), kept.seen));
        match found {
            Some((memory, index, seen)) if index >= least => {
                state.hits += 1;
                sim::trace::probe("cache: answered");
                Looked::Hit(Box::new(Answered {
                    found: Found::Memory(Some(memory)),
                    position: at((epoch, index)),
                    seen: seen.max(at((epoch, index))),
                    staleness_ms: age_ms,
                    replica: self.name.to_string(),
                }))
            }
            _ if here < least => Looked::Behind,
            _ => {
                state.misses += 1;
                Looked::Miss(at((epoch, here)))
            }
        }
    }
}

async fn what_changed(
    peers: &Peers,
    addr: &str,
    shard: ShardId,
    after: Option<u64>,
) -> Result<WhatChanged, Error> {
    let internal = |e: &dyn std::fmt::Display| Error::Internal(e.to_string());
    let ask = Touched { after, wait_ms: CHANGE_WITHIN.as_millis() as u64 };
    let body = Body { body: codec::encode(&ask).into(), group: shard, epoch: 0 };
    let mut client = peers.client(addr).map_err(|e| internal(&e))?;
    let ttl = CHANGE_WITHIN * 2;
    match sim::time::timeout(ttl, client.touched(peers.request(body, ttl))).await {
        Ok(Ok(reply)) => codec::decode(&reply.into_inner().body).map_err(|e| internal(&e)),
        Ok(Err(status)) => Err(Error::Unavailable(format!("{addr}: {}", status.message()))),
        Err(_) => Err(Error::Unavailable(format!("{addr} did not answer in time"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert;
    use crate::proto::v1::NewMemory;

    fn told(index: u64, changed: Option<Vec<MemoryId>>) -> WhatChanged {
        WhatChanged { position: at((1, index)), slots: SlotSet::all(), changed, age_ms: 0 }
    }

    fn kept(id: u8, index: u64) -> Result<Kept, Error> {
        let new = NewMemory {
            id: convert::id_text(&[id; 16]),
            user: "u".into(),
            text: "x".into(),
            ..Default::default()
        };
        let memory = Arc::new(convert::new_memory("t", new, "", 0)?);
        let seen = at((1, index));
        Ok(Kept { tenant: "t".into(), slot: None, memory, epoch: 1, index, seen, at: Instant::now() })
    }

    fn state(bytes_max: u64) -> State {
        State { shards: BTreeMap::new(), memories: memories(bytes_max), hits: 0, misses: 0 }
    }

    #[test]
    fn what_changed_is_forgotten_and_what_changed_meanwhile_is_not_kept() -> Result<(), Error> {
        let (mut state, now) = (state(1 << 20), Instant::now());
        let has = |state: &State, id: u8| state.memories.get(&(0, [id; 16])).is_some();
        state.keep(0, [1; 16], kept(1, 10)?);
        assert!(!has(&state, 1), "nothing was heard of the shard yet");
        state.hear(0, now, told(10, None));
        state.keep(0, [1; 16], kept(1, 9)?);
        assert!(!has(&state, 1), "what changed between 9 and 10 is not known");
        for id in 1..4 {
            state.keep(0, [id; 16], kept(id, 10)?);
        }
        state.hear(0, now, told(12, Some(vec![[1; 16]])));
        assert_eq!((has(&state, 1), has(&state, 2)), (false, true));
        state.keep(0, [1; 16], kept(1, 11)?);
        assert!(!has(&state, 1), "it may be from before the change");
        state.keep(0, [1; 16], kept(1, 12)?);
        assert!(has(&state, 1));
        // A replica that is behind tells nothing new, and of another shard nothing is known.
        state.hear(0, now, told(11, Some(vec![[2; 16]])));
        assert!(has(&state, 2) && state.shards.get(&0).is_some_and(|heard| heard.index == 12));
        // Anything may have changed: all of it goes.
        state.hear(0, now, told(20, None));
        assert!(state.memories.is_empty());
        state.keep(0, [1; 16], kept(1, 20)?);
        let slots = (0..5).collect();
        state.hear(0, now, WhatChanged { slots, ..told(21, Some(vec![])) });
        assert!(state.memories.is_empty(), "slots have gone");
        Ok(())
    }

    #[test]
    fn a_cache_stays_within_its_bytes_and_is_the_same_each_time() -> Result<(), Error> {
        let fill = || -> Result<Vec<u8>, Error> {
            let mut state = state(20 * (OVERHEAD + 1));
            state.hear(0, Instant::now(), told(1, None));
            for id in (0..200).chain(0..50) {
                state.keep(0, [id; 16], kept(id, 1)?);
                assert!(state.memories.weight() <= state.memories.capacity());
            }
            Ok((0..200).filter(|id| state.memories.peek(&(0, [*id; 16])).is_some()).collect())
        };
        let first = fill()?;
        assert!((10..=20).contains(&first.len()), "{first:?}");
        assert_eq!(first, fill()?);
        Ok(())
    }
}
