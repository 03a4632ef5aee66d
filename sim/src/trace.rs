//! What happened: log lines for a person, and in simulation a hash for a machine.
//!
//! [`crate::info!`], [`crate::warn!`], [`crate::error!`] write one line each. In production they go to stderr with the time,
//! filtered by `LOCI_LOG` (`error`, `warn`, `info`, `debug`; default `info`). In simulation they become lines of the trace, stamped
//! with virtual time and node, and part of the hash together with all message bytes, disk operations and the generator's state.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

/// Writes one line; called through the macros.
pub fn log(level: Level, line: fmt::Arguments<'_>) {
    #[cfg(madsim)]
    if crate::world::is_here() {
        crate::world::log(level, &line.to_string());
    } else {
        // A plain test on this build.
        eprintln!("{level:?} {line}");
    }
    #[cfg(not(madsim))]
    {
        use std::sync::OnceLock;
        static MAX: OnceLock<Level> = OnceLock::new();
        let max = *MAX.get_or_init(|| match std::env::var("LOCI_LOG").as_deref() {
            Ok("error") => Level::Error,
            Ok("warn") => Level::Warn,
            Ok("debug") => Level::Debug,
            _ => Level::Info,
        });
        if level <= max {
            let ms = crate::time::calendar_ms();
            let (h, m, s) = (ms / 3_600_000 % 24, ms / 60_000 % 60, ms / 1000 % 60);
            let name = format!("{level:?}").to_uppercase();
            eprintln!("{h:02}:{m:02}:{s:02}.{:03}Z {name:5} {line}", ms % 1000);
        }
    }
}

#[macro_export]
macro_rules! error { ($($arg:tt)*) => { $crate::trace::log($crate::trace::Level::Error, format_args!($($arg)*)) }; }
#[macro_export]
macro_rules! warn { ($($arg:tt)*) => { $crate::trace::log($crate::trace::Level::Warn, format_args!($($arg)*)) }; }
#[macro_export]
macro_rules! info { ($($arg:tt)*) => { $crate::trace::log($crate::trace::Level::Info, format_args!($($arg)*)) }; }
#[macro_export]
macro_rules! debug { ($($arg:tt)*) => { $crate::trace::log($crate::trace::Level::Debug, format_args!($($arg)*)) }; }

/// What a node thinks of itself, such as its term: kept in a simulated run's trace, to be drawn as a line over time. Nothing in production.
pub fn gauge(name: &'static str, value: u64) {
    #[cfg(madsim)]
    if crate::world::is_here() {
        crate::world::gauge(name, value);
    }
    #[cfg(not(madsim))]
    let _ = (name, value);
}

/// By path and node.
static PROBES: Mutex<BTreeMap<(&'static str, usize), u64>> = Mutex::new(BTreeMap::new());

/// Counts that a rare path was taken. A path that no run takes is a hole in the tests.
pub fn probe(path: &'static str) {
    *PROBES.lock().unwrap_or_else(|p| p.into_inner()).entry((path, node())).or_default() += 1;
}

/// The rare paths that this process took, and how often.
pub fn probes() -> BTreeMap<&'static str, u64> {
    let mut paths = BTreeMap::new();
    for ((path, _), times) in probes_by_node() {
        *paths.entry(path).or_default() += times;
    }
    paths
}

/// The same by path and the number of the simulated node that took it; 0 in production.
pub fn probes_by_node() -> BTreeMap<(&'static str, usize), u64> {
    PROBES.lock().unwrap_or_else(|p| p.into_inner()).clone()
}

fn node() -> usize {
    #[cfg(madsim)]
    if crate::world::is_here() {
        return crate::world::current_node();
    }
    0
}

/// A running 64-bit hash of everything fed to it, in order; not cryptographic (multiply and fold, 8 bytes at a time).
#[derive(Clone, Debug)]
pub struct Hash(u64);

impl Default for Hash {
    fn default() -> Hash {
        Hash(0x9e37_79b9_7f4a_7c15)
    }
}

impl Hash {
    pub fn number(&mut self, value: u64) {
        let wide = (self.0 ^ value) as u128 * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = (wide as u64) ^ ((wide >> 64) as u64).rotate_left(23) ^ 0xa076_1d64_78bd_642f;
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        // Long ones in four streams, which need not wait for each other.
        let (blocks, rest) = bytes.as_chunks::<32>();
        if !blocks.is_empty() {
            let mut streams: [Hash; 4] =
                std::array::from_fn(|stream| Hash(self.0.wrapping_add(stream as u64)));
            for block in blocks {
                streams
                    .iter_mut()
                    .zip(block.as_chunks().0)
                    .for_each(|(s, word)| s.number(u64::from_le_bytes(*word)));
            }
            streams.iter().for_each(|stream| self.number(stream.0));
        }
        let (words, rest) = rest.as_chunks();
        words.iter().for_each(|word| self.number(u64::from_le_bytes(*word)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.number(u64::from_le_bytes(last));
        self.number(bytes.len() as u64);
    }

    pub fn value(&self) -> u64 {
        self.0
    }
}
