//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer controller`: see `dray_fuzz::controller`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::controller::run(data));
