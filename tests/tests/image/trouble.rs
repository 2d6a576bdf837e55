//! Things that nobody is there to put right: the image says what is wrong, where it can be read, and stays up.

use crate::room::{BEGINS, Room, SERVING, WRONG, count, page, shipped};
use dray_tests::guest::turn;
use dray_tests::image::{COMMAND, Image, SOON};

#[test]
fn a_broken_configuration_is_said_on_the_console_and_on_the_status_page() {
    let _turn = turn();
    let room = Room::new("broken");
    let disk = room.disk(&shipped().replace("cntlid = 2\n", "cntlid = 2\nio-kews = 3\n"));
    let (machine, status) = room.machine("broken", &disk);
    let mut image = Image::boot(&machine, WRONG);
    let line = image.hear("io-kews", SOON);
    assert!(!line.is_empty());
    let page = page(&image, status, "configuration is wrong");
    assert!(page.contains("io-kews"), "the page does not say what:\n{page}");
    // `[image]` is right by itself: its console answers, and nothing was started or restarted.
    let (code, said) = image.command("config check /config/appliance.toml", COMMAND);
    assert!(code != 0 && said.contains("io-kews"), "{code}: {said}");
    let log = image.off();
    assert_eq!((count(&log, BEGINS), count(&log, SERVING)), (1, 0), "{log:#?}");
    disk.check_state().expect("the state was unmounted");
}

#[test]
fn a_configuration_that_is_no_toml_at_all_is_no_reason_to_restart() {
    let _turn = turn();
    let room = Room::new("noise");
    let disk = room.disk("\u{fffd}]]= not a configuration\n");
    let (machine, status) = room.machine("noise", &disk);
    let image = Image::boot(&machine, WRONG);
    page(&image, status, "configuration is wrong");
    let log = image.press_power();
    assert_eq!((count(&log, BEGINS), count(&log, "power off")), (1, 1), "{log:#?}");
}

#[test]
fn a_full_state_partition_is_said_and_nothing_is_lost() {
    let _turn = turn();
    let room = Room::new("full");
    let disk = room.disk(&shipped());
    disk.fill_state();
    let (machine, status) = room.machine("full", &disk);
    // The namespaces' files cannot get their size, or the records their place.
    let mut image = Image::boot(&machine, "No space left on device");
    image.hear("not started any more", SOON);
    let page = page(&image, status, "No space left on device");
    assert!(page.contains("not started any more"), "{page}");
    let log = image.off();
    assert_eq!((count(&log, BEGINS), count(&log, SERVING), count(&log, "power off")), (1, 0, 1), "{log:#?}");
    disk.check_state().expect("the state was unmounted");
    disk.empty_state();
    let image = Image::boot(&machine, SERVING);
    image.off();
    disk.check_state().expect("the state was unmounted");
}
