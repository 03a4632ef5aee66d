//! Pinning and unpinning a tenant, checked exhaustively: the real [`Slots`] of two shards and the real [`ClusterMap`], driven by two drivers that
//! repeat each other's steps, crash and wake at any point, over a network that loses, repeats and reorders steps, while an operator pins the tenant
//! to either shard and unpins it, a resize moves everybody's slots, and clients write, delete and read by whatever map they once read.
//!
//! One slot is looked at, in which the tenant has memories, and another one that stands for all the rest. What a driver does and what a step does to
//! rows is as in `resharding.rs`; a move in which that slot has no part is carried out at once.

mod exhaustive;

use exhaustive::check;
use nodes::control::map::{ClusterMap, Move, Resize, ShardEntry, ShardId};
use stateright::{Model, Property};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};
use storage::slots::{Decision, Moving, SLOTS, Slot, SlotSet, Slots};

/// The slot that is looked at.
const SLOT: Slot = SLOTS - 1;
/// Whose memories lie in it: the tenant that is pinned, and one of all the others.
const LOTS: [&str; 2] = ["pinned", "other"];
/// Rows of each as bits: each write is a memory of its own.
type Rows = [u8; 2];
/// A move, by its place in [`Pinning::moves`].
type Number = u8;

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
    Switch(Number),
    End(Number),
    Asked(Wish),
}

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Wish {
    Pin(ShardId),
    Unpin,
}

const WISHES: [Wish; 3] = [Wish::Pin(0), Wish::Pin(1), Wish::Unpin];

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
    drivers: [Option<(Number, At)>; 2],
    /// Steps under way. They stay when they arrive, so that they may arrive again.
    net: BTreeSet<(Number, Step)>,
    /// Which shards the callers of each were ever sent to.
    routes: [[bool; 2]; 2],
    /// Writes that were acknowledged, and those whose deletion was.
    written: Rows,
    deleted: Rows,
    /// Which of the operator's wishes were told. Each is told once.
    told: [bool; WISHES.len()],
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
    Arrives(Number, Step, bool),
    Lost(Number, Step),
    Write(usize, ShardId),
    Delete(usize, ShardId),
    Tell(usize),
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
    /// What a pinned tenant has in the slots of everybody that move goes along.
    PinnedGoAlong,
    /// The plan of a resize takes a pinned tenant's slots for everybody's.
    PinnedAreEverybodys,
    /// A move of the tenant's slots takes those of all.
    OthersAreReleased,
    /// Its drop removes the rows of all.
    OthersAreDropped,
    /// Callers are sent where everybody's slots are.
    PinsAreNotRouted,
    /// A step of a finished move is taken for one of the present.
    OldDropIsTaken,
    PartsAreCountedTwice,
}

/// What came of each step, from one state of a shard's slots.
type Decided = HashMap<(Number, Step), Option<Arc<Slots>>>;
/// What came of each change, from one map.
type Changed = HashMap<Change, Arc<ClusterMap>>;

struct Pinning {
    mutant: Option<Mutant>,
    /// Of the pinned tenant, and of the others.
    writes: [u32; 2],
    net: usize,
    /// Every move that there was, as it was planned.
    moves: Mutex<Vec<Arc<Move>>>,
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
    let bits = u16::from_le_bytes(rows);
    let each = (0..u16::BITS).filter(|row| bits & (1 << row) != 0);
    Total { pieces: u64::from(bits.count_ones()), hash: each.map(hash_of).fold(0, u128::wrapping_add) }
}

fn each(of: impl Fn(usize) -> u8) -> Rows {
    [of(0), of(1)]
}

impl Pinning {
    fn new(mutant: Option<Mutant>, writes: [u32; 2], net: usize) -> Pinning {
        // One slot too many in shard 0: a resize moves it.
        let zero: SlotSet = (0..SLOTS / 2).chain([SLOT]).collect();
        let one: SlotSet = (SLOTS / 2..SLOT).collect();
        let shards = BTreeMap::from([(0, entry(zero)), (1, entry(one))]);
        let resize = Resize { shards: 2, slots_moved: 0, slots_to_move: 1, moving: None };
        let first = ClusterMap { version: 1, shards, resize: Some(resize), ..ClusterMap::default() };
        let (moves, finished, decided, changed) = Default::default();
        Pinning { mutant, writes, net, moves, first, finished, decided, changed }
    }

    fn of(&self, number: Number) -> Arc<Move> {
        self.moves.lock().unwrap_or_else(|p| p.into_inner())[number as usize].clone()
    }

    /// The move under way, by its number.
    fn number(&self, map: &ClusterMap) -> Option<Number> {
        let moving = Move { switched: false, ..map.moving()?.clone() };
        let mut moves = self.moves.lock().unwrap_or_else(|p| p.into_inner());
        let at = moves.iter().position(|known| **known == moving).unwrap_or_else(|| {
            moves.push(Arc::new(moving));
            moves.len() - 1
        });
        Some(at as Number)
    }

    fn takes(&self, shard: &Shard, lot: usize) -> bool {
        match self.mutant {
            Some(Mutant::SealIsIgnored) => shard.slots.shows(LOTS[lot], SLOT),
            _ => shard.slots.takes(LOTS[lot], SLOT),
        }
    }

    /// Whether a move takes a lot's rows along.
    fn along(&self, moving: &Move, lot: usize) -> bool {
        let everybody = moving.slots.everybody().contains(SLOT);
        moving.slots.contains(LOTS[lot], SLOT) || self.mutant == Some(Mutant::PinnedGoAlong) && everybody
    }

    fn only(&self, moving: &Move, rows: Rows) -> Rows {
        each(|lot| if self.along(moving, lot) { rows[lot] } else { 0 })
    }

    /// What a drop removes.
    fn dropped(&self, moving: &Move, rows: Rows) -> Rows {
        if self.mutant == Some(Mutant::OthersAreDropped) { rows } else { self.only(moving, rows) }
    }

    /// Where a lot's callers are sent.
    fn route(&self, map: &ClusterMap, lot: usize) -> usize {
        let lot = if self.mutant == Some(Mutant::PinsAreNotRouted) { 1 } else { lot };
        map.shard_of(LOTS[lot], SLOT).unwrap_or(0) as usize
    }

    /// What the real functions say to a step.
    fn step(&self, there: &Slots, number: Number, step: Step) -> Decision {
        let moving = self.of(number);
        let own = moving.slots.everybody().is_empty();
        let slots = match self.mutant {
            Some(Mutant::OthersAreReleased) if own => &SlotSet::from(moving.slots.of(LOTS[0]).clone()),
            _ => &moving.slots,
        };
        let id = moving.id;
        match step {
            Step::Seal => there.seal(id, slots),
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
    fn decide(&self, there: &Arc<Slots>, id: Number, step: Step) -> Option<Arc<Slots>> {
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
    fn stepped(&self, shard: &Shard, number: Number, step: Step) -> Option<Shard> {
        let moving = self.of(number);
        // Row after row, as long as the slots are those that were left; when none is left, the move is over here.
        let left = matches!(shard.slots.moving(), Some((of, Moving::Left(_))) if of == moving.id);
        if step == Step::Drop && (left || self.mutant == Some(Mutant::OldDropIsTaken)) {
            let going = u16::from_le_bytes(self.dropped(&moving, shard.rows));
            if going != 0 {
                let rows = u16::from_le_bytes(shard.rows) & !(going & going.wrapping_neg());
                return Some(Shard { slots: shard.slots.clone(), rows: rows.to_le_bytes() });
            }
        }
        let slots = self.decide(&shard.slots, number, step)?;
        let rows = match step {
            Step::Import(part) if slots != shard.slots => each(|lot| shard.rows[lot] | part.rows[lot]),
            _ => shard.rows,
        };
        Some(Shard { slots, rows })
    }

    fn change(&self, map: &Arc<ClusterMap>, change: Change) -> Arc<ClusterMap> {
        if let Some(known) =
            self.changed.lock().ok().and_then(|changed| changed.get(map)?.get(&change).cloned())
        {
            return known;
        }
        let mut next = match change {
            Change::Plan => map.plan_move(),
            Change::Switch(number) => map.switch(self.of(number).id),
            Change::End(number) => map.end_move(self.of(number).id),
            Change::Asked(Wish::Pin(shard)) => map.pin(LOTS[0], shard).unwrap_or_default(),
            Change::Asked(Wish::Unpin) => map.unpin(LOTS[0]),
        };
        if let (Change::Plan, Some(Mutant::PinnedAreEverybodys)) = (change, self.mutant)
            && let Some(moving) = next.resize.as_mut().and_then(|resize| resize.moving.as_mut())
        {
            moving.slots = SlotSet::from(moving.slots.everybody().clone());
        }
        let next = Arc::new(next);
        if let Ok(mut changed) = self.changed.lock() {
            changed.entry(map.clone()).or_default().insert(change, next.clone());
        }
        next
    }

    fn target(&self, number: Number, step: Step) -> usize {
        let moving = self.of(number);
        (if matches!(step, Step::Import(_) | Step::Adopt(_)) { moving.to } else { moving.from }) as usize
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

    /// Where a driver goes on after a step that was taken. `left`: the shard still has rows to remove.
    fn after(&self, at: At, left: bool) -> At {
        match (self.mutant, at) {
            (_, At::Seal) => At::Copy,
            (_, At::Import(_)) => At::Copy,
            (Some(Mutant::AdoptBeforeRelease), At::Adopt(total)) => At::Release(total),
            (Some(Mutant::AdoptBeforeRelease), At::Release(_)) => At::Switch,
            (Some(Mutant::SwitchBeforeRelease), At::Adopt(_)) => At::Switch,
            (Some(Mutant::SwitchBeforeRelease), At::Release(_)) => At::Drop,
            (_, At::Release(total)) => At::Adopt(total),
            (_, At::Adopt(_)) => At::Switch,
            (_, At::Drop) if left => At::Drop,
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
    fn copy(&self, state: &State, number: Number) -> Option<At> {
        let moving = self.of(number);
        let there = &state.shards[moving.to as usize].slots;
        let (next, cursor) = match there.moving() {
            Some((of, Moving::Arriving(arrived))) if of == moving.id => {
                (arrived.next, arrived.cursor.first().copied().unwrap_or(0))
            }
            _ if there.owned().includes(&moving.slots) => {
                return Some(match self.mutant {
                    Some(Mutant::AdoptBeforeRelease) => At::Release(total_of([0; 2])),
                    _ => At::Switch,
                });
            }
            _ => (0, 0),
        };
        // The source answers as long as it has the rows.
        let source = &state.shards[moving.from as usize];
        match source.slots.moving() {
            Some((of, Moving::Leaving(_) | Moving::Left(_))) if of == moving.id => {}
            _ => return None,
        }
        // The first part has the first row of each, the second part the others; then the source tells its totals.
        let rows = self.only(&moving, source.rows);
        let part = |rows| Some(At::Import(Part { sequence: next, rows, cursor: cursor + 1 }));
        match cursor {
            0 => part(rows.map(|rows| rows & 1)),
            1 => part(rows.map(|rows| rows & !1)),
            _ => Some(self.copied(total_of(rows))),
        }
    }

    /// What a driver does next, as the map says.
    fn reads(&self, map: &ClusterMap) -> Option<(Number, At)> {
        let number = self.number(map)?;
        Some((number, if map.moving()?.switched { At::Drop } else { At::Seal }))
    }

    /// Plans the next move that the slot is in, or ends a resize that is done; moves before it are carried out at once.
    fn plans(&self, state: &State) -> Option<State> {
        let mut next = state.clone();
        while next.map.moving().is_none() {
            let planned = self.change(&next.map, Change::Plan);
            if planned == next.map {
                break;
            }
            next.map = planned;
            let Some(number) = self.number(&next.map) else { continue };
            let moving = self.of(number);
            if LOTS.iter().any(|lot| moving.slots.contains(lot, SLOT)) {
                break;
            }
            let none = Part { sequence: 0, rows: [0; 2], cursor: 1 };
            let all = total_of([0; 2]);
            for step in [Step::Seal, Step::Import(none), Step::Release, Step::Adopt(all), Step::Drop] {
                let shard = &mut next.shards[self.target(number, step)];
                shard.slots = self.decide(&shard.slots, number, step)?;
            }
            next.map = self.change(&next.map, Change::Switch(number));
            next.map = self.change(&next.map, Change::End(number));
        }
        (next != *state).then_some(next)
    }

    fn does(&self, state: &mut State, driver: usize) -> bool {
        let Some((number, at)) = state.drivers[driver] else { return false };
        state.drivers[driver] = match at {
            At::Copy => self.copy(state, number).map(|at| (number, at)),
            At::Switch => {
                state.map = self.change(&state.map, Change::Switch(number));
                for lot in 0..LOTS.len() {
                    state.routes[lot][self.route(&state.map, lot)] = true;
                }
                let released = self.mutant != Some(Mutant::SwitchBeforeRelease);
                Some((number, if released { At::Drop } else { At::Release(total_of([0; 2])) }))
            }
            At::End => {
                state.map = self.change(&state.map, Change::End(number));
                None
            }
            _ => return false,
        };
        true
    }

    /// A step reaches its shard; whether it changed anything.
    fn arrives(&self, state: &mut State, number: Number, step: Step, answered: bool) -> bool {
        let shard = self.target(number, step);
        let before = (state.shards[shard].clone(), state.drivers);
        let stepped = self.stepped(&state.shards[shard], number, step);
        let refused = stepped.is_none();
        if let Some(stepped) = stepped {
            state.shards[shard] = stepped;
        }
        let id = self.of(number).id;
        let left = matches!(state.shards[shard].slots.moving(), Some((of, Moving::Left(_))) if of == id);
        for driver in state.drivers.iter_mut().filter(|_| answered) {
            match *driver {
                Some((of, at)) if of == number && Self::step_of(at) == Some(step) => {
                    *driver = (!refused).then(|| (number, self.after(at, left)));
                }
                _ => {}
            }
        }
        before != (state.shards[shard].clone(), state.drivers)
    }

    /// Whether one driver, left alone, brings all moves to their ends, and all is as it must be then.
    fn can_finish(&self, state: &State) -> bool {
        let mut hasher = DefaultHasher::new();
        (&state.map, &state.shards, state.written, state.deleted).hash(&mut hasher);
        let key = hasher.finish();
        if let Some(finished) = self.finished.lock().ok().and_then(|finished| finished.get(&key).copied()) {
            return finished;
        }
        let mut end = state.clone();
        (end.drivers, end.net) = ([None; 2], BTreeSet::new());
        for _ in 0..80 {
            match end.drivers[0] {
                None => match (self.reads(&end.map), self.plans(&end)) {
                    (Some(job), _) => end.drivers[0] = Some(job),
                    (None, Some(planned)) => end = planned,
                    (None, None) => break,
                },
                Some((number, at)) => match Self::step_of(at) {
                    Some(step) => drop(self.arrives(&mut end, number, step, true)),
                    None => drop(self.does(&mut end, 0)),
                },
            }
        }
        let kept = |lot: usize| end.written[lot] & !end.deleted[lot];
        let settled = |lot: usize| {
            let at = self.route(&end.map, lot);
            let (here, there) = (&end.shards[at], &end.shards[1 - at]);
            here.slots.takes(LOTS[lot], SLOT)
                && here.rows[lot] == kept(lot)
                && (there.slots.shows(LOTS[lot], SLOT), there.rows[lot]) == (false, 0)
        };
        let pinned = end.map.pins.get(LOTS[0]).is_none_or(|shard| self.route(&end.map, 0) == *shard as usize);
        let finished = end.map.moving().is_none()
            && end.map.resize.is_none()
            && pinned
            && (0..LOTS.len()).all(settled)
            && end.shards.iter().all(|shard| shard.slots.moving().is_none());
        if let Ok(mut known) = self.finished.lock() {
            known.insert(key, finished);
        }
        finished
    }

    /// Whether all lots of all shards are as they must be.
    fn all(&self, holds: impl Fn(usize) -> bool) -> bool {
        (0..LOTS.len()).all(holds)
    }
}

impl Model for Pinning {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let owns = |shard: ShardId| match Slots::default().own(&self.first.shards[&shard].slots) {
            Decision::Taken(slots) => Shard { slots: Arc::new(slots), rows: [0; 2] },
            _ => Shard { slots: Arc::default(), rows: [0; 2] },
        };
        vec![State {
            map: Arc::new(self.first.clone()),
            shards: [owns(0), owns(1)],
            drivers: [None; 2],
            net: BTreeSet::new(),
            routes: [[true, false]; 2],
            written: [0; 2],
            deleted: [0; 2],
            told: [false; WISHES.len()],
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
        for (lot, routes) in state.routes.iter().enumerate() {
            for shard in [0, 1].into_iter().filter(|shard| routes[*shard as usize]) {
                actions.extend([Action::Write(lot, shard), Action::Delete(lot, shard)]);
            }
        }
        // Whatever is wished meanwhile is looked at when the next move is planned.
        if state.map.moving().is_none() {
            actions.extend((0..WISHES.len()).filter(|wish| !state.told[*wish]).map(Action::Tell));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Read(driver) => match self.reads(&state.map) {
                Some(job) => state.drivers[driver] = Some(job),
                None => state = self.plans(&state)?,
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
            Action::Write(lot, shard) => {
                let row = state.written[lot].count_ones();
                let shard = &mut state.shards[shard as usize];
                (row < self.writes[lot] && self.takes(shard, lot)).then_some(())?;
                shard.rows[lot] |= 1 << row;
                state.written[lot] |= 1 << row;
            }
            // The first memory is the one that is deleted.
            Action::Delete(lot, shard) => {
                let shard = &mut state.shards[shard as usize];
                (lot == 0 && self.takes(shard, lot) && shard.rows[lot] & 1 != 0).then_some(())?;
                shard.rows[lot] &= !1;
                state.deleted[lot] |= 1;
            }
            Action::Tell(wish) => {
                state.told[wish] = true;
                state.map = self.change(&state.map, Change::Asked(WISHES[wish]));
            }
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
                model.all(|lot| state.shards.iter().filter(|shard| model.takes(shard, lot)).count() <= 1)
            }),
            Property::always(STRONG, |model: &Self, state: &State| {
                model.all(|lot| {
                    let asked = state.shards.iter().zip(state.routes[lot]).filter(|(_, route)| *route);
                    let mut shown = asked.filter(|(shard, _)| shard.slots.shows(LOTS[lot], SLOT));
                    shown.all(|(shard, _)| shard.rows[lot] == state.written[lot] & !state.deleted[lot])
                })
            }),
            Property::always(ONE_SHOWS, |model: &Self, state: &State| {
                model.all(|lot| {
                    let kept = state.written[lot] & !state.deleted[lot];
                    let mut shown = state.shards.iter().filter(|shard| shard.slots.shows(LOTS[lot], SLOT));
                    match (shown.next(), shown.next()) {
                        (Some(shard), None) => shard.rows[lot] == kept,
                        // Between release and adoption nobody shows it, and both have it.
                        (None, None) => state.shards.iter().all(|shard| shard.rows[lot] == kept),
                        _ => false,
                    }
                })
            }),
            Property::always(FINISH, |model: &Self, state: &State| model.can_finish(state)),
            Property::sometimes(APART, |model: &Self, state: &State| {
                let (pinned, other) = (model.route(&state.map, 0), model.route(&state.map, 1));
                let settled = state.map.moving().is_none() && state.map.resize.is_none();
                settled && pinned != other && state.written.iter().all(|rows| *rows != 0)
            }),
            Property::sometimes(BACK, |_, state: &State| {
                let over = state.map.moving().is_none() && state.map.resize.is_none();
                over && state.told == [true; 3] && state.map.apart().is_empty() && state.deleted[0] != 0
            }),
        ]
    }
}

const ONE_TAKES: &str = "one shard at most takes writes of a tenant's slot";
const STRONG: &str = "a strong read sees every acknowledged write";
const ONE_SHOWS: &str = "an acknowledged write is in one shard that shows it";
const FINISH: &str = "all moves can be finished, and tenants are where they are pinned";
const APART: &str = "the slot lies in two shards, for the pinned tenant and for the others";
const BACK: &str = "the tenant was pinned to both shards and is pinned no longer";

fn every_interleaving(messages: usize) {
    let model = Pinning::new(None, [1, 1], messages);
    let checked = check("pinning", model, &[ONE_TAKES, STRONG, ONE_SHOWS, FINISH]);
    assert_eq!(checked.found.keys().collect::<Vec<_>>(), [&APART, &BACK], "{:#?}", checked.found);
    assert!(checked.states >= 1_000_000, "{} states only", checked.states);
}

#[test]
fn a_tenant_is_pinned_and_unpinned_under_every_interleaving() {
    every_interleaving(1);
}

#[test]
#[ignore = "takes some five minutes"]
fn and_with_two_steps_under_way() {
    every_interleaving(2);
}

#[test]
fn each_missing_guard_is_found() {
    use Mutant::*;
    for (mutant, broken) in [
        (PinnedGoAlong, ONE_SHOWS),
        (PinnedAreEverybodys, FINISH),
        (OthersAreReleased, ONE_SHOWS),
        (OthersAreDropped, ONE_SHOWS),
        (PinsAreNotRouted, FINISH),
        (AdoptBeforeRelease, ONE_SHOWS),
        (SwitchBeforeRelease, STRONG),
        (SealIsIgnored, ONE_SHOWS),
        (OldDropIsTaken, FINISH),
        (PartsAreCountedTwice, FINISH),
    ] {
        let checked = check(&format!("{mutant:?}"), Pinning::new(Some(mutant), [2, 1], 2), &[broken]);
        let Some(path) = checked.found.get(broken) else { panic!("{mutant:?} was not found") };
        println!("  '{broken}' is broken after {} steps: {path:?}", path.len());
    }
}
