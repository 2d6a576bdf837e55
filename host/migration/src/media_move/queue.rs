//! Backings behind the command seam, to be written before they become those of a namespace.

use crate::destination::LocalFeatures;
use dray_device::backing::{Backing, BackingInfo, BackingOp, BackingRequest, Submitted};
use dray_device::command::{CommandQueue, Completion, QueueLimits, SubmitError};
use dray_device::memory::Segment;
use dray_device::poll::Time;
use dray_nvme::command::{MAX_BLOCKS, NvmOpcode, SubmissionEntry};
use dray_nvme::status::Status;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most bytes of one command.
const MAX_TRANSFER: usize = 512 << 10;

/// Why a backing could not be taken from its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// It was never there, or has been taken already.
    #[error("the queue has no backing {0}")]
    None(u32),
    /// Commands are under way in it, or their ends have not been polled: ask again later.
    #[error("commands are under way in backing {0}")]
    UnderWay(u32),
}

struct Place {
    nsid: u32,
    info: BackingInfo,
    backing: Option<Box<dyn Backing>>,
    under_way: usize,
    uncommitted: bool,
}

#[derive(Default)]
struct Places {
    places: Vec<Place>,
    /// What has ended at once, and is told by the next poll.
    ended: Vec<Completion>,
}

impl Places {
    fn find(&mut self, nsid: u32) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| place.nsid == nsid)
    }
}

/// The backings of a [`BackingQueue`], to take them from it and put them back. Clones are the same shelf.
#[derive(Clone)]
pub struct BackingShelf {
    places: Arc<Mutex<Places>>,
}

impl std::fmt::Debug for BackingShelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackingShelf").finish_non_exhaustive()
    }
}

impl BackingShelf {
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a backing is, taken or not.
    #[must_use]
    pub fn info(&self, nsid: u32) -> Option<BackingInfo> {
        self.lock().find(nsid).map(|place| place.info)
    }

    /// Takes a backing from the queue, which answers commands to it with [`SubmitError::Dead`] from now on.
    ///
    /// # Errors
    /// [`TakeError`]; the queue goes on with it.
    pub fn take(&self, nsid: u32) -> Result<Box<dyn Backing>, TakeError> {
        let mut places = self.lock();
        let told = places.ended.is_empty();
        let place = places.find(nsid).ok_or(TakeError::None(nsid))?;
        let idle = place.backing.as_ref().ok_or(TakeError::None(nsid))?.in_flight() == 0;
        if !(told && idle && place.under_way == 0) {
            return Err(TakeError::UnderWay(nsid));
        }
        place.backing.take().ok_or(TakeError::None(nsid))
    }

    /// Puts a backing (back) to the queue, which goes on with it; gives back what was in its place.
    pub fn put(&self, nsid: u32, backing: Box<dyn Backing>) -> Option<Box<dyn Backing>> {
        let mut places = self.lock();
        let info = backing.info();
        if let Some(place) = places.find(nsid) {
            place.info = info;
            return place.backing.replace(backing);
        }
        places.places.push(Place { nsid, info, backing: Some(backing), under_way: 0, uncommitted: false });
        None
    }
}

/// A command queue that ends in backings instead of a controller: Read, Write, Write Zeroes, Write Uncorrectable and Flush (no
/// Compare). It has a single user; the lock is there for whoever takes the backings from it, and is taken by nobody meanwhile.
#[derive(Debug)]
pub struct BackingQueue {
    shelf: BackingShelf,
    depth: u32,
    limits: QueueLimits,
    features: LocalFeatures,
}

impl BackingQueue {
    /// A queue of `depth` commands over backings by NSID, and the shelf to take them apart again.
    #[must_use]
    pub fn new(backings: Vec<(u32, Box<dyn Backing>)>, depth: u32) -> (Self, BackingShelf) {
        let smallest = backings.iter().map(|(_, backing)| backing.info().block_bytes).min().unwrap_or(512);
        let write_uncorrectable = backings.iter().all(|(_, backing)| backing.can_write_uncorrectable());
        let shelf = BackingShelf { places: Arc::default() };
        for (nsid, backing) in backings {
            let _before = shelf.put(nsid, backing);
        }
        shelf.lock().ended.reserve(depth as usize);
        let limits =
            QueueLimits { depth, max_transfer: MAX_TRANSFER, max_write_zeroes: u64::from(MAX_BLOCKS) * u64::from(smallest) };
        let features = LocalFeatures { compare: false, write_uncorrectable, reads_zero: false };
        (Self { shelf: shelf.clone(), depth, limits, features }, shelf)
    }

    /// What a [`LocalDestination`](crate::LocalDestination) over this queue can do.
    #[must_use]
    pub fn features(&self) -> LocalFeatures {
        self.features
    }
}

/// The operation, first block and blocks of a command.
fn operation(entry: &SubmissionEntry) -> Option<(BackingOp, u64, u64)> {
    let cdw12 = entry.rw_cdw12();
    let op = match entry.nvm_opcode() {
        NvmOpcode::READ => BackingOp::Read,
        NvmOpcode::WRITE => BackingOp::Write { fua: cdw12.fua() },
        NvmOpcode::WRITE_ZEROES => BackingOp::WriteZeroes { deallocate: cdw12.deac(), fua: cdw12.fua() },
        NvmOpcode::WRITE_UNCORRECTABLE => BackingOp::WriteUncorrectable,
        NvmOpcode::FLUSH => return Some((BackingOp::Flush, 0, 0)),
        _ => return None,
    };
    Some((op, entry.slba(), u64::from(cdw12.blocks())))
}

impl Place {
    /// `None` when the outcome comes later.
    fn submit(&mut self, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<Option<Status>, SubmitError> {
        let backing = self.backing.as_mut().ok_or(SubmitError::Dead)?;
        let Some((op, slba, blocks)) = operation(entry) else { return Ok(Some(Status::INVALID_OPCODE.with_dnr())) };
        let transfers = matches!(op, BackingOp::Read | BackingOp::Write { .. });
        let bytes = if transfers { blocks * u64::from(self.info.block_bytes) } else { 0 };
        if data.iter().map(|piece| piece.len() as u64).sum::<u64>() != bytes || bytes > MAX_TRANSFER as u64 {
            return Err(SubmitError::BadData);
        }
        if slba.checked_add(blocks).is_none_or(|end| end > self.info.blocks) {
            return Ok(Some(Status::LBA_OUT_OF_RANGE.with_dnr()));
        }
        if op == BackingOp::WriteUncorrectable && !backing.can_write_uncorrectable() {
            return Ok(Some(Status::INVALID_OPCODE.with_dnr()));
        }
        match backing.submit(&BackingRequest { op, slba, blocks, data, tag }) {
            Submitted::Done(status) => Ok(Some(status)),
            Submitted::Busy => Err(SubmitError::Full),
            Submitted::Pending => {
                self.under_way += 1;
                self.uncommitted = true;
                Ok(None)
            }
        }
    }
}

impl CommandQueue for BackingQueue {
    fn limits(&self) -> QueueLimits {
        self.limits
    }

    fn free(&self) -> usize {
        let places = self.shelf.lock();
        let taken = places.ended.len() + places.places.iter().map(|place| place.under_way).sum::<usize>();
        (self.depth as usize).saturating_sub(taken)
    }

    fn submit(&mut self, _now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        if self.free() == 0 {
            return Err(SubmitError::Full);
        }
        let mut places = self.shelf.lock();
        let status = match places.find(entry.nsid) {
            Some(place) => place.submit(entry, data, tag)?,
            None => Some(Status::INVALID_NAMESPACE.with_dnr()),
        };
        if let Some(status) = status {
            places.ended.push(Completion { tag, status, result: 0, unknown: false });
        }
        Ok(())
    }

    fn commit(&mut self) {
        for place in &mut self.shelf.lock().places {
            if std::mem::take(&mut place.uncommitted)
                && let Some(backing) = &mut place.backing
            {
                backing.commit();
            }
        }
    }

    fn poll(&mut self, now: Time, done: &mut dyn FnMut(Completion)) -> usize {
        let mut places = self.shelf.lock();
        let mut count = 0;
        for place in &mut places.places {
            let Some(backing) = &mut place.backing else { continue };
            if place.under_way == 0 {
                continue;
            }
            let under_way = &mut place.under_way;
            backing.poll(now, &mut |tag, status| {
                *under_way = under_way.saturating_sub(1);
                count += 1;
                done(Completion { tag, status, result: 0, unknown: false });
            });
        }
        count += places.ended.len();
        places.ended.drain(..).for_each(done);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::plain::Plain;
    use dray_device::memory::{DmaBuffer, Pages};

    fn ended(queue: &mut BackingQueue) -> Vec<(u64, Status)> {
        let mut all = Vec::new();
        queue.poll(Time(0), &mut |completion| all.push((completion.tag, completion.status)));
        all
    }

    #[test]
    fn commands_reach_the_backing_and_their_ends_come_once() {
        for late in [false, true] {
            let plain = Plain::new(64, late);
            let (mut queue, shelf) = BackingQueue::new(vec![(7, plain.boxed())], 4);
            let data = DmaBuffer::allocate("queue", 4096, Pages::Small).expect("memory");
            data.segment().write(&[0x5a; 4096]);
            let write = SubmissionEntry::write(7, 8, 8);
            queue.submit(Time(0), &write, &[data.segment()], 1).expect("taken");
            queue.submit(Time(0), &SubmissionEntry::flush(7), &[], 2).expect("taken");
            queue.submit(Time(0), &SubmissionEntry::write_zeroes(7, 10, 1, false), &[], 3).expect("taken");
            assert_eq!(queue.free(), 1);
            assert_eq!(shelf.take(7).err(), Some(TakeError::UnderWay(7)), "ends are owed");
            queue.commit();
            let mut all = ended(&mut queue);
            all.sort_unstable_by_key(|end| end.0);
            assert_eq!(all, [1, 2, 3].map(|tag| (tag, Status::SUCCESS)));
            assert_eq!((ended(&mut queue).len(), queue.free()), (0, 4));
            assert_eq!(plain.media()[8 * 512..10 * 512], [0x5a; 1024]);
            assert_eq!(plain.media()[10 * 512..11 * 512], [0; 512]);
            assert!(plain.is_flushed(), "the flush came between");
            // Without its backing the queue is dead, and alive again with it.
            let backing = shelf.take(7).expect("idle");
            assert_eq!(queue.submit(Time(0), &write, &[data.segment()], 4), Err(SubmitError::Dead));
            assert_eq!(shelf.take(7).err(), Some(TakeError::None(7)));
            assert!(shelf.put(7, backing).is_none());
            queue.submit(Time(0), &write, &[data.segment()], 5).expect("taken");
        }
    }

    #[test]
    fn what_cannot_be_is_answered() {
        let (mut queue, _shelf) = BackingQueue::new(vec![(7, Plain::new(64, false).boxed())], 8);
        let data = DmaBuffer::allocate("queue", 4096, Pages::Small).expect("memory");
        let piece = [data.segment()];
        assert_eq!(queue.submit(Time(0), &SubmissionEntry::write(7, 0, 7), &piece, 1), Err(SubmitError::BadData));
        queue.submit(Time(0), &SubmissionEntry::write(7, 60, 8), &piece, 2).expect("taken");
        queue.submit(Time(0), &SubmissionEntry::write(8, 0, 8), &piece, 3).expect("taken");
        queue.submit(Time(0), &SubmissionEntry::compare(7, 0, 8), &piece, 4).expect("taken");
        let statuses: Vec<_> = ended(&mut queue).into_iter().map(|(_, status)| status).collect();
        let expected = [Status::LBA_OUT_OF_RANGE, Status::INVALID_NAMESPACE, Status::INVALID_OPCODE];
        assert!(statuses.iter().zip(expected).all(|(status, wanted)| status.is(wanted)), "{statuses:?}");
    }
}
