//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer policy`: see `dray_fuzz::policy`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::policy::run(data));
