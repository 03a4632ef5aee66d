//! Randomness: the seed's in simulation, the operating system's in production. Draws in simulation are part of the run's identity.

use crate::time;

/// A random 64-bit number.
pub fn u64() -> u64 {
    imp::u64()
}

/// A number in `0..bound`; 0 if `bound` is 0.
pub fn below(bound: u64) -> u64 {
    ((u64() as u128 * bound as u128) >> 64) as u64
}

/// A number in `0.0..1.0`.
pub fn unit() -> f64 {
    (u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// True with probability `p`.
pub fn chance(p: f64) -> bool {
    p > 0.0 && unit() < p
}

/// Fills `bytes` with random ones.
pub fn fill(bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&u64().to_le_bytes()[..chunk.len()]);
    }
}

/// A UUID version 7: this node's calendar time in milliseconds, then randomness (RFC 9562, section 5.7).
pub fn uuid_v7() -> uuid::Uuid {
    let mut random = [0; 10];
    fill(&mut random);
    uuid::Builder::from_unix_timestamp_millis(time::calendar_ms().max(0) as u64, &random).into_uuid()
}

#[cfg(not(madsim))]
mod imp {
    pub fn u64() -> u64 {
        rand::random()
    }
}

#[cfg(madsim)]
mod imp {
    pub fn u64() -> u64 {
        madsim::rand::RngCore::next_u64(&mut madsim::rand::thread_rng())
    }
}

/// A site that misbehaves in some runs: a scenario switches it on for the whole of one, and then it fires with probability `p`
/// (swarm testing: each seed is a different system). Never in production.
pub fn buggify(name: &'static str, p: f64) -> bool {
    #[cfg(madsim)]
    return crate::world::buggify(name, p);
    #[cfg(not(madsim))]
    {
        let _ = (name, p);
        false
    }
}

/// A [`buggify`] site that, when it fires, waits up to `most`.
pub async fn buggify_wait(name: &'static str, p: f64, most: time::Duration) {
    if buggify(name, p) {
        time::sleep(most.mul_f64(unit())).await;
    }
}
