//! The nodes of Loci: protocol, roles, replication, the public edge.
//!
//! ```text
//!   a call ─► edge (who, how long, how many) ─► gateway ─┬─► writer ─► ledger ─► log, quorum ─► views
//!                                                        └─► reader ─► views (records, vector)
//! ```
//!
//! A process has the edge's roles (gateway, writer, reader), a replica's (ledger, records, vector), or both ([`config`]). Roles
//! in one process call each other directly; apart, they speak `loci.internal.v1` ([`peers`]). [`node`] puts a process together,
//! the same in simulation and in production.

pub mod access;
pub mod auth;
pub mod config;
pub mod control;
pub mod convert;
pub mod edge;
pub mod error;
pub mod gateway;
pub mod http;
pub mod ledger;
pub mod limits;
pub mod node;
pub mod peers;
pub mod proto;
pub mod reader;
pub mod remote;
pub mod standing;
pub mod upkeep;
pub mod views;
pub mod writer;

/// Names the build in status, results and replays.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), "+", env!("LOCI_BUILD"));
