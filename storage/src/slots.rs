//! Slots: the unit in which memories move between shards.
//!
//! A scope key hashes to one of [`SLOTS`] slots, for ever; the cluster map says which shard has a slot. This is consistent hashing in the form of
//! fixed, equal partitions (G. DeCandia et al., Dynamo, SOSP 2007, 6.2, strategy 3): when shards come or go, whole slots move, and no
//! more of them than must.
//!
//! A tenant may be pinned to a shard. Then it has all slots for itself, beside everybody's: sets of slots are sets of (tenant, slot)
//! ([`SlotSet`]), and to pin a tenant, or to unpin it, is to move its own.
//!
//! A move is driven from outside by [`Step`]s, each an entry of a shard's ledger, so every replica decides them alike, and each may be
//! repeated:
//!
//! ```text
//!   source        Seal ──────────────── copying ─────────────► Release ───────────────────────────► Drop …
//!                 no writes, still read                        no reads                             rows removed
//!   destination          Import 0, 1, 2 … (not shown)                   ─► Adopt ─► (map: destination)
//!                                                                          reads and writes
//! ```
//!
//! At no moment do two shards show a slot, so none answers strong reads while another takes writes: the destination adopts what the source has sealed,
//! copied and **released**. The release must come first, since callers may come to the destination before the map sends them there: by an old map, of a
//! time when the slot was there before. And it must come only when all has arrived (the source's totals are the destination's), since there is no
//! way back from it. `proofs/tests/resharding.rs` goes through every interleaving.
//!
//! What can go wrong: the driver dies (another one repeats its step), two drivers run (steps are the same, and those of a finished move are
//! refused by its number), a step arrives late (refused likewise), the copy is not what was sealed (counts and hashes differ: not adopted).

use crate::model::{GLOBAL_TENANT, MemoryId, Owner};
use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

pub type Slot = u16;

/// So many slots there are; twelve bits.
pub const SLOTS: Slot = 4096;

/// The slot of an owner's memories; a GLOBAL memory's is its own.
pub fn slot_of(owner: &Owner, id: &MemoryId) -> Slot {
    let mut hasher = blake3::Hasher::new();
    let (kind, tenant, name): (u8, &str, &[u8]) = match owner {
        Owner::Agent { tenant, agent } => (1, tenant, agent.as_bytes()),
        Owner::User { tenant, user } => (2, tenant, user.as_bytes()),
        Owner::Shared { tenant } => (3, tenant, b""),
        Owner::Global => (4, GLOBAL_TENANT, id),
    };
    hasher
        .update(&[kind])
        .update(&(tenant.len() as u64).to_le_bytes())
        .update(tenant.as_bytes())
        .update(name);
    let hash = hasher.finalize();
    u16::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1]]) % SLOTS
}

/// Numbers of slots as sorted ranges that do not touch, both ends included. In text `0-1023,2048`.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Ranges(Vec<(Slot, Slot)>);

impl Ranges {
    pub fn all() -> Ranges {
        Ranges(vec![(0, SLOTS - 1)])
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|(from, to)| (to - from) as usize + 1).sum()
    }

    pub fn contains(&self, slot: Slot) -> bool {
        let behind = self.0.partition_point(|(from, _)| *from <= slot);
        behind > 0 && slot <= self.0[behind - 1].1
    }

    pub fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.0.iter().flat_map(|(from, to)| *from..=*to)
    }

    pub fn pairs(&self) -> &[(Slot, Slot)] {
        &self.0
    }

    pub fn union(&self, other: &Ranges) -> Ranges {
        let mut all: Vec<(Slot, Slot)> = self.0.iter().chain(&other.0).copied().collect();
        all.sort_unstable();
        let mut ranges: Vec<(Slot, Slot)> = Vec::with_capacity(all.len());
        for (from, to) in all {
            match ranges.last_mut() {
                Some((_, end)) if from <= *end + 1 => *end = to.max(*end),
                _ => ranges.push((from, to)),
            }
        }
        Ranges(ranges)
    }

    pub fn minus(&self, other: &Ranges) -> Ranges {
        let mut ranges = vec![];
        for (mut from, to) in self.0.iter().copied() {
            for (first, last) in other.0.iter().copied() {
                if last < from || first > to {
                    continue;
                }
                if first > from {
                    ranges.push((from, first - 1));
                }
                from = last + 1;
            }
            if from <= to {
                ranges.push((from, to));
            }
        }
        Ranges(ranges)
    }

    pub fn meet(&self, other: &Ranges) -> Ranges {
        self.minus(&self.minus(other))
    }

    pub fn includes(&self, other: &Ranges) -> bool {
        // Ranges do not touch, so a range of the other lies within one.
        let within = |(from, to): &(Slot, Slot)| {
            let behind = self.0.partition_point(|(first, _)| first <= from);
            behind > 0 && *to <= self.0[behind - 1].1
        };
        other.0.iter().all(within)
    }

    pub fn meets(&self, other: &Ranges) -> bool {
        other.0.iter().any(|(from, to)| self.0.iter().any(|(first, last)| first <= to && from <= last))
    }
}

/// From slots in rising order, each once.
impl FromIterator<Slot> for Ranges {
    fn from_iter<I: IntoIterator<Item = Slot>>(slots: I) -> Ranges {
        let mut ranges: Vec<(Slot, Slot)> = vec![];
        for slot in slots {
            match ranges.last_mut() {
                Some((_, to)) if *to + 1 == slot => *to = slot,
                _ => ranges.push((slot, slot)),
            }
        }
        Ranges(ranges)
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (from, to)) in self.0.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            match from == to {
                true => write!(f, "{comma}{from}")?,
                false => write!(f, "{comma}{from}-{to}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Ranges, String> {
        let number = |t: &str| {
            let slot = t.parse::<Slot>().ok().filter(|slot| *slot < SLOTS);
            slot.ok_or_else(|| format!("'{t}' is no slot; they are 0 to {}", SLOTS - 1))
        };
        let mut ranges: Vec<(Slot, Slot)> = vec![];
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to) = (number(from)?, number(to)?);
            if from > to || ranges.last().is_some_and(|(_, end)| end + 1 >= from) {
                return Err(format!("'{text}' is not in rising order"));
            }
            ranges.push((from, to));
        }
        Ok(Ranges(ranges))
    }
}

impl TryFrom<String> for Ranges {
    type Error = String;
    fn try_from(text: String) -> Result<Ranges, String> {
        text.parse()
    }
}

impl From<Ranges> for String {
    fn from(slots: Ranges) -> String {
        slots.to_string()
    }
}

/// A set of slots: those of everybody, and of tenants that have others than everybody those of their own. A pinned tenant's memories lie
/// elsewhere than its slots say, so each pinned tenant has all [`SLOTS`] slots for itself, and what is whose is a set of (tenant, slot).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotSet {
    #[serde(rename = "slots")]
    everybody: Ranges,
    /// Never the same as everybody's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    apart: BTreeMap<String, Ranges>,
}

impl SlotSet {
    pub fn all() -> SlotSet {
        SlotSet::from(Ranges::all())
    }

    /// One tenant's slots.
    pub fn of_tenant(tenant: &str, slots: Ranges) -> SlotSet {
        SlotSet::default().with(tenant, slots)
    }

    /// The same set, but for one tenant.
    pub fn with(mut self, tenant: &str, slots: Ranges) -> SlotSet {
        match slots == self.everybody {
            true => self.apart.remove(tenant),
            false => self.apart.insert(tenant.into(), slots),
        };
        self
    }

    pub fn is_empty(&self) -> bool {
        self.everybody.is_empty() && self.apart.is_empty()
    }

    /// The slots of all tenants that have none of their own.
    pub fn everybody(&self) -> &Ranges {
        &self.everybody
    }

    pub fn of(&self, tenant: &str) -> &Ranges {
        self.apart.get(tenant).unwrap_or(&self.everybody)
    }

    /// The tenants that have others than everybody.
    pub fn apart(&self) -> &BTreeMap<String, Ranges> {
        &self.apart
    }

    pub fn contains(&self, tenant: &str, slot: Slot) -> bool {
        self.of(tenant).contains(slot)
    }

    fn pairs<'a>(&'a self, other: &'a SlotSet) -> impl Iterator<Item = (&'a Ranges, &'a Ranges)> {
        let tenants = self.apart.keys().chain(other.apart.keys());
        let apart = tenants.map(|tenant| (self.of(tenant), other.of(tenant)));
        apart.chain([(&self.everybody, &other.everybody)])
    }

    fn joined(&self, other: &SlotSet, of: fn(&Ranges, &Ranges) -> Ranges) -> SlotSet {
        let everybody = SlotSet::from(of(&self.everybody, &other.everybody));
        let tenants = self.apart.keys().chain(other.apart.keys());
        tenants.fold(everybody, |set, tenant| set.with(tenant, of(self.of(tenant), other.of(tenant))))
    }

    pub fn union(&self, other: &SlotSet) -> SlotSet {
        self.joined(other, Ranges::union)
    }

    pub fn minus(&self, other: &SlotSet) -> SlotSet {
        self.joined(other, Ranges::minus)
    }

    pub fn includes(&self, other: &SlotSet) -> bool {
        self.pairs(other).all(|(own, other)| own.includes(other))
    }

    pub fn meets(&self, other: &SlotSet) -> bool {
        self.pairs(other).any(|(own, other)| own.meets(other))
    }
}

impl From<Ranges> for SlotSet {
    fn from(everybody: Ranges) -> SlotSet {
        SlotSet { everybody, apart: BTreeMap::new() }
    }
}

/// Of everybody, in rising order, each once.
impl FromIterator<Slot> for SlotSet {
    fn from_iter<I: IntoIterator<Item = Slot>>(slots: I) -> SlotSet {
        SlotSet::from(slots.into_iter().collect::<Ranges>())
    }
}

impl fmt::Display for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.everybody)?;
        for (at, (tenant, slots)) in self.apart.iter().filter(|(_, slots)| !slots.is_empty()).enumerate() {
            let comma = if at > 0 || !self.everybody.is_empty() { "; " } else { "" };
            write!(f, "{comma}{slots} of {tenant}")?;
        }
        Ok(())
    }
}

/// In front of tenants' own slots. No range looks like it, and a set without such tenants is written as it was before there were any.
const APART: (Slot, Slot) = (1, 0);

impl Encode for SlotSet {
    fn encode<E: Encoder>(&self, to: &mut E) -> Result<(), EncodeError> {
        if self.apart.is_empty() {
            return self.everybody.encode(to);
        }
        let mut marked = self.everybody.clone();
        marked.0.push(APART);
        marked.encode(to)?;
        self.apart.encode(to)
    }
}

impl<C> Decode<C> for SlotSet {
    fn decode<D: Decoder<Context = C>>(from: &mut D) -> Result<SlotSet, DecodeError> {
        let mut everybody = Ranges::decode(from)?;
        let apart = match everybody.0.pop_if(|last| *last == APART) {
            Some(_) => Decode::decode(from)?,
            None => BTreeMap::new(),
        };
        Ok(SlotSet { everybody, apart })
    }
}

bincode::impl_borrow_decode!(SlotSet);

/// The number of a move: greater than those of all moves before it.
pub type MoveId = u64;

/// Which slots a shard has, and the move that it takes part in; part of its logical state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Slots {
    /// `None`: it was never told, and has all.
    owned: Option<SlotSet>,
    /// The greatest move that it has heard of.
    last: MoveId,
    moving: Option<Moving>,
}

/// A shard's part in a move.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Moving {
    /// Owned, read, not written any more.
    Leaving(SlotSet),
    /// Not owned any more; their rows are being removed.
    Left(SlotSet),
    /// Not owned yet.
    Arriving(Arrived),
}

/// What has arrived of a move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Arrived {
    pub slots: SlotSet,
    /// The number of the import that comes next.
    pub next: u64,
    /// Where the source goes on; it alone understands it.
    pub cursor: Vec<u8>,
    pub pieces: u64,
    /// Sum of the pieces' hashes.
    pub hash: u128,
}

/// What a step does to a shard's slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The step is taken: this is the new state.
    Taken(Slots),
    /// It was taken before.
    Already,
    /// It belongs to a move that is over, or cannot be taken in this state.
    Refused,
}

impl Slots {
    /// Whether a tenant's memories of a slot are here, and shown.
    pub fn shows(&self, tenant: &str, slot: Slot) -> bool {
        self.owned.as_ref().is_none_or(|owned| owned.contains(tenant, slot))
    }

    /// Whether a tenant's memories of a slot may be changed here.
    pub fn takes(&self, tenant: &str, slot: Slot) -> bool {
        let sealed = matches!(&self.moving, Some(Moving::Leaving(slots)) if slots.contains(tenant, slot));
        self.shows(tenant, slot) && (!sealed || sim::planted!("take-writes-of-a-sealed-slot"))
    }

    /// Whether everything may be changed here.
    pub fn takes_all(&self) -> bool {
        self.owned.is_none() && !matches!(self.moving, Some(Moving::Leaving(_)))
    }

    /// Whether there may be rows here that are not shown.
    pub fn hides(&self) -> bool {
        matches!(self.moving, Some(Moving::Left(_) | Moving::Arriving(_)))
    }

    pub fn owned(&self) -> SlotSet {
        self.owned.clone().unwrap_or_else(SlotSet::all)
    }

    pub fn moving(&self) -> Option<(MoveId, &Moving)> {
        self.moving.as_ref().map(|moving| (self.last, moving))
    }

    fn with(&self, owned: SlotSet, last: MoveId, moving: Option<Moving>) -> Decision {
        let owned = Some(owned).filter(|owned| *owned != SlotSet::all());
        Decision::Taken(Slots { owned, last, moving })
    }

    /// A new shard is told what it has. Number 0 is for this alone.
    pub fn own(&self, slots: &SlotSet) -> Decision {
        match (self.last, &self.moving) {
            (0, None) if self.owned() == *slots => Decision::Already,
            (0, None) if self.owned.is_none() => self.with(slots.clone(), 0, None),
            (0, _) => Decision::Refused,
            _ => Decision::Already,
        }
    }

    /// The source stops writes.
    pub fn seal(&self, id: MoveId, slots: &SlotSet) -> Decision {
        if id < self.last {
            return Decision::Refused;
        }
        if id == self.last {
            let arriving = matches!(self.moving, Some(Moving::Arriving(_)));
            return if arriving { Decision::Refused } else { Decision::Already };
        }
        match self.moving.is_none() && self.owned().includes(slots) {
            true => self.with(self.owned(), id, Some(Moving::Leaving(slots.clone()))),
            false => Decision::Refused,
        }
    }

    /// The destination takes over a part of the copy: `pieces` of them with a sum of hashes; `cursor`: where the source goes on.
    pub fn import(
        &self,
        id: MoveId,
        slots: &SlotSet,
        sequence: u64,
        (pieces, hash, cursor): (u64, u128, &[u8]),
    ) -> Decision {
        let so_far = match &self.moving {
            None if id > self.last && !self.owned().meets(slots) => {
                Arrived { slots: slots.clone(), ..Arrived::default() }
            }
            Some(Moving::Arriving(arrived)) if id == self.last => arrived.clone(),
            _ if id == self.last => return Decision::Already,
            _ => return Decision::Refused,
        };
        if sequence != so_far.next || so_far.slots != *slots {
            return if sequence < so_far.next { Decision::Already } else { Decision::Refused };
        }
        let arrived = Arrived {
            slots: so_far.slots,
            next: sequence + 1,
            cursor: cursor.to_vec(),
            pieces: so_far.pieces + pieces,
            hash: so_far.hash.wrapping_add(hash),
        };
        self.with(self.owned(), id, Some(Moving::Arriving(arrived)))
    }

    /// The destination takes reads and writes from now on, if it has all that there was.
    pub fn adopt(&self, id: MoveId, slots: &SlotSet, pieces: u64, hash: u128) -> Decision {
        let whole =
            |arrived: &Arrived| (&arrived.slots, arrived.pieces, arrived.hash) == (slots, pieces, hash);
        match &self.moving {
            Some(Moving::Arriving(arrived)) if id == self.last && whole(arrived) => {
                self.with(self.owned().union(slots), id, None)
            }
            None if id == self.last && self.owned().includes(slots) => Decision::Already,
            _ => Decision::Refused,
        }
    }

    /// The source stops reads.
    pub fn release(&self, id: MoveId) -> Decision {
        match &self.moving {
            Some(Moving::Leaving(slots)) if id == self.last => {
                self.with(self.owned().minus(slots), id, Some(Moving::Left(slots.clone())))
            }
            None | Some(Moving::Left(_)) if id == self.last => Decision::Already,
            _ => Decision::Refused,
        }
    }

    /// The source has no rows of it left.
    pub fn dropped(&self, id: MoveId) -> Decision {
        match &self.moving {
            Some(Moving::Left(_)) if id == self.last => self.with(self.owned(), id, None),
            None if id == self.last => Decision::Already,
            _ => Decision::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(text: &str) -> SlotSet {
        text.parse::<Ranges>().map(SlotSet::from).unwrap_or_default()
    }

    fn taken(decision: Decision) -> Result<Slots, Box<Decision>> {
        match decision {
            Decision::Taken(slots) => Ok(slots),
            other => Err(Box::new(other)),
        }
    }

    #[test]
    fn a_move_hands_a_slot_from_one_shard_to_the_other() -> Result<(), Box<Decision>> {
        let (moved, kept) = (set("0-9"), set("10-4095"));
        let (source, new) = (Slots::default(), taken(Slots::default().own(&SlotSet::default()))?);
        assert!(source.takes_all() && !new.shows("t", 3));
        let sealed = taken(source.seal(1, &moved))?;
        assert!(
            sealed.shows("t", 3) && !sealed.takes("t", 3) && sealed.takes("t", 10) && !sealed.takes_all()
        );
        let arriving = taken(new.import(1, &moved, 0, (2, 7, b"x")))?;
        assert_eq!(arriving.import(1, &moved, 0, (2, 7, b"x")), Decision::Already);
        assert_eq!(arriving.import(1, &moved, 2, (2, 7, b"y")), Decision::Refused, "one is missing");
        let arriving = taken(arriving.import(1, &moved, 1, (1, 5, b"")))?;
        assert!(!arriving.shows("t", 3) && arriving.hides());
        assert_eq!(arriving.adopt(1, &moved, 3, 13), Decision::Refused, "not what was sent");
        let adopted = taken(arriving.adopt(1, &moved, 3, 12))?;
        assert!(adopted.takes("t", 3) && !adopted.takes("t", 10));
        let left = taken(sealed.release(1))?;
        assert!(!left.shows("t", 3) && left.owned() == kept && left.hides());
        let gone = taken(left.dropped(1))?;
        // And back again; what is late of the first move is refused.
        let back = taken(adopted.seal(2, &moved))?;
        let home = taken(gone.import(2, &moved, 0, (3, 12, b"")))?;
        let home = taken(home.adopt(2, &moved, 3, 12))?;
        assert_eq!(home.seal(1, &moved), Decision::Refused);
        assert_eq!(home.release(1), Decision::Refused);
        assert_eq!(taken(back.release(2))?.owned(), SlotSet::default());
        assert!(home.takes_all());
        Ok(())
    }

    #[test]
    fn a_pinned_tenants_slots_do_not_move_with_everybodys() -> Result<(), Box<Decision>> {
        let pin = |slots: &str| SlotSet::of_tenant("t", set(slots).everybody().clone());
        let mut source = Slots::default();
        let mut id = 0;
        let mut moves = |source: &Slots, slots: &SlotSet| {
            id += 1;
            taken(taken(taken(source.seal(id, slots))?.release(id))?.dropped(id))
        };
        source = moves(&source, &pin("0-2047"))?;
        assert!(!source.shows("t", 3) && source.shows("u", 3) && source.shows("t", 2048));
        assert_eq!(source.seal(9, &set("0-9")), Decision::Refused, "the tenant's are not here any more");
        let others = set("0-2047").with("t", Ranges::default());
        source = moves(&source, &others)?;
        assert_eq!(source.owned(), set("2048-4095"), "all that is left is everybody's");
        let arrived = taken(source.import(9, &others, 0, (0, 0, b"")))?;
        let arrived = taken(arrived.adopt(9, &others, 0, 0))?;
        assert!(!arrived.shows("t", 3) && arrived.shows("u", 3));
        let arrived = taken(arrived.import(10, &pin("0-2047"), 0, (0, 0, b"")))?;
        assert!(taken(arrived.adopt(10, &pin("0-2047"), 0, 0))?.takes_all());
        Ok(())
    }

    fn sets() -> impl Strategy<Value = SlotSet> {
        let some =
            || proptest::collection::btree_set(0..12u16, 0..8).prop_map(|slots| slots.into_iter().collect());
        (some(), proptest::collection::vec(("[a-c]", some()), 0..4)).prop_map(
            |(everybody, apart): (Ranges, Vec<_>)| {
                apart
                    .into_iter()
                    .fold(SlotSet::from(everybody), |set, (tenant, slots)| set.with(&tenant, slots))
            },
        )
    }

    proptest! {
        #[test]
        fn ranges_are_sets(a in proptest::collection::btree_set(0..SLOTS, 0..60), b in proptest::collection::btree_set(0..SLOTS, 0..60)) {
            let of = |slots: &std::collections::BTreeSet<Slot>| slots.iter().copied().collect::<Ranges>();
            prop_assert_eq!(of(&a).union(&of(&b)), of(&(&a | &b)));
            prop_assert_eq!(of(&a).minus(&of(&b)), of(&(&a - &b)));
            prop_assert_eq!(of(&a).meet(&of(&b)), of(&(&a & &b)));
            prop_assert_eq!(of(&a).len(), a.len());
            prop_assert_eq!(of(&a).meets(&of(&b)), !a.is_disjoint(&b));
            prop_assert_eq!(of(&a).includes(&of(&b)), a.is_superset(&b));
            prop_assert_eq!(of(&a).to_string().parse(), Ok(of(&a)));
            prop_assert!((0..SLOTS).all(|slot| of(&a).contains(slot) == a.contains(&slot)));
        }

        #[test]
        fn sets_of_tenants_slots_are_sets(a in sets(), b in sets()) {
            // Tenant `d` is never apart, so it stands for everybody.
            let of = |set: &SlotSet| -> std::collections::BTreeSet<(&str, Slot)> {
                ["a", "b", "c", "d"].into_iter().flat_map(|t| set.of(t).iter().map(move |slot| (t, slot)).collect::<Vec<_>>()).collect()
            };
            let (union, minus) = (a.union(&b), a.minus(&b));
            prop_assert_eq!(of(&union), &of(&a) | &of(&b));
            prop_assert_eq!(of(&minus), &of(&a) - &of(&b));
            prop_assert_eq!(a.includes(&b), of(&a).is_superset(&of(&b)));
            prop_assert_eq!(a.meets(&b), !of(&a).is_disjoint(&of(&b)));
            prop_assert_eq!(a == b, of(&a) == of(&b), "each set is written in one way");
            prop_assert_eq!(minus.union(&b) == union, true);
            prop_assert_eq!(a.is_empty(), of(&a).is_empty());
            let bytes = crate::codec::encode(&a);
            prop_assert_eq!(crate::codec::decode::<SlotSet>(&bytes).ok(), Some(a.clone()));
            if a.apart().is_empty() {
                prop_assert_eq!(bytes, crate::codec::encode(a.everybody()), "as it was before there were pins");
            }
            let json = serde_json::to_string(&a).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(serde_json::from_str::<SlotSet>(&json).ok(), Some(a));
        }
    }

    #[test]
    fn owners_spread_over_all_slots() {
        let mut counts = vec![0u32; 16];
        for user in 0..16_000 {
            let owner = Owner::User { tenant: "t".into(), user: format!("user {user}") };
            counts[(slot_of(&owner, &[0; 16]) / (SLOTS / 16)) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
