//! The main thread's part: what blocks. It brings management controllers up, sets migrations up, and keeps others away from what
//! a client uses.

use super::manager::SharedMmc;
use super::{Ask, Board, Gate, Gates, Session, other};
use crate::control::{ControlError, ErrorCode};
use crate::core::jobs::Worker;
use crate::core::records::RecordJournal;
use crate::moving::{MovingError, Plan, local_features, migration_config, mmc_driver};
use crate::recovery::Records;
use crate::run::fronts::Unknown;
use crate::run::migrate::{Kind, failed, namespaces, reclaim, seats};
use crate::run::{Appliance, look, say};
use dray_export::hooks::HookError;
use dray_migration::mmc::Health;
use dray_migration::{GuestSlot, HandOver, Hooks, Ingredients, LocalDestination, Migration, Mmc, Owner};
use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// What the main thread keeps for clients that migrate.
pub(in crate::run) struct Desk {
    pub(in crate::run) board: Arc<Board>,
    asked: Receiver<Ask>,
    /// Of the pair that moves: the source of `[migration]` first.
    gates: [Gate; 2],
    cntlids: [u16; 2],
    managers: [Option<SharedMmc>; 2],
}

/// Slots stay as they are: each end has its own.
struct Still;

impl GuestSlot for Still {
    fn point_at_destination(&mut self, _cntlid: u16) {}
    fn point_at_source(&mut self, _cntlid: u16) {}
}

fn hooked(error: ControlError) -> HookError {
    match error.code {
        ErrorCode::Busy | ErrorCode::Refused | ErrorCode::Stopping => HookError::Busy(error.message),
        _ => HookError::Failed(error.message),
    }
}

impl Desk {
    pub(in crate::run) fn new(board: Arc<Board>, asked: Receiver<Ask>, gates: [Gate; 2], cntlids: [u16; 2]) -> Self {
        Self { board, asked, gates, cntlids, managers: [None, None] }
    }

    /// Gives the driver of an end up, unless a client uses it.
    fn let_go(&mut self, end: Owner) -> Result<(), ControlError> {
        let manager = &mut self.managers[end as usize];
        if manager.as_ref().is_some_and(SharedMmc::is_used) {
            let message = "a client migrates, has stopped or logs a controller over vfio-user";
            return Err(ControlError::new(ErrorCode::Busy, message));
        }
        *manager = None;
        Ok(())
    }
}

impl Appliance {
    /// Answers what hooks have asked for.
    pub(in crate::run) fn tend_clients(&mut self) {
        while let Some(ask) = self.desk.as_ref().and_then(|desk| desk.asked.try_recv().ok()) {
            // Whoever asked may have given up.
            match ask {
                Ask::Manager(end, to) => {
                    let _gone = to.send(self.manager(end).map_err(hooked));
                }
                Ask::Begin(end, to) => {
                    let begun = self.begin_hand_over(end);
                    if let Err(error) = &begun {
                        say(&format!("a client's migration does not begin: {}", error.message));
                    }
                    let _gone = to.send(begun.map_err(hooked));
                }
            }
        }
    }

    /// Nobody but a client may use the management controller of a subsystem, while one does.
    pub(in crate::run) fn clients_let_go(&mut self, name: &str) -> Result<(), ControlError> {
        for end in [Owner::Source, Owner::Destination] {
            if self.places[self.ends[end as usize]].name == name
                && let Some(desk) = &mut self.desk
            {
                desk.let_go(end)?;
            }
        }
        Ok(())
    }

    /// The driver of an end's management controller.
    fn manager(&mut self, end: Owner) -> Result<SharedMmc, ControlError> {
        let Some(desk) = &mut self.desk else { return Err(failed("the management controller", "it is not shared")) };
        let at = end as usize;
        if desk.managers[at].as_ref().is_some_and(|mmc| !mmc.is_used() && matches!(mmc.health(), Health::Failed(_))) {
            desk.managers[at] = None;
        }
        if let Some(mmc) = &desk.managers[at] {
            return Ok(mmc.clone());
        }
        self.migrations.is_free()?;
        let place = &self.places[self.ends[at]];
        self.management_is_free(place, &look(&self.mailbox)?)?;
        // A migration that has ended still holds its management controllers.
        drop(reclaim(&self.mailbox)?);
        let driver = mmc_driver(&self.config, &place.management.1);
        let driver = driver.map_err(|error| failed("the management controller", error))?;
        let mmc = SharedMmc::start(driver, self.clock).map_err(|error| failed("the management controller", error))?;
        if let Some(desk) = &mut self.desk {
            desk.managers[at] = Some(mmc.clone());
        }
        Ok(mmc)
    }

    /// Sets up a migration away from an end, which its client drives.
    fn begin_hand_over(&mut self, from: Owner) -> Result<Arc<Session>, ControlError> {
        self.migrations.is_free()?;
        if self.migrations.serving() != from {
            return Err(ControlError::new(ErrorCode::Refused, "this end does not serve"));
        }
        let managers = [self.manager(from)?, self.manager(other(from))?];
        let Some(desk) = &self.desk else { return Err(failed("the migration", "nobody hands over here")) };
        let back = from == Owner::Destination;
        let turned = |pair: [u16; 2]| if back { (pair[1], pair[0]) } else { (pair[0], pair[1]) };
        let mut config = self.config.clone();
        if back {
            let migration = &mut config.file.migration;
            std::mem::swap(&mut migration.from, &mut migration.to);
        }
        let names = [&config.file.migration.from, &config.file.migration.to].map(|name| name.get_ref().clone());
        let mut token = [0; 16];
        let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut token));
        random.map_err(|error| failed("/dev/urandom", error))?;
        let records = Records::open(&config).map_err(|error| failed("the records", error))?;
        let (policies, hosts) = seats(&config, self.clock, 1, &mut self.seats)?;
        let worker = Worker::start().map_err(|error| failed("the job worker", error))?;
        let jobs = worker.jobs().ok_or_else(|| failed("the job worker", "it has ended"))?;
        let number = records.next_migration();
        let plan = Plan {
            id: number,
            ends: records.ends(),
            controllers: vec![turned(desk.cntlids)],
            namespaces: namespaces(&config, &names[0]),
            seed: self.clock.now().0 ^ number,
            max_bytes_per_s: 0,
        };
        let [a, b] = desk.gates.clone();
        let hooks = Hooks {
            slot: Box::new(Still),
            fence: Box::new(Gates(vec![if back { [b, a] } else { [a, b] }])),
            guest: Box::new(Unknown),
            journal: Box::new(RecordJournal::new(records.into_stores(), Box::new(jobs))),
        };
        let session = Arc::new(Session { number, token, from, hand_over: HandOver::new() });
        let with = |error: MovingError| failed("the migration cannot be set up", error);
        let [source, destination] = managers;
        let (reads, writes) = (source.copy_queue(self.clock).map_err(with)?, destination.copy_queue(self.clock).map_err(with)?);
        let features = local_features(destination.identify());
        let ingredients = Ingredients {
            source_queue: Box::new(reads),
            source_space: source.space(),
            media: Box::new(LocalDestination::new(Box::new(writes), destination.space(), features)),
            source: Box::new(source),
            destination: Box::new(destination),
            policies,
            hooks,
        };
        let setup = migration_config(&config, plan);
        let migration = Migration::hand_over(setup, ingredients, session.hand_over.clone(), self.clock.now());
        let migration = migration.map_err(|error| failed("the migration cannot be set up", error))?;
        let board = Arc::clone(&desk.board);
        board.set_session(Some(Arc::clone(&session)));
        let line = format!("migration of {} to {} begins, driven by its client", names[0], names[1]);
        let kind = Kind::HandOver { names, session: Arc::clone(&session), board };
        self.migrations.begin(number, Box::new(migration), kind, None, &config, (hosts, worker));
        say(&line);
        Ok(session)
    }
}
