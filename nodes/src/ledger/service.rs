//! What peers ask of this replica: openraft's messages, proposals, read positions and queries of the views.

use super::Proposed;
use super::state_machine::SnapshotSource;
use super::types::{SnapshotMeta, Vote};
use crate::cache::CacheView;
use crate::control::driver::Membership;
use crate::error::Error;
use crate::groups::{GroupId, Groups, Replica, name_of};
use crate::proto::internal::{Answer, Answers, Body, Message, Messages, Method, replica_server};
use crate::views::{Query, Touched};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream, FuturesUnordered};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::atomic::Ordering;
use storage::bases::Writer;
use storage::codec;
use tonic::{Request, Response, Status, Streaming};

pub struct ReplicaService {
    pub groups: Groups,
    /// What this node answers for shards of which it has no replica.
    pub cache: Option<CacheView>,
}

/// Answers that travel together at most.
const ANSWERS_MAX: usize = 256;

type Reply = Result<Response<Body>, Status>;

fn encoded<T: bincode::Encode>(value: &T) -> Reply {
    Ok(Response::new(Body { body: codec::encode(value).into(), group: 0 }))
}

impl ReplicaService {
    fn replica(&self, body: &Body) -> Result<Replica, Status> {
        Ok(replica(&self.groups, body.group)?)
    }
}

fn replica(groups: &Groups, group: GroupId) -> Result<Replica, Error> {
    let missing = || Error::NotHere(format!("this node has no replica of {}", name_of(group)));
    groups.get(group).ok_or_else(missing)
}

/// What the group's replica answers to one of openraft's messages.
async fn answer_to(groups: &Groups, message: Message) -> Result<Vec<u8>, String> {
    fn decoded<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
        codec::decode_serde(body).map_err(|e| format!("unreadable message: {e}"))
    }
    fn encoded<T: Serialize>(answer: Result<T, impl std::fmt::Display>) -> Result<Vec<u8>, String> {
        answer.map(|answer| codec::encode_serde(&answer)).map_err(|e| e.to_string())
    }
    let ledger = replica(groups, message.group).map_err(|e| e.to_string())?.ledger;
    let (raft, method) = (&ledger.raft, message.method());
    // A replica that has forgotten what it acknowledged must not help anybody to lead.
    if method != Method::Append && ledger.is_repairing() {
        return Err("this replica repairs its log and does not vote yet".into());
    }
    let body = &message.body;
    match method {
        Method::Append => encoded(raft.append_entries(decoded(body)?).await),
        Method::Vote => encoded(raft.vote(decoded(body)?).await),
        Method::PreVote => encoded(raft.pre_vote(decoded(body)?).await),
        Method::TransferLeader => encoded(raft.handle_transfer_leader(decoded(body)?).await),
        Method::Unspecified => Err("a message without a method: is the sender of another version?".into()),
    }
}

#[tonic::async_trait]
impl replica_server::Replica for ReplicaService {
    type ExchangeStream = BoxStream<'static, Result<Answers, Status>>;

    async fn exchange(&self, request: Request<Messages>) -> Result<Response<Self::ExchangeStream>, Status> {
        let answers = request.into_inner().messages.into_iter().enumerate().map(|(at, message)| {
            let groups = self.groups.clone();
            async move {
                let (body, refused) = match answer_to(&groups, message).await {
                    Ok(body) => (body.into(), String::new()),
                    Err(why) => (Bytes::new(), why),
                };
                Answer { at: at as u32, body, refused }
            }
        });
        let answers: FuturesUnordered<_> = answers.collect();
        let mut answers = answers.ready_chunks(ANSWERS_MAX).map(|answers| Ok(Answers { answers }));
        // The first ones travel with the response's head.
        let first = answers.next().await;
        Ok(Response::new(stream::iter(first).chain(answers).boxed()))
    }

    async fn snapshot(&self, request: Request<Streaming<Body>>) -> Reply {
        let mut stream = request.into_inner();
        let Some(head) = stream.message().await? else {
            return Err(Status::invalid_argument("a snapshot needs a head"));
        };
        let replica = self.replica(&head)?;
        let (vote, meta): (Vote, SnapshotMeta) = codec::decode_serde(&head.body)
            .map_err(|e| Status::invalid_argument(format!("unreadable snapshot head: {e}")))?;
        let path = format!("snapshot-in-{}.tmp", replica.received.fetch_add(1, Ordering::Relaxed));
        let broken = |e: std::io::Error| Status::internal(format!("snapshot cannot be stored: {e}"));
        let (disk, name) = (replica.disk.clone(), path.clone());
        let mut sink = sim::task::blocking(move || Writer::create(&*disk, &name)).await.map_err(broken)?;
        while let Some(chunk) = stream.message().await? {
            sink =
                sim::task::blocking(move || sink.push(&chunk.body).map(|()| sink)).await.map_err(broken)?;
        }
        sim::task::blocking(move || sink.finish()).await.map_err(broken)?;
        let source = SnapshotSource::File { disk: replica.disk.clone(), path };
        let snapshot = openraft::storage::Snapshot { meta, snapshot: source };
        let installed = replica.ledger.raft.install_full_snapshot(vote, snapshot).await;
        let installed = installed.map_err(|e| Status::unavailable(e.to_string()))?;
        Ok(Response::new(Body { body: codec::encode_serde(&installed).into(), group: 0 }))
    }

    async fn propose(&self, request: Request<Body>) -> Reply {
        let ledger = self.replica(request.get_ref())?.ledger;
        let commands = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable commands: {e}")))?;
        // The proposal goes on if the caller hangs up: it has been told nothing, and may ask again with its key.
        let proposed = sim::task::spawn(async move { ledger.propose_here(commands).await }).await;
        encoded(&proposed.unwrap_or_else(|e| Proposed::Unknown(e.to_string())))
    }

    async fn is_there(&self, _: Request<Body>) -> Reply {
        Ok(Response::new(Body::default()))
    }

    async fn read_index(&self, request: Request<Body>) -> Reply {
        encoded(&self.replica(request.get_ref())?.ledger.read_position_here().await?)
    }

    async fn reconfigure(&self, request: Request<Body>) -> Reply {
        let ledger = self.replica(request.get_ref())?.ledger;
        let change: Membership = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable change: {e}")))?;
        ledger.change(change).await?;
        encoded(&())
    }

    async fn touched(&self, request: Request<Body>) -> Reply {
        let replica = self.replica(request.get_ref())?;
        let asked: Touched = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable question: {e}")))?;
        encoded(&replica.views.touched(asked).await?)
    }

    async fn query(&self, request: Request<Body>) -> Reply {
        let body = request.get_ref();
        let query: Query = codec::decode(&body.body)
            .map_err(|e| Status::invalid_argument(format!("unreadable query: {e}")))?;
        let replica = match (self.replica(body), &self.cache) {
            (Ok(replica), _) => replica,
            (Err(_), Some(cache)) => return encoded(&cache.query(body.group, query).await?),
            (Err(missing), None) => return Err(missing),
        };
        encoded(&replica.views.query(query).await?)
    }
}
