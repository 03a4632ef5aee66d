//! A run as one page that stands alone: lanes over time, to be scrubbed, zoomed, filtered and searched in any browser.
//!
//! Everything that it shows is in it as JSON; times are virtual seconds, nodes are numbers into `nodes`.

use super::run::Run;
use super::runner::Job;
use crate::history::{Op, Response};
use crate::promises::describe;
use crate::report::Fired;
use serde::Serialize;
use sim::trace::Level;
use sim::world::What;
use std::collections::BTreeMap;

const PAGE: &str = include_str!("page.html");
/// Text of one operation at most.
const TEXT_MAX: usize = 1500;

#[derive(Serialize)]
struct Page {
    title: String,
    meta: String,
    verdict: String,
    end: f64,
    nodes: Vec<String>,
    faults: Vec<Fault>,
    /// Who led when.
    leads: Vec<Lead>,
    /// Whose process was not there when.
    down: Vec<Down>,
    gauges: Vec<Gauge>,
    ops: Vec<Shown>,
    /// (sent, from, to, method, arrives or -1)
    messages: Vec<(f64, usize, usize, String, f64)>,
    /// (time, node, level, text)
    lines: Vec<(f64, usize, &'static str, String)>,
    violations: Vec<Broken>,
    parted: Option<Parted>,
}

#[derive(Serialize)]
struct Fault {
    at: f64,
    to: f64,
    kind: String,
    nodes: Vec<usize>,
    disk: bool,
    text: String,
}

#[derive(Serialize)]
struct Lead {
    node: usize,
    from: f64,
    to: f64,
    term: u64,
}

#[derive(Serialize)]
struct Down {
    node: usize,
    from: f64,
    to: f64,
}

#[derive(Serialize)]
struct Gauge {
    node: usize,
    name: &'static str,
    points: Vec<(f64, u64)>,
}

#[derive(Serialize)]
struct Shown {
    node: usize,
    from: f64,
    to: f64,
    kind: &'static str,
    short: String,
    text: String,
}

#[derive(Serialize)]
struct Broken {
    promise: String,
    at: f64,
    what: String,
    /// The operations that prove it.
    ops: Vec<usize>,
}

/// Where this run and another part.
#[derive(Serialize)]
pub struct Parted {
    pub at: f64,
    pub text: String,
}

/// The page of a run of which all events were kept.
pub fn page(run: &Run, job: &Job, parted: Option<Parted>) -> Result<String, serde_json::Error> {
    let report = &run.report;
    let nodes: BTreeMap<&str, usize> = run.nodes.iter().enumerate().map(|(i, n)| (n.as_str(), i)).collect();
    let faults = |fired: &[Fired], disk: bool| -> Vec<Fault> {
        fired.iter().filter(|f| f.fired).map(|f| fault(f, disk, &nodes)).collect()
    };
    let mut all = faults(&report.faults, false);
    all.extend(faults(&report.disk_faults, true));
    let described: Vec<String> = run.history.ops.iter().map(describe).collect();
    let prove = |what: &str| (0..described.len()).filter(|op| what.contains(&described[*op])).collect();
    let broken = report.violations.iter().map(|violation| Broken {
        promise: violation.promise.clone(),
        at: violation.at_s.min(report.virtual_s),
        what: violation.what.clone(),
        ops: prove(&violation.what),
    });
    let mutant = job.mutant.as_ref().map_or(String::new(), |m| format!(" with the planted bug {m}"));
    let page = Page {
        title: format!("{} · seed {}{mutant}", job.scenario, job.seed),
        meta: format!(
            "{} writes acknowledged, {} lost · {:.1} virtual seconds · trace {} · build {} · {}",
            report.acked,
            report.lost,
            report.virtual_s,
            report.trace_hash,
            report.build,
            job.command("replay"),
        ),
        verdict: format!("{:?}", report.verdict).to_lowercase(),
        end: report.virtual_s,
        faults: all,
        violations: broken.collect(),
        ops: run
            .history
            .ops
            .iter()
            .zip(&described)
            .filter_map(|(op, text)| shown(op, text, &nodes))
            .collect(),
        parted,
        ..events(run)
    };
    // The data stand in a script element, which only a closing tag could end.
    let data = serde_json::to_string(&page)?.replace("</", "<\\/");
    Ok(PAGE.replacen("/*DATA*/", &data, 1))
}

fn fault(fired: &Fired, disk: bool, nodes: &BTreeMap<&str, usize>) -> Fault {
    let (at, to) = (fired.fault.at_ms as f64 / 1e3, (fired.fault.at_ms + fired.fault.lasts_ms) as f64 / 1e3);
    let kind = crate::spec::words(fired.fault.kind);
    let text = format!("{kind} on {} from {at:.3} to {to:.3} s", fired.node);
    let nodes = fired.node.split('+').filter_map(|name| nodes.get(name).copied()).collect();
    Fault { at, to, kind, nodes, disk, text }
}

fn shown(op: &Op, text: &str, nodes: &BTreeMap<&str, usize>) -> Option<Shown> {
    let kind = match &op.response {
        Response::Unknown => "unknown",
        Response::Refused(_) => "refused",
        Response::Written { .. } | Response::Linked | Response::Changed { .. } => "acked",
        _ => "read",
    };
    let request = op.request.to_string();
    let short = request.split(['(', ',']).next().unwrap_or_default().trim().to_string();
    Some(Shown {
        node: *nodes.get(format!("client{}", op.client).as_str())?,
        from: op.call_ns as f64 / 1e9,
        to: op.return_ns as f64 / 1e9,
        kind,
        short,
        text: text.chars().take(TEXT_MAX).collect(),
    })
}

/// What the events tell: lines, messages, figures, and who led or was down when.
fn events(run: &Run) -> Page {
    let end = run.report.virtual_s;
    let (mut lines, mut messages, mut leads, mut down) = (vec![], vec![], vec![], vec![]);
    let mut gauges: BTreeMap<(usize, &'static str), Vec<(f64, u64)>> = BTreeMap::new();
    let (mut leading, mut away): (BTreeMap<usize, (f64, u64)>, BTreeMap<usize, f64>) = Default::default();
    for event in &run.events {
        let (at, node) = (event.at_ns as f64 / 1e9, event.node);
        match &event.what {
            What::Line { level, text } => {
                let gone = ["power lost", "process killed"].iter().any(|words| text.starts_with(words))
                    || text.starts_with("the process ends");
                if gone {
                    away.entry(node).or_insert(at);
                    leads.extend(leading.remove(&node).map(|(from, term)| Lead { node, from, to: at, term }));
                }
                if ["power on", "process started"].contains(&text.as_str())
                    && let Some(from) = away.remove(&node)
                {
                    down.push(Down { node, from, to: at });
                }
                let level = match level {
                    Level::Error => "error",
                    Level::Warn => "warn",
                    Level::Info => "info",
                    Level::Debug => "debug",
                };
                lines.push((at, node, level, text.clone()));
            }
            What::Message { to, method, answer, arrives_ns, .. } => {
                let name = method.rsplit('/').next().unwrap_or(method);
                let name = if *answer { format!("answer to {name}") } else { name.to_string() };
                messages.push((at, node, *to, name, arrives_ns.map_or(-1.0, |ns| ns as f64 / 1e9)));
            }
            What::Gauge { name, value } => {
                gauges.entry((node, name)).or_default().push((at, *value));
                if *name == "leads" {
                    leads.extend(leading.remove(&node).map(|(from, term)| Lead { node, from, to: at, term }));
                    if *value > 0 {
                        leading.insert(node, (at, *value));
                    }
                }
            }
            What::Disk { .. } => {}
        }
    }
    leads.extend(leading.into_iter().map(|(node, (from, term))| Lead { node, from, to: end, term }));
    down.extend(away.into_iter().map(|(node, from)| Down { node, from, to: end }));
    let gauges = gauges.into_iter().filter(|((_, name), _)| *name != "leads");
    let gauges = gauges.map(|((node, name), points)| Gauge { node, name, points }).collect();
    let (title, meta, verdict, faults, ops, violations, parted) = Default::default();
    let nodes = run.nodes.clone();
    Page {
        title,
        meta,
        verdict,
        end,
        nodes,
        faults,
        leads,
        down,
        gauges,
        ops,
        messages,
        lines,
        violations,
        parted,
    }
}
