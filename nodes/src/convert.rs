//! Between the protocol's messages and the store's types. Everything that comes in is checked here, once.

use crate::control::erasures::{Erasure, Part};
use crate::control::map::{ClusterMap, ShardId};
use crate::error::Error;
use crate::limits::*;
use crate::proto::v1;
use crate::router::with_slot;
use sim::rand;
use std::collections::BTreeMap;
use storage::graph::{self, Walk};
use storage::model::*;
use storage::slots::slot_of;
use uuid::Uuid;

pub fn parse_id(field: &str, text: &str) -> Result<MemoryId, Error> {
    Uuid::try_parse(text)
        .map(|u| u.into_bytes())
        .map_err(|_| Error::invalid(field, format!("'{text}' is no UUID")))
}

pub fn id_text(id: &MemoryId) -> String {
    Uuid::from_bytes(*id).hyphenated().to_string()
}

/// The id of a memory that was written with an idempotency key and without an id: a UUIDv8 from tenant and key, so a retry is
/// the same memory on the same shard.
pub fn derived_id(tenant: &str, key: &str) -> MemoryId {
    let mut hasher = blake3::Hasher::new_derive_key("loci.v1 memory id from tenant and idempotency key");
    hasher.update(&(tenant.len() as u64).to_le_bytes()).update(tenant.as_bytes()).update(key.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().into_bytes()
}

fn check_len(field: &str, text: &str, max: usize) -> Result<(), Error> {
    if text.len() > max {
        return Err(Error::invalid(
            field,
            format!("is {} bytes long; at most {max} are allowed", text.len()),
        ));
    }
    Ok(())
}

fn time(value: i64) -> Option<UnixMs> {
    (value != 0).then_some(value)
}

pub fn check_metadata(text: &str) -> Result<(), Error> {
    check_len("metadata", text, METADATA_BYTES_MAX)?;
    if text.is_empty() {
        return Ok(());
    }
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(serde_json::Value::Object(_)) => Ok(()),
        Ok(_) => Err(Error::invalid("metadata", "must be a JSON object")),
        Err(error) => Err(Error::invalid("metadata", format!("is not valid JSON: {error}"))),
    }
}

fn check_categories(categories: &[String]) -> Result<(), Error> {
    if categories.len() > CATEGORIES_MAX {
        return Err(Error::invalid(
            "categories",
            format!("{} given; at most {CATEGORIES_MAX}", categories.len()),
        ));
    }
    categories.iter().try_for_each(|c| check_len("categories", c, NAME_BYTES_MAX))
}

fn parse_links(links: &[String]) -> Result<Vec<MemoryId>, Error> {
    if links.len() > LINKS_MAX {
        return Err(Error::invalid("links", format!("{} given; at most {LINKS_MAX}", links.len())));
    }
    links.iter().map(|l| parse_id("links", l)).collect()
}

fn check_importance(value: f32) -> Result<f32, Error> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(Error::invalid("importance", "must be from 0 to 1"))
    }
}

/// Checks a caller's vector and brings it to unit length.
pub fn unit_vector(vector: Vec<f32>, space: &str) -> Result<Vec<f32>, Error> {
    if vector.len() > DIMENSION_MAX {
        return Err(Error::invalid(
            "vector",
            format!("has {} dimensions; at most {DIMENSION_MAX}", vector.len()),
        ));
    }
    if space.is_empty() {
        return Err(Error::invalid("space", "must name the model that made the vector"));
    }
    check_len("space", space, NAME_BYTES_MAX)?;
    let square: f64 = vector.iter().map(|x| (*x as f64) * (*x as f64)).sum();
    if !square.is_finite() || square < 1e-30 {
        return Err(Error::invalid("vector", "must be finite and not zero"));
    }
    let scale = 1.0 / square.sqrt();
    Ok(vector.into_iter().map(|x| (x as f64 * scale) as f32).collect())
}

pub fn scope(value: i32) -> Result<Scope, Error> {
    match v1::Scope::try_from(value) {
        Ok(v1::Scope::Unspecified | v1::Scope::Private) => Ok(Scope::Private),
        Ok(v1::Scope::Shared) => Ok(Scope::Shared),
        Ok(v1::Scope::Global) => Ok(Scope::Global),
        Err(_) => Err(Error::invalid("scope", format!("unknown value {value}"))),
    }
}

fn memory_type(value: i32) -> Result<MemoryType, Error> {
    match v1::MemoryType::try_from(value) {
        Ok(v1::MemoryType::Unspecified | v1::MemoryType::Semantic) => Ok(MemoryType::Semantic),
        Ok(v1::MemoryType::Episodic) => Ok(MemoryType::Episodic),
        Ok(v1::MemoryType::Procedural) => Ok(MemoryType::Procedural),
        Ok(v1::MemoryType::Message) => Ok(MemoryType::Message),
        Err(_) => Err(Error::invalid("type", format!("unknown value {value}"))),
    }
}

fn status(value: i32) -> Result<Status, Error> {
    match v1::Status::try_from(value) {
        Ok(v1::Status::Unspecified | v1::Status::Active) => Ok(Status::Active),
        Ok(v1::Status::Archived) => Ok(Status::Archived),
        Err(_) => Err(Error::invalid("status", format!("unknown value {value}"))),
    }
}

/// A checked memory without its vector, if the caller gave none. `key` is the idempotency key.
pub fn new_memory(tenant: &str, new: v1::NewMemory, key: &str, now: UnixMs) -> Result<Memory, Error> {
    let scope = scope(new.scope)?;
    let tenant = if scope == Scope::Global { GLOBAL_TENANT } else { tenant };
    for (field, text) in [("user", &new.user), ("agent", &new.agent), ("session", &new.session)] {
        check_len(field, text, NAME_BYTES_MAX)?;
    }
    check_len("idempotency_key", key, NAME_BYTES_MAX)?;
    check_len("text", &new.text, TEXT_BYTES_MAX)?;
    if new.text.is_empty() && new.vector.is_empty() {
        return Err(Error::invalid("text", "a memory needs a text or a vector"));
    }
    if scope == Scope::Private && new.user.is_empty() && new.agent.is_empty() {
        return Err(Error::invalid("user", "a PRIVATE memory needs a user or an agent"));
    }
    check_metadata(&new.metadata)?;
    check_categories(&new.categories)?;
    let vector = if new.vector.is_empty() { vec![] } else { unit_vector(new.vector, &new.space)? };
    let given = if new.id.is_empty() { None } else { Some(parse_id("id", &new.id)?) };
    let mut memory = Memory {
        id: given.unwrap_or_default(),
        tenant: tenant.into(),
        scope,
        user: new.user,
        agent: new.agent,
        session: new.session,
        text: new.text,
        metadata: new.metadata,
        kind: memory_type(new.r#type)?,
        status: Status::Active,
        importance: check_importance(new.importance)?,
        categories: new.categories,
        links: parse_links(&new.links)?,
        event_time: time(new.event_time),
        valid_from: time(new.valid_from),
        valid_to: time(new.valid_to),
        created: now,
        updated: now,
        expires: time(new.expires),
        access_count: 0,
        last_access: None,
        version: 1,
        space: if vector.is_empty() { String::new() } else { new.space },
        tier: Tier::Hot,
        vector,
    };
    if given.is_none() {
        let made = if key.is_empty() { rand::uuid_v7().into_bytes() } else { derived_id(tenant, key) };
        // A GLOBAL memory's slot is of its id; what stands in that says nothing.
        memory.id = with_slot(made, slot_of(&memory.owner(), &made));
    }
    Ok(memory)
}

/// A checked change; its vector is still to be made when only the text changes.
pub fn patch(request: &mut v1::UpdateRequest) -> Result<Patch, Error> {
    if let Some(text) = &request.text {
        check_len("text", text, TEXT_BYTES_MAX)?;
    }
    if let Some(metadata) = &request.metadata {
        check_metadata(metadata)?;
    }
    let categories = request.categories.take().map(|c| c.values);
    categories.as_deref().map_or(Ok(()), check_categories)?;
    let vector = match std::mem::take(&mut request.vector) {
        vector if vector.is_empty() => None,
        vector => Some((unit_vector(vector, &request.space)?, request.space.clone())),
    };
    Ok(Patch {
        text: request.text.take(),
        metadata: request.metadata.take(),
        kind: request.r#type.map(memory_type).transpose()?,
        status: request.status.map(status).transpose()?,
        importance: request.importance.map(check_importance).transpose()?,
        categories,
        links: request.links.take().map(|l| parse_links(&l.values)).transpose()?,
        event_time: request.event_time.map(time),
        valid_from: request.valid_from.map(time),
        valid_to: request.valid_to.map(time),
        expires: request.expires.map(time),
        vector,
    })
}

pub fn memory(memory: &Memory, with_vector: bool) -> v1::Memory {
    v1::Memory {
        id: id_text(&memory.id),
        tenant: memory.tenant.clone(),
        scope: memory.scope as i32,
        user: memory.user.clone(),
        agent: memory.agent.clone(),
        session: memory.session.clone(),
        text: memory.text.clone(),
        metadata: memory.metadata.clone(),
        r#type: memory.kind as i32,
        status: memory.status as i32,
        importance: memory.importance,
        categories: memory.categories.clone(),
        links: memory.links.iter().map(id_text).collect(),
        event_time: memory.event_time.unwrap_or(0),
        valid_from: memory.valid_from.unwrap_or(0),
        valid_to: memory.valid_to.unwrap_or(0),
        created: memory.created,
        updated: memory.updated,
        expires: memory.expires.unwrap_or(0),
        access_count: memory.access_count,
        last_access: memory.last_access.unwrap_or(0),
        version: memory.version,
        space: memory.space.clone(),
        tier: memory.tier as i32,
        vector: if with_vector { memory.vector.clone() } else { vec![] },
    }
}

/// A session's token: its positions on some shards.
pub fn token(positions: impl IntoIterator<Item = (ShardId, Position)>, map_version: u64) -> v1::Token {
    let at = |(shard, position): (ShardId, Position)| v1::ShardPosition {
        shard,
        epoch: position.epoch,
        index: position.index,
    };
    v1::Token { positions: positions.into_iter().map(at).collect(), map_version }
}

/// A token's positions by shard; of two on one shard the later one.
pub fn positions(token: &v1::Token) -> BTreeMap<ShardId, Position> {
    let mut found: BTreeMap<ShardId, Position> = BTreeMap::new();
    for at in token.positions.iter().filter(|at| at.index > 0) {
        let position = Position { epoch: at.epoch, index: at.index, item: u32::MAX };
        let held = found.entry(at.shard).or_default();
        *held = position.max(*held);
    }
    found
}

pub fn change(shard: ShardId, change: &Change) -> v1::Change {
    v1::Change {
        kind: change.kind as i32,
        memory: Some(memory(&change.memory, false)),
        token: Some(token([(shard, change.position)], 0)),
    }
}

/// What came of an erasure that every shard has applied, and where its bytes may still be.
pub fn receipt(id: ErasureId, erasure: &Erasure, map: &ClusterMap) -> v1::EraseResponse {
    let shard = |(shard, part): (&ShardId, &Part)| v1::ErasedShard {
        shard: *shard,
        epoch: part.seen.0,
        index: part.seen.1,
        memories: part.memories,
        versions: part.versions,
        regions: part.regions.iter().filter(|region| !region.is_empty()).cloned().collect(),
    };
    let position = |part: &Part| Position { epoch: part.seen.0, index: part.seen.1, item: u32::MAX };
    let positions = erasure.parts.iter().map(|(shard, part)| (*shard, position(part)));
    let everywhere = map.regions.is_some() && erasure.is_settled(&map.serving());
    let durability = if everywhere { v1::Durability::Region } else { v1::Durability::Quorum };
    let leftover = |(place, until): (&str, &str)| v1::Leftover { r#where: place.into(), until: until.into() };
    let regions = map.regions.is_some().then_some(LEFT_IN_QUARANTINE);
    v1::EraseResponse {
        erasure: id,
        at: erasure.at_ms,
        memories: erasure.parts.values().map(|part| part.memories).sum(),
        versions: erasure.parts.values().map(|part| part.versions).sum(),
        shards: erasure.parts.iter().map(shard).collect(),
        leftovers: LEFTOVERS.into_iter().chain(regions).map(leftover).collect(),
        info: Some(v1::WriteInfo {
            token: Some(token(positions, map.version)),
            durability: durability.into(),
            item: 0,
        }),
    }
}

/// Where bytes stay that nobody is shown any more, and until when.
const LEFTOVERS: [(&str, &str); 7] = [
    (
        "each replica's log: the writes themselves",
        "its segments are purged, behind a later checkpoint and both bases",
    ),
    ("each replica's two bases, which damaged views are made anew from", "two later ones are written"),
    (
        "old views of a replica that started over, which its snapshot is completed with",
        "it has the snapshot, or its next checkpoint",
    ),
    ("the index of words: single words, without what they stood in", "SQLite merges its segments"),
    (
        "segments of vectors",
        "they are made anew, most within seconds; product-coded ones, and all after a restart, when a fifth of one is dead",
    ),
    (
        "relations from others' memories in other slots, with nothing but ids",
        "their sources are deleted, or erased",
    ),
    ("idempotency keys, with ids and versions", "24 hours after their writes"),
];
const LEFT_IN_QUARANTINE: (&str, &str) =
    ("quarantines of replicas that came back after a failover", "an operator removes the files");

/// The partitions that a call may look into.
pub fn owners(tenant: &str, owners: Option<&v1::Owners>) -> Result<Vec<Owner>, Error> {
    let default = v1::Owners::default();
    let owners = owners.unwrap_or(&default);
    check_len("user", &owners.user, NAME_BYTES_MAX)?;
    check_len("agent", &owners.agent, NAME_BYTES_MAX)?;
    let mut found = vec![];
    if !owners.user.is_empty() {
        found.push(Owner::User { tenant: tenant.into(), user: owners.user.clone() });
    }
    if !owners.agent.is_empty() {
        found.push(Owner::Agent { tenant: tenant.into(), agent: owners.agent.clone() });
    }
    if !owners.exclude_shared {
        found.push(Owner::Shared { tenant: tenant.into() });
    }
    if !owners.exclude_global {
        found.push(Owner::Global);
    }
    Ok(found)
}

fn field(name: &str) -> Result<Field, Error> {
    Ok(match name {
        "text" => Field::Text,
        "user" => Field::User,
        "agent" => Field::Agent,
        "session" => Field::Session,
        "type" => Field::Kind,
        "status" => Field::Status,
        "importance" => Field::Importance,
        "categories" => Field::Categories,
        "created" => Field::Created,
        "updated" => Field::Updated,
        "event_time" => Field::EventTime,
        _ => match name.strip_prefix("metadata.") {
            Some(path) if !path.is_empty() && path.len() <= NAME_BYTES_MAX => Field::Metadata(path.into()),
            _ => return Err(Error::invalid("filter", format!("there is no field '{name}'"))),
        },
    })
}

fn value(value: Option<v1::Value>) -> Result<Value, Error> {
    match value.and_then(|v| v.kind) {
        Some(v1::value::Kind::Text(text)) => {
            check_len("filter", &text, TEXT_BYTES_MAX)?;
            Ok(Value::Text(text))
        }
        Some(v1::value::Kind::Number(number)) => Ok(Value::Number(number)),
        Some(v1::value::Kind::Boolean(flag)) => Ok(Value::Bool(flag)),
        None => Err(Error::invalid("filter", "a condition lacks its value")),
    }
}

/// A checked filter; `None` if there is none.
pub fn filter(filter: Option<v1::Filter>) -> Result<Option<Filter>, Error> {
    let mut nodes = 0;
    filter.map(|f| filter_node(f, 0, &mut nodes)).transpose()
}

fn filter_node(filter: v1::Filter, depth: usize, nodes: &mut usize) -> Result<Filter, Error> {
    use v1::filter::Condition;
    *nodes += 1;
    if *nodes > FILTER_NODES_MAX || depth > FILTER_DEPTH_MAX {
        let limits = format!("at most {FILTER_NODES_MAX} conditions, nested {FILTER_DEPTH_MAX} deep");
        return Err(Error::invalid("filter", limits));
    }
    let mut all = |list: v1::FilterList| -> Result<Vec<Filter>, Error> {
        list.filters.into_iter().map(|f| filter_node(f, depth + 1, nodes)).collect()
    };
    Ok(match filter.condition.ok_or_else(|| Error::invalid("filter", "a condition is empty"))? {
        Condition::All(list) => Filter::And(all(list)?),
        Condition::Any(list) => Filter::Or(all(list)?),
        Condition::Not(inner) => Filter::Not(Box::new(filter_node(*inner, depth + 1, nodes)?)),
        Condition::Compare(c) => Filter::Compare {
            field: field(&c.field)?,
            op: match v1::CompareOp::try_from(c.op) {
                Ok(v1::CompareOp::Eq) => CompareOp::Eq,
                Ok(v1::CompareOp::Ne) => CompareOp::Ne,
                Ok(v1::CompareOp::Lt) => CompareOp::Lt,
                Ok(v1::CompareOp::Le) => CompareOp::Le,
                Ok(v1::CompareOp::Gt) => CompareOp::Gt,
                Ok(v1::CompareOp::Ge) => CompareOp::Ge,
                _ => return Err(Error::invalid("filter", "a comparison lacks its operator")),
            },
            value: value(c.value)?,
        },
        Condition::In(i) => Filter::In {
            field: field(&i.field)?,
            values: i.values.into_iter().map(|v| value(Some(v))).collect::<Result<_, _>>()?,
        },
        Condition::Contains(c) => Filter::Contains { field: field(&c.field)?, value: value(c.value)? },
        Condition::Exists(name) => Filter::Exists { field: field(&name)? },
    })
}

/// Checked edges.
pub fn edges(edges: Vec<v1::Edge>) -> Result<Vec<Edge>, Error> {
    if edges.is_empty() || edges.len() > EDGES_MAX {
        return Err(Error::invalid("edges", format!("{} given; 1 to {EDGES_MAX} are allowed", edges.len())));
    }
    let edge = |edge: v1::Edge| {
        check_len("relation", &edge.relation, NAME_BYTES_MAX)?;
        if edge.relation.is_empty() {
            return Err(Error::invalid("relation", "an edge needs a name for its relation"));
        }
        if !edge.weight.is_finite() {
            return Err(Error::invalid("weight", "must be finite"));
        }
        Ok(Edge {
            source: parse_id("source", &edge.source)?,
            relation: edge.relation,
            target: parse_id("target", &edge.target)?,
            weight: edge.weight,
            valid_from: time(edge.valid_from),
            valid_to: time(edge.valid_to),
        })
    };
    edges.into_iter().map(edge).collect()
}

pub fn edge_message(edge: &Edge) -> v1::Edge {
    v1::Edge {
        source: id_text(&edge.source),
        target: id_text(&edge.target),
        relation: edge.relation.clone(),
        weight: edge.weight,
        valid_from: edge.valid_from.unwrap_or(0),
        valid_to: edge.valid_to.unwrap_or(0),
    }
}

/// A checked walk.
pub fn walk(tenant: &str, request: v1::TraverseRequest, now: UnixMs) -> Result<Walk, Error> {
    if request.start.is_empty() || request.start.len() > WALK_STARTS_MAX {
        let given = request.start.len();
        return Err(Error::invalid("start", format!("{given} given; 1 to {WALK_STARTS_MAX} are allowed")));
    }
    let within = |field: &str, value: u32, default: u32, max: u32| match value {
        0 => Ok(default),
        value if value <= max => Ok(value),
        value => Err(Error::invalid(field, format!("is {value}; at most {max}"))),
    };
    request.relations.iter().try_for_each(|r| check_len("relations", r, NAME_BYTES_MAX))?;
    Ok(Walk {
        tenant: tenant.into(),
        start: request.start.iter().map(|id| parse_id("start", id)).collect::<Result<_, _>>()?,
        relations: request.relations,
        hops: within("hops", request.hops, 1, graph::HOPS_MAX)?,
        fan_out: within("fan_out", request.fan_out, 100, graph::FAN_OUT_MAX)?,
        inbound: request.inbound,
        as_of: time(request.as_of).unwrap_or(now),
        now,
        include_archived: request.include_archived,
    })
}

/// Hash of a request's content, by which a reused idempotency key is told from a retry.
pub fn request_hash(message: &impl prost::Message) -> [u8; 16] {
    hash_of(&message.encode_to_vec())
}

pub fn hash_of(bytes: &[u8]) -> [u8; 16] {
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_from_key_is_stable_and_of_one_tenant() {
        assert_eq!(derived_id("a", "k"), derived_id("a", "k"));
        assert_ne!(derived_id("a", "k"), derived_id("b", "k"));
        assert_ne!(derived_id("ab", "c"), derived_id("a", "bc"));
        assert_eq!(Uuid::from_bytes(derived_id("a", "k")).get_version_num(), 8);
    }

    #[test]
    fn vectors_are_brought_to_unit_length_or_refused() -> Result<(), Error> {
        let unit = unit_vector(vec![3.0, 4.0], "s")?;
        assert!((unit[0] - 0.6).abs() < 1e-6 && (unit[1] - 0.8).abs() < 1e-6);
        for bad in [vec![0.0; 3], vec![f32::NAN], vec![f32::INFINITY, 1.0], vec![1.0; DIMENSION_MAX + 1]] {
            assert!(unit_vector(bad, "s").is_err());
        }
        assert!(unit_vector(vec![1.0], "").is_err());
        Ok(())
    }

    #[test]
    fn filters_that_nest_too_deep_are_refused() {
        let mut nested = v1::Filter { condition: Some(v1::filter::Condition::Exists("text".into())) };
        for _ in 0..=FILTER_DEPTH_MAX {
            nested = v1::Filter { condition: Some(v1::filter::Condition::Not(Box::new(nested))) };
        }
        assert!(filter(Some(nested)).is_err());
    }
}
