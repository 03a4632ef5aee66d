//! Opening a log: reads what is there, cuts a torn tail, finds corruption, and cuts that too if peers can give back what is lost.

use super::mark::Mark;
use super::segment::{self, ENTRY_HEAD, HEAD_BYTES, Segment};
use super::{BASE, Kept, Log, LogError, REPAIR, REWRITE, Repair, io_error, lock};
use std::sync::Arc;

/// Where a log is damaged, and from which entry on it must be given up.
struct Damage {
    file: String,
    offset: u64,
    problem: String,
    from: u64,
}

impl Damage {
    fn error(self) -> LogError {
        LogError::Corrupt { file: self.file, offset: self.offset, problem: self.problem }
    }
}

/// One segment as it was read.
struct Found {
    /// `None`: it has no readable head.
    segment: Option<Segment>,
    /// The file goes on behind the last good entry.
    torn: bool,
    damage: Option<Damage>,
}

impl Log {
    /// `cut`: give up what is damaged instead of failing.
    pub(super) fn recover(&self, cut: bool) -> Result<(), LogError> {
        let base = self.get_meta(BASE)?.map_or(0, |bytes| segment::number(&bytes));
        let (mark, marked) = Mark::open(&*self.disk, &self.dir).map_err(io_error("synced.mark"))?;
        *lock(&self.mark) = Some(mark);
        let names = self.disk.list(&self.dir).map_err(io_error("list"))?;
        for leftover in names.iter().filter(|n| n.ends_with(".tmp")) {
            self.remove(leftover).map_err(io_error(leftover.as_str()))?;
        }
        let mut files: Vec<(u64, String)> =
            names.into_iter().filter_map(|n| Some((n.strip_suffix(".log")?.parse().ok()?, n))).collect();
        files.sort();
        // Segments wholly below the base are not read: they are kept for whoever replays the log.
        let live = files.partition_point(|(first, _)| *first <= base + 1).saturating_sub(1);
        let mut kept: Vec<Kept> = (0..live)
            .map(|at| Kept { first: files[at].0, end: files[at + 1].0, name: files[at].1.clone(), bytes: 0 })
            .collect();
        for old in &mut kept {
            let file = self.disk.open(&self.path(&old.name)).map_err(io_error(old.name.as_str()))?;
            old.bytes = file.len().map_err(io_error(old.name.as_str()))?;
        }
        let mut segments: Vec<Segment> = vec![];
        let mut damage = None;
        let mut torn = false;
        let count = files.len();
        for (at, (first, name)) in files.into_iter().enumerate().skip(live) {
            let expected = segments.last().map_or(base + 1, Segment::end);
            if first > expected {
                let problem = format!("entries {expected}..{first} are missing before it");
                damage = Some(Damage { file: name, offset: 0, problem, from: expected });
                break;
            }
            let found = self.read_segment(first, &name, at + 1 == count, (base, marked))?;
            if found.damage.is_some() {
                segments.extend(found.segment);
                damage = found.damage;
                break;
            }
            match found.segment {
                Some(segment) => {
                    segments.push(segment);
                    torn = found.torn;
                }
                // Its head never reached the disk, so nothing in it was acknowledged.
                None => self.remove(&name).map_err(io_error(name.as_str()))?,
            }
        }
        let last = segments.last().map_or(base, |s| s.end() - 1).max(base);
        if damage.is_none() && marked > last {
            let (file, offset) = segments.last().map_or((self.dir.clone(), 0), |s| (s.name.clone(), s.len));
            let problem = format!("it ends before entry {}, and {marked} was durable", last + 1);
            damage = Some(Damage { file, offset, problem, from: last + 1 });
        }
        if let Some(damage) = damage {
            if !cut {
                return Err(damage.error());
            }
            let repair = Repair { from: damage.from.max(base + 1), to: marked.max(last) };
            self.give_up(&mut segments, base, repair, damage)?;
        } else if let (true, Some(segment)) = (torn, segments.last()) {
            // Durable with the sync that ends the recovery.
            segment.cut_tail().map_err(io_error(segment.name.as_str()))?;
            sim::trace::probe("log: torn tail cut");
        }
        // Sound entries may lie on a lost sector, where they end in zeroes: who reads them, or writes behind them, would fail.
        for segment in segments.iter_mut().filter(|segment| segment.holes) {
            self.rewrite(segment).map_err(io_error(format!("rewrite {}", segment.name)))?;
            sim::warn!("log {}/{}: sectors of it cannot be read; it is written anew", self.dir, segment.name);
            sim::trace::probe("log: rewritten without its lost sectors");
        }
        // The last one left may lie wholly below the base.
        if let Some(old) = segments.pop_if(|s| s.end() <= base + 1 && s.first <= base) {
            kept.push(Kept { first: old.first, end: old.end(), name: old.name, bytes: old.len });
        }
        let last = segments.last().map_or(base, |s| s.end() - 1).max(base);
        if self.disk.exists(&self.path(REWRITE)).map_err(io_error(REWRITE))? {
            if let Some(segment) = segments.last_mut() {
                self.rewrite(segment).map_err(io_error(format!("rewrite {}", segment.name)))?;
                sim::trace::probe("log: rewritten after a failed sync");
            }
            self.remove(REWRITE).map_err(io_error(REWRITE))?;
        }
        // What was read may never have been synced, if only the process died; make it so before building on it.
        if let Some(segment) = segments.last() {
            segment.file.sync().and_then(|()| self.disk.sync_dir(&self.dir)).map_err(io_error("sync"))?;
        }
        self.marked(|mark| mark.reset(last)).map_err(io_error("synced.mark"))?;
        let mut state = lock(&self.state);
        (state.segments, state.kept, state.base, state.last, state.durable) =
            (segments, kept, base, last, last);
        Ok(())
    }

    /// Writes a segment to a new file: what an earlier sync did not make durable will not be by another one.
    fn rewrite(&self, segment: &mut Segment) -> std::io::Result<()> {
        let mut bytes = segment::read_what_can_be_read(&*segment.file, segment.len)?;
        bytes.truncate(segment.len as usize);
        let temporary = self.path("rewrite.tmp");
        let file = self.disk.create(&temporary)?;
        file.set_len(0)?;
        file.write_at(&bytes, 0)?;
        file.sync()?;
        self.disk.rename(&temporary, &self.path(&segment.name))?;
        self.disk.sync_dir(&self.dir)?;
        (segment.file, segment.holes) = (file, false);
        Ok(())
    }

    /// Cuts the log where it is damaged, after the fact that it was cut is durable: until that is settled with the peers, this
    /// replica must not vote.
    fn give_up(
        &self,
        segments: &mut Vec<Segment>,
        base: u64,
        repair: Repair,
        damage: Damage,
    ) -> Result<(), LogError> {
        // What an earlier cut lost is still owed; what has come back of it is not cut again.
        let owed = self.repair()?.map_or(repair, |before| Repair {
            from: before.from.min(repair.from),
            to: before.to.max(repair.to),
        });
        sim::trace::probe("log: damage cut");
        sim::error!(
            "log {}/{} is damaged at byte {} ({}): entries from {} on are given up and must come back from peers",
            self.dir,
            damage.file,
            damage.offset,
            damage.problem,
            repair.from
        );
        self.put_meta(REPAIR, &crate::codec::encode(&owed))?;
        self.marked(|mark| mark.reset(repair.from - 1)).map_err(io_error("synced.mark"))?;
        let names = self.disk.list(&self.dir).map_err(io_error("list"))?;
        let behind = |name: &&String| {
            let first = name.strip_suffix(".log").and_then(|n| n.parse::<u64>().ok());
            first.is_some_and(|first| first >= repair.from && first > base)
        };
        // From the end, so that what is left after a crash has no hole.
        for name in names.iter().rev().filter(behind) {
            segments.retain(|s| s.name != **name);
            self.remove(name).map_err(io_error(name.as_str()))?;
        }
        if let Some(segment) = segments.last_mut() {
            segment.cut_tail().map_err(io_error(segment.name.as_str()))?;
            segment.truncate_from(repair.from).map_err(io_error(segment.name.as_str()))?;
        } else if damage.from <= base + 1 {
            // A segment around the base whose head is gone.
            for name in self.disk.list(&self.dir).map_err(io_error("list"))? {
                if name == damage.file {
                    self.remove(&name).map_err(io_error(name.as_str()))?;
                }
            }
        }
        Ok(())
    }

    /// Reads one segment. Entries up to `marked` were durable; those up to `base` may rightly be missing.
    fn read_segment(
        &self,
        first: u64,
        name: &str,
        is_last: bool,
        (base, marked): (u64, u64),
    ) -> Result<Found, LogError> {
        let failed = |e| io_error(format!("read {name}"))(e);
        let damage = |offset: u64, from: u64, problem: String| {
            Some(Damage { file: name.into(), offset, problem, from })
        };
        let file = self.disk.open(&self.path(name)).map_err(failed)?;
        let (bytes, holes) = segment::read_around_holes(&*file, u64::MAX).map_err(failed)?;
        if let Some(version) = segment::other_version(&bytes) {
            return Err(LogError::Version { file: name.into(), version });
        }
        if segment::parse_segment_head(&bytes) != Some(first) {
            let lost = is_last && marked < first && durable_behind(&bytes, 0, first).is_none();
            let problem = || damage(0, first, "segment head is unreadable".into());
            return Ok(Found { segment: None, torn: false, damage: if lost { None } else { problem() } });
        }
        let mut offsets = vec![];
        let mut at = HEAD_BYTES as usize;
        while let Some((head, payload)) = segment::parse_entry(&bytes[at..]) {
            if head.index != first + offsets.len() as u64 {
                break;
            }
            offsets.push(at as u64);
            at += ENTRY_HEAD + payload.len();
        }
        let bad = first + offsets.len() as u64;
        let torn = at < bytes.len();
        let problem = match torn {
            true if marked >= bad.max(base + 1) => {
                Some(format!("entry {bad} is unreadable, and {marked} was durable"))
            }
            true if !is_last => Some(format!("entry {bad} is unreadable, and later segments follow")),
            true => durable_behind(&bytes, at, bad)
                .map(|durable| format!("entry {bad} is unreadable, and {durable} was durable")),
            false => None,
        };
        let segment = Segment::found(Arc::clone(&file), name.into(), first, offsets, at as u64, holes);
        let damage = problem.and_then(|problem| damage(at as u64, bad, problem));
        Ok(Found { segment: Some(segment), torn, damage })
    }
}

/// Looks behind a bad entry for a good one that proves that entry `bad` was durable.
fn durable_behind(bytes: &[u8], from: usize, bad: u64) -> Option<u64> {
    (from + 1..bytes.len().saturating_sub(ENTRY_HEAD - 1)).find_map(|at| {
        // The index must be plausible before the checksum is worth its cost.
        let head = segment::parse_head(&bytes[at..])?;
        if head.index < bad || head.durable < bad || head.durable >= head.index || head.index - bad > 1 << 24
        {
            return None;
        }
        segment::parse_entry(&bytes[at..]).map(|(head, _)| head.durable)
    })
}
