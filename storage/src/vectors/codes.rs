//! Vectors as small integers, with a proven bound on what that costs.
//!
//! A vector `x` becomes twelve-bit integers `v = round(x / scale)`, `|v| ≤ 2039`, kept in two parts: a byte `round(v / 16)` (the *code*, stored
//! plus 128) and the rest, four signed bits (the *rest*, stored plus 8). A scan reads codes only; what looks near is looked at again with
//! the rest, or in the original. A query becomes twelve-bit integers too, kept as two signed bytes `16·high + low`, which the CPU's
//! byte dot products take. Everything is summed in integers, so every path gives the same value, in any order.
//!
//! **The bound.** With `x̂` and `q̂` for what the integers stand for, `|q·x − q̂·x̂| ≤ |q − q̂|·|x| + |q̂|·|x − x̂|` (Cauchy–Schwarz). The four norms
//! are measured, not estimated, and rounded up; a little is added for the rounding of f32 sums themselves. A scan that keeps everything within
//! twice the bound of its k-th best has the true k best among it.

use super::cpu::Level;

/// Rows that are summed at a time; where they lie side by side, each is of a part of its own: a processor fetches ahead in several places
/// at once, but in none of them beyond a page.
const STREAMS: u32 = 4;
/// Bytes that are fetched before they are needed where rows lie side by side.
const AHEAD: usize = 4096;
/// Codes are padded with zeroes to a multiple of this many.
pub const LINE: usize = 64;
/// The largest twelve-bit integer: its code is 127, its rest 7.
const MAX: f32 = 2039.0;

/// Bytes of a row of codes.
pub fn stride(dimension: usize) -> usize {
    dimension.next_multiple_of(LINE)
}

/// What is lost by encoding one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// |x|, rounded up.
    pub norm: f32,
    /// |x − x̂| of the codes alone, rounded up.
    pub coarse: f32,
    /// |x − x̂| of codes with rests, rounded up.
    pub fine: f32,
}

impl Loss {
    pub fn max(self, other: Loss) -> Loss {
        let (norm, coarse, fine) =
            (self.norm.max(other.norm), self.coarse.max(other.coarse), self.fine.max(other.fine));
        Loss { norm, coarse, fine }
    }
}

fn round_up(x: f64) -> f32 {
    (x as f32 * (1.0 + 1e-6)).next_up()
}

/// Twelve-bit integers and their scale. What is not finite counts as 0.
fn quantise(vector: &[f32]) -> (impl Iterator<Item = i32> + '_, f32) {
    let largest = vector.iter().filter(|x| x.is_finite()).fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = if largest > f32::MIN_POSITIVE * MAX { largest / MAX } else { 1.0 };
    // Adding this leaves no place for a fraction: it rounds ties to even, without a call where the processor has no instruction.
    const WHOLE: f32 = 12_582_912.0;
    let integer = move |x: &f32| ((x / scale).clamp(-MAX, MAX) + WHOLE - WHOLE) as i32;
    (vector.iter().map(integer), scale)
}

/// The code and the rest of a twelve-bit integer.
fn split(v: i32) -> (i32, i32) {
    let code = (v + 8) >> 4;
    (code, v - 16 * code)
}

/// Appends a vector's codes and rests, padded; its scale, and what was lost.
pub fn encode(vector: &[f32], codes: &mut Vec<u8>, rests: &mut Vec<u8>) -> (f32, Loss) {
    let (integers, scale) = quantise(vector);
    let (first_code, first_rest) = (codes.len(), rests.len());
    codes.resize(first_code + stride(vector.len()), 128);
    rests.resize(first_rest + stride(vector.len()) / 2, 0x88);
    let (mut norm, mut coarse, mut fine) = (0.0f64, 0.0f64, 0.0f64);
    for (at, (v, x)) in integers.zip(vector).enumerate() {
        let (code, rest) = split(v);
        codes[first_code + at] = (code + 128) as u8;
        // Of 64 rests, the first 32 are the low halves of 32 bytes, the others the high ones.
        let byte = &mut rests[first_rest + at / LINE * 32 + at % 32];
        let shift = at % LINE / 32 * 4;
        *byte = (*byte & !(15 << shift)) | (((rest + 8) as u8) << shift);
        let (x, scale) = (*x as f64, scale as f64);
        norm += x * x;
        coarse += (x - scale * (16 * code) as f64).powi(2);
        fine += (x - scale * v as f64).powi(2);
    }
    let loss =
        Loss { norm: round_up(norm.sqrt()), coarse: round_up(coarse.sqrt()), fine: round_up(fine.sqrt()) };
    (scale, loss)
}

/// A query, encoded.
pub struct Query {
    /// `16·high + low` is the integer; padded with zeroes. All of `low` is zero if it is empty.
    high: Vec<i8>,
    low: Vec<i8>,
    wide: Vec<i16>,
    sum: i32,
    scale: f32,
    /// |q̂| and |q − q̂|, rounded up.
    norm: f32,
    lost: f32,
    dimension: usize,
}

impl Query {
    pub fn new(vector: &[f32]) -> Query {
        let (integers, scale) = quantise(vector);
        let stride = stride(vector.len());
        let (mut high, mut low, mut wide) = (vec![0; stride], vec![0; stride], vec![0; stride]);
        let (mut sum, mut norm, mut lost) = (0, 0.0f64, 0.0f64);
        for (at, (v, x)) in integers.zip(vector).enumerate() {
            let (h, l) = split(v);
            (high[at], low[at], wide[at]) = (h as i8, l as i8, v as i16);
            sum += v;
            let kept = scale as f64 * v as f64;
            norm += kept * kept;
            lost += (*x as f64 - kept).powi(2);
        }
        let (norm, lost) = (round_up(norm.sqrt()), round_up(lost.sqrt()));
        Query { high, low, wide, sum, scale, norm, lost, dimension: vector.len() }
    }

    /// A row as a query: the same that [`Query::new`] makes of its vector.
    pub fn of_row(codes: &[u8], rests: &[u8], scale: f32) -> Query {
        let rest = |at: usize| (rests[at / LINE * 32 + at % 32] >> (at % LINE / 32 * 4) & 15) as i8 - 8;
        let low: Vec<i8> = (0..codes.len()).map(rest).collect();
        let mut query = Query::of_codes(codes, scale);
        query.wide.iter_mut().zip(&low).for_each(|(wide, rest)| *wide += *rest as i16);
        query.sum = query.wide.iter().map(|v| *v as i32).sum();
        Query { low, ..query }
    }

    /// A row of codes as a query, for comparing rows with each other.
    pub fn of_codes(codes: &[u8], scale: f32) -> Query {
        let high: Vec<i8> = codes.iter().map(|c| (*c ^ 128) as i8).collect();
        let wide: Vec<i16> = high.iter().map(|h| *h as i16 * 16).collect();
        let sum = wide.iter().map(|v| *v as i32).sum();
        Query { high, low: vec![], wide, sum, scale, norm: 0.0, lost: 0.0, dimension: codes.len() }
    }

    /// How far an estimate can be from the f32 dot product of a vector that lost as much as `loss` by its codes.
    pub fn bound(&self, loss: &Loss) -> f32 {
        self.bound_of(loss, loss.coarse)
    }

    /// The same for estimates by codes and rests.
    pub fn fine_bound(&self, loss: &Loss) -> f32 {
        self.bound_of(loss, loss.fine)
    }

    fn bound_of(&self, loss: &Loss, lost: f32) -> f32 {
        let exact = self.lost as f64 * loss.norm as f64 + self.norm as f64 * lost as f64;
        // An f32 sum over `dimension / 32 + 6` roundings, and those of the estimate itself.
        let roundings = (self.dimension / 32 + 16) as f64 * f32::EPSILON as f64;
        let both = (self.norm + self.lost) as f64 * loss.norm as f64;
        round_up(exact + roundings * both)
    }

    /// What a sum of integers stands for, with a row's scale.
    #[inline]
    pub fn estimate(&self, sum: i32, scale: f32) -> f32 {
        sum as f32 * (16.0 * self.scale * scale)
    }

    /// The sums of integers of many rows of codes, one behind the other.
    pub fn sums(&self, level: Level, codes: &[u8], out: &mut [i32]) {
        assert_eq!(codes.len(), self.high.len() * out.len(), "rows and results differ in number");
        let (count, part) = (out.len() as u32, out.len() as u32 / STREAMS);
        let rows = (0..count).map(|turn| match turn < part * STREAMS {
            true => turn % STREAMS * part + turn / STREAMS,
            false => turn,
        });
        // SAFETY: there is a row for each place of `out`.
        unsafe { self.sums_at::<AHEAD>(level, codes, rows.map(|row| (row, row)), out) }
    }

    /// The sums of some rows.
    pub fn sums_of(&self, level: Level, codes: &[u8], rows: &[u32], out: &mut [i32]) {
        let count = codes.len() / self.high.len();
        assert!(rows.iter().all(|row| (*row as usize) < count), "there are {count} rows");
        assert!(rows.len() <= out.len(), "as many results as rows");
        // SAFETY: the rows are there, as was just asserted.
        unsafe { self.sums_at::<0>(level, codes, rows.iter().copied().zip(0..rows.len() as u32), out) }
    }

    /// Rows, and where in `out` their sums go. What lies so many bytes behind each row is fetched already.
    ///
    /// # Safety
    /// `codes` has all the rows, and `out` a place for each.
    unsafe fn sums_at<const AHEAD: usize>(
        &self,
        level: Level,
        codes: &[u8],
        rows: impl ExactSizeIterator<Item = (u32, u32)>,
        out: &mut [i32],
    ) {
        let stride = self.high.len();
        match level {
            Level::Portable => {
                for (row, place) in rows {
                    out[place as usize] = sum_portable(&self.wide, &codes[row as usize * stride..][..stride]);
                }
            }
            // SAFETY: `level` says that the CPU has the instructions; the rows are there.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { sums_avx2(self, codes, rows, out) },
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { sums_avx512::<AHEAD>(self, codes, rows, out) },
        }
    }

    /// The sum of one row.
    #[inline]
    pub fn sum(&self, level: Level, codes: &[u8]) -> i32 {
        let mut out = [0];
        self.sums_of(level, codes, &[0], &mut out);
        out[0]
    }

    /// What a row's codes and rests stand for.
    pub fn refined(&self, level: Level, codes: &[u8], rests: &[u8], scale: f32) -> f32 {
        assert_eq!(rests.len() * 2, self.high.len(), "the rests of one row");
        let rest = match level {
            Level::Portable => rest_portable(&self.wide, rests),
            // SAFETY: `level` says that the CPU has the instructions; the lengths were just compared.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { rest_avx2(&self.wide, rests) },
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { rest_avx2(&self.wide, rests) },
        };
        let all = 16 * self.sum(level, codes) as i64 + (rest - 8 * self.sum) as i64;
        all as f32 * (self.scale * scale)
    }
}

fn sum_portable(wide: &[i16], row: &[u8]) -> i32 {
    wide.iter().zip(row).map(|(q, c)| *q as i32 * (*c as i32 - 128)).sum()
}

/// The sum with rests as they are stored, plus 8.
fn rest_portable(wide: &[i16], rests: &[u8]) -> i32 {
    let line = |(q, rests): (&[i16], &[u8])| -> i32 {
        let halves = rests.iter().zip(&q[..32]).zip(&q[32..]);
        halves.map(|((r, low), high)| (r & 15) as i32 * *low as i32 + (r >> 4) as i32 * *high as i32).sum()
    };
    wide.chunks_exact(LINE).zip(rests.chunks_exact(LINE / 2)).map(line).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn rest_avx2(wide: &[i16], rests: &[u8]) -> i32 {
    use std::arch::x86_64::*;
    let mut sum = _mm256_setzero_si256();
    let fifteen = _mm256_set1_epi8(15);
    for line in 0..rests.len() / 32 {
        // SAFETY: 32 rests and 64 integers of the query belong to each line; unaligned loads are allowed.
        unsafe {
            let packed = _mm256_loadu_si256(rests.as_ptr().add(32 * line).cast());
            let halves = [
                _mm256_and_si256(packed, fifteen),
                _mm256_and_si256(_mm256_srli_epi16::<4>(packed), fifteen),
            ];
            for (half, bytes) in halves.into_iter().enumerate() {
                let q = wide.as_ptr().add(LINE * line + 32 * half);
                let first = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes));
                let second = _mm256_cvtepu8_epi16(_mm256_extracti128_si256::<1>(bytes));
                let first = _mm256_madd_epi16(first, _mm256_loadu_si256(q.cast()));
                let second = _mm256_madd_epi16(second, _mm256_loadu_si256(q.add(16).cast()));
                sum = _mm256_add_epi32(sum, _mm256_add_epi32(first, second));
            }
        }
    }
    sum_avx2(sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(eight: std::arch::x86_64::__m256i) -> i32 {
    use std::arch::x86_64::*;
    let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn sums_avx2(query: &Query, codes: &[u8], rows: impl Iterator<Item = (u32, u32)>, out: &mut [i32]) {
    use std::arch::x86_64::*;
    let stride = query.wide.len();
    for (row, place) in rows {
        let row = &codes[row as usize * stride..][..stride];
        let mut sums = [_mm256_setzero_si256(); 4];
        for at in (0..stride).step_by(LINE) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 64 <= stride` and `i < 4`; unaligned loads are allowed.
                unsafe {
                    let code = _mm_loadu_si128(row.as_ptr().add(at + 16 * i).cast());
                    let q = _mm256_loadu_si256(query.wide.as_ptr().add(at + 16 * i).cast());
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(code), q));
                }
            }
        }
        let sum = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
        out[place as usize] = sum_avx2(sum).wrapping_sub(query.sum.wrapping_mul(128));
    }
}

/// Four rows at a time, so that the query is loaded once for them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
unsafe fn sums_avx512<const AHEAD: usize>(
    query: &Query,
    codes: &[u8],
    mut rows: impl ExactSizeIterator<Item = (u32, u32)>,
    out: &mut [i32],
) {
    use std::arch::x86_64::*;
    const ROWS: usize = STREAMS as usize;
    let stride = query.high.len();
    let less = query.sum.wrapping_mul(128);
    while rows.len() > 0 {
        let count = rows.len().min(ROWS);
        let (mut at_row, mut places) = ([codes.as_ptr(); ROWS], [0; ROWS]);
        for (at_row, at_place) in at_row[..count].iter_mut().zip(&mut places) {
            let (row, place) = rows.next().unwrap_or((0, 0));
            *at_place = place as usize;
            // SAFETY: the caller promised that the row is there.
            *at_row = unsafe { codes.as_ptr().add(row as usize * stride) };
        }
        let mut high = [_mm512_setzero_si512(); ROWS];
        let mut low = [_mm512_setzero_si512(); ROWS];
        for at in (0..stride).step_by(LINE) {
            // SAFETY: `at + 64 <= stride` of the query's parts and of each row; unaligned loads are allowed.
            unsafe {
                let h = _mm512_loadu_si512(query.high.as_ptr().add(at).cast());
                let mut code = [_mm512_setzero_si512(); ROWS];
                for row in 0..ROWS {
                    code[row] = _mm512_loadu_si512(at_row[row].add(at).cast());
                    if AHEAD > 0 {
                        _mm_prefetch::<_MM_HINT_T1>(at_row[row].wrapping_add(at + AHEAD).cast());
                    }
                    high[row] = _mm512_dpbusd_epi32(high[row], code[row], h);
                }
                if !query.low.is_empty() {
                    let l = _mm512_loadu_si512(query.low.as_ptr().add(at).cast());
                    for row in 0..ROWS {
                        low[row] = _mm512_dpbusd_epi32(low[row], code[row], l);
                    }
                }
            }
        }
        for (row, place) in places[..count].iter().enumerate() {
            // `16·high + low` may pass the range of an i32 on the way, and comes back within it: additions wrap.
            let all = _mm512_add_epi32(_mm512_slli_epi32::<4>(high[row]), low[row]);
            let upper = _mm512_extracti64x4_epi64::<1>(all);
            let sum = sum_avx2(_mm256_add_epi32(_mm512_castsi512_si256(all), upper));
            out[*place] = sum.wrapping_sub(less);
        }
    }
}

/// The sum of the products of two rows of codes.
#[inline]
pub fn pair(level: Level, a: &[u8], b: &[u8]) -> i32 {
    assert_eq!(a.len(), b.len(), "rows of one length");
    match level {
        Level::Portable => a.iter().zip(b).map(|(a, b)| (*a as i32 - 128) * (*b as i32 - 128)).sum(),
        // SAFETY: `level` says that the CPU has the instructions; the lengths were just compared.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { pair_avx2(a, b) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { pair_avx512(a, b) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn pair_avx2(a: &[u8], b: &[u8]) -> i32 {
    use std::arch::x86_64::*;
    let less = _mm256_set1_epi16(128);
    let mut sum = _mm256_setzero_si256();
    for at in (0..a.len() / 16 * 16).step_by(16) {
        // SAFETY: `at + 16 <= len` of both; unaligned loads are allowed.
        let (a, b) = unsafe {
            (_mm_loadu_si128(a.as_ptr().add(at).cast()), _mm_loadu_si128(b.as_ptr().add(at).cast()))
        };
        let a = _mm256_sub_epi16(_mm256_cvtepu8_epi16(a), less);
        let b = _mm256_sub_epi16(_mm256_cvtepu8_epi16(b), less);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }
    sum_avx2(sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2")]
unsafe fn pair_avx512(a: &[u8], b: &[u8]) -> i32 {
    use std::arch::x86_64::*;
    let (top, ones) = (_mm512_set1_epi8(-128), _mm512_set1_epi8(1));
    let (mut products, mut sums) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    for at in (0..a.len() / LINE * LINE).step_by(LINE) {
        // SAFETY: `at + 64 <= len` of both; unaligned loads are allowed.
        let (a, b) = unsafe {
            (_mm512_loadu_si512(a.as_ptr().add(at).cast()), _mm512_loadu_si512(b.as_ptr().add(at).cast()))
        };
        let a = _mm512_xor_si512(a, top);
        products = _mm512_dpbusd_epi32(products, b, a);
        sums = _mm512_dpbusd_epi32(sums, ones, a);
    }
    let all = _mm512_sub_epi32(products, _mm512_slli_epi32::<7>(sums));
    let upper = _mm512_extracti64x4_epi64::<1>(all);
    sum_avx2(_mm256_add_epi32(_mm512_castsi512_si256(all), upper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::dot;
    use proptest::prelude::*;

    fn vectors(count: usize) -> impl Strategy<Value = Vec<Vec<f32>>> {
        (1usize..150, -6i32..6).prop_flat_map(move |(dimension, exponent)| {
            let one = proptest::collection::vec(-1.0f32..1.0, dimension);
            let scaled = move |v: Vec<f32>| v.into_iter().map(|x| x * 10f32.powi(exponent)).collect();
            proptest::collection::vec(one.prop_map(scaled), count)
        })
    }

    proptest! {
        #[test]
        fn estimates_are_the_same_on_every_path_and_within_their_bound(all in vectors(8)) {
            let query = Query::new(&all[0]);
            let (mut codes, mut rests, mut known) = (vec![], vec![], vec![]);
            for vector in &all[1..] {
                known.push(encode(vector, &mut codes, &mut rests));
            }
            let stride = stride(all[0].len());
            let mut expected = [0; 7];
            query.sums(Level::Portable, &codes, &mut expected);
            for level in Level::all() {
                let mut sums = [0; 7];
                query.sums(level, &codes, &mut sums);
                prop_assert_eq!(sums, expected, "{:?}", level);
                let mut some = [0; 3];
                query.sums_of(level, &codes, &[6, 0, 3], &mut some);
                prop_assert_eq!(some, [expected[6], expected[0], expected[3]]);
                let (one, two) = (&codes[..stride], &codes[stride..2 * stride]);
                prop_assert_eq!(pair(level, one, two), pair(Level::Portable, one, two));
                let coarse = Query::of_codes(one, known[0].0);
                prop_assert_eq!(coarse.sum(level, two), 16 * pair(level, one, two));
                for (row, (scale, loss)) in known.iter().enumerate() {
                    let exact = dot(&all[0], &all[row + 1]);
                    let coarse = query.estimate(sums[row], *scale);
                    prop_assert!((exact - coarse).abs() <= query.bound(loss), "{exact} {coarse} {}", query.bound(loss));
                    let (codes, rests) = (&codes[row * stride..][..stride], &rests[row * stride / 2..][..stride / 2]);
                    let fine = query.refined(level, codes, rests, *scale);
                    prop_assert_eq!(fine.to_bits(), query.refined(Level::Portable, codes, rests, *scale).to_bits());
                    prop_assert!((exact - fine).abs() <= query.fine_bound(loss), "{exact} {fine} {}", query.fine_bound(loss));
                    prop_assert!(loss.fine <= loss.coarse.max(f32::MIN_POSITIVE) * 1.001);
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_query_of_its_vector() {
        let vector: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) / 300.0).collect();
        let (mut codes, mut rests) = (vec![], vec![]);
        let (scale, _) = encode(&vector, &mut codes, &mut rests);
        let (row, query) = (Query::of_row(&codes, &rests, scale), Query::new(&vector));
        assert_eq!((&row.high, &row.low, &row.wide), (&query.high, &query.low, &query.wide));
        assert_eq!((row.sum, row.scale), (query.sum, query.scale));
    }

    #[test]
    fn the_longest_and_the_strangest_vectors_keep_their_sums() {
        let longest = vec![1.0f32; crate::model::DIMENSION_MAX];
        let (mut codes, mut rests) = (vec![], vec![]);
        let (scale, loss) = encode(&longest, &mut codes, &mut rests);
        let query = Query::new(&longest);
        for level in Level::all() {
            let found = query.estimate(query.sum(level, &codes), scale);
            assert!((found - 4096.0).abs() <= query.bound(&loss), "{level:?}: {found}");
        }
        for strange in [vec![0.0; 5], vec![f32::NAN, f32::INFINITY, 1.0], vec![f32::MIN_POSITIVE; 3]] {
            let (scale, _) = encode(&strange, &mut codes, &mut rests);
            assert!(scale.is_finite() && scale > 0.0);
        }
    }
}
