//! What a subsystem is made of; fixed at start.

use dray_device::memory::MemoryError;
use dray_device::slot::Fence;

/// What a controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerRole {
    /// Migration management controller: takes the migration commands (OACS.HMLMS); never migratable itself (Base 2.3 §8.1.13).
    Management,
    /// Migratable controller: what a VM drives; can be tracked, suspended, read out and restored.
    Migratable,
}

/// One controller of the subsystem.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// Controller identifier, unique in the subsystem.
    pub cntlid: u16,
    /// What it is for.
    pub role: ControllerRole,
    /// NSIDs attached to it. A management controller has those of all others besides.
    pub namespaces: Vec<u32>,
    /// I/O queue pairs that may exist (1 to 511).
    pub io_queues: u16,
    /// Interrupt vectors.
    pub vectors: u16,
    /// While it is up, nothing is fetched, and a controller that is enabled does not become ready (design rule 9). It is the
    /// fetch gate as well: what keeps a controller from fetching while a backing is exchanged under it.
    pub fence: Fence,
}

/// One namespace of the subsystem; its blocks are in the backing that comes with it.
#[derive(Clone, Debug)]
pub struct NamespaceConfig {
    /// Namespace identifier (1 to 1,024).
    pub nsid: u32,
    /// Namespace globally unique identifier; the same at source and destination of a migration.
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier; zero = none.
    pub eui64: [u8; 8],
    /// Namespace UUID; zero = none.
    pub uuid: [u8; 16],
    /// May be attached to several migratable controllers (NMIC).
    pub shared: bool,
    /// Starts write-protected (NSATTR bit 0).
    pub write_protected: bool,
}

/// A whole subsystem.
#[derive(Clone, Debug)]
pub struct SubsystemConfig {
    /// SUBNQN, at most 223 bytes.
    pub nqn: String,
    /// Serial number (SN), at most 20 ASCII characters; the same at source and destination.
    pub serial: String,
    /// Model number (MN), at most 40 ASCII characters.
    pub model: String,
    /// Firmware revision (FR), at most 8 ASCII characters.
    pub firmware: String,
    /// Its controllers: at most one management controller, at most 64 others.
    pub controllers: Vec<ControllerConfig>,
    /// Most entries of an I/O queue (CAP.MQES + 1): a power of two from 2 to 32,768.
    pub max_queue_entries: u16,
    /// MDTS: most data of one command is 2^mdts pages of 4 KiB (1 to 8).
    pub mdts: u8,
    /// Commands of one controller that may be under way in backings (16 to 4,096).
    pub contexts: u16,
    /// Commands of one controller that take several steps (Compare, Copy, Verify, DSM, long Write Zeroes) at a time (1 to 64).
    pub jobs: u16,
    /// Most bytes of one UDMQ.
    pub max_cdq_bytes: u64,
    /// The management controller takes Namespace Attachment (OACS bit 3); it makes and deletes no namespaces. What it attaches and
    /// detaches lasts as long as the subsystem, and is nowhere written down. It has every namespace itself then.
    pub attachment: bool,
}

impl Default for SubsystemConfig {
    fn default() -> Self {
        Self {
            nqn: "nqn.2025-01.io.dray:subsystem".into(),
            serial: "DRAY0001".into(),
            model: "Dray software controller".into(),
            firmware: env!("CARGO_PKG_VERSION").into(),
            controllers: Vec::new(),
            max_queue_entries: 1024,
            mdts: 7,
            contexts: 256,
            jobs: 4,
            max_cdq_bytes: 64 << 20,
            attachment: false,
        }
    }
}

/// Highest NSID.
pub const MAX_NSID: u32 = 1024;

/// Why a subsystem cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A text does not fit its Identify field, or is not ASCII.
    #[error("{field} must be printable ASCII of at most {max} characters")]
    Text {
        /// The field.
        field: &'static str,
        /// Characters it holds.
        max: usize,
    },
    /// A number outside its range.
    #[error("{field} is {value}; it must be {range}")]
    Range {
        /// The setting.
        field: &'static str,
        /// What was given.
        value: u64,
        /// What would be right.
        range: &'static str,
    },
    /// Two things with one identifier.
    #[error("{field} {value} is used twice")]
    Duplicate {
        /// Which identifier.
        field: &'static str,
        /// The value.
        value: u64,
    },
    /// A controller names a namespace that is not there.
    #[error("controller {cntlid} has namespace {nsid}, which the subsystem has not")]
    NoNamespace {
        /// The controller.
        cntlid: u16,
        /// The namespace.
        nsid: u32,
    },
    /// A private namespace is attached to several migratable controllers.
    #[error("namespace {0} is private but attached to several controllers")]
    Private(u32),
    /// Bounce memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn text(field: &'static str, value: &str, max: usize) -> Result<(), ConfigError> {
    let fits = value.len() <= max && value.bytes().all(|b| (0x20..0x7f).contains(&b));
    if fits { Ok(()) } else { Err(ConfigError::Text { field, max }) }
}

fn range(field: &'static str, value: u64, ok: bool, range: &'static str) -> Result<(), ConfigError> {
    if ok { Ok(()) } else { Err(ConfigError::Range { field, value, range }) }
}

impl SubsystemConfig {
    /// Checks everything but the namespaces.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        text("nqn", &self.nqn, 223)?;
        text("serial", &self.serial, 20)?;
        text("model", &self.model, 40)?;
        text("firmware", &self.firmware, 8)?;
        let entries = self.max_queue_entries;
        let power = entries.is_power_of_two() && (2..=32_768).contains(&entries);
        range("max_queue_entries", entries.into(), power, "a power of two from 2 to 32768")?;
        range("mdts", self.mdts.into(), (1..=8).contains(&self.mdts), "1 to 8")?;
        range("contexts", self.contexts.into(), (16..=4096).contains(&self.contexts), "16 to 4096")?;
        range("jobs", self.jobs.into(), (1..=64).contains(&self.jobs), "1 to 64")?;
        let controllers = self.controllers.len();
        range("controllers", controllers as u64, (1..=65).contains(&controllers), "1 to 65")?;
        let managers = self.controllers.iter().filter(|c| c.role == ControllerRole::Management).count();
        range("management controllers", managers as u64, managers <= 1, "0 or 1")?;
        for (i, controller) in self.controllers.iter().enumerate() {
            let id = u64::from(controller.cntlid);
            range("cntlid", id, controller.cntlid < 0xfff0, "below FFF0h")?;
            if self.controllers[..i].iter().any(|c| c.cntlid == controller.cntlid) {
                return Err(ConfigError::Duplicate { field: "cntlid", value: id });
            }
            let queues = controller.io_queues;
            range("io_queues", queues.into(), (1..=511).contains(&queues), "1 to 511")?;
        }
        Ok(())
    }
}
