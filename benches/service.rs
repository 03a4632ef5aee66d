//! The service against the limits of its machine, in one run: three replicas on loopback with real fsyncs, and the load generator
//! beside them, all on the same cores.
//!
//! - the disk: fdatasync of small appends per second;
//! - the transport: an empty tonic echo server with a request of 1.5 KB and a reply of 0.8 KB;
//! - searches with a given vector, by a user of 1,000 memories of 384 dimensions, k = 10;
//! - acknowledged single writes, and memories through `BatchAdd` of 100. A write test's clock stops when every view of every
//!   replica has reached the last position.
//!
//! `LOCI_BENCH_SECONDS` is the length of each part (default 10); `cargo bench -- WORD…` runs only the parts named so, without ratios.

use nodes::auth::Keys;
use nodes::proto::internal::replica_client::ReplicaClient;
use nodes::proto::internal::{Answers, Body, Messages, replica_server};
use nodes::proto::v1::{
    self, admin_service_client::AdminServiceClient, memory_service_client::MemoryServiceClient,
};
use sim::net::{Channel, Routes};
use sim::time::{Duration, Instant, sleep};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tonic::{Request, Response, Status, Streaming};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const CLIENTS: [usize; 3] = [1, 16, 64];
const DIMENSION: usize = 384;
const MEMORIES: usize = 1000;

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("echo-server") {
        return sim::task::run_process(1, echo_server())?;
    }
    let seconds = std::env::var("LOCI_BENCH_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(10);
    sim::task::run_process(0, bench(Duration::from_secs(seconds)))?
}

/// A process that ends with its value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn address() -> Result<String> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

// ---- the limits ----

fn fdatasyncs(dir: &str, length: Duration) -> Result<f64> {
    let disk = sim::disk::open(dir)?;
    let file = disk.create("fdatasync")?;
    let (started, mut count) = (Instant::now(), 0u64);
    while started.elapsed() < length {
        file.write_at(&[7; 256], count * 256)?;
        file.sync()?;
        count += 1;
    }
    Ok(count as f64 / started.elapsed().as_secs_f64())
}

struct Echo(bytes::Bytes);

#[tonic::async_trait]
impl replica_server::Replica for Echo {
    async fn query(&self, _: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        Ok(Response::new(Body { body: self.0.clone(), ..Body::default() }))
    }
    type ExchangeStream = Streaming<Answers>;
    async fn exchange(
        &self,
        _: Request<Messages>,
    ) -> std::result::Result<Response<Self::ExchangeStream>, Status> {
        Err(Status::unimplemented("an echo server"))
    }
    async fn propose(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn is_there(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn read_index(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn reconfigure(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn reaches(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn renew(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn range_hashes(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn halt(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn stands(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn adopt(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn has_tail(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn lags(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn elsewhere(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn quarantined(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn touched(&self, request: Request<Body>) -> std::result::Result<Response<Body>, Status> {
        self.query(request).await
    }
    async fn snapshot(&self, _: Request<Streaming<Body>>) -> std::result::Result<Response<Body>, Status> {
        Err(Status::unimplemented("an echo server"))
    }
}

async fn echo_server() -> Result<()> {
    let addr = std::env::args().nth(2).ok_or("echo-server needs an address")?;
    let routes = Routes::new(replica_server::ReplicaServer::new(Echo(vec![7; 800].into())));
    Ok(sim::net::serve(&addr, routes, |_| (), std::future::pending()).await?)
}

// ---- the load ----

/// Runs `call` from so many clients for `length`; calls per second and the median and 99th percentile of their latency.
async fn load<F>(
    clients: usize,
    length: Duration,
    call: impl Fn(u64) -> F + Send + Sync + 'static,
) -> Result<Rate>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let (call, next) = (Arc::new(call), Arc::new(AtomicU64::new(0)));
    let started = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let (call, next) = (call.clone(), next.clone());
            sim::task::spawn(async move {
                let mut latencies = vec![];
                while started.elapsed() < length {
                    let at = Instant::now();
                    call(next.fetch_add(1, Ordering::Relaxed)).await?;
                    latencies.push(at.elapsed());
                }
                Result::Ok(latencies)
            })
        })
        .collect();
    let mut latencies = vec![];
    for task in tasks {
        latencies.extend(task.await??);
    }
    Ok(Rate { count: latencies.len(), elapsed: started.elapsed(), latencies })
}

struct Rate {
    count: usize,
    elapsed: Duration,
    latencies: Vec<Duration>,
}

impl Rate {
    fn per_second(&self) -> f64 {
        self.count as f64 / self.elapsed.as_secs_f64()
    }

    fn percentile(&mut self, p: f64) -> f64 {
        self.latencies.sort();
        let at = ((self.latencies.len() as f64 * p) as usize).min(self.latencies.len().saturating_sub(1));
        self.latencies.get(at).map_or(0.0, |d| d.as_secs_f64() * 1e3)
    }
}

fn vector(seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..DIMENSION)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn memory(user: &str, number: u64) -> v1::NewMemory {
    v1::NewMemory {
        user: user.into(),
        text: format!("note {number}: the meeting about the harbour project moved to the afternoon"),
        vector: vector(number),
        space: "bench".into(),
        ..Default::default()
    }
}

#[derive(Clone)]
struct Target {
    channel: Channel,
    bearer: tonic::metadata::MetadataValue<tonic::metadata::Ascii>,
}

impl Target {
    fn memories(&self) -> MemoryServiceClient<Channel> {
        MemoryServiceClient::new(self.channel.clone())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(20));
        request.metadata_mut().insert("authorization", self.bearer.clone());
        request
    }

    async fn shard(&self) -> Option<v1::ShardStatus> {
        let mut admin = AdminServiceClient::new(self.channel.clone());
        let status = admin.status(self.request(v1::StatusRequest::default())).await.ok()?;
        status.into_inner().shards.into_iter().next()
    }
}

/// Three replicas in processes of their own, and their leader.
struct Cluster {
    processes: Vec<Process>,
    targets: Vec<Target>,
    leader: Target,
    dir: PathBuf,
}

impl Cluster {
    async fn start(program: &Path, dir: PathBuf) -> Result<Cluster> {
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let addrs = (0..3).map(|_| address()).collect::<Result<Vec<_>>>()?;
        let numbered = addrs.iter().enumerate();
        let replicas: String = numbered.map(|(i, a)| format!("{} = '{a}'\n", i + 1)).collect();
        let mut keys = Keys::default();
        let key = keys.add("bench", true)?;
        let mut processes = vec![];
        for (i, addr) in addrs.iter().enumerate() {
            let data = path(&format!("n{i}"));
            keys.save(&*sim::disk::open(&data)?)?;
            let config = path(&format!("n{i}.toml"));
            let text = format!(
                "name = 'n{0}'\nid = {0}\nlisten = '{addr}'\ndata = '{data}'\ncluster_secret = 'only for this bench'\n[replicas]\n{replicas}",
                i + 1
            );
            std::fs::write(&config, text)?;
            let log = std::fs::File::create(path(&format!("n{i}.log")))?;
            let mut command = Command::new(program);
            command
                .args(["node", "--config", &config])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log);
            processes.push(Process(command.spawn()?));
        }
        let bearer: tonic::metadata::MetadataValue<_> = format!("Bearer {key}").parse()?;
        let targets = addrs
            .iter()
            .map(|a| Ok(Target { channel: sim::net::connect(a)?, bearer: bearer.clone() }))
            .collect::<Result<Vec<_>>>()?;
        loop {
            for target in &targets {
                if target.shard().await.is_some_and(|s| s.is_leader) {
                    let leader = target.clone();
                    return Ok(Cluster { processes, targets, leader, dir });
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.processes.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Waits until every view of every replica has reached the ledger's end.
async fn settled(targets: &[Target]) -> Result<()> {
    for _ in 0..6000 {
        let mut positions = vec![];
        for target in targets {
            let Some(shard) = target.shard().await else { continue };
            positions.push(shard.last_index);
            positions.extend(shard.views.iter().map(|v| v.published_index));
        }
        if positions.len() == 4 * targets.len() && positions.iter().all(|p| *p == positions[0]) {
            return Ok(());
        }
        sleep(Duration::from_millis(5)).await;
    }
    Err("the views did not settle within 30 s".into())
}

fn program() -> Result<PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "nodes", "--bin", "loci"])
        .status()?;
    if !status.success() {
        return Err("loci does not build".into());
    }
    // This benchmark lies in target/release/deps.
    let program = std::env::current_exe()?;
    let release = program.parent().and_then(|p| p.parent()).ok_or("no target directory")?;
    Ok(release.join("loci"))
}

async fn bench(length: Duration) -> Result<()> {
    let dir = std::env::temp_dir().join(format!("loci-bench-{}", std::process::id()));
    let done = run(length, &dir).await;
    std::fs::remove_dir_all(&dir)?;
    done
}

/// Whether a part was asked for: all are if none is named.
fn wanted(part: &str) -> bool {
    let mut named = std::env::args().skip(1).filter(|a| !a.starts_with('-')).peekable();
    named.peek().is_none() || named.any(|word| part.contains(&word))
}

const ECHO: &str = "echo, empty tonic server";
const SEARCHES: &str = "searches, 1,000 x 384, k = 10";
const WRITES: &str = "single writes, fsync on 2 of 3";
const BATCHES: &str = "memories by BatchAdd of 100";

async fn run(length: Duration, dir: &Path) -> Result<()> {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let program = program()?;
    println!(
        "loci {}; {} cores, {} s each",
        nodes::BUILD,
        std::thread::available_parallelism()?,
        length.as_secs()
    );
    let syncs = fdatasyncs(&path("disk"), length.min(Duration::from_secs(5)))?;
    println!("\n{:34} {syncs:9.0} /s", "fdatasync of 256 B appends");

    let addr = address()?;
    let echo = Process(
        Command::new(std::env::current_exe()?).args(["echo-server", &addr]).stdin(Stdio::null()).spawn()?,
    );
    let channel = sim::net::connect(&addr)?;
    let body = bytes::Bytes::from(vec![7u8; 1500]);
    while ReplicaClient::new(channel.clone())
        .query(Body { body: body.clone(), ..Body::default() })
        .await
        .is_err()
    {
        sleep(Duration::from_millis(20)).await;
    }
    let mut echoes = vec![];
    for clients in CLIENTS.into_iter().filter(|_| wanted(ECHO)) {
        let (channel, body) = (channel.clone(), body.clone());
        let mut rate = load(clients, length, move |_| {
            let (mut client, body) = (ReplicaClient::new(channel.clone()), body.clone());
            async move {
                client.query(Body { body, ..Body::default() }).await?;
                Ok(())
            }
        })
        .await?;
        show(ECHO, clients, &mut rate, 1.0, None);
        echoes.push(rate.per_second());
    }
    drop(echo);

    let items = |user: &'static str, from: u64| -> Vec<v1::AddRequest> {
        (from..from + 100).map(|n| v1::AddRequest { memory: Some(memory(user, n)), options: None }).collect()
    };
    // One cluster for searches and writes, then one for each BatchAdd, so that memory and disk stay bounded.
    let cluster = Cluster::start(&program, dir.join("single")).await?;
    for batch in 0..MEMORIES as u64 / 100 {
        let request = v1::BatchAddRequest { items: items("reader", batch * 100) };
        cluster.leader.memories().batch_add(cluster.leader.request(request)).await?;
    }
    settled(&cluster.targets).await?;

    for (i, clients) in CLIENTS.into_iter().enumerate().filter(|_| wanted(SEARCHES)) {
        let target = cluster.leader.clone();
        let queries: Vec<Vec<f32>> = (0..64).map(|q| vector(1_000_000 + q)).collect();
        let mut rate = load(clients, length, move |n| {
            let target = target.clone();
            let request = v1::SearchRequest {
                vector: queries[n as usize % queries.len()].clone(),
                space: "bench".into(),
                owners: Some(v1::Owners { user: "reader".into(), ..Default::default() }),
                k: 10,
                ..Default::default()
            };
            async move {
                let answer = target.memories().search(target.request(request)).await?;
                if answer.get_ref().hits.len() == 10 { Ok(()) } else { Err("fewer than k".into()) }
            }
        })
        .await?;
        show(SEARCHES, clients, &mut rate, 1.0, echoes.get(i).copied());
    }
    for (i, clients) in CLIENTS.into_iter().enumerate().filter(|_| wanted(WRITES)) {
        let target = cluster.leader.clone();
        let started = Instant::now();
        let mut rate = load(clients, length, move |n| {
            let target = target.clone();
            async move {
                let request = v1::AddRequest { memory: Some(memory("writer", n)), options: None };
                target.memories().add(target.request(request)).await?;
                Ok(())
            }
        })
        .await?;
        settled(&cluster.targets).await?;
        rate.elapsed = started.elapsed();
        show(WRITES, clients, &mut rate, 1.0, echoes.get(i).copied());
    }
    drop(cluster);
    for (i, clients) in CLIENTS.into_iter().enumerate().filter(|_| wanted(BATCHES)) {
        let cluster = Cluster::start(&program, dir.join(format!("batches-{clients}"))).await?;
        let target = cluster.leader.clone();
        let started = Instant::now();
        let mut rate = load(clients, length, move |n| {
            let target = target.clone();
            let request = v1::BatchAddRequest { items: items("batches", n * 100) };
            async move {
                let answer = target.memories().batch_add(target.request(request)).await?;
                match answer.get_ref().results.iter().find_map(|r| r.error.as_ref()) {
                    None => Ok(()),
                    Some(error) => Err(error.message.clone().into()),
                }
            }
        })
        .await?;
        settled(&cluster.targets).await?;
        rate.elapsed = started.elapsed();
        show(BATCHES, clients, &mut rate, 100.0, echoes.get(i).copied());
    }
    Ok(())
}

fn show(what: &str, clients: usize, rate: &mut Rate, each: f64, echo: Option<f64>) {
    let per_second = rate.per_second() * each;
    let ratio = echo.map_or(String::new(), |echo| format!("  {:5.2} x echo", per_second / echo));
    println!(
        "{what:34} {per_second:9.0} /s  {clients:3} clients  p50 {:7.2} ms  p99 {:7.2} ms{ratio}",
        rate.percentile(0.5),
        rate.percentile(0.99)
    );
}
