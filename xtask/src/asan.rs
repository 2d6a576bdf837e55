//! The stage "fence" of `cargo xtask test`: host/device, where all unsafe code but one call is, under a checker.
//!
//! Miri where it is installed, AddressSanitizer elsewhere. Miri knows no memory that is shared by file descriptor and no
//! io_uring, so it gets the tests that need neither ([`MIRI`]); AddressSanitizer gets all of them, and those of the driver,
//! whose rings lie in arenas. Arenas then stand between pages that nobody may touch (`--cfg asan`). The queues that no kernel has
//! yet (feature `kernel-cdq`) are among them.
//!
//! The other unsafe line is in host/sandbox/src/cache.rs: it has wasmtime load code that a checksum showed to be what wasmtime
//! wrote. No sanitizer looks into that (wasmtime would be compiled again); its own tests falsify such files.

use crate::Outcome;
use crate::process::{cargo, command};
use crate::tree::Tree;
use std::process::{Command, Stdio};

/// Modules of host/device whose tests need no memory of the kernel's.
const MIRI: [&str; 2] = ["poll::", "scan::"];

/// The target named is what keeps the sanitizer out of build scripts and procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The tests that leak on purpose, in the words of the leak checker.
const LEAKS: &str = "host/device/leaks.supp";

/// What the stage is called, with the checker that is there, and its command.
pub fn stage(tree: &Tree) -> Outcome<(&'static str, Command)> {
    if has_miri(tree) {
        let mut miri = cargo(tree, &["miri", "test", "-p", "dray-device", "--lib", "--"]);
        miri.args(MIRI).env("CARGO_TARGET_DIR", tree.target("miri")?);
        return Ok(("fence: Miri", miri));
    }
    let packages = ["-p", "dray-device", "-p", "dray-driver", "--features", "dray-driver/kernel-cdq"];
    let mut asan = cargo(tree, &[&["test", "--lib", "--target", TARGET], &packages[..]].concat());
    // A target folder of its own: other flags would otherwise throw the workspace's build away.
    asan.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-Zsanitizer=address --cfg asan");
    asan.env("CARGO_TARGET_DIR", tree.target("asan")?);
    // Memory that a device may still write is leaked on purpose, and a test makes it so.
    asan.env("LSAN_OPTIONS", format!("suppressions={}", tree.root.join(LEAKS).display()));
    Ok(("fence: ASan", asan))
}

/// Whether Miri is installed for the Rust that is used.
pub fn has_miri(tree: &Tree) -> bool {
    let mut version = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    version.current_dir(&tree.root).args(["miri", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    version.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::shown;

    #[test]
    fn one_of_the_checkers_gets_the_unsafe_crate() {
        let (name, command) = stage(&Tree::find().unwrap()).unwrap();
        let flags = command.get_envs().any(|(key, value)| {
            key == "RUSTFLAGS" && value.is_some_and(|flags| flags.to_string_lossy().contains("sanitizer=address"))
        });
        assert_eq!(name.ends_with("ASan"), flags);
        assert!(shown(&command).contains("-p dray-device"));
        let leaks = Tree::find().unwrap().root.join(LEAKS);
        assert!(std::fs::read_to_string(&leaks).unwrap().lines().any(|line| line.starts_with("leak:")), "{}", leaks.display());
    }
}
