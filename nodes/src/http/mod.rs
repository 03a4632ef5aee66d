//! The status page: what a person wants to see of a node and its cluster in a browser, and the same as JSON for a script.

mod json;
mod page;

pub use json::{incident as incident_json, regions as regions_json, status as json};

use crate::gateway::About;
use crate::proto::v1;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sim::net::Routes;
use std::sync::Arc;

/// `/` for people; `/status.json`, `/regions.json` and `/incidents.json` for programs, `/healthz` for load balancers. Holds no memory's content, though names of
/// pinned tenants, and asks for no key: bind it to addresses that may see it.
pub fn routes(about: Arc<About>) -> Routes {
    let (page_of, status_of, regions_of) = (about.clone(), about.clone(), about.clone());
    let page = move || async move {
        match page_of.status(false).await {
            Ok(status) => {
                let lags = page_of.lags().await;
                let html = page::page(&page_of, &page_of.control.map(), &status, &lags);
                (StatusCode::OK, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response()
            }
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
        }
    };
    let status = move || async move {
        match status_of.status(false).await {
            Ok(status) => answer(json(&status)),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
        }
    };
    let regions = move || async move { answer(regions_json(&regions_of.regions())) };
    let incidents = move || async move {
        let map = about.control.map();
        let incidents: Vec<_> = about.incidents(&map).iter().map(incident_json).collect();
        answer(
            serde_json::json!({ "epoch": map.epoch(), "map_version": map.version, "incidents": incidents }),
        )
    };
    let router = Router::new()
        .route("/", get(page))
        .route("/status.json", get(status))
        .route("/regions.json", get(regions))
        .route("/incidents.json", get(incidents))
        .route("/healthz", get(|| async { "ok\n" }));
    Routes::from(router)
}

fn answer(value: serde_json::Value) -> Response {
    // An answer that was kept somewhere on the way would be older than it says.
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (StatusCode::OK, headers, value.to_string()).into_response()
}

/// An incident in a line.
pub fn headline(incident: &v1::Incident) -> String {
    let step = incident.steps.last().map_or("", |step| step.step.as_str());
    let what = match incident.planned {
        true => "planned change",
        false if incident.from == incident.to => return format!("recovery of {}: {step}", incident.to),
        false => "failover",
    };
    format!("{what} from {} to {}: {step}", incident.from, incident.to)
}

/// A length of time as people say it.
fn time(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{:.1} s", ms as f64 / 1e3),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

/// What an incident cost, as far as it is known.
pub fn figures(incident: &v1::Incident) -> Vec<String> {
    if incident.steps.last().is_some_and(|step| step.step == "withdrawn") {
        return vec![format!("withdrawn: {} went on, nothing was lost", incident.from)];
    }
    let mut told = vec![match incident.rto_ms {
        Some(ms) => format!("RTO: writes were possible again after {}, verified", time(ms)),
        None => "RTO: writes are not verified yet".into(),
    }];
    told.push(match (incident.accounted, incident.losses.is_empty(), incident.commands_lost) {
        (true, _, 0) => "RPO: nothing was lost".into(),
        (true, _, lost) => {
            let within =
                incident.lost_within_ms.map_or(String::new(), |ms| format!(", written within {}", time(ms)));
            format!("RPO: {lost} commands were lost{within}, and are in quarantine")
        }
        (false, true, _) => "RPO: not known before the shards are promoted".into(),
        (false, false, lost) => format!(
            "RPO: unresolved: {}, until the old disks are read{}",
            match incident.losses.iter().any(|loss| loss.to == u64::MAX) {
                true => "without a bound, since the control group was lost too".into(),
                false => format!("at most {} entries", incident.entries_at_most),
            },
            if lost > 0 { format!("; {lost} commands for certain") } else { String::new() }
        ),
    });
    told.push(match incident.mttr_ms {
        Some(ms) => format!("MTTR: every shard had all its replicas again after {}", time(ms)),
        None => "MTTR: not every shard has all its replicas yet".into(),
    });
    for loss in incident.losses.iter().filter(|loss| loss.to > loss.after) {
        let entries = format!("entries {} to {} of epoch {}", loss.after + 1, loss.to, loss.epoch);
        told.push(match loss.resolved {
            true => format!(
                "shard {}: {} commands in {entries} are in the quarantine of node {}",
                loss.shard, loss.commands, loss.quarantine
            ),
            false if loss.to == u64::MAX => {
                format!(
                    "shard {}: at most what came after entry {} of epoch {}",
                    loss.shard, loss.after, loss.epoch
                )
            }
            false => format!("shard {}: at most what was in {entries}", loss.shard),
        });
    }
    told
}
