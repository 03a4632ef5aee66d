//! One operation of a client, as a line of a scenario: `12.340 c3 update 7 expecting again`.
//!
//! When (virtual seconds), which client, what, on which of its tenant's memories; then in any order: `expecting` (the version that the
//! client last saw), `again` (an answered key is sent once more), `gN` (asked at the N-th gateway), `session` (a read at the client's token
//! instead of a strong one), `inbound` (a walk against the edges).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Add {
        key: u64,
    },
    Update {
        key: u64,
    },
    Delete {
        key: u64,
    },
    Get {
        key: u64,
    },
    Search,
    List,
    Link {
        from: u64,
        to: u64,
    },
    Unlink {
        from: u64,
        to: u64,
    },
    Walk {
        key: u64,
    },
    /// Of all that is the person's whom the tenant's erasures are about.
    Erase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Operation {
    pub at_ms: u64,
    pub client: usize,
    pub act: Act,
    pub expecting: bool,
    pub again: bool,
    pub session: bool,
    pub inbound: bool,
    pub gateway: Option<usize>,
}

impl Operation {
    pub fn new(at_ms: u64, client: usize, act: Act) -> Operation {
        let (expecting, again, session, inbound) = Default::default();
        Operation { at_ms, client, act, expecting, again, session, inbound, gateway: None }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} c{} ", self.at_ms / 1000, self.at_ms % 1000, self.client)?;
        match self.act {
            Act::Add { key } => write!(f, "add {key}")?,
            Act::Update { key } => write!(f, "update {key}")?,
            Act::Delete { key } => write!(f, "delete {key}")?,
            Act::Get { key } => write!(f, "get {key}")?,
            Act::Search => write!(f, "search")?,
            Act::List => write!(f, "list")?,
            Act::Link { from, to } => write!(f, "link {from} {to}")?,
            Act::Unlink { from, to } => write!(f, "unlink {from} {to}")?,
            Act::Walk { key } => write!(f, "walk {key}")?,
            Act::Erase => write!(f, "erase")?,
        }
        let flags = [
            (self.expecting, " expecting"),
            (self.again, " again"),
            (self.session, " session"),
            (self.inbound, " inbound"),
        ];
        flags.iter().filter(|(on, _)| *on).try_for_each(|(_, word)| f.write_str(word))?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, " g{gateway}"))
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(line: &str) -> Result<Operation, String> {
        let wrong = |what: &str| format!("operation '{line}': {what}");
        let mut words = line.split_whitespace();
        let mut word = |what: &str| words.next().ok_or_else(|| wrong(what));
        let at_s: f64 =
            word("has no time")?.parse().map_err(|_| wrong("does not begin with a time in seconds"))?;
        if !(0.0..1e6).contains(&at_s) {
            return Err(wrong("its time is not within 0 and 1,000,000 s"));
        }
        let client = word("has no client")?.strip_prefix('c').and_then(|c| c.parse().ok());
        let client = client.filter(|c| *c < CLIENTS_MAX).ok_or_else(|| wrong("a client is c0, c1, …"))?;
        let name = word("says not what to do")?;
        let mut key =
            || word("names no memory").and_then(|k| k.parse().map_err(|_| wrong("a memory is a number")));
        let act = match name {
            "add" => Act::Add { key: key()? },
            "update" => Act::Update { key: key()? },
            "delete" => Act::Delete { key: key()? },
            "get" => Act::Get { key: key()? },
            "search" => Act::Search,
            "list" => Act::List,
            "link" => Act::Link { from: key()?, to: key()? },
            "unlink" => Act::Unlink { from: key()?, to: key()? },
            "walk" => Act::Walk { key: key()? },
            "erase" => Act::Erase,
            _ => {
                return Err(wrong(
                    "unknown; there are add, update, delete, get, search, list, link, unlink, walk, erase",
                ));
            }
        };
        let mut operation = Operation::new((at_s * 1000.0).round() as u64, client, act);
        for flag in words {
            match (flag, flag.strip_prefix('g').and_then(|g| g.parse().ok())) {
                ("expecting", _) => operation.expecting = true,
                ("again", _) => operation.again = true,
                ("session", _) => operation.session = true,
                ("inbound", _) => operation.inbound = true,
                (_, Some(gateway)) => operation.gateway = Some(gateway),
                _ => return Err(wrong(&format!("unknown word '{flag}'"))),
            }
        }
        Ok(operation)
    }
}

/// More clients than this are a mistake.
pub const CLIENTS_MAX: usize = 1000;

impl TryFrom<String> for Operation {
    type Error = String;

    fn try_from(line: String) -> Result<Operation, String> {
        line.parse()
    }
}

impl From<Operation> for String {
    fn from(operation: Operation) -> String {
        operation.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written_and_others_are_refused() {
        for line in [
            "0.000 c0 add 1",
            "12.340 c3 update 7 expecting again",
            "3.000 c1 walk 2 inbound g1",
            "1.500 c2 search",
            "2.000 c2 erase",
        ] {
            assert_eq!(line.parse::<Operation>().map(|o| o.to_string()).as_deref(), Ok(line));
        }
        for line in [
            "",
            "x c0 add 1",
            "1.0 0 add 1",
            "1.0 c0 add",
            "1.0 c0 fly 1",
            "1.0 c0 add 1 soon",
            "-1 c0 list",
            "1 c99999 list",
        ] {
            assert!(line.parse::<Operation>().is_err(), "{line}");
        }
    }
}
