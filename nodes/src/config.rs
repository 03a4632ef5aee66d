//! A node's configuration: one TOML file.
//!
//! ```toml
//! name = "n1"                     # unique in the cluster
//! listen = "127.0.0.1:7401"       # gRPC
//! http = "127.0.0.1:7501"         # status page; leave out for none
//! data = "./n1"                   # everything that the node stores
//! roles = ["gateway", "writer", "reader", "ledger", "records", "graph", "vector"]
//! cluster_secret = "…"            # the same on every node
//! id = 1                          # of a node with a ledger: its number in the cluster
//! shards = 1                      # of a new cluster; `loci cluster resize` changes it
//! advertise = "n1.example:7401"   # the address under which peers know the node, when it is not the one it listens on
//! public = "east.example:7401"    # the address at which callers reach its gateway, when it is not the one that peers use
//!
//! [replicas]                      # the nodes that keep the cluster map, and a new cluster's first ones: number = address
//! 1 = "127.0.0.1:7401"
//! 2 = "127.0.0.1:7402"
//! 3 = "127.0.0.1:7403"
//!
//! [regions]                       # of a new cluster with more than one; every node of [replicas] is in one of them
//! primary = "east"                # where writes go at first
//! witness = "north"               # votes, and keeps nothing
//! members = { east = [1, 2, 3], west = [4, 5, 6], north = [7, 8, 9] }
//!
//! [announce]                      # on every node of [replicas] the same: where to post what happens to incidents (control/announce.rs)
//! webhooks = ["http://127.0.0.1:9000/loci"]
//!
//! [via]                           # peers that this node reaches by another way, such as a tunnel's end: advertised = where to connect
//! "n2.example:7401" = "127.0.0.1:9002"
//! ```
//!
//! Roles come in two groups: those of the edge (gateway, writer, reader) live in one process; of those of the replica (ledger, records,
//! graph, vector: [`crate::roles`]) a process has any. It may have both groups. A node that caches has the role cache alone.

use crate::cache::CacheOptions;
use crate::control::announce::Webhook;
use crate::control::liveness::Patience;
use crate::control::map::{Gateway, SHARDS_MAX};
use crate::control::regions::RegionsConfig;
use crate::error::Error;
use crate::ledger::LedgerOptions;
use crate::roles::{self, Role, Roles};
use serde::{Deserialize, Serialize};
use sim::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use storage::ShardOptions;
use storage::vectors::VectorOptions;

pub const EDGE_ROLES: [&str; 3] = ["gateway", "writer", "reader"];

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    pub name: String,
    pub listen: String,
    /// The address under which peers know this node: the cluster map's, and [replicas]'. Not given: the one in [replicas], or `listen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// The address at which callers reach this node's gateway, when it is not the one that peers use: what the director answers with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    #[serde(default = "data_default")]
    pub data: String,
    #[serde(default = "all_roles")]
    pub roles: Vec<String>,
    pub cluster_secret: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// This machine takes the place of one whose disk is gone. Its replicas know that from the map and do not vote until their peers have given
    /// them everything; the control group's replica knows it if another one answers at the start, or as soon as one speaks of more than it has, or by this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejoin: bool,
    /// Of a new cluster; later the cluster map says it.
    #[serde(default = "one_shard")]
    pub shards: u32,
    /// The nodes of the control group, by number; where none is new, any one of them is enough. TOML keys are text.
    pub replicas: BTreeMap<String, String>,
    /// Where to connect to reach the peer of an address; to the address itself where nothing is said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub via: BTreeMap<String, String>,
    /// The regions of a new cluster; none: there is one, without a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<RegionsConfig>,
    /// The region that an edge without a place in the cluster map is in: it asks that region's replicas first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    #[serde(default, skip_serializing_if = "Announce::is_empty")]
    pub announce: Announce,
    #[serde(default)]
    pub tuning: Tuning,
}

/// Who hears of incidents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announce {
    /// Addresses that get a POST for each event, as http://host:port/path.
    pub webhooks: Vec<String>,
}

impl Announce {
    fn is_empty(&self) -> bool {
        self.webhooks.is_empty()
    }

    /// Each of them once.
    pub fn webhooks(&self) -> Result<Vec<Webhook>, Error> {
        let named: BTreeSet<&String> = self.webhooks.iter().collect();
        named.into_iter().map(|url| Webhook::parse(url)).collect()
    }
}

/// Times in milliseconds; the defaults suit one data centre.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tuning {
    pub heartbeat_ms: u64,
    pub election_min_ms: u64,
    pub election_max_ms: u64,
    pub checkpoint_entries: u64,
    pub entries_kept: u64,
    pub segment_bytes_max: u64,
    /// Bytes of log since the last base that a new one is worth at least.
    pub base_bytes_min: u64,
    pub access_flush_ms: u64,
    /// Vectors in memory, in bytes, at which they become segments.
    pub vector_buffer_bytes: usize,
    /// A scope with so many vectors in a month gets a graph.
    pub graph_rows_min: usize,
    /// Of months that ended so many days ago only product codes are kept in the vector view: a fifth of the bytes, and searches that read
    /// more from the records. Less than -31: of all months. Not given: of none.
    pub product_after_days: Option<i64>,
    /// Product codes are made for at least so many vectors of a dimension in a month.
    pub product_rows_min: usize,
    /// What a node with the role cache keeps in memory, in bytes, and for how long at most, in seconds.
    pub cache_bytes_max: u64,
    pub cache_ttl_s: u64,
    /// A node that has been silent for so long is called down in the cluster map, and given nothing more.
    pub node_down_after_ms: u64,
    /// One that has been silent for so long is lost: its replicas go to others. 0: never, until `loci cluster drain`.
    pub node_lost_after_s: u64,
}

impl Default for Tuning {
    fn default() -> Tuning {
        let (ledger, vectors, cache): (LedgerOptions, VectorOptions, CacheOptions) = Default::default();
        let patience = Patience::default();
        Tuning {
            heartbeat_ms: ledger.heartbeat.as_millis() as u64,
            election_min_ms: ledger.election_min.as_millis() as u64,
            election_max_ms: ledger.election_max.as_millis() as u64,
            checkpoint_entries: ledger.checkpoint_entries,
            entries_kept: ledger.entries_kept,
            segment_bytes_max: ledger.log.segment_bytes_max,
            base_bytes_min: ledger.base_bytes_min,
            access_flush_ms: 5000,
            vector_buffer_bytes: vectors.buffer_bytes_max,
            graph_rows_min: vectors.graph_rows_min,
            product_after_days: None,
            product_rows_min: vectors.product_rows_min,
            cache_bytes_max: cache.bytes_max,
            cache_ttl_s: cache.ttl.as_secs(),
            node_down_after_ms: patience.down_after.as_millis() as u64,
            node_lost_after_s: patience.lost_after.map_or(0, |after| after.as_secs()),
        }
    }
}

fn one_shard() -> u32 {
    1
}

fn data_default() -> String {
    "./loci-data".into()
}

/// The roles of a node that is not told otherwise: the edge's and the replica's.
pub fn all_roles() -> Vec<String> {
    EDGE_ROLES.into_iter().map(String::from).chain(roles::names(&roles::all())).collect()
}

impl NodeConfig {
    /// Reads and checks a configuration.
    pub fn parse(text: &str) -> Result<NodeConfig, Error> {
        let config: NodeConfig =
            toml::from_str(text).map_err(|e| Error::invalid("configuration", e.to_string()))?;
        let (voters, roles) = (config.voters()?, config.replica_roles());
        config.is_edge()?;
        if !roles.is_empty() {
            let id = config.id.filter(|id| *id > 0).ok_or_else(|| {
                Error::invalid("id", "a node that stands in the cluster map needs its number, from 1 on")
            })?;
            roles::check(&roles)?;
            if voters.contains_key(&id) && !roles.contains(&Role::Ledger) {
                let problem = format!(
                    "node {id} is listed in [replicas], whose nodes keep the cluster map, and lacks the role ledger"
                );
                return Err(Error::invalid("roles", problem));
            }
        }
        if let Some(advertise) = &config.advertise {
            let listed = config.id.and_then(|id| voters.get(&id)).filter(|listed| *listed != advertise);
            if let Some(listed) = listed {
                let problem =
                    format!("is {advertise}, but [replicas] lists this node as {listed}: give one address");
                return Err(Error::invalid("advertise", problem));
            }
            reachable("advertise", advertise)?;
        }
        config.announce.webhooks()?;
        if let Some(public) = &config.public {
            reachable("public", public)?;
            if !config.is_edge()? {
                return Err(Error::invalid("public", "is given, but this node has no gateway"));
            }
        }
        if let Some(regions) = &config.regions {
            regions.check(&voters.keys().copied().collect())?;
        }
        config.via.iter().try_for_each(|(peer, way)| {
            reachable("via", peer)?;
            reachable("via", way)
        })?;
        let there: Vec<&str> = EDGE_ROLES.into_iter().chain(Role::ALL.map(Role::name)).collect();
        if let Some(role) = config.roles.iter().find(|role| !there.contains(&role.as_str())) {
            return Err(Error::invalid(
                "roles",
                format!("there is no role '{role}'; there are {}", there.join(", ")),
            ));
        }
        if config.roles.is_empty() {
            return Err(Error::invalid("roles", "are empty: this node would do nothing"));
        }
        if !(1..=SHARDS_MAX).contains(&config.shards) {
            return Err(Error::invalid(
                "shards",
                format!("is {}; 1 to {SHARDS_MAX} are possible", config.shards),
            ));
        }
        if config.cluster_secret.len() < 16 {
            return Err(Error::invalid("cluster_secret", "needs at least 16 characters"));
        }
        Ok(config)
    }

    /// The address under which peers know this node.
    pub fn here(&self) -> Result<String, Error> {
        let mut voters = self.voters()?;
        let listed = self.id.and_then(|id| voters.remove(&id));
        Ok(self.advertise.clone().or(listed).unwrap_or_else(|| self.listen.clone()))
    }

    /// Where callers reach this node's gateway.
    pub fn gateway(&self) -> Result<Gateway, Error> {
        Ok(match (self.is_edge()?, &self.public) {
            (false, _) => Gateway::Nowhere,
            (true, None) => Gateway::Here,
            (true, Some(public)) => Gateway::At(public.clone()),
        })
    }

    pub fn voters(&self) -> Result<BTreeMap<u64, String>, Error> {
        let number = |text: &String| {
            text.parse().map_err(|_| Error::invalid("replicas", format!("'{text}' is no number")))
        };
        let voters: BTreeMap<u64, String> = self
            .replicas
            .iter()
            .map(|(id, addr)| Ok((number(id)?, addr.clone())))
            .collect::<Result<_, Error>>()?;
        if voters.is_empty() {
            return Err(Error::invalid("replicas", "are empty; list at least one"));
        }
        Ok(voters)
    }

    /// Whether the node has the edge's roles: all or none of them.
    pub fn is_edge(&self) -> Result<bool, Error> {
        match EDGE_ROLES.iter().filter(|role| self.roles.iter().any(|r| r == *role)).count() {
            0 => Ok(false),
            all if all == EDGE_ROLES.len() => Ok(true),
            _ => Err(Error::invalid(
                "roles",
                format!("{} live in one process: give all of them or none", EDGE_ROLES.join(", ")),
            )),
        }
    }

    /// Those of its roles that the cluster map knows.
    pub fn replica_roles(&self) -> Roles {
        self.roles.iter().filter_map(|name| Role::parse(name)).collect()
    }

    pub fn patience(&self) -> Patience {
        let lost_after = Duration::from_secs(self.tuning.node_lost_after_s);
        Patience {
            down_after: Duration::from_millis(self.tuning.node_down_after_ms),
            lost_after: (!lost_after.is_zero()).then_some(lost_after),
        }
    }

    pub fn cache_options(&self) -> CacheOptions {
        CacheOptions {
            bytes_max: self.tuning.cache_bytes_max,
            ttl: Duration::from_secs(self.tuning.cache_ttl_s),
        }
    }

    pub fn shard_options(&self) -> ShardOptions {
        let mut options = ShardOptions::default();
        options.vectors.buffer_bytes_max = self.tuning.vector_buffer_bytes;
        options.vectors.graph_rows_min = self.tuning.graph_rows_min.max(1);
        options.vectors.product_rows_min = self.tuning.product_rows_min.max(1);
        options
    }

    pub fn ledger_options(&self) -> LedgerOptions {
        let mut options = LedgerOptions {
            heartbeat: Duration::from_millis(self.tuning.heartbeat_ms),
            election_min: Duration::from_millis(self.tuning.election_min_ms),
            election_max: Duration::from_millis(self.tuning.election_max_ms),
            checkpoint_entries: self.tuning.checkpoint_entries,
            entries_kept: self.tuning.entries_kept,
            base_bytes_min: self.tuning.base_bytes_min,
            ..LedgerOptions::default()
        };
        options.log.segment_bytes_max = self.tuning.segment_bytes_max;
        options
    }
}

/// Whether somebody else can connect to an address.
fn reachable(field: &'static str, addr: &str) -> Result<(), Error> {
    let parts = addr.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    match parts {
        Some(("0.0.0.0" | "[::]", _)) => Err(Error::invalid(
            field,
            format!("'{addr}' is every address of this machine: give one that others can reach"),
        )),
        Some((host, 1..)) if !host.is_empty() => Ok(()),
        _ => Err(Error::invalid(field, format!("'{addr}' is no host:port"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "name = 'n1'\nlisten = 'a:1'\ncluster_secret = 'sixteen letters!'\nid = 1\n[replicas]\n1 = 'a:1'\n";

    #[test]
    fn a_small_file_is_enough() -> Result<(), Error> {
        let config = NodeConfig::parse(GOOD)?;
        assert!(config.is_edge()?);
        assert_eq!(config.replica_roles(), roles::all());
        assert_eq!(config.here()?, "a:1");
        Ok(())
    }

    #[test]
    fn a_node_is_known_by_the_address_that_it_advertises_or_is_listed_under_or_listens_on()
    -> Result<(), Error> {
        let listed = GOOD.replace("listen = 'a:1'", "listen = '0.0.0.0:9'");
        assert_eq!(NodeConfig::parse(&listed)?.here()?, "a:1");
        let joined = listed.replace("id = 1", "id = 7");
        assert_eq!(NodeConfig::parse(&joined)?.here()?, "0.0.0.0:9");
        let said = joined.replace("id = 7", "id = 7\nadvertise = 'h:9'\nvia = { 'a:1' = '127.0.0.1:5' }");
        assert_eq!(NodeConfig::parse(&said)?.here()?, "h:9");
        Ok(())
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (GOOD.replace("id = 1", ""), "id"),
            (GOOD.replace("id = 1", "id = 0"), "id"),
            (GOOD.replace("id = 1", "id = 1\nshards = 0"), "shards"),
            (GOOD.replace("id = 1", "id = 1\nroles = ['gateway']"), "roles"),
            (GOOD.replace("id = 1", "id = 1\nroles = []"), "roles"),
            (GOOD.replace("id = 1", "id = 9\nroles = ['cache', 'records']"), "roles"),
            (GOOD.replace("id = 1", "id = 1\nadvertise = 'b:1'"), "advertise"),
            (GOOD.replace("id = 1", "id = 7\nadvertise = '0.0.0.0:1'"), "advertise"),
            (GOOD.replace("id = 1", "id = 7\nadvertise = 'b'"), "advertise"),
            (GOOD.replace("id = 1", "id = 7\nadvertise = ':1'"), "advertise"),
            (GOOD.replace("id = 1", "id = 7\nvia = { 'b:1' = 'c:0' }"), "via"),
            (GOOD.replace("id = 1", "id = 1\npublic = 'b'"), "public"),
            (GOOD.replace("id = 1", "id = 1\nroles = ['ledger', 'records']\npublic = 'b:1'"), "public"),
            (
                GOOD.replace("[replicas]", "announce = { webhooks = ['https://h/'] }\n[replicas]"),
                "announce.webhooks",
            ),
            (GOOD.replace("sixteen letters!", "short"), "cluster_secret"),
            (GOOD.replace("name", "nmae"), "configuration"),
        ];
        for (text, named) in cases {
            match NodeConfig::parse(&text) {
                Err(Error::Invalid { field, .. }) => assert_eq!(field, named, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
