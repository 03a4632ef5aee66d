//! What a node does in its cluster, and how many replicas each view has.
//!
//! Every replica of a shard follows its ledger by the same loop ([`crate::ledger::state_machine`]): it loads a snapshot or what is on its disk,
//! applies from there, makes checkpoints, and publishes the position up to which it answers. Those whose node has the role *ledger* may
//! vote; the others are learners, whose death or lag no writer notices. What differs is what a replica keeps and which questions it answers:
//!
//! | role | keeps, beside the rows that decide outcomes | answers |
//! |---|---|---|
//! | ledger | nothing | writes, and reads' positions |
//! | records | the index of words | gets, listings, histories, changes, searches by words |
//! | graph | nothing: edges are rows | walks |
//! | vector | segments and graphs of vectors | searches by vectors |
//! | cache | no replica: memories that were got lately, in memory ([`crate::cache`]) | gets that need not be strong |
//!
//! A node may have several roles, and has all that come with replicas unless it is told otherwise. Which nodes have which replica stands in the cluster map
//! ([`crate::control::map`]); a node that finds itself there with other roles than it has tells so.

use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Ledger,
    Records,
    Graph,
    Vector,
    Cache,
}

pub type Roles = BTreeSet<Role>;

impl Role {
    pub const ALL: [Role; 5] = [Role::Ledger, Role::Records, Role::Graph, Role::Vector, Role::Cache];

    pub fn name(self) -> &'static str {
        match self {
            Role::Ledger => "ledger",
            Role::Records => "records",
            Role::Graph => "graph",
            Role::Vector => "vector",
            Role::Cache => "cache",
        }
    }

    pub fn parse(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }

    /// Whether it is a view that has replicas.
    pub fn is_view(self) -> bool {
        !matches!(self, Role::Ledger | Role::Cache)
    }

    /// The requirements' row of it.
    pub fn policy(self) -> Policy {
        match self {
            Role::Ledger => Policy { replicas: 3, failover_within_s: 30 },
            Role::Records => Policy { replicas: 3, failover_within_s: 30 },
            Role::Graph => Policy { replicas: 3, failover_within_s: 60 },
            Role::Vector => Policy { replicas: 3, failover_within_s: 30 },
            Role::Cache => Policy { replicas: 3, failover_within_s: 10 },
        }
    }
}

/// What a node does that is not told otherwise.
pub fn all() -> Roles {
    Role::ALL.into_iter().filter(|role| *role != Role::Cache).collect()
}

/// What nobody may be: a cache has no replicas.
pub fn check(roles: &Roles) -> Result<(), Error> {
    match roles.contains(&Role::Cache) && roles.len() > 1 {
        true => {
            Err(Error::invalid("roles", "cache is for nodes that have no replicas: give it alone, or not"))
        }
        false => Ok(()),
    }
}

pub fn names<'a>(roles: impl IntoIterator<Item = &'a Role>) -> Vec<String> {
    roles.into_iter().map(|role| role.name().to_string()).collect()
}

/// How a component is replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Replicas of each shard, where there are as many nodes.
    pub replicas: usize,
    /// The requirements' ceiling for the time until others answer in a dead replica's place, in seconds.
    pub failover_within_s: u64,
}
