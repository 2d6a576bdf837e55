//! The world: everything of a run in one place, polled by one seeded scheduler under virtual time.
//!
//! Each part has a time at which it wants its next turn: what its poll asked for, or sooner when a neighbour did something that
//! it could see. Of those whose time has come the seed chooses; when there is none, time jumps to the next. So the seed decides
//! the order, how long each takes to notice the others, and who is left waiting ([`Pace`](super::scenario::Pace)).

use super::content;
use super::coverage::{Coverage, Kind};
use super::deeds::Later;
use super::disk::SimDisk;
use super::event::{Event, Side, Stamped, Violation};
use super::fault::Fault;
use super::guest::SimGuest;
use super::machine::{Figures, Inbox, Machine};
use super::oracle::Oracles;
use super::policies::{Kit, Misdeeds, Swaps};
use super::scenario::{Planned, Scenario};
use super::slots::RecordDisk;
use super::{Log, Options};
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::slot::Slot;
use dray_driver::DriverState;
use dray_migration::{Migration, Phase, Step};

/// Places in the order of parties.
const MIGRATION: usize = 2;
const MANAGER: usize = 3;
const RECORDS: usize = 4;
/// The first guest's.
pub const GUESTS: usize = 5;
/// Everybody is polled at least so often, ns.
const IDLE_NS: u64 = 400_000;
/// Of so many turns with work one wakes everybody next to it, whether or not they can see something of it.
const IN_VAIN: u32 = 32;
/// How long a guest that has done its share waits between two turns, ns at least.
const CALM_NS: u64 = 40_000;
/// Turns that a run may take.
const TURNS: u64 = 3_000_000;

/// Why a run does not go on as it was.
#[derive(Debug)]
pub enum Halt {
    /// It is over.
    Violation(Violation),
    /// The power was cut.
    Power,
}

impl From<Violation> for Halt {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

/// A violation that the world itself sees.
#[must_use]
pub fn violation(rule: &'static str, what: String) -> Violation {
    Violation { rule, what, place: None }
}

/// A guest in its slot.
pub struct Tenant {
    /// The guest.
    pub guest: SimGuest,
    /// Its slot.
    pub slot: Slot,
    /// Where that points.
    pub side: Side,
    /// Commands that its earlier lives have ended.
    pub before: u64,
}

/// Where the present migration of the script stands, for triggers.
#[derive(Debug, Default)]
pub struct Leg {
    /// Where the namespaces come from and go to.
    pub from: Side,
    /// See there.
    pub to: Side,
    /// When it began.
    pub began: Time,
    /// Commands that had ended then.
    pub ended: u64,
    /// The turn at which each phase was first seen.
    pub phases: [Option<u64>; 7],
    /// The same of the steps of the switch-over.
    pub steps: [Option<u64>; STEPS.len()],
    /// The turns at which records were begun.
    pub records: Vec<u64>,
    /// Steps of this attempt that were over at the last look.
    pub passed: usize,
    /// The phase at the last look.
    pub phase: Option<Phase>,
    /// The step at the last look.
    pub step: Option<Step>,
    /// What has not been done yet.
    pub deeds: Vec<Planned>,
    /// Deeds that were done.
    pub done: u32,
    /// It was cancelled in that state.
    pub cancelled: Option<&'static str>,
    /// Both sides were compared since the slots were pointed at the destination.
    pub compared: bool,
}

/// The steps of a switch-over, in order.
pub const STEPS: [Step; 12] = [
    Step::Prepare,
    Step::Suspend,
    Step::Drain,
    Step::LastRound,
    Step::Flush,
    Step::Compare,
    Step::ReadState,
    Step::Fence,
    Step::Record,
    Step::Point,
    Step::SetState,
    Step::Resume,
];

/// The name of a phase in tables.
#[must_use]
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Checking => "checking",
        Phase::Opening => "opening",
        Phase::Copying => "copying",
        Phase::SwitchingOver => "switching over",
        Phase::Completing => "completing",
        Phase::Undoing => "undoing",
        Phase::Ended => "ended",
    }
}

/// Everything of a run.
pub struct World<'k> {
    /// What the seed chose.
    pub scenario: Scenario,
    /// What policies are made from.
    pub kit: &'k Kit,
    /// The time of the next turn.
    pub now: Time,
    /// The schedule's choices.
    pub random: fastrand::Rng,
    /// The disks of both sides, by namespace.
    pub disks: [Vec<SimDisk>; 2],
    /// The disk of the records.
    pub records: RecordDisk,
    /// Both sides.
    pub machines: [Machine; 2],
    /// The guests.
    pub tenants: Vec<Tenant>,
    /// The migration, while there is one.
    pub migration: Option<Migration>,
    /// What its hooks say.
    pub inbox: Inbox,
    /// The first guest's figures.
    pub figures: Figures,
    /// Which side serves.
    pub serving: Side,
    /// The number of the next migration.
    pub next_migration: u64,
    /// How often the process has started.
    pub life: u32,
    /// Where the present migration stands.
    pub leg: Leg,
    /// What is to be done at a time.
    pub later: Vec<(Time, Later)>,
    /// What was reached.
    pub coverage: Coverage,
    /// Where its policies can be replaced.
    pub swaps: Option<Swaps>,
    /// Policies' misbehaviour that took effect.
    pub policy_log: Misdeeds,
    /// Turns so far.
    pub turns: u64,
    /// Who reads the events.
    pub log: Log,
    oracles: Oracles,
    events: Vec<Event>,
    due: Vec<Time>,
    /// Who can see something of the last turn. Of a side's: bit 0 its manager, bit 1 + n guest n; of others': bit n side n.
    shown: u32,
    /// Nobody is left waiting any more.
    pub fair: bool,
    /// The guests have done their share, and go on slowly.
    calm: bool,
}

impl<'k> World<'k> {
    /// A world at its start, guests not yet up.
    #[must_use]
    pub fn new(scenario: Scenario, options: &Options, kit: &'k Kit) -> Self {
        let seed = scenario.seed;
        let disk = |side: Side, index: usize, blocks: u64| {
            let nsid = 1 + index as u32;
            let disk = SimDisk::new(side, nsid, blocks, scenario.block_bytes, seed ^ 0xd15c);
            disk.set_latency_ns(scenario.latency_ns[side]);
            disk.set_cached(scenario.cached);
            // The destination holds something else, zeroes at other places included.
            let content = seed ^ (side as u64) << 56;
            disk.put(|lba| content::initial(content, nsid, lba));
            disk
        };
        let disks = [0, 1].map(|side| scenario.namespaces.iter().enumerate().map(|(i, n)| disk(side, i, *n)).collect::<Vec<_>>());
        let machines = [0, 1].map(|side| Machine::new(side, &scenario, &disks[side], false));
        let records = RecordDisk::new(seed);
        records.set_delay_us(scenario.record_us);
        let oracles = Oracles::new(&super::facts(&scenario));
        let mut world = Self {
            now: Time::from_us(1),
            random: fastrand::Rng::with_seed(seed ^ 0x7412_5eed),
            kit,
            disks,
            records,
            machines,
            tenants: Vec::new(),
            migration: None,
            inbox: Inbox::default(),
            figures: Figures::default(),
            serving: 0,
            next_migration: 1,
            life: 0,
            leg: Leg::default(),
            later: Vec::new(),
            coverage: Coverage::default(),
            swaps: None,
            policy_log: Misdeeds::default(),
            turns: 0,
            log: Log::new(options),
            oracles,
            events: Vec::with_capacity(256),
            due: vec![Time(0); GUESTS + scenario.guests.len()],
            shown: 0,
            fair: false,
            calm: false,
            scenario,
        };
        world.move_in();
        world
    }

    /// New guests in new slots, before the side that serves.
    pub fn move_in(&mut self) {
        let before: Vec<u64> = self.tenants.iter().map(|tenant| tenant.before + tenant.guest.ended()).collect();
        self.tenants.clear();
        for guest in 0..self.scenario.guests.len() {
            let before = before.get(guest).copied().unwrap_or(0);
            let slot = Slot::new(dray_device::space::AddressSpace::default(), 1).expect("a slot");
            slot.point_at(&self.machines[self.serving].plugs[guest]);
            let guest = SimGuest::new(super::guest_plan(&self.scenario, guest, self.life), &slot);
            self.tenants.push(Tenant { guest, slot, side: self.serving, before });
        }
        self.due.fill(self.now);
    }

    /// Commands that guests have ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.tenants.iter().map(|tenant| tenant.before + tenant.guest.ended()).sum()
    }

    /// Somebody has a turn; time passes.
    ///
    /// # Errors
    /// [`Halt`].
    pub fn turn(&mut self) -> Result<(), Halt> {
        self.turns += 1;
        if self.turns > TURNS {
            return Err(violation("does not end", format!("{TURNS} turns, at {:?}", self.leg.phase)).into());
        }
        if self.turns.is_multiple_of(64) {
            self.calm = self.ended() >= self.scenario.commands;
        }
        self.do_deeds()?;
        let party = self.choose();
        let progress = self.poll(party);
        if party == MIGRATION {
            self.look_at_migration();
        }
        self.wake(party, progress);
        self.tell()?;
        let (least, most) = self.scenario.pace.turn_ns;
        self.now = self.now.after_ns(self.random.u64(least..=most));
        Ok(())
    }

    /// Whose turn it is; time jumps if it is nobody's yet.
    fn choose(&mut self) -> usize {
        loop {
            let (mut ready, mut next) = (0u32, Time::NEVER);
            let mut chosen = 0;
            for (party, &due) in self.due.iter().enumerate() {
                let due = self.served(party, due);
                if due <= self.now {
                    ready += 1;
                    if ready == 1 || self.random.u32(0..ready) == 0 {
                        chosen = party;
                    }
                } else {
                    next = next.min(due);
                }
            }
            if ready > 0 {
                return chosen;
            }
            let timer = self.later.iter().map(|(due, _)| *due).min().unwrap_or(Time::NEVER);
            self.now = next.min(timer.max(self.now.after_ns(1)));
            self.do_later();
        }
    }

    /// When a party gets its turn that it wants at `due`.
    fn served(&self, party: usize, due: Time) -> Time {
        let Some(starved) = self.scenario.pace.starved.filter(|starved| starved.party == party && !self.fair) else { return due };
        let period = starved.served_ns + starved.starved_ns;
        let at = due.max(self.now).0;
        if at % period < starved.served_ns { due } else { Time((at / period + 1) * period) }
    }

    fn poll(&mut self, party: usize) -> Progress {
        let now = self.now;
        let events = &mut self.events;
        match party {
            0 | 1 => {
                let before = events.len();
                let progress = self.machines[party].poll(party, now, events);
                let mut next = Progress { work: 0, next: Next::OnWake };
                for disk in &self.disks[party] {
                    next = disk.take_events(events).map_or(next, |due| next.and(Progress::idle_until(due)));
                }
                let work = self.machines[party].bus.poll(now, events);
                let logged = events[before..].iter().any(|event| matches!(event, Event::CdqEntry { .. }));
                self.shown = self.machines[party].take_shown() | u32::from(work > 0 || logged);
                let bus = self.machines[party].bus.next_due().map_or(Progress::IDLE, Progress::idle_until);
                progress.and(Progress { work, next: next.next }).and(bus)
            }
            MIGRATION | MANAGER => {
                self.records.tick(now);
                let progress = match &mut self.migration {
                    Some(migration) if party == MIGRATION => migration.poll(now),
                    Some(_) => Progress::IDLE,
                    None => self.machines[party - MIGRATION].manager.as_mut().map_or(Progress::IDLE, |mmc| mmc.poll(now)),
                };
                let before = events.len();
                self.inbox.take(events);
                let said = events.len() > before;
                let work = self.machines.each_mut().map(|machine| machine.bus.poll(now, events));
                self.shown = u32::from(said || work[0] > 0) | u32::from(said || work[1] > 0) << 1;
                progress.and(Progress { work: work[0] + work[1], next: Next::OnWake })
            }
            RECORDS => {
                let ended = self.records.pump(now);
                let next = self.records.next_due().map_or(Next::OnWake, Next::At);
                Progress { work: ended, next }
            }
            _ => {
                let (before, tenant) = (events.len(), &mut self.tenants[party - GUESTS]);
                let settled = tenant.guest.driver_state() == &DriverState::Ready;
                let progress = tenant.guest.poll(now, events);
                let submitted = events[before..].iter().any(|event| matches!(event, Event::Submitted { .. }));
                let settled = settled && tenant.guest.driver_state() == &DriverState::Ready;
                self.shown = u32::from(submitted || !settled) << tenant.side;
                if party == GUESTS && self.migration.is_some() {
                    let mut figures = self.figures.cell();
                    if figures.is_none() {
                        *figures = Some(self.tenants[0].guest.sample());
                    }
                }
                progress
            }
        }
    }

    /// When the party and those who can see what it did have their next turns.
    fn wake(&mut self, party: usize, progress: Progress) {
        let now = self.now;
        let notice = self.scenario.pace.notice_ns;
        let wish = match progress.next {
            Next::At(time) if progress.work == 0 => time,
            Next::OnWake if progress.work == 0 => Time::NEVER,
            _ => now.after_ns(self.random.u64(0..=notice)),
        };
        self.due[party] = wish.max(now.after_ns(1)).min(now.after_ns(IDLE_NS));
        if party >= GUESTS && self.calm {
            self.due[party] = self.due[party].max(now.after_ns(self.random.u64(CALM_NS..CALM_NS * 2)));
        }
        if progress.work == 0 {
            return;
        }
        let calm = if self.calm { CALM_NS } else { 0 };
        // Now and then somebody looks who has no reason to.
        let shown = if self.random.u32(0..IN_VAIN) == 0 { u32::MAX } else { self.shown };
        let soon = |due: &mut Time, random: &mut fastrand::Rng| *due = (*due).min(now.after_ns(random.u64(0..=notice)));
        let due = &mut self.due;
        match party {
            0 | 1 => {
                if shown & 1 != 0 {
                    soon(&mut due[if self.migration.is_some() { MIGRATION } else { MIGRATION + party }], &mut self.random);
                }
                for (guest, tenant) in self.tenants.iter().enumerate() {
                    if tenant.side == party && shown & 2 << guest != 0 {
                        let due = &mut due[GUESTS + guest];
                        *due = (*due).min(now.after_ns(self.random.u64(0..=notice) + calm));
                    }
                }
            }
            MIGRATION | MANAGER => {
                for side in (0..2).filter(|side| shown & 1 << side != 0) {
                    soon(&mut due[side], &mut self.random);
                }
                due[RECORDS] = due[RECORDS].min(self.records.next_due().unwrap_or(Time::NEVER));
            }
            RECORDS => soon(&mut due[MIGRATION], &mut self.random),
            guest => {
                let side = self.tenants[guest - GUESTS].side;
                if shown & 1 << side != 0 {
                    soon(&mut due[side], &mut self.random);
                }
            }
        }
    }

    /// Everybody has a turn soon: something was done past them.
    pub fn wake_all(&mut self) {
        let now = self.now;
        self.due.iter_mut().for_each(|due| *due = (*due).min(now));
    }

    /// Notes where the migration is.
    fn look_at_migration(&mut self) {
        let Some(migration) = &self.migration else { return };
        let phase = migration.phase();
        if phase != Phase::SwitchingOver {
            self.leg.step = None;
        } else {
            let name = migration.progress(self.now).phase;
            // Several steps may be over in one poll.
            for (step, _) in migration.report().parts.iter().skip(self.leg.passed) {
                if self.leg.steps[*step as usize].is_none() {
                    self.leg.steps[*step as usize] = Some(self.turns);
                    self.coverage.hit(Kind::State, &format!("step {}", step.name()));
                }
            }
            self.leg.passed = migration.report().parts.len();
            if self.leg.step.is_none_or(|step| step.name() != name)
                && let Some(index) = STEPS.iter().position(|step| step.name() == name)
            {
                self.leg.step = Some(STEPS[index]);
                if self.leg.steps[index].is_none() {
                    self.leg.steps[index] = Some(self.turns);
                    self.coverage.hit(Kind::State, &format!("step {name}"));
                }
            }
        }
        if self.leg.phase != Some(phase) {
            self.leg.phase = Some(phase);
            self.leg.phases[phase as usize].get_or_insert(self.turns);
            self.coverage.hit(Kind::State, phase_name(phase));
        }
    }

    /// An event of the world's own.
    pub fn say(&mut self, event: Event) {
        self.events.push(event);
    }

    /// A fault took effect.
    pub fn took(&mut self, fault: Fault) {
        self.coverage.fault(fault);
    }

    /// Shows everybody what has happened since the last turn.
    ///
    /// # Errors
    /// What an oracle objects to.
    pub fn tell(&mut self) -> Result<(), Violation> {
        if self.events.is_empty() {
            return Ok(());
        }
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            let over = self.follow(&event);
            self.show(event)?;
            for event in over {
                self.show(event)?;
            }
        }
        // What was said meanwhile, by nobody today, comes next time.
        events.append(&mut self.events);
        self.events = events;
        Ok(())
    }

    fn show(&mut self, event: Event) -> Result<(), Violation> {
        let result = self.oracles.see(self.now, &event);
        self.log.keep(Stamped { at: self.now, event });
        result
    }

    /// What the world itself takes from an event. Returns what follows from it.
    fn follow(&mut self, event: &Event) -> Vec<Event> {
        match event {
            Event::Pointed { guest, side } => {
                self.tenants[*guest].side = *side;
                self.leg.compared = false;
            }
            Event::RecordBegun(_) => self.leg.records.push(self.turns),
            Event::Admin { side, command }
                if *side == self.leg.to
                    && self.migration.is_some()
                    && !self.leg.compared
                    && super::deeds::is_resume(command)
                    && self.tenants.iter().all(|tenant| tenant.side == *side) =>
            {
                self.leg.compared = true;
                return self.compare();
            }
            _ => {}
        }
        Vec::new()
    }

    /// Both sides' media, before the destination runs.
    fn compare(&self) -> Vec<Event> {
        let marked = self.migration.as_ref().map_or(&[][..], Migration::uncorrectable);
        let pairs = self.disks[0].iter().zip(&self.disks[1]).enumerate();
        let compare = |(index, (a, b)): (usize, (&SimDisk, &SimDisk))| {
            let nsid = 1 + index as u32;
            let mut different = a.different(b);
            different.retain(|lba| !marked.iter().any(|block| (block.nsid, block.lba) == (nsid, *lba)));
            Event::HandedOver { nsid, different }
        };
        pairs.map(compare).collect()
    }

    /// Turns until `done`.
    ///
    /// # Errors
    /// [`Halt`]; a violation when it takes longer than `us` of virtual time.
    pub fn until(&mut self, what: &'static str, us: u64, mut done: impl FnMut(&mut Self) -> bool) -> Result<(), Halt> {
        let end = self.now.after_us(us);
        while !done(self) {
            if self.now > end {
                let health: Vec<_> = self.machines.iter().map(|m| m.manager.as_ref().map(|mmc| mmc.health())).collect();
                let guests: Vec<_> = self.tenants.iter().map(|t| (t.guest.driver_state(), t.guest.outstanding(), t.side)).collect();
                let migration = self.migration.as_ref().map(|migration| (migration.phase(), self.leg.step, migration.report()));
                let text = format!("{what} takes more than {us} us: {migration:?}, managers {health:?}, guests {guests:?}");
                return Err(violation("does not end", text).into());
            }
            self.turn()?;
        }
        Ok(())
    }

    /// Counts what took effect out of sight.
    pub fn count_faults(&mut self) {
        let mut took = self.records.took();
        for disk in self.disks.iter().flatten() {
            took.append(&mut disk.took());
        }
        for machine in &mut self.machines {
            took.append(&mut machine.bus.took());
        }
        self.policy_log.take(&mut took);
        took.into_iter().for_each(|fault| self.coverage.fault(fault));
        self.count_absence();
        self.count_deviations();
    }

    /// The last word of the oracles.
    ///
    /// # Errors
    /// What an oracle objects to.
    pub fn finish(&mut self) -> Result<(), Violation> {
        self.tell()?;
        self.oracles.finish(self.now)
    }
}
