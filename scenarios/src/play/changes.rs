//! What an operator does while a run goes on: shards and nodes that come and go, by the commands that `loci cluster` gives.

use super::cluster::Cluster;
use crate::spec::{Change, Topology};
use nodes::proto::v1::{self, change_cluster_request::Change as Wish};
use sim::time::{self, Duration};
use sim::trace::Level;
use std::sync::Arc;

const LOOK: Duration = Duration::from_millis(250);

/// Makes the changes one after the other, each as often as it takes; how many were done in the end.
pub async fn play(cluster: Arc<Cluster>, topology: Topology, changes: Vec<Change>) -> usize {
    let machines = &cluster.machines;
    let mut done = 0;
    for change in changes {
        time::sleep(Duration::from_secs(change.at_s).saturating_sub(machines.now())).await;
        machines.note(0, Level::Info, &format!("operator: {}", describe(&change)));
        while !make(&cluster, &topology, &change).await {
            time::sleep(LOOK).await;
        }
        machines.note(0, Level::Info, &format!("operator: done: {}", describe(&change)));
        done += 1;
    }
    done
}

fn describe(change: &Change) -> String {
    match (change.shards, change.join, change.drain) {
        (Some(shards), ..) => format!("change to {shards} shards"),
        (_, Some(node), _) => format!("join node {node}"),
        (.., Some(node)) => format!("drain node {node}"),
        _ => "nothing".into(),
    }
}

/// Asks for a change, which is harmless when it is under way or done; whether it is done.
async fn make(cluster: &Cluster, topology: &Topology, change: &Change) -> bool {
    let wish = match (change.shards, change.join, change.drain) {
        (Some(shards), ..) => Wish::Shards(shards),
        (_, Some(id), _) => {
            let mut numbered = cluster.replicas.iter().chain(&cluster.caches);
            let Some(address) = numbered.nth(id as usize - 1).map(|node| cluster.addr(*node)) else {
                return true;
            };
            let roles = nodes::roles::names(&topology.roles_of(id));
            Wish::Join(v1::ClusterNode { id, address, roles, ..Default::default() })
        }
        (.., Some(id)) => Wish::Drain(id),
        _ => return true,
    };
    if !cluster.change(wish).await {
        return false;
    }
    let Some(map) = cluster.map().await else { return false };
    let drained =
        |id: u64| map.nodes.iter().find(|node| node.id == id).is_some_and(|node| node.shards.is_empty());
    match (change.shards, change.drain) {
        (Some(shards), _) => map.resize.is_none() && map.shards.len() == shards as usize,
        (_, Some(id)) => drained(id),
        _ => true,
    }
}
