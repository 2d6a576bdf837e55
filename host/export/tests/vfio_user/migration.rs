//! The migration states, the stream, the log of written pages.

use crate::rig::{Failure, Rig, errno};
use dray_device::poll::Time;
use dray_device::vfio_user::wire::{
    DeviceFeature, LogRange, LoggingReport, LoggingStart, MigData, MigDeviceState, command, errno as code, feature,
    migration, region, state,
};
use dray_export::hooks::{HookError, HookState, MigrationHooks, NoMigration};
use dray_export::vfio_user::VfioUserConfig;
use std::sync::{Arc, Mutex};
use zerocopy::IntoBytes;

const GET: u32 = DeviceFeature::GET;
const SET: u32 = DeviceFeature::SET;
const PROBE: u32 = DeviceFeature::PROBE;

#[derive(Default)]
struct Script {
    calls: Vec<String>,
    /// Polls that say "working" after each step.
    slow: u32,
    left: u32,
    fail: Option<(&'static str, HookError)>,
    fail_later: Option<HookError>,
    blob: Option<Vec<u8>>,
    no_blob: Option<HookError>,
    restored: Vec<u8>,
    logging: bool,
    /// Polls of the log that say "working".
    log_left: u32,
    fail_log: Option<HookError>,
}

/// Hooks that do what a test wants.
#[derive(Clone, Default)]
struct Hooks(Arc<Mutex<Script>>);

impl Hooks {
    fn step(&self, name: &'static str) -> Result<(), HookError> {
        let mut script = self.0.lock().expect("lock");
        script.calls.push(name.into());
        script.left = script.slow;
        match &script.fail {
            Some((at, error)) if *at == name => Err(error.clone()),
            _ => Ok(()),
        }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("lock").calls)
    }

    fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.0.lock().expect("lock"));
    }
}

impl MigrationHooks for Hooks {
    fn start_precopy(&mut self, _now: Time) -> Result<(), HookError> {
        self.step("start")
    }

    fn resume(&mut self, _now: Time) -> Result<(), HookError> {
        self.step("resume")
    }

    fn stop(&mut self, _now: Time, hand_over: bool) -> Result<(), HookError> {
        self.step(if hand_over { "hand over" } else { "stop" })
    }

    fn reset(&mut self, _now: Time) -> Result<(), HookError> {
        self.step("reset")
    }

    fn state(&mut self) -> Result<Option<Vec<u8>>, HookError> {
        let script = self.0.lock().expect("lock");
        script.no_blob.clone().map_or_else(|| Ok(script.blob.clone()), Err)
    }

    fn prepare(&mut self, _now: Time) -> Result<(), HookError> {
        self.step("prepare")
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), HookError> {
        self.step("restore")?;
        self.set(|script| script.restored = state.to_vec());
        Ok(())
    }

    fn poll(&mut self, _now: Time) -> HookState {
        let mut script = self.0.lock().expect("lock");
        if script.left > 0 {
            script.left -= 1;
            return HookState::Working;
        }
        script.fail_later.take().map_or(HookState::Done, HookState::Failed)
    }

    fn can_log(&self) -> bool {
        self.0.lock().expect("lock").logging
    }

    fn start_logging(&mut self, ranges: &[(u64, u64)], page: u64) -> Result<u64, HookError> {
        self.set(|script| script.calls.push(format!("log {ranges:x?} {page}")));
        Ok(page.max(4096))
    }

    fn collect_logged(&mut self) -> Result<(), HookError> {
        self.set(|script| script.log_left = script.slow);
        Ok(())
    }

    fn poll_log(&mut self, _now: Time) -> HookState {
        let mut script = self.0.lock().expect("lock");
        if script.log_left > 0 {
            script.log_left -= 1;
            return HookState::Working;
        }
        script.fail_log.take().map_or(HookState::Done, HookState::Failed)
    }

    fn report_logged(&mut self, iova: u64, len: u64, page: u64, into: &mut [u8]) -> Result<(), HookError> {
        self.set(|script| script.calls.push(format!("report {iova:x} {len:x} {page}")));
        into[0] = 0x81;
        Ok(())
    }

    fn stop_logging(&mut self) -> Result<(), HookError> {
        self.set(|script| script.calls.push("log off".into()));
        Ok(())
    }
}

fn rig() -> (Rig, Hooks) {
    let hooks = Hooks::default();
    (Rig::with(VfioUserConfig::default(), Box::new(hooks.clone())), hooks)
}

fn ask(rig: &mut Rig, index: u32, methods: u32, argsz: u32, data: &[u8]) -> Result<Vec<u8>, Failure> {
    let head = DeviceFeature { argsz, flags: index | methods };
    rig.ask(command::DEVICE_FEATURE, &[head.as_bytes(), data].concat())
}

fn payload(to: u32) -> Vec<u8> {
    let head = DeviceFeature { argsz: 16, flags: feature::MIG_DEVICE_STATE | SET };
    [head.as_bytes(), MigDeviceState { state: to, data_fd: 0 }.as_bytes()].concat()
}

fn go(rig: &mut Rig, to: u32) -> Result<(), Failure> {
    let request = payload(to);
    let reply = rig.ask(command::DEVICE_FEATURE, &request)?;
    assert_eq!(reply, request, "the reply to SET is the request");
    Ok(())
}

fn at(rig: &mut Rig) -> u32 {
    let reply = ask(rig, feature::MIG_DEVICE_STATE, GET, 16, &[]).expect("state");
    u32::from_le_bytes(reply[8..12].try_into().expect("four bytes"))
}

fn read(rig: &mut Rig, size: u32) -> Result<Vec<u8>, Failure> {
    let reply = rig.ask(command::MIG_DATA_READ, MigData { argsz: size + 8, size }.as_bytes())?;
    let (head, data) = MigData::take(&reply).expect("reply");
    assert_eq!((head.argsz as usize, head.size as usize), (8 + data.len(), data.len()));
    Ok(data.to_vec())
}

fn write(rig: &mut Rig, data: &[u8]) -> Result<(), Failure> {
    let head = MigData { argsz: data.len() as u32 + 8, size: data.len() as u32 };
    rig.ask(command::MIG_DATA_WRITE, &[head.as_bytes(), data].concat()).map(|reply| assert!(reply.is_empty()))
}

#[test]
fn every_way_goes_through_the_steps_of_the_table() {
    use state::{PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY};
    let ways: [(u32, u32, &[&str]); 20] = [
        (RUNNING, STOP, &["stop"]),
        (RUNNING, STOP_COPY, &["stop", "hand over"]),
        (RUNNING, RESUMING, &["stop", "prepare"]),
        (RUNNING, PRE_COPY, &["start"]),
        (STOP, RUNNING, &["resume"]),
        (STOP, STOP_COPY, &["hand over"]),
        (STOP, RESUMING, &["prepare"]),
        (STOP, PRE_COPY, &["resume", "start"]),
        (STOP_COPY, STOP, &[]),
        (STOP_COPY, RUNNING, &["resume"]),
        (STOP_COPY, RESUMING, &["prepare"]),
        (RESUMING, STOP, &[]),
        (RESUMING, RUNNING, &["resume"]),
        (RESUMING, STOP_COPY, &["hand over"]),
        (RESUMING, PRE_COPY, &["resume", "start"]),
        (PRE_COPY, RUNNING, &["resume"]),
        (PRE_COPY, STOP, &["resume", "stop"]),
        (PRE_COPY, STOP_COPY, &["hand over"]),
        (PRE_COPY, RESUMING, &["resume", "stop", "prepare"]),
        (STOP, STOP, &[]),
    ];
    for slow in [0, 3] {
        for (from, to, steps) in ways {
            let (mut rig, hooks) = rig();
            hooks.set(|script| script.slow = slow);
            go(&mut rig, from).expect("there");
            hooks.calls();
            go(&mut rig, to).expect("there");
            assert_eq!((hooks.calls(), at(&mut rig)), (steps.iter().map(|s| (*s).into()).collect(), to), "{from} {to}");
        }
    }
}

#[test]
fn states_that_are_none_and_ways_that_are_none_are_refused() {
    let (mut rig, hooks) = rig();
    for to in [state::ERROR, state::RUNNING_P2P, state::PRE_COPY_P2P, 8, u32::MAX] {
        assert_eq!(errno(go(&mut rig, to)), code::EINVAL);
    }
    go(&mut rig, state::STOP_COPY).expect("there");
    hooks.calls();
    assert_eq!(errno(go(&mut rig, state::PRE_COPY)), code::EINVAL);
    assert_eq!((at(&mut rig), hooks.calls().len()), (state::STOP_COPY, 0));
}

#[test]
fn requests_wait_for_a_step_and_a_failure_keeps_what_is_intact() {
    let (mut rig, hooks) = rig();
    hooks.set(|script| script.slow = 200);
    rig.post(command::DEVICE_FEATURE, &payload(state::STOP), &[]);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing));
    assert!(rig.reply(1_000).expect("through").0.failure().is_none());
    hooks.set(|script| (script.slow, script.fail) = (0, Some(("resume", HookError::Busy("media".into())))));
    assert_eq!((errno(go(&mut rig, state::RUNNING)), at(&mut rig)), (code::EBUSY, state::STOP));
    hooks.set(|script| (script.fail, script.fail_later) = (None, Some(HookError::Failed("no".into()))));
    assert_eq!((errno(go(&mut rig, state::RUNNING)), at(&mut rig)), (code::EIO, state::STOP));
    hooks.set(|script| script.fail_later = Some(HookError::Broken("no".into())));
    assert_eq!((errno(go(&mut rig, state::STOP_COPY)), at(&mut rig)), (code::EIO, state::ERROR));
    assert_eq!(errno(go(&mut rig, state::RUNNING)), code::EINVAL, "only a reset leads out");
    rig.ask(command::RESET, &[]).expect("reset");
    assert_eq!(at(&mut rig), state::RUNNING);
}

#[test]
fn a_reset_leads_to_running_from_everywhere() {
    for from in [state::STOP, state::STOP_COPY, state::RESUMING, state::PRE_COPY, state::RUNNING] {
        let (mut rig, hooks) = rig();
        go(&mut rig, from).expect("there");
        hooks.calls();
        hooks.set(|script| script.slow = 5);
        rig.ask(command::RESET, &[]).expect("reset");
        let given_back = if from == state::RUNNING { vec![] } else { vec!["reset".to_owned()] };
        assert_eq!((at(&mut rig), hooks.calls()), (state::RUNNING, given_back));
    }
}

#[test]
fn a_function_goes_from_one_server_to_another() {
    let (mut source, hooks) = rig();
    source.region_write(region::CONFIG, 4, &[6, 4]).expect("command");
    source.region_write(region::BAR4, 0, &[0x5a; 16]).expect("table");
    source.region_write(region::BAR0, 0x1008, &[9, 0, 0, 0]).expect("doorbell");
    assert_eq!(errno(read(&mut source, 100)), code::EINVAL, "not while running");
    go(&mut source, state::PRE_COPY).expect("there");
    assert!(read(&mut source, 100).expect("nothing for now").is_empty());
    go(&mut source, state::STOP_COPY).expect("there");
    // Withheld until the state is there.
    source.post(command::MIG_DATA_READ, MigData { argsz: 108, size: 100 }.as_bytes(), &[]);
    assert_eq!(source.reply(50).map(|_| ()), Err(Failure::Nothing));
    let blob: Vec<u8> = (0..3_000).map(|i| i as u8).collect();
    hooks.set(|script| script.blob = Some(blob.clone()));
    let mut stream = source.reply(50).expect("now").1[8..].to_vec();
    assert_eq!(stream.len(), 100);
    loop {
        let part = read(&mut source, 999).expect("part");
        stream.extend_from_slice(&part);
        if part.len() < 999 {
            break;
        }
    }
    assert!(read(&mut source, 999).expect("the end").is_empty());

    let (mut destination, there) = rig();
    assert_eq!(errno(write(&mut destination, &stream)), code::EINVAL, "not while running");
    for bad in [&stream[..stream.len() - 1], &stream[1..], &stream[..10], &[stream.as_slice(), &[0; 16]].concat()] {
        go(&mut destination, state::RESUMING).expect("there");
        write(&mut destination, bad).expect("taken");
        assert_eq!(errno(go(&mut destination, state::STOP)), code::EINVAL);
        assert!(!there.calls().iter().any(|call| call == "restore"), "nothing is changed before all is checked");
        assert_eq!(at(&mut destination), state::RESUMING);
    }
    for flip in [3, 9, 14, 30, 48, stream.len() - 1] {
        let mut bad = stream.clone();
        bad[flip] ^= 0x10;
        write(&mut destination, &bad).expect("taken");
        assert_eq!(errno(go(&mut destination, state::STOP)), code::EINVAL, "byte {flip}");
    }
    for part in stream.chunks(777) {
        write(&mut destination, part).expect("part");
    }
    go(&mut destination, state::RUNNING).expect("there");
    assert_eq!(there.0.lock().expect("lock").restored, blob);
    assert_eq!(destination.region_read(region::CONFIG, 4, 2).expect("command"), [6, 4]);
    assert_eq!(destination.region_read(region::BAR4, 0, 16).expect("table"), [0x5a; 16]);
    assert_eq!(destination.server.slot().bar().load32(0x1008), 9);
}

#[test]
fn a_stream_of_another_kind_of_function_is_refused() {
    let (mut source, hooks) = rig();
    hooks.set(|script| script.blob = Some(vec![1]));
    go(&mut source, state::STOP_COPY).expect("there");
    let stream = read(&mut source, 100_000).expect("stream");
    let config = VfioUserConfig { vectors: 3, ..VfioUserConfig::default() };
    let other = Hooks::default();
    let mut destination = Rig::with(config, Box::new(other.clone()));
    go(&mut destination, state::RESUMING).expect("there");
    write(&mut destination, &stream).expect("taken");
    assert_eq!(errno(go(&mut destination, state::STOP)), code::EINVAL);
    assert_eq!(other.calls(), ["stop", "prepare"]);
}

#[test]
fn data_of_a_migration_is_bounded() {
    let (mut rig, _hooks) = rig();
    go(&mut rig, state::RESUMING).expect("there");
    let lies = [MigData { argsz: 108, size: 100 }.as_bytes(), &[0; 99]].concat();
    assert_eq!(errno(rig.ask(command::MIG_DATA_WRITE, &lies)), code::EINVAL);
    let piece = vec![0; 1 << 20];
    for _ in 0..16 {
        write(&mut rig, &piece).expect("room");
    }
    assert_eq!(errno(write(&mut rig, &piece)), code::ENOSPC);
    go(&mut rig, state::RESUMING).expect("there");
    for (argsz, size) in [(107, 100), (8 + (1 << 20) + 1, (1 << 20) + 1), (u32::MAX, u32::MAX)] {
        let request = MigData { argsz, size };
        assert_eq!(errno(rig.ask(command::MIG_DATA_READ, request.as_bytes())), code::EINVAL);
    }
}

#[test]
fn probes_succeed_where_every_method_is() {
    let (mut rig, hooks) = rig();
    let works = |rig: &mut Rig, index, methods| ask(rig, index, methods | PROBE, 8, &[]);
    for (index, methods) in [(feature::MIGRATION, 0), (feature::MIGRATION, GET), (feature::MIG_DEVICE_STATE, GET | SET)] {
        let reply = works(&mut rig, index, methods).expect("there");
        assert_eq!(reply, DeviceFeature { argsz: 8, flags: index | methods | PROBE }.as_bytes());
    }
    for (index, methods) in [(feature::MIGRATION, SET), (feature::MIGRATION, GET | SET), (0, GET), (3, GET), (99, 0)] {
        assert_eq!(errno(works(&mut rig, index, methods)), code::EINVAL, "{index} {methods:#x}");
    }
    assert_eq!(errno(works(&mut rig, feature::DMA_LOGGING_START, SET)), code::ENOTSUP);
    hooks.set(|script| script.logging = true);
    works(&mut rig, feature::DMA_LOGGING_START, SET).expect("there");
    assert_eq!(errno(works(&mut rig, feature::DMA_LOGGING_REPORT, SET)), code::EINVAL);
    assert_eq!(errno(ask(&mut rig, feature::MIGRATION, 0, 16, &[])), code::EINVAL, "no method");
    assert_eq!(errno(ask(&mut rig, feature::MIG_DEVICE_STATE, GET | SET, 16, &[0; 8])), code::EINVAL, "two methods");
    assert_eq!(errno(ask(&mut rig, feature::MIGRATION, GET, 15, &[])), code::EINVAL, "no room");
    assert_eq!(errno(ask(&mut rig, feature::MIGRATION, GET | 1 << 20, 16, &[])), code::EINVAL);
    assert_eq!(errno(ask(&mut rig, feature::MIG_DEVICE_STATE, SET, 16, &[0; 7])), code::EINVAL);
    assert_eq!(errno(ask(&mut rig, feature::MIG_DEVICE_STATE, SET, 15, &[0; 8])), code::EINVAL, "no room for the echo");
    let reply = ask(&mut rig, feature::MIGRATION, GET, 100, &[]).expect("ways");
    let expected = DeviceFeature { argsz: 16, flags: feature::MIGRATION | GET };
    assert_eq!(reply, [expected.as_bytes(), &(migration::STOP_COPY | migration::PRE_COPY).to_le_bytes()].concat());
    let mut fixed = Rig::with(VfioUserConfig::default(), Box::new(NoMigration));
    assert_eq!(errno(works(&mut fixed, feature::MIGRATION, GET)), code::ENOTSUP);
    assert_eq!(errno(go(&mut fixed, state::STOP)), code::ENOTSUP);
}

#[test]
fn written_pages_are_reported_as_far_as_the_client_has_room() {
    let (mut rig, hooks) = rig();
    hooks.set(|script| script.logging = true);
    let report = |length| LoggingReport { iova: 0x10_0000, length, page_size: 4096 };
    let room = |length: u64| 32 + (length / 4096).div_ceil(64) as u32 * 8;
    let all = |rig: &mut Rig, length, argsz| ask(rig, feature::DMA_LOGGING_REPORT, GET, argsz, report(length).as_bytes());
    assert_eq!(errno(all(&mut rig, 0x8000, 64)), code::EINVAL, "not on");
    let start = LoggingStart { page_size: 512, ranges: 2, reserved: 0 };
    let ranges = [LogRange { iova: 0x10_0000, length: 0x8000 }, LogRange { iova: 0, length: 1 }];
    let data = [start.as_bytes(), ranges.as_bytes()].concat();
    let reply = ask(&mut rig, feature::DMA_LOGGING_START, SET, 56, &data).expect("on");
    assert_eq!(LoggingStart::take(&reply[8..]).expect("reply").0, LoggingStart { page_size: 4096, ..start });
    assert_eq!(reply.len(), 56);
    assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_START, SET, 56, &data)), code::EBUSY);
    let reply = all(&mut rig, 65 * 4096, 4096).expect("bitmap");
    assert_eq!((reply.len(), &reply[32..34]), (48, &[0x81, 0][..]));
    assert_eq!(errno(all(&mut rig, 65 * 4096, 47)), code::EINVAL, "no room");
    for length in [0, u64::MAX, 1 << 60] {
        assert_eq!(errno(all(&mut rig, length, u32::MAX)), code::EINVAL);
    }
    all(&mut rig, 0x8000, room(0x8000)).expect("just fits");
    ask(&mut rig, feature::DMA_LOGGING_STOP, SET, 8, &[]).expect("off");
    assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_STOP, SET, 8, &[])), code::EINVAL);
    let calls = hooks.calls();
    assert_eq!(calls.len(), 4);
    assert_eq!(calls[0], "log [(100000, 8000), (0, 1)] 512");
    for bad in [
        LoggingStart { page_size: 0, ..start },
        LoggingStart { page_size: 4095, ..start },
        LoggingStart { ranges: 3, ..start },
        LoggingStart { ranges: u32::MAX, ..start },
    ] {
        let data = [bad.as_bytes(), ranges.as_bytes()].concat();
        assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_START, SET, 56, &data)), code::EINVAL);
    }
}

#[test]
fn a_client_that_dies_in_a_migration_leaves_a_device_that_runs_or_waits() {
    for (at_end, expected) in [(state::PRE_COPY, state::RUNNING), (state::STOP_COPY, state::STOP_COPY)] {
        let (mut rig, hooks) = rig();
        hooks.set(|script| script.logging = true);
        let start = LoggingStart { page_size: 4096, ..LoggingStart::default() };
        ask(&mut rig, feature::DMA_LOGGING_START, SET, 24, start.as_bytes()).expect("on");
        go(&mut rig, at_end).expect("there");
        rig.reconnect();
        rig.hello().expect("the next client");
        assert_eq!(at(&mut rig), expected);
        assert!(hooks.calls().contains(&"log off".into()));
    }
    // In the midst of a step: the step ends, then the next client is served.
    let (mut rig, hooks) = rig();
    hooks.set(|script| script.slow = 100);
    rig.post(command::DEVICE_FEATURE, &payload(state::STOP), &[]);
    rig.poll();
    rig.reconnect();
    rig.hello().expect("the next client");
    assert_eq!((at(&mut rig), hooks.calls()), (state::STOP, vec!["stop".to_string()]));
}

#[test]
fn the_function_is_taken_over_with_its_controller_or_not_at_all() {
    let (mut source, hooks) = rig();
    source.region_write(region::BAR0, 0x1008, &[9, 0, 0, 0]).expect("doorbell");
    hooks.set(|script| script.blob = Some(vec![7; 32]));
    go(&mut source, state::STOP_COPY).expect("there");
    let stream = read(&mut source, 100_000).expect("stream");

    let (mut destination, there) = rig();
    go(&mut destination, state::RESUMING).expect("there");
    there.set(|script| (script.slow, script.fail_later) = (50, Some(HookError::Invalid("no".into()))));
    write(&mut destination, &stream).expect("taken");
    assert_eq!((errno(go(&mut destination, state::RUNNING)), at(&mut destination)), (code::EINVAL, state::RESUMING));
    assert_eq!(destination.server.slot().bar().load32(0x1008), 0, "the controller did not take it");
    write(&mut destination, &stream).expect("taken again");
    destination.post(command::DEVICE_FEATURE, &payload(state::STOP), &[]);
    assert_eq!(destination.reply(20).map(|_| ()), Err(Failure::Nothing));
    assert_eq!(destination.server.slot().bar().load32(0x1008), 0, "the controller is not through with it");
    assert!(destination.reply(1_000).expect("through").0.failure().is_none());
    assert_eq!(destination.server.slot().bar().load32(0x1008), 9);
}

#[test]
fn a_stream_that_will_not_come_is_an_error_and_the_next_client_reads_from_the_start() {
    let (mut rig, hooks) = rig();
    go(&mut rig, state::STOP_COPY).expect("there");
    rig.post(command::MIG_DATA_READ, MigData { argsz: 108, size: 100 }.as_bytes(), &[]);
    assert_eq!(rig.reply(50).map(|_| ()), Err(Failure::Nothing), "withheld");
    hooks.set(|script| script.no_blob = Some(HookError::Failed("undone".into())));
    assert_eq!(rig.reply(50).expect("an end").0.failure(), Some(code::EIO));
    assert_eq!(at(&mut rig), state::STOP_COPY);
    hooks.set(|script| (script.no_blob, script.blob) = (None, Some(vec![1; 300])));
    let first = read(&mut rig, 100).expect("part");
    rig.reconnect();
    rig.hello().expect("the next client");
    assert_eq!(at(&mut rig), state::STOP_COPY);
    assert_eq!(read(&mut rig, 100).expect("part"), first);
}

#[test]
fn a_report_waits_for_the_controller() {
    let (mut rig, hooks) = rig();
    hooks.set(|script| (script.logging, script.slow) = (true, 30));
    let start = LoggingStart { page_size: 4096, ..LoggingStart::default() };
    hooks.set(|script| script.fail_log = Some(HookError::Busy("stopped".into())));
    assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_START, SET, 24, start.as_bytes())), code::EBUSY);
    let report = LoggingReport { iova: 0, length: 4096, page_size: 4096 };
    assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_REPORT, GET, 64, report.as_bytes())), code::EINVAL, "it did not start");
    ask(&mut rig, feature::DMA_LOGGING_START, SET, 24, start.as_bytes()).expect("on");
    hooks.calls();
    let request = [DeviceFeature { argsz: 64, flags: feature::DMA_LOGGING_REPORT | GET }.as_bytes(), report.as_bytes()].concat();
    rig.post(command::DEVICE_FEATURE, &request, &[]);
    assert_eq!(rig.reply(20).map(|_| ()), Err(Failure::Nothing));
    assert!(hooks.calls().is_empty(), "not before all is collected");
    assert_eq!(rig.reply(1_000).expect("bitmap").1[32], 0x81);
    hooks.set(|script| script.fail_log = Some(HookError::Failed("no".into())));
    assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_REPORT, GET, 64, report.as_bytes())), code::EIO);
    ask(&mut rig, feature::DMA_LOGGING_REPORT, GET, 64, report.as_bytes()).expect("still on");
    // A client that leaves meanwhile waits for nothing, and the next one begins anew.
    rig.post(command::DEVICE_FEATURE, &request, &[]);
    rig.poll();
    rig.reconnect();
    rig.hello().expect("the next client");
    assert!(hooks.calls().contains(&"log off".into()));
    assert_eq!(errno(ask(&mut rig, feature::DMA_LOGGING_REPORT, GET, 64, report.as_bytes())), code::EINVAL);
}
