//! `dray passthru`: one NVMe command, any opcode, to a controller that the kernel owns; its status, result and data.

mod arguments;
mod danger;
mod show;
mod target;

pub(crate) use arguments::PassthruArgs;

use arguments::{Direction, Plan};
use dray_device::pci::Inventory;
use dray_device::passthru::Outcome;
use miette::{IntoDiagnostic, WrapErr, miette};
use std::io::Write;
use std::process::ExitCode;
use target::{Reply, Target};

/// What the command exits with, beside 0 for success and 1 for an NVMe status that is none.
const NOTHING_SENT: u8 = 2;
const UNKNOWN: u8 = 3;

/// Sends the command.
pub(super) fn run(args: &PassthruArgs) -> miette::Result<ExitCode> {
    match attempt(args) {
        Ok(code) => Ok(code),
        Err(report) => {
            // Whatever is wrong here was found before anything was sent, or belongs to the output.
            eprintln!("{report:?}");
            Ok(ExitCode::from(NOTHING_SENT))
        }
    }
}

fn attempt(args: &PassthruArgs) -> miette::Result<ExitCode> {
    let mut plan = args.plan()?;
    let mut target = target::open(&args.device, plan.is_admin)?;
    if args.nsid.is_none() {
        plan.entry.nsid = target.default_nsid();
    }
    if !args.force {
        refuse_what_is_in_use(&plan, target.as_ref())?;
    }
    let reply = target.send(&plan)?;
    tell(args, &plan, &reply)?;
    Ok(match reply.outcome {
        Outcome::Answered { status, .. } if status.is_error() => ExitCode::FAILURE,
        Outcome::Answered { .. } => ExitCode::SUCCESS,
        Outcome::NotSent(_) => ExitCode::from(NOTHING_SENT),
        Outcome::Unknown(_) => ExitCode::from(UNKNOWN),
    })
}

/// Data-changing commands of the specification do not go to a device that somebody here uses, unless by force.
fn refuse_what_is_in_use(plan: &Plan, target: &dyn Target) -> miette::Result<()> {
    let Some(what) = danger::changes_data(plan.is_admin, plan.entry.cdw0.opcode()) else { return Ok(()) };
    let uses = uses(&target.block_devices());
    if uses.is_empty() {
        return Ok(());
    }
    Err(miette!(
        help = "unmount it first; `--force` sends the command all the same",
        "{what} would change what is in use: {}",
        uses.join(", ")
    ))
}

/// Who uses block devices ("nvme0n1") of this machine, in words.
pub(crate) fn uses(blocks: &[String]) -> Vec<String> {
    let inventory = Inventory::of_this_machine();
    blocks.iter().flat_map(|block| inventory.uses_of_disk(block)).map(|one| one.to_string()).collect()
}

fn tell(args: &PassthruArgs, plan: &Plan, reply: &Reply) -> miette::Result<()> {
    if plan.direction == Direction::FromController && reply.outcome_is_success() {
        for (file, bytes) in [(&args.output, &reply.data), (&args.metadata_output, &reply.metadata)] {
            if let Some(file) = file {
                std::fs::write(file, bytes).into_diagnostic().wrap_err_with(|| file.display().to_string())?;
            }
        }
    }
    let mut out = std::io::stdout().lock();
    let printed = if args.json {
        writeln!(out, "{:#}", show::json(args, plan, reply))
    } else if args.raw {
        if !reply.outcome_is_success() {
            eprint!("{}", show::text(args, plan, reply));
        }
        out.write_all(if args.output.is_some() { &[] } else { &reply.data })
    } else {
        out.write_all(show::text(args, plan, reply).as_bytes())
    };
    match printed.and_then(|()| out.flush()) {
        // A reader that has seen enough is no error.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).into_diagnostic(),
        _ => Ok(()),
    }
}
