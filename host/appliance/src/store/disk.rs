//! The store's files: one sled database in `STATE/store`, locked by `STATE/store.lock`. Used by the store's thread alone.
//!
//! The lock is ours because sled's own answers another process as it answers damage, and because setting a store aside must not
//! happen under the feet of whoever has it open.

use super::entry::{MigrationEntry, NamespaceEntry, decode, encode};
use super::{Contents, StoreError};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// The format of the trees below, kept in the default tree.
pub(super) const FORMAT: u64 = 1;
/// Most damaged stores that are kept.
pub(super) const MOST_DAMAGED: u32 = 16;
/// Most migrations that are kept; the oldest go.
const MOST_MIGRATIONS: usize = 4096;
/// Most namespaces that are kept; new ones are not kept then.
const MOST_NAMESPACES: usize = 65_536;
/// How often, and how long, is waited for a store that somebody else still has.
const RELEASE_TRIES: u32 = 20;
const RELEASE_PAUSE: std::time::Duration = std::time::Duration::from_millis(25);
/// Memory for sled's pages.
const CACHE_BYTES: u64 = 4 << 20;
/// What a disk must have room for, or else it is full rather than the store damaged.
const PROBE_BYTES: usize = 64 << 10;

const FORMAT_KEY: &[u8] = b"format";

/// The open store.
pub(super) struct Disk {
    database: sled::Db,
    /// Number (big-endian) to [`MigrationEntry`].
    history: sled::Tree,
    /// Subsystem and NSID to [`NamespaceEntry`].
    inventory: sled::Tree,
    /// The number that the next migration gets.
    next: u64,
    set_aside: Option<PathBuf>,
    _lock: OwnedFd,
}

/// Why an attempt to open has failed.
enum Trouble {
    /// The store's own fault: it is set aside.
    Damage(String),
    /// The disk's, the system's or another version's: it is left alone.
    Other(StoreError),
}

impl Disk {
    /// Opens the store or begins one; a damaged one is set aside.
    ///
    /// # Errors
    /// [`StoreError`]: anything that is not damage.
    pub(super) fn open(state: &Path) -> Result<Self, StoreError> {
        // Who has just let go of it (a process that is ending, sled's own threads) may need a moment.
        for _ in 0..RELEASE_TRIES {
            match Self::open_now(state) {
                Err(StoreError::InUse(_)) => std::thread::sleep(RELEASE_PAUSE),
                other => return other,
            }
        }
        Self::open_now(state)
    }

    fn open_now(state: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(state).map_err(|error| system(state, "make the folder", error))?;
        let lock = lock(state)?;
        let path = state.join("store");
        let (set_aside, open) = match attempt(&path) {
            Ok(open) => (None, open),
            Err(Trouble::Other(error)) => return Err(error),
            Err(Trouble::Damage(why)) => {
                // A full disk makes sled fail in many ways.
                probe(state)?;
                let aside = set_aside(state, &path)?;
                tracing::debug!(why, "the store is damaged");
                let again = attempt(&path).map_err(|trouble| match trouble {
                    Trouble::Other(error) => error,
                    Trouble::Damage(why) => StoreError::Failed(why),
                })?;
                (Some(aside), again)
            }
        };
        let Open { database, history, inventory, next } = open;
        Ok(Self { database, history, inventory, next, set_aside, _lock: lock })
    }

    /// Where a damaged store was moved by [`Disk::open`].
    pub(super) fn set_aside(&self) -> Option<&Path> {
        self.set_aside.as_deref()
    }

    /// Writes an entry under its number, or under the next one; its number. `None` if it is longer than one may be.
    pub(super) fn write(&mut self, number: Option<u64>, entry: &MigrationEntry) -> Result<Option<u64>, StoreError> {
        let Some(value) = encode(entry) else { return Ok(None) };
        let number = number.unwrap_or(self.next);
        self.next = self.next.max(number.saturating_add(1));
        self.history.insert(number.to_be_bytes(), value).map_err(failed)?;
        while self.history.len() > MOST_MIGRATIONS {
            self.history.pop_min().map_err(failed)?;
        }
        Ok(Some(number))
    }

    /// Keeps what a namespace was seen to be, if there is room; whether there was.
    pub(super) fn see(&mut self, entry: &NamespaceEntry) -> Result<bool, StoreError> {
        let mut key = entry.subsystem.as_bytes().to_vec();
        key.push(0);
        key.extend_from_slice(&entry.nsid.to_be_bytes());
        let Some(value) = encode(entry) else { return Ok(false) };
        if self.inventory.len() >= MOST_NAMESPACES && !self.inventory.contains_key(&key).map_err(failed)? {
            return Ok(false);
        }
        self.inventory.insert(key, value).map_err(failed)?;
        Ok(true)
    }

    /// Makes everything durable.
    pub(super) fn flush(&mut self) -> Result<(), StoreError> {
        self.database.flush().map(|_| ()).map_err(failed)
    }

    /// Everything.
    pub(super) fn read(&self) -> Result<Contents, StoreError> {
        let mut contents = Contents::default();
        let mut expected = None;
        for pair in &self.history {
            let (key, value) = pair.map_err(failed)?;
            let number = number(&key);
            // Numbers follow each other: a gap is damage that sled has passed over.
            contents.unreadable += number.zip(expected).map_or(0, |(number, expected): (u64, u64)| number.saturating_sub(expected));
            expected = number.map(|number| number.saturating_add(1));
            match number.zip(decode(&value)) {
                Some(numbered) => contents.migrations.push(numbered),
                None => contents.unreadable += 1,
            }
        }
        for pair in &self.inventory {
            match decode(&pair.map_err(failed)?.1) {
                Some(namespace) => contents.namespaces.push(namespace),
                None => contents.unreadable += 1,
            }
        }
        Ok(contents)
    }
}

/// What an attempt gives.
struct Open {
    database: sled::Db,
    history: sled::Tree,
    inventory: sled::Tree,
    next: u64,
}

/// Tries to open the store; a panic of sled counts as damage.
fn attempt(path: &Path) -> Result<Open, Trouble> {
    let tried = catch_unwind(AssertUnwindSafe(|| open(path)));
    tried.unwrap_or_else(|panic| Err(Trouble::Damage(super::words(panic.as_ref()))))
}

fn open(path: &Path) -> Result<Open, Trouble> {
    let trouble = |error| trouble(path, error);
    let marker = path.join("begun");
    // Flushed by this thread when it matters, not by a thread that wakes up for it.
    let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
    let database = config.open().map_err(trouble)?;
    let found = database.get(FORMAT_KEY).map_err(trouble)?;
    let found = found.map(|value| value.as_ref().try_into().map(u64::from_le_bytes));
    match found {
        Some(Ok(FORMAT)) => {}
        Some(Ok(found)) => return Err(Trouble::Other(StoreError::Format { path: path.to_path_buf(), found })),
        Some(Err(_)) => return Err(Trouble::Damage("its format is no number".into())),
        // sled takes a file that it does not understand at all for a new one.
        None if marker.exists() => return Err(Trouble::Damage("it has no format".into())),
        // New, or killed when it was new: nothing is in it.
        None => {
            database.insert(FORMAT_KEY, &FORMAT.to_le_bytes()).map_err(trouble)?;
            database.flush().map_err(trouble)?;
        }
    }
    if !marker.exists() {
        File::create(&marker).map_err(|error| Trouble::Other(system(&marker, "create", error)))?;
    }
    let history = database.open_tree("history").map_err(trouble)?;
    let inventory = database.open_tree("inventory").map_err(trouble)?;
    // sled reads pages when they are asked for: all are, so that damage shows now.
    let mut last = 0;
    for key in history.iter().keys() {
        last = number(&key.map_err(trouble)?).unwrap_or(last);
    }
    for value in inventory.iter().values() {
        value.map_err(trouble)?;
    }
    Ok(Open { database, history, inventory, next: last.saturating_add(1) })
}

fn number(key: &[u8]) -> Option<u64> {
    key.try_into().ok().map(u64::from_be_bytes)
}

/// What an error of sled at opening means.
fn trouble(path: &Path, error: sled::Error) -> Trouble {
    match error {
        // The system's own errors have a number; sled makes up others for files that it does not understand.
        sled::Error::Io(error) if error.raw_os_error().is_some() && error.kind() != ErrorKind::NotADirectory => {
            Trouble::Other(system(path, "open", error))
        }
        // Other processes are kept out by the lock; what is left of a store that failed in this one is not.
        sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => {
            Trouble::Other(StoreError::InUse(path.to_path_buf()))
        }
        error => Trouble::Damage(error.to_string()),
    }
}

fn failed(error: sled::Error) -> StoreError {
    StoreError::Failed(error.to_string())
}

fn system(path: &Path, what: &'static str, why: impl ToString) -> StoreError {
    StoreError::System { path: path.to_path_buf(), what, why: why.to_string() }
}

/// Keeps other processes out, until the descriptor is closed.
fn lock(state: &Path) -> Result<OwnedFd, StoreError> {
    let path = state.join("store.lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| system(&path, "open", error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StoreError::InUse(state.join("store"))),
        Err(error) => Err(system(&path, "lock", error)),
    }
}

/// Whether the folder can be written at all.
fn probe(state: &Path) -> Result<(), StoreError> {
    let path = state.join("store.probe");
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(&[0xa5; PROBE_BYTES])?;
        file.sync_all()
    });
    let removed = std::fs::remove_file(&path);
    written.and(removed).map_err(|error| system(state, "write", error))
}

/// Renames a damaged store to the first free name.
fn set_aside(state: &Path, path: &Path) -> Result<PathBuf, StoreError> {
    let names = (1..=MOST_DAMAGED).map(|n| state.join(format!("store.damaged-{n}")));
    let free = names.into_iter().find(|name| name.symlink_metadata().is_err());
    let aside = free.ok_or_else(|| StoreError::Damaged(path.to_path_buf()))?;
    std::fs::rename(path, &aside).map_err(|error| system(path, "set it aside", error))?;
    Ok(aside)
}
