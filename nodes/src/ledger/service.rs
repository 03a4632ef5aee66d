//! What peers ask of this replica: openraft's messages, proposals, read positions and queries of the views.

use super::log_store::position_index;
use super::quarantine::{self, Look};
use super::recovery::ASIDE;
use super::state_machine::SnapshotSource;
use super::types::{SnapshotMeta, Types, Vote};
use super::{Ledger, Proposed};
use crate::cache::CacheView;
use crate::control::driver::Membership;
use crate::control::grants::Grants;
use crate::control::keeper::Keeper;
use crate::control::recover::Recovery;
use crate::control::rights::Renewed;
use crate::control::{Control, failover};
use crate::error::Error;
use crate::groups::{CONTROL, GroupId, Groups, Replica, name_of};
use crate::peers::Peers;
use crate::proto::internal::{Answer, Answers, Body, Message, Messages, Method, replica_server};
use crate::views::{Query, Touched};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream, FuturesUnordered};
use openraft::async_runtime::WatchReceiver;
use openraft::entry::RaftEntry;
use openraft::raft::{AppendEntriesRequest, SnapshotResponse};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sim::disk::Disk;
use sim::time::{Duration, Instant};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use storage::bases::Writer;
use storage::delta::{self, Completed, Material, RangeHashes};
use storage::model::Position;
use storage::{Shard, StorageError, codec};
use tonic::{Request, Response, Status, Streaming};

pub struct ReplicaService {
    pub groups: Groups,
    /// What this node answers for shards of which it has no replica.
    pub cache: Option<CacheView>,
    pub control: Control,
    pub peers: Peers,
    /// Of a node of the control group.
    pub grants: Option<Grants>,
    /// Of a node that may have replicas.
    pub keeper: Option<Keeper>,
    /// Of a node of the control group.
    pub recovery: Option<Recovery>,
}

/// Answers that travel together at most.
const ANSWERS_MAX: usize = 256;
/// How long reading a newer map may take.
const LOOK: Duration = Duration::from_secs(2);

type Reply = Result<Response<Body>, Status>;

fn encoded<T: bincode::Encode>(value: &T) -> Reply {
    Ok(Response::new(Body { body: codec::encode(value).into(), ..Body::default() }))
}

impl ReplicaService {
    fn recovery(&self) -> Result<&Recovery, Status> {
        self.recovery.as_ref().ok_or_else(|| Status::not_found("this node is not of the control group"))
    }

    fn replica(&self, body: &Body) -> Result<Replica, Status> {
        Ok(replica(&self.groups, body.group)?)
    }
}

fn replica(groups: &Groups, group: GroupId) -> Result<Replica, Error> {
    let missing = || Error::NotHere(format!("this node has no replica of {}", name_of(group)));
    groups.get(group).ok_or_else(missing)
}

/// Whether a message is of the replica's own epoch: one that has seen a newer one takes nothing of the old, and one that halted nothing at all.
fn of_epoch(ledger: &Ledger, epoch: u64) -> Result<(), Error> {
    if (epoch == ledger.epoch() && !ledger.held.is_halted()) || sim::planted!("take-messages-of-an-old-epoch")
    {
        return Ok(());
    }
    sim::trace::probe("epoch: a message of another one refused");
    let problem = format!("{} is in epoch {} here, not in {epoch}", name_of(ledger.group), ledger.epoch());
    Err(Error::NotHere(problem))
}

/// Makes a snapshot that arrived beside what is here whole; the file that it is in.
fn complete(
    disk: &Arc<dyn Disk>,
    path: &str,
    number: u64,
    views: &Arc<Shard>,
) -> Result<String, StorageError> {
    let material = Material::open(disk, ASIDE, views)?;
    let whole = format!("snapshot-whole-{number}.tmp");
    let completed = material.complete(&**disk, path, &whole);
    disk.remove(path)?;
    match completed {
        Ok(Completed { arrived, kept }) => {
            sim::trace::probe("ledger: snapshot completed with what was here");
            sim::info!("of a snapshot's rows {arrived} arrived and {kept} were here");
            Ok(whole)
        }
        Err(error) => {
            sim::warn!("a snapshot cannot be completed with what is here: {error}");
            if disk.exists(&whole)? {
                disk.remove(&whole)?;
            }
            if let Material::Aside(_) = material {
                drop(material);
                delta::discard(&**disk, ASIDE)?;
            }
            Err(error)
        }
    }
}

/// The nodes that are lost by the map. The one that this node knows of the control group itself is as old as its replica there.
fn lost(control: &Control, group: GroupId) -> Vec<u64> {
    let map = control.map();
    let lost = map.nodes.keys().copied().filter(|node| group != CONTROL && map.is_lost(*node));
    lost.collect()
}

/// What the group's replica answers to one of openraft's messages.
async fn answer_to(groups: &Groups, control: &Control, message: Message) -> Result<Vec<u8>, String> {
    fn decoded<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
        codec::decode_serde(body).map_err(|e| format!("unreadable message: {e}"))
    }
    fn encoded<T: Serialize>(answer: Result<T, impl std::fmt::Display>) -> Result<Vec<u8>, String> {
        answer.map(|answer| codec::encode_serde(&answer)).map_err(|e| e.to_string())
    }
    let ledger = replica(groups, message.group).map_err(|e| e.to_string())?.ledger;
    let (raft, method) = (&ledger.raft, message.method());
    of_epoch(&ledger, message.epoch).map_err(|e| e.to_string())?;
    ledger.learns_its_age(message.applied);
    if matches!(method, Method::Vote | Method::PreVote | Method::TransferLeader) {
        ledger.may_vote()?;
    }
    let body = &message.body;
    match method {
        Method::Append => {
            let append: AppendEntriesRequest<Types> = decoded(body)?;
            ledger.follows((append.vote.leader_id.term, message.from), || lost(control, message.group))?;
            // Whoever votes looks at its own clock too; who follows from elsewhere has no right that could run out, nor has one that voted in an epoch
            // that is over and does not know yet that it votes no more.
            if let (true, Some(last)) = (ledger.votes() && ledger.has_begun(), append.entries.last()) {
                let index = position_index(last.log_id().index);
                ledger.rights.may_append(message.epoch, index).map_err(|e| e.to_string())?;
            }
            encoded(raft.append_entries(append).await)
        }
        Method::Vote => encoded(raft.vote(decoded(body)?).await),
        Method::PreVote => encoded(raft.pre_vote(decoded(body)?).await),
        Method::TransferLeader => encoded(raft.handle_transfer_leader(decoded(body)?).await),
        Method::Knows => encoded(ledger.knows().await),
        Method::Unspecified => Err("a message without a method: is the sender of another version?".into()),
    }
}

#[tonic::async_trait]
impl replica_server::Replica for ReplicaService {
    type ExchangeStream = BoxStream<'static, Result<Answers, Status>>;

    async fn exchange(&self, request: Request<Messages>) -> Result<Response<Self::ExchangeStream>, Status> {
        let answers = request.into_inner().messages.into_iter().enumerate().map(|(at, message)| {
            let (groups, control) = (self.groups.clone(), self.control.clone());
            async move {
                let (body, refused) = match answer_to(&groups, &control, message).await {
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

    async fn range_hashes(&self, request: Request<Body>) -> Reply {
        let body = request.get_ref();
        let Replica { ledger, disk, .. } = self.replica(body)?;
        of_epoch(&ledger, body.epoch)?;
        let group = ledger.group;
        let hashes = sim::task::blocking(move || Material::open(&disk, ASIDE, &ledger.shard)?.hashes());
        encoded(&hashes.await.unwrap_or_else(|error| {
            sim::warn!("{}: what is here cannot be read ({error}): it is asked for anew", name_of(group));
            RangeHashes::default()
        }))
    }

    async fn snapshot(&self, request: Request<Streaming<Body>>) -> Reply {
        let mut stream = request.into_inner();
        let Some(head) = stream.message().await? else {
            return Err(Status::invalid_argument("a snapshot needs a head"));
        };
        let replica = self.replica(&head)?;
        of_epoch(&replica.ledger, head.epoch)?;
        let (vote, meta, whole): (Vote, SnapshotMeta, bool) = codec::decode_serde(&head.body)
            .map_err(|e| Status::invalid_argument(format!("unreadable snapshot head: {e}")))?;
        let there = meta.last_log_id.map_or(0, |id| position_index(id.index));
        replica.ledger.learns_its_age(there);
        replica.ledger.may_follow(vote.leader_id.term).map_err(Status::failed_precondition)?;
        // One that comes late, behind entries of the same leader, must not take those away again: what it is of is here, and committed.
        let held = replica.ledger.raft.data_metrics().borrow_watched().last_log;
        let newer = held.filter(|held| held.leader_id.term == vote.leader_id.term);
        if newer.is_some_and(|held| meta.last_log_id.is_some_and(|last| last.index < held.index)) {
            let own = replica.ledger.raft.server_metrics().borrow_watched().vote;
            let body = codec::encode_serde(&SnapshotResponse::<Types>::new(own)).into();
            return Ok(Response::new(Body { body, ..Body::default() }));
        }
        let number = replica.received.fetch_add(1, Ordering::Relaxed);
        let path = format!("snapshot-in-{number}.tmp");
        let broken = |e: std::io::Error| Status::internal(format!("snapshot cannot be stored: {e}"));
        let unusable = |e: StorageError| Status::internal(format!("snapshot not installed: {e}"));
        let (disk, name) = (replica.disk.clone(), path.clone());
        let mut sink = sim::task::blocking(move || Writer::create(&*disk, &name)).await.map_err(broken)?;
        while let Some(chunk) = stream.message().await? {
            sink =
                sim::task::blocking(move || sink.push(&chunk.body).map(|()| sink)).await.map_err(broken)?;
        }
        sim::task::blocking(move || sink.finish()).await.map_err(broken)?;
        let path = match whole {
            true => path,
            false => {
                let (disk, views) = (replica.disk.clone(), replica.ledger.shard.clone());
                let done = sim::task::blocking(move || complete(&disk, &path, number, &views)).await;
                done.map_err(unusable)?
            }
        };
        let source = SnapshotSource::File { disk: replica.disk.clone(), path };
        let snapshot = openraft::storage::Snapshot { meta, snapshot: source };
        let installed = replica.ledger.raft.install_full_snapshot(vote, snapshot).await;
        let installed = installed.map_err(|e| Status::unavailable(e.to_string()))?;
        sim::task::blocking(move || delta::discard(&*replica.disk, ASIDE)).await.map_err(unusable)?;
        Ok(Response::new(Body { body: codec::encode_serde(&installed).into(), ..Body::default() }))
    }

    async fn propose(&self, request: Request<Body>) -> Reply {
        let ledger = self.replica(request.get_ref())?.ledger;
        let commands = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable commands: {e}")))?;
        // The proposal goes on if the caller hangs up: it has been told nothing, and may ask again with its key.
        let proposed = sim::task::spawn(async move { ledger.propose_here(commands).await }).await;
        encoded(&proposed.unwrap_or_else(|e| Proposed::Unknown(e.to_string())))
    }

    async fn is_there(&self, request: Request<Body>) -> Reply {
        // Only who leads the control group names one.
        let version: u64 = codec::decode(&request.get_ref().body).unwrap_or(0);
        if version > 0 {
            self.control.hear(version, Instant::now());
        }
        if version > self.control.map().version {
            let control = self.control.clone();
            sim::task::spawn(async move { control.at_least(version, Instant::now() + LOOK).await });
        }
        Ok(Response::new(Body::default()))
    }

    async fn reaches(&self, request: Request<Body>) -> Reply {
        let addrs: Vec<String> = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable addresses: {e}")))?;
        encoded(&failover::reach(&self.peers, &addrs, 0).await)
    }

    async fn renew(&self, request: Request<Body>) -> Reply {
        let ask = codec::decode_serde(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable question: {e}")))?;
        let renewed = match &self.grants {
            Some(grants) => grants.renew(ask).await,
            None => Renewed::NotLeader(None),
        };
        Ok(Response::new(Body { body: codec::encode_serde(&renewed).into(), ..Body::default() }))
    }

    async fn halt(&self, request: Request<Body>) -> Reply {
        let Body { group, epoch, body } = request.into_inner();
        let ended = codec::decode_serde(&body)
            .map_err(|e| Status::invalid_argument(format!("unreadable ends of epochs: {e}")))?;
        let keeper = self.keeper.clone().ok_or_else(|| Status::not_found("this node keeps no replicas"))?;
        // It goes on if the caller hangs up: half a halt helps nobody.
        let halted = sim::task::spawn(async move { keeper.halt(group, epoch, ended).await }).await;
        encoded(&halted.map_err(|e| Status::internal(e.to_string()))??)
    }

    async fn stands(&self, _: Request<Body>) -> Reply {
        let standing = self.recovery()?.standing()?;
        Ok(Response::new(Body { body: codec::encode_serde(&standing).into(), ..Body::default() }))
    }

    async fn adopt(&self, request: Request<Body>) -> Reply {
        let recovery = self.recovery()?.clone();
        let incarnation = codec::decode_serde(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable incarnation: {e}")))?;
        // It goes on if the caller hangs up.
        let adopted = sim::task::spawn(async move { recovery.adopt(incarnation).await }).await;
        adopted.map_err(|e| Status::internal(e.to_string()))??;
        Ok(Response::new(Body::default()))
    }

    async fn has_tail(&self, request: Request<Body>) -> Reply {
        encoded(&self.replica(request.get_ref())?.ledger.lacking_elsewhere()?)
    }

    async fn lags(&self, _: Request<Body>) -> Reply {
        let led =
            |replica: Replica| Some((replica.ledger.group, replica.ledger.lag.get()?.as_millis() as u64));
        encoded(&self.groups.shards().into_iter().filter_map(led).collect::<Vec<(GroupId, u64)>>())
    }

    async fn elsewhere(&self, request: Request<Body>) -> Reply {
        let ledger = self.replica(request.get_ref())?.ledger;
        let (position, wait_ms): (Position, u64) = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable position: {e}")))?;
        let deadline = Instant::now() + Duration::from_millis(wait_ms);
        encoded(&ledger.elsewhere_here(position, deadline).await?)
    }

    async fn read_index(&self, request: Request<Body>) -> Reply {
        encoded(&self.replica(request.get_ref())?.ledger.read_position_here().await?)
    }

    async fn reconfigure(&self, request: Request<Body>) -> Reply {
        let ledger = self.replica(request.get_ref())?.ledger;
        of_epoch(&ledger, request.get_ref().epoch)?;
        let change: Membership = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable change: {e}")))?;
        ledger.change(change).await?;
        encoded(&())
    }

    async fn quarantined(&self, request: Request<Body>) -> Reply {
        let disk = self.replica(request.get_ref())?.disk;
        let look: Look = codec::decode(&request.get_ref().body)
            .map_err(|e| Status::invalid_argument(format!("unreadable question: {e}")))?;
        encoded(&sim::task::blocking(move || quarantine::page(&*disk, look)).await?)
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
