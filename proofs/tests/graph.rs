//! No point of a graph is lost: each is found by a search for it, in graphs of ours and in those that hnsw_rs built, small and large, with
//! equal points, and after deletes and re-inserts. And a graph finds what an exact search finds.

use hnsw_rs::prelude::{Distance, Hnsw};
use proofs::{MONTHS, command};
use sim::disk::Disk;
use sim::disk::simulated::SimDisk;
use std::sync::Arc;
use storage::model::*;
use storage::vectors::codes::{self, Query};
use storage::vectors::cpu::Level;
use storage::vectors::graph::{Graph, GraphOptions, Points, Repair};
use storage::vectors::{VectorOptions, dot};
use storage::{Entry, SearchQuery, Shard, ShardOptions, StorageError};

/// Bits from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal: the sum of four uniform numbers.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f32 / 32_768.0 - 1.0).sum()
    }
}

/// Unit vectors around centres.
fn clustered(count: usize, dimension: usize, clusters: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut random = Random(seed);
    let mut draw = |_| -> Vec<f32> { (0..dimension).map(|_| random.normal()).collect() };
    let centres: Vec<Vec<f32>> = (0..clusters).map(&mut draw).collect();
    let one = |at: usize| {
        let noise = draw(at);
        let raw: Vec<f32> = centres[at * 7 % clusters].iter().zip(noise).map(|(c, n)| c + 0.7 * n).collect();
        let norm = dot(&raw, &raw).sqrt();
        raw.into_iter().map(|x| x / norm).collect()
    };
    (0..count).map(one).collect()
}

/// Encoded vectors.
struct Coded {
    codes: Vec<u8>,
    rests: Vec<u8>,
    scales: Vec<f32>,
    stride: usize,
}

impl Coded {
    fn new(vectors: &[Vec<f32>]) -> Coded {
        let (mut codes, mut rests) = (vec![], vec![]);
        let scales = vectors.iter().map(|v| codes::encode(v, &mut codes, &mut rests).0).collect();
        Coded { codes, rests, scales, stride: codes::stride(vectors[0].len()) }
    }

    fn points(&self) -> Points<'_> {
        Points {
            codes: &self.codes,
            rests: &self.rests,
            scales: &self.scales,
            stride: self.stride,
            level: Level::best(),
        }
    }

    fn renumbered(&self, order: &[u32]) -> Coded {
        let of = |column: &[u8], width: usize| -> Vec<u8> {
            order.iter().flat_map(|old| column[*old as usize * width..][..width].to_vec()).collect()
        };
        let (codes, rests) = (of(&self.codes, self.stride), of(&self.rests, self.stride / 2));
        let scales = order.iter().map(|old| self.scales[*old as usize]).collect();
        Coded { codes, rests, scales, ..*self }
    }
}

/// Points that a search for their own vector does not find, though nothing nearer is found in their place.
fn lost(graph: &Graph, order: &[u32], coded: &Coded, vectors: &[Vec<f32>]) -> usize {
    let coded = coded.renumbered(order);
    let missed = |(row, old): (u32, &u32)| {
        let vector = &vectors[*old as usize];
        let found = graph.view().search(&coded.points(), &Query::new(vector), 64);
        let equal = found.iter().filter(|(_, other)| vectors[order[*other as usize] as usize] == *vector);
        !found.iter().any(|(_, other)| *other == row) && equal.count() < found.len().min(64)
    };
    (0..).zip(order).filter(|at| missed(*at)).count()
}

#[derive(Clone)]
struct Cosine;

impl Distance<f32> for Cosine {
    fn eval(&self, a: &[f32], b: &[f32]) -> f32 {
        (1.0 - dot(a, b)).max(0.0)
    }
}

/// What hnsw_rs builds, frozen and repaired.
fn by_hnsw_rs(vectors: &[Vec<f32>], coded: &Coded, options: GraphOptions) -> (Graph, Vec<u32>, Repair) {
    let hnsw = Hnsw::<f32, Cosine>::new(options.m, vectors.len(), 16, options.ef_construction, Cosine);
    vectors.iter().enumerate().for_each(|(at, vector)| hnsw.insert((vector, at)));
    let mut lists = vec![vec![]; vectors.len()];
    let (mut entry, mut highest) = (0, 0);
    for point in hnsw.get_point_indexation() {
        let (at, level) = (point.get_origin_id(), point.get_point_id().0 as usize);
        if level > highest {
            (entry, highest) = (at as u32, level);
        }
        let of = |links: &Vec<hnsw_rs::hnsw::Neighbour>| links.iter().map(|n| n.d_id as u32).collect();
        lists[at] = point.get_neighborhood_id()[..=level].iter().map(of).collect();
    }
    Graph::from_levels(&coded.points(), lists, entry)
}

fn user() -> Owner {
    Owner::User { tenant: "t".into(), user: "u".into() }
}

/// What a builder's graphs missed, over many indexes.
#[derive(Default)]
struct Tally {
    indexes: usize,
    repair: Repair,
    after: usize,
}

impl Tally {
    fn count(
        &mut self,
        (graph, order, repair): &(Graph, Vec<u32>, Repair),
        coded: &Coded,
        vectors: &[Vec<f32>],
    ) {
        self.indexes += (repair.missed > 0) as usize;
        self.repair.missed += repair.missed;
        self.repair.left += repair.left;
        self.after += lost(graph, order, coded, vectors);
    }

    fn print(&self, builder: &str, when: &str) {
        println!(
            "  {builder:8} {when:27} {:5} in {:3} indexes before, {} after; {} of them beside the graph",
            self.repair.missed, self.indexes, self.after, self.repair.left
        );
    }
}

#[test]
fn every_point_of_a_thousand_small_indexes_is_found() {
    let options = GraphOptions { m: 8, ef_construction: 40 };
    let mut points = 0;
    // Fresh, with equal points among them, and both after deletes and inserts; of Loci and of hnsw_rs.
    let mut tallies: [[Tally; 2]; 4] = Default::default();
    for seed in 0..1000u64 {
        let count = 3 + (seed * 37 % 298) as usize;
        let mut vectors = clustered(count, 16, 1 + count / 20, seed);
        let equal = seed % 5 == 0;
        if equal {
            (0..count / 2).for_each(|at| vectors[at] = vectors[count - 1].clone());
        }
        points += count;
        for again in [false, true] {
            if again {
                // Three in ten are deleted, and as many others come behind the rest.
                let others = clustered(count, 16, 1 + count / 20, seed + 1_000_000);
                let gone = |at: usize| at % 10 < 3;
                let kept = (0..count).filter(|at| !gone(*at)).map(|at| vectors[at].clone());
                let came = (0..count).filter(|at| gone(*at)).map(|at| others[at].clone());
                vectors = kept.chain(came).collect();
            }
            let coded = Coded::new(&vectors);
            let of = &mut tallies[2 * again as usize + equal as usize];
            of[0].count(&Graph::build(&coded.points(), options, &mut |_| {}), &coded, &vectors);
            of[1].count(&by_hnsw_rs(&vectors, &coded, options), &coded, &vectors);
        }
    }
    println!("1,000 indexes of 3 to 300 points, {points} in all; not found before and after repair:");
    let when = [
        "800, all points distinct",
        "200, half of them equal",
        "800, 30 % deleted, put again",
        "200, likewise",
    ];
    for (when, [ours, theirs]) in when.iter().zip(&tallies) {
        ours.print("loci", when);
        theirs.print("hnsw_rs", when);
        assert_eq!((ours.after, theirs.after), (0, 0), "{when}");
    }
    let theirs: usize = tallies.iter().map(|[_, theirs]| theirs.repair.missed).sum();
    assert!(theirs > 0, "hnsw_rs lost nothing: the verification sees nothing");
}

#[test]
fn a_graph_is_built_the_same_twice_and_finds_what_hnsw_rs_finds_and_more() {
    let vectors = clustered(4000, 64, 40, 5);
    let queries = clustered(200, 64, 40, 5);
    let coded = Coded::new(&vectors);
    let options = GraphOptions { m: 12, ef_construction: 80 };
    let (ours, order, _) = Graph::build(&coded.points(), options, &mut |_| {});
    // On every processor too.
    for level in Level::all() {
        let (graph, again, _) = Graph::build(&Points { level, ..coded.points() }, options, &mut |_| {});
        assert!(graph == ours && again == order, "another graph by {level:?}");
    }
    assert_eq!(lost(&ours, &order, &coded, &vectors), 0);
    let recall = |graph: &Graph, order: &[u32]| {
        let coded = coded.renumbered(order);
        let mut found = 0;
        for query in &queries {
            let mut exact: Vec<(f32, u32)> =
                (0..).zip(&vectors).map(|(row, vector)| (dot(query, vector), row)).collect();
            exact.sort_by(|a, b| b.0.total_cmp(&a.0));
            let near = graph.view().search(&coded.points(), &Query::new(query), 64);
            let near: Vec<u32> = near.iter().take(20).map(|(_, row)| order[*row as usize]).collect();
            found += exact[..10].iter().filter(|(_, row)| near.contains(row)).count();
        }
        found as f64 / (10 * queries.len()) as f64
    };
    let (theirs, their_order, _) = by_hnsw_rs(&vectors, &coded, options);
    let (ours, theirs) = (recall(&ours, &order), recall(&theirs, &their_order));
    println!("recall of ten among twenty by codes: {ours:.4}, on the graph of hnsw_rs {theirs:.4}");
    assert!(ours >= 0.99 && ours >= theirs - 0.005, "{ours} {theirs}");
}

fn added(id: u64, vector: &[f32]) -> Operation {
    let mut short = [0; 16];
    short[..8].copy_from_slice(&id.to_be_bytes());
    Operation::Add(Memory { id: short, vector: vector.to_vec(), ..proofs::memory(1, format!("memory {id}")) })
}

/// Through the whole view: a scope with a graph, of which 30 % are deleted and inserted again elsewhere.
#[test]
fn every_memory_of_a_large_scope_is_found_after_deletes_and_inserts() -> Result<(), StorageError> {
    const COUNT: usize = 1500;
    let disk: Arc<dyn Disk> = SimDisk::new(1);
    let vectors = VectorOptions {
        graph_rows_min: 400,
        graph: GraphOptions { m: 8, ef_construction: 60 },
        merge_segments: 2,
        ..VectorOptions::default()
    };
    let shard = Shard::open(disk, "views", ShardOptions { vectors, ..ShardOptions::default() })?;
    let mut known = clustered(COUNT, 48, 15, 9);
    let others = clustered(COUNT, 48, 15, 10);
    let mut index = 0;
    let mut apply = |operations: Vec<Operation>| -> Result<(), StorageError> {
        index += 1;
        let commands = operations.into_iter().map(|o| command(String::new(), o)).collect();
        let outcomes = shard.apply(&[Entry { epoch: 1, index, batch: Some(&Batch { commands }) }], b"")?;
        assert!(outcomes[0].iter().all(|o| matches!(o, Outcome::Done { .. })), "{outcomes:?}");
        Ok(())
    };
    println!("a scope of {COUNT} through the view; searches for each of its memories that did not find it:");
    let all_found = |when: &str, known: &[Vec<f32>]| -> Result<(), StorageError> {
        let mut missed = 0;
        for (at, vector) in known.iter().enumerate() {
            let found =
                shard.search(&SearchQuery { k: 3, ..proofs::search(vec![user()], vector.clone()) })?;
            assert_eq!(found.len(), 3);
            missed += (found[0].memory.text != format!("memory {at}")) as usize;
        }
        println!("  {when:44} {missed}");
        assert_eq!(missed, 0, "{when}");
        Ok(())
    };
    apply((0..).zip(&known).map(|(id, vector)| added(id, vector)).collect())?;
    shard.seal()?;
    all_found("scanned", &known)?;
    assert!(shard.merge()?, "the scope wanted a graph");
    all_found("with a graph", &known)?;
    for at in (0..COUNT).filter(|at| at % 10 < 3) {
        let Operation::Add(memory) = added(at as u64, &[]) else { continue };
        apply(vec![Operation::Delete { id: memory.id, expected_version: None }])?;
        known[at] = others[at].clone();
        apply(vec![added(at as u64, &known[at])])?;
    }
    all_found("30 % deleted in the graph, and put in memory", &known)?;
    shard.seal()?;
    all_found("and sealed", &known)?;
    while shard.merge()? {}
    let segments = shard.segments();
    let (rows, dead) =
        segments.values().flatten().fold((0, 0), |(r, d), (_, rows, dead)| (r + rows, d + dead));
    assert_eq!((rows, dead), (COUNT, 0), "{segments:?}");
    all_found("and merged into another graph", &known)?;
    shard.verify()
}

/// A graph with filters of every selectivity, states, expiries and the dead in it: as many are found as there are, and the nearest of them.
#[test]
fn filters_over_a_graph_find_k_while_k_exist_and_the_nearest() -> Result<(), StorageError> {
    const COUNT: usize = 4000;
    const NOW: UnixMs = MONTHS[1] + 1000;
    let disk: Arc<dyn Disk> = SimDisk::new(1);
    let vectors = VectorOptions {
        graph_rows_min: 400,
        graph: GraphOptions { m: 12, ef_construction: 80 },
        ..VectorOptions::default()
    };
    let shard = Shard::open(disk, "views", ShardOptions { vectors, ..ShardOptions::default() })?;
    let known = clustered(COUNT, 48, 40, 21);
    let part = |at: usize| (at * 7919 + 13) % 1000;
    let archived = |at: usize| at % 4 == 1;
    let expired = |at: usize| at % 3 == 2;
    let dead = |at: usize| at % 20 < 3;
    let mut index = 0;
    let mut apply = |operations: Vec<Operation>| {
        index += 1;
        let commands = operations.into_iter().map(|o| command(String::new(), o)).collect();
        shard.apply(&[Entry { epoch: 1, index, batch: Some(&Batch { commands }) }], b"").map(drop)
    };
    let id = |at: usize| {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(at as u64).to_be_bytes());
        id
    };
    let memory = |at: usize| Memory {
        id: id(at),
        vector: known[at].clone(),
        metadata: format!(r#"{{"part": {}}}"#, part(at)),
        status: if archived(at) { Status::Archived } else { Status::Active },
        expires: expired(at).then_some(NOW),
        ..proofs::memory(1, format!("memory {at}"))
    };
    for first in (0..COUNT).step_by(500) {
        apply((first..first + 500).map(|at| Operation::Add(memory(at))).collect())?;
    }
    shard.seal()?;
    while shard.merge()? {}
    let deleted = (0..COUNT).filter(|at| dead(*at));
    apply(deleted.map(|at| Operation::Delete { id: id(at), expected_version: None }).collect())?;
    assert_eq!(shard.segments().values().map(Vec::len).sum::<usize>(), 1);
    let queries = clustered(15, 48, 40, 21);
    let (mut least, mut conditions) = ([f64::MAX; 2], 0);
    for (statuses, now) in [
        (vec![Status::Active, Status::Archived], 0),
        (vec![Status::Active, Status::Archived], NOW),
        (vec![Status::Archived], 0),
        (vec![Status::Archived], NOW),
    ] {
        for below in [1000, 700, 300, 150, 120, 50, 10, 1] {
            let field = Field::Metadata("part".into());
            let value = Value::Number(below as f64);
            let filter = (below < 1000).then_some(Filter::Compare { field, op: CompareOp::Lt, value });
            let there = |at: &usize| {
                !dead(*at)
                    && part(*at) < below
                    && (statuses.len() == 2 || archived(*at))
                    && !(expired(*at) && now >= NOW)
            };
            let wanted: Vec<usize> = (0..COUNT).filter(there).collect();
            for k in [10, 100] {
                let (mut right, mut all) = (0, 0);
                for query in &queries {
                    let found = shard.search(&SearchQuery {
                        k,
                        filter: filter.clone(),
                        statuses: statuses.clone(),
                        now,
                        ..proofs::search(vec![user()], query.clone())
                    })?;
                    assert_eq!(found.len(), k.min(wanted.len()), "part < {below}, {statuses:?} at {now}");
                    let mut exact: Vec<(f32, MemoryId)> =
                        wanted.iter().map(|at| (dot(query, &known[*at]), id(*at))).collect();
                    exact.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                    exact.truncate(k);
                    all += exact.len();
                    right +=
                        exact.iter().filter(|(_, id)| found.iter().any(|hit| hit.memory.id == *id)).count();
                }
                let recall = right as f64 / all as f64;
                least[(k > 10) as usize] = least[(k > 10) as usize].min(recall);
                conditions += 1;
                assert!(recall >= 0.95, "part < {below}, {statuses:?} at {now}, k {k}: {recall}");
            }
        }
    }
    let [ten, hundred] = least;
    println!(
        "{conditions} conditions that 0.1 to 85 % of {COUNT} meet: all found that there are; least recall {ten:.4} for k 10, {hundred:.4} for k 100"
    );
    Ok(())
}
