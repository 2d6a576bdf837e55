//! What happened: plain values that the binary writes as text and as JSON.

use crate::copy::Uncorrectable;
use crate::pump::PumpStats;
use crate::reason::Reason;
use dray_policy::seam::{Identity, SeatStats};
use std::collections::VecDeque;

/// Rounds that a report keeps at its end, beside the first ones.
const LAST_ROUNDS: usize = 48;
/// Rounds that a report keeps at its beginning.
const FIRST_ROUNDS: usize = 16;

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// 0 = the full one.
    pub number: u32,
    /// Bytes written to the destination.
    pub bytes: u64,
    /// Of those, zeroes.
    pub zero_bytes: u64,
    /// How long it took, µs, its flush included.
    pub duration_us: u64,
    /// Bytes dirtied meanwhile.
    pub dirtied_bytes: u64,
    /// Everything was copied (the first round, or one after a hole in the log).
    pub full: bool,
}

/// The rounds: the first and the last ones, and how many there were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rounds {
    first: Vec<Round>,
    last: VecDeque<Round>,
    count: u64,
}

impl Rounds {
    /// Appends a round.
    pub fn push(&mut self, round: Round) {
        self.count += 1;
        if self.first.len() < FIRST_ROUNDS {
            self.first.push(round);
            return;
        }
        if self.last.len() == LAST_ROUNDS {
            self.last.pop_front();
        }
        self.last.push_back(round);
    }

    /// Those that are kept, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Round> {
        self.first.iter().chain(&self.last)
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// The steps of a switch-over, in order; the guest is paused from [`Step::Suspend`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Copies end, the destination flushes and its controllers are suspended; the guest still runs.
    Prepare,
    /// Suspend of the whole migration set.
    Suspend,
    /// Every queue drained to its "last, suspended" mark.
    Drain,
    /// What is dirty is copied.
    LastRound,
    /// The destination flushes.
    Flush,
    /// Everything is compared (only for drives that are not trusted).
    Compare,
    /// Controller states are read.
    ReadState,
    /// The fence goes up, and behind it each controller of the source says once more that it is suspended.
    Fence,
    /// The "moved" record is written and flushed.
    Record,
    /// The guest's slots are pointed at the destination.
    Point,
    /// Controller states are set.
    SetState,
    /// Resume at the destination; in a media move at the controllers that stayed.
    Resume,
    /// A media move, in the place of [`Point`](Self::Point) and [`SetState`](Self::SetState): the backing is exchanged. A media
    /// move has no [`ReadState`](Self::ReadState) either.
    Exchange,
    /// A hand-over, in the place of [`Point`](Self::Point): the states are in the VM manager's hands.
    Told,
    /// A departure, after [`ReadState`](Self::ReadState): the states are made durable.
    Keep,
    /// A departure, before [`Fence`](Self::Fence): the namespaces are detached from the source's controllers. Its last step is
    /// [`Record`](Self::Record).
    Detach,
}

impl Step {
    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Suspend => "suspend",
            Self::Drain => "drain",
            Self::LastRound => "last_round",
            Self::Flush => "flush",
            Self::Compare => "compare",
            Self::ReadState => "read_state",
            Self::Fence => "fence",
            Self::Record => "record",
            Self::Point => "point",
            Self::SetState => "set_state",
            Self::Resume => "resume",
            Self::Exchange => "exchange",
            Self::Told => "told",
            Self::Keep => "keep",
            Self::Detach => "detach",
        }
    }
}

/// What a role's policy did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyReport {
    /// Who answered.
    pub identity: Identity,
    /// The seat's counts.
    pub stats: SeatStats,
    /// cdq: blocks that entries named and the policy left out. copy: blocks that it did not order and the host added.
    pub omissions: u64,
    /// Answers that came too late for the host to wait for: it went on without. That may be the machine's fault.
    pub late: u64,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Running,
    /// The destination serves.
    Moved,
    /// It was undone: the source serves, nothing is lost.
    Undone(Reason),
    /// The guest is paused: it is not known who serves, or the source could not be resumed. An operator must look.
    InDoubt {
        /// Why the migration did not go on.
        reason: Reason,
        /// What could not be done or found out.
        what: String,
    },
}

/// The report of one migration.
#[derive(Clone, Debug)]
pub struct Report {
    /// The rounds.
    pub rounds: Rounds,
    /// From the first Suspend to the last Resume's completion, µs.
    pub downtime_us: Option<u64>,
    /// Its parts, in order, µs ([`Step::Prepare`], which the guest does not feel, first).
    pub parts: Vec<(Step, u64)>,
    /// Bytes written after Suspend.
    pub last_round_bytes: u64,
    /// The three roles: cdq, tracking, copy.
    pub policies: Vec<(&'static str, PolicyReport)>,
    /// What the pumps counted together.
    pub pump: PumpStats,
    /// Blocks marked as unreadable at the destination.
    pub uncorrectable: Vec<Uncorrectable>,
    /// Times that a queue was full.
    pub fills: u32,
    /// Transfers tried again.
    pub retries: u64,
    /// Pieces whose checksum was taken.
    pub checksums: u64,
    /// Bytes written in all.
    pub copied_bytes: u64,
    /// Of those, zeroes.
    pub zero_bytes: u64,
    /// Bytes compared while suspended.
    pub compared_bytes: u64,
    /// Blocks in pieces that differed then, and were copied again.
    pub different_blocks: u64,
    /// Attempts at the switch-over.
    pub attempts: u32,
    /// Why earlier attempts were undone (the last ones).
    pub undone_attempts: Vec<Reason>,
    /// Why the drive's reports are a hint only, if they are.
    pub hint_only: Option<String>,
    /// From start to end, µs.
    pub duration_us: u64,
    /// How it ended.
    pub outcome: Outcome,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            rounds: Rounds::default(),
            downtime_us: None,
            parts: Vec::new(),
            last_round_bytes: 0,
            policies: Vec::new(),
            pump: PumpStats::default(),
            uncorrectable: Vec::new(),
            fills: 0,
            retries: 0,
            checksums: 0,
            copied_bytes: 0,
            zero_bytes: 0,
            compared_bytes: 0,
            different_blocks: 0,
            attempts: 0,
            undone_attempts: Vec::new(),
            hint_only: None,
            duration_us: 0,
            outcome: Outcome::Running,
        }
    }
}

/// A look at a running migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgressView {
    /// The state's name.
    pub phase: &'static str,
    /// The round, 0 = the full one.
    pub round: u32,
    /// Bytes written in this round.
    pub round_bytes: u64,
    /// Bytes that were dirty when it began.
    pub round_total: u64,
    /// Bytes left to copy.
    pub left_bytes: u64,
    /// Bytes copied per second of late.
    pub copied_per_s: u64,
    /// Bytes dirtied per second of late.
    pub dirtied_per_s: u64,
    /// Time left in this round, µs; 0 = unknown.
    pub eta_us: u64,
    /// What a switch-over now would cost, µs.
    pub downtime_estimate_us: u32,
    /// Limit on the guest's commands per second; 0 = none.
    pub guest_limit: u32,
    /// Microseconds since the migration began.
    pub elapsed_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_do_not_grow_with_the_migration() {
        let mut rounds = Rounds::default();
        for number in 0..10_000 {
            rounds.push(Round { number, ..Round::default() });
        }
        let kept: Vec<_> = rounds.iter().map(|round| round.number).collect();
        assert_eq!((kept.len(), rounds.count()), (64, 10_000));
        assert_eq!((kept[15], kept[16], kept[63]), (15, 9952, 9999));
    }
}
