//! What the kernel says of regions, of the IOMMU and of configuration space, read from bytes: pure functions, that trust none of
//! them.

use crate::memory::PAGE;
use std::ops::RangeInclusive;
use vfio_bindings::bindings::vfio as uapi;

/// Most capabilities of one description, or of one configuration space.
const MAX_CAPABILITIES: usize = 64;
/// Bytes of a capability's header.
const HEADER: usize = 8;
/// Bytes of vfio_region_info without capabilities.
pub(super) const REGION_BYTES: usize = 32;
/// Bytes of vfio_iommu_type1_info without capabilities.
pub(super) const IOMMU_BYTES: usize = 24;
/// Most bytes of BAR0 that are mapped: many times the doorbells of 65,536 queue pairs.
pub(super) const MAX_MAPPED: u64 = 64 << 20;
/// PCI capability: MSI-X (PCI 3.0 §6.8.2).
const MSIX: u8 = 0x11;

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// A description whose chain of capabilities leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// The capability of that identifier behind the structure of `fixed` bytes: what follows its header. `first` is where the chain
/// begins, 0 = there is none.
fn capability(bytes: &[u8], fixed: usize, first: u32, id: u32) -> Result<Option<&[u8]>, Broken> {
    let mut at = first as usize;
    for _ in 0..MAX_CAPABILITIES {
        if at == 0 {
            return Ok(None);
        }
        let here = bytes.get(at..).filter(|_| at >= fixed).ok_or(Broken)?;
        let (found, next) = (word16(here, 0).ok_or(Broken)?, word32(here, 4).ok_or(Broken)? as usize);
        if u32::from(found) == id {
            return here.get(HEADER..).map(Some).ok_or(Broken);
        }
        if next != 0 && next <= at {
            return Err(Broken);
        }
        at = next;
    }
    Err(Broken)
}

/// A region of a device (vfio_region_info).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub flags: u32,
    /// Bytes; 0 = no such region.
    pub size: u64,
    /// Where it begins in the device's file.
    pub offset: u64,
    /// Its parts that may be mapped: whole pages within the region.
    pub areas: Vec<RangeInclusive<u64>>,
}

impl Region {
    /// Reads a description.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Broken> {
        let flags = word32(bytes, 4).ok_or(Broken)?;
        let first = word32(bytes, 12).ok_or(Broken)?;
        let (size, offset) = (word64(bytes, 16).ok_or(Broken)?, word64(bytes, 24).ok_or(Broken)?);
        if offset.checked_add(size).is_none() {
            return Err(Broken);
        }
        let mut region = Self { flags, size, offset, areas: Vec::new() };
        if flags & uapi::VFIO_REGION_INFO_FLAG_MMAP != 0 && size != 0 {
            let first = if flags & uapi::VFIO_REGION_INFO_FLAG_CAPS == 0 { 0 } else { first };
            region.areas = match capability(bytes, REGION_BYTES, first, uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP)? {
                Some(sparse) => sparse_areas(sparse, size)?,
                None => whole(0, size).into_iter().collect(),
            };
        }
        Ok(region)
    }

    pub(super) fn allows(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }
}

/// The whole pages of a part, as far as they are mapped at all.
fn whole(offset: u64, size: u64) -> Option<RangeInclusive<u64>> {
    let page = PAGE as u64;
    let end = offset.checked_add(size)?.min(MAX_MAPPED) / page * page;
    let start = offset.checked_next_multiple_of(page)?;
    (start < end).then(|| start..=end - 1)
}

fn sparse_areas(sparse: &[u8], size: u64) -> Result<Vec<RangeInclusive<u64>>, Broken> {
    let count = word32(sparse, 0).ok_or(Broken)? as usize;
    let list = sparse.get(8..).ok_or(Broken)?;
    if count > list.len() / 16 {
        return Err(Broken);
    }
    let mut areas = Vec::new();
    for area in list.chunks_exact(16).take(count) {
        let (offset, len) = (word64(area, 0).ok_or(Broken)?, word64(area, 8).ok_or(Broken)?);
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Broken);
        }
        areas.extend(whole(offset, len));
    }
    Ok(areas)
}

/// What type1 says of its I/O address space (vfio_iommu_type1_info).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Iommu {
    /// A bit for each page size; 0 = not told.
    pub page_sizes: u64,
    /// The addresses there are; empty = not told.
    pub windows: Vec<RangeInclusive<u64>>,
    /// Mappings that the kernel still takes, where it says so.
    pub mappings_left: Option<u32>,
}

impl Iommu {
    /// Reads a description.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Broken> {
        let flags = word32(bytes, 4).ok_or(Broken)?;
        let page_sizes = if flags & uapi::VFIO_IOMMU_INFO_PGSIZES == 0 { 0 } else { word64(bytes, 8).ok_or(Broken)? };
        let mut iommu = Self { page_sizes, ..Self::default() };
        if flags & uapi::VFIO_IOMMU_INFO_CAPS == 0 {
            return Ok(iommu);
        }
        let first = word32(bytes, 16).ok_or(Broken)?;
        if let Some(ranges) = capability(bytes, IOMMU_BYTES, first, uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)? {
            let count = word32(ranges, 0).ok_or(Broken)? as usize;
            let list = ranges.get(8..).ok_or(Broken)?;
            if count > list.len() / 16 {
                return Err(Broken);
            }
            let pair = |range: &[u8]| Some((word64(range, 0)?, word64(range, 8)?));
            iommu.windows = windows(list.chunks_exact(16).take(count).filter_map(pair));
        }
        if let Some(left) = capability(bytes, IOMMU_BYTES, first, uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)? {
            iommu.mappings_left = Some(word32(left, 0).ok_or(Broken)?);
        }
        Ok(iommu)
    }
}

/// Ranges (first and last address) as windows of whole pages: sorted, joined where they meet, without empty ones.
pub(super) fn windows(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<RangeInclusive<u64>> {
    let page = PAGE as u64;
    let mut all: Vec<(u64, u64)> = ranges
        .filter_map(|(first, last)| {
            // The last page may end at the last address there is.
            let end = if last == u64::MAX { last } else { ((last + 1) / page * page).checked_sub(1)? };
            Some((first.checked_next_multiple_of(page)?, end)).filter(|(first, last)| first < last)
        })
        .collect();
    all.sort_unstable();
    let mut joined: Vec<RangeInclusive<u64>> = Vec::new();
    for (first, last) in all {
        match joined.last_mut() {
            Some(before) if first <= before.end().saturating_add(1) => *before = *before.start()..=last.max(*before.end()),
            _ => joined.push(first..=last),
        }
    }
    joined
}

/// Where MSI-X's capability begins in configuration space of 256 bytes (or less); `None` where there is none.
pub(super) fn msix(config: &[u8]) -> Option<usize> {
    let mut at = usize::from(config.get(0x34)? & !3);
    for _ in 0..MAX_CAPABILITIES {
        if at < 0x40 {
            return None;
        }
        let (id, next) = (*config.get(at)?, *config.get(at + 1)?);
        if id == MSIX {
            return Some(at);
        }
        at = usize::from(next & !3);
    }
    None
}

/// How many vectors MSI-X's table has, by configuration space; 0 without MSI-X.
pub(super) fn msix_vectors(config: &[u8]) -> u16 {
    let control = msix(config).and_then(|at| config.get(at + 2..at + 4)).map_or(0, |word| u16::from_le_bytes([word[0], word[1]]) & 0x7ff);
    if msix(config).is_some() { control + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    const RW_MMAP: u32 = 7;
    const CAPS: u32 = 8;

    #[test]
    fn a_region_without_capabilities_is_mapped_as_a_whole() {
        let region = Region::parse(&bytes(&[32, RW_MMAP, 0, 99, 0x4000, 0, 0, 1])).expect("good");
        assert_eq!((region.size, region.offset, region.areas), (0x4000, 1 << 32, vec![0..=0x3fff]));
        let region = Region::parse(&bytes(&[32, 3, 0, 0, 0x4000, 0, 0, 0])).expect("good");
        assert!(region.areas.is_empty() && region.allows(3) && !region.allows(4));
        assert!(Region::parse(&bytes(&[32, RW_MMAP, 0, 0, 0x800, 0, 0, 0])).expect("good").areas.is_empty(), "less than a page");
    }

    #[test]
    fn the_table_of_msix_is_left_out_where_the_kernel_says_so() {
        // Behind another capability (3, MSIX_MAPPABLE): 0 to 2000h and 3000h to 4000h, in whole pages.
        let words = [80, RW_MMAP | CAPS, 0, 32, 0x4000, 0, 0, 0, 0x1_0003, 40, 0x1_0001, 0, 2, 0, 0, 0, 0x2800, 0, 0x3000, 0, 0x1000, 0];
        let region = Region::parse(&bytes(&words)).expect("good");
        assert_eq!(region.areas, [0..=0x1fff, 0x3000..=0x3fff]);
    }

    #[test]
    fn broken_descriptions_are_refused() {
        for tail in [
            &[0x1_0001u32, 0, 2, 0, 0, 0, 0x1000, 0][..], // more areas than there are
            &[0x1_0001, 0, 1, 0, 0x4000, 0, 1, 0],        // outside
            &[0x1_0001, 0, 1, 0, !0, !0, 1, 0],           // past the end of everything
            &[9, 32],                                     // a circle
            &[9, 4000],
            &[9],
            &[],
        ] {
            let head = [64, RW_MMAP | CAPS, 0, 32, 0x4000, 0, 0, 0];
            assert_eq!(Region::parse(&bytes(&[&head, tail].concat())), Err(Broken), "{tail:x?}");
        }
        assert_eq!(Region::parse(&bytes(&[32, RW_MMAP | CAPS, 0, 8, 0x4000, 0, 0, 0])), Err(Broken), "inside the structure");
        assert_eq!(Region::parse(&bytes(&[32, 0, 0, 0, !0, !0, 1, 0])), Err(Broken));
        assert_eq!(Region::parse(&[0; 31]), Err(Broken));
    }

    #[test]
    fn windows_leave_out_what_the_iommu_leaves_out() {
        // As behind Intel's: everything but the interrupt addresses; then how many mappings are left.
        let words = [
            0, 3, 0x1000, 0, 24, 0, //
            0x1_0001, 64, 2, 0, 0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, !0, 0xffff, //
            0x1_0003, 0, 65_535,
        ];
        let mut words = bytes(&words);
        words.truncate(words.len());
        // The second capability begins at 24 + 48.
        words[24 + 4..24 + 8].copy_from_slice(&72u32.to_ne_bytes());
        let iommu = Iommu::parse(&words).expect("good");
        assert_eq!(iommu.windows, [0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff]);
        assert_eq!((iommu.page_sizes, iommu.mappings_left), (0x1000, Some(65_535)));
        let silent = Iommu::parse(&bytes(&[24, 1, 0x1000, 0, 0, 0])).expect("good");
        assert_eq!((silent.windows.len(), silent.mappings_left), (0, None));
    }

    #[test]
    fn windows_are_sorted_and_joined() {
        assert_eq!(windows([(0x5000, 0x5fff), (0, 0xfff), (0x1000, 0x2fff), (7, 8)].into_iter()), [0..=0x2fff, 0x5000..=0x5fff]);
        assert_eq!(windows([(1, u64::MAX)].into_iter()), [0x1000..=u64::MAX]);
        assert!(windows([(u64::MAX, 0), (0, 0), (0xfff, 0x1ffe)].into_iter()).is_empty());
    }

    #[test]
    fn msix_is_found_in_the_chain() {
        let mut config = [0u8; 256];
        assert_eq!((msix(&config), msix_vectors(&config)), (None, 0));
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[1, 0x80]);
        config[0x80..0x84].copy_from_slice(&[0x11, 0, 64, 0]);
        assert_eq!((msix(&config), msix_vectors(&config)), (Some(0x80), 65));
        config[0x80] = 2;
        assert_eq!(msix(&config), None);
        config[0x81] = 0x40;
        assert_eq!(msix(&config), None, "a circle ends");
    }

    proptest! {
        #[test]
        fn no_description_makes_an_area_outside(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), near: bool) {
            if near && bytes.len() >= REGION_BYTES {
                bytes[4] |= (RW_MMAP | CAPS) as u8;
                bytes[12..16].copy_from_slice(&32u32.to_ne_bytes());
                bytes[20..24].fill(0);
            }
            if let Ok(region) = Region::parse(&bytes) {
                for area in region.areas {
                    prop_assert!(*area.end() < region.size && area.start() < area.end());
                    prop_assert!(area.start().is_multiple_of(4096) && (area.end() + 1).is_multiple_of(4096));
                }
            }
        }

        #[test]
        fn windows_never_overlap(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), near: bool) {
            if near && bytes.len() >= 32 {
                bytes[4] |= 3;
                bytes[16..20].copy_from_slice(&24u32.to_ne_bytes());
                bytes[24..26].copy_from_slice(&1u16.to_ne_bytes());
            }
            if let Ok(iommu) = Iommu::parse(&bytes) {
                for pair in iommu.windows.windows(2) {
                    prop_assert!(pair[0].end() < pair[1].start());
                }
            }
        }

        #[test]
        fn no_configuration_space_panics(bytes in proptest::collection::vec(any::<u8>(), 0..=256)) {
            if let Some(at) = msix(&bytes) {
                prop_assert!(at >= 0x40 && bytes[at] == MSIX);
            }
            let _any = msix_vectors(&bytes);
        }
    }
}
