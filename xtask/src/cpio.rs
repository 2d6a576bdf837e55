//! Archives in cpio's "newc" format, which is what the kernel takes as its initial RAM disk.

use std::collections::BTreeMap;

/// What stands at a path.
enum Node {
    Folder,
    File { bytes: Vec<u8>, executable: bool },
    Link(String),
}

/// A tree of files, by path without a leading slash.
#[derive(Default)]
pub struct Archive {
    nodes: BTreeMap<String, Node>,
}

impl Archive {
    /// Adds a folder and those above it.
    pub fn folder(&mut self, path: &str) {
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            if at > 0 {
                self.nodes.entry(path[..at].into()).or_insert(Node::Folder);
            }
        }
    }

    /// Adds or replaces a file; the folders above it come with it.
    pub fn file(&mut self, path: &str, bytes: Vec<u8>, executable: bool) {
        self.put(path, Node::File { bytes, executable });
    }

    /// Adds a symbolic link unless something stands there.
    pub fn link(&mut self, path: &str, to: &str) {
        if !self.nodes.contains_key(path) {
            self.put(path, Node::Link(to.into()));
        }
    }

    fn put(&mut self, path: &str, node: Node) {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
        self.nodes.insert(path.into(), node);
    }

    /// The archive's bytes: folders stand before what is in them, since paths are in order.
    pub fn bytes(&self) -> Vec<u8> {
        let mut into = Vec::new();
        for (inode, (path, node)) in (1..).zip(&self.nodes) {
            match node {
                Node::Folder => entry(&mut into, inode, 0o040_755, path, &[]),
                Node::File { bytes, executable } => entry(&mut into, inode, if *executable { 0o100_755 } else { 0o100_644 }, path, bytes),
                Node::Link(to) => entry(&mut into, inode, 0o120_777, path, to.as_bytes()),
            }
        }
        entry(&mut into, 0, 0, "TRAILER!!!", &[]);
        into
    }
}

/// Thirteen numbers of eight hexadecimal digits, the name and the contents, both filled up to four bytes.
fn entry(into: &mut Vec<u8>, inode: u32, mode: u32, path: &str, bytes: &[u8]) {
    into.extend_from_slice(b"070701");
    // inode, mode, user, group, links, time, size, device (2), device of a special file (2), size of the name, sum
    let numbers = [inode, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, path.len() as u32 + 1, 0];
    for number in numbers {
        into.extend_from_slice(format!("{number:08X}").as_bytes());
    }
    into.extend_from_slice(path.as_bytes());
    into.push(0);
    fill(into);
    into.extend_from_slice(bytes);
    fill(into);
}

fn fill(into: &mut Vec<u8>) {
    into.resize(into.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_folders_first_and_ends_with_the_trailer() {
        let mut archive = Archive::default();
        archive.file("usr/bin/tool", b"tool".to_vec(), true);
        archive.link("bin", "target");
        archive.link("usr/bin/tool", "elsewhere");
        let bytes = archive.bytes();
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(&format!("{name}\0")).unwrap_or_else(|| panic!("no {name}"));
        assert!(at("usr") < at("usr/bin") && at("usr/bin") < at("usr/bin/tool") && at("usr/bin/tool") < at("TRAILER!!!"));
        assert!(text.contains("tool\0tool") || text.contains("tool\0\0tool") || text.contains("tool\0\0\0tool"), "{text}");
        assert!(!text.contains("elsewhere") && bytes.len() % 4 == 0);
        // A header has 6 + 13 · 8 bytes.
        assert_eq!((&bytes[..6], &bytes[110..114]), (&b"070701"[..], &b"bin\0"[..]));
    }
}
