//! What the clients saw. Checkers read this, never Loci's own counters.
//!
//! One [`Op`] is one logical operation: a write that was retried with its idempotency key is a single one, from its first call to its
//! last answer. Times are true virtual time in nanoseconds, which no node knows.

use std::collections::BTreeMap;

/// A memory's id, as text.
pub type Id = String;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    pub epoch: u64,
    pub index: u64,
    pub item: u32,
}

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
    Search,
    List,
    /// Along the edges, strongly consistent.
    Walk,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// The memories that a walk showed, and its edges.
    Walked {
        rows: Vec<Row>,
        edges: Vec<(Id, Id)>,
    },
    Written {
        version: u64,
        at: At,
    },
    /// The same key was sent again after an answer and got another one.
    Changed {
        first: String,
        then: String,
    },
    Refused(Refusal),
    /// It may have happened, once, at any time after the call, or never.
    Unknown,
    Value {
        row: Row,
        shown: u64,
    },
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
    pub index: u64,
    pub digest: Vec<u8>,
}

/// What one replica holds after everything.
#[derive(Clone, Debug)]
pub struct Final {
    pub sample: Sample,
    /// The digest recomputed from its tables, or why that failed.
    pub scanned: Result<Vec<u8>, String>,
    /// By tenant and id.
    pub rows: BTreeMap<(usize, Id), Row>,
    /// Versions in the history of each memory, oldest first, with their markers.
    pub versions: BTreeMap<(usize, Id), Vec<(u64, String)>>,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub ops: Vec<Op>,
    pub samples: Vec<Sample>,
    pub finals: Vec<Final>,
    /// When the last fault ended, and when all replicas agreed.
    pub healed_ns: u64,
    pub converged_ns: Option<u64>,
    pub converge_limit_ns: u64,
}

impl Request {
    /// The memory that it is about, if it is about one.
    pub fn id(&self) -> Option<&Id> {
        match self {
            Request::Add { id, .. }
            | Request::Update { id, .. }
            | Request::Delete { id, .. }
            | Request::Get { id, .. } => Some(id),
            Request::Search | Request::List | Request::Walk => None,
        }
    }

    pub fn is_write(&self) -> bool {
        matches!(self, Request::Add { .. } | Request::Update { .. } | Request::Delete { .. })
    }
}

impl History {
    /// Writes that were acknowledged.
    pub fn acked(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op.response, Response::Written { .. })).count()
    }

    /// Operations by tenant and memory.
    pub fn by_key(&self) -> BTreeMap<(usize, &str), Vec<&Op>> {
        let mut keys: BTreeMap<_, Vec<&Op>> = BTreeMap::new();
        for op in &self.ops {
            if let Some(id) = op.request.id() {
                keys.entry((op.tenant, id.as_str())).or_default().push(op);
            }
        }
        keys
    }
}
