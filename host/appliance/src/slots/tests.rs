//! Updates that are interrupted at every instant, bundles that are not what they should be, slots on trial.

use super::bless::{Way, bless, trial, way};
use super::bundle::{BundleError, Header, Key, MAGIC, hex};
use super::entry::{self, Entry, INITRD, KERNEL, Tries};
use super::files::{Files, Folder};
use super::model::Model;
use super::update::{RunningSlot, UpdateError, update};
use super::{ENTRIES, folder, look};
use crate::init::cmdline::Slot;
use ed25519_dalek::{Signer, SigningKey};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

const KERNEL_BYTES: usize = 200_000;
const INITRD_BYTES: usize = 70_000;
const RUNNING: RunningSlot = RunningSlot { slot: Slot::A, version: Some(7) };

fn signer() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn key() -> Key {
    Key::from_bytes(signer().verifying_key().as_bytes()).expect("a key")
}

fn content(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect()
}

fn header_json(version: u64) -> String {
    let part = |bytes: &[u8]| format!("{{\"bytes\": {}, \"sha256\": \"{}\"}}", bytes.len(), hex(&Sha256::digest(bytes)));
    let (kernel, initrd) = (content(KERNEL_BYTES, 1), content(INITRD_BYTES, 2));
    format!("{{\"version\": {version}, \"kernel\": {}, \"initrd\": {}, \"options\": \"quiet\"}}", part(&kernel), part(&initrd))
}

fn bundle_of(header: &str) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    let signature = signer().sign(&bytes);
    bytes.extend_from_slice(&signature.to_bytes());
    bytes.extend(content(KERNEL_BYTES, 1));
    bytes.extend(content(INITRD_BYTES, 2));
    bytes
}

fn bundle(version: u64) -> Vec<u8> {
    bundle_of(&header_json(version))
}

fn apply(bytes: &[u8], files: &mut dyn Files) -> Result<Header, UpdateError> {
    update(&mut &bytes[..], &key(), RUNNING, false, files, &mut |_| {})
}

/// A partition with version 7 in slot a, good, and 6 in slot b.
fn partition(capacity: u64) -> Model {
    let mut model = Model::new(capacity);
    for (slot, version, seed) in [(Slot::A, 7, 10), (Slot::B, 6, 20)] {
        model.put(&format!("{}/{KERNEL}", folder(slot)), &content(KERNEL_BYTES, seed));
        model.put(&format!("{}/{INITRD}", folder(slot)), &content(INITRD_BYTES, seed + 1));
        model.put(&format!("{ENTRIES}/{}", entry::name(slot, Tries::default())), entry::text(slot, version, "quiet").as_bytes());
    }
    model
}

/// What the boot loader would boot of a slot: the version of its entry with the files that belong to it. Panics if there is an
/// entry whose files are not those of its version.
fn bootable(files: &dyn Files, slot: Slot) -> Option<u64> {
    let found = look(files, slot).expect("look");
    let version = found.entry()?.2.version.expect("a version");
    let seed = match version {
        7 => 10,
        6 => 20,
        8 => 1,
        other => panic!("version {other}"),
    };
    for (_, _, entry) in &found.entries {
        assert_eq!(entry.told_version(), Some(version));
    }
    let read = |name: &str| files.read(&format!("{}/{name}", folder(slot)), u64::MAX).unwrap_or_default();
    assert!(read(KERNEL) == content(KERNEL_BYTES, seed), "the kernel of version {version}");
    assert!(read(INITRD) == content(INITRD_BYTES, seed + 1), "the initramfs of version {version}");
    Some(version)
}

const ROOMY: u64 = 1 << 30;
/// Not enough for three slots' files, but for two.
const TIGHT: u64 = 2 * (KERNEL_BYTES + INITRD_BYTES) as u64 + (1 << 20) + 100_000;

#[test]
fn an_update_writes_the_other_slot() {
    for capacity in [ROOMY, TIGHT] {
        let mut model = partition(capacity);
        let header = apply(&bundle(8), &mut model).expect("an update");
        assert_eq!(header.version, 8);
        assert_eq!((bootable(&model, Slot::A), bootable(&model, Slot::B)), (Some(7), Some(8)));
        let found = look(&model, Slot::B).expect("look");
        assert_eq!(found.entries[0].0, "dray-b+3.conf");
        assert_eq!(found.entries[0].2, Entry { version: Some(8), options: "quiet dray.slot=b dray.version=8".into() });
        let after = model.after_power_cut(|| false);
        assert_eq!(bootable(&after, Slot::B), Some(8), "all of it is flushed");
    }
}

#[test]
fn an_update_on_a_folder_of_the_system() {
    let root = std::env::temp_dir().join(format!("dray-slots-{}", std::process::id()));
    let mut files = Folder::new(&root);
    std::fs::create_dir_all(&root).expect("folder");
    for _ in 0..2 {
        apply(&bundle(8), &mut files).expect("an update, and the same again");
        assert_eq!(bootable(&files, Slot::B), Some(8));
        let names = files.list(&folder(Slot::B)).expect("list");
        assert_eq!(names, [INITRD, KERNEL]);
    }
    assert_eq!(trial(&files, Slot::B, Some(8)).expect("look"), Some(3));
    assert!(!bless(&mut files, Slot::B, Some(9)).expect("bless"), "another version");
    assert!(bless(&mut files, Slot::B, Some(8)).expect("bless"));
    assert_eq!(files.list(ENTRIES).expect("list"), ["dray-b.conf"]);
    assert_eq!(trial(&files, Slot::B, Some(8)).expect("look"), None);
    std::fs::remove_dir_all(root).expect("clean up");
}

/// Draws bits from a seed.
fn bits(mut seed: u64) -> impl FnMut() -> bool {
    move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 63 == 1
    }
}

/// The guarantee: whatever operation the power goes at, and whatever of it had reached the disk.
fn cut_everywhere(capacity: u64, seed: u64) {
    let mut whole = partition(capacity);
    apply(&bundle(8), &mut whole).expect("an update");
    for left in 0..=whole.done {
        let mut model = partition(capacity);
        model.left = Some(left);
        let result = apply(&bundle(8), &mut model);
        assert_eq!(result.is_ok(), left == whole.done);
        // The process died and the system lives; then the power goes too.
        for mut after in [model.powered(), model.after_power_cut(bits(seed ^ left as u64))] {
            assert_eq!(bootable(&after, Slot::A), Some(7), "cut at {left}");
            assert!(matches!(bootable(&after, Slot::B), None | Some(6 | 8)), "cut at {left}");
            // And the next attempt is not kept from anything.
            apply(&bundle(8), &mut after).expect("again");
            assert_eq!((bootable(&after, Slot::A), bootable(&after, Slot::B)), (Some(7), Some(8)), "cut at {left}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn an_update_can_be_interrupted_at_any_instant(seed: u64, tight: bool) {
        cut_everywhere(if tight { TIGHT } else { ROOMY }, seed);
    }
}

#[test]
fn with_room_a_bundle_that_is_bad_costs_nothing() {
    let mut model = partition(ROOMY);
    let mut bytes = bundle(8);
    *bytes.last_mut().expect("bytes") ^= 1;
    assert!(matches!(apply(&bytes, &mut model), Err(UpdateError::Bundle(BundleError::Digest { what: "initrd", .. }))));
    assert_eq!((bootable(&model, Slot::A), bootable(&model, Slot::B)), (Some(7), Some(6)), "the old one is still there");
    bytes.truncate(bytes.len() - 1);
    assert!(matches!(apply(&bytes, &mut model), Err(UpdateError::Bundle(BundleError::Unreadable(_)))));
    assert_eq!(bootable(&model, Slot::B), Some(6));
    let small = 2 * (KERNEL_BYTES + INITRD_BYTES) as u64 + 1000;
    assert!(matches!(apply(&bundle(8), &mut partition(small)), Err(UpdateError::Room { .. })));
}

#[test]
fn what_is_not_signed_or_not_newer_is_not_even_begun() {
    let refused = |bytes: &[u8], running: RunningSlot, downgrade: bool| {
        let mut model = partition(ROOMY);
        let error = update(&mut &bytes[..], &key(), running, downgrade, &mut model, &mut |_| {}).expect_err("refused");
        assert_eq!(model.done, 0, "nothing was touched: {error}");
        error
    };
    let good = bundle(8);
    let header = 12..12 + header_json(8).len();
    // Each byte of what is signed, and of the signature.
    for at in (0..header.end + 64).step_by(7) {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        let error = refused(&bytes, RUNNING, false);
        assert!(matches!(error, UpdateError::Bundle(_)), "byte {at}: {error}");
    }
    assert!(matches!(refused(&good[..header.end], RUNNING, false), UpdateError::Bundle(BundleError::Unreadable(_))));
    for version in [8, 9] {
        let running = RunningSlot { version: Some(version), ..RUNNING };
        assert!(matches!(refused(&good, running, false), UpdateError::NotNewer { offered: 8, .. }));
    }
    let mut model = partition(ROOMY);
    let newer = RunningSlot { version: Some(9), ..RUNNING };
    assert!(update(&mut &good[..], &key(), newer, true, &mut model, &mut |_| {}).is_ok(), "asked for by name");
    for (from, to) in [
        ("quiet", "quiet\\ndray.slot=a"),
        ("quiet", "dray.slot=a"),
        ("\"bytes\": 200000", "\"bytes\": 0"),
        ("\"bytes\": 200000", "\"bytes\": 99999999999"),
        ("\"sha256\": \"", "\"sha256\": \"x"),
        ("\"version\": 8", "\"version\": -8"),
        ("\"kernel\"", "\"cernel\""),
    ] {
        let text = header_json(8).replacen(from, to, 1);
        let error = refused(&bundle_of(&text), RUNNING, false);
        assert!(matches!(error, UpdateError::Bundle(BundleError::Format(_))), "{text}: {error}");
    }
}

#[test]
fn a_power_cut_while_a_slot_is_called_good_leaves_it_bootable() {
    let on_trial = || {
        let mut model = partition(ROOMY);
        model.remove(&format!("{ENTRIES}/dray-a.conf")).expect("remove");
        model.put(&format!("{ENTRIES}/dray-a+2-1.conf"), entry::text(Slot::A, 7, "quiet").as_bytes());
        model.done = 0;
        model
    };
    let mut whole = on_trial();
    assert!(bless(&mut whole, Slot::A, Some(7)).expect("bless"));
    for left in 0..=whole.done {
        // Removing without the new name is what a FAT driver's order of writing excludes; both names are not.
        for keep_old in [true, false] {
            let mut model = on_trial();
            model.left = Some(left);
            let _cut = bless(&mut model, Slot::A, Some(7));
            let mut first = true;
            let mut after = model.after_power_cut(|| std::mem::replace(&mut first, false) || !keep_old);
            assert_eq!(bootable(&after, Slot::A), Some(7), "cut at {left}");
            let _done = bless(&mut after, Slot::A, Some(7)).expect("again");
            assert_eq!(trial(&after, Slot::A, Some(7)).expect("look"), None);
            assert_eq!(look(&after, Slot::A).expect("look").entries.len(), 1);
        }
    }
}

#[test]
fn a_slot_on_trial_goes_back_to_one_that_boots_and_not_without_end() {
    let with = |own: Option<u32>, other: Option<u32>, complete: bool| {
        let mut model = Model::new(ROOMY);
        for (slot, left) in [(Slot::A, own), (Slot::B, other)] {
            model.put(&format!("{}/{KERNEL}", folder(slot)), b"kernel");
            model.put(&format!("{ENTRIES}/{}", entry::name(slot, Tries { left, made: 1 })), entry::text(slot, 7, "").as_bytes());
            if complete {
                model.put(&format!("{}/{INITRD}", folder(slot)), b"initrd");
            }
        }
        way(&model, Slot::A, Some(7)).expect("look")
    };
    assert_eq!(with(None, None, true), Way::NotOnTrial);
    assert_eq!(with(Some(2), None, true), Way::Back);
    assert_eq!(with(Some(0), None, true), Way::Back);
    assert_eq!(with(Some(2), Some(1), true), Way::Back);
    assert_eq!(with(Some(0), Some(0), true), Way::Alone, "both are used up");
    assert_eq!(with(Some(2), None, false), Way::Alone, "its files are not all there");
    assert_eq!(way(&partition(ROOMY), Slot::A, Some(9)).expect("look"), Way::NotOnTrial, "an entry of another version");
}
