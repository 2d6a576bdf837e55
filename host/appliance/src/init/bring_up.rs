//! The way up: modules, partitions, the configuration and what its table `[image]` says.

use super::board::Board;
use super::cmdline::CommandLine;
use super::journal::Journal;
use super::modalias::{self, Aliases};
use super::modules::{self, Loaded, Module, Sets};
use super::mounts;
use crate::config::image::{HUGE_PAGE_BYTES, Image};
use crate::config::{Config, ConfigError};
use rustix::mount::{MountFlags, mount};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The configuration that the image carries, for a machine that brings none.
const CARRIED_CONFIG: &str = "/etc/dray/appliance.toml";
/// The configuration's file in its partition.
const CONFIG_FILE: &str = "/config/appliance.toml";
/// How long the partitions of a disk that was booted are waited for.
const DISK_PATIENCE: Duration = Duration::from_secs(20);
/// How long those of a disk that may not be there are: a kernel that was booted directly.
const DIRECT_PATIENCE: Duration = Duration::from_millis(1500);
/// How often they are looked for.
const LOOK: Duration = Duration::from_millis(5);
/// Most descriptors of a process.
const DESCRIPTORS: u64 = 65_536;

/// Where durable records are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatePlace {
    /// On the partition.
    Partition,
    /// In memory.
    Memory,
    /// Nowhere: the appliance must not serve.
    Nowhere(String),
}

/// A configuration, or why there is none, and the `[image]` that is in force.
pub struct Read {
    /// The configuration.
    pub config: Result<Arc<Config>, String>,
    /// Its `[image]`, or what is right of it.
    pub image: Image,
}

/// Everything that is done before the configuration is known, and how.
pub struct BringUp {
    /// The kernel's command line.
    pub line: CommandLine,
    /// The sets of modules.
    pub sets: Sets,
    loaded: BTreeSet<String>,
    aliases: Aliases,
    /// Modules that were left out: none of their devices was there.
    left_out: BTreeSet<PathBuf>,
    journal: Journal,
}

impl BringUp {
    /// Reads the command line and the list of modules.
    #[must_use]
    pub fn new(journal: &Journal) -> Self {
        let line = CommandLine::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default());
        for word in &line.odd {
            journal.say(&format!("the kernel's command line has \"{word}\", which says nothing"));
        }
        let sets = Sets::parse(&std::fs::read_to_string(modules::LIST).unwrap_or_default());
        for odd in &sets.odd {
            journal.say(&format!("{} has a line that says nothing: {odd}", modules::LIST));
        }
        let aliases = Aliases::parse(&std::fs::read_to_string(modalias::LIST).unwrap_or_default());
        let (loaded, left_out) = (BTreeSet::new(), BTreeSet::new());
        Self { line, sets, loaded, aliases, left_out, journal: journal.clone() }
    }

    /// Settings of the kernel that depend on nothing.
    pub fn set_up_kernel(&self) {
        use rustix::process::{Resource, Rlimit, setrlimit};
        // Ctrl-Alt-Del is a signal to PID 1 from now on, no restart at once.
        if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::CadOff) {
            self.journal.say(&format!("Ctrl-Alt-Del restarts without a stop: {error}"));
        }
        let limit = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            self.journal.say(&format!("the limit of descriptors stays as it is: {error}"));
        }
    }

    /// Loads sets of modules. Of those that were loaded before, only what was left out and has a device by now.
    pub fn load_sets(&mut self, names: &[&str]) {
        let devices = modalias::devices(Path::new(modalias::BUSES));
        for name in names {
            let again = !self.loaded.insert((*name).into());
            let Some(modules) = self.sets.of(name) else {
                // The first ones need not be there: a kernel may have all of them built in.
                if !again && !modules::FIRST.contains(name) {
                    let known = self.sets.names().join(", ");
                    self.journal.say(&format!("this image has no set of modules \"{name}\"; there are: {known}"));
                }
                continue;
            };
            for module in modules {
                let before = self.left_out.contains(&module.path);
                if again && !before {
                    continue;
                }
                if self.aliases.wants(&module.path, &devices) {
                    self.left_out.remove(&module.path);
                    self.load(module);
                } else if !before {
                    self.left_out.insert(module.path.clone());
                }
            }
        }
    }

    fn load(&self, module: &Module) {
        let path = module.path.display();
        match modules::load(&modules::folder(), module) {
            Loaded::Refused(error) => self.journal.say(&format!("module {path}: {error}")),
            Loaded::Now if self.line.debug => self.journal.say(&format!("module {path}")),
            Loaded::Now | Loaded::NotNeeded => {}
        }
    }

    /// Waits for the partitions that are needed, and mounts them.
    pub fn mount_partitions(&self, board: &Board) -> StatePlace {
        let wants_config = self.line.config.is_none();
        let wants_state = !self.line.state_in_memory;
        let patience = if self.line.slot.is_some() { DISK_PATIENCE } else { DIRECT_PATIENCE };
        let end = Instant::now() + patience;
        loop {
            let config = !wants_config || mounts::find(mounts::CONFIG).is_some();
            let state = !wants_state || mounts::find(mounts::STATE).is_some();
            if (config && state) || Instant::now() >= end {
                break;
            }
            std::thread::sleep(LOOK);
        }
        if wants_config {
            self.mount_config();
        }
        let place = if wants_state { self.mount_state() } else { memory() };
        board.set(|known| {
            known.state = match &place {
                StatePlace::Partition => format!("the partition {}", mounts::STATE),
                StatePlace::Memory => "in memory: lost when the power goes".into(),
                StatePlace::Nowhere(why) => why.clone(),
            };
        });
        place
    }

    /// Mounts the configuration's partition, if it is there.
    pub fn mount_config(&self) {
        let Some((partition, more)) = mounts::find(mounts::CONFIG) else { return };
        self.say_more(&partition, more);
        if let Err(error) = mounts::mount_config(&partition) {
            self.journal.say(&error.to_string());
        }
    }

    fn say_more(&self, partition: &mounts::Partition, more: bool) {
        if more {
            let (name, device) = (&partition.name, partition.device.display());
            self.journal.say(&format!("there are several partitions {name}; {device} is taken"));
        }
    }

    fn mount_state(&self) -> StatePlace {
        let Some((partition, more)) = mounts::find(mounts::STATE) else {
            if self.line.slot.is_none() {
                let what = format!("no partition {}", mounts::STATE);
                self.journal.say(&format!("{what}: durable records are kept in memory, and lost when the power goes"));
                return memory();
            }
            return self.no_state(format!("the partition {} is not there", mounts::STATE));
        };
        self.say_more(&partition, more);
        match mounts::mount_state(&partition) {
            Ok(()) => StatePlace::Partition,
            Err(error) => self.no_state(format!("{error}; it is left as it is: repair it, or make it anew with mkfs.ext4")),
        }
    }

    fn no_state(&self, why: String) -> StatePlace {
        self.journal.say(&format!("not serving: {why}"));
        StatePlace::Nowhere(why)
    }

    /// Where the configuration is.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        let in_partition = || is_mounted(mounts::CONFIG_FOLDER).then(|| CONFIG_FILE.into());
        self.line.config.clone().or_else(in_partition).unwrap_or_else(|| CARRIED_CONFIG.into())
    }

    /// Reads the configuration.
    #[must_use]
    pub fn read_config(&self, path: &Path) -> Read {
        match Config::read(path) {
            Ok(config) => Read { image: config.file.image.clone(), config: Ok(Arc::new(config)) },
            Err(error) => {
                let text = std::fs::read_to_string(path).unwrap_or_default();
                Read { config: Err(in_words(error)), image: Image::salvage(&text).unwrap_or_default() }
            }
        }
    }

    /// Does what `[image]` says of modules, the host's name and huge pages.
    pub fn apply(&mut self, image: &Image, board: &Board) {
        let all: Vec<String> = match &image.modules {
            Some(sets) => sets.iter().map(|set| set.get_ref().clone()).collect(),
            None => self.sets.names().into_iter().map(str::to_owned).collect(),
        };
        self.load_sets(&all.iter().map(String::as_str).collect::<Vec<_>>());
        let name = image.host_name();
        if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
            self.journal.say(&format!("the host's name cannot be set: {error}"));
        }
        board.set(|known| known.host = name.into());
        if let Some(size) = &image.hugepages {
            self.set_huge_pages(size.get_ref().0 / HUGE_PAGE_BYTES);
        }
    }

    fn set_huge_pages(&self, wanted: u64) {
        const FILE: &str = "/proc/sys/vm/nr_hugepages";
        let set = std::fs::write(FILE, wanted.to_string()).and_then(|()| std::fs::read_to_string(FILE));
        match set.map(|text| text.trim().parse::<u64>().unwrap_or(0)) {
            Ok(got) if got >= wanted => {}
            Ok(got) => self.journal.say(&format!("huge pages: {got} of {wanted} pages of 2 MiB; memory has no room for more")),
            Err(error) => self.journal.say(&format!("huge pages cannot be set aside: {error}")),
        }
    }
}

/// A configuration's error, as `dray config check` prints it.
#[must_use]
pub fn in_words(error: ConfigError) -> String {
    format!("{:?}", miette::Report::new(error))
}

fn memory() -> StatePlace {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let made = std::fs::create_dir_all(mounts::STATE_FOLDER);
    match made.and_then(|()| Ok(mount("tmpfs", mounts::STATE_FOLDER, "tmpfs", flags, c"mode=0700")?)) {
        Ok(()) => StatePlace::Memory,
        Err(error) => StatePlace::Nowhere(format!("no memory for durable records: {error}")),
    }
}

fn is_mounted(place: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(place))
}
