//! Reservations of a device's namespace: what another host has kept for itself is not served.

use super::open::{DeviceError, OpenDevice};
use crate::core::clock::Clock;
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE};
use dray_driver::namespace::{NamespaceState, read_report};
use dray_nvme::command::SubmissionEntry;

/// How long the report may take, in milliseconds.
const PATIENCE_MS: u64 = 20_000;

/// The namespace that is asked about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    /// The device's name.
    pub(super) device: &'a str,
    /// Its controller's CNTLID: whom the reservations are looked at for.
    pub(super) cntlid: u16,
    /// The namespace.
    pub(super) nsid: u32,
    /// What its commands' time-outs are counted by.
    pub(super) clock: Clock,
}

impl<'a> Asked<'a> {
    /// A namespace of a device that is open.
    pub(super) fn of(device: &'a OpenDevice, nsid: u32) -> Self {
        let cntlid = device.identify().map_or(0, |identify| identify.cntlid);
        Self { device: device.name(), cntlid, nsid, clock: device.clock() }
    }
}

/// Asks for the reservations of a namespace, through a queue that has nothing else under way. `memory` is reached by the device.
///
/// # Errors
/// [`DeviceError::Namespace`] when another host's reservation keeps us from writing; the device's.
pub(super) fn respect(asked: Asked<'_>, queue: &mut dyn CommandQueue, memory: &DmaBuffer) -> Result<(), DeviceError> {
    let Asked { device, cntlid, nsid, clock } = asked;
    let failed = |error: &dyn std::fmt::Display| DeviceError::failed(device, &format!("Reservation Report: {error}"));
    let data = memory.part(0, PAGE).ok_or_else(|| failed(&"no memory"))?;
    let entry = SubmissionEntry::reservation_report(nsid, PAGE as u32);
    let deadline = clock.now().after_ms(PATIENCE_MS);
    let (mut sent, mut ended): (bool, Option<Completion>) = (false, None);
    let completion = loop {
        let now = clock.now();
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
        return Err(DeviceError::Refused { name: device.into(), what: "Reservation Report".into(), status: completion.status });
    }
    let mut report = vec![0; PAGE];
    data.read(&mut report);
    let reservation = read_report(&report, cntlid).map_err(|error| failed(&error))?;
    // Write protection is no reason to refuse: the namespace is served so.
    match (NamespaceState { write_protected: false, reservation }).why_not_written() {
        Some(why) => Err(DeviceError::Namespace { name: device.into(), nsid, why: format!("is not ours to write: {why}") }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::command::QueueLimits;
    use dray_device::memory::{Pages, Segment};
    use dray_device::poll::Time;
    use dray_nvme::status::Status;

    /// A drive that answers a Reservation Report (Base 2.3 §7.8): its type, and who is registered, holding it or not.
    struct Reserving {
        kind: u8,
        registrants: Vec<(u16, bool)>,
        status: Status,
        unknown: bool,
        /// Times that it has no room, before it takes the command.
        full: u32,
        ended: Option<Completion>,
    }

    impl Reserving {
        fn new(kind: u8, registrants: &[(u16, bool)]) -> Self {
            Self { kind, registrants: registrants.to_vec(), status: Status::SUCCESS, unknown: false, full: 2, ended: None }
        }

        fn respected(mut self) -> Result<(), DeviceError> {
            let memory = DmaBuffer::allocate("report", PAGE, Pages::Small).expect("memory");
            respect(Asked { device: "disk", cntlid: 5, nsid: 3, clock: Clock::new() }, &mut self, &memory)
        }
    }

    impl CommandQueue for Reserving {
        fn limits(&self) -> QueueLimits {
            QueueLimits { depth: 1, max_transfer: PAGE, max_write_zeroes: 0 }
        }

        fn free(&self) -> usize {
            1
        }

        fn submit(&mut self, _now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
            if self.full > 0 {
                self.full -= 1;
                return Err(SubmitError::Full);
            }
            // Opcode 0Eh, NUMD 0's based, the extended form.
            assert_eq!((entry.cdw0.opcode(), entry.nsid, entry.cdw10, entry.cdw11 & 1), (0x0e, 3, PAGE as u32 / 4 - 1, 1));
            let mut report = vec![0; PAGE];
            (report[4], report[5]) = (self.kind, self.registrants.len() as u8);
            for (registrant, (cntlid, holds)) in report[64..].chunks_exact_mut(64).zip(&self.registrants) {
                registrant[..2].copy_from_slice(&cntlid.to_le_bytes());
                registrant[2] = u8::from(*holds);
                registrant[16] = 0xab;
            }
            data[0].write(&report);
            self.ended = Some(Completion { tag, status: self.status, result: 0, unknown: self.unknown });
            Ok(())
        }

        fn commit(&mut self) {}

        fn poll(&mut self, _now: Time, done: &mut dyn FnMut(Completion)) -> usize {
            self.ended.take().map(done).map_or(0, |()| 1)
        }
    }

    #[test]
    fn a_namespace_that_another_host_keeps_for_itself_is_not_served() {
        // Write Exclusive, Exclusive Access, and the same for registrants only.
        for kind in [1, 2, 3, 4] {
            let error = Reserving::new(kind, &[(6, true)]).respected().expect_err("another's");
            let words = error.to_string();
            assert!(words.contains("disk") && words.contains("not ours to write") && words.contains("ab"), "{words}");
        }
        for (kind, registrants) in [(0, &[][..]), (1, &[(5, true), (6, false)]), (3, &[(5, false), (6, true)]), (5, &[(5, true), (6, true)])] {
            Reserving::new(kind, registrants).respected().expect("ours, or nobody's");
        }
    }

    #[test]
    fn a_report_that_does_not_come_well_is_no_permission() {
        let status = Status::INVALID_FIELD;
        let refused = Reserving { status, ..Reserving::new(0, &[]) }.respected();
        assert!(matches!(refused, Err(DeviceError::Refused { status: said, .. }) if said == status), "{refused:?}");
        assert!(Reserving { unknown: true, ..Reserving::new(0, &[]) }.respected().is_err());
    }
}
