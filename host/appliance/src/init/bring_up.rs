//! The way up: modules, partitions, the configuration and what its table `[image]` says.

use super::board::Board;
use super::cmdline::CommandLine;
use super::journal::Journal;
use super::modalias::{self, Aliases};
use super::loader::{Loader, PATIENCE, Rank, Ticket};
use super::modules::{self, Loaded, Module, Sets};
use super::mounts;
use crate::assembly::file_of;
use crate::config::device::{Device, Way};
use crate::config::image::{HUGE_PAGE_BYTES, Image};
use crate::config::{Config, ConfigError};
use rustix::mount::{MountFlags, mount};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The configuration that the image carries, for a machine that brings none.
const CARRIED_CONFIG: &str = "/etc/dray/appliance.toml";
/// The configuration's file in its partition.
const CONFIG_FILE: &str = "/config/appliance.toml";
/// How long the partitions of a disk that was booted are waited for, when the drivers of disks are there.
const DISK_PATIENCE: Duration = Duration::from_secs(20);
/// How long those of a disk that may not be there are, where something brings disks some time after its driver: a kernel that was
/// booted directly.
const DIRECT_PATIENCE: Duration = Duration::from_millis(1500);
/// The set with the file system of the configuration's partition.
const FAT_SET: &str = "fat";
/// That with the file system of the state's.
const EXT4_SET: &str = "ext4";
/// Those with disks.
const DISK_SETS: [&str; 2] = ["disk", "scsi"];
/// That with network cards.
const NET_SET: &str = "net";
/// How often they are looked for: each time takes a processor a millisecond or two where it is emulated.
const LOOK: Duration = Duration::from_millis(15);
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
    /// Loads them.
    pub loader: Loader,
    /// Sets that were put into its queue.
    begun: BTreeMap<String, Vec<Ticket>>,
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
        let (of_loader, folder, debug) = (journal.clone(), modules::folder(), line.debug);
        let loader = Loader::new(move |module| load(&of_loader, &folder, module, debug));
        let (begun, left_out) = (BTreeMap::new(), BTreeSet::new());
        Self { line, sets, loader, begun, aliases, left_out, journal: journal.clone() }
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

    /// Begins to load sets of modules. Of those that were begun before, only what was left out and has a device by now.
    fn load_sets(&mut self, rank: Rank, names: &[&str], devices: &[String]) {
        for name in names {
            let again = self.begun.contains_key(*name);
            let tickets = self.begun.entry((*name).into()).or_default();
            let Some(chains) = self.sets.of(name) else {
                // What is not asked for by name need not be there: a kernel may have all of it built in.
                if !again && !modules::is_own(name) {
                    let known = self.sets.names().join(", ");
                    self.journal.say(&format!("this image has no set of modules \"{name}\"; there are: {known}"));
                }
                continue;
            };
            let mut wanted = Vec::new();
            for chain in chains {
                let mut left = Vec::new();
                for module in &chain.modules {
                    let before = self.left_out.contains(&module.path);
                    if again && !before {
                        continue;
                    }
                    if chain.always || self.aliases.wants(&module.path, devices) {
                        self.left_out.remove(&module.path);
                        left.push(module.clone());
                    } else if !again {
                        self.left_out.insert(module.path.clone());
                    }
                }
                wanted.extend((!left.is_empty()).then_some(left));
            }
            tickets.push(self.loader.put(rank, wanted));
        }
    }

    fn tickets(&self, sets: &[&str]) -> Vec<Ticket> {
        sets.iter().filter_map(|set| self.begun.get(*set)).flatten().copied().collect()
    }

    fn wait_for(&self, sets: &[&str]) {
        if !self.loader.wait(&self.tickets(sets), PATIENCE) {
            let seconds = PATIENCE.as_secs();
            self.journal.say(&format!("modules of {} are not loaded after {seconds} s; the start goes on", sets.join(", ")));
        }
    }

    /// Begins with what is needed before the configuration is known.
    pub fn begin(&mut self) {
        let mut sets = modules::FIRST;
        if self.line.slot.is_none() {
            // Whether there is a disk at all is known last.
            sets.reverse();
        }
        if self.wants_config() || self.wants_state() {
            self.load_sets(Rank::Now, &sets, &modalias::devices(Path::new(modalias::BUSES)));
        }
    }

    fn wants_config(&self) -> bool {
        self.line.config.is_none()
    }

    fn wants_state(&self) -> bool {
        !self.line.state_in_memory
    }

    /// Waits for the partitions that are needed, and mounts that of the configuration.
    pub fn find_partitions(&self) {
        let wanted: Vec<_> = [(self.wants_config(), mounts::CONFIG), (self.wants_state(), mounts::STATE)]
            .into_iter()
            .filter_map(|(wanted, name)| wanted.then_some(name))
            .collect();
        let disks = self.tickets(&DISK_SETS);
        let (mut loaded, mut end) = (false, Instant::now() + PATIENCE);
        loop {
            // Looked at before the partitions: what is there when the drivers are is seen.
            if !loaded && disks.iter().all(|ticket| self.loader.is_done(*ticket)) {
                loaded = true;
                end = Instant::now() + self.patience();
            }
            if mounts::are_there(&wanted) || Instant::now() >= end {
                break;
            }
            std::thread::sleep(LOOK);
        }
        // Other disks have time, and what mounts partitions that are not there.
        let mut have_time = disks;
        for (name, set) in [(mounts::CONFIG, FAT_SET), (mounts::STATE, EXT4_SET)] {
            have_time.extend(mounts::find(name).map_or_else(|| self.tickets(&[set]), |_| Vec::new()));
        }
        self.loader.set_rank(&have_time, Rank::Later);
        if self.wants_config() {
            self.mount_config();
        }
    }

    /// How long partitions are waited for when the drivers of all disks are there.
    fn patience(&self) -> Duration {
        if self.line.slot.is_some() {
            return DISK_PATIENCE;
        }
        let devices = modalias::devices(Path::new(modalias::BUSES));
        if modalias::may_bring_disks_later(&devices) { DIRECT_PATIENCE } else { Duration::ZERO }
    }

    /// Mounts the configuration's partition, if it is there.
    pub fn mount_config(&self) {
        let Some((partition, more)) = mounts::find(mounts::CONFIG) else { return };
        self.say_more(&partition, more);
        self.wait_for(&[FAT_SET]);
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

    /// Mounts the state's partition, if it is there and wanted.
    pub fn mount_state(&self, board: &Board) -> StatePlace {
        let place = if self.wants_state() { self.mount_state_partition() } else { memory() };
        board.set(|known| {
            known.state = match &place {
                StatePlace::Partition => format!("the partition {}", mounts::STATE),
                StatePlace::Memory => "in memory: lost when the power goes".into(),
                StatePlace::Nowhere(why) => why.clone(),
            };
        });
        place
    }

    fn mount_state_partition(&self) -> StatePlace {
        let Some((partition, more)) = mounts::find(mounts::STATE) else {
            if self.line.slot.is_none() {
                let what = format!("no partition {}", mounts::STATE);
                self.journal.say(&format!("{what}: durable records are kept in memory, and lost when the power goes"));
                return memory();
            }
            return self.no_state(format!("the partition {} is not there", mounts::STATE));
        };
        self.say_more(&partition, more);
        self.wait_for(&[EXT4_SET]);
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

    /// Begins to load what the configuration needs, and then the rest.
    pub fn load_modules(&mut self, image: &Image, config: Option<&Config>) {
        let all: Vec<String> = match &image.modules {
            Some(sets) => sets.iter().map(|set| set.get_ref().clone()).collect(),
            None => self.sets.names().into_iter().map(str::to_owned).collect(),
        };
        let asked = all.iter().map(String::as_str).filter(|set| !modules::is_own(set));
        let (now, later): (Vec<_>, Vec<_>) = asked.partition(|set| *set == NET_SET || config.is_some_and(wants_hardware));
        let devices = modalias::devices(Path::new(modalias::BUSES));
        self.load_sets(Rank::Now, &now, &devices);
        self.load_sets(Rank::Now, &[modules::POWER], &devices);
        self.load_sets(Rank::Later, &later, &devices);
        self.load_sets(Rank::Later, &modules::FIRST, &devices);
        self.load_sets(Rank::Later, &[modules::LAST], &devices);
    }

    /// Waits for what the configuration needs before the appliance is started.
    pub fn wait_for_modules(&self, config: &Config) {
        if wants_hardware(config) {
            self.wait_for(&self.begun.keys().map(String::as_str).filter(|set| *set != modules::LAST).collect::<Vec<_>>());
        }
    }

    /// Waits until the power button is there, and lets the rest be loaded: nothing else has to be waited for.
    pub fn settle(&self) {
        self.wait_for(&[modules::POWER]);
        self.loader.release();
    }

    /// Does what `[image]` says of the host's name and huge pages.
    pub fn apply(&self, image: &Image, board: &Board) {
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

/// Whether a configuration opens what the kernel or VFIO has to have a driver for, beside the network and the state partition.
fn wants_hardware(config: &Config) -> bool {
    let elsewhere = |path: PathBuf| !path.starts_with(mounts::STATE_FOLDER);
    let mut namespaces = config.file.subsystems.iter().flat_map(|subsystem| &subsystem.namespaces);
    let here = |device: &Device| !matches!(device.way(), Some(Way::NvmeTcp(_)));
    config.file.devices.iter().any(here) || namespaces.any(|namespace| file_of(config, namespace).is_some_and(elsewhere))
}

fn load(journal: &Journal, folder: &Path, module: &Module, debug: bool) {
    let (path, begun) = (module.path.display(), Instant::now());
    match modules::load(folder, module) {
        Loaded::Refused(error) => journal.say(&format!("module {path}: {error}")),
        Loaded::Now if debug => journal.say(&format!("module {path} ({} ms)", begun.elapsed().as_millis())),
        Loaded::Now | Loaded::NotNeeded => {}
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
