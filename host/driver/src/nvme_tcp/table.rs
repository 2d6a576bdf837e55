//! The commands outstanding on a connection, and what a PDU may do to them.

use super::error::TcpFault;
use super::receive::{Pdu, PduSink};
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{Arena, Segment};
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::status::Status;
use dray_nvme::tcp::fabrics::{DataDirection, OPCODE, direction};
use dray_nvme::tcp::pdu::{DataPdu, Digests, IcResp, R2t, field};
use std::collections::VecDeque;
use std::sync::Arc;

/// Bits of a command identifier that are its place in the table; the others count its uses.
const PLACE_BITS: u32 = 12;
/// Most commands of a connection.
pub(super) const MAX_DEPTH: usize = (1 << PLACE_BITS) - 1;

/// A part of a command's memory.
#[derive(Clone, Debug)]
struct Piece {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
}

/// What an R2T asks for and is not sent yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) ttag: u16,
    pub(super) at: u32,
    pub(super) left: u32,
}

/// A command.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) entry: SubmissionEntry,
    pub(super) cid: u16,
    pub(super) len: u32,
    /// Its data goes with it.
    pub(super) inline: bool,
    pub(super) transfer: Option<Transfer>,
    tag: u64,
    deadline_ns: u64,
    busy: bool,
    /// It has been put among the bytes to send.
    encoded: bool,
    /// A success must have moved all of its data.
    strict: bool,
    direction: DataDirection,
    /// Bytes that have come, or that R2Ts have asked for.
    moved: u32,
    pieces: Vec<Piece>,
}

impl Command {
    /// Shows the memory behind a range of the command's data, which lies within it.
    pub(super) fn memory(&self, at: u32, len: usize, mut visit: impl FnMut(&Arena, usize, usize)) {
        let (mut skip, mut left) = (at as usize, len);
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            if skip >= piece.len {
                skip -= piece.len;
                continue;
            }
            let part = left.min(piece.len - skip);
            visit(&piece.arena, piece.offset + skip, part);
            (skip, left) = (0, left - part);
        }
    }
}

/// What waits to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Capsule(u16),
    Data(u16),
}

/// Bounds of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) depth: usize,
    pub(super) max_transfer: usize,
    pub(super) in_capsule: usize,
}

/// What ICResp said.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) cpda: u8,
    pub(super) maxh2cdata: u32,
}

/// The commands.
#[derive(Debug)]
pub(super) struct Table {
    shape: Shape,
    commands: Box<[Command]>,
    free: Vec<u16>,
    pub(super) work: VecDeque<Work>,
}

impl Table {
    pub(super) fn new(shape: Shape) -> Self {
        let depth = shape.depth.clamp(1, MAX_DEPTH);
        let command = |index: usize| Command {
            entry: SubmissionEntry::default(),
            cid: index as u16,
            len: 0,
            inline: false,
            transfer: None,
            tag: 0,
            deadline_ns: 0,
            busy: false,
            encoded: false,
            strict: false,
            direction: DataDirection::None,
            moved: 0,
            pieces: Vec::with_capacity(Self::most_pieces(&shape)),
        };
        Self {
            commands: (0..depth).map(command).collect(),
            free: (0..depth as u16).rev().collect(),
            // A capsule and one transfer of each command.
            work: VecDeque::with_capacity(2 * depth),
            shape: Shape { depth, ..shape },
        }
    }

    /// A piece a page, and one for an odd beginning.
    fn most_pieces(shape: &Shape) -> usize {
        shape.max_transfer.div_ceil(dray_device::memory::PAGE) + 1
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn outstanding(&self) -> usize {
        self.commands.len() - self.free.len()
    }

    pub(super) fn command(&mut self, place: u16) -> Option<&mut Command> {
        self.commands.get_mut(usize::from(place))
    }

    pub(super) fn mark_encoded(&mut self, place: u16) {
        if let Some(command) = self.command(place) {
            command.encoded = true;
        }
    }

    pub(super) fn submit(
        &mut self,
        deadline_ns: u64,
        entry: &SubmissionEntry,
        data: &[Segment<'_>],
        tag: u64,
        strict: bool,
    ) -> Result<(), SubmitError> {
        let direction = direction(entry);
        let len = data.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.len())).unwrap_or(usize::MAX);
        if len > self.shape.max_transfer || direction == DataDirection::Both || direction == DataDirection::None && len > 0 {
            return Err(SubmitError::BadData);
        }
        let Some(&place) = self.free.last() else { return Err(SubmitError::Full) };
        let Some(command) = self.commands.get_mut(usize::from(place)) else { return Err(SubmitError::Full) };
        command.pieces.clear();
        let mut joined: Option<Segment<'_>> = None;
        for piece in data.iter().filter(|piece| !piece.is_empty()) {
            joined = match joined.and_then(|before| before.joined(piece)) {
                Some(longer) => Some(longer),
                None => {
                    keep(&mut command.pieces, joined)?;
                    Some(*piece)
                }
            };
        }
        keep(&mut command.pieces, joined)?;
        self.free.pop();
        command.cid = next_cid(command.cid);
        // Fabrics commands carry that much on every queue, whatever IOCCSZ says (TCP 1.1 §3.4.1).
        let fabrics = entry.cdw0.opcode() == OPCODE && len <= 8 << 10;
        let inline = direction == DataDirection::ToController && len > 0 && (len <= self.shape.in_capsule || fabrics);
        (command.entry, command.len, command.inline, command.direction) = (*entry, len as u32, inline, direction);
        (command.tag, command.deadline_ns, command.strict) = (tag, deadline_ns, strict);
        (command.busy, command.encoded, command.moved, command.transfer) = (true, false, 0, None);
        self.work.push_back(Work::Capsule(place));
        Ok(())
    }

    fn find(&mut self, cid: u16) -> Result<(u16, &mut Command), TcpFault> {
        let place = cid & ((1 << PLACE_BITS) - 1);
        match self.commands.get_mut(usize::from(place)) {
            // What has not been sent cannot be spoken of.
            Some(command) if command.busy && command.cid == cid && command.encoded => Ok((place, command)),
            _ => Err(TcpFault::UnknownCommand { cid }),
        }
    }

    fn end(&mut self, cid: u16, status: Status, result: u64) -> Result<Completion, TcpFault> {
        let (place, command) = self.find(cid)?;
        if command.transfer.is_some() {
            return Err(TcpFault::Sequence);
        }
        let whole = match command.direction {
            DataDirection::ToHost => command.moved == command.len,
            DataDirection::ToController => command.inline || command.moved == command.len,
            _ => true,
        };
        if !whole && command.strict && !status.is_error() {
            return Err(TcpFault::ShortData { cid });
        }
        command.busy = false;
        command.pieces.clear();
        let tag = command.tag;
        self.free.push(place);
        Ok(Completion { tag, status, result, unknown: false })
    }

    fn response(&mut self, cqe: &CompletionEntry) -> Result<Completion, TcpFault> {
        let status = cqe.status();
        if matches!(status.sct().0, 4..=6) {
            return Err(TcpFault::ReservedStatus { status: status.into_bits() });
        }
        self.end(cqe.cid, status, cqe.result64())
    }

    fn asked(&mut self, r2t: &R2t) -> Result<(), TcpFault> {
        let (place, command) = self.find(r2t.cccid)?;
        let wrong = TcpFault::DataRange { cid: r2t.cccid };
        if command.direction != DataDirection::ToController || command.inline || r2t.r2tl == 0 || r2t.r2to != command.moved {
            return Err(wrong);
        }
        if command.transfer.is_some() {
            return Err(TcpFault::TooManyR2ts { cid: r2t.cccid });
        }
        let moved = command.moved.checked_add(r2t.r2tl).filter(|moved| *moved <= command.len).ok_or(wrong)?;
        command.transfer = Some(Transfer { ttag: r2t.ttag, at: r2t.r2to, left: r2t.r2tl });
        command.moved = moved;
        self.work.push_back(Work::Data(place));
        Ok(())
    }

    fn data_begins(&mut self, data: &DataPdu) -> Result<(), TcpFault> {
        let (_, command) = self.find(data.cccid)?;
        let wrong = TcpFault::DataRange { cid: data.cccid };
        // In order and once: a hole would be filled with what was in the memory before.
        if command.direction != DataDirection::ToHost || data.datao != command.moved {
            return Err(wrong);
        }
        let end = data.datao.checked_add(data.datal).filter(|end| *end <= command.len).ok_or(wrong)?;
        if data.ch.flags.success() && (!data.ch.flags.last() || end != command.len && command.strict) {
            return Err(TcpFault::Header { offset: field::FLAGS });
        }
        Ok(())
    }

    fn data(&mut self, cid: u16, bytes: &[u8]) -> Result<(), TcpFault> {
        let (_, command) = self.find(cid)?;
        let mut rest = bytes;
        command.memory(command.moved, bytes.len(), |arena, offset, len| {
            let (part, after) = rest.split_at(len);
            arena.write(offset, part);
            rest = after;
        });
        command.moved += bytes.len() as u32;
        Ok(())
    }

    /// Looks for a command whose time is over.
    pub(super) fn overdue(&self, now_ns: u64) -> Option<u16> {
        self.commands.iter().find(|command| command.busy && command.deadline_ns <= now_ns).map(|command| command.cid)
    }

    /// Everything outstanding ends, nobody knows how.
    pub(super) fn drain(&mut self, done: &mut dyn FnMut(Completion)) -> usize {
        self.work.clear();
        let mut drained = 0;
        for (place, command) in self.commands.iter_mut().enumerate().filter(|(_, command)| command.busy) {
            command.busy = false;
            command.transfer = None;
            command.pieces.clear();
            self.free.push(place as u16);
            drained += 1;
            done(Completion { tag: command.tag, status: Status::ABORTED_SQ_DELETION, result: 0, unknown: true });
        }
        drained
    }
}

fn keep(pieces: &mut Vec<Piece>, segment: Option<Segment<'_>>) -> Result<(), SubmitError> {
    let Some(segment) = segment else { return Ok(()) };
    if pieces.len() == pieces.capacity() {
        return Err(SubmitError::BadData);
    }
    pieces.push(Piece { arena: Arc::clone(segment.arena()), offset: segment.offset(), len: segment.len() });
    Ok(())
}

/// The identifier with the next generation. A place is never all ones, so FFFFh does not occur.
fn next_cid(cid: u16) -> u16 {
    cid.wrapping_add(1 << PLACE_BITS)
}

/// Takes PDUs for a table.
pub(super) struct Incoming<'a> {
    pub(super) table: &'a mut Table,
    pub(super) peer: &'a mut Option<Peer>,
    pub(super) digests: Digests,
    pub(super) current: &'a mut Option<DataPdu>,
    pub(super) done: &'a mut dyn FnMut(Completion),
    pub(super) count: usize,
}

impl Incoming<'_> {
    fn opened(&mut self, response: &IcResp) -> Result<(), TcpFault> {
        let refuse = |offset| Err(TcpFault::Parameters { offset });
        if response.pfv != 0 {
            return refuse(field::PFV);
        }
        if response.cpda > 31 {
            return refuse(field::PDA);
        }
        if response.dgst != self.digests {
            return refuse(field::DGST);
        }
        if response.maxh2cdata < 4096 || !response.maxh2cdata.is_multiple_of(4) {
            return refuse(field::MAXH2CDATA);
        }
        *self.peer = Some(Peer { cpda: response.cpda, maxh2cdata: response.maxh2cdata });
        Ok(())
    }

    fn finish(&mut self, completion: Completion) {
        self.count += 1;
        (self.done)(completion);
    }
}

impl PduSink for Incoming<'_> {
    fn pdu(&mut self, pdu: &Pdu) -> Result<(), TcpFault> {
        match pdu {
            Pdu::Opened(response) => self.opened(response),
            Pdu::Response(cqe) => {
                let completion = self.table.response(cqe)?;
                self.finish(completion);
                Ok(())
            }
            Pdu::Asked(r2t) => self.table.asked(r2t),
            Pdu::Data(data) => {
                self.table.data_begins(data)?;
                *self.current = Some(*data);
                Ok(())
            }
        }
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), TcpFault> {
        let cid = self.current.as_ref().map(|data| data.cccid).ok_or(TcpFault::Sequence)?;
        self.table.data(cid, bytes)
    }

    fn end(&mut self) -> Result<(), TcpFault> {
        let data = self.current.take().ok_or(TcpFault::Sequence)?;
        if data.ch.flags.success() {
            let completion = self.table.end(data.cccid, Status::SUCCESS, 0)?;
            self.finish(completion);
        }
        Ok(())
    }
}
