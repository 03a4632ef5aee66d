//! `loci erase`: a person's right to be forgotten.

use super::client::To;
use super::time::format_time;
use super::{Done, Failure};
use clap::Args;
use nodes::proto::v1;
use serde_json::json;

#[derive(Args)]
pub struct Erase {
    /// The user whose memories are erased, whatever their scope.
    #[arg(long, default_value = "")]
    user: String,
    /// Only those with this agent; without a user all of the agent's.
    #[arg(long, default_value = "")]
    agent: String,
    /// Without it nothing is erased.
    #[arg(long)]
    yes: bool,
    /// Makes a retry safe: the same key erases once.
    #[arg(long, default_value = "")]
    idempotency_key: String,
    /// Does not wait until the other region has it too.
    #[arg(long)]
    durable_here: bool,
}

pub async fn erase(to: &To, erase: Erase) -> Done {
    let Erase { user, agent, .. } = &erase;
    let whose = match (&user[..], &agent[..]) {
        ("", "") => {
            return Err(Failure("name a --user or an --agent: whose memories are to be erased".into()));
        }
        (user, "") => format!("user {user}"),
        ("", agent) => format!("agent {agent}"),
        (user, agent) => format!("user {user} with agent {agent}"),
    };
    if !erase.yes {
        return Err(Failure(format!(
            "everything of {whose} goes for ever, every version of it; say --yes if that is meant"
        )));
    }
    let client = to.connect()?;
    let durability = if erase.durable_here { v1::Durability::Quorum } else { v1::Durability::Region };
    let options = v1::WriteOptions { idempotency_key: erase.idempotency_key, durability: durability.into() };
    let request = v1::EraseRequest { user: erase.user, agent: erase.agent, options: Some(options) };
    let answer = client.memories().erase(client.request(request)).await;
    show(to, &whose, &answer.map_err(|s| client.explain(s))?.into_inner());
    Ok(())
}

fn show(to: &To, whose: &str, receipt: &v1::EraseResponse) {
    let regions: Vec<String> = receipt.shards.iter().map(|shard| shard.regions.join(", ")).collect();
    let lacking = receipt.info.as_ref().is_none_or(|info| info.durability != v1::Durability::Region as i32)
        && regions.iter().any(|regions| !regions.is_empty());
    if to.json {
        let shard = |shard: &v1::ErasedShard| {
            json!({ "shard": shard.shard, "epoch": shard.epoch, "index": shard.index, "memories": shard.memories,
                "versions": shard.versions, "regions": shard.regions })
        };
        let leftover = |left: &v1::Leftover| json!({ "where": left.r#where, "until": left.until });
        let line = json!({
            "done": "erased", "erasure": receipt.erasure, "at": format_time(receipt.at), "memories": receipt.memories,
            "versions": receipt.versions, "everywhere": !lacking,
            "shards": receipt.shards.iter().map(shard).collect::<Vec<_>>(),
            "leftovers": receipt.leftovers.iter().map(leftover).collect::<Vec<_>>(),
        });
        println!("{line}");
        return;
    }
    let (id, at) = (receipt.erasure, format_time(receipt.at));
    println!("erasure {id}, asked for at {at}: {whose}");
    println!("{} memories in {} versions", receipt.memories, receipt.versions);
    for (shard, regions) in receipt.shards.iter().zip(&regions) {
        let durable = if regions.is_empty() { String::new() } else { format!("; on disk in {regions}") };
        println!(
            "  shard {}: {} memories, {} versions, at {} of epoch {}{durable}",
            shard.shard, shard.memories, shard.versions, shard.index, shard.epoch
        );
    }
    if lacking {
        println!("the other region does not have it yet; the cluster sees to it that it will");
    }
    println!("nobody is shown any of it; bytes of it may still be in");
    for left in &receipt.leftovers {
        println!("  {}, until {}", left.r#where, left.until);
    }
}
