//! `loci control …`: the group of nodes that keeps the cluster map, when most of it is lost for good ([`nodes::control::recover`]).

use super::client::{Client, To};
use super::{Done, Failure, region};
use clap::Subcommand;
use nodes::proto::v1;
use serde_json::json;
use sim::time::Duration;

/// Nodes whose disks are slow take long to halt.
const RECOVER_WITHIN: Duration = Duration::from_secs(120);

#[derive(Subcommand)]
pub enum Control {
    /// Begins the control group anew with the nodes that still answer. Without --yes it says what it would do. Waits for the end.
    Recover {
        /// The region that goes on; else the primary if it has the replicas for it, else another one.
        #[arg(long, default_value = "")]
        to: String,
        /// Goes on with fewer replicas there than are needed to be sure of what is durable in the region.
        #[arg(long)]
        accept_data_loss: bool,
        /// The nodes that do not answer are off, and stay off until they can reach these: otherwise two regions may write.
        #[arg(long)]
        yes: bool,
    },
}

pub async fn run(to: &To, what: Control) -> Done {
    let Control::Recover { to: region, accept_data_loss, yes } = what;
    let client = to.connect()?;
    let ask = |dry_run| v1::RecoverControlRequest { dry_run, to: region.clone(), accept_data_loss };
    let found = recover(&client, ask(true)).await?;
    if !to.json {
        for node in &found.nodes {
            let problem = if node.problem.is_empty() { String::new() } else { format!(": {}", node.problem) };
            match node.answers {
                true => println!(
                    "node {:2}  {:22} incarnation {}, up to entry {}{problem}",
                    node.id, node.address, node.incarnation, node.last_index
                ),
                false => println!("node {:2}  {:22} does not answer{problem}", node.id, node.address),
            }
        }
    }
    if !found.refused.is_empty() {
        return Err(Failure(found.refused));
    }
    if !yes {
        if to.json {
            println!("{}", told(&found));
        } else {
            let goes_on = match found.region.as_str() {
                "" => String::new(),
                region => format!(", and {region} would go on in an epoch of its own"),
            };
            println!(
                "the control group would begin anew with those that answer{goes_on}. Nothing is done yet."
            );
            println!(
                "make sure that the others are off: where they still run they go on by themselves, and two regions may write. Then give --yes"
            );
        }
        return Ok(());
    }
    eprintln!("the nodes that answer halt, and the one with most begins; this takes some seconds");
    let done = recover(&client, ask(false)).await?;
    if to.json {
        println!("{}", told(&done));
    } else {
        println!("the control group goes on, in its incarnation {}", done.incarnation);
    }
    if !done.region.is_empty() {
        region::wait_for_recovery(to, &client, &done.region).await?;
    }
    Ok(())
}

async fn recover(
    client: &Client,
    ask: v1::RecoverControlRequest,
) -> Result<v1::RecoverControlResponse, Failure> {
    let mut request = client.request(ask);
    request.set_timeout(RECOVER_WITHIN);
    let answer = client.admin().recover_control(request).await;
    Ok(answer.map_err(|s| client.explain(s))?.into_inner())
}

fn told(found: &v1::RecoverControlResponse) -> serde_json::Value {
    let node = |node: &v1::ControlNode| {
        json!({ "id": node.id, "address": node.address, "answers": node.answers, "incarnation": node.incarnation,
            "last": node.last_index, "problem": node.problem })
    };
    json!({ "nodes": found.nodes.iter().map(node).collect::<Vec<_>>(), "incarnation": found.incarnation, "region": found.region })
}
