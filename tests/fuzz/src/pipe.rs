//! A connected byte stream in memory, with room for a bounded number of bytes and descriptors that come with the first byte of
//! what they were sent with: what the kernel's sockets do, at a fraction of their price.

use dray_device::socket::Stream;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes on the way in one direction.
const ROOM: usize = 48 << 10;

#[derive(Debug, Default)]
struct Way {
    /// What was sent: descriptors begin a new piece.
    pieces: VecDeque<(Vec<OwnedFd>, VecDeque<u8>)>,
    bytes: usize,
    closed: bool,
}

/// One end.
#[derive(Debug)]
pub struct Pipe {
    from: Arc<Mutex<Way>>,
    to: Arc<Mutex<Way>>,
}

fn lock(way: &Mutex<Way>) -> MutexGuard<'_, Way> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipe {
    /// Two connected ends.
    #[must_use]
    pub fn pair() -> (Self, Self) {
        let (one, other) = (Arc::<Mutex<Way>>::default(), Arc::<Mutex<Way>>::default());
        (Self { from: Arc::clone(&one), to: Arc::clone(&other) }, Self { from: other, to: one })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        lock(&self.to).closed = true;
        let mut from = lock(&self.from);
        from.closed = true;
        from.pieces.clear();
    }
}

impl Stream for Pipe {
    fn recv(&mut self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut way = lock(&self.from);
        let Some((with, bytes)) = way.pieces.front_mut() else {
            return if way.closed { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        };
        let len = bytes.len().min(into.len());
        if len > 0 {
            fds.append(with);
        }
        for (to, from) in into.iter_mut().zip(bytes.drain(..len)) {
            *to = from;
        }
        if bytes.is_empty() {
            way.pieces.pop_front();
        }
        way.bytes -= len;
        Ok(len)
    }

    fn send(&mut self, bytes: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut way = lock(&self.to);
        if way.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let room = ROOM.saturating_sub(way.bytes);
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if !fds.is_empty() || way.pieces.is_empty() {
            let fds = fds.iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect::<io::Result<_>>()?;
            way.pieces.push_back((fds, VecDeque::new()));
        }
        let mut sent = 0;
        for slice in bytes {
            let len = slice.len().min(room - sent);
            if let Some((_, piece)) = way.pieces.back_mut() {
                piece.extend(&slice[..len]);
            }
            sent += len;
        }
        way.bytes += sent;
        Ok(sent)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_in_order_and_descriptors_with_the_first_of_theirs() {
        let (mut a, mut b) = Pipe::pair();
        let given = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
        assert_eq!(a.send(&[IoSlice::new(b"on"), IoSlice::new(b"e")], &[]).expect("send"), 3);
        assert_eq!(a.send(&[IoSlice::new(b"two")], &[given.as_fd()]).expect("send"), 3);
        let (mut bytes, mut fds) = ([0; 8], Vec::new());
        assert_eq!((b.recv(&mut bytes, &mut fds).expect("recv"), fds.len()), (3, 0));
        assert_eq!((b.recv(&mut bytes[..1], &mut fds).expect("recv"), fds.len()), (1, 1));
        assert_eq!((b.recv(&mut bytes, &mut fds).expect("recv"), &bytes[..2]), (2, &b"wo"[..]));
        assert_eq!(b.recv(&mut bytes, &mut fds).expect_err("nothing").kind(), io::ErrorKind::WouldBlock);
        assert_eq!(a.send(&[IoSlice::new(&[1; ROOM]), IoSlice::new(b"x")], &[]).expect("send"), ROOM);
        assert_eq!(a.send(&[IoSlice::new(b"x")], &[]).expect_err("full").kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(b.recv(&mut vec![0; 2 * ROOM], &mut fds).expect("recv"), ROOM);
        assert_eq!(b.recv(&mut bytes, &mut fds).expect("closed"), 0);
    }
}
