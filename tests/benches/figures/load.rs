//! Random blocks through a queue, whatever it leads to: the load of all I/O rows.
//!
//! Every block of the namespace carries its LBA in its first word and the complement in its last; every read is checked, and
//! of the writes the last ones are looked up in the backing's memory afterwards.

use crate::Failure;
use dray::core::clock::Clock;
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::memory::{Arena, DmaBuffer, Pages, Segment};
use dray_device::poll::Time;
use dray_driver::QueuePair;
use dray_driver::nvme_tcp::TcpQueue;
use dray_nvme::command::SubmissionEntry;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// Bytes of a block, and of a command's data.
pub const BLOCK: usize = 4096;
/// Most commands outstanding.
pub const MOST: usize = 128;
/// The last word of a block.
const LAST: usize = BLOCK - 8;
/// Commands between two looks at the clock.
const PER_LOOK: u64 = 32;
/// Turns without a look at the clock, where the other side is another thread that may have died.
const TURNS: u32 = 1024;
/// Writes that are looked up afterwards.
const REMEMBERED: usize = 4096;
/// How long after its end a run may take to drain.
const PATIENCE_MS: u64 = 20_000;

#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Read,
    Write,
    /// Reads from a backing that copies nothing.
    Null,
}

impl Kind {
    /// What is said of a row's data.
    pub fn checked(self) -> &'static str {
        match self {
            Self::Read => "every read checked",
            Self::Write => "the last 4096 writes looked up",
            Self::Null => "reads; nothing is copied",
        }
    }
}

/// A command queue whose completions go to a consumer that the compiler sees.
pub trait Commands {
    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError>;
    fn commit(&mut self);
    fn poll(&mut self, now: Time, done: impl FnMut(Completion)) -> usize;
}

impl Commands for QueuePair {
    #[inline]
    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        CommandQueue::submit(self, now, entry, data, tag)
    }

    #[inline]
    fn commit(&mut self) {
        CommandQueue::commit(self);
    }

    #[inline]
    fn poll(&mut self, now: Time, done: impl FnMut(Completion)) -> usize {
        self.poll_with(now, done)
    }
}

impl Commands for TcpQueue {
    fn submit(&mut self, now: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        CommandQueue::submit(self, now, entry, data, tag)
    }

    fn commit(&mut self) {
        CommandQueue::commit(self);
    }

    fn poll(&mut self, now: Time, mut done: impl FnMut(Completion)) -> usize {
        CommandQueue::poll(self, now, &mut done)
    }
}

/// Memory in which every block carries its LBA.
pub fn disk(bytes: u64) -> Result<DmaBuffer, Failure> {
    let disk = DmaBuffer::allocate("bench-disk", bytes as usize, Pages::PreferHuge)?;
    for lba in 0..bytes / BLOCK as u64 {
        let at = disk.offset() + lba as usize * BLOCK;
        disk.arena().fill(at, BLOCK, 0);
        sign(disk.arena(), at, lba);
    }
    Ok(disk)
}

/// The same as bytes, for a file.
pub fn block(lba: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    bytes[..8].copy_from_slice(&lba.to_le_bytes());
    bytes[LAST..].copy_from_slice(&(!lba).to_le_bytes());
    bytes
}

fn sign(arena: &Arena, at: usize, lba: u64) {
    arena.store64(at, lba, Relaxed);
    arena.store64(at + LAST, !lba, Relaxed);
}

fn is_signed(arena: &Arena, at: usize, lba: u64) -> bool {
    arena.load64(at, Relaxed) == lba && arena.load64(at + LAST, Relaxed) == !lba
}

/// What a run has come to.
pub struct Ran {
    pub ended: u64,
    pub seconds: f64,
}

impl Ran {
    pub fn iops(&self) -> f64 {
        self.ended as f64 / self.seconds
    }
}

/// The load.
pub struct Load {
    clock: Clock,
    /// A block for each command that may be outstanding.
    data: DmaBuffer,
    /// The memory behind the namespace, where writes are looked up.
    disk: Option<DmaBuffer>,
    blocks: u64,
    nsid: u32,
    random: fastrand::Rng,
    /// Counts writes; each carries its number in the second word.
    sequence: u64,
    /// LBA and number of the last writes.
    written: Vec<(u64, u64)>,
}

impl Load {
    /// `data` has room for [`MOST`] blocks.
    pub fn new(clock: Clock, data: DmaBuffer, disk: Option<DmaBuffer>, (nsid, blocks): (u32, u64)) -> Self {
        let written = vec![(0, 0); REMEMBERED];
        Self { clock, data, disk, blocks, nsid, random: fastrand::Rng::with_seed(4), sequence: 0, written }
    }

    /// Keeps `depth` commands outstanding for a while. `beside` is called in each turn, with `true` where the clock has been read.
    pub fn run<Q: Commands>(
        &mut self,
        queue: &mut Q,
        (kind, depth): (Kind, usize),
        time: Duration,
        mut beside: impl FnMut(Time, bool),
    ) -> Result<Ran, Failure> {
        let mut free: Vec<usize> = (0..depth).collect();
        let mut lbas = vec![0u64; depth];
        let (mut ended, mut wrong, mut next_look, mut turns) = (0u64, 0u64, PER_LOOK, 0);
        let begin = self.clock.now();
        let (mut now, end) = (begin, begin.after_ns(time.as_nanos() as u64));
        while now < end || free.len() < depth {
            if now < end && !free.is_empty() {
                while let Some(slot) = free.pop() {
                    lbas[slot] = self.submit(queue, now, kind, slot)?;
                }
                queue.commit();
            }
            beside(now, false);
            let (arena, base) = (self.data.arena(), self.data.offset());
            ended += queue.poll(now, |completion| {
                let slot = completion.tag as usize;
                let failed = completion.unknown || completion.status.is_error();
                let lied = kind == Kind::Read && !is_signed(arena, base + slot * BLOCK, lbas[slot]);
                wrong += u64::from(failed | lied);
                free.push(slot);
            }) as u64;
            turns += 1;
            if ended >= next_look || now >= end || turns >= TURNS {
                (next_look, turns) = (ended + PER_LOOK, 0);
                beside(now, true);
                now = self.clock.now();
                if now > end.after_ms(PATIENCE_MS) {
                    return Err("commands do not come back".into());
                }
            }
        }
        if wrong > 0 {
            return Err(format!("{wrong} of {ended} commands failed or brought other data than was stored").into());
        }
        if kind == Kind::Write {
            self.look_up()?;
        }
        Ok(Ran { ended, seconds: now.ns_since(begin) as f64 / 1e9 })
    }

    /// µs that a single checked read takes, from before its submission until it has been seen to end.
    pub fn once<Q: Commands>(&mut self, queue: &mut Q) -> Result<f64, Failure> {
        let begin = self.clock.now();
        let lba = self.submit(queue, begin, Kind::Read, 0)?;
        queue.commit();
        let mut status = None;
        let mut now = begin;
        while status.is_none() {
            queue.poll(now, |completion| status = Some(!completion.unknown && !completion.status.is_error()));
            now = self.clock.now();
            if now > begin.after_ms(PATIENCE_MS) {
                return Err("a read does not come back".into());
            }
        }
        if status != Some(true) || !is_signed(self.data.arena(), self.data.offset(), lba) {
            return Err("a read failed or brought other data than was stored".into());
        }
        Ok(now.ns_since(begin) as f64 / 1e3)
    }

    #[inline]
    fn submit<Q: Commands>(&mut self, queue: &mut Q, now: Time, kind: Kind, slot: usize) -> Result<u64, Failure> {
        let lba = self.random.u64(0..self.blocks);
        let data: Segment<'_> = self.data.part(slot * BLOCK, BLOCK).ok_or("no block for the command")?;
        let entry = if kind == Kind::Write {
            self.sequence += 1;
            let at = data.offset();
            sign(data.arena(), at, lba);
            data.arena().store64(at + 8, self.sequence, Relaxed);
            self.written[self.sequence as usize % REMEMBERED] = (lba, self.sequence);
            SubmissionEntry::write(self.nsid, lba, 1)
        } else {
            SubmissionEntry::read(self.nsid, lba, 1)
        };
        queue.submit(now, &entry, &[data], slot as u64)?;
        Ok(lba)
    }

    /// The last writes must be in the backing: theirs, or a later one's.
    fn look_up(&self) -> Result<(), Failure> {
        let Some(disk) = &self.disk else { return Ok(()) };
        for &(lba, sequence) in self.written.iter().filter(|(_, sequence)| *sequence > 0) {
            let at = disk.offset() + lba as usize * BLOCK;
            // Numbers of commands that were outstanding together may have come in either order.
            let found = disk.arena().load64(at + 8, Relaxed);
            if !is_signed(disk.arena(), at, lba) || found + (MOST as u64) < sequence {
                return Err(format!("block {lba} has write {found}, not {sequence}").into());
            }
        }
        Ok(())
    }
}
