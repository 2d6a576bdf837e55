//! What a target is made of.

use dray_device::memory::MemoryError;
use dray_device::random::SecureRandom;
use dray_device::slot::Slot;
use dray_device::space::SpaceError;
use dray_nvme::auth::{DhGroup, Secret};
use dray_nvme::tcp::AnaState;

/// The DH groups of a target that is told none: larger ones would hold its core up.
pub const DEFAULT_GROUPS: [DhGroup; 3] = [DhGroup::Ffdhe3072, DhGroup::Ffdhe2048, DhGroup::Null];

/// What is fixed at start.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time; one more is refused.
    pub connections: usize,
    /// Connections at a time that have not got through Connect and authentication; the oldest makes room for one more.
    pub half_open: usize,
    /// Entries of a queue (32 to 1,024): an admin queue has 32 at least.
    pub queue_entries: u16,
    /// I/O queues of an association (1 to 128).
    pub io_queues: u16,
    /// In-capsule data of an I/O queue in bytes: a multiple of 16 up to 65,536; becomes IOCCSZ.
    pub in_capsule_bytes: u32,
    /// MAXH2CDATA, and bytes of an R2T: a multiple of 4, 4,096 to 1 MiB.
    pub max_h2c_bytes: u32,
    /// Data of one command in bytes (a power of two from 8 KiB to 1 MiB): becomes MDTS where the controller's is higher.
    pub max_transfer_bytes: u32,
    /// Memory of an association for transfers longer than 8 KiB; commands wait when it is used up. At least twice
    /// `max_transfer_bytes`.
    pub pool_bytes: usize,
    /// Milliseconds in which a connection must have got through Connect.
    pub handshake_ms: u64,
    /// Milliseconds that each message of authentication may take. A host computes for it, a slow one for tens of seconds, and
    /// shows no other life; Linux does not notice at that time that its connection has ended.
    pub authentication_ms: u64,
    /// Milliseconds for which a host may keep a controller that it has not enabled.
    pub idle_ms: u64,
    /// Milliseconds after which a client that does not read is disconnected.
    pub stall_ms: u64,
    /// Milliseconds in which a client may read why its connection ends.
    pub linger_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            half_open: 64,
            queue_entries: 128,
            io_queues: 16,
            in_capsule_bytes: 8192,
            max_h2c_bytes: 128 << 10,
            max_transfer_bytes: 512 << 10,
            pool_bytes: 8 << 20,
            handshake_ms: 10_000,
            authentication_ms: 60_000,
            idle_ms: 120_000,
            stall_ms: 30_000,
            linger_ms: 1_000,
        }
    }
}

impl Limits {
    /// Bytes of the buffer that every queue entry has.
    pub(super) fn buffer_bytes(&self) -> usize {
        self.in_capsule_bytes.max(8192).next_multiple_of(4096) as usize
    }

    /// MDTS: the longest transfer as a power of two of 4 KiB pages.
    pub(super) fn mdts(&self) -> u8 {
        (self.max_transfer_bytes / 4096).max(1).ilog2() as u8
    }

    pub(super) fn check(&self) -> Result<(), TargetError> {
        let check = |field, value: u64, ok: bool, right| {
            if ok { Ok(()) } else { Err(TargetError::Range { field, value, right }) }
        };
        let entries = self.queue_entries;
        check("queue_entries", entries.into(), (32..=1024).contains(&entries), "32 to 1024")?;
        let queues = self.io_queues;
        check("io_queues", queues.into(), (1..=128).contains(&queues), "1 to 128")?;
        let capsule = self.in_capsule_bytes;
        let good = capsule.is_multiple_of(16) && capsule <= 65_536;
        check("in_capsule_bytes", capsule.into(), good, "a multiple of 16 up to 65536")?;
        let h2c = self.max_h2c_bytes;
        let good = h2c.is_multiple_of(4) && (4096..=1 << 20).contains(&h2c);
        check("max_h2c_bytes", h2c.into(), good, "a multiple of 4, 4096 to 1048576")?;
        let transfer = self.max_transfer_bytes;
        let good = transfer.is_power_of_two() && (8192..=1 << 20).contains(&transfer);
        check("max_transfer_bytes", transfer.into(), good, "a power of two, 8192 to 1048576")?;
        let good = self.pool_bytes >= 2 * transfer as usize && self.pool_bytes <= 1 << 30;
        check("pool_bytes", self.pool_bytes as u64, good, "twice max_transfer_bytes to 1 GiB")?;
        check("connections", self.connections as u64, self.connections > 0, "at least 1")?;
        check("half_open", self.half_open as u64, self.half_open > 0, "at least 1")
    }
}

/// A host that may connect.
#[derive(Clone, Debug)]
pub struct HostAccess {
    /// Its NQN.
    pub nqn: String,
    /// Its secret; without one it need not authenticate.
    pub secret: Option<Secret>,
    /// The controller's secret, for a host that wants the controller to authenticate itself.
    pub controller_secret: Option<Secret>,
}

/// Namespaces that have their asymmetric access state in common.
#[derive(Clone, Debug)]
pub struct AnaGroupConfig {
    /// ANAGRPID, from 1.
    pub id: u32,
    /// The namespaces in it, ascending.
    pub nsids: Vec<u32>,
    /// Their state over this target's controllers.
    pub state: AnaState,
}

/// Which digests a subsystem wants of its hosts. They are agreed before a host says where it wants to go, so a host without
/// them is refused by Connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestPolicy {
    /// Those that the host asks for.
    #[default]
    AsAsked,
    /// Header and data digests, or no Connect.
    Required,
}

/// A subsystem as hosts see it.
#[derive(Clone, Debug)]
pub struct ExportedSubsystem {
    /// SUBNQN.
    pub nqn: String,
    /// Serial number to show; empty for the controller's own.
    pub serial: String,
    /// Hosts that may connect.
    pub allowed_hosts: Vec<HostAccess>,
    /// Any host may connect; those that are listed with a secret must authenticate nevertheless.
    pub allow_any_host: bool,
    /// Which digests its connections have.
    pub digests: DigestPolicy,
    /// Its controllers: the CNTLID that hosts see, and the slot that is pointed at it. The slot belongs to the target alone.
    pub controllers: Vec<(u16, Slot)>,
    /// ANA groups; empty for no ANA reporting.
    pub ana_groups: Vec<AnaGroupConfig>,
}

/// What a target is made of.
pub struct TargetConfig {
    /// The subsystems.
    pub subsystems: Vec<ExportedSubsystem>,
    /// Whether there is a discovery controller.
    pub discovery: bool,
    /// Fixed bounds.
    pub limits: Limits,
    /// DH groups that authentication takes, the favourite first; empty takes [`DEFAULT_GROUPS`]. Groups above ffdhe3072 compute
    /// for many milliseconds in the poll.
    pub dh_groups: Vec<DhGroup>,
    /// Where challenges and keys come from.
    pub random: Box<dyn SecureRandom>,
}

/// Why a target, or an association's memory, cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// A limit outside its range.
    #[error("{field} is {value}; it must be {right}")]
    Range {
        /// The limit.
        field: &'static str,
        /// What was given.
        value: u64,
        /// What would be right.
        right: &'static str,
    },
    /// Not an NQN.
    #[error("\"{0}\" is no NQN of a subsystem: it must begin with \"nqn.\" and have at most 223 bytes")]
    Nqn(String),
    /// Two subsystems, or two controllers of one, with the same name.
    #[error("{0} is exported twice")]
    Duplicate(String),
    /// No memory for queues and buffers.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No room in the slot's address space.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The slot's function has no doorbells.
    #[error("the slot has no doorbells")]
    NoDoorbells,
}
