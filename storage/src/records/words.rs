//! Full-text search: which memories of some owners hold a query's words, ranked by BM25.
//!
//! SQLite's FTS5 is the inverted index. Its terms are `OWNER_STEM`: the owner's number is part of every term, so a search reads the
//! posting lists of the scopes that it asks for and of no other, however large the table is. FTS5's own `bm25()` counts over
//! the whole table, which would let one tenant's words move another's ranking; here the statistics are those of the very scopes
//! that are searched, as if nothing else existed. Robertson and Zaragoza, *The Probabilistic Relevance Framework* (2009), with
//! k₁ = 1.2, b = 0.75, and an idf that stays positive.
//!
//! The index keeps which memories hold a term (`detail=none`), not where: a third of the size and of the cost. How often a
//! memory holds it is told by further terms: `OWNER_STEM_2` for those that hold it twice or more, and so on to [`TIMES_MAX`], beyond
//! which BM25 hardly grows.

use super::months::{Months, suffix};
use crate::embed;
use crate::error::StorageError;
use crate::model::Month;
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

const K1: f64 = 1.2;
const B: f64 = 0.75;
/// Longer words are cut: an index of whole files in base64 helps nobody.
const STEM_BYTES_MAX: usize = 40;
/// More often counts as this often.
const TIMES_MAX: u32 = 6;
/// A query's terms beyond this are ignored.
const TERMS_MAX: usize = 32;

fn stem(word: &str) -> &str {
    let stem = embed::stem(word);
    &stem[..stem.floor_char_boundary(STEM_BYTES_MAX)]
}

/// The text that is indexed for a memory, and how many words it has.
pub fn document(owner: i64, text: &str) -> (String, u64) {
    let mut times: HashMap<String, u32> = HashMap::new();
    let (mut document, mut words) = (String::with_capacity(text.len() * 2), 0);
    embed::each_word(text, |word| {
        words += 1;
        let stem = stem(word);
        let times = match times.get_mut(stem) {
            Some(times) => times,
            None => times.entry(stem.to_string()).or_default(),
        };
        *times += 1;
        // In the order of the text: the map's own is not repeatable.
        let _ = match *times {
            1 => write!(document, "{owner}_{stem} "),
            more if more <= TIMES_MAX => write!(document, "{owner}_{stem}_{more} "),
            _ => Ok(()),
        };
    });
    (document, words)
}

/// The terms of a query that say something, each once.
pub fn query_terms(text: &str) -> Vec<String> {
    let mut terms: Vec<String> = vec![];
    embed::each_word(text, |word| {
        let term = stem(word);
        if terms.len() < TERMS_MAX && embed::weight(word, term) > 0.0 && !terms.iter().any(|t| t == term) {
            terms.push(term.to_string());
        }
    });
    terms
}

pub fn add(
    db: &Connection,
    month: Month,
    position: i64,
    owner: i64,
    text: &str,
) -> Result<u64, StorageError> {
    let (of, (document, words)) = (suffix(month), document(owner, text));
    db.prepare_cached(&format!("INSERT INTO t{of} (rowid, words) VALUES (?1, ?2)"))?
        .execute(params![position, document])?;
    db.prepare_cached(&format!(
        "INSERT INTO o{of} VALUES (?1, 1, ?2) ON CONFLICT DO UPDATE SET memories = memories + 1, words = words + ?2"
    ))?
    .execute(params![owner, words as i64])?;
    Ok(words)
}

pub fn remove(
    db: &Connection,
    month: Month,
    position: i64,
    owner: i64,
    words: i64,
) -> Result<(), StorageError> {
    let of = suffix(month);
    db.prepare_cached(&format!("DELETE FROM t{of} WHERE rowid = ?1"))?.execute([position])?;
    db.prepare_cached(&format!(
        "UPDATE o{of} SET memories = memories - 1, words = words - ?2 WHERE owner = ?1"
    ))?
    .execute(params![owner, words])?;
    Ok(())
}

/// How many memories an owner has in a month, and how many words they have together.
pub fn counts(db: &Connection, month: Month, owner: i64) -> Result<(u64, u64), StorageError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT memories, words FROM o{} WHERE owner = ?1", suffix(month)))?;
    let found = statement.query_row([owner], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)));
    Ok(found.optional()?.map_or((0, 0), |(memories, words)| (memories as u64, words as u64)))
}

/// A memory that holds some of the words.
pub struct Found {
    pub month: Month,
    pub position: i64,
    pub score: f32,
}

/// All memories of these owners (by number) in these months that hold one of the terms, best first, equal ones by position.
pub fn search(
    db: &Connection,
    months: &Months,
    owners: &[i64],
    terms: &[String],
) -> Result<Vec<Found>, StorageError> {
    let (mut memories, mut words) = (0, 0);
    let mut places = vec![];
    for month in months.keys() {
        for owner in owners {
            let (some, of_them) = counts(db, *month, *owner)?;
            if some > 0 {
                (memories, words) = (memories + some, words + of_them);
                places.push((*month, *owner));
            }
        }
    }
    let length_mean = (words as f64 / memories.max(1) as f64).max(1.0);
    let mut scores: BTreeMap<(Month, i64), (f64, f64)> = BTreeMap::new();
    for term in terms {
        let mut postings: BTreeMap<(Month, i64), f64> = BTreeMap::new();
        for (month, owner) in &places {
            let sql = format!("SELECT doc FROM v{} WHERE term = ?1", suffix(*month));
            let mut statement = db.prepare_cached(&sql)?;
            for times in 1..=TIMES_MAX {
                let term =
                    if times == 1 { format!("{owner}_{term}") } else { format!("{owner}_{term}_{times}") };
                let mut found = statement.query([term])?;
                let mut any = false;
                while let Some(row) = found.next()? {
                    any = true;
                    postings.insert((*month, row.get(0)?), times as f64);
                }
                if !any {
                    break;
                }
            }
        }
        let holders = postings.len() as f64;
        let idf = (1.0 + (memories as f64 - holders + 0.5) / (holders + 0.5)).ln();
        for (place, times) in &postings {
            let length = match scores.get(place) {
                Some((_, length)) => *length,
                None => length_of(db, *place)?,
            };
            let score = idf * times * (K1 + 1.0) / (times + K1 * (1.0 - B + B * length / length_mean));
            scores.entry(*place).or_insert((0.0, length)).0 += score;
        }
    }
    let mut found: Vec<Found> = scores
        .into_iter()
        .map(|((month, position), (score, _))| Found { month, position, score: score as f32 })
        .collect();
    found.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.position.cmp(&b.position)));
    Ok(found)
}

fn length_of(db: &Connection, (month, position): (Month, i64)) -> Result<f64, StorageError> {
    let mut statement =
        db.prepare_cached(&format!("SELECT words FROM m{} WHERE position = ?1", suffix(month)))?;
    let words: Option<i64> = statement.query_row([position], |row| row.get(0)).optional()?;
    words.map(|words| words as f64).ok_or_else(|| StorageError::Corrupt {
        what: format!("the words of {month}"),
        problem: format!("they name a memory at {position} that is not there"),
    })
}
