//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer state`: see `dray_fuzz::state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::state::run(data));
