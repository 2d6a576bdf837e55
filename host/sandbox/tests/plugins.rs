//! The built plugins under the same conformance suite as the native policies. `cargo xtask test` builds them first.

mod support;

use dray_policy::conformance::{Finding, suite_cdq, suite_copy, suite_tracking};
use dray_policy::role::{Cdq, Copy, Tracking};
use dray_sandbox::{Component, Pin, SandboxRole};
use std::path::Path;
use support::{FUEL, pool};

fn built<R: SandboxRole>(name: &str) -> Component<R> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/plugins").join(name);
    assert!(path.exists(), "{} is not built: run `cargo xtask plugins` first", path.display());
    let pin = Pin::find(None, &path).unwrap_or_else(|error| panic!("{error}"));
    // The suite keeps several pairs of instances alive.
    pool(FUEL, 16).load(&path, &pin).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn passes(findings: &[Finding]) {
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn the_default_cdq_policy_conforms() {
    passes(&suite_cdq(&mut built::<Cdq>("cdq-default.wasm").factory()));
}

#[test]
fn the_default_tracking_policy_conforms() {
    passes(&suite_tracking(&mut built::<Tracking>("tracking-default.wasm").factory()));
}

#[test]
fn the_default_copy_policy_conforms() {
    passes(&suite_copy(&mut built::<Copy>("copy-default.wasm").factory()));
}
