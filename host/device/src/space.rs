//! Address spaces: which I/O virtual addresses mean which memory.
//!
//! Memory belongs to a space, not to a device; several functions may join one. For devices that we drive, addresses come from
//! the space's own allocator ([`AddressSpace::map`]); a space that serves a client takes the client's addresses, checked
//! ([`AddressSpace::map_at`]). Readers (controllers) translate through a snapshot, without a lock; an unmap is complete when no
//! reader uses the old snapshot any more ([`Unmapping::is_done`]).

use crate::memory::{Arena, DmaBuffer, PAGE, Segment};
use crate::sync::{AtomicU64, Mutex, MutexGuard};
use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// Where the allocator begins: low addresses stay invalid, so that a zero pointer is an error and not an access.
const FIRST_IOVA: u64 = 0x1_0000_0000;
/// Mappings that the allocator makes begin at multiples of this.
const IOVA_ALIGN: u64 = 2 << 20;
/// Most mappings in one space.
pub const MAX_MAPPINGS: usize = 4096;

/// One range of I/O virtual addresses.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First I/O virtual address.
    pub iova: u64,
    /// The memory.
    pub memory: DmaBuffer,
    /// Whether the device may write it.
    pub writable: bool,
}

impl Mapping {
    fn end(&self) -> u64 {
        self.iova + self.memory.len() as u64
    }
}

/// Why a range could not be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// Address or length is zero, not page-aligned, or runs past the end of the space.
    #[error("I/O virtual range {iova:#x} + {len:#x} is not page-aligned or outside the address space")]
    BadRange {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// The devices of the space cannot be given these addresses (an IOMMU's reserved ranges, or its width).
    #[error("I/O virtual range {iova:#x} + {len:#x} is not among the addresses that the space's devices can use")]
    OutsideWindows {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// Another mapping is there.
    #[error("I/O virtual range {iova:#x} + {len:#x} overlaps one that is mapped")]
    Overlap {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// The space is full.
    #[error("the address space has no room for another mapping")]
    Full,
    /// No mapping begins there.
    #[error("nothing is mapped at {0:#x}")]
    NotMapped(u64),
    /// A device behind the space refused it.
    #[error("a device refused the mapping: {0}")]
    Device(#[from] io::Error),
}

/// Follows maps and unmaps: a VFIO container, a ring's fixed buffers, an export's table.
pub trait MapFollower: Send {
    /// A range was mapped.
    ///
    /// # Errors
    /// When the device cannot take it; the map is undone and fails.
    fn mapped(&mut self, mapping: &Mapping) -> io::Result<()>;
    /// A range is going away.
    fn unmapped(&mut self, mapping: &Mapping);
}

/// Says where memory is mapped, in a space whose addresses are not ours to choose (a device without an IOMMU sees physical ones).
pub trait Placer: Send {
    /// The address that this memory has for devices.
    ///
    /// # Errors
    /// When it has none; the map fails.
    fn place(&mut self, memory: &DmaBuffer) -> io::Result<u64>;
}

#[derive(Debug, Default)]
struct Table {
    generation: u64,
    /// Counts the clients that have had the space.
    owner: u64,
    /// Sorted by address.
    mappings: Vec<Mapping>,
}

#[derive(Debug)]
struct ReaderMark {
    /// The oldest generation that the reader may still use; [`GONE`] when there is no reader any more.
    using: AtomicU64,
}

/// Later than every generation: what a reader that was dropped says it uses.
const GONE: u64 = u64::MAX;

impl ReaderMark {
    /// Acquired: who strikes the reader from the list waits for it no more, and must see what it wrote.
    fn is_gone(&self) -> bool {
        self.using.load(Ordering::Acquire) == GONE
    }
}

struct State {
    table: Arc<Table>,
    readers: Vec<Arc<ReaderMark>>,
    followers: Vec<Box<dyn MapFollower>>,
    limit: u64,
    /// The addresses that devices can be given, sorted; everything when empty.
    windows: Vec<RangeInclusive<u64>>,
    placer: Option<Box<dyn Placer>>,
}

impl State {
    /// The lowest address where `len` bytes are free, within the windows.
    fn free_range(&self, len: u64) -> Option<u64> {
        let len = len.checked_next_multiple_of(PAGE as u64)?;
        let everything = [FIRST_IOVA..=self.limit.saturating_sub(1)];
        let windows = if self.windows.is_empty() { &everything[..] } else { &self.windows };
        // Spaces of few bits may have nothing above 4 GiB; a device that sees no more is given what is below, but for the first
        // pages.
        let above = |floor: u64| windows.iter().find_map(move |window| self.free_in(window, floor, len));
        above(FIRST_IOVA).or_else(|| above(IOVA_ALIGN))
    }

    fn free_in(&self, window: &RangeInclusive<u64>, floor: u64, len: u64) -> Option<u64> {
        let mut iova = (*window.start()).max(floor).checked_next_multiple_of(IOVA_ALIGN)?;
        for mapping in &self.table.mappings {
            if mapping.iova >= iova.checked_add(len)? {
                break;
            }
            iova = iova.max(mapping.end().checked_next_multiple_of(IOVA_ALIGN)?);
        }
        (iova.checked_add(len)? - 1 <= *window.end()).then_some(iova)
    }
}

/// Whether a range lies within one of the windows; no windows are no bounds.
fn within(windows: &[RangeInclusive<u64>], iova: u64, len: u64) -> bool {
    let last = iova.saturating_add(len.max(1) - 1);
    windows.is_empty() || windows.iter().any(|window| window.contains(&iova) && window.contains(&last))
}

struct Shared {
    generation: AtomicU64,
    state: Mutex<State>,
}

/// A space of I/O virtual addresses. Clones are the same space.
#[derive(Clone)]
pub struct AddressSpace {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressSpace").field("table", &self.lock().table).finish_non_exhaustive()
    }
}

impl Default for AddressSpace {
    fn default() -> Self {
        Self::new(48)
    }
}

impl AddressSpace {
    /// An empty space of `bits` address bits (at most 63).
    #[must_use]
    pub fn new(bits: u32) -> Self {
        let state = State {
            table: Arc::default(),
            readers: Vec::new(),
            followers: Vec::new(),
            limit: 1u64 << bits.min(63),
            windows: Vec::new(),
            placer: None,
        };
        Self { shared: Arc::new(Shared { generation: AtomicU64::new(0), state: Mutex::new(state) }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps memory at an address of the space's choice; returns that address.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn map(&self, memory: &DmaBuffer, writable: bool) -> Result<u64, SpaceError> {
        let mut state = self.lock();
        let iova = match &mut state.placer {
            Some(placer) => placer.place(memory)?,
            None => state.free_range(memory.len() as u64).ok_or(SpaceError::Full)?,
        };
        Self::insert(&self.shared, &mut state, Mapping { iova, memory: memory.clone(), writable })?;
        Ok(iova)
    }

    /// Confines the space to addresses that its devices can be given, sorted and apart; none = everything.
    ///
    /// # Errors
    /// [`SpaceError::OutsideWindows`] when something is mapped elsewhere; nothing has changed then.
    pub fn confine(&self, windows: &[RangeInclusive<u64>]) -> Result<(), SpaceError> {
        let mut state = self.lock();
        let outside = |m: &&Mapping| !within(windows, m.iova, m.memory.len() as u64);
        if let Some(m) = state.table.mappings.iter().find(outside) {
            return Err(SpaceError::OutsideWindows { iova: m.iova, len: m.memory.len() as u64 });
        }
        state.windows = windows.to_vec();
        Ok(())
    }

    /// From now on addresses are `placer`'s to say, those of [`map_at`](Self::map_at) too.
    pub fn place_by(&self, placer: Box<dyn Placer>) {
        self.lock().placer = Some(placer);
    }

    /// Maps memory at an address that a client chose.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn map_at(&self, iova: u64, memory: &DmaBuffer, writable: bool) -> Result<(), SpaceError> {
        let mut state = self.lock();
        if let Some(placer) = &mut state.placer
            && placer.place(memory)? != iova
        {
            return Err(SpaceError::OutsideWindows { iova, len: memory.len() as u64 });
        }
        Self::insert(&self.shared, &mut state, Mapping { iova, memory: memory.clone(), writable })
    }

    fn insert(shared: &Shared, state: &mut State, mapping: Mapping) -> Result<(), SpaceError> {
        let (iova, len) = (mapping.iova, mapping.memory.len() as u64);
        let page = PAGE as u64;
        let fits = iova.checked_add(len).is_some_and(|end| end <= state.limit);
        if len == 0 || !iova.is_multiple_of(page) || !mapping.memory.offset().is_multiple_of(PAGE) || !fits {
            return Err(SpaceError::BadRange { iova, len });
        }
        if !within(&state.windows, iova, len) {
            return Err(SpaceError::OutsideWindows { iova, len });
        }
        if state.table.mappings.len() >= MAX_MAPPINGS {
            return Err(SpaceError::Full);
        }
        let at = state.table.mappings.partition_point(|m| m.iova < iova);
        let before = at.checked_sub(1).and_then(|i| state.table.mappings.get(i));
        let after = state.table.mappings.get(at);
        if before.is_some_and(|m| m.end() > iova) || after.is_some_and(|m| m.iova < iova + len) {
            return Err(SpaceError::Overlap { iova, len });
        }
        for i in 0..state.followers.len() {
            if let Err(error) = state.followers[i].mapped(&mapping) {
                for follower in &mut state.followers[..i] {
                    follower.unmapped(&mapping);
                }
                return Err(error.into());
            }
        }
        let mut mappings = state.table.mappings.clone();
        mappings.insert(at, mapping);
        Self::publish(shared, state, mappings);
        Ok(())
    }

    fn publish(shared: &Shared, state: &mut State, mappings: Vec<Mapping>) -> u64 {
        let (generation, owner) = (state.table.generation + 1, state.table.owner);
        state.table = Arc::new(Table { generation, owner, mappings });
        shared.generation.store(generation, Ordering::Release);
        generation
    }

    /// Takes the mapping that begins at `iova` away. No reader translates to it once it has refreshed; the memory may still be
    /// written by operations under way until the returned [`Unmapping`] is done.
    ///
    /// # Errors
    /// [`SpaceError::NotMapped`].
    pub fn unmap(&self, iova: u64) -> Result<Unmapping, SpaceError> {
        let mut state = self.lock();
        let Ok(at) = state.table.mappings.binary_search_by_key(&iova, |m| m.iova) else {
            return Err(SpaceError::NotMapped(iova));
        };
        let mut mappings = state.table.mappings.clone();
        let mapping = mappings.remove(at);
        for follower in &mut state.followers {
            follower.unmapped(&mapping);
        }
        let generation = Self::publish(&self.shared, &mut state, mappings);
        state.readers.retain(|reader| !reader.is_gone());
        let readers = state.readers.clone();
        Ok(Unmapping { generation, readers })
    }

    /// Takes the mappings that begin at any of `iovas`, which are sorted, away at once: as [`unmap`](Self::unmap), at the price
    /// of one. Addresses where nothing begins are passed over.
    pub fn unmap_many(&self, iovas: &[u64]) -> Unmapping {
        let mut state = self.lock();
        let (gone, mappings): (Vec<_>, Vec<_>) =
            state.table.mappings.iter().cloned().partition(|mapping| iovas.binary_search(&mapping.iova).is_ok());
        for mapping in &gone {
            for follower in &mut state.followers {
                follower.unmapped(mapping);
            }
        }
        let generation = Self::publish(&self.shared, &mut state, mappings);
        state.readers.retain(|reader| !reader.is_gone());
        let readers = state.readers.clone();
        Unmapping { generation, readers }
    }

    /// The client whose addresses these were has gone, and took its memory along ([`unmap_many`](Self::unmap_many)): what is
    /// mapped from now on is another's, at whatever address. Readers tell by [`SpaceReader::owner`].
    pub fn change_owner(&self) {
        let mut state = self.lock();
        let generation = state.table.generation + 1;
        let (owner, mappings) = (state.table.owner + 1, state.table.mappings.clone());
        state.table = Arc::new(Table { generation, owner, mappings });
        self.shared.generation.store(generation, Ordering::Release);
    }

    /// Lets `follower` see every mapping, those that are there first.
    ///
    /// # Errors
    /// When it refuses one of them.
    pub fn follow(&self, mut follower: Box<dyn MapFollower>) -> Result<(), SpaceError> {
        let mut state = self.lock();
        for mapping in &state.table.mappings {
            follower.mapped(mapping)?;
        }
        state.followers.push(follower);
        Ok(())
    }

    /// A reader that translates addresses.
    #[must_use]
    pub fn reader(&self) -> SpaceReader {
        let mut state = self.lock();
        let table = Arc::clone(&state.table);
        let mark = Arc::new(ReaderMark { using: AtomicU64::new(table.generation) });
        state.readers.retain(|reader| !reader.is_gone());
        state.readers.push(Arc::clone(&mark));
        SpaceReader { shared: Arc::clone(&self.shared), table, mark, last: 0 }
    }

    /// The mapping that contains `iova`, for tools; the hot path has a [`SpaceReader`].
    #[must_use]
    pub fn find(&self, iova: u64) -> Option<Mapping> {
        let state = self.lock();
        state.table.mappings.iter().find(|m| m.iova <= iova && iova < m.end()).cloned()
    }

    /// The I/O virtual address of a segment, if its memory is mapped here.
    #[must_use]
    pub fn iova_of(&self, segment: &Segment<'_>) -> Option<u64> {
        iova_in(&self.lock().table, segment)
    }

    /// Whether both are the same space.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// The number of changes so far; a driver that remembers addresses asks whether they still hold.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }
}

fn iova_in(table: &Table, segment: &Segment<'_>) -> Option<u64> {
    table.mappings.iter().find_map(|m| {
        let from = segment.offset().checked_sub(m.memory.offset())?;
        let inside = Arc::ptr_eq(m.memory.arena(), segment.arena()) && from + segment.len() <= m.memory.len();
        inside.then(|| m.iova + from as u64)
    })
}

/// An unmap that waits for operations under way.
#[derive(Debug)]
#[must_use = "memory may be written until the unmap is done"]
pub struct Unmapping {
    generation: u64,
    readers: Vec<Arc<ReaderMark>>,
}

impl Unmapping {
    /// Whether no reader uses the range any more.
    #[must_use]
    pub fn is_done(&self) -> bool {
        // Acquired, also from a reader that has gone: what it wrote is seen by whoever uses the memory next.
        self.readers.iter().all(|reader| reader.using.load(Ordering::Acquire) >= self.generation)
    }
}

/// Translates addresses of one space through a snapshot.
pub struct SpaceReader {
    shared: Arc<Shared>,
    table: Arc<Table>,
    mark: Arc<ReaderMark>,
    last: usize,
}

impl Drop for SpaceReader {
    fn drop(&mut self) {
        self.mark.using.store(GONE, Ordering::Release);
    }
}

impl std::fmt::Debug for SpaceReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpaceReader").field("table", &self.table).finish_non_exhaustive()
    }
}

impl SpaceReader {
    /// Takes a new snapshot if the space has changed; says whether it has. Costs one load when it has not.
    #[inline]
    pub fn refresh(&mut self) -> bool {
        if self.shared.generation.load(Ordering::Acquire) == self.table.generation {
            return false;
        }
        self.renew();
        true
    }

    #[cold]
    fn renew(&mut self) {
        self.table = Arc::clone(&self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).table);
        self.last = 0;
    }

    /// The generation of the snapshot; operations under way remember it.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.table.generation
    }

    /// Counts the clients that the space has had before the snapshot ([`AddressSpace::change_owner`]).
    #[inline]
    #[must_use]
    pub fn owner(&self) -> u64 {
        self.table.owner
    }

    /// Says that no operation under way was translated before generation `oldest`: unmaps up to it may complete. Without
    /// operations under way that is [`generation`](Self::generation).
    #[inline]
    pub fn release(&self, oldest: u64) {
        if self.mark.using.load(Ordering::Relaxed) != oldest {
            self.mark.using.store(oldest, Ordering::Release);
        }
    }

    /// The memory behind `len` bytes at `iova`, if one mapping holds them all and, for `write`, may be written.
    #[inline]
    #[must_use]
    pub fn translate(&mut self, iova: u64, len: usize, write: bool) -> Option<Segment<'_>> {
        let inside = |m: &Mapping| iova >= m.iova && iova - m.iova < m.memory.len() as u64;
        if !self.table.mappings.get(self.last).is_some_and(inside) {
            self.last = self.table.mappings.partition_point(|m| m.iova <= iova).checked_sub(1)?;
        }
        let mapping = self.table.mappings.get(self.last).filter(|m| inside(m) && (m.writable || !write))?;
        mapping.memory.part(usize::try_from(iova - mapping.iova).ok()?, len)
    }

    /// As [`translate`](Self::translate) without remembering where it looked, for callers that hold several segments.
    #[inline]
    #[must_use]
    pub fn lookup(&self, iova: u64, len: usize, write: bool) -> Option<Segment<'_>> {
        let inside = |m: &&Mapping| iova >= m.iova && iova - m.iova < m.memory.len() as u64;
        let mappings = &self.table.mappings;
        let mapping = match mappings.get(self.last).filter(inside) {
            Some(hit) => hit,
            None => mappings.get(mappings.partition_point(|m| m.iova <= iova).checked_sub(1)?).filter(inside)?,
        };
        if write && !mapping.writable {
            return None;
        }
        mapping.memory.part(usize::try_from(iova - mapping.iova).ok()?, len)
    }

    /// The I/O virtual address of a segment, if its memory is mapped.
    #[must_use]
    pub fn iova_of(&self, segment: &Segment<'_>) -> Option<u64> {
        iova_in(&self.table, segment)
    }

    /// Every mapping of the snapshot, by address.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.table.mappings
    }
}

/// Memory of our own, mapped in a space: queues and buffers of a driver.
#[derive(Debug)]
pub struct MappedBuffer {
    space: AddressSpace,
    buffer: DmaBuffer,
    iova: u64,
}

impl MappedBuffer {
    /// Maps a whole buffer.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn new(space: &AddressSpace, buffer: DmaBuffer) -> Result<Self, SpaceError> {
        let iova = space.map(&buffer, true)?;
        Ok(Self { space: space.clone(), buffer, iova })
    }

    /// The memory.
    #[must_use]
    pub fn buffer(&self) -> &DmaBuffer {
        &self.buffer
    }

    /// Its arena, for accesses by arena offset.
    #[inline]
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        self.buffer.arena()
    }

    /// The first I/O virtual address.
    #[inline]
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }
}

impl Drop for MappedBuffer {
    fn drop(&mut self) {
        // The memory itself lives as long as anyone holds its arena, so a late access of the device hits nothing of others.
        let _unmapping = self.space.unmap(self.iova);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Pages;

    fn buffer(len: usize) -> DmaBuffer {
        DmaBuffer::allocate("test", len, Pages::Small).expect("memory")
    }

    #[test]
    fn the_allocator_keeps_mappings_apart_and_reuses_gaps() {
        let space = AddressSpace::default();
        let (a, b) = (buffer(3 * PAGE), buffer(PAGE));
        let first = space.map(&a, true).expect("map");
        let second = space.map(&b, true).expect("map");
        assert!(second >= first + 3 * PAGE as u64);
        let _gone = space.unmap(first).expect("unmap");
        assert_eq!(space.map(&b, true).expect("map"), first);
    }

    #[test]
    fn addresses_come_from_the_windows() {
        let space = AddressSpace::new(63);
        let first = space.map(&buffer(PAGE), true).expect("map");
        assert_eq!(first, FIRST_IOVA);
        assert!(matches!(space.confine(&[0..=0xffff_ffff]), Err(SpaceError::OutsideWindows { .. })), "something is outside");
        let windows = [0x1000..=0xfedf_ffff, FIRST_IOVA..=FIRST_IOVA + IOVA_ALIGN, 0x7_0000_0000..=0x7_0000_1fff];
        space.confine(&windows).expect("confine");
        let second = space.map(&buffer(PAGE), true).expect("map");
        assert_eq!(second, 0x7_0000_0000, "the gap in the window is a page short");
        let below = space.map(&buffer(3 * PAGE), true).expect("map");
        assert_eq!(below, IOVA_ALIGN, "nothing above holds as much");
        for bad in [0, 0xfedf_f000, 0xfee0_0000, 0x7_0000_1000] {
            assert!(matches!(space.map_at(bad, &buffer(2 * PAGE), true), Err(SpaceError::OutsideWindows { .. })), "{bad:#x}");
        }
        space.map_at(0xfedf_e000, &buffer(2 * PAGE), true).expect("the last two pages");
        space.confine(&[IOVA_ALIGN..=IOVA_ALIGN + 0x2fff]).expect_err("not what is mapped");
    }

    #[test]
    fn a_placer_has_the_say() {
        struct Fixed(u64);
        impl Placer for Fixed {
            fn place(&mut self, memory: &DmaBuffer) -> io::Result<u64> {
                if memory.len() > PAGE { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(self.0) }
            }
        }
        let space = AddressSpace::default();
        space.place_by(Box::new(Fixed(0x1234_5000)));
        assert!(matches!(space.map(&buffer(2 * PAGE), true), Err(SpaceError::Device(_))));
        assert!(matches!(space.map_at(0x1000, &buffer(PAGE), true), Err(SpaceError::OutsideWindows { .. })));
        assert_eq!(space.map(&buffer(PAGE), true).expect("map"), 0x1234_5000);
        assert!(matches!(space.map(&buffer(PAGE), true), Err(SpaceError::Overlap { .. })), "two pieces in one place");
    }

    #[test]
    fn a_clients_address_is_checked() {
        let space = AddressSpace::new(40);
        let memory = buffer(2 * PAGE);
        space.map_at(0x10_0000, &memory, true).expect("map");
        for bad in [0x10_0000, 0x10_1000, 0xf_f000, 0x10_0001, 1 << 40, u64::MAX - 0xfff] {
            assert!(space.map_at(bad, &memory, true).is_err(), "{bad:#x}");
        }
        space.map_at(0x10_2000, &memory, false).expect("neighbour");
    }

    #[test]
    fn translation_stays_inside_one_mapping_and_obeys_access() {
        let space = AddressSpace::new(40);
        space.map_at(0x10_0000, &buffer(2 * PAGE), true).expect("map");
        space.map_at(0x10_2000, &buffer(PAGE), false).expect("map");
        let mut reader = space.reader();
        assert!(reader.translate(0x10_1ff8, 8, true).is_some());
        assert!(reader.translate(0x10_1ffc, 8, true).is_none(), "crosses into another mapping");
        assert!(reader.translate(0x10_2000, 8, false).is_some());
        assert!(reader.translate(0x10_2000, 8, true).is_none(), "read only");
        assert!(reader.translate(0xf_ffff, 1, false).is_none());
        assert!(reader.lookup(0x10_3000, 1, false).is_none());
        assert!(reader.lookup(0, usize::MAX, false).is_none());
    }

    #[test]
    fn many_are_unmapped_at_once_and_others_stay() {
        let space = AddressSpace::default();
        for page in 0..8u64 {
            space.map_at(page * PAGE as u64, &buffer(PAGE), true).expect("map");
        }
        let mut reader = space.reader();
        let generation = space.generation();
        let unmapping = space.unmap_many(&[0, 0x2000, 0x2800, 0x7000, 0x9000]);
        assert_eq!((space.generation(), unmapping.is_done()), (generation + 1, false));
        assert!(reader.refresh());
        reader.release(reader.generation());
        assert!(unmapping.is_done());
        let left: Vec<u64> = reader.mappings().iter().map(|mapping| mapping.iova >> 12).collect();
        assert_eq!(left, [1, 3, 4, 5, 6]);
    }

    #[test]
    fn readers_see_another_owner_with_the_next_snapshot() {
        let space = AddressSpace::default();
        let iova = space.map(&buffer(PAGE), true).expect("map");
        let mut reader = space.reader();
        assert_eq!(reader.owner(), 0);
        space.change_owner();
        assert_eq!(reader.owner(), 0);
        assert!(reader.refresh() && reader.translate(iova, 1, false).is_some());
        assert_eq!(reader.owner(), 1);
        let _unmapping = space.unmap(iova).expect("unmap");
        assert!(reader.refresh());
        assert_eq!((reader.owner(), space.reader().owner()), (1, 1));
    }

    #[test]
    fn an_unmap_waits_for_operations_under_way() {
        let space = AddressSpace::default();
        let iova = space.map(&buffer(PAGE), true).expect("map");
        let mut reader = space.reader();
        let started = reader.generation();
        let unmapping = space.unmap(iova).expect("unmap");
        assert!(!unmapping.is_done(), "the reader has not looked yet");
        assert!(reader.refresh());
        reader.release(started);
        assert!(!unmapping.is_done(), "an operation of the old snapshot is under way");
        reader.release(reader.generation());
        assert!(unmapping.is_done());
        assert!(reader.translate(iova, 1, false).is_none());
    }
}
