//! Controller states on their way: read from the source in pieces, set at the destination in pieces.

use crate::calls::{Calls, Data, words};
use crate::mmc::{Answer, Mmc};
use dray_device::poll::Time;
use dray_nvme::command::{SequenceIndicator, SubmissionEntry};
use dray_nvme::state::{ControllerState, ControllerStateHeader, IoCqState, encoded_bytes};
use zerocopy::{FromBytes, IntoBytes};

/// Most bytes of one controller's state.
pub(crate) const MAX_STATE_BYTES: usize = 1 << 20;
/// Bytes of a piece; a state seldom has more.
const PIECE_BYTES: usize = 4096;

/// Reads the state of one controller (Get Controller State, Base 2.3 §5.2.16).
#[derive(Debug)]
pub(crate) struct ReadState {
    cntlid: u16,
    format: (u8, u8),
    bytes: Vec<u8>,
    calls: Calls,
}

impl ReadState {
    pub(crate) fn new(cntlid: u16, format: (u8, u8), mmc: &dyn Mmc) -> Self {
        let mut this = Self { cntlid, format, bytes: Vec::new(), calls: Calls::default() };
        this.ask(PIECE_BYTES, mmc);
        this
    }

    fn ask(&mut self, wanted: usize, mmc: &dyn Mmc) {
        let bytes = wanted.min(mmc.admin_limit()).max(4) / 4 * 4;
        let (csvi, csuuidi) = self.format;
        let offset = self.bytes.len() as u64;
        let entry = SubmissionEntry::get_controller_state(csvi, self.cntlid, csuuidi, offset, (bytes / 4) as u32);
        self.calls = Calls::default();
        self.calls.push(entry, Data::In(bytes));
    }

    /// The whole state, once it is there. It was suspended during every piece, or it is an error.
    pub(crate) fn poll(&mut self, now: Time, mmc: &mut dyn Mmc) -> Option<Result<Vec<u8>, String>> {
        if !self.calls.poll(now, mmc) {
            return None;
        }
        let Some(answer) = self.calls.answers().next() else { return Some(Err("no answer".to_owned())) };
        if answer.unknown || answer.status.is_error() {
            return Some(Err(format!("controller {}: Get Controller State: {}", self.cntlid, words(answer))));
        }
        if mmc.reports_csup() && answer.result & 1 == 0 {
            return Some(Err(format!("controller {} was not suspended while its state was read (CSUP)", self.cntlid)));
        }
        self.bytes.extend_from_slice(&answer.data);
        match total(&self.bytes) {
            Err(what) => Some(Err(format!("controller {}: {what}", self.cntlid))),
            Ok(total) if total > self.bytes.len() => {
                self.ask(total - self.bytes.len(), mmc);
                None
            }
            Ok(total) => {
                self.bytes.truncate(total);
                if mmc.s0pt_is_next_phase() {
                    turn_phases(&mut self.bytes);
                }
                Some(Ok(std::mem::take(&mut self.bytes)))
            }
        }
    }
}

/// Bytes of the state that begins so; it must be a suspended controller's.
fn total(bytes: &[u8]) -> Result<usize, String> {
    let Ok((header, _)) = ControllerStateHeader::read_from_prefix(bytes) else {
        return Err("its state is shorter than a header".to_owned());
    };
    if !is_suspended(bytes) {
        return Err("it is not suspended (CSATTR)".to_owned());
    }
    match ControllerState::total_bytes(&header) {
        Some(total) if total <= MAX_STATE_BYTES => Ok(total),
        _ => Err("its state says that it is larger than any can be".to_owned()),
    }
}

/// CSATTR bit 0 of a state.
pub(crate) fn is_suspended(bytes: &[u8]) -> bool {
    bytes.get(2).is_some_and(|csattr| csattr & 1 != 0)
}

/// Between S0PT as the specification has it and the tag that is written next, in both directions: they differ where the tail is
/// 0 (Base 2.3 §5.2.17.1.3). Bytes that are no state are left as they are; who gets them refuses them.
fn turn_phases(bytes: &mut [u8]) {
    let Some(nvme) = ControllerState::parse(bytes).ok().and_then(|state| state.nvme) else { return };
    let count = nvme.cqs().len();
    let first = encoded_bytes(nvme.sqs().len(), 0, 0);
    let Some(queues) = bytes.get_mut(first..) else { return };
    for bytes in queues.chunks_exact_mut(size_of::<IoCqState>()).take(count) {
        let Ok(mut cq) = IoCqState::read_from_bytes(bytes) else { continue };
        if cq.tail == 0 {
            cq.attr = cq.attr.with_s0pt(!cq.attr.s0pt());
            bytes.copy_from_slice(cq.as_bytes());
        }
    }
}

/// Asks for the header of a controller's state only: is it suspended?
pub(crate) fn ask_header(cntlid: u16, format: (u8, u8)) -> Calls {
    let mut calls = Calls::default();
    let entry = SubmissionEntry::get_controller_state(format.0, cntlid, format.1, 0, 12);
    calls.push(entry, Data::In(48));
    calls
}

/// What a header's answer says: suspended, active, or nothing.
pub(crate) fn suspended(answer: &Answer) -> Option<bool> {
    (!answer.unknown && !answer.status.is_error() && answer.data.len() >= 48).then(|| is_suspended(&answer.data))
}

/// Sets the state of one controller (Set Controller State, Base 2.3 §5.2.17.1.3): one command if it fits, else a sequence, each
/// after the one before has ended.
#[derive(Debug)]
pub(crate) struct WriteState {
    cntlid: u16,
    format: (u8, u8),
    bytes: Vec<u8>,
    sent: usize,
    calls: Option<Calls>,
}

impl WriteState {
    pub(crate) fn new(cntlid: u16, format: (u8, u8), bytes: Vec<u8>) -> Self {
        Self { cntlid, format, bytes, sent: 0, calls: None }
    }

    /// `Some` when it has been set, or could not be.
    pub(crate) fn poll(&mut self, now: Time, mmc: &mut dyn Mmc) -> Option<Result<(), String>> {
        if self.calls.is_none() {
            if self.sent == 0 && mmc.s0pt_is_next_phase() {
                turn_phases(&mut self.bytes);
            }
            self.send(mmc.admin_limit());
        }
        let calls = self.calls.as_mut()?;
        if !calls.poll(now, mmc) {
            return None;
        }
        if let Some(answer) = calls.failure() {
            return Some(Err(format!("controller {}: Set Controller State: {}", self.cntlid, words(answer))));
        }
        self.calls = None;
        if self.sent < self.bytes.len() {
            return self.poll(now, mmc);
        }
        Some(Ok(()))
    }

    fn send(&mut self, limit: usize) {
        let first = self.sent == 0;
        let piece = (self.bytes.len() - self.sent).min(limit.max(4) / 4 * 4);
        let last = self.sent + piece == self.bytes.len();
        let sequence = match (first, last) {
            (true, true) => SequenceIndicator::ONLY,
            (true, false) => SequenceIndicator::FIRST,
            (false, false) => SequenceIndicator::MIDDLE,
            (false, true) => SequenceIndicator::LAST,
        };
        let (csvi, csuuidi) = self.format;
        let (offset, dwords) = (self.sent as u64, (piece / 4) as u32);
        let entry = SubmissionEntry::set_controller_state(sequence, csvi, self.cntlid, csuuidi, offset, dwords);
        let mut calls = Calls::default();
        calls.push(entry, Data::Out(self.bytes[self.sent..self.sent + piece].to_vec()));
        self.sent += piece;
        self.calls = Some(calls);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_nvme::state::{IoCqAttr, IoSqState, encode};

    #[test]
    fn only_the_phase_of_queues_at_slot_0_is_turned_and_twice_is_never() {
        let cq = |qid, tail| IoCqState { qsize: 7, qid, tail, attr: IoCqAttr::new().with_pc(true), ..IoCqState::default() };
        let sq = |qid| IoSqState { qsize: 7, qid, cqid: qid, ..IoSqState::default() };
        let mut bytes = vec![0; encoded_bytes(2, 3, 8)];
        encode(true, &[sq(1), sq(2)], &[cq(1, 0), cq(2, 3), cq(3, 0)], &[1; 8], &mut bytes).expect("a state");
        let before = bytes.clone();
        turn_phases(&mut bytes);
        let state = ControllerState::parse(&bytes).expect("a state");
        let phases: Vec<_> = state.nvme.expect("queues").cqs().map(|cq| cq.attr.s0pt()).collect();
        assert_eq!(phases, [true, false, true]);
        turn_phases(&mut bytes);
        assert_eq!(bytes, before);
        for len in 0..before.len() {
            turn_phases(&mut bytes[..len]);
        }
    }
}
