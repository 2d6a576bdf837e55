//! Features of one controller (Base 2.3 §5.2.26.1). None is saveable; a reset brings the defaults back.

use dray_device::poll::Time;
use dray_nvme::feature::{Arbitration, AsyncEventConfig, InterruptCoalescing};

/// Current values.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    pub(crate) arbitration: u32,
    pub(crate) power: u32,
    /// Over, under.
    pub(crate) temperature: [u16; 2],
    pub(crate) error_recovery: u32,
    pub(crate) coalescing: InterruptCoalescing,
    /// Coalescing disabled, by vector.
    pub(crate) coalescing_disabled: Vec<bool>,
    pub(crate) write_atomicity: u32,
    pub(crate) events: AsyncEventConfig,
    /// Milliseconds as set, and when.
    pub(crate) timestamp: Option<(u64, Time)>,
    pub(crate) host_id: [u8; 16],
    pub(crate) host_behavior: [u8; 512],
    /// I/O submission and completion queues granted, 0's based.
    pub(crate) queues: Option<u32>,
}

impl Features {
    pub(crate) fn new(vectors: u16) -> Self {
        Self {
            arbitration: Arbitration::new().with_ab(7).into_bits(),
            power: 0,
            temperature: [343, 0],
            error_recovery: 0,
            coalescing: InterruptCoalescing::new(),
            coalescing_disabled: vec![false; usize::from(vectors)],
            write_atomicity: 0,
            events: AsyncEventConfig::new(),
            timestamp: None,
            host_id: [0; 16],
            host_behavior: [0; 512],
            queues: None,
        }
    }

    /// Commands fetched from one queue before the next has its turn.
    #[inline]
    pub(crate) fn burst(&self) -> u32 {
        match Arbitration::from_bits(self.arbitration).ab() {
            7 => u32::MAX,
            n => 1 << n,
        }
    }

    /// Entries (0's based) and nanoseconds that a vector's interrupts may be held; 0 entries = not at all.
    #[inline]
    pub(crate) fn coalescing(&self, vector: u16) -> (u32, u64) {
        let disabled = self.coalescing_disabled.get(usize::from(vector)).copied().unwrap_or(true);
        let time = self.coalescing.time();
        if disabled || time == 0 { (0, 0) } else { (u32::from(self.coalescing.thr()), u64::from(time) * 100_000) }
    }

    /// The timestamp now, in milliseconds, and its origin (1 = set by the host).
    pub(crate) fn timestamp(&self, now: Time) -> (u64, u8) {
        match self.timestamp {
            Some((value, at)) => (value + now.ns_since(at) / 1_000_000, 1),
            None => (now.0 / 1_000_000, 0),
        }
    }
}
