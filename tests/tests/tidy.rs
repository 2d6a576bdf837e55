//! What the sources look like: no clock where none may be, unsafe code where it may be, arrows between crates, sizes of files.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Crates whose time, randomness and bytes come from outside.
const PURE: [&str; 7] = ["nvme", "device", "driver", "controller", "policy", "migration", "workload"];

/// What such a crate may not name.
const IMPURE: [&str; 17] = [
    "Instant::now",
    "time::Instant",
    "SystemTime",
    "UNIX_EPOCH",
    "clock_gettime",
    "thread::spawn",
    "thread::Builder",
    "thread::scope",
    "thread::sleep",
    "thread::park",
    "thread_rng",
    "getrandom",
    "Rng::new(",
    "fastrand::shuffle",
    "RandomState",
    "TcpListener::bind",
    "TcpStream::connect",
];

/// Sources that may hold unsafe code: everything in the first, and the second file.
const UNSAFE: [&str; 2] = ["host/device/", "host/sandbox/src/cache.rs"];

/// Most lines of a source file.
const MOST_LINES: usize = 700;

/// Which crates of ours each may use (the design's rooms).
const ARROWS: [(&str, &[&str]); 10] = [
    ("nvme", &[]),
    ("device", &["nvme"]),
    ("driver", &["nvme", "device"]),
    ("controller", &["nvme", "device"]),
    ("export", &["nvme", "device", "controller"]),
    ("policy", &["nvme"]),
    ("sandbox", &["nvme", "policy"]),
    ("migration", &["nvme", "device", "driver", "policy"]),
    ("workload", &["nvme", "device", "driver"]),
    ("appliance", &["nvme", "device", "driver", "export", "controller", "policy", "sandbox", "migration", "workload"]),
];

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = here.ancestors().find(|folder| folder.join("wit").is_dir() && folder.join("host").is_dir());
    found.expect("the source tree").to_path_buf()
}

/// A Rust source file.
struct Source {
    /// From the root of the tree, with slashes.
    name: String,
    text: String,
}

impl Source {
    /// Lines outside comments, with their numbers from 1.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(at, line)| (at + 1, line.split("//").next().unwrap_or("")))
    }

    /// Where the tests at the end of the file begin.
    fn tests_begin(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let gates = ["#[cfg(test)]", "#[cfg(all(test, not(loom)))]"];
        let module = |at: &usize| gates.contains(&lines[*at].trim()) && lines.get(at + 1).is_some_and(|line| line.ends_with('{'));
        (0..lines.len()).find(module).map_or(usize::MAX, |at| at + 1)
    }

    fn is_test(&self) -> bool {
        let name = &self.name;
        name.contains("/tests/") || name.contains("/benches/") || name.ends_with("/tests.rs") || name.ends_with("_tests.rs")
    }
}

fn walk(folder: &Path, root: &Path, into: &mut Vec<Source>) {
    let mut entries: Vec<_> = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            walk(&path, root, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
            into.push(Source { name, text: fs::read_to_string(&path).expect("a source file") });
        }
    }
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    folders.iter().for_each(|folder| walk(&root.join(folder), &root, &mut found));
    assert!(found.len() > folders.len(), "no sources");
    found
}

/// Modules that exist in tests alone: `#[cfg(test)] mod name;`.
fn test_modules(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
        for pair in lines.windows(2) {
            let name = pair[1].strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
            if let (Some(name), "#[cfg(test)]") = (name, pair[0]) {
                let folder = source.name.rsplit_once('/').map_or("", |(folder, _)| folder);
                found.push(format!("{folder}/{name}."));
                found.push(format!("{folder}/{name}/"));
            }
        }
    }
    found
}

#[track_caller]
fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn no_clock_no_thread_no_chance_and_no_socket_inside() {
    let folders = PURE.map(|name| format!("host/{name}/src"));
    let sources = sources(&folders.each_ref().map(String::as_str));
    let tests = test_modules(&sources);
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| !source.is_test()) {
        if tests.iter().any(|module| source.name.starts_with(module.as_str())) {
            continue;
        }
        let end = source.tests_begin();
        for (at, line) in source.code().take_while(|(at, _)| *at < end) {
            let free = ["u8(", "u16(", "u32(", "u64(", "usize(", "bool(", "choice(", "fill("];
            let drawn = line.split("fastrand::").skip(1).any(|rest| free.iter().any(|call| rest.starts_with(call)));
            if drawn || IMPURE.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{at}: {}", source.name, line.trim()));
            }
        }
    }
    assert_none("time comes in as an argument, chance as a seed, byte streams as a trait", &found);
}

/// Whether a line of code has the keyword.
fn is_unsafe(line: &str) -> bool {
    let keyword = concat!("un", "safe");
    // A value of the configuration (`iommu`), which is no code.
    let line = line.replace(concat!("un", "safe-none"), "");
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == keyword)
}

#[test]
fn unsafe_code_is_where_it_may_be_and_says_why() {
    let (mut misplaced, mut silent) = (Vec::new(), Vec::new());
    let mut blocks = 0;
    for source in sources(&["host", "tests", "xtask"]) {
        let allowed = UNSAFE.iter().any(|place| source.name.starts_with(place));
        let lines: Vec<&str> = source.text.lines().collect();
        for (at, line) in source.code().filter(|(_, line)| is_unsafe(line)) {
            let place = format!("{}:{at}: {}", source.name, line.trim());
            if !allowed {
                misplaced.push(place);
                continue;
            }
            // A function's contract is in its documentation; blocks and implementations say why they keep one.
            let keyword = concat!("un", "safe");
            if line.contains(&format!("{keyword} fn")) {
                continue;
            }
            blocks += 1;
            let before = &lines[at.saturating_sub(9)..at];
            if !before.iter().any(|line| line.contains("SAFETY:")) {
                silent.push(place);
            }
        }
    }
    assert_none("it belongs into host/device", &misplaced);
    assert_none("no SAFETY line near", &silent);
    assert!(blocks > 10, "{blocks} blocks were looked at");
}

#[test]
fn crates_use_what_the_design_says() {
    let root = root();
    let members: Vec<String> = fs::read_dir(root.join("host"))
        .expect("host")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| root.join("host").join(name).join("Cargo.toml").is_file())
        .collect();
    let arrows = BTreeMap::from(ARROWS);
    for name in &members {
        let text = fs::read_to_string(root.join("host").join(name).join("Cargo.toml")).expect("a manifest");
        let manifest: toml::Table = text.parse().expect("TOML");
        let allowed = arrows.get(name.as_str()).unwrap_or_else(|| panic!("host/{name} is no room of the design"));
        let package = manifest["package"]["name"].as_str().expect("a name");
        assert_eq!(package, if name == "appliance" { "dray".into() } else { format!("dray-{name}") });
        for section in ["dependencies", "build-dependencies"] {
            let used = manifest.get(section).and_then(toml::Value::as_table).into_iter().flat_map(|table| table.keys());
            for used in used.filter_map(|used| used.strip_prefix("dray-").or((used == "dray").then_some("appliance"))) {
                assert!(allowed.contains(&used), "host/{name} uses host/{used}");
            }
        }
    }
    let xtask = fs::read_to_string(root.join("xtask/Cargo.toml")).expect("a manifest");
    assert!(!xtask.contains("dray"), "xtask uses no crate of ours");
}

#[test]
fn files_are_short_enough_to_hold_in_the_head() {
    let long: Vec<_> = sources(&["host", "tests", "xtask", "plugins"])
        .iter()
        .map(|source| (source.text.lines().count(), &source.name))
        .filter(|(lines, _)| *lines > MOST_LINES)
        .map(|(lines, name)| format!("{name}: {lines} lines"))
        .collect();
    assert_none("split along roles", &long);
}

#[test]
fn all_speak_the_published_interface() {
    let wit = fs::read_to_string(root().join("wit/0.1/policy.wit")).expect("the interface");
    assert!(wit.starts_with("package dray:policy@0.1.0;"), "wit/0.1 is 0.1.0");
    let mut users = 0;
    let mut others = Vec::new();
    for source in sources(&["host/sandbox/src", "plugins"]).iter().filter(|source| !source.is_test()) {
        let end = source.tests_begin();
        for (at, line) in source.text.lines().enumerate().take_while(|(at, _)| at + 1 < end) {
            for rest in line.split("wit/").skip(1).filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
                users += 1;
                if !rest.starts_with("0.1") || rest[3..].starts_with(|c: char| c.is_ascii_digit()) {
                    others.push(format!("{}:{}: {}", source.name, at + 1, line.trim()));
                }
            }
            for rest in line.split("dray:policy@").skip(1).filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
                if !rest.starts_with("0.1.0") {
                    others.push(format!("{}:{}: {}", source.name, at + 1, line.trim()));
                }
            }
        }
    }
    assert_none("another version of the interface", &others);
    assert!(users >= 2, "host and plugins name the folder that they are built from");
}

#[test]
fn the_readme_names_every_room() {
    let root = root();
    let readme = fs::read_to_string(root.join("README.md")).expect("README.md");
    for (name, _) in ARROWS {
        let package = if name == "appliance" { "`dray`".into() } else { format!("`dray-{name}`") };
        assert!(readme.contains(&format!("`host/{name}`")) && readme.contains(&package), "README.md: host/{name}, {package}");
    }
    for folder in ["plugins/", "wit/", "tests/", "xtask/", "appliance.toml"] {
        assert!(root.join(folder).exists() && readme.contains(folder), "README.md: {folder}");
    }
    let first = readme.find("cargo xtask demo").zip(readme.find("cargo xtask test")).expect("the two commands");
    assert!(first.0 < 600 && first.1 < 600, "the two commands come first");
}
