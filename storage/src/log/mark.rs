//! How far the log was durable: the difference between a torn tail and corruption.
//!
//! On disk: `synced.mark`, two slots of 4,096 bytes, each a frame of (sequence, index), written in turn after each sync of the log. The
//! slot with the higher sequence counts. A slot is not synced by itself, which would cost each group commit a second sync, but when the
//! log has been idle for a moment, when a node stops, and before the mark may go back; so after a power loss the mark may be a
//! little old, never ahead.

use crate::codec;
use sim::disk::{Disk, File};
use std::io;
use std::sync::Arc;

const SLOT: u64 = 4096;

pub struct Mark {
    file: Arc<dyn File>,
    sequence: u64,
    synced: bool,
}

/// The newest readable slot: sequence and index.
pub fn parse(file: &[u8]) -> Option<(u64, u64)> {
    let slot = |bytes: &[u8]| codec::decode::<(u64, u64)>(codec::unframe(bytes).ok()?.0).ok();
    file.chunks(SLOT as usize).filter_map(slot).max()
}

impl Mark {
    /// Opens the mark of the log in `dir`, or begins one; also the index that it tells.
    pub fn open(disk: &dyn Disk, dir: &str) -> io::Result<(Mark, u64)> {
        let file = disk.create(&format!("{dir}/synced.mark"))?;
        let (mut bytes, holes) = super::segment::read_around_holes(&*file, 2 * SLOT)?;
        let read = bytes.len();
        bytes.resize(2 * SLOT as usize, 0);
        let found = parse(&bytes);
        let (sequence, durable) = found.unwrap_or_default();
        let mut mark = Mark { file, sequence, synced: false };
        if read < bytes.len() || found.is_none() || holes {
            // What is lost of a mark leaves the entries' own word for what was durable. Lost sectors are there again once they are wholly written.
            mark.file.write_at(&bytes, 0)?;
            mark.reset(durable)?;
            disk.sync_dir(dir)?;
        }
        Ok((mark, durable))
    }

    /// Says that entries up to `durable` are on the platter.
    pub fn set(&mut self, durable: u64) -> io::Result<()> {
        self.sequence += 1;
        let mut slot = vec![];
        codec::frame(&mut slot, &codec::encode(&(self.sequence, durable)));
        self.synced = false;
        self.file.write_at(&slot, self.sequence % 2 * SLOT)
    }

    /// The same in both slots, durably: before the mark goes back.
    pub fn reset(&mut self, durable: u64) -> io::Result<()> {
        self.set(durable)?;
        self.set(durable)?;
        self.sync()
    }

    pub fn sync(&mut self) -> io::Result<()> {
        if !self.synced {
            self.file.sync()?;
            self.synced = true;
        }
        Ok(())
    }
}
