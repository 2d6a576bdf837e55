//! The disk that the records lie on: the bytes under the real record store, which keep, drop and tear what was not flushed.
//!
//! The store's jobs wait here until the simulator lets them end. A power cut in the middle lets the waiting jobs get so many
//! operations far and no further: between two namespaces' records, or between a write and its flush.

use super::fault::Fault;
use dray::core::records::SlotMedium;
use dray_device::poll::{Jobs, Time};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SLOT_BYTES: usize = 4096;
/// What a disk writes as one piece.
const SECTOR: usize = 512;

type SlotBytes = [u8; SLOT_BYTES];
type Job = Box<dyn FnOnce() + Send>;

struct State {
    random: fastrand::Rng,
    durable: BTreeMap<([u8; 16], usize), SlotBytes>,
    written: BTreeMap<([u8; 16], usize), SlotBytes>,
    now: Time,
    delay_us: u64,
    jobs: VecDeque<(Time, Job)>,
    failing: u32,
    /// The power is going: so many operations still get through.
    left: Option<u32>,
    /// It was gone for an operation.
    gone: bool,
    took: Vec<Fault>,
}

/// The disk as the simulator has it. Clones are the same disk.
#[derive(Clone)]
pub struct RecordDisk {
    state: Arc<Mutex<State>>,
}

impl RecordDisk {
    /// An empty disk: every slot reads as zeroes.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            random: fastrand::Rng::with_seed(seed ^ 0x5107),
            durable: BTreeMap::new(),
            written: BTreeMap::new(),
            now: Time(0),
            delay_us: 50,
            jobs: VecDeque::new(),
            failing: 0,
            left: None,
            gone: false,
            took: Vec::new(),
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slots of a namespace.
    #[must_use]
    pub fn medium(&self, nguid: [u8; 16]) -> RecordMedium {
        RecordMedium { disk: self.clone(), nguid }
    }

    /// Where the store's jobs wait.
    #[must_use]
    pub fn jobs(&self) -> Box<dyn Jobs> {
        Box::new(RecordJobs(self.clone()))
    }

    /// A job takes so long from now on, µs.
    pub fn set_delay_us(&self, delay_us: u64) {
        self.state().delay_us = delay_us;
    }

    /// The next flushes fail; what they should have made durable may be so or not.
    pub fn fail(&self, flushes: u32) {
        self.state().failing = flushes;
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.state().failing = 0;
    }

    /// When the next job ends.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        self.state().jobs.front().map(|(due, _)| *due)
    }

    /// What is handed in from now on is handed in at `now`.
    pub fn tick(&self, now: Time) {
        self.state().now = now;
    }

    /// Lets the jobs end whose time has come. Returns how many did.
    pub fn pump(&self, now: Time) -> u32 {
        let mut ended = 0;
        loop {
            let mut state = self.state();
            state.now = now;
            if state.jobs.front().is_none_or(|(due, _)| *due > now) {
                return ended;
            }
            let job = state.jobs.pop_front();
            drop(state);
            if let Some((_, job)) = job {
                job();
                ended += 1;
            }
        }
    }

    /// Faults that took effect since the last call.
    #[must_use]
    pub fn took(&self) -> Vec<Fault> {
        std::mem::take(&mut self.state().took)
    }

    /// The power lasts for so many operations from now on.
    pub fn lasts_for(&self, operations: u32) {
        self.state().left = Some(operations);
    }

    /// Whether it has not been gone for an operation.
    #[must_use]
    pub fn has_power(&self) -> bool {
        !self.state().gone
    }

    /// The power lasts again; false if it was gone for an operation meanwhile.
    #[must_use]
    pub fn lasted(&self) -> bool {
        let mut state = self.state();
        state.left = None;
        !std::mem::take(&mut state.gone)
    }

    /// The power goes: jobs that wait get so far and no further, and what was not flushed is kept, dropped or torn.
    pub fn power_cut(&self) {
        let mut state = self.state();
        let jobs = std::mem::take(&mut state.jobs);
        state.left = Some(state.random.u32(0..=4));
        drop(state);
        jobs.into_iter().for_each(|(_, job)| job());
        let mut state = self.state();
        let state = &mut *state;
        for (key, written) in std::mem::take(&mut state.written) {
            let durable = state.durable.entry(key).or_insert([0; SLOT_BYTES]);
            match state.random.u8(0..4) {
                0 => {}
                1 => *durable = written,
                _ => {
                    // Whole sectors, or, rarely, bytes of one: a drive that promises less than a sector.
                    let piece = if state.random.u8(0..4) == 0 { 16 } else { SECTOR };
                    let before = *durable;
                    for at in (0..SLOT_BYTES).step_by(piece) {
                        if state.random.bool() {
                            durable[at..at + piece].copy_from_slice(&written[at..at + piece]);
                        }
                    }
                    if *durable != before && *durable != written {
                        state.took.push(Fault::PowerTearsRecord);
                    }
                }
            }
        }
        (state.left, state.gone, state.failing) = (None, false, 0);
    }
}

impl State {
    /// Whether the power still lasts for one operation.
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.left {
            None => Ok(()),
            Some(0) => {
                self.gone = true;
                Err(io::Error::other("the power is gone"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn sync(&mut self, nguid: [u8; 16]) {
        for slot in 0..2 {
            if let Some(written) = self.written.remove(&(nguid, slot)) {
                self.durable.insert((nguid, slot), written);
            }
        }
    }
}

/// The two slots of a namespace on a [`RecordDisk`].
pub struct RecordMedium {
    disk: RecordDisk,
    nguid: [u8; 16],
}

impl SlotMedium for RecordMedium {
    fn read(&mut self, slot: usize) -> io::Result<SlotBytes> {
        let state = self.disk.state();
        let key = (self.nguid, slot);
        Ok(state.written.get(&key).or_else(|| state.durable.get(&key)).copied().unwrap_or([0; SLOT_BYTES]))
    }

    fn write(&mut self, slot: usize, bytes: &SlotBytes) -> io::Result<()> {
        let mut state = self.disk.state();
        state.spend()?;
        state.written.insert((self.nguid, slot), *bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut state = self.disk.state();
        state.spend()?;
        if state.failing > 0 {
            state.failing -= 1;
            state.took.push(Fault::RecordFails);
            if state.random.bool() {
                state.sync(self.nguid);
            }
            return Err(io::Error::other("the disk of the records has failed"));
        }
        state.sync(self.nguid);
        Ok(())
    }
}

struct RecordJobs(RecordDisk);

impl Jobs for RecordJobs {
    fn run(&mut self, work: Job) {
        let mut state = self.0.state();
        let most = state.delay_us.max(1) * 1_000;
        let due = state.now.after_ns(state.random.u64(most / 2..=most));
        if state.delay_us >= 2_000 {
            state.took.push(Fault::RecordSlow);
        }
        state.jobs.push_back((due, work));
    }
}
