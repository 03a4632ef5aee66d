//! The reader role: from a caller's question to an answer that says how it was made.
//!
//! A search with a text asks the views for more candidates than it needs, by vector and by words, and re-ranks them by the terms that they
//! share with the query: hashed n-grams collide, the words themselves do not. Score = [`VECTOR_SHARE`] × cosine + the rest × shared terms;
//! with a vector alone it is the cosine.

use crate::auth::Caller;
use crate::control::map::{ClusterMap, ShardId};
use crate::convert::{self, owners};
use crate::error::Error;
use crate::limits::*;
use crate::proto::v1;
use crate::router::{Part, Reading, Router, everywhere, only};
use crate::views::{Answered, Ask, Found, Freshness, unexpected};
use sim::cpu::cost;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use std::sync::Arc;
use storage::embed::{LEXICAL_SPACE, embed, lexical_score};
use storage::model::*;
use storage::slots::{Slot, SlotSet, slot_of};
use storage::{Hit, ListQuery, SearchQuery, TimeField, TimeRange};

/// The cosine's share in a text search's score.
pub const VECTOR_SHARE: f32 = 0.4;
/// Candidates to re-rank, at least.
const CANDIDATES_MIN: usize = 200;

#[derive(Clone)]
pub struct Reader {
    pub router: Router,
    pub accesses: crate::access::Accesses,
}

/// What a read asks of its freshness; `or` is what the call does when it asks nothing.
fn reading(
    options: Option<&v1::ReadOptions>,
    or: v1::Consistency,
) -> Result<(v1::Consistency, Reading), Error> {
    let default = v1::ReadOptions::default();
    let options = options.unwrap_or(&default);
    let token = options.token.as_ref().map(convert::positions).unwrap_or_default();
    let asked = v1::Consistency::try_from(options.consistency)
        .map_err(|_| Error::invalid("consistency", format!("unknown value {}", options.consistency)))?;
    let given = match asked {
        v1::Consistency::Unspecified if !token.is_empty() => v1::Consistency::Session,
        v1::Consistency::Unspecified => or,
        asked => asked,
    };
    let freshness = match given {
        v1::Consistency::Strong => Some(Freshness::Strong),
        v1::Consistency::Session if token.is_empty() => {
            return Err(Error::invalid("token", "SESSION needs a token"));
        }
        v1::Consistency::Session => None,
        v1::Consistency::Bounded => Some(Freshness::Bounded(options.max_staleness_ms)),
        _ => Some(Freshness::Any),
    };
    let map_version = options.token.as_ref().map_or(0, |token| token.map_version);
    Ok((given, Reading { freshness, token, map_version }))
}

/// How an answer was made of the answers of some shards.
fn info(answers: &[(ShardId, Answered)], consistency: v1::Consistency, map_version: u64) -> v1::ReadInfo {
    let mut replicas: Vec<&str> = answers.iter().map(|(_, answered)| answered.replica.as_str()).collect();
    replicas.dedup();
    let token = |of: fn(&Answered) -> Position| {
        convert::token(answers.iter().map(|(shard, answered)| (*shard, of(answered))), map_version)
    };
    v1::ReadInfo {
        token: Some(token(|answered| answered.seen)),
        complete_to: Some(token(|answered| answered.position)),
        consistency: consistency as i32,
        level: "L0".into(),
        tiers: vec![v1::Tier::Hot as i32],
        staleness_ms: answers.iter().map(|(_, answered)| answered.staleness_ms).max().unwrap_or(0),
        complete: true,
        replica: replicas.join(","),
    }
}

fn absent(id: String, info: v1::ReadInfo) -> Error {
    let (seen, complete_to) = (info.token.unwrap_or_default(), info.complete_to.unwrap_or_default());
    Error::Absent { id, seen, complete_to }
}

/// Which shards have what owners have: of each shard its owners, and the slots that it must show for them.
fn by_shard(map: &ClusterMap, owners: &[Owner]) -> BTreeMap<ShardId, (Vec<Owner>, SlotSet)> {
    let mut parts: BTreeMap<ShardId, (Vec<Owner>, SlotSet)> = BTreeMap::new();
    for owner in owners {
        if *owner == Owner::Global {
            for (id, shard) in &map.shards {
                let part = parts.entry(*id).or_default();
                part.0.push(Owner::Global);
                let global = shard.slots.of(GLOBAL_TENANT).clone();
                part.1 = part.1.union(&SlotSet::of_tenant(GLOBAL_TENANT, global));
            }
            continue;
        }
        let seat = (slot_of(owner, &[0; 16]), owner.tenant().to_string());
        if let Some(shard) = map.shard_of(&seat.1, seat.0) {
            let part = parts.entry(shard).or_default();
            part.0.push(owner.clone());
            part.1 = part.1.union(&only(&seat));
        }
    }
    parts
}

fn time_range(range: Option<v1::TimeRange>) -> Result<Option<TimeRange>, Error> {
    let Some(range) = range else { return Ok(None) };
    let field = match v1::TimeField::try_from(range.field) {
        Ok(v1::TimeField::Unspecified | v1::TimeField::Created) => TimeField::Created,
        Ok(v1::TimeField::Updated) => TimeField::Updated,
        Ok(v1::TimeField::EventTime) => TimeField::EventTime,
        Err(_) => return Err(Error::invalid("time", format!("unknown field {}", range.field))),
    };
    let bound = |at: i64| (at != 0).then_some(at);
    Ok(Some(TimeRange { field, from: bound(range.from), to: bound(range.to) }))
}

fn statuses(include_archived: bool) -> Vec<Status> {
    if include_archived { vec![Status::Active, Status::Archived] } else { vec![Status::Active] }
}

impl Reader {
    fn info(&self, answers: &[(ShardId, Answered)], given: v1::Consistency) -> v1::ReadInfo {
        info(answers, given, self.router.known().version)
    }

    pub async fn get(
        &self,
        caller: &Caller,
        request: v1::GetRequest,
        deadline: Instant,
    ) -> Result<v1::GetResponse, Error> {
        let (given, reading) = reading(request.options.as_ref(), v1::Consistency::Strong)?;
        let with_vector = request.options.as_ref().is_some_and(|o| o.with_vector);
        let id = convert::parse_id("id", &request.id)?;
        let now = time::calendar_ms();
        let ask = |slot| Ask::Get { tenant: caller.tenant.to_string(), slot, id, now };
        let answers = self.router.ask_of((&caller.tenant, &id), &reading, deadline, ask).await?;
        let memory = answers.iter().find_map(|(_, answered)| match &answered.found {
            Found::Memory(memory) => memory.as_ref(),
            _ => None,
        });
        let info = self.info(&answers, given);
        let Some(memory) = memory else { return Err(absent(request.id, info)) };
        self.accesses.note([memory]);
        Ok(v1::GetResponse { memory: Some(convert::memory(memory, with_vector)), info: Some(info) })
    }

    /// One page of a listing.
    pub async fn list(
        &self,
        caller: &Caller,
        request: &v1::ListRequest,
        after: Option<MemoryId>,
        limit: usize,
        deadline: Instant,
    ) -> Result<(v1::ListResponse, Option<MemoryId>), Error> {
        let (given, reading) = reading(request.options.as_ref(), v1::Consistency::Strong)?;
        let with_vector = request.options.as_ref().is_some_and(|o| o.with_vector);
        let whole_tenant = request.owners.as_ref().is_none_or(|o| o.user.is_empty() && o.agent.is_empty());
        let query = ListQuery {
            tenant: caller.tenant.to_string(),
            owners: if whole_tenant { vec![] } else { owners(&caller.tenant, request.owners.as_ref())? },
            filter: convert::filter(request.filter.clone())?,
            statuses: statuses(request.include_archived),
            time: time_range(request.time)?,
            after,
            limit,
            now: time::calendar_ms(),
            with_vector,
        };
        let plan = |map: &ClusterMap| -> Vec<Part> {
            if query.owners.is_empty() {
                return everywhere(map, || Ask::List(query.clone()));
            }
            let part = |(id, (owners, needs))| (id, Ask::List(ListQuery { owners, ..query.clone() }), needs);
            by_shard(map, &query.owners).into_iter().map(part).collect()
        };
        let answers = self.router.ask(&reading, deadline, plan).await?;
        let info = Some(self.info(&answers, given));
        let pages = answers.into_iter().map(|(_, answered)| match answered.found {
            Found::Page(page) => Ok(page),
            _ => Err(unexpected()),
        });
        let (found, next) = merge_pages(pages.collect::<Result<_, _>>()?, limit);
        let memories = found.iter().map(|m| convert::memory(m, with_vector)).collect();
        Ok((v1::ListResponse { memories, info }, next))
    }

    pub async fn search(
        &self,
        caller: &Caller,
        mut request: v1::SearchRequest,
        deadline: Instant,
    ) -> Result<v1::SearchResponse, Error> {
        let (given, reading) = reading(request.options.as_ref(), v1::Consistency::Eventual)?;
        let with_vector = request.options.as_ref().is_some_and(|o| o.with_vector);
        let k = match request.k {
            0 => K_DEFAULT,
            k if k <= K_MAX => k,
            k => return Err(Error::invalid("k", format!("is {k}; at most {K_MAX}"))),
        } as usize;
        let text = std::mem::take(&mut request.text);
        if text.len() > TEXT_BYTES_MAX {
            return Err(Error::invalid("text", format!("at most {TEXT_BYTES_MAX} bytes")));
        }
        let (vector, space) = match (std::mem::take(&mut request.vector), text.is_empty()) {
            (vector, true) if vector.is_empty() => {
                return Err(Error::invalid("text", "a search needs a text or a vector"));
            }
            (vector, _) if !vector.is_empty() => {
                (convert::unit_vector(vector, &request.space)?, request.space)
            }
            _ => {
                sim::cpu::work(cost::EMBED).await;
                (embed(&text), LEXICAL_SPACE.to_string())
            }
        };
        if !request.threshold.is_finite() {
            return Err(Error::invalid("threshold", "must be finite"));
        }
        let rerank = !text.is_empty();
        let query = SearchQuery {
            tenant: caller.tenant.to_string(),
            owners: owners(&caller.tenant, request.owners.as_ref())?,
            vector,
            space,
            text: text.clone(),
            k: if rerank { CANDIDATES_MIN.max(4 * k) } else { k },
            threshold: (!rerank && request.threshold != 0.0).then_some(request.threshold),
            filter: convert::filter(request.filter)?,
            statuses: statuses(request.include_archived),
            time: time_range(request.time)?,
            now: time::calendar_ms(),
            with_vector,
        };
        let plan = |map: &ClusterMap| -> Vec<Part> {
            let part =
                |(id, (owners, needs))| (id, Ask::Search(SearchQuery { owners, ..query.clone() }), needs);
            by_shard(map, &query.owners).into_iter().map(part).collect()
        };
        let answers = self.router.ask(&reading, deadline, plan).await?;
        let info = self.info(&answers, given);
        let mut found: Vec<Hit> = vec![];
        let several = answers.len() > 1;
        let halves = answers.windows(2).any(|of| of[0].0 == of[1].0);
        for (_, answered) in answers {
            let Found::Hits(hits) = answered.found else { return Err(unexpected()) };
            found.extend(hits);
        }
        if halves && !sim::planted!("show-a-memory-twice") {
            found = joined(found);
        }
        if several && !rerank {
            // Cosines are the same on every shard.
            found.sort_by(|a, b| {
                b.similarity.total_cmp(&a.similarity).then_with(|| a.memory.id.cmp(&b.memory.id))
            });
            found.truncate(k);
        }
        let mut hits: Vec<(f32, f32, Arc<Memory>, f32)> = found
            .into_iter()
            .map(|hit| {
                let lexical = if rerank { lexical_score(&text, &hit.memory.text) } else { 0.0 };
                (hit.similarity, lexical, hit.memory, hit.keywords)
            })
            .collect();
        let score = |similarity: f32, lexical: f32| match rerank {
            true => VECTOR_SHARE * similarity + (1.0 - VECTOR_SHARE) * lexical,
            false => similarity,
        };
        if rerank {
            // Where the scores are equal, rarer words decide.
            hits.sort_by(|a, b| {
                let by_score = score(b.0, b.1).total_cmp(&score(a.0, a.1));
                by_score.then(b.3.total_cmp(&a.3)).then_with(|| a.2.id.cmp(&b.2.id))
            });
            hits.retain(|h| request.threshold == 0.0 || score(h.0, h.1) >= request.threshold);
            hits.truncate(k);
        }
        self.accesses.note(hits.iter().map(|h| &h.2));
        let hits = hits
            .iter()
            .map(|(similarity, lexical, memory, keywords)| {
                let mut parts = std::collections::HashMap::from([("vector".to_string(), *similarity)]);
                if rerank {
                    parts.insert("lexical".to_string(), *lexical);
                    parts.insert("keywords".to_string(), *keywords);
                }
                let memory = Some(convert::memory(memory, with_vector));
                v1::Hit { memory, score: score(*similarity, *lexical), parts }
            })
            .collect();
        Ok(v1::SearchResponse { hits, info: Some(info) })
    }

    pub async fn history(
        &self,
        caller: &Caller,
        request: v1::HistoryRequest,
        deadline: Instant,
    ) -> Result<v1::HistoryResponse, Error> {
        let (given, reading) = reading(request.options.as_ref(), v1::Consistency::Strong)?;
        let id = convert::parse_id("id", &request.id)?;
        let ask = |slot| Ask::History { tenant: caller.tenant.to_string(), slot, id };
        let answers = self.router.ask_of((&caller.tenant, &id), &reading, deadline, ask).await?;
        let of_shard = |(shard, answered): &(ShardId, Answered)| match &answered.found {
            Found::Changes(changes) => changes.iter().map(|c| convert::change(*shard, c)).collect(),
            _ => vec![],
        };
        let changes: Vec<v1::Change> = answers.iter().flat_map(of_shard).collect();
        let info = self.info(&answers, given);
        match changes.is_empty() {
            true => Err(absent(request.id, info)),
            false => Ok(v1::HistoryResponse { changes, info: Some(info) }),
        }
    }

    /// Walks along the edges from some memories.
    pub async fn traverse(
        &self,
        caller: &Caller,
        request: v1::TraverseRequest,
        deadline: Instant,
    ) -> Result<v1::TraverseResponse, Error> {
        let (given, reading) = reading(request.options.as_ref(), v1::Consistency::Strong)?;
        let now = time::calendar_ms();
        let walk = convert::walk(&caller.tenant, request, now)?;
        let (walked, answers) = self.walk(walk, &reading, deadline).await?;
        let mut info = self.info(&answers, given);
        info.complete = !walked.cut;
        self.accesses.note(&walked.memories);
        Ok(v1::TraverseResponse {
            edges: walked.edges.iter().map(convert::edge_message).collect(),
            memories: walked.memories.iter().map(|m| convert::memory(m, false)).collect(),
            info: Some(info),
        })
    }

    /// The months of all shards, oldest first.
    pub async fn partitions(&self, deadline: Instant) -> Result<Vec<storage::Partition>, Error> {
        let answers = self.router.ask_all(&Reading::strong(), deadline, || Ask::Partitions).await?;
        let mut months: BTreeMap<Month, storage::Partition> = BTreeMap::new();
        for (_, answered) in answers {
            let Found::Partitions(partitions) = answered.found else { return Err(unexpected()) };
            for partition in partitions {
                months
                    .entry(partition.month)
                    .and_modify(|held| {
                        held.memories += partition.memories;
                        held.vectors += partition.vectors;
                        held.history += partition.history;
                        held.applied = held.applied.max(partition.applied);
                    })
                    .or_insert(partition);
            }
        }
        Ok(months.into_values().collect())
    }

    /// Changes of the tenant after a position on each shard, and how far the answers reach. A shard without a position tells only where it is.
    pub async fn changes(
        &self,
        tenant: &str,
        after: &BTreeMap<ShardId, Position>,
        limit: u32,
    ) -> Result<Vec<(ShardId, Vec<Change>, Position)>, Error> {
        let plan = |map: &ClusterMap| -> Vec<Part> {
            let ask = |id: &ShardId| {
                let (after, limit) = after.get(id).map_or((Position::default(), 0), |p| (*p, limit));
                Ask::Changes { tenant: tenant.into(), after, limit }
            };
            map.shards.keys().map(|id| (*id, ask(id), SlotSet::default())).collect()
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        let answers = self.router.ask(&Reading::any(), deadline, plan).await?;
        let changes = |(shard, answered): (ShardId, Answered)| match answered.found {
            Found::Changes(changes) => Ok((shard, changes, answered.position)),
            _ => Err(unexpected()),
        };
        answers.into_iter().map(changes).collect()
    }
}

/// Each memory once, where one was found by its vector and by its words, with what either says of it.
fn joined(hits: Vec<Hit>) -> Vec<Hit> {
    let mut places: BTreeMap<(String, Slot, MemoryId), usize> = BTreeMap::new();
    let mut found: Vec<Hit> = vec![];
    for hit in hits {
        let key = (hit.memory.tenant.clone(), hit.memory.slot(), hit.memory.id);
        let at = *places.entry(key).or_insert(found.len());
        match found.get_mut(at) {
            Some(held) if held.memory.version < hit.memory.version => *held = hit,
            Some(held) => held.keywords = held.keywords.max(hit.keywords),
            None => found.push(hit),
        }
    }
    found
}

/// One page out of one of each shard, in the order of ids, and where to continue. Behind the end of a page that was cut, others say nothing.
fn merge_pages(pages: Vec<storage::Page>, limit: usize) -> (Vec<Arc<Memory>>, Option<MemoryId>) {
    let known_to = pages.iter().filter_map(|page| page.next).min();
    let mut found: Vec<Arc<Memory>> = pages.into_iter().flat_map(|page| page.memories).collect();
    found.sort_by_key(|memory| memory.id);
    let all = found.len();
    if let Some(last) = known_to {
        found.retain(|memory| memory.id <= last);
    }
    let mut end = limit.min(found.len());
    // Memories of one id lie on one page.
    while end > 0 && end < found.len() && found[end].id == found[end - 1].id {
        end += 1;
    }
    found.truncate(end);
    let more = known_to.is_some() || end < all;
    let next = if more { found.last().map(|memory| memory.id) } else { None };
    (found, next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::NewMemory;

    #[test]
    fn pages_of_several_shards_give_every_memory_once_and_in_order() -> Result<(), Error> {
        let memory = |number: u8| -> Result<Arc<Memory>, Error> {
            let id = convert::id_text(&[number; 16]);
            let new = NewMemory { id, user: "u".into(), text: "x".into(), ..NewMemory::default() };
            Ok(Arc::new(convert::new_memory("t", new, "", 0)?))
        };
        let shards: Vec<Vec<u8>> =
            vec![(0..9).map(|n| n * 5).collect(), (0..20).map(|n| n * 5 + 1).collect(), vec![]];
        for limit in [1, 2, 3, 7, 100] {
            let (mut after, mut seen) = (None, vec![]);
            loop {
                let mut pages = vec![];
                for shard in &shards {
                    let rest: Vec<u8> = shard
                        .iter()
                        .copied()
                        .filter(|n| after.is_none_or(|after| [*n; 16] > after))
                        .collect();
                    let memories: Vec<Arc<Memory>> =
                        rest.iter().take(limit).map(|n| memory(*n)).collect::<Result<_, _>>()?;
                    let next = (rest.len() > limit).then(|| memories.last().map(|m| m.id)).flatten();
                    pages.push(storage::Page { memories, next });
                }
                let (found, next) = merge_pages(pages, limit);
                assert!(found.len() <= limit);
                seen.extend(found.iter().map(|m| m.id[0]));
                after = next;
                if after.is_none() {
                    break;
                }
            }
            let mut all: Vec<u8> = shards.concat();
            all.sort_unstable();
            assert_eq!(seen, all, "limit {limit}");
        }
        Ok(())
    }
}
