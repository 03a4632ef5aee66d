//! Incidents: each change of the primary region as an account, made from what the map says of it. There is no other store: whoever has the map can tell.
//!
//! ```text
//!   open ── done: every shard takes writes ──► recovering ── every shard has all its replicas ──► closed
//!     └──── withdrawn: the region answers again, or goes on ───────────────────────────────────────▲
//! ```
//!
//! What it cost, by the calendars of those who led the control group:
//! - **RTO**: from the moment when the primary was found silent (or the change was ordered) until every shard had taken a write in the new region. A
//!   leader of the control group that dies with the primary takes along what it had seen: the silence is then counted from when its successor saw it.
//! - **RPO**: what of the ended epochs is lost ([`End`]), of shards that are still there, and within which time it was written, by the calendars of those who wrote. Until a majority of a shard's old disks was read it is at
//!   most what lies between what was certain and the ceiling; a planned change loses nothing, since it waits for the whole tail before the grant.
//! - **MTTR**: until redundancy is back, in every region that serves. An incident is closed then, also if the old disks never come back and the loss
//!   stays unresolved; what they say later is added to it.

use super::map::{ClusterMap, Learner, Liveness, NodeEntry, NodeState, ShardEntry, ShardId};
use super::regions::{End, OldDisk, RegionChange, Step};
use crate::proto::v1;
use crate::roles::Role;

/// Something happened to an incident. Its id is the same whoever tells of it, and however often.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: String,
    /// opened, updated, closed.
    pub kind: &'static str,
    /// The step that began, or `accounted`, or `whole`.
    pub what: &'static str,
    pub at_ms: i64,
    /// As it was then; losses are told as they are known now.
    pub incident: v1::Incident,
}

fn id_of(change: &RegionChange) -> String {
    let began = change.steps.first().map_or(0, |(_, at)| *at);
    format!("region-{began}-{}-{}", change.from, change.to)
}

impl ClusterMap {
    /// All incidents that the map remembers, oldest first.
    pub fn incidents(&self) -> Vec<v1::Incident> {
        self.changes().map(|change| self.incident(change)).collect()
    }

    /// What happened to them, in the order in which it did.
    pub fn incident_events(&self) -> Vec<Event> {
        self.changes().flat_map(|change| self.events_of(change)).collect()
    }

    fn changes(&self) -> impl Iterator<Item = &RegionChange> {
        self.regions.iter().flat_map(|regions| regions.past.iter().chain(&regions.change))
    }

    fn incident(&self, change: &RegionChange) -> v1::Incident {
        let first = change.steps.first().map_or(0, |(_, at)| *at);
        let silent_since = if change.silent_since == 0 { first } else { change.silent_since };
        let (last, ended) = change.steps.last().copied().unwrap_or((Step::Validating, first));
        let (state, closed_at) = match (last, change.whole) {
            (Step::Withdrawn, _) => ("closed", Some(ended)),
            (Step::Done, Some(whole)) => ("closed", Some(whole)),
            (Step::Done, None) => ("recovering", None),
            _ => ("open", None),
        };
        let after = |at: i64| u64::try_from(at - silent_since).unwrap_or(0);
        let losses = self.losses(change);
        let unknown = |loss: &&v1::Loss| !loss.resolved;
        v1::Incident {
            id: id_of(change),
            state: state.into(),
            from: change.from.clone(),
            to: change.to.clone(),
            planned: change.planned,
            cause: change.cause.clone(),
            epoch: change.epoch,
            steps: change.steps.iter().map(step_of).collect(),
            silent_since,
            rto_ms: (last == Step::Done).then(|| after(ended)),
            mttr_ms: change.whole.filter(|_| last == Step::Done).map(after),
            accounted: last == Step::Withdrawn || self.is_accounted(change, &losses),
            commands_lost: losses.iter().map(|loss| loss.commands).sum(),
            entries_at_most: losses
                .iter()
                .filter(unknown)
                .fold(0, |sum: u64, loss| sum.saturating_add(loss.to - loss.after)),
            lost_within_ms: within(&losses),
            losses,
            accounted_at: change.accounted,
            closed_at,
            waits_for: String::new(),
        }
    }

    /// What each shard lost when it went over to the change's epoch, and to those that it granted before and that did not begin.
    fn losses(&self, change: &RegionChange) -> Vec<v1::Loss> {
        let over = |(shard, entry): (&ShardId, &ShardEntry)| {
            let gone_over = entry.epoch >= change.epoch && entry.first_epoch < change.epoch;
            let ends = entry.ends.range(change.ended.min(change.epoch)..change.epoch).filter(|_| gone_over);
            // It waited for all of the one that was over before its grant.
            let planned = |epoch: u64| change.planned && epoch == change.ended;
            ends.map(|(epoch, end)| loss_of(*shard, *epoch, end, planned(*epoch))).collect::<Vec<_>>()
        };
        self.shards.iter().flat_map(over).collect()
    }

    fn is_accounted(&self, change: &RegionChange, losses: &[v1::Loss]) -> bool {
        let waiting = |entry: &ShardEntry| entry.epoch < change.epoch;
        change.epoch > 0
            && change.step() >= Step::Verifying
            && !self.shards.values().any(waiting)
            && losses.iter().all(|loss| loss.resolved)
    }

    fn events_of(&self, change: &RegionChange) -> Vec<Event> {
        let id = id_of(change);
        let before = |steps: usize| RegionChange {
            steps: change.steps[..steps].to_vec(),
            epoch: if change.steps[steps - 1].0 > Step::Granting { change.epoch } else { 0 },
            accounted: None,
            whole: None,
            ..change.clone()
        };
        let event = |kind, what: &'static str, at_ms, then: &RegionChange| Event {
            id: format!("{id}/{what}"),
            kind,
            what,
            at_ms,
            incident: self.incident(then),
        };
        let steps = change.steps.iter().enumerate().map(|(place, (step, at))| {
            let kind = match (place, step) {
                (_, Step::Withdrawn) => "closed",
                (0, _) => "opened",
                _ => "updated",
            };
            let mut event = event(kind, step.name(), *at, &before(place + 1));
            // A step that is taken again is news again.
            match change.steps[..place].iter().filter(|(other, _)| other == step).count() {
                0 => {}
                times => event.id = format!("{}/{}", event.id, times + 1),
            }
            event
        });
        let mut events: Vec<Event> = steps.collect();
        if let Some(at) = change.accounted {
            events.push(event("updated", "accounted", at, &RegionChange { whole: None, ..change.clone() }));
        }
        if let Some(at) = change.whole {
            let then =
                RegionChange { accounted: change.accounted.filter(|told| *told <= at), ..change.clone() };
            events.push(event("closed", "whole", at, &then));
        }
        events
    }

    /// Notes of the changes that are done when it was known what they lost, and when every shard had all its replicas again.
    pub fn account(&self, now: i64) -> ClusterMap {
        let to_note = |change: &RegionChange| {
            change.step() == Step::Done && (change.accounted.is_none() || change.whole.is_none())
        };
        if !self.regions.iter().any(|regions| regions.past.iter().any(to_note)) {
            return self.clone();
        }
        let whole = self.is_whole();
        self.change_region(|regions| {
            for change in regions.past.iter_mut().filter(|change| to_note(change)) {
                if change.accounted.is_none() && self.is_accounted(change, &self.losses(change)) {
                    change.accounted = Some(now);
                }
                if change.whole.is_none() && whole {
                    change.whole = Some(now);
                }
            }
        })
    }

    /// Whether every shard has as many replicas as it is to have in every region that serves, on nodes that answer. A region without a node has too few.
    fn is_whole(&self) -> bool {
        let wanted = |region: &str| {
            let may =
                |node: &&NodeEntry| node.state == NodeState::Member && node.roles.contains(&Role::Ledger);
            let there = self.nodes.values().filter(|node| node.region == region).filter(may).count();
            there.clamp(1, Role::Ledger.policy().replicas)
        };
        let has = |entry: &ShardEntry, region: &str| {
            let serving = entry.learners.iter().filter(|(_, learner)| **learner == Learner::Serving);
            let voting = entry.members.iter().filter(|_| region == self.primary());
            let following = serving.map(|(node, _)| node).filter(|_| region != self.primary());
            let nodes = voting.chain(following).filter_map(|id| self.nodes.get(id));
            let well =
                |node: &&NodeEntry| node.liveness == Liveness::Up && node.roles.contains(&Role::Ledger);
            nodes.filter(|node| node.region == region).filter(well).count()
        };
        let serving = self.serving();
        let entries = self.shards.values();
        entries
            .flat_map(|entry| serving.iter().map(move |region| (entry, *region)))
            .all(|(entry, region)| entry.epoch == self.epoch() && has(entry, region) >= wanted(region))
    }
}

fn step_of((step, at_ms): &(Step, i64)) -> v1::RegionStep {
    v1::RegionStep { step: step.name().into(), at_ms: *at_ms }
}

/// Within which time all that is known to be lost was written.
fn within(losses: &[v1::Loss]) -> Option<u64> {
    let first = losses.iter().filter_map(|loss| loss.first_written_ms).min()?;
    let last = losses.iter().filter_map(|loss| loss.last_written_ms).max()?;
    Some(last.abs_diff(first))
}

fn loss_of(shard: ShardId, epoch: u64, end: &End, planned: bool) -> v1::Loss {
    let loss = v1::Loss { shard, epoch, ..v1::Loss::default() };
    match end.lost() {
        Some((after, to)) if to > after => {
            let most = end.old_disks.iter().max_by_key(|(_, old): &(_, &OldDisk)| old.last);
            let (quarantine, old) = most.map_or((0, OldDisk::default()), |(node, old)| (*node, *old));
            let (first_written_ms, last_written_ms) = old.written.unzip();
            let commands = old.commands;
            v1::Loss {
                resolved: true,
                after,
                to,
                commands,
                quarantine,
                first_written_ms,
                last_written_ms,
                ..loss
            }
        }
        Some((after, to)) => v1::Loss { resolved: true, after, to, ..loss },
        // It had the whole tail before the epoch was granted.
        None if planned => v1::Loss { resolved: true, after: end.last, to: end.last, ..loss },
        None => v1::Loss { after: end.certain, to: end.ceiling.max(end.certain), ..loss },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::map::NodeId;
    use crate::control::regions::testing;
    use crate::error::Error;
    use crate::ledger::epochs::{Place, Report};
    use std::collections::{BTreeMap, BTreeSet};

    /// One shard, all of whose replicas serve.
    fn settled() -> Result<ClusterMap, Error> {
        testing::settled(1, true)
    }

    fn hear(map: &ClusterMap, nodes: std::ops::RangeInclusive<NodeId>, liveness: Liveness) -> ClusterMap {
        map.heard(&nodes.map(|node| (node, liveness)).collect::<BTreeMap<_, _>>())
    }

    /// East falls silent at 1,000, and west writes at 9,000; nothing has come back yet.
    fn failed_over() -> Result<ClusterMap, Error> {
        let map = hear(&settled()?, 1..=3, Liveness::Down);
        let begun =
            map.begin_region_change("west", false, false, (Step::Validating, "it is silent"), 4_000)?;
        let map = begun.region_silent_since(1_000).region_step(Step::Validating, Step::Granting, 7_000);
        let map = map.region_granted(2, "west", 8_000);
        let report = Report {
            last: Some(Place { term: 3, node: 1, index: 10 }),
            certain: 8,
            runs: vec![Place { term: 3, node: 1, index: 9 }],
        };
        let map = map.promote(0, 2, &BTreeSet::from([4, 5, 6]), (5, &report), 30);
        let map = map.region_step(Step::Promoting, Step::Verifying, 8_500);
        Ok(map.region_step(Step::Verifying, Step::Done, 9_000))
    }

    fn only(map: &ClusterMap) -> Result<v1::Incident, Error> {
        let mut incidents = map.incidents();
        let incident = incidents.pop().filter(|_| incidents.is_empty());
        incident.ok_or_else(|| Error::NotFound("the one incident".into()))
    }

    #[test]
    fn an_incident_says_what_a_failover_cost_and_at_most_lost() -> Result<(), Error> {
        assert_eq!(settled()?.incidents(), []);
        let incident = only(&failed_over()?)?;
        assert_eq!((incident.id.as_str(), incident.state.as_str()), ("region-4000-east-west", "recovering"));
        assert_eq!((incident.rto_ms, incident.mttr_ms, incident.accounted), (Some(8_000), None, false));
        assert_eq!(
            (incident.entries_at_most, incident.commands_lost),
            (22, 0),
            "8 is certain, the ceiling 30"
        );
        assert_eq!(incident.steps.len(), 5);
        Ok(())
    }

    #[test]
    fn it_is_closed_when_every_replica_is_back_and_knows_the_loss_from_the_old_disks() -> Result<(), Error> {
        let map = failed_over()?;
        assert_eq!(map.account(10_000), map, "east is away");
        let map = map.old_disk(0, 1, 1, OldDisk { kept: 9, last: 9, ..OldDisk::default() });
        let map = map
            .old_disk(0, 1, 3, OldDisk { kept: 10, last: 12, commands: 2, written: Some((700, 950)) })
            .account(11_000);
        let incident = only(&map)?;
        assert_eq!((incident.accounted, incident.accounted_at), (true, Some(11_000)));
        assert_eq!((incident.commands_lost, incident.entries_at_most), (2, 0));
        assert_eq!(incident.lost_within_ms, Some(250));
        let loss = &incident.losses[0];
        assert_eq!((loss.after, loss.to, loss.quarantine), (10, 12, 3));
        assert_eq!(incident.state, "recovering");
        let back = hear(&map, 1..=3, Liveness::Up);
        assert_eq!(back.account(12_000), back, "they do not follow yet");
        let whole = (1..=3).fold(back, |map, node| map.end_learner(0, node, Learner::Joining));
        let whole = whole.account(13_000);
        assert_eq!(whole, whole.account(14_000), "it is noted once");
        let incident = only(&whole)?;
        assert_eq!((incident.state.as_str(), incident.mttr_ms), ("closed", Some(12_000)));
        Ok(())
    }

    #[test]
    fn a_planned_change_loses_nothing_and_a_withdrawn_one_is_closed_at_once() -> Result<(), Error> {
        let map = settled()?.begin_region_change("west", true, false, (Step::Granting, "an order"), 100)?;
        let map = map.region_granted(2, "west", 200);
        assert_eq!(only(&map)?.losses, [], "no shard has gone over");
        let report = Report { last: Some(Place { term: 3, node: 1, index: 10 }), certain: 8, runs: vec![] };
        let map = map.promote(0, 2, &BTreeSet::from([4, 5, 6]), (5, &report), 30);
        assert_eq!(only(&map)?.state, "open");
        let map = map.region_step(Step::Promoting, Step::Verifying, 300);
        let map = map.region_step(Step::Verifying, Step::Done, 400).account(500);
        let incident = only(&map)?;
        assert_eq!((incident.accounted, incident.entries_at_most, incident.rto_ms), (true, 0, Some(300)));

        let silent = (Step::Validating, "it is silent");
        let map = settled()?.begin_region_change("west", false, false, silent, 100)?;
        let map = map.region_step(Step::Validating, Step::Withdrawn, 200);
        let incident = only(&map)?;
        assert_eq!(
            (incident.state.as_str(), incident.rto_ms, incident.closed_at),
            ("closed", None, Some(200))
        );
        assert!(incident.accounted && map.account(300) == map);
        Ok(())
    }

    #[test]
    fn every_step_is_an_event_once_and_shows_no_later_one() -> Result<(), Error> {
        let map = failed_over()?;
        let told = |map: &ClusterMap| {
            let events = map.incident_events().into_iter();
            events.map(|event| (event.kind, event.what, event.at_ms)).collect::<Vec<_>>()
        };
        let first = [
            ("opened", "validating", 4_000),
            ("updated", "granting", 7_000),
            ("updated", "promoting", 8_000),
            ("updated", "verifying", 8_500),
            ("updated", "done", 9_000),
        ];
        assert_eq!(told(&map), first);
        let opened = &map.incident_events()[0];
        assert_eq!(opened.id, "region-4000-east-west/validating");
        let then = &opened.incident;
        assert_eq!((then.state.as_str(), then.steps.len(), then.epoch, then.rto_ms), ("open", 1, 0, None));
        // Whole before the loss is known: the account comes later, and changes nothing that was told.
        let back = (1..=3)
            .fold(hear(&map, 1..=3, Liveness::Up), |map, node| map.end_learner(0, node, Learner::Joining));
        let whole = back.account(20_000);
        assert_eq!(told(&whole)[5..], [("closed", "whole", 20_000)]);
        let late = [1, 2].into_iter().fold(whole, |map, node| {
            map.old_disk(0, 1, node, OldDisk { kept: 10, last: 10, ..OldDisk::default() })
        });
        let late = late.account(30_000);
        let ids: BTreeSet<String> = late.incident_events().into_iter().map(|event| event.id).collect();
        assert_eq!((told(&late).len(), ids.len()), (7, 7));
        assert_eq!(told(&late)[..5], first);
        Ok(())
    }
}
