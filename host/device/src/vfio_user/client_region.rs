//! The server's regions: what it says of them, and the parts that may be mapped.

use super::client_link::{ClientError, Link, Request};
use super::wire::{RegionInfo, SparseArea, SparseMmap, command};
use crate::memory::{Access, Arena, PAGE};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Most bytes that a region's description may have.
const MAX_INFO_BYTES: u32 = 64 << 10;
/// Most times that a description is asked for.
const MAX_REPEATS: u32 = 4;
/// Most bytes of a region that are mapped: many times the doorbells of 65,536 queue pairs.
const MAX_MAPPED: u64 = 64 << 20;
/// Most capabilities of a region.
const MAX_CAPABILITIES: u32 = 16;

const SIZE: usize = size_of::<RegionInfo>();

/// A part of a region that is memory of ours too.
#[derive(Clone, Debug)]
pub(super) struct MappedArea {
    /// Where it begins in the region.
    pub offset: u64,
    pub arena: Arc<Arena>,
}

/// What the server says of a region.
#[derive(Debug, Default)]
pub(super) struct Described {
    pub info: RegionInfo,
    /// Parts that may be mapped, as the server has them.
    pub areas: Vec<SparseArea>,
    pub fds: Vec<OwnedFd>,
}

/// Asks for the description of a region, again with more room if that is what the server wants.
pub(super) fn describe(link: &Link, index: u32) -> Result<Described, ClientError> {
    let mut argsz = SIZE as u32;
    for _ in 0..MAX_REPEATS {
        let ask = RegionInfo { argsz, index, ..RegionInfo::default() };
        let request = Request {
            reply: (SIZE, MAX_INFO_BYTES as usize),
            ..Request::new(command::GET_REGION_INFO, ask.as_bytes(), 0)
        };
        let (described, needed) = link.call(&request, |payload, fds| {
            let (info, _) = RegionInfo::take(payload).ok_or(ClientError::Protocol("a region without description"))?;
            if info.index != index {
                return Err(ClientError::Protocol("the description of another region"));
            }
            // Some servers send all of it, whatever they were asked for.
            if info.argsz > argsz && info.argsz as usize > payload.len() {
                return Ok((Described::default(), info.argsz));
            }
            let areas = areas(&info, payload)?;
            Ok((Described { info, areas, fds }, 0))
        })?;
        if needed == 0 {
            return Ok(described);
        }
        if needed > MAX_INFO_BYTES {
            break;
        }
        argsz = needed;
    }
    link.close(&ClientError::Protocol("a region whose description never fits"));
    Err(ClientError::Protocol("a region whose description never fits"))
}

/// The parts of a region that may be mapped. Each lies inside the region.
fn areas(info: &RegionInfo, payload: &[u8]) -> Result<Vec<SparseArea>, ClientError> {
    const BROKEN: ClientError = ClientError::Protocol("a region with broken capabilities");
    if info.flags & RegionInfo::MMAP == 0 || info.size == 0 {
        return Ok(Vec::new());
    }
    let mut at = if info.flags & RegionInfo::CAPS == 0 { 0 } else { info.cap_offset as usize };
    for _ in 0..MAX_CAPABILITIES {
        if at == 0 {
            // Nothing says otherwise: all of it.
            return Ok(vec![SparseArea { offset: 0, size: info.size }]);
        }
        let tail = payload.get(at..).filter(|_| at >= SIZE).ok_or(BROKEN)?;
        let word = |from: usize| tail.get(from..from + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        let (id, next) = (word(0).ok_or(BROKEN)? as u16, word(4).ok_or(BROKEN)? as usize);
        if id == SparseMmap::ID {
            let (sparse, mut rest) = SparseMmap::take(tail).ok_or(BROKEN)?;
            let mut areas = Vec::new();
            for _ in 0..sparse.areas {
                let (area, after) = SparseArea::take(rest).ok_or(BROKEN)?;
                if area.offset.checked_add(area.size).is_none_or(|end| end > info.size) {
                    return Err(ClientError::Protocol("an area outside its region"));
                }
                areas.push(area);
                rest = after;
            }
            return Ok(areas);
        }
        if next != 0 && next <= at {
            return Err(BROKEN);
        }
        at = next;
    }
    Err(BROKEN)
}

/// Maps the parts of a region that may be mapped: with one descriptor for all of them, or one each. Parts that are less than a
/// page, or are not where pages are, are left to messages.
pub(super) fn map(described: Described) -> Result<Vec<MappedArea>, ClientError> {
    let Described { info, areas, fds } = described;
    let mut mapped = Vec::new();
    for (at, area) in areas.iter().enumerate() {
        let Some(fd) = (if fds.len() == areas.len() { fds.get(at) } else { fds.first() }) else { break };
        let page = PAGE as u64;
        let end = (area.offset + area.size).min(MAX_MAPPED) / page * page;
        let Some(offset) = area.offset.checked_next_multiple_of(page).filter(|&offset| offset < end) else { continue };
        let position = info.offset.checked_add(offset).ok_or(ClientError::Protocol("an area outside every file"))?;
        if !position.is_multiple_of(page) {
            continue;
        }
        let access = if info.flags & RegionInfo::WRITE == 0 { Access::Read } else { Access::ReadWrite };
        let len = usize::try_from(end - offset).unwrap_or(0);
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(std::io::Error::from)?;
        mapped.push(MappedArea { offset, arena: Arena::map_client(fd, position, len, access)? });
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payload(info: RegionInfo, words: &[u32]) -> Vec<u8> {
        [info.as_bytes(), words.as_bytes()].concat()
    }

    #[test]
    fn sparse_areas_behind_other_capabilities() {
        let flags = RegionInfo::READ | RegionInfo::WRITE | RegionInfo::MMAP | RegionInfo::CAPS;
        let info = RegionInfo { flags, cap_offset: 32, size: 0x4000, ..RegionInfo::default() };
        let found = areas(&info, &payload(info, &[0x1_0001, 0, 1, 0, 0x1000, 0, 0x1000, 0])).expect("areas");
        assert_eq!(found, [SparseArea { offset: 0x1000, size: 0x1000 }]);
        let found = areas(&info, &payload(info, &[9, 40, 0x1_0001, 0, 0, 0])).expect("none");
        assert!(found.is_empty());
        let whole = RegionInfo { flags: RegionInfo::MMAP, ..info };
        assert_eq!(areas(&whole, whole.as_bytes()).expect("whole"), [SparseArea { offset: 0, size: 0x4000 }]);
        for broken in [
            &[0x1_0001, 0, 2, 0, 0x1000, 0, 0x1000, 0][..],
            &[0x1_0001, 0, 1, 0, 0x1000, 0, 0x3001, 0],
            &[0x1_0001, 0, 1, 0, !0, !0, 1, 0],
            &[0x1_0001, 0, !0, 0],
            &[9, 32],
            &[9, 4],
            &[9, 4000],
            &[9],
            &[],
        ] {
            assert!(areas(&info, &payload(info, broken)).is_err(), "{broken:x?}");
        }
        let before = RegionInfo { cap_offset: 8, ..info };
        assert!(areas(&before, &payload(before, &[1; 8])).is_err());
    }

    proptest! {
        #[test]
        fn no_description_makes_an_area_outside(bytes in proptest::collection::vec(any::<u8>(), 32..160), small in any::<bool>()) {
            let (mut info, _) = RegionInfo::take(&bytes).expect("long enough");
            if small {
                info.cap_offset %= 64;
                info.flags |= RegionInfo::MMAP | RegionInfo::CAPS;
            }
            for area in areas(&info, &bytes).unwrap_or_default() {
                prop_assert!(area.offset.checked_add(area.size).is_some_and(|end| end <= info.size));
            }
        }
    }
}
