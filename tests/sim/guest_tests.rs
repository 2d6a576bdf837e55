use super::super::disk::{Failing, SimDisk};
use super::super::fault::Fault;
use super::super::oracle::{Facts, Oracles};
use super::*;
use dray_controller::{ControllerConfig, ControllerRole, NamespaceConfig, Subsystem, SubsystemConfig};
use dray_device::slot::Fence;
use dray_device::space::AddressSpace;
use dray_nvme::registers::offset;
use std::collections::BTreeSet;

const BLOCKS: u64 = 256;
const COMMANDS: u64 = 400;

/// Two guests that share a namespace, over one disk.
struct World {
    seed: u64,
    now: Time,
    random: fastrand::Rng,
    subsystem: Subsystem,
    disk: SimDisk,
    guests: Vec<(SimGuest, Slot)>,
    oracles: Oracles,
    seen: BTreeSet<&'static str>,
}

impl World {
    fn new(seed: u64, cached: bool) -> Self {
        let disk = SimDisk::new(0, 1, BLOCKS, 512, seed);
        disk.put(|lba| content::initial(seed, 1, lba));
        disk.set_cached(cached);
        let controller = |cntlid, role| ControllerConfig {
            cntlid, role, namespaces: if cntlid == 1 { Vec::new() } else { vec![1] }, io_queues: 4, vectors: 1, fence: Fence::new(false),
        };
        let controllers = vec![
            controller(1, ControllerRole::Management),
            controller(2, ControllerRole::Migratable),
            controller(3, ControllerRole::Migratable),
        ];
        let config = SubsystemConfig { controllers, max_queue_entries: 64, mdts: 4, contexts: 64, ..SubsystemConfig::default() };
        let namespace = NamespaceConfig {
            nsid: 1, nguid: [1; 16], eui64: [1; 8], uuid: [1; 16], shared: true, write_protected: false,
        };
        let subsystem = Subsystem::new(config, vec![(namespace, disk.backing())]).expect("a subsystem");
        let guests = (0..2).map(|guest| {
            let slot = Slot::new(AddressSpace::default(), 1).expect("a slot");
            slot.point_at(&subsystem.plug(2 + guest as u16).expect("a controller"));
            (SimGuest::new(plan(seed, guest), &slot), slot)
        });
        let guests = guests.collect();
        let facts = Facts { seed, namespaces: vec![(1, BLOCKS, 512)], cached };
        let oracles = Oracles::new(&facts);
        let random = fastrand::Rng::with_seed(seed);
        Self { seed, now: Time::from_us(1), random, subsystem, disk, guests, oracles, seen: BTreeSet::new() }
    }

    fn turn(&mut self) {
        let mut events = Vec::new();
        let who = self.random.usize(0..3);
        match self.guests.get_mut(who) {
            Some((guest, _)) => _ = guest.poll(self.now, &mut events),
            None => _ = self.subsystem.poll(self.now),
        }
        self.disk.take_events(&mut events);
        for event in events {
            self.seen.insert(match &event {
                Event::Ended { end: End::Lost, .. } => "lost",
                Event::Ended { end: End::Failed(_), .. } => "failed",
                Event::Submitted { op, .. } => match op {
                    Op::Read => "read",
                    Op::Write { fua: false } => "write",
                    Op::Write { fua: true } => "fua",
                    Op::WriteZeroes { .. } => "zeroes",
                    Op::Deallocate => "deallocate",
                    Op::Compare => "compare",
                    Op::Flush => "flush",
                },
                Event::Disabled { .. } => "disabled",
                _ => "",
            });
            self.oracles.see(self.now, &event).unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
        }
        self.now = self.now.after_ns(self.random.u64(100..4_000));
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let end = self.now.after_ms(10_000);
        while !done(self) {
            assert!(self.now < end, "seed {}: it does not end: {:?}", self.seed, self.guests[0].0.driver_state());
            self.turn();
        }
    }

    /// Everything has ended, and what is on the disk is right.
    fn rest(&mut self) {
        self.until(|world| world.guests.iter().all(|(guest, _)| guest.is_done()));
        let values = self.disk.decode_all();
        self.oracles.see(self.now, &Event::Rest { nsid: 1, side: 0, values }).expect("at rest");
        self.oracles.finish(self.now).expect("at the end");
    }
}

fn plan(seed: u64, guest: GuestId) -> GuestPlan {
    GuestPlan {
        seed: seed ^ (guest as u64 + 1) << 20,
        guest,
        life: 0,
        namespaces: vec![(1, 0, BLOCKS)],
        block_bytes: 512,
        commands: COMMANDS,
        depth: 8,
        queues: 2,
        max_blocks: 8,
        gap_ns: (0, 5_000),
        hot: 40,
        mix: Mix::default(),
        io_timeout_ms: 5,
    }
}

#[test]
fn guests_do_what_they_are_planned_to_and_nobody_objects() {
    let mut seen = BTreeSet::new();
    for seed in 1..12 {
        let mut world = World::new(seed, seed % 2 == 0);
        world.rest();
        assert!(world.guests.iter().all(|(guest, _)| guest.ended() == COMMANDS));
        assert!(world.guests[0].0.sample().p50_us > 0);
        seen.append(&mut world.seen);
    }
    for what in ["read", "write", "fua", "zeroes", "deallocate", "compare", "flush"] {
        assert!(seen.contains(what), "{what}");
    }
}

#[test]
fn resets_and_errors_are_gone_on_from() {
    let mut seen = BTreeSet::new();
    for seed in 1..24 {
        let mut world = World::new(seed, seed % 2 == 0);
        for round in 0..6 {
            let until = (round + 1) * 60;
            world.until(|world| world.guests[0].0.ended() >= until);
            match (seed + round) % 4 {
                0 => world.guests[0].0.request_reset(),
                // Past its driver.
                1 => world.guests[1].1.function().write32(offset::CC, 0),
                way => world.disk.fail(Failing {
                    blocks: 0..BLOCKS,
                    reads: way == 2,
                    times: 5,
                    status: if way == 2 { Status::UNRECOVERED_READ } else { Status::WRITE_FAULT },
                    touches: way == 3 && seed % 3 == 0,
                    fault: Fault::ReadFails,
                }),
            }
        }
        world.rest();
        seen.append(&mut world.seen);
    }
    for what in ["lost", "failed", "disabled"] {
        assert!(seen.contains(what), "{what}");
    }
}

#[test]
fn what_a_guest_reads_is_judged() {
    let caught = (1..8).any(|seed| {
        let mut world = World::new(seed, false);
        world.until(|world| world.guests[0].0.ended() >= 200);
        // A block's content goes back to what it was at the beginning.
        world.disk.put(|lba| content::initial(seed, 1, lba));
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.rest())).is_err()
    });
    assert!(caught);
}

#[test]
fn a_completion_with_the_phase_tag_of_the_other_pass_is_noticed() {
    let mut world = World::new(3, false);
    world.until(|world| world.guests[0].0.is_running() && world.guests[0].0.outstanding() > 0);
    let (now, guest) = (world.now, &world.guests[0].0);
    let pair = guest.pairs.iter().find(|pair| pair.outstanding() > 0).expect("a queue with a command");
    let (place, cid) = pair.identifiers().next().expect("its identifier");
    let id = guest.places[place as usize].expect("its command").id;
    let unseen = |guest: &SimGuest| {
        let mut events = Vec::new();
        guest.look_for_unseen(&mut events);
        events.iter().filter(|event| matches!(event, Event::Unseen { guest: 0, id: of } if *of == id)).count()
    };
    assert_eq!(unseen(guest), 0, "it is outstanding, and nothing was posted");
    // In the first pass entries have the tag 1. This one has not.
    let queue = pair.completion_memory().expect("memory");
    queue.part(queue.len() - CQE_BYTES + CID_AT, 2).expect("the last entry").write(&cid.to_le_bytes());
    assert_eq!(unseen(guest), 1);
    // Its polls notice it too, and the oracle objects.
    let mut events = Vec::new();
    let _progress = world.guests[0].0.poll(now.after_us(LOOK_US), &mut events);
    let objection = events.iter().find_map(|event| world.oracles.see(now, event).err()).expect("an objection");
    assert_eq!(objection.rule, "completions are found");
}
