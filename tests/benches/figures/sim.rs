//! How fast the simulator runs seeds: a program of its own, since it has a build of its own.

use crate::report::Report;
use crate::{Failure, Plan};
use std::process::Command;

/// The row of this module.
pub fn measure(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    if !plan.wants("sim.seeds") {
        return Ok(());
    }
    let here = std::env::current_exe()?;
    let folder = here.parent().and_then(|deps| deps.parent()).ok_or("the bench lies nowhere")?;
    let program = folder.join("examples/sim");
    let seeds = if plan.quick { "100" } else { "1500" };
    let rate = plan.median(|| {
        let mut command = Command::new(&program);
        command.args(["--threads", "1", "--from", "1", "--seeds", seeds]);
        let output = command.output().map_err(|error| format!("{}: {error}; `cargo xtask bench` builds it", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let rate = text.lines().find_map(|line| line.strip_suffix(" seeds/s per core")?.rsplit(' ').next()?.parse().ok());
        Ok(rate.ok_or_else(|| format!("{} says nothing of its speed: {text}", program.display()))?)
    })?;
    report.add("sim.seeds", rate, "1/s", "seeds per second and core: at least 2,000 guest commands, a migration and three faults each");
    Ok(())
}
