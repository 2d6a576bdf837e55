//! The log of written pages, fed by Track Memory Changes (Base 2.3 §5.2.28.1.2) and Track Receive (§5.2.27) at the management
//! controller.
//!
//! The controller forgets what it reports, so what it has said is kept in a [`PageLog`] until the client has asked for it. What
//! it would have said and cannot any more (its management controller was reset, a report of unknown outcome) counts as written
//! everywhere, after tracking was begun again.

use super::manager::{Command, Data};
use super::pages::{PAGE, PageLog, Range};
use dray_device::poll::Time;
use dray_export::hooks::{HookError, HookState};
use dray_migration::Mmc;
use dray_migration::mmc::Answer;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use dray_nvme::track::{TRACK_VERSION, TrackMemoryHeader, granule_bytes, parse_track_receive};
use std::collections::VecDeque;
use zerocopy::IntoBytes;

/// Bytes of a report.
const REPORT_BYTES: usize = 4096;
/// Reports of a controller that goes on writing: what is left then is told next time.
const MAX_REPORTS: u32 = 4096;

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// Tracking ends, if there was any.
    Stop,
    /// Tracking begins.
    Start,
    /// The controller is asked until it has nothing more to say; so many times so far.
    Collect(u32),
    /// Tracking begins again, if it can; everything counts as written.
    StartAgain,
}

/// The log of one controller.
#[derive(Debug)]
pub(super) struct Log {
    cntlid: u16,
    pages: Option<PageLog>,
    /// The management controller that tracks, by its resets. `None`: none does.
    generation: Option<u32>,
    /// It has begun, and its client counts on it.
    live: bool,
    jobs: VecDeque<Job>,
    command: Option<Command>,
}

impl Log {
    pub(super) fn new(cntlid: u16) -> Self {
        Self { cntlid, pages: None, generation: None, live: false, jobs: VecDeque::new(), command: None }
    }

    /// Whether it needs the management controller.
    pub(super) fn is_on(&self) -> bool {
        self.pages.is_some() || !self.jobs.is_empty()
    }

    /// Begins a log of `wanted` as far as it is `mapped`.
    ///
    /// # Errors
    /// [`HookError`]: the memory is in too many pieces.
    pub(super) fn start(&mut self, mapped: &[Range], wanted: &[Range]) -> Result<(), HookError> {
        let pages =
            PageLog::new(mapped, wanted).ok_or_else(|| HookError::Failed("the memory is in too many pieces".to_owned()))?;
        (self.pages, self.live) = (Some(pages), false);
        // A log that was ended while the controller was suspended is tracked still.
        self.jobs.extend([Job::Stop, Job::Start]);
        Ok(())
    }

    pub(super) fn collect(&mut self) {
        self.jobs.push_back(Job::Collect(0));
    }

    /// Tells and forgets, see [`PageLog::report`].
    pub(super) fn report(&mut self, asked: Range, page: u64, mapped: &[Range], into: &mut [u8]) {
        if let Some(pages) = &mut self.pages {
            pages.report(asked, page, mapped, into);
        }
    }

    /// Ends it. A controller that is suspended goes on tracking: that costs little, and the next log begins by ending it.
    pub(super) fn stop(&mut self) {
        (self.pages, self.generation, self.live) = (None, None, false);
        // What is under way has to be over first.
        self.jobs.truncate(usize::from(self.command.is_some()));
        self.jobs.push_back(Job::Stop);
    }

    /// What was to be done cannot be: a log that has not begun is none, and one that has knows no better than that all was written.
    pub(super) fn give_up(&mut self) {
        self.jobs.clear();
        (self.command, self.generation) = (None, None);
        match &mut self.pages {
            Some(pages) if self.live => pages.mark_all(),
            pages => *pages = None,
        }
    }

    /// Goes on.
    pub(super) fn poll(&mut self, now: Time, mmc: &mut dyn Mmc) -> HookState {
        while let Some(&job) = self.jobs.front() {
            if self.command.is_none() {
                match self.command_of(job, mmc) {
                    Ok(Some(command)) => self.command = Some(command),
                    Ok(None) => {
                        self.jobs.pop_front();
                        continue;
                    }
                    Err(error) => return self.failed(error),
                }
            }
            let Some(answer) = self.command.as_mut().and_then(|command| command.poll(now, mmc)) else {
                return HookState::Working;
            };
            self.command = None;
            self.jobs.pop_front();
            if let Err(error) = self.answered(job, answer, mmc) {
                return self.failed(error);
            }
        }
        HookState::Done
    }

    fn failed(&mut self, error: HookError) -> HookState {
        self.give_up();
        HookState::Failed(error)
    }

    /// The command of a job; `None` where there is nothing to be done.
    fn command_of(&mut self, job: Job, mmc: &mut dyn Mmc) -> Result<Option<Command>, HookError> {
        let cntlid = self.cntlid;
        let Some(pages) = &mut self.pages else {
            let stop = Command::new(SubmissionEntry::track_send_memory(false, cntlid), Data::None);
            return Ok((job == Job::Stop).then_some(stop));
        };
        let tracks = self.generation == Some(mmc.generation());
        match job {
            Job::Stop => Ok(Some(Command::new(SubmissionEntry::track_send_memory(false, cntlid), Data::None))),
            Job::Collect(_) if tracks => {
                let entry = SubmissionEntry::track_receive(cntlid, (REPORT_BYTES / 4) as u32);
                Ok(Some(Command::new(entry, Data::In(REPORT_BYTES))))
            }
            Job::Collect(_) => {
                self.jobs.extend([Job::Stop, Job::StartAgain]);
                Ok(None)
            }
            Job::Start | Job::StartAgain => {
                let ranges = pages.descriptors();
                let ranges = ranges.ok_or_else(|| HookError::Failed("a range is longer than can be tracked".to_owned()))?;
                if ranges.is_empty() {
                    (self.generation, self.live) = (Some(mmc.generation()), true);
                    return Ok(None);
                }
                let header =
                    TrackMemoryHeader { ver: TRACK_VERSION, rnmrtd: ranges.len() as u32, ..TrackMemoryHeader::default() };
                let data = [header.as_bytes(), ranges.as_bytes()].concat();
                Ok(Some(Command::new(SubmissionEntry::track_send_memory(true, cntlid), Data::Out(data))))
            }
        }
    }

    fn answered(&mut self, job: Job, answer: Result<Answer, String>, mmc: &mut dyn Mmc) -> Result<(), HookError> {
        let well = answer.as_ref().is_ok_and(|answer| !answer.status.is_error());
        match (job, answer) {
            // Where nothing was tracked there is nothing to end.
            (Job::Stop, _) => {}
            (Job::Start | Job::StartAgain, _) if well => {
                (self.generation, self.live) = (Some(mmc.generation()), true);
                if let (Job::StartAgain, Some(pages)) = (job, &mut self.pages) {
                    pages.mark_all();
                }
            }
            (Job::StartAgain, _) => {
                self.generation = None;
                if let Some(pages) = &mut self.pages {
                    pages.mark_all();
                }
            }
            (Job::Start, Ok(answer)) if answer.status.is(Status::CONTROLLER_SUSPENDED) => {
                return Err(HookError::Busy("the device is stopped: its writes can be logged when it runs".to_owned()));
            }
            (Job::Start, answer) => {
                return Err(HookError::Failed(answer.map_or_else(|why| why, |answer| answer.status.to_string())));
            }
            (Job::Collect(times), answer) => {
                let more = answer.ok().filter(|_| well).and_then(|answer| self.take(&answer.data));
                match more {
                    Some(true) => self.jobs.push_front(Job::Collect(times + 1)),
                    Some(false) => {}
                    // What it has said, or would have said, is lost.
                    None => {
                        self.generation = None;
                        self.jobs.push_front(Job::StartAgain);
                        self.jobs.push_front(Job::Stop);
                    }
                }
                if times >= MAX_REPORTS {
                    self.jobs.retain(|job| !matches!(job, Job::Collect(_)));
                }
            }
        }
        Ok(())
    }

    /// Keeps what a report says; whether there is more, or `None` if it is none.
    fn take(&mut self, report: &[u8]) -> Option<bool> {
        let (header, ranges) = parse_track_receive(report).ok()?;
        let granule = granule_bytes(header.rpmpg).filter(|_| header.cntlid == self.cntlid)?;
        let pages = self.pages.as_mut()?;
        for range in ranges {
            let bytes = u64::from(range.len.get()).checked_mul(granule)?;
            pages.mark(range.saddr.get(), bytes.max(PAGE));
        }
        Some(header.flags.mtr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_goes_on_without_its_controller_says_that_all_was_written() {
        let memory = [(0x10_000, 0x4000)];
        for live in [true, false] {
            let mut log = Log::new(2);
            log.start(&memory, &[]).expect("a log");
            log.jobs.clear();
            log.live = live;
            log.collect();
            log.give_up();
            let mut bits = [0; 8];
            log.report(memory[0], 0x1000, &memory, &mut bits);
            assert_eq!(bits[0], if live { 0xf } else { 0 });
            assert_eq!(log.is_on(), live, "one that never began is none");
        }
    }
}
