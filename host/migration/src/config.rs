//! What a migration is set up with.

use crate::copy::CopyConfig;
use crate::hooks::EndId;
use crate::pump::PumpLimits;

/// Limits of the host's own: whatever the policies do, they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rounds after which the host decides (switch over if the budget allows it, else throttle or give up).
    pub max_rounds: u32,
    /// Time after which the host decides, ms.
    pub max_time_ms: u64,
    /// What a switch-over may cost the guest, µs.
    pub downtime_budget_us: u32,
    /// What the comparison of everything may add to it, µs, where the drive is not trusted (guarantee 1).
    pub compare_budget_us: u64,
    /// How long one step of the switch-over may take before it is undone, ms.
    pub step_ms: u64,
    /// Attempts at the switch-over.
    pub max_attempts: u32,
    /// How often a full queue is answered by logging anew, before the host enlarges it, throttles or gives up.
    pub max_fills: u32,
    /// Slots that a queue is enlarged to at most.
    pub max_cdq_slots: u32,
    /// How long the copy policy may leave dirty regions out, or the tracking policy may think, before the host goes on, µs.
    pub patience_us: u64,
    /// How long an undo or a resume of unknown outcome is tried, ms.
    pub undo_ms: u64,
    /// Least commands per second that the host's own throttle leaves a guest.
    pub guest_floor: u32,
    /// How long each cut of the host's own throttle is given to show what it achieves, ms. It halves the guest's rate from cut to
    /// cut, so a migration ends after at most 32 of them.
    pub throttle_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_rounds: 200,
            max_time_ms: 3_600_000,
            downtime_budget_us: 300_000,
            compare_budget_us: 0,
            step_ms: 5_000,
            max_attempts: 3,
            max_fills: 3,
            max_cdq_slots: 1 << 20,
            patience_us: 20_000,
            undo_ms: 30_000,
            guest_floor: 100,
            throttle_ms: 500,
        }
    }
}

/// The `settings` tables of the three policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySettings {
    /// Of the `cdq` policy.
    pub cdq: Vec<(String, String)>,
    /// Of the `tracking` policy.
    pub tracking: Vec<(String, String)>,
    /// Of the `copy` policy.
    pub copy: Vec<(String, String)>,
}

/// What is moved, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationConfig {
    /// The migration, a number that is never reused.
    pub id: u64,
    /// The names of source and destination in the durable record; zeroes where nobody has to find an end by it.
    pub ends: [EndId; 2],
    /// The policies' randomness.
    pub seed: u64,
    /// NSIDs: source, destination.
    pub namespaces: Vec<(u32, u32)>,
    /// CNTLIDs of the migratable controllers: source, destination.
    pub controllers: Vec<(u16, u16)>,
    /// Slots of each controller data queue at first.
    pub cdq_slots: u32,
    /// How the engine copies.
    pub copy: CopyConfig,
    /// Most bytes per second that the copy may take, whatever the policy says; 0 = no limit.
    pub max_bytes_per_s: u64,
    /// How the queues are drained.
    pub pump: PumpLimits,
    /// The host's own limits.
    pub limits: Limits,
    /// The guest may be slowed down (only our own controller can).
    pub may_throttle: bool,
    /// The operator waives the comparison for a drive that is not on the tested list.
    pub trust_drive: bool,
    /// UUID of the vendor part of the controller state that both sides know; `None` takes any that both name.
    pub vendor_uuid: Option<[u8; 16]>,
    /// Wall clock at the start, seconds since 1970 UTC.
    pub unix_s: i64,
    /// Local time's offset from UTC, minutes.
    pub utc_offset_min: i16,
    /// The policies' settings.
    pub settings: PolicySettings,
}

impl Default for MigrationConfig {
    fn default() -> Self {
        Self {
            id: 1,
            ends: [[0; 16]; 2],
            seed: 1,
            namespaces: Vec::new(),
            controllers: Vec::new(),
            cdq_slots: 65_536,
            copy: CopyConfig::default(),
            max_bytes_per_s: 0,
            pump: PumpLimits::default(),
            limits: Limits::default(),
            may_throttle: false,
            trust_drive: false,
            vendor_uuid: None,
            unix_s: 0,
            utc_offset_min: 0,
            settings: PolicySettings::default(),
        }
    }
}
