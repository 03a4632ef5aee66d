//! Markdown as sections of blocks: enough of CommonMark to tell headings, lists, fences, tables and paragraphs apart. What it takes
//! for a paragraph by mistake is not lost, only wrapped otherwise.

use super::{Block, Line, Seam, Section, item_mark, render};
use std::ops::Range;

/// A heading longer than this, in bytes, is a paragraph, whatever its marks say.
const HEADING_MAX: usize = 200;

enum Found {
    /// A blank line or a ruler.
    Nothing,
    Block(Seam),
    /// Its level, and where its words stand in the content.
    Heading(usize, Range<usize>),
}

pub(super) fn sections(content: &str, lines: &[Line]) -> Vec<Section> {
    let mut sections = Vec::new();
    let mut section = Section { heading: String::new(), blocks: Vec::new() };
    let mut path: Vec<(usize, String)> = Vec::new();
    // A heading with nothing below it yet. If that stays so, its words are a block: they would be nowhere else.
    let mut bare: Option<(usize, Block)> = None;
    let mut at = front_matter(lines);
    while at < lines.len() {
        let (next, found) = next_block(lines, at);
        match found {
            Found::Nothing => {}
            Found::Block(seam) => {
                bare = None;
                section.blocks.extend(Block::new(&lines[at..next], seam));
            }
            Found::Heading(level, words) => {
                section
                    .blocks
                    .extend(bare.take().filter(|(above, _)| level <= *above).map(|(_, block)| block));
                path.retain(|(above, _)| *above < level);
                path.push((level, render(&content[words.clone()], true, 0)));
                let heading: Vec<&str> =
                    path.iter().map(|(_, words)| words.as_str()).filter(|w| !w.is_empty()).collect();
                sections.push(section);
                section = Section { heading: heading.join(" > "), blocks: Vec::new() };
                let block = Block {
                    start: words.start,
                    end: words.end,
                    seam: Seam::Sentences,
                    flow: true,
                    indent: 0,
                };
                bare = Some((level, block));
            }
        }
        at = next;
    }
    section.blocks.extend(bare.map(|(_, block)| block));
    sections.push(section);
    sections
}

/// The first line after YAML (`---`) or TOML (`+++`) front matter. One that is never closed is text.
fn front_matter(lines: &[Line]) -> usize {
    let Some(open @ ("---" | "+++")) = lines.first().map(|line| line.text.trim_end()) else { return 0 };
    let closes =
        |line: &Line| line.text.trim_end() == open || (open == "---" && line.text.trim_end() == "...");
    lines.iter().skip(1).position(closes).map_or(0, |inner| inner + 2)
}

/// What begins at a line, and the line after it.
fn next_block(lines: &[Line], at: usize) -> (usize, Found) {
    let line = lines[at];
    if line.is_blank() || is_ruler(line) {
        return (at + 1, Found::Nothing);
    }
    if let Some((level, words)) = atx_heading(line) {
        return (at + 1, Found::Heading(level, words));
    }
    if let Some(fence) = fence(line).filter(|_| line.indent() < 4) {
        let closes = |l: &Line| {
            l.text.trim().starts_with(fence) && l.text.trim().trim_start_matches(&fence[..1]).is_empty()
        };
        let inner = lines[at + 1..].iter().position(closes);
        return (inner.map_or(lines.len(), |inner| at + inner + 2), Found::Block(Seam::Lines));
    }
    if item_mark(line.text).is_some() {
        return (list_end(lines, at), Found::Block(Seam::Items));
    }
    let mut next = at + 1;
    while let Some(line) = lines.get(next).filter(|line| !line.is_blank()) {
        if let Some(level) = setext_level(line) {
            let words = lines[at].start + lines[at].indent()..lines[next - 1].end();
            if lines[at].indent() < 4 && words.len() <= HEADING_MAX {
                return (next + 1, Found::Heading(level, words));
            }
        }
        if atx_heading(*line).is_some() || fence(*line).is_some() || is_ruler(*line) || interrupts(line.text)
        {
            break;
        }
        next += 1;
    }
    let text = line.text.trim_start();
    let link = text.starts_with('[') && text.contains("]: ");
    let verbatim = line.indent() >= 4 || text.starts_with(['|', '>']) || link;
    (next, Found::Block(if verbatim { Seam::Lines } else { Seam::Sentences }))
}

/// A list goes on over blank lines as long as items or indented lines follow.
fn list_end(lines: &[Line], at: usize) -> usize {
    let mut end = at + 1;
    for (next, line) in lines.iter().enumerate().skip(at + 1).filter(|(_, line)| !line.is_blank()) {
        let outside = line.indent() == 0 && item_mark(line.text).is_none();
        let parted = end < next || atx_heading(*line).is_some() || fence(*line).is_some();
        if outside && parted || is_ruler(*line) {
            break;
        }
        end = next + 1;
    }
    end
}

/// An item ends a paragraph before it, but a wrapped sentence may begin with a number: only the first number does.
fn interrupts(text: &str) -> bool {
    item_mark(text).is_some()
        && (!text.trim_start().starts_with(|c: char| c.is_ascii_digit())
            || text.trim_start().starts_with("1"))
}

fn atx_heading(line: Line) -> Option<(usize, Range<usize>)> {
    let marked = line.text.trim();
    let words = marked.trim_start_matches('#');
    let level = marked.len() - words.len();
    let is_heading = (1..=6).contains(&level) && line.indent() < 4 && marked.len() <= HEADING_MAX;
    if !is_heading || !(words.is_empty() || words.starts_with([' ', '\t'])) {
        return None;
    }
    let start = line.start + line.indent() + level;
    let bare = words.trim_end_matches('#');
    let words = if bare.ends_with([' ', '\t']) { bare } else { words }; // `# C#` keeps its sharp
    Some((level, start..start + words.len()))
}

fn setext_level(line: &Line) -> Option<usize> {
    let text = line.text.trim();
    let all = |mark: char| text.len() >= 2 && line.indent() < 4 && text.chars().all(|c| c == mark);
    if all('=') { Some(1) } else { all('-').then_some(2) }
}

/// The opening mark of a code fence: three or more backticks or tildes.
fn fence<'a>(line: Line<'a>) -> Option<&'a str> {
    let text = line.text.trim_start();
    ['`', '~'].into_iter().find_map(|mark| {
        let length = text.bytes().take_while(|b| *b == mark as u8).count();
        (length >= 3 && !(mark == '`' && text[length..].contains('`'))).then_some(&text[..length])
    })
}

fn is_ruler(line: Line) -> bool {
    let ruler = |mark: char| {
        let count = line.text.chars().filter(|c| *c == mark).count();
        count >= 3 && line.text.chars().all(|c| c == mark || c == ' ' || c == '\t')
    };
    line.indent() < 4 && ['-', '*', '_'].into_iter().any(ruler)
}
