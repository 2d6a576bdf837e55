//! Why a component was not loaded.

use crate::pin::Digest;
use std::path::PathBuf;

/// Why a component was not loaded, in words for whoever configured it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The engine would not start with these limits.
    #[error("the sandbox does not start: {0}")]
    Engine(String),
    /// The file cannot be read.
    #[error("{path}: {why}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        why: String,
    },
    /// The file is larger than [`crate::Limits::component_bytes`].
    #[error("a component of {found} bytes is larger than the {limit} bytes allowed")]
    TooLarge {
        /// Its size in bytes.
        found: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// Not 64 hexadecimal digits.
    #[error("`{0}` is not a SHA-256: 64 hexadecimal digits are expected (`sha256sum FILE` prints them)")]
    BadDigest(String),
    /// The lock file is there but cannot be used.
    #[error("lock file {path}: {why}", path = .path.display())]
    BadLockFile {
        /// The lock file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Neither the configuration nor the lock file names the component's hash.
    #[error("{component} is not pinned: set `sha256` in the configuration, or name it in {lock}",
        component = .component.display(), lock = .lock.display())]
    NoPin {
        /// The component.
        component: PathBuf,
        /// Where a lock file was looked for.
        lock: PathBuf,
    },
    /// The bytes are not those that were agreed on.
    #[error("the component's SHA-256 is {found}, but {expected} is pinned; if the change is wanted, pin the new one")]
    WrongHash {
        /// The pin.
        expected: Digest,
        /// What the file has.
        found: Digest,
    },
    /// A core WebAssembly module.
    #[error(
        "this is a core WebAssembly module, not a component; link it with `wasm-component-ld` \
         (Rust: `-C linker=wasm-component-ld` for target wasm32-unknown-unknown), or run `wasm-tools component new` on it"
    )]
    CoreModule,
    /// Not WebAssembly, or damaged.
    #[error("this is not a WebAssembly component: {0}")]
    NotAComponent(String),
    /// It exports no role at all.
    #[error("the component has the wrong world: it exports {exports}, but a `{expected}` policy exports dray:policy/{expected}@0.1.0")]
    NoRole {
        /// The role that was asked for.
        expected: &'static str,
        /// What it exports instead.
        exports: String,
    },
    /// It is a policy of another role.
    #[error("the component has the wrong world: it is a `{found}` policy, but a `{expected}` policy is expected here")]
    WrongRole {
        /// The role that was asked for.
        expected: &'static str,
        /// The role or roles it has.
        found: String,
    },
    /// It speaks another version of the interface.
    #[error("the component speaks {found}, but this host speaks dray:policy@{expected}; build it against wit/0.1")]
    WrongVersion {
        /// The interface with its version, as the component names it.
        found: String,
        /// This host's version.
        expected: &'static str,
    },
    /// It imports something that policies may not have.
    #[error(
        "the component imports {import}{functions}, but a policy may import nothing but dray:policy/host@0.1.0. {remedy}"
    )]
    ForbiddenImport {
        /// The import's name.
        import: String,
        /// Its functions, in brackets, or empty.
        functions: String,
        /// The build option that removes it.
        remedy: &'static str,
    },
    /// A function of the interface has another type than in `wit/0.1`, or is missing.
    #[error("the component does not fit dray:policy@0.1.0: {0}")]
    Interface(String),
    /// The compiler refused it: over a limit of the sandbox, or a feature that is off.
    #[error("the component does not compile: {0}")]
    Compile(String),
    /// Code that was compiled ahead of time could not be kept.
    #[error("compiled code cannot be kept in {folder}: {why}", folder = .folder.display())]
    NotKept {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It compiled, but a trial instance did not start.
    #[error("the component does not start: {0}")]
    Start(String),
}
