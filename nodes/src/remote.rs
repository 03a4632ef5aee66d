//! A group's replicas on other nodes, as a router asks them: whoever does not answer is found out and gone round.

use crate::error::Error;
use crate::groups::GroupId;
use crate::ledger::{Proposed, left, propose_at, read_position_at};
use crate::peers::Peers;
use crate::proto::internal::Body;
use crate::standing::Standing;
use crate::views::{Answered, Ask, Freshness, Query};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use sim::time::{Duration, Instant};
use std::sync::Arc;
use storage::codec;
use storage::model::{Command, Outcome, Position};
use storage::slots::SlotSet;

/// A write that has waited so long makes its edge ask who leads now, and again after each such time.
const DOUBT_AFTER: Duration = Duration::from_millis(300);
/// How long a replica may take to say that it leads.
const LEADS_WITHIN: Duration = Duration::from_millis(250);
/// A suspect is asked again after this, and then after twice as long each time, up to the other.
const PROBE_FIRST: Duration = Duration::from_millis(250);
const PROBE_LAST: Duration = Duration::from_secs(2);
const PROBE_WITHIN: Duration = Duration::from_millis(500);

/// The replicas of other nodes.
#[derive(Clone)]
pub struct Remote {
    peers: Peers,
    group: GroupId,
    standing: Arc<Standing>,
}

/// What one replica said to a question.
enum Said {
    Answer(Answered),
    /// Whoever is asked would say so.
    Final(Error),
    /// Another one may know more.
    Nothing(Error),
}

impl Remote {
    /// Of the replicas the first so many are near.
    pub fn new(peers: Peers, group: GroupId, replicas: Vec<String>, near: usize) -> Remote {
        Remote { peers, group, standing: Arc::new(Standing::new(replicas, near, Ask::KINDS)) }
    }

    /// The same nodes, asked of another group.
    pub fn of(&self, group: GroupId) -> Remote {
        Remote { group, ..self.clone() }
    }

    pub fn addrs(&self) -> &[String] {
        &self.standing.addrs
    }

    /// Whether the first of them is trusted.
    pub fn is_trusted(&self) -> bool {
        self.standing.is_trusted(0)
    }

    fn any(&self) -> Vec<usize> {
        self.standing.order(sim::rand::below(self.standing.addrs.len().max(1) as u64) as usize)
    }

    async fn ask_one(&self, replica: usize, query: &Query, ttl: Duration) -> Said {
        let addr = &self.standing.addrs[replica];
        let mut query = query.clone();
        query.wait_ms = ttl.as_millis() as u64;
        let body = Body { body: codec::encode(&query).into(), group: self.group, epoch: 0 };
        let mut client = match self.peers.client(addr) {
            Ok(client) => client,
            Err(error) => return Said::Final(Error::Internal(error.to_string())),
        };
        match sim::time::timeout(ttl, client.query(self.peers.request(body, ttl))).await {
            Ok(Ok(reply)) => match codec::decode(&reply.into_inner().body) {
                Ok(answered) => Said::Answer(answered),
                Err(error) => Said::Final(Error::Internal(error.to_string())),
            },
            Ok(Err(status)) if crate::error::reason(&status).as_deref() == Some("LOST_IN_FAILOVER") => {
                let asked = match query.freshness {
                    Freshness::AtLeast(position) => position,
                    _ => Position::default(),
                };
                Said::Final(Error::LostInFailover { epoch: asked.epoch, index: asked.index })
            }
            Ok(Err(status)) if crate::error::reason(&status).as_deref() == Some("NOT_HERE") => {
                Said::Final(Error::NotHere(status.message().to_string()))
            }
            Ok(Err(status)) if crate::error::reason(&status).as_deref() == Some("NOT_YET_VISIBLE") => {
                Said::Nothing(Error::NotYetVisible)
            }
            Ok(Err(status)) => Said::Nothing(Error::Unavailable(format!("{addr}: {}", status.message()))),
            Err(_) => Said::Nothing(Error::Unavailable(format!("{addr} did not answer in time"))),
        }
    }

    /// Nobody asks it any more until it answers what a reader would ask.
    fn suspected(&self, replica: usize) {
        sim::info!("{} does not answer as it should: others are asked", self.standing.addrs[replica]);
        let (peers, group, standing) = (self.peers.clone(), self.group, Arc::downgrade(&self.standing));
        sim::task::spawn(async move {
            let mut pause = PROBE_FIRST;
            // Every replica answers this, whatever its roles.
            let (ask, needs) = (Ask::Slots, SlotSet::default());
            let query = Query { freshness: Freshness::Strong, wait_ms: 0, ask, needs };
            loop {
                sim::time::sleep(pause).await;
                pause = (pause * 2).min(PROBE_LAST);
                // Nobody asks for it any more: the map has changed.
                let Some(standing) = standing.upgrade() else { return };
                let this = Remote { peers: peers.clone(), group, standing };
                if let Said::Answer(_) = this.ask_one(replica, &query, PROBE_WITHIN).await {
                    this.standing.clear(replica);
                    return sim::info!("{} answers again", this.standing.addrs[replica]);
                }
            }
        });
    }

    /// Whether a trusted replica other than `than` confirms that it leads.
    async fn other_leader(&self, than: usize) -> Option<usize> {
        let others = self.any().into_iter().filter(|at| *at != than && self.standing.is_trusted(*at));
        let mut asked: FuturesUnordered<_> = others
            .map(|at| async move {
                let addr = &self.standing.addrs[at];
                let read = read_position_at(&self.peers, self.group, addr, LEADS_WITHIN);
                sim::time::timeout(LEADS_WITHIN, read).await.is_ok_and(|r| r.is_ok()).then_some(at)
            })
            .collect();
        while let Some(found) = asked.next().await {
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Proposes at a replica; gives up once another one has been found to lead, since then its answer may never come.
    async fn propose_at(&self, replica: usize, body: bytes::Bytes, ttl: Duration) -> Proposed {
        let body = Body { body, group: self.group, epoch: 0 };
        let mut proposed = std::pin::pin!(propose_at(&self.peers, &self.standing.addrs[replica], body, ttl));
        loop {
            sim::select! {
                proposed = &mut proposed => return proposed,
                () = sim::time::sleep(DOUBT_AFTER) => {}
            }
            sim::select! {
                proposed = &mut proposed => return proposed,
                other = self.other_leader(replica) => if let Some(other) = other {
                    self.standing.leads(Some(other));
                    if self.standing.suspect(replica) {
                        self.suspected(replica);
                    }
                    return Proposed::Unknown("another replica leads now".into());
                },
            }
        }
    }

    /// Proposes wherever the leader is. Repeats only attempts that certainly did nothing.
    pub async fn propose(
        &self,
        mut commands: Vec<Command>,
        deadline: Instant,
    ) -> Result<Vec<Outcome>, Error> {
        let mut body = bytes::Bytes::from(codec::encode(&commands));
        let (mut hint, mut pause, mut turn, mut not_here) = (None, Duration::from_millis(5), 0, 0);
        loop {
            let left = left(deadline, || Error::Unavailable("no leader took the write in time".into()))?;
            let order = self.any();
            let hinted = hint.take().or(self.standing.leader());
            let replica = hinted.or_else(|| order.get(turn % order.len().max(1)).copied());
            let replica = replica.ok_or_else(|| Error::Unavailable("no replica is known".into()))?;
            match self.propose_at(replica, body.clone(), left).await {
                Proposed::Done(outcomes) => {
                    self.standing.leads(Some(replica));
                    // So long that the caller gives up on a write that took place, and asks again.
                    sim::rand::buggify_wait("answer to a write", 0.01, Duration::from_secs(4)).await;
                    return Ok(outcomes);
                }
                Proposed::Unknown(_) if sim::planted!("repeat-an-uncertain-write-without-its-key") => {
                    commands.iter_mut().for_each(|command| command.idempotency_key.clear());
                    body = codec::encode(&commands).into();
                }
                Proposed::Unknown(cause) => {
                    self.standing.leads(None);
                    return Err(Error::OutcomeUnknown(cause));
                }
                Proposed::Overloaded(cause) => return Err(Error::Overloaded(cause)),
                // All of them say so: the map that led here is old.
                Proposed::NotHere => {
                    self.standing.leads(None);
                    (turn, not_here) = (turn + 1, not_here + 1);
                    if not_here >= self.standing.addrs.len() {
                        return Err(Error::NotHere("no node that the map names has a replica".into()));
                    }
                }
                // A follower may still name the one that everybody else has given up.
                Proposed::NotLeader(leader) => {
                    self.standing.leads(None);
                    let leader = leader.and_then(|addr| self.standing.place(&addr));
                    hint = leader.filter(|at| *at != replica && self.standing.is_trusted(*at));
                    turn += 1;
                }
            }
            sim::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// Asks the one at `addr`, which should lead, whether the other region has a position by then.
    pub async fn elsewhere_at(
        &self,
        addr: &str,
        position: Position,
        deadline: Instant,
    ) -> Result<bool, Error> {
        let unavailable = |what: &dyn std::fmt::Display| Error::Unavailable(format!("{addr}: {what}"));
        let ttl = left(deadline, || Error::NotYetVisible)?;
        let body = codec::encode(&(position, ttl.as_millis() as u64)).into();
        let body = Body { body, group: self.group, epoch: 0 };
        let mut client = self.peers.client(addr).map_err(|e| unavailable(&e))?;
        let asked = sim::time::timeout(ttl, client.elsewhere(self.peers.request(body, ttl))).await;
        let answer = asked.map_err(|e| unavailable(&e))?.map_err(|status| unavailable(&status.message()))?;
        codec::decode(&answer.into_inner().body).map_err(|e| Error::Internal(e.to_string()))
    }

    /// Asks the first of them alone; `None` if it has no answer that soon.
    pub async fn first(&self, query: &Query, within: Duration) -> Option<Answered> {
        match self.ask_one(0, query, within).await {
            Said::Answer(answered) => return Some(answered),
            Said::Final(_) | Said::Nothing(Error::NotYetVisible) => {}
            Said::Nothing(_) => {
                if self.standing.suspect(0) {
                    self.suspected(0);
                }
            }
        }
        None
    }

    /// Asks one replica, and the next one too when the first takes long or cannot say.
    pub async fn query(&self, query: &Query, deadline: Instant) -> Result<Answered, Error> {
        let kind = query.ask.kind();
        let mut waiting = self.any().into_iter();
        let mut asked = FuturesUnordered::new();
        let mut under_way: Vec<(usize, Instant)> = vec![];
        let mut last = Error::Unavailable("no replica is known".into());
        let mut patience = self.standing.patience(kind);
        let mut next = waiting.next();
        loop {
            let left = left(deadline, || last.clone())?;
            if let Some(replica) = next.take() {
                let (this, query, at) = (self.clone(), query.clone(), Instant::now());
                asked.push(async move { (replica, at, this.ask_one(replica, &query, left).await) });
                under_way.push((replica, at));
            }
            let more = waiting.len() > 0;
            sim::select! {
                said = asked.next() => match said {
                    None => return Err(last),
                    Some((replica, at, Said::Answer(answered))) => {
                        self.standing.answered(replica, kind, at.elapsed());
                        for (other, _) in under_way.into_iter().take_while(|(other, _)| *other != replica) {
                            if self.standing.beaten(other) {
                                self.suspected(other);
                            }
                        }
                        return Ok(answered);
                    }
                    Some((_, _, Said::Final(error))) => return Err(error),
                    Some((_, _, Said::Nothing(error))) => {
                        last = error;
                        next = waiting.next();
                    }
                },
                () = sim::time::sleep(patience.min(left)) => {
                    if more {
                        self.standing.hedged();
                        next = waiting.next();
                    }
                    patience = crate::standing::FAIL_OVER_AFTER;
                }
            }
        }
    }
}
