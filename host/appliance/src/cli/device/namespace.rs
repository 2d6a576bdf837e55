//! The structures of one namespace: Identify Namespace (CNS 00h, 08h) and its identification descriptors (CNS 03h).

use super::controller::dashed;
use super::page::{Page, count, hex};
use crate::config::units::Size;
use dray_nvme::identify::{
    CommandSetId, IdentifyNamespace, IdentifyNamespaceIndependent, NamespaceIdType, Nmic, Nsattr, descriptors,
};

/// Key, title and section of Identify Namespace.
pub(super) const NAMESPACE: (&str, &str, &str) =
    ("identify_namespace", "Identify Namespace (CNS 00h)", "NVMCS §4.1.5");
/// Key, title and section of what does not depend on the command set.
pub(super) const INDEPENDENT: (&str, &str, &str) = (
    "identify_namespace_independent",
    "I/O Command Set Independent Identify Namespace (CNS 08h)",
    "Base 2.3 §5.2.13.2.8",
);
/// Key, title and section of the descriptors.
pub(super) const DESCRIPTORS: (&str, &str, &str) =
    ("descriptors", "Namespace Identification Descriptors (CNS 03h)", "Base 2.3 §5.2.13.2.3");

fn blocks(count: u64, block_bytes: Option<u32>) -> String {
    match block_bytes.and_then(|bytes| count.checked_mul(bytes.into())) {
        Some(bytes) => Size(bytes).to_string(),
        None => "logical blocks".into(),
    }
}

fn sharing(page: &mut Page, nmic: Nmic) {
    page.hex("NMIC", nmic.into_bits(), 2, "Namespace Multi-path I/O and Namespace Sharing Capabilities")
        .flag("SHRNS", nmic.shared(), "may be attached to several controllers");
}

fn attributes(page: &mut Page, nsattr: Nsattr) {
    page.hex("NSATTR", nsattr.into_bits(), 2, "Namespace Attributes")
        .flag("CWP", nsattr.write_protected(), "write protected");
}

/// Identify Namespace.
pub(super) fn namespace(id: &IdentifyNamespace) -> Page {
    let mut page = Page::new(NAMESPACE.0, NAMESPACE.1, NAMESPACE.2);
    sizes(&mut page, id);
    atomicity(&mut page, id);
    page.num("MSSRL", id.mssrl, "Maximum Single Source Range Length of Copy in blocks");
    page.num("MCL", id.mcl, "Maximum Copy Length in blocks");
    page.num("MSRC", id.msrc, "Maximum Source Range Count of Copy").says(count(u64::from(id.msrc) + 1, "range"));
    page.unknown("BYTES91:81", &id.rsvd81, "newer fields");
    page.num("ANAGRPID", id.anagrpid, "ANA Group Identifier");
    attributes(&mut page, id.nsattr);
    page.num("NVMSETID", id.nvmsetid, "NVM Set Identifier");
    page.num("ENDGID", id.endgid, "Endurance Group Identifier");
    page.bytes("NGUID", &id.nguid, "Namespace Globally Unique Identifier");
    page.bytes("EUI64", &id.eui64, "IEEE Extended Unique Identifier");
    page.unknown("VS", &id.vs, "vendor specific (bytes 4095:384)");
    page.add(formats(id));
    page
}

fn sizes(page: &mut Page, id: &IdentifyNamespace) {
    let block = id.block_bytes();
    page.num("NSZE", id.nsze, "Namespace Size").says(blocks(id.nsze, block));
    page.num("NCAP", id.ncap, "Namespace Capacity").says(blocks(id.ncap, block));
    page.num("NUSE", id.nuse, "Namespace Utilization").says(blocks(id.nuse, block));
    page.hex("NSFEAT", id.nsfeat.into_bits(), 2, "Namespace Features")
        .flag("THINP", id.nsfeat.thinp(), "thin provisioning")
        .flag("NSABPNS", id.nsfeat.nsabp(), "atomic write units of its own")
        .flag("DAE", id.nsfeat.dae(), "reading a deallocated block can be an error")
        .flag("UIDREUSE", id.nsfeat.uidreuse(), "NGUID and EUI64 are never reused")
        .flag("OPTPERF", id.nsfeat.optperf(), "NPWG, NPWA, NPDG, NPDA and NOWS are valid");
    page.num("NLBAF", id.nlbaf, "Number of LBA Formats").says(count(u64::from(id.nlbaf) + 1, "format"));
    page.hex("FLBAS", id.flbas.into_bits(), 2, "Formatted LBA Size").says(format!("format {}", id.flbas.format_index()));
    page.hex("MC", id.mc, 2, "Metadata Capabilities");
    page.hex("DPC", id.dpc, 2, "End-to-end Data Protection Capabilities");
    page.hex("DPS", id.dps, 2, "End-to-end Data Protection Type Settings");
    sharing(page, id.nmic);
    page.hex("RESCAP", id.rescap, 2, "Reservation Capabilities");
    page.hex("FPI", id.fpi, 2, "Format Progress Indicator");
    let reads = match id.dlfeat.read_value() {
        1 => "deallocated blocks read as zeroes",
        2 => "deallocated blocks read as ones",
        _ => "what deallocated blocks read as is not told",
    };
    page.hex("DLFEAT", id.dlfeat.into_bits(), 2, "Deallocate Logical Block Features")
        .part("DRB", id.dlfeat.read_value(), reads)
        .flag("WZDS", id.dlfeat.write_zeroes_deallocates(), "Write Zeroes may deallocate")
        .flag("GDS", id.dlfeat.guard_crc(), "the guard of a deallocated block is a CRC");
    page.num("NOIOB", id.noiob, "Namespace Optimal I/O Boundary in blocks");
    let bytes = id.nvmcap.get();
    page.num128("NVMCAP", bytes, "NVM Capacity").says(u64::try_from(bytes).map_or(String::new(), |b| Size(b).to_string()));
}

fn atomicity(page: &mut Page, id: &IdentifyNamespace) {
    for (label, value, what) in [
        ("NAWUN", id.nawun, "Namespace Atomic Write Unit Normal in blocks, 0's based"),
        ("NAWUPF", id.nawupf, "Namespace Atomic Write Unit Power Fail in blocks, 0's based"),
        ("NACWU", id.nacwu, "Namespace Atomic Compare and Write Unit in blocks, 0's based"),
        ("NABSN", id.nabsn, "Namespace Atomic Boundary Size Normal in blocks, 0's based"),
        ("NABO", id.nabo, "Namespace Atomic Boundary Offset in blocks"),
        ("NABSPF", id.nabspf, "Namespace Atomic Boundary Size Power Fail in blocks, 0's based"),
        ("NPWG", id.npwg, "Namespace Preferred Write Granularity in blocks, 0's based"),
        ("NPWA", id.npwa, "Namespace Preferred Write Alignment in blocks, 0's based"),
        ("NPDG", id.npdg, "Namespace Preferred Deallocate Granularity in blocks, 0's based"),
        ("NPDA", id.npda, "Namespace Preferred Deallocate Alignment in blocks, 0's based"),
        ("NOWS", id.nows, "Namespace Optimal Write Size in blocks, 0's based"),
    ] {
        page.num(label, value, what);
    }
}

fn formats(id: &IdentifyNamespace) -> Page {
    let mut list = Page::list("lba_formats", "LBA Formats", "NVMCS §4.1.5");
    for (n, format) in id.lbaf.iter().enumerate().take(usize::from(id.nlbaf) + 1) {
        let mut page = Page::new("", format!("LBA Format {n}"), "");
        let used = if n == usize::from(id.flbas.format_index()) { ", in use" } else { "" };
        let size = format.block_bytes().map_or_else(|| "unused".into(), |bytes| format!("blocks of {bytes} bytes{used}"));
        page.num("LBADS", format.lbads(), "LBA Data Size").says(size);
        page.num("MS", format.ms(), "Metadata Size in bytes");
        page.num("RP", format.rp(), "Relative Performance, 0 best");
        list.add(page);
    }
    list
}

/// What does not depend on the command set.
pub(super) fn independent(id: &IdentifyNamespaceIndependent) -> Page {
    let mut page = Page::new(INDEPENDENT.0, INDEPENDENT.1, INDEPENDENT.2);
    page.hex("NSFEAT", id.nsfeat, 2, "Common Namespace Features");
    sharing(&mut page, id.nmic);
    page.hex("RESCAP", id.rescap, 2, "Reservation Capabilities");
    page.hex("FPI", id.fpi, 2, "Format Progress Indicator");
    page.num("ANAGRPID", id.anagrpid, "ANA Group Identifier");
    attributes(&mut page, id.nsattr);
    page.num("NVMSETID", id.nvmsetid, "NVM Set Identifier");
    page.num("ENDGID", id.endgid, "Endurance Group Identifier");
    page.hex("NSTAT", id.nstat.into_bits(), 2, "Namespace Status").flag("NRDY", id.nstat.nrdy(), "ready");
    page.unknown("BYTES4095:15", &id.rsvd15, "newer fields");
    page
}

/// The identification descriptors, up to the first that is malformed.
pub(super) fn identifiers(bytes: &[u8]) -> Page {
    let mut page = Page::new(DESCRIPTORS.0, DESCRIPTORS.1, DESCRIPTORS.2);
    for descriptor in descriptors(bytes) {
        let descriptor = match descriptor {
            Ok(descriptor) => descriptor,
            Err(error) => {
                page.text("MALFORMED", Some(&error.to_string()), "the list ends here");
                break;
            }
        };
        let label = descriptor.kind.name().map_or_else(|| format!("NIDT{:02X}h", descriptor.kind.0), Into::into);
        let says = match (descriptor.kind, descriptor.id) {
            (NamespaceIdType::UUID, id) => <&[u8; 16]>::try_from(id).map_or_else(|_| hex(id), dashed),
            (NamespaceIdType::CSI, &[csi]) => format!("{} command set", CommandSetId(csi)),
            (_, id) => format!("{} bytes", id.len()),
        };
        page.bytes(&label, descriptor.id, "Namespace Identifier").says(says);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_nvme::identify::{Flbas, LbaFormat, NamespaceDescriptorWriter};

    #[test]
    fn the_format_in_use_gives_the_size() {
        let mut id = IdentifyNamespace { nsze: 1 << 18, nlbaf: 1, flbas: Flbas::from_bits(1), ..Default::default() };
        id.lbaf[0] = LbaFormat::new().with_lbads(9);
        id.lbaf[1] = LbaFormat::new().with_lbads(12);
        let json = namespace(&id).to_json();
        assert_eq!((&json["nsze"], &json["decoded"]["nsze"]), (&(1 << 18).into(), &"1 GiB".into()));
        assert_eq!(json["lba_formats"][1]["lbads"], 12);
        assert_eq!(json["lba_formats"][1]["decoded"]["lbads"], "blocks of 4096 bytes, in use");
        (id.nsze, id.nlbaf) = (u64::MAX, 255);
        assert_eq!(namespace(&id).to_json()["lba_formats"].as_array().map(Vec::len), Some(64));
    }

    #[test]
    fn descriptors_are_listed_until_one_is_malformed() {
        let mut bytes = [0; 64];
        let mut writer = NamespaceDescriptorWriter::new(&mut bytes);
        assert!(writer.nguid(&[7; 16]).and(writer.csi(CommandSetId::NVM)).is_ok());
        bytes[25..27].copy_from_slice(&[1, 0]);
        let json = identifiers(&bytes).to_json();
        assert_eq!((&json["nguid"], &json["csi"]), (&"07".repeat(16).into(), &"00".into()));
        assert_eq!(json["decoded"]["csi"], "NVM command set");
        assert!(json["malformed"].is_string());
    }
}
