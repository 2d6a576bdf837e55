//! `dray device vfs`: virtual functions with queues and interrupts, online.
//!
//! Where the kernel has the physical function, its driver goes on driving it, and the commands go through that. Where vfio-pci has
//! it, this process drives it, until Ctrl-C. An appliance that has it makes them itself (`virtual-functions` of `[[device]]`).

use super::physical::{PciArgs, address, uuid};
use super::print;
use super::session::Session;
use crate::devices::refused;
use crate::devices::virtual_functions::{self, Primary, VirtualFunctions};
use dray_device::function::Function;
use dray_device::pci::{Inventory, KernelController, PciAddress, PciFunction, VFIO_PCI};
use dray_device::vfio::VfioFunction;
use dray_driver::virtualization::Step;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES};
use miette::{IntoDiagnostic, miette};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a command may take, in milliseconds.
const TIMEOUT_MS: u32 = 10_000;
/// How long the kernel's driver may take to come back after a reset.
const LIVE_PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The primary controller, by the kernel's driver or by ours.
enum Driven {
    Kernel { address: PciAddress, controller: KernelController },
    Ours { session: Box<Session<'static>>, function: Arc<VfioFunction> },
}

impl Driven {
    fn open(function: &PciFunction, args: &PciArgs) -> miette::Result<Self> {
        let address = function.address;
        if let Some(nvme) = &function.nvme {
            let controller = KernelController::open(&nvme.name).map_err(|error| miette!("/dev/{}: {error}", nvme.name))?;
            return Ok(Self::Kernel { address, controller });
        }
        if function.driver.as_deref() != Some(VFIO_PCI) {
            return Err(miette!("{address}: neither the kernel's NVMe driver nor vfio-pci has it"));
        }
        let opened = args.open(address, 0).map_err(|error| miette!("{error}"))?;
        let session = Session::physical(&format!("pci:{address}"), Arc::clone(&opened), args.driver())?;
        Ok(Self::Ours { session: Box::new(session), function: opened })
    }
}

impl Primary for Driven {
    fn identify(&mut self, cns: Cns) -> miette::Result<Vec<u8>> {
        let entry = SubmissionEntry::identify(cns, 0, 0, CommandSetId::NVM);
        match self {
            Self::Kernel { address, controller } => {
                let mut data = vec![0; IDENTIFY_BYTES];
                let (status, _) = controller.admin(&entry, &mut data, TIMEOUT_MS).map_err(|error| miette!("{address}: {cns}: {error}"))?;
                if status.is_error() { Err(miette!("{address}: {cns}: {status}")) } else { Ok(data) }
            }
            Self::Ours { session, .. } => {
                let answer = session.ask(&cns.to_string(), &entry, IDENTIFY_BYTES)?;
                Ok(answer.map_err(|status| miette!("{}: {cns}: {status}", session.name()))?.data)
            }
        }
    }

    fn take(&mut self, step: &Step) -> miette::Result<()> {
        match self {
            Self::Kernel { address, controller } => {
                let sent = controller.admin(&step.entry(), &mut [], TIMEOUT_MS);
                let (status, _) = sent.map_err(|error| miette!("{address}: {step}: {error}"))?;
                if status.is_error() { Err(miette!("{address}: {step}: {status}")) } else { Ok(()) }
            }
            Self::Ours { session, .. } => session.order(&step.to_string(), &step.entry(), u64::from(TIMEOUT_MS)).map(drop),
        }
    }

    fn reset(&mut self) -> miette::Result<()> {
        match self {
            Self::Kernel { address, .. } => {
                let inventory = Inventory::of_this_machine();
                inventory.reset(*address).map_err(refused)?;
                let end = Instant::now() + LIVE_PATIENCE;
                loop {
                    let state = inventory.function(*address).into_diagnostic()?.nvme.map(|nvme| nvme.state).unwrap_or_default();
                    if state == "live" {
                        return Ok(());
                    }
                    if Instant::now() > end {
                        return Err(miette!("{address}: its controller did not come back after a reset, it is \"{state}\""));
                    }
                    std::thread::sleep(LOOK);
                }
            }
            Self::Ours { session, function } => {
                let name = session.name().to_owned();
                function.reset().map_err(|error| miette!("{name}: function-level reset: {error}"))?;
                let now = session.now();
                let before = session.driver().generation();
                session.driver_mut().reset(now);
                session.until_within(u64::from(TIMEOUT_MS), "coming back after a reset", |driver, _| {
                    (driver.is_ready() && driver.generation() != before).then_some(())
                })
            }
        }
    }
}

/// Makes `count` virtual functions, in place of those there are.
pub(in super::super) fn run(device: &str, count: u16, args: &PciArgs) -> miette::Result<ExitCode> {
    let address = address(device)?;
    let inventory = Inventory::of_this_machine();
    let function = inventory.with_room_for(address, count).map_err(refused)?;
    // Whoever opens the virtual functions through VFIO must know it, if this process drives the physical one.
    let holds = function.driver.as_deref() == Some(VFIO_PCI) && count > 0;
    let args = PciArgs { vf_token: args.vf_token.or_else(|| holds.then(random_token).flatten()), ..*args };
    let mut primary = Driven::open(&function, &args)?;
    if count == 0 {
        virtual_functions::check(&mut primary, address)?;
        virtual_functions::clear(&inventory, &mut primary, address)?;
        print(&format!("{address}: no virtual functions\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let made = virtual_functions::make(&inventory, &mut primary, address, count)?;
    print(&told(&made, args.vf_token.filter(|_| holds)))?;
    if let Driven::Ours { session, .. } = &mut primary {
        let ended = hold(session);
        virtual_functions::clear(&inventory, &mut primary, address)?;
        ended?;
    }
    Ok(ExitCode::SUCCESS)
}

fn told(made: &VirtualFunctions, token: Option<[u8; 16]>) -> String {
    let mut text: String = made.each().map(|one| format!("{one}\n")).collect();
    if let Some(first) = made.functions.first() {
        text += &format!("No driver has them: `dray device bind {first}` gives one to vfio-pci, `dray device unbind {first}` to the kernel.\n");
    }
    if let Some(token) = token {
        let hex: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
        text += &format!("VF token {hex}: `--vf-token` for whoever opens them. They go when this command ends (Ctrl-C).\n");
    }
    text
}

/// Sixteen random bytes, from the kernel.
fn random_token() -> Option<[u8; 16]> {
    uuid(std::fs::read_to_string("/proc/sys/kernel/random/uuid").ok()?.trim()).ok()
}

/// Drives the primary controller until Ctrl-C.
fn hold(session: &mut Session<'_>) -> miette::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).into_diagnostic()?;
    }
    session.until_within(u64::MAX, "driving the primary controller", |_, _| {
        std::thread::sleep(LOOK);
        stop.load(Ordering::Relaxed).then_some(())
    })
}
