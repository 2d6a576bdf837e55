//! There and back, changes of mind, blobs, deaths and kills.

use crate::rig::{Place, Vm, bring, carry, connect, go, refused, stream};
use dray_device::function::Function;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::space::AddressSpace;
use dray_device::vfio_user::wire::{errno, migration, state};
use dray_nvme::registers::{Csts, offset};
use std::time::Duration;

#[test]
fn a_guest_goes_there_and_back_with_its_memory_and_its_queues() {
    let place = Place::new("moves");
    let running = place.start();
    assert!(running.said.contains("fenced: the other end of [migration] serves"), "{}", running.said);
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    assert_eq!(source.migration_ways().expect("ways"), migration::STOP_COPY | migration::PRE_COPY);
    vm.goes_on(100);
    go(&source, state::PRE_COPY);
    let mut nothing = Vec::new();
    assert_eq!(source.mig_read(4096, &mut nothing).expect("nothing for now"), 0);
    let status = place.status();
    let running_now = &status["migrations"]["running"];
    assert_eq!((&running_now["kind"], &running_now["from"]), (&"hand-over".into(), &"source".into()), "{status}");
    vm.goes_on(300);
    let destination = connect(&place, "destination", &vm.space);
    go(&destination, state::RESUMING);
    let carried = carry(&vm, 777);
    assert!(place.image("source") == place.image("destination"), "all media were there before the end of the stream");
    assert_eq!(place.status()["migrations"]["running"]["phase"], "told");
    assert_eq!(refused(&destination, state::PRE_COPY), (errno::EBUSY, state::STOP), "it does not serve yet");
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 333);
    go(&destination, state::RUNNING);
    vm.goes_to(&destination);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(300);
    let status = place.settled();
    assert_eq!(
        (&status["migration"]["serving"], &status["migrations"]["ended"][0]["outcome"]),
        (&"destination".into(), &"moved".into())
    );
    assert_eq!(status["subsystems"][0]["controllers"][1]["fenced"], true);
    assert_eq!(status["subsystems"][1]["controllers"][1]["fenced"], false);
    // The source has nothing more to say.
    assert_eq!(refused(&source, state::RUNNING), (errno::EBUSY, state::STOP));
    let left = place.image("source");
    source.reset().expect("a reset is always taken");
    assert_eq!(source.migration_state().expect("a state"), state::RUNNING);
    source.write32(offset::CC, 0x46_0001);
    assert!((0..200).all(|_| !Csts::from_bits(source.read32(offset::CSTS)).rdy()), "nothing becomes ready behind its fence");
    assert_eq!(refused(&source, state::PRE_COPY), (errno::EBUSY, state::RUNNING));
    vm.goes_on(100);
    vm.pause();
    assert!(place.image("source") == left, "the source is written no more");
    place.verify("destination");
    vm.unpause();

    // And back, by the same manager.
    go(&destination, state::PRE_COPY);
    vm.goes_on(100);
    go(&source, state::RESUMING);
    let carried = carry(&vm, 100_000);
    bring(&source, &carried, 7);
    go(&source, state::STOP);
    go(&source, state::RUNNING);
    vm.goes_to(&source);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(100);
    place.settled();
    assert_eq!(place.serving(), "source");
    vm.stop();
    running.stop();
    place.verify("source");
    let running = place.start();
    assert!(running.said.contains("the destination serves") && place.serving() == "source", "{}", running.said);
    running.stop();
}

#[test]
fn a_manager_that_changes_its_mind_has_its_guest_where_it_was() {
    let place = Place::new("back");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    let destination = connect(&place, "destination", &vm.space);
    vm.goes_on(50);
    // In PRE_COPY.
    go(&source, state::PRE_COPY);
    vm.goes_on(50);
    go(&source, state::RUNNING);
    vm.goes_on(50);
    // In STOP, which begins nothing.
    vm.pause();
    go(&source, state::STOP);
    let stopped = place.image("source");
    assert_eq!(place.status()["subsystems"][0]["controllers"][1]["fenced"], true);
    vm.unpause();
    std::thread::sleep(Duration::from_millis(50));
    assert!(place.image("source") == stopped, "a device that is stopped does nothing, whatever the guest rings");
    go(&source, state::RUNNING);
    vm.goes_on(50);
    // In STOP_COPY, by way of STOP and by way of PRE_COPY, with the state in its hands or even at the destination.
    for (way, taken) in [(None, false), (Some(state::PRE_COPY), false), (Some(state::PRE_COPY), true), (Some(state::STOP), true)]
    {
        if let Some(way) = way {
            go(&source, way);
        }
        go(&destination, state::RESUMING);
        let carried = carry(&vm, 5_000);
        if taken {
            bring(&destination, &carried, 5_000);
            go(&destination, state::STOP);
        }
        go(&source, state::RUNNING);
        vm.handle.clear_marks();
        vm.unpause();
        vm.goes_on(50);
        if taken {
            assert_eq!(refused(&destination, state::RUNNING), (errno::EIO, state::STOP), "it was taken back");
        } else {
            bring(&destination, &carried, 5_000);
            assert_eq!(refused(&destination, state::RUNNING), (errno::EINVAL, state::RESUMING), "the state is void");
            assert_eq!(refused(&destination, state::RUNNING), (errno::EBUSY, state::STOP), "and without one nothing runs");
        }
        destination.reset().expect("a reset");
        let ended = place.settled();
        assert_eq!((&ended["migration"]["serving"], ended["migrations"]["running"].is_null()), (&"source".into(), true));
    }
    // A reset in STOP_COPY before the destination runs: the guest has to begin anew, at the source.
    go(&source, state::PRE_COPY);
    let carried = carry(&vm, 5_000);
    source.reset().expect("a reset");
    assert_eq!(source.migration_state().expect("a state"), state::RUNNING);
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 5_000);
    assert_eq!(refused(&destination, state::STOP), (errno::EINVAL, state::RESUMING));
    assert_eq!(place.serving(), "source");
    vm.bury();
    drop((source, destination));
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    vm.stop();
    running.stop();
    place.verify("source");
}

/// A stream with a byte changed, and its checksum (CRC-32C of what follows the head of 24 bytes) made good again.
fn forged(stream: &[u8], at: usize) -> Vec<u8> {
    let mut stream = stream.to_vec();
    stream[at] ^= 1;
    let mut crc = !0_u32;
    for byte in &stream[24..] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    stream[12..16].copy_from_slice(&(!crc).to_le_bytes());
    stream
}

#[test]
fn only_the_state_that_was_told_is_taken_and_only_with_it_the_destination_runs() {
    let place = Place::new("blobs");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    let source = vm.end();
    let destination = connect(&place, "destination", &vm.space);
    vm.goes_on(50);
    assert_eq!(refused(&source, state::RESUMING), (errno::EBUSY, state::STOP), "it serves");
    go(&source, state::RUNNING);
    // A state of a migration that was.
    go(&source, state::PRE_COPY);
    let old = carry(&vm, 5_000);
    go(&source, state::RUNNING);
    vm.handle.clear_marks();
    vm.unpause();
    go(&destination, state::RESUMING);
    assert_eq!(refused(&destination, state::RUNNING), (errno::EBUSY, state::STOP), "nothing was brought");
    go(&destination, state::RESUMING);
    vm.goes_on(50);
    go(&source, state::PRE_COPY);
    bring(&destination, &old, 5_000);
    assert_eq!(refused(&destination, state::STOP), (errno::EINVAL, state::RESUMING), "replayed while another one copies");
    let carried = carry(&vm, 5_000);
    assert_eq!(carried.len(), old.len());
    let whole = carried.len();
    let mut bad: Vec<(Vec<u8>, &str)> = vec![
        (old, "of another migration"),
        (carried[..whole - 1].to_vec(), "truncated"),
        (carried[..30].to_vec(), "truncated early"),
        ([&carried[..], &[0; 8]].concat(), "too long"),
    ];
    for at in [0, 9, 20, 45, 60, 75, 150, whole / 2, whole - 1] {
        let mut changed = carried.clone();
        changed[at] ^= 4;
        bad.push((changed, "changed"));
    }
    // Whole by its checksum, and yet not what was told: number, token, length, the controller's state.
    for at in [56, 64, 79, 80, 88, 90, 120, 200] {
        bad.push((forged(&carried, at), "forged"));
    }
    for (bytes, what) in bad {
        bring(&destination, &bytes, 1_000);
        assert_eq!(refused(&destination, state::RUNNING), (errno::EINVAL, state::RESUMING), "{what}");
    }
    // One that goes away with the state, and the next one brings it again.
    bring(&destination, &carried, 1_000);
    go(&destination, state::STOP);
    destination.reset().expect("a reset");
    assert_eq!(destination.migration_state().expect("a state"), state::RUNNING);
    destination.write32(offset::CC, 0x46_0001);
    assert!((0..200).all(|_| !Csts::from_bits(destination.read32(offset::CSTS)).rdy()), "a reset does not make it serve");
    assert_eq!(place.serving(), "source", "nobody runs yet");
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 1);
    go(&destination, state::RUNNING);
    vm.goes_to(&destination);
    vm.handle.mark_resume();
    vm.unpause();
    vm.goes_on(100);
    // Replayed at the end that serves, and at the one that does not any more.
    assert_eq!(refused(&destination, state::RESUMING), (errno::EBUSY, state::STOP));
    go(&destination, state::RUNNING);
    go(&source, state::RESUMING);
    bring(&source, &carried, 5_000);
    assert_eq!(refused(&source, state::STOP), (errno::EINVAL, state::RESUMING));
    vm.stop();
    running.stop();
    place.verify("destination");
}

#[test]
fn a_manager_that_dies_leaves_a_guest_that_runs_or_waits() {
    let place = Place::new("dies");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    vm.goes_on(50);
    go(&vm.end(), state::PRE_COPY);
    vm.goes_on(20);
    vm.bury();
    // What it had begun is undone.
    let ended = place.settled();
    assert_eq!(ended["migrations"]["ended"][0]["outcome"], "undone", "{ended}");
    let vm = Vm::boot(&place, "source");
    vm.goes_on(50);
    // In STOP_COPY its device stays so: whoever comes next reads the stream, or takes the guest back.
    go(&vm.end(), state::PRE_COPY);
    let carried = carry(&vm, 5_000);
    vm.bury();
    assert_eq!(place.status()["migrations"]["running"]["phase"], "told");
    let space = AddressSpace::default();
    let next = connect(&place, "source", &space);
    assert_eq!(next.migration_state().expect("a state"), state::STOP_COPY);
    assert!(stream(&next, 999) == carried);
    // The destination's manager is the one that dies with the state in its hands: nobody's memory is there for the next one.
    let memory = DmaBuffer::allocate("machine", 1 << 20, Pages::Small).expect("memory");
    let other = AddressSpace::default();
    other.map(&memory, true).expect("mapped");
    let destination = connect(&place, "destination", &other);
    go(&destination, state::RESUMING);
    bring(&destination, &carried, 5_000);
    assert_eq!(refused(&destination, state::STOP), (errno::EINVAL, state::RESUMING), "its queues are nowhere");
    drop(destination);
    go(&next, state::RUNNING);
    let ended = place.settled();
    assert_eq!(
        (&ended["migration"]["serving"], &ended["migrations"]["ended"][1]["outcome"]),
        (&"source".into(), &"undone".into())
    );
    drop(next);
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    vm.stop();
    running.stop();
    place.verify("source");
}

#[test]
fn others_wait_while_a_client_migrates_and_the_operator_can_end_it() {
    let place = Place::new("others");
    let running = place.start();
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    let said = |args: &[&str]| {
        let output = place.dray(args);
        let text = String::from_utf8_lossy(&output.stderr).replace(['\n', '│'], " ");
        (output.status.code(), text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let (code, text) = said(&["migrate", "source", "--to", "destination"]);
    assert!(code == Some(1) && text.contains("their VM managers move them"), "{text}");
    // A client that has stopped its device needs the management controller as well.
    go(&vm.end(), state::STOP);
    let (code, text) = said(&["media-move", "source", "1", "--to", "copy.img"]);
    assert!(code == Some(1) && text.contains("over vfio-user"), "{text}");
    go(&vm.end(), state::RUNNING);
    go(&vm.end(), state::PRE_COPY);
    let (code, text) = said(&["media-move", "source", "1", "--to", "copy.img"]);
    assert!(code == Some(1) && !place.0.join("copy.img").exists(), "{text}");
    vm.goes_on(20);
    go(&vm.end(), state::RUNNING);
    place.settled();
    let (code, text) = said(&["media-move", "source", "1", "--to", "copy.img"]);
    assert_eq!(code, Some(0), "{text}");
    vm.goes_on(20);
    // A stop of the appliance undoes what was told.
    go(&vm.end(), state::PRE_COPY);
    let _carried = carry(&vm, 5_000);
    let said = running.stop();
    assert!(said.contains("cancelled") && said.ends_with("stopped\n"), "{said}");
    vm.bury();
    let running = place.start();
    assert_eq!(place.serving(), "source");
    let vm = Vm::boot(&place, "source");
    vm.goes_on(20);
    vm.stop();
    running.stop();
    std::fs::rename(place.0.join("copy.img"), place.0.join("served.img")).expect("a file");
    place.verify("served");
}

#[test]
fn killed_anywhere_it_serves_at_one_end_and_has_lost_nothing() {
    for (turn, (at, serving)) in [
        ("copying", "source"),
        ("stopped", "source"),
        ("told", "destination"),
        ("taken", "destination"),
        ("running", "destination"),
    ]
    .into_iter()
    .enumerate()
    {
        let place = Place::new(&format!("killed-{turn}"));
        let running = place.start();
        let vm = Vm::boot(&place, "source");
        let source = vm.end();
        let destination = connect(&place, "destination", &vm.space);
        vm.goes_on(50);
        match at {
            "copying" => {
                go(&source, state::PRE_COPY);
                vm.goes_on(20);
            }
            "stopped" => {
                vm.pause();
                go(&source, state::STOP);
            }
            _ => {
                go(&source, state::PRE_COPY);
                vm.goes_on(20);
                go(&destination, state::RESUMING);
                let carried = carry(&vm, 5_000);
                if at != "told" {
                    bring(&destination, &carried, 5_000);
                    go(&destination, state::STOP);
                }
                if at == "running" {
                    go(&destination, state::RUNNING);
                    vm.goes_to(&destination);
                    vm.handle.mark_resume();
                    vm.unpause();
                    vm.goes_on(20);
                }
            }
        }
        running.kill();
        vm.bury();
        let running = place.start();
        let status = place.status();
        assert_eq!(status["migration"]["serving"], serving, "{at}: {}", running.said);
        let fenced: Vec<_> = (0..2).map(|end| status["subsystems"][end]["controllers"][1]["fenced"] == true).collect();
        assert_eq!(fenced, [serving != "source", serving != "destination"], "{at}: exactly one side serves");
        place.verify(serving);
        let vm = Vm::boot(&place, serving);
        vm.goes_on(20);
        vm.stop();
        running.stop();
        place.verify(serving);
    }
}
