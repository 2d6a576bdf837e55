//! A vfio-user client as the target has it: what was sent, which replies must come for it, and the check of each.
//!
//! Requests are answered in the order in which they were sent, so the client keeps them in a line; with the first bytes that
//! nobody has looked into it no longer knows, and checks only the form of what comes.

use crate::pipe::Pipe;
use dray_device::socket::Stream;
use dray_device::vfio_user::wire::{
    DeviceFeature, DeviceInfo, HEADER_BYTES, Header, IrqInfo, MigData, RegionAccess, RegionInfo, RegionIoFds, command, flags,
};
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::os::fd::{BorrowedFd, OwnedFd};
use zerocopy::{FromBytes, IntoBytes};

/// Largest payload that any reply can have here.
const MOST_PAYLOAD: usize = (64 << 10) + 64;
/// Requests without a reply at a time.
const MOST_WAITING: usize = 24;

/// A request that has no reply yet.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Its header.
    pub header: Header,
    /// Bytes of payload that its reply may have; `exact` when it has just as many, or is an error.
    pub most: usize,
    /// The reply has `most` bytes, unless it is an error.
    pub exact: bool,
}

/// A client's end of a connection.
pub struct Client {
    stream: Pipe,
    outbound: Vec<u8>,
    inbound: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Only whole messages were sent, so replies are known in number and order.
    pub sane: bool,
    /// It takes what comes.
    pub reads: bool,
    /// The server has closed it.
    pub closed: bool,
    /// Requests without a reply, in order.
    pub asked: VecDeque<Asked>,
    /// Descriptors that it said it takes in a message.
    pub takes_fds: bool,
    /// Whole requests sent.
    pub sent: u64,
    id: u16,
}

impl Client {
    /// A client's end.
    #[must_use]
    pub fn new(stream: Pipe) -> Self {
        Self {
            stream,
            outbound: Vec::new(),
            inbound: Vec::new(),
            fds: Vec::new(),
            sane: true,
            reads: true,
            closed: false,
            asked: VecDeque::new(),
            takes_fds: false,
            sent: 0,
            id: 0,
        }
    }

    /// Whether one more request may be sent.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.asked.len() < MOST_WAITING && self.outbound.is_empty() && !self.closed
    }

    /// Sends bytes; descriptors go with the first of them if nothing waits before it.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        self.flush();
        let mut rest = bytes;
        if self.outbound.is_empty() {
            match self.stream.send(&[IoSlice::new(bytes)], fds) {
                Ok(sent) => rest = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
        self.outbound.extend_from_slice(rest);
    }

    fn flush(&mut self) {
        while !self.outbound.is_empty() {
            match self.stream.send(&[IoSlice::new(&self.outbound)], &[]) {
                Ok(sent) => drop(self.outbound.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.outbound.clear(),
            }
        }
    }

    /// Sends a whole request.
    pub fn ask(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>], no_reply: bool) {
        self.id = self.id.wrapping_add(1);
        let mut header = Header::command(self.id, command, payload.len());
        header.flags |= if no_reply { flags::NO_REPLY } else { 0 };
        self.sent += 1;
        if !no_reply {
            let (most, exact) = reply_to(command, payload);
            self.asked.push_back(Asked { header, most, exact });
        }
        self.send(&[header.as_bytes(), payload].concat(), fds);
    }

    /// Takes the replies that have come and checks them; returns them: request, payload, descriptors.
    pub fn take(&mut self) -> Vec<(Header, Vec<u8>, Vec<OwnedFd>)> {
        self.flush();
        let mut replies = Vec::new();
        if !self.reads || self.closed {
            return replies;
        }
        let mut piece = [0; 2048];
        loop {
            match self.stream.recv(&mut piece, &mut self.fds) {
                Ok(0) => self.closed = true,
                Ok(len) => {
                    self.inbound.extend_from_slice(&piece[..len]);
                    // At once: descriptors come with the first byte of their message.
                    self.cut(&mut replies);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.closed = true,
            }
            return replies;
        }
    }

    /// Cuts what has come into messages.
    fn cut(&mut self, replies: &mut Vec<(Header, Vec<u8>, Vec<OwnedFd>)>) {
        while let Ok((header, rest)) = Header::read_from_prefix(&self.inbound) {
            assert!(header.is_reply(), "{header:?} is no reply");
            let len = header.payload_len(MOST_PAYLOAD).unwrap_or_else(|| panic!("{header:?}: size"));
            if rest.len() < len {
                break;
            }
            let payload = rest[..len].to_vec();
            self.inbound.drain(..HEADER_BYTES + len);
            let fds = std::mem::take(&mut self.fds);
            self.judge(&header, &payload, fds.len());
            replies.push((header, payload, fds));
        }
    }

    fn judge(&mut self, header: &Header, payload: &[u8], fds: usize) {
        let may_carry = header.command == command::GET_REGION_INFO && header.failure().is_none();
        assert!(fds <= usize::from(may_carry), "{fds} descriptors with {header:?}");
        assert!(header.failure().is_none() || payload.is_empty(), "an error reply with {} bytes: {header:?}", payload.len());
        if !self.sane {
            return;
        }
        assert!(self.takes_fds || fds == 0, "descriptors for a client that takes none");
        let asked = self.asked.pop_front().unwrap_or_else(|| panic!("{header:?}, and nothing was asked"));
        let same = (header.id, header.command) == (asked.header.id, asked.header.command);
        assert!(same, "{header:?} for {asked:?}");
        let fits = if asked.exact { payload.len() == asked.most } else { payload.len() <= asked.most };
        assert!(fits || header.failure().is_some(), "{} bytes for {asked:?}", payload.len());
    }
}

/// Bytes that a reply may have: what the client said that it has room for.
fn reply_to(asked: u16, payload: &[u8]) -> (usize, bool) {
    let word = |at: usize| payload.get(at..).and_then(|bytes| bytes.first_chunk().copied());
    let number = |at: usize| word(at).map_or(0, u32::from_le_bytes) as usize;
    let argsz = number(0);
    match asked {
        // Where the request had capabilities, the reply has no more text.
        command::VERSION => (if payload.len() > 4 { payload.len() } else { 4096 }, false),
        command::DMA_MAP | command::SET_IRQS | command::MIG_DATA_WRITE | command::RESET => (0, true),
        command::DMA_UNMAP => (24, true),
        command::GET_INFO => (argsz.min(size_of::<DeviceInfo>()), false),
        command::GET_REGION_INFO => (argsz.min(size_of::<RegionInfo>() + 32), false),
        command::GET_REGION_IO_FDS => (argsz.min(size_of::<RegionIoFds>()), false),
        command::GET_IRQ_INFO => (argsz.min(size_of::<IrqInfo>()), false),
        command::REGION_READ => {
            let count = number(12);
            if count == 0 { (size_of::<RegionAccess>(), false) } else { (size_of::<RegionAccess>() + count, true) }
        }
        command::REGION_WRITE => (size_of::<RegionAccess>(), false),
        command::REGION_WRITE_MULTI => (8, true),
        command::DEVICE_FEATURE => (argsz.max(size_of::<DeviceFeature>()), false),
        command::MIG_DATA_READ => (argsz.min(number(4) + size_of::<MigData>()), false),
        _ => (0, true),
    }
}
