//! Puts a software controller before someone: the vfio-user server for hypervisors, the NVMe/TCP target for hosts.
//!
//! A server stands on the guest's side of a [`Slot`](dray_device::slot::Slot), so that whatever happens behind the slot (a move to
//! another controller, the exchange of a namespace's backing) works under it unchanged. It is a value that is polled; sockets
//! come in as values, and whoever binds, accepts and sleeps is somebody else.
//!
//! - [`vfio_user`]: a PCI function on a Unix socket;
//! - [`nvme_tcp`]: a subsystem on TCP;
//! - [`hooks`]: where a migration plugs in.

pub mod hooks;
pub mod nvme_tcp;
pub mod vfio_user;
