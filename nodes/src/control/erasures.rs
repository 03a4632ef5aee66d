//! Erasures in the cluster map: the list of who was erased, which is what a person's right to be forgotten rests on, as plain functions from one map to the next.
//!
//! ```text
//!   loci erase ─► in the list ──► applied on every shard ──► in every region: settled
//!                                   ▲            │
//!                                   └── a shard goes on in an epoch that may lack it: made again there
//! ```
//!
//! An erasure is recorded first, then carried out: whoever leads the control group goes on with it ([`super::driver`]), and each shard's own list
//! ([`storage::erase`]) makes a step that is repeated harmless.
//!
//! **No slots move** from its beginning until it is settled: a memory that is on its way between two shards could otherwise be missed by both, and one that an
//! epoch brings back be where nobody looks for it. A move that is under way is carried out first.
//!
//! **What is brought back.** Whatever takes something from before an erasure and writes it again (entries of a quarantine, a restore) asks the list first:
//! by position ([`ClusterMap::erased_behind`]), which is exact, or by time ([`ClusterMap::erased_after`]).

use super::map::{ClusterMap, ShardId};
use super::regions::End;
use crate::error::Error;
use crate::limits::NAME_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use storage::erase::KEPT_MS;
use storage::model::{Erasure as Listed, ErasureId, Position, Subject, UnixMs};

/// Erasures that the map remembers, since every change writes all of it down; of more the oldest that are settled are forgotten here, and stand in each shard's own
/// list ([`storage::Shard::erasures`]).
pub const ERASURES_MAX: usize = 128;
/// By so much the calendars of two nodes may differ where an erasure is compared with another node's time.
pub const CALENDARS_APART_MS: i64 = 5 * 60 * 1000;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Erasures {
    /// The number of the last one.
    pub last: ErasureId,
    pub list: BTreeMap<ErasureId, Erasure>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Erasure {
    pub tenant: String,
    /// Empty: any; one of the two is not.
    pub user: String,
    pub agent: String,
    /// Who asks again with the same key means this one.
    pub key: String,
    /// By the calendar of who was asked.
    pub at_ms: UnixMs,
    /// Of every shard that there was then.
    pub parts: BTreeMap<ShardId, Part>,
}

/// An erasure on one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Part {
    /// Whether it is applied, for all that is known.
    pub done: bool,
    /// Where it was applied for the first time, as epoch and index: what comes behind that is not erased. Zeroes: nowhere yet.
    pub first: (u64, u64),
    /// Where it is certainly applied, if that is not lost.
    pub seen: (u64, u64),
    pub memories: u64,
    pub versions: u64,
    /// The regions that have it on the disks of a majority of their replicas.
    pub regions: BTreeSet<String>,
}

impl Part {
    /// Only what was written before then is still to be erased; `None`: everything.
    pub fn before(&self) -> Option<Position> {
        let (epoch, index) = self.first;
        (index > 0).then_some(Position { epoch, index, item: 0 })
    }

    /// The epoch ended, and the next one has what a majority of `primary` knows to be there.
    fn over(&mut self, epoch: u64, end: &End, primary: &str) {
        if !self.done || self.seen.0 != epoch {
            return;
        }
        if self.seen.1 > end.certain && !sim::planted!("trust-an-erasure-of-an-epoch-that-is-over") {
            (self.done, self.regions) = (false, BTreeSet::new());
        } else {
            self.regions.insert(primary.into());
        }
    }
}

impl Erasure {
    pub fn subject(&self) -> Subject {
        Subject { user: self.user.clone(), agent: self.agent.clone() }
    }

    fn covers(&self, tenant: &str, (user, agent): (&str, &str)) -> bool {
        self.tenant == tenant && self.subject().covers(user, agent)
    }

    /// Every shard has applied it.
    pub fn is_applied(&self) -> bool {
        self.parts.values().all(|part| part.done)
    }

    /// Every shard has applied it in every region that keeps replicas.
    pub fn is_settled(&self, serving: &[&str]) -> bool {
        self.parts
            .values()
            .all(|part| part.done && serving.iter().all(|region| part.regions.contains(*region)))
    }
}

impl ClusterMap {
    /// Records that somebody is to be erased. The same key again means the same erasure.
    pub fn begin_erasure(
        &self,
        tenant: &str,
        subject: &Subject,
        key: &str,
        now: UnixMs,
    ) -> Result<ClusterMap, Error> {
        if subject.user.is_empty() && subject.agent.is_empty() {
            return Err(Error::invalid("user", "name a user, or an agent: whose memories are to be erased"));
        }
        for (field, name) in [("user", &subject.user), ("agent", &subject.agent)] {
            if name.len() > NAME_BYTES_MAX {
                return Err(Error::invalid(field, format!("at most {NAME_BYTES_MAX} bytes")));
            }
        }
        if let Some((_, held)) = self.erasure_of(tenant, key) {
            return if held.subject() == *subject { Ok(self.clone()) } else { Err(Error::KeyReused) };
        }
        let next = self.changed(|map| {
            let serving: Vec<String> = self.serving().into_iter().map(String::from).collect();
            let serving: Vec<&str> = serving.iter().map(String::as_str).collect();
            let list = &mut map.erasures.list;
            list.retain(|_, held| !held.is_settled(&serving) || held.at_ms >= now.saturating_sub(KEPT_MS));
            while list.len() >= ERASURES_MAX {
                let Some(id) = list.iter().find(|(_, held)| held.is_settled(&serving)).map(|(id, _)| *id)
                else {
                    break;
                };
                list.remove(&id);
            }
            map.erasures.last += 1;
            let erasure = Erasure {
                tenant: tenant.into(),
                user: subject.user.clone(),
                agent: subject.agent.clone(),
                key: key.into(),
                at_ms: now,
                parts: map.shards.keys().map(|shard| (*shard, Part::default())).collect(),
            };
            map.erasures.list.insert(map.erasures.last, erasure);
        });
        if next.erasures.list.len() > ERASURES_MAX {
            let problem = format!("{ERASURES_MAX} erasures wait for the other region");
            return Err(Error::Unavailable(problem));
        }
        Ok(next)
    }

    /// A tenant's erasure by the key that it was asked with.
    pub fn erasure_of(&self, tenant: &str, key: &str) -> Option<(ErasureId, &Erasure)> {
        let mut found =
            self.erasures.list.iter().filter(|(_, held)| held.tenant == tenant && held.key == key);
        found.next().map(|(id, held)| (*id, held))
    }

    /// The erasures that are not settled, oldest first.
    pub fn open_erasures(&self) -> Vec<(ErasureId, &Erasure)> {
        let serving = self.serving();
        let open = self.erasures.list.iter().filter(|(_, held)| !held.is_settled(&serving));
        open.map(|(id, held)| (*id, held)).collect()
    }

    /// A shard has applied an erasure, and was seen to have done so at a position.
    pub fn erased(&self, shard: ShardId, listed: &Listed, seen: Position) -> ClusterMap {
        let primary = self.primary().to_string();
        self.changed(|map| {
            let Some(entry) = map.shards.get(&shard) else { return };
            let part = map.erasures.list.get_mut(&listed.id).and_then(|held| held.parts.get_mut(&shard));
            let Some(part) = part.filter(|part| !part.done) else { return };
            part.done = true;
            part.seen = (seen.epoch, seen.index);
            if part.first == (0, 0) {
                part.first = (listed.position.epoch, listed.position.index);
            }
            (part.memories, part.versions) =
                (part.memories.max(listed.memories), part.versions.max(listed.versions));
            if seen.epoch == entry.epoch {
                part.regions.insert(primary);
            } else if let Some(end) = entry.ends.get(&seen.epoch) {
                // The shard has gone on meanwhile.
                part.over(seen.epoch, end, &primary);
            }
        })
    }

    /// The other regions have what a shard of this epoch has up to an erasure.
    pub fn erased_elsewhere(&self, id: ErasureId, shard: ShardId, epoch: u64) -> ClusterMap {
        let serving: Vec<String> = self.serving().into_iter().map(String::from).collect();
        self.changed(|map| {
            if map.shards.get(&shard).is_none_or(|entry| entry.epoch != epoch) {
                return;
            }
            let part = map.erasures.list.get_mut(&id).and_then(|held| held.parts.get_mut(&shard));
            if let Some(part) = part.filter(|part| part.done) {
                part.regions.extend(serving);
            }
        })
    }

    /// A shard's epoch has ended so, and the next one is the primary's: what of the erasures may be lost is to be made again.
    pub(super) fn doubt_erasures(&mut self, shard: ShardId, epoch: u64, end: &End) {
        let primary = self.primary().to_string();
        for erasure in self.erasures.list.values_mut() {
            if let Some(part) = erasure.parts.get_mut(&shard) {
                part.over(epoch, end, &primary);
            }
        }
    }

    /// Whether somebody's memories were erased behind a position of a shard's ledger: what was written there must not be written again. `whose`: a memory's
    /// user and agent. An erasure that the shard is yet to apply counts.
    pub fn erased_behind(
        &self,
        tenant: &str,
        whose: (&str, &str),
        shard: ShardId,
        position: Position,
    ) -> bool {
        self.erasures.list.values().any(|held| {
            let behind = |part: &Part| part.first == (0, 0) || part.first > (position.epoch, position.index);
            held.covers(tenant, whose) && held.parts.get(&shard).is_none_or(behind)
        })
    }

    /// Whether somebody's memories were erased after a time by any node's calendar, or may have been, since calendars differ. `whose`: a memory's user and agent.
    pub fn erased_after(&self, tenant: &str, whose: (&str, &str), time: UnixMs) -> bool {
        let erased = |held: &Erasure| held.at_ms.saturating_add(CALENDARS_APART_MS) >= time;
        self.erasures.list.values().any(|held| held.covers(tenant, whose) && erased(held))
    }
}

#[cfg(test)]
mod tests {
    use super::super::regions::{Step, testing};
    use super::*;
    use crate::ledger::epochs::{Place, Report};

    fn subject(user: &str, agent: &str) -> Subject {
        Subject { user: user.into(), agent: agent.into() }
    }

    /// Two shards in two regions, or in one.
    fn cluster(regions: bool) -> Result<ClusterMap, Error> {
        testing::settled(2, regions)
    }

    /// What a shard answers that applied an erasure there.
    fn listed(id: ErasureId, epoch: u64, index: u64) -> (Listed, Position) {
        let position = Position { epoch, index, item: 0 };
        let (tenant, subject, time) = ("t".into(), subject("ana", ""), 5);
        let listed = Listed { id, tenant, subject, position, time, memories: 4, versions: 6, next: None };
        (listed, position)
    }

    fn applied(map: &ClusterMap, shard: ShardId, (listed, seen): (Listed, Position)) -> ClusterMap {
        map.erased(shard, &listed, seen)
    }

    /// West goes on with all shards, of which it certainly has this much.
    fn failed_over(map: &ClusterMap, certain: u64) -> Result<ClusterMap, Error> {
        let first = (Step::Granting, "by hand");
        let mut map = map.begin_region_change("west", false, false, first, 1)?.region_granted(2, "west", 2);
        let place = Place { term: 1, node: 1, index: certain };
        let report = Report { last: Some(place), certain, runs: vec![] };
        for shard in map.to_promote() {
            map = map.promote(shard, 2, &BTreeSet::from([4, 5]), (4, &report), 1000);
        }
        Ok(map)
    }

    #[test]
    fn an_erasure_is_recorded_once_and_slots_stay_until_it_is_settled() -> Result<(), Error> {
        let map = cluster(false)?;
        let begun = map.begin_erasure("t", &subject("ana", ""), "k", 5)?;
        assert_eq!(begun, begun.begin_erasure("t", &subject("ana", ""), "k", 9)?);
        assert_eq!(begun.begin_erasure("t", &subject("ben", ""), "k", 9), Err(Error::KeyReused));
        assert!(map.begin_erasure("t", &subject("", ""), "k", 5).is_err());
        assert!(map.begin_erasure("t", &subject(&"a".repeat(257), ""), "k", 5).is_err());
        let resized = begun.begin_resize(3)?;
        assert_eq!(resized.plan_move(), resized);
        let half = applied(&resized, 0, listed(1, 1, 7));
        assert_eq!(half, applied(&half, 0, listed(1, 1, 9)), "told twice");
        assert!(half.plan_move().moving().is_none());
        let mut done = applied(&half, 1, listed(1, 1, 3));
        assert!(done.open_erasures().is_empty() && done.plan_move().moving().is_some());
        assert_eq!(done.check(), Ok(()));
        // It may be written down, and is forgotten in time.
        let text = serde_json::to_string(&done).map_err(|e| Error::Internal(e.to_string()))?;
        assert_eq!(serde_json::from_str::<ClusterMap>(&text).ok().as_ref(), Some(&done));
        done = done.begin_erasure("t", &subject("ben", ""), "l", KEPT_MS + 6)?;
        assert_eq!(done.erasures.list.keys().collect::<Vec<_>>(), [&2]);
        Ok(())
    }

    #[test]
    fn the_list_is_bounded_by_what_is_settled() -> Result<(), Error> {
        let mut map = cluster(false)?;
        for number in 0..ERASURES_MAX as u64 + 3 {
            map = map.begin_erasure("t", &subject("ana", ""), &number.to_string(), 5)?;
            for shard in [0, 1] {
                map = applied(&map, shard, listed(number + 1, 1, 7));
            }
        }
        assert_eq!(map.erasures.list.len(), ERASURES_MAX);
        assert_eq!(map.erasures.list.keys().next(), Some(&4));
        let mut open = cluster(false)?;
        for number in 0..ERASURES_MAX {
            open = open.begin_erasure("t", &subject("ana", ""), &number.to_string(), 5)?;
        }
        assert!(open.begin_erasure("t", &subject("ana", ""), "one more", 5).is_err());
        Ok(())
    }

    #[test]
    fn what_an_epoch_may_lack_is_made_again_and_what_it_has_is_not() -> Result<(), Error> {
        let mut map = cluster(true)?.begin_erasure("t", &subject("ana", ""), "k", 5)?;
        map = applied(&applied(&map, 0, listed(1, 1, 7)), 1, listed(1, 1, 20));
        let of = |map: &ClusterMap, shard: ShardId| map.erasures.list[&1].parts[&shard].clone();
        assert!(map.erasures.list[&1].is_applied());
        assert_eq!(map.open_erasures().len(), 1, "west does not have it");
        assert!(map.erased_elsewhere(1, 0, 1).erased_elsewhere(1, 1, 1).open_erasures().is_empty());
        let map = failed_over(&map, 10)?;
        assert_eq!(of(&map, 0).regions, BTreeSet::from(["east".into(), "west".into()]));
        assert_eq!((of(&map, 0).done, of(&map, 1).done), (true, false));
        // Only what was written before the first time.
        assert_eq!(of(&map, 1).before(), Some(Position { epoch: 1, index: 20, item: 0 }));
        assert_eq!(map, map.erased_elsewhere(1, 1, 1), "an epoch that is over");
        let again = applied(&map, 1, listed(1, 2, 15));
        assert_eq!((of(&again, 1).first, of(&again, 1).seen), ((1, 20), (2, 15)));
        assert!(again.erased_elsewhere(1, 1, 2).open_erasures().is_empty());
        // An answer of the old epoch that comes late counts only for what is certain.
        let late = cluster(true)?.begin_erasure("t", &subject("ana", ""), "k", 5)?;
        let late = failed_over(&late, 10)?;
        let late = applied(&applied(&late, 0, listed(1, 1, 7)), 1, listed(1, 1, 20));
        assert_eq!((of(&late, 0).done, of(&late, 1).done), (true, false));
        assert_eq!(of(&late, 0).regions, BTreeSet::from(["west".into()]));
        Ok(())
    }

    #[test]
    fn what_comes_from_before_an_erasure_is_told_by_position_and_by_time() -> Result<(), Error> {
        let mut map = cluster(true)?.begin_erasure("t", &subject("ana", "helper"), "k", 1_000_000)?;
        let at = |epoch, index| Position { epoch, index, item: 0 };
        let whose = [("ana", "helper"), ("ana", ""), ("ben", "helper")];
        let erased =
            |map: &ClusterMap, position| whose.map(|whose| map.erased_behind("t", whose, 0, position));
        assert_eq!(erased(&map, at(1, 9)), [true, false, false], "it is yet to be applied");
        map = applied(&map, 0, listed(1, 1, 7));
        assert_eq!(erased(&map, at(1, 6)), [true, false, false]);
        assert_eq!(erased(&map, at(1, 8)), [false; 3]);
        assert_eq!(erased(&map, at(2, 1)), [false; 3]);
        assert!(!map.erased_behind("u", whose[0], 0, at(1, 6)));
        assert!(map.erased_after("t", whose[0], 1_000_000 + CALENDARS_APART_MS));
        assert!(!map.erased_after("t", whose[0], 1_000_001 + CALENDARS_APART_MS));
        assert!(!map.erased_after("t", whose[1], 0));
        let all = map.begin_erasure("t", &subject("ana", ""), "l", 1_000_000)?;
        assert!(whose[..2].iter().all(|whose| all.erased_after("t", *whose, 0)));
        assert!(!all.erased_after("t", whose[2], 0));
        Ok(())
    }
}
