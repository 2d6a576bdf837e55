//! Log pages (Base 2.3 §5.2.12.1). They are read with RAE set, so that looking does not end an event.

use super::controller::celsius;
use super::page::Page;
use super::session::Session;
use dray_nvme::command::{AdminOpcode, NSID_ALL, NvmOpcode, SubmissionEntry};
use dray_nvme::log::{
    ChangedNamespaceList, CommandEffects, EffectsLog, ErrorLogEntry, FeatureEffects, FirmwareSlotLog, LogId, SmartLog,
};
use zerocopy::FromBytes;

const SECTION: &str = "Base 2.3 §5.2.12.1";
/// Bytes of an Error Information entry.
const ERROR_BYTES: usize = size_of::<ErrorLogEntry>();
/// Bytes of the pages that have a dword for each of 256 identifiers.
const LIST_BYTES: usize = 1024;

/// Reads a page's bytes into its (empty) structure.
type Read = fn(Page, &[u8]) -> Page;

/// Reads all log pages that this program knows. `error_entries` is ELPE + 1.
pub(super) fn pages(session: &mut Session<'_>, error_entries: usize) -> miette::Result<Page> {
    let mut all = Page::new("log_pages", "Log pages", "");
    let logs: [(LogId, &str, usize, Read); 7] = [
        (LogId::ERROR, "error", error_entries * ERROR_BYTES, errors),
        (LogId::SMART, "smart", 512, smart),
        (LogId::FIRMWARE_SLOT, "firmware_slot", 512, firmware),
        (LogId::CHANGED_NAMESPACES, "changed_namespaces", 4096, changed),
        (LogId::EFFECTS, "effects", 4096, effects),
        // A controller that has no such page counts the question as an error: last, as the next one.
        (LogId::SUPPORTED_LOG_PAGES, "supported_log_pages", LIST_BYTES, supported),
        (LogId::FEATURE_EFFECTS, "feature_effects", LIST_BYTES, feature_effects),
    ];
    for (lid, key, bytes, read) in logs {
        let title = format!("Log page {:02X}h, {lid}", lid.0);
        // Of the controller as a whole, not of one namespace.
        let entry = SubmissionEntry::get_log_page(lid, NSID_ALL, 0, (bytes / 4) as u32, true);
        all.add(match session.ask(&title, &entry, bytes)? {
            Ok(answer) if lid == LogId::ERROR => errors(Page::list(key, title, SECTION), &answer.data),
            Ok(answer) => read(Page::new(key, title, SECTION), &answer.data),
            Err(status) => Page::refused(key, title, SECTION, status.to_string()),
        });
    }
    Ok(all)
}

/// The dwords of a page, each with its place.
fn dwords(bytes: &[u8]) -> impl Iterator<Item = (u8, u32)> + '_ {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().zip(0..=u8::MAX).map(|(word, at)| (at, u32::from_le_bytes(*word)))
}

fn supported(mut page: Page, bytes: &[u8]) -> Page {
    for (lid, dword) in dwords(bytes).filter(|(_, dword)| dword & 1 != 0) {
        page.hex(&format!("LID{lid:02X}"), dword, 8, "").says(LogId(lid).to_string());
    }
    page
}

fn errors(mut list: Page, bytes: &[u8]) -> Page {
    let entries = bytes.chunks_exact(ERROR_BYTES).filter_map(|bytes| ErrorLogEntry::read_from_bytes(bytes).ok());
    for entry in entries.filter(|entry| entry.error_count != 0) {
        let mut page = Page::new("", format!("Error {}", entry.error_count), SECTION);
        page.num("ERROR_COUNT", entry.error_count, "counts errors over the controller's life");
        page.num("SQID", entry.sqid, "submission queue of the command");
        page.hex("CID", entry.cid, 4, "command identifier");
        let status = entry.status.status();
        page.hex("STATUS", status.into_bits(), 4, "status field").says(status.to_string());
        page.hex("PEL", entry.parameter_error_location, 4, "Parameter Error Location");
        page.num("LBA", entry.lba, "first logical block with the error");
        page.num("NSID", entry.nsid, "namespace");
        page.hex("OPC", entry.opcode, 2, "opcode of the command");
        page.hex("CSINFO", entry.command_specific, 16, "command specific information");
        list.add(page);
    }
    list
}

fn smart(mut page: Page, bytes: &[u8]) -> Page {
    let Ok(log) = SmartLog::read_from_bytes(bytes) else { return page };
    let warning = log.critical_warning;
    page.hex("CW", warning, 2, "Critical Warning")
        .flag("SPARE", warning & 1 != 0, "the available spare is below its threshold")
        .flag("TEMPERATURE", warning & 2 != 0, "a temperature is over or under its threshold")
        .flag("RELIABILITY", warning & 4 != 0, "the subsystem's reliability is degraded")
        .flag("READ_ONLY", warning & 8 != 0, "the media is read only")
        .flag("BACKUP", warning & 16 != 0, "the volatile memory backup device has failed");
    page.num("CTEMP", log.temperature.get(), "Composite Temperature").says(celsius(log.temperature.get()));
    page.num("AVSP", log.available_spare, "Available Spare in percent");
    page.num("AVSPT", log.spare_threshold, "Available Spare Threshold in percent");
    page.num("PUSED", log.percentage_used, "Percentage Used");
    page.hex("EGCWS", log.endurance_warning, 2, "Endurance Group Critical Warning Summary");
    for (label, value, what) in [
        ("DUR", log.data_units_read, "Data Units Read, thousands of 512 bytes"),
        ("DUW", log.data_units_written, "Data Units Written, thousands of 512 bytes"),
        ("HRC", log.host_reads, "Host Read Commands"),
        ("HWC", log.host_writes, "Host Write Commands"),
        ("CBT", log.busy_minutes, "Controller Busy Time in minutes"),
        ("PWRC", log.power_cycles, "Power Cycles"),
        ("POH", log.power_on_hours, "Power On Hours"),
        ("UPL", log.unsafe_shutdowns, "Unexpected Power Losses"),
        ("MDIE", log.media_errors, "Media and Data Integrity Errors"),
        ("NEILE", log.error_log_entries, "Number of Error Information Log Entries"),
    ] {
        page.num128(label, value.get(), what);
    }
    page.num("WCTT", log.warning_temperature_minutes, "Warning Composite Temperature Time in minutes");
    page.num("CCTT", log.critical_temperature_minutes, "Critical Composite Temperature Time in minutes");
    page.numbers("TSEN", log.temperature_sensors.map(u64::from), "Temperature Sensors 1 to 8 in kelvins, 0 = none");
    page.unknown("BYTES511:216", &log.rsvd216, "thermal management");
    page
}

fn firmware(mut page: Page, bytes: &[u8]) -> Page {
    let Ok(log) = FirmwareSlotLog::read_from_bytes(bytes) else { return page };
    page.hex("AFI", log.afi, 2, "Active Firmware Info")
        .part("CAFS", log.afi & 7, "slot of the running firmware")
        .part("NRAFS", log.afi >> 4 & 7, "slot at the next reset, 0 = the same");
    for (at, revision) in log.frs.iter().enumerate().filter(|(_, revision)| **revision != [0; 8]) {
        let text = std::str::from_utf8(revision).ok().filter(|text| text.is_ascii());
        let text = text.map(|text| text.trim_end_matches(['\0', ' ']));
        page.text(&format!("FRS{}", at + 1), text, "Firmware Revision of the slot");
    }
    page
}

fn changed(mut page: Page, bytes: &[u8]) -> Page {
    let Ok(log) = ChangedNamespaceList::read_from_bytes(bytes) else { return page };
    page.numbers("NSIDS", log.iter().map(u64::from), "namespaces that changed since the page was last read");
    if log.overflowed() {
        page.text("OVERFLOW", Some("more than 1024"), "every namespace must be looked at again");
    }
    page
}

fn command(page: &mut Page, label: &str, name: String, effects: CommandEffects) {
    let field = page.hex(label, effects.into_bits(), 8, "").says(name);
    for (bit, set, meaning) in [
        ("LBCC", effects.lbcc(), "changes the content of logical blocks"),
        ("NCC", effects.ncc(), "changes capabilities of a namespace"),
        ("NIC", effects.nic(), "changes the inventory of namespaces"),
        ("CCC", effects.ccc(), "changes capabilities of the controller"),
    ] {
        // A command has few of them: what it does not do is not worth a line each.
        if set {
            field.flag(bit, true, meaning);
        }
    }
    match effects.cse() {
        0 => {}
        1 => _ = field.part("CSE", 1u8, "no other command for the namespace at a time"),
        n => _ = field.part("CSE", n, "no other command for any namespace at a time"),
    }
}

fn effects(mut page: Page, bytes: &[u8]) -> Page {
    let Ok(log) = EffectsLog::read_from_bytes(bytes) else { return page };
    for (opcode, effects) in (0..=u8::MAX).zip(log.acs).filter(|(_, effects)| effects.csupp()) {
        command(&mut page, &format!("ACS{opcode:02X}"), format!("admin, {}", AdminOpcode(opcode)), effects);
    }
    for (opcode, effects) in (0..=u8::MAX).zip(log.iocs).filter(|(_, effects)| effects.csupp()) {
        command(&mut page, &format!("IOCS{opcode:02X}"), format!("I/O, {}", NvmOpcode(opcode)), effects);
    }
    page
}

fn feature_effects(mut page: Page, bytes: &[u8]) -> Page {
    for (fid, dword) in dwords(bytes) {
        let effects = FeatureEffects::from_bits(dword);
        if effects.fsupp() {
            let name = dray_nvme::feature::FeatureId(fid).to_string();
            let scope = if effects.fsp() & FeatureEffects::FSP_CDQSCP != 0 { ", of a controller data queue" } else { "" };
            page.hex(&format!("FID{fid:02X}"), dword, 8, "").says(format!("{name}{scope}"));
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn used_error_entries_are_listed() {
        let mut bytes = [0; 3 * ERROR_BYTES];
        let entry = ErrorLogEntry { error_count: 4, sqid: 3, nsid: 9, ..ErrorLogEntry::default() };
        bytes[..ERROR_BYTES].copy_from_slice(entry.as_bytes());
        let json = errors(Page::list("error", "", ""), &bytes).to_json();
        assert_eq!(json.as_array().map(Vec::len), Some(1));
        assert_eq!((&json[0]["error_count"], &json[0]["nsid"]), (&4.into(), &9.into()));
    }

    #[test]
    fn effects_name_their_commands() {
        let mut log = EffectsLog::default();
        log.acs[0x45] = CommandEffects::new().with_csupp(true);
        log.iocs[1] = CommandEffects::new().with_csupp(true).with_lbcc(true);
        let json = effects(Page::new("effects", "", ""), log.as_bytes()).to_json();
        assert_eq!((&json["acs45"], &json["iocs01"]), (&1.into(), &3.into()));
        assert_eq!(json["decoded"]["acs45"], "admin, Controller Data Queue");
        assert_eq!(json["decoded"]["iocs01"]["lbcc"], true);
    }

    #[test]
    fn short_pages_are_empty_not_fatal() {
        for read in [supported, errors, smart, firmware, changed, effects, feature_effects] {
            assert!(read(Page::new("page", "", ""), &[1]).to_json().is_object());
        }
    }
}
