//! The index of metadata: every scalar in a memory's JSON, and its categories and session, as a row of (owner, path, kind, value,
//! position), so that a filter finds its candidates without reading every memory.
//!
//! What the index finds is a superset of what the filter means (long texts are cut, a list and a scalar look alike); whoever uses it
//! asks [`crate::filter`] again of each candidate.

use super::months::suffix;
use crate::error::StorageError;
use crate::model::{CompareOp, Field, Filter, Memory, Month, Value};
use rusqlite::types::Value as Sql;
use rusqlite::{Connection, params_from_iter};
use serde_json::Value as Json;

/// Texts are indexed by this many bytes of their beginning.
const TEXT_BYTES_MAX: usize = 128;
/// A memory with more scalars than this is a candidate of every filter.
const ROWS_MAX: usize = 64;
/// Paths of what is no metadata.
const CATEGORIES: &str = "@categories";
const SESSION: &str = "@session";
const EVERY: &str = "@every";

const NOTHING: i64 = 0;
const NUMBER: i64 = 1;
const TEXT: i64 = 2;
const FLAG: i64 = 3;

type Row = (String, i64, Sql);

fn text(text: &str) -> (i64, Sql) {
    (TEXT, Sql::Text(text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_string()))
}

/// The rows of one memory, each once.
pub fn rows(memory: &Memory) -> Vec<Row> {
    let mut rows = vec![];
    if !memory.metadata.is_empty() {
        let json: Json = serde_json::from_str(&memory.metadata).unwrap_or(Json::Null);
        collect(&mut String::new(), &json, &mut rows);
    }
    let of = |path: &str, value: &str| {
        let (kind, value) = text(value);
        (path.to_string(), kind, value)
    };
    rows.extend(memory.categories.iter().map(|category| of(CATEGORIES, category)));
    if !memory.session.is_empty() {
        rows.push(of(SESSION, &memory.session));
    }
    if rows.len() > ROWS_MAX {
        return vec![(EVERY.into(), NOTHING, Sql::Integer(0))];
    }
    let mut once: Vec<Row> = vec![];
    for row in rows {
        if !once.contains(&row) {
            once.push(row);
        }
    }
    once
}

/// Paths are `.key.key`, so none is one of those that are no metadata.
fn collect(path: &mut String, json: &Json, rows: &mut Vec<Row>) {
    if rows.len() > ROWS_MAX {
        return;
    }
    let (kind, value) = match json {
        Json::Object(fields) => {
            for (key, json) in fields {
                let length = path.len();
                path.push('.');
                path.push_str(key);
                collect(path, json, rows);
                path.truncate(length);
            }
            return;
        }
        Json::Array(values) => {
            // An empty list exists too.
            rows.push((path.clone(), NOTHING, Sql::Integer(0)));
            values.iter().filter(|v| !v.is_object() && !v.is_array()).for_each(|v| collect(path, v, rows));
            return;
        }
        Json::Null => return,
        Json::Bool(flag) => (FLAG, Sql::Integer(*flag as i64)),
        Json::Number(number) => (NUMBER, Sql::Real(number.as_f64().unwrap_or(f64::MAX))),
        Json::String(string) => text(string),
    };
    rows.push((path.clone(), kind, value));
}

pub fn add(
    db: &Connection,
    month: Month,
    owner: i64,
    position: i64,
    memory: &Memory,
) -> Result<(), StorageError> {
    let sql = format!("INSERT INTO f{} VALUES (?1, ?2, ?3, ?4, ?5)", suffix(month));
    for_each_row(db, &sql, owner, position, memory)
}

pub fn remove(
    db: &Connection,
    month: Month,
    owner: i64,
    position: i64,
    memory: &Memory,
) -> Result<(), StorageError> {
    let of = suffix(month);
    let which = "owner = ?1 AND path = ?2 AND kind = ?3 AND value = ?4 AND position = ?5";
    for_each_row(db, &format!("DELETE FROM f{of} WHERE {which}"), owner, position, memory)
}

/// Runs a statement for each of a memory's rows.
fn for_each_row(
    db: &Connection,
    sql: &str,
    owner: i64,
    position: i64,
    memory: &Memory,
) -> Result<(), StorageError> {
    for (path, kind, value) in rows(memory) {
        db.prepare_cached(sql)?.execute((owner, path, kind, value, position))?;
    }
    Ok(())
}

/// What a filter asks of the index, for rows of one owner in one month: a query for their positions.
pub struct Condition {
    sql: String,
    values: Vec<Sql>,
}

/// What the index can say of a filter; `None`: nothing, every memory is a candidate.
pub fn condition(filter: &Filter) -> Option<Condition> {
    let joined = |parts: Vec<Condition>, with: &str| {
        let sql: Vec<String> = parts.iter().map(|p| format!("SELECT position FROM ({})", p.sql)).collect();
        let values = parts.into_iter().flat_map(|p| p.values).collect();
        Condition { sql: sql.join(with), values }
    };
    match filter {
        Filter::And(all) => {
            let parts: Vec<Condition> = all.iter().filter_map(condition).collect();
            (!parts.is_empty()).then(|| joined(parts, " INTERSECT "))
        }
        Filter::Or(any) => {
            let parts: Option<Vec<Condition>> = any.iter().map(condition).collect();
            parts.filter(|p| !p.is_empty()).map(|parts| joined(parts, " UNION "))
        }
        Filter::Not(_) => None,
        Filter::Compare { field, op, value } => {
            let compare = match op {
                CompareOp::Eq => "=",
                CompareOp::Ne => return None,
                CompareOp::Lt | CompareOp::Le => "<=",
                CompareOp::Gt | CompareOp::Ge => ">=",
            };
            at(field, Some((compare, value)))
        }
        Filter::In { field, values } => {
            let parts: Option<Vec<Condition>> = values.iter().map(|v| at(field, Some(("=", v)))).collect();
            parts.filter(|p| !p.is_empty()).map(|parts| joined(parts, " UNION "))
        }
        Filter::Contains { field: Field::Categories, value } => at(&Field::Categories, Some(("=", value))),
        // Part of a text, or one of a list.
        Filter::Contains { field, .. } | Filter::Exists { field } => at(field, None),
    }
}

fn at(field: &Field, compare: Option<(&str, &Value)>) -> Option<Condition> {
    let path = match field {
        Field::Metadata(path) => format!(".{path}"),
        Field::Categories => CATEGORIES.into(),
        Field::Session => SESSION.into(),
        _ => return None,
    };
    let mut values = vec![Sql::Text(path)];
    let sql: String = match compare {
        None => "SELECT position FROM f WHERE owner = ?1 AND path = ?".into(),
        // Cut texts cannot be ordered.
        Some(("<=" | ">=", Value::Text(long))) if long.len() > TEXT_BYTES_MAX - 4 => return at(field, None),
        Some((op, value)) => {
            let (kind, value) = match value {
                Value::Text(string) => text(string),
                Value::Number(number) => (NUMBER, Sql::Real(*number)),
                Value::Bool(flag) => (FLAG, Sql::Integer(*flag as i64)),
            };
            values.extend([Sql::Integer(kind), value]);
            format!("SELECT position FROM f WHERE owner = ?1 AND path = ? AND kind = ? AND value {op} ?")
        }
    };
    Some(Condition { sql, values })
}

impl Condition {
    fn select(&self, month: Month, columns: &str, owner: i64) -> (String, Vec<Sql>) {
        let of = suffix(month);
        // `?1` is the owner; the others count on from there in their order.
        let condition = self.sql.replace("FROM f ", &format!("FROM f{of} "));
        let every = format!("SELECT position FROM f{of} WHERE owner = ?1 AND path = '{EVERY}'");
        // The index knows the owner: rows are looked up by nothing but their positions.
        let sql = format!(
            "SELECT {columns} FROM m{of} WHERE position IN (SELECT position FROM ({condition}) UNION {every})"
        );
        let mut values = vec![Sql::Integer(owner)];
        values.extend(self.values.iter().cloned());
        (sql, values)
    }

    /// Calls `work` for each candidate of an owner in a month.
    pub fn each(
        &self,
        db: &Connection,
        month: Month,
        columns: &str,
        owner: i64,
        work: &mut dyn FnMut(&rusqlite::Row<'_>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let (sql, values) = self.select(month, columns, owner);
        let mut statement = db.prepare_cached(&sql)?;
        let mut found = statement.query(params_from_iter(values))?;
        while let Some(row) = found.next()? {
            work(row)?;
        }
        Ok(())
    }
}
