//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer vfio_user`: see `dray_fuzz::vfio_user`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::vfio_user::run(data));
