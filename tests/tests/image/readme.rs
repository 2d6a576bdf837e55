//! The README's commands that boot the image, as they are written but for the folder of their files and the port outside.

use crate::room::{Room, SERVING, STATUS, free_port};
use dray_tests::guest::{BOOT, turn};
use dray_tests::image::get;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Instant;

/// The blocks of the section "The image" that start QEMU, one command each line.
fn blocks() -> Vec<Vec<String>> {
    let readme = include_str!("../../../README.md");
    let section = readme.split("\n## ").find(|section| section.starts_with("The image\n")).expect("its section");
    let blocks = section.split("```sh\n").skip(1).filter_map(|rest| rest.split("\n```").next());
    let commands = |block: &str| block.replace("\\\n", " ").lines().map(|line| line.split(" # ").next().unwrap_or(line).trim().to_owned()).collect();
    blocks.filter(|block| block.contains("qemu-system")).map(commands).collect()
}

fn shell(line: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    // Replaced by the program, so that the pid is its own.
    let line = if line.contains("qemu-system") { format!("exec {line}") } else { line.to_owned() };
    shell.arg("-c").arg(line).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the source tree"));
    shell
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Starts QEMU and waits until the image says that it serves.
#[track_caller]
fn serves(line: &str) -> Running {
    let child = shell(line).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut running = Running(child.expect("a shell"));
    let out = running.0.stdout.take().expect("a pipe");
    let (to, lines) = channel();
    std::thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).try_for_each(|line| to.send(line)));
    let (end, mut said) = (Instant::now() + BOOT, Vec::new());
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) if line.contains(SERVING) => return running,
            Ok(line) => said.push(line),
            Err(_) => panic!("`{line}` does not serve:\n{}", said.join("\n")),
        }
    }
}

#[test]
fn the_readmes_commands_boot_the_image() {
    let _turn = turn();
    let blocks = blocks();
    assert_eq!(blocks.len(), 2, "from its disk, and directly: {blocks:?}");
    let room = Room::new("readme");
    for block in blocks {
        let port = free_port();
        let mut running = None;
        for line in block {
            let line = line.replace("/tmp/", &format!("{}/", room.folder().display()));
            let line = line.replace(&format!("127.0.0.1:{STATUS}"), &format!("127.0.0.1:{port}"));
            match line.split(' ').next() {
                // A stage of its own has done that.
                Some("cargo") => assert_eq!(line, "cargo xtask guests"),
                Some("cp") => assert!(shell(&line).status().expect("a shell").success(), "{line}"),
                // Whoever tests may have no curl.
                Some("curl") => {
                    assert_eq!(line, format!("curl http://127.0.0.1:{port}/"));
                    assert!(get(port, "/").expect("the status page").contains("serving"));
                }
                _ => running = Some(serves(&line)),
            }
        }
        assert!(running.is_some());
    }
}
