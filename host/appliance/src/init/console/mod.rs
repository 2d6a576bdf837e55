//! The console: a serial line that takes dray commands. There is no shell behind it.
//!
//! A line is a command of `dray` with its arguments, split as a shell would (quotes, backslashes), such as `device list`; it runs
//! as a process of its own, with `--config` set to the configuration in force. Its output is printed as it comes, standard
//! output and standard error together, and then `dray: exit N` with its exit code. There is no prompt and no echo, so that a
//! program can drive it. In front of a command may stand
//! - `#TAG `: the last line is `dray: TAG exit N` then,
//! - `within 30s `: the command is stopped after that time, with exit code 124.
//!
//! Lines end with a carriage return, a line feed or both; those that the console prints end with both. Ctrl-C stops the command
//! that runs. Besides dray's commands there are `poweroff`, `reboot`, `reload` (the configuration is read again), `log [N]` (the
//! last lines, 100 without N) and `help`.

pub mod line;

use self::line::{Edited, Editor, Line};
use super::reaper::{Ended, Reaper, Started};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::process::Signal;
use rustix::termios::{ControlModes, InputModes, OptionalActions, OutputModes, tcdrain, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

/// How often the console looks up.
const LOOK: Duration = Duration::from_millis(100);
/// How long a command may take to end when it is told to, before it is killed.
const MANNERS: Duration = Duration::from_secs(3);
/// Exit code of a command that took too long, as `timeout` has it.
const TOO_LONG: i32 = 124;
/// Exit code of what is no command, as clap has it.
const NO_COMMAND: i32 = 2;
/// Exit code of a command that cannot be started, as a shell has it.
const NOT_STARTED: i32 = 126;
/// What Ctrl-C sends.
const CTRL_C: u8 = 3;
/// How long a line that takes nothing is waited for: what is printed then is lost. The line is not, which must be obeyed still.
const DEAF: Duration = Duration::from_secs(5);
/// How long an answer may take to get out before the machine stops.
const DRAIN: Duration = Duration::from_secs(1);
/// Speed of the line in bits per second.
const SPEED: u32 = 115_200;
/// Lines that `log` prints without a number.
const LOG_LINES: usize = 100;

/// What the console asks PID 1 for.
pub trait Host: Send {
    /// The machine is to stop.
    fn stop(&self, restart: bool);
    /// The configuration is to be read again; says what came of it.
    fn reload(&self) -> Result<String, String>;
    /// The last lines of the log.
    fn log(&self, lines: usize) -> Vec<String>;
    /// `dray` with these arguments.
    fn command(&self, words: &[String]) -> Command;
}

/// A serial line, raw, with eight bits and no parity.
///
/// # Errors
/// The system's: it is not there, or no terminal.
pub fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = File::options().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let mut settings = tcgetattr(&file)?;
    settings.make_raw();
    settings.control_modes = (settings.control_modes - ControlModes::CSIZE - ControlModes::PARENB - ControlModes::CSTOPB)
        | ControlModes::CS8
        | ControlModes::CREAD
        // Without it an open line waits for a modem.
        | ControlModes::CLOCAL;
    settings.input_modes -= InputModes::IXON | InputModes::IXOFF;
    settings.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
    settings.set_speed(SPEED)?;
    tcsetattr(&file, OptionalActions::Now, &settings)?;
    Ok(file)
}

/// Both directions of a line that is opened without blocking: waits are by `poll`, with an end.
pub struct Wire {
    file: File,
    stop: Arc<AtomicBool>,
    /// Nobody takes what is printed: it is not waited for until somebody does.
    deaf: AtomicBool,
}

impl Wire {
    /// A line, until `stop`.
    #[must_use]
    pub fn new(file: File, stop: Arc<AtomicBool>) -> Self {
        Self { file, stop, deaf: AtomicBool::new(false) }
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What has come in within a while: nothing, if nothing has.
    fn read(&self, bytes: &mut [u8], patience: Duration) -> io::Result<usize> {
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        let time = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
        match poll(&mut fds, Some(&time)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(0),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        match (&self.file).read(bytes) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }

    /// Prints everything, however slow the line; gives up when the console is stopped. What a line does not take for a while is
    /// dropped, and what is printed after that at once, until it takes something again: there may be nobody who reads.
    fn print(&self, mut bytes: &[u8]) -> io::Result<()> {
        let mut taken = Instant::now();
        while !bytes.is_empty() {
            match (&self.file).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    bytes = &bytes[written..];
                    taken = Instant::now();
                    self.deaf.store(false, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.stopping() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    if self.deaf.load(Ordering::Relaxed) || taken.elapsed() >= DEAF {
                        self.deaf.store(true, Ordering::Relaxed);
                        return Ok(());
                    }
                    let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
                    let time = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
                    match poll(&mut fds, Some(&time)) {
                        Ok(_) | Err(rustix::io::Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until what was printed is out, but not for ever: where nobody reads it never is.
    fn drain(&self) {
        if let Ok(line) = self.file.try_clone() {
            within(DRAIN, move || {
                // A line that is no terminal has nothing to drain.
                let _none = tcdrain(&line);
            });
        }
    }

    fn end(&self, tag: Option<&str>, code: i32) -> io::Result<()> {
        let tag = tag.map(|tag| format!("{tag} ")).unwrap_or_default();
        self.print(format!("dray: {tag}exit {code}\n").as_bytes())
    }
}

/// Does something that the system may never come back from, in a thread of its own; returns when it is done, or the time is over.
pub fn within(patience: Duration, what: impl FnOnce() + Send + 'static) {
    let (done, ended) = channel();
    let run = move || {
        what();
        // Whoever waited may have gone.
        let _late = done.send(());
    };
    if std::thread::Builder::new().name("dray-drain".into()).spawn(run).is_ok() {
        let _over = ended.recv_timeout(patience);
    }
}

/// Serves a line until it is stopped, or the line goes away.
///
/// # Errors
/// The line's.
pub fn serve(wire: &Wire, host: &dyn Host, reaper: &Reaper) -> io::Result<()> {
    let (mut editor, mut bytes) = (Editor::default(), [0; 512]);
    // What came in while a command ran.
    let mut ahead = Vec::new();
    while !wire.stopping() {
        let waiting: Vec<u8> = std::mem::take(&mut ahead);
        let fresh = if waiting.is_empty() { wire.read(&mut bytes, LOOK)? } else { 0 };
        let mut input = waiting.into_iter().chain(bytes[..fresh].iter().copied());
        while let Some(byte) = input.next() {
            match editor.byte(byte) {
                Some(Edited::Line(line)) => {
                    let mut later: Vec<u8> = input.collect();
                    obey(wire, host, reaper, &line, &mut later)?;
                    ahead = later;
                    break;
                }
                Some(Edited::TooLong) => {
                    wire.print(format!("a line is longer than {} bytes\n", line::LINE_BYTES).as_bytes())?;
                    wire.end(None, NO_COMMAND)?;
                }
                Some(Edited::Interrupt) | None => {}
            }
        }
    }
    Ok(())
}

fn obey(wire: &Wire, host: &dyn Host, reaper: &Reaper, text: &str, ahead: &mut Vec<u8>) -> io::Result<()> {
    let line = match line::parse(text) {
        Ok(Some(line)) => line,
        Ok(None) => return Ok(()),
        Err((tag, why)) => {
            wire.print(format!("{why}\n").as_bytes())?;
            return wire.end(tag.as_deref(), NO_COMMAND);
        }
    };
    let code = match (line.words[0].as_str(), &line.words[1..]) {
        (word @ ("poweroff" | "reboot"), []) => {
            wire.end(line.tag.as_deref(), 0)?;
            // A line that cannot be drained does not keep the machine from stopping.
            wire.drain();
            host.stop(word == "reboot");
            return Ok(());
        }
        ("reload", []) => {
            let (text, code) = host.reload().map_or_else(|text| (text, 1), |text| (text, 0));
            wire.print(format!("{}\n", text.trim_end()).as_bytes())?;
            code
        }
        ("log", words) if words.len() <= 1 && words.iter().all(|n| n.parse::<usize>().is_ok()) => {
            let lines = words.first().and_then(|n| n.parse().ok()).unwrap_or(LOG_LINES);
            for line in host.log(lines) {
                wire.print(format!("{line}\n").as_bytes())?;
            }
            0
        }
        (word @ ("poweroff" | "reboot" | "reload" | "log"), _) => {
            wire.print(format!("usage: {word}{}\n", if word == "log" { " [LINES]" } else { "" }).as_bytes())?;
            NO_COMMAND
        }
        (word @ ("run" | "init" | "serve-end"), _) => {
            wire.print(format!("`{word}` is what the image does by itself; `reload` begins anew\n").as_bytes())?;
            NO_COMMAND
        }
        _ => run(wire, host, reaper, &line, ahead)?,
    };
    if line.words[0] == "help" {
        wire.print(b"\nThe console has besides: poweroff, reboot, reload, log [LINES]; `within 30s COMMAND` limits its time.\n")?;
    }
    wire.end(line.tag.as_deref(), code)
}

/// Runs a command to its end, or to its time limit, or to Ctrl-C.
fn run(wire: &Wire, host: &dyn Host, reaper: &Reaper, line: &Line, ahead: &mut Vec<u8>) -> io::Result<i32> {
    let (output, writer) = io::pipe()?;
    let mut command = host.command(&line.words);
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let started = reaper.spawn(&mut command);
    // It holds the pipe's other end, which must be the child's alone.
    drop(command);
    let running = match started {
        Ok(Started { pid, end, .. }) => Running { wire, reaper, output, pid, end },
        Err(error) => {
            wire.print(format!("it cannot be started: {error}\n").as_bytes())?;
            return Ok(NOT_STARTED);
        }
    };
    running.wait(line.limit, ahead)
}

/// A command that runs.
struct Running<'a> {
    wire: &'a Wire,
    reaper: &'a Reaper,
    output: PipeReader,
    pid: i32,
    end: Receiver<Ended>,
}

impl Running<'_> {
    fn wait(mut self, limit: Option<Duration>, ahead: &mut Vec<u8>) -> io::Result<i32> {
        let start = Instant::now();
        // When it was told to end, and the exit code that it has then whatever it says.
        let mut told: Option<(Instant, Option<i32>)> = None;
        let ended = loop {
            self.pass_on(LOOK / 4);
            match self.end.try_recv() {
                Ok(ended) => break ended.code(),
                Err(TryRecvError::Disconnected) => break -1,
                Err(TryRecvError::Empty) => {}
            }
            // A line that has gone away stops its command, as a terminal that hangs up does.
            let interrupted = self.interrupted(ahead).unwrap_or(true) || self.wire.stopping();
            let late = limit.is_some_and(|limit| start.elapsed() >= limit);
            match told {
                None if late => {
                    told = Some((Instant::now(), Some(TOO_LONG)));
                    self.reaper.signal(self.pid, Signal::TERM);
                }
                None if interrupted => {
                    told = Some((Instant::now(), None));
                    self.reaper.signal(self.pid, Signal::INT);
                }
                Some((since, _)) if since.elapsed() >= MANNERS => self.reaper.signal(self.pid, Signal::KILL),
                _ => {}
            }
        };
        // What it left in the pipe; a process of its own that lives on may hold the other end.
        while self.pass_on(LOOK / 4) {}
        Ok(told.and_then(|(_, code)| code).unwrap_or(ended))
    }

    /// Prints what the command has said; false if that was nothing for a while.
    fn pass_on(&mut self, patience: Duration) -> bool {
        let mut bytes = [0; 2048];
        let time = Timespec { tv_sec: 0, tv_nsec: patience.subsec_nanos().into() };
        if !matches!(poll(&mut [PollFd::new(&self.output, PollFlags::IN)], Some(&time)), Ok(1..)) {
            return false;
        }
        match self.output.read(&mut bytes) {
            Ok(count @ 1..) => {
                // The output for a line that is gone is nobody's.
                let _unseen = self.wire.print(&bytes[..count]);
                true
            }
            // It has closed its output, and may still run.
            _ => {
                std::thread::sleep(patience);
                false
            }
        }
    }

    /// Takes what came in meanwhile: what a person types ahead is not lost, but there is an end to it.
    fn interrupted(&self, ahead: &mut Vec<u8>) -> io::Result<bool> {
        let mut bytes = [0; 256];
        let count = self.wire.read(&mut bytes, Duration::ZERO)?;
        let room = line::LINE_BYTES.saturating_sub(ahead.len());
        ahead.extend(bytes[..count].iter().filter(|byte| **byte != CTRL_C).take(room));
        Ok(bytes[..count].contains(&CTRL_C))
    }
}

#[cfg(test)]
mod tests;
