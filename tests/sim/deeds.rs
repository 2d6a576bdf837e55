//! What goes wrong, done when its moment has come.

use super::bus::BusFault;
use super::coverage::Kind;
use super::disk::Failing;
use super::event::{Event, Side};
use super::fault::Fault;
use super::scenario::{Deed, Planned, Role, Scenario, Trigger};
use super::world::{Halt, World, phase_name};
use dray_controller::Subsystem;
use dray_device::poll::Time;
use dray_migration::{Phase, Step};
use dray_nvme::command::{AdminOpcode, SubmissionEntry};
use dray_nvme::registers::offset;
use dray_nvme::status::Status;

/// What is done some time after a deed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Later {
    /// Writes that were swallowed at that side land.
    GiveBack(Side),
    /// Records take their usual time again.
    RecordsAsUsual,
}

/// Makes a side's controllers deviate as the scenario says.
pub fn deviate(subsystem: &mut Subsystem, scenario: &Scenario, side: Side) {
    subsystem.deviate(scenario.deviations[side]);
    subsystem.use_freedom(scenario.freedom);
}

/// Migration Send, Resume (Base 2.3 §5.2.17).
#[must_use]
pub fn is_resume(command: &SubmissionEntry) -> bool {
    command.admin_opcode() == AdminOpcode::MIGRATION_SEND && command.cdw10 & 0xff == 1
}

impl World<'_> {
    /// Does the deeds whose moment has come.
    ///
    /// # Errors
    /// [`Halt::Power`].
    pub fn do_deeds(&mut self) -> Result<(), Halt> {
        if self.leg.deeds.is_empty() || self.migration.is_none() {
            return Ok(());
        }
        let mut index = 0;
        while index < self.leg.deeds.len() {
            let deed = self.leg.deeds[index];
            if !self.is_due(deed.when) {
                index += 1;
                continue;
            }
            self.leg.deeds.swap_remove(index);
            self.leg.done += 1;
            self.do_deed(&deed)?;
        }
        Ok(())
    }

    fn is_due(&self, when: Trigger) -> bool {
        let passed = |since: Option<u64>, turns: u32| since.is_some_and(|turn| self.turns >= turn + u64::from(turns));
        match when {
            Trigger::AfterCommands(commands) => self.ended() >= self.leg.ended + commands,
            Trigger::AfterUs(us) => self.now >= self.leg.began.after_us(us),
            Trigger::AtPhase(phase, turns) => passed(self.leg.phases[phase as usize], turns),
            Trigger::AtStep(step, turns) => passed(self.leg.steps[step as usize], turns),
            Trigger::AtRecord(number, turns) => passed(self.leg.records.get(number as usize - 1).copied(), turns),
        }
    }

    /// The guest is paused for the hand-over, or has just been.
    fn in_handover(&self) -> bool {
        match self.leg.phase {
            Some(Phase::SwitchingOver) => self.leg.step.is_some_and(|step| step != Step::Prepare),
            Some(Phase::Completing | Phase::Undoing) => self.leg.steps[Step::Suspend as usize].is_some(),
            _ => false,
        }
    }

    fn side(&self, role: Role) -> Side {
        match role {
            Role::Source => self.leg.from,
            Role::Destination => self.leg.to,
        }
    }

    fn do_deed(&mut self, planned: &Planned) -> Result<(), Halt> {
        let now = self.now;
        self.wake_all();
        self.say(Event::Fault(name(planned.what)));
        match planned.what {
            Deed::EventLost => self.bus(Role::Source, BusFault::EventLost),
            Deed::EventLate(us) => self.bus(Role::Source, BusFault::EventLate(us)),
            Deed::EventDoubled => self.bus(Role::Source, BusFault::EventDoubled),
            Deed::MergeEntries => self.bus(Role::Source, BusFault::MergeEntries),
            Deed::AdminSlow(role, us) => self.bus(role, BusFault::AdminSlow(us)),
            Deed::AdminFails(role) => self.bus(role, BusFault::AdminFails(Status::INTERNAL_ERROR)),
            Deed::AdminNever(role) => self.bus(role, BusFault::AdminNever),
            Deed::ReadsFail(role, times) => self.fail(role, true, times, Status::UNRECOVERED_READ, false, Fault::ReadFails),
            Deed::WritesFail(role, times, touches) => {
                self.fail(role, false, times, Status::WRITE_FAULT, touches, Fault::WriteFails);
            }
            Deed::Full(role, times) => self.fail(role, false, times, Status::CAPACITY_EXCEEDED, false, Fault::BackingFull),
            Deed::Slow(role, operations, us) => {
                let side = self.side(role);
                self.disks[side].iter().for_each(|disk| disk.slow(operations, us * 1_000));
            }
            Deed::Swallow(role, writes, us) => {
                let side = self.side(role);
                self.disks[side].iter().for_each(|disk| disk.swallow(writes));
                self.later.push((now.after_us(us), Later::GiveBack(side)));
            }
            Deed::Unreadable => self.unreadable(),
            Deed::GuestReset(guest) => {
                self.tenants[guest].guest.request_reset();
                self.guest_reset();
            }
            Deed::RawReset(guest) => {
                self.tenants[guest].slot.function().write32(offset::CC, 0);
                self.guest_reset();
            }
            Deed::ManagementReset(role) => {
                let side = self.side(role);
                self.machines[side].raw.write32(offset::CC, 0);
                self.management_reset(role);
            }
            Deed::Fatal(role) => {
                self.count_absence();
                self.bus(role, BusFault::Fatal);
            }
            Deed::Gone(role, us) => {
                self.count_absence();
                self.bus(role, BusFault::Gone(now.after_us(us)));
            }
            Deed::Cancel => self.cancel(),
            Deed::Swap => self.swap_policy(),
            Deed::DestinationLoses => self.destination_loses(),
            Deed::RecordsFail(flushes) => self.records.fail(flushes),
            Deed::RecordsSlow(us) => {
                self.records.set_delay_us(us);
                self.later.push((now.after_us(us * 4), Later::RecordsAsUsual));
            }
            Deed::PowerCut => {
                self.took(Fault::PowerCut);
                if self.in_handover() {
                    self.took(Fault::PowerCutInHandover);
                }
                return Err(Halt::Power);
            }
        }
        Ok(())
    }

    fn bus(&mut self, role: Role, fault: BusFault) {
        let side = self.side(role);
        self.machines[side].bus.apply(fault, self.now);
    }

    fn fail(&mut self, role: Role, reads: bool, times: u32, status: Status, touches: bool, fault: Fault) {
        let side = self.side(role);
        let index = self.random.usize(0..self.disks[side].len());
        let all = self.scenario.namespaces[index];
        // Anywhere, or in a few blocks again and again.
        let blocks = if self.random.bool() { 0..all } else { self.few(all) };
        self.disks[side][index].fail(Failing { blocks, reads, times, status, touches, fault });
    }

    fn few(&mut self, all: u64) -> std::ops::Range<u64> {
        // Where guests are most of the time, or anywhere.
        let first = if self.random.bool() { self.random.u64(0..all.min(24)) } else { self.random.u64(0..all) };
        first..(first + self.random.u64(1..=8)).min(all)
    }

    fn unreadable(&mut self) {
        let side = self.leg.from;
        let index = self.random.usize(0..self.disks[side].len());
        let lba = self.few(self.scenario.namespaces[index]).start;
        let (status, times) = (Status::UNRECOVERED_READ, u32::MAX);
        let failing = Failing { blocks: lba..lba + 1, reads: true, times, status, touches: false, fault: Fault::Unreadable };
        self.disks[side][index].fail(failing);
    }

    fn guest_reset(&mut self) {
        self.took(Fault::GuestReset);
        if self.in_handover() {
            self.took(Fault::ResetInHandover);
        }
    }

    fn management_reset(&mut self, role: Role) {
        self.took(if role == Role::Source { Fault::SourceReset } else { Fault::DestinationReset });
        if self.in_handover() {
            self.took(Fault::ManagementResetInHandover);
        }
    }

    fn cancel(&mut self) {
        let Some(migration) = &mut self.migration else { return };
        if migration.phase() == Phase::Ended {
            return;
        }
        let state = match (migration.phase(), self.leg.step) {
            (Phase::SwitchingOver, Some(step)) => step.name(),
            (phase, _) => phase_name(phase),
        };
        migration.cancel();
        self.took(Fault::Cancelled);
        self.coverage.hit(Kind::End, &format!("cancelled in {state}"));
        self.leg.cancelled = Some(state);
    }

    fn destination_loses(&mut self) {
        // Once its controllers may run, a loss there is the guests' loss.
        let phase = self.migration.as_ref().map(dray_migration::Migration::phase);
        let may_run = self.leg.step == Some(Step::Resume) || matches!(phase, Some(Phase::Completing | Phase::Ended));
        if may_run || self.leg.compared {
            return;
        }
        let side = self.leg.to;
        self.disks[side].iter().for_each(|disk| _ = disk.power_cut());
        self.machines[side].raw.write32(offset::CC, 0);
        self.say(Event::SidePowerCut { side });
        self.took(Fault::DestinationLoses);
        self.management_reset(Role::Destination);
    }

    /// Does what was put off until now.
    pub fn do_later(&mut self) {
        let now = self.now;
        let mut index = 0;
        while index < self.later.len() {
            if self.later[index].0 > now {
                index += 1;
                continue;
            }
            let (_, later) = self.later.swap_remove(index);
            match later {
                Later::GiveBack(side) => self.disks[side].iter().for_each(|disk| disk.give_back()),
                Later::RecordsAsUsual => self.records.set_delay_us(self.scenario.record_us),
            }
            self.wake_all();
        }
    }

    /// Everything works again, as after a technician's visit.
    pub fn heal(&mut self) {
        self.later.clear();
        self.disks.iter().flatten().for_each(super::disk::SimDisk::heal);
        self.records.heal();
        self.records.set_delay_us(self.scenario.record_us);
        for machine in &mut self.machines {
            machine.bus.apply(BusFault::Heal, Time::default());
        }
        self.wake_all();
    }

    fn swap_policy(&mut self) {
        if let Some(swaps) = &self.swaps {
            self.kit.swap(swaps, &mut self.random);
        }
    }

    /// Counts management controllers that were seen to have failed, or to be gone.
    pub fn count_absence(&mut self) {
        for side in 0..2 {
            let source = side == self.leg.from;
            if self.machines[side].bus.gone_was_seen() {
                self.took(if source { Fault::SourceGone } else { Fault::DestinationGone });
            }
            if self.machines[side].bus.fatal_was_seen() {
                self.took(if source { Fault::SourceFails } else { Fault::DestinationFails });
            }
        }
    }

    /// Counts the deviations that have taken effect by now.
    pub fn count_deviations(&mut self) {
        for machine in &mut self.machines {
            let took = machine.subsystem.deviated();
            for (deviation, name) in dray_controller::Deviations::ALL {
                if took.has(*deviation) && !machine.deviated.has(*deviation) {
                    machine.deviated = machine.deviated.and(*deviation);
                    self.coverage.fault(Fault::Deviation);
                    self.coverage.hit(Kind::Deviation, name);
                }
            }
            let used = machine.subsystem.freedom_used();
            let before = std::mem::replace(&mut machine.freedom_used, used);
            if used.0 > before.0 {
                self.coverage.fault(Fault::EntriesSplit);
            }
            if used.1 > before.1 {
                self.coverage.fault(Fault::EntryEarly);
            }
        }
    }
}

/// The deed's name in a trace.
fn name(deed: Deed) -> &'static str {
    match deed {
        Deed::EventLost => "the next event of the source is lost",
        Deed::EventLate(_) => "the next event of the source is late",
        Deed::EventDoubled => "the next event of the source comes twice",
        Deed::MergeEntries => "entries are merged",
        Deed::AdminSlow(Role::Source, _) => "an admin command is slow at the source",
        Deed::AdminSlow(Role::Destination, _) => "an admin command is slow at the destination",
        Deed::AdminFails(Role::Source) => "an admin command fails at the source",
        Deed::AdminFails(Role::Destination) => "an admin command fails at the destination",
        Deed::AdminNever(Role::Source) => "an admin command is never answered at the source",
        Deed::AdminNever(Role::Destination) => "an admin command is never answered at the destination",
        Deed::ReadsFail(Role::Source, _) => "reads fail at the source",
        Deed::ReadsFail(Role::Destination, _) => "reads fail at the destination",
        Deed::WritesFail(Role::Source, ..) => "writes fail at the source",
        Deed::WritesFail(Role::Destination, ..) => "writes fail at the destination",
        Deed::Full(Role::Source, _) => "the source's media is full",
        Deed::Full(Role::Destination, _) => "the destination's media is full",
        Deed::Slow(Role::Source, ..) => "the source's media is slow",
        Deed::Slow(Role::Destination, ..) => "the destination's media is slow",
        Deed::Swallow(Role::Source, ..) => "writes at the source do not end",
        Deed::Swallow(Role::Destination, ..) => "writes at the destination do not end",
        Deed::Unreadable => "a block can never be read again",
        Deed::GuestReset(_) => "a guest resets its controller",
        Deed::RawReset(_) => "a guest's controller is disabled past its driver",
        Deed::ManagementReset(Role::Source) => "the source's management controller is reset past its driver",
        Deed::ManagementReset(Role::Destination) => "the destination's management controller is reset past its driver",
        Deed::Fatal(Role::Source) => "the source's management controller fails",
        Deed::Fatal(Role::Destination) => "the destination's management controller fails",
        Deed::Gone(Role::Source, _) => "the source's management controller is gone",
        Deed::Gone(Role::Destination, _) => "the destination's management controller is gone",
        Deed::Cancel => "the migration is cancelled",
        Deed::Swap => "a policy is replaced",
        Deed::DestinationLoses => "the destination restarts and loses what was not flushed",
        Deed::RecordsFail(_) => "records fail",
        Deed::RecordsSlow(_) => "records are slow",
        Deed::PowerCut => "the power is cut",
    }
}
