//! What an image is made of, gathered before anything is written: from the build, from Debian's packages, from `images/`.

use super::packages::{self, Packages};
use super::{Options, bundle};
use crate::kernel::lines;
use crate::process::{command, output, run};
use crate::tree::{Tree, read_text};
use crate::{Outcome, plugins};
use ed25519_dalek::SigningKey;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The processors that components are compiled for ahead of time: made since about 2009, and QEMU's `Nehalem`.
const CPU: &str = "x86-64-v2";
/// The folder of their code, beside the configuration: `[core] compiled`.
const COMPILED: &str = "compiled";

/// A kernel that was unpacked.
#[derive(Clone)]
pub struct Kernel {
    pub version: String,
    /// The bootable image.
    pub image: Vec<u8>,
    /// Where its package was unpacked.
    pub root: PathBuf,
    /// A busybox that unpacks its modules.
    pub unpacker: PathBuf,
}

/// All that an image is made of: the same inputs give the same files.
#[derive(Clone)]
pub struct Inputs {
    /// The appliance without its symbols.
    pub binary: Vec<u8>,
    pub kernel: Kernel,
    /// The EFI program that loads the kernel.
    pub loader: Vec<u8>,
    /// The shell, if there is one.
    pub busybox: Option<Vec<u8>>,
    /// `images/modules`.
    pub modules: String,
    /// The kernel's command line without slot and version.
    pub options: String,
    /// The configuration with its plugins, by path beside it.
    pub config: BTreeMap<String, Vec<u8>>,
    /// 64 hexadecimal digits.
    pub public_key: String,
    pub key: SigningKey,
    pub version: u64,
    /// Size of the state partition in bytes.
    pub state_bytes: u64,
    /// `NAME=VERSION` of Debian's packages.
    pub packages: Vec<String>,
}

impl Inputs {
    /// Gathers them; `binary` is what cargo built.
    pub fn gather(tree: &Tree, binary: &Path, options: &Options) -> Outcome<Self> {
        let Packages { kernel, loader, busybox, names } = packages::ensure(tree, options.renew, options.yes)?;
        let images = tree.root.join("images");
        let config_file = options.config.clone().unwrap_or_else(|| images.join("appliance.toml"));
        let key = key(tree, options.key.as_deref())?;
        let mut config = config(&config_file, &tree.target("plugins")?)?;
        add_compiled(tree, binary, &config_file, &mut config)?;
        Ok(Self {
            binary: stripped(tree, binary)?,
            kernel,
            loader: packages::read(&loader)?,
            busybox: options.debug.then(|| packages::read(&busybox)).transpose()?,
            modules: read_text(&images.join("modules"))?,
            options: lines(&read_text(&images.join("cmdline"))?).flat_map(str::split_whitespace).collect::<Vec<_>>().join(" "),
            config,
            public_key: bundle::public_text(&key),
            key,
            version: options.version.map_or_else(|| committed(tree), Ok)?,
            state_bytes: options.state_mib << 20,
            packages: names,
        })
    }
}

/// The key that signs updates: the one that was named, or one of this tree's own.
fn key(tree: &Tree, named: Option<&Path>) -> Outcome<SigningKey> {
    if let Some(path) = named {
        return bundle::read_key(path);
    }
    let path = tree.target("image")?.join("update.key");
    let (key, made) = bundle::key_at(&path)?;
    if made {
        eprintln!(
            "image: made a key that signs updates, {} (mode 0600): images take updates signed with the key that they were built \
             with; keep it, and name it with --key to build elsewhere",
            path.display()
        );
    }
    Ok(key)
}

/// The binary without symbols and debug information, which are of no use where nobody has a debugger.
fn stripped(tree: &Tree, binary: &Path) -> Outcome<Vec<u8>> {
    let to = tree.target("image")?.join(format!("dray.{}", std::process::id()));
    run(command("strip").arg("--strip-all").arg("-o").arg(&to).arg(binary))?;
    let bytes = packages::read(&to);
    fs::remove_file(&to).map_err(|error| format!("{}: {error}", to.display()))?;
    bytes
}

/// The version of what is checked out: when it was committed, in seconds since 1970, so that later is higher.
fn committed(tree: &Tree) -> Outcome<u64> {
    let text = output(command("git").current_dir(&tree.root).args(["log", "-1", "--format=%ct"]));
    let text = text.map_err(|error| format!("no version: give one with --version ({error})"))?;
    text.trim().parse().map_err(|_| format!("no version: git said `{}`; give one with --version", text.trim()))
}

/// The configuration and the components that it names, by path beside it: each from beside the file, or of `cargo xtask plugins`.
fn config(file: &Path, built: &Path) -> Outcome<BTreeMap<String, Vec<u8>>> {
    let text = read_text(file)?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut found = BTreeMap::new();
    for component in components(&text) {
        let relative = Path::new(component).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !relative {
            let file = file.display();
            return Err(format!("{file}: component \"{component}\": in an image a path is relative to the configuration"));
        }
        let name = component.rsplit('/').next().unwrap_or(component);
        let places = [folder.join(component), built.join(name)];
        let place = places.iter().find(|path| path.is_file());
        let missing = || format!("{}: {component} is neither beside it nor {}", file.display(), places[1].display());
        let place = place.ok_or_else(missing)?;
        found.insert(component.to_owned(), packages::read(place)?);
        let (beside, lock) = (place.with_file_name(plugins::LOCK), Path::new(component).with_file_name(plugins::LOCK));
        if beside.is_file() {
            found.insert(lock.to_string_lossy().into_owned(), packages::read(&beside)?);
        }
    }
    found.insert("appliance.toml".into(), text.into_bytes());
    Ok(found)
}

/// Compiles the configuration's components ahead of time, so that no boot has to: their code with its recorded hashes, by path.
fn add_compiled(tree: &Tree, binary: &Path, file: &Path, config: &mut BTreeMap<String, Vec<u8>>) -> Outcome {
    let folder = tree.target("image")?.join(format!("{COMPILED}.{}", std::process::id()));
    let compiled = compile(binary, config, &folder);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(format!("{}: {error}", folder.display())),
        _ => {}
    }
    let compiled = compiled?;
    if compiled.is_empty() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&config["appliance.toml"]).into_owned();
    if !lines(&text).any(|line| line.replace(' ', "") == format!("compiled=\"{COMPILED}\"")) {
        eprintln!(
            "image: {} has no `compiled = \"{COMPILED}\"` in [core]: its components are compiled at every first start",
            file.display()
        );
    }
    config.extend(compiled.into_iter().map(|(name, bytes)| (format!("{COMPILED}/{name}"), bytes)));
    Ok(())
}

/// What the appliance makes of the components, in a folder for them: `SHA256-CPU.cwasm` and the record of each.
fn compile(binary: &Path, config: &BTreeMap<String, Vec<u8>>, folder: &Path) -> Outcome<BTreeMap<String, Vec<u8>>> {
    let components: Vec<_> = config.iter().filter(|(path, _)| path.ends_with(".wasm")).collect();
    let mut found = BTreeMap::new();
    if components.is_empty() {
        return Ok(found);
    }
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let (sources, code) = (folder.join("components"), folder.join("code"));
    fs::create_dir_all(&sources).map_err(failed)?;
    let mut command = command(binary);
    command.args(["plugin", "compile", "--cpu", CPU, "--output"]).arg(&code);
    for (at, (_, bytes)) in components.into_iter().enumerate() {
        // Two components may have the same name in different folders.
        let path = sources.join(format!("{at}.wasm"));
        fs::write(&path, bytes).map_err(failed)?;
        command.arg(path);
    }
    output(&mut command)?;
    for entry in fs::read_dir(&code).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.insert(name, packages::read(&path)?);
    }
    Ok(found)
}

/// The components that a configuration names; "native" is none.
fn components(text: &str) -> Vec<&str> {
    let values = lines(text).filter_map(|line| line.strip_prefix("component")?.trim_start().strip_prefix('='));
    let quoted = values.filter_map(|value| value.trim().strip_prefix('"'));
    quoted.filter_map(|value| value.split('"').next()).filter(|value| *value != "native").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_takes_its_components_along() {
        let folder = std::env::temp_dir().join(format!("xtask-config-{}", std::process::id()));
        let built = folder.join("built");
        fs::create_dir_all(folder.join("plugins")).unwrap();
        fs::create_dir_all(&built).unwrap();
        let file = folder.join("appliance.toml");
        let text = "[policy.cdq]\ncomponent = \"plugins/own.wasm\" # ours\n[policy.copy]\n# component = \"plugins/no.wasm\"\n\
                    component=\"plugins/copy-default.wasm\"\n[policy.tracking]\ncomponent = \"native\"\n";
        fs::write(&file, text).unwrap();
        fs::write(folder.join("plugins/own.wasm"), "own").unwrap();
        let error = config(&file, &built).unwrap_err();
        assert!(error.contains("copy-default.wasm is neither"), "{error}");
        fs::write(built.join("copy-default.wasm"), "copy").unwrap();
        fs::write(built.join(plugins::LOCK), "lock").unwrap();
        let found = config(&file, &built).unwrap();
        let names: Vec<_> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["appliance.toml", "plugins/copy-default.wasm", "plugins/own.wasm", "plugins/plugins.lock"]);
        assert_eq!(found["plugins/own.wasm"], b"own");
        fs::write(&file, "component = \"/etc/shadow\"\n").unwrap();
        assert!(config(&file, &built).unwrap_err().contains("relative"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
