//! `cargo xtask …`: sets a machine up, builds the host and its policies, tests, measures, shows.
//!
//! Depends on no other crate of Dray. Start reading at [`COMMANDS`]; [`toolchain`] finds a compiler for the policies,
//! [`plugins`] builds them, [`test`](mod@test) is what continuous integration runs. [`image`] builds the appliance that boots,
//! [`guests`] the machines that it and others' clients boot in.

mod asan;
mod bench;
mod cpio;
mod debian;
mod demo;
mod fuzz;
mod guests;
mod image;
mod kernel;
mod plugins;
mod process;
mod sim;
mod test;
mod toolchain;
mod tree;

use std::process::ExitCode;
use tree::Tree;

/// A result whose error is a message for the person at the terminal.
pub type Outcome<T = ()> = Result<T, String>;

/// One subcommand.
struct Command {
    name: &'static str,
    help: &'static str,
    run: fn(&Tree, Vec<String>) -> Outcome,
}

const COMMANDS: [Command; 8] = [
    Command { name: "demo", help: demo::HELP, run: demo::run },
    Command { name: "test", help: test::HELP, run: test::run },
    Command { name: "bench", help: bench::HELP, run: bench::run },
    Command { name: "sim", help: sim::HELP, run: sim::run },
    Command { name: "fuzz", help: fuzz::HELP, run: fuzz::run },
    Command { name: "guests", help: guests::HELP, run: guests::run },
    Command { name: "image", help: image::HELP, run: image::run },
    Command { name: "plugins", help: plugins::HELP, run: plugins::run },
];

const HELP: &str = "\
Builds, shows, tests and measures Dray.

Usage: cargo xtask COMMAND [OPTIONS]

Commands:
  demo     build everything and move a namespace while its guest writes
  test     build and run all tests, as continuous integration does
  bench    measure, and write target/bench/summary.json
  sim      run seeds of the simulator: the whole system under faults
  fuzz     hostile guests, devices, files, states, policies and clients, for some seconds each
  guests   make the virtual machines that tests with stock clients boot
  image    build the appliance as an image that boots
  plugins  build the Wasm policies into target/plugins

`cargo xtask COMMAND --help` says more.

Example: cargo xtask demo
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(name) = args.next().filter(|name| !matches!(name.as_str(), "-h" | "--help" | "help")) else {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        eprint!("xtask: there is no command `{name}`\n\n{HELP}");
        return ExitCode::from(2);
    };
    let args: Vec<String> = args.collect();
    if args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--help" || arg == "-h") {
        print!("{}", command.help);
        return ExitCode::SUCCESS;
    }
    match Tree::find().and_then(|tree| (command.run)(&tree, args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask {name}: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Takes the flag `name` out of `args`; true if it was there.
pub fn take_flag(args: &mut Vec<String>, name: &str) -> bool {
    let before = args.len();
    args.retain(|arg| arg != name);
    args.len() != before
}

/// Takes the option `name` with its value (`--name VALUE` or `--name=VALUE`) out of `args`.
pub fn take_value(args: &mut Vec<String>, name: &str) -> Outcome<Option<String>> {
    let with_value = |arg: &String| arg.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')).map(str::to_owned);
    if let Some(at) = args.iter().position(|arg| with_value(arg).is_some()) {
        return Ok(with_value(&args.remove(at)));
    }
    let Some(at) = args.iter().position(|arg| arg == name) else { return Ok(None) };
    args.remove(at);
    if at < args.len() { Ok(Some(args.remove(at))) } else { Err(format!("{name} takes a value; see --help")) }
}

/// Fails if arguments are left that nobody took.
pub fn refuse_rest(args: &[String]) -> Outcome {
    match args.first() {
        Some(arg) => Err(format!("`{arg}` is not an option here; see --help")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_take_their_values() {
        let mut args: Vec<String> = ["--key", "k", "--state=5", "rest", "--config"].map(Into::into).into();
        assert_eq!(take_value(&mut args, "--key"), Ok(Some("k".into())));
        assert_eq!(take_value(&mut args, "--state"), Ok(Some("5".into())));
        assert_eq!(take_value(&mut args, "--version"), Ok(None));
        assert!(take_value(&mut args, "--config").unwrap_err().contains("takes a value"));
        assert_eq!(args, ["rest"]);
    }
}
