//! The same as JSON: for scripts, for the command line's `--json`, and for what is posted to others.

use crate::proto::v1;
use serde_json::{Value, json};

/// A node's status.
pub fn status(status: &v1::StatusResponse) -> Value {
    let shards: Vec<_> = status
        .shards
        .iter()
        .map(|shard| {
            json!({
                "shard": shard.shard, "leader": shard.leader, "is_leader": shard.is_leader, "term": shard.term,
                "epoch": shard.epoch, "last_index": shard.last_index, "committed_index": shard.committed_index,
                "views": shard.views.iter().map(|v| (v.view.clone(), v.published_index)).collect::<std::collections::BTreeMap<_, _>>(),
                "memories": shard.memories, "vectors": shard.vectors, "idempotency_keys": shard.idempotency_keys,
                "pinned": shard.pinned, "lag_ms": shard.lag_ms,
            })
        })
        .collect();
    let cache = status
        .cache
        .as_ref()
        .map(|c| json!({ "memories": c.memories, "bytes": c.bytes, "hits": c.hits, "misses": c.misses }));
    json!({
        "node": status.node, "build": status.build, "roles": status.roles, "level": status.level,
        "uptime_ms": status.uptime_ms, "disk_bytes": status.disk_bytes, "shards": shards, "cache": cache,
    })
}

fn steps(steps: &[v1::RegionStep]) -> Vec<Value> {
    steps.iter().map(|step| json!({ "step": step.step, "at_ms": step.at_ms })).collect()
}

/// A change of the primary region.
fn change(change: &v1::RegionChange) -> Value {
    json!({
        "from": change.from, "to": change.to, "planned": change.planned, "step": change.step, "steps": steps(&change.steps),
        "cause": change.cause, "epoch": change.epoch, "waits_for": change.waits_for,
    })
}

/// Which region to talk to.
pub fn regions(answer: &v1::RegionsResponse) -> Value {
    let gateway = |g: &v1::GatewayPlace| json!({ "node": g.node, "address": g.address, "state": g.state });
    let region = |r: &v1::RegionPlace| {
        let gateways: Vec<_> = r.gateways.iter().map(gateway).collect();
        json!({ "name": r.name, "role": r.role, "up": r.up, "gateways": gateways })
    };
    json!({
        "primary": answer.primary, "epoch": answer.epoch, "map_version": answer.map_version, "node": answer.node,
        "heard_ms": answer.heard_ms, "told_version": answer.told_version,
        "regions": answer.regions.iter().map(region).collect::<Vec<_>>(), "change": answer.change.as_ref().map(change),
    })
}

/// An incident.
pub fn incident(incident: &v1::Incident) -> Value {
    let loss = |loss: &v1::Loss| {
        json!({
            "shard": loss.shard, "epoch": loss.epoch, "resolved": loss.resolved, "after": loss.after, "to": loss.to,
            "commands": loss.commands, "quarantine": (loss.quarantine > 0).then_some(loss.quarantine),
        })
    };
    json!({
        "id": incident.id, "state": incident.state, "from": incident.from, "to": incident.to, "planned": incident.planned,
        "cause": incident.cause, "epoch": incident.epoch, "steps": steps(&incident.steps), "silent_since": incident.silent_since,
        "rto_ms": incident.rto_ms, "mttr_ms": incident.mttr_ms,
        "rpo": {
            "accounted": incident.accounted, "commands_lost": incident.commands_lost, "lost_within_ms": incident.lost_within_ms,
            "entries_at_most": incident.entries_at_most, "shards": incident.losses.iter().map(loss).collect::<Vec<_>>(),
        },
        "accounted_at": incident.accounted_at, "closed_at": incident.closed_at, "waits_for": incident.waits_for,
    })
}
