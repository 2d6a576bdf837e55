//! The stock Linux initiator as the client: Debian's kernel and nvme-cli in a guest, over NVMe/TCP to `dray run`.
#![allow(missing_docs)]

use dray_tests::guest::{Guest, Machine, turn};
use dray_tests::guest_appliance::{Appliance, NQN, SERIAL, by_nvme_tcp, free_port, remove};
use serde_json::Value;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

/// The host's loopback, as a guest sees it.
const HOST: &str = "10.0.2.2";

fn all(guest: &mut Guest, steps: &[&str]) {
    for step in steps {
        guest.run(step);
    }
}

fn boot(name: &str) -> Guest {
    let mut guest = Guest::boot(&Machine::new(name).network());
    guest.run("net");
    guest
}

/// Connects with these options and finds the disk.
fn connect(guest: &mut Guest, port: u16, options: &str) {
    guest.run(&format!("connect {HOST} {port} {NQN} {options}"));
    let found = guest.run(&format!("fabric_disk {NQN}"));
    assert!(found.contains("/dev/nvme"), "{found}");
}

fn disconnect(guest: &mut Guest) {
    guest.run(&format!("disconnect {NQN}"));
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

#[test]
fn a_stock_host_discovers_connects_with_and_without_digests_and_comes_back() {
    let _turn = turn();
    let port = free_port();
    let appliance = Appliance::start(&Appliance::folder("tcp", &[by_nvme_tcp(2, port, None)]));
    let mut guest = boot("tcp");
    let listed = guest.run(&format!("discover {HOST} {port} {NQN}"));
    assert!(listed.contains(&format!("trsvcid: {port}")), "{listed}");

    connect(&mut guest, port, "");
    let identity = guest.run("identify");
    assert!(identity.contains(SERIAL), "{identity}");
    all(&mut guest, &["mkfs", "mounted", "tree_make", "tree_copy one", "tree_check one", "fio_verified /mnt/fio 4M", "unmounted", "fsck"]);
    disconnect(&mut guest);

    for digests in ["--hdr-digest", "--data-digest", "--hdr-digest --data-digest"] {
        connect(&mut guest, port, digests);
        all(&mut guest, &["mounted", "tree_check one", "fio_verified /mnt/fio 2M", "unmounted", "fsck"]);
        disconnect(&mut guest);
    }

    // Who is not on the list, and who asks for what is not there.
    let stranger = "nqn.2014-08.org.nvmexpress:uuid:d7a10000-0000-4000-8000-00000000000f";
    guest.run(&format!("HOSTNQN={stranger}; HOSTID=d7a10000-0000-4000-8000-00000000000f; refused {HOST} {port} {NQN}"));
    guest.run(&format!("refused {HOST} {port} {NQN}-other"));
    // The one controller goes from host to host: after all that it is free.
    connect(&mut guest, port, "");
    guest.run("fsck");
    disconnect(&mut guest);
    guest.off();
    remove(&appliance.stop());
}

#[test]
fn a_host_with_the_secret_gets_in_and_no_other() {
    let _turn = turn();
    let mut guest = boot("secret");
    // A secret as it is, and transformed with SHA-256, SHA-384, SHA-512.
    for transform in 0..4 {
        let secret = guest.run(&format!("nvme gen-dhchap-key --hmac={transform} --nqn=$HOSTNQN"));
        let secret = secret.lines().find(|line| line.starts_with("DHHC-1:")).expect("a secret").to_owned();
        let port = free_port();
        let folder = Appliance::folder("secret", &[by_nvme_tcp(2, port, Some("host.secret"))]);
        write_secret(&folder.join("host.secret"), &secret);
        let appliance = Appliance::start(&folder);

        if transform == 1 {
            guest.run(&format!("refused {HOST} {port} {NQN}"));
            guest.run(&format!("refused {HOST} {port} {NQN} --dhchap-secret=$(nvme gen-dhchap-key --hmac=1 --nqn=$HOSTNQN)"));
        }
        // Under emulation the host computes for longer than its keep-alive time, and shows no other life meanwhile.
        connect(&mut guest, port, &format!("--dhchap-secret={secret}"));
        all(&mut guest, &["mkfs", "fsck"]);
        disconnect(&mut guest);
        if transform == 3 {
            // Digests and authentication do not know of each other.
            connect(&mut guest, port, &format!("--hdr-digest --data-digest --dhchap-secret={secret}"));
            guest.run("fsck");
            disconnect(&mut guest);
        }
        remove(&appliance.stop());
    }
    guest.off();
}

fn write_secret(file: &std::path::Path, secret: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    opened.and_then(|mut file| writeln!(file, "{secret}")).expect("a file with the secret");
}

#[test]
fn a_host_goes_on_after_the_target_was_stopped_or_killed_and_started_again() {
    let _turn = turn();
    let port = free_port();
    let appliance = Appliance::start(&Appliance::folder("again", &[by_nvme_tcp(2, port, None)]));
    let mut guest = boot("again");
    connect(&mut guest, port, "--hdr-digest");
    all(&mut guest, &["mkfs", "mounted", "tree_make", "tree_copy one", "start load fio_verified /mnt/load 4M 25", "running load"]);

    let folder = appliance.stop();
    guest.run(&format!("state {NQN} connecting"));
    let appliance = Appliance::start(&folder);
    guest.run(&format!("state {NQN} live"));
    guest.run("running load");

    let folder = appliance.kill();
    guest.run(&format!("state {NQN} connecting"));
    let appliance = Appliance::start(&folder);
    guest.run(&format!("state {NQN} live"));

    // The host kept every write until it was answered: nothing is lost, and nobody saw an error.
    all(&mut guest, &["finish load", "tree_check one", "unmounted", "fsck"]);
    disconnect(&mut guest);
    guest.off();
    remove(&appliance.stop());
}

#[test]
fn the_media_moves_under_a_host_that_verifies() {
    let _turn = turn();
    let port = free_port();
    let appliance = Appliance::start(&Appliance::folder("tcp-media", &[by_nvme_tcp(2, port, None)]));
    let mut guest = boot("tcp-media");
    connect(&mut guest, port, "");
    all(&mut guest, &["mkfs", "mounted", "tree_make", "tree_copy one", "start load fio_verified /mnt/load 4M 40"]);
    goes_on(&appliance, 2, 300);
    let before = writes(&appliance, 2);
    appliance.media_move(1, "moved.img");
    assert!(writes(&appliance, 2) > before, "nothing was written while it moved");
    goes_on(&appliance, 2, 100);
    guest.run("running load");
    all(&mut guest, &["finish load", "tree_check one", "tree_make 20", "tree_copy two", "tree_check two", "unmounted", "fsck"]);
    disconnect(&mut guest);
    guest.off();
    let folder = appliance.stop();
    let [old, new] = ["source-1.img", "moved.img"].map(|name| std::fs::read(folder.join(name)).expect("an image"));
    assert!(old != new, "the guest's last writes went to both, or nowhere");
    remove(&folder);
}
