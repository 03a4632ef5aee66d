//! openraft's types for one shard's ledger.

use openraft::BasicNode;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::sync::Arc;
use storage::model::Outcome;

openraft::declare_raft_types!(
    /// One shard's ledger: entries are encoded [`storage::model::Batch`]es, replies what came of their commands.
    pub Types:
        D = Data,
        R = Reply,
        NodeId = u64,
        Node = BasicNode,
        AsyncRuntime = sim::raft::Runtime,
);

pub type Entry = openraft::alias::EntryOf<Types>;
pub type LogId = openraft::alias::LogIdOf<Types>;
pub type Vote = openraft::alias::VoteOf<Types>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<Types>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<Types>;
pub type Raft = openraft::Raft<Types, super::state_machine::StateMachine>;

/// An encoded batch of commands: encoded once by the leader, then carried, stored and copied as bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Data(pub Arc<[u8]>);

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Data, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Data;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Data, E> {
                Ok(Data(bytes.into()))
            }
            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Data, E> {
                Ok(Data(bytes.into()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

/// What came of an entry's commands, in order; empty for entries that held none.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply(pub Vec<Outcome>);

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outcomes", self.0.len())
    }
}

impl Serialize for Reply {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&storage::codec::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Reply {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Reply, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        storage::codec::decode(&bytes).map(Reply).map_err(serde::de::Error::custom)
    }
}
