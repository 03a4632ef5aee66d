//! The log on disks that lie: power lost at every operation of a workload.

use super::*;
use sim::disk::simulated::SimDisk;
use sim::disk::{File, SqliteLocation};
use std::collections::BTreeMap;

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
    synced: BTreeMap<u64, Vec<u8>>,
    /// Appended but not synced: may be there or not.
    loose: BTreeMap<u64, Vec<u8>>,
    base: u64,
    /// A purge or truncation that was under way when power failed.
    maybe_base: u64,
    maybe_cut: Option<u64>,
    vote: Vec<u8>,
    maybe_vote: Option<Vec<u8>>,
}

/// Appends, syncs, truncates, purges and votes, from where the log in `told` ends. `life` tells its payloads from others'.
fn work(disk: &Arc<dyn Disk>, told: &mut Told, life: u64) -> Result<(), LogError> {
    let log = Log::open(disk.clone(), "log", options())?;
    let mut next = log.last_index() + 1;
    for round in 0..14u64 {
        let several: Vec<_> = (next..=next + round % 4).map(|i| (i, payload(i, round + 20 * life))).collect();
        next += several.len() as u64;
        told.loose.extend(several.iter().cloned());
        log.append(&several.iter().map(|(i, b)| (*i, &b[..])).collect::<Vec<_>>())?;
        if round % 3 != 1 {
            log.sync()?;
            told.synced.append(&mut told.loose);
        }
        if round % 5 == 2 {
            let vote = payload(round, 99 + life);
            told.maybe_vote = Some(vote.clone());
            log.put_meta("vote", &vote)?;
            (told.vote, told.maybe_vote) = (vote, None);
        }
        // A short cut, and one across segments; the next round writes other entries in their place.
        let cut = [(4, 2), (8, 9)].iter().find(|(at, _)| *at == round);
        if let Some((_, back)) = cut {
            let from = next.saturating_sub(*back).max(told.base + 1);
            told.maybe_cut = Some(from);
            log.truncate_from(from)?;
            told.synced.split_off(&from);
            told.loose.split_off(&from);
            told.maybe_cut = None;
            next = from;
        }
        // Behind the synced end, among entries that are not synced yet, and beyond all.
        let purge = [(6, -4), (10, -2), (12, 3)].iter().find(|(at, _)| *at == round);
        if let Some((_, forth)) = purge {
            let to = next.saturating_add_signed(*forth).max(told.base);
            told.maybe_base = to;
            log.purge_to(to)?;
            told.base = to;
            next = next.max(to + 1);
            log.release_to(to - 2)?;
            log.settle()?;
        }
    }
    Ok(())
}

/// Whether the log, opened again, keeps what the workload was told. Returns what is there now.
fn check(disk: &Arc<dyn Disk>, told: &Told) -> Result<Told, String> {
    let log = Log::open(disk.clone(), "log", options()).map_err(|e| e.to_string())?;
    let base = log.first_index() - 1;
    if base != told.base && base != told.maybe_base {
        return Err(format!("base is {base}, not {} or {}", told.base, told.maybe_base));
    }
    let mut there = BTreeMap::new();
    for index in base + 1..=log.last_index() {
        let read = log.read(index..index + 1, 1).map_err(|e| e.to_string())?;
        there.insert(index, read[0].1.to_vec());
    }
    for (index, bytes) in told.synced.range(base + 1..) {
        let may_be_cut = told.maybe_cut.is_some_and(|from| *index >= from);
        match there.get(index) {
            None if may_be_cut => {}
            None => return Err(format!("synced entry {index} is gone")),
            Some(found) if found != bytes => return Err(format!("synced entry {index} differs")),
            Some(_) => {}
        }
    }
    for (index, bytes) in &there {
        if told.synced.get(index).or(told.loose.get(index)) != Some(bytes) {
            return Err(format!(
                "entry {index} holds what was never written there, or came back from the dead"
            ));
        }
    }
    let vote = log.get_meta("vote").map_err(|e| e.to_string())?.unwrap_or_default();
    if vote != told.vote && Some(&vote) != told.maybe_vote.as_ref() {
        return Err("the vote is neither the old nor the new one".into());
    }
    Ok(Told { synced: there, base, maybe_base: base, vote, ..Told::default() })
}

/// Loses power at every operation of a workload; then again while the log recovers; then again somewhere in a second
/// workload on what was left. The number of power losses, or the first violation.
fn crash_everywhere(seeds: u64, wrap: impl Fn(Arc<SimDisk>) -> Arc<dyn Disk>) -> Result<u64, String> {
    let mut crashes = 0;
    for seed in 0..seeds {
        for op in 1.. {
            let at = |e| format!("seed {seed}, power lost at operation {op}: {e}");
            let sim = SimDisk::new(seed * 1000 + op);
            let disk = wrap(sim.clone());
            let lose_power = || {
                sim.power_off();
                sim.power_on();
            };
            sim.crash_at_op(op);
            let mut told = Told::default();
            let finished = work(&disk, &mut told, 0).is_ok();
            lose_power();
            sim.crash_at_op(1 + (op + seed) % 5);
            let _recovering = Log::open(disk.clone(), "log", options());
            lose_power();
            // What an opened log shows is durable, also what the first workload had never synced.
            let mut told = check(&disk, &told).map_err(at)?;
            lose_power();
            sim.crash_at_op(1 + (op * 7 + seed * 13) % 90);
            let _result = work(&disk, &mut told, 1);
            lose_power();
            check(&disk, &told).map_err(|e| at(format!("second life: {e}")))?;
            crashes += 4;
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
    assert!(crashes > 5000, "only {crashes} power losses: the workload shrank");
    Ok(())
}

#[test]
fn what_an_opened_log_shows_is_durable_even_if_only_the_process_had_died() -> Result<(), LogError> {
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let log = Log::open(disk.clone(), "log", options())?;
        for index in 1..=1 + seed % 12 {
            log.append(&[(index, &payload(index, seed))])?;
        }
        disk.crash_process();
        disk.power_on();
        let shown = Log::open(disk.clone(), "log", options())?.last_index();
        disk.power_off();
        disk.power_on();
        let log = Log::open(disk, "log", options())?;
        assert_eq!((shown, log.last_index()), (1 + seed % 12, shown), "seed {seed}");
    }
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
fn damage_to_any_durable_byte_is_found_and_what_lies_before_it_is_kept() -> Result<(), LogError> {
    let options = || LogOptions { segment_bytes_max: 400, cache_bytes_max: 1000 };
    let filled = || -> Result<(Arc<SimDisk>, Vec<String>), LogError> {
        let disk = SimDisk::new(1);
        let log = Log::open(disk.clone(), "log", options())?;
        for index in 1..=6 {
            log.append(&[(index, &payload(index, 0))])?;
            log.sync()?;
        }
        let names = disk.list("log").map_err(io_error("list"))?;
        Ok((disk, names.into_iter().filter(|n| n.ends_with(".log")).collect()))
    };
    let (disk, names) = filled()?;
    assert!(names.len() > 1);
    for name in &names {
        let file = disk.open(&format!("log/{name}")).map_err(io_error("open"))?;
        for at in 0..file.len().map_err(io_error("len"))? {
            let mut byte = [0];
            file.read_at(&mut byte, at).map_err(io_error("read"))?;
            file.write_at(&[byte[0] ^ 1 << (at % 8)], at).map_err(io_error("write"))?;
            match Log::open(disk.clone(), "log", options()) {
                Err(LogError::Corrupt { file, offset, .. }) => assert!(file == *name && offset <= at),
                Err(other) => return Err(other),
                Ok(log) => panic!("{name} opened with {} entries, byte {at} being damaged", log.last_index()),
            }
            if at % 64 == 0 {
                let (other, _) = filled()?;
                let copy = other.open(&format!("log/{name}")).map_err(io_error("open"))?;
                copy.write_at(&[byte[0] ^ 1 << (at % 8)], at).map_err(io_error("write"))?;
                let log = Log::open_or_cut(other.clone(), "log", options())?;
                let repair = log.repair()?.expect("it was cut");
                assert_eq!((repair.to, log.last_index()), (6, repair.from - 1));
                for (index, bytes) in log.read(1..repair.from, usize::MAX)? {
                    assert_eq!(*bytes, *payload(index, 0));
                }
                // The peers give back what was lost; a crash in between forgets nothing of it.
                drop(log);
                other.power_off();
                other.power_on();
                let log = Log::open(other, "log", options())?;
                assert_eq!(log.repair()?, Some(repair));
                for index in repair.from..=6 {
                    log.append(&[(index, &payload(index, 0))])?;
                }
                log.end_repair()?;
                assert_eq!((log.repair()?, log.read(1..7, usize::MAX)?.len()), (None, 6));
            }
            file.write_at(&byte, at).map_err(io_error("write"))?;
        }
        // A whole segment that is gone.
        disk.rename(&format!("log/{name}"), "log/elsewhere").map_err(io_error("rename"))?;
        assert!(Log::open(disk.clone(), "log", options()).is_err(), "{name} is not missed");
        disk.rename("log/elsewhere", &format!("log/{name}")).map_err(io_error("rename"))?;
    }
    assert_eq!(Log::open(disk, "log", options())?.last_index(), 6);
    Ok(())
}

#[test]
fn an_entry_whose_end_lies_on_a_lost_sector_is_kept_and_can_be_read() -> Result<(), LogError> {
    let (mut kept, mut cut) = (0, 0);
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let log = Log::open(disk.clone(), "log", LogOptions::default())?;
        for index in 1..=6 {
            // Zeroes, and something else before them.
            let mut bytes = payload(index, seed);
            bytes.resize(1000, 0);
            log.append(&[(index, &bytes)])?;
        }
        log.sync()?;
        log.settle()?;
        drop(log);
        disk.lose_a_sector("log");
        let log = Log::open_or_cut(disk.clone(), "log", LogOptions::default())?;
        match log.repair()? {
            Some(repair) => assert_eq!((log.last_index(), repair.to), (repair.from - 1, 6), "seed {seed}"),
            None => assert_eq!(log.last_index(), 6, "seed {seed}"),
        }
        *(if log.repair()?.is_some() { &mut cut } else { &mut kept }) += 1;
        let next = log.last_index() + 1;
        log.append(&[(next, b"more")])?;
        log.sync()?;
        drop(log);
        disk.power_off();
        disk.power_on();
        // Nothing from the cache: from the disk.
        let log = Log::open(disk, "log", LogOptions { cache_bytes_max: 0, ..LogOptions::default() })?;
        let entries = log.read(1..next + 1, usize::MAX)?;
        assert_eq!(entries.last().map(|(_, bytes)| &**bytes), Some(&b"more"[..]), "seed {seed}");
        for (index, bytes) in &entries[..next as usize - 1] {
            assert_eq!(bytes[..20], payload(*index, seed)[..20], "seed {seed}, entry {index}");
        }
    }
    assert!(kept > 5 && cut > 5, "{kept} kept, {cut} cut");
    Ok(())
}

#[test]
fn a_second_cut_keeps_what_came_back_after_the_first() -> Result<(), LogError> {
    let disk = SimDisk::new(1);
    let log = Log::open(disk.clone(), "log", LogOptions::default())?;
    for index in 1..=20 {
        log.append(&[(index, &payload(index, 0))])?;
    }
    log.sync()?;
    // An earlier repair is not done yet; a purge has gone into the segment since.
    log.put_meta(REPAIR, &codec::encode(&Repair { from: 1, to: 9 }))?;
    log.purge_to(10)?;
    let at = lock(&log.state).segments[0].offset(15);
    drop(log);
    let file = disk.open(&format!("log/{}", segment::name(1))).map_err(io_error("open"))?;
    file.write_at(b"!", at + 30).map_err(io_error("write"))?;
    let log = Log::open_or_cut(disk, "log", LogOptions::default())?;
    assert_eq!((log.first_index(), log.last_index()), (11, 14));
    assert_eq!(log.repair()?, Some(Repair { from: 1, to: 20 }));
    Ok(())
}

#[test]
fn a_log_of_another_version_is_refused_and_left_alone() -> Result<(), LogError> {
    for version in [b'1', b'4'] {
        let disk = SimDisk::new(1);
        let log = Log::open(disk.clone(), "log", LogOptions::default())?;
        log.append(&[(1, b"one")])?;
        log.sync()?;
        let file = disk.open(&format!("log/{}", segment::name(1))).map_err(io_error("open"))?;
        let mut head = [0; 16];
        file.read_at(&mut head, 0).map_err(io_error("read"))?;
        head[7] = version;
        file.write_at(&head, 0).map_err(io_error("write"))?;
        if version != b'1' {
            file.write_at(&crc32c::crc32c(&head).to_le_bytes(), 16).map_err(io_error("write"))?;
        }
        let before = file.len().map_err(io_error("len"))?;
        let opened = Log::open_or_cut(disk, "log", LogOptions::default());
        assert!(matches!(opened, Err(LogError::Version { version: v, .. }) if v == version as char));
        assert_eq!(file.len().map_err(io_error("len"))?, before);
    }
    Ok(())
}

#[test]
fn the_last_synced_entry_is_known_to_be_durable_once_the_log_was_idle() -> Result<(), LogError> {
    for seed in 0..40 {
        let disk = SimDisk::new(seed);
        let log = Log::open(disk.clone(), "log", LogOptions::default())?;
        log.append(&[(1, &payload(1, 0)), (2, &payload(2, 0))])?;
        log.sync()?;
        log.settle()?;
        disk.power_off();
        disk.power_on();
        let file = disk.open(&format!("log/{}", segment::name(1))).map_err(io_error("open"))?;
        let end = file.len().map_err(io_error("len"))?;
        if seed % 2 == 0 {
            file.write_at(b"!", end - 3).map_err(io_error("write"))?;
        } else {
            file.set_len(end - 5).map_err(io_error("cut"))?;
        }
        assert!(matches!(Log::open(disk, "log", LogOptions::default()), Err(LogError::Corrupt { .. })));
    }
    Ok(())
}

#[test]
fn purged_entries_can_be_replayed_until_they_are_released() -> Result<(), LogError> {
    let disk = SimDisk::new(1);
    let options = || LogOptions { segment_bytes_max: 1500, cache_bytes_max: 1000 };
    let mut log = Log::open(disk.clone(), "log", options())?;
    for index in 1..=20 {
        log.append(&[(index, &payload(index, 0))])?;
    }
    log.sync()?;
    log.purge_to(15)?;
    for turn in 0..2 {
        let mut seen = 3;
        log.replay(3..19, &mut |index, bytes| -> Result<(), LogError> {
            assert_eq!((index, bytes), (seen, &payload(index, 0)[..]));
            seen += 1;
            Ok(())
        })?;
        assert_eq!((seen, log.first_index(), log.kept_from()), (19, 16, 1), "turn {turn}");
        drop(log);
        log = Log::open(disk.clone(), "log", options())?;
    }
    let before = log.bytes_after(2);
    log.release_to(9)?;
    let mut first = u64::MAX;
    log.replay(10..16, &mut |index, _| -> Result<(), LogError> {
        first = first.min(index);
        Ok(())
    })?;
    assert!(first == 10 && log.bytes_after(2) < before);
    assert!((2..=10).contains(&log.kept_from()), "{}", log.kept_from());
    log.replay::<LogError>(log.kept_from()..21, &mut |_, _| Ok(()))?;
    assert!(matches!(log.replay::<LogError>(1..16, &mut |_, _| Ok(())), Err(LogError::Missing { .. })));
    log.purge_to(30)?;
    assert_eq!(log.kept_from(), 31, "what lies behind a gap does not continue what lay before");
    assert!(log.replay::<LogError>(16..20, &mut |_, _| Ok(())).is_err());
    log.start_over()?;
    assert_eq!(
        (log.first_index(), log.last_index(), log.repair()?),
        (1, 0, Some(Repair { from: 1, to: 30 }))
    );
    Ok(())
}

proptest::proptest! {
    #[test]
    fn the_log_agrees_with_a_plain_map(ops in proptest::collection::vec((0..6u8, 0..12u64), 1..60)) {
        let disk = SimDisk::new(1);
        let mut log = Log::open(disk.clone(), "log", options()).expect("opens");
        let (mut model, mut base, mut last) = (BTreeMap::new(), 0, 0);
        for (round, (op, n)) in ops.into_iter().enumerate() {
            match op {
                0 | 1 => {
                    let several: Vec<_> = (last + 1..=last + n).map(|i| (i, payload(i, round as u64))).collect();
                    log.append(&several.iter().map(|(i, b)| (*i, &b[..])).collect::<Vec<_>>()).expect("appends");
                    model.extend(several);
                    last += n;
                }
                2 => assert_eq!(log.sync().expect("syncs"), last),
                3 => {
                    let from = (last + 1).saturating_sub(n).max(base + 1);
                    log.truncate_from(from).expect("truncates");
                    model.split_off(&from);
                    last = last.min(from - 1);
                }
                4 => {
                    base = base.max((last + 3).saturating_sub(n));
                    log.purge_to(base).expect("purges");
                    log.release_to(base.saturating_sub(5)).expect("releases");
                    model = model.split_off(&(base + 1));
                    last = last.max(base);
                }
                _ => {
                    drop(log);
                    log = Log::open(disk.clone(), "log", options()).expect("opens again");
                }
            }
            assert_eq!((log.first_index(), log.last_index()), (base + 1, last));
            let mut found = BTreeMap::new();
            while base + (found.len() as u64) < last {
                let next = base + 1 + found.len() as u64;
                found.extend(log.read(next..last + 1, 1500).expect("reads").into_iter().map(|(i, p)| (i, p.to_vec())));
            }
            assert_eq!(found, model);
        }
    }
}

#[test]
fn bad_calls_are_refused_and_change_nothing() -> Result<(), LogError> {
    let disk = SimDisk::new(1);
    let log = Log::open(disk, "log", LogOptions::default())?;
    log.append(&[(1, b"one"), (2, b"two")])?;
    assert!(matches!(log.append(&[(4, b"gap")]), Err(LogError::Order { expected: 3, got: 4 })));
    assert!(matches!(
        log.append(&[(3, b"three"), (3, b"twice")]),
        Err(LogError::Order { expected: 4, got: 3 })
    ));
    assert!(matches!(log.append(&[(3, &vec![0; PAYLOAD_BYTES_MAX + 1])]), Err(LogError::TooLarge { .. })));
    assert!(matches!(log.put_meta("vote", &vec![0; FACT_BYTES_MAX + 1]), Err(LogError::TooLarge { .. })));
    assert!(matches!(log.read(2..4, usize::MAX), Err(LogError::Missing { index: 3, first: 1, last: 2 })));
    assert_eq!(log.get_meta("vote")?, None);
    assert_eq!((log.sync()?, log.read(1..3, 1)?.len(), log.read(1..3, 6)?.len()), (2, 1, 2));
    Ok(())
}

#[test]
fn what_a_failed_sync_left_in_doubt_is_durable_once_the_log_is_open_again() -> Result<(), LogError> {
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let log = Log::open(disk.clone(), "log", LogOptions::default())?;
        log.append(&[(1, &payload(1, seed))])?;
        log.sync()?;
        log.append(&[(2, &payload(2, seed)), (3, &payload(3, seed))])?;
        disk.set_faults(sim::disk::simulated::DiskFaults { sync_fail_one_in: 1, ..Default::default() });
        assert!(log.sync().is_err());
        disk.set_faults(Default::default());
        disk.crash_process();
        disk.power_on();
        let shown = Log::open(disk.clone(), "log", LogOptions::default())?.last_index();
        disk.power_off();
        disk.power_on();
        let log = Log::open(disk, "log", LogOptions::default())?;
        assert_eq!((log.last_index(), log.read(1..4, usize::MAX)?.len()), (shown, 3), "seed {seed}");
    }
    Ok(())
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
    assert!(matches!(log.put_meta("vote", b"me"), Err(LogError::Poisoned)));
    Ok(())
}
