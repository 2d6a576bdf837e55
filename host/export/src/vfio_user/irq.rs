//! Interrupts: IRQ_INFO and SET_IRQS. The function has MSI-X and a pin.
//!
//! MSI-X is masked by the client (it owns the vector table), and a vector that is signalled without an eventfd is remembered by
//! the slot. The pin (INTx) masks itself when it signals; the client unmasks it by a message, or by an eventfd that it signals
//! when its guest has served the interrupt. The error line is signalled when the function is taken out of its slot.

use dray_device::event::EventLine;
use dray_device::poll::Time;
use dray_device::slot::Slot;
use dray_device::vfio_user::wire::{IrqInfo, IrqSet, errno, irq};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How often the eventfds that mask and unmask the pin are looked at: a look is a system call.
const PIN_LOOK_US: u64 = 20;

/// The client's event lines.
pub(crate) struct Interrupts {
    slot: Slot,
    vectors: u16,
    error: Option<EventLine>,
    /// Signalled by the client: to mask the pin, to unmask it.
    pin_masks: [Option<EventLine>; 2],
    next_look: Time,
}

impl Interrupts {
    /// No vector of the slot has a line from now on.
    pub(crate) fn new(slot: Slot, vectors: u16) -> Self {
        let mut interrupts = Self { slot, vectors, error: None, pin_masks: [None, None], next_look: Time(0) };
        interrupts.release();
        interrupts.slot.forget_pending();
        interrupts
    }

    /// Vectors of an index.
    fn count_of(&self, index: u32) -> u32 {
        match index {
            irq::MSIX => self.vectors.into(),
            irq::INTX | irq::ERR => 1,
            _ => 0,
        }
    }

    /// The reply to IRQ_INFO.
    ///
    /// # Errors
    /// EINVAL for an index that does not exist.
    pub(crate) fn info(&self, request: &IrqInfo) -> Result<IrqInfo, u32> {
        if (request.argsz as usize) < size_of::<IrqInfo>() || request.index >= irq::COUNT {
            return Err(errno::EINVAL);
        }
        let count = self.count_of(request.index);
        let more = match request.index {
            irq::INTX => IrqInfo::MASKABLE | IrqInfo::AUTOMASKED,
            _ if count > 0 => IrqInfo::NORESIZE,
            _ => 0,
        };
        Ok(IrqInfo { argsz: 16, flags: IrqInfo::EVENTFD | more, index: request.index, count })
    }

    /// No line is the client's any more.
    pub(crate) fn release(&mut self) {
        self.error = None;
        self.disable(irq::INTX);
        (0..self.slot.vectors()).for_each(|vector| _ = self.slot.set_line(vector, None));
    }

    /// The function was taken out of its slot: says so, once to each line that is given for it.
    pub(crate) fn report_gone(&mut self) {
        if let Some(line) = self.error.take() {
            line.signal();
        }
    }

    /// Looks whether the client has masked or unmasked the pin by its eventfds; returns whether it has.
    pub(crate) fn look(&mut self, now: Time) -> bool {
        if now < self.next_look || self.pin_masks.iter().all(Option::is_none) {
            return false;
        }
        self.next_look = now.after_us(PIN_LOOK_US);
        let [mask, unmask] = self.pin_masks.each_ref().map(|line| line.as_ref().is_some_and(|line| line.take() > 0));
        if mask {
            self.slot.pin().mask(true);
        }
        // Whoever does both at once has served an interrupt meanwhile: one too many is better than none.
        if unmask {
            self.slot.pin().mask(false);
        }
        mask || unmask
    }

    /// What the client signals.
    pub(crate) fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pin_masks.iter().flatten().map(AsFd::as_fd)
    }

    fn disable(&mut self, index: u32) {
        (0..self.count_of(index) as u16).for_each(|vector| self.set_line(index, vector, None));
        if index == irq::INTX {
            self.pin_masks = [None, None];
        }
    }

    fn set_line(&mut self, index: u32, vector: u16, line: Option<EventLine>) {
        match index {
            irq::MSIX => _ = self.slot.set_line(vector, line),
            irq::INTX => self.slot.pin().set_line(line),
            _ => self.error = line,
        }
    }

    fn signal(&self, index: u32, vector: u16) {
        match index {
            irq::MSIX => self.slot.raise(vector),
            irq::INTX => self.slot.pin().try_out(),
            _ => self.error.iter().for_each(EventLine::signal),
        }
    }

    /// SET_IRQS. Descriptors that are used are taken out of `fds`.
    ///
    /// # Errors
    /// An errno; nothing has changed then.
    pub(crate) fn set(&mut self, set: &IrqSet, bools: &[u8], fds: &mut Vec<OwnedFd>) -> Result<(), u32> {
        let IrqSet { argsz, flags, index, start, count } = *set;
        let (data, action) = (flags & IrqSet::DATA, flags & IrqSet::ACTION);
        let known = flags & !(IrqSet::DATA | IrqSet::ACTION) == 0 && data.is_power_of_two() && action.is_power_of_two();
        if (argsz as usize) < size_of::<IrqSet>() || index >= irq::COUNT || !known {
            return Err(errno::EINVAL);
        }
        let there = self.count_of(index);
        if (data, action, start, count) == (IrqSet::DATA_NONE, IrqSet::TRIGGER, 0, 0) {
            self.disable(index);
            return Ok(());
        }
        let inside = start < there && count > 0 && count <= there - start;
        // MSI-X is masked by its client, the error line not at all.
        if !inside || action != IrqSet::TRIGGER && index != irq::INTX {
            return Err(errno::EINVAL);
        }
        let range = (start as u16)..(start + count) as u16;
        match data {
            IrqSet::DATA_NONE => range.for_each(|vector| self.act(index, vector, action)),
            IrqSet::DATA_BOOL => {
                let bools = bools.get(..count as usize).ok_or(errno::EINVAL)?;
                range.zip(bools).filter(|(_, on)| **on != 0).for_each(|(vector, _)| self.act(index, vector, action));
            }
            _ if fds.is_empty() => range.for_each(|vector| self.wire(index, vector, action, None)),
            _ => {
                if fds.len() != count as usize {
                    return Err(errno::EINVAL);
                }
                let lines = fds.drain(..).map(EventLine::from_client).collect::<Result<Vec<_>, _>>();
                let lines = lines.map_err(|_| errno::EINVAL)?;
                range.zip(lines).for_each(|(vector, line)| self.wire(index, vector, action, Some(line)));
            }
        }
        Ok(())
    }

    /// What is done to a vector now.
    fn act(&self, index: u32, vector: u16, action: u32) {
        match action {
            IrqSet::TRIGGER => self.signal(index, vector),
            _ => self.slot.pin().mask(action == IrqSet::MASK),
        }
    }

    /// What a line is for from now on.
    fn wire(&mut self, index: u32, vector: u16, action: u32, line: Option<EventLine>) {
        match action {
            IrqSet::TRIGGER => self.set_line(index, vector, line),
            _ => self.pin_masks[usize::from(action == IrqSet::UNMASK)] = line,
        }
    }
}
