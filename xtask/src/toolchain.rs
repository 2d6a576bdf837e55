//! Finds a compiler that builds for wasm32-unknown-unknown, and fetches one only where there is none.
//!
//! The standard library for that target comes with the compiler (a rustup target), or is built from the sources of the very
//! version of the compiler. The user's toolchain is never changed.

use crate::Outcome;
use crate::debian::{self, Plan};
use crate::process::{agreed, command, find, is_root, output};
use crate::tree::{Tree, replace};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What plugins are compiled for.
pub const TARGET: &str = "wasm32-unknown-unknown";
/// The oldest compiler that builds the plugins (1, minor).
const OLDEST: (u32, u32) = (1, 95);
const PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
const BETTER: &str = "`rustup target add wasm32-unknown-unknown` would be quicker";

/// A compiler for the plugins.
#[derive(Debug)]
pub struct Toolchain {
    /// What it is, as recorded beside the built plugins.
    pub name: String,
    /// What would be better; empty if nothing.
    pub better: &'static str,
    rustc: Option<PathBuf>,
    libraries: Vec<PathBuf>,
    /// The library must be built from source.
    build_std: bool,
    /// The linker script.
    linker: PathBuf,
}

impl Toolchain {
    /// Looks for an installed target, then for a compiler with its sources, then fetches Debian's. `yes`: do not ask.
    pub fn find(tree: &Tree, yes: bool) -> Outcome<Self> {
        let default = Compiler::new("rustc".into(), Vec::new());
        let version = default.version()?;
        let sysroot = default.sysroot()?;
        let linker = linker(tree, &sysroot, &version.host)?;
        if has_library(&sysroot) {
            let name = format!("rustc {} with its installed target {TARGET}", version.release);
            return Ok(Self { name, better: "", rustc: None, libraries: Vec::new(), build_std: false, linker });
        }
        let cache = tree.root.join("target/wasm-toolchain");
        let root = cache.join("root");
        let candidates = [default, Compiler::new("/usr/bin/rustc".into(), Vec::new()), Compiler::unpacked(&root)];
        if let Some(found) = candidates.into_iter().find_map(|compiler| compiler.with_sources(&linker)) {
            return Ok(found);
        }
        fetch(&cache, &root, yes)?;
        let fetched = [Compiler::unpacked(&root), Compiler::new("/usr/bin/rustc".into(), Vec::new())];
        fetched.into_iter().find_map(|compiler| compiler.with_sources(&linker)).ok_or_else(|| {
            "Debian's rustc-web and rust-web-src do not fit together; install a compiler with `rustup target add \
             wasm32-unknown-unknown`"
                .into()
        })
    }

    /// Gives a cargo command what it needs to build for [`TARGET`]: nothing of it reaches any other build.
    pub fn apply(&self, cargo: &mut Command) {
        cargo.args(["--target", TARGET]);
        // Flags for the host's processor mean nothing to this target.
        cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_BUILD_RUSTFLAGS");
        cargo.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", &self.linker);
        if let Some(rustc) = &self.rustc {
            cargo.env("RUSTC", rustc);
        }
        if let Ok(libraries) = std::env::join_paths(&self.libraries)
            && !libraries.is_empty()
        {
            cargo.env("LD_LIBRARY_PATH", libraries);
        }
        if self.build_std {
            cargo.env("RUSTC_BOOTSTRAP", "1").arg("-Zbuild-std=core,alloc,panic_abort");
        }
    }
}

/// A rustc somewhere on this machine.
struct Compiler {
    rustc: PathBuf,
    libraries: Vec<PathBuf>,
}

/// What `rustc -vV` says.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    release: String,
    host: String,
}

impl Compiler {
    fn new(rustc: PathBuf, libraries: Vec<PathBuf>) -> Self {
        Self { rustc, libraries }
    }

    /// Debian's, unpacked under `root`.
    fn unpacked(root: &Path) -> Self {
        let folders = ["usr/lib", "lib"].into_iter().filter_map(|folder| fs::read_dir(root.join(folder)).ok());
        let folders = folders.flatten().flatten().map(|entry| entry.path());
        let libraries = folders.filter(|path| path.to_string_lossy().ends_with("-linux-gnu")).collect();
        Self::new(root.join("usr/bin/rustc"), libraries)
    }

    fn command(&self) -> Command {
        let mut rustc = command(&self.rustc);
        if let Ok(libraries) = std::env::join_paths(&self.libraries)
            && !libraries.is_empty()
        {
            rustc.env("LD_LIBRARY_PATH", libraries);
        }
        rustc
    }

    fn version(&self) -> Outcome<Version> {
        let text = output(self.command().arg("-vV"))?;
        Version::parse(&text).ok_or_else(|| format!("{} -vV printed no version", self.rustc.display()))
    }

    fn sysroot(&self) -> Outcome<PathBuf> {
        Ok(output(self.command().args(["--print", "sysroot"]))?.trim().into())
    }

    /// This compiler with the sources of its own library beside it, if they are there.
    fn with_sources(self, linker: &Path) -> Option<Toolchain> {
        if self.rustc.is_absolute() && !self.rustc.is_file() {
            return None;
        }
        let version = self.version().ok().filter(|version| version.is_new_enough())?;
        let sources = self.sysroot().ok()?.join("lib/rustlib/src/rust");
        if !sources.join("library/core/src/lib.rs").is_file() || !fits(&sources, &version.release) {
            return None;
        }
        let whose = if self.libraries.is_empty() { "installed" } else { "unpacked under target/" };
        Some(Toolchain {
            name: format!("rustc {} ({whose}), library built from its sources", version.release),
            better: BETTER,
            rustc: self.rustc.is_absolute().then_some(self.rustc),
            libraries: self.libraries,
            build_std: true,
            linker: linker.to_owned(),
        })
    }
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
        Some(Self { release: field("release:")?, host: field("host:")? })
    }

    fn is_new_enough(&self) -> bool {
        minor(&self.release).is_some_and(|release| release >= OLDEST)
    }
}

fn minor(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Debian's sources lie in a folder named after their version; rustup's come with their compiler.
fn fits(sources: &Path, release: &str) -> bool {
    let real = sources.canonicalize().unwrap_or_default();
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name == "rust" || name == format!("rustc-{release}")
}

fn has_library(sysroot: &Path) -> bool {
    let folder = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.into_iter().any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
}

/// Writes the script that links a core module and encodes it as a component, with the tools of the user's own toolchain.
fn linker(tree: &Tree, sysroot: &Path, host: &str) -> Outcome<PathBuf> {
    let tools = sysroot.join("lib/rustlib").join(host).join("bin");
    let (encode, link) = (tools.join("wasm-component-ld"), tools.join("gcc-ld/wasm-ld"));
    if let Some(missing) = [&encode, &link].into_iter().find(|tool| !tool.is_file()) {
        return Err(format!("{} is not there; rustup's toolchain brings it (https://rustup.rs)", missing.display()));
    }
    let script = tree.target("xtask")?.join("wasm-linker");
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let text = format!(
        "#!/bin/sh\n# rustc calls this as wasm-ld: the core module is linked, then encoded as a component.\n\
         if [ \"$1\" = -flavor ]; then shift 2; fi\n\
         exec {} --wasm-ld-path {} \"$@\"\n",
        quoted(&encode),
        quoted(&link)
    );
    replace(&script, text.as_bytes())?;
    let executable = fs::set_permissions(&script, fs::Permissions::from_mode(0o755));
    executable.map_err(|error| format!("{}: {error}", script.display()))?;
    Ok(script)
}

/// Gets Debian's compiler and its sources: installed as root where that removes nothing, else unpacked into a folder.
fn fetch(cache: &Path, root: &Path, yes: bool) -> Outcome {
    if find("apt-get").is_none() || find("dpkg").is_none() {
        return Err(format!("no compiler for {TARGET} here: run `rustup target add {TARGET}`, then this again"));
    }
    eprintln!(
        "no compiler for {TARGET} here; Debian's rustc-web and rust-web-src will do: about 137 MB to fetch, 844 MB on disk \
         (`rustup target add {TARGET}` instead needs neither)"
    );
    agreed("Fetch them?", yes)?;
    if is_root() {
        debian::update(&[])?;
        let plan = debian::simulate(&[], &PACKAGES)?;
        check(&plan)?;
        if plan.removes.is_empty() {
            eprintln!("installing {}: your own rustc stays the first in PATH", PACKAGES.join(" and "));
            return debian::install(&PACKAGES);
        }
    }
    eprintln!("unpacking {} under target/wasm-toolchain: nothing is installed", PACKAGES.join(" and "));
    let options = debian::private(&cache.join("apt"))?;
    debian::update(&options)?;
    let plan = debian::simulate(&options, &PACKAGES)?;
    check(&plan)?;
    debian::unpack(&options, &plan, cache, root)?;
    // Lists are of no more use; what stays of them is disk space, no error.
    let _ = fs::remove_dir_all(cache.join("apt"));
    Ok(())
}

fn check(plan: &Plan) -> Outcome {
    let version = plan.version(PACKAGES[0]).unwrap_or("none");
    if minor(version).is_some_and(|version| version >= OLDEST) {
        return Ok(());
    }
    let (major, minor) = OLDEST;
    Err(format!(
        "Debian's rustc-web here is {version}, at least {major}.{minor} is needed: run `rustup target add {TARGET}` instead"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        let text = "rustc 1.96.0 (ac68 2026-05-25)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\n";
        let version = Version::parse(text).unwrap();
        assert_eq!((version.release.as_str(), version.host.as_str()), ("1.96.0", "x86_64-unknown-linux-gnu"));
        assert!(version.is_new_enough());
        let old = Version { release: "1.85.0".into(), host: String::new() };
        assert!(!old.is_new_enough());
        assert_eq!(Version::parse("rustc 1.96.0"), None);
    }

    #[test]
    fn a_plan_with_an_old_compiler_is_refused() {
        let plan = |version: &str| Plan { installs: vec![("rustc-web".into(), version.into())], removes: Vec::new() };
        assert_eq!(check(&plan("1.96.0+dfsg1-1~deb12u2")), Ok(()));
        assert!(check(&plan("1.85.0+dfsg3-1~deb12u3")).unwrap_err().contains("1.85.0"));
        assert!(check(&Plan::default()).unwrap_err().contains("none"));
    }

    #[test]
    fn sources_must_be_of_the_same_version() {
        let folder = std::env::temp_dir().join(format!("xtask-sources-{}", std::process::id()));
        let sources = folder.join("rustc-1.96.0");
        fs::create_dir_all(&sources).unwrap();
        assert!(fits(&sources, "1.96.0"));
        assert!(!fits(&sources, "1.97.0"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
