//! The writer role: from a caller's request to commands for the ledger.
//!
//! It fixes everything that could differ between replicas (id, vector, times), so that applying the entry is the same everywhere. It
//! decides nothing: idempotency and versions are judged where they cannot race, at apply.

use crate::auth::Caller;
use crate::control::map::ShardId;
use crate::convert::{self, id_text};
use crate::error::Error;
use crate::limits::{BATCH_ITEMS_MAX, NAME_BYTES_MAX};
use crate::proto::v1;
use crate::reach::ELSEWHERE_WITHIN;
use crate::router::{Decided, Router};
use futures::future::join_all;
use sim::cpu::cost;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use storage::embed::{LEXICAL_SPACE, embed};
use storage::model::*;
use storage::slots::Slot;

/// How often it is looked whether an erasure is done.
const ERASURE_LOOK: Duration = Duration::from_millis(50);
/// What is kept of a caller's time for the answer.
const ERASURE_RESERVE: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub struct Writer {
    pub router: Router,
}

/// A write that was decided and is durable.
pub struct Written {
    pub id: MemoryId,
    pub version: u64,
    pub shard: ShardId,
    pub position: Position,
    /// Of the map by which it got there.
    pub map_version: u64,
    /// Whether the other region has it too.
    pub elsewhere: bool,
}

/// What a write asks beside its content.
pub struct Options {
    pub key: String,
    /// It is to be acknowledged when the other region has it.
    pub elsewhere: bool,
}

pub fn options(options: Option<v1::WriteOptions>) -> Result<Options, Error> {
    let options = options.unwrap_or_default();
    let durability = v1::Durability::try_from(options.durability)
        .map_err(|_| Error::invalid("durability", format!("unknown value {}", options.durability)))?;
    if options.idempotency_key.len() > NAME_BYTES_MAX {
        return Err(Error::invalid("idempotency_key", format!("at most {NAME_BYTES_MAX} bytes")));
    }
    Ok(Options { key: options.idempotency_key, elsewhere: durability == v1::Durability::Region })
}

fn written(decided: Decided, map_version: u64) -> Result<Written, Error> {
    let (shard, outcome) = decided?;
    match outcome {
        Outcome::Done { id, version, position } => {
            Ok(Written { id, version, shard, position, map_version, elsewhere: false })
        }
        Outcome::NotFound { id } => Err(Error::NotFound(id_text(&id))),
        Outcome::AlreadyExists { id, version } => Err(Error::AlreadyExists { id: id_text(&id), version }),
        Outcome::VersionMismatch { id, actual } => Err(Error::VersionMismatch { id: id_text(&id), actual }),
        Outcome::KeyReused => Err(Error::KeyReused),
        Outcome::NotHere | Outcome::MoveRefused | Outcome::Erased { .. } => {
            Err(Error::Internal("the router gave this back".into()))
        }
    }
}

impl Writer {
    async fn one(&self, command: Command, elsewhere: bool, deadline: Instant) -> Result<Written, Error> {
        let (decided, map_version) = self.router.propose(vec![command], deadline).await;
        let decided = decided.into_iter().next();
        let missing = || Error::Internal("the ledger gave no outcome".into());
        let mut written = written(decided.ok_or_else(missing)?, map_version)?;
        if elsewhere {
            self.wait_elsewhere(vec![&mut written], deadline).await;
        }
        Ok(written)
    }

    /// Waits until the other region has what was written, and notes of each whether it does. The writes stand in either case.
    async fn wait_elsewhere(&self, written: Vec<&mut Written>, deadline: Instant) {
        let mut last: BTreeMap<ShardId, Position> = BTreeMap::new();
        for write in &written {
            let position = last.entry(write.shard).or_default();
            *position = write.position.max(*position);
        }
        let asked = last.iter().map(|(shard, position)| async move {
            (*shard, self.router.elsewhere(*shard, *position, deadline).await.unwrap_or(false))
        });
        let there: BTreeMap<ShardId, bool> = join_all(asked).await.into_iter().collect();
        for write in written {
            write.elsewhere = there.get(&write.shard).copied().unwrap_or(false);
        }
    }

    /// The command that adds one memory, with its vector made.
    fn add_command(caller: &Caller, request: v1::AddRequest, now: UnixMs) -> Result<(Command, bool), Error> {
        let mut hashed = request.clone();
        hashed.options = None;
        let request_hash = convert::request_hash(&hashed);
        let Options { key, elsewhere } = options(request.options)?;
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
        let operation = Operation::Add(memory);
        let command = Command { tenant, slot: None, idempotency_key: key, request_hash, now, operation };
        Ok((command, elsewhere))
    }

    pub async fn add(
        &self,
        caller: &Caller,
        request: v1::AddRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let (command, elsewhere) = Writer::add_command(caller, request, time::calendar_ms())?;
        sim::cpu::work(cost::EMBED).await;
        self.one(command, elsewhere, deadline).await
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
        let checked: Vec<Result<(Command, bool), Error>> =
            request.items.into_iter().map(|item| Writer::add_command(caller, item, now)).collect();
        sim::cpu::work(cost::EMBED * count as u32).await;
        let mut errors: Vec<Option<Error>> = vec![];
        let (mut commands, mut wanted) = (vec![], vec![]);
        for item in checked {
            errors.push(item.as_ref().err().cloned());
            if let Ok((command, elsewhere)) = item {
                commands.push(command);
                wanted.push(elsewhere);
            }
        }
        let (decided, map_version) = self.router.propose(commands, deadline).await;
        if let (true, Some(Err(error))) = (decided.iter().all(Result::is_err), decided.first()) {
            return Err(error.clone());
        }
        let mut decided: Vec<Result<Written, Error>> =
            decided.into_iter().map(|decided| written(decided, map_version)).collect();
        let waiting = decided.iter_mut().zip(wanted).filter(|(_, elsewhere)| *elsewhere);
        let waiting: Vec<&mut Written> = waiting.filter_map(|(written, _)| written.as_mut().ok()).collect();
        self.wait_elsewhere(waiting, deadline).await;
        let mut decided = decided.into_iter();
        let missing = || Err(Error::Internal("the ledger gave too few outcomes".into()));
        Ok(errors
            .into_iter()
            .map(|error| error.map_or_else(|| decided.next().unwrap_or_else(missing), Err))
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
        let Options { key: idempotency_key, elsewhere } = options(write_options)?;
        let id = convert::parse_id("id", &request.id)?;
        let mut patch = convert::patch(&mut request)?;
        if let (Some(text), None) = (&patch.text, &patch.vector) {
            patch.vector = Some((embed(text), LEXICAL_SPACE.into()));
            sim::cpu::work(cost::EMBED).await;
        }
        let operation = Operation::Update { id, expected_version: request.expected_version, patch };
        let tenant = caller.tenant.to_string();
        let now = time::calendar_ms();
        let command = Command { tenant, slot: None, idempotency_key, request_hash, now, operation };
        self.one(command, elsewhere, deadline).await
    }

    pub async fn delete(
        &self,
        caller: &Caller,
        mut request: v1::DeleteRequest,
        deadline: Instant,
    ) -> Result<Written, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let Options { key: idempotency_key, elsewhere } = options(write_options)?;
        let id = convert::parse_id("id", &request.id)?;
        let operation = Operation::Delete { id, expected_version: request.expected_version };
        let tenant = caller.tenant.to_string();
        let now = time::calendar_ms();
        let command = Command { tenant, slot: None, idempotency_key, request_hash, now, operation };
        self.one(command, elsewhere, deadline).await
    }

    pub async fn upsert_edges(
        &self,
        caller: &Caller,
        mut request: v1::UpsertEdgesRequest,
        deadline: Instant,
    ) -> Result<Vec<Written>, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let options = options(write_options)?;
        let edges = convert::edges(request.edges)?;
        let sources: Vec<MemoryId> = edges.iter().map(|edge| edge.source).collect();
        let parts = self.by_slot(&caller.tenant, &sources, edges, deadline).await?;
        self.edges(caller, (options, request_hash), parts, Operation::UpsertEdges, deadline).await
    }

    pub async fn delete_edges(
        &self,
        caller: &Caller,
        mut request: v1::DeleteEdgesRequest,
        deadline: Instant,
    ) -> Result<Vec<Written>, Error> {
        let write_options = request.options.take();
        let request_hash = convert::request_hash(&request);
        let options = options(write_options)?;
        let edges = convert::edges(request.edges)?;
        let sources: Vec<MemoryId> = edges.iter().map(|edge| edge.source).collect();
        let keys = edges.into_iter().map(|edge| (edge.source, edge.relation, edge.target)).collect();
        let parts = self.by_slot(&caller.tenant, &sources, keys, deadline).await?;
        self.edges(caller, (options, request_hash), parts, Operation::DeleteEdges, deadline).await
    }

    /// Items by the slots of their sources; in a cluster of one shard all together, without a slot.
    async fn by_slot<T>(
        &self,
        tenant: &str,
        sources: &[MemoryId],
        items: Vec<T>,
        deadline: Instant,
    ) -> Result<BTreeMap<Option<Slot>, Vec<T>>, Error> {
        if self.router.map(0, deadline).await?.shards.len() == 1 {
            return Ok(BTreeMap::from([(None, items)]));
        }
        let mut parts: BTreeMap<Option<Slot>, Vec<T>> = BTreeMap::new();
        for (source, item) in sources.iter().zip(items) {
            let slot = self.router.locate(tenant, source, deadline).await?;
            let (slot, _) = slot.ok_or_else(|| Error::NotFound(id_text(source)))?;
            parts.entry(Some(slot)).or_default().push(item);
        }
        Ok(parts)
    }

    /// One command for each slot; all edges of one slot, or none. The first that is refused is the call's error.
    async fn edges<T>(
        &self,
        caller: &Caller,
        (options, request_hash): (Options, [u8; 16]),
        parts: BTreeMap<Option<Slot>, Vec<T>>,
        operation: impl Fn(Vec<T>) -> Operation,
        deadline: Instant,
    ) -> Result<Vec<Written>, Error> {
        let (now, key) = (time::calendar_ms(), options.key);
        let command = |(slot, items): (Option<Slot>, Vec<T>)| Command {
            tenant: caller.tenant.to_string(),
            slot,
            // Two slots of one shard are two commands.
            idempotency_key: match slot {
                Some(slot) if !key.is_empty() => format!("{key}/{slot}"),
                _ => key.clone(),
            },
            request_hash,
            now,
            operation: operation(items),
        };
        let commands = parts.into_iter().map(command).collect();
        let (decided, map_version) = self.router.propose(commands, deadline).await;
        let mut written: Vec<Written> =
            decided.into_iter().map(|decided| written(decided, map_version)).collect::<Result<_, _>>()?;
        if options.elsewhere {
            self.wait_elsewhere(written.iter_mut().collect(), deadline).await;
        }
        match written.is_empty() {
            true => Err(Error::Internal("the ledger gave no outcome".into())),
            false => Ok(written),
        }
    }

    /// Erases all that a user, or an agent, has: recorded in the cluster map, carried out by whoever leads the control group ([`crate::control::erasures`]), and
    /// waited for. A receipt.
    pub async fn erase(
        &self,
        caller: &Caller,
        mut request: v1::EraseRequest,
        deadline: Instant,
    ) -> Result<v1::EraseResponse, Error> {
        let everywhere = request.options.as_ref().is_none_or(|options| options.durability == 0);
        let Options { key, elsewhere } = options(request.options.take())?;
        let elsewhere = elsewhere || everywhere;
        let key = if key.is_empty() { sim::rand::uuid_v7().simple().to_string() } else { key };
        let subject = Subject { user: request.user, agent: request.agent };
        let (control, now) = (self.router.control(), time::calendar_ms());
        let mut map =
            control.update(|map| map.begin_erasure(&caller.tenant, &subject, &key, now), deadline).await?;
        let mut applied: Option<Instant> = None;
        loop {
            let found = map.erasure_of(&caller.tenant, &key);
            let (id, erasure) = found.ok_or_else(|| Error::Internal("the list lacks the erasure".into()))?;
            let late = deadline - Instant::now() <= ERASURE_RESERVE;
            if erasure.is_applied() {
                // The other region is waited for as long as a write waits for it.
                let waited = applied.get_or_insert_with(Instant::now).elapsed() >= ELSEWHERE_WITHIN;
                if !elsewhere || waited || late || erasure.is_settled(&map.serving()) {
                    return Ok(convert::receipt(id, erasure, &map));
                }
            } else if late {
                return Err(Error::OutcomeUnknown(format!("erasure {id} is recorded and goes on")));
            }
            time::sleep(ERASURE_LOOK.min(deadline - Instant::now())).await;
            map = control.glance(deadline).await.unwrap_or(map);
        }
    }

    /// Drops a month of everybody's memories, on every shard; what each of them had.
    pub async fn drop_month(
        &self,
        month: Month,
        key: String,
        deadline: Instant,
    ) -> Result<Vec<Written>, Error> {
        let request_hash = convert::hash_of(month.to_string().as_bytes());
        let command = Command {
            tenant: GLOBAL_TENANT.to_string(),
            slot: None,
            idempotency_key: key,
            request_hash,
            now: time::calendar_ms(),
            operation: Operation::DropMonth(month),
        };
        let map = self.router.map(0, deadline).await?;
        let mut dropped = vec![];
        for shard in map.shards.keys() {
            let outcomes =
                self.router.at(&map, *shard, &[]).reach.propose(vec![command.clone()], deadline).await?;
            match outcomes.into_iter().next() {
                Some(Outcome::NotFound { .. }) => {}
                Some(Outcome::NotHere) | None => {
                    let problem =
                        format!("shard {shard} is giving memories to another; parts of {month} may be gone");
                    return Err(Error::OutcomeUnknown(problem));
                }
                Some(outcome) => dropped.push(written(Ok((*shard, outcome)), map.version)?),
            }
        }
        match dropped.is_empty() {
            true => Err(Error::NotFound(month.to_string())),
            false => Ok(dropped),
        }
    }
}
