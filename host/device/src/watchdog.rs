//! A hardware watchdog (`/dev/watchdog`): a timer that resets the machine unless it is fed.
//!
//! Opening it starts it. It runs on when it is closed, unless it is disarmed first: a program that dies is what it is for.
#![allow(unsafe_code)]

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

/// `WDIOC_SETTIMEOUT` of linux/watchdog.h: takes the wanted seconds, returns those that are set.
const SET_TIMEOUT: Opcode = opcode::read_write::<i32>(b'W', 6);
/// The byte that disarms it when it is closed next ("magic close").
const DISARM: &[u8] = b"V";

/// A watchdog that runs.
#[derive(Debug)]
pub struct Watchdog {
    file: File,
    timeout: Duration,
}

impl Watchdog {
    /// Starts a watchdog with a timeout, in whole seconds. Hardware may set another near to it: see [`timeout`](Self::timeout).
    ///
    /// # Errors
    /// The system's: there is none, it is in use, or it has no such timeout.
    pub fn start(path: &Path, timeout: Duration) -> io::Result<Self> {
        let file = File::options().write(true).open(path)?;
        let mut seconds = i32::try_from(timeout.as_secs()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: WDIOC_SETTIMEOUT reads and writes one `int`, which is what `seconds` is, and keeps no pointer to it. On a
        // file that is no watchdog it is an unknown request (ENOTTY): the letter and number are this interface's alone.
        unsafe { ioctl(&file, Updater::<SET_TIMEOUT, i32>::new(&mut seconds)) }?;
        Ok(Self { file, timeout: Duration::from_secs(u64::try_from(seconds).unwrap_or(0)) })
    }

    /// The timeout that is set.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Feeds it: the timeout begins anew.
    ///
    /// # Errors
    /// The device's.
    pub fn feed(&mut self) -> io::Result<()> {
        // Any byte but the one that disarms it.
        self.file.write_all(b".")
    }

    /// Stops it, where the kernel and the hardware allow that.
    ///
    /// # Errors
    /// The device's.
    pub fn disarm(mut self) -> io::Result<()> {
        self.file.write_all(DISARM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_watchdog_is_refused() {
        let error = Watchdog::start(Path::new("/dev/null"), Duration::from_secs(30)).expect_err("no watchdog");
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTTY.raw_os_error()));
        assert!(Watchdog::start(Path::new("/dev/null"), Duration::MAX).is_err());
        assert_eq!(SET_TIMEOUT, 0xc004_5706, "linux/watchdog.h");
    }
}
