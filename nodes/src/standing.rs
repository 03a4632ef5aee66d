//! What an edge without replicas of its own knows of those that it asks: who leads, who does not answer, and how long answers take.
//!
//! A replica is *suspected* after [`STRIKES_MAX`] questions in a row that another one answered first, though that was asked later, or when it was
//! found deposed while it kept a write waiting. Nobody asks a suspect while there are others; it is cleared by a probe, which asks what a reader
//! would ask. A suspicion costs nothing but balance, so it may be wrong.
//!
//! ```text
//! trusted ── strikes in a row, or deposed ──► suspected ── a probe is answered ──► trusted
//! ```
//!
//! Hedges: a read that has waited for longer than 95 of 100 do is asked of a second replica as well. They come out of a budget of
//! [`HEDGE_SHARE`] of all reads, so that a cluster that is slow everywhere is not asked twice as much.

use sim::time::Duration;
use std::collections::VecDeque;
use std::sync::Mutex;

/// Questions in a row that others answered first.
pub const STRIKES_MAX: u32 = 3;
/// Hedges, as a share of reads.
pub const HEDGE_SHARE: f64 = 0.1;
/// Hedges that may be saved up.
const HEDGES_SAVED_MAX: f64 = 20.0;
/// So many near ones are asked before a far one.
const NEAR_FIRST: usize = 2;
/// Answers that say how long they take.
const SAMPLE: usize = 128;
/// Until so many answers have come, nobody knows.
const SAMPLE_MIN: usize = 20;
const HEDGE_AFTER_UNKNOWN: Duration = Duration::from_millis(50);
const HEDGE_AFTER_MIN: Duration = Duration::from_millis(2);
/// After so long another replica is asked, budget or not: that is no hedge, but failing over.
pub const FAIL_OVER_AFTER: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug, Default)]
struct Replica {
    strikes: u32,
    suspected: bool,
}

/// The state, without I/O or clock.
#[derive(Debug)]
struct State {
    replicas: Vec<Replica>,
    leader: Option<usize>,
    hedges: f64,
    /// By kind of question, the last answers' times.
    took: Vec<VecDeque<Duration>>,
}

/// Shared by everything at this edge that asks replicas. They are known by their place in `addrs`.
#[derive(Debug)]
pub struct Standing {
    pub addrs: Vec<String>,
    /// The first so many are near: the others are asked when those do not answer.
    near: usize,
    state: Mutex<State>,
}

impl Standing {
    /// Of the replicas at `addrs`, of which the first `near` are near, and which are asked so many kinds of questions.
    pub fn new(addrs: Vec<String>, near: usize, kinds: usize) -> Standing {
        let replicas = vec![Replica::default(); addrs.len()];
        let (leader, hedges, took) = (None, HEDGES_SAVED_MAX, vec![VecDeque::new(); kinds]);
        Standing { addrs, near, state: Mutex::new(State { replicas, leader, hedges, took }) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Whom to ask, best first: all of them, those that are trusted before the others, of those the near ones, each group beginning at `turn`. Whoever has not been answered by two
    /// of the near ones asks a far one next: what is near may be behind as a whole, as a region is that comes back.
    pub fn order(&self, turn: usize) -> Vec<usize> {
        let state = self.state();
        let count = state.replicas.len().max(1);
        let mut order: Vec<usize> = (0..state.replicas.len()).map(|at| (at + turn) % count).collect();
        order.sort_by_key(|at| (state.replicas[*at].suspected, *at >= self.near));
        let far = order.iter().position(|at| *at >= self.near && !state.replicas[*at].suspected);
        if let Some(far) = far.filter(|far| *far > NEAR_FIRST) {
            order[NEAR_FIRST..=far].rotate_right(1);
        }
        order
    }

    pub fn is_trusted(&self, replica: usize) -> bool {
        self.state().replicas.get(replica).is_some_and(|r| !r.suspected)
    }

    pub fn place(&self, addr: &str) -> Option<usize> {
        self.addrs.iter().position(|known| known == addr)
    }

    /// Who took the last write, unless suspected.
    pub fn leader(&self) -> Option<usize> {
        let state = self.state();
        state.leader.filter(|at| !state.replicas[*at].suspected)
    }

    pub fn leads(&self, replica: Option<usize>) {
        self.state().leader = replica;
    }

    /// It answered a question of a kind, so long after it was asked.
    pub fn answered(&self, replica: usize, kind: usize, took: Duration) {
        let mut state = self.state();
        state.replicas[replica].strikes = 0;
        let sample = &mut state.took[kind];
        if sample.len() == SAMPLE {
            sample.pop_front();
        }
        sample.push_back(took);
    }

    /// Another one, asked later, answered first. True if it is suspected from now on.
    pub fn beaten(&self, replica: usize) -> bool {
        let mut state = self.state();
        let replica = &mut state.replicas[replica];
        replica.strikes += 1;
        replica.strikes >= STRIKES_MAX && !std::mem::replace(&mut replica.suspected, true)
    }

    /// True if it was not suspected before.
    pub fn suspect(&self, replica: usize) -> bool {
        !std::mem::replace(&mut self.state().replicas[replica].suspected, true)
    }

    pub fn clear(&self, replica: usize) {
        self.state().replicas[replica] = Replica::default();
    }

    /// A read begins: how long it waits for its first answer before another replica is asked too.
    pub fn patience(&self, kind: usize) -> Duration {
        let mut state = self.state();
        state.hedges = (state.hedges + HEDGE_SHARE).min(HEDGES_SAVED_MAX);
        if state.hedges < 1.0 {
            return FAIL_OVER_AFTER;
        }
        let mut took: Vec<Duration> = state.took[kind].iter().copied().collect();
        if took.len() < SAMPLE_MIN {
            return HEDGE_AFTER_UNKNOWN;
        }
        took.sort_unstable();
        took[took.len() * 95 / 100].clamp(HEDGE_AFTER_MIN, FAIL_OVER_AFTER)
    }

    /// A second replica was asked because the first one took long.
    pub fn hedged(&self) {
        let mut state = self.state();
        state.hedges = (state.hedges - 1.0).max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Standing {
        Standing::new(["a:1", "b:1", "c:1"].map(String::from).to_vec(), 3, 1)
    }

    #[test]
    fn suspects_are_asked_last_and_never_lead() {
        let standing = three();
        standing.leads(standing.place("b:1"));
        assert_eq!((standing.order(1), standing.leader()), (vec![1, 2, 0], Some(1)));
        assert!(standing.suspect(1) && !standing.suspect(1));
        assert_eq!((standing.order(1), standing.leader()), (vec![2, 0, 1], None));
        standing.clear(1);
        assert_eq!((standing.order(1), standing.leader()), (vec![1, 2, 0], Some(1)));
    }

    #[test]
    fn a_far_one_is_asked_after_two_near_ones() {
        let addrs = ["a:1", "b:1", "c:1", "x:1", "y:1"].map(String::from).to_vec();
        let standing = Standing::new(addrs, 3, 1);
        assert_eq!(standing.order(1), [1, 2, 3, 0, 4]);
        standing.suspect(3);
        assert_eq!(standing.order(0), [0, 1, 4, 2, 3]);
        standing.suspect(0);
        standing.suspect(1);
        assert_eq!(standing.order(0), [2, 4, 0, 1, 3]);
    }

    #[test]
    fn strikes_count_in_a_row_and_an_answer_forgives_them() {
        let standing = three();
        assert!(!standing.beaten(2) && !standing.beaten(2));
        standing.answered(2, 0, Duration::from_millis(1));
        assert!(!standing.beaten(2) && !standing.beaten(2) && standing.is_trusted(2));
        assert!(standing.beaten(2) && !standing.is_trusted(2));
        assert!(!standing.beaten(2), "it was suspected already");
    }

    #[test]
    fn hedges_wait_for_the_slowest_twentieth_and_stay_within_their_budget() {
        let standing = three();
        assert_eq!(standing.patience(0), HEDGE_AFTER_UNKNOWN);
        (1..=100).for_each(|ms| standing.answered(0, 0, Duration::from_millis(ms)));
        assert_eq!(standing.patience(0), Duration::from_millis(96));
        let mut hedged = 0;
        for _ in 0..1000 {
            if standing.patience(0) < FAIL_OVER_AFTER {
                standing.hedged();
                hedged += 1;
            }
        }
        assert!((100..=121).contains(&hedged), "{hedged} of 1000 reads were hedged");
    }
}
