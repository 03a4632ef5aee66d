//! The built-in embedder: no model, no download, the same vector on every machine.
//!
//! It is lexical, not semantic: it sees words, not meanings. A text becomes a bag of features — stemmed words, pairs of
//! neighbours, and the 3- to 5-grams of each word, which forgive endings and typing errors — hashed with a sign into
//! [`DIMENSION`] dimensions (feature hashing: Weinberger et al., 2009), weighted, and brought to unit length. "car" and "automobile"
//! stay strangers; for meaning, callers give vectors of a model of theirs. Stems and weights know English only. A language
//! written without spaces is one long word, found by its n-grams in [`embed`] and hardly at all by [`lexical_score`].
//!
//! Hashing collides, so a search re-ranks its candidates by the words themselves ([`lexical_score`]).
//! Only `+ * / sqrt` are used, in one order, which IEEE 754 rounds the same everywhere.

use std::sync::LazyLock;

/// Names the space of these vectors.
pub const LEXICAL_SPACE: &str = "lexical-384-v1";
pub const DIMENSION: usize = 384;

const BIGRAM_WEIGHT: f32 = 0.4;
/// Bytes of the pieces that a word is also cut into, if it has more than three.
const GRAMS: [usize; 3] = [3, 4, 5];
/// The n-grams of a word together are this long, the word itself being 1.
const GRAMS_WEIGHT: f32 = 0.7;
/// [`lexical_score`] looks at this many different terms of a query; later ones do not count.
const TERMS_MAX: usize = 64;
/// The part of [`lexical_score`] that is for neighbours in the query which stand at most [`NEAR_WORDS`] apart in the text.
const CLOSE_SHARE: f32 = 0.2;
const NEAR_WORDS: usize = 3;

/// Words that say nothing of a text's subject: weight 0.
const STOP: &str = " a about above after again all also am an and any are as at be because been before being below between both \
but by can could did do does doing down during each either else ever every few for from further get got had has have having he her \
here hers him his how however i if in into is it its itself just let like may me might more most much must my no nor not now of off \
on once one only or other our out over own per said same say see shall she should since so some such than that the their them then \
there these they this those through thus to too under until up upon us use used very via was way we were what when where whether \
which while who whom whose why will with within without would yes yet you your d ll m re s t ve don isn doesn didn wasn ";

/// Words that say little: weight [`COMMON_WEIGHT`], in all their forms.
const COMMON: &str = " able add another back become best better big bring call case change come day different end even find first \
follow form general give given go good great hand help high include keep kind know large last left long look made make many mean \
need never new next number old order part people place point possible problem put right run set show small something sort start state \
still take tell thing think three time times try turn two want well work world year years ";
const COMMON_WEIGHT: f32 = 0.4;

static STOP_WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| sorted(STOP.split_whitespace()));
static COMMON_STEMS: LazyLock<Vec<&str>> = LazyLock::new(|| sorted(COMMON.split_whitespace().map(stem)));

fn sorted(words: impl Iterator<Item = &'static str>) -> Vec<&'static str> {
    let mut words: Vec<_> = words.collect();
    words.sort_unstable();
    words
}

/// How much a word weighs. Without a corpus, length stands in for rarity.
pub(crate) fn weight(word: &str, stem: &str) -> f32 {
    if STOP_WORDS.binary_search(&word).is_ok() {
        0.0
    } else if COMMON_STEMS.binary_search(&stem).is_ok() {
        COMMON_WEIGHT
    } else {
        match word.len() {
            1 | 2 => 0.6,
            3 => 0.6,
            4 => 0.75,
            5 => 0.9,
            _ => 1.0,
        }
    }
}

/// Endings, longest first of those that overlap, and how many bytes must be left of the word.
#[rustfmt::skip]
const ENDINGS: &[(&str, usize)] = &[
    ("ications", 4), ("ication", 4), ("ations", 4), ("ation", 4), ("ating", 4), ("ated", 4), ("ates", 4), ("ate", 4),
    ("ions", 4), ("ion", 4), ("ments", 4), ("ment", 4), ("ingly", 4), ("edly", 4), ("ness", 4), ("ings", 3), ("ing", 3),
    ("ies", 3), ("ied", 3), ("ers", 4), ("ed", 3), ("es", 3), ("er", 4), ("ly", 4), ("s", 3), ("e", 3), ("y", 3),
];

/// Cuts common English endings, so that "renovating", "renovated" and "renovates" are one term. What is left need not be a word.
pub(crate) fn stem(word: &str) -> &str {
    if word.len() < 4 || !word.is_ascii() {
        return word;
    }
    for (ending, least) in ENDINGS {
        if let Some(stem) = word.strip_suffix(ending)
            && stem.len() >= *least
            && !(*ending == "s" && stem.ends_with('s'))
        {
            // A doubled consonant goes with its ending: "running" is "run", as "runs" is.
            return match stem.as_bytes() {
                [.., a, b] if a == b && stem.len() > 3 && !b"aeiouls".contains(b) => &stem[..stem.len() - 1],
                _ => stem,
            };
        }
    }
    word
}

/// Gives the words of a text, in lower case, one by one.
pub(crate) fn each_word(text: &str, mut give: impl FnMut(&str)) {
    let mut word = String::with_capacity(32);
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            word.push(c.to_ascii_lowercase());
        } else if !c.is_ascii() && c.is_alphanumeric() {
            word.extend(c.to_lowercase());
        } else if !word.is_empty() {
            give(&word);
            word.clear();
        }
    }
    if !word.is_empty() {
        give(&word);
    }
}

/// Spreads every bit of `x` over all bits.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// The feature of a stem. British and American spellings share it: licence, colour, organise.
fn term(stem: &str) -> u64 {
    let bytes = stem.as_bytes();
    let spelling = |at: usize, byte: u8| match (byte, bytes.len() - at) {
        (b'c' | b'z', 1) if bytes.len() > 4 => b's',
        (b'u', 2) if bytes.len() > 4 && bytes.ends_with(b"our") => 0,
        _ => byte,
    };
    let fold = |hash: u64, (at, &byte): (usize, &u8)| match spelling(at, byte) {
        0 => hash,
        byte => (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3),
    };
    mix(bytes.iter().enumerate().fold(0xcbf2_9ce4_8422_2325, fold))
}

/// A word or pair of words in a text, with the place of the word's letters for its n-grams.
struct Feature {
    hash: u64,
    weight: f32,
    letters: std::ops::Range<usize>,
}

fn features(text: &str) -> (Vec<Feature>, String) {
    let (mut features, mut letters) = (Vec::with_capacity(text.len() / 4), String::with_capacity(text.len()));
    let mut before: Option<(u64, f32)> = None;
    each_word(text, |word| {
        let stem = stem(word);
        let weight = weight(word, stem);
        if weight == 0.0 {
            return;
        }
        let hash = term(stem);
        let start = letters.len();
        letters.push_str(word);
        features.push(Feature { hash, weight, letters: start..letters.len() });
        if let Some((previous, its)) = before {
            let weight = BIGRAM_WEIGHT * (weight * its).sqrt();
            features.push(Feature { hash: mix(previous.rotate_left(17) ^ hash), weight, letters: 0..0 });
        }
        before = Some((hash, weight));
    });
    // Equal ones together; the order also fixes that of the sums.
    features.sort_unstable_by_key(|f| (f.hash, f.letters.start));
    (features, letters)
}

/// The text's vector, of unit length; empty if the text has no words that say something.
pub fn embed(text: &str) -> Vec<f32> {
    let (features, letters) = features(text);
    let mut vector = vec![0.0f32; DIMENSION];
    let mut add = |hash: u64, value: f32| {
        let at = ((hash >> 32) * DIMENSION as u64) >> 32;
        vector[at as usize] += if hash & 1 == 0 { value } else { -value };
    };
    for same in features.chunk_by(|a, b| a.hash == b.hash) {
        let weight = same[0].weight * (same.len() as f32).sqrt();
        add(same[0].hash, weight);
        let word = &letters.as_bytes()[same[0].letters.clone()];
        if word.len() >= 4 {
            let count: usize = GRAMS.iter().map(|n| (word.len() + 1).saturating_sub(*n)).sum();
            let each = GRAMS_WEIGHT * weight / (count as f32).sqrt();
            for n in GRAMS {
                for gram in word.windows(n) {
                    add(mix(gram.iter().fold(n as u64, |all, &byte| all << 8 | byte as u64)), each);
                }
            }
        }
    }
    let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    if norm < 1e-6 {
        return vec![];
    }
    vector.iter_mut().for_each(|x| *x /= norm);
    vector
}

/// The share, 0 to 1, of the query's terms, by weight, that the text holds; a fifth of it is for neighbours in the query that
/// stand near each other in the text. 0 if the query has no words that say something.
pub fn lexical_score(query: &str, text: &str) -> f32 {
    let mut terms: Vec<(u64, f32)> = vec![];
    each_word(query, |word| {
        let stem = stem(word);
        let (hash, weight) = (term(stem), weight(word, stem));
        if weight > 0.0 && terms.len() < TERMS_MAX && terms.iter().all(|t| t.0 != hash) {
            terms.push((hash, weight));
        }
    });
    // Where each term was last seen, in words; and which terms were seen near the one that follows them in the query.
    let mut seen = [None::<usize>; TERMS_MAX];
    let mut close = [false; TERMS_MAX];
    let mut place = 0;
    each_word(text, |word| {
        place += 1;
        let hash = term(stem(word));
        let Some(at) = terms.iter().position(|t| t.0 == hash) else { return };
        seen[at] = Some(place);
        let near = |other: Option<usize>| other.is_some_and(|p| place - p <= NEAR_WORDS);
        close[at] |= seen.get(at + 1).is_some_and(|next| near(*next));
        if at > 0 {
            close[at - 1] |= near(seen[at - 1]);
        }
    });
    let (mut all, mut held, mut pairs, mut together) = (0.0, 0.0, 0.0, 0.0);
    for (at, (_, weight)) in terms.iter().enumerate() {
        all += weight;
        held += if seen[at].is_some() { *weight } else { 0.0 };
        if let Some((_, next)) = terms.get(at + 1) {
            pairs += weight * next;
            together += if close[at] { weight * next } else { 0.0 };
        }
    }
    match (all > 0.0, pairs > 0.0) {
        (false, _) => 0.0,
        (true, false) => held / all,
        (true, true) => (1.0 - CLOSE_SHARE) * held / all + CLOSE_SHARE * together / pairs,
    }
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
        assert_eq!(blake3::hash(&bytes).to_hex()[..16], *"2101c2ec4c386372");
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
    fn endings_and_spellings_do_not_matter() {
        for (a, b) in [
            ("renovating", "renovated"),
            ("running", "runs"),
            ("studies", "study"),
            ("licences", "license"),
            ("colour", "colors"),
            ("organised", "organize"),
            ("creation", "creating"),
        ] {
            assert_eq!(term(stem(a)), term(stem(b)), "{a} and {b}");
        }
        assert_ne!(term(stem("four")), term(stem("for")));
    }

    #[test]
    fn score_is_the_share_of_the_querys_terms() {
        let query = "Where is the kitchen renovation?";
        assert_eq!(lexical_score(query, "Renovating a KITCHEN takes weeks."), 1.0);
        let apart =
            lexical_score(query, "The kitchen is done, all tiles are white, but the renovation was dear.");
        let half = lexical_score(query, "The kitchen is done.");
        assert!(1.0 > apart && apart > half && half > 0.0, "{apart} {half}");
        assert_eq!(lexical_score(query, "Her sister sent photographs."), 0.0);
        assert_eq!(lexical_score("and of the", "and of the"), 0.0);
        assert_eq!(lexical_score(query, ""), 0.0);
    }

    #[test]
    fn any_text_is_taken() {
        let long = "word ".repeat(20_000) + &"x".repeat(100_000);
        for text in
            ["", "a", "\u{0}", "日本語のテキスト", "Straße İstanbul ÉCOLE", "🦀🦀", "1 22 333 4444", &long]
        {
            let vector = embed(text);
            assert!(vector.is_empty() || (dot(&vector, &vector) - 1.0).abs() < 1e-5, "{text:.20}");
            let score = lexical_score(text, text);
            assert!((0.0..=1.0).contains(&score), "{text:.20}: {score}");
        }
        assert!(dot(&embed("Ärger im Büro"), &embed("ÄRGER IM BÜRO")) > 0.999);
    }
}
