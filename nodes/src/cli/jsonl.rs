//! One memory per line of JSON. A line is checked as far as that needs no service; every refusal says what is wrong in words
//! for the person who wrote the file.

use super::time::parse_time;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;

pub const TYPES: [&str; 4] = ["semantic", "episodic", "procedural", "message"];
pub const SCOPES: [&str; 3] = ["private", "shared", "global"];

/// A line as it was written; what it leaves out is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a JSON object")]
pub struct JsonlMemory {
    pub text: String,
    /// A UUID. Not checked here.
    pub id: Option<String>,
    /// The idempotency key.
    pub key: Option<String>,
    pub user: Option<String>,
    pub agent: Option<String>,
    pub session: Option<String>,
    /// One of [`SCOPES`].
    pub scope: Option<String>,
    /// One of [`TYPES`].
    #[serde(rename = "type")]
    pub memory_type: Option<String>,
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
    /// 0 to 1.
    pub importance: Option<f32>,
    #[serde(default)]
    pub categories: Vec<String>,
    /// Milliseconds since the Unix epoch; the file may hold that number or RFC 3339. The same goes for `expires`.
    #[serde(default, deserialize_with = "time")]
    pub event_time: Option<i64>,
    #[serde(default, deserialize_with = "time")]
    pub expires: Option<i64>,
    /// Finite numbers, at least one.
    pub vector: Option<Vec<f32>>,
}

/// Reads one line. An error names the field or the column (1-based), but not the line: only the caller knows it.
pub fn parse_jsonl_line(line: &str) -> Result<JsonlMemory, String> {
    let line = line.trim_start_matches('\u{feff}').trim();
    if line.is_empty() {
        return Err("the line is empty; a memory is one JSON object".into());
    }
    let memory: JsonlMemory = serde_json::from_str(line).map_err(|error| {
        let place = format!(" at line {} column {}", error.line(), error.column());
        format!("{} (column {})", error.to_string().trim_end_matches(&place), error.column())
    })?;
    if memory.text.trim().is_empty() {
        return Err("field `text` is empty".into());
    }
    one_of("type", &memory.memory_type, &TYPES)?;
    one_of("scope", &memory.scope, &SCOPES)?;
    if let Some(importance) = memory.importance.filter(|i| !(0.0..=1.0).contains(i)) {
        return Err(format!("field `importance` is {importance}; it must be from 0 to 1"));
    }
    match &memory.vector {
        Some(vector) if vector.is_empty() => {
            Err("field `vector` is empty; leave it out to have one made".into())
        }
        Some(vector) if vector.iter().any(|x| !x.is_finite()) => {
            Err("field `vector` holds a number too large for 32 bits".into())
        }
        _ => Ok(memory),
    }
}

fn one_of(field: &str, value: &Option<String>, allowed: &[&str]) -> Result<(), String> {
    match value {
        Some(value) if !allowed.contains(&value.as_str()) => {
            Err(format!("field `{field}` is '{value}'; it must be one of {}", allowed.join(", ")))
        }
        _ => Ok(()),
    }
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i64>, D::Error> {
    struct Time;
    impl Visitor<'_> for Time {
        type Value = Option<i64>;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a time such as \"2025-03-14T09:00:00Z\", or whole milliseconds since 1970")
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            parse_time(text).map(Some).map_err(E::custom)
        }
        fn visit_i64<E: Error>(self, ms: i64) -> Result<Self::Value, E> {
            Ok(Some(ms))
        }
        fn visit_u64<E: Error>(self, ms: u64) -> Result<Self::Value, E> {
            i64::try_from(ms).map(Some).map_err(|_| E::custom(format!("{ms} is too large for a time")))
        }
        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
    }
    from.deserialize_any(Time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_line_is_read() {
        let memory = parse_jsonl_line(
            r#" {"text":"Tea, no milk.","user":"ada","agent":"a","session":"s","scope":"shared","type":"semantic",
                 "metadata":{"n":[1]},"importance":0.5,"categories":["food"],"event_time":"2025-03-14T09:00:00Z",
                 "expires":1741942800001,"key":"k","id":"00000000-0000-0000-0000-000000000001","vector":[1,-0.5]} "#,
        )
        .unwrap();
        assert_eq!(memory.text, "Tea, no milk.");
        assert_eq!((memory.event_time, memory.expires), (Some(1_741_942_800_000), Some(1_741_942_800_001)));
        assert_eq!(memory.metadata.unwrap()["n"][0], 1);
        assert_eq!(memory.vector, Some(vec![1.0, -0.5]));
        assert_eq!(memory.categories, ["food"]);
    }

    #[test]
    fn all_but_the_text_may_be_left_out() {
        let expected = JsonlMemory { text: "x".into(), ..Default::default() };
        assert_eq!(parse_jsonl_line("\u{feff}{\"text\":\"x\"}\r\n"), Ok(expected.clone()));
        assert_eq!(parse_jsonl_line(r#"{"text":"x","event_time":null,"user":null}"#), Ok(expected));
    }

    #[test]
    fn a_bad_line_is_refused_in_words() {
        for (line, why) in [
            ("", "line is empty"),
            ("[]", "expected a JSON object"),
            ("{}", "missing field `text`"),
            (r#"{"text":" "}"#, "`text` is empty"),
            (r#"{"text":"x","mood":"good"}"#, "unknown field `mood`"),
            (r#"{"text":"x","type":"dream"}"#, "one of semantic, episodic"),
            (r#"{"text":"x","scope":"all"}"#, "one of private, shared"),
            (r#"{"text":"x","importance":1.5}"#, "from 0 to 1"),
            (r#"{"text":"x","metadata":[1]}"#, "expected a map"),
            (r#"{"text":"x","event_time":"yesterday"}"#, "'yesterday' is not a time"),
            (r#"{"text":"x","event_time":1.5}"#, "whole milliseconds"),
            (r#"{"text":"x","expires":18446744073709551615}"#, "too large"),
            (r#"{"text":"x","vector":[]}"#, "`vector` is empty"),
            (r#"{"text":"x","vector":[1e39]}"#, "too large"),
            (r#"{"text":"x""#, "(column 11)"),
            (r#"{"text":"x"} {}"#, "trailing characters"),
        ] {
            let error = parse_jsonl_line(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
            assert!(!error.contains("at line"), "{error}");
        }
    }

    #[test]
    fn the_demo_ships_good_memories_and_answerable_questions() {
        let memories: Vec<JsonlMemory> =
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/memories.jsonl"))
                .lines()
                .map(|line| parse_jsonl_line(line).unwrap_or_else(|error| panic!("{line}: {error}")))
                .collect();
        assert!(memories.len() >= 300);
        for line in include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/questions.jsonl")).lines() {
            let question: serde_json::Value = serde_json::from_str(line).unwrap();
            let (user, expect) = (question["user"].as_str(), question["expect"].as_str().unwrap());
            let answers =
                memories.iter().filter(|m| m.user.as_deref() == user && m.text.contains(expect)).count();
            assert!(answers >= 1, "no memory answers {line}");
        }
    }

    proptest! {
        #[test]
        fn no_line_panics(line in r#"[{}\[\]":,a-z0-9 .é-]{0,40}"#) {
            let _ = parse_jsonl_line(&line);
        }
    }
}
