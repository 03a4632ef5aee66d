//! `loci.v1.MemoryService`.

use super::context;
use crate::control::map::ShardId;
use crate::convert::{self, id_text};
use crate::edge::DEADLINE_DEFAULT;
use crate::error::Error;
use crate::limits::{BATCH_SEARCHES_MAX, LIST_PAGE};
use crate::proto::v1::{self, memory_service_server};
use crate::reader::Reader;
use crate::writer::{Writer, Written};
use futures::Stream;
use sim::sync::mpsc;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll};
use storage::model::Position;
use tonic::{Request, Response, Status};

/// A watch looks for changes this often when it has seen all, and sends a heartbeat after this many looks without one.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
const WATCH_HEARTBEAT_LOOKS: u32 = 25;
const WATCH_CHANGES_MAX: u32 = 500;

pub struct MemoryService {
    pub writer: Writer,
    pub reader: Reader,
}

/// A stream fed by a task, which ends when its reader has gone.
pub struct Feed<T>(pub(super) mpsc::Receiver<Result<T, Status>>);

impl<T> Stream for Feed<T> {
    type Item = Result<T, Status>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx)
    }
}

pub(super) fn info(written: &Written) -> Option<v1::WriteInfo> {
    info_of_all(std::slice::from_ref(written))
}

/// Of a call that wrote to several slots: the place of the last one, and the token of all.
pub(super) fn info_of_all(written: &[Written]) -> Option<v1::WriteInfo> {
    Some(v1::WriteInfo {
        token: Some(token_of(written)),
        durability: match written.iter().all(|write| write.elsewhere) {
            true => v1::Durability::Region,
            false => v1::Durability::Quorum,
        }
        .into(),
        item: written.last()?.position.item,
    })
}

/// The last position of each shard that was written to.
fn token_of<'a>(written: impl IntoIterator<Item = &'a Written>) -> v1::Token {
    let (mut positions, mut version): (BTreeMap<ShardId, Position>, u64) = (BTreeMap::new(), 0);
    for w in written {
        let planted = sim::planted!("give-the-token-of-the-entry-before") as u64;
        let position = Position { index: w.position.index - planted, ..w.position };
        let held = positions.entry(w.shard).or_default();
        *held = position.max(*held);
        version = version.max(w.map_version);
    }
    convert::token(positions, version)
}

fn batch_result(result: Result<Written, Error>) -> v1::BatchAddResult {
    match result {
        Ok(w) => {
            v1::BatchAddResult { id: id_text(&w.id), version: w.version, error: None, item: w.position.item }
        }
        Err(error) => {
            let id = if let Error::AlreadyExists { id, .. } = &error { id.clone() } else { String::new() };
            let error = v1::ItemError {
                code: error.code() as i32,
                reason: error.reason().into(),
                message: error.to_string(),
            };
            v1::BatchAddResult { id, version: 0, error: Some(error), item: 0 }
        }
    }
}

#[tonic::async_trait]
impl memory_service_server::MemoryService for MemoryService {
    type ListStream = Feed<v1::ListResponse>;
    type WatchStream = Feed<v1::WatchResponse>;

    async fn add(&self, request: Request<v1::AddRequest>) -> Result<Response<v1::AddResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let w = self.writer.add(&caller, request.into_inner(), deadline).await?;
        Ok(Response::new(v1::AddResponse { id: id_text(&w.id), version: w.version, info: info(&w) }))
    }

    async fn batch_add(
        &self,
        request: Request<v1::BatchAddRequest>,
    ) -> Result<Response<v1::BatchAddResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let results = self.writer.batch_add(&caller, request.into_inner(), deadline).await?;
        let token = results.iter().any(Result::is_ok).then(|| token_of(results.iter().flatten()));
        let results = results.into_iter().map(batch_result).collect();
        Ok(Response::new(v1::BatchAddResponse { results, token }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        Ok(Response::new(self.reader.get(&caller, request.into_inner(), deadline).await?))
    }

    async fn update(
        &self,
        request: Request<v1::UpdateRequest>,
    ) -> Result<Response<v1::UpdateResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let w = self.writer.update(&caller, request.into_inner(), deadline).await?;
        Ok(Response::new(v1::UpdateResponse { id: id_text(&w.id), version: w.version, info: info(&w) }))
    }

    async fn erase(&self, request: Request<v1::EraseRequest>) -> Result<Response<v1::EraseResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        Ok(Response::new(self.writer.erase(&caller, request.into_inner(), deadline).await?))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let w = self.writer.delete(&caller, request.into_inner(), deadline).await?;
        Ok(Response::new(v1::DeleteResponse { id: id_text(&w.id), version: w.version, info: info(&w) }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let (caller, deadline) = context(&request)?;
        let request = request.into_inner();
        let after = match request.after.as_str() {
            "" => None,
            id => Some(convert::parse_id("after", id)?),
        };
        let mut left = if request.limit == 0 { usize::MAX } else { request.limit as usize };
        // The first page is read here, so that what is wrong with the request is the call's own error.
        let (page, next) = self.reader.list(&caller, &request, after, left.min(LIST_PAGE), deadline).await?;
        let (send, feed) = mpsc::channel(4);
        let reader = self.reader.clone();
        sim::task::spawn(async move {
            let (mut page, mut next) = (page, next);
            loop {
                left = left.saturating_sub(page.memories.len());
                if send.send(Ok(page)).await.is_err() || left == 0 || next.is_none() {
                    return;
                }
                let deadline = Instant::now() + DEADLINE_DEFAULT;
                match reader.list(&caller, &request, next, left.min(LIST_PAGE), deadline).await {
                    Ok((more, then)) => (page, next) = (more, then),
                    Err(error) => {
                        let _ = send.send(Err(error.into())).await;
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Feed(feed)))
    }

    async fn search(
        &self,
        request: Request<v1::SearchRequest>,
    ) -> Result<Response<v1::SearchResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        Ok(Response::new(self.reader.search(&caller, request.into_inner(), deadline).await?))
    }

    async fn batch_search(
        &self,
        request: Request<v1::BatchSearchRequest>,
    ) -> Result<Response<v1::BatchSearchResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        let searches = request.into_inner().searches;
        if searches.is_empty() || searches.len() > BATCH_SEARCHES_MAX {
            let problem = format!("{} given; 1 to {BATCH_SEARCHES_MAX} are allowed", searches.len());
            return Err(Error::invalid("searches", problem).into());
        }
        let searches = searches.into_iter().map(|search| self.reader.search(&caller, search, deadline));
        let results = futures::future::try_join_all(searches).await?;
        Ok(Response::new(v1::BatchSearchResponse { results }))
    }

    async fn history(
        &self,
        request: Request<v1::HistoryRequest>,
    ) -> Result<Response<v1::HistoryResponse>, Status> {
        let (caller, deadline) = context(&request)?;
        Ok(Response::new(self.reader.history(&caller, request.into_inner(), deadline).await?))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (caller, _) = context(&request)?;
        // A shard that the token does not name is watched from now on.
        let mut seen = request.into_inner().after.as_ref().map(convert::positions).unwrap_or_default();
        let (send, feed) = mpsc::channel(4);
        let reader = self.reader.clone();
        for (shard, _, shown) in reader.changes(&caller.tenant, &seen, 1).await? {
            seen.entry(shard).or_insert(shown);
        }
        sim::task::spawn(async move {
            let mut idle = 0;
            loop {
                let found = match reader.changes(&caller.tenant, &seen, WATCH_CHANGES_MAX).await {
                    Ok(found) => found,
                    Err(error) => {
                        let _ = send.send(Err(error.into())).await;
                        return;
                    }
                };
                let mut changes = vec![];
                for (shard, found, shown) in found {
                    let Some(at) = seen.get(&shard) else {
                        // A shard that came while it was watched: nothing was written to it before it was seen here.
                        seen.insert(shard, Position::default());
                        continue;
                    };
                    // A full page may have left changes behind; else all was seen up to where the views were.
                    let last = found.last().map_or(*at, |c| c.position);
                    let all = found.len() < WATCH_CHANGES_MAX as usize;
                    seen.insert(
                        shard,
                        if all { last.max(Position { item: u32::MAX, ..shown }) } else { last },
                    );
                    changes.extend(found.iter().map(|c| convert::change(shard, c)));
                }
                idle = if changes.is_empty() { idle + 1 } else { 0 };
                if !changes.is_empty() || idle % WATCH_HEARTBEAT_LOOKS == 1 {
                    let token = convert::token(seen.iter().map(|(shard, at)| (*shard, *at)), 0);
                    let message = v1::WatchResponse { changes, token: Some(token) };
                    if send.send(Ok(message)).await.is_err() {
                        return;
                    }
                }
                if idle > 0 {
                    sim::select! {
                        () = send.closed() => return,
                        () = time::sleep(WATCH_INTERVAL) => {}
                    }
                }
            }
        });
        Ok(Response::new(Feed(feed)))
    }
}
