//! `dray serve-end`: what `dray demo --attach` starts for each end.

use super::EndArgs;
use std::path::Path;
use std::process::ExitCode;

/// Serves a subsystem until standard input ends.
pub(super) fn run(config: &Path, args: &EndArgs) -> miette::Result<ExitCode> {
    crate::apart::end::serve(config, &args.name, args.fenced, &args.file, &args.sockets)?;
    Ok(ExitCode::SUCCESS)
}
