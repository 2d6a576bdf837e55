//! Interrupts: IRQ_INFO and SET_IRQS. The function has MSI-X; the client masks by itself (it owns the vector table), and a
//! vector that is signalled without an eventfd is remembered by the slot. The error line is signalled when the function is
//! taken out of its slot.

use dray_device::event::EventLine;
use dray_device::slot::Slot;
use dray_device::vfio_user::wire::{IrqInfo, IrqSet, errno, irq};
use std::os::fd::OwnedFd;

/// The client's event lines.
pub(crate) struct Interrupts {
    slot: Slot,
    vectors: u16,
    error: Option<EventLine>,
}

impl Interrupts {
    /// No vector of the slot has a line from now on.
    pub(crate) fn new(slot: Slot, vectors: u16) -> Self {
        let mut interrupts = Self { slot, vectors, error: None };
        interrupts.release();
        interrupts.slot.forget_pending();
        interrupts
    }

    /// Vectors of an index.
    fn count_of(&self, index: u32) -> u32 {
        match index {
            irq::MSIX => self.vectors.into(),
            irq::ERR => 1,
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
        let flags = if count > 0 { IrqInfo::EVENTFD | IrqInfo::NORESIZE } else { IrqInfo::EVENTFD };
        Ok(IrqInfo { argsz: 16, flags, index: request.index, count })
    }

    /// No line is the client's any more.
    pub(crate) fn release(&mut self) {
        self.error = None;
        (0..self.slot.vectors()).for_each(|vector| _ = self.slot.set_line(vector, None));
    }

    /// The function was taken out of its slot: says so, once to each line that is given for it.
    pub(crate) fn report_gone(&mut self) {
        if let Some(line) = self.error.take() {
            line.signal();
        }
    }

    fn set_line(&mut self, index: u32, vector: u16, line: Option<EventLine>) {
        if index == irq::MSIX {
            self.slot.set_line(vector, line);
        } else {
            self.error = line;
        }
    }

    fn signal(&self, index: u32, vector: u16) {
        if index == irq::MSIX {
            self.slot.raise(vector);
        } else if let Some(line) = &self.error {
            line.signal();
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
            (0..there as u16).for_each(|vector| self.set_line(index, vector, None));
            return Ok(());
        }
        let inside = start < there && count > 0 && count <= there - start;
        // Neither kind is masked here.
        if !inside || action != IrqSet::TRIGGER {
            return Err(errno::EINVAL);
        }
        let range = (start as u16)..(start + count) as u16;
        match data {
            IrqSet::DATA_NONE => range.for_each(|vector| self.signal(index, vector)),
            IrqSet::DATA_BOOL => {
                let bools = bools.get(..count as usize).ok_or(errno::EINVAL)?;
                range.zip(bools).filter(|(_, on)| **on != 0).for_each(|(vector, _)| self.signal(index, vector));
            }
            _ if fds.is_empty() => range.for_each(|vector| self.set_line(index, vector, None)),
            _ => {
                if fds.len() != count as usize {
                    return Err(errno::EINVAL);
                }
                let lines = fds.drain(..).map(EventLine::from_client).collect::<Result<Vec<_>, _>>();
                let lines = lines.map_err(|_| errno::EINVAL)?;
                range.zip(lines).for_each(|(vector, line)| self.set_line(index, vector, Some(line)));
            }
        }
        Ok(())
    }
}
