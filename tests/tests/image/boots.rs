//! It boots, says how long that took, serves, and lets the power go.

use crate::room::{BEGINS, Room, SERVING, STATUS, count, free_port, milliseconds, page, shipped};
use dray_tests::guest::turn;
use dray_tests::image::{Boot, COMMAND, Image, Machine, manifest_value};

#[test]
fn from_its_disk_by_uefi_until_the_console_switches_it_off() {
    let _turn = turn();
    let room = Room::new("uefi");
    let disk = room.disk(&shipped());
    let (machine, status) = room.machine("uefi", &disk);
    let mut image = Image::boot(&machine, SERVING);
    let log = image.log();
    let line = log.iter().find(|line| line.contains(SERVING)).expect("the line that was waited for");
    eprintln!("from its disk: {line}");
    // A figure to look at, not to fail on: the machine that emulates may be busy.
    assert!(milliseconds(line.split("after").nth(1).unwrap_or("")) > 0, "{line}");
    let slot = format!("slot a, version {}", manifest_value("version"));
    assert_eq!(count(&log, &slot), 1, "{}", image.story("which slot?"));
    assert_eq!(count(&log, "boot_entry_bump_counters"), 0, "the loader cannot count tries:\n{log:#?}");
    let page = page(&image, status, "serving");
    assert!(page.contains("slot a") && page.contains("/config/appliance.toml"), "{page}");
    let said = image.run("status");
    assert!(said.contains("local") && said.contains("spare"), "{said}");
    // No shell, no program but ours; what dray itself does not know is refused.
    let (code, said) = image.command("sh -c true", COMMAND);
    assert!(code == 2 && said.contains("sh"), "{code}: {said}");
    let log = image.off();
    assert_eq!(count(&log, "power off"), 1, "{log:#?}");
    assert_eq!(count(&log, BEGINS), 1, "it booted again");
    if let Err(said) = disk.check_state() {
        panic!("the state was not unmounted:\n{said}");
    }
}

#[test]
fn directly_with_the_configuration_it_carries_until_the_power_button() {
    let _turn = turn();
    let room = Room::new("direct");
    let status = free_port();
    let boot = Boot::Direct { words: "dray.debug".into(), disk: None };
    let image = Image::boot(&Machine::new("direct", room.folder(), boot).forward(status, STATUS), SERVING);
    let log = image.log();
    // Nothing is compiled at start: the image has the components' code, and this processor is the oldest that can run it.
    let loaded: Vec<_> = log.iter().filter(|line| line.contains("policy component loaded")).collect();
    assert!(loaded.len() >= 3 && loaded.iter().all(|line| line.contains("Ahead")), "{loaded:?}\n{}", image.story("compiled at start"));
    eprintln!("directly: {}", log.iter().find(|line| line.contains(SERVING)).expect("the line that was waited for"));
    assert!(log.iter().any(|line| line.contains("booted directly")), "{}", image.story("how was it booted?"));
    // The card that is there has its driver; what no device is there for has not, nor what only that needs.
    let loaded = |name: &str| count(&log, &format!("module {name}.ko"));
    assert_eq!([loaded("virtio_net"), loaded("mlx5_core"), loaded("mlxfw")], [1, 0, 0], "{}", image.story("modules"));
    let page = page(&image, status, "serving");
    assert!(page.contains("/etc/dray/appliance.toml") && page.contains("in memory"), "{page}");
    let log = image.press_power();
    assert!(count(&log, "power button") == 1 && count(&log, "power off") == 1, "{log:#?}");
}

#[test]
fn directly_with_configuration_and_state_of_a_disk() {
    let _turn = turn();
    let room = Room::new("both");
    let disk = room.disk(&shipped().replace("hostname = \"dray\"", "hostname = \"dray-both\""));
    let status = free_port();
    let boot = Boot::Direct { words: String::new(), disk: Some(disk.path().into()) };
    let image = Image::boot(&Machine::new("both", room.folder(), boot).forward(status, STATUS), SERVING);
    let page = page(&image, status, "serving");
    assert!(page.contains("dray-both") && page.contains("/config/appliance.toml") && page.contains("DRAY-STATE"), "{page}");
    let log = image.off();
    assert_eq!(count(&log, "power off"), 1, "{log:#?}");
    disk.check_state().expect("the state was unmounted");
}
