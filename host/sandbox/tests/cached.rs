//! Compiled code on disk: used when it is ours and whole, compiled again when it is not.

mod support;

use dray_policy::role::Cdq;
use dray_sandbox::cache::{Cache, CacheError};
use dray_sandbox::{CodeOrigin, Component, Cpu, Limits, Pin, Sandbox, SandboxConfig, compile_ahead};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use support::{FUEL, HONEST, TIME, ask, cdq, folder, opening};

use dray_policy::seam::Factory;

fn with_cache(folder: &Path, budget: dray_sandbox::Budget) -> Sandbox {
    let limits = Limits { instances: 2, ..Limits::default() };
    Sandbox::new(&SandboxConfig { budget, limits, cache: Some(folder.to_owned()), compiled: None }).unwrap()
}

fn load(folder: &Path) -> Component<Cdq> {
    let component = with_cache(folder, FUEL).load_bytes::<Cdq>("a.wasm", &cdq(HONEST, ""), &Pin::Unpinned).unwrap();
    let mut policy = component.factory().open(&opening(), None).unwrap();
    assert_eq!(ask(&mut *policy, 7).unwrap().consumed, 7);
    component
}

/// The one file with this ending.
fn entry(folder: &Path, ending: &str) -> PathBuf {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|has| has == ending)).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn code_is_compiled_once() {
    let folder = folder("once");
    assert!(!load(&folder).from_cache());
    assert!(load(&folder).from_cache());
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "no left-overs");
}

#[test]
fn another_engine_or_component_is_another_entry() {
    let folder = folder("keys");
    load(&folder);
    let other = with_cache(&folder, TIME).load_bytes::<Cdq>("a.wasm", &cdq(HONEST, ""), &Pin::Unpinned).unwrap();
    assert!(!other.from_cache(), "code for epochs is not code for fuel");
    let other = with_cache(&folder, FUEL).load_bytes::<Cdq>("a.wasm", &cdq(HONEST, "(func)"), &Pin::Unpinned).unwrap();
    assert!(!other.from_cache());
    assert!(load(&folder).from_cache());
}

#[test]
fn a_tampered_or_truncated_file_is_compiled_again() {
    let folder = folder("tampered");
    load(&folder);
    let code = entry(&folder, "cwasm");
    let whole = fs::read(&code).unwrap();
    let mut tampered = whole.clone();
    let middle = tampered.len() / 2;
    tampered[middle] ^= 1;
    for damaged in [&tampered[..], &whole[..whole.len() - 1], &whole[..whole.len() / 2], b""] {
        fs::write(&code, damaged).unwrap();
        assert!(!load(&folder).from_cache(), "{} bytes", damaged.len());
        assert_eq!(fs::read(&code).unwrap().len(), whole.len(), "put right");
        assert!(load(&folder).from_cache());
    }
    fs::write(entry(&folder, "json"), b"{").unwrap();
    assert!(!load(&folder).from_cache());
    fs::remove_file(entry(&folder, "json")).unwrap();
    assert!(!load(&folder).from_cache());
    fs::remove_file(&code).unwrap();
    assert!(!load(&folder).from_cache());
    assert!(load(&folder).from_cache());
}

#[test]
fn a_file_that_others_can_write_is_compiled_again() {
    let folder = folder("file-mode");
    load(&folder);
    for ending in ["cwasm", "json"] {
        for bits in [0o620, 0o602, 0o666] {
            mode(&entry(&folder, ending), bits);
            assert!(!load(&folder).from_cache(), "{ending} {bits:o}");
            assert!(load(&folder).from_cache());
        }
    }
}

#[test]
fn a_linked_file_is_compiled_again() {
    let folder = folder("linked");
    load(&folder);
    let code = entry(&folder, "cwasm");
    let elsewhere = support::folder("linked-elsewhere");
    fs::rename(&code, &elsewhere).unwrap();
    symlink(&elsewhere, &code).unwrap();
    assert!(!load(&folder).from_cache());
    assert!(load(&folder).from_cache());
    fs::remove_file(elsewhere).unwrap();
}

#[test]
fn a_folder_that_others_can_write_is_not_used() {
    let folder = folder("folder-mode");
    load(&folder);
    let sandbox = with_cache(&folder, FUEL);
    for bits in [0o770, 0o707, 0o1777] {
        mode(&folder, bits);
        assert!(matches!(Cache::open(&folder), Err(CacheError::Mode { .. })), "{bits:o}");
        assert!(!load(&folder).from_cache(), "{bits:o}");
        // Opened to others only after the start.
        let late = sandbox.load_bytes::<Cdq>("a.wasm", &cdq(HONEST, ""), &Pin::Unpinned).unwrap();
        assert!(!late.from_cache(), "{bits:o}");
    }
    mode(&folder, 0o700);
    assert!(load(&folder).from_cache());
}

#[test]
fn a_folder_that_is_a_link_or_a_file_is_not_used() {
    let folder = folder("real");
    load(&folder);
    let link = support::folder("link");
    let _ = fs::remove_file(&link);
    symlink(&folder, &link).unwrap();
    assert!(Cache::open(&link).is_err());
    assert!(!load(&link).from_cache());
    fs::remove_file(&link).unwrap();
    fs::write(&link, b"").unwrap();
    assert!(Cache::open(&link).is_err());
    fs::remove_file(&link).unwrap();
}

#[test]
fn what_belongs_to_another_user_is_not_used() {
    let folder = folder("owner");
    load(&folder);
    // Only root can give files away; as another user the unit test of the rule stands alone.
    let given = std::os::unix::fs::chown(entry(&folder, "cwasm"), Some(65534), None).is_ok();
    if given {
        assert!(!load(&folder).from_cache());
        assert!(load(&folder).from_cache());
        std::os::unix::fs::chown(&folder, Some(65534), None).unwrap();
        assert!(matches!(Cache::open(&folder), Err(CacheError::Owner { found: 65534, .. })));
        assert!(!load(&folder).from_cache());
        std::os::unix::fs::chown(&folder, Some(0), None).unwrap();
    }
}

/// A sandbox with a folder of code that was compiled ahead of time, and a cache beside it.
fn with_compiled(folder: &Path, cache: &Path) -> Sandbox {
    let limits = Limits { instances: 2, ..Limits::default() };
    let (cache, compiled) = (Some(cache.to_owned()), Some(folder.to_owned()));
    Sandbox::new(&SandboxConfig { budget: TIME, limits, cache, compiled }).unwrap()
}

/// Where the component's code came from; it must work.
fn origin(folder: &Path, cache: &Path) -> CodeOrigin {
    let component = with_compiled(folder, cache).load_bytes::<Cdq>("a.wasm", &cdq(HONEST, ""), &Pin::Unpinned).unwrap();
    let mut policy = component.factory().open(&opening(), None).unwrap();
    assert_eq!(ask(&mut *policy, 7).unwrap().consumed, 7);
    component.origin()
}

fn compile(budget: dray_sandbox::Budget, cpu: Cpu, folder: &Path) -> PathBuf {
    // Other limits of memory and instances than it runs with: they are no part of the code.
    let limits = Limits { instances: 1, memory_bytes: 1 << 20, ..Limits::default() };
    let config = SandboxConfig { budget, limits, cache: None, compiled: None };
    compile_ahead(&config, cpu, &cdq(HONEST, ""), folder).unwrap()
}

#[test]
fn code_that_was_compiled_ahead_is_not_compiled_again() {
    for cpu in [Cpu::V1, Cpu::V2] {
        let (ahead, cache) = (folder(&format!("ahead-{}", cpu.name())), folder(&format!("ahead-cache-{}", cpu.name())));
        let code = compile(TIME, cpu, &ahead);
        assert!(code.to_string_lossy().ends_with(&format!("-{}.cwasm", cpu.name())), "{}", code.display());
        assert_eq!(origin(&ahead, &cache), CodeOrigin::Ahead);
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0, "nothing was compiled");
        assert_eq!(compile(TIME, cpu, &ahead), code);
        assert_eq!(fs::read_dir(&ahead).unwrap().count(), 2, "no left-overs");
    }
}

#[test]
fn code_that_was_compiled_ahead_and_changed_is_not_used() {
    let (ahead, cache) = (folder("ahead-tampered"), folder("ahead-tampered-cache"));
    let code = compile(TIME, Cpu::V2, &ahead);
    let whole = fs::read(&code).unwrap();
    let mut tampered = whole.clone();
    let middle = tampered.len() / 2;
    tampered[middle] ^= 1;
    fs::write(&code, &tampered).unwrap();
    assert_eq!(origin(&ahead, &cache), CodeOrigin::Compiled);
    assert_eq!(origin(&ahead, &cache), CodeOrigin::Cache);
    assert_eq!(fs::read(&code).unwrap(), tampered, "the folder is only read");
    fs::write(&code, &whole).unwrap();
    for path in [&code, &ahead] {
        let before = fs::metadata(path).unwrap().permissions().mode();
        mode(path, before | 0o020);
        assert_eq!(origin(&ahead, &cache), CodeOrigin::Cache, "others can write {}", path.display());
        mode(path, before);
        assert_eq!(origin(&ahead, &cache), CodeOrigin::Ahead);
    }
    fs::remove_file(code.with_extension("json")).unwrap();
    assert_eq!(origin(&ahead, &cache), CodeOrigin::Cache);
    assert_eq!(origin(&ahead.join("none"), &cache), CodeOrigin::Cache, "a folder that is not there");
    assert!(!ahead.join("none").exists());
}

#[test]
fn code_for_other_settings_is_compiled_anew() {
    let (ahead, cache) = (folder("ahead-fuel"), folder("ahead-fuel-cache"));
    compile(FUEL, Cpu::V2, &ahead);
    assert_eq!(origin(&ahead, &cache), CodeOrigin::Compiled, "code for fuel is not code for epochs");
}
