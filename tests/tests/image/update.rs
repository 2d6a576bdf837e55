//! Updates: the other slot is written and boots; one that does not come up is left again; one of somebody else's is refused.

use crate::room::{BEGINS, Room, SERVING, count, shipped};
use dray_tests::guest::turn;
use dray_tests::image::{COMMAND, Image, SOON, manifest_value};
use dray_tests::image_disk::{Disk, built};
use ed25519_dalek::{Signer, SigningKey};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;

const ENTRIES: &str = "loader/entries";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The key that the built image takes updates from, which `cargo xtask image` made.
fn key() -> SigningKey {
    let path = built().join("update.key");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let byte = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hexadecimal digits");
    let bytes: Vec<u8> = (0..32).map(byte).collect();
    let key = SigningKey::from_bytes(&bytes.try_into().expect("32 bytes"));
    assert_eq!(hex(key.verifying_key().as_bytes()), manifest_value("key"), "the image was built with another key");
    key
}

fn version() -> u64 {
    manifest_value("version").parse().expect("a number")
}

/// A bundle as the design has it, written here once more: what `cargo xtask image` writes is read by the image all the same.
fn bundle(version: u64, initrd: &[u8], options: &str, key: &SigningKey) -> Vec<u8> {
    let kernel = std::fs::read(built().join("vmlinuz")).expect("the kernel");
    let part = |bytes: &[u8]| serde_json::json!({ "bytes": bytes.len(), "sha256": hex(&Sha256::digest(bytes)) });
    let header = serde_json::json!({ "version": version, "kernel": part(&kernel), "initrd": part(initrd), "options": options });
    let header = header.to_string();
    let mut bytes = b"DRAYUPD1".to_vec();
    bytes.extend_from_slice(&u32::try_from(header.len()).expect("a short header").to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    let signature = key.sign(&bytes).to_bytes();
    [&bytes[..], &signature, &kernel, initrd].concat()
}

/// A web server on the loopback that has one file, until the test's process ends; the address for guests.
fn serve(bytes: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let bytes = Arc::new(bytes);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                line.clear();
            }
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
            let stream = stream.get_mut();
            // Who does not want all of it goes away.
            let _gone = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&bytes));
        }
    });
    format!("http://10.0.2.2:{port}/update")
}

fn boots_slot(image: &mut Image, slot: char, version: u64) {
    image.hear(&format!("slot {slot}, version {version}"), SOON);
}

fn entries(disk: &Disk) -> Vec<String> {
    disk.names("DRAY-ESP", ENTRIES)
}

#[test]
fn the_built_update_is_refused_as_no_newer_and_a_newer_one_boots_and_is_called_good() {
    let _turn = turn();
    let room = Room::new("update");
    let disk = room.disk(&shipped());
    assert_eq!(entries(&disk), ["dray-a+3.conf"]);
    let (machine, _) = room.machine("update", &disk);
    let mut image = Image::boot(&machine, SERVING);

    let same = serve(std::fs::read(built().join("dray-update.bin")).expect("the update"));
    let (code, said) = image.command(&format!("image update {same}"), COMMAND);
    assert!(code != 0 && said.contains(&version().to_string()), "{code}: {said}");

    let next = version() + 1;
    let initrd = std::fs::read(built().join("initrd")).expect("the RAM disk");
    let newer = serve(bundle(next, &initrd, &manifest_value("options"), &key()));
    image.run(&format!("image update {newer}"));
    image.tell("reboot");
    boots_slot(&mut image, 'b', next);
    image.hear(SERVING, SOON);
    let said = image.run("image status");
    assert!(said.contains(&next.to_string()), "{said}");
    let log = image.off();
    assert_eq!(count(&log, BEGINS), 2, "{log:#?}");
    assert_eq!(entries(&disk), ["dray-a.conf", "dray-b.conf"], "both came up, and are good");
    disk.check_state().expect("the state was unmounted");

    // And it stays there.
    let mut image = Image::boot(&machine, BEGINS);
    assert!(image.log().iter().any(|line| line.contains("slot b")), "{}", image.story("which slot?"));
    image.hear(SERVING, SOON);
    image.off();
}

#[test]
fn an_update_that_does_not_come_up_is_left_after_its_tries() {
    let _turn = turn();
    let room = Room::new("fallback");
    let disk = room.disk(&shipped());
    let (machine, _) = room.machine("fallback", &disk);
    let mut image = Image::boot(&machine, SERVING);
    // No file system in it: the kernel finds no first process, panics, and restarts.
    let options = manifest_value("options").replace("panic=5", "panic=1");
    let dead = serve(bundle(version() + 1, b"no RAM disk at all", &options, &key()));
    image.run(&format!("image update {dead}"));
    image.tell("reboot");
    for _ in 0..3 {
        image.hear("Kernel panic", SOON);
    }
    boots_slot(&mut image, 'a', version());
    image.hear(SERVING, SOON);
    let log = image.off();
    assert_eq!((count(&log, "Kernel panic"), count(&log, BEGINS)), (3, 2), "{log:#?}");
    let entries = entries(&disk);
    assert!(entries.contains(&"dray-a.conf".to_owned()) && entries.contains(&"dray-b+0-3.conf".to_owned()), "{entries:?}");
    disk.check_state().expect("the state was unmounted");
}

#[test]
fn an_update_that_somebody_else_signed_or_that_was_changed_is_refused() {
    let _turn = turn();
    let room = Room::new("signed");
    let disk = room.disk(&shipped());
    let (machine, _) = room.machine("signed", &disk);
    let mut image = Image::boot(&machine, SERVING);
    let initrd = std::fs::read(built().join("initrd")).expect("the RAM disk");
    let options = manifest_value("options");
    let good = bundle(version() + 1, &initrd, &options, &key());
    let mut header = good.clone();
    header[13] ^= 1;
    let mut contents = good.clone();
    *contents.last_mut().expect("a bundle") ^= 1;
    let forged = bundle(version() + 1, &initrd, &options, &SigningKey::from_bytes(&[7; 32]));
    for (what, bytes, words) in [
        ("another key", forged, "signature"),
        ("a changed header", header, "signature"),
        ("a changed RAM disk", contents, "initrd"),
        ("half of it", good[..good.len() / 2].to_vec(), "cannot be read"),
        ("something else", b"<html>no such file</html>".repeat(100), "no update bundle"),
    ] {
        let (code, said) = image.command(&format!("image update {}", serve(bytes)), COMMAND);
        assert!(code != 0 && said.contains(words), "{what}: {code}: {said}");
    }
    image.off();
    assert_eq!(entries(&disk), ["dray-a.conf"], "the other slot has an entry");
}
