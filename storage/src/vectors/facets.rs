//! What filters ask of memories, kept beside their vectors: of each block an inverted index of metadata, categories and sessions.
//!
//! Every scalar of a memory is a *term*: which field, which path, of what kind, and the value, as bytes that are ordered as values are. A
//! block lists its terms in order, and of each the rows that have it. So a filter is a few binary searches, and lists that are
//! joined; no record is read.
//!
//! **Why it is never stale.** A row is one version of a memory, which never changes: a new version is a new row, and the old one is dead.
//!
//! **What it cannot tell, it leaves open.** Long texts are cut, a memory with very many scalars has a term that says just that, and
//! other fields are in the records alone. So the answer is two lists: the rows that meet a filter for certain, and those that may. What is
//! between them [`crate::filter`] decides.

use super::rows::Rows;
use crate::filter::scalar;
use crate::model::{CompareOp, Field, Filter, Memory, Value};
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{self, Excluded, Included, Unbounded};
use std::sync::Arc;

/// Texts are kept up to so many bytes.
const TEXT_BYTES_MAX: usize = 128;
const PATH_BYTES_MAX: usize = 254;
const TERMS_MAX: usize = 64;
/// Of one memory, so that those of the largest segment are numbered by 32 bits.
const TERM_BYTES_MAX: usize = 2048;

/// Fields. A memory with the last one has nothing else.
const METADATA: u8 = 0;
const CATEGORIES: u8 = 1;
const SESSION: u8 = 2;
const EVERYTHING: u8 = 3;

/// Kinds of values.
const LIST: u8 = 0;
const FLAG: u8 = 1;
const NUMBER: u8 = 2;
const TEXT: u8 = 3;
/// The beginning of a text.
const CUT: u8 = 4;
/// One of a list, beside the kind.
const OF_LIST: u8 = 8;

pub type Term = Arc<[u8]>;

/// Terms in order, and the rows that have each.
pub type Map = BTreeMap<Term, BTreeSet<u32>>;

fn prefix(field: &Field) -> Option<Vec<u8>> {
    match field {
        Field::Metadata(path) => Some(prefix_of(METADATA, path)),
        Field::Categories => Some(prefix_of(CATEGORIES, "")),
        Field::Session => Some(prefix_of(SESSION, "")),
        _ => None,
    }
}

/// A longer path than terms have is cut to a length that none has.
fn prefix_of(field: u8, path: &str) -> Vec<u8> {
    let path = &path.as_bytes()[..path.len().min(PATH_BYTES_MAX + 1)];
    [&[field, path.len() as u8], path].concat()
}

/// A kind, and a value in the order of its kind. Numbers that are none have no place in that.
fn encoded(value: &Value) -> Option<(u8, Vec<u8>)> {
    Some(match value {
        Value::Text(text) if text.len() > TEXT_BYTES_MAX => {
            (CUT, text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into())
        }
        Value::Text(text) => (TEXT, text.as_bytes().into()),
        Value::Bool(flag) => (FLAG, vec![*flag as u8]),
        Value::Number(number) if number.is_nan() => return None,
        Value::Number(number) => {
            // Both zeros are one.
            let bits = (number + 0.0).to_bits();
            let ordered = if bits >> 63 == 1 { !bits } else { bits | 1 << 63 };
            (NUMBER, ordered.to_be_bytes().into())
        }
    })
}

/// The terms of a memory, in order, each once.
pub fn terms(memory: &Memory) -> Vec<Term> {
    let mut found = Collected::default();
    let text = |text: &String| Value::Text(text.clone());
    for category in &memory.categories {
        found.value(&prefix_of(CATEGORIES, ""), OF_LIST, &text(category));
    }
    if !memory.session.is_empty() {
        found.value(&prefix_of(SESSION, ""), 0, &text(&memory.session));
    }
    if let Ok(Json::Object(fields)) = serde_json::from_str(&memory.metadata) {
        fields.iter().for_each(|(key, json)| found.json(key, key, json));
    }
    let bytes: usize = found.terms.iter().map(|term| term.len()).sum();
    match found.terms.len() > TERMS_MAX || bytes > TERM_BYTES_MAX || found.long {
        true => vec![prefix_of(EVERYTHING, "").into()],
        false => found.terms.into_iter().collect(),
    }
}

#[derive(Default)]
struct Collected {
    terms: BTreeSet<Term>,
    /// Whether some path is too long.
    long: bool,
}

impl Collected {
    fn value(&mut self, prefix: &[u8], of_list: u8, value: &Value) {
        let term = |(kind, value): (u8, Vec<u8>)| [prefix, &[kind | of_list], &value].concat().into();
        self.terms.extend(encoded(value).map(term));
    }

    fn json(&mut self, path: &str, key: &str, json: &Json) {
        // No filter's path leads to such a key.
        if key.contains('.') {
            return;
        }
        self.long |= path.len() > PATH_BYTES_MAX;
        let prefix = prefix_of(METADATA, path);
        match json {
            Json::Object(fields) => {
                fields.iter().for_each(|(key, json)| self.json(&format!("{path}.{key}"), key, json));
            }
            Json::Array(values) => {
                // An empty list exists too.
                self.terms.insert([&prefix[..], &[LIST]].concat().into());
                values.iter().filter_map(scalar).for_each(|value| self.value(&prefix, OF_LIST, &value));
            }
            json => scalar(json).iter().for_each(|value| self.value(&prefix, 0, value)),
        }
    }
}

/// Whether few rows are left open of a filter, unless their terms are cut.
pub fn tell(filter: &Filter) -> bool {
    let known = |field: &Field| prefix(field).is_some();
    fn all(filter: &Filter) -> bool {
        match filter {
            Filter::And(of) | Filter::Or(of) => of.iter().all(all),
            Filter::Not(of) => all(of),
            filter => tell(filter),
        }
    }
    match filter {
        // One is enough to leave few.
        Filter::And(of) => of.iter().any(tell),
        Filter::Or(of) => of.iter().all(tell),
        Filter::Not(of) => all(of),
        Filter::Compare { field, .. }
        | Filter::In { field, .. }
        | Filter::Contains { field, .. }
        | Filter::Exists { field } => known(field),
    }
}

/// The rows of a block that meet a filter for certain, and all that may, each in order.
#[derive(Debug, PartialEq)]
pub struct Met {
    pub sure: Vec<u32>,
    pub may: Vec<u32>,
}

/// Lists of a segment.
#[derive(Clone, Copy, Default)]
pub struct Listed<'a> {
    pub terms: &'a [u8],
    /// Where each term ends there.
    pub ends: &'a [u32],
    /// Rows, term after term, and where those of each end.
    pub rows: &'a [u32],
    pub row_ends: &'a [u32],
}

/// Lists that are about to be written.
#[derive(Default)]
pub struct Lists {
    pub terms: Vec<u8>,
    pub ends: Vec<u32>,
    pub rows: Vec<u32>,
    pub row_ends: Vec<u32>,
}

impl Lists {
    /// Of rows from several sources, `(source, row)` each, in the order that they get.
    pub fn of(sources: &[Rows<'_>], rows: &[(u32, u32)]) -> Lists {
        let mut numbers: Vec<Vec<Option<u32>>> = sources.iter().map(|of| vec![None; of.len()]).collect();
        for (number, (source, row)) in (0..).zip(rows) {
            numbers[*source as usize][*row as usize] = Some(number);
        }
        let mut listed: Vec<(&[u8], u32)> = vec![];
        for (source, numbers) in sources.iter().zip(&numbers) {
            source.facets.each((Unbounded, Unbounded), &mut |term, row| {
                listed.extend(numbers[row as usize].map(|number| (term, number)));
            });
        }
        // What comes from few sources is almost in order.
        listed.sort();
        let mut lists = Lists::default();
        for of_term in listed.chunk_by(|a, b| a.0 == b.0) {
            lists.terms.extend_from_slice(of_term[0].0);
            lists.ends.push(lists.terms.len() as u32);
            lists.rows.extend(of_term.iter().map(|(_, row)| row));
            lists.row_ends.push(lists.rows.len() as u32);
        }
        lists
    }
}

/// The facets of a block's rows.
#[derive(Clone, Copy)]
pub enum Facets<'a> {
    Listed(Listed<'a>),
    Map(&'a Map),
}

impl<'a> Listed<'a> {
    fn part<T>(of: &'a [T], ends: &[u32], at: usize) -> &'a [T] {
        let from = at.checked_sub(1).map_or(0, |before| ends[before]);
        &of[from as usize..ends[at] as usize]
    }

    fn term(&self, at: usize) -> &'a [u8] {
        Listed::part(self.terms, self.ends, at)
    }

    /// The number of the first term for which something is false, which it is from there on.
    fn partition(&self, before: impl Fn(&[u8]) -> bool) -> usize {
        let (mut low, mut high) = (0, self.ends.len());
        while low < high {
            let middle = low.midpoint(high);
            match before(self.term(middle)) {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// Whether all that it refers to is there, among so many rows.
    pub fn sound(&self, rows: u32) -> bool {
        let rising = |ends: &[u32], len: usize| {
            ends.is_sorted() && ends.last().map_or(0, |last| *last as usize) == len
        };
        self.ends.len() == self.row_ends.len()
            && rising(self.ends, self.terms.len())
            && rising(self.row_ends, self.rows.len())
            && self.rows.iter().all(|row| *row < rows)
    }
}

type Ends<'b> = (Bound<&'b [u8]>, Bound<&'b [u8]>);

impl<'a> Facets<'a> {
    /// Calls `work` for each term in a range, and each row that has it, both in order.
    pub fn each(&self, (from, to): Ends<'_>, work: &mut dyn FnMut(&'a [u8], u32)) {
        match self {
            Facets::Map(map) => {
                for (term, rows) in map.range::<[u8], _>((from, to)) {
                    rows.iter().for_each(|row| work(term, *row));
                }
            }
            Facets::Listed(lists) => {
                let first = lists.partition(|term| match from {
                    Included(from) => term < from,
                    Excluded(from) => term <= from,
                    Unbounded => false,
                });
                for at in first..lists.ends.len() {
                    let term = lists.term(at);
                    let within = match to {
                        Included(to) => term <= to,
                        Excluded(to) => term < to,
                        Unbounded => true,
                    };
                    if !within {
                        break;
                    }
                    let rows = Listed::part(lists.rows, lists.row_ends, at);
                    rows.iter().for_each(|row| work(term, *row));
                }
            }
        }
    }

    fn rows_of(&self, term: &[u8], found: &mut Vec<u32>) {
        self.each((Included(term), Included(term)), &mut |_, row| found.push(row));
    }

    /// Whether a row has these terms, all that there are of a memory.
    pub fn has(&self, row: u32, terms: &[Term]) -> bool {
        let mut rows = vec![];
        terms.iter().all(|term| {
            rows.clear();
            self.rows_of(term, &mut rows);
            rows.binary_search(&row).is_ok()
        })
    }

    /// What can be told of `rows` rows.
    pub fn find(&self, filter: &Filter, rows: u32) -> Met {
        let mut open = vec![];
        self.rows_of(&prefix_of(EVERYTHING, ""), &mut open);
        Asked { facets: *self, rows, open }.find(filter)
    }
}

/// A filter, asked of a block.
struct Asked<'a> {
    facets: Facets<'a>,
    rows: u32,
    /// Of which nothing is known.
    open: Vec<u32>,
}

impl Asked<'_> {
    fn all(&self) -> Vec<u32> {
        (0..self.rows).collect()
    }

    fn find(&self, filter: &Filter) -> Met {
        match filter {
            Filter::And(of) => {
                let mut of = of.iter().map(|filter| self.find(filter));
                let first = of.next().unwrap_or_else(|| Met { sure: self.all(), may: self.all() });
                of.fold(first, |a, b| Met { sure: both(&a.sure, &b.sure), may: both(&a.may, &b.may) })
            }
            Filter::Or(of) => {
                let of: Vec<Met> = of.iter().map(|filter| self.find(filter)).collect();
                let any = |rows: fn(&Met) -> &[u32]| united(of.iter().flat_map(rows).copied().collect());
                Met { sure: any(|met| &met.sure), may: any(|met| &met.may) }
            }
            Filter::Not(of) => self.opposite(self.find(of)),
            Filter::Compare { field, op: CompareOp::Ne, value } => {
                self.opposite(self.field(field, |leaf| leaf.equal(value)))
            }
            Filter::Compare { field, op, value } => self.field(field, |leaf| leaf.compare(*op, value)),
            Filter::In { field, values } => {
                self.field(field, |leaf| values.iter().for_each(|value| leaf.equal(value)))
            }
            Filter::Contains { field, value } => self.field(field, |leaf| leaf.contain(value)),
            Filter::Exists { field } => self.field(field, |leaf| leaf.range(LIST, u8::MAX, true)),
        }
    }

    fn opposite(&self, Met { sure, may }: Met) -> Met {
        let without =
            |rows: &[u32]| self.all().into_iter().filter(|r| rows.binary_search(r).is_err()).collect();
        Met { sure: without(&may), may: without(&sure) }
    }

    fn field(&self, field: &Field, ask: impl FnOnce(&mut Leaf<'_, '_>)) -> Met {
        let Some(prefix) = prefix(field) else { return Met { sure: vec![], may: self.all() } };
        let mut leaf = Leaf { asked: self, prefix, sure: vec![], cut: vec![] };
        ask(&mut leaf);
        let sure = united(leaf.sure);
        let may = [&sure[..], &leaf.cut, &self.open].concat();
        Met { may: if may.len() == sure.len() { may } else { united(may) }, sure }
    }
}

/// A condition on one field, asked of a block.
struct Leaf<'a, 'f> {
    asked: &'a Asked<'f>,
    prefix: Vec<u8>,
    sure: Vec<u32>,
    /// Those of which a beginning only was compared.
    cut: Vec<u32>,
}

impl Leaf<'_, '_> {
    fn key(&self, kind: u8, value: &[u8]) -> Vec<u8> {
        [&self.prefix[..], &[kind], value].concat()
    }

    /// All of some kinds.
    fn range(&mut self, from: u8, to: u8, sure: bool) {
        let (from, to) = (self.key(from, &[]), self.key(to, &[]));
        let rows = if sure { &mut self.sure } else { &mut self.cut };
        self.asked.facets.each((Included(&from), Excluded(&to)), &mut |_, row| rows.push(row));
    }

    fn equal_among(&mut self, of_list: u8, value: &Value) {
        let Some((kind, value)) = encoded(value) else { return };
        let key = self.key(kind | of_list, &value);
        let rows = if kind == CUT { &mut self.cut } else { &mut self.sure };
        self.asked.facets.rows_of(&key, rows);
    }

    fn equal(&mut self, value: &Value) {
        self.equal_among(0, value);
        self.equal_among(OF_LIST, value);
    }

    /// Lists have no order.
    fn compare(&mut self, op: CompareOp, value: &Value) {
        if op == CompareOp::Eq {
            return self.equal(value);
        }
        let Some((kind, bytes)) = encoded(value) else { return };
        if kind == CUT {
            return self.range(TEXT, CUT + 1, false);
        }
        let (first, key, end) = (self.key(kind, &[]), self.key(kind, &bytes), self.key(kind + 1, &[]));
        let within = match op {
            CompareOp::Lt => (Included(&first[..]), Excluded(&key[..])),
            CompareOp::Le => (Included(&first[..]), Included(&key[..])),
            CompareOp::Gt => (Excluded(&key[..]), Excluded(&end[..])),
            _ => (Included(&key[..]), Excluded(&end[..])),
        };
        let sure = &mut self.sure;
        self.asked.facets.each(within, &mut |_, row| sure.push(row));
        if kind == TEXT {
            self.range(CUT, CUT + 1, false);
        }
    }

    /// Of a list one, of a text a part.
    fn contain(&mut self, value: &Value) {
        self.equal_among(OF_LIST, value);
        let Value::Text(part) = value else { return };
        let part = part.to_lowercase();
        let (from, to) = (self.key(TEXT, &[]), self.key(TEXT + 1, &[]));
        let sure = &mut self.sure;
        let mut last: (&[u8], bool) = (&[], false);
        self.asked.facets.each((Included(&from), Excluded(&to)), &mut |term, row| {
            if last.0 != term {
                let text = String::from_utf8_lossy(&term[from.len()..]);
                last = (term, text.to_lowercase().contains(&part));
            }
            if last.1 {
                sure.push(row);
            }
        });
        self.range(CUT, CUT + 1, false);
    }
}

fn united(mut rows: Vec<u32>) -> Vec<u32> {
    rows.sort_unstable();
    rows.dedup();
    rows
}

fn both(a: &[u32], b: &[u32]) -> Vec<u32> {
    let (few, many) = if a.len() < b.len() { (a, b) } else { (b, a) };
    few.iter().copied().filter(|row| many.binary_search(row).is_ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use proptest::prelude::*;

    /// Few values, so that many are met; texts that are cut and differ behind that, and one that is not by a byte.
    fn value() -> impl Strategy<Value = Json> {
        let long = |end: &str| Json::from("x".repeat(TEXT_BYTES_MAX - 1) + end);
        prop_oneof![
            prop::sample::select(vec![-1.5, -0.0, 0.0, 1.0, 2.0, 1e300]).prop_map(Json::from),
            prop::sample::select(vec!["", "a", "A b", "b", "ß"]).prop_map(Json::from),
            any::<bool>().prop_map(Json::from),
            prop::sample::select(vec![long("y"), long("éa"), long("éb")]),
            Just(Json::Null),
        ]
    }

    fn json() -> impl Strategy<Value = Json> {
        let list = prop::collection::vec(value(), 0..3).prop_map(Json::from);
        prop_oneof![4 => value(), 2 => list].prop_recursive(2, 8, 3, |inner| {
            prop::collection::hash_map(key(), inner, 0..3).prop_map(|of| of.into_iter().collect())
        })
    }

    fn key() -> impl Strategy<Value = String> {
        let long = "k".repeat(PATH_BYTES_MAX);
        let keys = ["a", "b", "", "a.b", "\0", &long].map(String::from);
        prop::sample::select(keys.to_vec())
    }

    fn memories() -> impl Strategy<Value = Vec<Memory>> {
        let metadata = prop_oneof![
            8 => prop::collection::hash_map(key(), json(), 0..4).prop_map(|of| Json::from_iter(of).to_string()),
            1 => json().prop_map(|json| json.to_string()),
            1 => Just(format!(r#"{{"a": {:?}}}"#, (0..TERMS_MAX).collect::<Vec<_>>())),
            1 => Just("no json".into()),
        ];
        let texts = || prop::sample::select(vec!["", "a", "b"]);
        let one = (metadata, texts(), prop::collection::vec(texts(), 0..3));
        prop::collection::vec(one, 0..12).prop_map(|all| {
            let one = |(metadata, session, categories): (String, &str, Vec<&str>)| Memory {
                metadata,
                session: session.into(),
                categories: categories.into_iter().map(String::from).collect(),
                ..memory("t", 1, "a text")
            };
            all.into_iter().map(one).collect()
        })
    }

    fn filters() -> impl Strategy<Value = Filter> {
        let path = prop::collection::vec(key(), 1..3).prop_map(|keys| Field::Metadata(keys.join(".")));
        let field = prop_oneof![8 => path, 1 => Just(Field::Categories), 1 => Just(Field::Session), 1 => Just(Field::Text)];
        let op = prop::sample::select(vec![
            CompareOp::Eq,
            CompareOp::Ne,
            CompareOp::Lt,
            CompareOp::Le,
            CompareOp::Gt,
            CompareOp::Ge,
        ]);
        let value = || value().prop_map(|json| scalar(&json).unwrap_or(Value::Number(f64::NAN)));
        let leaf =
            (field, op, value(), value(), 0..5).prop_map(|(field, op, value, other, kind)| match kind {
                0 => Filter::In { field, values: vec![value, other] },
                1 => Filter::Contains { field, value },
                2 => Filter::Exists { field },
                _ => Filter::Compare { field, op, value },
            });
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Filter::And),
                prop::collection::vec(inner.clone(), 0..3).prop_map(Filter::Or),
                inner.prop_map(|of| Filter::Not(Box::new(of))),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// What is sure meets the filter, what does not appear does not, and short values leave nothing open.
        #[test]
        fn facets_agree_with_looking_at_each_memory(memories in memories(), filter in filters()) {
            let mut map = Map::new();
            for (row, memory) in (0..).zip(&memories) {
                for term in terms(memory) {
                    map.entry(term).or_default().insert(row);
                }
            }
            let facets = Facets::Map(&map);
            let met = facets.find(&filter, memories.len() as u32);
            for (row, memory) in (0..).zip(&memories) {
                let meets = crate::filter::matches(&filter, memory);
                prop_assert!(!met.sure.contains(&row) || meets, "{row} is not sure: {memory:?}");
                prop_assert!(!meets || met.may.contains(&row), "{row} is missing: {memory:?}");
                prop_assert!(facets.has(row, &terms(memory)));
            }
            let said = format!("{memories:?} {filter:?}");
            if !["xxx", "kkk", "63", "Text }", "field: Text"].iter().any(|what| said.contains(what)) {
                prop_assert_eq!(met.sure, met.may);
            }
        }
    }
}
