//! Controller data queues of a controller that the kernel owns, by interfaces that were proposed and that **no released kernel
//! has** (see [`dray_device::kernel_cdq`]); behind the feature `kernel-cdq`.
//!
//! [`KernelCdqOwner`] keeps the contract of [`CdqOwner`](crate::CdqOwner) towards its consumer: entries come in order, once, in
//! batches; what was taken stays until it is given back, and can be shown again; a line wakes a consumer that sleeps; a queue
//! that has gone says why, and its entries can still be taken. What differs is behind it:
//! - with a **read descriptor** the kernel gives slots back as it copies. What was read and not given back is kept here, never more
//!   than the queue has slots, and nothing more is read meanwhile, so that a slow consumer fills the controller's queue as it
//!   would fill its own. What a process has read is lost if it dies. Nothing wakes: a slow timer looks;
//! - with **memory of our own** entries are told by phase tag, slots given back by Set Features through [`HeadTeller`] (admin
//!   passthrough), and the kernel signals the line when the tail pointer trigger fires.
//!
//! The kernel keeps asynchronous events to itself, so that "queue full" is seen by its entry alone (UDMQ entry, ESA 111b).

mod mapped;
mod read;
#[cfg(all(test, not(loom)))]
mod tests;

use crate::admin::{AdminData, Ticket};
use crate::cdq::{CdqConfig, check};
use crate::error::CdqError;
use crate::passthru::PassthruAdmin;
use dray_device::command::{Completion, SubmitError};
use dray_device::event::EventLine;
use dray_device::kernel_cdq::{CdqKernel, CdqRequest};
use dray_device::poll::{Next, Progress, Time};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use mapped::MappedEntries;
use read::ReadEntries;
use rustix::io::Errno;

/// Which of the two interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelCdqKind {
    /// The ioctl that returns a descriptor to read.
    ReadDescriptor,
    /// The ioctl that takes memory and an eventfd.
    OwnMemory,
}

/// Where a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelCdqState {
    /// The controller fills it.
    Live {
        /// CDQID.
        id: u16,
    },
    /// It waits for a head that is being told, and is deleted then.
    Deleting,
    /// The controller does not fill it (any more), or it cannot be used. Entries that are there can still be taken.
    Gone(KernelGone),
}

/// Why a queue has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelGone {
    /// It was deleted.
    #[error("the queue was deleted")]
    Deleted,
    /// The kernel's error while it was read or deleted: the device has gone, or the controller was reset.
    #[error("the kernel has no such queue any more: {0}")]
    Kernel(Errno),
    /// The kernel copied what cannot be entries.
    #[error("what the kernel copied is not this queue's: {0}")]
    Nonsense(&'static str),
    /// The controller did not take slots back: it would fill up.
    #[error("the controller does not take slots back: {0}")]
    HeadRefused(Status),
    /// Nobody knows whether the controller took slots back: admin commands do not get through.
    #[error("nobody knows whether the controller takes slots back")]
    HeadUnknown,
}

/// Why there is no queue.
#[derive(Debug, thiserror::Error)]
pub enum KernelCdqError {
    /// The set-up makes no sense, or there is no memory or descriptor.
    #[error(transparent)]
    Cdq(#[from] CdqError),
    /// ENOTTY.
    #[error("this kernel has no interface for controller data queues (none that was released has)")]
    NoInterface,
    /// The kernel's refusal.
    #[error("the kernel does not create the queue: {0}")]
    Kernel(#[source] std::io::Error),
    /// It made another queue than it was asked for.
    #[error("the kernel made a queue of {slots} slots of {entry_bytes} bytes")]
    OtherQueue {
        /// Slots.
        slots: u32,
        /// Bytes of an entry.
        entry_bytes: u32,
    },
}

/// Tells heads: the admin queue, as far as a queue's owner needs it.
pub trait HeadTeller {
    /// Sends a Set Features.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    fn tell(&mut self, now: Time, entry: &SubmissionEntry) -> Result<Ticket, SubmitError>;

    /// Its answer, once.
    fn answered(&mut self, ticket: Ticket) -> Option<Completion>;
}

impl HeadTeller for PassthruAdmin {
    fn tell(&mut self, now: Time, entry: &SubmissionEntry) -> Result<Ticket, SubmitError> {
        self.request(now, entry, AdminData::None)
    }

    fn answered(&mut self, ticket: Ticket) -> Option<Completion> {
        self.answer(ticket).map(|answer| answer.completion)
    }
}

/// Details that have good defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelCdqOptions {
    /// Microseconds that the queue stands empty before the trigger is armed.
    pub arm_after_us: u64,
    /// Microseconds between the slow timer's looks.
    pub slow_poll_us: u64,
}

impl Default for KernelCdqOptions {
    fn default() -> Self {
        Self { arm_after_us: 50, slow_poll_us: 1_000 }
    }
}

enum Source {
    Read(ReadEntries),
    Mapped(MappedEntries),
}

/// The owner of a queue that the kernel created. Dropping it deletes the queue.
pub struct KernelCdqOwner {
    kernel: Box<dyn CdqKernel>,
    source: Source,
    config: CdqConfig,
    options: KernelCdqOptions,
    state: KernelCdqState,
    id: u16,
    line: EventLine,
    next_look: Time,
}

impl std::fmt::Debug for KernelCdqOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelCdqOwner").field("config", &self.config).field("state", &self.state).finish_non_exhaustive()
    }
}

impl KernelCdqOwner {
    /// Has the kernel create a queue.
    ///
    /// # Errors
    /// [`KernelCdqError`].
    pub fn create(
        mut kernel: Box<dyn CdqKernel>,
        kind: KernelCdqKind,
        config: CdqConfig,
        options: KernelCdqOptions,
    ) -> Result<Self, KernelCdqError> {
        check(&config)?;
        let request = CdqRequest {
            slots: config.slots,
            entry_bytes: config.format.entry_bytes,
            cntlid: config.cntlid,
            kind: u16::from(config.kind),
            phase_byte: config.format.phase_byte,
            phase_mask: config.format.phase_mask,
        };
        let line = EventLine::new().map_err(CdqError::from)?;
        let (id, source) = match kind {
            KernelCdqKind::ReadDescriptor => {
                let queue = kernel.create_read(&request).map_err(refused)?;
                if (queue.slots, queue.entry_bytes) != (request.slots, request.entry_bytes) {
                    return Err(KernelCdqError::OtherQueue { slots: queue.slots, entry_bytes: queue.entry_bytes });
                }
                (queue.id, Source::Read(ReadEntries::new(queue.reader, config.slots, config.format)))
            }
            KernelCdqKind::OwnMemory => {
                let memory = MappedEntries::memory(&config)?;
                let id = kernel.create_mapped(&request, &memory, &line).map_err(refused)?;
                (id, Source::Mapped(MappedEntries::new(id, memory, &config)))
            }
        };
        let state = KernelCdqState::Live { id };
        Ok(Self { kernel, source, config, options, state, id, line, next_look: Time::default() })
    }

    /// Where the queue is.
    #[must_use]
    pub fn state(&self) -> KernelCdqState {
        self.state
    }

    /// CDQID while the queue is live.
    #[must_use]
    pub fn id(&self) -> Option<u16> {
        self.is_live().then_some(self.id)
    }

    /// What it was created with.
    #[must_use]
    pub fn config(&self) -> &CdqConfig {
        &self.config
    }

    /// The line that is signalled when entries wait for a consumer that sleeps.
    #[must_use]
    pub fn event_line(&self) -> &EventLine {
        &self.line
    }

    fn is_live(&self) -> bool {
        matches!(self.state, KernelCdqState::Live { .. })
    }

    fn gone(&mut self, why: KernelGone) {
        if !matches!(self.state, KernelCdqState::Gone(_)) {
            self.state = KernelCdqState::Gone(why);
        }
    }

    /// Takes the queue's own affairs further: heads that are being told, the trigger, the slow timer.
    pub fn poll(&mut self, admin: &mut dyn HeadTeller, now: Time) -> Progress {
        let mut work = 0;
        if let Source::Mapped(mapped) = &mut self.source {
            match mapped.poll_update(admin, &self.line) {
                Ok(steps) => work += steps,
                Err(why) => self.gone(why),
            }
        }
        if self.state == KernelCdqState::Deleting {
            work += u32::from(self.try_delete());
        }
        if !self.is_live() {
            return Progress { work, next: if work > 0 { Next::Now } else { Next::OnWake } };
        }
        if let Source::Mapped(mapped) = &mut self.source {
            // What could not be sent now is tried again at the next poll.
            let _later = mapped.tell_head(admin, now);
            if self.config.arm_trigger {
                mapped.arm_if_idle(admin, now, self.options.arm_after_us);
            }
        }
        if now >= self.next_look {
            self.next_look = now.after_us(self.options.slow_poll_us);
            if self.waiting() > 0 {
                self.line.signal();
            }
        }
        Progress { work, next: if work > 0 { Next::Now } else { Next::At(self.next_look) } }
    }

    /// Copies up to `max` new entries to the end of `into`, oldest first; returns how many. They stay until they are given back.
    pub fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        self.look();
        match &mut self.source {
            Source::Read(read) => read.take(max, into),
            Source::Mapped(mapped) => mapped.entries.take(max, into),
        }
    }

    /// New entries behind those that were taken; of those that the kernel holds, as many as there is room for.
    pub fn waiting(&mut self) -> u32 {
        self.look();
        match &mut self.source {
            Source::Read(read) => read.waiting(),
            Source::Mapped(mapped) => mapped.entries.waiting(),
        }
    }

    fn look(&mut self) {
        let live = self.is_live();
        if let Source::Read(read) = &mut self.source
            && live
            && let Err(why) = read.look()
        {
            self.gone(why);
        }
    }

    /// Entries taken and not given back.
    #[must_use]
    pub fn taken(&self) -> u32 {
        match &self.source {
            Source::Read(read) => read.taken(),
            Source::Mapped(mapped) => mapped.entries.taken(),
        }
    }

    /// Shows the last `entries` that were taken again; at most those that were not given back.
    pub fn rewind(&mut self, entries: u32) {
        match &mut self.source {
            Source::Read(read) => read.rewind(entries),
            Source::Mapped(mapped) => mapped.entries.rewind(entries),
        }
    }

    /// Gives the oldest `entries` taken back.
    ///
    /// # Errors
    /// [`CdqError::NotTaken`], [`CdqError::NotLive`]; nothing is given back then.
    pub fn give_back(&mut self, admin: &mut dyn HeadTeller, now: Time, entries: u32) -> Result<(), CdqError> {
        if !self.is_live() {
            return Err(CdqError::NotLive);
        }
        let (given, taken) = match &mut self.source {
            Source::Read(read) => (read.give_back(entries), read.taken()),
            Source::Mapped(mapped) => (mapped.entries.give_back(entries), mapped.entries.taken()),
        };
        if !given {
            return Err(CdqError::NotTaken { asked: entries, taken });
        }
        let Source::Mapped(mapped) = &mut self.source else { return Ok(()) };
        match mapped.tell_head(admin, now) {
            Ok(()) | Err(SubmitError::Full) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the controller knows, or is being told, all that was given back.
    #[must_use]
    pub fn head_is_told(&self) -> bool {
        match &self.source {
            Source::Read(_) => true,
            Source::Mapped(mapped) => mapped.head_is_told(),
        }
    }

    /// Deletes the queue, once a head that is being told has been answered. Its entries can still be taken.
    pub fn delete(&mut self) {
        if self.is_live() {
            // What came before the deletion is the consumer's.
            self.look();
            if self.is_live() {
                self.state = KernelCdqState::Deleting;
                self.try_delete();
            }
        }
    }

    /// Whether it has been deleted now.
    fn try_delete(&mut self) -> bool {
        match &mut self.source {
            Source::Read(read) => read.close(),
            // The controller orders nothing between commands: a head that it takes behind the deletion would move that of the next
            // queue with this identifier.
            Source::Mapped(mapped) if mapped.is_telling() => return false,
            Source::Mapped(mapped) => {
                if let Err(error) = self.kernel.delete_mapped(self.id) {
                    mapped.keep_memory();
                    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                    self.gone(KernelGone::Kernel(errno));
                    return true;
                }
                mapped.is_deleted();
            }
        }
        self.gone(KernelGone::Deleted);
        true
    }
}

impl Drop for KernelCdqOwner {
    fn drop(&mut self) {
        let Source::Mapped(mapped) = &mut self.source else { return };
        if mapped.may_be_filled() {
            // With a head under way the deletion would be too early: the kernel deletes the queue when the device is closed.
            if mapped.is_telling() || self.kernel.delete_mapped(self.id).is_err() {
                mapped.keep_memory();
            }
        }
    }
}

fn refused(error: std::io::Error) -> KernelCdqError {
    match Errno::from_io_error(&error) {
        Some(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS) => KernelCdqError::NoInterface,
        _ => KernelCdqError::Kernel(error),
    }
}
