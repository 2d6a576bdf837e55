//! The PCI functions of the machine as sysfs shows them: what they are, who has them, what the kernel uses them for; and taking
//! them away from their driver and giving them back.
//!
//! [`Inventory`] reads a tree (`/`, or one that a test has made up): `sys/bus/pci`, `sys/class/block`, `proc`. Nothing is cached:
//! who has a function can change at any time. What is read is bounded, and text that makes no sense is treated as not being
//! there.
//!
//! [`Inventory::bind`] gives a function to vfio-pci unless something of the machine lives on it ([`Use`]); [`Inventory::unbind`]
//! gives it back. Both look what has come of it. [`KernelController`] sends admin commands through the kernel's driver, for what
//! is asked of a controller that the kernel has.

mod address;
mod bind;
mod inventory;
mod kernel;
mod usage;

pub use address::{BadAddress, PciAddress};
pub use bind::{BindError, Bound, VFIO_PCI};
pub use inventory::{Block, Inventory, NvmeOfKernel, PciFunction, Sriov};
pub use kernel::KernelController;
pub use usage::Use;

#[cfg(test)]
mod made_up;
