//! What no type can say of a configuration: references, identities, sizes, files.

use super::{BackingKind, Config, Namespace, Policy, Role, Subsystem};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use toml::Spanned;

/// The place, what is wrong there, what would be right.
pub(super) struct Problem {
    pub(super) span: Range<usize>,
    pub(super) message: String,
    pub(super) help: String,
}

pub(super) fn problem<T>(place: &Spanned<T>, message: impl Into<String>, help: impl Into<String>) -> Problem {
    Problem { span: place.span(), message: message.into(), help: help.into() }
}

pub(super) fn check(config: &Config) -> Result<(), Problem> {
    let mut names = BTreeSet::new();
    let mut files = BTreeMap::new();
    for subsystem in &config.file.subsystems {
        if !names.insert(subsystem.name.get_ref()) {
            let message = format!("two subsystems are called \"{}\"", subsystem.name.get_ref());
            return Err(problem(&subsystem.name, message, "give each a name of its own"));
        }
        check_identity(subsystem)?;
        check_namespaces(config, subsystem, &mut files)?;
        check_controllers(subsystem)?;
    }
    check_migration(config)?;
    super::export::check(config)?;
    super::image::check(&config.file.image)?;
    for (role, policy) in
        [("cdq", &config.file.policy.cdq), ("tracking", &config.file.policy.tracking), ("copy", &config.file.policy.copy)]
    {
        check_policy(config, role, policy)?;
    }
    Ok(())
}

fn check_identity(subsystem: &Subsystem) -> Result<(), Problem> {
    for (key, text, most) in [("serial", &subsystem.serial, 20), ("model", &subsystem.model, 40)] {
        let value = text.get_ref();
        if value.is_empty() || value.len() > most || !value.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            let help = format!("write 1 to {most} printable ASCII characters (Base specification, Identify Controller)");
            return Err(problem(text, format!("\"{value}\" is no {key} of a controller"), help));
        }
    }
    Ok(())
}

fn check_namespaces(config: &Config, subsystem: &Subsystem, files: &mut BTreeMap<PathBuf, String>) -> Result<(), Problem> {
    let mut nsids = BTreeSet::new();
    for namespace in &subsystem.namespaces {
        let nsid = *namespace.nsid.get_ref();
        if nsid == 0 || nsid > 1024 || !nsids.insert(nsid) {
            let message = format!("NSID {nsid} is used twice or is not between 1 and 1024");
            return Err(problem(&namespace.nsid, message, "give each namespace of a subsystem an NSID of its own"));
        }
        check_format(namespace)?;
        let owner = format!("namespace {nsid} of \"{}\"", subsystem.name.get_ref());
        match (namespace.backing, &namespace.path, &namespace.size) {
            (BackingKind::File, None, _) => {
                return Err(problem(&namespace.nsid, "a file-backed namespace needs its file", "add path = \"…\""));
            }
            (BackingKind::File, Some(path), _) => {
                let whole = config.path(path.get_ref());
                let whole = std::fs::canonicalize(&whole).unwrap_or(whole);
                if namespace.size.is_none() && !whole.is_file() {
                    let message = format!("the file {} is not there", whole.display());
                    return Err(problem(path, message, "name a file that exists, or add size = \"…\" to have it made"));
                }
                if let Some(other) = files.insert(whole, owner) {
                    let message = format!("{} lies over the same bytes as {other}", path.get_ref().display());
                    return Err(problem(path, message, "give each namespace a file of its own"));
                }
            }
            (BackingKind::Memory, Some(path), _) => {
                return Err(problem(path, "a memory-backed namespace has no file", "remove path, or say backing = \"file\""));
            }
            (BackingKind::Memory, None, None) => {
                return Err(problem(&namespace.nsid, "a memory-backed namespace needs a size", "add size = \"1GiB\""));
            }
            (BackingKind::Memory, None, Some(_)) => {}
        }
    }
    Ok(())
}

fn check_format(namespace: &Namespace) -> Result<(), Problem> {
    let block = namespace.block.get_ref().0;
    if !matches!(block, 512 | 4096) {
        let message = format!("a logical block of {block} bytes is not offered");
        return Err(problem(&namespace.block, message, "write \"512B\" or \"4KiB\""));
    }
    if let Some(size) = &namespace.size
        && (size.get_ref().0 == 0 || !size.get_ref().0.is_multiple_of(block))
    {
        let message = format!("{} bytes are not a whole number of blocks of {block} bytes", size.get_ref().0);
        return Err(problem(size, message, "make the size a multiple of the block"));
    }
    parse_nguid(namespace.nguid.get_ref()).map(|_| ()).ok_or_else(|| {
        let message = format!("\"{}\" is no NGUID", namespace.nguid.get_ref());
        problem(&namespace.nguid, message, "write 32 hexadecimal digits that are not all zero")
    })
}

/// The 16 bytes of an NGUID; `None` unless they are 32 hexadecimal digits that are not all zero.
#[must_use]
pub fn parse_nguid(text: &str) -> Option<[u8; 16]> {
    let value = u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32 && !text.starts_with('+'))?;
    (value != 0).then(|| value.to_be_bytes())
}

fn check_controllers(subsystem: &Subsystem) -> Result<(), Problem> {
    let mut ids = BTreeSet::new();
    let mut management = 0;
    for controller in &subsystem.controllers {
        if !ids.insert(*controller.cntlid.get_ref()) {
            let message = format!("CNTLID {} is used twice", controller.cntlid.get_ref());
            return Err(problem(&controller.cntlid, message, "give each controller of a subsystem a CNTLID of its own"));
        }
        management += usize::from(controller.role == Role::Management);
        for nsid in &controller.namespaces {
            let Some(namespace) = subsystem.namespaces.iter().find(|n| n.nsid.get_ref() == nsid.get_ref()) else {
                let known: Vec<_> = subsystem.namespaces.iter().map(|n| n.nsid.get_ref().to_string()).collect();
                let message = format!("there is no namespace {} in \"{}\"", nsid.get_ref(), subsystem.name.get_ref());
                return Err(problem(nsid, message, format!("there are: {}", known.join(", "))));
            };
            let users = subsystem
                .controllers
                .iter()
                .filter(|c| c.role == Role::Migratable && c.namespaces.iter().any(|n| n.get_ref() == nsid.get_ref()))
                .count();
            if users > 1 && !namespace.shared {
                let message = format!("namespace {} is private, but more than one controller names it", nsid.get_ref());
                return Err(problem(nsid, message, "say shared = true at the namespace, or take it from one controller"));
            }
        }
    }
    if management != 1 {
        let message = format!("\"{}\" has {management} controllers with role = \"management\"", subsystem.name.get_ref());
        return Err(problem(&subsystem.name, message, "give it exactly one"));
    }
    Ok(())
}

fn check_migration(config: &Config) -> Result<(), Problem> {
    let migration = &config.file.migration;
    let known: Vec<_> = config.file.subsystems.iter().map(|s| s.name.get_ref().as_str()).collect();
    for end in [&migration.from, &migration.to] {
        if config.subsystem(end.get_ref()).is_none() {
            let message = format!("there is no subsystem \"{}\"", end.get_ref());
            return Err(problem(end, message, format!("there are: {}", known.join(", "))));
        }
    }
    if migration.from.get_ref() == migration.to.get_ref() {
        return Err(problem(&migration.to, "a namespace cannot move to where it is", "name another subsystem"));
    }
    Ok(())
}

fn check_policy(config: &Config, role: &str, policy: &Policy) -> Result<(), Problem> {
    if let Some(sha) = &policy.sha256
        && (sha.get_ref().len() != 64 || !sha.get_ref().bytes().all(|b| b.is_ascii_hexdigit()))
    {
        let message = format!("\"{}\" is no SHA-256", sha.get_ref());
        return Err(problem(sha, message, "write its 64 hexadecimal digits, as `dray plugin inspect FILE` prints them"));
    }
    let path = policy.component.get_ref();
    if path.as_os_str() == "native" || config.path(path).is_file() {
        return Ok(());
    }
    let message = format!("the component of policy.{role} is not there: {}", config.path(path).display());
    Err(problem(&policy.component, message, "build the default ones with `cargo xtask plugins`, or write \"native\""))
}
