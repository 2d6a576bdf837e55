//! Opening: queues, policies, logging, the destination's controllers, the first record. From the moment logging has started
//! on every controller of the set the map is complete, and only then is everything marked (rule 5).

use crate::calls::{Calls, words};
use crate::hooks::{Owner, RecordPhase};
use crate::mmc::{Answer, QueueState};
use crate::parts::{Parts, Tap};
use crate::pump::Pump;
use crate::reason::Reason;
use crate::rounds::Rounds;
use crate::state::{State, Turn};
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use dray_policy::seam::Opening as PolicyOpening;

/// The steps of opening.
#[derive(Debug, Default)]
pub(crate) enum Opening {
    /// Queues are to be created.
    #[default]
    Queues,
    /// Queues are being created.
    Creating,
    /// Logging is being started, the destination's controllers are suspended, the record is written.
    Starting { start: Calls, suspend: Calls, left: Left, began: Time, recorded: Option<u64> },
}

/// A controller of the source that an earlier attempt left suspended. A device may let a suspension outlive the reset of the
/// controller that asked for it, and one that was still under way when the undo took place comes to be afterwards. By the record
/// the source serves, so it is resumed, once.
#[derive(Debug, Default)]
pub(crate) enum Left {
    /// None was found.
    #[default]
    None,
    /// Found, and being resumed.
    Resuming(Calls),
    /// Found, and resumed.
    Resumed,
}

impl Opening {
    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Turn {
        match self {
            Self::Queues => match create(parts, now) {
                Ok(()) => {
                    *self = Self::Creating;
                    Turn::Stay
                }
                Err(reason) => Turn::Back(reason),
            },
            Self::Creating => match live(parts, now) {
                Ok(false) => Turn::Stay,
                Ok(true) => {
                    *self = start(parts, now);
                    Turn::Stay
                }
                Err(reason) => Turn::Back(reason),
            },
            Self::Starting { start, suspend, left, began, recorded } => {
                if recorded.is_none()
                    && let Some(result) = parts.recorded()
                {
                    if let Err(error) = result {
                        return Turn::Back(Reason::Journal(error.to_string()));
                    }
                    *recorded = Some(now.us_since(*began));
                }
                // Not sent again before a controller that was left suspended is resumed.
                let started = matches!(left, Left::Resuming(_)) || start.poll(now, parts.source.as_mut());
                if !suspend.poll(now, parts.destination.as_mut()) || !started {
                    return Turn::Stay;
                }
                parts.costs.admin_us = parts.costs.admin_us.min(now.us_since(*began));
                if left.resume(start, parts, now) {
                    return Turn::Stay;
                }
                if let Some(answer) = start.failure() {
                    return Turn::Back(Reason::Source(format!("Track Send was refused: {}", words(answer))));
                }
                if let Some(answer) = suspend.failure() {
                    return Turn::Back(Reason::Destination(format!("Suspend was refused: {}", words(answer))));
                }
                let Some(journal_us) = *recorded else { return Turn::Stay };
                parts.costs.journal_us = journal_us;
                parts.media.mark_everything();
                parts.media.open_first_copies();
                Turn::Next(State::Copying(Box::new(Rounds::new(now))))
            }
        }
    }
}

impl Left {
    /// True while controllers that were found suspended are being resumed; logging is started there once more then.
    fn resume(&mut self, start: &mut Calls, parts: &mut Parts, now: Time) -> bool {
        if matches!(self, Self::None) {
            let refused = |answer: &Answer| answer.unknown || answer.status.is_error();
            let is_suspended = |answer: &Answer| !answer.unknown && answer.status.is(Status::CONTROLLER_SUSPENDED);
            let sources = parts.sources();
            let left = start.answers().zip(&sources).enumerate().filter(|(_, (answer, _))| is_suspended(answer));
            let (indices, left): (Vec<usize>, Vec<u16>) = left.map(|(index, (_, cntlid))| (index, *cntlid)).unzip();
            if left.is_empty() || start.answers().any(|answer| refused(answer) && !is_suspended(answer)) {
                return false;
            }
            // A VM manager may have stopped its guest before, and keeps it behind a fence of its own.
            if parts.hand_over().is_none() {
                tracing::warn!(controllers = ?left, "controllers of the source were left suspended: they are resumed");
            }
            *self = Self::Resuming(resume(&left));
            *start = starts(parts, indices);
        }
        let Self::Resuming(calls) = self else { return false };
        if calls.poll(now, parts.source.as_mut()) {
            // A refusal shows at the next start.
            *self = Self::Resumed;
        }
        true
    }
}

fn create(parts: &mut Parts, now: Time) -> Result<(), Reason> {
    let slots = parts.config.cdq_slots.clamp(16, parts.config.limits.max_cdq_slots.max(16));
    for cntlid in parts.sources() {
        let key = parts.source.create_queue(now, cntlid, slots).map_err(|error| Reason::Source(error.to_string()))?;
        parts.taps.push(Tap { key, cntlid, slots, pump: None });
    }
    Ok(())
}

/// Opens pump and policy of each queue that has become live; true when all have.
pub(crate) fn live(parts: &mut Parts, now: Time) -> Result<bool, Reason> {
    let mut all = true;
    for index in 0..parts.taps.len() {
        if parts.taps[index].pump.is_some() {
            continue;
        }
        match parts.source.queue_state(parts.taps[index].key) {
            QueueState::Creating => all = false,
            QueueState::Gone(why) => return Err(Reason::Source(format!("controller data queue: {why}"))),
            QueueState::Live(queue) => {
                parts.taps[index].pump = Some(Pump::new(queue, parts.config.pump, parts.began));
                let setup = parts.setup(now, &parts.config.settings.cdq);
                if let Some(seat) = parts.policies.cdq.get_mut(index) {
                    seat.open(PolicyOpening { setup, extra: queue });
                }
            }
        }
    }
    Ok(all)
}

/// The queue's CDQID, once it is live.
pub(crate) fn cdqid(parts: &Parts, index: usize) -> u16 {
    parts.taps[index].pump.as_ref().map_or(0, |pump| pump.queue().id)
}

fn start(parts: &mut Parts, now: Time) -> Opening {
    let tracking = parts.setup(now, &parts.config.settings.tracking);
    parts.policies.tracking.open(PolicyOpening { setup: tracking, extra: () });
    let copy = parts.setup(now, &parts.config.settings.copy);
    parts.policies.copy.open(PolicyOpening { setup: copy, extra: () });
    parts.record(Owner::Source, RecordPhase::Copying, false);
    let start = starts(parts, 0..tracked(parts.taps.len()));
    if parts.has_destination() && !planted::on(Fault::DestinationNotFenced) {
        parts.hooks.fence.raise(Owner::Destination);
    }
    Opening::Starting { start, suspend: suspend(&parts.destinations()), left: Left::None, began: now, recorded: None }
}

/// Track Send, start, for these queues.
fn starts(parts: &Parts, queues: impl IntoIterator<Item = usize>) -> Calls {
    let starts = queues.into_iter().map(|index| SubmissionEntry::track_send_log(true, cdqid(parts, index)));
    Calls::plain(starts.collect::<Vec<_>>())
}

/// How many controllers of the set are tracked: all (rule 5).
pub(crate) fn tracked(all: usize) -> usize {
    if planted::on(Fault::SecondWriterUntracked) { all.min(1) } else { all }
}

/// Suspend of a set of controllers; where they are suspended already it succeeds.
pub(crate) fn suspend(controllers: &[u16]) -> Calls {
    Calls::plain(controllers.iter().map(|&cntlid| SubmissionEntry::suspend(cntlid, false, false)))
}

/// Resume of a set of controllers.
pub(crate) fn resume(controllers: &[u16]) -> Calls {
    Calls::plain(controllers.iter().map(|&cntlid| SubmissionEntry::resume(cntlid)))
}
