//! The order of the hand-over, and of what carries it: records, fence, slots, Suspend, state, Resume (rules 7 and 9); with the
//! [log](super::log) and the [copies](super::copies).

use super::super::event::{Event, GuestId, Side, Violation, owner_of};
use super::copies::{Copies, Operation};
use super::log::{FIRST_CNTLID, Log, News};
use super::serving::Serving;
use super::{Facts, violation};
use dray_device::backing::BackingOp;
use dray_device::poll::Time;
use dray_migration::RecordPhase;
use dray_nvme::command::{
    AdminOpcode, CntlidCdw11, GetControllerStateCdw11, MigrationSendCdw10, MigrationSendSelect, SequenceIndicator,
    SetControllerStateCdw10, SetControllerStateCdw11, SubmissionEntry, SuspendCdw11, SuspendType,
};

/// A migratable controller, as its management controller has been told.
#[derive(Clone, Copy, Debug, Default)]
struct Controller {
    /// Suspend has succeeded, and no Resume was sent since.
    suspended: bool,
    /// It was still suspended behind its fence, which has stayed up: whatever ends the suspension now, it takes no command.
    held: bool,
    /// Its state was read since it was suspended.
    read: bool,
    /// Where the next piece of its state begins.
    next: Option<u64>,
    /// The last piece of a state was accepted.
    complete: bool,
}

/// The protocol.
#[derive(Debug)]
pub struct Protocol {
    log: Log,
    copies: Copies,
    /// By side and guest.
    controllers: [Vec<Controller>; 2],
}

impl Protocol {
    /// Before anything.
    #[must_use]
    pub fn new(facts: &Facts) -> Self {
        Self { log: Log::default(), copies: Copies::new(facts), controllers: [Vec::new(), Vec::new()] }
    }

    /// Something happened; `serving` knows of it already.
    ///
    /// # Errors
    /// What is out of order.
    pub fn see(&mut self, at: Time, event: &Event, serving: &Serving) -> Result<(), Violation> {
        self.copies.tick();
        let source = serving.ends().map(|(from, _)| from);
        match self.log.see(at, event, serving.owner())? {
            News::Begins(side) if Some(side) == source => self.copies.log_begins(),
            News::Changed(side, nsid, range) if Some(side) == source => {
                if let Some(index) = self.copies.find(nsid) {
                    self.copies.changed(index, range);
                }
            }
            _ => {}
        }
        match event {
            Event::Begins { .. } => self.copies.begins(),
            Event::MediaBegan { side, serial, op, nsid, slba, blocks } => {
                let Some(index) = self.copies.find(*nsid) else { return Ok(()) };
                let guests = *op == BackingOp::Read && self.log.is_guest_read(*nsid, *slba, *blocks);
                return self.copies.began(Operation::new(*side, *serial, *op, index, *slba, *blocks, guests), serving);
            }
            Event::MediaEnded { side, serial, status } => return self.copies.ended(*side, *serial, !status.is_error(), serving),
            Event::RecordBegun(record) if record.phase == RecordPhase::Moved => {
                let to = owner_of(record).unwrap_or(serving.owner());
                self.suspended(serving)?;
                return self.copies.moved(to);
            }
            Event::Fence { side, up: false } => {
                self.controllers[*side].iter_mut().for_each(|controller| controller.held = false);
                if Some(*side) == source {
                    return settled(serving, *side, "the source's fence is lowered");
                }
            }
            Event::Pointed { side, .. } => return self.pointed(*side, serving),
            Event::Admin { side, command } => return self.admin(*side, command, serving),
            Event::AdminEnded { side, command, completion } if !completion.status().is_error() => {
                self.admin_ended(*side, command, serving);
            }
            Event::ManagementReset { side } => self.controllers[*side].iter_mut().for_each(Controller::reset),
            Event::SidePowerCut { side } => {
                self.controllers[*side].iter_mut().for_each(Controller::reset);
                self.copies.power_cut(*side);
            }
            Event::Restarted { .. } => {
                self.controllers.iter_mut().for_each(Vec::clear);
                self.copies.restarted();
            }
            _ => {}
        }
        Ok(())
    }

    /// Nothing more will happen.
    ///
    /// # Errors
    /// A guest's command that never ended.
    pub fn finish(&self) -> Result<(), Violation> {
        self.log.finish()
    }

    fn controller(&mut self, side: Side, cntlid: u16) -> Option<&mut Controller> {
        let guest = GuestId::from(cntlid.checked_sub(FIRST_CNTLID)?);
        let controllers = &mut self.controllers[side];
        if controllers.len() <= guest {
            controllers.resize(guest + 1, Controller::default());
        }
        controllers.get_mut(guest)
    }

    /// "Moved" is about to be recorded: the whole set is suspended, behind the fence; or it was, and a reset of its manager has
    /// ended that too late to matter, since the fence stands (rule 9).
    fn suspended(&self, serving: &Serving) -> Result<(), Violation> {
        let Some((from, _)) = serving.ends() else { return Ok(()) };
        if !serving.is_fenced(from) {
            return Err(violation("fenced before the record", format!("side {from} is not fenced when the record says moved")));
        }
        let running = self.log.guests().find(|guest| !self.controllers[from].get(*guest).is_some_and(|c| c.suspended || c.held));
        match running {
            Some(guest) => Err(violation("the whole set is suspended", format!("guest {guest}'s controller is not, when the record says moved"))),
            None => Ok(()),
        }
    }

    fn pointed(&self, side: Side, serving: &Serving) -> Result<(), Violation> {
        match serving.ends() {
            Some((from, to)) if side == to => {
                settled(serving, to, "a slot is pointed at the destination")?;
                fenced(serving, from, "a slot is pointed at the destination")
            }
            Some((from, _)) => settled(serving, from, "a slot is pointed back at the source"),
            None => Ok(()),
        }
    }

    fn admin(&mut self, side: Side, command: &SubmissionEntry, serving: &Serving) -> Result<(), Violation> {
        if command.admin_opcode() != AdminOpcode::MIGRATION_SEND {
            return Ok(());
        }
        let handing = serving.ends().filter(|(_, to)| *to == side);
        match MigrationSendCdw10::from_bits(command.cdw10).sel() {
            MigrationSendSelect::RESUME => {
                let cntlid = CntlidCdw11::from_bits(command.cdw11).cntlid();
                if let Some((from, to)) = handing {
                    settled(serving, to, "the destination is resumed")?;
                    fenced(serving, from, "the destination is resumed")?;
                    if self.controller(to, cntlid).is_some_and(|controller| !controller.complete) {
                        return Err(violation("the state comes before Resume", format!("CNTLID {cntlid} is resumed without a state")));
                    }
                } else if serving.ends().is_some() {
                    settled(serving, side, "the source is resumed")?;
                }
                if let Some(controller) = self.controller(side, cntlid) {
                    (controller.suspended, controller.held, controller.read) = (false, false, false);
                }
            }
            MigrationSendSelect::SET_CONTROLLER_STATE => return self.set_state(command, handing, serving),
            MigrationSendSelect::SUSPEND => {
                if let Some(controller) = self.controller(side, SuspendCdw11::from_bits(command.cdw11).cntlid()) {
                    (controller.read, controller.complete) = (false, false);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Set Controller State: of a controller whose state was read, to one that is suspended, piece by piece. One that reaches a
    /// destination which the record does not name was sent before the undo (or too early), and counts for nothing.
    fn set_state(&mut self, command: &SubmissionEntry, ends: Option<(Side, Side)>, serving: &Serving) -> Result<(), Violation> {
        let Some((from, to)) = ends else { return Ok(()) };
        let cntlid = SetControllerStateCdw11::from_bits(command.cdw11).cntlid();
        let read = self.controller(from, cntlid).is_some_and(|controller| controller.read);
        let Some(controller) = self.controller(to, cntlid) else { return Ok(()) };
        if serving.owner() != to {
            (controller.next, controller.complete) = (None, false);
            return Ok(());
        }
        let (offset, bytes) = (command.offset(), u64::from(command.cdw15) * 4);
        let first = matches!(
            SetControllerStateCdw10::from_bits(command.cdw10).seqind(),
            SequenceIndicator::FIRST | SequenceIndicator::ONLY
        );
        let wanted = if first { Some(0) } else { controller.next };
        let why = if !read {
            "no state of the source's controller was read while it is suspended".to_owned()
        } else if wanted != Some(offset) {
            format!("a piece at byte {offset} follows where {wanted:?} was to come")
        } else {
            controller.next = Some(offset + bytes);
            return Ok(());
        };
        Err(violation("states are set as they were read", format!("CNTLID {cntlid}: {why}")))
    }

    fn admin_ended(&mut self, side: Side, command: &SubmissionEntry, serving: &Serving) {
        match command.admin_opcode() {
            AdminOpcode::MIGRATION_RECEIVE => {
                let cntlid = GetControllerStateCdw11::from_bits(command.cdw11).cntlid();
                if let Some(controller) = self.controller(side, cntlid) {
                    controller.read = controller.suspended;
                    controller.held |= controller.suspended && serving.is_fenced(side);
                }
            }
            AdminOpcode::MIGRATION_SEND => match MigrationSendCdw10::from_bits(command.cdw10).sel() {
                MigrationSendSelect::SUSPEND => {
                    let cdw11 = SuspendCdw11::from_bits(command.cdw11);
                    if let Some(controller) = self.controller(side, cdw11.cntlid()) {
                        controller.suspended |= cdw11.stype() == SuspendType::SUSPEND;
                    }
                }
                MigrationSendSelect::SET_CONTROLLER_STATE => {
                    let last = matches!(
                        SetControllerStateCdw10::from_bits(command.cdw10).seqind(),
                        SequenceIndicator::LAST | SequenceIndicator::ONLY
                    );
                    let cntlid = SetControllerStateCdw11::from_bits(command.cdw11).cntlid();
                    if let Some(controller) = self.controller(side, cntlid) {
                        controller.complete |= last && serving.owner() == side;
                    }
                }
                _ => {}
            },
            _ => {}
        }
    }
}

impl Controller {
    /// A reset of the management controller ends suspensions; the fence holds all the same, and states that were read, and set,
    /// stay what they are.
    fn reset(&mut self) {
        (self.suspended, self.next) = (false, None);
    }
}

/// What relies on a record finds it durable.
fn settled(serving: &Serving, side: Side, what: &'static str) -> Result<(), Violation> {
    if serving.owner() == side && serving.is_settled() {
        return Ok(());
    }
    Err(violation("durable before what relies on it", format!("{what}, and the record of side {side} is not durable")))
}

fn fenced(serving: &Serving, side: Side, what: &'static str) -> Result<(), Violation> {
    if serving.is_fenced(side) {
        return Ok(());
    }
    Err(violation("the source is fenced", format!("{what}, and side {side} is not fenced")))
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
