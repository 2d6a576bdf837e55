//! Controller state out and in (Base 2.3 §5.2.17.1.3): the queues in the specification's own format, and a vendor part of ours
//! for what that format leaves out (admin queue, registers, features, AERs).
//!
//! [`encode`] answers Get Controller State; [`StateSequence`] puts together what Set Controller State brings in pieces;
//! [`decode`] reads it. What comes in may be anything: sizes are bounded by [`MAX_STATE_BYTES`], and whatever is odd is an
//! Invalid Field. Whether the queues fit this controller is [`ControllerState::check`]'s to say, whether their memory is there
//! the controller's.

mod vendor;

pub use self::vendor::{Features, MAX_AERS, MAX_VECTORS, VendorState};
use self::vendor::VENDOR_BYTES;
use dray_nvme::command::migration::SequenceIndicator;
use dray_nvme::state::{
    self, ControllerStateHeader, IoCqAttr, IoCqState, IoSqAttr, IoSqState, QueueLimits, encoded_bytes, phase_from_s0pt,
    s0pt_from_phase,
};
use dray_nvme::status::Status;
use zerocopy::FromBytes;

/// UUID of the vendor part: CSUUIDI 1 of Identify CNS 20h (Base 2.3 §5.2.13.2.21).
pub const VENDOR_UUID: [u8; 16] =
    [0x5d, 0x1f, 0x0a, 0xd6, 0x3c, 0x52, 0x4e, 0x8b, 0x9e, 0x41, 0x64, 0x72, 0x61, 0x79, 0x76, 0x31];

/// Most I/O queues of one kind in a state.
pub const MAX_STATE_QUEUES: usize = 512;

/// Bytes of the largest state.
pub const MAX_STATE_BYTES: usize = encoded_bytes(MAX_STATE_QUEUES, MAX_STATE_QUEUES, VENDOR_BYTES);

/// An I/O submission queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SqSnapshot {
    /// PRP1 of the Create command.
    pub prp1: u64,
    /// QSIZE: entries, 0's based.
    pub entries_minus_1: u16,
    /// QID.
    pub qid: u16,
    /// The completion queue that it posts to.
    pub cqid: u16,
    /// PC: physically contiguous.
    pub pc: bool,
    /// QPRIO.
    pub qprio: u8,
    /// The next entry to be fetched.
    pub head: u16,
    /// The last value of the tail doorbell.
    pub tail: u16,
}

/// An I/O completion queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CqSnapshot {
    /// PRP1 of the Create command.
    pub prp1: u64,
    /// QSIZE: entries, 0's based.
    pub entries_minus_1: u16,
    /// QID.
    pub qid: u16,
    /// The last value of the head doorbell.
    pub head: u16,
    /// The next slot to be posted.
    pub tail: u16,
    /// PC: physically contiguous.
    pub pc: bool,
    /// IEN: interrupts enabled.
    pub ien: bool,
    /// IV: interrupt vector.
    pub iv: u16,
    /// The phase tag of the next entry (on the wire it is S0PT, which depends on the tail).
    pub phase: bool,
}

/// The state of a controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControllerState {
    /// The controller was suspended while the state was taken, so the state is consistent.
    pub suspended: bool,
    /// I/O submission queues, ascending by QID.
    pub sqs: Vec<SqSnapshot>,
    /// I/O completion queues, ascending by QID.
    pub cqs: Vec<CqSnapshot>,
    /// What the specification's format leaves out.
    pub vendor: Option<VendorState>,
}

impl From<&SqSnapshot> for IoSqState {
    fn from(sq: &SqSnapshot) -> Self {
        Self {
            prp1: sq.prp1,
            qsize: sq.entries_minus_1,
            qid: sq.qid,
            cqid: sq.cqid,
            attr: IoSqAttr::new().with_pc(sq.pc).with_qprio(sq.qprio & 3),
            head: sq.head,
            tail: sq.tail,
            ..Self::default()
        }
    }
}

impl From<IoSqState> for SqSnapshot {
    fn from(sq: IoSqState) -> Self {
        Self {
            prp1: sq.prp1,
            entries_minus_1: sq.qsize,
            qid: sq.qid,
            cqid: sq.cqid,
            pc: sq.attr.pc(),
            qprio: sq.attr.qprio(),
            head: sq.head,
            tail: sq.tail,
        }
    }
}

impl From<&CqSnapshot> for IoCqState {
    fn from(cq: &CqSnapshot) -> Self {
        let s0pt = s0pt_from_phase(cq.tail, cq.phase);
        Self {
            prp1: cq.prp1,
            qsize: cq.entries_minus_1,
            qid: cq.qid,
            head: cq.head,
            tail: cq.tail,
            attr: IoCqAttr::new().with_pc(cq.pc).with_ien(cq.ien).with_s0pt(s0pt).with_iv(cq.iv),
            ..Self::default()
        }
    }
}

impl From<IoCqState> for CqSnapshot {
    fn from(cq: IoCqState) -> Self {
        Self {
            prp1: cq.prp1,
            entries_minus_1: cq.qsize,
            qid: cq.qid,
            head: cq.head,
            tail: cq.tail,
            pc: cq.attr.pc(),
            ien: cq.attr.ien(),
            iv: cq.attr.iv(),
            phase: phase_from_s0pt(cq.tail, cq.attr.s0pt()),
        }
    }
}

impl ControllerState {
    /// Whether a controller with these limits can take the queues: QIDs, sizes, vectors, and each submission queue's CQID.
    ///
    /// # Errors
    /// Invalid Field.
    pub fn check(&self, limits: &QueueLimits) -> Result<(), Status> {
        let bytes = encode(self, true, false)?;
        let state = state::ControllerState::parse(&bytes).map_err(|_| invalid())?;
        state.nvme.map_or(Ok(()), |nvme| nvme.validate(limits)).map_err(|_| invalid())
    }
}

fn invalid() -> Status {
    Status::INVALID_FIELD.with_dnr()
}

/// What CSVI and CSUUIDI of a command ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateFormats {
    /// CSVI 1: the NVMe controller state, version 0.
    pub nvme: bool,
    /// CSUUIDI 1: the vendor part, [`VENDOR_UUID`].
    pub vendor: bool,
}

impl StateFormats {
    /// The formats that the 1-based indices of CNS 20h name; 0 is none.
    ///
    /// # Errors
    /// Invalid Field for an index beyond the lists, each of which has one element.
    pub fn of(csvi: u8, csuuidi: u8) -> Result<Self, Status> {
        if csvi > 1 || csuuidi > 1 {
            return Err(invalid());
        }
        Ok(Self { nvme: csvi == 1, vendor: csuuidi == 1 })
    }
}

/// Writes a state; `with_nvme` and `with_vendor` say which parts (CSVI, CSUUIDI). What is not asked for has size 0.
///
/// # Errors
/// Internal Error for more than [`MAX_STATE_QUEUES`] queues of a kind, which no controller here has.
pub fn encode(state: &ControllerState, with_nvme: bool, with_vendor: bool) -> Result<Vec<u8>, Status> {
    if state.sqs.len().max(state.cqs.len()) > MAX_STATE_QUEUES {
        return Err(Status::INTERNAL_ERROR);
    }
    let vendor = state.vendor.as_ref().filter(|_| with_vendor).map(VendorState::encode).unwrap_or_default();
    let mut out = vec![0; encoded_bytes(state.sqs.len(), state.cqs.len(), vendor.len())];
    let written = if with_nvme {
        let mut sqs: Vec<IoSqState> = state.sqs.iter().map(Into::into).collect();
        let mut cqs: Vec<IoCqState> = state.cqs.iter().map(Into::into).collect();
        sqs.sort_unstable_by_key(|sq| sq.qid);
        cqs.sort_unstable_by_key(|cq| cq.qid);
        state::encode(state.suspended, &sqs, &cqs, &vendor, &mut out)
    } else {
        state::encode_vendor_only(state.suspended, &vendor, &mut out)
    };
    out.truncate(written.map_err(|_| Status::INTERNAL_ERROR)?);
    Ok(out)
}

/// Reads a state. `csvi_nvme` and `vendor` say which parts the command announced; a part that was not announced must not be
/// there.
///
/// # Errors
/// Invalid Field for bytes that are too many or too few, versions and sizes that cannot be, queues that contradict themselves
/// or each other, and a vendor part that is not ours or was changed on its way.
pub fn decode(bytes: &[u8], csvi_nvme: bool, vendor: bool) -> Result<ControllerState, Status> {
    if bytes.len() > MAX_STATE_BYTES || total_bytes(bytes) != Some(bytes.len()) {
        return Err(invalid());
    }
    let parsed = state::ControllerState::parse(bytes).map_err(|_| invalid())?;
    if (parsed.nvme.is_some() && !csvi_nvme) || (!parsed.vendor.is_empty() && !vendor) {
        return Err(invalid());
    }
    let mut found = ControllerState { suspended: parsed.suspended, ..ControllerState::default() };
    if let Some(nvme) = parsed.nvme {
        // Every limit of the format itself; the controller's own come with `check`.
        let widest = QueueLimits { max_qid: u16::MAX, mqes: u16::MAX, vectors: u16::MAX };
        nvme.validate(&widest).map_err(|_| invalid())?;
        if nvme.sqs().len().max(nvme.cqs().len()) > MAX_STATE_QUEUES {
            return Err(invalid());
        }
        found.sqs = nvme.sqs().map(Into::into).collect();
        found.cqs = nvme.cqs().map(Into::into).collect();
    }
    if !parsed.vendor.is_empty() {
        found.vendor = Some(VendorState::decode(parsed.vendor).ok_or(invalid())?);
    }
    Ok(found)
}

/// Bytes of the state that begins with `bytes`, once its head is there.
fn total_bytes(bytes: &[u8]) -> Option<usize> {
    let (header, _) = ControllerStateHeader::read_from_prefix(bytes).ok()?;
    state::ControllerState::total_bytes(&header)
}

/// A piece of a state, as one Set Controller State command brings it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StatePart<'a> {
    /// SEQIND.
    pub(crate) seqind: SequenceIndicator,
    /// CSVI.
    pub(crate) csvi: u8,
    /// CSUUIDI.
    pub(crate) csuuidi: u8,
    /// Where the piece belongs, in bytes.
    pub(crate) offset: u64,
    /// NUMD dwords.
    pub(crate) data: &'a [u8],
}

#[derive(Debug)]
struct Open {
    csvi: u8,
    csuuidi: u8,
    bytes: Vec<u8>,
}

/// The Set Controller State sequence of one target controller (Base 2.3 §5.2.17.1.3): collects the pieces; the last one yields
/// the state to commit. Any failure ends the sequence, and the host sends everything again.
#[derive(Debug, Default)]
pub(crate) struct StateSequence {
    open: Option<Open>,
}

impl StateSequence {
    /// Whether a state has been received in part and not committed: Resume is a Command Sequence Error then.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Forgets what was received: a reset, or the controller is gone.
    pub(crate) fn clear(&mut self) {
        self.open = None;
    }

    /// Takes a piece; answers the whole state after the last.
    ///
    /// # Errors
    /// Command Sequence Error for a middle or last piece without a first one. Invalid Field for indices that name nothing or
    /// change on the way, an offset that is not dword-aligned or leaves a gap, data past the state's end or over
    /// [`MAX_STATE_BYTES`], no data in any piece but the last, and everything that [`decode`] refuses.
    pub(crate) fn take(&mut self, part: &StatePart<'_>) -> Result<Option<ControllerState>, Status> {
        let begins = matches!(part.seqind, SequenceIndicator::FIRST | SequenceIndicator::ONLY);
        let ends = matches!(part.seqind, SequenceIndicator::LAST | SequenceIndicator::ONLY);
        let previous = self.open.take();
        let mut open = if begins {
            Open { csvi: part.csvi, csuuidi: part.csuuidi, bytes: Vec::new() }
        } else {
            previous.ok_or(Status::COMMAND_SEQUENCE.with_dnr())?
        };
        let formats = StateFormats::of(part.csvi, part.csuuidi)?;
        let named = formats.nvme || formats.vendor;
        let same = (open.csvi, open.csuuidi) == (part.csvi, part.csuuidi);
        let empty = part.data.is_empty() && part.seqind != SequenceIndicator::LAST;
        if !named || !same || empty {
            return Err(invalid());
        }
        open.add(part.offset, part.data)?;
        if ends {
            return decode(&open.bytes, formats.nvme, formats.vendor).map(Some);
        }
        self.open = Some(open);
        Ok(None)
    }
}

impl Open {
    fn add(&mut self, offset: u64, data: &[u8]) -> Result<(), Status> {
        let at = usize::try_from(offset).ok().filter(|at| at.is_multiple_of(4) && *at <= self.bytes.len());
        let at = at.ok_or(invalid())?;
        let end = at.checked_add(data.len()).filter(|end| *end <= MAX_STATE_BYTES && data.len().is_multiple_of(4));
        let end = end.ok_or(invalid())?;
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(at..end).ok_or(invalid())?.copy_from_slice(data);
        if total_bytes(&self.bytes).is_some_and(|total| self.bytes.len() > total) {
            return Err(invalid());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
