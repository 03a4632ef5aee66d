//! What can go wrong between the store and its disk.

use crate::codec::CodecError;
use rusqlite::ErrorCode;
use std::io;

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("disk: {0}; check its space and health, then restart this node")]
    Io(#[from] io::Error),
    #[error("database: {0}; check the disk's space and health, then restart this node")]
    Sqlite(rusqlite::Error),
    #[error("the disk is full ({0}); nothing was changed, make room and restart this node")]
    Full(rusqlite::Error),
    #[error(
        "{what} is damaged ({problem}); remove this replica's views and let it restore them from its peers"
    )]
    Corrupt { what: String, problem: String },
    #[error("{0} is open in another process too; end that one, then restart this node")]
    InUse(String),
    #[error("snapshot refused: {0}; nothing was changed, send it again")]
    Snapshot(String),
}

impl StorageError {
    pub(crate) fn corrupt(what: impl Into<String>) -> impl FnOnce(CodecError) -> StorageError {
        let what = what.into();
        move |e| StorageError::Corrupt { what, problem: e.to_string() }
    }
}

impl From<rusqlite::Error> for StorageError {
    fn from(error: rusqlite::Error) -> StorageError {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => StorageError::Full(error),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                StorageError::Corrupt { what: "the records' database".into(), problem: error.to_string() }
            }
            _ => StorageError::Sqlite(error),
        }
    }
}
