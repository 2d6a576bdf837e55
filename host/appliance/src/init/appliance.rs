//! The appliance as a child of PID 1: started, listened to, stopped.

use super::journal::Journal;
use super::reaper::{Ended, Reaper, Started};
use rustix::process::Signal;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// The line of the appliance that says that it serves.
const READY: &str = "ready";
/// Most bytes of a line; what is longer is cut into several.
const LINE_BYTES: usize = 4096;
/// How long the appliance may take to stop: it undoes a migration and ends what is under way, with limits of its own.
pub const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// How long the system may take to end a process that was killed.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// What an appliance tells its supervisor.
#[derive(Debug)]
pub enum News {
    /// It serves.
    Ready,
    /// It has ended.
    Ended(Ended),
}

/// An appliance that runs.
pub struct Running {
    /// Its process.
    pub pid: i32,
    /// When it was started.
    pub since: Instant,
    /// Which start this is, from 1.
    pub generation: u64,
    /// It has said that it serves.
    pub ready: bool,
}

/// The environment of what PID 1 starts: nothing of the kernel's, no colours in a log.
pub fn set_environment(command: &mut Command, debug: bool) {
    command.env_clear().env("PATH", "/bin").env("HOME", "/").env("NO_COLOR", "1").current_dir("/");
    if debug {
        command.env("DRAY_LOG", "info");
    }
}

/// Starts one; `tell` is called from other threads.
///
/// # Errors
/// The system's.
pub fn start(
    program: &Path,
    config: &Path,
    debug: bool,
    generation: u64,
    reaper: &Reaper,
    journal: &Journal,
    tell: impl Fn(News) + Clone + Send + 'static,
) -> std::io::Result<Running> {
    let mut command = Command::new(program);
    set_environment(&mut command, debug);
    command.arg("run").arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Started { pid, end, mut child } = reaper.spawn(&mut command)?;
    let (out, error) = (child.stdout.take(), child.stderr.take());
    let ready = tell.clone();
    let to = journal.clone();
    listen("dray-out", out, move |line| {
        to.line(line);
        if line == READY {
            ready(News::Ready);
        }
    })?;
    let to = journal.clone();
    listen("dray-err", error, move |line| to.line(line))?;
    std::thread::Builder::new().name("dray-end".into()).spawn(move || tell(News::Ended(ended(&end))))?;
    Ok(Running { pid, since: Instant::now(), generation, ready: false })
}

fn ended(end: &Receiver<Ended>) -> Ended {
    end.recv().unwrap_or(Ended::Exit(-1))
}

fn listen(name: &str, from: Option<impl Read + Send + 'static>, line: impl FnMut(&str) + Send + 'static) -> std::io::Result<()> {
    if let Some(from) = from {
        std::thread::Builder::new().name(name.into()).spawn(move || lines(from, line))?;
    }
    Ok(())
}

/// Reads lines to the end.
fn lines(mut from: impl Read, mut take: impl FnMut(&str)) {
    let (mut bytes, mut line) = ([0; 4096], Vec::new());
    loop {
        let count = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for byte in &bytes[..count] {
            if *byte == b'\n' || line.len() == LINE_BYTES {
                take(&String::from_utf8_lossy(&line));
                line.clear();
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
    }
    if !line.is_empty() {
        take(&String::from_utf8_lossy(&line));
    }
}

impl Running {
    /// Stops it: SIGTERM, and when that takes too long, SIGKILL. `gone` tells within the time it is given whether it has ended.
    pub fn stop(&self, reaper: &Reaper, journal: &Journal, gone: &mut dyn FnMut(Duration) -> bool) {
        reaper.signal(self.pid, Signal::TERM);
        if gone(STOP_PATIENCE) {
            return;
        }
        journal.say(&format!("the appliance has not stopped in {} s; it is killed", STOP_PATIENCE.as_secs()));
        reaper.signal(self.pid, Signal::KILL);
        if !gone(KILL_PATIENCE) {
            journal.say("the appliance cannot be killed: it hangs in the kernel");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_none_is_lost() {
        let text = format!("ready\n\n{}\nlast", "x".repeat(LINE_BYTES + 5));
        let mut seen = Vec::new();
        lines(text.as_bytes(), |line| seen.push(line.to_owned()));
        assert_eq!(seen, ["ready", "", &"x".repeat(LINE_BYTES), "xxxxx", "last"]);
    }
}
