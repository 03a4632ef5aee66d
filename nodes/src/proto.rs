//! Generated from `proto/`: the public protocol `loci.v1` and the one between nodes.

/// The public protocol.
#[allow(clippy::all, missing_docs)]
pub mod v1 {
    tonic::include_proto!("loci.v1");
}

/// Between the nodes of a cluster.
#[allow(clippy::all, missing_docs)]
pub mod internal {
    tonic::include_proto!("loci.internal.v1");
}

/// The descriptors of both, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/loci.binpb"));
