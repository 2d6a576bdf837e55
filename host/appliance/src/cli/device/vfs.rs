//! `dray device vfs`: virtual functions with queues and interrupts, online.
//!
//! Secondary controllers go offline when their primary controller is reset, so whoever drives it must go on doing so. Where the
//! kernel has the physical function, its driver does, and the commands go through it. Where vfio-pci has it, this process drives
//! it, until Ctrl-C.

use super::bind::refused;
use super::physical::{PciArgs, address, uuid};
use super::print;
use super::session::Session;
use dray_device::function::Function;
use dray_device::pci::{BindError, Inventory, KernelController, PciAddress, PciFunction, VFIO_PCI};
use dray_device::vfio::VfioFunction;
use dray_driver::virtualization::{self, Plan, Step};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController, SecondaryController, secondary_controllers};
use dray_nvme::virtualization::PrimaryCapabilities;
use miette::{IntoDiagnostic, miette};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// How long a command may take, in milliseconds.
const TIMEOUT_MS: u32 = 10_000;
/// How long the kernel's driver may take to come back after a reset.
const LIVE_PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// The primary controller, by whoever drives it.
enum Primary {
    Kernel { address: PciAddress, controller: KernelController },
    Ours { session: Box<Session<'static>>, function: Arc<VfioFunction> },
}

impl Primary {
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

    /// An Identify structure.
    fn identify(&mut self, cns: Cns, cntid: u16) -> miette::Result<Vec<u8>> {
        let entry = SubmissionEntry::identify(cns, 0, cntid, CommandSetId::NVM);
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

    /// One Virtualization Management command.
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

    /// A function-level reset, with which a changed allocation takes effect.
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
    let function = inventory.function(address).map_err(|_| refused(BindError::NoFunction(address)))?;
    let total = function.sriov.map_or(0, |sriov| sriov.total);
    if count > total {
        return Err(refused(BindError::TooManyVirtual { address, asked: count, total }));
    }
    // Whoever opens the virtual functions through VFIO must know it, if this process drives the physical one.
    let holds = function.driver.as_deref() == Some(VFIO_PCI) && count > 0;
    let args = PciArgs { vf_token: args.vf_token.or_else(|| holds.then(random_token).flatten()), ..*args };
    let mut primary = Primary::open(&function, &args)?;
    let id = IdentifyController::read_from_bytes(&primary.identify(Cns::CONTROLLER, 0)?).map_err(|_| miette!("no Identify Controller"))?;
    if !id.oacs.virtualization() {
        return Err(miette!("{address}: the drive has no Virtualization Management"));
    }
    clear(&inventory, &mut primary, address)?;
    if count == 0 {
        print(&format!("{address}: no virtual functions\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let made = make(&inventory, &mut primary, address, count);
    let (plan, functions) = match made {
        Ok(made) => made,
        Err(report) => {
            // Half of them help nobody.
            let _there_may_be_none = clear(&inventory, &mut primary, address);
            return Err(report);
        }
    };
    print(&told(&plan, &functions, args.vf_token.filter(|_| holds)))?;
    if let Primary::Ours { session, .. } = &mut primary {
        let ended = hold(session);
        clear(&inventory, &mut primary, address)?;
        ended?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes all virtual functions away: offline first, then their resources, then themselves.
fn clear(inventory: &Inventory, primary: &mut Primary, address: PciAddress) -> miette::Result<()> {
    for step in virtualization::take_all(&secondaries(primary)?) {
        primary.take(&step)?;
    }
    inventory.set_virtual_functions(address, 0).map_err(refused)?;
    Ok(())
}

fn secondaries(primary: &mut Primary) -> miette::Result<Vec<SecondaryController>> {
    Ok(secondary_controllers(&primary.identify(Cns::SECONDARY_CONTROLLERS, 0)?).collect())
}

fn make(inventory: &Inventory, primary: &mut Primary, address: PciAddress, count: u16) -> miette::Result<(Plan, Vec<PciAddress>)> {
    let page = primary.identify(Cns::PRIMARY_CAPABILITIES, 0)?;
    let capabilities = PrimaryCapabilities::read_from_bytes(&page).map_err(|_| miette!("{address}: no Primary Controller Capabilities"))?;
    let plan = virtualization::plan(&capabilities, &secondaries(primary)?, count).map_err(|error| miette!("{address}: {error}"))?;
    let release = plan.release(capabilities.cntlid);
    for step in &release {
        primary.take(step)?;
    }
    if !release.is_empty() {
        primary.reset()?;
    }
    let made = inventory.set_virtual_functions(address, count).map_err(refused)?;
    for share in &plan.secondaries {
        for step in share.assign().iter().chain([&share.online()]) {
            primary.take(step)?;
        }
    }
    let online = secondaries(primary)?;
    if let Some(share) = plan.secondaries.iter().find(|share| !online.iter().any(|one| one.scid == share.cntlid && one.is_online())) {
        return Err(miette!("{address}: controller {} took everything and is not online", share.cntlid));
    }
    Ok((plan, made.virtual_functions))
}

fn told(plan: &Plan, functions: &[PciAddress], token: Option<[u8; 16]>) -> String {
    let mut text = String::new();
    for share in &plan.secondaries {
        let function = usize::from(share.function).checked_sub(1).and_then(|at| functions.get(at));
        let function = function.map_or_else(|| "?".into(), ToString::to_string);
        text += &format!("{function}: controller {}, {} queues, {} interrupts, online\n", share.cntlid, share.queues, share.interrupts);
    }
    if let Some(first) = functions.first() {
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
