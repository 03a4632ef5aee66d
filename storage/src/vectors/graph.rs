//! A graph over the vectors of a large scope: hierarchical navigable small worlds (Malkov and Yashunin, 2016), built over codes.
//!
//! ```text
//! codes ─► insert one by one (levels and order drawn from a fixed seed) ─► put in visiting order, lists side by side
//!       ─► search for every point; link in what is not found, until all are ─► segment
//! ```
//!
//! **No point is lost.** Building by local choices leaves some points that no search comes to: those whose links were all given up
//! for nearer ones, and islands of equal vectors. So after the build every point is searched for by its own code; from the nearest
//! that was found instead a link is added, and the search repeated; what is still missed after [`ROUNDS`] is in the *side list*, which
//! every search compares. The same is true for a graph that another library built ([`Graph::from_levels`]).
//!
//! **Equal vectors are one point.** Texts that are embedded twice give vectors that no distance tells apart; in a graph they would link to
//! each other only, and fill a search's list with one place. So the first of them stands for all, and a search that finds it finds its *twins*.
//!
//! Row 0 is where each search begins. Rows with a higher level come first, so those of each level are the first so many rows, and
//! neighbours come near each other; twins come last. Building is sequential and draws nothing: the same rows give the same graph, bit by bit.

use super::codes::{self, Query};
use super::cpu::{Level, prefetch};
use super::rows::Rows;
use std::cell::RefCell;

/// Searches of the verification keep so many nearest; no other search keeps fewer.
const VERIFY_EF: usize = 24;
/// Rounds of repair before a point goes to the side list.
const ROUNDS: usize = 6;
const LEVELS_MAX: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GraphOptions {
    /// Links of a point on each level but the lowest, which has twice as many.
    pub m: usize,
    /// How many nearest are kept while a point's links are looked for.
    pub ef_construction: usize,
}

impl Default for GraphOptions {
    fn default() -> GraphOptions {
        GraphOptions { m: 16, ef_construction: 200 }
    }
}

/// A frozen graph over the rows of a block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// How many rows have each level; the first is all of them but the twins.
    pub levels: Vec<u32>,
    /// Where the links of each row begin and end: of level 0 one more than rows, then of level 1, …
    pub starts: Vec<u32>,
    pub links: Vec<u32>,
    /// Rows that no search comes to, in order.
    pub side: Vec<u32>,
    /// Of each row behind those, the row that stands for it; in order.
    pub twins: Vec<u32>,
}

/// The same, wherever it lies.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub levels: &'a [u32],
    pub starts: &'a [u32],
    pub links: &'a [u32],
    pub side: &'a [u32],
    pub twins: &'a [u32],
}

/// What a verification found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Repair {
    /// Points that searches did not find before and after.
    pub missed: usize,
    pub left: usize,
}

/// What a search remembers, kept by each thread for the next.
#[derive(Default)]
struct Scratch {
    /// The search in which each row was seen.
    seen: Vec<u8>,
    turn: u8,
    fresh: Vec<u32>,
    sums: Vec<i32>,
    /// The nearest so far, best first: estimate, row, and whether its links were followed.
    pool: Vec<(f32, u32, bool)>,
}

impl Scratch {
    fn begin(&mut self, rows: usize) {
        if self.seen.len() < rows || self.turn == u8::MAX {
            self.seen.clear();
            self.seen.resize(rows, 0);
            self.turn = 0;
        }
        self.turn += 1;
        self.pool.clear();
    }

    /// Puts a row among the `ef` nearest, if it is; the place that it got.
    fn offer(&mut self, estimate: f32, row: u32, ef: usize) -> usize {
        if self.pool.len() >= ef && self.pool.last().is_some_and(|last| last.0 >= estimate) {
            return usize::MAX;
        }
        let at = self.pool.partition_point(|other| other.0 >= estimate);
        if self.pool.len() >= ef {
            self.pool.pop();
        }
        self.pool.insert(at, (estimate, row, false));
        at
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What is compared: the codes of the block's rows. Their rests make the queries of the verification.
#[derive(Clone, Copy)]
pub struct Points<'a> {
    pub codes: &'a [u8],
    pub rests: &'a [u8],
    pub scales: &'a [f32],
    pub stride: usize,
    pub level: Level,
}

impl<'a> Points<'a> {
    pub fn of(rows: &Rows<'a>) -> Points<'a> {
        let stride = codes::stride(rows.dimension);
        Points { codes: rows.codes, rests: rows.rests, scales: rows.scales, stride, level: Level::best() }
    }

    fn len(&self) -> usize {
        self.scales.len()
    }

    fn row(&self, row: u32) -> &'a [u8] {
        &self.codes[row as usize * self.stride..][..self.stride]
    }

    fn rests(&self, row: u32) -> &'a [u8] {
        &self.rests[row as usize * self.stride / 2..][..self.stride / 2]
    }

    /// For building: coarse, and so done sooner.
    fn query(&self, row: u32) -> Query {
        Query::of_codes(self.row(row), self.scales[row as usize])
    }

    /// What a search for the row's own vector asks.
    fn own_query(&self, row: u32) -> Query {
        Query::of_row(self.row(row), self.rests(row), self.scales[row as usize])
    }

    fn prefetch(&self, row: u32) {
        let at = self.codes.as_ptr().wrapping_add(row as usize * self.stride);
        for line in (0..self.stride.min(512)).step_by(64) {
            prefetch(at.wrapping_add(line));
        }
    }

    fn one(&self, query: &Query, row: u32) -> f32 {
        query.estimate(query.sum(self.level, self.row(row)), self.scales[row as usize])
    }

    fn between(&self, a: u32, b: u32) -> f32 {
        let sum = codes::pair(self.level, self.row(a), self.row(b));
        sum as f32 * 256.0 * self.scales[a as usize] * self.scales[b as usize]
    }
}

/// From the rows in `scratch.pool` to the `ef` nearest that can be reached.
fn explore<'l>(
    points: &Points<'_>,
    query: &Query,
    ef: usize,
    scratch: &mut Scratch,
    links: impl Fn(u32) -> &'l [u32],
) {
    let mut next = 0;
    while let Some(entry) = scratch.pool.get_mut(next) {
        if std::mem::replace(&mut entry.2, true) {
            next += 1;
            continue;
        }
        let row = entry.1;
        let (turn, mut fresh) = (scratch.turn, std::mem::take(&mut scratch.fresh));
        fresh.clear();
        for link in links(row) {
            let seen = &mut scratch.seen[*link as usize];
            if *seen != turn {
                *seen = turn;
                fresh.push(*link);
                points.prefetch(*link);
            }
        }
        let mut sums = std::mem::take(&mut scratch.sums);
        sums.resize(sums.len().max(fresh.len()), 0);
        query.sums_of(points.level, points.codes, &fresh, &mut sums);
        let mut first = usize::MAX;
        for (row, sum) in fresh.iter().zip(&sums) {
            let estimate = query.estimate(*sum, points.scales[*row as usize]);
            first = first.min(scratch.offer(estimate, *row, ef));
        }
        (scratch.fresh, scratch.sums) = (fresh, sums);
        next = (next + 1).min(first);
    }
}

impl View<'_> {
    fn links(&self, level: usize, row: u32) -> &[u32] {
        let before: usize = self.levels[..level].iter().map(|rows| *rows as usize + 1).sum();
        let at = before + row as usize;
        &self.links[self.starts[at] as usize..self.starts[at + 1] as usize]
    }

    /// Whether it is a graph over `rows` rows, all of whose links lead somewhere.
    pub fn sound(&self, rows: usize) -> bool {
        let counts: usize = self.levels.iter().map(|count| *count as usize + 1).sum();
        let Some(points) = rows.checked_sub(self.twins.len()) else { return false };
        self.levels.first() == Some(&(points as u32))
            && self.twins.windows(2).all(|two| two[0] <= two[1])
            && self.levels.len() <= LEVELS_MAX
            && self.levels.windows(2).all(|two| two[0] >= two[1])
            && self.levels.last().is_some_and(|top| *top > 0)
            && self.starts.len() == counts
            && self.starts.windows(2).all(|two| two[0] <= two[1])
            && self.starts.last().is_none_or(|end| *end as usize == self.links.len())
            && self.links.iter().chain(self.side).chain(self.twins).all(|row| (*row as usize) < points)
    }

    /// The nearest rows by estimate, best first, at most `ef`, without the side list.
    fn nearest(&self, points: &Points<'_>, query: &Query, ef: usize, scratch: &mut Scratch) {
        let mut at = (points.one(query, 0), 0);
        for level in (1..self.levels.len()).rev() {
            loop {
                let better = self.links(level, at.1).iter().map(|row| (points.one(query, *row), *row));
                match better.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|found| found.0 > at.0) {
                    Some(found) => at = found,
                    None => break,
                }
            }
        }
        scratch.begin(points.len());
        scratch.seen[at.1 as usize] = scratch.turn;
        scratch.offer(at.0, at.1, ef);
        let starts = &self.starts[..self.levels[0] as usize + 1];
        explore(points, query, ef, scratch, |row| {
            &self.links[starts[row as usize] as usize..starts[row as usize + 1] as usize]
        });
    }

    /// The nearest rows and their estimates, best first: at least `ef`, if there are as many within reach.
    pub fn search(&self, points: &Points<'_>, query: &Query, ef: usize) -> Vec<(f32, u32)> {
        let mut found: Vec<(f32, u32)> = SCRATCH.with_borrow_mut(|scratch| {
            self.nearest(points, query, ef.max(VERIFY_EF), scratch);
            scratch.pool.iter().map(|(estimate, row, _)| (*estimate, *row)).collect()
        });
        if !self.side.is_empty() {
            found.extend(self.side.iter().map(|row| (points.one(query, *row), *row)));
            found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            found.dedup_by_key(|(_, row)| *row);
        }
        if !self.twins.is_empty() {
            found = found
                .into_iter()
                .flat_map(|(estimate, row)| self.with_twins(row).map(move |r| (estimate, r)))
                .collect();
        }
        found
    }

    /// A row, and those that it stands for.
    fn with_twins(&self, row: u32) -> impl Iterator<Item = u32> + use<> {
        let at = |end: u32| self.levels[0] + self.twins.partition_point(|of| *of < end) as u32;
        std::iter::once(row).chain(at(row)..at(row + 1))
    }

    /// Of `rows` those that a search for them does not find, each with what it finds instead. One whose place is taken by others that are
    /// just as near is not missed.
    fn missed(&self, points: &Points<'_>, rows: impl Iterator<Item = u32>) -> Vec<(u32, Vec<u32>)> {
        let mut missed = vec![];
        SCRATCH.with_borrow_mut(|scratch| {
            for row in rows {
                let query = points.own_query(row);
                self.nearest(points, &query, VERIFY_EF, scratch);
                let own = points.one(&query, row);
                let found = scratch.pool.iter().any(|(_, found, _)| *found == row)
                    || scratch.pool.len() == VERIFY_EF && scratch.pool.iter().all(|near| near.0 >= own);
                if !found {
                    missed.push((row, scratch.pool.iter().map(|near| near.1).collect()));
                }
            }
        });
        missed
    }
}

/// Lists that still change.
struct Builder<'a> {
    points: Points<'a>,
    options: GraphOptions,
    /// Of each point, of each of its levels: links and how near they are.
    lists: Vec<Vec<Vec<(f32, u32)>>>,
    entry: u32,
    /// Neighbours without what is known of them, for searches.
    plain: Vec<u32>,
    counts: Vec<u32>,
    scratch: Scratch,
}

/// Sixty-four mixed bits (Vigna's splitmix64).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Builder<'_> {
    fn links_max(&self, level: usize) -> usize {
        if level == 0 { 2 * self.options.m } else { self.options.m }
    }

    /// How high a point goes: each level has one in `m` of the one below.
    fn level_of(&self, row: u32) -> usize {
        let mut random = mixed(row as u64 ^ 0x10c1) | 1;
        let mut level = 0;
        while random.is_multiple_of(self.options.m as u64) && level + 1 < LEVELS_MAX {
            random = mixed(random);
            level += 1;
        }
        level
    }

    /// Of candidates, best first, those to link: each nearer to the point than to any that was chosen before.
    fn choose(&self, candidates: &[(f32, u32)], count: usize) -> Vec<(f32, u32)> {
        let mut chosen: Vec<(f32, u32)> = Vec::with_capacity(count);
        for candidate in candidates {
            if chosen.len() == count {
                break;
            }
            if chosen.iter().all(|other| self.points.between(candidate.1, other.1) < candidate.0) {
                chosen.push(*candidate);
            }
        }
        chosen
    }

    fn set(&mut self, level: usize, row: u32, links: Vec<(f32, u32)>) {
        if level == 0 {
            let (at, width) = (row as usize, self.links_max(0));
            self.counts[at] = links.len() as u32;
            for (place, link) in self.plain[at * width..].iter_mut().zip(&links) {
                *place = link.1;
            }
        }
        self.lists[row as usize][level] = links;
    }

    fn insert(&mut self, row: u32) {
        let top = self.level_of(row);
        self.lists[row as usize] = vec![vec![]; top + 1];
        let highest = self.lists[self.entry as usize].len() - 1;
        if row == self.entry {
            return;
        }
        let query = self.points.query(row);
        let mut at = (self.points.one(&query, self.entry), self.entry);
        for level in (top + 1..=highest).rev() {
            loop {
                let links = &self.lists[at.1 as usize][level];
                let better = links.iter().map(|(_, row)| (self.points.one(&query, *row), *row));
                match better.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|found| found.0 > at.0) {
                    Some(found) => at = found,
                    None => break,
                }
            }
        }
        let ef = self.options.ef_construction;
        let mut starts = vec![at];
        for level in (0..=top.min(highest)).rev() {
            let mut scratch = std::mem::take(&mut self.scratch);
            scratch.begin(self.points.len());
            for (estimate, row) in &starts {
                scratch.seen[*row as usize] = scratch.turn;
                scratch.offer(*estimate, *row, ef);
            }
            let width = self.links_max(0);
            if level == 0 {
                explore(&self.points, &query, ef, &mut scratch, |row| {
                    &self.plain[row as usize * width..][..self.counts[row as usize] as usize]
                });
            } else {
                self.explore_above(&query, ef, &mut scratch, level);
            }
            let found: Vec<(f32, u32)> = scratch.pool.iter().map(|near| (near.0, near.1)).collect();
            self.scratch = scratch;
            let chosen = self.choose(&found, self.options.m);
            self.set(level, row, chosen.clone());
            for (near, other) in chosen {
                let mut links = std::mem::take(&mut self.lists[other as usize][level]);
                let place = links.partition_point(|link| link.0 >= near);
                links.insert(place, (near, row));
                if links.len() > self.links_max(level) {
                    links = self.choose(&links, self.links_max(level));
                }
                self.set(level, other, links);
            }
            starts = found;
        }
        if top > highest {
            self.entry = row;
        }
    }

    /// As [`explore`], on a level whose lists are few.
    fn explore_above(&self, query: &Query, ef: usize, scratch: &mut Scratch, level: usize) {
        let mut next = 0;
        while let Some(entry) = scratch.pool.get_mut(next) {
            if std::mem::replace(&mut entry.2, true) {
                next += 1;
                continue;
            }
            let row = entry.1;
            let mut first = usize::MAX;
            for (_, link) in &self.lists[row as usize][level] {
                let seen = &mut scratch.seen[*link as usize];
                if std::mem::replace(seen, scratch.turn) != scratch.turn {
                    let estimate = self.points.one(query, *link);
                    first = first.min(scratch.offer(estimate, *link, ef));
                }
            }
            next = (next + 1).min(first);
        }
    }
}

impl Graph {
    pub fn view(&self) -> View<'_> {
        View {
            levels: &self.levels,
            starts: &self.starts,
            links: &self.links,
            side: &self.side,
            twins: &self.twins,
        }
    }

    /// Builds the graph over some rows, verified and repaired. Its rows are numbered anew: the list says which row each was.
    pub fn build(
        points: &Points<'_>,
        options: GraphOptions,
        progress: &mut dyn FnMut(usize),
    ) -> (Graph, Vec<u32>, Repair) {
        let rows = points.len();
        let first = firsts(points);
        let mut order: Vec<u32> = (0..rows as u32).filter(|row| first[*row as usize] == *row).collect();
        // Not in the order of their times: neighbours that come one after the other make a poor graph.
        order.sort_by_key(|row| mixed(*row as u64));
        let mut builder = Builder {
            points: *points,
            options,
            lists: vec![vec![]; rows],
            entry: order.first().copied().unwrap_or(0),
            plain: vec![0; rows * 2 * options.m],
            counts: vec![0; rows],
            scratch: Scratch::default(),
        };
        for (done, row) in order.into_iter().enumerate() {
            builder.insert(row);
            if done % 1024 == 0 {
                progress(done);
            }
        }
        let entry = builder.entry;
        let plain = |list: Vec<(f32, u32)>| list.into_iter().map(|(_, row)| row).collect();
        let of_levels = |levels: Vec<Vec<_>>| levels.into_iter().map(plain).collect();
        freeze(points, builder.lists.into_iter().map(of_levels).collect(), entry, &first)
    }

    /// Freezes a graph that was built elsewhere: of each point, for each of its levels, the points that it leads to. Verified and
    /// repaired as one of our own.
    pub fn from_levels(
        points: &Points<'_>,
        mut lists: Vec<Vec<Vec<u32>>>,
        mut entry: u32,
    ) -> (Graph, Vec<u32>, Repair) {
        let first = firsts(points);
        // What leads to one of equal points, or away from it, leads to the first of them.
        for row in 0..lists.len() {
            let to = first[row] as usize;
            let of_row = std::mem::take(&mut lists[row]);
            let height = of_row.len().max(lists[to].len());
            lists[to].resize(height, vec![]);
            for (level, links) in of_row.into_iter().enumerate() {
                for link in links {
                    let link = first[link as usize];
                    if link as usize != to && !lists[to][level].contains(&link) {
                        lists[to][level].push(link);
                    }
                }
            }
        }
        if let Some(of_entry) = first.get(entry as usize) {
            entry = *of_entry;
        }
        freeze(points, lists, entry, &first)
    }
}

/// Of each point the first that has the same codes.
fn firsts(points: &Points<'_>) -> Vec<u32> {
    let mut known = std::collections::HashMap::with_capacity(points.len());
    let row =
        |row: u32| *known.entry((points.row(row), points.scales[row as usize].to_bits())).or_insert(row);
    (0..points.len() as u32).map(row).collect()
}

/// Lists of links, each row's by level, in their final order and shape.
fn freeze(
    points: &Points<'_>,
    lists: Vec<Vec<Vec<u32>>>,
    entry: u32,
    first: &[u32],
) -> (Graph, Vec<u32>, Repair) {
    let rows = lists.len();
    if rows == 0 {
        return (Graph { levels: vec![0], starts: vec![0], ..Graph::default() }, vec![], Repair::default());
    }
    let mut order = visiting_order(&lists, entry, first);
    let distinct = order.len();
    let mut place = vec![0u32; rows];
    order.iter().enumerate().for_each(|(new, old)| place[*old as usize] = new as u32);
    let mut twins: Vec<(u32, u32)> = (0..)
        .zip(first)
        .filter(|(row, first)| row != *first)
        .map(|(row, first)| (place[*first as usize], row))
        .collect();
    twins.sort_unstable();
    order.extend(twins.iter().map(|(_, row)| *row));
    let highest = lists[entry as usize].len();
    let count =
        |level: usize| order[..distinct].iter().filter(|row| lists[**row as usize].len() > level).count();
    let levels: Vec<u32> =
        (0..highest.max(1)).map(|level| if level == 0 { distinct } else { count(level) } as u32).collect();
    let mut frozen: Vec<Vec<Vec<u32>>> = vec![];
    for (level, count) in levels.iter().enumerate() {
        let of = |old: &u32| {
            let links = lists[*old as usize].get(level).into_iter().flatten();
            // A link to where this level does not reach leads nowhere.
            let there = links.filter(|to| level == 0 || lists[**to as usize].len() > level);
            there.map(|to| place[*to as usize]).collect()
        };
        frozen.push(order[..*count as usize].iter().map(of).collect());
    }
    drop(lists);
    // The points in their new order, as the graph will be searched.
    let mut codes = Vec::with_capacity(points.codes.len());
    order[..distinct].iter().for_each(|old| codes.extend_from_slice(points.row(*old)));
    let mut rests = Vec::with_capacity(points.rests.len());
    order[..distinct].iter().for_each(|old| rests.extend_from_slice(points.rests(*old)));
    let scales: Vec<f32> = order[..distinct].iter().map(|old| points.scales[*old as usize]).collect();
    let points = Points { codes: &codes, rests: &rests, scales: &scales, ..*points };
    let (graph, repair) = repaired(&points, levels, frozen);
    (Graph { twins: twins.into_iter().map(|(of, _)| of).collect(), ..graph }, order, repair)
}

/// Links in what searches do not find.
fn repaired(points: &Points<'_>, levels: Vec<u32>, mut lists: Vec<Vec<Vec<u32>>>) -> (Graph, Repair) {
    let all = 0..points.len() as u32;
    let mut graph = flat(levels, &lists);
    let mut missed = graph.view().missed(points, all.clone());
    let mut repair = Repair { missed: missed.len(), left: 0 };
    for round in 0..ROUNDS {
        if missed.is_empty() {
            break;
        }
        for (row, found) in &missed {
            // Each round from another one, should one link not be enough.
            let from = found.iter().filter(|from| *from != row).cycle().nth(round);
            if let Some(from) = from
                && !lists[0][*from as usize].contains(row)
            {
                lists[0][*from as usize].push(*row);
            }
        }
        graph = flat(graph.levels, &lists);
        missed = graph.view().missed(points, missed.iter().map(|(row, _)| *row));
    }
    if repair.missed > 0 {
        // A link more can lead a search past what it found before.
        missed = graph.view().missed(points, all);
    }
    graph.side = missed.iter().map(|(row, _)| *row).collect();
    repair.left = graph.side.len();
    (graph, repair)
}

fn flat(levels: Vec<u32>, lists: &[Vec<Vec<u32>>]) -> Graph {
    let (mut starts, mut links) = (vec![], vec![]);
    for level in lists {
        for list in level {
            starts.push(links.len() as u32);
            links.extend_from_slice(list);
        }
        starts.push(links.len() as u32);
    }
    Graph { levels, starts, links, side: vec![], twins: vec![] }
}

/// Points but for the twins: higher levels first, the entry before all; within a level as a search comes to them.
fn visiting_order(lists: &[Vec<Vec<u32>>], entry: u32, first: &[u32]) -> Vec<u32> {
    let mut order = Vec::with_capacity(lists.len());
    let mut seen: Vec<bool> = first.iter().enumerate().map(|(row, first)| row != *first as usize).collect();
    let roots = std::iter::once(entry).chain(0..lists.len() as u32);
    for root in roots {
        if std::mem::replace(&mut seen[root as usize], true) {
            continue;
        }
        let mut at = order.len();
        order.push(root);
        while let Some(row) = order.get(at).copied() {
            at += 1;
            for link in lists[row as usize].first().into_iter().flatten() {
                if !std::mem::replace(&mut seen[*link as usize], true) {
                    order.push(*link);
                }
            }
        }
    }
    order.sort_by_key(|row| (*row != entry, std::cmp::Reverse(lists[*row as usize].len())));
    order
}
