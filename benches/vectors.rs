//! Vectors, against the machine and against what a user would take instead. (work in progress)
use sim::time::{Duration, Instant};
use std::error::Error;
use storage::vectors::codes::{self, Query};
use storage::vectors::cpu::Level;
use storage::vectors::dot_rows;
use storage::vectors::graph::{Graph, GraphOptions, Points};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DIM: usize = 384;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }
    /// Normal, mean 0, deviation 1 (Box and Muller).
    fn normal(&mut self) -> f32 {
        let (u, v) = (self.unit().max(1e-7), self.unit());
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    }
}

fn unit(v: &mut [f32]) {
    let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
    v.iter_mut().for_each(|x| *x /= norm);
}

fn clustered(count: usize, clusters: usize, noise: f32, seed: u64) -> Vec<f32> {
    let mut centres = Random(1);
    let mut all: Vec<f32> = (0..clusters * DIM).map(|_| centres.normal()).collect();
    all.chunks_exact_mut(DIM).for_each(unit);
    let mut random = Random(seed);
    let mut out = Vec::with_capacity(count * DIM);
    for _ in 0..count {
        let c = (random.next() % clusters as u64) as usize;
        let from = out.len();
        for x in &all[c * DIM..(c + 1) * DIM] {
            out.push(x + noise * random.normal() / (DIM as f32).sqrt());
        }
        unit(&mut out[from..]);
    }
    out
}

fn main() -> Result<()> {
    let n: usize = std::env::var("N").ok().map_or(50_000, |n| n.parse().unwrap());
    let noise: f32 = std::env::var("NOISE").ok().map_or(0.7, |n| n.parse().unwrap());
    let data = clustered(n, n / 100, noise, 2);
    let queries = clustered(1000, n / 100, noise, 3);
    if let Ok(dir) = std::env::var("OUT") {
        std::fs::write(format!("{dir}/base.f32"), bytemuck(&data))?;
        std::fs::write(format!("{dir}/query.f32"), bytemuck(&queries))?;
    }
    // kernels
    let level = Level::best();
    let (mut c, mut r, mut scales) = (vec![], vec![], vec![]);
    for v in data.chunks_exact(DIM) {
        scales.push(codes::encode(v, &mut c, &mut r).0);
    }
    let mut out = vec![0.0; 1000];
    let best = |f: &mut dyn FnMut()| {
        let mut best = Duration::MAX;
        for _ in 0..200 {
            let t = Instant::now();
            f();
            best = best.min(t.elapsed());
        }
        best
    };
    let q = Query::new(&queries[..DIM]);
    let mut sums = vec![0; 1000];
    for level in Level::all() {
        let f = best(&mut || dot_rows(level, &queries[..DIM], &data[..1000 * DIM], &mut out));
        let i = best(&mut || q.sums(level, &c[..1000 * DIM], &mut sums));
        println!("{level:?}: f32 {f:?}, int8 {i:?} for 1000 x 384");
    }
    // exact
    let mut truth = vec![];
    for q in queries.chunks_exact(DIM) {
        let mut scores = vec![0.0; n];
        dot_rows(level, q, &data, &mut scores);
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.select_nth_unstable_by(10, |a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        order.truncate(10);
        truth.push(order);
    }
    let points = Points { codes: &c, rests: &r, scales: &scales, stride: DIM, level };
    let t = Instant::now();
    let efc = std::env::var("EFC").ok().map_or(200, |n| n.parse().unwrap());
    let (graph, order, repair) =
        Graph::build(&points, GraphOptions { m: 16, ef_construction: efc }, &mut |_| {});
    println!("build {:?} {repair:?} links/row {:.1}", t.elapsed(), graph.links.len() as f64 / n as f64);
    let (mut c2, mut r2, mut s2) = (vec![], vec![], vec![]);
    for o in &order {
        let o = *o as usize;
        c2.extend_from_slice(&c[o * DIM..][..DIM]);
        r2.extend_from_slice(&r[o * DIM / 2..][..DIM / 2]);
        s2.push(scales[o]);
    }
    let points = Points { codes: &c2, rests: &r2, scales: &s2, stride: DIM, level };
    for ef in [32, 48, 64, 80, 100, 128, 200] {
        let mut found = 0;
        let t = Instant::now();
        let mut all = vec![];
        for q in queries.chunks_exact(DIM) {
            let query = Query::new(q);
            let near = graph.view().search(&points, &query, ef);
            let mut near: Vec<(f32, u32)> = near
                .into_iter()
                .take(36)
                .map(|(_, row)| {
                    let o = row as usize;
                    (
                        query.refined(level, &c2[o * DIM..][..DIM], &r2[o * DIM / 2..][..DIM / 2], s2[o]),
                        order[o],
                    )
                })
                .collect();
            near.sort_by(|a, b| b.0.total_cmp(&a.0));
            near.truncate(10);
            all.push(near);
        }
        let t = t.elapsed();
        for (near, truth) in all.iter().zip(&truth) {
            found += near.iter().filter(|(_, o)| truth.contains(o)).count();
        }
        println!(
            "ef {ef}: recall {:.4} {:.0}/s",
            found as f64 / (10.0 * truth.len() as f64),
            1000.0 / t.as_secs_f64()
        );
    }
    Ok(())
}
fn bytemuck(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| x.to_le_bytes()).collect()
}
