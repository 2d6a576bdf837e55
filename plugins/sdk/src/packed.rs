//! The packed records of `wit/0.1` as typed values: little-endian, no padding, borrowed from the bytes of the call.
//!
//! Arrays from the host are stepped by the stride given in `open`, since a later host may append fields; arrays to the host
//! have a fixed record. A trailing part of a record is left out.

extern crate alloc;
use alloc::vec::Vec;

/// The longest range, in logical blocks: bits 30:0.
pub const RANGE_BLOCKS_MAX: u32 = (1 << 31) - 1;
/// The longest extent, in logical blocks: bits 29:0.
pub const EXTENT_BLOCKS_MAX: u32 = (1 << 30) - 1;

#[inline]
fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline]
fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// The records of a packed array, `stride` bytes apart; nothing where `stride` is shorter than the record.
fn records<const N: usize>(bytes: &[u8], stride: u32) -> impl ExactSizeIterator<Item = &[u8; N]> + Clone {
    let (bytes, stride) = if stride as usize >= N { (bytes, stride as usize) } else { (&[][..], N) };
    // Every chunk is at least N long; the fallback is there so that no panic is compiled in.
    bytes.chunks_exact(stride).map(|record| record.first_chunk().unwrap_or(&[0; N]))
}

/// Why an entry was posted: ESA, byte 31 bits 3:1 of a UDMQ entry (NVM Command Set, UDMQ entry type 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// 000b: an ordinary change.
    Ordinary,
    /// 001b: the first entry after logging started or resumed.
    First,
    /// 010b: the last entry, logging was stopped by the host.
    Stopped,
    /// 011b: the last entry, the controller is suspended.
    Suspended,
    /// 111b: the last entry, the queue was full: changes after it are not reported.
    Full,
    /// 100b to 110b.
    Reserved(u8),
}

/// Which blocks an entry speaks of: LBACIR, byte 31 bits 7:6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// 00b: the range of the entry.
    Range,
    /// 01b: every logical block of the namespace.
    Namespace,
    /// 10b: none.
    Nothing,
    /// 11b.
    Reserved,
}

/// A UDMQ entry of type 0, as the controller wrote it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a>(&'a [u8; 32]);

impl<'a> Entry<'a> {
    /// The entries of a batch, oldest first. `stride`: `queue.entry-bytes`.
    pub fn all(bytes: &'a [u8], stride: u32) -> impl ExactSizeIterator<Item = Entry<'a>> + Clone {
        records(bytes, stride).map(Entry)
    }

    /// The namespace.
    #[inline]
    pub fn nsid(&self) -> u32 {
        u32_at(self.0, 0)
    }

    /// First logical block.
    #[inline]
    pub fn slba(&self) -> u64 {
        u64_at(self.0, 8)
    }

    /// Number of logical blocks, 1 to 2^32 (the field is 0's based). Meaningful for [`Scope::Range`].
    #[inline]
    pub fn blocks(&self) -> u64 {
        u64::from(u32_at(self.0, 4)) + 1
    }

    /// The range was deallocated (DLBA).
    #[inline]
    pub fn deallocated(&self) -> bool {
        self.0[31] & DEALLOCATED != 0
    }

    /// An ordinary change of the entry's own range, which nearly all are: one test instead of two.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.0[31] & 0xce == 0
    }

    /// ESA.
    pub fn attribute(&self) -> Attribute {
        match self.0[31] >> 1 & 7 {
            0 => Attribute::Ordinary,
            1 => Attribute::First,
            2 => Attribute::Stopped,
            3 => Attribute::Suspended,
            7 => Attribute::Full,
            other => Attribute::Reserved(other),
        }
    }

    /// LBACIR.
    pub fn scope(&self) -> Scope {
        match self.0[31] >> 6 {
            0 => Scope::Range,
            1 => Scope::Namespace,
            2 => Scope::Nothing,
            _ => Scope::Reserved,
        }
    }
}

/// DLBA: bit 5 of byte 31.
const DEALLOCATED: u8 = 0x20;

/// What the host knows of one region of a namespace.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a>(&'a [u8; 32]);

impl<'a> Region<'a> {
    /// The regions of a call, in the host's order. `stride`: `setup.region-bytes`.
    pub fn all(bytes: &'a [u8], stride: u32) -> impl ExactSizeIterator<Item = Region<'a>> + Clone {
        records(bytes, stride).map(Region)
    }

    /// First logical block.
    #[inline]
    pub fn slba(&self) -> u64 {
        u64_at(self.0, 0)
    }

    /// The namespace.
    #[inline]
    pub fn nsid(&self) -> u32 {
        u32_at(self.0, 8)
    }

    /// Its size in logical blocks.
    #[inline]
    pub fn blocks(&self) -> u32 {
        u32_at(self.0, 12)
    }

    /// Blocks left to copy.
    #[inline]
    pub fn dirty(&self) -> u32 {
        u32_at(self.0, 16)
    }

    /// Blocks reported as changed this round, saturating.
    #[inline]
    pub fn changed(&self) -> u32 {
        u32_at(self.0, 20)
    }

    /// Milliseconds since the last change; `None` = never changed.
    #[inline]
    pub fn idle_ms(&self) -> Option<u32> {
        Some(u32_at(self.0, 24)).filter(|&idle| idle != u32::MAX)
    }

    /// The first copy of the region is still open (flag bit 0).
    #[inline]
    pub fn is_open(&self) -> bool {
        self.0[28] & 1 != 0
    }

    /// Held for later by the tracking plan (flag bit 1).
    #[inline]
    pub fn is_held(&self) -> bool {
        self.0[28] & 2 != 0
    }
}

/// Bits of byte 31 that say what an entry is: LBACIR, DLBA and ESA; not the phase tag, nor the reserved bit 4.
const MEANING: u8 = 0xee;

/// Lengthens ranges by what follows them, for a `cdq` answer: [`Scratch::merge`], then [`pass`](Self::pass) to the next entry that
/// lengthens none, [`add`](Self::add) for it, and so on.
///
/// An entry that follows the one before it costs one look; a record is written where a range ends.
#[derive(Debug)]
pub struct Merge<'a> {
    records: &'a mut Vec<[u8; 16]>,
    slba: u64,
    run: Run,
}

/// A range that grows.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    end: u64,
    /// The end that it may have at most: of its namespace, and of what a record can say. 0 where no range has begun: nothing
    /// lengthens it.
    limit: u64,
    nsid: u32,
    /// Byte 31 of its entries, without what is not their [`MEANING`].
    kind: u8,
}

impl Run {
    /// Whether `blocks` blocks of the entry lengthen the range: next to it, of its kind, not too long.
    #[inline(always)]
    fn is_followed_by(&self, entry: &Entry<'_>, blocks: u64) -> bool {
        let alike = (entry.nsid() == self.nsid) & (entry.0[31] & MEANING == self.kind);
        alike & (entry.slba() == self.end) & (blocks <= self.limit - self.end)
    }
}

impl Merge<'_> {
    /// Takes in the entries that do no more than lengthen the range that grows, and returns the first that does not.
    #[inline(always)]
    pub fn pass<'e>(&mut self, entries: &mut impl Iterator<Item = Entry<'e>>) -> Option<Entry<'e>> {
        let mut run = self.run;
        let next = entries.find(|entry| {
            let follows = run.is_followed_by(entry, entry.blocks());
            if follows {
                run.end += entry.blocks();
            }
            !follows
        });
        self.run.end = run.end;
        next
    }

    /// Adds an ordinary change of at most [`RANGE_BLOCKS_MAX`] blocks that begins within its namespace of `size` blocks; what
    /// leaves the namespace is cut off.
    #[inline(always)]
    pub fn add(&mut self, entry: &Entry<'_>, size: u64) {
        let (slba, left) = (entry.slba(), size.saturating_sub(entry.slba()));
        let blocks = entry.blocks().min(left);
        // It may follow all the same, now that it is cut.
        if blocks < entry.blocks() && self.run.is_followed_by(entry, blocks) {
            self.run.end += blocks;
            return;
        }
        self.write();
        self.slba = slba;
        let (end, limit) = (slba + blocks, slba + left.min(u64::from(RANGE_BLOCKS_MAX)));
        self.run = Run { end, limit, nsid: entry.nsid(), kind: entry.0[31] & MEANING };
    }

    #[inline(always)]
    fn write(&mut self) {
        let Run { end, nsid, kind, .. } = self.run;
        let blocks = end.wrapping_sub(self.slba);
        if blocks != 0 {
            let length = blocks as u32 & RANGE_BLOCKS_MAX | u32::from(kind & DEALLOCATED) << 26;
            self.records.push(record(self.slba, length, nsid));
        }
    }

    /// The ranges, in the order in which they began.
    #[inline(always)]
    pub fn finish(mut self) -> Ranges {
        self.write();
        Ranges(self.records.as_flattened().to_vec())
    }
}

/// Room to merge in, kept from call to call, so that an answer is allocated once and no longer than it is.
#[derive(Debug, Default)]
pub struct Scratch(Vec<[u8; 16]>);

impl Scratch {
    /// Begins to merge a batch.
    pub fn merge(&mut self) -> Merge<'_> {
        self.0.clear();
        Merge { records: &mut self.0, slba: 0, run: Run::default() }
    }
}

/// Writes the changed ranges of a `cdq` answer, 16 bytes each.
#[derive(Debug, Default)]
pub struct Ranges(Vec<u8>);

impl Ranges {
    /// Adds `blocks` logical blocks from `slba` on, in pieces of [`RANGE_BLOCKS_MAX`]; none if `blocks` is 0.
    pub fn push(&mut self, nsid: u32, slba: u64, blocks: u64, deallocated: bool) {
        let flag = if deallocated { 1 << 31 } else { 0 };
        push_pieces(&mut self.0, nsid, slba, blocks, RANGE_BLOCKS_MAX, flag);
    }

    /// Adds every logical block of a namespace.
    pub fn push_namespace(&mut self, nsid: u32) {
        self.0.extend_from_slice(&record(0, 0, nsid));
    }

    /// The packed bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// How an extent should travel, a wish (bits 31:30 of its length).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// 00b: as it is.
    #[default]
    Plain,
    /// 01b: lz4.
    Lz4,
    /// 10b: zstd.
    Zstd,
}

/// Writes the extents of a `copy` answer, 16 bytes each, in the order in which they are to be copied.
#[derive(Debug, Default)]
pub struct Extents(Vec<u8>);

impl Extents {
    /// Room for `extents` extents.
    pub fn with_capacity(extents: usize) -> Self {
        Self(Vec::with_capacity(extents * 16))
    }

    /// Adds `blocks` logical blocks from `slba` on, in pieces of [`EXTENT_BLOCKS_MAX`]; none if `blocks` is 0.
    pub fn push(&mut self, nsid: u32, slba: u64, blocks: u64, compression: Compression) {
        push_pieces(&mut self.0, nsid, slba, blocks, EXTENT_BLOCKS_MAX, (compression as u32) << 30);
    }

    /// How many there are: the host takes at most 4,096.
    pub fn len(&self) -> usize {
        self.0.len() / 16
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The packed bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A `choice` of the tracking plan, one byte a region: `chunk_log2` is the chunk in blocks (bits 4:0), `hold` leaves the
/// region for a later round because it is hot (bit 7).
pub fn choice(chunk_log2: u8, hold: bool) -> u8 {
    chunk_log2 & 0x1f | if hold { 0x80 } else { 0 }
}

#[inline]
fn record(slba: u64, length: u32, nsid: u32) -> [u8; 16] {
    (u128::from(slba) | u128::from(length) << 64 | u128::from(nsid) << 96).to_le_bytes()
}

fn push_pieces(to: &mut Vec<u8>, nsid: u32, mut slba: u64, mut blocks: u64, longest: u32, flags: u32) {
    while blocks != 0 {
        let piece = blocks.min(u64::from(longest)) as u32;
        to.extend_from_slice(&record(slba, piece | flags, nsid));
        // A device may name a range that runs past 2^64; the host refuses it, so nothing may panic here.
        slba = slba.wrapping_add(u64::from(piece));
        blocks -= u64::from(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(nsid: u32, nlb: u32, slba: u64, last: u8) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&nsid.to_le_bytes());
        bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
        bytes[8..16].copy_from_slice(&slba.to_le_bytes());
        bytes[31] = last;
        bytes
    }

    #[test]
    fn entries_are_stepped_by_the_stride_of_the_host() {
        let mut bytes = Vec::new();
        for index in 0..3 {
            bytes.extend(entry(7, 0xffff_ffff, 0x1_0000_0002 + index, 0x21));
            bytes.extend([0xee; 8]);
        }
        bytes.extend([0x55; 39]);
        let read: Vec<_> = Entry::all(&bytes, 40).map(|entry| (entry.nsid(), entry.slba(), entry.blocks())).collect();
        assert_eq!(read, (0..3).map(|index| (7, 0x1_0000_0002 + index, 1 << 32)).collect::<Vec<_>>());
        assert_eq!(Entry::all(&bytes, 31).len(), 0, "a stride shorter than an entry shows none");
        assert_eq!(Entry::all(&bytes, 0).len(), 0);
    }

    #[test]
    fn byte_31_is_read_as_the_specification_lists_it() {
        let read = |last| {
            let bytes = entry(1, 0, 0, last);
            let entry = Entry(&bytes);
            (entry.attribute(), entry.scope(), entry.deallocated(), entry.is_plain())
        };
        // Both phases of each value of the list.
        for phase in [0, 1] {
            assert_eq!(read(0x82 | phase), (Attribute::First, Scope::Nothing, false, false));
            assert_eq!(read(phase), (Attribute::Ordinary, Scope::Range, false, true));
            assert_eq!(read(0x20 | phase), (Attribute::Ordinary, Scope::Range, true, true));
            assert_eq!(read(0x40 | phase), (Attribute::Ordinary, Scope::Namespace, false, false));
            assert_eq!(read(0x84 | phase), (Attribute::Stopped, Scope::Nothing, false, false));
            assert_eq!(read(0x86 | phase), (Attribute::Suspended, Scope::Nothing, false, false));
            assert_eq!(read(0x8e | phase), (Attribute::Full, Scope::Nothing, false, false));
            assert_eq!(read(0x0e | phase), (Attribute::Full, Scope::Range, false, false));
        }
        assert_eq!(read(0xc8), (Attribute::Reserved(4), Scope::Reserved, false, false));
    }

    #[test]
    fn regions_are_read_field_by_field() {
        let mut bytes = [0_u8; 64];
        for (at, value) in [(0, 9_u32), (4, 1), (8, 2), (12, 3), (16, 4), (20, 5), (24, 6), (28, 2)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[56..60].copy_from_slice(&[0xff; 4]);
        bytes[60] = 1;
        let regions: Vec<_> = Region::all(&bytes, 32).collect();
        let first = regions[0];
        assert_eq!((first.slba(), first.nsid(), first.blocks()), (9 | 1 << 32, 2, 3));
        assert_eq!((first.dirty(), first.changed(), first.idle_ms()), (4, 5, Some(6)));
        assert_eq!((first.is_open(), first.is_held()), (false, true));
        assert_eq!((regions[1].idle_ms(), regions[1].is_open(), regions[1].is_held()), (None, true, false));
    }

    #[test]
    fn long_ranges_and_extents_are_cut_into_pieces_that_fit() {
        let mut ranges = Ranges::default();
        ranges.push(3, 5, 1 << 32, true);
        ranges.push(3, 0, 0, false);
        ranges.push(3, u64::MAX, u64::from(RANGE_BLOCKS_MAX) + 1, false);
        ranges.push_namespace(4);
        let bytes = ranges.into_bytes();
        let read: Vec<_> = records::<16>(&bytes, 16).map(|range| (u64_at(range, 0), u32_at(range, 8), u32_at(range, 12))).collect();
        let longest = u64::from(RANGE_BLOCKS_MAX);
        assert_eq!(read[..3], [(5, u32::MAX, 3), (5 + longest, u32::MAX, 3), (5 + 2 * longest, 2 | 1 << 31, 3)]);
        assert_eq!(read[3..], [(u64::MAX, RANGE_BLOCKS_MAX, 3), (longest - 1, 1, 3), (0, 0, 4)]);

        let mut extents = Extents::default();
        extents.push(1, 8, 16, Compression::Zstd);
        assert_eq!((extents.len(), extents.is_empty()), (1, false));
        assert_eq!(extents.into_bytes()[8..12], (16 | 2_u32 << 30).to_le_bytes());
    }

    #[test]
    fn what_follows_lengthens_the_range_before_it() {
        let mut scratch = Scratch::default();
        let longest = u64::from(RANGE_BLOCKS_MAX);
        let far = 1 << 40;
        let size = far + longest + 5;
        // Namespace, first block, blocks, byte 31; whether it lengthens.
        let changes = [
            (3, 0, 7, 1, false),
            (3, 7, 2, 0x10, true),
            (4, 9, 3, 0, false),
            (4, 12, 1, 0x20, false),
            (4, far, longest - 1, 0, false),
            (4, far + longest - 1, 1, 1, true),
            (4, far + longest, 1, 0, false),
            (4, far + longest + 1, 3, 0, true),
            (4, far + longest + 4, 3, 0, false),
            (4, far, 1, 0, false),
        ];
        for _ in 0..2 {
            let mut merge = scratch.merge();
            for (nsid, slba, blocks, last, lengthens) in &changes {
                let bytes = entry(*nsid, (blocks - 1) as u32, *slba, *last);
                let entry = Entry(&bytes);
                let left = merge.pass(&mut [entry].into_iter());
                assert_eq!(left.is_none(), *lengthens, "{slba} of {nsid}");
                if let Some(entry) = left {
                    merge.add(&entry, size);
                }
            }
            let mut ranges = Ranges::default();
            ranges.push(3, 0, 9, false);
            ranges.push(4, 9, 3, false);
            ranges.push(4, 12, 1, true);
            ranges.push(4, far, longest, false);
            // The last block of the namespace, from an entry that leaves it.
            ranges.push(4, far + longest, 5, false);
            ranges.push(4, far, 1, false);
            assert_eq!(merge.finish().into_bytes(), ranges.into_bytes());
        }
        assert!(scratch.merge().finish().into_bytes().is_empty());
        let nothing = entry(0, 0, 0, 0);
        assert!(scratch.merge().pass(&mut [Entry(&nothing)].into_iter()).is_some(), "no range has begun");
    }

    #[test]
    fn what_says_more_than_a_range_lengthens_none() {
        for last in 0..=0xff_u8 {
            let mut scratch = Scratch::default();
            let mut merge = scratch.merge();
            let (first, second) = (entry(1, 0, 0, 0), entry(1, 0, 1, last));
            merge.add(&Entry(&first), 10);
            assert_eq!(merge.pass(&mut [Entry(&second)].into_iter()).is_none(), last & 0xee == 0, "{last:#x}");
        }
    }

    #[test]
    fn a_choice_keeps_the_chunk_apart_from_the_hold() {
        assert_eq!((choice(12, true), choice(12, false), choice(0xff, false)), (0x8c, 0x0c, 0x1f));
    }
}
