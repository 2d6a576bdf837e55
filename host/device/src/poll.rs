//! The poller seam: time, progress, and jobs for what must block.

use crate::sync::Mutex;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A moment, in nanoseconds since a start that only its owner knows (the appliance's monotonic clock, or virtual time).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// A moment that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// `us` microseconds after the start.
    #[must_use]
    pub const fn from_us(us: u64) -> Self {
        Self(us.saturating_mul(1_000))
    }

    /// `ns` nanoseconds later.
    #[must_use]
    pub const fn after_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// `us` microseconds later.
    #[must_use]
    pub const fn after_us(self, us: u64) -> Self {
        Self(self.0.saturating_add(us.saturating_mul(1_000)))
    }

    /// `ms` milliseconds later.
    #[must_use]
    pub const fn after_ms(self, ms: u64) -> Self {
        self.after_us(ms.saturating_mul(1_000))
    }

    /// Nanoseconds since `earlier`; 0 if it is not earlier.
    #[must_use]
    pub const fn ns_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Whole microseconds since `earlier`; 0 if it is not earlier.
    #[must_use]
    pub const fn us_since(self, earlier: Self) -> u64 {
        self.ns_since(earlier) / 1_000
    }
}

/// When a part wants to be polled next, if nothing wakes it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once: there is more to do.
    Now,
    /// At that moment at the latest.
    At(Time),
    /// When something outside changes (a doorbell, a completion, a waker); polled memory counts as "outside", so whoever
    /// sleeps on this must look at the part's wakers or poll it from time to time.
    OnWake,
}

/// What a poll did and what the part wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Progress {
    /// Units of work done (commands, entries, steps); 0 = idle.
    pub work: u32,
    /// When to poll again.
    pub next: Next,
}

impl Progress {
    /// Nothing was done, and nothing will be until something outside changes.
    pub const IDLE: Self = Self { work: 0, next: Next::OnWake };

    /// `work` units were done and there may be more.
    pub const fn busy(work: u32) -> Self {
        Self { work, next: Next::Now }
    }

    /// Nothing was done; poll again at `when`.
    pub const fn idle_until(when: Time) -> Self {
        Self { work: 0, next: Next::At(when) }
    }

    /// What two parts polled together did and want.
    #[inline]
    pub fn and(self, other: Self) -> Self {
        let next = match (self.next, other.next) {
            (Next::Now, _) | (_, Next::Now) => Next::Now,
            (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
            (Next::At(a), Next::OnWake) | (Next::OnWake, Next::At(a)) => Next::At(a),
            (Next::OnWake, Next::OnWake) => Next::OnWake,
        };
        Self { work: self.work.saturating_add(other.work), next }
    }
}

/// Every active part: a value that is polled. It starts no thread, never sleeps, reads no clock.
pub trait Poll: Send {
    /// Does a bounded amount of work (at most 64 KiB of copying or 32 commands).
    fn poll(&mut self, now: Time) -> Progress;

    /// Shows the descriptors that become readable when there is work, for a reactor that sleeps.
    fn wakers(&self, _visit: &mut dyn FnMut(BorrowedFd<'_>)) {}
}

/// Runs what must block: a worker thread in the appliance, the simulator's own queue, or in place.
pub trait Jobs: Send {
    /// Takes a piece of work; it runs at some later time, once.
    fn run(&mut self, work: Box<dyn FnOnce() + Send>);
}

/// Runs each job at once, on the caller's thread: for tests and tools.
#[derive(Debug, Default)]
pub struct InlineJobs;

impl Jobs for InlineJobs {
    fn run(&mut self, work: Box<dyn FnOnce() + Send>) {
        work();
    }
}

/// The answer of a job, asked for by later polls.
#[derive(Debug)]
pub struct Pending<T> {
    cell: Arc<Mutex<Option<T>>>,
}

impl<T: Send + 'static> Pending<T> {
    /// Hands `work` to `jobs`.
    pub fn start(jobs: &mut dyn Jobs, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let cell = Arc::new(Mutex::new(None));
        let answer = Arc::clone(&cell);
        jobs.run(Box::new(move || {
            let value = work();
            if let Ok(mut slot) = answer.lock() {
                *slot = Some(value);
            }
        }));
        Self { cell }
    }

    /// The answer, once; `None` while the job runs.
    pub fn poll(&mut self) -> Option<T> {
        self.cell.lock().ok()?.take()
    }

    /// The job was dropped without an answer (its worker died).
    #[must_use]
    pub fn is_lost(&self) -> bool {
        Arc::strong_count(&self.cell) == 1 && self.cell.lock().map_or(true, |slot| slot.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_takes_the_sooner_wish() {
        let later = Progress::idle_until(Time(9));
        let sooner = Progress { work: 2, next: Next::At(Time(5)) };
        assert_eq!(later.and(sooner), Progress { work: 2, next: Next::At(Time(5)) });
        assert_eq!(later.and(Progress::IDLE).next, Next::At(Time(9)));
        assert_eq!(later.and(Progress::busy(1)).next, Next::Now);
    }

    #[test]
    fn a_job_is_answered_once() {
        let mut pending = Pending::start(&mut InlineJobs, || 7);
        assert_eq!(pending.poll(), Some(7));
        assert_eq!(pending.poll(), None);
        assert!(pending.is_lost());
    }
}
