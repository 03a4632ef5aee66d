//! Snapshots of the views on this replica's own disk.
//!
//! ```text
//! base 1,200 ──── ledger entries 1,201 … 9,800 ────► base 9,800 ──── entries 9,801 … now
//! ```
//!
//! A snapshot of any position is a *base*, the views' whole logical state at some position, and the ledger's entries from there on, which
//! are on the disk anyway: purged segments of the log stay until no base needs them ([`crate::log::Log::release_to`]). So a snapshot
//! costs nothing but the entries since the last one; a new base is written when those have become as large as the last
//! base, which bounds both the disk (about two bases and as much log) and a restore. Two bases are kept.
//!
//! # On disk
//!
//! A directory of files `base-INDEX.snap` (`LOCISNP2`, then frames as [`Shard::export`] gives them, the last of which counts the others and
//! carries the digest of the state), and the fact `manifest`, which names those that count: its replacement is the only commit point.
//!
//! # What can go wrong
//!
//! - *Power loss while a base is written*: the manifest does not name it, and opening removes it.
//! - *A damaged base* is refused by a frame's checksum or by the digest in its end; the older one, with more of the ledger, gives the same
//!   state.
//! - *A gap in the ledger* (this replica received a snapshot from a peer): what was received becomes the only base.

use crate::codec::{self, FRAME_HEAD};
use crate::delta::RangeHashes;
use crate::error::StorageError;
use crate::facts;
use crate::log::read_up_to;
use crate::shard::{Shard, lock};
use bincode::{Decode, Encode};
use sim::disk::{Disk, File};
use std::io;
use std::sync::{Arc, Mutex};

pub const MAGIC: &[u8; 8] = b"LOCISNP2";
const MANIFEST: &str = "manifest";
/// The older one is for whom the newer one is too new, or damaged.
const KEPT: usize = 2;
/// Frames are gathered into chunks of about this many bytes.
const CHUNK_BYTES: usize = 256 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Base {
    /// The position's index.
    pub index: u64,
    pub file: String,
    pub bytes: u64,
    /// Of the logical state.
    pub digest: [u8; 16],
}

/// Writes a snapshot's file.
pub struct Writer {
    file: Arc<dyn File>,
    offset: u64,
}

impl Writer {
    pub fn create(disk: &dyn Disk, path: &str) -> io::Result<Writer> {
        let file = disk.create(path)?;
        file.set_len(0)?;
        file.write_at(MAGIC, 0)?;
        Ok(Writer { file, offset: MAGIC.len() as u64 })
    }

    /// Appends whole frames.
    pub fn push(&mut self, frames: &[u8]) -> io::Result<()> {
        self.file.write_at(frames, self.offset)?;
        self.offset += frames.len() as u64;
        Ok(())
    }

    /// Appends frames that were gathered, and removes them there, once they are a chunk.
    pub fn push_full(&mut self, frames: &mut Vec<u8>) -> io::Result<()> {
        if frames.len() >= CHUNK_BYTES {
            self.push(frames)?;
            frames.clear();
        }
        Ok(())
    }

    /// Makes it durable but for its name; how long it is.
    pub fn finish(self) -> io::Result<u64> {
        self.file.sync()?;
        Ok(self.offset)
    }
}

/// Reads a snapshot's file in chunks of whole frames. Checksums are for whoever decodes them.
pub struct Reader {
    file: Arc<dyn File>,
    offset: u64,
    len: u64,
}

impl Reader {
    pub fn open(disk: &dyn Disk, path: &str) -> Result<Reader, StorageError> {
        let file = disk.open(path)?;
        let mut magic = [0; 8];
        let read = read_up_to(&*file, &mut magic, 0)?;
        if read < 8 || magic != *MAGIC {
            let problem = format!("it begins with {:02x?}, not with {MAGIC:02x?}", &magic[..read]);
            return Err(StorageError::Snapshot(format!("{path}: {problem}")));
        }
        let len = file.len()?;
        Ok(Reader { file, offset: 8, len })
    }

    pub fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, StorageError> {
        let (mut buf, mut whole) = (vec![], 0);
        while whole < CHUNK_BYTES && self.offset + (whole as u64) < self.len {
            // Enough for the next frame's head, then for the frame.
            let length = match buf.get(whole + 1..whole + 5) {
                Some(length) if buf.len() >= whole + FRAME_HEAD => {
                    FRAME_HEAD + u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize
                }
                _ => FRAME_HEAD,
            };
            if length > FRAME_HEAD && buf.len() >= whole + length {
                whole += length;
                continue;
            }
            if length > FRAME_HEAD + codec::VALUE_BYTES_MAX {
                return Err(StorageError::Snapshot(format!("a frame of {length} bytes: it is damaged")));
            }
            let (from, wanted) = (buf.len(), (whole + length).max(buf.len() + CHUNK_BYTES));
            let wanted = wanted.min((self.len - self.offset) as usize);
            if wanted <= from {
                return Err(StorageError::Snapshot("it ends within a frame".into()));
            }
            buf.resize(wanted, 0);
            let read = read_up_to(&*self.file, &mut buf[from..], self.offset + from as u64)?;
            if from + read < wanted {
                return Err(StorageError::Snapshot("its file became shorter".into()));
            }
        }
        buf.truncate(whole);
        self.offset += whole as u64;
        Ok((!buf.is_empty()).then_some(buf))
    }
}

/// Exports a shard's views into a file, but for what its receiver has: how long the file is, and of what.
pub fn export(
    shard: &Shard,
    there: &RangeHashes,
    disk: &dyn Disk,
    path: &str,
) -> Result<(u64, u64, [u8; 16]), StorageError> {
    let mut writer = Writer::create(disk, path)?;
    let mut chunk = Vec::new();
    let (position, digest) = shard.export_to(there, &mut |frame| {
        chunk.extend_from_slice(frame);
        Ok(writer.push_full(&mut chunk)?)
    })?;
    writer.push(&chunk)?;
    Ok((writer.finish()?, position.index, digest))
}

/// The bases on one disk. All methods block.
pub struct Bases {
    disk: Arc<dyn Disk>,
    dir: String,
    /// Newest first.
    held: Mutex<Vec<Base>>,
    /// Held by whoever changes them.
    changing: Mutex<()>,
}

impl Bases {
    /// Opens the bases in `dir`, and removes what the manifest does not name.
    pub fn open(disk: Arc<dyn Disk>, dir: &str) -> Result<Bases, StorageError> {
        disk.create_dir_all(dir)?;
        let held = match facts::get(&*disk, dir, MANIFEST) {
            Ok(None) => vec![],
            Ok(Some(bytes)) => {
                codec::decode(&bytes).map_err(StorageError::corrupt(format!("{dir}/{MANIFEST}.meta")))?
            }
            Err(facts::FactError::Io(error)) => return Err(error.into()),
            Err(facts::FactError::Damaged(error)) => {
                sim::error!(
                    "{dir}/{MANIFEST}.meta: both copies are damaged ({error}); starting without bases"
                );
                facts::remove(&*disk, dir, MANIFEST)?;
                vec![]
            }
        };
        let bases = Bases { disk, dir: dir.into(), held: Mutex::new(held), changing: Mutex::new(()) };
        bases.remove_unnamed()?;
        Ok(bases)
    }

    /// Newest first.
    pub fn held(&self) -> Vec<Base> {
        lock(&self.held).clone()
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    fn remove_unnamed(&self) -> Result<(), StorageError> {
        let held = self.held();
        for name in self.disk.list(&self.dir)? {
            if !name.ends_with(".meta") && !held.iter().any(|base| base.file == name) {
                self.disk.remove(&self.path(&name))?;
            }
        }
        Ok(())
    }

    /// Writes the shard's state as a new base, and drops the oldest beyond two. Applying goes on meanwhile.
    pub fn write(&self, shard: &Shard) -> Result<Base, StorageError> {
        let _changing = lock(&self.changing);
        let temporary = self.path("base.tmp");
        let (bytes, index, digest) = export(shard, &RangeHashes::default(), &*self.disk, &temporary)?;
        self.commit(&temporary, Base { index, file: String::new(), bytes, digest }, KEPT)
    }

    /// Takes a file that was written by [`Writer`] and imported as the only base: what lay before is no prefix of it.
    pub fn adopt(&self, path: &str, shard: &Shard) -> Result<Base, StorageError> {
        let _changing = lock(&self.changing);
        let file = self.disk.open(path)?;
        file.sync()?;
        let (position, digest) = shard.digest();
        let base = Base { index: position.index, file: String::new(), bytes: file.len()?, digest };
        self.commit(path, base, 1)
    }

    fn commit(&self, path: &str, mut base: Base, kept: usize) -> Result<Base, StorageError> {
        base.file = format!("base-{:020}.snap", base.index);
        self.disk.rename(path, &self.path(&base.file))?;
        self.disk.sync_dir(&self.dir)?;
        let mut held = self.held();
        held.retain(|old| old.file != base.file);
        held.insert(0, base.clone());
        held.truncate(kept);
        facts::put(&*self.disk, &self.dir, MANIFEST, &codec::encode(&held))?;
        *lock(&self.held) = held;
        self.remove_unnamed()?;
        Ok(base)
    }

    /// Drops the bases of positions above `index`.
    pub fn forget_above(&self, index: u64) -> Result<(), StorageError> {
        let _changing = lock(&self.changing);
        let mut held = self.held();
        held.retain(|base| base.index <= index);
        if held.len() < lock(&self.held).len() {
            facts::put(&*self.disk, &self.dir, MANIFEST, &codec::encode(&held))?;
            *lock(&self.held) = held;
            self.remove_unnamed()?;
        }
        Ok(())
    }

    /// Replaces the shard's state by a base.
    pub fn restore(&self, base: &Base, shard: &Shard) -> Result<(), StorageError> {
        let mut reader = Reader::open(&*self.disk, &self.path(&base.file))?;
        shard.import(&mut || reader.next_chunk())?;
        let (position, digest) = shard.digest();
        if (position.index, digest) != (base.index, base.digest) {
            let problem =
                format!("{} holds position {}, not what its manifest tells", base.file, position.index);
            return Err(StorageError::Snapshot(problem));
        }
        Ok(())
    }
}
