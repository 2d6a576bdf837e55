//! Children and orphans. PID 1 inherits every process whose parent has ended, and must collect them all when they end.
//!
//! All children are started here and collected here, in one place: whoever waits for one gets its end by a channel, and nobody
//! else calls `wait`, which would race with the collection. Starting and collecting exclude each other: the standard library
//! collects a child by itself when its program cannot be executed.

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use std::collections::HashMap;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

impl Ended {
    fn of(status: WaitStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Exit(code),
            (None, Some(signal)) => Self::Signal(signal),
            // Stops and continuations are not asked for.
            (None, None) => Self::Exit(-1),
        }
    }

    /// As a shell would say it: 128 and the signal's number for one that was killed.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Exit(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "ended with exit code {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

/// Starts and collects processes. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper {
    children: Arc<Mutex<HashMap<i32, Sender<Ended>>>>,
}

/// A process that was started.
pub struct Started {
    /// Its number.
    pub pid: i32,
    /// Its end, once.
    pub end: Receiver<Ended>,
    /// Its pipes.
    pub child: std::process::Child,
}

impl Reaper {
    /// Starts a process.
    ///
    /// # Errors
    /// The system's.
    pub fn spawn(&self, command: &mut Command) -> std::io::Result<Started> {
        let mut children = self.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).unwrap_or(-1);
        let (sender, end) = channel();
        children.insert(pid, sender);
        Ok(Started { pid, end, child })
    }

    /// Collects all that have ended, orphans too. To be called when SIGCHLD came.
    pub fn collect(&self) {
        let mut children = self.lock();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if let Some(sender) = children.remove(&pid.as_raw_nonzero().get()) {
                // Whoever started it may not care.
                let _gone = sender.send(Ended::of(status));
            }
        }
    }

    /// As [`collect`](Self::collect), but no others': in a process of tests there are those of other threads.
    #[cfg(test)]
    pub(crate) fn collect_known(&self) {
        let mut children = self.lock();
        let pids: Vec<_> = children.keys().copied().collect();
        for pid in pids {
            if let Ok(Some((_, status))) = rustix::process::waitpid(Pid::from_raw(pid), WaitOptions::NOHANG)
                && let Some(sender) = children.remove(&pid)
            {
                let _gone = sender.send(Ended::of(status));
            }
        }
    }

    /// Sends a signal to a child that has not been collected; its number cannot be another's then.
    pub fn signal(&self, pid: i32, signal: Signal) {
        let children = self.lock();
        if children.contains_key(&pid)
            && let Some(pid) = Pid::from_raw(pid)
        {
            // It may be ending.
            let _gone = rustix::process::kill_process(pid, signal);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, Sender<Ended>>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a signal to every process but this one and the kernel's own threads.
pub fn signal_all(signal: Signal) -> usize {
    let own = rustix::process::getpid();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Pid::from_raw);
    // A kernel thread has no program.
    let programs = pids.filter(|pid| *pid != own && std::fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).is_ok());
    programs.filter(|pid| rustix::process::kill_process(*pid, signal).is_ok()).count()
}
