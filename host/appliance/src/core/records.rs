//! The record that correctness rests on: who owns a namespace, in two checksummed slots (rule 9).
//!
//! | written and flushed | before |
//! |---|---|
//! | owner = source, not fenced, phase copying | the first read of a migration |
//! | owner = destination, fenced, phase moved, for every namespace of the set | the slot is pointed away, the destination resumed |
//! | owner = source, not fenced, phase copying, once more | the fence is lowered by an undo, the source resumed |
//! | owner = source, not fenced, phase undone | the migration is reported as undone |
//! | owner = destination, fenced, phase done | the migration is reported as done |
//! | at a start: the closing record of a migration that was cut short ([`dray_migration::recovery`]) | any controller may fetch, the next migration begins |
//!
//! The fence itself lives in memory and goes up before the "moved" record is written; a start puts it up again by the record,
//! before the controllers behind it exist. A record names both ends by themselves ([`end_id`]), so that it says who serves
//! whichever way the configuration moves next.
//!
//! A record is never overwritten in place: the slot with the older record takes the new one, so a torn write leaves the one
//! before. What the two slots can be: both zero, or the first torn and the second zero = nothing was ever recorded; one valid =
//! that one; anything else is a [`RecordError`] that an operator has to see. A slot (4 KiB, little-endian):
//!
//! | bytes | what |
//! |---|---|
//! | 7:0 | "DRAYREC" and the version, "2" |
//! | 23:8 | NGUID |
//! | 31:24 | sequence: records of this namespace so far, over all migrations |
//! | 39:32, 47:40 | migration, epoch |
//! | 48, 49, 50 | owner (1 = destination), phase, fenced |
//! | 79:64, 95:80 | names of source and destination |
//! | 4095:4064 | SHA-256 of all bytes before; in every version |

use dray_device::planted::{self, Fault};
use dray_device::poll::{Jobs, Pending};
use dray_migration::{EndId, Journal, JournalError, Owner, Record, RecordPhase};
use rustix::fs::{Mode, OFlags};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 4096;
/// Where the checksum begins.
const SUM: usize = SLOT_BYTES - 32;
const MAGIC: [u8; 7] = *b"DRAYREC";
const VERSION: u8 = b'2';

/// Why the record of a namespace is not known. Never taken for a namespace that has none.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The medium.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Neither slot holds a record, and they are not new.
    #[error("both slots are damaged: nobody knows who serves the namespace")]
    Damaged,
    /// Written by another version of Dray.
    #[error("written in format \"{}\", and this version of dray reads \"{}\"", found.escape_ascii(), VERSION.escape_ascii())]
    Version {
        /// The version found.
        found: u8,
    },
    /// The record of another namespace.
    #[error("it is the record of the namespace with NGUID {nguid:032x}")]
    OtherNamespace {
        /// Whose it is.
        nguid: u128,
    },
    /// The file is neither new nor a pair of slots.
    #[error("the file has {0} bytes, which is not the length of a record")]
    Length(u64),
}

/// The name of a subsystem in records: from its name in the configuration and its NQN.
#[must_use]
pub fn end_id(name: &str, nqn: &str) -> EndId {
    let sum = checksum(format!("{name}\0{nqn}").as_bytes());
    let mut id = EndId::default();
    id.copy_from_slice(&sum[..16]);
    id
}

/// A record as it lies in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Counts the records of a namespace, over all its migrations.
    pub sequence: u64,
    /// What is known of the namespace.
    pub record: Record,
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Zero,
    Whole(Stored),
    /// Torn, or rotten.
    Broken,
    Version(u8),
    Other(u128),
}

impl Stored {
    fn encode(&self, nguid: &[u8; 16]) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        slot[..7].copy_from_slice(&MAGIC);
        slot[7] = VERSION;
        slot[8..24].copy_from_slice(nguid);
        slot[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        slot[32..40].copy_from_slice(&self.record.migration.to_le_bytes());
        slot[40..48].copy_from_slice(&self.record.epoch.to_le_bytes());
        slot[48] = u8::from(self.record.owner == Owner::Destination);
        slot[49] = self.record.phase as u8;
        slot[50] = u8::from(self.record.fenced);
        slot[64..80].copy_from_slice(&self.record.from);
        slot[80..96].copy_from_slice(&self.record.to);
        let sum = checksum(&slot[..SUM]);
        slot[SUM..].copy_from_slice(&sum);
        slot
    }

    fn decode(slot: &[u8; SLOT_BYTES]) -> Option<Self> {
        let word = |at: usize| slot[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
        let name = |at: usize| slot[at..at + 16].try_into().unwrap_or_default();
        let phases = [RecordPhase::Copying, RecordPhase::Moved, RecordPhase::Done, RecordPhase::Undone];
        let record = Record {
            migration: word(32),
            from: name(64),
            to: name(80),
            epoch: word(40),
            owner: if slot[48] == 0 { Owner::Source } else { Owner::Destination },
            phase: *phases.get(usize::from(slot[49]))?,
            fenced: slot[50] != 0,
        };
        Some(Self { sequence: word(24), record })
    }
}

impl Reading {
    fn of(slot: &[u8; SLOT_BYTES], nguid: &[u8; 16]) -> Self {
        if slot.iter().all(|byte| *byte == 0) {
            return Self::Zero;
        }
        let whole = slot[SUM..] == checksum(&slot[..SUM]);
        // The first version had its checksum elsewhere.
        if slot[..7] == MAGIC && slot[7] != VERSION && (whole || slot[64..96] == checksum(&slot[..64])) {
            return Self::Version(slot[7]);
        }
        if slot[..7] != MAGIC || !whole {
            return Self::Broken;
        }
        if slot[8..24] != nguid[..] {
            return Self::Other(slot[8..24].try_into().map(u128::from_be_bytes).unwrap_or(0));
        }
        Stored::decode(slot).map_or(Self::Broken, Self::Whole)
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
    /// [`RecordError::Length`] when it is no pair of slots, [`RecordError::Io`].
    pub fn open(folder: &Path, nguid: &[u8; 16]) -> Result<Self, RecordError> {
        fs::create_dir_all(folder)?;
        let path = Self::path(folder, nguid);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from)?;
        let len = fs::metadata(&path)?.len();
        if len != 2 * SLOT_BYTES as u64 {
            // Cut short while it was made: it holds nothing yet. Anything else may have been a record.
            if len > 2 * SLOT_BYTES as u64 || fs::read(&path)?.iter().any(|byte| *byte != 0) {
                return Err(RecordError::Length(len));
            }
            // Zeroes are written, not left as a hole, so that a later record changes no metadata and flushes quickly.
            write_all_at(&file, &[0; 2 * SLOT_BYTES], 0)?;
            rustix::fs::fsync(&file).map_err(io::Error::from)?;
            fs::File::open(folder)?.sync_all()?;
        }
        Ok(Self { file })
    }

    /// Where the file of a namespace is.
    #[must_use]
    pub fn path(folder: &Path, nguid: &[u8; 16]) -> PathBuf {
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
    /// Reads the newest valid record. A torn slot beside a valid one is passed over, and is the next to be written.
    ///
    /// What is read may be in the kernel's cache alone: a process that was killed, or whose flush failed, has left it there. Who
    /// relied on it would serve, and the next power cut would take the record back; and the next record, in the other slot, could
    /// be torn together with it. So it is written again, as it is, and flushed, before anybody hears of it. Written again and not
    /// only flushed, since a flush after one that failed may succeed without the data.
    ///
    /// # Errors
    /// [`RecordError`]: the slots are neither new nor hold a record of this namespace that this version reads, or it cannot be made
    /// durable.
    pub fn open(mut medium: M, nguid: [u8; 16]) -> Result<Self, RecordError> {
        let slots = [medium.read(0)?, medium.read(1)?];
        let readings = slots.each_ref().map(|slot| Reading::of(slot, &nguid));
        for reading in readings {
            match reading {
                Reading::Version(found) => return Err(RecordError::Version { found }),
                Reading::Other(nguid) => return Err(RecordError::OtherNamespace { nguid }),
                _ => {}
            }
        }
        let (slot, current) = match readings {
            [Reading::Whole(first), Reading::Whole(second)] if first.sequence > second.sequence => (0, Some(first)),
            [_, Reading::Whole(second)] => (1, Some(second)),
            [Reading::Whole(first), _] => (0, Some(first)),
            // The first record goes to the first slot: torn, it leaves the second as new as it was.
            [_, Reading::Zero] => (1, None),
            _ => return Err(RecordError::Damaged),
        };
        if current.is_some() && !planted::on(Fault::FoundRecordNotFlushed) {
            medium.write(slot, &slots[slot])?;
            medium.flush()?;
        }
        Ok(Self { medium, nguid, current, slot })
    }

    /// The medium.
    pub fn medium(&self) -> &M {
        &self.medium
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
        if !planted::on(Fault::RecordNotFlushed) {
            self.medium.flush()?;
        }
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
        Record { migration: 9, from: end_id("a", "nqn"), to: end_id("b", "nqn"), epoch: 1, owner, phase, fenced: moved }
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

    /// Reads what was written, as a kernel's cache does, and fails flushes where it is told to.
    #[derive(Clone)]
    struct Cached {
        memory: Memory,
        failing: u32,
    }

    impl SlotMedium for Cached {
        fn read(&mut self, slot: usize) -> io::Result<[u8; SLOT_BYTES]> {
            Ok(self.memory.written[slot])
        }
        fn write(&mut self, slot: usize, bytes: &[u8; SLOT_BYTES]) -> io::Result<()> {
            self.memory.write(slot, bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            if self.failing > 0 {
                self.failing -= 1;
                return Err(io::Error::other("no flush"));
            }
            self.memory.flush()
        }
    }

    #[test]
    fn a_record_that_is_found_is_durable_before_anybody_relies_on_it() {
        let mut store = RecordStore::open(Cached { memory: Memory::new(), failing: 1 }, NGUID).expect("open");
        store.write(record(RecordPhase::Copying)).expect_err("the flush fails");
        // The process ends here; the next one finds what the kernel has kept.
        let again = RecordStore::open(store.medium.clone(), NGUID).expect("open");
        let found = again.current().expect("a record");
        let after_a_power_cut = RecordStore::open(again.medium.memory.clone(), NGUID).expect("open");
        assert_eq!(after_a_power_cut.current(), Some(found));
        let fails = Cached { failing: 1, ..store.medium.clone() };
        assert!(matches!(RecordStore::open(fails, NGUID), Err(RecordError::Io(_))));
    }

    #[test]
    fn a_torn_write_leaves_the_record_before() {
        let mut store = RecordStore::open(Memory::new(), NGUID).expect("open");
        let kept = store.write(record(RecordPhase::Copying)).expect("write");
        let torn_slot = 1 - store.slot;
        store.write(record(RecordPhase::Moved)).expect("write");
        for byte in [0, 7, 9, 24, 40, 48, 50, 64, 95, 1000, SUM, SLOT_BYTES - 1] {
            let mut medium = store.medium.clone();
            medium.durable[torn_slot][byte] ^= 1;
            assert_eq!(RecordStore::open(medium, NGUID).expect("open").current(), Some(kept), "byte {byte}");
        }
    }

    /// A medium with a record in each slot, the newer one in slot 1.
    fn two() -> (Memory, Stored, Stored) {
        let mut store = RecordStore::open(Memory::new(), NGUID).expect("open");
        let older = store.write(record(RecordPhase::Copying)).expect("write");
        let newer = store.write(record(RecordPhase::Moved)).expect("write");
        assert_eq!(store.slot, 1);
        (store.medium, older, newer)
    }

    #[test]
    fn damage_is_never_taken_for_a_new_namespace() {
        let (whole, older, newer) = two();
        let (zero, mut broken) = ([0; SLOT_BYTES], whole.durable[0]);
        broken[100] = 1;
        let open = |first, second| {
            let medium = Memory { durable: [first, second], ..whole.clone() };
            RecordStore::open(medium, NGUID).map(|store| store.current())
        };
        let [one, two] = whole.durable;
        assert_eq!(open(one, two).expect("both"), Some(newer));
        assert_eq!(open(two, one).expect("either way"), Some(newer));
        for other in [zero, broken] {
            assert_eq!(open(one, other).expect("the first"), Some(older));
            assert_eq!(open(other, two).expect("the second"), Some(newer));
            assert_eq!(open(other, zero).expect("new, or torn as the first record was written"), None);
            assert!(matches!(open(other, broken), Err(RecordError::Damaged)));
        }
    }

    #[test]
    fn what_another_version_wrote_is_refused_plainly() {
        let (whole, ..) = two();
        let mut later = whole.durable[0];
        later[7] = b'3';
        let sum = checksum(&later[..SUM]);
        later[SUM..].copy_from_slice(&sum);
        let mut first = [0; SLOT_BYTES];
        first[..8].copy_from_slice(b"DRAYREC1");
        let sum = checksum(&first[..64]);
        first[64..96].copy_from_slice(&sum);
        for (foreign, version) in [(later, b'3'), (first, b'1')] {
            for other in [[0; SLOT_BYTES], whole.durable[1]] {
                let medium = Memory { durable: [foreign, other], ..whole.clone() };
                let error = RecordStore::open(medium, NGUID).err();
                assert!(matches!(error, Some(RecordError::Version { found }) if found == version), "{error:?}");
            }
        }
        let other = RecordStore::open(whole, [8; 16]).err();
        assert!(matches!(other, Some(RecordError::OtherNamespace { .. })), "{other:?}");
    }

    #[test]
    fn the_sequence_goes_on_over_a_restart() {
        let (medium, _, newer) = two();
        let stored = RecordStore::open(medium, NGUID).expect("open").write(record(RecordPhase::Done)).expect("write");
        assert_eq!((stored.sequence, newer.sequence), (3, 2));
    }

    #[test]
    fn a_file_of_a_wrong_length_is_no_record() {
        let folder = std::env::temp_dir().join(format!("dray-record-length-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        let path = FileMedium::path(&folder, &NGUID);
        for (bytes, good) in [(vec![0; 100], true), (vec![1; 100], false), (vec![0; 3 * SLOT_BYTES], false)] {
            fs::write(&path, &bytes).expect("file");
            assert_eq!(FileMedium::open(&folder, &NGUID).is_ok(), good, "{} bytes", bytes.len());
        }
        fs::remove_dir_all(&folder).expect("clean up");
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
