//! Regions in the cluster map: which of them may write, and the change from one to another, as plain functions from one map to the next.
//!
//! ```text
//!                        validating ── the region answers again ──► withdrawn
//!  it is silent ──► …────────│ silent to every observer
//!  loci region failover ─────┤
//!  loci region failback ─────┴► granting ──► promoting ──► verifying ──► done
//!                               │            │             └ each shard takes a write and confirms a read
//!                               │            └ each shard: its replicas there halt, the one with most begins the epoch
//!                               └ the old lease runs out, the control group grants the next epoch
//! ```
//!
//! The change stands in the map with its step, so whoever leads the control group goes on with it ([`super::failover`]). The right itself is a record
//! of its own ([`super::grants`]): it changes with every second, the map does not.
//!
//! **Epochs.** A shard's epoch ends where the next begins: with the log of the replica that was chosen. What of it is there for certain is what that replica
//! had applied ([`End::certain`]), since only what a majority had on its disks was applied. Behind that come entries that it had, but that need not be those that
//! were acknowledged: the old leader may have died after it sent them, and another one put others in their place. So nothing acknowledged is lost at or before
//! `certain`, or behind the ceiling of the old lease; between the two it may be, until an old disk is read.

use super::lease::{Drift, HolderId, Settings};
use super::map::{ClusterMap, Learner, NodeId, ShardEntry, ShardId};
use crate::error::Error;
use crate::ledger::epochs::{Place, Report};
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use sim::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use storage::model::Position;

/// Changes that are remembered.
const PAST_MAX: usize = 32;
/// How far beyond what a region has written its ceiling is set.
const ROOM: u64 = 10_000;

/// The regions of a new cluster, as a node's file names them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionsConfig {
    pub primary: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<String>,
    /// The numbers of the nodes of `[replicas]`, by region.
    pub members: BTreeMap<String, BTreeSet<NodeId>>,
    #[serde(default)]
    pub policy: RegionPolicy,
}

/// How the primary region is given up.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegionPolicy {
    /// A right to write lasts so long after it was asked for, in milliseconds.
    pub lease_ms: u64,
    /// By how much a clock may run too fast or too slowly, in millionths.
    pub drift_ppm: u32,
    /// A region that has been silent for so long is taken for lost, in milliseconds …
    pub detect_ms: u64,
    /// … and after so long again is given up, if it is silent to every observer.
    pub validate_ms: u64,
    /// Without it only `loci region failover` gives a region up.
    pub automatic: bool,
    /// What may be lost, as time, in milliseconds: half of it is worth a warning.
    pub rpo_ms: u64,
    /// From half of that on writes are slowed down, and at all of it refused, until the other region has caught up: while it is gone for longer, nothing is
    /// written.
    pub throttle: bool,
}

impl Default for RegionPolicy {
    fn default() -> RegionPolicy {
        RegionPolicy {
            lease_ms: 6000,
            drift_ppm: 1000,
            detect_ms: 30_000,
            validate_ms: 30_000,
            automatic: true,
            rpo_ms: 300_000,
            throttle: false,
        }
    }
}

impl RegionPolicy {
    pub fn lease(&self) -> Settings {
        let drift = Drift { rate_ppm: self.drift_ppm, read_ms: 1 };
        Settings { span_ms: self.lease_ms, drift, room: ROOM }
    }

    /// Half of what may be lost, at which somebody should know.
    pub fn lag_warned_ms(&self) -> u64 {
        self.rpo_ms / 2
    }
}

impl RegionsConfig {
    /// What is wrong with it, for a cluster whose first nodes are these.
    pub fn check(&self, nodes: &BTreeSet<NodeId>) -> Result<(), Error> {
        let wrong = |problem: String| Err(Error::invalid("regions", problem));
        for name in [Some(&self.primary), self.witness.as_ref()].into_iter().flatten() {
            if self.members.get(name).is_none_or(BTreeSet::is_empty) {
                return wrong(format!("'{name}' has no members"));
            }
        }
        if self.witness.as_ref() == Some(&self.primary) {
            return wrong(format!("'{}' cannot both write and only vote", self.primary));
        }
        if self.serving().count() < 2 {
            return wrong("name two regions that serve, beside the witness".into());
        }
        let named: Vec<NodeId> = self.members.values().flatten().copied().collect();
        let all: BTreeSet<NodeId> = named.iter().copied().collect();
        if all.len() != named.len() || all != *nodes {
            return wrong("each node of [replicas] is in one region, and nobody else is".into());
        }
        if self.policy.lease_ms < 500 || self.policy.drift_ppm > 500_000 {
            return wrong("a lease_ms of 500 at least, a drift_ppm of 500000 at most".into());
        }
        Ok(())
    }

    fn serving(&self) -> impl Iterator<Item = &String> {
        self.members.keys().filter(|name| Some(*name) != self.witness.as_ref())
    }

    fn region_of(&self, node: NodeId) -> Option<&String> {
        self.members.iter().find(|(_, nodes)| nodes.contains(&node)).map(|(name, _)| name)
    }
}

/// The regions, as the map has them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Regions {
    pub primary: String,
    pub witness: Option<String>,
    /// All of them; the place of a region is its number as a holder of leases.
    pub names: Vec<String>,
    /// Of the primary's right to write.
    pub epoch: u64,
    pub policy: RegionPolicy,
    pub change: Option<RegionChange>,
    /// Changes that ended, oldest first.
    pub past: Vec<RegionChange>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Validating,
    Granting,
    Promoting,
    Verifying,
    Done,
    Withdrawn,
}

impl Step {
    pub fn name(self) -> &'static str {
        match self {
            Step::Validating => "validating",
            Step::Granting => "granting",
            Step::Promoting => "promoting",
            Step::Verifying => "verifying",
            Step::Done => "done",
            Step::Withdrawn => "withdrawn",
        }
    }
}

/// Another region becomes the primary.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegionChange {
    pub from: String,
    pub to: String,
    /// Both are well: nothing may be lost.
    pub planned: bool,
    pub accept_data_loss: bool,
    pub cause: String,
    /// The steps that were begun, and when by the calendar of who led the control group. The last one is the present one.
    pub steps: Vec<(Step, i64)>,
    /// The epoch that it granted; 0: none yet.
    pub epoch: u64,
    /// The epoch that was over with its first grant.
    #[serde(default)]
    pub ended: u64,
    /// How many epochs it leaves out, since they may have been granted by a control group that is lost ([`super::recover`]).
    #[serde(default)]
    pub leap: u64,
    /// Since when the old primary was silent, by the same calendar; 0: the change was ordered, and began with its first step.
    #[serde(default)]
    pub silent_since: i64,
    /// When it was known of every shard what was lost ([`super::incidents`]).
    #[serde(default)]
    pub accounted: Option<i64>,
    /// When every shard had all its replicas again, in every region that serves.
    #[serde(default)]
    pub whole: Option<i64>,
}

impl RegionChange {
    pub(super) fn new(from: &str, to: &str, cause: &str, first: (Step, i64)) -> RegionChange {
        RegionChange {
            from: from.into(),
            to: to.into(),
            planned: false,
            accept_data_loss: false,
            cause: cause.into(),
            steps: vec![first],
            epoch: 0,
            ended: 0,
            leap: 0,
            silent_since: 0,
            accounted: None,
            whole: None,
        }
    }

    pub fn step(&self) -> Step {
        self.steps.last().map_or(Step::Validating, |(step, _)| *step)
    }
}

/// How an epoch of a shard ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct End {
    /// Up to here all of it is in the next epoch.
    pub certain: u64,
    /// The last entry that the next epoch has of it.
    pub last: u64,
    /// Behind here nothing was acknowledged.
    pub ceiling: u64,
    /// Up to here it had what the epoch before it had: that may be lost with it too, if only the replica that began it was that far.
    #[serde(default)]
    pub began: u64,
    /// Behind `certain`, where each leader's entries begin.
    pub runs: Vec<Place>,
    /// Those whose ledgers voted.
    pub voters: BTreeSet<NodeId>,
    /// Replicas of the epoch that came back: what they had behind what they kept.
    pub old_disks: BTreeMap<NodeId, OldDisk>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
pub struct OldDisk {
    /// Up to here it agreed with the next epoch.
    pub kept: u64,
    /// The last entry that it had of anybody's.
    pub last: u64,
    /// Commands in what was taken away from it.
    pub commands: u64,
    /// When the first and the last of them were written, by their writers' calendars, in milliseconds.
    #[serde(default)]
    pub written: Option<(i64, i64)>,
}

impl End {
    /// What was lost for certain: what lies behind the first entry, up to the second. Known once a majority of the old voters' disks was read, since
    /// each acknowledged entry is on one of them.
    pub fn lost(&self) -> Option<(u64, u64)> {
        let read: Vec<&OldDisk> = self
            .old_disks
            .iter()
            .filter(|(node, _)| self.voters.contains(node))
            .map(|(_, old)| old)
            .collect();
        let kept = read.iter().map(|old| old.kept).max()?;
        let last = read.iter().map(|old| old.last).max()?;
        (read.len() * 2 > self.voters.len()).then_some((kept, last.max(kept).max(self.began)))
    }

    /// Up to where a log agrees with what the next epoch has, if it does up to `agreed`, and all that is known of it from there on begins with this entry.
    pub fn joins(&self, agreed: u64, place: Place) -> u64 {
        let index = place.index.min(self.last);
        let run = self.runs.iter().rev().find(|run| run.index <= index);
        // What a leader wrote comes after all that it had, and it never replaces what it wrote.
        let same = run.is_some_and(|run| (run.term, run.node) == (place.term, place.node));
        if same { index.max(agreed) } else { agreed }
    }

    /// Up to where a log agrees with what the next epoch has, if it does up to `agreed` and has this entry behind that.
    pub fn agrees(&self, agreed: u64, place: Place) -> u64 {
        let run = self.runs.iter().rev().find(|run| run.index <= place.index);
        let same = run.is_some_and(|run| (run.term, run.node) == (place.term, place.node));
        match same && place.index <= self.last && place.index == agreed + 1 {
            true => place.index,
            false => agreed,
        }
    }
}

/// Of so many replicas, how many must say what they have: then one of them has all that a majority had.
pub fn needed(replicas: usize) -> usize {
    replicas.max(2) - 1
}

/// The one that begins the next epoch: who has most, as Raft compares logs.
pub fn choose(halted: &[(NodeId, Report)]) -> Option<&(NodeId, Report)> {
    halted.iter().max_by_key(|(node, report)| (report.last, std::cmp::Reverse(*node)))
}

impl Regions {
    fn found(config: &RegionsConfig) -> Regions {
        Regions {
            primary: config.primary.clone(),
            witness: config.witness.clone(),
            names: config.members.keys().cloned().collect(),
            epoch: 1,
            policy: config.policy.clone(),
            change: None,
            past: vec![],
        }
    }

    /// A region's number as a holder of leases.
    pub fn holder(&self, region: &str) -> Option<HolderId> {
        self.names.iter().position(|name| name == region).map(|at| at as HolderId)
    }

    /// The change that is under way, if one is, ends with this step.
    pub(super) fn end_change(&mut self, last: (Step, i64)) {
        let Some(mut change) = self.change.take() else { return };
        change.steps.push(last);
        self.past.push(change);
        let more = self.past.len().saturating_sub(PAST_MAX);
        self.past.drain(..more);
    }

    /// The regions that keep replicas.
    pub fn serving(&self) -> impl Iterator<Item = &String> {
        self.names.iter().filter(|name| Some(*name) != self.witness.as_ref())
    }
}

impl ClusterMap {
    /// The first map of a cluster with regions. To be called on a map without shards.
    pub(super) fn found_regions(&mut self, config: &RegionsConfig) {
        for (id, node) in &mut self.nodes {
            node.region = config.region_of(*id).cloned().unwrap_or_default();
        }
        self.regions = Some(Regions::found(config));
    }

    /// Where replicas that vote are; empty in a cluster without regions.
    pub fn primary(&self) -> &str {
        self.regions.as_ref().map_or("", |regions| &regions.primary)
    }

    /// A change of the primary is at a step at which replicas and slots stay where they are.
    pub fn holds_still(&self) -> bool {
        let change = self.regions.as_ref().and_then(|regions| regions.change.as_ref());
        matches!(change.map(RegionChange::step), Some(Step::Granting | Step::Promoting))
    }

    /// The epoch in which shards write.
    pub fn epoch(&self) -> u64 {
        self.regions.as_ref().map_or(1, |regions| regions.epoch)
    }

    /// The regions that keep replicas.
    pub fn serving(&self) -> Vec<&str> {
        self.regions.as_ref().map_or(vec![""], |regions| regions.serving().map(String::as_str).collect())
    }

    pub fn region_of(&self, node: NodeId) -> &str {
        self.nodes.get(&node).map_or("", |node| &node.region)
    }

    /// The region of the node at an address; none in a cluster that has one.
    pub fn region_at(&self, addr: &str) -> Option<&str> {
        self.regions.as_ref()?;
        self.nodes.values().find(|node| node.addr == addr).map(|node| node.region.as_str())
    }

    /// Of the nodes with a replica of a shard those in one region.
    pub fn replicas_in(&self, shard: ShardId, region: &str) -> BTreeSet<NodeId> {
        let Some(entry) = self.shards.get(&shard) else { return BTreeSet::new() };
        let all = entry.members.iter().chain(entry.learners.keys());
        all.copied().filter(|node| self.region_of(*node) == region).collect()
    }

    /// The nodes that keep replicas, but not where writes go.
    pub fn elsewhere(&self) -> BTreeSet<NodeId> {
        let serving = self.serving();
        let there = |region: &str| region != self.primary() && serving.contains(&region);
        self.nodes.iter().filter(|(_, node)| there(&node.region)).map(|(id, _)| *id).collect()
    }

    /// At how much lag writes are refused. A region that is being filled, as one is that comes back after a failover, takes over nothing by itself: what it lacks
    /// holds nobody up.
    pub fn lag_max(&self) -> Option<Duration> {
        let policy = self.regions.as_ref().map(|regions| &regions.policy).filter(|policy| policy.throttle)?;
        let takes_over = |region: &&str| *region != self.primary() && self.unready_in(region).is_none();
        self.serving().iter().any(takes_over).then(|| Duration::from_millis(policy.rpo_ms))
    }

    /// The first shard of which fewer than two replicas of a region have ever caught up since they were given it, and how many have: the region is still being
    /// filled, and what it lacks may be anything. None has that may lack a step of a move.
    pub fn unready_in(&self, region: &str) -> Option<(ShardId, usize)> {
        let there = |node: &NodeId| self.nodes.get(node).is_some_and(|node| node.region == region);
        let ready = |entry: &ShardEntry| {
            if entry.lacks.is_some() && region != self.primary() {
                return 0;
            }
            let serving = |(_, learner): &(&NodeId, &Learner)| **learner == Learner::Serving;
            let learners = entry.learners.iter().filter(serving).map(|(node, _)| node);
            entry.members.iter().chain(learners).filter(|node| there(node)).count()
        };
        self.shards.iter().map(|(shard, entry)| (*shard, ready(entry))).find(|(_, ready)| *ready < 2)
    }

    pub(super) fn change_region(&self, change: impl FnOnce(&mut Regions)) -> ClusterMap {
        self.changed(|map| {
            if let Some(regions) = &mut map.regions {
                change(regions);
            }
        })
    }

    /// Begins to make another region the primary; the same wish again changes nothing but whether loss is accepted.
    pub fn begin_region_change(
        &self,
        to: &str,
        planned: bool,
        accept_data_loss: bool,
        (first, cause): (Step, &str),
        now: i64,
    ) -> Result<ClusterMap, Error> {
        let wrong = |problem: String| Err(Error::invalid("region", problem));
        let Some(regions) = &self.regions else { return wrong("this cluster has one".into()) };
        if !regions.serving().any(|name| name == to) {
            let names: Vec<&str> = regions.serving().map(String::as_str).collect();
            return wrong(format!("'{to}' is none that serves; there are {}", names.join(", ")));
        }
        if let Some(change) = &regions.change {
            if change.to != to {
                return wrong(format!("a change to {} is under way; wait for its end", change.to));
            }
            return Ok(self.change_region(|regions| {
                let Some(change) = &mut regions.change else { return };
                change.accept_data_loss |= accept_data_loss;
                if change.step() == Step::Validating && first > Step::Validating {
                    change.steps.push((first, now));
                }
            }));
        }
        if regions.primary == to {
            return Ok(self.clone());
        }
        if planned && (self.resize.is_some() || self.moving().is_some()) {
            return wrong("slots are being moved; wait for the end of that".into());
        }
        Ok(self.change_region(|regions| {
            let begun = RegionChange::new(&regions.primary, to, cause, (first, now));
            regions.change = Some(RegionChange { planned, accept_data_loss, ..begun });
        }))
    }

    /// The primary was found silent before the change began that is under way.
    pub fn region_silent_since(&self, at: i64) -> ClusterMap {
        self.change_region(|regions| {
            if let Some(change) = regions.change.as_mut().filter(|change| change.silent_since == 0) {
                change.silent_since = at;
            }
        })
    }

    /// Goes on from one step to the next one, or ends the change.
    pub fn region_step(&self, from: Step, to: Step, now: i64) -> ClusterMap {
        self.change_region(|regions| {
            let Some(change) = regions.change.as_mut().filter(|change| change.step() == from) else { return };
            match to {
                Step::Done | Step::Withdrawn => regions.end_change((to, now)),
                _ => change.steps.push((to, now)),
            }
        })
    }

    /// The control group has granted the next epoch to a region, whatever became of the change meanwhile.
    pub fn region_granted(&self, epoch: u64, to: &str, now: i64) -> ClusterMap {
        if epoch <= self.epoch() {
            return self.clone();
        }
        let granted = self.change_region(|regions| {
            let from = regions.primary.clone();
            let cause = "it was granted while its change was withdrawn";
            let new = || RegionChange::new(&from, to, cause, (Step::Granting, now));
            let change = regions.change.get_or_insert_with(new);
            if change.epoch == 0 {
                change.ended = regions.epoch;
            }
            change.epoch = epoch;
            (regions.primary, regions.epoch) = (to.into(), epoch);
        });
        granted.region_step(Step::Granting, Step::Promoting, now)
    }

    /// A shard goes on in an epoch, in which `voters` vote: the one of them whose report this is begins it with what it has.
    pub fn promote(
        &self,
        shard: ShardId,
        epoch: u64,
        voters: &BTreeSet<NodeId>,
        (chosen, report): (NodeId, &Report),
        ceiling: u64,
    ) -> ClusterMap {
        self.changed(|map| {
            let Some(entry) = map.shards.get_mut(&shard).filter(|entry| entry.epoch < epoch) else { return };
            let Report { last, certain, runs } = report.clone();
            let began = entry.ends.values().next_back().map_or(0, |end| end.last);
            let (last, ceiling) = (last.map_or(0, |last| last.index), ceiling.max(certain).max(began));
            let voted = entry.members.clone();
            // Where a region goes on by itself, its own replicas are the old disks; of this one everything is kept.
            let itself = OldDisk { kept: last, last, ..OldDisk::default() };
            let old_disks = voted.get(&chosen).map(|node| (*node, itself)).into_iter().collect();
            let end = End { certain, last, ceiling, began, runs, voters: voted, old_disks };
            let ended = (entry.epoch, end.clone());
            entry.ends.insert(entry.epoch, end);
            let others: Vec<NodeId> = entry
                .members
                .iter()
                .chain(entry.learners.keys())
                .copied()
                .filter(|n| !voters.contains(n))
                .collect();
            entry.epoch = epoch;
            entry.members = voters.clone();
            entry.chosen = Some(chosen);
            (entry.handover, entry.lacks) = (None, None);
            entry.learners = others.into_iter().map(|node| (node, Learner::Joining)).collect();
            map.doubt_erasures(shard, ended.0, &ended.1);
        })
    }

    /// The region that takes no writes may lack a shard's entries up to a position. That is of no use once another epoch has been granted.
    pub fn lacking(&self, shard: ShardId, position: Position) -> Result<ClusterMap, Error> {
        if self.epoch() != position.epoch {
            return Err(Error::Unavailable(format!("epoch {} is over", position.epoch)));
        }
        Ok(self.changed(|map| {
            let Some(entry) = map.shards.get_mut(&shard) else { return };
            entry.lacks = entry.lacks.max(Some(position.index));
        }))
    }

    /// It has them up to a position.
    pub fn lacks_no_more(&self, shard: ShardId, position: Position) -> ClusterMap {
        self.changed(|map| {
            let entry = map.shards.get_mut(&shard).filter(|entry| entry.epoch == position.epoch);
            if let Some(entry) = entry.filter(|entry| entry.lacks <= Some(position.index)) {
                entry.lacks = None;
            }
        })
    }

    /// The shards that are still in an old epoch.
    pub fn to_promote(&self) -> Vec<ShardId> {
        let epoch = self.epoch();
        self.shards.iter().filter(|(_, entry)| entry.epoch < epoch).map(|(id, _)| *id).collect()
    }

    /// A replica of an old epoch has come back.
    pub fn old_disk(&self, shard: ShardId, epoch: u64, node: NodeId, found: OldDisk) -> ClusterMap {
        self.changed(|map| {
            let end = map.shards.get_mut(&shard).and_then(|entry| entry.ends.get_mut(&epoch));
            if let Some(end) = end {
                end.old_disks.entry(node).or_insert(found);
            }
        })
    }
}

/// What the tests of all that goes by regions share.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// East writes, west follows, north only votes.
    pub fn config() -> RegionsConfig {
        let members = [("east", 1..=3), ("west", 4..=6), ("north", 7..=7)];
        RegionsConfig {
            primary: "east".into(),
            witness: Some("north".into()),
            members: members.into_iter().map(|(name, nodes)| (name.into(), nodes.collect())).collect(),
            policy: RegionPolicy::default(),
        }
    }

    /// Seven nodes, in those regions or in one, whose shards have planned their replicas.
    pub fn founded(shards: u32, regions: bool) -> Result<ClusterMap, Error> {
        let nodes = (1..=7).map(|id| (id, format!("n{id}:1"))).collect();
        let map = ClusterMap::found_in(&nodes, shards, regions.then(config).as_ref())?;
        Ok((0..shards).fold(map, |map, shard| map.founded(shard)).plan_learners())
    }

    /// All of whose replicas serve.
    pub fn settled(shards: u32, regions: bool) -> Result<ClusterMap, Error> {
        let mut map = founded(shards, regions)?;
        for shard in 0..shards {
            for node in 1..=7 {
                map = map.end_learner(shard, node, Learner::Joining);
            }
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{config, founded};
    use super::*;
    use crate::roles;

    fn settled() -> Result<ClusterMap, Error> {
        testing::settled(2, true)
    }

    fn last(index: u64) -> Report {
        let place = Place { term: 3, node: 1, index };
        Report { last: Some(place), certain: index - 2, runs: vec![Place { index: index - 1, ..place }] }
    }

    #[test]
    fn a_region_is_ready_when_two_replicas_of_each_shard_have_caught_up() -> Result<(), Error> {
        let mut map = founded(2, true)?;
        assert_eq!((map.unready_in("east"), map.unready_in("west")), (None, Some((0, 0))));
        for (shard, node, unready) in
            [(0, 4, Some((0, 1))), (0, 6, Some((1, 0))), (1, 4, Some((1, 1))), (1, 5, None)]
        {
            map = map.end_learner(shard, node, Learner::Joining);
            assert_eq!(map.unready_in("west"), unready, "{shard} {node}");
        }
        assert_eq!(settled()?.unready_in("west"), None);
        Ok(())
    }

    #[test]
    fn writes_wait_for_a_region_that_could_take_over() -> Result<(), Error> {
        let throttled = |mut map: ClusterMap| {
            let regions = map.regions.as_mut().ok_or(Error::NotFound("regions".into()))?;
            (regions.policy.throttle, regions.policy.rpo_ms) = (true, 6000);
            Ok::<_, Error>(map)
        };
        assert_eq!(settled()?.lag_max(), None, "it was not asked for");
        assert_eq!(throttled(settled()?)?.lag_max(), Some(Duration::from_secs(6)));
        assert_eq!(throttled(founded(2, true)?)?.lag_max(), None, "it is being filled");
        Ok(())
    }

    #[test]
    fn a_region_that_may_lack_a_step_of_a_move_is_not_ready_before_it_has_it() -> Result<(), Error> {
        let at = |index| Position { epoch: 1, index, item: 0 };
        let map = settled()?.lacking(1, at(30))?.lacking(1, at(20))?;
        assert_eq!((map.unready_in("east"), map.unready_in("west")), (None, Some((1, 0))));
        for (position, unready) in [
            (at(29), Some((1, 0))),
            (Position { epoch: 2, ..at(40) }, Some((1, 0))),
            (at(30), None),
            (at(31), None),
        ] {
            assert_eq!(map.lacks_no_more(1, position).unready_in("west"), unready, "{position:?}");
        }
        // Another epoch has been granted: whoever waits in the old one goes no further.
        let granted = map.region_granted(2, "west", 0);
        assert!(granted.lacking(0, at(31)).is_err());
        assert_eq!(granted.shards[&1].lacks, Some(30));
        let begun = granted.promote(1, 2, &BTreeSet::from([4, 5, 6]), (4, &Report::default()), 30);
        assert_eq!(begun.shards[&1].lacks, None);
        Ok(())
    }

    #[test]
    fn voters_are_where_writes_go_and_three_follow_in_the_other_region() -> Result<(), Error> {
        let map = settled()?;
        assert_eq!((map.plan_learners(), map.plan_handover()), (map.clone(), map.clone()));
        for shard in [0, 1] {
            assert_eq!(map.shards[&shard].members, BTreeSet::from([1, 2, 3]));
            assert_eq!(map.replicas_in(shard, "west"), BTreeSet::from([4, 5, 6]));
        }
        assert!(map.kept_by(7).is_empty(), "a witness keeps nothing");
        assert_eq!(map.elsewhere(), BTreeSet::from([4, 5, 6]));
        // A node that joins takes over only in its own region.
        let map = map.join_in(8, "n8:1", &roles::all(), "west")?.drain(2);
        assert!(map.is_err(), "two nodes of east cannot hold three replicas");
        assert!(settled()?.join_in(8, "n8:1", &roles::all(), "south").is_err());
        assert!(settled()?.join_in(1, "n1:1", &roles::all(), "west").is_err(), "it has replicas for east");
        Ok(())
    }

    #[test]
    fn the_files_mistakes_are_named() {
        let check = |change: fn(&mut RegionsConfig)| {
            let mut config = config();
            change(&mut config);
            config.check(&(1..=7).collect())
        };
        assert_eq!(check(|_| ()), Ok(()));
        for wrong in [
            check(|c| c.primary = "south".into()),
            check(|c| c.witness = Some("east".into())),
            check(|c| drop(c.members.remove("west"))),
            check(|c| c.members.entry("west".into()).or_default().extend([1])),
            check(|c| c.members.entry("north".into()).or_default().extend([9])),
            check(|c| c.policy.lease_ms = 10),
        ] {
            assert!(wrong.is_err());
        }
    }

    #[test]
    fn a_failover_goes_from_step_to_step_and_the_old_region_follows() -> Result<(), Error> {
        let map = settled()?;
        let first = (Step::Validating, "it is silent");
        let begun = map.begin_region_change("west", false, false, first, 1)?;
        assert_eq!(begun, begun.begin_region_change("west", false, false, first, 2)?, "wished twice");
        assert!(
            begun.begin_region_change("east", false, false, first, 2).is_err(),
            "another one is under way"
        );
        assert!(map.begin_region_change("north", false, false, first, 2).is_err(), "a witness");
        assert_eq!(map, map.begin_region_change("east", false, false, first, 2)?, "it is that already");
        let withdrawn = begun.region_step(Step::Validating, Step::Withdrawn, 2);
        let regions = |map: &ClusterMap| map.regions.clone().ok_or_else(|| Error::NotFound("regions".into()));
        assert_eq!((regions(&withdrawn)?.change, regions(&withdrawn)?.past.len()), (None, 1));
        let granting = begun.region_step(Step::Validating, Step::Granting, 2);
        assert_eq!(granting, granting.region_step(Step::Validating, Step::Withdrawn, 3), "a late step");
        assert_eq!(withdrawn.region_granted(2, "west", 3).primary(), "west", "there is no way back");
        let mut map = granting.region_granted(2, "west", 3);
        assert_eq!((map.primary(), map.epoch(), map.to_promote()), ("west", 2, vec![0, 1]));
        assert_eq!(
            (map.plan_learners(), map.plan_handover()),
            (map.clone(), map.clone()),
            "nothing moves now"
        );
        let voters = BTreeSet::from([4, 5]);
        for shard in [0, 1] {
            map = map.promote(shard, 2, &voters, (5, &last(10)), 30);
            assert_eq!(
                map,
                map.promote(shard, 2, &BTreeSet::from([6]), (6, &last(11)), 30),
                "promoted twice"
            );
        }
        assert_eq!(map.check(), Ok(()));
        let entry = &map.shards[&0];
        assert_eq!((entry.epoch, entry.chosen, &entry.members), (2, Some(5), &voters));
        assert_eq!((entry.ends[&1].certain, entry.ends[&1].last, entry.ends[&1].ceiling), (8, 10, 30));
        assert_eq!(
            entry.learners.keys().copied().collect::<Vec<_>>(),
            [1, 2, 3, 6],
            "everybody else follows"
        );
        let verifying = map.region_step(Step::Promoting, Step::Verifying, 4);
        map = verifying.region_step(Step::Verifying, Step::Done, 5);
        assert_eq!((regions(&map)?.change, regions(&map)?.past[0].epoch), (None, 2));
        // Had the one that was to begin lost its disk, the others would go on in the epoch after: both are accounted for.
        let again = verifying.region_step(Step::Verifying, Step::Granting, 5).region_granted(3, "west", 6);
        assert_eq!((again.epoch(), again.to_promote()), (3, vec![0, 1]));
        let others = BTreeSet::from([4, 6]);
        let again =
            [0, 1].into_iter().fold(again, |map, shard| map.promote(shard, 3, &others, (4, &last(9)), 30));
        let again = again.region_step(Step::Promoting, Step::Verifying, 7).region_step(
            Step::Verifying,
            Step::Done,
            8,
        );
        let losses = again.incidents().pop().map(|incident| incident.losses).unwrap_or_default();
        assert_eq!(
            losses.iter().map(|loss| (loss.shard, loss.epoch)).collect::<Vec<_>>(),
            [(0, 1), (0, 2), (1, 1), (1, 2)]
        );
        let ids: BTreeSet<String> = again.incident_events().into_iter().map(|event| event.id).collect();
        assert_eq!(ids.len(), again.incident_events().len(), "each is news");
        // The third voter comes from among those who follow; a region that is away keeps its places.
        map = map.heard(&(1..=3).map(|node| (node, super::super::map::Liveness::Lost)).collect());
        let planned = map.plan_handover();
        assert_eq!(planned.shards[&0].handover.map(|handover| handover.to), Some(6));
        assert_eq!(map.plan_learners().shards[&0].learners, map.shards[&0].learners);
        Ok(())
    }

    #[test]
    fn what_was_lost_is_known_when_most_of_the_old_disks_were_read() {
        let mut end =
            End { certain: 8, last: 10, ceiling: 30, voters: BTreeSet::from([1, 2, 3]), ..End::default() };
        assert_eq!(end.lost(), None);
        end.old_disks.insert(1, OldDisk { kept: 9, last: 9, ..OldDisk::default() });
        assert_eq!(end.lost(), None, "the others may have more");
        end.old_disks.insert(9, OldDisk { kept: 9, last: 20, ..OldDisk::default() });
        assert_eq!(end.lost(), None, "it did not vote");
        end.old_disks.insert(3, OldDisk { kept: 10, last: 12, commands: 2, written: None });
        assert_eq!(end.lost(), Some((10, 12)));
        // What it had of the epoch before, and nobody has who went on.
        end.began = 15;
        assert_eq!(end.lost(), Some((10, 15)));
    }

    #[test]
    fn the_one_with_most_begins_and_all_but_one_must_be_asked() {
        let halted = [(4, last(10)), (5, last(12)), (6, Report::default())];
        assert_eq!(choose(&halted).map(|(node, _)| *node), Some(5));
        let newer = Report { last: Some(Place { term: 4, node: 2, index: 9 }), ..Report::default() };
        assert_eq!(
            choose(&[(4, last(12)), (6, newer)]).map(|(node, _)| *node),
            Some(6),
            "a later term is more"
        );
        assert_eq!(choose(&[(5, last(12)), (4, last(12))]).map(|(node, _)| *node), Some(4));
        assert_eq!([1, 2, 3, 4].map(needed), [1, 1, 2, 3]);
    }
}
