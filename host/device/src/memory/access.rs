//! Accesses to an arena's memory: atomics of the machine's word sizes, and raw copies.

use super::Arena;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

impl Arena {
    /// The byte at `offset`.
    #[inline]
    #[must_use]
    pub fn load8(&self, offset: usize, order: Ordering) -> u8 {
        // SAFETY: in bounds; memory shared with others is accessed as an atomic.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }.load(order)
    }

    /// The 16-bit word at `offset`, which must be aligned.
    #[inline]
    #[must_use]
    pub fn load16(&self, offset: usize, order: Ordering) -> u16 {
        assert!(offset.is_multiple_of(2), "unaligned access");
        // SAFETY: in bounds and aligned (mappings start at a page).
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }.load(order)
    }

    /// The 32-bit word at `offset`, which must be aligned.
    #[inline]
    #[must_use]
    pub fn load32(&self, offset: usize, order: Ordering) -> u32 {
        assert!(offset.is_multiple_of(4), "unaligned access");
        // SAFETY: in bounds and aligned (mappings start at a page).
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }.load(order)
    }

    /// The 64-bit word at `offset`, which must be aligned.
    #[inline]
    #[must_use]
    pub fn load64(&self, offset: usize, order: Ordering) -> u64 {
        assert!(offset.is_multiple_of(8), "unaligned access");
        // SAFETY: in bounds and aligned (mappings start at a page).
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }.load(order)
    }

    /// Stores a byte.
    #[inline]
    pub fn store8(&self, offset: usize, value: u8, order: Ordering) {
        // SAFETY: in bounds; memory shared with others is accessed as an atomic.
        unsafe { AtomicU8::from_ptr(self.at_for_write(offset, 1)) }.store(value, order);
    }

    /// Stores a 32-bit word at an aligned offset.
    #[inline]
    pub fn store32(&self, offset: usize, value: u32, order: Ordering) {
        assert!(offset.is_multiple_of(4), "unaligned access");
        // SAFETY: in bounds and aligned.
        unsafe { AtomicU32::from_ptr(self.at_for_write(offset, 4).cast()) }.store(value, order);
    }

    /// Stores a 64-bit word at an aligned offset.
    #[inline]
    pub fn store64(&self, offset: usize, value: u64, order: Ordering) {
        assert!(offset.is_multiple_of(8), "unaligned access");
        // SAFETY: in bounds and aligned.
        unsafe { AtomicU64::from_ptr(self.at_for_write(offset, 8).cast()) }.store(value, order);
    }

    /// Exchanges a 32-bit word at an aligned offset and returns the old one.
    #[inline]
    pub fn swap32(&self, offset: usize, value: u32) -> u32 {
        assert!(offset.is_multiple_of(4), "unaligned access");
        // SAFETY: in bounds and aligned.
        unsafe { AtomicU32::from_ptr(self.at_for_write(offset, 4).cast()) }.swap(value, Ordering::SeqCst)
    }

    /// Sets (`set`) and then clears (`clear`) bits of a 32-bit word.
    pub fn mask32(&self, offset: usize, set: u32, clear: u32) {
        assert!(offset.is_multiple_of(4), "unaligned access");
        // SAFETY: in bounds and aligned.
        let word = unsafe { AtomicU32::from_ptr(self.at_for_write(offset, 4).cast()) };
        word.fetch_or(set, Ordering::SeqCst);
        word.fetch_and(!clear, Ordering::SeqCst);
    }

    /// Copies bytes out. Bytes that another side writes meanwhile may come old or new, each by itself.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: source in bounds; the destination is ours alone and cannot lie in an arena (no references into arenas exist).
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies `len` bytes out to the end of a vector, which is not filled with anything else before. Without room reserved in
    /// `into` this allocates. Otherwise as [`read`](Self::read).
    #[inline]
    pub fn read_append(&self, offset: usize, len: usize, into: &mut Vec<u8>) {
        let from = self.at(offset, len);
        into.reserve(len);
        let used = into.len();
        // SAFETY: source in bounds; the destination has room for `len` bytes behind those in use, is ours alone and cannot lie in
        // an arena. After the copy those bytes are initialised.
        unsafe {
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr().add(used), len);
            into.set_len(used + len);
        }
    }

    /// Copies bytes in.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        let into = self.at_for_write(offset, from.len());
        // SAFETY: destination in bounds; the source is an ordinary reference and cannot lie in an arena.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) }
    }

    /// A range as a piece of a gathered send, so that the kernel copies it from where it is. Nothing may write the range while
    /// the piece is alive: whoever asks owns the buffer, and knows that the command that filled it has completed.
    #[inline]
    #[must_use]
    pub fn io_slice(&self, offset: usize, len: usize) -> std::io::IoSlice<'_> {
        let from = self.at(offset, len);
        // SAFETY: in bounds and mapped for as long as the arena is borrowed; a byte has no invalid value. The piece goes to the
        // kernel, which reads it as raw memory: bytes that another process changes meanwhile go out old or new, each by itself.
        std::io::IoSlice::new(unsafe { std::slice::from_raw_parts(from, len) })
    }

    /// Sets `len` bytes.
    #[inline]
    pub fn fill(&self, offset: usize, len: usize, byte: u8) {
        let into = self.at_for_write(offset, len);
        // SAFETY: in bounds.
        unsafe { std::ptr::write_bytes(into, byte, len) }
    }

    /// Copies between arenas (or within one; ranges may overlap).
    #[inline]
    pub fn copy(from: &Self, from_offset: usize, into: &Self, into_offset: usize, len: usize) {
        let source = from.at(from_offset, len);
        let target = into.at_for_write(into_offset, len);
        // SAFETY: both in bounds; `copy` allows overlap.
        unsafe { std::ptr::copy(source, target, len) }
    }

    /// Whether `len` bytes are all zero.
    #[must_use]
    pub fn is_zero(&self, offset: usize, len: usize) -> bool {
        crate::scan::is_zero(self.at(offset, len), len)
    }

    /// Compares `len` bytes of two arenas.
    #[must_use]
    pub fn equal(left: &Self, left_offset: usize, right: &Self, right_offset: usize, len: usize) -> bool {
        crate::scan::equal(left.at(left_offset, len), right.at(right_offset, len), len)
    }

    /// Asks the processor to fetch the line at `offset`; outside the arena it does nothing.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        if offset < self.len {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint within the mapping; it reads nothing.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(self.base.as_ptr().add(offset).cast());
            }
        }
    }

    /// As [`prefetch`](Self::prefetch), of a line that is about to be written: others lose it.
    #[inline]
    pub fn prefetch_for_write(&self, offset: usize) {
        if offset < self.len {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint within the mapping; it neither reads nor writes.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(self.base.as_ptr().add(offset).cast());
            }
        }
    }
}
