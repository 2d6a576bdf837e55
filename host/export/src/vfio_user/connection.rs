//! One client's connection: bytes and descriptors to requests, replies to bytes. Everything is bounded: one request and one
//! reply at a time, of a size that was agreed.

use dray_device::socket::{MAX_FDS, Stream};
use dray_device::vfio_user::wire::{Capabilities, HEADER_BYTES, Header};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zerocopy::IntoBytes;

/// Most bytes taken from the socket at a time.
const PIECE: usize = 64 << 10;

/// What a look at the socket has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// Nothing now.
    Nothing,
    /// A part of a request.
    Part,
    /// A request is whole: take it.
    Request,
    /// The client has gone.
    Gone,
    /// The client has broken the protocol, and what it sends next makes no sense.
    Broken,
}

/// A request.
pub(crate) struct Request {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    /// Closed when dropped: whoever needs one takes it.
    pub(crate) fds: Vec<OwnedFd>,
}

/// How sending goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Nothing is left to send.
    All,
    /// The client does not read.
    Blocked,
    /// The client has gone.
    Gone,
}

struct Outgoing {
    header: Header,
    payload: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
}

pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    header: Header,
    got: usize,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
    limit: usize,
    out: Option<Outgoing>,
    /// Memory of a reply that was sent, for the next.
    spare: Vec<u8>,
    /// What the client said in VERSION.
    pub(crate) client: Option<Capabilities>,
    /// Nothing more is taken; the connection ends when the reply has been sent.
    pub(crate) closing: bool,
}

impl Connection {
    /// Requests may have `limit` bytes behind their header.
    pub(crate) fn new(stream: Box<dyn Stream>, limit: usize) -> Self {
        Self {
            stream,
            header: Header::default(),
            got: 0,
            payload: Vec::new(),
            fds: Vec::new(),
            limit,
            out: None,
            spare: Vec::new(),
            client: None,
            closing: false,
        }
    }

    pub(crate) fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.stream.waker()
    }

    /// Whether a reply is on its way.
    pub(crate) fn is_sending(&self) -> bool {
        self.out.is_some()
    }

    /// Takes a piece of what has come. The header is read by itself, so that descriptors are those of its message.
    pub(crate) fn receive(&mut self) -> Received {
        if self.got < HEADER_BYTES {
            let got = self.got;
            match self.stream.recv(&mut self.header.as_mut_bytes()[got..], &mut self.fds) {
                Ok(0) => return Received::Gone,
                Ok(n) => self.got += n,
                Err(error) => return ended(&error),
            }
            if self.got < HEADER_BYTES {
                return Received::Part;
            }
            if !self.header.is_command() || self.header.payload_len(self.limit).is_none() {
                return Received::Broken;
            }
        }
        let Some(len) = self.header.payload_len(self.limit) else { return Received::Broken };
        let have = self.got - HEADER_BYTES;
        if have < len {
            let piece = (len - have).min(PIECE);
            self.payload.resize(have + piece, 0);
            match self.stream.recv(&mut self.payload[have..], &mut self.fds) {
                Ok(0) => return Received::Gone,
                Ok(n) => self.got += n,
                Err(error) => return ended(&error),
            }
        }
        match self.got - HEADER_BYTES {
            _ if self.fds.len() > MAX_FDS => Received::Broken,
            have if have < len => Received::Part,
            _ => Received::Request,
        }
    }

    /// The request that is whole. Its payload's memory may be given back with [`recycle`](Self::recycle).
    pub(crate) fn take(&mut self) -> Request {
        self.payload.truncate(self.got - HEADER_BYTES);
        self.got = 0;
        Request {
            header: self.header,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }
    }

    pub(crate) fn recycle(&mut self, mut payload: Vec<u8>) {
        if payload.capacity() <= PIECE {
            payload.clear();
            self.payload = payload;
        }
    }

    /// The start of a reply, in memory of one before.
    pub(crate) fn begin(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut payload = std::mem::take(&mut self.spare);
        payload.clear();
        payload.extend_from_slice(bytes);
        payload
    }

    /// A reply to send; there is none on its way.
    pub(crate) fn reply(&mut self, header: Header, payload: Vec<u8>, fd: Option<OwnedFd>) {
        self.out = Some(Outgoing { header, payload, sent: 0, fd });
    }

    /// Sends what there is to send: header, payload and descriptor with one call.
    pub(crate) fn flush(&mut self) -> Sent {
        while let Some(out) = &mut self.out {
            let header = out.header.as_bytes();
            let from = out.sent.min(header.len());
            let parts = [IoSlice::new(&header[from..]), IoSlice::new(&out.payload[out.sent - from..])];
            let fds: &[BorrowedFd<'_>] = &out.fd.as_ref().map(AsFd::as_fd).into_iter().collect::<Vec<_>>();
            match self.stream.send(&parts, fds) {
                Ok(n) => out.sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Blocked,
                Err(_) => return Sent::Gone,
            }
            out.fd = None;
            if out.sent >= HEADER_BYTES + out.payload.len()
                && let Some(sent) = self.out.take()
                && sent.payload.capacity() <= PIECE
            {
                self.spare = sent.payload;
            }
        }
        Sent::All
    }
}

fn ended(error: &io::Error) -> Received {
    match error.kind() {
        io::ErrorKind::WouldBlock => Received::Nothing,
        io::ErrorKind::InvalidData => Received::Broken,
        _ => Received::Gone,
    }
}
