//! The guest of a demo, test or bench: tagged writes, a ledger that outlives the process, and the comparison at the end.
//!
//! - [`tag`]: what a tagged block looks like, so that lost, torn, misplaced and rolled-back writes can be told apart;
//! - [`ledger`]: which writes were issued and which were acknowledged, in memory shared with a file;
//! - [`guest`]: the guest itself, a [`Poll`](dray_device::poll::Poll) over a driver of its own on its slot's function;
//! - [`verify`]: the comparison by readers of its own ([`reader`]) after all controllers are gone;
//! - [`histogram`]: latencies; [`pattern`]: content for disks.
//!
//! Block numbers here are in units of [`tag::BLOCK_BYTES`] (4 KiB), whatever the namespace's LBA format is: the guest
//! multiplies by the LBAs in a block when it submits a command.
//!
//! Not here yet: writes larger than one block, flushes, Deallocate and Write Zeroes by the guest; interrupts (completions are
//! polled). Start reading at [`verify`] for what is promised, then at [`guest`].

pub mod guest;
pub mod histogram;
pub mod ledger;
pub mod pattern;
pub mod reader;
pub mod tag;
pub mod verify;

/// A 64-bit mix in which every input bit reaches every output bit (two multiply-xorshift rounds).
pub(crate) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let value = (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    value ^ (value >> 32)
}
