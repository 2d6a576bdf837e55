//! The guest side of a slot: queues, data buffers and doorbells of an association. All memory is taken when the slot is first
//! used, sized by the limits, and reached by the controller through the slot's address space.
//!
//! Every entry of a queue has a buffer of its own for data that fits (in-capsule data, and most reads and writes); longer
//! transfers take pages of a pool and name them in a list, in a page of the pool as well. I/O commands get an SGL that is as long
//! as the host's, so that the controller checks the length; admin commands get PRPs.

use super::config::Limits;
use dray_device::function::{Doorbell, Function};
use dray_device::memory::{Arena, DmaBuffer, PAGE, Pages};
use dray_device::slot::Slot;
use dray_nvme::command::{CompletionEntry, SglDescriptor, SubmissionEntry};
use dray_nvme::registers::{Aqa, Cap, Cc, Csts, cq_head_doorbell, offset, sq_tail_doorbell};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::{FromBytes, IntoBytes};

/// Entries of the admin queue for the target's own commands.
pub(super) const INTERNAL: u16 = 8;

/// What a command is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The host's.
    #[default]
    Host,
    /// Makes a queue pair: first the completion queue, then the submission queue.
    CreateCq(u16),
    CreateSq(u16),
    /// Deletes a queue pair, in the other order.
    DeleteSq(u16),
    DeleteCq(u16),
    /// Takes an event request back.
    Abort,
}

/// One command under way.
#[derive(Debug, Default)]
pub(super) struct Command {
    pub(super) purpose: Purpose,
    /// The host's, with its CID and data pointer.
    pub(super) entry: SubmissionEntry,
    /// Bytes of data, either way.
    pub(super) len: u32,
    /// H2CData: bytes that have come, and that have been asked for.
    pub(super) got: u32,
    pub(super) asked: u32,
    pub(super) used: bool,
    /// R2T data is coming.
    pub(super) receiving: bool,
    /// The controller has it.
    pub(super) submitted: bool,
    /// Some of its data came with a wrong digest.
    pub(super) damaged: bool,
    /// Pages of the pool, the list's first; empty when the own buffer is enough.
    pages: Vec<u32>,
}

/// A queue pair.
pub(super) struct Queue {
    qid: u16,
    /// Entries of both rings: one more than commands.
    ring: u32,
    sq: usize,
    cq: usize,
    buffers: usize,
    tail: u32,
    head: u32,
    phase: bool,
    unrung: bool,
    tail_bell: Doorbell,
    head_bell: Doorbell,
    pub(super) commands: Vec<Command>,
    free: Vec<u16>,
    /// Commands that the controller has.
    pub(super) in_flight: u32,
}

/// The whole front.
pub(super) struct Front {
    function: Arc<dyn Function>,
    memory: DmaBuffer,
    iova: u64,
    queues: Vec<Option<Queue>>,
    entries: u16,
    buffer_bytes: usize,
    queue_bytes: usize,
    pool_at: usize,
    pool_pages: u32,
    /// Pages that one command can have: its list and those of its data.
    most_pages: usize,
    free_pages: Vec<u32>,
    doorbell_missing: Doorbell,
}

fn ring_bytes(entries: u16, entry: usize) -> usize {
    ((usize::from(entries) + usize::from(INTERNAL) + 1) * entry).next_multiple_of(PAGE)
}

impl Front {
    /// Memory for every queue that the limits allow, mapped in the slot's address space.
    pub(super) fn new(slot: &Slot, limits: &Limits) -> Result<Self, super::TargetError> {
        let entries = limits.queue_entries;
        let buffer_bytes = limits.buffer_bytes();
        let commands = usize::from(entries) + usize::from(INTERNAL);
        let queue_bytes = ring_bytes(entries, 64) + ring_bytes(entries, 16) + commands * buffer_bytes;
        let queues = usize::from(limits.io_queues) + 1;
        let pool_at = queue_bytes * queues;
        let pool_pages = (limits.pool_bytes / PAGE) as u32;
        let len = pool_at + pool_pages as usize * PAGE;
        let memory = DmaBuffer::allocate("dray-nvme-tcp", len, Pages::PreferHuge)?;
        let iova = slot.space().map(&memory, true)?;
        let function = slot.function();
        let bell = function.doorbell(offset::DOORBELLS).ok_or(super::TargetError::NoDoorbells)?;
        Ok(Self {
            function,
            memory,
            iova,
            queues: (0..queues).map(|_| None).collect(),
            entries,
            buffer_bytes,
            queue_bytes,
            pool_at,
            pool_pages,
            most_pages: (limits.max_transfer_bytes as usize).div_ceil(PAGE) + 1,
            free_pages: (0..pool_pages).rev().collect(),
            doorbell_missing: bell,
        })
    }

    /// Pages of the pool: as many pieces can the data of a queue's commands have.
    pub(super) fn pool_pages(&self) -> usize {
        self.pool_pages as usize
    }

    pub(super) fn memory(&self) -> &Arc<Arena> {
        self.memory.arena()
    }

    pub(super) fn cap(&self) -> Cap {
        Cap::from_bits(self.function.read64(offset::CAP))
    }

    pub(super) fn csts(&self) -> Csts {
        Csts::from_bits(self.function.read32(offset::CSTS))
    }

    pub(super) fn cc(&self) -> Cc {
        Cc::from_bits(self.function.read32(offset::CC))
    }

    pub(super) fn read32(&self, at: u32) -> u32 {
        self.function.read32(at)
    }

    /// Most commands of a queue: one less than the controller's rings hold.
    pub(super) fn max_entries(&self) -> u16 {
        self.cap().mqes().min(self.entries)
    }

    /// Writes CC as the host does. With CC.EN rising the admin queue is made first.
    pub(super) fn write_cc(&mut self, cc: Cc) {
        if cc.en() && !self.cc().en() {
            self.forget_queues();
            let made = self.make_queue(0, self.entries + INTERNAL);
            let (sq, cq, ring) = (made.sq, made.cq, made.ring);
            self.queues[0] = Some(made);
            let aqa = Aqa::new().with_asqs(ring as u16 - 1).with_acqs(ring as u16 - 1);
            self.function.write32(offset::AQA, aqa.into_bits());
            self.function.write64(offset::ASQ, self.iova + sq as u64);
            self.function.write64(offset::ACQ, self.iova + cq as u64);
        }
        self.function.write32(offset::CC, cc.into_bits());
    }

    /// Forgets all queues and what they had under way: the controller is reset, or about to be enabled.
    pub(super) fn forget_queues(&mut self) {
        self.queues.iter_mut().for_each(|queue| *queue = None);
        self.free_pages.clear();
        self.free_pages.extend((0..self.pool_pages).rev());
    }

    fn make_queue(&self, qid: u16, commands: u16) -> Queue {
        let sq = self.queue_bytes * usize::from(qid);
        let cq = sq + ring_bytes(self.entries, 64);
        let buffers = cq + ring_bytes(self.entries, 16);
        self.memory().fill(sq, buffers - sq, 0);
        let bell = |at| self.function.doorbell(at).unwrap_or_else(|| self.doorbell_missing.clone());
        Queue {
            qid,
            ring: u32::from(commands) + 1,
            sq,
            cq,
            buffers,
            tail: 0,
            head: 0,
            phase: true,
            unrung: false,
            tail_bell: bell(sq_tail_doorbell(qid, 0)),
            head_bell: bell(cq_head_doorbell(qid, 0)),
            commands: (0..commands).map(|_| Command { pages: Vec::with_capacity(self.most_pages), ..Command::default() }).collect(),
            free: (0..commands).rev().collect(),
            in_flight: 0,
        }
    }

    /// Prepares the memory of an I/O queue of `commands` entries; the two commands that create it.
    pub(super) fn prepare_queue(&mut self, qid: u16, commands: u16) -> bool {
        if usize::from(qid) >= self.queues.len() || self.queues[usize::from(qid)].is_some() {
            return false;
        }
        self.queues[usize::from(qid)] = Some(self.make_queue(qid, commands));
        true
    }

    pub(super) fn create_cq(&self, qid: u16) -> Option<SubmissionEntry> {
        let queue = self.queue(qid)?;
        Some(SubmissionEntry::create_io_cq(qid, queue.ring as u16 - 1, None, self.iova + queue.cq as u64))
    }

    pub(super) fn create_sq(&self, qid: u16) -> Option<SubmissionEntry> {
        let queue = self.queue(qid)?;
        Some(SubmissionEntry::create_io_sq(qid, queue.ring as u16 - 1, qid, self.iova + queue.sq as u64))
    }

    /// The queue is deleted: its pages come back.
    pub(super) fn remove_queue(&mut self, qid: u16) {
        let Some(mut queue) = self.queues.get_mut(usize::from(qid)).and_then(Option::take) else { return };
        for command in &mut queue.commands {
            self.free_pages.append(&mut command.pages);
        }
    }

    #[inline]
    pub(super) fn queue(&self, qid: u16) -> Option<&Queue> {
        self.queues.get(usize::from(qid))?.as_ref()
    }

    #[inline]
    pub(super) fn command(&mut self, qid: u16, command: u16) -> Option<&mut Command> {
        let queue = self.queues.get_mut(usize::from(qid))?.as_mut()?;
        queue.commands.get_mut(usize::from(command)).filter(|command| command.used)
    }

    /// A place for a host's command; the target's own ones of the admin queue are kept back.
    #[inline]
    pub(super) fn take(&mut self, qid: u16, purpose: Purpose) -> Option<u16> {
        let queue = self.queues.get_mut(usize::from(qid))?.as_mut()?;
        let kept = if qid == 0 && purpose == Purpose::Host { usize::from(INTERNAL) } else { 0 };
        if queue.free.len() <= kept {
            return None;
        }
        let index = queue.free.pop()?;
        let command = &mut queue.commands[usize::from(index)];
        let pages = std::mem::take(&mut command.pages);
        *command = Command { purpose, used: true, pages, ..Command::default() };
        Some(index)
    }

    /// Gives a command's place and pages back.
    #[inline]
    pub(super) fn release(&mut self, qid: u16, index: u16) {
        let Some(queue) = self.queues.get_mut(usize::from(qid)).and_then(Option::as_mut) else { return };
        let Some(command) = queue.commands.get_mut(usize::from(index)).filter(|command| command.used) else { return };
        command.used = false;
        self.free_pages.append(&mut command.pages);
        queue.free.push(index);
    }

    /// Whether a transfer of this length can ever be had.
    pub(super) fn could_hold(&self, len: u32) -> bool {
        len as usize <= self.buffer_bytes || len.div_ceil(PAGE as u32) < self.pool_pages.min(257)
    }

    /// Finds memory for a command's data; `false` when the pool has too little at the moment.
    #[inline]
    pub(super) fn place(&mut self, qid: u16, index: u16) -> bool {
        let Some(queue) = self.queues.get_mut(usize::from(qid)).and_then(Option::as_mut) else { return false };
        let command = &mut queue.commands[usize::from(index)];
        if command.len as usize <= self.buffer_bytes || !command.pages.is_empty() {
            return true;
        }
        let needed = command.len.div_ceil(PAGE as u32) as usize + 1;
        let Some(from) = self.free_pages.len().checked_sub(needed) else { return false };
        command.pages.extend(self.free_pages.drain(from..).rev());
        true
    }

    fn page_at(&self, page: u32) -> usize {
        self.pool_at + page as usize * PAGE
    }

    /// The pieces of memory that a command's data lies in: offset and length, neighbours joined.
    #[inline]
    pub(super) fn pieces(&self, qid: u16, index: u16, len: u32, mut visit: impl FnMut(usize, u32)) {
        let Some(queue) = self.queue(qid) else { return };
        let pages = &queue.commands[usize::from(index)].pages;
        if pages.is_empty() {
            visit(queue.buffers + usize::from(index) * self.buffer_bytes, len.min(self.buffer_bytes as u32));
            return;
        }
        let mut left = len;
        let mut run: Option<(usize, u32)> = None;
        for &page in &pages[1..] {
            let part = left.min(PAGE as u32);
            if part == 0 {
                break;
            }
            let at = self.page_at(page);
            run = match run {
                Some((from, len)) if from + len as usize == at => Some((from, len + part)),
                Some((from, len)) => {
                    visit(from, len);
                    Some((at, part))
                }
                None => Some((at, part)),
            };
            left -= part;
        }
        if let Some((from, len)) = run {
            visit(from, len);
        }
    }

    /// Writes data that came for a command.
    #[inline]
    pub(super) fn write(&self, qid: u16, index: u16, at: u32, bytes: &[u8]) {
        let end = at.saturating_add(bytes.len() as u32);
        let (mut from, memory) = (0u32, self.memory());
        self.pieces(qid, index, end, |offset, len| {
            let upto = from + len;
            if upto > at {
                let skip = at.saturating_sub(from);
                let begin = (from + skip - at) as usize;
                let part = (len - skip) as usize;
                if let Some(bytes) = bytes.get(begin..begin + part) {
                    memory.write(offset + skip as usize, bytes);
                }
            }
            from = upto;
        });
    }

    /// Reads a command's data out.
    pub(super) fn read(&self, qid: u16, index: u16, into: &mut [u8]) {
        let mut at = 0;
        self.pieces(qid, index, into.len() as u32, |offset, len| {
            let end = at + len as usize;
            self.memory().read(offset, &mut into[at..end]);
            at = end;
        });
    }

    /// CRC-32C over a command's data.
    pub(super) fn crc(&self, qid: u16, index: u16, len: u32) -> u32 {
        let mut crc = 0;
        self.pieces(qid, index, len, |offset, len| {
            self.memory().visit(offset, len as usize, &mut |bytes| crc = crc32c::crc32c_append(crc, bytes));
        });
        crc
    }

    /// Sets the data pointer of an entry to the command's memory.
    fn point(&self, queue: &Queue, index: u16, entry: &mut SubmissionEntry) {
        let command = &queue.commands[usize::from(index)];
        entry.mptr = 0;
        let own = self.iova + (queue.buffers + usize::from(index) * self.buffer_bytes) as u64;
        let admin = queue.qid == 0;
        let Some((&list, data)) = command.pages.split_first() else {
            *entry = match (admin, command.len) {
                (true, 0) => entry.with_prps(0, 0),
                (true, ..=0x1000) => entry.with_prps(own, 0),
                (true, ..=0x2000) => entry.with_prps(own, own + PAGE as u64),
                (true, _) => entry.with_prps(own, 0),
                (false, len) => entry.with_sgl(SglDescriptor::data_block(own, len)),
            };
            return;
        };
        let list_at = self.page_at(list);
        let (memory, mut left, mut count) = (self.memory(), command.len, 0);
        for &page in data {
            let at = self.iova + self.page_at(page) as u64;
            let part = left.min(PAGE as u32);
            if part == 0 {
                break;
            }
            if admin {
                memory.write(list_at + count * 8, &at.to_le_bytes());
            } else {
                memory.write(list_at + count * 16, SglDescriptor::data_block(at, part).as_bytes());
            }
            left -= part;
            count += 1;
        }
        let list = self.iova + list_at as u64;
        let first = self.iova + self.page_at(data[0]) as u64;
        *entry = match (admin, count) {
            (true, 2) => entry.with_prps(first, self.iova + self.page_at(data[1]) as u64),
            (true, _) => entry.with_prps(first, list + 8),
            (false, _) => entry.with_sgl(SglDescriptor::last_segment(list, 16 * count as u32)),
        };
    }

    /// Writes a command into its submission queue; the doorbell is rung by [`Front::ring`].
    #[inline]
    pub(super) fn submit(&mut self, qid: u16, index: u16, mut entry: SubmissionEntry) {
        if let Some(queue) = self.queue(qid) {
            if queue.commands[usize::from(index)].purpose == Purpose::Host {
                self.point(queue, index, &mut entry);
            }
            self.memory().write(queue.sq + queue.tail as usize * 64, entry.with_cid(index).as_bytes());
        }
        let Some(queue) = self.queues.get_mut(usize::from(qid)).and_then(Option::as_mut) else { return };
        queue.tail = if queue.tail + 1 == queue.ring { 0 } else { queue.tail + 1 };
        queue.unrung = true;
        queue.in_flight += 1;
        queue.commands[usize::from(index)].submitted = true;
    }

    /// A command of the target's own.
    pub(super) fn submit_own(&mut self, purpose: Purpose, entry: SubmissionEntry) -> bool {
        let Some(index) = self.take(0, purpose) else { return false };
        self.submit(0, index, entry);
        true
    }

    /// Rings the doorbells of queues that have new entries.
    #[inline]
    pub(super) fn ring(&mut self) {
        for queue in self.queues.iter_mut().flatten() {
            if std::mem::take(&mut queue.unrung) {
                queue.tail_bell.ring(queue.tail);
            }
        }
    }

    /// The next completion of a queue, if there is one; what names no command under way is dropped.
    #[inline]
    pub(super) fn completion(&mut self, qid: u16) -> Option<CompletionEntry> {
        let arena = self.memory.arena();
        let queue = self.queues.get_mut(usize::from(qid))?.as_mut()?;
        loop {
            let at = queue.cq + queue.head as usize * 16;
            let last = arena.load32(at + 12, Ordering::Acquire);
            if (last >> 16 & 1 != 0) != queue.phase {
                return None;
            }
            let mut bytes = [0; 16];
            arena.read(at, &mut bytes);
            queue.head += 1;
            if queue.head == queue.ring {
                (queue.head, queue.phase) = (0, !queue.phase);
            }
            let entry = CompletionEntry::read_from_bytes(&bytes).unwrap_or_default();
            let command = queue.commands.get_mut(usize::from(entry.cid));
            if let Some(command) = command.filter(|command| command.used && command.submitted) {
                command.submitted = false;
                queue.in_flight = queue.in_flight.saturating_sub(1);
                return Some(entry);
            }
        }
    }

    /// Tells the controller how far completions have been read.
    #[inline]
    pub(super) fn ring_head(&self, qid: u16) {
        if let Some(queue) = self.queue(qid) {
            queue.head_bell.ring(queue.head);
        }
    }

    /// Queues there are.
    pub(super) fn queue_ids(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The command of a queue that carries this CID of the host's and that the controller has.
    pub(super) fn find(&self, qid: u16, cid: u16) -> Option<u16> {
        let commands = &self.queue(qid)?.commands;
        let found = commands.iter().position(|command| {
            command.used && command.submitted && command.purpose == Purpose::Host && command.entry.cdw0.cid() == cid
        });
        found.map(|index| index as u16)
    }
}
