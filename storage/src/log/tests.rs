//! The log on disks that lie: power lost at every operation of a workload.

use super::*;
use sim::disk::simulated::SimDisk;
use sim::disk::{File, SqliteLocation};

fn payload(index: u64, round: u64) -> Vec<u8> {
    let len = 20 + (index * 37 + round * 11) % 900;
    (0..len).map(|i| (i * 7 + index * 13 + round * 101) as u8).collect()
}

fn options() -> LogOptions {
    LogOptions { segment_bytes_max: 4000, cache_bytes_max: 1000 }
}

/// What the workload was told: entries that must be there, and what must never come back.
#[derive(Default)]
struct Told {
    /// Durable entries by index.
    synced: std::collections::BTreeMap<u64, Vec<u8>>,
    /// Appended but not synced: may be there or not.
    loose: std::collections::BTreeMap<u64, Vec<u8>>,
    base: u64,
    /// A purge or truncation that was under way when power failed.
    maybe_base: u64,
    maybe_cut: Option<u64>,
    vote: Vec<u8>,
    maybe_vote: Option<Vec<u8>>,
}

fn work(disk: &Arc<dyn Disk>, told: &mut Told) -> Result<(), LogError> {
    let log = Log::open(disk.clone(), "log", options())?;
    let mut next = 1;
    for round in 0..12u64 {
        for _ in 0..=round % 4 {
            let bytes = payload(next, round);
            told.loose.insert(next, bytes.clone());
            log.append(&[(next, &bytes)])?;
            next += 1;
        }
        if round % 3 != 1 {
            log.sync()?;
            told.synced.append(&mut told.loose);
        }
        if round % 5 == 2 {
            let vote = payload(round, 99);
            told.maybe_vote = Some(vote.clone());
            log.put_meta("vote", &vote)?;
            (told.vote, told.maybe_vote) = (vote, None);
        }
        if round == 4 || round == 8 {
            let from = next - 2;
            told.maybe_cut = Some(from);
            log.truncate_from(from)?;
            told.synced.split_off(&from);
            told.loose.split_off(&from);
            told.maybe_cut = None;
            next = from;
        }
        if round == 7 || round == 10 {
            let to = next - 4;
            told.maybe_base = to;
            log.purge_to(to)?;
            told.base = to;
        }
    }
    Ok(())
}

/// Whether the log, opened again, keeps what the workload was told.
fn check(disk: &Arc<dyn Disk>, told: &Told) -> Result<(), String> {
    let log = Log::open(disk.clone(), "log", options()).map_err(|e| e.to_string())?;
    let base = log.first_index() - 1;
    if base != told.base && base != told.maybe_base {
        return Err(format!("base is {base}, not {} or {}", told.base, told.maybe_base));
    }
    for (index, bytes) in told.synced.range(base + 1..) {
        let may_be_cut = told.maybe_cut.is_some_and(|from| *index >= from);
        if *index > log.last_index() && may_be_cut {
            continue;
        }
        let read = log.read(*index..index + 1, 1).map_err(|e| format!("synced entry is gone: {e}"))?;
        if read[0].1[..] != bytes[..] {
            return Err(format!("entry {index} differs"));
        }
    }
    let known_last = told.synced.keys().chain(told.loose.keys()).max().copied().unwrap_or(0).max(base);
    if log.last_index() > known_last {
        return Err(format!("entry {} came back from the dead", log.last_index()));
    }
    for index in base + 1..=log.last_index() {
        let read = log.read(index..index + 1, 1).map_err(|e| e.to_string())?;
        let expected = told.synced.get(&index).or(told.loose.get(&index));
        if expected.is_none_or(|e| e[..] != read[0].1[..]) {
            return Err(format!("entry {index} holds what was never written there"));
        }
    }
    let vote = log.get_meta("vote").map_err(|e| e.to_string())?.unwrap_or_default();
    if vote != told.vote && Some(&vote) != told.maybe_vote.as_ref() {
        return Err("the vote is neither the old nor the new one".into());
    }
    Ok(())
}

/// Loses power at every operation, in several loss modes. The first violation found.
fn crash_everywhere(seeds: u64, wrap: impl Fn(Arc<SimDisk>) -> Arc<dyn Disk>) -> Result<u64, String> {
    let mut crashes = 0;
    for seed in 0..seeds {
        for op in 1.. {
            let sim = SimDisk::new(seed * 1000 + op);
            sim.crash_at_op(op);
            let disk = wrap(sim.clone());
            let mut told = Told::default();
            let finished = work(&disk, &mut told).is_ok();
            sim.power_off();
            sim.power_on();
            check(&disk, &told).map_err(|e| format!("seed {seed}, power lost at operation {op}: {e}"))?;
            crashes += 1;
            if finished {
                break;
            }
        }
    }
    Ok(crashes)
}

#[test]
fn synced_entries_survive_power_loss_at_every_operation() -> Result<(), String> {
    let crashes = crash_everywhere(30, |disk| disk)?;
    assert!(crashes > 2000, "only {crashes} crash points: the workload shrank");
    Ok(())
}

/// A disk that forgets to do something.
struct Lazy {
    disk: Arc<SimDisk>,
    sync: bool,
    sync_dir: bool,
}

struct LazyFile(Arc<dyn File>, bool);

impl File for LazyFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn sync(&self) -> io::Result<()> {
        if self.1 { self.0.sync() } else { Ok(()) }
    }
}

impl Disk for Lazy {
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(LazyFile(self.disk.open(path)?, self.sync)))
    }
    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(LazyFile(self.disk.create(path)?, self.sync)))
    }
    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        if self.sync_dir { self.disk.sync_dir(dir) } else { Ok(()) }
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn exists(&self, path: &str) -> io::Result<bool> {
        self.disk.exists(path)
    }
    fn sqlite(&self, path: &str) -> io::Result<SqliteLocation> {
        self.disk.sqlite(path)
    }
}

#[test]
fn a_sync_that_does_nothing_is_caught() {
    let lazy = |disk| Arc::new(Lazy { disk, sync: false, sync_dir: true }) as Arc<dyn Disk>;
    assert!(crash_everywhere(5, lazy).is_err());
}

#[test]
fn a_forgotten_directory_sync_is_caught() {
    let lazy = |disk| Arc::new(Lazy { disk, sync: true, sync_dir: false }) as Arc<dyn Disk>;
    assert!(crash_everywhere(5, lazy).is_err());
}

#[test]
fn damage_below_the_durable_mark_is_an_error_and_not_cut() -> Result<(), LogError> {
    let disk = SimDisk::new(1);
    let log = Log::open(disk.clone(), "log", LogOptions::default())?;
    for index in 1..=9 {
        log.append(&[(index, &payload(index, 0))])?;
        log.sync()?;
    }
    let file = disk.open(&format!("log/{}", segment::name(1))).map_err(io_error("open"))?;
    file.write_at(&[0xee], 300).map_err(io_error("write"))?;
    match Log::open(disk, "log", LogOptions::default()) {
        Err(LogError::Corrupt { .. }) => Ok(()),
        Err(other) => Err(other),
        Ok(log) => panic!("opened with {} of 9 entries", log.last_index()),
    }
}

#[test]
fn a_failed_sync_poisons_the_log() -> Result<(), LogError> {
    let disk = SimDisk::new(1);
    let log = Log::open(disk.clone(), "log", LogOptions::default())?;
    log.append(&[(1, b"x")])?;
    disk.set_faults(sim::disk::simulated::DiskFaults { sync_fail_one_in: 1, ..Default::default() });
    assert!(log.sync().is_err());
    disk.set_faults(Default::default());
    assert!(matches!(log.sync(), Err(LogError::Poisoned)));
    assert!(matches!(log.append(&[(2, b"y")]), Err(LogError::Poisoned)));
    Ok(())
}
