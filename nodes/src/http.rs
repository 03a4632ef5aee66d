//! The status page: what a person wants to see of a node in a browser, and the same as JSON for a script.

use crate::gateway::About;
use crate::proto::v1;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use sim::net::Routes;
use std::fmt::Write;
use std::sync::Arc;

/// `/` for people, `/status.json` for programs, `/healthz` for load balancers. Holds no memory's content, though names of pinned tenants, and asks for no key: bind it to
/// addresses that may see it.
pub fn routes(about: Arc<About>) -> Routes {
    let (page_of, json_of) = (about.clone(), about);
    let page = move || async move {
        match page_of.status(false).await {
            Ok(status) => {
                let html = page(&status, &page_of.members());
                (StatusCode::OK, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response()
            }
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
        }
    };
    let json = move || async move {
        match json_of.status(false).await {
            Ok(status) => {
                let text = json(&status).to_string();
                (StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], text).into_response()
            }
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
        }
    };
    let router = Router::new()
        .route("/", get(page))
        .route("/status.json", get(json))
        .route("/healthz", get(|| async { "ok\n" }));
    Routes::from(router)
}

/// A node's status as JSON.
pub fn json(status: &v1::StatusResponse) -> serde_json::Value {
    let shards: Vec<_> = status
        .shards
        .iter()
        .map(|shard| {
            serde_json::json!({
                "shard": shard.shard, "leader": shard.leader, "is_leader": shard.is_leader, "term": shard.term,
                "epoch": shard.epoch, "last_index": shard.last_index, "committed_index": shard.committed_index,
                "views": shard.views.iter().map(|v| (v.view.clone(), v.published_index)).collect::<std::collections::BTreeMap<_, _>>(),
                "memories": shard.memories, "vectors": shard.vectors, "idempotency_keys": shard.idempotency_keys,
                "pinned": shard.pinned,
            })
        })
        .collect();
    let cache = status.cache.as_ref().map(|c| {
        serde_json::json!({ "memories": c.memories, "bytes": c.bytes, "hits": c.hits, "misses": c.misses })
    });
    serde_json::json!({
        "node": status.node, "build": status.build, "roles": status.roles, "level": status.level,
        "uptime_ms": status.uptime_ms, "disk_bytes": status.disk_bytes, "shards": shards, "cache": cache,
    })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn page(status: &v1::StatusResponse, members: &[v1::Member]) -> String {
    let mut html = String::from(
        "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content=2><title>Loci</title><style>\
         body{font:15px/1.5 system-ui;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#223}\
         table{border-collapse:collapse;width:100%;margin:1rem 0}td,th{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ddd}\
         .level{float:right;padding:.1rem .7rem;border-radius:1rem;background:#dfd}.bad{background:#fdd}</style>",
    );
    let bad = if status.level == "L0" { "" } else { " bad" };
    let _ = write!(
        html,
        "<h1>Loci <small>{}</small> <span class='level{bad}'>{}</span></h1><p>build {}, up {} s, {:.1} MB on disk, roles {}</p>",
        escape(&status.node),
        status.level,
        escape(&status.build),
        status.uptime_ms / 1000,
        status.disk_bytes as f64 / 1e6,
        escape(&status.roles.join(", ")),
    );
    for shard in &status.shards {
        let leader = if shard.leader.is_empty() { "none".to_string() } else { escape(&shard.leader) };
        let _ = write!(
            html,
            "<h2>Shard {}</h2><table><tr><th>memories<th>vectors<th>leader<th>term<th>ledger<th>views</tr>\
             <tr><td>{}<td>{}<td>{leader}<td>{}<td>{}<td>{}</tr></table>",
            shard.shard,
            shard.memories,
            shard.vectors,
            shard.term,
            shard.last_index,
            shard
                .views
                .iter()
                .map(|v| format!("{} {}", v.view, v.published_index))
                .collect::<Vec<_>>()
                .join(", "),
        );
        if !shard.pinned.is_empty() {
            let _ = write!(html, "<p>pinned tenants: {}</p>", escape(&shard.pinned.join(", ")));
        }
    }
    html.push_str("<table><tr><th>group<th>replica<th>address<th>role</tr>");
    for member in members {
        let leads = if member.leader { ", leads" } else { "" };
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td>{}<td>{}{leads}</tr>",
            escape(&member.group),
            escape(&member.node),
            escape(&member.address),
            member.role
        );
    }
    html.push_str("</table>");
    html
}
