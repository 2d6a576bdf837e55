//! `appliance.toml`: what it may say, and what is wrong with it when something is.
//!
//! Reading has two steps: the shape ([`File`], by serde, unknown keys refused) and the sense ([`check`], what no type can say:
//! identifiers used twice, files that are missing, namespaces over the same bytes). Both end in a [`ConfigError`] that names
//! the file, the line and the key, and says what would be right.

mod check;
pub mod device;
pub mod export;
pub mod image;
pub mod units;

pub use check::parse_nguid as nguid_bytes;

use miette::{Diagnostic, NamedSource, SourceSpan};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::Spanned;
use units::{Size, Span};

/// What `appliance.toml` says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// The polling cores.
    #[serde(default)]
    pub core: Core,
    /// The software NVM subsystems.
    #[serde(rename = "subsystem")]
    pub subsystems: Vec<Subsystem>,
    /// Controllers that are not ours.
    #[serde(default, rename = "device")]
    pub devices: Vec<device::Device>,
    /// Controllers before clients.
    #[serde(default, rename = "export")]
    pub exports: Vec<export::Export>,
    /// What moves, and its limits.
    pub migration: Migration,
    /// The three policies.
    pub policy: Policies,
    /// The demo's guest.
    #[serde(default)]
    pub guest: Guest,
    /// What the bootable image does with its machine.
    #[serde(default)]
    pub image: image::Image,
}

/// How the polling cores behave.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Core {
    /// What a core does when there is nothing to do.
    pub idle: Idle,
    /// Where policies run.
    pub policies: PolicyPlace,
    /// Which pages arenas are made of.
    pub pages: PageChoice,
    /// The folder of durable records and compiled policies, relative to the configuration.
    pub state: PathBuf,
    /// A folder of policies that `dray plugin compile` has compiled ahead of time, relative to the configuration. What is not in
    /// it, does not fit, or could be written by others is compiled at start.
    pub compiled: Option<PathBuf>,
}

impl Default for Core {
    fn default() -> Self {
        Self {
            idle: Idle::Adaptive,
            policies: PolicyPlace::Beside,
            pages: PageChoice::PreferHuge,
            state: "target/dray/state".into(),
            compiled: None,
        }
    }
}

/// What a polling core does when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Spin for a while, then sleep in short steps.
    Adaptive,
    /// Spin for ever.
    Spin,
}

/// Where policies run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyPlace {
    /// On a thread of their own.
    Beside,
    /// On the polling core.
    On,
}

/// Which pages arenas are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageChoice {
    /// Huge pages where there are enough.
    PreferHuge,
    /// Ordinary pages.
    Small,
}

/// A software NVM subsystem.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Subsystem {
    /// What the rest of the file calls it.
    pub name: Spanned<String>,
    /// Its NVMe Qualified Name.
    pub nqn: String,
    /// Serial number, at most 20 ASCII characters.
    pub serial: Spanned<String>,
    /// Model number, at most 40 ASCII characters.
    #[serde(default = "default_model")]
    pub model: Spanned<String>,
    /// Its namespaces.
    #[serde(rename = "namespace")]
    pub namespaces: Vec<Namespace>,
    /// Its controllers.
    #[serde(rename = "controller")]
    pub controllers: Vec<Controller>,
}

fn default_model() -> Spanned<String> {
    Spanned::new(0..0, "Dray software controller".into())
}

/// A namespace and its backing.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Namespace {
    /// NSID, from 1.
    pub nsid: Spanned<u32>,
    /// Where its blocks are.
    pub backing: BackingKind,
    /// The file, for `backing = "file"`.
    pub path: Option<Spanned<PathBuf>>,
    /// Its size. A file that is not there is made with it; without a size the file must be there, and its size counts.
    pub size: Option<Spanned<Size>>,
    /// Bytes of a logical block.
    #[serde(default = "default_block")]
    pub block: Spanned<Size>,
    /// For `backing = "device"`: the name of the `[[device]]`.
    pub device: Option<Spanned<String>>,
    /// The NSID there; 1 without it.
    pub device_nsid: Option<Spanned<u32>>,
    /// NGUID, 32 hexadecimal digits; the same at source and destination.
    pub nguid: Spanned<String>,
    /// More than one controller may reach it.
    #[serde(default)]
    pub shared: bool,
}

fn default_block() -> Spanned<Size> {
    Spanned::new(0..0, Size(4096))
}

/// Where the blocks of a namespace are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackingKind {
    /// In memory.
    Memory,
    /// In a file, by io_uring, with O_DIRECT where the filesystem has it.
    File,
    /// In a namespace of a controller that is not ours.
    Device,
}

/// A controller.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Controller {
    /// CNTLID, unique in its subsystem.
    pub cntlid: Spanned<u16>,
    /// What it is for.
    pub role: Role,
    /// NSIDs attached to it; a management controller reaches all.
    #[serde(default)]
    pub namespaces: Vec<Spanned<u32>>,
    /// I/O queue pairs it offers.
    #[serde(default = "default_queues")]
    pub io_queues: u16,
}

fn default_queues() -> u16 {
    8
}

/// What a controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Takes the migration commands; Dray drives it.
    Management,
    /// A guest drives it; it can be tracked, suspended, read out and restored.
    Migratable,
}

/// What moves, and its limits.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Migration {
    /// The subsystem that is left.
    pub from: Spanned<String>,
    /// The subsystem that is moved to.
    pub to: Spanned<String>,
    /// What a switch-over may cost the guest.
    #[serde(default = "default_downtime")]
    pub downtime: Span,
    /// Rounds before the host stops waiting for the policy.
    #[serde(default = "default_rounds")]
    pub max_rounds: u32,
    /// Time before the host gives up.
    #[serde(default = "default_time")]
    pub max_time: Span,
    /// The guest may be slowed down if it writes faster than can be copied.
    #[serde(default)]
    pub throttle_guest: bool,
    /// What becomes of a block that cannot be read.
    #[serde(default)]
    pub media_error: MediaError,
    /// Slots of the controller data queue.
    #[serde(default = "default_slots")]
    pub cdq_slots: u32,
    /// Believe a drive that is not on the tested list.
    #[serde(default)]
    pub trust: Trust,
    /// What comparing everything may add to a switch-over, where a drive is not trusted.
    #[serde(default)]
    pub compare: Span,
}

/// What becomes of a block that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MediaError {
    /// The migration fails; the source goes on serving.
    #[default]
    Fail,
    /// The block is marked at the destination (Write Uncorrectable) and listed in the summary.
    Mark,
}

/// Whose word is enough about what has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    /// Only tested drives; others are compared block by block at the end.
    #[default]
    Tested,
    /// The drive's.
    Drive,
}

fn default_downtime() -> Span {
    Span(std::time::Duration::from_millis(10))
}
fn default_rounds() -> u32 {
    30
}
fn default_time() -> Span {
    Span(std::time::Duration::from_secs(600))
}
fn default_slots() -> u32 {
    8192
}

/// The three policies.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policies {
    /// How the controller data queue is drained.
    pub cdq: Policy,
    /// How change is tracked.
    pub tracking: Policy,
    /// In which order and how fast the media is copied.
    pub copy: Policy,
}

/// One policy.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// The component's file, relative to the configuration, or "native" for the built-in one.
    pub component: Spanned<PathBuf>,
    /// SHA-256 that the component must have; without it the lock file beside the component decides.
    pub sha256: Option<Spanned<String>>,
    /// What a call may take.
    #[serde(default = "default_budget")]
    pub budget: Span,
    /// What an instance may use.
    #[serde(default = "default_memory")]
    pub memory: Size,
    /// Faults before the component is set aside.
    #[serde(default = "default_faults")]
    pub max_faults: u32,
    /// Handed to the component as they are.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

fn default_budget() -> Span {
    Span(std::time::Duration::from_millis(20))
}
fn default_memory() -> Size {
    Size(16 << 20)
}
fn default_faults() -> u32 {
    8
}

/// The demo's guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Guest {
    /// Writes per second; 0 = as fast as it can.
    pub writes_per_second: u32,
    /// Queue depth.
    pub queue_depth: u16,
    /// Reads per hundred commands.
    pub read_percent: u8,
}

impl Default for Guest {
    fn default() -> Self {
        Self { writes_per_second: 2000, queue_depth: 8, read_percent: 20 }
    }
}

/// A configuration that was read and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the file says.
    pub file: File,
    /// The folder that relative paths start from.
    pub base: PathBuf,
    /// What is open of the devices that it names.
    pub devices: crate::devices::Devices,
}

impl Config {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.into(), source })?;
        let base = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
        Self::parse(&path.display().to_string(), text, base)
    }

    /// As [`read`](Self::read), from text.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(name: &str, text: String, base: PathBuf) -> Result<Self, ConfigError> {
        let file: File = match toml::from_str(&text) {
            Ok(file) => file,
            Err(error) => {
                let span = error.span().unwrap_or(0..0);
                return Err(ConfigError::at(name, text, span, error.message(), None));
            }
        };
        let config = Self { file, base, devices: crate::devices::Devices::default() };
        match check::check(&config) {
            Ok(()) => Ok(config),
            Err(problem) => Err(ConfigError::at(name, text, problem.span, &problem.message, Some(problem.help))),
        }
    }

    /// A path of the file, from where the process is.
    #[must_use]
    pub fn path(&self, path: &Path) -> PathBuf {
        self.base.join(path)
    }

    /// Whether the controllers of both ends of `[migration]` have clients: their VM managers move them, over vfio-user.
    #[must_use]
    pub fn hands_over(&self) -> bool {
        let to = self.file.migration.to.get_ref();
        let Some(subsystem) = self.subsystem(to) else { return false };
        let migratable = |cntlid: u16| {
            subsystem.controllers.iter().any(|c| *c.cntlid.get_ref() == cntlid && c.role == Role::Migratable)
        };
        let exports = self.file.exports.iter().filter(|export| export.subsystem.get_ref() == to);
        exports.flat_map(export::Export::cntlids).any(migratable)
    }

    /// The subsystem of that name.
    #[must_use]
    pub fn subsystem(&self, name: &str) -> Option<&Subsystem> {
        self.file.subsystems.iter().find(|s| s.name.get_ref() == name)
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    #[diagnostic(help("name another with --config FILE"))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line says something that cannot be.
    #[error("{file}, line {line}: {message}")]
    Wrong {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
        /// What would be right.
        #[help]
        help: Option<String>,
        /// The file's text.
        #[source_code]
        source_code: NamedSource<String>,
        /// The place.
        #[label("here")]
        span: SourceSpan,
    },
}

impl ConfigError {
    fn at(name: &str, text: String, span: std::ops::Range<usize>, message: &str, help: Option<String>) -> Self {
        let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
        Self::Wrong {
            file: name.into(),
            line,
            message: message.into(),
            help,
            source_code: NamedSource::new(name, text).with_language("TOML"),
            span: span.into(),
        }
    }
}

#[cfg(test)]
mod tests;
