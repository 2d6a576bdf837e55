//! The three roles: what each is asked and what it answers, as owned values whose buffers are reused.

use crate::seam::{Fault, Setup};
use core::fmt::Debug;

/// One of the three roles of a policy.
pub trait Role: Sized + Send + Debug + Clone + 'static {
    /// The name used in `appliance.toml`, in JSON and on the command line.
    const NAME: &'static str;
    /// What `open` gets besides the set-up.
    type Extra: Clone + Debug + Send;
    /// What is asked.
    type Request: Default + Debug + Send;
    /// What is answered.
    type Answer: Default + Debug + PartialEq + Send;

    /// Empties an answer, keeping its buffers.
    fn clear(answer: &mut Self::Answer);

    /// Checks an answer against every bound of the interface.
    ///
    /// # Errors
    /// [`Fault::Malformed`] naming the first bound that is broken.
    fn check(setup: &Setup, extra: &Self::Extra, request: &Self::Request, answer: &Self::Answer) -> Result<(), Fault>;

    /// Entries or regions shown by a request, for the cost per item.
    fn items(extra: &Self::Extra, request: &Self::Request) -> u64;

    /// Writes the plainest valid answer, for when not even the native policy can be asked.
    fn safe(request: &Self::Request, answer: &mut Self::Answer);

    /// Keeps a bounded copy of a request, to try a new version on ([`crate::guard::Trial`]).
    fn record(extra: &Self::Extra, request: &Self::Request, into: &mut Self::Request);

    /// Something that the request named and a valid answer left out, in words. Never a danger (the host marks every entry by
    /// itself), but reason enough not to let a new version take over.
    fn omission(_: &Setup, _: &Self::Extra, _: &Self::Request, _: &Self::Answer) -> Option<String> {
        None
    }
}

/// How a controller data queue is drained.
#[derive(Clone, Debug)]
pub struct Cdq;

/// The controller data queue that a `cdq` policy is opened for (`cdq.queue` of the WIT package).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdqQueue {
    /// CDQID.
    pub id: u16,
    /// Queue type: 0 = user data migration queue, C0h and above vendor.
    pub kind: u8,
    /// CNTLID of the migratable controller it reports on.
    pub cntlid: u16,
    /// Slots of the ring.
    pub slots: u32,
    /// Bytes from one entry to the next.
    pub entry_bytes: u32,
    /// The byte of an entry that holds the phase tag.
    pub phase_byte: u32,
    /// The phase tag's bit in that byte.
    pub phase_mask: u8,
}

/// A batch of new entries.
#[derive(Debug, Default)]
pub struct CdqRequest {
    /// Microseconds since the migration began.
    pub now_us: u64,
    /// Raw entries, oldest first, `entry_bytes` each.
    pub entries: Vec<u8>,
    /// How many more lie in the queue behind them.
    pub waiting: u32,
}

/// What the entries said besides ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Logging started or resumed.
    pub first: bool,
    /// Last entry: stopped by the host.
    pub stopped: bool,
    /// Last entry: the controller is suspended.
    pub suspended: bool,
    /// Last entry: the queue was full; changes since are lost.
    pub full: bool,
    /// Everything may have changed.
    pub everything: bool,
}

/// What a `cdq` policy made of a batch (`cdq.drained`).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CdqAnswer {
    /// Packed ranges ([`crate::packed::RANGE_BYTES`] each), at most four per entry shown.
    pub ranges: Vec<u8>,
    /// Entries to give back, from the oldest.
    pub consumed: u32,
    /// What the entries said besides ranges.
    pub marks: Marks,
    /// Look again after this time, µs; 0 = at the next poll.
    pub wait_us: u32,
    /// Look again when this many wait; 0 = at the next poll.
    pub wait_entries: u32,
}

/// How change is tracked: the grain of a round, and what waits because it is hot.
#[derive(Clone, Debug)]
pub struct Tracking;

/// What the last round did (`tracking.round`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundReport {
    /// 0 = the full round.
    pub number: u32,
    /// How long it took, µs.
    pub duration_us: u64,
    /// Blocks written to the destination.
    pub copied_blocks: u64,
    /// Of those, blocks written as zeroes.
    pub zero_blocks: u64,
    /// Blocks dirtied meanwhile.
    pub dirtied_blocks: u64,
}

/// A round begins.
#[derive(Debug, Default)]
pub struct TrackingRequest {
    /// Microseconds since the migration began.
    pub now_us: u64,
    /// `None` before the full round.
    pub last: Option<RoundReport>,
    /// Packed regions ([`crate::packed::REGION_BYTES`] each).
    pub regions: Vec<u8>,
}

/// The plan of a round: one choice byte a region, same order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TrackingAnswer {
    /// Bits 4:0 log2 of the chunk in blocks, bit 7 hold for later.
    pub choices: Vec<u8>,
}

/// In which order and how fast the media is copied, and when to switch over.
#[derive(Clone, Debug)]
pub struct Copy;

/// What the link and the guest see (`copy.view`), and the regions.
#[derive(Debug, Default)]
pub struct CopyRequest {
    /// Microseconds since the migration began.
    pub now_us: u64,
    /// Wall clock, seconds since 1970 UTC (for policies that know of night and day).
    pub unix_s: i64,
    /// Local time's offset from UTC, minutes.
    pub utc_offset_min: i16,
    /// The round, 0 = the full one.
    pub round: u32,
    /// Dirty blocks.
    pub left_blocks: u64,
    /// Blocks in flight or queued already.
    pub queued_blocks: u64,
    /// Blocks dirtied per second since the last call.
    pub dirtied_per_s: u64,
    /// Blocks copied per second since the last call.
    pub copied_per_s: u64,
    /// Round trip of one write to the destination, µs.
    pub peer_us: u32,
    /// The guest's median latency since the last call, µs; 0 = unknown.
    pub guest_p50_us: u32,
    /// The guest's p99 latency since the last call, µs; 0 = unknown.
    pub guest_p99_us: u32,
    /// p99 before the migration began, µs; 0 = unknown.
    pub guest_p99_before_us: u32,
    /// The guest's commands per second since the last call.
    pub guest_iops: u32,
    /// What a switch-over now would cost, µs.
    pub downtime_estimate_us: u32,
    /// What it may cost, µs.
    pub downtime_budget_us: u32,
    /// The configuration lets the guest be slowed down.
    pub may_throttle: bool,
    /// Packed regions ([`crate::packed::REGION_BYTES`] each).
    pub regions: Vec<u8>,
}

/// A policy's wish at the end of a decision (`copy.then`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Then {
    /// Go on copying.
    #[default]
    GoOn,
    /// Switch over when it is safe and within the budget.
    SwitchOver,
}

/// What a `copy` policy decided (`copy.decision`).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CopyAnswer {
    /// Packed extents ([`crate::packed::EXTENT_BYTES`] each), in order, at most [`MAX_EXTENTS`].
    pub extents: Vec<u8>,
    /// Rate limit of the copy, bytes per second; 0 = none.
    pub bytes_per_s: u64,
    /// Limit on the guest's commands per second; 0 = none.
    pub guest_iops_limit: u32,
    /// The wish.
    pub then: Then,
    /// Ask again after this time, µs, or when the extents are done; 0 = when they are done.
    pub wait_us: u32,
}

/// Most extents of one decision.
pub const MAX_EXTENTS: usize = 4096;
/// Most ranges per entry shown.
pub const MAX_RANGES_PER_ENTRY: usize = 4;
