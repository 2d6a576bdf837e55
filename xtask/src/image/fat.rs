//! FAT volumes, built in memory: no clock and no chance is in them, so that the same files give the same bytes.

use crate::Outcome;
use fatfs::{Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};
use std::collections::BTreeMap;
use std::io::{Cursor, Write};

/// When every file was made. Without a provider the crate writes zeros, which are no date: firmware then refuses to rename the
/// file, and the boot loader could count no tries.
const DATE: Date = Date { year: 1980, month: 1, day: 1 };

/// The same time, always.
#[derive(Debug)]
struct Fixed;

impl TimeProvider for Fixed {
    fn get_current_date(&self) -> Date {
        DATE
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime { date: DATE, time: Time { hour: 0, min: 0, sec: 0, millis: 0 } }
    }
}

/// A volume to make.
pub struct Volume<'a> {
    /// Up to eleven characters, in capitals.
    pub label: &'a str,
    pub kind: FatType,
    pub bytes: u64,
    /// Contents by path, with slashes; folders come with them.
    pub files: &'a BTreeMap<String, Vec<u8>>,
}

impl Volume<'_> {
    /// The bytes of the volume.
    pub fn build(&self) -> Outcome<Vec<u8>> {
        let failed = |error: std::io::Error| format!("{}: {error}", self.label);
        let size = usize::try_from(self.bytes).map_err(|error| format!("{}: {error}", self.label))?;
        let mut disk = Cursor::new(vec![0; size]);
        let mut label = [b' '; 11];
        for (to, from) in label.iter_mut().zip(self.label.bytes()) {
            *to = from;
        }
        let id = super::gpt::identifier(&format!("volume {}", self.label));
        let id = u32::from_le_bytes([id[0], id[1], id[2], id[3]]);
        let options = FormatVolumeOptions::new().fat_type(self.kind).volume_id(id).volume_label(label);
        fatfs::format_volume(&mut disk, options).map_err(failed)?;
        let options = FsOptions::new().update_accessed_date(false).time_provider(&Fixed);
        let volume = FileSystem::new(&mut disk, options).map_err(failed)?;
        for (path, bytes) in self.files {
            for (at, _) in path.match_indices('/') {
                volume.root_dir().create_dir(&path[..at]).map_err(failed)?;
            }
            let full = |error| format!("{}: {path} ({} bytes): {error}", self.label, bytes.len());
            let mut file = volume.root_dir().create_file(path).map_err(full)?;
            file.write_all(bytes).and_then(|()| file.flush()).map_err(full)?;
        }
        volume.unmount().map_err(failed)?;
        Ok(disk.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_volume_has_its_files_and_is_the_same_every_time() {
        let long = (0..100_000_u32).map(|at| at as u8).collect::<Vec<_>>();
        let files: BTreeMap<_, _> = [
            ("loader/entries/dray-a+3.conf".to_owned(), b"title Dray\n".to_vec()),
            ("loader/loader.conf".to_owned(), b"timeout 0\n".to_vec()),
            ("dray/a/vmlinuz".to_owned(), long.clone()),
        ]
        .into();
        let volume = Volume { label: "DRAY-TEST", kind: FatType::Fat32, bytes: 40 << 20, files: &files };
        let built = volume.build().unwrap();
        assert!(built == volume.build().unwrap(), "two builds differ");
        // UEFI's drivers refuse to rename a file with a date that is none: short entry of the file, then its dates.
        let entry = built.windows(11).position(|bytes| bytes == b"DRAY-A~1CON").expect("the entry");
        let date = |at: usize| u16::from_le_bytes([built[entry + at], built[entry + at + 1]]);
        assert_eq!([16, 18, 24].map(date), [1 << 5 | 1; 3], "created, accessed, written on 1980-01-01");
        let read = FileSystem::new(Cursor::new(built), FsOptions::new()).unwrap();
        assert_eq!((read.fat_type(), read.volume_label().trim()), (FatType::Fat32, "DRAY-TEST"));
        for (path, bytes) in &files {
            let mut found = Vec::new();
            read.root_dir().open_file(path).unwrap().read_to_end(&mut found).unwrap();
            assert!(found == *bytes, "{path}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let files: BTreeMap<_, _> = [("dray/initrd".to_owned(), vec![1; 3 << 20])].into();
        let error = Volume { label: "SMALL", kind: FatType::Fat16, bytes: 5 << 20, files: &files }.build().map(drop);
        assert_eq!(error, Ok(()));
        let error = Volume { label: "SMALL", kind: FatType::Fat12, bytes: 2 << 20, files: &files }.build().map(drop).unwrap_err();
        assert!(error.contains("SMALL") && error.contains("dray/initrd") && error.contains("3145728"), "{error}");
    }
}
