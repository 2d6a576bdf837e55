//! What a driver and its queues are set up with.

use dray_device::memory::Pages;

/// Limits and time-outs of one driver; fixed while it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverConfig {
    /// Entries of the admin queues, 8 to 4,096, rounded down to a power of two (Base 2.3 §3.1.4.8).
    pub admin_entries: u16,
    /// Asynchronous Event Requests kept outstanding; the controller's AERL and half the admin queue bound it.
    pub aers: u8,
    /// Milliseconds that CSTS.RDY may take to follow CC.EN; 0 = what CAP.TO says.
    pub ready_timeout_ms: u32,
    /// Milliseconds that an admin command may take before it is aborted; 0 = any.
    pub admin_timeout_ms: u32,
    /// Milliseconds that an I/O command may take before it is aborted; 0 = any.
    pub io_timeout_ms: u32,
    /// Which pages queues are made of.
    pub pages: Pages,
    /// I/O queue pairs asked for (Number of Queues, feature 07h).
    pub io_queues: u16,
    /// Most bytes of data in one I/O command, whatever MDTS allows; sizes the PRP lists that are set up at start.
    pub max_transfer_bytes: usize,
    /// Use shadow doorbells (Doorbell Buffer Config) where doorbells are trapped and the controller offers them.
    pub shadow_doorbells: bool,
    /// CSTS.RDY that falls while the controller is in use is a reset that somebody else has made, and is answered at once. For
    /// functions that cannot be pointed at another controller meanwhile: those of real devices.
    pub watch_ready: bool,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            admin_entries: 32,
            aers: 4,
            ready_timeout_ms: 0,
            admin_timeout_ms: 60_000,
            io_timeout_ms: 30_000,
            pages: Pages::Small,
            io_queues: 64,
            max_transfer_bytes: 1 << 20,
            shadow_doorbells: true,
            watch_ready: false,
        }
    }
}

/// One I/O queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairConfig {
    /// Entries of both queues: rounded down to a power of two, at least 2, at most 4,096 and what CAP.MQES allows. One less
    /// than that many commands can be outstanding.
    pub entries: u16,
    /// The interrupt vector of the completion queue; `None` = interrupts off.
    pub vector: Option<u16>,
}

/// Nanoseconds of a time-out in milliseconds; 0 stands for "never".
pub(crate) fn timeout_ns(ms: u32) -> u64 {
    if ms == 0 { u64::MAX } else { u64::from(ms) * 1_000_000 }
}

/// Entries rounded down to a power of two within bounds.
pub(crate) fn queue_entries(wanted: u32, least: u32, most: u32) -> u32 {
    let bounded = wanted.min(most).max(least);
    1 << bounded.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_powers_of_two_within_bounds() {
        assert_eq!(queue_entries(1000, 2, 4096), 512);
        assert_eq!(queue_entries(0, 2, 4096), 2);
        assert_eq!(queue_entries(65_535, 2, 1024), 1024);
        assert_eq!(queue_entries(64, 2, 33), 32);
    }
}
