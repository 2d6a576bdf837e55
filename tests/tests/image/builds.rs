//! Two builds of the same sources are the same, byte by byte.

use crate::room::Room;
use dray_tests::image_disk::built;
use std::path::Path;
use std::process::Command;

fn build(output: &Path) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the source tree");
    // Of what is built already: what is compared is the making of the image.
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args(["xtask", "image", "--no-build", "--yes", "--output"]).arg(output);
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("the manifest")
}

#[test]
fn two_builds_have_the_same_hashes() {
    let room = Room::new("builds");
    assert!(built().is_dir());
    let [one, two] = ["one", "two"].map(|name| build(&room.folder().join(name)));
    assert_eq!(one, two);
    // The hashes are of the files: one of them is looked at here.
    let hash = one.lines().find_map(|line| line.strip_suffix(" initrd")?.split(' ').next()).expect("the hash of the RAM disk");
    let bytes = std::fs::read(room.folder().join("two/initrd")).expect("the RAM disk");
    use sha2::Digest as _;
    let found: String = sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(found, hash);
    assert!(one.contains("package linux-image-") && one.contains("in it: plugins/cdq-default.wasm"), "{one}");
}
