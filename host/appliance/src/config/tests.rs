use super::*;

const GOOD: &str = r#"
[[subsystem]]
name = "a"
nqn = "nqn.2026-11.org.example:a"
serial = "S1"
[[subsystem.namespace]]
nsid = 1
backing = "memory"
size = "1MiB"
nguid = "000000000000000000000000000000a1"
[[subsystem.controller]]
cntlid = 1
role = "management"
[[subsystem.controller]]
cntlid = 2
role = "migratable"
namespaces = [1]
[[subsystem]]
name = "b"
nqn = "nqn.2026-11.org.example:b"
serial = "S1"
[[subsystem.namespace]]
nsid = 1
backing = "file"
path = "b.img"
size = "1MiB"
nguid = "000000000000000000000000000000a1"
[[subsystem.controller]]
cntlid = 1
role = "management"
[migration]
from = "a"
to = "b"
[policy.cdq]
component = "native"
[policy.tracking]
component = "native"
[policy.copy]
component = "native"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse("appliance.toml", text.into(), ".".into())
}

/// Line, message and help of the error.
fn wrong(from: &str, to: &str) -> (usize, String) {
    assert!(GOOD.contains(from), "{from}");
    match parse(&GOOD.replacen(from, to, 1)).expect_err("must be refused") {
        ConfigError::Wrong { line, message, help, .. } => (line, format!("{message} / {}", help.unwrap_or_default())),
        other => panic!("{other}"),
    }
}

#[test]
fn a_good_file_is_read_with_its_defaults() {
    let config = parse(GOOD).expect("good");
    assert_eq!(config.file.core.idle, Idle::Adaptive);
    assert_eq!(config.file.guest.writes_per_second, 2000);
    assert!(config.subsystem("b").is_some());
}

#[test]
fn each_mistake_names_its_line_and_what_would_be_right() {
    for (from, to, line, words) in [
        ("serial = \"S1\"", "serail = \"S1\"", 5, &["serail", "serial"][..]),
        ("size = \"1MiB\"", "size = \"1Mb\"", 9, &["Mb", "MiB"]),
        ("size = \"1MiB\"", "size = 5", 9, &["quotes"]),
        ("size = \"1MiB\"", "size = \"5000B\"", 9, &["whole number of blocks"]),
        ("size = \"1MiB\"", "size = \"1MiB\"\npath = \"x\"", 10, &["no file"]),
        ("namespaces = [1]", "namespaces = [7]", 17, &["no namespace 7", "there are: 1"]),
        ("from = \"a\"", "from = \"c\"", 32, &["no subsystem \"c\"", "a, b"]),
        ("to = \"b\"", "to = \"a\"", 33, &["where it is"]),
        ("component = \"native\"", "component = \"none.wasm\"", 35, &["none.wasm", "xtask plugins"]),
        ("component = \"native\"", "component = \"native\"\nsha256 = \"12\"", 36, &["SHA-256"]),
        ("name = \"b\"", "name = \"a\"", 19, &["two subsystems"]),
        ("cntlid = 2", "cntlid = 1", 15, &["CNTLID 1"]),
        ("00a1\"", "00zz\"", 10, &["NGUID"]),
        ("path = \"b.img\"\n", "", 23, &["needs its file"]),
        ("path = \"b.img\"\nsize = \"1MiB\"\n", "path = \"none.img\"\n", 25, &["none.img", "not there", "size"]),
        ("role = \"management\"", "role = \"migratable\"", 3, &["exactly one"]),
    ] {
        let (at, text) = wrong(from, to);
        assert_eq!(at, line, "{to}: {text}");
        for word in words {
            assert!(text.contains(word), "{to}: {text}");
        }
    }
}

#[test]
fn two_namespaces_over_the_same_bytes_are_refused() {
    let both = GOOD.replacen("backing = \"memory\"\n", "backing = \"file\"\npath = \"./b.img\"\n", 1);
    let error = parse(&both).expect_err("overlap").to_string();
    assert!(error.contains("same bytes"), "{error}");
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::read(Path::new("no/such.toml")).expect_err("missing").to_string();
    assert!(error.contains("no/such.toml"), "{error}");
}
