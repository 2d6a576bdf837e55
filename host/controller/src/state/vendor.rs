//! The vendor part of a controller's state: what the NVMe controller state, version 0, leaves out (Base 2.3 §5.2.17.1.3).
//!
//! A record of fixed size with a magic number, a version, its own length and a checksum. The checksum finds what was damaged
//! on its way, not what was forged: each value is judged again by the controller that takes it.

use arrayvec::ArrayVec;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most asynchronous event requests outstanding (AERL + 1).
pub const MAX_AERS: usize = 16;

/// Interrupt vectors whose coalescing can be disabled.
pub const MAX_VECTORS: usize = 512;

/// Bytes of the vendor part: whole dwords.
pub(super) const VENDOR_BYTES: usize = size_of::<Wire>();

const MAGIC: [u8; 8] = *b"DRAYCTRL";
/// 2 has the shadow doorbells.
const VERSION: u16 = 2;

/// Features of a controller, as Get Features would show them (Base 2.3 §5.2.26.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Arbitration (01h), CDW11.
    pub arbitration: u32,
    /// Power Management (02h), CDW11.
    pub power_management: u32,
    /// Temperature Threshold (04h), over-temperature of the composite temperature, kelvin.
    pub temperature_over: u16,
    /// Temperature Threshold (04h), under-temperature of the composite temperature, kelvin.
    pub temperature_under: u16,
    /// Error Recovery (05h), CDW11.
    pub error_recovery: u32,
    /// Volatile Write Cache (06h): WCE.
    pub volatile_write_cache: bool,
    /// Interrupt Coalescing (08h): THR, entries, 0's based.
    pub coalescing_threshold: u8,
    /// Interrupt Coalescing (08h): TIME, in 100 µs.
    pub coalescing_time: u8,
    /// Interrupt Vector Configuration (09h): CD, bit v % 64 of word v / 64 for vector v.
    pub coalescing_disabled: [u64; MAX_VECTORS / 64],
    /// Write Atomicity Normal (0Ah), CDW11.
    pub write_atomicity: u32,
    /// Asynchronous Event Configuration (0Bh), CDW11.
    pub async_event_config: u32,
    /// Timestamp (0Eh): milliseconds since 1970-01-01 UTC, 48 bits, when the state was taken.
    pub timestamp_ms: u64,
    /// Timestamp (0Eh): the attribute byte (origin and SYNCH).
    pub timestamp_attributes: u8,
    /// Host Behavior Support (16h): the first bytes; the others are reserved.
    pub host_behavior: [u8; 8],
    /// Host Identifier (81h), extended.
    pub host_id: [u8; 16],
    /// Number of Queues (07h): I/O submission queues granted; 0 = not asked for since the reset.
    pub granted_sqs: u16,
    /// Number of Queues (07h): I/O completion queues granted; 0 = not asked for since the reset.
    pub granted_cqs: u16,
    /// Guest limit (C0h), commands per second; 0 = none.
    pub guest_limit: u32,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            arbitration: 0,
            power_management: 0,
            temperature_over: 0,
            temperature_under: 0,
            error_recovery: 0,
            volatile_write_cache: true,
            coalescing_threshold: 0,
            coalescing_time: 0,
            coalescing_disabled: [0; MAX_VECTORS / 64],
            write_atomicity: 0,
            async_event_config: 0,
            timestamp_ms: 0,
            timestamp_attributes: 0,
            host_behavior: [0; 8],
            host_id: [0; 16],
            granted_sqs: 0,
            granted_cqs: 0,
            guest_limit: 0,
        }
    }
}

/// Registers, admin queue, features and asynchronous events of a controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VendorState {
    /// CC.
    pub cc: u32,
    /// CSTS.
    pub csts: u32,
    /// AQA.
    pub aqa: u32,
    /// ASQ.
    pub asq: u64,
    /// ACQ.
    pub acq: u64,
    /// INTMS: interrupts masked.
    pub intms: u32,
    /// Admin submission queue: the next entry to be fetched.
    pub admin_sq_head: u16,
    /// Admin submission queue: the last value of the tail doorbell.
    pub admin_sq_tail: u16,
    /// Admin completion queue: the last value of the head doorbell.
    pub admin_cq_head: u16,
    /// Admin completion queue: the next slot to be posted.
    pub admin_cq_tail: u16,
    /// Admin completion queue: the phase tag of the next entry.
    pub admin_cq_phase: bool,
    /// Falls of CC.EN that the controller had seen (`Bar::resets`): one more at the slot is a reset to be done.
    pub bar_resets: u32,
    /// CIDs of the asynchronous event requests that are outstanding, oldest first.
    pub aer_cids: ArrayVec<u16, MAX_AERS>,
    /// Asynchronous event types masked until their log page is read: bit t for type t (Base 2.3 §5.2.2).
    pub masked_events: u32,
    /// Doorbell Buffer Config: the shadow page and the event index page, if the guest has configured them.
    pub shadow_doorbells: Option<[u64; 2]>,
    /// Features.
    pub features: Features,
}

/// The record; every field is unaligned, so there is no padding.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: U16,
    bytes: U16,
    cc: U32,
    csts: U32,
    aqa: U32,
    asq: U64,
    acq: U64,
    intms: U32,
    admin_sq_head: U16,
    admin_sq_tail: U16,
    admin_cq_head: U16,
    admin_cq_tail: U16,
    bar_resets: U32,
    masked_events: U32,
    aer_cids: [U16; MAX_AERS],
    aer_count: u8,
    /// Bit 0 the admin completion queue's phase tag, bit 1 WCE, bit 2 shadow doorbells; others 0.
    flags: u8,
    coalescing_threshold: u8,
    coalescing_time: u8,
    arbitration: U32,
    power_management: U32,
    temperature_over: U16,
    temperature_under: U16,
    error_recovery: U32,
    write_atomicity: U32,
    async_event_config: U32,
    coalescing_disabled: [U64; MAX_VECTORS / 64],
    /// Milliseconds in bits 47:0, the attribute byte in bits 55:48, as in the feature's own data.
    timestamp: U64,
    host_behavior: [u8; 8],
    host_id: [u8; 16],
    granted_sqs: U16,
    granted_cqs: U16,
    guest_limit: U32,
    /// 0 where there are none.
    shadow_doorbells: [U64; 2],
    /// FNV-1a of everything before.
    checksum: U64,
}

const _: () = assert!(VENDOR_BYTES.is_multiple_of(4) && VENDOR_BYTES <= u16::MAX as usize);

const CHECKSUM_AT: usize = std::mem::offset_of!(Wire, checksum);
const MILLIS: u64 = (1 << 48) - 1;

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl VendorState {
    /// The record's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let features = &self.features;
        let mut aer_cids = [U16::ZERO; MAX_AERS];
        for (place, cid) in aer_cids.iter_mut().zip(&self.aer_cids) {
            *place = (*cid).into();
        }
        let timestamp = (features.timestamp_ms & MILLIS) | u64::from(features.timestamp_attributes) << 48;
        let wire = Wire {
            magic: MAGIC,
            version: VERSION.into(),
            bytes: (VENDOR_BYTES as u16).into(),
            cc: self.cc.into(),
            csts: self.csts.into(),
            aqa: self.aqa.into(),
            asq: self.asq.into(),
            acq: self.acq.into(),
            intms: self.intms.into(),
            admin_sq_head: self.admin_sq_head.into(),
            admin_sq_tail: self.admin_sq_tail.into(),
            admin_cq_head: self.admin_cq_head.into(),
            admin_cq_tail: self.admin_cq_tail.into(),
            bar_resets: self.bar_resets.into(),
            masked_events: self.masked_events.into(),
            aer_cids,
            aer_count: self.aer_cids.len() as u8,
            flags: u8::from(self.admin_cq_phase) | u8::from(features.volatile_write_cache) << 1
                | u8::from(self.shadow_doorbells.is_some()) << 2,
            coalescing_threshold: features.coalescing_threshold,
            coalescing_time: features.coalescing_time,
            arbitration: features.arbitration.into(),
            power_management: features.power_management.into(),
            temperature_over: features.temperature_over.into(),
            temperature_under: features.temperature_under.into(),
            error_recovery: features.error_recovery.into(),
            write_atomicity: features.write_atomicity.into(),
            async_event_config: features.async_event_config.into(),
            coalescing_disabled: features.coalescing_disabled.map(Into::into),
            timestamp: timestamp.into(),
            host_behavior: features.host_behavior,
            host_id: features.host_id,
            granted_sqs: features.granted_sqs.into(),
            granted_cqs: features.granted_cqs.into(),
            guest_limit: features.guest_limit.into(),
            shadow_doorbells: self.shadow_doorbells.unwrap_or_default().map(Into::into),
            checksum: U64::ZERO,
        };
        let mut bytes = wire.as_bytes().to_vec();
        let checksum = fnv1a(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a record; `None` if it is not ours, of another version or length, damaged, or says what cannot be: the admin
    /// queue's heads and tails lie within AQA's sizes, no CID is outstanding twice.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let wire = Wire::read_from_bytes(bytes).ok()?;
        let ours = wire.magic == MAGIC && wire.version.get() == VERSION && usize::from(wire.bytes.get()) == VENDOR_BYTES;
        if !ours || wire.checksum.get() != fnv1a(bytes.get(..CHECKSUM_AT)?) {
            return None;
        }
        let state = wire.state()?;
        let asqs = (state.aqa & 0xfff) as u16;
        let acqs = (state.aqa >> 16 & 0xfff) as u16;
        let inside = state.admin_sq_head.max(state.admin_sq_tail) <= asqs
            && state.admin_cq_head.max(state.admin_cq_tail) <= acqs;
        let twice = (1..state.aer_cids.len()).any(|i| state.aer_cids[..i].contains(&state.aer_cids[i]));
        (inside && !twice).then_some(state)
    }
}

impl Wire {
    fn state(&self) -> Option<VendorState> {
        let cids = self.aer_cids.get(..usize::from(self.aer_count))?;
        let shadow_doorbells = (self.flags & 4 != 0).then_some(self.shadow_doorbells.map(U64::get));
        let unset = shadow_doorbells.is_some() || self.shadow_doorbells == [U64::ZERO; 2];
        if self.flags > 7 || self.timestamp.get() >> 56 != 0 || !unset {
            return None;
        }
        Some(VendorState {
            cc: self.cc.get(),
            csts: self.csts.get(),
            aqa: self.aqa.get(),
            asq: self.asq.get(),
            acq: self.acq.get(),
            intms: self.intms.get(),
            admin_sq_head: self.admin_sq_head.get(),
            admin_sq_tail: self.admin_sq_tail.get(),
            admin_cq_head: self.admin_cq_head.get(),
            admin_cq_tail: self.admin_cq_tail.get(),
            admin_cq_phase: self.flags & 1 != 0,
            bar_resets: self.bar_resets.get(),
            aer_cids: cids.iter().map(|cid| cid.get()).collect(),
            masked_events: self.masked_events.get(),
            shadow_doorbells,
            features: self.features(),
        })
    }

    fn features(&self) -> Features {
        Features {
            arbitration: self.arbitration.get(),
            power_management: self.power_management.get(),
            temperature_over: self.temperature_over.get(),
            temperature_under: self.temperature_under.get(),
            error_recovery: self.error_recovery.get(),
            volatile_write_cache: self.flags & 2 != 0,
            coalescing_threshold: self.coalescing_threshold,
            coalescing_time: self.coalescing_time,
            coalescing_disabled: self.coalescing_disabled.map(U64::get),
            write_atomicity: self.write_atomicity.get(),
            async_event_config: self.async_event_config.get(),
            timestamp_ms: self.timestamp.get() & MILLIS,
            timestamp_attributes: (self.timestamp.get() >> 48) as u8,
            host_behavior: self.host_behavior,
            host_id: self.host_id,
            granted_sqs: self.granted_sqs.get(),
            granted_cqs: self.granted_cqs.get(),
            guest_limit: self.guest_limit.get(),
        }
    }
}
