//! Namespaces of devices as backings, from outside: a controller of another appliance, by NVMe/TCP.
//!
//! Physical functions and controllers that the kernel owns are tried in virtual machines (`vfio_guest.rs`, `passthru_guest.rs`, `image`).
#![allow(missing_docs)]

use dray_tests::serving::{Place, Running};
use serde_json::Value;
use std::process::Output;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-00000000d001";
const FAR: &str = "nqn.2026-11.org.example:far";

/// A subsystem with a management controller and one with the namespaces.
fn subsystem(name: &str, nqn: &str, namespaces: &[String]) -> String {
    let (mut text, mut nsids) = (format!("[[subsystem]]\nname = \"{name}\"\nnqn = \"{nqn}\"\nserial = \"S-1\"\n"), Vec::new());
    for (nsid, keys) in (1..).zip(namespaces) {
        text += &format!("[[subsystem.namespace]]\nnsid = {nsid}\nnguid = \"{:032x}\"\n{keys}", 0xd0 + nsid);
        nsids.push(nsid);
    }
    text + &format!(
        "[[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
         [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = {nsids:?}\n"
    )
}

fn memory(size: &str, block: &str) -> String {
    format!("backing = \"memory\"\nsize = \"{size}\"\nblock = \"{block}\"\n")
}

fn of_device(nsid: u32) -> String {
    format!("backing = \"device\"\ndevice = \"far\"\ndevice-nsid = {nsid}\n")
}

fn tail(from: &str, to: &str) -> String {
    let policies = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
    // A busy machine may take long over a switch-over.
    format!("[migration]\nfrom = \"{from}\"\nto = \"{to}\"\ndowntime = \"5s\"\n[guest]\nwrites-per-second = 500\n{policies}")
}

/// The machine whose namespaces are the others' devices: 1 and 2 alike, 3 of other blocks.
fn start_far(place: &Place) -> Running {
    let namespaces = [memory("16MiB", "4KiB"), memory("16MiB", "4KiB"), memory("16MiB", "512B")];
    let far = subsystem("far", FAR, &namespaces);
    let export = format!(
        "[[export]]\nsubsystem = \"far\"\ncontrollers = [2]\nby = \"nvme-tcp\"\nlisten = \"127.0.0.1:0\"\n\
         hosts = [{{ nqn = \"{HOST}\" }}]\n"
    );
    let spare = subsystem("spare", "nqn.2026-11.org.example:spare", &[memory("1MiB", "4KiB")]);
    place.write("far.toml", &format!("[core]\nstate = \"far\"\n{far}{spare}{export}{}", tail("far", "spare")));
    place.start("far.toml")
}

fn write_near(place: &Place, name: &str, far: &Running, namespaces: [String; 2]) {
    let device = format!(
        "[[device]]\nname = \"far\"\nnvme-tcp = \"{}\"\nnqn = \"{FAR}\"\nhost-nqn = \"{HOST}\"\n",
        far.address()
    );
    let [from, to] = namespaces;
    let nqn = "nqn.2026-11.org.example:near";
    let ends = [subsystem("source", nqn, &[from]), subsystem("destination", nqn, &[to])].concat();
    place.write(name, &format!("[core]\nstate = \"near\"\n{device}{ends}{}", tail("source", "destination")));
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

#[test]
fn a_namespace_moves_from_one_of_a_device_to_another_while_its_guest_writes() {
    let place = Place::new("devices-demo");
    let far = start_far(&place);
    write_near(&place, "near.toml", &far, [of_device(1), of_device(2)]);
    let refused = place.dray("near.toml", &["demo", "--settle", "100"]);
    assert!(!refused.status.success() && said(&refused).contains("--destroys-data"), "{}", said(&refused));
    let moved = place.dray("near.toml", &["demo", "--settle", "200", "--destroys-data", "--json"]);
    assert!(moved.status.success(), "{}", said(&moved));
    let text = String::from_utf8_lossy(&moved.stdout).into_owned();
    let summary: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).expect("a summary");
    assert_eq!((&summary["verdict"], &summary["blocks_compared"]), (&"ok".into(), &4096.into()), "{summary}");
    assert!(summary["writes_acknowledged"].as_u64() > Some(0) && summary["blocks_different"] == 0, "{summary}");
}

#[test]
fn a_media_move_goes_to_a_device_and_is_found_there_again() {
    let place = Place::new("devices-media");
    let far = start_far(&place);
    write_near(&place, "near.toml", &far, [memory("16MiB", "4KiB"), memory("16MiB", "4KiB")]);
    let near = place.start("near.toml");
    for (to, why) in [("device:none/1", "there is no device"), ("device:far/9", "device \"far\""), ("device:far/3", "512")] {
        let refused = place.dray("near.toml", &["media-move", "source", "1", "--to", to]);
        assert!(!refused.status.success() && said(&refused).contains(why), "{to}: {}", said(&refused));
    }
    let moved = place.dray("near.toml", &["media-move", "source", "1", "--to", "device:far/2"]);
    assert!(moved.status.success(), "{}", said(&moved));
    let status = place.dray("near.toml", &["status", "--json"]);
    let status: Value = serde_json::from_slice(&status.stdout).expect("JSON");
    let namespace = &status["subsystems"][0]["namespaces"][0];
    assert_eq!((&namespace["device"], &namespace["bytes"]), (&"far".into(), &(16u64 << 20).into()), "{status}");
    assert_eq!(status["devices"][0]["failure"], Value::Null, "{status}");
    drop(near);
    let near = place.start("near.toml");
    assert!(near.said.contains("namespace 1 of source is served from device:far/2"), "{}", near.said);
}

#[test]
fn a_device_that_is_not_there_or_does_not_fit_is_said_before_anything_is_served() {
    let place = Place::new("devices-wrong");
    let far = start_far(&place);
    let wrong_block = format!("{}block = \"512B\"\n", of_device(1));
    write_near(&place, "block.toml", &far, [wrong_block, of_device(2)]);
    let refused = place.dray("block.toml", &["run"]);
    assert!(!refused.status.success() && said(&refused).contains("not 512"), "{}", said(&refused));
    write_near(&place, "near.toml", &far, [of_device(1), of_device(2)]);
    drop(far);
    let refused = place.dray("near.toml", &["run"]);
    assert!(!refused.status.success() && said(&refused).contains("device \"far\""), "{}", said(&refused));
    assert!(!place.path("near/control.sock").exists());
}
