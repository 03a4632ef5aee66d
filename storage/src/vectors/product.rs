//! Product quantisation: of each four dimensions of a vector only the number of the nearest among 256 points is kept, a byte.
//!
//! The points come from the vectors themselves (k-means, from a sample that lies at equal distances, so that the same vectors give the same
//! points), and serve all vectors of one dimension in a segment: a thousand vectors alone would not pay for them. A byte for four dimensions is a
//! sixth of what [`super::codes`] take, and cannot promise how far off an estimate is. So a scan keeps more than were asked for, and scores those
//! by the vectors themselves, from the records.
//!
//! Every sum has one order, and lanes are independent: all processors find the same points and the same codes.

use super::cpu::Level;

/// Dimensions that share a byte.
const PART: usize = 4;
const POINTS: usize = 256;
/// Vectors that the points are made from, at most.
const SAMPLE: usize = 8192;
const ROUNDS: usize = 8;
const LANES: usize = 16;

/// Of a part: the points' first coordinates, then their second ones, …
type Part = [[f32; POINTS]; PART];

/// Bytes of a vector's codes.
pub fn parts(dimension: usize) -> usize {
    dimension.div_ceil(PART)
}

/// Numbers in a book.
pub fn numbers(dimension: usize) -> usize {
    parts(dimension) * PART * POINTS
}

fn part_of(vector: &[f32], part: usize) -> [f32; PART] {
    std::array::from_fn(|at| vector.get(part * PART + at).copied().filter(|x| x.is_finite()).unwrap_or(0.0))
}

/// The points for all parts of vectors of one dimension.
#[derive(Clone, Copy)]
pub struct Book<'a>(&'a [Part]);

impl<'a> Book<'a> {
    /// `numbers` are as many as [`numbers`] says.
    pub fn of(numbers: &'a [f32]) -> Book<'a> {
        Book(bytemuck::cast_slice(numbers))
    }

    /// Appends a vector's codes.
    pub fn encode(&self, vector: &[f32], codes: &mut Vec<u8>) {
        let level = Level::best();
        let of = |(at, points): (usize, &Part)| nearest(level, points, &part_of(vector, at)).0 as u8;
        codes.extend(self.0.iter().enumerate().map(of));
    }
}

/// The number of the nearest point, the least of equal ones, and the square of its distance.
fn nearest(level: Level, points: &Part, of: &[f32; PART]) -> (usize, f32) {
    match level {
        Level::Portable => nearest_portable(points, of),
        // SAFETY: `level` says that the CPU has the instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe { nearest_avx2(points, of) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn nearest_avx2(points: &Part, of: &[f32; PART]) -> (usize, f32) {
    nearest_portable(points, of)
}

#[inline(always)]
fn nearest_portable(points: &Part, of: &[f32; PART]) -> (usize, f32) {
    let mut distances = [0.0f32; POINTS];
    for (coordinates, x) in points.iter().zip(of) {
        for (distance, coordinate) in distances.iter_mut().zip(coordinates) {
            let off = coordinate - x;
            *distance += off * off;
        }
    }
    // The least distance first, in lanes that need not wait for each other; then who has it.
    let mut least = [f32::INFINITY; LANES];
    for lanes in distances.as_chunks::<LANES>().0 {
        least.iter_mut().zip(lanes).for_each(|(least, distance)| *least = least.min(*distance));
    }
    let least = least.into_iter().fold(f32::INFINITY, f32::min);
    let at = distances.iter().position(|distance| *distance == least).unwrap_or(0);
    (at, least)
}

/// Makes points for vectors like these. There is at least one.
pub fn train(vectors: &[&[f32]]) -> Vec<f32> {
    let dimension = vectors[0].len();
    let taken = vectors.len().min(SAMPLE);
    let sample: Vec<&[f32]> = (0..taken).map(|at| vectors[at * vectors.len() / taken]).collect();
    let mut numbers = Vec::with_capacity(numbers(dimension));
    for part in 0..parts(dimension) {
        let own: Vec<[f32; PART]> = sample.iter().map(|vector| part_of(vector, part)).collect();
        numbers.extend_from_slice(bytemuck::cast_slice(&train_part(Level::best(), &own)));
    }
    numbers
}

fn train_part(level: Level, own: &[[f32; PART]]) -> Part {
    let mut points: Part = [[0.0; POINTS]; PART];
    let put = |points: &mut Part, at: usize, to: &[f32; PART]| {
        points.iter_mut().zip(to).for_each(|(coordinates, x)| coordinates[at] = *x);
    };
    (0..POINTS).for_each(|at| put(&mut points, at, &own[at * own.len() / POINTS]));
    for _ in 0..ROUNDS {
        let (mut sums, mut counts) = ([[0.0f32; PART]; POINTS], [0u32; POINTS]);
        let mut far: Vec<(f32, usize)> = Vec::with_capacity(own.len());
        for (at, of) in own.iter().enumerate() {
            let (point, distance) = nearest(level, &points, of);
            sums[point].iter_mut().zip(of).for_each(|(sum, x)| *sum += x);
            counts[point] += 1;
            far.push((distance, at));
        }
        let before = points;
        // A point that is nearest to none goes to where the others are farthest off.
        far.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut far = far.into_iter();
        for (at, (sum, count)) in sums.iter().zip(counts).enumerate() {
            if count > 0 {
                put(&mut points, at, &sum.map(|x| x / count as f32));
            } else if let Some((_, from)) = far.next() {
                put(&mut points, at, &own[from]);
            }
        }
        // The next round would do the same.
        if points == before {
            break;
        }
    }
    points
}

/// A query's dot product with every point of every part.
pub struct Table(Vec<[f32; POINTS]>);

impl Table {
    pub fn new(book: Book<'_>, vector: &[f32]) -> Table {
        let of = |(at, points): (usize, &Part)| {
            let mut products = [0.0f32; POINTS];
            for (coordinates, x) in points.iter().zip(part_of(vector, at)) {
                for (product, coordinate) in products.iter_mut().zip(coordinates) {
                    *product += coordinate * x;
                }
            }
            products
        };
        Table(book.0.iter().enumerate().map(of).collect())
    }

    /// The dot product with a vector of these codes.
    pub fn sum(&self, codes: &[u8]) -> f32 {
        let mut sums = [0.0f32; 4];
        for (tables, codes) in self.0.chunks(4).zip(codes.chunks(4)) {
            for (sum, (table, code)) in sums.iter_mut().zip(tables.iter().zip(codes)) {
                *sum += table[*code as usize];
            }
        }
        (sums[0] + sums[1]) + (sums[2] + sums[3])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::dot;

    fn vectors(count: usize, dimension: usize) -> Vec<Vec<f32>> {
        let one = |row: usize| (0..dimension).map(|at| ((row * 31 + at * 7) as f32 * 0.37).sin()).collect();
        (0..count).map(one).collect()
    }

    #[test]
    fn few_vectors_are_kept_as_they_are() {
        let all = vectors(200, 10);
        let borrowed: Vec<&[f32]> = all.iter().map(Vec::as_slice).collect();
        let numbers = train(&borrowed);
        let book = Book::of(&numbers);
        let table = Table::new(book, &all[3]);
        for vector in &all {
            let mut codes = vec![];
            book.encode(vector, &mut codes);
            assert_eq!(codes.len(), parts(10));
            assert!((table.sum(&codes) - dot(&all[3], vector)).abs() < 1e-4);
        }
        assert_eq!(numbers, train(&borrowed));
    }

    #[test]
    fn all_instructions_find_the_same_points() {
        for count in [1, 40, 300, 2000] {
            let own: Vec<[f32; PART]> =
                vectors(count, PART).iter().map(|vector| part_of(vector, 0)).collect();
            let found = Level::all().into_iter().map(|level| {
                let points = train_part(level, &own);
                let codes: Vec<_> = own.iter().map(|of| nearest(level, &points, of)).collect();
                (points, codes)
            });
            let found: Vec<_> = found.collect();
            assert!(found.windows(2).all(|two| two[0] == two[1]), "{count} vectors");
        }
    }

    #[test]
    fn what_is_no_number_spoils_nothing() {
        let mut all = vectors(300, 6);
        all[7][2] = f32::NAN;
        all[9][0] = f32::INFINITY;
        let borrowed: Vec<&[f32]> = all.iter().map(Vec::as_slice).collect();
        assert!(train(&borrowed).iter().all(|x| x.is_finite()));
    }
}
