//! Running other programs: with the environment that the person at the terminal has, and with or without an ear on it.

use crate::Outcome;
use crate::tree::Tree;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// A command without what `cargo run` put into our environment, and without standard input.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if of_cargo_run(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    if let Some(folders) = std::env::var_os("LD_LIBRARY_PATH") {
        match without_build_folders(&folders) {
            Some(rest) => command.env("LD_LIBRARY_PATH", rest),
            None => command.env_remove("LD_LIBRARY_PATH"),
        };
    }
    command.stdin(Stdio::null());
    command
}

fn of_cargo_run(name: &str) -> bool {
    name.starts_with("CARGO_PKG_")
        || matches!(name, "CARGO_MANIFEST_DIR" | "CARGO_MANIFEST_PATH" | "CARGO_BIN_NAME" | "CARGO_CRATE_NAME" | "OUT_DIR")
}

/// `cargo run` prepends its target folder and the compiler's libraries.
fn without_build_folders(folders: &OsStr) -> Option<OsString> {
    let ours = |folder: &PathBuf| {
        let text = folder.to_string_lossy();
        !text.is_empty() && !text.contains("/target/") && !text.contains("/rustlib/") && !text.contains("/toolchains/")
    };
    let rest: Vec<_> = std::env::split_paths(folders).filter(ours).collect();
    if rest.is_empty() { None } else { std::env::join_paths(rest).ok() }
}

/// The cargo that runs us, in the root of the tree.
pub fn cargo(tree: &Tree, args: &[&str]) -> Command {
    let mut command = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&tree.root).args(args);
    command
}

/// The command as one would type it.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy();
    command.get_args().fold(program.into_owned(), |line, arg| line + " " + &arg.to_string_lossy())
}

/// The same command, behind all that is not nice: it gets what of the processors the others leave.
pub fn niced(of: &Command) -> Command {
    let Some(nice) = find("nice") else { return again(of, Command::new(of.get_program())) };
    let mut command = Command::new(nice);
    command.args(["-n", "19"]).arg(of.get_program());
    again(of, command)
}

/// Gives `command` what `of` has: arguments, environment, folder; no standard input.
fn again(of: &Command, mut command: Command) -> Command {
    command.args(of.get_args()).stdin(Stdio::null());
    for (name, value) in of.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    if let Some(folder) = of.get_current_dir() {
        command.current_dir(folder);
    }
    command
}

/// Runs to its end with its output on ours; what it prints to standard output goes to standard error.
pub fn run(command: &mut Command) -> Outcome {
    command.stdout(io::stderr());
    let status = command.status().map_err(|error| cannot_start(command, &error))?;
    check(command, status)
}

/// Becomes the command, which keeps our standard input and output; returns only if it cannot be started.
pub fn become_it(command: &mut Command) -> Outcome {
    use std::os::unix::process::CommandExt;
    let error = command.stdin(Stdio::inherit()).exec();
    Err(cannot_start(command, &error))
}

/// Runs to its end and returns what it printed to standard output.
pub fn output(command: &mut Command) -> Outcome<String> {
    let output = command.stderr(Stdio::piped()).output().map_err(|error| cannot_start(command, &error))?;
    if !output.status.success() {
        return Err(format!("{}: {}\n{}", shown(command), output.status, String::from_utf8_lossy(&output.stderr).trim_end()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs to its end; `tee` gets each line of both streams as it is (and may fail: a closed terminal must not end the run), `hear` the
/// same without colours.
pub fn listen(
    command: &mut Command,
    tee: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    hear: &mut (dyn FnMut(&str) + Send),
) -> Outcome {
    if io::stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| cannot_start(command, &error))?;
    let both = std::sync::Mutex::new((tee, hear));
    let each = |line: &[u8]| {
        let mut both = both.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = both.0(line);
        both.1(&plain(&String::from_utf8_lossy(line)));
    };
    let (out, err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        scope.spawn(|| err.map(|stream| each_line(stream, &each)));
        if let Some(stream) = out {
            each_line(stream, &each);
        }
    });
    let status = child.wait().map_err(|error| cannot_start(command, &error))?;
    check(command, status)
}

fn each_line(stream: impl io::Read, hear: &impl Fn(&[u8])) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    while stream.read_until(b'\n', &mut line).is_ok_and(|read| read != 0) {
        hear(&line);
        line.clear();
    }
}

/// A line without colours and without its end.
fn plain(line: &str) -> String {
    let mut rest = line.trim_end();
    let mut text = String::with_capacity(rest.len());
    while let Some(at) = rest.find('\x1b') {
        text.push_str(&rest[..at]);
        let escape = &rest[at..];
        // An escape sequence ends with its first letter.
        rest = escape.find(|c: char| c.is_ascii_alphabetic()).map_or("", |end| &escape[end + 1..]);
    }
    text + rest
}

fn check(command: &Command, status: ExitStatus) -> Outcome {
    if status.success() { Ok(()) } else { Err(format!("`{}` failed ({status})", shown(command))) }
}

fn cannot_start(command: &Command, error: &io::Error) -> String {
    format!("{}: {error}", command.get_program().to_string_lossy())
}

/// Someone is there who can answer a question.
pub fn interactive() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal() && std::env::var_os("CI").is_none()
}

/// Asks a question whose answer is yes unless it starts with n; `yes` answers it, and nobody there means yes.
pub fn agreed(question: &str, yes: bool) -> Outcome {
    if yes || !interactive() {
        return Ok(());
    }
    eprint!("{question} [Y/n] ");
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer).map_err(|error| error.to_string())?;
    let answer = answer.trim().to_lowercase();
    if read == 0 || answer.starts_with('n') { Err("stopped: nothing was installed".into()) } else { Ok(()) }
}

/// We are root.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The path of a program, in PATH or where Debian keeps those of the administrator.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// A duration as people read it.
pub fn took(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 60.0 { format!("{seconds:.1} s") } else { format!("{} min {:02} s", seconds as u64 / 60, seconds as u64 % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_hears_both_streams_whole() {
        let mut heard = Vec::new();
        let mut command = command("/bin/sh");
        command.args(["-c", "printf 'one\\ntwo' ; printf '\\033[1m\\033[32m   Compiling\\033[0m x v1\\n' >&2"]);
        let mut raw = Vec::new();
        listen(&mut command, &mut |line| io::Write::write_all(&mut raw, line), &mut |line| heard.push(line.to_owned())).unwrap();
        heard.sort();
        assert_eq!(heard, ["   Compiling x v1", "one", "two"]);
        assert!(String::from_utf8_lossy(&raw).contains("\x1b[1m\x1b[32m   Compiling"), "as it is");
    }

    #[test]
    fn a_nice_command_is_the_same_command() {
        let mut plain = command("/bin/sh");
        plain.args(["-c", "echo $WHO in $PWD; nice"]).env("WHO", "me").current_dir("/");
        assert_eq!(output(&mut niced(&plain)).unwrap(), "me in /\n19\n");
    }

    #[test]
    fn a_failure_names_the_command() {
        let error = run(command("/bin/sh").args(["-c", "exit 3"])).unwrap_err();
        assert!(error.contains("sh -c exit 3") && error.contains('3'), "{error}");
        assert!(output(&mut command("/no/such/program")).unwrap_err().contains("/no/such/program"));
    }

    #[test]
    fn library_folders_of_the_build_are_left_out() {
        let kept = without_build_folders(OsStr::new("/a/target/xtask/deps:/opt/lib:/h/.rustup/toolchains/s/lib:"));
        assert_eq!(kept, Some("/opt/lib".into()));
        assert_eq!(without_build_folders(OsStr::new("/a/target/xtask")), None);
    }

    #[test]
    fn durations_are_readable() {
        assert_eq!((took(Duration::from_millis(1_260)), took(Duration::from_secs(125))), ("1.3 s".into(), "2 min 05 s".into()));
    }
}
