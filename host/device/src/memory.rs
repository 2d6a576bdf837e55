//! Arenas: memory that devices read and write, shareable by file descriptor.
//!
//! Nothing here ever hands out a Rust reference into an arena: whoever is on the other side may change any byte at any time.
//! Memory is seen as atomics of the machine's word sizes, or copied as raw bytes. Every access is checked against the arena's
//! bounds; an access outside is a programming error (offsets that come from a guest have been through an
//! [`AddressSpace`](crate::space::AddressSpace)), so it panics rather than touching memory.
//!
//! The accesses themselves are in `memory/access.rs`; loom's models have others, in `memory/modelled.rs`.
#![allow(unsafe_code)]

#[cfg(not(loom))]
mod access;
#[cfg(loom)]
mod modelled;

use crate::fault::Watched;
use rustix::fs::{FileType, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of an ordinary page.
pub const PAGE: usize = 4096;
/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;

/// Asks the processor to fetch the line of a value, and waits for nothing.
#[inline]
pub fn prefetch<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint about memory that a reference names; it reads nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(value).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

/// Which pages an arena is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Huge pages where there are enough, ordinary ones otherwise.
    PreferHuge,
    /// Ordinary pages.
    Small,
}

/// Why an arena could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// An arena of no bytes, or of more than the machine can address.
    #[error("an arena of {0} bytes cannot be made")]
    BadLength(usize),
    /// The kernel refused memory.
    #[error("cannot get {len} bytes of shared memory: {source}")]
    Kernel {
        /// Bytes asked for.
        len: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A descriptor that another process sent is not memory that may be mapped.
    #[error("memory sent by descriptor is refused: {0}")]
    Refused(&'static str),
}

/// What may be done with memory that another process sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Read and written.
    ReadWrite,
}

/// The filesystems whose files may be mapped when another process sends them: memory (tmpfs and memfd, ramfs, hugetlbfs) and
/// local disks (ext4, xfs, btrfs, f2fs, overlay). With any other an access might wait for the very process that sent it.
const TRUSTED_FILESYSTEMS: [u64; 8] =
    [TMPFS, 0x8584_58f6, HUGETLBFS, 0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x794c_7630];
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

/// A mapping of shared memory.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
    huge: bool,
    writable: bool,
    /// Where the arena begins in its file.
    file_offset: u64,
    /// Bytes mapped before the arena and in all: a page of the file may be larger than one of the arena.
    mapped: (usize, usize),
    /// Of memory that its owner may shorten.
    watched: Option<Watched>,
    #[cfg(loom)]
    cells: modelled::Cells,
}

// SAFETY: an arena is plain shared memory: every access goes through raw copies or atomics, and nothing is tied to a thread.
unsafe impl Send for Arena {}
// SAFETY: as above; concurrent access is what arenas are for.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `len` bytes (rounded up to whole pages) of new zeroed shared memory. `name` shows up in the process's maps.
    ///
    /// # Errors
    /// [`MemoryError`] when there is no such memory.
    pub fn new(name: &str, len: usize, pages: Pages) -> Result<Arc<Self>, MemoryError> {
        if len == 0 || len > isize::MAX as usize - HUGE_PAGE {
            return Err(MemoryError::BadLength(len));
        }
        if pages == Pages::PreferHuge
            && len >= HUGE_PAGE / 2
            && let Ok(arena) = Self::make(name, len.next_multiple_of(HUGE_PAGE), true)
        {
            return Ok(Arc::new(arena));
        }
        let len = len.next_multiple_of(PAGE);
        Self::make(name, len, false).map(Arc::new).map_err(|source| MemoryError::Kernel { len, source })
    }

    fn make(name: &str, len: usize, huge: bool) -> io::Result<Self> {
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if huge {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create(name, flags)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        if huge {
            // Takes the huge pages now: a page that is missing later would be a SIGBUS.
            rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, len as u64)?;
        }
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
        Self::map(fd, len, huge, true)
    }

    fn map(fd: OwnedFd, len: usize, huge: bool, writable: bool) -> io::Result<Self> {
        let page = if huge { HUGE_PAGE } else { PAGE };
        Self::map_part(fd, (0, len), page, writable)
    }

    /// Maps `len` bytes of a file at an offset (both in `part`), of which `page` is the page size; the offset is a multiple of
    /// [`PAGE`].
    fn map_part(fd: OwnedFd, part: (u64, usize), page: usize, writable: bool) -> io::Result<Self> {
        let (file_offset, len) = part;
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let before = (file_offset % page as u64) as usize;
        let whole = before.checked_add(len).and_then(|end| end.checked_next_multiple_of(page));
        let whole = whole.filter(|&whole| whole < isize::MAX as usize).ok_or(io::ErrorKind::OutOfMemory)?;
        let (place, fixed) = Self::place(whole)?;
        let flags = MapFlags::SHARED | fixed;
        // SAFETY: a fresh mapping at an address of the kernel's choice, or in a reservation of ours, aliases nothing.
        let start = unsafe { rustix::mm::mmap(place, whole, prot, flags, &fd, file_offset - before as u64)? };
        let base = NonNull::new(start.cast::<u8>().wrapping_add(before)).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            base,
            len,
            fd,
            huge: page >= HUGE_PAGE,
            writable,
            file_offset,
            mapped: (before, whole),
            watched: None,
            #[cfg(loom)]
            cells: modelled::Cells::default(),
        })
    }

    /// Maps `len` bytes at `offset` of memory that another process sent, which that process may use, change and even shorten at
    /// any time: an access to bytes that are gone finds zeroes and makes the arena [broken](Self::is_broken). The offset is a
    /// multiple of [`PAGE`]; huge pages are rounded to where needed. Descriptors of anything but files in memory or on a
    /// local disk are refused, as are files that do not reach as far.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn map_client(fd: OwnedFd, offset: u64, len: usize, access: Access) -> Result<Arc<Self>, MemoryError> {
        let kernel = |source: io::Error| MemoryError::Kernel { len, source };
        if len == 0 || len > isize::MAX as usize - 2 * HUGE_PAGE {
            return Err(MemoryError::BadLength(len));
        }
        if !offset.is_multiple_of(PAGE as u64) {
            return Err(MemoryError::Refused("it does not begin at a page"));
        }
        let stat = rustix::fs::fstat(&fd).map_err(|e| kernel(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryError::Refused("it is not a file"));
        }
        let filesystem = rustix::fs::fstatfs(&fd).map_err(|e| kernel(e.into()))?;
        let kind = filesystem.f_type as u64 & 0xffff_ffff;
        if !TRUSTED_FILESYSTEMS.contains(&kind) {
            return Err(MemoryError::Refused("its filesystem is neither memory nor a local disk"));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(MemoryError::Refused("the file is shorter"));
        }
        let page = if kind == HUGETLBFS { usize::try_from(filesystem.f_bsize).unwrap_or(0) } else { PAGE };
        if !page.is_power_of_two() || page < PAGE {
            return Err(MemoryError::Refused("its pages have no size"));
        }
        let mut arena = Self::map_part(fd, (offset, len), page, access == Access::ReadWrite).map_err(kernel)?;
        let start = arena.base.as_ptr() as usize - arena.mapped.0;
        let watched = Watched::new(start..start + arena.mapped.1, page, arena.writable);
        arena.watched = Some(watched.map_err(|full| MemoryError::Refused(full.0))?);
        Ok(Arc::new(arena))
    }

    /// Maps a part of a device's BAR, at an offset in the device's file that is a multiple of [`PAGE`]. A device that goes away
    /// takes it along: an access finds zeroes then, and makes the arena [broken](Self::is_broken). Only its 32-bit words are
    /// accessed.
    ///
    /// # Errors
    /// [`MemoryError`].
    #[cfg(not(loom))]
    pub(crate) fn map_bar(fd: OwnedFd, offset: u64, len: usize, writable: bool) -> Result<Arc<Self>, MemoryError> {
        let mut arena = Self::map_part(fd, (offset, len), PAGE, writable).map_err(|source| MemoryError::Kernel { len, source })?;
        let start = arena.base.as_ptr() as usize - arena.mapped.0;
        let watched = Watched::new(start..start + arena.mapped.1, PAGE, arena.writable);
        arena.watched = Some(watched.map_err(|full| MemoryError::Refused(full.0))?);
        Ok(Arc::new(arena))
    }

    /// Whether an access found that the memory's owner had taken bytes away. Its content means nothing any more, and what is
    /// written goes nowhere; whoever lent it should be told to leave. Costs one load.
    #[inline]
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.watched.as_ref().is_some_and(Watched::is_broken)
    }

    /// Where the arena begins in the file that its descriptor names.
    #[must_use]
    pub fn file_offset(&self) -> u64 {
        self.file_offset
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where a mapping goes: anywhere.
    #[cfg(not(asan))]
    fn place(_len: usize) -> io::Result<(*mut c_void, MapFlags)> {
        Ok((std::ptr::null_mut(), MapFlags::empty()))
    }

    /// Under AddressSanitizer, which knows nothing of what lies beside a mapping: between pages that nobody may touch, so that
    /// an access a little outside is found. Those pages stay reserved when the arena has gone.
    #[cfg(asan)]
    fn place(len: usize) -> io::Result<(*mut c_void, MapFlags)> {
        let (around, none) = (len + 2 * HUGE_PAGE, ProtFlags::empty());
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), around, none, flags)? };
        let skip = (base as usize + PAGE).next_multiple_of(HUGE_PAGE) - base as usize;
        Ok((base.wrapping_byte_add(skip), MapFlags::FIXED))
    }

    /// Maps memory that another process lent, for reading only. The memory must be sealed against shrinking, so that its
    /// owner cannot make a read fault.
    ///
    /// # Errors
    /// When the descriptor is not such memory, or shorter than `len`.
    pub fn open_read_only(fd: OwnedFd, len: usize) -> io::Result<Arc<Self>> {
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "lent memory is not sealed against shrinking"));
        }
        let size = rustix::fs::fstat(&fd)?.st_size;
        if len == 0 || !len.is_multiple_of(PAGE) || u64::try_from(size).unwrap_or(0) < len as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "lent memory is shorter than its owner said"));
        }
        Self::map(fd, len, false, false).map(Arc::new)
    }

    /// Maps the first `len` bytes of a file, shared and writable: what is stored is in the file even if this process is killed
    /// the next moment (the page cache has it; a machine that loses power may lose it). The file must not be shortened while
    /// it is mapped: an access behind its end would be fatal to the process.
    ///
    /// # Errors
    /// When `len` is not whole pages, the file is shorter, or the kernel refuses.
    pub fn map_file(file: &std::fs::File, len: usize) -> io::Result<Arc<Self>> {
        if len == 0 || !len.is_multiple_of(PAGE) || file.metadata()?.len() < len as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is shorter than the mapping, or not whole pages"));
        }
        Self::map(file.try_clone()?.into(), len, false, true).map(Arc::new)
    }

    /// Seals the memory against every writable mapping to come (ours stays) and returns a descriptor to hand to a reader.
    ///
    /// # Errors
    /// The kernel's.
    pub fn lend_read_only(&self) -> io::Result<OwnedFd> {
        rustix::fs::fcntl_add_seals(&self.fd, SealFlags::FUTURE_WRITE)?;
        Ok(rustix::io::fcntl_dupfd_cloexec(&self.fd, 3)?)
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an arena has at least a page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether huge pages back it.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "access outside an arena");
        // SAFETY: within the mapping, checked above.
        unsafe { self.base.as_ptr().add(offset) }
    }

    #[inline]
    fn at_for_write(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(self.writable, "write to read-only memory");
        self.at(offset, len)
    }

    /// The address of a range, for rings and ioctls of this crate that hand it to the kernel.
    pub(crate) fn address(&self, offset: usize, len: usize) -> *mut c_void {
        self.at(offset, len).cast()
    }

    /// XXH3-like work over raw bytes without a reference: hands `len` bytes to `visit` in pieces copied to the stack.
    pub fn visit(&self, offset: usize, len: usize, visit: &mut dyn FnMut(&[u8])) {
        let mut piece = [0u8; PAGE];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PAGE);
            self.read(offset + done, &mut piece[..n]);
            visit(&piece[..n]);
            done += n;
        }
    }
}

impl AsFd for Arena {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.watched = None;
        let (before, whole) = self.mapped;
        // SAFETY: our own mapping, and nothing borrows from it any more.
        let _gone = unsafe { rustix::mm::munmap(self.base.as_ptr().wrapping_sub(before).cast(), whole) };
    }
}

/// A borrowed piece of an arena: what a data pointer comes down to.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    arena: &'a Arc<Arena>,
    offset: usize,
    len: usize,
}

impl<'a> Segment<'a> {
    /// The piece, if it lies within the arena.
    #[inline]
    #[must_use]
    pub fn new(arena: &'a Arc<Arena>, offset: usize, len: usize) -> Option<Self> {
        (offset <= arena.len && len <= arena.len - offset).then_some(Self { arena, offset, len })
    }

    /// The arena.
    #[inline]
    #[must_use]
    pub fn arena(&self) -> &'a Arc<Arena> {
        self.arena
    }

    /// Where the piece begins in it.
    #[inline]
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the piece.
    #[inline]
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Option<Self> {
        (offset <= self.len && len <= self.len - offset).then_some(Self {
            arena: self.arena,
            offset: self.offset + offset,
            len,
        })
    }

    /// Copies the whole piece out; `into` must have its length.
    #[inline]
    pub fn read(&self, into: &mut [u8]) {
        assert_eq!(into.len(), self.len, "lengths differ");
        self.arena.read(self.offset, into);
    }

    /// Overwrites the whole piece; `from` must have its length.
    #[inline]
    pub fn write(&self, from: &[u8]) {
        assert_eq!(from.len(), self.len, "lengths differ");
        self.arena.write(self.offset, from);
    }

    /// Whether another piece continues this one in the same arena.
    #[inline]
    #[must_use]
    pub fn is_followed_by(&self, next: &Segment<'_>) -> bool {
        Arc::ptr_eq(self.arena, next.arena) && self.offset + self.len == next.offset
    }

    /// The two as one, if the second continues the first.
    #[inline]
    #[must_use]
    pub fn joined(&self, next: &Segment<'_>) -> Option<Self> {
        self.is_followed_by(next).then_some(Self { arena: self.arena, offset: self.offset, len: self.len + next.len })
    }
}

/// An owned piece of an arena: a queue, a buffer. Clones share the memory.
#[derive(Clone, Debug)]
pub struct DmaBuffer {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
}

impl DmaBuffer {
    /// The piece, if it lies within the arena.
    #[must_use]
    pub fn new(arena: Arc<Arena>, offset: usize, len: usize) -> Option<Self> {
        Segment::new(&arena, offset, len)?;
        Some(Self { arena, offset, len })
    }

    /// A new arena of its own.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub fn allocate(name: &str, len: usize, pages: Pages) -> Result<Self, MemoryError> {
        Ok(Self { arena: Arena::new(name, len, pages)?, offset: 0, len })
    }

    /// The whole buffer as a segment.
    #[inline]
    #[must_use]
    pub fn segment(&self) -> Segment<'_> {
        Segment { arena: &self.arena, offset: self.offset, len: self.len }
    }

    /// A part of the buffer as a segment.
    #[inline]
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Option<Segment<'_>> {
        self.segment().part(offset, len)
    }

    /// A part of the buffer as a buffer.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Option<Self> {
        let part = self.part(offset, len)?;
        Some(Self { arena: Arc::clone(&self.arena), offset: part.offset, len })
    }

    /// The arena.
    #[inline]
    #[must_use]
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Where the buffer begins in its arena.
    #[inline]
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_what_the_arena_holds() {
        let arena = Arena::new("append", PAGE, Pages::Small).expect("memory");
        arena.write(10, b"entries");
        let mut into = b"some ".to_vec();
        arena.read_append(10, 7, &mut into);
        arena.read_append(PAGE, 0, &mut into);
        arena.read_append(PAGE - 1, 1, &mut into);
        assert_eq!(into, b"some entries\0");
    }

    #[test]
    #[should_panic(expected = "access outside an arena")]
    fn nothing_is_appended_from_outside() {
        let arena = Arena::new("append", PAGE, Pages::Small).expect("memory");
        arena.read_append(PAGE - 1, 2, &mut Vec::new());
    }
}
