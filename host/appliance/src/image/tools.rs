//! Finding and running e2fsprogs.

use super::ImageError;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Where a tool is. Debian's ordinary users do not have the sbin folders in PATH.
pub(super) fn find(tool: &'static str) -> Result<PathBuf, ImageError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(tool))
        .find(|file| file.is_file())
        .ok_or(ImageError::NoTool(tool))
}

/// Runs a tool to its end, without input, in the C locale.
pub(super) fn run(tool: &'static str, prepare: impl FnOnce(&mut Command)) -> Result<Output, ImageError> {
    let program = find(tool)?;
    let mut command = Command::new(&program);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    prepare(&mut command);
    command.output().map_err(ImageError::io(Path::new(&program)))
}

/// Runs a tool whose exit status must be one of `good`; returns what it printed.
pub(super) fn run_ok(
    tool: &'static str,
    good: &[i32],
    prepare: impl FnOnce(&mut Command),
) -> Result<String, ImageError> {
    let output = run(tool, prepare)?;
    let code = output.status.code();
    if code.is_some_and(|code| good.contains(&code)) {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(ImageError::Tool { tool, status: output.status.to_string(), text: last_words(&output) })
}

/// The end of what a tool said, errors last.
pub(super) fn last_words(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(8)..].join("; ")
}
