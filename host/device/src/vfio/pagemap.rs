//! Physical addresses out of `/proc/self/pagemap`, for a device without an IOMMU.
//!
//! A device that sees physical addresses cannot be told that memory is somewhere else: what it is given must lie as it is mapped,
//! one address after the other. Pages of 2 MiB do, ordinary ones by chance only, so memory of several pages must be made of huge
//! ones, and a piece must not be larger than one. Ordinary memory is moved by the kernel when it likes, locked or not; huge pages
//! are not, in practice. That is what "unsafe" means, besides that such a device can write everywhere.

use crate::memory::PAGE;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The page is in memory (proc(5)).
const PRESENT: u64 = 1 << 63;
/// It is on a swap device.
const SWAPPED: u64 = 1 << 62;
/// Number of the page frame; 0 for those who may not know.
const FRAME: u64 = (1 << 55) - 1;

/// Why memory has no physical address that a device can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoAddress {
    #[error("a page of the memory is not there")]
    NotPresent,
    #[error("only root (CAP_SYS_ADMIN) is told where memory is")]
    Hidden,
    #[error("the memory is not in one piece: use huge pages, and pieces of at most 2 MiB")]
    Scattered,
}

/// The physical address of memory whose pages have these entries in the page map, in order.
pub(super) fn physical(entries: &[u64]) -> Result<u64, NoAddress> {
    let mut first = None;
    for (at, entry) in entries.iter().enumerate() {
        if entry & PRESENT == 0 || entry & SWAPPED != 0 {
            return Err(NoAddress::NotPresent);
        }
        let frame = entry & FRAME;
        if frame == 0 {
            return Err(NoAddress::Hidden);
        }
        match first {
            None => first = Some(frame),
            Some(first) if frame == first + at as u64 => {}
            Some(_) => return Err(NoAddress::Scattered),
        }
    }
    first.and_then(|frame| frame.checked_mul(PAGE as u64)).ok_or(NoAddress::NotPresent)
}

/// Entries of the page map for `len` bytes of this process at `address`.
pub(super) fn entries(address: u64, len: u64) -> io::Result<Vec<u64>> {
    let page = PAGE as u64;
    let count = usize::try_from(len.div_ceil(page)).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bytes = vec![0; count * 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, address / page * 8)?;
    Ok(bytes.chunks_exact(8).filter_map(|word| word.try_into().ok()).map(u64::from_ne_bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn memory_in_one_piece_has_an_address() {
        assert_eq!(physical(&[PRESENT | 0x100, PRESENT | 1 << 61 | 0x101, PRESENT | 1 << 55 | 0x102]), Ok(0x10_0000));
    }

    #[test]
    fn anything_else_has_none() {
        assert_eq!(physical(&[PRESENT | 5, PRESENT | 7]), Err(NoAddress::Scattered));
        assert_eq!(physical(&[PRESENT | 5, PRESENT | 4]), Err(NoAddress::Scattered));
        assert_eq!(physical(&[PRESENT]), Err(NoAddress::Hidden));
        assert_eq!(physical(&[PRESENT | SWAPPED | 5]), Err(NoAddress::NotPresent));
        assert_eq!(physical(&[5]), Err(NoAddress::NotPresent));
        assert_eq!(physical(&[]), Err(NoAddress::NotPresent));
    }

    #[test]
    fn this_process_has_a_page_map() {
        let here = Box::new([7u8; PAGE]);
        let found = entries(here.as_ptr() as u64, PAGE as u64).expect("a page map");
        assert!(found[0] & PRESENT != 0, "memory that was just written");
    }

    proptest! {
        #[test]
        fn an_address_is_only_told_of_pages_in_a_row(frames in proptest::collection::vec(0u64..8, 0..5), bits in any::<u64>()) {
            let entries: Vec<u64> = frames.iter().map(|frame| PRESENT | (bits & !SWAPPED & !FRAME) | frame).collect();
            if let Ok(address) = physical(&entries) {
                prop_assert!(frames.windows(2).all(|pair| pair[0] + 1 == pair[1]) && address == frames[0] * 4096);
            }
        }
    }
}
