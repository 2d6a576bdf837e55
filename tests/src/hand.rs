//! A controller of the migration set that the test drives by hand, command by command.

use dray_device::command::Completion;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::slot::{Plug, Slot};
use dray_device::space::{AddressSpace, MappedBuffer};
use dray_driver::{Driver, DriverConfig, PairTicket, QueuePair, QueuePairConfig};
use dray_nvme::command::SubmissionEntry;

/// Bytes of a hand's memory.
const BYTES: usize = 64 << 10;

/// A slot, a driver, one queue.
pub struct Hand {
    /// The slot.
    pub slot: Slot,
    /// The driver.
    pub driver: Driver,
    /// What has ended, in order.
    pub ended: Vec<Completion>,
    ticket: Option<PairTicket>,
    pair: Option<QueuePair>,
    data: MappedBuffer,
}

impl Hand {
    /// A hand on the controller behind that plug.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(plug: &Plug) -> Self {
        let slot = Slot::new(AddressSpace::default(), 2).expect("a slot");
        slot.point_at(plug);
        let driver = Driver::new(slot.function(), DriverConfig::default()).expect("a driver");
        let data = DmaBuffer::allocate("test-hand", BYTES, Pages::Small).expect("memory");
        let data = MappedBuffer::new(driver.space(), data).expect("mapped memory");
        Self { slot, driver, ended: Vec::new(), ticket: None, pair: None, data }
    }

    /// The queue is there.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pair.is_some()
    }

    /// Moves it on; returns how much was done.
    pub fn poll(&mut self, now: Time) -> u32 {
        let mut work = self.driver.poll(now).work;
        match (&mut self.pair, &self.ticket) {
            (Some(pair), _) => {
                let ended = &mut self.ended;
                work += pair.poll_with(now, |completion| ended.push(completion)) as u32;
            }
            (None, None) if self.driver.is_ready() => {
                self.ticket = self.driver.create_queue_pair(now, QueuePairConfig { entries: 64, vector: None }).ok();
            }
            (None, Some(ticket)) => {
                self.pair = self.driver.queue_pair(ticket).map(|pair| pair.expect("a queue pair"));
            }
            (None, None) => {}
        }
        work
    }

    /// Sends a command; its tag is the number of its completion.
    ///
    /// # Panics
    /// When it is not taken.
    pub fn send(&mut self, now: Time, entry: &SubmissionEntry, bytes: usize, byte: u8) {
        let piece = self.data.buffer().part(0, bytes);
        if let Some(piece) = &piece {
            piece.write(&vec![byte; bytes]);
        }
        let pair = self.pair.as_mut().expect("a queue");
        pair.submit(now, entry, piece.as_slice(), 0).expect("the command is taken");
        pair.commit();
    }
}
