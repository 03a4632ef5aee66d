//! A shard's views as a stream of checksummed frames: what a replica that lags behind the log is given.
//!
//! Each frame holds an encoded [`Piece`]; a chunk holds whole frames. The last piece counts the others and carries the state, so
//! a stream that was cut short or mixed up is refused, and then nothing has changed: an import is one transaction. What the receiver has already need not be
//! sent ([`delta`]).

use crate::apply::Applier;
use crate::codec;
use crate::delta::{self, Kept, RangeHashes};
use crate::error::StorageError;
use crate::graph::{self, EdgeRow};
use crate::model::{Erasure, MemoryId, Position};
use crate::records::months;
use crate::records::rows::{self, KeyRow, Place, State, Stored};
use crate::shard::{Shard, lock};
use crate::slots::Slot;
use bincode::{Decode, Encode};
use std::sync::Arc;

#[derive(Encode, Decode)]
pub enum Piece {
    Memory(Stored),
    History {
        version: u64,
        row: Stored,
    },
    Key(KeyRow),
    /// Always the last one.
    End {
        pieces: u64,
        state: Box<State>,
    },
    Edge(EdgeRow),
    /// Where a deleted memory was.
    Deleted {
        tenant: String,
        id: MemoryId,
        slot: Slot,
        place: Place,
    },
    Erasure(Erasure),
    /// Only on the way to a receiver that has these rows.
    Kept(Kept),
}

impl Piece {
    /// Its part of the digest of the state.
    pub fn digest(&self) -> u128 {
        match self {
            Piece::Memory(row) => rows::memory_hash("memories", row),
            Piece::History { row, .. } => rows::memory_hash("history", row),
            Piece::Key(row) => rows::key_hash(row),
            Piece::Edge(row) => graph::hash(row),
            Piece::Erasure(erasure) => rows::erasure_hash(erasure),
            Piece::Deleted { .. } | Piece::Kept(_) | Piece::End { .. } => 0,
        }
    }
}

impl Shard {
    /// Gives the whole logical state at one position to `sink`, a frame at a time, and returns that position and the
    /// state's digest.
    /// Applying goes on meanwhile.
    pub fn export(
        &self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), StorageError>,
    ) -> Result<(Position, [u8; 16]), StorageError> {
        self.export_to(&RangeHashes::default(), sink)
    }

    /// Likewise, but for the rows that a receiver has: it completes what it gets ([`delta::Material::complete`]).
    pub fn export_to(
        &self,
        there: &RangeHashes,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), StorageError>,
    ) -> Result<(Position, [u8; 16]), StorageError> {
        let mut reader = self.records.reader();
        let snapshot = reader.transaction()?;
        let mut pieces = 0;
        let mut frame = vec![];
        let mut send = |piece: Piece, rows: u64| {
            pieces += rows;
            frame.clear();
            codec::frame(&mut frame, &codec::encode(&piece));
            sink(&frame)
        };
        delta::send_rows(&snapshot, there, &mut send)?;
        for erasure in rows::erasures(&snapshot)? {
            send(Piece::Erasure(erasure), 1)?;
        }
        let state = Box::new(rows::load_state(&snapshot)?);
        let (position, digest) = (state.position, state.whole_digest().to_le_bytes());
        let end = codec::encode(&Piece::End { pieces, state });
        frame.clear();
        codec::frame(&mut frame, &end);
        sink(&frame)?;
        Ok((position, digest))
    }

    /// Replaces the whole state by an exported one. On an error nothing has changed, but for one of the disk's at the very end: then the
    /// records are the new ones, and the segments of vectors follow when the views are next opened.
    pub fn import(
        &self,
        next: &mut dyn FnMut() -> Result<Option<Vec<u8>>, StorageError>,
    ) -> Result<(), StorageError> {
        let _applying = lock(&self.applying);
        let _sealing = self.no_seal();
        let mut writer = self.records.writer();
        let transaction = writer.transaction()?;
        for month in months::load(&transaction)?.keys() {
            months::remove(&transaction, *month)?;
        }
        transaction.execute_batch(
            "DELETE FROM directory; DELETE FROM owners; DELETE FROM edges; DELETE FROM keys; DELETE FROM dropped;
             DELETE FROM erasures;",
        )?;
        let mut applier = Applier::new(
            &transaction,
            State::default(),
            self.words && !sim::planted!("leave-the-words-out-of-a-snapshot"),
        )?;
        let (mut pieces, mut end) = (0, None);
        while let Some(chunk) = next()? {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let (payload, then) =
                    codec::unframe(rest).map_err(|e| StorageError::Snapshot(e.to_string()))?;
                rest = then;
                if end.is_some() {
                    return Err(StorageError::Snapshot("it goes on behind its end".into()));
                }
                let piece = codec::decode(payload).map_err(|e| StorageError::Snapshot(e.to_string()))?;
                if let Piece::End { pieces, state } = piece {
                    end = Some((pieces, state));
                } else {
                    put(&mut applier, piece)?;
                    pieces += 1;
                }
            }
        }
        let state = match end {
            Some((counted, state)) if counted == pieces && state.same_rows(&applier.state) => state,
            Some((counted, _)) => {
                let reason =
                    format!("{pieces} pieces arrived of {counted}, or not the ones that its digest tells");
                return Err(StorageError::Snapshot(reason));
            }
            None => return Err(StorageError::Snapshot("it was cut short".into())),
        };
        applier.state = *state;
        let (state, _) = applier.finish()?;
        let tree = self.tree_from(&transaction, state.position)?;
        let old = {
            let mut current = self.tree_mut();
            *lock(&self.committing) = state.position;
            transaction.commit()?;
            self.cache.clear();
            self.touched.forget(state.position.index);
            *lock(&self.published) = Arc::new(state);
            std::mem::replace(&mut *current, tree)
        };
        drop(writer);
        self.records.checkpoint()?;
        self.forget_tree(&old)
    }
}

/// Stores a piece and counts it.
fn put(applier: &mut Applier<'_>, piece: Piece) -> Result<(), StorageError> {
    match piece {
        Piece::Memory(row) => applier.restore(&row, None)?,
        Piece::History { version, row } => applier.restore(&row, Some(version))?,
        Piece::Key(row) => applier.restore_key(&row)?,
        Piece::Edge(row) => applier.restore_edge(&row)?,
        Piece::Deleted { tenant, id, slot, place } => rows::put_place(applier.db, &tenant, &id, slot, place)?,
        Piece::Erasure(erasure) => applier.list_erasure(&erasure)?,
        Piece::Kept(kept) => {
            return Err(StorageError::Snapshot(format!("it was not completed: {kept:?} is missing")));
        }
        Piece::End { .. } => {}
    }
    Ok(())
}
