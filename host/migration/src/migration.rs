//! The migration as one value that is polled.

use crate::check::Checking;
use crate::config::MigrationConfig;
use crate::copy::{CopySetupError, Engine, Uncorrectable};
use crate::departure::DepartureIngredients;
use crate::destination::Destination;
use crate::extents::Extents;
use crate::hand_over::{HandOver, Stage};
use crate::hooks::Hooks;
use crate::media::Media;
use crate::media_move::{BackingExchange, MediaIngredients, Way};
use crate::mmc::{Health, Mmc};
use crate::parts::{Costs, Footing, Formats, Parts, Policies, Throttle};
use crate::pump::PumpStats;
use crate::reason::Reason;
use crate::report::{Outcome, ProgressView, Report};
use crate::state::{Phase, State, Turn};
use crate::undo::Undoing;
use dray_device::command::CommandQueue;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::space::AddressSpace;

/// Attempts whose reasons the report keeps.
const KEPT_ATTEMPTS: usize = 8;

/// What a migration is made of.
pub struct Ingredients {
    /// The source's management controller.
    pub source: Box<dyn Mmc>,
    /// An I/O queue of it, to read the media.
    pub source_queue: Box<dyn CommandQueue>,
    /// The address space of that queue.
    pub source_space: AddressSpace,
    /// The destination's management controller.
    pub destination: Box<dyn Mmc>,
    /// Where the media goes.
    pub media: Box<dyn Destination>,
    /// The policies' seats.
    pub policies: Policies,
    /// The surroundings.
    pub hooks: Hooks,
}

impl std::fmt::Debug for Ingredients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingredients").field("policies", &self.policies).finish_non_exhaustive()
    }
}

/// One migration. It owns both management controllers while it lives.
pub struct Migration {
    parts: Parts,
    state: State,
    cancelled: bool,
    lost: Lost,
}

/// A destination that does not answer.
#[derive(Debug, Default)]
struct Lost {
    since: Option<(Time, u32)>,
    reset: bool,
    asked: bool,
}

impl std::fmt::Debug for Migration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Migration").field("id", &self.parts.config.id).field("phase", &self.phase()).finish_non_exhaustive()
    }
}

impl Migration {
    /// A migration that begins at its first poll.
    ///
    /// # Errors
    /// [`CopySetupError`] when there is no memory for the transfers or the configuration makes no sense.
    pub fn new(config: MigrationConfig, with: Ingredients, now: Time) -> Result<Self, CopySetupError> {
        Self::assemble(config, with, Way::Controller, now)
    }

    /// A media move that begins at its first poll: see [`media_move`](crate::media_move).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn media_move(config: MigrationConfig, with: MediaIngredients, now: Time) -> Result<Self, CopySetupError> {
        let (with, exchange) = with.split();
        Self::assemble(config, with, Way::Media(exchange), now)
    }

    /// A hand-over that begins at its first poll: see [`hand_over`](crate::hand_over). The slots of the hooks are never pointed.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn hand_over(config: MigrationConfig, with: Ingredients, hand_over: HandOver, now: Time) -> Result<Self, CopySetupError> {
        Self::assemble(config, with, Way::HandOver(hand_over), now)
    }

    /// A departure that begins at its first poll: see [`departure`](crate::departure).
    ///
    /// # Errors
    /// As [`new`](Self::new), and the management controller: others may depend on its driver.
    pub fn departure(
        config: MigrationConfig,
        with: DepartureIngredients,
        now: Time,
    ) -> Result<Self, (CopySetupError, Box<dyn Mmc>)> {
        let (with, departure) = with.split();
        let engine = match Engine::new(with.source_queue, &with.source_space, with.media, config.copy) {
            Ok(engine) => engine,
            Err(error) => return Err((error, with.source)),
        };
        let ends = [with.source, with.destination];
        Ok(Self::around(config, engine, ends, (with.policies, with.hooks), Way::Departure(departure), now))
    }

    fn assemble(config: MigrationConfig, with: Ingredients, way: Way, now: Time) -> Result<Self, CopySetupError> {
        let engine = Engine::new(with.source_queue, &with.source_space, with.media, config.copy)?;
        let ends = [with.source, with.destination];
        Ok(Self::around(config, engine, ends, (with.policies, with.hooks), way, now))
    }

    fn around(
        config: MigrationConfig,
        engine: Engine,
        [source, destination]: [Box<dyn Mmc>; 2],
        (policies, hooks): (Policies, Hooks),
        way: Way,
        now: Time,
    ) -> Self {
        let parts = Parts {
            config,
            source,
            destination,
            way,
            engine,
            media: Media::none(),
            extents: Extents::default(),
            copying: false,
            taps: Vec::new(),
            policies,
            hooks,
            formats: Formats::default(),
            footing: Footing::default(),
            costs: Costs { flush_us: 100, journal_us: 100, admin_us: 50 },
            report: Report::default(),
            began: now,
            epoch: 0,
            suspends: None,
            writing: false,
            hint: None,
            throttle: Throttle::default(),
            late_plans: 0,
            late_orders: 0,
            added_blocks: 0,
            past_pumps: PumpStats::default(),
            lost_queue: None,
        };
        Self { parts, state: State::Checking(Checking::default()), cancelled: false, lost: Lost::default() }
    }

    /// The state's name.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match &self.state {
            State::Checking(_) => Phase::Checking,
            State::Opening(_) => Phase::Opening,
            State::Copying(_) => Phase::Copying,
            State::SwitchingOver(_) => Phase::SwitchingOver,
            State::Completing(_) => Phase::Completing,
            State::Undoing(_) => Phase::Undoing,
            State::Ended(_) => Phase::Ended,
        }
    }

    /// How it ended; [`Outcome::Running`] before.
    #[must_use]
    pub fn outcome(&self) -> &Outcome {
        match &self.state {
            State::Ended(outcome) => outcome,
            _ => &Outcome::Running,
        }
    }

    /// A look at how far it is.
    #[must_use]
    pub fn progress(&self, now: Time) -> ProgressView {
        let plain = |phase| ProgressView { phase, left_bytes: self.parts.media.dirty_bytes(), ..ProgressView::default() };
        let view = match &self.state {
            State::Checking(_) => plain("checking"),
            State::Opening(_) => plain("opening"),
            State::Copying(rounds) => rounds.view(&self.parts),
            State::SwitchingOver(switch) => switch.view(&self.parts),
            State::Completing(_) => plain("completing"),
            State::Undoing(_) => plain("undoing"),
            State::Ended(_) => plain("ended"),
        };
        ProgressView { elapsed_us: now.us_since(self.parts.began), ..view }
    }

    /// Cancels it: it is undone and the source goes on serving, unless the destination has been told to resume already.
    pub fn cancel(&mut self) {
        self.cancelled = true;
    }

    /// The report; complete once the migration has ended.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.parts.report
    }

    /// Blocks that are marked as unreadable at the destination so far.
    #[must_use]
    pub fn uncorrectable(&self) -> &[Uncorrectable] {
        self.parts.engine.uncorrectable()
    }

    /// The moving namespaces with their maps.
    #[must_use]
    pub fn media(&self) -> &Media {
        &self.parts.media
    }

    /// Gives back what it was made of, but for the queues of the copy, and the report. Of a media move whose copy no controller
    /// stood before, the second controller and the slots are nobody's.
    #[must_use]
    pub fn finish(self) -> (Box<dyn Mmc>, Box<dyn Mmc>, Policies, Hooks, Report) {
        let parts = self.parts;
        (parts.source, parts.destination, parts.policies, parts.hooks, parts.report)
    }

    /// The exchange of a media move.
    #[must_use]
    pub fn exchange(&mut self) -> Option<&mut dyn BackingExchange> {
        match &mut self.parts.way {
            Way::Controller | Way::HandOver(_) | Way::Departure(_) => None,
            Way::Media(exchange) => Some(exchange.as_mut()),
        }
    }

    /// What undoes a migration whatever state it is in.
    fn trouble(&mut self, now: Time) -> Option<Reason> {
        let way_back = match &self.state {
            State::Checking(_) | State::Opening(_) | State::Copying(_) => true,
            State::SwitchingOver(_) => !self.parts.footing.resumed,
            State::Completing(_) | State::Undoing(_) | State::Ended(_) => false,
        };
        let changed = |mmc: &mut dyn Mmc| {
            let mut changed = false;
            while let Some(notice) = mmc.next_notice() {
                changed |= notice.namespace_changed();
            }
            changed
        };
        let source_changed = changed(self.parts.source.as_mut());
        let destination_changed = changed(self.parts.destination.as_mut());
        if !way_back {
            return None;
        }
        if self.cancelled {
            return Some(Reason::Cancelled);
        }
        if self.parts.hand_over().is_some_and(HandOver::is_taken_back) {
            return Some(Reason::TakenBack);
        }
        if matches!(&self.state, State::SwitchingOver(switch) if switch.is_told()) {
            // The source has given all that it had, and is not asked for anything more: only the way back would need it.
            return self.tend_destination(now);
        }
        if matches!(self.state, State::Checking(_)) {
            return None;
        }
        // A drive may tell us what we have asked of it; nobody else can have detached them meanwhile, which is looked at.
        let source_changed = source_changed && !self.parts.footing.detached;
        if source_changed || destination_changed {
            return Some(Reason::NamespacesChanged(if source_changed { "source" } else { "destination" }));
        }
        if let Health::Failed(why) = self.parts.source.health() {
            return Some(Reason::Source(why));
        }
        if let Some(why) = self.parts.lost_queue.take() {
            return Some(Reason::Source(why));
        }
        if let Some(error) = self.parts.engine.error() {
            return Some(error.into());
        }
        self.tend_destination(now)
    }

    /// A destination whose queue has died is reset, if it has not been, and gets a new queue; what it had not flushed is copied
    /// again (rule 3).
    fn tend_destination(&mut self, now: Time) -> Option<Reason> {
        let parts = &mut self.parts;
        let failed = matches!(parts.destination.health(), Health::Failed(_));
        if !parts.engine.destination().is_dead() && !failed {
            self.lost = Lost::default();
            return None;
        }
        let (since, generation) = *self.lost.since.get_or_insert((now, parts.destination.generation()));
        if now.us_since(since) / 1000 >= parts.config.limits.undo_ms {
            return Some(Reason::Destination("it was lost and did not come back".to_owned()));
        }
        // Only a reset tells what a command of unknown outcome can no longer do.
        if !self.lost.reset {
            self.lost.reset = true;
            if failed || parts.destination.generation() == generation {
                parts.destination.reset(now);
            }
        } else if parts.destination.health() == Health::Ready && parts.destination.generation() != generation {
            if !self.lost.asked {
                self.lost.asked = parts.destination.create_io_queue(now).is_ok();
            } else if let Some(made) = parts.destination.io_queue() {
                match made {
                    Ok(queue) => parts.engine.destination().revive(queue),
                    Err(_) => self.lost.asked = false,
                }
            }
        }
        None
    }

    fn turn(&mut self, turn: Turn, now: Time) {
        let parts = &mut self.parts;
        match turn {
            Turn::Stay => {}
            Turn::Next(state) => {
                if let (State::Copying(_), Some(hand_over)) = (&state, parts.hand_over()) {
                    hand_over.says(Stage::Copying);
                }
                self.state = state;
            }
            Turn::Back(reason) => {
                tracing::info!(migration = parts.config.id, %reason, "migration is undone");
                self.state = State::Undoing(Box::new(Undoing::new(reason, None, parts, now)));
            }
            Turn::Retry(reason) => self.retry(reason, now),
            Turn::Doubt(reason, what) => {
                tracing::error!(migration = parts.config.id, %reason, what, "migration ends in doubt, the guest is paused");
                self.end(Outcome::InDoubt { reason, what }, now);
            }
            Turn::End(outcome) => self.end(outcome, now),
        }
    }

    fn retry(&mut self, reason: Reason, now: Time) {
        let parts = &mut self.parts;
        let again = parts.report.attempts < parts.config.limits.max_attempts;
        tracing::info!(migration = parts.config.id, %reason, again, "switch-over is undone");
        if parts.report.undone_attempts.len() < KEPT_ATTEMPTS {
            parts.report.undone_attempts.push(reason.clone());
        }
        let before = std::mem::replace(&mut self.state, State::Checking(Checking::default()));
        let rounds = match before {
            State::SwitchingOver(switch) if again => Some(Box::new(switch.rounds)),
            _ => None,
        };
        self.state = State::Undoing(Box::new(Undoing::new(reason, rounds, parts, now)));
    }

    fn end(&mut self, outcome: Outcome, now: Time) {
        if let Some(hand_over) = self.parts.hand_over() {
            hand_over.says(Stage::Ended(outcome.clone()));
        }
        self.parts.report.outcome = outcome.clone();
        self.parts.fill_report(now);
        tracing::info!(migration = self.parts.config.id, ?outcome, "migration has ended");
        self.state = State::Ended(outcome);
    }

    fn step(&mut self, now: Time) -> Turn {
        let parts = &mut self.parts;
        match &mut self.state {
            State::Checking(state) => state.poll(parts, now),
            State::Opening(state) => state.poll(parts, now),
            State::Copying(state) => state.poll(parts, now),
            State::SwitchingOver(state) => state.poll(parts, now),
            State::Completing(state) => state.poll(parts, now),
            State::Undoing(state) => state.poll(parts, now),
            State::Ended(_) => Turn::Stay,
        }
    }
}

impl Poll for Migration {
    fn poll(&mut self, now: Time) -> Progress {
        let controllers = self.parts.source.poll(now).and(self.parts.destination.poll(now));
        if matches!(self.state, State::Ended(_)) {
            return controllers;
        }
        let parts = &mut self.parts;
        let mut work = parts.drain(now);
        work += u32::from(parts.media.fill_some());
        let extents = parts.copying.then_some(&mut parts.extents);
        work += parts.engine.poll(now, &mut parts.media, extents);
        match self.trouble(now) {
            Some(reason) => self.turn(Turn::Back(reason), now),
            None => {
                if let State::Undoing(undoing) = &mut self.state {
                    if self.cancelled {
                        undoing.give_up(Reason::Cancelled);
                    } else if self.parts.hand_over().is_some_and(HandOver::is_taken_back) {
                        undoing.give_up(Reason::TakenBack);
                    }
                }
                let turn = self.step(now);
                self.turn(turn, now);
            }
        }
        // Policies and journals answer from other threads and the controllers' memory is polled: a running migration is never
        // idle for long.
        let soon = if work > 0 { Next::Now } else { Next::At(now.after_us(20)) };
        controllers.and(Progress { work, next: soon })
    }
}
