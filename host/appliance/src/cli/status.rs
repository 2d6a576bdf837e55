//! `dray status`: what the running appliance says of itself.

use crate::config::Config;
use crate::config::units::{Size, Span};
use crate::control::Request;
use crate::control::client::Client;
use miette::IntoDiagnostic;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How long the appliance may take over its answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Asks the appliance that runs on the configuration.
pub(super) fn run(config: &Path, as_json: bool) -> miette::Result<ExitCode> {
    let config = Config::read(config)?;
    let status = Client::connect(&config)?.ask(&Request::Status, PATIENCE)?;
    let text = if as_json { format!("{status:#}\n") } else { text(&status) };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever reads may have had enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).into_diagnostic(),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// A string or a number, as people read it.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn all(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn list(value: &Value) -> String {
    all(value).map(plain).collect::<Vec<_>>().join(" ")
}

/// An appliance's status for people.
pub(crate) fn text(status: &Value) -> String {
    let mut text = String::new();
    let up = Span(Duration::from_millis(status["uptime_ms"].as_u64().unwrap_or(0)));
    // Writing to a string cannot fail.
    let _infallible = writeln!(
        text,
        "dray {} on {}: {}, process {}, up {up}\nrecords      {}",
        plain(&status["version"]),
        plain(&status["configuration"]),
        plain(&status["state"]),
        status["pid"],
        plain(&status["records"])
    );
    for subsystem in all(&status["subsystems"]) {
        self::subsystem(&mut text, subsystem);
    }
    for device in all(&status["devices"]) {
        let (name, place, model) = (plain(&device["name"]), plain(&device["place"]), plain(&device["model"]));
        let failure = device["failure"].as_str().map_or_else(String::new, |why| format!("; it has failed: {why}"));
        let _infallible = writeln!(text, "device       {name}: {place}, {model}{failure}");
        for one in all(&device["virtual_functions"]) {
            let (address, controller, queues, interrupts) = (plain(&one["address"]), &one["controller"], &one["queues"], &one["interrupts"]);
            let state = if one["online"] == true { "online" } else { "offline" };
            let line = format!("{address}: controller {controller}, {queues} queues, {interrupts} interrupts, {state}");
            let _infallible = writeln!(text, "function     {name}: {line}");
        }
    }
    for export in all(&status["exports"]) {
        let (name, by, address) = (plain(&export["subsystem"]), plain(&export["by"]), plain(&export["address"]));
        let controllers = list(&export["controllers"]);
        let _infallible = writeln!(text, "export       {name}:{controllers} by {by} at {address}, clients: {}", export["clients"]);
    }
    for lent in all(&status["lent"]) {
        let _infallible = writeln!(text, "lent         the queue of {}:{}", plain(&lent["subsystem"]), lent["controller"]);
    }
    for policy in all(&status["policies"]) {
        let _infallible = writeln!(text, "policy       {}: {}", plain(&policy["role"]), plain(&policy["component"]));
    }
    let migrations = &status["migrations"];
    let running = &migrations["running"];
    if running.is_object() {
        let (from, to, phase) = (plain(&running["from"]), plain(&running["to"]), plain(&running["phase"]));
        let left = Size(running["left_bytes"].as_u64().unwrap_or(0));
        let (what, number) = (moving(running), &running["migration"]);
        let _infallible = writeln!(text, "{what} {number} of {from} to {to}: {phase}, {left} left");
    }
    for ended in all(&migrations["ended"]) {
        let (from, to, message) = (plain(&ended["from"]), plain(&ended["to"]), plain(&ended["message"]));
        let _infallible = writeln!(text, "{} {} of {from} to {to}: {message}", moving(ended), ended["migration"]);
    }
    text
}

/// What moves, as wide as the other words.
fn moving(value: &Value) -> String {
    if value["kind"] == "media-move" {
        return format!("media move   {}:{},", plain(&value["subsystem"]), value["nsid"]);
    }
    if value["kind"] == "departure" {
        return "departure   ".to_owned();
    }
    "migration   ".to_owned()
}

fn subsystem(text: &mut String, subsystem: &Value) {
    let name = plain(&subsystem["name"]);
    let _infallible = writeln!(text, "subsystem    {name}: {}", plain(&subsystem["nqn"]));
    for namespace in all(&subsystem["namespaces"]) {
        let size = Size(namespace["bytes"].as_u64().unwrap_or(0));
        let owner = plain(&namespace["served_by"]);
        let backing = match &namespace["path"] {
            Value::String(path) => format!("{} {path}", plain(&namespace["backing"])),
            _ if namespace["device"].is_string() => format!("device {}, its {}", plain(&namespace["device"]), namespace["device_nsid"]),
            _ => plain(&namespace["backing"]),
        };
        let _infallible = writeln!(text, "  namespace  {}: {size}, {backing}, served by {owner}", namespace["nsid"]);
    }
    for controller in all(&subsystem["controllers"]) {
        let counters = &controller["counters"];
        let fence = if controller["fenced"] == true { ", fenced" } else { "" };
        let _infallible = writeln!(
            text,
            "  controller {}: {}{fence}, reads {}, writes {}, errors {}",
            controller["cntlid"],
            plain(&controller["role"]),
            counters["reads"],
            counters["writes"],
            counters["errors"]
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whatever_is_there_is_shown_and_what_is_missing_is_no_panic() {
        text(&json!(null));
        text(&json!({ "subsystems": [1, {}], "exports": [null], "migrations": { "running": {}, "ended": [7] } }));
        let shown = text(&json!({
            "version": "1", "configuration": "a.toml", "state": "running", "pid": 7, "uptime_ms": 1500, "records": "none",
            "subsystems": [{ "name": "a", "nqn": "nqn.x", "namespaces": [{ "nsid": 1, "bytes": 1 << 20, "backing": "file", "served_by": "b" }],
                "controllers": [{ "cntlid": 2, "role": "migratable", "fenced": true, "counters": { "reads": 3, "writes": 4, "errors": 0 } }] }],
            "exports": [{ "subsystem": "a", "controllers": [2, 3], "by": "nvme-tcp", "address": "127.0.0.1:1", "clients": 2 }],
        }));
        for words in ["process 7", "1 MiB, file, served by b", "2: migratable, fenced, reads 3", "a:2 3 by nvme-tcp at 127.0.0.1:1, clients: 2"] {
            assert!(shown.contains(words), "{shown}");
        }
    }
}
