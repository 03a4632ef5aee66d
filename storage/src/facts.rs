//! Small facts: a file each, replaced as a whole, and kept twice in it.
//!
//! On disk: the fact as a frame ([`codec::frame`]) at byte 0, and again at the next multiple of 4,096. A crash leaves the old file or the
//! new one (temporary file, sync, rename, sync of the directory). Damage to one copy is healed from the other when the fact is read;
//! a fact whose copies are both damaged is an error that names the file.

use crate::codec::{self, CodecError};
use sim::disk::Disk;
use std::io;

/// Largest fact, in bytes.
pub const FACT_BYTES_MAX: usize = 16 << 20;
/// The copies are this far apart, or a multiple of it: no sector holds a part of both.
const COPY_ALIGN: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum FactError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("both copies are unreadable ({0}), though they were durable")]
    Damaged(CodecError),
}

/// Both copies.
fn twice(bytes: &[u8]) -> Vec<u8> {
    let mut file = vec![];
    codec::frame(&mut file, bytes);
    file.resize(file.len().next_multiple_of(COPY_ALIGN), 0);
    codec::frame(&mut file, bytes);
    file
}

/// The fact in a file's bytes, and whether both copies are sound.
pub fn parse(file: &[u8]) -> Result<(Vec<u8>, bool), CodecError> {
    let copy =
        |at: usize| file.get(at..).and_then(|rest| codec::unframe(rest).ok().filter(|(_, r)| r.is_empty()));
    match codec::unframe(file) {
        Ok((payload, _)) => Ok((payload.to_vec(), file == twice(payload))),
        Err(error) => {
            // Where the second copy begins depends on its length, which the first can no longer tell.
            let found = (COPY_ALIGN..file.len()).step_by(COPY_ALIGN).find_map(copy);
            found.map(|(payload, _)| (payload.to_vec(), false)).ok_or(error)
        }
    }
}

/// Stores a fact durably.
pub fn put(disk: &dyn Disk, dir: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() > FACT_BYTES_MAX {
        let problem = format!("fact {name} of {} bytes is larger than {FACT_BYTES_MAX}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let (path, temporary) = (format!("{dir}/{name}.meta"), format!("{dir}/{name}.tmp"));
    let file = disk.create(&temporary)?;
    file.set_len(0)?;
    // Two writes: one that goes astray leaves the other copy.
    let copies = twice(bytes);
    let second = copies.len() - codec::FRAME_HEAD - bytes.len();
    file.write_at(&copies[..second], 0)?;
    file.write_at(&copies[second..], second as u64)?;
    file.sync()?;
    disk.rename(&temporary, &path)?;
    disk.sync_dir(dir)
}

/// Reads a fact, and heals it if one of its copies is damaged; `None` if it was never stored.
pub fn get(disk: &dyn Disk, dir: &str, name: &str) -> Result<Option<Vec<u8>>, FactError> {
    let file = match disk.open(&format!("{dir}/{name}.meta")) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let bytes = crate::log::read_what_can_be_read(&*file, 4 * FACT_BYTES_MAX as u64)?;
    let (payload, sound) = parse(&bytes).map_err(FactError::Damaged)?;
    if !sound {
        sim::trace::probe("fact: healed from its second copy");
        sim::warn!("{dir}/{name}.meta: one of its two copies was damaged; healed from the other");
        put(disk, dir, name, &payload)?;
    }
    Ok(Some(payload))
}

/// Removes a fact durably.
pub fn remove(disk: &dyn Disk, dir: &str, name: &str) -> io::Result<()> {
    match disk.remove(&format!("{dir}/{name}.meta")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => disk.sync_dir(dir),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sim::disk::simulated::SimDisk;

    #[test]
    fn a_damaged_copy_is_healed_from_the_other() -> Result<(), Box<dyn std::error::Error>> {
        let disk = SimDisk::new(1);
        disk.create_dir_all("d")?;
        for fact in [&b"short"[..], &[7; 9000], b""] {
            put(&*disk, "d", "fact", fact)?;
            let file = disk.open("d/fact.meta")?;
            for at in 0..file.len()? {
                let mut byte = [0];
                file.read_at(&mut byte, at)?;
                file.write_at(&[byte[0] ^ 0x10], at)?;
                assert_eq!(get(&*disk, "d", "fact")?.as_deref(), Some(fact), "byte {at}");
                let healed = disk.open("d/fact.meta")?;
                let mut found = vec![0; healed.len()? as usize];
                healed.read_at(&mut found, 0)?;
                assert_eq!(found, twice(fact), "byte {at} was not healed");
                file.write_at(&byte, at)?;
            }
        }
        let file = disk.open("d/fact.meta")?;
        file.write_at(&[0xff; 20], 0)?;
        file.write_at(&[0xff; 20], 4096)?;
        assert!(matches!(get(&*disk, "d", "fact"), Err(FactError::Damaged(_))));
        assert!(get(&*disk, "d", "other")?.is_none());
        Ok(())
    }
}
