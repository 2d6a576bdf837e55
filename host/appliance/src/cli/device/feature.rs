//! Features (Base 2.3 §5.2.26.1): every identifier is asked for; what answers is shown.

use super::controller::celsius;
use super::page::{Field, Page, count};
use super::session::{Answer, Session};
use dray_nvme::command::{FeatureSelect, NSID_ALL, SubmissionEntry};
use dray_nvme::feature::{
    Arbitration, AsyncEventConfig, CommandSetProfile, ErrorRecovery, FeatureCapabilities, FeatureId, HostBehavior,
    HostIdentifierCdw11, InterruptCoalescing, InterruptVectorConfig, NamespaceWriteProtect, NumberOfQueues,
    PowerManagement, TemperatureThreshold, Timestamp, VolatileWriteCache, WriteAtomicity,
};
use zerocopy::FromBytes;

const SECTION: &str = "Base 2.3 §5.2.26.1";
/// Bytes of data that any feature returns at most.
const DATA_BYTES: usize = 4096;
/// Interrupt vectors that are asked for at most.
const VECTORS: u16 = 64;

/// What there is to ask for.
#[derive(Clone, Debug)]
pub(super) struct Scope<'a> {
    /// Active namespaces.
    pub(super) nsids: &'a [u32],
    /// Controllers whose guest limit a management controller tells.
    pub(super) cntlids: &'a [u16],
    /// The controller tells defaults and capabilities of features (ONCS.SSFS).
    pub(super) selects: bool,
}

/// Reads all features that answer.
pub(super) fn pages(session: &mut Session<'_>, scope: &Scope<'_>) -> miette::Result<Page> {
    let mut all = Page::new("features", "Features", "");
    for fid in (1..=u8::MAX).map(FeatureId) {
        let key = fid.name().map_or_else(|| format!("fid_{:02x}", fid.0), key_of);
        let mut page = Page::new(&key, format!("Feature {:02X}h, {fid}", fid.0), SECTION);
        let mut answered = false;
        for (nsid, cdw11, label) in instances(fid, scope) {
            let what = format!("Get Features {:02X}h", fid.0);
            let entry = SubmissionEntry { nsid, ..SubmissionEntry::get_features(fid, FeatureSelect::CURRENT, cdw11) };
            match session.ask(&what, &entry, DATA_BYTES)? {
                Ok(answer) => {
                    answered = true;
                    show(&mut page, fid, &label, &answer);
                }
                // Vectors are numbered from 0 without gaps.
                Err(_) if fid == FeatureId::INTERRUPT_VECTOR_CONFIG => break,
                Err(_) => {}
            }
        }
        if answered {
            if scope.selects {
                capabilities(session, &mut page, fid)?;
            }
            all.add(page);
        }
    }
    Ok(all)
}

/// "Number of Queues" is `number_of_queues` in JSON.
fn key_of(name: &'static str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("_")
}

/// NSID, CDW11 and label of each value that a feature has.
fn instances(fid: FeatureId, scope: &Scope<'_>) -> Vec<(u32, u32, String)> {
    let one = |cdw11: u32| vec![(0, cdw11, "VALUE".to_owned())];
    match fid {
        FeatureId::INTERRUPT_VECTOR_CONFIG => {
            (0..VECTORS).map(|iv| (0, InterruptVectorConfig::new().with_iv(iv).into_bits(), format!("IV{iv}"))).collect()
        }
        FeatureId::TEMPERATURE_THRESHOLD => [(0, "OVER"), (1, "UNDER")]
            .map(|(thsel, label)| (0, TemperatureThreshold::new().with_thsel(thsel).into_bits(), label.to_owned()))
            .to_vec(),
        FeatureId::HOST_IDENTIFIER => one(HostIdentifierCdw11::new().with_exhid(true).into_bits()),
        FeatureId::ERROR_RECOVERY | FeatureId::NAMESPACE_WRITE_PROTECT => {
            let mut all: Vec<_> = scope.nsids.iter().map(|nsid| (*nsid, 0, format!("NSID{nsid}"))).collect();
            if all.is_empty() && fid == FeatureId::ERROR_RECOVERY {
                all.push((NSID_ALL, 0, "VALUE".to_owned()));
            }
            all
        }
        FeatureId::VENDOR_GUEST_LIMIT => {
            scope.cntlids.iter().map(|cntlid| (0, u32::from(*cntlid), format!("CNTLID{cntlid}"))).collect()
        }
        _ => one(0),
    }
}

/// What may be done with the feature (SEL 3).
fn capabilities(session: &mut Session<'_>, page: &mut Page, fid: FeatureId) -> miette::Result<()> {
    let entry = SubmissionEntry::get_features(fid, FeatureSelect::CAPABILITIES, 0);
    if let Ok(answer) = session.ask("Get Features, capabilities", &entry, DATA_BYTES)? {
        let can = FeatureCapabilities::from_bits(answer.result);
        page.hex("CAPABILITIES", answer.result, 8, "what may be done with the feature")
            .flag("SAVEABLE", can.saveable(), "can be saved")
            .flag("NAMESPACE_SPECIFIC", can.namespace_specific(), "is of a namespace")
            .flag("CHANGEABLE", can.changeable(), "can be changed");
    }
    Ok(())
}

/// Adds one value to the feature's page.
fn show(page: &mut Page, fid: FeatureId, label: &str, answer: &Answer) {
    match fid {
        FeatureId::TIMESTAMP => return timestamp(page, &answer.data),
        FeatureId::HOST_BEHAVIOR => return host_behavior(page, &answer.data),
        FeatureId::HOST_IDENTIFIER => {
            let id = answer.data.get(..16).unwrap_or(&answer.data);
            page.bytes("HOSTID", id, "Host Identifier").says(if id.iter().all(|b| *b == 0) { "not set" } else { "set" });
            return;
        }
        _ => {}
    }
    let field = page.hex(label, answer.result, 8, "");
    match fid {
        FeatureId::ARBITRATION
        | FeatureId::NUMBER_OF_QUEUES
        | FeatureId::INTERRUPT_COALESCING
        | FeatureId::INTERRUPT_VECTOR_CONFIG
        | FeatureId::ASYNC_EVENT_CONFIG
        | FeatureId::VENDOR_GUEST_LIMIT => decode_queues(field, fid, answer.result),
        _ => decode_media(field, fid, answer.result),
    }
}

/// What is about queues, interrupts and events.
fn decode_queues(field: &mut Field, fid: FeatureId, dw0: u32) {
    match fid {
        FeatureId::ARBITRATION => {
            let value = Arbitration::from_bits(dw0);
            let burst = if value.ab() == 7 { "no limit".into() } else { count(1 << value.ab(), "command") };
            field
                .part("AB", value.ab(), format!("Arbitration Burst: {burst}"))
                .part("LPW", value.lpw(), "Low Priority Weight, 0's based")
                .part("MPW", value.mpw(), "Medium Priority Weight, 0's based")
                .part("HPW", value.hpw(), "High Priority Weight, 0's based");
        }
        FeatureId::NUMBER_OF_QUEUES => {
            let value = NumberOfQueues::from_bits(dw0);
            field
                .part("NSQA", value.nsq(), count(u64::from(value.nsq()) + 1, "I/O submission queue"))
                .part("NCQA", value.ncq(), count(u64::from(value.ncq()) + 1, "I/O completion queue"));
        }
        FeatureId::INTERRUPT_COALESCING => {
            let value = InterruptCoalescing::from_bits(dw0);
            field
                .part("THR", value.thr(), format!("interrupt after {}", count(u64::from(value.thr()) + 1, "entry")))
                .part("TIME", value.time(), format!("or after {} µs", u32::from(value.time()) * 100));
        }
        FeatureId::INTERRUPT_VECTOR_CONFIG => {
            // A line a vector is enough.
            field.says(if InterruptVectorConfig::from_bits(dw0).cd() { "not coalesced (CD)" } else { "coalesced" });
        }
        FeatureId::ASYNC_EVENT_CONFIG => {
            let value = AsyncEventConfig::from_bits(dw0);
            field
                .part("SHCW", value.shcw(), "SMART / health critical warnings that report")
                .flag("NSAN", value.nsan(), "attached namespace attribute notices")
                .flag("FAN", value.fan(), "firmware activation notices")
                .flag("TLN", value.tln(), "telemetry log notices")
                .flag("ANACN", value.anacn(), "asymmetric namespace access change notices");
        }
        FeatureId::VENDOR_GUEST_LIMIT => {
            field.says(if dw0 == 0 { "no limit".into() } else { format!("{} per second", count(dw0.into(), "command")) });
        }
        _ => {}
    }
}

/// What is about media, power and command sets; other values stay as they are.
fn decode_media(field: &mut Field, fid: FeatureId, dw0: u32) {
    match fid {
        FeatureId::POWER_MANAGEMENT => {
            let value = PowerManagement::from_bits(dw0);
            field.part("PS", value.ps(), "Power State").part("WH", value.wh(), "Workload Hint");
        }
        FeatureId::TEMPERATURE_THRESHOLD => {
            let kelvins = TemperatureThreshold::from_bits(dw0).tmpth();
            field.part("TMPTH", kelvins, celsius(kelvins));
        }
        FeatureId::ERROR_RECOVERY => {
            let value = ErrorRecovery::from_bits(dw0);
            field
                .part("TLER", value.tler(), "Time Limited Error Recovery in units of 100 ms, 0 = no limit")
                .flag("DULBE", value.dulbe(), "reading a deallocated block is an error");
        }
        FeatureId::VOLATILE_WRITE_CACHE => {
            field.flag("WCE", VolatileWriteCache::from_bits(dw0).wce(), "the volatile write cache is enabled");
        }
        FeatureId::WRITE_ATOMICITY => {
            field.flag("DN", WriteAtomicity::from_bits(dw0).dn(), "only AWUPF holds");
        }
        FeatureId::COMMAND_SET_PROFILE => {
            field.part("IOCSCI", CommandSetProfile::from_bits(dw0).iocsci(), "I/O Command Set Combination Index");
        }
        FeatureId::NAMESPACE_WRITE_PROTECT => {
            let wps = NamespaceWriteProtect::from_bits(dw0).wps();
            let meaning = ["not protected", "write protected", "until power cycle", "for ever"];
            field.part("WPS", wps, *meaning.get(usize::from(wps)).unwrap_or(&"reserved"));
        }
        _ => {}
    }
}

fn timestamp(page: &mut Page, data: &[u8]) {
    let Ok((value, _)) = Timestamp::read_from_prefix(data) else { return };
    page.num("TIMESTAMP", value.millis(), "milliseconds since 1970 UTC, or since the reset if never set");
    page.hex("ATTRIBUTES", value.attributes.into_bits(), 2, "where it comes from")
        .part("TO", value.attributes.origin(), "0 cleared at reset, 1 set by the host")
        .flag("SYNCH", value.attributes.synch(), "the controller may have stopped counting");
}

fn host_behavior(page: &mut Page, data: &[u8]) {
    let Ok((value, _)) = HostBehavior::read_from_prefix(data) else { return };
    page.num("ACRE", value.acre, "Advanced Command Retry Enable");
    page.num("ETDAS", value.etdas, "Extended Telemetry Data Area 4 Supported");
    page.num("LBAFEE", value.lbafee, "LBA Format Extension Enable");
    page.unknown("BYTES511:3", &value.rsvd3, "newer fields");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(fid: FeatureId, result: u32, data: &[u8]) -> serde_json::Value {
        let mut page = Page::new("feature", "", "");
        show(&mut page, fid, "VALUE", &Answer { result, data: data.to_vec() });
        page.to_json()
    }

    #[test]
    fn every_feature_shows_any_value() {
        for fid in (0..=u8::MAX).map(FeatureId) {
            for result in [0, 1, u32::MAX] {
                assert!(one(fid, result, &[0xFF; DATA_BYTES]).is_object());
                assert!(one(fid, result, &[]).is_object());
            }
        }
    }

    #[test]
    fn values_are_raw_and_decoded() {
        let queues = one(FeatureId::NUMBER_OF_QUEUES, 0x0007_0003, &[]);
        assert_eq!((&queues["value"], &queues["decoded"]["value"]["ncqa"]), (&0x0007_0003.into(), &7.into()));
        let time = one(FeatureId::TIMESTAMP, 0, &Timestamp::from_millis(12).milliseconds.repeat(2));
        assert_eq!(time["timestamp"], 12);
        assert_eq!(key_of("Guest limit (vendor specific)"), "guest_limit_vendor_specific");
    }

    #[test]
    fn vectors_namespaces_and_guests_have_a_value_each() {
        let scope = Scope { nsids: &[1, 7], cntlids: &[2], selects: false };
        let labels = |fid| instances(fid, &scope).into_iter().map(|(_, _, label)| label).collect::<Vec<_>>();
        assert_eq!(labels(FeatureId::NAMESPACE_WRITE_PROTECT), ["NSID1", "NSID7"]);
        assert_eq!(labels(FeatureId::VENDOR_GUEST_LIMIT), ["CNTLID2"]);
        assert_eq!(labels(FeatureId::TEMPERATURE_THRESHOLD), ["OVER", "UNDER"]);
        assert_eq!(labels(FeatureId::ARBITRATION), ["VALUE"]);
    }
}
