//! From the configuration to things that can be polled: subsystems, the slots before their controllers, fences.

use crate::config::{BackingKind, Config, Namespace, PageChoice, Role, Subsystem as SubsystemFile, nguid_bytes};
use crate::recovery::wait_for;
use dray_controller::{
    ControllerConfig, ControllerRole, FileBacking, MemoryBacking, NamespaceConfig, Subsystem, SubsystemConfig,
};
use dray_device::backing::Backing;
use dray_device::memory::{DmaBuffer, Pages};
use dray_device::slot::{Fence, Plug, Slot, SlotError};
use dray_device::space::AddressSpace;
use std::path::{Path, PathBuf};

/// Operations that a file backing has under way at most.
const FILE_DEPTH: u32 = 128;

/// Why a configuration could not be brought to life.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum AssemblyError {
    /// A backing could not be opened.
    #[error("namespace {nsid} of \"{subsystem}\": {why}")]
    Backing {
        /// The subsystem.
        subsystem: String,
        /// The namespace.
        nsid: u32,
        /// What is wrong.
        why: String,
    },
    /// The subsystem does not hold together.
    #[error("subsystem \"{subsystem}\": {source}")]
    Subsystem {
        /// The subsystem.
        subsystem: String,
        /// What is wrong.
        source: dray_controller::ConfigError,
    },
    /// No slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// A subsystem and the slots that its controllers are reached through.
pub struct Machine {
    /// Its name in the configuration.
    pub name: String,
    /// The subsystem, to be polled.
    pub subsystem: Subsystem,
    /// The management controller's CNTLID, and the slot that it is driven through.
    pub management: (u16, Slot),
    /// The migratable controllers.
    pub migratable: Vec<Migratable>,
}

/// A migratable controller as the configuration has it.
#[derive(Debug)]
pub struct Migratable {
    /// CNTLID.
    pub cntlid: u16,
    /// Where slots are pointed.
    pub plug: Plug,
    /// Keeps it from fetching (rule 9).
    pub fence: Fence,
    /// I/O queue pairs it offers.
    pub io_queues: u16,
}

/// Which pages the configuration asks for.
#[must_use]
pub fn pages(config: &Config) -> Pages {
    match config.file.core.pages {
        PageChoice::PreferHuge => Pages::PreferHuge,
        PageChoice::Small => Pages::Small,
    }
}

/// Brings a subsystem to life. Missing files of file-backed namespaces are made.
///
/// # Errors
/// [`AssemblyError`].
pub fn machine(config: &Config, file: &SubsystemFile) -> Result<Machine, AssemblyError> {
    machine_behind(config, file, false)
}

/// As [`machine`]; with `fenced` its migratable controllers come into being behind a raised fence, as the durable record of a
/// migration away from here demands (rule 9).
///
/// # Errors
/// [`AssemblyError`].
pub fn machine_behind(config: &Config, file: &SubsystemFile, fenced: bool) -> Result<Machine, AssemblyError> {
    build(file, fenced, &mut |namespace| backing(config, namespace))
}

/// What opens the backing of a namespace, or says why it cannot.
pub type OpenBacking<'a> = dyn FnMut(&Namespace) -> Result<Box<dyn Backing>, String> + 'a;

/// As [`machine`], over backings of the caller's own.
///
/// # Errors
/// [`AssemblyError`].
pub fn machine_with(file: &SubsystemFile, open: &mut OpenBacking<'_>) -> Result<Machine, AssemblyError> {
    build(file, false, open)
}

fn build(file: &SubsystemFile, fenced: bool, open: &mut OpenBacking<'_>) -> Result<Machine, AssemblyError> {
    let name = file.name.get_ref().clone();
    let mut namespaces = Vec::new();
    for namespace in &file.namespaces {
        let nsid = *namespace.nsid.get_ref();
        let failed = |why| AssemblyError::Backing { subsystem: name.clone(), nsid, why };
        let identity = NamespaceConfig {
            nsid,
            nguid: nguid_bytes(namespace.nguid.get_ref()).ok_or_else(|| failed("no NGUID".into()))?,
            eui64: [0; 8],
            uuid: [0; 16],
            shared: namespace.shared,
            write_protected: false,
        };
        namespaces.push((identity, open(namespace).map_err(failed)?));
    }
    let controllers: Vec<_> = file.controllers.iter().map(|file| controller(file, fenced)).collect();
    let settings = SubsystemConfig {
        nqn: file.nqn.clone(),
        serial: file.serial.get_ref().clone(),
        model: file.model.get_ref().clone(),
        controllers: controllers.clone(),
        ..SubsystemConfig::default()
    };
    let broken = |source| AssemblyError::Subsystem { subsystem: name.clone(), source };
    let subsystem = Subsystem::new(settings, namespaces).map_err(broken)?;
    let plug = |cntlid| subsystem.plug(cntlid);
    let mut management = None;
    let mut migratable = Vec::new();
    for controller in controllers {
        let Some(plug) = plug(controller.cntlid) else { continue };
        if controller.role == ControllerRole::Management {
            let slot = Slot::new(AddressSpace::default(), controller.vectors)?;
            slot.point_at(&plug);
            management = Some((controller.cntlid, slot));
        } else {
            let ControllerConfig { cntlid, fence, io_queues, .. } = controller;
            migratable.push(Migratable { cntlid, plug, fence, io_queues });
        }
    }
    let management = management.ok_or_else(|| AssemblyError::Backing {
        subsystem: name.clone(),
        nsid: 0,
        why: "the subsystem has no management controller".into(),
    })?;
    Ok(Machine { name, subsystem, management, migratable })
}

fn controller(file: &crate::config::Controller, fenced: bool) -> ControllerConfig {
    ControllerConfig {
        cntlid: *file.cntlid.get_ref(),
        role: match file.role {
            Role::Management => ControllerRole::Management,
            Role::Migratable => ControllerRole::Migratable,
        },
        namespaces: file.namespaces.iter().map(|nsid| *nsid.get_ref()).collect(),
        io_queues: file.io_queues,
        vectors: file.io_queues.saturating_add(1),
        fence: Fence::new(fenced && file.role == Role::Migratable),
    }
}

/// Opens the backing of a namespace, a file for itself alone; a missing file that has a size is made.
///
/// # Errors
/// What is wrong, in words.
pub fn backing(config: &Config, namespace: &Namespace) -> Result<Box<dyn Backing>, String> {
    let block = u32::try_from(namespace.block.get_ref().0).map_err(|_| "a block that is too large".to_owned())?;
    match namespace.backing {
        BackingKind::Memory => {
            let bytes = namespace.size.as_ref().map_or(0, |size| size.get_ref().0);
            let len = usize::try_from(bytes).map_err(|_| "more memory than there can be".to_owned())?;
            let memory = DmaBuffer::allocate("dray-namespace", len, pages(config)).map_err(|e| e.to_string())?;
            Ok(Box::new(MemoryBacking::with_memory(memory, block).map_err(|e| e.to_string())?))
        }
        BackingKind::File => {
            let path = file_of(config, namespace).ok_or("no path")?;
            make_file(&path, namespace).map_err(|e| format!("{}: {e}", path.display()))?;
            let backing = FileBacking::open(&path, block, FILE_DEPTH).map_err(|e| format!("{}: {e}", path.display()))?;
            // Also until the last write of a process that was killed has ended.
            wait_for(|| backing.try_lock()).map_err(|e| format!("{}: {e}", path.display()))?;
            Ok(Box::new(backing))
        }
        BackingKind::Device => {
            let (name, nsid) = namespace.at_device().ok_or("no device")?;
            // Written in the configuration, it has to be the device's; left out, the device's counts.
            let written = (!namespace.block.span().is_empty()).then_some(block);
            crate::devices::backing(config, name, nsid, written)
        }
    }
}

/// The file of a file-backed namespace.
#[must_use]
pub fn file_of(config: &Config, namespace: &Namespace) -> Option<PathBuf> {
    namespace.path.as_ref().map(|path| config.path(path.get_ref()))
}

fn make_file(path: &Path, namespace: &Namespace) -> std::io::Result<()> {
    let Some(size) = &namespace.size else { return Ok(()) };
    if path.exists() {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::File::create_new(path)?.set_len(size.get_ref().0)
}
