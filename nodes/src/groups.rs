//! The groups that this node has a replica of: shards, and on some nodes the control group. Each is an openraft group with its own log, views and
//! directory, and all of them speak through one service ([`crate::ledger::service`]).

use crate::control::map::Gateway;
use crate::control::rights::Rights;
use crate::error::Error;
use crate::ledger::epochs::Plan;
use crate::ledger::{Ledger, LedgerOptions, Unsure, recovery};
use crate::peers::Peers;
use crate::roles::{Role, Roles};
use crate::views::LocalViews;
use sim::disk::Disk;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use storage::ShardOptions;

/// A shard's number, or [`CONTROL`].
pub type GroupId = u32;

/// The group whose one record is the cluster map.
pub const CONTROL: GroupId = u32::MAX;

/// A group's name in logs, and of its directory.
pub fn name_of(group: GroupId) -> String {
    if group == CONTROL { "control".into() } else { format!("shard-{group}") }
}

/// One group's replica here.
#[derive(Clone)]
pub struct Replica {
    pub ledger: Ledger,
    pub views: Arc<LocalViews>,
    /// The group's own directory.
    pub disk: Arc<dyn Disk>,
    /// Snapshots received, for their files' names.
    pub received: Arc<AtomicU64>,
}

/// How a replica begins.
pub enum Start {
    /// The group is new as far as this node knows: these are its voters. This node's disk is `older`, or may be a new one.
    Found { voters: BTreeMap<u64, String>, older: bool },
    /// The group has been there before; it has `voters` voters. A disk that holds nothing has forgotten what it may have acknowledged, unless it is
    /// `older` than the group: then it was never opened.
    Rejoin { voters: usize, older: bool },
    /// The group will take this replica in.
    Wait,
    /// The group has taken this replica in, without a vote.
    Learner,
}

/// What every replica of this node has in common.
#[derive(Clone)]
pub struct Settings {
    pub node: String,
    pub id: u64,
    /// The address by which the others know it.
    pub here: String,
    /// What it keeps and answers of each shard.
    pub roles: Roles,
    /// Where callers reach its gateway.
    pub gateway: Gateway,
    pub disk: Arc<dyn Disk>,
    pub peers: Peers,
    pub ledger: LedgerOptions,
    pub shard: ShardOptions,
    pub product_after_days: Option<i64>,
    /// What the region may write.
    pub rights: Rights,
}

impl Replica {
    /// Opens a group's replica in its directory, and recovers.
    pub async fn open(
        settings: &Settings,
        group: GroupId,
        start: Start,
        plan: Plan,
    ) -> Result<Replica, Error> {
        let internal = |e: std::io::Error| Error::Internal(format!("{}: {e}", name_of(group)));
        let disk = sim::disk::within(settings.disk.clone(), &name_of(group)).map_err(internal)?;
        let mut options = settings.ledger.clone();
        if group == CONTROL {
            options = options.patient();
        }
        // The cluster map's group is whole wherever it is.
        let roles = if group == CONTROL { crate::roles::all() } else { settings.roles.clone() };
        // The trace's lines are of the first shard.
        let mut shard = ShardOptions { gauge: (group == 0).then_some("applied"), ..settings.shard.clone() };
        (shard.words, shard.vectors.kept) = (roles.contains(&Role::Records), roles.contains(&Role::Vector));
        let (log, views_disk) = (options.log.clone(), disk.clone());
        let (alone, forgotten, members, unsure) = match start {
            Start::Found { voters, older: true } => (voters.len() == 1, false, Some(voters), Unsure::Nothing),
            Start::Found { voters, older: false } => {
                (voters.len() == 1, false, Some(voters), Unsure::WhetherNew)
            }
            Start::Rejoin { voters, older } => (voters == 1, voters > 1 && !older, None, Unsure::Nothing),
            Start::Wait => (false, false, None, Unsure::WhetherFilled),
            Start::Learner => (false, true, None, Unsure::Nothing),
        };
        let (id, planned) = (settings.id, plan.clone());
        let opened = sim::task::blocking(move || {
            recovery::open(&views_disk, log, shard, (alone, forgotten), (id, &planned))
        });
        let opened = opened.await?;
        crate::upkeep::start(&opened.shard, settings.product_after_days);
        let peers = settings.peers.clone();
        let rights = if group == CONTROL { Rights::free() } else { settings.rights.clone() };
        let right = (rights, plan.ends);
        let (forms, here) = ((members, unsure), settings.here.clone());
        let ledger =
            Ledger::open((group, id, here), forms, disk.clone(), opened, peers, options, right).await?;
        let views = Arc::new(LocalViews::new(ledger.clone(), settings.node.clone(), roles));
        Ok(Replica { ledger, views, disk, received: Arc::default() })
    }
}

#[derive(Clone, Default)]
pub struct Groups(Arc<Mutex<BTreeMap<GroupId, Replica>>>);

impl Groups {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<GroupId, Replica>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn get(&self, group: GroupId) -> Option<Replica> {
        self.lock().get(&group).cloned()
    }

    pub fn insert(&self, group: GroupId, replica: Replica) {
        self.lock().insert(group, replica);
    }

    pub fn remove(&self, group: GroupId) -> Option<Replica> {
        self.lock().remove(&group)
    }

    /// The shards' replicas, without the control group's.
    pub fn shards(&self) -> Vec<Replica> {
        self.lock()
            .iter()
            .filter(|(group, _)| **group != CONTROL)
            .map(|(_, replica)| replica.clone())
            .collect()
    }

    pub fn all(&self) -> Vec<Replica> {
        self.lock().values().cloned().collect()
    }
}
