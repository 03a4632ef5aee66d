//! The generator from which runs are drawn before there is a world: splitmix64.

/// What is drawn. Each part of a run has a stream of its own, so that one may change while the others stay.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// How large, how loaded and how limited the system is.
    Draw = 1,
    Faults = 2,
    Disk = 3,
    Operations = 4,
}

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: Stream) -> Random {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (stream as u64).rotate_left(17));
        random.draw();
        random
    }

    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((self.draw() as u128 * bound as u128) >> 64) as u64
    }

    /// A number in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Both ends included.
    pub fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to.saturating_sub(from) + 1)
    }

    /// Milliseconds within a range of seconds.
    pub fn ms(&mut self, [from, to]: [u64; 2]) -> u64 {
        self.within(from * 1000, to * 1000)
    }

    /// Exponentially distributed.
    pub fn pause(&mut self, mean: f64) -> f64 {
        -(1.0 - self.unit()).max(1e-9).ln() * mean
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        from.get(self.below(from.len() as u64) as usize).copied()
    }
}
