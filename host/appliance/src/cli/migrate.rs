//! `dray migrate NAME --to OTHER`, `dray media-move SUBSYSTEM NSID --to FILE` and `dray device move …`: ask the running appliance,
//! and show how far it is.

use crate::config::Config;
use crate::config::device::parse_name;
use crate::config::units::{Size, Span};
use crate::control::client::{Client, ClientError};
use crate::control::{ControlError, ErrorCode, Reply, Request};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use miette::{IntoDiagnostic, miette};
use serde_json::Value;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often Ctrl-C is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// How often a line is printed where there is no bar.
const LINE_EVERY: Duration = Duration::from_millis(1000);
/// Exit codes besides 0 (moved) and 1 (it did not begin, or the appliance was lost).
const UNDONE: u8 = 3;
const IN_DOUBT: u8 = 4;
const CANCELLED: u8 = 130;

/// Moves what `from` serves to `to`, and says how it ended.
pub(super) fn run(config: &Path, from: &str, to: &str, as_json: bool) -> miette::Result<ExitCode> {
    watch(config, &Request::Migrate { from: from.into(), to: to.into() }, "the source takes over again", as_json)
}

/// Exchanges a namespace's backing for a copy in `to`, and says how it ended.
pub(super) fn media(config: &Path, subsystem: &str, nsid: u32, to: &Path, as_json: bool) -> miette::Result<ExitCode> {
    // The appliance may be elsewhere.
    let of_device = to.to_str().and_then(parse_name).is_some();
    let to = if of_device { to.to_path_buf() } else { std::path::absolute(to).into_diagnostic()? };
    watch(config, &Request::MediaMove { subsystem: subsystem.into(), nsid, to }, "the old file goes on serving", as_json)
}

/// What `dray device move` is told.
#[derive(Clone, Debug, Args)]
pub(super) struct DeviceMoveArgs {
    /// The drive, by the name of its [[device]] in the configuration: its management controller
    device: String,
    /// CNTLID of the controller that another process drives; several, if they share a namespace
    #[arg(long, value_name = "CNTLID", required = true, value_delimiter = ',')]
    controller: Vec<u16>,
    /// Its namespaces, all of them
    #[arg(long, value_name = "NSID", required = true, value_delimiter = ',')]
    namespace: Vec<u32>,
    /// Where they go, as many as there are namespaces: what is on these is written over
    #[arg(long, value_name = "device:NAME/NSID", required = true, value_delimiter = ',')]
    to: Vec<String>,
    /// The file for the controller's state, as Get Controller State gives it (one of several has its CNTLID appended)
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// Print how it ended as one JSON object
    #[arg(long)]
    json: bool,
}

/// Moves controllers of a drive that others drive, with their namespaces, and says how it ended.
pub(super) fn device(config: &Path, args: &DeviceMoveArgs) -> miette::Result<ExitCode> {
    // The appliance may be elsewhere.
    let state = std::path::absolute(&args.state).into_diagnostic()?;
    let DeviceMoveArgs { device, controller, namespace, to, json, .. } = args.clone();
    let request = Request::DeviceMove { device, controllers: controller, namespaces: namespace, to, state };
    watch(config, &request, "the controller goes on where it is", json)
}

fn watch(config: &Path, request: &Request, cancelled: &str, as_json: bool) -> miette::Result<ExitCode> {
    let config = Config::read(config)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second one ends this process; the appliance goes on with the cancelling.
        signal_hook::flag::register_conditional_shutdown(signal, CANCELLED.into(), Arc::clone(&stop)).into_diagnostic()?;
        signal_hook::flag::register(signal, Arc::clone(&stop)).into_diagnostic()?;
    }
    let mut client = Client::connect(&config)?;
    let id = client.send(request)?;
    let mut screen = Screen::new();
    let mut cancel = None;
    let end = loop {
        if stop.load(Ordering::Relaxed) && cancel.is_none() {
            screen.say(&format!("cancelling: {cancelled}"));
            cancel = Some(client.send(&Request::Cancel)?);
        }
        match client.next(LOOK) {
            Ok(None) => {}
            Ok(Some((Some(of), Reply::Event(view)))) if of == id => screen.show(&view),
            Ok(Some((Some(of), Reply::Done(value, _)))) if of == id => break Ok(value),
            Ok(Some((Some(of), Reply::Failed(error)))) if of == id => break Err(error),
            Ok(Some((None, Reply::Failed(error)))) => break Err(error),
            Ok(Some(_)) => {}
            Err(ClientError::Closed) => {
                screen.finish();
                return Err(miette!("the appliance has gone; started again it says by its records who serves"));
            }
            Err(error) => return Err(error.into()),
        }
    };
    screen.finish();
    ended(end, as_json)
}

fn ended(end: Result<Value, ControlError>, as_json: bool) -> miette::Result<ExitCode> {
    match end {
        Ok(value) => {
            if as_json {
                println!("{value}");
            } else {
                println!("{}", summary(&value));
                if value["kind"] == "departure" {
                    println!("{}", left(&value));
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            let code = match error.code {
                ErrorCode::Cancelled => CANCELLED,
                ErrorCode::Undone => UNDONE,
                ErrorCode::InDoubt => IN_DOUBT,
                _ => return Err(error).into_diagnostic(),
            };
            if as_json {
                println!("{}", serde_json::json!({ "outcome": error.code.name(), "message": error.message }));
            } else {
                eprintln!("{}", error.message);
            }
            Ok(ExitCode::from(code))
        }
    }
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

fn summary(value: &Value) -> String {
    let micros = |key| Span(Duration::from_micros(number(value, key)));
    format!(
        "moved: {} rounds, {} copied in {}, downtime {}",
        number(value, "rounds"),
        Size(number(value, "copied_bytes")),
        micros("duration_us"),
        micros("downtime_us")
    )
}

/// What is to be done with a controller that has left.
fn left(value: &Value) -> String {
    let list = |key: &str| {
        let all = value[key].as_array().into_iter().flatten();
        all.map(|one| one.as_str().map_or_else(|| one.to_string(), str::to_owned)).collect::<Vec<_>>().join(", ")
    };
    format!(
        "controller {} is suspended and has no namespace any more: move its VM, with the state in {}",
        list("controllers"),
        list("states")
    )
}

/// The terminal, or what stands in for it: standard error.
struct Screen {
    terminal: bool,
    bar: Option<(u64, ProgressBar)>,
    printed: Option<Instant>,
}

impl Screen {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), bar: None, printed: None }
    }

    fn say(&mut self, line: &str) {
        match &self.bar {
            Some((_, bar)) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    fn show(&mut self, view: &Value) {
        let (round, bytes, total) = (number(view, "round"), number(view, "round_bytes"), number(view, "round_total"));
        let phase = view["phase"].as_str().unwrap_or("?");
        let (copied, dirtied) = (Size(number(view, "copied_per_s")), Size(number(view, "dirtied_per_s")));
        let text = format!("{phase}, {copied}/s, dirty {dirtied}/s");
        if !self.terminal {
            if self.printed.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
                self.printed = Some(Instant::now());
                eprintln!("round {round}: {} of {}, {text}", Size(bytes), Size(total));
            }
            return;
        }
        if self.bar.as_ref().is_none_or(|(of, _)| *of != round) && total > 0 {
            self.finish();
            self.bar = Some((round, bar(round, total)));
        }
        if let Some((_, bar)) = &self.bar {
            bar.set_length(total.max(bytes));
            bar.set_position(bytes);
            bar.set_message(text);
        }
    }

    fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.abandon();
        }
    }
}

fn bar(round: u64, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = format!("round {round:<3} {{bar:32}} {{bytes:>11}}/{{total_bytes}} {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}
