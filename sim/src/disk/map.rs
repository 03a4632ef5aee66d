//! A file's bytes in memory, without reading them first: a mapping in production, a copy in simulation.

use std::ops::Deref;

/// Sixty-four bytes at an address that is a multiple of sixty-four.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

/// The bytes of a file that nobody changes any more. They begin at an address that is a multiple of 64.
pub struct Map(Kind);

enum Kind {
    #[cfg(not(madsim))]
    Mapped(memmap2::Mmap),
    Copied {
        lines: Vec<Line>,
        len: usize,
    },
}

impl Map {
    /// Maps a file. It must not become shorter while the map lives: whoever reads behind its end is killed by the system.
    #[cfg(not(madsim))]
    pub(super) fn of(file: &std::fs::File) -> std::io::Result<Map> {
        // SAFETY: by the contract of `File::map` the file does not change any more.
        Ok(Map(Kind::Mapped(unsafe { memmap2::Mmap::map(file)? })))
    }

    /// A copy that `read` fills.
    pub fn copied<E>(len: usize, read: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Map, E> {
        let mut lines = vec![Line([0; 64]); len.div_ceil(64)];
        // SAFETY: lines are plain bytes, side by side.
        let bytes = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<u8>(), len) };
        read(bytes)?;
        Ok(Map(Kind::Copied { lines, len }))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            #[cfg(not(madsim))]
            Kind::Mapped(map) => map,
            // SAFETY: lines are plain bytes, side by side.
            Kind::Copied { lines, len } => unsafe {
                std::slice::from_raw_parts(lines.as_ptr().cast::<u8>(), *len)
            },
        }
    }
}
