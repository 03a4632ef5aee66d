//! Commands on relations between memories.

use super::Done;
use super::client::To;
use super::memories::as_json;
use super::time::{format_time, parse_time};
use clap::Args;
use nodes::proto::v1;
use serde_json::json;

#[derive(Args)]
pub struct Link {
    /// A memory's id.
    source: String,
    relation: String,
    target: String,
    /// The greater, the sooner it is followed.
    #[arg(long, default_value_t = 1.0)]
    weight: f32,
    /// When it began to hold: RFC 3339 or a date.
    #[arg(long)]
    from: Option<String>,
    /// When it ceased to hold.
    #[arg(long)]
    to: Option<String>,
    /// Removes it.
    #[arg(long)]
    remove: bool,
}

#[derive(Args)]
pub struct Graph {
    /// Where to start: ids of memories.
    #[arg(required = true)]
    start: Vec<String>,
    #[arg(long, default_value_t = 1)]
    hops: u32,
    /// Of each memory the heaviest so many edges.
    #[arg(long, default_value_t = 100)]
    fan_out: u32,
    /// Only these relations; may be repeated.
    #[arg(long)]
    relation: Vec<String>,
    /// From targets to sources.
    #[arg(long)]
    inbound: bool,
    /// As it was then: RFC 3339 or a date.
    #[arg(long)]
    as_of: Option<String>,
}

pub async fn link(to: &To, link: Link) -> Done {
    let client = to.connect()?;
    let time = |text: &Option<String>| {
        Ok::<i64, super::Failure>(text.as_deref().map(parse_time).transpose()?.unwrap_or(0))
    };
    let edge = v1::Edge {
        valid_from: time(&link.from)?,
        valid_to: time(&link.to)?,
        source: link.source,
        relation: link.relation,
        target: link.target,
        weight: link.weight,
    };
    let (edges, options) = (vec![edge], None);
    let mut service = client.graph();
    let done = if link.remove {
        service.delete_edges(client.request(v1::DeleteEdgesRequest { edges, options })).await.map(drop)
    } else {
        service.upsert_edges(client.request(v1::UpsertEdgesRequest { edges, options })).await.map(drop)
    };
    done.map_err(|s| client.explain(s))?;
    let what = if link.remove { "unlinked" } else { "linked" };
    if to.json {
        println!("{}", json!({ "done": what }))
    } else {
        println!("{what}")
    }
    Ok(())
}

pub async fn graph(to: &To, graph: Graph) -> Done {
    let client = to.connect()?;
    let request = v1::TraverseRequest {
        start: graph.start,
        relations: graph.relation,
        hops: graph.hops,
        fan_out: graph.fan_out,
        inbound: graph.inbound,
        as_of: graph.as_of.as_deref().map(parse_time).transpose()?.unwrap_or(0),
        ..Default::default()
    };
    let answer =
        client.graph().traverse(client.request(request)).await.map_err(|s| client.explain(s))?.into_inner();
    let when = |ms: i64| (ms != 0).then(|| format_time(ms));
    for memory in answer.memories.iter() {
        match to.json {
            true => println!("{}", json!({ "memory": as_json(memory) })),
            false => println!("{}  {}", memory.id, memory.text.replace('\n', " ")),
        }
    }
    for edge in &answer.edges {
        match to.json {
            true => println!(
                "{}",
                json!({ "edge": { "source": edge.source, "relation": edge.relation, "target": edge.target,
                    "weight": edge.weight, "from": when(edge.valid_from), "to": when(edge.valid_to) } })
            ),
            false => println!("{} --{} ({})--> {}", edge.source, edge.relation, edge.weight, edge.target),
        }
    }
    Ok(())
}
