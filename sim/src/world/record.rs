//! The trace: its running hash, its lines, and, where asked for, every event.

use super::NodeIndex;
use crate::trace::{Hash, Level};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How many lines are kept when not all were asked for.
const LINES_KEPT: usize = 400;

/// One line for a person.
#[derive(Clone, Debug)]
pub struct TraceLine {
    /// Virtual time on nobody's clock.
    pub at: Duration,
    pub node: String,
    pub level: Level,
    pub text: String,
}

/// One event, at one node.
#[derive(Clone, Debug)]
pub struct Event {
    pub at_ns: u64,
    pub node: NodeIndex,
    pub what: What,
}

#[derive(Clone, Debug)]
pub enum What {
    Line {
        level: Level,
        text: String,
    },
    /// A message left; when it arrives, or `None` if a cut link holds it up.
    Message {
        to: NodeIndex,
        method: String,
        answer: bool,
        bytes: u64,
        hash: u64,
        arrives_ns: Option<u64>,
    },
    /// `hash` is of the content.
    Disk {
        op: &'static str,
        path: String,
        offset: u64,
        bytes: u64,
        hash: u64,
    },
    /// A node's own figure changed.
    Gauge {
        name: &'static str,
        value: u64,
    },
}

pub(super) struct Record {
    pub hash: Hash,
    lines: VecDeque<TraceLine>,
    all: bool,
    events: Vec<Event>,
    gauges: BTreeMap<(NodeIndex, &'static str), u64>,
}

impl Record {
    pub fn new(all: bool) -> Record {
        Record { hash: Hash::default(), lines: VecDeque::new(), all, events: vec![], gauges: BTreeMap::new() }
    }

    pub fn keeps_all(&self) -> bool {
        self.all
    }

    pub fn line(&mut self, at: Duration, (node, name): (NodeIndex, String), level: Level, text: &str) {
        self.hash.number(at.as_nanos() as u64);
        self.hash.bytes(name.as_bytes());
        self.hash.bytes(text.as_bytes());
        self.event(at, node, || What::Line { level, text: text.to_string() });
        if !self.all && self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(TraceLine { at, node: name, level, text: text.to_string() });
    }

    /// Keeps an event if all are kept. It is no part of the hash, which must not depend on who looks.
    pub fn event(&mut self, at: Duration, node: NodeIndex, what: impl FnOnce() -> What) {
        if self.all {
            self.events.push(Event { at_ns: at.as_nanos() as u64, node, what: what() });
        }
    }

    pub fn gauge(&mut self, at: Duration, node: NodeIndex, name: &'static str, value: u64) {
        if self.all && self.gauges.insert((node, name), value) != Some(value) {
            self.event(at, node, || What::Gauge { name, value });
        }
    }

    pub fn last_lines(&self, count: usize) -> Vec<TraceLine> {
        self.lines.iter().skip(self.lines.len().saturating_sub(count)).cloned().collect()
    }

    pub fn take(&mut self) -> (Vec<TraceLine>, Vec<Event>) {
        (std::mem::take(&mut self.lines).into(), std::mem::take(&mut self.events))
    }
}
