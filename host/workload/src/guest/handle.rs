//! What others see of a running guest, and what they ask of it: atomics, no locks on the guest's way.

use super::Identity;
use crate::histogram::{BUCKETS, Histogram, quantile, total};
use crate::ledger::Ledger;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A word of [`Shared::outstanding`] while its place has no write outstanding.
pub(super) const NO_WRITE: u64 = u64::MAX;

/// Which part of a migration a latency belongs to (by the moment of its completion).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the migration begins.
    Before = 0,
    /// While it runs.
    During = 1,
    /// After the switch-over.
    After = 2,
}

/// Where in its life a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStage {
    /// The driver resets and enables the controller.
    Starting = 0,
    /// Namespace and controller are identified, queues created.
    Identifying = 1,
    /// Commands are submitted.
    Running = 2,
    /// Waits for outstanding commands before a reset or the end.
    Draining = 3,
    /// The controller is shut down.
    Stopped = 4,
    /// The guest gave up; see [`GuestHandle::first_error`].
    Failed = 5,
}

impl GuestStage {
    const ALL: [Self; 6] =
        [Self::Starting, Self::Identifying, Self::Running, Self::Draining, Self::Stopped, Self::Failed];
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What a guest has done so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64),* }

        #[derive(Debug, Default)]
        pub(super) struct AtomicCounters { $(pub $name: AtomicU64),* }

        impl AtomicCounters {
            fn load(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}

counters! {
    /// Writes acknowledged.
    writes,
    /// Reads that ended well and were checked.
    reads,
    /// Commands that ended with an error status.
    errors,
    /// Reads that found something that cannot be there.
    mismatches,
    /// Commands whose end nobody knows.
    unknown,
    /// Controller resets that were asked for and are done.
    resets,
    /// Controller resets that nobody asked for.
    surprises,
    /// Identities that were not the first one.
    identity_changes,
    /// Asynchronous events.
    events,
}

/// Adds one; the guest is the only writer.
pub(super) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

#[derive(Debug)]
pub(super) struct Shared {
    pub ledger: Arc<Ledger>,
    pub phase: AtomicU8,
    pub stage: AtomicU8,
    pub stop: AtomicBool,
    pub resets_asked: AtomicU32,
    pub counters: AtomicCounters,
    /// The number of the write outstanding in each place, or [`NO_WRITE`].
    pub outstanding: Box<[AtomicU64]>,
    pub latencies: [Histogram; 3],
    pub phase_ns: [AtomicU64; 3],
    /// Time of the guest's last poll.
    pub now_ns: AtomicU64,
    pub first_error: Mutex<Option<String>>,
    pub identity: Mutex<Option<Identity>>,
}

impl Shared {
    pub(super) fn new(ledger: Arc<Ledger>, slots: usize) -> Self {
        Self {
            ledger,
            phase: AtomicU8::new(Phase::Before as u8),
            stage: AtomicU8::new(GuestStage::Starting as u8),
            stop: AtomicBool::new(false),
            resets_asked: AtomicU32::new(0),
            counters: AtomicCounters::default(),
            outstanding: (0..slots).map(|_| AtomicU64::new(NO_WRITE)).collect(),
            latencies: Default::default(),
            phase_ns: Default::default(),
            now_ns: AtomicU64::new(0),
            first_error: Mutex::new(None),
            identity: Mutex::new(None),
        }
    }

    /// Keeps the text of the first error. Not on the way of commands that end well.
    #[cold]
    pub(super) fn error(&self, text: impl FnOnce() -> String) {
        self.first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(text);
    }

    /// Index into what is kept by phase.
    pub(super) fn phase(&self) -> usize {
        usize::from(self.phase.load(Ordering::Relaxed)).min(2)
    }
}

/// Latencies and rate of one phase. Times in nanoseconds; all 0 without commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseStats {
    /// Commands that ended.
    pub commands: u64,
    /// Median latency, ns.
    pub p50_ns: u64,
    /// 99th percentile, ns.
    pub p99_ns: u64,
    /// The longest, ns.
    pub max_ns: u64,
    /// Length of the phase, ns.
    pub duration_ns: u64,
    /// Commands per second.
    pub iops: u64,
}

/// A guest at a glance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestStats {
    /// Where in its life it is.
    pub stage: GuestStage,
    /// What it has done.
    pub counters: Counters,
    /// What went wrong first.
    pub first_error: Option<String>,
}

impl GuestStats {
    /// Nothing went wrong: no failed command, nothing unexpected read, the identity stayed.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        let Counters { errors, mismatches, identity_changes, .. } = self.counters;
        errors + mismatches + identity_changes == 0 && self.first_error.is_none() && self.stage != GuestStage::Failed
    }
}

/// The outside of a guest. Clones are the same guest.
#[derive(Clone, Debug)]
pub struct GuestHandle {
    pub(super) shared: Arc<Shared>,
}

impl GuestHandle {
    /// Latencies belong to this phase from now on.
    pub fn set_phase(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Asks the guest to end: outstanding commands are waited for, the controller is shut down.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
    }

    /// Asks for a controller reset; [`Counters::resets`] counts it when the identity has been compared and queues are there
    /// again. Requests before the reset begins are one.
    pub fn request_reset(&self) {
        self.shared.resets_asked.fetch_add(1, Ordering::Release);
    }

    /// Where in its life the guest is.
    #[must_use]
    pub fn stage(&self) -> GuestStage {
        let stage = usize::from(self.shared.stage.load(Ordering::Acquire));
        GuestStage::ALL.get(stage).copied().unwrap_or(GuestStage::Failed)
    }

    /// Whether the guest has ended, well or not.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.stage(), GuestStage::Stopped | GuestStage::Failed)
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counters.load()
    }

    /// The guest at a glance.
    #[must_use]
    pub fn stats(&self) -> GuestStats {
        GuestStats { stage: self.stage(), counters: self.counters(), first_error: self.first_error() }
    }

    /// What went wrong first.
    #[must_use]
    pub fn first_error(&self) -> Option<String> {
        self.shared.first_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the guest found when it identified its controller for the first time.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.shared.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.shared.ledger
    }

    /// Latencies and rate of a phase so far.
    #[must_use]
    pub fn phase_stats(&self, phase: Phase) -> PhaseStats {
        let histogram = &self.shared.latencies[phase as usize];
        let mut counts = [0; BUCKETS];
        histogram.add_to(&mut counts);
        let commands = total(&counts);
        let duration_ns = self.shared.phase_ns[phase as usize].load(Ordering::Relaxed);
        let max_ns = histogram.max();
        PhaseStats {
            commands,
            p50_ns: quantile(&counts, 500).min(max_ns),
            p99_ns: quantile(&counts, 990).min(max_ns),
            max_ns,
            duration_ns,
            iops: per_second(commands, duration_ns),
        }
    }

    /// A sampler of its own, whose first sample is about the time from now on.
    #[must_use]
    pub fn sampler(&self) -> GuestSampler {
        let mut sampler =
            GuestSampler { handle: self.clone(), seen: Box::new([0; BUCKETS]), seen_ns: 0, p99_before_us: 0 };
        let _from_now_on = sampler.sample();
        sampler
    }

    /// Records the lowest write outstanding now (or the next one's number) as the suspend floor. To be called before Suspend is
    /// submitted: what is below was acknowledged by the source, and must be in the copy. Whatever is issued between this call
    /// and the suspension is taken for a write that may be at the destination alone, so the closer the call, the sharper the
    /// comparison. A later call replaces an earlier one.
    pub fn mark_suspend(&self) -> u64 {
        let ledger = &self.shared.ledger;
        // The next number first: a write with a lower one shows in its place until it ended, which was before Suspend.
        let next = ledger.next_seq();
        let lowest = self.shared.outstanding.iter().map(|seq| seq.load(Ordering::Acquire)).min().unwrap_or(NO_WRITE);
        let floor = next.min(lowest);
        ledger.set_suspend_floor(Some(floor));
        floor
    }

    /// Records that the destination has resumed.
    pub fn mark_resume(&self) {
        self.shared.ledger.set_resume_mark(Some(self.shared.ledger.next_seq()));
    }

    /// Takes both marks back: the switch-over was undone and the source serves.
    pub fn clear_marks(&self) {
        self.shared.ledger.set_suspend_floor(None);
        self.shared.ledger.set_resume_mark(None);
    }
}

/// What the guest sees, since the sample before. All 0 where nothing ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestSample {
    /// Median latency, µs.
    pub p50_us: u32,
    /// 99th percentile, µs.
    pub p99_us: u32,
    /// Commands per second.
    pub iops: u32,
    /// 99th percentile before the migration began, µs.
    pub p99_before_us: u32,
}

/// Compares the guest's histograms with what they were at the last sample: some microseconds, no lock, nothing allocated.
#[derive(Debug)]
pub struct GuestSampler {
    handle: GuestHandle,
    seen: Box<[u64; BUCKETS]>,
    seen_ns: u64,
    p99_before_us: u32,
}

impl GuestSampler {
    /// What the guest saw since the last call. Its clock is the time of the guest's own polls.
    pub fn sample(&mut self) -> GuestSample {
        let shared = &self.handle.shared;
        let mut counts = [0; BUCKETS];
        for histogram in &shared.latencies {
            histogram.add_to(&mut counts);
        }
        if shared.phase() == Phase::Before as usize || self.p99_before_us == 0 {
            self.p99_before_us = us(self.handle.phase_stats(Phase::Before).p99_ns);
        }
        let now_ns = shared.now_ns.load(Ordering::Relaxed);
        for (count, seen) in counts.iter_mut().zip(self.seen.iter_mut()) {
            let all = *count;
            *count -= *seen;
            *seen = all;
        }
        let elapsed_ns = now_ns.saturating_sub(self.seen_ns);
        self.seen_ns = now_ns;
        let iops = u32::try_from(per_second(total(&counts), elapsed_ns)).unwrap_or(u32::MAX);
        let [p50_us, p99_us] = [500, 990].map(|per_mille| us(quantile(&counts, per_mille)));
        GuestSample { p50_us, p99_us, iops, p99_before_us: self.p99_before_us }
    }
}

fn us(ns: u64) -> u32 {
    u32::try_from(ns.div_ceil(1000)).unwrap_or(u32::MAX)
}

fn per_second(commands: u64, ns: u64) -> u64 {
    if ns == 0 { 0 } else { u64::try_from(u128::from(commands) * 1_000_000_000 / u128::from(ns)).unwrap_or(u64::MAX) }
}
