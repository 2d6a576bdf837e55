//! A PCI function as its owner sees it: registers, doorbells, memory, event lines. The same driver runs over every backing.

use crate::event::EventLine;
use crate::memory::Arena;
use crate::space::AddressSpace;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A function that a driver may drive.
pub trait Function: Send + Sync + Debug {
    /// Reads a 32-bit register of BAR0. A function that has gone reads all ones.
    fn read32(&self, offset: u32) -> u32;
    /// Writes a 32-bit register of BAR0.
    fn write32(&self, offset: u32, value: u32);

    /// Reads a 64-bit register, low half first.
    fn read64(&self, offset: u32) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    /// Writes a 64-bit register, low half first.
    fn write64(&self, offset: u32, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    /// The doorbell at that offset of BAR0; `None` outside the doorbells that exist.
    fn doorbell(&self, offset: u32) -> Option<Doorbell>;

    /// The space whose addresses the function takes.
    fn space(&self) -> &AddressSpace;

    /// The line of an interrupt vector; `None` where the function has no such vector.
    fn event_line(&self, vector: u16) -> Option<EventLine>;

    /// A function-level reset.
    ///
    /// # Errors
    /// When the function cannot be reset.
    fn reset(&self) -> std::io::Result<()>;
}

/// A doorbell: a word of mapped memory, or a register write where there is none.
#[derive(Clone, Debug)]
pub enum Doorbell {
    /// In mapped memory: ringing it is one store.
    Mapped {
        /// The BAR's memory.
        arena: Arc<Arena>,
        /// The doorbell's offset in it.
        offset: usize,
    },
    /// Through a register write.
    Trapped {
        /// The function.
        function: Arc<dyn Function>,
        /// The doorbell's offset in BAR0.
        offset: u32,
    },
}

impl Doorbell {
    /// Writes the doorbell. Everything stored before is visible to the device when it sees the value.
    #[inline]
    pub fn ring(&self, value: u32) {
        match self {
            Self::Mapped { arena, offset } => arena.store32(*offset, value, Ordering::Release),
            Self::Trapped { function, offset } => function.write32(*offset, value),
        }
    }
}
