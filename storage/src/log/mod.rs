//! The ledger's storage: an append-only log in segments.
//!
//! # On disk
//!
//! A directory of segments `NNNNNNNNNNNNNNNNNNNN.log`, named by the index of their first entry; of facts ([`crate::facts`]): the base up
//! to which entries are purged, the repair under way, and the ledger's own; and `synced.mark` ([`mark`]). `FORMAT.md` has every byte. An
//! entry is `length: u32, crc32c: u32, index: u64, durable: u64, payload`; `durable` is the last index known to be on the platter when
//! the entry was written.
//!
//! # What can go wrong, and why it is survivable
//!
//! - **Power loss.** What was appended after the last [`Log::sync`] may be lost or torn, in any order. Opening reads entries until one
//!   is bad and cuts the rest: nothing behind it was acknowledged.
//! - **Corruption** looks the same, a bad entry, but must not be cut in silence. It is told apart by the mark, by a good entry behind it
//!   whose `durable` covers it, and by a later segment, which is only begun when all before it is durable. [`Log::open`] then fails and says
//!   where. [`Log::open_or_cut`] gives up the log from there on and remembers that ([`Log::repair`]): such a replica has forgotten
//!   what it acknowledged, and must not vote until a confirmed leader has given everything back. Left is damage to entries that were synced
//!   in the last moment before a power loss that also took the mark: that looks like a torn tail; their replicas hold them.
//!   Sectors that cannot be read are read as zeroes. Where that is what they held, the entries are sound, and their segment is written anew.
//!   `durable` never covers an entry that was purged before it was synced: that one may rightly be missing.
//! - **What was truncated coming back.** The cut is synced before [`Log::truncate_from`] returns, so that no old entry lies
//!   behind what is appended there next.
//! - **A half-done truncation or purge.** Segments go one by one, each removal made durable before the next,
//!   from the end (truncation) or from the start (purge), so what is left has no hole.
//! - **A failed sync.** What it covered is in an unknown state, and a later sync that succeeds proves nothing: the log refuses everything
//!   from then on and leaves the file `rewrite`, by which the next opening writes the last segment anew instead of trusting it.
//!
//! # Purged is not gone
//!
//! Purging moves the base; the segments below it stay until [`Log::release_to`], for a view that was restored from a snapshot and replays
//! the log from there ([`Log::replay`]).

mod mark;
mod recover;
mod segment;
#[cfg(test)]
mod tests;

use segment::Segment;
use sim::disk::Disk;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::codec;
use crate::facts::{self, FACT_BYTES_MAX, FactError};
use bincode::{Decode, Encode};
use mark::Mark;
pub use mark::parse as parse_mark;
pub use segment::{
    ENTRY_HEAD, HEAD_BYTES, MAGIC, number, parse_entry, parse_segment_head, read_up_to, read_what_can_be_read,
};

/// Largest payload of one entry, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = codec::VALUE_BYTES_MAX;
/// The fact that says up to which index entries were purged.
const BASE: &str = "base";
/// The fact that says that the log was cut where it was damaged.
const REPAIR: &str = "repair";

/// The file that says that a sync of the last segment failed.
const REWRITE: &str = "rewrite";

/// Entries `from..=to` (at least) were durable here and are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Repair {
    pub from: u64,
    pub to: u64,
}

#[derive(Clone, Debug)]
pub struct LogOptions {
    /// A segment is closed when it is at least this large.
    pub segment_bytes_max: u64,
    /// Payloads kept in memory, newest first.
    pub cache_bytes_max: usize,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions { segment_bytes_max: 64 << 20, cache_bytes_max: 32 << 20 }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("log {what}: {cause}; check the disk's space and health")]
    Io { what: String, cause: io::Error },
    #[error(
        "log {file} is damaged at byte {offset} ({problem}), though it was durable; restore this replica from its peers"
    )]
    Corrupt { file: String, offset: u64, problem: String },
    #[error("log {file} has format {version}, this build reads {}; start the build that wrote it", MAGIC[7] as char)]
    Version { file: String, version: char },
    #[error("log fact {name}: {cause}; restore this replica from its peers")]
    Fact { name: String, cause: FactError },
    #[error("log {what} of {bytes} bytes is too large; at most {bytes_max}")]
    TooLarge { what: String, bytes: usize, bytes_max: usize },
    #[error("log append starts at {got}, but the next index is {expected}")]
    Order { expected: u64, got: u64 },
    #[error("log entry {index} is not there (it holds {first}..={last})")]
    Missing { index: u64, first: u64, last: u64 },
    #[error(
        "an earlier write or sync of the log failed, so its state on disk is unknown; restart this process"
    )]
    Poisoned,
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> LogError {
    move |cause| LogError::Io { what: what.into(), cause }
}

/// Entries by index.
pub type Entries = Vec<(u64, Arc<[u8]>)>;

/// Takes entries one by one.
pub type Give<'a, E> = dyn FnMut(u64, &[u8]) -> Result<(), E> + 'a;

/// An append-only log of entries with consecutive indexes. All methods block.
pub struct Log {
    disk: Arc<dyn Disk>,
    dir: String,
    options: LogOptions,
    state: Mutex<State>,
    synced: Condvar,
    /// Held during a sync, truncation or purge, which exclude each other but not appends.
    settling: Mutex<()>,
    /// Held while a fact is written: each has one temporary file.
    writing_fact: Mutex<()>,
    /// There once the log is open.
    mark: Mutex<Option<Mark>>,
}

/// A segment below the base.
struct Kept {
    first: u64,
    /// Index behind its last entry.
    end: u64,
    name: String,
    bytes: u64,
}

struct State {
    segments: Vec<Segment>,
    kept: Vec<Kept>,
    /// Entries up to this index are gone.
    base: u64,
    last: u64,
    durable: u64,
    /// The newest payloads; the last one is that of `last`.
    cache: VecDeque<Arc<[u8]>>,
    cache_bytes: usize,
    poisoned: bool,
    /// Somebody syncs; whoever waits for it is told.
    syncing: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Log {
    /// Opens the log in `dir`, creating it if there is none, and cuts what a power loss tore. Fails if it is damaged.
    pub fn open(disk: Arc<dyn Disk>, dir: &str, options: LogOptions) -> Result<Log, LogError> {
        Log::open_with(disk, dir, options, false)
    }

    /// As [`Log::open`], but gives up what lies behind the first damaged entry; [`Log::repair`] then says so.
    pub fn open_or_cut(disk: Arc<dyn Disk>, dir: &str, options: LogOptions) -> Result<Log, LogError> {
        Log::open_with(disk, dir, options, true)
    }

    fn open_with(disk: Arc<dyn Disk>, dir: &str, options: LogOptions, cut: bool) -> Result<Log, LogError> {
        disk.create_dir_all(dir).map_err(io_error(format!("directory {dir}")))?;
        let state = State {
            segments: vec![],
            kept: vec![],
            base: 0,
            last: 0,
            durable: 0,
            cache: VecDeque::new(),
            cache_bytes: 0,
            poisoned: false,
            syncing: false,
        };
        let (state, dir) = (Mutex::new(state), dir.into());
        let (synced, settling, writing_fact, mark) = Default::default();
        let log = Log { disk, dir, options, state, synced, settling, writing_fact, mark };
        log.recover(cut)?;
        Ok(log)
    }

    /// What was lost to damage and is not yet known to be back.
    pub fn repair(&self) -> Result<Option<Repair>, LogError> {
        let fact = self.get_meta(REPAIR)?;
        let damaged = |cause| LogError::Fact { name: REPAIR.into(), cause: FactError::Damaged(cause) };
        fact.map(|bytes| codec::decode(&bytes).map_err(damaged)).transpose()
    }

    /// Remembers that entries were here, at least up to `to`, which are no more: this replica must not vote.
    pub fn begin_repair(&self, to: u64) -> Result<(), LogError> {
        let to = self.repair()?.map_or(to, |repair| repair.to.max(to));
        self.put_meta(REPAIR, &codec::encode(&Repair { from: 1, to }))
    }

    /// Says that everything a peer could have relied on is here again.
    pub fn end_repair(&self) -> Result<(), LogError> {
        self.remove_meta(REPAIR)
    }

    /// Forgets all entries, as if this replica had never had any, and remembers that it had: it must not vote.
    pub fn start_over(&self) -> Result<(), LogError> {
        self.begin_repair(self.last_index())?;
        let _settling = lock(&self.settling);
        let mut state = self.live()?;
        let result = (|| {
            self.marked(|mark| mark.reset(0))?;
            while let Some(segment) = state.segments.pop() {
                self.remove(&segment.name)?;
            }
            while let Some(kept) = state.kept.pop() {
                self.remove(&kept.name)?;
            }
            facts::remove(&*self.disk, &self.dir, BASE)
        })();
        if let Err(cause) = result {
            state.poisoned = true;
            return Err(LogError::Io { what: "start over".into(), cause });
        }
        (state.base, state.last, state.durable, state.cache_bytes) = (0, 0, 0, 0);
        state.cache.clear();
        Ok(())
    }

    fn marked<T>(&self, work: impl FnOnce(&mut Mark) -> io::Result<T>) -> io::Result<T> {
        match &mut *lock(&self.mark) {
            Some(mark) => work(mark),
            None => Err(io::Error::other("the log is not open")),
        }
    }

    /// Makes the mark durable: called when the log has nothing else to do.
    pub fn settle(&self) -> Result<(), LogError> {
        let _settling = lock(&self.settling);
        drop(self.live()?);
        self.marked(Mark::sync).map_err(|cause| {
            lock(&self.state).poisoned = true;
            LogError::Io { what: "mark".into(), cause }
        })
    }

    /// Index of the first entry that is, or would be, here.
    pub fn first_index(&self) -> u64 {
        lock(&self.state).base + 1
    }

    /// From here on all entries up to the last one are on the disk, those below the base too, though only [`Log::replay`] gives them.
    pub fn kept_from(&self) -> u64 {
        let state = lock(&self.state);
        let live = state.segments.first().map_or(state.base + 1, |segment| segment.first);
        let from =
            state.kept.iter().rev().fold(live, |from, kept| if kept.end == from { kept.first } else { from });
        from.min(state.base + 1)
    }

    /// Index of the last entry; that before [`Log::first_index`] if there is none.
    pub fn last_index(&self) -> u64 {
        lock(&self.state).last
    }

    /// Appends entries; they can be read at once, and are durable after [`Log::sync`].
    pub fn append(&self, entries: &[(u64, &[u8])]) -> Result<(), LogError> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut state = self.live()?;
        while state
            .segments
            .last()
            .is_none_or(|s| s.end() > s.first && s.len >= self.options.segment_bytes_max)
        {
            // A later segment proves that everything before it is durable.
            if state.last > state.durable {
                drop(state);
                self.sync()?;
                state = self.live()?;
            } else {
                self.begin_segment(&mut state)?;
            }
        }
        let (mut bytes, mut offsets) = (Vec::new(), Vec::with_capacity(entries.len()));
        for (expected, (index, payload)) in (state.last + 1..).zip(entries) {
            if *index != expected {
                return Err(LogError::Order { expected, got: *index });
            }
            if payload.len() > PAYLOAD_BYTES_MAX {
                let (what, bytes) = (format!("entry {index}"), payload.len());
                return Err(LogError::TooLarge { what, bytes, bytes_max: PAYLOAD_BYTES_MAX });
            }
            offsets.push(bytes.len() as u64);
            segment::put_entry(&mut bytes, *index, state.durable, payload);
        }
        let result = match state.segments.last_mut() {
            Some(segment) => segment.append(&bytes, &offsets),
            None => Err(io::Error::other("no segment")),
        };
        if let Err(cause) = result {
            state.poisoned = true;
            return Err(LogError::Io { what: "append".into(), cause });
        }
        state.last += entries.len() as u64;
        for (_, payload) in entries {
            state.cache_bytes += payload.len();
            state.cache.push_back((*payload).into());
        }
        while state.cache_bytes > self.options.cache_bytes_max {
            let Some(oldest) = state.cache.pop_front() else { break };
            state.cache_bytes -= oldest.len();
        }
        Ok(())
    }

    /// Makes everything appended so far durable; returns the last durable index.
    pub fn sync(&self) -> Result<u64, LogError> {
        self.sync_to(u64::MAX)
    }

    /// As [`Log::sync`], unless entries up to `index` are durable already: of many callers at once, one syncs for all.
    pub fn sync_to(&self, index: u64) -> Result<u64, LogError> {
        {
            let mut state = self.live()?;
            while state.syncing && state.durable < index {
                state = self.synced.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            if state.poisoned {
                return Err(LogError::Poisoned);
            }
            if state.durable >= index {
                return Ok(state.durable);
            }
            state.syncing = true;
        }
        let synced = self.sync_now();
        lock(&self.state).syncing = false;
        self.synced.notify_all();
        synced
    }

    fn sync_now(&self) -> Result<u64, LogError> {
        let _settling = lock(&self.settling);
        let (file, new_name, last, durable) = {
            let state = self.live()?;
            let segment = state.segments.last();
            (segment.map(|s| s.file.clone()), segment.is_some_and(|s| !s.named), state.last, state.durable)
        };
        let Some(file) = file.filter(|_| last > durable || new_name) else { return Ok(durable) };
        // Not under the state's lock: appends go on and wait for the next sync together.
        let synced = file
            .sync()
            .and_then(|()| match new_name && !sim::planted!("forget-the-directory-sync") {
                true => self.disk.sync_dir(&self.dir),
                false => Ok(()),
            })
            .and_then(|()| self.marked(|mark| mark.set(last.max(durable))));
        let mut state = lock(&self.state);
        if let Err(cause) = synced {
            // As good as it goes on a disk that fails: without power the name may be gone, and then so are the doubtful bytes.
            let _ = self.disk.create(&self.path(REWRITE));
            state.poisoned = true;
            return Err(LogError::Io { what: "sync".into(), cause });
        }
        if let (true, Some(segment)) = (new_name, state.segments.last_mut()) {
            segment.named = true;
        }
        state.durable = state.durable.max(last);
        sim::trace::gauge("durable", state.durable);
        Ok(state.durable)
    }

    /// Entries from `range.start` on, as many as fit into `bytes_max`, but at least one. Empty for an empty range.
    pub fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Entries, LogError> {
        let mut found = vec![];
        let mut bytes = 0;
        for index in range {
            let payload = self.read_one(index).or_else(|error| match error {
                // A truncation may have cut the file under the reader: look again while there is none.
                LogError::Corrupt { .. } => {
                    let _settling = lock(&self.settling);
                    self.read_one(index)
                }
                other => Err(other),
            })?;
            bytes += payload.len();
            if !found.is_empty() && bytes > bytes_max {
                break;
            }
            found.push((index, payload));
        }
        Ok(found)
    }

    fn read_one(&self, index: u64) -> Result<Arc<[u8]>, LogError> {
        let (file, name, offset) = {
            let state = lock(&self.state);
            let missing = LogError::Missing { index, first: state.base + 1, last: state.last };
            if index <= state.base || index > state.last {
                return Err(missing);
            }
            if let Some(at) = state.cache.len().checked_sub((state.last - index) as usize + 1) {
                return Ok(state.cache[at].clone());
            }
            let holder = state.segments.partition_point(|s| s.first <= index);
            let segment = holder.checked_sub(1).and_then(|at| state.segments.get(at)).ok_or(missing)?;
            (segment.file.clone(), segment.name.clone(), segment.offset(index))
        };
        segment::read_entry(&*file, &name, offset, index)
    }

    /// Removes `index` and all entries after it, durably.
    pub fn truncate_from(&self, index: u64) -> Result<(), LogError> {
        let _settling = lock(&self.settling);
        let mut state = self.live()?;
        if index > state.last {
            return Ok(());
        }
        let index = index.max(state.base + 1);
        let result = (|| {
            if state.durable >= index {
                self.marked(|mark| mark.reset(index - 1))?;
            }
            while let Some(segment) = state.segments.pop_if(|s| s.first >= index) {
                self.remove(&segment.name)?;
            }
            match state.segments.last_mut() {
                Some(segment) => segment.truncate_from(index),
                None => Ok(()),
            }
        })();
        if let Err(cause) = result {
            state.poisoned = true;
            return Err(LogError::Io { what: format!("truncate at {index}"), cause });
        }
        while state.last >= index {
            state.last -= 1;
            if let Some(payload) = state.cache.pop_back() {
                state.cache_bytes -= payload.len();
            }
        }
        state.durable = state.durable.min(state.last);
        Ok(())
    }

    /// Forgets all entries up to `index`, durably; the log then continues behind it even if it never got that far. Their segments stay
    /// until [`Log::release_to`], unless nothing is left of the log.
    pub fn purge_to(&self, index: u64) -> Result<(), LogError> {
        let _settling = lock(&self.settling);
        if index <= self.live()?.base {
            return Ok(());
        }
        // First the fact, then the deed: entries that are still there below the base are ignored.
        self.put_meta(BASE, &index.to_le_bytes())?;
        let mut state = self.live()?;
        state.base = index;
        let beyond = index >= state.last;
        while state.segments.get(1).is_some_and(|next| next.first <= index + 1) {
            let Segment { first, name, len: bytes, .. } = state.segments.remove(0);
            let end = state.segments[0].first;
            state.kept.push(Kept { first, end, name, bytes });
        }
        // What lies behind does not continue what lay before: nobody can replay over the gap.
        let result = (|| {
            if beyond {
                self.marked(|mark| mark.reset(index))?;
                while let Some(segment) = state.segments.pop() {
                    self.remove(&segment.name)?;
                }
            }
            Ok(())
        })();
        if let Err(cause) = result {
            state.poisoned = true;
            return Err(LogError::Io { what: format!("purge to {index}"), cause });
        }
        if beyond {
            state.last = index;
            state.cache.clear();
            state.cache_bytes = 0;
            state.durable = index;
        }
        Ok(())
    }

    /// Removes segments below the base that hold nothing above `index`, durably, oldest first.
    pub fn release_to(&self, index: u64) -> Result<(), LogError> {
        let _settling = lock(&self.settling);
        let mut state = self.live()?;
        while let Some(old) = state.kept.first().filter(|kept| kept.end <= index + 1) {
            if let Err(cause) = self.remove(&old.name) {
                state.poisoned = true;
                return Err(LogError::Io { what: format!("release to {index}"), cause });
            }
            state.kept.remove(0);
        }
        Ok(())
    }

    /// Bytes of the segments that hold something above `index`, kept ones included.
    pub fn bytes_after(&self, index: u64) -> u64 {
        let state = lock(&self.state);
        let kept = state.kept.iter().filter(|k| k.end > index + 1).map(|k| k.bytes);
        kept.chain(state.segments.iter().filter(|s| s.end() > index + 1).map(|s| s.len)).sum()
    }

    /// Gives entries `range` in order, also such as lie below the base. Fails at the first that is missing or damaged.
    pub fn replay<E: From<LogError>>(&self, range: Range<u64>, give: &mut Give<'_, E>) -> Result<(), E> {
        let mut next = range.start;
        let (names, last) = {
            let state = lock(&self.state);
            let kept = state.kept.iter().map(|k| (k.first, k.end, k.name.clone()));
            let live = state.segments.iter().map(|s| (s.first, s.end(), s.name.clone()));
            (kept.chain(live).collect::<Vec<_>>(), state.last)
        };
        for (first, end, name) in names {
            if end <= next || first > next || next >= range.end {
                continue;
            }
            let failed = |e| io_error(format!("read {name}"))(e);
            let file = self.disk.open(&self.path(&name)).map_err(failed)?;
            let bytes = read_what_can_be_read(&*file, u64::MAX).map_err(failed)?;
            let mut at = HEAD_BYTES as usize;
            let mut index = first;
            while index < end && next < range.end {
                let parsed = bytes.get(at..).and_then(parse_entry).filter(|(head, _)| head.index == index);
                let Some((_, payload)) = parsed else {
                    let problem = format!("entry {index} is unreadable");
                    return Err(LogError::Corrupt { file: name, offset: at as u64, problem }.into());
                };
                at += ENTRY_HEAD + payload.len();
                if index == next {
                    give(index, payload)?;
                    next += 1;
                }
                index += 1;
            }
        }
        if next < range.end {
            return Err(LogError::Missing { index: next, first: range.start, last }.into());
        }
        Ok(())
    }

    /// Stores a small fact under `name`, durably; a crash leaves the old one or the new one.
    pub fn put_meta(&self, name: &str, bytes: &[u8]) -> Result<(), LogError> {
        if bytes.len() > FACT_BYTES_MAX {
            let (what, bytes) = (format!("fact {name}"), bytes.len());
            return Err(LogError::TooLarge { what, bytes, bytes_max: FACT_BYTES_MAX });
        }
        let _writing = lock(&self.writing_fact);
        drop(self.live()?);
        facts::put(&*self.disk, &self.dir, name, bytes).map_err(|cause| {
            lock(&self.state).poisoned = true;
            LogError::Io { what: format!("fact {name}"), cause }
        })
    }

    /// A small fact; `None` if it was never stored.
    pub fn get_meta(&self, name: &str) -> Result<Option<Vec<u8>>, LogError> {
        let _writing = lock(&self.writing_fact);
        facts::get(&*self.disk, &self.dir, name).map_err(|cause| LogError::Fact { name: name.into(), cause })
    }

    /// Removes a small fact, durably.
    pub fn remove_meta(&self, name: &str) -> Result<(), LogError> {
        let _writing = lock(&self.writing_fact);
        facts::remove(&*self.disk, &self.dir, name).map_err(io_error(format!("fact {name}")))
    }

    fn live(&self) -> Result<MutexGuard<'_, State>, LogError> {
        let state = lock(&self.state);
        if state.poisoned { Err(LogError::Poisoned) } else { Ok(state) }
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(&self.path(name))?;
        self.disk.sync_dir(&self.dir)
    }

    fn begin_segment(&self, state: &mut State) -> Result<(), LogError> {
        let first = state.last + 1;
        let name = segment::name(first);
        let created = self.disk.create(&self.path(&name)).and_then(|file| Segment::begin(file, name, first));
        state.segments.push(created.map_err(|cause| {
            state.poisoned = true;
            LogError::Io { what: "new segment".into(), cause }
        })?);
        Ok(())
    }
}
