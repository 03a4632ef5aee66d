//! Scenarios as data: topology, workload, fault plan and promises, in TOML.

use crate::operation::{CLIENTS_MAX, Operation};
use nodes::control::regions::{RegionsConfig, Step};
use nodes::roles::{Role, Roles};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The scenarios that ship with Loci, by name.
pub const SHIPPED: [(&str, &str); 18] = [
    ("swarm", include_str!("../files/swarm.toml")),
    ("storm", include_str!("../files/storm.toml")),
    ("steady", include_str!("../files/steady.toml")),
    ("leader-power-loss", include_str!("../files/leader-power-loss.toml")),
    ("all-nodes-power-loss", include_str!("../files/all-nodes-power-loss.toml")),
    ("partition-leader", include_str!("../files/partition-leader.toml")),
    ("clock-drift", include_str!("../files/clock-drift.toml")),
    ("resharding", include_str!("../files/resharding.toml")),
    ("pinning", include_str!("../files/pinning.toml")),
    ("nodes-come-and-go", include_str!("../files/nodes-come-and-go.toml")),
    ("node-lost", include_str!("../files/node-lost.toml")),
    ("empty-disk", include_str!("../files/empty-disk.toml")),
    ("untold-disk", include_str!("../files/untold-disk.toml")),
    ("rotten-log", include_str!("../files/rotten-log.toml")),
    ("handed-back", include_str!("../files/handed-back.toml")),
    ("deposed-leader", include_str!("../files/deposed-leader.toml")),
    ("views-apart", include_str!("../files/views-apart.toml")),
    ("region-loss", include_str!("../files/region-loss.toml")),
];

/// The rows of the chaos table, by name: scenarios that measure recovery. A row more is a file more.
pub const CHAOS: [(&str, &str); 17] = [
    ("vector-node-failure", include_str!("../files/chaos/vector-node-failure.toml")),
    ("graph-node-failure", include_str!("../files/chaos/graph-node-failure.toml")),
    ("records-node-failure", include_str!("../files/chaos/records-node-failure.toml")),
    ("cache-node-failure", include_str!("../files/chaos/cache-node-failure.toml")),
    ("api-node-crash", include_str!("../files/chaos/api-node-crash.toml")),
    ("ledger-leader-loss", include_str!("../files/chaos/ledger-leader-loss.toml")),
    ("partition-two-way", include_str!("../files/chaos/partition-two-way.toml")),
    ("partition-one-way", include_str!("../files/chaos/partition-one-way.toml")),
    ("silent-leader", include_str!("../files/chaos/silent-leader.toml")),
    ("silent-api-node", include_str!("../files/chaos/silent-api-node.toml")),
    ("slow-disk", include_str!("../files/chaos/slow-disk.toml")),
    ("full-disk", include_str!("../files/chaos/full-disk.toml")),
    ("calendar-step", include_str!("../files/chaos/calendar-step.toml")),
    ("rolling-restart", include_str!("../files/chaos/rolling-restart.toml")),
    ("spot-reclaim", include_str!("../files/chaos/spot-reclaim.toml")),
    ("full-region-failure", include_str!("../files/chaos/full-region-failure.toml")),
    (
        "full-region-failure-short-windows",
        include_str!("../files/chaos/full-region-failure-short-windows.toml"),
    ),
];

/// Rows of the chaos table in half a minute or a little more, without what only modelled machines can suffer: real processes play them too.
pub const SHORT: [(&str, &str); 13] = [
    ("short/vector-node-failure", include_str!("../files/short/vector-node-failure.toml")),
    ("short/graph-node-failure", include_str!("../files/short/graph-node-failure.toml")),
    ("short/records-node-failure", include_str!("../files/short/records-node-failure.toml")),
    ("short/cache-node-failure", include_str!("../files/short/cache-node-failure.toml")),
    ("short/api-node-crash", include_str!("../files/short/api-node-crash.toml")),
    ("short/ledger-leader-loss", include_str!("../files/short/ledger-leader-loss.toml")),
    ("short/partition-two-way", include_str!("../files/short/partition-two-way.toml")),
    ("short/partition-one-way", include_str!("../files/short/partition-one-way.toml")),
    ("short/silent-leader", include_str!("../files/short/silent-leader.toml")),
    ("short/silent-api-node", include_str!("../files/short/silent-api-node.toml")),
    ("short/rolling-restart", include_str!("../files/short/rolling-restart.toml")),
    ("short/spot-reclaim", include_str!("../files/short/spot-reclaim.toml")),
    ("short/full-region-failure", include_str!("../files/short/full-region-failure.toml")),
];

/// What is absent here is drawn from the seed ([`crate::settle`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub about: String,
    /// The seed that it was settled with: the default when it is run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Virtual seconds of load; faults fall into it.
    pub workload_s: u64,
    /// One replica's disk is bad as well, in its own ways and at its own times.
    #[serde(default = "yes")]
    pub bad_disk: bool,
    /// Each seed draws its own topology, load, and kinds of faults out of those that may be generated.
    #[serde(default, skip_serializing_if = "is_default")]
    pub swarm: bool,
    /// What the clients do; where absent, drawn by `workload`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations: Option<Vec<Operation>>,
    pub topology: Topology,
    pub workload: Workload,
    pub promises: Promises,
    #[serde(default)]
    pub enough: Enough,
    /// What an operator does meanwhile, one after the other, each when the one before it is done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    #[serde(default)]
    pub faults: Faults,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draw: Option<Draw>,
    /// How long the clients feel the first fault is measured. No `buggify` site is on then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
}

/// A row of the chaos table, and the machines that it is measured on: so slow that a load that can be simulated makes them half busy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovery {
    /// What the requirements ("seed") state, in virtual seconds, where they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed_s: Option<f64>,
    /// What Loci wants to keep in 99 of 100 runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aim_s: Option<f64>,
    /// From here to the first fault operations show how long they take on a good day.
    pub quiet_from_s: u64,
    /// Work takes so many times as long as on the machine of the benches.
    pub cpu_slowdown: u32,
    /// What a disk reads or writes in a second.
    pub disk_bytes_per_s: u64,
}

/// A change of the cluster: one of them, or a number of shards beside a pin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Not before then.
    pub at_s: u64,
    /// How many shards there are to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<u32>,
    /// The number of a node that is taken in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join: Option<u64>,
    /// The number of a node whose replicas go to others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<u64>,
    /// The number of a tenant that is pinned, and the shard that it is pinned to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<(usize, u32)>,
    /// The number of a tenant that is pinned no longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpin: Option<usize>,
    /// The region that is to be the primary, reachable or not where the present one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fail_over: Option<String>,
    /// The region that is to be the primary again, without loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fail_back: Option<String>,
    /// The control group begins anew with the nodes that answer, and this region goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recover: Option<String>,
    /// What was lost with a region, and has come back with its disks, is written again.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resubmit: bool,
    /// Nothing is done, but waited for: that the cluster has given a node up, and its replicas to others.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lost: bool,
}

/// Less than this proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enough {
    /// Acknowledged writes.
    pub acked: usize,
    pub virtual_s: f64,
    /// Seconds in which the writes that were lost with a region had been acknowledged.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lost_s: f64,
}

impl Default for Enough {
    fn default() -> Enough {
        Enough { acked: 500, virtual_s: 60.0, lost_s: 0.0 }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Nodes with replicas, named n1, n2, … They have all roles, but for what `roles` says.
    pub replicas: usize,
    /// Nodes with the edge's roles only, named g1, g2, …
    #[serde(default)]
    pub gateways: usize,
    /// Nodes that do nothing but cache, named c1, c2, …; their numbers follow the replicas', and they are joined by `changes`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub caches: usize,
    /// Shards of the new cluster.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub shards: u32,
    /// After so many seconds of silence a node is lost: its replicas go to others. Absent: as production has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_after_s: Option<u64>,
    /// Of the replicas, the last so many are not among the cluster's first nodes; they can be joined later.
    #[serde(default, skip_serializing_if = "is_default")]
    pub spares: usize,
    /// Replicas that have some roles only, beside the edge's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<NodeRoles>,
    /// Share of messages that must be retransmitted.
    #[serde(default)]
    pub loss: f64,
    /// The regions that the replicas are in, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<Regions>,
}

/// Regions, and the links between them; clients are near to all of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Regions {
    /// As the nodes' own files have it.
    pub cluster: RegionsConfig,
    /// Numbers of gateways, by region.
    pub gateways: BTreeMap<String, BTreeSet<u64>>,
    /// One way from one region to another, beside what [`Draw`] adds.
    pub latency_ms: u64,
    /// Mean of what is added to it, exponentially distributed.
    pub jitter_ms: u64,
    #[serde(default)]
    pub loss: f64,
    /// Bytes per second that a pair of machines in two regions exchanges, each way.
    #[serde(default = "fast")]
    pub bytes_per_s: u64,
}

/// What a link carries that nothing narrows, in bytes a second.
pub fn fast() -> u64 {
    125_000_000
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRoles {
    /// Numbers of replicas, from 1 on.
    pub nodes: Vec<u64>,
    pub roles: Roles,
}

impl Topology {
    /// The region of a machine, by its name: n1, g1, …; empty where there is one.
    pub fn region_of(&self, machine: &str) -> &str {
        let Some(regions) = &self.regions else { return "" };
        let numbered = |of: &str| machine.strip_prefix(of).and_then(|number| number.parse::<u64>().ok());
        let (node, gateway) = (numbered("n"), numbered("g"));
        let nodes = regions.cluster.members.iter().chain(&regions.gateways);
        let of_nodes = regions.cluster.members.len();
        let mut found = nodes.enumerate().filter(|(at, (_, numbers))| {
            let wanted = if *at < of_nodes { node } else { gateway };
            wanted.is_some_and(|number| numbers.contains(&number))
        });
        found.next().map_or("", |(_, (name, _))| name)
    }

    /// All machines but the clients'.
    pub fn machines(&self) -> usize {
        self.replicas + self.gateways + self.caches
    }

    /// What a node does, by its number.
    pub fn roles_of(&self, node: u64) -> Roles {
        if node > self.replicas as u64 {
            return Roles::from([Role::Cache]);
        }
        let of = self.roles.iter().find(|of| of.nodes.contains(&node));
        of.map_or_else(nodes::roles::all, |of| of.roles.clone())
    }

    /// Numbers of the replicas that do not vote.
    pub fn apart(&self) -> Vec<u64> {
        (1..=self.replicas as u64).filter(|node| !self.roles_of(*node).contains(&Role::Ledger)).collect()
    }
}

/// Limits shrunk so that runs cross them, machines that differ, and the `buggify` sites that are on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draw {
    /// One way, between any two machines.
    pub latency_us: u64,
    /// Old months keep product codes alone, from so many vectors on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product_rows_min: Option<u64>,
    pub buggify: Vec<String>,
    /// Replicas first, then gateways, then caches.
    pub nodes: Vec<NodeDraw>,
}

impl Draw {
    /// The usual one, for `nodes` nodes.
    pub fn usual(nodes: usize) -> Draw {
        Draw {
            latency_us: 200,
            product_rows_min: None,
            buggify: vec![],
            nodes: vec![NodeDraw::default(); nodes],
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeDraw {
    pub checkpoint_entries: u64,
    pub entries_kept: u64,
    pub segment_bytes_max: u64,
    pub base_bytes_min: u64,
    pub vector_buffer_bytes: u64,
    pub graph_rows_min: u64,
    /// What an fsync takes.
    pub sync_us: u64,
    /// How the machine's clocks differ from true time.
    pub rate_ppm: i64,
    pub offset_ms: u64,
    pub calendar_ms: i64,
}

impl Default for NodeDraw {
    fn default() -> NodeDraw {
        NodeDraw {
            checkpoint_entries: 100,
            entries_kept: 20,
            segment_bytes_max: 100_000,
            base_bytes_min: 50_000,
            vector_buffer_bytes: 100_000,
            graph_rows_min: 100,
            sync_us: 1000,
            rate_ppm: 0,
            offset_ms: 0,
            calendar_ms: 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    pub clients: usize,
    pub tenants: usize,
    /// Ids that the clients of one tenant contend for.
    pub keys_per_tenant: u64,
    /// 1: all alike; the higher, the more the first ones are asked for.
    pub key_skew: f64,
    /// Mean pause of a client between two operations, exponentially distributed.
    pub think_ms: u64,
    /// Share of operations that are strong reads; the rest keep their proportions.
    #[serde(default = "strong_reads_default")]
    pub strong_reads: f64,
    /// Share of operations that are searches and walks, half of them each, beside those among the rest.
    #[serde(default, skip_serializing_if = "is_default")]
    pub of_views: f64,
    /// Share of operations that erase a person of the client's tenant, whose is every fourth memory then.
    #[serde(default, skip_serializing_if = "is_default")]
    pub erasures: f64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> u32 {
    1
}

fn is_one(value: &u32) -> bool {
    *value == 1
}

fn yes() -> bool {
    true
}

fn strong_reads_default() -> f64 {
    0.2
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Faults {
    /// A plan drawn from the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generate: Option<Generate>,
    /// Faults written by hand, one after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub list: Vec<Fault>,
    /// A bad disk's, beside the others; where absent, drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Vec<Fault>>,
}

/// Ranges are in virtual seconds, both ends included.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    pub kinds: Vec<FaultKind>,
    pub target: Target,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Target>,
    pub first_s: [u64; 2],
    pub every_s: [u64; 2],
    pub lasts_s: [u64; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The machine loses power; it boots when the fault ends.
    PowerOff,
    /// The process dies, its machine lives; it is started when the fault ends.
    Crash,
    /// Every task of the node stops for a while.
    Pause,
    /// Cut from the other replicas: both ways, only towards it, only from it.
    Partition,
    PartitionIn,
    PartitionOut,
    /// Its links to the other replicas carry only `bytes_per_s`, each way of each pair.
    Narrow,
    /// The clock runs `rate_ppm` fast and the calendar steps; the rate is true again when the fault ends.
    Clock,
    /// A bit of what is stored flips: in the log, the views or the bases.
    BitRot,
    /// So many bits flip in views and bases that neither can be mended from the other.
    Ruin,
    /// A sector cannot be read any more.
    LostSector,
    /// Some writes to the log and the bases land elsewhere.
    Misdirected,
    /// The next sync fails.
    SyncFailure,
    /// No file can grow.
    FullDisk,
    /// Every operation takes long.
    SlowDisk,
    /// No operation returns; the process is restarted when the fault ends.
    StuckDisk,
    /// The process runs, but nothing that it sends arrives anywhere, and nothing reaches it.
    Silence,
    /// The calendar steps by `step_ms`, and back when the fault ends; the monotonic clock does not notice.
    CalendarStep,
    /// The nodes are told to stop, one after the other; each is started again after that long, and the next one waits for it to have caught up.
    RollingRestart,
    /// A spot instance goes: the node is told, has two minutes to stop in good order, and is there again on an empty machine when
    /// the fault ends.
    Reclaim,
    /// The machine is gone at once, with its disk; an empty one is there when the fault ends, and was told whose place it takes.
    Replace,
    /// The same, and nobody told it.
    EmptyDisk,
}

impl FaultKind {
    /// Whether it has an end of its own, or looks for one itself: no step of a change of the primary region ends it.
    fn lasts_as_it_does(self) -> bool {
        matches!(
            self,
            FaultKind::Misdirected
                | FaultKind::SyncFailure
                | FaultKind::FullDisk
                | FaultKind::SlowDisk
                | FaultKind::StuckDisk
                | FaultKind::RollingRestart
                | FaultKind::Reclaim
        )
    }

    /// Whether only a model can suffer it: no real machine's power, disk, clock or bandwidth is anybody's to take.
    pub fn is_modelled(self) -> bool {
        match self {
            FaultKind::Crash
            | FaultKind::Pause
            | FaultKind::Partition
            | FaultKind::PartitionIn
            | FaultKind::PartitionOut
            | FaultKind::Silence
            | FaultKind::RollingRestart
            | FaultKind::Reclaim
            | FaultKind::Replace
            | FaultKind::EmptyDisk => false,
            FaultKind::PowerOff
            | FaultKind::Narrow
            | FaultKind::Clock
            | FaultKind::CalendarStep
            | FaultKind::BitRot
            | FaultKind::Ruin
            | FaultKind::LostSector
            | FaultKind::Misdirected
            | FaultKind::SyncFailure
            | FaultKind::FullDisk
            | FaultKind::SlowDisk
            | FaultKind::StuckDisk => true,
        }
    }

    /// Whether it harms what is stored, or how it is stored; a loss of power takes only what was not synced.
    pub fn is_of_disks(self) -> bool {
        match self {
            FaultKind::PowerOff
            | FaultKind::Crash
            | FaultKind::Pause
            | FaultKind::Partition
            | FaultKind::PartitionIn
            | FaultKind::PartitionOut
            | FaultKind::Narrow
            | FaultKind::Clock
            | FaultKind::Silence
            | FaultKind::CalendarStep
            | FaultKind::RollingRestart => false,
            FaultKind::BitRot
            | FaultKind::Ruin
            | FaultKind::LostSector
            | FaultKind::Misdirected
            | FaultKind::SyncFailure
            | FaultKind::FullDisk
            | FaultKind::SlowDisk
            | FaultKind::StuckDisk
            | FaultKind::Reclaim
            | FaultKind::Replace
            | FaultKind::EmptyDisk => true,
        }
    }
}

/// A kind of fault in words.
pub fn words(kind: FaultKind) -> String {
    let mut words = String::new();
    for letter in format!("{kind:?}").chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Whoever leads when the fault begins.
    Leader,
    /// A replica that does not lead when the fault begins, drawn from the seed.
    Led,
    /// A replica drawn from the seed.
    Any,
    /// A replica that does not vote, drawn from the seed.
    Apart,
    All,
    /// A node with the edge's roles only, drawn from the seed.
    Gateway,
    /// A node that caches, drawn from the seed.
    Cache,
    /// Any node, drawn from the seed.
    Machine,
    /// All nodes: replicas first, then gateways, then caches.
    Everyone,
    /// One of leader, any and all, drawn for each fault: only for those that are generated.
    Drawn,
    /// All machines of the region that writes, when the fault begins.
    Primary,
    /// All machines of the other region that serves.
    Secondary,
    Witness,
    /// Whoever leads the control group.
    Controller,
    /// A replica in the region that serves and does not write, drawn from the seed.
    Follower,
    /// A replica in the region that writes, drawn from the seed.
    Voter,
    /// The replica that was chosen to begin the first shard's epoch.
    Chosen,
}

impl Target {
    /// Whether there must be several regions for it.
    pub fn is_of_regions(self) -> bool {
        matches!(
            self,
            Target::Primary
                | Target::Secondary
                | Target::Witness
                | Target::Controller
                | Target::Follower
                | Target::Chosen
                | Target::Voter
        )
    }
}

/// One timed fault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub at_ms: u64,
    pub lasts_ms: u64,
    pub kind: FaultKind,
    pub target: Target,
    /// Of a partition or narrow links: from whom, or to whom; all other replicas if nobody is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Target>,
    /// It begins when a change of the primary region is at this step, and not before its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_step: Option<Step>,
    /// It lasts until a change of the primary region is at this step, and not less than `lasts_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_step: Option<Step>,
    /// Those after it begin while it lasts.
    #[serde(default, skip_serializing_if = "is_default")]
    pub beside: bool,
    /// Chooses among `any`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pick: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    pub rate_ppm: i64,
    #[serde(default, skip_serializing_if = "is_default")]
    pub step_ms: i64,
    #[serde(default, skip_serializing_if = "is_default")]
    pub bytes_per_s: u64,
    /// What bit rot and lost sectors harm: so many places, in files under this directory; if not said, a few of all that is stored.
    #[serde(default, skip_serializing_if = "is_default")]
    pub places: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    pub within: String,
}

impl Fault {
    /// One of its own, that nothing else is said of.
    pub fn new(kind: FaultKind, target: Target, (at_ms, lasts_ms): (u64, u64)) -> Fault {
        let (from, at_step, until_step) = Default::default();
        let (beside, pick, rate_ppm, step_ms, bytes_per_s, places, within) = Default::default();
        Fault {
            at_ms,
            lasts_ms,
            kind,
            target,
            from,
            at_step,
            until_step,
            beside,
            pick,
            rate_ppm,
            step_ms,
            bytes_per_s,
            places,
            within,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promises {
    /// After the last fault, every replica must agree within this many virtual seconds.
    pub converge_s: u64,
    /// So often another region becomes the primary; absent: as often as it happens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region_changes: Option<usize>,
    /// What is lost with a region was acknowledged within so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_within_s: Option<f64>,
}

/// A shipped scenario by name, or one read from a file that ends in `.toml`.
pub fn find(name: &str) -> Result<Scenario, String> {
    let text = match SHIPPED.iter().chain(&CHAOS).chain(&SHORT).find(|(n, _)| *n == name) {
        Some((_, text)) => text.to_string(),
        None if name.ends_with(".toml") => {
            std::fs::read_to_string(name).map_err(|e| format!("{name}: {e}"))?
        }
        None => {
            let known: Vec<&str> = SHIPPED.iter().chain(&CHAOS).chain(&SHORT).map(|(n, _)| *n).collect();
            return Err(format!(
                "there is no scenario '{name}'; there are {}, or give a .toml file",
                known.join(", ")
            ));
        }
    };
    let scenario: Scenario = toml::from_str(&text).map_err(|e| format!("scenario {name}: {e}"))?;
    scenario.check().map_err(|e| format!("scenario {name}: {e}"))?;
    Ok(scenario)
}

impl Scenario {
    /// What a file may say that no run can do.
    pub fn check(&self) -> Result<(), String> {
        let Topology { replicas, gateways, loss, shards, spares, .. } = self.topology;
        if !(1..=20).contains(&replicas) || gateways > 50 || !(0.0..0.5).contains(&loss) {
            return Err("topology: 1 to 20 replicas, at most 50 gateways, a loss below 0.5".into());
        }
        if !(1..=64).contains(&shards) || spares >= replicas {
            return Err("topology: 1 to 64 shards, and fewer spares than replicas".into());
        }
        let apart = self.topology.apart();
        let unknown = |node: &u64| !(1..=replicas as u64).contains(node);
        if self.topology.roles.iter().any(|of| of.roles.is_empty() || of.nodes.iter().any(unknown))
            || apart.iter().any(|node| *node <= (replicas - spares) as u64)
        {
            return Err(
                "topology.roles: numbers of replicas, and roles; whoever does not vote is a spare".into()
            );
        }
        let one = |change: &Change| {
            let slots = change.shards.is_some() || change.pin.is_some() != change.unpin.is_some();
            let both = change.pin.is_some() && change.unpin.is_some();
            let regions = (change.fail_over.is_some(), change.fail_back.is_some());
            let nodes = [change.join.is_some(), change.drain.is_some(), change.lost, change.resubmit];
            let nodes =
                nodes.into_iter().chain([regions.0, regions.1, change.recover.is_some()]).collect::<Vec<_>>();
            !both && slots as usize + nodes.iter().filter(|is| **is).count() == 1
        };
        let tenant = |change: &Change| {
            let tenants = [change.pin.map(|(tenant, _)| tenant), change.unpin];
            tenants.into_iter().flatten().all(|tenant| tenant < self.workload.tenants)
        };
        let node = |change: &Change| {
            let numbered = 1..=(replicas + self.topology.caches) as u64;
            change.join.or(change.drain).is_none_or(|id| numbered.contains(&id))
        };
        if !self.changes.iter().all(|change| {
            one(change)
                && node(change)
                && tenant(change)
                && change.shards.is_none_or(|n| (1..=64).contains(&n))
        }) {
            return Err(
                "changes: each is one of join, drain (the number of a node), lost (true), fail_over, fail_back, recover (a region), resubmit (true), and shards (1 to 64), with a pin ([tenant, shard]) or an unpin or \
                 those alone"
                    .into(),
            );
        }
        let load = &self.workload;
        if !(1..=CLIENTS_MAX).contains(&load.clients)
            || load.tenants == 0
            || load.keys_per_tenant == 0
            || load.think_ms == 0
        {
            return Err(format!(
                "workload: 1 to {CLIENTS_MAX} clients, and at least one tenant, one key and 1 ms"
            ));
        }
        if !(0.0..1.0).contains(&load.strong_reads)
            || !(0.0..1.0).contains(&load.of_views)
            || !(0.01..100.0).contains(&load.key_skew)
        {
            return Err("workload: strong_reads and of_views below 1, key_skew 0.01 to 100".into());
        }
        let mut operations = self.operations.iter().flatten();
        if let Some(operation) = operations.find(|o| o.client >= load.clients) {
            return Err(format!("'{operation}': there are {} clients", load.clients));
        }
        let machines = self.topology.machines();
        if let Some(draw) = self.draw.as_ref().filter(|d| d.nodes.len() < machines) {
            return Err(format!("draw.nodes has {} of {machines} nodes", draw.nodes.len()));
        }
        let targets = self.faults.list.iter().map(|fault| fault.target);
        let targets: Vec<Target> = targets.chain(self.faults.generate.iter().map(|g| g.target)).collect();
        if gateways == 0 && targets.contains(&Target::Gateway)
            || apart.is_empty() && targets.contains(&Target::Apart)
            || self.topology.caches == 0 && targets.contains(&Target::Cache)
        {
            return Err("faults: there is no gateway, no replica apart or no cache to be a target".into());
        }
        match &self.topology.regions {
            Some(regions) => {
                let nodes: BTreeSet<u64> = (1..=(replicas - spares) as u64).collect();
                regions.cluster.check(&nodes).map_err(|e| format!("topology.regions: {e}"))?;
                if regions.bytes_per_s == 0 || !(0.0..0.5).contains(&regions.loss) {
                    return Err("topology.regions: bytes_per_s of 1 at least, a loss below 0.5".into());
                }
            }
            None if targets.iter().any(|target| target.is_of_regions())
                || self.faults.list.iter().any(|f| f.at_step.is_some() || f.until_step.is_some()) =>
            {
                return Err("faults: there is one region".into());
            }
            None => {}
        }
        if self.recovery.as_ref().is_some_and(|r| r.cpu_slowdown == 0 || r.disk_bytes_per_s == 0) {
            return Err("recovery: cpu_slowdown and disk_bytes_per_s are at least 1".into());
        }
        let written = self.faults.list.iter().chain(self.faults.disk.iter().flatten());
        if written.clone().any(|fault| fault.target == Target::Drawn) {
            return Err(
                "faults: a fault that is written down has its target; 'drawn' is for generated ones".into()
            );
        }
        let narrow = |fault: &Fault| fault.kind == FaultKind::Narrow;
        if written.clone().any(|fault| narrow(fault) != (fault.bytes_per_s > 0))
            || self.faults.generate.iter().any(|g| g.kinds.contains(&FaultKind::Narrow))
        {
            return Err(
                "faults: 'narrow' has bytes_per_s of 1 at least, no other kind has, and it is not generated"
                    .into(),
            );
        }
        let placed = |fault: &Fault| fault.places > 0 || !fault.within.is_empty();
        let of_places = |fault: &Fault| matches!(fault.kind, FaultKind::BitRot | FaultKind::LostSector);
        if written.clone().any(|fault| placed(fault) && !of_places(fault)) {
            return Err(
                "faults: only bit_rot and lost_sector have places, and a directory within which".into()
            );
        }
        if written.clone().any(|fault| fault.until_step.is_some() && fault.kind.lasts_as_it_does()) {
            return Err("faults: no step ends disk faults that last, a rolling restart or a reclaim".into());
        }
        if self.workload_s > 100_000 || self.faults.generate.as_ref().is_some_and(|g| g.kinds.is_empty()) {
            return Err("workload_s: at most 100,000; faults.generate: at least one kind".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_begins_or_ends_faults_only_where_there_are_regions() -> Result<(), String> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/files/regions/returns-promoting.toml");
        let scenario = find(file)?;
        assert_eq!(scenario.faults.list[0].until_step, Some(Step::Promoting));
        let mut full = scenario.clone();
        full.faults.list[0].kind = FaultKind::FullDisk;
        assert!(full.check().is_err_and(|why| why.contains("no step ends")));
        let mut alone = find("steady")?;
        alone.faults.list = vec![Fault::new(FaultKind::PowerOff, Target::Any, (14_000, 3000))];
        assert_eq!(alone.check(), Ok(()));
        alone.faults.list[0].until_step = Some(Step::Promoting);
        assert!(alone.check().is_err_and(|why| why.contains("one region")));
        let text = toml::to_string(&scenario).map_err(|e| e.to_string())?;
        assert!(toml::from_str::<Scenario>(&text.replace("promoting", "promted")).is_err());
        Ok(())
    }

    #[test]
    fn only_what_harms_places_says_where() -> Result<(), String> {
        let mut scenario = find("rotten-log")?;
        let rot = scenario.faults.list.iter().position(|fault| fault.kind == FaultKind::BitRot);
        let rot = rot.ok_or("nothing rots")?;
        for kind in [FaultKind::LostSector, FaultKind::BitRot] {
            scenario.faults.list[rot].kind = kind;
            assert_eq!(scenario.check(), Ok(()));
        }
        scenario.faults.list[rot].kind = FaultKind::Misdirected;
        assert!(scenario.check().is_err_and(|why| why.contains("places")));
        scenario.faults.list[rot].places = 0;
        assert!(scenario.check().is_err_and(|why| why.contains("places")), "it says within what");
        scenario.faults.list[rot].within.clear();
        assert_eq!(scenario.check(), Ok(()));
        Ok(())
    }

    #[test]
    fn narrow_links_say_how_narrow_and_nothing_else_does() -> Result<(), String> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/files/regions/saturated-link.toml");
        let scenario = find(file)?;
        let with = |kind, bytes_per_s| {
            let mut other = scenario.clone();
            other.faults.list[0].kind = kind;
            other.faults.list[0].bytes_per_s = bytes_per_s;
            other.check()
        };
        assert_eq!(with(FaultKind::Narrow, 1), Ok(()));
        assert_eq!(with(FaultKind::Partition, 0), Ok(()));
        for (kind, bytes_per_s) in [(FaultKind::Narrow, 0), (FaultKind::Partition, 1)] {
            assert!(with(kind, bytes_per_s).is_err_and(|why| why.contains("bytes_per_s")), "{kind:?}");
        }
        let mut generated = scenario.clone();
        let (target, from, first_s) = (Target::Any, None, [1, 2]);
        let kinds = vec![FaultKind::Narrow];
        generated.faults.generate =
            Some(Generate { kinds, target, from, first_s, every_s: [5, 9], lasts_s: [1, 2] });
        assert!(generated.check().is_err());
        Ok(())
    }
}
