//! What peers ask of this replica: openraft's messages, proposals, read positions and queries of the views.

use super::state_machine::SnapshotSource;
use super::types::{SnapshotMeta, Vote};
use super::{Ledger, Proposed};
use crate::proto::internal::{Body, replica_server};
use crate::views::{Query, Views};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sim::disk::Disk;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use storage::bases::Writer;
use storage::codec;
use tonic::{Request, Response, Status, Streaming};

pub struct ReplicaService {
    pub ledger: Ledger,
    pub views: Arc<dyn Views>,
    pub disk: Arc<dyn Disk>,
    pub received: AtomicU64,
}

type Answer = Result<Response<Body>, Status>;

fn decoded<T: DeserializeOwned>(request: &Request<Body>) -> Result<T, Status> {
    codec::decode_serde(&request.get_ref().body)
        .map_err(|e| Status::invalid_argument(format!("unreadable message: {e}")))
}

fn answer<T: Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Answer {
    match result {
        Ok(value) => Ok(Response::new(Body { body: codec::encode_serde(&value).into() })),
        Err(error) => Err(Status::unavailable(error.to_string())),
    }
}

fn encoded<T: bincode::Encode>(value: &T) -> Answer {
    Ok(Response::new(Body { body: codec::encode(value).into() }))
}

impl ReplicaService {
    /// A replica that has forgotten what it acknowledged must not help anybody to lead.
    fn may_vote(&self) -> Result<(), Status> {
        match self.ledger.is_repairing() {
            true => Err(Status::unavailable("this replica repairs its log and does not vote yet")),
            false => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl replica_server::Replica for ReplicaService {
    async fn append(&self, request: Request<Body>) -> Answer {
        answer(self.ledger.raft.append_entries(decoded(&request)?).await)
    }

    async fn vote(&self, request: Request<Body>) -> Answer {
        self.may_vote()?;
        answer(self.ledger.raft.vote(decoded(&request)?).await)
    }

    async fn pre_vote(&self, request: Request<Body>) -> Answer {
        self.may_vote()?;
        answer(self.ledger.raft.pre_vote(decoded(&request)?).await)
    }

    async fn transfer_leader(&self, request: Request<Body>) -> Answer {
        self.may_vote()?;
        answer(self.ledger.raft.handle_transfer_leader(decoded(&request)?).await)
    }

    async fn snapshot(&self, request: Request<Streaming<Body>>) -> Answer {
        let mut stream = request.into_inner();
        let Some(head) = stream.message().await? else {
            return Err(Status::invalid_argument("a snapshot needs a head"));
        };
        let (vote, meta): (Vote, SnapshotMeta) = codec::decode_serde(&head.body)
            .map_err(|e| Status::invalid_argument(format!("unreadable snapshot head: {e}")))?;
        let path = format!("snapshot-in-{}.tmp", self.received.fetch_add(1, Ordering::Relaxed));
        let broken = |e: std::io::Error| Status::internal(format!("snapshot cannot be stored: {e}"));
        let (disk, name) = (self.disk.clone(), path.clone());
        let mut sink = sim::task::blocking(move || Writer::create(&*disk, &name)).await.map_err(broken)?;
        while let Some(chunk) = stream.message().await? {
            sink =
                sim::task::blocking(move || sink.push(&chunk.body).map(|()| sink)).await.map_err(broken)?;
        }
        sim::task::blocking(move || sink.finish()).await.map_err(broken)?;
        let source = SnapshotSource::File { disk: self.disk.clone(), path };
        let snapshot = openraft::storage::Snapshot { meta, snapshot: source };
        answer(self.ledger.raft.install_full_snapshot(vote, snapshot).await)
    }

    async fn propose(&self, request: Request<Body>) -> Answer {
        let commands = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable commands: {e}")))?;
        // The proposal goes on if the caller hangs up: it has been told nothing, and may ask again with its key.
        let ledger = self.ledger.clone();
        let proposed = sim::task::spawn(async move { ledger.propose_here(commands).await }).await;
        encoded(&proposed.unwrap_or_else(|e| Proposed::Unknown(e.to_string())))
    }

    async fn read_index(&self, _: Request<Body>) -> Answer {
        encoded(&self.ledger.read_position_here().await?)
    }

    async fn query(&self, request: Request<Body>) -> Answer {
        let query: Query = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable query: {e}")))?;
        encoded(&self.views.query(query).await?)
    }
}
