//! Commands under way by passthrough: each is taken, or refused with nothing done, and comes back exactly once.
//!
//! The kernel gives every command back some time: when the device has answered, when it was aborted after its time-out, when the
//! controller was reset or removed. Until then its memory is held here, whatever the caller does. When the kernel says that a
//! command was cancelled or that the device has gone, the ring is dead: it takes nothing any more, and what is under way comes back
//! as the kernel gives it back. A command that the kernel keeps long after its time-out is reported with an unknown outcome;
//! its memory and its place stay held.
#![allow(unsafe_code)]

use super::abi::{Channel, UringCommand};
use super::carrier::{Carrier, CarrierOptions, Ended, Entry, SetupError, Uring};
use super::outcome::{HostFault, Outcome};
use crate::command::SubmitError;
use crate::memory::{Arena, Segment};
use crate::poll::Time;
use rustix::io::Errno;
use std::ffi::c_void;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Most pieces of one command's data (the kernel's UIO_MAXIOV).
pub const MAX_PIECES: usize = 1024;
/// Most commands under way.
pub const MAX_DEPTH: u32 = 4096;
/// The kernel's own time-outs where a command has none: `nvme_core.io_timeout` and `admin_timeout`.
const DEFAULT_MS: u64 = 60_000;
/// The kernel aborts a command after its time-out, resets the controller after another, and a reset may take CAP.TO: 128 s.
const GIVE_UP_TIMES: u64 = 3;
const GIVE_UP_MS: u64 = 130_000;
/// How often time-outs are looked at, in nanoseconds.
const LOOK_NS: u64 = 250_000_000;

/// What the ring checks of each command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Most bytes of data.
    pub max_transfer: usize,
    /// Most pieces of data, at most [`MAX_PIECES`].
    pub max_pieces: usize,
}

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The command; its pointers and lengths are the ring's to fill in.
    pub command: UringCommand,
    /// Its data, in order; dword-aligned, in whole dwords.
    pub data: &'a [Segment<'a>],
    /// Its metadata, in one piece; dword-aligned.
    pub metadata: Option<Segment<'a>>,
    /// Comes back with the outcome.
    pub tag: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Piece {
    base: *mut c_void,
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Free,
    /// The kernel has it, or is about to.
    Sent,
    /// The kernel has it, and its outcome was given as unknown.
    GivenUp,
}

struct Slot {
    stage: Stage,
    serial: u32,
    tag: u64,
    command: UringCommand,
    vectored: bool,
    fixed: Option<u16>,
    /// It was sent with a registered buffer, refused, and sent again without.
    again: bool,
    pieces: Vec<Piece>,
    hold: Vec<Arc<Arena>>,
    give_up: Time,
}

struct Registered {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
    place: u16,
}

/// Whether commands may name registered buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FixedUse {
    /// Nobody has tried.
    Untried,
    /// One such command got as far as the device.
    Works,
    /// The kernel's NVMe driver refuses them.
    Refused,
}

/// A ring and the commands under way in it. `C` is the kernel except in tests.
pub struct Ring<C: Carrier> {
    carrier: C,
    channel: Channel,
    bounds: Bounds,
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: usize,
    given_up: usize,
    registered: Vec<Registered>,
    fixed_use: FixedUse,
    fault: Option<HostFault>,
    next_look: Time,
}

/// A ring of the kernel's.
pub type PassthruRing = Ring<Uring>;

// SAFETY: the raw pointers in the pieces point into arenas that the same slot holds; nothing is tied to a thread.
unsafe impl<C: Carrier> Send for Ring<C> {}

impl<C: Carrier> std::fmt::Debug for Ring<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PassthruRing")
            .field("channel", &self.channel)
            .field("bounds", &self.bounds)
            .field("in_flight", &self.in_flight)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

impl Ring<Uring> {
    /// A ring for `depth` commands (1 to [`MAX_DEPTH`]) to an open device.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn open(
        device: OwnedFd,
        channel: Channel,
        depth: u32,
        bounds: Bounds,
        wanted: CarrierOptions,
    ) -> Result<Self, SetupError> {
        let depth = depth.clamp(1, MAX_DEPTH);
        Ok(Self::over(Uring::new(device, depth, wanted)?, channel, depth, bounds))
    }
}

impl<C: Carrier> Ring<C> {
    /// A ring over `carrier`, which has room for `depth` entries.
    pub fn over(carrier: C, channel: Channel, depth: u32, bounds: Bounds) -> Self {
        let bounds = Bounds { max_pieces: bounds.max_pieces.min(MAX_PIECES), ..bounds };
        Self {
            carrier,
            channel,
            bounds,
            slots: (0..depth).map(|_| Slot::empty()).collect(),
            free: (0..depth).rev().collect(),
            in_flight: 0,
            given_up: 0,
            registered: Vec::new(),
            fixed_use: FixedUse::Untried,
            fault: None,
            next_look: Time::default(),
        }
    }

    /// What commands are checked against.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Sets what commands are checked against, once more is known of the device.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = Bounds { max_pieces: bounds.max_pieces.min(MAX_PIECES), ..bounds };
    }

    /// Commands that can be under way.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Commands that can be submitted now.
    #[must_use]
    pub fn free(&self) -> usize {
        if self.fault.is_some() { 0 } else { self.free.len() }
    }

    /// Commands whose outcome has not been told.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Why the ring is dead, once it is.
    #[must_use]
    pub fn fault(&self) -> Option<HostFault> {
        self.fault
    }

    /// What the ring is like. `fixed` is false as well once the kernel's driver has refused a registered buffer.
    #[must_use]
    pub fn options(&self) -> CarrierOptions {
        let options = self.carrier.options();
        CarrierOptions { fixed: options.fixed && self.fixed_use != FixedUse::Refused, ..options }
    }

    /// A descriptor that is readable when completions wait; none where they are looked for at the device.
    #[must_use]
    pub fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.carrier.waker()
    }

    /// Registers memory, so that the kernel need not pin it for each command whose data is one piece of it. It is held until
    /// the ring has gone. `false` if it cannot be registered: commands work all the same.
    pub fn register(&mut self, arena: &Arc<Arena>, offset: usize, len: usize) -> bool {
        let known = |known: &Registered| Arc::ptr_eq(&known.arena, arena) && known.covers(offset, len);
        if self.registered.iter().any(known) {
            return true;
        }
        if Segment::new(arena, offset, len).is_none() {
            return false;
        }
        let Some(place) = self.carrier.register(arena, offset, len) else { return false };
        self.registered.push(Registered { arena: Arc::clone(arena), offset, len, place });
        true
    }

    /// Takes a command. It goes to the kernel with the next [`commit`](Self::commit).
    ///
    /// # Errors
    /// [`SubmitError`]; nothing has happened then.
    pub fn submit(&mut self, now: Time, request: &Request<'_>) -> Result<(), SubmitError> {
        if self.fault.is_some() {
            return Err(SubmitError::Dead);
        }
        self.check(request)?;
        let &index = self.free.last().ok_or(SubmitError::Full)?;
        self.fill(index, now, request);
        if !self.push(index) {
            self.slots[index as usize].clear();
            return Err(SubmitError::Full);
        }
        self.free.pop();
        self.in_flight += 1;
        Ok(())
    }

    fn check(&self, request: &Request<'_>) -> Result<(), SubmitError> {
        let aligned = |piece: &Segment<'_>| piece.offset().is_multiple_of(4) && piece.len().is_multiple_of(4) && !piece.is_empty();
        let total = request.data.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.len()));
        let fits = total.is_some_and(|total| total <= self.bounds.max_transfer) && request.data.len() <= self.bounds.max_pieces;
        let metadata = request.metadata.as_ref().is_none_or(|piece| aligned(piece) && u32::try_from(piece.len()).is_ok());
        if fits && metadata && request.data.iter().all(aligned) { Ok(()) } else { Err(SubmitError::BadData) }
    }

    fn fill(&mut self, index: u32, now: Time, request: &Request<'_>) {
        let fixed = self.place_of(request.data);
        let slot = &mut self.slots[index as usize];
        slot.stage = Stage::Sent;
        slot.serial = slot.serial.wrapping_add(1);
        slot.tag = request.tag;
        slot.command = request.command;
        slot.again = false;
        for piece in request.data {
            // Pieces that lie behind each other are one, so that most commands need no array.
            match (slot.pieces.last_mut(), address(piece)) {
                (Some(last), base) if last.base.wrapping_byte_add(last.len) == base => last.len += piece.len(),
                (_, base) => slot.pieces.push(Piece { base, len: piece.len() }),
            }
            slot.hold_once(piece.arena());
        }
        slot.vectored = slot.pieces.len() > 1;
        let (addr, data_len) = match slot.pieces.as_slice() {
            [] => (0, 0),
            [one] => (one.base as u64, one.len),
            many => (many.as_ptr() as u64, many.len()),
        };
        slot.fixed = fixed.filter(|_| !slot.vectored);
        (slot.command.addr, slot.command.data_len) = (addr, data_len as u32);
        (slot.command.metadata, slot.command.metadata_len) = (0, 0);
        if let Some(piece) = &request.metadata {
            (slot.command.metadata, slot.command.metadata_len) = (address(piece) as u64, piece.len() as u32);
            slot.hold_once(piece.arena());
        }
        let own = u64::from(request.command.timeout_ms);
        let timeout_ms = if own == 0 { DEFAULT_MS } else { own };
        slot.give_up = now.after_ms(timeout_ms.saturating_mul(GIVE_UP_TIMES).saturating_add(GIVE_UP_MS));
    }

    /// The registered buffer that all of the data lies in.
    fn place_of(&self, data: &[Segment<'_>]) -> Option<u16> {
        let first = data.first().filter(|_| self.fixed_use != FixedUse::Refused)?;
        let mut whole = *first;
        for piece in &data[1..] {
            whole = whole.joined(piece)?;
        }
        let covers = |known: &&Registered| Arc::ptr_eq(&known.arena, whole.arena()) && known.covers(whole.offset(), whole.len());
        self.registered.iter().find(covers).map(|known| known.place)
    }

    fn push(&mut self, index: u32) -> bool {
        let slot = &self.slots[index as usize];
        let entry = Entry {
            operation: self.channel.operation(slot.vectored),
            command: slot.command.bytes(),
            fixed: slot.fixed,
            user_data: u64::from(slot.serial) << 32 | u64::from(index),
        };
        if self.carrier.push(&entry) {
            return true;
        }
        self.carrier.submit();
        self.carrier.push(&entry)
    }

    /// Hands everything submitted to the kernel: one system call.
    pub fn commit(&mut self) {
        if self.in_flight > 0 && self.carrier.queued() > 0 {
            self.carrier.submit();
        }
    }

    /// Hands ended commands to `done`: the tag and how it ended. Returns how many there were.
    pub fn poll(&mut self, now: Time, done: &mut dyn FnMut(u64, Outcome)) -> usize {
        if self.in_flight + self.given_up == 0 {
            return 0;
        }
        self.commit();
        self.carrier.look();
        let mut count = 0;
        while let Some(ended) = self.carrier.next() {
            count += usize::from(self.end(&ended, done));
        }
        if now >= self.next_look {
            self.next_look = now.after_ns(LOOK_NS);
            count += self.look_at_deadlines(now, done);
        }
        count
    }

    /// Waits until the kernel has something for [`poll`](Self::poll), at most that long: for callers that may block. `false` if
    /// waiting cannot work.
    pub fn wait(&mut self, most: Duration) -> bool {
        self.commit();
        self.carrier.wait(Some(most))
    }

    /// Takes one completion; whether it was the end of a command that somebody waits for.
    fn end(&mut self, ended: &Ended, done: &mut dyn FnMut(u64, Outcome)) -> bool {
        let (index, serial) = (ended.user_data as u32, (ended.user_data >> 32) as u32);
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.stage != Stage::Free && slot.serial == serial);
        let Some(slot) = slot else {
            // Never from the kernel. If it comes, what else is under way can be trusted no more than this.
            self.die(HostFault::Nonsense);
            return false;
        };
        let outcome = Outcome::of(ended.res, ended.result);
        if slot.stage == Stage::GivenUp {
            self.given_up -= 1;
            self.release(index);
            return false;
        }
        if self.tries_without_registered(index, &outcome) {
            return false;
        }
        if let Some(fault) = outcome.is_fatal() {
            self.die(fault);
        }
        let tag = self.slots[index as usize].tag;
        self.in_flight -= 1;
        self.release(index);
        done(tag, outcome);
        true
    }

    /// The first command with a registered buffer is the probe: older kernels refuse it (EINVAL, nothing sent), so it is sent
    /// again without. If that works, registered buffers are not used any more.
    fn tries_without_registered(&mut self, index: u32, outcome: &Outcome) -> bool {
        let slot = &mut self.slots[index as usize];
        let refused = matches!(
            outcome,
            Outcome::NotSent(HostFault::Malformed(Errno::INVAL) | HostFault::Unsupported(_) | HostFault::Malformed(Errno::FAULT))
        );
        if slot.fixed.is_some() {
            if !refused {
                self.fixed_use = FixedUse::Works;
            } else if self.fixed_use != FixedUse::Works && self.fault.is_none() {
                (slot.fixed, slot.again) = (None, true);
                // A queue entry was freed by the completion; without one the refusal is the answer.
                return self.push(index);
            }
        } else if slot.again && !refused {
            self.fixed_use = FixedUse::Refused;
        }
        false
    }

    fn look_at_deadlines(&mut self, now: Time, done: &mut dyn FnMut(u64, Outcome)) -> usize {
        let mut count = 0;
        for slot in self.slots.iter_mut().filter(|slot| slot.stage == Stage::Sent && now >= slot.give_up) {
            slot.stage = Stage::GivenUp;
            done(slot.tag, Outcome::Unknown(HostFault::Overdue));
            count += 1;
        }
        self.in_flight -= count;
        self.given_up += count;
        if count > 0 {
            self.die(HostFault::Overdue);
        }
        count
    }

    fn die(&mut self, fault: HostFault) {
        self.fault.get_or_insert(fault);
    }

    fn release(&mut self, index: u32) {
        self.slots[index as usize].clear();
        self.free.push(index);
    }
}

impl<C: Carrier> Drop for Ring<C> {
    fn drop(&mut self) {
        // What the kernel has may still be written to: wait for it. What it has not taken yet is never sent. The kernel gives
        // everything back some time, after its own time-outs at the latest.
        while self.in_flight + self.given_up > self.carrier.queued() {
            let Some(ended) = self.carrier.next() else {
                if self.carrier.wait(None) {
                    continue;
                }
                break;
            };
            // Sent again after all? No: a refusal is a refusal now.
            self.fixed_use = FixedUse::Works;
            self.end(&ended, &mut |_, _| {});
        }
        if self.in_flight + self.given_up > self.carrier.queued() {
            // Waiting failed: rather leak than free memory that the device may write.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl Registered {
    fn covers(&self, offset: usize, len: usize) -> bool {
        offset >= self.offset && len <= self.len && offset - self.offset <= self.len - len
    }
}

fn address(piece: &Segment<'_>) -> *mut c_void {
    piece.arena().address(piece.offset(), piece.len())
}

impl Slot {
    fn empty() -> Self {
        Self {
            stage: Stage::Free,
            serial: 0,
            tag: 0,
            command: UringCommand::default(),
            vectored: false,
            fixed: None,
            again: false,
            pieces: Vec::new(),
            hold: Vec::new(),
            give_up: Time::NEVER,
        }
    }

    fn clear(&mut self) {
        self.stage = Stage::Free;
        self.pieces.clear();
        self.hold.clear();
    }

    fn hold_once(&mut self, arena: &Arc<Arena>) {
        if !self.hold.iter().any(|held| Arc::ptr_eq(held, arena)) {
            self.hold.push(Arc::clone(arena));
        }
    }
}
