//! Whether the slot that was booted has proved good ([`crate::slots`] says when that is), and where to go when it has not.

use super::bring_up::StatePlace;
use super::cmdline::CommandLine;
use super::journal::Journal;
use super::mounts::{BOOT_FOLDER, Esp, MountError, STATE_FOLDER};
use crate::slots::bless::{Way, bless, way};
use crate::slots::bundle::hex;
use crate::slots::files::Folder;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a slot on trial may take to serve.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// After how long a slot that could not be called good is called so again.
const AGAIN: Duration = Duration::from_secs(60);
/// Most bytes of the record.
const RECORD_BYTES: u64 = 4096;
/// The record, below the state partition.
const RECORD: &str = "image/served.json";

/// What served last.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Served {
    /// SHA-256 of the configuration's file.
    configuration: String,
    /// The image's version.
    version: Option<u64>,
}

/// The trial of the slot that was booted.
pub struct Trial {
    line: CommandLine,
    journal: Journal,
    /// The state partition's folder, if it is mounted.
    state: Option<PathBuf>,
    since: Instant,
    /// It has proved good; its entry says so when there is nothing to be tried again.
    good: bool,
    again: Option<Instant>,
    /// It was found not to be good.
    bad: bool,
}

impl Trial {
    /// Begins it.
    #[must_use]
    pub fn new(line: &CommandLine, journal: &Journal) -> Self {
        let (line, journal) = (line.clone(), journal.clone());
        Self { line, journal, state: None, since: Instant::now(), good: false, again: None, bad: false }
    }

    /// Where durable records are.
    pub fn set_state(&mut self, place: &StatePlace) {
        self.state = (*place == StatePlace::Partition).then(|| STATE_FOLDER.into());
    }

    /// It takes too long.
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.line.slot.is_some() && !self.good && !self.bad && self.since.elapsed() > PATIENCE
    }

    /// Tries again what did not work.
    pub fn tend(&mut self) {
        if self.again.is_some_and(|at| at <= Instant::now()) {
            self.good();
        }
    }

    /// The appliance serves with this configuration.
    pub fn served(&mut self, configuration: &Path) {
        let version = self.line.version;
        let recorded = self.state.as_ref().map(|folder| record(&folder.join(RECORD), &served_now(configuration, version)?));
        if let Some(Err(error)) = recorded {
            self.journal.say(&format!("it is not recorded that this configuration has served: {error}"));
        }
        self.good();
    }

    /// The configuration is wrong. Returns whether the machine is to restart, into the other slot.
    #[must_use]
    pub fn refused_configuration(&mut self, configuration: &Path) -> bool {
        let before = self.state.as_ref().and_then(|folder| read_record(&folder.join(RECORD)));
        let now = served_now(configuration, self.line.version).ok();
        if !served_elsewhere(before.as_ref(), now.as_ref()) {
            self.good();
            return false;
        }
        self.bad("another version served with this very configuration")
    }

    /// The slot does not do what it is for. Returns whether the machine is to restart, into the other slot.
    #[must_use]
    pub fn bad(&mut self, why: &str) -> bool {
        let Some(slot) = self.line.slot.filter(|_| !self.good && !self.bad) else { return false };
        self.bad = true;
        let found = partition(false).and_then(|_mounted| Ok(way(&Folder::new(Path::new(BOOT_FOLDER)), slot, self.line.version)?));
        match found {
            Ok(Way::Back) => {
                let other = slot.other();
                self.journal.say(&format!("slot {slot} is on trial and not good: {why}; restarting, for slot {other} in the end"));
                true
            }
            Ok(Way::Alone) => {
                self.journal.say(&format!("slot {slot} is on trial and not good: {why}; there is no other slot to go to"));
                false
            }
            Ok(Way::NotOnTrial) => false,
            Err(error) => {
                self.journal.say(&format!("whether slot {slot} is on trial is not known: {error}"));
                false
            }
        }
    }

    fn good(&mut self) {
        let first = !std::mem::replace(&mut self.good, true);
        let Some(slot) = self.line.slot.filter(|_| first || self.again.take().is_some()) else { return };
        let version = self.line.version;
        let done = partition(true).and_then(|_mounted| Ok(bless(&mut Folder::new(Path::new(BOOT_FOLDER)), slot, version)?));
        match done {
            Ok(true) => self.journal.say(&format!("slot {slot} is good")),
            Ok(false) => {}
            // Until then the loader counts its tries.
            Err(error) => {
                self.journal.say(&format!("slot {slot} cannot be called good: {error}; it is tried again"));
                self.again = Some(Instant::now() + AGAIN);
            }
        }
    }
}

/// Why slots cannot be looked at or changed.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("the EFI system partition: {0}")]
    Files(#[from] io::Error),
}

fn partition(writable: bool) -> Result<Esp, Trouble> {
    Ok(Esp::mount_soon(writable)?)
}

/// Whether another version has served with what is refused now.
fn served_elsewhere(before: Option<&Served>, now: Option<&Served>) -> bool {
    let (Some(before), Some(now)) = (before, now) else { return false };
    before.configuration == now.configuration && before.version != now.version
}

fn served_now(configuration: &Path, version: Option<u64>) -> io::Result<Served> {
    Ok(Served { configuration: hex(&Sha256::digest(std::fs::read(configuration)?)), version })
}

fn read_record(path: &Path) -> Option<Served> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(std::fs::File::open(path).ok()?, RECORD_BYTES), &mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn record(path: &Path, served: &Served) -> io::Result<()> {
    if read_record(path).as_ref() == Some(served) {
        return Ok(());
    }
    let beside = path.with_extension("new");
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(&serde_json::to_vec(served)?)?;
    file.sync_all()?;
    std::fs::rename(beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_served_is_remembered() {
        let folder = std::env::temp_dir().join(format!("dray-trial-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let (config, path) = (folder.join("a.toml"), folder.join(RECORD));
        std::fs::write(&config, "a").expect("file");
        assert!(read_record(&path).is_none());
        let now = |version| served_now(&config, Some(version)).expect("read");
        record(&path, &now(7)).expect("record");
        let before = read_record(&path);
        assert!(served_elsewhere(before.as_ref(), Some(&now(8))), "8 refuses what 7 took");
        assert!(!served_elsewhere(before.as_ref(), Some(&now(7))), "it is not the version");
        std::fs::write(&config, "b").expect("file");
        assert!(!served_elsewhere(before.as_ref(), Some(&now(8))), "another configuration");
        assert!(!served_elsewhere(None, Some(&now(8))));
        std::fs::write(&path, "{").expect("file");
        assert!(read_record(&path).is_none(), "what is torn says nothing");
        std::fs::remove_dir_all(folder).expect("clean up");
    }
}
