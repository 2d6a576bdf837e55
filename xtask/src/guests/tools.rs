//! What was unpacked, made usable where it lies: programs with their libraries, QEMU with what came with it.

use crate::Outcome;
use crate::kernel::lines;
use crate::process::{command, output};
use crate::tree::replace;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

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
}
