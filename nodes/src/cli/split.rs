//! From a file to passages that are worth remembering one by one: 300 to 700 characters where the text allows, never over 1,500.
//!
//! A file becomes blocks (a paragraph, a list, a code fence), under Markdown also sections. A block that is too long is divided at
//! the coarsest seam that helps: list items, then lines, then sentences, then words, and in a text without any of these between
//! two characters. Neighbours in a section that are too short are joined. Nothing that a person wrote is lost or moved: the
//! passages hold the same visible characters in the same order, without front matter, rulers and the marks of headings, whose
//! words stand in [`Passage::heading`]. Only white space changes: the lines of a wrapped paragraph become one.

use std::path::Path;

/// Sizes of a passage in characters.
pub const TARGET_MIN: usize = 300;
pub const TARGET_MAX: usize = 700;
pub const HARD_MAX: usize = 1500;
/// A longer line is no heading, whatever its marks say.
const HEADING_MAX: usize = 200;

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
    sample.starts_with(b"%PDF-") || sample.contains(&0) || (sample.iter().filter(control).count() + broken) * 10 > sample.len()
}

/// Of JSONL, every line that is not blank is a passage, for `parse_jsonl_line`.
pub fn split(format: Format, source: &str, content: &str) -> Vec<Passage> {
    let content = content.strip_prefix('\u{feff}').unwrap_or(content);
    let lines = lines_of(content);
    let sections = match format {
        Format::Jsonl => {
            let passage = |(i, line): (usize, &Line)| (line.text.trim(), i + 1);
            let filled = lines.iter().enumerate().map(passage).filter(|(text, _)| !text.is_empty());
            let passage =
                |(text, line): (&str, usize)| Passage { text: text.into(), source: source.into(), heading: String::new(), line };
            return filled.map(passage).collect();
        }
        Format::Markdown => markdown(&lines),
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
    let mut start = 0;
    let line = |text: &'_ str| {
        start += text.len();
        start - text.len()
    };
    let starts: Vec<usize> = content.split_inclusive('\n').map(line).collect();
    starts.into_iter().zip(content.lines()).map(|(start, text)| Line { start, text }).collect()
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

// ---- Markdown ----

fn markdown(lines: &[Line]) -> Vec<Section> {
    let mut sections = vec![Section { heading: String::new(), blocks: Vec::new() }];
    let mut path: Vec<(usize, String)> = Vec::new();
    let mut bare: Option<(usize, Block)> = None; // a heading with nothing below it yet, and its level
    let mut at = front_matter(lines);
    while let Some(line) = lines.get(at) {
        let (next, what) = next_block(lines, at);
        let rest = &lines[at..next];
        let last = sections.len() - 1;
        match what {
            What::Skip => {}
            What::Block(seam) => {
                bare = None;
                sections[last].blocks.extend(Block::new(rest, seam));
            }
            What::Heading(level, words) => {
                if let Some((_, block)) = bare.take().filter(|(above, _)| level <= *above) {
                    sections[last].blocks.push(block);
                }
                path.retain(|(above, _)| *above < level);
                path.push((level, words));
                let words: Vec<&str> = path.iter().map(|(_, words)| words.as_str()).collect();
                sections.push(Section { heading: words.join(" > "), blocks: Vec::new() });
                // As text, a heading goes without its marks.
                let body = if line.text.trim_start().starts_with('#') { rest } else { &rest[..rest.len() - 1] };
                bare = Block::new(body, Seam::Sentences).map(|block| (level, block));
                if let Some((_, block)) = bare.as_mut().filter(|_| line.text.trim_start().starts_with('#')) {
                    let words = heading_words(line.text).map_or("", |(_, words)| words);
                    block.start = line.start + (words.as_ptr() as usize - line.text.as_ptr() as usize);
                    block.end = block.start + words.len();
                }
            }
        }
        at = next;
    }
    if let (Some((_, block)), Some(section)) = (bare, sections.last_mut()) {
        section.blocks.push(block);
    }
    sections
}
