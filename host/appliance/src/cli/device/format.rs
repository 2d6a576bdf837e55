//! `dray device format`: Format NVM of one namespace of a physical drive.

use super::exercise::agreed;
use super::physical::PciArgs;
use super::print;
use crate::config::units::Size;
use clap::{Args, ValueEnum};
use dray_driver::mmc;
use dray_driver::namespace::{SecureErase, format_dword};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{IdentifyController, IdentifyNamespace};
use miette::miette;
use std::process::ExitCode;

/// How long a format may take, in milliseconds: erasing a large drive takes hours.
const PATIENCE_MS: u64 = 12 * 3_600_000;

/// What is formatted, and how.
#[derive(Clone, Debug, Args)]
pub(in super::super) struct FormatArgs {
    /// pci:ADDRESS of a drive that is bound to vfio-pci
    device: String,
    /// The namespace
    #[arg(long, value_name = "N")]
    nsid: u32,
    /// The LBA format, as `dray device identify` numbers them [default: the one it has]
    #[arg(long, value_name = "N")]
    lbaf: Option<u8>,
    /// What becomes of the old data on the media
    #[arg(long, value_name = "HOW", default_value = "none")]
    secure_erase: Erase,
    /// Yes: all data of the namespace may be lost
    #[arg(long)]
    destroys_data: bool,
    #[command(flatten)]
    pci: PciArgs,
}

/// As the command line has it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Erase {
    /// Nobody says
    None,
    /// Erased
    UserData,
    /// The key that it is encrypted with is deleted
    Crypto,
}

/// Formats, and says what the namespace is then.
pub(in super::super) fn run(args: &FormatArgs) -> miette::Result<ExitCode> {
    agreed(args.destroys_data, &format!("formatting namespace {} of {}", args.nsid, args.device))?;
    let mut config = args.pci.driver();
    // The command is given its own time below.
    config.admin_timeout_ms = 0;
    let mut session = args.pci.session(&args.device, config)?;
    let controller: IdentifyController =
        session.driver().identify().copied().ok_or_else(|| miette!("{}: no Identify Controller", session.name()))?;
    let now = session.now();
    let active = mmc::active_namespaces(session.driver_mut(), now, 0).map_err(|error| miette!("{}: {error}", session.name()))?;
    let active = session.until("listing namespaces", |driver, _| active.poll(driver))?.map_err(|error| miette!("{error}"))?;
    let before = look(&mut session, args.nsid)?;
    let erase = match args.secure_erase {
        Erase::None => SecureErase::None,
        Erase::UserData => SecureErase::UserData,
        Erase::Crypto => SecureErase::Cryptographic,
    };
    let dword = format_dword(&controller, &before, (args.nsid, active.len() as u32), args.lbaf, erase);
    let dword = dword.map_err(|error| miette!("{}: {error}", session.name()))?;
    session.order("Format NVM", &SubmissionEntry::format_nvm(args.nsid, dword), PATIENCE_MS)?;
    let after = look(&mut session, args.nsid)?;
    let name = session.name().to_owned();
    session.close()?;
    let wanted = args.lbaf.unwrap_or_else(|| before.flbas.format_index());
    if after.flbas.format_index() != wanted {
        return Err(miette!("{name}: the drive says that it formatted, and has format {} and not {wanted}", after.flbas.format_index()));
    }
    let block = after.block_bytes().unwrap_or(0);
    let bytes = Size(after.nsze.saturating_mul(u64::from(block)));
    print(&format!("{name}: namespace {} is formatted: LBA format {wanted}, {} blocks of {block} bytes ({bytes})\n", args.nsid, after.nsze))?;
    Ok(ExitCode::SUCCESS)
}

fn look(session: &mut super::session::Session<'_>, nsid: u32) -> miette::Result<Box<IdentifyNamespace>> {
    let now = session.now();
    let query = mmc::identify_namespace(session.driver_mut(), now, nsid).map_err(|error| miette!("{}: {error}", session.name()))?;
    let found = session.until("Identify Namespace", |driver, _| query.poll(driver))?;
    found.map_err(|error| miette!("{}: namespace {nsid}: {error}", session.name()))
}
