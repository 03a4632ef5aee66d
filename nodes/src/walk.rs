//! Walks over several shards. An edge lives with its source, its target may be anywhere: so each layer's edges are asked of all shards, then the
//! memories that they lead to, and what is not there is neither shown nor walked through. With one shard, that walks by itself.

use crate::control::map::{ClusterMap, ShardEntry, ShardId};
use crate::error::Error;
use crate::reader::Reader;
use crate::router::{Part, Reading};
use crate::views::{Answered, Ask, Found, unexpected};
use sim::time::Instant;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use storage::graph::{FAN_OUT_MAX, HOPS_MAX, REACHED_MAX, Walk, Walked};
use storage::model::*;

type Answers = Vec<(ShardId, Answered)>;

impl Reader {
    /// Walks breadth first; the walk and the answers that it was made of.
    pub async fn walk(
        &self,
        walk: Walk,
        reading: &Reading,
        deadline: Instant,
    ) -> Result<(Walked, Answers), Error> {
        let plan = |map: &ClusterMap| -> Vec<Part> {
            let part =
                |(id, shard): (&ShardId, &ShardEntry)| (*id, Ask::Walk(walk.clone()), shard.slots.clone());
            // Several shards are walked together, below.
            if map.shards.len() == 1 { map.shards.iter().map(part).collect() } else { vec![] }
        };
        let mut answers = self.router.ask(reading, deadline, plan).await?;
        if answers.is_empty() {
            return self.walk_all(walk, reading, deadline).await;
        }
        match answers
            .first_mut()
            .map(|(_, answered)| std::mem::replace(&mut answered.found, Found::Hits(vec![])))
        {
            Some(Found::Walked(walked)) => Ok((walked, answers)),
            _ => Err(unexpected()),
        }
    }

    /// The memories with these ids that are there to be seen.
    async fn see(
        &self,
        walk: &Walk,
        ids: Vec<MemoryId>,
        reading: &Reading,
        deadline: Instant,
    ) -> Result<(BTreeMap<MemoryId, Arc<Memory>>, Answers), Error> {
        let seeing = Walk { start: ids, hops: 0, ..walk.clone() };
        let mut answers = self.router.ask_all(reading, deadline, || Ask::Walk(seeing.clone())).await?;
        let mut seen: BTreeMap<MemoryId, Arc<Memory>> = BTreeMap::new();
        for (_, answered) in &mut answers {
            let Found::Walked(walked) = std::mem::replace(&mut answered.found, Found::Hits(vec![])) else {
                return Err(unexpected());
            };
            for memory in walked.memories {
                // The tenant's own before a GLOBAL one of the same id.
                let own = memory.tenant == walk.tenant;
                if own || !seen.contains_key(&memory.id) {
                    seen.insert(memory.id, memory);
                }
            }
        }
        Ok((seen, answers))
    }

    async fn walk_all(
        &self,
        walk: Walk,
        reading: &Reading,
        deadline: Instant,
    ) -> Result<(Walked, Answers), Error> {
        let mut walked = Walked::default();
        let (seen, answers) = self.see(&walk, walk.start.clone(), reading, deadline).await?;
        let mut reached: BTreeSet<MemoryId> = BTreeSet::new();
        let mut layer = vec![];
        for id in &walk.start {
            if let Some(memory) = seen.get(id).filter(|_| reached.insert(*id)) {
                layer.push(*id);
                walked.memories.push(memory.clone());
            }
        }
        for _ in 0..walk.hops.min(HOPS_MAX) {
            if layer.is_empty() {
                break;
            }
            let from = Walk { start: layer.clone(), ..walk.clone() };
            let mut edges: BTreeMap<MemoryId, Vec<Edge>> = BTreeMap::new();
            for (_, answered) in self.router.ask_all(reading, deadline, || Ask::Edges(from.clone())).await? {
                let Found::Edges(found) = answered.found else { return Err(unexpected()) };
                for edge in found {
                    let at = if walk.inbound { edge.target } else { edge.source };
                    edges.entry(at).or_default().push(edge);
                }
            }
            let other = |edge: &Edge| if walk.inbound { edge.source } else { edge.target };
            let unknown: BTreeSet<MemoryId> =
                edges.values().flatten().map(other).filter(|id| !reached.contains(id)).collect();
            let (seen, _) = self.see(&walk, unknown.into_iter().collect(), reading, deadline).await?;
            let mut next = vec![];
            for id in &layer {
                let mut found = edges.remove(id).unwrap_or_default();
                // Heaviest first, equal ones in the order of the table.
                found.sort_by(|a, b| {
                    let key = |edge: &Edge| (edge.source, edge.relation.clone(), edge.target);
                    b.weight.total_cmp(&a.weight).then_with(|| key(a).cmp(&key(b)))
                });
                let mut followed = 0;
                for edge in found {
                    if followed == walk.fan_out.min(FAN_OUT_MAX) {
                        break;
                    }
                    let other = other(&edge);
                    if !reached.contains(&other) {
                        let Some(memory) = seen.get(&other) else { continue };
                        if reached.len() == REACHED_MAX {
                            walked.cut = true;
                            continue;
                        }
                        reached.insert(other);
                        next.push(other);
                        walked.memories.push(memory.clone());
                    }
                    followed += 1;
                    walked.edges.push(edge);
                }
            }
            layer = next;
        }
        Ok((walked, answers))
    }
}
