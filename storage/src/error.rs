//! What can go wrong between the store and its disk.

use crate::codec::CodecError;
use rusqlite::{ErrorCode, ffi};
use sim::disk::checked;
use std::io;

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("disk: {0}; check its space and health, then restart this node")]
    Io(#[from] io::Error),
    #[error("database: {0}; check the disk's space and health, then restart this node")]
    Sqlite(rusqlite::Error),
    #[error("the disk is full ({0}); nothing was changed, make room and restart this node")]
    Full(rusqlite::Error),
    /// The disk gave back other bytes than it was given, or none.
    #[error("{what} is damaged ({problem})")]
    Damaged { what: String, problem: String },
    /// Bytes that are sound say what cannot be.
    #[error("{what} contradicts itself ({problem})")]
    Corrupt { what: String, problem: String },
    #[error("{0}")]
    Version(String),
    #[error("{0} is open in another process too; end that one, then restart this node")]
    InUse(String),
    #[error("snapshot refused: {0}; nothing was changed, send it again")]
    Snapshot(String),
    /// A question about a move of slots that this shard has no answer to now.
    #[error("{0}; ask the control group how far the move is")]
    Move(String),
}

impl StorageError {
    /// Whether all that is wrong is that the disk is full.
    pub fn is_full(&self) -> bool {
        match self {
            StorageError::Io(error) => error.kind() == io::ErrorKind::StorageFull,
            StorageError::Full(_) => true,
            _ => false,
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> impl FnOnce(CodecError) -> StorageError {
        let what = what.into();
        move |e| StorageError::Corrupt { what, problem: e.to_string() }
    }
}

impl From<rusqlite::Error> for StorageError {
    fn from(error: rusqlite::Error) -> StorageError {
        let extended = error.sqlite_error().map(|e| e.extended_code);
        match (error.sqlite_error_code(), extended) {
            (Some(ErrorCode::DiskFull), _) => StorageError::Full(error),
            (_, Some(ffi::SQLITE_IOERR_DATA)) => {
                let (what, offset) = checked::damage().unwrap_or(("the records' database".into(), 0));
                StorageError::Damaged {
                    what,
                    problem: format!("the page at byte {offset} fails its checksum"),
                }
            }
            (_, Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC)) => {
                let problem = format!("a sync failed ({error}), so what the disk holds is unknown");
                StorageError::Damaged { what: "the records' database".into(), problem }
            }
            (Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase), _)
            | (_, Some(ffi::SQLITE_IOERR_READ | ffi::SQLITE_IOERR_SHORT_READ)) => {
                StorageError::Damaged { what: "the records' database".into(), problem: error.to_string() }
            }
            _ => StorageError::Sqlite(error),
        }
    }
}
