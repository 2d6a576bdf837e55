//! Namespaces of a device as where a copy goes: through a queue of the device's own, no backing between, so that the drive can
//! compare.

use super::open::{DeviceError, OpenDevice};
use super::reservation::{Asked, respect};
use crate::moving::local_features;
use dray_device::command::{Completion, SubmitError};
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::poll::Time;
use dray_device::space::SpaceError;
use dray_migration::destination::{DestinationLimits, DestinationRequest};
use dray_migration::{CopyGeometry, Destination, LocalDestination};
use std::sync::Arc;

/// Namespaces of one device. It keeps the device open, and the namespaces from anybody else.
#[derive(Debug)]
pub struct DeviceDestination {
    // Goes before the device does.
    inner: Option<LocalDestination>,
    device: Arc<OpenDevice>,
    taken: Vec<u32>,
}

impl DeviceDestination {
    /// Takes namespaces of a device; what is on them goes. With what they hold, in the same order.
    ///
    /// # Errors
    /// [`DeviceError`]: also where one is write-protected, reserved by another host, or in use here.
    pub(super) fn open(device: Arc<OpenDevice>, nsids: &[u32]) -> Result<(Self, Vec<CopyGeometry>), DeviceError> {
        let mut this = Self { inner: None, device, taken: Vec::new() };
        let mut geometries = Vec::new();
        for &nsid in nsids {
            let config = this.device.namespace(nsid)?;
            if config.write_protected {
                return Err(this.device.namespace_error(nsid, "is write-protected"));
            }
            this.device.take(nsid)?;
            this.taken.push(nsid);
            geometries.push(CopyGeometry { blocks: config.blocks, block_bytes: config.block_bytes });
        }
        let first = nsids.first().copied().unwrap_or(1);
        if nsids.len() > 1 && this.device.has_queue_per_namespace() {
            return Err(this.device.namespace_error(first, "has a queue of its own through the kernel: name one namespace alone"));
        }
        let device = &this.device;
        let mut queue = device.queue(first)?;
        let space = device.space().cloned().unwrap_or_default();
        if nsids.iter().any(|&nsid| device.is_reservable(nsid)) {
            let failed = |error: &dyn std::fmt::Display| DeviceError::failed(device.name(), error);
            let page = DmaBuffer::allocate("dray-report", PAGE, Pages::Small).map_err(|error| failed(&error))?;
            let iova = space.map(&page, true).map_err(|error| failed(&error))?;
            let mine = nsids.iter().filter(|&&nsid| device.is_reservable(nsid));
            let respected = mine.map(|&nsid| respect(Asked::of(device, nsid), &mut *queue, &page)).collect::<Result<Vec<()>, _>>();
            let _nothing_uses_it = space.unmap(iova);
            respected?;
        }
        this.inner = Some(LocalDestination::new(queue, space, local_features(device.identify().as_ref())));
        Ok((this, geometries))
    }
}

impl Destination for DeviceDestination {
    fn limits(&self) -> DestinationLimits {
        let none = DestinationLimits { max_transfer: 0, max_write_zeroes: 0, can_compare: false, can_write_uncorrectable: false };
        self.inner.as_ref().map_or(none, Destination::limits)
    }

    fn attach(&mut self, memory: &DmaBuffer) -> Result<(), SpaceError> {
        self.inner.as_mut().map_or(Ok(()), |inner| inner.attach(memory))
    }

    fn free(&self) -> usize {
        self.inner.as_ref().map_or(0, Destination::free)
    }

    fn submit(&mut self, now: Time, request: &DestinationRequest<'_>, tag: u64) -> Result<(), SubmitError> {
        self.inner.as_mut().map_or(Err(SubmitError::Dead), |inner| inner.submit(now, request, tag))
    }

    fn commit(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.commit();
        }
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        self.inner.as_mut().map_or(0, |inner| inner.poll(now, done))
    }

    fn reads_zero_proved(&self, _nsid: u32) -> bool {
        false
    }

    fn is_dead(&self) -> bool {
        self.device.is_lost() || self.inner.as_ref().is_none_or(Destination::is_dead)
    }

    fn restarts(&self) -> u32 {
        self.inner.as_ref().map_or(0, Destination::restarts)
    }
}

impl Drop for DeviceDestination {
    fn drop(&mut self) {
        self.inner = None;
        self.taken.iter().for_each(|&nsid| self.device.give_back(nsid));
    }
}
