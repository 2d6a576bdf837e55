//! A kernel of Debian's that was unpacked into a folder: its image, and its modules in the order to load them.

use crate::Outcome;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The lines of a list, without comments (`#`) and empty ones.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.split('#').next().unwrap_or("").trim()).filter(|line| !line.is_empty())
}

/// A list of sets of modules: a name, a colon, and modules, per line. `file` is for messages.
pub fn sets(file: &str, text: &str) -> Outcome<Vec<(String, Vec<String>)>> {
    let set = |line: &str| {
        let (name, modules) = line.split_once(':').ok_or_else(|| format!("{file}: no colon in `{line}`"))?;
        Ok((name.trim().to_owned(), modules.split_whitespace().map(str::to_owned).collect()))
    };
    lines(text).map(set).collect()
}

/// The version and the image of the kernel under `root`.
pub fn find(root: &Path) -> Outcome<(String, PathBuf)> {
    let boot = root.join("boot");
    let names = fs::read_dir(&boot).map_err(|error| format!("{}: {error}", boot.display()))?.flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found = names.into_iter().find_map(|name| Some((name.strip_prefix("vmlinuz-")?.to_owned(), boot.join(&name))));
    found.ok_or_else(|| format!("no kernel in {}", boot.display()))
}

/// The kernel's modules: unpacked and asked what they need.
pub struct Modules<'a> {
    busybox: &'a Path,
    /// Compressed files by name, with underscores.
    files: BTreeMap<String, PathBuf>,
}

impl<'a> Modules<'a> {
    /// Those under `root`; `busybox` unpacks them.
    pub fn find(root: &Path, version: &str, busybox: &'a Path) -> Outcome<Self> {
        let mut files = BTreeMap::new();
        walk(&root.join("usr/lib/modules").join(version).join("kernel"), &mut files)?;
        Ok(Self { busybox, files })
    }

    /// Whether there is such a module: what is not there is built into the kernel, or no module of this kernel.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(&name.replace('-', "_"))
    }

    /// Adds a module to `order` behind those that it needs. A module that is not there is built into the kernel or an error
    /// of the guest's script, which finds out.
    pub fn add(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Outcome {
        let name = name.replace('-', "_");
        let Some(path) = self.files.get(&name) else { return Ok(()) };
        if order.iter().any(|(known, _)| *known == name) {
            return Ok(());
        }
        let mut unpack = Command::new(self.busybox);
        let unpacked = unpack.args(["xzcat"]).arg(path).stdin(Stdio::null()).output();
        let unpacked = unpacked.map_err(|error| format!("{}: {error}", self.busybox.display()))?;
        if !unpacked.status.success() {
            return Err(format!("{}: {}", path.display(), String::from_utf8_lossy(&unpacked.stderr).trim()));
        }
        for needed in needs(&unpacked.stdout) {
            self.add(&needed, order)?;
        }
        order.push((name, unpacked.stdout));
        Ok(())
    }
}

fn walk(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Outcome {
    for entry in fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// What a module says of itself under a key: each `KEY=VALUE` of its section of strings.
pub fn says<'a>(module: &'a [u8], key: &str) -> impl Iterator<Item = std::borrow::Cow<'a, str>> {
    let start = format!("\0{key}=").into_bytes();
    let mut rest = module;
    std::iter::from_fn(move || {
        let at = rest.windows(start.len()).position(|window| window == start)?;
        rest = &rest[at + start.len()..];
        let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
        let value = String::from_utf8_lossy(&rest[..end]);
        // The zero byte at its end begins the next one.
        rest = &rest[end..];
        Some(value)
    })
}

/// The modules that a module says it depends on.
pub fn needs(module: &[u8]) -> Vec<String> {
    let list = says(module, "depends").next().unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(needs(b"\x7fELF..license=GPL\0depends=nvme-core,nvme-fabrics\0name=nvme_tcp\0"), ["nvme_core", "nvme_fabrics"]);
        assert!(needs(b"..\0depends=\0name=x\0").is_empty() && needs(b"").is_empty());
        let aliases: Vec<_> = says(b"\0alias=pci:v1*\0alias=virtio:d1v*\0noalias=x\0alias=cut", "alias").collect();
        assert_eq!(aliases, ["pci:v1*", "virtio:d1v*", "cut"]);
    }

    #[test]
    fn sets_are_read_with_their_names_and_comments_are_left_out() {
        let read = sets("a", "# why\nbase: ext4 # the state\n\nnet: virtio_net e1000e\n");
        let set = |name: &str, modules: &[&str]| (name.to_owned(), modules.iter().map(|module| (*module).to_owned()).collect());
        assert_eq!(read, Ok(vec![set("base", &["ext4"]), set("net", &["virtio_net", "e1000e"])]));
        assert_eq!(sets("images/modules", "base ext4"), Err("images/modules: no colon in `base ext4`".into()));
    }
}
