//! The keeper: opens the replicas that the map gives to this node, and closes those that it takes away.
//!
//! A replica that is closed is gone with its data: the map takes a shard from a node only when the shard's ledger no longer counts on it
//! ([`super::driver`]). A node that comes back with an empty disk knows from the map that its shards are not new, so it does not vote before it
//! has what it may have acknowledged ([`crate::ledger::recovery`]).

use super::Control;
use super::map::{ClusterMap, Learner, NodeEntry, ShardId};
use crate::error::Error;
use crate::groups::{Groups, Replica, Settings, Start, name_of};
use sim::disk::Disk;
use sim::time::{Duration, Instant};
use std::io;

/// How long telling of a new address may take.
const MOVED: Duration = Duration::from_secs(5);

/// Opens what the map, as this node knows it, gives to it.
pub async fn open_all(settings: &Settings, groups: &Groups, map: &ClusterMap) -> Result<(), Error> {
    for shard in map.kept_by(settings.id) {
        if groups.get(shard).is_some() {
            continue;
        }
        let Some(start) = start(map, shard, settings.id) else { continue };
        let replica = Replica::open(settings, shard, start).await?;
        sim::info!("{} opened at {}", name_of(shard), replica.ledger.shard.applied().0.index);
        groups.insert(shard, replica);
    }
    Ok(())
}

fn start(map: &ClusterMap, shard: ShardId, node: u64) -> Option<Start> {
    let entry = map.shards.get(&shard)?;
    let addr = |id: &u64| Some((*id, map.nodes.get(id)?.addr.clone()));
    Some(match entry.members.contains(&node) {
        true if entry.founded => Start::Rejoin { voters: entry.members.len() },
        true => Start::Found(entry.members.iter().filter_map(addr).collect()),
        false if entry.learners.get(&node).is_some_and(|learner| *learner != Learner::Joining) => {
            Start::Learner
        }
        false => Start::Wait,
    })
}

/// Follows the map for ever. What cannot be opened ends the process, as it does at the start.
pub async fn keep(settings: Settings, groups: Groups, control: Control) {
    let mut maps = control.watch();
    loop {
        let map = maps.borrow_and_update().clone();
        if map.version > 0 {
            if let Err(error) = open_all(&settings, &groups, &map).await {
                sim::task::abort(&format!("{error}; this process ends, and its next start tries again"))
                    .await;
            }
            let other = |node: &NodeEntry| (&node.addr, &node.roles) != (&settings.here, &settings.roles);
            if map.nodes.get(&settings.id).is_some_and(other) {
                // It was given another address or other roles since.
                let told = |map: &ClusterMap| Ok(map.told(settings.id, &settings.here, &settings.roles));
                if let Err(error) = control.update(told, Instant::now() + MOVED).await {
                    sim::warn!("the cluster map has an old address or old roles of this node: {error}");
                }
            }
            let kept = map.kept_by(settings.id);
            let gone = groups.shards().into_iter().filter(|replica| !kept.contains(&replica.ledger.group));
            for replica in gone.collect::<Vec<_>>() {
                close(&groups, replica).await;
            }
        }
        if maps.changed().await.is_err() {
            return;
        }
    }
}

async fn close(groups: &Groups, replica: Replica) {
    let group = replica.ledger.group;
    groups.remove(group);
    replica.ledger.stop().await;
    let disk = replica.disk.clone();
    drop(replica);
    match sim::task::blocking(move || remove_all(&*disk, "", 0)).await {
        Ok(()) => sim::info!("{} is no longer here; its files are removed", name_of(group)),
        Err(error) => sim::warn!("{} is no longer here, but its files stay: {error}", name_of(group)),
    }
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
