//! Drains one controller data queue: entries to the policy, ranges into the map, slots back to the controller.
//!
//! The policy decides pace and, for vendor queues, meaning. What it cannot do is lose a change: its ranges are marked first,
//! then every entry that is given back, and each block that this second marking finds clean is counted as an omission. A policy
//! that waits, is slow or consumes nothing cannot fill the queue either: at half full, or after a set time, the pump drains by
//! itself.

use crate::media::Media;
use crate::queue::{EntryQueue, QueueError};
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_policy::packed;
use dray_policy::role::{Cdq, CdqQueue, Marks};
use dray_policy::seam::{Exchange, Seat};
use dray_nvme::cdq::{Changed, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_policy::udmq;

/// Most entries shown to a policy, or drained by the pump itself, in one poll.
pub const MAX_BATCH: usize = 4096;

/// What a pump counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PumpStats {
    /// Entries given back.
    pub entries: u64,
    /// Of those, entries that the pump drained without the policy.
    pub drained_by_host: u64,
    /// Ranges that the policy returned.
    pub ranges: u64,
    /// Blocks that an entry named and the policy's ranges left out, counted by the granule.
    pub omitted_blocks: u64,
    /// Entries that named blocks past the end, or a namespace that does not move.
    pub outside: u64,
    /// Batches whose answer came too late and was not waited for.
    pub late: u64,
}

impl PumpStats {
    /// Adds the counts of another pump.
    pub fn add(&mut self, other: &Self) {
        self.entries += other.entries;
        self.drained_by_host += other.drained_by_host;
        self.ranges += other.ranges;
        self.omitted_blocks += other.omitted_blocks;
        self.outside += other.outside;
        self.late += other.late;
    }
}

/// How long the pump waits for a policy, and when it looks by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PumpLimits {
    /// The pump drains by itself when entries have lain for so long, µs.
    pub drain_us: u64,
    /// The same while the guest is suspended, µs.
    pub hurry_us: u64,
}

impl Default for PumpLimits {
    fn default() -> Self {
        Self { drain_us: 50_000, hurry_us: 300 }
    }
}

/// A batch that the policy has.
#[derive(Clone, Copy, Debug)]
struct Asked {
    entries: u32,
    at: Time,
    /// The pump drained those entries by itself; the answer is late.
    late: bool,
}

/// Drains one queue.
#[derive(Debug)]
pub struct Pump {
    queue: CdqQueue,
    limits: PumpLimits,
    /// The host can decode the entries.
    known: bool,
    began: Time,
    spare: Option<Box<Exchange<Cdq>>>,
    asked: Option<Asked>,
    own: Vec<u8>,
    look_at: Time,
    look_entries: u32,
    /// The last answer left entries in the queue since this moment.
    reluctant: Option<Time>,
    /// Since when entries lie in the queue.
    lying: Option<Time>,
    hurry: bool,
    marks: Marks,
    stats: PumpStats,
}

impl Pump {
    /// A pump for a live queue; `began` is the start of the migration's time.
    #[must_use]
    pub fn new(queue: CdqQueue, limits: PumpLimits, began: Time) -> Self {
        let known = udmq::is_readable(queue.kind, queue.entry_bytes);
        let batch = MAX_BATCH.min(queue.slots as usize) * queue.entry_bytes as usize;
        let mut exchange = Box::<Exchange<Cdq>>::default();
        exchange.request.entries.reserve(batch);
        exchange.answer.ranges.reserve(batch / 2);
        Self {
            queue,
            limits,
            known,
            began,
            spare: Some(exchange),
            asked: None,
            own: Vec::with_capacity(batch),
            look_at: Time(0),
            look_entries: 0,
            reluctant: None,
            lying: None,
            hurry: false,
            marks: Marks::default(),
            stats: PumpStats::default(),
        }
    }

    /// The queue.
    #[must_use]
    pub fn queue(&self) -> &CdqQueue {
        &self.queue
    }

    /// Whether the host can decode the entries; where it cannot, tracking is a hint only.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// What the entries said besides ranges, since [`forget_marks`](Self::forget_marks).
    #[must_use]
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// The log has ended although nobody wants it to end: the queue was full, or logging was stopped past whoever drives this
    /// (a Track Send that was still under way). Changes may be missing since (rule 8).
    #[must_use]
    pub fn has_hole(&self) -> bool {
        self.marks.full || self.marks.stopped
    }

    /// Forgets what the entries said: before logging is stopped, started or suspended.
    pub fn forget_marks(&mut self) {
        self.marks = Marks::default();
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> PumpStats {
        self.stats
    }

    /// While the guest is suspended the pump looks at every poll and waits less for the policy.
    pub fn hurry(&mut self, hurry: bool) {
        self.hurry = hurry;
    }

    /// When the pump wants to look again.
    #[must_use]
    pub fn look_at(&self) -> Time {
        self.look_at
    }

    /// No entries are out with the policy that the map does not have.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.asked.is_none_or(|asked| asked.late)
    }

    fn patience_us(&self) -> u64 {
        if self.hurry { self.limits.hurry_us } else { self.limits.drain_us }
    }

    /// Takes an answer, asks again, drains. Returns the entries that were given back, the batches asked counted as one each.
    ///
    /// # Errors
    /// [`QueueError`] when the queue has gone.
    pub fn poll(
        &mut self,
        now: Time,
        queue: &mut dyn EntryQueue,
        seat: Option<&mut (dyn Seat<Cdq> + '_)>,
        media: &mut Media,
    ) -> Result<u32, QueueError> {
        let Some(seat) = seat else { return self.drain(now, queue, media) };
        let mut work = 0;
        if self.asked.is_some()
            && let Some(exchange) = seat.poll()
        {
            work += self.answered(now, exchange, queue, media)?;
        }
        if let Some(asked) = self.asked {
            return Ok(work + self.wait_for(now, asked, queue, media)?);
        }
        let waiting = queue.waiting();
        if waiting == 0 {
            self.lying = None;
            return Ok(work);
        }
        let lying = *self.lying.get_or_insert(now);
        let half = waiting >= self.queue.slots / 2;
        let refused = self.reluctant.is_some_and(|since| half || now.us_since(since) >= self.patience_us());
        let overdue = now.us_since(lying) >= self.patience_us();
        if refused {
            return Ok(work + self.drain(now, queue, media)?);
        }
        let due = self.hurry || now >= self.look_at || waiting >= self.look_entries.max(1) || half || overdue;
        if due && self.ask(now, queue, seat, media) {
            // A seat that answers in place has the answer now: the same entries are still in the cache.
            match seat.poll() {
                Some(exchange) => work += self.answered(now, exchange, queue, media)?,
                None => work += 1,
            }
        }
        Ok(work)
    }

    /// The policy has a batch and has not answered.
    fn wait_for(
        &mut self,
        now: Time,
        asked: Asked,
        queue: &mut dyn EntryQueue,
        media: &mut Media,
    ) -> Result<u32, QueueError> {
        if !asked.late {
            let half = u64::from(queue.waiting()) + u64::from(asked.entries) >= u64::from(self.queue.slots / 2);
            let slow = now.us_since(asked.at) >= self.patience_us();
            let half = half && now > asked.at.after_us(self.limits.hurry_us);
            if !(slow || half) {
                return Ok(0);
            }
            queue.rewind(asked.entries);
            self.asked = Some(Asked { late: true, ..asked });
            self.stats.late += 1;
        }
        self.drain(now, queue, media)
    }

    /// Shows what is new to the policy. False when there was nothing.
    fn ask(&mut self, now: Time, queue: &mut dyn EntryQueue, seat: &mut (dyn Seat<Cdq> + '_), media: &Media) -> bool {
        let Some(mut exchange) = self.spare.take() else { return false };
        exchange.request.entries.clear();
        let entries = queue.take(MAX_BATCH, &mut exchange.request.entries) as u32;
        if entries == 0 {
            self.spare = Some(exchange);
            return false;
        }
        exchange.request.now_us = now.us_since(self.began);
        exchange.request.waiting = queue.waiting();
        self.asked = Some(Asked { entries, at: now, late: false });
        if self.known && self.queue.entry_bytes as usize == UDMQ_ENTRY_BYTES {
            ask_ahead(exchange.request.entries.as_chunks().0.iter().map(udmq::read), media);
        }
        seat.ask(exchange);
        true
    }

    fn answered(
        &mut self,
        now: Time,
        exchange: Box<Exchange<Cdq>>,
        queue: &mut dyn EntryQueue,
        media: &mut Media,
    ) -> Result<u32, QueueError> {
        let asked = self.asked.take();
        mark_ranges(&exchange.answer.ranges, media);
        let answer = &exchange.answer;
        self.stats.ranges += (answer.ranges.len() / packed::RANGE_BYTES) as u64;
        let mut given = 0;
        if let Some(asked) = asked.filter(|asked| !asked.late) {
            let consumed = answer.consumed.min(asked.entries);
            let stride = self.queue.entry_bytes as usize;
            let shown = exchange.request.entries.get(..consumed as usize * stride).unwrap_or(&exchange.request.entries);
            let omitted = self.mark_entries(shown, now, media);
            self.stats.omitted_blocks += omitted;
            self.take_marks(answer.marks, media);
            if consumed < asked.entries {
                queue.rewind(asked.entries - consumed);
                self.reluctant.get_or_insert(now);
            } else {
                self.reluctant = None;
            }
            self.lying = None;
            (self.look_at, self.look_entries) = match (answer.wait_us, answer.wait_entries) {
                (0, _) | (_, 0) => (now, 0),
                (us, entries) => (now.after_us(u64::from(us)), entries),
            };
            self.stats.entries += u64::from(consumed);
            given = consumed;
        }
        self.spare = Some(exchange);
        if given > 0 {
            queue.give_back(now, given)?;
        }
        Ok(given)
    }

    /// What the policy says the entries said counts only where the host cannot read them, but for the worst.
    fn take_marks(&mut self, marks: Marks, media: &mut Media) {
        if marks.everything {
            media.mark_everything();
        }
        if !self.known {
            let own = &mut self.marks;
            own.first |= marks.first;
            own.stopped |= marks.stopped;
            own.suspended |= marks.suspended;
            own.full |= marks.full;
        }
    }

    /// Drains one batch without the policy.
    fn drain(&mut self, now: Time, queue: &mut dyn EntryQueue, media: &mut Media) -> Result<u32, QueueError> {
        let mut own = std::mem::take(&mut self.own);
        own.clear();
        let entries = queue.take(MAX_BATCH, &mut own) as u32;
        if entries > 0 {
            if self.known {
                self.mark_entries(&own, now, media);
            } else {
                // Nobody says what they mean: everything may have changed.
                media.mark_everything();
            }
            self.stats.entries += u64::from(entries);
            self.stats.drained_by_host += u64::from(entries);
            (self.reluctant, self.lying) = (None, None);
        }
        self.own = own;
        if entries > 0 {
            queue.give_back(now, entries)?;
        }
        Ok(entries)
    }

    /// Marks what the entries name. Returns the blocks that were clean, by the granule.
    fn mark_entries(&mut self, bytes: &[u8], now: Time, media: &mut Media) -> u64 {
        if !self.known {
            return 0;
        }
        let now_ms = crate::media::since_ms(self.began, now);
        if self.queue.entry_bytes as usize == UDMQ_ENTRY_BYTES {
            self.mark_all(bytes.as_chunks().0.iter().map(udmq::read), now_ms, media)
        } else {
            self.mark_all(udmq::entries(bytes, self.queue.entry_bytes), now_ms, media)
        }
    }

    /// Neighbouring entries are marked as one run: writers write in sequences, and the map is touched once.
    #[inline]
    fn mark_all(&mut self, entries: impl Iterator<Item = UdmqEntry> + Clone, now_ms: u32, media: &mut Media) -> u64 {
        let mut second = Second { now_ms, omitted: 0, outside: 0 };
        let (mut run, mut special) = (Run::default(), false);
        for entry in entries.clone() {
            let end = entry.slba.saturating_add(u64::from(entry.nlb) + 1);
            let plain = udmq::is_plain(&entry);
            if plain & (entry.slba == run.end) & (entry.nsid == run.nsid) {
                run.end = end;
            } else if plain {
                second.mark(run, media);
                run = Run { nsid: entry.nsid, slba: entry.slba, end };
            } else {
                special = true;
            }
        }
        second.mark(run, media);
        if special {
            self.mark_specials(entries, &mut second, media);
        }
        self.stats.outside += second.outside;
        second.omitted
    }

    /// The entries that are more than a range. Their order among the others carries no meaning.
    #[cold]
    fn mark_specials(&mut self, entries: impl Iterator<Item = UdmqEntry>, second: &mut Second, media: &mut Media) {
        for entry in entries.filter(|entry| !udmq::is_plain(entry)) {
            udmq::mark(&entry, &mut self.marks);
            if planted::on(Fault::QueueFullIgnored) && std::mem::take(&mut self.marks.full) {
                self.marks.suspended = true;
            }
            match entry.changed() {
                Changed::Range { nsid, slba, blocks } => second.mark(Run { nsid, slba, end: slba.saturating_add(blocks) }, media),
                Changed::Namespace { nsid } => second.omitted += whole(nsid, media),
                Changed::Nothing | Changed::Unknown => {}
            }
        }
        if std::mem::take(&mut self.marks.everything) {
            media.mark_everything();
        }
    }
}

/// Neighbouring entries as one range, still growing.
#[derive(Clone, Copy, Default)]
struct Run {
    nsid: u32,
    slba: u64,
    end: u64,
}

/// The second marking of a batch.
struct Second {
    now_ms: u32,
    omitted: u64,
    outside: u64,
}

impl Second {
    #[inline]
    fn mark(&mut self, run: Run, media: &mut Media) {
        let blocks = run.end - run.slba;
        if blocks == 0 {
            return;
        }
        let Some(namespace) = media.find(run.nsid).and_then(|index| media.namespace(index)) else {
            self.outside += 1;
            return;
        };
        self.outside += u64::from(run.end > namespace.geometry.blocks);
        self.omitted += namespace.mark_reported(run.slba, named(blocks), self.now_ms) * namespace.dirty().granule_blocks();
    }
}

/// Marks a whole namespace (FFFFFFFFh: all of them). Returns the blocks that were clean.
#[cold]
fn whole(nsid: u32, media: &mut Media) -> u64 {
    let mut clean = 0;
    for index in 0..media.namespaces().len() {
        let Some(namespace) = media.namespace(index) else { continue };
        let named = nsid == u32::MAX || namespace.geometry.source == nsid;
        if named && !namespace.everything_marked() {
            clean += namespace.geometry.blocks - namespace.dirty_blocks();
            namespace.mark_everything();
        }
    }
    clean
}

/// Blocks of a range that become dirty: all.
#[inline]
fn named(blocks: u64) -> u64 {
    blocks - u64::from(planted::on(Fault::LastBlockDropped) && blocks > 1)
}

/// Marks what a policy returned.
fn mark_ranges(bytes: &[u8], media: &mut Media) {
    for range in packed::ranges(bytes) {
        let Some(namespace) = media.find(range.nsid).and_then(|index| media.namespace(index)) else { continue };
        if range.blocks == 0 {
            namespace.mark_everything();
        } else {
            namespace.mark(range.slba, named(u64::from(range.blocks)));
        }
    }
}

/// Asks for the words of the map that entries begin in: they come from memory while the policy thinks. Entries next to one
/// another are asked for once.
fn ask_ahead(entries: impl Iterator<Item = UdmqEntry>, media: &Media) {
    let mut end = u64::MAX;
    for entry in entries {
        if entry.slba != end
            && let Some(namespace) = media.find(entry.nsid).and_then(|index| media.namespaces().get(index))
        {
            namespace.dirty().prefetch(entry.slba);
        }
        end = entry.slba.wrapping_add(u64::from(entry.nlb) + 1);
    }
}

#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;
