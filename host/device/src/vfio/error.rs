//! Why a physical function could not be taken, mapped or driven.

use crate::memory::MemoryError;
use crate::pci::PciAddress;
use crate::space::SpaceError;
use std::io;

/// Why something of VFIO did not work. The messages say what an administrator can do about it.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The kernel has no interface of the kind that was asked for.
    #[error("VFIO is not there: {what} cannot be opened ({source}); load the kernel modules vfio-pci and vfio_iommu_type1")]
    NoInterface {
        /// The file.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no such function.
    #[error("{0}: there is no such PCI function")]
    NoFunction(PciAddress),
    /// Another driver has it.
    #[error("{address} is not bound to vfio-pci but to {driver}: `dray device bind {address}` takes it over")]
    NotBound {
        /// The function.
        address: PciAddress,
        /// Its driver, or "no driver".
        driver: String,
    },
    /// The machine's IOMMU does not cover it.
    #[error("{0} is in no IOMMU group: the IOMMU is off (firmware settings; intel_iommu=on or amd_iommu=on for the kernel)")]
    NoGroup(PciAddress),
    /// Devices of its group belong to other drivers of the kernel.
    #[error("IOMMU group {group} of {address} cannot be used while drivers of the kernel have other devices of it: {others}")]
    NotViable {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// Those devices and their drivers.
        others: String,
    },
    /// Another process, or another I/O address space of this one, has it.
    #[error("{address} is in use by another process, or in another I/O address space of this one (a group is in one at a time)")]
    InUse {
        /// The function.
        address: PciAddress,
    },
    /// The user may not.
    #[error("{what}: not permitted; root may, or who owns {file}")]
    NotPermitted {
        /// What was tried.
        what: String,
        /// The file.
        file: String,
    },
    /// The kernel says no.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel, or the device, lacks something, or says something that cannot be.
    #[error("{address}: {what}")]
    Unsupported {
        /// The function.
        address: PciAddress,
        /// What is missing.
        what: &'static str,
    },
    /// The I/O address space lacks something.
    #[error("the I/O address space cannot be used: {0}")]
    Space(&'static str),
    /// As many mappings as the kernel takes for one container (its module parameter dma_entry_limit).
    #[error("the kernel takes no further DMA mapping for this I/O address space (vfio_iommu_type1's dma_entry_limit)")]
    TooManyMappings,
    /// RLIMIT_MEMLOCK.
    #[error("{len} bytes cannot be pinned for DMA: over the limit of locked memory (ulimit -l, LimitMEMLOCK=)")]
    LockedMemory {
        /// Bytes of the mapping.
        len: u64,
    },
    /// Without an IOMMU a device sees physical addresses, and memory must lie as it is mapped.
    #[error("without an IOMMU the device sees physical addresses, and {0}")]
    Physical(String),
    /// A function that writes its queues through another one's domain needs both in one I/O address space.
    #[error("BAR0 cannot be mapped: {0}")]
    Memory(#[from] MemoryError),
    /// Memory that was mapped before the function joined cannot be mapped for it.
    #[error("memory of the I/O address space cannot be mapped for {address}: {source}")]
    Join {
        /// The function.
        address: PciAddress,
        /// Why.
        source: SpaceError,
    },
}

impl VfioError {
    pub(super) fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Kernel { what, source }
    }

    /// What the kernel's refusal of a DMA mapping means.
    pub(super) fn of_map(source: io::Error, len: u64) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSPC) => Self::TooManyMappings,
            Some(libc::ENOMEM) => Self::LockedMemory { len },
            _ => Self::Kernel { what: format!("mapping {len} bytes for DMA"), source },
        }
    }

    /// The refusal behind an error of the address space, if it was VFIO's.
    #[must_use]
    pub fn behind(error: &SpaceError) -> Option<&Self> {
        match error {
            SpaceError::Device(error) => error.get_ref()?.downcast_ref(),
            _ => None,
        }
    }
}

impl From<VfioError> for io::Error {
    fn from(error: VfioError) -> Self {
        let kind = match &error {
            VfioError::Kernel { source, .. } => source.kind(),
            VfioError::TooManyMappings => io::ErrorKind::StorageFull,
            VfioError::LockedMemory { .. } => io::ErrorKind::OutOfMemory,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_mapping_says_which_limit_it_met() {
        let refused = |errno| SpaceError::Device(VfioError::of_map(io::Error::from_raw_os_error(errno), 4096).into());
        assert!(matches!(VfioError::behind(&refused(libc::ENOSPC)), Some(VfioError::TooManyMappings)));
        assert!(matches!(VfioError::behind(&refused(libc::ENOMEM)), Some(VfioError::LockedMemory { len: 4096 })));
        assert!(matches!(VfioError::behind(&refused(libc::EINVAL)), Some(VfioError::Kernel { .. })));
        assert!(VfioError::behind(&SpaceError::Full).is_none());
        assert!(refused(libc::ENOSPC).to_string().contains("dma_entry_limit"));
    }
}
