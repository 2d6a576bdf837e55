//! The configuration as the durable records have it.
//!
//! A media move has left a namespace in another file than the configuration's, a migration has left it with another subsystem: a
//! look at what the configuration names would show an old copy, or open files that somebody serves.

use super::Device;
use crate::backings;
use crate::config::{Config, Role};
use crate::recovery::{Records, StateLock};
use crate::run;
use dray_migration::Owner;
use miette::{IntoDiagnostic, WrapErr, miette};
use std::path::Path;

/// A configuration that says what serves. As long as it lives no appliance can start on its state folder.
#[derive(Debug)]
pub(super) struct Followed {
    pub(super) config: Config,
    /// The end of `[migration]` that does not serve, and the one that does.
    moved: Option<[String; 2]>,
    _state: Option<StateLock>,
}

impl Followed {
    /// Reads a configuration and the records beside it.
    ///
    /// # Errors
    /// The configuration's and the records'; a running appliance, which has the files open.
    pub(super) fn read(file: &Path) -> miette::Result<Self> {
        let mut config = Config::read(file)?;
        let state = config.path(&config.file.core.state);
        // Looking makes nothing: where nobody has ever served there is no record.
        if !state.join("lock").exists() {
            return Ok(Self { config, moved: None, _state: None });
        }
        if let Some(pid) = run::process_of(&config) {
            return Err(miette!(
                help = "`dray status` shows its controllers; `dray device identify vfio-user:PATH` shows one that it exports",
                "the appliance runs on {}, process {pid}: its namespaces are its own",
                state.display()
            ));
        }
        let lock = StateLock::take(&state).into_diagnostic().wrap_err_with(|| format!("the state folder {}", state.display()))?;
        backings::look(&mut config)?;
        let serving = Records::open(&config)?.serving()?;
        let migration = &config.file.migration;
        let ends = [migration.from.get_ref().clone(), migration.to.get_ref().clone()];
        let moved = (serving == Owner::Destination).then_some(ends);
        Ok(Self { config, moved, _state: Some(lock) })
    }

    /// The subsystem that serves a controller's namespaces instead of its own, if they were moved away.
    pub(super) fn elsewhere(&self, device: &Device<'_>) -> Option<&str> {
        let [from, to] = self.moved.as_ref()?;
        let is_moved = device.controller.role == Role::Migratable && device.subsystem.name.get_ref() == from;
        is_moved.then_some(to.as_str())
    }
}
