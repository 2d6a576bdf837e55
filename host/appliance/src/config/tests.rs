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

/// [`GOOD`] with more at its end; the line where that begins.
fn with(more: &str) -> (String, usize) {
    (format!("{GOOD}{more}"), GOOD.matches('\n').count() + 1)
}

const VFIO: &str = "[[export]]\nsubsystem = \"a\"\ncontroller = 2\nby = \"vfio-user\"\n";
const TCP: &str = "[[export]]\nsubsystem = \"a\"\ncontroller = 2\nby = \"nvme-tcp\"\nhosts = [{ nqn = \"nqn.2014-08.org.example:h\" }]\n";

#[test]
fn exports_have_defaults() {
    let config = parse(&with(VFIO).0).expect("good");
    let export = &config.file.exports[0];
    assert_eq!(export.cntlids(), [2]);
    assert!(export.socket_path(&config).ends_with("target/dray/state/a-2.sock"));
    let config = parse(&with(TCP).0).expect("good");
    assert_eq!(config.file.exports[0].address().map(|a| a.to_string()).as_deref(), Some(export::DEFAULT_LISTEN));
    assert!(config.file.exports[0].digests.is_none());
    for (text, choice) in [("as-asked", export::DigestChoice::AsAsked), ("required", export::DigestChoice::Required)] {
        let config = parse(&with(&format!("{TCP}digests = \"{text}\"\n")).0).expect("good");
        assert_eq!(config.file.exports[0].digests.as_ref().map(|digests| *digests.get_ref()), Some(choice));
    }
    let management = VFIO.replace("controller = 2", "controller = 1");
    parse(&with(&format!("{VFIO}{management}{}", management.replace("\"a\"", "\"b\""))).0).expect("good");
}

#[test]
fn each_mistake_of_an_export_names_its_line_and_what_would_be_right() {
    for (good, from, to, line, words) in [
        (VFIO, "\"a\"", "\"c\"", 2, &["no subsystem \"c\"", "a, b"][..]),
        (VFIO, "controller = 2", "controller = 7", 3, &["no controller 7", "there are: 1, 2"]),
        (VFIO, "controller = 2\n", "", 2, &["names its controller", "controller = 2"]),
        (VFIO, "controller = 2", "controllers = [2]", 4, &["one controller", "[[export]] for each"]),
        (VFIO, "vfio-user", "vfio", 4, &["vfio", "vfio-user", "nvme-tcp"]),
        (VFIO, "controller = 2", "controler = 2", 3, &["controler", "controller"]),
        (VFIO, "by =", "listen = \"127.0.0.1:1\"\nby =", 4, &["listen", "nvme-tcp", "remove"]),
        (VFIO, "by =", "bar0 = \"all\"\nby =", 4, &["all", "doorbells", "whole", "trapped"]),
        (VFIO, "by =", "digests = \"required\"\nby =", 4, &["digests", "nvme-tcp", "remove"]),
        (TCP, "by =", "digests = \"on\"\nby =", 4, &["on", "as-asked", "required"]),
        (TCP, "controller = 2", "controller = 1", 4, &["management controller", "vfio-user"]),
        (TCP, "by =", "listen = \"localhost\"\nby =", 4, &["localhost", "127.0.0.1:4420"]),
        (TCP, "by =", "socket = \"x\"\nby =", 4, &["socket", "vfio-user"]),
        (TCP, "hosts = [{ nqn = \"nqn.2014-08.org.example:h\" }]\n", "", 2, &["nobody may connect", "/etc/nvme/hostnqn"]),
        (TCP, "nqn.2014", "2014", 5, &["no NVMe Qualified Name", "nqn."]),
        (TCP, "\" }", "\", secret-file = \"none\" }", 5, &["none", "not there", "gen-dhchap-key"]),
        (TCP, "\" }", "\", controller-secret-file = \"none\" }", 5, &["none of its own", "secret-file"]),
        (TCP, "\" }", "\", secret = \"x\" }", 5, &["secret"]),
    ] {
        assert!(good.contains(from), "{from}");
        let (text, first) = with(&good.replacen(from, to, 1));
        match parse(&text).expect_err("must be refused") {
            ConfigError::Wrong { line: at, message, help, .. } => {
                let said = format!("{message} / {}", help.unwrap_or_default());
                assert_eq!(at, first + line - 1, "{to}: {said}");
                for word in words {
                    assert!(said.contains(word), "{to}: {said}");
                }
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn two_exports_do_not_share_a_controller_a_socket_or_a_name() {
    let refused = |more: String, words: &str| {
        let error = parse(&with(&more).0).expect_err("must be refused").to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(format!("{VFIO}{TCP}"), "exported twice");
    let socket = "socket = \"x.sock\"\n";
    refused(format!("{VFIO}{socket}{}{socket}", VFIO.replace("controller = 2", "controller = 1")), "same socket");
    let long = format!("{VFIO}socket = \"{}\"\n", "x".repeat(120));
    refused(long, "longer than");
    let mut more = GOOD.replacen("namespaces = [1]\n", "namespaces = [1]\n[[subsystem.controller]]\ncntlid = 3\nrole = \"migratable\"\n", 1);
    more.push_str(&format!("{TCP}{}", TCP.replace("controller = 2", "controller = 3")));
    let error = parse(&more).expect_err("twice").to_string();
    assert!(error.contains("exported twice at 127.0.0.1:4420"), "{error}");
    let both = more.replacen("controller = 2\nby", "controllers = [2, 3]\nby", 1);
    let both = &both[..both.rfind("[[export]]").expect("the second")];
    assert_eq!(parse(both).expect("good").file.exports[0].cntlids(), [2, 3]);
}

#[test]
fn what_is_moved_to_has_clients_of_its_own_where_vm_managers_move_it() {
    let there = GOOD.replacen(
        "cntlid = 1\nrole = \"management\"\n[migration]",
        "cntlid = 1\nrole = \"management\"\n[[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\n[migration]",
        1,
    );
    let other = VFIO.replace("\"a\"", "\"b\"");
    for exports in [other.clone(), format!("{TCP}{other}"), format!("{VFIO}{}", TCP.replace("\"a\"", "\"b\""))] {
        let error = parse(&format!("{there}{exports}")).expect_err("refused").to_string();
        assert!(error.contains("moves to"), "{error}");
    }
    let both = parse(&format!("{there}{VFIO}{other}")).expect("good");
    assert!(both.hands_over() && !parse(&format!("{there}{VFIO}")).expect("good").hands_over());
    // A management controller has no part in it.
    let management = format!("{VFIO}{}", other.replace("controller = 2", "controller = 1"));
    assert!(!parse(&format!("{there}{management}")).expect("good").hands_over());
    let more = "namespaces = [1]\n[[subsystem.controller]]\ncntlid = 3\nrole = \"migratable\"\n";
    let several = there.replacen("namespaces = [1]\n", more, 1);
    let error = parse(&format!("{several}{VFIO}{other}")).expect_err("refused").to_string();
    assert!(error.contains("2 migratable controllers"), "{error}");
}

/// What a device's table says, and the line and the error that come of it.
fn device_wrong(keys: &str) -> (usize, String) {
    let (text, first) = with(&format!("[[device]]\nname = \"d\"\n{keys}"));
    match parse(&text).expect_err("must be refused") {
        ConfigError::Wrong { line, message, help, .. } => (line + 1 - first, format!("{message} / {}", help.unwrap_or_default())),
        other => panic!("{other}"),
    }
}

#[test]
fn a_device_is_reached_in_one_way_and_has_the_keys_of_that_way() {
    const TCP: &str = "nvme-tcp = \"127.0.0.1:4420\"\n";
    const TOKEN: &str = "vf-token = \"83f69257-0c9b-4b4f-a3e9-b4bb1d3c2a55\"\n";
    for (keys, line, word) in [
        ("", 2, "names 0"),
        ("pci = \"0000:01:00.0\"\npassthru = \"/dev/nvme0\"\n", 2, "names 2"),
        ("pci = \"01:00\"\n", 3, "0000:01:00.0"),
        ("pci = \"0000:01:00.0\"\niommu = \"none\"\n", 4, "iommufd"),
        ("pci = \"0000:01:00.0\"\nnqn = \"nqn.x\"\n", 4, "nvme-tcp"),
        ("passthru = \"nvme0\"\n", 3, "/dev/nvme0"),
        ("passthru = \"/dev/nvme0\"\nbind = true\n", 4, "pci"),
        ("passthru = \"/dev/nvme0\"\nhold = true\n", 4, "pci or vfio-user"),
        ("pci = \"0000:01:00.0\"\nvf-token = \"83f6\"\n", 4, "83f69257-"),
        ("pci = \"0000:01:00.0\"\nvirtual-functions = 2\n", 4, "vf-token"),
        ("pci = \"0000:01:00.0\"\nvirtual-functions = 0\n", 4, "nonzero"),
        (&format!("pci = \"0000:01:00.0\"\n{TOKEN}hold = false\nvirtual-functions = 2\n"), 5, "is held"),
        ("vfio-user = \"d.sock\"\nvirtual-functions = 2\n", 4, "pci"),
        ("vfio-user = \"d.sock\"\nspace = \"a\"\n", 4, "pci"),
        ("vfio-user = \"d.sock\"\npci = \"0000:01:00.0\"\n", 2, "names 2"),
        ("nvme-tcp = \"localhost\"\n", 3, "with a port"),
        (TCP, 2, "nqn"),
        (&format!("{TCP}nqn = \"nqn.2026-11.org.example:x\"\n"), 2, "host-nqn"),
        (&format!("{TCP}nqn = \"nqn.a\"\nhost-nqn = \"host\"\n"), 5, "host-nqn"),
    ] {
        let (at, text) = device_wrong(keys);
        assert!(at == line && text.contains(word), "line {at}: {text} ({keys})");
    }
    let held = "[[device]]\nname = \"d\"\nvfio-user = \"d.sock\"\nhold = true\n";
    let config = parse(&with(held).0).expect("good");
    let way = config.device("d").and_then(device::Device::way);
    assert_eq!(way, Some(device::Way::VfioUser("d.sock".into())));
    let with_functions = format!("[[device]]\nname = \"d\"\npci = \"0000:01:00.0\"\n{TOKEN}virtual-functions = 2\n");
    let config = parse(&with(&with_functions).0).expect("good");
    assert!(config.device("d").is_some_and(device::Device::is_held));
}

#[test]
fn a_namespace_of_a_device_names_one_that_is_there_and_nothing_else() {
    let device = "[[device]]\nname = \"d\"\npci = \"0000:01:00.0\"\n";
    let of = |keys: &str| {
        let namespace = "backing = \"memory\"\nsize = \"1MiB\"\n";
        parse(&format!("{}{device}", GOOD.replacen(namespace, keys, 1)))
    };
    let config = of("backing = \"device\"\ndevice = \"d\"\ndevice-nsid = 3\n").expect("good");
    assert_eq!(config.file.subsystems[0].namespaces[0].at_device(), Some(("d", 3)));
    for (keys, word) in [
        ("backing = \"device\"\n", "names it"),
        ("backing = \"device\"\ndevice = \"e\"\n", "there are: d"),
        ("backing = \"device\"\ndevice = \"d\"\ndevice-nsid = 0\n", "no NSID"),
        ("backing = \"device\"\ndevice = \"d\"\nsize = \"1MiB\"\n", "remove size"),
        ("backing = \"memory\"\nsize = \"1MiB\"\ndevice = \"d\"\n", "remove device"),
    ] {
        let error = format!("{:?}", miette::Report::new(of(keys).expect_err("must be refused")));
        assert!(error.contains(word), "{error}");
    }
    let both = GOOD
        .replacen("backing = \"memory\"\nsize = \"1MiB\"\n", "backing = \"device\"\ndevice = \"d\"\n", 1)
        .replacen("backing = \"file\"\npath = \"b.img\"\nsize = \"1MiB\"\n", "backing = \"device\"\ndevice = \"d\"\n", 1);
    let error = parse(&format!("{both}{device}")).expect_err("overlap").to_string();
    assert!(error.contains("same bytes"), "{error}");
    assert_eq!(device::parse_name(&device::name_of("d", 7)), Some(("d", 7)));
    assert_eq!([device::parse_name("/d/7"), device::parse_name("device:d/0"), device::parse_name("device:d")], [None; 3]);
}
