//! What the migration states of vfio-user mean for the controller of one end: see the table in [the module](super).

use super::blob;
use super::log::Log;
use super::manager::{Command, Data, SharedMmc};
use super::pages::{PAGE, Range};
use super::{Ask, Board, Gate, Session};
use dray_device::poll::Time;
use dray_device::slot::Slot;
use dray_export::hooks::{HookError, HookState, MigrationHooks};
use dray_migration::hand_over::Stage;
use dray_migration::{Outcome, Owner};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::status::Status;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

/// The management controller, as hooks have it.
enum Held {
    No,
    Asked(Receiver<Result<SharedMmc, HookError>>),
    Yes(SharedMmc),
}

/// What was begun.
enum Step {
    Nothing,
    /// The main thread sets a migration up; at once to be paused if the device is stopped already.
    Beginning {
        answer: Receiver<Result<Arc<Session>, HookError>>,
        pause: bool,
    },
    /// Until every change is tracked.
    Opening,
    /// Until the controller is drained; it was stopped before.
    Pausing {
        stopped: bool,
    },
    /// Suspend.
    Stopping(Option<Command>),
    /// Until the migration is undone.
    GivingBack {
        reset: bool,
    },
    /// Resume. A reset goes on even if that fails, since it ends a suspension by itself.
    Resuming {
        resume: Option<Command>,
        reset: bool,
    },
    /// Until the destination has the state.
    Taking,
    /// Until the destination runs.
    Running,
}

/// A controller that a VM manager migrates.
pub(in crate::run) struct Driven {
    end: Owner,
    cntlid: u16,
    board: Arc<Board>,
    gate: Gate,
    slot: Slot,
    manager: Held,
    /// The migration that was begun here, or whose state was brought here.
    session: Option<Arc<Session>>,
    /// The client has stopped it while this end serves.
    stopped: bool,
    step: Step,
    log: Log,
}

fn lost() -> HookError {
    HookError::Busy("the appliance is stopping".to_owned())
}

/// The outcome of a migration as the error of a step that waited for another one.
fn ended(outcome: &Outcome) -> HookError {
    match outcome {
        Outcome::Undone(reason) => HookError::Failed(format!("the migration was undone: {reason}")),
        Outcome::InDoubt { reason, what } => HookError::Broken(format!("the migration is in doubt ({reason}; {what})")),
        Outcome::Moved | Outcome::Running => HookError::Busy("the other end serves".to_owned()),
    }
}

impl Driven {
    pub(in crate::run) fn new(end: Owner, cntlid: u16, board: &Arc<Board>, gate: Gate, slot: Slot) -> Self {
        Self {
            end,
            cntlid,
            board: Arc::clone(board),
            gate,
            slot,
            manager: Held::No,
            session: None,
            stopped: false,
            step: Step::Nothing,
            log: Log::new(cntlid),
        }
    }

    fn serves(&self) -> bool {
        self.board.serving() == self.end
    }

    /// What can be begun now.
    fn is_open(&self) -> Result<(), HookError> {
        if self.board.is_stopping() { Err(HookError::Busy("the appliance is stopping".to_owned())) } else { Ok(()) }
    }

    fn is_source(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.from == self.end)
    }

    fn stage(&self) -> Option<Stage> {
        self.session.as_ref().map(|session| session.hand_over.stage())
    }

    fn begin(&mut self, pause: bool) {
        let (to, answer) = channel();
        self.board.ask(Ask::Begin(self.end, to));
        self.session = None;
        self.step = Step::Beginning { answer, pause };
    }

    /// The management controller, when it is there.
    fn manager(&mut self) -> Option<Result<SharedMmc, HookError>> {
        if matches!(self.manager, Held::No) {
            let (to, answer) = channel();
            self.board.ask(Ask::Manager(self.end, to));
            self.manager = Held::Asked(answer);
        }
        if let Held::Asked(answer) = &self.manager {
            match answer.try_recv() {
                Ok(Ok(mmc)) => self.manager = Held::Yes(mmc),
                Ok(Err(error)) => {
                    self.manager = Held::No;
                    return Some(Err(error));
                }
                Err(TryRecvError::Empty) if !self.board.is_stopping() => return None,
                Err(_) => {
                    self.manager = Held::No;
                    return Some(Err(lost()));
                }
            }
        }
        match &self.manager {
            Held::Yes(mmc) => Some(Ok(mmc.clone())),
            _ => None,
        }
    }

    /// Others may have the management controller when nothing here needs it.
    fn tidy(&mut self) {
        let runs = self.stage().is_some_and(|stage| !matches!(stage, Stage::Ended(_)));
        if !self.stopped && !self.log.is_on() && !runs && matches!(self.step, Step::Nothing) {
            self.manager = Held::No;
        }
    }

    /// The client's hold and Suspend are taken back.
    fn go_on(&mut self, reset: bool) {
        self.session = None;
        self.step = if self.stopped { Step::Resuming { resume: None, reset } } else { Step::Nothing };
    }

    fn release(&mut self) {
        self.stopped = false;
        self.gate.let_go();
    }

    /// RUNNING again, by the state's change or by a reset.
    fn give_back(&mut self, reset: bool) -> Result<(), HookError> {
        if let Some(session) = self.session.clone().filter(|_| self.is_source()) {
            return match session.hand_over.stage() {
                Stage::Ended(Outcome::Undone(_)) => {
                    self.go_on(reset);
                    Ok(())
                }
                Stage::Ended(outcome) => Err(ended(&outcome)),
                _ if session.hand_over.take_back() => {
                    self.step = Step::GivingBack { reset };
                    Ok(())
                }
                _ => Err(HookError::Busy("the destination is made to run, or runs".to_owned())),
            };
        }
        if !self.serves() {
            return Err(HookError::Busy("this end does not serve: its media are not complete, or were moved away".to_owned()));
        }
        self.go_on(reset);
        Ok(())
    }

    /// Goes on; `None` while it works.
    fn advance(&mut self, now: Time) -> Option<Result<(), HookError>> {
        match &mut self.step {
            Step::Nothing => Some(Ok(())),
            Step::Beginning { answer, pause } => {
                let pause = *pause;
                match answer.try_recv() {
                    Ok(Ok(session)) => {
                        if pause {
                            session.hand_over.pause();
                        }
                        self.session = Some(session);
                        self.step = if pause { Step::Pausing { stopped: true } } else { Step::Opening };
                        None
                    }
                    Ok(Err(error)) => Some(Err(error)),
                    // An appliance that stops sets nothing up any more.
                    Err(TryRecvError::Empty) if !self.board.is_stopping() => None,
                    Err(_) => Some(Err(lost())),
                }
            }
            Step::Opening => match self.stage()? {
                Stage::Opening => None,
                Stage::Ended(outcome) => {
                    self.session = None;
                    Some(Err(ended(&outcome)))
                }
                _ => Some(Ok(())),
            },
            Step::Pausing { stopped } => {
                let stopped = *stopped;
                match self.stage()? {
                    Stage::Opening | Stage::Copying => None,
                    Stage::Ended(outcome) => {
                        if !stopped {
                            self.release();
                        }
                        Some(Err(ended(&outcome)))
                    }
                    _ => Some(Ok(())),
                }
            }
            Step::Stopping(_) | Step::Resuming { .. } => self.command(now),
            Step::GivingBack { reset } => {
                let reset = *reset;
                match self.stage()? {
                    Stage::Ended(Outcome::Undone(_)) => {
                        self.go_on(reset);
                        matches!(self.step, Step::Nothing).then_some(Ok(()))
                    }
                    Stage::Ended(outcome) => Some(Err(ended(&outcome))),
                    _ => None,
                }
            }
            Step::Taking => match self.stage()? {
                Stage::Taken => Some(Ok(())),
                Stage::Taking => None,
                stage => {
                    let why = self.session.take().and_then(|session| session.hand_over.trouble());
                    Some(Err(match stage {
                        Stage::Ended(outcome) => ended(&outcome),
                        _ => HookError::Invalid(why.unwrap_or_else(|| "the state was not taken".to_owned())),
                    }))
                }
            },
            Step::Running => match self.stage()? {
                Stage::Serving | Stage::Ended(Outcome::Moved) => {
                    self.board.set_serving(self.end);
                    self.session = None;
                    Some(Ok(()))
                }
                Stage::Resuming => None,
                Stage::Ended(outcome) => {
                    self.session = None;
                    Some(Err(ended(&outcome)))
                }
                _ => {
                    let why = self.session.as_ref().and_then(|session| session.hand_over.trouble());
                    Some(Err(HookError::Failed(why.unwrap_or_else(|| "it does not run".to_owned()))))
                }
            },
        }
    }

    /// Suspend or Resume by the management controller.
    fn command(&mut self, now: Time) -> Option<Result<(), HookError>> {
        let cntlid = self.cntlid;
        let answer = match self.manager()? {
            Err(error) => Err(error),
            Ok(mut mmc) => {
                let (command, entry) = match &mut self.step {
                    Step::Resuming { resume, .. } => (resume, SubmissionEntry::resume(cntlid)),
                    Step::Stopping(suspend) => (suspend, SubmissionEntry::suspend(cntlid, false, false)),
                    _ => return Some(Ok(())),
                };
                let command = command.get_or_insert_with(|| Command::new(entry, Data::None));
                command.poll(now, &mut mmc)?.map_err(HookError::Failed)
            }
        };
        let result = answer.and_then(|answer| {
            // A migration that was undone has resumed it already.
            let runs = answer.status.is(Status::CONTROLLER_NOT_SUSPENDED) && matches!(self.step, Step::Resuming { .. });
            if answer.status.is_error() && !runs { Err(HookError::Failed(answer.status.to_string())) } else { Ok(()) }
        });
        let (resumed, reset) = match self.step {
            Step::Resuming { reset, .. } => (result.is_ok() || reset, reset),
            _ => (false, false),
        };
        // A device that did not stop goes on, one that did not resume stays where it is.
        if resumed || matches!(self.step, Step::Stopping(_)) && result.is_err() {
            self.release();
        }
        Some(if reset { Ok(()) } else { result })
    }

    /// The client's memory that the controller may write.
    fn mapped(&self) -> Vec<Range> {
        let reader = self.slot.space().reader();
        let writable = reader.mappings().iter().filter(|mapping| mapping.writable);
        writable.map(|mapping| (mapping.iova, mapping.memory.len() as u64)).collect()
    }
}

impl MigrationHooks for Driven {
    fn start_precopy(&mut self, _now: Time) -> Result<(), HookError> {
        self.is_open()?;
        if !self.serves() {
            return Err(HookError::Busy("this end does not serve".to_owned()));
        }
        self.begin(false);
        Ok(())
    }

    fn resume(&mut self, _now: Time) -> Result<(), HookError> {
        self.is_open()?;
        if self.session.is_some() && !self.is_source() {
            let ran = self.session.as_ref().is_some_and(|session| session.hand_over.run());
            if ran {
                self.step = Step::Running;
                return Ok(());
            }
            return Err(match self.stage() {
                Some(Stage::Ended(outcome)) => ended(&outcome),
                _ => HookError::Busy("the state that was brought here is not there any more".to_owned()),
            });
        }
        self.give_back(false)
    }

    fn reset(&mut self, _now: Time) -> Result<(), HookError> {
        if let Some(session) = self.session.clone().filter(|_| !self.is_source()) {
            session.hand_over.forget();
            self.session = None;
            self.step = Step::Nothing;
            return Ok(());
        }
        let result = self.give_back(true);
        if result.is_err() {
            // It is moved away, or in doubt: the migration's hold is what keeps it from serving.
            self.session = None;
            self.release();
            self.tidy();
        }
        result
    }

    fn stop(&mut self, _now: Time, hand_over: bool) -> Result<(), HookError> {
        self.is_open()?;
        let told = matches!(self.stage(), Some(Stage::Told | Stage::Taking | Stage::Taken | Stage::Resuming | Stage::Serving));
        if !hand_over {
            if self.serves() {
                self.gate.hold();
                self.stopped = true;
                self.step = Step::Stopping(None);
            }
            return Ok(());
        }
        if self.is_source() && told {
            return Ok(());
        }
        if !self.serves() {
            return Err(HookError::Busy("this end does not serve".to_owned()));
        }
        match (self.session.clone().filter(|_| self.is_source()), self.stage()) {
            // From STOP, where a migration that was undone does not count any more.
            (None, _) | (Some(_), Some(Stage::Ended(_))) if self.stopped => self.begin(true),
            (Some(_), Some(Stage::Ended(outcome))) => return Err(ended(&outcome)),
            (Some(session), _) => {
                let stopped = std::mem::replace(&mut self.stopped, true);
                self.gate.hold();
                session.hand_over.pause();
                self.step = Step::Pausing { stopped };
            }
            (None, _) => return Err(HookError::Failed("nothing was begun".to_owned())),
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Option<Vec<u8>>, HookError> {
        let session = self.session.as_ref().filter(|_| self.is_source());
        let session = session.ok_or_else(|| HookError::Failed("there is no migration".to_owned()))?;
        if let Stage::Ended(outcome) = session.hand_over.stage() {
            return Err(ended(&outcome));
        }
        let states = session.hand_over.states();
        Ok(states.and_then(|states| states.first().map(|state| blob::pack(session, state))))
    }

    fn prepare(&mut self, _now: Time) -> Result<(), HookError> {
        self.is_open()?;
        if self.serves() {
            return Err(HookError::Busy("this end serves".to_owned()));
        }
        // What it has stopped was moved away: the migration's hold is what keeps it now, and goes when this end serves again.
        if let Some(session) = self.session.take().filter(|session| session.from != self.end) {
            session.hand_over.forget();
        }
        self.release();
        // A controller that was moved away still has its queues, and takes no state while it has.
        self.slot.function().reset().map_err(|error| HookError::Failed(error.to_string()))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), HookError> {
        let invalid = |why: &str| HookError::Invalid(why.to_owned());
        let session = self.board.session().filter(|session| session.from != self.end);
        let session = session.ok_or_else(|| invalid("no migration that runs has told a state"))?;
        let state = blob::unpack(&session, state).map_err(invalid)?;
        let told = session.hand_over.states().unwrap_or_default();
        if told.first().is_none_or(|told| told != state) {
            return Err(invalid("the state is not the one that was told"));
        }
        if !session.hand_over.take(vec![state.to_vec()]) {
            return Err(invalid("the guest was taken back, or runs already"));
        }
        self.session = Some(session);
        self.step = Step::Taking;
        Ok(())
    }

    fn poll(&mut self, now: Time) -> HookState {
        let Some(result) = self.advance(now) else { return HookState::Working };
        self.step = Step::Nothing;
        self.tidy();
        result.map_or_else(HookState::Failed, |()| HookState::Done)
    }

    fn can_log(&self) -> bool {
        true
    }

    fn start_logging(&mut self, ranges: &[(u64, u64)], page: u64) -> Result<u64, HookError> {
        self.is_open()?;
        self.log.start(&self.mapped(), ranges)?;
        Ok(page.max(PAGE))
    }

    fn collect_logged(&mut self) -> Result<(), HookError> {
        self.log.collect();
        Ok(())
    }

    fn report_logged(&mut self, iova: u64, len: u64, page: u64, into: &mut [u8]) -> Result<(), HookError> {
        if page == 0 || iova.checked_add(len).is_none() {
            return Err(HookError::Invalid("a range that is none".to_owned()));
        }
        self.log.report((iova, len), page, &self.mapped(), into);
        Ok(())
    }

    fn stop_logging(&mut self) -> Result<(), HookError> {
        self.log.stop();
        Ok(())
    }

    fn poll_log(&mut self, now: Time) -> HookState {
        if !self.log.is_on() {
            return HookState::Done;
        }
        let state = match self.manager() {
            None => return HookState::Working,
            Some(Ok(mut mmc)) => self.log.poll(now, &mut mmc),
            Some(Err(error)) => {
                self.log.give_up();
                HookState::Failed(error)
            }
        };
        if state != HookState::Working {
            self.tidy();
        }
        state
    }
}
