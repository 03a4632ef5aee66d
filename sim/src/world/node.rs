//! One simulated machine: its clocks, cores, disk and the process on it.

use crate::disk::simulated::SimDisk;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

type Init = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Also its host name in addresses.
    pub name: String,
    pub region: String,
    pub cores: usize,
    /// Work takes so many times as long as [`crate::cpu::cost`] says.
    pub slowdown: u32,
    pub clock: ClockModel,
}

/// How a machine's clocks differ from true time.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClockModel {
    /// Parts per million by which both clocks run fast (or slow, if negative).
    pub rate_ppm: i64,
    /// Where the monotonic clock starts.
    pub offset: Duration,
    /// How far the calendar is ahead (or behind) at the start.
    pub calendar_ms: i64,
}

pub(super) struct Node {
    pub name: String,
    pub region: String,
    pub id: Option<madsim::task::NodeId>,
    pub init: Option<Init>,
    pub disk: Option<Arc<SimDisk>>,
    pub clock: Clock,
    pub running: bool,
    pub powered: bool,
    pub boots: u64,
    /// The process ended itself and waits for its supervisor.
    pub aborted: bool,
    /// When each core is free, in global nanoseconds.
    cores: Vec<u64>,
    slowdown: u32,
    /// What all cores together have worked.
    pub busy: Duration,
}

impl Node {
    pub fn scenario() -> Node {
        let clock = ClockModel::default();
        let options =
            NodeOptions { name: "scenario".into(), region: String::new(), cores: 1, slowdown: 1, clock };
        Node { disk: None, running: true, ..Node::with(options, None) }
    }

    pub fn new(options: NodeOptions, disk: Arc<SimDisk>) -> Node {
        Node::with(options, Some(disk))
    }

    fn with(options: NodeOptions, disk: Option<Arc<SimDisk>>) -> Node {
        Node {
            clock: Clock::new(options.clock),
            cores: vec![0; options.cores.max(1)],
            slowdown: options.slowdown.max(1),
            busy: Duration::ZERO,
            name: options.name,
            region: options.region,
            id: None,
            init: None,
            disk,
            running: false,
            powered: true,
            boots: 0,
            aborted: false,
        }
    }

    /// Keeps the least busy core busy for `cost_ns`; returns how far it is behind now.
    pub fn occupy(&mut self, now_ns: u64, cost: Duration) -> u64 {
        let cost = cost * self.slowdown;
        self.busy += cost;
        let Some(core) = self.cores.iter_mut().min() else { return 0 };
        *core = (*core).max(now_ns) + cost.as_nanos() as u64;
        *core - now_ns
    }
}

/// A piecewise linear clock: it continues from where it was whenever its rate changes, so it never runs backwards.
pub(super) struct Clock {
    since: Duration,
    monotonic_ns: u64,
    rate_ppm: i64,
    calendar_step_ms: i64,
}

impl Clock {
    fn new(model: ClockModel) -> Clock {
        Clock {
            since: Duration::ZERO,
            monotonic_ns: model.offset.as_nanos() as u64,
            rate_ppm: model.rate_ppm,
            // The calendar is derived from the monotonic clock; take its offset out again.
            calendar_step_ms: model.calendar_ms - model.offset.as_millis() as i64,
        }
    }

    pub fn monotonic_ns(&self, now: Duration) -> u64 {
        let passed = now.saturating_sub(self.since).as_nanos() as i128;
        self.monotonic_ns + (passed + passed * self.rate_ppm as i128 / 1_000_000) as u64
    }

    pub fn calendar_ms(&self, now: Duration) -> i64 {
        (self.monotonic_ns(now) / 1_000_000) as i64 + self.calendar_step_ms
    }

    pub fn bend(&mut self, now: Duration, rate_ppm: i64, calendar_step_ms: i64) {
        self.monotonic_ns = self.monotonic_ns(now);
        self.since = now;
        self.rate_ppm = rate_ppm.max(-999_999);
        self.calendar_step_ms += calendar_step_ms;
    }

    /// True time for `wait` on this clock, rounded up.
    pub fn global_wait(&self, wait: Duration) -> Duration {
        if self.rate_ppm == 0 {
            return wait;
        }
        let ns = wait.as_nanos() as u64 as u128 * 1_000_000 / (1_000_000 + self.rate_ppm).max(1) as u128;
        Duration::from_nanos(ns.min(u64::MAX as u128) as u64 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bent_clock_never_runs_backwards() {
        let mut clock =
            Clock::new(ClockModel { rate_ppm: 50_000, offset: Duration::from_secs(7), calendar_ms: -5 });
        let mut last = 0;
        for second in 0..100u64 {
            let now = Duration::from_secs(second);
            let reading = clock.monotonic_ns(now);
            assert!(reading >= last, "{reading} < {last}");
            last = reading;
            clock.bend(now, (second as i64 * 7919) % 400_000 - 200_000, 0);
        }
    }

    #[test]
    fn work_takes_longer_on_a_slower_machine_and_queues_behind_what_is_under_way() {
        let clock = ClockModel::default();
        let options = NodeOptions { name: "n".into(), region: String::new(), cores: 2, slowdown: 10, clock };
        let mut node = Node::with(options, None);
        let cost = Duration::from_micros(40);
        assert_eq!([0; 3].map(|_: u64| node.occupy(1000, cost)), [400_000, 400_000, 800_000]);
        assert_eq!(node.busy, cost * 30);
    }

    #[test]
    fn wait_lasts_at_least_as_long_on_the_bent_clock() {
        for rate_ppm in [-300_000, -1, 0, 1, 250_000] {
            let clock = Clock::new(ClockModel { rate_ppm, ..ClockModel::default() });
            let wait = Duration::from_millis(150);
            let after = clock.monotonic_ns(clock.global_wait(wait));
            assert!(after >= wait.as_nanos() as u64, "rate {rate_ppm}: woke after {after} ns");
        }
    }
}
