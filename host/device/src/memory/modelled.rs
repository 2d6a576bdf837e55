//! An arena's memory as loom sees it: a modelled atomic for each 32-bit word that is used. The rings, registers and doorbells
//! above it are the code that runs elsewhere too, and only the lowest accesses differ.
//!
//! It promises less than the machine does, never more: a 64-bit access is two of 32 bits, low half first, each of the same
//! ordering; a copy is a relaxed access for each word. What holds here holds for whole words too.
//!
//! A word is made when it is first used, and loom wants that to happen before another thread uses it: whoever builds a model
//! [touches](Arena::touch) what its threads share.

use super::Arena;
use loom::sync::atomic::AtomicU32;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

const WORD: usize = 4;

/// The words used so far, by their place.
#[derive(Debug, Default)]
pub(super) struct Cells {
    words: Mutex<HashMap<usize, Arc<AtomicU32>>>,
}

impl Cells {
    fn word(&self, index: usize) -> Arc<AtomicU32> {
        // Loom's threads take turns on one thread and none of them waits here: the lock is free.
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(words.entry(index).or_insert_with(|| Arc::new(AtomicU32::new(0))))
    }
}

impl Arena {
    /// Makes the words of a range, for a model whose threads will use them.
    pub fn touch(&self, offset: usize, len: usize) {
        let _inside = self.at(offset, len);
        (offset / WORD..(offset + len).div_ceil(WORD)).for_each(|index| drop(self.cells.word(index)));
    }

    /// The word that holds `len` aligned bytes, and how far they are shifted in it.
    fn cell(&self, offset: usize, len: usize) -> (Arc<AtomicU32>, usize) {
        assert!(offset.is_multiple_of(len), "unaligned access");
        let _inside = self.at(offset, len);
        (self.cells.word(offset / WORD), offset % WORD * 8)
    }

    fn cell_for_write(&self, offset: usize, len: usize) -> (Arc<AtomicU32>, usize) {
        assert!(self.writable, "write to read-only memory");
        self.cell(offset, len)
    }

    /// The byte at `offset`.
    #[must_use]
    pub fn load8(&self, offset: usize, order: Ordering) -> u8 {
        let (word, shift) = self.cell(offset, 1);
        (word.load(order) >> shift) as u8
    }

    /// The 16-bit word at `offset`, which must be aligned.
    #[must_use]
    pub fn load16(&self, offset: usize, order: Ordering) -> u16 {
        let (word, shift) = self.cell(offset, 2);
        (word.load(order) >> shift) as u16
    }

    /// The 32-bit word at `offset`, which must be aligned.
    #[must_use]
    pub fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.cell(offset, 4).0.load(order)
    }

    /// The 64-bit word at `offset`, which must be aligned, by halves.
    #[must_use]
    pub fn load64(&self, offset: usize, order: Ordering) -> u64 {
        assert!(offset.is_multiple_of(8), "unaligned access");
        let low = self.load32(offset, order);
        u64::from(low) | u64::from(self.load32(offset + WORD, order)) << 32
    }

    /// Stores a byte.
    pub fn store8(&self, offset: usize, value: u8, order: Ordering) {
        let (word, shift) = self.cell_for_write(offset, 1);
        let kept = !(0xff << shift);
        let _never_refused =
            word.fetch_update(order, Ordering::Relaxed, |old| Some(old & kept | u32::from(value) << shift));
    }

    /// Stores a 32-bit word at an aligned offset.
    pub fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.cell_for_write(offset, 4).0.store(value, order);
    }

    /// Stores a 64-bit word at an aligned offset, by halves.
    pub fn store64(&self, offset: usize, value: u64, order: Ordering) {
        assert!(offset.is_multiple_of(8), "unaligned access");
        self.store32(offset, value as u32, order);
        self.store32(offset + WORD, (value >> 32) as u32, order);
    }

    /// Exchanges a 32-bit word at an aligned offset and returns the old one.
    pub fn swap32(&self, offset: usize, value: u32) -> u32 {
        self.cell_for_write(offset, 4).0.swap(value, Ordering::SeqCst)
    }

    /// Sets (`set`) and then clears (`clear`) bits of a 32-bit word.
    pub fn mask32(&self, offset: usize, set: u32, clear: u32) {
        let word = self.cell_for_write(offset, 4).0;
        word.fetch_or(set, Ordering::SeqCst);
        word.fetch_and(!clear, Ordering::SeqCst);
    }

    /// Copies bytes out. Bytes that another side writes meanwhile may come old or new, each word by itself.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let _inside = self.at(offset, into.len());
        let mut done = 0;
        while done < into.len() {
            let (index, skip) = ((offset + done) / WORD, (offset + done) % WORD);
            let bytes = self.cells.word(index).load(Ordering::Relaxed).to_le_bytes();
            let count = (WORD - skip).min(into.len() - done);
            into[done..done + count].copy_from_slice(&bytes[skip..skip + count]);
            done += count;
        }
    }

    /// Copies `len` bytes out to the end of a vector.
    pub fn read_append(&self, offset: usize, len: usize, into: &mut Vec<u8>) {
        let used = into.len();
        into.resize(used + len, 0);
        self.read(offset, &mut into[used..]);
    }

    /// Copies bytes in: whole words where they are whole, bytes at the ends.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let _inside = self.at_for_write(offset, from.len());
        let mut done = 0;
        while done < from.len() {
            let at = offset + done;
            match from.get(done..done + WORD).and_then(|bytes| <[u8; WORD]>::try_from(bytes).ok()) {
                Some(bytes) if at.is_multiple_of(WORD) => {
                    self.store32(at, u32::from_le_bytes(bytes), Ordering::Relaxed);
                    done += WORD;
                }
                _ => {
                    self.store8(at, from[done], Ordering::Relaxed);
                    done += 1;
                }
            }
        }
    }

    /// Sets `len` bytes.
    pub fn fill(&self, offset: usize, len: usize, byte: u8) {
        self.write(offset, &vec![byte; len]);
    }

    /// Copies between arenas (or within one; ranges may overlap).
    pub fn copy(from: &Self, from_offset: usize, into: &Self, into_offset: usize, len: usize) {
        let mut bytes = vec![0; len];
        from.read(from_offset, &mut bytes);
        into.write(into_offset, &bytes);
    }

    /// Whether `len` bytes are all zero.
    #[must_use]
    pub fn is_zero(&self, offset: usize, len: usize) -> bool {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes.iter().all(|&byte| byte == 0)
    }

    /// Compares `len` bytes of two arenas.
    #[must_use]
    pub fn equal(left: &Self, left_offset: usize, right: &Self, right_offset: usize, len: usize) -> bool {
        let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
        left.read(left_offset, &mut ours);
        right.read(right_offset, &mut theirs);
        ours == theirs
    }

    /// No hint is needed here.
    pub fn prefetch(&self, _offset: usize) {}

    /// Nothing here.
    pub fn prefetch_for_write(&self, _offset: usize) {}
}
