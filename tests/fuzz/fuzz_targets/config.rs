//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer config`: see `dray_fuzz::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::config::run(data));
