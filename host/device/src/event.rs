//! Event lines: an eventfd per interrupt vector, or to wake a sleeping consumer.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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

    /// A line around a descriptor that a client sent: it must be an eventfd, since a write to anything else could do anything, and
    /// is made non-blocking. Its other owner could make it block again; then only a counter that it has filled to the brim
    /// holds a signal up.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for other descriptors; the kernel's.
    pub fn from_client(fd: OwnedFd) -> io::Result<Self> {
        let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        if !about.lines().any(|line| line.starts_with("eventfd-count:")) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an eventfd"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self::from_fd(fd))
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

    #[test]
    fn a_clients_line_is_an_eventfd_that_does_not_block() {
        let blocking = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        let line = EventLine::from_client(blocking.try_clone().expect("clone")).expect("line");
        rustix::io::write(&blocking, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
        line.signal();
        assert_eq!(line.take(), u64::MAX - 1);
        let (pipe, _write) = std::io::pipe().expect("pipe");
        assert!(EventLine::from_client(pipe.into()).is_err());
    }
}
