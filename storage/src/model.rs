//! The words of the store as types: what a memory is, what an entry of the ledger may ask for, and what came of it.
//!
//! Everything that could differ between two replicas (ids, times, vectors, expiry) is already fixed in these types when they
//! enter the ledger, so that applying an entry is a pure function of the state before it.

use crate::slots::{MoveId, Slot, SlotSet, slot_of};
use bincode::{Decode, Encode};

/// Milliseconds since the Unix epoch, on a calendar clock.
pub type UnixMs = i64;

/// A memory's id: the 16 bytes of a UUID (v7 when the server made it; v8, derived from tenant and key, when
/// the writer gave an idempotency key and no id).
pub type MemoryId = [u8; 16];

/// The tenant that owns GLOBAL memories; only operators write to it.
pub const GLOBAL_TENANT: &str = "global";

/// A month of the calendar (UTC): years since 0, times 12, plus the month from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Month(pub i32);

impl Month {
    /// The month that holds a moment.
    pub fn of(at: UnixMs) -> Month {
        // Howard Hinnant's days_from_civil, inverted; years begin in March there.
        let at = at.clamp(-62_135_596_800_000, 253_402_300_799_999); // the years 1 to 9999
        let days = at.div_euclid(86_400_000) + 719_468;
        let era = days.div_euclid(146_097);
        let day = days.rem_euclid(146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let month = (5 * (day - (365 * year + year / 4 - year / 100)) + 2) / 153;
        let (year, month) = (year + era * 400 + (month >= 10) as i64, (month + 2) % 12);
        Month((year * 12 + month) as i32)
    }

    /// From `2026-11`.
    pub fn parse(text: &str) -> Option<Month> {
        let (year, month) = text.split_once('-')?;
        let (year, month): (i32, i32) = (year.parse().ok()?, month.parse().ok()?);
        ((1..=12).contains(&month) && (0..=9999).contains(&year)).then_some(Month(year * 12 + month - 1))
    }
}

impl std::fmt::Display for Month {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}-{:02}", self.0.div_euclid(12), self.0.rem_euclid(12) + 1)
    }
}

/// A relation from one memory to another of the same tenant, or to a GLOBAL one. It lives with its source.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Edge {
    pub source: MemoryId,
    /// Not empty.
    pub relation: String,
    pub target: MemoryId,
    /// Finite; the greater, the sooner it is followed.
    pub weight: f32,
    /// True from then on; `None`: always was.
    pub valid_from: Option<UnixMs>,
    /// True until before then; `None`: for ever.
    pub valid_to: Option<UnixMs>,
}

/// Vectors have this many dimensions at most.
pub const DIMENSION_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Scope {
    Private = 1,
    Shared = 2,
    Global = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum MemoryType {
    Semantic = 1,
    Episodic = 2,
    Procedural = 3,
    Message = 4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Status {
    Active = 1,
    Archived = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Tier {
    Hot = 1,
    Warm = 2,
    Cold = 3,
}

/// The unit of filtering before any nearest-neighbour search: whose memories lie together.
/// PRIVATE with an agent lies with the agent, else with the user; SHARED with the tenant; GLOBAL with everyone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Owner {
    Agent { tenant: String, agent: String },
    User { tenant: String, user: String },
    Shared { tenant: String },
    Global,
}

impl Owner {
    pub fn tenant(&self) -> &str {
        match self {
            Owner::Agent { tenant, .. } | Owner::User { tenant, .. } | Owner::Shared { tenant } => tenant,
            Owner::Global => GLOBAL_TENANT,
        }
    }
}

/// One memory, as stored. Empty strings mean "none"; optional times are `None`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Memory {
    pub id: MemoryId,
    pub tenant: String,
    pub scope: Scope,
    pub user: String,
    pub agent: String,
    pub session: String,
    pub text: String,
    /// A JSON object, or empty.
    pub metadata: String,
    pub kind: MemoryType,
    pub status: Status,
    /// 0.0 to 1.0.
    pub importance: f32,
    pub categories: Vec<String>,
    pub links: Vec<MemoryId>,
    pub event_time: Option<UnixMs>,
    pub valid_from: Option<UnixMs>,
    pub valid_to: Option<UnixMs>,
    pub created: UnixMs,
    pub updated: UnixMs,
    pub expires: Option<UnixMs>,
    pub access_count: u64,
    pub last_access: Option<UnixMs>,
    /// 1 for a new memory; one more for each update.
    pub version: u64,
    /// Names the model that made the vector, e.g. `lexical-384-v1`; only vectors of one space are compared.
    pub space: String,
    pub tier: Tier,
    /// Unit length. Empty: no vector (not found by similarity).
    pub vector: Vec<f32>,
}

impl Memory {
    pub fn owner(&self) -> Owner {
        match self.scope {
            Scope::Private if !self.agent.is_empty() => {
                Owner::Agent { tenant: self.tenant.clone(), agent: self.agent.clone() }
            }
            Scope::Private => Owner::User { tenant: self.tenant.clone(), user: self.user.clone() },
            Scope::Shared => Owner::Shared { tenant: self.tenant.clone() },
            Scope::Global => Owner::Global,
        }
    }

    /// Where it lives, for ever: no change of a memory changes its owner.
    pub fn slot(&self) -> Slot {
        slot_of(&self.owner(), &self.id)
    }

    pub fn expired(&self, now: UnixMs) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

/// What an update changes; `None` leaves a field as it is. The vector is re-made by the writer when the text changes.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Patch {
    pub text: Option<String>,
    pub metadata: Option<String>,
    pub kind: Option<MemoryType>,
    pub status: Option<Status>,
    pub importance: Option<f32>,
    pub categories: Option<Vec<String>>,
    pub links: Option<Vec<MemoryId>>,
    /// Outer `None`: unchanged; inner `None`: cleared.
    pub event_time: Option<Option<UnixMs>>,
    pub valid_from: Option<Option<UnixMs>>,
    pub valid_to: Option<Option<UnixMs>>,
    pub expires: Option<Option<UnixMs>>,
    /// The new vector and its space.
    pub vector: Option<(Vec<f32>, String)>,
}

/// What one command asks for.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Operation {
    /// Adds a memory. `AlreadyExists` if its id is taken in this tenant.
    Add(Memory),
    Update {
        id: MemoryId,
        expected_version: Option<u64>,
        patch: Patch,
    },
    Delete {
        id: MemoryId,
        expected_version: Option<u64>,
    },
    /// Batched access counts: (id, how many, last time). Unknown ids are skipped, and those in slots that are not taken here. Changes no
    /// version.
    Touch(Vec<(MemoryId, u64, UnixMs)>),
    /// Sets edges, by source, relation and target. All or none: `NotFound` names a source that does not exist.
    UpsertEdges(Vec<Edge>),
    /// Removes edges: source, relation, target. Those that are not there are skipped.
    DeleteEdges(Vec<(MemoryId, String, MemoryId)>),
    /// Removes everything that was created in a month, of every tenant, with its history. Only operators ask for it.
    DropMonth(Month),
    /// An addition, update or deletion that is decided only if the memory's last version, deletions counted, is this one (0: there never was any);
    /// else it is a `VersionMismatch`. An addition that was lost at `since` is `NotFound` if whose it is was erased after that.
    Again {
        last: u64,
        since: Position,
        operation: Box<Operation>,
    },
    /// A step of a move of slots between shards ([`crate::slots`]). It carries no idempotency key: each step may be repeated.
    Move(MoveStep),
    /// A part of an erasure ([`crate::erase`]). It carries no idempotency key: the erasure's number is one, for as long as the shard has it in its
    /// list.
    Erase {
        erasure: ErasureId,
        subject: Subject,
        /// It is decided only in this epoch of the ledger: what was meant for one that is over knows nothing of what came after it.
        epoch: u64,
        /// Only what was written before then: for an erasure that is made again, since it may be lost with its epoch.
        before: Option<Position>,
        /// About so many rows are looked at.
        rows_max: u32,
    },
}

/// An erasure's number, the same on all shards; none is given twice.
pub type ErasureId = u64;

/// Whose memories an erasure is about, within a tenant: those of a user, of an agent, or of a user with an agent. Empty: any; one of the two is not.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Subject {
    pub user: String,
    pub agent: String,
}

impl Subject {
    /// Whether a memory is the subject's, whatever its scope.
    pub fn covers(&self, user: &str, agent: &str) -> bool {
        let is = |wanted: &str, of: &str| wanted.is_empty() || wanted == of;
        (!self.user.is_empty() || !self.agent.is_empty()) && is(&self.user, user) && is(&self.agent, agent)
    }
}

/// An erasure, as a shard's list has it.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Erasure {
    pub id: ErasureId,
    pub tenant: String,
    pub subject: Subject,
    /// Where its last part was applied.
    pub position: Position,
    /// The ledger's time of then.
    pub time: UnixMs,
    /// Memories of which something was erased, and how many versions that was, deletions included.
    pub memories: u64,
    pub versions: u64,
    /// It goes on behind this memory; `None`: it is done.
    pub next: Option<(MemoryId, Slot)>,
}

impl Operation {
    /// The one memory that it is about, if it is about one.
    pub fn id(&self) -> Option<MemoryId> {
        match self {
            Operation::Add(memory) => Some(memory.id),
            Operation::Update { id, .. } | Operation::Delete { id, .. } => Some(*id),
            Operation::Again { operation, .. } => operation.id(),
            _ => None,
        }
    }

    /// What is to be done, whatever it depends on.
    pub fn plain(&self) -> &Operation {
        match self {
            Operation::Again { operation, .. } => operation.plain(),
            plain => plain,
        }
    }
}

/// What a step of a move asks of a shard. Its outcome is `Done`, with the memory id 0, or `MoveRefused`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum MoveStep {
    /// Tells a new shard, which holds nothing yet, what it has.
    Own { slots: SlotSet },
    /// The source takes no more writes for these slots.
    Seal { id: MoveId, slots: SlotSet },
    /// The destination takes over a part of the copy, as [`crate::Shard::leaving`] gave it; `cursor` is kept for whoever goes on from there.
    /// A piece that cannot be read, or is of another slot, or is there already, refuses the whole.
    Import { id: MoveId, slots: SlotSet, sequence: u64, pieces: Vec<Vec<u8>>, cursor: Vec<u8> },
    /// The destination shows the slots and takes writes, if what arrived has this many pieces and this sum of their hashes.
    Adopt { id: MoveId, slots: SlotSet, pieces: u64, hash: u128 },
    /// The source shows the slots no more.
    Release { id: MoveId },
    /// The source removes at most so many rows of what it released; the outcome's `version` is how many are left.
    Drop { id: MoveId, rows_max: u32 },
}

/// One command of one client, decided when its entry is applied.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Command {
    pub tenant: String,
    /// The slot that it is about: the memory's, or that of all the edges' sources. It is decided only where that slot is taken, and looks
    /// for memories in no other. `None`: the caller knows none, which is enough where all slots are taken; then the smallest slot
    /// counts that has the memory. `Touch`, `DropMonth`, `Move` and `Erase` are about no one slot and need none.
    pub slot: Option<Slot>,
    /// Empty: none. Unique per tenant for 24 hours. It is kept with the slot that the command was about, and moves with it; one that was
    /// about no memory stays with the shard.
    pub idempotency_key: String,
    /// Hash of what the client sent; the same key with another hash is an error.
    pub request_hash: [u8; 16],
    /// The writer's calendar when it made the command; becomes `updated` of what it changes.
    pub now: UnixMs,
    pub operation: Operation,
}

/// One entry of the ledger: commands that were batched together, applied in order.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Batch {
    pub commands: Vec<Command>,
}

/// What came of one command. Deterministic, and remembered under the command's idempotency key.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Outcome {
    /// Added, updated or deleted; `version` is the memory's version after it (of a deletion: the deleted version + 1).
    Done {
        id: MemoryId,
        version: u64,
        position: Position,
    },
    NotFound {
        id: MemoryId,
    },
    AlreadyExists {
        id: MemoryId,
        version: u64,
    },
    VersionMismatch {
        id: MemoryId,
        actual: u64,
    },
    /// The key was used within 24 hours for a request with another content.
    KeyReused,
    /// The command's slot is not taken here; nothing was done, and nothing is remembered under its key.
    NotHere,
    /// The step belongs to a move that is over, or cannot be taken now, or its pieces are not sound; nothing was done.
    MoveRefused,
    /// How far an erasure is, and where this was found out.
    Erased {
        erasure: Erasure,
        position: Position,
    },
}

/// A place in one shard's ledger. `item` is the command's place in its entry; an import takes up one for each of its pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Position {
    pub epoch: u64,
    pub index: u64,
    pub item: u32,
}

/// One row of a memory's history, or one event of a watch.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Change {
    pub position: Position,
    pub kind: ChangeKind,
    /// The memory after the change; of a deletion, before it.
    pub memory: Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ChangeKind {
    Added = 1,
    Updated = 2,
    Deleted = 3,
    /// Its memory says whose it was, and nothing else of what it was.
    Erased = 4,
}

/// A condition on a memory; evaluated before and during search.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Filter {
    And(Vec<Filter>),
    Or(Vec<Filter>),
    Not(Box<Filter>),
    Compare {
        field: Field,
        op: CompareOp,
        value: Value,
    },
    In {
        field: Field,
        values: Vec<Value>,
    },
    /// A text holds a substring (case-insensitive); a list holds a value.
    Contains {
        field: Field,
        value: Value,
    },
    Exists {
        field: Field,
    },
}

/// `Metadata` takes a dotted path into the JSON object.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Field {
    Metadata(String),
    Text,
    User,
    Agent,
    Session,
    Kind,
    Status,
    Importance,
    Categories,
    Created,
    Updated,
    EventTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum CompareOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Value {
    Text(String),
    Number(f64),
    Bool(bool),
}
