//! BAR0 of a function that lives in shared memory: the registers and doorbells of `dray-nvme::registers`.
//!
//! The guest's accesses come through [`Bar::guest_write`] and [`Bar::guest_read`], or straight to memory where a client has the
//! page mapped; the controller polls. A fall of CC.EN that is followed by a rise before the controller looks would be lost in
//! plain memory, so falls are counted. CC and the count are two words: a controller that saw a fall before its count would take
//! the count for a second fall, and reset a controller that the guest has meanwhile enabled again. So a change is written, and
//! a change once noticed is read, under a lock; looking whether there is one costs two loads.

use crate::memory::{Arena, MemoryError, PAGE, Pages};
use crate::sync::{AtomicU32, Mutex, MutexGuard};
use dray_nvme::registers::offset;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// Bytes of BAR0: a page of registers, a page of doorbells, and two that read zero: clients expect 16 KiB at least.
pub const BAR_BYTES: usize = 4 * PAGE;
/// Where the doorbells end: those of 512 queue pairs at stride 0.
pub const DOORBELLS_END: u32 = offset::DOORBELLS + PAGE as u32;
/// Bytes of [`Bar::save`].
pub const SAVED_BYTES: usize = 32 + PAGE;

const CC_EN: u32 = 1;

/// BAR0 as memory.
#[derive(Debug)]
pub struct Bar {
    arena: Arc<Arena>,
    resets: AtomicU32,
    /// Held while CC and the count change together.
    changing: Mutex<()>,
}

/// CC, and how often CC.EN had fallen before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// As [`Bar::resets`].
    pub resets: u32,
    /// Controller Configuration (Base 2.3 §3.1.4.5).
    pub cc: u32,
}

impl Bar {
    /// A BAR of zeroes.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new() -> Result<Self, MemoryError> {
        let arena = Arena::new("dray-bar", BAR_BYTES, Pages::Small)?;
        // Clients get the descriptor: none of them may seal it against the next one.
        let _only_a_guard = rustix::fs::fcntl_add_seals(&*arena, rustix::fs::SealFlags::SEAL);
        Ok(Self { arena, resets: AtomicU32::new(0), changing: Mutex::new(()) })
    }

    /// The memory, to share by descriptor.
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// How often the guest has cleared CC.EN, or the function was reset.
    #[inline]
    #[must_use]
    pub fn resets(&self) -> u32 {
        self.resets.load(Ordering::Acquire)
    }

    /// CC and the count of falls, if they are not what `seen` says. Costs two loads when nothing changed.
    #[inline]
    #[must_use]
    pub fn control_if_changed(&self, seen: Control) -> Option<Control> {
        (self.control() != seen).then(|| self.control_at_rest()).filter(|&now| now != seen)
    }

    fn control(&self) -> Control {
        Control { resets: self.resets(), cc: self.load32(offset::CC) }
    }

    /// CC and the count of falls, as they are together.
    #[cold]
    #[must_use]
    pub fn control_at_rest(&self) -> Control {
        let _rest = self.change();
        self.control()
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A function-level reset: what clearing CC.EN does, and CC itself, AQA, ASQ, ACQ and the interrupt masks back to
    /// zero.
    pub fn function_reset(&self) {
        let _change = self.change();
        for register in [offset::CC, offset::AQA, offset::INTMS, offset::INTMC] {
            self.store32(register, 0);
        }
        self.store64(offset::ASQ, 0);
        self.store64(offset::ACQ, 0);
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// What the guest has written: registers and doorbells, and how often it has reset the controller. For whoever continues the
    /// function in another process.
    #[must_use]
    pub fn save(&self) -> [u8; SAVED_BYTES] {
        let mut saved = [0; SAVED_BYTES];
        let _rest = self.change();
        let words = [self.resets(), self.load32(offset::CC), self.load32(offset::AQA), self.load32(offset::INTMS)];
        for (into, word) in saved.chunks_exact_mut(4).zip(words) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        saved[16..24].copy_from_slice(&self.load64(offset::ASQ).to_le_bytes());
        saved[24..32].copy_from_slice(&self.load64(offset::ACQ).to_le_bytes());
        self.arena.read(offset::DOORBELLS as usize, &mut saved[32..]);
        saved
    }

    /// Takes over what another function's guest has written. The controller behind this one is suspended, and knows of it.
    pub fn restore(&self, saved: &[u8; SAVED_BYTES]) {
        let word = |at: usize| u32::from_le_bytes([saved[at], saved[at + 1], saved[at + 2], saved[at + 3]]);
        let _change = self.change();
        self.arena.write(offset::DOORBELLS as usize, &saved[32..]);
        self.store32(offset::AQA, word(8));
        self.store32(offset::INTMS, word(12));
        self.store32(offset::INTMC, word(12));
        for (register, at) in [(offset::ASQ, 16), (offset::ASQ + 4, 20), (offset::ACQ, 24), (offset::ACQ + 4, 28)] {
            self.store32(register, word(at));
        }
        self.store32(offset::CC, word(4));
        self.resets.store(word(0), Ordering::Release);
    }

    /// A write of 4 or 8 bytes as the guest makes it. Writes to read-only registers, of other sizes or unaligned change nothing.
    pub fn guest_write(&self, at: u32, bytes: &[u8]) {
        match <[u8; 4]>::try_from(bytes) {
            Ok(word) => self.guest_write32(at, u32::from_le_bytes(word)),
            Err(_) => {
                if let Ok(words) = <[u8; 8]>::try_from(bytes) {
                    let value = u64::from_le_bytes(words);
                    self.guest_write32(at, value as u32);
                    self.guest_write32(at.saturating_add(4), (value >> 32) as u32);
                }
            }
        }
    }

    /// A 4-byte write as the guest makes it.
    #[inline]
    pub fn guest_write32(&self, at: u32, value: u32) {
        if !at.is_multiple_of(4) || at >= DOORBELLS_END {
            return;
        }
        match at {
            offset::DOORBELLS.. => self.arena.store32(at as usize, value, Ordering::Release),
            offset::CC => {
                let _change = self.change();
                let old = self.arena.swap32(at as usize, value);
                if old & CC_EN != 0 && value & CC_EN == 0 {
                    self.resets.fetch_add(1, Ordering::AcqRel);
                }
            }
            offset::INTMS => self.mask_interrupts(value, 0),
            offset::INTMC => self.mask_interrupts(0, value),
            offset::AQA => self.store32(at, value),
            _ if (offset::ASQ..offset::ACQ + 8).contains(&at) => self.store32(at, value),
            _ => {}
        }
    }

    /// Every interrupt vector unmasked, as after a controller reset.
    pub fn unmask_interrupts(&self) {
        self.mask_interrupts(0, u32::MAX);
    }

    fn mask_interrupts(&self, set: u32, clear: u32) {
        self.arena.mask32(offset::INTMS as usize, set, clear);
        self.arena.mask32(offset::INTMC as usize, set, clear);
    }

    /// A 4-byte read as the guest makes it; doorbells and what lies outside read 0.
    #[must_use]
    pub fn guest_read32(&self, at: u32) -> u32 {
        let register = at < offset::DOORBELLS && at.is_multiple_of(4);
        if register { self.arena.load32(at as usize, Ordering::Acquire) } else { 0 }
    }

    /// A register as the controller sees it.
    #[inline]
    #[must_use]
    pub fn load32(&self, at: u32) -> u32 {
        self.arena.load32(at as usize, Ordering::Acquire)
    }

    /// A 64-bit register as the controller sees it.
    #[inline]
    #[must_use]
    pub fn load64(&self, at: u32) -> u64 {
        self.arena.load64(at as usize, Ordering::Acquire)
    }

    /// The controller publishes a register.
    #[inline]
    pub fn store32(&self, at: u32, value: u32) {
        self.arena.store32(at as usize, value, Ordering::Release);
    }

    /// The controller publishes a 64-bit register.
    #[inline]
    pub fn store64(&self, at: u32, value: u64) {
        self.arena.store64(at as usize, value, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fall_of_enable_is_counted_however_quick() {
        let bar = Bar::new().expect("bar");
        bar.guest_write32(offset::CC, 1);
        bar.guest_write32(offset::CC, 0);
        bar.guest_write32(offset::CC, 1);
        assert_eq!((bar.resets(), bar.load32(offset::CC)), (1, 1));
        bar.function_reset();
        assert_eq!((bar.resets(), bar.load32(offset::CC)), (2, 0));
    }

    #[test]
    fn halves_in_either_order_make_a_whole() {
        let bar = Bar::new().expect("bar");
        bar.guest_write32(offset::ASQ + 4, 0x12);
        bar.guest_write32(offset::ASQ, 0x3400_0000);
        assert_eq!(bar.load64(offset::ASQ), 0x12_3400_0000);
        bar.guest_write(offset::ACQ, &0x56_7800_0000u64.to_le_bytes());
        assert_eq!(bar.load64(offset::ACQ), 0x56_7800_0000);
    }

    #[test]
    fn read_only_unaligned_and_outside_writes_change_nothing() {
        let bar = Bar::new().expect("bar");
        bar.store64(offset::CAP, 0x1122);
        for at in [offset::CAP, offset::CSTS, offset::CC + 1, DOORBELLS_END, BAR_BYTES as u32, u32::MAX - 3, u32::MAX] {
            bar.guest_write32(at, !0);
        }
        bar.guest_write(offset::CC, &[1, 2]);
        bar.guest_write(u32::MAX - 3, &[255; 8]);
        assert_eq!((bar.load64(offset::CAP), bar.load32(offset::CSTS), bar.load32(offset::CC)), (0x1122, 0, 0));
        assert_eq!(bar.guest_read32(offset::DOORBELLS), 0);
        assert!(bar.arena().is_zero(DOORBELLS_END as usize, BAR_BYTES - DOORBELLS_END as usize));
    }

    #[test]
    fn what_the_guest_wrote_goes_on_elsewhere() {
        let (here, there) = (Bar::new().expect("bar"), Bar::new().expect("bar"));
        here.store32(offset::CSTS, 1);
        for (at, value) in [(offset::AQA, 7), (offset::ASQ, 0x1000), (offset::ACQ + 4, 9), (offset::INTMS, 2), (0x1ffc, 3)] {
            here.guest_write32(at, value);
        }
        here.guest_write32(offset::CC, 1);
        here.guest_write32(offset::CC, 0);
        here.guest_write32(offset::CC, 1);
        there.restore(&here.save());
        assert_eq!(there.save(), here.save());
        assert_eq!((there.resets(), there.load32(offset::CC), there.load64(offset::ACQ)), (1, 1, 9 << 32));
        assert_eq!((there.load32(0x1ffc), there.load32(offset::INTMC), there.load32(offset::CSTS)), (3, 2, 0));
    }

    #[test]
    fn interrupt_masks_set_and_clear_and_read_alike() {
        let bar = Bar::new().expect("bar");
        bar.guest_write32(offset::INTMS, 0b1011);
        bar.guest_write32(offset::INTMC, 0b0010);
        assert_eq!((bar.guest_read32(offset::INTMS), bar.guest_read32(offset::INTMC)), (0b1001, 0b1001));
    }
}
