//! Set Features and Get Features (Base 2.3 §5.2.11, §5.2.26). Feature 21h and the guest limit reach other controllers and are
//! the subsystem's.

use super::AdminResult;
use crate::controller::Controller;
use crate::features::Features;
use crate::subsystem::Shared;
use dray_nvme::command::{FeatureSelect, FeaturesCdw10, SubmissionEntry};
use dray_nvme::feature::{
    AsyncEventConfig, FeatureCapabilities, FeatureId, HostIdentifierCdw11, InterruptCoalescing, InterruptVectorConfig,
    NamespaceWriteProtect, NumberOfQueues, TemperatureThreshold, Timestamp, VolatileWriteCache,
};
use dray_nvme::status::Status;
use zerocopy::{FromZeros, IntoBytes};

fn refused() -> Status {
    Status::INVALID_FIELD.with_dnr()
}

impl Controller {
    pub(super) fn set_features(&mut self, entry: &SubmissionEntry, shared: &mut Shared) -> AdminResult {
        let cdw10 = FeaturesCdw10::from_bits(entry.cdw10);
        if cdw10.sv() {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
        }
        let value = entry.cdw11;
        match cdw10.fid() {
            FeatureId::ARBITRATION => self.features.arbitration = value,
            FeatureId::POWER_MANAGEMENT if value & 0x1f == 0 => self.features.power = value,
            FeatureId::TEMPERATURE_THRESHOLD => {
                let threshold = TemperatureThreshold::from_bits(value);
                if threshold.thsel() > 1 || threshold.tmpsel() != 0 && threshold.tmpsel() != 15 {
                    return Err(refused());
                }
                self.features.temperature[usize::from(threshold.thsel())] = threshold.tmpth();
            }
            // DULBE is not offered (NSFEAT bit 2).
            FeatureId::ERROR_RECOVERY if value & 0x1_0000 == 0 => self.features.error_recovery = value,
            FeatureId::VOLATILE_WRITE_CACHE if shared.has_cache() => {
                self.engine.wce = VolatileWriteCache::from_bits(value).wce();
            }
            FeatureId::NUMBER_OF_QUEUES => return self.set_queues(value),
            FeatureId::INTERRUPT_COALESCING => self.features.coalescing = InterruptCoalescing::from_bits(value),
            FeatureId::INTERRUPT_VECTOR_CONFIG => {
                let config = InterruptVectorConfig::from_bits(value);
                self.check_vector(config.iv())?;
                self.features.coalescing_disabled[usize::from(config.iv())] = config.cd();
            }
            FeatureId::WRITE_ATOMICITY => self.features.write_atomicity = value & 1,
            FeatureId::ASYNC_EVENT_CONFIG => self.features.events = AsyncEventConfig::from_bits(value),
            FeatureId::TIMESTAMP => {
                let mut timestamp = Timestamp::new_zeroed();
                self.get_data(entry, timestamp.as_mut_bytes())?;
                self.features.timestamp = Some((timestamp.millis(), self.now));
            }
            FeatureId::HOST_BEHAVIOR => {
                let mut behavior = [0; 512];
                self.get_data(entry, &mut behavior)?;
                self.features.host_behavior = behavior;
            }
            FeatureId::HOST_IDENTIFIER => {
                let len = host_id_bytes(value);
                let mut id = [0; 16];
                self.get_data(entry, &mut id[..len])?;
                self.features.host_id = id;
            }
            FeatureId::NAMESPACE_WRITE_PROTECT => self.set_write_protect(entry.nsid, value, shared)?,
            _ => return Err(refused()),
        }
        Ok(0)
    }

    /// A vector that some I/O completion queue uses, or could.
    fn check_vector(&self, vector: u16) -> Result<(), Status> {
        let used = self.cqs.iter().flatten().any(|cq| cq.ien && cq.vector == vector);
        let there = usize::from(vector) < self.features.coalescing_disabled.len();
        if used && there { Ok(()) } else { Err(refused()) }
    }

    fn set_queues(&mut self, value: u32) -> AdminResult {
        let asked = NumberOfQueues::from_bits(value);
        if asked.nsq() == u16::MAX || asked.ncq() == u16::MAX {
            return Err(refused());
        }
        if self.cqs.iter().skip(1).any(Option::is_some) {
            return Err(Status::COMMAND_SEQUENCE.with_dnr());
        }
        let most = self.config.io_queues - 1;
        let granted = NumberOfQueues::new().with_nsq(asked.nsq().min(most)).with_ncq(asked.ncq().min(most));
        self.features.queues = Some(granted.into_bits());
        Ok(granted.into_bits().into())
    }

    fn set_write_protect(&mut self, nsid: u32, value: u32, shared: &mut Shared) -> Result<(), Status> {
        let index = self.engine.namespace(nsid)?;
        let protect = match NamespaceWriteProtect::from_bits(value).wps() {
            0 => false,
            1 => true,
            _ => return Err(refused()),
        };
        let Some(namespace) = shared.namespaces.get_mut(usize::from(index)) else { return Err(refused()) };
        if namespace.write_protected != protect {
            namespace.write_protected = protect;
            shared.changed.push((index, self.engine.index));
        }
        Ok(())
    }

    pub(super) fn get_features(&mut self, entry: &SubmissionEntry, shared: &Shared) -> AdminResult {
        let cdw10 = FeaturesCdw10::from_bits(entry.cdw10);
        let defaults;
        let (features, wce) = match cdw10.sel() {
            FeatureSelect::CURRENT => (&self.features, self.engine.wce),
            FeatureSelect::DEFAULT | FeatureSelect::SAVED => {
                defaults = Features::new(self.config.vectors);
                (&defaults, true)
            }
            FeatureSelect::CAPABILITIES => return capabilities(cdw10.fid(), shared),
            _ => return Err(refused()),
        };
        let value = match cdw10.fid() {
            FeatureId::ARBITRATION => features.arbitration,
            FeatureId::POWER_MANAGEMENT => features.power,
            FeatureId::TEMPERATURE_THRESHOLD => {
                let threshold = TemperatureThreshold::from_bits(entry.cdw11);
                let over_under = features.temperature.get(usize::from(threshold.thsel())).ok_or(refused())?;
                u32::from(*over_under)
            }
            FeatureId::ERROR_RECOVERY => features.error_recovery,
            FeatureId::VOLATILE_WRITE_CACHE if shared.has_cache() => u32::from(wce),
            FeatureId::NUMBER_OF_QUEUES => {
                let most = self.config.io_queues - 1;
                features.queues.unwrap_or(NumberOfQueues::new().with_nsq(most).with_ncq(most).into_bits())
            }
            FeatureId::INTERRUPT_COALESCING => features.coalescing.into_bits(),
            FeatureId::INTERRUPT_VECTOR_CONFIG => {
                let config = InterruptVectorConfig::from_bits(entry.cdw11);
                let disabled = features.coalescing_disabled.get(usize::from(config.iv())).ok_or(refused())?;
                InterruptVectorConfig::new().with_iv(config.iv()).with_cd(*disabled).into_bits()
            }
            FeatureId::WRITE_ATOMICITY => features.write_atomicity,
            FeatureId::ASYNC_EVENT_CONFIG => features.events.into_bits(),
            FeatureId::NAMESPACE_WRITE_PROTECT => {
                let index = self.engine.namespace(entry.nsid)?;
                shared.namespaces.get(usize::from(index)).map_or(0, |ns| u32::from(ns.write_protected))
            }
            _ => return self.get_feature_data(entry, cdw10.fid()),
        };
        Ok(value.into())
    }

    /// Features whose value is data.
    fn get_feature_data(&mut self, entry: &SubmissionEntry, fid: FeatureId) -> AdminResult {
        match fid {
            FeatureId::TIMESTAMP => {
                let (millis, origin) = self.features.timestamp(self.now);
                let mut timestamp = Timestamp::from_millis(millis);
                timestamp.attributes = timestamp.attributes.with_origin(origin);
                self.put_data(entry, timestamp.as_bytes())?;
            }
            FeatureId::HOST_BEHAVIOR => {
                let behavior = self.features.host_behavior;
                self.put_data(entry, &behavior)?;
            }
            FeatureId::HOST_IDENTIFIER => {
                let id = self.features.host_id;
                self.put_data(entry, &id[..host_id_bytes(entry.cdw11)])?;
            }
            _ => return Err(refused()),
        }
        Ok(0)
    }
}

fn host_id_bytes(cdw11: u32) -> usize {
    if HostIdentifierCdw11::from_bits(cdw11).exhid() { 16 } else { 8 }
}

fn capabilities(fid: FeatureId, shared: &Shared) -> AdminResult {
    let known = match fid {
        FeatureId::ARBITRATION
        | FeatureId::POWER_MANAGEMENT
        | FeatureId::TEMPERATURE_THRESHOLD
        | FeatureId::ERROR_RECOVERY
        | FeatureId::NUMBER_OF_QUEUES
        | FeatureId::INTERRUPT_COALESCING
        | FeatureId::INTERRUPT_VECTOR_CONFIG
        | FeatureId::WRITE_ATOMICITY
        | FeatureId::ASYNC_EVENT_CONFIG
        | FeatureId::TIMESTAMP
        | FeatureId::HOST_BEHAVIOR
        | FeatureId::HOST_IDENTIFIER
        | FeatureId::NAMESPACE_WRITE_PROTECT => true,
        FeatureId::VOLATILE_WRITE_CACHE => shared.has_cache(),
        _ => false,
    };
    if !known {
        return Err(refused());
    }
    let by_namespace = fid == FeatureId::NAMESPACE_WRITE_PROTECT;
    Ok(FeatureCapabilities::new().with_changeable(true).with_namespace_specific(by_namespace).into_bits().into())
}
