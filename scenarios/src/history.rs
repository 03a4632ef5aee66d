//! What the clients saw. Checkers read this, never Loci's own counters.
//!
//! One [`Op`] is one logical operation: a write that was retried with its idempotency key is a single one, from its first call to its
//! last answer. Times are true virtual time in nanoseconds, which no node knows.

use std::collections::BTreeMap;
use std::fmt;

/// A memory's id, as text.
pub type Id = String;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    pub shard: u32,
    pub epoch: u64,
    pub index: u64,
    pub item: u32,
}

/// How many memories a search is for.
pub const SEARCH_K: usize = 5;

/// The client of the reads that are made of what a replica holds in the end.
pub const LAST_LOOK: usize = usize::MAX;

#[derive(Clone, Debug)]
pub struct Op {
    pub client: usize,
    pub tenant: usize,
    /// Whom the last attempt asked.
    pub node: String,
    pub call_ns: u64,
    pub return_ns: u64,
    pub request: Request,
    pub response: Response,
}

/// How an epoch of a shard ended, by the cluster's own report: what of it is lost is not at or before `certain`, nor behind `ceiling`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    pub certain: u64,
    pub ceiling: u64,
    /// Once enough old disks were read: what was lost lies behind the first, up to the second.
    pub exact: Option<(u64, u64)>,
}

impl End {
    fn may_lose(&self, index: u64) -> bool {
        self.certain < index && index <= self.ceiling
    }

    /// Whether the old disks say that an entry is lost; `None`: not enough of them were read.
    pub fn loses(&self, index: u64) -> Option<bool> {
        match self.exact {
            Some((kept, last)) => Some(kept < index && index <= last),
            None => (!self.may_lose(index)).then_some(false),
        }
    }
}

/// One thing that a client wanted, from its first attempt until it had its answer or gave up. Unlike an [`Op`] it is also written down when a
/// read got no answer. How long these took and how they ended is what recovery is measured by ([`crate::recovery`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub client: usize,
    pub tenant: usize,
    /// What is alike in its cost: `add`, `strong get`, `search`, …
    pub kind: &'static str,
    /// The memory that it is about, if it is about one: decides which range it is of.
    pub key: Option<u64>,
    pub call_ns: u64,
    pub return_ns: u64,
    pub outcome: Outcome,
    pub attempts: Vec<Attempt>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A refusal is an answer too.
    Answered,
    /// Answered with less than the service gives when it is well.
    Degraded,
    /// No answer in the client's patience.
    Failed,
}

/// One request to one gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub node: String,
    pub call_ns: u64,
    pub return_ns: u64,
    pub answered: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// `marker` is unique to this logical write and stands in the text.
    Add {
        id: Id,
        marker: String,
    },
    Update {
        id: Id,
        expected: Option<u64>,
        marker: String,
    },
    Delete {
        id: Id,
        expected: Option<u64>,
    },
    /// Strong if there is no token.
    Get {
        id: Id,
        token: Option<u64>,
    },
    /// Strongly consistent by a vector, or by words, however old the answer.
    Search {
        by_vector: bool,
    },
    List,
    /// Sets an edge.
    Link {
        from: Id,
        to: Id,
    },
    /// Along the edges, strongly consistent.
    Walk,
    /// Of a person of the tenant: of each memory that [`is_a_persons`].
    Erase,
}

/// Whether a tenant's memory is the person's whom its erasures are about.
pub fn is_a_persons(id: &str) -> bool {
    numeral(id).is_some_and(|number| number % 4 == 3)
}

#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// The memories that a walk showed, and its edges.
    Walked {
        rows: Vec<Row>,
        edges: Vec<(Id, Id)>,
    },
    /// The edge is set.
    Linked,
    Written {
        version: u64,
        at: At,
        /// Of the cluster map by which it got there.
        map_version: u64,
        /// The other region has it too, by the answer.
        elsewhere: bool,
    },
    /// The same key was sent again after an answer and got another one.
    Changed {
        first: String,
        /// When it came.
        first_ns: u64,
        then: String,
        /// Where the first answer said that it was written.
        at: Option<At>,
    },
    Refused(Refusal),
    /// It may have happened, once, at any time after the call, or never.
    Unknown,
    Value {
        row: Row,
        shown: u64,
        /// Of what it was shown by.
        epoch: u64,
    },
    /// The person is erased on every shard. `elsewhere`: in the other region too.
    Erased {
        elsewhere: bool,
    },
    /// What the session has seen may be lost with a region: it begins anew.
    Lost,
    Absent {
        shown: u64,
    },
    Rows(Vec<Row>),
}

/// Definite: nothing was written, and this was the state.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    NotFound,
    AlreadyExists { version: u64 },
    VersionMismatch { actual: u64 },
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    pub id: Id,
    pub version: u64,
    /// Tenant and marker as the text has them.
    pub tenant: usize,
    pub marker: String,
}

/// What one replica published at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub at_ns: u64,
    pub node: String,
    pub shard: u32,
    pub epoch: u64,
    pub index: u64,
    pub digest: Vec<u8>,
}

/// What one replica holds after everything.
#[derive(Clone, Debug)]
pub struct Final {
    pub node: String,
    pub at_ns: u64,
    /// Of each shard that it has a replica of: what it published, and the digest recomputed from its tables, or why that failed.
    pub shards: Vec<(Sample, Result<Vec<u8>, String>)>,
    /// By tenant and id.
    pub rows: BTreeMap<(usize, Id), Row>,
    /// Versions in the history of each memory, oldest first, with their markers.
    pub versions: BTreeMap<(usize, Id), Vec<(u64, String)>>,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub ops: Vec<Op>,
    pub calls: Vec<Call>,
    pub samples: Vec<Sample>,
    pub finals: Vec<Final>,
    /// Of each shard's epochs that are over.
    pub ends: BTreeMap<(u32, u64), End>,
    /// What an operator's re-submission of lost writes said, if there was one: by memory, whether all of it was written again.
    pub resubmitted: Option<BTreeMap<(usize, Id), bool>>,
    /// When the last fault ended, and when all replicas agreed.
    pub healed_ns: u64,
    pub converged_ns: Option<u64>,
    pub converge_limit_ns: u64,
}

/// A memory's number among its tenant's, if its id is a scenario's.
fn numeral(id: &str) -> Option<u64> {
    id.rsplit('-').next().and_then(|end| u64::from_str_radix(end, 16).ok())
}

/// That, to be read; else the whole id.
pub fn number(id: &str) -> String {
    numeral(id).map_or_else(|| id.to_string(), |number| number.to_string())
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expecting =
            |expected: &Option<u64>| expected.map_or(String::new(), |v| format!(" expecting version {v}"));
        match self {
            Request::Add { id, marker } => write!(f, "add {} ({marker})", number(id)),
            Request::Update { id, expected, marker } => {
                write!(f, "update {} ({marker}){}", number(id), expecting(expected))
            }
            Request::Delete { id, expected } => write!(f, "delete {}{}", number(id), expecting(expected)),
            Request::Get { id, token: None } => write!(f, "get {}", number(id)),
            Request::Get { id, token: Some(token) } => write!(f, "get {} at {token} or later", number(id)),
            Request::Link { from, to } => write!(f, "link {} to {}", number(from), number(to)),
            Request::Search { by_vector: true } => f.write_str("search by vector"),
            Request::Search { by_vector: false } => f.write_str("search"),
            Request::List => f.write_str("list"),
            Request::Walk => f.write_str("walk"),
            Request::Erase => f.write_str("erase the person"),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {} ({})", self.version, self.marker)
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Response::Linked => f.write_str("linked"),
            Response::Written { version, at, .. } => {
                write!(f, "version {version}, entry {} of shard {}", at.index, at.shard)?;
                if at.item > 0 { write!(f, ", item {}", at.item) } else { Ok(()) }
            }
            Response::Changed { first, then, .. } => write!(f, "first {first}, then {then}"),
            Response::Refused(Refusal::NotFound) => f.write_str("refused: not found"),
            Response::Refused(Refusal::AlreadyExists { version }) => {
                write!(f, "refused: exists as version {version}")
            }
            Response::Refused(Refusal::VersionMismatch { actual }) => {
                write!(f, "refused: is at version {actual}")
            }
            Response::Unknown => f.write_str("unknown"),
            Response::Value { row, shown, .. } => write!(f, "{row}, shown at {shown}"),
            Response::Erased { elsewhere: true } => f.write_str("erased in all regions"),
            Response::Erased { .. } => f.write_str("erased"),
            Response::Lost => f.write_str("may be lost with its region"),
            Response::Absent { .. } => f.write_str("not found"),
            Response::Rows(rows) => write!(f, "{} memories", rows.len()),
            Response::Walked { rows, edges } => write!(f, "{} memories, {} edges", rows.len(), edges.len()),
        }
    }
}

impl Response {
    /// Where it was written, if it was.
    pub fn at(&self) -> Option<At> {
        match self {
            Response::Written { at, .. } => Some(*at),
            _ => None,
        }
    }
}

impl Request {
    /// The memory that it is about, if it is about one.
    pub fn id(&self) -> Option<&Id> {
        match self {
            Request::Add { id, .. }
            | Request::Update { id, .. }
            | Request::Delete { id, .. }
            | Request::Get { id, .. } => Some(id),
            Request::Search { .. }
            | Request::List
            | Request::Link { .. }
            | Request::Walk
            | Request::Erase => None,
        }
    }

    pub fn is_write(&self) -> bool {
        use Request::{Add, Delete, Erase, Update};
        matches!(self, Add { .. } | Update { .. } | Delete { .. } | Erase)
    }
}

impl History {
    /// Writes that were acknowledged.
    pub fn acked(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op.response, Response::Written { .. })).count()
    }

    /// What a re-submission said of an operation's memory, if it came upon that.
    fn again(&self, op: &Op) -> Option<bool> {
        let id = op.request.id()?;
        self.resubmitted.as_ref()?.get(&(op.tenant, id.clone())).copied()
    }

    /// Whether lost writes of an operation's memory were to be written again.
    pub fn is_again(&self, op: &Op) -> bool {
        self.again(op).is_some()
    }

    /// Whether all that was lost of an operation's memory was written again; of one of which nothing was in a quarantine, nothing was.
    pub fn is_wholly_again(&self, op: &Op) -> bool {
        self.resubmitted.is_some() && op.request.id().is_some() && self.again(op).unwrap_or(true)
    }

    /// How its epoch ended, and those after it: what an epoch has of the ones before may be lost with it.
    pub fn ends_from(&self, at: &At) -> impl Iterator<Item = &End> {
        self.ends.range((at.shard, at.epoch)..=(at.shard, u64::MAX)).map(|(_, end)| end)
    }

    /// Whether the cluster said that what was acknowledged there may be lost with an epoch.
    pub fn may_be_lost(&self, at: &At) -> bool {
        self.ends_from(at).any(|end| end.may_lose(at.index))
    }

    /// Whether what was decided between two moments may be lost with an epoch, though nobody was told in which entry that was (refusals do not say): it lies behind what was
    /// acknowledged before, and before what was asked for later.
    pub fn may_be_lost_between(&self, asked_ns: u64, answered_ns: u64) -> bool {
        let written = |shard| {
            let ops = self.ops.iter().filter_map(|op| Some((op, op.response.at()?)));
            ops.filter(move |(_, at)| at.shard == shard)
        };
        self.ends.iter().any(|((shard, epoch), end)| {
            let of_epoch = || written(*shard).filter(|(_, at)| at.epoch == *epoch);
            let is_over = written(*shard).any(|(op, at)| at.epoch > *epoch && op.return_ns < asked_ns);
            let before = of_epoch().filter(|(op, _)| op.return_ns < asked_ns).map(|(_, at)| at.index).max();
            let later = of_epoch().filter(|(op, _)| op.call_ns > answered_ns).map(|(_, at)| at.index).min();
            !is_over
                && before.is_none_or(|before| before <= end.ceiling)
                && later.is_none_or(|later| later > end.certain)
        })
    }

    /// The erasures of a tenant that may have taken place.
    pub fn erasures(&self, tenant: usize) -> impl Iterator<Item = &Op> {
        self.ops.iter().filter(move |op| op.tenant == tenant && op.request == Request::Erase)
    }

    /// Whether what an operation wrote may have been erased since.
    pub fn may_be_erased(&self, op: &Op) -> bool {
        let until = |erasure: &Op| match erasure.response {
            Response::Erased { .. } => erasure.return_ns,
            _ => u64::MAX,
        };
        op.request.id().is_some_and(|id| is_a_persons(id))
            && self.erasures(op.tenant).any(|erasure| until(erasure) > op.call_ns)
    }

    /// Operations by tenant and memory.
    pub fn by_key(&self) -> BTreeMap<(usize, &str), Vec<&Op>> {
        let mut keys: BTreeMap<_, Vec<&Op>> = BTreeMap::new();
        for op in &self.ops {
            if let Some(id) = op.request.id() {
                keys.entry((op.tenant, id.as_str())).or_default().push(op);
            }
        }
        for ((tenant, id), ops) in &mut keys {
            if is_a_persons(id) {
                ops.extend(self.erasures(*tenant));
            }
        }
        keys
    }
}
