//! The views of one shard, as readers ask them.

use crate::error::Error;
use crate::ledger::{Ledger, recovery};
use crate::roles::{self, Role, Roles};
use bincode::{Decode, Encode};
use sim::cpu::cost;
use sim::time::{Duration, Instant};
use std::sync::Arc;
use storage::graph::{Walk, Walked};
use storage::model::*;
use storage::slots::{MoveId, Slot, SlotSet, Slots};
use storage::{Hit, Leaving, ListQuery, Page, Partition, SearchQuery, Shard, StorageError};

/// A question, and how fresh the answer must be.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Query {
    pub freshness: Freshness,
    /// Milliseconds that the replica may wait until it is that fresh.
    pub wait_ms: u64,
    pub ask: Ask,
    /// Slots that must be shown where it is answered; else the answer is NOT_HERE.
    pub needs: SlotSet,
}

#[derive(Clone, Copy, Debug, Encode, Decode)]
pub enum Freshness {
    /// Whatever the replica has.
    Any,
    /// At least this position.
    AtLeast(Position),
    /// Everything acknowledged before the call.
    Strong,
    /// Everything acknowledged up to this many milliseconds before the call.
    Bounded(u64),
}

#[derive(Clone, Debug, Encode, Decode)]
pub enum Ask {
    Get {
        tenant: String,
        slot: Option<Slot>,
        id: MemoryId,
        now: UnixMs,
    },
    List(ListQuery),
    History {
        tenant: String,
        slot: Option<Slot>,
        id: MemoryId,
    },
    Changes {
        tenant: String,
        after: Position,
        limit: u32,
    },
    /// By the vector, and by the words if there are any.
    Search(SearchQuery),
    /// By the words alone.
    Words(SearchQuery),
    Walk(Walk),
    /// The edges of a walk's start, whatever is at their other ends.
    Edges(Walk),
    Partitions,
    /// Which slots the shard has, and its part in a move.
    Slots,
    /// The slots in which a memory with that id is or was.
    Locate {
        tenant: String,
        id: MemoryId,
    },
    /// A part of what a move takes along.
    Leaving {
        id: MoveId,
        cursor: Vec<u8>,
        bytes_max: usize,
    },
}

impl Ask {
    /// How many kinds there are, which differ in what they cost.
    pub const KINDS: usize = 6;

    /// What a replica must have to answer.
    pub fn needs(&self) -> &'static [Role] {
        match self {
            Ask::Search(query) if !query.text.is_empty() => &[Role::Records, Role::Vector],
            Ask::Search(_) => &[Role::Vector],
            Ask::Walk(_) | Ask::Edges(_) => &[Role::Graph],
            Ask::Slots | Ask::Leaving { .. } => &[],
            _ => &[Role::Records],
        }
    }

    /// The same question in two, of which no part needs two roles; `None` if none does.
    pub fn split(&self) -> Option<[Ask; 2]> {
        match self {
            Ask::Search(query) if self.needs().len() > 1 => {
                let by_vector = SearchQuery { text: String::new(), ..query.clone() };
                Some([Ask::Search(by_vector), Ask::Words(query.clone())])
            }
            _ => None,
        }
    }

    /// The number of its kind.
    pub fn kind(&self) -> usize {
        match self {
            Ask::Get { .. } | Ask::Locate { .. } | Ask::Slots => 0,
            Ask::List(_) => 1,
            Ask::History { .. } => 2,
            Ask::Changes { .. } => 3,
            Ask::Search(_) | Ask::Words(_) => 4,
            Ask::Walk(_) | Ask::Edges(_) | Ask::Partitions | Ask::Leaving { .. } => 5,
        }
    }
}

#[derive(Clone, Debug, Encode, Decode)]
pub enum Found {
    Memory(Option<Arc<Memory>>),
    Page(Page),
    Changes(Vec<Change>),
    Hits(Vec<Hit>),
    Walked(Walked),
    Edges(Vec<Edge>),
    Partitions(Vec<Partition>),
    State(Slots),
    Slots(Vec<(Slot, String)>),
    Leaving(Leaving),
}

/// An answer of another kind than its question: a bug of whoever gave it.
pub fn unexpected() -> Error {
    Error::Internal("another question was answered than the one that was asked".into())
}

/// An answer, and between which positions it was read.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Answered {
    pub found: Found,
    /// What it shows at least.
    pub position: Position,
    /// What it shows at most: who has seen it must not be shown less.
    pub seen: Position,
    pub staleness_ms: u64,
    pub replica: String,
}

/// Which memories changed? What a cache asks.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Touched {
    /// After this index of the ledger; at first it asks only where the replica is.
    pub after: Option<u64>,
    /// How long the replica may wait for a change, in milliseconds.
    pub wait_ms: u64,
}

#[derive(Clone, Debug, Encode, Decode)]
pub struct WhatChanged {
    /// Where the replica is, and the slots that it shows there.
    pub position: Position,
    pub slots: SlotSet,
    /// What changed up to there; `None`: anything may have.
    pub changed: Option<Vec<MemoryId>>,
    /// When the replica last heard that it was up to date, in milliseconds before now.
    pub age_ms: u64,
}

/// Scans of more vectors than this leave the executor, so that small searches do not wait behind them.
const INLINE_VECTORS_MAX: usize = 20_000;

/// The views of this process's replica.
pub struct LocalViews {
    pub ledger: Ledger,
    pub name: String,
    /// What is kept here.
    pub roles: Roles,
    /// When a read position was last asked for and then published here.
    fresh: std::sync::Mutex<Option<Instant>>,
}

impl LocalViews {
    pub fn new(ledger: Ledger, name: String, roles: Roles) -> LocalViews {
        LocalViews { ledger, name, roles, fresh: std::sync::Mutex::new(None) }
    }

    fn fresh_since(&self) -> Option<Instant> {
        *self.fresh.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Waits until this replica shows everything acknowledged before the call.
    async fn catch_up(&self, deadline: Instant) -> Result<(), Error> {
        let asked = Instant::now();
        let position = self.ledger.read_position(deadline).await?;
        sim::rand::buggify_wait("between a read's position and its read", 0.05, Duration::from_millis(100))
            .await;
        if !sim::planted!("read-before-the-position-is-published") {
            self.ledger.wait_published(position, deadline).await?;
        }
        let mut fresh = self.fresh.lock().unwrap_or_else(|p| p.into_inner());
        *fresh = (*fresh).max(Some(asked));
        Ok(())
    }

    async fn make_fresh(&self, freshness: Freshness, deadline: Instant) -> Result<u64, Error> {
        match freshness {
            Freshness::Any => {}
            Freshness::AtLeast(position) => {
                self.ledger.wait_published(self.ledger.surviving(position)?, deadline).await?;
            }
            Freshness::Bounded(ms) => {
                let age = self.fresh_since().map(|at| at.elapsed());
                if age.is_none_or(|age| age > Duration::from_millis(ms)) {
                    self.catch_up(deadline).await?;
                }
            }
            Freshness::Strong => {
                if !sim::planted!("trust-a-learner-to-be-fresh") || self.ledger.votes() {
                    self.catch_up(deadline).await?;
                }
                return Ok(0);
            }
        }
        Ok(self.fresh_since().map_or(u64::MAX, |at| at.elapsed().as_millis() as u64))
    }
}

fn answer(shard: &Shard, ask: Ask) -> Result<Found, StorageError> {
    match ask {
        Ask::Get { tenant, slot, id, now } => shard.get(&tenant, slot, &id, now).map(Found::Memory),
        Ask::List(query) => shard.list(&query).map(Found::Page),
        Ask::History { tenant, slot, id } => shard.history(&tenant, slot, &id).map(Found::Changes),
        Ask::Changes { tenant, after, limit } => {
            shard.changes_after(&tenant, after, limit as usize).map(Found::Changes)
        }
        Ask::Search(query) => shard.search(&query).map(Found::Hits),
        Ask::Words(query) => shard.by_words(&query).map(Found::Hits),
        Ask::Walk(walk) => shard.walk(&walk).map(Found::Walked),
        Ask::Edges(walk) => shard.edges_of(&walk).map(Found::Edges),
        Ask::Partitions => shard.partitions().map(Found::Partitions),
        Ask::Slots => Ok(Found::State(shard.slots())),
        Ask::Locate { tenant, id } => shard.locate(&tenant, &id).map(Found::Slots),
        Ask::Leaving { id, cursor, bytes_max } => shard.leaving(id, &cursor, bytes_max).map(Found::Leaving),
    }
}

/// Whether a state shows what is asked for. It is asked before and after the read.
fn shown(needs: &SlotSet, slots: &Slots) -> Result<(), Error> {
    match slots.owned().includes(needs) || sim::planted!("answer-for-a-slot-that-is-elsewhere") {
        true => Ok(()),
        false => Err(Error::NotHere("this replica does not show all that was asked for".into())),
    }
}

impl LocalViews {
    /// Whether this replica keeps what a question needs.
    pub fn answers(&self, ask: &Ask) -> bool {
        ask.needs().iter().all(|role| self.roles.contains(role)) || sim::planted!("answer-without-the-view")
    }

    /// Tells a cache what changed.
    pub async fn touched(&self, asked: Touched) -> Result<WhatChanged, Error> {
        if !self.roles.contains(&Role::Records) {
            return Err(Error::Unavailable(format!("{} has not the role records", self.name)));
        }
        if let Some(after) = asked.after {
            let epoch = self.ledger.shard.applied().0.epoch;
            let next = Position { epoch, index: after + 1, item: 0 };
            let until = Instant::now() + Duration::from_millis(asked.wait_ms);
            match self.ledger.wait_published(next, until).await {
                Ok(()) | Err(Error::NotYetVisible) => {}
                Err(error) => return Err(error),
            }
        }
        let age_ms = self.fresh_since().map_or(u64::MAX, |at| at.elapsed().as_millis() as u64);
        let (position, slots, changed) = self.ledger.shard.touched_after(asked.after.unwrap_or(u64::MAX));
        Ok(WhatChanged { position, slots, changed: changed.filter(|_| asked.after.is_some()), age_ms })
    }

    /// Answers from this replica.
    pub async fn query(&self, query: Query) -> Result<Answered, Error> {
        if !self.answers(&query.ask) {
            let needs = roles::names(query.ask.needs()).join(", ");
            return Err(Error::Unavailable(format!("{} has not the role {needs}", self.name)));
        }
        let deadline = Instant::now() + Duration::from_millis(query.wait_ms);
        let staleness_ms = self.make_fresh(query.freshness, deadline).await?;
        let shard = self.ledger.shard.clone();
        // Read before the views are: the answer shows at least this.
        let (position, _) = shard.applied();
        shown(&query.needs, &shard.slots())?;
        let vectors = match &query.ask {
            Ask::Search(search) => Some(shard.vectors_of(search)),
            _ => None,
        };
        sim::cpu::work(cost::SCAN_THOUSAND * (vectors.unwrap_or(0) as u32 / 1000)).await;
        let small =
            matches!(query.ask, Ask::Get { .. }) || vectors.is_some_and(|count| count <= INLINE_VECTORS_MAX);
        let asked = shard.clone();
        let found = if small {
            answer(&asked, query.ask)
        } else {
            sim::task::blocking(move || answer(&asked, query.ask)).await
        };
        let found = match found {
            Err(error) if recovery::is_fatal_to_views(&error) => recovery::give_up_views(&shard, error).await,
            found => found.map_err(|e| Error::Internal(e.to_string()))?,
        };
        shown(&query.needs, &shard.slots())?;
        let seen = match sim::planted!("name-only-what-an-answer-shows-at-least") {
            true => position,
            false => shard.seen_at_most(),
        };
        Ok(Answered { found, position, seen, staleness_ms, replica: self.name.clone() })
    }
}
