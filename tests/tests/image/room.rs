//! What tests of the image share: a folder with a disk in it, the shipped configuration with a few lines changed, ports.

use dray_tests::image::{Boot, Image, Machine, SOON, get};
use dray_tests::image_disk::Disk;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What the image says when it serves.
pub const SERVING: &str = "serving after";
/// What it says when nobody can be served on this configuration.
pub const WRONG: &str = "appliance.toml is wrong";
/// How it begins.
pub const BEGINS: &str = "is PID 1";
/// Where the status page is in the guest.
pub const STATUS: u16 = 4480;

/// A folder of a test's own, gone with it unless the test fails.
pub struct Room {
    folder: PathBuf,
}

impl Room {
    pub fn new(name: &str) -> Self {
        // Paths of sockets are short.
        let folder = std::env::temp_dir().join(format!("dray-image-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        Self { folder }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A copy of the built disk with a configuration on it.
    pub fn disk(&self, config: &str) -> Disk {
        let disk = Disk::copy(&self.folder);
        disk.put("DRAY-CONFIG", "appliance.toml", config.as_bytes());
        disk
    }

    /// A machine that boots the disk, and a port of the loopback that leads to its status page.
    pub fn machine(&self, name: &str, disk: &Disk) -> (Machine, u16) {
        let status = free_port();
        let machine = Machine::new(name, &self.folder, Boot::Disk(disk.path().into()));
        (machine.forward(status, STATUS), status)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("logs and disks are in {}", self.folder.display());
        } else {
            let _gone = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// The configuration that the image is shipped with, its console on.
pub fn shipped() -> String {
    let text = include_str!("../../../images/appliance.toml");
    let with_console = text.replace("# console = \"ttyS1\"", "console = \"ttyS1\"");
    assert!(with_console != text, "the shipped configuration has no line for the console");
    with_console
}

/// A TCP port of the loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// Waits until the status page has some words; the page.
#[track_caller]
pub fn page(image: &Image, port: u16, words: &str) -> String {
    let end = Instant::now() + SOON;
    loop {
        let page = get(port, "/");
        match page {
            Ok(page) if page.contains(words) => return page,
            other => assert!(Instant::now() < end, "{}", image.story(&format!("no status page with \"{words}\": {other:?}"))),
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Milliseconds that a line says before the word "ms".
pub fn milliseconds(line: &str) -> u64 {
    let before = line.split(" ms").next().unwrap_or("");
    let number = before.rsplit(' ').next().unwrap_or("");
    number.parse().unwrap_or_else(|_| panic!("no number of milliseconds in: {line}"))
}

/// How often a console says something.
pub fn count(log: &[String], words: &str) -> usize {
    log.iter().filter(|line| line.contains(words)).count()
}
