//! The user data migration queue as its producer sees it (Base 2.3 §5.2.4, §8.1.7; NVMCS, UDMQ entry type 0).
//!
//! An entry that the host can see may be consumed at any moment, so it is never altered. To merge adjacent changes all the
//! same, the newest change is held back here and grows; [`Udmq::flush`] posts it. The controller flushes before it posts the
//! completions of the commands that caused the changes, so an entry is always there before the completion is.
//!
//! **Room.** A ring of N slots holds N − 1 entries. A log begins only where two slots are free, and a change that finds a
//! single one takes it as the log's end (ESA FULL, with the change's own range). So while changes are logged a slot is free,
//! and the log's end (STOPPED, SUSPENDED or FULL) always finds it. The one exception is a Resume whose FIRST finds no room:
//! it waits, with the end that may follow it, until the host moves the head. No entry that the host has not given back is ever
//! overwritten.
//!
//! **Not here yet:** entries for a whole namespace (LBACIR 01b), since no command that needs them is there (Format, Sanitize,
//! namespace deletion).
//!
//! **After FULL** the log has a hole. Nothing more is logged, not even an end, until Track Send starts the log anew.

use crate::deviations::{Deviating, Deviation};
use crate::dptr::PAGE;
use crate::queue;
use arrayvec::ArrayVec;
use dray_device::memory::{Arena, DmaBuffer};
use dray_device::planted::{self, Fault};
use dray_device::space::SpaceReader;
use dray_nvme::cdq::{Esa, UDMQ_ENTRY_BYTES, UDMQ_PHASE_MASK, UdmqEntry};
use dray_nvme::status::Status;
use std::ops::BitOrAssign;
use std::sync::atomic::Ordering;

/// Slots below which a log never begins: one for FIRST, one for the log's end, one that a ring cannot use.
pub(crate) const MIN_SLOTS: u32 = 3;

/// Most blocks of one entry (NLB is 0's based).
const MAX_BLOCKS: u64 = 1 << 32;

/// A page of a queue: where the host said it is, and where that is.
#[derive(Debug)]
struct Piece {
    iova: u64,
    memory: DmaBuffer,
}

impl Piece {
    fn find(reader: &SpaceReader, iova: u64, bytes: usize) -> Result<Self, Status> {
        Ok(Self { iova, memory: queue::piece(reader, iova, bytes, true)? })
    }
}

/// Memory of a controller data queue, held while the queue lives.
#[derive(Debug)]
pub(crate) struct CdqMemory {
    /// One piece, or one for each page.
    pieces: Vec<Piece>,
    /// Bits of a byte offset that lie within a piece.
    piece_bits: u32,
}

impl CdqMemory {
    /// A contiguous queue (PC = 1) of `bytes` bytes at `prp1`.
    ///
    /// # Errors
    /// PRP Offset Invalid for a base that is no page's; Invalid Field for no whole number of entries; Data Transfer Error where
    /// there is no writable memory.
    pub(crate) fn contiguous(reader: &SpaceReader, prp1: u64, bytes: u64) -> Result<Self, Status> {
        let bytes = queue_bytes(bytes)?;
        check_page(prp1)?;
        if let Ok(piece) = Piece::find(reader, prp1, bytes) {
            return Ok(Self { pieces: vec![piece], piece_bits: usize::BITS - 1 });
        }
        // Contiguous addresses may still be several mappings.
        let end = prp1.checked_add(bytes as u64).ok_or(Status::DATA_TRANSFER_ERROR.with_dnr())?;
        Self::of_pages(reader, (prp1..end).step_by(PAGE).map(Ok), bytes)
    }

    /// A queue of `bytes` bytes in the pages that the PRP list at `prp1` names (PC = 0). When the entries do not fit the list's
    /// page, its last slot points at the next (Base 2.3 §5.2.4). At most `max_entries` pages (MCDQPC).
    ///
    /// # Errors
    /// As [`contiguous`](Self::contiguous), for the list and for each entry; Invalid Field for too many pages.
    pub(crate) fn from_prp_list(
        reader: &SpaceReader,
        prp1: u64,
        bytes: u64,
        max_entries: u32,
    ) -> Result<Self, Status> {
        let bytes = queue_bytes(bytes)?;
        let pages = bytes.div_ceil(PAGE);
        if pages > max_entries as usize {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let list = ListEntries { reader, list: prp1, slot: 0, rest: pages };
        Self::of_pages(reader, list, bytes)
    }

    /// Gathers the pages, the last of which may be used in part.
    fn of_pages(
        reader: &SpaceReader,
        pages: impl Iterator<Item = Result<u64, Status>>,
        bytes: usize,
    ) -> Result<Self, Status> {
        let mut pieces = Vec::with_capacity(bytes.div_ceil(PAGE));
        let mut rest = bytes;
        for iova in pages {
            let iova = iova?;
            check_page(iova)?;
            pieces.push(Piece::find(reader, iova, rest.min(PAGE))?);
            rest = rest.saturating_sub(PAGE);
        }
        Ok(Self { pieces, piece_bits: PAGE.trailing_zeros() })
    }

    /// Looks the memory up again after the address space has changed; `false` when some of it has gone, and then nothing has
    /// changed here.
    #[must_use]
    pub(crate) fn renew(&mut self, reader: &SpaceReader) -> bool {
        let found: Result<Vec<Piece>, Status> =
            self.pieces.iter().map(|piece| Piece::find(reader, piece.iova, piece.memory.len())).collect();
        found.map(|pieces| self.pieces = pieces).is_ok()
    }

    /// Number of memory ranges that the queue consists of, for MCMR and NMCMR: one, or its pages.
    pub(crate) fn ranges(&self) -> usize {
        self.pieces.len()
    }

    /// Bytes of the queue.
    fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.memory.len()).sum()
    }

    /// Where an entry is. Pieces are whole pages and entries divide a page, so an entry lies in one piece.
    #[inline]
    fn at(&self, offset: usize) -> Option<(&Arena, usize)> {
        let piece = &self.pieces.get(offset >> self.piece_bits)?.memory;
        let inside = offset & ((1 << self.piece_bits) - 1);
        Some((piece.arena(), piece.offset() + inside))
    }

    /// Writes an entry into a slot. The quadword with the phase bit comes last: who sees the bit sees the entry.
    #[inline]
    fn store(&self, slot: u32, entry: &UdmqEntry) {
        let Some((arena, at)) = self.at(slot as usize * UDMQ_ENTRY_BYTES) else { return };
        arena.store64(at, u64::from(entry.nsid) | u64::from(entry.nlb) << 32, Ordering::Relaxed);
        arena.store64(at + 8, entry.slba, Ordering::Relaxed);
        arena.store64(at + 16, 0, Ordering::Relaxed);
        arena.store64(at + 24, u64::from(entry.lbamqa.into_bits()) << 56, Ordering::Release);
    }

    /// For a planted fault: the phase of an entry that was stored with the one of the pass before.
    #[cold]
    fn clear_phase(&self, slot: u32) {
        let Some((arena, at)) = self.at(slot as usize * UDMQ_ENTRY_BYTES) else { return };
        let last = arena.load64(at + 24, Ordering::Relaxed);
        arena.store64(at + 24, last & !(u64::from(UDMQ_PHASE_MASK) << 56), Ordering::Release);
    }
}

/// The page addresses of a PRP list, read one by one; ends with the first error.
struct ListEntries<'a> {
    reader: &'a SpaceReader,
    /// The list page at hand.
    list: u64,
    /// The next slot of it.
    slot: usize,
    /// Pages still to come.
    rest: usize,
}

impl ListEntries<'_> {
    const SLOTS: usize = PAGE / 8;

    fn load(&mut self) -> Result<u64, Status> {
        check_page(self.list)?;
        if self.slot + 1 == Self::SLOTS && self.rest > 1 {
            self.list = self.word(self.slot)?;
            check_page(self.list)?;
            self.slot = 0;
        }
        let entry = self.word(self.slot)?;
        self.slot += 1;
        Ok(entry)
    }

    fn word(&self, slot: usize) -> Result<u64, Status> {
        let missing = Status::DATA_TRANSFER_ERROR.with_dnr();
        let at = self.list.checked_add(slot as u64 * 8).ok_or(missing)?;
        let mut bytes = [0; 8];
        self.reader.lookup(at, 8, false).ok_or(missing)?.read(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Iterator for ListEntries<'_> {
    type Item = Result<u64, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest == 0 {
            return None;
        }
        let entry = self.load();
        self.rest = if entry.is_ok() { self.rest - 1 } else { 0 };
        Some(entry)
    }
}

fn queue_bytes(bytes: u64) -> Result<usize, Status> {
    let whole = bytes > 0 && bytes.is_multiple_of(UDMQ_ENTRY_BYTES as u64);
    let bytes = usize::try_from(bytes).ok().filter(|_| whole);
    bytes.ok_or(Status::INVALID_FIELD.with_dnr())
}

fn check_page(iova: u64) -> Result<(), Status> {
    if iova.is_multiple_of(PAGE as u64) { Ok(()) } else { Err(Status::PRP_OFFSET_INVALID.with_dnr()) }
}

/// The one-shot events (type 4, DW1 = CDQID) that the management controller must report after an operation (Base 2.3
/// §8.1.7.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "one-shot events are reported by the caller"]
pub(crate) struct PostResult {
    /// Information 00h: the tail pointer trigger was reached and is disarmed.
    pub(crate) tail_event: bool,
    /// Information 01h: the queue is full and the log has ended.
    pub(crate) full_event: bool,
}

impl BitOrAssign for PostResult {
    fn bitor_assign(&mut self, other: Self) {
        self.tail_event |= other.tail_event;
        self.full_event |= other.full_event;
    }
}

/// How far the log has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    /// Never started, or stopped by the host.
    Off,
    /// Changes are logged.
    On,
    /// Ended by Suspend; begins again with Resume.
    Suspended,
    /// Ended by a full queue.
    Full,
}

/// The newest change, not posted yet. No blocks: none.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    nsid: u32,
    deallocated: bool,
    slba: u64,
    /// First block after the change.
    end: u64,
}

/// A user data migration queue.
#[derive(Debug)]
pub(crate) struct Udmq {
    /// CDQID.
    pub(crate) id: u16,
    /// CNTLID of the migratable controller whose changes it gets.
    pub(crate) cntlid: u16,
    memory: CdqMemory,
    slots: u32,
    head: u32,
    tail: u32,
    /// The phase bit of the next entry.
    phase: bool,
    /// TPT while ETPT is set.
    trigger: Option<u32>,
    log: Log,
    held: Held,
    /// Markers that wait for room: FIRST, an end, or FIRST and an end.
    waiting: ArrayVec<Esa, 2>,
    pub(crate) deviating: Deviating,
}

impl Udmq {
    /// A queue in which nothing is logged yet. `slots` beyond what the memory holds are not used.
    pub(crate) fn new(id: u16, cntlid: u16, memory: CdqMemory, slots: u32) -> Self {
        let room = memory.len() / UDMQ_ENTRY_BYTES;
        let slots = u32::try_from(room).map_or(slots, |room| slots.min(room)).max(1);
        Self {
            id,
            cntlid,
            memory,
            slots,
            head: 0,
            tail: 0,
            phase: true,
            trigger: None,
            log: Log::Off,
            held: Held::default(),
            waiting: ArrayVec::new(),
            deviating: Deviating::default(),
        }
    }

    /// A device that deviates: logging is on from the queue's creation.
    pub(crate) fn was_left_on(&mut self) {
        self.log = Log::On;
    }

    /// How far the queue has come: CDQID, tail and the phase of the next entry.
    pub(crate) fn place(&self) -> (u16, u32, bool) {
        (self.id, self.tail, self.phase)
    }

    /// Whether changes must be told to the queue: logging is on, or suspended with its controller.
    #[inline]
    pub(crate) fn logging(&self) -> bool {
        matches!(self.log, Log::On | Log::Suspended)
    }

    /// The queue's memory, for a change of the address space.
    pub(crate) fn memory_mut(&mut self) -> &mut CdqMemory {
        &mut self.memory
    }

    /// The queue's memory.
    pub(crate) fn memory(&self) -> &CdqMemory {
        &self.memory
    }

    /// Track Send, start (Base 2.3 §5.2.28.1.1): posts FIRST. After FULL this is how logging goes on.
    ///
    /// # Errors
    /// Invalid Controller Data Queue when logging is on already; Controller Data Queue Full when fewer than two slots are free.
    pub(crate) fn start(&mut self) -> Result<PostResult, Status> {
        if self.logging() {
            let unmarked = self.deviating.does(Deviation::RepeatedStartUnmarked);
            if unmarked || self.deviating.is(Deviation::LoggingSurvivesReset) {
                return Ok(PostResult::default());
            }
            return Err(Status::INVALID_CDQ.with_dnr());
        }
        if !self.waiting.is_empty() || !self.has_room_for(Esa::FIRST) {
            return Err(Status::CDQ_FULL);
        }
        self.log = Log::On;
        self.held = Held::default();
        Ok(self.mark(Esa::FIRST))
    }

    /// Track Send, stop: posts what is held and STOPPED. Without effect when logging is off; after FULL, which was the log's
    /// end, nothing is posted.
    pub(crate) fn stop(&mut self) -> PostResult {
        let mut result = PostResult::default();
        match self.log {
            Log::Off => {}
            Log::Full => {
                self.log = Log::Off;
                if self.overwrites() {
                    result |= self.mark(Esa::STOPPED);
                }
            }
            Log::On | Log::Suspended => {
                result |= self.flush();
                if self.logging() {
                    self.log = Log::Off;
                    result |= self.mark(Esa::STOPPED);
                } else {
                    self.log = Log::Off;
                }
            }
        }
        result
    }

    /// The controller is suspended, and everything that touched the media is told: posts what is held and SUSPENDED if logging
    /// is on. Without effect the second time.
    pub(crate) fn suspended(&mut self) -> PostResult {
        let mut result = self.flush();
        if self.log == Log::On {
            self.log = Log::Suspended;
            result |= self.mark(Esa::SUSPENDED);
        } else if self.deviating.does(Deviation::SuspendMarksAlways) {
            result |= self.mark(Esa::SUSPENDED);
        }
        result
    }

    /// The controller's suspension has ended, by Resume or by a reset: posts FIRST if it was logged when it was suspended. Must
    /// be told before the first change.
    pub(crate) fn resumed(&mut self) -> PostResult {
        if self.log != Log::Suspended {
            return PostResult::default();
        }
        self.log = Log::On;
        if self.waiting.last() == Some(&Esa::SUSPENDED) && self.waiting.len() == 2 {
            // The FIRST before it waits still, and between the two nothing has changed.
            self.waiting.pop();
            return PostResult::default();
        }
        self.mark(Esa::FIRST)
    }

    /// `blocks` blocks of `nsid` from `slba` have changed on the media. Seen by the host after the next
    /// [`flush`](Self::flush), at the latest.
    #[inline]
    pub(crate) fn changed(&mut self, nsid: u32, slba: u64, blocks: u64, deallocated: bool) -> PostResult {
        if self.log != Log::On {
            return self.changed_while_off();
        }
        let end = slba.saturating_add(blocks);
        let held = &mut self.held;
        let touches = slba <= held.end && end >= held.slba;
        if held.nsid == nsid && held.deallocated == deallocated && touches {
            held.slba = held.slba.min(slba);
            held.end = held.end.max(end);
            return PostResult::default();
        }
        let result = self.flush();
        self.held = Held { nsid, deallocated, slba, end };
        result
    }

    /// A change outside the log. During a suspension there should be none; if there is one the log is not complete, and must
    /// not look as if it were.
    #[cold]
    fn changed_while_off(&mut self) -> PostResult {
        if self.log == Log::Suspended { self.lose() } else { PostResult::default() }
    }

    /// Posts the change that is held, if any.
    #[inline]
    pub(crate) fn flush(&mut self) -> PostResult {
        if self.held.end == self.held.slba { PostResult::default() } else { self.flush_held() }
    }

    fn flush_held(&mut self) -> PostResult {
        let Held { nsid, deallocated, mut slba, end } = std::mem::take(&mut self.held);
        let mut result = PostResult::default();
        let most = self.deviating.most_blocks(MAX_BLOCKS, end - slba);
        while slba < end && self.log == Log::On {
            let blocks = (end - slba).min(most);
            result |= self.append(UdmqEntry::range(nsid, slba, (blocks - 1) as u32, deallocated));
            slba += blocks;
        }
        result
    }

    /// Posts an entry about a change; in the last free slot it becomes the log's end.
    fn append(&mut self, entry: UdmqEntry) -> PostResult {
        match self.free() {
            _ if !self.waiting.is_empty() => self.lose(),
            0 if self.deviating.does(Deviation::SilentAfterFull) => PostResult::default(),
            0 => self.lose(),
            1 => {
                let mut result = self.post(entry.with_esa(Esa::FULL));
                result |= self.end_full();
                result
            }
            _ => self.post(entry),
        }
    }

    /// A change cannot be told: the log ends with FULL without a range, as soon as there is room for it.
    #[cold]
    fn lose(&mut self) -> PostResult {
        let mut result = self.end_full();
        // A FIRST that waits would open a log of nothing: its end is enough.
        self.waiting.clear();
        result |= self.mark(Esa::FULL);
        result
    }

    #[cold]
    fn end_full(&mut self) -> PostResult {
        tracing::debug!(cntlid = self.cntlid, cdqid = self.id, "controller data queue full: the log has a hole from here on");
        if !self.deviating.does(Deviation::SilentAfterFull) {
            self.log = Log::Full;
        }
        self.held = Held::default();
        PostResult { tail_event: false, full_event: true }
    }

    /// Posts a marker, or has it wait behind those that wait for room.
    fn mark(&mut self, esa: Esa) -> PostResult {
        if self.waiting.is_empty() && self.has_room_for(esa) {
            return self.post(UdmqEntry::marker(esa));
        }
        if self.waiting.is_full() {
            // An end takes the place of the end that waits: nothing has changed between the two.
            self.waiting.pop();
        }
        self.waiting.push(esa);
        PostResult::default()
    }

    /// Posts the markers that wait, all of them or none.
    fn post_waiting(&mut self) -> PostResult {
        let mut result = PostResult::default();
        let Some(&first) = self.waiting.first() else { return result };
        if self.has_room_for(first) {
            for esa in std::mem::take(&mut self.waiting) {
                result |= self.post(UdmqEntry::marker(esa));
            }
        }
        result
    }

    /// Whether a marker is posted now: the log's end must fit behind its FIRST.
    fn has_room_for(&self, esa: Esa) -> bool {
        let one = esa != Esa::FIRST || self.deviating.is(Deviation::FullReplacesMarker);
        self.free() >= if one { 1 } else { 2 } || self.overwrites()
    }

    /// The queue is full, and its device posts a marker all the same.
    fn overwrites(&self) -> bool {
        self.deviating.is(Deviation::MarkersOverwrite)
            && self.free() == 0
            && self.deviating.does(Deviation::MarkersOverwrite)
    }

    /// A marker that takes the last free slot, with a device that says "full" whatever it posts there.
    fn replaced(&mut self, entry: &mut UdmqEntry, result: &mut PostResult) {
        if entry.esa() == Esa::FULL || self.free() != 1 || !self.deviating.does(Deviation::FullReplacesMarker) {
            return;
        }
        *entry = entry.with_esa(Esa::FULL);
        result.full_event = true;
        if self.log == Log::On {
            *result |= self.end_full();
        }
    }

    /// Writes an entry into the slot at the tail, which is free.
    #[inline]
    fn post(&mut self, mut entry: UdmqEntry) -> PostResult {
        let mut result = PostResult::default();
        if self.deviating.is(Deviation::FullReplacesMarker) {
            self.replaced(&mut entry, &mut result);
        }
        if self.deviating.is(Deviation::ContiguousOnly)
            && self.memory.piece_bits == PAGE.trailing_zeros()
            && self.deviating.does(Deviation::ContiguousOnly)
        {
            return result;
        }
        let slot = self.tail;
        let late = planted::on(Fault::PhaseFlippedLate) && !self.phase;
        self.memory.store(slot, &entry.with_phase(self.phase || late && slot == 0));
        if late && slot == 1 {
            self.memory.clear_phase(0);
        }
        self.tail += 1;
        if self.tail == self.slots {
            self.tail = 0;
            self.phase = !self.phase;
        }
        // Two readings of TPT are around: the slot that was posted, and the tail after it. The earlier one does no harm.
        let on_slot = |trigger| trigger == slot && !self.deviating.does(Deviation::TriggerOnTailOnly);
        result.tail_event = self.trigger.is_some_and(|trigger| trigger == self.tail || on_slot(trigger));
        if result.tail_event {
            self.trigger = None;
        }
        result
    }

    #[inline]
    fn used(&self) -> u32 {
        self.distance(self.tail)
    }

    /// Slots from the head to `slot`.
    #[inline]
    fn distance(&self, slot: u32) -> u32 {
        if slot >= self.head { slot - self.head } else { self.slots - self.head + slot }
    }

    #[inline]
    fn free(&self) -> u32 {
        self.slots - 1 - self.used()
    }

    /// Set Features 21h (Base 2.3 §5.2.26.1.23): gives back the slots before `head` and arms the tail pointer trigger, or
    /// disarms it. On success the caller drops a tail pointer event of this queue that is not reported yet.
    ///
    /// # Errors
    /// Invalid Field for a head that is not on a posted entry or the tail, or a trigger outside the queue.
    pub(crate) fn set_head(&mut self, head: u32, trigger: Option<u32>) -> Result<PostResult, Status> {
        let outside = head >= self.slots || self.distance(head) > self.used();
        let outside = outside && !(self.takes_any_head(head) && self.deviating.does(Deviation::HeadUnchecked));
        if outside || trigger.is_some_and(|slot| slot >= self.slots) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        self.head = head;
        self.trigger = trigger;
        Ok(self.post_waiting())
    }

    /// Heads that a device takes which hardly checks them.
    fn takes_any_head(&self, head: u32) -> bool {
        head <= self.slots && (self.head >= self.tail || head <= self.tail)
    }

    /// Get Features 21h: ETPT, HP, and TPT (0 while ETPT is 0).
    pub(crate) fn feature(&self) -> (bool, u32, u32) {
        (self.trigger.is_some(), self.head, self.trigger.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests;
