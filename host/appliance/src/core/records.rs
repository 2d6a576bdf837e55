//! The record that correctness rests on: who owns a namespace, in two checksummed slots (rule 9).
//!
//! | written and flushed | before |
//! |---|---|
//! | owner = source, not fenced, phase copying | the first read of a migration |
//! | owner = destination, fenced, phase moved | the source's fence is raised, the slot pointed away, the destination resumed |
//! | owner = source, not fenced, phase copying, once more | the fence is lowered by an undo, the source resumed |
//! | owner = source, not fenced, phase undone | the migration is reported as undone |
//! | owner = destination, fenced, phase done | the migration is reported as done |
//!
//! A record is never overwritten in place: the slot with the older record takes the new one, so a torn write leaves the one
//! before. Not here yet: a process that outlives a migration, finds a record at its start, and puts the fence up before it
//! builds the controller. The demo makes new disks each time and takes no notice of the records of the last run.

use dray_device::poll::{Jobs, Pending};
use dray_migration::{Journal, JournalError, Owner, Record, RecordPhase};
use rustix::fs::{Mode, OFlags};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

const SLOT_BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"DRAYREC1";

/// A record as it lies in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Counts the records of a namespace, over all its migrations.
    pub sequence: u64,
    /// What is known of the namespace.
    pub record: Record,
}

impl Stored {
    fn encode(&self, nguid: &[u8; 16]) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(&MAGIC);
        slot[8..24].copy_from_slice(nguid);
        slot[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        slot[32..40].copy_from_slice(&self.record.migration.to_le_bytes());
        slot[40..48].copy_from_slice(&self.record.epoch.to_le_bytes());
        slot[48] = u8::from(self.record.owner == Owner::Destination);
        slot[49] = self.record.phase as u8;
        slot[50] = u8::from(self.record.fenced);
        let sum = checksum(&slot[..64]);
        slot[64..96].copy_from_slice(&sum);
        slot
    }

    fn decode(slot: &[u8; SLOT_BYTES], nguid: &[u8; 16]) -> Option<Self> {
        if slot[..8] != MAGIC || slot[8..24] != nguid[..] || slot[64..96] != checksum(&slot[..64]) {
            return None;
        }
        let word = |at: usize| slot[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
        let phases = [RecordPhase::Copying, RecordPhase::Moved, RecordPhase::Done, RecordPhase::Undone];
        let record = Record {
            migration: word(32),
            epoch: word(40),
            owner: if slot[48] == 0 { Owner::Source } else { Owner::Destination },
            phase: *phases.get(usize::from(slot[49]))?,
            fenced: slot[50] != 0,
        };
        Some(Self { sequence: word(24), record })
    }
}

fn checksum(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}

/// Where the two slots are. The appliance's is a file; a simulator's can lose, reorder and tear what was not flushed.
pub trait SlotMedium: Send {
    /// The bytes of slot 0 or 1.
    ///
    /// # Errors
    /// The medium's.
    fn read(&mut self, slot: usize) -> io::Result<[u8; SLOT_BYTES]>;
    /// Writes a slot; it need not be durable yet.
    ///
    /// # Errors
    /// The medium's.
    fn write(&mut self, slot: usize, bytes: &[u8; SLOT_BYTES]) -> io::Result<()>;
    /// Makes what was written durable.
    ///
    /// # Errors
    /// The medium's.
    fn flush(&mut self) -> io::Result<()>;
}

/// The two slots in a file.
#[derive(Debug)]
pub struct FileMedium {
    file: OwnedFd,
}

impl FileMedium {
    /// Opens or creates the file of a namespace in `folder`; a new one is durable in its folder when this returns.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn open(folder: &Path, nguid: &[u8; 16]) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = Self::path(folder, nguid);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?;
        if rustix::fs::fstat(&file)?.st_size != 2 * SLOT_BYTES as i64 {
            rustix::fs::ftruncate(&file, 0)?;
            // Zeroes are written, not left as a hole, so that a later record changes no metadata and flushes quickly.
            write_all_at(&file, &[0; 2 * SLOT_BYTES], 0)?;
            rustix::fs::fsync(&file)?;
            fs::File::open(folder)?.sync_all()?;
        }
        Ok(Self { file })
    }

    fn path(folder: &Path, nguid: &[u8; 16]) -> PathBuf {
        folder.join(format!("{:032x}.record", u128::from_be_bytes(*nguid)))
    }
}

fn write_all_at(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = rustix::io::pwrite(file, bytes, at)?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[n..];
        at += n as u64;
    }
    Ok(())
}

impl SlotMedium for FileMedium {
    fn read(&mut self, slot: usize) -> io::Result<[u8; SLOT_BYTES]> {
        let mut bytes = [0; SLOT_BYTES];
        let mut done = 0;
        while done < SLOT_BYTES {
            let n = rustix::io::pread(&self.file, &mut bytes[done..], (slot * SLOT_BYTES + done) as u64)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += n;
        }
        Ok(bytes)
    }

    fn write(&mut self, slot: usize, bytes: &[u8; SLOT_BYTES]) -> io::Result<()> {
        write_all_at(&self.file, bytes, (slot * SLOT_BYTES) as u64)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }
}

/// The record of one namespace.
pub struct RecordStore<M> {
    medium: M,
    nguid: [u8; 16],
    current: Option<Stored>,
    /// The slot that `current` lies in.
    slot: usize,
}

impl<M: SlotMedium> RecordStore<M> {
    /// Reads the newest valid record; slots that hold none (new, or torn) are passed over.
    ///
    /// # Errors
    /// The medium's.
    pub fn open(mut medium: M, nguid: [u8; 16]) -> io::Result<Self> {
        let mut newest: Option<(usize, Stored)> = None;
        for slot in 0..2 {
            if let Some(stored) = Stored::decode(&medium.read(slot)?, &nguid)
                && newest.is_none_or(|(_, other)| stored.sequence > other.sequence)
            {
                newest = Some((slot, stored));
            }
        }
        let (slot, current) = newest.map_or((1, None), |(slot, stored)| (slot, Some(stored)));
        Ok(Self { medium, nguid, current, slot })
    }

    /// The newest record; `None` for a namespace that nobody has moved.
    #[must_use]
    pub fn current(&self) -> Option<Stored> {
        self.current
    }

    /// Writes a record and returns when it is durable.
    ///
    /// # Errors
    /// The medium's. The old record is the newest then, unless the new one became durable all the same: which of the two is
    /// unknown until the store is opened again.
    pub fn write(&mut self, record: Record) -> io::Result<Stored> {
        let stored = Stored { sequence: self.current.map_or(1, |c| c.sequence + 1), record };
        let slot = 1 - self.slot;
        self.medium.write(slot, &stored.encode(&self.nguid))?;
        self.medium.flush()?;
        (self.slot, self.current) = (slot, Some(stored));
        Ok(stored)
    }
}

/// The records of all namespaces of a migration, as its journal: written by jobs, flushed before they are answered.
pub struct RecordJournal<M> {
    stores: Arc<Mutex<Vec<RecordStore<M>>>>,
    jobs: Box<dyn Jobs>,
    pending: Option<Pending<io::Result<()>>>,
}

impl<M: SlotMedium + 'static> RecordJournal<M> {
    /// A journal over one store per namespace.
    #[must_use]
    pub fn new(stores: Vec<RecordStore<M>>, jobs: Box<dyn Jobs>) -> Self {
        Self { stores: Arc::new(Mutex::new(stores)), jobs, pending: None }
    }
}

impl<M: SlotMedium + 'static> Journal for RecordJournal<M> {
    fn write(&mut self, record: &Record) {
        let (stores, record) = (Arc::clone(&self.stores), *record);
        self.pending = Some(Pending::start(self.jobs.as_mut(), move || {
            let mut stores = stores.lock().unwrap_or_else(PoisonError::into_inner);
            stores.iter_mut().try_for_each(|store| store.write(record).map(|_| ()))
        }));
    }

    fn poll(&mut self) -> Option<Result<(), JournalError>> {
        let pending = self.pending.as_mut()?;
        let answer = match pending.poll() {
            Some(answer) => answer.map_err(|error| JournalError(error.to_string())),
            None if pending.is_lost() => Err(JournalError("the worker that writes it has died".into())),
            None => return None,
        };
        self.pending = None;
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps written slots apart from durable ones.
    #[derive(Clone)]
    struct Memory {
        durable: [[u8; SLOT_BYTES]; 2],
        written: [[u8; SLOT_BYTES]; 2],
    }

    impl Memory {
        fn new() -> Self {
            Self { durable: [[0; SLOT_BYTES]; 2], written: [[0; SLOT_BYTES]; 2] }
        }
    }

    impl SlotMedium for Memory {
        fn read(&mut self, slot: usize) -> io::Result<[u8; SLOT_BYTES]> {
            Ok(self.durable[slot])
        }
        fn write(&mut self, slot: usize, bytes: &[u8; SLOT_BYTES]) -> io::Result<()> {
            self.written[slot] = *bytes;
            Ok(())
        }
        fn flush(&mut self) -> io::Result<()> {
            self.durable = self.written;
            Ok(())
        }
    }

    const NGUID: [u8; 16] = [7; 16];

    fn record(phase: RecordPhase) -> Record {
        let moved = matches!(phase, RecordPhase::Moved | RecordPhase::Done);
        let owner = if moved { Owner::Destination } else { Owner::Source };
        Record { migration: 9, epoch: 1, owner, phase, fenced: moved }
    }

    #[test]
    fn the_newest_record_is_found_and_every_write_is_flushed() {
        let mut store = RecordStore::open(Memory::new(), NGUID).expect("open");
        assert_eq!(store.current(), None);
        for (n, phase) in [RecordPhase::Copying, RecordPhase::Moved, RecordPhase::Done].into_iter().enumerate() {
            let stored = store.write(record(phase)).expect("write");
            let again = RecordStore::open(store.medium.clone(), NGUID).expect("open");
            assert_eq!(again.current(), Some(stored));
            assert_eq!((stored.sequence, stored.record), (n as u64 + 1, record(phase)));
        }
    }

    #[test]
    fn a_torn_write_leaves_the_record_before() {
        let mut store = RecordStore::open(Memory::new(), NGUID).expect("open");
        let kept = store.write(record(RecordPhase::Copying)).expect("write");
        let torn_slot = 1 - store.slot;
        store.write(record(RecordPhase::Moved)).expect("write");
        for byte in [0, 9, 24, 40, 48, 50, 63, 64, 95] {
            let mut medium = store.medium.clone();
            medium.durable[torn_slot][byte] ^= 1;
            assert_eq!(RecordStore::open(medium, NGUID).expect("open").current(), Some(kept), "byte {byte}");
        }
    }

    #[test]
    fn the_file_keeps_records_of_each_namespace_apart() {
        let folder = std::env::temp_dir().join(format!("dray-records-{}", std::process::id()));
        let open = |nguid| RecordStore::open(FileMedium::open(&folder, &nguid).expect("file"), nguid).expect("open");
        let written = open(NGUID).write(record(RecordPhase::Undone)).expect("write");
        assert_eq!(open(NGUID).current(), Some(written));
        assert_eq!(open([8; 16]).current(), None);
        fs::remove_dir_all(&folder).expect("clean up");
    }

    #[test]
    fn the_journal_answers_after_the_flush_and_once() {
        let store = RecordStore::open(Memory::new(), NGUID).expect("open");
        let mut journal = RecordJournal::new(vec![store], Box::new(dray_device::poll::InlineJobs));
        assert!(journal.poll().is_none());
        journal.write(&record(RecordPhase::Moved));
        assert_eq!(journal.poll(), Some(Ok(())));
        assert!(journal.poll().is_none());
        let stores = journal.stores.lock().expect("stores");
        let durable = RecordStore::open(stores[0].medium.clone(), NGUID).expect("open");
        assert_eq!(durable.current().map(|s| s.record), Some(record(RecordPhase::Moved)));
    }
}
