//! The nodes of a scenario, each the production node in a simulated machine.

use crate::spec::{Draw, Scenario};
use nodes::auth::Keys;
use nodes::config::NodeConfig;
use nodes::error::Error;
use nodes::node::Node;
use nodes::proto::v1::{self, admin_service_client::AdminServiceClient};
use sim::disk::simulated::DiskFaults;
use sim::net::Channel;
use sim::time::Duration;
use sim::world::{ClockModel, Latency, LinkModel, NodeIndex, NodeOptions, World};
use std::collections::BTreeMap;

const PORT: u16 = 7400;
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
    operator: String,
}

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
        let nodes = scenario.topology.replicas + scenario.topology.gateways;
        let draw = draw.unwrap_or_else(|| Draw::usual(nodes));
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
        let voters: BTreeMap<String, String> =
            (1..=replicas).map(|i| (i.to_string(), format!("n{i}:{PORT}"))).collect();
        let keys_per_tenant = scenario.workload.keys_per_tenant;
        let world_handle = world.clone();
        let mut cluster = Cluster {
            world: world_handle,
            replicas: vec![],
            disk_faults: BTreeMap::new(),
            gateways: vec![],
            keys,
            keys_per_tenant,
            operator,
        };
        let product = match draw.product_rows_min {
            Some(rows) => format!("product_after_days = -40\nproduct_rows_min = {rows}\n"),
            None => String::new(),
        };
        let names = (1..=replicas).map(|i| (format!("n{i}"), Some(i as u64)));
        let edges = (1..=scenario.topology.gateways).map(|i| (format!("g{i}"), None));
        for ((name, id), limits) in names.chain(edges).zip(&draw.nodes) {
            let roles = if id.is_some() { "" } else { "roles = ['gateway', 'writer', 'reader']\n" };
            let number = id.map_or(String::new(), |id| format!("id = {id}\n"));
            let addr = format!("{name}:{PORT}");
            let text = format!(
                "name = '{name}'\nlisten = '{addr}'\ncluster_secret = '{SECRET}'\n{roles}{number}\
                 [replicas]\n{}\n[tuning]\ncheckpoint_entries = {}\nentries_kept = {}\nsegment_bytes_max = {}\nbase_bytes_min = {}\n\
                 vector_buffer_bytes = {}\ngraph_rows_min = {}\n{product}",
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
            let options = NodeOptions { name, region: "here".into(), cores: 2, clock };
            let file = file.clone();
            let node = world.add_node(options, move || process(config.clone(), file.clone()));
            if let Some(disk) = world.disk(node) {
                let latency = Duration::from_micros(20);
                let sync_latency = Duration::from_micros(limits.sync_us);
                let usual = DiskFaults { latency, sync_latency, ..Default::default() };
                disk.set_faults(usual);
                cluster.disk_faults.insert(node, usual);
            }
            if id.is_some() {
                cluster.replicas.push(node);
            }
            cluster.gateways.push(addr);
        }
        // Where there are gateways, clients use those; else the replicas themselves.
        if scenario.topology.gateways > 0 {
            let replicas = cluster.gateways.drain(..replicas).take(1).collect::<Vec<_>>();
            cluster.gateways.extend(replicas);
        }
        Ok(cluster)
    }

    fn admin(&self, node: NodeIndex) -> std::io::Result<AdminServiceClient<Channel>> {
        let channel = sim::net::connect(&format!("{}:{PORT}", self.world.node_name(node)))?;
        Ok(AdminServiceClient::new(channel))
    }

    /// A replica's own account of itself; `None` if it does not answer soon.
    pub async fn status(&self, node: NodeIndex, with_digest: bool) -> Option<v1::StatusResponse> {
        let mut client = self.admin(node).ok()?;
        let mut request = tonic::Request::new(v1::StatusRequest { with_digest });
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.operator).parse().ok()?);
        let limit = Duration::from_secs(if with_digest { 30 } else { 1 });
        request.set_timeout(limit);
        let answer = sim::time::timeout(limit, client.status(request)).await.ok()?.ok()?;
        Some(answer.into_inner())
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

    pub fn addr(&self, node: NodeIndex) -> String {
        format!("{}:{PORT}", self.world.node_name(node))
    }
}

/// The process of a node: what `loci node` does, on this machine's disk.
async fn process(config: NodeConfig, keys: Keys) {
    let run = async {
        let disk = sim::disk::open(&config.data).map_err(|e| Error::Internal(e.to_string()))?;
        if Keys::load(&*disk).map_err(|e| Error::Internal(e.to_string()))? != keys {
            keys.save(&*disk).map_err(|e| Error::Internal(e.to_string()))?;
        }
        Node::open(config, disk).await?.serve(|_| (), std::future::pending()).await
    };
    if let Err(error) = run.await {
        sim::task::abort(&error.to_string()).await;
    }
}
