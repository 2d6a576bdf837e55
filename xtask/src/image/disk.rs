//! The disk: partition table, EFI system partition with the boot loader and slot a, configuration, state.

use super::fat::Volume;
use super::gpt::{self, Kind, Partition};
use super::inputs::Inputs;
use crate::Outcome;
use crate::process::{command, find, run};
use fatfs::FatType;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Names by which the appliance finds its partitions.
const ESP: &str = "DRAY-ESP";
const CONFIG: &str = "DRAY-CONFIG";
const STATE: &str = "DRAY-STATE";
/// Room for two slots, and for a third while an update is written.
const ESP_BYTES: u64 = 256 << 20;
/// Room for components with a whole interpreter in them.
const CONFIG_BYTES: u64 = 64 << 20;
/// What is written at once; pieces of zeros are left out of the file.
const PIECE: usize = 64 << 10;

const LOADER_CONF: &str = "# The entry with the highest version that has tries left, at once; no editing of command lines.\n\
                           timeout 0\neditor no\nauto-entries no\nauto-firmware no\nconsole-mode keep\n";

/// The boot entry of a slot, as `dray image update` writes it too (UAPI boot loader specification, type 1).
fn entry(slot: char, version: u64, options: &str) -> String {
    format!(
        "title Dray (slot {slot}, version {version})\nsort-key dray\nversion {version}\nlinux /dray/{slot}/vmlinuz\n\
         initrd /dray/{slot}/initrd\noptions {options} dray.slot={slot} dray.version={version}\n"
    )
}

/// The files of the EFI system partition.
fn system_files(inputs: &Inputs, initrd: &[u8]) -> BTreeMap<String, Vec<u8>> {
    [
        ("EFI/BOOT/BOOTX64.EFI".to_owned(), inputs.loader.clone()),
        ("loader/loader.conf".to_owned(), LOADER_CONF.into()),
        // "+3": the loader counts three tries down until the system says that it came up.
        ("loader/entries/dray-a+3.conf".to_owned(), entry('a', inputs.version, &inputs.options).into()),
        ("dray/a/vmlinuz".to_owned(), inputs.kernel.image.clone()),
        ("dray/a/initrd".to_owned(), initrd.to_vec()),
    ]
    .into()
}

/// Writes the disk to `path`, whole or not at all.
pub fn write(path: &Path, inputs: &Inputs, initrd: &[u8]) -> Outcome<u64> {
    let part = path.with_extension("img.part");
    let written = write_new(&part, inputs, initrd);
    match written {
        Ok(bytes) => fs::rename(&part, path).map(|()| bytes).map_err(|error| format!("{}: {error}", path.display())),
        Err(error) => {
            // The first error is the one to show.
            let _ = fs::remove_file(&part);
            Err(error)
        }
    }
}

fn write_new(path: &Path, inputs: &Inputs, initrd: &[u8]) -> Outcome<u64> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let sizes = [(ESP, Kind::Efi, ESP_BYTES), (CONFIG, Kind::Basic, CONFIG_BYTES), (STATE, Kind::Linux, inputs.state_bytes)];
    let (partitions, bytes) = gpt::lay_out(&sizes);
    let file = File::create(path).map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    for (at, table) in gpt::tables(&partitions, bytes) {
        file.write_all_at(&table, at).map_err(failed)?;
    }
    let system = system_files(inputs, initrd);
    let volumes = [(&partitions[0], FatType::Fat32, &system), (&partitions[1], FatType::Fat16, &inputs.config)];
    for (partition, kind, files) in volumes {
        let volume = Volume { label: partition.name, kind, bytes: partition.bytes, files }.build()?;
        write_sparse(&file, partition.start, &volume).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    make_ext4(path, &partitions[2])?;
    Ok(bytes)
}

fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> std::io::Result<()> {
    let zeros = [0; PIECE];
    for (piece, offset) in bytes.chunks(PIECE).zip((at..).step_by(PIECE)) {
        if *piece != zeros[..piece.len()] {
            file.write_all_at(piece, offset)?;
        }
    }
    Ok(())
}

/// Makes an empty ext4 inside the file, with nothing in it that depends on the time or on chance.
fn make_ext4(path: &Path, partition: &Partition) -> Outcome {
    let tool = find("mkfs.ext4").ok_or("mkfs.ext4 not found: install e2fsprogs")?;
    let (uuid, seed) = (gpt::identifier_text(partition.name), gpt::identifier_text("directory hashes"));
    let at = partition.start;
    let extended = format!("offset={at},hash_seed={seed},lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0");
    let mut make = command(tool);
    // Before 1.47.1 the time is taken from the first of these, since then from the second.
    make.env("E2FSPROGS_FAKE_TIME", "315532800").env("SOURCE_DATE_EPOCH", "315532800");
    make.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", "^orphan_file,^resize_inode", "-L", partition.name]);
    run(make.args(["-U", &uuid, "-E", &extended]).arg(path).arg(format!("{}k", partition.bytes / 1024)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_names_its_slot_everywhere() {
        let text = entry('b', 7, "quiet");
        assert_eq!(text.matches("slot=b").count() + text.matches("/dray/b/").count(), 3);
        assert!(text.contains("\nsort-key dray\nversion 7\n"), "{text}");
        assert!(text.ends_with("options quiet dray.slot=b dray.version=7\n"), "{text}");
    }
}
