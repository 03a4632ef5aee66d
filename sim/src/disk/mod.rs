//! Disks: the one way to a file.
//!
//! # The fault model
//!
//! What a disk may do to us, and why each is survivable by a caller who follows the contract below:
//!
//! - **Power loss.** Every write since the file's last `sync` may be kept, lost, or torn at a sector boundary,
//!   each independently of the others and in no order. Every change of a directory entry (create, rename, remove)
//!   since the directory's last `sync_dir` may be lost likewise. A caller survives because nothing is
//!   acknowledged before its `sync` (and the `sync_dir` of a new name) returned.
//! - **A failing sync.** The error is reported once; the dirty pages may already be marked clean and gone, so
//!   a later `sync` that succeeds proves nothing. A caller treats the file as unusable: it stops, and rebuilds from peers
//!   or from what a fresh start reads back.
//! - **Bit rot**: a byte reads back as something else, at any time, anywhere. Everything that Loci stores has a checksum that is
//!   verified before the bytes are used; what fails it is reported with file and offset, and repaired from a second copy, the log, or
//!   a peer.
//! - **Latent sector errors**: a sector cannot be read (`EIO`) until all of it is written again; a write of a part of it fails too, since
//!   the kernel reads the rest first. Treated like rot, and what was there is written to a new place.
//! - **Misdirected writes**: a write lands some sectors away and reports success. It harms two places. What it overwrote fails its
//!   checksum. What it should have written is missing: in a log, a fact or a snapshot that is a checksum too. A page of a
//!   database that kept its old content is sound by itself; it is found with the page that was overwritten, or when a replica's digest
//!   is recomputed. The simulated disk misdirects writes to the log and to snapshots, not to databases.
//! - **Latency.** An operation is slow. The operations are synchronous (SQLite demands it), so the simulated latency is a debt,
//!   slept off by [`crate::task::blocking`], the only way that asynchronous code may call a disk. Only then is a sync done.
//! - **A stuck disk**: an operation never returns. Its task waits for ever; the rest of the process lives until it is restarted.
//! - **A full disk**: writes fail with `StorageFull`; nothing already written is harmed.
//! - **Process death without power loss**: the kernel lives on, and all writes survive.
//!
//! Rot, lost sectors, misdirected writes and failing syncs may take from a node what it acknowledged. So a scenario's plan gives them, in
//! one run, to one replica only: a quorum remains that has everything. Each fault is counted ([`simulated::DiskCounters`]), which
//! proves that it took place.
//!
//! In production [`real`] maps this onto `pwrite`, `pread`, `fdatasync`, `rename` and `fsync` of the directory. In
//! simulation [`simulated`] keeps each node's files in memory, in two states: what a reader sees and what the platter holds.
//! [`sqlite`] lets SQLite stand on the same simulated disk.
//!
//! Paths are relative to the disk's root and separated by `/`. The root directory is `""`.

use std::io;
use std::sync::Arc;

/// One open file. All methods may be called from several threads at once.
pub trait File: Send + Sync {
    /// Reads up to `buf.len()` bytes at `offset`; fewer than asked for only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`, extending the file with zeroes when `offset` lies past its end.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts or extends (with zeroes) the file to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Makes every write before this call durable. It says nothing about the file's directory entry.
    fn sync(&self) -> io::Result<()>;
    /// The whole file in memory, paged in as it is touched. Only for files that are never written or cut again. In production an
    /// unreadable sector that is touched ends the process, so whoever maps a file reads it once with [`File::read_at`], which fails as an
    /// error, and verifies its checksum on the way.
    fn map(&self) -> io::Result<Map> {
        let len = self.len()? as usize;
        Map::copied(len, |bytes| match self.read_at(bytes, 0)? {
            read if read == len => Ok(()),
            read => Err(io::Error::other(format!("{read} bytes of {len} could be read"))),
        })
    }
    /// True when the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// One node's disk, rooted at a directory.
pub trait Disk: Send + Sync {
    /// Opens an existing file. `NotFound` if there is none.
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>>;
    /// Opens a file, creating it empty if there is none. The new entry is durable after [`Disk::sync_dir`].
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>>;
    /// Creates a directory and its parents; durable when it returns.
    fn create_dir_all(&self, path: &str) -> io::Result<()>;
    /// Atomically gives `from` the name `to`, replacing what had it. Durable after [`Disk::sync_dir`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file. Durable after [`Disk::sync_dir`].
    fn remove(&self, path: &str) -> io::Result<()>;
    /// Makes the directory's entries durable.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;
    /// The names (not paths) of files and directories in `dir`, sorted. Empty if the directory is missing.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
    /// Whether a file or directory has this path.
    fn exists(&self, path: &str) -> io::Result<bool>;
    /// What SQLite is to open for `path`: the full file name, and the name of the VFS (`None`: SQLite's own).
    fn sqlite(&self, path: &str) -> io::Result<SqliteLocation>;
}

/// Where and through which VFS SQLite opens a database file.
pub struct SqliteLocation {
    pub file: String,
    /// `None`: SQLite's own.
    pub vfs: Option<&'static std::ffi::CStr>,
}

pub mod checked;
mod map;
pub mod real;
pub mod simulated;
pub mod sqlite;
mod within;

pub use map::Map;
pub use within::within;

/// This node's disk: in simulation the machine's own, in production the directory `root`.
pub fn open(root: &str) -> io::Result<Arc<dyn Disk>> {
    #[cfg(madsim)]
    {
        let _ = root;
        let disk = crate::world::current_disk();
        Ok(disk.ok_or_else(|| io::Error::other("the scenario itself has no disk"))?)
    }
    #[cfg(not(madsim))]
    real::RealDisk::open(root)
}

/// Opens an SQLite database on `disk`, its pages sealed and checked ([`checked`]). One connection at a time may write: the one that
/// may create it.
pub fn open_sqlite(
    disk: &dyn Disk,
    path: &str,
    flags: rusqlite::OpenFlags,
) -> Result<rusqlite::Connection, rusqlite::Error> {
    let failed = |e: io::Error| {
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN);
        rusqlite::Error::SqliteFailure(code, Some(format!("{path}: {e}")))
    };
    let location = disk.sqlite(path).map_err(failed)?;
    let below = match location.vfs {
        Some(vfs) => {
            sqlite::register().map_err(failed)?;
            Some(vfs)
        }
        None => None,
    };
    let vfs = checked::above(below).map_err(failed)?;
    let writes = flags.contains(rusqlite::OpenFlags::SQLITE_OPEN_CREATE);
    if writes {
        checked::forget_log(&location.file);
    }
    let connection = rusqlite::Connection::open_with_flags_and_vfs(location.file, flags, vfs)?;
    if writes {
        checked::reserve(&connection)?;
    }
    Ok(connection)
}
