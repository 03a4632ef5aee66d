//! Two clocks, kept apart.
//!
//! - The **monotonic** clock ([`Instant`]) drives every sleep, timeout, lease and election. In simulation each node's has a
//!   rate and an offset of its own, so two nodes never agree on how long a second is. In production it is
//!   `CLOCK_BOOTTIME`, which counts time spent suspended: a lease must not outlive a laptop's nap.
//! - The **calendar** clock ([`calendar_ms`]) names moments for people: created, expires, tiers. It may step backwards.
//!   Nothing that must be ordered may depend on it.

use std::fmt;
use std::future::Future;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
pub use std::time::Duration;

/// A moment on this node's monotonic clock, in nanoseconds since an arbitrary start; those before it are negative, so what is older than
/// the machine's last start has its age. Instants of different nodes, or of different starts of one node, must not be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(i64);

impl Instant {
    /// This node's monotonic clock.
    pub fn now() -> Instant {
        Instant(imp::monotonic_ns().min(i64::MAX as u64) as i64)
    }

    /// Time passed since this moment; zero if it lies ahead.
    pub fn elapsed(&self) -> Duration {
        Instant::now() - *self
    }
}

/// Up to 292 years.
fn ns(duration: Duration) -> i64 {
    duration.as_nanos().min(i64::MAX as u128) as i64
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_add(ns(rhs)))
    }
}
impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_sub(ns(rhs)))
    }
}
impl Sub for Instant {
    type Output = Duration;
    fn sub(self, rhs: Instant) -> Duration {
        Duration::from_nanos(if self > rhs { self.0.abs_diff(rhs.0) } else { 0 })
    }
}
impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, rhs: Duration) {
        *self = *self + rhs;
    }
}
impl SubAssign<Duration> for Instant {
    fn sub_assign(&mut self, rhs: Duration) {
        *self = *self - rhs;
    }
}

/// Milliseconds since the Unix epoch on this node's calendar clock.
pub fn calendar_ms() -> i64 {
    imp::calendar_ms()
}

/// Waits for `duration` of this node's monotonic time.
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(Instant::now() + duration)
}

/// Waits until this node's monotonic clock shows `deadline`.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, timer: None }
}

/// Future of [`sleep`] and [`sleep_until`]. It arms one timer however often it is polled, and looks at the clock again when
/// that fires, so a clock whose rate changed meanwhile never ends a wait early.
pub struct Sleep {
    deadline: Instant,
    timer: Option<(Pin<Box<imp::Timer>>, Waker)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let now = Instant::now();
            if now >= self.deadline {
                return Poll::Ready(());
            }
            let wait = self.deadline - now;
            match &mut self.timer {
                Some((timer, waker)) if waker.will_wake(cx.waker()) && !imp::fired(timer) => {
                    return Poll::Pending;
                }
                slot => *slot = Some((Box::pin(imp::timer(wait)), cx.waker().clone())),
            }
            let Some((timer, _)) = &mut self.timer else { continue };
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

/// The time allowed ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the time allowed ran out")
    }
}
impl std::error::Error for Elapsed {}

/// Runs `future` for at most `duration` of this node's monotonic time.
pub fn timeout<F: Future>(duration: Duration, future: F) -> Timeout<F> {
    Timeout { future: Box::pin(future), sleep: sleep(duration) }
}

/// Future of [`timeout`].
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    sleep: Sleep,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(value) = self.future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        Pin::new(&mut self.sleep).poll(cx).map(|()| Err(Elapsed))
    }
}

#[cfg(not(madsim))]
mod imp {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    pub type Timer = tokio::time::Sleep;

    pub fn monotonic_ns() -> u64 {
        let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `at` is a valid timespec that the call fills in; CLOCK_BOOTTIME exists on every Linux we support.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut at) };
        at.tv_sec as u64 * 1_000_000_000 + at.tv_nsec as u64
    }

    pub fn calendar_ms() -> i64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
    }

    pub fn timer(wait: Duration) -> Timer {
        tokio::time::sleep(wait)
    }

    pub fn fired(timer: &Timer) -> bool {
        timer.is_elapsed()
    }
}

#[cfg(madsim)]
mod imp {
    use crate::world;
    use std::pin::Pin;
    use std::time::Duration;

    pub type Timer = madsim::time::Sleep;

    pub fn monotonic_ns() -> u64 {
        world::monotonic_ns()
    }

    pub fn calendar_ms() -> i64 {
        world::calendar_ms()
    }

    /// madsim rounds a new sleep up to a millisecond but takes any instant in `reset`.
    pub fn timer(wait: Duration) -> Timer {
        let deadline = madsim::time::Instant::now() + world::global_wait(wait);
        let mut timer = madsim::time::sleep(Duration::ZERO);
        Pin::new(&mut timer).reset(deadline);
        timer
    }

    pub fn fired(timer: &Timer) -> bool {
        timer.is_elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_before_the_machine_began_has_its_age() -> std::io::Result<()> {
        let ten_years = Duration::from_secs(10 * 365 * 24 * 60 * 60);
        let (now, long_ago, age) = crate::task::run_test(async move {
            let now = Instant::now();
            (now, now - ten_years, (now - ten_years).elapsed())
        })?;
        assert_eq!((now - long_ago, long_ago - now, long_ago + ten_years), (ten_years, Duration::ZERO, now));
        assert!(age >= ten_years, "{age:?}");
        Ok(())
    }
}
