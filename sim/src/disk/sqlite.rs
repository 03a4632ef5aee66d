//! SQLite on a [`SimDisk`]: a VFS over SQLite's own C interface.
//!
//! File names are `/NUMBER/PATH`: the disk's number and the path on it. The VFS promises nothing of its device (no atomic writes, no
//! ordering, no safe overwrite), so SQLite does all the work that a bad disk needs. WAL mode works with several connections of
//! one process: the shared-memory index lives on the heap, and locks are those of SQLite's documentation, kept per database and
//! power epoch, so that what dies with the machine holds no lock afterwards.
//!
//! SQLite has one random generator per process, seeded from the default VFS, so this one becomes the default and
//! [`begin_run`] reseeds it.

use super::simulated::{SimDisk, power_is_off};
use super::{Disk, File};
use rusqlite::ffi::*;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

pub const VFS_NAME: &CStr = c"loci-sim";

static RANDOM: AtomicU64 = AtomicU64::new(1);
static TIME: Mutex<fn() -> i64> = Mutex::new(|| 1_760_000_000_000);
/// The databases in use, by disk number and path at a power epoch.
static SHARED: Mutex<BTreeMap<(usize, String), WeakShared>> = Mutex::new(BTreeMap::new());
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Reseeds SQLite's generator; call before a run that must repeat.
pub fn begin_run(seed: u64) {
    RANDOM.store(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, Ordering::Relaxed);
    if register().is_ok() {
        // SAFETY: a null buffer with length 0 is the documented way to reset the generator.
        unsafe { sqlite3_randomness(0, std::ptr::null_mut()) };
    }
}

/// Where SQLite's calendar time comes from, in milliseconds since the Unix epoch.
pub fn set_time_source(source: fn() -> i64) {
    *lock(&TIME) = source;
}

/// Registers the VFS, once.
pub fn register() -> io::Result<()> {
    static RESULT: OnceLock<c_int> = OnceLock::new();
    let code = *RESULT.get_or_init(|| {
        let vfs = Box::leak(Box::new(sqlite3_vfs {
            iVersion: 2,
            szOsFile: size_of::<OpenFile>() as c_int,
            mxPathname: 512,
            pNext: std::ptr::null_mut(),
            zName: VFS_NAME.as_ptr(),
            pAppData: std::ptr::null_mut(),
            xOpen: Some(open),
            xDelete: Some(delete),
            xAccess: Some(access),
            xFullPathname: Some(full_pathname),
            xDlOpen: None,
            xDlError: None,
            xDlSym: None,
            xDlClose: None,
            xRandomness: Some(randomness),
            xSleep: Some(sleep),
            xCurrentTime: Some(current_time),
            xGetLastError: Some(last_error),
            xCurrentTimeInt64: Some(current_time_int64),
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
        }));
        // In production databases name no VFS and must get SQLite's own.
        let default = cfg!(madsim) as c_int;
        // SAFETY: the structure lives for ever, and its functions match the signatures that SQLite documents.
        unsafe { sqlite3_vfs_register(vfs, default) }
    });
    if code == SQLITE_OK { Ok(()) } else { Err(io::Error::other(format!("SQLite refused the VFS: {code}"))) }
}

type WeakShared = Weak<Mutex<Shared>>;

/// What the connections of one database share.
#[derive(Default)]
struct Shared {
    /// Lock level of each connection that has one.
    levels: BTreeMap<u64, c_int>,
    shm: Shm,
}

#[derive(Default)]
struct Shm {
    /// 8-byte aligned regions, whose addresses stay.
    regions: Vec<Box<[u64]>>,
    mapped: usize,
    slots: [Slot; SQLITE_SHM_NLOCK as usize],
}

#[derive(Default, Clone)]
struct Slot {
    readers: Vec<u64>,
    writer: Option<u64>,
}

/// What SQLite allocates for us per open file.
#[repr(C)]
struct OpenFile {
    base: sqlite3_file,
    inner: *mut Inner,
}

struct Inner {
    disk: Arc<SimDisk>,
    path: String,
    file: Arc<dyn File>,
    connection: u64,
    shared: Arc<Mutex<Shared>>,
    /// The directory entry of a new journal or WAL is made durable with the first sync.
    sync_dir: bool,
    delete_on_close: bool,
    shm_mapped: bool,
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

/// SAFETY for every caller: SQLite passes the file that [`open`] filled in, and calls per file one at a time.
unsafe fn inner<'a>(file: *mut sqlite3_file) -> &'a mut Inner {
    // SAFETY: see above; `inner` is set before `pMethods`, without which SQLite calls nothing.
    unsafe { &mut *(*file.cast::<OpenFile>()).inner }
}

fn parse(name: &str) -> io::Result<(Arc<SimDisk>, usize, String)> {
    let (number, path) = name.trim_start_matches('/').split_once('/').ok_or_else(power_is_off)?;
    let number = number.parse().map_err(|_| power_is_off())?;
    Ok((SimDisk::numbered(number).ok_or_else(power_is_off)?, number, path.to_string()))
}

/// SAFETY: `name` is a C string of SQLite's.
unsafe fn text<'a>(name: *const c_char) -> Option<&'a str> {
    if name.is_null() {
        return None;
    }
    // SAFETY: see above.
    unsafe { CStr::from_ptr(name) }.to_str().ok()
}

unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: sqlite3_filename,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: `file` points to `szOsFile` bytes; a null method table means "not open".
    unsafe { (*file).pMethods = std::ptr::null() };
    // SAFETY: a file name of SQLite's. Nameless temporary files do not occur: temp_store is MEMORY.
    let Some(Ok((disk, number, path))) = unsafe { text(name) }.map(parse) else { return SQLITE_CANTOPEN };
    let existed = matches!(disk.exists(&path), Ok(true));
    let opened = if flags & SQLITE_OPEN_CREATE != 0 { disk.create(&path) } else { disk.open(&path) };
    let Ok(handle) = opened else { return SQLITE_CANTOPEN };
    let key = (number, format!("{}#{path}", disk.epoch()));
    let shared = {
        let mut all = lock(&SHARED);
        all.retain(|_, shared| shared.strong_count() > 0);
        match all.get(&key).and_then(Weak::upgrade) {
            Some(shared) => shared,
            None => {
                let shared = Arc::<Mutex<Shared>>::default();
                all.insert(key, Arc::downgrade(&shared));
                shared
            }
        }
    };
    let boxed = Box::new(Inner {
        disk,
        path,
        file: handle,
        connection: NEXT_CONNECTION.fetch_add(1, Ordering::Relaxed),
        shared,
        sync_dir: !existed && flags & (SQLITE_OPEN_WAL | SQLITE_OPEN_MAIN_JOURNAL) != 0,
        delete_on_close: flags & SQLITE_OPEN_DELETEONCLOSE != 0,
        shm_mapped: false,
    });
    // SAFETY: `file` has room for an `OpenFile`; `out_flags` may be null.
    unsafe {
        (*file.cast::<OpenFile>()).inner = Box::into_raw(boxed);
        (*file).pMethods = &METHODS;
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    SQLITE_OK
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: opened by `open` and closed once.
    let inner = unsafe { Box::from_raw((*file.cast::<OpenFile>()).inner) };
    lock(&inner.shared).levels.remove(&inner.connection);
    if inner.delete_on_close {
        let _ = inner.disk.remove(&inner.path);
    }
    SQLITE_OK
}

unsafe extern "C" fn read(
    file: *mut sqlite3_file,
    buf: *mut c_void,
    amount: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: see `inner`; the buffer has `amount` bytes.
    let (inner, buf) =
        unsafe { (inner(file), std::slice::from_raw_parts_mut(buf.cast::<u8>(), amount as usize)) };
    match inner.file.read_at(buf, offset as u64) {
        Ok(read) if read == buf.len() => SQLITE_OK,
        Ok(read) => {
            buf[read..].fill(0);
            SQLITE_IOERR_SHORT_READ
        }
        Err(_) => SQLITE_IOERR_READ,
    }
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    buf: *const c_void,
    amount: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: see `inner`; the buffer has `amount` bytes.
    let (inner, buf) =
        unsafe { (inner(file), std::slice::from_raw_parts(buf.cast::<u8>(), amount as usize)) };
    match inner.file.write_at(buf, offset as u64) {
        Ok(()) => SQLITE_OK,
        Err(error) if error.kind() == io::ErrorKind::StorageFull => SQLITE_FULL,
        Err(_) => SQLITE_IOERR_WRITE,
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: see `inner`.
    match unsafe { inner(file) }.file.set_len(size as u64) {
        Ok(()) => SQLITE_OK,
        Err(_) => SQLITE_IOERR_TRUNCATE,
    }
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: see `inner`.
    let inner = unsafe { inner(file) };
    if inner.file.sync().is_err() {
        return SQLITE_IOERR_FSYNC;
    }
    if std::mem::take(&mut inner.sync_dir) && inner.disk.sync_dir(dir_of(&inner.path)).is_err() {
        return SQLITE_IOERR_DIR_FSYNC;
    }
    SQLITE_OK
}

fn dir_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    // SAFETY: see `inner`; `size` is SQLite's.
    match unsafe { inner(file) }.file.len() {
        Ok(len) => {
            // SAFETY: as above.
            unsafe { *size = len as sqlite3_int64 };
            SQLITE_OK
        }
        Err(_) => SQLITE_IOERR_FSTAT,
    }
}

unsafe extern "C" fn lock_file(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: see `inner`.
    let inner = unsafe { inner(file) };
    let mut shared = lock(&inner.shared);
    let own = shared.levels.get(&inner.connection).copied().unwrap_or(SQLITE_LOCK_NONE);
    if own >= level {
        return SQLITE_OK;
    }
    let others = || shared.levels.iter().filter(|(c, _)| **c != inner.connection).map(|(_, level)| *level);
    let highest = others().max().unwrap_or(SQLITE_LOCK_NONE);
    let granted = match level {
        SQLITE_LOCK_SHARED if highest < SQLITE_LOCK_PENDING => Some(SQLITE_LOCK_SHARED),
        SQLITE_LOCK_RESERVED if highest < SQLITE_LOCK_RESERVED => Some(SQLITE_LOCK_RESERVED),
        SQLITE_LOCK_EXCLUSIVE if highest == SQLITE_LOCK_NONE => Some(SQLITE_LOCK_EXCLUSIVE),
        // New readers are kept out while this one waits for the old ones.
        SQLITE_LOCK_EXCLUSIVE if highest < SQLITE_LOCK_RESERVED => {
            shared.levels.insert(inner.connection, SQLITE_LOCK_PENDING);
            None
        }
        _ => None,
    };
    match granted {
        Some(level) => {
            shared.levels.insert(inner.connection, level);
            SQLITE_OK
        }
        None => SQLITE_BUSY,
    }
}

unsafe extern "C" fn unlock_file(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: see `inner`.
    let inner = unsafe { inner(file) };
    let mut shared = lock(&inner.shared);
    if level == SQLITE_LOCK_NONE {
        shared.levels.remove(&inner.connection);
    } else {
        shared.levels.insert(inner.connection, level);
    }
    SQLITE_OK
}

unsafe extern "C" fn check_reserved_lock(file: *mut sqlite3_file, reserved: *mut c_int) -> c_int {
    // SAFETY: see `inner`; `reserved` is SQLite's.
    unsafe {
        let held = lock(&inner(file).shared).levels.values().any(|level| *level >= SQLITE_LOCK_RESERVED);
        *reserved = held as c_int;
    }
    SQLITE_OK
}

unsafe extern "C" fn file_control(_: *mut sqlite3_file, _op: c_int, _arg: *mut c_void) -> c_int {
    SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_: *mut sqlite3_file) -> c_int {
    512
}

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
    // SAFETY: see `inner`.
    let inner = unsafe { inner(file) };
    let mut shared = lock(&inner.shared);
    if !std::mem::replace(&mut inner.shm_mapped, true) {
        shared.shm.mapped += 1;
    }
    while extend != 0 && shared.shm.regions.len() <= region as usize {
        shared.shm.regions.push(vec![0u64; size as usize / 8].into_boxed_slice());
    }
    let address =
        shared.shm.regions.get_mut(region as usize).map_or(std::ptr::null_mut(), |r| r.as_mut_ptr().cast());
    // SAFETY: `out` is SQLite's. The region lives until the last connection unmaps.
    unsafe { *out = address };
    SQLITE_OK
}

unsafe extern "C" fn shm_lock(file: *mut sqlite3_file, first: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: see `inner`.
    let inner = unsafe { inner(file) };
    let me = inner.connection;
    let mut shared = lock(&inner.shared);
    let Some(slots) = shared.shm.slots.get_mut(first as usize..(first + count) as usize) else {
        return SQLITE_MISUSE;
    };
    if flags & SQLITE_SHM_UNLOCK != 0 {
        for slot in slots {
            slot.readers.retain(|c| *c != me);
            slot.writer = slot.writer.filter(|c| *c != me);
        }
        return SQLITE_OK;
    }
    let exclusive = flags & SQLITE_SHM_EXCLUSIVE != 0;
    let taken = |slot: &Slot| {
        slot.writer.is_some_and(|c| c != me) || (exclusive && slot.readers.iter().any(|c| *c != me))
    };
    if slots.iter().any(taken) {
        return SQLITE_BUSY;
    }
    for slot in slots {
        if exclusive {
            slot.writer = Some(me);
        } else if !slot.readers.contains(&me) {
            slot.readers.push(me);
        }
    }
    SQLITE_OK
}

unsafe extern "C" fn shm_barrier(_: *mut sqlite3_file) {
    std::sync::atomic::fence(Ordering::SeqCst);
}

unsafe extern "C" fn shm_unmap(file: *mut sqlite3_file, _delete: c_int) -> c_int {
    // SAFETY: see `inner`.
    let inner = unsafe { inner(file) };
    let me = inner.connection;
    let mut shared = lock(&inner.shared);
    if std::mem::take(&mut inner.shm_mapped) {
        shared.shm.mapped -= 1;
        for slot in &mut shared.shm.slots {
            slot.readers.retain(|c| *c != me);
            slot.writer = slot.writer.filter(|c| *c != me);
        }
        if shared.shm.mapped == 0 {
            shared.shm.regions.clear();
        }
    }
    SQLITE_OK
}

unsafe extern "C" fn delete(_: *mut sqlite3_vfs, name: *const c_char, sync_dir: c_int) -> c_int {
    // SAFETY: a file name of SQLite's.
    let Some(Ok((disk, _, path))) = unsafe { text(name) }.map(parse) else { return SQLITE_IOERR_DELETE };
    match disk.remove(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => SQLITE_IOERR_DELETE_NOENT,
        Err(_) => SQLITE_IOERR_DELETE,
        Ok(()) if sync_dir != 0 && disk.sync_dir(dir_of(&path)).is_err() => SQLITE_IOERR_DIR_FSYNC,
        Ok(()) => SQLITE_OK,
    }
}

unsafe extern "C" fn access(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    _flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: a file name of SQLite's.
    let Some(Ok((disk, _, path))) = unsafe { text(name) }.map(parse) else { return SQLITE_IOERR_ACCESS };
    // An empty file is as good as none, and SQLite must not take it for a journal.
    let there = disk.open(&path).and_then(|f| f.len()).is_ok_and(|len| len > 0);
    // SAFETY: `out` is SQLite's.
    unsafe { *out = there as c_int };
    SQLITE_OK
}

unsafe extern "C" fn full_pathname(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    size: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: `name` is a C string, `out` has `size` bytes.
    unsafe {
        let bytes = CStr::from_ptr(name).to_bytes_with_nul();
        if bytes.len() > size as usize {
            return SQLITE_CANTOPEN;
        }
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, bytes.len());
    }
    SQLITE_OK
}

unsafe extern "C" fn randomness(_: *mut sqlite3_vfs, size: c_int, out: *mut c_char) -> c_int {
    for at in 0..size as usize {
        let mut x = RANDOM.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        RANDOM.store(x, Ordering::Relaxed);
        // SAFETY: `out` has `size` bytes.
        unsafe { *out.add(at) = (x >> 32) as c_char };
    }
    size
}

/// In a simulation nobody waits for a lock: whoever holds it runs on the same thread. Where there are threads, a reader that
/// did not really wait would spend all its hundred tries while a writer is between two instructions.
unsafe extern "C" fn sleep(_: *mut sqlite3_vfs, micros: c_int) -> c_int {
    #[cfg(not(madsim))]
    std::thread::sleep(std::time::Duration::from_micros(micros.max(0) as u64));
    micros
}

unsafe extern "C" fn current_time_int64(_: *mut sqlite3_vfs, out: *mut sqlite3_int64) -> c_int {
    let source = *lock(&TIME);
    // SAFETY: `out` is SQLite's. It counts milliseconds since noon of 24 November 4714 BC.
    unsafe { *out = source() + 210_866_760_000_000 };
    SQLITE_OK
}

unsafe extern "C" fn current_time(_: *mut sqlite3_vfs, out: *mut f64) -> c_int {
    let source = *lock(&TIME);
    // SAFETY: `out` is SQLite's.
    unsafe { *out = (source() + 210_866_760_000_000) as f64 / 86_400_000.0 };
    SQLITE_OK
}

unsafe extern "C" fn last_error(_: *mut sqlite3_vfs, _: c_int, _: *mut c_char) -> c_int {
    0
}

#[cfg(test)]
mod tests {
    use super::super::open_sqlite;
    use super::*;
    use rusqlite::{Connection, OpenFlags};

    fn connect(disk: &SimDisk, synchronous: &str) -> rusqlite::Result<Connection> {
        let connection = open_sqlite(disk, "test.db", OpenFlags::default())?;
        connection.execute_batch(&format!(
            "PRAGMA page_size=1024; PRAGMA journal_mode=WAL; PRAGMA synchronous={synchronous};
             PRAGMA temp_store=MEMORY; PRAGMA wal_autocheckpoint=8;
             CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, body BLOB)"
        ))?;
        Ok(connection)
    }

    /// Inserts until power fails; returns how many inserts were confirmed.
    fn work(disk: &SimDisk, synchronous: &str) -> i64 {
        let Ok(connection) = connect(disk, synchronous) else { return 0 };
        let _ = disk.sync_dir("");
        let insert = |i: i64| connection.execute("INSERT INTO t VALUES (?1, randomblob(700))", [i]);
        (1..=20).take_while(|i| insert(*i).is_ok()).count() as i64
    }

    /// Cuts power at the `op`-th operation and says whether the database kept what it had confirmed.
    fn survives(seed: u64, op: u64, synchronous: &str) -> (bool, bool) {
        let disk = SimDisk::new(seed);
        disk.crash_at_op(op);
        let confirmed = work(&disk, synchronous);
        let finished = disk.is_powered();
        disk.power_off();
        disk.power_on();
        let check = || -> rusqlite::Result<bool> {
            let connection = connect(&disk, synchronous)?;
            let sound: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0))?;
            let rows: i64 = connection.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?;
            Ok(sound == "ok" && rows >= confirmed)
        };
        (check().unwrap_or(false), finished)
    }

    #[test]
    fn confirmed_transactions_survive_power_loss_at_every_operation() {
        begin_run(1);
        for seed in 0..6 {
            for op in 1.. {
                let (sound, finished) = survives(seed, op, "FULL");
                assert!(sound, "seed {seed}, power lost at operation {op}");
                if finished {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_database_that_never_syncs_is_caught() {
        begin_run(2);
        let lost = (0..40).filter(|seed| !survives(*seed, 100 + seed, "OFF").0).count();
        assert!(lost > 0, "the crash test found nothing wrong with synchronous=OFF");
    }

    #[test]
    fn readers_keep_their_snapshot_while_the_writer_commits() -> rusqlite::Result<()> {
        let disk = SimDisk::new(3);
        let writer = connect(&disk, "NORMAL")?;
        let mut reader = open_sqlite(&*disk, "test.db", OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        let count = |c: &Connection| c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0));
        let transaction = reader.transaction()?;
        assert_eq!(count(&transaction)?, 0);
        for i in 0..50 {
            writer.execute("INSERT INTO t VALUES (?1, randomblob(500))", [i])?;
        }
        assert_eq!(count(&transaction)?, 0);
        transaction.finish()?;
        assert_eq!(count(&reader)?, 50);
        Ok(())
    }
}
