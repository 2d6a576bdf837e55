//! Identify Controller (CNS 01h), its NVM command set part (CNS 06h) and the controller state formats (CNS 20h).

use super::page::{Page, count, hex};
use crate::config::units::Size;
use dray_nvme::cdq::LBAMQF_TYPE_0;
use dray_nvme::identify::{ControllerStateFormats, IdentifyController, IdentifyControllerNvm};

/// Key, title and section of Identify Controller.
pub(super) const CONTROLLER: (&str, &str, &str) =
    ("identify_controller", "Identify Controller (CNS 01h)", "Base 2.3 §5.2.13.2.1");
/// Key, title and section of its part for the NVM command set.
pub(super) const CONTROLLER_NVM: (&str, &str, &str) =
    ("identify_controller_nvm", "Identify Controller, NVM command set (CNS 06h)", "NVMCS §4.1.5");
/// Key, title and section of the controller state formats.
pub(super) const STATE_FORMATS: (&str, &str, &str) =
    ("controller_state_formats", "Supported Controller State Formats (CNS 20h)", "Base 2.3 §5.2.13.2.21");

/// A limit of which 0 says that there is none.
fn limit(value: u64, one: &str) -> String {
    if value == 0 { "no limit".into() } else { count(value, one) }
}

/// 2^n smallest pages; 0 says that there is no limit.
fn pages(n: u8, page_bytes: u64) -> String {
    let bytes = page_bytes.checked_mul(1u64.checked_shl(n.into()).unwrap_or(0)).filter(|bytes| *bytes > 0);
    match (n, bytes) {
        (0, _) => "no limit".into(),
        (_, Some(bytes)) => Size(bytes).to_string(),
        (_, None) => "more than can be counted".into(),
    }
}

/// A temperature in kelvins; 0 says that there is none.
pub(super) fn celsius(kelvins: u16) -> String {
    if kelvins == 0 { "none".into() } else { format!("{} °C", i32::from(kelvins) - 273) }
}

fn entry_size(value: u8) -> String {
    format!("{} bytes required, {} at most", 1u32 << (value & 0xf), 1u32 << (value >> 4))
}

/// Identify Controller; `page_bytes` is the smallest memory page (CAP.MPSMIN).
pub(super) fn controller(id: &IdentifyController, page_bytes: u64) -> Page {
    let mut page = Page::new(CONTROLLER.0, CONTROLLER.1, CONTROLLER.2);
    identity(&mut page, id, page_bytes);
    admin(&mut page, id);
    environment(&mut page, id);
    migration(&mut page, id);
    commands(&mut page, id);
    power(&mut page, id);
    page
}

fn identity(page: &mut Page, id: &IdentifyController, page_bytes: u64) {
    page.hex("VID", id.vid, 4, "PCI Vendor ID");
    page.hex("SSVID", id.ssvid, 4, "PCI Subsystem Vendor ID");
    page.text("SN", id.serial(), "Serial Number");
    page.text("MN", id.model(), "Model Number");
    page.text("FR", id.firmware(), "Firmware Revision");
    page.text("SUBNQN", id.subsystem_nqn(), "NVM Subsystem NVMe Qualified Name");
    page.num("RAB", id.rab, "Recommended Arbitration Burst").says(count(1 << (id.rab & 0x3f), "command"));
    let [a, b, c] = id.ieee;
    page.bytes("IEEE", &[c, b, a], "IEEE OUI Identifier");
    page.hex("CMIC", id.cmic.into_bits(), 2, "Controller Multi-Path I/O and Namespace Sharing Capabilities")
        .flag("MPORTS", id.cmic.multi_port(), "the subsystem may have several ports")
        .flag("MCTRS", id.cmic.multi_controller(), "the subsystem may have several controllers")
        .flag("FT", id.cmic.sriov(), "this is an SR-IOV virtual function")
        .flag("ANARS", id.cmic.ana(), "asymmetric namespace access reporting");
    page.num("MDTS", id.mdts, "Maximum Data Transfer Size").says(pages(id.mdts, page_bytes));
    page.num("CNTLID", id.cntlid, "Controller ID");
    page.hex("VER", id.ver.into_bits(), 8, "Version").says(id.ver.to_string());
    page.num("RTD3R", id.rtd3r, "RTD3 Resume Latency in µs");
    page.num("RTD3E", id.rtd3e, "RTD3 Entry Latency in µs");
    page.hex("OAES", id.oaes.into_bits(), 8, "Optional Asynchronous Events Supported")
        .flag("NSAN", id.oaes.namespace_attribute(), "attached namespace attribute notices")
        .flag("FAN", id.oaes.firmware_activation(), "firmware activation notices")
        .flag("ANACN", id.oaes.ana_change(), "asymmetric namespace access change notices");
    page.hex("CTRATT", id.ctratt.into_bits(), 8, "Controller Attributes")
        .flag("HIDS", id.ctratt.hids(), "128-bit host identifiers")
        .flag("ELBAS", id.ctratt.elbas(), "extended LBA formats");
    page.unknown("BYTES110:100", &id.rsvd100, "newer fields");
    page.num("CNTRLTYPE", id.cntrltype.into_bits(), "Controller Type").says(id.cntrltype.to_string());
    page.bytes("FGUID", &id.fguid, "FRU Globally Unique Identifier");
    page.numbers("CRDT", id.crdt.map(u64::from), "Command Retry Delay Times 1 to 3 in units of 100 ms");
    page.unknown("BYTES255:134", &id.rsvd134, "newer fields");
}

fn admin(page: &mut Page, id: &IdentifyController) {
    page.hex("OACS", id.oacs.into_bits(), 4, "Optional Admin Command Support")
        .flag("SSRS", id.oacs.security(), "Security Send and Receive")
        .flag("FNVMS", id.oacs.format(), "Format NVM")
        .flag("FWDS", id.oacs.firmware(), "Firmware Commit and Image Download")
        .flag("NMS", id.oacs.namespace_management(), "Namespace Management and Attachment")
        .flag("DSTS", id.oacs.self_test(), "Device Self-test")
        .flag("DIRS", id.oacs.directives(), "Directives")
        .flag("NSRS", id.oacs.nvme_mi(), "NVMe-MI Send and Receive")
        .flag("VMS", id.oacs.virtualization(), "Virtualization Management")
        .flag("DBCS", id.oacs.dbcs(), "Doorbell Buffer Config")
        .flag("GLSS", id.oacs.get_lba_status(), "Get LBA Status")
        .flag("CFLS", id.oacs.lockdown(), "Command and Feature Lockdown")
        .flag("HMLMS", id.oacs.hmlms(), "host managed live migration: a migration management controller");
    page.num("ACL", id.acl, "Abort Command Limit").says(count(u64::from(id.acl) + 1, "command"));
    page.num("AERL", id.aerl, "Asynchronous Event Request Limit").says(count(u64::from(id.aerl) + 1, "request"));
    page.hex("FRMW", id.frmw, 2, "Firmware Updates").says(count((id.frmw >> 1 & 7).into(), "slot"));
    page.hex("LPA", id.lpa.into_bits(), 2, "Log Page Attributes")
        .flag("SMARTS", id.lpa.smart_per_namespace(), "SMART / health information per namespace")
        .flag("CSES", id.lpa.effects(), "Commands Supported and Effects log page")
        .flag("LPEDS", id.lpa.extended(), "extended data: offsets and large counts")
        .flag("TS", id.lpa.telemetry(), "telemetry");
    page.num("ELPE", id.elpe, "Error Log Page Entries").says(count(u64::from(id.elpe) + 1, "entry"));
    page.num("NPSS", id.npss, "Number of Power States").says(count(u64::from(id.npss) + 1, "state"));
    page.hex("AVSCC", id.avscc, 2, "Admin Vendor Specific Command Configuration");
}

fn environment(page: &mut Page, id: &IdentifyController) {
    page.hex("APSTA", id.apsta, 2, "Autonomous Power State Transition Attributes");
    page.num("WCTEMP", id.wctemp, "Warning Composite Temperature Threshold").says(celsius(id.wctemp));
    page.num("CCTEMP", id.cctemp, "Critical Composite Temperature Threshold").says(celsius(id.cctemp));
    page.num("MTFA", id.mtfa, "Maximum Time for Firmware Activation in units of 100 ms");
    page.num("HMPRE", id.hmpre, "Host Memory Buffer Preferred Size in 4 KiB");
    page.num("HMMIN", id.hmmin, "Host Memory Buffer Minimum Size in 4 KiB");
    page.num128("TNVMCAP", id.tnvmcap.get(), "Total NVM Capacity").says(capacity(id.tnvmcap.get()));
    page.num128("UNVMCAP", id.unvmcap.get(), "Unallocated NVM Capacity").says(capacity(id.unvmcap.get()));
    page.unknown("BYTES319:312", &id.rsvd312, "newer fields");
    page.num("KAS", id.kas, "Keep Alive Support in units of 100 ms").says(if id.kas == 0 { "none" } else { "supported" });
    page.unknown("BYTES511:322", &id.rsvd322, "newer fields");
}

fn capacity(bytes: u128) -> String {
    u64::try_from(bytes).map_or_else(|_| format!("{bytes} bytes"), |bytes| Size(bytes).to_string())
}

/// The limits of live migration: 0 is "not told" rather than "none".
fn migration(page: &mut Page, id: &IdentifyController) {
    let told = |value: u16| if value == 0 { "not told".to_owned() } else { value.to_string() };
    page.hex("TRATTR", id.trattr.into_bits(), 2, "Tracking Attributes")
        .flag("THMCS", id.trattr.thmcs(), "tracks changes of host memory")
        .flag("TUDCS", id.trattr.tudcs(), "tracks changes of user data, in a user data migration queue")
        .flag("MRTLL", id.trattr.mrtll(), "lengths of tracked memory ranges are powers of two");
    page.num("CMMRTD", id.cmmrtd, "Controller Maximum Memory Range Tracking Descriptors").says(told(id.cmmrtd));
    page.num("NMMRTD", id.nmmrtd, "NVM Subsystem Maximum Memory Range Tracking Descriptors").says(told(id.nmmrtd));
    page.num("MINMRTG", id.minmrtg, "Minimum Memory Range Tracking Granularity").says(granularity(id.minmrtg));
    page.num("MAXMRTG", id.maxmrtg, "Maximum Memory Range Tracking Granularity").says(granularity(id.maxmrtg));
    page.num("MCUDMQ", id.mcudmq, "Maximum Controller User Data Migration Queues").says(told(id.mcudmq));
    page.num("MNSUDMQ", id.mnsudmq, "Maximum NVM Subsystem User Data Migration Queues").says(told(id.mnsudmq));
    page.num("MCMR", id.mcmr, "Maximum CDQ Memory Ranges").says(match id.mcmr {
        0 => "not told".into(),
        1 => "contiguous queues only".into(),
        n => count(n.into(), "range"),
    });
    page.num("NMCMR", id.nmcmr, "NVM Subsystem Maximum CDQ Memory Ranges").says(told(id.nmcmr));
    page.num("MCDQPC", id.mcdqpc, "Maximum Controller Data Queue PRP Count").says(told(id.mcdqpc));
    page.unknown("BYTES767:588", &id.rsvd588, "newer fields");
}

fn granularity(n: u8) -> String {
    4096u64.checked_shl(n.into()).filter(|bytes| *bytes >= 4096).map_or_else(|| "too large".into(), |b| Size(b).to_string())
}

fn commands(page: &mut Page, id: &IdentifyController) {
    page.hex("SQES", id.sqes, 2, "Submission Queue Entry Size").says(entry_size(id.sqes));
    page.hex("CQES", id.cqes, 2, "Completion Queue Entry Size").says(entry_size(id.cqes));
    page.num("MAXCMD", id.maxcmd, "Maximum Outstanding Commands in a queue").says(limit(id.maxcmd.into(), "command"));
    page.num("NN", id.nn, "Number of Namespaces: the highest NSID");
    page.hex("ONCS", id.oncs.into_bits(), 4, "Optional NVM Command Support")
        .flag("NVMCMPS", id.oncs.compare(), "Compare")
        .flag("NVMWUSV", id.oncs.write_uncorrectable(), "Write Uncorrectable")
        .flag("NVMDSMSV", id.oncs.dsm(), "Dataset Management")
        .flag("NVMWZSV", id.oncs.write_zeroes(), "Write Zeroes")
        .flag("SSFS", id.oncs.save_select(), "Save and Select of features")
        .flag("RESERVS", id.oncs.reservations(), "reservations")
        .flag("TSS", id.oncs.timestamp(), "Timestamp feature")
        .flag("NVMVFYS", id.oncs.verify(), "Verify")
        .flag("NVMCPYS", id.oncs.copy(), "Copy");
    page.hex("FUSES", id.fuses, 4, "Fused Operation Support").flag("FCWS", id.fuses & 1 != 0, "Compare and Write");
    page.hex("FNA", id.fna, 2, "Format NVM Attributes");
    page.hex("VWC", id.vwc.into_bits(), 2, "Volatile Write Cache").flag("VWCP", id.vwc.present(), "present").part(
        "FB",
        id.vwc.flush_all(),
        match id.vwc.flush_all() {
            2 => "Flush of NSID FFFFFFFFh is refused",
            3 => "Flush of NSID FFFFFFFFh flushes all namespaces",
            _ => "Flush of NSID FFFFFFFFh: not told",
        },
    );
    page.num("AWUN", id.awun, "Atomic Write Unit Normal").says(count(u64::from(id.awun) + 1, "block"));
    page.num("AWUPF", id.awupf, "Atomic Write Unit Power Fail").says(count(u64::from(id.awupf) + 1, "block"));
    page.hex("ICSVSCC", id.icsvscc, 2, "I/O Command Set Vendor Specific Command Configuration");
    page.hex("NWPC", id.nwpc, 2, "Namespace Write Protection Capabilities");
    page.num("ACWU", id.acwu, "Atomic Compare and Write Unit").says(count(u64::from(id.acwu) + 1, "block"));
    let formats: Vec<_> = (0..16).filter(|n| id.ocfs >> n & 1 != 0).map(|n| format!("{n:X}h")).collect();
    page.hex("OCFS", id.ocfs, 4, "Optional Copy Formats Supported").says(formats.join(" "));
    page.hex("SGLS", id.sgls, 8, "SGL Support")
        .part("SGLSU", id.sgls & 3, "0 not supported, 1 any alignment, 2 dword aligned")
        .flag("SGLLDTL", id.sgls >> 18 & 1 != 0, "SGLs may be longer than the data");
    page.num("MNAN", id.mnan, "Maximum Number of Allowed Namespaces");
    page.unknown("BYTES569:544", &id.rsvd544, "newer fields");
    page.unknown("FABRICS", &id.rsvd1024, "NVMe over Fabrics and reserved (bytes 2047:1024)");
    page.unknown("VS", &id.vs, "vendor specific (bytes 4095:3072)");
}

fn power(page: &mut Page, id: &IdentifyController) {
    for (n, state) in id.psd.iter().enumerate().take(usize::from(id.npss) + 1) {
        // MXPS, bit 0 of byte 3 of the descriptor: units of 0.1 mW instead of 10 mW.
        let milliwatts = if state.rest[1] & 1 == 0 { f64::from(state.mp) * 10.0 } else { f64::from(state.mp) / 10.0 };
        let says = if state.mp == 0 { "not told".into() } else { format!("{} W", milliwatts / 1e3) };
        page.num(&format!("PSD{n}.MP"), state.mp, "Power State Descriptor: maximum power").says(says);
    }
}

/// Identify Controller of the NVM command set.
pub(super) fn controller_nvm(id: &IdentifyControllerNvm, page_bytes: u64) -> Page {
    let mut page = Page::new(CONTROLLER_NVM.0, CONTROLLER_NVM.1, CONTROLLER_NVM.2);
    page.num("VSL", id.vsl, "Verify Size Limit").says(pages(id.vsl, page_bytes));
    page.num("WZSL", id.wzsl, "Write Zeroes Size Limit").says(pages(id.wzsl, page_bytes));
    page.num("WUSL", id.wusl, "Write Uncorrectable Size Limit").says(pages(id.wusl, page_bytes));
    page.num("DMRL", id.dmrl, "Dataset Management Ranges Limit").says(limit(id.dmrl.into(), "range"));
    page.num("DMRSL", id.dmrsl, "Dataset Management Range Size Limit").says(limit(id.dmrsl.into(), "block"));
    page.num("DMSL", id.dmsl, "Dataset Management Size Limit").says(limit(id.dmsl, "block"));
    page.hex("AOCS", id.aocs.into_bits(), 4, "Admin Optional Command Support")
        .flag("RALBAS", id.aocs.ralbas(), "Get LBA Status tells allocated blocks");
    page.hex("VER", id.ver.into_bits(), 8, "version of the command set specification").says(id.ver.to_string());
    page.hex("LBAMQF", id.lbamqf, 2, "LBA Migration Queue Format").says(match id.lbamqf {
        LBAMQF_TYPE_0 => "user data migration queue entries of type 0",
        0xC0.. => "vendor specific entries",
        _ => "reserved",
    });
    page.unknown("BYTES4095:25", &id.rsvd25, "newer fields");
    page
}

/// The controller state formats.
pub(super) fn state_formats(bytes: &[u8]) -> Page {
    let (key, title, section) = STATE_FORMATS;
    let formats = match ControllerStateFormats::parse(bytes) {
        Ok(formats) => formats,
        Err(error) => return Page::refused(key, title, section, error.to_string()),
    };
    let mut page = Page::new(key, title, section);
    page.num("NV", formats.versions().len() as u64, "Number of Versions");
    page.num("NUUID", formats.uuids().len() as u64, "Number of UUIDs");
    for (at, version) in formats.versions().enumerate() {
        page.num(&format!("CSVI{}", at + 1), version, "NVMe controller state version of this index");
    }
    for (at, uuid) in formats.uuids().enumerate() {
        let label = format!("CSUUIDI{}", at + 1);
        page.bytes(&label, &uuid, "vendor specific controller state of this index").says(dashed(&uuid));
    }
    page
}

/// A UUID as people write it.
pub(super) fn dashed(uuid: &[u8; 16]) -> String {
    let digits = hex(uuid);
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_values_are_shown_not_shifted_away() {
        let mut id = IdentifyController::default();
        (id.mdts, id.rab, id.minmrtg, id.sqes, id.npss) = (255, 255, 255, 255, 255);
        id.sn = [0xFF; 20];
        id.tnvmcap = u128::MAX.into();
        let json = controller(&id, 1 << 27).to_json();
        assert_eq!((&json["mdts"], &json["sn"]), (&255.into(), &serde_json::Value::Null));
        assert_eq!(json["decoded"]["mdts"], "more than can be counted");
        assert_eq!(json["tnvmcap"], u128::MAX.to_string());
    }

    #[test]
    fn limits_of_live_migration_are_there() {
        let mut id = IdentifyController::default();
        id.oacs.set_hmlms(true);
        (id.mdts, id.mcudmq, id.mcmr) = (7, 64, 1);
        id.trattr.set_tudcs(true);
        let json = controller(&id, 4096).to_json();
        assert_eq!((&json["oacs"], &json["decoded"]["oacs"]["hmlms"]), (&0x800.into(), &true.into()));
        assert_eq!(json["decoded"]["mdts"], "512 KiB");
        assert_eq!((&json["mcudmq"], &json["decoded"]["trattr"]["tudcs"]), (&64.into(), &true.into()));
    }

    #[test]
    fn state_formats_are_read_or_refused() {
        let mut bytes = [0; 64];
        assert!(ControllerStateFormats::build(&[0], &[[0xAB; 16]], &mut bytes).is_ok());
        let json = state_formats(&bytes).to_json();
        assert_eq!((&json["csvi1"], &json["csuuidi1"]), (&0.into(), &"ab".repeat(16).into()));
        assert_eq!(json["decoded"]["csuuidi1"], "abababab-abab-abab-abab-abababababab");
        assert!(state_formats(&[9]).to_json()["refused"].is_string());
    }
}
