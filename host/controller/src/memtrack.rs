//! Which host memory a migratable controller has written: Track Send, track memory changes (Base 2.3 §5.2.28.1.2), and Track
//! Receive (§5.2.27).
//!
//! A bit for each granule of each range. The controller says what it has written *after* it has written it; a host that reads
//! the report and then the page so never misses the last write.

use dray_device::space::SpaceReader;
use dray_nvme::status::Status;
use dray_nvme::track::{
    TRACK_VERSION, TrackMemoryDescriptor, TrackReceiveDescriptor, TrackReceiveFlags, TrackReceiveHeader, granule_bytes,
    parse_track_memory,
};
use zerocopy::IntoBytes;

const HEADER_BYTES: usize = size_of::<TrackReceiveHeader>();
const DESCRIPTOR_BYTES: usize = size_of::<TrackReceiveDescriptor>();

/// What a controller can track; fixed at start and shown in Identify Controller (Base 2.3 §5.2.13.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TrackLimits {
    /// MINMRTG: smallest granule, 2^n × 4 KiB.
    pub(crate) min_granule: u8,
    /// MAXMRTG: largest granule, 2^n × 4 KiB.
    pub(crate) max_granule: u8,
    /// CMMRTD: most ranges. The caller makes it smaller by what others use of NMMRTD.
    pub(crate) max_ranges: u16,
    /// Most granules of all ranges together: a bit of memory each.
    pub(crate) max_granules: u64,
}

/// Why tracking cannot start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TrackRefusal {
    pub(crate) status: Status,
    /// DW0 and DW1 of the completion: with Not Enough Resources, granularity (DW0 15:0) and number of ranges (DW1) that would
    /// work.
    pub(crate) result: u64,
}

impl From<Status> for TrackRefusal {
    fn from(status: Status) -> Self {
        Self { status, result: 0 }
    }
}

impl From<TrackRefusal> for Status {
    fn from(refusal: TrackRefusal) -> Self {
        refusal.status
    }
}

/// A range and its bits.
#[derive(Debug)]
struct Range {
    start: u64,
    /// Of the last byte, since a range may end with the address space.
    last: u64,
    granules: u32,
    bits: Vec<u64>,
}

impl Range {
    /// Sets bits `first..=last`; returns how many were clear.
    #[inline]
    fn set(&mut self, first: u32, last: u32) -> u64 {
        let mut fresh = 0;
        let mut at = first;
        while at <= last {
            let low = at % 64;
            let high = (last - (at - low)).min(63);
            let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
            if let Some(word) = self.bits.get_mut((at / 64) as usize) {
                fresh += u64::from((mask & !*word).count_ones());
                *word |= mask;
            }
            let Some(next) = (at - low).checked_add(64) else { break };
            at = next;
        }
        fresh
    }

    /// The first bit at or after `from` that is (`wanted`) set or not.
    fn find(&self, from: u32, wanted: bool) -> Option<u32> {
        let mut skip = u64::MAX << (from % 64);
        for (index, word) in self.bits.iter().enumerate().skip((from / 64) as usize) {
            let word = if wanted { *word } else { !*word } & skip;
            if word != 0 {
                let at = index as u32 * 64 + word.trailing_zeros();
                return (at < self.granules).then_some(at);
            }
            skip = u64::MAX;
        }
        None
    }

    /// Takes the first run of set bits at or after `from`: first bit and length.
    fn take_run(&mut self, from: u32) -> Option<(u32, u32)> {
        let first = self.find(from, true)?;
        let end = self.find(first, false).unwrap_or(self.granules);
        let mut at = first;
        while at < end {
            let low = at % 64;
            let count = (end - at).min(64 - low);
            if let Some(word) = self.bits.get_mut((at / 64) as usize) {
                *word &= !((u64::MAX >> (64 - count)) << low);
            }
            at += count;
        }
        Some((first, end - first))
    }
}

/// The memory that a host has asked to have tracked for one controller.
#[derive(Debug)]
pub(crate) struct MemoryTracker {
    /// Ascending, apart from each other.
    ranges: Vec<Range>,
    /// Granule of 2^n × 4 KiB.
    granule: u8,
    /// log2 of the granule in bytes.
    shift: u32,
    /// The range hit last.
    recent: usize,
    /// Bits set in all ranges.
    dirty: u64,
    /// Where the next report begins, so that a hot page early in the list hides nothing behind it.
    next: (usize, u32),
}

impl MemoryTracker {
    /// Reads the data of Track Send, track memory changes, start.
    ///
    /// # Errors
    /// Invalid Field for a buffer that ends early, an unknown version, a granularity outside the limits, no range or too many,
    /// and a range that is empty, not on its granule, past the end of all addresses, or overlaps another. Not Enough Resources
    /// for more granules than the limit, with what would work if any granularity does.
    pub(crate) fn parse(buffer: &[u8], limits: &TrackLimits) -> Result<Self, TrackRefusal> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let (header, descriptors) = parse_track_memory(buffer).map_err(|_| invalid)?;
        let granule = header.rmrtg;
        let bytes = granule_bytes(granule.into()).ok_or(invalid)?;
        let legal = (limits.min_granule..=limits.max_granule).contains(&granule);
        if !legal || descriptors.is_empty() || descriptors.len() > usize::from(limits.max_ranges) {
            return Err(invalid.into());
        }
        let mut total = 0;
        for descriptor in descriptors {
            check(descriptor, bytes)?;
            total += u64::from(descriptor.len.get());
        }
        if total > limits.max_granules {
            return Err(too_large(granule, total, descriptors.len(), limits));
        }
        let mut ranges: Vec<Range> = descriptors.iter().map(|descriptor| range(descriptor, bytes)).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        if ranges.windows(2).any(|pair| pair[0].last >= pair[1].start) {
            return Err(invalid.into());
        }
        let shift = bytes.trailing_zeros();
        Ok(Self { ranges, granule, shift, recent: 0, dirty: 0, next: (0, 0) })
    }

    /// Number of ranges, for NMMRTD.
    pub(crate) fn ranges(&self) -> usize {
        self.ranges.len()
    }

    /// Whether every range is host memory that the controller may write.
    pub(crate) fn is_memory(&self, reader: &SpaceReader) -> bool {
        self.ranges.iter().all(|range| {
            let mut at = range.start;
            for mapping in reader.mappings().iter().filter(|mapping| mapping.writable) {
                let end = mapping.iova + mapping.memory.len() as u64;
                if mapping.iova <= at && at < end {
                    if end > range.last {
                        return true;
                    }
                    at = end;
                }
            }
            false
        })
    }

    /// The controller has written `len` bytes at `iova`; parts outside the ranges are nobody's business.
    #[inline]
    pub(crate) fn written(&mut self, iova: u64, len: usize) {
        let Some(more) = (len as u64).checked_sub(1) else { return };
        let last = iova.saturating_add(more);
        let shift = self.shift;
        if let Some(range) = self.ranges.get_mut(self.recent)
            && range.start <= iova
            && last <= range.last
        {
            self.dirty += range.set(((iova - range.start) >> shift) as u32, ((last - range.start) >> shift) as u32);
            return;
        }
        self.written_elsewhere(iova, last);
    }

    fn written_elsewhere(&mut self, iova: u64, last: u64) {
        let from = self.ranges.partition_point(|range| range.last < iova);
        for (index, range) in self.ranges.iter_mut().enumerate().skip(from) {
            if range.start > last {
                break;
            }
            let first = iova.max(range.start) - range.start;
            let end = last.min(range.last) - range.start;
            self.dirty += range.set((first >> self.shift) as u32, (end >> self.shift) as u32);
            self.recent = index;
        }
    }

    /// Track Receive: writes the report into `out`, at most `max_bytes` of it, and returns its bytes. What is reported is
    /// forgotten here; what finds no room is left, and MTR says so.
    ///
    /// # Errors
    /// Invalid Field when there is something to report but no room for a single range: NTMCD 0 would say that there is not.
    pub(crate) fn receive(
        &mut self,
        suspended: bool,
        cntlid: u16,
        max_bytes: usize,
        out: &mut [u8],
    ) -> Result<usize, Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let room = max_bytes.min(out.len());
        let (head, body) = out.get_mut(..room).and_then(|out| out.split_at_mut_checked(HEADER_BYTES)).ok_or(invalid)?;
        if self.dirty > 0 && body.len() < DESCRIPTOR_BYTES {
            return Err(invalid);
        }
        let mut count = 0;
        for place in body.chunks_exact_mut(DESCRIPTOR_BYTES) {
            let Some((saddr, len)) = self.take() else { break };
            let descriptor = TrackReceiveDescriptor { saddr: saddr.into(), len: len.into(), ..Default::default() };
            place.copy_from_slice(descriptor.as_bytes());
            count += 1;
        }
        let header = TrackReceiveHeader {
            ver: TRACK_VERSION,
            flags: TrackReceiveFlags::new().with_mtr(self.dirty > 0).with_susp(suspended),
            cntlid,
            ntmcd: count,
            rpmpg: self.granule.into(),
            ..Default::default()
        };
        head.copy_from_slice(header.as_bytes());
        Ok(HEADER_BYTES + count as usize * DESCRIPTOR_BYTES)
    }

    /// Takes the next run of written granules: address and length in granules.
    fn take(&mut self) -> Option<(u64, u32)> {
        if self.dirty == 0 {
            return None;
        }
        // Once around: the range at hand is looked at twice, from where the last report ended and from its begin.
        for _ in 0..=self.ranges.len() {
            let (index, from) = self.next;
            let range = self.ranges.get_mut(index)?;
            if let Some((first, len)) = range.take_run(from) {
                self.next.1 = first + len;
                self.dirty -= u64::from(len);
                return Some((range.start + (u64::from(first) << self.shift), len));
            }
            self.next = ((index + 1) % self.ranges.len(), 0);
        }
        None
    }
}

fn check(descriptor: &TrackMemoryDescriptor, granule: u64) -> Result<(), Status> {
    let (start, len) = (descriptor.saddr.get(), u64::from(descriptor.len.get()));
    let last = len.checked_sub(1).and_then(|more| more.checked_mul(granule)).and_then(|more| start.checked_add(more));
    let fits = last.is_some_and(|last| last.checked_add(granule - 1).is_some());
    if fits && start.is_multiple_of(granule) { Ok(()) } else { Err(Status::INVALID_FIELD.with_dnr()) }
}

/// A range that was checked, with nothing written.
fn range(descriptor: &TrackMemoryDescriptor, granule: u64) -> Range {
    let (start, granules) = (descriptor.saddr.get(), descriptor.len.get());
    let last = start + (u64::from(granules) * granule - 1);
    Range { start, last, granules, bits: vec![0; granules.div_ceil(64) as usize] }
}

/// Not Enough Resources, with the smallest granularity under which the same memory would fit.
fn too_large(granule: u8, total: u64, ranges: usize, limits: &TrackLimits) -> TrackRefusal {
    // Each range may lose up to a granule to rounding.
    let fits = |n: &u8| (total >> (n - granule).min(63)) + ranges as u64 <= limits.max_granules;
    let works = (granule..=limits.max_granule).find(fits);
    let result = works.map_or(0, |n| u64::from(n) | (ranges as u64) << 32);
    TrackRefusal { status: Status::NOT_ENOUGH_RESOURCES, result }
}

#[cfg(test)]
mod tests;
