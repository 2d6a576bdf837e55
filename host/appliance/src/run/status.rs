//! What runs, as JSON for `status` and in lines for the terminal.

use super::core::CoreView;
use super::{Appliance, Fenced, role};
use crate::config::{BackingKind, Config, Controller, Namespace, Policy, Subsystem};
use dray_controller::ControllerCounters;
use dray_migration::Owner;
use serde_json::{Value, json};

/// The three policies with their roles.
pub(super) fn policies(config: &Config) -> [(&'static str, &Policy); 3] {
    let policy = &config.file.policy;
    [("cdq", &policy.cdq), ("tracking", &policy.tracking), ("copy", &policy.copy)]
}

fn backing(kind: BackingKind) -> &'static str {
    match kind {
        BackingKind::Memory => "memory",
        BackingKind::File => "file",
        BackingKind::Device => "device",
    }
}

/// A subsystem in a line.
pub(super) fn line(subsystem: &Subsystem, fenced: Fenced) -> String {
    let namespaces = subsystem.namespaces.iter().map(|n| format!("{} ({})", n.nsid.get_ref(), backing(n.backing)));
    let namespaces = namespaces.collect::<Vec<_>>().join(", ");
    let controllers = subsystem.controllers.iter().map(|c| format!("{} ({})", c.cntlid.get_ref(), role(c.role)));
    let controllers = controllers.collect::<Vec<_>>().join(", ");
    let fence = match fenced {
        Fenced::No => "",
        Fenced::Moved => "; fenced: its namespaces were moved away",
        Fenced::Idle => "; fenced: the other end of [migration] serves",
    };
    format!("{}: namespaces {namespaces}; controllers {controllers}{fence}", subsystem.name.get_ref())
}

/// The whole.
pub(super) fn value(appliance: &Appliance, view: &CoreView) -> Value {
    let config = &appliance.config;
    let migration = &config.file.migration;
    let serving = match appliance.migrations.serving() {
        Owner::Source => migration.from.get_ref(),
        Owner::Destination => migration.to.get_ref(),
    };
    let subsystems: Vec<_> = (0..config.file.subsystems.len()).map(|nth| subsystem(appliance, view, nth, serving)).collect();
    let exports = appliance.exports.iter().zip(&view.exports).map(|(label, seen)| {
        json!({
            "subsystem": label.subsystem, "controllers": label.controllers, "by": label.by, "address": label.address,
            "clients": seen.clients, "half_open": seen.half_open, "counters": seen.counters,
        })
    });
    let devices = config.devices.all().into_iter().map(|device| {
        let model = device.identify().and_then(|identify| identify.model().map(str::to_owned));
        let virtual_functions = device.virtual_functions().into_iter().map(|one| {
            let address = one.address.map(|address| address.to_string());
            json!({
                "address": address, "controller": one.share.cntlid, "queues": one.share.queues, "interrupts": one.share.interrupts,
                "online": one.share.online,
            })
        });
        json!({
            "name": device.name(), "place": device.place(), "model": model, "failure": device.failure(),
            "virtual_functions": virtual_functions.collect::<Vec<_>>(),
        })
    });
    let policies = policies(config).map(|(role, policy)| json!({ "role": role, "component": policy.component.get_ref() }));
    let lent: Vec<_> = view.lent.iter().map(|(name, cntlid)| json!({ "subsystem": name, "controller": cntlid })).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"), "pid": std::process::id(), "configuration": appliance.file,
        "state": if appliance.stopping { "stopping" } else { "running" },
        "uptime_ms": appliance.clock.now().0 / 1_000_000, "records": appliance.records,
        "migration": { "from": migration.from.get_ref(), "to": migration.to.get_ref(), "serving": serving },
        "subsystems": subsystems, "devices": devices.collect::<Vec<_>>(), "exports": exports.collect::<Vec<_>>(), "policies": policies,
        "migrations": appliance.migrations.status(), "lent": lent,
    })
}

fn subsystem(appliance: &Appliance, view: &CoreView, nth: usize, serving: &String) -> Value {
    let (config, place) = (&appliance.config, &appliance.places[nth]);
    let file = &config.file.subsystems[nth];
    let migration = &config.file.migration;
    let name = file.name.get_ref();
    // A namespace of an end of [migration] is served by the end that the record names; any other by its own subsystem.
    let moves = name == migration.from.get_ref() || name == migration.to.get_ref();
    let owner = if moves { serving } else { name };
    let counters = view.subsystems.get(nth).map_or(&[][..], Vec::as_slice);
    let controllers = file.controllers.iter().map(|controller| {
        let cntlid = *controller.cntlid.get_ref();
        let fenced = place.migratable.iter().any(|m| m.cntlid == cntlid && m.fence.is_up());
        let counted = counters.iter().find(|(of, _)| *of == cntlid).map(|(_, counters)| counters);
        controller_value(controller, fenced, counted)
    });
    json!({
        "name": name, "nqn": file.nqn, "serial": file.serial.get_ref(),
        "namespaces": file.namespaces.iter().map(|n| namespace(config, n, owner)).collect::<Vec<_>>(),
        "controllers": controllers.collect::<Vec<_>>(),
    })
}

fn namespace(config: &Config, namespace: &Namespace, owner: &str) -> Value {
    let path = crate::assembly::file_of(config, namespace);
    let of_file = || path.as_ref().and_then(|path| path.metadata().ok()).map(|file| file.len());
    let at_device = namespace.at_device();
    let found = at_device.and_then(|(device, nsid)| config.devices.known(device, nsid));
    let of_device = found.map(|found| found.blocks.saturating_mul(u64::from(found.block_bytes)));
    json!({
        "nsid": namespace.nsid.get_ref(), "nguid": namespace.nguid.get_ref(), "backing": backing(namespace.backing),
        "path": path, "device": at_device.map(|(device, _)| device), "device_nsid": at_device.map(|(_, nsid)| nsid),
        "bytes": namespace.size.as_ref().map(|size| size.get_ref().0).or(of_device).or_else(of_file),
        "block_bytes": found.map_or(namespace.block.get_ref().0, |found| found.block_bytes.into()), "served_by": owner,
    })
}

fn controller_value(controller: &Controller, fenced: bool, counters: Option<&ControllerCounters>) -> Value {
    let counters = counters.map(|c| {
        json!({
            "fetched": c.fetched, "completed": c.completed, "errors": c.errors, "reads": c.reads, "read_bytes": c.read_bytes,
            "writes": c.writes, "written_bytes": c.written_bytes, "media_errors": c.media_errors, "interrupts": c.interrupts,
            "resets": c.resets, "bad_doorbells": c.bad_doorbells,
        })
    });
    json!({
        "cntlid": controller.cntlid.get_ref(), "role": role(controller.role), "fenced": fenced,
        "namespaces": controller.namespaces.iter().map(|n| *n.get_ref()).collect::<Vec<_>>(), "counters": counters,
    })
}
