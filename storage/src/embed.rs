//! The built-in embedder: no model, no download, the same vector on every machine.
//!
//! It is lexical, not semantic: it sees words, not meanings. A text becomes a bag of features — stemmed words, pairs of
//! neighbours, and the 3- and 4-grams of each word, which forgive endings and typing errors — hashed with a sign into
//! [`DIMENSION`] dimensions (feature hashing: Weinberger et al., 2009), weighted, and brought to unit length. "car" and "automobile"
//! stay strangers; for meaning, callers give vectors of a model of theirs.
//!
//! Hashing collides, so a search re-ranks its candidates by the words themselves ([`lexical_scores`]).
//! Only `+ * / sqrt` are used, which IEEE 754 rounds the same everywhere.

use std::collections::BTreeMap;

/// Names the space of these vectors.
pub const LEXICAL_SPACE: &str = "lexical-384-v1";
pub const DIMENSION: usize = 384;

const BIGRAM_WEIGHT: f32 = 0.4;
/// All n-grams of a word together weigh this much of the word.
const GRAMS_WEIGHT: f32 = 0.5;

/// Words that say nothing of a text's subject.
const STOP: &str = " a about above after again all also am an and any are as at be because been before being below between both \
but by can could did do does doing down during each either else ever every few for from further get got had has have having he her \
here hers him his how however i if in into is it its itself just let like may me might more most much must my no nor not now of off \
on once one only or other our out over own per said same say see shall she should since so some such than that the their them then \
there these they this those through thus to too under until up upon us use used very via was way we were what when where whether \
which while who whom whose why will with within without would yes yet you your d ll m re s t ve don isn doesn didn wasn ";

/// Words that say little.
const COMMON: &str = " able add another back become best better big bring call case change come day different end even find first \
follow form general give given go good great hand help high include keep kind know large last left long look made make many mean \
need never new next number old order part people place point possible problem put right run set show small something sort start state \
still take tell thing think three time times try turn two want well work world year years ";

/// How much a word weighs.
fn weight(word: &str) -> f32 {
    let listed = |list: &str| {
        list.match_indices(word)
            .any(|(at, _)| list.as_bytes()[at - 1] == b' ' && list.as_bytes()[at + word.len()] == b' ')
    };
    if word.len() < 12 && word.is_ascii() {
        if listed(STOP) {
            return 0.0;
        }
        if listed(COMMON) {
            return 0.4;
        }
    }
    if word.chars().count() < 3 { 0.6 } else { 1.0 }
}

/// Cuts common English endings, so that "renovating", "renovated" and "renovates" are one term.
fn stem(word: &str) -> &str {
    if !word.is_ascii() || word.len() < 4 {
        return word;
    }
    for (ending, least) in [
        ("ications", 4),
        ("ication", 4),
        ("ations", 4),
        ("ation", 4),
        ("ments", 4),
        ("ment", 4),
        ("ingly", 4),
        ("edly", 4),
        ("ness", 4),
        ("ings", 3),
        ("ing", 3),
        ("ies", 3),
        ("ied", 3),
        ("ers", 4),
        ("ed", 3),
        ("es", 3),
        ("er", 4),
        ("ly", 4),
        ("s", 3),
        ("e", 3),
        ("y", 3),
    ] {
        if let Some(stem) = word.strip_suffix(ending)
            && stem.len() >= least
            && !(ending == "s" && stem.ends_with('s'))
        {
            let bytes = stem.as_bytes();
            // A doubled consonant goes with its ending: "running" is "run", as "runs" is.
            let doubled = bytes.len() > 3
                && bytes[bytes.len() - 1] == bytes[bytes.len() - 2]
                && !b"aeiouls".contains(&bytes[bytes.len() - 1]);
            return if doubled { &stem[..stem.len() - 1] } else { stem };
        }
    }
    word
}

/// The words of a text in lower case, with their weights; those that weigh nothing are left out.
fn words(text: &str) -> Vec<(String, f32)> {
    let lower = text.to_lowercase();
    let word = |w: &str| {
        let weight = weight(w);
        (weight > 0.0).then(|| (w.to_string(), weight))
    };
    lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).filter_map(word).collect()
}

/// FNV-1a with a final mix.
fn hash(kind: u8, parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ kind as u64;
    for part in parts {
        for byte in *part {
            hash = (hash ^ *byte as u64).wrapping_mul(0x0000_0100_0000_01b3);
        }
        hash = (hash ^ 0xff).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ (hash >> 32)
}

/// The text's vector, of unit length; empty if the text has no words.
pub fn embed(text: &str) -> Vec<f32> {
    let words = words(text);
    if words.is_empty() {
        return vec![];
    }
    // Ordered by hash, so that sums are made in one order.
    let mut features: BTreeMap<u64, (f32, u32)> = BTreeMap::new();
    let mut count = |feature: u64, weight: f32| {
        let entry = features.entry(feature).or_insert((weight, 0));
        entry.1 += 1;
    };
    let mut before: Option<(&str, f32)> = None;
    for (word, weight) in &words {
        let stem = stem(word);
        count(hash(1, &[stem.as_bytes()]), *weight);
        if let Some((previous, its)) = before {
            count(hash(2, &[previous.as_bytes(), stem.as_bytes()]), BIGRAM_WEIGHT * (weight * its).sqrt());
        }
        before = Some((stem, *weight));
        let bytes = word.as_bytes();
        if bytes.len() >= 4 {
            let grams = (2 * bytes.len() - 5) as f32;
            let each = GRAMS_WEIGHT * weight / grams.sqrt();
            for n in [3, 4] {
                for gram in bytes.windows(n) {
                    count(hash(3, &[gram]), each);
                }
            }
        }
    }
    let mut vector = vec![0.0f32; DIMENSION];
    for (feature, (weight, times)) in features {
        let value = weight * (times as f32).sqrt();
        let at = (feature % DIMENSION as u64) as usize;
        vector[at] += if feature >> 63 == 0 { value } else { -value };
    }
    let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    if norm < 1e-12 {
        return vec![];
    }
    vector.iter_mut().for_each(|x| *x /= norm);
    vector
}

/// For each text the share, 0 to 1, of the query's terms that it holds. A term weighs more the fewer of the texts hold it; a
/// seventh of the score is for neighbours in the query that are neighbours in the text.
pub fn lexical_scores(query: &str, texts: &[&str]) -> Vec<f32> {
    let query_words = words(query);
    let mut terms: Vec<(&str, f32)> = vec![];
    for (word, weight) in &query_words {
        let stem = stem(word);
        if !terms.iter().any(|(t, _)| *t == stem) {
            terms.push((stem, *weight));
        }
    }
    // For each text, the places in its words where each term stands.
    let places: Vec<Vec<Vec<usize>>> = texts
        .iter()
        .map(|text| {
            let mut found = vec![vec![]; terms.len()];
            for (at, (word, _)) in words(text).iter().enumerate() {
                let stem = stem(word);
                if let Some(term) = terms.iter().position(|(t, _)| *t == stem) {
                    found[term].push(at);
                }
            }
            found
        })
        .collect();
    let total = texts.len() as f32;
    for (term, (_, weight)) in terms.iter_mut().enumerate() {
        let holding = places.iter().filter(|p| !p[term].is_empty()).count() as f32;
        *weight *= ((total + 1.0) / (holding + 1.0)).sqrt();
    }
    let all: f32 = terms.iter().map(|(_, w)| w).sum();
    let pairs = terms.len().saturating_sub(1) as f32;
    places
        .iter()
        .map(|found| {
            if all <= 0.0 {
                return 0.0;
            }
            let held: f32 = terms.iter().zip(found).filter(|(_, p)| !p.is_empty()).map(|((_, w), _)| w).sum();
            let close = found
                .windows(2)
                .filter(|p| p[0].iter().any(|a| p[1].iter().any(|b| a.abs_diff(*b) <= 2)))
                .count();
            let close = if pairs > 0.0 { close as f32 / pairs } else { held / all };
            (6.0 * held / all + close) / 7.0
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::dot;

    #[test]
    fn vectors_have_unit_length_and_never_change() {
        let vector = embed(
            "Maya moved her marathon training to the mornings because the nights at the clinic run long.",
        );
        assert_eq!(vector.len(), DIMENSION);
        assert!((dot(&vector, &vector) - 1.0).abs() < 1e-5);
        let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
        // Stored vectors are compared with new ones: a change here needs a new space's name.
        assert_eq!(blake3::hash(&bytes).to_hex()[..16], *"0f991639c9d76408");
        assert!(embed("and of the").is_empty() && embed("").is_empty());
    }

    #[test]
    fn related_texts_are_closer_than_strangers() {
        let query = embed("When does the kitchen renovation start?");
        let near = embed("The renovation of the kitchen starts on the third of May; the old tiles go first.");
        let far = embed("Her sister sent photographs of the harbour in Bergen.");
        assert!(dot(&query, &near) > dot(&query, &far) + 0.2);
    }

    #[test]
    fn endings_do_not_matter() {
        for (a, b) in
            [("renovating", "renovated"), ("running", "runs"), ("studies", "study"), ("licenses", "license")]
        {
            assert_eq!(stem(a), stem(b), "{a} and {b}");
        }
    }

    #[test]
    fn rare_terms_outweigh_common_ones() {
        let texts = ["the licence of the program", "the licence of the library", "the licence of the zebra"];
        let scores = lexical_scores("zebra licence", &texts);
        assert!(scores[2] > scores[0] && scores[0] == scores[1] && scores[2] <= 1.0);
    }
}
