//! The ledger: which writes the guest issued, and which were acknowledged to it.
//!
//! A ledger is memory, usually mapped from a file and shared with it, so that what was stored is there after a `kill -9`.
//! A write's number goes into its block's `issued` word before the command is submitted, and into `acked` after its completion
//! was seen; so at any instant the device holds for each block the content of some write in `[acked, issued]` (or what was
//! there before, while `acked` is 0). The guest never has two writes outstanding to one block.
//!
//! Layout, little-endian 64-bit words: a header of one page (see [`header`]), the table of block numbers, then a pair of words
//! {issued, acked} for each of them. Everything that never changes is covered by a checksum.

use crate::mix;
use crate::tag::BLOCK_BYTES;
use dray_device::memory::{Arena, MemoryError, PAGE, Pages};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Most blocks that a ledger can have: 64 GiB of targets.
pub const MAX_BLOCKS: usize = 16 << 20;

/// Byte offsets of the header's words.
mod header {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const BLOCK_BYTES: usize = 16;
    pub const SEED: usize = 24;
    pub const GUEST: usize = 32;
    pub const BLOCKS: usize = 40;
    /// Checksum of the words before and of the table.
    pub const CHECKSUM: usize = 48;
    /// From here on what changes while the guest runs: the number of the next write.
    pub const NEXT_SEQ: usize = 64;
    pub const ACKNOWLEDGED: usize = 72;
    /// Lowest number outstanding when the source was suspended; [`super::NONE`] = was not.
    pub const SUSPEND_FLOOR: usize = 80;
    /// Next number when the destination had resumed; [`super::NONE`] = did not.
    pub const RESUME_MARK: usize = 88;
}

const MAGIC: u64 = u64::from_le_bytes(*b"DRAYLEDG");
const VERSION: u64 = 1;
const NONE: u64 = u64::MAX;

/// What a ledger is about; fixed while it lives.
#[derive(Clone, Debug)]
pub struct LedgerSpec {
    /// Seed of the blocks' filling and of the guest's choices.
    pub seed: u64,
    /// The guest's number, part of each tag.
    pub guest: u32,
    /// The blocks that the guest may write, in units of [`BLOCK_BYTES`], each once.
    pub blocks: Vec<u64>,
}

/// Why there is no ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// No blocks, too many, or one of them twice.
    #[error("bad set of target blocks: {0}")]
    BadBlocks(String),
    /// The file is not a ledger, is of another version, or is damaged.
    #[error("not a ledger that can be used: {0}")]
    BadFile(&'static str),
    /// The file cannot be read, written or mapped.
    #[error("ledger: {0}")]
    Io(#[from] io::Error),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A ledger. Shared by reference: the guest stores, its handle and the comparison load.
#[derive(Debug)]
pub struct Ledger {
    arena: Arc<Arena>,
    seed: u64,
    guest: u32,
    blocks: Vec<u64>,
    /// (block, index), sorted.
    sorted: Vec<(u64, u32)>,
    entries: usize,
}

impl Ledger {
    /// Makes a new ledger in a file (replacing what was there), mapped and shared with it.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn create(path: &Path, spec: &LedgerSpec) -> Result<Self, LedgerError> {
        sorted(&spec.blocks)?;
        let bytes = bytes(spec.blocks.len());
        // A new file, never one that some process may still have mapped.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        // Written, not only made longer: on a full disk a store to a hole would kill the process later.
        crate::pattern::fill_file(&file, bytes as u64, 0)?;
        Self::begin(Arena::map_file(&file, bytes)?, spec)
    }

    /// Makes a new ledger in anonymous memory: for tests, benches and the simulator.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn in_memory(spec: &LedgerSpec) -> Result<Self, LedgerError> {
        sorted(&spec.blocks)?;
        Self::begin(Arena::new("dray-ledger", bytes(spec.blocks.len()), Pages::Small)?, spec)
    }

    fn begin(arena: Arc<Arena>, spec: &LedgerSpec) -> Result<Self, LedgerError> {
        let store = |at, value| arena.store64(at, value, Ordering::Relaxed);
        store(header::MAGIC, MAGIC);
        store(header::VERSION, VERSION);
        store(header::BLOCK_BYTES, BLOCK_BYTES as u64);
        store(header::SEED, spec.seed);
        store(header::GUEST, u64::from(spec.guest));
        store(header::BLOCKS, spec.blocks.len() as u64);
        store(header::NEXT_SEQ, 1);
        store(header::SUSPEND_FLOOR, NONE);
        store(header::RESUME_MARK, NONE);
        for (index, block) in spec.blocks.iter().enumerate() {
            store(PAGE + index * 8, *block);
        }
        arena.store64(header::CHECKSUM, checksum(&arena, spec.blocks.len()), Ordering::Release);
        Self::over(arena)
    }

    /// Reads the ledger of another process (or of one that was killed) as it is now, into memory of its own.
    ///
    /// # Errors
    /// [`LedgerError::BadFile`] when it is not a ledger or its unchanging part is damaged.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        if len < PAGE as u64 || len > bytes(MAX_BLOCKS) as u64 || !len.is_multiple_of(PAGE as u64) {
            return Err(LedgerError::BadFile("its length is not that of a ledger"));
        }
        let arena = Arena::new("dray-ledger", len as usize, Pages::Small)?;
        let mut page = [0; PAGE];
        for at in (0..len as usize).step_by(PAGE) {
            file.read_exact(&mut page)?;
            arena.write(at, &page);
        }
        Self::over(arena)
    }

    /// Goes on with the ledger of a process that is gone, mapped and shared as [`create`](Self::create) does. The next number is
    /// above every one that was ever issued: one that was recorded as issued the moment before a `kill -9` is not used again.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn resume(path: &Path) -> Result<Self, LedgerError> {
        let file = File::options().read(true).write(true).open(path)?;
        let len = file.metadata()?.len();
        if len < PAGE as u64 || len > bytes(MAX_BLOCKS) as u64 || !len.is_multiple_of(PAGE as u64) {
            return Err(LedgerError::BadFile("its length is not that of a ledger"));
        }
        let ledger = Self::over(Arena::map_file(&file, len as usize)?)?;
        let issued = (0..ledger.blocks.len()).map(|index| ledger.issued(index)).max().unwrap_or(0);
        if issued >= ledger.next_seq() {
            ledger.arena.store64(header::NEXT_SEQ, issued + 1, Ordering::Release);
        }
        Ok(ledger)
    }

    fn over(arena: Arc<Arena>) -> Result<Self, LedgerError> {
        let load = |at| arena.load64(at, Ordering::Acquire);
        if load(header::MAGIC) != MAGIC {
            return Err(LedgerError::BadFile("the magic number is missing"));
        }
        if load(header::VERSION) != VERSION || load(header::BLOCK_BYTES) != BLOCK_BYTES as u64 {
            return Err(LedgerError::BadFile("another version or block size"));
        }
        let count = usize::try_from(load(header::BLOCKS)).unwrap_or(usize::MAX);
        if count == 0 || count > MAX_BLOCKS || bytes(count) > arena.len() {
            return Err(LedgerError::BadFile("the number of blocks does not fit its length"));
        }
        if load(header::CHECKSUM) != checksum(&arena, count) {
            return Err(LedgerError::BadFile("the checksum of header and table is wrong"));
        }
        let guest = u32::try_from(load(header::GUEST)).map_err(|_| LedgerError::BadFile("the guest's number is too large"))?;
        let seed = load(header::SEED);
        let blocks: Vec<u64> = (0..count).map(|index| load(PAGE + index * 8)).collect();
        let sorted = sorted(&blocks)?;
        Ok(Self { arena, seed, guest, blocks, sorted, entries: entries_at(count) })
    }

    /// Seed of the blocks' filling.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The guest's number.
    #[must_use]
    pub fn guest(&self) -> u32 {
        self.guest
    }

    /// The guest's blocks, in the order of their indices.
    #[must_use]
    pub fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    /// The blocks with their indices, in ascending order of blocks.
    #[must_use]
    pub fn sorted(&self) -> &[(u64, u32)] {
        &self.sorted
    }

    fn entry(&self, index: usize) -> usize {
        assert!(index < self.blocks.len(), "no such block in the ledger");
        self.entries + index * 16
    }

    /// Number of the last write issued to the block with that index; 0 = none. Panics if there is no such index.
    #[inline]
    #[must_use]
    pub fn issued(&self, index: usize) -> u64 {
        self.arena.load64(self.entry(index), Ordering::Acquire)
    }

    /// Number of the last write to it that was acknowledged; 0 = none. Panics if there is no such index.
    #[inline]
    #[must_use]
    pub fn acked(&self, index: usize) -> u64 {
        self.arena.load64(self.entry(index) + 8, Ordering::Acquire)
    }

    /// Takes the next write's number for a block: recorded as issued when this returns. To be called by the guest alone.
    #[inline]
    pub fn issue(&self, index: usize, before: impl FnOnce(u64)) -> u64 {
        let seq = self.next_seq();
        before(seq);
        self.arena.store64(self.entry(index), seq, Ordering::Release);
        self.arena.store64(header::NEXT_SEQ, seq + 1, Ordering::Release);
        seq
    }

    /// Records a write as acknowledged, after its completion was seen. To be called by the guest alone.
    #[inline]
    pub fn acknowledge(&self, index: usize, seq: u64) {
        self.arena.store64(self.entry(index) + 8, seq, Ordering::Release);
        let count = self.arena.load64(header::ACKNOWLEDGED, Ordering::Relaxed);
        self.arena.store64(header::ACKNOWLEDGED, count + 1, Ordering::Release);
    }

    /// Number that the next write gets.
    #[inline]
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.arena.load64(header::NEXT_SEQ, Ordering::Acquire)
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.arena.load64(header::ACKNOWLEDGED, Ordering::Acquire)
    }

    /// Lowest number that was outstanding when the source was suspended; `None` while there was no switch-over. Only writes
    /// from here on can be in the destination without being in the source.
    #[must_use]
    pub fn suspend_floor(&self) -> Option<u64> {
        Some(self.arena.load64(header::SUSPEND_FLOOR, Ordering::Acquire)).filter(|floor| *floor != NONE)
    }

    /// Records the suspend floor; `None` when the switch-over was undone.
    pub fn set_suspend_floor(&self, floor: Option<u64>) {
        self.arena.store64(header::SUSPEND_FLOOR, floor.unwrap_or(NONE), Ordering::Release);
    }

    /// Makes sure of a suspend floor after a restart that found the destination as the owner, before any guest runs there. A
    /// process that died between the durable record and [`set_suspend_floor`](Self::set_suspend_floor) never let the destination
    /// run: every write that is acknowledged is at both sides, and what is not is what was outstanding when the source was
    /// suspended, or was never told of. So the lowest number that is issued and not acknowledged is the floor.
    pub fn recover_suspend_floor(&self) {
        if self.suspend_floor().is_none() {
            let open = (0..self.blocks.len()).map(|index| (self.acked(index), self.issued(index)));
            let lowest = open.filter(|(acked, issued)| issued > acked).map(|(_, issued)| issued).min();
            self.set_suspend_floor(Some(lowest.unwrap_or(u64::MAX).min(self.next_seq())));
        }
    }

    /// Number of the next write at the moment when the destination had resumed; `None` while it has not.
    #[must_use]
    pub fn resume_mark(&self) -> Option<u64> {
        Some(self.arena.load64(header::RESUME_MARK, Ordering::Acquire)).filter(|mark| *mark != NONE)
    }

    /// Records the moment of Resume; `None` when the switch-over was undone.
    pub fn set_resume_mark(&self, mark: Option<u64>) {
        self.arena.store64(header::RESUME_MARK, mark.unwrap_or(NONE), Ordering::Release);
    }
}

const fn entries_at(count: usize) -> usize {
    (PAGE + count * 8).next_multiple_of(16)
}

const fn bytes(count: usize) -> usize {
    (entries_at(count) + count * 16).next_multiple_of(PAGE)
}

fn checksum(arena: &Arena, count: usize) -> u64 {
    let words = (header::MAGIC..header::CHECKSUM).step_by(8).chain((0..count).map(|index| PAGE + index * 8));
    words.fold(0, |sum, at| mix(sum ^ arena.load64(at, Ordering::Relaxed)))
}

/// The table in ascending order; an error when it is empty, too long or names a block twice.
fn sorted(blocks: &[u64]) -> Result<Vec<(u64, u32)>, LedgerError> {
    if blocks.is_empty() || blocks.len() > MAX_BLOCKS {
        return Err(LedgerError::BadBlocks(format!("{} blocks; 1 to {MAX_BLOCKS} can be recorded", blocks.len())));
    }
    let mut sorted: Vec<(u64, u32)> = blocks.iter().copied().zip(0..).collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(LedgerError::BadBlocks(format!("block {} is there twice", pair[0].0))),
        None => Ok(sorted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    fn spec() -> LedgerSpec {
        LedgerSpec { seed: 5, guest: 2, blocks: vec![90, 10, 50] }
    }

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("dray-ledger-{name}-{}", std::process::id()))
    }

    #[test]
    fn another_reader_sees_what_was_recorded() {
        let path = path("seen");
        let ledger = Ledger::create(&path, &spec()).expect("ledger");
        assert_eq!((ledger.suspend_floor(), ledger.resume_mark()), (None, None));
        let mut told = 0;
        assert_eq!(ledger.issue(1, |seq| told = seq), 1);
        assert_eq!(told, 1, "told before it is recorded");
        ledger.acknowledge(1, 1);
        assert_eq!(ledger.issue(1, |_| {}), 2);
        ledger.set_suspend_floor(Some(2));
        // The mapping stays: what another process sees must not depend on an orderly end.
        let seen = Ledger::open(&path).expect("opened");
        assert_eq!((seen.issued(1), seen.acked(1), seen.issued(0)), (2, 1, 0));
        assert_eq!((seen.seed(), seen.guest(), seen.next_seq(), seen.acknowledged()), (5, 2, 3, 1));
        assert_eq!((seen.suspend_floor(), seen.blocks()), (Some(2), &[90, 10, 50][..]));
        assert_eq!(seen.sorted(), [(10, 1), (50, 2), (90, 0)]);
        std::fs::remove_file(path).expect("cleaning up");
    }

    #[test]
    fn a_ledger_goes_on_above_every_number_that_was_issued() {
        let path = path("resumed");
        let ledger = Ledger::create(&path, &spec()).expect("ledger");
        for index in [0, 1, 2, 1] {
            let seq = ledger.issue(index, |_| {});
            ledger.acknowledge(index, seq);
        }
        ledger.issue(2, |_| {});
        ledger.issue(0, |_| {});
        // Killed after the number was recorded as issued and before the next one was.
        ledger.arena.store64(header::NEXT_SEQ, 6, Ordering::Release);
        drop(ledger);
        let ledger = Ledger::resume(&path).expect("resumed");
        assert_eq!((ledger.next_seq(), ledger.acknowledged()), (7, 4));
        ledger.recover_suspend_floor();
        assert_eq!(ledger.suspend_floor(), Some(5), "the lowest that is issued and not acknowledged");
        ledger.set_suspend_floor(Some(3));
        ledger.recover_suspend_floor();
        assert_eq!(ledger.suspend_floor(), Some(3), "what was marked stays");
        assert_eq!(ledger.issue(1, |_| {}), 7);
        assert_eq!(Ledger::open(&path).expect("opened").issued(1), 7, "it is shared with the file");
        std::fs::remove_file(path).expect("cleaning up");
    }

    #[test]
    fn with_nothing_outstanding_the_floor_is_the_next_number() {
        let ledger = Ledger::in_memory(&spec()).expect("ledger");
        let seq = ledger.issue(1, |_| {});
        ledger.acknowledge(1, seq);
        ledger.recover_suspend_floor();
        assert_eq!(ledger.suspend_floor(), Some(2));
    }

    #[test]
    fn damaged_files_are_refused() {
        let path = path("damaged");
        drop(Ledger::create(&path, &spec()).expect("ledger"));
        let file = File::options().read(true).write(true).open(&path).expect("file");
        for at in [header::MAGIC, header::VERSION, header::SEED, header::GUEST, header::BLOCKS, PAGE, PAGE + 16] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at as u64).expect("read");
            file.write_all_at(&[byte[0] ^ 0x40], at as u64).expect("write");
            assert!(matches!(Ledger::open(&path), Err(LedgerError::BadFile(_))), "offset {at}");
            file.write_all_at(&byte, at as u64).expect("write");
        }
        Ledger::open(&path).expect("whole again");
        file.set_len(100).expect("shorten");
        assert!(matches!(Ledger::open(&path), Err(LedgerError::BadFile(_))));
        std::fs::remove_file(path).expect("cleaning up");
    }

    #[test]
    fn a_block_may_be_named_once() {
        for blocks in [vec![], vec![4, 8, 4]] {
            assert!(matches!(Ledger::in_memory(&LedgerSpec { blocks, ..spec() }), Err(LedgerError::BadBlocks(_))));
        }
    }
}
