//! What is done to namespaces, and what keeps them from being written: Format NVM, Namespace Management and Attachment, write
//! protection and reservations (Base 2.3 §5.2.10, §5.2.20, §5.2.21, §8.1.16, §8.1.24).

use crate::admin::{AdminAnswer, AdminData};
use crate::driver::Driver;
use crate::error::DriverError;
use crate::mmc::{MmcError, Query};
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{DmaBuffer, MemoryError, PAGE, Pages};
use dray_device::poll::Time;
use dray_device::space::{MappedBuffer, SpaceError};
use dray_nvme::command::{FormatCdw10, NamespaceAttachmentSelect, SubmissionEntry};
use dray_nvme::identify::{CommandSetId, IDENTIFY_BYTES, IdentifyController, IdentifyNamespace, write_controller_list};
use dray_nvme::reservation::{Registrant, ReservationHeader, ReservationType, registrants};
use zerocopy::{FromBytes, IntoBytes};

/// What happens to data that is erased by Format NVM (SES).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecureErase {
    /// Nobody says: what was there may be found by who takes the drive apart.
    #[default]
    None,
    /// All user data is erased; what is read afterwards is not told.
    UserData,
    /// The key that it was encrypted with is deleted.
    Cryptographic,
}

/// Why a Format NVM was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// OACS.FNVMS is 0.
    #[error("the controller has no Format NVM command")]
    NoCommand,
    /// No such format, or an unused one.
    #[error("namespace {nsid} has no LBA format {format}: it has 0 to {last}")]
    NoFormat {
        /// The namespace.
        nsid: u32,
        /// What was asked for.
        format: u8,
        /// The last it has.
        last: u8,
    },
    /// FNA bit 2 is 0.
    #[error("the controller has no cryptographic erase")]
    NoCrypto,
    /// FNA bits 0 and 1: one namespace cannot be formatted, or erased, by itself.
    #[error("the controller formats (or erases) all its namespaces at once, and it has {0}")]
    AllAtOnce(u32),
    /// It would lose data that another one of the machine depends on.
    #[error("namespace {0} is not there")]
    NoNamespace(u32),
}

/// The dword of a Format NVM of one namespace, checked against what the controller and the namespace say. Metadata and protection
/// information are switched off. `active` is the number of active namespaces.
///
/// # Errors
/// [`FormatError`].
pub fn format_dword(
    controller: &IdentifyController,
    namespace: &IdentifyNamespace,
    (nsid, active): (u32, u32),
    format: Option<u8>,
    erase: SecureErase,
) -> Result<FormatCdw10, FormatError> {
    if !controller.oacs.format() {
        return Err(FormatError::NoCommand);
    }
    if namespace.nsze == 0 {
        return Err(FormatError::NoNamespace(nsid));
    }
    let all = controller.fna & if erase == SecureErase::None { 1 } else { 3 };
    if all != 0 && active > 1 {
        return Err(FormatError::AllAtOnce(active));
    }
    if erase == SecureErase::Cryptographic && controller.fna & 4 == 0 {
        return Err(FormatError::NoCrypto);
    }
    let format = format.unwrap_or_else(|| namespace.flbas.format_index());
    let there = format <= namespace.nlbaf && namespace.lbaf.get(usize::from(format)).is_some_and(|f| f.block_bytes().is_some());
    if !there {
        return Err(FormatError::NoFormat { nsid, format, last: namespace.nlbaf });
    }
    Ok(FormatCdw10::new().with_lbafl(format & 0xf).with_lbafu(format >> 4).with_ses(erase as u8))
}

fn nothing(_: &AdminAnswer) -> Result<(), &'static str> {
    Ok(())
}

/// Formats a namespace: all its data is gone. It can take hours; [`DriverConfig::admin_timeout_ms`](crate::DriverConfig) is its
/// bound.
///
/// # Errors
/// [`SubmitError`].
pub fn format(driver: &mut Driver, now: Time, nsid: u32, dword: FormatCdw10) -> Result<Query<()>, SubmitError> {
    Query::send(driver, now, "Format NVM", &SubmissionEntry::format_nvm(nsid, dword), AdminData::None, nothing)
}

/// Makes a namespace of the sizes in `wanted` (NSZE, NCAP, FLBAS, DPS, NMIC); the answer is its NSID. It is attached to nothing.
///
/// # Errors
/// [`SubmitError`].
pub fn create(driver: &mut Driver, now: Time, wanted: &IdentifyNamespace) -> Result<Query<u32>, SubmitError> {
    let entry = SubmissionEntry::create_namespace(CommandSetId::NVM);
    let nsid = |answer: &AdminAnswer| match answer.completion.result as u32 {
        0 | u32::MAX => Err("an NSID that no namespace can have"),
        nsid => Ok(nsid),
    };
    Query::send(driver, now, "Namespace Management, create", &entry, AdminData::Out(wanted.as_bytes()), nsid)
}

/// Deletes a namespace, with all its data.
///
/// # Errors
/// [`SubmitError`].
pub fn delete(driver: &mut Driver, now: Time, nsid: u32) -> Result<Query<()>, SubmitError> {
    let entry = SubmissionEntry::delete_namespace(nsid);
    Query::send(driver, now, "Namespace Management, delete", &entry, AdminData::None, nothing)
}

/// Attaches a namespace to controllers, or detaches it from them.
///
/// # Errors
/// [`SubmitError`].
pub fn attach(driver: &mut Driver, now: Time, nsid: u32, cntlids: &[u16], on: bool) -> Result<Query<()>, SubmitError> {
    let select = if on { NamespaceAttachmentSelect::ATTACH } else { NamespaceAttachmentSelect::DETACH };
    let command = if on { "Namespace Attachment, attach" } else { "Namespace Attachment, detach" };
    let mut list = vec![0; IDENTIFY_BYTES];
    if write_controller_list(cntlids.iter().copied(), &mut list) != cntlids.len() {
        return Err(SubmitError::BadData);
    }
    Query::send(driver, now, command, &SubmissionEntry::namespace_attachment(nsid, select), AdminData::Out(&list), nothing)
}

/// What a namespace's reservation lets this controller do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// The controller, or the namespace, has no reservations.
    Unsupported,
    /// Nobody holds one.
    Free {
        /// Hosts that are registered.
        registrants: usize,
    },
    /// Somebody holds one.
    Held {
        /// What others may do.
        kind: ReservationType,
        /// The holder's host identifier; zeroes where the report names none.
        host: [u8; 16],
        /// The holder is reached through this controller.
        ours: bool,
        /// Our host is registered.
        registered: bool,
    },
}

/// What keeps a namespace from being written or read, for whoever serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceState {
    /// NSATTR: it is write protected now.
    pub write_protected: bool,
    /// Its reservation.
    pub reservation: Reservation,
}

impl NamespaceState {
    /// Whether this controller may write it.
    #[must_use]
    pub fn may_write(&self) -> bool {
        !self.write_protected
            && match &self.reservation {
                Reservation::Unsupported | Reservation::Free { .. } => true,
                Reservation::Held { kind, ours, registered, .. } => *ours || (*registered && kind.lets_registrants()),
            }
    }

    /// Whether this controller may read it.
    #[must_use]
    pub fn may_read(&self) -> bool {
        match &self.reservation {
            Reservation::Unsupported | Reservation::Free { .. } => true,
            Reservation::Held { kind, ours, registered, .. } => {
                *ours || kind.lets_others_read() || (*registered && kind.lets_registrants())
            }
        }
    }

    /// In words, for who is refused.
    #[must_use]
    pub fn why_not_written(&self) -> Option<String> {
        match &self.reservation {
            _ if self.may_write() => None,
            _ if self.write_protected => Some("the namespace is write protected".into()),
            Reservation::Held { kind, host, .. } => {
                let host: String = host.iter().map(|byte| format!("{byte:02x}")).collect();
                Some(format!("another host ({host}) holds a reservation of it: {kind}"))
            }
            _ => None,
        }
    }
}

/// Reads a report of reservations (the extended form) as the controller `cntlid` sees it.
///
/// # Errors
/// When it is too short to be one.
pub fn read_report(bytes: &[u8], cntlid: u16) -> Result<Reservation, &'static str> {
    let (header, _) = ReservationHeader::read_from_prefix(bytes).map_err(|_| "a report without header")?;
    let ours = |one: &Registrant| one.cntlid == cntlid;
    let registered = registrants(bytes).any(|one| ours(&one));
    if header.kind == ReservationType::NONE {
        return Ok(Reservation::Free { registrants: registrants(bytes).count() });
    }
    // Of the "all registrants" kinds everybody holds it; then ours is among them or not.
    let holder = registrants(bytes).filter(Registrant::holds).max_by_key(ours);
    let (host, ours) = holder.map_or(([0; 16], false), |one| (one.host, ours(&one)));
    Ok(Reservation::Held { kind: header.kind, host, ours, registered })
}

/// Why the state of a namespace is not known.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An admin command.
    #[error(transparent)]
    Admin(#[from] MmcError),
    /// Reservation Report.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// It could not be sent.
    #[error("Reservation Report: {0}")]
    Submit(#[from] SubmitError),
    /// What came back makes no sense.
    #[error("Reservation Report: {0}")]
    BadAnswer(&'static str),
    /// No memory for the report.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It cannot be mapped.
    #[error(transparent)]
    Space(#[from] SpaceError),
}

/// Asks for a namespace's state: Identify, then, where the namespace has reservations, a report through an I/O queue of the
/// caller's that has nothing else under way.
#[derive(Debug)]
pub struct StateProbe {
    nsid: u32,
    buffer: MappedBuffer,
    identify: Option<Query<Box<IdentifyNamespace>>>,
    write_protected: Option<bool>,
    reporting: bool,
    report: Option<Completion>,
}

impl StateProbe {
    /// A probe of that namespace. Polling it sends the commands.
    ///
    /// # Errors
    /// [`StateError::Memory`], [`StateError::Space`].
    pub fn new(driver: &Driver, nsid: u32) -> Result<Self, StateError> {
        let buffer = MappedBuffer::new(driver.space(), DmaBuffer::allocate("dray-reservations", PAGE, Pages::Small)?)?;
        Ok(Self { nsid, buffer, identify: None, write_protected: None, reporting: false, report: None })
    }

    /// The state, once; `None` while it is being asked for.
    pub fn poll(&mut self, driver: &mut Driver, queue: &mut dyn CommandQueue, now: Time) -> Option<Result<NamespaceState, StateError>> {
        self.step(driver, queue, now).transpose()
    }

    fn step(&mut self, driver: &mut Driver, queue: &mut dyn CommandQueue, now: Time) -> Result<Option<NamespaceState>, StateError> {
        let Some(write_protected) = self.write_protected else { return self.identified(driver, now) };
        if !self.reporting {
            let entry = SubmissionEntry::reservation_report(self.nsid, PAGE as u32);
            match queue.submit(now, &entry, &[self.buffer.buffer().segment()], 0) {
                Err(SubmitError::Full) => return Ok(None),
                other => other?,
            }
            queue.commit();
            self.reporting = true;
        }
        let report = &mut self.report;
        queue.poll(now, &mut |completion| *report = Some(completion));
        let Some(completion) = self.report else { return Ok(None) };
        if completion.unknown {
            return Err(DriverError::Reset.into());
        }
        if completion.status.is_error() {
            return Err(DriverError::Refused { command: "Reservation Report", status: completion.status }.into());
        }
        let mut bytes = vec![0; PAGE];
        self.buffer.buffer().segment().read(&mut bytes);
        let cntlid = driver.identify().map_or(0, |id| id.cntlid);
        let reservation = read_report(&bytes, cntlid).map_err(StateError::BadAnswer)?;
        Ok(Some(NamespaceState { write_protected, reservation }))
    }

    fn identified(&mut self, driver: &mut Driver, now: Time) -> Result<Option<NamespaceState>, StateError> {
        let Some(query) = &self.identify else {
            match crate::mmc::identify_namespace(driver, now, self.nsid) {
                Err(SubmitError::Full) => {}
                other => self.identify = Some(other?),
            }
            return Ok(None);
        };
        let Some(answer) = query.poll(driver) else { return Ok(None) };
        let namespace = answer?;
        let write_protected = namespace.nsattr.write_protected();
        let has_reservations = driver.identify().is_some_and(|id| id.oncs.reservations()) && namespace.rescap != 0;
        if !has_reservations {
            return Ok(Some(NamespaceState { write_protected, reservation: Reservation::Unsupported }));
        }
        self.write_protected = Some(write_protected);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_nvme::identify::{Flbas, LbaFormat};
    use proptest::prelude::*;

    fn drive() -> (IdentifyController, IdentifyNamespace) {
        let mut controller = IdentifyController::default();
        controller.oacs = controller.oacs.with_format(true);
        let mut namespace = IdentifyNamespace { nsze: 100, nlbaf: 20, flbas: Flbas::from_bits(1), ..Default::default() };
        for n in [0, 1, 17] {
            namespace.lbaf[n] = LbaFormat::new().with_lbads(9);
        }
        (controller, namespace)
    }

    #[test]
    fn a_format_is_what_was_asked_for() {
        let (mut controller, namespace) = drive();
        let dword = |controller: &IdentifyController, format, erase| format_dword(controller, &namespace, (1, 2), format, erase);
        assert_eq!(dword(&controller, None, SecureErase::None).expect("good").into_bits(), 1, "the format it has");
        assert_eq!(dword(&controller, Some(17), SecureErase::UserData).expect("good").into_bits(), 0x1201);
        for format in [2, 21, 255] {
            assert!(matches!(dword(&controller, Some(format), SecureErase::None), Err(FormatError::NoFormat { last: 20, .. })));
        }
        assert_eq!(dword(&controller, None, SecureErase::Cryptographic), Err(FormatError::NoCrypto));
        controller.fna = 4;
        assert_eq!(dword(&controller, None, SecureErase::Cryptographic).expect("good").ses(), 2);
        controller.fna = 2;
        assert_eq!(dword(&controller, None, SecureErase::UserData), Err(FormatError::AllAtOnce(2)));
        assert!(dword(&controller, None, SecureErase::None).is_ok());
        controller.fna = 1;
        assert_eq!(dword(&controller, None, SecureErase::None), Err(FormatError::AllAtOnce(2)));
        assert!(format_dword(&controller, &namespace, (1, 1), None, SecureErase::None).is_ok());
        controller.oacs = controller.oacs.with_format(false);
        assert_eq!(dword(&controller, None, SecureErase::None), Err(FormatError::NoCommand));
    }

    fn report(kind: u8, entries: &[(u16, bool)]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 64 * entries.len()];
        (bytes[4], bytes[5]) = (kind, entries.len() as u8);
        for (entry, (cntlid, holds)) in bytes[64..].chunks_exact_mut(64).zip(entries) {
            entry[..2].copy_from_slice(&cntlid.to_le_bytes());
            entry[2] = u8::from(*holds);
            entry[16] = *cntlid as u8;
        }
        bytes
    }

    #[test]
    fn a_reservation_says_who_may_write() {
        let state = |kind, entries: &[(u16, bool)]| NamespaceState {
            write_protected: false,
            reservation: read_report(&report(kind, entries), 5).expect("a report"),
        };
        let allowed = |kind, entries: &[(u16, bool)]| (state(kind, entries).may_write(), state(kind, entries).may_read());
        assert_eq!(allowed(0, &[(5, false)]), (true, true));
        assert_eq!(allowed(1, &[(5, true)]), (true, true), "ours");
        assert_eq!(allowed(1, &[(5, false), (6, true)]), (false, true), "another's, for writing");
        assert_eq!(allowed(2, &[(6, true)]), (false, false), "another's alone");
        assert_eq!(allowed(3, &[(5, false), (6, true)]), (true, true), "registrants may");
        assert_eq!(allowed(4, &[(6, true)]), (false, false), "we are none");
        assert_eq!(allowed(6, &[(6, true), (5, true)]), (true, true), "all hold it");
        let why = state(1, &[(6, true)]).why_not_written().expect("refused");
        assert!(why.contains("Write Exclusive") && why.contains("(06"), "{why}");
        let protected = NamespaceState { write_protected: true, reservation: Reservation::Unsupported };
        assert_eq!((protected.may_write(), protected.may_read()), (false, true));
        assert!(protected.why_not_written().is_some_and(|why| why.contains("protected")));
    }

    proptest! {
        #[test]
        fn no_report_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), cntlid: u16) {
            if let Ok(reservation) = read_report(&bytes, cntlid) {
                let state = NamespaceState { write_protected: false, reservation };
                prop_assert_eq!(state.may_write(), state.why_not_written().is_none());
            }
        }
    }
}
