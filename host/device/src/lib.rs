//! The seams of Dray, and the one room with unsafe code.
//!
//! - [`memory`], [`space`]: arenas that devices read and write, and the address spaces they are mapped in; [`fault`]: memory
//!   of others that goes away;
//! - [`function`], [`bar`], [`slot`]: the device seam, and its in-process loopback: registers, doorbells, event lines, the
//!   interrupt [`pin`], and the slot that lets a guest keep its place when the controller behind it changes;
//! - [`command`]: the command seam, for controllers that have no registers for us;
//! - [`backing`]: where the blocks of a software controller's namespace are; [`uring`]: files by io_uring;
//! - [`socket`]: byte streams that carry descriptors; [`vfio_user`]: a function over one;
//! - [`poll`]: the poller seam: time, progress, jobs; [`planted`]: faults for the simulator to find;
//! - [`watchdog`]: the timer that resets a machine whose first process is stuck.
//!
//! Not here yet: VFIO as a further backing of the device seam, io_uring passthrough for the command seam. Start
//! reading at [`function`] and [`slot`].

#[cfg(not(target_endian = "little"))]
compile_error!("NVMe structures are little-endian, and so must be the host");

pub mod backing;
pub mod bar;
pub mod command;
pub mod event;
pub mod fault;
pub mod function;
mod line;
pub mod memory;
pub mod pin;
pub mod planted;
pub mod poll;
pub mod random;
#[cfg(not(loom))]
mod scan;
pub mod slot;
pub mod socket;
pub mod space;
mod sync;
pub mod uring;
pub mod vfio_user;
pub mod watchdog;

#[cfg(all(test, loom))]
mod loom_tests;
