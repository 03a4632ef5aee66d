//! Simulation: a disk in memory that lies the way disks do.
//!
//! Each file has what readers see and what the platter holds, and the writes in between since its last sync; each directory
//! likewise has entries, durable entries, and changes in between. A power loss draws a mode (how harsh this one is), then
//! decides every pending write and entry on its own. Handles carry the epoch of power they were opened in: old ones fail
//! for ever.
//!
//! A sync takes time, but the call returns at once and its latency is slept off afterwards ([`super`]). With
//! [`SimDisk::defer_syncs`] it reaches the platter only when that has been slept: who acknowledges before waiting is caught.
//! Power lost in between stops the disk at a random one of the syncs under way, and what was done after that one never happened.
//!
//! Plain data and a generator of its own: it runs in either world, so its tests do too.

use super::{Disk, File, SqliteLocation};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

const SECTOR: usize = 512;
/// The error number of a sector that cannot be read.
const EIO: i32 = 5;
/// Longer than any run.
const FOR_EVER: Duration = Duration::from_secs(10 * 86_400);

/// Faults beside power loss.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFaults {
    /// One sync in this many fails; 0: none.
    pub sync_fail_one_in: u32,
    /// Writes that would make a file longer fail with `StorageFull`.
    pub full: bool,
    /// One write in this many to the files of [`DiskFaults::misdirect_in`] lands some sectors away; 0: none.
    pub misdirect_one_in: u32,
    /// The directory whose files' writes may be misdirected.
    pub misdirect_in: &'static str,
    /// Syncs report success and do nothing, as a cache that lies does. No software survives that; it is for testing the tests.
    pub syncs_lie: bool,
    /// Every operation takes for ever: whoever sleeps off its latency never wakes.
    pub stuck: bool,
    /// Cost of one read or write.
    pub latency: Duration,
    pub sync_latency: Duration,
    /// What can be read or written in a second; 0: any number of bytes.
    pub bytes_per_s: u64,
}

/// What happened so far: proof that faults took place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounters {
    pub reads: u64,
    pub writes: u64,
    pub syncs: u64,
    pub bytes_written: u64,
    pub power_losses: u64,
    pub writes_lost: u64,
    pub writes_torn: u64,
    pub entries_lost: u64,
    pub sync_failures: u64,
    pub bits_flipped: u64,
    pub sectors_lost: u64,
    /// Reads that met a lost sector.
    pub read_errors: u64,
    pub writes_misdirected: u64,
    /// Writes that found the disk full.
    pub writes_refused: u64,
    pub operations_stuck: u64,
}

impl DiskCounters {
    /// Each fault by its name, and how often it took place.
    pub fn faults(&self) -> [(&'static str, u64); 10] {
        [
            ("disk: power losses", self.power_losses),
            ("disk: unsynced writes lost", self.writes_lost),
            ("disk: unsynced writes torn", self.writes_torn),
            ("disk: directory entries lost", self.entries_lost),
            ("disk: syncs failed", self.sync_failures),
            ("disk: bits flipped", self.bits_flipped),
            ("disk: reads of lost sectors", self.read_errors),
            ("disk: writes misdirected", self.writes_misdirected),
            ("disk: writes refused, full", self.writes_refused),
            ("disk: operations stuck", self.operations_stuck),
        ]
    }
}

/// One operation, for the trace.
pub struct DiskEvent<'a> {
    pub op: &'static str,
    pub path: &'a str,
    pub offset: u64,
    pub len: usize,
    pub content_hash: u64,
}

type Observer = Box<dyn Fn(DiskEvent<'_>) + Send + Sync>;

pub struct SimDisk {
    number: usize,
    state: Mutex<State>,
    observer: Mutex<Option<Arc<Observer>>>,
}

struct State {
    random: u64,
    powered: bool,
    /// There is no process on the machine: destructors of the last one reach nothing.
    deserted: bool,
    /// Handles of an earlier epoch are dead.
    epoch: u64,
    crash_at_op: Option<u64>,
    /// The next power loss takes all that was not synced.
    harsh: bool,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    entries: BTreeMap<String, u64>,
    durable_entries: BTreeMap<String, u64>,
    pending_entries: Vec<(u64, EntryChange)>,
    /// Numbers every change and sync in the order of their calls.
    calls: u64,
    /// The calls whose latency somebody has taken to sleep it off.
    taken: u64,
    defer_syncs: bool,
    /// Syncs whose time has not passed yet, in the order of their calls.
    under_way: Vec<(u64, Synced)>,
    /// The calls of each who waits for them to be done.
    waiting: Vec<RangeInclusive<u64>>,
    dirs: BTreeSet<String>,
    faults: DiskFaults,
    counters: DiskCounters,
    debt: Duration,
}

#[derive(Default)]
struct Inode {
    seen: Vec<u8>,
    platter: Vec<u8>,
    pending: Vec<(u64, Pending)>,
    /// Sectors that cannot be read until they are written again.
    lost: BTreeSet<usize>,
}

/// What a sync makes durable.
enum Synced {
    File { inode: u64, writes: Vec<(u64, Pending)> },
    Dir { path: String, changes: Vec<(u64, EntryChange)> },
}

impl Synced {
    fn same_target(&self, other: &Synced) -> bool {
        match (self, other) {
            (Synced::File { inode: a, .. }, Synced::File { inode: b, .. }) => a == b,
            (Synced::Dir { path: a, .. }, Synced::Dir { path: b, .. }) => a == b,
            _ => false,
        }
    }

    /// Whether some of what is made durable was changed by these calls.
    fn has_changes_of(&self, calls: &RangeInclusive<u64>) -> bool {
        match self {
            Synced::File { writes, .. } => writes.iter().any(|(call, _)| calls.contains(call)),
            Synced::Dir { changes, .. } => changes.iter().any(|(call, _)| calls.contains(call)),
        }
    }
}

enum Pending {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

/// One atomic change of directory entries: each path gets an inode or loses it.
#[derive(Clone)]
struct EntryChange {
    dir: String,
    sets: Vec<(String, Option<u64>)>,
}

/// How much of what was not synced a power loss takes.
#[derive(Clone, Copy)]
enum LossMode {
    All,
    None,
    Some,
    Torn,
    Tail,
}

static DISKS: Mutex<Vec<Weak<SimDisk>>> = Mutex::new(vec![]);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The error of a disk without power.
pub fn power_is_off() -> io::Error {
    io::Error::other("power is off")
}

fn not_found(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{path}: no such file"))
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hash = crate::trace::Hash::default();
    hash.bytes(bytes);
    hash.value()
}

impl Pending {
    fn apply(&self, data: &mut Vec<u8>) {
        match self {
            Pending::Write { offset, bytes } => write_into(data, *offset, bytes),
            Pending::SetLen(len) => data.resize(*len, 0),
        }
    }
}

fn write_into(data: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if data.len() < offset + bytes.len() {
        data.resize(offset + bytes.len(), 0);
    }
    data[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl State {
    /// xorshift64*: this disk's own randomness.
    fn next(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((self.next() as u128 * bound as u128) >> 64) as u64
    }

    /// Every operation passes here; those that change something count towards a planned crash.
    fn enter(&mut self, epoch: Option<u64>, changes: bool) -> io::Result<()> {
        if changes && let Some(left) = &mut self.crash_at_op {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.cut_power();
            }
        }
        if !self.powered || self.deserted || epoch.is_some_and(|e| e != self.epoch) {
            return Err(power_is_off());
        }
        self.debt += self.faults.latency;
        if self.faults.stuck {
            self.counters.operations_stuck += 1;
            self.debt = self.debt.max(FOR_EVER);
        }
        Ok(())
    }

    /// Bytes pass between the disk and its machine.
    fn carry(&mut self, bytes: usize) {
        if let Some(ns) = (bytes as u64 * 1_000_000_000).checked_div(self.faults.bytes_per_s) {
            self.debt += Duration::from_nanos(ns);
        }
    }

    /// A file under `dir` with something in it, and one of its bytes.
    fn some_byte(&mut self, dir: &str) -> Option<(u64, usize)> {
        let files: Vec<(u64, usize)> = self
            .entries
            .iter()
            .filter(|(path, _)| lies_in(path, dir))
            .filter_map(|(_, id)| Some((*id, self.inodes.get(id)?.seen.len())))
            .filter(|(_, len)| *len > 0)
            .collect();
        let (id, len) = *files.get(self.below(files.len() as u64) as usize)?;
        Some((id, self.below(len as u64) as usize))
    }

    /// What is said of a lost sector.
    fn read_error(&mut self) -> io::Error {
        self.counters.read_errors += 1;
        io::Error::from_raw_os_error(EIO)
    }

    fn cut_power(&mut self) {
        self.crash_at_op = None;
        if self.powered {
            self.powered = false;
            self.epoch += 1;
            self.counters.power_losses += 1;
        }
    }

    fn change_entries(&mut self, dir: &str, sets: Vec<(String, Option<u64>)>) {
        for (path, inode) in &sets {
            match inode {
                Some(inode) => self.entries.insert(path.clone(), *inode),
                None => self.entries.remove(path),
            };
        }
        let call = self.call();
        self.pending_entries.push((call, EntryChange { dir: dir.to_string(), sets }));
    }

    fn call(&mut self) -> u64 {
        self.calls += 1;
        self.calls
    }

    /// A sync was called: it is done now, or when its time has passed.
    fn sync(&mut self, what: Synced) {
        let call = self.call();
        self.under_way.push((call, what));
        if !self.defer_syncs {
            self.finish_syncs(call..=call);
        }
    }

    /// These syncs are done, and with each the earlier ones of the same file or directory; and all those of whoever else called one of them, or made
    /// changes that are durable now: a file is changed by one at a time, who lets go of it when all is done.
    fn finish_syncs(&mut self, calls: RangeInclusive<u64>) {
        let mut finished: Vec<bool> = self.under_way.iter().map(|(call, _)| calls.contains(call)).collect();
        let mut looked = vec![false; finished.len()];
        while let Some(at) = (0..finished.len()).rev().find(|at| finished[*at] && !looked[*at]) {
            looked[at] = true;
            let (call, synced) = &self.under_way[at];
            let makers = self.waiting.iter().filter(|of| of.contains(call) || synced.has_changes_of(of));
            let makers: Vec<&RangeInclusive<u64>> = makers.collect();
            for (other, (called, earlier)) in self.under_way.iter().enumerate() {
                finished[other] |= (other < at && synced.same_target(earlier))
                    || makers.iter().any(|of| of.contains(called));
            }
        }
        let mut finished = finished.into_iter();
        for (call, synced) in std::mem::take(&mut self.under_way) {
            match synced {
                synced if finished.next() != Some(true) => self.under_way.push((call, synced)),
                Synced::File { inode, writes } => {
                    if let Some(inode) = self.inodes.get_mut(&inode) {
                        writes.iter().for_each(|(_, write)| write.apply(&mut inode.platter));
                    }
                }
                Synced::Dir { changes, .. } => {
                    changes.into_iter().for_each(|(_, change)| self.settle_entry(change, true));
                }
            }
        }
    }

    /// Power went during one of the syncs under way: those before it are done, what was called after it never was.
    fn stop_in_time(&mut self) {
        self.waiting.clear();
        let stopped = if self.harsh { 0 } else { self.below(self.under_way.len() as u64 + 1) as usize };
        let Some(stop) = self.under_way.get(stopped).map(|(call, _)| *call) else {
            return self.finish_syncs(0..=u64::MAX);
        };
        self.finish_syncs(0..=stop - 1);
        for (_, synced) in std::mem::take(&mut self.under_way).into_iter().rev() {
            match synced {
                Synced::File { inode, writes } => {
                    if let Some(inode) = self.inodes.get_mut(&inode) {
                        inode.pending.splice(0..0, writes);
                    }
                }
                Synced::Dir { changes, .. } => drop(self.pending_entries.splice(0..0, changes)),
            }
        }
        self.pending_entries.sort_by_key(|(call, _)| *call);
        self.pending_entries.retain(|(call, _)| *call < stop);
        self.inodes.values_mut().for_each(|inode| inode.pending.retain(|(call, _)| *call < stop));
    }

    /// Makes one change of entries durable, or loses it.
    fn settle_entry(&mut self, change: EntryChange, kept: bool) {
        if !kept {
            self.counters.entries_lost += 1;
            return;
        }
        for (path, inode) in change.sets {
            match inode {
                Some(inode) => self.durable_entries.insert(path, inode),
                None => self.durable_entries.remove(&path),
            };
        }
    }

    /// Decides what survived a power loss.
    fn settle(&mut self) {
        self.stop_in_time();
        let mode = match self.below(6) {
            0 => LossMode::All,
            1 => LossMode::None,
            2 => LossMode::Tail,
            3 | 4 => LossMode::Some,
            _ => LossMode::Torn,
        };
        let mode = if std::mem::take(&mut self.harsh) { LossMode::All } else { mode };
        let mut tail_gone = false;
        let mut keep = move |state: &mut State| match mode {
            LossMode::All => false,
            LossMode::None => true,
            LossMode::Some | LossMode::Torn => state.below(2) == 0,
            LossMode::Tail => {
                tail_gone |= state.below(4) == 0;
                !tail_gone
            }
        };
        for (_, change) in std::mem::take(&mut self.pending_entries) {
            let kept = keep(self);
            self.settle_entry(change, kept);
        }
        let ids: Vec<u64> = self.inodes.keys().copied().collect();
        for id in ids {
            let Some(mut inode) = self.inodes.remove(&id) else { continue };
            for (_, write) in std::mem::take(&mut inode.pending) {
                if keep(self) {
                    write.apply(&mut inode.platter);
                    continue;
                }
                match (mode, &write) {
                    (LossMode::Torn, Pending::Write { offset, bytes }) => {
                        self.counters.writes_torn += 1;
                        let mut at = 0;
                        while at < bytes.len() {
                            let end = ((offset + at) / SECTOR * SECTOR + SECTOR - offset).min(bytes.len());
                            if self.below(2) == 0 {
                                write_into(&mut inode.platter, offset + at, &bytes[at..end]);
                            }
                            at = end;
                        }
                    }
                    _ => self.counters.writes_lost += 1,
                }
            }
            inode.seen.clone_from(&inode.platter);
            inode.lost.retain(|sector| sector * SECTOR < inode.seen.len());
            self.inodes.insert(id, inode);
        }
        self.entries.clone_from(&self.durable_entries);
        let named: BTreeSet<u64> = self.entries.values().copied().collect();
        self.inodes.retain(|id, _| named.contains(id));
    }
}

impl SimDisk {
    pub fn new(seed: u64) -> Arc<SimDisk> {
        let state = State {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            powered: true,
            deserted: false,
            epoch: 0,
            crash_at_op: None,
            harsh: false,
            inodes: BTreeMap::new(),
            next_inode: 1,
            entries: BTreeMap::new(),
            durable_entries: BTreeMap::new(),
            pending_entries: vec![],
            calls: 0,
            defer_syncs: false,
            taken: 0,
            under_way: vec![],
            waiting: vec![],
            dirs: BTreeSet::from([String::new()]),
            faults: DiskFaults::default(),
            counters: DiskCounters::default(),
            debt: Duration::ZERO,
        };
        let mut disks = lock(&DISKS);
        let number = disks.len();
        let disk = Arc::new(SimDisk { number, state: Mutex::new(state), observer: Mutex::new(None) });
        disks.push(Arc::downgrade(&disk));
        disk
    }

    /// The disk with this number, if it still exists.
    pub(super) fn numbered(number: usize) -> Option<Arc<SimDisk>> {
        lock(&DISKS).get(number)?.upgrade()
    }

    /// Takes the power: every handle fails from now on.
    pub fn power_off(&self) {
        lock(&self.state).cut_power();
    }

    /// From the next power loss nothing survives that was not synced.
    pub fn lose_all_unsynced(&self) {
        lock(&self.state).harsh = true;
    }

    /// Boots the machine, or only a process on it: gives power back if it was off, and decides what had survived.
    pub fn power_on(&self) {
        let mut state = lock(&self.state);
        if !state.powered {
            state.settle();
            state.debt = Duration::ZERO;
            state.powered = true;
        }
        state.deserted = false;
    }

    /// Another disk, with nothing on it: for a machine without power.
    pub fn empty(&self) {
        let mut state = lock(&self.state);
        state.cut_power();
        state.inodes.clear();
        state.entries.clear();
        state.durable_entries.clear();
        state.pending_entries.clear();
        state.under_way.clear();
        state.waiting.clear();
        state.dirs = BTreeSet::from([String::new()]);
    }

    /// Bytes in all files, as readers see them.
    pub fn bytes(&self) -> u64 {
        let state = lock(&self.state);
        state
            .entries
            .values()
            .filter_map(|id| state.inodes.get(id))
            .map(|inode| inode.seen.len() as u64)
            .sum()
    }

    /// The process that held the handles is gone; its writes are in the kernel's hands and survive. Nobody is there until
    /// [`SimDisk::power_on`].
    pub fn crash_process(&self) {
        let mut state = lock(&self.state);
        state.deserted = true;
        state.epoch += 1;
        state.debt = Duration::ZERO;
        state.waiting.clear();
        state.finish_syncs(0..=u64::MAX);
    }

    /// Flips one bit somewhere in the files under `dir`, where readers see it and on the platter; whether there was one.
    pub fn flip_a_bit(&self, dir: &str) -> bool {
        let mut state = lock(&self.state);
        let Some((id, at)) = state.some_byte(dir) else { return false };
        let bit = 1 << state.below(8);
        state.counters.bits_flipped += 1;
        if let Some(inode) = state.inodes.get_mut(&id) {
            inode.seen[at] ^= bit;
            if let Some(byte) = inode.platter.get_mut(at) {
                *byte ^= bit;
            }
        }
        true
    }

    /// Makes one sector of the files under `dir` unreadable until it is written again; whether there was one.
    pub fn lose_a_sector(&self, dir: &str) -> bool {
        let mut state = lock(&self.state);
        let Some((id, at)) = state.some_byte(dir) else { return false };
        state.counters.sectors_lost += 1;
        if let Some(inode) = state.inodes.get_mut(&id) {
            inode.lost.insert(at / SECTOR);
        }
        true
    }

    pub fn faults(&self) -> DiskFaults {
        lock(&self.state).faults
    }

    /// Power goes off at the `n`-th changing operation from now (1: the next), which fails.
    pub fn crash_at_op(&self, n: u64) {
        lock(&self.state).crash_at_op = Some(n);
    }

    /// Counts restarts of whatever held handles: those of an earlier epoch are dead.
    pub(super) fn epoch(&self) -> u64 {
        lock(&self.state).epoch
    }

    pub fn is_powered(&self) -> bool {
        lock(&self.state).powered
    }

    pub fn set_faults(&self, faults: DiskFaults) {
        lock(&self.state).faults = faults;
    }

    pub fn counters(&self) -> DiskCounters {
        lock(&self.state).counters
    }

    /// Syncs become durable when whoever sleeps off their latency calls [`SimDisk::slept_off`].
    pub fn defer_syncs(&self) {
        lock(&self.state).defer_syncs = true;
    }

    /// Latency run up since the last call, and by which calls: to be told to [`SimDisk::slept_off`] after it.
    pub fn take_debt(&self) -> (Duration, RangeInclusive<u64>) {
        let mut state = lock(&self.state);
        let calls = state.taken + 1..=state.calls;
        state.taken = state.calls;
        if !calls.is_empty() {
            state.waiting.push(calls.clone());
        }
        (std::mem::take(&mut state.debt), calls)
    }

    /// The syncs among these calls have had their time.
    pub fn slept_off(&self, calls: RangeInclusive<u64>) {
        let mut state = lock(&self.state);
        state.waiting.retain(|waiting| *waiting != calls);
        state.finish_syncs(calls);
    }

    pub fn set_observer(&self, observer: Observer) {
        *lock(&self.observer) = Some(Arc::new(observer));
    }

    fn observe(&self, op: &'static str, path: &str, offset: u64, len: usize, content: &[u8]) {
        let observer = lock(&self.observer).clone();
        if let Some(observer) = observer {
            observer(DiskEvent { op, path, offset, len, content_hash: hash(content) });
        }
    }

    fn me(&self) -> io::Result<Arc<SimDisk>> {
        SimDisk::numbered(self.number).ok_or_else(power_is_off)
    }

    fn handle(&self, state: &State, inode: u64) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(SimFile { disk: self.me()?, inode, epoch: state.epoch }))
    }
}

struct SimFile {
    disk: Arc<SimDisk>,
    inode: u64,
    epoch: u64,
}

impl SimFile {
    fn with<T>(
        &self,
        changes: bool,
        work: impl FnOnce(&mut State, &mut Inode) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = lock(&self.disk.state);
        state.enter(Some(self.epoch), changes)?;
        // A removed file stays usable through its handles until power goes.
        let mut inode = state.inodes.remove(&self.inode).unwrap_or_default();
        let result = work(&mut state, &mut inode);
        state.inodes.insert(self.inode, inode);
        result
    }
}

/// Whether a file lies in a directory of that name, however deep.
fn lies_in(path: &str, dir: &str) -> bool {
    path.rsplit('/').skip(1).any(|part| part == dir)
}

impl SimFile {
    /// Where a write really goes.
    fn where_it_lands(&self, state: &mut State, offset: usize, len: usize) -> usize {
        let one_in = state.faults.misdirect_one_in as u64;
        let dir = state.faults.misdirect_in;
        if one_in == 0 || state.below(one_in) > 0 || len < 2 * SECTOR {
            return offset;
        }
        if !state.entries.iter().any(|(path, inode)| *inode == self.inode && lies_in(path, dir)) {
            return offset;
        }
        state.counters.writes_misdirected += 1;
        offset.saturating_sub(SECTOR * (1 + state.below(4) as usize))
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(false, |state, inode| {
            state.counters.reads += 1;
            let from = (offset as usize).min(inode.seen.len());
            let read = buf.len().min(inode.seen.len() - from);
            if read > 0 && inode.lost.range(from / SECTOR..=(from + read - 1) / SECTOR).next().is_some() {
                return Err(state.read_error());
            }
            buf[..read].copy_from_slice(&inode.seen[from..from + read]);
            state.carry(read);
            Ok(read)
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(true, |state, inode| {
            let offset = offset as usize;
            if state.faults.full && offset + bytes.len() > inode.seen.len() {
                state.counters.writes_refused += 1;
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "no space left on the simulated disk",
                ));
            }
            state.counters.writes += 1;
            let offset = self.where_it_lands(state, offset, inode.seen.len());
            let end = offset + bytes.len();
            // To change a part of a sector, the kernel reads the rest of it.
            let has_rest = |sector: &usize| {
                sector * SECTOR < offset || end < inode.seen.len().min((sector + 1) * SECTOR)
            };
            let sectors = if bytes.is_empty() { 0..0 } else { offset / SECTOR..end.div_ceil(SECTOR) };
            if inode.lost.range(sectors.clone()).any(has_rest) {
                return Err(state.read_error());
            }
            state.counters.bytes_written += bytes.len() as u64;
            state.carry(bytes.len());
            write_into(&mut inode.seen, offset, bytes);
            inode.lost.retain(|sector| !sectors.contains(sector));
            inode.pending.push((state.call(), Pending::Write { offset, bytes: bytes.to_vec() }));
            Ok(())
        })?;
        self.disk.observe("write", "", offset ^ self.inode << 48, bytes.len(), bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(true, |state, inode| {
            let len = len as usize;
            // To cut a sector, the kernel reads what stays of it.
            if len < inode.seen.len() && !len.is_multiple_of(SECTOR) && inode.lost.contains(&(len / SECTOR)) {
                return Err(state.read_error());
            }
            inode.seen.resize(len, 0);
            inode.lost.retain(|sector| sector * SECTOR < len);
            inode.pending.push((state.call(), Pending::SetLen(len)));
            Ok(())
        })?;
        self.disk.observe("set_len", "", len, 0, &[]);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.with(false, |_, inode| Ok(inode.seen.len() as u64))
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.observe("sync", "", self.inode, 0, &[]);
        let (failed, writes) = self.with(true, |state, inode| {
            state.debt += state.faults.sync_latency;
            let one_in = state.faults.sync_fail_one_in as u64;
            let failed = one_in > 0 && state.below(one_in) == 0;
            if state.faults.syncs_lie {
                return Ok((failed, vec![]));
            }
            let mut writes = std::mem::take(&mut inode.pending);
            if failed {
                state.counters.sync_failures += 1;
                // The kernel marks the pages clean although some never arrived: seen until power goes, then lost.
                writes.retain(|_| state.below(2) == 0);
            } else {
                state.counters.syncs += 1;
            }
            Ok((failed, writes))
        })?;
        lock(&self.disk.state).sync(Synced::File { inode: self.inode, writes });
        if failed { Err(io::Error::other("input/output error while syncing")) } else { Ok(()) }
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &str) -> io::Result<Arc<dyn File>> {
        let mut state = lock(&self.state);
        state.enter(None, false)?;
        let inode = *state.entries.get(path).ok_or_else(|| not_found(path))?;
        self.handle(&state, inode)
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn File>> {
        self.observe("create", path, 0, 0, path.as_bytes());
        let mut state = lock(&self.state);
        let changes = !state.entries.contains_key(path);
        state.enter(None, changes)?;
        if let Some(&inode) = state.entries.get(path) {
            return self.handle(&state, inode);
        }
        if !state.dirs.contains(parent(path)) {
            return Err(not_found(parent(path)));
        }
        let inode = state.next_inode;
        state.next_inode += 1;
        state.inodes.insert(inode, Inode::default());
        state.change_entries(parent(path), vec![(path.to_string(), Some(inode))]);
        self.handle(&state, inode)
    }

    fn create_dir_all(&self, path: &str) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.enter(None, true)?;
        let mut path = path;
        while !path.is_empty() {
            state.dirs.insert(path.to_string());
            path = parent(path);
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.observe("rename", from, 0, 0, to.as_bytes());
        let mut state = lock(&self.state);
        state.enter(None, true)?;
        let inode = *state.entries.get(from).ok_or_else(|| not_found(from))?;
        let dir = parent(to).to_string();
        state.change_entries(&dir, vec![(from.to_string(), None), (to.to_string(), Some(inode))]);
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.observe("remove", path, 0, 0, path.as_bytes());
        let mut state = lock(&self.state);
        state.enter(None, true)?;
        if !state.entries.contains_key(path) {
            return Err(not_found(path));
        }
        state.change_entries(parent(path), vec![(path.to_string(), None)]);
        Ok(())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.observe("sync_dir", dir, 0, 0, dir.as_bytes());
        let mut state = lock(&self.state);
        state.enter(None, true)?;
        let latency = state.faults.sync_latency;
        state.debt += latency;
        let changes = state.pending_entries.extract_if(.., |(_, change)| change.dir == dir).collect();
        state.sync(Synced::Dir { path: dir.to_string(), changes });
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut state = lock(&self.state);
        state.enter(None, false)?;
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let name = |path: &String| {
            let rest = path.strip_prefix(&prefix)?;
            (!rest.is_empty()).then(|| rest.split('/').next().unwrap_or(rest).to_string())
        };
        let names: BTreeSet<String> =
            state.entries.keys().chain(state.dirs.iter()).filter_map(name).collect();
        Ok(names.into_iter().collect())
    }

    fn exists(&self, path: &str) -> io::Result<bool> {
        let mut state = lock(&self.state);
        state.enter(None, false)?;
        Ok(state.entries.contains_key(path) || state.dirs.contains(path))
    }

    fn sqlite(&self, path: &str) -> io::Result<SqliteLocation> {
        Ok(SqliteLocation { file: format!("/{}/{path}", self.number), vfs: Some(super::sqlite::VFS_NAME) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(disk: &SimDisk, path: &str) -> Option<Vec<u8>> {
        let file = disk.open(path).ok()?;
        let mut bytes = vec![0; file.len().ok()? as usize];
        file.read_at(&mut bytes, 0).ok()?;
        Some(bytes)
    }

    #[test]
    fn synced_bytes_and_names_survive_every_power_loss() -> io::Result<()> {
        for seed in 0..200 {
            let disk = SimDisk::new(seed);
            let file = disk.create("a")?;
            file.write_at(b"kept", 0)?;
            file.sync()?;
            disk.sync_dir("")?;
            file.write_at(b"XXXX", 4)?;
            disk.power_off();
            disk.power_on();
            assert_eq!(content(&disk, "a").as_deref().map(|c| &c[..4]), Some(&b"kept"[..]), "seed {seed}");
            assert!(file.write_at(b"ghost", 0).is_err(), "a handle outlived its power");
        }
        Ok(())
    }

    #[test]
    fn bytes_take_their_time_and_another_disk_has_none() -> io::Result<()> {
        let disk = SimDisk::new(3);
        disk.set_faults(DiskFaults { bytes_per_s: 1000, ..DiskFaults::default() });
        let file = disk.create("a")?;
        file.write_at(&[7; 500], 0)?;
        file.sync()?;
        disk.sync_dir("")?;
        assert_eq!((disk.take_debt().0, disk.bytes()), (Duration::from_millis(500), 500));
        disk.empty();
        disk.power_on();
        assert_eq!((disk.list("")?, disk.bytes()), (vec![], 0));
        assert!(file.write_at(b"ghost", 0).is_err(), "a handle outlived its disk");
        Ok(())
    }

    #[test]
    fn unsynced_writes_and_names_are_sometimes_lost_and_sometimes_torn() -> io::Result<()> {
        let (mut lost_name, mut lost_write, mut torn) = (0, 0, 0);
        for seed in 0..300 {
            let disk = SimDisk::new(seed);
            let named = disk.create("named")?;
            disk.sync_dir("")?;
            named.write_at(&[7; 2000], 0)?;
            disk.create("unnamed")?.sync()?;
            disk.power_off();
            disk.power_on();
            lost_name += content(&disk, "unnamed").is_none() as u32;
            let bytes = content(&disk, "named").unwrap_or_default();
            lost_write += bytes.is_empty() as u32;
            torn += (!bytes.is_empty() && bytes != [7; 2000]) as u32;
        }
        assert!(lost_name > 30 && lost_write > 30 && torn > 10, "{lost_name} {lost_write} {torn}");
        Ok(())
    }

    #[test]
    fn sync_that_follows_a_failed_one_proves_nothing() -> io::Result<()> {
        let mut lost = 0;
        for seed in 0..100 {
            let disk = SimDisk::new(seed);
            let file = disk.create("a")?;
            disk.sync_dir("")?;
            disk.set_faults(DiskFaults { sync_fail_one_in: 1, ..Default::default() });
            file.write_at(b"data", 0)?;
            assert!(file.sync().is_err());
            disk.set_faults(DiskFaults::default());
            file.sync()?;
            assert_eq!(content(&disk, "a").as_deref(), Some(&b"data"[..]), "readers still see it");
            disk.power_off();
            disk.power_on();
            lost += (content(&disk, "a").as_deref() != Some(b"data")) as u32;
        }
        assert!(lost > 20, "only {lost} of 100 lost it");
        Ok(())
    }

    /// Whoever cuts a log once its table is synced has waited for that sync: who then syncs the log makes no cut durable without the table.
    #[test]
    fn a_change_is_never_durable_before_what_its_maker_synced_first() -> io::Result<()> {
        for seed in 0..20 {
            let disk = SimDisk::new(seed);
            let (table, log) = (disk.create("table")?, disk.create("log")?);
            log.write_at(b"all of it", 0)?;
            log.sync()?;
            disk.sync_dir("")?;
            disk.defer_syncs();
            disk.slept_off(disk.take_debt().1);
            table.write_at(b"all of it", 0)?;
            table.sync()?;
            log.set_len(0)?;
            let _slow = disk.take_debt();
            log.sync()?;
            disk.slept_off(disk.take_debt().1);
            disk.lose_all_unsynced();
            disk.power_off();
            disk.power_on();
            assert_eq!(disk.open("log")?.len()?, 0, "seed {seed}");
            assert_eq!(disk.open("table")?.len()?, 9, "seed {seed}: neither the log nor the table has it");
            // Nor is a name that another one's sync of the directory made durable.
            let (data, name) = (disk.create("data")?, "named");
            data.write_at(b"all of it", 0)?;
            data.sync()?;
            disk.rename("data", name)?;
            disk.sync_dir("")?;
            let _slow = disk.take_debt();
            disk.sync_dir("")?;
            disk.slept_off(disk.take_debt().1);
            disk.lose_all_unsynced();
            disk.power_off();
            disk.power_on();
            assert_eq!(disk.open(name)?.len()?, 9, "seed {seed}: a name of nothing");
        }
        Ok(())
    }

    #[test]
    fn a_sync_is_durable_when_its_latency_has_been_slept_off() -> io::Result<()> {
        let (mut early, mut late) = (0, 0);
        for seed in 0..100 {
            let disk = SimDisk::new(seed);
            disk.defer_syncs();
            let log = disk.create("log")?;
            disk.sync_dir("")?;
            disk.slept_off(disk.take_debt().1);
            log.write_at(b"first", 0)?;
            log.sync()?;
            log.write_at(b"again", 5)?;
            log.sync()?;
            let (_, calls) = disk.take_debt();
            // Another one's sleep says nothing about these.
            disk.create("other")?.sync()?;
            disk.slept_off(disk.take_debt().1);
            if seed % 2 == 0 {
                disk.slept_off(calls);
            }
            disk.power_off();
            disk.power_on();
            let left = content(&disk, "log").unwrap_or_default();
            assert!(left.len() <= 5 || &left[..5] == b"first", "what followed a sync is there without it");
            if seed % 2 == 0 {
                assert_eq!(left, b"firstagain");
            } else {
                early += (left.len() < 10) as u32;
                late += (left.len() == 10) as u32;
            }
        }
        assert!(early > 10 && late > 10, "{early} {late}");
        Ok(())
    }

    #[test]
    fn process_crash_keeps_unsynced_writes() -> io::Result<()> {
        let disk = SimDisk::new(1);
        let file = disk.create("a")?;
        file.write_at(b"data", 0)?;
        disk.crash_process();
        assert!(disk.list("").is_err(), "nobody is there to ask");
        disk.power_on();
        assert!(file.sync().is_err());
        assert_eq!(content(&disk, "a").as_deref(), Some(&b"data"[..]));
        Ok(())
    }

    #[test]
    fn damage_is_seen_by_readers_survives_power_and_goes_with_a_new_write() -> io::Result<()> {
        for seed in 0..50 {
            let disk = SimDisk::new(seed);
            disk.create_dir_all("d")?;
            disk.create("other")?.write_at(&[1; 2000], 0)?;
            let file = disk.create("d/a")?;
            file.write_at(&[7; 2000], 0)?;
            file.sync()?;
            disk.sync_dir("d")?;
            disk.sync_dir("")?;
            assert!(disk.flip_a_bit("d") && !disk.flip_a_bit("nothing"));
            disk.power_off();
            disk.power_on();
            let bytes = content(&disk, "d/a").unwrap_or_default();
            assert_eq!(bytes.iter().map(|b| (b ^ 7).count_ones()).sum::<u32>(), 1);
            assert!(disk.lose_a_sector("d"));
            assert!(content(&disk, "d/a").is_none());
            let file = disk.open("d/a")?;
            let error = file.read_at(&mut [0; 2000], 0).err().and_then(|e| e.raw_os_error());
            assert_eq!(error, Some(EIO));
            // Byte 1,999 lies on its last sector, which ends there.
            let parts = [(0, 1), (600, 1), (1100, 1), (1600, 399)];
            let failed = |(at, len): &(u64, usize)| file.write_at(&[7; 400][..*len], *at).is_err();
            assert_eq!(parts.iter().filter(|part| failed(part)).count(), 1, "a part of the sector");
            file.write_at(&[7; 2000], 0)?;
            assert_eq!(content(&disk, "d/a").as_deref(), Some(&[7; 2000][..]));
            let counters = disk.counters();
            assert_eq!((counters.bits_flipped, counters.sectors_lost, counters.read_errors), (1, 1, 3));
        }
        Ok(())
    }

    #[test]
    fn a_misdirected_write_harms_two_places_and_only_where_it_may() -> io::Result<()> {
        let mut missed = 0;
        for seed in 0..50 {
            let disk = SimDisk::new(seed);
            disk.create_dir_all("d")?;
            let (file, other) = (disk.create("d/a")?, disk.create("b")?);
            file.write_at(&[1; 4096], 0)?;
            other.write_at(&[1; 4096], 0)?;
            disk.set_faults(DiskFaults { misdirect_one_in: 2, misdirect_in: "d", ..Default::default() });
            file.write_at(&[2; 512], 2048)?;
            other.write_at(&[2; 512], 2048)?;
            let twos = |path| content(&disk, path).map(|c: Vec<u8>| c.iter().position(|b| *b == 2));
            assert_eq!(twos("b"), Some(Some(2048)));
            missed += (twos("d/a") != Some(Some(2048))) as u64;
            assert_eq!(disk.counters().writes_misdirected > 0, twos("d/a") != Some(Some(2048)));
        }
        assert!((10..40).contains(&missed), "{missed} of 50");
        Ok(())
    }
}
