//! What happened, in words: the trace of a seed that fails.

use super::event::{End, Event, Op, Place, Stamped};
use dray_device::backing::BackingOp;
use dray_migration::{Owner, Record};
use dray_nvme::cdq::{Changed, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_nvme::command::{AdminOpcode, SubmissionEntry};
use std::fmt::Write;
use std::ops::Range;

/// Lines of a minimal trace.
const LINES: usize = 60;

/// The last of what matters: what changes who serves, faults, and what touches the place that the oracle objects to.
#[must_use]
pub fn minimal(events: &[Stamped], place: Option<Place>) -> Vec<String> {
    let told: Vec<_> = events.iter().filter(|stamped| matters(&stamped.event, place)).collect();
    let left_out = told.len().saturating_sub(LINES);
    let mut lines: Vec<String> = told[left_out..].iter().map(|stamped| line(stamped)).collect();
    if left_out > 0 {
        lines.insert(0, format!("({left_out} lines before)"));
    }
    lines
}

/// An event on a line.
#[must_use]
pub fn line(stamped: &Stamped) -> String {
    format!("{:>12.3} us  {}", stamped.at.0 as f64 / 1e3, words(&stamped.event))
}

fn matters(event: &Event, place: Option<Place>) -> bool {
    let touches = |nsid: Option<u32>, blocks: Range<u64>| {
        place.is_some_and(|place| nsid.is_none_or(|nsid| nsid == place.nsid) && blocks.contains(&place.lba))
    };
    match event {
        Event::Submitted { nsid, slba, blocks, .. } | Event::MediaBegan { nsid, slba, blocks, .. } => {
            touches(Some(*nsid), *slba..slba + blocks)
        }
        Event::CdqEntry { bytes, .. } => match entry(bytes).changed() {
            Changed::Range { nsid, slba, blocks } => touches(Some(nsid), slba..slba.saturating_add(blocks)),
            _ => true,
        },
        Event::Ended { .. } | Event::MediaEnded { .. } | Event::Fetched { .. } | Event::Rest { .. } => false,
        Event::Admin { command, .. } | Event::AdminEnded { command, .. } => !is_routine(command),
        _ => true,
    }
}

/// Commands that come all the time: moving a queue's head, waiting for events.
fn is_routine(command: &SubmissionEntry) -> bool {
    matches!(command.admin_opcode(), AdminOpcode::SET_FEATURES | AdminOpcode::ASYNC_EVENT_REQUEST)
}

fn entry(bytes: &[u8; UDMQ_ENTRY_BYTES]) -> UdmqEntry {
    zerocopy::transmute!(*bytes)
}

fn words(event: &Event) -> String {
    let mut text = String::new();
    let _infallible = match event {
        Event::Submitted { guest, id, op, nsid, slba, blocks } => {
            write!(text, "guest {guest} submits {} {id:#x}: namespace {nsid}, LBA {slba}, {blocks} blocks", op_words(*op))
        }
        Event::Ended { guest, id, end } => match end {
            End::Done { .. } => write!(text, "guest {guest}: {id:#x} has succeeded"),
            End::Failed(status) => write!(text, "guest {guest}: {id:#x} has failed: {status}"),
            End::Lost => write!(text, "guest {guest}: {id:#x} will not be answered"),
        },
        Event::Unseen { guest, id } => write!(text, "guest {guest} does not see the completion of {id:#x} in its queue"),
        Event::Disabled { guest } => write!(text, "guest {guest}: its controller is disabled"),
        Event::Fetched { side, guest } => write!(text, "{} fetches commands of guest {guest}", name(*side)),
        Event::Pointed { guest, side } => write!(text, "the slot of guest {guest} points at {}", name(*side)),
        Event::Fence { side, up } => write!(text, "the fence of {} is {}", name(*side), if *up { "raised" } else { "lowered" }),
        Event::Admin { side, command } => write!(text, "{} is sent {}", name(*side), admin_words(command)),
        Event::AdminEnded { side, command, completion } => {
            write!(text, "{} answers {}: {}", name(*side), admin_words(command), completion.status_phase.status())
        }
        Event::AsyncEvent { side, dword0 } => write!(text, "{} reports an event, dword 0 {dword0:#x}", name(*side)),
        Event::ManagementReset { side } => write!(text, "the management controller of {} is reset", name(*side)),
        Event::CdqEntry { side, cdqid, cntlid, slot, bytes } => {
            let entry = entry(bytes);
            let (what, esa) = (entry.changed(), entry.esa());
            write!(text, "{}: queue {cdqid} of controller {cntlid} shows entry {slot}: {what:?}, {esa}", name(*side))
        }
        Event::CdqUnmapped { side, cdqid } => write!(text, "{}: the memory of queue {cdqid} is unmapped", name(*side)),
        Event::MediaBegan { side, serial, op, nsid, slba, blocks } => {
            let op = media_words(*op);
            write!(text, "media of {}: {op} #{serial} begins, namespace {nsid}, LBA {slba}, {blocks} blocks", name(*side))
        }
        Event::MediaEnded { side, serial, status } => write!(text, "media of {}: #{serial} ends: {status}", name(*side)),
        Event::Begins { from, to } => write!(text, "a migration begins, {} to {}", name(*from), name(*to)),
        Event::RecordBegun(record) => write!(text, "a record is being written: {}", record_words(record)),
        Event::RecordDurable(record) => write!(text, "the record is durable: {}", record_words(record)),
        Event::RecordFailed(record) => write!(text, "the record could not be written: {}", record_words(record)),
        Event::HandedOver { nsid, different } => {
            write!(text, "namespace {nsid} is handed over; {} blocks differ {:?}", different.len(), first(different))
        }
        Event::Over { outcome } => write!(text, "the migration is over: {outcome:?}"),
        Event::PowerCut => write!(text, "the power is cut"),
        Event::SidePowerCut { side } => write!(text, "the power of {}'s disks is cut", name(*side)),
        Event::Restarted { serving } => write!(text, "the process starts again: {} serves", name(*serving)),
        Event::Rest { nsid, side, .. } => write!(text, "at rest: namespace {nsid} at {}", name(*side)),
        Event::Fault(what) => write!(text, "fault: {what}"),
    };
    text
}

fn first(blocks: &[u64]) -> &[u64] {
    &blocks[..blocks.len().min(8)]
}

fn name(side: usize) -> &'static str {
    if side == 0 { "A" } else { "B" }
}

fn op_words(op: Op) -> &'static str {
    match op {
        Op::Read => "Read",
        Op::Write { fua: true } => "Write (FUA)",
        Op::Write { .. } => "Write",
        Op::WriteZeroes { .. } => "Write Zeroes",
        Op::Deallocate => "Dataset Management (deallocate)",
        Op::Compare => "Compare",
        Op::Flush => "Flush",
    }
}

fn media_words(op: BackingOp) -> &'static str {
    match op {
        BackingOp::Read => "read",
        BackingOp::Write { .. } => "write",
        BackingOp::WriteZeroes { .. } => "write zeroes",
        BackingOp::Deallocate => "deallocate",
        BackingOp::Flush => "flush",
        BackingOp::WriteUncorrectable => "write uncorrectable",
    }
}

fn record_words(record: &Record) -> String {
    let owner = if record.owner == Owner::Source { "the source" } else { "the destination" };
    format!("migration {}, {:?}, {owner} serves, fenced {}", record.migration, record.phase, record.fenced)
}

fn admin_words(command: &SubmissionEntry) -> String {
    let SubmissionEntry { cdw10, cdw11, cdw12, .. } = command;
    format!("{} (CDW10 {cdw10:#x}, CDW11 {cdw11:#x}, CDW12 {cdw12:#x})", command.admin_opcode())
}
