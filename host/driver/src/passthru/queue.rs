//! I/O queues: the command seam over a ring to a namespace's device.

use super::about::NamespaceAbout;
use super::{PassthruConfig, completion};
use dray_device::command::{CommandQueue, Completion, QueueLimits, SubmitError};
use dray_device::memory::{Arena, Segment};
use dray_device::passthru::{HostFault, Outcome, PassthruRing, Request, UringCommand};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Whether something that the kernel or the device need not have is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It is.
    Used,
    /// It was not asked for.
    NotAsked,
    /// It was, and cannot be.
    Unavailable(&'static str),
}

/// A ring to a namespace that the kernel owns, used by one thread at a time.
///
/// Every command that was taken comes back exactly once. The NSID of commands is the namespace's own
/// ([`NamespaceAbout::nsid`]); the kernel refuses others. A command that the kernel did not send comes back with Host Pathing Error
/// (3/70h), and [`last_refusal`](Self::last_refusal) says why. When the kernel takes commands back from a controller that it reset,
/// or the device goes, they come back with [`Completion::unknown`] and the queue is dead: [`fault`](Self::fault).
///
/// Dropping the queue waits until the kernel has let go of the memory of everything under way, which ends with the kernel's own
/// time-outs at the latest; what was not [committed](CommandQueue::commit) is never sent.
#[derive(Debug)]
pub struct PassthruQueue {
    ring: PassthruRing,
    about: Arc<NamespaceAbout>,
    limits: QueueLimits,
    name: String,
    timeout_ms: u32,
    iopoll: Use,
    fixed_asked: bool,
    last_refusal: Option<HostFault>,
}

impl PassthruQueue {
    /// A queue of its own to the namespace's device; for several to one namespace see
    /// [`PassthruDevice`](super::PassthruDevice).
    ///
    /// # Errors
    /// [`PassthruError`](super::PassthruError).
    pub fn open(path: &std::path::Path, config: &PassthruConfig) -> Result<Self, super::PassthruError> {
        super::PassthruDevice::open(path, config)?.queue()
    }

    pub(super) fn over(
        name: &str,
        ring: PassthruRing,
        about: Arc<NamespaceAbout>,
        config: &PassthruConfig,
        iopoll: Use,
    ) -> Self {
        let limits = QueueLimits {
            depth: ring.depth() as u32,
            max_transfer: ring.bounds().max_transfer,
            max_write_zeroes: about.max_write_zeroes,
        };
        let (name, timeout_ms, fixed_asked) = (name.to_owned(), config.timeout_ms, config.fixed);
        Self { ring, about, limits, name, timeout_ms, iopoll, fixed_asked, last_refusal: None }
    }

    /// The device's name in the kernel: "ng0n1".
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace.
    #[must_use]
    pub fn about(&self) -> &Arc<NamespaceAbout> {
        &self.about
    }

    /// Commands under way.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.ring.in_flight()
    }

    /// Why the queue is dead, once it is.
    #[must_use]
    pub fn fault(&self) -> Option<HostFault> {
        self.ring.fault()
    }

    /// Whether the queue takes no commands any more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.ring.fault().is_some()
    }

    /// Why the kernel did not send the last command that it refused.
    #[must_use]
    pub fn last_refusal(&self) -> Option<HostFault> {
        self.last_refusal
    }

    /// Whether completions are looked for at the device.
    #[must_use]
    pub fn iopoll(&self) -> Use {
        self.iopoll
    }

    /// Whether registered memory is used.
    #[must_use]
    pub fn fixed(&self) -> Use {
        match self.ring.options().fixed {
            _ if !self.fixed_asked => Use::NotAsked,
            true => Use::Used,
            false => Use::Unavailable("the kernel takes no registered memory in passthrough commands"),
        }
    }

    /// Most pieces of data in one command.
    #[must_use]
    pub fn max_pieces(&self) -> usize {
        self.ring.bounds().max_pieces
    }

    /// Registers memory for as long as the queue lives: commands whose data is one piece of it cost the kernel less. `false` if that
    /// cannot be; commands work all the same.
    pub fn register(&mut self, arena: &Arc<Arena>) -> bool {
        self.fixed_asked && self.ring.register(arena, 0, arena.len())
    }

    /// The descriptor that is readable when commands have ended; none where they are looked for at the device.
    #[must_use]
    pub fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.ring.waker()
    }

    /// As [`CommandQueue::submit`], with metadata in a buffer of its own, and a time-out in milliseconds (0 = the queue's).
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    pub fn submit_with(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: &[Segment<'_>],
        metadata: Option<Segment<'_>>,
        timeout_ms: u32,
        tag: u64,
    ) -> Result<(), SubmitError> {
        let mut command = UringCommand::of(entry).ok_or(SubmitError::BadData)?;
        command.timeout_ms = if timeout_ms == 0 { self.timeout_ms } else { timeout_ms };
        self.ring.submit(now, &Request { command, data, metadata, tag })
    }

    /// As [`CommandQueue::poll`], with the outcome as the kernel told it.
    pub fn poll_outcomes(&mut self, now: Time, done: &mut dyn FnMut(u64, Outcome)) -> usize {
        let refusal = &mut self.last_refusal;
        self.ring.poll(now, &mut |tag, outcome| {
            if let Outcome::NotSent(fault) = outcome {
                *refusal = Some(fault);
            }
            done(tag, outcome);
        })
    }

    /// Blocks until something has ended, or for that long: for tools. `false` if waiting cannot work.
    pub fn wait(&mut self, most: std::time::Duration) -> bool {
        self.ring.wait(most)
    }
}

impl CommandQueue for PassthruQueue {
    fn limits(&self) -> QueueLimits {
        self.limits
    }

    fn free(&self) -> usize {
        self.ring.free()
    }

    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        self.submit_with(now, entry, data, None, 0, tag)
    }

    fn commit(&mut self) {
        self.ring.commit();
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        self.poll_outcomes(now, &mut |tag, outcome| done(completion(tag, outcome)))
    }
}
