//! VFIO: a physical PCI function as a backing of the device seam.
//!
//! [`VfioSpace`] is one I/O address space: an IOAS of iommufd, or a container with a type1v2 IOMMU. Functions join it as they are
//! opened ([`VfioFunction::open`]); every mapping of its [`AddressSpace`] is mapped for all of them. A function is registers and
//! doorbells in mapped memory where the kernel lets BAR0 be mapped, MSI-X vectors as eventfds, a function-level reset, and word
//! of a device that goes away. `dray device bind` (or [`crate::pci`]) gives a function to vfio-pci.
//!
//! **Which interface.** [`IommuChoice::Auto`] takes iommufd where both `/dev/iommu` and the function's own file under
//! `/dev/vfio/devices` are there, and group and container otherwise. Debian's kernels have neither iommufd's file nor no-IOMMU
//! mode: those two are written after the kernel's headers and **untested**.
//!
//! **Without an IOMMU** ([`IommuChoice::UnsafeNone`], never chosen by itself) a device sees physical addresses and can write
//! anywhere. Addresses of the space are then physical ones, out of the page map: memory that is not in one piece is refused,
//! which leaves huge pages and pieces of at most 2 MiB. Memory is locked while it is mapped. A warning says so each time.
//!
//! **In the right order.** A function that is dropped is first kept from DMA (bus mastering off, then a reset where it has one);
//! what was mapped for it is unmapped by whoever mapped it, before or after: with an IOMMU a late access meets nothing, without
//! one the driver's own order (disable, then free) and this one are what keeps it harmless.
//!
//! The parts that read what the kernel says are in `info.rs` and `pagemap.rs` and tested here; what needs a kernel with VFIO is
//! tested in a virtual machine (`tests/tests/vfio_guest.rs`).
//!
//! Not here: INTx and MSI, ROM and BARs other than BAR0, migration of a device by vendor drivers (VFIO's own states), PASIDs,
//! big-endian hosts and those where a store to a device needs a barrier of its own (this is for x86-64).

mod dma;
mod error;
mod function;
mod info;
mod pagemap;
mod space;
mod sys;

pub use error::VfioError;
pub use function::VfioFunction;
pub use space::VfioSpace;

/// Which interface of the kernel stands between devices and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IommuChoice {
    /// iommufd where the kernel offers it, group and container otherwise.
    #[default]
    Auto,
    /// `/dev/iommu`.
    Iommufd,
    /// `/dev/vfio/vfio`, type1v2.
    Type1,
    /// No IOMMU: the device can write everywhere.
    UnsafeNone,
}

impl std::fmt::Display for IommuChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Iommufd => "iommufd",
            Self::Type1 => "type1",
            Self::UnsafeNone => "unsafe-none",
        })
    }
}

impl std::str::FromStr for IommuChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Auto, Self::Iommufd, Self::Type1, Self::UnsafeNone]
            .into_iter()
            .find(|choice| choice.to_string() == text)
            .ok_or_else(|| format!("\"{text}\" is none of auto, iommufd, type1, unsafe-none"))
    }
}

/// How a function is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfioConfig {
    /// Most interrupt vectors to set up; 0 for a driver that polls.
    pub vectors: u16,
    /// For a physical function whose virtual functions are in use through VFIO, and for those: the secret that they share.
    pub vf_token: Option<[u8; 16]>,
}

impl Default for VfioConfig {
    fn default() -> Self {
        Self { vectors: 64, vf_token: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for choice in [IommuChoice::Auto, IommuChoice::Iommufd, IommuChoice::Type1, IommuChoice::UnsafeNone] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("none".parse::<IommuChoice>().is_err());
    }
}
