//! Namespace Attachment (Base 2.3 §5.2.20): which controllers have a namespace, changed while they run.
//!
//! Only where [`SubsystemConfig::attachment`](crate::SubsystemConfig::attachment) says so. What is changed lasts as long as the
//! subsystem, over resets of any controller; it is not written anywhere, so an owner that needs it to outlive the process keeps it.

use crate::manage::Answer;
use crate::subsystem::{Subsystem, is_attached};
use crate::engine::NO_NAMESPACE;
use dray_nvme::command::{AdminOpcode, NamespaceAttachmentCdw10, NamespaceAttachmentSelect, SubmissionEntry};
use dray_nvme::identify::{IDENTIFY_BYTES, controller_list};
use dray_nvme::status::Status;

impl Subsystem {
    /// Attaches a namespace to controllers or detaches it from them: from all that the list names, or from none.
    pub(crate) fn namespace_attachment(&mut self, index: usize, entry: &SubmissionEntry) -> Answer {
        let invalid = Status::INVALID_FIELD.with_dnr();
        if entry.admin_opcode() == AdminOpcode::NAMESPACE_MANAGEMENT {
            // All capacity is in the namespaces that there are.
            return Err(Status::NAMESPACE_INSUFFICIENT_CAPACITY.with_dnr().into());
        }
        let on = match NamespaceAttachmentCdw10::from_bits(entry.cdw10).sel() {
            NamespaceAttachmentSelect::ATTACH => true,
            NamespaceAttachmentSelect::DETACH => false,
            _ => return Err(invalid.into()),
        };
        let nsid = entry.nsid;
        let place = self.shared.namespaces.iter().position(|namespace| namespace.config.nsid == nsid);
        let place = place.ok_or(Status::INVALID_NAMESPACE.with_dnr())?;
        let mut page = [0; IDENTIFY_BYTES];
        self.controllers[index].get_data(entry, &mut page)?;
        let mut targets = Vec::new();
        for cntlid in controller_list(&page) {
            let target = self.controllers.iter().position(|controller| controller.config.cntlid == cntlid);
            // Nor is a controller named twice: it would have the namespace twice.
            let target = target.filter(|target| !targets.contains(target));
            targets.push(target.ok_or(Status::CONTROLLER_LIST_INVALID.with_dnr())?);
        }
        if targets.is_empty() {
            return Err(Status::CONTROLLER_LIST_INVALID.with_dnr().into());
        }
        for &target in &targets {
            match (on, is_attached(&self.shared.config, target, nsid)) {
                (true, true) => return Err(Status::NAMESPACE_ALREADY_ATTACHED.with_dnr().into()),
                (false, false) => return Err(Status::NAMESPACE_NOT_ATTACHED.with_dnr().into()),
                _ => {}
            }
        }
        for target in targets {
            let namespaces = &mut self.shared.config.controllers[target].namespaces;
            let controller = &mut self.controllers[target];
            if on {
                namespaces.push(nsid);
            } else {
                namespaces.retain(|attached| *attached != nsid);
            }
            if let Some(slot) = controller.engine.active.get_mut(nsid as usize - 1) {
                *slot = if on { place as u16 } else { NO_NAMESPACE };
            }
            if target != index {
                controller.namespace_changed(nsid);
            }
        }
        Ok(Some(0))
    }
}
