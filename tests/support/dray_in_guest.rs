//! The `dray` binary inside a guest: an initial RAM disk that has it, with its loader and libraries, on top of the usual one.
//!
//! The kernel unpacks archives that stand one behind the other, so that what `cargo xtask guests` made stays as it is. In the guest
//! `/usr/bin/dray` is a script that runs the binary with the loader and the libraries that it was linked with here, whatever the
//! guest has itself. More files can be put beside it.

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
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| std::env::temp_dir().join(format!("dray-in-guest-{}-{number}{what}", std::process::id()));
        let (stripped, file) = (name(".stripped"), name(".cpio"));
        let mut archive = Archive::default();
        add_dray(&mut archive, &stripped);
        let _gone = std::fs::remove_file(&stripped);
        for (path, bytes) in files {
            archive.file(path, bytes.to_vec(), false);
        }
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

fn add_dray(archive: &mut Archive, stripped: &Path) {
    let binary = binary();
    // A guest has no use for its line tables, and little memory; without binutils it gets them all the same.
    let strip = Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped).arg(&binary).status();
    let program = if strip.is_ok_and(|status| status.success()) { stripped } else { &binary };
    archive.file(&format!("{PLACE}/dray"), std::fs::read(program).expect("dray"), true);
    let (loader, libraries) = libraries(&binary);
    for library in std::iter::once(&loader).chain(&libraries) {
        archive.file(&format!("{PLACE}/lib/{}", name(library)), std::fs::read(library).expect("a library"), true);
    }
    let run = format!("exec /{PLACE}/lib/{} --inhibit-cache --library-path /{PLACE}/lib /{PLACE}/dray \"$@\"", name(&loader));
    archive.file("usr/bin/dray", format!("#!/bin/sh\n{run}\n").into_bytes(), true);
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
