//! The reader role: from a caller's question to an answer that says how it was made.
//!
//! A search with a text asks the views for more candidates than it needs, by vector and by words, and re-ranks them by the terms that they
//! share with the query: hashed n-grams collide, the words themselves do not. Score = [`VECTOR_SHARE`] × cosine + the rest × shared terms;
//! with a vector alone it is the cosine.

use crate::auth::Caller;
use crate::convert::{self, owners};
use crate::error::Error;
use crate::limits::*;
use crate::proto::v1;
use crate::views::{Answered, Ask, Found, Freshness, Query, Views};
use sim::cpu::cost;
use sim::time::{self, Duration, Instant};
use std::sync::Arc;
use storage::embed::{LEXICAL_SPACE, embed, lexical_score};
use storage::model::*;
use storage::{ListQuery, SearchQuery, TimeField, TimeRange};

/// The cosine's share in a text search's score.
pub const VECTOR_SHARE: f32 = 0.4;
/// Candidates to re-rank, at least.
const CANDIDATES_MIN: usize = 200;

#[derive(Clone)]
pub struct Reader {
    pub views: Arc<dyn Views>,
    pub accesses: crate::access::Accesses,
}

/// What a read asks of its freshness; `or` is what the call does when it asks nothing.
fn freshness(
    options: Option<&v1::ReadOptions>,
    or: v1::Consistency,
) -> Result<(v1::Consistency, Freshness), Error> {
    let default = v1::ReadOptions::default();
    let options = options.unwrap_or(&default);
    let token = options.token.as_ref().map(convert::position).transpose()?.filter(|p| p.index > 0);
    let asked = v1::Consistency::try_from(options.consistency)
        .map_err(|_| Error::invalid("consistency", format!("unknown value {}", options.consistency)))?;
    let given = match asked {
        v1::Consistency::Unspecified if token.is_some() => v1::Consistency::Session,
        v1::Consistency::Unspecified => or,
        asked => asked,
    };
    let freshness = match (given, token) {
        (v1::Consistency::Strong, _) => Freshness::Strong,
        (v1::Consistency::Session, Some(position)) => Freshness::AtLeast(position),
        (v1::Consistency::Session, None) => return Err(Error::invalid("token", "SESSION needs a token")),
        (v1::Consistency::Bounded, _) => Freshness::Bounded(options.max_staleness_ms),
        _ => Freshness::Any,
    };
    Ok((given, freshness))
}

fn info(answered: &Answered, consistency: v1::Consistency) -> v1::ReadInfo {
    v1::ReadInfo {
        token: Some(convert::token(answered.position)),
        consistency: consistency as i32,
        level: "L0".into(),
        tiers: vec![v1::Tier::Hot as i32],
        staleness_ms: answered.staleness_ms,
        complete: true,
        replica: answered.replica.clone(),
    }
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

fn unexpected() -> Error {
    Error::Internal("the views answered another question".into())
}

impl Reader {
    async fn ask(&self, ask: Ask, freshness: Freshness, deadline: Instant) -> Result<Answered, Error> {
        // A little less than the caller waits, so that the reason arrives and not only a deadline.
        let left = crate::ledger::left(deadline, || Error::NotYetVisible)?;
        let wait_ms = left.saturating_sub(Duration::from_millis(20)).as_millis() as u64;
        self.views.query(Query { freshness, wait_ms, ask }).await
    }

    pub async fn get(
        &self,
        caller: &Caller,
        request: v1::GetRequest,
        deadline: Instant,
    ) -> Result<v1::GetResponse, Error> {
        let (given, freshness) = freshness(request.options.as_ref(), v1::Consistency::Strong)?;
        let with_vector = request.options.as_ref().is_some_and(|o| o.with_vector);
        let id = convert::parse_id("id", &request.id)?;
        let ask = Ask::Get { tenant: caller.tenant.to_string(), id, now: time::calendar_ms() };
        let answered = self.ask(ask, freshness, deadline).await?;
        let Found::Memory(memory) = &answered.found else { return Err(unexpected()) };
        let Some(memory) = memory else { return Err(Error::NotFound(request.id)) };
        self.accesses.note([memory]);
        Ok(v1::GetResponse {
            memory: Some(convert::memory(memory, with_vector)),
            info: Some(info(&answered, given)),
        })
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
        let (given, freshness) = freshness(request.options.as_ref(), v1::Consistency::Strong)?;
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
        let answered = self.ask(Ask::List(query), freshness, deadline).await?;
        let Found::Page(page) = &answered.found else { return Err(unexpected()) };
        let memories = page.memories.iter().map(|m| convert::memory(m, with_vector)).collect();
        let info = Some(info(&answered, given));
        Ok((v1::ListResponse { memories, info }, page.next))
    }

    pub async fn search(
        &self,
        caller: &Caller,
        mut request: v1::SearchRequest,
        deadline: Instant,
    ) -> Result<v1::SearchResponse, Error> {
        let (given, freshness) = freshness(request.options.as_ref(), v1::Consistency::Eventual)?;
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
        let answered = self.ask(Ask::Search(query), freshness, deadline).await?;
        let info = info(&answered, given);
        let Found::Hits(found) = answered.found else { return Err(unexpected()) };
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
        let (given, freshness) = freshness(request.options.as_ref(), v1::Consistency::Strong)?;
        let id = convert::parse_id("id", &request.id)?;
        let ask = Ask::History { tenant: caller.tenant.to_string(), id };
        let answered = self.ask(ask, freshness, deadline).await?;
        let Found::Changes(changes) = &answered.found else { return Err(unexpected()) };
        if changes.is_empty() {
            return Err(Error::NotFound(request.id));
        }
        let changes = changes.iter().map(convert::change).collect();
        Ok(v1::HistoryResponse { changes, info: Some(info(&answered, given)) })
    }

    /// Walks along the edges from some memories.
    pub async fn traverse(
        &self,
        caller: &Caller,
        request: v1::TraverseRequest,
        deadline: Instant,
    ) -> Result<v1::TraverseResponse, Error> {
        let (given, freshness) = freshness(request.options.as_ref(), v1::Consistency::Strong)?;
        let now = time::calendar_ms();
        let walk = convert::walk(&caller.tenant, request, now)?;
        let answered = self.ask(Ask::Walk(walk), freshness, deadline).await?;
        let mut info = info(&answered, given);
        let Found::Walked(walked) = &answered.found else { return Err(unexpected()) };
        info.complete = !walked.cut;
        self.accesses.note(&walked.memories);
        Ok(v1::TraverseResponse {
            edges: walked.edges.iter().map(convert::edge_message).collect(),
            memories: walked.memories.iter().map(|m| convert::memory(m, false)).collect(),
            info: Some(info),
        })
    }

    /// The months of the shard.
    pub async fn partitions(&self, deadline: Instant) -> Result<Vec<storage::Partition>, Error> {
        let answered = self.ask(Ask::Partitions, Freshness::Strong, deadline).await?;
        let Found::Partitions(partitions) = answered.found else { return Err(unexpected()) };
        Ok(partitions)
    }

    /// Changes of the tenant after a position, and the position that the answer reaches.
    pub async fn changes(
        &self,
        tenant: &str,
        after: Option<Position>,
        limit: u32,
    ) -> Result<(Vec<Change>, Position), Error> {
        let (after, limit) = after.map_or((Position::default(), 0), |p| (p, limit));
        let ask = Ask::Changes { tenant: tenant.into(), after, limit };
        let deadline = Instant::now() + Duration::from_secs(5);
        let answered = self.ask(ask, Freshness::Any, deadline).await?;
        let Found::Changes(changes) = answered.found else { return Err(unexpected()) };
        Ok((changes, answered.position))
    }
}
