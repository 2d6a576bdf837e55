//! The appliance's file system: the binary as the first process, what it needs to run, kernel modules, the default configuration.
//!
//! There is no shell and no program but ours in it (`--debug` adds busybox). All of it lies in memory; what must stay is on the
//! state partition.

use super::aliases::{ALWAYS, Wanted};
use super::inputs::Inputs;
use super::{elf, lz4};
use crate::Outcome;
use crate::cpio::Archive;
use crate::kernel::{Modules, sets};
use crate::tree::read_text;
use std::fmt::Write as _;
use std::path::Path;

/// Folders that the first process mounts something on.
const EMPTY: [&str; 10] = ["boot", "config", "dev", "etc", "proc", "root", "run", "state", "sys", "tmp"];
/// Names are resolved by `/etc/hosts`, then by the servers that the first process wrote into `/etc/resolv.conf`. Both ways are in
/// glibc itself since 2.34.
const NAMES: &str = "passwd: files\ngroup: files\nhosts: files dns\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";

/// Builds the archive, compressed; its size before that besides.
pub fn build(inputs: &Inputs) -> Outcome<(Vec<u8>, usize)> {
    let mut archive = Archive::default();
    EMPTY.iter().for_each(|path| archive.folder(path));
    archive.file("usr/bin/dray", inputs.binary.clone(), true);
    archive.link("init", "usr/bin/dray");
    for (path, bytes) in elf::closure(&inputs.binary, Path::new("/")).map_err(|error| format!("dray: {error}"))? {
        archive.file(&path, bytes, true);
    }
    archive.file("etc/nsswitch.conf", NAMES.into(), false);
    archive.file("etc/hosts", HOSTS.into(), false);
    archive.file("etc/dray/update.pub", inputs.public_key.clone().into_bytes(), false);
    for (path, bytes) in &inputs.config {
        archive.file(&format!("etc/dray/{path}"), bytes.clone(), false);
    }
    let (list, aliases) = add_modules(&mut archive, inputs)?;
    archive.file("etc/dray/modules", list.into_bytes(), false);
    archive.file("etc/dray/aliases", aliases.into_bytes(), false);
    if let Some(busybox) = &inputs.busybox {
        archive.file("usr/bin/busybox", busybox.clone(), true);
        archive.folder("bin");
        archive.link("bin/sh", "../usr/bin/busybox");
    }
    let bytes = archive.bytes();
    Ok((lz4::compress(&bytes), bytes.len()))
}

/// Adds every module of every set with those that it needs. Two lists for the first process: a set per line, each of its words
/// with what that needs in the order to load, joined by `+`, after a `!` if no device has to be there for it; and what devices the
/// modules are for that are of use with one alone.
fn add_modules(archive: &mut Archive, inputs: &Inputs) -> Outcome<(String, String)> {
    let kernel = &inputs.kernel;
    let modules = Modules::find(&kernel.root, &kernel.version, &kernel.unpacker)?;
    let built_in = read_text(&kernel.root.join("usr/lib/modules").join(&kernel.version).join("modules.builtin"))?;
    let mut list = format!("# Kernel modules of Linux {} by set; those that are joined by + in this order.\n", kernel.version);
    let mut wanted = Wanted::default();
    for (set, words) in sets("images/modules", &inputs.modules)? {
        let mut order = Vec::new();
        for name in words.iter().flat_map(|word| word.split('+')) {
            if !modules.has(name) && !is_built_in(&built_in, name) {
                return Err(format!("images/modules: Linux {} has no module {name}, and it is not built in", kernel.version));
            }
            modules.add(name, &mut order)?;
        }
        list.push_str(&set);
        list.push(':');
        let mark = if ALWAYS.contains(&set.as_str()) { "!" } else { "" };
        for word in &words {
            let chain: Vec<_> = wanted.add(&set, word, &order).into_iter().map(|name| format!("{name}.ko")).collect();
            if !chain.is_empty() {
                // Writing to a String cannot fail.
                let _ = write!(list, " {mark}{}", chain.join("+"));
            }
        }
        list.push('\n');
        for (name, bytes) in order {
            archive.file(&format!("lib/modules/{}/{name}.ko", kernel.version), bytes, false);
        }
    }
    Ok((list, wanted.list()))
}

/// Whether `modules.builtin`, a path of a module per line, has this one; names are the same with dashes and underscores.
fn is_built_in(list: &str, name: &str) -> bool {
    let name = name.replace('-', "_");
    list.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko")).any(|found| found.replace('-', "_") == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_is_built_in_is_known() {
        let list = "kernel/drivers/vfio/vfio-x.ko\nkernel/crypto/crc32c_generic.ko\n";
        assert!(is_built_in(list, "vfio_x") && is_built_in(list, "crc32c-generic"));
        assert!(!is_built_in(list, "vfio") && !is_built_in(list, "generic"));
    }
}
