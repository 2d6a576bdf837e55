//! A namespace's device, from which queues are made: one for each core that drives it.

use super::PassthruConfig;
use super::about::NamespaceAbout;
use super::error::PassthruError;
use super::node::{Kind, Node};
use super::queue::{PassthruQueue, Use};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::passthru::{Bounds, CarrierOptions, Channel, Outcome, PassthruRing, Request, UringCommand};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long the probe of IOPOLL may take.
const PROBE: Duration = Duration::from_secs(2);

/// An open namespace.
#[derive(Debug)]
pub struct PassthruDevice {
    node: Node,
    about: Arc<NamespaceAbout>,
    bounds: Bounds,
    config: PassthruConfig,
    iopoll: Use,
}

impl PassthruDevice {
    /// Opens `/dev/ngXnY` and asks what it is.
    ///
    /// # Errors
    /// [`PassthruError`].
    pub fn open(path: &Path, config: &PassthruConfig) -> Result<Self, PassthruError> {
        let node = Node::open(path, Kind::Namespace)?;
        let about = Arc::new(NamespaceAbout::ask(&node)?);
        let bounds = about.bounds(&node, config);
        let mut device = Self { node, about, bounds, config: *config, iopoll: Use::NotAsked };
        if config.iopoll {
            device.iopoll = device.probe_iopoll()?;
        }
        Ok(device)
    }

    /// The namespace.
    #[must_use]
    pub fn about(&self) -> &Arc<NamespaceAbout> {
        &self.about
    }

    /// Its name in the kernel: "ng0n1".
    #[must_use]
    pub fn name(&self) -> &str {
        &self.node.name
    }

    /// Another queue.
    ///
    /// # Errors
    /// [`PassthruError`].
    pub fn queue(&self) -> Result<PassthruQueue, PassthruError> {
        let ring = self.ring(self.iopoll == Use::Used)?;
        Ok(PassthruQueue::over(&self.node.name, ring, Arc::clone(&self.about), &self.config, self.iopoll))
    }

    /// Queues for `count` threads; 0 = one for each core that this process may use.
    ///
    /// # Errors
    /// [`PassthruError`]; none is left open then.
    pub fn queues(&self, count: usize) -> Result<Vec<PassthruQueue>, PassthruError> {
        let count = if count == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { count };
        (0..count).map(|_| self.queue()).collect()
    }

    fn ring(&self, iopoll: bool) -> Result<PassthruRing, PassthruError> {
        let wanted = CarrierOptions { iopoll, fixed: self.config.fixed };
        let ring = PassthruRing::open(self.node.again()?, Channel::Io, self.config.depth, self.bounds, wanted);
        ring.map_err(|source| PassthruError::Setup { path: self.node.path.clone(), source })
    }

    /// Whether IOPOLL works: the driver has queues for it, and the kernel carries one read that way.
    fn probe_iopoll(&self) -> Result<Use, PassthruError> {
        if self.node.queue_attribute("io_poll") != Some(1) {
            return Ok(Use::Unavailable("the kernel's driver has no polled queues (nvme.poll_queues)"));
        }
        let mut ring = self.ring(true)?;
        if !ring.options().iopoll {
            return Ok(Use::Unavailable("the kernel has no IOPOLL rings"));
        }
        let (block, metadata) = (self.about.block_bytes as usize, usize::from(self.about.metadata_bytes).next_multiple_of(4));
        let buffer = DmaBuffer::allocate("dray-passthru-probe", block + metadata, Pages::Small)?;
        let inline = self.about.metadata_with_data;
        let data = buffer.part(0, if inline { block + metadata } else { block });
        let command = UringCommand::of(&SubmissionEntry::read(self.about.nsid, 0, 1)).unwrap_or_default();
        let metadata = buffer.part(block, metadata).filter(|piece| !inline && !piece.is_empty());
        let request = Request { command, data: data.as_slice(), metadata, tag: 0 };
        if ring.submit(Time::default(), &request).is_err() || !ring.wait(PROBE) {
            return Ok(Use::Unavailable("a read with IOPOLL cannot be sent"));
        }
        let mut taken = false;
        ring.poll(Time::default(), &mut |_, outcome| taken = matches!(outcome, Outcome::Answered { .. }));
        Ok(if taken { Use::Used } else { Use::Unavailable("the kernel's driver does not take IOPOLL in passthrough (Linux 6.1 does)") })
    }
}
