//! What follows the mappings of an I/O address space into the kernel.

use super::error::VfioError;
use super::{pagemap, sys};
use crate::memory::DmaBuffer;
use crate::space::{MapFollower, Mapping, Placer};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Where mappings go.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A container with a type1v2 IOMMU.
    Container(Arc<OwnedFd>),
    /// An IOAS of this descriptor of `/dev/iommu`.
    Ioas(Arc<OwnedFd>, u32),
    /// Nowhere: the device sees physical addresses.
    Physical,
}

impl Target {
    fn map(&self, mapping: &Mapping) -> Result<(), VfioError> {
        let Mapping { iova, memory, writable } = mapping;
        let len = sys::whole_pages(memory.len() as u64);
        match self {
            Self::Container(fd) => sys::map_dma(fd.as_fd(), *iova, memory, *writable).map_err(|e| VfioError::of_map(e, len)),
            Self::Ioas(fd, ioas) => sys::ioas_map(fd.as_fd(), *ioas, *iova, memory, *writable).map_err(|e| VfioError::of_map(e, len)),
            Self::Physical if physical(memory)? != *iova => Err(VfioError::Physical(format!("{iova:#x} is not where the memory is"))),
            Self::Physical => Ok(()),
        }
    }

    fn unmap(&self, mapping: &Mapping) -> io::Result<()> {
        match self {
            Self::Container(fd) => sys::unmap_dma(fd.as_fd(), mapping.iova, &mapping.memory),
            Self::Ioas(fd, ioas) => sys::ioas_unmap(fd.as_fd(), *ioas, mapping.iova, &mapping.memory),
            // It stays locked as long as there is any of its arena, which is all that locked pages cost.
            Self::Physical => Ok(()),
        }
    }
}

/// Locks memory and says where it is.
fn physical(memory: &DmaBuffer) -> Result<u64, VfioError> {
    let (address, len) = sys::address_of(memory);
    sys::lock_memory(memory).map_err(|_| VfioError::LockedMemory { len })?;
    let entries = pagemap::entries(address, len).map_err(VfioError::kernel("/proc/self/pagemap"))?;
    pagemap::physical(&entries).map_err(|why| VfioError::Physical(why.to_string()))
}

/// Tells the kernel of memory that comes and goes.
pub(super) struct DmaFollower(pub(super) Target);

impl MapFollower for DmaFollower {
    fn mapped(&mut self, mapping: &Mapping) -> io::Result<()> {
        Ok(self.0.map(mapping)?)
    }

    fn unmapped(&mut self, mapping: &Mapping) {
        if let Err(error) = self.0.unmap(mapping) {
            // Devices may go on accessing it. Nothing can be taken back here: the memory is kept for good, so that it becomes
            // nobody else's.
            std::mem::forget(mapping.memory.clone());
            let iova = mapping.iova;
            tracing::error!(%error, "DMA mapping {iova:#x} could not be taken away; its memory is kept");
        }
    }
}

/// Physical addresses for a space without an IOMMU.
pub(super) struct PhysicalPlacer;

impl Placer for PhysicalPlacer {
    fn place(&mut self, memory: &DmaBuffer) -> io::Result<u64> {
        Ok(physical(memory)?)
    }
}
