//! One run's result: one JSON line.

use crate::promises::Violation;
use crate::recovery::Measured;
use crate::spec::Fault;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Pass,
    /// A promise did not hold.
    Fail,
    /// It ran, but proved nothing.
    Vacuous,
    /// The run itself ended badly: panic, time or memory bound.
    Broken,
}

/// What kind of failure a run is, by which a sweep's exit code is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    #[default]
    Pass,
    Vacuous,
    /// Something that must happen did not in time (P12), or a node never answered again.
    Liveness,
    /// It took too long by the clock on the wall.
    Timeout,
    /// A panic, or more memory than a run may have.
    Crash,
    /// The same build and seed gave two results.
    Nondeterminism,
    /// Something happened that must not (every promise but P12).
    Safety,
}

impl Class {
    /// The exit code of a command whose worst run is this one.
    pub fn exit_code(self) -> u8 {
        match self {
            Class::Pass => 0,
            Class::Safety => 10,
            Class::Liveness => 11,
            Class::Crash => 12,
            Class::Timeout => 13,
            Class::Nondeterminism => 14,
            Class::Vacuous => 15,
        }
    }
}

/// A planned fault, and whether it took place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fired {
    pub fault: Fault,
    /// On whom.
    pub node: String,
    pub fired: bool,
    /// When it really began and was undone, in virtual seconds.
    #[serde(default)]
    pub began_s: f64,
    #[serde(default)]
    pub undone_s: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub scenario: String,
    pub seed: u64,
    pub build: String,
    pub verdict: Verdict,
    #[serde(default)]
    pub class: Class,
    /// The planted bug, and how often the run came upon it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mutant: Option<(String, u64)>,
    /// The run's identity: equal in every process with this build, scenario and seed.
    pub trace_hash: String,
    pub virtual_s: f64,
    pub wall_s: f64,
    /// Writes that were acknowledged, and how many of them are lost.
    pub acked: usize,
    pub lost: usize,
    /// Those that were lost with a region, as the cluster reported.
    #[serde(default)]
    pub lost_reported: usize,
    /// In how many virtual seconds those had been acknowledged.
    #[serde(default)]
    pub lost_s: f64,
    pub faults: Vec<Fired>,
    pub violations: Vec<Violation>,
    /// Reads and searches that were answered.
    pub reads: usize,
    /// Writes whose outcome stayed unknown.
    pub unknown: usize,
    /// The longest time without an acknowledged write while clients asked for them, in virtual seconds.
    pub write_gap_s: f64,
    /// From the end of the last fault until all replicas agreed, in virtual seconds.
    pub converge_s: Option<f64>,
    /// What one replica's bad disk was planned to do; it may have been without power just then.
    #[serde(default)]
    pub disk_faults: Vec<Fired>,
    /// Rare paths, and how often they were taken: what the disks did, and what the nodes did about it.
    #[serde(default)]
    pub probes: BTreeMap<String, u64>,
    /// How long the clients felt the first fault, where the scenario measures that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Measured>,
    /// Why the verdict is vacuous or broken.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

/// A report of nothing, to be filled in.
pub fn empty() -> Report {
    Report {
        scenario: String::new(),
        seed: 0,
        build: nodes::BUILD.into(),
        verdict: Verdict::Broken,
        class: Class::Crash,
        mutant: None,
        trace_hash: String::new(),
        virtual_s: 0.0,
        wall_s: 0.0,
        acked: 0,
        lost: 0,
        lost_reported: 0,
        lost_s: 0.0,
        faults: vec![],
        violations: vec![],
        reads: 0,
        unknown: 0,
        write_gap_s: 0.0,
        converge_s: None,
        disk_faults: vec![],
        probes: BTreeMap::new(),
        recovery: None,
        why: String::new(),
    }
}

/// What only damage makes necessary: a node whose disk was never bad must do none of it.
pub const MENDING: [&str; 11] = [
    "fact: healed from its second copy",
    "log: damage cut",
    "log: repaired from peers",
    "replica: started over",
    "vectors: a month healed",
    "vectors: a month made anew",
    "vectors: made anew at the start",
    "vectors: manifest unreadable",
    "vectors: a month was counted wrongly",
    "views: damage found while serving",
    "views: made anew",
];

/// Rare paths that a sweep should reach; what it did not is worth a question.
pub const PROBES: [&str; 57] = [
    "apply: a repeated write answered as before",
    "cache: answered",
    "cache: all of a shard forgotten",
    "control: a node is down",
    "control: a node is lost",
    "disk: power losses",
    "disk: unsynced writes lost",
    "disk: unsynced writes torn",
    "disk: directory entries lost",
    "disk: syncs failed",
    "disk: bits flipped",
    "disk: reads of lost sectors",
    "disk: writes misdirected",
    "disk: writes refused, full",
    "disk: operations stuck",
    "epoch: a message of another one refused",
    "epoch: a replica halted",
    "epoch: a replica returned",
    "epoch: a replica started over",
    "epoch: a returning replica's entries were taken away",
    "epoch: begun",
    "epoch: views made anew",
    "fact: healed from its second copy",
    "ledger: a deposed leader's entries cut",
    "ledger: a stream asked for entries that are purged",
    "ledger: a write's outcome unknown",
    "ledger: an append ran out of time",
    "ledger: an unheard leader gave way",
    "ledger: snapshot completed with what was here",
    "ledger: snapshot installed",
    "ledger: the right to write ran out under a write",
    "log: damage cut",
    "log: repaired from peers",
    "log: rewritten after a failed sync",
    "log: rewritten without its lost sectors",
    "log: torn tail cut",
    "read: asked elsewhere, this replica lags",
    "region: a change done",
    "region: a failover was withdrawn",
    "region: a shard promoted",
    "region: found silent",
    "replica: came back with an empty disk",
    "replica: forgot its term, and nobody vouches for a leader yet",
    "replica: forgot its term, and others vouched for a leader",
    "replica: learned that its group is not new",
    "replica: started over",
    "vectors: sealed",
    "vectors: merged",
    "vectors: compressed",
    "vectors: a month healed",
    "vectors: a month made anew",
    "vectors: made anew at the start",
    "vectors: manifest unreadable",
    "vectors: a month was counted wrongly",
    "views: a base could not be used",
    "views: damage found while serving",
    "views: made anew",
];
