//! No point of a graph is lost: each is found by a search for it, in graphs of ours and in those that hnsw_rs built, small and large, with
//! equal points, and after deletes and re-inserts. And a graph finds what an exact search finds.

use hnsw_rs::prelude::{Distance, Hnsw};
use proofs::command;
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

#[test]
fn every_point_of_a_thousand_small_indexes_is_found() {
    let options = GraphOptions { m: 8, ef_construction: 40 };
    let (mut points, mut ours, mut theirs, mut after) = (0, Repair::default(), Repair::default(), [0, 0]);
    let (mut indexes_ours, mut indexes_theirs) = (0, 0);
    for seed in 0..1000u64 {
        let count = 3 + (seed * 37 % 298) as usize;
        let mut vectors = clustered(count, 16, 1 + count / 20, seed);
        if seed % 5 == 0 {
            // Many that are equal.
            (0..count / 2).for_each(|at| vectors[at] = vectors[count - 1].clone());
        }
        let coded = Coded::new(&vectors);
        let (graph, order, repair) = Graph::build(&coded.points(), options, &mut |_| {});
        points += count;
        indexes_ours += (repair.missed > 0) as usize;
        ours = Repair { missed: ours.missed + repair.missed, left: ours.left + repair.left };
        after[0] += lost(&graph, &order, &coded, &vectors);
        let (graph, order, repair) = by_hnsw_rs(&vectors, &coded, options);
        indexes_theirs += (repair.missed > 0) as usize;
        theirs = Repair { missed: theirs.missed + repair.missed, left: theirs.left + repair.left };
        after[1] += lost(&graph, &order, &coded, &vectors);
    }
    println!(
        "1,000 indexes of 3 to 300 points, {points} in all; not found before and after repair, of these beside the graph:"
    );
    println!("  ours    {} in {indexes_ours} indexes, then {}; {}", ours.missed, after[0], ours.left);
    println!("  hnsw_rs {} in {indexes_theirs} indexes, then {}; {}", theirs.missed, after[1], theirs.left);
    assert_eq!(after, [0, 0]);
    assert!(theirs.missed > 0, "hnsw_rs lost nothing: the verification sees nothing");
}

#[test]
fn a_graph_is_built_the_same_twice_and_finds_what_hnsw_rs_finds_and_more() {
    let vectors = clustered(4000, 64, 40, 5);
    let queries = clustered(200, 64, 40, 5);
    let coded = Coded::new(&vectors);
    let options = GraphOptions { m: 12, ef_construction: 80 };
    let (ours, order, _) = Graph::build(&coded.points(), options, &mut |_| {});
    assert!(
        (ours.clone(), order.clone()) == {
            let (graph, order, _) = Graph::build(&coded.points(), options, &mut |_| {});
            (graph, order)
        }
    );
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
    let all_found = |known: &[Vec<f32>]| -> Result<(), StorageError> {
        for (at, vector) in known.iter().enumerate() {
            let found = shard.search(&SearchQuery {
                tenant: "t".into(),
                owners: vec![Owner::User { tenant: "t".into(), user: "u".into() }],
                vector: vector.clone(),
                space: "s".into(),
                text: String::new(),
                k: 3,
                threshold: None,
                filter: None,
                statuses: vec![],
                time: None,
                now: 0,
                with_vector: false,
            })?;
            assert_eq!(found.len(), 3);
            assert_eq!(found[0].memory.text, format!("memory {at}"), "{}", found[0].similarity);
        }
        Ok(())
    };
    apply((0..).zip(&known).map(|(id, vector)| added(id, vector)).collect())?;
    shard.seal()?;
    all_found(&known)?;
    assert!(shard.merge()?, "the scope wanted a graph");
    all_found(&known)?;
    for at in (0..COUNT).filter(|at| at % 10 < 3) {
        let Operation::Add(memory) = added(at as u64, &[]) else { continue };
        apply(vec![Operation::Delete { id: memory.id, expected_version: None }])?;
        known[at] = others[at].clone();
        apply(vec![added(at as u64, &known[at])])?;
    }
    all_found(&known)?;
    shard.seal()?;
    all_found(&known)?;
    while shard.merge()? {}
    let segments = shard.segments();
    let (rows, dead) =
        segments.values().flatten().fold((0, 0), |(r, d), (_, rows, dead)| (r + rows, d + dead));
    assert_eq!((rows, dead), (COUNT, 0), "{segments:?}");
    all_found(&known)?;
    shard.verify()
}
