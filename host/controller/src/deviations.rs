//! Behaviour of devices that exist and deviate from the specification, and freedom that the specification leaves a device: for
//! the simulator alone.
//!
//! Behind the feature `deviations` a subsystem can be told to deviate (`Subsystem::deviate`), in the ways that QEMU's model of
//! live migration (branch nvme.tp4159) is known to, one by one. It then calls itself by that model's name, so that a host knows
//! what it deals with. Without the feature every question here is a constant "no": nothing of it is compiled.

#[cfg(feature = "deviations")]
use std::sync::Arc;
#[cfg(feature = "deviations")]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

macro_rules! deviations {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// A way to deviate. Each says what a host must do about it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[cfg_attr(not(feature = "deviations"), allow(dead_code, unreachable_pub))]
        #[repr(u8)]
        pub enum Deviation {
            $($(#[doc = $doc])+ $name,)+
        }

        #[cfg(feature = "deviations")]
        impl Deviations {
            /// All of them, and their names.
            pub const ALL: &'static [(Deviation, &'static str)] = &[$((Deviation::$name, stringify!($name)),)+];
        }
    };
}

deviations! {
    /// Whatever entry takes the last free slot gets ESA 111b, a FIRST, STOPPED or SUSPENDED included (and FIRST asks for one
    /// free slot only). A host must take 111b for the end of the log whatever it had expected, and read its range.
    FullReplacesMarker,
    /// After 111b entries are dropped without a word, logging stays on, and goes on without ESA 001b when the head moves. A
    /// host must stop, start and copy everything: the stream has a hole.
    SilentAfterFull,
    /// STOPPED, SUSPENDED and FIRST are posted into a full queue as well: the ring then looks empty to the device, which goes
    /// on over unread entries. A host must drain before Track Send stop and Suspend, and never trust a queue that was full.
    MarkersOverwrite,
    /// The tail pointer trigger fires when the new tail is TPT, not when slot TPT is posted. A host arms head + 1.
    TriggerOnTailOnly,
    /// Only the first one-shot event after a reset is delivered. A host must look by timer.
    OneEventOnly,
    /// Set Features 21h takes heads that are not on a posted entry, N itself included. A host must wrap its head.
    HeadUnchecked,
    /// Set Features 21h leaves a pending tail pointer event pending. A host must bear events that it did not arm.
    EventStaysPending,
    /// Track Send, start, succeeds without an entry where logging is on. A host must not wait for FIRST then.
    RepeatedStartUnmarked,
    /// Entries of Dataset Management have NLB as a count (one block too many is named) and DLBA 0. A host must clip them.
    DsmCountNotZeroBased,
    /// Of Dataset Management only the first run of ranges is logged. A host must compare at the end.
    DsmGapDropped,
    /// Copy and Write Uncorrectable are not logged. A host must compare at the end.
    CopyNotLogged,
    /// Suspend posts SUSPENDED also where nothing is logged, and again when it is repeated. A host must count what it asked
    /// for, not the marks.
    SuspendMarksAlways,
    /// After Resume the admin submission queue is not looked at until its doorbell changes. A command that waits there needs
    /// another one behind it.
    ResumeSkipsAdmin,
    /// S0PT of a completion queue's state is the tag that is written next, also while the tail is 0; it is read so, too. A
    /// host must turn the bit where the tail is 0.
    PhaseInsteadOfS0pt,
    /// CSUP of Get Controller State is never set. A host must read CSATTR of the header.
    CsupNeverSet,
    /// Set Controller State takes one command (SEQIND 11b), else Internal Error. A host must send a state whole.
    StateInOneCommand,
    /// CSVI of Set Controller State is read as 16 bits, so that CSUUIDI must be 0. A host whose state needs a vendor part
    /// cannot move there.
    StateIndexWide,
    /// Once an I/O queue was created no state with queues is taken until the controller is reset. A host must reset it first.
    QueuesStick,
    /// A reset of the management controller leaves logging on: a later queue of the same controller gets entries at once, and
    /// Track Send start posts no FIRST. A host must stop, then start, or not wait for FIRST.
    LoggingSurvivesReset,
    /// A reset of the management controller leaves controllers suspended. A host must resume them.
    SuspensionSurvivesReset,
    /// An unknown CNTLID is Invalid Field, at Get Controller State 37h; an unknown SEL of the CDQ command is a bare DNR with
    /// status code 0. A host must take any non-zero status for a failure.
    StatusesDiffer,
    /// Track Send of memory changes and Track Receive are Internal Error. A host must track memory otherwise.
    NoMemoryTracking,
    /// A queue behind a PRP list (PC = 0) is taken and never filled. A host must use contiguous queues.
    ContiguousOnly,
    /// The limits of Identify (MCUDMQ and the others) are 0, and MCMR is 1. A host must take 0 for "not told".
    LimitsUntold,
}

#[cfg(feature = "deviations")]
impl Deviation {
    /// Whether it can take effect with a host of ours: one that wraps its head, asks for no unknown controller, tracks no
    /// memory, uses contiguous queues, and guests that do not send Copy or Write Uncorrectable.
    #[must_use]
    pub fn shows(self) -> bool {
        let hidden =
            [Self::HeadUnchecked, Self::CopyNotLogged, Self::StatusesDiffer, Self::NoMemoryTracking, Self::ContiguousOnly];
        !hidden.contains(&self)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Deviations::ALL.get(self as usize).map_or("", |(_, name)| name)
    }
}

/// A set of [`Deviation`]s.
#[cfg(feature = "deviations")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deviations(u64);

#[cfg(feature = "deviations")]
impl Deviations {
    /// None.
    pub const NONE: Self = Self(0);

    /// This set and one more.
    #[must_use]
    pub const fn and(self, deviation: Deviation) -> Self {
        Self(self.0 | 1 << deviation as u8)
    }

    /// All of them at once, as the model that they were read from.
    #[must_use]
    pub fn qemu() -> Self {
        Self::ALL.iter().fold(Self::NONE, |set, (deviation, _)| set.and(*deviation))
    }

    /// Whether it is in the set.
    #[must_use]
    pub const fn has(self, deviation: Deviation) -> bool {
        self.0 >> deviation as u8 & 1 == 1
    }

    /// Whether the set is empty.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those in the set.
    pub fn iter(self) -> impl Iterator<Item = Deviation> {
        Self::ALL.iter().map(|(deviation, _)| *deviation).filter(move |deviation| self.has(*deviation))
    }
}

/// Freedom that the specification leaves the producer of a UDMQ (NVMCS, UDMQ entry): both are 0 at start.
#[cfg(feature = "deviations")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdmqFreedom {
    /// Most blocks of one entry, so that one change is told by several entries; 0 = what NLB holds.
    pub max_blocks: u32,
    /// Polls that a completion waits behind the entries of its batch; 0 = none. What the entries name is on the media then.
    pub early_polls: u32,
}

#[cfg(feature = "deviations")]
#[derive(Debug, Default)]
struct Switches {
    on: AtomicU64,
    took: AtomicU64,
    max_blocks: AtomicU32,
    early_polls: AtomicU32,
    split: AtomicU32,
    early: AtomicU32,
    /// Controllers (by index) whose logging a reset of the manager has left on.
    left_on: AtomicU64,
}

/// What one controller remembers to deviate with.
#[derive(Debug, Default)]
pub(crate) struct Oddities {
    /// Polls that the completions at hand still wait.
    #[cfg(feature = "deviations")]
    left: u32,
    /// Where the log stood when completions were last let go: CDQID, tail and phase.
    #[cfg(feature = "deviations")]
    seen: (u16, u32, bool),
    /// The admin queue is not looked at while its doorbell says this.
    #[cfg(feature = "deviations")]
    bell: Option<u32>,
    /// An I/O queue was created since the last reset.
    #[cfg(feature = "deviations")]
    had_queues: bool,
}

#[cfg(not(feature = "deviations"))]
#[expect(clippy::unused_self, reason = "the other half of the feature has something to remember")]
impl Oddities {
    #[inline(always)]
    pub(crate) fn holds(&mut self, _: &Deviating, _: Option<(u16, u32, bool)>, _ready: usize) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn resumed(&mut self, _: &Deviating, _head: u32, _tail: u32) {}

    #[inline(always)]
    pub(crate) fn skips_admin(&mut self, _tail: u32) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn created_queue(&mut self) {}

    #[inline(always)]
    pub(crate) fn had_queues(&self) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn reset(&mut self) {}
}

#[cfg(feature = "deviations")]
impl Oddities {
    /// Whether `ready` completions wait behind the entries of their batch, which end at `place`.
    pub(crate) fn holds(&mut self, deviating: &Deviating, place: Option<(u16, u32, bool)>, ready: usize) -> bool {
        let (polls, Some(place)) = (deviating.early_polls(), place) else { return false };
        if polls == 0 || ready == 0 {
            return false;
        }
        if self.left > 0 {
            self.left -= 1;
            if self.left == 0 {
                // What came meanwhile goes with them: a busy guest must get its completions.
                self.seen = place;
            }
        } else if self.seen != place {
            self.left = polls;
            deviating.was_early();
        }
        self.left > 0
    }

    /// The controller is resumed with that head and tail of its admin submission queue.
    pub(crate) fn resumed(&mut self, deviating: &Deviating, head: u32, tail: u32) {
        let skips = head != tail && deviating.does(Deviation::ResumeSkipsAdmin);
        self.bell = skips.then_some(tail);
    }

    /// Whether the admin queue, whose doorbell says `tail`, is not looked at.
    pub(crate) fn skips_admin(&mut self, tail: u32) -> bool {
        self.bell = self.bell.filter(|bell| *bell == tail);
        self.bell.is_some()
    }

    /// An I/O queue is there.
    pub(crate) fn created_queue(&mut self) {
        self.had_queues = true;
    }

    /// Whether one was there since the last reset.
    pub(crate) fn had_queues(&self) -> bool {
        self.had_queues
    }

    /// The controller is reset.
    pub(crate) fn reset(&mut self) {
        (self.left, self.bell, self.had_queues) = (0, None, false);
    }
}

/// How a subsystem deviates, as its parts ask. Clones are the same switches.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deviating {
    #[cfg(feature = "deviations")]
    switches: Arc<Switches>,
}

#[cfg(not(feature = "deviations"))]
#[expect(clippy::unused_self, reason = "the other half of the feature has something to ask")]
impl Deviating {
    #[inline(always)]
    pub(crate) fn is(&self, _: Deviation) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn does(&self, _: Deviation) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn most_blocks(&self, most: u64, _blocks: u64) -> u64 {
        most
    }

    #[inline(always)]
    pub(crate) fn leave_on(&self, _: usize) {}

    #[inline(always)]
    pub(crate) fn was_left_on(&self, _: usize) -> bool {
        false
    }
}

#[cfg(feature = "deviations")]
impl Deviating {
    /// It is switched on.
    pub(crate) fn is(&self, deviation: Deviation) -> bool {
        Deviations(self.switches.on.load(Ordering::Relaxed)).has(deviation)
    }

    /// It is switched on, and takes effect now.
    pub(crate) fn does(&self, deviation: Deviation) -> bool {
        let on = self.is(deviation);
        if on {
            self.switches.took.fetch_or(Deviations::NONE.and(deviation).0, Ordering::Relaxed);
        }
        on
    }

    /// Most blocks of one entry, for a change of so many.
    pub(crate) fn most_blocks(&self, most: u64, blocks: u64) -> u64 {
        match self.switches.max_blocks.load(Ordering::Relaxed) {
            0 => most,
            limit => {
                if blocks > u64::from(limit) {
                    self.switches.split.fetch_add(1, Ordering::Relaxed);
                }
                u64::from(limit)
            }
        }
    }

    /// Polls that completions wait behind their entries.
    pub(crate) fn early_polls(&self) -> u32 {
        self.switches.early_polls.load(Ordering::Relaxed)
    }

    /// Entries were posted before their completions.
    pub(crate) fn was_early(&self) {
        self.switches.early.fetch_add(1, Ordering::Relaxed);
    }

    /// The logging of that controller outlives its queue.
    pub(crate) fn leave_on(&self, controller: usize) {
        self.switches.left_on.fetch_or(1u64.checked_shl(controller as u32).unwrap_or(0), Ordering::Relaxed);
    }

    /// Whether a queue that is created for that controller is logged into at once; it is not asked twice.
    pub(crate) fn was_left_on(&self, controller: usize) -> bool {
        let bit = 1u64.checked_shl(controller as u32).unwrap_or(0);
        self.switches.left_on.fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }

    pub(crate) fn set(&self, deviations: Deviations) {
        self.switches.on.store(deviations.0, Ordering::Relaxed);
    }

    pub(crate) fn took(&self) -> Deviations {
        Deviations(self.switches.took.load(Ordering::Relaxed))
    }

    pub(crate) fn set_freedom(&self, freedom: UdmqFreedom) {
        self.switches.max_blocks.store(freedom.max_blocks, Ordering::Relaxed);
        self.switches.early_polls.store(freedom.early_polls, Ordering::Relaxed);
    }

    pub(crate) fn freedom_used(&self) -> (u32, u32) {
        (self.switches.split.load(Ordering::Relaxed), self.switches.early.load(Ordering::Relaxed))
    }
}

#[cfg(feature = "deviations")]
mod api {
    use super::{Deviations, UdmqFreedom};
    use crate::subsystem::Subsystem;

    /// The model whose deviations these are.
    const MODEL: &str = "QEMU NVMe Ctrl";

    impl Subsystem {
        /// From now on the subsystem deviates so, and calls itself by the model that does, so that a host can know. An empty
        /// set makes it behave again; the name stays.
        pub fn deviate(&mut self, deviations: Deviations) {
            self.shared.deviating.set(deviations);
            if !deviations.is_empty() {
                self.shared.config.model = MODEL.into();
            }
        }

        /// Those that have taken effect: something was different from what the specification says.
        #[must_use]
        pub fn deviated(&self) -> Deviations {
            self.shared.deviating.took()
        }

        /// From now on entries of data queues use this freedom.
        pub fn use_freedom(&mut self, freedom: UdmqFreedom) {
            self.shared.deviating.set_freedom(freedom);
        }

        /// How often a change was told by several entries, and how often entries were posted before their completions.
        #[must_use]
        pub fn freedom_used(&self) -> (u32, u32) {
            self.shared.deviating.freedom_used()
        }
    }
}
