//! A run's events as lines of a file, and where two runs part.

use super::run::Run;
use super::runner::{Job, child};
use sim::trace::Level;
use sim::world::{Event, What};
use std::io::{BufRead, BufReader, BufWriter, Write};

/// Lines shown before the first one that differs, and after it.
const BEFORE: usize = 12;
const AFTER: usize = 6;

/// One event as a person reads it, in columns: time, node, kind, what.
pub fn line(event: &Event, nodes: &[String]) -> String {
    let name = |node: usize| nodes.get(node).map_or("?", String::as_str);
    let (kind, text) = match &event.what {
        What::Line { level: Level::Error, text } => ("error", text.clone()),
        What::Line { level: Level::Warn, text } => ("warn", text.clone()),
        What::Line { level: Level::Info, text } => ("info", text.clone()),
        What::Line { level: Level::Debug, text } => ("debug", text.clone()),
        What::Message { to, method, answer, bytes, hash, arrives_ns } => {
            let method = method.rsplit('/').next().unwrap_or(method);
            let what = if *answer { "answer to " } else { "" };
            let takes = match arrives_ns {
                Some(at) => format!("{:.3} ms", at.saturating_sub(event.at_ns) as f64 / 1e6),
                None => "held up: the link is cut".into(),
            };
            ("message", format!("-> {:8} {what}{method}, {bytes} B, {takes}, content {hash:016x}", name(*to)))
        }
        What::Disk { op, path, offset, bytes, hash } => {
            ("disk", format!("{op} {path} at {offset}, {bytes} B, content {hash:016x}"))
        }
        What::Gauge { name, value } => ("gauge", format!("{name} = {value}")),
    };
    format!("{:12.6} s  {:9} {kind:8} {text}", event.at_ns as f64 / 1e9, name(event.node))
}

/// Writes all events of a run.
pub fn write(run: &Run, path: &str) -> std::io::Result<()> {
    let mut file = BufWriter::new(std::fs::File::create(path)?);
    run.events.iter().try_for_each(|event| writeln!(file, "{}", line(event, &run.nodes)))?;
    file.flush()
}

/// Where two files of events part: the number of the first line that differs (from 0), and it with its context, for a person. `None` if they
/// are equal.
pub fn difference(first: &str, second: &str) -> std::io::Result<Option<(usize, String)>> {
    let mut sides = [first, second].map(|path| std::fs::File::open(path).map(|f| BufReader::new(f).lines()));
    let mut next = |side: usize| -> std::io::Result<Option<String>> {
        match &mut sides[side] {
            Ok(lines) => lines.next().transpose(),
            Err(error) => Err(std::io::Error::new(error.kind(), error.to_string())),
        }
    };
    let mut before = std::collections::VecDeque::new();
    for number in 0.. {
        let (one, other) = (next(0)?, next(1)?);
        if one == other {
            let Some(line) = one else { return Ok(None) };
            if before.len() == BEFORE {
                before.pop_front();
            }
            before.push_back(line);
            continue;
        }
        let mut text: String = before.iter().map(|line| format!("    {line}\n")).collect();
        for (side, mark, mut line) in [(0, '<', one), (1, '>', other)] {
            for _ in 0..AFTER {
                let Some(here) = line else {
                    text.push_str(&format!("  {mark} (nothing more)\n"));
                    break;
                };
                text.push_str(&format!("  {mark} {here}\n"));
                line = next(side)?;
            }
        }
        return Ok(Some((number, text)));
    }
    Ok(None)
}

/// Runs two jobs and says where they part.
pub fn compare(first: &Job, second: &Job) -> Result<Option<(usize, String)>, String> {
    let file = |side: usize| std::env::temp_dir().join(format!("loci-events-{}-{side}", std::process::id()));
    let paths = [file(0), file(1)].map(|path| path.to_string_lossy().into_owned());
    child(first, Some(&paths[0]));
    child(second, Some(&paths[1]));
    let found =
        difference(&paths[0], &paths[1]).map_err(|e| format!("events of {first:?} and {second:?}: {e}"));
    paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_shown_with_those_before_it() -> std::io::Result<()> {
        let dir = std::env::temp_dir();
        let path = |name: &str| {
            dir.join(format!("loci-{name}-{}", std::process::id())).to_string_lossy().into_owned()
        };
        let (one, other) = (path("one"), path("other"));
        std::fs::write(&one, "a\nb\nc\nd\n")?;
        std::fs::write(&other, "a\nb\nx\n")?;
        let found = difference(&one, &other)?;
        let same = difference(&one, &one)?;
        std::fs::remove_file(one)?;
        std::fs::remove_file(other)?;
        assert_eq!(
            found,
            Some((2, "    a\n    b\n  < c\n  < d\n  < (nothing more)\n  > x\n  > (nothing more)\n".into()))
        );
        assert_eq!(same, None);
        Ok(())
    }
}
