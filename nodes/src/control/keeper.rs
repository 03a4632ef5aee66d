//! The keeper: opens the replicas that the map gives to this node, and closes those that it takes away.
//!
//! A replica that is closed is gone with its data: the map takes a shard from a node only when the shard's ledger no longer counts on it
//! ([`super::driver`]). A node that comes back with an empty disk knows from the map that its shards are not new, so it does not vote before it
//! has what it may have acknowledged ([`crate::ledger::recovery`]); what is younger than its disk it cannot have lost ([`super::since`]).
//!
//! Where another region goes on, the map names a newer epoch than the replica's: it is closed, and opened again in that one
//! ([`crate::ledger::epochs`]). Before that the control group asks for what it has ([`Keeper::halt`]).

use super::Control;
use super::map::{ClusterMap, Learner, NodeEntry, ShardEntry, ShardId};
use super::regions::End;
use super::since::Since;
use crate::error::Error;
use crate::groups::{CONTROL, GroupId, Groups, Replica, Settings, Start, name_of};
use crate::ledger::epochs::{Plan, Report, Way};
use sim::disk::Disk;
use sim::sync::Semaphore;
use sim::time::{self, Duration, Instant};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// How long telling the control group of something may take.
const TELL: Duration = Duration::from_secs(5);
/// How long those who read a closed replica may take to let go of it.
const LET_GO: Duration = Duration::from_secs(20);

#[derive(Clone)]
pub struct Keeper {
    settings: Settings,
    groups: Groups,
    control: Control,
    since: Since,
    /// Held by whoever opens and closes.
    changing: Arc<Semaphore>,
}

fn start(map: &ClusterMap, shard: ShardId, (node, since): (u64, &Since)) -> Option<Start> {
    let entry = map.shards.get(&shard)?;
    let older = since.is_older_than(entry, map);
    Some(match entry.members.contains(&node) {
        true if entry.founded => Start::Rejoin { voters: entry.members.len(), older },
        true => Start::Found { voters: addrs(map, entry), older },
        false if entry.learners.get(&node).is_some_and(|learner| *learner != Learner::Joining) => {
            Start::Learner
        }
        false => Start::Wait,
    })
}

fn addrs(map: &ClusterMap, entry: &ShardEntry) -> BTreeMap<u64, String> {
    let addr = |id: &u64| Some((*id, map.nodes.get(id)?.addr.clone()));
    entry.members.iter().filter_map(addr).collect()
}

impl Keeper {
    pub fn new(settings: Settings, groups: Groups, control: Control, since: Since) -> Keeper {
        Keeper { settings, groups, control, since, changing: Arc::new(Semaphore::new(1)) }
    }

    /// How a replica is to be opened, by the map.
    fn plan(&self, map: &ClusterMap, entry: &ShardEntry) -> Plan {
        let way = match entry.chosen == Some(self.settings.id) {
            true => Way::Begin(addrs(map, entry)),
            false => Way::Return,
        };
        let (epoch, first) = (entry.epoch, entry.first_epoch);
        Plan { epoch, first, ends: entry.ends.clone(), known: epoch, way }
    }

    /// Opens what the map, as this node knows it, gives to it.
    pub async fn open_all(&self, map: &ClusterMap) -> Result<(), Error> {
        let Ok(_changing) = self.changing.acquire().await else { return Ok(()) };
        self.settings.rights.follow_map(map, self.settings.id);
        for shard in map.kept_by(self.settings.id) {
            let Some(entry) = map.shards.get(&shard) else { continue };
            let plan = self.plan(map, entry);
            if let Some(replica) = self.groups.get(shard) {
                // It may have halted for an epoch that the map does not show yet.
                if replica.ledger.epoch() > plan.epoch || replica.ledger.held.of >= plan.epoch {
                    continue;
                }
                self.close(replica).await?;
            }
            let Some(start) = start(map, shard, (self.settings.id, &self.since)) else { continue };
            if matches!(plan.way, Way::Begin(_)) {
                sim::rand::buggify_wait("before a chosen replica begins", 0.3, Duration::from_secs(3)).await;
            }
            self.open(shard, start, plan).await?;
        }
        Ok(())
    }

    async fn open(&self, shard: GroupId, start: Start, plan: Plan) -> Result<(), Error> {
        let begins = matches!(plan.way, Way::Begin(_));
        let replica = Replica::open(&self.settings, shard, start, plan).await?;
        let (index, epoch) = (replica.ledger.shard.applied_index(), replica.ledger.epoch());
        sim::info!("{} opened at {index} in epoch {epoch}", name_of(shard));
        // One that has forgotten something must not lead.
        if begins && !replica.ledger.is_repairing() {
            // Nobody else can lead it yet.
            let _ = replica.ledger.raft.trigger().elect(true).await;
        }
        self.groups.insert(shard, replica);
        Ok(())
    }

    /// Closes a replica and keeps its data.
    async fn close(&self, replica: Replica) -> Result<(), Error> {
        let group = replica.ledger.group;
        self.groups.remove(group);
        replica.ledger.stop().await;
        let shard = Arc::downgrade(&replica.ledger.shard);
        drop(replica);
        let until = Instant::now() + LET_GO;
        while shard.strong_count() > 0 {
            if Instant::now() >= until {
                return Err(Error::Internal(format!(
                    "{} is still read {LET_GO:?} after its end",
                    name_of(group)
                )));
            }
            time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Ends this replica's part in all epochs before `epoch`: it takes no message of them any more. What it has; `None`: it has
    /// forgotten what others may count on. How the epochs ended that are over, and the last known one: this node's map may not say so yet.
    pub async fn halt(
        &self,
        shard: GroupId,
        epoch: u64,
        (ends, known): (BTreeMap<u64, End>, u64),
    ) -> Result<Option<Report>, Error> {
        let Ok(_changing) = self.changing.acquire().await else { return Ok(None) };
        let missing = || Error::NotHere(format!("this node has no replica of {}", name_of(shard)));
        let replica = self.groups.get(shard).ok_or_else(missing)?;
        if replica.ledger.epoch() < epoch {
            let plan = Plan { epoch, first: replica.ledger.held.first, ends, known, way: Way::Halt };
            sim::info!("{} halts for epoch {epoch}", name_of(shard));
            self.close(replica).await?;
            if let Err(error) = self.open(shard, Start::Learner, plan).await {
                end(error).await;
            }
        }
        let replica = self.groups.get(shard).ok_or_else(missing)?;
        match replica.ledger.epoch() == epoch {
            true => Ok(replica.ledger.held.report.clone()),
            false => Err(Error::Unavailable(format!("{} is in a later epoch", name_of(shard)))),
        }
    }

    /// Opens this node's replica of the control group anew, in another incarnation. What cannot be opened ends the process.
    pub async fn turn_control(&self, plan: Plan) -> Result<(), Error> {
        let Ok(_changing) = self.changing.acquire().await else { return Ok(()) };
        if let Some(replica) = self.groups.get(CONTROL) {
            if replica.ledger.epoch() > plan.epoch || replica.ledger.held.of >= plan.epoch {
                return Ok(());
            }
            self.close(replica).await?;
        }
        match self.open(CONTROL, Start::Learner, plan).await {
            Ok(()) => Ok(()),
            Err(error) => end(error).await,
        }
    }

    /// Follows the map for ever. What cannot be opened ends the process, as it does at the start.
    pub async fn keep(self) {
        let mut maps = self.control.watch();
        loop {
            let map = maps.borrow_and_update().clone();
            if map.version > 0 {
                if let Err(error) = self.open_all(&map).await {
                    end(error).await;
                }
                self.tell(&map).await;
                let kept = map.kept_by(self.settings.id);
                let gone = self.groups.shards().into_iter();
                for replica in
                    gone.filter(|replica| !kept.contains(&replica.ledger.group)).collect::<Vec<_>>()
                {
                    self.remove(replica).await;
                }
            }
            if maps.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tells the control group what only this node knows.
    async fn tell(&self, map: &ClusterMap) {
        let settings = &self.settings;
        let own = (&settings.here, &settings.roles, &settings.gateway);
        let other = |node: &NodeEntry| (&node.addr, &node.roles, &node.gateway) != own;
        if map.nodes.get(&settings.id).is_some_and(other) {
            // It was given another address or other roles since.
            let told = |map: &ClusterMap| {
                Ok(map.told(settings.id, &settings.here, &settings.roles, &settings.gateway))
            };
            if let Err(error) = self.control.update(told, Instant::now() + TELL).await {
                sim::warn!("the cluster map has an old address or old roles of this node: {error}");
            }
        }
        for replica in self.groups.shards() {
            let shard = replica.ledger.group;
            for (epoch, found) in replica.ledger.held.old_disks() {
                if map.old_disk(shard, epoch, settings.id, found) == *map {
                    continue;
                }
                let told = |map: &ClusterMap| Ok(map.old_disk(shard, epoch, settings.id, found));
                if let Err(error) = self.control.update(told, Instant::now() + TELL).await {
                    sim::warn!(
                        "what {} lost with epoch {epoch} is not reported yet: {error}",
                        name_of(shard)
                    );
                }
            }
        }
    }

    async fn remove(&self, replica: Replica) {
        let Ok(_changing) = self.changing.acquire().await else { return };
        let group = replica.ledger.group;
        self.groups.remove(group);
        replica.ledger.stop().await;
        let disk = replica.disk.clone();
        drop(replica);
        match sim::task::blocking(move || remove_all(&*disk, "", 0)).await {
            Ok(()) => sim::info!("{} is no longer here; its files are removed", name_of(group)),
            Err(error) => sim::warn!("{} is no longer here, but its files stay: {error}", name_of(group)),
        }
    }
}

/// What cannot be opened ends the process.
async fn end(error: Error) -> ! {
    sim::task::abort(&format!("{error}; this process ends, and its next start tries again")).await
}

fn remove_all(disk: &dyn Disk, dir: &str, depth: usize) -> io::Result<()> {
    for name in disk.list(dir)? {
        let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
        let is_file = disk.open(&path).and_then(|file| file.len()).is_ok();
        match is_file {
            true => disk.remove(&path)?,
            false if depth < 4 => remove_all(disk, &path, depth + 1)?,
            false => {}
        }
    }
    disk.sync_dir(dir)
}
