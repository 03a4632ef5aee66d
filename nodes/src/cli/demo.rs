//! `loci demo`: three replicas, a year of memories, a leader killed in mid-write, and nothing lost.

use super::client::Client;
use super::import::{parse, send};
use super::{Done, Failure};
use clap::Args;
use indicatif::ProgressBar;
use nodes::auth::Keys;
use nodes::proto::v1;
use serde::Deserialize;
use sim::time::{Duration, Instant, sleep};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const MEMORIES: &str = include_str!("../../demo/memories.jsonl");
const QUESTIONS: &str = include_str!("../../demo/questions.jsonl");
const WRITERS: usize = 8;
const START_LIMIT: Duration = Duration::from_secs(20);

#[derive(Args)]
pub struct Demo {
    /// Ends when the show is over; else it stays up until Ctrl-C.
    #[arg(long)]
    exit: bool,
}

#[derive(Deserialize)]
struct Question {
    user: String,
    question: String,
    expect: String,
}

/// A node process; killed when dropped.
struct Process {
    child: Child,
    config: PathBuf,
    addr: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(config: &Path) -> Result<Child, Failure> {
    let log = fs::File::options().create(true).append(true).open(config.with_extension("log"))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("node").arg("--config").arg(config);
    Ok(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?)
}

/// Free ports of this machine.
fn ports(count: usize) -> Result<Vec<u16>, Failure> {
    let taken = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
    taken.iter().map(|l| Ok(l.local_addr()?.port())).collect()
}

/// Three nodes under `dir`, and an operator's key for all of them.
fn start_cluster(dir: &Path) -> Result<(Vec<Process>, String), Failure> {
    let ports = ports(6)?;
    let addr = |i: usize| format!("127.0.0.1:{}", ports[i]);
    let replicas: String = (0..3).map(|i| format!("{} = \"{}\"\n", i + 1, addr(i))).collect();
    let secret = format!("{:016x}{:016x}", sim::rand::u64(), sim::rand::u64());
    let mut keys = Keys::default();
    let key = keys.add("demo", true)?;
    let mut processes = vec![];
    for i in 0..3 {
        let data = dir.join(format!("n{}", i + 1));
        keys.save(&*sim::disk::open(&data.to_string_lossy())?)?;
        let config = dir.join(format!("n{}.toml", i + 1));
        let text = format!(
            "name = \"n{0}\"\nid = {0}\nlisten = \"{1}\"\nhttp = \"{2}\"\ndata = {3:?}\ncluster_secret = \"{secret}\"\n[replicas]\n{replicas}",
            i + 1,
            addr(i),
            addr(i + 3),
            data.to_string_lossy(),
        );
        fs::write(&config, text)?;
        processes.push(Process { child: start(&config)?, config, addr: addr(i) });
    }
    Ok((processes, key))
}

/// The replica that leads, once all of `clients` answer and agree.
async fn leader(clients: &[Client]) -> Result<usize, Failure> {
    let until = Instant::now() + START_LIMIT;
    while Instant::now() < until {
        let mut leads = vec![];
        for client in clients {
            let asked = client.admin().status(client.request(v1::StatusRequest::default())).await;
            leads.push(asked.is_ok_and(|s| s.get_ref().shards.iter().any(|s| s.is_leader)));
        }
        if let Some(at) = leads.iter().position(|l| *l) {
            return Ok(at);
        }
        sleep(Duration::from_millis(50)).await;
    }
    Err(Failure("no leader was elected in time; the nodes' .log files say why".into()))
}

pub async fn run(demo: Demo) -> Done {
    let dir = std::env::temp_dir().join(format!("loci-demo-{:08x}", sim::rand::u64() as u32));
    fs::create_dir_all(&dir)?;
    let shown = show(&dir, demo.exit).await;
    if shown.is_ok() {
        fs::remove_dir_all(&dir)?;
    } else {
        eprintln!("the nodes' data and logs are in {}", dir.display());
    }
    shown
}

fn title(step: usize, text: &str) {
    println!("\n{step}. {text}");
}

async fn show(dir: &Path, exit: bool) -> Done {
    let begun = Instant::now();
    println!("Loci {}: three replicas in {}", nodes::BUILD, dir.display());
    let (mut processes, key) = start_cluster(dir)?;
    let clients = processes.iter().map(|p| Client::new(&p.addr, &key)).collect::<Result<Vec<_>, _>>()?;
    let first = leader(&clients).await?;
    println!("   n{} leads after {:.1?}", first + 1, begun.elapsed());

    title(1, "Import a year of three people's lives");
    let memories = parse(MEMORIES, "demo", "")?;
    let count = memories.len();
    let at = Instant::now();
    let done = send(&clients[first], memories, &ProgressBar::hidden()).await?;
    println!("   {} of {count} memories on the disks of a majority in {:.0?}", done.added, at.elapsed());

    title(2, "Ask");
    let right = ask(&clients[(first + 1) % 3]).await?;
    println!("   {right} of {} answers are the expected ones", QUESTIONS.lines().count());

    title(3, &format!("{WRITERS} clients write; kill -9 n{}, the leader", first + 1));
    let load = Load::start(&clients);
    sleep(Duration::from_millis(1500)).await;
    let before = load.acked.load(Ordering::SeqCst);
    let victim = &mut processes[first];
    victim.child.kill()?;
    victim.child.wait()?;
    let killed = Instant::now();
    let survivors: Vec<Client> =
        clients.iter().enumerate().filter(|(i, _)| *i != first).map(|(_, c)| c.clone()).collect();
    let next = leader(&survivors).await?;
    let next = (0..3).filter(|i| *i != first).nth(next).unwrap_or(0);
    println!(
        "   {before} writes were acknowledged before; n{} leads {:.1?} after the kill",
        next + 1,
        killed.elapsed()
    );
    sleep(Duration::from_millis(1500)).await;
    let (markers, gap) = load.stop().await;
    println!("   {} acknowledged in all; the longest pause between two was {gap:.1?}", markers.len());

    title(4, "Count");
    let lost = missing(&clients[next], &markers).await?;
    println!("   {lost} of {} acknowledged writes are missing", markers.len());
    processes[first].child = start(&processes[first].config)?;
    let back = Instant::now();
    let behind = catch_up(&clients[first], &clients[next]).await?;
    println!("   n{} is back and has caught up to position {behind} in {:.1?}", first + 1, back.elapsed());
    let lost_there = missing(&clients[first], &markers).await?;
    println!("   {lost_there} are missing there");
    println!("\nAll of it took {:.1?}.", begun.elapsed());
    if lost + lost_there > 0 || right * 10 < QUESTIONS.lines().count() * 8 {
        return Err(Failure("the demonstration failed; please report it".into()));
    }
    if exit {
        return Ok(());
    }
    println!("\nIt stays up until Ctrl-C:");
    for process in &processes {
        println!("   gRPC {}", process.addr);
    }
    println!("   loci --addr {} --key {key} search --user maren \"marathon training\"", processes[next].addr);
    sim::task::shutdown_signal().await;
    Ok(())
}

/// Asks the questions that ship with the memories; how many best answers are right.
async fn ask(client: &Client) -> Result<usize, Failure> {
    let mut right = 0;
    for line in QUESTIONS.lines() {
        let question: Question = serde_json::from_str(line)?;
        let at = Instant::now();
        let request = v1::SearchRequest {
            text: question.question.clone(),
            owners: Some(v1::Owners { user: question.user.clone(), ..Default::default() }),
            k: 1,
            options: Some(v1::ReadOptions {
                consistency: v1::Consistency::Strong as i32,
                ..Default::default()
            }),
            ..Default::default()
        };
        let answer =
            client.memories().search(client.request(request)).await.map_err(|s| client.explain(s))?;
        let took = at.elapsed();
        let text = answer.into_inner().hits.pop().and_then(|h| h.memory).map_or(String::new(), |m| m.text);
        let good = text.contains(&question.expect);
        right += good as usize;
        println!("   {} {}: {}", if good { "+" } else { "-" }, question.user, question.question);
        println!("       {text}  ({took:.1?})");
    }
    Ok(right)
}

/// Clients that write until told to stop, each write retried with its key until it is certain.
struct Load {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    done: Arc<Mutex<Vec<(Instant, String)>>>,
    tasks: Vec<sim::task::JoinHandle<()>>,
}

impl Load {
    fn start(clients: &[Client]) -> Load {
        let (stop, acked) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let done: Arc<Mutex<Vec<(Instant, String)>>> = Arc::default();
        let tasks = (0..WRITERS)
            .map(|writer| {
                let (stop, acked, done, clients) =
                    (stop.clone(), acked.clone(), done.clone(), clients.to_vec());
                sim::task::spawn(async move {
                    let mut at = writer;
                    for number in 0.. {
                        if stop.load(Ordering::SeqCst) {
                            return;
                        }
                        let marker = format!("writer {writer} note {number}");
                        while !add(&clients[at % clients.len()], &marker).await {
                            at += 1;
                            sleep(Duration::from_millis(20)).await;
                        }
                        acked.fetch_add(1, Ordering::SeqCst);
                        done.lock().unwrap_or_else(|p| p.into_inner()).push((Instant::now(), marker));
                    }
                })
            })
            .collect();
        Load { stop, acked, done, tasks }
    }

    /// The acknowledged writes, and the longest time between two of them.
    async fn stop(self) -> (Vec<String>, Duration) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            let _ = task.await;
        }
        let mut done = std::mem::take(&mut *self.done.lock().unwrap_or_else(|p| p.into_inner()));
        done.sort();
        let gap = done.windows(2).map(|w| w[1].0 - w[0].0).max().unwrap_or_default();
        (done.into_iter().map(|(_, marker)| marker).collect(), gap)
    }
}

async fn add(client: &Client, marker: &str) -> bool {
    let memory = v1::NewMemory { user: "load".into(), text: marker.into(), ..Default::default() };
    let options = Some(v1::WriteOptions { idempotency_key: marker.into(), durability: 0 });
    let mut request = client.request(v1::AddRequest { memory: Some(memory), options });
    request.set_timeout(Duration::from_secs(2));
    client.memories().add(request).await.is_ok()
}

/// How many of the markers a replica does not hold, by a strong read.
async fn missing(client: &Client, markers: &[String]) -> Result<usize, Failure> {
    let owners = Some(v1::Owners {
        user: "load".into(),
        exclude_shared: true,
        exclude_global: true,
        ..Default::default()
    });
    let request = client.request(v1::ListRequest { owners, ..Default::default() });
    let mut pages = client.memories().list(request).await.map_err(|s| client.explain(s))?.into_inner();
    let mut held = std::collections::BTreeMap::<String, usize>::new();
    while let Some(page) = pages.message().await.map_err(|s| client.explain(s))? {
        page.memories.into_iter().for_each(|m| *held.entry(m.text).or_default() += 1);
    }
    if let Some((twice, _)) = held.iter().find(|(_, count)| **count > 1) {
        return Err(Failure(format!("'{twice}' was applied twice")));
    }
    Ok(markers.iter().filter(|m| !held.contains_key(*m)).count())
}

/// Waits until a replica publishes what another one has.
async fn catch_up(client: &Client, other: &Client) -> Result<u64, Failure> {
    let published = async |client: &Client| {
        let status = client.admin().status(client.request(v1::StatusRequest::default())).await.ok()?;
        status.into_inner().shards.first()?.views.iter().map(|v| v.published_index).min()
    };
    let goal = published(other).await.ok_or_else(|| Failure("the leader does not answer".into()))?;
    let until = Instant::now() + START_LIMIT;
    while Instant::now() < until {
        if published(client).await.is_some_and(|at| at >= goal) {
            return Ok(goal);
        }
        sleep(Duration::from_millis(30)).await;
    }
    Err(Failure("the restarted node did not catch up in time".into()))
}
