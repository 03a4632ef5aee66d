//! Vectors, against the limits of the machine and against what a user would take instead, on the very same vectors in one run.
//!
//! - `kernels`: exact scans of 1,000 × 384, f32 and codes, on each path of the CPU; a scan of codes of 1,000,000 × 384 against reading as many
//!   bytes;
//! - `graph`: 50,000 and 100,000 × 384, to a recall of ten of at least 0.99: searches a second, time to build, bytes touched;
//! - `scoped`: searches of one user's 1,000 of 50,000, through the whole store, also with a filter on metadata that one in a hundred meets;
//! - `scale`: 100,000, 1,000,000 and 10,000,000 vectors at 1,000 a scope, codes only: bytes, opening, searches;
//! - `product`: 50,000 × 384 of 50 users and of one, with the vectors, with codes alone and with product codes: bytes, recall, searches;
//! - `writing`: searches while 5,000 vectors a second are written, sealed and merged, against the same without.
//!
//! Peers (`benches/peers/requirements.txt`) run if `LOCI_BENCH_PYTHON` names a Python that has them; hnsw_rs always does. Everything is on one
//! thread. `LOCI_BENCH_SCALE` shrinks all sizes (default 1.0); `cargo bench --bench vectors -- WORD…` runs only the parts named so.

use hnsw_rs::prelude::{Distance, Hnsw};
use sim::disk::{Disk, Map};
use sim::time::{Duration, Instant};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use storage::model::*;
use storage::vectors::codes::{self, Query};
use storage::vectors::cpu::Level;
use storage::vectors::facets::{Facets, Listed};
use storage::vectors::graph::{Graph, GraphOptions, Points};
use storage::vectors::rows::{Index, Kind, Rows, Wanted};
use storage::vectors::scan::{Asked, Best, scan};
use storage::vectors::segment::{Precision, Segment, Writer};
use storage::vectors::{VectorOptions, dot, dot_rows, near};
use storage::{Entry, SearchQuery, Shard, ShardOptions};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DIMENSION: usize = 384;
const K: usize = 10;
const QUERIES: usize = 1000;
/// Points of a cluster, and how far they lie from its centre, whose norm is 1.
const CLUSTER: usize = 100;
const NOISE: f32 = 0.7;
/// 2026-01-01.
const START: UnixMs = 1_767_225_600_000;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal, with deviation 1: four uniform numbers.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f32 / 32_768.0 - 1.0).sum();
        sum * 0.866
    }
}

/// Unit vectors around random centres.
struct Clusters {
    centres: Vec<f32>,
}

impl Clusters {
    fn new(points: usize) -> Clusters {
        let mut random = Random(1);
        let count = (points / CLUSTER).max(1);
        let mut centres: Vec<f32> = (0..count * DIMENSION).map(|_| random.normal()).collect();
        centres.chunks_exact_mut(DIMENSION).for_each(normalise);
        Clusters { centres }
    }

    fn draw(&self, random: &mut Random, out: &mut Vec<f32>) {
        let cluster = random.next() as usize % (self.centres.len() / DIMENSION);
        let from = out.len();
        let spread = NOISE / (DIMENSION as f32).sqrt();
        let centre = &self.centres[cluster * DIMENSION..][..DIMENSION];
        out.extend(centre.iter().map(|x| x + spread * random.normal()));
        normalise(&mut out[from..]);
    }

    fn many(&self, count: usize, seed: u64) -> Vec<f32> {
        let (mut random, mut out) = (Random(seed), Vec::with_capacity(count * DIMENSION));
        (0..count).for_each(|_| self.draw(&mut random, &mut out));
        out
    }
}

fn normalise(vector: &mut [f32]) {
    let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    vector.iter_mut().for_each(|x| *x /= norm);
}

fn row(all: &[f32], at: usize) -> &[f32] {
    &all[at * DIMENSION..][..DIMENSION]
}

struct Bench {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    scale: f64,
    python: Option<String>,
}

/// Bytes of this process in memory: its own, and pages of files that it has mapped and touched.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).ok_or("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).ok_or("no size")?.parse()?;
    Ok(kib * 1024)
}

fn best_of(runs: usize, mut work: impl FnMut()) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..runs {
        let begun = Instant::now();
        work();
        best = best.min(begun.elapsed());
    }
    best
}

fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The true K nearest rows of each query among those that `of` gives it.
fn truth(base: &[f32], queries: &[f32], of: impl Fn(usize, usize) -> bool) -> Vec<u32> {
    let mut all = vec![];
    let mut scores = vec![0.0; base.len() / DIMENSION];
    for (at, query) in queries.chunks_exact(DIMENSION).enumerate() {
        dot_rows(Level::best(), query, base, &mut scores);
        let mut order: Vec<u32> = (0..scores.len() as u32).filter(|row| of(at, *row as usize)).collect();
        let better = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]);
        let k = K.min(order.len());
        if order.len() > k {
            order.select_nth_unstable_by(k, better);
        }
        order.truncate(k);
        all.extend(order);
    }
    all
}

fn recall(found: &[Vec<u32>], truth: &[u32]) -> f64 {
    let hits = |(found, truth): (&Vec<u32>, &[u32])| truth.iter().filter(|t| found.contains(t)).count();
    found.iter().zip(truth.chunks(K)).map(hits).sum::<usize>() as f64 / truth.len() as f64
}

impl Bench {
    fn count(&self, full: usize) -> usize {
        ((full as f64 * self.scale) as usize).max(2000).next_multiple_of(1000)
    }

    /// Runs a peer over vectors that it finds in a directory.
    fn peer(&self, name: &str) -> Result<Option<BTreeMap<String, f64>>> {
        let Some(python) = &self.python else { return Ok(None) };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/peers.py");
        let mut command = std::process::Command::new(python);
        let ran = command.arg(script).arg(name).arg(&self.dir).arg(K.to_string()).output()?;
        if !ran.status.success() {
            let said = String::from_utf8_lossy(&ran.stderr);
            println!("  {name}: {}", said.lines().last().unwrap_or("it failed without a word"));
            return Ok(None);
        }
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        let line =
            |line: &str| Some((line.split_once(' ')?.0.to_string(), line.split_once(' ')?.1.parse().ok()?));
        Ok(Some(said.lines().filter_map(line).collect()))
    }

    fn give_to_peers(&self, base: &[f32], queries: &[f32], truth: &[u32], users: usize) -> Result<()> {
        let (rows, asked) = (base.len() / DIMENSION, queries.len() / DIMENSION);
        let about =
            format!(r#"{{"rows": {rows}, "queries": {asked}, "dimension": {DIMENSION}, "users": {users}}}"#);
        std::fs::write(self.dir.join("about.json"), about)?;
        std::fs::write(self.dir.join("base.f32"), bytemuck::cast_slice::<f32, u8>(base))?;
        std::fs::write(self.dir.join("query.f32"), bytemuck::cast_slice::<f32, u8>(queries))?;
        Ok(std::fs::write(self.dir.join("truth.u32"), bytemuck::cast_slice::<u32, u8>(truth))?)
    }

    fn kernels(&self) -> Result<()> {
        println!("\nkernels: a query against rows of {DIMENSION}, best of 2,000");
        let clusters = Clusters::new(1000);
        let (base, queries) = (clusters.many(1000, 2), clusters.many(2, 3));
        self.give_to_peers(&base, &queries, &truth(&base, &queries, |_, _| true), 1)?;
        let (mut codes, mut rests) = (vec![], vec![]);
        for vector in base.chunks_exact(DIMENSION) {
            codes::encode(vector, &mut codes, &mut rests);
        }
        // At multiples of 64 bytes, as in a segment.
        let aligned = |bytes: &[u8]| {
            Map::copied(bytes.len(), |to| {
                to.copy_from_slice(bytes);
                Ok::<(), Infallible>(())
            })
        };
        let (floats, codes) = (aligned(bytemuck::cast_slice(&base))?, aligned(&codes)?);
        let base: &[f32] = bytemuck::cast_slice(&floats);
        let query = Query::new(row(&queries, 0));
        let (mut scores, mut sums) = (vec![0.0; 1000], vec![0; 1000]);
        let peer = self.peer("numpy")?.and_then(|said| said.get("product_s").copied());
        if let Some(product) = peer {
            println!("  numpy, BLAS product of 1,000            {:8.1} us", product * 1e6);
        }
        for level in Level::all() {
            let float = best_of(2000, || dot_rows(level, row(&queries, 0), base, &mut scores));
            let coded = best_of(2000, || query.sums(level, &codes, &mut sums));
            let ratio = float.as_secs_f64() / coded.as_secs_f64();
            let against =
                peer.map_or(String::new(), |p| format!("   {:.2} x numpy's speed", p / float.as_secs_f64()));
            println!("  f32, 1,000 rows, {:22} {:8.1} us{against}", format!("{level:?}"), us(float));
            println!(
                "  codes, 1,000 rows, {:20} {:8.1} us   {ratio:.1} x f32",
                format!("{level:?}"),
                us(coded)
            );
        }
        let rows = self.count(1_000_000);
        let many = Map::copied(rows * DIMENSION, |to| {
            to.chunks_mut(codes.len()).for_each(|to| to.copy_from_slice(&codes[..to.len()]));
            Ok::<(), Infallible>(())
        })?;
        let read = best_of(7, || {
            // As fast as this core takes bytes in: sums of whole lines, in eight streams.
            let words: &[u64] = bytemuck::cast_slice(&many);
            let part = words.len() / 8;
            let mut sums = [0u64; 8];
            for at in (0..part / 8 * 8).step_by(8) {
                for (stream, sum) in sums.iter_mut().enumerate() {
                    let line = &words[stream * part + at..][..8];
                    *sum = line.iter().fold(*sum, |sum, word| sum.wrapping_add(*word));
                }
            }
            std::hint::black_box(sums);
        });
        let mut sums = vec![0; 1024];
        let streamed = best_of(7, || {
            for part in many.chunks(1024 * DIMENSION) {
                query.sums(Level::best(), part, &mut sums[..part.len() / DIMENSION]);
            }
        });
        let speed = |time: Duration| many.len() as f64 / time.as_secs_f64() / 1e9;
        println!("  reading {rows} rows of codes          {:8.1} GB/s", speed(read));
        println!(
            "  scanning them                           {:8.1} GB/s   {:.2} x reading",
            speed(streamed),
            speed(streamed) / speed(read)
        );
        Ok(())
    }

    fn graph(&self, full: usize) -> Result<()> {
        let rows = self.count(full);
        println!(
            "\ngraph: {rows} x {DIMENSION}, clusters of {CLUSTER}, noise {NOISE}, unit norms; M 16, ef_construction 200; recall of {K} over {QUERIES} queries"
        );
        let clusters = Clusters::new(rows);
        let (base, queries) = (clusters.many(rows, 2), clusters.many(QUERIES, 3));
        let truth = truth(&base, &queries, |_, _| true);
        self.give_to_peers(&base, &queries, &truth, 1)?;
        let mut best = (0.0f64, f64::MAX, f64::MAX);
        let tell = |name: &str,
                    ef: f64,
                    reached: f64,
                    rate: f64,
                    build: f64,
                    bytes: f64,
                    of: &(f64, f64, f64)| {
            let ratios = match of.0 {
                0.0 => String::new(),
                _ => format!(
                    "   {:.2} x the best rate, {:.2} x hnswlib's bytes, {:.2} x its build",
                    rate / of.0,
                    bytes / of.1,
                    build / of.2
                ),
            };
            println!(
                "  {name:10} ef {ef:3}  recall {reached:.4}  {rate:7.0} /s  build {build:6.1} s  {:5.0} bytes a vector{ratios}",
                bytes / rows as f64
            );
        };
        for peer in ["hnswlib", "faiss", "usearch"] {
            let Some(said) = self.peer(peer)? else { continue };
            let get = |name: &str| said.get(name).copied().unwrap_or_default();
            let (rate, build, bytes) = (get("rate"), get("build_s"), get("bytes"));
            tell(peer, get("ef"), get("recall"), rate, build, bytes, &(0.0, 0.0, 0.0));
            // A peer that does not reach the recall is no peer.
            if get("recall") >= 0.99 {
                best.0 = best.0.max(rate);
            }
            if peer == "hnswlib" {
                (best.1, best.2) = (bytes, build);
            }
        }
        if full <= 50_000 {
            let before = resident()?;
            let begun = Instant::now();
            let hnsw = Hnsw::<f32, Cosine>::new(16, rows, 16, 200, Cosine);
            base.chunks_exact(DIMENSION).enumerate().for_each(|(at, vector)| hnsw.insert((vector, at)));
            let build = begun.elapsed().as_secs_f64();
            for ef in [16, 24, 32, 48, 64, 96, 128] {
                let mut found = vec![];
                let time = best_of(2, || {
                    let ask = |query| hnsw.search(query, K, ef).iter().map(|n| n.d_id as u32).collect();
                    found = queries.chunks_exact(DIMENSION).map(ask).collect();
                });
                let (reached, rate) = (recall(&found, &truth), QUERIES as f64 / time.as_secs_f64());
                if reached >= 0.99 || ef == 128 {
                    best.0 = best.0.max(rate);
                    tell(
                        "hnsw_rs",
                        ef as f64,
                        reached,
                        rate,
                        build,
                        (resident()? - before) as f64,
                        &(0.0, 0.0, 0.0),
                    );
                    break;
                }
            }
        }
        let coded = Coded::new(base.chunks_exact(DIMENSION));
        let options = GraphOptions::default();
        let begun = Instant::now();
        let (graph, order, repair) = Graph::build(&coded.points(), options, &mut |_| {});
        let build = begun.elapsed().as_secs_f64();
        let path = format!("graph-{rows}.seg");
        let kind = Kind { owner: Owner::Global, space: "s".into(), dimension: DIMENSION };
        let listed: Vec<(u32, u32)> = order.iter().map(|row| (0, *row)).collect();
        let mut writer = Writer::create(&*self.disk, &path, Month::of(START))?;
        writer.add(&kind, &[coded.rows(&base)], &listed, Some(&graph), Precision::Full)?;
        drop(writer.finish(&*self.disk)?);
        drop((graph, coded));
        let before = resident()?;
        let begun = Instant::now();
        let segment = Segment::open(&*self.disk, &path)?;
        let opened = begun.elapsed();
        let wanted =
            Wanted { statuses: &[Status::Active], now: START, allowed: None, shown: None, dead: None };
        let ask = |query: &[f32], ef: usize| -> Result<Vec<u32>> {
            let block = segment.block(0, false)?;
            let (asked, mut best) = (Asked::new(query), Best::new(K, None));
            let view = block.graph().ok_or("the block has no graph")?;
            assert!(near(&asked, &block.rows, &view, &wanted, 0, ef, &mut best), "too few were found");
            Ok(best.into_sorted().iter().map(|found| number(&found.1) as u32).collect())
        };
        for ef in [24, 32, 48, 64, 96, 128] {
            let mut found = vec![];
            let time = best_of(3, || {
                let ask = |query| ask(query, ef).unwrap_or_default();
                found = queries.chunks_exact(DIMENSION).map(ask).collect();
            });
            let (reached, rate) = (recall(&found, &truth), QUERIES as f64 / time.as_secs_f64());
            if reached >= 0.99 || ef == 128 {
                tell("loci", ef as f64, reached, rate, build, (resident()? - before) as f64, &best);
                break;
            }
        }
        println!(
            "             opened in {:.1} us; searches for its own points missed {} before the repair, of which {} lie beside the graph after it",
            us(opened),
            repair.missed,
            repair.left
        );
        let step = (rows / 100_000).max(1);
        let lost = (0..rows).step_by(step).filter(|at| {
            let found = ask(row(&base, *at), 24).unwrap_or_default();
            !found.contains(&(*at as u32))
        });
        println!(
            "             searches for {} of its own points that did not find them: {}",
            rows.div_ceil(step),
            lost.count()
        );
        self.disk.remove(&path)?;
        Ok(())
    }

    fn shard(&self, name: &str, vectors: VectorOptions) -> Result<Shard> {
        let _ = std::fs::remove_dir_all(self.dir.join(name));
        Ok(Shard::open(self.disk.clone(), name, ShardOptions { vectors, ..ShardOptions::default() })?)
    }

    fn scoped(&self) -> Result<()> {
        const USERS: usize = 50;
        let rows = self.count(50_000);
        println!(
            "\nscoped: {USERS} users of {} x {DIMENSION} each, k {K}, whole memories answered",
            rows / USERS
        );
        let clusters = Clusters::new(rows);
        let (base, queries) = (clusters.many(rows, 2), clusters.many(QUERIES, 3));
        let truth = truth(&base, &queries, |query, row| row % USERS == query % USERS);
        self.give_to_peers(&base, &queries, &truth, USERS)?;
        let peer = self.peer("qdrant")?;
        let mut shard = self.shard("scoped", VectorOptions::default())?;
        fill(&shard, &base, USERS)?;
        shard.seal()?;
        while shard.merge()? {}
        let of_tag =
            |query: usize, row: usize| row % USERS == query % USERS && row / USERS % 100 == query % 100;
        let truth_of_tag = self::truth(&base, &queries, of_tag);
        // What meets a filter is remembered until a memory of its owner changes: without that, and with it.
        for (filtered, remembered) in [(false, true), (true, false), (true, true)] {
            let name = if filtered { "filtered" } else { "scoped" };
            let truth = if filtered { &truth_of_tag } else { &truth };
            drop(shard);
            let conditions_bytes_max =
                if remembered { VectorOptions::default().conditions_bytes_max } else { 0 };
            let vectors = VectorOptions { conditions_bytes_max, ..VectorOptions::default() };
            shard = Shard::open(
                self.disk.clone(),
                "scoped",
                ShardOptions { vectors, ..ShardOptions::default() },
            )?;
            let mut times = vec![];
            let mut found = vec![];
            // Twice: the first time reads the records from the disk.
            for _ in 0..2 {
                times.clear();
                found.clear();
                for at in 0..QUERIES {
                    let filter = filtered.then(|| Filter::Compare {
                        field: Field::Metadata("tag".into()),
                        op: CompareOp::Eq,
                        value: Value::Number((at % 100) as f64),
                    });
                    let query = search(at % USERS, row(&queries, at), filter);
                    let begun = Instant::now();
                    let hits = shard.search(&query)?;
                    times.push(begun.elapsed());
                    found.push(hits.iter().map(|hit| number(&hit.memory.id) as u32).collect::<Vec<_>>());
                }
            }
            let rate = times.len() as f64 / times.iter().sum::<Duration>().as_secs_f64();
            let said =
                |what: &str| peer.as_ref().and_then(|said| said.get(&format!("{name}_{what}")).copied());
            if let (Some(p50), Some(p99), Some(of)) = (said("p50_s"), said("p99_s"), said("rate")) {
                println!(
                    "  qdrant-edge {name:9}  p50 {:7.1} us  p99 {:7.1} us  {of:7.0} /s",
                    p50 * 1e6,
                    p99 * 1e6
                );
            }
            let against = said("rate").map_or(String::new(), |of| format!("   {:.1} x", rate / of));
            let asked = match (filtered, remembered) {
                (true, true) => ", asked before",
                (true, false) => ", asked first",
                _ => "",
            };
            // Of each user's memories ten have a tag, if nothing was scaled down.
            let reached = match truth.len() {
                all if all == QUERIES * K => format!("  recall {:.4}", recall(&found, truth)),
                _ => String::new(),
            };
            println!(
                "  loci        {name:9}  p50 {:7.1} us  p99 {:7.1} us  {rate:7.0} /s{reached}{against}{asked}",
                us(percentile(&mut times, 0.5)),
                us(percentile(&mut times, 0.99)),
            );
        }
        Ok(())
    }

    fn at_scale(&self) -> Result<()> {
        const SCOPE: usize = 1000;
        println!(
            "\nscale: {SCOPE} x {DIMENSION} a scope, codes only; the vectors that decide are read from another file"
        );
        for full in [100_000, 1_000_000, 10_000_000] {
            let rows = self.count(full);
            let scopes = rows / SCOPE;
            let clusters = Clusters::new(100_000);
            let path = format!("scale-{rows}.seg");
            let mut kinds: Vec<(Kind, usize)> = (0..scopes)
                .map(|scope| (Kind { owner: user(scope), space: "s".into(), dimension: DIMENSION }, scope))
                .collect();
            kinds.sort_by_key(|(kind, _)| kind.hash());
            let vectors = self.disk.create("vectors.f32")?;
            let mut writer = Writer::create(&*self.disk, &path, Month::of(START))?;
            let mut told = Instant::now();
            for (done, (kind, scope)) in kinds.iter().enumerate() {
                let base = clusters.many(SCOPE, *scope as u64 + 10);
                let mut coded = Coded::new(base.chunks_exact(DIMENSION));
                coded.ids = (0..SCOPE).map(|at| id((scope * SCOPE + at) as u64)).collect();
                let listed: Vec<(u32, u32)> = (0..SCOPE as u32).map(|row| (0, row)).collect();
                writer.add(kind, &[coded.rows(&base)], &listed, None, Precision::Codes)?;
                vectors.write_at(bytemuck::cast_slice(&base), (scope * SCOPE * DIMENSION * 4) as u64)?;
                if told.elapsed() > Duration::from_secs(10) {
                    told = Instant::now();
                    eprintln!("  writing {full}: {done} of {scopes} scopes");
                }
            }
            drop(writer.finish(&*self.disk)?);
            vectors.sync()?;
            let begun = Instant::now();
            let segment = Segment::open(&*self.disk, &path)?;
            let opened = begun.elapsed();
            let wanted =
                Wanted { statuses: &[Status::Active], now: START, allowed: None, shown: None, dead: None };
            let mut random = Random(99);
            let compared = AtomicU64::new(0);
            let fetch = |_: usize, id: &MemoryId| {
                let mut vector = vec![0f32; DIMENSION];
                let bytes = bytemuck::cast_slice_mut(&mut vector);
                vectors.read_at(bytes, number(id) * DIMENSION as u64 * 4)?;
                compared.fetch_add(1, Relaxed);
                Ok(vector)
            };
            let mut asks: Vec<(Kind, Vec<f32>)> = vec![];
            for _ in 0..400 {
                let kind = Kind {
                    owner: user(random.next() as usize % scopes),
                    space: "s".into(),
                    dimension: DIMENSION,
                };
                let mut vector = vec![];
                clusters.draw(&mut random, &mut vector);
                asks.push((kind, vector));
            }
            let pass = || -> Result<Vec<Duration>> {
                let mut times = vec![];
                for (kind, vector) in &asks {
                    let begun = Instant::now();
                    let number = segment.find(&kind.hash()).ok_or("the scope is not there")?;
                    let block = segment.block(number, false)?;
                    let mut best = Best::new(K, None);
                    scan(&Asked::new(vector), &block.rows, &wanted, 0, &mut best, &fetch)?;
                    assert_eq!(best.into_sorted().len(), K);
                    times.push(begun.elapsed());
                }
                Ok(times)
            };
            let mut cold = pass()?;
            compared.store(0, Relaxed);
            let mut warm = pass()?;
            println!(
                "  {rows:9}  {:6.1} bytes a vector  opened in {:8.1} us  first use p50 {:7.1} p99 {:8.1} us  then p50 {:6.1} p99 {:6.1} us, {:.1} compared by f32",
                segment.len as f64 / rows as f64,
                us(opened),
                us(percentile(&mut cold, 0.5)),
                us(percentile(&mut cold, 0.99)),
                us(percentile(&mut warm, 0.5)),
                us(percentile(&mut warm, 0.99)),
                compared.load(Relaxed) as f64 / asks.len() as f64,
            );
            drop(segment);
            self.disk.remove(&path)?;
            self.disk.remove("vectors.f32")?;
        }
        Ok(())
    }

    fn product(&self) -> Result<()> {
        let rows = self.count(50_000);
        let clusters = Clusters::new(rows);
        let (base, queries) = (clusters.many(rows, 2), clusters.many(QUERIES, 3));
        for users in [50, 1] {
            println!("\nproduct: {rows} x {DIMENSION} of {users} users, k {K}, whole memories answered");
            let truth = truth(&base, &queries, |query, row| row % users == query % users);
            let mut full = 0.0;
            for (name, originals, compressed) in
                [("vectors and codes", true, false), ("codes", false, false), ("product codes", false, true)]
            {
                let dir = self.dir.join("product");
                let options = VectorOptions { originals, ..VectorOptions::default() };
                let shard = self.shard("product", options)?;
                fill(&shard, &base, users)?;
                shard.seal()?;
                while shard.merge()? {}
                let begun = Instant::now();
                while compressed && shard.compress(Month(i32::MAX))? {}
                let took = begun.elapsed().as_secs_f64();
                let mut bytes = 0;
                for entry in std::fs::read_dir(&dir)? {
                    let entry = entry?;
                    if entry.path().extension().is_some_and(|ext| ext == "seg") {
                        bytes += entry.metadata()?.len();
                    }
                }
                let bytes = bytes as f64 / rows as f64;
                full = if originals { bytes } else { full };
                let (mut times, mut found) = (vec![], vec![]);
                for at in (0..QUERIES).chain(0..QUERIES) {
                    let query = search(at % users, row(&queries, at), None);
                    let begun = Instant::now();
                    let hits = shard.search(&query)?;
                    times.push(begun.elapsed());
                    found.push(hits.iter().map(|hit| number(&hit.memory.id) as u32).collect::<Vec<_>>());
                }
                // The first time reads the records from the disk.
                let (times, found) = (&mut times[QUERIES..], &found[QUERIES..]);
                println!(
                    "  {name:18} {bytes:6.0} bytes a vector, {:4.1} % saved   recall {:.4}   p50 {:7.1} us  p99 {:7.1} us{}",
                    100.0 * (1.0 - bytes / full),
                    recall(found, &truth),
                    us(percentile(times, 0.5)),
                    us(percentile(times, 0.99)),
                    if compressed { format!("   made in {took:.1} s") } else { String::new() },
                );
                drop(shard);
                std::fs::remove_dir_all(dir)?;
            }
        }
        Ok(())
    }

    fn writing(&self) -> Result<()> {
        const USERS: usize = 50;
        const RATE: u64 = 5000;
        const BATCH: usize = 50;
        let seconds = (20.0 * self.scale).max(2.0);
        let rows = self.count(50_000);
        println!(
            "\nwriting: searches of 1 of {USERS} users' {} vectors for {seconds:.0} s, quiet and with {RATE} writes a second",
            rows / USERS
        );
        let clusters = Clusters::new(rows);
        let base = clusters.many(rows, 2);
        let options = VectorOptions { buffer_bytes_max: 8 << 20, ..VectorOptions::default() };
        let shard = self.shard("writing", options)?;
        fill(&shard, &base, USERS)?;
        shard.seal()?;
        while shard.merge()? {}
        let searches = |for_seconds: f64| -> Result<Vec<Duration>> {
            let (mut random, mut times, mut vector) = (Random(5), vec![], vec![]);
            let begun = Instant::now();
            while begun.elapsed().as_secs_f64() < for_seconds {
                vector.clear();
                clusters.draw(&mut random, &mut vector);
                let query = search(random.next() as usize % USERS, &vector, None);
                let asked = Instant::now();
                shard.search(&query)?;
                times.push(asked.elapsed());
                // Some searches, not all that there can be.
                std::thread::sleep(Duration::from_micros(500));
            }
            Ok(times)
        };
        searches(1.0)?;
        let mut quiet = searches(seconds)?;
        let (stop, written, sealed, merged) =
            (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let mut busy = std::thread::scope(|scope| -> Result<Vec<Duration>> {
            let writer = scope.spawn(|| -> Result<()> {
                let begun = Instant::now();
                let (mut random, mut next) = (Random(6), rows);
                let mut index = shard.applied().0.index;
                while !stop.load(Relaxed) {
                    let mut vectors = vec![];
                    (0..BATCH).for_each(|_| clusters.draw(&mut random, &mut vectors));
                    index += 1;
                    apply(&shard, index, &vectors, next, USERS)?;
                    next += BATCH;
                    let done = written.fetch_add(BATCH as u64, Relaxed) + BATCH as u64;
                    let due = Duration::from_secs_f64(done as f64 / RATE as f64);
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                }
                Ok(())
            });
            let keeper = scope.spawn(|| -> Result<()> {
                while !stop.load(Relaxed) {
                    if shard.seal_due() {
                        shard.seal()?;
                        sealed.fetch_add(1, Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            });
            let merger = scope.spawn(|| -> Result<()> {
                while !stop.load(Relaxed) {
                    if shard.merge()? {
                        merged.fetch_add(1, Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            });
            let times = searches(seconds);
            stop.store(true, Relaxed);
            for thread in [writer, keeper, merger] {
                thread.join().map_err(|_| "a thread panicked")??;
            }
            times
        })?;
        let of = |times: &mut Vec<Duration>| (us(percentile(times, 0.5)), us(percentile(times, 0.99)));
        let (quiet, busy) = (of(&mut quiet), of(&mut busy));
        println!("  quiet          p50 {:7.1} us  p99 {:7.1} us", quiet.0, quiet.1);
        println!(
            "  while writing  p50 {:7.1} us  p99 {:7.1} us   {:.1} x the quiet p99; {:.0} writes a second, {} seals, {} merges",
            busy.0,
            busy.1,
            busy.1 / quiet.1,
            written.load(Relaxed) as f64 / seconds,
            sealed.load(Relaxed),
            merged.load(Relaxed)
        );
        Ok(())
    }
}

#[derive(Clone)]
struct Cosine;

impl Distance<f32> for Cosine {
    fn eval(&self, a: &[f32], b: &[f32]) -> f32 {
        (1.0 - dot(a, b)).max(0.0)
    }
}

/// Vectors by column, as a block has them.
struct Coded {
    codes: Vec<u8>,
    rests: Vec<u8>,
    scales: Vec<f32>,
    ids: Vec<MemoryId>,
    positions: Vec<i64>,
    expires: Vec<UnixMs>,
    statuses: Vec<u8>,
    loss: codes::Loss,
}

impl Coded {
    fn new<'a>(vectors: impl Iterator<Item = &'a [f32]>) -> Coded {
        let (mut codes, mut rests, mut scales) = (vec![], vec![], vec![]);
        let mut loss = codes::Loss::default();
        for vector in vectors {
            let (scale, lost) = codes::encode(vector, &mut codes, &mut rests);
            scales.push(scale);
            loss = loss.max(lost);
        }
        let rows = scales.len();
        let ids = (0..rows as u64).map(id).collect();
        let (positions, expires) = ((1..=rows as i64).collect(), vec![UnixMs::MAX; rows]);
        let statuses = vec![Status::Active as u8; rows];
        Coded { codes, rests, scales, ids, positions, expires, statuses, loss }
    }

    fn points(&self) -> Points<'_> {
        let (codes, rests, scales) = (&self.codes, &self.rests, &self.scales);
        Points { codes, rests, scales, stride: codes::stride(DIMENSION), level: Level::best() }
    }

    fn rows<'a>(&'a self, originals: &'a [f32]) -> Rows<'a> {
        Rows {
            dimension: DIMENSION,
            product: None,
            codes: &self.codes,
            rests: &self.rests,
            scales: &self.scales,
            ids: &self.ids,
            positions: &self.positions,
            expires: &self.expires,
            statuses: &self.statuses,
            originals,
            loss: self.loss,
            plain: true,
            index: Index::Sorted,
            facets: Facets::Listed(Listed::default()),
        }
    }
}

fn id(number: u64) -> MemoryId {
    (number as u128).to_be_bytes()
}

fn number(id: &MemoryId) -> u64 {
    u128::from_be_bytes(*id) as u64
}

fn user(number: usize) -> Owner {
    Owner::User { tenant: "t".into(), user: format!("u{number}") }
}

fn search(of: usize, vector: &[f32], filter: Option<Filter>) -> SearchQuery {
    SearchQuery {
        tenant: "t".into(),
        owners: vec![user(of)],
        vector: vector.to_vec(),
        space: "s".into(),
        text: String::new(),
        k: K,
        threshold: None,
        filter,
        statuses: vec![Status::Active],
        time: None,
        now: START,
        with_vector: false,
    }
}

/// Adds vectors as memories, numbered from `first`; memory i is of user i mod `users` and has the tag i div `users` mod 100.
fn apply(shard: &Shard, index: u64, vectors: &[f32], first: usize, users: usize) -> Result<()> {
    let add = |(at, vector): (usize, &[f32])| {
        let at = first + at;
        let memory = Memory {
            id: id(at as u64),
            tenant: "t".into(),
            scope: Scope::Private,
            user: format!("u{}", at % users),
            agent: String::new(),
            session: String::new(),
            text: format!("memory {at}"),
            metadata: format!(r#"{{"tag": {}}}"#, at / users % 100),
            kind: MemoryType::Semantic,
            status: Status::Active,
            importance: 0.5,
            categories: vec![],
            links: vec![],
            event_time: None,
            valid_from: None,
            valid_to: None,
            created: START,
            updated: START,
            expires: None,
            access_count: 0,
            last_access: None,
            version: 1,
            space: "s".into(),
            tier: Tier::Hot,
            vector: vector.to_vec(),
        };
        let operation = Operation::Add(memory);
        let (tenant, idempotency_key) = ("t".into(), String::new());
        Command { tenant, slot: None, idempotency_key, request_hash: [0; 16], now: START, operation }
    };
    let commands = vectors.chunks_exact(DIMENSION).enumerate().map(add).collect();
    shard.apply(&[Entry { epoch: 1, index, batch: Some(&Batch { commands }) }], b"")?;
    Ok(())
}

fn fill(shard: &Shard, base: &[f32], users: usize) -> Result<()> {
    for (at, vectors) in base.chunks(500 * DIMENSION).enumerate() {
        apply(shard, at as u64 + 1, vectors, at * 500, users)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let env = |name| std::env::var(name).ok();
    let scale = env("LOCI_BENCH_SCALE").map_or(Ok(1.0), |s| s.parse())?;
    let dir = env("LOCI_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = dir.join(format!("loci-vectors-{}", std::process::id()));
    let disk = sim::disk::real::RealDisk::open(&dir)?;
    let bench = Bench { dir: dir.clone(), disk, scale, python: env("LOCI_BENCH_PYTHON") };
    if bench.python.is_none() {
        println!("without peers: LOCI_BENCH_PYTHON names no Python that has benches/peers/requirements.txt");
    }
    println!(
        "vectors: {DIMENSION} dimensions, clusters of {CLUSTER} about random centres of norm 1, noise {NOISE} about each, all made of norm 1; {QUERIES} queries of the same kind, not among them; seeds 1 to 3"
    );
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |part: &str| words.is_empty() || words.iter().any(|word| part.contains(word.as_str()));
    let run = || -> Result<()> {
        if wanted("kernels") {
            bench.kernels()?;
        }
        if wanted("graph") {
            bench.graph(50_000)?;
            bench.graph(100_000)?;
        }
        if wanted("scoped") {
            bench.scoped()?;
        }
        if wanted("scale") {
            bench.at_scale()?;
        }
        if wanted("product") {
            bench.product()?;
        }
        if wanted("writing") {
            bench.writing()?;
        }
        Ok(())
    };
    let ran = run();
    std::fs::remove_dir_all(dir)?;
    ran
}
