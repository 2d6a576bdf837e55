//! `dray run`.

use std::path::Path;
use std::process::ExitCode;

/// Runs the appliance until a signal ends it.
pub(super) fn run(config: &Path) -> miette::Result<ExitCode> {
    crate::run::run(config)?;
    Ok(ExitCode::SUCCESS)
}
