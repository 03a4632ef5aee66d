//! openraft's log on [`storage::log::Log`].
//!
//! Appending writes at once, so that the entries can be read, and leaves the fsync to a flusher task: while one fsync runs,
//! the appends that arrive wait together for the next one (group commit). An entry counts for a quorum only when its fsync has returned.
//! A failed write or fsync leaves the file in an unknown state: the process ends, and starts again from what the disk holds.

use super::types::{Data, Entry, LogId, Types, Vote};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend};
use sim::sync::mpsc;
use sim::time::Duration;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use storage::codec;
use storage::facts::FactError;
use storage::log::{Entries, Log, LogError};

pub const VOTE: &str = "vote";
pub const PURGED: &str = "purged";
/// After so long without an append, the log's mark is made durable too.
const IDLE: Duration = Duration::from_millis(200);
/// A read returns at most this many bytes of payload; openraft asks again for the rest.
pub const READ_BYTES_MAX: usize = 4 << 20;

#[derive(Clone)]
pub struct LogStore {
    log: Arc<Log>,
    flush: mpsc::UnboundedSender<IOFlushed<Types>>,
    pub missed: Missed,
}

/// A stream to a peer has asked for entries that are purged. openraft goes on asking for them until a message to the peer fails, and only then sends it a snapshot.
#[derive(Clone, Default)]
pub struct Missed(Arc<AtomicBool>);

impl Missed {
    /// Whether one has, since this was last asked.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}

/// Loci counts positions from 1 (0: nothing yet); openraft counts entries from 0.
pub fn position_index(raft_index: u64) -> u64 {
    raft_index + 1
}

/// First the fact, then the deed: a crash in between leaves entries that are known to be purged.
pub fn purge(log: &Log, upto: LogId) -> Result<(), LogError> {
    log.put_meta(PURGED, &codec::encode_serde(&upto))?;
    log.purge_to(position_index(upto.index))
}

/// Finishes a purge that was interrupted between the fact and the deed.
pub fn finish_purge(log: &Log) -> Result<(), LogError> {
    let Some(fact) = log.get_meta(PURGED)? else { return Ok(()) };
    let damaged = |cause| LogError::Fact { name: PURGED.into(), cause: FactError::Damaged(cause) };
    let upto: LogId = codec::decode_serde(&fact).map_err(damaged)?;
    log.purge_to(position_index(upto.index))
}

fn failed(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("ledger: {what}: {error}"))
}

impl LogStore {
    /// Takes an opened log and starts its flusher.
    pub fn new(log: Arc<Log>) -> LogStore {
        let (flush, waiting) = mpsc::unbounded_channel();
        sim::task::spawn(flusher(log.clone(), waiting));
        LogStore { log, flush, missed: Missed::default() }
    }

    fn meta<T: serde::de::DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        let bytes = self.log.get_meta(name).map_err(|e| failed(name, e))?;
        bytes.map(|b| codec::decode_serde(&b).map_err(|e| failed(name, e))).transpose()
    }

    /// A chunk bounded in bytes. Damage ends the process: the next start finds it too, and repairs it.
    fn chunk(&self, range: Range<u64>) -> io::Result<Entries> {
        self.log.read(range, READ_BYTES_MAX).map_err(|error| {
            let failure = failed("read", &error);
            if matches!(error, LogError::Corrupt { .. }) {
                sim::task::spawn(async move { sim::task::abort(&format!("{error}; restarting")).await });
            }
            failure
        })
    }

    /// Entries of `start..end` in openraft's counting, as far as they are there.
    fn read(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let start = position_index(start).max(self.log.first_index());
        let end = position_index(end).min(self.log.last_index() + 1);
        if start >= end {
            return Ok(vec![]);
        }
        let mut entries = Vec::with_capacity((end - start) as usize);
        let mut next = start;
        while next < end {
            let chunk = self.chunk(next..end)?;
            if chunk.is_empty() {
                break;
            }
            next += chunk.len() as u64;
            for (index, payload) in chunk {
                entries.push(decode_entry(&payload).map_err(|e| failed(&format!("entry {index}"), e))?);
            }
        }
        Ok(entries)
    }
}

async fn flusher(log: Arc<Log>, mut waiting: mpsc::UnboundedReceiver<IOFlushed<Types>>) {
    let mut settled = true;
    loop {
        let next = match settled {
            true => Ok(waiting.recv().await),
            false => sim::time::timeout(IDLE, waiting.recv()).await,
        };
        let first = match next {
            Ok(Some(first)) => first,
            Ok(None) => return,
            Err(_) => {
                let log = log.clone();
                if let Err(error) = sim::task::blocking(move || log.settle()).await {
                    sim::task::abort(&format!("the ledger's log cannot be marked ({error}); check the disk"))
                        .await;
                }
                settled = true;
                continue;
            }
        };
        settled = false;
        let mut callbacks = vec![first];
        while let Ok(next) = waiting.try_recv() {
            callbacks.push(next);
        }
        if sim::planted!("acknowledge-before-fsync") {
            callbacks.drain(..).for_each(|callback| callback.io_completed(Ok(())));
        }
        sim::rand::buggify_wait("before the log's fsync", 0.02, Duration::from_millis(200)).await;
        let log = log.clone();
        if let Err(error) = sim::task::blocking(move || log.sync()).await {
            sim::task::abort(&format!("the ledger's log cannot be made durable ({error}); check the disk"))
                .await;
        }
        for callback in callbacks {
            callback.io_completed(Ok(()));
        }
    }
}

/// An entry as the log stores it: its head, then its data untouched.
pub fn encode_entry(entry: &Entry) -> Vec<u8> {
    let (tag, rest): (u8, &[u8]) = match &entry.payload {
        EntryPayload::Blank => (0, &[]),
        EntryPayload::Normal(data) => (1, &data.0),
        EntryPayload::Membership(_) => (2, &[]),
    };
    let mut bytes = Vec::with_capacity(rest.len() + 64);
    bytes.push(tag);
    let mut head = codec::encode_serde(&entry.log_id());
    if let EntryPayload::Membership(membership) = &entry.payload {
        head = codec::encode_serde(&(entry.log_id(), membership));
    }
    bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(rest);
    bytes
}

pub fn decode_entry(bytes: &[u8]) -> Result<Entry, String> {
    let short = || "is too short".to_string();
    let (&tag, bytes) = bytes.split_first().ok_or_else(short)?;
    let (length, bytes) = bytes.split_first_chunk::<4>().ok_or_else(short)?;
    let (head, rest) = bytes.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(short)?;
    let (log_id, payload) = match tag {
        0 => (codec::decode_serde::<LogId>(head).map_err(|e| e.to_string())?, EntryPayload::Blank),
        1 => {
            let log_id = codec::decode_serde(head).map_err(|e| e.to_string())?;
            (log_id, EntryPayload::Normal(Data(rest.into())))
        }
        2 => {
            let (log_id, membership) = codec::decode_serde(head).map_err(|e| e.to_string())?;
            (log_id, EntryPayload::Membership(membership))
        }
        _ => return Err(format!("has unknown kind {tag}; it was written by a newer version")),
    };
    Ok(Entry::new(log_id, payload))
}

fn bounds(range: impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&i) => i,
        Bound::Excluded(&i) => i + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&i) => i + 1,
        Bound::Excluded(&i) => i,
        Bound::Unbounded => u64::MAX - 1,
    };
    (start, end)
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(range);
        self.read(start, end)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.meta(VOTE)
    }

    /// A chunk bounded in bytes; openraft asks again from where it ended. None where the log begins later: openraft purges under a
    /// stream to a peer that came back with an empty disk, and takes an error for the end of the ledger, but nothing for a heartbeat.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        if start >= end {
            return Ok(vec![]);
        }
        let chunk = match self.chunk(position_index(start)..position_index(end)) {
            Err(_) if position_index(start) < self.log.first_index() => {
                sim::trace::probe("ledger: a stream asked for entries that are purged");
                self.missed.0.store(true, Ordering::SeqCst);
                return Ok(vec![]);
            }
            chunk => chunk?,
        };
        chunk.iter().map(|(i, p)| decode_entry(p).map_err(|e| failed(&format!("entry {i}"), e))).collect()
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let purged: Option<LogId> = self.meta(PURGED)?;
        let (first, last) = (self.log.first_index(), self.log.last_index());
        let last_log_id =
            if last >= first { self.read(last - 1, last)?.pop().map(|e| e.log_id()) } else { None };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last_log_id.or(purged) })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        if sim::planted!("keep-the-vote-in-memory") {
            return Ok(());
        }
        let (log, bytes) = (self.log.clone(), codec::encode_serde(vote));
        if let Err(error) = sim::task::blocking(move || log.put_meta(VOTE, &bytes)).await {
            sim::task::abort(&format!("the vote cannot be made durable ({error}); check the disk")).await;
        }
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded: Vec<(u64, Vec<u8>)> =
            entries.into_iter().map(|e| (position_index(e.log_id().index), encode_entry(&e))).collect();
        let frames: Vec<(u64, &[u8])> = encoded.iter().map(|(i, b)| (*i, b.as_slice())).collect();
        if let Err(error) = self.log.append(&frames) {
            sim::task::abort(&format!("the ledger's log cannot be written ({error}); check the disk")).await;
        }
        self.flush.send(callback).map_err(|_| failed("append", "the flusher has ended"))
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let (log, from) = (self.log.clone(), position_index(last.map_or(0, |l| l.index + 1)));
        let from = from + sim::planted!("truncate-one-entry-less") as u64;
        if let Err(error) = sim::task::blocking(move || log.truncate_from(from)).await {
            sim::task::abort(&format!("the ledger's log cannot be truncated ({error}); check the disk"))
                .await;
        }
        sim::trace::probe("ledger: a deposed leader's entries cut");
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        sim::debug!("purging the log up to {}", position_index(upto.index));
        let log = self.log.clone();
        if let Err(error) = sim::task::blocking(move || purge(&log, upto)).await {
            sim::task::abort(&format!("the ledger's log cannot be purged ({error}); check the disk")).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::entry::RaftEntry;
    use openraft::vote::RaftLeaderId;
    use sim::disk::simulated::SimDisk;
    use storage::log::LogOptions;

    #[test]
    fn a_stream_over_purged_entries_gets_none_of_them_and_no_error() -> Result<(), Box<dyn std::error::Error>>
    {
        let options = LogOptions { segment_bytes_max: 200, cache_bytes_max: 0 };
        let log = Arc::new(Log::open(SimDisk::new(1), "log", options)?);
        let leader = openraft::alias::LeaderIdOf::<Types>::new(1, 1).to_committed();
        for index in 0..40 {
            let id = openraft::alias::LogIdOf::<Types>::new(leader, index);
            let entry = Entry::new(id, EntryPayload::Normal(Data([7; 50].as_slice().into())));
            log.append(&[(position_index(index), &encode_entry(&entry))])?;
        }
        log.sync()?;
        log.purge_to(position_index(19))?;
        let there = log.first_index() - 1;
        assert!(there > 0);
        sim::task::run_test(async move {
            let mut store = LogStore::new(log);
            assert!(store.limited_get_log_entries(there - 1, 40).await?.is_empty());
            assert_eq!(
                store.limited_get_log_entries(there, 40).await?.first().map(|e| e.log_id().index),
                Some(there)
            );
            assert!(store.missed.take() && !store.missed.take(), "the next message to the peer fails, once");
            let beyond = store.limited_get_log_entries(41, 43).await;
            assert!(beyond.is_err(), "what was never there is no purged entry: {beyond:?}");
            Ok(())
        })?
    }
}
