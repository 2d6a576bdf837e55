//! The software controller before a hostile guest, and its management controller before a hostile host.
//!
//! Registers, doorbells, queue memory, PRP and SGL lists and data come from the input. Memory changes between two polls, in the
//! middle of one (whenever the controller calls the backing, which it does between fetching a command and ending it; and by
//! itself, where a command's data lies over its own list or queue, or over another mapping of the same pages), and, if the
//! input asks for it, all the time by a second thread.
//!
//! It asserts what [`Party::check`] and [`crate::media::Rules`] say, a bound on operations under way, that completions are those
//! of commands (always where only whole commands are sent, else once the past is reset away), and that the party, its neighbour
//! and the manager are served once the past is reset away.

use crate::commands;
use crate::guest::{DATA_PAGE, Party, QUEUES};
use crate::input::Input;
use crate::media::{BLOCK, Manner, Media, Meddler};
use dray_controller::{ControllerConfig, ControllerRole, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::memory::PAGE;
use dray_device::poll::{Poll, Time};
use dray_device::slot::Fence;
use dray_nvme::command::{CompletionEntry, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, CommandSetId, IdentifyController};
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::FromBytes;

/// CNTLID of the management controller.
pub const MMC: u16 = 1;
/// CNTLID of the guest's controller.
pub const MC: u16 = 2;
/// CNTLID of the neighbour's.
pub const NEIGHBOUR: u16 = 3;
/// Serial number of the subsystem.
pub const SERIAL: &str = "FUZZ";

/// Blocks of each namespace.
const BLOCKS: usize = 200;
/// Commands of one controller under way at most.
const CONTEXTS: u16 = 16;
/// What the neighbour's and the write-protected namespace are full of.
const FILL: u8 = 0x3c;
/// Steps of one session.
const MOST_STEPS: usize = 200;
/// Polls within which anything that is well has to happen.
const PATIENCE: usize = 3000;

/// A subsystem with the parties at it.
pub struct World {
    /// The subsystem.
    pub subsystem: Subsystem,
    /// The guest, the host at the management controller, the neighbour.
    pub parties: [Party; 3],
    /// Namespaces 1 (the guest's), 2 (the guest's, write-protected), 3 (the neighbour's).
    pub media: [Media; 3],
    /// What rewrites memory.
    pub meddler: Meddler,
    now: Time,
}

/// Places of [`World::parties`].
pub const GUEST: usize = 0;
/// The host at the management controller.
pub const HOST: usize = 1;
/// The guest next door.
pub const NEXT_DOOR: usize = 2;

impl World {
    /// A subsystem whose slots point at their controllers; nothing is enabled. `shared` gives the neighbour namespace 1 too.
    #[must_use]
    pub fn new(shared: bool) -> Self {
        let controller = |cntlid, namespaces| {
            let role = if cntlid == MMC { ControllerRole::Management } else { ControllerRole::Migratable };
            ControllerConfig { cntlid, role, namespaces, io_queues: 4, vectors: 4, fence: Fence::default() }
        };
        let next_door = if shared { vec![1, 3] } else { vec![3] };
        let config = SubsystemConfig {
            serial: SERIAL.into(),
            controllers: vec![controller(MMC, vec![]), controller(MC, vec![1, 2]), controller(NEIGHBOUR, next_door)],
            max_queue_entries: 64,
            mdts: 3,
            contexts: CONTEXTS,
            jobs: 2,
            max_cdq_bytes: 64 << 10,
            ..SubsystemConfig::default()
        };
        let meddler = Meddler::default();
        let most = 3 * usize::from(CONTEXTS);
        let media = [0, FILL, FILL].map(|byte| Media::new(BLOCKS, byte, most, &meddler));
        let namespace = |nsid: u32| NamespaceConfig {
            nsid,
            nguid: [nsid as u8; 16],
            eui64: [nsid as u8; 8],
            uuid: [nsid as u8; 16],
            shared: nsid == 1 && shared,
            write_protected: nsid == 2,
        };
        let namespaces = media.iter().zip(1..).map(|(media, nsid)| (namespace(nsid), media.backing())).collect();
        let subsystem = Subsystem::new(config, namespaces).expect("a subsystem");
        let parties = [MC, MMC, NEIGHBOUR].map(|cntlid| {
            let party = Party::new();
            party.slot.point_at(&subsystem.plug(cntlid).expect("a controller"));
            party
        });
        let places: Vec<_> = parties.iter().flat_map(Party::places).collect();
        media.iter().for_each(|media| media.rules(|rules| rules.memory.clone_from(&places)));
        Self { subsystem, parties, media, meddler, now: Time(1_000) }
    }

    /// Polls so often; a microsecond passes each time.
    pub fn polls(&mut self, count: usize) {
        for _ in 0..count {
            self.now = self.now.after_us(1);
            let _progress = self.subsystem.poll(self.now);
            self.parties.iter_mut().for_each(Party::attend);
        }
    }

    /// Lets time pass.
    pub fn wait(&mut self, us: u64) {
        self.now = self.now.after_us(us.min(1 << 40));
    }

    /// Resets a party's controller and enables it.
    ///
    /// # Panics
    /// When CSTS.RDY does not follow.
    pub fn enable(&mut self, who: usize) {
        self.parties[who].heal();
        self.until(|world| world.parties[who].csts() & 1 == 0, "CSTS.RDY falls after a reset");
        self.parties[who].enable();
        self.until(|world| world.parties[who].csts() & 3 == 1, "CSTS.RDY follows CC.EN");
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool, what: &str) {
        for _ in 0..PATIENCE {
            if done(self) {
                return;
            }
            self.polls(1);
        }
        panic!("never: {what}");
    }

    /// Runs a command in a queue that is new.
    ///
    /// # Panics
    /// When it does not end.
    pub fn command(&mut self, who: usize, qid: usize, entry: &SubmissionEntry) -> CompletionEntry {
        let cid = self.parties[who].push(qid, entry);
        self.parties[who].ring(qid, 0);
        for _ in 0..PATIENCE {
            self.polls(1);
            if let Some(done) = self.parties[who].completion(qid, cid) {
                return done;
            }
        }
        panic!("{entry:?} of party {who} in queue {qid} does not end");
    }

    /// As [`command`](Self::command), for one that must succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn good(&mut self, who: usize, qid: usize, entry: &SubmissionEntry) -> CompletionEntry {
        let done = self.command(who, qid, entry);
        assert!(!done.status().is_error(), "{entry:?} of party {who} in queue {qid}: {done:?}");
        done
    }

    /// Creates queue pair 1 of a party whose controller is enabled.
    pub fn pair(&mut self, who: usize, qid: u16) {
        for entry in self.parties[who].pair_commands(qid) {
            self.good(who, 0, &entry);
        }
    }

    /// Asserts that a party is served as if nothing had been: a reset, Identify, a write and a read of `nsid`.
    pub fn serves(&mut self, who: usize, nsid: u32) {
        self.enable(who);
        let page = self.parties[who].page(DATA_PAGE);
        self.good(who, 0, &SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM).with_prps(page, 0));
        let found = self.parties[who].get(DATA_PAGE * PAGE, PAGE);
        let found = IdentifyController::read_from_bytes(&found).expect("a page");
        assert!(found.sn.starts_with(SERIAL.as_bytes()), "the serial number of party {who}");
        self.pair(who, 1);
        for round in 1..3u8 {
            let bytes = [round ^ 0x69; BLOCK];
            self.parties[who].put(DATA_PAGE * PAGE, &bytes);
            let slba = u64::from(round) * 50;
            self.good(who, 1, &SubmissionEntry::write(nsid, slba, 1).with_prps(page, 0));
            self.good(who, 1, &SubmissionEntry::read(nsid, slba, 1).with_prps(page + BLOCK as u64, 0));
            assert_eq!(self.parties[who].get(DATA_PAGE * PAGE + BLOCK, BLOCK), bytes, "what party {who} wrote");
        }
        for wrong in [SubmissionEntry::read(99, 0, 1), SubmissionEntry::read(nsid, BLOCKS as u64, 1)] {
            let done = self.command(who, 1, &wrong.with_prps(page, 0));
            assert!(done.status().is_error(), "{wrong:?} of party {who}: {done:?}");
        }
        // Identify and the creation of a queue pair; two writes and four reads.
        self.polls(3);
        self.parties[who].check_completions();
        let found = [0, 1].map(|qid| self.parties[who].completions(qid));
        assert_eq!(found, [3, 6], "completions for party {who}");
    }

    /// What holds at any time.
    pub fn check(&self) {
        self.parties.iter().for_each(Party::check);
        let under_way: usize = self.media.iter().map(Media::pending).sum();
        assert!(under_way <= 3 * usize::from(CONTEXTS), "{under_way} operations under way");
        assert!(self.media[1].is_all(FILL), "a write-protected namespace has changed");
    }

    /// Lifts the limits that a hostile host may have set, and any suspension.
    pub fn heal(&mut self) {
        self.meddler.clear();
        self.media.iter().for_each(|media| media.set_manner(Manner::default()));
        self.enable(HOST);
        for cntlid in [MC, NEIGHBOUR] {
            let limit = SubmissionEntry::set_features(FeatureId::VENDOR_GUEST_LIMIT, cntlid.into(), false);
            self.good(HOST, 0, &limit);
        }
    }
}

/// What the first byte of an input asks for.
#[derive(Clone, Copy, Debug)]
struct Play {
    /// The host at the management controller is hostile too.
    host: bool,
    /// Only whole commands over data that nothing else touches: changes of the media are held against them.
    whole: bool,
    /// A second thread rewrites words of the guest's memory all the time.
    thread: bool,
    /// The session begins with an enabled controller and queues.
    begun: bool,
}

/// Runs one session.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let bits = input.u8();
    let play = Play { host: bits & 1 != 0, whole: bits & 6 == 2, thread: bits & 0xe0 == 0xe0, begun: bits & 8 == 0 };
    let mut world = World::new(false);
    begin(&mut world, play);
    if play.thread && !play.whole {
        with_second_actor(&mut world, play, &mut input);
    } else {
        session(&mut world, play, &mut input);
    }
    world.check();
    // Whatever the past was, a reset ends it.
    if play.whole {
        world.media[0].rules(|rules| rules.ranges = None);
        world.parties[GUEST].check_completions();
    }
    world.media[2].rules(|rules| rules.untouched = false);
    world.parties[GUEST].data_only = false;
    world.meddler.clear();
    if !play.host {
        // Next door nothing was noticed, whatever still goes on here.
        world.media[2].set_manner(Manner::default());
        let page = world.parties[NEXT_DOOR].page(DATA_PAGE);
        world.good(NEXT_DOOR, 1, &SubmissionEntry::read(3, 0, 1).with_prps(page, 0));
        assert_eq!(world.parties[NEXT_DOOR].get(DATA_PAGE * PAGE, BLOCK), [FILL; BLOCK], "the neighbour's data");
    }
    world.heal();
    world.serves(GUEST, 1);
    world.serves(NEXT_DOOR, 3);
    world.polls(20);
    world.check();
}

fn begin(world: &mut World, play: Play) {
    world.serves(NEXT_DOOR, 3);
    world.media[1].rules(|rules| rules.read_only = true);
    if !play.host {
        // The host's controller reaches every namespace.
        world.media[2].rules(|rules| rules.untouched = true);
    }
    if play.begun {
        let parties = if play.host { &[GUEST, HOST][..] } else { &[GUEST] };
        for &who in parties {
            world.enable(who);
            world.pair(who, 1);
            world.pair(who, 2);
        }
    }
    if play.whole {
        world.parties[GUEST].data_only = true;
        world.media[0].rules(|rules| rules.ranges = Some(Vec::new()));
    }
}

fn session(world: &mut World, play: Play, input: &mut Input<'_>) {
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        step(world, play, input);
    }
    world.polls(8);
}

fn step(world: &mut World, play: Play, input: &mut Input<'_>) {
    let what = input.u8();
    // Whole commands are the guest's alone: the host writes everywhere.
    let who = if play.host && !play.whole && what & 0x80 != 0 { HOST } else { GUEST };
    match what & 31 {
        0..=6 => {
            let qid = input.below(QUEUES - 1) + 1;
            let entry = if play.whole {
                let (entry, range) = commands::whole_io(&world.parties[who], input);
                world.media[0].rules(|rules| rules.ranges.iter_mut().for_each(|ranges| ranges.extend(range)));
                entry
            } else {
                commands::io(&world.parties[who], input)
            };
            submit(world, who, qid, &entry, what);
        }
        7..=13 => {
            let entry = commands::admin(&world.parties[who], input);
            submit(world, who, 0, &entry, what);
        }
        14..=21 if !(play.whole && what & 31 == 14) => world.parties[who].act((what & 31) - 14, input),
        22 => world.media[input.below(3)].set_manner(Manner(input.u8())),
        23 => world.wait(input.number()),
        24 | 25 if !play.whole => {
            let (at, len) = (usize::from(input.u16()) * 2, usize::from(input.u8() & 31) + 1);
            world.meddler.add(&world.parties[who].memory, at, input.bytes(len));
        }
        26 => {
            let cntlid = [MC, MMC][who];
            let plug = world.subsystem.plug(cntlid).expect("a controller");
            world.parties[who].slot.point_at(&plug);
        }
        27 => world.parties[who].heal(),
        28 => world.parties[who].enable(),
        29 => world.parties[who].ring(input.below(QUEUES), input.number32()),
        _ => world.polls(input.below(16) + 1),
    }
}

/// Puts a command into a queue; the doorbell and polls follow unless the input collects commands.
fn submit(world: &mut World, who: usize, qid: usize, entry: &SubmissionEntry, what: u8) {
    world.parties[who].push(qid, entry);
    if what & 0x20 == 0 {
        world.parties[who].ring(qid, 0);
        if what & 0x40 == 0 {
            world.polls(3);
            world.parties[who].give_back(qid, 0);
        }
    }
}

/// The session, while a second thread writes two values in turn to words of the guest's memory.
fn with_second_actor(world: &mut World, play: Play, input: &mut Input<'_>) {
    let words: Vec<_> = (0..4)
        .map(|_| (world.parties[GUEST].word(usize::from(input.u16()) * 2), input.number32(), input.number32()))
        .collect();
    let stop = AtomicBool::new(false);
    let stop = &stop;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                for (place, one, other) in &words {
                    Party::store(place, *one);
                    Party::store(place, *other);
                }
            }
        });
        // A panic must stop the thread too, or the scope waits for ever.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| session(world, play, input)));
        stop.store(true, Ordering::Release);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_session_and_one_of_zeroes_are_well() {
        run(&[]);
        run(&[0; 200]);
        run(&[0xff; 200]);
    }
}
