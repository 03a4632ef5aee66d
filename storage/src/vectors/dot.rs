//! Dot products of f32 vectors, the same bits on every path.
//!
//! Thirty-two lanes accumulate with fused multiply-add, lane `i` taking elements `i, i + 32, …` (four registers, so that the adder's
//! latency is hidden); the lanes are then added pairwise in one fixed order. AVX2 with FMA is used where the CPU has it (checked
//! at run time), else the same steps in plain Rust.

const LANES: usize = 32;

/// The dot product; of different lengths, that of the common prefix.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: the features were just found.
        return unsafe { dot_avx2(a, b) };
    }
    dot_portable(a, b)
}

fn reduce(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

fn dot_portable(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let len = a.len().min(b.len());
    for (a, b) in a[..len].chunks(LANES).zip(b[..len].chunks(LANES)) {
        for i in 0..a.len() {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    reduce(lanes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let len = a.len().min(b.len());
    let whole = len / LANES * LANES;
    let mut sums = [_mm256_setzero_ps(); LANES / 8];
    for at in (0..whole).step_by(LANES) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `at + 32 <= len` and `i < 4`; unaligned loads are allowed.
            unsafe {
                let a = _mm256_loadu_ps(a.as_ptr().add(at + 8 * i));
                let b = _mm256_loadu_ps(b.as_ptr().add(at + 8 * i));
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
    }
    let mut lanes = [0.0f32; LANES];
    for (i, sum) in sums.into_iter().enumerate() {
        // SAFETY: the array holds 32 floats and `i < 4`.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().add(8 * i), sum) };
    }
    for i in 0..len - whole {
        lanes[i] = a[whole + i].mul_add(b[whole + i], lanes[i]);
    }
    reduce(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_path_gives_the_same_bits(pairs in proptest::collection::vec((-1.0f32..1.0, -1.0f32..1.0), 0..200)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let exact: f64 = a.iter().zip(&b).map(|(x, y)| *x as f64 * *y as f64).sum();
            prop_assert_eq!(dot(&a, &b).to_bits(), dot_portable(&a, &b).to_bits());
            prop_assert!((dot(&a, &b) as f64 - exact).abs() < 1e-4);
        }
    }
}
