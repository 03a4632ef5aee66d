//! The views against a model that is too simple to be wrong: maps in memory, every question answered by looking at everything. Commands
//! come in random order; in between the power fails, the shard is opened again, its vectors are sealed or merged, or its state is carried over in a snapshot.

use proofs::{MONTHS, command, edge};
use proptest::prelude::*;
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use storage::graph::Walk;
use storage::model::*;
use storage::{ListQuery, SearchQuery, Shard, StorageError, TimeField, TimeRange};

const WORDS: [&str; 6] = ["harbour", "violin", "orchard", "lantern", "glacier", "saffron"];
const USERS: [&str; 2] = ["ana", "ben"];

#[derive(Clone, Debug)]
enum Step {
    Add { id: u8, seed: u64 },
    Update { id: u8, seed: u64 },
    Delete(u8),
    Link { from: u8, to: u8, weight: u8, until: bool },
    Unlink { from: u8, to: u8 },
    DropMonth(usize),
    PowerLoss,
    Reopen,
    Carry,
    Seal,
    Merge,
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 0u8..10;
    prop_oneof![
        8 => (id(), any::<u64>()).prop_map(|(id, seed)| Step::Add { id, seed }),
        4 => (id(), any::<u64>()).prop_map(|(id, seed)| Step::Update { id, seed }),
        2 => id().prop_map(Step::Delete),
        6 => (id(), id(), 0u8..9, any::<bool>()).prop_map(|(from, to, weight, until)| Step::Link { from, to, weight, until }),
        1 => (id(), id()).prop_map(|(from, to)| Step::Unlink { from, to }),
        1 => (0usize..2).prop_map(Step::DropMonth),
        1 => Just(Step::PowerLoss),
        1 => Just(Step::Reopen),
        1 => Just(Step::Carry),
        3 => Just(Step::Seal),
        2 => Just(Step::Merge),
    ]
}

/// Text, metadata and categories drawn from a seed.
fn content(seed: u64) -> (String, String, Vec<String>) {
    let words: Vec<&str> = (0..1 + seed % 5).map(|i| WORDS[(seed >> (8 * i + 3)) as usize % 6]).collect();
    let metadata = match seed % 4 {
        0 => String::new(),
        1 => format!(r#"{{"n": {}, "deep": {{"flag": {}}}}}"#, seed % 7, seed.is_multiple_of(3)),
        2 => {
            format!(r#"{{"tags": ["{}", {}], "n": "{}"}}"#, WORDS[seed as usize / 4 % 6], seed % 3, seed % 7)
        }
        _ => format!(r#"{{"n": {}.5, "tags": []}}"#, seed % 7),
    };
    let categories = (0..seed % 3).map(|i| WORDS[(seed >> i) as usize % 6].to_string()).collect();
    (words.join(" "), metadata, categories)
}

fn added(id: u8, seed: u64) -> Memory {
    let (text, metadata, categories) = content(seed);
    let created = MONTHS[seed as usize / 2 % 2] + (seed % 1000) as i64 * 1_000_000;
    let event_time = seed.is_multiple_of(3).then_some(created - 5_000_000_000);
    let expires = seed.is_multiple_of(11).then_some(MONTHS[1] + 10_000_000_000);
    let user = USERS[id as usize % 2].to_string();
    let scope = if id == 9 { Scope::Shared } else { Scope::Private };
    let angle = seed as f32 % 6.0;
    let vector = vec![angle.cos(), angle.sin()];
    let base = proofs::memory(id, text);
    Memory {
        metadata,
        categories,
        created,
        updated: created,
        event_time,
        expires,
        user,
        scope,
        vector,
        ..base
    }
}

/// The model.
#[derive(Clone, Default)]
struct Model {
    memories: BTreeMap<u8, Memory>,
    versions: BTreeMap<u8, (u64, Month)>,
    edges: BTreeMap<(u8, String, u8), Edge>,
    time: UnixMs,
}

impl Model {
    fn forget_edges(&mut self, id: u8) {
        self.edges.retain(|(from, _, to), _| *from != id && *to != id);
    }

    /// What applying does; the command's time is `now`.
    fn apply(&mut self, operation: &Operation, now: UnixMs) {
        self.time = self.time.max(now);
        let time = self.time;
        let gone = |memory: Option<&Memory>| memory.is_none_or(|m| m.expired(time));
        match operation {
            Operation::Add(memory) => {
                let id = memory.id[0];
                if gone(self.memories.get(&id)) {
                    if self.memories.contains_key(&id) {
                        self.forget_edges(id);
                    }
                    let version = self.versions.get(&id).map_or(0, |(version, _)| *version) + 1;
                    self.versions.insert(id, (version, Month::of(memory.created)));
                    self.memories.insert(id, Memory { version, ..memory.clone() });
                }
            }
            Operation::Update { id, patch, .. } if !gone(self.memories.get(&id[0])) => {
                let Some(memory) = self.memories.get_mut(&id[0]) else { return };
                memory.text = patch.text.clone().unwrap_or_default();
                memory.metadata = patch.metadata.clone().unwrap_or_default();
                memory.status = patch.status.unwrap_or(memory.status);
                memory.version += 1;
                memory.updated = now;
                self.versions.insert(id[0], (memory.version, Month::of(memory.created)));
            }
            Operation::Delete { id, .. } if !gone(self.memories.get(&id[0])) => {
                let Some(memory) = self.memories.remove(&id[0]) else { return };
                self.versions.insert(id[0], (memory.version + 1, Month::of(memory.created)));
                self.forget_edges(id[0]);
            }
            Operation::UpsertEdges(edges) if edges.iter().all(|e| !gone(self.memories.get(&e.source[0]))) => {
                let key = |e: &Edge| (e.source[0], e.relation.clone(), e.target[0]);
                self.edges.extend(edges.iter().map(|e| (key(e), e.clone())));
            }
            Operation::DeleteEdges(edges) => {
                for (source, relation, target) in edges {
                    self.edges.remove(&(source[0], relation.clone(), target[0]));
                }
            }
            Operation::DropMonth(month) => {
                let dropped: Vec<u8> =
                    self.versions.iter().filter(|(_, (_, of))| of == month).map(|(id, _)| *id).collect();
                for id in dropped {
                    self.versions.remove(&id);
                    self.memories.remove(&id);
                    self.forget_edges(id);
                }
            }
            _ => {}
        }
    }

    fn seen(&self, now: UnixMs) -> impl Iterator<Item = &Memory> {
        self.memories.values().filter(move |m| !m.expired(now))
    }
}

fn filters() -> Vec<Filter> {
    let n = || Field::Metadata("n".into());
    let tags = || Field::Metadata("tags".into());
    let number = Value::Number;
    let compare = |field, op, value| Filter::Compare { field, op, value };
    let text = |t: &str| Value::Text(t.into());
    let one = vec![
        compare(n(), CompareOp::Eq, number(3.0)),
        compare(n(), CompareOp::Ge, number(2.5)),
        compare(n(), CompareOp::Lt, text("4")),
        compare(n(), CompareOp::Ne, number(1.0)),
        compare(Field::Metadata("deep.flag".into()), CompareOp::Eq, Value::Bool(true)),
        compare(tags(), CompareOp::Eq, text("violin")),
        Filter::Contains { field: tags(), value: number(1.0) },
        Filter::Contains { field: Field::Categories, value: text("orchard") },
        Filter::Contains { field: Field::Text, value: text("LANT") },
        Filter::In { field: n(), values: vec![number(0.0), text("5"), number(1.5)] },
        Filter::Exists { field: tags() },
        compare(Field::Updated, CompareOp::Gt, number(MONTHS[1] as f64)),
    ];
    let mut all = one.clone();
    all.push(Filter::And(vec![one[1].clone(), one[10].clone()]));
    all.push(Filter::Or(vec![one[0].clone(), one[7].clone()]));
    all.push(Filter::Or(vec![one[0].clone(), one[8].clone()]));
    all.push(Filter::Not(Box::new(one[1].clone())));
    all
}

/// Whether a memory meets a filter, by the plain reading of what filters say.
fn meets(filter: &Filter, memory: &Memory) -> bool {
    use std::cmp::Ordering::*;
    #[derive(Debug)]
    enum Held {
        Nothing,
        One(Value),
        Many(Vec<Value>),
    }
    let json = |text: &str| serde_value(text);
    let held = |field: &Field| match field {
        Field::Metadata(path) => match json(&memory.metadata).get(path) {
            None => Held::Nothing,
            Some(Ok(value)) => Held::One(value.clone()),
            Some(Err(values)) => Held::Many(values.clone()),
        },
        Field::Categories if memory.categories.is_empty() => Held::Nothing,
        Field::Categories => Held::Many(memory.categories.iter().cloned().map(Value::Text).collect()),
        Field::Text => Held::One(Value::Text(memory.text.clone())),
        Field::Updated => Held::One(Value::Number(memory.updated as f64)),
        other => panic!("the model has no {other:?}"),
    };
    let order = |a: &Value, b: &Value| match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.partial_cmp(b),
        (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        _ => None,
    };
    let equals = |held: &Held, value: &Value| match held {
        Held::Nothing => false,
        Held::One(one) => order(one, value) == Some(Equal),
        Held::Many(many) => many.iter().any(|one| order(one, value) == Some(Equal)),
    };
    match filter {
        Filter::And(all) => all.iter().all(|f| meets(f, memory)),
        Filter::Or(any) => any.iter().any(|f| meets(f, memory)),
        Filter::Not(not) => !meets(not, memory),
        Filter::Exists { field } => !matches!(held(field), Held::Nothing),
        Filter::In { field, values } => values.iter().any(|v| equals(&held(field), v)),
        Filter::Contains { field, value } => match (held(field), value) {
            (Held::One(Value::Text(text)), Value::Text(part)) => {
                text.to_lowercase().contains(&part.to_lowercase())
            }
            (many @ Held::Many(_), value) => equals(&many, value),
            _ => false,
        },
        Filter::Compare { field, op: CompareOp::Eq, value } => equals(&held(field), value),
        Filter::Compare { field, op: CompareOp::Ne, value } => !equals(&held(field), value),
        Filter::Compare { field, op, value } => match held(field) {
            Held::One(one) => match order(&one, value) {
                Some(Less) => matches!(op, CompareOp::Lt | CompareOp::Le),
                Some(Equal) => matches!(op, CompareOp::Le | CompareOp::Ge),
                Some(Greater) => matches!(op, CompareOp::Gt | CompareOp::Ge),
                None => false,
            },
            _ => false,
        },
    }
}

/// The few shapes of metadata that [`content`] and updates make, by path.
fn serde_value(text: &str) -> BTreeMap<String, Result<Value, Vec<Value>>> {
    let mut found = BTreeMap::new();
    let number = |t: &str| t.parse::<f64>().ok().map(Value::Number);
    let scalar = |t: &str| match t.trim() {
        "true" => Some(Value::Bool(true)),
        "false" => Some(Value::Bool(false)),
        t if t.starts_with('"') => Some(Value::Text(t.trim_matches('"').into())),
        t => number(t),
    };
    if let Some((_, rest)) = text.split_once(r#""n": "#) {
        let end = rest.find([',', '}']).unwrap_or(rest.len());
        found.extend(scalar(&rest[..end]).map(|v| ("n".to_string(), Ok(v))));
    }
    if let Some((_, rest)) = text.split_once(r#""flag": "#) {
        found.extend(scalar(rest.trim_end_matches('}')).map(|v| ("deep.flag".to_string(), Ok(v))));
    }
    if let Some((_, rest)) = text.split_once(r#""tags": ["#) {
        let list = rest.split_once(']').map_or("", |(list, _)| list);
        found.insert("tags".to_string(), Err(list.split(',').filter_map(scalar).collect()));
    }
    found
}

fn ids(memories: &[Arc<Memory>]) -> Vec<u8> {
    memories.iter().map(|m| m.id[0]).collect()
}

fn owners(user: &str) -> Vec<Owner> {
    vec![Owner::User { tenant: "t".into(), user: user.into() }, Owner::Shared { tenant: "t".into() }]
}

fn list(owners: Vec<Owner>, now: UnixMs) -> ListQuery {
    let (filter, time, after) = (None, None, None);
    let statuses = vec![Status::Active, Status::Archived];
    ListQuery {
        tenant: "t".into(),
        owners,
        filter,
        statuses,
        time,
        after,
        limit: 100,
        now,
        with_vector: true,
    }
}

fn search(user: &str, text: &str, k: usize, now: UnixMs) -> SearchQuery {
    SearchQuery { text: text.into(), k, now, ..proofs::search(owners(user), vec![1.0, 0.0]) }
}

/// Asks the shard everything, and the model.
fn compare(shard: &Shard, model: &Model, now: UnixMs) -> Result<(), StorageError> {
    let all: Vec<&Memory> = model.seen(now).collect();
    let listed = shard.list(&list(vec![], now))?.memories;
    assert_eq!(listed.iter().map(|m| &**m).collect::<Vec<_>>(), all, "the whole tenant");
    for user in USERS {
        let whose = |m: &&&Memory| m.scope == Scope::Shared || m.user == user;
        let own: Vec<&&Memory> = all.iter().filter(whose).collect();
        for filter in filters() {
            let expected: Vec<u8> = own.iter().filter(|m| meets(&filter, m)).map(|m| m.id[0]).collect();
            let query = ListQuery { filter: Some(filter.clone()), ..list(owners(user), now) };
            assert_eq!(ids(&shard.list(&query)?.memories), expected, "{filter:?}");
            let active = own.iter().filter(|m| m.status == Status::Active && meets(&filter, m)).count();
            let query = SearchQuery { filter: Some(filter.clone()), ..search(user, "", 100, now) };
            assert_eq!(shard.search(&query)?.len(), active, "search with {filter:?}");
        }
        for field in [TimeField::Created, TimeField::Updated, TimeField::EventTime] {
            for (from, to) in
                [(None, Some(MONTHS[1])), (Some(MONTHS[1]), None), (Some(MONTHS[0] + 1), Some(MONTHS[1] + 1))]
            {
                let at = |m: &Memory| match field {
                    TimeField::Created => Some(m.created),
                    TimeField::Updated => Some(m.updated),
                    TimeField::EventTime => m.event_time,
                };
                let within = |t: UnixMs| from.is_none_or(|f| f <= t) && to.is_none_or(|u| t < u);
                let expected: Vec<u8> =
                    own.iter().filter(|m| at(m).is_some_and(within)).map(|m| m.id[0]).collect();
                let query =
                    ListQuery { time: Some(TimeRange { field, from, to }), ..list(owners(user), now) };
                assert_eq!(ids(&shard.list(&query)?.memories), expected, "{field:?} {from:?} {to:?}");
            }
        }
        // BM25 over what this user sees and no other has written.
        for word in WORDS {
            let whose = |m: &&Memory| m.scope == Scope::Shared || m.user == user;
            // Statistics count what is stored, also if it has expired.
            let stored: Vec<&Memory> = model.memories.values().filter(whose).collect();
            let length = |m: &Memory| m.text.split(' ').filter(|w| !w.is_empty()).count() as f64;
            let mean = stored.iter().map(|m| length(m)).sum::<f64>() / stored.len().max(1) as f64;
            let times = |m: &Memory| m.text.split(' ').filter(|w| *w == word).count() as f64;
            let holders = stored.iter().filter(|m| times(m) > 0.0).count() as f64;
            let idf = (1.0 + (stored.len() as f64 - holders + 0.5) / (holders + 0.5)).ln();
            let mut expected: Vec<(f32, u8)> = own
                .iter()
                .filter(|m| times(m) > 0.0 && m.status == Status::Active)
                .map(|m| {
                    let norm = 1.2 * (0.25 + 0.75 * length(m) / mean.max(1.0));
                    ((idf * times(m) * 2.2 / (times(m) + norm)) as f32, m.id[0])
                })
                .collect();
            expected.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let mut found: Vec<(f32, u8)> = shard
                .by_words(&search(user, word, 100, now))?
                .iter()
                .map(|hit| (hit.keywords, hit.memory.id[0]))
                .collect();
            assert!(found.windows(2).all(|w| w[0].0 >= w[1].0));
            found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            assert_eq!(found.len(), expected.len(), "{word}");
            for (a, b) in found.iter().zip(&expected) {
                assert!((a.0 - b.0).abs() < 1e-5, "{word}: {found:?} is not {expected:?}");
            }
        }
    }
    for inbound in [false, true] {
        for start in 0..10u8 {
            let walk = Walk {
                tenant: "t".into(),
                start: vec![[start; 16]],
                relations: vec![],
                hops: 3,
                fan_out: 2,
                inbound,
                as_of: MONTHS[1],
                now,
                include_archived: true,
            };
            let walked = shard.walk(&walk)?;
            let (nodes, edges) = walk_model(model, &walk);
            assert_eq!(ids(&walked.memories), nodes, "from {start}, inbound {inbound}");
            assert_eq!(walked.edges, edges, "from {start}, inbound {inbound}");
        }
    }
    let counts = shard.counts()?;
    assert_eq!((counts.memories, counts.edges), (model.memories.len() as u64, model.edges.len() as u64));
    shard.verify()
}

/// The walk, by looking at every edge for every step.
fn walk_model(model: &Model, walk: &Walk) -> (Vec<u8>, Vec<Edge>) {
    let seen: BTreeSet<u8> = model.seen(walk.now).map(|m| m.id[0]).collect();
    let start = walk.start[0][0];
    let (mut nodes, mut found) = (vec![], vec![]);
    if seen.contains(&start) {
        nodes.push(start);
    }
    let mut layer = nodes.clone();
    for _ in 0..walk.hops {
        let mut next = vec![];
        for at in &layer {
            let near = |e: &&Edge| if walk.inbound { e.target[0] == *at } else { e.source[0] == *at };
            let mut edges: Vec<&Edge> = model.edges.values().filter(near).collect();
            edges.retain(|e| e.valid_to.is_none_or(|to| walk.as_of < to));
            edges.sort_by(|a, b| b.weight.total_cmp(&a.weight));
            let other = |e: &Edge| if walk.inbound { e.source[0] } else { e.target[0] };
            for edge in edges.into_iter().filter(|e| seen.contains(&other(e))).take(walk.fan_out as usize) {
                if !nodes.contains(&other(edge)) {
                    nodes.push(other(edge));
                    next.push(other(edge));
                }
                found.push(edge.clone());
            }
        }
        layer = next;
    }
    (nodes, found)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn views_agree_with_a_plain_model(steps in prop::collection::vec(step(), 1..70), seed in any::<u64>()) {
        let run = || -> Result<(), StorageError> {
            let sim = SimDisk::new(seed);
            let mut disk: Arc<dyn Disk> = sim.clone();
            let mut power = sim;
            let mut shard = proofs::open(&disk, "views")?;
            // What was applied, and the model after each.
            let mut history = vec![Model::default()];
            let mut batches: Vec<Batch> = vec![];
            for (at, step) in steps.iter().enumerate() {
                let now = MONTHS[0] + at as i64 * 100_000_000;
                let operation = match step {
                    Step::Add { id, seed } => Operation::Add(added(*id, *seed)),
                    Step::Update { id, seed } => {
                        let (text, metadata, _) = content(*seed);
                        let status = Some(if seed.is_multiple_of(5) { Status::Archived } else { Status::Active });
                        let patch = Patch { text: Some(text), metadata: Some(metadata), status, ..Patch::default() };
                        Operation::Update { id: [*id; 16], expected_version: None, patch }
                    }
                    Step::Delete(id) => Operation::Delete { id: [*id; 16], expected_version: None },
                    Step::Link { from, to, weight, until } => {
                        let valid_to = until.then_some(MONTHS[0]);
                        Operation::UpsertEdges(vec![Edge { valid_to, ..edge(*from, *to, *weight as f32) }])
                    }
                    Step::Unlink { from, to } => {
                        let edge = edge(*from, *to, 0.0);
                        Operation::DeleteEdges(vec![(edge.source, edge.relation, edge.target)])
                    }
                    Step::DropMonth(month) => Operation::DropMonth(Month::of(MONTHS[*month])),
                    Step::PowerLoss => {
                        power.power_off();
                        drop(shard);
                        power.power_on();
                        shard = proofs::open(&disk, "views")?;
                        let position = shard.applied().0.index as usize;
                        compare(&shard, &history[position], now)?;
                        for (index, batch) in batches.iter().enumerate().skip(position) {
                            proofs::apply(&shard, index as u64 + 1, batch)?;
                        }
                        continue;
                    }
                    Step::Seal => {
                        shard.seal()?;
                        continue;
                    }
                    Step::Merge => {
                        while shard.merge()? {}
                        continue;
                    }
                    Step::Reopen => {
                        drop(shard);
                        shard = proofs::open(&disk, "views")?;
                        continue;
                    }
                    Step::Carry => {
                        let mut frames = vec![];
                        shard.export(&mut |frame| {
                            frames.push(frame.to_vec());
                            Ok(())
                        })?;
                        power = SimDisk::new(seed + at as u64);
                        disk = power.clone();
                        let copy = proofs::open(&disk, "views")?;
                        let mut frames = frames.into_iter();
                        copy.import(&mut || Ok(frames.next()))?;
                        assert_eq!(copy.digest(), shard.digest());
                        shard = copy;
                        shard.checkpoint()?;
                        continue;
                    }
                };
                let mut model = history.last().cloned().unwrap_or_default();
                model.apply(&operation, now);
                history.push(model);
                let command = Command { now, ..command(String::new(), operation) };
                batches.push(Batch { commands: vec![command] });
                proofs::apply(&shard, batches.len() as u64, &batches[batches.len() - 1])?;
            }
            let now = MONTHS[0] + steps.len() as i64 * 100_000_000;
            compare(&shard, &history[history.len() - 1], now)
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}
