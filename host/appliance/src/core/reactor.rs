//! A polling core: a thread that polls its parts in turn, and sleeps when they have nothing to do.

use super::clock::Clock;
use crate::config::Idle;
use dray_device::poll::{Next, Poll, Progress, Time};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll as Poller, Token};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Spinning goes on this long after the last work: longer than the pause between two commands of a slow guest.
const SPIN_NS: u64 = 1_000_000;
/// Then the core yields between polls for this long.
const YIELD_NS: u64 = 5_000_000;
/// Then it sleeps, this long at most: doorbells in shared memory wake nobody.
const NAP: Duration = Duration::from_micros(200);

/// A part that a reactor polls, and that says when it has ended.
pub trait Part: Poll {
    /// The part has nothing to do any more.
    fn is_finished(&self) -> bool {
        false
    }
}

/// A running polling core that gives its parts back.
#[derive(Debug)]
pub struct Reactor<P> {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<P>>,
}

/// The parts' thread has died.
#[derive(Debug, thiserror::Error)]
#[error("the polling core \"{0}\" has died")]
pub struct CoreDied(String);

impl<P: Part + 'static> Reactor<P> {
    /// Starts a thread that polls `part` until [`stop`](Self::stop) or until it is finished.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(name: &str, clock: Clock, idle: Idle, mut part: P) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let mut sleeper = Sleeper::new(idle)?;
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            while !asked.load(Ordering::Acquire) && !part.is_finished() {
                let now = clock.now();
                let progress = part.poll(now);
                sleeper.after(&part, now, progress);
            }
            part
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Whether the thread has ended by itself.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the thread and gives the part back.
    ///
    /// # Errors
    /// [`CoreDied`] when it had panicked.
    pub fn stop(mut self) -> Result<P, CoreDied> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().ok_or_else(|| CoreDied("joined".into()))?;
        let name = thread.thread().name().unwrap_or("core").to_owned();
        thread.join().map_err(|_| CoreDied(name))
    }
}

impl<P> Drop for Reactor<P> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// Decides between spinning, yielding and sleeping.
struct Sleeper {
    idle: Idle,
    poller: Poller,
    events: Events,
    last_work: Time,
}

impl Sleeper {
    fn new(idle: Idle) -> io::Result<Self> {
        Ok(Self { idle, poller: Poller::new()?, events: Events::with_capacity(16), last_work: Time(0) })
    }

    fn after<P: Poll>(&mut self, part: &P, now: Time, progress: Progress) {
        if progress.work > 0 {
            self.last_work = now;
        }
        let idle_ns = now.ns_since(self.last_work);
        if progress.work > 0 || self.idle == Idle::Spin || progress.next == Next::Now || idle_ns < SPIN_NS {
            std::hint::spin_loop();
        } else if idle_ns < YIELD_NS {
            std::thread::yield_now();
        } else {
            let nap = match progress.next {
                Next::At(when) => NAP.min(Duration::from_nanos(when.ns_since(now))),
                Next::Now | Next::OnWake => NAP,
            };
            self.sleep(part, nap);
        }
    }

    fn sleep<P: Poll>(&mut self, part: &P, nap: Duration) {
        let mut fds = Vec::new();
        part.wakers(&mut |fd| fds.push(fd.as_raw_fd()));
        let registry = self.poller.registry();
        for (i, fd) in fds.iter().enumerate() {
            let _known = registry.register(&mut SourceFd(fd), Token(i), Interest::READABLE);
        }
        // epoll counts in milliseconds: shorter naps are slept without it when nobody can wake us.
        if fds.is_empty() {
            std::thread::sleep(nap);
        } else {
            let _woken = self.poller.poll(&mut self.events, Some(nap));
        }
        for fd in &fds {
            let _gone = self.poller.registry().deregister(&mut SourceFd(fd));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter(u32);
    impl Poll for Counter {
        fn poll(&mut self, _now: Time) -> Progress {
            self.0 += 1;
            Progress::IDLE
        }
    }
    impl Part for Counter {
        fn is_finished(&self) -> bool {
            self.0 >= 1000
        }
    }

    #[test]
    fn parts_come_back_when_they_are_finished_or_stopped() {
        let clock = Clock::new();
        for idle in [Idle::Spin, Idle::Adaptive] {
            let reactor = Reactor::start("test", clock, idle, Counter(0)).expect("thread");
            while !reactor.has_ended() {
                std::thread::yield_now();
            }
            assert_eq!(reactor.stop().expect("part").0, 1000);
        }
    }
}
