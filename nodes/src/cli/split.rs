//! From a file to passages that are worth remembering one by one: 300 to 700 characters where the text allows, never over 1,500.
//!
//! A file becomes blocks (a paragraph, a list, a code fence), under Markdown also sections. A block that is too long is divided at
//! the coarsest seam that helps: list items, then lines, then sentences, then words, and in a text without any of these between
//! two characters. Neighbours in a section that are too short are joined. Nothing that a person wrote is lost or moved: the
//! passages hold the same visible characters in the same order, without front matter, rulers and the marks of headings, whose
//! words stand in [`Passage::heading`]. Only white space changes: the lines of a wrapped paragraph become one.

mod markdown;

use std::ops::Range;
use std::path::Path;

/// Sizes of a passage in characters.
pub const TARGET_MIN: usize = 300;
pub const TARGET_MAX: usize = 700;
pub const HARD_MAX: usize = 1500;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    pub text: String,
    /// As given to [`split`]: where the text is from.
    pub source: String,
    /// `Chapter > Section`, or empty.
    pub heading: String,
    /// Where the passage begins, 1-based.
    pub line: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Jsonl,
    Markdown,
    Text,
}

impl Format {
    /// By the extension, in any case; what is not known is text.
    pub fn of(path: impl AsRef<Path>) -> Format {
        let extension = path.as_ref().extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        match extension.as_str() {
            "jsonl" | "ndjson" => Format::Jsonl,
            "md" | "markdown" => Format::Markdown,
            _ => Format::Text,
        }
    }
}

/// True for what no one would call text: NUL bytes, or over a tenth of control characters and broken UTF-8 in the first 8 KiB.
pub fn looks_binary(bytes: &[u8]) -> bool {
    let sample = &bytes[..bytes.len().min(8192)];
    let control = |b: &&u8| **b < b' ' && !b"\t\n\r\x08\x0c\x1b".contains(b);
    let broken: usize = sample.utf8_chunks().map(|chunk| chunk.invalid().len()).sum();
    sample.starts_with(b"%PDF-")
        || sample.contains(&0)
        || (sample.iter().filter(control).count() + broken) * 10 > sample.len()
}

/// Of JSONL, every line that is not blank is a passage, for `parse_jsonl_line`.
pub fn split(format: Format, source: &str, content: &str) -> Vec<Passage> {
    let content = content.strip_prefix('\u{feff}').unwrap_or(content);
    let lines = lines_of(content);
    let sections = match format {
        Format::Jsonl => {
            let passage = |(i, line): (usize, &Line)| Passage {
                text: line.text.trim().into(),
                source: source.into(),
                heading: String::new(),
                line: i + 1,
            };
            return lines.iter().enumerate().filter(|(_, line)| !line.is_blank()).map(passage).collect();
        }
        Format::Markdown => markdown::sections(content, &lines),
        Format::Text => vec![Section { heading: String::new(), blocks: paragraphs(&lines) }],
    };
    let mut passages = Vec::new();
    for section in sections {
        for piece in pack(section.blocks.iter().flat_map(|block| pieces(content, block))) {
            passages.push(Passage {
                text: piece.text,
                source: source.into(),
                heading: section.heading.clone(),
                line: lines.partition_point(|line| line.start <= piece.start),
            });
        }
    }
    passages
}

// ---- Blocks ----

#[derive(Clone, Copy)]
struct Line<'a> {
    /// Byte offset in the content.
    start: usize,
    text: &'a str,
}

impl Line<'_> {
    fn indent(&self) -> usize {
        self.text.len() - self.text.trim_start_matches([' ', '\t']).len()
    }
    fn end(&self) -> usize {
        self.start + self.text.len()
    }
    fn is_blank(&self) -> bool {
        self.text.trim().is_empty()
    }
}

fn lines_of(content: &str) -> Vec<Line<'_>> {
    let offset = |text: &str| text.as_ptr() as usize - content.as_ptr() as usize;
    content.lines().map(|text| Line { start: offset(text), text }).collect()
}

struct Section {
    heading: String,
    blocks: Vec<Block>,
}

/// A stretch of the content, from `start` to `end` in bytes.
struct Block {
    start: usize,
    end: usize,
    seam: Seam,
    /// Wrapped prose, whose line ends mean nothing.
    flow: bool,
    /// White space before each line that belongs to the block as a whole.
    indent: usize,
}

/// Where a block may be divided, from coarse to fine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seam {
    Items,
    Lines,
    Sentences,
    Words,
}

impl Block {
    fn new(lines: &[Line], seam: Seam) -> Option<Block> {
        let (first, last) = (lines.first()?, lines.last()?);
        let indent = lines.iter().filter(|line| !line.is_blank()).map(Line::indent).min().unwrap_or(0);
        let flow = seam == Seam::Sentences && is_flow(lines);
        let seam = if seam == Seam::Sentences && !flow { Seam::Lines } else { seam };
        Some(Block { start: first.start, end: last.end(), seam, flow, indent })
    }
}

/// Wrapped prose has one indent from its second line on, and no line but the last is short. Code, tables, verse and addresses
/// differ.
fn is_flow(lines: &[Line]) -> bool {
    let long = |line: &Line| line.text.trim().chars().count() >= 40;
    match lines {
        [first, second, ..] => {
            lines[1..].iter().all(|line| line.indent() == second.indent())
                && lines[1..lines.len() - 1].iter().all(long)
                && (long(first) || second.indent() > first.indent())
        }
        _ => true,
    }
}

fn paragraphs(lines: &[Line]) -> Vec<Block> {
    lines.split(Line::is_blank).filter_map(|lines| Block::new(lines, Seam::Sentences)).collect()
}

/// The length of the mark of a list item at the start of a line, its space included: `- `, `* `, `+ `, `• `, `12. `, `12) `.
fn item_mark(text: &str) -> Option<usize> {
    let text = text.trim_start();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let mark = match text[digits..].chars().next()? {
        '-' | '*' | '+' | '•' if digits == 0 => text.chars().next()?.len_utf8(),
        '.' | ')' if (1..=4).contains(&digits) => digits + 1,
        _ => return None,
    };
    text[mark..].starts_with([' ', '\t']).then_some(mark + 1)
}

// ---- Pieces ----

#[derive(Debug)]
struct Piece {
    start: usize,
    text: String,
    chars: usize,
    /// What stood between the piece before and this one.
    glue: &'static str,
}

/// A block as one piece, or as several if it is too long. Prose is held to the target, what has a form of its own to the limit.
fn pieces(content: &str, block: &Block) -> Vec<Piece> {
    let limit = if block.flow { TARGET_MAX } else { HARD_MAX };
    let mut pieces = Vec::new();
    divide(content, block, block.start..block.end, None, limit, &mut pieces);
    let mut pieces = pack(pieces);
    if let Some(first) = pieces.first_mut() {
        first.glue = "\n\n";
    }
    pieces
}

/// Adds the range whole if it is within the limit, else divided at the next finer seam (`None`: not divided yet).
fn divide(
    content: &str,
    block: &Block,
    range: Range<usize>,
    seam: Option<Seam>,
    limit: usize,
    into: &mut Vec<Piece>,
) {
    let raw = &content[range.clone()];
    let text = render(raw, block.flow, block.indent);
    let chars = text.chars().count();
    if chars == 0 {
        return;
    }
    if chars <= limit {
        let before = &content[block.start..range.start];
        let gap = &before[before.trim_end().len()..];
        let new_line = gap.contains('\n') && (!block.flow || item_mark(raw).is_some());
        let glue = if new_line {
            "\n"
        } else if gap.is_empty() {
            ""
        } else {
            " "
        };
        into.push(Piece { start: range.start, text, chars, glue });
        return;
    }
    let seam = match seam {
        None => block.seam,
        Some(Seam::Items) => Seam::Lines,
        Some(Seam::Lines) => Seam::Sentences,
        Some(Seam::Sentences | Seam::Words) => Seam::Words,
    };
    let mut start = range.start;
    for end in seams(raw, seam, block.indent).into_iter().map(|end| range.start + end).chain([range.end]) {
        let part = &content[start..end];
        let space = part.len() - part.trim_start().len();
        // The indent of a line in code stays; the rest of the space between two parts is the glue's.
        let keep = match part[..space].rfind('\n') {
            _ if block.flow => space,
            Some(line_end) => line_end + 1,
            None if content[..start].ends_with('\n') || start == block.start => 0,
            None => space,
        };
        let limit = if seam == Seam::Words { usize::MAX } else { HARD_MAX };
        divide(content, block, start + keep..end, Some(seam), limit, into);
        start = end;
    }
}

/// Byte offsets at which the text may be divided, ascending, neither end included.
fn seams(raw: &str, seam: Seam, indent: usize) -> Vec<usize> {
    let line_starts = || raw.match_indices('\n').map(|(at, _)| at + 1).filter(|at| *at < raw.len());
    match seam {
        Seam::Lines => line_starts().collect(),
        Seam::Items => {
            let own_indent = |at: &usize| raw[*at..].len() - raw[*at..].trim_start_matches([' ', '\t']).len();
            line_starts().filter(|at| item_mark(&raw[*at..]).is_some() && own_indent(at) <= indent).collect()
        }
        Seam::Sentences => sentence_ends(raw),
        Seam::Words => word_ends(raw),
    }
}

/// Offsets after `.`, `!`, `?` or `…` with its closing quotes, where white space and then no small letter follows, and after the full
/// stops of Chinese and Japanese. The stop of an abbreviation or of an initial is none.
fn sentence_ends(raw: &str) -> Vec<usize> {
    const ABBREVIATIONS: [&str; 18] = [
        "e.g", "i.e", "cf", "vs", "mr", "mrs", "ms", "dr", "prof", "st", "no", "fig", "vol", "approx",
        "dept", "sec", "pp", "viz",
    ];
    let mut ends = Vec::new();
    for (at, stop) in
        raw.char_indices().filter(|(_, c)| matches!(c, '.' | '!' | '?' | '…' | '。' | '！' | '？'))
    {
        let rest = raw[at + stop.len_utf8()..]
            .trim_start_matches(['"', '\'', ')', ']', '”', '’', '»', '*', '_', '」', '』']);
        let end = raw.len() - rest.len();
        let wide = matches!(stop, '。' | '！' | '？');
        let begins = rest
            .trim_start()
            .chars()
            .next()
            .is_some_and(|c| !c.is_lowercase() && !matches!(c, '.' | '!' | '?' | '…'));
        let spaced = rest.starts_with(char::is_whitespace);
        let word = raw[..at].rsplit([' ', '\t', '\n', '(', '[', '"', '“']).next().unwrap_or_default();
        let before = raw[..at - word.len()].trim_end_matches([' ', '\t']);
        let opens_line = before.is_empty() || before.ends_with('\n');
        let short = stop == '.'
            && (word.chars().count() == 1 && word.chars().all(char::is_alphabetic)
                || opens_line && word.bytes().all(|b| b.is_ascii_digit()) // the mark of an item
                || ABBREVIATIONS.contains(&word.to_lowercase().as_str()));
        if end < raw.len() && (wide || spaced && begins && !short) {
            ends.push(end);
        }
    }
    ends.dedup();
    ends
}

/// Offsets at most [`TARGET_MAX`] characters apart, at white space where there is any.
fn word_ends(raw: &str) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut start = 0;
    while let Some((length, _)) = raw[start..].char_indices().nth(TARGET_MAX) {
        let reach = &raw[start..start + length];
        let spaced =
            reach.char_indices().rev().find(|(at, c)| *at > 0 && c.is_whitespace()).map(|(at, _)| at);
        start += spaced.unwrap_or(length);
        ends.push(start);
    }
    ends
}

/// Joins neighbours up to the target. One that is still short takes in its neighbour up to the limit.
fn pack(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut packed: Vec<Piece> = Vec::new();
    let join = |left: &mut Piece, right: Piece| {
        left.text += right.glue;
        left.text += &right.text;
        left.chars += right.glue.len() + right.chars;
    };
    for piece in pieces {
        match packed.last_mut() {
            Some(last) if last.chars + piece.glue.len() + piece.chars <= room(last) => join(last, piece),
            _ => packed.push(piece),
        }
    }
    if let Some(last) = packed.pop_if(|last| last.chars < TARGET_MIN) {
        match packed.last_mut() {
            Some(before) if before.chars + last.glue.len() + last.chars <= TARGET_MAX + TARGET_MIN => {
                join(before, last)
            }
            _ => packed.push(last),
        }
    }
    packed
}

fn room(piece: &Piece) -> usize {
    if piece.chars < TARGET_MIN { HARD_MAX } else { TARGET_MAX }
}

/// What a reader sees: wrapped prose on one line, anything else as it stands without the indent of the whole.
fn render(raw: &str, flow: bool, indent: usize) -> String {
    let mut text = String::with_capacity(raw.len());
    if !flow {
        for line in raw.lines() {
            let own = line.len() - line.trim_start_matches([' ', '\t']).len();
            text += line[own.min(indent)..].trim_end();
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        return text;
    }
    for line in raw.lines() {
        for (i, word) in line.split_whitespace().enumerate() {
            text += match i {
                _ if text.is_empty() => "",
                0 if begins_item(line, &text) => "\n",
                0 if is_hyphenated(&text, word) => "",
                _ => " ",
            };
            text += word;
        }
    }
    text
}

/// A wrapped sentence may happen to break before a number and a stop: that is an item only after a sentence.
fn begins_item(line: &str, before: &str) -> bool {
    let number = line.trim_start().starts_with(|c: char| c.is_ascii_digit());
    item_mark(line).is_some() && (!number || before.ends_with(['.', ':', ';', '!', '?', ',']))
}

/// Whether a word goes on in the next line. The hyphen stays, as it may be the word's own.
fn is_hyphenated(text: &str, next: &str) -> bool {
    let mut back = text.chars().rev();
    matches!(back.next(), Some('-' | '\u{2010}' | '\u{ad}'))
        && back.next().is_some_and(char::is_alphabetic)
        && next.starts_with(char::is_lowercase)
}

#[cfg(test)]
mod tests;
