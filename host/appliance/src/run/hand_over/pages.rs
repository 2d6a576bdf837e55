//! The pages that a controller has written, as they are collected from it and told to the client: a bit for each 4 KiB of the
//! memory that was mapped when the log began. Memory that is mapped later is not tracked, so it counts as written, always.

use dray_nvme::track::TrackMemoryDescriptor;

/// Bytes of a page of ours: the smallest granule of Track Memory Changes, and of a mapping.
pub(super) const PAGE: u64 = 4096;
/// Most ranges that a controller tracks.
const MAX_RANGES: usize = 256;

/// First address and bytes.
pub(super) type Range = (u64, u64);

#[derive(Debug)]
struct Tracked {
    start: u64,
    pages: u64,
    bits: Vec<u64>,
}

impl Tracked {
    fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }

    /// Sets the bits of every page that has a byte in `from..end`, which lies within.
    fn set(&mut self, from: u64, end: u64) {
        let (first, last) = ((from - self.start) / PAGE, (end - 1 - self.start) / PAGE);
        for page in first..=last {
            self.bits[(page / 64) as usize] |= 1 << (page % 64);
        }
    }
}

/// The log.
#[derive(Debug)]
pub(super) struct PageLog {
    /// Ascending, apart from each other.
    tracked: Vec<Tracked>,
    /// What the client wants logged; everything if empty.
    wanted: Vec<Range>,
}

/// The part of both, if any.
fn common(a: Range, b: Range) -> Option<(u64, u64)> {
    let (from, end) = (a.0.max(b.0), (a.0 + a.1).min(b.0 + b.1));
    (from < end).then_some((from, end))
}

impl PageLog {
    /// A log of `wanted` (byte ranges that do not run past the end of all addresses; none = everything), as far as it is
    /// mapped; `None` if that is in more pieces than can be tracked.
    pub(super) fn new(mapped: &[Range], wanted: &[Range]) -> Option<Self> {
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        for &mapping in mapped {
            if wanted.is_empty() {
                pieces.push((mapping.0, mapping.0 + mapping.1));
            }
            // Mappings begin and end at pages, so what is rounded up stays within.
            let inside = wanted.iter().filter_map(|&range| common(mapping, range));
            pieces.extend(inside.map(|(from, end)| (from / PAGE * PAGE, end.next_multiple_of(PAGE))));
        }
        pieces.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (from, end) in pieces {
            match joined.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(end),
                _ => joined.push((from, end)),
            }
        }
        let tracked = joined.iter().map(|&(start, end)| {
            let pages = (end - start) / PAGE;
            Tracked { start, pages, bits: vec![0; pages.div_ceil(64) as usize] }
        });
        (joined.len() <= MAX_RANGES).then(|| Self { tracked: tracked.collect(), wanted: wanted.to_vec() })
    }

    /// What the controller is to track, by pages of 4 KiB; `None` if a range is longer than can be said.
    pub(super) fn descriptors(&self) -> Option<Vec<TrackMemoryDescriptor>> {
        let descriptor = |range: &Tracked| {
            let len = u32::try_from(range.pages).ok()?;
            Some(TrackMemoryDescriptor { saddr: range.start.into(), len: len.into() })
        };
        self.tracked.iter().map(descriptor).collect()
    }

    /// The controller has written there.
    pub(super) fn mark(&mut self, at: u64, bytes: u64) {
        let Some(end) = at.checked_add(bytes) else { return self.mark_all() };
        for range in &mut self.tracked {
            if let Some((from, end)) = common((at, end - at), (range.start, range.pages * PAGE)) {
                range.set(from, end);
            }
        }
    }

    /// Nobody knows what it has written.
    pub(super) fn mark_all(&mut self) {
        for range in &mut self.tracked {
            range.set(range.start, range.end());
        }
    }

    /// Tells what was written in `iova .. iova + len` by pages of `page` bytes (bit n%8 of byte n/8), and forgets it; `mapped`
    /// is what is mapped now. A page of ours that is told in part only is kept.
    pub(super) fn report(&mut self, asked: Range, page: u64, mapped: &[Range], into: &mut [u8]) {
        let (iova, len) = asked;
        let mut tell = |from: u64, end: u64| {
            for bit in (from - iova) / page..=(end - 1 - iova) / page {
                if let Some(byte) = into.get_mut((bit / 8) as usize) {
                    *byte |= 1 << (bit % 8);
                }
            }
        };
        // What finds no room in the bitmap is not told.
        let told = len / page * page;
        for range in &mut self.tracked {
            let Some((from, end)) = common((iova, told), (range.start, range.pages * PAGE)) else { continue };
            let (first, last) = ((from - range.start) / PAGE, (end - 1 - range.start) / PAGE);
            let mut at = first;
            while at <= last {
                let word = range.bits[(at / 64) as usize] >> (at % 64);
                if word == 0 {
                    at = (at / 64 + 1) * 64;
                    continue;
                }
                at += u64::from(word.trailing_zeros());
                if at > last {
                    break;
                }
                let start = range.start + at * PAGE;
                tell(start.max(from), (start + PAGE).min(end));
                if from <= start && start + PAGE <= end {
                    range.bits[(at / 64) as usize] &= !(1 << (at % 64));
                }
                at += 1;
            }
        }
        for &mapping in mapped {
            let Some((from, end)) = common((iova, told), mapping) else { continue };
            let parts = if self.wanted.is_empty() {
                vec![(from, end)]
            } else {
                self.wanted.iter().filter_map(|&range| common((from, end - from), range)).collect()
            };
            for (from, end) in parts {
                let mut at = from;
                for range in &self.tracked {
                    if at < range.start.min(end) {
                        tell(at, range.start.min(end));
                    }
                    at = at.max(range.end());
                    if at >= end {
                        break;
                    }
                }
                if at < end {
                    tell(at, end);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(log: &mut PageLog, asked: Range, page: u64, mapped: &[Range]) -> Vec<u64> {
        let bits = asked.1 / page;
        let mut into = vec![0; bits.next_multiple_of(64) as usize / 8];
        log.report(asked, page, mapped, &mut into);
        (0..bits).filter(|bit| into[(bit / 8) as usize] >> (bit % 8) & 1 == 1).collect()
    }

    #[test]
    fn what_is_mapped_and_wanted_is_tracked_in_as_few_pieces_as_there_are() {
        let mapped = [(0x10_0000, 0x4000), (0x10_4000, 0x4000), (0x20_0000, 0x1000)];
        let pieces = |wanted: &[Range]| {
            let log = PageLog::new(&mapped, wanted).expect("few pieces");
            log.descriptors().expect("short").iter().map(|d| (d.saddr.get(), d.len.get())).collect::<Vec<_>>()
        };
        assert_eq!(pieces(&[]), [(0x10_0000, 8), (0x20_0000, 1)]);
        assert_eq!(pieces(&[(0, 0x10_1801)]), [(0x10_0000, 2)], "rounded to pages");
        assert_eq!(pieces(&[(0x10_3fff, 2), (0, u64::MAX >> 1)]), [(0x10_0000, 8), (0x20_0000, 1)]);
        assert_eq!(pieces(&[(0x30_0000, 5)]), []);
        let many: Vec<Range> = (0..300).map(|n| (n * 0x2000, 0x1000)).collect();
        assert!(PageLog::new(&many, &[]).is_none());
    }

    #[test]
    fn a_page_is_told_once_and_by_the_size_that_is_asked_for() {
        let mapped = [(0x10_0000, 0x10_0000)];
        let mut log = PageLog::new(&mapped, &[]).expect("few");
        log.mark(0x10_3000, 0x1000);
        log.mark(0x15_0fff, 2);
        log.mark(0x20_0000, 0x1000);
        let all = (0x10_0000, 0x10_0000);
        assert_eq!(told(&mut log, (0x10_0000, 0x3000), 4096, &mapped), [0; 0]);
        assert_eq!(told(&mut log, all, 4096, &mapped), [3, 0x50, 0x51]);
        assert_eq!(told(&mut log, all, 4096, &mapped), [0; 0]);
        log.mark(0x10_3000, 1);
        assert_eq!(told(&mut log, (0x10_3000, 0x1000), 512, &mapped), [0, 1, 2, 3, 4, 5, 6, 7]);
        log.mark(0x10_5000, 1);
        assert_eq!(told(&mut log, all, 0x2_0000, &mapped), [0]);
        log.mark_all();
        assert_eq!(told(&mut log, all, 4096, &mapped).len(), 256);
    }

    #[test]
    fn what_is_told_in_part_only_is_kept() {
        let mapped = [(0x10_0000, 0x4000)];
        let mut log = PageLog::new(&mapped, &[]).expect("few");
        log.mark(0x10_1000, 0x1000);
        assert_eq!(told(&mut log, (0x10_0000, 0x1800), 2048, &mapped), [2]);
        assert_eq!(told(&mut log, (0x10_1800, 0x800), 2048, &mapped), [0], "the other half is written too");
        // A bitmap by larger pages has no room for the rest.
        assert_eq!(told(&mut log, (0x10_0000, 0x3fff), 0x2000, &mapped), [0]);
        log.mark(0x10_3000, 1);
        assert_eq!(told(&mut log, (0x10_0000, 0x3fff), 0x2000, &mapped), [0; 0]);
        assert_eq!(told(&mut log, (0x10_0000, 0x4000), 0x1000, &mapped), [3]);
    }

    #[test]
    fn memory_that_was_mapped_later_counts_as_written() {
        let mut log = PageLog::new(&[(0x10_0000, 0x2000)], &[(0, 0x18_0000)]).expect("few");
        let now = [(0xf_0000, 0x1000), (0x10_0000, 0x4000), (0x20_0000, 0x1000)];
        for _ in 0..2 {
            assert_eq!(told(&mut log, (0xf_0000, 0x20_0000), 4096, &now), [0, 0x12, 0x13]);
        }
    }
}
