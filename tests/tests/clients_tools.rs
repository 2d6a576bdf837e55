//! The guests' own tools against controllers that are not ours: QEMU's NVMe controller and Linux's NVMe/TCP target. What fails
//! here is a mistake of the steps in `tests/guests`, or of the machine; what fails only in the other `clients_*` tests is ours.
#![allow(missing_docs)]

use dray_tests::guest::{BOOT, Disk, Guest, Machine, STEP, Trouble, turn};

const PLAIN: &str = "nqn.2026-11.org.example:plain";
const SECRET: &str = "nqn.2026-11.org.example:secret";

#[test]
fn the_steps_work_with_qemus_controller_and_linuxs_target() {
    let _turn = turn();
    let file = std::env::temp_dir().join(format!("dray-clients-tools-{}.img", std::process::id()));
    std::fs::File::create(&file).and_then(|file| file.set_len(96 << 20)).expect("a file");
    let machine = Machine::new("tools").disk(Disk::Emulated(file.clone())).network().modules("nvmet");
    let mut guest = Guest::boot(&machine);
    assert!(guest.booted_in() < BOOT);
    local_disk(&mut guest);
    over_tcp(&mut guest);
    a_failing_step_says_so(&mut guest);
    guest.off();
    let _gone = std::fs::remove_file(&file);
}

fn local_disk(guest: &mut Guest) {
    for step in ["pci_disk emulated", "mkfs", "mounted", "tree_make 30", "tree_copy one", "fio_verified /mnt/fio 4M", "unmounted", "fsck"] {
        guest.run(step);
    }
    guest.reboot();
    for step in ["pci_disk emulated", "mounted", "tree_check one", "start load fio_verified /mnt/load 4M 3", "running load", "finish load"] {
        guest.run(step);
    }
    for step in ["unmounted", "fsck"] {
        guest.run(step);
    }
}

fn over_tcp(guest: &mut Guest) {
    guest.run("net");
    guest.run(&format!("nvmet 4420 {PLAIN}"));
    assert!(guest.run(&format!("discover 127.0.0.1 4420 {PLAIN}")).contains(PLAIN));
    guest.run(&format!("connect 127.0.0.1 4420 {PLAIN} --hdr-digest --data-digest"));
    for step in [format!("fabric_disk {PLAIN}"), format!("state {PLAIN} live"), "mkfs".into(), "fsck".into(), format!("disconnect {PLAIN}")] {
        guest.run(&step);
    }
    guest.run("nvme gen-dhchap-key --hmac=1 --nqn=$HOSTNQN >/tmp/key");
    guest.run(&format!("nvmet 4421 {SECRET} $(cat /tmp/key)"));
    guest.run(&format!("refused 127.0.0.1 4421 {SECRET}"));
    guest.run(&format!("connect 127.0.0.1 4421 {SECRET} --dhchap-secret=$(cat /tmp/key)"));
    guest.run(&format!("fabric_disk {SECRET}"));
    guest.run(&format!("disconnect {SECRET}"));
}

fn a_failing_step_says_so(guest: &mut Guest) {
    let end = guest.step("echo about to fail; false; echo not reached", STEP);
    assert!(matches!(&end, Err(Trouble::Failed(1, said)) if said == "about to fail\n"), "{end:?}");
    let end = guest.step("no_such_step", STEP);
    assert!(matches!(end, Err(Trouble::Failed(127, _))), "{end:?}");
    // One flipped byte on the disk is seen.
    for step in ["pci_disk emulated", "mounted", "echo broken >/mnt/one/3/3"] {
        guest.run(step);
    }
    let end = guest.step("tree_check one", STEP);
    assert!(matches!(&end, Err(Trouble::Failed(1, said)) if said.contains("damaged")), "{end:?}");
    guest.run("unmounted");
}
