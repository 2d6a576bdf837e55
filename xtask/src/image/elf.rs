//! What a program needs to run: its loader and its libraries, read out of its ELF headers and looked up in a folder.
//!
//! Only what the dynamic loader itself looks at is read: program headers and the dynamic section. Offsets of a damaged file are
//! errors, never a panic.

use crate::Outcome;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where glibc's loader looks when it has no cache, as distributions build it.
const FOLDERS: [&str; 6] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib"];

const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const NEEDED: u64 = 1;
const STRINGS: u64 = 5;

/// What the headers of a program or a library say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The loader's path, of a program.
    pub loader: Option<String>,
    /// Names of libraries.
    pub libraries: Vec<String>,
}

/// One program header: type, offset in the file, address in memory, size in the file.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

/// Reads what `file`, an ELF file for x86-64, needs.
pub fn needs(file: &[u8]) -> Outcome<Needs> {
    if file.get(..6) != Some(b"\x7fELF\x02\x01") || number::<2>(file, 18) != Ok(62) {
        return Err("not an ELF file for x86-64".into());
    }
    let (table, size, count) = (number::<8>(file, 32)?, number::<2>(file, 54)?, number::<2>(file, 56)?);
    let mut segments = Vec::new();
    for at in (0..count).map(|index| table.saturating_add(index * size)) {
        segments.push(Segment {
            kind: number::<4>(file, at)? as u32,
            offset: number::<8>(file, at + 8)?,
            address: number::<8>(file, at + 16)?,
            size: number::<8>(file, at + 32)?,
        });
    }
    let of_kind = |kind| segments.iter().find(|segment| segment.kind == kind);
    let loader = of_kind(INTERPRETER).map(|segment| text(file, segment.offset)).transpose()?;
    let Some(dynamic) = of_kind(DYNAMIC) else { return Ok(Needs { loader, libraries: Vec::new() }) };
    let (mut names, mut strings) = (Vec::new(), None);
    for at in (0..dynamic.size / 16).map(|index| dynamic.offset.saturating_add(index * 16)) {
        match (number::<8>(file, at)?, number::<8>(file, at + 8)?) {
            (0, _) => break,
            (NEEDED, name) => names.push(name),
            (STRINGS, address) => strings = Some(address),
            _ => {}
        }
    }
    let strings = strings.ok_or("no table of strings")?;
    let inside = |segment: &&Segment| strings.checked_sub(segment.address).is_some_and(|into| into < segment.size);
    let mut loaded = segments.iter().filter(|segment| segment.kind == LOAD);
    let segment = loaded.find(inside).ok_or("the table of strings is outside the file")?;
    let base = (strings - segment.address).saturating_add(segment.offset);
    let libraries = names.into_iter().map(|name| text(file, base.saturating_add(name))).collect::<Outcome<_>>()?;
    Ok(Needs { loader, libraries })
}

/// A little-endian number of `N` bytes.
fn number<const N: usize>(file: &[u8], at: u64) -> Outcome<u64> {
    let from = usize::try_from(at).map_err(|_| "an offset outside the file")?;
    let bytes = from.checked_add(N).and_then(|end| file.get(from..end)).ok_or("an offset outside the file")?;
    Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// A string that ends with a zero.
fn text(file: &[u8], at: u64) -> Outcome<String> {
    let rest = usize::try_from(at).ok().and_then(|at| file.get(at..)).ok_or("a string outside the file")?;
    let end = rest.iter().position(|byte| *byte == 0).ok_or("a string without an end")?;
    String::from_utf8(rest[..end].to_vec()).map_err(|_| "a name that is no text".into())
}

/// The loader and all libraries that `program` needs, theirs included, by path below `root` (without a leading slash).
pub fn closure(program: &[u8], root: &Path) -> Outcome<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let first = needs(program)?;
    let loader = first.loader.ok_or("the program is linked statically or has no loader")?;
    let loader_name = Path::new(&loader).file_name().unwrap_or_default().to_os_string();
    let path = loader.trim_start_matches('/').to_owned();
    found.insert(path.clone(), read(&root.join(&path))?);
    let (mut open, mut known) = (first.libraries, vec![loader_name.to_string_lossy().into_owned()]);
    while let Some(name) = open.pop() {
        if known.contains(&name) {
            continue;
        }
        let path = look_up(&name, root)?;
        let bytes = read(&root.join(&path))?;
        open.extend(needs(&bytes).map_err(|error| format!("{path}: {error}"))?.libraries);
        found.insert(path, bytes);
        known.push(name);
    }
    Ok(found)
}

fn look_up(name: &str, root: &Path) -> Outcome<String> {
    let mut paths = FOLDERS.iter().map(|folder| format!("{folder}/{name}"));
    paths.find(|path| root.join(path).is_file()).ok_or_else(|| format!("{name} is in none of {}", FOLDERS.join(", ")))
}

fn read(path: &PathBuf) -> Outcome<Vec<u8>> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_needs_what_ldd_says() {
        let here = std::env::current_exe().unwrap();
        let found = closure(&fs::read(&here).unwrap(), Path::new("/")).unwrap();
        let said = crate::process::output(crate::process::command("ldd").arg(&here)).unwrap();
        // `	NAME => PATH (ADDRESS)` and the loader; the kernel's own (vdso) is no file.
        let mut said: Vec<_> = said.lines().filter(|line| line.contains('/')).collect();
        said.sort_unstable();
        assert_eq!(found.len(), said.len(), "{:?}\n{said:?}", found.keys());
        for path in found.keys() {
            let name = path.rsplit('/').next().unwrap();
            assert!(said.iter().any(|line| line.contains(name)), "{path} is not in {said:?}");
        }
    }

    #[test]
    fn a_damaged_program_is_an_error() {
        let whole = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needs(b"#!/bin/sh\n").unwrap_err().contains("not an ELF file"));
        for cut in [0, 4, 16, 40, 60, 100, 700, 4_000] {
            assert!(needs(&whole[..cut]).is_err(), "{cut} bytes");
        }
        // Every byte of the headers by turns: an error or another answer, no panic.
        for at in 0..1_024 {
            let mut odd = whole[..whole.len().min(1 << 20)].to_vec();
            odd[at] ^= 0xff;
            let _either = needs(&odd);
        }
    }
}
