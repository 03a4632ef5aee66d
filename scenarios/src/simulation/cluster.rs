//! The nodes of a scenario, each the production node in a simulated machine.

use crate::spec::{Draw, Scenario};
use nodes::auth::Keys;
use nodes::config::{EDGE_ROLES, NodeConfig};
use nodes::error::Error;
use nodes::node::Node;
use nodes::proto::v1::{self, admin_service_client::AdminServiceClient};
use nodes::roles::{Role, Roles};
use sim::disk::simulated::DiskFaults;
use sim::net::Channel;
use sim::time::Duration;
use sim::trace::Level;
use sim::world::{ClockModel, Latency, LinkModel, NodeIndex, NodeOptions, World};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const PORT: u16 = 7400;
/// Of each machine.
pub const CORES: usize = 2;
/// So little that caches must choose.
const CACHE_BYTES: u64 = 20_000;
const SECRET: &str = "a secret of this simulated cluster";

pub struct Cluster {
    pub world: World,
    /// In the order of their names: n1, n2, …
    pub replicas: Vec<NodeIndex>,
    /// How the disks are when they are well.
    pub disk_faults: BTreeMap<NodeIndex, DiskFaults>,
    /// Addresses that clients may ask.
    pub gateways: Vec<String>,
    /// An API key of each tenant.
    pub keys: Vec<String>,
    pub keys_per_tenant: u64,
    /// The nodes with the edge's roles only: g1, g2, …
    pub edges: Vec<NodeIndex>,
    /// The replicas that do not vote.
    pub apart: Vec<NodeIndex>,
    /// The nodes that cache: c1, c2, …
    pub caches: Vec<NodeIndex>,
    told: BTreeMap<NodeIndex, Arc<Told>>,
    operator: String,
}

/// What an operator tells a node's process.
#[derive(Default)]
struct Told {
    stop: sim::sync::Notify,
    /// Its machine is a new one: see [`NodeConfig::rejoin`].
    rejoin: AtomicBool,
}

/// The ends of shards' ledgers.
pub type Ends = BTreeMap<u32, u64>;

pub fn host_of(addr: &str) -> &str {
    addr.split(':').next().unwrap_or(addr)
}

/// The tenant's name.
pub fn tenant(number: usize) -> String {
    format!("tenant-{number}")
}

impl Cluster {
    /// Boots all nodes. Small limits, so that runs cross segment, checkpoint and purge boundaries.
    pub fn start(world: &World, scenario: &Scenario) -> Result<Cluster, Error> {
        let draw = scenario.draw.clone();
        let draw = draw.unwrap_or_else(|| Draw::usual(scenario.topology.machines()));
        world.set_buggify(draw.buggify.clone());
        let base = Duration::from_micros(draw.latency_us);
        let latency = Latency { base, jitter: base.mul_f64(0.4) };
        world.links().set_default(LinkModel {
            latency,
            loss: scenario.topology.loss,
            ..LinkModel::default()
        });
        let mut file = Keys::default();
        let keys =
            (0..scenario.workload.tenants).map(|t| file.add(&tenant(t), false)).collect::<Result<_, _>>()?;
        let operator = file.add("operators", true)?;
        let replicas = scenario.topology.replicas;
        let voters: BTreeMap<String, String> = (1..=replicas - scenario.topology.spares)
            .map(|i| (i.to_string(), format!("n{i}:{PORT}")))
            .collect();
        let keys_per_tenant = scenario.workload.keys_per_tenant;
        let world_handle = world.clone();
        let mut cluster = Cluster {
            world: world_handle,
            replicas: vec![],
            disk_faults: BTreeMap::new(),
            gateways: vec![],
            keys,
            keys_per_tenant,
            edges: vec![],
            apart: vec![],
            caches: vec![],
            told: BTreeMap::new(),
            operator,
        };
        let product = match draw.product_rows_min {
            Some(rows) => format!("product_after_days = -40\nproduct_rows_min = {rows}\n"),
            None => String::new(),
        };
        let names = (1..=replicas).map(|i| (format!("n{i}"), Some(i as u64)));
        let edges = (1..=scenario.topology.gateways).map(|i| (format!("g{i}"), None));
        let caches = (1..=scenario.topology.caches).map(|i| (format!("c{i}"), Some((replicas + i) as u64)));
        for ((name, id), limits) in names.chain(edges).chain(caches).zip(&draw.nodes) {
            let of_replicas = id.map_or(Roles::new(), |id| scenario.topology.roles_of(id));
            let caches = of_replicas.contains(&Role::Cache);
            let of_edge = EDGE_ROLES.into_iter().filter(|_| !caches);
            let roles = of_edge.chain(of_replicas.iter().map(|role| role.name()));
            let roles = roles.map(|role| format!("'{role}'")).collect::<Vec<_>>().join(", ");
            let number = id.map_or(String::new(), |id| format!("id = {id}\n"));
            let addr = format!("{name}:{PORT}");
            let text = format!(
                "name = '{name}'\nlisten = '{addr}'\ncluster_secret = '{SECRET}'\nroles = [{roles}]\n{number}shards = {}\n\
                 [replicas]\n{}\n[tuning]\ncheckpoint_entries = {}\nentries_kept = {}\nsegment_bytes_max = {}\nbase_bytes_min = {}\n\
                 vector_buffer_bytes = {}\ngraph_rows_min = {}\ncache_bytes_max = {CACHE_BYTES}\n{product}",
                scenario.topology.shards,
                voters.iter().map(|(id, addr)| format!("{id} = '{addr}'")).collect::<Vec<_>>().join("\n"),
                limits.checkpoint_entries,
                limits.entries_kept,
                limits.segment_bytes_max,
                limits.base_bytes_min,
                limits.vector_buffer_bytes,
                limits.graph_rows_min,
            );
            let config = NodeConfig::parse(&text)?;
            let clock = ClockModel {
                rate_ppm: limits.rate_ppm,
                offset: Duration::from_millis(limits.offset_ms),
                calendar_ms: limits.calendar_ms,
            };
            let slowdown = scenario.recovery.as_ref().map_or(1, |r| r.cpu_slowdown);
            let options = NodeOptions { name, region: "here".into(), cores: CORES, slowdown, clock };
            let (file, told) = (file.clone(), Arc::new(Told::default()));
            let telling = told.clone();
            let node = world.add_node(options, move || {
                let mut config = config.clone();
                config.rejoin = telling.rejoin.load(Ordering::SeqCst);
                process(config, file.clone(), telling.clone())
            });
            cluster.told.insert(node, told);
            if let Some(disk) = world.disk(node) {
                let latency = Duration::from_micros(20);
                let sync_latency = Duration::from_micros(limits.sync_us);
                let bytes_per_s = scenario.recovery.as_ref().map_or(0, |r| r.disk_bytes_per_s);
                let usual = DiskFaults { latency, sync_latency, bytes_per_s, ..Default::default() };
                disk.set_faults(usual);
                cluster.disk_faults.insert(node, usual);
            }
            if caches {
                cluster.caches.push(node);
                continue;
            }
            if id.is_some() && !of_replicas.contains(&Role::Ledger) {
                cluster.apart.push(node);
            }
            match id {
                Some(_) => cluster.replicas.push(node),
                None => cluster.edges.push(node),
            }
            cluster.gateways.push(addr);
        }
        // Where there are gateways, clients use those; else the replicas themselves.
        if scenario.topology.gateways > 0 {
            let replicas = cluster.gateways.drain(..replicas).take(1).collect::<Vec<_>>();
            // Where recovery is measured, a replica that goes takes no gateway with it.
            if scenario.recovery.is_none() {
                cluster.gateways.extend(replicas);
            }
        }
        Ok(cluster)
    }

    /// All machines but the clients'.
    pub fn machines(&self) -> impl Iterator<Item = NodeIndex> {
        self.replicas.iter().chain(&self.edges).chain(&self.caches).copied()
    }

    fn admin(&self, node: NodeIndex) -> std::io::Result<AdminServiceClient<Channel>> {
        let channel = sim::net::connect(&format!("{}:{PORT}", self.world.node_name(node)))?;
        Ok(AdminServiceClient::new(channel))
    }

    /// A replica's own account of itself; `None` if it does not answer soon.
    pub async fn status(&self, node: NodeIndex, with_digest: bool) -> Option<v1::StatusResponse> {
        let mut client = self.admin(node).ok()?;
        let limit = Duration::from_secs(if with_digest { 30 } else { 1 });
        let request = self.request(v1::StatusRequest { with_digest }, limit)?;
        let answer = sim::time::timeout(limit, client.status(request)).await.ok()?.ok()?;
        Some(answer.into_inner())
    }

    /// The cluster map; `None` if no node reads it soon.
    pub async fn map(&self) -> Option<v1::ClusterResponse> {
        for &node in &self.replicas {
            let Ok(mut client) = self.admin(node) else { continue };
            let limit = Duration::from_secs(1);
            let request = self.request(v1::ClusterRequest {}, limit)?;
            if let Ok(Ok(answer)) = sim::time::timeout(limit, client.cluster(request)).await {
                return Some(answer.into_inner());
            }
        }
        None
    }

    /// Asks any node for a change; whether it was taken.
    pub async fn change(&self, wish: v1::change_cluster_request::Change) -> bool {
        let limit = Duration::from_secs(2);
        for &node in &self.replicas {
            let Ok(mut client) = self.admin(node) else { continue };
            let change = v1::ChangeClusterRequest { change: Some(wish.clone()) };
            let Some(request) = self.request(change, limit) else { return false };
            if let Ok(Ok(_)) = sim::time::timeout(limit, client.change_cluster(request)).await {
                return true;
            }
        }
        false
    }

    /// An operator's request.
    pub fn request<T>(&self, message: T, limit: Duration) -> Option<tonic::Request<T>> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.operator).parse().ok()?);
        request.set_timeout(limit);
        Some(request)
    }

    /// The replica that leads, by its own and the highest term's account.
    pub async fn leader(&self) -> Option<NodeIndex> {
        let mut best = None;
        for &node in &self.replicas {
            let Some(status) = self.status(node, false).await else { continue };
            for shard in status.shards.iter().filter(|s| s.is_leader) {
                best = best.max(Some((shard.term, node)));
            }
        }
        best.map(|(_, node)| node)
    }

    /// Whether all replicas are up, follow one leader in each shard and publish what was its ledger's end when this was last asked with `wanted`.
    pub async fn redundant(&self, wanted: &mut Ends) -> bool {
        let mut shards: BTreeMap<u32, (u64, u64, Vec<String>)> = BTreeMap::new();
        for &node in &self.replicas {
            let Some(status) = self.status(node, false).await else { return false };
            for shard in status.shards {
                let (end, published, leaders) = shards.entry(shard.shard).or_insert((0, u64::MAX, vec![]));
                let views = shard.views.iter().map(|v| v.published_index).min();
                let views = views.unwrap_or(shard.committed_index);
                *published = (*published).min(if shard.repairing { 0 } else { views });
                *end = (*end).max(shard.last_index);
                leaders.push(shard.leader);
            }
        }
        let whole = |(shard, (_, published, leaders)): (&u32, &(u64, u64, Vec<String>))| {
            let members = self.replicas.len().min(Role::Ledger.policy().replicas);
            leaders.len() >= members + self.apart.len()
                && leaders.iter().all(|leader| !leader.is_empty() && *leader == leaders[0])
                && wanted.get(shard).is_some_and(|before| published >= before)
        };
        let redundant = !shards.is_empty() && shards.iter().all(whole);
        *wanted = shards.into_iter().map(|(shard, (end, ..))| (shard, end)).collect();
        redundant
    }

    /// Tells a node to stop in good order; whether it had ended within `limit`.
    pub async fn stop(&self, node: NodeIndex, limit: Duration) -> bool {
        let Some(told) = self.told.get(&node) else { return false };
        self.world.note(node, Level::Info, "is told to stop");
        told.stop.notify_one();
        let until = self.world.now() + limit;
        while self.world.is_running(node) && self.world.now() < until {
            sim::time::sleep(Duration::from_millis(10)).await;
        }
        !self.world.is_running(node)
    }

    /// The node's machine is gone; the one that takes its place is empty, knows it, and is off.
    pub fn replace(&self, node: NodeIndex) {
        self.world.replace(node);
        if let Some(told) = self.told.get(&node) {
            told.rejoin.store(true, Ordering::SeqCst);
        }
    }

    pub fn addr(&self, node: NodeIndex) -> String {
        format!("{}:{PORT}", self.world.node_name(node))
    }
}

/// The process of a node: what `loci node` does, on this machine's disk.
async fn process(config: NodeConfig, keys: Keys, told: Arc<Told>) {
    let run = async {
        let disk = sim::disk::open(&config.data).map_err(|e| Error::Internal(e.to_string()))?;
        if Keys::load(&*disk).map_err(|e| Error::Internal(e.to_string()))? != keys {
            keys.save(&*disk).map_err(|e| Error::Internal(e.to_string()))?;
        }
        Node::open(config, disk).await?.serve(|_| (), async move { told.stop.notified().await }).await
    };
    if let Err(error) = run.await {
        sim::task::abort(&error.to_string()).await;
    }
}
