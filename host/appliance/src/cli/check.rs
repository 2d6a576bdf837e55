//! `dray config check`.

use crate::config::Config;
use std::path::Path;
use std::process::ExitCode;

/// Reads and checks a configuration.
pub(super) fn run(file: &Path) -> miette::Result<ExitCode> {
    let config = Config::read(file)?;
    for subsystem in &config.file.subsystems {
        let (namespaces, controllers) = (subsystem.namespaces.len(), subsystem.controllers.len());
        println!("subsystem \"{}\": {controllers} controllers, {namespaces} namespaces", subsystem.name.get_ref());
    }
    let migration = &config.file.migration;
    println!("migration from \"{}\" to \"{}\", downtime at most {}", migration.from.get_ref(), migration.to.get_ref(), migration.downtime);
    println!("{}: good", file.display());
    Ok(ExitCode::SUCCESS)
}
