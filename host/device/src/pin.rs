//! The interrupt pin of a function (INTx): a level, told to a client by an eventfd.
//!
//! A controller says in each of its polls whether it wants an interrupt ([`Port::drive_pin`](crate::slot::Port::drive_pin)). The
//! client is told of a level, not of its end: the pin masks itself when it signals, and whoever serves the interrupt unmasks it
//! when that is done; if the level is still there the next poll signals again. So no interrupt is lost, however the two are
//! ordered, and a guest that leaves completions behind is told once more.

use crate::event::EventLine;
use crate::sync::{AtomicBool, Cell};
use std::sync::atomic::Ordering;

/// The pin. Off until a client has given it a line and configuration space allows it.
#[derive(Debug)]
pub struct Pin {
    line: Cell<EventLine>,
    /// A line, and allowed.
    on: AtomicBool,
    /// By configuration space: MSI-X is off, Interrupt Disable is not set.
    allowed: AtomicBool,
    /// By itself, or by its client.
    masked: AtomicBool,
    /// What the controller said last.
    asserted: AtomicBool,
    /// INTMS and INTMC are written past the registers, where they mean nothing.
    deaf: AtomicBool,
}

impl Pin {
    pub(crate) fn new() -> Self {
        let [on, allowed, masked, asserted, deaf] = [(); 5].map(|()| AtomicBool::new(false));
        Self { line: Cell::new(None), on, allowed, masked, asserted, deaf }
    }

    /// Gives the pin a line, unmasked, or takes it away.
    pub fn set_line(&self, line: Option<EventLine>) {
        self.line.set(line);
        self.masked.store(false, Ordering::Release);
        self.settle();
    }

    /// Whether configuration space lets the function use its pin: MSI-X is off and Interrupt Disable not set (PCIe 6.0
    /// §7.5.1.1.3).
    pub fn allow(&self, allowed: bool) {
        self.allowed.store(allowed, Ordering::Release);
        self.settle();
    }

    fn settle(&self) {
        let on = self.allowed.load(Ordering::Acquire) && self.line.with(|line| line.is_some());
        self.on.store(on, Ordering::Release);
        if !on {
            self.asserted.store(false, Ordering::Release);
        }
    }

    /// Says that the client has INTMS and INTMC mapped: what it writes there does not act as a register, so it masks nothing.
    pub fn ignore_vector_masks(&self, ignored: bool) {
        self.deaf.store(ignored, Ordering::Release);
    }

    /// Masks the pin, or unmasks it: a level that is still there is signalled by the controller's next poll.
    pub fn mask(&self, masked: bool) {
        self.masked.store(masked, Ordering::Release);
    }

    /// Whether the pin is masked.
    #[must_use]
    pub fn is_masked(&self) -> bool {
        self.masked.load(Ordering::Acquire)
    }

    /// Whether the controller wants an interrupt.
    #[must_use]
    pub fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::Acquire)
    }

    /// Signals the line once, whatever the level is: a client tries its wiring.
    pub fn try_out(&self) {
        self.line.with(|line| line.map_or((), EventLine::signal));
    }

    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    pub(crate) fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Acquire)
    }

    pub(crate) fn drive(&self, asserted: bool) {
        self.asserted.store(asserted && self.is_on(), Ordering::Release);
        if asserted && self.is_on() && !self.masked.swap(true, Ordering::AcqRel) {
            self.line.with(|line| line.map_or((), EventLine::signal));
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_told_once_until_it_is_unmasked() {
        let (pin, line) = (Pin::new(), EventLine::new().expect("line"));
        pin.drive(true);
        pin.set_line(Some(line.clone()));
        pin.drive(true);
        assert_eq!((pin.is_on(), line.take()), (false, 0), "MSI-X is on, or Interrupt Disable is set");
        pin.allow(true);
        (0..3).for_each(|_| pin.drive(true));
        assert_eq!((line.take(), pin.is_masked(), pin.is_asserted()), (1, true, true), "it masks itself");
        pin.mask(false);
        pin.drive(true);
        assert_eq!(line.take(), 1, "the level is still there");
        pin.drive(false);
        pin.mask(false);
        pin.drive(false);
        assert_eq!((line.take(), pin.is_masked(), pin.is_asserted()), (0, false, false));
        pin.mask(true);
        pin.drive(true);
        assert_eq!(line.take(), 0, "masked by its client");
        pin.allow(false);
        pin.mask(false);
        pin.drive(true);
        assert_eq!((line.take(), pin.is_asserted()), (0, false));
        pin.try_out();
        assert_eq!(line.take(), 1);
    }
}
