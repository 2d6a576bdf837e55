//! How far a run is, in a page of the state folder that is shared with whoever looks: the polling core stores a word when
//! something has changed and makes no call. What was stored last is there after a `kill -9`.
//!
//! 64-bit words, little-endian: magic, process, act, migration (phase in the high byte, then completed rounds, 32 bits, and
//! completed steps of the switch-over).

use crate::live::Act;
use dray_device::memory::{Arena, PAGE};
use dray_migration::{Migration, Phase};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const MAGIC: u64 = u64::from_le_bytes(*b"DRAYSTAT");
const AT_MAGIC: usize = 0;
const AT_PROCESS: usize = 8;
const AT_ACT: usize = 16;
const AT_MIGRATION: usize = 24;

/// The page, written by a run or read by another process.
#[derive(Clone, Debug)]
pub struct Status {
    arena: Arc<Arena>,
    last: u64,
}

/// What a reader sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The process that runs, or ran last; 0 = none yet.
    pub process: u64,
    /// The act; `None` before the first.
    pub act: Option<Act>,
    /// The migration's phase; `None` before it begins.
    pub phase: Option<Phase>,
    /// Rounds of the copy that have ended.
    pub rounds: u32,
    /// Steps of the present attempt at the switch-over that have ended.
    pub steps: u16,
}

const ACTS: [Act; 4] = [Act::Settling, Act::Migrating, Act::After, Act::Stopping];
const PHASES: [Phase; 7] = [
    Phase::Checking,
    Phase::Opening,
    Phase::Copying,
    Phase::SwitchingOver,
    Phase::Completing,
    Phase::Undoing,
    Phase::Ended,
];

impl Status {
    /// Opens or makes the page. A reader that has mapped it goes on seeing it.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() < PAGE as u64 {
            // Written, not only made longer: on a full disk a store to a hole would kill the process later.
            dray_workload::pattern::fill_file(&file, PAGE as u64, 0)?;
        }
        Ok(Self { arena: Arena::map_file(&file, PAGE)?, last: 0 })
    }

    /// A run of this process begins.
    pub fn begin(&mut self) {
        self.last = 0;
        for at in [AT_ACT, AT_MIGRATION] {
            self.arena.store64(at, 0, Ordering::Relaxed);
        }
        self.arena.store64(AT_MAGIC, MAGIC, Ordering::Relaxed);
        self.arena.store64(AT_PROCESS, u64::from(std::process::id()), Ordering::Release);
    }

    /// An act begins.
    pub fn act(&self, act: Act) {
        let place = ACTS.iter().position(|known| *known == act).unwrap_or(0);
        self.arena.store64(AT_ACT, place as u64 + 1, Ordering::Release);
    }

    /// Shows where a migration is; nothing is stored while that stays the same.
    #[inline]
    pub fn migration(&mut self, migration: &Migration) {
        let report = migration.report();
        let phase = PHASES.iter().position(|known| *known == migration.phase()).unwrap_or(0) as u64 + 1;
        let rounds = report.rounds.count().min(u64::from(u32::MAX));
        let word = phase << 56 | rounds << 16 | (report.parts.len() as u64).min(u64::from(u16::MAX));
        if word != self.last {
            self.last = word;
            self.arena.store64(AT_MIGRATION, word, Ordering::Release);
        }
    }

    /// What is there now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let load = |at| self.arena.load64(at, Ordering::Acquire);
        let process = if load(AT_MAGIC) == MAGIC { load(AT_PROCESS) } else { 0 };
        let word = load(AT_MIGRATION);
        let place = |value: u64| usize::try_from(value).ok().and_then(|value| value.checked_sub(1));
        Seen {
            process,
            act: place(load(AT_ACT)).and_then(|place| ACTS.get(place).copied()),
            phase: place(word >> 56).and_then(|place| PHASES.get(place).copied()),
            rounds: (word >> 16) as u32,
            steps: word as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_what_is_stored_and_what_a_new_run_resets() {
        let path = std::env::temp_dir().join(format!("dray-status-{}", std::process::id()));
        let (mut run, reader) = (Status::open(&path).expect("page"), Status::open(&path).expect("page"));
        let nothing = Seen { process: 0, act: None, phase: None, rounds: 0, steps: 0 };
        assert_eq!(reader.seen(), nothing);
        run.begin();
        run.act(Act::Migrating);
        run.arena.store64(AT_MIGRATION, 3 << 56 | 7 << 16 | 2, Ordering::Release);
        let seen = reader.seen();
        assert_eq!((seen.process, seen.act), (u64::from(std::process::id()), Some(Act::Migrating)));
        assert_eq!((seen.phase, seen.rounds, seen.steps), (Some(Phase::Copying), 7, 2));
        run.begin();
        assert_eq!(reader.seen(), Seen { process: seen.process, ..nothing });
        std::fs::remove_file(&path).expect("clean up");
    }
}
