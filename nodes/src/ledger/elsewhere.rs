//! What the other region has of a shard's ledger: how far it lags, and waiting for it.
//!
//! The leader knows of each replica how much is on its disk, since openraft counts an answer only when its fsync has returned. The other region *has* an entry when a
//! majority of its replicas does: a failover reads all of them but one, so it finds the entry.
//!
//! **Lag** is the age of the oldest entry that it has not, by the leader's monotonic clock. Every replica notes when the ledger's end was where, so a new
//! leader knows how old is what it finds. What was there before its process began is as old as its commands say, by the calendars of those who wrote them
//! and this one's; where that is purged, it may be older than anybody knows. If a leader hears nothing of the other region, that may lack all of it. After a
//! failover nobody there has a replica of the new epoch yet: it counts from when that began here.

use super::state_machine::decode_batch;
use super::{Ledger, left, log_store};
use crate::error::Error;
use crate::groups::name_of;
use crate::reach::ELSEWHERE_WITHIN;
use crate::roles::Role;
use openraft::async_runtime::WatchReceiver;
use sim::time::{Duration, Instant};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use storage::log::{Log, LogError};
use storage::model::{Position, UnixMs};

/// How often the lag is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// While there is no other region.
const LOOK_FOR_ANOTHER: Duration = Duration::from_secs(5);
/// Moments that are remembered; while the other region is away for longer, they lie further apart.
const MOMENTS_MAX: usize = 1024;
/// A new leader has heard from the other region by then, or does not hear of it.
const HEARD_WITHIN: Duration = Duration::from_secs(2);
/// How often somebody is warned of the same lag.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The lag, as it was seen last; `None` while this replica does not lead, has just begun to and not heard of the other region yet, or there is none.
#[derive(Clone, Default)]
pub struct Lag(Arc<Mutex<Option<Seen>>>);

#[derive(Clone, Copy)]
struct Seen {
    lag: Duration,
    /// It may be more: the oldest entries are purged here, and nobody noted when they came.
    at_least: bool,
}

impl Lag {
    pub fn get(&self) -> Option<Duration> {
        self.seen().map(|seen| seen.lag)
    }

    fn seen(&self) -> Option<Seen> {
        *self.0.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn set(&self, seen: Option<Seen>) {
        *self.0.lock().unwrap_or_else(|p| p.into_inner()) = seen;
    }
}

/// When the ledger's end was where.
#[derive(Default)]
struct Moments(VecDeque<(u64, Instant)>);

impl Moments {
    /// The last entry is `last`; those behind it, if there were any, were another leader's, and are cut.
    fn note(&mut self, last: u64, now: Instant) {
        while self.0.back().is_some_and(|(end, _)| *end > last) {
            self.0.pop_back();
        }
        if self.0.back().is_none_or(|(end, _)| *end < last) {
            self.0.push_back((last, now));
        }
        if self.0.len() > MOMENTS_MAX {
            // Every second one: a lag is then told a little later than it is, never sooner than half of the distance.
            let mut at = 0;
            self.0.retain(|_| {
                at += 1;
                at % 2 == 1
            });
        }
    }

    /// The age of the oldest entry behind `has`.
    fn lag(&mut self, has: u64, now: Instant) -> Duration {
        while self.0.front().is_some_and(|(end, _)| *end <= has) {
            self.0.pop_front();
        }
        self.0.front().map_or(Duration::ZERO, |(_, since)| now - *since)
    }
}

/// What the log held when this process began: nobody here noted when it came.
struct Inherited {
    log: Arc<Log>,
    last: u64,
    /// The entry that was looked at, and since when it is there at the latest.
    seen: Option<(u64, Instant)>,
}

impl Inherited {
    /// Entries that are looked at for one with commands.
    const LOOK_AT: u64 = 64;
    const LOOK_AT_BYTES: usize = 256 << 10;

    /// Since when the oldest entry behind `has` is there, if it is of these; and whether older ones are, or were.
    async fn oldest_behind(&mut self, has: u64) -> (Option<Instant>, bool) {
        if has >= self.last {
            return (None, false);
        }
        let first = (has + 1).max(self.log.first_index());
        let purged = first > has + 1;
        if let Some((_, since)) = self.seen.filter(|(index, _)| *index == first) {
            return (Some(since), purged);
        }
        let (log, range) = (self.log.clone(), first..self.last.min(first + Self::LOOK_AT) + 1);
        let read = sim::task::blocking(move || log.read(range, Self::LOOK_AT_BYTES)).await;
        let (now, today) = (Instant::now(), sim::time::calendar_ms());
        let written = read.map(|entries| entries.iter().find_map(|(_, bytes)| written(bytes)));
        let age = match written {
            Ok(at) => {
                at.map_or(Duration::ZERO, |at| Duration::from_millis(today.saturating_sub(at).max(0) as u64))
            }
            // Cut or purged meanwhile; damage is found by whoever needs the entry.
            Err(LogError::Missing { .. } | LogError::Corrupt { .. }) => return (None, true),
            Err(error) => {
                sim::warn!("how old the ledger's entry {first} is cannot be read: {error}");
                return (None, true);
            }
        };
        let since = now - age;
        self.seen = Some((first, since));
        (Some(since), purged)
    }
}

/// When the first of an entry's commands was made.
fn written(entry: &[u8]) -> Option<UnixMs> {
    let batch = decode_batch(&log_store::decode_entry(entry).ok()?).ok()??;
    Some(batch.commands.first()?.now)
}

/// How long a write waits at most while the other region lags.
const THROTTLE_MAX: Duration = Duration::from_millis(500);

/// How long a write waits at a lag of which `max` is too much; `None`: it is refused.
fn throttle(seen: Seen, max: Duration) -> Option<Duration> {
    let half = max / 2;
    let share = seen.lag.saturating_sub(half).as_secs_f64() / half.as_secs_f64().max(1e-3);
    (seen.lag < max && !seen.at_least).then(|| THROTTLE_MAX.mul_f64(share))
}

impl Ledger {
    /// Slows a write down, or refuses it, if that was configured and the other region lags too far.
    pub(super) async fn throttled(&self) -> Result<(), String> {
        let Some(max) = self.rights.lag_max() else { return Ok(()) };
        // A leader that is new may have writes that the other region lacks; one that restarts again and again is new each time.
        let known_by = Instant::now() + HEARD_WITHIN + LOOK * 2;
        let seen = loop {
            match self.lag.seen() {
                Some(seen) => break seen,
                None if !self.raft.is_leader() => return Ok(()),
                None if Instant::now() < known_by => sim::time::sleep(LOOK / 4).await,
                None => return Err("what the other region lacks is not known yet".into()),
            }
        };
        let Some(wait) = throttle(seen, max) else {
            sim::trace::probe("region: a write refused, since the other region lags too far");
            return Err(format!(
                "the other region lacks the writes of the last {:.0?}{}, and more than {max:.0?} must not be lost: \
                 writes go on when it has caught up",
                seen.lag,
                if seen.at_least { " or more" } else { "" }
            ));
        };
        if !wait.is_zero() {
            sim::trace::probe("region: a write slowed down, since the other region lags");
            sim::time::sleep(wait).await;
        }
        Ok(())
    }

    /// What a majority of the other region's replicas has on disk; `None` if there are none. Only on the leader.
    fn had_elsewhere(&self) -> Option<u64> {
        let elsewhere = self.rights.elsewhere();
        let metrics = self.raft.metrics();
        let seen = metrics.borrow_watched();
        let replication = seen.replication.as_ref()?;
        let mut has: Vec<u64> = replication
            .iter()
            .filter(|(node, _)| elsewhere.contains(node))
            .map(|(_, has)| has.as_ref().map_or(0, |id| log_store::position_index(id.index)))
            .collect();
        has.sort_unstable_by_key(|has| std::cmp::Reverse(*has));
        // Of as many as there are to be, when they have not all joined yet.
        let replicas = has.len().max(elsewhere.len().min(Role::Ledger.policy().replicas));
        has.get(replicas / 2).copied()
    }

    /// How many entries the other region's majority lacks. Only on the leader.
    pub fn lacking_elsewhere(&self) -> Result<u64, Error> {
        if !self.raft.is_leader() {
            return Err(Error::Unavailable("this replica does not lead".into()));
        }
        let has = self.had_elsewhere();
        let has = has.ok_or_else(|| Error::Unavailable("the other region has no replica yet".into()))?;
        Ok(self.reached().saturating_sub(has))
    }

    /// Waits until the other region has a position; false if there is none, or the time is up. A region that has been away for a while is not waited for by every
    /// write anew. Only on the leader.
    pub async fn elsewhere_here(&self, position: Position, deadline: Instant) -> Result<bool, Error> {
        let mut metrics = self.raft.metrics();
        let patience = ELSEWHERE_WITHIN.saturating_sub(self.lag.get().unwrap_or_default());
        let deadline = deadline.min(Instant::now() + patience);
        loop {
            if !self.raft.is_leader() {
                return Err(Error::Unavailable("this replica does not lead".into()));
            }
            // What another epoch's leader wrote is its to know.
            if position.epoch != self.epoch() {
                return Ok(false);
            }
            match self.had_elsewhere() {
                Some(has) if has >= position.index => return Ok(true),
                None => return Ok(false),
                Some(_) if sim::planted!("call-region-durable-what-is-only-on-its-way") => return Ok(true),
                Some(_) => {}
            }
            let Ok(left) = left(deadline, || Error::NotYetVisible) else { return Ok(false) };
            match sim::time::timeout(left, metrics.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Error::Unavailable("the ledger stopped".into())),
                Err(_) => return Ok(false),
            }
        }
    }

    /// Looks at the lag for ever, and warns of it.
    pub(super) async fn watch_lag(self) {
        let mut inherited = Inherited { last: self.log.last_index(), log: self.log.clone(), seen: None };
        let (mut moments, mut warned, mut leads_since) = (Moments::default(), None::<Instant>, None);
        let mut pause = LOOK;
        while !self.stopping.load(std::sync::atomic::Ordering::SeqCst) {
            self.rest_until(Instant::now() + pause).await;
            pause = if self.rights.elsewhere().is_empty() { LOOK_FOR_ANOTHER } else { LOOK };
            if self.rights.elsewhere().is_empty() {
                moments = Moments::default();
                self.lag.set(None);
                continue;
            }
            moments.note(self.reached(), Instant::now());
            if !self.raft.is_leader() {
                leads_since = None;
                self.lag.set(None);
                continue;
            }
            let leads_for = leads_since.get_or_insert_with(Instant::now).elapsed();
            let has = self.had_elsewhere();
            if has == Some(0) && leads_for < HEARD_WITHIN {
                self.lag.set(None);
                continue;
            }
            let (since, at_least) = match has {
                Some(has) => inherited.oldest_behind(has).await,
                None => (None, false),
            };
            let now = Instant::now();
            let noted = moments.lag(has.unwrap_or(0), now);
            let lag = since.map_or(noted, |since| noted.max(now - since));
            self.lag.set(Some(Seen { lag, at_least }));
            let again = warned.is_none_or(|at| at.elapsed() >= WARN_EVERY);
            if lag >= self.rights.lag_warned() && again {
                warned = Some(Instant::now());
                sim::trace::probe("region: the lag is worth a warning");
                sim::error!(
                    "{}: the other region lacks writes of the last {lag:.0?}, or has not said that it has them: were this region lost now, they would be too; look at the link between them",
                    name_of(self.group)
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::types::{Data, Entry, LogId, Types};
    use openraft::EntryPayload;
    use openraft::alias::LeaderIdOf;
    use openraft::entry::RaftEntry;
    use openraft::vote::RaftLeaderId;
    use storage::codec;
    use storage::log::LogOptions;
    use storage::model::{Batch, Command, Operation};

    #[test]
    fn writes_are_slowed_down_from_half_of_what_may_be_lost_and_refused_at_all_of_it() {
        let ms = Duration::from_millis;
        let exactly = |lag| Seen { lag: ms(lag), at_least: false };
        let waits: Vec<Option<u128>> = [0, 500, 600, 750, 999, 1000, 5000]
            .map(|lag| throttle(exactly(lag), ms(1000)).map(|wait| wait.as_millis()))
            .into();
        assert_eq!(waits, [Some(0), Some(0), Some(100), Some(250), Some(499), None, None]);
        assert_eq!(throttle(exactly(0), ms(0)), None);
        assert_eq!(throttle(Seen { at_least: true, ..exactly(0) }, ms(1000)), None);
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_entry_that_is_missing() {
        let Ok(began) = sim::task::run_test(async { Instant::now() }) else { panic!("no world") };
        let at = |ms| began + Duration::from_millis(ms);
        let mut moments = Moments::default();
        let mut lag = |last, has, ms| {
            moments.note(last, at(ms));
            moments.lag(has, at(ms)).as_millis()
        };
        assert_eq!(lag(5, 5, 0), 0);
        assert_eq!(lag(9, 5, 200), 0);
        assert_eq!(lag(12, 8, 400), 200, "9 is there since 200");
        assert_eq!(lag(12, 9, 600), 200, "12 is there since 400");
        assert_eq!(lag(12, 9, 900), 500);
        assert_eq!(lag(12, 12, 1000), 0);
        for ms in 0..5000 {
            lag(13 + ms, 12, 1000 + ms);
        }
        let end = lag(5013, 12, 6000);
        assert!((4900..=5000).contains(&end), "{end}");
        // One that did not lead has noted what it finds when it does; what was cut does not count.
        let mut moments = Moments::default();
        for (last, ms) in [(5, 0), (7, 200), (9, 400), (8, 600)] {
            moments.note(last, at(ms));
        }
        assert_eq!(moments.lag(5, at(700)), Duration::from_millis(500));
        assert_eq!(moments.lag(7, at(700)), Duration::from_millis(100));
        assert_eq!(moments.lag(8, at(700)), Duration::ZERO);
    }

    #[test]
    fn what_was_there_before_a_start_is_as_old_as_its_commands() -> Result<(), Box<dyn std::error::Error>> {
        let command = |now| Command {
            tenant: "t".into(),
            slot: None,
            idempotency_key: String::new(),
            request_hash: [0; 16],
            now,
            operation: Operation::Touch(vec![]),
        };
        let ages = sim::task::run_test(async move {
            let disk: Arc<dyn sim::disk::Disk> = sim::disk::simulated::SimDisk::new(1);
            let log = Arc::new(Log::open(disk, "log", LogOptions::default())?);
            let today = sim::time::calendar_ms();
            // Entries 1 to 5: one without commands first, then of 9, 7 and 5 seconds ago, and one of tomorrow.
            let made: [Option<i64>; 5] = [None, Some(-9_000), Some(-7_000), Some(-5_000), Some(86_400_000)];
            let leader = LeaderIdOf::<Types>::new(1, 1).to_committed();
            for (index, ago) in (1..).zip(made) {
                let commands = ago.map(|ago| command(today + ago)).into_iter().collect();
                let data = Data(codec::encode(&Batch { commands }).into());
                let entry = Entry::new(LogId::new(leader, index - 1), EntryPayload::Normal(data));
                log.append(&[(index, &log_store::encode_entry(&entry))])?;
            }
            let mut inherited = Inherited { last: log.last_index(), log, seen: None };
            let mut ages = vec![];
            for has in [0, 1, 1, 2, 3, 4, 5, 9] {
                let (since, purged) = inherited.oldest_behind(has).await;
                ages.push((since.map(|since| since.elapsed().as_secs_f64().round() as u64), purged));
            }
            Ok::<_, storage::log::LogError>(ages)
        })??;
        let ages_s: Vec<Option<u64>> = ages.iter().map(|(age_s, _)| *age_s).collect();
        assert_eq!(ages_s, [Some(9), Some(9), Some(9), Some(7), Some(5), Some(0), None, None]);
        assert!(ages.iter().all(|(_, purged)| !purged));
        Ok(())
    }
}
