//! One segment file: its head, its entries, and where each lies.

use super::{LogError, PAYLOAD_BYTES_MAX, io_error};
use sim::disk::File;
use std::io;
use std::sync::Arc;

pub const MAGIC: &[u8; 8] = b"LOCILOG3";
pub const HEAD_BYTES: u64 = 20;
pub const ENTRY_HEAD: usize = 24;
/// The error number of a sector that cannot be read.
const EIO: i32 = 5;

pub struct Segment {
    pub file: Arc<dyn File>,
    pub name: String,
    pub first: u64,
    /// Bytes written.
    pub len: u64,
    /// Whether the file's directory entry is durable.
    pub named: bool,
    /// Some of the file cannot be read.
    pub holes: bool,
    offsets: Vec<u64>,
}

pub fn name(first: u64) -> String {
    format!("{first:020}.log")
}

/// What an entry's head says.
pub struct EntryHead {
    pub length: usize,
    checksum: u32,
    pub index: u64,
    pub durable: u64,
}

/// A little-endian number of up to eight bytes.
pub fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |w, &b| w << 8 | b as u64)
}

/// The index of a segment's first entry, if its head is whole.
pub fn parse_segment_head(bytes: &[u8]) -> Option<u64> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (first, rest) = rest.split_first_chunk::<8>()?;
    let sum = rest.first_chunk::<4>()?;
    let sound = magic == MAGIC && crc32c::crc32c(&bytes[..16]).to_le_bytes() == *sum;
    sound.then(|| u64::from_le_bytes(*first))
}

/// The version of a segment that another build wrote. Its head is told from a damaged one by its checksum, which version 1 did not have.
pub fn other_version(bytes: &[u8]) -> Option<char> {
    let version = *bytes.first_chunk::<8>().filter(|magic| magic[..7] == MAGIC[..7])?.last()?;
    let sum = bytes.get(16..20)?;
    let sound = crc32c::crc32c(&bytes[..16]).to_le_bytes() == *sum;
    (version != MAGIC[7] && (sound || version == b'1')).then_some(version as char)
}

pub fn parse_head(bytes: &[u8]) -> Option<EntryHead> {
    let head = bytes.first_chunk::<ENTRY_HEAD>()?;
    let number = |at: usize, n: usize| number(&head[at..at + n]);
    let length = number(0, 4) as usize;
    if length > PAYLOAD_BYTES_MAX {
        return None;
    }
    Some(EntryHead { length, checksum: number(4, 4) as u32, index: number(8, 8), durable: number(16, 8) })
}

fn checksum(length: &[u8], indexes: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(length), indexes), payload)
}

pub fn put_entry(out: &mut Vec<u8>, index: u64, durable: u64, payload: &[u8]) {
    let length = (payload.len() as u32).to_le_bytes();
    let mut indexes = [0; 16];
    indexes[..8].copy_from_slice(&index.to_le_bytes());
    indexes[8..].copy_from_slice(&durable.to_le_bytes());
    out.extend_from_slice(&length);
    out.extend_from_slice(&checksum(&length, &indexes, payload).to_le_bytes());
    out.extend_from_slice(&indexes);
    out.extend_from_slice(payload);
}

/// The entry at the start of `bytes`, if it is whole and undamaged.
pub fn parse_entry(bytes: &[u8]) -> Option<(EntryHead, &[u8])> {
    let head = parse_head(bytes)?;
    let payload = bytes.get(ENTRY_HEAD..ENTRY_HEAD + head.length)?;
    let sound = checksum(&bytes[..4], &bytes[8..ENTRY_HEAD], payload) == head.checksum;
    (sound || sim::planted!("trust-the-logs-entries")).then_some((head, payload))
}

/// Reads `buf.len()` bytes, or as many as there are.
pub fn read_up_to(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

/// Reads a whole file of at most `len_max` bytes; sectors that cannot be read are zeroes, which fit a checksum only where zeroes were.
pub fn read_what_can_be_read(file: &dyn File, len_max: u64) -> io::Result<Vec<u8>> {
    read_around_holes(file, len_max).map(|(bytes, _)| bytes)
}

/// As [`read_what_can_be_read`]; also whether there are sectors that cannot be read.
pub fn read_around_holes(file: &dyn File, len_max: u64) -> io::Result<(Vec<u8>, bool)> {
    let len = file.len()?.min(len_max) as usize;
    let mut bytes = vec![0; len];
    let mut holes = false;
    match read_up_to(file, &mut bytes, 0) {
        Ok(read) => bytes.truncate(read),
        Err(error) if error.raw_os_error() == Some(EIO) => {
            for (at, sector) in bytes.chunks_mut(512).enumerate() {
                match read_up_to(file, sector, at as u64 * 512) {
                    Err(error) if error.raw_os_error() == Some(EIO) => {
                        sector.fill(0);
                        holes = true;
                    }
                    Err(error) => return Err(error),
                    Ok(_) => {}
                }
            }
        }
        Err(error) => return Err(error),
    }
    Ok((bytes, holes))
}

/// Reads and checks one entry.
pub fn read_entry(file: &dyn File, name: &str, offset: u64, index: u64) -> Result<Arc<[u8]>, LogError> {
    let corrupt = |problem: &str| LogError::Corrupt { file: name.into(), offset, problem: problem.into() };
    let read_some = |buf: &mut [u8]| {
        read_up_to(file, buf, offset).map_err(|error| match error.raw_os_error() {
            Some(EIO) => corrupt("it cannot be read"),
            _ => io_error(format!("read {name}"))(error),
        })
    };
    let mut head = [0; ENTRY_HEAD];
    let read = read_some(&mut head)?;
    let length = parse_head(&head[..read]).ok_or_else(|| corrupt("entry head is unreadable"))?.length;
    let mut bytes = vec![0; ENTRY_HEAD + length];
    let read = read_some(&mut bytes)?;
    match parse_entry(&bytes[..read]) {
        Some((head, payload)) if head.index == index => Ok(payload.into()),
        Some((head, _)) => Err(corrupt(&format!("entry {} stands where {index} should", head.index))),
        None => Err(corrupt("entry checksum differs")),
    }
}

impl Segment {
    /// Writes the head of a new segment.
    pub fn begin(file: Arc<dyn File>, name: String, first: u64) -> io::Result<Segment> {
        file.set_len(0)?;
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&first.to_le_bytes());
        head.extend_from_slice(&crc32c::crc32c(&head).to_le_bytes());
        file.write_at(&head, 0)?;
        Ok(Segment { file, name, first, len: HEAD_BYTES, named: false, holes: false, offsets: vec![] })
    }

    /// A segment found on disk, with the offsets of its good entries and where they end.
    pub fn found(
        file: Arc<dyn File>,
        name: String,
        first: u64,
        offsets: Vec<u64>,
        len: u64,
        holes: bool,
    ) -> Segment {
        Segment { file, name, first, len, named: true, holes, offsets }
    }

    /// Index behind the last entry.
    pub fn end(&self) -> u64 {
        self.first + self.offsets.len() as u64
    }

    /// Where entry `index`, which must be here, begins.
    pub fn offset(&self, index: u64) -> u64 {
        self.offsets.get((index - self.first) as usize).copied().unwrap_or(self.len)
    }

    /// Cuts what lies behind the last entry; of a file with holes, which is written anew without it, nothing.
    pub fn cut_tail(&self) -> io::Result<()> {
        if self.holes { Ok(()) } else { self.file.set_len(self.len) }
    }

    /// Appends encoded entries that begin at `offsets` in `bytes`.
    pub fn append(&mut self, bytes: &[u8], offsets: &[u64]) -> io::Result<()> {
        self.file.write_at(bytes, self.len)?;
        self.offsets.extend(offsets.iter().map(|o| self.len + o));
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Cuts entry `index` and what follows it, durably.
    pub fn truncate_from(&mut self, index: u64) -> io::Result<()> {
        if index >= self.end() {
            return Ok(());
        }
        let len = self.offset(index);
        self.file.set_len(len)?;
        self.file.sync()?;
        self.offsets.truncate((index - self.first) as usize);
        self.len = len;
        Ok(())
    }
}
