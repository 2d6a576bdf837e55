//! The binary from outside: every command's help, good and bad configurations, components that are none, devices, the watch.
#![allow(missing_docs)]

use dray_tests::dray_in_guest::binary;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn dray(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().expect("dray runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs a command that must succeed; its standard output.
#[track_caller]
fn good(args: &[&str]) -> String {
    let output = dray(args);
    assert!(output.status.success(), "dray {args:?}: {output:?}");
    text(&output.stdout)
}

/// Runs a command that must fail with a message: what it said.
#[track_caller]
fn bad(args: &[&str]) -> String {
    let output = dray(args);
    let said = text(&output.stderr);
    assert!(!output.status.success(), "dray {args:?} succeeded: {}", text(&output.stdout));
    assert!(output.status.code().is_some(), "dray {args:?} was killed: {output:?}");
    assert!(!said.contains("panicked") && !said.trim().is_empty(), "dray {args:?}: {said}");
    // Boxes wrap lines; words are looked for without them.
    said.split(|c: char| c.is_whitespace() || "│╭╰─├·".contains(c)).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A folder with files that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dray-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("a file");
        path.to_str().expect("UTF-8").into()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

/// Two subsystems in memory and native policies.
fn config() -> String {
    let side = |name: &str| {
        format!(
            "[[subsystem]]\nname = \"{name}\"\nnqn = \"nqn.2026-11.org.example:{name}\"\nserial = \"S-1\"\n\
             [[subsystem.namespace]]\nnsid = 1\nbacking = \"memory\"\nsize = \"8MiB\"\nblock = \"4KiB\"\n\
             nguid = \"000000000000000000000000000000a1\"\n\
             [[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n\
             [[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n"
        )
    };
    let policies: String = ["cdq", "tracking", "copy"].map(|role| format!("[policy.{role}]\ncomponent = \"native\"\n")).concat();
    format!("{}{}[migration]\nfrom = \"source\"\nto = \"destination\"\n{policies}", side("source"), side("destination"))
}

#[test]
fn every_command_says_what_it_does_with_an_example() {
    let help = good(&["--help"]);
    for command in ["run", "status", "migrate", "media-move", "demo", "device", "cdq", "plugin", "history", "config"] {
        assert!(help.contains(command), "{help}");
    }
    for command in [
        &["run"][..],
        &["status"],
        &["migrate"],
        &["media-move"],
        &["demo"],
        &["device", "list"],
        &["device", "identify"],
        &["cdq", "watch"],
        &["plugin", "inspect"],
        &["plugin", "check"],
        &["plugin", "bench"],
        &["history"],
        &["config", "check"],
    ] {
        let help = good(&[command, &["--help"]].concat());
        let example = format!("dray {}", command.join(" "));
        let examples = help.split_once("Example").map_or("", |(_, rest)| rest);
        assert!(examples.contains(&example), "{command:?}: {help}");
    }
    assert!(bad(&["move"]).contains("move"));
    bad(&[]);
}

#[test]
fn a_configuration_is_good_or_its_mistake_is_named() {
    let folder = Folder::new("config");
    let file = folder.file("good.toml", config());
    assert!(good(&["config", "check", &file]).contains("good"));
    let both = config().replace("backing = \"memory\"", "backing = \"file\"\npath = \"one.img\"");
    let mistakes = [
        ("unknown.toml", config().replacen("serial", "serail", 1), &["serail", "4", "serial"][..]),
        ("table.toml", config() + "[polcy]\n", &["polcy"]),
        ("unit.toml", config().replacen("8MiB", "8Mb", 1), &["8Mb", "8", "MiB"]),
        ("bare.toml", config().replacen("\"8MiB\"", "8", 1), &["8", "quotes"]),
        ("blocks.toml", config().replacen("8MiB", "9000B", 1), &["whole", "block"]),
        ("overlap.toml", both, &["same bytes"]),
        ("wasm.toml", config().replacen("\"native\"", "\"no/such.wasm\"", 1), &["no/such.wasm"]),
        ("from.toml", config().replacen("from = \"source\"", "from = \"moon\"", 1), &["moon", "source"]),
        ("syntax.toml", config() + "[[\n", &["syntax.toml"]),
        ("binary.toml", "\u{0}\u{1}".into(), &["binary.toml"]),
        ("empty.toml", String::new(), &["empty.toml"]),
    ];
    for (name, text, words) in mistakes {
        let said = bad(&["config", "check", &folder.file(name, text)]);
        for word in words {
            assert!(said.contains(word), "{name}: no \"{word}\" in: {said}");
        }
        assert!(said.contains(name), "{name}: the file is named: {said}");
    }
    assert!(bad(&["config", "check", "no/such/file.toml"]).contains("no/such/file.toml"));
    let missing = config().replacen("backing = \"memory\"\nsize = \"8MiB\"", "backing = \"file\"\npath = \"gone.img\"", 1);
    assert!(bad(&["config", "check", &folder.file("missing.toml", missing)]).contains("gone.img"));
}

#[test]
fn what_is_no_policy_component_is_refused() {
    let folder = Folder::new("plugin");
    let module = b"\0asm\x01\0\0\0";
    let component = b"\0asm\x0d\0\x01\0";
    let mut huge = component.to_vec();
    // A section that says that it goes on for 4 GiB.
    huge.extend_from_slice(&[1, 0xff, 0xff, 0xff, 0xff, 0x0f]);
    let garbage: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 251) as u8).collect();
    for (name, bytes) in [("garbage", &garbage[..]), ("module", module), ("huge", &huge), ("empty", b""), ("text", b"(component)")] {
        let file = folder.file(name, bytes);
        for command in ["inspect", "check", "bench"] {
            let said = bad(&["plugin", command, &file]);
            assert!(said.contains(name), "{command} {name}: {said}");
        }
    }
    // A component of no world at all can be looked at, and does not conform.
    let file = folder.file("worldless", component);
    assert!(good(&["plugin", "inspect", &file]).contains("none of"));
    for command in ["check", "bench"] {
        let said = bad(&["plugin", command, &file]);
        assert!(said.contains("cdq, tracking, copy"), "{said}");
    }
    for command in ["inspect", "check", "bench"] {
        assert!(bad(&["plugin", command, "no/such.wasm"]).contains("no/such.wasm"));
    }
}

/// The default policies, where they have been built.
fn plugins() -> Option<PathBuf> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|folder| folder.join("wit").is_dir())?;
    let folder = tree.join("target/plugins");
    folder.join("cdq-default.wasm").is_file().then_some(folder)
}

#[test]
fn the_default_policies_conform_and_half_of_one_does_not() {
    let Some(plugins) = plugins() else {
        eprintln!("SKIPPED: the default policies are not built (cargo xtask plugins)");
        return;
    };
    let folder = Folder::new("defaults");
    for role in ["cdq", "tracking", "copy"] {
        let path = plugins.join(format!("{role}-default.wasm"));
        let file = path.to_str().expect("UTF-8");
        let found: serde_json::Value = serde_json::from_str(&good(&["plugin", "inspect", file, "--json"])).expect("JSON");
        assert_eq!(found["roles"][0]["role"], role);
        assert_eq!(found["sha256"].as_str().map(str::len), Some(64));
        assert!(good(&["plugin", "check", file]).contains("conforms"));
        let whole = std::fs::read(&path).expect("a component");
        let half = folder.file(&format!("half-{role}"), &whole[..whole.len() / 2]);
        bad(&["plugin", "inspect", &half]);
        // Another role's seat refuses it.
        let other = if role == "copy" { "cdq" } else { "copy" };
        let wrong = config().replace(&format!("[policy.{other}]\ncomponent = \"native\""), &format!("[policy.{other}]\ncomponent = \"{file}\""));
        let wrong = folder.file(&format!("wrong-{role}.toml"), wrong);
        let said = bad(&["demo", "--config", &wrong, "--size", "16MiB", "--settle", "1"]);
        assert!(said.contains(role) || said.contains(other), "{said}");
    }
}

#[test]
fn devices_are_listed_for_people_and_for_programs() {
    let folder = Folder::new("device");
    let file = folder.file("appliance.toml", config());
    let list: serde_json::Value = serde_json::from_str(&good(&["device", "list", "--json", "--config", &file])).expect("JSON");
    let devices = list.as_array().or_else(|| list["devices"].as_array()).expect("a list");
    let names: Vec<_> = devices.iter().map(|device| device["device"].as_str().expect("a name")).collect();
    assert_eq!(names, ["source:1", "source:2", "destination:1", "destination:2"]);
    assert_eq!(devices[1]["serial"], "S-1");
    let people = good(&["device", "list", "--config", &file]);
    assert!(names.iter().all(|name| people.contains(name)), "{people}");
    for name in &names {
        let page = good(&["device", "identify", name, "--json", "--config", &file]);
        let page: serde_json::Value = serde_json::from_str(&page).expect("JSON");
        assert!(page.to_string().contains("S-1"));
        assert!(good(&["device", "identify", name, "--config", &file]).contains("S-1"));
    }
    assert!(bad(&["device", "identify", "source:9", "--config", &file]).contains("source:2"), "it says which there are");
    bad(&["device", "list", "--config", "no/such.toml"]);
}

#[test]
fn the_watch_prints_entries_as_they_come() {
    let folder = Folder::new("watch");
    let file = folder.file("appliance.toml", config());
    let out = good(&["cdq", "watch", "--entries", "5", "--json", "--config", &file]);
    let entries: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON a line")).collect();
    assert_eq!(entries.len(), 5, "{out}");
    let people = good(&["cdq", "watch", "--entries", "5", "--config", &file]);
    assert!(people.lines().count() >= 6, "a heading and five entries: {people}");
}
