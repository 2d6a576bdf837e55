//! `dray device bind` and `dray device unbind`: who has a function.

use super::physical::address;
use super::print;
use crate::devices::refused;
use dray_device::pci::{Bound, Inventory, PciFunction};
use std::process::ExitCode;

/// Gives a function to vfio-pci.
pub(in super::super) fn bind(device: &str) -> miette::Result<ExitCode> {
    let address = address(device)?;
    let bound = Inventory::of_this_machine().bind(address).map_err(refused)?;
    let group = bound.function.group.map_or_else(|| "no IOMMU group".into(), |group| format!("IOMMU group {group}"));
    let mut text = match bound.already {
        true => format!("{address} is bound to vfio-pci already, {group}\n"),
        false => format!("{address} is bound to vfio-pci now, {group}: `dray device identify pci:{address}` looks at it\n"),
    };
    if !bound.in_the_way.is_empty() {
        text += &format!("but the group cannot be used while drivers have other devices of it: {}\n", bound.in_the_way.join(", "));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Gives a function back to the kernel.
pub(in super::super) fn unbind(device: &str) -> miette::Result<ExitCode> {
    let address = address(device)?;
    let Bound { function, already, .. } = Inventory::of_this_machine().unbind(address).map_err(refused)?;
    let was = if already { "has it already" } else { "has it now" };
    print(&format!("{address}: the driver {} {was}\n", owner(&function)))?;
    Ok(ExitCode::SUCCESS)
}

/// The driver that has a function.
pub(super) fn owner(function: &PciFunction) -> &str {
    function.driver.as_deref().unwrap_or("none")
}
