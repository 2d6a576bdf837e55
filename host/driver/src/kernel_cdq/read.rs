//! Entries that are read from the kernel, and kept until they are given back.

use super::KernelGone;
use crate::cdq::CdqFormat;
use dray_device::kernel_cdq::EntryReader;
use rustix::io::Errno;

/// Most entries of one read.
const MOST_ENTRIES: usize = 1024;

/// What was read, oldest first.
pub(super) struct ReadEntries {
    /// Until the queue is deleted, which closing it does.
    reader: Option<Box<dyn EntryReader>>,
    slots: u32,
    format: CdqFormat,
    kept: Vec<u8>,
    /// Of those kept, the entries that the consumer has.
    taken: usize,
    /// The place of the next entry, counted without end: the phase tag flips with every pass.
    place: u64,
}

impl ReadEntries {
    pub(super) fn new(reader: Box<dyn EntryReader>, slots: u32, format: CdqFormat) -> Self {
        let kept = Vec::with_capacity(slots as usize * format.entry_bytes as usize);
        Self { reader: Some(reader), slots, format, kept, taken: 0, place: 0 }
    }

    fn bytes(&self) -> usize {
        self.format.entry_bytes as usize
    }

    fn count(&self) -> usize {
        self.kept.len() / self.bytes()
    }

    /// Reads as much as there is room for, a bounded amount at a time.
    pub(super) fn look(&mut self) -> Result<(), KernelGone> {
        let room = (self.slots as usize - self.count()).min(MOST_ENTRIES);
        let Some(reader) = self.reader.as_mut().filter(|_| room > 0) else { return Ok(()) };
        let (before, bytes) = (self.kept.len(), self.format.entry_bytes as usize);
        self.kept.resize(before + room * bytes, 0);
        // Each place gets the phase tag that says "not new": what the kernel has really copied is seen by its tag, whatever it
        // returns. (The first version of the first series leaves out of its count what it copied behind the ring's end.)
        for at in 0..room {
            let tag = before + at * bytes + self.format.phase_byte as usize;
            self.kept[tag] = if is_set(self.place + at as u64, self.slots) { 0 } else { self.format.phase_mask };
        }
        let read = reader.read(&mut self.kept[before..]);
        let outcome = self.judge(before, room, read);
        let new = *outcome.as_ref().unwrap_or(&0);
        self.kept.truncate(before + new * bytes);
        self.place += new as u64;
        outcome.map(drop)
    }

    /// How many entries came.
    fn judge(&self, before: usize, room: usize, read: std::io::Result<usize>) -> Result<usize, KernelGone> {
        let bytes = self.bytes();
        let told = match read {
            Ok(told) => told,
            Err(error) => {
                return match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN | Errno::INTR) => Ok(0),
                    errno => Err(KernelGone::Kernel(errno.unwrap_or(Errno::IO))),
                };
            }
        };
        if told > room * bytes {
            return Err(KernelGone::Nonsense("it says that it copied more than there was room for"));
        }
        if !told.is_multiple_of(bytes) {
            return Err(KernelGone::Nonsense("a part of an entry"));
        }
        let is_new = |at: &usize| {
            let tag = self.kept[before + at * bytes + self.format.phase_byte as usize] & self.format.phase_mask != 0;
            tag == is_set(self.place + *at as u64, self.slots)
        };
        let copied = (0..room).take_while(is_new).count();
        if told / bytes > copied {
            return Err(KernelGone::Nonsense("an entry without the phase tag of its place"));
        }
        Ok(copied)
    }

    pub(super) fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        let (bytes, count) = (self.bytes(), (self.count() - self.taken).min(max));
        into.extend_from_slice(&self.kept[self.taken * bytes..(self.taken + count) * bytes]);
        self.taken += count;
        count
    }

    pub(super) fn waiting(&self) -> u32 {
        (self.count() - self.taken) as u32
    }

    pub(super) fn taken(&self) -> u32 {
        self.taken as u32
    }

    pub(super) fn rewind(&mut self, entries: u32) {
        self.taken -= (entries as usize).min(self.taken);
    }

    pub(super) fn give_back(&mut self, entries: u32) -> bool {
        let entries = entries as usize;
        if entries > self.taken {
            return false;
        }
        self.kept.drain(..entries * self.bytes());
        self.taken -= entries;
        true
    }

    /// Closes the descriptor, which deletes the queue.
    pub(super) fn close(&mut self) {
        self.reader = None;
    }
}

/// The phase tag of a new entry at a place.
fn is_set(place: u64, slots: u32) -> bool {
    (place / u64::from(slots)).is_multiple_of(2)
}
