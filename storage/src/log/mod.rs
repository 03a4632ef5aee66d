//! The ledger's storage: an append-only log in segments.
//!
//! # On disk
//!
//! A directory of segments `NNNNNNNNNNNNNNNNNNNN.log`, named by the index of their first entry, and of small facts
//! (`vote.meta`, `base.meta`). A segment is a head (`LOCILOG1`, then its first index) and entries, each
//! `length: u32, crc32c: u32, index: u64, durable: u64, payload`, little-endian; the checksum covers all but itself.
//! `durable` is the last index known to be on the platter when the entry was written.
//!
//! # What can go wrong, and why it is survivable
//!
//! - **Power loss.** What was appended after the last [`Log::sync`] may be lost or torn, in any order. Opening reads entries until one
//!   is bad and cuts the rest: nothing behind it was acknowledged.
//! - **Corruption** looks the same, a bad entry, but must not be cut. It is told apart by what follows: a good
//!   entry whose `durable` covers the bad one proves that it was on the platter, and so does a later segment, which is only begun
//!   when all before it is durable. Then opening fails and says where. Damage to the very last synced entries, with
//!   nothing written after them, cannot be told from a torn tail; their replicas hold them.
//!   `durable` never covers an entry that was purged before it was synced: that one may rightly be missing.
//! - **What was truncated coming back.** The cut is synced before [`Log::truncate_from`] returns, so that no old entry lies
//!   behind what is appended there next.
//! - **A half-done truncation or purge.** Segments go one by one, each removal made durable before the next,
//!   from the end (truncation) or from the start (purge), so what is left has no hole.
//! - **A failed sync.** What it covered is in an unknown state: the log refuses everything from then on.

mod recover;
mod segment;
#[cfg(test)]
mod tests;

use segment::Segment;
use sim::disk::Disk;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::codec::{self, CodecError};

/// Largest payload of one entry, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = codec::VALUE_BYTES_MAX;
/// Largest fact, in bytes.
pub const FACT_BYTES_MAX: usize = 1 << 20;
/// The fact that says up to which index entries were purged.
const BASE: &str = "base";

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
    #[error(
        "log fact {name} is unreadable ({cause}), though it was durable; restore this replica from its peers"
    )]
    Fact { name: String, cause: CodecError },
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

/// An append-only log of entries with consecutive indexes. All methods block.
pub struct Log {
    disk: Arc<dyn Disk>,
    dir: String,
    options: LogOptions,
    state: Mutex<State>,
    /// Held during a sync, truncation or purge, which exclude each other but not appends.
    settling: Mutex<()>,
    /// Held while a fact is written: each has one temporary file.
    writing_fact: Mutex<()>,
}

struct State {
    segments: Vec<Segment>,
    /// Entries up to this index are gone.
    base: u64,
    last: u64,
    durable: u64,
    /// The newest payloads; the last one is that of `last`.
    cache: VecDeque<Arc<[u8]>>,
    cache_bytes: usize,
    poisoned: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Log {
    /// Opens the log in `dir`, creating it if there is none, and cuts what a power loss tore.
    pub fn open(disk: Arc<dyn Disk>, dir: &str, options: LogOptions) -> Result<Log, LogError> {
        disk.create_dir_all(dir).map_err(io_error(format!("directory {dir}")))?;
        let state = State {
            segments: vec![],
            base: 0,
            last: 0,
            durable: 0,
            cache: VecDeque::new(),
            cache_bytes: 0,
            poisoned: false,
        };
        let (state, dir) = (Mutex::new(state), dir.into());
        let log = Log { disk, dir, options, state, settling: Mutex::new(()), writing_fact: Mutex::new(()) };
        log.recover()?;
        Ok(log)
    }

    /// Index of the first entry that is, or would be, here.
    pub fn first_index(&self) -> u64 {
        lock(&self.state).base + 1
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
        let _settling = lock(&self.settling);
        let (file, new_name, last, durable) = {
            let state = self.live()?;
            let segment = state.segments.last();
            (segment.map(|s| s.file.clone()), segment.is_some_and(|s| !s.named), state.last, state.durable)
        };
        let Some(file) = file.filter(|_| last > durable || new_name) else { return Ok(durable) };
        // Not under the state's lock: appends go on and wait for the next sync together.
        let synced = file.sync().and_then(|()| if new_name { self.disk.sync_dir(&self.dir) } else { Ok(()) });
        let mut state = lock(&self.state);
        if let Err(cause) = synced {
            state.poisoned = true;
            return Err(LogError::Io { what: "sync".into(), cause });
        }
        if let (true, Some(segment)) = (new_name, state.segments.last_mut()) {
            segment.named = true;
        }
        state.durable = state.durable.max(last);
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

    /// Forgets all entries up to `index`, durably; the log then continues behind it even if it never got that far.
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
        let result = (|| {
            while state.segments.get(1).is_some_and(|next| next.first <= index + 1) {
                self.remove(&state.segments[0].name)?;
                state.segments.remove(0);
            }
            // The last segment goes only when nothing in it is left: the next append begins a new one.
            if beyond && let Some(segment) = state.segments.pop() {
                self.remove(&segment.name)?;
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

    /// Stores a small fact under `name`, durably; a crash leaves the old one or the new one.
    pub fn put_meta(&self, name: &str, bytes: &[u8]) -> Result<(), LogError> {
        if bytes.len() > FACT_BYTES_MAX {
            let (what, bytes) = (format!("fact {name}"), bytes.len());
            return Err(LogError::TooLarge { what, bytes, bytes_max: FACT_BYTES_MAX });
        }
        let _writing = lock(&self.writing_fact);
        drop(self.live()?);
        let mut framed = vec![];
        codec::frame(&mut framed, bytes);
        let (path, temporary) = (self.path(&format!("{name}.meta")), self.path(&format!("{name}.tmp")));
        let write = || {
            let file = self.disk.create(&temporary)?;
            file.set_len(0)?;
            file.write_at(&framed, 0)?;
            file.sync()?;
            self.disk.rename(&temporary, &path)?;
            self.disk.sync_dir(&self.dir)
        };
        write().map_err(|cause| {
            lock(&self.state).poisoned = true;
            LogError::Io { what: format!("fact {name}"), cause }
        })
    }

    /// A small fact; `None` if it was never stored.
    pub fn get_meta(&self, name: &str) -> Result<Option<Vec<u8>>, LogError> {
        let read = || -> io::Result<Vec<u8>> {
            let file = self.disk.open(&self.path(&format!("{name}.meta")))?;
            let mut bytes = vec![0; file.len()?.min((FACT_BYTES_MAX + codec::FRAME_HEAD) as u64) as usize];
            let read = segment::read_up_to(&*file, &mut bytes, 0)?;
            bytes.truncate(read);
            Ok(bytes)
        };
        let bytes = match read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(LogError::Io { what: format!("fact {name}"), cause }),
        };
        let (payload, _) =
            codec::unframe(&bytes).map_err(|cause| LogError::Fact { name: name.into(), cause })?;
        Ok(Some(payload.to_vec()))
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
