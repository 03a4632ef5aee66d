//! How many bytes an append carries to a peer, and how long it may take, by what became of those before it.
//!
//! An append whose time runs out is sent again from its beginning. On a link that carries less in that time than the append has, the peer would never get anything; and what was
//! sent in vain delays all else on the link. So an append that runs out of time halves what the next one carries, and one that was quick doubles it. An entry cannot be parted: a
//! large one gets more time instead.

use sim::time::Duration;

/// How long a peer may take to store entries, beside the time for their bytes. openraft allows for a heartbeat's time, but another region may be further away than
/// that: its leader would never hear that it has them.
const WITHIN: Duration = Duration::from_secs(1);
/// As much as one read of the log returns.
const BYTES_MAX: usize = super::log_store::READ_BYTES_MAX;
/// An append with no more than this is not made smaller: slower links than so many bytes a second are not served.
const BYTES_MIN: usize = 16 << 10;

/// The pace of one ledger's appends to one peer.
pub struct Pace {
    /// What the link is taken to carry in a second.
    bytes_per_s: usize,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { bytes_per_s: BYTES_MAX }
    }
}

impl Pace {
    /// How many of the entries with these bytes the next append carries, one at least, and all their bytes.
    pub fn fitting(&self, entries: impl IntoIterator<Item = usize>) -> (usize, usize) {
        let (mut count, mut bytes) = (0, 0);
        for entry in entries {
            if count > 0 && bytes + entry > self.bytes_per_s {
                break;
            }
            (count, bytes) = (count + 1, bytes + entry);
        }
        (count, bytes)
    }

    /// How long an append with so many bytes may take.
    pub fn within(&self, bytes: usize) -> Duration {
        WITHIN + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64)
    }

    /// An append with so many bytes was answered. Had it been small, nobody would know what a larger one takes.
    pub fn answered(&mut self, bytes: usize, took: Duration) {
        if bytes >= self.bytes_per_s / 2 && took < WITHIN / 2 {
            self.bytes_per_s = (self.bytes_per_s * 2).min(BYTES_MAX);
        }
    }

    /// The time of an append with so many bytes ran out: its own bytes are to blame, or, had it few, others' on the same link.
    pub fn ran_out(&mut self, bytes: usize) {
        let carried = if bytes > BYTES_MIN { bytes.min(self.bytes_per_s) } else { self.bytes_per_s };
        self.bytes_per_s = (carried / 2).max(BYTES_MIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Appends of entries with these bytes over a link of `bytes_per_s`, until all have arrived: how long that takes, and the appends that ran out of time.
    fn carry(pace: &mut Pace, bytes_per_s: f64, mut entries: &[usize]) -> (Duration, usize) {
        let (mut took, mut in_vain) = (Duration::ZERO, 0);
        while !entries.is_empty() && took < Duration::from_secs(100_000) {
            let (count, bytes) = pace.fitting(entries.iter().take(64).copied());
            let (takes, within) = (Duration::from_secs_f64(bytes as f64 / bytes_per_s), pace.within(bytes));
            took += takes.min(within);
            if takes < within {
                pace.answered(bytes, takes);
                entries = &entries[count..];
            } else {
                pace.ran_out(bytes);
                in_vain += 1;
            }
        }
        assert!(entries.is_empty(), "{} entries never arrive", entries.len());
        (took, in_vain)
    }

    #[test]
    fn a_fast_link_carries_all_that_is_read_at_once() {
        let mut pace = Pace::default();
        assert_eq!(pace.fitting([BYTES_MAX / 4; 5]), (4, BYTES_MAX));
        assert_eq!(carry(&mut pace, 1e9, &[BYTES_MAX / 4; 8]).1, 0);
        assert_eq!(pace.bytes_per_s, BYTES_MAX);
        assert_eq!(pace.within(0), WITHIN, "a small append is not waited for longer than before");
    }

    #[test]
    fn a_slow_link_carries_entries_of_any_size_in_the_end_and_little_in_vain() {
        for (bytes_per_s, entry) in [(50e3, 2_000), (50e3, 300_000), (20e3, 16 << 20), (1e6, 60_000)] {
            let entries = vec![entry; 200.min((64 << 20) / entry)];
            let (took, in_vain) = carry(&mut Pace::default(), bytes_per_s, &entries);
            let needed_s = (entries.len() * entry) as f64 / bytes_per_s;
            assert!(in_vain <= 9, "{entry} bytes at {bytes_per_s}: {in_vain} in vain");
            assert!(took.as_secs_f64() < 2.0 * needed_s + 20.0, "{entry} bytes at {bytes_per_s}: {took:?}");
        }
    }

    #[test]
    fn a_link_that_is_fast_again_is_used_again() {
        let mut pace = Pace::default();
        carry(&mut pace, 30e3, &[5_000; 100]);
        assert!(pace.bytes_per_s < 60_000, "{}", pace.bytes_per_s);
        carry(&mut pace, 1e9, &[60_000; 1000]);
        assert_eq!(pace.bytes_per_s, BYTES_MAX);
    }

    #[test]
    fn one_entry_at_least_is_sent_and_has_its_time() {
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.ran_out(1));
        assert_eq!(pace.bytes_per_s, BYTES_MIN);
        assert_eq!(pace.fitting([1 << 20, 1]), (1, 1 << 20));
        assert_eq!(pace.within(1 << 20), Duration::from_secs(65));
        assert_eq!(pace.fitting([]), (0, 0));
    }
}
