//! A shard's views as a stream of checksummed frames: what a replica that lags behind the log is given.
//!
//! Each frame holds an encoded [`Piece`]; a chunk holds whole frames. The last piece counts the others and carries the state, so
//! a stream that was cut short or mixed up is refused, and then nothing has changed: an import is one transaction.

use crate::codec;
use crate::error::StorageError;
use crate::model::Position;
use crate::records::rows::{self, HISTORY, KeyRow, MEMORY, State, Stored};
use crate::shard::{Shard, each, load_vectors, lock};
use bincode::{Decode, Encode};
use rusqlite::Connection;
use std::cell::Cell;
use std::sync::Arc;

#[derive(Encode, Decode)]
enum Piece {
    Memory(Stored),
    History { version: u64, row: Stored },
    Key(KeyRow),
    End { pieces: u64, state: State },
}

impl Shard {
    /// Gives the whole logical state at one position to `sink`, a frame at a time, and returns that position.
    /// Applying goes on meanwhile.
    pub fn export(
        &self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), StorageError>,
    ) -> Result<Position, StorageError> {
        let mut reader = self.records.reader();
        let snapshot = reader.transaction()?;
        let pieces = Cell::new(0);
        let mut frame = vec![];
        let mut send = |piece: &Piece| {
            frame.clear();
            codec::frame(&mut frame, &codec::encode(piece));
            pieces.set(pieces.get() + 1);
            sink(&frame)
        };
        each(&snapshot, &format!("SELECT {MEMORY} FROM memories"), |row| {
            send(&Piece::Memory(rows::stored(row)?))
        })?;
        each(&snapshot, &format!("SELECT {HISTORY}, version FROM history"), |row| {
            send(&Piece::History { version: row.get::<_, i64>(5)? as u64, row: rows::stored(row)? })
        })?;
        each(&snapshot, "SELECT tenant, key, time, hash, outcome FROM keys", |row| {
            send(&Piece::Key(rows::key_row(row)?))
        })?;
        let state = rows::load_state(&snapshot)?;
        let position = state.position;
        send(&Piece::End { pieces: pieces.get(), state })?;
        Ok(position)
    }

    /// Replaces the whole state by an exported one. On any error nothing has changed.
    pub fn import(
        &self,
        next: &mut dyn FnMut() -> Result<Option<Vec<u8>>, StorageError>,
    ) -> Result<(), StorageError> {
        let _applying = lock(&self.applying);
        let mut writer = self.records.writer();
        let transaction = writer.transaction()?;
        transaction.execute_batch("DELETE FROM memories; DELETE FROM history; DELETE FROM keys;")?;
        let (mut pieces, mut digest, mut end) = (0, 0u128, None);
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
                    digest = digest.wrapping_add(put(&transaction, piece)?);
                    pieces += 1;
                }
            }
        }
        let state = match end {
            Some((counted, state)) if counted == pieces && state.digest == digest => state,
            Some((counted, _)) => {
                let reason =
                    format!("{pieces} pieces arrived of {counted}, or not the ones that its digest tells");
                return Err(StorageError::Snapshot(reason));
            }
            None => return Err(StorageError::Snapshot("it was cut short".into())),
        };
        rows::save_state(&transaction, &state)?;
        let loaded = load_vectors(&transaction)?;
        let mut vectors = self.vectors_mut();
        transaction.commit()?;
        *vectors = loaded;
        self.cache.clear();
        *lock(&self.published) = Arc::new(state);
        Ok(())
    }
}

/// Stores a piece; its part of the digest.
fn put(db: &Connection, piece: Piece) -> Result<u128, StorageError> {
    match piece {
        Piece::Memory(row) => {
            rows::put_memory(db, &row, &rows::decode_body(&row.body)?)?;
            Ok(rows::memory_hash("memories", &row))
        }
        Piece::History { version, row } => {
            rows::put_history(db, &row, &rows::decode_body(&row.body)?, version)?;
            Ok(rows::memory_hash("history", &row))
        }
        Piece::Key(row) => {
            rows::put_key(db, &row)?;
            Ok(rows::key_hash(&row))
        }
        Piece::End { .. } => Ok(0),
    }
}
