//! What a file is, found without compiling it: `dray plugin inspect`, and the checks before a component is compiled.

use crate::{LoadError, pin::Digest};
use wasmparser::component_types::ComponentEntityType;
use wasmparser::{Parser, Payload, Validator, WasmFeatures};

/// The version of `dray:policy` that this host speaks. Any `0.1.x` fits: the interface only grows within 0.1.
pub const POLICY_VERSION: &str = "0.1.0";

/// The interfaces that are roles.
const ROLES: [&str; 3] = ["cdq", "tracking", "copy"];

/// An import of a component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Its name, version included.
    pub name: String,
    /// The functions it needs from there; none if it only uses types.
    pub functions: Vec<String>,
    /// It is an instance of an interface (all that a policy may import); anything else is a bare function, module or type.
    pub instance: bool,
}

/// What a component is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The roles it exports, of any version: (`cdq`, `tracking` or `copy`; version).
    pub roles: Vec<(String, String)>,
    /// What it imports.
    pub imports: Vec<Import>,
    /// The names of what it exports.
    pub exports: Vec<String>,
    /// It hands its state to a successor (`dray:policy/state`).
    pub has_state: bool,
    /// Size of the file in bytes.
    pub size: u64,
    /// SHA-256 of the file.
    pub sha256: Digest,
}

/// Says what `bytes` are.
///
/// # Errors
/// [`LoadError::CoreModule`] or [`LoadError::NotAComponent`].
pub fn inspect(bytes: &[u8]) -> Result<Inspection, LoadError> {
    if Parser::is_core_wasm(bytes) {
        return Err(LoadError::CoreModule);
    }
    if !Parser::is_component(bytes) {
        let why = if bytes.is_empty() { "the file is empty" } else { "it does not begin with a component's header" };
        return Err(LoadError::NotAComponent(why.into()));
    }
    let broken = |error: wasmparser::BinaryReaderError| LoadError::NotAComponent(error.to_string());
    let types = Validator::new_with_features(WasmFeatures::default()).validate_all(bytes).map_err(broken)?;
    let (imports, exports) = outer_names(bytes).map_err(broken)?;
    let imports = imports.into_iter().map(|name| import(&types, name)).collect();
    let roles = exports.iter().filter_map(|name| role_of(name)).collect();
    let has_state = exports.iter().any(|name| policy_interface(name).is_some_and(|(which, _)| which == "state"));
    Ok(Inspection { roles, imports, exports, has_state, size: bytes.len() as u64, sha256: Digest::of(bytes) })
}

/// Names of the imports and exports of the outermost component.
fn outer_names(bytes: &[u8]) -> wasmparser::Result<(Vec<String>, Vec<String>)> {
    let (mut imports, mut exports, mut depth) = (Vec::new(), Vec::new(), 0_u32);
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    imports.push(import?.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    exports.push(export?.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    Ok((imports, exports))
}

fn import(types: &wasmparser::types::Types, name: String) -> Import {
    let Some(item) = types.component_item_for_import(&name) else {
        return Import { name, functions: Vec::new(), instance: false };
    };
    let ComponentEntityType::Instance(id) = item.ty else {
        return Import { name, functions: Vec::new(), instance: false };
    };
    let instance = &types.as_ref()[id];
    let is_function = |ty: &ComponentEntityType| matches!(ty, ComponentEntityType::Func(_));
    let functions = instance.exports.iter().filter(|(_, item)| is_function(&item.ty)).map(|(name, _)| name.clone()).collect();
    Import { name, functions, instance: true }
}

/// `dray:policy/WHICH@VERSION` taken apart.
fn policy_interface(name: &str) -> Option<(&str, &str)> {
    let rest = name.strip_prefix("dray:policy/")?;
    Some(rest.split_once('@').unwrap_or((rest, "no version")))
}

fn role_of(name: &str) -> Option<(String, String)> {
    let (which, version) = policy_interface(name)?;
    ROLES.contains(&which).then(|| (which.to_owned(), version.to_owned()))
}

/// A version of 0.1: the interface of this host, as it is or grown.
fn fits(version: &str) -> bool {
    version.strip_prefix("0.1.").is_some_and(|patch| !patch.is_empty() && patch.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What takes a forbidden import away, by whose it is.
fn remedy(import: &str) -> &'static str {
    if import.starts_with("wasi:") {
        "WASI comes from the language's standard library. Rust: build `#![no_std]` for wasm32-unknown-unknown (not wasm32-wasip2); \
         C: `--target=wasm32 -nostdlib`; JavaScript: `componentize-js` with every feature disabled (`--disable all`); \
         Python: `componentize-py --stub-wasi`"
    } else {
        "Take the import out of the world that it was built for: that world should be one of wit/0.1. Time, seeds and settings come in the calls"
    }
}

impl Inspection {
    /// Whether this may serve as a policy of `role` (`cdq`, `tracking` or `copy`).
    ///
    /// # Errors
    /// [`LoadError::NoRole`], [`LoadError::WrongRole`], [`LoadError::WrongVersion`] or [`LoadError::ForbiddenImport`].
    pub fn check(&self, role: &'static str) -> Result<(), LoadError> {
        self.check_role(role)?;
        self.imports.iter().try_for_each(check_import)
    }

    fn check_role(&self, expected: &'static str) -> Result<(), LoadError> {
        if self.roles.is_empty() {
            let exports = if self.exports.is_empty() { "nothing".into() } else { self.exports.join(", ") };
            return Err(LoadError::NoRole { expected, exports });
        }
        let Some((role, version)) = self.roles.iter().find(|(role, _)| role == expected) else {
            let found: Vec<&str> = self.roles.iter().map(|(role, _)| role.as_str()).collect();
            return Err(LoadError::WrongRole { expected, found: found.join("`, `") });
        };
        if !fits(version) {
            return Err(LoadError::WrongVersion { found: format!("dray:policy/{role}@{version}"), expected: POLICY_VERSION });
        }
        Ok(())
    }
}

fn check_import(import: &Import) -> Result<(), LoadError> {
    if import.instance && import.functions.is_empty() {
        return Ok(());
    }
    if import.instance && let Some((which, version)) = policy_interface(&import.name) {
        if !fits(version) {
            return Err(LoadError::WrongVersion { found: import.name.clone(), expected: POLICY_VERSION });
        }
        if which == "host" {
            return Ok(());
        }
    }
    let functions = match import.functions.as_slice() {
        [] => String::new(),
        some => format!(" ({})", some.join(", ")),
    };
    Err(LoadError::ForbiddenImport { import: import.name.clone(), functions, remedy: remedy(&import.name) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_0_1_fit() {
        assert!(fits("0.1.0") && fits("0.1.17"));
        for other in ["0.2.0", "0.1", "0.1.", "0.10.0", "1.0.0", "0.1.0-rc1", "no version"] {
            assert!(!fits(other), "{other}");
        }
    }

    #[test]
    fn interfaces_are_taken_apart() {
        assert_eq!(role_of("dray:policy/copy@0.1.0"), Some(("copy".into(), "0.1.0".into())));
        assert_eq!(role_of("dray:policy/state@0.1.0"), None);
        assert_eq!(role_of("other:policy/copy@0.1.0"), None);
        assert_eq!(policy_interface("dray:policy/cdq"), Some(("cdq", "no version")));
    }

    #[test]
    fn what_is_no_component_is_said() {
        assert!(matches!(inspect(b""), Err(LoadError::NotAComponent(_))));
        assert!(matches!(inspect(b"\x7fELF garbage"), Err(LoadError::NotAComponent(_))));
        assert!(matches!(inspect(b"\0asm\x01\0\0\0"), Err(LoadError::CoreModule)));
        assert!(matches!(inspect(b"\0asm\x0d\0\x01\0\xff\xff"), Err(LoadError::NotAComponent(_))));
    }
}
