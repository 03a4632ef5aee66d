//! A shard's views as a stream of checksummed frames: what a replica that lags behind the log is given.
//!
//! Each frame holds an encoded [`Piece`]; a chunk holds whole frames. The last piece counts the others and carries the state, so
//! a stream that was cut short or mixed up is refused, and then nothing has changed: an import is one transaction.

use crate::codec;
use crate::error::StorageError;
use crate::records::rows::{self, KeyRow, MemoryRow, State, Stored};
use crate::shard::{Shard, each, lock};
use bincode::{Decode, Encode};
use rusqlite::Connection;
use std::sync::Arc;

#[derive(Encode, Decode)]
enum Piece {
    Memory(MemoryRow),
    History { version: u64, row: MemoryRow },
    Key(KeyRow),
    End { pieces: u64, state: State },
}

impl Shard {
    /// Gives the whole logical state at one position to `sink`, a frame at a time. Applying goes on meanwhile.
    pub fn export(
        &self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let mut reader = self.records.reader();
        let snapshot = reader.transaction()?;
        let mut pieces = 0;
        let mut frame = vec![];
        let mut send = |piece: &Piece| {
            frame.clear();
            codec::frame(&mut frame, &codec::encode(piece));
            pieces += 1;
            sink(&frame)
        };
        each(&snapshot, "SELECT position, kind, body, vector FROM memories", |row| {
            let row = rows::stored(row)?;
            let memory = rows::decode_body(&row.body)?;
            let vector = rows::vector_from(&row.vector);
            send(&Piece::Memory(MemoryRow { position: row.position, kind: row.kind, memory, vector }))
        })?;
        each(&snapshot, "SELECT position, kind, body, version FROM history", |row| {
            let (position, kind, body): (i64, u8, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let memory = rows::decode_body(&body)?;
            let version = row.get::<_, i64>(3)? as u64;
            send(&Piece::History { version, row: MemoryRow { position, kind, memory, vector: vec![] } })
        })?;
        each(&snapshot, "SELECT tenant, key, time, hash, outcome FROM keys", |row| {
            send(&Piece::Key(rows::key_row(row)?))
        })?;
        let state = rows::load_state(&snapshot)?;
        let end = codec::encode(&Piece::End { pieces, state });
        let mut frame = vec![];
        codec::frame(&mut frame, &end);
        sink(&frame)
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
                    put(&transaction, piece)?;
                    pieces += 1;
                }
            }
        }
        let state = match end {
            Some((counted, state)) if counted == pieces => state,
            Some((counted, _)) => {
                return Err(StorageError::Snapshot(format!("{pieces} pieces arrived of {counted}")));
            }
            None => return Err(StorageError::Snapshot("it was cut short".into())),
        };
        rows::save_state(&transaction, &state)?;
        transaction.commit()?;
        drop(writer);
        self.load_vectors()?;
        *lock(&self.published) = Arc::new(state);
        Ok(())
    }
}

fn put(db: &Connection, piece: Piece) -> Result<(), StorageError> {
    match piece {
        Piece::Memory(mut row) => {
            let body = rows::encode_body(&mut row.memory);
            let vector = rows::vector_bytes(&row.vector);
            let stored = Stored { position: row.position, kind: row.kind, body, vector };
            rows::put_memory(db, &stored, &row.memory.tenant, &row.memory.id, row.memory.version)
        }
        Piece::History { version, mut row } => {
            let body = rows::encode_body(&mut row.memory);
            rows::put_history(
                db,
                (row.position, row.kind, &body),
                &row.memory.tenant,
                &row.memory.id,
                version,
            )
        }
        Piece::Key(row) => rows::put_key(db, &row),
        Piece::End { .. } => Ok(()),
    }
}
