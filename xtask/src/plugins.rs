//! Builds the policies into `target/plugins`, with a lock file that pins their contents.

use crate::process::{cargo, run as execute, took};
use crate::toolchain::{TARGET, Toolchain};
use crate::tree::{Tree, digest, digest_of, read_text, replace};
use crate::{Outcome, refuse_rest, take_flag};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub const HELP: &str = "\
Builds the Wasm policies of plugins/ into target/plugins/NAME.wasm, and target/plugins/plugins.lock,
which pins them by SHA-256. Does nothing if plugins/ and wit/ did not change.

The compiler is the first of these that is there: an installed rustup target
wasm32-unknown-unknown; a rustc with the sources of its library beside it; Debian's rustc-web with
rust-web-src, which is fetched (137 MB, 844 MB on disk). rustup is never called.

Usage: cargo xtask plugins [OPTIONS]

Options:
  --force  build even if nothing changed
  --yes    fetch a compiler without asking
  --help   this text

Example: cargo xtask plugins && target/release/dray plugin inspect target/plugins/copy-default.wasm
";

/// What is loaded, by SHA-256; lies beside the components.
pub const LOCK: &str = "plugins.lock";
/// Raised when the way of building changes, so that what an older xtask built is built again.
const RECIPE: u32 = 1;
/// How a component begins, where a core module has 01 00 00 00 at byte 4.
const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

pub fn run(tree: &Tree, mut args: Vec<String>) -> Outcome {
    let (force, yes) = (take_flag(&mut args, "--force"), take_flag(&mut args, "--yes"));
    refuse_rest(&args)?;
    if force {
        let lock = tree.target("plugins")?.join(LOCK);
        if lock.exists() {
            fs::remove_file(&lock).map_err(|error| format!("{}: {error}", lock.display()))?;
        }
    }
    build(tree, yes)
}

/// Builds the policies if something changed; says in one line what was done.
pub fn build(tree: &Tree, yes: bool) -> Outcome {
    let started = Instant::now();
    let folder = tree.target("plugins")?;
    let sources = digest_of(&[tree.root.join("plugins"), tree.root.join("wit")])?;
    if let Some(toolchain) = up_to_date(&folder, &sources) {
        eprintln!("plugins: unchanged (built by {toolchain})");
        return Ok(());
    }
    let toolchain = Toolchain::find(tree, yes)?;
    eprintln!("plugins: building with {}{}", toolchain.name, note(toolchain.better));
    let built = tree.target("plugins-build")?;
    let mut command = cargo(tree, &["build", "--release", "--workspace", "--lib"]);
    command.current_dir(tree.root.join("plugins")).env("CARGO_TARGET_DIR", &built);
    toolchain.apply(&mut command);
    execute(&mut command)?;
    let components = collect(tree, &built.join(TARGET).join("release"))?;
    if components.is_empty() {
        return Err("no crate under plugins/ is a cdylib".into());
    }
    let mut pinned = Vec::new();
    for (name, bytes) in &components {
        replace(&folder.join(name), bytes)?;
        pinned.push((name.as_str(), digest(bytes)));
    }
    // The digest from before the build: what changed meanwhile is built the next time.
    replace(&folder.join(LOCK), lock(&toolchain.name, &sources, &pinned).as_bytes())?;
    eprintln!("plugins: {} components in {}, {}", components.len(), folder.display(), took(started.elapsed()));
    Ok(())
}

fn note(better: &str) -> String {
    if better.is_empty() { String::new() } else { format!("; {better}") }
}

/// File name and bytes of every component; a policy is a crate whose library is a cdylib.
fn collect(tree: &Tree, built: &Path) -> Outcome<Vec<(String, Vec<u8>)>> {
    let mut components = Vec::new();
    for member in tree.members("plugins")? {
        if !read_text(&member.join("Cargo.toml"))?.contains("cdylib") {
            continue;
        }
        let name = member.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path: PathBuf = built.join(format!("{}.wasm", name.replace('-', "_")));
        let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if !bytes.starts_with(COMPONENT) {
            return Err(format!("{} is a core module, not a component: does the crate call `policy!`?", path.display()));
        }
        components.push((format!("{name}.wasm"), bytes));
    }
    Ok(components)
}

fn lock(toolchain: &str, sources: &str, components: &[(&str, String)]) -> String {
    let mut text = format!(
        "# Written by `cargo xtask plugins`: a component beside this file is loaded only if its SHA-256 is the one below.\n\
         toolchain = \"{toolchain}\"\nsources = \"{sources}\"\nrecipe = {RECIPE}\n"
    );
    for (name, sha256) in components {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n[component.\"{name}\"]\nsha256 = \"{sha256}\"\n");
    }
    text
}

/// The toolchain that built what lies in `folder`, if that is what the sources would give.
fn up_to_date(folder: &Path, sources: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(LOCK)).ok()?;
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "));
    let (toolchain, recipe) = (value("toolchain")?, value("recipe")?);
    if value("sources")?.trim_matches('"') != sources || recipe != RECIPE.to_string() {
        return None;
    }
    let mut name = None;
    let mut components = 0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("[component.\"") {
            name = rest.strip_suffix("\"]");
        } else if let Some(rest) = line.strip_prefix("sha256 = ") {
            let bytes = fs::read(folder.join(name?)).ok()?;
            if digest(&bytes) != rest.trim_matches('"') {
                return None;
            }
            components += 1;
        }
    }
    (components > 0).then(|| toolchain.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_plugins_are_kept_only_while_sources_and_contents_are_the_same() {
        let folder = std::env::temp_dir().join(format!("xtask-plugins-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (one, two) = (b"one".as_slice(), b"two".as_slice());
        fs::write(folder.join("one.wasm"), one).unwrap();
        fs::write(folder.join("two.wasm"), two).unwrap();
        let text = lock("rustc 1", "abc", &[("one.wasm", digest(one)), ("two.wasm", digest(two))]);
        assert_eq!(up_to_date(&folder, "abc"), None, "no lock file yet");
        fs::write(folder.join(LOCK), &text).unwrap();
        assert_eq!(up_to_date(&folder, "abc").as_deref(), Some("rustc 1"));
        assert_eq!(up_to_date(&folder, "abd"), None, "other sources");
        fs::write(folder.join(LOCK), text.replace("recipe = 1", "recipe = 0")).unwrap();
        assert_eq!(up_to_date(&folder, "abc"), None, "another recipe");
        fs::write(folder.join(LOCK), &text).unwrap();
        fs::write(folder.join("two.wasm"), "2").unwrap();
        assert_eq!(up_to_date(&folder, "abc"), None, "a component was changed");
        fs::remove_file(folder.join("two.wasm")).unwrap();
        assert_eq!(up_to_date(&folder, "abc"), None, "a component is gone");
        fs::remove_dir_all(&folder).unwrap();
    }
}
