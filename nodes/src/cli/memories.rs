//! Commands on memories: add, search, get, list, update, delete, history, watch; and status.

use super::client::{Client, To};
use super::time::{format_time, parse_time};
use super::{Done, Failure};
use clap::Args;
use nodes::proto::v1;
use serde_json::json;

/// Whose memories a command is about.
#[derive(Args, Clone)]
pub struct Whose {
    /// The user; yours if not given.
    #[arg(long, env = "LOCI_USER", default_value = "me")]
    pub user: String,
    #[arg(long, default_value = "")]
    pub agent: String,
}

#[derive(Args)]
pub struct Add {
    text: String,
    #[command(flatten)]
    whose: Whose,
    /// private, shared or global.
    #[arg(long, default_value = "private")]
    scope: String,
    #[arg(long, default_value = "semantic")]
    r#type: String,
    /// A JSON object.
    #[arg(long, default_value = "")]
    metadata: String,
    #[arg(long)]
    category: Vec<String>,
    #[arg(long, default_value_t = 0.0)]
    importance: f32,
    /// When it happened: RFC 3339 or a date.
    #[arg(long)]
    when: Option<String>,
    /// Makes a retry safe: the same key adds once.
    #[arg(long, default_value = "")]
    idempotency_key: String,
    /// Waits until the other region has it too.
    #[arg(long)]
    durable_elsewhere: bool,
}

#[derive(Args)]
pub struct Search {
    query: String,
    #[command(flatten)]
    whose: Whose,
    #[arg(short, default_value_t = 5)]
    k: u32,
    /// Least score.
    #[arg(long, default_value_t = 0.0)]
    threshold: f32,
    /// Only memories whose field equals a value: FIELD=VALUE, e.g. metadata.city=Rome. May be repeated.
    #[arg(long = "where")]
    conditions: Vec<String>,
}

#[derive(Args)]
pub struct List {
    /// Only this user's; the whole tenant's if not given.
    #[arg(long, default_value = "")]
    user: String,
    #[arg(long, default_value = "")]
    agent: String,
    #[arg(long, default_value_t = 0)]
    limit: u32,
    #[arg(long = "where")]
    conditions: Vec<String>,
    #[arg(long)]
    archived: bool,
}

#[derive(Args)]
pub struct Update {
    id: String,
    #[arg(long)]
    text: Option<String>,
    #[arg(long)]
    metadata: Option<String>,
    #[arg(long)]
    importance: Option<f32>,
    /// active or archived.
    #[arg(long)]
    status: Option<String>,
    /// Only if the memory is at this version.
    #[arg(long)]
    expected_version: Option<u64>,
}

pub fn scope(text: &str) -> Result<i32, Failure> {
    v1::Scope::from_str_name(&format!("SCOPE_{}", text.to_uppercase()))
        .map(|s| s as i32)
        .ok_or_else(|| Failure(format!("'{text}' is no scope; use private, shared or global")))
}

pub fn memory_type(text: &str) -> Result<i32, Failure> {
    v1::MemoryType::from_str_name(&format!("MEMORY_TYPE_{}", text.to_uppercase()))
        .map(|t| t as i32)
        .ok_or_else(|| Failure(format!("'{text}' is no type; use semantic, episodic, procedural or message")))
}

/// FIELD=VALUE conditions, all of which must hold. A value that reads as a number or a truth value is one.
fn filter(conditions: &[String]) -> Result<Option<v1::Filter>, Failure> {
    use v1::{filter::Condition, value::Kind};
    let one = |text: &String| {
        let (field, value) =
            text.split_once('=').ok_or_else(|| Failure(format!("'{text}' is no FIELD=VALUE")))?;
        let kind = match (value.parse::<f64>(), value.parse::<bool>()) {
            (Ok(number), _) => Kind::Number(number),
            (_, Ok(flag)) => Kind::Boolean(flag),
            _ => Kind::Text(value.into()),
        };
        let value = Some(v1::Value { kind: Some(kind) });
        let compare = v1::Compare { field: field.into(), op: v1::CompareOp::Eq as i32, value };
        Ok(v1::Filter { condition: Some(Condition::Compare(compare)) })
    };
    if conditions.is_empty() {
        return Ok(None);
    }
    let filters = conditions.iter().map(one).collect::<Result<_, Failure>>()?;
    Ok(Some(v1::Filter { condition: Some(Condition::All(v1::FilterList { filters })) }))
}

pub fn as_json(memory: &v1::Memory) -> serde_json::Value {
    let when = |ms: i64| (ms != 0).then(|| format_time(ms));
    json!({
        "id": memory.id, "text": memory.text, "user": memory.user, "agent": memory.agent, "session": memory.session,
        "scope": memory.scope().as_str_name().trim_start_matches("SCOPE_").to_lowercase(),
        "type": memory.r#type().as_str_name().trim_start_matches("MEMORY_TYPE_").to_lowercase(),
        "status": memory.status().as_str_name().trim_start_matches("STATUS_").to_lowercase(),
        "metadata": serde_json::from_str::<serde_json::Value>(&memory.metadata).unwrap_or(serde_json::Value::Null),
        "importance": memory.importance, "categories": memory.categories, "version": memory.version,
        "event_time": when(memory.event_time), "created": when(memory.created), "updated": when(memory.updated),
        "expires": when(memory.expires), "access_count": memory.access_count, "space": memory.space,
    })
}

/// Where a memory comes from, if its metadata says so; else whose it is.
fn origin(memory: &v1::Memory) -> String {
    let metadata: serde_json::Value = serde_json::from_str(&memory.metadata).unwrap_or_default();
    match (metadata["source"].as_str(), metadata["line"].as_u64()) {
        (Some(source), Some(line)) => format!("{source}:{line}"),
        _ => memory.user.clone(),
    }
}

fn show(memory: &v1::Memory) {
    println!("{}  version {}  {}", memory.id, memory.version, origin(memory));
    println!("    {}", memory.text.replace('\n', "\n    "));
}

pub async fn add(to: &To, add: Add) -> Done {
    let client = to.connect()?;
    let memory = v1::NewMemory {
        scope: scope(&add.scope)?,
        user: add.whose.user,
        agent: add.whose.agent,
        text: add.text,
        metadata: add.metadata,
        r#type: memory_type(&add.r#type)?,
        importance: add.importance,
        categories: add.category,
        event_time: add.when.as_deref().map(parse_time).transpose()?.unwrap_or(0),
        ..Default::default()
    };
    let durability = if add.durable_elsewhere { v1::Durability::Region } else { v1::Durability::Quorum };
    let idempotency_key = client.write_key(add.idempotency_key);
    let options = Some(v1::WriteOptions { idempotency_key, durability: durability.into() });
    let request = client.request(v1::AddRequest { memory: Some(memory), options });
    let added = client.memories().add(request).await.map_err(|s| client.explain(s))?.into_inner();
    let there = added.info.is_some_and(|info| info.durability == v1::Durability::Region as i32);
    if add.durable_elsewhere && !there {
        eprintln!(
            "the other region does not have it yet: it is there once the lag in `loci region status` is over"
        );
    }
    done(to, "added", &added.id, added.version)
}

fn done(to: &To, what: &str, id: &str, version: u64) -> Done {
    match to.json {
        true => println!("{}", json!({ "done": what, "id": id, "version": version })),
        false => println!("{what} {id} (version {version})"),
    }
    Ok(())
}

pub async fn search(to: &To, search: Search) -> Done {
    let client = to.connect()?;
    let request = v1::SearchRequest {
        text: search.query,
        owners: Some(v1::Owners { user: search.whose.user, agent: search.whose.agent, ..Default::default() }),
        k: search.k,
        threshold: search.threshold,
        filter: filter(&search.conditions)?,
        ..Default::default()
    };
    let answer =
        client.memories().search(client.request(request)).await.map_err(|s| client.explain(s))?.into_inner();
    if answer.hits.is_empty() && !to.json {
        println!("nothing found; `loci list` shows what is there");
    }
    for hit in &answer.hits {
        let Some(memory) = &hit.memory else { continue };
        if to.json {
            println!("{}", json!({ "score": hit.score, "parts": hit.parts, "memory": as_json(memory) }));
        } else {
            println!("{:.3}  {}", hit.score, origin(memory));
            println!("       {}", memory.text.replace('\n', "\n       "));
        }
    }
    Ok(())
}

pub async fn get(to: &To, id: String, eventual: bool) -> Done {
    let client = to.connect()?;
    let consistency = v1::Consistency::Eventual as i32;
    let options = eventual.then(|| v1::ReadOptions { consistency, ..Default::default() });
    let answer = client.memories().get(client.request(v1::GetRequest { id, options })).await;
    let memory = answer.map_err(|s| client.explain(s))?.into_inner().memory.unwrap_or_default();
    match to.json {
        true => println!("{}", as_json(&memory)),
        false => println!("{}", serde_json::to_string_pretty(&as_json(&memory))?),
    }
    Ok(())
}

pub async fn list(to: &To, list: List) -> Done {
    let client = to.connect()?;
    let request = v1::ListRequest {
        owners: Some(v1::Owners { user: list.user, agent: list.agent, ..Default::default() }),
        filter: filter(&list.conditions)?,
        include_archived: list.archived,
        limit: list.limit,
        ..Default::default()
    };
    let mut pages =
        client.memories().list(client.request(request)).await.map_err(|s| client.explain(s))?.into_inner();
    let mut count = 0;
    while let Some(page) = pages.message().await.map_err(|s| client.explain(s))? {
        for memory in &page.memories {
            count += 1;
            if to.json { println!("{}", as_json(memory)) } else { show(memory) }
        }
    }
    if !to.json {
        println!("{count} memories");
    }
    Ok(())
}

pub async fn update(to: &To, update: Update) -> Done {
    let client = to.connect()?;
    let status = match update.status.as_deref() {
        None => None,
        Some(text) => Some(
            v1::Status::from_str_name(&format!("STATUS_{}", text.to_uppercase()))
                .ok_or_else(|| Failure(format!("'{text}' is no status; use active or archived")))?
                as i32,
        ),
    };
    let request = v1::UpdateRequest {
        id: update.id,
        expected_version: update.expected_version,
        text: update.text,
        metadata: update.metadata,
        importance: update.importance,
        status,
        options: options(&client),
        ..Default::default()
    };
    let answer =
        client.memories().update(client.request(request)).await.map_err(|s| client.explain(s))?.into_inner();
    done(to, "updated", &answer.id, answer.version)
}

/// Of a write for which the caller gave none.
fn options(client: &Client) -> Option<v1::WriteOptions> {
    let idempotency_key = client.write_key(String::new());
    Some(v1::WriteOptions { idempotency_key, ..Default::default() })
}

pub async fn delete(to: &To, id: String) -> Done {
    let client = to.connect()?;
    let request = client.request(v1::DeleteRequest { id, options: options(&client), ..Default::default() });
    let answer = client.memories().delete(request).await.map_err(|s| client.explain(s))?.into_inner();
    done(to, "deleted", &answer.id, answer.version)
}

fn show_change(to: &To, change: &v1::Change) {
    let kind = change.kind().as_str_name().trim_start_matches("CHANGE_KIND_").to_lowercase();
    let memory = change.memory.clone().unwrap_or_default();
    let index = change.token.as_ref().and_then(|t| t.positions.first()).map_or(0, |p| p.index);
    if to.json {
        println!("{}", json!({ "kind": kind, "index": index, "memory": as_json(&memory) }));
    } else {
        println!(
            "{index:8}  {kind:8} {}  version {}  {}",
            memory.id,
            memory.version,
            memory.text.replace('\n', " ")
        );
    }
}

pub async fn history(to: &To, id: String) -> Done {
    let client = to.connect()?;
    let answer = client.memories().history(client.request(v1::HistoryRequest { id, options: None })).await;
    let answer = answer.map_err(|s| client.explain(s))?.into_inner();
    answer.changes.iter().for_each(|change| show_change(to, change));
    Ok(())
}

pub async fn watch(to: &To) -> Done {
    let client = to.connect()?;
    let mut changes = open_watch(&client).await?;
    if !to.json {
        println!("watching; stop with Ctrl-C");
    }
    while let Some(message) = changes.message().await.map_err(|s| client.explain(s))? {
        message.changes.iter().for_each(|change| show_change(to, change));
    }
    Ok(())
}

async fn open_watch(client: &Client) -> Result<tonic::Streaming<v1::WatchResponse>, Failure> {
    let request = client.request(v1::WatchRequest { after: None });
    Ok(client.memories().watch(request).await.map_err(|s| client.explain(s))?.into_inner())
}

pub async fn status(to: &To) -> Done {
    let client = to.connect()?;
    let status = client.admin().status(client.request(v1::StatusRequest::default())).await;
    let status = status.map_err(|s| client.explain(s))?.into_inner();
    let members = client.admin().members(client.request(v1::MembersRequest {})).await;
    let members = members.map_err(|s| client.explain(s))?.into_inner().members;
    if to.json {
        println!("{}", nodes::http::json(&status));
        return Ok(());
    }
    println!(
        "{} at {}: level {}, build {}, up {} s",
        status.node,
        client.addr,
        status.level,
        status.build,
        status.uptime_ms / 1000
    );
    for shard in &status.shards {
        println!(
            "shard {}: {} memories, {} vectors, {} edges; leader {}, term {}, ledger at {}",
            shard.shard,
            shard.memories,
            shard.vectors,
            shard.edges,
            if shard.leader.is_empty() { "none" } else { &shard.leader },
            shard.term,
            shard.last_index,
        );
        if shard.repairing {
            println!("  its log was damaged: it does not vote until its peers have given back what it lost");
        }
        for view in &shard.views {
            println!("  view {} at {}", view.view, view.published_index);
        }
    }
    for member in &members {
        println!(
            "  {} {} {}{}",
            member.role,
            member.node,
            member.address,
            if member.leader { " (leads)" } else { "" }
        );
    }
    if let Some(cache) = &status.cache {
        let (memories, megabytes) = (cache.memories, cache.bytes as f64 / 1e6);
        println!(
            "cache: {memories} memories, {megabytes:.1} MB, {} hits, {} misses",
            cache.hits, cache.misses
        );
    }
    println!("{:.1} MB on disk", status.disk_bytes as f64 / 1e6);
    Ok(())
}
