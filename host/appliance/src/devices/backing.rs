//! A namespace of a device as the backing of one of ours.

use super::open::{DeviceError, OpenDevice};
use super::requeue::{Promise, Seat};
use super::reservation::{Asked, respect};
use dray_controller::{CommandBacking, CommandBackingConfig};
use dray_device::backing::{Backing, BackingInfo, BackingRequest, Submitted};
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::Time;
use dray_nvme::status::Status;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the memory that data goes through where the device cannot reach the guest's.
const BOUNCE_BYTES: usize = 2 << 20;
/// How long operations wait for a device that was reset.
const RECOVERY_MS: u64 = 30_000;
/// How long operations under way may take to end when the backing goes.
const DRAIN: Duration = Duration::from_secs(10);

/// The backing, and the device that it keeps open.
#[derive(Debug)]
pub struct DeviceBacking {
    // Goes before the device does.
    inner: Option<CommandBacking>,
    bounce: Option<u64>,
    info: BackingInfo,
    write_protected: bool,
    write_uncorrectable: bool,
    config: CommandBackingConfig,
    seat: Seat,
    /// Another queue in place of a dead one, and until when it is waited for.
    waiting: Option<(Time, Arc<Promise>)>,
    /// By the clock of whoever polls it.
    last: Time,
    device: Arc<OpenDevice>,
}

impl DeviceBacking {
    /// Opens a namespace of a device.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub(super) fn open(device: Arc<OpenDevice>, nsid: u32) -> Result<Self, DeviceError> {
        let config = device.namespace(nsid)?;
        device.take(nsid)?;
        let made = Self::over(&device, nsid, config);
        if made.is_err() {
            device.give_back(nsid);
        }
        let (inner, bounce, seat) = made?;
        device.used_by(inner.uses_memory());
        let (write_protected, write_uncorrectable) = (config.write_protected, config.write_uncorrectable);
        let (info, last) = (inner.info(), Time::default());
        Ok(Self { inner: Some(inner), bounce, info, write_protected, write_uncorrectable, config, seat, waiting: None, last, device })
    }

    fn over(
        device: &OpenDevice,
        nsid: u32,
        config: CommandBackingConfig,
    ) -> Result<(CommandBacking, Option<u64>, Seat), DeviceError> {
        let failed = |error: &dyn std::fmt::Display| DeviceError::failed(device.name(), error);
        let memory = DmaBuffer::allocate("dray-bounce", BOUNCE_BYTES, Pages::PreferHuge).map_err(|error| failed(&error))?;
        let bounce = device.space().map(|space| space.map(&memory, true)).transpose().map_err(|error| failed(&error))?;
        let backing = device.seated_queue(nsid).and_then(|(mut queue, seat)| {
            if device.is_reservable(nsid) {
                respect(Asked::of(device, nsid), &mut *queue, &memory)?;
            }
            let mut backing = CommandBacking::new(queue, config, &memory).map_err(|error| failed(&error))?;
            if seat.generation.is_some() {
                backing.outlive_queue();
            }
            Ok((backing, seat))
        });
        if backing.is_err()
            && let (Some(space), Some(iova)) = (device.space(), bounce)
        {
            let _never_used = space.unmap(iova);
        }
        let (backing, seat) = backing?;
        Ok((backing, bounce, seat))
    }

    /// Goes on with another queue when one has died with a reset of the device, or gives up.
    fn look_after_queue(&mut self, now: Time) {
        let Some(inner) = self.inner.as_mut().filter(|inner| inner.is_stranded()) else { return };
        let Some((deadline, promise)) = &self.waiting else {
            self.waiting = Some((now.after_ms(RECOVERY_MS), self.device.want_queue(self.config, self.seat)));
            return;
        };
        let (name, nsid) = (self.device.name(), self.config.nsid);
        let outcome = match promise.take() {
            Some(Ok((queue, seat))) => inner.replace_queue(queue).map(|()| seat).map_err(|error| error.to_string()),
            Some(Err(error)) => Err(error.to_string()),
            None if self.device.is_lost() => Err("it is lost".into()),
            None if now >= *deadline => Err(format!("it did not come back within {} s", RECOVERY_MS / 1000)),
            None => return,
        };
        self.waiting = None;
        match outcome {
            Ok(seat) => {
                self.seat = seat;
                tracing::warn!("device \"{name}\" was reset: namespace {nsid} goes on, nothing of it has failed");
            }
            Err(why) => {
                inner.give_up();
                tracing::error!("device \"{name}\" was reset, and namespace {nsid} fails: {why}");
            }
        }
    }

    fn inner(&mut self) -> Option<&mut CommandBacking> {
        self.inner.as_mut()
    }
}

impl Backing for DeviceBacking {
    fn info(&self) -> BackingInfo {
        self.info
    }

    fn submit(&mut self, request: &BackingRequest<'_>) -> Submitted {
        self.inner().map_or(Submitted::Done(Status::INTERNAL_ERROR), |inner| inner.submit(request))
    }

    fn is_write_protected(&self) -> bool {
        self.write_protected
    }

    fn can_write_uncorrectable(&self) -> bool {
        self.write_uncorrectable
    }

    fn commit(&mut self) {
        if let Some(inner) = self.inner() {
            inner.commit();
        }
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(u64, Status)) -> usize {
        self.last = now;
        let count = self.inner().map_or(0, |inner| inner.poll(now, done));
        self.look_after_queue(now);
        if self.inner.is_some() && self.device.is_lost() && self.in_flight() == 0 {
            // The queue holds the device, which somebody waits for.
            self.inner = None;
        }
        count
    }

    fn wants_poll(&self) -> bool {
        self.inner.is_some() && (self.device.is_lost() || self.waiting.is_some())
    }

    fn in_flight(&self) -> usize {
        self.inner.as_ref().map_or(0, Backing::in_flight)
    }

    fn is_polled_only(&self) -> bool {
        self.waiting.is_some() || self.inner.as_ref().is_some_and(Backing::is_polled_only)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.inner.as_ref().and_then(Backing::waker)
    }
}

impl Drop for DeviceBacking {
    fn drop(&mut self) {
        // What is under way ends first: nobody will take it in afterwards.
        let began = Instant::now();
        while let Some(inner) = self.inner.as_mut().filter(|inner| inner.in_flight() > 0) {
            if began.elapsed() > DRAIN {
                tracing::warn!("{}: {} operations did not end", self.device.name(), inner.in_flight());
                break;
            }
            if inner.is_stranded() {
                inner.give_up();
            }
            inner.poll(self.last.after_us(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)), &mut |_, _| ());
            std::thread::yield_now();
        }
        self.inner = None;
        if let (Some(space), Some(iova)) = (self.device.space(), self.bounce) {
            let _ended = space.unmap(iova);
        }
        self.device.give_back(self.config.nsid);
    }
}
