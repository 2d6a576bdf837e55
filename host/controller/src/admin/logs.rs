//! Get Log Page (Base 2.3 §5.2.12).

use super::{AdminResult, ERROR_ENTRIES};
use crate::controller::Controller;
use crate::subsystem::Shared;
use dray_nvme::command::{AdminOpcode, GetLogCdw10, GetLogCdw11, NvmOpcode, SubmissionEntry};
use dray_nvme::event::EventType;
use dray_nvme::log::{
    ChangedNamespaceList, CommandEffects, EffectsLog, FirmwareSlotLog, LogId, MAX_CHANGED_NAMESPACES, SmartLog,
};
use dray_nvme::status::Status;
use zerocopy::{FromZeros, IntoBytes};

/// Bytes of the longest log page.
const PAGE: usize = 4096;

impl Controller {
    pub(super) fn get_log_page(&mut self, entry: &SubmissionEntry, shared: &Shared) -> AdminResult {
        let cdw10 = GetLogCdw10::from_bits(entry.cdw10);
        let cdw11 = GetLogCdw11::from_bits(entry.cdw11);
        let dwords = (u64::from(cdw11.numdu()) << 16 | u64::from(cdw10.numdl())) + 1;
        let len = usize::try_from(dwords * 4).unwrap_or(usize::MAX);
        if len > self.engine.max_transfer || !entry.offset().is_multiple_of(4) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let mut page = [0u8; PAGE];
        let size = self.log_page(cdw10.lid(), shared, &mut page)?;
        let offset = usize::try_from(entry.offset()).unwrap_or(usize::MAX);
        let Some(rest) = page[..size].get(offset..).filter(|rest| !rest.is_empty()) else {
            return Err(Status::INVALID_FIELD.with_dnr());
        };
        // What lies behind the page's end reads zero.
        let mut bytes = [0u8; PAGE];
        bytes[..rest.len()].copy_from_slice(rest);
        self.put_log(entry, &bytes[..len.min(PAGE)], len)?;
        if !cdw10.rae() {
            self.log_was_read(cdw10.lid());
        }
        Ok(0)
    }

    fn put_log(&mut self, entry: &SubmissionEntry, bytes: &[u8], len: usize) -> Result<(), Status> {
        if len <= bytes.len() {
            return self.put_data(entry, bytes);
        }
        let mut long = vec![0u8; len];
        long[..bytes.len()].copy_from_slice(bytes);
        self.put_data(entry, &long)
    }

    fn log_was_read(&mut self, lid: LogId) {
        match lid {
            LogId::ERROR => self.admin.unmask(EventType::ERROR),
            LogId::SMART => self.admin.unmask(EventType::SMART),
            LogId::CHANGED_NAMESPACES => {
                self.admin.changed.clear();
                self.admin.unmask(EventType::NOTICE);
            }
            _ => {}
        }
    }

    /// Fills a log page in; returns its size.
    fn log_page(&self, lid: LogId, shared: &Shared, page: &mut [u8; PAGE]) -> Result<usize, Status> {
        let mut put = |bytes: &[u8]| {
            page[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        };
        Ok(match lid {
            LogId::ERROR => {
                for (to, error) in page.chunks_exact_mut(64).zip(&self.admin.errors) {
                    to.copy_from_slice(error.as_bytes());
                }
                ERROR_ENTRIES * 64
            }
            LogId::SMART => put(self.smart().as_bytes()),
            LogId::FIRMWARE_SLOT => {
                let mut log = FirmwareSlotLog::new_zeroed();
                log.afi = 1;
                dray_nvme::identify::write_ascii(&mut log.frs[0], &shared.config.firmware);
                put(log.as_bytes())
            }
            LogId::CHANGED_NAMESPACES => {
                let mut log = ChangedNamespaceList::new_zeroed();
                let mut changed = self.admin.changed.clone();
                changed.sort_unstable();
                log.nsids.iter_mut().zip(&changed).for_each(|(to, &nsid)| *to = nsid);
                if changed.len() > MAX_CHANGED_NAMESPACES {
                    log.nsids = [0; MAX_CHANGED_NAMESPACES];
                    log.nsids[0] = u32::MAX;
                }
                put(log.as_bytes())
            }
            LogId::EFFECTS => put(self.effects(shared).as_bytes()),
            _ => return Err(Status::INVALID_LOG_PAGE.with_dnr()),
        })
    }

    fn smart(&self) -> SmartLog {
        let mut log = SmartLog::new_zeroed();
        let counters = &self.engine.counters;
        log.temperature = 310.into();
        (log.available_spare, log.spare_threshold) = (100, 10);
        // Data units are thousands of 512 bytes.
        log.data_units_read = u128::from(counters.read_bytes.div_ceil(512_000)).into();
        log.data_units_written = u128::from(counters.written_bytes.div_ceil(512_000)).into();
        log.host_reads = u128::from(counters.reads).into();
        log.host_writes = u128::from(counters.writes).into();
        log.media_errors = u128::from(counters.media_errors).into();
        log.error_log_entries = u128::from(self.admin.error_count).into();
        log
    }

    fn effects(&self, shared: &Shared) -> EffectsLog {
        let mut log = EffectsLog::new_zeroed();
        let supported = CommandEffects::new().with_csupp(true);
        for opcode in 0..=u8::MAX {
            if self.supports(AdminOpcode(opcode)) {
                log.acs[usize::from(opcode)] = supported;
            }
        }
        let changing = supported.with_lbcc(true);
        for opcode in [NvmOpcode::READ, NvmOpcode::FLUSH, NvmOpcode::COMPARE, NvmOpcode::VERIFY] {
            log.iocs[usize::from(opcode.0)] = supported;
        }
        for opcode in [
            NvmOpcode::WRITE,
            NvmOpcode::WRITE_ZEROES,
            NvmOpcode::DATASET_MANAGEMENT,
            NvmOpcode::COPY,
        ] {
            log.iocs[usize::from(opcode.0)] = changing;
        }
        if shared.can_write_uncorrectable() {
            log.iocs[usize::from(NvmOpcode::WRITE_UNCORRECTABLE.0)] = changing;
        }
        log
    }
}
