//! The trace: its running hash, and its lines.

use crate::trace::{Hash, Level};
use std::collections::VecDeque;
use std::time::Duration;

/// How many lines are kept when not all were asked for.
const LINES_KEPT: usize = 400;

/// One event for a person.
#[derive(Clone, Debug)]
pub struct TraceLine {
    /// Virtual time on nobody's clock.
    pub at: Duration,
    pub node: String,
    pub level: Level,
    pub text: String,
}

pub(super) struct Record {
    pub hash: Hash,
    lines: VecDeque<TraceLine>,
    all: bool,
}

impl Record {
    pub fn new(all: bool) -> Record {
        Record { hash: Hash::default(), lines: VecDeque::new(), all }
    }

    pub fn line(&mut self, at: Duration, node: String, level: Level, text: &str) {
        self.hash.number(at.as_nanos() as u64);
        self.hash.bytes(node.as_bytes());
        self.hash.bytes(text.as_bytes());
        if !self.all && self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(TraceLine { at, node, level, text: text.to_string() });
    }

    pub fn last_lines(&self, count: usize) -> Vec<TraceLine> {
        self.lines.iter().skip(self.lines.len().saturating_sub(count)).cloned().collect()
    }

    pub fn take_lines(&mut self) -> Vec<TraceLine> {
        std::mem::take(&mut self.lines).into()
    }
}
