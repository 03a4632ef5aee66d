//! Checksums for SQLite: a VFS between SQLite and the one below it, the same in both worlds.
//!
//! SQLite believes what it reads. This VFS does not: every page of a database ends in eight bytes that are reserved for it, the CRC-32C of
//! the page *and of its place*, then the same inverted. They are put there by every write of a page and checked by every read, so that
//! a flipped bit, a page that was lost in mid-write, and one that was written to the wrong place are all found before SQLite uses
//! them. The read fails with `SQLITE_IOERR_DATA`, and [`damage`] tells the file and the offset.
//!
//! The write-ahead log has sums of its own, which SQLite checks when it recovers, but not when it reads. As long as a process writes a
//! log, the sums of its pages are kept in memory ([`Frames`], 4 bytes a page) and checked by every read.
//!
//! Pages torn by a power loss while they were moved from the log into the database are never read: until the database is
//! synced, the log has them.

use rusqlite::ffi::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// Bytes at the end of each page that belong to this VFS.
pub const RESERVED: usize = 8;

/// The VFS above SQLite's own, and that above the simulated one.
const NAMES: [&CStr; 2] = [c"loci-checked", c"loci-checked-sim"];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A write-ahead log's pages by offset: length and sum. SQLite may write a page in two parts, to sync in between; that one is not checked.
type Frames = Arc<Mutex<BTreeMap<i64, (c_int, u32)>>>;

/// The logs in use, by file name.
static LOGS: Mutex<BTreeMap<String, Frames>> = Mutex::new(BTreeMap::new());
thread_local! {
    /// The last damage found by this thread: file and offset.
    static DAMAGE: RefCell<Option<(String, u64)>> = const { RefCell::new(None) };
}

/// Where this thread's last read failed with `SQLITE_IOERR_DATA`: the file as SQLite names it, and the page's offset in bytes.
pub fn damage() -> Option<(String, u64)> {
    DAMAGE.with_borrow(Clone::clone)
}

/// The eight bytes that end a page which lies at `offset`.
pub fn seal(page: &[u8], offset: u64) -> [u8; RESERVED] {
    let sum = crc32c::crc32c_append(crc32c::crc32c(&offset.to_le_bytes()), page);
    let mut seal = [0; RESERVED];
    seal[..4].copy_from_slice(&sum.to_le_bytes());
    seal[4..].copy_from_slice(&(!sum).to_le_bytes());
    seal
}

/// Whether a whole page, its seal included, is what was written at `offset`.
pub fn is_sound(page: &[u8], offset: u64) -> bool {
    page.split_last_chunk::<RESERVED>().is_some_and(|(content, found)| *found == seal(content, offset))
}

/// Forgets the sums of a database's write-ahead log: whoever opens it to write begins anew, and SQLite checks what it finds there.
pub(super) fn forget_log(database: &str) {
    lock(&LOGS).remove(&format!("{database}-wal"));
}

/// Reserves the end of each page of a database that is about to be created.
pub(super) fn reserve(connection: &rusqlite::Connection) -> Result<(), rusqlite::Error> {
    let mut bytes = RESERVED as c_int;
    // SAFETY: an open connection; SQLite reads and writes one int.
    let code = unsafe {
        let bytes = (&raw mut bytes).cast();
        sqlite3_file_control(connection.handle(), c"main".as_ptr(), SQLITE_FCNTL_RESERVE_BYTES, bytes)
    };
    if code == SQLITE_OK { Ok(()) } else { Err(rusqlite::Error::SqliteFailure(Error::new(code), None)) }
}

/// The checking VFS above `base` (`None`: SQLite's own), registered once.
pub(super) fn above(base: Option<&CStr>) -> io::Result<&'static str> {
    static RESULTS: [OnceLock<c_int>; 2] = [OnceLock::new(), OnceLock::new()];
    let which = base.is_some() as usize;
    let code = *RESULTS[which].get_or_init(|| {
        let name = base.unwrap_or(c"unix");
        // SAFETY: a C string; SQLite returns a structure that lives for ever, or null.
        let Some(below) = (unsafe { sqlite3_vfs_find(name.as_ptr()).as_ref() }) else { return SQLITE_ERROR };
        let mut vfs = *below;
        vfs.pNext = std::ptr::null_mut();
        vfs.zName = NAMES[which].as_ptr();
        vfs.szOsFile += size_of::<OpenFile>() as c_int;
        vfs.xOpen = Some(if which == 0 { open_own } else { open_simulated });
        // SAFETY: the structure lives for ever; all functions but `xOpen` are those of the VFS below.
        unsafe { sqlite3_vfs_register(Box::leak(Box::new(vfs)), 0) }
    });
    match (code, NAMES[which].to_str()) {
        (SQLITE_OK, Ok(name)) => Ok(name),
        _ => Err(io::Error::other(format!("SQLite refused the checking VFS: {code}"))),
    }
}

/// What SQLite allocates per open file; the file of the VFS below follows it.
#[repr(C)]
struct OpenFile {
    base: sqlite3_file,
    inner: *mut Inner,
}

enum Kind {
    Database,
    Log(Frames),
    Other,
}

struct Inner {
    name: String,
    kind: Kind,
}

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock_file),
    xUnlock: Some(unlock_file),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

/// SAFETY for the caller: `file` was allocated by SQLite with the size that this VFS asked for.
unsafe fn below(file: *mut sqlite3_file) -> *mut sqlite3_file {
    // SAFETY: the file below lies behind ours, and 8-byte aligned as ours is.
    unsafe { file.cast::<OpenFile>().add(1).cast() }
}

/// SAFETY for the caller: `file` was opened by `open_with` and is not closed. SQLite uses a handle from one thread at a time.
unsafe fn inner<'a>(file: *mut sqlite3_file) -> &'a mut Inner {
    // SAFETY: see above.
    unsafe { &mut *(*file.cast::<OpenFile>()).inner }
}

/// Calls a method of the file below.
macro_rules! pass {
    ($file:expr, $method:ident $(, $argument:expr)*) => {{
        // SAFETY: an open file of the VFS below, with the arguments that SQLite gave us for it.
        unsafe {
            let below = below($file);
            match (*below).pMethods.as_ref().and_then(|methods| methods.$method) {
                Some(method) => method(below $(, $argument)*),
                None => SQLITE_IOERR,
            }
        }
    }};
}

unsafe extern "C" fn open_own(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite's own arguments.
    unsafe { open_with(c"unix", name, file, flags, out_flags) }
}

unsafe extern "C" fn open_simulated(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite's own arguments.
    unsafe { open_with(super::sqlite::VFS_NAME, name, file, flags, out_flags) }
}

unsafe fn open_with(
    base: &CStr,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: `file` points to `szOsFile` bytes; a null method table means "not open".
    unsafe { (*file).pMethods = std::ptr::null() };
    // SAFETY: the VFS below was found when this one was registered; its file lies behind ours.
    let code = unsafe {
        let vfs = sqlite3_vfs_find(base.as_ptr());
        match vfs.as_ref().and_then(|v| v.xOpen) {
            Some(open) => open(vfs, name, below(file), flags, out_flags),
            None => SQLITE_CANTOPEN,
        }
    };
    if code != SQLITE_OK {
        return code;
    }
    // SAFETY: a C string of SQLite's, or null for a nameless temporary file.
    let name = if name.is_null() { c"" } else { unsafe { CStr::from_ptr(name) } };
    let name = name.to_string_lossy().into_owned();
    let kind = match flags {
        f if f & SQLITE_OPEN_MAIN_DB != 0 => Kind::Database,
        f if f & SQLITE_OPEN_WAL != 0 => Kind::Log(lock(&LOGS).entry(name.clone()).or_default().clone()),
        _ => Kind::Other,
    };
    let boxed = Box::new(Inner { name, kind });
    // SAFETY: `file` has room for an `OpenFile`.
    unsafe {
        (*file.cast::<OpenFile>()).inner = Box::into_raw(boxed);
        (*file).pMethods = &METHODS;
    }
    SQLITE_OK
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    let code = pass!(file, xClose);
    // SAFETY: opened by `open_with` and closed once.
    drop(unsafe { Box::from_raw((*file.cast::<OpenFile>()).inner) });
    code
}

/// Whole pages are powers of two from 512 on, and in a database lie at multiples of their size. A log's heads are shorter.
fn is_page(amount: c_int) -> bool {
    amount >= 512 && (amount as u32).is_power_of_two()
}

unsafe extern "C" fn read(
    file: *mut sqlite3_file,
    buf: *mut c_void,
    amount: c_int,
    offset: sqlite3_int64,
) -> c_int {
    let code = pass!(file, xRead, buf, amount, offset);
    if code != SQLITE_OK || !is_page(amount) {
        return code;
    }
    // SAFETY: see `inner`; the buffer has `amount` bytes, all read.
    let (inner, page) =
        unsafe { (inner(file), std::slice::from_raw_parts(buf.cast::<u8>(), amount as usize)) };
    let sound = match &inner.kind {
        Kind::Database => is_sound(page, offset as u64),
        Kind::Log(frames) => {
            lock(frames).get(&offset).is_none_or(|(len, sum)| *len != amount || *sum == crc32c::crc32c(page))
        }
        Kind::Other => true,
    };
    if sound {
        return SQLITE_OK;
    }
    DAMAGE.set(Some((inner.name.clone(), offset as u64)));
    SQLITE_IOERR_DATA
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    buf: *const c_void,
    amount: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: see `inner`; the buffer has `amount` bytes.
    let (inner, bytes) =
        unsafe { (inner(file), std::slice::from_raw_parts(buf.cast::<u8>(), amount as usize)) };
    match &inner.kind {
        Kind::Database if is_page(amount) => {
            let mut page = bytes.to_vec();
            let content = page.len() - RESERVED;
            let end = seal(&page[..content], offset as u64);
            page[content..].copy_from_slice(&end);
            pass!(file, xWrite, page.as_ptr().cast(), amount, offset)
        }
        Kind::Log(frames) => {
            let mut frames = lock(frames);
            let over: Vec<i64> = frames.range(offset..offset + amount as i64).map(|(at, _)| *at).collect();
            for at in over {
                frames.remove(&at);
            }
            if is_page(amount) {
                frames.insert(offset, (amount, crc32c::crc32c(bytes)));
            }
            drop(frames);
            pass!(file, xWrite, buf, amount, offset)
        }
        _ => pass!(file, xWrite, buf, amount, offset),
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: see `inner`.
    if let Kind::Log(frames) = unsafe { &inner(file).kind } {
        drop(lock(frames).split_off(&size));
    }
    pass!(file, xTruncate, size)
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    pass!(file, xSync, flags)
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    pass!(file, xFileSize, size)
}

unsafe extern "C" fn lock_file(file: *mut sqlite3_file, level: c_int) -> c_int {
    pass!(file, xLock, level)
}

unsafe extern "C" fn unlock_file(file: *mut sqlite3_file, level: c_int) -> c_int {
    pass!(file, xUnlock, level)
}

unsafe extern "C" fn check_reserved_lock(file: *mut sqlite3_file, reserved: *mut c_int) -> c_int {
    pass!(file, xCheckReservedLock, reserved)
}

unsafe extern "C" fn file_control(file: *mut sqlite3_file, op: c_int, arg: *mut c_void) -> c_int {
    pass!(file, xFileControl, op, arg)
}

unsafe extern "C" fn sector_size(file: *mut sqlite3_file) -> c_int {
    pass!(file, xSectorSize)
}

/// Nothing is promised of any device, in either world.
unsafe extern "C" fn device_characteristics(_: *mut sqlite3_file) -> c_int {
    0
}

unsafe extern "C" fn shm_map(
    file: *mut sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    pass!(file, xShmMap, region, size, extend, out)
}

unsafe extern "C" fn shm_lock(file: *mut sqlite3_file, first: c_int, count: c_int, flags: c_int) -> c_int {
    pass!(file, xShmLock, first, count, flags)
}

unsafe extern "C" fn shm_barrier(file: *mut sqlite3_file) {
    // SAFETY: an open file of the VFS below.
    unsafe {
        let below = below(file);
        if let Some(barrier) = (*below).pMethods.as_ref().and_then(|methods| methods.xShmBarrier) {
            barrier(below);
        }
    }
}

unsafe extern "C" fn shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    pass!(file, xShmUnmap, delete)
}

#[cfg(test)]
mod tests {
    use super::super::simulated::SimDisk;
    use super::super::{Disk, open_sqlite, real::RealDisk};
    use super::*;
    use rusqlite::{Connection, OpenFlags};

    fn open(disk: &dyn Disk) -> rusqlite::Result<Connection> {
        let db = open_sqlite(disk, "test.db", OpenFlags::default())?;
        db.execute_batch(
            "PRAGMA page_size=4096; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0;
             PRAGMA cache_size=1;
             CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, body BLOB)",
        )?;
        Ok(db)
    }

    fn sum(db: &Connection) -> rusqlite::Result<i64> {
        db.query_row("SELECT sum(length(hex(body))) FROM t", [], |row| row.get(0))
    }

    fn every_flip_is_found(disk: &dyn Disk) -> Result<(), Box<dyn std::error::Error>> {
        let db = open(disk)?;
        for i in 0..40 {
            db.execute("INSERT INTO t VALUES (?1, randomblob(700))", [i])?;
        }
        assert_eq!(sum(&db)?, 40 * 1400);
        drop(db);
        let file = disk.open("test.db")?;
        assert_eq!(file.len()? % 4096, 0);
        let mut byte = [0];
        for at in (0..file.len()?).step_by(61) {
            file.read_at(&mut byte, at)?;
            file.write_at(&[byte[0] ^ (1 << (at % 8))], at)?;
            let read = open(disk).and_then(|db| sum(&db));
            assert!(read.is_err(), "a bit flipped at {at} passed: {read:?}");
            file.write_at(&byte, at)?;
        }
        assert_eq!(sum(&open(disk)?).map_err(|e| format!("{e} {:?}", damage()))?, 40 * 1400);
        Ok(())
    }

    #[test]
    fn a_flipped_bit_is_found_in_the_simulated_world() -> Result<(), Box<dyn std::error::Error>> {
        every_flip_is_found(&*SimDisk::new(1))
    }

    #[test]
    fn a_flipped_bit_is_found_on_a_real_disk() -> Result<(), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("loci-checked-{}", std::process::id()));
        let found = every_flip_is_found(&*RealDisk::open(&dir)?);
        std::fs::remove_dir_all(dir)?;
        found
    }

    #[test]
    fn a_page_in_the_wrong_place_is_found() -> Result<(), Box<dyn std::error::Error>> {
        let disk = SimDisk::new(2);
        let db = open(&*disk)?;
        for i in 0..40 {
            db.execute("INSERT INTO t VALUES (?1, randomblob(3000))", [i])?;
        }
        drop(db);
        let file = disk.open("test.db")?;
        let mut page = vec![0; 4096];
        file.read_at(&mut page, 4096 * 7)?;
        file.write_at(&page, 4096 * 9)?;
        let read = open(&*disk).and_then(|db| sum(&db));
        let Err(rusqlite::Error::SqliteFailure(error, _)) = read else { panic!("{read:?}") };
        assert_eq!(error.extended_code, SQLITE_IOERR_DATA);
        assert!(damage().is_some_and(|(file, at)| file.ends_with("test.db") && at == 4096 * 9));
        Ok(())
    }

    #[test]
    fn rot_in_a_log_that_is_being_written_is_found() -> Result<(), Box<dyn std::error::Error>> {
        let disk = SimDisk::new(3);
        let db = open(&*disk)?;
        for i in 0..40 {
            db.execute("INSERT INTO t VALUES (?1, randomblob(3000))", [i])?;
        }
        let reader = open_sqlite(&*disk, "test.db", OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        assert_eq!(sum(&reader)?, 40 * 6000);
        let log = disk.open("test.db-wal")?;
        let at = log.len()? - 2000;
        let mut byte = [0];
        log.read_at(&mut byte, at)?;
        log.write_at(&[byte[0] ^ 4], at)?;
        let reader = open_sqlite(&*disk, "test.db", OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        assert!(sum(&reader).is_err());
        drop(reader);
        let moved = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
        assert!(moved.is_err(), "{moved:?}");
        Ok(())
    }
}
