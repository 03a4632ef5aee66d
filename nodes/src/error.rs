//! Errors as values with a cause and an action for the caller; at the edge they become `google.rpc.Status` with details.

use crate::auth::hex;
use crate::proto::v1;
use prost::Message;
use sim::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain in every `ErrorInfo`.
pub const DOMAIN: &str = "loci";

/// Why a call failed. `reason` in `ErrorInfo` is stable; the message is for people.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
    #[error("no memory {0} in this tenant")]
    NotFound(String),
    /// What a read found instead of a memory, between which positions.
    #[error("no memory {id} in this tenant")]
    Absent { id: String, seen: v1::Token, complete_to: v1::Token },
    #[error("memory {id} exists already (version {version})")]
    AlreadyExists { id: String, version: u64 },
    #[error("memory {id} is at version {actual}, not at the expected one; read it again and decide anew")]
    VersionMismatch { id: String, actual: u64 },
    #[error(
        "this idempotency key was used within 24 hours for a request with another content; use a new key"
    )]
    KeyReused,
    #[error("{0}")]
    Unauthenticated(String),
    #[error("{0}")]
    Forbidden(String),
    /// Nothing was done; another attempt may succeed.
    #[error("{0}; nothing was changed, try again")]
    Unavailable(String),
    /// The write may or may not have been applied.
    #[error("{0}; the write may have been applied: retry it with the same idempotency key")]
    OutcomeUnknown(String),
    #[error(
        "the deadline passed before this replica saw the requested position; ask again or another replica"
    )]
    NotYetVisible,
    #[error("{0}; ask for less, or more slowly")]
    Overloaded(String),
    #[error(
        "the token names epoch {epoch} index {index}, which this ledger does not hold; what was written there is lost"
    )]
    LostInFailover { epoch: u64, index: u64 },
    /// Between nodes: ask elsewhere. Nothing was done.
    #[error("{0}")]
    NotHere(String),
    #[error("{0} is not there yet in this version")]
    Unimplemented(&'static str),
    #[error("{0}")]
    Internal(String),
}

impl Error {
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The stable word for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            Error::Invalid { .. } => "INVALID_ARGUMENT",
            Error::NotFound(_) | Error::Absent { .. } => "NOT_FOUND",
            Error::AlreadyExists { .. } => "ALREADY_EXISTS",
            Error::VersionMismatch { .. } => "VERSION_MISMATCH",
            Error::KeyReused => "IDEMPOTENCY_KEY_REUSED",
            Error::Unauthenticated(_) => "UNAUTHENTICATED",
            Error::Forbidden(_) => "FORBIDDEN",
            Error::Unavailable(_) => "UNAVAILABLE",
            Error::OutcomeUnknown(_) => "OUTCOME_UNKNOWN",
            Error::NotYetVisible => "NOT_YET_VISIBLE",
            Error::Overloaded(_) => "OVERLOADED",
            Error::LostInFailover { .. } => "LOST_IN_FAILOVER",
            Error::NotHere(_) => "NOT_HERE",
            Error::Unimplemented(_) => "UNIMPLEMENTED",
            Error::Internal(_) => "INTERNAL",
        }
    }

    pub fn code(&self) -> Code {
        match self {
            Error::Invalid { .. } | Error::KeyReused => Code::InvalidArgument,
            Error::NotFound(_) | Error::Absent { .. } => Code::NotFound,
            Error::AlreadyExists { .. } => Code::AlreadyExists,
            Error::VersionMismatch { .. } => Code::FailedPrecondition,
            Error::Unauthenticated(_) => Code::Unauthenticated,
            Error::Forbidden(_) => Code::PermissionDenied,
            Error::Unavailable(_) | Error::OutcomeUnknown(_) | Error::NotYetVisible | Error::NotHere(_) => {
                Code::Unavailable
            }
            Error::Overloaded(_) => Code::ResourceExhausted,
            Error::LostInFailover { .. } => Code::DataLoss,
            Error::Unimplemented(_) => Code::Unimplemented,
            Error::Internal(_) => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let mut details = ErrorDetails::new();
        let metadata = match &error {
            Error::VersionMismatch { actual, .. } => vec![("actual_version".to_string(), actual.to_string())],
            Error::Absent { seen, complete_to, .. } => {
                let text = |token: &v1::Token| hex(&token.encode_to_vec());
                vec![("token".to_string(), text(seen)), ("complete_to".to_string(), text(complete_to))]
            }
            Error::AlreadyExists { id, version } => {
                vec![("id".to_string(), id.clone()), ("version".to_string(), version.to_string())]
            }
            _ => vec![],
        };
        details.set_error_info(
            error.reason(),
            DOMAIN,
            metadata.into_iter().collect::<std::collections::HashMap<_, _>>(),
        );
        match &error {
            Error::Invalid { field, problem } => {
                details.add_bad_request_violation(field, problem);
            }
            Error::Unavailable(_)
            | Error::OutcomeUnknown(_)
            | Error::NotYetVisible
            | Error::Overloaded(_) => {
                details.set_retry_info(Some(Duration::from_millis(100)));
            }
            _ => {}
        }
        Status::with_error_details(error.code(), error.to_string(), details)
    }
}

/// A token of those that a read's absent memory comes with: `token` or `complete_to`, as in [`v1::ReadInfo`].
pub fn token_in(status: &Status, which: &str) -> Option<v1::Token> {
    let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
    let text = info.metadata.get(which)?;
    let byte = |at: usize| text.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(byte).collect();
    v1::Token::decode(&bytes?[..]).ok()
}

/// The stable reason in a status that Loci made, if it has one.
pub fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().filter(|i| i.domain == DOMAIN).map(|i| i.reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert;
    use storage::model::Position;

    #[test]
    fn an_absent_memory_comes_with_what_was_seen() {
        let token = |index| convert::token([(3, Position { epoch: 2, index, item: 0 })], 7);
        let status = Status::from(Error::Absent { id: "m".into(), seen: token(9), complete_to: token(8) });
        assert_eq!((status.code(), reason(&status).as_deref()), (Code::NotFound, Some("NOT_FOUND")));
        assert_eq!(token_in(&status, "token"), Some(token(9)));
        assert_eq!(token_in(&status, "complete_to"), Some(token(8)));
        assert_eq!(token_in(&Status::from(Error::NotFound("node 4".into())), "token"), None);
    }
}
