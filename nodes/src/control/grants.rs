//! The grantor: whoever leads the control group renews the primary region's right to write, and grants the next epoch ([`super::lease`]).
//!
//! It begins to lead by writing its term into the record. What it remembers beside that, when the lease runs out, is in memory only: the next leader waits a
//! whole lease instead.

use super::Control;
use super::lease::{
    Answer, Ask, Entry, Grantor, GrantorEffect, GrantorEvent, HolderId, Ms, Record, Settings, Term,
};
use super::rights::Renewed;
use crate::error::Error;
use crate::groups::{CONTROL, Groups};
use sim::time::{self, Duration, Instant};
use std::sync::{Arc, Mutex, MutexGuard};

/// How often a node looks whether it leads the control group.
const LOOK: Duration = Duration::from_millis(100);
/// One step's time.
const STEP: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub struct Grants {
    control: Control,
    groups: Groups,
    began: Instant,
    state: Arc<Mutex<Option<Leading>>>,
}

/// This node leads the control group.
struct Leading {
    settings: Settings,
    /// The ledger's term, in which it leads.
    raft_term: u64,
    grantor: Grantor,
}

/// What became of a wish for the next epoch.
#[derive(Clone, Debug, PartialEq)]
pub enum Granted {
    /// Nothing is granted for so long.
    Wait(Duration),
    /// This epoch was granted.
    Epoch(u64),
}

impl Grants {
    pub fn new(control: Control, groups: Groups) -> Grants {
        Grants { control, groups, began: Instant::now(), state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, Option<Leading>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn now(&self) -> Ms {
        self.began.elapsed().as_millis() as Ms
    }

    /// The term of the ledger in which this node leads the control group.
    fn raft_term(&self) -> Option<u64> {
        let ledger = self.groups.get(CONTROL)?.ledger;
        ledger.raft.is_leader().then(|| ledger.term())
    }

    /// Begins to grant when this node begins to lead, for ever.
    pub async fn keep(self) {
        if !self.control.has_regions().await {
            return;
        }
        loop {
            let leads = self.raft_term();
            let known = self.state().as_ref().map(|leading| leading.raft_term);
            if known.is_some() && leads != known {
                *self.state() = None;
            }
            let policy = self.control.map().regions.as_ref().map(|regions| regions.policy.lease());
            if let (Some(raft_term), Some(settings)) = (leads, policy)
                && leads != known
                && let Err(error) = self.begin(raft_term, settings).await
            {
                sim::debug!("nothing can be granted yet: {error}");
            }
            time::sleep(LOOK).await;
        }
    }

    async fn begin(&self, raft_term: u64, settings: Settings) -> Result<(), Error> {
        let deadline = Instant::now() + STEP;
        let read = self.control.lease(deadline).await?;
        let lead = Entry::Lead { term: read.0.term + 1 };
        let Some(record) = self.control.enter(&lead, Some(read), deadline).await? else {
            return Err(Error::Unavailable("another one leads the control group".into()));
        };
        let mut grantor = Grantor::leads(&settings, record, self.now());
        if sim::planted!("grant-without-waiting-for-the-lease") {
            grantor.runs_out = 0;
        }
        *self.state() = Some(Leading { settings, raft_term, grantor });
        Ok(())
    }

    /// Hands an event to the grantor; what is to be done then, and in which term.
    fn on(&self, event: GrantorEvent) -> Option<(Vec<GrantorEffect>, Term)> {
        let mut state = self.state();
        let leading = state.as_mut()?;
        let (grantor, effects) = leading.grantor.on(&leading.settings, event, self.now());
        leading.grantor = grantor;
        if sim::planted!("grant-without-waiting-for-the-lease") {
            leading.grantor.runs_out = 0;
        }
        let term = leading.grantor.record.term;
        if effects.contains(&GrantorEffect::Deposed) {
            *state = None;
        }
        Some((effects, term))
    }

    fn not_leader(&self) -> Renewed {
        let leader = self.groups.get(CONTROL).and_then(|replica| replica.ledger.leader());
        Renewed::NotLeader(leader.map(|(_, addr)| addr))
    }

    /// Answers a node that asks for the right to write.
    pub async fn renew(&self, ask: Ask) -> Renewed {
        let Some((effects, term)) = self.on(GrantorEvent::Asked(ask)) else { return self.not_leader() };
        let deadline = Instant::now() + STEP;
        for effect in effects {
            match effect {
                GrantorEffect::Propose { entry, then: Some(answer) } => {
                    sim::rand::buggify_wait("between a renewal and its record", 0.05, Duration::from_secs(2))
                        .await;
                    if let Ok(Some(record)) = self.control.enter(&entry, None, deadline).await {
                        self.on(GrantorEvent::Read(record));
                        return self.granted_now(answer);
                    }
                }
                GrantorEffect::Confirm { then } => {
                    sim::rand::buggify_wait("between a renewal and its record", 0.05, Duration::from_secs(2))
                        .await;
                    if let Ok((record, _)) = self.control.lease(deadline).await {
                        let confirmed = (record.term, record.epoch) == (term, then.epoch);
                        self.on(GrantorEvent::Read(record));
                        if confirmed {
                            return self.granted_now(then);
                        }
                    }
                }
                GrantorEffect::Refuse { epoch, .. } => return Renewed::Refused { epoch },
                _ => {}
            }
        }
        self.not_leader()
    }

    fn granted_now(&self, answer: Answer) -> Renewed {
        Renewed::Granted { answer, lag_max: self.control.map().lag_max() }
    }

    /// Lets the present epoch run out; how long that still takes, if it does.
    pub fn prepare(&self, holder: HolderId) -> Result<Option<Duration>, Error> {
        let (effects, _) = self.on(GrantorEvent::Prepared(holder)).ok_or_else(not_yet)?;
        Ok(self.waits(&effects))
    }

    /// It is not to run out after all; whether it does not.
    pub fn withdraw(&self) -> bool {
        let heard = self.on(GrantorEvent::Withdrawn).is_some();
        heard && self.state().as_ref().is_some_and(|leading| leading.grantor.next.is_none())
    }

    fn waits(&self, effects: &[GrantorEffect]) -> Option<Duration> {
        effects.iter().find_map(|effect| match effect {
            GrantorEffect::Wait { until } => Some(Duration::from_millis(until.saturating_sub(self.now()))),
            _ => None,
        })
    }

    /// Grants the next epoch to a region, unless it has one after `epoch` already. `leap`: so many are left out.
    pub async fn grant(&self, holder: HolderId, epoch: u64, leap: u64) -> Result<Granted, Error> {
        let deadline = Instant::now() + STEP;
        let (record, version) = self.control.lease(deadline).await?;
        if record.epoch > epoch + leap && record.holder == Some(holder) {
            return Ok(self.granted(record));
        }
        let (effects, _) = self.on(GrantorEvent::Wanted(holder)).ok_or_else(not_yet)?;
        if let Some(wait) = self.waits(&effects) {
            return Ok(Granted::Wait(wait));
        }
        for effect in effects {
            let GrantorEffect::Propose { mut entry, .. } = effect else { continue };
            if let Entry::Next { epoch, .. } = &mut entry {
                *epoch += leap;
            }
            let Some(record) = self.control.enter(&entry, Some((record, version)), deadline).await? else {
                return Err(Error::Unavailable("another one leads the control group".into()));
            };
            return Ok(self.granted(record));
        }
        Err(not_yet())
    }

    fn granted(&self, record: Record) -> Granted {
        let granted = Granted::Epoch(record.epoch);
        self.on(GrantorEvent::Read(record));
        granted
    }
}

fn not_yet() -> Error {
    Error::Unavailable("this node does not lead the control group, or only begins to".into())
}
