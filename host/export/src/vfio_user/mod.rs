//! The vfio-user server: an NVMe controller as a PCI function on a Unix socket, for hypervisors (protocol 0.9.2).
//!
//! It stands on the guest's side of a [`Slot`](dray_device::slot::Slot): register accesses of the client go to the slot's BAR,
//! doorbells are words of memory that the client maps, its memory is mapped into the slot's address space, its eventfds become
//! the slot's event lines. So whatever happens behind the slot (another controller is put there, a namespace's backing is
//! exchanged) the client does not see.
//!
//! - [`server`]: [`VfioUserServer`], where the messages meet the device; start reading there;
//! - `connection`: bytes and descriptors to messages and back, bounded;
//! - `region`, `pci`: what the client reads and writes; `irq`: interrupt vectors; `dma`: the client's memory;
//! - `feature`: the migration states, the migration stream and the log of written pages, over
//!   [`MigrationHooks`](crate::hooks::MigrationHooks);
//! - [`counters`]: what happened, refusals above all.
//!
//! Not here: MSI (interrupts are MSI-X, or the pin's), ioeventfds (doorbells are mapped), DMA by message (a window without a
//! descriptor is kept, and not usable), the second socket for commands of the server (there are none), a dirty bitmap with
//! DMA_UNMAP (gone from the protocol).

pub mod counters;
mod connection;
mod dma;
mod feature;
mod irq;
mod pci;
mod region;
pub mod server;

pub use counters::VfioUserCounters;
pub use pci::PciIds;
pub use server::{AttachError, Bar0Map, PeerPolicy, VfioUserConfig, VfioUserServer};
