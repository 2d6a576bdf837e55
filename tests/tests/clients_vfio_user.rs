//! A hypervisor as the client: QEMU's `vfio-user-pci` before `dray run`, and in it a stock Linux whose own nvme driver finds
//! our controller as its disk.
#![allow(missing_docs)]

use dray_tests::guest::{Disk, Guest, Machine, turn};
use dray_tests::guest_appliance::{Appliance, SERIAL, by_vfio_user, remove};
use serde_json::Value;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

fn machine(name: &str, appliance: &Appliance, controller: u16) -> Machine {
    Machine::new(name).disk(Disk::VfioUser(appliance.socket(controller)))
}

fn all(guest: &mut Guest, steps: &[&str]) {
    for step in steps {
        guest.run(step);
    }
}

/// Writes that the source's controller has answered.
fn writes(appliance: &Appliance, cntlid: u16) -> u64 {
    let status: Value = serde_json::from_str(&appliance.status()).expect("JSON");
    let controllers = status["subsystems"][0]["controllers"].as_array().expect("controllers");
    let found = controllers.iter().find(|controller| controller["cntlid"] == cntlid).expect("the controller");
    found["counters"]["writes"].as_u64().expect("a number")
}

/// Waits until the controller has answered so many more.
#[track_caller]
fn goes_on(appliance: &Appliance, cntlid: u16, more: u64) {
    let (before, end) = (writes(appliance, cntlid), Instant::now() + PATIENCE);
    while writes(appliance, cntlid) < before + more {
        assert!(Instant::now() < end, "the guest has stopped writing:\n{}", appliance.story());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The disk is found, and it is ours.
fn find(guest: &mut Guest) {
    let found = guest.run(&format!("pci_disk {SERIAL}"));
    assert!(found.contains("/dev/nvme"), "{found}");
}

#[test]
fn a_stock_guest_uses_the_disk_over_reboots_and_the_end_of_its_qemu() {
    let _turn = turn();
    let mut appliance = Appliance::start(&Appliance::folder("disk", &[by_vfio_user(2, "doorbells")]));
    let machine = machine("disk", &appliance, 2);
    let mut guest = Guest::boot(&machine);
    find(&mut guest);
    assert!(guest.run("identify").contains(SERIAL));
    all(&mut guest, &["mkfs", "mounted", "tree_make", "tree_copy one", "tree_check one", "fio_verified /mnt/fio 16M", "unmounted", "fsck"]);

    // The guest's kernel goes, QEMU and the connection stay: the controller is shut down, reset and set up again.
    guest.reboot();
    find(&mut guest);
    all(&mut guest, &["fsck", "mounted", "tree_check one", "tree_make 20", "tree_copy two", "start load fio_verified /mnt/load 8M 60"]);
    goes_on(&appliance, 2, 300);
    guest.run("running load");

    // QEMU goes in the middle of writes, without a word; another one comes to the same socket.
    guest.kill();
    assert!(appliance.is_running(), "{}", appliance.story());
    let mut guest = Guest::boot(&machine);
    find(&mut guest);
    all(&mut guest, &["fsck_journal", "mounted", "tree_check one", "tree_check two", "fio_verified /mnt/fio 4M", "unmounted", "fsck"]);
    guest.off();
    remove(&appliance.stop());
}

#[test]
fn a_guest_without_message_signalled_interrupts_is_told_by_the_pin() {
    let _turn = turn();
    let appliance = Appliance::start(&Appliance::folder("pin", &[by_vfio_user(2, "doorbells"), by_vfio_user(3, "trapped")]));
    for controller in [2, 3] {
        let mut guest = Guest::boot(&machine("pin", &appliance, controller).kernel("pci=nomsi"));
        find(&mut guest);
        let told = guest.run("interrupts nvme");
        assert!(told.contains("IO-APIC") && !told.contains("MSI"), "not by the pin:\n{told}");
        all(&mut guest, &["mkfs", "mounted", "tree_make 20", "tree_copy one", "tree_check one", "fio_verified /mnt/fio 4M"]);
        all(&mut guest, &["unmounted", "fsck"]);
        guest.off();
    }
    remove(&appliance.stop());
}

#[test]
fn a_guest_gone_wild_does_not_touch_its_neighbour() {
    let _turn = turn();
    let mut appliance = Appliance::start(&Appliance::folder("wild", &[by_vfio_user(2, "doorbells"), by_vfio_user(3, "whole")]));
    let mut good = Guest::boot(&machine("good", &appliance, 2));
    find(&mut good);
    all(&mut good, &["mkfs", "mounted", "tree_make 20", "tree_copy one", "start load fio_verified /mnt/load 8M 30"]);

    let wild_machine = machine("wild", &appliance, 3);
    let mut wild = Guest::boot(&wild_machine);
    find(&mut wild);
    wild.run("misbehave");
    good.run("running load");
    // And away, with its queues as they are.
    wild.kill();
    assert!(appliance.is_running(), "{}", appliance.story());
    all(&mut good, &["finish load", "tree_check one", "unmounted", "fsck"]);
    good.off();

    // The controller that got the nonsense serves the next client.
    let mut next = Guest::boot(&wild_machine);
    find(&mut next);
    all(&mut next, &["mkfs", "mounted", "tree_make 20", "tree_copy one", "tree_check one", "unmounted", "fsck"]);
    next.off();
    remove(&appliance.stop());
}

#[test]
fn the_media_moves_under_a_guest_that_verifies() {
    let _turn = turn();
    let appliance = Appliance::start(&Appliance::folder("media", &[by_vfio_user(2, "doorbells")]));
    let mut guest = Guest::boot(&machine("media", &appliance, 2));
    find(&mut guest);
    all(&mut guest, &["mkfs", "mounted", "tree_make", "tree_copy one", "start load fio_verified /mnt/load 16M 40"]);
    goes_on(&appliance, 2, 300);
    let before = writes(&appliance, 2);
    appliance.media_move(1, "moved.img");
    assert!(writes(&appliance, 2) > before, "nothing was written while it moved");
    goes_on(&appliance, 2, 100);
    guest.run("running load");
    all(&mut guest, &["finish load", "tree_check one", "tree_make 20", "tree_copy two", "tree_check two", "unmounted", "fsck"]);
    guest.off();
    let folder = appliance.stop();
    // What was written after the move is in the copy alone.
    let [old, new] = ["source-1.img", "moved.img"].map(|name| std::fs::read(folder.join(name)).expect("an image"));
    assert!(old != new, "the guest's last writes went to both, or nowhere");
    remove(&folder);
}
