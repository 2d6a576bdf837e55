//! Physical functions on the command line: `pci:ADDRESS`, opened through VFIO for as long as someone looks at it.

use super::session::Session;
use clap::Args;
use dray_device::memory::Pages;
use dray_device::pci::PciAddress;
use dray_device::vfio::{IommuChoice, VfioConfig, VfioError, VfioFunction, VfioSpace};
use dray_driver::DriverConfig;
use miette::miette;
use std::sync::Arc;

/// What a physical function is called by.
pub(super) const PCI: &str = "pci:";

/// How physical functions are opened.
#[derive(Clone, Copy, Debug, Args)]
pub(in super::super) struct PciArgs {
    /// For pci: devices, what stands between them and memory: auto, iommufd, type1, or unsafe-none (no IOMMU: the drive can write
    /// everywhere)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub(super) iommu: IommuChoice,
    /// For pci: devices, the VF token: of a virtual function whose physical function is driven through VFIO, and of that
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    pub(super) vf_token: Option<[u8; 16]>,
}

/// Reads a UUID; hyphens may be anywhere.
pub(super) fn uuid(text: &str) -> Result<[u8; 16], String> {
    let bad = || format!("\"{text}\" is no UUID: 32 hexadecimal digits are, like 83f69257-0c9b-4b4f-a3e9-b4bb1d3c2a55");
    crate::config::device::uuid(text).ok_or_else(bad)
}

/// The address of `pci:ADDRESS`, or of an address alone.
pub(super) fn address(device: &str) -> miette::Result<PciAddress> {
    device.strip_prefix(PCI).unwrap_or(device).parse().map_err(|error| miette!("{error}"))
}

impl PciArgs {
    /// Opens a function that is bound to vfio-pci, in an I/O address space of its own.
    pub(super) fn open(&self, address: PciAddress, vectors: u16) -> Result<Arc<VfioFunction>, VfioError> {
        let space = VfioSpace::open(self.iommu)?;
        VfioFunction::open(&address, &space, &VfioConfig { vectors, vf_token: self.vf_token })
    }

    /// What drives it: without an IOMMU only huge pages lie as a device must see them.
    pub(super) fn driver(&self) -> DriverConfig {
        let pages = if self.iommu == IommuChoice::UnsafeNone { Pages::PreferHuge } else { Pages::Small };
        DriverConfig { pages, ..DriverConfig::default() }
    }

    /// Opens a function and brings its controller up. Nothing uses interrupts: it is polled.
    pub(super) fn session(&self, device: &str, config: DriverConfig) -> miette::Result<Session<'static>> {
        let address = address(device)?;
        let function = self.open(address, 0).map_err(|error| miette!("{error}"))?;
        Session::physical(&format!("{PCI}{address}"), function, config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_addresses_are_read() {
        let token = uuid("83f69257-0c9b-4b4f-a3e9-b4bb1d3c2a55").expect("a UUID");
        assert_eq!((token[0], token[15]), (0x83, 0x55));
        for bad in ["", "83f6", "83f69257-0c9b-4b4f-a3e9-b4bb1d3c2a5g", "+3f692570c9b4b4fa3e9b4bb1d3c2a55"] {
            assert!(uuid(bad).is_err(), "{bad}");
        }
        let both = ["pci:0000:01:00.0", "01:00.0"].map(|text| address(text).expect("an address"));
        assert_eq!(both[0], both[1]);
        assert!(address("pci:nvme0").is_err());
    }
}
