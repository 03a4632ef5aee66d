//! The writer role: from a caller's request to commands for the ledger.
//!
//! It fixes everything that could differ between replicas (id, vector, times), so that applying the entry is the same everywhere. It
//! decides nothing: idempotency and versions are judged where they cannot race, at apply.

use crate::auth::Caller;
use crate::convert::{self, id_text};
use crate::error::Error;
use crate::limits::{BATCH_ITEMS_MAX, NAME_BYTES_MAX};
use crate::proto::v1;
use sim::cpu::cost;
use sim::time::{self, Instant};
use std::sync::Arc;
use storage::embed::{LEXICAL_SPACE, embed};
use storage::model::*;

/// The way to a shard's ledger: in this process, or at another node.
#[tonic::async_trait]
pub trait Proposer: Send + Sync {
    /// Proposes commands; what came of each, in order.
    async fn propose(&self, commands: Vec<Command>, deadline: Instant) -> Result<Vec<Outcome>, Error>;
}

#[tonic::async_trait]
impl Proposer for crate::ledger::Ledger {
    async fn propose(&self, commands: Vec<Command>, deadline: Instant) -> Result<Vec<Outcome>, Error> {
        crate::ledger::Ledger::propose(self, commands, deadline).await
    }
}

#[derive(Clone)]
pub struct Writer {
    pub ledger: Arc<dyn Proposer>,
}

/// A write that was decided and is durable.
pub struct Written {
    pub id: MemoryId,
    pub version: u64,
    pub position: Position,
}

pub fn options(options: Option<v1::WriteOptions>) -> Result<String, Error> {
    let options = options.unwrap_or_default();
    if options.durability == v1::Durability::Region as i32 {
        return Err(Error::Unimplemented("durability REGION (there is one region)"));
    }
    if options.idempotency_key.len() > NAME_BYTES_MAX {
        return Err(Error::invalid("idempotency_key", format!("at most {NAME_BYTES_MAX} bytes")));
    }
    Ok(options.idempotency_key)
}

fn written(outcome: Outcome) -> Result<Written, Error> {
    match outcome {
        Outcome::Done { id, version, position } => Ok(Written { id, version, position }),
        Outcome::NotFound { id } => Err(Error::NotFound(id_text(&id))),
        Outcome::AlreadyExists { id, version } => Err(Error::AlreadyExists { id: id_text(&id), version }),
        Outcome::VersionMismatch { id, actual } => Err(Error::VersionMismatch { id: id_text(&id), actual }),
        Outcome::KeyReused => Err(Error::KeyReused),
        Outcome::NotHere | Outcome::MoveRefused => {
            Err(Error::Unavailable("the memories that this is about are moving to another shard".into()))
        }
    }
}

impl Writer {
    async fn one(&self, command: Command, deadline: Instant) -> Result<Written, Error> {
        let outcomes = self.ledger.propose(vec![command], deadline).await?;
        let outcome = outcomes.into_iter().next();
        written(outcome.ok_or_else(|| Error::Internal("the ledger gave no outcome".into()))?)
    }

    /// The command that adds one memory, with its vector made.
    fn add_command(caller: &Caller, request: v1::AddRequest, now: UnixMs) -> Result<Command, Error> {
        let mut hashed = request.clone();
        hashed.options = None;
        let request_hash = convert::request_hash(&hashed);
        let key = options(request.options)?;
        let new = request.memory.ok_or_else(|| Error::invalid("memory", "is missing"))?;
        let global = convert::scope(new.scope)? == Scope::Global;
        if global && !caller.operator {
            return Err(Error::Forbidden("GLOBAL memories are written with an operator's key only".into()));
        }
        let mut memory = convert::new_memory(&caller.tenant, new, &key, now)?;
        if memory.vector.is_empty() {
            memory.vector = embed(&memory.text);
            memory.space = LEXICAL_SPACE.into();
        }
        let tenant = memory.tenant.clone();
        Ok(Command {
            tenant,
            slot: None,
            idempotency_key: key,
            request_hash,
            now,
            operation: Operation::Add(memory),
        })
    }

    pub async fn add(
        &self,
        caller: &Caller,
        request: v1::AddRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let command = Writer::add_command(caller, request, time::calendar_ms())?;
        sim::cpu::work(cost::EMBED).await;
        self.one(command, deadline).await
    }

    /// Adds each item on its own: what is wrong with one does not stop the others.
    pub async fn batch_add(
        &self,
        caller: &Caller,
        request: v1::BatchAddRequest,
        deadline: Instant,
    ) -> Result<Vec<Result<Written, Error>>, Error> {
        let count = request.items.len();
        if count == 0 || count > BATCH_ITEMS_MAX {
            return Err(Error::invalid(
                "items",
                format!("{count} given; 1 to {BATCH_ITEMS_MAX} are allowed"),
            ));
        }
        let now = time::calendar_ms();
        let checked: Vec<Result<Command, Error>> =
            request.items.into_iter().map(|item| Writer::add_command(caller, item, now)).collect();
        sim::cpu::work(cost::EMBED * count as u32).await;
        let mut errors: Vec<Option<Error>> = vec![];
        let mut commands = vec![];
        for item in checked {
            errors.push(item.as_ref().err().cloned());
            commands.extend(item);
        }
        let outcomes =
            if commands.is_empty() { vec![] } else { self.ledger.propose(commands, deadline).await? };
        let mut outcomes = outcomes.into_iter();
        let missing = || Err(Error::Internal("the ledger gave too few outcomes".into()));
        Ok(errors
            .into_iter()
            .map(|error| match error {
                Some(error) => Err(error),
                None => outcomes.next().map_or_else(missing, written),
            })
            .collect())
    }

    pub async fn update(
        &self,
        caller: &Caller,
        mut request: v1::UpdateRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let idempotency_key = options(write_options)?;
        let id = convert::parse_id("id", &request.id)?;
        let mut patch = convert::patch(&mut request)?;
        if let (Some(text), None) = (&patch.text, &patch.vector) {
            patch.vector = Some((embed(text), LEXICAL_SPACE.into()));
            sim::cpu::work(cost::EMBED).await;
        }
        let operation = Operation::Update { id, expected_version: request.expected_version, patch };
        let tenant = caller.tenant.to_string();
        let now = time::calendar_ms();
        self.one(Command { tenant, slot: None, idempotency_key, request_hash, now, operation }, deadline)
            .await
    }

    pub async fn delete(
        &self,
        caller: &Caller,
        mut request: v1::DeleteRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let idempotency_key = options(write_options)?;
        let id = convert::parse_id("id", &request.id)?;
        let operation = Operation::Delete { id, expected_version: request.expected_version };
        let tenant = caller.tenant.to_string();
        let now = time::calendar_ms();
        self.one(Command { tenant, slot: None, idempotency_key, request_hash, now, operation }, deadline)
            .await
    }

    pub async fn upsert_edges(
        &self,
        caller: &Caller,
        mut request: v1::UpsertEdgesRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let idempotency_key = options(write_options)?;
        let operation = Operation::UpsertEdges(convert::edges(request.edges)?);
        let tenant = caller.tenant.to_string();
        let now = time::calendar_ms();
        self.one(Command { tenant, slot: None, idempotency_key, request_hash, now, operation }, deadline)
            .await
    }

    pub async fn delete_edges(
        &self,
        caller: &Caller,
        mut request: v1::DeleteEdgesRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let idempotency_key = options(write_options)?;
        let edges = convert::edges(request.edges)?;
        let keys = edges.into_iter().map(|edge| (edge.source, edge.relation, edge.target)).collect();
        let operation = Operation::DeleteEdges(keys);
        let tenant = caller.tenant.to_string();
        let now = time::calendar_ms();
        self.one(Command { tenant, slot: None, idempotency_key, request_hash, now, operation }, deadline)
            .await
    }

    /// Drops a month of everybody's memories; how many there were.
    pub async fn drop_month(&self, month: Month, key: String, deadline: Instant) -> Result<Written, Error> {
        let request_hash = convert::hash_of(month.to_string().as_bytes());
        let (tenant, now) = (GLOBAL_TENANT.to_string(), time::calendar_ms());
        let operation = Operation::DropMonth(month);
        self.one(Command { tenant, slot: None, idempotency_key: key, request_hash, now, operation }, deadline)
            .await
    }
}
