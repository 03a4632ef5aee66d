//! Dot products of f32 vectors, the same bits on every path.
//!
//! Thirty-two lanes accumulate with fused multiply-add, lane `i` taking elements `i, i + 32, …`; the lanes are then added pairwise in one
//! fixed order. Of many rows, four are computed side by side, so that the adder's latency is hidden.

use super::cpu::Level;

const LANES: usize = 32;

/// The dot product; of different lengths, that of the common prefix.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let mut out = [0.0];
    dot_rows(Level::best(), &a[..len], &b[..len], &mut out);
    out[0]
}

/// The dot products of a vector with rows of its length that lie one behind the other, one for each place of `out`.
pub fn dot_rows(level: Level, a: &[f32], rows: &[f32], out: &mut [f32]) {
    assert_eq!(rows.len(), a.len() * out.len(), "rows and results differ in number");
    match level {
        Level::Portable => dot_portable(a, rows, out),
        // SAFETY: `level` says that the CPU has the instructions; the lengths were just compared.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { dot_avx2(a, rows, out) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { dot_avx512(a, rows, out) },
    }
}

fn reduce(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds the elements behind the last whole group to their lanes.
fn finish(mut lanes: [f32; LANES], a: &[f32], row: &[f32]) -> f32 {
    let whole = a.len() / LANES * LANES;
    for (lane, (a, b)) in lanes.iter_mut().zip(a[whole..].iter().zip(&row[whole..])) {
        *lane = a.mul_add(*b, *lane);
    }
    reduce(lanes)
}

fn dot_portable(a: &[f32], rows: &[f32], out: &mut [f32]) {
    for (at, out) in out.iter_mut().enumerate() {
        let row = &rows[at * a.len()..][..a.len()];
        let mut lanes = [0.0f32; LANES];
        for (a, b) in a.chunks_exact(LANES).zip(row.chunks_exact(LANES)) {
            for i in 0..LANES {
                lanes[i] = a[i].mul_add(b[i], lanes[i]);
            }
        }
        *out = finish(lanes, a, row);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_avx2(a: &[f32], rows: &[f32], out: &mut [f32]) {
    use std::arch::x86_64::*;
    let whole = a.len() / LANES * LANES;
    for (number, out) in out.iter_mut().enumerate() {
        let row = &rows[number * a.len()..][..a.len()];
        let mut sums = [_mm256_setzero_ps(); LANES / 8];
        for at in (0..whole).step_by(LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 32 <= len` of both and `i < 4`; unaligned loads are allowed.
                unsafe {
                    let a = _mm256_loadu_ps(a.as_ptr().add(at + 8 * i));
                    let b = _mm256_loadu_ps(row.as_ptr().add(at + 8 * i));
                    *sum = _mm256_fmadd_ps(a, b, *sum);
                }
            }
        }
        let mut lanes = [0.0f32; LANES];
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: the array holds 32 floats and `i < 4`.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().add(8 * i), sum) };
        }
        *out = finish(lanes, a, row);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn dot_avx512(a: &[f32], rows: &[f32], out: &mut [f32]) {
    use std::arch::x86_64::*;
    let whole = a.len() / LANES * LANES;
    let lanes = |sums: [__m512; 2]| {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array holds 32 floats.
        unsafe {
            _mm512_storeu_ps(lanes.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(lanes.as_mut_ptr().add(16), sums[1]);
        }
        lanes
    };
    // The same pairs as `reduce`: 16 apart, then 8, 4, 2, 1.
    let sum = |sums: [__m512; 2]| {
        let sixteen = _mm512_add_ps(sums[0], sums[1]);
        let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sixteen)));
        let eight = _mm256_add_ps(_mm512_castps512_ps256(sixteen), upper);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    };
    let mut groups = out.chunks_exact_mut(4);
    let mut number = 0;
    for out in &mut groups {
        let rows = &rows[number * a.len()..][..4 * a.len()];
        let mut sums = [[_mm512_setzero_ps(); 2]; 4];
        for at in (0..whole).step_by(LANES) {
            // SAFETY: `at + 32 <= len` of the vector and of each of the four rows; unaligned loads are allowed.
            unsafe {
                let left = [_mm512_loadu_ps(a.as_ptr().add(at)), _mm512_loadu_ps(a.as_ptr().add(at + 16))];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let row = rows.as_ptr().add(row * a.len() + at);
                    sums[0] = _mm512_fmadd_ps(left[0], _mm512_loadu_ps(row), sums[0]);
                    sums[1] = _mm512_fmadd_ps(left[1], _mm512_loadu_ps(row.add(16)), sums[1]);
                }
            }
        }
        for (row, (out, sums)) in out.iter_mut().zip(sums).enumerate() {
            let row = &rows[row * a.len()..][..a.len()];
            *out = if whole == a.len() { sum(sums) } else { finish(lanes(sums), a, row) };
        }
        number += 4;
    }
    for out in groups.into_remainder() {
        let row = &rows[number * a.len()..][..a.len()];
        let mut sums = [_mm512_setzero_ps(); 2];
        for at in (0..whole).step_by(LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `at + 32 <= len` of both and `i < 2`; unaligned loads are allowed.
                unsafe {
                    let a = _mm512_loadu_ps(a.as_ptr().add(at + 16 * i));
                    *sum = _mm512_fmadd_ps(a, _mm512_loadu_ps(row.as_ptr().add(at + 16 * i)), *sum);
                }
            }
        }
        *out = if whole == a.len() { sum(sums) } else { finish(lanes(sums), a, row) };
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_path_gives_the_same_bits(a in proptest::collection::vec(-1.0f32..1.0, 1..200), rows in 0usize..7, seed in any::<u64>()) {
            let mut state = seed;
            let mut random = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            let data: Vec<f32> = (0..rows * a.len()).map(|_| random()).collect();
            let mut expected = vec![0.0; rows];
            dot_rows(Level::Portable, &a, &data, &mut expected);
            for level in Level::all() {
                let mut found = vec![0.0; rows];
                dot_rows(level, &a, &data, &mut found);
                for (at, (x, y)) in expected.iter().zip(&found).enumerate() {
                    prop_assert_eq!(x.to_bits(), y.to_bits(), "row {} by {:?}", at, level);
                }
            }
            for (row, found) in data.chunks_exact(a.len()).zip(&expected) {
                let exact: f64 = a.iter().zip(row).map(|(x, y)| *x as f64 * *y as f64).sum();
                prop_assert!((*found as f64 - exact).abs() < 1e-4);
            }
        }
    }
}
