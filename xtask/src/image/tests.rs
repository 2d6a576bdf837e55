//! The whole set of files, built twice.

use super::inputs::Kernel;
use super::*;
use ed25519_dalek::SigningKey;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// Small inputs, with this very program as the appliance: no package is fetched for a test.
fn inputs(folder: &Path) -> Inputs {
    let root = folder.join("kernel");
    let modules = root.join("usr/lib/modules/6.12-test");
    fs::create_dir_all(modules.join("kernel")).unwrap();
    fs::write(modules.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
    // Stands for busybox: `UNPACKER xzcat FILE`.
    let unpacker = folder.join("unpacker");
    fs::write(&unpacker, "#!/bin/sh\ncat \"$2\"\n").unwrap();
    fs::set_permissions(&unpacker, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (name, text) in [("nvme", "\0depends=nvme-core\0"), ("nvme-core", "\0depends=\0")] {
        fs::write(modules.join(format!("kernel/{name}.ko.xz")), text).unwrap();
    }
    Inputs {
        binary: fs::read(std::env::current_exe().unwrap()).unwrap(),
        kernel: Kernel { version: "6.12-test".into(), image: vec![3; 100_000], root, unpacker },
        loader: b"MZ".to_vec(),
        busybox: None,
        modules: "base: ext4\nnvme: nvme\n".into(),
        options: "console=ttyS0".into(),
        config: BTreeMap::from([("appliance.toml".into(), b"[core]\n".to_vec())]),
        public_key: "00\n".into(),
        key: SigningKey::from_bytes(&[9; 32]),
        version: 4,
        state_bytes: 16 << 20,
        packages: vec!["linux=6.12".into()],
    }
}

/// Every byte of every file follows from the inputs: none from the time, from chance, or from the folder's name.
#[test]
fn two_builds_of_the_same_inputs_are_the_same() {
    let folder = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
    let inputs = inputs(&folder);
    let started = SystemTime::now();
    let first = assemble(&inputs, &folder.join("one")).unwrap();
    // The clocks in file systems count seconds: the second build is in another one.
    while started.elapsed().unwrap_or_default() < Duration::from_millis(1_100) {
        std::thread::yield_now();
    }
    // The manifest has the hashes of what was written.
    let second = assemble(&inputs, &folder.join("another-name")).unwrap();
    assert_eq!(first, second);
    let initrd = fs::read(folder.join("another-name/initrd")).unwrap();
    assert!(first.contains(&digest(&initrd)), "{first}");
    for name in ["dray.img", "vmlinuz", "initrd", "dray-update.bin"] {
        assert!(first.lines().any(|line| line.ends_with(&format!(" {name}"))), "{name} is not in the manifest:\n{first}");
    }
    let mut next = inputs.clone();
    next.version = 5;
    let third = assemble(&next, &folder.join("one")).unwrap();
    let changed = |name: &str| first.lines().find(|line| line.ends_with(name)) != third.lines().find(|line| line.ends_with(name));
    assert!(changed("dray.img") && changed("dray-update.bin") && !changed("initrd"), "{first}\n{third}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_module_that_this_kernel_does_not_have_fails_the_build() {
    let folder = std::env::temp_dir().join(format!("xtask-image-module-{}", std::process::id()));
    let mut inputs = inputs(&folder);
    inputs.modules = "net: virtio_net\n".into();
    let error = initramfs::build(&inputs).map(drop).unwrap_err();
    assert!(error.contains("virtio_net") && error.contains("6.12-test"), "{error}");
    inputs.modules = "nvme: nvme\n".into();
    inputs.busybox = Some(b"shell".to_vec());
    let (_, plain) = initramfs::build(&inputs).unwrap();
    inputs.busybox = None;
    assert!(initramfs::build(&inputs).unwrap().1 < plain, "no shell without --debug");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_command_line_is_checked() {
    let parse = |args: &[&str]| Options::parse(args.iter().map(|arg| (*arg).to_owned()).collect());
    let options = parse(&["--debug", "--key", "k", "--output=out", "--version", "12"]).unwrap();
    assert_eq!((options.debug, options.no_build, options.version, options.state_mib), (true, false, Some(12), 512));
    assert_eq!((options.key, options.output), (Some("k".into()), Some("out".into())));
    for (args, said) in [(["--state", "1"], "16 to"), (["--version", "x"], "not a number"), (["--shell", "y"], "not an option")] {
        assert!(parse(&args).unwrap_err().contains(said), "{args:?}");
    }
}
