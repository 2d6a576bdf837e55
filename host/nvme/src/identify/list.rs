//! Lists of namespaces (CNS 02h, 10h), of controllers (CNS 12h, 13h, the data of Namespace Attachment) and of
//! secondary controllers (CNS 15h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The NSIDs of a namespace list: up to its first zero or its end.
pub fn nsid_list(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let (words, _) = bytes.as_chunks::<4>();
    words
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .take_while(|nsid| *nsid != 0)
}

/// Writes a namespace list (NSIDs ascending) into `out`, zeroes the rest, and returns how many fitted.
pub fn write_nsid_list(nsids: impl IntoIterator<Item = u32>, out: &mut [u8]) -> usize {
    out.fill(0);
    let (words, _) = out.as_chunks_mut::<4>();
    words
        .iter_mut()
        .zip(nsids)
        .map(|(word, nsid)| *word = nsid.to_le_bytes())
        .count()
}

/// The CNTLIDs of a controller list: as many as its count says, or as the bytes hold.
pub fn controller_list(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    let (words, _) = bytes.as_chunks::<2>();
    let count = words.first().map_or(0, |word| u16::from_le_bytes(*word));
    words
        .iter()
        .skip(1)
        .take(usize::from(count))
        .map(|word| u16::from_le_bytes(*word))
}

/// Writes a controller list (CNTLIDs ascending) with its count into `out`, zeroes the rest, and returns how many
/// fitted.
pub fn write_controller_list(cntlids: impl IntoIterator<Item = u16>, out: &mut [u8]) -> usize {
    out.fill(0);
    let (words, _) = out.as_chunks_mut::<2>();
    let Some((count, ids)) = words.split_first_mut() else {
        return 0;
    };
    // The count is 16 bits wide, so no more entries than that are written.
    let limit = usize::from(u16::MAX);
    let written = ids
        .iter_mut()
        .take(limit)
        .zip(cntlids)
        .map(|(word, id)| *word = id.to_le_bytes())
        .count();
    *count = (written as u16).to_le_bytes();
    written
}

/// Secondary Controller Entry, 32 bytes (CNS 15h).
#[derive(
    Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SecondaryController {
    /// SCID, CNTLID of the secondary controller.
    pub scid: u16,
    /// PCID, CNTLID of its primary controller.
    pub pcid: u16,
    /// SCS, Secondary Controller State: bit 0 online.
    pub scs: u8,
    /// Reserved, 0.
    pub rsvd5: [u8; 3],
    /// VFN, Virtual Function Number, from 1; 0 if it is none.
    pub vfn: u16,
    /// NVQ, Number of VQ Flexible Resources Assigned.
    pub nvq: u16,
    /// NVI, Number of VI Flexible Resources Assigned.
    pub nvi: u16,
    /// Reserved, 0.
    pub rsvd14: [u8; 18],
}
layout!(SecondaryController, 32, pcid @ 2, scs @ 4, vfn @ 8, nvq @ 10, nvi @ 12);

impl SecondaryController {
    /// Whether the controller is online.
    pub const fn is_online(&self) -> bool {
        self.scs & 1 != 0
    }
}

/// The entries of a Secondary Controller list: as many as its count (byte 0) says, or as the bytes hold.
pub fn secondary_controllers(bytes: &[u8]) -> impl Iterator<Item = SecondaryController> + '_ {
    let (entries, _) = bytes.as_chunks::<32>();
    let count = usize::from(bytes.first().copied().unwrap_or(0));
    entries
        .iter()
        .skip(1)
        .take(count)
        .map(|bytes| zerocopy::transmute!(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_to_their_counts_and_their_bytes() {
        let mut out = [0xFF; 12];
        assert_eq!(write_nsid_list([1, 7], &mut out), 2);
        assert!(nsid_list(&out).eq([1, 7]));
        assert_eq!(write_nsid_list(1.., &mut out), 3);
        assert!(nsid_list(&out).eq([1, 2, 3]));
        assert_eq!(write_controller_list([4, 5], &mut out), 2);
        assert_eq!(out[..6], [2, 0, 4, 0, 5, 0]);
        assert!(controller_list(&out).eq([4, 5]));
        assert_eq!(controller_list(&[0xFF, 0xFF, 1, 0, 2]).count(), 1);
        assert_eq!(write_controller_list([1], &mut []), 0);
        let mut page = [0u8; 96];
        page[0] = 9;
        page[64..69].copy_from_slice(&[5, 0, 1, 0, 1]);
        let found = secondary_controllers(&page).nth(1).unwrap();
        assert_eq!(
            (
                found.scid,
                found.pcid,
                found.is_online(),
                secondary_controllers(&page).count()
            ),
            (5, 1, true, 2)
        );
    }
}
