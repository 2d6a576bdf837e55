//! The log has a hole (rule 8): each queue is drained, logging stopped and started, or the queue replaced by a larger one. Only
//! after that is everything marked, so that no change falls between.

use crate::calls::{Calls, words};
use crate::open::{cdqid, live};
use crate::parts::{Parts, has_hole};
use crate::reason::Reason;
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;

/// How often a queue of one size is asked for.
const TRIES: u32 = 3;

#[derive(Debug)]
enum Step {
    /// What a full queue holds: nothing new comes, since a full queue does not log. One that logs is not waited for: its guest
    /// may write for ever faster than it is looked at, so logging is stopped first.
    Drain,
    Stop(Calls),
    /// What was logged before the stop.
    DrainAgain,
    Start(Calls),
    /// A larger queue is being created. A refusal may mean that the old one is not deleted yet, so it is tried again; after
    /// [`TRIES`] the old size is taken, as often.
    Enlarge { slots: u32, tries: u32 },
}

/// Starting tracking anew, queue by queue.
#[derive(Debug)]
pub(crate) struct Relog {
    /// Every queue, or only those whose log has ended.
    all: bool,
    index: usize,
    step: Step,
    counted: bool,
    /// Since when the present queue is drained.
    draining: Option<Time>,
}

impl Relog {
    pub(crate) fn new(all: bool) -> Self {
        Self { all, index: 0, step: Step::Drain, counted: false, draining: None }
    }

    /// True when every queue logs again without a hole.
    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Result<bool, Reason> {
        if self.index >= parts.taps.len() {
            return Ok(true);
        }
        let full = parts.taps[self.index].pump.as_ref().is_some_and(|pump| pump.marks().full);
        match &mut self.step {
            Step::Drain => {
                let hole = has_hole(&parts.taps[self.index]);
                if !hole && !self.all {
                    self.index += 1;
                } else if !full || self.drained(parts, now)? {
                    self.count(full, parts)?;
                    self.begin(full, parts, now)?;
                }
            }
            Step::Stop(calls) => {
                // A status is of no interest: where logging was off already there is nothing to stop.
                if calls.poll(now, parts.source.as_mut()) {
                    self.step = Step::DrainAgain;
                }
            }
            Step::DrainAgain => {
                if self.drained(parts, now)? {
                    self.start(parts);
                }
            }
            Step::Start(calls) => {
                if calls.poll(now, parts.source.as_mut()) {
                    if let Some(answer) = calls.failure() {
                        return Err(Reason::Source(format!("Track Send was refused: {}", words(answer))));
                    }
                    self.next();
                }
            }
            Step::Enlarge { slots, tries } => match live(parts, now) {
                Ok(true) => self.start(parts),
                Ok(false) => {}
                Err(reason) => {
                    let first = parts.config.cdq_slots;
                    let (slots, tries) = match (*slots, *tries) {
                        (slots, tries) if tries < TRIES => (slots, tries + 1),
                        (slots, _) if slots != first => (first, 1),
                        _ => return Err(reason),
                    };
                    self.replace(slots, tries, parts, now)?;
                }
            },
        }
        Ok(self.index >= parts.taps.len())
    }

    /// Whether the present queue is empty. Where logging could not be stopped it may never be.
    fn drained(&mut self, parts: &mut Parts, now: Time) -> Result<bool, Reason> {
        if parts.is_drained(self.index) {
            self.draining = None;
            return Ok(true);
        }
        let since = *self.draining.get_or_insert(now);
        if now.us_since(since) / 1000 >= parts.config.limits.step_ms {
            return Err(Reason::Source("a controller data queue does not become empty, so logging cannot start anew".to_owned()));
        }
        Ok(false)
    }

    fn next(&mut self) {
        (self.index, self.step, self.counted) = (self.index + 1, Step::Drain, false);
    }

    fn count(&mut self, full: bool, parts: &mut Parts) -> Result<(), Reason> {
        if full && !self.counted {
            self.counted = true;
            parts.report.fills += 1;
        }
        let limits = parts.config.limits;
        let larger = parts.taps[self.index].slots < limits.max_cdq_slots;
        let patient = parts.report.fills <= limits.max_fills.saturating_mul(3);
        if parts.report.fills > limits.max_fills && !larger {
            // The largest queue is too small: slow the guest down if that is allowed, give up at last.
            let can_throttle = parts.config.may_throttle && !parts.throttle.refused;
            if !(can_throttle && patient) {
                return Err(Reason::QueueFull(parts.report.fills));
            }
            let current = if parts.throttle.limit == 0 { u32::MAX / 2 } else { parts.throttle.limit };
            let sample = parts.hooks.guest.sample().iops;
            let base = if sample > 0 { sample.min(current) } else { current };
            parts.limit_guest((base / 2).max(limits.guest_floor.max(1)));
        }
        Ok(())
    }

    fn begin(&mut self, full: bool, parts: &mut Parts, now: Time) -> Result<(), Reason> {
        let limits = parts.config.limits;
        let slots = parts.taps[self.index].slots;
        if full && parts.report.fills > limits.max_fills && slots < limits.max_cdq_slots {
            let larger = slots.saturating_mul(4).min(limits.max_cdq_slots);
            return self.replace(larger, 1, parts, now);
        }
        self.step = Step::Stop(Calls::plain([SubmissionEntry::track_send_log(false, cdqid(parts, self.index))]));
        Ok(())
    }

    fn start(&mut self, parts: &mut Parts) {
        if let Some(pump) = &mut parts.taps[self.index].pump {
            pump.forget_marks();
        }
        self.step = Step::Start(Calls::plain([SubmissionEntry::track_send_log(true, cdqid(parts, self.index))]));
    }

    fn replace(&mut self, slots: u32, tries: u32, parts: &mut Parts, now: Time) -> Result<(), Reason> {
        let tap = &mut parts.taps[self.index];
        if let Some(pump) = tap.pump.take() {
            parts.past_pumps.add(&pump.stats());
        }
        parts.source.delete_queue(now, tap.key);
        let created = parts.source.create_queue(now, tap.cntlid, slots);
        tap.key = created.map_err(|error| Reason::Source(error.to_string()))?;
        tap.slots = slots;
        self.step = Step::Enlarge { slots, tries };
        Ok(())
    }
}
