//! What goes out on a connection: PDU headers in a byte queue, data where it lies in the association's memory, gathered into as
//! few sends as the socket takes.

use dray_device::memory::Arena;
use dray_device::socket::Stream;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use zerocopy::{Immutable, IntoBytes};

/// Pieces of one send.
const GATHER: usize = 128;
/// Bytes that one send, of which a poll makes one, takes at most: neighbours wait for it.
pub(super) const MOST_BYTES: usize = 64 << 10;
/// Commands whose data one send takes at most.
const MOST_COMMANDS: usize = 32;
/// With more header bytes waiting than this, nothing more is received.
const FULL: usize = 64 << 10;

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// The next bytes of the header queue.
    Bytes(u32),
    /// Memory of the association.
    Data { offset: u64, len: u32 },
    /// Everything of this command has gone before.
    Done(u16),
}

/// The queue of what goes out.
pub(super) struct Outbox {
    bytes: Vec<u8>,
    /// Bytes at the front of `bytes` that have gone.
    gone: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have gone.
    partly: u32,
    memory: Option<Arc<Arena>>,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), gone: 0, pieces: VecDeque::new(), partly: 0, memory: None }
    }

    /// The connection has become a queue of so many entries, whose data is in `memory`, in at most so many pieces besides one of
    /// each entry. Reserves what the queue can need.
    pub(super) fn attach(&mut self, memory: Arc<Arena>, entries: usize, pieces: usize) {
        self.bytes.reserve(2 * FULL + entries * 256);
        self.pieces.reserve(pieces + entries * 8);
        self.memory = Some(memory);
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes of headers and pages that wait.
    #[inline]
    pub(super) fn queued(&self) -> usize {
        self.bytes.len() - self.gone
    }

    /// The client reads too slowly to be served more.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.queued() > FULL
    }

    /// Raw bytes.
    #[inline]
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        let len = bytes.len() as u32;
        if let Some(Piece::Bytes(before)) = self.pieces.back_mut() {
            *before += len;
        } else if len > 0 {
            self.pieces.push_back(Piece::Bytes(len));
        }
    }

    /// A header, with its digest if `digest`, padded to `until` bytes from the PDU's start.
    #[inline]
    pub(super) fn header<T: IntoBytes + Immutable>(&mut self, header: &T, digest: bool, until: usize) {
        let bytes = header.as_bytes();
        self.put(bytes);
        let mut len = bytes.len();
        if digest {
            self.put(&crc32c::crc32c(bytes).to_le_bytes());
            len += 4;
        }
        if until > len {
            self.put(&[0; 128][..(until - len).min(128)]);
        }
    }

    /// Memory of the association; it must stay as it is until [`Outbox::done`] has come out.
    #[inline]
    pub(super) fn data(&mut self, offset: usize, len: u32) {
        self.pieces.push_back(Piece::Data { offset: offset as u64, len });
    }

    /// Marks that the memory of a command is no longer needed when all before has gone.
    #[inline]
    pub(super) fn done(&mut self, command: u16) {
        self.pieces.push_back(Piece::Done(command));
    }

    /// Commands whose memory this queue still names, when the connection is gone.
    pub(super) fn drain(&mut self, mut done: impl FnMut(u16)) {
        for piece in self.pieces.drain(..) {
            if let Piece::Done(command) = piece {
                done(command);
            }
        }
        self.bytes.clear();
        (self.gone, self.partly) = (0, 0);
    }

    /// Sends what the socket takes in one call; returns the bytes.
    ///
    /// # Errors
    /// The socket's; a full socket is `Ok(0)`.
    pub(super) fn send(&mut self, stream: &mut dyn Stream, done: impl FnMut(u16)) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); GATHER];
        let mut count = 0;
        let mut at = self.gone;
        let mut skip = self.partly;
        let (mut left, mut commands) = (MOST_BYTES, 0);
        for piece in &self.pieces {
            if count == GATHER || left == 0 || commands == MOST_COMMANDS {
                break;
            }
            match *piece {
                Piece::Bytes(len) => {
                    let rest = ((len - skip) as usize).min(left);
                    slices[count] = IoSlice::new(&self.bytes[at..at + rest]);
                    (at, left) = (at + rest, left - rest);
                }
                Piece::Data { offset, len } => {
                    let Some(memory) = &self.memory else { continue };
                    let rest = ((len - skip) as usize).min(left);
                    slices[count] = memory.io_slice((offset + u64::from(skip)) as usize, rest);
                    left -= rest;
                }
                Piece::Done(_) => {
                    commands += 1;
                    continue;
                }
            }
            skip = 0;
            count += 1;
        }
        if count == 0 {
            self.advance(0, done);
            return Ok(0);
        }
        let sent = match stream.send(&slices[..count], &[]) {
            Ok(sent) => sent,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        self.advance(sent, done);
        Ok(sent)
    }

    fn advance(&mut self, mut sent: usize, mut done: impl FnMut(u16)) {
        while let Some(piece) = self.pieces.front() {
            let (len, header) = match *piece {
                Piece::Bytes(len) => (len, true),
                Piece::Data { len, .. } => (len, false),
                Piece::Done(command) => {
                    done(command);
                    self.pieces.pop_front();
                    continue;
                }
            };
            let rest = (len - self.partly) as usize;
            let part = sent.min(rest);
            if header {
                self.gone += part;
            }
            sent -= part;
            if part < rest {
                self.partly += part as u32;
                break;
            }
            self.partly = 0;
            self.pieces.pop_front();
        }
        if self.gone == self.bytes.len() {
            self.bytes.clear();
            self.gone = 0;
        } else if self.gone > FULL {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::memory::{DmaBuffer, Pages};
    use std::os::fd::{BorrowedFd, OwnedFd};

    /// Takes everything, and remembers how much of it came at once.
    #[derive(Default)]
    struct Greedy {
        bytes: Vec<u8>,
        sends: Vec<usize>,
    }

    impl Stream for Greedy {
        fn recv(&mut self, _into: &mut [u8], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn send(&mut self, bytes: &[IoSlice<'_>], _fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
            let before = self.bytes.len();
            bytes.iter().for_each(|piece| self.bytes.extend_from_slice(piece));
            self.sends.push(self.bytes.len() - before);
            Ok(self.bytes.len() - before)
        }

        fn waker(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    fn memory(len: usize) -> (DmaBuffer, Vec<u8>) {
        let buffer = DmaBuffer::allocate("outbox", len, Pages::Small).expect("memory");
        let bytes: Vec<u8> = (0..len).map(|i| (i / 251) as u8 ^ i as u8).collect();
        buffer.segment().write(&bytes);
        (buffer, bytes)
    }

    #[test]
    fn one_send_is_bounded_in_bytes_and_nothing_is_lost() {
        let (buffer, data) = memory(512 << 10);
        let (mut out, mut stream, mut ended) = (Outbox::new(), Greedy::default(), Vec::new());
        out.attach(Arc::clone(buffer.arena()), 16, 0);
        for command in 0..2u16 {
            out.put(&[command as u8; 24]);
            out.data(0, 512 << 10);
            out.done(command);
        }
        while !out.is_empty() {
            assert!(out.send(&mut stream, |command| ended.push(command)).expect("sent") > 0);
        }
        assert!(stream.sends.iter().all(|&bytes| bytes <= MOST_BYTES), "{:?}", stream.sends);
        assert_eq!(stream.sends.len(), ((2 * (24 + (512 << 10))) as usize).div_ceil(MOST_BYTES), "no half-empty sends");
        let whole = [&[0; 24][..], &data, &[1; 24], &data].concat();
        assert!(stream.bytes == whole);
        assert_eq!(ended, [0, 1]);
    }

    #[test]
    fn one_send_is_bounded_in_commands() {
        let (buffer, _data) = memory(4096);
        let (mut out, mut stream, mut ended) = (Outbox::new(), Greedy::default(), 0);
        out.attach(Arc::clone(buffer.arena()), 128, 0);
        for command in 0..100 {
            out.put(&[7; 24]);
            out.data(0, 512);
            out.done(command);
        }
        while !out.is_empty() {
            let before = ended;
            out.send(&mut stream, |_| ended += 1).expect("sent");
            assert!(ended - before <= MOST_COMMANDS, "{}", ended - before);
        }
        assert_eq!((ended, stream.sends.len()), (100, 4));
    }
}
