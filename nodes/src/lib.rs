//! The nodes of Loci: protocol, roles, replication, the public edge.
//!
//! ```text
//!   a call ─► edge (who, how long, how many) ─► gateway ─┬─► writer ─┬─► router ─┬─► ledger of a shard ─► log, quorum ─► views
//!                                                        └─► reader ─┘  (map)   └─► views of shards, one replica of each
//!                                                                         ▲
//!                                          control group: the cluster map ┘
//! ```
//!
//! A process has the edge's roles (gateway, writer, reader), a replica's (ledger, records, graph, vector), or both, or caches ([`config`]); which shards
//! it has replicas of, the cluster map says ([`control`]). Groups in one process are called directly; others over `loci.internal.v1`
//! ([`reach`]). [`node`] puts a process together, the same in simulation and in production.

pub mod access;
pub mod auth;
pub mod cache;
pub mod config;
pub mod control;
pub mod convert;
pub mod edge;
pub mod error;
pub mod gateway;
pub mod groups;
pub mod http;
pub mod ledger;
pub mod limits;
pub mod links;
pub mod node;
pub mod peers;
pub mod proto;
pub mod reach;
pub mod reader;
pub mod remote;
pub mod resubmit;
pub mod roles;
pub mod router;
pub mod standing;
pub mod time;
pub mod upkeep;
pub mod views;
pub mod walk;
pub mod writer;

/// Names the build in status, results and replays.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), "+", env!("LOCI_BUILD"));
