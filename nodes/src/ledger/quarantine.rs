//! The quarantine: what an epoch took away from a replica that returned, kept on its disk until somebody has looked at it.
//!
//! One file for each epoch that ended, with the log's entries one after the other, each behind its length and checksum (CRC32C). It is made whole before the log is cut, and
//! made again if that was interrupted ([`super::epochs`]); nothing is ever added to it.

use super::epochs::{self, Place};
use super::log_store::{decode_entry, encode_entry};
use super::state_machine::decode_batch;
use crate::error::Error;
use bincode::{Decode, Encode};
use openraft::EntryPayload;
use sim::disk::Disk;
use std::sync::Arc;
use storage::log::Log;
use storage::model::Command;

/// Where the files are.
pub const QUARANTINE: &str = "quarantine";
/// An entry's length and checksum.
const HEAD: usize = 8;
/// A page of entries ends behind this many bytes.
const PAGE_BYTES: usize = 1 << 20;

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Internal(format!("{QUARANTINE}: {error}"))
}

fn path(epoch: u64) -> String {
    format!("{QUARANTINE}/epoch-{epoch}.entries")
}

/// What was put into the quarantine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Taken {
    pub commands: u64,
    /// The last entry that has any, or may have had. What a leader writes of itself when it begins to lead is nobody's loss.
    pub last: u64,
    /// When the first and the last of them were written, by their writers' calendars, in milliseconds.
    pub written: Option<(i64, i64)>,
}

/// Puts what lies behind `kept` into the quarantine.
pub fn put(disk: &Arc<dyn Disk>, log: &Log, epoch: u64, kept: u64) -> Result<Taken, Error> {
    let (mut bytes, mut taken) = (vec![], Taken::default());
    // What was purged already is still on the disk, as a rule.
    let from = epochs::kept_from(log, kept + 1);
    if from > kept + 1 {
        sim::error!(
            "entries {} to {} of epoch {epoch} are no longer on this disk: another old one may have them",
            kept + 1,
            from - 1
        );
    }
    taken.last = from - 1;
    epochs::each_from(log, from, |entry| {
        if matches!(entry.payload, EntryPayload::Normal(_)) {
            taken.last = Place::of(&entry).index;
        }
        for command in decode_batch(&entry).ok().flatten().map_or(vec![], |batch| batch.commands) {
            taken.commands += 1;
            let (first, last) = taken.written.unwrap_or((command.now, command.now));
            taken.written = Some((first.min(command.now), last.max(command.now)));
        }
        let encoded = encode_entry(&entry);
        bytes.extend_from_slice(&(encoded.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&encoded).to_le_bytes());
        bytes.extend_from_slice(&encoded);
    })?;
    if bytes.is_empty() {
        return Ok(taken);
    }
    disk.create_dir_all(QUARANTINE).map_err(failed)?;
    // An earlier attempt was interrupted: the log still has all that its file had.
    let file = disk.create(&path(epoch)).map_err(failed)?;
    file.set_len(0).map_err(failed)?;
    file.write_at(&bytes, 0).map_err(failed)?;
    file.sync().map_err(failed)?;
    disk.sync_dir(QUARANTINE).map_err(failed)?;
    Ok(taken)
}

/// A look at what one epoch took away here.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Look {
    pub epoch: u64,
    /// Where the page before ended; 0 at first.
    pub from: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct Page {
    pub entries: Vec<(Place, Vec<Command>)>,
    /// Where the next page begins; `None`: that is all.
    pub next: Option<u64>,
}

/// A page of what an epoch took away; nothing, if it took nothing.
pub fn page(disk: &dyn Disk, look: Look) -> Result<Page, Error> {
    let (path, mut page, mut at) = (path(look.epoch), Page::default(), look.from);
    if !disk.exists(&path).map_err(failed)? {
        return Ok(page);
    }
    let file = disk.open(&path).map_err(failed)?;
    let whole = |offset: u64, len: usize| -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        match file.read_at(&mut bytes, offset).map_err(failed)? {
            read if read == len => Ok(bytes),
            read => Err(failed(format!("{path} ends {} bytes too early", len - read))),
        }
    };
    let end = file.len().map_err(failed)?;
    while at < end {
        if at - look.from >= PAGE_BYTES as u64 {
            page.next = Some(at);
            break;
        }
        let head: [u8; HEAD] = whole(at, HEAD)?.try_into().unwrap_or_default();
        let (len, sum) = ((u64::from_le_bytes(head) as u32) as u64, (u64::from_le_bytes(head) >> 32) as u32);
        let bytes = if len > end - at { vec![] } else { whole(at + HEAD as u64, len as usize)? };
        if crc32c::crc32c(&bytes) != sum {
            return Err(failed(format!(
                "{path} is damaged at byte {at}; another old disk may have the same entries"
            )));
        }
        let entry = decode_entry(&bytes).map_err(failed)?;
        let batch = decode_batch(&entry).map_err(failed)?;
        page.entries.push((Place::of(&entry), batch.map_or(vec![], |batch| batch.commands)));
        at += HEAD as u64 + len;
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::super::recovery::LOG;
    use super::super::types::{Data, Entry, Types};
    use super::*;
    use openraft::entry::RaftEntry;
    use openraft::vote::RaftLeaderId;
    use sim::disk::simulated::SimDisk;
    use storage::codec;
    use storage::log::LogOptions;
    use storage::model::{Batch, Operation};

    fn command(key: String, now: i64) -> Command {
        let operation = Operation::Delete { id: [1; 16], expected_version: None };
        let tenant = "t".into();
        Command { tenant, slot: None, idempotency_key: key, request_hash: [0; 16], now, operation }
    }

    #[test]
    fn what_is_put_in_is_read_page_by_page_and_damage_is_told() -> Result<(), Box<dyn std::error::Error>> {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let log = Log::open(disk.clone(), LOG, LogOptions::default())?;
        let leader = openraft::alias::LeaderIdOf::<Types>::new(3, 1).to_committed();
        let at = |index| openraft::alias::LogIdOf::<Types>::new(leader, index - 1);
        for index in 1..=30 {
            let (long, now) = (format!("{index}{}", "x".repeat(100_000)), index as i64);
            let commands = vec![command(long, now), command(index.to_string(), now)];
            let payload = EntryPayload::Normal(Data(codec::encode(&Batch { commands }).into()));
            log.append(&[(index, &encode_entry(&Entry::new(at(index), payload)))])?;
        }
        log.append(&[(31, &encode_entry(&Entry::new(at(31), EntryPayload::Blank)))])?;
        let nothing = Taken { last: 31, ..Taken::default() };
        assert_eq!(put(&disk, &log, 1, 31)?, nothing, "nothing was taken away");
        assert_eq!(page(&*disk, Look { epoch: 1, from: 0 })?, Page::default());
        // The second time as after a crash before the log was cut.
        for _ in 0..2 {
            assert_eq!(put(&disk, &log, 1, 5)?, Taken { commands: 50, last: 30, written: Some((6, 30)) });
        }
        let (mut found, mut from, mut pages) = (vec![], Some(0), 0);
        while let Some(at) = from {
            let read = page(&*disk, Look { epoch: 1, from: at })?;
            (from, pages) = (read.next, pages + 1);
            found.extend(read.entries);
        }
        let places: Vec<u64> = found.iter().map(|(place, _)| place.index).collect();
        assert_eq!((places, pages), ((6..=31).collect(), 3));
        assert!(
            found.iter().all(|(place, commands)| commands.len() == if place.index == 31 { 0 } else { 2 })
        );
        let file = disk.open(&path(1))?;
        file.write_at(b"?", 50_000)?;
        let problem = page(&*disk, Look { epoch: 1, from: 0 }).unwrap_err().to_string();
        assert!(problem.contains("damaged at byte 0"), "{problem}");
        file.set_len(0)?;
        file.write_at(&[7; 5], 0)?;
        let problem = page(&*disk, Look { epoch: 1, from: 0 }).unwrap_err().to_string();
        assert!(problem.contains("too early"), "{problem}");
        Ok(())
    }
}
