//! Two shards between which slots move, against a model that is too simple to be wrong: maps in memory, one a shard, between which the contents of
//! slots are handed over. Commands, steps of the move, repeated and late steps, power losses, seals, merges and snapshots come in random order; a second
//! replica of each shard, which nothing ever happens to, must agree about every digest and every part of a copy.

use proofs::{MONTHS, apply, edge};
use proptest::prelude::*;
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use storage::graph::Walk;
use storage::model::*;
use storage::slots::{MoveId, Ranges, Slot, SlotSet, slot_of};
use storage::{Entry, Leaving, ListQuery, SearchQuery, Shard, StorageError};

/// An owner, by its place in this list, and an id.
type Who = (usize, u8);
/// Tenant, key and slot.
type Key = (String, String, Slot);

const OWNERS: usize = 6;
const IDS: u8 = 5;
const HOUR: i64 = 3_600_000;
const KEY_LIFE: i64 = 24 * HOUR;

fn owner(number: usize) -> Owner {
    let user = |tenant: &str, user: &str| Owner::User { tenant: tenant.into(), user: user.into() };
    match number {
        0 => user("t", "ana"),
        1 => user("t", "ben"),
        2 => Owner::Agent { tenant: "t".into(), agent: "cleo".into() },
        3 => Owner::Shared { tenant: "t".into() },
        4 => user("u", "ana"),
        _ => Owner::Global,
    }
}

fn tenant(number: usize) -> &'static str {
    ["t", "t", "t", "t", "u", GLOBAL_TENANT][number]
}

fn slot(who: Who) -> Slot {
    slot_of(&owner(who.0), &[who.1; 16])
}

fn holds(slots: &SlotSet, who: Who) -> bool {
    slots.contains(tenant(who.0), slot(who))
}

fn memory(who: Who, seed: u64) -> Memory {
    let (user, agent, scope) = match owner(who.0) {
        Owner::User { user, .. } => (user, String::new(), Scope::Private),
        Owner::Agent { agent, .. } => (String::new(), agent, Scope::Private),
        Owner::Shared { .. } => (String::new(), String::new(), Scope::Shared),
        Owner::Global => (String::new(), String::new(), Scope::Global),
    };
    let created = MONTHS[seed as usize % 2] + (seed % 100) as i64;
    let angle = seed as f32 % 6.0;
    let vector = if seed.is_multiple_of(7) { vec![] } else { vec![angle.cos(), angle.sin()] };
    let (tenant, created, updated) = (tenant(who.0).to_string(), created, created);
    Memory {
        tenant,
        user,
        agent,
        scope,
        created,
        updated,
        vector,
        ..proofs::memory(who.1, format!("harbour {seed}"))
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Version {
    kind: ChangeKind,
    version: u64,
    text: String,
}

/// One shard.
#[derive(Clone, Default)]
struct Model {
    rows: BTreeMap<Who, Vec<Version>>,
    vectors: BTreeSet<Who>,
    edges: BTreeMap<(usize, u8, String, u8), Edge>,
    /// Hash, outcome and time.
    keys: BTreeMap<Key, ([u8; 16], Outcome, UnixMs)>,
    owned: SlotSet,
    sealed: SlotSet,
    time: UnixMs,
}

/// An outcome without its position.
fn bare(outcome: &Outcome) -> Outcome {
    match outcome {
        Outcome::Done { id, version, .. } => {
            Outcome::Done { id: *id, version: *version, position: Position::default() }
        }
        other => other.clone(),
    }
}

impl Model {
    fn takes(&self, who: Who) -> bool {
        holds(&self.owned, who) && !holds(&self.sealed, who)
    }

    fn alive(&self, who: &Who) -> Option<&Version> {
        self.rows.get(who).and_then(|all| all.last()).filter(|last| last.kind != ChangeKind::Deleted)
    }

    /// Of a tenant's memories with an id the alive one in the smallest slot.
    fn first(&self, tenant_of: &str, id: u8) -> Option<Who> {
        let of = (0..OWNERS).filter(|o| tenant(*o) == tenant_of && *o != OWNERS - 1).map(|o| (o, id));
        let mut alive: Vec<Who> = of.filter(|who| self.alive(who).is_some()).collect();
        alive.sort_by_key(|who| slot(*who));
        alive.first().copied().or(Some((OWNERS - 1, id)).filter(|who| self.alive(who).is_some()))
    }

    fn forget_edges(&mut self, who: Who) {
        self.edges.retain(|(o, source, ..), _| (*o, *source) != who);
        let others = (0..OWNERS).filter(|o| tenant(*o) == tenant(who.0) && *o != who.0);
        if others.into_iter().any(|o| self.alive(&(o, who.1)).is_some()) {
            return;
        }
        let (owned, sealed) = (self.owned.clone(), self.sealed.clone());
        self.edges.retain(|(o, source, _, target), _| {
            let of = (*o, *source);
            tenant(*o) != tenant(who.0) || *target != who.1 || !holds(&owned, of) || holds(&sealed, of)
        });
    }

    fn command(&mut self, who: Who, command: &Command) -> Outcome {
        self.time = self.time.max(command.now);
        let of = slot(who);
        if !self.takes(who) {
            return Outcome::NotHere;
        }
        let (tenant, key) = (command.tenant.clone(), command.idempotency_key.clone());
        if !key.is_empty() {
            let held = self.keys.iter().filter(|((t, k, _), _)| (t, k) == (&tenant, &key));
            let held =
                held.min_by_key(|((_, _, slot), _)| (*slot != of, *slot)).map(|(_, held)| held.clone());
            if let Some((hash, outcome, _)) = held {
                return if hash == command.request_hash { outcome } else { Outcome::KeyReused };
            }
        }
        let outcome = self.operation(who, &command.operation);
        if !key.is_empty() {
            self.keys.insert((tenant, key, of), (command.request_hash, outcome.clone(), self.time));
        }
        outcome
    }

    /// After an entry, keys that are old are forgotten.
    fn forget_keys(&mut self) {
        let before = self.time - KEY_LIFE;
        let (owned, sealed) = (self.owned.clone(), self.sealed.clone());
        self.keys.retain(|(tenant, _, slot), (_, _, time)| {
            *time >= before || !owned.contains(tenant, *slot) || sealed.contains(tenant, *slot)
        });
    }

    fn operation(&mut self, who: Who, operation: &Operation) -> Outcome {
        let id = [who.1; 16];
        let done = |version| Outcome::Done { id, version, position: Position::default() };
        let alive = self.alive(&who).map(|last| (last.version, last.text.clone()));
        let rows = self.rows.entry(who).or_default();
        match (operation, alive) {
            (Operation::Add(_), Some((version, _))) => Outcome::AlreadyExists { id, version },
            (Operation::Add(memory), None) => {
                let version = rows.last().map_or(0, |last| last.version) + 1;
                rows.push(Version { kind: ChangeKind::Added, version, text: memory.text.clone() });
                if !memory.vector.is_empty() {
                    self.vectors.insert(who);
                }
                done(version)
            }
            (Operation::Update { patch, .. }, Some((version, _))) => {
                let (kind, text) = (ChangeKind::Updated, patch.text.clone().unwrap_or_default());
                rows.push(Version { kind, version: version + 1, text });
                done(version + 1)
            }
            (Operation::Delete { .. }, Some((version, text))) => {
                rows.push(Version { kind: ChangeKind::Deleted, version: version + 1, text });
                self.vectors.remove(&who);
                self.forget_edges(who);
                done(version + 1)
            }
            (Operation::UpsertEdges(edges), Some(_)) => {
                for e in edges {
                    self.edges.insert((who.0, who.1, e.relation.clone(), e.target[0]), e.clone());
                }
                Outcome::Done { id: [0; 16], version: 0, position: Position::default() }
            }
            (Operation::DeleteEdges(edges), _) => {
                for (_, relation, target) in edges {
                    self.edges.remove(&(who.0, who.1, relation.clone(), target[0]));
                }
                Outcome::Done { id: [0; 16], version: 0, position: Position::default() }
            }
            _ => Outcome::NotFound { id },
        }
    }

    /// What some slots hold.
    fn part(&self, slots: &SlotSet) -> Model {
        let mut part = self.clone();
        part.rows.retain(|who, _| holds(slots, *who));
        part.vectors.retain(|who| holds(slots, *who));
        part.edges.retain(|(o, id, ..), _| holds(slots, (*o, *id)));
        part.keys.retain(|(tenant, _, slot), _| slots.contains(tenant, *slot));
        part
    }
}

/// A shard, the same again, its ledger and its model.
struct World {
    power: Arc<SimDisk>,
    shard: Shard,
    other: Shard,
    ledger: Vec<Batch>,
    model: Model,
    seed: u64,
}

fn disk(power: &Arc<SimDisk>) -> Arc<dyn Disk> {
    power.clone()
}

impl World {
    fn new(seed: u64) -> Result<World, StorageError> {
        let power = SimDisk::new(seed);
        let shard = proofs::open(&disk(&power), "views")?;
        let other = proofs::open(&disk(&SimDisk::new(seed + 1)), "views")?;
        let model = Model { owned: SlotSet::all(), ..Model::default() };
        Ok(World { power, shard, other, ledger: vec![], model, seed })
    }

    fn apply(&mut self, commands: Vec<Command>) -> Result<Vec<Outcome>, StorageError> {
        self.ledger.push(Batch { commands });
        let index = self.ledger.len() as u64;
        let batch = &self.ledger[self.ledger.len() - 1];
        let entry = [Entry { epoch: 1, index, batch: Some(batch) }];
        let outcomes = self.shard.apply(&entry, &proofs::meta(index))?.pop().unwrap_or_default();
        apply(&self.other, index, batch)?;
        assert_eq!(self.shard.digest(), self.other.digest(), "replicas differ");
        Ok(outcomes)
    }

    fn step(&mut self, step: MoveStep, now: UnixMs) -> Result<Outcome, StorageError> {
        let command = Command {
            tenant: String::new(),
            slot: None,
            idempotency_key: String::new(),
            request_hash: [0; 16],
            now,
            operation: Operation::Move(step),
        };
        let outcome = self.apply(vec![command])?.pop();
        self.model.time = self.model.time.max(now);
        Ok(outcome.unwrap_or(Outcome::KeyReused))
    }

    /// Closes it, perhaps without power, and opens it again; then the ledger gives back what it does not have.
    fn reopen(&mut self, power_is_lost: bool) -> Result<(), StorageError> {
        if power_is_lost {
            self.power.power_off();
        }
        // Closed before it is opened again.
        self.shard = proofs::open(&disk(&SimDisk::new(0)), "none")?;
        if power_is_lost {
            self.power.power_on();
        }
        self.shard = proofs::open(&disk(&self.power), "views")?;
        let from = self.shard.applied().0.index;
        for (batch, index) in self.ledger.iter().zip(1..).skip(from as usize) {
            apply(&self.shard, index, batch)?;
        }
        assert_eq!(self.shard.digest(), self.other.digest(), "replicas differ after a start");
        Ok(())
    }

    /// Goes on with a copy that came as a snapshot.
    fn carried(&mut self, seed: u64) -> Result<(), StorageError> {
        let mut frames = vec![];
        self.shard.export(&mut |frame| {
            frames.push(frame.to_vec());
            Ok(())
        })?;
        self.power = SimDisk::new(self.seed + seed);
        let copy = proofs::open(&disk(&self.power), "views")?;
        let mut frames = frames.into_iter();
        copy.import(&mut || Ok(frames.next()))?;
        assert_eq!((copy.digest(), copy.slots()), (self.shard.digest(), self.shard.slots()));
        self.shard = copy;
        self.shard.checkpoint()?;
        Ok(())
    }
}

fn text(memory: &Memory) -> (String, u8, u64) {
    (memory.text.clone(), memory.id[0], memory.version)
}

/// Asks a shard everything, and its model.
fn compare(world: &World) -> Result<(), StorageError> {
    let (shard, model) = (&world.shard, &world.model);
    let all = || (0..OWNERS).flat_map(|o| (0..IDS).map(move |id| (o, id)));
    let told = |who: Who| model.alive(&who).map(|v| (v.text.clone(), who.1, v.version));
    for of in ["t", "u"] {
        let mut own: Vec<Who> = all().filter(|w| tenant(w.0) == of && model.alive(w).is_some()).collect();
        own.sort_by_key(|who| (who.1, slot(*who)));
        let expected: Vec<_> = own.iter().filter_map(|who| told(*who)).collect();
        for limit in [1, 2, 100] {
            let (mut listed, mut after) = (vec![], None);
            loop {
                let page = shard.list(&ListQuery { after, limit, ..list(of, vec![]) })?;
                listed.extend(page.memories.iter().map(|m| text(m)));
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            assert_eq!(listed, expected, "the whole tenant {of}, {limit} at a time");
        }
        let owners: Vec<Owner> = (0..OWNERS).map(owner).collect();
        let mut seen: Vec<Who> = own.clone();
        seen.extend(all().filter(|w| w.0 == OWNERS - 1 && model.alive(w).is_some()));
        let sorted = |mut found: Vec<(String, u8, u64)>| {
            found.sort();
            found
        };
        let expected = sorted(seen.iter().filter_map(|who| told(*who)).collect());
        let listed = shard.list(&list(of, owners.clone()))?.memories;
        assert_eq!(sorted(listed.iter().map(|m| text(m)).collect()), expected, "by owners");
        let query = search(of, owners.clone());
        let found = shard.by_words(&SearchQuery { text: "harbour".into(), ..query.clone() })?;
        assert_eq!(sorted(found.iter().map(|h| text(&h.memory)).collect()), expected, "by words");
        let with_vector = |who: &&Who| model.vectors.contains(who);
        let expected = sorted(seen.iter().filter(with_vector).filter_map(|who| told(*who)).collect());
        let found = shard.search(&query)?;
        assert_eq!(sorted(found.iter().map(|h| text(&h.memory)).collect()), expected, "by vectors");
        let filter = Some(Filter::Exists { field: Field::Metadata("parity".into()) });
        let found = shard.search(&SearchQuery { filter, text: "harbour".into(), ..query })?;
        assert_eq!(found.len(), seen.len(), "by a filter and words");
        for id in 0..IDS {
            let got = shard.get(of, None, &[id; 16], 0)?.map(|m| text(&m));
            assert_eq!(got, model.first(of, id).and_then(told), "{of} {id}");
            let known = |o: &usize| {
                (tenant(*o) == of || *o == OWNERS - 1)
                    && model.rows.get(&(*o, id)).is_some_and(|v| !v.is_empty())
            };
            let slots: BTreeSet<(Slot, String)> =
                (0..OWNERS).filter(known).map(|o| (slot((o, id)), tenant(o).into())).collect();
            assert_eq!(shard.locate(of, &[id; 16])?, slots.into_iter().collect::<Vec<_>>(), "{of} {id}");
            for inbound in [false, true] {
                walk(world, of, id, inbound)?;
            }
        }
    }
    for who in all() {
        let got = shard.get(tenant(who.0), Some(slot(who)), &[who.1; 16], 0)?.map(|m| text(&m));
        assert_eq!(got, told(who), "{who:?} in its slot");
        let history = shard.history(tenant(who.0), Some(slot(who)), &[who.1; 16])?;
        assert!(history.is_sorted_by_key(|change| change.position));
        let expected = model.rows.get(&who).cloned().unwrap_or_default();
        assert_eq!(versions(&history), expected, "history of {who:?}");
    }
    for of in ["t", "u", GLOBAL_TENANT] {
        let changes = shard.changes_after(of, Position::default(), 10_000)?;
        assert!(changes.is_sorted_by(|a, b| a.position < b.position), "two changes at one position");
        let mut by: BTreeMap<(Owner, u8), Vec<Change>> = BTreeMap::new();
        for change in changes {
            by.entry((change.memory.owner(), change.memory.id[0])).or_default().push(change);
        }
        for who in all().filter(|who| tenant(who.0) == of) {
            let told = by.remove(&(owner(who.0), who.1)).unwrap_or_default();
            assert_eq!(versions(&told), model.rows.get(&who).cloned().unwrap_or_default(), "{who:?} watched");
        }
        assert!(by.is_empty(), "{by:?}");
    }
    let counts = shard.counts()?;
    let alive = all().filter(|who| model.alive(who).is_some()).count() as u64;
    let counted = (counts.memories, counts.vectors, counts.edges, counts.idempotency_keys);
    let expected = (model.vectors.len() as u64, model.edges.len() as u64, model.keys.len() as u64);
    assert_eq!(counted, (alive, expected.0, expected.1, expected.2), "counts");
    shard.verify()
}

fn versions(changes: &[Change]) -> Vec<Version> {
    let version = |change: &Change| {
        let deleted = (change.kind == ChangeKind::Deleted) as u64;
        let (kind, version, text) =
            (change.kind, change.memory.version + deleted, change.memory.text.clone());
        Version { kind, version, text }
    };
    changes.iter().map(version).collect()
}

/// One hop, by looking at every edge.
fn walk(world: &World, of: &str, id: u8, inbound: bool) -> Result<(), StorageError> {
    let (shard, model) = (&world.shard, &world.model);
    let asked = Walk {
        tenant: of.into(),
        start: vec![[id; 16]],
        relations: vec![],
        hops: 1,
        fan_out: 100,
        inbound,
        as_of: MONTHS[1],
        now: 0,
        include_archived: true,
    };
    let walked = shard.walk(&asked)?;
    let mut found: Vec<(Slot, Edge)> = vec![];
    let mut nodes: Vec<u8> = vec![];
    if let Some(start) = model.first(of, id) {
        nodes.push(id);
        let edges = model.edges.iter().map(|((o, source, ..), edge)| ((*o, *source), edge));
        found = edges
            .filter(|(who, edge)| match inbound {
                _ if tenant(who.0) != of => false,
                true => edge.target[0] == id && model.alive(who).is_some(),
                false => *who == start && model.first(of, edge.target[0]).is_some(),
            })
            .map(|(who, edge)| (slot(who), edge.clone()))
            .collect();
    }
    found.sort_by(|(s, a), (t, b)| {
        let key = |e: &Edge| (e.source, e.relation.clone(), e.target);
        b.weight.total_cmp(&a.weight).then_with(|| (key(a), s).cmp(&(key(b), t)))
    });
    for (_, edge) in &found {
        let other = if inbound { edge.source[0] } else { edge.target[0] };
        if !nodes.contains(&other) {
            nodes.push(other);
        }
    }
    let reached: Vec<u8> = walked.memories.iter().map(|m| m.id[0]).collect();
    assert_eq!(reached, nodes, "{of} from {id}, inbound {inbound}");
    let edges: Vec<Edge> = found.into_iter().map(|(_, edge)| edge).collect();
    assert_eq!(walked.edges, edges, "{of} from {id}, inbound {inbound}");
    Ok(())
}

fn list(tenant: &str, owners: Vec<Owner>) -> ListQuery {
    let (filter, time, after) = (None, None, None);
    let statuses = vec![Status::Active];
    ListQuery {
        tenant: tenant.into(),
        owners,
        filter,
        statuses,
        time,
        after,
        limit: 100,
        now: 0,
        with_vector: false,
    }
}

fn search(tenant: &str, owners: Vec<Owner>) -> SearchQuery {
    SearchQuery { tenant: tenant.into(), k: 100, ..proofs::search(owners, vec![1.0, 0.0]) }
}

/// A move under way.
struct Under {
    id: MoveId,
    from: usize,
    slots: SlotSet,
    /// Sealed; copied whole; released; adopted.
    phase: u8,
    /// What the source's model had of it.
    copied: Model,
    sequence: u64,
    cursor: Vec<u8>,
    pieces: u64,
    hash: u128,
}

#[derive(Clone, Debug)]
enum Step {
    Command {
        who: Who,
        kind: u8,
        seed: u64,
        key: u8,
        to: usize,
    },
    /// The next step of the move, or a new one.
    Drive {
        seed: u64,
    },
    /// The last step once more, to whom it was for; then all steps of a move that is over.
    Again,
    Late,
    PowerLoss(usize),
    Reopen(usize),
    Carry(usize, u64),
    Seal(usize),
    Merge(usize),
    Look,
}

fn step() -> impl Strategy<Value = Step> {
    let which = || 0usize..2;
    prop_oneof![
        20 => ((0..OWNERS, 0..IDS), 0u8..6, any::<u64>(), 0u8..8, 0usize..8)
            .prop_map(|(who, kind, seed, key, to)| Step::Command { who, kind, seed, key, to }),
        16 => any::<u64>().prop_map(|seed| Step::Drive { seed }),
        2 => Just(Step::Again),
        1 => Just(Step::Late),
        2 => which().prop_map(Step::PowerLoss),
        1 => which().prop_map(Step::Reopen),
        1 => (which(), 1000u64..2000).prop_map(|(which, seed)| Step::Carry(which, seed)),
        2 => which().prop_map(Step::Seal),
        1 => which().prop_map(Step::Merge),
        3 => Just(Step::Look),
    ]
}

fn client_command(who: Who, kind: u8, seed: u64, key: u8, now: UnixMs) -> Command {
    let id = [who.1; 16];
    // Few contents, so that a key is seen again with the same one.
    let few = seed % 3;
    let other = (seed / 7) as u8 % IDS;
    let operation = match kind {
        0 | 1 => Operation::Add(memory(who, few + seed % 2 * 7)),
        2 => {
            let patch = Patch { text: Some(format!("harbour again {few}")), ..Patch::default() };
            Operation::Update { id, expected_version: None, patch }
        }
        3 => Operation::Delete { id, expected_version: None },
        4 if who.0 < 5 => Operation::UpsertEdges(vec![edge(who.1, other, few as f32)]),
        _ => {
            let edge = edge(who.1, other, 0.0);
            Operation::DeleteEdges(vec![(edge.source, edge.relation, edge.target)])
        }
    };
    let hash = blake3_of(&format!("{who:?} {operation:?}"));
    let idempotency_key = if key < 4 { format!("key {key}") } else { String::new() };
    let tenant = tenant(who.0).to_string();
    Command { tenant, slot: Some(slot(who)), idempotency_key, request_hash: hash, now, operation }
}

fn blake3_of(text: &str) -> [u8; 16] {
    storage::piece_hash(text.as_bytes()).to_le_bytes()
}

/// Reads a part of the copy from both replicas of the source.
fn part(source: &World, id: MoveId, cursor: &[u8], bytes: usize) -> Result<Leaving, StorageError> {
    let part = source.shard.leaving(id, cursor, bytes)?;
    assert_eq!(part, source.other.leaving(id, cursor, bytes)?, "replicas give other parts");
    Ok(part)
}

fn is_done(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Done { .. })
}

/// All that goes on.
struct Play {
    worlds: [World; 2],
    under: Option<Under>,
    moves: MoveId,
    last: Option<(usize, MoveStep)>,
    over: Vec<(usize, MoveStep)>,
}

impl Play {
    fn new(seed: u64) -> Result<Play, StorageError> {
        let mut worlds = [World::new(seed)?, World::new(seed ^ 0xffff)?];
        let own = MoveStep::Own { slots: SlotSet::default() };
        assert!(is_done(&worlds[1].step(own, 0)?));
        worlds[1].model.owned = SlotSet::default();
        Ok(Play { worlds, under: None, moves: 0, last: None, over: vec![] })
    }

    fn send(&mut self, to: usize, step: MoveStep, now: UnixMs) -> Result<Outcome, StorageError> {
        self.last = Some((to, step.clone()));
        self.over.push((to, step.clone()));
        self.worlds[to].step(step, now)
    }

    /// Does the next step of the move.
    fn drive(&mut self, seed: u64, now: UnixMs) -> Result<(), StorageError> {
        let Some(mut under) = self.under.take() else { return self.begin(seed, now) };
        let (id, from, to) = (under.id, under.from, 1 - under.from);
        match under.phase {
            0 => {
                let part = part(&self.worlds[from], id, &under.cursor, seed as usize % 600)?;
                let (slots, sequence) = (under.slots.clone(), under.sequence);
                let (pieces, cursor) = (part.pieces.clone(), part.cursor.clone());
                let step = MoveStep::Import { id, slots, sequence, pieces, cursor };
                assert!(is_done(&self.send(to, step, now)?));
                self.worlds[to].model.forget_keys();
                under.sequence += 1;
                under.pieces += part.pieces.len() as u64;
                under.hash = under.hash.wrapping_add(part.hash);
                under.cursor = part.cursor;
                under.phase = part.end as u8;
            }
            1 => {
                let (pieces, hash) = (under.pieces, under.hash);
                for (pieces, hash) in [(pieces + 1, hash), (pieces, hash ^ 1)] {
                    let step = MoveStep::Adopt { id, slots: under.slots.clone(), pieces, hash };
                    assert_eq!(self.send(to, step, now)?, Outcome::MoveRefused);
                    self.worlds[to].model.forget_keys();
                }
                // Released before anyone else shows it.
                under.copied = self.worlds[from].model.part(&under.slots);
                assert!(is_done(&self.send(from, MoveStep::Release { id }, now)?));
                let model = &mut self.worlds[from].model;
                let kept = model.owned.minus(&under.slots);
                *model = Model { owned: kept.clone(), sealed: SlotSet::default(), ..model.part(&kept) };
                model.forget_keys();
                under.phase = 2;
            }
            2 => {
                let (pieces, hash, slots) = (under.pieces, under.hash, under.slots.clone());
                assert!(is_done(&self.send(to, MoveStep::Adopt { id, slots, pieces, hash }, now)?));
                let (model, copied) = (&mut self.worlds[to].model, std::mem::take(&mut under.copied));
                model.owned = model.owned.union(&under.slots);
                model.rows.extend(copied.rows);
                model.vectors.extend(copied.vectors);
                model.edges.extend(copied.edges);
                model.keys.extend(copied.keys);
                // The entry itself forgets what is old of it.
                model.forget_keys();
                under.phase = 3;
            }
            _ => {
                let step = MoveStep::Drop { id, rows_max: seed as u32 % 9 };
                let Outcome::Done { version, .. } = self.send(from, step, now)? else {
                    panic!("a drop was refused")
                };
                self.worlds[from].model.forget_keys();
                if version == 0 {
                    assert_eq!(self.worlds[from].shard.slots().moving(), None);
                    return Ok(());
                }
            }
        }
        self.under = Some(under);
        Ok(())
    }

    fn begin(&mut self, seed: u64, now: UnixMs) -> Result<(), StorageError> {
        let from = seed as usize % 2;
        let owned = self.worlds[from].model.owned.clone();
        let wanted = |who: &Who| seed >> (4 + who.0) & 1 == 1;
        let mut slots: BTreeSet<Slot> =
            (0..OWNERS).flat_map(|o| (0..IDS).map(move |id| (o, id))).filter(wanted).map(slot).collect();
        let some = (seed >> 20) as Slot % 4000;
        slots.extend(some..some + 90);
        let slots: Ranges = slots.into_iter().collect();
        let slots = match ["", "t", "u"][(seed >> 12) as usize % 3] {
            // Everybody's, but for those who have slots of their own.
            "" => {
                let apart = self.worlds.iter().flat_map(|world| world.model.owned.apart().keys());
                let everybody = SlotSet::from(owned.everybody().meet(&slots));
                apart.fold(everybody, |set, tenant| set.with(tenant, Ranges::default()))
            }
            tenant => SlotSet::of_tenant(tenant, owned.of(tenant).meet(&slots)),
        };
        self.moves += 1;
        self.over.clear();
        let id = self.moves;
        assert!(is_done(&self.send(from, MoveStep::Seal { id, slots: slots.clone() }, now)?));
        self.worlds[from].model.sealed = slots.clone();
        self.worlds[from].model.forget_keys();
        let (phase, copied, sequence, cursor, pieces, hash) = (0, Model::default(), 0, vec![], 0, 0);
        self.under = Some(Under { id, from, slots, phase, copied, sequence, cursor, pieces, hash });
        Ok(())
    }

    fn play(&mut self, at: usize, step: &Step) -> Result<(), StorageError> {
        let now = MONTHS[1] + at as i64 * HOUR;
        match step {
            Step::Command { who, kind, seed, key, to } => {
                // Mostly to whom it belongs; now and then to one who must not decide it.
                let here = holds(&self.worlds[1].model.owned, *who) as usize;
                let world = &mut self.worlds[if *to == 0 { 1 - here } else { here }];
                let command = client_command(*who, *kind, *seed, *key, now);
                let expected = world.model.command(*who, &command);
                world.model.forget_keys();
                let outcomes = world.apply(vec![command])?;
                let told: Vec<Outcome> = outcomes.iter().map(bare).collect();
                assert_eq!(told, [expected], "{step:?}");
                if let Some(Outcome::Done { position, .. }) = outcomes.first() {
                    assert!(*position <= world.shard.applied().0, "a token of another ledger: {position:?}");
                }
            }
            Step::Drive { seed } => self.drive(*seed, now)?,
            Step::Again => {
                if let Some((to, step)) = self.last.clone() {
                    let removes = matches!(step, MoveStep::Drop { .. });
                    let world = &mut self.worlds[to];
                    let before = world.shard.slots();
                    world.step(step, now)?;
                    world.model.forget_keys();
                    // Removing goes on; all else changes nothing.
                    assert!(removes || world.shard.slots() == before, "a repeated step did something");
                    compare(world)?;
                    if removes && world.shard.slots().moving().is_none() {
                        self.under = None;
                    }
                }
            }
            Step::Late => {
                for (to, step) in self.over.clone() {
                    let slots = self.worlds[to].shard.slots();
                    let removes = matches!(step, MoveStep::Drop { .. });
                    if !removes {
                        self.worlds[to].step(step, now)?;
                        self.worlds[to].model.forget_keys();
                        assert_eq!(self.worlds[to].shard.slots(), slots, "a late step did something");
                    }
                }
            }
            Step::PowerLoss(which) => self.worlds[*which].reopen(true)?,
            Step::Reopen(which) => self.worlds[*which].reopen(false)?,
            Step::Carry(which, seed) => self.worlds[*which].carried(*seed)?,
            Step::Seal(which) => self.worlds[*which].shard.seal()?,
            Step::Merge(which) => while self.worlds[*which].shard.merge()? {},
            Step::Look => self.worlds.iter().try_for_each(compare)?,
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn what_moves_between_shards_agrees_with_a_plain_model(
        steps in prop::collection::vec(step(), 1..120),
        seed in any::<u32>(),
    ) {
        let run = || -> Result<(), StorageError> {
            let mut play = Play::new(seed as u64)?;
            for (at, step) in steps.iter().enumerate() {
                play.play(at, step)?;
            }
            // What an honest disk never makes necessary.
            let mended = sim::trace::probes().get("vectors: a month was counted wrongly").copied();
            assert_eq!(mended.unwrap_or(0), 0, "the vector view was not told of something");
            play.worlds.iter().try_for_each(compare)
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

/// A shard in which every kind of row lies in the slot of one user, sealed; its parts.
fn sealed_source() -> Result<(Shard, SlotSet, Vec<Leaving>), StorageError> {
    let source = proofs::open(&disk(&SimDisk::new(1)), "views")?;
    let mut index = 0;
    let mut send = |command: Command| -> Result<(), StorageError> {
        index += 1;
        apply(&source, index, &Batch { commands: vec![command] })
    };
    for (id, seed) in [(0u8, 1u64), (1, 2), (2, 3), (3, 4)] {
        send(client_command((0, id), 0, seed, 9, MONTHS[1]))?;
    }
    send(client_command((0, 1), 2, 1, 0, MONTHS[1]))?;
    send(client_command((0, 2), 3, 1, 1, MONTHS[1]))?;
    send(client_command((0, 0), 4, 8, 2, MONTHS[1]))?;
    let slots: SlotSet = [slot((0, 0))].into_iter().collect();
    let operation = Operation::Move(MoveStep::Seal { id: 1, slots: slots.clone() });
    send(proofs::command(String::new(), operation))?;
    let (mut parts, mut cursor) = (vec![], vec![]);
    loop {
        let part = source.leaving(1, &cursor, 300)?;
        cursor.clone_from(&part.cursor);
        parts.push(part);
        if parts.last().is_some_and(|part| part.end) {
            return Ok((source, slots, parts));
        }
    }
}

fn import(
    shard: &Shard,
    index: u64,
    slots: &SlotSet,
    pieces: Vec<Vec<u8>>,
) -> Result<Option<Outcome>, StorageError> {
    let step = MoveStep::Import { id: 1, slots: slots.clone(), sequence: 0, pieces, cursor: vec![] };
    let batch = Batch { commands: vec![proofs::command(String::new(), Operation::Move(step))] };
    let entry = [Entry { epoch: 1, index, batch: Some(&batch) }];
    Ok(shard.apply(&entry, &proofs::meta(index))?.pop().unwrap_or_default().pop())
}

fn new_destination() -> Result<Shard, StorageError> {
    let shard = proofs::open(&disk(&SimDisk::new(2)), "views")?;
    let own = Operation::Move(MoveStep::Own { slots: SlotSet::default() });
    apply(&shard, 1, &Batch { commands: vec![proofs::command(String::new(), own)] })?;
    Ok(shard)
}

#[test]
fn a_piece_that_cannot_belong_there_refuses_the_whole_import() -> Result<(), StorageError> {
    let (_source, slots, parts) = sealed_source()?;
    let all: Vec<Vec<u8>> = parts.iter().flat_map(|part| part.pieces.clone()).collect();
    assert!(parts.len() > 2 && all.len() >= 11, "{} pieces in {} parts", all.len(), parts.len());
    let destination = new_destination()?;
    let before = destination.digest().1;
    let elsewhere: SlotSet = [slot((0, 0)) ^ 1].into_iter().collect();
    let mut bad: Vec<(SlotSet, Vec<Vec<u8>>)> = vec![(elsewhere, all.clone())];
    for at in 0..all.len() {
        let with = |piece: Vec<u8>| {
            let mut pieces = all.clone();
            pieces[at] = piece;
            (slots.clone(), pieces)
        };
        let piece = &all[at];
        bad.extend((0..piece.len()).map(|len| with(piece[..len].to_vec())));
        bad.push(with([&piece[..], b"x"].concat()));
        bad.push(with(vec![0xff; 40]));
    }
    // Each but a row of the history may be there once; a memory's history must not come behind it.
    for piece in all.iter().filter(|piece| piece[0] != 1) {
        bad.push((slots.clone(), [&all[..], std::slice::from_ref(piece)].concat()));
    }
    bad.push((slots.clone(), all.iter().rev().cloned().collect()));
    let mut index = 1;
    for (slots, pieces) in bad {
        index += 1;
        assert_eq!(import(&destination, index, &slots, pieces)?, Some(Outcome::MoveRefused));
        assert_eq!(destination.digest().1, before, "something of a refused import stays");
    }
    destination.verify()?;
    let whole = import(&destination, index + 1, &slots, all)?;
    assert!(whole.is_some_and(|outcome| is_done(&outcome)));
    destination.verify()
}

#[test]
fn a_piece_with_a_flipped_bit_is_refused_or_keeps_the_move_from_being_adopted() -> Result<(), StorageError> {
    let (_source, slots, parts) = sealed_source()?;
    let all: Vec<Vec<u8>> = parts.iter().flat_map(|part| part.pieces.clone()).collect();
    let hash = parts.iter().fold(0u128, |sum, part| sum.wrapping_add(part.hash));
    let (mut refused, mut kept) = (0, 0);
    let destination = new_destination()?;
    let mut index = 1;
    for at in 0..all.len() {
        for bit in (0..all[at].len() * 8).step_by(13) {
            let mut pieces = all.clone();
            pieces[at][bit / 8] ^= 1 << (bit % 8);
            let before = destination.digest().1;
            index += 1;
            if import(&destination, index, &slots, pieces.clone())? == Some(Outcome::MoveRefused) {
                refused += 1;
                assert_eq!(destination.digest().1, before);
                continue;
            }
            // It says something else, and is found out by the sum.
            let fresh = new_destination()?;
            import(&fresh, 2, &slots, pieces)?;
            let step = MoveStep::Adopt { id: 1, slots: slots.clone(), pieces: all.len() as u64, hash };
            let batch = Batch { commands: vec![proofs::command(String::new(), Operation::Move(step))] };
            let entry = [Entry { epoch: 1, index: 3, batch: Some(&batch) }];
            assert_eq!(fresh.apply(&entry, b"")?[0], [Outcome::MoveRefused]);
            fresh.verify()?;
            kept += 1;
            return_to_empty(&destination)?;
        }
    }
    println!("{refused} flipped bits refused at once, {kept} kept the move from being adopted");
    assert!(refused > 40 && kept > 40);
    Ok(())
}

/// Takes back what an import brought, by the state of a shard that never had it.
fn return_to_empty(destination: &Shard) -> Result<(), StorageError> {
    let index = destination.applied().0.index;
    let fresh = new_destination()?;
    fresh.apply(&[Entry { epoch: 1, index, batch: None }], b"")?;
    let mut frames = vec![];
    fresh.export(&mut |frame| {
        frames.push(frame.to_vec());
        Ok(())
    })?;
    let mut frames = frames.into_iter();
    destination.import(&mut || Ok(frames.next()))
}
