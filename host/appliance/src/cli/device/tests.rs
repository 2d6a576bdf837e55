use super::*;

const CONFIG: &str = r#"
[[subsystem]]
name = "a"
nqn = "nqn.2026-11.org.example:a"
serial = "S-A"
[[subsystem.namespace]]
nsid = 3
backing = "file"
path = "never-made.img"
size = "8MiB"
nguid = "000000000000000000000000000000a1"
[[subsystem.controller]]
cntlid = 1
role = "management"
[[subsystem.controller]]
cntlid = 7
role = "migratable"
namespaces = [3]
io-queues = 2
[[subsystem]]
name = "b"
nqn = "nqn.2026-11.org.example:b"
serial = "S-A"
[[subsystem.namespace]]
nsid = 3
backing = "memory"
size = "8MiB"
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

fn config() -> Config {
    let base = std::env::temp_dir().join(format!("dray-device-{}", std::process::id()));
    Config::parse("test.toml", CONFIG.into(), base).expect("a good configuration")
}

fn whole(name: &str) -> (serde_json::Value, String) {
    let config = config();
    let device = devices(&config).find(|device| device.name() == name).expect("there");
    let page = identify::whole(&config, device).expect("answers");
    assert!(!config.path(Path::new("never-made.img")).exists(), "looking makes no file");
    let mut text = String::new();
    page.write(&mut text);
    (page.to_json(), text)
}

#[test]
fn a_migratable_controller_tells_all_its_structures() {
    let (json, text) = whole("a:7");
    assert_eq!((&json["identify_controller"]["sn"], &json["identify_controller"]["cntlid"]), (&"S-A".into(), &7.into()));
    assert_eq!(json["registers"]["decoded"]["csts"]["rdy"], true);
    assert_eq!(json["namespaces"][0]["nsid"], 3);
    let namespace = &json["namespaces"][0]["identify_namespace"];
    assert_eq!((&namespace["nsze"], &namespace["decoded"]["nsze"]), (&2048.into(), &"8 MiB".into()));
    assert_eq!(json["namespaces"][0]["descriptors"]["nguid"], "000000000000000000000000000000a1");
    assert_eq!(json["features"]["number_of_queues"]["value"], 0x0001_0001);
    assert!(json["log_pages"]["smart"]["ctemp"].is_u64(), "{}", json["log_pages"]["smart"]);
    assert!(json["log_pages"]["effects"]["iocs01"].is_u64());
    assert_eq!(json["identify_controller"]["decoded"]["oacs"]["hmlms"], false);
    assert!(json.get("controller_state_formats").is_none());
    assert!(text.contains("MDTS") && text.contains("Log page 02h"), "{text}");
}

#[test]
fn a_management_controller_tells_what_migrations_need() {
    let (json, text) = whole("a:1");
    assert_eq!(json["identify_controller"]["decoded"]["oacs"]["hmlms"], true);
    assert_eq!(json["identify_controller"]["decoded"]["trattr"]["tudcs"], true);
    assert_eq!(json["controller_state_formats"]["csvi1"], 0);
    assert_eq!(json["features"]["guest_limit_vendor_specific"]["cntlid7"], 0);
    assert!(text.lines().any(|line| line.trim_start().starts_with("+ HMLMS")), "{text}");
}
