//! The commands of a migration management controller, and the queries around them, as small polled values over
//! [`Driver::request`] (Base 2.3 §5.2.13, §5.2.16, §5.2.17, §5.2.28, §8.1.13).

use crate::admin::{AdminAnswer, AdminData, Ticket};
use crate::driver::Driver;
use crate::error::DriverError;
use dray_device::command::SubmitError;
use dray_device::poll::Time;
use dray_nvme::command::{FeatureSelect, GetControllerStateDw0, SequenceIndicator, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{
    Cns, CommandSetId, ControllerStateFormats, IDENTIFY_BYTES, IdentifyNamespace, controller_list, nsid_list,
};
use dray_nvme::state::{ControllerState, ControllerStateHeader};
use zerocopy::FromBytes;

/// Bytes of a controller state's header: what is read first.
const STATE_HEADER_BYTES: usize = size_of::<ControllerStateHeader>();

/// Why a migration command did not do what it was sent for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MmcError {
    /// It could not be sent.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// It was refused, or the controller was reset meanwhile.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// It answered something that cannot be.
    #[error("{command}: {what}")]
    BadAnswer {
        /// Which command.
        command: &'static str,
        /// What is wrong with the answer.
        what: &'static str,
    },
    /// A controller state is larger than the caller takes.
    #[error("the controller state has {bytes} bytes, at most {limit} are taken")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The caller's limit.
        limit: usize,
    },
}

/// A command under way whose answer is a `T`.
#[derive(Debug)]
pub struct Query<T> {
    command: &'static str,
    ticket: Ticket,
    parse: fn(&AdminAnswer) -> Result<T, &'static str>,
}

impl<T> Query<T> {
    pub(crate) fn send(
        driver: &mut Driver,
        now: Time,
        command: &'static str,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
        parse: fn(&AdminAnswer) -> Result<T, &'static str>,
    ) -> Result<Self, SubmitError> {
        Ok(Self { command, ticket: driver.request(now, entry, data)?, parse })
    }

    /// The answer, once; `None` while the command is under way.
    pub fn poll(&self, driver: &mut Driver) -> Option<Result<T, MmcError>> {
        let answer = driver.answer(self.ticket)?;
        let command = self.command;
        Some(match answer.accepted(command) {
            Err(error) => Err(error.into()),
            Ok(answer) => {
                let parsed = (self.parse)(&answer).map_err(|what| MmcError::BadAnswer { command, what });
                driver.recycle(answer.data);
                parsed
            }
        })
    }
}

fn nothing(_: &AdminAnswer) -> Result<(), &'static str> {
    Ok(())
}

/// Starts or stops logging of user data changes into a UDMQ (Track Send, SEL 0).
///
/// # Errors
/// [`SubmitError`].
pub fn track_log(driver: &mut Driver, now: Time, cdqid: u16, start: bool) -> Result<Query<()>, SubmitError> {
    let command = if start { "Track Send, start" } else { "Track Send, stop" };
    Query::send(driver, now, command, &SubmissionEntry::track_send_log(start, cdqid), AdminData::None, nothing)
}

/// Suspends a controller (Migration Send, SEL 0). `notify_only` merely warns it; `delete_queue` deletes its UDMQ as well.
///
/// # Errors
/// [`SubmitError`].
pub fn suspend(
    driver: &mut Driver,
    now: Time,
    cntlid: u16,
    notify_only: bool,
    delete_queue: bool,
) -> Result<Query<()>, SubmitError> {
    let entry = SubmissionEntry::suspend(cntlid, notify_only, delete_queue);
    Query::send(driver, now, "Suspend", &entry, AdminData::None, nothing)
}

/// Resumes a controller (Migration Send, SEL 1).
///
/// # Errors
/// [`SubmitError`].
pub fn resume(driver: &mut Driver, now: Time, cntlid: u16) -> Result<Query<()>, SubmitError> {
    Query::send(driver, now, "Resume", &SubmissionEntry::resume(cntlid), AdminData::None, nothing)
}

/// The controller state formats that a controller knows (Identify CNS 20h). Indices in commands are 1-based.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateFormats {
    /// Structure versions; CSVI n is the n-th.
    pub versions: Vec<u16>,
    /// Vendor formats; CSUUIDI n is the n-th.
    pub uuids: Vec<[u8; 16]>,
}

impl StateFormats {
    /// CSVI of a version; 0 = not known.
    #[must_use]
    pub fn csvi_of(&self, version: u16) -> u8 {
        index_of(&self.versions, &version)
    }

    /// CSUUIDI of a vendor format; 0 = not known.
    #[must_use]
    pub fn csuuidi_of(&self, uuid: &[u8; 16]) -> u8 {
        index_of(&self.uuids, uuid)
    }
}

fn index_of<T: PartialEq>(list: &[T], wanted: &T) -> u8 {
    list.iter().position(|value| value == wanted).and_then(|at| u8::try_from(at + 1).ok()).unwrap_or(0)
}

/// Asks for the controller state formats (Identify CNS 20h).
///
/// # Errors
/// [`SubmitError`].
pub fn state_formats(driver: &mut Driver, now: Time) -> Result<Query<StateFormats>, SubmitError> {
    identify(driver, now, Cns::CONTROLLER_STATE_FORMATS, 0, 0, |answer| {
        let formats = ControllerStateFormats::parse(&answer.data).map_err(|_| "a list that runs past its page")?;
        Ok(StateFormats { versions: formats.versions().collect(), uuids: formats.uuids().collect() })
    })
}

/// Asks for the controllers of the subsystem from CNTLID `first` on (Identify CNS 13h).
///
/// # Errors
/// [`SubmitError`].
pub fn controllers(driver: &mut Driver, now: Time, first: u16) -> Result<Query<Vec<u16>>, SubmitError> {
    identify(driver, now, Cns::CONTROLLERS, 0, first, |answer| Ok(controller_list(&answer.data).collect()))
}

/// Asks for the controllers that a namespace is attached to, from CNTLID `first` on (Identify CNS 12h).
///
/// # Errors
/// [`SubmitError`].
pub fn namespace_controllers(
    driver: &mut Driver,
    now: Time,
    nsid: u32,
    first: u16,
) -> Result<Query<Vec<u16>>, SubmitError> {
    let parse = |answer: &AdminAnswer| Ok(controller_list(&answer.data).collect());
    identify(driver, now, Cns::NAMESPACE_CONTROLLERS, nsid, first, parse)
}

/// Asks for the active namespaces above `after`, at most 1,024 (Identify CNS 02h).
///
/// # Errors
/// [`SubmitError`].
pub fn active_namespaces(driver: &mut Driver, now: Time, after: u32) -> Result<Query<Vec<u32>>, SubmitError> {
    identify(driver, now, Cns::ACTIVE_NAMESPACES, after, 0, |answer| Ok(nsid_list(&answer.data).collect()))
}

/// Asks what a namespace is (Identify CNS 00h). An inactive one is all zeroes.
///
/// # Errors
/// [`SubmitError`].
pub fn identify_namespace(
    driver: &mut Driver,
    now: Time,
    nsid: u32,
) -> Result<Query<Box<IdentifyNamespace>>, SubmitError> {
    identify(driver, now, Cns::NAMESPACE, nsid, 0, |answer| {
        IdentifyNamespace::read_from_bytes(&answer.data).map(Box::new).map_err(|_| "a page of another length")
    })
}

fn identify<T>(
    driver: &mut Driver,
    now: Time,
    cns: Cns,
    nsid: u32,
    cntid: u16,
    parse: fn(&AdminAnswer) -> Result<T, &'static str>,
) -> Result<Query<T>, SubmitError> {
    let entry = SubmissionEntry::identify(cns, nsid, cntid, CommandSetId::NVM);
    Query::send(driver, now, cns.name().unwrap_or("Identify"), &entry, AdminData::In(IDENTIFY_BYTES), parse)
}

/// Limits the commands per second of a migratable controller of ours (vendor feature C0h); 0 lifts the limit.
///
/// # Errors
/// [`SubmitError`].
pub fn set_guest_limit(driver: &mut Driver, now: Time, cntlid: u16, per_second: u32) -> Result<Query<()>, SubmitError> {
    let entry = SubmissionEntry {
        cdw12: per_second,
        ..SubmissionEntry::set_features(FeatureId::VENDOR_GUEST_LIMIT, u32::from(cntlid), false)
    };
    Query::send(driver, now, "Set Features, guest limit", &entry, AdminData::None, nothing)
}

/// Asks for the limit of a migratable controller of ours (vendor feature C0h), commands per second; 0 = none.
///
/// # Errors
/// [`SubmitError`].
pub fn guest_limit(driver: &mut Driver, now: Time, cntlid: u16) -> Result<Query<u32>, SubmitError> {
    let fid = FeatureId::VENDOR_GUEST_LIMIT;
    let entry = SubmissionEntry::get_features(fid, FeatureSelect::CURRENT, u32::from(cntlid));
    Query::send(driver, now, "Get Features, guest limit", &entry, AdminData::None, |a| Ok(a.completion.result as u32))
}

/// Whose state is moved, and in which format: [`StateFormats`] gives the indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSelection {
    /// The migratable controller.
    pub cntlid: u16,
    /// Index of the structure version; 0 = none.
    pub csvi: u8,
    /// Index of the vendor format; 0 = none.
    pub csuuidi: u8,
}

/// A controller's state as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateBytes {
    /// Header, NVMe part, vendor part.
    pub bytes: Vec<u8>,
    /// CSUP of every command was set: the controller was suspended all the time, so the state is consistent.
    pub suspended_throughout: bool,
    /// CSATTR of the header: it was suspended when the state was taken.
    pub suspended: bool,
}

/// Reads a controller's state: the header, then what it announces, in pieces within MDTS (Migration Receive, SEL 0).
#[derive(Debug)]
pub struct StateReader {
    selection: StateSelection,
    limit: usize,
    bytes: Vec<u8>,
    total: usize,
    suspended_throughout: bool,
    ticket: Option<Ticket>,
}

impl StateReader {
    /// A reader of states of up to `limit` bytes. Polling it sends the commands.
    #[must_use]
    pub fn new(selection: StateSelection, limit: usize) -> Self {
        let total = STATE_HEADER_BYTES;
        Self { selection, limit, bytes: Vec::new(), total, suspended_throughout: true, ticket: None }
    }

    /// The state, once; `None` while it is being read.
    pub fn poll(&mut self, driver: &mut Driver, now: Time) -> Option<Result<StateBytes, MmcError>> {
        if let Some(ticket) = self.ticket {
            let answer = driver.answer(ticket)?;
            self.ticket = None;
            if let Err(error) = self.append(answer, driver) {
                return Some(Err(error));
            }
            if self.bytes.len() >= self.total {
                return Some(self.finish());
            }
        }
        match self.ask(driver, now) {
            Ok(ticket) => self.ticket = Some(ticket),
            Err(SubmitError::Full) => {}
            Err(error) => return Some(Err(error.into())),
        }
        None
    }

    fn ask(&self, driver: &mut Driver, now: Time) -> Result<Ticket, SubmitError> {
        let len = (self.total - self.bytes.len()).min(driver.admin_limit());
        let StateSelection { cntlid, csvi, csuuidi } = self.selection;
        let at = self.bytes.len() as u64;
        let entry = SubmissionEntry::get_controller_state(csvi, cntlid, csuuidi, at, (len / 4) as u32);
        driver.request(now, &entry, AdminData::In(len))
    }

    fn append(&mut self, answer: AdminAnswer, driver: &mut Driver) -> Result<(), MmcError> {
        let answer = answer.accepted("Get Controller State")?;
        self.suspended_throughout &= GetControllerStateDw0::from_bits(answer.completion.result as u32).csup();
        self.bytes.extend_from_slice(&answer.data);
        driver.recycle(answer.data);
        if self.total == STATE_HEADER_BYTES && self.bytes.len() == STATE_HEADER_BYTES {
            let header = self.header()?;
            let announced = ControllerState::total_bytes(&header);
            let bytes = announced.map_or(u64::MAX, |bytes| bytes as u64);
            self.total = announced.filter(|total| *total <= self.limit).ok_or(MmcError::TooLarge { bytes, limit: self.limit })?;
        }
        Ok(())
    }

    fn header(&self) -> Result<ControllerStateHeader, MmcError> {
        let bad = MmcError::BadAnswer { command: "Get Controller State", what: "no header" };
        ControllerStateHeader::read_from_prefix(&self.bytes).map(|(header, _)| header).map_err(|_| bad)
    }

    fn finish(&mut self) -> Result<StateBytes, MmcError> {
        let suspended = self.header()?.csattr.suspended();
        let suspended_throughout = self.suspended_throughout;
        Ok(StateBytes { bytes: std::mem::take(&mut self.bytes), suspended_throughout, suspended })
    }
}

/// Writes a controller's state, in pieces within MDTS, one command at a time (Migration Send, SEL 2).
#[derive(Debug)]
pub struct StateWriter {
    selection: StateSelection,
    bytes: Vec<u8>,
    sent: usize,
    ticket: Option<Ticket>,
}

impl StateWriter {
    /// A writer of a state, which is padded to whole dwords. Polling it sends the commands. A failed sequence is started
    /// again with a new writer.
    #[must_use]
    pub fn new(selection: StateSelection, mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().max(STATE_HEADER_BYTES).next_multiple_of(4), 0);
        Self { selection, bytes, sent: 0, ticket: None }
    }

    /// Whether the state fits one command, as some devices want it
    /// ([`Quirks::state_in_one_command`](crate::Quirks::state_in_one_command)).
    #[must_use]
    pub fn fits_one_command(&self, driver: &Driver) -> bool {
        self.bytes.len() <= driver.admin_limit()
    }

    /// The end, once; `None` while the state is being written.
    pub fn poll(&mut self, driver: &mut Driver, now: Time) -> Option<Result<(), MmcError>> {
        if let Some(ticket) = self.ticket {
            let answer = driver.answer(ticket)?;
            self.ticket = None;
            match answer.accepted("Set Controller State") {
                Err(error) => return Some(Err(error.into())),
                Ok(_) if self.sent >= self.bytes.len() => return Some(Ok(())),
                Ok(_) => {}
            }
        }
        let len = (self.bytes.len() - self.sent).min(driver.admin_limit());
        let seqind = match (self.sent == 0, self.sent + len == self.bytes.len()) {
            (true, true) => SequenceIndicator::ONLY,
            (true, false) => SequenceIndicator::FIRST,
            (false, false) => SequenceIndicator::MIDDLE,
            (false, true) => SequenceIndicator::LAST,
        };
        let StateSelection { cntlid, csvi, csuuidi } = self.selection;
        let at = self.sent as u64;
        let entry = SubmissionEntry::set_controller_state(seqind, csvi, cntlid, csuuidi, at, (len / 4) as u32);
        match driver.request(now, &entry, AdminData::Out(&self.bytes[self.sent..self.sent + len])) {
            Ok(ticket) => (self.ticket, self.sent) = (Some(ticket), self.sent + len),
            Err(SubmitError::Full) => {}
            Err(error) => return Some(Err(error.into())),
        }
        None
    }
}
