//! Snapshots between peers: exported to a file, sent in chunks, received into a file. Memory stays bounded by a chunk.
//!
//! In the file each chunk is preceded by its length (4 bytes, little-endian); the chunks themselves are checksummed by
//! [`storage::Shard::export`]. A file that was cut short fails at import, which then changes nothing.

use sim::disk::{Disk, File};
use std::io;
use std::sync::Arc;
use storage::{Shard, StorageError};

/// A received chunk larger than this is refused.
pub const CHUNK_BYTES_MAX: usize = 8 << 20;

/// Writes chunks to a new file.
pub struct FileSink {
    file: Arc<dyn File>,
    offset: u64,
}

impl FileSink {
    pub fn create(disk: &dyn Disk, path: &str) -> io::Result<FileSink> {
        let file = disk.create(path)?;
        file.set_len(0)?;
        Ok(FileSink { file, offset: 0 })
    }

    pub fn push(&mut self, chunk: &[u8]) -> io::Result<()> {
        if chunk.len() > CHUNK_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "snapshot chunk is too large"));
        }
        self.file.write_at(&(chunk.len() as u32).to_le_bytes(), self.offset)?;
        self.file.write_at(chunk, self.offset + 4)?;
        self.offset += 4 + chunk.len() as u64;
        Ok(())
    }
}

/// Reads the chunks of a file back.
pub struct FileChunks {
    file: Arc<dyn File>,
    offset: u64,
    len: u64,
}

impl FileChunks {
    pub fn open(disk: &dyn Disk, path: &str) -> io::Result<FileChunks> {
        let file = disk.open(path)?;
        let len = file.len()?;
        Ok(FileChunks { file, offset: 0, len })
    }

    pub fn next_chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.offset == self.len {
            return Ok(None);
        }
        let mut length = [0; 4];
        self.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > CHUNK_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "snapshot file is corrupt: oversized chunk",
            ));
        }
        let mut chunk = vec![0; length];
        self.read_exact(&mut chunk)?;
        Ok(Some(chunk))
    }

    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let read = self.file.read_at(&mut buf[done..], self.offset + done as u64)?;
            if read == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "snapshot file ends too early"));
            }
            done += read;
        }
        self.offset += buf.len() as u64;
        Ok(())
    }
}

/// Exports the views into a file. Blocks.
pub fn export(shard: &Shard, disk: &dyn Disk, path: &str) -> Result<(), StorageError> {
    let mut sink = FileSink::create(disk, path).map_err(StorageError::from)?;
    // Small frames are gathered into chunks, so that a chunk is worth a message.
    let mut chunk = Vec::new();
    shard.export(&mut |frame| {
        chunk.extend_from_slice(frame);
        if chunk.len() >= 256 << 10 {
            sink.push(&chunk).map_err(StorageError::from)?;
            chunk.clear();
        }
        Ok(())
    })?;
    if !chunk.is_empty() {
        sink.push(&chunk).map_err(StorageError::from)?;
    }
    Ok(())
}
