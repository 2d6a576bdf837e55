//! `cargo fuzz run --fuzz-dir tests/fuzz --features libfuzzer nvme_tcp`: see `dray_fuzz::nvme_tcp`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dray_fuzz::nvme_tcp::run(data));
