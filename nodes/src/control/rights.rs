//! A node's part of its region's right to write ([`super::lease`]): asked for every quarter of its span, checked with every write.
//!
//! Every node of the primary region asks for itself, so the voters of a ledger need not trust its leader: they refuse entries when their own clock
//! says that the right has run out. In a cluster without regions, and in the control group, everything is allowed at all times.
//!
//! What can go wrong: *the leader of the control group is not reached*: the right runs out, and this node takes no write until it has it again; *the answer comes late*: it
//! counts from the question; *this node is paused between a check and what follows*: the leader of a ledger checks again before it acknowledges.

use super::Control;
use super::lease::{Answer, Ask, Epoch, HolderId, Index, Leased, Ms, Outcome, Refusal};
use super::map::{ClusterMap, NodeId};
use crate::groups::{CONTROL, Groups};
use crate::peers::Peers;
use crate::proto::internal::Body;
use futures::stream::{FuturesUnordered, StreamExt};
use serde::{Deserialize, Serialize};
use sim::time::{self, Duration, Instant};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use storage::codec;

/// A renewal is asked for so many times in its span.
const TIMES_IN_SPAN: u64 = 4;
/// How long whoever leads the control group may take for its answer. When all its nodes are asked, half of the span is left to them: a slow link, too, renews it.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// What the control group says to a renewal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Renewed {
    Granted {
        answer: Answer,
        /// As the newest map has it: the asker's may be one from before it started.
        lag_max: Option<Duration>,
    },
    /// The address of who leads, if it is known.
    NotLeader(Option<String>),
    /// Another region has the right, or is about to.
    Refused { epoch: Epoch },
}

#[derive(Clone)]
pub struct Rights(Arc<Inner>);

struct Inner {
    began: Instant,
    state: Mutex<State>,
}

struct State {
    /// `None`: everything is allowed.
    leased: Option<Leased>,
    /// Nodes with replicas in the region that takes no writes.
    elsewhere: BTreeSet<NodeId>,
    /// The lag at which somebody is warned.
    lag_warned: Duration,
    /// The lag at which writes are refused.
    lag_max: Option<Duration>,
    incarnation: u64,
}

impl Rights {
    /// Of a node; `limited`: it may write nothing before it has asked.
    pub fn new(limited: bool) -> Rights {
        let incarnation = sim::rand::below(u64::MAX);
        Rights::begin(incarnation, limited.then(|| Leased::starts(0, incarnation)))
    }

    /// For what needs no right.
    pub fn free() -> Rights {
        Rights::begin(0, None)
    }

    fn begin(incarnation: u64, leased: Option<Leased>) -> Rights {
        let (elsewhere, lag_warned) = (BTreeSet::new(), Duration::MAX);
        let state = Mutex::new(State { leased, elsewhere, lag_warned, lag_max: None, incarnation });
        Rights(Arc::new(Inner { began: Instant::now(), state }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn now(&self) -> Ms {
        self.0.began.elapsed().as_millis() as Ms
    }

    /// Takes over what a newer map says, before replicas are opened by it.
    pub fn follow_map(&self, map: &ClusterMap, node: NodeId) {
        let mut state = self.state();
        let Some(regions) = &map.regions else { return };
        let holder = regions.holder(map.region_of(node));
        let incarnation = state.incarnation;
        let other = |held: &Leased| holder.is_some_and(|holder| held.id != holder);
        if state.leased.as_ref().is_none_or(other) {
            state.leased = Some(Leased::starts(holder.unwrap_or(HolderId::MAX), incarnation));
        }
        state.elsewhere = map.elsewhere();
        state.lag_warned = Duration::from_millis(regions.policy.lag_warned_ms());
    }

    pub fn elsewhere(&self) -> BTreeSet<NodeId> {
        self.state().elsewhere.clone()
    }

    pub fn lag_warned(&self) -> Duration {
        self.state().lag_warned
    }

    pub fn lag_max(&self) -> Option<Duration> {
        self.state().lag_max
    }

    /// Whether entries of an epoch may be appended, up to `index`.
    pub fn may_append(&self, epoch: Epoch, index: Index) -> Result<(), Refusal> {
        let now = self.now();
        let Some(leased) = &self.state().leased else { return Ok(()) };
        match leased.may_append(index, now)? {
            held if held == epoch || sim::planted!("append-under-another-epochs-lease") => Ok(()),
            _ => Err(Refusal::Superseded(epoch)),
        }
    }

    /// Whether reads of an epoch may be confirmed.
    pub fn holds(&self, epoch: Epoch) -> Result<(), Refusal> {
        self.may_append(epoch, 0)
    }

    /// What the caller may be told of an entry that a majority has.
    pub fn outcome(&self, epoch: Epoch, index: Index) -> Outcome {
        let now = self.now();
        match &self.state().leased {
            Some(leased) if !sim::planted!("acknowledge-after-the-lease-ran-out") => {
                leased.outcome(epoch, index, now)
            }
            _ => Outcome::Acknowledged,
        }
    }

    /// Asks for the right, for ever, while this node's region is the primary.
    pub async fn keep(
        self,
        node: NodeId,
        control: Control,
        groups: Groups,
        peers: Peers,
        voters: Vec<String>,
    ) {
        let mut maps = control.watch();
        let mut leader: Option<String> = None;
        loop {
            let map = maps.borrow_and_update().clone();
            self.follow_map(&map, node);
            let Some(regions) = map.regions.as_ref().filter(|r| r.primary == map.region_of(node)) else {
                if maps.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let pause = Duration::from_millis(regions.policy.lease_ms / TIMES_IN_SPAN);
            let reached = groups.shards().iter().map(|replica| replica.ledger.reached()).max().unwrap_or(0);
            let patience = Duration::from_millis(regions.policy.lease_ms / 2).max(ASK_WITHIN);
            let asked = self.ask((&peers, patience), &voters, &mut leader, reached).await;
            if !asked {
                sim::debug!("the right to write is not renewed");
            }
            let wait = if asked { pause } else { (pause / 4).min(Duration::from_millis(250)) };
            sim::select! {
                () = time::sleep(wait) => {}
                changed = maps.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Whether the control group renewed it. Asked is who led it last; where that one does not lead any more, all its nodes at once: some may be dead, and each
    /// of those would take all its time.
    async fn ask(
        &self,
        (peers, patience): (&Peers, Duration),
        voters: &[String],
        leader: &mut Option<String>,
        reached: Index,
    ) -> bool {
        // What is granted counts from the question.
        let question = || self.state().leased.as_ref().map(|leased| leased.ask(reached, self.now()));
        let (mut asked, mut next) = (BTreeSet::new(), leader.take());
        while let Some(addr) = next.take().filter(|addr| asked.insert(addr.clone())) {
            let Some(ask) = question() else { return false };
            match renew_at(peers, &addr, &ask, ASK_WITHIN).await {
                Some(Renewed::NotLeader(other)) => next = other,
                Some(answer) => {
                    *leader = Some(addr);
                    return self.answered(answer);
                }
                None => {}
            }
        }
        let Some(ask) = question() else { return false };
        let others = voters.iter().filter(|addr| !asked.contains(*addr));
        let ask = &ask;
        let mut answers: FuturesUnordered<_> =
            others.map(|addr| async move { (addr, renew_at(peers, addr, ask, patience).await) }).collect();
        while let Some((addr, answer)) = answers.next().await {
            if let Some(answer @ (Renewed::Granted { .. } | Renewed::Refused { .. })) = answer {
                *leader = Some(addr.clone());
                return self.answered(answer);
            }
        }
        false
    }

    /// Takes over what whoever leads the control group said; whether that renews it.
    fn answered(&self, renewed: Renewed) -> bool {
        match renewed {
            Renewed::Granted { answer, lag_max } => {
                let mut state = self.state();
                state.lag_max = lag_max;
                state.leased = state.leased.as_ref().map(|leased| leased.answered(&answer));
                true
            }
            Renewed::Refused { epoch } => {
                sim::debug!("epoch {epoch} is another region's, or is about to end");
                false
            }
            Renewed::NotLeader(_) => false,
        }
    }
}

async fn renew_at(peers: &Peers, addr: &str, ask: &Ask, within: Duration) -> Option<Renewed> {
    let body = Body { body: codec::encode_serde(ask).into(), group: CONTROL, epoch: 0 };
    let mut client = peers.client(addr).ok()?;
    let asked = time::timeout(within, client.renew(peers.request(body, within))).await;
    codec::decode_serde(&asked.ok()?.ok()?.into_inner().body).ok()
}
