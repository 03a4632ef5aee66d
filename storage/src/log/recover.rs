//! Opening a log: reads what is there, cuts a torn tail, refuses corruption.

use super::segment::{self, ENTRY_HEAD, HEAD_BYTES, MAGIC, Segment};
use super::{BASE, Log, LogError, io_error, lock};
use std::sync::Arc;

impl Log {
    pub(super) fn recover(&self) -> Result<(), LogError> {
        let base = match self.get_meta(BASE)? {
            Some(bytes) => bytes.iter().rev().fold(0u64, |w, &b| w << 8 | b as u64),
            None => 0,
        };
        let names = self.disk.list(&self.dir).map_err(io_error("list"))?;
        for leftover in names.iter().filter(|n| n.ends_with(".tmp")) {
            self.remove(leftover).map_err(io_error(leftover.as_str()))?;
        }
        let mut found: Vec<(u64, String)> =
            names.into_iter().filter_map(|n| Some((n.strip_suffix(".log")?.parse().ok()?, n))).collect();
        found.sort();
        let count = found.len();
        let mut segments: Vec<Segment> = vec![];
        for (at, (first, name)) in found.into_iter().enumerate() {
            if let Some(before) = segments.last()
                && before.end() != first
            {
                let problem = format!("entries {}..{first} are missing before it", before.end());
                return Err(LogError::Corrupt { file: name, offset: 0, problem });
            }
            match self.open_segment(first, &name, at + 1 == count)? {
                Some(segment) => segments.push(segment),
                // Its head never reached the disk, so nothing in it was acknowledged.
                None => self.remove(&name).map_err(io_error(name.as_str()))?,
            }
        }
        // What a purge had not removed yet when it was interrupted.
        while segments.first().is_some_and(|s| s.end() <= base + 1) {
            let gone = segments.remove(0);
            self.remove(&gone.name).map_err(io_error(gone.name.as_str()))?;
        }
        if let Some(segment) = segments.first()
            && segment.first > base + 1
        {
            let problem = format!("entries {}..{} are missing before it", base + 1, segment.first);
            return Err(LogError::Corrupt { file: segment.name.clone(), offset: 0, problem });
        }
        let last = segments.last().map_or(base, |s| s.end() - 1).max(base);
        let mut state = lock(&self.state);
        (state.segments, state.base, state.last) = (segments, base, last);
        // What was read may never have been synced, if only the process died; make it so before building on it.
        drop(state);
        let file = lock(&self.state).segments.last().map(|s| s.file.clone());
        if let Some(file) = file {
            file.sync().and_then(|()| self.disk.sync_dir(&self.dir)).map_err(io_error("sync"))?;
        }
        lock(&self.state).durable = last;
        Ok(())
    }

    /// Reads one segment. `None`: the last one, without a readable head.
    fn open_segment(&self, first: u64, name: &str, is_last: bool) -> Result<Option<Segment>, LogError> {
        let failed = |e| io_error(format!("read {name}"))(e);
        let corrupt = |offset: u64, problem: String| LogError::Corrupt { file: name.into(), offset, problem };
        let file = self.disk.open(&self.path(name)).map_err(failed)?;
        let mut bytes = vec![0; file.len().map_err(failed)? as usize];
        let read = segment::read_up_to(&*file, &mut bytes, 0).map_err(failed)?;
        bytes.truncate(read);
        let head_ok =
            bytes.len() >= HEAD_BYTES as usize && &bytes[..8] == MAGIC && bytes[8..16] == first.to_le_bytes();
        if !head_ok {
            if is_last && durable_behind(&bytes, 0, first).is_none() {
                return Ok(None);
            }
            return Err(corrupt(0, "segment head is unreadable".into()));
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
        if at < bytes.len() {
            if !is_last {
                return Err(corrupt(
                    at as u64,
                    format!("entry {bad} is unreadable, and later segments follow"),
                ));
            }
            if let Some(durable) = durable_behind(&bytes, at, bad) {
                return Err(corrupt(
                    at as u64,
                    format!("entry {bad} is unreadable, and {durable} was durable"),
                ));
            }
            // Durable with the sync that ends the recovery.
            file.set_len(at as u64).map_err(failed)?;
        }
        Ok(Some(Segment::found(Arc::clone(&file), name.into(), first, offsets, at as u64)))
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
