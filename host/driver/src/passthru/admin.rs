//! Admin commands to a controller that the kernel owns, in the shape of the polled driver's: a request is sent, its answer asked
//! for with a ticket.

use super::about::accepted;
use super::error::PassthruError;
use super::node::{Kind, Node};
use super::{PassthruConfig, belongs_to_the_kernel, completion};
use crate::admin::{AdminAnswer, AdminData, MAX_ADMIN_DATA, Ticket};
use crate::requests::Requests;
use dray_device::command::SubmitError;
use dray_device::memory::Pages;
use dray_device::passthru::{Bounds, CarrierOptions, Channel, HostFault, Outcome, PassthruRing, Request, UringCommand, ring};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zerocopy::FromBytes;

/// Requests under way at most, whatever the configuration says: the kernel's admin queue has 32 entries, and its own commands too.
const MOST_UNDER_WAY: u32 = 16;
/// How long one wait of [`PassthruAdmin::ask`] lasts, in milliseconds.
const WAIT_MS: u64 = 500;

/// The admin queue of a controller that the kernel owns, as far as the kernel lends it.
///
/// Data goes through memory of its own, as the driver's does. The kernel tells the direction of data by the opcode's lowest bit:
/// [`AdminData`] that contradicts it is refused, as are commands that [belong to the kernel](belongs_to_the_kernel).
#[derive(Debug)]
pub struct PassthruAdmin {
    ring: PassthruRing,
    requests: Requests,
    limit: usize,
    timeout_ms: u32,
    path: PathBuf,
    name: String,
    identify: Box<IdentifyController>,
    last_fault: Option<HostFault>,
}

impl PassthruAdmin {
    /// Opens `/dev/nvmeX` and asks what it is.
    ///
    /// # Errors
    /// [`PassthruError`].
    pub fn open(path: &Path, config: &PassthruConfig) -> Result<Self, PassthruError> {
        let node = Node::open(path, Kind::Controller)?;
        let mut admin = Self::over(node, config)?;
        let entry = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
        let answer = admin.ask(Time::default(), &entry, AdminData::In(IDENTIFY_BYTES))?;
        let outcome = admin.outcome(&answer);
        accepted(path, "Identify Controller", outcome)?;
        let unusable = |_| PassthruError::Unusable { path: path.to_path_buf(), what: "an Identify structure of another size" };
        *admin.identify = IdentifyController::read_from_bytes(&answer.data[..]).map_err(unusable)?;
        admin.recycle(answer.data);
        let mdts = admin.identify.max_transfer_bytes(0).and_then(|bytes| usize::try_from(bytes).ok());
        admin.limit = MAX_ADMIN_DATA.min(mdts.unwrap_or(MAX_ADMIN_DATA)).min(config.max_transfer_bytes.max(IDENTIFY_BYTES));
        Ok(admin)
    }

    pub(super) fn over(node: Node, config: &PassthruConfig) -> Result<Self, PassthruError> {
        let depth = config.depth.clamp(1, MOST_UNDER_WAY);
        let bounds = Bounds { max_transfer: MAX_ADMIN_DATA, max_pieces: ring::MAX_PIECES };
        let ring = PassthruRing::open(node.file, Channel::Admin, depth, bounds, CarrierOptions::default());
        let ring = ring.map_err(|source| PassthruError::Setup { path: node.path.clone(), source })?;
        Ok(Self {
            ring,
            requests: Requests::new("dray-passthru-admin", depth as usize, Pages::Small)?,
            limit: IDENTIFY_BYTES,
            timeout_ms: config.timeout_ms,
            path: node.path,
            name: node.name,
            identify: Box::default(),
            last_fault: None,
        })
    }

    /// Its name in the kernel: "nvme0".
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identify Controller (CNS 01h), as it was when the device was opened.
    #[must_use]
    pub fn identify(&self) -> &IdentifyController {
        &self.identify
    }

    /// Most bytes of data in one command: MDTS, at most 128 KiB.
    #[must_use]
    pub fn admin_limit(&self) -> usize {
        self.limit
    }

    /// Sends an admin command. `entry` carries everything but the identifier and the data pointer.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then. [`SubmitError::BadData`] also for a command that belongs to the kernel, and for
    /// data against the direction that the opcode says.
    pub fn request(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<Ticket, SubmitError> {
        self.request_within(now, entry, data, 0)
    }

    /// As [`request`](Self::request), with a time-out in milliseconds (0 = the configuration's).
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn request_within(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
        timeout_ms: u32,
    ) -> Result<Ticket, SubmitError> {
        let to_device = entry.cdw0.opcode() & 1 != 0;
        let against = match data {
            AdminData::None => false,
            AdminData::In(_) => to_device,
            AdminData::Out(_) => !to_device,
        };
        if against || belongs_to_the_kernel(entry.admin_opcode()) {
            return Err(SubmitError::BadData);
        }
        if self.ring.fault().is_some() {
            return Err(SubmitError::Dead);
        }
        let mut command = UringCommand::of(entry).ok_or(SubmitError::BadData)?;
        command.timeout_ms = if timeout_ms == 0 { self.timeout_ms } else { timeout_ms };
        let place = self.requests.place(data, self.limit)?;
        let segment = self.requests.segment(&place);
        self.ring.submit(now, &Request { command, data: segment.as_slice(), metadata: None, tag: place.tag() })?;
        self.ring.commit();
        Ok(self.requests.sent(place))
    }

    /// Takes what has ended; how many there were.
    pub fn poll(&mut self, now: Time) -> usize {
        let (requests, fault) = (&mut self.requests, &mut self.last_fault);
        self.ring.poll(now, &mut |tag, outcome| {
            if let Outcome::NotSent(why) | Outcome::Unknown(why) = outcome {
                *fault = Some(why);
            }
            requests.end(completion(tag, outcome));
        })
    }

    /// The answer of a request, once; `None` while it is under way. An answer that was given already, or never asked for while
    /// dozens of others came, is an unknown one.
    pub fn answer(&mut self, ticket: Ticket) -> Option<AdminAnswer> {
        self.requests.answer(ticket)
    }

    /// Takes the buffer of an answer back, for the next one.
    pub fn recycle(&mut self, data: Vec<u8>) {
        self.requests.recycle(data);
    }

    /// Commands under way.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.ring.in_flight()
    }

    /// Why the last command that did not get to the device did not, or why nobody knows.
    #[must_use]
    pub fn last_fault(&self) -> Option<HostFault> {
        self.last_fault
    }

    /// Why nothing is taken any more, once that is so.
    #[must_use]
    pub fn fault(&self) -> Option<HostFault> {
        self.ring.fault()
    }

    /// The descriptor that is readable when commands have ended.
    #[must_use]
    pub fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.ring.waker()
    }

    /// Sends a command and blocks until it has ended, for tools: the kernel's time-outs bound that. Other requests under way go on.
    ///
    /// # Errors
    /// [`PassthruError`]; what the controller says is in the answer.
    pub fn ask(&mut self, now: Time, entry: &SubmissionEntry, data: AdminData<'_>) -> Result<AdminAnswer, PassthruError> {
        self.ask_within(now, entry, data, 0)
    }

    /// As [`ask`](Self::ask), with a time-out in milliseconds (0 = the configuration's).
    ///
    /// # Errors
    /// [`PassthruError`].
    pub fn ask_within(
        &mut self,
        now: Time,
        entry: &SubmissionEntry,
        data: AdminData<'_>,
        timeout_ms: u32,
    ) -> Result<AdminAnswer, PassthruError> {
        let ticket = self.request_within(now, entry, data, timeout_ms)?;
        let mut now = now;
        loop {
            let waits = self.ring.wait(Duration::from_millis(WAIT_MS));
            if self.poll(now) == 0 {
                // Nothing came: that much time has passed, as far as anybody can tell without a clock.
                now = now.after_ms(WAIT_MS);
            }
            if let Some(answer) = self.answer(ticket) {
                return Ok(answer);
            }
            if !waits {
                return Err(PassthruError::Unusable { path: self.path.clone(), what: "the kernel does not let this process wait" });
            }
        }
    }

    /// The outcome behind the answer that was polled last, for messages: [`last_fault`](Self::last_fault) knows which errno it was.
    #[must_use]
    pub fn outcome(&self, answer: &AdminAnswer) -> Outcome {
        match self.last_fault {
            Some(fault) if answer.completion.unknown => Outcome::Unknown(fault),
            Some(fault) if answer.completion.status == fault.status() => Outcome::NotSent(fault),
            _ => Outcome::Answered { status: answer.completion.status, result: answer.completion.result },
        }
    }
}
