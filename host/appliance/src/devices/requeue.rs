//! Queues for backings whose queue has died with a reset of their device.
//!
//! The polling core may not wait for a device. It leaves what it [wants](Wanted) to the device's thread, which makes the queue when
//! the driver has the controller ready again, and finds the answer in a [`Promise`] at one of its next polls. Only functions have
//! this: their reset makes sure that nothing of the old queue takes effect later. A connection that has broken says nothing of what
//! the other side still does.

use super::admin::Admin;
use super::open::DeviceError;
use crate::core::clock::Clock;
use dray_controller::CommandBackingConfig;
use dray_device::command::CommandQueue;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyNamespace};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use zerocopy::FromBytes;

/// Where a queue is: which of the device's, and behind which of its resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// Its number among those that the device has given.
    pub(super) nth: u16,
    /// The device's resets when it was made; `None` where it does not come back with one.
    pub(super) generation: Option<u32>,
}

type Answer = Result<(Box<dyn CommandQueue>, Seat), DeviceError>;

/// An answer to be.
#[derive(Default)]
pub(super) struct Promise(Mutex<Option<Answer>>);

impl fmt::Debug for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Promise").field("is_kept", &self.lock().is_some()).finish()
    }
}

impl Promise {
    fn lock(&self) -> MutexGuard<'_, Option<Answer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, once.
    pub(super) fn take(&self) -> Option<Answer> {
        self.lock().take()
    }
}

/// A queue that is wanted.
struct Wanted {
    config: CommandBackingConfig,
    seat: Seat,
    /// Whoever wants it may be gone.
    promise: Weak<Promise>,
}

/// What is wanted of one device.
#[derive(Default)]
pub(super) struct Requeue(Mutex<Vec<Wanted>>);

impl Requeue {
    fn lock(&self) -> MutexGuard<'_, Vec<Wanted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a queue to that namespace in place of one that has died.
    pub(super) fn want(&self, config: CommandBackingConfig, seat: Seat) -> Arc<Promise> {
        let promise = Arc::new(Promise::default());
        self.lock().push(Wanted { config, seat, promise: Arc::downgrade(&promise) });
        promise
    }

    /// Makes what is wanted, if the device has been reset and is ready again, or says that there will be none.
    pub(super) fn serve(&self, name: &str, admin: &mut Admin, clock: Clock) {
        // Not held while a device takes its time: the polling core asks here.
        let wanted = std::mem::take(&mut *self.lock());
        for one in wanted {
            let Some(promise) = one.promise.upgrade() else { continue };
            let answer = match (admin.failure(), admin.generation()) {
                (Some(why), _) => Some(Err(DeviceError::failed(name, &why))),
                (None, Some(generation)) if one.seat.generation != Some(generation) => Some(again(name, admin, clock, &one, generation)),
                _ => None,
            };
            match answer {
                Some(answer) => *promise.lock() = Some(answer),
                None => self.lock().push(one),
            }
        }
    }
}

fn again(name: &str, admin: &mut Admin, clock: Clock, wanted: &Wanted, generation: u32) -> Answer {
    let CommandBackingConfig { nsid, block_bytes, blocks, .. } = wanted.config;
    let entry = SubmissionEntry::identify(Cns::NAMESPACE, nsid, 0, CommandSetId::NVM);
    let page = admin.ask(name, "Identify Namespace", clock, &entry, IDENTIFY_BYTES)?;
    let identify = IdentifyNamespace::read_from_bytes(&page[..]).ok();
    // Whoever has reset it may have done more.
    let same = |id: &IdentifyNamespace| id.nsze == blocks && id.block_bytes() == Some(block_bytes) && id.format().ms() == 0;
    if !identify.as_ref().is_some_and(same) {
        let why = "is not what it was before the device was reset".to_owned();
        return Err(DeviceError::Namespace { name: name.to_owned(), nsid, why });
    }
    let seat = Seat { generation: Some(generation), ..wanted.seat };
    Ok((admin.queue(name, nsid, seat.nth, clock)?, seat))
}
