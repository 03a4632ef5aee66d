//! A run as one page that stands alone: lanes over time, to be scrubbed, zoomed, filtered and searched in any browser.
//!
//! Everything that it shows is in it as JSON; times are virtual seconds, nodes are numbers into `nodes`.

use super::run::Run;
use super::runner::Job;
use crate::history::{Id, Op, Refusal, Request, Response, Row, number};
use crate::promises::{Violation, describe};
use crate::report::Fired;
use serde::Serialize;
use sim::trace::Level;
use sim::world::What;
use std::collections::{BTreeMap, BTreeSet};

const PAGE: &str = include_str!("page.html");
/// Text of one operation at most.
const TEXT_MAX: usize = 1500;

#[derive(Serialize)]
struct Page {
    title: String,
    meta: String,
    /// What a person types to see this run again.
    command: String,
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
    /// Who answered.
    on: Option<usize>,
    from: f64,
    to: f64,
    kind: &'static str,
    label: String,
    text: String,
}

#[derive(Serialize)]
struct Broken {
    promise: String,
    /// What that is, in words.
    means: &'static str,
    at: f64,
    what: String,
    /// The operations that prove it, first the one that should not have been.
    ops: Vec<usize>,
    /// The memories that they are about, and all that was written of these.
    memories: String,
    story: Vec<usize>,
    /// The nodes that are named in it.
    nodes: Vec<usize>,
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
    let broken = report.violations.iter().map(|violation| broken(run, violation, &described, &nodes));
    let mutant = job.mutant.as_ref().map_or(String::new(), |m| format!(" with the planted bug {m}"));
    let page = Page {
        title: format!("{} · seed {}{mutant}", job.scenario, job.seed),
        meta: format!(
            "{} writes acknowledged, {} lost · {:.1} virtual seconds · trace {} · build {}",
            report.acked, report.lost, report.virtual_s, report.trace_hash, report.build,
        ),
        command: job.command("replay"),
        verdict: format!("{:?}", report.verdict).to_lowercase(),
        end: report.virtual_s,
        faults: all,
        violations: broken.collect(),
        ops: run.history.ops.iter().zip(&described).map(|(op, text)| shown(op, text, &nodes)).collect(),
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

/// A broken promise with its story: what its proofs are about, and what was written of that.
fn broken(run: &Run, violation: &Violation, described: &[String], nodes: &BTreeMap<&str, usize>) -> Broken {
    let (what, ops) = (violation.what.as_str(), &run.history.ops);
    let mut proofs: Vec<(usize, usize)> =
        described.iter().enumerate().filter_map(|(op, text)| Some((what.find(text.as_str())?, op))).collect();
    proofs.sort_unstable();
    let proofs: Vec<usize> = proofs.into_iter().map(|(_, op)| op).collect();
    let about: BTreeSet<(usize, &Id)> = proofs.iter().flat_map(|&op| memories(&ops[op], what)).collect();
    let written = |op: &Op| {
        let done = matches!(op.response, Response::Written { .. } | Response::Linked | Response::Unknown);
        let ids = [op.request.id(), ends(&op.request).0, ends(&op.request).1];
        done && ids.into_iter().flatten().any(|id| about.contains(&(op.tenant, id)))
    };
    let story = (0..ops.len()).filter(|&op| proofs.contains(&op) || written(&ops[op]));
    let numbers: Vec<String> = about.iter().map(|(_, id)| number(id)).collect();
    let named = what.split(|c: char| !c.is_alphanumeric()).filter_map(|word| nodes.get(word).copied());
    Broken {
        promise: violation.promise.clone(),
        means: means(&violation.promise),
        at: violation.at_s.min(run.report.virtual_s),
        what: violation.what.clone(),
        story: if proofs.is_empty() { vec![] } else { story.collect() },
        memories: match &numbers[..] {
            [] => "the proof".into(),
            [one] => format!("memory {one}"),
            all => format!("memories {}", all.join(", ")),
        },
        nodes: named.collect::<BTreeSet<usize>>().into_iter().collect(),
        ops: proofs,
    }
}

/// The memories that a proof is about, with their tenants: the one that it names, or those of its answer that the violation names.
fn memories<'a>(op: &'a Op, what: &str) -> Vec<(usize, &'a Id)> {
    let (from, to) = ends(&op.request);
    let mut found: Vec<(usize, &Id)> =
        [op.request.id(), from, to].into_iter().flatten().map(|id| (op.tenant, id)).collect();
    let (mut rows, mut edges): (&[Row], &[(Id, Id)]) = (&[], &[]);
    match &op.response {
        Response::Walked { rows: walked, edges: along } => (rows, edges) = (walked, along),
        Response::Rows(all) => rows = all,
        _ => {}
    }
    let named = |from: &Id, to: &Id| what.contains(&format!("from {} to {} ", number(from), number(to)));
    let edges = edges.iter().filter(|(from, to)| named(from, to)).flat_map(|(from, to)| [from, to]);
    found.extend(edges.map(|id| (op.tenant, id)));
    // The text of a memory says whose it is, whoever was shown it.
    let rows = rows.iter().filter(|row| what.contains(&row.to_string()));
    found.extend(rows.map(|row| (row.tenant, &row.id)));
    found
}

/// The ends of the edge that is set.
fn ends(request: &Request) -> (Option<&Id>, Option<&Id>) {
    match request {
        Request::Link { from, to } => (Some(from), Some(to)),
        _ => (None, None),
    }
}

/// What it is that a broken promise lets happen.
fn means(promise: &str) -> &'static str {
    match promise {
        "P1" => "An acknowledged write is gone.",
        "P3" => "Two acknowledged writes hold one place in the ledger.",
        "P4" => "An answer shows what cannot be: too old, or out of order.",
        "P5" => "Replicas at one position hold different states.",
        "P6" => "What was deleted came back.",
        "P7" => "An answer shows another tenant's data.",
        "P10" => "One request was applied twice.",
        "P12" => "The replicas did not come to agree in time.",
        _ => "",
    }
}

fn shown(op: &Op, text: &str, nodes: &BTreeMap<&str, usize>) -> Shown {
    let kind = match &op.response {
        Response::Unknown => "unknown",
        Response::Refused(_) => "refused",
        Response::Written { .. } | Response::Linked | Response::Changed { .. } => "acked",
        _ => "read",
    };
    Shown {
        node: nodes.get(format!("client{}", op.client).as_str()).copied().unwrap_or(0),
        on: nodes.get(op.node.as_str()).copied(),
        from: op.call_ns as f64 / 1e9,
        to: op.return_ns as f64 / 1e9,
        kind,
        label: label(op),
        text: text.chars().take(TEXT_MAX).collect(),
    }
}

/// An operation in three or four words.
fn label(op: &Op) -> String {
    let request = op.request.to_string();
    let asked = request.split(['(', ',']).next().unwrap_or_default();
    let asked = asked.split(" expecting").next().unwrap_or_default();
    let asked = asked.split(" at ").next().unwrap_or_default().trim();
    let answer = match &op.response {
        Response::Written { version, .. } => format!("v{version}"),
        Response::Linked => "set".into(),
        Response::Changed { .. } => "another answer".into(),
        Response::Refused(Refusal::NotFound) => "refused: not there".into(),
        Response::Refused(Refusal::AlreadyExists { version }) => format!("refused: is v{version}"),
        Response::Refused(Refusal::VersionMismatch { actual }) => format!("refused: is v{actual}"),
        Response::Unknown => "unknown".into(),
        Response::Value { row, .. } => format!("v{}", row.version),
        Response::Absent { .. } => "not found".into(),
        Response::Rows(rows) => format!("{} found", rows.len()),
        Response::Erased { .. } => "erased".into(),
        Response::Lost => "may be lost with its region".into(),
        Response::Walked { rows, edges } => format!("{} memories, {} edges", rows.len(), edges.len()),
    };
    format!("{asked} → {answer}")
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
                let gone = ["power lost", "process killed", "process ended", "its machine is gone"]
                    .iter()
                    .any(|words| text.starts_with(words))
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
    let (title, meta, command, verdict, faults, ops, violations, parted) = Default::default();
    let nodes = run.nodes.clone();
    Page {
        title,
        meta,
        command,
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
