//! A bit flips in every file that a replica stores, at every 64th byte, and every file is cut short: it is found before anything is
//! served, told with the file's name, and mended from a second copy, a base and the log, or left to the peers; and nothing panics.

use nodes::ledger::epochs::Plan;
use nodes::ledger::log_store::{decode_entry, encode_entry};
use nodes::ledger::recovery::{self, BASES, Keeper, LOG, Opened, VIEWS};
use nodes::ledger::state_machine::{apply_entries, decode_batch};
use nodes::ledger::types::{Data, Entry};
use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use openraft::vote::RaftLeaderId;
use proofs::ledger;
use proptest::prelude::*;
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::sync::Arc;
use storage::graph::Walk;
use storage::log::LogOptions;
use storage::model::*;
use storage::{SearchQuery, Shard, StorageError, codec};

const ENTRIES: u64 = 40;

type Failure = Box<dyn std::error::Error>;

fn entries() -> Vec<Entry> {
    let leader = openraft::alias::LeaderIdOf::<nodes::ledger::types::Types>::new(1, 1).to_committed();
    let entry = |(batch, index): (Batch, u64)| {
        let id = openraft::alias::LogIdOf::<nodes::ledger::types::Types>::new(leader, index);
        Entry::new(id, EntryPayload::Normal(Data(codec::encode(&batch).into())))
    };
    ledger(ENTRIES).into_iter().zip(0..).map(entry).collect()
}

fn open(disk: &Arc<dyn Disk>, alone: bool) -> Result<Opened, String> {
    let log = LogOptions { segment_bytes_max: 4000, cache_bytes_max: 0 };
    recovery::open(disk, log, proofs::options(), (alone, false), (1, &Plan::first()))
        .map_err(|e| e.to_string())
}

/// A replica that has lived: purged segments, two bases, a checkpoint, and entries behind it.
fn lived(disk: &Arc<dyn Disk>) -> Result<Vec<[u8; 16]>, Failure> {
    let Opened { log, shard, bases, .. } = open(disk, false)?;
    let keeper = Keeper { disk: disk.clone(), log: log.clone(), bases, base_bytes_min: 0 };
    let mut digests = vec![shard.digest().1];
    for (entry, index) in entries().into_iter().zip(1..) {
        log.append(&[(index, &encode_entry(&entry))])?;
        log.sync()?;
        let batch = decode_batch(&entry)?;
        apply_entries(&shard, 1, &[(entry, batch)])?;
        digests.push(shard.digest().1);
        if index % 5 == 0 {
            shard.seal()?;
        }
        if index % 10 == 0 {
            while shard.merge()? {}
        }
        if index % 14 == 0 {
            while shard.compress(Month(i32::MAX))? {}
        }
        if index % 12 == 0 {
            shard.checkpoint()?;
            log.purge_to(index - 3)?;
            keeper.keep(&shard)?;
        }
    }
    log.put_meta("vote", b"a vote")?;
    log.settle()?;
    shard.checkpoint()?;
    let segments = shard.segments();
    assert!(segments.values().map(Vec::len).sum::<usize>() > 1, "{segments:?}");
    assert!(
        keeper.bases.held().len() == 2 && disk.list(LOG)?.iter().filter(|n| n.ends_with(".log")).count() > 2
    );
    Ok(digests)
}

/// Reads all that readers read.
fn read_all(shard: &Shard) -> Result<(), StorageError> {
    let owners = vec![Owner::User { tenant: "t".into(), user: "u".into() }];
    shard.search(&SearchQuery {
        text: "long way changed".into(),
        k: 50,
        with_vector: true,
        ..proofs::search(owners, vec![0.6, 0.8])
    })?;
    let start = (0..9).map(|id| [id; 16]).collect();
    let (relations, tenant) = (vec![], "t".to_string());
    let (hops, fan_out, inbound, as_of, now) = (3, 10, false, 0, 0);
    shard.walk(&Walk {
        tenant,
        start,
        relations,
        hops,
        fan_out,
        inbound,
        as_of,
        now,
        include_archived: true,
    })?;
    shard.verify()
}

/// Opens a replica that may be damaged as a node does, restarting when the views turn out to be. What was found and mended.
fn live_on(disk: &Arc<dyn Disk>, digests: &[[u8; 16]]) -> Result<Vec<&'static str>, Failure> {
    let mut did = vec![];
    for _ in 0..3 {
        let Opened { log, shard, .. } = open(disk, false)?;
        if log.repair()?.is_some() {
            did.push("log cut");
        }
        match read_all(&shard) {
            Ok(()) => {}
            Err(error @ StorageError::Damaged { .. }) => {
                assert!(
                    error.to_string().contains(VIEWS) || error.to_string().contains("database"),
                    "{error}"
                );
                shard.condemn(&error.to_string())?;
                did.push("views condemned");
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let (position, digest) = shard.digest();
        if digest != digests[position.index as usize] {
            return Err(format!("a state was served that never was, at {}", position.index).into());
        }
        let last = log.last_index();
        if log.repair()?.is_none() && (last != ENTRIES || log.get_meta("vote")?.as_deref() != Some(b"a vote"))
        {
            return Err(
                format!("the log ends at {last} of {ENTRIES}, or the vote is lost, without a word").into()
            );
        }
        for (index, bytes) in log.read(log.first_index()..last + 1, usize::MAX)? {
            assert_eq!(decode_entry(&bytes)?.log_id().index + 1, index);
        }
        // What peers give back in a cluster: here, the same entries again.
        for (entry, index) in entries().into_iter().zip(1..) {
            if index > log.last_index().max(position.index) && last >= position.index {
                log.append(&[(index, &encode_entry(&entry))])?;
            }
            if index > position.index {
                let batch = decode_batch(&entry)?;
                apply_entries(&shard, 1, &[(entry, batch)])?;
            }
        }
        if shard.digest().1 != digests[ENTRIES as usize] {
            return Err("the replica did not come back to the history's end".into());
        }
        return Ok(did);
    }
    Err("damage was found again and again".into())
}

#[test]
fn every_flipped_bit_is_found_and_mended() -> Result<(), Failure> {
    sim::task::run_test(async {
        let (mut flips, mut cut, mut condemned) = (0, 0, 0);
        let healthy: Arc<dyn Disk> = SimDisk::new(1);
        let digests = lived(&healthy)?;
        let mut files = vec![];
        for dir in [LOG, VIEWS, BASES] {
            files.extend(healthy.list(dir)?.into_iter().map(|name| format!("{dir}/{name}")));
        }
        let content = |path: &String| -> Result<Vec<u8>, Failure> {
            let file = healthy.open(path)?;
            let mut bytes = vec![0; file.len()? as usize];
            file.read_at(&mut bytes, 0)?;
            Ok(bytes)
        };
        let contents: Vec<Vec<u8>> = files.iter().map(content).collect::<Result<_, _>>()?;
        for (path, bytes) in files.iter().zip(&contents) {
            for at in (0..bytes.len()).step_by(64) {
                let disk: Arc<dyn Disk> = SimDisk::new(1);
                for dir in [LOG, VIEWS, BASES] {
                    disk.create_dir_all(dir)?;
                }
                for (other, bytes) in files.iter().zip(&contents) {
                    disk.create(other)?.write_at(bytes, 0)?;
                }
                disk.open(path)?.write_at(&[bytes[at] ^ (1 << (at / 64 % 8))], at as u64)?;
                let did = live_on(&disk, &digests).map_err(|e| format!("{path} byte {at}: {e}"))?;
                flips += 1;
                cut += did.contains(&"log cut") as u64;
                condemned += did.contains(&"views condemned") as u64;
            }
        }
        println!("{flips} flips in {} files: {cut} logs cut, {condemned} views made anew", files.len());
        assert!(flips > 2000 && cut > 20 && condemned > 500, "{flips} {cut} {condemned}");
        Ok(())
    })?
}

#[test]
fn without_peers_damage_to_the_log_is_an_error_that_says_where() -> Result<(), Failure> {
    sim::task::run_test(async {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        lived(&disk)?;
        let names = disk.list(LOG)?;
        let newest = names.iter().rfind(|n| n.ends_with(".log")).ok_or("no segment")?;
        let file = disk.open(&format!("{LOG}/{newest}"))?;
        let mut byte = [0];
        file.read_at(&mut byte, 40)?;
        file.write_at(&[byte[0] ^ 1], 40)?;
        let error = open(&disk, true).err().ok_or("it opened")?;
        assert!(error.contains(newest.as_str()) && error.contains("byte"), "{error}");
        Ok(())
    })?
}

#[test]
fn a_purge_that_was_interrupted_is_finished_at_the_next_start() -> Result<(), Failure> {
    sim::task::run_test(async {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        lived(&disk)?;
        let Opened { log, .. } = open(&disk, false)?;
        let before = log.first_index();
        // The fact says entry 38 (in openraft's counting 37), the log does not know yet.
        log.put_meta("purged", &codec::encode_serde(&entries()[37].log_id()))?;
        drop(log);
        let Opened { log, shard, .. } = open(&disk, false)?;
        assert!(before < 39 && log.first_index() == 39 && log.repair()?.is_none());
        Ok(shard.verify()?)
    })?
}

#[test]
fn a_replica_that_nothing_can_mend_starts_over_and_does_not_vote() -> Result<(), Failure> {
    sim::task::run_test(async {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        lived(&disk)?;
        for dir in [VIEWS, BASES] {
            for name in disk.list(dir)?.iter().filter(|n| n.ends_with(".snap") || n.ends_with(".db")) {
                let file = disk.open(&format!("{dir}/{name}"))?;
                (0..file.len()? / 512).try_for_each(|sector| file.write_at(b"!", sector * 512 + 99))?;
            }
        }
        let alone = open(&disk, true).err().ok_or("it opened alone")?;
        assert!(alone.contains("backup"), "{alone}");
        let Opened { log, shard, .. } = open(&disk, false)?;
        assert_eq!((log.last_index(), log.get_meta("vote")?.as_deref()), (0, Some(&b"a vote"[..])));
        assert_eq!(log.repair()?.map(|r| (r.from, r.to)), Some((1, ENTRIES)));
        assert_eq!(shard.applied().0, Position::default());
        Ok(())
    })?
}

/// Whatever bytes a decoder is given, it answers or refuses. Valid ones are changed here and there, so that it gets far.
fn garbled(valid: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (edits, any::<prop::sample::Index>(), any::<bool>()).prop_map(move |(edits, end, cut)| {
        let mut bytes = valid.clone();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if cut {
            bytes.truncate(end.index(bytes.len()));
        }
        bytes
    })
}

fn valid_base() -> Vec<Vec<u8>> {
    let run = || -> Result<Vec<Vec<u8>>, Failure> {
        let disk: Arc<dyn Disk> = SimDisk::new(1);
        let shard = proofs::open(&disk, "views")?;
        for (batch, index) in ledger(12).iter().zip(1..) {
            proofs::apply(&shard, index, batch)?;
        }
        let mut frames = vec![];
        shard.export(&mut |frame| {
            frames.push(frame.to_vec());
            Ok(())
        })?;
        Ok(frames)
    };
    run().unwrap_or_default()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn decoders_of_values_never_panic(bytes in garbled(codec::encode(&ledger(9)[8])), random in prop::collection::vec(any::<u8>(), 0..300)) {
        for bytes in [bytes, random] {
            let _ = codec::decode::<Batch>(&bytes);
            let _ = codec::decode::<Vec<Outcome>>(&bytes);
            let _ = codec::decode::<nodes::views::Query>(&bytes);
            let _ = codec::unframe(&bytes);
            let _ = decode_entry(&bytes);
            let _ = storage::facts::parse(&bytes);
            let _ = storage::log::parse_mark(&bytes);
            let _ = storage::log::parse_segment_head(&bytes);
            let _ = storage::log::parse_entry(&bytes);
        }
    }

    #[test]
    fn decoders_of_entries_never_panic(bytes in garbled(encode_entry(&entries()[5]))) {
        if let Ok(entry) = decode_entry(&bytes) {
            let _ = decode_batch(&entry);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Pieces whose frames are sound but whose content is not, as no disk makes them: refused, and nothing has changed.
    #[test]
    fn a_garbled_snapshot_is_refused_whole(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), value in any::<u8>(), reframe in any::<bool>()) {
        let mut frames = valid_base();
        let which = which.index(frames.len());
        let before = frames[which].clone();
        let (payload, _) = codec::unframe(&before).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut payload = payload.to_vec();
        let at = at.index(payload.len());
        payload[at] = value;
        if reframe {
            frames[which].clear();
            codec::frame(&mut frames[which], &payload);
        } else {
            frames[which][codec::FRAME_HEAD + at] = value;
        }
        let changed = frames[which] != before;
        let disk: Arc<dyn Disk> = SimDisk::new(2);
        let shard = proofs::open(&disk, "views").map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut frames = frames.into_iter();
        let imported = shard.import(&mut || Ok(frames.next()));
        if changed && imported.is_err() {
            prop_assert_eq!(shard.applied().0, Position::default());
        }
        prop_assert!(shard.verify().is_ok());
    }
}
