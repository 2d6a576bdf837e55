//! The command line: what each command is called and takes. What it does is in the module of its name.

mod cdq;
mod check;
mod demo;
mod device;
mod end;
mod history;
mod image;
mod migrate;
pub(crate) mod passthru;
mod plugin;
mod run;
mod status;

pub(crate) use status::text as status_text;

use crate::config::units::Size;
use clap::{Args, Parser, Subcommand};
use passthru::PassthruArgs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

/// Dray moves NVMe namespaces between machines while their guests keep writing.
#[derive(Debug, Parser)]
#[command(name = "dray", version, propagate_version = true)]
struct Cli {
    /// The configuration.
    #[arg(long, global = true, value_name = "FILE", default_value = "appliance.toml")]
    config: PathBuf,
    /// Say more (repeat for still more).
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the appliance on its configuration: subsystems, exports, policies, until SIGTERM or Ctrl-C
    #[command(after_help = "Example: dray run --config appliance.toml")]
    Run,
    /// Show what the running appliance has: subsystems and who serves them, exports and their clients, policies, migrations
    #[command(after_help = "Example: dray status --json")]
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Move what a subsystem of the running appliance serves to another, while its clients go on
    #[command(after_help = "Example: dray migrate source --to destination\n\n\
        Ctrl-C cancels it. Exit codes: 0 moved; 1 it did not begin, or the appliance was lost; 3 undone, the source serves; \
        4 in doubt, an operator must look; 130 cancelled, the source serves.")]
    Migrate {
        /// The subsystem that is left, by its name in the configuration
        name: String,
        /// The subsystem that is moved to
        #[arg(long, value_name = "OTHER")]
        to: String,
        /// Print how it ended as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Exchange a namespace's backing for a copy in another file, while its controllers stay before their clients
    #[command(after_help = "Example: dray media-move source 1 --to /srv/copy.img\n\n\
        Ctrl-C cancels it. Exit codes: 0 moved; 1 it did not begin, or the appliance was lost; 3 undone, the old file serves; \
        4 in doubt, an operator must look; 130 cancelled, the old file serves.")]
    MediaMove {
        /// The subsystem, by its name in the configuration
        subsystem: String,
        /// The namespace
        nsid: u32,
        /// The file of the copy, which is made; or one that the namespace had before, a block device, or device:NAME/NSID for a
        /// namespace of a [[device]]
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        /// Print how it ended as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// One end of `dray demo --attach` as a process of its own
    #[command(hide = true)]
    ServeEnd(EndArgs),
    /// Move a namespace while its guest writes, compare every block, account for every write
    #[command(after_help = "Example: dray demo --rate 10000 --json | tail -n 1 | python3 -m json.tool")]
    Demo(DemoArgs),
    /// Look at controllers; take physical drives from the kernel, try them, give them back
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Look at controller data queues
    #[command(subcommand)]
    Cdq(CdqCommand),
    /// Send one NVMe command, any opcode, to a device of the kernel's, and show its status, result and data
    #[command(after_help = PASSTHRU_HELP)]
    Passthru(PassthruArgs),
    /// Look at policy components
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Show past migrations, and the namespaces as they were seen last
    #[command(after_help = "Example: dray history --json")]
    History {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Check configurations
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Look at the system slots of the image that runs here, and update it
    #[command(subcommand)]
    Image(ImageCommand),
}

const PASSTHRU_HELP: &str = "\
Examples:
  dray passthru /dev/ng0n1 --opcode 0x02 --cdw10 0 --cdw12 7 --data-len 4KiB     read 8 blocks of 512 bytes
  dray passthru /dev/nvme0 --admin --opcode 0x06 --cdw10 1 --data-len 4KiB       Identify Controller
  dray passthru /dev/ng0n1 --opcode 0xc1 --input blob.bin                        a vendor's command

Exit codes: 0 success; 1 the controller answered with another status; 2 nothing was sent (usage, no such device, refused here or
by the kernel); 3 nobody knows: it timed out, or the device went. Commands of the specification that change data are refused for a
device that is in use here, unless --force is given.";

/// What the demo can be told.
#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// Carry on where the last demo was stopped (a kill, a power cut, Ctrl-C): the durable records say which side serves; a
    /// migration that was cut short is closed, the guest goes on with its disk and its ledger
    #[arg(long, conflicts_with_all = ["image", "size", "destination", "seed"])]
    resume: bool,
    /// Run source and destination in a process each, the guest and the migration in this one, and attach them by vfio-user
    #[arg(long, value_name = "HOW")]
    attach: Option<Attach>,
    /// A raw image to move instead of the one the demo makes; it is copied first, never written
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Size of the image that the demo makes
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    size: Size,
    /// The guest's writes per second, 0 = as fast as it can [default: the configuration's]
    #[arg(long, value_name = "N")]
    rate: Option<u32>,
    /// The guest's queue depth [default: the configuration's]
    #[arg(long, value_name = "N")]
    queue_depth: Option<u16>,
    /// Where the destination's file goes [default: the configuration's]
    #[arg(long, value_name = "FILE")]
    destination: Option<PathBuf>,
    /// The component that drains the queue, or "native"
    #[arg(long, value_name = "FILE")]
    cdq: Option<PathBuf>,
    /// The component that plans the rounds, or "native"
    #[arg(long, value_name = "FILE")]
    tracking: Option<PathBuf>,
    /// The component that orders the copy, or "native"
    #[arg(long, value_name = "FILE")]
    copy: Option<PathBuf>,
    /// Milliseconds that the guest writes before the migration, and again after it
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    settle: u64,
    /// Seed of the guest's and the policies' choices
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where the source or the destination is a namespace of a device: everything on it is written over
    #[arg(long)]
    destroys_data: bool,
    /// Print the summary as one JSON object on the last line of standard output
    #[arg(long)]
    json: bool,
}

/// How the demo's guest reaches its controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Attach {
    /// By vfio-user, over Unix sockets
    VfioUser,
}

/// What an end of the demo is told.
#[derive(Clone, Debug, Args)]
struct EndArgs {
    /// The subsystem
    name: String,
    /// Where its sockets are made
    #[arg(long, value_name = "FOLDER")]
    sockets: PathBuf,
    /// Its controllers come up behind a raised fence
    #[arg(long)]
    fenced: bool,
    /// The file of a namespace
    #[arg(long, value_name = "NSID=FILE", value_parser = file_of_nsid)]
    file: Vec<(u32, PathBuf)>,
}

fn file_of_nsid(text: &str) -> Result<(u32, PathBuf), String> {
    let (nsid, path) = text.split_once('=').ok_or("no `=`")?;
    Ok((nsid.parse().map_err(|error| format!("{nsid}: {error}"))?, path.into()))
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// List controllers and namespaces of the configuration, and the machine's NVMe functions
    #[command(after_help = "Example: dray device list\n\n\
        Of each function: its driver, IOMMU group, virtual functions, what the machine uses it for, and whether it can do host managed \
        live migration (Identify, through the kernel's driver or, if vfio-pci has it and nobody uses it, by our own).\n\n\
        Files are those that serve, by the records of migrations and media moves. While an appliance runs it is refused: \
        `dray status` shows what that has.")]
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that a controller says of itself: registers, Identify structures, log pages, features
    #[command(after_help = "Example: dray device identify source:2\n\n\
        `dray device identify vfio-user:source.sock` looks at whatever NVMe controller is behind that socket, \
        `dray device identify pci:0000:01:00.0` at the drive that is bound to vfio-pci. It is reset and \
        brought up for that, and shut down again: it must be nobody else's.")]
    Identify {
        /// SUBSYSTEM:CNTLID, as `dray device list` shows them, vfio-user:PATH for an NVMe controller behind that socket, or
        /// pci:ADDRESS
        device: String,
        #[command(flatten)]
        pci: device::PciArgs,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Take an NVMe function from the kernel and give it to vfio-pci
    #[command(after_help = "Example: dray device bind 0000:01:00.0\n\n\
        Refused while a filesystem on it is mounted, it is swap space, part of LVM or RAID, opened exclusively, or the boot disk.")]
    Bind {
        /// Its PCI address
        address: String,
    },
    /// Give an NVMe function back to the kernel's driver
    #[command(after_help = "Example: dray device unbind 0000:01:00.0")]
    Unbind {
        /// Its PCI address
        address: String,
    },
    /// Make virtual functions, give each queues and interrupts and bring it online; 0 takes them away
    #[command(after_help = "Example: dray device vfs 0000:01:00.0 2\n\n\
        They live as long as whoever drives the physical function does not reset it. Where the kernel has it, the command ends when they \
        are online. Where vfio-pci has it, this command drives it, prints the VF token, and takes them away again at Ctrl-C. An appliance \
        that has it makes them itself: virtual-functions = N in its [[device]].")]
    Vfs {
        /// PCI address of the physical function
        address: String,
        /// How many
        count: u16,
        #[command(flatten)]
        pci: device::PciArgs,
    },
    /// Move a controller that another process drives, with its namespaces, from a drive that tracks it itself to another drive
    #[command(after_help = "\
        Example: dray device move drive --controller 2 --namespace 1 --to device:spare/1 --state /srv/vm.state\n\n\
        The running appliance has the drive's physical function, its migration management controller (a [[device]] with \
        virtual-functions = N, or hold = true); a VM has the virtual function, say. What that writes is tracked by the drive, \
        copied in rounds, and at the end the controller is suspended, its state written to FILE, its namespaces detached. It does \
        not run again by itself: whoever moves the VM goes on from there. Until then Ctrl-C gives everything back to it. A drive \
        that is not on the tested list is compared at the end, within [migration] compare, unless trust = \"drive\".\n\n\
        Exit codes: 0 moved; 1 it did not begin, or the appliance was lost; 3 undone, 130 cancelled: the controller goes on where \
        it was; 4 in doubt, an operator must look.")]
    Move(migrate::DeviceMoveArgs),
    /// Format a namespace of a physical drive: all its data is lost
    #[command(after_help = "Example: dray device format pci:0000:01:00.0 --nsid 1 --destroys-data")]
    Format(device::FormatArgs),
    /// Write a pattern to a namespace of a physical drive, read it back and compare: what was there is lost
    #[command(after_help = "Example: dray device exercise pci:0000:01:00.0 --nsid 1 --bytes 256MiB --destroys-data\n\n\
        Exit codes: 0 all that was read is what was written; 1 it is not, or the drive failed.")]
    Exercise(device::ExerciseArgs),
}

#[derive(Debug, Subcommand)]
enum CdqCommand {
    /// Start the demo's devices and guest, and print the queue's entries as they arrive, decoded
    #[command(after_help = "Example: dray cdq watch --entries 20")]
    Watch {
        /// Stop after this many entries, 0 = at Ctrl-C
        #[arg(long, value_name = "N", default_value_t = 0)]
        entries: u64,
        /// As JSON, one object a line
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum PluginCommand {
    /// Show what a component is: role, version, imports, exports, SHA-256
    #[command(after_help = "Example: dray plugin inspect target/plugins/copy-default.wasm")]
    Inspect {
        /// The component
        file: PathBuf,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Run the conformance suite of its role against a component
    #[command(after_help = "Example: dray plugin check target/plugins/copy-default.wasm")]
    Check {
        /// The component
        file: PathBuf,
    },
    /// Compile components ahead of time, for the folder that `[core] compiled` names
    #[command(after_help = "Example: dray plugin compile --cpu x86-64-v2 --output compiled target/plugins/*.wasm\n\n\
        The code runs on every CPU of the level and above (x86-64-v2: SSE4.2 and POPCNT), and with this version of dray alone. \
        It is loaded only from a folder that belongs to the appliance's user and that nobody else can write.")]
    Compile {
        /// The components
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// x86-64, x86-64-v2 or x86-64-v3, the levels of the x86-64 psABI
        #[arg(long, value_name = "LEVEL", default_value = "x86-64-v2")]
        cpu: dray_sandbox::Cpu,
        /// Where the code goes; made if it is not there
        #[arg(long, short, value_name = "FOLDER")]
        output: PathBuf,
    },
    /// Measure what calls to a component cost
    #[command(after_help = "Example: dray plugin bench target/plugins/cdq-default.wasm")]
    Bench {
        /// The component
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say whether a configuration is good, and what is wrong with it
    #[command(after_help = "Example: dray config check appliance.toml")]
    Check {
        /// The configuration
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Show the two system slots: versions, tries that are left, which one runs
    #[command(after_help = "Example: dray image status --json")]
    Status {
        #[command(flatten)]
        parts: image::Parts,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Write an update to the slot that does not run, after its signature was checked
    #[command(after_help = "Example: dray image update http://192.0.2.1/dray.update\n\n\
        Interrupted at any instant, the slot that runs is as it was. The next start boots the new one; if it does not come up in \
        three tries, the old one is booted again.")]
    Update {
        #[command(flatten)]
        parts: image::Parts,
        /// FILE, tcp:HOST:PORT (which sends it) or http://HOST[:PORT]/PATH
        from: String,
        /// Install it even if its version is not higher
        #[arg(long)]
        allow_downgrade: bool,
    },
}

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // A conformance suite provokes what components warn of.
    let provoking = matches!(cli.command, Command::Plugin(PluginCommand::Check { .. }));
    log_to_stderr(cli.verbose, provoking);
    let result = match cli.command {
        Command::Run => run::run(&cli.config),
        Command::Status { json } => status::run(&cli.config, json),
        Command::Migrate { name, to, json } => migrate::run(&cli.config, &name, &to, json),
        Command::MediaMove { subsystem, nsid, to, json } => migrate::media(&cli.config, &subsystem, nsid, &to, json),
        Command::ServeEnd(args) => end::run(&cli.config, &args),
        Command::Demo(args) => demo::run(&cli.config, &args),
        Command::Device(DeviceCommand::List { json }) => device::list(&cli.config, json),
        Command::Device(DeviceCommand::Identify { device, pci, json }) => device::identify(&cli.config, &device, &pci, json),
        Command::Device(DeviceCommand::Bind { address }) => device::bind(&address),
        Command::Device(DeviceCommand::Unbind { address }) => device::unbind(&address),
        Command::Device(DeviceCommand::Vfs { address, count, pci }) => device::vfs(&address, count, &pci),
        Command::Device(DeviceCommand::Move(args)) => migrate::device(&cli.config, &args),
        Command::Device(DeviceCommand::Format(args)) => device::format(&args),
        Command::Device(DeviceCommand::Exercise(args)) => device::exercise(&args),
        Command::Cdq(CdqCommand::Watch { entries, json }) => cdq::watch(&cli.config, entries, json, cli.verbose > 0),
        Command::Passthru(args) => passthru::run(&args),
        Command::Plugin(PluginCommand::Inspect { file, json }) => plugin::inspect(&file, json),
        Command::Plugin(PluginCommand::Check { file }) => plugin::check(&file),
        Command::Plugin(PluginCommand::Compile { files, cpu, output }) => plugin::compile(&files, cpu, &output),
        Command::Plugin(PluginCommand::Bench { file }) => plugin::bench(&file),
        Command::History { json } => history::run(&cli.config, json),
        Command::Config(ConfigCommand::Check { file }) => check::run(&file),
        Command::Image(ImageCommand::Status { parts, json }) => image::status(&parts, json),
        Command::Image(ImageCommand::Update { parts, from, allow_downgrade }) => image::update(&parts, &from, allow_downgrade),
    };
    match result {
        Ok(code) => code,
        Err(report) => {
            eprintln!("{report:?}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(verbose: u8, provoking: bool) {
    let usual = if provoking { "error" } else { "warn" };
    let level = [usual, "info", "debug", "trace"][usize::from(verbose.min(3))];
    let filter = tracing_subscriber::EnvFilter::try_from_env("DRAY_LOG").unwrap_or_else(|_| level.into());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time();
    let _set = log.with_ansi(std::io::stderr().is_terminal()).try_init();
}
