//! The registers of BAR0 (Base 2.3 §3.1.4).

use super::page::Page;
use crate::config::units::Size;
use dray_device::function::Function;
use dray_nvme::registers::{Aqa, Cap, Cc, Crto, Csts, Vs, offset};

const SECTION: &str = "Base 2.3 §3.1.4";

/// What the registers read as now.
pub(super) fn page(function: &dyn Function) -> Page {
    let mut page = Page::new("registers", "Registers", SECTION);
    capabilities(&mut page, Cap::from_bits(function.read64(offset::CAP)));
    let vs = Vs::from_bits(function.read32(offset::VS));
    page.hex("VS", vs.into_bits(), 8, "Version").says(vs.to_string());
    page.hex("INTMS", function.read32(offset::INTMS), 8, "Interrupt Mask Set; not used with MSI-X");
    configuration(&mut page, Cc::from_bits(function.read32(offset::CC)));
    status(&mut page, Csts::from_bits(function.read32(offset::CSTS)));
    let aqa = Aqa::from_bits(function.read32(offset::AQA));
    page.hex("AQA", aqa.into_bits(), 8, "Admin Queue Attributes")
        .part("ASQS", aqa.asqs(), format!("submission queue of {} entries", aqa.asqs() + 1))
        .part("ACQS", aqa.acqs(), format!("completion queue of {} entries", aqa.acqs() + 1));
    page.hex("ASQ", function.read64(offset::ASQ), 16, "Admin Submission Queue Base Address");
    page.hex("ACQ", function.read64(offset::ACQ), 16, "Admin Completion Queue Base Address");
    let cmb = function.read32(offset::CMBSZ);
    page.hex("CMBLOC", function.read32(offset::CMBLOC), 8, "Controller Memory Buffer Location");
    page.hex("CMBSZ", cmb, 8, "Controller Memory Buffer Size").says(if cmb == 0 { "none" } else { "present" });
    page.hex("BPINFO", function.read32(offset::BPINFO), 8, "Boot Partition Information");
    let crto = Crto::from_bits(function.read32(offset::CRTO));
    page.hex("CRTO", crto.into_bits(), 8, "Controller Ready Timeouts")
        .part("CRWMT", crto.crwmt(), format!("ready with media within {} ms", u32::from(crto.crwmt()) * 500))
        .part("CRIMT", crto.crimt(), format!("ready independent of media within {} ms", u32::from(crto.crimt()) * 500));
    let pmr = function.read32(offset::PMRCAP);
    page.hex("PMRCAP", pmr, 8, "Persistent Memory Region Capabilities").says(if pmr == 0 { "none" } else { "present" });
    page
}

fn capabilities(page: &mut Page, cap: Cap) {
    page.hex("CAP", cap.into_bits(), 16, "Controller Capabilities")
        .part("MQES", cap.mqes(), format!("queues of at most {} entries", cap.max_queue_entries()))
        .flag("CQR", cap.cqr(), "queues must be physically contiguous")
        .part("AMS", cap.ams(), "arbitration beyond round robin: 1 weighted, 2 vendor specific")
        .part("TO", cap.to(), format!("CSTS.RDY follows CC.EN within {} ms", cap.ready_timeout_ms()))
        .part("DSTRD", cap.dstrd(), format!("a doorbell every {} bytes", 4u64 << cap.dstrd()))
        .flag("NSSRS", cap.nssrs(), "NVM subsystem reset")
        .part("CSS", cap.css(), "command sets: bit 0 NVM, bit 6 I/O command sets, bit 7 none")
        .flag("BPS", cap.bps(), "boot partitions")
        .part("CPS", cap.cps(), "power scope: 0 not told, 1 controller, 2 domain, 3 subsystem")
        .part("MPSMIN", cap.mpsmin(), format!("memory pages of at least {}", Size(cap.min_page_bytes())))
        .part("MPSMAX", cap.mpsmax(), format!("memory pages of at most {}", Size(cap.max_page_bytes())))
        .flag("PMRS", cap.pmrs(), "persistent memory region")
        .flag("CMBS", cap.cmbs(), "controller memory buffer")
        .flag("NSSS", cap.nsss(), "NVM subsystem shutdown")
        .flag("CRWMS", cap.crwms(), "ready with media")
        .flag("CRIMS", cap.crims(), "ready independent of media")
        .flag("NSSES", cap.nsses(), "NVM subsystem shutdown enhancements");
}

fn configuration(page: &mut Page, cc: Cc) {
    page.hex("CC", cc.into_bits(), 8, "Controller Configuration")
        .flag("EN", cc.en(), "enabled")
        .part("CSS", cc.css().into_bits(), cc.css().to_string())
        .part("MPS", cc.mps(), format!("memory pages of {}", Size(cc.page_bytes())))
        .part("AMS", cc.ams(), if cc.ams() == 0 { "round robin" } else { "other arbitration" })
        .part("SHN", cc.shn().into_bits(), cc.shn().to_string())
        .part("IOSQES", cc.iosqes(), format!("submission entries of {} bytes", 1u32 << cc.iosqes()))
        .part("IOCQES", cc.iocqes(), format!("completion entries of {} bytes", 1u32 << cc.iocqes()))
        .flag("CRIME", cc.crime(), "ready independent of media enabled");
}

fn status(page: &mut Page, csts: Csts) {
    page.hex("CSTS", csts.into_bits(), 8, "Controller Status")
        .flag("RDY", csts.rdy(), "ready")
        .flag("CFS", csts.cfs(), "controller fatal status")
        .part("SHST", csts.shst().into_bits(), csts.shst().to_string())
        .flag("NSSRO", csts.nssro(), "NVM subsystem reset occurred")
        .flag("PP", csts.pp(), "processing paused")
        .flag("ST", csts.st(), "shutdown of the subsystem");
}
