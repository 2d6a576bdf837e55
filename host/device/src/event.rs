//! Event lines: an eventfd per interrupt vector, or to wake a sleeping consumer.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One line: signalled by whoever has an event, read by whoever waits. Clones share the line.
#[derive(Clone, Debug)]
pub struct EventLine {
    fd: Arc<OwnedFd>,
}

impl EventLine {
    /// A new line, not signalled.
    ///
    /// # Errors
    /// The kernel's, when descriptors run out.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// A line around a descriptor that someone else made (a lent queue, a VFIO client).
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// Signals the line. A line whose counter is full is signalled already.
    pub fn signal(&self) {
        let _full = rustix::io::write(&*self.fd, &1u64.to_ne_bytes());
    }

    /// Takes the signals that have come since the last call.
    #[must_use]
    pub fn take(&self) -> u64 {
        let mut count = [0u8; 8];
        match rustix::io::read(&*self.fd, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

impl AsFd for EventLine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_add_up_and_are_taken_once() {
        let line = EventLine::new().expect("eventfd");
        line.signal();
        line.clone().signal();
        assert_eq!(line.take(), 2);
        assert_eq!(line.take(), 0);
    }
}
