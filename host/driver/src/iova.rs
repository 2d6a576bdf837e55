//! Where segments are for the device: I/O virtual addresses, remembered per mapping so that the hot path only compares.

use dray_device::memory::{Arena, Segment};
use dray_device::space::AddressSpace;
use std::sync::Arc;

/// Mappings remembered. Two would do for a copy (source and destination buffers); guests have a few arenas.
const REMEMBERED: usize = 4;

/// One mapping as the cache sees it. It stays true while the space's generation does: until then the space itself holds the
/// arena, so that its address cannot become another arena's.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// The arena's address, 0 = none. Compared, never followed.
    arena: usize,
    from: usize,
    to: usize,
    iova: u64,
}

impl Known {
    #[inline]
    fn holds(&self, arena: usize, segment: &Segment<'_>) -> bool {
        self.arena == arena && segment.offset() >= self.from && segment.offset() + segment.len() <= self.to
    }

    #[inline]
    fn address(&self, segment: &Segment<'_>) -> u64 {
        self.iova + (segment.offset() - self.from) as u64
    }
}

/// The cache over one space.
#[derive(Debug)]
pub(crate) struct IovaCache {
    space: AddressSpace,
    generation: u64,
    known: [Known; REMEMBERED],
    next: usize,
}

impl IovaCache {
    pub(crate) fn new(space: &AddressSpace) -> Self {
        Self { space: space.clone(), generation: space.generation(), known: [Known::default(); REMEMBERED], next: 0 }
    }

    /// The I/O virtual address of a segment; `None` where it is not mapped as a whole.
    #[inline]
    pub(crate) fn locate(&mut self, segment: &Segment<'_>) -> Option<u64> {
        let arena = Arc::as_ptr(segment.arena()) as usize;
        if self.space.generation() == self.generation {
            if self.known[0].holds(arena, segment) {
                return Some(self.known[0].address(segment));
            }
            if let Some(known) = self.known[1..].iter().find(|known| known.holds(arena, segment)) {
                return Some(known.address(segment));
            }
        }
        self.look_up(arena, segment)
    }

    #[cold]
    fn look_up(&mut self, arena: usize, segment: &Segment<'_>) -> Option<u64> {
        // The generation is read before the table: a change in between is seen at the next call.
        let generation = self.space.generation();
        if generation != self.generation {
            (self.generation, self.known, self.next) = (generation, [Known::default(); REMEMBERED], 0);
        }
        let iova = self.space.iova_of(segment)?;
        if let Some(mapping) = self.space.find(iova).filter(|m| is(m.memory.arena(), segment.arena())) {
            let from = mapping.memory.offset();
            self.known[self.next] = Known { arena, from, to: from + mapping.memory.len(), iova: mapping.iova };
            self.next = (self.next + 1) % REMEMBERED;
        }
        Some(iova)
    }
}

fn is(left: &Arc<Arena>, right: &Arc<Arena>) -> bool {
    Arc::ptr_eq(left, right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::memory::{DmaBuffer, PAGE, Pages};

    #[test]
    fn answers_follow_the_space() {
        let space = AddressSpace::default();
        let buffers: Vec<_> =
            (0..6).map(|_| DmaBuffer::allocate("test", 2 * PAGE, Pages::Small).expect("memory")).collect();
        let mut cache = IovaCache::new(&space);
        assert_eq!(cache.locate(&buffers[0].segment()), None);
        let iovas: Vec<_> = buffers.iter().map(|b| space.map(b, true).expect("map")).collect();
        for _ in 0..3 {
            for (buffer, iova) in buffers.iter().zip(&iovas) {
                let part = buffer.part(PAGE, 8).expect("part");
                assert_eq!(cache.locate(&part), Some(iova + PAGE as u64));
            }
        }
        let _gone = space.unmap(iovas[5]).expect("unmap");
        assert_eq!(cache.locate(&buffers[5].segment()), None);
        space.map_at(0x1000_0000, &buffers[5], true).expect("map");
        assert_eq!(cache.locate(&buffers[5].segment()), Some(0x1000_0000));
    }
}
