//! Reads any file that Loci stores and says what it holds and whether it is sound: `loci inspect`. It changes nothing.

use crate::bases::{self, Base, Reader};
use crate::codec;
use crate::facts;
use crate::log::{self, ENTRY_HEAD, HEAD_BYTES};
use crate::records::{SCHEMA_VERSION, months, rows};
use crate::slots::{Moving, SLOTS};
use crate::snapshot::Piece;
use crate::vectors::manifest::Manifest;
use crate::vectors::segment::{self as vectors, Segment};
use rusqlite::OpenFlags;
use sim::disk::{Disk, checked, open_sqlite};
use std::collections::BTreeMap;
use std::fmt::Write;

/// What a file holds, line by line, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Inspection {
    pub text: String,
    pub problems: Vec<String>,
}

macro_rules! say {
    ($to:expr, $($arg:tt)*) => {{ let _ = writeln!($to.text, $($arg)*); }};
}

/// Inspects the file at `path` on `disk`, by its name and its first bytes.
pub fn inspect(disk: &dyn Disk, path: &str) -> Result<Inspection, String> {
    let failed = |e: std::io::Error| format!("{path}: {e}");
    let file = disk.open(path).map_err(failed)?;
    let mut head = [0; 16];
    let read = log::read_up_to(&*file, &mut head, 0).map_err(failed)?;
    let (name, len) = (path.rsplit('/').next().unwrap_or(path), file.len().map_err(failed)?);
    let whole = || log::read_what_can_be_read(&*file, u64::MAX).map_err(failed);
    let mut found = Inspection::default();
    match name {
        _ if head[..read].starts_with(log::MAGIC) => segment(&whole()?, name, &mut found),
        _ if head[..read].starts_with(bases::MAGIC) => base(disk, path, len, &mut found)?,
        _ if head[..read].starts_with(vectors::MAGIC) => vectors(disk, path, &mut found),
        _ if head[..read].starts_with(b"SQLite format 3\0") => database(disk, path, &mut found)?,
        _ if name.ends_with(".meta") => fact(&whole()?, name, &mut found),
        _ if name.ends_with(".mark") => mark(&whole()?, &mut found),
        _ if [log::MAGIC, bases::MAGIC, vectors::MAGIC]
            .iter()
            .any(|magic| head[..read].starts_with(&magic[..7])) =>
        {
            let version = head.get(7).map_or('?', |v| *v as char);
            return Err(format!(
                "{path} has version {version}, which this build does not read: use the build that wrote it"
            ));
        }
        _ if [".log", ".snap", ".db", ".seg"].iter().any(|ending| name.ends_with(ending)) => {
            found.problems.push(format!("byte 0: it begins with {:02x?}, as no {name} does", &head[..read]));
        }
        _ => return Err(format!("{path} is no file of Loci's: see storage/FORMAT.md for what there is")),
    }
    Ok(found)
}

fn segment(bytes: &[u8], name: &str, found: &mut Inspection) {
    let Some(first) = log::parse_segment_head(bytes) else {
        return found.problems.push("byte 0: the segment's head is damaged".into());
    };
    if !name.starts_with(&format!("{first:020}.")) {
        found.problems.push(format!("byte 8: it begins with entry {first}, its name says otherwise"));
    }
    let (mut at, mut index, mut durable) = (HEAD_BYTES as usize, first, 0);
    while let Some((head, payload)) = bytes.get(at..).and_then(log::parse_entry) {
        if head.index != index {
            break;
        }
        durable = head.durable;
        at += ENTRY_HEAD + payload.len();
        index += 1;
    }
    say!(found, "log segment: entries {first} to {}, {} bytes", index - 1, bytes.len());
    say!(found, "when the last was written, entries up to {durable} were durable");
    if at < bytes.len() {
        let rest = bytes.len() - at;
        found.problems.push(format!(
            "byte {at}: entry {index} is damaged or torn, {rest} bytes follow; synced.mark says whether it was durable"
        ));
    }
}

fn mark(bytes: &[u8], found: &mut Inspection) {
    match log::parse_mark(bytes) {
        Some((sequence, index)) => {
            say!(found, "mark of the log: entries up to {index} were durable (mark {sequence})")
        }
        None => found.problems.push("byte 0: neither slot is readable".into()),
    }
    for (slot, bytes) in bytes.chunks(4096).enumerate() {
        if codec::unframe(bytes).is_err() {
            found.problems.push(format!("byte {}: slot {slot} is damaged", slot * 4096));
        }
    }
}

fn fact(bytes: &[u8], name: &str, found: &mut Inspection) {
    let (payload, sound) = match facts::parse(bytes) {
        Ok(parsed) => parsed,
        Err(error) => return found.problems.push(format!("byte 0: both copies are damaged ({error})")),
    };
    if !sound {
        found.problems.push("one of the two copies is damaged; the node heals it when it starts".into());
    }
    say!(found, "fact {}: {} bytes", name.trim_end_matches(".meta"), payload.len());
    match name {
        "base.meta" => say!(found, "  the log is purged up to entry {}", log::number(&payload)),
        "repair.meta" => match codec::decode::<log::Repair>(&payload) {
            Ok(repair) => say!(found, "  entries {} to {} were lost to damage", repair.from, repair.to),
            Err(error) => found.problems.push(format!("the fact is unreadable: {error}")),
        },
        "manifest.meta" => match codec::decode::<Vec<Base>>(&payload) {
            Ok(bases) => bases.iter().for_each(|b| {
                let digest = u128::from_le_bytes(b.digest);
                say!(found, "  base at {}: {} ({} bytes, digest {digest:032x})", b.index, b.file, b.bytes)
            }),
            Err(error) => found.problems.push(format!("the fact is unreadable: {error}")),
        },
        "vectors.meta" => match codec::decode::<Manifest>(&payload) {
            Ok(manifest) => {
                say!(found, "  the vector view's segments at position {:?}", manifest.position);
                for named in &manifest.segments {
                    let (rows, dead) = (named.rows, named.dead.len());
                    say!(
                        found,
                        "  segment {} of {}: {rows} rows, {dead} of them dead",
                        named.number,
                        named.month
                    );
                }
            }
            Err(error) => found.problems.push(format!("the fact is unreadable: {error}")),
        },
        "condemned.meta" => {
            say!(found, "  the views are to be made anew: {}", String::from_utf8_lossy(&payload))
        }
        _ => say!(found, "  {payload:02x?}"),
    }
}

fn vectors(disk: &dyn Disk, path: &str, found: &mut Inspection) {
    let segment = match Segment::open(disk, path) {
        Ok(segment) => segment,
        Err(error) => return found.problems.push(error.to_string()),
    };
    say!(
        found,
        "segment of vectors of {}: {} rows in {} blocks, {} bytes",
        segment.month,
        segment.rows,
        segment.blocks(),
        segment.len
    );
    let mut kinds: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for number in 0..segment.blocks() {
        match segment.block(number, true) {
            Ok(block) => {
                let kept = match () {
                    _ if block.rows.product.is_some() => "product codes",
                    _ if segment.has_originals(number) => "codes and vectors",
                    _ => "codes",
                };
                let graph = if block.graph().is_some() { ", with a graph" } else { "" };
                let of = kinds
                    .entry(format!(
                        "{} dimensions in {:?}, {kept}{graph}",
                        block.kind.dimension, block.kind.space
                    ))
                    .or_default();
                *of = (of.0 + 1, of.1 + block.rows.len());
            }
            Err(error) => found.problems.push(error.to_string()),
        }
    }
    for (kind, (blocks, rows)) in kinds {
        say!(found, "  {rows:10} of {kind}, in {blocks} blocks");
    }
}

fn base(disk: &dyn Disk, path: &str, len: u64, found: &mut Inspection) -> Result<(), String> {
    let mut reader = Reader::open(disk, path).map_err(|e| e.to_string())?;
    let (mut at, mut pieces, mut digest, mut ended) = (8, 0u64, 0u128, false);
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    loop {
        let chunk = match reader.next_chunk() {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            Err(error) => {
                found.problems.push(format!("byte {at}: {error}"));
                break;
            }
        };
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let piece =
                codec::unframe(rest).and_then(|(payload, then)| Ok((codec::decode::<Piece>(payload)?, then)));
            let (piece, then) = match piece {
                Ok(parsed) => parsed,
                Err(error) => {
                    found.problems.push(format!("byte {at}: {error}"));
                    return Ok(());
                }
            };
            at += rest.len() - then.len();
            rest = then;
            let kind = match &piece {
                Piece::Memory(_) => "memories",
                Piece::History { .. } => "superseded versions and deletions",
                Piece::Key(_) => "idempotency keys",
                Piece::Edge(_) => "edges",
                Piece::Deleted { .. } => "places of deleted memories",
                Piece::Erasure(_) => "erasures",
                Piece::Kept(_) => "ranges that are not here, but at a receiver",
                Piece::End { pieces: counted, state } => {
                    ended = true;
                    say!(found, "snapshot of the views at position {:?}, {len} bytes", state.position);
                    say!(found, "digest {:032x}", state.whole_digest());
                    slots(state, &mut found.text);
                    if (*counted, state.digest) != (pieces, digest) {
                        found.problems.push("its pieces are not those that its end tells".into());
                    }
                    continue;
                }
            };
            pieces += 1;
            digest = digest.wrapping_add(piece.digest());
            *kinds.entry(kind).or_default() += 1;
        }
    }
    for (kind, count) in kinds {
        say!(found, "  {count:10} {kind}");
    }
    if !ended {
        found.problems.push(format!("byte {at}: it has no end"));
    }
    Ok(())
}

/// Which slots are here, and what is on its way.
fn slots(state: &rows::State, text: &mut String) {
    let owned = state.slots.owned();
    let _ = writeln!(text, "slots {owned} ({} of {SLOTS})", owned.everybody().len());
    let _ = match state.slots.moving() {
        None => Ok(()),
        Some((id, Moving::Leaving(slots))) => writeln!(text, "  move {id}: {slots} are leaving, not written"),
        Some((id, Moving::Left(slots))) => {
            let rows = state.dropping.as_ref().map_or(0, |dropping| dropping.rows);
            writeln!(text, "  move {id}: {slots} have left, {rows} of their rows are still here")
        }
        Some((id, Moving::Arriving(arrived))) => writeln!(
            text,
            "  move {id}: {} are arriving, {} pieces in {} imports so far",
            arrived.slots, arrived.pieces, arrived.next
        ),
    };
}

fn database(disk: &dyn Disk, path: &str, found: &mut Inspection) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{path}: {e}");
    let file = disk.open(path).map_err(failed)?;
    let mut head = [0; 32];
    log::read_up_to(&*file, &mut head, 0).map_err(failed)?;
    let size = match u16::from_be_bytes([head[16], head[17]]) {
        1 => 65_536,
        size => size as usize,
    };
    if !(512..=65_536).contains(&size) || !size.is_power_of_two() {
        found.problems.push(format!("byte 16: a page size of {size} bytes"));
        return Ok(());
    }
    let pages = file.len().map_err(failed)? / size as u64;
    let mut page = vec![0; size];
    for number in 0..pages {
        let at = number * size as u64;
        match log::read_up_to(&*file, &mut page, at) {
            Ok(read) if read == size && checked::is_sound(&page, at) => {}
            Ok(_) => found.problems.push(format!(
                "byte {at}: page {} fails its checksum (unless the write-ahead log has it)",
                number + 1
            )),
            Err(error) => found.problems.push(format!("byte {at}: page {}: {error}", number + 1)),
        }
    }
    say!(found, "database of the views: {pages} pages of {size} bytes, each with its checksum");
    if !found.problems.is_empty() {
        return Ok(());
    }
    let mut read = || -> Result<(), String> {
        let text = |e: rusqlite::Error| e.to_string();
        let db = open_sqlite(disk, path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(text)?;
        let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(text)?;
        say!(found, "format {version} (this build reads {SCHEMA_VERSION})");
        if version != SCHEMA_VERSION {
            return Ok(());
        }
        let sound: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(text)?;
        if sound != "ok" {
            found.problems.push(sound);
        }
        let state = rows::load_state(&db).map_err(|e| e.to_string())?;
        say!(found, "applied up to {:?}, digest {:032x}", state.position, state.whole_digest());
        slots(&state, &mut found.text);
        say!(
            found,
            "{} memories, {} with a vector, {} edges, {} idempotency keys",
            state.memories,
            state.vectors,
            state.edges,
            state.keys
        );
        for (month, of) in months::load(&db).map_err(|e| e.to_string())? {
            say!(
                found,
                "  {month}: {} memories, {} superseded versions and deletions, changed at {:?}",
                of.memories,
                of.history,
                of.position
            );
        }
        Ok(())
    };
    read().map_err(|e| format!("{path}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use crate::{Entry, Shard, ShardOptions, model::*};
    use sim::disk::simulated::SimDisk;
    use std::sync::Arc;

    #[test]
    fn every_kind_of_file_is_read_and_damage_to_it_is_found() -> Result<(), Box<dyn std::error::Error>> {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let log = log::Log::open(disk.clone(), "log", log::LogOptions::default())?;
        let shard = Shard::open(disk.clone(), "views", ShardOptions::default())?;
        for index in 1..=20 {
            let mut memory = memory("t", index, "some text");
            (memory.vector, memory.space) = (vec![index as f32, 1.0], "s".into());
            let operation = Operation::Add(memory);
            let (tenant, idempotency_key) = ("t".into(), String::new());
            let command =
                Command { tenant, slot: None, idempotency_key, request_hash: [0; 16], now: 5, operation };
            let batch = Batch { commands: vec![command] };
            log.append(&[(index, &codec::encode(&batch))])?;
            log.sync()?;
            shard.apply(&[Entry { epoch: 1, index, batch: Some(&batch) }], b"")?;
        }
        log.purge_to(3)?;
        shard.seal()?;
        shard.checkpoint()?;
        bases::Bases::open(disk.clone(), "bases")?.write(&shard)?;
        drop(shard);
        let mut kinds = 0;
        for dir in ["log", "views", "bases"] {
            for name in disk.list(dir)?.iter().filter(|n| !n.contains("-wal") && !n.contains("-shm")) {
                let path = format!("{dir}/{name}");
                let sound = inspect(&*disk, &path)?;
                assert!(sound.problems.is_empty() && !sound.text.is_empty(), "{path}: {sound:?}");
                let file = disk.open(&path)?;
                let mut byte = [0];
                // Behind what a slot of the mark holds are zeroes that nobody reads.
                let late = if name.ends_with(".mark") { 4100 } else { file.len()? * 2 / 3 };
                // Nor is the padding behind a magic.
                let early = if name.ends_with(".seg") { 70 } else { 9 };
                for at in [early, late] {
                    file.read_at(&mut byte, at)?;
                    if byte[0] == 0 && name.ends_with(".meta") {
                        continue;
                    }
                    file.write_at(&[byte[0] ^ 8], at)?;
                    let found = inspect(&*disk, &path);
                    assert!(found.is_err() || found.is_ok_and(|f| !f.problems.is_empty()), "{path} at {at}");
                    file.write_at(&byte, at)?;
                }
                kinds += 1;
            }
        }
        assert!(kinds >= 7, "{kinds}");
        assert!(inspect(&*disk, "views/none").is_err());
        Ok(())
    }
}
