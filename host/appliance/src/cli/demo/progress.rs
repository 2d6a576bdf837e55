//! What the demo shows while it runs: a bar per round on a terminal, plain lines elsewhere.

use crate::config::units::{Size, Span};
use crate::live::{Act, LiveView};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// Plain lines come this often.
const LINE_EVERY: Duration = Duration::from_millis(1000);

/// The terminal, or what stands in for it. Everything goes to standard error: standard output is the summary's.
pub(super) struct Screen {
    terminal: bool,
    bar: Option<ProgressBar>,
    round: Option<u32>,
    act: Option<Act>,
    line_at: Duration,
}

impl Screen {
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { terminal, bar: None, round: None, act: None, line_at: Duration::ZERO }
    }

    /// A line about the input.
    pub(super) fn say(&self, line: &str) {
        eprintln!("{line}");
    }

    /// The present view.
    pub(super) fn show(&mut self, view: &LiveView) {
        if self.act != Some(view.act) {
            self.act = Some(view.act);
            self.close_bar();
            eprintln!("{}", title(view.act));
            self.line_at = view.elapsed;
        }
        if view.act == Act::Migrating {
            self.show_round(view);
        } else if view.elapsed >= self.line_at + LINE_EVERY {
            self.line_at = view.elapsed;
            let (p50, p99) = (micros(view.sample.p50_us), micros(view.sample.p99_us));
            let line = format!("  guest {:>7} IOPS, p50 {p50}, p99 {p99}", view.sample.iops);
            if !self.terminal {
                eprintln!("{line}");
            }
        }
    }

    fn show_round(&mut self, view: &LiveView) {
        let m = &view.migration;
        if self.round != Some(m.round) && m.round_total > 0 {
            // The round before has ended since the last look.
            if let Some(bar) = &self.bar {
                bar.set_position(bar.length().unwrap_or(0));
            }
            self.close_bar();
            self.round = Some(m.round);
            if self.terminal {
                self.bar = Some(bar(m.round, m.round_total));
            }
        }
        let guest = format!("guest p50 {} p99 {}", micros(view.sample.p50_us), micros(view.sample.p99_us));
        let text = format!("{}/s, {} left, dirty {}/s, {guest}", Size(m.copied_per_s), eta(m.eta_us), Size(m.dirtied_per_s));
        if let Some(bar) = &self.bar {
            bar.set_position(m.round_bytes);
            bar.set_message(text);
        } else if !self.terminal && view.elapsed >= self.line_at {
            self.line_at = view.elapsed + LINE_EVERY / 4;
            eprintln!("  {} round {}: {} of {}, {text}", m.phase, m.round, Size(m.round_bytes), Size(m.round_total));
        }
    }

    fn close_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }

    /// Nothing more comes.
    pub(super) fn finish(&mut self) {
        self.close_bar();
        eprintln!("comparing every block, reading every acknowledged write, checking the filesystem");
    }
}

fn title(act: Act) -> &'static str {
    match act {
        Act::Settling => "guest        writes at the source",
        Act::Migrating => "migration    the namespace moves while the guest writes",
        Act::After => "guest        goes on where it is, then resets its controller once",
        Act::Stopping => "stopping     guest and controllers",
    }
}

fn bar(round: u32, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = format!("  round {round:<3} {{bar:32}} {{bytes:>11}}/{{total_bytes}} {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

fn micros(us: u32) -> String {
    if us == 0 { "-".into() } else { Span(Duration::from_micros(us.into())).to_string() }
}

fn eta(us: u64) -> String {
    if us == 0 { "?".into() } else { Span(Duration::from_micros(us)).to_string() }
}
