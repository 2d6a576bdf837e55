//! The guest's file system: busybox, the programs with their libraries, kernel modules in their order, and the scripts.

use super::tools::{self, LIBRARIES, LOADER, Programs};
use crate::Outcome;
use crate::cpio::Archive;
use crate::kernel::{Modules, sets};
use crate::process::{command, output};
use crate::tree::read_text;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Libraries that are loaded by name while a program runs: glibc ends threads with the first.
const BY_NAME: [&str; 1] = ["libgcc_s.so.1"];
/// Files that programs read, where they are.
const FILES: [&str; 1] = ["etc/mke2fs.conf"];

/// Builds the archive out of what was unpacked under `folder` and what `wanted` (`tests/guests`) says.
pub fn build(folder: &Path, wanted: &Path, version: &str, programs: &Programs) -> Outcome<Vec<u8>> {
    let mut archive = Archive::default();
    for empty in ["dev", "proc", "sys", "tmp", "mnt", "run", "root"] {
        archive.folder(empty);
    }
    archive.link("lib", "usr/lib");
    archive.link("lib64", "usr/lib64");
    let root = folder.join("programs");
    let busybox = root.join(tools::program(&root, "busybox")?);
    archive.file("bin/busybox", read(&busybox)?, true);
    add_programs(&mut archive, &root, programs)?;
    for applet in output(command(&busybox).arg("--list"))?.lines() {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    add_modules(&mut archive, &folder.join("kernel"), wanted, version, &busybox)?;
    for script in ["init", "steps.sh"] {
        archive.file(script, read(&wanted.join(script))?, true);
    }
    Ok(archive.bytes())
}

fn add_programs(archive: &mut Archive, root: &Path, programs: &Programs) -> Outcome {
    let mut libraries: BTreeSet<PathBuf> = BY_NAME.iter().map(|name| Path::new(LIBRARIES).join(name)).collect();
    for name in programs.names() {
        let program = tools::program(root, name)?;
        let file = program.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("usr/bin/{file}"), read(&root.join(&program))?, true);
        libraries.extend(tools::libraries(root, &program)?);
    }
    archive.file(LOADER, read(&root.join(LOADER))?, true);
    for library in libraries {
        let text = library.to_string_lossy().into_owned();
        archive.file(&text, read(&root.join(&library))?, true);
        // A library of a program's own folder is found among the others.
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        archive.link(&format!("{LIBRARIES}/{name}"), &format!("/{text}"));
    }
    for file in FILES {
        archive.file(file, read(&root.join(file))?, false);
    }
    Ok(())
}

/// Each set of `tests/guests/modules` becomes a list of files in the order to load them.
fn add_modules(archive: &mut Archive, kernel: &Path, wanted: &Path, version: &str, busybox: &Path) -> Outcome {
    let modules = Modules::find(kernel, version, busybox)?;
    for (set, names) in sets("tests/guests/modules", &read_text(&wanted.join("modules"))?)? {
        let mut order = Vec::new();
        for name in &names {
            modules.add(name, &mut order)?;
        }
        let list: String = order.iter().map(|(name, _)| format!("/modules/{name}.ko\n")).collect();
        archive.file(&format!("modules/{set}"), list.into_bytes(), false);
        for (name, bytes) in order {
            archive.file(&format!("modules/{name}.ko"), bytes, false);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Outcome<Vec<u8>> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}
