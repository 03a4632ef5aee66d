//! Leases and fencing, checked exhaustively: the real functions of `nodes::control::lease` as two leaders of the control group, two holders and a fence run
//! them, over a network that loses and reorders messages, with clocks that are off by a tick, crashes, and a pause of any of them.
//!
//! A reading of a clock is the true time or a tick more, as it happens; where two clocks are read at once, one is ahead. There are three epochs, two terms
//! of leaders, two crashes, and any number of pauses, one at a time. At most one message of each kind is under way, so they overtake one another.
//!
//! A renewal that is not written is confirmed: that the record was read, by a majority, is one step, at any time after the question. What was read then
//! decides; the leader that asked may have been deposed meanwhile. The second epoch may be prepared, and any withdrawn again, at any time.
//!
//! Time has no end here: a tick moves every moment that is remembered one back, until it is past for every clock. So a
//! state is what the processes know, and all of them are visited, however long it takes to get there.

mod exhaustive;

use exhaustive::check;
use nodes::control::lease::*;
use stateright::{Model, Property};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The true time, always. Each reading of a clock is this or a tick more.
const NOW: Ms = 1000;
const OFF: [Ms; 2] = [0, 1];
/// Holders; the control group's leaders are told apart by their place.
const HOLDERS: [HolderId; 2] = [0, 1];
const FENCE: HolderId = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Renewal {
        term: Term,
        epoch: Epoch,
        ceiling: Index,
        answer: Answer,
    },
    /// The record is to be read for an answer, which a leader of this term gives.
    Confirm {
        term: Term,
        answer: Answer,
    },
    Next {
        term: Term,
        epoch: Epoch,
        holder: HolderId,
    },
    /// To a holder, or, passed on, to the fence.
    Answer(Answer),
    Append {
        holder: HolderId,
        epoch: Epoch,
        index: Index,
    },
}

/// A write that a holder has sent to the fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Write {
    epoch: Epoch,
    index: Index,
    appended: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    record: Record,
    grantors: [Option<Grantor>; 2],
    holders: [Leased; 2],
    fence: Fence,
    writing: [Option<Write>; 2],
    /// Entries that were sent so far.
    written: Index,
    net: BTreeSet<Message>,
    crashes: u8,
    paused: Option<Process>,
    /// A write was acknowledged, or appended, that must not be.
    acknowledged_late: bool,
    appended_late: bool,
    above_the_ceiling: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Process {
    Grantor(usize),
    Holder(usize),
    Fence,
}

/// What happens next; the last number of each is how far the clocks that are read are ahead.
#[derive(Clone, Debug, PartialEq)]
enum Action {
    Tick,
    /// A leader begins.
    Leads(usize, Ms),
    /// A holder asks, and a leader hears it: a question that takes long to arrive makes a lease shorter, nothing else.
    Asks(usize, usize, Ms, Ms),
    /// The present epoch is to run out, or is not to after all.
    Prepared(usize),
    Withdrawn(usize),
    /// The next epoch is wanted for the other holder.
    Wanted(usize, Ms),
    /// Takes a message to the record, a holder or the fence.
    Arrives(Message, Ms),
    Lost(Message),
    /// The fence asks a holder, which passes the lease on: two clocks are read.
    Passes(usize, Ms, Ms),
    Appends(usize, Ms),
    /// A holder says what became of its write.
    Answers(usize, Ms),
    Crashes(Process),
    Pauses(Process),
    Resumes,
}

/// A guard that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    DriftIsIgnored,
    NewLeaderDoesNotWait,
    OldTermIsTaken,
    RenewalExtendsNothing,
    CountsFromTheAnswer,
    FenceCountsFromTheAnswer,
    RemainderIsPassedOnWhole,
    NoSecondCheck,
    FenceHasNoLease,
    NoCeiling,
    /// A renewal that is not written is not confirmed either.
    AnswersUnconfirmed,
    /// What may be in the ledger is taken back.
    ProposedIsWithdrawn,
}

/// How often something rare was seen.
#[derive(Default)]
struct Probes {
    acknowledged: [AtomicU64; 4],
    unknown: AtomicU64,
    superseded: AtomicU64,
    deposed_refused: AtomicU64,
    confirmed: AtomicU64,
    unconfirmed: AtomicU64,
    withdrawn: AtomicU64,
}

struct Leases {
    mutant: Option<Mutant>,
    settings: Settings,
    epochs: Epoch,
    terms: Term,
    crashes: u8,
    writes: Index,
    net: usize,
    probes: Arc<Probes>,
}

impl Leases {
    fn new(mutant: Option<Mutant>) -> Leases {
        let drift = Drift { rate_ppm: 0, read_ms: 1 };
        let settings = Settings { span_ms: 1, drift, room: 1 };
        Leases {
            mutant,
            settings,
            epochs: 3,
            terms: 2,
            crashes: 2,
            writes: if mutant == Some(Mutant::NoCeiling) { 2 } else { 1 },
            net: 2,
            probes: Arc::default(),
        }
    }

    /// What the grantors wait by.
    fn granting(&self) -> Settings {
        match self.mutant {
            Some(Mutant::DriftIsIgnored) => {
                Settings { drift: Drift { rate_ppm: 0, read_ms: 0 }, ..self.settings }
            }
            _ => self.settings,
        }
    }

    fn leads(&self, record: Record, now: Ms) -> Grantor {
        let grantor = Grantor::leads(&self.granting(), record, now);
        match self.mutant {
            Some(Mutant::NewLeaderDoesNotWait) => Grantor { runs_out: now, ..grantor },
            _ => grantor,
        }
    }

    /// A grantor takes an event; what it proposes goes on its way.
    fn grants(&self, state: &mut State, at: usize, event: GrantorEvent, now: Ms) -> Option<()> {
        let grantor = state.grantors[at].clone()?;
        let withdrawn = event == GrantorEvent::Withdrawn;
        let (mut next, effects) = grantor.on(&self.granting(), event, now);
        match self.mutant {
            Some(Mutant::RenewalExtendsNothing) => next.runs_out = grantor.runs_out,
            Some(Mutant::ProposedIsWithdrawn) if withdrawn => next.next = None,
            _ => {}
        }
        // What a deposed leader remembers stays as it is at its worst: nothing to wait for.
        if grantor.record.term == state.record.term || self.mutant == Some(Mutant::OldTermIsTaken) {
            state.grantors[at] = Some(next);
        }
        for effect in effects {
            match effect {
                GrantorEffect::Propose {
                    entry: Entry::Renew { term, epoch, ceiling },
                    then: Some(answer),
                } => {
                    state.net.insert(Message::Renewal { term, epoch, ceiling, answer });
                }
                GrantorEffect::Propose { entry: Entry::Next { term, epoch, holder }, .. } => {
                    state.net.insert(Message::Next { term, epoch, holder });
                }
                GrantorEffect::Confirm { then } if self.mutant == Some(Mutant::AnswersUnconfirmed) => {
                    state.net.insert(Message::Answer(then));
                }
                GrantorEffect::Confirm { then } => {
                    state.net.insert(Message::Confirm { term: grantor.record.term, answer: then });
                }
                GrantorEffect::Deposed => state.grantors[at] = None,
                _ => {}
            }
        }
        Some(())
    }

    /// An entry reaches the ledger.
    fn applies(&self, state: &mut State, term: Term, entry: impl Fn(Term) -> Entry) -> Option<()> {
        let term = if self.mutant == Some(Mutant::OldTermIsTaken) { state.record.term } else { term };
        let Some(record) = state.record.apply(&entry(term)) else {
            self.probes.deposed_refused.fetch_add((term < state.record.term) as u64, Relaxed);
            return None;
        };
        state.record = record;
        self.reads(state, term);
        Some(())
    }

    /// The leader of a term sees the record; one that was deposed need not notice.
    fn reads(&self, state: &mut State, term: Term) {
        for at in [0, 1] {
            if state.grantors[at].as_ref().is_some_and(|grantor| grantor.record.term == term) {
                self.grants(state, at, GrantorEvent::Read(state.record.clone()), NOW);
            }
        }
    }

    fn arrives(&self, state: &mut State, message: Message, off: Ms) {
        state.net.remove(&message);
        match message {
            Message::Renewal { term, epoch, ceiling, answer } => {
                if self.applies(state, term, |term| Entry::Renew { term, epoch, ceiling }).is_some() {
                    state.net.insert(Message::Answer(answer));
                }
            }
            Message::Confirm { term, answer } => {
                let record = (state.record.term, state.record.epoch);
                if record == (term, answer.epoch) {
                    self.probes.confirmed.fetch_add(1, Relaxed);
                    state.net.insert(Message::Answer(answer));
                } else {
                    self.probes.unconfirmed.fetch_add(1, Relaxed);
                }
                // One that was deposed is left as it was at its worst, as if it had read nothing.
                if record.0 == term {
                    self.reads(state, term);
                }
            }
            Message::Next { term, epoch, holder } => {
                self.applies(state, term, |term| Entry::Next { term, epoch, holder });
            }
            Message::Answer(mut answer) if answer.to == FENCE => {
                if self.mutant == Some(Mutant::FenceCountsFromTheAnswer) {
                    answer.stamp.at = NOW + off;
                }
                match state.fence.answered(&answer) {
                    Ok(fence) => state.fence = fence,
                    Err(_) => drop(self.probes.superseded.fetch_add(1, Relaxed)),
                }
            }
            Message::Answer(mut answer) => {
                if self.mutant == Some(Mutant::CountsFromTheAnswer) {
                    answer.stamp.at = NOW + off;
                }
                if self.mutant == Some(Mutant::NoCeiling) {
                    answer.ceiling = Index::MAX;
                }
                let at = answer.to as usize;
                state.holders[at] = state.holders[at].answered(&answer);
            }
            Message::Append { holder, epoch, index } => {
                let taken = match self.mutant {
                    Some(Mutant::FenceHasNoLease) if epoch >= state.fence.seen => {
                        Ok(Fence { seen: epoch, ..state.fence.clone() })
                    }
                    _ => state.fence.append(epoch, index, NOW + off),
                };
                if let Err(Refusal::Superseded(_)) = taken {
                    self.probes.superseded.fetch_add(1, Relaxed);
                }
                if let Ok(fence) = taken {
                    state.fence = fence;
                    state.appended_late |= epoch < state.record.epoch;
                    if let Some(write) = &mut state.writing[holder as usize] {
                        write.appended |= (write.epoch, write.index) == (epoch, index);
                    }
                }
            }
        }
    }

    fn answers(&self, state: &mut State, at: usize, now: Ms) -> Option<()> {
        let write = state.writing[at].take()?;
        let Write { epoch, index, appended } = write;
        let outcome = match self.mutant {
            Some(Mutant::NoSecondCheck) if appended => Outcome::Acknowledged,
            _ if appended => state.holders[at].outcome(epoch, index, now),
            _ => Outcome::Unknown,
        };
        match outcome {
            Outcome::Acknowledged => {
                self.probes.acknowledged[epoch.min(3) as usize].fetch_add(1, Relaxed);
                state.acknowledged_late |= epoch < state.record.epoch;
                state.above_the_ceiling |= epoch == state.record.epoch && index > state.record.ceiling;
            }
            Outcome::Unknown => drop(self.probes.unknown.fetch_add(1, Relaxed)),
        }
        Some(())
    }

    fn crashes(&self, state: &mut State, process: Process) {
        match process {
            Process::Grantor(at) => state.grantors[at] = None,
            Process::Holder(at) => {
                state.holders[at] = Leased::starts(HOLDERS[at], state.holders[at].incarnation + 1);
                state.writing[at] = None;
            }
            Process::Fence => {
                state.fence = Fence::starts(FENCE, state.fence.leased.incarnation + 1, state.fence.seen);
            }
        }
        if state.paused == Some(process) {
            state.paused = None;
        }
    }

    /// A tick of true time, and of every clock. A lease that has run out on every clock is forgotten, as by a process that starts anew; an answer that
    /// grants nothing any more is lost.
    fn ticks(&self, state: &mut State) {
        for grantor in state.grantors.iter_mut().flatten() {
            grantor.runs_out = (grantor.runs_out - 1).max(NOW);
        }
        for leased in state.holders.iter_mut().chain([&mut state.fence.leased]) {
            let back = leased.lease.map(|lease| Lease { until: lease.until - 1, ..lease });
            leased.lease = back.filter(|lease| lease.until > NOW);
        }
        // But to who counts from its arrival it does grant something.
        let keeps =
            matches!(self.mutant, Some(Mutant::CountsFromTheAnswer | Mutant::FenceCountsFromTheAnswer));
        let back = |mut message: Message| {
            if let Message::Renewal { answer, .. }
            | Message::Confirm { answer, .. }
            | Message::Answer(answer) = &mut message
            {
                answer.stamp.at = (answer.stamp.at - 1).max(NOW - answer.span_ms);
                (keeps || answer.stamp.at + answer.span_ms > NOW).then_some(message)
            } else {
                Some(message)
            }
        };
        state.net = std::mem::take(&mut state.net).into_iter().filter_map(back).collect();
    }

    /// Whether the next epoch can be granted and held from here on, when the network is well: by the leader that there is, and by a new one.
    fn can_grant(&self, state: &State) -> bool {
        // What is under way can be lost, and who is paused can wake: those states are judged.
        if !state.net.is_empty() || state.paused.is_some() {
            return true;
        }
        let lead = state.record.term + 1;
        let present = state.grantors.iter().position(|grantor| {
            grantor.as_ref().is_some_and(|grantor| grantor.record.term == state.record.term)
        });
        let present = present.map(|at| (state.clone(), at));
        let anew = state.record.apply(&Entry::Lead { term: lead }).map(|record| {
            let mut state = state.clone();
            state.grantors[0] = Some(self.leads(record.clone(), NOW));
            state.record = record;
            (state, 0)
        });
        anew.is_some() && present.into_iter().chain(anew).all(|(state, at)| self.grants_next(state, at))
    }

    fn grants_next(&self, mut state: State, at: usize) -> bool {
        let epoch = state.record.epoch + 1;
        for _ in 0..=self.settings.wait_ms() + 1 {
            self.grants(&mut state, at, GrantorEvent::Wanted(HOLDERS[0]), NOW);
            if !state.net.is_empty() {
                break;
            }
            self.ticks(&mut state);
        }
        let arrives = |state: &mut State| {
            state.net.first().copied().into_iter().for_each(|message| self.arrives(state, message, 0));
        };
        arrives(&mut state);
        let holder = state.record.holder.unwrap_or(0) as usize;
        let ask = state.holders[holder].ask(state.written, NOW);
        self.grants(&mut state, at, GrantorEvent::Asked(ask), NOW);
        // The renewal, and its answer.
        arrives(&mut state);
        arrives(&mut state);
        state.record.epoch == epoch
            && state.holders[holder].holds(NOW).is_ok_and(|lease| lease.epoch == epoch)
    }
}

impl Model for Leases {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let record = Record { term: 1, epoch: 1, holder: Some(HOLDERS[0]), ..Record::default() };
        vec![State {
            grantors: [Some(self.leads(record.clone(), NOW)), None],
            record,
            holders: HOLDERS.map(|id| Leased::starts(id, 0)),
            fence: Fence::starts(FENCE, 0, 0),
            writing: [None; 2],
            written: 0,
            net: BTreeSet::new(),
            crashes: self.crashes,
            paused: None,
            acknowledged_late: false,
            appended_late: false,
            above_the_ceiling: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.push(Action::Tick);
        let awake = |process: Process| state.paused != Some(process);
        for at in [0, 1] {
            if awake(Process::Grantor(at)) {
                if state.record.term < self.terms && at == 1 {
                    actions.extend(OFF.map(|off| Action::Leads(at, off)));
                }
                if let Some(grantor) = &state.grantors[at] {
                    actions.extend(OFF.map(|off| Action::Wanted(at, off)));
                    match grantor.next {
                        Some(_) => actions.push(Action::Withdrawn(at)),
                        None if grantor.record.epoch == 1 => actions.push(Action::Prepared(at)),
                        None => {}
                    }
                }
            }
            if awake(Process::Holder(at)) {
                for to in [0, 1].into_iter().filter(|to| awake(Process::Grantor(*to))) {
                    actions.extend(OFF.map(|off| Action::Asks(at, to, off, 1 - off)));
                }
                match state.writing[at] {
                    None => actions.extend(OFF.map(|off| Action::Appends(at, off))),
                    Some(_) => actions.extend(OFF.map(|off| Action::Answers(at, off))),
                }
                actions.extend(OFF.map(|off| Action::Passes(at, off, 1 - off)));
            }
        }
        for message in state.net.iter().copied() {
            actions.push(Action::Lost(message));
            match message {
                Message::Answer(answer) if answer.to != FENCE => {
                    let to = Process::Holder(answer.to as usize);
                    actions.extend(awake(to).then_some(Action::Arrives(message, 0)));
                }
                Message::Append { .. } => actions.extend(OFF.map(|off| Action::Arrives(message, off))),
                Message::Renewal { .. }
                | Message::Confirm { .. }
                | Message::Next { .. }
                | Message::Answer(_) => {
                    actions.push(Action::Arrives(message, 0));
                }
            }
        }
        if state.crashes > 0 {
            // A leader that crashed is one that is not heard of again while another leads.
            actions.extend([Process::Holder(0), Process::Fence].map(Action::Crashes));
        }
        match state.paused {
            Some(_) => actions.push(Action::Resumes),
            None => {
                // The first leader, or the first holder: those who may wake as what they no longer are.
                actions.extend([Process::Grantor(0), Process::Holder(0)].map(Action::Pauses));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => self.ticks(&mut state),
            Action::Leads(at, off) => {
                let record = state.record.apply(&Entry::Lead { term: state.record.term + 1 })?;
                for deposed in state.grantors.iter_mut().flatten() {
                    (deposed.runs_out, deposed.next) = (NOW, None);
                }
                state.grantors[at] = Some(self.leads(record.clone(), NOW + off));
                state.record = record;
            }
            Action::Asks(at, to, off, to_off) => {
                let ask = state.holders[at].ask(state.written, NOW + off);
                self.grants(&mut state, to, GrantorEvent::Asked(ask), NOW + to_off)?;
            }
            Action::Prepared(at) => {
                let grantor = state.grantors[at].as_ref()?;
                // Later it is as good as wanted.
                (NOW < grantor.runs_out).then_some(())?;
                let other = 1 - grantor.record.holder.unwrap_or(1);
                self.grants(&mut state, at, GrantorEvent::Prepared(other), NOW)?;
            }
            Action::Withdrawn(at) => {
                self.grants(&mut state, at, GrantorEvent::Withdrawn, NOW)?;
                self.probes.withdrawn.fetch_add((state != *last) as u64, Relaxed);
            }
            Action::Wanted(at, off) => {
                let grantor = state.grantors[at].as_ref()?;
                (grantor.record.epoch < self.epochs).then_some(())?;
                let other = 1 - grantor.record.holder.unwrap_or(1);
                // Wanted earlier, it would stop renewals, and wait, as if it were prepared.
                (NOW + off >= grantor.runs_out).then_some(())?;
                self.grants(&mut state, at, GrantorEvent::Wanted(other), NOW + off)?;
            }
            Action::Arrives(message, off) => self.arrives(&mut state, message, off),
            Action::Lost(message) => drop(state.net.remove(&message)),
            Action::Passes(at, fence_off, off) => {
                let ask = state.fence.leased.ask(0, NOW + fence_off);
                let now = NOW + off;
                let mut answer = state.holders[at].pass_on(&self.settings, &ask, now).ok()?;
                if let (Some(Mutant::RemainderIsPassedOnWhole), Some(lease)) =
                    (self.mutant, state.holders[at].lease)
                {
                    answer.span_ms = lease.until - now;
                }
                (answer.span_ms > 0).then(|| state.net.insert(Message::Answer(answer)))?;
            }
            Action::Appends(at, off) => {
                let index = state.written + 1;
                (index <= self.writes).then_some(())?;
                let epoch = state.holders[at].may_append(index, NOW + off).ok()?;
                state.written = index;
                state.writing[at] = Some(Write { epoch, index, appended: false });
                state.net.insert(Message::Append { holder: HOLDERS[at], epoch, index });
            }
            Action::Answers(at, off) => self.answers(&mut state, at, NOW + off)?,
            Action::Crashes(process) => {
                state.crashes -= 1;
                self.crashes(&mut state, process);
            }
            Action::Pauses(process) => {
                state.paused = Some(process);
            }
            Action::Resumes => state.paused = None,
        }
        (state != *last).then_some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        // At most one message of a kind; a renewal is written or confirmed.
        let kind = |message: &Message| match message {
            Message::Renewal { .. } | Message::Confirm { .. } => 0,
            Message::Next { .. } => 1,
            Message::Answer(_) => 2,
            Message::Append { .. } => 3,
        };
        let kinds: BTreeSet<u8> = state.net.iter().map(kind).collect();
        state.net.len() <= self.net && kinds.len() == state.net.len()
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ACKNOWLEDGED, |_, state: &State| !state.acknowledged_late),
            Property::always(APPENDED, |_, state: &State| !state.appended_late),
            Property::always(CEILING, |_, state: &State| !state.above_the_ceiling),
            Property::always(ONE_HOLDS, |_, state: &State| {
                let mut leased = state.holders.iter().chain([&state.fence.leased]);
                leased.all(|leased| leased.holds(NOW).map_or(true, |lease| lease.epoch == state.record.epoch))
            }),
            Property::always(GRANTABLE, |model: &Self, state: &State| model.can_grant(state)),
        ]
    }
}

const ACKNOWLEDGED: &str = "no acknowledgement in a superseded epoch";
const APPENDED: &str = "storage takes nothing of a superseded epoch";
const CEILING: &str = "nothing above the ceiling is acknowledged";
const ONE_HOLDS: &str = "who holds a lease holds the newest epoch";
const GRANTABLE: &str = "the next epoch can be granted";

#[test]
fn no_epoch_is_acknowledged_after_the_next_is_granted() {
    let model = Leases::new(None);
    let probes = model.probes.clone();
    let all = [ACKNOWLEDGED, APPENDED, CEILING, ONE_HOLDS, GRANTABLE];
    let checked = check("leases and fencing", model, &all);
    assert!(checked.found.is_empty(), "{:#?}", checked.found);
    assert!(checked.states >= 1_000_000, "{} states only", checked.states);
    // The rare paths were there.
    let seen = |probe: &AtomicU64| probe.load(Relaxed) > 0;
    assert!(probes.acknowledged[1..].iter().all(seen), "an epoch without acknowledgements");
    assert!(seen(&probes.unknown) && seen(&probes.superseded) && seen(&probes.deposed_refused));
    assert!(seen(&probes.confirmed) && seen(&probes.unconfirmed) && seen(&probes.withdrawn));
}

#[test]
fn each_missing_guard_is_found() {
    use Mutant::*;
    for (mutant, broken) in [
        (DriftIsIgnored, ONE_HOLDS),
        (NewLeaderDoesNotWait, ONE_HOLDS),
        (OldTermIsTaken, ONE_HOLDS),
        (RenewalExtendsNothing, ONE_HOLDS),
        (CountsFromTheAnswer, ONE_HOLDS),
        (FenceCountsFromTheAnswer, ONE_HOLDS),
        (RemainderIsPassedOnWhole, ONE_HOLDS),
        (NoSecondCheck, ACKNOWLEDGED),
        (FenceHasNoLease, APPENDED),
        (NoCeiling, CEILING),
        (AnswersUnconfirmed, ONE_HOLDS),
        (ProposedIsWithdrawn, ONE_HOLDS),
    ] {
        let checked = check(&format!("{mutant:?}"), Leases::new(Some(mutant)), &[broken]);
        let Some(path) = checked.found.get(broken) else { panic!("{mutant:?} was not found") };
        println!("  '{broken}' is broken after {} steps: {path:?}", path.len());
    }
}
