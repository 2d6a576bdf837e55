//! What the pump needs of a controller data queue, so that it runs over any owner of one.

use dray_device::poll::Time;

/// Why entries could not be given back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The queue has gone (deleted, its controller was reset or failed).
    #[error("the controller data queue has gone: {0}")]
    Gone(String),
}

/// A controller data queue as its reader sees it (Base 2.3 §8.1.7).
pub trait EntryQueue {
    /// Appends up to `max` new entries, oldest first, and remembers that they were taken; returns how many.
    fn take(&mut self, max: usize, into: &mut Vec<u8>) -> usize;

    /// New entries behind those taken, as far as a bounded look sees.
    fn waiting(&mut self) -> u32;

    /// The last `entries` taken are shown again by the next [`take`](Self::take).
    fn rewind(&mut self, entries: u32);

    /// Gives the oldest `entries` taken back to the controller (Set Features 21h).
    ///
    /// # Errors
    /// [`QueueError`].
    fn give_back(&mut self, now: Time, entries: u32) -> Result<(), QueueError>;
}
