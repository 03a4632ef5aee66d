//! Which instructions the kernels may use. Every path of a kernel gives the same bits, so the choice changes nothing but the time.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with byte dot products (VNNI).
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The best that this CPU has.
    pub fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512vnni") {
                return Level::Avx512;
            }
            if has!("avx2") && has!("fma") {
                return Level::Avx2;
            }
        }
        Level::Portable
    }

    /// All that this CPU has.
    pub fn all() -> Vec<Level> {
        #[cfg(target_arch = "x86_64")]
        return match Level::best() {
            Level::Avx512 => vec![Level::Portable, Level::Avx2, Level::Avx512],
            Level::Avx2 => vec![Level::Portable, Level::Avx2],
            Level::Portable => vec![Level::Portable],
        };
        #[cfg(not(target_arch = "x86_64"))]
        vec![Level::Portable]
    }
}

/// Asks for the cache line at `at`, which need not be readable, ahead of its use.
#[inline(always)]
pub fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch faults nowhere.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
