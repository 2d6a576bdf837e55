//! The `dray` binary inside a guest: an initial RAM disk that has it, with its loader and libraries, on top of the usual one.
//!
//! The kernel unpacks archives that stand one behind the other, so that what `cargo xtask guests` made stays as it is. In the guest
//! `/usr/bin/dray` is a script that runs the binary with the loader and the libraries that it was linked with here, whatever the
//! guest has itself. More files can be put beside it, and the very test that is running: what it does in the guest is one of its
//! functions that is ignored elsewhere.

use super::cpio::Archive;
use super::guest::folder;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where everything of it is in the guest, without the leading slash.
const PLACE: &str = "opt/dray";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The binary beside this test: `cargo test --workspace` builds both.
///
/// # Panics
/// If there is none.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("this test");
    let folder = test.ancestors().find(|folder| folder.join("dray").is_file());
    folder.unwrap_or_else(|| panic!("no dray beside {}: cargo build --release --workspace", test.display())).join("dray")
}

/// A file with an initial RAM disk, which goes when this is dropped.
#[derive(Debug)]
pub struct Initrd {
    file: PathBuf,
}

impl Initrd {
    /// The guests' usual one, and `dray`.
    ///
    /// # Panics
    /// If something of it is not there.
    pub fn with_dray() -> Self {
        Self::with_dray_and(&[])
    }

    /// And further files: where they are in the guest (without the leading slash) and what is in them.
    ///
    /// # Panics
    /// If something of it is not there.
    pub fn with_dray_and(files: &[(&str, &[u8])]) -> Self {
        let mut archive = Archive::default();
        add_program(&mut archive, "dray", &binary());
        for (path, bytes) in files {
            archive.file(path, bytes.to_vec(), false);
        }
        Self::of(&archive)
    }

    /// The guests' usual one, `dray`, and the running test as `/usr/bin/this-test`.
    ///
    /// # Panics
    /// If something of it is not there.
    pub fn with_dray_and_this_test() -> Self {
        let mut archive = Archive::default();
        add_program(&mut archive, "dray", &binary());
        add_program(&mut archive, "this-test", &std::env::current_exe().expect("this test"));
        Self::of(&archive)
    }

    fn of(archive: &Archive) -> Self {
        let file = temporary(".cpio");
        let mut bytes = std::fs::read(folder().join("initrd.cpio")).expect("the guests' initial RAM disk");
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(&archive.bytes());
        std::fs::write(&file, bytes).expect("an initial RAM disk");
        Self { file }
    }

    /// The file, for [`Machine::initrd`](super::guest::Machine::initrd).
    pub fn path(&self) -> &Path {
        &self.file
    }
}

impl Drop for Initrd {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.file);
    }
}

fn temporary(what: &str) -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("dray-in-guest-{}-{number}{what}", std::process::id()))
}

fn add_program(archive: &mut Archive, called: &str, binary: &Path) {
    let stripped = temporary(".stripped");
    // A guest has no use for its line tables, and little memory; without binutils it gets them all the same.
    let strip = Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(binary).status();
    let program = if strip.is_ok_and(|status| status.success()) { stripped.as_path() } else { binary };
    archive.file(&format!("{PLACE}/{called}"), std::fs::read(program).expect("a program"), true);
    let _gone = std::fs::remove_file(&stripped);
    let (loader, libraries) = libraries(binary);
    for library in std::iter::once(&loader).chain(&libraries) {
        archive.file(&format!("{PLACE}/lib/{}", name(library)), std::fs::read(library).expect("a library"), true);
    }
    let run = format!("exec /{PLACE}/lib/{} --inhibit-cache --library-path /{PLACE}/lib /{PLACE}/{called} \"$@\"", name(&loader));
    archive.file(&format!("usr/bin/{called}"), format!("#!/bin/sh\n{run}\n").into_bytes(), true);
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The loader of a program and the libraries that it finds: lines `NAME => PATH (ADDRESS)`, and `PATH (ADDRESS)` for the loader.
fn libraries(program: &Path) -> (PathBuf, Vec<PathBuf>) {
    let said = Command::new("ldd").arg(program).output().expect("ldd");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let (mut loader, mut libraries) = (None, Vec::new());
    for line in said.lines() {
        let path = line.rsplit("=> ").next().unwrap_or("").trim().split(" (").next().unwrap_or("");
        if !path.starts_with('/') {
            continue;
        }
        if line.contains("=>") { libraries.push(path.into()) } else { loader = Some(path.into()) }
    }
    (loader.unwrap_or_else(|| panic!("{} names no loader:\n{said}", program.display())), libraries)
}
