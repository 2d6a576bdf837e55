//! The client's end of a connection: one request at a time, its reply awaited for a bounded time.
//!
//! The server is not trusted: whatever it sends is checked for its size before it is read, descriptors that nobody asked for are
//! closed, and a connection on which anything was wrong is not used again. A reply that comes too late would be taken for that
//! of the next request, so a connection on which a reply did not come in time is over as well.

use super::wire::{HEADER_BYTES, Header, errno};
use crate::memory::MemoryError;
use crate::socket::{MAX_FDS, Stream};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use zerocopy::{FromZeros, IntoBytes};

/// Most commands of the server that are turned down while one reply is awaited.
const MAX_INTERRUPTIONS: u32 = 64;
/// Most bytes behind the header of a command of the server.
const MAX_COMMAND_BYTES: usize = (1 << 20) + 64;

/// Why a request to a vfio-user server failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection had ended before.
    #[error("the vfio-user server is gone")]
    Gone,
    /// The server has closed the connection.
    #[error("the vfio-user server has closed the connection")]
    Closed,
    /// No reply came in time.
    #[error("the vfio-user server did not answer in {0} ms")]
    TimedOut(u32),
    /// The connection.
    #[error("the connection to the vfio-user server: {0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol.
    #[error("the vfio-user server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server answered with an error; the connection goes on.
    #[error("the vfio-user server refused command {command}: errno {errno}")]
    Refused {
        /// The command.
        command: u16,
        /// errno.
        errno: u32,
    },
    /// The server speaks another version.
    #[error("the vfio-user server speaks version {major}.{minor}")]
    Version {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
    },
    /// The server has no function that a driver here could drive.
    #[error("the vfio-user device {0}")]
    NoFunction(&'static str),
    /// Memory of the server that cannot be mapped.
    #[error("memory of the vfio-user server: {0}")]
    Memory(#[from] MemoryError),
    /// More than the server agreed to.
    #[error("the vfio-user server takes no {0}")]
    Limit(&'static str),
}

impl ClientError {
    /// Whether the connection goes on after it.
    fn is_harmless(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Gone | Self::Limit(_))
    }
}

impl From<ClientError> for io::Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Io(error) => error,
            ClientError::Refused { errno, .. } => Self::from_raw_os_error(i32::try_from(errno).unwrap_or(0)),
            ClientError::TimedOut(_) => Self::new(io::ErrorKind::TimedOut, error),
            ClientError::Gone | ClientError::Closed => Self::new(io::ErrorKind::NotConnected, error),
            other => Self::other(other),
        }
    }
}

/// A command to send, and what may come back.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub command: u16,
    /// The payload, in two pieces.
    pub payload: [&'a [u8]; 2],
    pub fds: &'a [BorrowedFd<'a>],
    /// Bytes that the reply's payload has at least, and at most.
    pub reply: (usize, usize),
}

impl<'a> Request<'a> {
    /// A command with a reply of a fixed size.
    pub fn new(command: u16, payload: &'a [u8], reply: usize) -> Self {
        Self { command, payload: [payload, &[]], fds: &[], reply: (reply, reply) }
    }

    /// A command whose reply says nothing; servers that echo a little are forgiven.
    pub fn lax(command: u16, payload: &'a [u8]) -> Self {
        Self { reply: (0, 64), ..Self::new(command, payload, 0) }
    }
}

/// A connection, or what is left of it.
#[derive(Debug)]
pub(super) struct Link {
    connection: Mutex<Option<Connection>>,
    gone: AtomicBool,
    why: OnceLock<String>,
    /// The socket once more, to see and to say that it ends.
    socket: OwnedFd,
    refused: AtomicU64,
    turned_down: AtomicU64,
}

struct Connection {
    stream: Box<dyn Stream>,
    /// Fires when the time for a request is over.
    timer: OwnedFd,
    armed: bool,
    timeout_ms: u32,
    last_id: u16,
    /// The payload of the reply.
    reply: Vec<u8>,
    /// Descriptors that came with the message being read.
    fds: Vec<OwnedFd>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("last_id", &self.last_id).finish_non_exhaustive()
    }
}

impl Link {
    /// A link over a connected stream, with `timeout_ms` milliseconds for each request.
    pub fn new(stream: Box<dyn Stream>, timeout_ms: u32) -> Result<Self, ClientError> {
        let waker = stream.waker().ok_or(ClientError::Limit("stream that cannot be waited for"))?;
        let socket = rustix::io::fcntl_dupfd_cloexec(waker, 3).map_err(io::Error::from)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(io::Error::from)?;
        let connection = Connection {
            stream,
            timer,
            armed: false,
            timeout_ms: timeout_ms.max(1),
            last_id: 0,
            reply: Vec::with_capacity(4096),
            fds: Vec::new(),
        };
        Ok(Self {
            connection: Mutex::new(Some(connection)),
            gone: AtomicBool::new(false),
            why: OnceLock::new(),
            socket,
            refused: AtomicU64::new(0),
            turned_down: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command, waits for its reply and hands the payload and the descriptors to `take`. Anything but an error reply
    /// ends the connection, an error of `take` too.
    pub fn call<T>(
        &self,
        request: &Request<'_>,
        take: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let mut connection = self.lock();
        let Some(open) = connection.as_mut() else { return Err(ClientError::Gone) };
        let result = open.exchange(request, &self.turned_down).and_then(|()| {
            let fds = std::mem::take(&mut open.fds);
            take(&open.reply, fds)
        });
        if let Err(error) = &result {
            match error {
                ClientError::Refused { .. } => drop(self.refused.fetch_add(1, Ordering::Relaxed)),
                error if error.is_harmless() => {}
                error => self.end(&mut connection, error),
            }
        }
        result
    }

    /// Takes what has come without being asked for: commands, which are turned down, or the connection's end. Says whether the
    /// connection stands.
    pub fn look(&self) -> bool {
        let mut connection = self.lock();
        let Some(open) = connection.as_mut() else { return false };
        if let Err(error) = open.take_commands(&self.turned_down) {
            self.end(&mut connection, &error);
        }
        connection.is_some()
    }

    /// Ends the connection.
    pub fn close(&self, why: &ClientError) {
        self.end(&mut self.lock(), why);
    }

    fn end(&self, connection: &mut Option<Connection>, why: &ClientError) {
        let _first = self.why.set(why.to_string());
        self.gone.store(true, Ordering::Release);
        *connection = None;
        let _ended = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    #[inline]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub fn why(&self) -> Option<&str> {
        self.why.get().map(String::as_str)
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub fn turned_down(&self) -> u64 {
        self.turned_down.load(Ordering::Relaxed)
    }
}

impl Connection {
    /// Sends a command and reads its reply into `reply` and `fds`.
    fn exchange(&mut self, request: &Request<'_>, turned_down: &AtomicU64) -> Result<(), ClientError> {
        self.armed = false;
        self.last_id = self.last_id.wrapping_add(1);
        let [first, second] = request.payload;
        let header = Header::command(self.last_id, request.command, first.len() + second.len());
        self.send_all([header.as_bytes(), first, second], request.fds)?;
        for _ in 0..MAX_INTERRUPTIONS {
            let header = self.header()?;
            if header.is_command() {
                self.turn_down(&header)?;
                turned_down.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if !header.is_reply() || header.id != self.last_id || header.command != request.command {
                return Err(ClientError::Protocol("a reply that nobody waits for"));
            }
            let (least, most) = request.reply;
            let len = header.payload_len(most).ok_or(ClientError::Protocol("a reply of a wrong size"))?;
            self.payload(len)?;
            return match header.failure() {
                Some(errno) => {
                    self.fds.clear();
                    Err(ClientError::Refused { command: request.command, errno })
                }
                None if len < least => Err(ClientError::Protocol("a reply that is too short")),
                None => Ok(()),
            };
        }
        Err(ClientError::Protocol("commands without end"))
    }

    fn take_commands(&mut self, turned_down: &AtomicU64) -> Result<(), ClientError> {
        self.armed = false;
        for _ in 0..MAX_INTERRUPTIONS {
            if !self.has_something()? {
                return Ok(());
            }
            let header = self.header()?;
            if !header.is_command() {
                return Err(ClientError::Protocol("a reply that nobody waits for"));
            }
            self.turn_down(&header)?;
            turned_down.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn has_something(&self) -> Result<bool, ClientError> {
        let waker = self.stream.waker().ok_or(ClientError::Closed)?;
        let mut fds = [PollFd::from_borrowed_fd(waker, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// A command of the server: memory is shared by descriptors here, so there is nothing that it could need.
    fn turn_down(&mut self, header: &Header) -> Result<(), ClientError> {
        let len = header.payload_len(MAX_COMMAND_BYTES).ok_or(ClientError::Protocol("a command of a wrong size"))?;
        self.payload(len)?;
        self.fds.clear();
        if header.no_reply() {
            return Ok(());
        }
        let reply = header.error_reply(errno::ENOTSUP);
        self.send_all([reply.as_bytes(), &[], &[]], &[])
    }

    fn header(&mut self) -> Result<Header, ClientError> {
        let mut header = Header::new_zeroed();
        self.fds.clear();
        let Self { stream, fds, .. } = self;
        let mut bytes = [0; HEADER_BYTES];
        let mut have = receive(stream.as_mut(), &mut bytes, fds)?;
        while have < HEADER_BYTES {
            self.wait(PollFlags::IN)?;
            have += receive(self.stream.as_mut(), &mut bytes[have..], &mut self.fds)?;
        }
        header.as_mut_bytes().copy_from_slice(&bytes);
        Ok(header)
    }

    fn payload(&mut self, len: usize) -> Result<(), ClientError> {
        self.reply.clear();
        self.reply.resize(len, 0);
        let mut have = 0;
        while have < len {
            let got = receive(self.stream.as_mut(), &mut self.reply[have..], &mut self.fds)?;
            have += got;
            if got == 0 {
                self.wait(PollFlags::IN)?;
            }
        }
        Ok(())
    }

    /// Sends everything; descriptors go with the first byte.
    fn send_all(&mut self, parts: [&[u8]; 3], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let mut slices = parts.map(IoSlice::new);
        let mut left = &mut slices[..];
        let mut fds = fds;
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match self.stream.send(left, fds) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(sent) => {
                    fds = &[];
                    IoSlice::advance_slices(&mut left, sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits for the stream, at most until the time of the request is over.
    fn wait(&mut self, what: PollFlags) -> Result<(), ClientError> {
        if !self.armed {
            let ms = self.timeout_ms;
            let it_value = Timespec { tv_sec: i64::from(ms / 1000), tv_nsec: i64::from(ms % 1000) * 1_000_000 };
            let once = Itimerspec { it_interval: Timespec::default(), it_value };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).map_err(io::Error::from)?;
            self.armed = true;
        }
        let waker = self.stream.waker().ok_or(ClientError::Closed)?;
        let timer = PollFd::from_borrowed_fd(self.timer.as_fd(), PollFlags::IN);
        let mut fds = [PollFd::from_borrowed_fd(waker, what), timer];
        match poll(&mut fds, None) {
            Ok(_) if fds[1].revents().is_empty() => Ok(()),
            // Also when both are ready: a server that sends a byte now and then has no more time than any other.
            Ok(_) => Err(ClientError::TimedOut(self.timeout_ms)),
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}

/// Takes bytes that have come; 0 when there are none now.
fn receive(stream: &mut dyn Stream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, ClientError> {
    let got = match stream.recv(into, fds) {
        Ok(0) => return Err(ClientError::Closed),
        Ok(got) => got.min(into.len()),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
        Err(error) => return Err(error.into()),
    };
    if fds.len() > MAX_FDS {
        return Err(ClientError::Protocol("more descriptors than a message may have"));
    }
    Ok(got)
}
