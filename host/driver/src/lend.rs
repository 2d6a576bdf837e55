//! Lending a controller data queue to a second process.
//!
//! What goes over is one socket. Its first message carries the layout and two descriptors: the queue's memory, sealed so that
//! it can only be mapped for reading, and the event line. After that the reader sends its head as frames of four bytes
//! (little-endian slot index); the owner checks each against the phase tags and tells the controller. The end of the socket
//! gives the queue back. How the socket itself gets to the other process (inherited, or passed over another socket) is the
//! caller's.

use crate::cdq::{CdqConfig, CdqFormat};
use crate::entries::Entries;
use dray_device::event::EventLine;
use dray_device::memory::{Arena, DmaBuffer};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// "DCDQ", version 1.
const MAGIC: u64 = 0x0000_0001_5144_4344;
/// Frames that one poll takes.
const FRAMES: usize = 64;
/// Largest entry that a reader believes in, in bytes.
const MAX_ENTRY_BYTES: u32 = 4096;

/// The first message.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Greeting {
    magic: u64,
    arena_bytes: u64,
    offset: u64,
    /// Entries given back before: the count that phase tags go by.
    place: u64,
    slots: u32,
    entry_bytes: u32,
    phase_byte: u32,
    phase_mask: u32,
}

const GREETING_BYTES: usize = size_of::<Greeting>();

/// Why a reader cannot read, or cannot give back.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    /// The socket or the memory.
    #[error("the lent queue cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// The first message is not one of a queue's owner.
    #[error("what was lent is no controller data queue: {0}")]
    BadGreeting(&'static str),
    /// The owner has taken the queue back.
    #[error("the queue's owner has taken it back")]
    Ended,
    /// More entries were to be given back than had been taken.
    #[error("{asked} entries were to be given back, {taken} had been taken")]
    NotTaken {
        /// Entries to give back.
        asked: u32,
        /// Entries taken and not given back.
        taken: u32,
    },
}

impl From<Errno> for LendError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A lent queue on its way to its reader.
#[derive(Debug)]
pub struct LentCdq {
    socket: OwnedFd,
}

impl LentCdq {
    /// The socket to hand to the reader, who opens it with [`LentReader::open`].
    #[must_use]
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }
}

/// The owner's end.
#[derive(Debug)]
pub(crate) struct Lender {
    socket: OwnedFd,
}

impl Lender {
    pub(crate) fn new(
        ring: &DmaBuffer,
        config: &CdqConfig,
        place: u64,
        line: &EventLine,
    ) -> io::Result<(Self, LentCdq)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let memory = ring.arena().lend_read_only()?;
        let greeting = Greeting {
            magic: MAGIC,
            arena_bytes: ring.arena().len() as u64,
            offset: ring.offset() as u64,
            place,
            slots: config.slots,
            entry_bytes: config.format.entry_bytes,
            phase_byte: config.format.phase_byte,
            phase_mask: u32::from(config.format.phase_mask),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [memory.as_fd(), line.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&ours, &[IoSlice::new(greeting.as_bytes())], &mut control, flags)?;
        Ok((Self { socket: ours }, LentCdq { socket: theirs }))
    }

    /// Takes the reader's heads; how many there were, and whether the reader has gone (or is sent away for nonsense).
    pub(crate) fn poll(&mut self, entries: &mut Entries) -> (u32, bool) {
        for frames in 0..FRAMES as u32 {
            let mut frame = [0u8; 5];
            match rustix::net::recv(&self.socket, &mut frame[..], RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN | Errno::INTR) => return (frames, false),
                Ok((_, 4)) => {
                    let head = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]);
                    if !entries.accept_head(head) {
                        tracing::warn!(head, "the reader of a lent queue sent a head that lies behind no new entry");
                        return (frames, true);
                    }
                }
                Ok(_) | Err(_) => return (frames, true),
            }
        }
        (FRAMES as u32, false)
    }
}

/// A lent queue as its reader sees it.
#[derive(Debug)]
pub struct LentReader {
    socket: OwnedFd,
    entries: Entries,
    line: EventLine,
    format: CdqFormat,
    /// A head that the socket had no room for.
    unsent: bool,
}

impl LentReader {
    /// Takes the queue that came with a socket.
    ///
    /// # Errors
    /// [`LendError`]; the owner notices that the socket is closed.
    pub fn open(socket: OwnedFd) -> Result<Self, LendError> {
        let mut bytes = [0u8; GREETING_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
        let mut descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let mut descriptors = descriptors.next().into_iter().flatten();
        let (Some(memory), Some(line)) = (descriptors.next(), descriptors.next()) else {
            return Err(LendError::BadGreeting("no descriptors"));
        };
        if received.bytes != GREETING_BYTES {
            return Err(LendError::BadGreeting("a message of another length"));
        }
        let greeting = Greeting::read_from_bytes(&bytes).map_err(|_| LendError::BadGreeting("too short"))?;
        let (format, arena_bytes, offset) = greeting.check().map_err(LendError::BadGreeting)?;
        let arena = Arena::open_read_only(memory, arena_bytes)?;
        let entries = Entries::new(arena, offset, greeting.slots, format, greeting.place);
        Ok(Self { socket, entries, line: EventLine::from_fd(line), format, unsent: false })
    }

    /// Layout of the entries.
    #[must_use]
    pub fn format(&self) -> CdqFormat {
        self.format
    }

    /// The line that becomes readable when entries wait; it is the owner's as well, so take its signals only after a sleep.
    #[must_use]
    pub fn event_line(&self) -> &EventLine {
        &self.line
    }

    /// Copies up to `max` new entries to the end of `into`, oldest first.
    pub fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        if self.unsent {
            // Tried again here; a socket that has ended is noticed by the next `give_back`.
            let _full = self.send_head();
        }
        self.entries.take(max, into)
    }

    /// Gives the oldest `count` taken entries back.
    ///
    /// # Errors
    /// [`LendError::NotTaken`]; [`LendError::Ended`].
    pub fn give_back(&mut self, count: u32) -> Result<(), LendError> {
        if !self.entries.give_back(count) {
            return Err(LendError::NotTaken { asked: count, taken: self.entries.taken() });
        }
        self.send_head()
    }

    /// A full socket is no error: the next head replaces this one.
    fn send_head(&mut self) -> Result<(), LendError> {
        let head = self.entries.head().to_le_bytes();
        match rustix::net::send(&self.socket, &head, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => self.unsent = false,
            Err(Errno::AGAIN | Errno::INTR) => self.unsent = true,
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(LendError::Ended),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl AsFd for LentReader {
    /// The socket: it becomes readable when the owner has gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Greeting {
    /// The format, and where the entries are, if they lie within the memory.
    fn check(&self) -> Result<(CdqFormat, usize, usize), &'static str> {
        if self.magic != MAGIC {
            return Err("another protocol");
        }
        let phase_mask = u8::try_from(self.phase_mask).map_err(|_| "a phase mask of more than a byte")?;
        let format = CdqFormat { entry_bytes: self.entry_bytes, phase_byte: self.phase_byte, phase_mask };
        if self.slots == 0 || self.entry_bytes == 0 || self.entry_bytes > MAX_ENTRY_BYTES {
            return Err("no entries");
        }
        if self.phase_byte >= self.entry_bytes || phase_mask == 0 {
            return Err("a phase tag outside the entry");
        }
        let end = (u64::from(self.slots) * u64::from(self.entry_bytes)).checked_add(self.offset);
        if end.is_none_or(|end| end > self.arena_bytes) || self.place > u64::MAX / 2 {
            return Err("entries outside the memory");
        }
        let arena_bytes = usize::try_from(self.arena_bytes).map_err(|_| "too much memory")?;
        Ok((format, arena_bytes, self.offset as usize))
    }
}
