//! The kernel's side of passthrough: what takes submission entries and gives completion entries.
#![allow(unsafe_code)]

use crate::memory::Arena;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Buffers that can be registered with a ring.
const FIXED_PLACES: u32 = 64;
/// Most bytes of one registered buffer: the kernel takes no larger ones.
const FIXED_BYTES: usize = 1 << 30;
/// `IORING_ENTER_GETEVENTS`.
const GETEVENTS: u32 = 1;

/// One submission entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Which passthrough ([`Channel::operation`](super::abi::Channel::operation)).
    pub operation: u32,
    /// The command.
    pub command: [u8; 80],
    /// The registered buffer that its data lies in.
    pub fixed: Option<u16>,
    /// Comes back with the completion.
    pub user_data: u64,
}

/// One completion entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// That of the submission.
    pub user_data: u64,
    /// A status, or a negative errno.
    pub res: i32,
    /// The 64-bit result.
    pub result: u64,
}

/// What a ring is to be like. What the kernel or the device cannot is left out, and [`Carrier::options`] says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CarrierOptions {
    /// Completions are looked for at the device (IORING_SETUP_IOPOLL) instead of waiting for its interrupt.
    pub iopoll: bool,
    /// Memory can be registered, so that it is not pinned for each command.
    pub fixed: bool,
}

/// Takes submission entries, gives completion entries. The kernel does; tests have others.
///
/// Whatever an entry points to must stay as it is until its completion has been taken from [`next`](Self::next).
pub trait Carrier: Send {
    /// Queues an entry; `false` if there is no room until the next [`submit`](Self::submit).
    fn push(&mut self, entry: &Entry) -> bool;

    /// Hands what is queued over: all of it, or as much as could be.
    fn submit(&mut self);

    /// Entries queued that the other side has not taken.
    fn queued(&mut self) -> usize;

    /// Lets the other side look for completions where it does not bring them by itself.
    fn look(&mut self) {}

    /// The next completion.
    fn next(&mut self) -> Option<Ended>;

    /// Waits until there is a completion, without handing anything over; `false` if waiting cannot work. Returns without one after
    /// `most`, if that is given, or when a signal comes.
    fn wait(&mut self, most: Option<Duration>) -> bool;

    /// What the ring is like.
    fn options(&self) -> CarrierOptions {
        CarrierOptions::default()
    }

    /// Makes a piece of memory known for as long as the ring is there: the place to name in entries. `None` if that cannot be.
    fn register(&mut self, _arena: &Arc<Arena>, _offset: usize, _len: usize) -> Option<u16> {
        None
    }

    /// A descriptor that is readable when there are completions.
    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// ENOSYS.
    #[error("the kernel has no io_uring")]
    Missing,
    /// EPERM.
    #[error("io_uring is switched off for this process (kernel.io_uring_disabled, or a seccomp filter)")]
    Forbidden,
    /// EINVAL, or no such operation.
    #[error("the kernel's io_uring has no passthrough commands (Linux 5.19 has)")]
    TooOld,
    /// ENOMEM and others.
    #[error("cannot set up io_uring: {0}")]
    Other(#[source] io::Error),
}

impl From<io::Error> for SetupError {
    fn from(error: io::Error) -> Self {
        match rustix::io::Errno::from_io_error(&error) {
            Some(rustix::io::Errno::NOSYS) => Self::Missing,
            Some(rustix::io::Errno::PERM) => Self::Forbidden,
            Some(rustix::io::Errno::INVAL) => Self::TooOld,
            _ => Self::Other(error),
        }
    }
}

type Big = IoUring<squeue::Entry128, cqueue::Entry32>;

/// A device and a ring of the kernel's.
pub struct Uring {
    ring: Big,
    device: OwnedFd,
    /// The device is the ring's file 0.
    registered_file: bool,
    options: CarrierOptions,
    /// Registered places that are used; their arenas are held until the ring has gone.
    places: Vec<Arc<Arena>>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("options", &self.options).field("places", &self.places.len()).finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring of `depth` entries (rounded up to a power of two, at most 4,096) for the device.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(device: OwnedFd, depth: u32, wanted: CarrierOptions) -> Result<Self, SetupError> {
        let entries = depth.clamp(1, 4096).next_power_of_two();
        let (ring, iopoll) = Self::ring(entries, wanted.iopoll)?;
        let mut probe = Probe::new();
        if ring.submitter().register_probe(&mut probe).is_ok() && !probe.is_supported(opcode::UringCmd80::CODE) {
            return Err(SetupError::TooOld);
        }
        let registered_file = ring.submitter().register_files(&[device.as_raw_fd()]).is_ok();
        let fixed = wanted.fixed && ring.submitter().register_buffers_sparse(FIXED_PLACES).is_ok();
        let options = CarrierOptions { iopoll, fixed };
        Ok(Self { ring, device, registered_file, options, places: Vec::with_capacity(FIXED_PLACES as usize) })
    }

    fn ring(entries: u32, iopoll: bool) -> io::Result<(Big, bool)> {
        if iopoll && let Ok(ring) = Big::builder().setup_iopoll().build(entries) {
            return Ok((ring, true));
        }
        Ok((Big::builder().build(entries)?, false))
    }
}

impl Carrier for Uring {
    fn push(&mut self, entry: &Entry) -> bool {
        let built = if self.registered_file {
            opcode::UringCmd80::new(types::Fixed(0), entry.operation)
        } else {
            opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), entry.operation)
        };
        let built = built.cmd(entry.command).buf_index(entry.fixed).build().user_data(entry.user_data);
        // SAFETY: who pushes keeps what the entry points to until its completion has been taken (the trait's contract); the
        // descriptor lives as long as the ring.
        unsafe { self.ring.submission().push(&built) }.is_ok()
    }

    fn submit(&mut self) {
        // What could not be handed over (EAGAIN, EBUSY, EINTR) stays queued for the next call.
        let _later = self.ring.submit();
    }

    fn queued(&mut self) -> usize {
        self.ring.submission().len()
    }

    fn look(&mut self) {
        if self.options.iopoll {
            // SAFETY: no argument; submits nothing.
            let _looked = unsafe { self.ring.submitter().enter::<()>(0, 0, GETEVENTS, None) };
        }
    }

    fn next(&mut self) -> Option<Ended> {
        let entry = self.ring.completion().next()?;
        Some(Ended { user_data: entry.user_data(), res: entry.result(), result: entry.big_cqe()[0] })
    }

    fn wait(&mut self, most: Option<Duration>) -> bool {
        let submitter = self.ring.submitter();
        let waited = match most.filter(|_| !self.options.iopoll) {
            // SAFETY: no argument; submits nothing.
            None => unsafe { submitter.enter::<()>(0, 1, GETEVENTS, None) },
            Some(most) => {
                let time = types::Timespec::from(most);
                let args = types::SubmitArgs::new().timespec(&time);
                const EXT_ARG: u32 = 1 << 3;
                // SAFETY: the argument is what the flag says it is, and lives across the call; submits nothing.
                unsafe { submitter.enter(0, 1, GETEVENTS | EXT_ARG, Some(&args)) }
            }
        };
        match waited {
            Ok(_) => true,
            Err(error) => {
                let errno = rustix::io::Errno::from_io_error(&error);
                use rustix::io::Errno;
                matches!(errno, Some(Errno::INTR | Errno::TIME | Errno::AGAIN | Errno::BUSY))
            }
        }
    }

    fn options(&self) -> CarrierOptions {
        self.options
    }

    fn register(&mut self, arena: &Arc<Arena>, offset: usize, len: usize) -> Option<u16> {
        let place = u16::try_from(self.places.len()).ok().filter(|place| u32::from(*place) < FIXED_PLACES)?;
        if !self.options.fixed || len == 0 || len > FIXED_BYTES {
            return None;
        }
        let piece = libc::iovec { iov_base: arena.address(offset, len), iov_len: len };
        // SAFETY: the memory is mapped as long as its arena is held, which is until the ring has gone.
        let registered = unsafe { self.ring.submitter().register_buffers_update(u32::from(place), &[piece], None) };
        registered.ok()?;
        self.places.push(Arc::clone(arena));
        Some(place)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor lives as long as the ring, which is borrowed.
        (!self.options.iopoll).then(|| unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}
