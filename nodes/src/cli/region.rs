//! `loci region …`: which region writes, how far the other one is, and making another one the primary. What takes long goes on in the cluster, also when
//! this program is gone.

use super::client::{Client, To};
use super::cluster::{change, status};
use super::time::format_time;
use super::{Done, Failure};
use clap::Subcommand;
use futures::future::join_all;
use nodes::gateway::director::newest;
use nodes::http;
use nodes::proto::v1::director_service_client::DirectorServiceClient;
use nodes::proto::v1::{self, change_cluster_request::Change};
use serde_json::json;
use sim::time::{Duration, sleep, timeout};
use std::collections::BTreeMap;

/// How long each address may take to say which region writes.
const DIRECTOR_WITHIN: Duration = Duration::from_secs(3);

#[derive(Subcommand)]
pub enum Region {
    /// Which region writes, a change that is under way, those before, and what each lost.
    Status,
    /// Which region to talk to, and where its gateways are, by the newest map that one of the addresses knows. Needs no key.
    Where,
    /// Every change of the primary as an account: its steps, how long writes paused, what was lost, when redundancy was back.
    Incidents,
    /// Gives the primary up, reachable or not: another region goes on with what it has. Waits for the end.
    Failover {
        #[arg(long)]
        to: String,
        /// Goes on with fewer replicas there than are needed to be sure of what is durable in the region.
        #[arg(long)]
        accept_data_loss: bool,
        /// Says what would be lost at most, and changes nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Makes another region the primary, without loss: both are well; writes pause for about the length of a lease. Waits for the end.
    Failback {
        #[arg(long)]
        to: String,
    },
    /// Writes again what was lost with a region and came back with its disks, where nobody has written since. May be repeated.
    Resubmit {
        /// Says what is there and what would become of it, and changes nothing.
        #[arg(long)]
        dry_run: bool,
        /// Edges too: whatever was done to them since is undone.
        #[arg(long)]
        edges: bool,
        /// Only what was lost with this epoch.
        #[arg(long, default_value_t = 0)]
        epoch: u64,
    },
}

pub async fn run(to: &To, what: Region) -> Done {
    if matches!(what, Region::Where) {
        return whither(to).await;
    }
    let client = to.connect()?;
    match what {
        // It needs no key.
        Region::Where => Ok(()),
        Region::Status => show(to, &client, &status(&client).await?).await,
        Region::Incidents => incidents(to, &client).await,
        Region::Failover { to: region, dry_run: true, .. } => {
            let cluster = status(&client).await?;
            let regions = regions_of(&cluster)?;
            if regions.primary == region {
                println!("{region} is the primary already");
                return Ok(());
            }
            let lag = lag(&client).await?;
            let lag = lag.map_or("unknown: this node leads no shard".into(), |ms| format!("{ms} ms"));
            println!(
                "{} would be given up for {region}. What {region} lacks, as this node knows: {lag}",
                regions.primary
            );
            Ok(())
        }
        Region::Failover { to: region, accept_data_loss, .. } => {
            wish(to, &client, v1::RegionWish { to: region, planned: false, accept_data_loss }).await
        }
        Region::Failback { to: region } => {
            wish(to, &client, v1::RegionWish { to: region, planned: true, accept_data_loss: false }).await
        }
        Region::Resubmit { dry_run, edges, epoch } => {
            resubmit(to, &client, v1::ResubmitRequest { dry_run, edges, epoch }).await
        }
    }
}

/// One line for each command, and then how many became what.
async fn resubmit(to: &To, client: &Client, ask: v1::ResubmitRequest) -> Done {
    let dry_run = ask.dry_run;
    let answer = client.admin().resubmit(client.request(ask)).await;
    let mut feed = answer.map_err(|s| client.explain(s))?.into_inner();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    while let Some(told) = feed.message().await.map_err(|s| client.explain(s))? {
        let verdict = match (told.verdict(), dry_run) {
            (v1::ResubmitVerdict::Again, true) => "would be written again",
            (v1::ResubmitVerdict::Again, false) => "written again",
            (v1::ResubmitVerdict::Refused, _) => "refused",
            (v1::ResubmitVerdict::Conflict, _) => "conflict",
            _ => "left",
        };
        *counts.entry(verdict).or_default() += 1;
        if to.json {
            println!(
                "{}",
                json!({ "shard": told.shard, "epoch": told.epoch, "index": told.index, "item": told.item, "tenant": told.tenant,
                    "id": told.id, "what": told.what, "verdict": verdict, "why": told.why })
            );
            continue;
        }
        let why = if told.why.is_empty() { String::new() } else { format!(": {}", told.why) };
        println!(
            "shard {:2}  epoch {}  entry {}.{}  {} {} {}  {verdict}{why}",
            told.shard, told.epoch, told.index, told.item, told.tenant, told.what, told.id
        );
    }
    let all: Vec<String> = counts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
    match all.is_empty() {
        true => eprintln!("nothing that was lost with a region has come back"),
        false => eprintln!("{}", all.join(", ")),
    }
    Ok(())
}

async fn wish(to: &To, client: &Client, wish: v1::RegionWish) -> Done {
    let before = change(client, Change::Region(wish.clone())).await?;
    let ended = regions_of(&before)?.past.len();
    wait(to, client, ended).await
}

/// Waits until a region goes on, after a recovery of the control group.
pub(super) async fn wait_for_recovery(to: &To, client: &Client, region: &str) -> Done {
    loop {
        // The map shows the change a moment after the group has a leader again.
        if let Ok(cluster) = status(client).await
            && let Some(change) = &regions_of(&cluster)?.change
            && change.to == region
        {
            return wait(to, client, regions_of(&cluster)?.past.len()).await;
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Waits for the end of the change that is under way; `ended` are over.
async fn wait(to: &To, client: &Client, ended: usize) -> Done {
    let mut told = String::new();
    loop {
        // A node that is asked may be the one that restarts; the next look asks again.
        if let Ok(cluster) = status(client).await {
            let regions = regions_of(&cluster)?;
            let Some(change) = &regions.change else {
                let last = regions.past.get(ended..).and_then(<[_]>::last);
                if last.is_some_and(|change| change.step != "done") {
                    return Err(Failure(format!("the change was withdrawn: {} goes on", regions.primary)));
                }
                return show(to, client, &cluster).await;
            };
            let waits =
                if change.waits_for.is_empty() { String::new() } else { format!(": {}", change.waits_for) };
            let now = format!("{}{waits}", change.step);
            if now != told {
                eprintln!("{now}");
                told = now;
            }
        }
        sleep(Duration::from_millis(500)).await;
    }
}

fn regions_of(cluster: &v1::ClusterResponse) -> Result<&v1::ClusterRegions, Failure> {
    let one = "this cluster has one region; [regions] in the files of its first nodes would have named more";
    cluster.regions.as_ref().ok_or_else(|| Failure(one.into()))
}

/// The greatest lag of the shards that the asked node leads, in milliseconds.
async fn lag(client: &Client) -> Result<Option<u64>, Failure> {
    let answer = client.admin().status(client.request(v1::StatusRequest { with_digest: false })).await;
    let status = answer.map_err(|s| client.explain(s))?.into_inner();
    Ok(status.shards.iter().filter_map(|shard| shard.lag_ms).max())
}

/// What of an ended epoch is lost: exactly, once enough old disks were read; else at most.
fn lost(end: &v1::EpochEnd) -> String {
    let most = end.old_disks.iter().max_by_key(|old| old.last_index);
    match (end.resolved, most) {
        (true, Some(old)) if end.lost_to > end.lost_after => format!(
            "{} commands in entries {} to {}, in the quarantine of node {}",
            old.commands,
            end.lost_after + 1,
            end.lost_to,
            old.node
        ),
        (true, _) => "nothing, by its old replicas' disks".into(),
        (false, _) => format!(
            "unresolved until a majority of its old replicas' disks is read: at most what {}",
            match end.ceiling_index {
                u64::MAX => format!("came after entry {}", end.certain_index),
                ceiling => format!("was between entries {} and {ceiling}", end.certain_index + 1),
            }
        ),
    }
}

async fn show(to: &To, client: &Client, cluster: &v1::ClusterResponse) -> Done {
    let regions = regions_of(cluster)?;
    let lag = lag(client).await?;
    if to.json {
        let change = |c: &v1::RegionChange| {
            let steps: Vec<_> = c.steps.iter().map(|s| json!({ "step": s.step, "at_ms": s.at_ms })).collect();
            json!({ "from": c.from, "to": c.to, "planned": c.planned, "step": c.step, "steps": steps, "cause": c.cause, "epoch": c.epoch,
                "waits_for": c.waits_for })
        };
        let end = |shard: u32, e: &v1::EpochEnd| {
            let old = |o: &v1::OldDisk| json!({ "node": o.node, "kept": o.kept_index, "last": o.last_index, "commands": o.commands });
            json!({ "shard": shard, "epoch": e.epoch, "certain": e.certain_index, "last": e.last_index, "ceiling": e.ceiling_index,
                "resolved": e.resolved, "lost_after": e.lost_after, "lost_to": e.lost_to,
                "old_disks": e.old_disks.iter().map(old).collect::<Vec<_>>() })
        };
        let ends: Vec<_> =
            cluster.shards.iter().flat_map(|s| s.ends.iter().map(|e| end(s.shard, e))).collect();
        println!(
            "{}",
            json!({ "primary": regions.primary, "witness": regions.witness, "epoch": regions.epoch, "lag_ms": lag,
                "change": regions.change.as_ref().map(change), "past": regions.past.iter().map(change).collect::<Vec<_>>(), "ends": ends })
        );
        return Ok(());
    }
    println!("{} writes, in epoch {}", regions.primary, regions.epoch);
    if let Some(lag) = lag {
        println!(
            "the other region lacks what was written in the last {lag} ms, of the shards that this node leads"
        );
    }
    for change in regions.past.iter().chain(&regions.change) {
        let what = match change.planned {
            true => "planned",
            false if change.from == change.to => "recovery",
            false => "failover",
        };
        println!("{what} from {} to {}: {} ({})", change.from, change.to, change.step, change.cause);
        for step in &change.steps {
            println!("    {}  {}", format_time(step.at_ms), step.step);
        }
    }
    for shard in &cluster.shards {
        for end in &shard.ends {
            println!("shard {:2}  lost with epoch {}: {}", shard.shard, end.epoch, lost(end));
        }
    }
    Ok(())
}

async fn incidents(to: &To, client: &Client) -> Done {
    let answer = client.admin().incidents(client.request(v1::IncidentsRequest {})).await;
    let incidents = answer.map_err(|s| client.explain(s))?.into_inner().incidents;
    if to.json {
        incidents.iter().for_each(|incident| println!("{}", http::incident_json(incident)));
        return Ok(());
    }
    if incidents.is_empty() {
        println!("no region was ever changed here");
    }
    for incident in &incidents {
        println!("{}  {}  {}", incident.id, incident.state, http::headline(incident));
        println!("    {}", incident.cause);
        println!("    {}  silent or ordered", format_time(incident.silent_since));
        for step in &incident.steps {
            println!("    {}  {}", format_time(step.at_ms), step.step);
        }
        for (at, what) in [(incident.accounted_at, "the loss is known"), (incident.closed_at, "closed")] {
            if let Some(at) = at {
                println!("    {}  {what}", format_time(at));
            }
        }
        if !incident.waits_for.is_empty() {
            println!("    waits: {}", incident.waits_for);
        }
        for told in http::figures(incident) {
            println!("    {told}");
        }
    }
    Ok(())
}

/// Asks all addresses, since one that is cut off does not know what was decided without it.
async fn whither(to: &To) -> Done {
    let asked = to.gateways()?.into_iter().map(|(addr, channel)| async move {
        let mut client = DirectorServiceClient::new(channel);
        let answer = timeout(DIRECTOR_WITHIN, client.regions(v1::RegionsRequest {})).await;
        match answer {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(format!("{addr}: {}", status.message())),
            Err(_) => Err(format!("{addr}: no answer within {DIRECTOR_WITHIN:?}")),
        }
    });
    let (mut answers, mut problems) = (vec![], vec![]);
    for answer in join_all(asked).await {
        match answer {
            Ok(answer) => answers.push(answer),
            Err(problem) => problems.push(problem),
        }
    }
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    let newest = newest(answers).ok_or_else(|| Failure("none of the addresses answers".into()))?;
    if to.json {
        println!("{}", http::regions_json(&newest));
        return Ok(());
    }
    let heard = newest.heard_ms.map_or("never".into(), |ms| format!("{ms} ms ago"));
    match newest.primary.as_str() {
        "" => println!("this cluster has one region"),
        primary => println!("{primary} writes, in epoch {}", newest.epoch),
    }
    println!(
        "map version {}, by {}, which last heard of the newest {heard}",
        newest.map_version, newest.node
    );
    if let Some(change) = &newest.change {
        println!("from {} to {} it goes: {}", change.from, change.to, change.step);
    }
    for region in &newest.regions {
        let up = if region.up { "up" } else { "down" };
        println!("{:8} {:8} {up}", region.name, region.role);
        for gateway in &region.gateways {
            println!("    {:24} {}", gateway.address, gateway.state);
        }
    }
    Ok(())
}
