//! The nodes of a scenario, each the production node on a machine.

use super::machines::{Machines, NewNode, NodeIndex};
use crate::spec::{Draw, Scenario};
use nodes::auth::Keys;
use nodes::config::{EDGE_ROLES, NodeConfig};
use nodes::error::Error;
use nodes::proto::v1::{self, admin_service_client::AdminServiceClient};
use nodes::roles::{Role, Roles};
use sim::net::Channel;
use sim::time::Duration;
use sim::trace::Level;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const PORT: u16 = 7400;
/// So little that caches must choose.
const CACHE_BYTES: u64 = 20_000;
const SECRET: &str = "a secret of this scenario's cluster";

pub struct Cluster {
    pub machines: Arc<dyn Machines>,
    /// In the order of their names: n1, n2, …
    pub replicas: Vec<NodeIndex>,
    /// Those that clients may ask.
    pub gateways: Vec<NodeIndex>,
    /// An API key of each tenant.
    pub keys: Vec<String>,
    pub keys_per_tenant: u64,
    /// The nodes with the edge's roles only: g1, g2, …
    pub edges: Vec<NodeIndex>,
    /// The replicas that do not vote.
    pub apart: Vec<NodeIndex>,
    /// The nodes that cache: c1, c2, …
    pub caches: Vec<NodeIndex>,
    /// The region of each machine, where there are several, and the one that wrote at last.
    regions: BTreeMap<NodeIndex, String>,
    witness: String,
    primary: Mutex<String>,
    operator: String,
}

/// The ends of shards' ledgers.
pub type Ends = BTreeMap<u32, u64>;

/// The tenant's name.
pub fn tenant(number: usize) -> String {
    format!("tenant-{number}")
}

impl Cluster {
    /// Boots all nodes. Small limits, so that runs cross segment, checkpoint and purge boundaries.
    pub async fn start(machines: Arc<dyn Machines>, scenario: &Scenario) -> Result<Cluster, Error> {
        let draw = scenario.draw.clone();
        let draw = draw.unwrap_or_else(|| Draw::usual(scenario.topology.machines()));
        let mut file = Keys::default();
        let keys =
            (0..scenario.workload.tenants).map(|t| file.add(&tenant(t), false)).collect::<Result<_, _>>()?;
        let operator = file.add("operators", true)?;
        let replicas = scenario.topology.replicas;
        let voters: BTreeMap<String, String> = (1..=replicas - scenario.topology.spares)
            .map(|i| (i.to_string(), format!("n{i}:{PORT}")))
            .collect();
        let product = match draw.product_rows_min {
            Some(rows) => format!("product_after_days = -40\nproduct_rows_min = {rows}\n"),
            None => String::new(),
        };
        let regions = scenario.topology.regions.as_ref();
        let of_regions = match regions {
            Some(regions) => {
                let table = BTreeMap::from([("regions", &regions.cluster)]);
                toml::to_string(&table).map_err(|e| Error::Internal(e.to_string()))?
            }
            None => String::new(),
        };
        let lost_after = scenario.topology.lost_after_s.map(|s| format!("node_lost_after_s = {s}\n"));
        let names = (1..=replicas).map(|i| (format!("n{i}"), Some(i as u64)));
        let edges = (1..=scenario.topology.gateways).map(|i| (format!("g{i}"), None));
        let caches = (1..=scenario.topology.caches).map(|i| (format!("c{i}"), Some((replicas + i) as u64)));
        let mut new = vec![];
        for ((name, id), limits) in names.chain(edges).chain(caches).zip(draw.nodes) {
            let of_replicas = id.map_or(Roles::new(), |id| scenario.topology.roles_of(id));
            let of_edge = EDGE_ROLES.into_iter().filter(|_| !of_replicas.contains(&Role::Cache));
            let roles = of_edge.chain(of_replicas.iter().map(|role| role.name()));
            let roles = roles.map(|role| format!("'{role}'")).collect::<Vec<_>>().join(", ");
            let mut number = id.map_or(String::new(), |id| format!("id = {id}\n"));
            if let (Some(_), None) = (regions, id) {
                number += &format!("region = '{}'\n", scenario.topology.region_of(&name));
            }
            let text = format!(
                "name = '{name}'\nlisten = '{name}:{PORT}'\ncluster_secret = \"{SECRET}\"\nroles = [{roles}]\n{number}shards = {}\n\
                 [replicas]\n{}\n[tuning]\ncheckpoint_entries = {}\nentries_kept = {}\nsegment_bytes_max = {}\nbase_bytes_min = {}\n\
                 vector_buffer_bytes = {}\ngraph_rows_min = {}\ncache_bytes_max = {CACHE_BYTES}\n{product}{}{of_regions}",
                scenario.topology.shards,
                voters.iter().map(|(id, addr)| format!("{id} = '{addr}'")).collect::<Vec<_>>().join("\n"),
                limits.checkpoint_entries,
                limits.entries_kept,
                limits.segment_bytes_max,
                limits.base_bytes_min,
                limits.vector_buffer_bytes,
                limits.graph_rows_min,
                lost_after.as_deref().unwrap_or_default(),
            );
            new.push(NewNode { config: NodeConfig::parse(&text)?, limits, keys: file.clone() });
        }
        let names: Vec<String> = new.iter().map(|new| new.config.name.clone()).collect();
        let booted = machines.boot(new).await?;
        let region =
            |(node, name): (&NodeIndex, String)| (*node, scenario.topology.region_of(&name).to_string());
        let of_machines = match regions {
            Some(_) => booted.iter().zip(names).map(region).collect(),
            None => BTreeMap::new(),
        };
        let (replicas, rest) = booted.split_at(replicas.min(booted.len()));
        let (edges, caches) = rest.split_at(scenario.topology.gateways.min(rest.len()));
        let apart = scenario.topology.apart().into_iter();
        let apart = apart.filter_map(|id| replicas.get(id as usize - 1).copied()).collect();
        // Where there are gateways, clients use those; else the replicas themselves.
        let gateways = match (edges.is_empty(), &scenario.recovery) {
            (true, _) => replicas.to_vec(),
            // Where recovery is measured, a replica that goes takes no gateway with it.
            (false, Some(_)) => edges.to_vec(),
            (false, None) => edges.iter().chain(replicas.first()).copied().collect(),
        };
        Ok(Cluster {
            machines,
            replicas: replicas.to_vec(),
            gateways,
            keys,
            keys_per_tenant: scenario.workload.keys_per_tenant,
            edges: edges.to_vec(),
            apart,
            caches: caches.to_vec(),
            regions: of_machines,
            witness: regions.and_then(|regions| regions.cluster.witness.clone()).unwrap_or_default(),
            primary: Mutex::new(regions.map_or(String::new(), |regions| regions.cluster.primary.clone())),
            operator,
        })
    }

    /// All machines but the clients'.
    pub fn nodes(&self) -> impl Iterator<Item = NodeIndex> {
        self.replicas.iter().chain(&self.edges).chain(&self.caches).copied()
    }

    fn admin(&self, node: NodeIndex) -> std::io::Result<AdminServiceClient<Channel>> {
        let channel = sim::net::connect(&self.machines.operators_way(node))?;
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

    /// All machines of a region.
    pub fn in_region(&self, region: &str) -> Vec<NodeIndex> {
        self.nodes().filter(|node| self.regions.get(node).is_some_and(|of| of == region)).collect()
    }

    /// Whether there are several regions.
    pub fn has_regions(&self) -> bool {
        !self.regions.is_empty()
    }

    pub fn witness(&self) -> Vec<NodeIndex> {
        self.in_region(&self.witness)
    }

    /// The replicas that keep shards.
    pub fn keepers(&self) -> Vec<NodeIndex> {
        let witness = self.witness();
        self.replicas.iter().copied().filter(|node| !witness.contains(node)).collect()
    }

    /// The region that writes, and the other one that serves, by the cluster map, or as they were when that was last read.
    pub async fn primary_and_secondary(&self) -> (String, String) {
        let read = self.map().await.and_then(|map| map.regions).map(|regions| regions.primary);
        let mut held = self.primary.lock().unwrap_or_else(|p| p.into_inner());
        *held = read.unwrap_or_else(|| held.clone());
        let other = self.regions.values().find(|region| **region != *held && **region != self.witness);
        (held.clone(), other.cloned().unwrap_or_default())
    }

    /// The replica that leads the control group, by its own account.
    pub async fn controller(&self) -> Option<NodeIndex> {
        for (at, &node) in
            self.replicas.iter().enumerate().filter(|(_, node)| self.machines.is_running(**node))
        {
            let Ok(mut client) = self.admin(node) else { continue };
            let limit = Duration::from_secs(1);
            let request = self.request(v1::MembersRequest {}, limit)?;
            let Ok(Ok(answer)) = sim::time::timeout(limit, client.members(request)).await else { continue };
            let own = (at + 1).to_string();
            let leads = |m: &v1::Member| m.group == "control" && m.leader && m.node == own;
            if answer.into_inner().members.iter().any(leads) {
                return Some(node);
            }
        }
        None
    }

    /// The replicas, those first that run where a whole region may not.
    fn askable(&self) -> Vec<NodeIndex> {
        let mut all = self.replicas.clone();
        if self.has_regions() {
            all.sort_by_key(|node| !self.machines.is_running(*node));
        }
        all
    }

    /// The cluster map; `None` if no node reads it soon.
    pub async fn map(&self) -> Option<v1::ClusterResponse> {
        for node in self.askable() {
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
        for node in self.askable() {
            let Ok(mut client) = self.admin(node) else { continue };
            let change = v1::ChangeClusterRequest { change: Some(wish.clone()) };
            let Some(request) = self.request(change, limit) else { return false };
            if let Ok(Ok(_)) = sim::time::timeout(limit, client.change_cluster(request)).await {
                return true;
            }
        }
        false
    }

    /// Has the control group begin anew with the nodes that answer; whether it did.
    pub async fn recover(&self, to: &str) -> bool {
        let limit = Duration::from_secs(60);
        for node in self.askable() {
            let Ok(mut client) = self.admin(node) else { continue };
            let ask = v1::RecoverControlRequest { to: to.into(), ..Default::default() };
            let Some(request) = self.request(ask, limit) else { return false };
            match sim::time::timeout(limit, client.recover_control(request)).await {
                Ok(Ok(_)) => return true,
                Ok(Err(status)) => self.machines.note(node, Level::Warn, status.message()),
                Err(_) => self.machines.note(node, Level::Warn, "the recovery did not end"),
            }
        }
        false
    }

    /// Has what was lost with a region written again; what became of each command, if a gateway went through all of them.
    pub async fn resubmit(&self) -> Option<Vec<v1::Resubmitted>> {
        let limit = Duration::from_secs(30);
        for gateway in &self.gateways {
            let Ok(mut client) = self.admin(*gateway) else { continue };
            let request = self.request(v1::ResubmitRequest::default(), limit)?;
            let all = async {
                let mut feed = client.resubmit(request).await?.into_inner();
                let mut told = vec![];
                while let Some(one) = feed.message().await? {
                    told.push(one);
                }
                Ok::<_, tonic::Status>(told)
            };
            match sim::time::timeout(limit, all).await {
                Ok(Ok(told)) => return Some(told),
                Ok(Err(status)) => self.machines.note(*gateway, Level::Warn, status.message()),
                Err(_) => self.machines.note(*gateway, Level::Warn, "the re-submission did not end"),
            }
        }
        None
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
            let policy = Role::Ledger.policy().replicas;
            let members = match self.has_regions() {
                true => self.keepers().len(),
                false => self.replicas.len().min(policy),
            };
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
        self.machines.note(node, Level::Info, "is told to stop");
        self.machines.tell_to_stop(node);
        let until = self.machines.now() + limit;
        while self.machines.is_running(node) && self.machines.now() < until {
            sim::time::sleep(Duration::from_millis(10)).await;
        }
        !self.machines.is_running(node)
    }

    /// The address by which the cluster map knows a node.
    pub fn addr(&self, node: NodeIndex) -> String {
        format!("{}:{PORT}", self.machines.name(node))
    }
}
