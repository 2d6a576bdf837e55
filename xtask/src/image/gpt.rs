//! A partition table (GPT, UEFI specification 5.3) whose every byte follows from what is in it.
//!
//! Sectors are 512 bytes, partitions start at multiples of 1 MiB; identifiers are derived from names, so that two builds agree.

use sha2::{Digest, Sha256};

pub const SECTOR: u64 = 512;
/// What partitions are aligned to, in bytes.
pub const ALIGN: u64 = 1 << 20;
/// Entries of the table, of 128 bytes each: 32 sectors, as everyone has them.
const ENTRIES: usize = 128;
const ENTRY: usize = 128;
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY) as u64 / SECTOR;

/// What a partition is for, as identifiers that others know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An EFI system partition.
    Efi,
    /// Data in a file system that every system knows: FAT.
    Basic,
    /// A Linux file system.
    Linux,
}

impl Kind {
    /// The identifier as it lies on the disk: the first three groups little-endian.
    fn guid(self) -> [u8; 16] {
        let text = match self {
            Self::Efi => 0xC12A_7328_F81F_11D2_BA4B_00A0_C93E_C93B,
            Self::Basic => 0xEBD0_A0A2_B9E5_4433_87C0_68B6_B726_99C7,
            Self::Linux => 0x0FC6_3DAF_8483_4772_8E79_3D69_D847_7DE4_u128,
        };
        on_disk(text.to_be_bytes())
    }
}

/// One partition: where it lies, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    pub name: &'static str,
    pub kind: Kind,
    pub start: u64,
    pub bytes: u64,
}

/// Lays partitions of these sizes out one behind the other; the disk's size in bytes with them.
pub fn lay_out(wanted: &[(&'static str, Kind, u64)]) -> (Vec<Partition>, u64) {
    let mut start = ALIGN;
    let mut partitions = Vec::new();
    for (name, kind, bytes) in wanted.iter().copied() {
        let bytes = bytes.next_multiple_of(ALIGN);
        partitions.push(Partition { name, kind, start, bytes });
        start += bytes;
    }
    // The second table at the end has as much room as the first.
    (partitions, start + ALIGN)
}

/// An identifier that depends on a name alone, in the order of its text (RFC 9562, version 8).
pub fn identifier(name: &str) -> [u8; 16] {
    let sum = Sha256::digest(format!("dray image {name}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&sum[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// The same as people write it.
pub fn identifier_text(name: &str) -> String {
    let digits: String = identifier(name).iter().map(|byte| format!("{byte:02x}")).collect();
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

fn on_disk(mut guid: [u8; 16]) -> [u8; 16] {
    guid[..4].reverse();
    guid[4..6].reverse();
    guid[6..8].reverse();
    guid
}

/// The tables of a disk: `(offset, bytes)` at its start (protective MBR, header, entries) and at its end (entries, header).
pub fn tables(partitions: &[Partition], disk_bytes: u64) -> [(u64, Vec<u8>); 2] {
    assert!(partitions.len() <= ENTRIES, "more partitions than a table has entries");
    let last = disk_bytes / SECTOR - 1;
    let mut entries = vec![0; ENTRIES * ENTRY];
    for (entry, partition) in entries.chunks_mut(ENTRY).zip(partitions) {
        entry[..16].copy_from_slice(&partition.kind.guid());
        entry[16..32].copy_from_slice(&on_disk(identifier(&format!("partition {}", partition.name))));
        entry[32..40].copy_from_slice(&(partition.start / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&((partition.start + partition.bytes) / SECTOR - 1).to_le_bytes());
        for (to, from) in entry[56..].chunks_mut(2).zip(partition.name.encode_utf16()) {
            to.copy_from_slice(&from.to_le_bytes());
        }
    }
    let sum = crc32fast::hash(&entries);
    let mut start = protective(last);
    start.extend_from_slice(&header(1, last, 2, last, sum));
    start.extend_from_slice(&entries);
    let mut end = entries;
    end.extend_from_slice(&header(last, 1, last - TABLE_SECTORS, last, sum));
    [(0, start), ((last - TABLE_SECTORS) * SECTOR, end)]
}

/// The master boot record that tells old programs that all of the disk is taken.
fn protective(last: u64) -> Vec<u8> {
    let mut sector = vec![0; SECTOR as usize];
    let partition = &mut sector[446..462];
    // From the second sector (cylinder 0, head 0, sector 2) to the end, as far as 32 bits say.
    partition[1..4].copy_from_slice(&[0, 2, 0]);
    partition[4..8].copy_from_slice(&[0xee, 0xff, 0xff, 0xff]);
    partition[8..12].copy_from_slice(&1_u32.to_le_bytes());
    partition[12..].copy_from_slice(&u32::try_from(last).unwrap_or(u32::MAX).to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A header at sector `here`; the other one is at `other`, the entries begin at `table`.
fn header(here: u64, other: u64, table: u64, last: u64, entries_sum: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SECTOR as usize);
    bytes.extend_from_slice(b"EFI PART");
    // Revision 1.0, the header's size, its own sum (filled in below), reserved.
    for number in [0x0001_0000_u32, 92, 0, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let usable = 2 + TABLE_SECTORS;
    for number in [here, other, usable, last - 1 - TABLE_SECTORS] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&on_disk(identifier("disk")));
    bytes.extend_from_slice(&table.to_le_bytes());
    for number in [ENTRIES as u32, ENTRY as u32, entries_sum] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    bytes.resize(SECTOR as usize, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn partitions_lie_side_by_side_and_both_tables_agree() {
        let (partitions, bytes) = lay_out(&[("ONE", Kind::Efi, 3 << 20), ("TWO", Kind::Linux, (1 << 20) + 1)]);
        let places: Vec<_> = partitions.iter().map(|part| (part.start, part.bytes)).collect();
        assert_eq!(places, [(1 << 20, 3 << 20), (4 << 20, 2 << 20)]);
        assert_eq!(bytes, 7 << 20);
        let [(zero, start), (at, end)] = tables(&partitions, bytes);
        assert_eq!((zero, at + end.len() as u64), (0, bytes));
        assert_eq!(start[1024..], end[..end.len() - 512], "the entries differ");
        let (first, second) = (&start[512..1024], &end[end.len() - 512..]);
        for (header, table) in [(first, &start[1024..]), (second, &end[..end.len() - 512])] {
            assert_eq!(&header[..8], b"EFI PART");
            let mut zeroed = header[..92].to_vec();
            zeroed[16..20].fill(0);
            assert_eq!(header[16..20], crc32fast::hash(&zeroed).to_le_bytes());
            assert_eq!(header[88..92], crc32fast::hash(table).to_le_bytes());
        }
        // Each says where it is itself and where the other one is.
        assert_eq!((number(first, 24), number(first, 32)), (number(second, 32), number(second, 24)));
        assert_eq!(number(second, 24), bytes / 512 - 1);
        // The first partition's entry: as `sfdisk` shows it.
        assert_eq!(start[1024..1028], [0x28, 0x73, 0x2a, 0xc1]);
        assert_eq!((number(&start, 1024 + 32), number(&start, 1024 + 40)), (2_048, 2_048 + 6_144 - 1));
        assert_eq!(start[1024 + 56..1024 + 64], *b"O\0N\0E\0\0\0");
        assert_eq!(start[510..512], [0x55, 0xaa]);
    }

    #[test]
    fn identifiers_follow_from_names_alone() {
        assert_eq!(identifier("disk"), identifier("disk"));
        assert_ne!(identifier("disk"), identifier("desk"));
        let text = identifier_text("disk");
        assert_eq!((text.len(), &text[14..15]), (36, "8"));
    }
}
