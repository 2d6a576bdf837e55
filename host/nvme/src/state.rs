//! Controller state of Migration Send and Migration Receive (Base 2.3 §5.2.17.1.3): a head, the NVMe controller state
//! (the I/O queues), then a vendor specific part that carries what version 0 leaves out.

use crate::BufferTooSmall;
use bitfield_struct::bitfield;
use core::fmt;
use zerocopy::little_endian::U128;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The one version of [`ControllerStateHeader`] and of [`NvmeStateHeader`].
pub const STATE_VERSION: u16 = 0;

const HEADER_BYTES: usize = size_of::<ControllerStateHeader>();
const NVME_HEADER_BYTES: usize = size_of::<NvmeStateHeader>();
const QUEUE_BYTES: usize = size_of::<IoSqState>();

/// CSATTR, Controller State Attributes.
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControllerStateAttributes {
    /// The controller was suspended: the state is consistent.
    pub suspended: bool,
    #[bits(7)]
    __: u8,
}

/// Head of a controller state, 48 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ControllerStateHeader {
    /// VER, [`STATE_VERSION`].
    pub ver: u16,
    /// CSATTR, attributes.
    pub csattr: ControllerStateAttributes,
    /// Reserved, 0.
    pub rsvd3: [u8; 13],
    /// NVMECSS, NVMe Controller State Size in dwords.
    pub nvmecss: U128,
    /// VSS, Vendor Specific Size in dwords.
    pub vss: U128,
}
layout!(ControllerStateHeader, 48, csattr @ 2, nvmecss @ 16, vss @ 32);

/// Head of the NVMe controller state, 8 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NvmeStateHeader {
    /// VER, [`STATE_VERSION`].
    pub ver: u16,
    /// NIOSQ, number of I/O submission queues.
    pub niosq: u16,
    /// NIOCQ, number of I/O completion queues.
    pub niocq: u16,
    /// Reserved, 0.
    pub rsvd6: u16,
}
layout!(NvmeStateHeader, 8, niosq @ 2, niocq @ 4);

/// Attributes of an I/O submission queue in the state.
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IoSqAttr {
    /// PC, Physically Contiguous.
    pub pc: bool,
    /// QPRIO, Queue Priority.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    __: u16,
}

/// State of an I/O submission queue, 24 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IoSqState {
    /// PRP1 of the Create command.
    pub prp1: u64,
    /// QSIZE in entries, 0's based.
    pub qsize: u16,
    /// QID.
    pub qid: u16,
    /// CQID, the completion queue it posts to.
    pub cqid: u16,
    /// Attributes.
    pub attr: IoSqAttr,
    /// Head pointer: the next entry the controller fetches.
    pub head: u16,
    /// Tail pointer: the host's last doorbell.
    pub tail: u16,
    /// Reserved, 0.
    pub rsvd20: u32,
}
layout!(IoSqState, 24, qsize @ 8, qid @ 10, cqid @ 12, attr @ 14, head @ 16, tail @ 18);

/// Attributes of an I/O completion queue in the state.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IoCqAttr {
    /// PC, Physically Contiguous.
    pub pc: bool,
    /// IEN, Interrupts Enabled.
    pub ien: bool,
    /// S0PT, Slot 0 Phase Tag; see [`phase_from_s0pt`].
    pub s0pt: bool,
    #[bits(13)]
    __: u16,
    /// IV, Interrupt Vector.
    pub iv: u16,
}

/// State of an I/O completion queue, 24 bytes.
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IoCqState {
    /// PRP1 of the Create command.
    pub prp1: u64,
    /// QSIZE in entries, 0's based.
    pub qsize: u16,
    /// QID.
    pub qid: u16,
    /// Head pointer: the host's last doorbell.
    pub head: u16,
    /// Tail pointer: the next entry the controller posts.
    pub tail: u16,
    /// Attributes.
    pub attr: IoCqAttr,
    /// Reserved, 0.
    pub rsvd20: u32,
}
layout!(IoCqState, 24, qsize @ 8, qid @ 10, head @ 12, tail @ 14, attr @ 16);

/// The phase tag that the controller writes next, from the tag that stands in slot 0: the pass's own tag once slot 0
/// was written in it, the previous pass's while the tail is still there.
pub const fn phase_from_s0pt(tail: u16, s0pt: bool) -> bool {
    s0pt == (tail > 0)
}

/// S0PT for a completion queue whose next entry gets the phase tag `phase`; the inverse of [`phase_from_s0pt`].
pub const fn s0pt_from_phase(tail: u16, phase: bool) -> bool {
    phase == (tail > 0)
}

/// Which list of the NVMe controller state an error speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// I/O submission queues.
    Submission,
    /// I/O completion queues.
    Completion,
}

impl fmt::Display for QueueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Submission {
            "submission queue"
        } else {
            "completion queue"
        })
    }
}

/// What is wrong with one queue of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueFault {
    /// QID is 0, above the limit, or not above that of the entry before it.
    Identifier,
    /// QSIZE is 0 or above MQES.
    Size,
    /// Head or tail lies outside the queue.
    Pointer,
    /// The submission queue's CQID is not in the state.
    CompletionQueue,
    /// The interrupt vector does not exist.
    Vector,
}

/// Why a controller state could not be read, accepted or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateError {
    /// The bytes end before what their sizes announce.
    Truncated,
    /// VER of one of the two heads is not [`STATE_VERSION`].
    UnsupportedVersion(u16),
    /// NVMECSS does not agree with the number of queues.
    SizeMismatch,
    /// The vendor specific part is not a whole number of dwords.
    VendorSize(usize),
    /// More queues than the 16-bit counts can say.
    TooManyQueues,
    /// A queue cannot be as the state says.
    Queue {
        /// Which list.
        kind: QueueKind,
        /// QID as in the state.
        qid: u16,
        /// What is wrong.
        fault: QueueFault,
    },
    /// The output buffer is too small.
    Buffer(BufferTooSmall),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => f.write_str("controller state is shorter than its sizes say"),
            Self::UnsupportedVersion(ver) => {
                write!(f, "controller state version {ver} is not supported")
            }
            Self::SizeMismatch => f.write_str("NVMECSS does not agree with the number of queues"),
            Self::VendorSize(bytes) => write!(
                f,
                "vendor specific state of {bytes} bytes is no multiple of 4"
            ),
            Self::TooManyQueues => f.write_str("more queues than a controller state can hold"),
            Self::Queue { kind, qid, fault } => {
                let what = match fault {
                    QueueFault::Identifier => "its QID is 0, above the limit or out of order",
                    QueueFault::Size => "its QSIZE is 0 or above MQES",
                    QueueFault::Pointer => "its head or tail lies outside the queue",
                    QueueFault::CompletionQueue => "its completion queue is not in the state",
                    QueueFault::Vector => "its interrupt vector does not exist",
                };
                write!(f, "I/O {kind} {qid} of the controller state: {what}")
            }
            Self::Buffer(error) => fmt::Display::fmt(error, f),
        }
    }
}

impl core::error::Error for StateError {}

/// What a controller that is to take a state offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Highest QID of an I/O queue.
    pub max_qid: u16,
    /// CAP.MQES, 0's based.
    pub mqes: u16,
    /// Number of interrupt vectors.
    pub vectors: u16,
}

/// The NVMe controller state within a controller state; whole entries, in the order they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmeState<'a> {
    sqs: &'a [[u8; QUEUE_BYTES]],
    cqs: &'a [[u8; QUEUE_BYTES]],
}

impl<'a> NvmeState<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        let (header, queues) =
            NvmeStateHeader::read_from_prefix(bytes).map_err(|_| StateError::Truncated)?;
        if header.ver != STATE_VERSION {
            return Err(StateError::UnsupportedVersion(header.ver));
        }
        let (entries, rest) = queues.as_chunks::<QUEUE_BYTES>();
        let niosq = usize::from(header.niosq);
        if !rest.is_empty() || entries.len() != niosq + usize::from(header.niocq) {
            return Err(StateError::SizeMismatch);
        }
        let (sqs, cqs) = entries
            .split_at_checked(niosq)
            .ok_or(StateError::SizeMismatch)?;
        Ok(Self { sqs, cqs })
    }

    /// The I/O submission queues.
    pub fn sqs(&self) -> impl ExactSizeIterator<Item = IoSqState> + use<'a> {
        self.sqs.iter().map(|bytes| zerocopy::transmute!(*bytes))
    }

    /// The I/O completion queues.
    pub fn cqs(&self) -> impl ExactSizeIterator<Item = IoCqState> + use<'a> {
        self.cqs.iter().map(|bytes| zerocopy::transmute!(*bytes))
    }

    /// Checks every queue against a controller's limits and the lists against each other: QIDs ascending and within
    /// `max_qid`, sizes within MQES, pointers inside their queues, vectors that exist, CQIDs that are in the state.
    ///
    /// # Errors
    /// [`StateError::Queue`] for the first queue that fails.
    pub fn validate(&self, limits: &QueueLimits) -> Result<(), StateError> {
        let mut last = 0;
        for cq in self.cqs() {
            let fail = |fault| {
                Err(StateError::Queue {
                    kind: QueueKind::Completion,
                    qid: cq.qid,
                    fault,
                })
            };
            match shape_fault(limits, last, cq.qid, cq.qsize, cq.head, cq.tail) {
                Some(fault) => return fail(fault),
                None if cq.attr.ien() && cq.attr.iv() >= limits.vectors => {
                    return fail(QueueFault::Vector);
                }
                None => last = cq.qid,
            }
        }
        last = 0;
        for sq in self.sqs() {
            let fail = |fault| {
                Err(StateError::Queue {
                    kind: QueueKind::Submission,
                    qid: sq.qid,
                    fault,
                })
            };
            match shape_fault(limits, last, sq.qid, sq.qsize, sq.head, sq.tail) {
                Some(fault) => return fail(fault),
                None if !self.has_cq(sq.cqid) => return fail(QueueFault::CompletionQueue),
                None => last = sq.qid,
            }
        }
        Ok(())
    }

    /// Whether completion queue `qid` is in the state, whose list is known to ascend.
    fn has_cq(&self, qid: u16) -> bool {
        let qid_of = |bytes: &[u8; QUEUE_BYTES]| -> u16 {
            let cq: IoCqState = zerocopy::transmute!(*bytes);
            cq.qid
        };
        self.cqs.binary_search_by_key(&qid, qid_of).is_ok()
    }
}

/// What is wrong with a queue's identifier, size or pointers, if anything.
fn shape_fault(
    limits: &QueueLimits,
    last: u16,
    qid: u16,
    qsize: u16,
    head: u16,
    tail: u16,
) -> Option<QueueFault> {
    if qid <= last || qid > limits.max_qid {
        Some(QueueFault::Identifier)
    } else if qsize == 0 || qsize > limits.mqes {
        Some(QueueFault::Size)
    } else if head > qsize || tail > qsize {
        Some(QueueFault::Pointer)
    } else {
        None
    }
}

/// A controller state that was read from bytes and is whole: every size was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerState<'a> {
    /// CSATTR: the controller was suspended when the state was taken.
    pub suspended: bool,
    /// The I/O queues; absent when the state was asked for without a version (CSVI 0).
    pub nvme: Option<NvmeState<'a>>,
    /// The vendor specific part.
    pub vendor: &'a [u8],
}

impl<'a> ControllerState<'a> {
    /// Bytes that the state beginning with `header` takes, or `None` if that does not fit memory: what to read after
    /// the first 48 bytes.
    pub fn total_bytes(header: &ControllerStateHeader) -> Option<usize> {
        let dwords = header.nvmecss.get().checked_add(header.vss.get())?;
        usize::try_from(dwords)
            .ok()?
            .checked_mul(4)?
            .checked_add(HEADER_BYTES)
    }

    /// Reads a state; bytes after its end are left alone. Queues are not judged: see [`NvmeState::validate`].
    ///
    /// # Errors
    /// [`StateError::Truncated`], [`StateError::UnsupportedVersion`] or [`StateError::SizeMismatch`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        let (header, rest) =
            ControllerStateHeader::read_from_prefix(bytes).map_err(|_| StateError::Truncated)?;
        if header.ver != STATE_VERSION {
            return Err(StateError::UnsupportedVersion(header.ver));
        }
        let total = Self::total_bytes(&header).ok_or(StateError::Truncated)?;
        let body = rest
            .get(..total - HEADER_BYTES)
            .ok_or(StateError::Truncated)?;
        // Both sizes are at most the body's, which is in memory, so neither conversion loses bits.
        let nvme_bytes = header.nvmecss.get() as usize * 4;
        let (nvme, vendor) = body
            .split_at_checked(nvme_bytes)
            .ok_or(StateError::Truncated)?;
        let nvme = if nvme.is_empty() {
            None
        } else {
            Some(NvmeState::parse(nvme)?)
        };
        Ok(Self {
            suspended: header.csattr.suspended(),
            nvme,
            vendor,
        })
    }
}

/// Bytes of a state with these queues and this vendor specific part.
pub const fn encoded_bytes(sqs: usize, cqs: usize, vendor_bytes: usize) -> usize {
    let queues = sqs.saturating_add(cqs).saturating_mul(QUEUE_BYTES);
    queues
        .saturating_add(HEADER_BYTES + NVME_HEADER_BYTES)
        .saturating_add(vendor_bytes)
}

/// Writes a state with its queues (each list ascending by QID) and vendor specific part, and returns its bytes.
///
/// # Errors
/// [`StateError::TooManyQueues`], [`StateError::VendorSize`] or [`StateError::Buffer`]; nothing was written then.
pub fn encode(
    suspended: bool,
    sqs: &[IoSqState],
    cqs: &[IoCqState],
    vendor: &[u8],
    out: &mut [u8],
) -> Result<usize, StateError> {
    let niosq = u16::try_from(sqs.len()).map_err(|_| StateError::TooManyQueues)?;
    let niocq = u16::try_from(cqs.len()).map_err(|_| StateError::TooManyQueues)?;
    let nvme = NvmeStateHeader {
        ver: STATE_VERSION,
        niosq,
        niocq,
        rsvd6: 0,
    };
    let parts = [nvme.as_bytes(), sqs.as_bytes(), cqs.as_bytes()];
    write_state(suspended, &parts, vendor, out)
}

/// Writes a state without queues (CSVI 0): head and vendor specific part only.
///
/// # Errors
/// [`StateError::VendorSize`] or [`StateError::Buffer`]; nothing was written then.
pub fn encode_vendor_only(
    suspended: bool,
    vendor: &[u8],
    out: &mut [u8],
) -> Result<usize, StateError> {
    write_state(suspended, &[], vendor, out)
}

fn write_state(
    suspended: bool,
    nvme: &[&[u8]],
    vendor: &[u8],
    out: &mut [u8],
) -> Result<usize, StateError> {
    if !vendor.len().is_multiple_of(4) {
        return Err(StateError::VendorSize(vendor.len()));
    }
    let nvme_bytes: usize = nvme.iter().map(|part| part.len()).sum();
    let needed = HEADER_BYTES
        .saturating_add(nvme_bytes)
        .saturating_add(vendor.len());
    let available = out.len();
    let out = out
        .get_mut(..needed)
        .ok_or(StateError::Buffer(BufferTooSmall { needed, available }))?;
    let header = ControllerStateHeader {
        csattr: ControllerStateAttributes::new().with_suspended(suspended),
        nvmecss: U128::new(nvme_bytes as u128 / 4),
        vss: U128::new(vendor.len() as u128 / 4),
        ..Default::default()
    };
    let mut at = 0;
    for part in core::iter::once(header.as_bytes())
        .chain(nvme.iter().copied())
        .chain(core::iter::once(vendor))
    {
        out[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    Ok(needed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: QueueLimits = QueueLimits {
        max_qid: 8,
        mqes: 63,
        vectors: 4,
    };

    fn queues() -> ([IoSqState; 2], [IoCqState; 1]) {
        let sq = IoSqState {
            prp1: 0x1000,
            qsize: 63,
            qid: 1,
            cqid: 2,
            head: 3,
            tail: 63,
            ..Default::default()
        };
        let attr = IoCqAttr::new().with_pc(true).with_ien(true).with_iv(3);
        let cq = IoCqState {
            prp1: 0x3000,
            qsize: 63,
            qid: 2,
            head: 0,
            tail: 5,
            attr,
            ..Default::default()
        };
        ([sq, IoSqState { qid: 2, ..sq }], [cq])
    }

    fn judge(sqs: &[IoSqState], cqs: &[IoCqState]) -> Option<QueueFault> {
        let mut out = [0; 1024];
        let bytes = encode(true, sqs, cqs, &[], &mut out).unwrap();
        let state = ControllerState::parse(&out[..bytes]).unwrap();
        match state.nvme.unwrap().validate(&LIMITS) {
            Err(StateError::Queue { fault, .. }) => Some(fault),
            other => other.map(|()| None).unwrap(),
        }
    }

    #[test]
    fn slot_0_phase_tag() {
        for phase in [false, true] {
            assert_eq!(s0pt_from_phase(0, phase), !phase);
            assert_eq!(s0pt_from_phase(9, phase), phase);
            for tail in [0, 1, u16::MAX] {
                assert_eq!(phase_from_s0pt(tail, s0pt_from_phase(tail, phase)), phase);
            }
        }
    }

    #[test]
    fn state_round_trip_and_truncation() {
        let (sqs, cqs) = queues();
        let mut out = [0xEE; 256];
        let bytes = encode(true, &sqs, &cqs, &[1, 2, 3, 4], &mut out).unwrap();
        assert_eq!((bytes, encoded_bytes(2, 1, 4)), (48 + 8 + 72 + 4, bytes));
        assert_eq!(
            (out[2], out[16], out[32], out[50], out[52]),
            (1, 20, 1, 2, 1)
        );
        let state = ControllerState::parse(&out).unwrap();
        let nvme = state.nvme.unwrap();
        assert!(state.suspended && state.vendor == [1, 2, 3, 4]);
        assert!(nvme.sqs().eq(sqs) && nvme.cqs().eq(cqs));
        for short in 0..bytes {
            assert_eq!(
                ControllerState::parse(&out[..short]),
                Err(StateError::Truncated)
            );
        }
        // Queues that no count names, and a size that is no whole number of queues.
        out[50] = 1;
        assert_eq!(ControllerState::parse(&out), Err(StateError::SizeMismatch));
        out[50] = 2;
        out[16] = 21;
        assert_eq!(ControllerState::parse(&out), Err(StateError::SizeMismatch));
        out[16] = 20;
        out[50] = 3;
        assert_eq!(ControllerState::parse(&out), Err(StateError::SizeMismatch));
        out[16..48].fill(0xFF);
        assert_eq!(ControllerState::parse(&out), Err(StateError::Truncated));
    }

    #[test]
    fn encoder_refuses_what_it_cannot_say() {
        let mut out = [0; 51];
        assert_eq!(
            encode_vendor_only(false, &[0; 3], &mut out),
            Err(StateError::VendorSize(3))
        );
        let small = BufferTooSmall {
            needed: 52,
            available: 51,
        };
        assert_eq!(
            encode_vendor_only(false, &[0; 4], &mut out),
            Err(StateError::Buffer(small))
        );
        assert_eq!(encode_vendor_only(false, &[], &mut out), Ok(48));
        assert_eq!(ControllerState::parse(&out).unwrap().nvme, None);
    }

    #[test]
    fn each_impossible_queue_is_found() {
        let (sqs, cqs) = queues();
        assert_eq!(judge(&sqs, &cqs), None);
        assert_eq!(judge(&[sqs[1], sqs[0]], &cqs), Some(QueueFault::Identifier));
        assert_eq!(
            judge(&[IoSqState { qid: 9, ..sqs[0] }], &cqs),
            Some(QueueFault::Identifier)
        );
        assert_eq!(
            judge(&[IoSqState { qid: 0, ..sqs[0] }], &cqs),
            Some(QueueFault::Identifier)
        );
        assert_eq!(
            judge(
                &[IoSqState {
                    qsize: 64,
                    ..sqs[0]
                }],
                &cqs
            ),
            Some(QueueFault::Size)
        );
        assert_eq!(
            judge(&[IoSqState { tail: 64, ..sqs[0] }], &cqs),
            Some(QueueFault::Pointer)
        );
        assert_eq!(
            judge(&[IoSqState { head: 64, ..sqs[0] }], &cqs),
            Some(QueueFault::Pointer)
        );
        assert_eq!(
            judge(&[IoSqState { cqid: 1, ..sqs[0] }], &cqs),
            Some(QueueFault::CompletionQueue)
        );
        assert_eq!(
            judge(&[], &[IoCqState { qsize: 0, ..cqs[0] }]),
            Some(QueueFault::Size)
        );
        let attr = cqs[0].attr.with_iv(4);
        assert_eq!(
            judge(&[], &[IoCqState { attr, ..cqs[0] }]),
            Some(QueueFault::Vector)
        );
    }
}
