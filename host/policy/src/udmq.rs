//! What a batch of UDMQ entries of type 0 says, for policies and for whoever checks them (NVMCS, UDMQ entry). The entry itself is
//! [`dray_nvme::cdq`]'s.

use crate::role::Marks;
use dray_nvme::cdq::{Changed, Esa, QueueType, UDMQ_ENTRY_BYTES, UdmqEntry};

/// ESA and LBACIR in byte 31: all zero in an entry that names a range and nothing else.
const NOT_PLAIN: u8 = 0b1100_1110;

/// Whether entries of a queue of this kind and stride can be read.
#[must_use]
pub fn is_readable(kind: u8, stride: u32) -> bool {
    kind == QueueType::UDMQ.0 && stride as usize >= UDMQ_ENTRY_BYTES
}

/// The ordinary entry, in one test: a range, neither first nor last.
#[inline]
#[must_use]
pub fn is_plain(entry: &UdmqEntry) -> bool {
    u8::from(entry.lbamqa) & NOT_PLAIN == 0
}

/// Reads an entry; any bytes are some entry.
#[inline]
#[must_use]
pub fn read(bytes: &[u8; UDMQ_ENTRY_BYTES]) -> UdmqEntry {
    zerocopy::transmute!(*bytes)
}

/// The entries in raw bytes, `stride` bytes from one to the next; none where a stride cannot hold an entry.
pub fn entries(bytes: &[u8], stride: u32) -> impl Iterator<Item = UdmqEntry> + Clone + '_ {
    let stride = stride as usize;
    let bytes = if stride < UDMQ_ENTRY_BYTES { &[] } else { bytes };
    bytes.chunks_exact(stride.max(UDMQ_ENTRY_BYTES)).filter_map(|entry| entry.first_chunk().map(read))
}

/// Adds what an entry says besides a range; reserved values mean that everything may have changed.
pub fn mark(entry: &UdmqEntry, marks: &mut Marks) {
    match entry.esa() {
        Esa::ORDINARY => {}
        Esa::FIRST => marks.first = true,
        Esa::STOPPED => marks.stopped = true,
        Esa::SUSPENDED => marks.suspended = true,
        Esa::FULL => marks.full = true,
        _ => marks.everything = true,
    }
    if entry.changed() == Changed::Unknown {
        marks.everything = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_31_reads_as_the_reference_lists_it() {
        for phase in [0, 1] {
            let with = |attributes: u8| {
                let mut bytes = [0; UDMQ_ENTRY_BYTES];
                bytes[31] = attributes | phase;
                read(&bytes)
            };
            let marks = |attributes: u8| {
                let mut marks = Marks::default();
                mark(&with(attributes), &mut marks);
                marks
            };
            assert!(is_plain(&with(0)) && is_plain(&with(0x20)));
            assert!([0x40, 0x82, 0x84, 0x0e, 0xc0, 0x08].iter().all(|&special| !is_plain(&with(special))));
            assert!(marks(0x82).first && marks(0x84).stopped && marks(0x86).suspended);
            assert!(marks(0x8e).full && marks(0x0e).full && marks(0xc0).everything && marks(0x08).everything);
            assert_eq!(marks(0x20), Marks::default());
        }
    }

    #[test]
    fn odd_strides_do_not_panic() {
        assert_eq!(entries(&[0; 100], 0).count(), 0);
        assert_eq!(entries(&[0; 100], 31).count(), 0);
        assert_eq!(entries(&[0; 100], 50).count(), 2);
    }
}
