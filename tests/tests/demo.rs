//! The main job from outside: the demo on a small image, its JSON, Ctrl-C in the middle, input that cannot be.
#![allow(missing_docs)]

use dray_tests::dray_in_guest::binary;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The repository's configuration, with its files in a folder that goes away with the test.
struct Place {
    folder: PathBuf,
    config: PathBuf,
}

impl Place {
    fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
        let plugins = root.join("target/plugins");
        assert!(plugins.join("plugins.lock").is_file(), "no components: run `cargo xtask plugins`");
        let folder = std::env::temp_dir().join(format!("dray-demo-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let text = std::fs::read_to_string(root.join("appliance.toml")).expect("appliance.toml");
        let text = text.replace("target/plugins", plugins.to_str().expect("UTF-8")).replace("target/dray/", "");
        // A machine that is busy with other tests may take longer over a disk than the demo's budget allows.
        let text = text.replace("downtime = \"10ms\"", "downtime = \"500ms\"");
        let config = folder.join("appliance.toml");
        std::fs::write(&config, text).expect("a file");
        Self { folder, config }
    }

    fn demo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.arg("demo").arg("--config").arg(&self.config).args(args).current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.demo(args).output().expect("dray runs")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.folder);
    }
}

fn summary(output: &[u8]) -> Value {
    let text = String::from_utf8(output.to_vec()).expect("UTF-8");
    serde_json::from_str(text.lines().last().expect("a last line")).expect("one JSON object on the last line")
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {value}"))
}

#[test]
fn a_namespace_moves_under_its_guest_and_the_summary_says_so() {
    let place = Place::new("moves");
    let output = place.run(&["--size", "128MiB", "--settle", "500", "--rate", "3000", "--json"]);
    let said = String::from_utf8_lossy(&output.stderr);
    let summary = summary(&output.stdout);
    assert!(output.status.success(), "{said}\n{summary}");
    assert_eq!((summary["verdict"].as_str(), summary["fsck"].as_str()), (Some("ok"), Some("clean")));
    assert_eq!(number(&summary, "/blocks_compared"), (128 << 20) / 4096);
    assert_eq!(number(&summary, "/blocks_different") + number(&summary, "/writes_missing"), 0);
    assert!(number(&summary, "/writes_acknowledged") > 1000);
    assert!(number(&summary, "/blocks_written_after") > 0, "the guest went on at the destination");
    let first = &summary["rounds"][0];
    assert_eq!(number(first, "/bytes"), 128 << 20, "the full round covers everything");
    assert!(number(first, "/zero_bytes") > 0 && number(first, "/duration_us") > 0);
    assert!(number(&summary, "/downtime_us") > 0);
    let parts: u64 = summary["downtime_parts"].as_array().expect("parts").iter().map(|part| number(part, "/us")).sum();
    assert!(parts.abs_diff(number(&summary, "/downtime_us")) <= 100, "the parts make the whole: {summary}");
    for phase in ["before", "during", "after"] {
        assert!(number(&summary, &format!("/guest/{phase}/p50_us")) > 0 && number(&summary, &format!("/guest/{phase}/iops")) > 0);
    }
    for role in ["cdq", "tracking", "copy"] {
        let policy = &summary["policy"][role];
        assert_eq!(policy["component"], format!("{role}-default.wasm"));
        assert_eq!(policy["sha256"].as_str().map(str::len), Some(64));
        assert!(number(policy, "/calls") > 0);
        assert_eq!(number(policy, "/faults") + number(policy, "/fallbacks") + number(policy, "/omissions"), 0, "{role}");
    }
    assert!(summary["policy"]["cdq"]["ns_per_entry"].is_number() && summary["policy"]["copy"]["us_per_call"].is_number());
}

#[test]
fn ctrl_c_cancels_and_the_source_keeps_its_data() {
    let place = Place::new("cancel");
    let mut child = place
        .demo(&["--size", "128MiB", "--settle", "300", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("dray runs");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let pid = rustix::process::Pid::from_child(&child);
    let begun = lines.by_ref().map_while(Result::ok).any(|line| line.starts_with("migration "));
    assert!(begun, "the migration never began");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("signal");
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    let mut output = Vec::new();
    child.stdout.take().expect("a pipe").read_to_end(&mut output).expect("output");
    let status = child.wait().expect("exit");
    let summary = summary(&output);
    let outcome = summary["outcome"].as_str().expect("an outcome");
    // The signal may come after the point of no return; then the move is whole.
    if outcome == "done" {
        assert!(status.success(), "{rest:?}");
    } else {
        assert_eq!((status.code(), outcome), (Some(1), "undone: it was cancelled"), "{rest:?}");
        assert_eq!((summary["fsck"].as_str(), number(&summary, "/writes_missing")), (Some("clean"), 0));
        assert!(number(&summary, "/writes_acknowledged") > 0);
    }
}

#[test]
fn what_cannot_be_moved_is_refused_before_anything_is_touched() {
    let place = Place::new("refused");
    let odd = place.folder.join("odd.img");
    std::fs::write(&odd, vec![0u8; 4096 * 3 + 17]).expect("a file");
    let text = place.folder.join("not.wasm");
    std::fs::write(&text, "this is no component").expect("a file");
    for (args, words) in [
        (["--image", odd.to_str().expect("UTF-8")], "whole number of blocks"),
        (["--image", "none.img"], "none.img"),
        (["--copy", text.to_str().expect("UTF-8")], "policy.copy"),
        (["--size", "1Gb"], "GiB"),
    ] {
        let output = place.run(&args);
        let said = String::from_utf8_lossy(&output.stderr).replace(['│', '\n'], " ");
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(!output.status.success(), "{args:?}");
        assert!(said.contains(words) && !said.contains("panicked"), "{args:?}: {said}");
    }
}
