//! Debian packages: installed as root, or unpacked into a folder of ours; [`suite`] is for those of another release.

pub mod suite;

use crate::Outcome;
use crate::process::{agreed, command, find, interactive, is_root, output, run};
use crate::tree::replace;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What `apt-get --simulate install` would do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Packages with their versions that would be installed or upgraded.
    pub installs: Vec<(String, String)>,
    /// Packages that would go.
    pub removes: Vec<String>,
}

impl Plan {
    fn parse(simulation: &str) -> Self {
        let mut plan = Self::default();
        for line in simulation.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Inst"), Some(name)) => {
                    // `Inst NAME [installed version] (version origin [architecture])`
                    let version = words.find_map(|word| word.strip_prefix('(')).unwrap_or_default();
                    plan.installs.push((name.into(), version.into()));
                }
                (Some("Remv"), Some(name)) => plan.removes.push(name.into()),
                _ => {}
            }
        }
        plan
    }

    /// The version of a package that would be installed.
    pub fn version(&self, package: &str) -> Option<&str> {
        self.installs.iter().find(|(name, _)| name == package).map(|(_, version)| version.as_str())
    }
}

/// Programs of a Debian package that must be there; the package is installed if one is not and we may.
pub fn need(package: &str, programs: &[&str], yes: bool) -> Outcome {
    let missing: Vec<_> = programs.iter().copied().filter(|program| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join(", ");
    if find("apt-get").is_none() {
        return Err(format!("{missing} not found: install your system's package of {package}"));
    }
    if !is_root() {
        return Err(format!("{missing} not found: run `sudo apt-get install {package}`, then this again"));
    }
    agreed(&format!("{missing} not found. Install Debian's package {package}?"), yes)?;
    eprintln!("installing {package} (for {missing})");
    update(&[])?;
    install(&[package])
}

fn apt_get(options: &[String]) -> Command {
    let mut apt = command("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=120"]).args(options);
    if !interactive() {
        apt.arg("-qq");
    }
    apt
}

/// Refreshes the package lists.
pub fn update(options: &[String]) -> Outcome {
    run(apt_get(options).arg("update"))
}

/// What installing would do; without recommended packages.
pub fn simulate(options: &[String], packages: &[&str]) -> Outcome<Plan> {
    let text = output(apt_get(options).args(["--simulate", "--no-install-recommends", "install"]).args(packages))?;
    Ok(Plan::parse(&text))
}

/// Installs packages without those that they recommend.
pub fn install(packages: &[&str]) -> Outcome {
    run(apt_get(&[]).args(["--yes", "--no-install-recommends", "install"]).args(packages))
}

/// apt's options for lists and caches of our own under `folder`; what the system has installed stays known.
pub fn private(folder: &Path) -> Outcome<Vec<String>> {
    for part in ["lists/partial", "cache/archives/partial"] {
        let path = folder.join(part);
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let mut options = vec![
        format!("Dir::State::Lists={}", folder.join("lists").display()),
        format!("Dir::Cache={}", folder.join("cache").display()),
        "Dir::State::status=/var/lib/dpkg/status".into(),
        "Debug::NoLocking=1".into(),
    ];
    if is_root() {
        // apt's own user may not be able to write here.
        options.push("APT::Sandbox::User=root".into());
    }
    Ok(options.into_iter().flat_map(|option| ["-o".into(), option]).collect())
}

/// Fetches what `plan` names and unpacks it under `root`, which exists afterwards only if all of it did.
pub fn unpack(options: &[String], plan: &Plan, folder: &Path, root: &Path) -> Outcome {
    let (debs, part) = (folder.join("debs"), folder.join("unpacking"));
    for path in [&debs, &part, root] {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(format!("{}: {error}", path.display())),
            _ => {}
        }
    }
    for path in [&debs, &part] {
        fs::create_dir_all(path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let names: Vec<_> = plan.installs.iter().map(|(name, version)| format!("{name}={version}")).collect();
    run(apt_get(options).arg("download").args(&names).current_dir(&debs))?;
    let listed = fs::read_dir(&debs).map_err(|error| format!("{}: {error}", debs.display()))?;
    for package in listed.flatten() {
        run(command("dpkg").arg("-x").arg(package.path()).arg(&part))?;
    }
    replace(&part.join("packages"), names.join("\n").as_bytes())?;
    fs::rename(&part, root).map_err(|error| format!("{}: {error}", root.display()))?;
    // Only caches from here on: what stays of them is disk space, no error.
    let _ = fs::remove_dir_all(&debs);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulation_is_read_with_upgrades_and_removals() {
        let plan = Plan::parse(
            "NOTE: only a simulation\n\
             Remv rustc [1.63.0]\n\
             Inst libllvm22 (1:22.1.8-1~deb12u1 Debian-Security:12/oldstable-security [amd64])\n\
             Inst libxml2 [2.9.14] (2.9.15 Debian:12/oldstable [amd64])\n\
             Inst rustc-web (1.96.0+dfsg1-1~deb12u2 Debian-Security:12/oldstable-security [amd64]) []\n\
             Conf rustc-web (1.96.0+dfsg1-1~deb12u2 Debian-Security:12/oldstable-security [amd64])\n",
        );
        assert_eq!(plan.removes, ["rustc"]);
        assert_eq!(plan.installs.len(), 3);
        assert_eq!(plan.version("libxml2"), Some("2.9.15"));
        assert_eq!(plan.version("rustc-web"), Some("1.96.0+dfsg1-1~deb12u2"));
        assert_eq!(plan.version("rustc"), None);
    }

    #[test]
    fn a_program_that_is_there_needs_nothing() {
        assert_eq!(need("no-such-package", &["sh"], false), Ok(()));
    }
}
