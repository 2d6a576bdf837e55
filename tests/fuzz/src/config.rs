//! The configuration: any text as `appliance.toml`.
//!
//! It asserts that a refusal names a line of the text and a place in it, says what is wrong, and can be shown as the command
//! line shows it; that what is accepted is accepted again, means the same and keeps every bound; and that sizes and durations that were read can
//! be printed and read again without growing.

// The appliance's own module: the crate around it needs the sandbox's runtime, this module does not.
#[allow(dead_code, missing_docs, clippy::all)]
#[path = "../../../host/appliance/src/config/mod.rs"]
mod appliance;

use appliance::units::{Size, Span};
use appliance::{Config, ConfigError};
use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};
use std::path::PathBuf;
use std::time::Duration;

/// Words that a configuration is made of.
pub const WORDS: &[&[u8]] = &[
    b"[core]\n", b"[[subsystem]]\n", b"[[subsystem.namespace]]\n", b"[[subsystem.controller]]\n", b"[migration]\n",
    b"[policy.cdq]\n", b"[policy.tracking]\n", b"[policy.copy]\n", b"[guest]\n", b"idle = \"spin\"\n", b"policies = \"on\"\n",
    b"pages = \"small\"\n", b"state = \"s\"\n", b"name = \"a\"\n", b"nqn = \"nqn.2026-11.x:a\"\n", b"serial = \"S\"\n",
    b"model = \"M\"\n", b"nsid = 1\n", b"backing = \"memory\"\n", b"backing = \"file\"\n", b"path = \"x.img\"\n",
    b"size = \"1MiB\"\n", b"block = \"512B\"\n", b"nguid = \"000000000000000000000000000000a1\"\n", b"shared = true\n",
    b"cntlid = 1\n", b"role = \"management\"\n", b"role = \"migratable\"\n", b"namespaces = [1]\n", b"io-queues = 8\n",
    b"from = \"a\"\n", b"to = \"b\"\n", b"downtime = \"10ms\"\n", b"max-rounds = 3\n", b"max-time = \"1min\"\n",
    b"throttle-guest = true\n", b"media-error = \"mark\"\n", b"cdq-slots = 64\n", b"trust = \"drive\"\n",
    b"component = \"native\"\n", b"sha256 = \"00\"\n", b"budget = \"1us\"\n", b"memory = \"1GiB\"\n", b"max-faults = 1\n",
    b"settings = { a = \"b\" }\n", b"writes-per-second = 0\n", b"queue-depth = 8\n", b"read-percent = 20\n", b"= ", b"\"", b"'",
    b"\"\"\"", b"[", b"]", b"{", b"}", b"\n", b"#", b",", b".", b"-1", b"0x", b"1e9", b"4294967296", b"18446744073709551616",
    b"nan", b"TiB", b"99999999999TiB", b"1.5", b"\xc2\xb5s", b"\\u0000", b"\xf0\x9f\x92\xbe", b"1979-05-27",
];

fn parse(text: &str) -> Result<Config, ConfigError> {
    // A folder that is not there: what the files of this machine are changes nothing.
    Config::parse("appliance.toml", text.to_owned(), PathBuf::from("/nowhere/at/all"))
}

/// Reads one text.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match parse(&text) {
        Ok(config) => {
            let again = parse(&text).expect("accepted a moment ago");
            assert_eq!(format!("{:?}", again.file), format!("{:?}", config.file), "the same text means the same");
            accepted(&config);
        }
        Err(error) => refused(&text, &error),
    }
    for word in text.split(['"', '\n']).take(64) {
        unit(word);
    }
}

/// What the checks promise of a configuration.
fn accepted(config: &Config) {
    let file = &config.file;
    assert!(config.subsystem(file.migration.from.get_ref()).is_some() && config.subsystem(file.migration.to.get_ref()).is_some());
    assert_ne!(file.migration.from.get_ref(), file.migration.to.get_ref());
    for policy in [&file.policy.cdq, &file.policy.tracking, &file.policy.copy] {
        let sha = policy.sha256.as_ref().map(|sha| sha.get_ref());
        let digits = sha.is_none_or(|sha| sha.len() == 64 && sha.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert!(digits, "{sha:?} as a SHA-256");
    }
    for (i, subsystem) in file.subsystems.iter().enumerate() {
        let name = subsystem.name.get_ref();
        assert!(file.subsystems[..i].iter().all(|other| other.name.get_ref() != name), "two subsystems called {name}");
        for (text, most) in [(subsystem.serial.get_ref(), 20), (subsystem.model.get_ref(), 40)] {
            let printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
            assert!((1..=most).contains(&text.len()) && printable, "\"{text}\" in {most} characters of ASCII");
        }
        identifiers(subsystem);
        let managers = subsystem.controllers.iter().filter(|c| c.role == appliance::Role::Management).count();
        assert_eq!(managers, 1, "management controllers");
        for namespace in &subsystem.namespaces {
            assert!(matches!(namespace.block.get_ref().0, 512 | 4096), "blocks of {} bytes", namespace.block.get_ref().0);
            let nguid = namespace.nguid.get_ref();
            let digits = nguid.len() == 32 && nguid.bytes().all(|byte| byte.is_ascii_hexdigit());
            assert!(digits && nguid.bytes().any(|byte| byte != b'0'), "\"{nguid}\" as an NGUID");
            assert!(appliance::nguid_bytes(nguid).is_some(), "an NGUID");
            let size = namespace.size.as_ref().map(|size| size.get_ref().0);
            assert!(size.is_none_or(|size| size > 0 && size.is_multiple_of(namespace.block.get_ref().0)), "a size of {size:?}");
        }
    }
}

/// Namespaces and controllers are told apart, and controllers reach what is there and theirs.
fn identifiers(subsystem: &appliance::Subsystem) {
    let mut nsids: Vec<u32> = subsystem.namespaces.iter().map(|namespace| *namespace.nsid.get_ref()).collect();
    assert!(nsids.iter().all(|nsid| (1..=1024).contains(nsid)), "NSIDs {nsids:?}");
    let mut cntlids: Vec<u16> = subsystem.controllers.iter().map(|controller| *controller.cntlid.get_ref()).collect();
    let count = (nsids.len(), cntlids.len());
    nsids.sort_unstable();
    nsids.dedup();
    cntlids.sort_unstable();
    cntlids.dedup();
    assert_eq!((nsids.len(), cntlids.len()), count, "NSIDs and CNTLIDs in use twice");
    for namespace in &subsystem.namespaces {
        let nsid = namespace.nsid.get_ref();
        let guests = subsystem.controllers.iter().filter(|controller| controller.role == appliance::Role::Migratable);
        let users = guests.filter(|controller| controller.namespaces.iter().any(|n| n.get_ref() == nsid)).count();
        assert!(namespace.shared || users <= 1, "private namespace {nsid} has {users} users");
    }
    for nsid in subsystem.controllers.iter().flat_map(|controller| &controller.namespaces) {
        assert!(nsids.contains(nsid.get_ref()), "namespace {} is not there", nsid.get_ref());
    }
}

fn refused(text: &str, error: &ConfigError) {
    let ConfigError::Wrong { line, message, span, help, .. } = error else { panic!("{error}") };
    assert!(!message.trim().is_empty(), "a refusal that says nothing");
    assert!(span.offset() + span.len() <= text.len(), "{span:?} is not in a text of {} bytes", text.len());
    let lines = text[..span.offset()].matches('\n').count() + 1;
    assert_eq!(*line, lines, "the line of {span:?}");
    if help.is_some() {
        // What the checks find wrong stands somewhere, on the line of its key.
        assert!(!span.is_empty(), "no place for: {message}");
        let named = text.lines().nth(line - 1).unwrap_or_default();
        assert!(named.contains('=') || text.contains("= ["), "line {line} has no key: {named}");
    }
    assert!(error.to_string().contains(&format!("line {line}")), "{error}");
    let mut shown = String::new();
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::none());
    handler.render_report(&mut shown, error as &dyn Diagnostic).expect("a report");
    assert!(!shown.is_empty());
}

/// A size or duration is read as what it says: printing it and reading that again stays within a tenth of it.
fn unit(word: &str) {
    if let Ok(size) = word.parse::<Size>() {
        let shown = size.to_string();
        let again = shown.parse::<Size>().unwrap_or_else(|error| panic!("{shown}: {error}"));
        assert!(again.0.abs_diff(size.0) <= size.0 / 10 + 1, "{word} is {}, shown as {shown}", size.0);
    }
    if let Ok(span) = word.parse::<Span>() {
        let shown = span.to_string();
        let again = shown.parse::<Span>().unwrap_or_else(|error| panic!("{shown}: {error}"));
        assert!(again.0.abs_diff(span.0) <= span.0 / 10 + Duration::from_micros(1), "{word} is {:?}, shown as {shown}", span.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_bad_and_odd_texts_are_read() {
        for text in ["", "[[subsystem]]\nname = 5\n", "x", "\u{feff}", "[policy]\ncdq = 1\n"] {
            run(text.as_bytes());
        }
        crate::seeds::config().iter().for_each(|text| run(text));
        assert!(crate::seeds::config().iter().any(|text| parse(&String::from_utf8_lossy(text)).is_ok()));
    }
}
