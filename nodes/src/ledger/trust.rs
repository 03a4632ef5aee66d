//! Which leaders a replica follows that has forgotten its term.
//!
//! A replica keeps its term on its disk, so that it takes nothing from a leader once it has voted for a later one. With the disk that goes too. Were it to follow
//! whoever comes first, it could be a leader that was cut off since before the disk was lost, with entries under way: with this replica's copy those would
//! be on a majority again, and committed a second time, in the places of what the later leader has acknowledged with this replica's help.
//!
//! ```text
//!   leader of term 4 ── append ──► replica with an empty disk ── what do you know? ──► leader: term 4; 1, 2 and 3 vote
//!                    ◄─ refused ──                            ── what do you know? ──► the third: term 5   ──► refused still
//!                                                                                      or term 4 or less   ──► followed
//! ```
//!
//! **Why that is enough.** A later leader was elected, before this replica asked, by a majority of the voters, this one perhaps among them. Any majority *without* it shares
//! another voter with that one, who has not forgotten. So a majority that knows no later term says that there was none. Who votes is what the leader
//! in question counts by: between that and the voters of a later one lies a change of voters that needed a majority of the former. Later leaders need not be asked about:
//! this replica does not vote before it is repaired or filled ([`super::recovery`]), so they are elected by others, of whom one has what this replica acknowledges now.
//! Viewstamped Replication's recovery asks as many, for the same reason (Liskov and Cowling, 2012).
//!
//! **When it waits.** Of three, with one disk lost, the other two must answer: while one is down, a leader that has only this replica beside it commits nothing. It goes on
//! when that one is there again, or is lost by the map ([`crate::control::liveness`]); the control group, whose map cannot be read then, when it is recovered
//! ([`crate::control::recover`]). If more replicas forgot at once, no majority remembers. What they acknowledged together is lost in any case, so it is enough then that
//! all answer and none knows a later term.

use super::types::Vote;
use super::{Ledger, recovery};
use crate::groups::{CONTROL, name_of};
use crate::proto::internal::{Message, Method};
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use sim::sync::Notify;
use sim::time::{Duration, Instant};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use storage::codec;

/// The fact that the term is forgotten; until everything is back.
pub const TERM_LOST: &str = "term-lost";

/// How long the others may take to say what they know.
const ASK: Duration = Duration::from_millis(500);
/// How often the log says what is waited for.
const TELL: Duration = Duration::from_secs(10);

/// From which term on a replica follows leaders.
pub struct Trust {
    from: AtomicU64,
    asking: AtomicBool,
    told: Mutex<Option<Instant>>,
}

impl Trust {
    pub fn new(forgot: bool) -> Trust {
        Trust {
            from: AtomicU64::new(if forgot { u64::MAX } else { 0 }),
            asking: AtomicBool::new(false),
            told: Mutex::new(None),
        }
    }

    /// The term is forgotten: no leader is followed before others have vouched for one, and they are not asked before [`Trust::may_ask`].
    pub fn forget(&self) {
        self.asking.store(true, Ordering::SeqCst);
        self.from.store(u64::MAX, Ordering::SeqCst);
    }

    pub fn may_ask(&self) {
        self.asking.store(false, Ordering::SeqCst);
    }

    fn holds(&self, term: u64) -> bool {
        term >= self.from.load(Ordering::SeqCst) || sim::planted!("follow-any-leader-after-forgetting")
    }

    fn forgets(&self) -> bool {
        self.from.load(Ordering::SeqCst) == u64::MAX
    }
}

/// What the others' answers show of this replica's own past.
///
/// One that takes its group for new asks for votes. An answer that names a later vote of its own says that it had another disk before. No other answer is counted then:
/// openraft would go on with what it asked for.
#[derive(Clone, Default)]
pub struct Past {
    /// This replica takes its group for new.
    pub is_new: Arc<AtomicBool>,
    /// The last term that it asked votes for.
    asked: Arc<AtomicU64>,
    /// A later vote was named. Until it has everything back.
    named: Arc<AtomicBool>,
    told: Arc<Notify>,
}

impl Past {
    pub fn new(is_new: bool) -> Past {
        Past { is_new: Arc::new(AtomicBool::new(is_new)), ..Past::default() }
    }

    /// Called before votes are asked for.
    pub fn asks(&self, vote: &Vote) {
        self.asked.fetch_max(vote.leader_id.term, Ordering::SeqCst);
    }

    /// Whether an answer may be counted.
    pub fn check(&self, asked: &Vote, answered: &Vote) -> Result<(), &'static str> {
        let itself = asked.leader_id.node_id == answered.leader_id.node_id;
        // In a term that it has asked for it may have been elected since.
        let later = answered.leader_id.term > self.asked.load(Ordering::SeqCst);
        if itself && later && self.is_new.load(Ordering::SeqCst) {
            self.named.store(true, Ordering::SeqCst);
            self.told.notify_one();
        }
        match self.named.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err("this replica has voted before, with a disk that it no longer has"),
        }
    }

    pub fn has_all_back(&self) {
        self.named.store(false, Ordering::SeqCst);
    }
}

/// What a replica knows of its group.
#[derive(Debug, Serialize, Deserialize)]
pub struct Knows {
    term: u64,
    /// It has forgotten nothing.
    remembers: bool,
    /// Who votes, and their addresses; while that changes, before and after.
    voters: Vec<BTreeMap<u64, String>>,
}

/// What is known of a voter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Knows {
        term: u64,
        remembers: bool,
    },
    /// It is lost by the map.
    Lost,
}

#[derive(Debug, PartialEq, Eq)]
enum Doubt {
    Later { node: u64, term: u64 },
    Silent(Vec<u64>),
}

/// Whether what the voters said lets `own` follow a leader of `term`.
fn judge(term: u64, own: u64, voters: &[Vec<u64>], said: &BTreeMap<u64, Said>) -> Result<(), Doubt> {
    let later = said.iter().find_map(|(node, said)| match said {
        Said::Knows { term: known, .. } if *known > term => Some(Doubt::Later { node: *node, term: *known }),
        _ => None,
    });
    later.map_or(Ok(()), Err)?;
    for voters in voters.iter().filter(|voters| voters.contains(&own)) {
        let others = || voters.iter().filter(|node| **node != own);
        let silent: Vec<u64> = others().filter(|node| !said.contains_key(node)).copied().collect();
        let sure =
            |node: &&u64| matches!(said.get(node), Some(Said::Lost | Said::Knows { remembers: true, .. }));
        if others().filter(sure).count() <= voters.len() / 2 && !silent.is_empty() {
            return Err(Doubt::Silent(silent));
        }
    }
    Ok(())
}

impl Ledger {
    /// What this replica tells another one that has forgotten.
    pub(super) async fn knows(&self) -> Result<Knows, String> {
        // From openraft's own task: metrics may be a moment older than a vote that was given.
        let asked = self.raft.with_raft_state(|state| {
            (state.vote_ref().leader_id.term, state.membership_state.effective().clone())
        });
        let (term, membership) = asked.await.map_err(|e| e.to_string())?;
        let addr = |id: &u64| (*id, membership.get_node(id).map(|n| n.addr.clone()).unwrap_or_default());
        let voters = membership.get_joint_config().iter().map(|ids| ids.iter().map(addr).collect()).collect();
        let remembers =
            self.may_vote().is_ok() && !self.past.is_new.load(Ordering::SeqCst) && !self.trust.forgets();
        Ok(Knows { term, remembers, voters })
    }

    /// Whether this replica takes what a leader of that term sends.
    pub(super) fn may_follow(&self, term: u64) -> Result<(), String> {
        match self.trust.holds(term) {
            true => Ok(()),
            false => {
                Err("this replica has forgotten its term, and nobody has vouched for this leader's yet"
                    .into())
            }
        }
    }

    /// As [`Ledger::may_follow`]; if not, asks the others about it. `lost`: the nodes that are lost by the map.
    pub(super) fn follows(
        &self,
        leader: (u64, String),
        lost: impl FnOnce() -> Vec<u64>,
    ) -> Result<(), String> {
        let follows = self.may_follow(leader.0);
        if follows.is_err() && self.trust.forgets() && !self.trust.asking.swap(true, Ordering::SeqCst) {
            let (ledger, lost) = (self.clone(), lost());
            sim::task::spawn(async move {
                ledger.ask_about(leader, lost).await;
                ledger.trust.may_ask();
            });
        }
        follows
    }

    async fn ask_about(&self, (term, addr): (u64, String), lost: Vec<u64>) {
        let group = name_of(self.group);
        let why = match self.vouched(term, &addr, &lost).await {
            Ok(()) => {
                self.trust.from.store(term, Ordering::SeqCst);
                sim::trace::probe("replica: forgot its term, and others vouched for a leader");
                return sim::info!("{group}: follows {addr}: no voter knows a leader after term {term}");
            }
            Err(why) => why,
        };
        sim::trace::probe("replica: forgot its term, and nobody vouches for a leader yet");
        let mut told = self.trust.told.lock().unwrap_or_else(|p| p.into_inner());
        if told.is_none_or(|told| told.elapsed() > TELL) {
            *told = Some(Instant::now());
            sim::warn!(
                "{group}: this replica's disk is new, and takes nothing from the leader at {addr} in term {term} yet: {why}"
            );
        }
    }

    /// Waits until another one's answer shows that this replica has forgotten.
    pub(super) async fn hear_of_its_past(self) {
        let named = async {
            while !self.past.named.load(Ordering::SeqCst) {
                self.past.told.notified().await;
            }
        };
        sim::select! {
            () = named => self.has_forgotten(recovery::FOUNDED + 1),
            () = self.stopped.notified() => {}
        }
    }

    async fn ask_one(&self, addr: &str) -> Result<Knows, String> {
        let (group, epoch) = (self.group, self.held.epoch);
        let message = Message { group, epoch, method: Method::Knows.into(), ..Message::default() };
        let answer = self.peers.tell(addr, message, ASK).await?;
        codec::decode_serde(&answer).map_err(|e| e.to_string())
    }

    async fn vouched(&self, term: u64, addr: &str, lost: &[u64]) -> Result<(), String> {
        let leader = self.ask_one(addr).await?;
        if leader.term != term {
            return Err(format!("it is in term {} itself", leader.term));
        }
        let own = *self.raft.node_id();
        let addrs: BTreeMap<u64, String> =
            leader.voters.iter().flatten().map(|(id, addr)| (*id, addr.clone())).collect();
        let asked = addrs.iter().filter(|(id, _)| **id != own);
        let answers = join_all(asked.map(|(id, addr)| async move { (*id, self.ask_one(addr).await) })).await;
        let said = answers.into_iter().filter_map(|(id, answer)| match answer {
            Ok(Knows { term, remembers, .. }) => Some((id, Said::Knows { term, remembers })),
            Err(_) => lost.contains(&id).then_some((id, Said::Lost)),
        });
        let voters: Vec<Vec<u64>> =
            leader.voters.iter().map(|voters| voters.keys().copied().collect()).collect();
        judge(term, own, &voters, &said.collect()).map_err(|doubt| match doubt {
            Doubt::Later { node, term } => format!("node {node} knows of term {term}"),
            Doubt::Silent(nodes) => {
                let at = |node: &u64| format!("node {node} at {}", addrs.get(node).map_or("", String::as_str));
                let nodes = nodes.iter().map(at).collect::<Vec<_>>().join(", ");
                let then = match self.group {
                    CONTROL => "loci control recover",
                    _ => "it goes on when the map says so",
                };
                format!("{nodes} may know of a later leader and does not answer; start it; if it is lost for good: {then}")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Said::Lost;
    use openraft::vote::RaftLeaderId;

    fn knows(term: u64) -> Said {
        Said::Knows { term, remembers: true }
    }

    fn forgot(term: u64) -> Said {
        Said::Knows { term, remembers: false }
    }

    fn of(voters: &[&[u64]], said: &[(u64, Said)]) -> Result<(), Doubt> {
        let voters: Vec<Vec<u64>> = voters.iter().map(|voters| voters.to_vec()).collect();
        judge(4, 1, &voters, &said.iter().copied().collect())
    }

    #[test]
    fn a_leader_is_followed_once_a_majority_of_the_others_knows_no_later_one() {
        assert_eq!(of(&[&[1, 2, 3]], &[(2, knows(4)), (3, knows(3))]), Ok(()));
        assert_eq!(of(&[&[1, 2, 3]], &[(2, knows(4))]), Err(Doubt::Silent(vec![3])));
        assert_eq!(
            of(&[&[1, 2, 3]], &[(2, knows(4)), (3, knows(5))]),
            Err(Doubt::Later { node: 3, term: 5 })
        );
        assert_eq!(of(&[&[1, 2, 3, 4, 5]], &[(2, knows(4)), (3, knows(4))]), Err(Doubt::Silent(vec![4, 5])));
        assert_eq!(of(&[&[1, 2, 3, 4, 5]], &[(2, knows(4)), (3, knows(4)), (4, knows(0))]), Ok(()));
        assert_eq!(of(&[&[1, 2]], &[(2, knows(4))]), Ok(()), "nobody else was ever asked");
    }

    #[test]
    fn who_has_forgotten_cannot_vouch_but_can_warn() {
        assert_eq!(of(&[&[1, 2, 3, 4]], &[(2, knows(4)), (3, forgot(0))]), Err(Doubt::Silent(vec![4])));
        assert_eq!(
            of(&[&[1, 2, 3]], &[(2, knows(4)), (3, forgot(5))]),
            Err(Doubt::Later { node: 3, term: 5 })
        );
        assert_eq!(of(&[&[1, 2, 3]], &[(2, knows(4)), (3, forgot(0))]), Ok(()), "nobody is left to ask");
    }

    #[test]
    fn a_later_vote_of_its_own_tells_a_replica_that_it_has_forgotten() {
        let vote = |term, node, committed| {
            let id = openraft::alias::LeaderIdOf::<crate::ledger::types::Types>::new(term, node);
            Vote { leader_id: id, committed }
        };
        let past = Past::new(true);
        past.asks(&vote(1, 2, false));
        past.asks(&vote(2, 2, false));
        for answered in [vote(1, 2, false), vote(2, 2, true), vote(1, 2, true), vote(3, 3, true)] {
            assert_eq!(past.check(&vote(1, 2, false), &answered), Ok(()), "{answered}");
        }
        for later in [vote(3, 2, true), vote(3, 2, false)] {
            assert!(past.check(&vote(2, 2, false), &later).is_err(), "{later}");
            assert!(past.check(&vote(2, 2, false), &vote(2, 2, false)).is_err(), "nor does one for it count");
            past.has_all_back();
        }
    }

    #[test]
    fn who_is_lost_is_not_waited_for() {
        assert_eq!(of(&[&[1, 2, 3]], &[(2, knows(4)), (3, Lost)]), Ok(()));
    }

    #[test]
    fn while_voters_change_both_majorities_are_asked() {
        let voters: [&[u64]; 2] = [&[1, 2, 3], &[1, 4, 5]];
        assert_eq!(of(&voters, &[(2, knows(4)), (3, knows(4)), (4, knows(4))]), Err(Doubt::Silent(vec![5])));
        assert_eq!(of(&voters, &[(2, knows(4)), (3, knows(4)), (4, knows(4)), (5, knows(4))]), Ok(()));
        assert_eq!(of(&[&[2, 3, 4]], &[(2, knows(4))]), Ok(()), "one that does not vote counts for nothing");
    }
}
