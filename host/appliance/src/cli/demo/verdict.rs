//! The verdict, by a reader of its own after all controllers are gone.

use super::disk::Disk;
use super::input::Input;
use crate::config::{Config, Policy as PolicyFile};
use crate::image::{self, FsckVerdict};
use crate::live::LiveReport;
use crate::summary::{Guest, Latency, Part, Policies, Policy, Round, Summary, Verdict};
use dray_migration::report::PolicyReport;
use dray_migration::{Outcome, Owner, Report, Step};
use dray_workload::guest::{GuestHandle, Phase};
use dray_workload::ledger::Ledger;
use dray_workload::verify::{self, Comparison};
use miette::IntoDiagnostic;
use std::path::Path;

/// Looks at both disks and at the report.
pub(super) fn judge(config: &Config, input: &Input, live: &LiveReport, found: Option<String>) -> miette::Result<Summary> {
    let report = &live.migration;
    let was_moved = live.serving == Owner::Destination;
    // The ledger as another process would find it, not as this one remembers it.
    let ledger = Ledger::open(&crate::live::ledger_path(config)).into_diagnostic()?;
    let comparison = if was_moved {
        let (mut source, mut destination) = (input.source.reader(config)?, input.destination.reader(config)?);
        verify::compare(&mut *source, &mut *destination, &ledger).into_diagnostic()?
    } else {
        verify::check(&mut *input.source.reader(config)?, &ledger).into_diagnostic()?
    };
    let serving = if was_moved { &input.destination } else { &input.source };
    let fsck = |disk: &Disk| match disk.file() {
        Some(path) => image::fsck(path).into_diagnostic(),
        None => Ok(FsckVerdict::Skipped("a device is not looked at".into())),
    };
    let fsck = match (fsck(serving)?, fsck(&input.source)?) {
        (FsckVerdict::Skipped(_), FsckVerdict::Clean | FsckVerdict::Errors(_)) if serving.file().is_some() => {
            FsckVerdict::Errors("the destination has lost its filesystem".into())
        }
        (verdict, _) => verdict,
    };
    let policy = policies(report);
    let mut reasons = Vec::new();
    if !was_moved {
        reasons.push(format!("the namespace was not moved; it is intact at the source ({})", input.source));
    }
    reasons.extend(comparison.offenders.iter().map(ToString::to_string));
    if !comparison.is_ok() && comparison.offenders.is_empty() {
        reasons.push("the comparison failed".into());
    }
    if let FsckVerdict::Errors(text) = &fsck {
        reasons.push(format!("e2fsck: {}", text.trim()));
    }
    if let Some(error) = &live.guest_error {
        reasons.push(format!("the guest: {error}"));
    }
    let counters = live.guest.counters();
    if counters.mismatches + counters.errors > 0 {
        reasons.push(format!("the guest read {} wrong blocks and had {} errors", counters.mismatches, counters.errors));
    }
    if was_moved && !live.same_identity {
        reasons.push("the guest did not find the same controller after its reset".into());
    }
    if live.migrated {
        reasons.extend(policy_reasons(config, &policy));
    }
    let verdict = if reasons.is_empty() { Verdict::Ok } else { Verdict::Failed };
    let check = if was_moved { "both disks" } else { "serving disk" };
    let summary = summary(verdict, reasons, &comparison, &fsck, policy, report, &live.guest);
    let outcome = if live.migrated { summary.outcome } else { "done before this start".into() };
    Ok(Summary { outcome, check, found, ..summary })
}

/// Whether components decided, as they should where they are configured.
fn policy_reasons(config: &Config, policies: &Policies) -> Vec<String> {
    let file = &config.file.policy;
    let mut reasons = Vec::new();
    let all: [(&str, &PolicyFile, &Policy); 3] = [
        ("cdq", &file.cdq, &policies.cdq),
        ("tracking", &file.tracking, &policies.tracking),
        ("copy", &file.copy, &policies.copy),
    ];
    for (role, configured, did) in all {
        if configured.component.get_ref() != Path::new("native") && did.calls == 0 {
            reasons.push(format!("policy.{role} was never asked"));
        }
        let what = [("faults", did.faults), ("fallbacks", did.fallbacks), ("omissions", did.omissions)];
        for (name, count) in what.into_iter().filter(|(_, count)| *count > 0) {
            reasons.push(format!("policy.{role}: {count} {name}"));
        }
    }
    reasons
}

fn policies(report: &Report) -> Policies {
    let of = |role: &str| report.policies.iter().find(|(name, _)| *name == role).map(|(_, policy)| policy);
    Policies { cdq: policy(of("cdq"), true), tracking: policy(of("tracking"), false), copy: policy(of("copy"), false) }
}

fn policy(report: Option<&PolicyReport>, by_entry: bool) -> Policy {
    let Some(PolicyReport { identity, stats, omissions, late }) = report else {
        let nobody = "none".to_owned();
        return Policy {
            component: nobody,
            sha256: String::new(),
            calls: 0,
            ns_per_entry: None,
            us_per_call: None,
            faults: 0,
            fallbacks: 0,
            omissions: 0,
            late: 0,
        };
    };
    let per = |count: u64, unit: f64| (count > 0).then(|| (stats.busy_ns as f64 / count as f64 / unit * 10.0).round() / 10.0);
    Policy {
        component: identity.component.clone(),
        sha256: identity.sha256.clone(),
        calls: stats.calls,
        ns_per_entry: if by_entry { per(stats.items, 1.0) } else { None },
        us_per_call: if by_entry { None } else { per(stats.calls, 1e3) },
        faults: stats.faults,
        fallbacks: stats.fallbacks,
        omissions: *omissions,
        late: *late,
    }
}

fn summary(
    verdict: Verdict,
    reasons: Vec<String>,
    comparison: &Comparison,
    fsck: &FsckVerdict,
    policy: Policies,
    report: &Report,
    guest: &GuestHandle,
) -> Summary {
    let rounds = report.rounds.iter().map(|round| Round {
        bytes: round.bytes,
        zero_bytes: round.zero_bytes,
        duration_us: round.duration_us,
        dirtied_bytes: round.dirtied_bytes,
    });
    let parts = report.parts.iter().filter(|(step, _)| *step != Step::Prepare);
    Summary {
        verdict,
        reasons,
        outcome: match &report.outcome {
            Outcome::Moved => "done".into(),
            Outcome::Undone(reason) => format!("undone: {reason}"),
            Outcome::InDoubt { reason, what } => format!("in doubt: {reason}; {what}"),
            Outcome::Running => "not ended".into(),
        },
        found: None,
        check: "",
        blocks_compared: comparison.blocks_compared,
        blocks_different: comparison.blocks_different,
        blocks_written_after: comparison.blocks_written_since,
        writes_acknowledged: comparison.writes_acknowledged,
        writes_missing: comparison.writes_missing,
        fsck: match fsck {
            FsckVerdict::Clean => "clean",
            FsckVerdict::Errors(_) => "errors",
            FsckVerdict::Skipped(_) => "skipped",
        },
        rounds: rounds.collect(),
        downtime_us: report.downtime_us.unwrap_or(0),
        downtime_parts: parts.map(|(step, us)| Part { name: step.name().into(), us: *us }).collect(),
        guest: Guest {
            before: latency(guest, Phase::Before),
            during: latency(guest, Phase::During),
            after: latency(guest, Phase::After),
        },
        policy,
        queue_fills: report.fills.into(),
        uncorrectable: report.uncorrectable.iter().map(|u| (u.lba, 1)).collect(),
    }
}

fn latency(guest: &GuestHandle, phase: Phase) -> Latency {
    let stats = guest.phase_stats(phase);
    Latency {
        p50_us: stats.p50_ns.div_ceil(1000),
        p99_us: stats.p99_ns.div_ceil(1000),
        max_us: stats.max_ns.div_ceil(1000),
        iops: stats.iops,
    }
}
