//! The driver before a hostile device: registers that read anything (all ones included), completions that nobody asked for,
//! entries of controller data queues, events, Identify pages, and writes to whatever memory is mapped for the device.
//!
//! It asserts that every command that was taken ends exactly once, and with a status only if the device posted one for it; that
//! nothing ends that was not taken, that answers and
//! batches are no longer than asked for, that errors are values, that queue pairs are no more than the driver says were
//! granted, and that after all that a reset brings the driver up on a device that behaves.

use crate::device::{Device, SERIAL};
use crate::input::Input;
use dray_device::command::{CommandQueue, Completion, SubmitError};
use dray_device::function::Function;
use dray_device::memory::{DmaBuffer, PAGE, Pages};
use dray_device::poll::{Poll, Time};
use dray_device::space::MappedBuffer;
use dray_driver::mmc::{self, StateReader, StateSelection, StateWriter};
use dray_driver::{
    AdminData, CdqConfig, CdqFormat, CdqOptions, CdqOwner, Driver, DriverConfig, DriverState, PairTicket, QueuePair,
    QueuePairConfig, Ticket,
};
use dray_nvme::command::{AdminOpcode, FeatureSelect, SubmissionEntry};
use dray_nvme::feature::FeatureId;
use dray_nvme::identify::{Cns, CommandSetId};
use std::collections::BTreeMap;
use std::sync::Arc;

const MOST_STEPS: usize = 250;
/// Polls within which a driver on a device that behaves is ready.
const PATIENCE: usize = 3000;
/// Pages of data.
const DATA_PAGES: usize = 40;
/// Bytes of a controller state that are taken.
const STATE_LIMIT: usize = 16 << 10;
/// Things of each kind at a time.
const MOST: usize = 6;

/// I/O queues that the driver is to ask for.
const IO_QUEUES: u16 = 4;

/// A queue pair, and the tags that are outstanding in it with their CIDs.
struct Pair {
    queue: QueuePair,
    tags: BTreeMap<u64, u16>,
}

impl Pair {
    /// A command was taken.
    fn remember(&mut self, tag: u64) {
        let (_, cid) = self.queue.identifiers().find(|(of, _)| *of == tag).expect("taken, so it has a CID");
        assert!(!self.tags.values().any(|other| *other == cid), "CID {cid} twice");
        self.tags.insert(tag, cid);
    }

    fn end(&mut self, device: &Device, completion: Completion) {
        let cid = self.tags.remove(&completion.tag);
        let cid = cid.unwrap_or_else(|| panic!("{completion:?} of a command that was not outstanding"));
        if !completion.unknown {
            assert!(device.may_have_ended(self.queue.qid(), cid), "{completion:?} of CID {cid}, which the device has not ended");
            let status = completion.status;
            assert!(!status.is_error() || !matches!(status.sct().0, 4..=6), "{completion:?} with a reserved status");
        }
    }

    fn poll(&mut self, device: &Device, now: Time) {
        let mut ended = Vec::new();
        self.queue.poll(now, &mut |completion| ended.push(completion));
        ended.into_iter().for_each(|completion| self.end(device, completion));
        assert_eq!(self.queue.outstanding(), self.tags.len(), "commands outstanding");
    }
}

/// Something that is polled until it has ended.
type Query = Box<dyn FnMut(&mut Driver, Time) -> bool>;

struct Bench {
    device: Arc<Device>,
    driver: Driver,
    now: Time,
    data: MappedBuffer,
    tickets: Vec<PairTicket>,
    pairs: Vec<Pair>,
    requests: Vec<(Ticket, usize)>,
    queries: Vec<Query>,
    queues: Vec<CdqOwner>,
    next_tag: u64,
    /// The device answers by itself.
    answers: bool,
}

/// Runs one session.
///
/// # Panics
/// When a guarantee is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut bench = Bench::new(&mut input);
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        bench.step(&mut input);
        bench.check();
    }
    bench.end();
}

impl Bench {
    fn new(input: &mut Input<'_>) -> Self {
        let bits = input.u8();
        let device = Device::new();
        let config = DriverConfig {
            admin_entries: if bits & 1 == 0 { 32 } else { 8 },
            admin_timeout_ms: 1_000,
            io_timeout_ms: 400,
            io_queues: IO_QUEUES,
            max_transfer_bytes: if bits & 2 == 0 { 64 << 10 } else { 4096 },
            ..DriverConfig::default()
        };
        let function: Arc<dyn Function> = device.clone();
        let driver = Driver::new(function, config).expect("memory");
        let buffer = DmaBuffer::allocate("fuzz-data", DATA_PAGES * PAGE, Pages::Small).expect("memory");
        let data = MappedBuffer::new(driver.space(), buffer).expect("room");
        let mut bench = Self {
            device,
            driver,
            now: Time(1),
            data,
            tickets: Vec::new(),
            pairs: Vec::new(),
            requests: Vec::new(),
            queries: Vec::new(),
            queues: Vec::new(),
            next_tag: 1,
            answers: true,
        };
        if bits & 4 == 0 {
            bench.until_ready();
            bench.create_pair(32);
            bench.turns(4, 100);
        }
        bench
    }

    /// Lets everything go on; `us` pass in each turn.
    fn turns(&mut self, count: usize, us: u64) {
        for _ in 0..count {
            self.now = self.now.after_us(us);
            self.device.work(self.answers);
            let _progress = self.driver.poll(self.now);
            self.collect();
        }
    }

    fn collect(&mut self) {
        let Self { driver, now, device, .. } = self;
        while let Some(event) = driver.next_event() {
            for queue in &mut self.queues {
                let _own = queue.on_event(&event);
            }
        }
        for queue in &mut self.queues {
            let _progress = queue.poll(driver, *now);
        }
        self.requests.retain(|(ticket, most)| match driver.answer(*ticket) {
            Some(answer) => {
                assert!(answer.data.len() <= *most, "{} bytes for {most}", answer.data.len());
                driver.recycle(answer.data);
                false
            }
            None => true,
        });
        self.queries.retain_mut(|query| !query(driver, *now));
        let pairs = &mut self.pairs;
        self.tickets.retain(|ticket| match driver.queue_pair(ticket) {
            Some(Ok(queue)) => {
                pairs.push(Pair { queue, tags: BTreeMap::new() });
                false
            }
            Some(Err(error)) => error.to_string().is_empty(),
            None => true,
        });
        self.pairs.iter_mut().for_each(|pair| pair.poll(device, *now));
    }

    fn until_ready(&mut self) {
        for _ in 0..PATIENCE {
            if self.driver.is_ready() {
                return;
            }
            self.turns(1, 100);
        }
        panic!("not ready on a device that behaves: {:?}, {:?}", self.driver.state(), self.driver.last_failure());
    }

    fn create_pair(&mut self, entries: u16) {
        if self.tickets.len() + self.pairs.len() < MOST
            && let Ok(ticket) = self.driver.create_queue_pair(self.now, QueuePairConfig { entries, vector: Some(entries & 1) })
        {
            self.tickets.push(ticket);
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() & 31 {
            0..=9 => self.device.misbehave(input),
            10..=12 => self.submit(input),
            13 => self.create_pair(input.number16()),
            14 => self.delete_pair(input),
            15..=17 => self.admin(input),
            18 | 19 => self.query(input),
            20 => self.create_queue(input),
            21..=23 => self.use_queue(input),
            24 => self.driver.reset(self.now),
            25 => self.driver.forbid_reset(input.flag()),
            26 if input.flag() => self.driver.shutdown(self.now),
            27 => self.answers = !self.answers,
            28 => self.turns(2, input.number() % 100_000_000),
            _ => self.turns(input.below(8) + 1, 100),
        }
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let which = input.below(self.pairs.len().max(1));
        let Some(pair) = self.pairs.get_mut(which) else { return };
        let (slba, pieces) = (input.number(), input.below(4));
        let mut data = Vec::new();
        for _ in 0..pieces {
            let (at, len) = (usize::from(input.u16()) * 4, input.number() as usize % (20 * PAGE));
            data.extend(self.data.buffer().part(at % (DATA_PAGES * PAGE), len));
        }
        let entry = SubmissionEntry::write(1, slba, 8);
        let tag = self.next_tag;
        match pair.queue.submit(self.now, &entry, &data, tag) {
            Ok(()) => {
                self.next_tag += 1;
                pair.remember(tag);
            }
            Err(SubmitError::Full) => assert_eq!(pair.queue.free(), 0, "full with room"),
            Err(_) => {}
        }
        if input.flag() {
            pair.queue.commit();
        }
        assert_eq!(pair.queue.outstanding(), pair.tags.len(), "commands outstanding");
    }

    fn delete_pair(&mut self, input: &mut Input<'_>) {
        if self.pairs.is_empty() {
            return;
        }
        let Pair { queue, tags } = self.pairs.swap_remove(input.below(self.pairs.len()));
        match self.driver.delete_queue_pair(self.now, queue) {
            Ok(()) => assert!(tags.is_empty(), "deleted with commands outstanding"),
            Err(queue) => self.pairs.push(Pair { queue: *queue, tags }),
        }
    }

    fn admin(&mut self, input: &mut Input<'_>) {
        let mut entry = SubmissionEntry::admin(AdminOpcode(input.u8()));
        (entry.cdw10, entry.cdw11) = (input.number32(), input.number32());
        let entry = match input.below(3) {
            0 => SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM),
            1 => SubmissionEntry::get_features(FeatureId(input.u8()), FeatureSelect::CURRENT, 0),
            _ => entry,
        };
        let len = input.number() as usize % (200 << 10);
        let bytes = vec![input.u8(); len];
        let data = match input.below(3) {
            0 => AdminData::None,
            1 => AdminData::In(len),
            _ => AdminData::Out(&bytes),
        };
        let request = match input.u8() {
            0..=239 => self.driver.request(self.now, &entry, data),
            _ => self.driver.abort(self.now, input.number16(), input.number16()),
        };
        if let Ok(ticket) = request {
            self.requests.push((ticket, len));
        }
    }

    fn query(&mut self, input: &mut Input<'_>) {
        if self.queries.len() >= MOST {
            return;
        }
        let (now, which, number) = (self.now, input.below(9), input.number32());
        let driver = &mut self.driver;
        let cntlid = number as u16;
        let selection = StateSelection { cntlid, csvi: 1, csuuidi: 1 };
        /// A query as something that ends.
        macro_rules! ends {
            ($query:expr) => {
                $query.ok().map(|query| -> Query { Box::new(move |driver, _| query.poll(driver).is_some()) })
            };
        }
        let query = match which {
            0 => ends!(mmc::state_formats(driver, now)),
            1 => ends!(mmc::controllers(driver, now, cntlid)),
            2 => ends!(mmc::active_namespaces(driver, now, number)),
            3 => ends!(mmc::identify_namespace(driver, now, number)),
            4 => ends!(mmc::guest_limit(driver, now, cntlid)),
            5 => ends!(mmc::namespace_controllers(driver, now, number, cntlid)),
            6 => ends!(mmc::resume(driver, now, cntlid)),
            7 => {
                let mut reader = StateReader::new(selection, STATE_LIMIT);
                Some(Box::new(move |driver: &mut Driver, now| {
                    let ended = reader.poll(driver, now);
                    if let Some(Ok(state)) = &ended {
                        assert!(state.bytes.len() <= STATE_LIMIT, "a state of {} bytes", state.bytes.len());
                    }
                    ended.is_some()
                }) as Query)
            }
            _ => {
                let mut writer = StateWriter::new(selection, vec![0; number as usize % STATE_LIMIT]);
                Some(Box::new(move |driver: &mut Driver, now| writer.poll(driver, now).is_some()) as Query)
            }
        };
        self.queries.extend(query);
    }

    fn create_queue(&mut self, input: &mut Input<'_>) {
        if self.queues.len() >= MOST {
            self.queues.swap_remove(input.below(MOST));
        }
        let (slots, list) = (input.number32() % 600, input.flag());
        let config = CdqConfig { kind: 0, cntlid: 5, slots, format: CdqFormat::UDMQ, arm_trigger: input.flag() };
        let options = CdqOptions { prp_list: list, pages: Pages::Small, ..CdqOptions::default() };
        self.queues.extend(CdqOwner::create_with(&mut self.driver, self.now, config, options));
    }

    fn use_queue(&mut self, input: &mut Input<'_>) {
        let which = input.below(self.queues.len().max(1));
        let Some(queue) = self.queues.get_mut(which) else { return };
        let (what, number) = (input.below(8), input.number32());
        let (taken, slots) = (queue.taken(), queue.config().slots);
        let waiting = queue.waiting();
        assert!(taken + waiting <= slots, "{taken} taken and {waiting} waiting of {slots} slots");
        match what {
            0..=2 => {
                let mut bytes = Vec::new();
                let count = queue.take(number as usize, &mut bytes);
                assert_eq!(bytes.len(), count * 32, "bytes of {count} entries");
                assert!(count <= number as usize && taken + count as u32 == queue.taken(), "{count} entries taken of {number}");
            }
            3 | 4 => {
                let outcome = queue.give_back(&mut self.driver, self.now, number);
                assert!(outcome.is_err() || number <= taken, "{number} given back, {taken} taken");
                if outcome.is_ok() {
                    assert_eq!(queue.taken(), taken - number, "entries taken");
                }
            }
            5 => {
                queue.rewind(number);
                assert_eq!(queue.taken(), taken.saturating_sub(number), "entries taken");
            }
            6 => queue.delete(&mut self.driver, self.now),
            _ => drop(self.queues.swap_remove(which)),
        }
    }

    fn check(&self) {
        if let DriverState::Failed(error) = self.driver.state() {
            assert!(!error.to_string().is_empty());
        }
        let granted = self.driver.queues_granted();
        assert!(granted <= IO_QUEUES, "{granted} queues granted, {IO_QUEUES} were to be asked for");
        let live = self.pairs.iter().filter(|pair| !pair.queue.is_dead()).count();
        assert!(live <= usize::from(granted), "{live} queue pairs, {granted} granted");
        assert!(self.driver.queue_pairs() <= 2 * MOST + 64, "{} queue pairs", self.driver.queue_pairs());
    }

    /// The device behaves from now on: everything ends, and a reset brings the driver back.
    fn end(mut self) {
        self.device.reform();
        self.answers = true;
        self.driver.forbid_reset(false);
        self.driver.reset(self.now);
        self.until_ready();
        self.turns(2, 100);
        for pair in &self.pairs {
            assert!(pair.tags.is_empty(), "{} commands never ended", pair.tags.len());
        }
        assert!(self.requests.is_empty(), "admin commands never ended");
        self.pairs.clear();
        self.queues.clear();
        self.tickets.clear();
        let identity = self.driver.identify().expect("identified");
        assert!(identity.sn.starts_with(SERIAL.as_bytes()), "the serial number");
        self.turns(8, 100);
        self.create_pair(16);
        for _ in 0..PATIENCE {
            if !self.pairs.is_empty() {
                break;
            }
            self.turns(1, 100);
        }
        let pair = self.pairs.first_mut().expect("a queue pair on a device that behaves");
        let piece = self.data.buffer().part(0, 4096).expect("a page");
        pair.queue.submit(self.now, &SubmissionEntry::read(1, 0, 8), &[piece], u64::MAX).expect("room");
        pair.remember(u64::MAX);
        pair.queue.commit();
        self.turns(4, 100);
        assert!(self.pairs[0].tags.is_empty(), "a read that never ends on a device that behaves");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_sessions_are_well() {
        run(&[]);
        run(&[0; 64]);
        run(&[0xff; 200]);
    }
}
