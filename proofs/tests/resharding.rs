//! Moving slots between shards, checked exhaustively: the real [`Slots`] of two shards and the real [`ClusterMap`], driven by two drivers that
//! repeat each other's steps, crash and wake at any point, over a network that loses, repeats and reorders steps, while clients write, delete and read by
//! whatever map they once read.
//!
//! One memory's slot moves to the other shard, and back with 63 others. What a driver does follows `nodes::control::driver`; what a step does to rows
//! follows `storage`: an import adds rows that are not shown, a drop removes rows of a slot that was left.

mod exhaustive;

use exhaustive::check;
use nodes::control::map::{ClusterMap, Resize, ShardEntry, ShardId};
use stateright::{Model, Property};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};
use storage::slots::{Decision, MoveId, Moving, SLOTS, Slot, SlotSet, Slots};

/// The slot that is looked at.
const SLOT: Slot = SLOTS - 1;
const TENANT: &str = "t";
/// Rows as bits: each write is a memory of its own.
type Rows = u8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shard {
    slots: Arc<Slots>,
    /// The slot's rows, shown or not.
    rows: Rows,
}

/// One step of a move on its way to a shard's ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Step {
    Seal,
    Import(Part),
    Release,
    Adopt(Total),
    Drop,
}

/// A part of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Part {
    sequence: u64,
    rows: Rows,
    cursor: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Total {
    pieces: u64,
    hash: u128,
}

/// A change of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Change {
    Plan,
    Switch(MoveId),
    End(MoveId),
    Shrink,
}

/// Where a driver is in a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum At {
    Seal,
    /// It asks the destination what it has, and the source for the next part.
    Copy,
    Import(Part),
    Release(Total),
    Adopt(Total),
    Switch,
    Drop,
    End,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    map: Arc<ClusterMap>,
    shards: [Shard; 2],
    /// What each driver is at; `None`: it will read the map. One that was paused still is where it was.
    drivers: [Option<(MoveId, At)>; 2],
    /// Steps under way. They stay when they arrive, so that they may arrive again.
    net: BTreeSet<(MoveId, Step)>,
    /// Which shards the slot's callers were ever sent to.
    routes: [bool; 2],
    /// Writes that were acknowledged, and those whose deletion was.
    written: Rows,
    deleted: Rows,
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    /// A driver reads the map.
    Read(usize),
    /// It sends its step, maybe again.
    Send(usize),
    /// It does what needs no shard's ledger.
    Does(usize),
    /// It crashes, or gives up waiting for an answer.
    Crash(usize),
    /// A step reaches its shard. Those drivers that wait for it learn its outcome, or nobody does.
    Arrives(MoveId, Step, bool),
    Lost(MoveId, Step),
    Write(ShardId),
    Delete(ShardId),
    /// An operator wants one shard.
    Shrink,
}

/// A guard that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    /// The destination adopts before the source has released.
    AdoptBeforeRelease,
    /// The map sends callers on before the source has released.
    SwitchBeforeRelease,
    /// A sealed slot takes writes.
    SealIsIgnored,
    /// A step of a finished move is taken for one of the present.
    OldSealIsTaken,
    OldDropIsTaken,
    /// A part that comes twice is imported twice.
    PartsAreCountedTwice,
    /// A driver that is late ends the move that it finds.
    AnyMoveIsEnded,
}

/// What came of each step, from one state of a shard's slots.
type Decided = HashMap<(MoveId, Step), Option<Arc<Slots>>>;
/// What came of each change, from one map.
type Changed = HashMap<Change, Arc<ClusterMap>>;

struct Resharding {
    mutant: Option<Mutant>,
    writes: u32,
    net: usize,
    /// The slots of each move, and between whom.
    moves: Vec<(ShardId, ShardId, SlotSet)>,
    first: ClusterMap,
    /// What [`Self::can_finish`] found: it depends on the map, the shards and the writes alone.
    finished: Mutex<HashMap<u64, bool>>,
    /// What shards decided, and what maps became: the real functions are asked once for each, since they go over thousands of slots.
    decided: Mutex<HashMap<Arc<Slots>, Decided>>,
    changed: Mutex<HashMap<Arc<ClusterMap>, Changed>>,
}

fn entry(slots: SlotSet) -> ShardEntry {
    ShardEntry { founded: true, ..ShardEntry::new(1, Default::default(), slots) }
}

fn hash_of(row: u32) -> u128 {
    u128::from(row + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
}

fn total_of(rows: Rows) -> Total {
    let each = (0..Rows::BITS).filter(|row| rows & (1 << row) != 0);
    Total { pieces: u64::from(rows.count_ones()), hash: each.map(hash_of).fold(0, u128::wrapping_add) }
}

impl Resharding {
    fn new(mutant: Option<Mutant>, writes: u32, net: usize) -> Resharding {
        // One slot too many in shard 0: it moves first. Then shard 1 is to go, and gives it back.
        let zero: SlotSet = (0..SLOTS / 2).chain([SLOT]).collect();
        let one: SlotSet = (SLOTS / 2..SLOT).collect();
        let shards = BTreeMap::from([(0, entry(zero)), (1, entry(one))]);
        let resize = Resize { shards: 2, slots_moved: 0, slots_to_move: 1, moving: None };
        let first = ClusterMap { version: 1, shards, resize: Some(resize), ..ClusterMap::default() };
        let mut model = Resharding {
            mutant,
            writes,
            net,
            moves: vec![],
            first,
            finished: Mutex::default(),
            decided: Mutex::default(),
            changed: Mutex::default(),
        };
        let mut map = model.first.clone();
        for _ in 0..2 {
            map = map.plan_move();
            if let Some(moving) = map.resize.as_ref().and_then(|resize| resize.moving.clone()) {
                model.moves.push((moving.from, moving.to, moving.slots));
                map = map.switch(moving.id).end_move(moving.id).plan_move();
                map = map.begin_resize(1).unwrap_or_default();
            }
        }
        model
    }

    /// Source, destination and slots of a move.
    fn of(&self, id: MoveId) -> (usize, usize, &SlotSet) {
        let (from, to, slots) = &self.moves[id as usize - 1];
        (*from as usize, *to as usize, slots)
    }

    fn takes(&self, shard: &Shard) -> bool {
        match self.mutant {
            Some(Mutant::SealIsIgnored) => shard.slots.shows(TENANT, SLOT),
            _ => shard.slots.takes(TENANT, SLOT),
        }
    }

    /// What the real functions say to a step.
    fn step(&self, there: &Slots, id: MoveId, step: Step) -> Decision {
        let slots = self.of(id).2;
        match step {
            Step::Seal => {
                let late = self.mutant == Some(Mutant::OldSealIsTaken) && there.moving().is_none();
                there.seal(if late { 2 } else { id }, slots)
            }
            Step::Import(Part { sequence, rows, cursor, .. }) => {
                let sequence = match (self.mutant, there.moving()) {
                    (Some(Mutant::PartsAreCountedTwice), Some((_, Moving::Arriving(arrived)))) => {
                        arrived.next
                    }
                    _ => sequence,
                };
                let Total { pieces, hash } = total_of(rows);
                there.import(id, slots, sequence, (pieces, hash, &[cursor]))
            }
            Step::Release => there.release(id),
            Step::Adopt(Total { pieces, hash }) => there.adopt(id, slots, pieces, hash),
            Step::Drop => there.dropped(id),
        }
    }

    /// The slots after a step, the same if it was taken before; `None`: it is refused.
    fn decide(&self, there: &Arc<Slots>, id: MoveId, step: Step) -> Option<Arc<Slots>> {
        let mut decided = self.decided.lock().ok()?;
        if let Some(known) = decided.get(there).and_then(|known| known.get(&(id, step))) {
            return known.clone();
        }
        let decision = match self.step(there, id, step) {
            Decision::Taken(next) => Some(Arc::new(next)),
            Decision::Already => Some(there.clone()),
            Decision::Refused => None,
        };
        decided.entry(there.clone()).or_default().insert((id, step), decision.clone());
        decision
    }

    /// A shard after a step.
    fn stepped(&self, shard: &Shard, id: MoveId, step: Step) -> Option<Shard> {
        // Row after row, as long as the slot is one that was left; when none is left, the move is over here.
        let left = matches!(shard.slots.moving(), Some((of, Moving::Left(_))) if of == id);
        if step == Step::Drop && shard.rows > 0 && (left || self.mutant == Some(Mutant::OldDropIsTaken)) {
            return Some(Shard { slots: shard.slots.clone(), rows: shard.rows & (shard.rows - 1) });
        }
        let slots = self.decide(&shard.slots, id, step)?;
        let rows = match step {
            Step::Import(part) if slots != shard.slots => shard.rows | part.rows,
            _ => shard.rows,
        };
        Some(Shard { slots, rows })
    }

    fn change(&self, map: &Arc<ClusterMap>, change: Change) -> Arc<ClusterMap> {
        let Ok(mut changed) = self.changed.lock() else { return map.clone() };
        if let Some(known) = changed.get(map).and_then(|known| known.get(&change)) {
            return known.clone();
        }
        let mut next = match change {
            Change::Plan => map.plan_move(),
            Change::Switch(id) => map.switch(id),
            Change::End(id) => map.end_move(id),
            Change::Shrink => map.begin_resize(1).unwrap_or_default(),
        };
        if let (Change::End(_), Some(Mutant::AnyMoveIsEnded)) = (change, self.mutant) {
            next.resize.iter_mut().for_each(|resize| resize.moving = None);
        }
        let next = Arc::new(next);
        changed.entry(map.clone()).or_default().insert(change, next.clone());
        next
    }

    fn target(&self, id: MoveId, step: Step) -> usize {
        let (from, to, _) = self.of(id);
        if matches!(step, Step::Import(_) | Step::Adopt(_)) { to } else { from }
    }

    fn step_of(at: At) -> Option<Step> {
        match at {
            At::Seal => Some(Step::Seal),
            At::Import(part) => Some(Step::Import(part)),
            At::Release(_) => Some(Step::Release),
            At::Adopt(total) => Some(Step::Adopt(total)),
            At::Drop => Some(Step::Drop),
            At::Copy | At::Switch | At::End => None,
        }
    }

    /// Where a driver goes on after a step that was taken. `rows`: what the shard has left of the slot.
    fn after(&self, at: At, rows: Rows) -> At {
        match (self.mutant, at) {
            (_, At::Seal) => At::Copy,
            (_, At::Import(_)) => At::Copy,
            (Some(Mutant::AdoptBeforeRelease), At::Adopt(total)) => At::Release(total),
            (Some(Mutant::AdoptBeforeRelease), At::Release(_)) => At::Switch,
            (Some(Mutant::SwitchBeforeRelease), At::Adopt(_)) => At::Switch,
            (Some(Mutant::SwitchBeforeRelease), At::Release(_)) => At::Drop,
            (_, At::Release(total)) => At::Adopt(total),
            (_, At::Adopt(_)) => At::Switch,
            (_, At::Drop) if rows > 0 => At::Drop,
            (_, At::Drop) => At::End,
            (_, At::Copy | At::Switch | At::End) => at,
        }
    }

    /// The destination has all.
    fn copied(&self, total: Total) -> At {
        match self.mutant {
            Some(Mutant::AdoptBeforeRelease | Mutant::SwitchBeforeRelease) => At::Adopt(total),
            _ => At::Release(total),
        }
    }

    /// What a driver finds when it asks both shards how far the copy is.
    fn copy(&self, state: &State, id: MoveId) -> Option<At> {
        let (from, to, slots) = self.of(id);
        let there = &state.shards[to].slots;
        let (next, cursor) = match there.moving() {
            Some((of, Moving::Arriving(arrived))) if of == id => {
                (arrived.next, arrived.cursor.first().copied().unwrap_or(0))
            }
            _ if there.owned().includes(slots) => {
                return Some(match self.mutant {
                    Some(Mutant::AdoptBeforeRelease) => At::Release(total_of(0)),
                    _ => At::Switch,
                });
            }
            _ => (0, 0),
        };
        // The source answers as long as it has the rows.
        let source = &state.shards[from];
        match source.slots.moving() {
            Some((of, Moving::Leaving(_) | Moving::Left(_))) if of == id => {}
            _ => return None,
        }
        // The first part has the first row, the second part the others; then the source tells its totals.
        let part = |rows| Some(At::Import(Part { sequence: next, rows, cursor: cursor + 1 }));
        match cursor {
            0 => part(source.rows & 1),
            1 => part(source.rows & !1),
            _ => Some(self.copied(total_of(source.rows))),
        }
    }

    /// What a driver does next, as the map says.
    fn reads(map: &ClusterMap) -> Option<(MoveId, At)> {
        let moving = map.resize.as_ref()?.moving.as_ref()?;
        Some((moving.id, if moving.switched { At::Drop } else { At::Seal }))
    }

    /// Plans the next move, or ends a resize that is done. Two moves are enough.
    fn plans(&self, map: &Arc<ClusterMap>) -> Option<Arc<ClusterMap>> {
        let open = map.resize.as_ref().is_some_and(|resize| resize.moving.is_none());
        let planned = open.then(|| self.change(map, Change::Plan))?;
        (planned.last_move <= 2).then_some(planned)
    }

    fn does(&self, state: &mut State, driver: usize) -> bool {
        let Some((id, at)) = state.drivers[driver] else { return false };
        state.drivers[driver] = match at {
            At::Copy => self.copy(state, id).map(|at| (id, at)),
            At::Switch => {
                state.map = self.change(&state.map, Change::Switch(id));
                state.routes[state.map.shard_of(TENANT, SLOT).unwrap_or(0) as usize] = true;
                let released = self.mutant != Some(Mutant::SwitchBeforeRelease);
                Some((id, if released { At::Drop } else { At::Release(total_of(0)) }))
            }
            At::End => {
                state.map = self.change(&state.map, Change::End(id));
                None
            }
            _ => return false,
        };
        true
    }

    /// A step reaches its shard; whether it changed anything.
    fn arrives(&self, state: &mut State, id: MoveId, step: Step, answered: bool) -> bool {
        let shard = self.target(id, step);
        let before = (state.shards[shard].clone(), state.drivers);
        let stepped = self.stepped(&state.shards[shard], id, step);
        let refused = stepped.is_none();
        if let Some(stepped) = stepped {
            state.shards[shard] = stepped;
        }
        let left = match state.shards[shard].slots.moving() {
            Some((of, Moving::Left(_))) if of == id => state.shards[shard].rows.max(1),
            _ => 0,
        };
        for driver in state.drivers.iter_mut().filter(|_| answered) {
            match *driver {
                Some((of, at)) if of == id && Self::step_of(at) == Some(step) => {
                    *driver = (!refused).then(|| (id, self.after(at, left)));
                }
                _ => {}
            }
        }
        before != (state.shards[shard].clone(), state.drivers)
    }

    /// Whether one driver, left alone, brings the move to its end, and all is as it must be then.
    fn can_finish(&self, state: &State) -> bool {
        let mut hasher = DefaultHasher::new();
        (&state.map, &state.shards, state.written, state.deleted).hash(&mut hasher);
        let key = hasher.finish();
        if let Some(finished) = self.finished.lock().ok().and_then(|finished| finished.get(&key).copied()) {
            return finished;
        }
        let mut end = state.clone();
        (end.drivers, end.net) = ([None; 2], BTreeSet::new());
        for _ in 0..40 {
            match end.drivers[0] {
                None => match Self::reads(&end.map) {
                    Some(job) => end.drivers[0] = Some(job),
                    None => break,
                },
                Some((id, at)) => match Self::step_of(at) {
                    Some(step) => drop(self.arrives(&mut end, id, step, true)),
                    None => drop(self.does(&mut end, 0)),
                },
            }
        }
        let at = end.map.shard_of(TENANT, SLOT).map_or(0, |shard| shard as usize);
        let (here, there) = (&end.shards[at], &end.shards[1 - at]);
        let finished = Self::reads(&end.map).is_none()
            && here.slots.takes(TENANT, SLOT)
            && here.rows == end.written & !end.deleted
            && (there.slots.shows(TENANT, SLOT), there.rows) == (false, 0)
            && end.shards.iter().all(|shard| shard.slots.moving().is_none());
        if let Ok(mut known) = self.finished.lock() {
            known.insert(key, finished);
        }
        finished
    }
}

impl Model for Resharding {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let owns = |shard: ShardId| match Slots::default().own(&self.first.shards[&shard].slots) {
            Decision::Taken(slots) => Shard { slots: Arc::new(slots), rows: 0 },
            _ => Shard { slots: Arc::default(), rows: 0 },
        };
        vec![State {
            map: Arc::new(self.first.clone()),
            shards: [owns(0), owns(1)],
            drivers: [None; 2],
            net: BTreeSet::new(),
            routes: [true, false],
            written: 0,
            deleted: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (driver, job) in state.drivers.iter().enumerate() {
            match job.map(|(_, at)| Self::step_of(at)) {
                None => actions.push(Action::Read(driver)),
                Some(Some(_)) => actions.extend([Action::Send(driver), Action::Crash(driver)]),
                Some(None) => actions.extend([Action::Does(driver), Action::Crash(driver)]),
            }
        }
        for (id, step) in &state.net {
            actions.extend([true, false].map(|answered| Action::Arrives(*id, *step, answered)));
            actions.push(Action::Lost(*id, *step));
        }
        for shard in [0, 1].into_iter().filter(|shard| state.routes[*shard as usize]) {
            actions.extend([Action::Write(shard), Action::Delete(shard)]);
        }
        if state.map.resize.is_none() {
            actions.push(Action::Shrink);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(driver) => match Self::reads(&state.map) {
                Some(job) => state.drivers[driver] = Some(job),
                None => state.map = self.plans(&state.map)?,
            },
            Action::Send(driver) => {
                let (id, at) = state.drivers[driver]?;
                state.net.insert((id, Self::step_of(at)?));
            }
            Action::Does(driver) => {
                self.does(&mut state, driver).then_some(())?;
            }
            Action::Crash(driver) => state.drivers[driver] = None,
            Action::Arrives(id, step, answered) => {
                self.arrives(&mut state, id, step, answered).then_some(())?;
            }
            Action::Lost(id, step) => drop(state.net.remove(&(id, step))),
            Action::Write(shard) => {
                let row = state.written.count_ones();
                let shard = &mut state.shards[shard as usize];
                (row < self.writes && self.takes(shard)).then_some(())?;
                shard.rows |= 1 << row;
                state.written |= 1 << row;
            }
            // The first memory is the one that is deleted.
            Action::Delete(shard) => {
                let shard = &mut state.shards[shard as usize];
                (self.takes(shard) && shard.rows & 1 != 0).then_some(())?;
                shard.rows &= !1;
                state.deleted |= 1;
            }
            Action::Shrink => state.map = self.change(&state.map, Change::Shrink),
        }
        state.drivers.sort_unstable();
        (state != *last).then_some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.net.len() <= self.net
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_TAKES, |model: &Self, state: &State| {
                state.shards.iter().filter(|shard| model.takes(shard)).count() <= 1
            }),
            Property::always(STRONG, |_, state: &State| {
                let asked = state.shards.iter().zip(state.routes).filter(|(_, route)| *route);
                let mut shown = asked.filter(|(shard, _)| shard.slots.shows(TENANT, SLOT));
                shown.all(|(shard, _)| shard.rows == state.written & !state.deleted)
            }),
            Property::always(ONE_SHOWS, |_, state: &State| {
                let kept = state.written & !state.deleted;
                let mut shown = state.shards.iter().filter(|shard| shard.slots.shows(TENANT, SLOT));
                match (shown.next(), shown.next()) {
                    (Some(shard), None) => shard.rows == kept,
                    // Between release and adoption nobody shows it, and both have it.
                    (None, None) => state.shards.iter().all(|shard| shard.rows == kept),
                    _ => false,
                }
            }),
            Property::always(FINISH, |model: &Self, state: &State| model.can_finish(state)),
            Property::sometimes(BACK, |_, state: &State| {
                let over = state.map.resize.as_ref().is_some_and(|resize| resize.moving.is_none());
                over && state.map.last_move == 2 && state.written.count_ones() > 1 && state.deleted != 0
            }),
        ]
    }
}

const ONE_TAKES: &str = "one shard at most takes writes of a slot";
const STRONG: &str = "a strong read sees every acknowledged write";
const ONE_SHOWS: &str = "an acknowledged write is in one shard that shows it";
const FINISH: &str = "the move can be finished";
const BACK: &str = "the slot has moved there and back";

#[test]
fn slots_move_there_and_back_under_every_interleaving() {
    let checked = check("resharding", Resharding::new(None, 3, 3), &[ONE_TAKES, STRONG, ONE_SHOWS, FINISH]);
    assert_eq!(checked.found.keys().collect::<Vec<_>>(), [&BACK], "{:#?}", checked.found);
    assert!(checked.states >= 1_000_000, "{} states only", checked.states);
}

#[test]
fn each_missing_guard_is_found() {
    use Mutant::*;
    for (mutant, broken) in [
        (AdoptBeforeRelease, STRONG),
        (SwitchBeforeRelease, STRONG),
        (SealIsIgnored, ONE_SHOWS),
        (OldSealIsTaken, FINISH),
        (OldDropIsTaken, FINISH),
        (PartsAreCountedTwice, FINISH),
        (AnyMoveIsEnded, FINISH),
    ] {
        let checked = check(&format!("{mutant:?}"), Resharding::new(Some(mutant), 3, 2), &[broken]);
        let Some(path) = checked.found.get(broken) else { panic!("{mutant:?} was not found") };
        println!("  '{broken}' is broken after {} steps: {path:?}", path.len());
    }
}
