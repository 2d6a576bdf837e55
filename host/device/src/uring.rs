//! Files by io_uring: reads, writes, zeroing and flushes of many segments, completed by polling.
//!
//! Memory of operations under way is held here (its arenas), so neither a vanished mapping nor a dropped caller leaves the
//! kernel writing into memory of somebody else. With O_DIRECT, data that is not aligned for the device goes through a few
//! bounce buffers. Short reads and writes are continued until all is done or an error comes.
#![allow(unsafe_code)]

use crate::memory::{Arena, DmaBuffer, MemoryError, Pages, Segment};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// Most segments of one operation.
pub const MAX_SEGMENTS: usize = 520;
/// Most bytes of one read or write.
pub const MAX_BYTES: usize = 1 << 20;
const BOUNCES: usize = 8;

/// What is done to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// File to memory.
    Read,
    /// Memory to file; `sync` = on stable storage when it ends (RWF_DSYNC).
    Write {
        /// Wait for stable storage.
        sync: bool,
    },
    /// The range reads zero afterwards; with `deallocate` its space is given back.
    Zero {
        /// Give the space back.
        deallocate: bool,
    },
    /// Data written before is on stable storage afterwards.
    Flush,
}

/// Why a file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum FileRingError {
    /// The file.
    #[error("{0}")]
    File(#[source] io::Error),
    /// The ring.
    #[error("cannot set up io_uring: {0}")]
    Ring(#[source] io::Error),
    /// Bounce buffers.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The ring takes no more operations now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFull;

struct Slot {
    op: FileOp,
    tag: u64,
    offset: u64,
    left: u64,
    iovecs: Vec<libc_iovec>,
    /// First iovec with bytes left.
    next: usize,
    hold: Vec<Arc<Arena>>,
    bounce: Option<usize>,
    /// Where bounced data of a read goes: arena, offset, length.
    scatter: Vec<(Arc<Arena>, usize, usize)>,
    busy: bool,
}

#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
struct libc_iovec {
    base: *mut core::ffi::c_void,
    len: usize,
}

/// A file and its ring.
pub struct FileRing {
    ring: IoUring,
    file: OwnedFd,
    direct: bool,
    align: usize,
    slots: Vec<Slot>,
    free: Vec<u32>,
    bounces: Vec<DmaBuffer>,
    bounce_free: Vec<usize>,
    /// Operations that no poll can carry out, answered at the next one.
    refused: Vec<u64>,
    unsubmitted: u32,
    in_flight: usize,
}

// SAFETY: the raw pointers in the iovecs point into arenas that the same slot holds; nothing is tied to a thread.
unsafe impl Send for FileRing {}

impl std::fmt::Debug for FileRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileRing").field("direct", &self.direct).field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl FileRing {
    /// Opens `path` for reading and writing, with O_DIRECT where the filesystem has it, and a ring of `depth` operations.
    ///
    /// # Errors
    /// [`FileRingError`].
    pub fn open(path: &Path, depth: u32) -> Result<Self, FileRingError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let (file, direct) = match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()) {
            Ok(file) => (file, true),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| FileRingError::File(e.into()))?;
                (file, false)
            }
            Err(error) => return Err(FileRingError::File(error.into())),
        };
        Self::with_file(file, direct, depth)
    }

    fn with_file(file: OwnedFd, direct: bool, depth: u32) -> Result<Self, FileRingError> {
        let depth = depth.clamp(1, 1024);
        let ring = IoUring::builder()
            .setup_clamp()
            .build(depth.next_power_of_two())
            .map_err(FileRingError::Ring)?;
        let mut bounces = Vec::new();
        if direct {
            for _ in 0..BOUNCES {
                bounces.push(DmaBuffer::allocate("dray-bounce", MAX_BYTES, Pages::Small)?);
            }
        }
        let slots = (0..depth).map(|_| Slot::empty()).collect();
        Ok(Self {
            ring,
            file,
            direct,
            align: if direct { 512 } else { 1 },
            slots,
            free: (0..depth).rev().collect(),
            bounce_free: (0..bounces.len()).collect(),
            bounces,
            refused: Vec::with_capacity(depth as usize),
            unsubmitted: 0,
            in_flight: 0,
        })
    }

    /// Whether the file was opened with O_DIRECT.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Takes the file for this ring alone (an advisory lock); false while another ring or process has it. It is the file as it
    /// was opened here that holds the lock, and every operation under way holds the file: after a `kill -9` the lock is free only
    /// when the last write of the dead process has ended, so that none can land under the next one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn size(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(&self.file)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Operations under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight + self.refused.len()
    }

    /// The ring's descriptor: readable when operations have ended.
    #[must_use]
    pub fn waker(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the ring, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Begins an operation on `len` bytes at `offset`. For reads and writes `data` has `len` bytes in all, at most
    /// [`MAX_BYTES`] in at most [`MAX_SEGMENTS`] pieces; one that has more ends with an error.
    ///
    /// # Errors
    /// [`RingFull`]; nothing has happened then.
    pub fn submit(&mut self, op: FileOp, offset: u64, len: u64, data: &[Segment<'_>], tag: u64) -> Result<(), RingFull> {
        let Some(&index) = self.free.last() else { return Err(RingFull) };
        if data.len() > MAX_SEGMENTS || data.iter().map(Segment::len).sum::<usize>() > MAX_BYTES {
            // Waiting would not help it.
            if self.refused.len() >= self.slots.len() {
                return Err(RingFull);
            }
            self.refused.push(tag);
            return Ok(());
        }
        // `Slot::empty` allocates nothing; the slot's own buffers come back with it.
        let mut slot = std::mem::replace(&mut self.slots[index as usize], Slot::empty());
        let prepared = self.prepare(&mut slot, op, offset, len, data, tag);
        self.slots[index as usize] = slot;
        if !prepared || !self.push(index) {
            self.release_bounce(index);
            return Err(RingFull);
        }
        self.free.pop();
        self.slots[index as usize].busy = true;
        self.in_flight += 1;
        Ok(())
    }

    fn prepare(&mut self, slot: &mut Slot, op: FileOp, offset: u64, len: u64, data: &[Segment<'_>], tag: u64) -> bool {
        slot.reset(op, offset, len, tag);
        if !matches!(op, FileOp::Read | FileOp::Write { .. }) {
            return true;
        }
        let aligned = |s: &Segment<'_>| s.offset().is_multiple_of(self.align) && s.len().is_multiple_of(self.align);
        if !self.direct || data.iter().all(aligned) {
            for segment in data {
                slot.iovecs.push(iovec(segment));
                slot.hold_once(segment.arena());
            }
            return true;
        }
        let total: usize = data.iter().map(Segment::len).sum();
        let Some(bounce) = self.bounce_free.pop() else { return false };
        slot.bounce = Some(bounce);
        let buffer = &self.bounces[bounce];
        let mut at = buffer.offset();
        for segment in data {
            if op == FileOp::Read {
                slot.scatter.push((Arc::clone(segment.arena()), segment.offset(), segment.len()));
            } else {
                Arena::copy(segment.arena(), segment.offset(), buffer.arena(), at, segment.len());
            }
            at += segment.len();
        }
        if let Some(all) = buffer.part(0, total) {
            slot.iovecs.push(iovec(&all));
        }
        true
    }

    fn push(&mut self, index: u32) -> bool {
        let entry = self.entry(index);
        // SAFETY: the iovecs and the memory they point to are held by the slot until its completion has been taken.
        let mut pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        if !pushed {
            let _sent = self.ring.submit();
            // SAFETY: as above.
            pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        }
        self.unsubmitted += u32::from(pushed);
        pushed
    }

    fn entry(&self, index: u32) -> squeue::Entry {
        let slot = &self.slots[index as usize];
        let fd = types::Fd(self.file.as_raw_fd());
        let iovecs = &slot.iovecs[slot.next.min(slot.iovecs.len())..];
        let count = iovecs.len() as u32;
        let entry = match slot.op {
            FileOp::Read => opcode::Readv::new(fd, iovecs.as_ptr().cast(), count).offset(slot.offset).build(),
            FileOp::Write { sync } => {
                let flags = if sync { RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, iovecs.as_ptr().cast(), count).offset(slot.offset).rw_flags(flags).build()
            }
            FileOp::Zero { deallocate } => {
                let mode = if deallocate { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
                let mode = (mode | FallocateFlags::KEEP_SIZE).bits() as i32;
                opcode::Fallocate::new(fd, slot.left).offset(slot.offset).mode(mode).build()
            }
            FileOp::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        entry.user_data(u64::from(index))
    }

    /// Hands everything submitted to the kernel.
    pub fn commit(&mut self) {
        if self.unsubmitted > 0 && self.ring.submit().is_ok() {
            self.unsubmitted = 0;
        }
    }

    /// Hands ended operations to `done`: the tag and what happened.
    pub fn poll(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) -> usize {
        let mut ended = self.refused.len();
        for tag in self.refused.drain(..) {
            done(tag, Err(io::ErrorKind::InvalidInput.into()));
        }
        if self.in_flight == 0 {
            return ended;
        }
        self.commit();
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            let (index, outcome) = (entry.user_data() as u32, entry.result());
            if let Some(result) = self.account(index, outcome) {
                let tag = self.finish(index, result.is_ok());
                done(tag, result);
                ended += 1;
            }
        }
        ended
    }

    /// `None` when the operation goes on (a short transfer, an interrupted call).
    fn account(&mut self, index: u32, result: i32) -> Option<io::Result<()>> {
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.busy)?;
        let transfer = matches!(slot.op, FileOp::Read | FileOp::Write { .. });
        match u64::try_from(result) {
            Err(_) if matches!(-result, EAGAIN | EINTR) => {}
            Err(_) => return Some(Err(io::Error::from_raw_os_error(-result))),
            Ok(_) if !transfer => return Some(Ok(())),
            Ok(0) => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
            Ok(moved) => {
                slot.advance(moved);
                if slot.left == 0 {
                    return Some(Ok(()));
                }
            }
        }
        // The submission queue has at least as many places as there are slots, so this cannot fail after a submit.
        if self.push(index) { None } else { Some(Err(io::ErrorKind::WouldBlock.into())) }
    }

    fn finish(&mut self, index: u32, ok: bool) -> u64 {
        if let (true, Some(bounce)) = (ok, self.slots[index as usize].bounce) {
            let buffer = &self.bounces[bounce];
            let mut at = buffer.offset();
            for (arena, offset, len) in self.slots[index as usize].scatter.drain(..) {
                Arena::copy(buffer.arena(), at, &arena, offset, len);
                at += len;
            }
        }
        self.release_bounce(index);
        let slot = &mut self.slots[index as usize];
        slot.busy = false;
        slot.hold.clear();
        slot.scatter.clear();
        self.free.push(index);
        self.in_flight -= 1;
        slot.tag
    }

    fn release_bounce(&mut self, index: u32) {
        if let Some(bounce) = self.slots[index as usize].bounce.take() {
            self.bounce_free.push(bounce);
        }
    }
}

impl AsFd for FileRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        // The kernel may still write into the slots' memory: wait for it.
        while self.in_flight > 0 {
            if self.ring.submit_and_wait(1).is_err() {
                break;
            }
            self.poll(&mut |_, _| {});
        }
        if self.in_flight > 0 {
            // Waiting failed: rather leak than free memory that the kernel may write.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::take(&mut self.bounces));
        }
    }
}

const EAGAIN: i32 = 11;
const EINTR: i32 = 4;
const RWF_DSYNC: i32 = 2;

fn iovec(segment: &Segment<'_>) -> libc_iovec {
    libc_iovec { base: segment.arena().address(segment.offset(), segment.len()), len: segment.len() }
}

impl Slot {
    fn empty() -> Self {
        Self {
            op: FileOp::Flush,
            tag: 0,
            offset: 0,
            left: 0,
            iovecs: Vec::new(),
            next: 0,
            hold: Vec::new(),
            bounce: None,
            scatter: Vec::new(),
            busy: false,
        }
    }

    fn reset(&mut self, op: FileOp, offset: u64, len: u64, tag: u64) {
        self.iovecs.clear();
        self.hold.clear();
        self.scatter.clear();
        (self.op, self.tag, self.offset, self.left, self.next) = (op, tag, offset, len, 0);
    }

    fn hold_once(&mut self, arena: &Arc<Arena>) {
        if !self.hold.iter().any(|held| Arc::ptr_eq(held, arena)) {
            self.hold.push(Arc::clone(arena));
        }
    }

    fn advance(&mut self, moved: u64) {
        self.offset += moved;
        self.left = self.left.saturating_sub(moved);
        let mut moved = moved as usize;
        while let Some(iovec) = self.iovecs.get_mut(self.next).filter(|_| moved > 0) {
            let part = moved.min(iovec.len);
            // Never dereferenced here; stays within (or one past) the segment.
            iovec.base = iovec.base.wrapping_byte_add(part);
            iovec.len -= part;
            moved -= part;
            if iovec.len == 0 {
                self.next += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(ring: &mut FileRing, op: FileOp, offset: u64, len: u64, data: &[Segment<'_>]) -> io::Result<()> {
        ring.submit(op, offset, len, data, 7).expect("room");
        ring.commit();
        let mut result = None;
        while result.is_none() {
            ring.ring.submit_and_wait(1).expect("wait");
            ring.poll(&mut |tag, outcome| {
                assert_eq!(tag, 7);
                result = Some(outcome);
            });
        }
        result.expect("ended")
    }

    #[test]
    fn a_file_is_locked_for_one_ring_until_it_is_closed() {
        let path = std::env::temp_dir().join(format!("dray-lock-{}", std::process::id()));
        std::fs::write(&path, vec![0; 8192]).expect("file");
        let (first, second) = (FileRing::open(&path, 1).expect("ring"), FileRing::open(&path, 1).expect("ring"));
        assert!(first.try_lock().expect("lock"));
        assert!(!second.try_lock().expect("lock"));
        drop(first);
        assert!(second.try_lock().expect("lock"));
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn what_is_written_is_read_whatever_the_alignment() {
        let path = std::env::temp_dir().join(format!("dray-uring-{}", std::process::id()));
        std::fs::write(&path, vec![0xa5u8; 64 << 10]).expect("file");
        let mut ring = FileRing::open(&path, 8).expect("ring");
        let from = DmaBuffer::allocate("from", 16 << 10, Pages::Small).expect("memory");
        let into = DmaBuffer::allocate("into", 16 << 10, Pages::Small).expect("memory");
        for i in 0..16 << 10 {
            from.arena().store8(i, (i % 251) as u8, std::sync::atomic::Ordering::Relaxed);
        }
        let pieces = |b| -> Vec<(usize, usize)> { if b { vec![(4, 4092), (8192, 4100)] } else { vec![(0, 4096), (8192, 4096)] } };
        for odd in [false, true] {
            let out: Vec<_> = pieces(odd).iter().map(|&(o, l)| from.part(o, l).expect("part")).collect();
            let back: Vec<_> = pieces(odd).iter().map(|&(o, l)| into.part(o, l).expect("part")).collect();
            into.arena().fill(0, into.len(), 0);
            run(&mut ring, FileOp::Write { sync: true }, 8192, 8192, &out).expect("write");
            run(&mut ring, FileOp::Read, 8192, 8192, &back).expect("read");
            for (o, l) in pieces(odd) {
                assert!(Arena::equal(from.arena(), o, into.arena(), o, l), "odd {odd}");
            }
        }
        run(&mut ring, FileOp::Zero { deallocate: true }, 8192, 4096, &[]).expect("zero");
        run(&mut ring, FileOp::Flush, 0, 0, &[]).expect("flush");
        let all = into.part(0, 8192).expect("part");
        run(&mut ring, FileOp::Read, 8192, 8192, &[all]).expect("read");
        assert!(into.arena().is_zero(0, 4096) && !into.arena().is_zero(4096, 4096));
        let end = into.part(0, 4096).expect("part");
        assert!(run(&mut ring, FileOp::Read, 64 << 10, 4096, &[end]).is_err(), "past the end");
        std::fs::remove_file(&path).expect("clean up");
    }
}
