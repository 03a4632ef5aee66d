//! Liveness: whoever leads the control group hears from every node of the map, and the map says who is down.
//!
//! ```text
//!   leader of the control group ── are you there? (every [`BEAT`]) ──► each node
//!                               ◄── yes: its lease is renewed ──
//!   lease run out ─► down: given nothing more ── unheard for long ─► lost: its replicas go to others
//!   heard again   ─► up
//! ```
//!
//! Nothing that must be right depends on it: ledgers find out by themselves who leads, and replicas refuse what is not theirs. It keeps new
//! replicas off a dead node, keeps caches that are down out of reads, and gives a shard its third replica back while nobody is awake.
//!
//! What can go wrong:
//! - *The leader of the control group is cut off or dies.* The next one gives every node a whole lease first, and leaves it what the map says until it has heard it, or
//!   waited for as long. Leases are counted on its own monotonic clock, so calendars that step do no harm.
//! - *A node is alive, but the leader does not reach it.* It is called down, and goes on. If that lasts, its
//!   replicas go to others, one after the other, each only once its successor has caught up.
//! - *Most nodes are down.* Nothing is moved that has nowhere to go; what has lost its majority waits for it.
//! - *A lost node comes back.* It is up, keeps what was not yet given away, and closes the rest.

use super::Control;
use super::map::{Liveness, NodeEntry, NodeId};
use crate::groups::{CONTROL, Groups};
use crate::peers::Peers;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use openraft::async_runtime::WatchReceiver;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;

/// How often each node is asked, and how long it has for its answer.
const BEAT: Duration = Duration::from_secs(1);

/// A leader whose majority has not answered for longer may be one no more.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(3);

/// After which silence a node is what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub down_after: Duration,
    /// `None`: its replicas stay until an operator drains it.
    pub lost_after: Option<Duration>,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { down_after: Duration::from_secs(5), lost_after: Some(Duration::from_secs(600)) }
    }
}

impl Patience {
    fn judge(&self, silence: Duration) -> Liveness {
        match self.lost_after {
            Some(lost_after) if silence >= lost_after.max(self.down_after) => Liveness::Lost,
            _ if silence >= self.down_after => Liveness::Down,
            _ => Liveness::Up,
        }
    }
}

/// What the leader knows of a node.
#[derive(Clone, Copy)]
struct Heard {
    /// When it was heard last, or since when it has not been.
    at: Instant,
    ever: bool,
}

impl Heard {
    /// What is to be said of a node of which the map says `known`.
    fn judge(&self, patience: &Patience, known: Liveness) -> Liveness {
        let judged = patience.judge(self.at.elapsed());
        if self.ever { judged } else { judged.max(known) }
    }
}

pub struct Watch {
    pub control: Control,
    pub groups: Groups,
    pub peers: Peers,
    pub patience: Patience,
}

impl Watch {
    /// Watches for ever; only the leader of the control group does anything.
    pub async fn keep(self) {
        // Empty while another one leads.
        let mut heard: BTreeMap<NodeId, Heard> = BTreeMap::new();
        loop {
            let began = Instant::now();
            if self.groups.get(CONTROL).is_some_and(|replica| replica.ledger.raft.is_leader()) {
                self.look(&mut heard).await;
            } else {
                heard.clear();
            }
            time::sleep_until(began + BEAT).await;
        }
    }

    /// Whether a majority of the control group has followed this node a moment ago.
    fn leads_still(&self) -> bool {
        let Some(replica) = self.groups.get(CONTROL) else { return false };
        let metrics = replica.ledger.raft.metrics().borrow_watched().clone();
        let acked = metrics.last_quorum_acked.is_some_and(|at| at.elapsed() <= FOLLOWED_WITHIN);
        acked || metrics.membership_config.membership().voter_ids().count() == 1
    }

    async fn look(&self, heard: &mut BTreeMap<NodeId, Heard>) {
        let map = self.control.map();
        heard.retain(|node, _| map.nodes.contains_key(node));
        let unheard = Heard { at: Instant::now(), ever: false };
        for node in map.nodes.keys() {
            heard.entry(*node).or_insert(unheard);
        }
        // Each hears at the same time how new the map is, from a leader that is one still: who is cut off from it then knows that its own may be old.
        let version = if self.leads_still() { map.version } else { 0 };
        let mut asked: FuturesUnordered<_> = map
            .nodes
            .iter()
            .map(|(id, node)| async move { (*id, self.peers.is_there(&node.addr, version, BEAT).await) })
            .collect();
        while let Some((node, is_there)) = asked.next().await {
            if is_there {
                heard.insert(node, Heard { at: Instant::now(), ever: true });
            }
        }
        let judged = |(id, node): (&NodeId, &NodeEntry)| {
            Some((*id, heard.get(id)?.judge(&self.patience, node.liveness)))
        };
        let found: BTreeMap<NodeId, Liveness> = map.nodes.iter().filter_map(judged).collect();
        let changed = map.heard(&found);
        if changed == *map {
            return;
        }
        for (id, node) in &changed.nodes {
            match (node.liveness, map.nodes.get(id).map(|before| before.liveness)) {
                (now, Some(before)) if now == before => {}
                (Liveness::Up, _) => sim::info!("node {id} at {} is there again", node.addr),
                (Liveness::Down, _) => {
                    sim::trace::probe("control: a node is down");
                    sim::warn!(
                        "node {id} at {} has been silent for {:?}",
                        node.addr,
                        self.patience.down_after
                    );
                }
                (Liveness::Lost, _) => {
                    sim::trace::probe("control: a node is lost");
                    sim::warn!("node {id} at {} is lost: its replicas go to others", node.addr);
                }
            }
        }
        // Whoever no longer leads cannot write it.
        if let Err(error) = self.control.update(|map| Ok(map.heard(&found)), Instant::now() + BEAT * 2).await
        {
            sim::debug!("who is down is not written: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_judged_by_how_long_it_lasts() {
        use Liveness::*;
        let patience = Patience::default();
        let judge = |seconds| patience.judge(Duration::from_secs(seconds));
        assert_eq!([0, 4, 5, 599, 600].map(judge), [Up, Up, Down, Down, Lost]);
        // Who has just begun to lead knows of a node what the map says.
        let unheard = Heard { at: Instant::now(), ever: false };
        let heard = Heard { ever: true, ..unheard };
        assert_eq!([Up, Down, Lost].map(|known| unheard.judge(&patience, known)), [Up, Down, Lost]);
        assert_eq!([Up, Down, Lost].map(|known| heard.judge(&patience, known)), [Up; 3]);
        let never = Patience { lost_after: None, ..patience };
        assert_eq!(never.judge(Duration::from_secs(1 << 20)), Down);
    }
}
