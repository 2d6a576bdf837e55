//! PRP entries and lists (Base 2.3 §4.3.1), written straight into list memory that was set up at start.

use dray_device::memory::{Arena, PAGE};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const PAGE_BYTES: u64 = PAGE as u64;
/// Slots in a whole list page.
const SLOTS: u32 = (PAGE / 8) as u32;

/// Bytes of list memory that data of up to `max_transfer` bytes may need. A list of less than a page never crosses one, since
/// its size is a power of two and it is aligned to it; a longer one is whole pages, each but the last ending in a pointer.
pub(crate) fn list_bytes(max_transfer: usize) -> usize {
    let entries = max_transfer.div_ceil(PAGE).max(1);
    if entries <= SLOTS as usize {
        (entries * 8).next_power_of_two().max(64)
    } else {
        (entries - 1).div_ceil(SLOTS as usize - 1) * PAGE
    }
}

/// Why data cannot be described by PRPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrpError {
    /// The start is not dword-aligned, or a piece in the middle does not begin and end at page boundaries.
    Unaligned,
    /// More pages than the list memory holds.
    TooLong,
}

/// List memory of one command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListMemory<'a> {
    pub(crate) arena: &'a Arc<Arena>,
    pub(crate) offset: usize,
    pub(crate) iova: u64,
    pub(crate) bytes: usize,
}

/// Builds PRP1 and PRP2 from pieces of I/O virtual memory.
#[derive(Debug)]
pub(crate) struct PrpBuilder<'a> {
    list: ListMemory<'a>,
    prp1: u64,
    /// Where the data described so far ends.
    end: u64,
    started: bool,
    /// Page entries after PRP1.
    pages: u32,
    first: u64,
    last: u64,
    /// Bytes of list memory used, pointers included.
    used: usize,
}

impl<'a> PrpBuilder<'a> {
    pub(crate) fn new(list: ListMemory<'a>) -> Self {
        Self { list, prp1: 0, end: 0, started: false, pages: 0, first: 0, last: 0, used: 0 }
    }

    /// Appends a piece; `len` is not 0.
    pub(crate) fn push(&mut self, iova: u64, len: usize) -> Result<(), PrpError> {
        let mut at = iova;
        let end = iova + len as u64;
        if !self.started {
            if !iova.is_multiple_of(4) {
                return Err(PrpError::Unaligned);
            }
            (self.started, self.prp1) = (true, iova);
            at = (iova / PAGE_BYTES + 1) * PAGE_BYTES;
        } else if iova == self.end {
            at = iova.next_multiple_of(PAGE_BYTES);
        } else if !iova.is_multiple_of(PAGE_BYTES) || !self.end.is_multiple_of(PAGE_BYTES) {
            return Err(PrpError::Unaligned);
        }
        self.end = end;
        while at < end {
            self.page(at)?;
            at += PAGE_BYTES;
        }
        Ok(())
    }

    fn page(&mut self, address: u64) -> Result<(), PrpError> {
        if self.pages == 0 {
            self.first = address;
        }
        self.pages += 1;
        // A slot that ends a list page holds data only if the list ends there: what was put into it moves on when more comes.
        if self.used > 0 && self.used.is_multiple_of(PAGE) {
            if self.used + 16 > self.list.bytes {
                return Err(PrpError::TooLong);
            }
            let next_page = self.list.iova + self.used as u64;
            self.store(self.used - 8, next_page);
            self.store(self.used, self.last);
            self.used += 8;
        }
        if self.used + 8 > self.list.bytes {
            return Err(PrpError::TooLong);
        }
        self.store(self.used, address);
        self.used += 8;
        self.last = address;
        Ok(())
    }

    #[inline]
    fn store(&self, at: usize, value: u64) {
        // The doorbell's release store publishes the list together with the submission entry.
        self.list.arena.store64(self.list.offset + at, value, Ordering::Relaxed);
    }

    /// PRP1 and PRP2.
    pub(crate) fn finish(self) -> [u64; 2] {
        match self.pages {
            0 => [self.prp1, 0],
            1 => [self.prp1, self.first],
            _ => [self.prp1, self.list.iova],
        }
    }
}

/// Lists `pages` pages in a row from `first` on: the PRP list of a queue (Base 2.3 §5.2.4), which has every page in it. Pages
/// that the memory has no room for are left out.
pub(crate) fn write_list(list: ListMemory<'_>, first: u64, pages: usize) {
    let mut builder = PrpBuilder::new(list);
    for page in 0..pages as u64 {
        if builder.page(first + page * PAGE_BYTES).is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::memory::{DmaBuffer, Pages};
    use proptest::prelude::*;

    const LIST_IOVA: u64 = 0x7_0000_0000;

    /// The specification's rules, followed from the device's side: (address, bytes) of each chunk of `len` bytes.
    fn walk(list: &DmaBuffer, prps: [u64; 2], len: usize) -> Vec<(u64, usize)> {
        let first = (PAGE - (prps[0] % PAGE_BYTES) as usize).min(len);
        let mut chunks = vec![(prps[0], first)];
        let mut left = len - first;
        if left == 0 {
            return chunks;
        }
        if left <= PAGE {
            assert_eq!(prps[1] % PAGE_BYTES, 0, "PRP2 is a page");
            chunks.push((prps[1], left));
            return chunks;
        }
        assert_eq!(prps[1] % 8, 0);
        let mut at = prps[1];
        while left > 0 {
            let slot = list.arena().load64((at - LIST_IOVA) as usize, Ordering::Relaxed);
            assert_eq!(slot % PAGE_BYTES, 0, "entries have offset 0");
            if at % PAGE_BYTES == PAGE_BYTES - 8 && left > PAGE {
                at = slot;
                continue;
            }
            let chunk = left.min(PAGE);
            chunks.push((slot, chunk));
            left -= chunk;
            at += 8;
        }
        chunks
    }

    /// Neighbouring chunks as one.
    fn merged(chunks: &[(u64, usize)]) -> Vec<(u64, usize)> {
        let mut out: Vec<(u64, usize)> = Vec::new();
        for &(at, len) in chunks {
            match out.last_mut() {
                Some((start, total)) if *start + *total as u64 == at => *total += len,
                _ => out.push((at, len)),
            }
        }
        out
    }

    fn build(list: &DmaBuffer, bytes: usize, pieces: &[(u64, usize)]) -> Result<[u64; 2], PrpError> {
        let memory = ListMemory { arena: list.arena(), offset: 0, iova: LIST_IOVA, bytes };
        let mut builder = PrpBuilder::new(memory);
        for &(iova, len) in pieces {
            builder.push(iova, len)?;
        }
        Ok(builder.finish())
    }

    proptest! {
        #[test]
        fn a_device_finds_the_data(
            head in 0usize..1024, pages in prop::collection::vec((0u64..4096, 1usize..300), 1..8), tail in 1usize..1024,
        ) {
            let list = DmaBuffer::allocate("list", 8 * PAGE, Pages::Small).expect("memory");
            let mut pieces: Vec<_> = pages
                .iter()
                .enumerate()
                .map(|(i, &(page, count))| (((i as u64) << 40) + (page << 12), count * PAGE))
                .collect();
            // Any dword-aligned start, any dword-multiple end.
            pieces[0].0 += head as u64 * 4;
            pieces[0].1 -= head * 4;
            let last = pieces.len() - 1;
            pieces[last].1 -= (tail * 4) % pieces[last].1.min(PAGE);
            let len: usize = pieces.iter().map(|p| p.1).sum();
            let bytes = list_bytes(len + PAGE);
            let prps = build(&list, bytes, &pieces).expect("describable");
            prop_assert_eq!(merged(&walk(&list, prps, len)), merged(&pieces));
        }
    }

    #[test]
    fn list_memory_is_enough_for_every_length_at_every_offset() {
        let list = DmaBuffer::allocate("list", 4 * PAGE, Pages::Small).expect("memory");
        for pages in [1, 2, 3, 511, 512, 513, 1023, 1024, 1025] {
            for offset in [0u64, 4, 4092] {
                let len = pages * PAGE;
                let prps = build(&list, list_bytes(len), &[((1 << 40) + offset, len)]).expect("fits");
                assert_eq!(merged(&walk(&list, prps, len)), [((1 << 40) + offset, len)]);
            }
        }
    }

    #[test]
    fn what_prps_cannot_say_is_refused() {
        let list = DmaBuffer::allocate("list", PAGE, Pages::Small).expect("memory");
        assert_eq!(build(&list, PAGE, &[(0x1002, 512)]), Err(PrpError::Unaligned));
        assert_eq!(build(&list, PAGE, &[(0x1000, 512), (0x3000, 512)]), Err(PrpError::Unaligned));
        assert_eq!(build(&list, PAGE, &[(0x1000, PAGE), (0x3200, 512)]), Err(PrpError::Unaligned));
        assert!(build(&list, PAGE, &[(0x1000, 512), (0x1200, 512)]).is_ok(), "one after the other");
        assert_eq!(build(&list, 64, &[(0x1000, 64 * PAGE)]), Err(PrpError::TooLong));
    }
}
