//! What a seed chooses: sizes, load, latencies, the migration's configuration, and what goes wrong when. A pure function of the
//! seed; `{:#?}` of it is where looking into a failed seed starts.

use super::Options;
use super::event::GuestId;
use super::policies::PolicyChoice;
use dray_controller::{Deviation, Deviations, UdmqFreedom};
use super::world::STEPS;
use dray_migration::{CopyConfig, Limits, OnMediaError, Phase, PumpLimits, Step};

/// Whose part in the migration of a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The side that serves.
    Source,
    /// The side that shall.
    Destination,
}

/// When a deed is done. What is counted in turns is looked at after each poll of anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The guests have ended so many commands since the leg began.
    AfterCommands(u64),
    /// So long after the leg began, µs.
    AfterUs(u64),
    /// So many turns after the migration was first seen in that phase.
    AtPhase(Phase, u32),
    /// So many turns after the switch-over was first seen at that step.
    AtStep(Step, u32),
    /// So many turns after the record of that number (from 1) of the leg was begun.
    AtRecord(u32, u32),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// The next one-shot event of the source's management controller never comes.
    EventLost,
    /// It comes so much later, µs.
    EventLate(u64),
    /// It comes twice.
    EventDoubled,
    /// New entries of adjacent ranges are merged.
    MergeEntries,
    /// The next admin commands take so long, µs.
    AdminSlow(Role, u64),
    /// An admin command fails.
    AdminFails(Role),
    /// An admin command is never answered.
    AdminNever(Role),
    /// Reads of some blocks fail so many times.
    ReadsFail(Role, u32),
    /// Writes fail so many times; `true` = they touch the media all the same.
    WritesFail(Role, u32, bool),
    /// No space left for so many writes.
    Full(Role, u32),
    /// The next operations take so much longer: how many, µs.
    Slow(Role, u32, u64),
    /// The next writes do not end; they land so much later, µs.
    Swallow(Role, u32, u64),
    /// One block can never be read again.
    Unreadable,
    /// A guest resets its controller.
    GuestReset(GuestId),
    /// A guest's controller is disabled past its driver.
    RawReset(GuestId),
    /// A management controller is reset past its driver.
    ManagementReset(Role),
    /// A management controller sets CSTS.CFS.
    Fatal(Role),
    /// A management controller is gone for so long, µs.
    Gone(Role, u64),
    /// The migration is cancelled.
    Cancel,
    /// A policy is replaced.
    Swap,
    /// The destination restarts and loses what it had not flushed.
    DestinationLoses,
    /// The next flushes of the journal's disk fail.
    RecordsFail(u32),
    /// Records take so long from now on, µs.
    RecordsSlow(u64),
    /// The power of everything is cut.
    PowerCut,
}

/// A deed and its moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// In which migration of the script, from 0.
    pub leg: usize,
    /// When.
    pub when: Trigger,
    /// What.
    pub what: Deed,
}

/// A party that is not polled for a while, again and again.
#[derive(Clone, Copy, Debug)]
pub struct Starved {
    /// Who, by its place in the world's order.
    pub party: usize,
    /// How long it has its turns, ns.
    pub served_ns: u64,
    /// How long it has not, ns.
    pub starved_ns: u64,
}

/// How polls are ordered.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Time from one turn to the next, ns.
    pub turn_ns: (u64, u64),
    /// How long a part takes to notice what another has done, ns at most.
    pub notice_ns: u64,
    /// Who is left waiting.
    pub starved: Option<Starved>,
}

/// A guest's load.
#[derive(Clone, Debug)]
pub struct Load {
    /// Its namespaces (NSID).
    pub namespaces: Vec<u32>,
    /// Commands outstanding at most.
    pub depth: u16,
    /// I/O queue pairs.
    pub queues: u16,
    /// Blocks of one command at most.
    pub max_blocks: u32,
    /// Time between two commands, ns.
    pub gap_ns: (u64, u64),
    /// Commands of 100 that go to a few blocks.
    pub hot: u8,
}

/// Everything that a seed chooses but the schedule.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The seed.
    pub seed: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Blocks of each namespace; NSIDs count from 1.
    pub namespaces: Vec<u64>,
    /// The guests; guest g drives controller 2 + g of each side.
    pub guests: Vec<Load>,
    /// Commands that the guests end together at least.
    pub commands: u64,
    /// The media has a volatile write cache.
    pub cached: bool,
    /// Time of an operation at each side, ns.
    pub latency_ns: [(u64, u64); 2],
    /// Time of a record, µs.
    pub record_us: u64,
    /// Slots of a controller data queue.
    pub cdq_slots: u32,
    /// The drives' model is not on the tested list.
    pub untested: bool,
    /// How each side deviates from the specification, as drives do that exist.
    pub deviations: [Deviations; 2],
    /// What both sides make of the freedom that the specification leaves them.
    pub freedom: UdmqFreedom,
    /// How the engine copies.
    pub copy: CopyConfig,
    /// How queues are drained.
    pub pump: PumpLimits,
    /// The host's limits.
    pub limits: Limits,
    /// The guests may be slowed down.
    pub may_throttle: bool,
    /// How polls are ordered.
    pub pace: Pace,
    /// The policies of each migration with faults.
    pub legs: Vec<PolicyChoice>,
    /// What goes wrong in them.
    pub deeds: Vec<Planned>,
    /// After the last of them one more without faults, even if it was not needed.
    pub and_again: bool,
}

/// Numbers of the seed's own, for choices.
struct Dice(fastrand::Rng);

impl Dice {
    /// True `percent` times of a hundred.
    fn chance(&mut self, percent: u32) -> bool {
        self.0.u32(0..100) < percent
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.0.usize(0..of.len())]
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0.u64(low..=high)
    }

    /// Small more often than large: uniform in the number of digits.
    fn skewed(&mut self, low: u64, high: u64) -> u64 {
        let (low, high) = (low.max(1), high.max(1));
        let shift = self.0.u32(low.ilog2()..=high.ilog2());
        self.0.u64(1 << shift..=(2 << shift) - 1).clamp(low, high)
    }

    fn role(&mut self) -> Role {
        if self.0.bool() { Role::Source } else { Role::Destination }
    }
}

/// What that seed chooses, without the deeds that the options leave out.
#[must_use]
pub fn of(seed: u64, options: &Options) -> Scenario {
    let mut scenario = Scenario::of(seed);
    let mut place = 0;
    scenario.deeds.retain(|_| {
        place += 1;
        !options.without.contains(&(place - 1))
    });
    scenario
}

impl Scenario {
    /// What that seed chooses.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice(fastrand::Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5ce0));
        let block_bytes = dice.one(&[512, 512, 4096]);
        let namespaces = (0..dice.one(&[1, 1, 2])).map(|_| dice.one(&[64u64, 128, 128, 256, 512]) * 1024 / u64::from(block_bytes) + dice.between(0, 7));
        let namespaces: Vec<u64> = namespaces.collect();
        let guests = (0..dice.one(&[1, 1, 2, 2, 3])).map(|guest| load(&mut dice, guest, namespaces.len() as u32)).collect::<Vec<_>>();
        let latency = |dice: &mut Dice| dice.one(&[(1_000, 10_000), (2_000, 40_000), (2_000, 40_000), (10_000, 120_000)]);
        let latency_ns = [latency(&mut dice), latency(&mut dice)];
        let cdq_slots = dice.one(&[8, 16, 32, 64, 128, 256, 1024]);
        let legs = dice.one(&[1, 1, 2, 2, 3]);
        let deeds = (0..legs).flat_map(|leg| deeds_of(&mut dice, leg, guests.len())).collect();
        let legs = (0..legs).map(|_| PolicyChoice::of(&mut dice.0)).collect();
        let (deviating, other) = (dice.chance(20), dice.chance(30));
        Self {
            seed,
            block_bytes,
            commands: 2_000,
            cached: dice.chance(60),
            latency_ns,
            record_us: dice.skewed(2, 300),
            cdq_slots,
            untested: dice.chance(12),
            deviations: [deviations(&mut dice, deviating), deviations(&mut dice, deviating && other)],
            freedom: UdmqFreedom {
                max_blocks: if dice.chance(15) { dice.skewed(1, 16) as u32 } else { 0 },
                early_polls: if dice.chance(15) { dice.skewed(1, 16) as u32 } else { 0 },
            },
            copy: copy(&mut dice),
            pump: PumpLimits { drain_us: dice.skewed(50, 2_000), hurry_us: dice.skewed(20, 300) },
            limits: limits(&mut dice),
            may_throttle: dice.chance(30),
            pace: pace(&mut dice, guests.len()),
            legs,
            deeds,
            and_again: dice.chance(25),
            namespaces,
            guests,
        }
    }
}

fn deviations(dice: &mut Dice, deviating: bool) -> Deviations {
    if !deviating {
        return Deviations::NONE;
    }
    if dice.chance(10) {
        return Deviations::qemu();
    }
    let count = dice.one(&[1, 1, 2]);
    // By the model that a deviating subsystem calls itself a host decides how to read S0PT: the one deviation that it cannot get
    // along without. So whoever calls itself so has it.
    let always = Deviations::NONE.and(Deviation::PhaseInsteadOfS0pt);
    (0..count).fold(always, |set, _| set.and(dice.one(Deviations::ALL).0))
}

fn load(dice: &mut Dice, guest: usize, namespaces: u32) -> Load {
    // The first guest has all, so that every namespace has a writer.
    let namespaces = match (1..=namespaces).filter(|_| guest == 0 || dice.0.bool()).collect::<Vec<_>>() {
        none if none.is_empty() => vec![1],
        some => some,
    };
    let gap = dice.skewed(2_000, 20_000);
    Load {
        namespaces,
        depth: dice.one(&[2, 4, 8, 16]),
        queues: dice.one(&[1, 1, 2]),
        max_blocks: dice.one(&[1, 4, 8, 16]),
        gap_ns: (gap / 2, gap * 2),
        hot: dice.one(&[0, 20, 50, 90]),
    }
}

fn copy(dice: &mut Dice) -> CopyConfig {
    CopyConfig {
        transfers: dice.one(&[2, 4, 8]),
        transfer_bytes: dice.one(&[4096, 8192, 16_384, 32_768]),
        attempts: dice.one(&[1, 2, 3]),
        on_media_error: if dice.0.bool() { OnMediaError::Fail } else { OnMediaError::Mark },
    }
}

fn limits(dice: &mut Dice) -> Limits {
    Limits {
        max_rounds: dice.one(&[3, 8, 20, 60]),
        max_time_ms: dice.one(&[20, 40, 80]),
        downtime_budget_us: dice.one(&[500, 2_000, 5_000, 20_000]),
        compare_budget_us: dice.one(&[0, 100_000, 100_000]),
        step_ms: dice.between(4, 8),
        max_attempts: dice.one(&[1, 2, 3]),
        max_fills: dice.one(&[1, 2, 3]),
        max_cdq_slots: 4096,
        patience_us: dice.skewed(200, 2_000),
        undo_ms: dice.between(15, 25),
        guest_floor: 1_000,
        throttle_ms: 20,
    }
}

fn pace(dice: &mut Dice, guests: usize) -> Pace {
    let starved = dice.chance(30).then(|| Starved {
        party: dice.0.usize(0..4 + guests),
        served_ns: dice.skewed(20_000, 2_000_000),
        starved_ns: dice.skewed(20_000, 600_000),
    });
    let turn = dice.skewed(40, 400);
    Pace { turn_ns: (turn / 2, turn), notice_ns: dice.skewed(500, 8_000), starved }
}

fn deeds_of(dice: &mut Dice, leg: usize, guests: usize) -> Vec<Planned> {
    let count = dice.one(&[3, 4, 5, 6, 8]);
    let mut deeds = Vec::new();
    for _ in 0..count {
        let what = deed(dice, guests);
        deeds.push(Planned { leg, when: moment(dice), what });
    }
    if dice.chance(25) {
        let when = if dice.chance(70) { Trigger::AtStep(dice.one(&STEPS), dice.skewed(1, 4) as u32 - 1) } else { moment(dice) };
        deeds.push(Planned { leg, when, what: Deed::Cancel });
    }
    if dice.chance(25) {
        let at_record = Trigger::AtRecord(dice.between(1, 3) as u32, dice.skewed(1, 16) as u32 - 1);
        let when = if dice.chance(40) { at_record } else { moment(dice) };
        deeds.push(Planned { leg, when, what: Deed::PowerCut });
    }
    deeds
}

fn moment(dice: &mut Dice) -> Trigger {
    const PHASES: [Phase; 6] =
        [Phase::Checking, Phase::Opening, Phase::Copying, Phase::SwitchingOver, Phase::Completing, Phase::Undoing];
    let turns = dice.skewed(1, 60) as u32 - 1;
    match dice.0.u8(0..10) {
        0..=1 => Trigger::AfterCommands(dice.between(1, 400)),
        2 => Trigger::AfterUs(dice.skewed(1, 4_000)),
        3..=4 => Trigger::AtPhase(dice.one(&PHASES), turns),
        5..=8 => Trigger::AtStep(dice.one(&STEPS), turns),
        _ => Trigger::AtRecord(dice.between(1, 3) as u32, turns),
    }
}

fn deed(dice: &mut Dice, guests: usize) -> Deed {
    let role = dice.role();
    let few = dice.skewed(1, 12) as u32;
    match dice.0.u8(0..27) {
        0 => Deed::EventLost,
        1 => Deed::EventLate(dice.skewed(10, 3_000)),
        2 => Deed::EventDoubled,
        3 => Deed::MergeEntries,
        4 => Deed::AdminSlow(role, dice.skewed(50, 4_000)),
        5 => Deed::AdminFails(role),
        6 => Deed::AdminNever(role),
        7 => Deed::ReadsFail(role, few),
        8 | 9 => Deed::WritesFail(role, few, dice.0.bool()),
        10 => Deed::Full(role, few),
        11 | 12 => Deed::Slow(role, few, dice.skewed(200, 3_000)),
        13 | 14 => Deed::Swallow(role, few.min(4), dice.skewed(100, 20_000)),
        15 => Deed::Unreadable,
        16 | 17 => Deed::GuestReset(dice.0.usize(0..guests)),
        18 => Deed::RawReset(dice.0.usize(0..guests)),
        19 => Deed::ManagementReset(role),
        20 => Deed::Fatal(role),
        21 => Deed::Gone(role, dice.skewed(50, 8_000)),
        22 => Deed::Swap,
        23 => Deed::DestinationLoses,
        24 => Deed::RecordsFail(few.min(3)),
        25 => Deed::RecordsSlow(dice.skewed(500, 6_000)),
        _ => Deed::EventLate(dice.skewed(10, 500)),
    }
}
