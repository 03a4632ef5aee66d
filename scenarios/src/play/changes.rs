//! What an operator does while a run goes on: shards and nodes that come and go, by the commands that `loci cluster` gives.

use super::cluster::{Cluster, tenant};
use crate::history::Id;
use crate::spec::{Change, Topology};
use nodes::proto::v1::{self, change_cluster_request::Change as Wish};
use sim::time::{self, Duration};
use sim::trace::Level;
use std::collections::BTreeMap;
use std::sync::Arc;

const LOOK: Duration = Duration::from_millis(250);

#[derive(Default)]
pub struct Played {
    /// How many were done in the end.
    pub done: usize,
    /// Of lost writes that were written again: by memory, whether all of it was.
    pub resubmitted: Option<BTreeMap<(usize, Id), bool>>,
}

/// Makes the changes one after the other, each as often as it takes.
pub async fn play(cluster: Arc<Cluster>, topology: Topology, changes: Vec<Change>) -> Played {
    let machines = &cluster.machines;
    let mut played = Played::default();
    for change in changes {
        time::sleep(Duration::from_secs(change.at_s).saturating_sub(machines.now())).await;
        machines.note(0, Level::Info, &format!("operator: {}", describe(&change)));
        if let Some(to) = &change.recover {
            while !cluster.recover(to).await {
                time::sleep(LOOK).await;
            }
        }
        while !make(&cluster, &topology, &change).await {
            time::sleep(LOOK).await;
        }
        while change.resubmit && played.resubmitted.is_none() {
            played.resubmitted = resubmit(&cluster).await;
            time::sleep(LOOK).await;
        }
        machines.note(0, Level::Info, &format!("operator: done: {}", describe(&change)));
        played.done += 1;
    }
    played
}

/// Has everything written again that was lost with a region, once the old disks are there.
async fn resubmit(cluster: &Cluster) -> Option<BTreeMap<(usize, Id), bool>> {
    let map = cluster.map().await?;
    if !map.shards.iter().all(|shard| shard.ends.iter().all(|end| end.resolved)) {
        return None;
    }
    let mut memories = BTreeMap::new();
    for told in cluster.resubmit().await? {
        let tenant = told.tenant.strip_prefix("tenant-").and_then(|number| number.parse().ok());
        if let (Some(tenant), false) = (tenant, told.id.is_empty()) {
            let again = told.verdict() == v1::ResubmitVerdict::Again;
            *memories.entry((tenant, told.id)).or_insert(true) &= again;
        }
    }
    Some(memories)
}

fn describe(change: &Change) -> String {
    let Change { shards, join, drain, pin, unpin, lost, .. } = *change;
    let all = [
        change.fail_over.as_ref().map(|to| format!("fail over to {to}")),
        change.fail_back.as_ref().map(|to| format!("fail back to {to}")),
        change.recover.as_ref().map(|to| format!("recover the control group, and go on in {to}")),
        change.resubmit.then(|| "write again what was lost with a region".to_string()),
        lost.then(|| "wait until a node is lost and replaced".to_string()),
        pin.map(|(of, to)| format!("pin {} to shard {to}", tenant(of))),
        unpin.map(|of| format!("unpin {}", tenant(of))),
        shards.map(|shards| format!("change to {shards} shards")),
        join.map(|node| format!("join node {node}")),
        drain.map(|node| format!("drain node {node}")),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Asks for a change, which is harmless when it is under way or done; whether it is done.
async fn make(cluster: &Cluster, topology: &Topology, change: &Change) -> bool {
    let Change { shards, join, drain, pin, unpin, lost, .. } = *change;
    let joined = join.and_then(|id| {
        let mut numbered = cluster.replicas.iter().chain(&cluster.caches);
        let address = numbered.nth(id as usize - 1).map(|node| cluster.addr(*node))?;
        let roles = nodes::roles::names(&topology.roles_of(id));
        Some(Wish::Join(v1::ClusterNode { id, address, roles, ..Default::default() }))
    });
    let pinned = pin.map(|(of, shard)| Wish::Pin(v1::Pin { tenant: tenant(of), shard }));
    let unpinned = unpin.map(|of| Wish::Unpin(tenant(of)));
    let ordered = change.fail_over.as_ref().or(change.fail_back.as_ref());
    let to_region = ordered.or(change.recover.as_ref());
    let region = ordered.map(|to| {
        let (to, planned) = (to.clone(), change.fail_back.is_some());
        Wish::Region(v1::RegionWish { to, planned, accept_data_loss: false })
    });
    let wishes = [pinned, unpinned, shards.map(Wish::Shards), joined, drain.map(Wish::Drain), region];
    for wish in wishes.into_iter().flatten() {
        if !cluster.change(wish).await {
            return false;
        }
    }
    let Some(map) = cluster.map().await else { return false };
    let drained =
        |id: u64| map.nodes.iter().find(|node| node.id == id).is_some_and(|node| node.shards.is_empty());
    let pin_of = |of: usize| map.pins.iter().find(|pin| pin.tenant == tenant(of));
    let is_at = |(of, shard): (usize, u32)| {
        pin_of(of).is_some_and(|pin| pin.shard == Some(shard) && pin.slots_to_move == 0)
    };
    let writes = |to: &String| {
        map.regions.as_ref().is_some_and(|regions| regions.change.is_none() && regions.primary == *to)
    };
    to_region.is_none_or(writes)
        && shards.is_none_or(|shards| map.resize.is_none() && map.shards.len() == shards as usize)
        && drain.is_none_or(drained)
        && pin.is_none_or(is_at)
        && unpin.is_none_or(|of| pin_of(of).is_none())
        && (!lost || map.nodes.iter().any(|node| node.state == "lost" && node.shards.is_empty()))
}
