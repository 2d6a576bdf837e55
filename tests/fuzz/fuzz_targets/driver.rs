//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer driver`: see `dray_fuzz::driver`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::driver::run(data));
