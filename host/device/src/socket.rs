//! Connected byte streams that can carry descriptors: polled, never blocking. Whoever serves or uses one gets it as a value;
//! binding, connecting and accepting are done by the binary.

use rustix::io::Errno;
use rustix::net::sockopt::{set_tcp_nodelay, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most descriptors that are sent or taken with one message. A peer that sends more has broken its word.
pub const MAX_FDS: usize = 16;

/// Room for the control part of a message. Aligned, so that its usable size does not depend on where the stack is: in room that
/// is not, rustix gives up to seven bytes at its begin away, and whether one descriptor more than asked for fits is chance.
#[repr(align(8))]
struct Control([MaybeUninit<u8>; rustix::cmsg_space!(ScmRights(MAX_FDS))]);

impl Control {
    fn new() -> Self {
        Self([MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))])
    }
}

/// A connected byte stream that can carry descriptors.
pub trait Stream: Send {
    /// Takes what has come: bytes into `into`, descriptors appended to `fds`. `Ok(0)` = the peer has closed (or `into` is
    /// empty). Descriptors come with the first byte of what they were sent with.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is nothing now; [`io::ErrorKind::InvalidData`] when more than [`MAX_FDS`]
    /// descriptors came at once; otherwise the connection's end.
    fn recv(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize>;

    /// Sends bytes (gathered), and descriptors with the first byte; may send less, but then all of the descriptors.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the peer does not read; [`io::ErrorKind::InvalidInput`] for more than [`MAX_FDS`]
    /// descriptors, or for any where the stream cannot carry them; otherwise the connection's end.
    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize>;

    /// What wakes a sleeping core: readable when [`recv`](Self::recv) has something.
    fn waker(&self) -> Option<BorrowedFd<'_>>;

    /// The user who connected (effective UID), where the stream knows.
    fn peer_uid(&self) -> Option<u32> {
        None
    }
}

impl Stream for Box<dyn Stream> {
    fn recv(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        (**self).recv(into, fds)
    }

    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        (**self).send(bytes, fds)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        (**self).waker()
    }

    fn peer_uid(&self) -> Option<u32> {
        (**self).peer_uid()
    }
}

/// Where connections come from.
pub trait Listener: Send {
    /// A connection.
    type Stream: Stream;

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// The kernel's, such as too many open descriptors; the listener stays usable.
    fn accept(&mut self) -> io::Result<Option<Self::Stream>>;

    /// Readable when a connection waits.
    fn waker(&self) -> Option<BorrowedFd<'_>>;
}

/// Whoever made the credentials of a Unix socket's other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process identifier when it connected.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

/// A connected Unix stream socket, non-blocking, closed on exec.
#[derive(Debug)]
pub struct UnixSocket(OwnedFd);

impl UnixSocket {
    /// Takes a connected socket over.
    ///
    /// # Errors
    /// The kernel's, when it cannot be made non-blocking.
    pub fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = socket.into();
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(socket))
    }

    /// Two connected sockets.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self(a), Self(b)))
    }

    /// Connects to a path. A socket whose listener does not accept at once is an error, not a wait.
    ///
    /// # Errors
    /// The kernel's: no such path, nobody listens, no permission.
    pub fn connect(path: &std::path::Path) -> io::Result<Self> {
        Self::new(std::os::unix::net::UnixStream::connect(path)?)
    }

    /// Who is at the other end (`SO_PEERCRED`): as it was when the connection was made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn peer_credentials(&self) -> io::Result<PeerCredentials> {
        let peer = socket_peercred(&self.0)?;
        Ok(PeerCredentials { pid: peer.pid.as_raw_nonzero().get(), uid: peer.uid.as_raw(), gid: peer.gid.as_raw() })
    }
}

impl From<UnixSocket> for OwnedFd {
    fn from(socket: UnixSocket) -> Self {
        socket.0
    }
}

impl AsFd for UnixSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for UnixSocket {
    fn recv(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut space = Control::new();
        let mut control = RecvAncillaryBuffer::new(&mut space.0);
        let got = recv_again(&self.0, into, &mut control)?;
        let before = fds.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                fds.extend(came);
            }
        }
        // The kernel closes those that do not fit and says so; the room is rounded up, so a few more than were asked for fit.
        if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() - before > MAX_FDS {
            fds.truncate(before);
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors in one message"));
        }
        Ok(got.bytes)
    }

    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = Control::new();
        let mut control = SendAncillaryBuffer::new(&mut space.0);
        if !fds.is_empty() && (fds.len() > MAX_FDS || !control.push(SendAncillaryMessage::ScmRights(fds))) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
        }
        loop {
            match rustix::net::sendmsg(&self.0, bytes, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    fn peer_uid(&self) -> Option<u32> {
        self.peer_credentials().ok().map(|peer| peer.uid)
    }
}

fn recv_again(
    socket: &OwnedFd,
    into: &mut [u8],
    control: &mut RecvAncillaryBuffer<'_>,
) -> io::Result<rustix::net::RecvMsg> {
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(into)], control, flags) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// A connected TCP socket, non-blocking, closed on exec, without Nagle's delay. It carries no descriptors.
#[derive(Debug)]
pub struct TcpSocket(OwnedFd);

impl TcpSocket {
    /// Takes a connected socket over.
    ///
    /// # Errors
    /// The kernel's, when it cannot be made non-blocking.
    pub fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = socket.into();
        rustix::io::ioctl_fionbio(&socket, true)?;
        set_tcp_nodelay(&socket, true)?;
        Ok(Self(socket))
    }
}

impl AsFd for TcpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for TcpSocket {
    fn recv(&mut self, into: &mut [u8], _fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        loop {
            // Cheaper than recvmsg: this is asked in every poll.
            match rustix::net::recv(&self.0, &mut *into, RecvFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                other => return Ok(other?.1),
            }
        }
    }

    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        if !fds.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "TCP carries no descriptors"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match rustix::net::sendmsg(&self.0, bytes, &mut SendAncillaryBuffer::default(), flags) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// A bound Unix socket, made non-blocking.
#[derive(Debug)]
pub struct UnixListener(std::os::unix::net::UnixListener);

impl UnixListener {
    /// Takes a listening socket over.
    ///
    /// # Errors
    /// The kernel's, when it cannot be made non-blocking.
    pub fn new(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }
}

impl Listener for UnixListener {
    type Stream = UnixSocket;

    fn accept(&mut self) -> io::Result<Option<UnixSocket>> {
        accepted(self.0.accept())?.map(UnixSocket::new).transpose()
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// A bound TCP socket, made non-blocking.
#[derive(Debug)]
pub struct TcpListener(std::net::TcpListener);

impl TcpListener {
    /// Takes a listening socket over.
    ///
    /// # Errors
    /// The kernel's, when it cannot be made non-blocking.
    pub fn new(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }
}

impl Listener for TcpListener {
    type Stream = TcpSocket;

    fn accept(&mut self) -> io::Result<Option<TcpSocket>> {
        accepted(self.0.accept())?.map(TcpSocket::new).transpose()
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// Nobody waits, or whoever did has gone again: both are no connection.
fn accepted<T, A>(result: io::Result<(T, A)>) -> io::Result<Option<T>> {
    match result {
        Ok((stream, _from)) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_come_with_the_first_byte_of_their_message() {
        let (mut a, mut b) = UnixSocket::pair().expect("pair");
        let mut fds = Vec::new();
        let nothing = b.recv(&mut [0; 4], &mut fds).expect_err("nothing yet");
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(a.send(&[IoSlice::new(b"on"), IoSlice::new(b"e")], &[]).expect("send"), 3);
        let given = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
        assert_eq!(a.send(&[IoSlice::new(b"two")], &[given.as_fd(), given.as_fd()]).expect("send"), 3);
        let mut bytes = [0; 3];
        assert_eq!((b.recv(&mut bytes, &mut fds).expect("recv"), fds.len()), (3, 0));
        assert_eq!((b.recv(&mut bytes[..1], &mut fds).expect("recv"), fds.len()), (1, 2));
        assert_eq!((b.recv(&mut bytes, &mut fds).expect("recv"), fds.len()), (2, 2));
        drop(a);
        assert_eq!(b.recv(&mut bytes, &mut fds).expect("closed"), 0);
    }

    #[test]
    fn too_many_descriptors_are_an_error_at_either_end() {
        let (mut a, mut b) = UnixSocket::pair().expect("pair");
        let given = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
        let many = [given.as_fd(); MAX_FDS + 1];
        assert_eq!(a.send(&[IoSlice::new(b"x")], &many).expect_err("refused").kind(), io::ErrorKind::InvalidInput);
        // The first counts fit into the room of 16, which is rounded up; the last do not.
        for count in [MAX_FDS + 1, MAX_FDS + 2, MAX_FDS + 3, 64] {
            let many = vec![given.as_fd(); count];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
            rustix::net::sendmsg(&a.0, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).expect("send");
            let mut fds = Vec::new();
            let error = b.recv(&mut [0; 4], &mut fds).expect_err("refused");
            assert_eq!((error.kind(), fds.len()), (io::ErrorKind::InvalidData, 0), "{count} descriptors");
        }
        // What one may send comes whole.
        assert_eq!(a.send(&[IoSlice::new(b"x")], &[given.as_fd(); MAX_FDS]).expect("send"), 1);
        let mut fds = Vec::new();
        assert_eq!((b.recv(&mut [0; 4], &mut fds).expect("recv"), fds.len()), (1, MAX_FDS));
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (a, _b) = UnixSocket::pair().expect("pair");
        let peer = a.peer_credentials().expect("credentials");
        assert_eq!(peer.pid, i32::try_from(std::process::id()).expect("pid"));
        assert_eq!(a.peer_uid(), Some(peer.uid));
    }

    #[test]
    fn tcp_carries_bytes_and_no_descriptors() {
        let bound = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = bound.local_addr().expect("address");
        let mut listener = TcpListener::new(bound).expect("listener");
        assert!(listener.accept().expect("nobody").is_none());
        let mut a = TcpSocket::new(std::net::TcpStream::connect(address).expect("connect")).expect("socket");
        let mut b = loop {
            if let Some(stream) = listener.accept().expect("accept") {
                break stream;
            }
        };
        assert!(a.send(&[IoSlice::new(b"x")], &[b.as_fd()]).is_err());
        assert_eq!(a.send(&[IoSlice::new(b"hello")], &[]).expect("send"), 5);
        let mut bytes = [0; 8];
        let got = loop {
            match b.recv(&mut bytes, &mut Vec::new()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => break other.expect("recv"),
            }
        };
        assert_eq!(&bytes[..got], b"hello");
    }
}
