//! The switch-over, step by step, each timed. Every step that does not end as it must is undone: back to copying while attempts
//! are left, else back altogether. Only when the destination has been told to resume is there a point of no return, and then
//! what the destination's controllers say decides (rules 7, 9, 10).
//!
//! The hand-over is made in this order: the fence in memory, which no reset ends; behind it the question whether the source was
//! suspended throughout; the durable "moved" record; the slots; the state; Resume. So the record never says "moved" while the
//! source could still have taken a command that the destination has not got: whoever finds it after a crash may rely on it.
//!
//! In a hand-over no slot is pointed: behind the record the states are told, and set and resumed when the VM manager brings them
//! to the destination (see [`hand_over`](crate::hand_over)). What fails there is told as well, and can be tried again.
//!
//! In a media move the same controllers go on, so no state is read, no slot pointed and no state set: behind the record the
//! backing is exchanged, and Resume is for the source's controllers (see [`media_move`](crate::media_move)).
//!
//! In a departure the states are made durable and the namespaces detached before the fence is looked behind, and the record is the
//! end: nothing is resumed anywhere (see [`departure`](crate::departure)).

use crate::calls::{Calls, words};
use crate::copy::Purpose;
use crate::departure::{is_settled, other_than};
use crate::hand_over::{Stage, Wish};
use crate::hooks::{Owner, RecordPhase};
use crate::media_move::Way;
use crate::mmc::{Answer, Health};
use crate::open::{resume, suspend, tracked};
use crate::parts::{Parts, has_hole};
use crate::reason::Reason;
use crate::report::{ProgressView, Step};
use crate::rounds::Rounds;
use crate::state::{State, Turn};
use crate::states::{ReadState, WriteState, ask_header, suspended};
use crate::undo::Completing;
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_nvme::status::Status;

/// Steps that a report keeps.
const MAX_PARTS: usize = 64;

/// A switch-over under way.
#[derive(Debug)]
pub(crate) struct Switch {
    /// To go on copying with, after an undo.
    pub(crate) rounds: Rounds,
    step: Step,
    entered: Time,
    suspended_at: Time,
    /// This attempt has been counted, and nothing of the round before goes on.
    prepared: bool,
    calls: Option<Calls>,
    flushing: bool,
    copied_before: u64,
    /// What the last round of a hand-over had copied when it was last seen to get on, and when that was.
    got_on: (u64, Time),
    reads: Vec<ReadState>,
    states: Vec<Vec<u8>>,
    /// Behind the fence each controller of the source is asked whether it is still suspended.
    confirm: Vec<Calls>,
    /// A departure: and which controllers have the namespaces.
    alone: Option<Calls>,
    writes: Vec<WriteState>,
    asking: Option<Asking>,
    /// The fence of those who serve from now on is down.
    admitted: bool,
    /// The management controller of a media move had failed, and was reset: that ends suspensions too.
    forced: bool,
    /// A hand-over: the states were told.
    told: bool,
    /// Since when, and why, controllers were asked before some of them were resumed again.
    asked: Option<(Time, String)>,
}

/// After a resume that did not clearly succeed: each controller is asked whether it is suspended.
#[derive(Debug)]
struct Asking {
    since: Time,
    why: String,
    calls: Vec<Calls>,
}

/// How a step goes.
enum Gone {
    On,
    To(Step),
    Over,
    Doubt(String),
}

impl Switch {
    pub(crate) fn new(rounds: Rounds, now: Time) -> Self {
        Self {
            rounds,
            step: Step::Prepare,
            entered: now,
            suspended_at: now,
            prepared: false,
            calls: None,
            flushing: false,
            copied_before: 0,
            got_on: (0, now),
            reads: Vec::new(),
            states: Vec::new(),
            confirm: Vec::new(),
            alone: None,
            writes: Vec::new(),
            asking: None,
            admitted: false,
            forced: false,
            told: false,
            asked: None,
        }
    }

    pub(crate) fn view(&self, parts: &Parts) -> ProgressView {
        ProgressView { phase: self.step.name(), left_bytes: parts.media.dirty_bytes(), ..self.rounds.view(parts) }
    }

    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Turn {
        // A few steps may be over at once; each costs the guest a poll otherwise.
        for _ in 0..16 {
            let late = self.is_late(parts, now);
            match self.advance(parts, now) {
                Ok(Gone::On) if late && self.is_handed(parts) => self.refuse("it took too long".to_owned(), parts, now),
                Ok(Gone::On) if late => return self.failed("it took too long".to_owned(), parts),
                Ok(Gone::On) => return Turn::Stay,
                Ok(Gone::To(step)) => self.enter(step, parts, now),
                Ok(Gone::Over) => return self.over(parts, now),
                Ok(Gone::Doubt(what)) => {
                    let reason = Reason::SwitchOver { step: self.step, what: "a controller was lost".to_owned() };
                    return Turn::Doubt(reason, what);
                }
                Err(what) if self.is_handed(parts) => self.refuse(what, parts, now),
                Err(what) => return self.failed(what, parts),
            }
        }
        Turn::Stay
    }

    /// The states are out of our hands, or are being set.
    pub(crate) fn is_told(&self) -> bool {
        self.told
    }

    /// A hand-over beyond its record: what fails at the destination is told there, and leaves everything as it was.
    fn is_handed(&self, parts: &Parts) -> bool {
        self.told && parts.hand_over().is_some()
    }

    fn is_late(&mut self, parts: &Parts, now: Time) -> bool {
        let since = match self.step {
            // The VM manager moves states in its own time; a Resume of unknown outcome has a limit of its own.
            Step::Told | Step::Resume => return false,
            Step::LastRound if parts.hand_over().is_some() => {
                let copied = parts.engine.stats().copied;
                if copied != self.got_on.0 {
                    self.got_on = (copied, now);
                }
                self.got_on.1.max(self.entered)
            }
            _ => self.entered,
        };
        now.us_since(since) / 1000 >= self.patience_ms(parts)
    }

    /// The destination could not do what it was asked for.
    fn refuse(&mut self, what: String, parts: &mut Parts, now: Time) {
        let stage = if self.step == Step::Resume { Stage::Taken } else { Stage::Told };
        if let Some(hand_over) = parts.hand_over() {
            hand_over.refuse(stage, what);
        }
        self.writes.clear();
        (self.asking, self.asked, self.admitted) = (None, None, false);
        self.enter(Step::Told, parts, now);
    }

    fn patience_ms(&self, parts: &Parts) -> u64 {
        let extra = if self.step == Step::Compare { parts.config.limits.compare_budget_us / 500 } else { 0 };
        parts.config.limits.step_ms + extra
    }

    fn failed(&mut self, what: String, parts: &mut Parts) -> Turn {
        parts.copying = false;
        parts.engine.set_purpose(Purpose::Copy);
        Turn::Retry(Reason::SwitchOver { step: self.step, what })
    }

    fn enter(&mut self, step: Step, parts: &mut Parts, now: Time) {
        // A VM manager may ask as often as it likes.
        if parts.report.parts.len() < MAX_PARTS {
            parts.report.parts.push((self.step, now.us_since(self.entered)));
        }
        (self.step, self.entered, self.calls, self.flushing) = (step, now, None, false);
    }

    fn advance(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        use Step::{Compare, Detach, Drain, Fence, Flush, Keep, LastRound, ReadState};
        if matches!(self.step, Drain | LastRound | Flush | Compare | ReadState | Keep | Detach | Fence)
            && parts.taps.iter().any(has_hole)
        {
            parts.footing.hole = true;
            let full = parts.taps.iter().any(|tap| tap.pump.as_ref().is_some_and(|pump| pump.marks().full));
            return Err(if full { "a controller data queue was full" } else { "logging was stopped" }.to_owned());
        }
        match self.step {
            Step::Prepare => self.prepare(parts, now),
            Step::Suspend => self.suspend(parts, now),
            Step::Drain => Ok(self.drain(parts)),
            Step::LastRound => self.last_round(parts),
            Step::Flush => self.flush(parts),
            Step::Compare => self.compare(parts),
            Step::ReadState => self.read_state(parts, now),
            Step::Fence => self.fence(parts, now),
            Step::Record => self.record(parts),
            Step::Exchange => exchange(parts, now),
            Step::Point => Ok(self.point(parts)),
            Step::Told => Ok(self.tell(parts)),
            Step::Keep => self.keep(parts),
            Step::Detach => self.detach(parts, now),
            Step::SetState => self.set_state(parts, now),
            Step::Resume => self.resume(parts, now),
        }
    }

    /// The guest still runs: copies end, the destination flushes, its controllers are suspended (again).
    fn prepare(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        parts.copying = false;
        if !self.prepared {
            self.prepared = true;
            parts.report.parts.clear();
            parts.report.attempts += 1;
            parts.extents.by_order();
            parts.engine.limit(now, 0);
            if let Some(departure) = parts.departure() {
                departure.begin();
            }
        }
        if self.calls.is_none() {
            // A command of an attempt before may still be under way: a state that it sets must not come after the new one.
            if parts.destination.outstanding() > 0 {
                return Ok(Gone::On);
            }
            self.calls = Some(suspend(&parts.destinations()));
        }
        let ready = self.calls.as_mut().is_some_and(|calls| calls.poll(now, parts.destination.as_mut()));
        let flushed = self.flushed(parts)?;
        if !(ready && flushed && parts.settle_throttle(now)) {
            return Ok(Gone::On);
        }
        if let Some(answer) = self.calls.as_ref().and_then(Calls::failure) {
            return Err(format!("Suspend at the destination: {}", words(answer)));
        }
        Ok(Gone::To(Step::Suspend))
    }

    /// True when the destination has flushed everything that was written, and nothing is under way.
    fn flushed(&mut self, parts: &mut Parts) -> Result<bool, String> {
        if !self.flushing {
            if parts.engine.in_flight() > 0 {
                return Ok(false);
            }
            parts.engine.flush();
            self.flushing = true;
        }
        if !parts.engine.is_flushed() {
            return Ok(false);
        }
        match parts.engine.take_flush_failure() {
            Some(status) => Err(format!("the destination cannot flush: {status}")),
            None => Ok(true),
        }
    }

    /// The whole set is suspended (rule 7); from the command on the guest waits.
    fn suspend(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        if parts.suspends.is_none() {
            self.suspended_at = now;
            parts.source.forbid_reset(true);
            for pump in parts.taps.iter_mut().filter_map(|tap| tap.pump.as_mut()) {
                pump.hurry(true);
            }
            parts.footing.suspended = true;
            parts.suspends = Some(suspend(&parts.sources()));
        }
        let Some(calls) = &mut parts.suspends else { return Ok(Gone::On) };
        if !calls.poll(now, parts.source.as_mut()) {
            return Ok(Gone::On);
        }
        let failure = calls.failure().map(|answer| format!("Suspend at the source: {}", words(answer)));
        parts.suspends = None;
        match failure {
            Some(what) => Err(what),
            None => Ok(Gone::To(Step::Drain)),
        }
    }

    /// Every queue shows its "last, suspended" mark and nothing behind it.
    fn drain(&mut self, parts: &mut Parts) -> Gone {
        let tracked = parts.taps.iter().take(tracked(parts.taps.len()));
        let marked = parts.overlooks_entries() || tracked.into_iter().all(|tap| tap.pump.as_ref().is_some_and(|pump| pump.marks().suspended));
        if !marked || !(0..parts.taps.len()).all(|index| parts.is_drained(index)) {
            return Gone::On;
        }
        self.copied_before = parts.engine.stats().copied;
        parts.media.release_held();
        parts.extents.sweep();
        parts.copying = true;
        if let Some(hand_over) = parts.hand_over() {
            hand_over.says(Stage::Paused);
        }
        Gone::To(Step::LastRound)
    }

    fn last_round(&mut self, parts: &mut Parts) -> Result<Gone, String> {
        if let Some(error) = parts.engine.error() {
            return Err(error.to_string());
        }
        if !parts.media.is_clean() || parts.engine.in_flight() > 0 {
            return Ok(Gone::On);
        }
        parts.copying = false;
        Ok(Gone::To(Step::Flush))
    }

    fn flush(&mut self, parts: &mut Parts) -> Result<Gone, String> {
        if !self.flushed(parts)? {
            return Ok(Gone::On);
        }
        if !parts.media.is_clean() {
            // The destination restarted: what it had not flushed is dirty again.
            parts.extents.sweep();
            parts.copying = true;
            return Ok(Gone::To(Step::LastRound));
        }
        parts.report.last_round_bytes = parts.engine.stats().copied - self.copied_before;
        let compared = parts.report.parts.iter().any(|part| part.0 == Step::Compare);
        if parts.hint.is_none() || compared {
            return Ok(Gone::To(if parts.is_media_move() { Step::Fence } else { Step::ReadState }));
        }
        parts.engine.set_purpose(Purpose::Compare);
        parts.extents.everything();
        parts.copying = true;
        Ok(Gone::To(Step::Compare))
    }

    /// Every block is compared; what differs has become dirty and is copied (guarantee 1).
    fn compare(&mut self, parts: &mut Parts) -> Result<Gone, String> {
        if let Some(error) = parts.engine.error() {
            return Err(error.to_string());
        }
        if !parts.extents.is_exhausted(&parts.media) || parts.engine.in_flight() > 0 {
            return Ok(Gone::On);
        }
        parts.engine.set_purpose(Purpose::Copy);
        parts.extents.sweep();
        parts.copying = true;
        Ok(Gone::To(Step::LastRound))
    }

    fn read_state(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        if self.reads.is_empty() {
            let format = parts.formats.source;
            self.reads = parts.sources().iter().map(|&cntlid| ReadState::new(cntlid, format, parts.source.as_ref())).collect();
            self.states = vec![Vec::new(); self.reads.len()];
        }
        for (read, state) in self.reads.iter_mut().zip(&mut self.states) {
            if !state.is_empty() {
                continue;
            }
            match read.poll(now, parts.source.as_mut()) {
                None => {}
                Some(Ok(bytes)) => *state = bytes,
                Some(Err(what)) => {
                    // Suspension has ended by itself: the guest may have written since, and logging may have stopped.
                    parts.footing.hole = true;
                    return Err(what);
                }
            }
        }
        if self.states.iter().any(Vec::is_empty) {
            return Ok(Gone::On);
        }
        Ok(Gone::To(if matches!(parts.way, Way::Departure(_)) { Step::Keep } else { Step::Fence }))
    }

    /// The states are what the source's controllers leave: they are durable before those can no longer serve.
    fn keep(&mut self, parts: &mut Parts) -> Result<Gone, String> {
        let sources = parts.sources();
        let Some(departure) = parts.departure() else { return Err("nobody keeps the states".to_owned()) };
        let states = &mut self.states;
        match departure.keep(|| sources.into_iter().zip(std::mem::take(states)).collect()) {
            None => Ok(Gone::On),
            Some(Ok(())) => Ok(Gone::To(Step::Detach)),
            Some(Err(what)) => Err(what),
        }
    }

    /// The fence that a drive has: its controllers lose their namespaces, whoever resets them.
    fn detach(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        if self.calls.is_none() {
            let Some(departure) = parts.departure() else { return Err("there is nothing to detach".to_owned()) };
            self.calls = Some(departure.attachment(false));
            parts.footing.detached = true;
        }
        let Some(calls) = &mut self.calls else { return Ok(Gone::On) };
        if !calls.poll(now, parts.source.as_mut()) {
            return Ok(Gone::On);
        }
        match calls.answers().find(|answer| !is_settled(answer, false)) {
            Some(answer) => Err(format!("Namespace Attachment, detach: {}", words(answer))),
            None => Ok(Gone::To(Step::Fence)),
        }
    }

    /// The fence goes up in memory, then everything that rule 7 asks for is looked at behind it. Suspension is no fence (rule 9):
    /// only a source that is still suspended behind its fence has done nothing since its state was read, and will do nothing.
    fn fence(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        if self.confirm.is_empty() {
            parts.footing.fenced = true;
            if !planted::on(Fault::SourceNotFenced) {
                parts.hooks.fence.raise(Owner::Source);
            }
            self.confirm = parts.sources().iter().map(|&cntlid| ask_header(cntlid, parts.formats.source)).collect();
            self.alone = parts.departure().map(|departure| departure.ask_attached());
        }
        let mut over = self.alone.as_mut().is_none_or(|calls| calls.poll(now, parts.source.as_mut()));
        for calls in &mut self.confirm {
            over &= calls.poll(now, parts.source.as_mut());
        }
        if !over {
            return Ok(Gone::On);
        }
        if !self.confirm.iter().all(|calls| calls.answers().next().and_then(suspended) == Some(true)) {
            parts.footing.hole = true;
            return Err("the source was not suspended throughout".to_owned());
        }
        if let Some(calls) = &self.alone {
            let own = parts.source.identify().map_or(u16::MAX, |identify| identify.cntlid);
            match other_than(own, calls) {
                Ok(None) => {}
                Ok(Some(cntlid)) => return Err(format!("controller {cntlid} has a namespace that was detached")),
                Err(()) => return Err("which controllers have the namespaces was not told".to_owned()),
            }
        }
        if !(0..parts.taps.len()).all(|index| parts.is_drained(index)) {
            return Ok(Gone::On);
        }
        let clean = parts.media.is_clean() && parts.engine.in_flight() == 0;
        let flushed = parts.engine.is_flushed() && parts.media.namespaces().iter().all(|n| n.unflushed().is_empty());
        if !clean || !flushed {
            return Err("blocks became dirty while the guest was suspended".to_owned());
        }
        Ok(Gone::To(Step::Record))
    }

    /// The "moved" record, flushed: from now on a restart finds the destination as the owner.
    fn record(&mut self, parts: &mut Parts) -> Result<Gone, String> {
        if !parts.footing.moved {
            parts.footing.moved = true;
            parts.record(Owner::Destination, RecordPhase::Moved, true);
        }
        match parts.recorded() {
            None => Ok(Gone::On),
            Some(Ok(())) => Ok(match parts.way {
                Way::Media(_) => Gone::To(Step::Exchange),
                Way::Controller => Gone::To(Step::Point),
                Way::HandOver(_) => Gone::To(Step::Told),
                Way::Departure(_) => Gone::Over,
            }),
            Some(Err(error)) => Err(error.to_string()),
        }
    }

    /// The slots: the destination's controllers are suspended, and fetch nothing behind their fence even if a reset ends that.
    fn point(&mut self, parts: &mut Parts) -> Gone {
        parts.footing.pointed = true;
        for cntlid in parts.sources() {
            parts.hooks.slot.point_at_destination(cntlid);
        }
        let states = std::mem::take(&mut self.states);
        self.write(states, parts);
        Gone::To(Step::SetState)
    }

    fn write(&mut self, states: Vec<Vec<u8>>, parts: &Parts) {
        let format = parts.formats.destination;
        let states = parts.destinations().into_iter().zip(states);
        self.writes = states.map(|(cntlid, state)| WriteState::new(cntlid, format, state)).collect();
    }

    /// The states are the VM manager's: it brings them to the destination, and has that run, or takes the guest back.
    fn tell(&mut self, parts: &mut Parts) -> Gone {
        let Some(hand_over) = parts.hand_over() else {
            return Gone::On;
        };
        if !std::mem::replace(&mut self.told, true) {
            hand_over.tell(&self.states);
        }
        // A command of an attempt before may still be under way: the state that it sets must not come after the new one.
        if parts.destination.outstanding() > 0 {
            return Gone::On;
        }
        match hand_over.wish() {
            None => Gone::On,
            Some(Wish::Run) => Gone::To(Step::Resume),
            Some(Wish::Take(states)) => {
                self.write(states, parts);
                Gone::To(Step::SetState)
            }
        }
    }

    /// The destination's manager may have reset the function since: that ends a suspension.
    fn suspended_again(&mut self, parts: &mut Parts, now: Time) -> Result<bool, String> {
        let destinations = parts.destinations();
        let calls = self.calls.get_or_insert_with(|| suspend(&destinations));
        if !calls.poll(now, parts.destination.as_mut()) {
            return Ok(false);
        }
        match calls.failure() {
            Some(answer) => Err(format!("Suspend at the destination: {}", words(answer))),
            None => Ok(true),
        }
    }

    fn set_state(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        if parts.hand_over().is_some() && !self.suspended_again(parts, now)? {
            return Ok(Gone::On);
        }
        while let Some(write) = self.writes.last_mut() {
            match write.poll(now, parts.destination.as_mut()) {
                None => return Ok(Gone::On),
                Some(Ok(())) => {
                    self.writes.pop();
                }
                Some(Err(what)) => return Err(what),
            }
        }
        if let Some(hand_over) = parts.hand_over() {
            hand_over.taken();
            return Ok(Gone::To(Step::Told));
        }
        Ok(Gone::To(Step::Resume))
    }

    /// Resume of the whole set. What does not clearly succeed is found out: controllers that all are still suspended leave the
    /// way back open, controllers that run do not.
    fn resume(&mut self, parts: &mut Parts, now: Time) -> Result<Gone, String> {
        if let Some(asking) = &mut self.asking {
            let patient = now.us_since(asking.since) / 1000 < parts.config.limits.undo_ms;
            return match asking.poll(parts, now) {
                Told::Nothing if patient => Ok(Gone::On),
                Told::Nothing => Ok(doubt(parts, &asking.why)),
                Told::AllActive => {
                    parts.hooks.fence.lower(parts.successor());
                    Ok(Gone::Over)
                }
                // In a media move nothing but forward: some of them may have served from the copy, and been suspended again.
                Told::AllSuspended if !parts.is_media_move() => {
                    parts.footing.resumed = false;
                    Err(asking.why.clone())
                }
                Told::AllSuspended | Told::Some(_) if !patient => Ok(doubt(parts, &asking.why)),
                told => {
                    let again = if let Told::Some(again) = told { again } else { parts.successors() };
                    self.calls = Some(resume(&again));
                    let (since, why) = (asking.since, asking.why.clone());
                    self.asking = None;
                    self.asked = Some((since, why));
                    Ok(Gone::On)
                }
            };
        }
        if self.calls.is_none() {
            parts.footing.resumed = true;
            self.calls = Some(resume(&parts.successors()));
        }
        if !self.admitted {
            // The record names the destination, and it has the state (or the backing): from now on it may serve.
            self.admitted = true;
            parts.hooks.fence.lower(parts.successor());
        }
        let stays = parts.is_media_move();
        let Some(calls) = &mut self.calls else { return Ok(Gone::On) };
        if !calls.poll(now, parts.successors_manager().0) {
            return Ok(Gone::On);
        }
        // A guest that has reset its controller behind the fence has ended the suspension by itself.
        let fine = |answer: &Answer| stays && !answer.unknown && answer.status.is(Status::CONTROLLER_NOT_SUSPENDED);
        let failure = calls.answers().find(|answer| (answer.unknown || answer.status.is_error()) && !fine(answer));
        let Some(answer) = failure else { return Ok(Gone::Over) };
        let why = format!("Resume at the {}: {}", if stays { "source" } else { "destination" }, words(answer));
        let (since, why) = self.asked.take().unwrap_or((now, why));
        self.force(parts, now);
        // Behind the fence, so that the answer holds while it is acted on.
        parts.hooks.fence.raise(parts.successor());
        self.admitted = false;
        self.asking = Some(Asking { since, why, calls: Vec::new() });
        Ok(Gone::On)
    }

    /// A management controller of a media move that has failed is reset: that ends every suspension which it had asked for, and
    /// here that is the way forward.
    fn force(&mut self, parts: &mut Parts, now: Time) {
        if parts.is_media_move() && !self.forced && matches!(parts.source.health(), Health::Failed(_)) {
            self.forced = true;
            parts.source.forbid_reset(false);
            parts.source.reset(now);
        }
    }

    fn over(&mut self, parts: &mut Parts, now: Time) -> Turn {
        if let Some(hand_over) = parts.hand_over() {
            hand_over.says(Stage::Serving);
        }
        parts.report.parts.push((self.step, now.us_since(self.entered)));
        parts.report.downtime_us = Some(now.us_since(self.suspended_at));
        Turn::Next(State::Completing(Completing::new(parts, now)))
    }
}

/// The backings, behind fence and record. The copy has all that the old one has, so a crash on either side loses nothing.
fn exchange(parts: &mut Parts, now: Time) -> Result<Gone, String> {
    let Way::Media(exchange) = &mut parts.way else { return Err("there is nothing to exchange".to_owned()) };
    if !parts.footing.exchanged {
        parts.footing.exchanged = true;
        exchange.exchange();
    }
    match exchange.poll(now) {
        None => Ok(Gone::On),
        Some(Ok(())) => Ok(Gone::To(Step::Resume)),
        Some(Err(what)) => Err(what),
    }
}

/// Nobody knows whether the controllers run. The record says that they are the ones that may.
fn doubt(parts: &mut Parts, why: &str) -> Gone {
    parts.hooks.fence.lower(parts.successor());
    Gone::Doubt(why.to_owned())
}

/// What the controllers said.
enum Told {
    Nothing,
    AllActive,
    AllSuspended,
    /// Some run already, these do not: they have to be resumed as well.
    Some(Vec<u16>),
}

impl Asking {
    fn poll(&mut self, parts: &mut Parts, now: Time) -> Told {
        let controllers = parts.successors();
        let (manager, format) = parts.successors_manager();
        if self.calls.is_empty() {
            self.calls = controllers.iter().map(|&cntlid| ask_header(cntlid, format)).collect();
        }
        let mut over = true;
        for calls in &mut self.calls {
            over &= calls.poll(now, manager);
        }
        if !over {
            return Told::Nothing;
        }
        let told: Option<Vec<bool>> =
            self.calls.iter().map(|calls| calls.answers().next().and_then(suspended)).collect();
        let Some(told) = told else {
            // Unreachable for the moment: ask again.
            self.calls.clear();
            return Told::Nothing;
        };
        let waiting: Vec<u16> = controllers.iter().zip(&told).filter(|(_, suspended)| **suspended).map(|(&id, _)| id).collect();
        match waiting.len() {
            0 => Told::AllActive,
            n if n == controllers.len() => Told::AllSuspended,
            _ => Told::Some(waiting),
        }
    }
}
