//! The summary of a migration: one value, shown to people as text and to programs as one JSON object.

use crate::config::units::{Size, Span};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// What the migration did and whether every byte is where it should be.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// "ok" only if nothing below says otherwise.
    pub verdict: Verdict,
    /// Why the verdict is "failed"; empty when it is "ok".
    pub reasons: Vec<String>,
    /// How the migration ended ("done", "undone: …", "failed: …").
    pub outcome: String,
    /// What a start found of a run before it, and did about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// Which check ran: "both disks" (every block of the destination against the frozen source and the ledger), or "serving
    /// disk" (every block that the guest may write, against the ledger).
    pub check: &'static str,
    /// Blocks of 4 KiB compared at the end.
    pub blocks_compared: u64,
    /// Blocks that differ without a write that explains it.
    pub blocks_different: u64,
    /// Blocks that differ because the guest wrote them after the source was suspended.
    pub blocks_written_after: u64,
    /// Writes that the guest was told had ended well.
    pub writes_acknowledged: u64,
    /// Of those, writes that are lost or rolled back at the destination.
    pub writes_missing: u64,
    /// "clean", "errors" or "skipped".
    pub fsck: &'static str,
    /// Each round of the copy.
    pub rounds: Vec<Round>,
    /// From the Suspend command to the Resume completion, µs.
    pub downtime_us: u64,
    /// What it was spent on, µs, in order.
    pub downtime_parts: Vec<Part>,
    /// The guest's latencies.
    pub guest: Guest,
    /// The three policies.
    pub policy: Policies,
    /// How often the controller data queue filled up.
    pub queue_fills: u64,
    /// Blocks that could not be read and were marked at the destination: first LBA and count.
    pub uncorrectable: Vec<(u64, u64)>,
}

/// Whether the migration can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every block and every write is accounted for.
    Ok,
    /// Something is missing, or the default policies did not decide.
    Failed,
}

/// One round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    /// Bytes written to the destination, zeroes included.
    pub bytes: u64,
    /// Of those, bytes written as zeroes.
    pub zero_bytes: u64,
    /// How long the round took.
    pub duration_us: u64,
    /// Bytes that the guest dirtied meanwhile.
    pub dirtied_bytes: u64,
}

/// A part of the downtime.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// What was done.
    pub name: String,
    /// How long it took.
    pub us: u64,
}

/// The guest's latencies in three phases.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Guest {
    /// Before the migration.
    pub before: Latency,
    /// While it ran, the switch-over included.
    pub during: Latency,
    /// At the destination.
    pub after: Latency,
}

/// Latencies of one phase.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Longest.
    pub max_us: u64,
    /// Commands per second.
    pub iops: u64,
}

/// The three policies.
#[derive(Clone, Debug, Serialize)]
pub struct Policies {
    /// How the queue was drained.
    pub cdq: Policy,
    /// How change was tracked.
    pub tracking: Policy,
    /// In which order and how fast the media was copied.
    pub copy: Policy,
}

/// What one policy did.
#[derive(Clone, Debug, Serialize)]
pub struct Policy {
    /// Its file name, or `native:NAME`.
    pub component: String,
    /// SHA-256 of the component.
    pub sha256: String,
    /// Calls answered.
    pub calls: u64,
    /// Cost of an entry, for `cdq`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ns_per_entry: Option<f64>,
    /// Cost of a call, for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub us_per_call: Option<f64>,
    /// Calls that ended in a fault.
    pub faults: u64,
    /// Calls that the built-in policy answered instead.
    pub fallbacks: u64,
    /// What the policy left out and the host added.
    pub omissions: u64,
    /// Answers that came too late: the host went on without.
    pub late: u64,
}

impl Summary {
    /// Rounds, downtime and policies: what there is to say of a migration that copied.
    fn migration(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "round        copied        zero     took        rate     dirtied meanwhile")?;
        for (i, round) in self.rounds.iter().enumerate() {
            let rate = round.bytes as f64 / (round.duration_us.max(1) as f64 / 1e6);
            writeln!(
                f,
                "{i:>5}  {:>12}  {:>10}  {:>8}  {:>8}/s  {:>10}",
                Size(round.bytes).to_string(),
                Size(round.zero_bytes).to_string(),
                micros(round.duration_us),
                Size(rate as u64).to_string(),
                Size(round.dirtied_bytes).to_string()
            )?;
        }
        writeln!(f, "\ndowntime {}", micros(self.downtime_us))?;
        for part in &self.downtime_parts {
            writeln!(f, "    {:<28} {:>10}", part.name, micros(part.us))?;
        }
        writeln!(f, "\npolicy                                calls        cost   faults  fallbacks  omissions  late")?;
        for (role, p) in [("cdq", &self.policy.cdq), ("tracking", &self.policy.tracking), ("copy", &self.policy.copy)] {
            let cost = match (p.ns_per_entry, p.us_per_call) {
                (Some(ns), _) => format!("{ns:.1} ns/entry"),
                (None, Some(us)) => format!("{us:.1} µs/call"),
                (None, None) => "-".into(),
            };
            let (component, calls, faults) = (&p.component, p.calls, p.faults);
            writeln!(f, "{role:<9} {component:<24} {calls:>8} {cost:>13} {faults:>6} {:>10} {:>10} {:>5}", p.fallbacks, p.omissions, p.late)?;
        }
        Ok(())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.rounds.is_empty() {
            self.migration(f)?;
        }
        writeln!(f, "\nguest         p50        p99        max       IOPS")?;
        for (name, l) in [("before", &self.guest.before), ("during", &self.guest.during), ("after", &self.guest.after)] {
            writeln!(f, "{name:<8} {:>8}   {:>8}   {:>8}   {:>8}", micros(l.p50_us), micros(l.p99_us), micros(l.max_us), l.iops)?;
        }
        if self.queue_fills > 0 {
            writeln!(f, "\nthe controller data queue filled up {} times; a full round followed each", self.queue_fills)?;
        }
        for (lba, blocks) in &self.uncorrectable {
            writeln!(f, "\nunreadable at the source, marked at the destination: LBA {lba}, {blocks} blocks")?;
        }
        if let Some(found) = &self.found {
            writeln!(f, "\nstart        {found}")?;
        }
        writeln!(f, "\nmigration    {}", self.outcome)?;
        writeln!(f, "check        {}", self.check)?;
        writeln!(
            f,
            "blocks       {} compared, {} different ({} more written by the guest after the switch, all as its ledger says)",
            self.blocks_compared, self.blocks_different, self.blocks_written_after
        )?;
        writeln!(f, "writes       {} acknowledged, {} missing", self.writes_acknowledged, self.writes_missing)?;
        writeln!(f, "filesystem   {}", self.fsck)?;
        for reason in &self.reasons {
            writeln!(f, "             {reason}")?;
        }
        write!(f, "verdict      {}", if self.verdict == Verdict::Ok { "ok" } else { "FAILED" })
    }
}

fn micros(us: u64) -> String {
    Span(Duration::from_micros(us)).to_string()
}
