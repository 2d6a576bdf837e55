//! A polling core: a thread that polls its parts in turn, and sleeps when they have nothing to do.

use super::clock::Clock;
use crate::config::Idle;
use dray_device::poll::{Next, Poll, Progress, Time};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Spinning goes on this long after the last work: longer than the pause between two commands of a slow guest.
const SPIN_NS: u64 = 1_000_000;
/// Then the core yields between polls for this long.
const YIELD_NS: u64 = 5_000_000;
/// Then it sleeps, this long at most: doorbells in shared memory wake nobody.
const NAP: Duration = Duration::from_micros(800);
/// The same where everything that comes wakes the core, but for what other threads leave in its mailbox.
const LONG_NAP: Duration = Duration::from_millis(2);
/// Polls without work that share a look at the clock: what they do takes less time than the look.
const IDLE_POLLS: u32 = 4;

/// A part that a reactor polls, and that says when it has ended.
pub trait Part: Poll {
    /// The part has nothing to do any more.
    fn is_finished(&self) -> bool {
        false
    }

    /// Whether work may show in memory alone, such as a doorbell in a mapped page, so that no descriptor becomes readable.
    fn polls_memory(&self) -> bool {
        true
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
                let mut progress = part.poll(now);
                for _ in 1..IDLE_POLLS {
                    if progress.work > 0 || part.is_finished() || !sleeper.is_awake(now) {
                        break;
                    }
                    progress = part.poll(now);
                }
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
    last_work: Time,
    /// The part's wakers, all of which are watched; none yet after the core has worked.
    watch: Option<Watch>,
    /// The wakers that the part shows now.
    shown: Vec<RawFd>,
}

/// Descriptors that wake the core.
struct Watch {
    epoll: OwnedFd,
    fds: Vec<RawFd>,
}

impl Sleeper {
    fn new(idle: Idle) -> io::Result<Self> {
        // Whoever cannot have descriptors should hear of it at the start.
        let watch = Some(Watch { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, fds: Vec::new() });
        Ok(Self { idle, last_work: Time(0), watch, shown: Vec::new() })
    }

    /// Whether a poll without work is followed by another one at once.
    fn is_awake(&self, now: Time) -> bool {
        self.idle == Idle::Spin || now.ns_since(self.last_work) < SPIN_NS
    }

    fn after<P: Part>(&mut self, part: &P, now: Time, progress: Progress) {
        if progress.work > 0 {
            self.last_work = now;
            return;
        }
        let idle_ns = now.ns_since(self.last_work);
        if self.is_awake(now) || progress.next == Next::Now {
            std::hint::spin_loop();
        } else if idle_ns < YIELD_NS {
            // A descriptor that was closed while there was work may have a namesake.
            self.watch = None;
            std::thread::yield_now();
        } else {
            let longest = if part.polls_memory() { NAP } else { LONG_NAP };
            let nap = match progress.next {
                Next::At(when) => longest.min(Duration::from_nanos(when.ns_since(now))),
                Next::Now | Next::OnWake => longest,
            };
            self.sleep(part, nap);
        }
    }

    fn sleep<P: Part>(&mut self, part: &P, nap: Duration) {
        self.shown.clear();
        part.wakers(&mut |fd| self.shown.push(fd.as_raw_fd()));
        if self.watch.as_ref().is_none_or(|watch| watch.fds != self.shown) {
            self.watch = Watch::over(part).ok();
        }
        let (Some(watch), Ok(timeout)) = (&self.watch, Timespec::try_from(nap)) else { return std::thread::sleep(nap) };
        // Not by the epoll's own wait: that counts in milliseconds.
        let _woken = poll(&mut [PollFd::new(&watch.epoll, PollFlags::IN)], Some(&timeout));
    }
}

impl Watch {
    fn over<P: Part>(part: &P) -> io::Result<Self> {
        let mut watch = Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, fds: Vec::new() };
        part.wakers(&mut |fd| {
            watch.fds.push(fd.as_raw_fd());
            // One that cannot be watched (a regular file, one that is shown twice) is looked at after the nap.
            let _unwatched = epoll::add(&watch.epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN);
        });
        Ok(watch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::event::EventLine;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::atomic::AtomicU64;

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

    /// Sleeps until a descriptor wakes it; says how often it was polled meanwhile.
    struct Woken {
        line: EventLine,
        polls: Arc<AtomicU64>,
        woken: bool,
    }
    impl Poll for Woken {
        fn poll(&mut self, _now: Time) -> Progress {
            self.polls.fetch_add(1, Ordering::Relaxed);
            self.woken = self.line.take() > 0;
            Progress::IDLE
        }
        fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
            visit(self.line.as_fd());
        }
    }
    impl Part for Woken {
        fn is_finished(&self) -> bool {
            self.woken
        }
        fn polls_memory(&self) -> bool {
            false
        }
    }

    #[test]
    fn an_idle_core_sleeps_until_a_descriptor_wakes_it() {
        let (line, polls) = (EventLine::new().expect("eventfd"), Arc::new(AtomicU64::new(0)));
        let part = Woken { line: line.clone(), polls: Arc::clone(&polls), woken: false };
        let start = std::time::Instant::now();
        let reactor = Reactor::start("test", Clock::new(), Idle::Adaptive, part).expect("thread");
        let settled = Duration::from_nanos(4 * YIELD_NS);
        while start.elapsed() < settled {
            std::thread::yield_now();
        }
        let before = polls.load(Ordering::Relaxed);
        while start.elapsed() < 2 * settled {
            std::thread::yield_now();
        }
        let naps = polls.load(Ordering::Relaxed) - before;
        assert!(naps <= settled.as_millis() as u64, "{naps} polls in {settled:?}");
        line.signal();
        while !reactor.has_ended() {
            std::thread::yield_now();
        }
        assert!(reactor.stop().expect("part").woken);
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
