//! What the command is told, and what it makes of it.

use crate::config::units::Size;
use clap::Args;
use dray_nvme::command::{Cdw0, SubmissionEntry};
use miette::{IntoDiagnostic, WrapErr, miette};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most bytes of one command's data: more than any device takes, little enough to allocate.
const MOST_BYTES: usize = 64 << 20;

/// One command of NVMe.
#[derive(Clone, Debug, Args)]
pub(crate) struct PassthruArgs {
    /// A namespace (/dev/ng0n1), or a controller (/dev/nvme0) with --admin
    pub(super) device: String,
    /// An admin command; by a namespace's device it goes to its controller
    #[arg(long)]
    admin: bool,
    /// The opcode: decimal, or 0x and hexadecimal
    #[arg(long, value_name = "N", value_parser = byte)]
    opcode: u8,
    /// NSID [default: the namespace's own for I/O, 0 for admin commands]
    #[arg(long, value_name = "N", value_parser = dword)]
    pub(super) nsid: Option<u32>,
    /// Command dword 2
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw2: u32,
    /// Command dword 3
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw3: u32,
    /// Command dword 10
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw10: u32,
    /// Command dword 11
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw11: u32,
    /// Command dword 12
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw12: u32,
    /// Command dword 13
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw13: u32,
    /// Command dword 14
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw14: u32,
    /// Command dword 15
    #[arg(long, value_name = "N", value_parser = dword, default_value = "0", hide_default_value = true)]
    cdw15: u32,
    /// Bytes of data, a multiple of 4: 4096, 0x1000 or 4KiB [default: as long as the input]
    #[arg(long, value_name = "SIZE", value_parser = length)]
    data_len: Option<usize>,
    /// Bytes of metadata in a buffer of its own, a multiple of 4
    #[arg(long, value_name = "SIZE", value_parser = length)]
    metadata_len: Option<usize>,
    /// Data comes from the controller [default: what the opcode's bits 1:0 say]
    #[arg(long, conflicts_with = "write")]
    read: bool,
    /// Data goes to the controller
    #[arg(long)]
    write: bool,
    /// Where data for the controller is; - = standard input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where metadata for the controller is
    #[arg(long, value_name = "FILE")]
    metadata_input: Option<PathBuf>,
    /// Write the data that came to a file instead of printing it
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
    /// Write the metadata that came to a file instead of printing it
    #[arg(long, value_name = "FILE")]
    pub(super) metadata_output: Option<PathBuf>,
    /// Milliseconds until the kernel aborts the command [default: the kernel's]
    #[arg(long, value_name = "MS", default_value_t = 0, hide_default_value = true)]
    timeout: u32,
    /// Print one JSON object
    #[arg(long, conflicts_with = "raw")]
    pub(super) json: bool,
    /// Print the data's bytes and nothing else; a status that is no success goes to standard error
    #[arg(long)]
    pub(super) raw: bool,
    /// Send commands that change data even to a device with mounted filesystems
    #[arg(long)]
    pub(super) force: bool,
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// There is none.
    None,
    FromController,
    ToController,
}

/// The command, ready to be sent.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) entry: SubmissionEntry,
    pub(super) is_admin: bool,
    pub(super) direction: Direction,
    /// For the controller, or zeroes in the length of what comes from it.
    pub(super) data: Vec<u8>,
    pub(super) metadata: Vec<u8>,
    pub(super) timeout_ms: u32,
}

impl PassthruArgs {
    /// Reads the input and checks what belongs together.
    pub(super) fn plan(&self) -> miette::Result<Plan> {
        let entry = SubmissionEntry {
            cdw0: Cdw0::new().with_opcode(self.opcode),
            nsid: self.nsid.unwrap_or(0),
            cdw2: self.cdw2,
            cdw3: self.cdw3,
            cdw10: self.cdw10,
            cdw11: self.cdw11,
            cdw12: self.cdw12,
            cdw13: self.cdw13,
            cdw14: self.cdw14,
            cdw15: self.cdw15,
            ..SubmissionEntry::default()
        };
        let to_controller = self.goes_to_controller()?;
        let data = buffer("data", self.data_len, self.input.as_deref(), to_controller)?;
        let metadata = buffer("metadata", self.metadata_len, self.metadata_input.as_deref(), to_controller)?;
        if !to_controller && data.is_empty() && (self.output.is_some() || self.raw) {
            return Err(miette!("there is no data to write out: --data-len says how much comes"));
        }
        let direction = match (data.is_empty() && metadata.is_empty(), to_controller) {
            (true, _) => Direction::None,
            (false, true) => Direction::ToController,
            (false, false) => Direction::FromController,
        };
        Ok(Plan { entry, is_admin: self.admin, direction, data, metadata, timeout_ms: self.timeout })
    }

    /// The opcode's bits 1:0 say which way data goes (Base 2.3 §4.1.1); of them the kernel looks at bit 0 alone.
    fn goes_to_controller(&self) -> miette::Result<bool> {
        let by_kernel = self.opcode & 1 != 0;
        if self.read && by_kernel || self.write && !by_kernel {
            let (way, wanted) = if by_kernel { ("to", "--write") } else { ("from", "--read") };
            return Err(miette!(
                "opcode {:02X}h carries data {way} the controller (its bit 0 says so, and the kernel goes by it): leave it to \
                 that, or say {wanted}",
                self.opcode
            ));
        }
        Ok(by_kernel)
    }
}

/// What goes, or room for what comes.
fn buffer(what: &str, len: Option<usize>, input: Option<&Path>, to_controller: bool) -> miette::Result<Vec<u8>> {
    let option = if what == "data" { "" } else { "metadata-" };
    let bytes = match (input, to_controller) {
        (Some(_), false) => return Err(miette!("--{option}input: {what} of this command comes from the controller")),
        (Some(file), true) => {
            let bytes = read(file)?;
            if let Some(len) = len.filter(|len| *len != bytes.len()) {
                return Err(miette!("{}: {} bytes of {what}, and --{what}-len says {len}", file.display(), bytes.len()));
            }
            bytes
        }
        (None, true) if len.unwrap_or(0) > 0 => {
            return Err(miette!("{what} of this command goes to the controller: --{option}input says where it is (- = standard input)"));
        }
        (None, _) => vec![0; len.unwrap_or(0)],
    };
    match bytes.len() {
        len if !len.is_multiple_of(4) => Err(miette!("{len} bytes of {what} are not a multiple of 4")),
        _ => Ok(bytes),
    }
}

fn read(file: &Path) -> miette::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = MOST_BYTES as u64 + 1;
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.into_diagnostic().wrap_err_with(|| file.display().to_string())?;
    if bytes.len() > MOST_BYTES {
        return Err(miette!("{}: more than {MOST_BYTES} bytes", file.display()));
    }
    Ok(bytes)
}

fn number(text: &str) -> Result<u64, String> {
    let text = text.replace('_', "");
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "no number: write 12 or 0x0c".to_owned())
}

fn byte(text: &str) -> Result<u8, String> {
    u8::try_from(number(text)?).map_err(|_| "more than 8 bits".to_owned())
}

fn dword(text: &str) -> Result<u32, String> {
    u32::try_from(number(text)?).map_err(|_| "more than 32 bits".to_owned())
}

fn length(text: &str) -> Result<usize, String> {
    let bytes = number(text).or_else(|_| text.parse::<Size>().map(|size| size.0))?;
    usize::try_from(bytes).ok().filter(|bytes| *bytes <= MOST_BYTES).ok_or_else(|| format!("more than {MOST_BYTES} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: PassthruArgs,
    }

    fn plan(line: &str) -> Result<Plan, String> {
        let words = std::iter::once("passthru").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        line.args.plan().map_err(|error| error.to_string())
    }

    #[test]
    fn numbers_and_sizes_are_read_as_people_write_them() {
        let all = "/dev/ng0n1 --opcode 0x02 --nsid 7 --cdw2 2 --cdw3 0x3 --cdw10 0xffff_ffff --cdw15 15 --data-len 4KiB --timeout 9";
        let plan = plan(all).expect("a command");
        let entry = plan.entry;
        assert_eq!((entry.cdw0.opcode(), entry.nsid, entry.cdw2, entry.cdw3), (2, 7, 2, 3));
        assert_eq!((entry.cdw10, entry.cdw11, entry.cdw15), (u32::MAX, 0, 15));
        assert_eq!((plan.data.len(), plan.direction, plan.timeout_ms), (4096, Direction::FromController, 9));
        assert_eq!((length("0x200"), length("512"), number("x").is_err()), (Ok(512), Ok(512), true));
        assert!(byte("256").is_err() && dword("0x100000000").is_err() && length("1TiB").is_err());
    }

    #[test]
    fn the_way_of_data_is_that_of_the_opcode() {
        let plain = plan("d --opcode 0").expect("a command");
        assert_eq!((plain.direction, plain.data.len()), (Direction::None, 0));
        let vendor = plan("d --opcode 0xc0 --data-len 8 --read").expect("a command");
        assert_eq!(vendor.direction, Direction::FromController);
        for (line, says) in [
            ("d --opcode 2 --data-len 512 --write", "from the controller"),
            ("d --opcode 1 --data-len 512 --read", "to the controller"),
            ("d --opcode 1 --data-len 512", "--input says where"),
            ("d --opcode 1 --metadata-len 8", "--metadata-input says where"),
            ("d --opcode 2 --data-len 510", "multiple of 4"),
            ("d --opcode 2 --input x", "comes from the controller"),
            ("d --opcode 2 --output x", "--data-len says"),
            ("d --opcode 1 --input /proc/version --data-len 4", "--data-len says 4"),
        ] {
            let said = plan(line).expect_err(line);
            assert!(said.contains(says), "{line}: {said}");
        }
    }

    #[test]
    fn input_gives_the_length() {
        let file = std::env::temp_dir().join(format!("dray-passthru-input-{}", std::process::id()));
        std::fs::write(&file, [7; 512]).expect("a file");
        let plan = plan(&format!("d --opcode 1 --input {}", file.display())).expect("a command");
        assert_eq!((plan.data, plan.direction), (vec![7; 512], Direction::ToController));
        std::fs::remove_file(&file).expect("clean up");
    }
}
