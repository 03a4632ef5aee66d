//! openraft's messages to a peer: snapshots by calls of their own, all else over the link that all groups share ([`crate::links`]).

use super::log_store::Missed;
use super::pace::Pace;
use super::recovery;
use super::state_machine::SnapshotSource;
use super::trust::Past;
use super::types::{Entry, Types, Vote};
use crate::groups::GroupId;
use crate::peers::Peers;
use crate::proto::internal::{Body, Message, Method};
use openraft::entry::RaftEntry;
use openraft::error::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, v2::RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, EntryPayload, OptionalSend, RaftNetworkFactory};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sim::disk::Disk;
use sim::time::{Duration, Instant};
use std::future::Future;
use std::sync::{Arc, Weak};
use storage::delta::RangeHashes;
use storage::{Shard, bases, codec};

/// A snapshot may take this long to export, send and install.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Clone)]
pub struct Network {
    pub peers: Peers,
    pub disk: Arc<dyn Disk>,
    pub group: GroupId,
    pub epoch: u64,
    /// This node's address.
    pub here: String,
    /// What the others say of this replica's own past.
    pub past: Past,
    pub missed: Missed,
    /// Closed while others still send.
    pub views: Weak<Shard>,
}

/// One peer.
pub struct Peer {
    network: Network,
    target: u64,
    addr: String,
    pace: Pace,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;
    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { network: self.clone(), target, addr: node.addr.clone(), pace: Pace::default() }
    }
}

type Error = RPCError<Types>;

fn unreachable(message: impl std::fmt::Display) -> Unreachable<Types> {
    Unreachable::from_string(message)
}

/// What an entry has to carry; its head is small.
fn bytes_of(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(data) => data.0.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

impl Peer {
    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        request: &Q,
        ttl: Duration,
    ) -> Result<A, Error> {
        let Network { peers, group, epoch, here, views, .. } = &self.network;
        let applied = views.upgrade().map_or(0, |views| views.applied_index());
        let (method, body) = (method.into(), codec::encode_serde(request).into());
        let message = Message { group: *group, method, body, epoch: *epoch, applied, from: here.clone() };
        let answer = peers.tell(&self.addr, message, ttl).await.map_err(unreachable)?;
        codec::decode_serde(&answer).map_err(|e| unreachable(e).into())
    }

    async fn ask_for_vote(
        &self,
        method: Method,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, Error> {
        self.network.past.asks(&rpc.vote);
        let answer: VoteResponse<Types> = self.call(method, &rpc, option.hard_ttl()).await?;
        self.network.past.check(&rpc.vote, &answer.vote).map_err(unreachable)?;
        Ok(answer)
    }

    /// What the peer has already.
    async fn range_hashes(&self) -> Result<RangeHashes, Unreachable<Types>> {
        let Network { peers, group, epoch, .. } = &self.network;
        let body = Body { group: *group, epoch: *epoch, ..Body::default() };
        let asked = peers.ask(&self.addr, body, SNAPSHOT_TIMEOUT, |mut to, body| async move {
            to.range_hashes(body).await
        });
        codec::decode(&asked.await.map_err(unreachable)?).map_err(unreachable)
    }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = SnapshotSource;

    async fn append_entries(
        &mut self,
        mut rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, Error> {
        if rpc.entries.is_empty() {
            if self.network.missed.take() {
                return Err(unreachable("it needs entries that are purged, and with that a snapshot").into());
            }
            return self.call(Method::Append, &rpc, option.hard_ttl()).await;
        }
        let asked = rpc.entries.len();
        let (count, bytes) = self.pace.fitting(rpc.entries.iter().map(bytes_of));
        rpc.entries.truncate(count);
        let last = rpc.entries.last().map(|entry| entry.log_id());
        let (began, within) = (Instant::now(), self.pace.within(bytes).max(option.hard_ttl()));
        let answer = self.call(Method::Append, &rpc, within).await;
        match &answer {
            Ok(_) => self.pace.answered(bytes, began.elapsed()),
            Err(_) if began.elapsed() >= within => {
                sim::trace::probe("ledger: an append ran out of time");
                self.pace.ran_out(bytes);
            }
            Err(_) => {}
        }
        match answer? {
            AppendEntriesResponse::Success if count < asked => {
                Ok(AppendEntriesResponse::PartialSuccess(last))
            }
            answer => Ok(answer),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, Error> {
        self.ask_for_vote(Method::Vote, rpc, option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, Error> {
        self.ask_for_vote(Method::PreVote, rpc, option).await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, Error> {
        self.call(Method::TransferLeader, &rpc, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<Types, SnapshotSource>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let SnapshotSource::Views(shard) = snapshot.snapshot else {
            return Err(unreachable("a received snapshot is not sent on").into());
        };
        let (views, target) = (shard.clone(), self.target);
        sim::info!("peer {target} is behind the log: sending it a snapshot");
        let send = async {
            let (disk, path) = (self.network.disk.clone(), format!("snapshot-to-{target}.tmp"));
            let there = self.range_hashes().await?;
            let whole = there == RangeHashes::default();
            let head = codec::encode_serde(&(vote, snapshot.meta, whole));
            let file = {
                let (disk, path) = (disk.clone(), path.clone());
                sim::task::blocking(move || {
                    let (bytes, _, _) = bases::export(&shard, &there, &*disk, &path)?;
                    let beside = if whole { "" } else { ", beside what it has" };
                    sim::info!("the snapshot for peer {target} has {bytes} bytes{beside}");
                    bases::Reader::open(&*disk, &path)
                })
            };
            let file = match file.await {
                Err(error) if recovery::is_fatal_to_views(&error) => {
                    recovery::give_up_views(&views, error).await
                }
                file => file.map_err(unreachable)?,
            };
            let (group, epoch) = (self.network.group, self.network.epoch);
            let first = futures::stream::iter([Body { body: head.into(), group, epoch }]);
            let rest = futures::stream::unfold(Some(file), move |file| async move {
                let mut file = file?;
                let (file, chunk) = sim::task::blocking(move || {
                    let chunk = file.next_chunk();
                    (file, chunk)
                })
                .await;
                // A read error ends the stream early; the receiver then refuses the snapshot as incomplete.
                let body = Body { body: chunk.ok()??.into(), group, epoch };
                Some((body, Some(file)))
            });
            let stream = futures::StreamExt::chain(first, rest);
            let mut client = self.network.peers.client(&self.addr).map_err(unreachable)?;
            let reply = client.snapshot(self.network.peers.request(stream, SNAPSHOT_TIMEOUT)).await;
            let removed = sim::task::blocking(move || disk.remove(&path)).await;
            let reply = reply.map_err(|s| unreachable(s.message()))?;
            removed.map_err(unreachable)?;
            codec::decode_serde::<SnapshotResponse<Types>>(&reply.into_inner().body).map_err(unreachable)
        };
        sim::select! {
            reason = cancel => Err(StreamingError::Closed(reason)),
            reply = sim::time::timeout(SNAPSHOT_TIMEOUT, send) => match reply {
                Ok(Err(error)) => {
                    sim::warn!("the snapshot for peer {} did not arrive: {error}", self.target);
                    Err(error.into())
                }
                Ok(Ok(reply)) => Ok(reply),
                Err(elapsed) => Err(unreachable(elapsed).into()),
            },
        }
    }
}
