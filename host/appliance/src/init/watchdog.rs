//! When the machine's watchdog is fed. What it is for is a machine that does not serve and does not say why: it is fed while the
//! appliance's control socket answers, and, when there is no appliance for a reason that the status page tells, while PID 1
//! itself goes on. A wrong configuration is no reason for a reset, which would not make it right.

use super::board::{Board, Phase};
use super::journal::Journal;
use super::status::ask;
use crate::config::Config;
use dray_device::watchdog::Watchdog;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The device.
const DEVICE: &str = "/dev/watchdog";
/// For the appliance to come up or to stop: what it may take at most, and some more.
const CHANGE: Duration = Duration::from_secs(180);
/// PID 1 looks at what comes at least every second; this long without a look, and it is stuck.
const BEAT: Duration = Duration::from_secs(60);
/// How often a device that is not there is looked for.
const LOOK: Duration = Duration::from_secs(2);

/// What the decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// How the appliance stands.
    pub phase: Phase,
    /// For how long.
    pub phase_age: Duration,
    /// Since PID 1's last look.
    pub beat_age: Duration,
    /// The appliance has answered just now.
    pub answered: bool,
}

impl Health {
    /// Whether the watchdog is fed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        match self.phase {
            Phase::Serving => self.answered,
            Phase::Starting | Phase::Stopping => self.phase_age < CHANGE,
            Phase::Restarting | Phase::GivenUp | Phase::WrongConfiguration | Phase::NoState => self.beat_age < BEAT,
        }
    }
}

/// PID 1's pulse. Cheap to clone.
#[derive(Clone)]
pub struct Pulse {
    start: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { start: Instant::now(), last_ms: Arc::default() }
    }
}

impl Pulse {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// PID 1 looks at what comes.
    pub fn beat(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn age(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed)))
    }
}

/// Feeds the watchdog until `stop`; then it is disarmed.
pub fn run(
    timeout: Duration,
    board: &Board,
    config: &Mutex<Option<Arc<Config>>>,
    pulse: &Pulse,
    journal: &Journal,
    stop: &AtomicBool,
) {
    let Some(mut watchdog) = open(timeout, journal, stop) else { return };
    let every = watchdog.timeout() / 4;
    let (mut phase, mut since, mut hungry) = (board.known().phase, Instant::now(), false);
    while !stop.load(Ordering::Relaxed) {
        let now = board.known().phase;
        if now != phase {
            (phase, since) = (now, Instant::now());
        }
        let config = config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = match (phase, config) {
            (Phase::Serving, Some(config)) => ask(&config, every).map(|_| ()),
            _ => Err("it is not asked".into()),
        };
        let health = Health { phase, phase_age: since.elapsed(), beat_age: pulse.age(), answered: answer.is_ok() };
        if health.is_good() {
            hungry = false;
            if let Err(error) = watchdog.feed() {
                journal.say(&format!("the watchdog cannot be fed: {error}"));
            }
        } else if !std::mem::replace(&mut hungry, true) {
            let why = answer.err().filter(|_| phase == Phase::Serving).unwrap_or_else(|| "it takes too long".into());
            let seconds = watchdog.timeout().as_secs();
            journal.say(&format!("{}: {why}; the watchdog is not fed and resets the machine within {seconds} s", phase.words()));
        }
        pause(every, stop);
    }
    if let Err(error) = watchdog.disarm() {
        journal.say(&format!("the watchdog stays armed: {error}"));
    }
}

fn open(timeout: Duration, journal: &Journal, stop: &AtomicBool) -> Option<Watchdog> {
    let mut said = false;
    loop {
        match Watchdog::start(Path::new(DEVICE), timeout) {
            Ok(watchdog) => {
                journal.say(&format!("watchdog: resets the machine after {} s without an answer", watchdog.timeout().as_secs()));
                return Some(watchdog);
            }
            Err(error) if !std::mem::replace(&mut said, true) => {
                journal.say(&format!("no watchdog: {DEVICE}: {error}; it is looked for"));
            }
            Err(_) => {}
        }
        pause(LOOK, stop);
        if stop.load(Ordering::Relaxed) {
            return None;
        }
    }
}

fn pause(time: Duration, stop: &AtomicBool) {
    let end = Instant::now() + time;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        std::thread::sleep(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(100)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_fed_while_there_is_an_answer_or_a_reason() {
        let good = Health { phase: Phase::Serving, phase_age: Duration::ZERO, beat_age: Duration::ZERO, answered: true };
        assert!(good.is_good());
        assert!(!Health { answered: false, ..good }.is_good(), "an appliance that hangs");
        for phase in [Phase::Restarting, Phase::GivenUp, Phase::WrongConfiguration, Phase::NoState] {
            let waits = Health { phase, answered: false, phase_age: Duration::from_secs(1 << 20), ..good };
            assert!(waits.is_good(), "{phase:?}: for ever");
            assert!(!Health { beat_age: BEAT, ..waits }.is_good(), "{phase:?}: PID 1 hangs");
        }
        for phase in [Phase::Starting, Phase::Stopping] {
            let changes = Health { phase, answered: false, beat_age: Duration::from_secs(90), ..good };
            assert!(changes.is_good(), "{phase:?}");
            assert!(!Health { phase_age: CHANGE, ..changes }.is_good(), "{phase:?} without an end");
        }
    }
}
