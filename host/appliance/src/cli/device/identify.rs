//! `dray device identify`: everything that one controller says of itself.

use super::follow::Followed;
use super::page::Page;
use super::physical::{PCI, PciArgs};
use super::session::{Answer, Session};
use super::{Device, controller, devices, feature, log, namespace, print, registers, start};
use crate::config::{Config, Role};
use dray_device::space::AddressSpace;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{
    Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, IdentifyNamespace,
    IdentifyNamespaceIndependent, controller_list, nsid_list,
};
use miette::miette;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use zerocopy::FromBytes;

/// What a controller behind a socket is called by.
const VFIO_USER: &str = "vfio-user:";

/// Key, title and section of a structure.
type Name = (&'static str, &'static str, &'static str);

/// Shows all structures of the controller that is called `device`.
pub(in super::super) fn run(config: &Path, device: &str, pci: &PciArgs, as_json: bool) -> miette::Result<ExitCode> {
    if device.starts_with(PCI) {
        return of_others(device, pci.session(device, pci.driver())?, as_json);
    }
    if let Some(path) = device.strip_prefix(VFIO_USER) {
        return behind_socket(device, Path::new(path), as_json);
    }
    let followed = Followed::read(config)?;
    let config = &followed.config;
    let found = devices(config).find(|d| d.name() == device).ok_or_else(|| {
        let names: Vec<_> = devices(config).map(|d| d.name()).collect();
        miette!(help = "`dray device list` says more about each", "no device \"{device}\"; there are: {}", names.join(", "))
    })?;
    if let Some(other) = followed.elsewhere(&found) {
        let name = found.name();
        return Err(miette!(help = "`dray history` says when", "the namespaces of {name} were moved: \"{other}\" serves them"));
    }
    let page = whole(config, found)?;
    show(&page, &found.name(), found.role(), &found.subsystem.nqn, as_json)
}

/// Shows all structures of whatever NVMe controller is behind a vfio-user socket.
fn behind_socket(name: &str, path: &Path, as_json: bool) -> miette::Result<ExitCode> {
    of_others(name, Session::elsewhere(name, crate::apart::connect(path, AddressSpace::default())?)?, as_json)
}

/// Shows all structures of a controller that nobody here configured.
fn of_others(name: &str, mut session: Session<'_>, as_json: bool) -> miette::Result<ExitCode> {
    let id = session.driver().identify().copied();
    let id = id.ok_or_else(|| miette!("{name}: no Identify Controller"))?;
    let (is_management, nqn) = (id.oacs.hmlms(), id.subsystem_nqn().unwrap_or("?").to_owned());
    let others = if is_management { ask(&mut session, Cns::CONTROLLERS, 0)?.ok() } else { None };
    let others = others.iter().flat_map(|answer| controller_list(&answer.data)).filter(|&other| other != id.cntlid);
    let cntlids: Vec<_> = others.collect();
    let page = pages(&mut session, is_management, &cntlids)?;
    session.close()?;
    show(&page, name, if is_management { "management" } else { "I/O" }, &nqn, as_json)
}

fn show(page: &Page, name: &str, role: &str, nqn: &str, as_json: bool) -> miette::Result<ExitCode> {
    if as_json {
        let mut json = page.to_json();
        json["device"] = name.into();
        json["role"] = role.into();
        print(&format!("{json:#}\n"))?;
    } else {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _infallible = writeln!(text, "{name}, {role} controller of {nqn}");
        page.write(&mut text);
        print(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// All that the controller says.
pub(super) fn whole(config: &Config, device: Device<'_>) -> miette::Result<Page> {
    let mut machine = start(config, device.subsystem)?;
    let slot = device.slot(&machine)?;
    let cntlids: Vec<_> = machine.migratable.iter().map(|m| m.cntlid).collect();
    let mut session = Session::open(&device.name(), &mut machine.subsystem, &slot)?;
    let page = pages(&mut session, device.controller.role == Role::Management, &cntlids)?;
    session.close()?;
    Ok(page)
}

/// All that a controller says. `cntlids` are those that it manages.
fn pages(session: &mut Session<'_>, is_management: bool, cntlids: &[u16]) -> miette::Result<Page> {
    // First, so that questions below which the controller refuses do not show as errors.
    let error_entries = session.driver().identify().map_or(1, |id| usize::from(id.elpe) + 1);
    let logs = log::pages(session, error_entries)?;
    let mut page = Page::new("", "", "");
    page.add(registers::page(session.driver().function().as_ref()));
    let id = identify_controller(session, &mut page)?;
    if is_management {
        let (name, cns) = (controller::STATE_FORMATS, Cns::CONTROLLER_STATE_FORMATS);
        page.add(structure(session, name, cns, 0, controller::state_formats)?);
    }
    page.add(controllers(session)?);
    let (list, nsids) = namespaces(session)?;
    page.add(list);
    page.add(logs);
    let scope = feature::Scope { nsids: &nsids, cntlids, selects: id.oncs.save_select() };
    page.add(feature::pages(session, &scope)?);
    Ok(page)
}

/// Asks for an Identify structure.
pub(super) fn ask(
    session: &mut Session<'_>,
    cns: Cns,
    nsid: u32,
) -> miette::Result<Result<Answer, dray_nvme::status::Status>> {
    let entry = SubmissionEntry::identify(cns, nsid, 0, CommandSetId::NVM);
    session.ask(&cns.to_string(), &entry, IDENTIFY_BYTES)
}

/// Asks for an Identify structure and reads it, or says that the controller does not give it.
fn structure(
    session: &mut Session<'_>,
    (key, title, section): Name,
    cns: Cns,
    nsid: u32,
    read: impl FnOnce(&[u8]) -> Page,
) -> miette::Result<Page> {
    Ok(match ask(session, cns, nsid)? {
        Ok(answer) => read(&answer.data),
        Err(status) => Page::refused(key, title, section, status.to_string()),
    })
}

/// A structure of the size that was asked for.
fn fixed<T: FromBytes>(session: &Session<'_>, bytes: &[u8]) -> miette::Result<T> {
    T::read_from_bytes(bytes).map_err(|_| miette!("{}: a structure of {} bytes", session.name(), bytes.len()))
}

fn identify_controller(session: &mut Session<'_>, page: &mut Page) -> miette::Result<IdentifyController> {
    let page_bytes = session.driver().capabilities().min_page_bytes();
    let answer = ask(session, Cns::CONTROLLER, 0)?
        .map_err(|status| miette!("{}: {}: {status}", session.name(), Cns::CONTROLLER))?;
    let id: IdentifyController = fixed(session, &answer.data)?;
    page.add(controller::controller(&id, page_bytes));
    page.add(structure(session, controller::CONTROLLER_NVM, Cns::CONTROLLER_NVM, 0, |bytes| {
        let id = IdentifyControllerNvm::read_from_bytes(bytes).unwrap_or_default();
        controller::controller_nvm(&id, page_bytes)
    })?);
    Ok(id)
}

fn controllers(session: &mut Session<'_>) -> miette::Result<Page> {
    let name = ("controllers", "Controller List (CNS 13h)", "Base 2.3 §5.2.13.2");
    structure(session, name, Cns::CONTROLLERS, 0, |bytes| {
        let mut page = Page::new(name.0, name.1, name.2);
        page.numbers("CNTLIDS", controller_list(bytes).map(u64::from), "controllers of the NVM subsystem");
        page
    })
}

/// The active namespaces, at most 1,024, and their NSIDs.
fn namespaces(session: &mut Session<'_>) -> miette::Result<(Page, Vec<u32>)> {
    let mut list = Page::list("namespaces", "Active namespaces (CNS 02h)", "Base 2.3 §5.2.13.2");
    let nsids: Vec<u32> = match ask(session, Cns::ACTIVE_NAMESPACES, 0)? {
        Ok(answer) => nsid_list(&answer.data).collect(),
        Err(_) => Vec::new(),
    };
    for nsid in &nsids {
        list.add(one_namespace(session, *nsid)?);
    }
    Ok((list, nsids))
}

fn one_namespace(session: &mut Session<'_>, nsid: u32) -> miette::Result<Page> {
    let mut page = Page::new("", format!("Namespace {nsid}"), "");
    page.num("NSID", nsid, "Namespace Identifier");
    if let Ok(answer) = ask(session, Cns::NAMESPACE_CONTROLLERS, nsid)? {
        let cntlids = controller_list(&answer.data).map(u64::from);
        page.numbers("CNTLIDS", cntlids, "controllers that it is attached to (CNS 12h)");
    }
    page.add(structure(session, namespace::NAMESPACE, Cns::NAMESPACE, nsid, |bytes| {
        namespace::namespace(&IdentifyNamespace::read_from_bytes(bytes).unwrap_or_default())
    })?);
    page.add(structure(session, namespace::INDEPENDENT, Cns::NAMESPACE_INDEPENDENT, nsid, |bytes| {
        namespace::independent(&IdentifyNamespaceIndependent::read_from_bytes(bytes).unwrap_or_default())
    })?);
    let (name, cns) = (namespace::DESCRIPTORS, Cns::NAMESPACE_DESCRIPTORS);
    page.add(structure(session, name, cns, nsid, namespace::identifiers)?);
    Ok(page)
}
