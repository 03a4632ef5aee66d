//! Leases and fencing: a right that runs out by itself, so that nobody has to reach its holder to take it away.
//!
//! The control group grants a holder an **epoch**: for as long as its **lease** runs, the holder alone may append and acknowledge. The
//! holder renews it; if it cannot, it stops by its own clock, and the control group grants the next epoch to another once the lease has
//! run out on *any* clock. Every function here is plain: state and event and the reading of the node's own monotonic clock in, state and effects out.
//!
//! ```text
//!  holder                    grantor (leads the control group)         record (in the control group's ledger)
//!  ask, stamped a ─────────► asked at g: runs_out = g + outlasts(D)
//!                            propose Renew, or read the record ──────► if it is this term and this epoch
//!  until = a + D  ◄───────── answer: D, the ceiling, and the stamp ◄──┘
//!  may_append ──► fences: each with a lease that the holder passed on ──► outcome: acknowledged, or UNKNOWN
//! ```
//!
//! # Clocks
//!
//! No two clocks are compared; each node measures spans on its own. [`Drift`] bounds how a clock measures: for two readings of it, `x` apart, and
//! the true time `t` between them,
//!
//! ```text
//!   (1 − ρ) t − δ  ≤  x  ≤  (1 + ρ) t + δ        ρ: rate_ppm / 10⁶, δ: read_ms
//! ```
//!
//! **A span counts from the moment when its receiver asked for it**, by the receiver's clock; the answer carries the question's stamp back. However
//! long an answer is under way, it cannot lengthen a lease.
//!
//! **Holder.** It asks at true time `T` and holds while `x < D`, so `(1 − ρ) t − δ < D`: it holds for less than `t = (D + δ) / (1 − ρ)`.
//!
//! **Grantor.** It hears the question at `T' ≥ T`, and waits until `x ≥ W`, so `(1 + ρ) t + δ ≥ W`: it waits for at least `t = (W − δ) / (1 + ρ)`.
//! Nobody holds the old epoch when the next is granted, if `(W − δ) / (1 + ρ) ≥ (D + δ) / (1 − ρ)`, hence
//!
//! ```text
//!   W  =  (D + δ) (1 + ρ) / (1 − ρ) + δ          Drift::outlasts
//! ```
//!
//! **Fence.** Storage has a lease too, passed on by the holder: of what is left, `R = D − x`, less `δ`. The holder passes it on at `t` after `T`, where
//! `D − R = x ≥ (1 − ρ) t − δ`; so from then until the grantor may go on, at least `(D + δ) / (1 − ρ) − t ≥ R / (1 − ρ)` remain. The fence asked before that, and
//! holds for less than `(R − δ + δ) / (1 − ρ)` from its question on. ∎ The same holds for whoever a fence would pass it on to.
//!
//! # Leaders of the control group
//!
//! When a lease runs out stands in the memory of one leader, since no other clock could read it. A new leader writes down its **term** first: from then on
//! the record refuses what others before it proposed, also what they propose later because they were paused or cut off. What they did
//! get written was asked for earlier, so the new leader waits `W` from then on ([`Grantor::leads`]) before it grants anything.
//!
//! A renewal that needs no higher ceiling changes nothing in the record, so it is not written: the leader reads the record after the question, confirmed
//! by a majority. If its own term stands there, the next leader's begins later, and waits for longer than this renewal lasts.
//!
//! A leader counts `W` from the question, before the renewal is written, and never proposes a renewal of an epoch after it proposed the next: so
//! the order in which its proposals arrive does not matter.
//!
//! # Acknowledging
//!
//! The lease is checked before the append, by each fence when it appends, and again when enough fences have appended ([`Leased::outcome`]). If it ran out in
//! between, the outcome is UNKNOWN: the entry may or may not be part of what the next epoch starts from. The moment of an acknowledgement is this last reading
//! of the clock; what delays the answer after it delays the news only. The clock must count the time for which the machine was suspended.
//!
//! No index above the **ceiling** is appended or acknowledged. Ceilings are in the record, so whoever grants the next epoch knows how much the old one can have
//! acknowledged at most.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Milliseconds, on the monotonic clock of the node at hand, or between two readings of it.
pub type Ms = u64;
/// A right to write: each is granted once, to one holder.
pub type Epoch = u64;
/// One leader's time at the head of the control group.
pub type Term = u64;
/// Who holds leases: a region, a node, a replica of storage.
pub type HolderId = u64;
/// A place in a ledger.
pub type Index = u64;

const MILLION: u128 = 1_000_000;

/// How far clocks may be wrong; see the module for ρ and δ. Beyond it nothing here holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Drift {
    /// ρ: how much faster or slower than true time a clock may run, in millionths.
    pub rate_ppm: u32,
    /// δ: by how much a span between two readings may be wrong besides; 1 for a clock that is read in whole milliseconds.
    pub read_ms: Ms,
}

impl Drift {
    /// W: how long to wait on one clock until `span_ms` has run out on every other.
    pub fn outlasts(&self, span_ms: Ms) -> Ms {
        let rate = u128::from(self.rate_ppm);
        let (fast, slow) = (MILLION + rate, MILLION.saturating_sub(rate));
        if slow == 0 {
            return Ms::MAX;
        }
        let wait = (u128::from(span_ms) + u128::from(self.read_ms)) * fast;
        Ms::try_from(wait.div_ceil(slow) + u128::from(self.read_ms)).unwrap_or(Ms::MAX)
    }

    /// What of `left_ms` may be passed on to another clock.
    pub fn passes_on(&self, left_ms: Ms) -> Ms {
        left_ms.saturating_sub(self.read_ms)
    }
}

/// What grantor and holders agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Settings {
    /// D: what a renewal grants.
    pub span_ms: Ms,
    pub drift: Drift,
    /// How far beyond what a holder has reached its ceiling is set.
    pub room: Index,
}

impl Settings {
    /// W: what a grantor waits.
    pub fn wait_ms(&self) -> Ms {
        self.drift.outlasts(self.span_ms)
    }
}

// ---- the record: what the control group has written down -------------------------------------------------------------------------------

/// The lease as the control group's ledger has it; the same for each of its leaders.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The last leader that has begun.
    pub term: Term,
    /// 0: none was granted yet.
    pub epoch: Epoch,
    pub holder: Option<HolderId>,
    /// The greatest index that this epoch may acknowledge, as granted so far.
    pub ceiling: Index,
    /// The ceiling of the epoch before: what was lost of it is not above.
    pub ceiling_before: Index,
}

/// A change of the record.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Entry {
    /// A leader begins.
    Lead {
        term: Term,
    },
    Renew {
        term: Term,
        epoch: Epoch,
        ceiling: Index,
    },
    /// The next epoch is granted, or a later one, if some may have been granted by a control group that is lost.
    Next {
        term: Term,
        epoch: Epoch,
        holder: HolderId,
    },
}

impl Record {
    /// The record after `entry`; `None`: it is another leader's, or late, and changes nothing.
    pub fn apply(&self, entry: &Entry) -> Option<Record> {
        match *entry {
            Entry::Lead { term } if term == self.term + 1 => Some(Record { term, ..self.clone() }),
            Entry::Renew { term, epoch, ceiling } if (term, epoch) == (self.term, self.epoch) => {
                Some(Record { ceiling: self.ceiling.max(ceiling), ..self.clone() })
            }
            Entry::Next { term, epoch, holder } if term == self.term && epoch > self.epoch => {
                // Who leaves epochs out does not know them, nor what they were allowed.
                let ceiling_before = if epoch == self.epoch + 1 { self.ceiling } else { Index::MAX };
                Some(Record { epoch, holder: Some(holder), ceiling: 0, ceiling_before, ..self.clone() })
            }
            _ => None,
        }
    }
}

// ---- messages ------------------------------------------------------------------------------------------------------------------------

/// When a question was asked, by the clock of the process that asked; of use to that process alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// Differs whenever the process starts anew, since its clock may then start anew as well.
    pub incarnation: u64,
    pub at: Ms,
}

/// Asks for a lease, or to renew it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ask {
    pub from: HolderId,
    pub stamp: Stamp,
    /// The greatest index that the holder has; its ceiling is set beyond.
    pub reached: Index,
}

/// Gives a lease: it runs for `span_ms` after the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Answer {
    pub to: HolderId,
    pub stamp: Stamp,
    pub epoch: Epoch,
    pub span_ms: Ms,
    pub ceiling: Index,
}

// ---- grantor -------------------------------------------------------------------------------------------------------------------------

/// The leader of the control group, as the one who grants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grantor {
    /// The record as this leader last saw it, in its own term.
    pub record: Record,
    /// From this reading of its clock on, nobody holds the record's epoch, if no question comes in between.
    pub runs_out: Ms,
    pub next: Option<Next>,
}

/// The next epoch is wanted: the present one is not renewed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Next {
    pub holder: HolderId,
    /// It may be in the ledger: there is no way back.
    pub proposed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrantorEvent {
    Asked(Ask),
    /// The present epoch is to run out; the next one is not granted before it is wanted.
    Prepared(HolderId),
    /// The next epoch is to go to this holder. To be repeated until the record says so.
    Wanted(HolderId),
    /// It is not wanted any more: the holder is back.
    Withdrawn,
    /// The record was read, or an entry was applied.
    Read(Record),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrantorEffect {
    /// Write `entry` into the ledger; send `then` once it is applied, and not if it is refused.
    Propose { entry: Entry, then: Option<Answer> },
    /// Read the record, confirmed by a majority after this; send the answer if it stands in this leader's term and in this epoch.
    Confirm { then: Answer },
    /// Nothing can be granted before this reading of the clock.
    Wait { until: Ms },
    /// Tell this holder that it has no lease here, or loses it: the record's epoch and holder.
    Refuse { to: HolderId, epoch: Epoch, holder: Option<HolderId> },
    /// Another leader has begun: stop.
    Deposed,
}

impl Grantor {
    /// Begins to lead. `record`: as its own [`Entry::Lead`] made it; `now`: read after that was applied.
    pub fn leads(settings: &Settings, record: Record, now: Ms) -> Grantor {
        Grantor { record, runs_out: now.saturating_add(settings.wait_ms()), next: None }
    }

    pub fn on(&self, settings: &Settings, event: GrantorEvent, now: Ms) -> (Grantor, Vec<GrantorEffect>) {
        let mut state = self.clone();
        let effect = match event {
            GrantorEvent::Asked(ask) => state.asked(settings, ask, now),
            GrantorEvent::Prepared(holder) => {
                state.next.get_or_insert(Next { holder, proposed: false });
                (now < state.runs_out).then_some(GrantorEffect::Wait { until: state.runs_out })
            }
            GrantorEvent::Wanted(holder) => state.wanted(holder, now),
            GrantorEvent::Withdrawn => {
                state.next = state.next.filter(|next| next.proposed);
                None
            }
            GrantorEvent::Read(record) => state.read(record),
        };
        (state, effect.into_iter().collect())
    }

    fn asked(&mut self, settings: &Settings, ask: Ask, now: Ms) -> Option<GrantorEffect> {
        let Record { term, epoch, holder, .. } = self.record;
        if holder != Some(ask.from) || self.next.is_some() {
            return Some(GrantorEffect::Refuse { to: ask.from, epoch, holder });
        }
        self.runs_out = self.runs_out.max(now.saturating_add(settings.wait_ms()));
        let answer =
            |ceiling| Answer { to: ask.from, stamp: ask.stamp, epoch, span_ms: settings.span_ms, ceiling };
        if self.record.ceiling >= ask.reached.saturating_add(settings.room / 2 + 1) {
            return Some(GrantorEffect::Confirm { then: answer(self.record.ceiling) });
        }
        let ceiling = self.record.ceiling.max(ask.reached.saturating_add(settings.room));
        let entry = Entry::Renew { term, epoch, ceiling };
        let answer = answer(ceiling);
        Some(GrantorEffect::Propose { entry, then: Some(answer) })
    }

    fn wanted(&mut self, holder: HolderId, now: Ms) -> Option<GrantorEffect> {
        let next = self.next.get_or_insert(Next { holder, proposed: false });
        if now < self.runs_out {
            return Some(GrantorEffect::Wait { until: self.runs_out });
        }
        next.proposed = true;
        let Record { term, epoch, .. } = self.record;
        let entry = Entry::Next { term, epoch: epoch + 1, holder: next.holder };
        Some(GrantorEffect::Propose { entry, then: None })
    }

    fn read(&mut self, record: Record) -> Option<GrantorEffect> {
        if record.term != self.record.term {
            return (record.term > self.record.term).then_some(GrantorEffect::Deposed);
        }
        if record.epoch > self.record.epoch {
            self.next = None;
        }
        if record.epoch >= self.record.epoch {
            self.record = record;
        }
        None
    }
}

// ---- holders and fences --------------------------------------------------------------------------------------------------------------

/// A lease, as its holder sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub epoch: Epoch,
    /// It holds before this reading of the holder's clock.
    pub until: Ms,
    pub ceiling: Index,
}

/// One process that may hold a lease. All of it is in memory: a process that starts has none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leased {
    pub id: HolderId,
    pub incarnation: u64,
    pub lease: Option<Lease>,
}

/// Why something may not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("there is no lease; ask the control group for one")]
    NoLease,
    #[error("the lease ran out; renew it")]
    RanOut,
    #[error("epoch {0} was superseded; ask the control group who writes now")]
    Superseded(Epoch),
    #[error("the ceiling of this lease is {0}; renew it to get a higher one")]
    Ceiling(Index),
}

/// What a caller may be told of a write that was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Acknowledged,
    /// The lease ran out, or was another epoch's, before the write was known to be appended.
    Unknown,
}

impl Leased {
    pub fn starts(id: HolderId, incarnation: u64) -> Leased {
        Leased { id, incarnation, lease: None }
    }

    /// The question to send. `reached`: the greatest index that it has.
    pub fn ask(&self, reached: Index, now: Ms) -> Ask {
        Ask { from: self.id, stamp: Stamp { incarnation: self.incarnation, at: now }, reached }
    }

    /// Takes an answer, whenever it comes: what it grants counts from the question.
    pub fn answered(&self, answer: &Answer) -> Leased {
        let mine = (answer.to, answer.stamp.incarnation) == (self.id, self.incarnation);
        let until = answer.stamp.at.saturating_add(answer.span_ms);
        let lease = match self.lease {
            _ if !mine => self.lease,
            Some(held) if held.epoch > answer.epoch => self.lease,
            Some(held) if held.epoch == answer.epoch => Some(Lease {
                until: held.until.max(until),
                ceiling: held.ceiling.max(answer.ceiling),
                ..held
            }),
            _ => Some(Lease { epoch: answer.epoch, until, ceiling: answer.ceiling }),
        };
        Leased { lease, ..self.clone() }
    }

    /// The lease, if it still holds. What it holds for: strong reads, and passing it on.
    pub fn holds(&self, now: Ms) -> Result<Lease, Refusal> {
        match self.lease {
            None => Err(Refusal::NoLease),
            Some(lease) if now < lease.until => Ok(lease),
            Some(_) => Err(Refusal::RanOut),
        }
    }

    /// Whether an entry may be appended at `index`, and under which epoch.
    pub fn may_append(&self, index: Index, now: Ms) -> Result<Epoch, Refusal> {
        let lease = self.holds(now)?;
        match index <= lease.ceiling {
            true => Ok(lease.epoch),
            false => Err(Refusal::Ceiling(lease.ceiling)),
        }
    }

    /// What the caller is told of an entry that was sent under `epoch`, once enough fences have it. `now`: read after they said so.
    pub fn outcome(&self, epoch: Epoch, index: Index, now: Ms) -> Outcome {
        match self.may_append(index, now) {
            Ok(held) if held == epoch => Outcome::Acknowledged,
            _ => Outcome::Unknown,
        }
    }

    /// Passes the lease on to a fence that asks.
    pub fn pass_on(&self, settings: &Settings, ask: &Ask, now: Ms) -> Result<Answer, Refusal> {
        let Lease { epoch, until, ceiling } = self.holds(now)?;
        let span_ms = settings.drift.passes_on(until - now);
        Ok(Answer { to: ask.from, stamp: ask.stamp, epoch, span_ms, ceiling })
    }
}

/// Storage that entries are appended to: it refuses old epochs for ever, and the present one when the lease has run out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fence {
    pub leased: Leased,
    /// The greatest epoch that it has seen. It is on the disk before anything that depends on it is said.
    pub seen: Epoch,
}

impl Fence {
    /// `seen`: what its disk has.
    pub fn starts(id: HolderId, incarnation: u64, seen: Epoch) -> Fence {
        Fence { leased: Leased::starts(id, incarnation), seen }
    }

    /// Takes a lease that was passed on. One of an old epoch is refused.
    pub fn answered(&self, answer: &Answer) -> Result<Fence, Refusal> {
        if answer.epoch < self.seen {
            return Err(Refusal::Superseded(answer.epoch));
        }
        Ok(Fence { leased: self.leased.answered(answer), seen: answer.epoch })
    }

    /// Decides over an entry: the state to make durable before or with it, or why it is refused.
    pub fn append(&self, epoch: Epoch, index: Index, now: Ms) -> Result<Fence, Refusal> {
        if epoch < self.seen {
            return Err(Refusal::Superseded(epoch));
        }
        match self.leased.may_append(index, now)? {
            held if held == epoch => Ok(Fence { seen: epoch, ..self.clone() }),
            _ => Err(Refusal::NoLease),
        }
    }
}

// ---- nodes that are alive ------------------------------------------------------------------------------------------------------------

/// Which nodes are alive, as the leader of the control group sees it. A node asks with each heartbeat and is answered with a lease (of epoch 0), so
/// it knows until when the others take it for alive; it is said to be down only when that has run out on its own clock too.
///
/// A heartbeat is answered once the leader has made sure, after it came, that it still leads; a new leader waits as a new [`Grantor`] does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Liveness {
    /// When each node was last heard of; at the latest when this leader began.
    heard: BTreeMap<HolderId, Ms>,
    down: BTreeSet<HolderId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LivenessEvent {
    /// A heartbeat came; of a node that is not a member it changes nothing.
    Heard(Ask),
    /// Time has passed.
    Looked,
    /// These are the members now.
    Members(BTreeSet<HolderId>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LivenessEffect {
    /// Send it once it is certain that this leader still leads.
    Answer(Answer),
    Down(HolderId),
    Up(HolderId),
}

impl Liveness {
    /// A leader begins: it takes every node for alive.
    pub fn begins(members: &BTreeSet<HolderId>, now: Ms) -> Liveness {
        let heard = members.iter().map(|id| (*id, now)).collect();
        Liveness { heard, down: BTreeSet::new() }
    }

    pub fn on(&self, settings: &Settings, event: LivenessEvent, now: Ms) -> (Liveness, Vec<LivenessEffect>) {
        let mut state = self.clone();
        let mut effects = vec![];
        match event {
            LivenessEvent::Heard(ask) => {
                if let Some(heard) = state.heard.get_mut(&ask.from) {
                    *heard = now;
                    let (to, stamp, span_ms) = (ask.from, ask.stamp, settings.span_ms);
                    effects.push(LivenessEffect::Answer(Answer { to, stamp, epoch: 0, span_ms, ceiling: 0 }));
                    if state.down.remove(&to) {
                        effects.push(LivenessEffect::Up(to));
                    }
                }
            }
            LivenessEvent::Looked => {
                let out = |heard: Ms| now >= heard.saturating_add(settings.wait_ms());
                for id in state.heard.iter().filter(|(_, heard)| out(**heard)).map(|(id, _)| *id) {
                    if state.down.insert(id) {
                        effects.push(LivenessEffect::Down(id));
                    }
                }
            }
            LivenessEvent::Members(members) => {
                state.heard.retain(|id, _| members.contains(id));
                state.down.retain(|id| members.contains(id));
                // One that is new to this leader may have been answered by the one before.
                for id in members {
                    state.heard.entry(id).or_insert(now);
                }
            }
        }
        (state, effects)
    }

    pub fn is_down(&self, id: HolderId) -> bool {
        self.down.contains(&id)
    }

    /// Until when a node is taken for alive, if nothing more is heard of it; `None`: it is no member.
    pub fn alive_until(&self, settings: &Settings, id: HolderId) -> Option<Ms> {
        self.heard.get(&id).map(|heard| heard.saturating_add(settings.wait_ms()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: HolderId = 1;
    const B: HolderId = 2;

    fn settings(span_ms: Ms, rate_ppm: u32) -> Settings {
        Settings { span_ms, drift: Drift { rate_ppm, read_ms: 1 }, room: 10 }
    }

    /// A grantor whose wait is over at 0, with epoch 1 granted to A.
    fn granted() -> Grantor {
        Grantor {
            record: Record { term: 1, epoch: 1, holder: Some(A), ..Record::default() },
            runs_out: 0,
            next: None,
        }
    }

    /// Feeds an event in; what it proposes is written at once. The new state, what was sent, and whether anything was written.
    fn step(
        grantor: &Grantor,
        settings: &Settings,
        event: GrantorEvent,
        now: Ms,
    ) -> (Grantor, Option<Answer>, bool) {
        let (mut grantor, effects) = grantor.on(settings, event, now);
        let (mut answer, mut wrote) = (None, false);
        for effect in effects {
            if let GrantorEffect::Confirm { then } = effect {
                answer = Some(then);
                continue;
            }
            let GrantorEffect::Propose { entry, then } = effect else { continue };
            if let Some(record) = grantor.record.apply(&entry) {
                (answer, wrote) = (then, true);
                grantor = grantor.on(settings, GrantorEvent::Read(record), now).0;
            }
        }
        (grantor, answer, wrote)
    }

    #[test]
    fn the_next_epoch_waits_for_the_lease_and_renewals_stop_when_it_is_wanted() {
        let settings = settings(1000, 0);
        assert_eq!(settings.wait_ms(), 1002);
        let ask = Leased::starts(A, 7).ask(5, 40);
        let (grantor, answer, _) = step(&granted(), &settings, GrantorEvent::Asked(ask), 100);
        let Some(answer) = answer else { panic!("no answer") };
        let holder = Leased::starts(A, 7).answered(&answer);
        assert_eq!(holder.lease, Some(Lease { epoch: 1, until: 1040, ceiling: 15 }), "from the question on");
        let (grantor, _, wrote) = step(&grantor, &settings, GrantorEvent::Wanted(B), 1101);
        assert!(!wrote);
        let (refused, effects) = grantor.on(&settings, GrantorEvent::Asked(ask), 1101);
        let refusal = GrantorEffect::Refuse { to: A, epoch: 1, holder: Some(A) };
        assert_eq!((refused.runs_out, effects), (1102, vec![refusal]));
        let withdrawn = grantor.on(&settings, GrantorEvent::Withdrawn, 1101).0;
        assert!(step(&withdrawn, &settings, GrantorEvent::Asked(ask), 1101).1.is_some());
        let (grantor, _, wrote) = step(&grantor, &settings, GrantorEvent::Wanted(B), 1102);
        assert!(wrote);
        let record = Record { term: 1, epoch: 2, holder: Some(B), ceiling: 0, ceiling_before: 15 };
        assert_eq!(grantor.record, record);
        assert!(grantor.next.is_none());
    }

    #[test]
    fn what_was_proposed_cannot_be_withdrawn() {
        let settings = settings(1000, 0);
        let (grantor, effects) = granted().on(&settings, GrantorEvent::Wanted(B), 0);
        assert!(matches!(effects[..], [GrantorEffect::Propose { .. }]));
        let grantor = grantor.on(&settings, GrantorEvent::Withdrawn, 0).0;
        let ask = Leased::starts(A, 0).ask(0, 0);
        let (grantor, effects) = grantor.on(&settings, GrantorEvent::Asked(ask), 1);
        assert!(matches!(effects[..], [GrantorEffect::Refuse { .. }]));
        // Another destination does not change what may be in the ledger already.
        let effects = grantor.on(&settings, GrantorEvent::Wanted(A), 2).1;
        let entry = Entry::Next { term: 1, epoch: 2, holder: B };
        assert_eq!(effects, vec![GrantorEffect::Propose { entry, then: None }]);
    }

    #[test]
    fn a_new_leader_waits_a_full_lease_and_refuses_what_the_old_one_proposed() -> Result<(), &'static str> {
        let settings = settings(1000, 0);
        let old = granted();
        let record = old.record.apply(&Entry::Lead { term: 2 }).ok_or("refused")?;
        assert_eq!(record.apply(&Entry::Lead { term: 2 }), None, "two leaders of one term");
        let new = Grantor::leads(&settings, record.clone(), 50);
        let ask = Leased::starts(A, 0).ask(0, 40);
        let (old, effects) = old.on(&settings, GrantorEvent::Asked(ask), 60);
        let [GrantorEffect::Propose { entry, .. }] = &effects[..] else { return Err("not proposed") };
        assert_eq!(record.apply(entry), None);
        assert_eq!(old.on(&settings, GrantorEvent::Read(record), 70).1, vec![GrantorEffect::Deposed]);
        let waits = new.on(&settings, GrantorEvent::Wanted(B), 1051).1;
        assert_eq!(waits, vec![GrantorEffect::Wait { until: 1052 }]);
        assert!(step(&new, &settings, GrantorEvent::Wanted(B), 1052).2);
        Ok(())
    }

    #[test]
    fn a_write_is_unknown_when_the_lease_ran_out_under_it() {
        let answer = |epoch, at, ceiling| Answer {
            to: A,
            stamp: Stamp { incarnation: 1, at },
            epoch,
            span_ms: 100,
            ceiling,
        };
        let none = Leased::starts(A, 1);
        assert_eq!(none.may_append(1, 0), Err(Refusal::NoLease));
        let holder = none.answered(&answer(1, 0, 5));
        assert_eq!(holder.may_append(5, 99), Ok(1));
        assert_eq!(holder.may_append(6, 99), Err(Refusal::Ceiling(5)));
        assert_eq!(holder.may_append(5, 100), Err(Refusal::RanOut));
        assert_eq!(holder.outcome(1, 5, 99), Outcome::Acknowledged);
        assert_eq!(holder.outcome(1, 5, 100), Outcome::Unknown);
        let later = holder.answered(&answer(3, 50, 9));
        assert_eq!(later.outcome(1, 5, 99), Outcome::Unknown, "another epoch's lease");
        assert_eq!(later.answered(&answer(1, 60, 20)), later, "late");
        assert_eq!(
            holder.answered(&answer(1, 50, 3)).lease,
            Some(Lease { epoch: 1, until: 150, ceiling: 5 })
        );
        let other = Leased::starts(A, 2);
        assert_eq!(other.answered(&answer(1, 0, 5)), other, "an answer to the process before");
    }

    #[test]
    fn storage_that_has_seen_an_epoch_refuses_those_before_it() -> Result<(), Refusal> {
        let settings = settings(100, 0);
        let answer =
            |epoch| Answer { to: A, stamp: Stamp { incarnation: 1, at: 0 }, epoch, span_ms: 100, ceiling: 5 };
        let fence = Fence::starts(11, 4, 0);
        assert_eq!(fence.append(1, 1, 0), Err(Refusal::NoLease));
        let passed =
            Leased::starts(A, 1).answered(&answer(1)).pass_on(&settings, &fence.leased.ask(0, 1000), 30)?;
        assert_eq!((passed.span_ms, passed.stamp.at), (69, 1000), "what is left, less δ");
        let fence = fence.answered(&passed)?;
        assert_eq!(fence.append(1, 5, 1068)?.seen, 1);
        assert_eq!(fence.append(1, 5, 1069), Err(Refusal::RanOut));
        assert_eq!(fence.append(2, 5, 1000), Err(Refusal::NoLease), "of an epoch that it has no lease for");
        let passed = Leased::starts(B, 1).answered(&Answer { to: B, ..answer(2) });
        let fence = fence.answered(&passed.pass_on(&settings, &fence.leased.ask(0, 1000), 0)?)?;
        assert_eq!(fence.append(1, 1, 1000), Err(Refusal::Superseded(1)));
        let restarted = Fence::starts(11, 5, fence.seen);
        assert_eq!(restarted.append(1, 1, 0), Err(Refusal::Superseded(1)));
        let old = Answer { to: 11, stamp: Stamp { incarnation: 5, at: 0 }, ..answer(1) };
        assert_eq!(restarted.answered(&old), Err(Refusal::Superseded(1)));
        Ok(())
    }

    #[test]
    fn a_node_is_down_only_when_it_knows_so_itself() {
        let settings = settings(1000, 0);
        let alive = Liveness::begins(&[A, B].into(), 0);
        let node = Leased::starts(A, 1);
        let (alive, effects) = alive.on(&settings, LivenessEvent::Heard(node.ask(0, 400)), 500);
        let [LivenessEffect::Answer(answer)] = &effects[..] else { panic!("{effects:?}") };
        let node = node.answered(answer);
        assert_eq!(alive.on(&settings, LivenessEvent::Looked, 1001).1, vec![]);
        let (alive, effects) = alive.on(&settings, LivenessEvent::Looked, 1002);
        assert_eq!(effects, vec![LivenessEffect::Down(B)], "a new leader waits a full lease");
        assert_eq!(alive.alive_until(&settings, A), Some(1502));
        assert!(node.holds(1399).is_ok() && node.holds(1400).is_err());
        let (alive, effects) = alive.on(&settings, LivenessEvent::Looked, 1502);
        assert_eq!(effects, vec![LivenessEffect::Down(A)]);
        let (alive, effects) = alive.on(&settings, LivenessEvent::Heard(node.ask(0, 1500)), 1600);
        assert_eq!(effects[1..], [LivenessEffect::Up(A)]);
        assert!(!alive.is_down(A) && alive.is_down(B));
        let alive = alive.on(&settings, LivenessEvent::Members([A, 3].into()), 1700).0;
        assert_eq!((alive.alive_until(&settings, B), alive.is_down(B)), (None, false));
        assert_eq!(alive.alive_until(&settings, 3), Some(2702));
    }

    /// A clock in whole milliseconds that runs `rate_ppm` too fast; time in µs.
    #[derive(Clone, Copy, Debug)]
    struct Clock {
        offset_us: u64,
        rate_ppm: i64,
    }

    impl Clock {
        fn at(&self, us: u64) -> Ms {
            let ran = i128::from(us) * (MILLION as i128 + i128::from(self.rate_ppm)) / MILLION as i128;
            (self.offset_us + ran as u64) / 1000
        }

        /// The first moment at which it reads `ms` or more.
        fn reaches(&self, ms: Ms) -> u64 {
            let (mut before, mut there) = (0, 4_000_000_000_000);
            while before < there {
                let middle = (before + there) / 2;
                match self.at(middle) >= ms {
                    true => there = middle,
                    false => before = middle + 1,
                }
            }
            there
        }
    }

    fn clock(rate_ppm: u32) -> impl Strategy<Value = Clock> {
        let rate = i64::from(rate_ppm);
        (0..10_000_000u64, prop_oneof![Just(-rate), Just(rate), -rate..=rate])
            .prop_map(|(offset_us, rate_ppm)| Clock { offset_us, rate_ppm })
    }

    fn clocks() -> impl Strategy<Value = (u32, [Clock; 3])> {
        prop_oneof![Just(0u32), 1..1000u32, 1000..900_000u32]
            .prop_flat_map(|ppm| (Just(ppm), [clock(ppm), clock(ppm), clock(ppm)]))
    }

    /// When the holder's lease and its fence's have both run out, and when the grantor may go on, all in true time.
    fn race(
        settings: &Settings,
        [a, f, g]: [Clock; 3],
        (asked, heard, fence_asked, passed): (u64, u64, u64, u64),
    ) -> (u64, u64) {
        let (holder, fence) = (Leased::starts(A, 1), Leased::starts(3, 1));
        let ask = holder.ask(0, a.at(asked));
        let (grantor, answer, _) = step(&granted(), settings, GrantorEvent::Asked(ask), g.at(heard));
        let holder = answer.map_or(holder.clone(), |answer| holder.answered(&answer));
        let fence_ask = fence.ask(0, f.at(fence_asked));
        let fence = match holder.pass_on(settings, &fence_ask, a.at(passed)) {
            Ok(answer) => fence.answered(&answer),
            Err(_) => fence,
        };
        let until =
            |leased: &Leased, clock: Clock| leased.lease.map_or(0, |lease| clock.reaches(lease.until));
        (until(&holder, a).max(until(&fence, f)), g.reaches(grantor.runs_out))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Whatever the clocks, within the bound, and however late each message.
        #[test]
        fn nobody_holds_a_lease_when_the_next_is_granted(
            (rate_ppm, clocks) in clocks(),
            span_ms in 1..20_000u64,
            (asked, late, fence_early, passed) in (0..10_000_000u64, 0..2_000_000u64, 0..1_000_000u64, 0..20_000_000u64),
        ) {
            let settings = settings(span_ms, rate_ppm);
            let times = (asked, asked + late, (asked + passed).saturating_sub(fence_early), asked + passed);
            let (held, granted) = race(&settings, clocks, times);
            prop_assert!(held <= granted, "held until {held} µs, granted at {granted} µs");
        }

        /// The wait is no longer than it must be: two milliseconds of rounding apart, the worst clocks need all of it.
        #[test]
        fn the_wait_is_needed(rate_ppm in 0..900_000u32, span_ms in 10..20_000u64) {
            let settings = settings(span_ms, rate_ppm);
            let rate = i64::from(rate_ppm);
            let (slow, fast) = (Clock { offset_us: 0, rate_ppm: -rate }, Clock { offset_us: 0, rate_ppm: rate });
            let (held, granted) = race(&settings, [slow, slow, fast], (0, 0, 0, 0));
            prop_assert!(held <= granted);
            let rounding_us = 4 * 1000 * (MILLION as u64) / (MILLION as u64 - u64::from(rate_ppm));
            prop_assert!(granted - held <= rounding_us, "{} µs too long", granted - held);
            // Beyond the bound nothing holds.
            let faster = Clock { rate_ppm: rate + 500_000, ..fast };
            let (held, granted) = race(&settings, [slow, slow, faster], (0, 0, 0, 0));
            prop_assert!(held > granted || span_ms < 20, "a clock beyond the bound was good enough");
        }
    }
}
