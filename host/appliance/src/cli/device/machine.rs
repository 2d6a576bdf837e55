//! The machine's NVMe functions, for `dray device list`.

use super::bind::owner;
use super::list::{row, table};
use super::physical::PciArgs;
use dray_device::pci::{Inventory, KernelController, PciFunction, Use, VFIO_PCI};
use dray_device::vfio::{IommuChoice, VfioError};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, IdentifyController};
use serde_json::{Value, json};
use zerocopy::FromBytes;

/// How long the kernel may take for an Identify, in milliseconds.
const TIMEOUT_MS: u32 = 5_000;

/// One function, and what is known of its controller.
pub(super) struct Found {
    function: PciFunction,
    uses: Vec<Use>,
    in_the_way: Vec<String>,
    /// Identify Controller, or why it was not asked.
    identify: Result<Box<IdentifyController>, String>,
}

/// All NVMe functions. Those that a driver of the kernel has are asked through it; those that vfio-pci has and nobody uses are
/// brought up for it, and shut down again.
pub(super) fn gather() -> std::io::Result<Vec<Found>> {
    let inventory = Inventory::of_this_machine();
    let functions = inventory.nvme_functions()?;
    let found = functions.into_iter().map(|function| Found {
        uses: inventory.uses(&function),
        in_the_way: inventory.keep_group_from_vfio(&function),
        identify: identify(&function),
        function,
    });
    Ok(found.collect())
}

fn identify(function: &PciFunction) -> Result<Box<IdentifyController>, String> {
    match (&function.nvme, function.driver.as_deref()) {
        (Some(nvme), _) => through_kernel(&nvme.name).map_err(|error| format!("/dev/{}: {error}", nvme.name)),
        (None, Some(VFIO_PCI)) if !function.virtual_functions.is_empty() => {
            Err("a reset, which looking at it takes, would take its virtual functions offline".into())
        }
        (None, Some(VFIO_PCI)) => ourselves(function),
        (None, Some(driver)) => Err(format!("{driver} has no controller of it")),
        (None, None) => Err("no driver has it".into()),
    }
}

fn through_kernel(name: &str) -> std::io::Result<Box<IdentifyController>> {
    let mut data = vec![0; IDENTIFY_BYTES];
    let entry = SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM);
    let (status, _) = KernelController::open(name)?.admin(&entry, &mut data, TIMEOUT_MS)?;
    if status.is_error() {
        return Err(std::io::Error::other(status.to_string()));
    }
    IdentifyController::read_from_bytes(&data).map(Box::new).map_err(|_| std::io::ErrorKind::InvalidData.into())
}

fn ourselves(function: &PciFunction) -> Result<Box<IdentifyController>, String> {
    let args = PciArgs { iommu: IommuChoice::Auto, vf_token: None };
    let opened = args.open(function.address, 0).map_err(|error| match error {
        VfioError::InUse { .. } => "a program uses it".to_owned(),
        error => error.to_string(),
    })?;
    let session = super::session::Session::physical(&function.address.to_string(), opened, args.driver());
    let session = session.map_err(|error| error.to_string())?;
    let id = session.driver().identify().copied().ok_or("it says nothing of itself")?;
    session.close().map_err(|error| error.to_string())?;
    Ok(Box::new(id))
}

impl Found {
    fn model(&self) -> String {
        self.text(|id| id.model(), |nvme| &nvme.model)
    }

    fn serial(&self) -> String {
        self.text(|id| id.serial(), |nvme| &nvme.serial)
    }

    fn text(&self, ours: fn(&IdentifyController) -> Option<&str>, theirs: fn(&dray_device::pci::NvmeOfKernel) -> &str) -> String {
        let of_kernel = self.function.nvme.as_ref().map(theirs).filter(|text| !text.is_empty());
        let of_drive = self.identify.as_ref().ok().and_then(|id| ours(id));
        of_kernel.or(of_drive).unwrap_or("?").to_owned()
    }

    fn vfs(&self) -> String {
        match (self.function.physical_function, self.function.sriov) {
            (Some(physical), _) => format!("of {physical}"),
            (None, Some(sriov)) => format!("{} of {}", sriov.enabled, sriov.total),
            (None, None) => "-".into(),
        }
    }

    fn migration(&self) -> String {
        match &self.identify {
            Ok(id) if id.oacs.hmlms() => "moves others (HMLMS)".into(),
            Ok(_) => "no".into(),
            Err(why) => format!("unknown: {why}"),
        }
    }

    fn in_use(&self) -> String {
        let mut all: Vec<String> = self.uses.iter().map(ToString::to_string).collect();
        if !self.in_the_way.is_empty() {
            all.push(format!("group shared with {}", self.in_the_way.join(", ")));
        }
        if all.is_empty() { "-".into() } else { all.join("; ") }
    }

    fn blocks(&self) -> String {
        let names: Vec<&str> = self.function.nvme.iter().flat_map(|nvme| &nvme.blocks).map(|block| block.name.as_str()).collect();
        if names.is_empty() { "-".into() } else { names.join(" ") }
    }

    /// As JSON.
    pub(super) fn to_json(&self) -> Value {
        let function = &self.function;
        let nvme = function.nvme.as_ref();
        let blocks: Vec<_> =
            nvme.iter().flat_map(|nvme| &nvme.blocks).map(|block| json!({ "name": block.name, "nsid": block.nsid })).collect();
        json!({
            "device": format!("pci:{}", function.address),
            "address": function.address.to_string(),
            "vendor": function.vendor,
            "device_id": function.device,
            "owner": function.driver,
            "iommu_group": function.group,
            "group_kept_by": self.in_the_way,
            "numa_node": function.numa_node,
            "controller": nvme.map(|nvme| &nvme.name),
            "state": nvme.map(|nvme| &nvme.state),
            "model": self.model(),
            "serial": self.serial(),
            "block_devices": blocks,
            "in_use": self.uses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "physical_function": function.physical_function.map(|address| address.to_string()),
            "virtual_functions": function.virtual_functions.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "virtual_functions_total": function.sriov.map(|sriov| sriov.total),
            "live_migration": {
                "hmlms": self.identify.as_ref().ok().map(|id| id.oacs.hmlms()),
                "unknown_because": self.identify.as_ref().err(),
            },
        })
    }
}

/// The table of a machine's functions.
pub(super) fn text(found: &[Found]) -> String {
    let mut rows = vec![row(["PCI ADDRESS", "OWNER", "GROUP", "MODEL", "SERIAL", "BLOCKS", "VFS", "LIVE MIGRATION", "IN USE"])];
    for one in found {
        let group = one.function.group.map_or_else(|| "none".into(), |group| group.to_string());
        let (address, model, serial) = (one.function.address.to_string(), one.model(), one.serial());
        let owner = owner(&one.function);
        rows.push(row([&address, owner, &group, &model, &serial, &one.blocks(), &one.vfs(), &one.migration(), &one.in_use()]));
    }
    if found.is_empty() { "This machine has no NVMe functions.\n".into() } else { table(&rows) }
}
