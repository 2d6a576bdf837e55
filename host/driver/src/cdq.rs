//! The owner of a controller data queue: a ring in host memory that the controller fills (Base 2.3 §3.3.1.4, §5.2.4, §8.1.7).
//!
//! There is no submission side and no doorbell: new entries are told by their phase tag, slots are given back by Set Features
//! 21h. A consumer that sleeps is woken by the tail pointer trigger: armed at the slot after the head while the queue is empty,
//! with another look at the phase tags when the arming has completed, since an entry may have come in between. Some devices
//! report only one such event ever, or at another slot than expected, so a slow timer looks as well.

use crate::admin::{AdminData, Event, Ticket};
use crate::driver::Driver;
use crate::entries::Entries;
use crate::error::CdqError;
use crate::lend::{Lender, LentCdq};
use crate::link::{Link, Orphan, OrphanStage};
use crate::prp::{ListMemory, write_list};
use dray_device::command::SubmitError;
use dray_device::event::EventLine;
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::poll::{Next, Progress, Time};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_nvme::cdq::{QueueType, UDMQ_ENTRY_BYTES, UDMQ_PHASE_BYTE, UDMQ_PHASE_MASK};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::event::{EventType, cdqid, one_shot_info};
use dray_nvme::status::Status;
use std::sync::Arc;

/// Most bytes of one queue.
pub const MAX_CDQ_BYTES: u64 = 1 << 30;
/// Fewest slots: with two a device that marks the last free slot "full" would overwrite its own first entry.
pub const MIN_CDQ_SLOTS: u32 = 3;

/// How entries of a queue are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdqFormat {
    /// Bytes of an entry, a multiple of 4.
    pub entry_bytes: u32,
    /// The byte of the entry that holds the phase tag.
    pub phase_byte: u32,
    /// The phase tag's bit in that byte.
    pub phase_mask: u8,
}

impl CdqFormat {
    /// The user data migration queue, entry type 0 (NVMCS, UDMQ entry).
    pub const UDMQ: Self = Self {
        entry_bytes: UDMQ_ENTRY_BYTES as u32,
        phase_byte: UDMQ_PHASE_BYTE as u32,
        phase_mask: UDMQ_PHASE_MASK,
    };
}

/// What a queue is created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdqConfig {
    /// QT, the queue type; 0 = user data migration queue.
    pub kind: u8,
    /// CQS: for a UDMQ the CNTLID of the controller to watch.
    pub cntlid: u16,
    /// Slots; one less than that many entries fit.
    pub slots: u32,
    /// Layout of the entries.
    pub format: CdqFormat,
    /// Whether the tail pointer trigger is armed when the queue stands empty.
    pub arm_trigger: bool,
}

/// Details of a queue that have good defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdqOptions {
    /// Describe the memory with a PRP list (PC = 0) instead of one contiguous range. Needs MCMR above 1.
    pub prp_list: bool,
    /// Which pages the queue is made of.
    pub pages: Pages,
    /// Microseconds that the queue stands empty before the trigger is armed: arming costs a command and an event.
    pub arm_after_us: u64,
    /// Microseconds between the slow timer's looks.
    pub slow_poll_us: u64,
}

impl Default for CdqOptions {
    fn default() -> Self {
        Self { prp_list: false, pages: Pages::PreferHuge, arm_after_us: 50, slow_poll_us: 1_000 }
    }
}

/// Where a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CdqState {
    /// Its creation is under way.
    Creating,
    /// The controller fills it.
    Live {
        /// CDQID; 0 is one.
        id: u16,
    },
    /// Its deletion is under way.
    Deleting,
    /// The controller does not fill it (any more). Entries that are there can still be taken.
    Gone(GoneReason),
}

/// Why a queue is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoneReason {
    /// It was deleted.
    Deleted,
    /// The controller was reset.
    Reset,
    /// The controller refused to create it.
    NotCreated(Status),
    /// The controller did not take slots back: it would fill up.
    HeadRefused(Status),
}

/// Memory of a queue: the ring, and its PRP list if it has one.
#[derive(Debug)]
pub(crate) struct CdqMemory {
    ring: MappedBuffer,
    list: Option<MappedBuffer>,
}

impl CdqMemory {
    fn new(space: &AddressSpace, config: &CdqConfig, options: &CdqOptions) -> Result<Self, CdqError> {
        let bytes = (config.slots as usize * config.format.entry_bytes as usize).next_multiple_of(PAGE);
        // New shared memory is zeroed, as the phase tags must be before the queue is created.
        let ring = MappedBuffer::new(space, DmaBuffer::allocate("dray-cdq", bytes, options.pages)?)?;
        let mut list = None;
        if options.prp_list {
            let pages = bytes / PAGE;
            let list_bytes = (pages.max(2) - 1).div_ceil(PAGE / 8 - 1) * PAGE;
            let memory = MappedBuffer::new(space, DmaBuffer::allocate("dray-cdq-list", list_bytes, Pages::Small)?)?;
            let (arena, offset) = (memory.arena(), memory.buffer().offset());
            write_list(ListMemory { arena, offset, iova: memory.iova(), bytes: list_bytes }, ring.iova(), pages);
            list = Some(memory);
        }
        Ok(Self { ring, list })
    }

    /// Whether it is one range, and PRP1 of the creation.
    fn pointer(&self) -> (bool, u64) {
        self.list.as_ref().map_or((true, self.ring.iova()), |list| (false, list.iova()))
    }
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Creating(Ticket),
    Live,
    /// To be deleted as soon as the admin queue has room.
    Delete,
    Deleting(Ticket),
    /// The controller still has it, but it cannot be used.
    Broken(GoneReason),
    Gone(GoneReason),
}

/// A Set Features 21h under way.
#[derive(Clone, Copy, Debug)]
struct HeadUpdate {
    ticket: Ticket,
    armed: bool,
}

/// The owner of one controller data queue. Every call that takes the driver must get the one that the queue was created with.
/// Dropping the owner deletes the queue.
#[derive(Debug)]
pub struct CdqOwner {
    link: Arc<Link>,
    generation: u32,
    memory: Arc<CdqMemory>,
    pub(crate) entries: Entries,
    config: CdqConfig,
    options: CdqOptions,
    stage: Stage,
    id: u16,
    delete_wanted: bool,
    update: Option<HeadUpdate>,
    /// The place that the controller was last told.
    told: u64,
    armed: bool,
    may_arm: bool,
    empty_since: Option<Time>,
    next_look: Time,
    full: bool,
    line: EventLine,
    lender: Option<Lender>,
}

impl CdqOwner {
    /// Allocates a queue in an arena of its own and begins to create it, with [`CdqOptions::default`].
    ///
    /// # Errors
    /// [`CdqError`]; what the controller says comes later, as [`GoneReason::NotCreated`].
    pub fn create(driver: &mut Driver, now: Time, config: CdqConfig) -> Result<Self, CdqError> {
        Self::create_with(driver, now, config, CdqOptions::default())
    }

    /// As [`create`](Self::create).
    ///
    /// # Errors
    /// [`CdqError`].
    pub fn create_with(
        driver: &mut Driver,
        now: Time,
        config: CdqConfig,
        options: CdqOptions,
    ) -> Result<Self, CdqError> {
        check(&config)?;
        // MCMR 0 is "not told" and 1 is "contiguous only".
        if options.prp_list && driver.identify().is_some_and(|id| id.mcmr == 1) {
            return Err(CdqError::Unsupported("it takes contiguous ones only (MCMR 1)"));
        }
        let memory = Arc::new(CdqMemory::new(driver.space(), &config, &options)?);
        let line = EventLine::new()?;
        let (contiguous, prp1) = memory.pointer();
        let dwords = config.slots * (config.format.entry_bytes / 4);
        let entry = SubmissionEntry::create_cdq(QueueType(config.kind), config.cntlid, contiguous, dwords, prp1);
        let ticket = driver.request_described(now, &entry)?;
        let ring = &memory.ring;
        let entries = Entries::new(Arc::clone(ring.arena()), ring.buffer().offset(), config.slots, config.format, 0);
        Ok(Self {
            link: Arc::clone(driver.link()),
            generation: driver.generation(),
            entries,
            memory,
            config,
            options,
            stage: Stage::Creating(ticket),
            id: 0,
            delete_wanted: false,
            update: None,
            told: 0,
            armed: false,
            may_arm: config.arm_trigger,
            empty_since: None,
            next_look: now,
            full: false,
            line,
            lender: None,
        })
    }

    /// Where the queue is.
    #[must_use]
    pub fn state(&self) -> CdqState {
        match self.stage {
            Stage::Creating(_) => CdqState::Creating,
            Stage::Live => CdqState::Live { id: self.id },
            Stage::Delete | Stage::Deleting(_) => CdqState::Deleting,
            Stage::Broken(reason) | Stage::Gone(reason) => CdqState::Gone(reason),
        }
    }

    /// CDQID while the queue is live.
    #[must_use]
    pub fn id(&self) -> Option<u16> {
        matches!(self.stage, Stage::Live).then_some(self.id)
    }

    /// What it was created with.
    #[must_use]
    pub fn config(&self) -> &CdqConfig {
        &self.config
    }

    /// Whether the controller has reported the queue full (one-shot event 01h): the log may have a hole from there on.
    #[must_use]
    pub fn full_reported(&self) -> bool {
        self.full
    }

    /// The line that is signalled when entries wait for a consumer that sleeps.
    #[must_use]
    pub fn event_line(&self) -> &EventLine {
        &self.line
    }

    /// Takes the queue's own affairs further: answers of its admin commands, the head that is still to be told, the trigger,
    /// the slow timer, the reader that it is lent to.
    pub fn poll(&mut self, driver: &mut Driver, now: Time) -> Progress {
        if driver.generation() != self.generation && !matches!(self.stage, Stage::Gone(_)) {
            self.update = None;
            self.stage = Stage::Gone(GoneReason::Reset);
        }
        let mut work = self.poll_stage(driver, now);
        if !matches!(self.stage, Stage::Live) {
            return Progress { work, next: if work > 0 { Next::Now } else { Next::OnWake } };
        }
        work += self.poll_update(driver);
        work += self.poll_lender();
        // What could not be sent now is tried again at the next poll.
        let _later = self.tell_head(driver, now);
        self.arm_if_idle(driver, now);
        if now >= self.next_look {
            self.next_look = now.after_us(self.options.slow_poll_us);
            // Whether the trigger is armed does not matter: entries may have come before it was, or the device has none.
            if (self.config.arm_trigger || self.lender.is_some()) && self.entries.any() {
                self.line.signal();
            }
        }
        let next = self.empty_since.filter(|_| !self.armed).map_or(self.next_look, |since| {
            since.after_us(self.options.arm_after_us).min(self.next_look)
        });
        Progress { work, next: if work > 0 { Next::Now } else { Next::At(next) } }
    }

    fn poll_stage(&mut self, driver: &mut Driver, now: Time) -> u32 {
        match self.stage {
            Stage::Creating(ticket) => {
                let Some(answer) = driver.answer(ticket) else { return 0 };
                self.stage = if answer.completion.unknown {
                    Stage::Gone(GoneReason::Reset)
                } else if answer.completion.status.is_error() {
                    Stage::Gone(GoneReason::NotCreated(answer.completion.status))
                } else {
                    self.id = answer.completion.result as u16;
                    if self.delete_wanted { Stage::Delete } else { Stage::Live }
                };
                1
            }
            // The controller orders nothing between commands: a head that it takes behind the deletion would move that of the
            // next queue with this identifier, over entries that nobody has read.
            Stage::Delete if self.update.is_some() => self.poll_update(driver),
            Stage::Delete => match driver.request(now, &SubmissionEntry::delete_cdq(self.id), AdminData::None) {
                Ok(ticket) => {
                    self.stage = Stage::Deleting(ticket);
                    1
                }
                Err(_) => 0,
            },
            Stage::Deleting(ticket) => {
                let Some(answer) = driver.answer(ticket).map(|answer| answer.completion) else { return 0 };
                let there = answer.unknown || answer.status.is_error() && !answer.status.is(Status::INVALID_CDQ);
                // Refused: the controller may go on filling it, so its memory is not given up.
                self.stage = if there { Stage::Broken(GoneReason::Deleted) } else { Stage::Gone(GoneReason::Deleted) };
                1
            }
            Stage::Live | Stage::Broken(_) | Stage::Gone(_) => 0,
        }
    }

    fn poll_update(&mut self, driver: &mut Driver) -> u32 {
        let Some(update) = self.update else { return 0 };
        let Some(answer) = driver.answer(update.ticket) else { return 0 };
        self.update = None;
        let status = answer.completion.status;
        if !status.is_error() {
            self.armed = update.armed;
            // An entry may have come before the trigger was armed: it would wake nobody.
            if self.armed && self.entries.any() {
                self.line.signal();
            }
        } else if update.armed {
            // A device without the trigger: the slow timer and polling go on.
            self.may_arm = false;
        } else if !answer.completion.unknown && matches!(self.stage, Stage::Live) {
            self.stage = Stage::Broken(GoneReason::HeadRefused(status));
        }
        1
    }

    fn poll_lender(&mut self) -> u32 {
        let Some(lender) = &mut self.lender else { return 0 };
        let (frames, ended) = lender.poll(&mut self.entries);
        if ended {
            // What the reader had and did not give back has never counted as taken here: the owner sees it next.
            self.lender = None;
        }
        frames + u32::from(ended)
    }

    /// One Set Features at a time; the next one carries whatever the head is by then.
    fn tell_head(&mut self, driver: &mut Driver, now: Time) -> Result<(), SubmitError> {
        if self.update.is_some() || self.told == self.entries.returned() {
            return Ok(());
        }
        self.set_feature(driver, now, None)
    }

    fn set_feature(&mut self, driver: &mut Driver, now: Time, trigger: Option<u32>) -> Result<(), SubmitError> {
        let entry = SubmissionEntry::set_cdq_feature(self.id, self.entries.head(), trigger);
        let ticket = driver.request(now, &entry, AdminData::None)?;
        self.update = Some(HeadUpdate { ticket, armed: trigger.is_some() });
        self.told = self.entries.returned();
        // Without the trigger's bit the command disarms it.
        self.armed = false;
        Ok(())
    }

    fn arm_if_idle(&mut self, driver: &mut Driver, now: Time) {
        if !self.may_arm || self.armed || self.update.is_some() {
            return;
        }
        if !self.entries.is_drained() {
            self.empty_since = None;
            return;
        }
        let since = *self.empty_since.get_or_insert(now);
        if now.us_since(since) >= self.options.arm_after_us {
            let trigger = self.entries.after_head();
            // A full admin queue only means that it is armed later.
            let _later = self.set_feature(driver, now, Some(trigger));
            self.empty_since = None;
        }
    }

    /// Takes note of an event; `true` if it was this queue's. Events that nobody waits for do no harm.
    pub fn on_event(&mut self, event: &Event) -> bool {
        let one_shot = event.dw0.event_type() == EventType::ONE_SHOT;
        if !one_shot || !matches!(self.stage, Stage::Live) || cdqid(event.dw1) != self.id {
            return false;
        }
        match event.dw0.info() {
            one_shot_info::TAIL_POINTER => self.armed = false,
            one_shot_info::CDQ_FULL => self.full = true,
            _ => return false,
        }
        self.line.signal();
        true
    }

    /// Copies up to `max` new entries to the end of `into`, oldest first; returns how many. They stay in the queue until they
    /// are given back. Without room reserved in `into` this allocates.
    pub fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize {
        if self.lender.is_some() { 0 } else { self.entries.take(max, into) }
    }

    /// New entries behind those that were taken.
    pub fn waiting(&mut self) -> u32 {
        self.entries.waiting()
    }

    /// Entries taken and not given back.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.entries.taken()
    }

    /// Shows the last `entries` that were taken again; at most those that were not given back.
    pub fn rewind(&mut self, entries: u32) {
        if self.lender.is_none() {
            self.entries.rewind(entries);
        }
    }

    /// Gives the oldest `entries` taken back to the controller. While one Set Features is under way the next one waits and
    /// carries the newest head.
    ///
    /// # Errors
    /// [`CdqError::NotTaken`], [`CdqError::NotLive`], [`CdqError::Lent`]; nothing is given back then.
    pub fn give_back(&mut self, driver: &mut Driver, now: Time, entries: u32) -> Result<(), CdqError> {
        if self.lender.is_some() {
            return Err(CdqError::Lent);
        }
        if !matches!(self.stage, Stage::Live) {
            return Err(CdqError::NotLive);
        }
        if !self.entries.give_back(entries) {
            return Err(CdqError::NotTaken { asked: entries, taken: self.entries.taken() });
        }
        match self.tell_head(driver, now) {
            Ok(()) | Err(SubmitError::Full) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Entries given back that the controller has confirmed or is being told: `false` while a head is still to be told.
    #[must_use]
    pub fn head_is_told(&self) -> bool {
        self.update.is_none() && self.told == self.entries.returned()
    }

    /// Begins to delete the queue, once a head that is being told has been answered. Its entries can still be taken.
    pub fn delete(&mut self, driver: &mut Driver, now: Time) {
        self.lender = None;
        match self.stage {
            Stage::Creating(_) => self.delete_wanted = true,
            Stage::Live | Stage::Broken(_) => {
                self.stage = Stage::Delete;
                self.poll_stage(driver, now);
            }
            Stage::Delete | Stage::Deleting(_) | Stage::Gone(_) => {}
        }
    }

    /// The controller has deleted the queue by itself (Suspend with DUDMQ = 1). Its entries can still be taken. Only for a
    /// queue whose [head is told](Self::head_is_told): a head that is still under way would move that of the next queue with
    /// its identifier.
    pub fn deleted_by_controller(&mut self) {
        self.lender = None;
        self.stage = Stage::Gone(GoneReason::Deleted);
    }

    /// Lends the queue to a second process: memory that it can only read, the event line, and a socket on which it sends its
    /// head. Until it closes the socket (or sends nonsense) the owner takes nothing itself; then what was not given back is
    /// the owner's again.
    ///
    /// # Errors
    /// [`CdqError::Lent`], [`CdqError::NotLive`], [`CdqError::Lend`].
    pub fn lend(&mut self) -> Result<LentCdq, CdqError> {
        if self.lender.is_some() {
            return Err(CdqError::Lent);
        }
        if !matches!(self.stage, Stage::Live) {
            return Err(CdqError::NotLive);
        }
        self.entries.rewind(u32::MAX);
        let ring = self.memory.ring.buffer();
        let (lender, lent) = Lender::new(ring, &self.config, self.entries.returned(), &self.line)?;
        self.lender = Some(lender);
        Ok(lent)
    }

    /// Whether another process has the queue.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        self.lender.is_some()
    }
}

impl Drop for CdqOwner {
    fn drop(&mut self) {
        let stage = match self.stage {
            Stage::Creating(ticket) => OrphanStage::Creating(ticket),
            Stage::Live | Stage::Delete | Stage::Broken(_) => match self.update {
                Some(update) => OrphanStage::Telling(update.ticket, self.id),
                None => OrphanStage::Delete(self.id, 0),
            },
            Stage::Deleting(ticket) => OrphanStage::Deleting(ticket, self.id, 0),
            Stage::Gone(_) => return,
        };
        self.link.adopt(Orphan { stage, _memory: Arc::clone(&self.memory), generation: self.generation });
    }
}

pub(crate) fn check(config: &CdqConfig) -> Result<(), CdqError> {
    let format = config.format;
    if format.entry_bytes == 0 || !format.entry_bytes.is_multiple_of(4) {
        return Err(CdqError::BadConfig("an entry is a multiple of 4 bytes"));
    }
    if format.phase_byte >= format.entry_bytes || format.phase_mask.count_ones() != 1 {
        return Err(CdqError::BadConfig("the phase tag is one bit of the entry"));
    }
    if config.slots < MIN_CDQ_SLOTS {
        return Err(CdqError::BadConfig("fewer than three slots"));
    }
    if u64::from(config.slots) * u64::from(format.entry_bytes) > MAX_CDQ_BYTES {
        return Err(CdqError::BadConfig("more than 1 GiB"));
    }
    Ok(())
}
