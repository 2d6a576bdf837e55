//! NVMe passthrough by io_uring: commands for controllers that the kernel's driver owns (`/dev/ngXnY`, `/dev/nvmeX`).
//!
//! A command is the 80 bytes behind a 128-byte submission entry ([`abi`]), its outcome a 32-byte completion entry: the NVMe status
//! or an errno in `res`, the 64-bit result beside it ([`outcome`]). [`PassthruRing`] submits and polls, holds the memory of what is
//! under way, and says of each command once how it ended ([`ring`]); [`carrier`] is the kernel's side of it, which tests replace.
//! Which device that is, what it can take and what its errors mean to people is the driver's business (`dray_driver::passthru`).

pub mod abi;
pub mod carrier;
pub mod ioctl;
pub mod outcome;
pub mod ring;
#[cfg(all(test, not(loom)))]
mod tests;

pub use abi::{Channel, UringCommand};
pub use carrier::{Carrier, CarrierOptions, SetupError, Uring};
pub use outcome::{HostFault, Outcome};
pub use ring::{Bounds, PassthruRing, Request, Ring};
