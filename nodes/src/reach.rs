//! Reaching a group: its replica in this process if there is one, else those of other nodes ([`crate::remote`]).

use crate::error::Error;
use crate::groups::{GroupId, Groups, name_of};
use crate::ledger::left;
use crate::remote::Remote;
use crate::views::{Answered, Query};
use sim::time::{Duration, Instant};
use storage::model::{Command, Outcome};

/// What is kept of a caller's time, so that the reason arrives and not only a deadline.
const RESERVE: Duration = Duration::from_millis(20);

/// The way to one group.
#[derive(Clone)]
pub struct Reach {
    pub groups: Groups,
    pub group: GroupId,
    /// Its replicas elsewhere.
    pub remote: Remote,
}

impl Reach {
    fn unknown(&self) -> Error {
        Error::NotHere(format!("no replica of {} is known", name_of(self.group)))
    }

    /// Asks the views. A replica of this process that cannot answer in half of the time is helped by the others. `NotHere`: the
    /// caller's map is not the replica's.
    pub async fn query(&self, mut query: Query, deadline: Instant) -> Result<Answered, Error> {
        let time = left(deadline, || Error::NotYetVisible)?.saturating_sub(RESERVE);
        let others = !self.remote.addrs().is_empty();
        if let Some(replica) = self.groups.get(self.group) {
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

    /// Proposes commands wherever the leader is.
    pub async fn propose(&self, commands: Vec<Command>, deadline: Instant) -> Result<Vec<Outcome>, Error> {
        match self.groups.get(self.group) {
            Some(replica) => replica.ledger.propose(commands, deadline).await,
            None if self.remote.addrs().is_empty() => Err(self.unknown()),
            None => self.remote.propose(commands, deadline).await,
        }
    }
}
