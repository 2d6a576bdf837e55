//! What a command can be sent to.

use super::arguments::{Direction, Plan};
use crate::core::clock::Clock;
use dray_device::command::{CommandQueue, SubmitError};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::passthru::Outcome;
use dray_driver::AdminData;
use dray_driver::passthru::{PassthruAdmin, PassthruConfig, PassthruError, PassthruQueue, belongs_to_the_kernel, node};
use miette::{IntoDiagnostic, miette};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Devices of the kernel's names.
const SYS: &str = "/sys";

/// How a command ended, and what it brought.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) outcome: Outcome,
    /// Empty unless data came from the controller and the command succeeded.
    pub(super) data: Vec<u8>,
    pub(super) metadata: Vec<u8>,
}

impl Reply {
    /// Whether the controller has said that all is well.
    pub(super) fn outcome_is_success(&self) -> bool {
        matches!(self.outcome, Outcome::Answered { status, .. } if !status.is_error())
    }
}

/// A device that takes one command at a time.
pub(super) trait Target {
    /// The NSID that is meant when none is given.
    fn default_nsid(&self) -> u32;

    /// The block devices whose content a command might change.
    fn block_devices(&self) -> Vec<String>;

    /// Sends the command and waits for its end.
    fn send(&mut self, plan: &Plan) -> miette::Result<Reply>;
}

/// Opens a device by its name.
pub(super) fn open(device: &str, is_admin: bool) -> miette::Result<Box<dyn Target>> {
    let path = Path::new(device);
    if !is_admin {
        let config = PassthruConfig { depth: 1, max_transfer_bytes: usize::MAX, fixed: false, ..PassthruConfig::default() };
        let queue = PassthruQueue::open(path, &config).map_err(|error| match error {
            PassthruError::IsController { .. } => miette!(help = "`--admin` sends it an admin command", "{error}"),
            other => miette!("{other}"),
        })?;
        return Ok(Box::new(Namespace { queue, device: device.into() }));
    }
    let config = PassthruConfig { depth: 1, ..PassthruConfig::default() };
    let admin = match PassthruAdmin::open(path, &config) {
        // A namespace stands for its controller.
        Err(PassthruError::IsNamespace { right, .. }) => PassthruAdmin::open(&right, &config),
        other => other,
    };
    Ok(Box::new(Controller { admin: admin.map_err(|error| miette!("{error}"))? }))
}

struct Namespace {
    queue: PassthruQueue,
    device: PathBuf,
}

impl Target for Namespace {
    fn default_nsid(&self) -> u32 {
        self.queue.about().nsid
    }

    fn block_devices(&self) -> Vec<String> {
        node::block_devices(self.queue.name(), Path::new(SYS))
    }

    fn send(&mut self, plan: &Plan) -> miette::Result<Reply> {
        let most = self.queue.limits().max_transfer;
        if plan.data.len() > most {
            return Err(miette!("{}: {} bytes of data, and one command takes {most}", self.device.display(), plan.data.len()));
        }
        let (data, metadata) = (filled(&plan.data)?, filled(&plan.metadata)?);
        let pieces: Vec<_> = data.iter().map(DmaBuffer::segment).collect();
        let clock = Clock::new();
        let second = metadata.as_ref().map(DmaBuffer::segment);
        let sent = self.queue.submit_with(clock.now(), &plan.entry, &pieces, second, plan.timeout_ms, 0);
        sent.into_diagnostic()?;
        self.queue.commit();
        let mut ended = None;
        while ended.is_none() {
            let waits = self.queue.wait(Duration::from_secs(1));
            self.queue.poll_outcomes(clock.now(), &mut |_, outcome| ended = Some(outcome));
            if !waits && ended.is_none() {
                return Err(miette!("{}: the kernel does not let this process wait", self.device.display()));
            }
        }
        let outcome = ended.unwrap_or(Outcome::Unknown(dray_device::passthru::HostFault::Overdue));
        let mut reply = Reply { outcome, data: Vec::new(), metadata: Vec::new() };
        if plan.direction == Direction::FromController && reply.outcome_is_success() {
            reply.data = taken(data.as_ref());
            reply.metadata = taken(metadata.as_ref());
        }
        Ok(reply)
    }
}

fn filled(bytes: &[u8]) -> miette::Result<Option<DmaBuffer>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let buffer = DmaBuffer::allocate("dray-passthru", bytes.len(), Pages::Small).into_diagnostic()?;
    buffer.segment().write(bytes);
    Ok(Some(buffer))
}

fn taken(buffer: Option<&DmaBuffer>) -> Vec<u8> {
    buffer.map_or_else(Vec::new, |buffer| {
        let mut bytes = vec![0; buffer.len()];
        buffer.segment().read(&mut bytes);
        bytes
    })
}

struct Controller {
    admin: PassthruAdmin,
}

impl Target for Controller {
    fn default_nsid(&self) -> u32 {
        0
    }

    fn block_devices(&self) -> Vec<String> {
        node::block_devices(self.admin.name(), Path::new(SYS))
    }

    fn send(&mut self, plan: &Plan) -> miette::Result<Reply> {
        let opcode = plan.entry.admin_opcode();
        if belongs_to_the_kernel(opcode) {
            return Err(miette!(
                "{opcode} (opcode {:02X}h) is the kernel's alone: its driver would lose the controller",
                opcode.0
            ));
        }
        if !plan.metadata.is_empty() {
            return Err(miette!("admin commands have no metadata"));
        }
        let most = self.admin.admin_limit();
        if plan.data.len() > most {
            return Err(miette!("{}: {} bytes of data, and one admin command takes {most}", self.admin.name(), plan.data.len()));
        }
        let data = match plan.direction {
            Direction::None => AdminData::None,
            Direction::FromController => AdminData::In(plan.data.len()),
            Direction::ToController => AdminData::Out(&plan.data),
        };
        let answer = self.admin.ask_within(Clock::new().now(), &plan.entry, data, plan.timeout_ms).map_err(|error| match error {
            PassthruError::Submit(SubmitError::BadData) => miette!("the data cannot be described to the device"),
            other => miette!("{other}"),
        })?;
        Ok(Reply { outcome: self.admin.outcome(&answer), data: answer.data, metadata: Vec::new() })
    }
}
