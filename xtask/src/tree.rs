//! Where things lie in the source tree, and digests of its files.

use crate::Outcome;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// The source tree and its build folders.
pub struct Tree {
    /// The folder of the workspace's Cargo.toml.
    pub root: PathBuf,
}

impl Tree {
    /// The tree that xtask was built from.
    pub fn find() -> Outcome<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf);
        let root = root.filter(|root| root.join("wit").is_dir());
        root.map(|root| Self { root }).ok_or_else(|| "the source tree that xtask was built from is gone".into())
    }

    /// A folder under `target/`, made if it is not there.
    pub fn target(&self, name: &str) -> Outcome<PathBuf> {
        let path = self.root.join("target").join(name);
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }

    /// The folder that cargo builds the host into.
    pub fn cargo_target(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(folder) => self.root.join(folder),
            None => self.root.join("target"),
        }
    }

    /// The folders of workspace members under `folder`, sorted.
    pub fn members(&self, folder: &str) -> Outcome<Vec<PathBuf>> {
        let mut found = Vec::new();
        for path in entries(&self.root.join(folder))? {
            if path.join("Cargo.toml").is_file() {
                found.push(path);
            }
        }
        Ok(found)
    }
}

/// Reads a whole text file.
pub fn read_text(path: &Path) -> Outcome<String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes a file so that a reader sees either the old or the new one whole.
pub fn replace(path: &Path, bytes: &[u8]) -> Outcome {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = fs::write(&part, bytes).and_then(|()| fs::rename(&part, path));
    written.map_err(|error| format!("{}: {error}", path.display()))
}

/// SHA-256 of some bytes, as 64 hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 over the names and contents of all files under `folders`; build output and hidden files are left out.
pub fn digest_of(folders: &[PathBuf]) -> Outcome<String> {
    let mut sum = Sha256::new();
    for folder in folders {
        add(folder, folder, &mut sum)?;
    }
    Ok(hex(&sum.finalize()))
}

fn add(base: &Path, folder: &Path, sum: &mut Sha256) -> Outcome {
    for path in entries(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() {
            add(base, &path, sum)?;
            continue;
        }
        let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let name = path.strip_prefix(base).unwrap_or(&path).as_os_str().as_encoded_bytes();
        // Lengths keep one file's end apart from the next one's start.
        sum.update((name.len() as u64).to_le_bytes());
        sum.update(name);
        sum.update((bytes.len() as u64).to_le_bytes());
        sum.update(&bytes);
    }
    Ok(())
}

fn entries(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let listed = fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut paths: Vec<PathBuf> = listed.map_err(|error| format!("{}: {error}", folder.display()))?;
    paths.sort();
    Ok(paths)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_of_a_folder_follows_names_and_contents() {
        let folder = std::env::temp_dir().join(format!("xtask-digest-{}", std::process::id()));
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let now = || digest_of(std::slice::from_ref(&folder)).unwrap();
        write("a/one", "1");
        let first = now();
        write("target/out", "x");
        write(".hidden", "x");
        assert_eq!(now(), first, "build output counts");
        write("a/one", "2");
        let second = now();
        assert_ne!(second, first, "contents");
        fs::rename(folder.join("a/one"), folder.join("a/two")).unwrap();
        assert_ne!(now(), second, "names");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn digests_are_what_sha256sum_prints() {
        assert_eq!(digest(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
