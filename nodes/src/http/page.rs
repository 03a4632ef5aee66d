//! The page for people: one document without scripts, made anew with every look, readable on a phone.

use super::{figures, headline, time};
use crate::control::map::{ClusterMap, ShardId};
use crate::gateway::About;
use crate::proto::v1;
use crate::time::format_time;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Incidents that are shown, the newest ones.
const INCIDENTS_MAX: usize = 10;
/// After so long without a word from the control group the page says that it may be old, in milliseconds.
const OLD_AFTER_MS: u64 = 10_000;

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>\
<meta http-equiv=refresh content=5><title>Loci</title><style>\
:root{color-scheme:light dark;--ink:#1c2430;--dim:#667;--line:#dde1e7;--back:#f5f6f8;--card:#fff;--ok:#1a7f37;--warn:#9a6700;--bad:#c62828}\
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--dim:#98a2b0;--line:#333b47;--back:#14181d;--card:#1c222a;--ok:#57c26e;--warn:#e0b13c;--bad:#ff7b72}}\
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:var(--ink);background:var(--back)}\
header{display:flex;justify-content:space-between;align-items:baseline;gap:1rem}h1{font-size:1.3rem;margin:0}h2{font-size:1rem;margin:1.2rem 0 .4rem}\
small,.dim{color:var(--dim);font-weight:normal}section,.says{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.4rem .8rem;overflow-x:auto}\
.says{margin:.8rem 0;padding:.6rem .8rem;border-left:.35rem solid var(--ok);font-weight:600}.says.warn{border-left-color:var(--warn)}.says.bad{border-left-color:var(--bad)}\
.says p{margin:.2rem 0 0;font-weight:normal}table{border-collapse:collapse;width:100%}\
td,th{padding:.3rem .8rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--dim);font-weight:500}\
tr:last-child td{border-bottom:0}.ok{color:var(--ok)}.warn{color:var(--warn)}.bad{color:var(--bad)}\
details{margin:.3rem 0}summary{cursor:pointer}ul{margin:.3rem 0;padding-left:1.2rem}footer{margin-top:1.2rem;color:var(--dim);font-size:.85rem;overflow-wrap:anywhere}</style>";

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;").replace('\'', "&#39;")
}

fn table(html: &mut String, title: &str, heads: &[&str], rows: &[Vec<String>]) {
    let heads: String = heads.iter().map(|head| format!("<th>{head}")).collect();
    let _ = write!(html, "<h2>{title}</h2><section><table><tr>{heads}</tr>");
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td>{cell}")).collect();
        let _ = write!(html, "<tr>{cells}</tr>");
    }
    html.push_str("</table></section>");
}

fn state(state: &str) -> String {
    let class = match state {
        "down" | "recovering" | "draining" | "joining" => "warn",
        "lost" | "open" | "none" => "bad",
        _ => "ok",
    };
    let shown = if state == "member" { "up" } else { state };
    format!("<span class={class}>{}</span>", escape(shown))
}

/// The whole page of a node: what it is itself, and the cluster by the map that it has.
pub fn page(
    about: &About,
    map: &ClusterMap,
    status: &v1::StatusResponse,
    lags: &BTreeMap<ShardId, u64>,
) -> String {
    let (regions, cluster, incidents) = (about.regions(), about.cluster(map), about.incidents(map));
    let mut html = String::from(HEAD);
    let level = if status.level == "L0" { "ok" } else { "bad" };
    let _ = write!(
        html,
        "<header><h1>Loci <small>{}</small></h1><span class={level}>level {}</span></header>",
        escape(&status.node),
        escape(&status.level)
    );
    summary(&mut html, &regions, &cluster, &incidents);
    let warned_ms = map.regions.as_ref().map_or(u64::MAX, |regions| regions.policy.lag_warned_ms());
    if cluster.regions.is_some() {
        regions_of(&mut html, &regions, &cluster, lags, warned_ms);
    }
    // Those that go on stand above what they are about, the others below it.
    for open in incidents.iter().rev().filter(|incident| incident.state != "closed") {
        incident(&mut html, open, true);
    }
    shards(&mut html, &cluster, status, lags, warned_ms);
    nodes(&mut html, &cluster, &regions);
    caches(&mut html, &cluster, status);
    if cluster.regions.is_some() {
        html.push_str("<h2>Past incidents</h2>");
        let closed: Vec<&v1::Incident> =
            incidents.iter().rev().filter(|incident| incident.state == "closed").collect();
        if closed.is_empty() {
            html.push_str("<section><p class=dim>None.</section>");
        }
        for each in closed.into_iter().take(INCIDENTS_MAX) {
            incident(&mut html, each, false);
        }
    }
    groups(&mut html, &about.members());
    let _ = write!(
        html,
        "<footer>{} · build {} · up {} · {:.1} MB on disk · roles {} · map version {} · <a href=/status.json>status</a> \
         <a href=/regions.json>regions</a> <a href=/incidents.json>incidents</a></footer></html>",
        escape(&status.node),
        escape(&status.build),
        time(status.uptime_ms),
        status.disk_bytes as f64 / 1e6,
        escape(&status.roles.join(", ")),
        cluster.version,
    );
    html
}

/// The sentence that most who look came for.
fn summary(
    html: &mut String,
    regions: &v1::RegionsResponse,
    cluster: &v1::ClusterResponse,
    incidents: &[v1::Incident],
) {
    let away: Vec<&v1::ClusterNode> =
        cluster.nodes.iter().filter(|node| matches!(node.state.as_str(), "down" | "lost")).collect();
    let writes = match &cluster.regions {
        Some(regions) => format!("{} writes, in epoch {}", escape(&regions.primary), regions.epoch),
        None if cluster.version == 0 => "The cluster is not founded yet".into(),
        None => format!("{} nodes, {} shards", cluster.nodes.len(), cluster.shards.len()),
    };
    let recovering = incidents.last().is_some_and(|incident| incident.state == "recovering");
    let (class, says, more) = match &regions.change {
        Some(change) => {
            let waits = if change.waits_for.is_empty() { &change.cause } else { &change.waits_for };
            let (from, to) = (escape(&change.from), escape(&change.to));
            ("bad", format!("The primary goes from {from} to {to}: {}", escape(&change.step)), escape(waits))
        }
        None if cluster.version == 0 => ("warn", writes, String::new()),
        None if !away.is_empty() => {
            let names: Vec<String> = away.iter().map(|node| node.id.to_string()).collect();
            let more = format!(
                "{} of {} nodes do not answer: {}",
                away.len(),
                cluster.nodes.len(),
                names.join(", ")
            );
            ("warn", writes, more)
        }
        None if recovering => ("warn", writes, "Not every shard has all its replicas again.".into()),
        None => ("ok", writes, "All nodes answer.".into()),
    };
    let _ = write!(html, "<div class='says {class}'>{says}<p>{more}");
    let old =
        regions.heard_ms.is_none_or(|ms| ms > OLD_AFTER_MS) || regions.told_version > regions.map_version;
    if old {
        let heard = regions.heard_ms.map_or("since it started".into(), |ms| format!("for {}", time(ms)));
        let _ = write!(
            html,
            "<p class=warn>This may be old: this node has not heard of the newest cluster map {heard}."
        );
    }
    html.push_str("</div>");
}

fn regions_of(
    html: &mut String,
    regions: &v1::RegionsResponse,
    cluster: &v1::ClusterResponse,
    lags: &BTreeMap<ShardId, u64>,
    warned_ms: u64,
) {
    let row = |region: &v1::RegionPlace| {
        let there: Vec<&v1::ClusterNode> =
            cluster.nodes.iter().filter(|node| node.region == region.name).collect();
        let up = there.iter().filter(|node| matches!(node.state.as_str(), "member" | "draining")).count();
        let class = if up == there.len() {
            "ok"
        } else if up == 0 {
            "bad"
        } else {
            "warn"
        };
        let lag = match region.role.as_str() {
            "follower" => lag(lags.values().max().copied(), warned_ms),
            _ => String::new(),
        };
        let role = match region.role.as_str() {
            "primary" => format!("<b>primary</b> <small>epoch {}</small>", regions.epoch),
            other => escape(other),
        };
        vec![escape(&region.name), role, format!("<span class={class}>{up} of {}</span>", there.len()), lag]
    };
    let rows: Vec<Vec<String>> = regions.regions.iter().map(row).collect();
    table(html, "Regions", &["region", "role", "nodes up", "lag"], &rows);
    html.push_str(
        "<p class=dim>Lag: the age of the oldest write that is not on the disks of a majority there. A write that must be durable in both regions waits for as long.",
    );
}

fn lag(ms: Option<u64>, warned_ms: u64) -> String {
    match ms {
        None => "<span class=warn>unknown</span>".into(),
        Some(ms) => {
            let class = if ms >= warned_ms { "bad" } else { "ok" };
            format!("<span class={class}>{}</span>", time(ms))
        }
    }
}

fn shards(
    html: &mut String,
    cluster: &v1::ClusterResponse,
    status: &v1::StatusResponse,
    lags: &BTreeMap<ShardId, u64>,
    warned_ms: u64,
) {
    let numbers = |nodes: Vec<u64>| nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
    let row = |shard: &v1::ClusterShard| {
        let here = status.shards.iter().find(|here| here.shard == shard.shard);
        let follow: Vec<String> = shard
            .learners
            .iter()
            .map(|learner| match learner.state.as_str() {
                "serving" => learner.node.to_string(),
                other => format!("{} {}", learner.node, state(other)),
            })
            .collect();
        let (memories, leader, views) = match here {
            Some(here) => {
                let leader = if here.leader.is_empty() { state("none") } else { escape(&here.leader) };
                let views = here.views.iter().map(|v| format!("{} {}", escape(&v.view), v.published_index));
                let pinned = match here.pinned.is_empty() {
                    true => String::new(),
                    false => format!("<br><small>pinned: {}</small>", escape(&here.pinned.join(", "))),
                };
                let views = format!(
                    "{} <small>({})</small>{pinned}",
                    here.last_index,
                    views.collect::<Vec<_>>().join(", ")
                );
                (format!("{}<br><small>{} vectors</small>", here.memories, here.vectors), leader, views)
            }
            None => Default::default(),
        };
        let mut row = vec![shard.shard.to_string()];
        if cluster.regions.is_some() {
            row.extend([shard.epoch.to_string(), lag(lags.get(&shard.shard).copied(), warned_ms)]);
        }
        row.extend([memories, numbers(shard.members.clone()), follow.join(" "), leader, views]);
        row
    };
    let rows: Vec<Vec<String>> = cluster.shards.iter().map(row).collect();
    let mut heads = vec!["shard"];
    if cluster.regions.is_some() {
        heads.extend(["epoch", "lag"]);
    }
    heads.extend(["memories", "voters", "followers", "leader", "ledger here"]);
    table(html, "Shards", &heads, &rows);
    if let Some(resize) = &cluster.resize {
        let _ = write!(
            html,
            "<p>On the way to {} shards: {} of {} slots moved.",
            resize.shards, resize.slots_moved, resize.slots_to_move
        );
    }
}

fn nodes(html: &mut String, cluster: &v1::ClusterResponse, regions: &v1::RegionsResponse) {
    let row = |node: &v1::ClusterNode| {
        let mut gateways = regions.regions.iter().flat_map(|region| &region.gateways);
        let address = match gateways.find(|gateway| gateway.node == node.id) {
            Some(gateway) if gateway.address != node.address => {
                format!("{}<br><small>callers: {}</small>", escape(&node.address), escape(&gateway.address))
            }
            Some(_) => escape(&node.address),
            None => format!("{}<br><small>no gateway</small>", escape(&node.address)),
        };
        let mut row = vec![node.id.to_string(), state(&node.state), address];
        row.extend(cluster.regions.as_ref().map(|_| escape(&node.region)));
        row.extend([node.shards.len().to_string(), escape(&node.roles.join(", "))]);
        row
    };
    let rows: Vec<Vec<String>> = cluster.nodes.iter().map(row).collect();
    let mut heads = vec!["node", "state", "address"];
    heads.extend(cluster.regions.as_ref().map(|_| "region"));
    heads.extend(["replicas", "roles"]);
    table(html, "Nodes", &heads, &rows);
}

fn caches(html: &mut String, cluster: &v1::ClusterResponse, status: &v1::StatusResponse) {
    let caching: Vec<&v1::ClusterNode> =
        cluster.nodes.iter().filter(|node| node.roles.iter().any(|role| role == "cache")).collect();
    if caching.is_empty() && status.cache.is_none() {
        return;
    }
    html.push_str("<h2>Caches</h2><section>");
    if let Some(cache) = &status.cache {
        let share = (cache.hits * 100).checked_div(cache.hits + cache.misses);
        let share = share.map_or("never asked".into(), |share| format!("{share}% hits"));
        let _ = write!(
            html,
            "<p>Here: {} memories, {:.1} MB, {} hits and {} misses since the start ({share}).",
            cache.memories,
            cache.bytes as f64 / 1e6,
            cache.hits,
            cache.misses
        );
    }
    for node in caching {
        let _ = write!(html, "<p>node {} at {}: {}", node.id, escape(&node.address), state(&node.state));
    }
    html.push_str("</section>");
}

fn incident(html: &mut String, incident: &v1::Incident, open: bool) {
    let shown = if open { " open" } else { "" };
    let _ = write!(
        html,
        "<section><details{shown}><summary>{} · {} <small>{}</small></summary><p>{}<ul>",
        state(&incident.state),
        escape(&headline(incident)),
        format_time(incident.silent_since),
        escape(&incident.cause)
    );
    if !incident.waits_for.is_empty() {
        let _ = write!(html, "<li class=warn>waits: {}", escape(&incident.waits_for));
    }
    for told in figures(incident) {
        let _ = write!(html, "<li>{}", escape(&told));
    }
    html.push_str("</ul><table>");
    let steps = incident.steps.iter().map(|step| (step.at_ms, step.step.as_str()));
    let noted = [(incident.accounted_at, "the loss is known"), (incident.closed_at, "closed")];
    let noted = noted.into_iter().filter_map(|(at, what)| Some((at?, what)));
    let mut all: Vec<(i64, &str)> =
        std::iter::once((incident.silent_since, "silent, or ordered")).chain(steps).chain(noted).collect();
    all.sort_by_key(|(at, _)| *at);
    for (at, what) in all {
        let after = time(u64::try_from(at - incident.silent_since).unwrap_or(0));
        let _ = write!(html, "<tr><td>{what}<td>+{after}<td>{}</tr>", format_time(at));
    }
    html.push_str("</table></details></section>");
}

fn groups(html: &mut String, members: &[v1::Member]) {
    let _ = write!(
        html,
        "<h2>Groups of this node</h2><section><details><summary>{} replicas in all</summary><table><tr><th>group<th>node<th>address<th>role</tr>",
        members.len()
    );
    for member in members {
        let leads = if member.leader { ", leads" } else { "" };
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td>{}<td>{}{leads}</tr>",
            escape(&member.group),
            escape(&member.node),
            escape(&member.address),
            escape(&member.role)
        );
    }
    html.push_str("</table></details></section>");
}
