//! The views' promises, one test each.

use crate::model::*;
use crate::testing::memory;
use crate::*;
use proptest::prelude::*;
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::collections::BTreeMap;
use std::sync::Arc;

type Result<T> = std::result::Result<T, StorageError>;

fn open(disk: &Arc<SimDisk>) -> Result<Shard> {
    Shard::open(disk.clone(), "views", ShardOptions::default())
}

fn vector(seed: u64) -> Vec<f32> {
    let raw: Vec<f32> = (0..16).map(|i| ((seed * 131 + i * 29) % 101) as f32 - 50.0).collect();
    let norm = raw.iter().map(|x| x * x).sum::<f32>().sqrt();
    raw.into_iter().map(|x| x / norm).collect()
}

fn with_vector(tenant: &str, id: u64, text: &str) -> Memory {
    Memory { vector: vector(id), ..memory(tenant, id, text) }
}

fn command(tenant: &str, key: &str, hash: u8, now: i64, operation: Operation) -> Command {
    Command {
        tenant: tenant.into(),
        slot: None,
        idempotency_key: key.into(),
        request_hash: [hash; 16],
        now,
        operation,
    }
}

fn add(id: u64) -> Operation {
    Operation::Add(with_vector("t", id, &format!("memory {id}")))
}

fn update(id: u64, text: &str, expected_version: Option<u64>) -> Operation {
    let patch = Patch { text: Some(text.into()), ..Patch::default() };
    Operation::Update { id: memory("t", id, "").id, expected_version, patch }
}

fn delete(id: u64) -> Operation {
    Operation::Delete { id: memory("t", id, "").id, expected_version: None }
}

fn apply(shard: &Shard, index: u64, commands: Vec<Command>) -> Result<Vec<Outcome>> {
    let batch = Batch { commands };
    let mut outcomes =
        shard.apply(&[Entry { epoch: 1, index, batch: Some(&batch) }], &index.to_le_bytes())?;
    Ok(outcomes.pop().unwrap_or_default())
}

fn search(k: usize) -> SearchQuery {
    SearchQuery {
        tenant: "t".into(),
        owners: vec![memory("t", 0, "").owner()],
        vector: vector(7),
        space: "s".into(),
        text: String::new(),
        k,
        threshold: None,
        filter: None,
        statuses: vec![Status::Active],
        time: None,
        now: 0,
        with_vector: false,
    }
}

fn check(shard: &Shard) -> Result<()> {
    assert_eq!(shard.digest(), shard.digest_by_scan()?);
    Ok(())
}

#[test]
fn same_key_applies_once() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    apply(&shard, 1, vec![command("t", "", 0, 5, add(1))])?;
    let first = apply(&shard, 2, vec![command("t", "k", 1, 5, update(1, "new", None))])?;
    let again = apply(&shard, 3, vec![command("t", "k", 1, 9, update(1, "new", None))])?;
    assert_eq!(first, again);
    assert!(matches!(first[0], Outcome::Done { version: 2, .. }));
    assert_eq!(shard.history("t", None, &memory("t", 1, "").id)?.len(), 2);
    check(&shard)
}

#[test]
fn key_with_other_body_is_refused() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    apply(&shard, 1, vec![command("t", "k", 1, 5, add(1))])?;
    assert_eq!(apply(&shard, 2, vec![command("t", "k", 2, 5, add(2))])?, [Outcome::KeyReused]);
    // Another tenant's key is another key.
    let other = command("u", "k", 2, 5, Operation::Add(memory("u", 2, "x")));
    assert!(matches!(apply(&shard, 3, vec![other])?[0], Outcome::Done { .. }));
    check(&shard)
}

#[test]
fn key_is_forgotten_after_a_day_of_ledger_time() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    apply(&shard, 1, vec![command("t", "k", 1, 5, add(1))])?;
    let day = crate::apply::KEY_LIFE_MS;
    apply(&shard, 2, vec![command("t", "", 0, day, add(2))])?;
    assert_eq!(shard.counts()?.idempotency_keys, 1);
    apply(&shard, 3, vec![command("t", "", 0, day + 6, add(3))])?;
    assert_eq!(shard.counts()?.idempotency_keys, 0);
    check(&shard)
}

#[test]
fn expected_version_is_decided_at_apply() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    apply(&shard, 1, vec![command("t", "", 0, 5, add(1))])?;
    let both = vec![
        command("t", "", 0, 5, update(1, "a", Some(1))),
        command("t", "", 0, 5, update(1, "b", Some(1))),
    ];
    let outcomes = apply(&shard, 2, both)?;
    assert!(matches!(outcomes[0], Outcome::Done { version: 2, .. }));
    assert!(matches!(outcomes[1], Outcome::VersionMismatch { actual: 2, .. }));
    assert!(matches!(
        apply(&shard, 3, vec![command("t", "", 0, 5, delete(9))])?[0],
        Outcome::NotFound { .. }
    ));
    check(&shard)
}

#[test]
fn versions_go_on_after_a_deletion() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let commands = [add(1), update(1, "x", None), delete(1), add(1)];
    let outcomes = apply(&shard, 1, commands.map(|o| command("t", "", 0, 5, o)).into())?;
    let versions: Vec<u64> =
        outcomes.iter().map(|o| if let Outcome::Done { version, .. } = o { *version } else { 0 }).collect();
    assert_eq!(versions, [1, 2, 3, 4]);
    let kinds: Vec<ChangeKind> =
        shard.history("t", None, &memory("t", 1, "").id)?.iter().map(|c| c.kind).collect();
    assert_eq!(kinds, [ChangeKind::Added, ChangeKind::Updated, ChangeKind::Deleted, ChangeKind::Added]);
    let positions: Vec<Position> = shard
        .changes_after("t", Position { epoch: 1, index: 1, item: 0 }, 10)?
        .iter()
        .map(|c| c.position)
        .collect();
    assert_eq!(positions.iter().map(|p| p.item).collect::<Vec<_>>(), [1, 2, 3]);
    check(&shard)
}

#[test]
fn what_is_written_again_is_decided_by_the_last_version() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let since = Position { epoch: 1, index: 5, item: 0 };
    let again = |last, operation| Operation::Again { last, since, operation: Box::new(operation) };
    let mut index = 0;
    let mut outcome = |key: &str, operation| -> Result<Outcome> {
        index += 1;
        apply(&shard, index, vec![command("t", key, 1, 1, operation)])?
            .pop()
            .ok_or(StorageError::Snapshot("".into()))
    };
    let done = |outcome: &Outcome| match outcome {
        Outcome::Done { version, .. } => Ok(*version),
        Outcome::VersionMismatch { actual, .. } => Err(*actual),
        other => panic!("{other:?}"),
    };
    assert_eq!(done(&outcome("a", again(3, add(1)))?), Err(0), "there never was one");
    let first = outcome("b", again(0, add(1)))?;
    assert_eq!(done(&first), Ok(1));
    assert_eq!(done(&outcome("c", again(1, update(1, "x", None)))?), Ok(2));
    assert_eq!(done(&outcome("d", again(1, update(1, "y", None)))?), Err(2));
    assert_eq!(done(&outcome("e", again(2, update(1, "y", Some(1))))?), Err(2), "by its own expectation");
    assert_eq!(done(&outcome("f", again(2, delete(1)))?), Ok(3));
    // What was deleted does not come back by what was lost before that.
    assert_eq!(done(&outcome("g", again(0, add(1)))?), Err(3));
    assert_eq!(done(&outcome("h", again(3, add(1)))?), Ok(4));
    // Its key is asked first.
    assert_eq!(outcome("b", again(u64::MAX, add(1)))?, first);
    // Nor does what was lost before somebody was erased.
    let subject = Subject { user: "u".into(), agent: String::new() };
    let erase = Operation::Erase { erasure: 1, subject, epoch: 1, before: None, rows_max: 9 };
    assert!(matches!(outcome("", erase)?, Outcome::Erased { .. }));
    assert!(matches!(outcome("i", again(0, add(2)))?, Outcome::NotFound { .. }));
    let since = Position { epoch: 2, index: 5, item: 0 };
    let later = Operation::Again { last: 0, since, operation: Box::new(add(2)) };
    assert_eq!(done(&outcome("j", later)?), Ok(1));
    Ok(())
}

#[test]
fn no_read_shows_more_than_it_says() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    apply(&shard, 1, vec![command("t", "k1", 1, 1, add(1))])?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let id = memory("t", 1, "").id;
            let mut last = 0;
            while last < 300 {
                let shown = shard.get("t", None, &id, 1).expect("reads").expect("it is there").version;
                // Each entry makes one version.
                assert!(shown <= shard.seen_at_most().index && last <= shown);
                last = shown;
            }
        });
        for index in 2..=300 {
            let key = format!("k{index}");
            apply(&shard, index, vec![command("t", &key, 1, 1, update(1, &key, None))])?;
        }
        Ok(())
    })
}

#[test]
fn filtered_search_returns_k_while_k_exist() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let add = |id: u64| {
        let mut m = with_vector("t", id, "text");
        m.metadata = format!(r#"{{"even": {}}}"#, id.is_multiple_of(2));
        command("t", "", 0, 5, Operation::Add(m))
    };
    apply(&shard, 1, (0..200).map(add).collect())?;
    let field = Field::Metadata("even".into());
    let filter = Some(Filter::Compare { field, op: CompareOp::Eq, value: Value::Bool(true) });
    let hits = shard.search(&SearchQuery { filter: filter.clone(), ..search(100) })?;
    assert_eq!(hits.len(), 100);
    assert!(hits.iter().all(|h| h.memory.id[15].is_multiple_of(2)));
    assert!(hits.windows(2).all(|w| w[0].similarity >= w[1].similarity));
    assert_eq!(shard.search(&SearchQuery { filter, ..search(150) })?.len(), 100);
    Ok(())
}

#[test]
fn other_tenant_is_never_found() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let theirs = Operation::Add(with_vector("other", 1, "secret"));
    apply(&shard, 1, vec![command("other", "", 0, 5, theirs), command("t", "", 0, 5, add(1))])?;
    let id = memory("t", 1, "").id;
    assert_eq!(shard.get("t", None, &id, 0)?.map(|m| m.tenant.clone()).as_deref(), Some("t"));
    assert!(shard.search(&search(10))?.iter().all(|h| h.memory.tenant == "t"));
    assert!(matches!(apply(&shard, 2, vec![command("t", "", 0, 5, delete(1))])?[0], Outcome::Done { .. }));
    assert_eq!(shard.get("t", None, &id, 0)?, None);
    assert!(shard.get("other", None, &id, 0)?.is_some());
    check(&shard)
}

#[test]
fn reopened_shard_equals_before_and_replays_change_nothing() -> Result<()> {
    let disk = SimDisk::new(1);
    let shard = open(&disk)?;
    for index in 1..=20 {
        apply(&shard, index, vec![command("t", &format!("k{index}"), 1, 5, add(index))])?;
    }
    let before = (shard.digest(), shard.applied(), shard.search(&search(5))?);
    drop(shard);
    let shard = open(&disk)?;
    assert_eq!(before, (shard.digest(), shard.applied(), shard.search(&search(5))?));
    assert_eq!(apply(&shard, 20, vec![command("t", "", 0, 5, add(99))])?, []);
    assert_eq!(before.0, shard.digest());
    check(&shard)
}

#[test]
fn power_loss_takes_back_a_suffix_and_never_a_checkpoint() -> Result<()> {
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let shard = open(&disk)?;
        let mut kept = 0;
        for index in 1..=30 {
            apply(&shard, index, vec![command("t", &format!("k{index}"), 1, 5, add(index))])?;
            if index % 7 == 0 {
                kept = shard.checkpoint()?.index;
            }
        }
        let digest = shard.digest();
        disk.power_off();
        drop(shard);
        disk.power_on();
        let shard = open(&disk)?;
        let at = shard.applied_index();
        assert!(at >= kept, "seed {seed}: at {at} after a checkpoint at {kept}");
        assert_eq!(shard.counts()?.memories, at, "seed {seed}");
        check(&shard)?;
        // The ledger gives back what was lost.
        for index in 1..=30 {
            apply(&shard, index, vec![command("t", &format!("k{index}"), 1, 5, add(index))])?;
        }
        assert_eq!(shard.digest(), digest, "seed {seed}");
    }
    Ok(())
}

#[test]
fn an_expired_memory_is_gone_for_writers_too_and_its_id_is_free() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let short = |id: u64| Operation::Add(Memory { expires: Some(100), ..with_vector("t", id, "soon gone") });
    apply(&shard, 1, vec![command("t", "", 0, 5, short(1)), command("t", "", 0, 5, short(2))])?;
    let early = apply(&shard, 2, vec![command("t", "", 0, 99, short(1))])?;
    assert!(matches!(early[..], [Outcome::AlreadyExists { version: 1, .. }]), "{early:?}");
    let late = vec![
        command("t", "", 0, 100, update(1, "late", None)),
        command("t", "", 0, 100, delete(1)),
        command("t", "", 0, 100, add(1)),
    ];
    let late = apply(&shard, 3, late)?;
    assert!(
        matches!(
            late[..],
            [Outcome::NotFound { .. }, Outcome::NotFound { .. }, Outcome::Done { version: 2, .. }]
        ),
        "{late:?}"
    );
    assert_eq!(shard.get("t", None, &memory("t", 1, "").id, 100)?.map(|m| m.version), Some(2));
    assert_eq!(shard.history("t", None, &memory("t", 1, "").id)?.len(), 2);
    assert_eq!(shard.counts()?.memories, 2, "the other one still has its row");
    check(&shard)
}

/// A tear between two generations of the write-ahead log, whose first frames differ in two top bits: see `records`. The paddings
/// put these bits where they cancel out in SQLite's sum, and the rest behind the sector's end.
#[test]
fn a_torn_write_over_an_old_log_is_never_taken_for_a_transaction() -> Result<()> {
    let meta = |index: u64| codec::encode(&(vec![7u8; 2], index, vec![7u8; 13], vec![index as u8; 44]));
    for seed in 0..100 {
        let disk = SimDisk::new(seed);
        let shard = open(&disk)?;
        for index in [301, 302, 302 + 128] {
            shard.checkpoint()?;
            assert_eq!(disk.open("views/records.db-wal")?.len()?, 0, "a log of old frames is left");
            shard.apply(&[Entry { epoch: 1, index, batch: None }], &meta(index))?;
        }
        disk.power_off();
        drop(shard);
        disk.power_on();
        let (at, found) = open(&disk)?.applied();
        assert!(matches!(at.index, 302 | 430) && found == meta(at.index), "seed {seed}: {at:?}, {found:?}");
    }
    Ok(())
}

fn export(shard: &Shard) -> Result<Vec<Vec<u8>>> {
    let mut chunks = vec![];
    shard.export(&mut |frame| {
        chunks.push(frame.to_vec());
        Ok(())
    })?;
    Ok(chunks)
}

#[test]
fn a_checkpoint_beside_a_long_read_is_durable() -> Result<()> {
    for seed in 0..30 {
        let disk = SimDisk::new(seed);
        let shard = open(&disk)?;
        let mut at = 0;
        let mut some_more = || -> Result<u64> {
            for _ in 0..5 {
                at += 1;
                apply(&shard, at, vec![command("t", "", 0, 5, add(at))])?;
            }
            Ok(at)
        };
        some_more()?;
        shard.checkpoint()?;
        let mut kept = 0;
        // The read keeps the log from being moved as a whole.
        let cut = shard.export(&mut |_| {
            some_more()?;
            kept = shard.checkpoint()?.index;
            disk.power_off();
            Err(StorageError::Snapshot("the power is off".into()))
        });
        assert!(cut.is_err() && kept == 10);
        drop(shard);
        disk.power_on();
        let shard = open(&disk)?;
        assert!(shard.applied_index() >= kept, "seed {seed}: {:?} after {kept}", shard.applied().0);
        check(&shard)?;
    }
    Ok(())
}

#[test]
fn export_and_import_give_an_equal_shard() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    for index in 1..=20 {
        let operation = if index % 4 == 0 { delete(index - 1) } else { add(index) };
        apply(&shard, index, vec![command("t", &format!("k{index}"), 1, 5, operation)])?;
    }
    let chunks = export(&shard)?;
    let copy = open(&SimDisk::new(2))?;
    let operations = [add(77), add(1), update(1, "of another state", None)];
    apply(&copy, 1, operations.map(|o| command("t", "", 0, 5, o)).into())?;
    assert_eq!(copy.search(&search(20))?.len(), 2);
    // Cut short or damaged, it changes nothing.
    let old = copy.digest();
    let mut short = chunks[..chunks.len() - 1].iter().cloned();
    assert!(copy.import(&mut || Ok(short.next())).is_err());
    let mut damaged = chunks.clone();
    damaged[3][12] ^= 1;
    let mut damaged = damaged.into_iter();
    assert!(copy.import(&mut || Ok(damaged.next())).is_err());
    // So does one whose frames are sound but of another state.
    let other = open(&SimDisk::new(3))?;
    apply(&other, 40, vec![command("t", "", 0, 5, add(500))])?;
    let mut swapped = chunks.clone();
    swapped[0] = export(&other)?.swap_remove(0);
    let mut swapped = swapped.into_iter();
    assert!(copy.import(&mut || Ok(swapped.next())).is_err());
    assert_eq!(copy.digest(), old);
    check(&copy)?;
    let mut chunks = chunks.into_iter();
    copy.import(&mut || Ok(chunks.next()))?;
    assert_eq!((copy.digest(), copy.applied()), (shard.digest(), shard.applied()));
    assert_eq!(copy.search(&search(20))?, shard.search(&search(20))?);
    check(&copy)
}

#[test]
fn full_disk_is_an_error_and_nothing_is_half_applied() -> Result<()> {
    let disk = SimDisk::new(1);
    let shard = open(&disk)?;
    apply(&shard, 1, vec![command("t", "", 0, 5, add(1))])?;
    let before = shard.digest();
    disk.set_faults(sim::disk::simulated::DiskFaults { full: true, ..Default::default() });
    assert!(apply(&shard, 2, (2..500).map(|id| command("t", "", 0, 5, add(id))).collect()).is_err());
    disk.set_faults(Default::default());
    assert_eq!(shard.digest(), before);
    check(&shard)?;
    apply(&shard, 2, vec![command("t", "", 0, 5, add(2))])?;
    check(&shard)
}

#[test]
fn a_checkpoint_whose_sync_fails_is_an_error() -> Result<()> {
    let disk = SimDisk::new(1);
    let shard = open(&disk)?;
    apply(&shard, 1, vec![command("t", "", 0, 5, add(1))])?;
    disk.set_faults(sim::disk::simulated::DiskFaults { sync_fail_one_in: 1, ..Default::default() });
    assert!(shard.checkpoint().is_err());
    Ok(())
}

#[test]
fn a_sync_that_fails_while_the_log_is_bounded_is_an_error() -> Result<()> {
    let disk = SimDisk::new(1);
    let shard = open(&disk)?;
    disk.set_faults(sim::disk::simulated::DiskFaults { sync_fail_one_in: 1, ..Default::default() });
    let large = |id: u64| Operation::Add(Memory { text: "x".repeat(60_000), ..memory("t", id, "") });
    let failed = (1..1000).find_map(|n| apply(&shard, n, vec![command("t", "", 0, 5, large(n))]).err());
    assert!(matches!(failed, Some(StorageError::Io(_) | StorageError::Damaged { .. })), "{failed:?}");
    Ok(())
}

#[test]
fn global_memories_are_found_by_all_and_no_others_of_their_tenant() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let global = |id| Memory { scope: Scope::Global, ..with_vector(GLOBAL_TENANT, id, "for everyone") };
    let add = |tenant, m| command(tenant, "", 0, 5, Operation::Add(m));
    let private = with_vector(GLOBAL_TENANT, 3, "the operator's own");
    let of_t = vec![add("t", with_vector("t", 1, "own"))];
    apply(
        &shard,
        1,
        [of_t, vec![add(GLOBAL_TENANT, global(1)), add(GLOBAL_TENANT, private.clone())]].concat(),
    )?;
    // A tenant can neither make a memory global nor write into another tenant.
    let refused = [add("t", Memory { tenant: "t".into(), ..global(4) }), add("t", with_vector("u", 5, "x"))];
    let outcomes = apply(&shard, 2, refused.into())?;
    assert!(outcomes.iter().all(|o| matches!(o, Outcome::NotFound { .. })), "{outcomes:?}");
    assert!(
        shard
            .get("u", None, &global(1).id, 0)?
            .is_some_and(|m| m.scope == Scope::Global && !m.vector.is_empty())
    );
    assert_eq!(shard.get("t", None, &global(1).id, 0)?.map(|m| m.text.clone()).as_deref(), Some("own"));
    assert_eq!(shard.get("t", None, &private.id, 0)?, None);
    let own = memory("t", 0, "").owner();
    let owners = vec![own.clone(), Owner::Global, own, private.owner()];
    let hits = shard.search(&SearchQuery { owners: owners.clone(), ..search(10) })?;
    let found: Vec<&str> = hits.iter().map(|h| h.memory.text.as_str()).collect();
    assert_eq!(found, ["own", "for everyone"]);
    let page = shard.list(&ListQuery { owners: owners.clone(), ..list(10) })?;
    assert_eq!((page.memories.len(), page.next), (2, None));
    // They have one id, and no page ends between them.
    let page = shard.list(&ListQuery { owners: vec![owners[0].clone(), Owner::Global], ..list(1) })?;
    assert_eq!((page.memories.len(), page.next), (2, None));
    check(&shard)
}

fn list(limit: usize) -> ListQuery {
    ListQuery {
        tenant: "t".into(),
        owners: vec![],
        filter: None,
        statuses: vec![],
        time: None,
        after: None,
        limit,
        now: 0,
        with_vector: false,
    }
}

#[test]
fn pages_of_a_listing_hold_each_memory_once() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let mine = |id: u64| Memory { user: format!("u{}", id % 3), ..with_vector("t", id, "x") };
    let batch =
        |ids: std::ops::Range<u64>| ids.map(|id| command("t", "", 0, 5, Operation::Add(mine(id)))).collect();
    apply(&shard, 1, batch(0..700))?;
    let expired = Memory { expires: Some(10), ..mine(700) };
    let archived = Memory { status: Status::Archived, ..mine(701) };
    apply(&shard, 2, [expired, archived].map(|m| command("t", "", 0, 5, Operation::Add(m))).into())?;
    let two = vec![mine(0).owner(), mine(1).owner()];
    for (owners, expected) in [(vec![], 700), (two, 467)] {
        let (mut after, mut seen) = (None, vec![]);
        loop {
            let page = shard.list(&ListQuery { owners: owners.clone(), after, now: 10, ..list(64) })?;
            assert!(page.memories.len() <= 64);
            seen.extend(page.memories.iter().map(|m| m.id));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(seen.len(), expected);
        assert!(seen.is_sorted_by(|a, b| a < b));
    }
    Ok(())
}

#[test]
fn forgetting_old_keys_keeps_up_with_batches() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let day = crate::apply::KEY_LIFE_MS;
    for index in 1..=20 {
        let now = index as i64 * day / 4;
        let keyed = |n: u64| command("t", &format!("{index}-{n}"), 1, now, add(index * 1000 + n));
        apply(&shard, index, (0..300).map(keyed).collect())?;
    }
    assert!(shard.counts()?.idempotency_keys <= 5 * 300, "{:?}", shard.counts()?);
    check(&shard)
}

/// While one thread adds, updates and deletes, others search: every hit is whole and none is missing.
#[test]
fn searches_beside_apply_find_k_while_k_exist() -> Result<()> {
    // Without a cache, which would hide that records and vectors differ.
    let shard = Shard::open(
        SimDisk::new(1),
        "views",
        ShardOptions { cache_bytes_max: 0, ..ShardOptions::default() },
    )?;
    apply(&shard, 1, (0..50).map(|id| command("t", "", 0, 5, add(id))).collect())?;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        let reader = || -> Result<()> {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // Ten more come and go at once.
                let found = shard.search(&search(100))?.len();
                assert!(found == 50 || found == 60, "{found}");
                let filter = Some(Filter::Exists { field: Field::Text });
                let found = shard.search(&SearchQuery { filter, ..search(100) })?.len();
                assert!(found == 50 || found == 60, "{found}");
            }
            Ok(())
        };
        let readers = [threads.spawn(reader), threads.spawn(reader)];
        let write = || -> Result<()> {
            for index in 2..200 {
                let come_or_go = |id| if index % 2 == 0 { add(100 + id) } else { delete(100 + id) };
                let turn = |id| [update(id, &format!("at {index}"), None), come_or_go(id)];
                let commands = (0..10).flat_map(turn).map(|o| command("t", "", 0, 5, o)).collect();
                apply(&shard, index, commands)?;
            }
            Ok(())
        };
        let written = write();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| StorageError::Snapshot("a reader panicked".into()))??;
        }
        written
    })?;
    check(&shard)
}

fn step(shard: &Shard, index: u64, step: MoveStep) -> Result<Outcome> {
    let outcomes = apply(shard, index, vec![command("", "", 0, 5, Operation::Move(step))])?;
    Ok(outcomes.into_iter().next().unwrap_or(Outcome::KeyReused))
}

#[test]
fn an_id_may_lie_in_two_slots_and_the_smallest_counts_where_none_is_named() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let of = |user: &str| Memory { user: user.into(), ..with_vector("t", 1, user) };
    let mut users = ["ana", "ben"].map(|user| (of(user).slot(), user));
    users.sort();
    let id = of("ana").id;
    apply(&shard, 1, users.map(|(_, user)| command("t", "", 0, 5, Operation::Add(of(user)))).into())?;
    let [(first, first_user), (second, second_user)] = users;
    assert_eq!(shard.locate("t", &id)?, [(first, "t".into()), (second, "t".into())]);
    let text = |slot| Ok::<_, StorageError>(shard.get("t", slot, &id, 0)?.map(|m| m.text.clone()));
    assert_eq!(text(None)?.as_deref(), Some(first_user));
    assert_eq!(text(Some(second))?.as_deref(), Some(second_user));
    assert_eq!(text(Some(first ^ 1))?, None);
    let mut in_second = command("t", "", 0, 5, update(1, "changed", None));
    in_second.slot = Some(second);
    let outcomes = apply(&shard, 2, vec![in_second, command("t", "", 0, 5, delete(1))])?;
    assert!(matches!(outcomes[..], [Outcome::Done { version: 2, .. }, Outcome::Done { version: 2, .. }]));
    assert_eq!((text(None)?.as_deref(), text(Some(first))?), (Some("changed"), None));
    assert_eq!(shard.locate("t", &id)?, [(first, "t".into()), (second, "t".into())], "a deletion is known");
    assert_eq!(shard.history("t", None, &id)?.len(), 2);
    assert_eq!(shard.history("t", Some(second), &id)?.len(), 2);
    assert_eq!(
        shard.search(&SearchQuery { owners: vec![of("ana").owner(), of("ben").owner()], ..search(9) })?.len(),
        1
    );
    check(&shard)
}

#[test]
fn what_is_not_taken_is_not_decided_and_its_key_stays_free() -> Result<()> {
    let shard = open(&SimDisk::new(1))?;
    let mine = |id: u64| Memory { user: "ana".into(), ..with_vector("t", id, "x") };
    let (here, there) = (with_vector("t", 1, "x").slot(), mine(2).slot());
    let keyed = |slot, key: &str, operation| Command { slot, ..command("t", key, 1, 5, operation) };
    apply(&shard, 1, vec![keyed(None, "", add(1)), keyed(None, "", Operation::Add(mine(2)))])?;
    let slots = [there].into_iter().collect::<slots::SlotSet>();
    assert!(matches!(step(&shard, 2, MoveStep::Seal { id: 1, slots: slots.clone() })?, Outcome::Done { .. }));
    let touch = Operation::Touch(vec![(mine(2).id, 1, 9), (mine(1).id, 1, 9)]);
    let refused = vec![
        keyed(None, "a", add(3)),
        keyed(Some(there), "b", Operation::Add(mine(4))),
        keyed(Some(here), "c", Operation::Add(mine(4))),
        keyed(Some(there), "d", delete(2)),
        keyed(Some(slots::SLOTS), "e", delete(1)),
        keyed(None, "f", Operation::DropMonth(Month::of(1))),
    ];
    let outcomes = apply(&shard, 3, refused)?;
    assert!(outcomes.iter().all(|o| *o == Outcome::NotHere), "{outcomes:?}");
    assert_eq!(shard.counts()?.idempotency_keys, 0);
    apply(&shard, 4, vec![keyed(None, "", touch)])?;
    let counted =
        |id: u64| Ok::<_, StorageError>(shard.get("t", None, &mine(id).id, 0)?.map(|m| m.access_count));
    assert_eq!((counted(1)?, counted(2)?), (Some(1), Some(0)), "what is sealed does not change");
    let taken = vec![keyed(Some(here), "a", add(3)), keyed(Some(here), "b", delete(1))];
    let outcomes = apply(&shard, 5, taken)?;
    assert!(outcomes.iter().all(|o| matches!(o, Outcome::Done { .. })), "{outcomes:?}");
    // A shard that holds something cannot be told that it has less.
    let other = open(&SimDisk::new(2))?;
    apply(&other, 1, vec![keyed(None, "", add(1))])?;
    assert_eq!(step(&other, 2, MoveStep::Own { slots })?, Outcome::MoveRefused);
    check(&shard)
}

fn erase(erasure: ErasureId, before: Option<Position>, rows_max: u32) -> Operation {
    let subject = Subject { user: "u".into(), agent: String::new() };
    Operation::Erase { erasure, subject, epoch: 1, before, rows_max }
}

/// Proposes until the erasure is done.
fn erased(shard: &Shard, index: &mut u64, operation: &Operation) -> Result<Erasure> {
    loop {
        *index += 1;
        let outcomes = apply(shard, *index, vec![command("t", "", 0, 7, operation.clone())])?;
        match outcomes.into_iter().next() {
            Some(Outcome::Erased { erasure, .. }) if erasure.next.is_none() => return Ok(erasure),
            Some(Outcome::Erased { .. }) => {}
            outcome => return Err(StorageError::Move(format!("{outcome:?}"))),
        }
    }
}

/// A shard with memories of `u` in all scopes, some updated and some deleted, and somebody else's.
fn lived_in(disk: &Arc<SimDisk>) -> Result<(Shard, u64)> {
    let shard = open(disk)?;
    let mine =
        |id: u64| Memory { metadata: r#"{"secret": true}"#.into(), ..with_vector("t", id, "a secret word") };
    let agents = |id: u64| Memory { agent: "helper".into(), ..mine(id) };
    let shared = |id: u64| Memory { scope: Scope::Shared, ..mine(id) };
    let other = |id: u64| Memory { user: "other".into(), ..with_vector("t", id, "another word") };
    let foreign = Operation::Add(with_vector("elsewhere", 1, "a foreign word"));
    let adds =
        (1..=6).map(mine).chain((7..=8).map(agents)).chain((9..=10).map(shared)).chain((11..=13).map(other));
    let commands =
        adds.map(|memory| command("t", &format!("k{}", memory.id[15]), 1, 5, Operation::Add(memory)));
    apply(&shard, 1, commands.chain([command("elsewhere", "", 0, 5, foreign)]).collect())?;
    let edge = |source: u64, target: u64| Edge {
        source: mine(source).id,
        relation: "knows".into(),
        target: mine(target).id,
        weight: 1.0,
        valid_from: None,
        valid_to: None,
    };
    let edges = Operation::UpsertEdges(vec![edge(1, 11), edge(11, 2), edge(11, 12)]);
    let changes = [
        update(1, "a changed secret", None),
        update(2, "once more", None),
        delete(3),
        edges,
        update(11, "kept", None),
    ];
    apply(&shard, 2, changes.map(|operation| command("t", "", 0, 5, operation)).into())?;
    Ok((shard, 2))
}

#[test]
fn an_erased_person_leaves_nothing_but_marks_and_others_lose_nothing() -> Result<()> {
    let disk = SimDisk::new(1);
    let (shard, mut index) = lived_in(&disk)?;
    shard.seal()?;
    let done = erased(&shard, &mut index, &erase(1, None, 3))?;
    // Ten memories; three had a second version, one of which is a deletion.
    assert_eq!((done.memories, done.versions), (10, 13));
    assert!(index > 4, "in several parts: {index}");
    let (mut seal, mut merge) = (0, 0);
    while shard.seal_due() {
        shard.seal()?;
        seal += 1;
    }
    while shard.merge()? {
        merge += 1;
    }
    assert!(seal > 0 && merge > 0, "the segments are made anew: {seal} {merge}");
    assert_eq!(shard.segments().values().flatten().map(|(_, _, dead)| *dead).sum::<usize>(), 0);
    for id in (1..=10).map(|id| memory("t", id, "").id) {
        assert_eq!(shard.get("t", None, &id, 6)?, None);
        let history = shard.history("t", None, &id)?;
        let kinds: Vec<ChangeKind> = history.iter().map(|change| change.kind).collect();
        assert_eq!(kinds, [ChangeKind::Erased]);
        let Memory { text, metadata, user, .. } = &history[0].memory;
        assert_eq!((&text[..], &metadata[..], &user[..]), ("", "", "u"));
    }
    let told = shard.changes_after("t", Position { epoch: 1, index: 2, item: u32::MAX }, 100)?;
    assert_eq!(told.iter().filter(|change| change.kind == ChangeKind::Erased).count(), 10);
    assert_eq!(shard.counts()?, Counts { memories: 4, vectors: 4, idempotency_keys: 13, edges: 1 });
    let words = |text: &str, owner: Owner| {
        shard.search(&SearchQuery { text: text.into(), vector: vec![], owners: vec![owner], ..search(20) })
    };
    assert!(words("secret word", memory("t", 1, "").owner())?.is_empty());
    let others = Owner::User { tenant: "t".into(), user: "other".into() };
    assert_eq!(shard.search(&SearchQuery { owners: vec![others], ..search(20) })?.len(), 3);
    assert_eq!(shard.history("t", None, &memory("t", 11, "").id)?.len(), 2);
    assert!(shard.get("elsewhere", None, &memory("t", 1, "").id, 6)?.is_some());
    // A retry from before gets its answer and brings nothing back; a new write begins behind the old versions.
    let mine = Operation::Add(with_vector("t", 1, "a new life"));
    let again = apply(&shard, index + 1, vec![command("t", "k1", 1, 8, mine.clone())])?;
    assert!(matches!(again[0], Outcome::Done { version: 1, .. }));
    assert_eq!(shard.get("t", None, &memory("t", 1, "").id, 6)?, None);
    let new = apply(&shard, index + 2, vec![command("t", "", 0, 8, mine)])?;
    assert!(matches!(new[0], Outcome::Done { version: 4, .. }), "{new:?}");
    // The erasure again is answered as before, and takes nothing of the new life.
    index += 2;
    assert_eq!(erased(&shard, &mut index, &erase(1, None, 3))?, done);
    assert!(shard.get("t", None, &memory("t", 1, "").id, 6)?.is_some());
    check(&shard)?;
    shard.verify()?;
    // Nor does it come back when the views are opened again.
    shard.checkpoint()?;
    disk.power_off();
    drop(shard);
    disk.power_on();
    let shard = open(&disk)?;
    assert_eq!(shard.get("t", None, &memory("t", 4, "").id, 6)?, None);
    check(&shard)
}

#[test]
fn an_erased_text_is_in_no_file_of_the_views() -> Result<()> {
    let disk = SimDisk::new(1);
    let (shard, mut index) = lived_in(&disk)?;
    let found = |disk: &Arc<SimDisk>| -> Result<bool> {
        let mut found = false;
        for name in disk.list("views")? {
            let file = disk.open(&format!("views/{name}"))?;
            let mut bytes = vec![0; file.len()? as usize];
            file.read_at(&mut bytes, 0)?;
            found |= bytes.windows(16).any(|part| part == b"a changed secret");
        }
        Ok(found)
    };
    shard.checkpoint()?;
    assert!(found(&disk)?, "this test finds what is there");
    erased(&shard, &mut index, &erase(1, None, 100))?;
    shard.checkpoint()?;
    assert!(!found(&disk)?);
    Ok(())
}

#[test]
fn an_erasure_made_again_spares_what_came_after_it() -> Result<()> {
    let (shard, mut index) = lived_in(&SimDisk::new(1))?;
    let new = Operation::Add(with_vector("t", 20, "a new life"));
    apply(&shard, index + 1, vec![command("t", "", 0, 6, new)])?;
    index += 1;
    // The first time was entry 3 of this epoch, and got lost.
    let done = erased(&shard, &mut index, &erase(1, Some(Position { epoch: 1, index: 3, item: 0 }), 4))?;
    assert_eq!(done.memories, 10);
    assert!(shard.get("t", None, &memory("t", 20, "").id, 6)?.is_some());
    assert_eq!(shard.get("t", None, &memory("t", 4, "").id, 6)?, None);
    check(&shard)
}

#[test]
fn two_erasures_of_one_deleted_memory_leave_one_mark() -> Result<()> {
    let (shard, mut index) = lived_in(&SimDisk::new(1))?;
    let id = memory("t", 4, "").id;
    index += 1;
    apply(&shard, index, vec![command("t", "", 0, 6, Operation::Delete { id, expected_version: None })])?;
    // The first one is made again, and spares the row of the deletion, which came after it; the second takes that too.
    let before = Some(Position { epoch: 1, index, item: 0 });
    for (erasure, before) in [(1, before), (2, None)] {
        erased(&shard, &mut index, &erase(erasure, before, 4))?;
        let marks = shard.history("t", None, &id)?;
        let marks = marks.iter().filter(|change| change.kind == ChangeKind::Erased).count();
        assert_eq!(marks, 1, "erasure {erasure}");
        check(&shard)?;
    }
    Ok(())
}

#[test]
fn the_list_of_erasures_and_their_marks_go_with_a_snapshot_and_a_replay() -> Result<()> {
    let (shard, mut index) = lived_in(&SimDisk::new(1))?;
    let (replayed, mut at) = lived_in(&SimDisk::new(2))?;
    for one in [&shard, &replayed] {
        let index = if std::ptr::eq(one, &shard) { &mut index } else { &mut at };
        erased(one, index, &erase(7, None, 3))?;
    }
    assert_eq!(shard.digest(), replayed.digest());
    let mut frames = vec![];
    shard.export(&mut |frame| {
        frames.push(frame.to_vec());
        Ok(())
    })?;
    let imported = open(&SimDisk::new(3))?;
    let mut chunks = frames.into_iter();
    imported.import(&mut || Ok(chunks.next()))?;
    assert_eq!(imported.digest(), shard.digest());
    assert_eq!(imported.erasures()?, shard.erasures()?);
    assert_eq!(imported.erasures()?.len(), 1);
    check(&imported)?;
    // It is forgotten in time.
    let later = crate::erase::KEPT_MS + 100;
    let other = Subject { user: "nobody".into(), agent: String::new() };
    let operation = Operation::Erase { erasure: 8, subject: other, epoch: 1, before: None, rows_max: 1000 };
    apply(&imported, index + 1, vec![command("t", "", 0, later, operation)])?;
    assert_eq!(imported.erasures()?.iter().map(|erasure| erasure.id).collect::<Vec<_>>(), [8]);
    check(&imported)
}

#[test]
fn nothing_is_erased_while_slots_are_on_their_way_or_in_another_epoch() -> Result<()> {
    let (shard, index) = lived_in(&SimDisk::new(1))?;
    let slots = [5].into_iter().collect::<slots::SlotSet>();
    step(&shard, index + 1, MoveStep::Seal { id: 1, slots })?;
    let outcomes = apply(&shard, index + 2, vec![command("t", "", 0, 7, erase(1, None, 3))])?;
    assert_eq!(outcomes, [Outcome::NotHere]);
    let (other, index) = lived_in(&SimDisk::new(2))?;
    let batch = Batch { commands: vec![command("t", "", 0, 7, erase(1, None, 3))] };
    let outcomes = other.apply(&[Entry { epoch: 2, index: index + 1, batch: Some(&batch) }], &[])?;
    assert_eq!(outcomes, [[Outcome::NotHere]], "it is meant for another epoch");
    assert!(shard.erasures()?.is_empty() && other.erasures()?.is_empty());
    check(&shard)
}

#[derive(Clone, Debug)]
enum Step {
    Add(u64),
    Update(u64),
    Delete(u64),
    Touch(u64),
}

fn some_step() -> impl Strategy<Value = Step> {
    let id = 0u64..12;
    prop_oneof![
        id.clone().prop_map(Step::Add),
        id.clone().prop_map(Step::Update),
        id.clone().prop_map(Step::Delete),
        id.prop_map(Step::Touch)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn random_commands_agree_with_a_plain_map(steps in proptest::collection::vec(some_step(), 1..60)) {
        let run = || -> Result<()> {
            let shard = open(&SimDisk::new(1))?;
            let mut model: BTreeMap<u64, (u64, String, u64)> = BTreeMap::new();
            let mut last: BTreeMap<u64, u64> = BTreeMap::new();
            for (index, step) in steps.iter().enumerate() {
                let text = format!("step {index}");
                let operation = match step {
                    Step::Add(id) => {
                        if !model.contains_key(id) {
                            let version = last.get(id).unwrap_or(&0) + 1;
                            last.insert(*id, version);
                            model.insert(*id, (version, format!("memory {id}"), 0));
                        }
                        add(*id)
                    }
                    Step::Update(id) => {
                        if let Some(held) = model.get_mut(id) {
                            *held = (held.0 + 1, text.clone(), held.2);
                            last.insert(*id, held.0);
                        }
                        update(*id, &text, None)
                    }
                    Step::Delete(id) => {
                        if let Some(held) = model.remove(id) {
                            last.insert(*id, held.0 + 1);
                        }
                        delete(*id)
                    }
                    Step::Touch(id) => {
                        if let Some(held) = model.get_mut(id) {
                            held.2 += 2;
                        }
                        Operation::Touch(vec![(memory("t", *id, "").id, 2, 9)])
                    }
                };
                apply(&shard, index as u64 + 1, vec![command("t", "", 0, 5, operation)])?;
            }
            for id in 0..12 {
                let held = shard.get("t", None, &memory("t", id, "").id, 0)?;
                let held = held.map(|m| (m.version, m.text.clone(), m.access_count));
                assert_eq!(held.as_ref(), model.get(&id), "memory {id}");
            }
            assert_eq!(shard.search(&search(100))?.len(), model.len());
            check(&shard)
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}
