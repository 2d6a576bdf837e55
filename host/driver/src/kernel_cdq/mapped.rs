//! Entries in memory of our own, which the controller fills: phase tags, heads and the trigger, as with a queue of our own driver.

use super::{HeadTeller, KernelGone};
use crate::admin::Ticket;
use crate::cdq::CdqConfig;
use crate::entries::Entries;
use crate::error::CdqError;
use dray_device::command::SubmitError;
use dray_device::event::EventLine;
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory of queues that nobody has deleted: it stays as long as the process.
static KEPT: Mutex<Vec<DmaBuffer>> = Mutex::new(Vec::new());

/// A Set Features 21h under way.
#[derive(Clone, Copy)]
struct Update {
    ticket: Ticket,
    armed: bool,
}

pub(super) struct MappedEntries {
    id: u16,
    memory: DmaBuffer,
    pub(super) entries: Entries,
    update: Option<Update>,
    /// The place that the controller was last told.
    told: u64,
    armed: bool,
    may_arm: bool,
    empty_since: Option<Time>,
    filled: bool,
}

impl MappedEntries {
    /// Zeroed memory for a queue.
    pub(super) fn memory(config: &CdqConfig) -> Result<DmaBuffer, CdqError> {
        let bytes = (config.slots as usize * config.format.entry_bytes as usize).next_multiple_of(PAGE);
        Ok(DmaBuffer::allocate("dray-kernel-cdq", bytes, Pages::PreferHuge)?)
    }

    pub(super) fn new(id: u16, memory: DmaBuffer, config: &CdqConfig) -> Self {
        let entries = Entries::new(Arc::clone(memory.arena()), memory.offset(), config.slots, config.format, 0);
        let may_arm = config.arm_trigger;
        Self { id, memory, entries, update: None, told: 0, armed: false, may_arm, empty_since: None, filled: true }
    }

    /// Whether a head is under way.
    pub(super) fn is_telling(&self) -> bool {
        self.update.is_some()
    }

    pub(super) fn head_is_told(&self) -> bool {
        self.update.is_none() && self.told == self.entries.returned()
    }

    pub(super) fn poll_update(&mut self, admin: &mut dyn HeadTeller, line: &EventLine) -> Result<u32, KernelGone> {
        let Some(update) = self.update else { return Ok(0) };
        let Some(completion) = admin.answered(update.ticket) else { return Ok(0) };
        self.update = None;
        if completion.unknown {
            return Err(KernelGone::HeadUnknown);
        }
        if !completion.status.is_error() {
            self.armed = update.armed;
            // An entry may have come before the trigger was armed: it would wake nobody.
            if self.armed && self.entries.any() {
                line.signal();
            }
        } else if update.armed {
            // A device without the trigger: the slow timer goes on.
            self.may_arm = false;
        } else {
            return Err(KernelGone::HeadRefused(completion.status));
        }
        Ok(1)
    }

    /// One Set Features at a time; the next one carries whatever the head is by then.
    pub(super) fn tell_head(&mut self, admin: &mut dyn HeadTeller, now: Time) -> Result<(), SubmitError> {
        if self.update.is_some() || self.told == self.entries.returned() {
            return Ok(());
        }
        self.set_feature(admin, now, None)
    }

    fn set_feature(&mut self, admin: &mut dyn HeadTeller, now: Time, trigger: Option<u32>) -> Result<(), SubmitError> {
        let entry = SubmissionEntry::set_cdq_feature(self.id, self.entries.head(), trigger);
        let ticket = admin.tell(now, &entry)?;
        self.update = Some(Update { ticket, armed: trigger.is_some() });
        self.told = self.entries.returned();
        // Without the trigger's bit the command disarms it.
        self.armed = false;
        Ok(())
    }

    pub(super) fn arm_if_idle(&mut self, admin: &mut dyn HeadTeller, now: Time, after_us: u64) {
        if !self.may_arm || self.update.is_some() {
            return;
        }
        if !self.entries.is_drained() {
            // Whatever fired the trigger: it is to be armed again.
            (self.empty_since, self.armed) = (None, false);
            return;
        }
        let since = *self.empty_since.get_or_insert(now);
        if !self.armed && now.us_since(since) >= after_us {
            let trigger = self.entries.after_head();
            // A full admin queue only means that it is armed later.
            let _later = self.set_feature(admin, now, Some(trigger));
            self.empty_since = None;
        }
    }

    /// Whether the controller may still write the memory.
    pub(super) fn may_be_filled(&self) -> bool {
        self.filled
    }

    pub(super) fn is_deleted(&mut self) {
        self.filled = false;
    }

    /// Never gives the memory up: the controller may go on filling it.
    pub(super) fn keep_memory(&mut self) {
        self.filled = false;
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(self.memory.clone());
    }
}
