//! `dray run` and its other commands in a folder of a test's own, as an operator starts them.

use super::dray_in_guest::binary;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A folder that goes with the test; commands run in it.
#[derive(Debug)]
pub struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

impl Place {
    /// Makes it.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("dray-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file in it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file");
    }

    /// A command on a configuration, not yet started.
    pub fn command(&self, config: &str, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(["--config", config]).args(args).current_dir(&self.0).stdin(Stdio::null());
        command
    }

    /// A command and its end.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn dray(&self, config: &str, args: &[&str]) -> Output {
        self.command(config, args).output().expect("dray runs")
    }

    /// Starts an appliance and waits until it says that it is ready.
    ///
    /// # Panics
    /// If it ends before.
    #[track_caller]
    pub fn start(&self, config: &str) -> Running {
        let mut child = self.command(config, &["run"]).stdout(Stdio::piped()).spawn().expect("dray runs");
        let mut lines = BufReader::new(child.stdout.take().expect("its output"));
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            assert!(lines.read_line(&mut said).expect("a line") > 0, "it has ended: {said}");
        }
        Running { child, said }
    }
}

/// An appliance; it is killed when this goes.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
    /// What it said until it was ready.
    pub said: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Running {
    /// Where its export by NVMe/TCP listens.
    ///
    /// # Panics
    /// If it has none.
    pub fn address(&self) -> &str {
        let line = self.said.lines().find_map(|line| line.split_once("by nvme-tcp at ")).expect("an export");
        line.1.split_whitespace().next().expect("an address")
    }

    /// Stops it as an operator does.
    ///
    /// # Panics
    /// If its end is none of the good ones.
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it runs");
        assert!(self.child.wait().expect("an end").success());
    }
}
