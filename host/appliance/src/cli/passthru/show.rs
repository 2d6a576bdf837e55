//! What a command's end looks like: for people, with data as nvme-cli dumps it, and as JSON.

use super::arguments::{PassthruArgs, Plan};
use super::danger;
use super::target::Reply;
use dray_device::passthru::Outcome;
use dray_nvme::status::Status;
use serde_json::{Value, json};
use std::fmt::Write;

/// Bytes in a row of a dump.
const ROW: usize = 16;

pub(super) fn text(args: &PassthruArgs, plan: &Plan, reply: &Reply) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _infallible = write_text(&mut text, args, plan, reply);
    text
}

fn write_text(out: &mut String, args: &PassthruArgs, plan: &Plan, reply: &Reply) -> std::fmt::Result {
    let opcode = plan.entry.cdw0.opcode();
    let queue = if plan.is_admin { "admin command" } else { "I/O command" };
    writeln!(out, "{}: {queue} {opcode:02X}h ({}), NSID {}", args.device, danger::name(plan.is_admin, opcode), nsid(plan.entry.nsid))?;
    match reply.outcome {
        Outcome::Answered { status, result } => {
            writeln!(out, "status  {:04X}h  {status}", status.into_bits())?;
            writeln!(out, "result  {result:016X}h  {result}")?;
        }
        Outcome::NotSent(fault) => writeln!(out, "not sent: {fault}")?,
        Outcome::Unknown(fault) => writeln!(out, "outcome unknown: {fault}; the command may have taken effect")?,
    }
    for (what, bytes, file) in
        [("data", &reply.data, &args.output), ("metadata", &reply.metadata, &args.metadata_output)]
    {
        match file {
            _ if bytes.is_empty() => {}
            Some(file) => writeln!(out, "{what}: {} bytes in {}", bytes.len(), file.display())?,
            None => {
                writeln!(out, "{what}: {} bytes", bytes.len())?;
                dump(out, bytes)?;
            }
        }
    }
    Ok(())
}

fn nsid(nsid: u32) -> String {
    if nsid > 0xffff { format!("{nsid:08X}h") } else { nsid.to_string() }
}

/// As nvme-cli: offsets, bytes, and what of them is printable, a space not being.
fn dump(out: &mut String, bytes: &[u8]) -> std::fmt::Result {
    writeln!(out, "       0  1  2  3  4  5  6  7  8  9  a  b  c  d  e  f")?;
    for (row, bytes) in bytes.chunks(ROW).enumerate() {
        write!(out, "{:04x}:", row * ROW)?;
        bytes.iter().try_for_each(|byte| write!(out, " {byte:02x}"))?;
        write!(out, "{:1$} \"", "", 3 * (ROW - bytes.len()))?;
        let printable = |byte: &u8| if (0x21..0x7f).contains(byte) { char::from(*byte) } else { '.' };
        bytes.iter().map(printable).for_each(|c| out.push(c));
        writeln!(out, "\"")?;
    }
    Ok(())
}

pub(super) fn json(args: &PassthruArgs, plan: &Plan, reply: &Reply) -> Value {
    let opcode = plan.entry.cdw0.opcode();
    let mut object = json!({
        "device": args.device,
        "admin": plan.is_admin,
        "opcode": opcode,
        "command": danger::name(plan.is_admin, opcode),
        "nsid": plan.entry.nsid,
    });
    let (how, status, result, why) = match reply.outcome {
        Outcome::Answered { status, result } => ("answered", Some(status), Some(result), None),
        Outcome::NotSent(fault) => ("not-sent", None, None, Some(fault.to_string())),
        Outcome::Unknown(fault) => ("unknown", None, None, Some(fault.to_string())),
    };
    object["outcome"] = how.into();
    object["status"] = status.map_or(Value::Null, status_json);
    object["result"] = result.into();
    object["why"] = why.into();
    for (name, bytes, file) in [("data", &reply.data, &args.output), ("metadata", &reply.metadata, &args.metadata_output)] {
        if !bytes.is_empty() && file.is_none() {
            object[name] = hex(bytes).into();
        }
    }
    object
}

fn status_json(status: Status) -> Value {
    json!({
        "field": status.into_bits(),
        "sct": status.sct().0,
        "sc": status.sc(),
        "crd": status.crd(),
        "more": status.more(),
        "dnr": status.dnr(),
        "text": status.to_string(),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dumps_look_as_nvme_cli_makes_them() {
        let mut text = String::new();
        let bytes: Vec<u8> = (0..20).map(|at| if at == 19 { b' ' } else { b'A' + at }).collect();
        dump(&mut text, &bytes).expect("a string");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "       0  1  2  3  4  5  6  7  8  9  a  b  c  d  e  f");
        assert_eq!(lines[1], "0000: 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f 50 \"ABCDEFGHIJKLMNOP\"");
        assert_eq!(lines[2], format!("0010: 51 52 53 20{:36} \"QRS.\"", ""));
        assert_eq!(lines.len(), 3);
        assert_eq!((nsid(1), nsid(u32::MAX)), ("1".into(), "FFFFFFFFh".into()));
    }
}
