//! The bus between a management controller and its driver, as an analyser and exerciser sits there.
//!
//! The driver is given a function of the bus's own. Registers pass through it; the admin queues end in it: the controller gets
//! rings of the bus, commands and completions are carried over by [`Bus::poll`], and on the way they are shown to the oracles
//! and can be late, lost, doubled or answered by somebody else. Event requests end in the bus on both sides. I/O queues are the
//! driver's own; only their doorbells pass through. Entries of controller data queues are shown in the order of their phase
//! tags, right after the controller has posted them; slots that are given back are written over at once.

mod function;
mod rings;
#[cfg(test)]
mod tests;
mod watch;

use super::event::{Event, Side};
use super::fault::Fault;
use dray_device::function::{Doorbell, Function};
use dray_device::poll::Time;
use dray_nvme::command::{
    AbortCdw10, AbortDw0, AdminOpcode, CdqCdw10, CdqDeleteCdw11, CdqFeatureCdw11, CdqSelect, CompletionEntry, MigrationSendCdw10,
    MigrationSendSelect, StatusPhase, SubmissionEntry, SuspendCdw11,
};
use dray_nvme::event::{AsyncEvent, EventType};
use dray_nvme::feature::FeatureId;
use dray_nvme::registers::{Cc, offset};
use dray_nvme::status::Status;
use function::{BELLS_AT, BusFunction, ENTRIES, PAIRS, Registers};
use rings::{ControllerEnd, DriverEnd};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use watch::Watch;

/// What can go wrong on the way between a driver and its controller. What concerns "the next" of something waits until there
/// is one; of one kind one waits at a time, the last. The seed says whether "the next admin command" passes over those that
/// move the head of a data queue, of which there are so many that nothing else would ever be hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusFault {
    /// The next one-shot event is not delivered.
    EventLost,
    /// The next one-shot event is delivered so many microseconds late.
    EventLate(u64),
    /// The next one-shot event is delivered twice.
    EventDoubled,
    /// The next two entries in a row that lie together name the union of both, each.
    MergeEntries,
    /// The next admin command takes so many microseconds more: some wait before the controller gets them, some behind their
    /// completions, as the seed says.
    AdminSlow(u64),
    /// The next admin command is answered with that status, and the controller never gets it.
    AdminFails(Status),
    /// The next admin command is never answered. Whether the controller gets it is the seed's.
    AdminNever,
    /// CSTS.CFS is set and nothing passes, until CC.EN is cleared.
    Fatal,
    /// The function is gone until then: registers read all ones, nothing passes.
    Gone(Time),
    /// Nothing more goes wrong; a function that is gone comes back. CSTS.CFS stays until CC.EN is cleared.
    Heal,
}

/// What becomes of an admin command's completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Passes,
    Late(u64),
    Lost,
}

/// A command that the controller has, by its identifier there.
#[derive(Clone, Copy, Debug)]
enum Sent {
    Free,
    /// An event request of the bus.
    EventRequest,
    /// The driver's command, with the driver's identifier.
    Command(SubmissionEntry, Fate),
}

/// Most event requests that the bus keeps at the controller.
const MOST_REQUESTS: usize = 8;

/// One side's bus.
#[derive(Debug)]
pub struct Bus {
    side: Side,
    registers: Arc<Registers>,
    random: fastrand::Rng,
    /// Doorbells of the I/O queues, and what was last rung there.
    bells: Vec<(Doorbell, u32)>,
    /// Those before belong to queues that the driver has created since the last reset, or lie between them.
    bells_used: usize,
    controller: ControllerEnd,
    driver: Option<DriverEnd>,
    enables_seen: u32,
    resets_seen: u32,
    enabled: bool,
    sent: Vec<Sent>,
    /// Identifiers of the driver's event requests, oldest first.
    requests: VecDeque<u16>,
    /// Event requests of the bus at the controller, and how many there shall be.
    requests_out: usize,
    requests_wanted: usize,
    /// Events for the driver: when, DW0, DW1, what to count when it is delivered.
    events: VecDeque<(Time, u32, u32, Option<Fault>)>,
    /// Commands that the controller gets later.
    held: Vec<(Time, SubmissionEntry, Fate)>,
    /// Completions that the driver gets later, or as soon as there is room.
    late: Vec<(Time, CompletionEntry, SubmissionEntry)>,
    watches: Vec<Watch>,
    /// The address space's count of changes at the last look.
    mappings_seen: u64,
    event_fault: Option<BusFault>,
    admin_fault: Option<BusFault>,
    /// That one passes over Set Features.
    spares_heads: bool,
    merge: bool,
    gone_until: Time,
    took: Vec<Fault>,
}

impl Bus {
    /// A bus before `inner`, whose driver is given [`function`](Self::function).
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(side: Side, inner: Arc<dyn Function>, seed: u64) -> Self {
        let bell = |word: u32| inner.doorbell(offset::DOORBELLS + word * 4).expect("a doorbell");
        let controller = ControllerEnd::new([bell(0), bell(1)]);
        let bells = (2..2 * PAIRS).map(|word| (bell(word), 0)).collect();
        Self {
            side,
            registers: Arc::new(Registers::new(inner)),
            random: fastrand::Rng::with_seed(seed),
            bells,
            bells_used: 0,
            controller,
            driver: None,
            enables_seen: 0,
            resets_seen: 0,
            enabled: false,
            sent: vec![Sent::Free; ENTRIES as usize],
            requests: VecDeque::new(),
            requests_out: 0,
            requests_wanted: 0,
            events: VecDeque::new(),
            held: Vec::new(),
            late: Vec::new(),
            watches: Vec::new(),
            mappings_seen: 0,
            event_fault: None,
            admin_fault: None,
            spares_heads: false,
            merge: false,
            gone_until: Time(0),
            took: Vec::new(),
        }
    }

    /// The function for the driver. Clones of it are the same.
    #[must_use]
    pub fn function(&self) -> Arc<dyn Function> {
        Arc::new(BusFunction { registers: Arc::clone(&self.registers) })
    }

    /// Lets something go wrong.
    pub fn apply(&mut self, fault: BusFault, _now: Time) {
        match fault {
            BusFault::EventLost | BusFault::EventLate(_) | BusFault::EventDoubled => self.event_fault = Some(fault),
            BusFault::MergeEntries => self.merge = true,
            BusFault::AdminSlow(_) | BusFault::AdminFails(_) | BusFault::AdminNever => {
                (self.admin_fault, self.spares_heads) = (Some(fault), self.random.u8(0..4) > 0);
            }
            BusFault::Fatal => self.registers.fatal.store(self.enabled, Ordering::Relaxed),
            BusFault::Gone(until) => {
                self.gone_until = until;
                self.registers.gone.store(true, Ordering::Relaxed);
            }
            BusFault::Heal => {
                (self.event_fault, self.admin_fault, self.merge) = (None, None, false);
                self.registers.gone.store(false, Ordering::Relaxed);
            }
        }
    }

    /// Faults of events and entries, and [`Fault::AdminSlow`], [`Fault::AdminFails`], [`Fault::AdminNever`], that took effect
    /// since the last call.
    pub fn took(&mut self) -> Vec<Fault> {
        std::mem::take(&mut self.took)
    }

    /// Whether the driver has read all ones since the last call.
    pub fn gone_was_seen(&mut self) -> bool {
        self.registers.gone_seen.swap(false, Ordering::Relaxed)
    }

    /// Whether the driver has read a CSTS.CFS that the bus set since the last call.
    pub fn fatal_was_seen(&mut self) -> bool {
        self.registers.fatal_seen.swap(false, Ordering::Relaxed)
    }

    /// When something happens by itself next.
    #[must_use]
    pub fn next_due(&self) -> Option<Time> {
        let gone = Registers::is(&self.registers.gone).then_some(self.gone_until);
        if gone.is_some() || Registers::is(&self.registers.fatal) {
            return gone;
        }
        let events = self.events.iter().map(|event| event.0).filter(|_| !self.requests.is_empty());
        let held = self.held.iter().map(|held| held.0);
        held.chain(self.late.iter().map(|late| late.0)).chain(events).min()
    }

    /// Carries over what has come since the last call; returns how much it was. Called right after the controller's poll, so
    /// that nobody has seen an entry that is changed here, and right after the driver's.
    pub fn poll(&mut self, now: Time, events: &mut Vec<Event>) -> u32 {
        let resets = self.follow_resets(events);
        // Entries come through memory, whatever the registers say.
        self.watch(events);
        if Registers::is(&self.registers.gone) {
            if now < self.gone_until {
                return resets;
            }
            self.registers.gone.store(false, Ordering::Relaxed);
        }
        if !self.enabled || Registers::is(&self.registers.fatal) {
            return resets;
        }
        let rung = self.ring_through();
        resets + rung + self.take_commands(now, events) + self.take_completions(now, events) + self.deliver(now, events)
    }

    /// Returns how often the controller was reset or enabled.
    fn follow_resets(&mut self, events: &mut Vec<Event>) -> u32 {
        let resets = self.registers.resets.load(Ordering::Relaxed);
        let enabled = Cc::from_bits(self.registers.inner.read32(offset::CC)).en();
        let enables = self.registers.enables.load(Ordering::Relaxed);
        // Somebody may have reset the controller past the bus.
        let past = self.enabled && resets == self.resets_seen && (!enabled || enables != self.enables_seen);
        let mut count = resets.wrapping_sub(self.resets_seen) + u32::from(past);
        for _ in 0..count {
            events.push(Event::ManagementReset { side: self.side });
            self.forget();
        }
        self.resets_seen = resets;
        if enables != self.enables_seen {
            self.enables_seen = enables;
            count += 1;
            self.forget();
            self.driver = DriverEnd::new(&self.registers);
            self.enabled = self.driver.is_some();
        }
        if !enabled {
            self.enabled = false;
        }
        count
    }

    /// What a controller reset takes away.
    fn forget(&mut self) {
        self.sent.fill(Sent::Free);
        self.controller.reset();
        self.driver = None;
        self.enabled = false;
        self.requests.clear();
        (self.requests_out, self.requests_wanted) = (0, 0);
        self.events.clear();
        self.held.clear();
        self.late.clear();
        self.watches.clear();
        self.bells.iter_mut().for_each(|bell| bell.1 = 0);
        self.bells_used = 0;
        self.registers.fatal.store(false, Ordering::Relaxed);
    }

    fn watch(&mut self, events: &mut Vec<Event>) {
        for watch in &mut self.watches {
            if watch.look(self.side, self.merge, events) {
                self.merge = false;
                self.took.push(Fault::EntriesMerged);
            }
        }
        let space = self.registers.inner.space();
        let mappings = space.generation();
        if mappings != self.mappings_seen {
            self.mappings_seen = mappings;
            let side = self.side;
            self.watches.retain(|watch| {
                let mapped = watch.is_mapped(space);
                if !mapped {
                    events.push(Event::CdqUnmapped { side, cdqid: watch.id });
                }
                mapped
            });
        }
    }

    /// Rings at the controller what the driver has rung; returns how many doorbells that was.
    fn ring_through(&mut self) -> u32 {
        let mut count = 0;
        for (word, (bell, rung)) in (2..).zip(&mut self.bells[..self.bells_used]) {
            let value = self.registers.arena.load32(BELLS_AT + word * 4, Ordering::Relaxed);
            if value != *rung {
                *rung = value;
                bell.ring(value);
                count += 1;
            }
        }
        count
    }

    /// The driver's commands.
    fn take_commands(&mut self, now: Time, events: &mut Vec<Event>) -> u32 {
        let mut count = 0;
        while let Some(entry) = self.driver.as_mut().and_then(|driver| driver.next(&self.registers)) {
            count += 1;
            match entry.admin_opcode() {
                AdminOpcode::ASYNC_EVENT_REQUEST => {
                    events.push(Event::Admin { side: self.side, command: entry });
                    self.requests.push_back(entry.cdw0.cid());
                    let wanted = self.requests.len() + self.events.len();
                    self.requests_wanted = self.requests_wanted.max(wanted.min(MOST_REQUESTS));
                }
                AdminOpcode::ABORT => self.abort(now, entry),
                _ => self.admin(now, entry),
            }
        }
        let mut at = 0;
        while let Some(&(due, entry, fate)) = self.held.get(at) {
            if due <= now && self.forward(entry, fate, events) {
                self.held.remove(at);
                count += 1;
            } else {
                at += 1;
            }
        }
        while self.requests_out < self.requests_wanted && self.request_event() {}
        count
    }

    /// An admin command, for which something may go wrong.
    fn admin(&mut self, now: Time, entry: SubmissionEntry) {
        let spared = self.spares_heads && entry.admin_opcode() == AdminOpcode::SET_FEATURES;
        let fault = if spared { None } else { self.admin_fault.take() };
        match fault {
            Some(BusFault::AdminSlow(us)) => {
                self.took.push(Fault::AdminSlow);
                if self.random.bool() {
                    self.held.push((now.after_us(us), entry, Fate::Passes));
                } else {
                    self.held.push((now, entry, Fate::Late(us)));
                }
            }
            Some(BusFault::AdminFails(status)) => {
                self.took.push(Fault::AdminFails);
                self.answer(now, entry, 0, status);
            }
            Some(BusFault::AdminNever) => {
                self.took.push(Fault::AdminNever);
                if self.random.bool() {
                    self.held.push((now, entry, Fate::Lost));
                }
            }
            _ => self.held.push((now, entry, Fate::Passes)),
        }
    }

    /// Answers a command in the controller's place.
    fn answer(&mut self, now: Time, entry: SubmissionEntry, dw0: u32, status: Status) {
        let status_phase = StatusPhase::new().with_status(status);
        let completion = CompletionEntry { dw0, cid: entry.cdw0.cid(), status_phase, ..CompletionEntry::default() };
        self.late.push((now, completion, entry));
    }

    /// Abort names a command of the driver: at the controller it has another identifier, or is not there.
    fn abort(&mut self, now: Time, entry: SubmissionEntry) {
        let cdw10 = AbortCdw10::from_bits(entry.cdw10);
        let there = |sent: &Sent| matches!(sent, Sent::Command(of, _) if of.cdw0.cid() == cdw10.cid());
        if cdw10.sqid() != 0 || self.sent.iter().any(there) {
            self.held.push((now, entry, Fate::Passes));
        } else {
            self.answer(now, entry, AbortDw0::new().with_not_aborted(true).into_bits(), Status::SUCCESS);
        }
    }

    /// Gives a command to the controller; false without room.
    fn forward(&mut self, entry: SubmissionEntry, fate: Fate, events: &mut Vec<Event>) -> bool {
        let Some(cid) = self.free_identifier() else { return false };
        let mut there = entry.with_cid(cid);
        match entry.admin_opcode() {
            AdminOpcode::ABORT => {
                let cdw10 = AbortCdw10::from_bits(entry.cdw10);
                let of = |sent: &Sent| matches!(sent, Sent::Command(of, _) if of.cdw0.cid() == cdw10.cid());
                if cdw10.sqid() == 0
                    && let Some(at) = self.sent.iter().position(of)
                {
                    there.cdw10 = cdw10.with_cid(at as u16).into_bits();
                }
            }
            // The controller begins new queues at 0, so the last value that was rung there is of no meaning.
            AdminOpcode::CREATE_IO_SQ => self.begin_bell(2 * (entry.cdw10 & 0xffff)),
            AdminOpcode::CREATE_IO_CQ => self.begin_bell(2 * (entry.cdw10 & 0xffff) + 1),
            _ => {}
        }
        events.push(Event::Admin { side: self.side, command: entry });
        self.controller.submit(&self.registers, &there);
        self.sent[usize::from(cid)] = Sent::Command(entry, fate);
        true
    }

    fn begin_bell(&mut self, word: u32) {
        let Some(at) = (word as usize).checked_sub(2) else { return };
        if let Some(bell) = self.bells.get_mut(at) {
            bell.1 = 0;
            self.bells_used = self.bells_used.max(at + 1);
            self.registers.arena.store32(BELLS_AT + word as usize * 4, 0, Ordering::Relaxed);
        }
    }

    /// A free identifier, while the queue has room.
    fn free_identifier(&self) -> Option<u16> {
        let used = self.sent.iter().filter(|sent| !matches!(sent, Sent::Free)).count();
        let free = self.sent.iter().position(|sent| matches!(sent, Sent::Free)).filter(|_| used + 1 < self.sent.len());
        free.and_then(|at| u16::try_from(at).ok())
    }

    /// Posts an event request of the bus; false without room.
    fn request_event(&mut self) -> bool {
        let Some(cid) = self.free_identifier() else { return false };
        self.controller.submit(&self.registers, &SubmissionEntry::async_event_request().with_cid(cid));
        self.sent[usize::from(cid)] = Sent::EventRequest;
        self.requests_out += 1;
        true
    }

    /// The controller's completions.
    fn take_completions(&mut self, now: Time, events: &mut Vec<Event>) -> u32 {
        let mut count = 0;
        while let Some(completion) = self.controller.next(&self.registers) {
            count += 1;
            let Some(place) = self.sent.get_mut(usize::from(completion.cid)) else { continue };
            match std::mem::replace(place, Sent::Free) {
                Sent::Free => {}
                Sent::EventRequest => {
                    self.requests_out -= 1;
                    if completion.status().is_error() {
                        self.requests_wanted = self.requests_out;
                    } else {
                        self.reported(now, completion);
                    }
                }
                Sent::Command(entry, fate) => {
                    self.follow_queues(&entry, &completion, events);
                    let completion = CompletionEntry { cid: entry.cdw0.cid(), ..completion };
                    match fate {
                        Fate::Passes => self.late.push((now, completion, entry)),
                        Fate::Late(us) => self.late.push((now.after_us(us), completion, entry)),
                        Fate::Lost => {}
                    }
                }
            }
        }
        while self.requests_out < self.requests_wanted && self.request_event() {}
        count
    }

    /// Data queues that come and go, and their heads.
    fn follow_queues(&mut self, entry: &SubmissionEntry, completion: &CompletionEntry, events: &mut Vec<Event>) {
        if completion.status().is_error() {
            return;
        }
        match entry.admin_opcode() {
            AdminOpcode::CONTROLLER_DATA_QUEUE => match CdqCdw10::from_bits(entry.cdw10).sel() {
                CdqSelect::CREATE => {
                    let watch = Watch::new(self.registers.inner.space(), entry, completion.dw0 as u16);
                    self.watches.extend(watch);
                    // A controller may have logged into it before its answer was here.
                    self.watch(events);
                }
                CdqSelect::DELETE => {
                    let id = CdqDeleteCdw11::from_bits(entry.cdw11).cdqid();
                    self.watches.retain(|watch| watch.id != id);
                }
                _ => {}
            },
            AdminOpcode::SET_FEATURES if entry.cdw10 & 0xff == u32::from(FeatureId::CONTROLLER_DATA_QUEUE.0) => {
                let id = CdqFeatureCdw11::from_bits(entry.cdw11).cdqid();
                self.watches.iter_mut().filter(|watch| watch.id == id).for_each(|watch| watch.given_back(entry.cdw12));
            }
            AdminOpcode::MIGRATION_SEND
                if MigrationSendCdw10::from_bits(entry.cdw10).sel() == MigrationSendSelect::SUSPEND =>
            {
                let cdw11 = SuspendCdw11::from_bits(entry.cdw11);
                self.watches.retain(|watch| !(cdw11.dudmq() && watch.cntlid == cdw11.cntlid()));
            }
            _ => {}
        }
    }

    /// The controller reports an event.
    fn reported(&mut self, now: Time, completion: CompletionEntry) {
        let one_shot = AsyncEvent::from_bits(completion.dw0).event_type() == EventType::ONE_SHOT;
        let fault = if one_shot { self.event_fault.take() } else { None };
        let (dw0, dw1) = (completion.dw0, completion.dw1);
        match fault {
            Some(BusFault::EventLost) => self.took.push(Fault::EventLost),
            Some(BusFault::EventLate(us)) => self.events.push_back((now.after_us(us), dw0, dw1, Some(Fault::EventLate))),
            Some(BusFault::EventDoubled) => {
                self.events.push_back((now, dw0, dw1, None));
                self.events.push_back((now, dw0, dw1, Some(Fault::EventDoubled)));
            }
            _ => self.events.push_back((now, dw0, dw1, None)),
        }
    }

    /// Events and completions whose time has come.
    fn deliver(&mut self, now: Time, events: &mut Vec<Event>) -> u32 {
        let Some(driver) = &mut self.driver else { return 0 };
        let mut count = 0;
        while let Some(&cid) = self.requests.front()
            && let Some(at) = self.events.iter().position(|event| event.0 <= now)
            && let Some(&(_, dw0, dw1, fault)) = self.events.get(at)
        {
            let completion = CompletionEntry { dw0, dw1, cid, ..CompletionEntry::default() };
            if driver.post(&self.registers, completion).is_none() {
                break;
            }
            self.requests.pop_front();
            self.events.remove(at);
            self.took.extend(fault);
            events.push(Event::AsyncEvent { side: self.side, dword0: dw0 });
            count += 1;
        }
        let side = self.side;
        let registers = &self.registers;
        self.late.retain(|(due, completion, command)| {
            let posted = if *due <= now { driver.post(registers, *completion) } else { None };
            if let Some(completion) = posted {
                events.push(Event::AdminEnded { side, command: *command, completion });
                count += 1;
            }
            posted.is_none()
        });
        count
    }
}
