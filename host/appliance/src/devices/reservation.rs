//! Reservations of a device's namespace: what another host has kept for itself is not served.

use super::open::{DeviceError, OpenDevice};
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE};
use dray_driver::namespace::{NamespaceState, read_report};
use dray_nvme::command::SubmissionEntry;

/// How long the report may take, in milliseconds.
const PATIENCE_MS: u64 = 20_000;

/// Asks for the reservations of a namespace, through a queue that has nothing else under way. `memory` is reached by the device.
///
/// # Errors
/// [`DeviceError::Namespace`] when another host's reservation keeps us from writing; the device's.
pub(super) fn respect(device: &OpenDevice, queue: &mut dyn CommandQueue, nsid: u32, memory: &DmaBuffer) -> Result<(), DeviceError> {
    let failed = |error: &dyn std::fmt::Display| DeviceError::failed(device.name(), &format!("Reservation Report: {error}"));
    let data = memory.part(0, PAGE).ok_or_else(|| failed(&"no memory"))?;
    let entry = SubmissionEntry::reservation_report(nsid, PAGE as u32);
    let deadline = device.now().after_ms(PATIENCE_MS);
    let (mut sent, mut ended): (bool, Option<Completion>) = (false, None);
    let completion = loop {
        let now = device.now();
        if !sent {
            match queue.submit(now, &entry, &[data], 0) {
                Err(SubmitError::Full) => {}
                Err(error) => return Err(failed(&error)),
                Ok(()) => sent = true,
            }
            queue.commit();
        }
        queue.poll(now, &mut |completion| ended = Some(completion));
        match ended {
            Some(completion) => break completion,
            None if now >= deadline => return Err(failed(&"it was not answered")),
            None => std::thread::yield_now(),
        }
    };
    if completion.unknown {
        return Err(failed(&"nobody knows how it ended"));
    }
    if completion.status.is_error() {
        return Err(DeviceError::Refused { name: device.name().into(), what: "Reservation Report".into(), status: completion.status });
    }
    let mut report = vec![0; PAGE];
    data.read(&mut report);
    let cntlid = device.identify().map_or(0, |identify| identify.cntlid);
    let reservation = read_report(&report, cntlid).map_err(|error| failed(&error))?;
    // Write protection is no reason to refuse: the namespace is served so.
    match (NamespaceState { write_protected: false, reservation }).why_not_written() {
        Some(why) => Err(DeviceError::Namespace { name: device.name().into(), nsid, why: format!("is not ours to write: {why}") }),
        None => Ok(()),
    }
}
