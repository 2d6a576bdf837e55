//! An interrupt vector of a slot: an event line that may be exchanged while a controller signals it.
//!
//! Signalling takes no lock. A signal that finds no line is remembered, and goes to the line that comes: whoever stores a line
//! looks for a remembered signal afterwards, and whoever remembers one looks for a line afterwards, so that one of them sees the
//! other.

use crate::event::EventLine;
use crate::sync::{AtomicBool, Cell, fence};
use std::sync::atomic::Ordering;

/// One vector.
#[derive(Debug)]
pub(crate) struct Vector {
    line: Cell<EventLine>,
    /// Signalled while there was no line (the bit of the pending bit array, PCIe 6.0 §7.7.2.2).
    pending: AtomicBool,
}

impl Vector {
    pub(crate) fn new(line: Option<EventLine>) -> Self {
        Self { line: Cell::new(line), pending: AtomicBool::new(false) }
    }

    pub(crate) fn line(&self) -> Option<EventLine> {
        self.line.get()
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    pub(crate) fn forget(&self) {
        self.pending.store(false, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn signal(&self) {
        if !self.line.with(|line| line.map(EventLine::signal).is_some()) {
            self.remember();
        }
    }

    #[cold]
    fn remember(&self) {
        // An exchange and not a store: exchanges of one word are in one order, so that exactly one signal comes of it.
        self.pending.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.line.with(|line| self.catch_up(line));
    }

    pub(crate) fn set(&self, line: Option<EventLine>) {
        self.line.set(line.clone());
        fence(Ordering::SeqCst);
        self.catch_up(line.as_ref());
    }

    fn catch_up(&self, line: Option<&EventLine>) {
        if let Some(line) = line
            && self.pending.swap(false, Ordering::AcqRel)
        {
            line.signal();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_signal_without_a_line_goes_to_the_line_that_comes() {
        let (first, second) = (EventLine::new().expect("line"), EventLine::new().expect("line"));
        let vector = Vector::new(Some(first.clone()));
        vector.signal();
        vector.set(None);
        assert_eq!((first.take(), vector.is_pending()), (1, false));
        vector.signal();
        vector.signal();
        assert!(vector.is_pending());
        vector.set(Some(second.clone()));
        assert_eq!((second.take(), first.take(), vector.is_pending()), (1, 0, false), "remembered once");
        vector.set(None);
        vector.signal();
        vector.forget();
        vector.set(Some(second.clone()));
        assert_eq!(second.take(), 0);
    }
}
