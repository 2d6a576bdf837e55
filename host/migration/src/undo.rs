//! The two ends: completing a move that has succeeded, and undoing one that has not.
//!
//! An undo takes back what [`Footing`](crate::parts::Footing) says, the record first if "moved" may be durable, then the backings
//! if they were exchanged, or the namespaces are attached if they were detached, then fence and slots, then the source is resumed
//! (rules 9 and 10). It ends with the source serving, or says plainly that it could not.

use crate::calls::{Calls, words};
use crate::copy::Purpose;
use crate::departure::is_settled;
use crate::hooks::{Owner, RecordPhase};
use crate::media_move::Way;
use crate::mmc::Health;
use crate::open::resume;
use crate::parts::Parts;
use crate::reason::Reason;
use crate::report::Outcome;
use crate::rounds::Rounds;
use crate::state::{State, Turn};
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_nvme::status::Status;

/// Cleaning up after a move.
#[derive(Debug)]
pub(crate) struct Completing {
    since: Time,
    recorded: bool,
}

impl Completing {
    pub(crate) fn new(parts: &mut Parts, now: Time) -> Self {
        delete_queues(parts, now);
        parts.record(Owner::Destination, RecordPhase::Done, true);
        Self { since: now, recorded: false }
    }

    /// The destination serves whatever happens here: the "moved" record says so, and the fence is up. (In a media move the copy
    /// serves, behind the same controllers; they have been throttled for the move alone.)
    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Turn {
        self.recorded |= parts.recorded().is_some();
        let late = now.us_since(self.since) / 1000 >= parts.config.limits.undo_ms;
        let mut unthrottled = true;
        if parts.is_media_move() {
            parts.limit_guest(0);
            unthrottled = parts.settle_throttle(now) || parts.source.health() != Health::Ready;
        }
        let over = self.recorded && unthrottled;
        if !over && !late {
            return Turn::Stay;
        }
        parts.source.forbid_reset(false);
        Turn::End(Outcome::Moved)
    }
}

pub(crate) fn delete_queues(parts: &mut Parts, now: Time) {
    for tap in std::mem::take(&mut parts.taps) {
        if let Some(pump) = &tap.pump {
            parts.past_pumps.add(&pump.stats());
        }
        parts.source.delete_queue(now, tap.key);
    }
}

/// The steps of an undo.
#[derive(Debug)]
enum Step {
    /// The record says "source" before anything relies on it.
    Record { written: bool },
    /// The namespaces get their old backings back; the fence is still up.
    Exchange { begun: bool },
    /// The namespaces are attached to the source's controllers again, which are still suspended.
    Attach(Option<Calls>),
    /// The source's controllers are resumed.
    Resume(Option<Calls>),
    /// The guest's limit is lifted.
    Unthrottle,
    /// The last record.
    Close { written: bool },
}

/// An undo under way.
#[derive(Debug)]
pub(crate) struct Undoing {
    pub(crate) reason: Reason,
    /// Only the switch-over is undone: copying goes on with these rounds.
    rounds: Option<Box<Rounds>>,
    step: Step,
    since: Time,
    reset: bool,
    /// Why the present step does not end.
    trouble: String,
}

impl Undoing {
    pub(crate) fn new(reason: Reason, rounds: Option<Box<Rounds>>, parts: &mut Parts, now: Time) -> Self {
        parts.copying = false;
        parts.extents.by_order();
        parts.engine.set_purpose(Purpose::Copy);
        Self { reason, rounds, step: Step::Record { written: false }, since: now, reset: false, trouble: String::new() }
    }

    /// No attempt will follow: cancelled while an attempt was being undone.
    pub(crate) fn give_up(&mut self, reason: Reason) {
        if self.rounds.take().is_some() {
            self.reason = reason;
        }
    }

    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Turn {
        let late = now.us_since(self.since) / 1000 >= parts.config.limits.undo_ms;
        match &mut self.step {
            Step::Record { written } => {
                if !parts.footing.moved || planted::on(Fault::UndoneWithoutRecord) {
                    parts.footing.moved = false;
                    self.exchange_back(parts);
                } else if !*written {
                    // One record at a time: how an earlier one ends no longer matters.
                    if !parts.writing || parts.recorded().is_some() {
                        *written = true;
                        parts.record(Owner::Source, RecordPhase::Copying, false);
                    }
                } else if let Some(result) = parts.recorded() {
                    match result {
                        Ok(()) => {
                            parts.footing.moved = false;
                            self.exchange_back(parts);
                        }
                        Err(error) => (self.trouble, *written) = (error.to_string(), false),
                    }
                }
                // While the record may say "moved" the source must not run: a restart would find two owners.
                if late && parts.footing.moved {
                    return self.doubt("the record of the undo could not be written");
                }
            }
            Step::Exchange { begun } => {
                let Way::Media(exchange) = &mut parts.way else {
                    self.point_back(parts);
                    return Turn::Stay;
                };
                if !std::mem::replace(begun, true) {
                    exchange.undo();
                }
                match exchange.poll(now) {
                    Some(Ok(())) => {
                        parts.footing.exchanged = false;
                        self.point_back(parts);
                    }
                    Some(Err(what)) => (self.trouble, *begun) = (what, false),
                    None => {}
                }
                // The record says "source", and the fence is up: the guest waits rather than write to the copy.
                if late && parts.footing.exchanged {
                    return self.doubt("the backing could not be exchanged back");
                }
            }
            Step::Attach(_) => {
                if self.attach(parts, now) {
                    parts.footing.detached = false;
                    self.point_back(parts);
                } else if late {
                    return self.doubt("the namespaces could not be attached to the source's controllers again");
                }
            }
            Step::Resume(_) => {
                if self.resume(parts, now) {
                    return self.resumed(parts, now);
                }
                if late {
                    return self.doubt("the source could not be resumed");
                }
            }
            Step::Unthrottle => {
                parts.limit_guest(0);
                let unthrottled = parts.settle_throttle(now) || parts.source.health() != Health::Ready;
                // A write that lands after the end would come behind those of a later attempt (rule 2), and a state that is set
                // then behind the state of a later one.
                let copies_ended = parts.engine.may_write() == 0 && parts.destination.outstanding() == 0;
                if late && !copies_ended {
                    parts.destination.reset(now);
                }
                // A Track Send that comes late would switch off the log of a later attempt. Nothing is suspended here any more, so
                // a reset of the source's management controller takes nothing from the guest.
                let commands_ended = parts.source.outstanding() == 0;
                if late && !commands_ended {
                    parts.source.reset(now);
                }
                if unthrottled && copies_ended && commands_ended || late {
                    delete_queues(parts, now);
                    self.step = Step::Close { written: false };
                }
            }
            Step::Close { written } => {
                if !parts.footing.recorded {
                    return Turn::End(Outcome::Undone(self.reason.clone()));
                }
                if !*written && (!parts.writing || parts.recorded().is_some()) {
                    *written = true;
                    parts.record(Owner::Source, RecordPhase::Undone, false);
                } else if *written && parts.recorded().is_some() || late {
                    // The record before says "source" as well.
                    return Turn::End(Outcome::Undone(self.reason.clone()));
                }
            }
        }
        Turn::Stay
    }

    fn doubt(&self, what: &str) -> Turn {
        Turn::Doubt(self.reason.clone(), format!("{what}: {}", self.trouble))
    }

    fn exchange_back(&mut self, parts: &mut Parts) {
        if parts.footing.exchanged {
            self.step = Step::Exchange { begun: false };
        } else if parts.footing.detached {
            self.step = Step::Attach(None);
        } else {
            self.point_back(parts);
        }
    }

    fn point_back(&mut self, parts: &mut Parts) {
        if std::mem::take(&mut parts.footing.fenced) {
            parts.hooks.fence.lower(Owner::Source);
        }
        if std::mem::take(&mut parts.footing.pointed) {
            for cntlid in parts.sources() {
                parts.hooks.slot.point_at_source(cntlid);
            }
        }
        self.step = Step::Resume(None);
    }

    /// True when the source's controllers have their namespaces.
    fn attach(&mut self, parts: &mut Parts, now: Time) -> bool {
        if self.failed_and_reset(parts, now) {
            if let Step::Attach(calls) = &mut self.step {
                *calls = None;
            }
            return false;
        }
        let Step::Attach(calls) = &mut self.step else { return false };
        if calls.is_none() {
            *calls = parts.departure().map(|departure| departure.attachment(true));
        }
        let Some(open) = calls else { return true };
        if !open.poll(now, parts.source.as_mut()) {
            return false;
        }
        let bad = open.answers().find(|answer| !is_settled(answer, true));
        if let Some(answer) = bad {
            self.trouble = format!("Namespace Attachment, attach: {}", words(answer));
            *calls = None;
            return false;
        }
        true
    }

    /// A management controller that has failed is reset, once: that ends every suspension it had asked for, and here it is the way
    /// back.
    fn failed_and_reset(&mut self, parts: &mut Parts, now: Time) -> bool {
        let Health::Failed(why) = parts.source.health() else { return false };
        if self.reset {
            return false;
        }
        self.trouble = why;
        self.reset = true;
        parts.footing.hole = true;
        parts.source.forbid_reset(false);
        parts.source.reset(now);
        true
    }

    /// True when the source's controllers run.
    fn resume(&mut self, parts: &mut Parts, now: Time) -> bool {
        if !parts.footing.suspended {
            return true;
        }
        if self.failed_and_reset(parts, now) {
            self.step = Step::Resume(None);
            return false;
        }
        let Step::Resume(calls) = &mut self.step else { return false };
        if let Some(open) = &mut parts.suspends {
            // Suspend is still under way: a Resume before it ends would be too early. One that does not end, ends by a reset.
            if !open.poll(now, parts.source.as_mut()) {
                if now.us_since(self.since) / 1000 >= parts.config.limits.step_ms && !self.reset {
                    self.trouble = "Suspend does not end".to_owned();
                    self.reset = true;
                    parts.footing.hole = true;
                    parts.source.forbid_reset(false);
                    parts.source.reset(now);
                }
                return false;
            }
            parts.suspends = None;
        }
        let sources = parts.sources();
        let open = calls.get_or_insert_with(|| resume(&sources));
        if !open.poll(now, parts.source.as_mut()) {
            return false;
        }
        let bad = open.answers().find(|answer| {
            answer.unknown || answer.status.is_error() && !answer.status.is(Status::CONTROLLER_NOT_SUSPENDED)
        });
        if let Some(answer) = bad {
            self.trouble = words(answer);
            *calls = None;
            return false;
        }
        // One that was not suspended any more has run meanwhile: changes may be missing from the log.
        parts.footing.hole |= open.answers().any(|answer| answer.status.is(Status::CONTROLLER_NOT_SUSPENDED));
        true
    }

    fn resumed(&mut self, parts: &mut Parts, now: Time) -> Turn {
        parts.footing.suspended = false;
        parts.source.forbid_reset(false);
        let hole = std::mem::take(&mut parts.footing.hole);
        for pump in parts.taps.iter_mut().filter_map(|tap| tap.pump.as_mut()) {
            pump.hurry(false);
            // A log that has ended is found out by the rounds, or nobody needs it any more.
            if !pump.has_hole() {
                pump.forget_marks();
            }
        }
        match self.rounds.take() {
            Some(rounds) => Turn::Next(State::Copying(Box::new(rounds.resume(now, hole)))),
            None => {
                self.step = Step::Unthrottle;
                Turn::Stay
            }
        }
    }
}
