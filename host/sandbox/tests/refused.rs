//! Files that are not the component that was asked for: each is refused with a message that says what would be right.

mod support;

use dray_policy::role::{Cdq, Copy};
use dray_sandbox::{Digest, LOCK_FILE, LoadError, Pin, inspect};
use std::fs;
use support::{FUEL, HONEST, WIT, cdq, cdq_core, encode, folder, load, sandbox};

fn refused(bytes: &[u8]) -> LoadError {
    load(&sandbox(FUEL), bytes).unwrap_err()
}

#[test]
fn what_is_no_component() {
    let module = wat::parse_str(cdq_core(HONEST, "")).unwrap();
    let error = refused(&module);
    assert!(matches!(error, LoadError::CoreModule), "{error}");
    assert!(error.to_string().contains("wasm-component-ld"), "{error}");
    assert!(matches!(refused(b""), LoadError::NotAComponent(_)));
    assert!(matches!(refused(b"not WebAssembly at all"), LoadError::NotAComponent(_)));
    let whole = cdq(HONEST, "");
    for cut in [9, 40, whole.len() / 2, whole.len() - 1] {
        assert!(matches!(refused(&whole[..cut]), LoadError::NotAComponent(_)), "cut at {cut}");
    }
}

#[test]
fn another_role() {
    let bytes = cdq(HONEST, "");
    let error = sandbox(FUEL).load_bytes::<Copy>("x.wasm", &bytes, &Pin::Unpinned).unwrap_err();
    assert!(matches!(&error, LoadError::WrongRole { expected: "copy", found } if found == "cdq"), "{error}");
}

#[test]
fn no_role_at_all() {
    let error = refused(&wat::parse_str("(component)").unwrap());
    assert!(matches!(&error, LoadError::NoRole { exports, .. } if exports == "nothing"), "{error}");
    let wit = "package other:thing@1.0.0; world w { export run: func(); }";
    let error = refused(&encode(wit, "w", r#"(module (func (export "run")))"#));
    assert!(matches!(&error, LoadError::NoRole { exports, .. } if exports == "run"), "{error}");
}

#[test]
fn another_version() {
    let core = cdq_core(HONEST, "").replace("@0.1.0", "@0.2.0");
    let error = refused(&encode(&WIT.replace("dray:policy@0.1.0", "dray:policy@0.2.0"), "cdq-policy", &core));
    assert!(matches!(&error, LoadError::WrongVersion { found, .. } if found == "dray:policy/cdq@0.2.0"), "{error}");
    assert!(error.to_string().contains("0.1.0"), "{error}");
}

#[test]
fn a_later_patch_of_the_interface_is_the_same() {
    let core = cdq_core(HONEST, "").replace("@0.1.0", "@0.1.7");
    let bytes = encode(&WIT.replace("dray:policy@0.1.0", "dray:policy@0.1.7"), "cdq-policy", &core);
    let mut policy = support::open(&sandbox(FUEL), &bytes);
    assert_eq!(support::ask(&mut *policy, 3).unwrap().consumed, 3);
}

#[test]
fn a_changed_interface_of_the_same_version() {
    let wit = WIT.replace("drain: func(now-us: u64, entries: list<u8>, waiting: u32)", "drain: func(now-us: u32, entries: list<u8>, waiting: u32)");
    assert_ne!(wit, WIT);
    let core = cdq_core(HONEST, "").replace("(param $now i64)", "(param $now i32)");
    let error = refused(&encode(&wit, "cdq-policy", &core));
    assert!(matches!(error, LoadError::Interface(_) | LoadError::Start(_)), "{error}");
    assert!(error.to_string().contains("drain") || error.to_string().contains("u64"), "{error}");
}

#[test]
fn wasi_is_named_with_the_option_that_takes_it_away() {
    let wasi = r#"(component
        (import "wasi:clocks/monotonic-clock@0.2.0" (instance (export "now" (func (result u64)))))
        (component $c) (instance $i (instantiate $c)) (export "dray:policy/cdq@0.1.0" (instance $i)))"#;
    let error = refused(&wat::parse_str(wasi).unwrap());
    let text = error.to_string();
    assert!(matches!(error, LoadError::ForbiddenImport { .. }), "{text}");
    for words in ["wasi:clocks/monotonic-clock@0.2.0", "now", "no_std", "wasm32-unknown-unknown", "--stub-wasi"] {
        assert!(text.contains(words), "{words} is not in: {text}");
    }
    let bare = r#"(component (import "peek" (func (result u64)))
        (component $c) (instance $i (instantiate $c)) (export "dray:policy/cdq@0.1.0" (instance $i)))"#;
    let error = refused(&wat::parse_str(bare).unwrap());
    assert!(matches!(&error, LoadError::ForbiddenImport { import, .. } if import == "peek"), "{error}");
}

#[test]
fn a_host_function_that_this_host_lacks() {
    let wit = WIT.replace("log: func(at: level, text: string);", "log: func(at: level, text: string); peek: func() -> u64;");
    let core = cdq_core(HONEST, "").replacen("(memory", r#"(import "dray:policy/host@0.1.0" "peek" (func (result i64))) (memory"#, 1);
    let error = refused(&encode(&wit, "cdq-policy", &core));
    assert!(error.to_string().contains("peek"), "{error}");
}

#[test]
fn pins() {
    let folder = folder("pins");
    fs::create_dir_all(&folder).unwrap();
    let (bytes, path) = (cdq(HONEST, ""), folder.join("a.wasm"));
    fs::write(&path, &bytes).unwrap();
    let sandbox = sandbox(FUEL);
    assert!(matches!(Pin::find(None, &path), Err(LoadError::NoPin { .. })));
    assert!(matches!(Pin::find(Some("12"), &path), Err(LoadError::BadDigest(_))));
    let lock = |name: &str, digest: Digest| {
        fs::write(folder.join(LOCK_FILE), format!("[component.\"{name}\"]\nsha256 = \"{digest}\"\n")).unwrap();
    };
    lock("b.wasm", Digest::of(&bytes));
    assert!(matches!(Pin::find(None, &path), Err(LoadError::NoPin { .. })));
    lock("a.wasm", Digest::of(&bytes));
    let pin = Pin::find(None, &path).unwrap();
    let component = sandbox.load::<Cdq>(&path, &pin).unwrap();
    assert_eq!(component.identity().component, "a.wasm");
    assert_eq!(component.identity().sha256, Digest::of(&bytes).to_string());
    // A change of a byte, in a place that breaks nothing else.
    let changed = cdq(HONEST, "(func)");
    fs::write(&path, &changed).unwrap();
    let error = sandbox.load::<Cdq>(&path, &pin).unwrap_err();
    assert!(error.to_string().contains(&Digest::of(&bytes).to_string()), "{error}");
    assert!(error.to_string().contains(&Digest::of(&changed).to_string()), "{error}");
    assert!(sandbox.load::<Cdq>(&path, &Pin::Unpinned).is_ok());
    // The configuration's own hash goes before the lock file's.
    let pin = Pin::find(Some(&Digest::of(&changed).to_string()), &path).unwrap();
    assert!(sandbox.load::<Cdq>(&path, &pin).is_ok());
    fs::write(folder.join(LOCK_FILE), "[component").unwrap();
    assert!(matches!(Pin::find(None, &path), Err(LoadError::BadLockFile { .. })));
    assert!(matches!(sandbox.load::<Cdq>(&folder.join("none.wasm"), &pin), Err(LoadError::Unreadable { .. })));
}

#[test]
fn inspection_says_what_it_is() {
    let bytes = cdq(&format!("(call $log (i32.const 1) (i32.const 256) (i32.const 7)) {HONEST}"), "");
    let found = inspect(&bytes).unwrap();
    assert_eq!(found.roles, [("cdq".to_owned(), "0.1.0".to_owned())]);
    assert_eq!(found.exports, ["dray:policy/cdq@0.1.0"]);
    let host = found.imports.iter().find(|import| import.name == "dray:policy/host@0.1.0").unwrap();
    assert_eq!(host.functions, ["log"]);
    assert!(!found.has_state);
    assert_eq!((found.size, found.sha256), (bytes.len() as u64, Digest::of(&bytes)));
}
