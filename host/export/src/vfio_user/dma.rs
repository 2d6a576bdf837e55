//! The client's memory: DMA_MAP and DMA_UNMAP.
//!
//! A window with a descriptor is mapped into the slot's address space, and the controller accesses it in place. A window without
//! one could only be reached by messages to the client, which stock clients do not answer. It is kept, so that it can be
//! unmapped and nothing else is mapped over it, but no address in it means anything to the controller: a hypervisor maps its
//! firmware's memory so, and would not start if that were refused.

use dray_device::memory::{Access, Arena, DmaBuffer, MemoryError, PAGE};
use dray_device::space::{AddressSpace, SpaceError, Unmapping};
use dray_device::vfio_user::wire::{DmaMap, DmaUnmap, dma, errno};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A file, as far as two descriptors name the same: device and inode.
type FileId = (u64, u64);

struct Window {
    size: u64,
    flags: u32,
    offset: u64,
    file: Option<FileId>,
    /// None: not usable.
    arena: Option<Arc<Arena>>,
}

/// The client's windows, by their first I/O virtual address.
pub(crate) struct Windows {
    windows: BTreeMap<u64, Window>,
    /// Bytes mapped.
    bytes: u64,
    max_windows: usize,
    max_bytes: u64,
}

/// What a map came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// It can be used.
    Usable,
    /// It is kept, and cannot be used.
    Unusable,
    /// It was there.
    Again,
}

impl Windows {
    pub(crate) fn new(max_windows: usize, max_bytes: u64) -> Self {
        Self { windows: BTreeMap::new(), bytes: 0, max_windows, max_bytes }
    }

    pub(crate) fn len(&self) -> usize {
        self.windows.len()
    }

    /// Whether memory that is mapped has been taken away.
    pub(crate) fn is_broken(&self) -> bool {
        self.windows.values().filter_map(|window| window.arena.as_ref()).any(|arena| arena.is_broken())
    }

    /// DMA_MAP. The descriptor is taken out of `fds`.
    ///
    /// # Errors
    /// An errno: EINVAL for what makes no sense, EEXIST for an overlap, ENOSPC beyond the limits, EFAULT for memory that cannot
    /// be mapped, ENOTSUP for descriptors that shall be read and written.
    pub(crate) fn map(&mut self, space: &AddressSpace, map: &DmaMap, fds: &mut Vec<OwnedFd>) -> Result<Mapped, u32> {
        let known = dma::READ | dma::WRITE | dma::MMAP | dma::FILE_IO;
        let whole = [map.address, map.size, map.offset].iter().all(|value| value.is_multiple_of(PAGE as u64));
        let end = map.address.checked_add(map.size).ok_or(errno::EINVAL)?;
        let sane = map.argsz as usize >= size_of::<DmaMap>() && map.flags & !known == 0 && whole && map.size > 0;
        if !sane || fds.len() > 1 {
            return Err(errno::EINVAL);
        }
        if map.flags & (dma::FILE_IO | dma::MMAP) == dma::FILE_IO {
            return Err(errno::ENOTSUP);
        }
        let fd = fds.pop();
        let file = fd.as_ref().map(file_id).transpose()?;
        if let Some(there) = self.windows.range(..end).next_back().filter(|(at, there)| *at + there.size > map.address) {
            let (at, there) = there;
            let same = (*at, there.size, there.flags, there.offset, there.file)
                == (map.address, map.size, map.flags, map.offset, file);
            return if same { Ok(Mapped::Again) } else { Err(errno::EEXIST) };
        }
        let bytes = if fd.is_some() { map.size } else { 0 };
        if self.windows.len() >= self.max_windows || self.bytes.saturating_add(bytes) > self.max_bytes {
            return Err(errno::ENOSPC);
        }
        let arena = fd.map(|fd| share(space, map, fd)).transpose()?;
        let outcome = if arena.is_some() { Mapped::Usable } else { Mapped::Unusable };
        self.bytes += bytes;
        self.windows.insert(map.address, Window { size: map.size, flags: map.flags, offset: map.offset, file, arena });
        Ok(outcome)
    }

    /// DMA_UNMAP: exactly one window, or all. The memory is in use until the [`Unmapping`] is done.
    ///
    /// # Errors
    /// An errno: ENOENT when nothing begins there, EINVAL when something else does.
    pub(crate) fn unmap(&mut self, space: &AddressSpace, unmap: &DmaUnmap) -> Result<Option<Unmapping>, u32> {
        if (unmap.argsz as usize) < size_of::<DmaUnmap>() {
            return Err(errno::EINVAL);
        }
        match unmap.flags {
            dma::ALL if unmap.address == 0 && unmap.size == 0 => Ok(self.clear(space)),
            0 => {
                let there = self.windows.get(&unmap.address).ok_or(errno::ENOENT)?;
                if there.size != unmap.size {
                    return Err(errno::EINVAL);
                }
                let gone = self.windows.remove(&unmap.address);
                Ok(gone.and_then(|window| self.release(space, unmap.address, &window)))
            }
            _ => Err(errno::EINVAL),
        }
    }

    fn release(&mut self, space: &AddressSpace, address: u64, window: &Window) -> Option<Unmapping> {
        window.arena.as_ref()?;
        self.bytes -= window.size;
        space.unmap(address).ok()
    }

    /// Drops every window.
    pub(crate) fn clear(&mut self, space: &AddressSpace) -> Option<Unmapping> {
        let windows = std::mem::take(&mut self.windows);
        self.bytes = 0;
        let usable = windows.iter().filter(|(_, window)| window.arena.is_some());
        let addresses: Vec<u64> = usable.map(|(&address, _)| address).collect();
        (!addresses.is_empty()).then(|| space.unmap_many(&addresses))
    }
}

fn file_id(fd: &OwnedFd) -> Result<FileId, u32> {
    let stat = rustix::fs::fstat(fd).map_err(|_| errno::EINVAL)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Maps a window's file, and its memory into the space.
fn share(space: &AddressSpace, map: &DmaMap, fd: OwnedFd) -> Result<Arc<Arena>, u32> {
    if map.flags & (dma::READ | dma::WRITE) == 0 {
        return Err(errno::EINVAL);
    }
    let len = usize::try_from(map.size).map_err(|_| errno::ENOSPC)?;
    let writable = map.flags & dma::WRITE != 0;
    let access = if writable { Access::ReadWrite } else { Access::Read };
    let arena = Arena::map_client(fd, map.offset, len, access).map_err(|error| match error {
        MemoryError::Kernel { .. } => errno::EFAULT,
        _ => errno::EINVAL,
    })?;
    let memory = DmaBuffer::new(Arc::clone(&arena), 0, len).ok_or(errno::EINVAL)?;
    space.map_at(map.address, &memory, writable).map_err(|error| match error {
        SpaceError::Overlap { .. } => errno::EEXIST,
        SpaceError::Full => errno::ENOSPC,
        SpaceError::Device(_) => errno::EIO,
        _ => errno::EINVAL,
    })?;
    Ok(arena)
}
