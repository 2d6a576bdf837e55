//! The command line: what each command is called and takes. What it does is in the module of its name.

mod cdq;
mod check;
mod demo;
mod device;
mod history;
mod plugin;

use crate::config::units::Size;
use clap::{Args, Parser, Subcommand};
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
    /// Move a namespace while its guest writes, compare every block, account for every write
    #[command(after_help = "Example: dray demo --rate 10000 --json | tail -n 1 | python3 -m json.tool")]
    Demo(DemoArgs),
    /// Look at the controllers of the configuration
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Look at controller data queues
    #[command(subcommand)]
    Cdq(CdqCommand),
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
}

/// What the demo can be told.
#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// Carry on where the last demo was stopped (a kill, a power cut, Ctrl-C): the durable records say which side serves; a
    /// migration that was cut short is closed, the guest goes on with its disk and its ledger
    #[arg(long, conflicts_with_all = ["image", "size", "destination", "seed"])]
    resume: bool,
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
    /// Print the summary as one JSON object on the last line of standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// List controllers and namespaces
    #[command(after_help = "Example: dray device list")]
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that a controller says of itself: registers, Identify structures, log pages, features
    #[command(after_help = "Example: dray device identify source:2")]
    Identify {
        /// SUBSYSTEM:CNTLID, as `dray device list` shows them
        device: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
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

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // A conformance suite provokes what components warn of.
    let provoking = matches!(cli.command, Command::Plugin(PluginCommand::Check { .. }));
    log_to_stderr(cli.verbose, provoking);
    let result = match cli.command {
        Command::Demo(args) => demo::run(&cli.config, &args),
        Command::Device(DeviceCommand::List { json }) => device::list(&cli.config, json),
        Command::Device(DeviceCommand::Identify { device, json }) => device::identify(&cli.config, &device, json),
        Command::Cdq(CdqCommand::Watch { entries, json }) => cdq::watch(&cli.config, entries, json, cli.verbose > 0),
        Command::Plugin(PluginCommand::Inspect { file, json }) => plugin::inspect(&file, json),
        Command::Plugin(PluginCommand::Check { file }) => plugin::check(&file),
        Command::Plugin(PluginCommand::Bench { file }) => plugin::bench(&file),
        Command::History { json } => history::run(&cli.config, json),
        Command::Config(ConfigCommand::Check { file }) => check::run(&file),
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
