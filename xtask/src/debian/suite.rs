//! Packages of another Debian release, beside the one that the machine runs: lists, caches and sources of our own.

use crate::Outcome;
use crate::debian::{self, Plan};
use crate::process::{command, find, output};
use crate::tree::{read_text, replace};
use std::path::Path;

/// Debian's own keys, where the package of that name puts them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt of our own that sees some suites and believes that nothing is installed.
pub struct Suite {
    options: Vec<String>,
}

impl Suite {
    /// Refreshes the lists of `suites`, which are looked for where the machine has its own release from.
    pub fn open(folder: &Path, suites: &[&str]) -> Outcome<Self> {
        if find("apt-get").is_none() || find("dpkg").is_none() {
            return Err("Debian's packages are unpacked, which takes apt-get and dpkg".into());
        }
        let release = read_text(Path::new("/etc/os-release"))?;
        let codename = codename(&release).ok_or("/etc/os-release has no VERSION_CODENAME")?;
        let uris = output(command("apt-get").args(["update", "--print-uris"]))?;
        let archive = archive(&uris, codename).ok_or_else(|| format!("apt has no source for {codename}, the release of this machine"))?;
        let mut options = debian::private(folder)?;
        let (sources, status) = (folder.join("sources.list"), folder.join("status"));
        let signed = if Path::new(KEYRING).is_file() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let lines: Vec<_> = suites.iter().map(|suite| format!("deb {signed}{archive} {suite} main\n")).collect();
        replace(&sources, lines.concat().as_bytes())?;
        replace(&status, b"")?;
        for option in [
            format!("Dir::State::status={}", status.display()),
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Dir::Etc::preferences=/dev/null".into(),
            "Dir::Etc::preferencesparts=/dev/null".into(),
            "APT::Default-Release=".into(),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
        ] {
            options.extend(["-o".into(), option]);
        }
        debian::update(&options)?;
        Ok(Self { options })
    }

    /// The packages with all that they depend on, taken from `suite` where it has them.
    pub fn plan(&self, suite: Option<&str>, packages: &[&str]) -> Outcome<Plan> {
        let from: Vec<&str> = suite.into_iter().flat_map(|suite| ["-t", suite]).collect();
        debian::simulate(&self.options, &[&from[..], packages].concat())
    }

    /// The kernel that the package `name` stands for, alone: what it depends on makes a RAM disk for a machine, and we make our own.
    pub fn kernel(&self, name: &str) -> Outcome<Plan> {
        let mut plan = self.plan(None, &[name])?.only(&["linux-image-"], &[]);
        plan.installs.retain(|(package, _)| package != name);
        match plan.installs.len() {
            1 => Ok(plan),
            _ => Err(format!("{name} names no single kernel: {:?}", plan.installs)),
        }
    }

    /// Fetches and unpacks each part into its folder under `folder`; says how much. Returns `NAME=VERSION` of all packages.
    pub fn unpack_parts(&self, who: &str, parts: &[(&str, &Plan)], folder: &Path) -> Outcome<Vec<String>> {
        let mut names = Vec::new();
        for (part, plan) in parts {
            eprintln!("{who}: {part}: {} packages, {} MB", plan.installs.len(), self.bytes(plan)?.div_ceil(1_000_000));
            self.unpack(plan, folder, &folder.join(part))?;
            names.extend(plan.installs.iter().map(|(name, version)| format!("{name}={version}")));
        }
        Ok(names)
    }

    /// What fetching takes.
    fn bytes(&self, plan: &Plan) -> Outcome<u64> {
        let names = plan.installs.iter().map(|(name, version)| format!("{name}={version}"));
        let uris = output(command("apt-get").args(&self.options).args(["--print-uris", "download"]).args(names))?;
        Ok(uris.lines().filter_map(size).sum())
    }

    /// Fetches and unpacks into `root`; `cache` holds what is in between.
    fn unpack(&self, plan: &Plan, cache: &Path, root: &Path) -> Outcome {
        debian::unpack(&self.options, plan, cache, root)
    }
}

impl Plan {
    /// Without packages that only maintain a system: what starts with one of `kinds` or is in `asked` stays.
    pub fn only(mut self, kinds: &[&str], asked: &[&str]) -> Self {
        self.installs.retain(|(name, _)| asked.contains(&name.as_str()) || kinds.iter().any(|kind| name.starts_with(kind)));
        self
    }
}

/// The major number of a version with or without an epoch.
pub fn major(version: &str) -> Option<u32> {
    version.rsplit(':').next()?.split('.').next()?.parse().ok()
}

fn codename(os_release: &str) -> Option<&str> {
    let line = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(line.trim_matches('"'))
}

/// The archive's address in what `apt-get update --print-uris` prints: the part before `/dists/CODENAME/`.
fn archive<'a>(uris: &'a str, codename: &str) -> Option<&'a str> {
    let dists = format!("/dists/{codename}/");
    uris.lines().find_map(|line| line.strip_prefix('\'')?.split_once(&dists).map(|(archive, _)| archive))
}

/// The size in a line of `--print-uris`: `'ADDRESS' FILE SIZE SUM`.
fn size(line: &str) -> Option<u64> {
    line.strip_prefix('\'')?.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_the_one_of_the_machines_release() {
        let uris = "'https://tool.example/apt/dists/cloud/InRelease' tool 0 \n\
                    'http://mirror.example/debian-security/dists/bookworm-security/InRelease' a 0 \n\
                    'http://mirror.example/debian/dists/bookworm-updates/InRelease' b 0 \n\
                    'http://mirror.example/debian/dists/bookworm/InRelease' c 0 \n";
        assert_eq!(archive(uris, "bookworm"), Some("http://mirror.example/debian"));
        assert_eq!(archive(uris, "trixie"), None);
        assert_eq!(codename("NAME=x\nVERSION_CODENAME=\"bookworm\"\n"), Some("bookworm"));
    }

    #[test]
    fn sizes_and_versions_are_read() {
        assert_eq!(size("'http://mirror.example/a.deb' a_1%3a2.deb 34402644 SHA256:00"), Some(34_402_644));
        assert_eq!(size("Reading package lists..."), None);
        assert_eq!((major("1:11.1.3+ds-1~bpo13+1"), major("6.12.107-1"), major("none")), (Some(11), Some(6), None));
    }

    #[test]
    fn packages_that_maintain_a_system_are_left_out() {
        let names = ["passwd", "libc6", "nvme-cli", "systemd"];
        let plan = Plan { installs: names.map(|name| (name.to_owned(), "1".to_owned())).into(), removes: Vec::new() };
        let kept: Vec<_> = plan.only(&["lib"], &["nvme-cli"]).installs.into_iter().map(|(name, _)| name).collect();
        assert_eq!(kept, ["libc6", "nvme-cli"]);
    }
}
