//! `loci.v1.AdminService`: what an operator asks of one node.

use super::memory::Feed;
use super::{context, director};
use crate::cache::CacheView;
use crate::control::Control;
use crate::control::map::{ClusterMap, Learner, Liveness, NodeEntry, NodeState, ShardEntry, ShardId};
use crate::control::recover::Recoverer;
use crate::control::regions::{End, OldDisk, RegionChange, Regions, Step};
use crate::error::Error;
use crate::groups::{Groups, Replica, name_of};
use crate::ledger::{log_store::position_index, recovery};
use crate::peers::Peers;
use crate::proto::internal::Body;
use crate::proto::v1::{self, admin_service_server};
use crate::reader::Reader;
use crate::resubmit::Resubmission;
use crate::roles::{self, Role, Roles};
use crate::writer::Writer;
use futures::future::join_all;
use openraft::async_runtime::WatchReceiver;
use sim::sync::mpsc;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use storage::model::Month;
use storage::{StorageError, codec};
use tonic::{Request, Response, Status};

pub struct AdminService {
    pub about: Arc<About>,
    /// Of a node with the edge's roles.
    pub edge: Option<(Writer, Reader)>,
    pub recoverer: Recoverer,
}

/// What a node knows of itself.
pub struct About {
    pub node: String,
    pub roles: Vec<String>,
    pub started: Instant,
    pub groups: Groups,
    pub disk_bytes: Box<dyn Fn() -> u64 + Send + Sync>,
    pub cache: Option<CacheView>,
    pub control: Control,
    pub peers: Peers,
    /// Of who leads the control group: what a change of the primary region waits for.
    pub waits_for: Arc<Mutex<String>>,
}

/// How long the nodes that lead shards may take to say how far the other region lags.
const LAGS_WITHIN: Duration = Duration::from_millis(500);
/// How long an account of incidents waits for the newest map.
const READ_WITHIN: Duration = Duration::from_secs(3);

impl About {
    /// The node's status; `with_digest` recomputes the digest from the tables, which reads everything.
    pub async fn status(&self, with_digest: bool) -> Result<v1::StatusResponse, Error> {
        let mut shards = vec![];
        let mut level = "L0";
        for replica in self.groups.shards() {
            let shard = shard_status(&replica, with_digest).await?;
            if shard.leader.is_empty() {
                level = "L3";
            }
            shards.push(shard);
        }
        Ok(v1::StatusResponse {
            node: self.node.clone(),
            build: crate::BUILD.into(),
            roles: self.roles.clone(),
            level: level.into(),
            shards,
            uptime_ms: self.started.elapsed().as_millis() as u64,
            disk_bytes: (self.disk_bytes)(),
            cache: self.cache.as_ref().map(CacheView::status),
        })
    }

    /// The cluster as a map has it.
    pub fn cluster(&self, map: &ClusterMap) -> v1::ClusterResponse {
        let mut cluster = cluster(map);
        if let Some(change) = cluster.regions.as_mut().and_then(|regions| regions.change.as_mut()) {
            change.waits_for = self.waits_for();
        }
        cluster
    }

    /// What a map says of incidents, oldest first.
    pub fn incidents(&self, map: &ClusterMap) -> Vec<v1::Incident> {
        let mut incidents = map.incidents();
        if let Some(open) = incidents.last_mut().filter(|incident| incident.state == "open") {
            open.waits_for = self.waits_for();
        }
        incidents
    }

    /// Which region to talk to, by the map that this node has.
    pub fn regions(&self) -> v1::RegionsResponse {
        let mut regions = director::regions(&self.control.map(), &self.node, self.control.heard());
        if let Some(change) = &mut regions.change {
            change.waits_for = self.waits_for();
        }
        regions
    }

    fn waits_for(&self) -> String {
        self.waits_for.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    /// By shard, how far the other region lags, in milliseconds, as those who lead the shards say. Who does not answer in time is left out.
    pub async fn lags(&self) -> BTreeMap<ShardId, u64> {
        let map = self.control.map();
        let there = map.nodes.values().filter(|node| node.liveness == Liveness::Up);
        let asked =
            there.filter(|node| map.regions.is_some() && node.region == map.primary()).map(|node| async {
                let mut client = self.peers.client(&node.addr).ok()?;
                let request = self.peers.request(Body::default(), LAGS_WITHIN);
                let answer = time::timeout(LAGS_WITHIN, client.lags(request)).await.ok()?.ok()?;
                codec::decode::<Vec<(ShardId, u64)>>(&answer.into_inner().body).ok()
            });
        join_all(asked).await.into_iter().flatten().flatten().collect()
    }

    /// The members of every group that this node has a replica of.
    pub fn members(&self) -> Vec<v1::Member> {
        self.groups.all().iter().flat_map(members_of).collect()
    }
}

fn members_of(replica: &Replica) -> Vec<v1::Member> {
    let metrics = replica.ledger.raft.server_metrics().borrow_watched().clone();
    let membership = metrics.membership_config.membership();
    let voters: Vec<u64> = membership.voter_ids().collect();
    let member = |(id, node): (&u64, &openraft::BasicNode)| v1::Member {
        node: id.to_string(),
        address: node.addr.clone(),
        role: if voters.contains(id) { "voter" } else { "learner" }.into(),
        leader: metrics.current_leader == Some(*id),
        group: name_of(replica.ledger.group),
    };
    membership.nodes().map(member).collect()
}

async fn shard_status(
    Replica { ledger, views, .. }: &Replica,
    with_digest: bool,
) -> Result<v1::ShardStatus, Error> {
    let metrics = ledger.raft.metrics().borrow_watched().clone();
    let leader = ledger.leader();
    let shard = ledger.shard.clone();
    let (counts, digests) = sim::task::blocking(move || {
        let scan = if with_digest { Some(shard.digest_by_scan()) } else { None };
        (shard.counts(), scan.transpose().map(|scan| (shard.digest(), scan)))
    })
    .await;
    // Damage is repaired; tables that disagree are what was asked about.
    if let Err(error @ StorageError::Damaged { .. }) = digests {
        recovery::give_up_views(&ledger.shard, error).await;
    }
    let internal = |e: StorageError| Error::Internal(e.to_string());
    let (counts, ((position, digest), scan)) = (counts.map_err(internal)?, digests.map_err(internal)?);
    let published_index = ledger.shard.applied_index();
    let roles = views.roles.iter().filter(|role| role.is_view());
    let view = |role: &Role| v1::ViewStatus { view: role.name().into(), published_index };
    let owned = ledger.shard.slots().owned();
    let pinned = owned.apart().iter().filter(|(_, slots)| !slots.is_empty());
    let committed = metrics.last_applied.map_or(0, |l| position_index(l.index));
    Ok(v1::ShardStatus {
        shard: ledger.group,
        leader: leader.as_ref().map_or(String::new(), |(_, addr)| addr.clone()),
        is_leader: ledger.raft.is_leader(),
        term: metrics.current_term,
        epoch: ledger.epoch(),
        lag_ms: ledger.lag.get().map(|lag| lag.as_millis() as u64),
        last_index: metrics.last_log_index.map_or(0, position_index),
        committed_index: committed,
        views: roles.map(view).collect(),
        memories: counts.memories,
        vectors: counts.vectors,
        idempotency_keys: counts.idempotency_keys,
        edges: counts.edges,
        repairing: ledger.is_repairing(),
        pinned: pinned.map(|(tenant, _)| tenant.clone()).collect(),
        digest: digest.to_vec(),
        digest_index: scan.as_ref().map_or(position.index, |(at, _)| at.index),
        digest_by_scan: scan.map_or(vec![], |(_, digest)| digest.to_vec()),
        quorum_age_ms: metrics.last_quorum_acked.map_or(u64::MAX, |at| at.elapsed().as_millis() as u64),
    })
}

#[tonic::async_trait]
impl admin_service_server::AdminService for AdminService {
    type ResubmitStream = Feed<v1::Resubmitted>;

    async fn resubmit(
        &self,
        request: Request<v1::ResubmitRequest>,
    ) -> Result<Response<Self::ResubmitStream>, Status> {
        operator(&request)?;
        let (control, peers, router) =
            (self.about.control.clone(), self.about.peers.clone(), self.edge()?.0.router.clone());
        let (told, feed) = mpsc::channel(16);
        sim::task::spawn(Resubmission { control, peers, router }.run(request.into_inner(), told));
        Ok(Response::new(Feed(feed)))
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        operator(&request)?;
        Ok(Response::new(self.about.status(request.get_ref().with_digest).await?))
    }

    async fn members(
        &self,
        request: Request<v1::MembersRequest>,
    ) -> Result<Response<v1::MembersResponse>, Status> {
        operator(&request)?;
        Ok(Response::new(v1::MembersResponse { members: self.about.members() }))
    }

    async fn partitions(
        &self,
        request: Request<v1::PartitionsRequest>,
    ) -> Result<Response<v1::PartitionsResponse>, Status> {
        operator(&request)?;
        let (_, deadline) = context(&request)?;
        let partitions = self.edge()?.1.partitions(deadline).await?;
        let partition = |p: storage::Partition| v1::Partition {
            month: p.month.to_string(),
            memories: p.memories,
            vectors: p.vectors,
            history: p.history,
            applied_index: p.applied.index,
        };
        Ok(Response::new(v1::PartitionsResponse {
            partitions: partitions.into_iter().map(partition).collect(),
        }))
    }

    async fn drop_partition(
        &self,
        request: Request<v1::DropPartitionRequest>,
    ) -> Result<Response<v1::DropPartitionResponse>, Status> {
        operator(&request)?;
        let (_, deadline) = context(&request)?;
        let v1::DropPartitionRequest { month, options } = request.into_inner();
        let parsed = Month::parse(&month)
            .ok_or_else(|| Error::invalid("month", format!("'{month}' is no month; write it as 2026-11")))?;
        let crate::writer::Options { key, .. } = crate::writer::options(options)?;
        let written = self.edge()?.0.drop_month(parsed, key, deadline).await.map_err(|e| match e {
            Error::NotFound(_) => Error::NotFound(format!("partition {month}")),
            other => other,
        })?;
        let memories = written.iter().map(|w| w.version).sum();
        let info = super::memory::info_of_all(&written);
        Ok(Response::new(v1::DropPartitionResponse { memories, info }))
    }

    async fn cluster(
        &self,
        request: Request<v1::ClusterRequest>,
    ) -> Result<Response<v1::ClusterResponse>, Status> {
        operator(&request)?;
        let (_, deadline) = context(&request)?;
        let map = self.about.control.read(deadline).await?;
        Ok(Response::new(self.about.cluster(&map)))
    }

    async fn incidents(
        &self,
        request: Request<v1::IncidentsRequest>,
    ) -> Result<Response<v1::IncidentsResponse>, Status> {
        operator(&request)?;
        let (_, deadline) = context(&request)?;
        let control = &self.about.control;
        // While the control group has no leader, what this node has is better than nothing.
        let map =
            control.read(deadline.min(Instant::now() + READ_WITHIN)).await.unwrap_or_else(|_| control.map());
        Ok(Response::new(v1::IncidentsResponse { incidents: self.about.incidents(&map) }))
    }

    async fn recover_control(
        &self,
        request: Request<v1::RecoverControlRequest>,
    ) -> Result<Response<v1::RecoverControlResponse>, Status> {
        operator(&request)?;
        let (recoverer, ask) = (self.recoverer.clone(), request.into_inner());
        // It goes on if the caller hangs up: half a recovery helps nobody.
        let recovered = sim::task::spawn(async move { recoverer.run(&ask).await }).await;
        Ok(Response::new(recovered.map_err(|e| Status::internal(e.to_string()))??))
    }

    async fn change_cluster(
        &self,
        request: Request<v1::ChangeClusterRequest>,
    ) -> Result<Response<v1::ClusterResponse>, Status> {
        use v1::change_cluster_request::Change;
        operator(&request)?;
        let (_, deadline) = context(&request)?;
        let change = request.into_inner().change.ok_or_else(|| Error::invalid("change", "is missing"))?;
        let changed = self.about.control.update(
            |map| match &change {
                Change::Join(node) if node.id == 0 || node.address.is_empty() => {
                    Err(Error::invalid("join", "needs a node's id (not 0) and its address"))
                }
                Change::Join(node) => {
                    let region = if node.region.is_empty() { map.primary() } else { &node.region };
                    map.join_in(node.id, &node.address, &roles_of(node)?, region)
                }
                Change::Drain(node) => map.drain(*node),
                Change::Remove(node) => map.remove(*node),
                Change::Shards(shards) => map.begin_resize(*shards),
                Change::Pin(pin) => map.pin(&pin.tenant, pin.shard),
                Change::Unpin(tenant) => Ok(map.unpin(tenant)),
                Change::Region(wish) => ordered(map, wish),
            },
            deadline,
        );
        Ok(Response::new(cluster(&*changed.await?)))
    }
}

/// Another region is to be the primary, as an operator wishes. Who waits for everything, or accepts the loss, may have one that is still being filled.
fn ordered(map: &ClusterMap, wish: &v1::RegionWish) -> Result<ClusterMap, Error> {
    let v1::RegionWish { to, planned, accept_data_loss: accepted } = wish;
    let first = (Step::Granting, "an operator's order");
    let begun = map.begin_region_change(to, *planned, *accepted, first, time::calendar_ms())?;
    let under_way = map.regions.as_ref().is_some_and(|regions| regions.change.is_some());
    match map.unready_in(to).filter(|_| !under_way && !planned && !accepted) {
        Some((shard, ready)) => Err(Error::invalid(
            "region",
            format!(
                "{to} is still being filled: {ready} of its replicas of shard {shard} have caught up. Wait, or go on with what there is: \
                 --accept-data-loss"
            ),
        )),
        None => Ok(begun),
    }
}

fn cluster(map: &ClusterMap) -> v1::ClusterResponse {
    let node = |(id, node): (&u64, &NodeEntry)| v1::ClusterNode {
        id: *id,
        address: node.addr.clone(),
        state: state_of(node).into(),
        shards: map.kept_by(*id).into_iter().collect(),
        roles: roles::names(&node.roles),
        region: node.region.clone(),
    };
    let learner = |(node, learner): (&u64, &Learner)| v1::ClusterLearner {
        node: *node,
        state: match learner {
            Learner::Joining => "joining",
            Learner::Serving => "serving",
            Learner::Leaving => "leaving",
        }
        .into(),
    };
    let shard = |(id, shard): (&ShardId, &ShardEntry)| v1::ClusterShard {
        shard: *id,
        members: shard.members.iter().copied().collect(),
        learners: shard.learners.iter().map(learner).collect(),
        slots: shard.slots.everybody().to_string(),
        joining: shard.handover.map_or(0, |handover| handover.to),
        leaving: shard.handover.and_then(|handover| handover.from).unwrap_or(0),
        epoch: shard.epoch,
        chosen: shard.chosen.unwrap_or(0),
        ends: shard.ends.iter().map(end_of).collect(),
    };
    let pin = |tenant: &String| v1::ClusterPin {
        tenant: tenant.clone(),
        shard: map.pins.get(tenant).copied(),
        slots_to_move: map.slots_awaited(tenant) as u32,
    };
    v1::ClusterResponse {
        version: map.version,
        nodes: map.nodes.iter().map(node).collect(),
        shards: map.shards.iter().map(shard).collect(),
        resize: map.resize.as_ref().map(|resize| v1::Resize {
            shards: resize.shards,
            slots_moved: resize.slots_moved as u32,
            slots_to_move: resize.slots_to_move as u32,
        }),
        pins: map.apart().into_iter().map(pin).collect(),
        regions: map.regions.as_ref().map(regions_of),
        erasures_open: map.open_erasures().len() as u32,
        incarnation: map.incarnation,
    }
}

fn end_of((epoch, end): (&u64, &End)) -> v1::EpochEnd {
    let old_disk = |(node, old): (&u64, &OldDisk)| v1::OldDisk {
        node: *node,
        kept_index: old.kept,
        last_index: old.last,
        commands: old.commands,
    };
    v1::EpochEnd {
        epoch: *epoch,
        certain_index: end.certain,
        last_index: end.last,
        ceiling_index: end.ceiling,
        old_disks: end.old_disks.iter().map(old_disk).collect(),
        resolved: end.lost().is_some(),
        lost_after: end.lost().map_or(0, |(after, _)| after),
        lost_to: end.lost().map_or(0, |(_, to)| to),
    }
}

/// A change of the primary region, without what it waits for.
pub(super) fn change_of(change: &RegionChange) -> v1::RegionChange {
    v1::RegionChange {
        from: change.from.clone(),
        to: change.to.clone(),
        planned: change.planned,
        step: change.step().name().into(),
        steps: change
            .steps
            .iter()
            .map(|(step, at_ms)| v1::RegionStep { step: step.name().into(), at_ms: *at_ms })
            .collect(),
        cause: change.cause.clone(),
        epoch: change.epoch,
        waits_for: String::new(),
    }
}

fn regions_of(regions: &Regions) -> v1::ClusterRegions {
    v1::ClusterRegions {
        primary: regions.primary.clone(),
        witness: regions.witness.clone().unwrap_or_default(),
        epoch: regions.epoch,
        change: regions.change.as_ref().map(change_of),
        past: regions.past.iter().map(change_of).collect(),
    }
}

/// In which state a node is called.
pub(super) fn state_of(node: &NodeEntry) -> &'static str {
    match (node.state, node.liveness) {
        (NodeState::Draining, _) => "draining",
        (NodeState::Member, Liveness::Up) => "member",
        (NodeState::Member, Liveness::Down) => "down",
        (NodeState::Member, Liveness::Lost) => "lost",
    }
}

/// The roles that a node joins with; where none are named, all that have replicas.
fn roles_of(node: &v1::ClusterNode) -> Result<Roles, Error> {
    if node.roles.is_empty() {
        return Ok(roles::all());
    }
    let role = |name: &String| {
        let names = roles::names(&Role::ALL).join(", ");
        Role::parse(name).ok_or_else(|| {
            Error::invalid("roles", format!("'{name}' is none that the cluster map knows; there are {names}"))
        })
    };
    node.roles.iter().map(role).collect()
}

impl AdminService {
    fn edge(&self) -> Result<&(Writer, Reader), Error> {
        self.edge
            .as_ref()
            .ok_or_else(|| Error::Unavailable("this node has no gateway; ask one that has".into()))
    }
}

fn operator<T>(request: &Request<T>) -> Result<(), Error> {
    let (caller, _) = context(request)?;
    if caller.operator {
        return Ok(());
    }
    Err(Error::Forbidden("the admin service needs an operator's key (see `loci keys add --operator`)".into()))
}
