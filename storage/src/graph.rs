//! The graph view: edges between the memories of a tenant, walked in both directions.
//!
//! An edge is (source, relation, target) with a weight and the time for which it holds; it lives with its source, in that one's slot of
//! one table, `edges`. Its target is an id of the tenant, in whatever slot. Deleting a memory removes its edges in both directions in the same
//! transaction, as far as their slots are taken here: what is sealed does not change. So a target may not be
//! there: it may also have expired, or lie where this shard cannot see; whoever walks asks for every memory it reaches,
//! and what is not there is neither shown nor walked through.

use crate::codec;
use crate::error::StorageError;
use crate::model::*;
use crate::records::rows;
use crate::shown::Shown;
use crate::slots::Slot;
use bincode::{Decode, Encode};
use rusqlite::{Connection, Row, params};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Hops from the start at most.
pub const HOPS_MAX: u32 = 8;
/// Edges followed from one memory at most.
pub const FAN_OUT_MAX: u32 = 1000;
/// Memories reached by one walk at most.
pub const REACHED_MAX: usize = 10_000;

/// One row of `edges`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct EdgeRow {
    pub tenant: String,
    /// Its source's.
    pub slot: Slot,
    pub edge: Edge,
}

/// A walk along the edges.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Walk {
    pub tenant: String,
    pub start: Vec<MemoryId>,
    /// Empty: all.
    pub relations: Vec<String>,
    /// 1: neighbours only; at most [`HOPS_MAX`].
    pub hops: u32,
    /// Of each memory the heaviest so many edges; at most [`FAN_OUT_MAX`].
    pub fan_out: u32,
    /// From targets to sources.
    pub inbound: bool,
    /// Only edges that held at that time.
    pub as_of: UnixMs,
    /// What has expired by then is not found.
    pub now: UnixMs,
    pub include_archived: bool,
}

/// What a walk found: edges in the order of the walk, and every memory that they touch, the start first.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Walked {
    pub edges: Vec<Edge>,
    pub memories: Vec<Arc<Memory>>,
    /// [`REACHED_MAX`] was met: there is more.
    pub cut: bool,
}

pub fn hash(row: &EdgeRow) -> u128 {
    rows::hash_of(b"edges", &codec::encode(row))
}

/// The columns that [`edge`] reads.
pub const EDGE: &str = "source, relation, target, weight, valid_from, valid_to";

pub fn edge(row: &Row<'_>) -> Result<Edge, rusqlite::Error> {
    let (source, target) = (row.get::<_, MemoryId>(0)?, row.get::<_, MemoryId>(2)?);
    let (weight, valid_from, valid_to) = (row.get::<_, f64>(3)? as f32, row.get(4)?, row.get(5)?);
    Ok(Edge { source, relation: row.get(1)?, target, weight, valid_from, valid_to })
}

/// The number under which a tenant's edges lie.
pub fn tenant_number(db: &Connection, tenant: &str) -> Result<Option<i64>, StorageError> {
    rows::owner_number(db, &Owner::Shared { tenant: tenant.into() })
}

/// The edges of a source, in the order of relation and target.
pub fn outbound(db: &Connection, tenant: i64, id: &MemoryId, slot: Slot) -> Result<Vec<Edge>, StorageError> {
    let sql = format!(
        "SELECT {EDGE} FROM edges WHERE slot = ?1 AND tenant = ?2 AND source = ?3 ORDER BY relation, target"
    );
    let mut statement = db.prepare_cached(&sql)?;
    let found = statement.query_map(params![slot, tenant, id], edge)?;
    Ok(found.collect::<Result<_, _>>()?)
}

/// The edges to a target, with their slots, in the order of source and relation.
pub fn inbound(db: &Connection, tenant: i64, id: &MemoryId) -> Result<Vec<(Slot, Edge)>, StorageError> {
    let sql = format!(
        "SELECT {EDGE}, slot FROM edges WHERE tenant = ?1 AND target = ?2 ORDER BY source, relation, slot"
    );
    let mut statement = db.prepare_cached(&sql)?;
    let found = statement.query_map(params![tenant, id], |row| Ok((row.get(6)?, edge(row)?)))?;
    Ok(found.collect::<Result<_, _>>()?)
}

pub fn find(
    db: &Connection,
    (slot, tenant): (Slot, i64),
    (source, relation, target): (&MemoryId, &str, &MemoryId),
) -> Result<Option<Edge>, StorageError> {
    let mut statement = db.prepare_cached(&format!(
        "SELECT {EDGE} FROM edges
         WHERE slot = ?1 AND tenant = ?2 AND source = ?3 AND relation = ?4 AND target = ?5"
    ))?;
    let mut found = statement.query(params![slot, tenant, source, relation, target])?;
    Ok(found.next()?.map(edge).transpose()?)
}

pub fn put(db: &Connection, (slot, tenant): (Slot, i64), edge: &Edge) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached("INSERT INTO edges VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?;
    let weight = edge.weight as f64;
    statement.execute(params![
        slot,
        tenant,
        edge.source,
        edge.relation,
        edge.target,
        weight,
        edge.valid_from,
        edge.valid_to
    ])?;
    Ok(())
}

pub fn remove(db: &Connection, (slot, tenant): (Slot, i64), edge: &Edge) -> Result<(), StorageError> {
    let mut statement = db.prepare_cached(
        "DELETE FROM edges WHERE slot = ?1 AND tenant = ?2 AND source = ?3 AND relation = ?4 AND target = ?5",
    )?;
    statement.execute(params![slot, tenant, edge.source, edge.relation, edge.target])?;
    Ok(())
}

/// The tenant whose edges lie under a number's encoded owner.
pub fn tenant_of(owner: &[u8]) -> Result<String, StorageError> {
    match codec::decode(owner).map_err(StorageError::corrupt("an owner's name"))? {
        Owner::Shared { tenant } => Ok(tenant),
        other => {
            let problem = format!("an edge belongs to {other:?}");
            Err(StorageError::Corrupt { what: "the graph".into(), problem })
        }
    }
}

/// A query for every edge of the shard with what it lies under, as [`row`] reads them.
pub fn rows_of() -> String {
    format!("SELECT {EDGE}, owners.owner, slot FROM edges JOIN owners ON owners.number = edges.tenant")
}

pub fn row(row: &Row<'_>) -> Result<EdgeRow, StorageError> {
    let tenant = tenant_of(row.get_ref(6)?.as_blob().map_err(rusqlite::Error::from)?)?;
    Ok(EdgeRow { tenant, slot: row.get(7)?, edge: edge(row)? })
}

/// Whether a walk may follow an edge.
fn holds(walk: &Walk, edge: &Edge) -> bool {
    (walk.relations.is_empty() || walk.relations.contains(&edge.relation))
        && edge.valid_from.is_none_or(|from| from <= walk.as_of)
        && edge.valid_to.is_none_or(|to| walk.as_of < to)
}

/// The edges of a memory in a slot that a walk may follow, heaviest first, equal ones by source, relation and target; with each the slot of what
/// lies at its other end, if that is known.
fn followed(
    db: &Connection,
    tenant: i64,
    (id, slot): (&MemoryId, Slot),
    walk: &Walk,
    shown: &Shown,
) -> Result<Vec<(Option<Slot>, Edge)>, StorageError> {
    let mut edges: Vec<(Option<Slot>, Edge)> = match walk.inbound {
        true => inbound(db, tenant, id)?.into_iter().map(|(slot, e)| (Some(slot), e)).collect(),
        false => outbound(db, tenant, id, slot)?.into_iter().map(|e| (None, e)).collect(),
    };
    edges.retain(|(slot, edge)| slot.is_none_or(|slot| shown.slot(&walk.tenant, slot)) && holds(walk, edge));
    edges.sort_by(|(_, a), (_, b)| b.weight.total_cmp(&a.weight));
    Ok(edges)
}

/// The edges of a walk's start that it may follow, whatever is at their other ends.
pub fn edges_of(db: &Connection, walk: &Walk, shown: &Shown) -> Result<Vec<Edge>, StorageError> {
    let Some(tenant) = tenant_number(db, &walk.tenant)? else { return Ok(vec![]) };
    let mut found = vec![];
    for id in &walk.start {
        let slots: Vec<Slot> = match walk.inbound {
            // An edge to it may come from anywhere.
            true => vec![0],
            false => rows::places(db, &walk.tenant, id, None)?.into_iter().map(|(slot, _)| slot).collect(),
        };
        for slot in slots.into_iter().filter(|slot| walk.inbound || shown.slot(&walk.tenant, *slot)) {
            let edges = followed(db, tenant, (id, slot), walk, shown)?;
            found.extend(edges.into_iter().map(|(_, edge)| edge));
        }
    }
    Ok(found)
}

/// Gives a memory, of one slot or of any, if it is there to be seen.
type See<'a> = dyn FnMut(&MemoryId, Option<Slot>) -> Result<Option<Arc<Memory>>, StorageError> + 'a;

/// Walks breadth first. `see` gives a memory if it is there to be seen; edges of slots that are not shown are not followed.
pub fn walk(db: &Connection, walk: &Walk, shown: &Shown, see: &mut See<'_>) -> Result<Walked, StorageError> {
    let mut walked = Walked::default();
    let tenant = tenant_number(db, &walk.tenant)?;
    let mut reached: BTreeSet<MemoryId> = BTreeSet::new();
    let mut layer = vec![];
    for id in &walk.start {
        if reached.contains(id) {
            continue;
        }
        if let Some(memory) = see(id, None)? {
            reached.insert(*id);
            layer.push((*id, memory.slot()));
            walked.memories.push(memory);
        }
    }
    let Some(tenant) = tenant else { return Ok(walked) };
    for _ in 0..walk.hops.min(HOPS_MAX) {
        let mut next = vec![];
        for (id, slot) in &layer {
            let mut count = 0;
            for (slot, edge) in followed(db, tenant, (id, *slot), walk, shown)? {
                if count == walk.fan_out.min(FAN_OUT_MAX) {
                    break;
                }
                let other = if walk.inbound { edge.source } else { edge.target };
                if !reached.contains(&other) {
                    let Some(memory) = see(&other, slot)? else { continue };
                    if reached.len() == REACHED_MAX {
                        walked.cut = true;
                        continue;
                    }
                    reached.insert(other);
                    next.push((other, memory.slot()));
                    walked.memories.push(memory);
                }
                count += 1;
                walked.edges.push(edge);
            }
        }
        layer = next;
    }
    Ok(walked)
}
