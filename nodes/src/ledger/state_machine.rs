//! openraft's state machine on [`storage::Shard`]: the views of one replica.
//!
//! Entries are applied in one transaction per call, which also stores how far it got, so a crash at any moment leaves a
//! prefix. Applying twice changes nothing. What a power loss takes from the views, the log gives back: it is purged only
//! below a position that a checkpoint made durable.
//!
//! A "snapshot" that openraft holds of this replica is therefore only a checkpoint's position; its data is exported from the views when a
//! lagging peer needs it, and may then show a later position than its meta. That is safe: what the peer gets twice, it skips.
//! Beside that, a checkpoint now and then writes a base ([`storage::bases`]), from which damaged views are made anew ([`recovery`]).

use super::epochs::epoch_of;
use super::log_store::position_index;
use super::recovery::{self, Keeper};
use super::types::{Data, Entry, LogId, Reply, SnapshotMeta, StoredMembership, Types};
use futures::{Stream, StreamExt};
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use sim::cpu::cost;
use sim::disk::Disk;
use sim::time::Duration;
use std::io;
use std::sync::{Arc, Mutex};
use storage::bases::Reader;
use storage::model::{Batch, Position};
use storage::{Shard, StorageError, codec};

type Snapshot = openraft::alias::SnapshotOf<Types, SnapshotSource>;

/// Memories applied in one transaction at most.
const APPLY_MEMORIES_MAX: usize = 1024;

/// Where a snapshot's data comes from.
pub enum SnapshotSource {
    /// This replica's own views.
    Views(Arc<Shard>),
    /// A file that a peer sent, on this replica's disk.
    File { disk: Arc<dyn Disk>, path: String },
}

pub struct StateMachine {
    shard: Arc<Shard>,
    keeper: Keeper,
    /// The epoch in which the ledger began.
    first_epoch: u64,
    /// How far openraft knows that the views are. A received snapshot's data can be further than it said, and a checkpoint must
    /// not name entries that openraft has not yet handed over.
    known: SnapshotMeta,
    /// The last checkpoint.
    snapshot: Arc<Mutex<SnapshotMeta>>,
}

fn io_error(error: StorageError) -> io::Error {
    io::Error::other(error.to_string())
}

/// How far the views are, in openraft's terms.
pub fn applied_meta(shard: &Shard) -> io::Result<SnapshotMeta> {
    let (_, bytes) = shard.applied();
    if bytes.is_empty() {
        return Ok(SnapshotMeta::default());
    }
    let (last_log_id, last_membership) = codec::decode_serde(&bytes)
        .map_err(|e| io::Error::other(format!("the views' ledger position is unreadable: {e}")))?;
    Ok(SnapshotMeta { last_log_id, last_membership })
}

impl StateMachine {
    /// Takes the opened views of a shard whose ledger began in `first_epoch`. What they hold is made durable first, since the log may be purged below it.
    pub async fn new(shard: Arc<Shard>, keeper: Keeper, first_epoch: u64) -> io::Result<StateMachine> {
        let views = shard.clone();
        sim::task::blocking(move || views.checkpoint()).await.map_err(io_error)?;
        let known = applied_meta(&shard)?;
        let index = known.last_log_id.map_or(0, |l| position_index(l.index));
        sim::debug!("views opened at {index}");
        let snapshot = Arc::new(Mutex::new(known.clone()));
        Ok(StateMachine { shard, keeper, first_epoch, known, snapshot })
    }

    async fn apply_some(&self, entries: Vec<(Entry, Option<Batch>)>) -> Vec<Vec<storage::model::Outcome>> {
        let memories: usize = entries.iter().map(|(_, b)| b.as_ref().map_or(0, |b| b.commands.len())).sum();
        sim::rand::buggify_wait("before an apply", 0.02, Duration::from_millis(200)).await;
        let (shard, epoch) = (self.shard.clone(), self.first_epoch);
        let views = shard.clone();
        let applied = sim::task::blocking(move || apply_entries(&shard, epoch, &entries));
        let outcomes = match applied.await {
            Ok(outcomes) => outcomes,
            Err(error) if recovery::is_fatal_to_views(&error) => recovery::give_up_views(&views, error).await,
            Err(error) => sim::task::abort(&format!("the views cannot apply the ledger: {error}")).await,
        };
        sim::cpu::work(cost::APPLY_MEMORY * memories as u32).await;
        outcomes
    }
}

/// Applies entries, and stores with them how far the ledger is applied in openraft's terms.
pub fn apply_entries(
    shard: &Shard,
    first_epoch: u64,
    entries: &[(Entry, Option<Batch>)],
) -> Result<Vec<Vec<storage::model::Outcome>>, StorageError> {
    let meta = applied_meta(shard)?;
    let mut membership = meta.last_membership;
    let mut last = meta.last_log_id;
    for (entry, _) in entries {
        last = Some(entry.log_id());
        if let EntryPayload::Membership(m) = &entry.payload {
            membership = StoredMembership::new(Some(entry.log_id()), m.clone());
        }
    }
    let meta = codec::encode_serde(&(last, membership));
    let items: Vec<storage::Entry<'_>> = entries
        .iter()
        .map(|(entry, batch)| {
            let (id, batch) = (entry.log_id(), batch.as_ref());
            let epoch = epoch_of(first_epoch, id.leader_id.term);
            storage::Entry { epoch, index: position_index(id.index), batch }
        })
        .collect();
    shard.apply(&items, &meta)
}

pub fn decode_batch(entry: &Entry) -> Result<Option<Batch>, String> {
    match &entry.payload {
        EntryPayload::Normal(Data(bytes)) => codec::decode(&bytes[..]).map(Some).map_err(|e| e.to_string()),
        _ => Ok(None),
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotData = SnapshotSource;
    type SnapshotBuilder = Checkpointer;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let meta = applied_meta(&self.shard)?;
        Ok((meta.last_log_id, meta.last_membership))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut ended = false;
        while !ended {
            let (mut batch, mut responders, mut memories) = (vec![], vec![], 0);
            while memories < APPLY_MEMORIES_MAX {
                let Some(item) = entries.next().await else {
                    ended = true;
                    break;
                };
                let (entry, responder) = item?;
                let decoded = match decode_batch(&entry) {
                    Ok(decoded) => decoded,
                    Err(error) => {
                        let reason = format!("committed entry {} cannot be decoded: {error}", entry.log_id());
                        sim::task::abort(&reason).await
                    }
                };
                memories += decoded.as_ref().map_or(1, |b| b.commands.len());
                batch.push((entry, decoded));
                responders.push(responder);
            }
            if batch.is_empty() {
                continue;
            }
            for (entry, _) in &batch {
                self.known.last_log_id = Some(entry.log_id());
                if let EntryPayload::Membership(m) = &entry.payload {
                    self.known.last_membership = StoredMembership::new(Some(entry.log_id()), m.clone());
                }
            }
            let outcomes = self.apply_some(batch).await;
            for (responder, outcomes) in responders.into_iter().zip(outcomes) {
                if let Some(responder) = responder {
                    responder.send(Reply(outcomes));
                }
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Checkpointer {
        let (shard, keeper) = (self.shard.clone(), self.keeper.clone());
        Checkpointer { shard, keeper, meta: self.known.clone(), snapshot: self.snapshot.clone() }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotSource) -> io::Result<()> {
        let SnapshotSource::File { disk, path } = snapshot else {
            return Err(io::Error::other("a snapshot to install must have been received as a file"));
        };
        let (shard, bases) = (self.shard.clone(), self.keeper.bases.clone());
        let index = meta.last_log_id.map_or(0, |l| position_index(l.index));
        let installed = sim::task::blocking(move || -> Result<Position, StorageError> {
            let (position, _) = shard.applied();
            // The views may already be ahead: a snapshot's data can be newer than its meta.
            let newer = position.index < index;
            if newer {
                let mut reader = Reader::open(&*disk, &path)?;
                shard.import(&mut || reader.next_chunk())?;
            }
            // In either case: openraft purges the log up to here next, which must then not be needed to refill the views.
            shard.checkpoint()?;
            match newer {
                true => drop(bases.adopt(&path, &shard)?),
                false => disk.remove(&path)?,
            }
            Ok(shard.applied().0)
        });
        match installed.await {
            Ok(position) => {
                sim::trace::probe("ledger: snapshot installed");
                sim::info!("snapshot to {index} installed, views at {}", position.index);
            }
            Err(error) if recovery::is_fatal_to_views(&error) => {
                recovery::give_up_views(&self.shard, error).await
            }
            Err(error) => return Err(io::Error::other(format!("snapshot not installed: {error}"))),
        }
        self.known = meta.clone();
        *lock(&self.snapshot) = meta.clone();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let meta = lock(&self.snapshot).clone();
        Ok(meta
            .last_log_id
            .is_some()
            .then(|| Snapshot { meta, snapshot: SnapshotSource::Views(self.shard.clone()) }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Makes the applied state durable, so that the log below it may go.
pub struct Checkpointer {
    shard: Arc<Shard>,
    keeper: Keeper,
    /// What was applied when the checkpoint was asked for; it covers at least that.
    meta: SnapshotMeta,
    snapshot: Arc<Mutex<SnapshotMeta>>,
}

impl RaftSnapshotBuilder<Types> for Checkpointer {
    type SnapshotData = SnapshotSource;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let meta = self.meta.clone();
        sim::rand::buggify_wait("before a checkpoint", 0.2, Duration::from_secs(2)).await;
        let (shard, keeper) = (self.shard.clone(), self.keeper.clone());
        let kept = sim::task::blocking(move || {
            if sim::planted!("purge-before-the-checkpoint") {
                return Ok(());
            }
            shard.checkpoint()?;
            keeper.keep(&shard)
        });
        match kept.await {
            Ok(()) => {}
            Err(error) if recovery::is_fatal_to_views(&error) => {
                recovery::give_up_views(&self.shard, error).await
            }
            Err(error) => {
                sim::task::abort(&format!("the views cannot be made durable ({error}); check the disk")).await
            }
        }
        sim::debug!("checkpoint at {}", meta.last_log_id.map_or(0, |l| position_index(l.index)));
        let mut held = lock(&self.snapshot);
        if meta.last_log_id > held.last_log_id {
            *held = meta.clone();
        }
        Ok(Snapshot { meta, snapshot: SnapshotSource::Views(self.shard.clone()) })
    }
}
