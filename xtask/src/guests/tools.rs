//! What was unpacked, made usable where it lies: the kernel's image, its modules in their order, programs with their libraries.

use crate::Outcome;
use crate::process::{command, output};
use crate::tree::replace;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The dynamic loader of a release whose `/lib64` is `/usr/lib64`.
pub const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
/// Where libraries are.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The list of programs: a package with the names of its programs per line, `#` starts a comment.
pub struct Programs(Vec<(String, Vec<String>)>);

impl Programs {
    pub fn parse(text: &str) -> Outcome<Self> {
        let lines = lines(text).map(|line| match line.split_once(':') {
            Some((package, programs)) => Ok((package.trim().into(), programs.split_whitespace().map(Into::into).collect())),
            None => Err(format!("tests/guests/programs: no colon in `{line}`")),
        });
        Ok(Self(lines.collect::<Outcome<_>>()?))
    }

    /// The packages.
    pub fn packages(&self) -> Vec<&str> {
        self.0.iter().map(|(package, _)| package.as_str()).collect()
    }

    /// The programs.
    pub fn names(&self) -> Vec<&str> {
        self.0.iter().flat_map(|(_, programs)| programs).map(String::as_str).collect()
    }
}

/// The lines of a list, without comments and empty ones.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.split('#').next().unwrap_or("").trim()).filter(|line| !line.is_empty())
}

/// The version and the image of the kernel under `root`.
pub fn kernel(root: &Path) -> Outcome<(String, PathBuf)> {
    let boot = root.join("boot");
    let names = fs::read_dir(&boot).map_err(|error| format!("{}: {error}", boot.display()))?.flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let found = names.into_iter().find_map(|name| Some((name.strip_prefix("vmlinuz-")?.to_owned(), boot.join(&name))));
    found.ok_or_else(|| format!("no kernel in {}", boot.display()))
}

/// Writes a script that runs the QEMU under `root` with the loader and the libraries that came with it.
pub fn qemu_script(root: &Path, script: &Path) -> Outcome {
    for file in [LOADER, "usr/bin/qemu-system-x86_64", "usr/share/seabios"] {
        if !root.join(file).exists() {
            return Err(format!("{} is not there", root.join(file).display()));
        }
    }
    libraries(root, Path::new("usr/bin/qemu-system-x86_64"))?;
    let text = format!(
        "#!/bin/sh\n# This QEMU with its own loader and libraries; the process becomes QEMU.\n\
         here=$(cd \"$(dirname \"$0\")\" && pwd)/qemu\n\
         QEMU_MODULE_DIR=$here/{LIBRARIES}/qemu exec \"$here/{LOADER}\" --inhibit-cache --library-path \"$here/{LIBRARIES}\" \\\n\
         \x20   \"$here/usr/bin/qemu-system-x86_64\" -L \"$here/usr/share/qemu\" -L \"$here/usr/share/seabios\" \"$@\"\n"
    );
    replace(script, text.as_bytes())?;
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).map_err(|error| format!("{}: {error}", script.display()))
}

/// A program under `root`.
pub fn program(root: &Path, name: &str) -> Outcome<PathBuf> {
    let folders = ["usr/bin", "usr/sbin", "bin", "sbin"];
    let found = folders.iter().map(|folder| Path::new(folder).join(name)).find(|path| root.join(path).exists());
    found.ok_or_else(|| format!("{name} is not under {}", root.display()))
}

/// The libraries that a program under `root` loads, as paths below it.
pub fn libraries(root: &Path, program: &Path) -> Outcome<Vec<PathBuf>> {
    // Libraries that belong to one package are in a folder of their own, which their users name by an absolute path.
    let folders = fs::read_dir(root.join(LIBRARIES)).into_iter().flatten().flatten().map(|entry| entry.path());
    let path: Vec<_> = [root.join(LIBRARIES)].into_iter().chain(folders.filter(|path| path.is_dir())).collect();
    let path = std::env::join_paths(path).map_err(|error| error.to_string())?;
    let mut list = command(root.join(LOADER));
    list.args(["--inhibit-cache", "--library-path"]).arg(path).arg("--list").arg(root.join(program));
    let text = output(&mut list)?;
    // `	NAME => PATH (ADDRESS)`
    let paths = text.lines().filter_map(|line| line.split_once("=> ")?.1.split(" (").next());
    let mut found = Vec::new();
    for path in paths.map(str::trim) {
        match Path::new(path).strip_prefix(root) {
            Ok(path) if path == Path::new(LOADER) => {}
            Ok(path) => found.push(path.to_path_buf()),
            Err(_) => return Err(format!("{}: {path} is the machine's own or not there", program.display())),
        }
    }
    Ok(found)
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

/// What a module says it depends on: `depends=a,b` in its section of strings.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let names = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(names).split(',').filter(|name| !name.is_empty()).map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_programs_is_read() {
        let programs = Programs::parse("# what for\nnvme-cli: nvme\ne2fsprogs: mkfs.ext4 e2fsck # two\n\n").unwrap();
        assert_eq!(programs.packages(), ["nvme-cli", "e2fsprogs"]);
        assert_eq!(programs.names(), ["nvme", "mkfs.ext4", "e2fsck"]);
        assert!(Programs::parse("nvme-cli nvme").is_err());
    }

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(needs(b"\x7fELF..license=GPL\0depends=nvme-core,nvme-fabrics\0name=nvme_tcp\0"), ["nvme-core", "nvme-fabrics"]);
        assert!(needs(b"..\0depends=\0name=x\0").is_empty() && needs(b"").is_empty());
    }
}
