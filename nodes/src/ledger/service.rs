//! What peers ask of this replica: openraft's messages, proposals, read positions and queries of the views.

use super::Proposed;
use super::state_machine::SnapshotSource;
use super::types::{SnapshotMeta, Vote};
use crate::cache::CacheView;
use crate::control::driver::Membership;
use crate::error::Error;
use crate::groups::{Groups, Replica, name_of};
use crate::proto::internal::{Body, replica_server};
use crate::views::{Query, Touched};
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

type Answer = Result<Response<Body>, Status>;

fn decoded<T: DeserializeOwned>(request: &Request<Body>) -> Result<T, Status> {
    codec::decode_serde(&request.get_ref().body)
        .map_err(|e| Status::invalid_argument(format!("unreadable message: {e}")))
}

fn answer<T: Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Answer {
    match result {
        Ok(value) => Ok(Response::new(Body { body: codec::encode_serde(&value).into(), group: 0 })),
        Err(error) => Err(Status::unavailable(error.to_string())),
    }
}

fn encoded<T: bincode::Encode>(value: &T) -> Answer {
    Ok(Response::new(Body { body: codec::encode(value).into(), group: 0 }))
}

impl ReplicaService {
    fn replica(&self, body: &Body) -> Result<Replica, Status> {
        let missing = || {
            let problem = format!("this node has no replica of {}", name_of(body.group));
            Status::from(Error::NotHere(problem))
        };
        self.groups.get(body.group).ok_or_else(missing)
    }

    /// A replica that has forgotten what it acknowledged must not help anybody to lead.
    fn voter(&self, body: &Body) -> Result<Replica, Status> {
        let replica = self.replica(body)?;
        match replica.ledger.is_repairing() {
            true => Err(Status::unavailable("this replica repairs its log and does not vote yet")),
            false => Ok(replica),
        }
    }
}

#[tonic::async_trait]
impl replica_server::Replica for ReplicaService {
    async fn append(&self, request: Request<Body>) -> Answer {
        let replica = self.replica(request.get_ref())?;
        answer(replica.ledger.raft.append_entries(decoded(&request)?).await)
    }

    async fn vote(&self, request: Request<Body>) -> Answer {
        let replica = self.voter(request.get_ref())?;
        answer(replica.ledger.raft.vote(decoded(&request)?).await)
    }

    async fn pre_vote(&self, request: Request<Body>) -> Answer {
        let replica = self.voter(request.get_ref())?;
        answer(replica.ledger.raft.pre_vote(decoded(&request)?).await)
    }

    async fn transfer_leader(&self, request: Request<Body>) -> Answer {
        let replica = self.voter(request.get_ref())?;
        answer(replica.ledger.raft.handle_transfer_leader(decoded(&request)?).await)
    }

    async fn snapshot(&self, request: Request<Streaming<Body>>) -> Answer {
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
        answer(replica.ledger.raft.install_full_snapshot(vote, snapshot).await)
    }

    async fn propose(&self, request: Request<Body>) -> Answer {
        let ledger = self.replica(request.get_ref())?.ledger;
        let commands = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable commands: {e}")))?;
        // The proposal goes on if the caller hangs up: it has been told nothing, and may ask again with its key.
        let proposed = sim::task::spawn(async move { ledger.propose_here(commands).await }).await;
        encoded(&proposed.unwrap_or_else(|e| Proposed::Unknown(e.to_string())))
    }

    async fn read_index(&self, request: Request<Body>) -> Answer {
        encoded(&self.replica(request.get_ref())?.ledger.read_position_here().await?)
    }

    async fn reconfigure(&self, request: Request<Body>) -> Answer {
        let ledger = self.replica(request.get_ref())?.ledger;
        let change: Membership = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable change: {e}")))?;
        ledger.change(change).await?;
        encoded(&())
    }

    async fn touched(&self, request: Request<Body>) -> Answer {
        let replica = self.replica(request.get_ref())?;
        let asked: Touched = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable question: {e}")))?;
        encoded(&replica.views.touched(asked).await?)
    }

    async fn query(&self, request: Request<Body>) -> Answer {
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
