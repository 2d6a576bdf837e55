//! The power button, and the way to the power's end.
//!
//! An ACPI power button, which is also what a hypervisor presses, is an input device that sends `KEY_POWER`. Input devices come
//! and go; they are looked for again every few seconds.

use super::mounts;
use super::reaper::signal_all;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use rustix::system::{RebootCommand, reboot};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of the kernel's `struct input_event` with 64-bit times.
const EVENT_BYTES: usize = 24;
/// `EV_KEY`.
const EVENT_KEY: u16 = 1;
/// `KEY_POWER`.
const KEY_POWER: u16 = 116;
/// How often input devices are looked for: where there are some, and where the driver may just come.
const LOOK: (Duration, Duration) = (Duration::from_secs(2), Duration::from_millis(50));
/// For how long none may be there before that is no start any more.
const START: Duration = Duration::from_secs(30);
/// How long processes may take to end when they are told to.
const MANNERS: Duration = Duration::from_secs(3);

/// Whether the bytes of an input device tell that the power button went down.
#[must_use]
pub fn pressed(bytes: &[u8]) -> bool {
    bytes.chunks_exact(EVENT_BYTES).any(|event| {
        // Behind the time: type, code, value.
        let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
        word(16) == EVENT_KEY && word(18) == KEY_POWER && value == 1
    })
}

/// Watches input devices for as long as the machine runs.
pub fn watch_button(pressed_now: &dyn Fn()) {
    let (mut devices, begun): (Vec<(PathBuf, File)>, _) = (Vec::new(), Instant::now());
    loop {
        look(Path::new("/dev/input"), &mut devices);
        let mut fds: Vec<_> = devices.iter().map(|(_, file)| PollFd::new(file, PollFlags::IN)).collect();
        let every = if devices.is_empty() && begun.elapsed() < START { LOOK.1 } else { LOOK.0 };
        let time = Timespec { tv_sec: every.as_secs().cast_signed(), tv_nsec: every.subsec_nanos().into() };
        let count = poll(&mut fds, Some(&time)).unwrap_or(0);
        let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if count == 0 {
            continue;
        }
        let mut nth = 0;
        devices.retain(|(_, file)| {
            let was_ready = ready[nth];
            nth += 1;
            if !was_ready {
                return true;
            }
            let mut bytes = [0; EVENT_BYTES * 16];
            let mut file: &File = file;
            match file.read(&mut bytes) {
                Ok(count @ 1..) => {
                    if pressed(&bytes[..count]) {
                        pressed_now();
                    }
                    true
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
                // The device is gone.
                _ => false,
            }
        });
    }
}

fn look(folder: &Path, devices: &mut Vec<(PathBuf, File)>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_event = entry.file_name().to_string_lossy().starts_with("event");
        if !is_event || devices.iter().any(|(known, _)| *known == path) {
            continue;
        }
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        if let Ok(file) = File::options().read(true).custom_flags(flags).open(&path) {
            devices.push((path, file));
        }
    }
}

/// Ends all other processes: first by asking, then without.
pub fn end_processes(collect: &dyn Fn()) {
    for (signal, patience) in [(Signal::TERM, MANNERS), (Signal::KILL, MANNERS)] {
        let end = Instant::now() + patience;
        signal_all(signal);
        // Asked again each time: a process may have started another.
        while signal_all(signal) > 0 && Instant::now() < end {
            collect();
            std::thread::sleep(Duration::from_millis(10));
        }
        collect();
    }
}

/// Unmounts everything and lets the power go. It does not come back: should the kernel refuse, it is asked again, by then for
/// whatever else ends this.
pub fn off(restart: bool, say: &dyn Fn(&str), flush: &dyn Fn()) -> ! {
    mounts::unmount_all(say);
    rustix::fs::sync();
    say(if restart { "restarting" } else { "power off" });
    flush();
    let wanted = if restart { RebootCommand::Restart } else { RebootCommand::PowerOff };
    loop {
        for command in [wanted, RebootCommand::Restart, RebootCommand::Halt] {
            if let Err(error) = reboot(command) {
                say(&format!("{command:?} is refused: {error}"));
                flush();
            }
            std::thread::sleep(Duration::from_secs(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut bytes = vec![0xa5; 16];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&value.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_the_power_key_going_down_counts() {
        assert!(pressed(&[event(0, 0, 0), event(1, 116, 1)].concat()));
        for other in [event(1, 116, 0), event(1, 30, 1), event(0, 116, 1), event(1, 116, 1)[..23].to_vec(), Vec::new()] {
            assert!(!pressed(&other), "{other:?}");
        }
    }
}
