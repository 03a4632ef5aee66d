//! `loci cluster …`: nodes and shards, and changing them. Every command may be repeated; what takes long goes on in the cluster, also
//! when this program is gone.

use super::client::{Client, To};
use super::{Done, Failure};
use clap::Subcommand;
use nodes::proto::v1::{self, change_cluster_request::Change};
use serde_json::json;
use sim::time::{Duration, sleep};
use storage::slots::SLOTS;

#[derive(Subcommand)]
pub enum Cluster {
    /// Nodes, shards, and what is under way.
    Status,
    /// Takes a node in, so that it may be given shards: its id, and the address at which the others reach it.
    Join {
        id: u64,
        addr: String,
        /// What it may be given: any of ledger, records, graph, vector, or cache alone; else all with replicas.
        #[arg(long, value_delimiter = ',')]
        roles: Vec<String>,
        /// Of a cluster of several regions: which one it is in; else the one that writes.
        #[arg(long, default_value = "")]
        region: String,
    },
    /// Gives a node's shards to others; waits for the end.
    Drain { id: u64 },
    /// Forgets a node that has no shard.
    Remove { id: u64 },
    /// Changes the number of shards, under load; waits for the end.
    Resize { shards: u32 },
    /// Brings all memories of a tenant to one shard, under load, and keeps them there; waits for the end.
    Pin { tenant: String, shard: u32 },
    /// Brings a tenant's memories back to where those of all others lie; waits for the end.
    Unpin { tenant: String },
}

pub async fn run(to: &To, what: Cluster) -> Done {
    let client = to.connect()?;
    match what {
        Cluster::Status => show(to, &status(&client).await?),
        Cluster::Join { id, addr, roles, region } => {
            let node = v1::ClusterNode { id, address: addr, roles, region, ..Default::default() };
            show(to, &change(&client, Change::Join(node)).await?);
        }
        Cluster::Drain { id } => {
            change(&client, Change::Drain(id)).await?;
            wait(to, &client, |cluster| {
                let left =
                    cluster.nodes.iter().find(|node| node.id == id).map_or(0, |node| node.shards.len());
                (left > 0).then(|| format!("node {id} still has {left} replicas"))
            })
            .await?;
        }
        Cluster::Remove { id } => show(to, &change(&client, Change::Remove(id)).await?),
        Cluster::Resize { shards } => {
            change(&client, Change::Shards(shards)).await?;
            wait(to, &client, |cluster| {
                let resize = cluster.resize.as_ref()?;
                Some(format!("{} of {} slots moved", resize.slots_moved, resize.slots_to_move))
            })
            .await?;
        }
        Cluster::Pin { tenant, shard } => {
            change(&client, Change::Pin(v1::Pin { tenant: tenant.clone(), shard })).await?;
            wait_for_pin(to, &client, &tenant).await?;
        }
        Cluster::Unpin { tenant } => {
            change(&client, Change::Unpin(tenant.clone())).await?;
            wait_for_pin(to, &client, &tenant).await?;
        }
    }
    Ok(())
}

async fn wait_for_pin(to: &To, client: &Client, tenant: &str) -> Done {
    wait(to, client, |cluster| {
        let pin = cluster.pins.iter().find(|pin| pin.tenant == tenant && pin.slots_to_move > 0)?;
        Some(format!("{} of {SLOTS} slots of {tenant} still to move", pin.slots_to_move))
    })
    .await
}

pub(super) async fn status(client: &Client) -> Result<v1::ClusterResponse, Failure> {
    let answer = client.admin().cluster(client.request(v1::ClusterRequest {})).await;
    Ok(answer.map_err(|s| client.explain(s))?.into_inner())
}

pub(super) async fn change(client: &Client, change: Change) -> Result<v1::ClusterResponse, Failure> {
    let request = v1::ChangeClusterRequest { change: Some(change) };
    let answer = client.admin().change_cluster(client.request(request)).await;
    Ok(answer.map_err(|s| client.explain(s))?.into_inner())
}

/// Looks every half second until `left` has nothing more to say.
async fn wait(to: &To, client: &Client, left: impl Fn(&v1::ClusterResponse) -> Option<String>) -> Done {
    let mut told = String::new();
    loop {
        // A node that is asked may be the one that restarts; the next look asks again.
        if let Ok(cluster) = status(client).await {
            match left(&cluster) {
                None => {
                    show(to, &cluster);
                    return Ok(());
                }
                Some(text) if text != told => {
                    eprintln!("{text}");
                    told = text;
                }
                Some(_) => {}
            }
        }
        sleep(Duration::from_millis(500)).await;
    }
}

fn show(to: &To, cluster: &v1::ClusterResponse) {
    if to.json {
        let node = |n: &v1::ClusterNode| json!({ "id": n.id, "address": n.address, "state": n.state, "roles": n.roles, "region": n.region, "shards": n.shards });
        let learner = |l: &v1::ClusterLearner| json!({ "node": l.node, "state": l.state });
        let shard = |s: &v1::ClusterShard| {
            json!({ "shard": s.shard, "members": s.members, "slots": s.slots, "joining": s.joining, "leaving": s.leaving, "epoch": s.epoch,
            "learners": s.learners.iter().map(learner).collect::<Vec<_>>() })
        };
        let resize = cluster.resize.as_ref().map(
            |r| json!({ "shards": r.shards, "slots_moved": r.slots_moved, "slots_to_move": r.slots_to_move }),
        );
        let pin = |p: &v1::ClusterPin| json!({ "tenant": p.tenant, "shard": p.shard, "slots_to_move": p.slots_to_move });
        println!(
            "{}",
            json!({ "version": cluster.version, "incarnation": cluster.incarnation, "nodes": cluster.nodes.iter().map(node).collect::<Vec<_>>(),
                "shards": cluster.shards.iter().map(shard).collect::<Vec<_>>(), "resize": resize,
                "pins": cluster.pins.iter().map(pin).collect::<Vec<_>>() })
        );
        return;
    }
    let of = match cluster.incarnation {
        0 => String::new(),
        number => format!(", by incarnation {number} of the control group"),
    };
    println!("map version {}{of}", cluster.version);
    for node in &cluster.nodes {
        println!(
            "node {:3}  {:22} {:8} {:9} {:3} replicas  {}",
            node.id,
            node.address,
            node.region,
            node.state,
            node.shards.len(),
            node.roles.join(",")
        );
    }
    for shard in &cluster.shards {
        let moving = match (shard.leaving, shard.joining) {
            (_, 0) => String::new(),
            (0, to) => format!("  (node {to} joins)"),
            (from, to) => format!("  (node {to} takes the place of node {from})"),
        };
        println!("shard {:2}  nodes {:?}  slots {}{moving}", shard.shard, shard.members, shard.slots);
        for learner in &shard.learners {
            println!("          node {} for its views: {}", learner.node, learner.state);
        }
    }
    for pin in &cluster.pins {
        let whither = pin.shard.map_or("unpinned".into(), |shard| format!("pinned to shard {shard}"));
        let moving = match pin.slots_to_move {
            0 => String::new(),
            left => format!("  ({left} of {SLOTS} slots still to move)"),
        };
        println!("tenant {}  {whither}{moving}", pin.tenant);
    }
    if let Some(resize) = &cluster.resize {
        println!(
            "on the way to {} shards: {} of {} slots moved",
            resize.shards, resize.slots_moved, resize.slots_to_move
        );
    }
}
