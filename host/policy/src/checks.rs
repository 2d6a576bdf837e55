//! Every bound of the interface, for each role: what [`Role::check`] refuses.

use crate::packed::{self, EXTENT_BYTES, MAX_RANGE_BLOCKS, RANGE_BYTES, REGION_BYTES, Extent, Range};
use crate::role::{
    Cdq, CdqAnswer, CdqQueue, CdqRequest, Copy, CopyAnswer, CopyRequest, MAX_EXTENTS, MAX_RANGES_PER_ENTRY, Marks, Role, Then,
    Tracking, TrackingAnswer, TrackingRequest,
};
use crate::seam::{Fault, NamespaceInfo, Setup};
use crate::udmq;
use dray_nvme::cdq::Changed;

/// Largest log2 of a chunk in blocks that a tracking plan may ask for.
pub const MAX_CHUNK_LOG2: u8 = 24;

/// Entries of a request that [`Role::record`] keeps.
const RECORDED_ENTRIES: usize = 64;

impl Role for Cdq {
    const NAME: &'static str = "cdq";
    type Extra = CdqQueue;
    type Request = CdqRequest;
    type Answer = CdqAnswer;

    fn clear(answer: &mut CdqAnswer) {
        answer.ranges.clear();
        *answer = CdqAnswer { ranges: core::mem::take(&mut answer.ranges), ..CdqAnswer::default() };
    }

    fn check(setup: &Setup, queue: &CdqQueue, request: &CdqRequest, answer: &CdqAnswer) -> Result<(), Fault> {
        let shown = Self::items(queue, request);
        if u64::from(answer.consumed) > shown {
            return malformed(format!("consumed {} of {shown} entries", answer.consumed));
        }
        let (ranges, rest) = answer.ranges.as_chunks::<RANGE_BYTES>();
        if !rest.is_empty() {
            return malformed(format!("ranges end within a record ({} bytes)", answer.ranges.len()));
        }
        if ranges.len() as u64 > shown * MAX_RANGES_PER_ENTRY as u64 {
            return malformed(format!("{} ranges for {shown} entries", ranges.len()));
        }
        if let [only] = setup.namespaces.as_slice()
            && all_within(*only, ranges)
        {
            return Ok(());
        }
        let mut places = Places::new(setup);
        for range in ranges.iter().map(Range::unpack) {
            places.hold("range", range.nsid, range.slba, range.blocks)?;
        }
        Ok(())
    }

    fn items(queue: &CdqQueue, request: &CdqRequest) -> u64 {
        (request.entries.len() / queue.entry_bytes.max(1) as usize) as u64
    }

    fn safe(_: &CdqRequest, answer: &mut CdqAnswer) {
        Self::clear(answer);
    }

    /// Only the first entries: a batch's start is a batch, and copying all of a full one would cost more than the draining.
    fn record(queue: &CdqQueue, request: &CdqRequest, into: &mut CdqRequest) {
        let stride = queue.entry_bytes.max(1) as usize;
        let shown = request.entries.len() / stride;
        let kept = shown.min(RECORDED_ENTRIES);
        into.entries.clear();
        into.entries.extend_from_slice(&request.entries[..kept * stride]);
        into.now_us = request.now_us;
        into.waiting = request.waiting.saturating_add((shown - kept) as u32);
    }

    /// Each block that a consumed entry names must lie in a returned range.
    fn omission(setup: &Setup, queue: &CdqQueue, request: &CdqRequest, answer: &CdqAnswer) -> Option<String> {
        if !udmq::is_readable(queue.kind, queue.entry_bytes) {
            return None;
        }
        let cover = Cover::new(setup, &answer.ranges);
        let mut said = Marks::default();
        let consumed = udmq::entries(&request.entries, queue.entry_bytes).take(answer.consumed as usize);
        for (index, entry) in consumed.enumerate() {
            udmq::mark(&entry, &mut said);
            let Some(namespace) = find(&setup.namespaces, entry.nsid) else { continue };
            let (from, to) = match entry.changed() {
                Changed::Range { slba, blocks, .. } => (slba, slba.saturating_add(blocks).min(namespace.blocks)),
                Changed::Namespace { .. } => (0, namespace.blocks),
                Changed::Nothing | Changed::Unknown => continue,
            };
            if from < to && !cover.holds(entry.nsid, from, to) {
                return Some(format!("entry {index}: blocks {from}..{to} of namespace {} are in no range", entry.nsid));
            }
        }
        let Marks { first, stopped, suspended, full, everything: _ } = answer.marks;
        (said.first && !first || said.stopped && !stopped || said.suspended && !suspended || said.full && !full)
            .then(|| format!("the entries said {said:?}, the answer {:?}", answer.marks))
    }
}

impl Role for Tracking {
    const NAME: &'static str = "tracking";
    type Extra = ();
    type Request = TrackingRequest;
    type Answer = TrackingAnswer;

    fn clear(answer: &mut TrackingAnswer) {
        answer.choices.clear();
    }

    fn check(_: &Setup, (): &(), request: &TrackingRequest, answer: &TrackingAnswer) -> Result<(), Fault> {
        let shown = request.regions.len() / REGION_BYTES;
        if answer.choices.len() != shown {
            return malformed(format!("{} choices for {shown} regions", answer.choices.len()));
        }
        for (index, (region, &byte)) in packed::regions(&request.regions).zip(&answer.choices).enumerate() {
            let choice = packed::Choice::unpack(byte);
            if byte & 0x60 != 0 {
                return malformed(format!("choice {index} sets reserved bits: {byte:#04x}"));
            }
            if choice.chunk_log2 > MAX_CHUNK_LOG2 || 1u64 << choice.chunk_log2 > u64::from(region.blocks).next_power_of_two() {
                let blocks = region.blocks;
                return malformed(format!("choice {index}: a chunk of 2^{} blocks in a region of {blocks}", choice.chunk_log2));
            }
        }
        Ok(())
    }

    fn items((): &(), request: &TrackingRequest) -> u64 {
        (request.regions.len() / REGION_BYTES) as u64
    }

    fn safe(request: &TrackingRequest, answer: &mut TrackingAnswer) {
        answer.choices.clear();
        answer.choices.resize(request.regions.len() / REGION_BYTES, packed::Choice::default().pack());
    }

    fn record((): &(), request: &TrackingRequest, into: &mut TrackingRequest) {
        into.now_us = request.now_us;
        into.last = request.last;
        into.regions.clone_from(&request.regions);
    }
}

impl Role for Copy {
    const NAME: &'static str = "copy";
    type Extra = ();
    type Request = CopyRequest;
    type Answer = CopyAnswer;

    fn clear(answer: &mut CopyAnswer) {
        answer.extents.clear();
        *answer = CopyAnswer { extents: core::mem::take(&mut answer.extents), ..CopyAnswer::default() };
    }

    fn check(setup: &Setup, (): &(), request: &CopyRequest, answer: &CopyAnswer) -> Result<(), Fault> {
        let (extents, rest) = answer.extents.as_chunks::<EXTENT_BYTES>();
        if !rest.is_empty() {
            return malformed(format!("extents end within a record ({} bytes)", answer.extents.len()));
        }
        if extents.len() > MAX_EXTENTS {
            return malformed(format!("{} extents, at most {MAX_EXTENTS}", extents.len()));
        }
        let mut places = Places::new(setup);
        for extent in extents.iter().map(Extent::unpack) {
            if extent.blocks == 0 {
                return malformed(format!("an extent of no blocks at LBA {} of namespace {}", extent.slba, extent.nsid));
            }
            if extent.compression.0 > packed::Compression::ZSTD.0 {
                return malformed(format!("compression {} is reserved", extent.compression.0));
            }
            places.hold("extent", extent.nsid, extent.slba, extent.blocks)?;
        }
        let unqueued = request.left_blocks.saturating_sub(request.queued_blocks);
        if extents.is_empty() && answer.wait_us == 0 && answer.then == Then::GoOn && unqueued > 0 {
            return malformed(format!("no extents and no wait with {unqueued} blocks left"));
        }
        Ok(())
    }

    fn items((): &(), request: &CopyRequest) -> u64 {
        (request.regions.len() / REGION_BYTES) as u64
    }

    fn safe(_: &CopyRequest, answer: &mut CopyAnswer) {
        Self::clear(answer);
        answer.wait_us = 1000;
    }

    fn record((): &(), request: &CopyRequest, into: &mut CopyRequest) {
        let mut regions = core::mem::take(&mut into.regions);
        regions.clone_from(&request.regions);
        *into = CopyRequest { regions, ..*request };
    }
}

fn malformed(what: String) -> Result<(), Fault> {
    Err(Fault::Malformed(what))
}

/// The check of the usual case, one namespace, without a branch per range. A whole-namespace range (no blocks) passes with any
/// SLBA inside.
fn all_within(only: NamespaceInfo, ranges: &[[u8; RANGE_BYTES]]) -> bool {
    let mut bad = false;
    for bytes in ranges {
        let record = u128::from_le_bytes(*bytes);
        let (slba, blocks, nsid) = (record as u64, (record >> 64) as u32 & MAX_RANGE_BLOCKS, (record >> 96) as u32);
        bad |= (nsid != only.nsid) | (slba > only.blocks) | (u64::from(blocks) > only.blocks.wrapping_sub(slba));
    }
    !bad
}

/// Looks namespaces up for records that come in runs: the last one found is tried first, then the list by bisection.
struct Places<'a> {
    setup: &'a Setup,
    last: NamespaceInfo,
}

impl<'a> Places<'a> {
    fn new(setup: &'a Setup) -> Self {
        let none = NamespaceInfo { nsid: 0, blocks: 0, block_bytes: 0 };
        Self { setup, last: setup.namespaces.first().copied().unwrap_or(none) }
    }

    fn hold(&mut self, what: &str, nsid: u32, slba: u64, blocks: u32) -> Result<(), Fault> {
        if self.last.nsid != nsid {
            self.last = match find(&self.setup.namespaces, nsid) {
                Some(found) => found,
                None => return malformed(format!("{what} in namespace {nsid}, which does not move")),
            };
        }
        let size = self.last.blocks;
        if nsid == 0 || slba > size || u64::from(blocks) > size - slba {
            return malformed(format!("{what} of {blocks} blocks at LBA {slba} leaves namespace {nsid} of {size} blocks"));
        }
        Ok(())
    }
}

/// The host lists namespaces in ascending order; a list that is not only costs a walk.
pub(crate) fn find(namespaces: &[NamespaceInfo], nsid: u32) -> Option<NamespaceInfo> {
    match namespaces.binary_search_by_key(&nsid, |namespace| namespace.nsid) {
        Ok(at) => Some(namespaces[at]),
        Err(_) => namespaces.iter().find(|namespace| namespace.nsid == nsid).copied(),
    }
}

/// Ranges as sorted, merged intervals.
struct Cover(Vec<(u32, u64, u64)>);

impl Cover {
    fn new(setup: &Setup, bytes: &[u8]) -> Self {
        let mut all: Vec<(u32, u64, u64)> = packed::ranges(bytes)
            .map(|range| match range.blocks {
                0 => (range.nsid, 0, find(&setup.namespaces, range.nsid).map_or(0, |namespace| namespace.blocks)),
                blocks => (range.nsid, range.slba, range.slba.saturating_add(u64::from(blocks))),
            })
            .collect();
        all.sort_unstable();
        let mut merged: Vec<(u32, u64, u64)> = Vec::with_capacity(all.len());
        for (nsid, from, to) in all {
            match merged.last_mut() {
                Some(last) if last.0 == nsid && from <= last.2 => last.2 = last.2.max(to),
                _ => merged.push((nsid, from, to)),
            }
        }
        Self(merged)
    }

    fn holds(&self, nsid: u32, from: u64, to: u64) -> bool {
        let after = self.0.partition_point(|interval| (interval.0, interval.1) <= (nsid, from));
        after > 0 && self.0[after - 1].0 == nsid && to <= self.0[after - 1].2
    }
}

#[cfg(test)]
#[path = "checks_tests.rs"]
mod tests;
