//! Whether a memory meets the conditions of a query.

use crate::model::*;
use crate::query::{TimeField, TimeRange};
use serde_json::Value as Json;
use std::cmp::Ordering;

/// What a field of one memory holds.
enum Held {
    One(Value),
    Many(Vec<Value>),
    Nothing,
}

/// Whether `memory` lies in the time range.
pub fn in_time(memory: &Memory, range: &TimeRange) -> bool {
    let at = match range.field {
        TimeField::Created => Some(memory.created),
        TimeField::Updated => Some(memory.updated),
        TimeField::EventTime => memory.event_time,
    };
    at.is_some_and(|at| range.from.is_none_or(|from| at >= from) && range.to.is_none_or(|to| at < to))
}

/// Whether `memory` meets the filter. A comparison with a missing field, or of different kinds, is false; `Ne` is its opposite.
pub fn matches(filter: &Filter, memory: &Memory) -> bool {
    // The metadata is parsed once, and only if some condition asks for it.
    let metadata = std::cell::OnceCell::new();
    eval(filter, memory, &|| {
        metadata.get_or_init(|| serde_json::from_str(&memory.metadata).unwrap_or(Json::Null))
    })
}

fn eval<'a>(filter: &Filter, memory: &Memory, metadata: &dyn Fn() -> &'a Json) -> bool {
    match filter {
        Filter::And(all) => all.iter().all(|f| eval(f, memory, metadata)),
        Filter::Or(any) => any.iter().any(|f| eval(f, memory, metadata)),
        Filter::Not(inner) => !eval(inner, memory, metadata),
        Filter::Compare { field, op: CompareOp::Ne, value } => !equals(&held(field, memory, metadata), value),
        Filter::Compare { field, op: CompareOp::Eq, value } => equals(&held(field, memory, metadata), value),
        Filter::Compare { field, op, value } => match held(field, memory, metadata) {
            Held::One(one) => compare(&one, value).is_some_and(|order| match op {
                CompareOp::Lt => order == Ordering::Less,
                CompareOp::Le => order != Ordering::Greater,
                CompareOp::Gt => order == Ordering::Greater,
                _ => order != Ordering::Less,
            }),
            _ => false,
        },
        Filter::In { field, values } => {
            let held = held(field, memory, metadata);
            values.iter().any(|v| equals(&held, v))
        }
        Filter::Contains { field, value } => match (held(field, memory, metadata), value) {
            (Held::One(Value::Text(text)), Value::Text(part)) => {
                text.to_lowercase().contains(&part.to_lowercase())
            }
            (Held::Many(values), value) => values.iter().any(|v| compare(v, value) == Some(Ordering::Equal)),
            _ => false,
        },
        Filter::Exists { field } => !matches!(held(field, memory, metadata), Held::Nothing),
    }
}

fn equals(held: &Held, value: &Value) -> bool {
    match held {
        Held::One(one) => compare(one, value) == Some(Ordering::Equal),
        Held::Many(values) => values.iter().any(|v| compare(v, value) == Some(Ordering::Equal)),
        Held::Nothing => false,
    }
}

fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        (Value::Number(a), Value::Number(b)) => a.partial_cmp(b),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        _ => None,
    }
}

fn held<'a>(field: &Field, memory: &Memory, metadata: &dyn Fn() -> &'a Json) -> Held {
    let text = |text: &str| match text {
        "" => Held::Nothing,
        text => Held::One(Value::Text(text.into())),
    };
    let number = |n: f64| Held::One(Value::Number(n));
    match field {
        Field::Text => text(&memory.text),
        Field::User => text(&memory.user),
        Field::Agent => text(&memory.agent),
        Field::Session => text(&memory.session),
        Field::Kind => text(match memory.kind {
            MemoryType::Semantic => "semantic",
            MemoryType::Episodic => "episodic",
            MemoryType::Procedural => "procedural",
            MemoryType::Message => "message",
        }),
        Field::Status => text(match memory.status {
            Status::Active => "active",
            Status::Archived => "archived",
        }),
        Field::Importance => number(memory.importance as f64),
        Field::Categories if memory.categories.is_empty() => Held::Nothing,
        Field::Categories => Held::Many(memory.categories.iter().cloned().map(Value::Text).collect()),
        Field::Created => number(memory.created as f64),
        Field::Updated => number(memory.updated as f64),
        Field::EventTime => memory.event_time.map_or(Held::Nothing, |at| number(at as f64)),
        Field::Metadata(path) => {
            let found = path.split('.').try_fold(metadata(), |json, key| json.get(key));
            match found {
                Some(Json::Array(values)) => Held::Many(values.iter().filter_map(scalar).collect()),
                Some(json) => scalar(json).map_or(Held::Nothing, Held::One),
                None => Held::Nothing,
            }
        }
    }
}

pub fn scalar(json: &Json) -> Option<Value> {
    match json {
        Json::String(text) => Some(Value::Text(text.clone())),
        Json::Number(number) => number.as_f64().map(Value::Number),
        Json::Bool(flag) => Some(Value::Bool(*flag)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn conditions_on_metadata_lists_and_fields() {
        let mut m = memory("t", 1, "A walk in Rome");
        m.metadata = r#"{"city": "Rome", "trip": {"days": 3, "tags": ["sea", "food"]}, "paid": true}"#.into();
        m.categories = vec!["travel".into()];
        m.importance = 0.5;
        let field = |p: &str| Field::Metadata(p.into());
        let text = |t: &str| Value::Text(t.into());
        let compare = |field, op, value| Filter::Compare { field, op, value };
        let days = |op, n| compare(field("trip.days"), op, Value::Number(n));
        let holds = [
            compare(field("city"), CompareOp::Eq, text("Rome")),
            days(CompareOp::Ge, 3.0),
            days(CompareOp::Lt, 4.0),
            compare(field("missing"), CompareOp::Ne, text("x")),
            Filter::Contains { field: field("trip.tags"), value: text("sea") },
            Filter::Contains { field: Field::Text, value: text("walk") },
            Filter::In { field: Field::Categories, values: vec![text("x"), text("travel")] },
            Filter::Exists { field: field("paid") },
            compare(Field::Kind, CompareOp::Eq, text("semantic")),
        ];
        for filter in &holds {
            assert!(matches(filter, &m), "{filter:?}");
            assert!(!matches(&Filter::Not(Box::new(filter.clone())), &m), "not {filter:?}");
        }
        assert!(matches(&Filter::And(holds.to_vec()), &m));
        for filter in [
            days(CompareOp::Gt, 3.0),
            compare(field("city"), CompareOp::Eq, Value::Number(1.0)),
            compare(field("missing"), CompareOp::Lt, text("x")),
            Filter::Exists { field: field("nowhere.deep") },
            Filter::Or(vec![]),
        ] {
            assert!(!matches(&filter, &m), "{filter:?}");
        }
    }

    #[test]
    fn time_ranges_include_their_start_only() {
        let mut m = memory("t", 1, "x");
        m.event_time = Some(10);
        let range = |from, to| TimeRange { field: TimeField::EventTime, from, to };
        assert!(in_time(&m, &range(Some(10), Some(11))));
        assert!(!in_time(&m, &range(Some(9), Some(10))));
        m.event_time = None;
        assert!(!in_time(&m, &range(None, None)));
    }
}
