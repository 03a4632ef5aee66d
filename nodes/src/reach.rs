//! Reaching a group: its replica in this process if there is one, else those of other nodes ([`crate::remote`]).

use crate::error::Error;
use crate::groups::{GroupId, Groups, Replica, name_of};
use crate::ledger::left;
use crate::remote::Remote;
use crate::roles::{self, Role};
use crate::views::{Answered, Ask, Query};
use sim::time::{Duration, Instant};
use storage::model::{Command, Outcome, Position};

/// What is kept of a caller's time, so that the reason arrives and not only a deadline.
const RESERVE: Duration = Duration::from_millis(20);

/// How long a write waits for the other region; one that takes longer is away.
pub const ELSEWHERE_WITHIN: Duration = Duration::from_secs(2);

/// The way to one group.
#[derive(Clone)]
pub struct Reach {
    pub groups: Groups,
    pub group: GroupId,
    /// Its replicas elsewhere.
    /// What a replica must have to be asked.
    pub needs: &'static [Role],
    pub remote: Remote,
}

impl Reach {
    fn unknown(&self) -> Error {
        let group = name_of(self.group);
        if self.needs.is_empty() {
            return Error::NotHere(format!("no replica of {group} is known"));
        }
        Error::Unavailable(format!(
            "no node with the role {} has a replica of {group}; join one",
            roles::names(self.needs).join(" and ")
        ))
    }

    /// The replica in this process, if it can answer.
    pub fn here(&self, ask: &Ask) -> Option<Replica> {
        self.groups.get(self.group).filter(|replica| replica.views.answers(ask))
    }

    /// Asks the views. A replica of this process that cannot answer in half of the time is helped by the others. `NotHere`: the
    /// caller's map is not the replica's.
    pub async fn query(&self, mut query: Query, deadline: Instant) -> Result<Answered, Error> {
        let time = left(deadline, || Error::NotYetVisible)?.saturating_sub(RESERVE);
        let others = !self.remote.addrs().is_empty();
        if let Some(replica) = self.here(&query.ask) {
            let share = if others { time / 2 } else { time };
            query.wait_ms = share.as_millis() as u64;
            match replica.views.query(query.clone()).await {
                Err(Error::Unavailable(_) | Error::NotYetVisible) if others => {
                    sim::trace::probe("read: asked elsewhere, this replica lags");
                }
                answered => return answered,
            }
        }
        if !others {
            return Err(self.unknown());
        }
        self.remote.query(&query, deadline - RESERVE).await
    }

    /// Waits until the other region has a position; false if the time is up before that. An error: nobody who leads says so.
    pub async fn elsewhere(&self, position: Position, deadline: Instant) -> Result<bool, Error> {
        let deadline = (deadline - RESERVE * 2).min(Instant::now() + ELSEWHERE_WITHIN);
        let replica = self.groups.get(self.group);
        let mut leader = None;
        if let Some(replica) = replica {
            if let Ok(has) = replica.ledger.elsewhere_here(position, deadline).await {
                return Ok(has);
            }
            leader = replica.ledger.leader().map(|(_, addr)| addr);
        }
        let mut last = self.unknown();
        for addr in leader.iter().chain(self.remote.addrs()) {
            match self.remote.elsewhere_at(addr, position, deadline).await {
                Ok(has) => return Ok(has),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Proposes commands wherever the leader is.
    pub async fn propose(&self, commands: Vec<Command>, deadline: Instant) -> Result<Vec<Outcome>, Error> {
        match self.groups.get(self.group) {
            Some(replica) if replica.ledger.has_begun() || self.remote.addrs().is_empty() => {
                replica.ledger.propose(commands, deadline).await
            }
            None if self.remote.addrs().is_empty() => Err(self.unknown()),
            // One that does not know yet who leads in a new epoch is of no use.
            _ => self.remote.propose(commands, deadline).await,
        }
    }
}
