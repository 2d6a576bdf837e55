use super::*;
use dray_device::memory::Pages;
use dray_nvme::command::NvmOpcode;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

const BLOCK: usize = 512;
const BLOCKS: usize = 512;

/// A device: carries commands out when it is polled, in an order of its own.
#[derive(Default)]
struct Inner {
    media: Vec<u8>,
    under_way: VecDeque<(SubmissionEntry, Vec<DmaBuffer>, u64)>,
    fails: Option<Status>,
    dead: bool,
    seen: Vec<(NvmOpcode, u64, u32)>,
    flushes: u32,
}

#[derive(Clone, Default)]
struct Device(Arc<Mutex<Inner>>);

struct Queue {
    device: Device,
    limits: QueueLimits,
    /// Only memory of this arena is mapped.
    only: Option<Arc<dray_device::memory::Arena>>,
}

impl Device {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("device")
    }
}

impl Inner {
    fn execute(&mut self, entry: &SubmissionEntry, data: &[DmaBuffer]) -> Status {
        if let Some(status) = self.fails {
            return status;
        }
        let (from, blocks) = (entry.slba() as usize * BLOCK, entry.rw_cdw12().blocks() as usize);
        let mut at = from;
        match entry.nvm_opcode() {
            NvmOpcode::READ => {
                for piece in data {
                    piece.segment().write(&self.media[at..at + piece.len()]);
                    at += piece.len();
                }
            }
            NvmOpcode::WRITE => {
                for piece in data {
                    piece.segment().read(&mut self.media[at..at + piece.len()]);
                    at += piece.len();
                }
            }
            NvmOpcode::WRITE_ZEROES => self.media[from..from + blocks * BLOCK].fill(0),
            NvmOpcode::FLUSH => self.flushes += 1,
            NvmOpcode::DATASET_MANAGEMENT => {
                let mut range = DsmRange::default();
                data[0].segment().read(range.as_mut_bytes());
                let (from, len) = (range.slba as usize * BLOCK, range.length as usize * BLOCK);
                self.media[from..from + len].fill(0);
            }
            _ => return Status::INVALID_OPCODE,
        }
        if matches!(entry.nvm_opcode(), NvmOpcode::READ | NvmOpcode::WRITE) {
            assert_eq!(at - from, blocks * BLOCK, "data of another length than the command's");
        }
        Status::SUCCESS
    }
}

impl CommandQueue for Queue {
    fn limits(&self) -> QueueLimits {
        self.limits
    }

    fn free(&self) -> usize {
        self.limits.depth as usize - self.device.lock().under_way.len()
    }

    fn submit(&mut self, _: Time, entry: &SubmissionEntry, data: &[Segment<'_>], tag: u64) -> Result<(), SubmitError> {
        let mut device = self.device.lock();
        if device.dead {
            return Err(SubmitError::Dead);
        }
        if device.under_way.len() >= self.limits.depth as usize {
            return Err(SubmitError::Full);
        }
        if let Some(only) = &self.only
            && data.iter().any(|piece| !Arc::ptr_eq(piece.arena(), only))
        {
            return Err(SubmitError::NotMapped);
        }
        if data.iter().map(Segment::len).sum::<usize>() > self.limits.max_transfer {
            return Err(SubmitError::BadData);
        }
        let held = data.iter().map(|s| DmaBuffer::new(Arc::clone(s.arena()), s.offset(), s.len()).expect("piece")).collect();
        device.seen.push((entry.nvm_opcode(), entry.slba(), entry.rw_cdw12().blocks()));
        device.under_way.push_back((*entry, held, tag));
        Ok(())
    }

    fn commit(&mut self) {}

    fn poll(&mut self, _: Time, done: &mut dyn FnMut(Completion)) -> usize {
        let mut device = self.device.lock();
        let dead = device.dead;
        // The last first, and two a poll: commands end in any order.
        let mut count = 0;
        while count < 2 || dead {
            let Some((entry, data, tag)) = device.under_way.pop_back() else { break };
            let status = if dead { Status::SUCCESS } else { device.execute(&entry, &data) };
            done(Completion { tag, status, result: 0, unknown: dead });
            count += 1;
        }
        count
    }
}

struct Rig {
    device: Device,
    backing: CommandBacking,
    bounce: DmaBuffer,
}

fn rig(depth: u32, max_transfer: usize, max_write_zeroes: u64, mapped: bool) -> Rig {
    let device = Device::default();
    device.lock().media = (0..BLOCKS * BLOCK).map(|at| (at / 7) as u8).collect();
    let bounce = DmaBuffer::allocate("bounce", 16 << 10, Pages::Small).expect("memory");
    let limits = QueueLimits { depth, max_transfer, max_write_zeroes };
    let only = (!mapped).then(|| Arc::clone(bounce.arena()));
    let queue = Queue { device: device.clone(), limits, only };
    let config = CommandBackingConfig {
        nsid: 1,
        block_bytes: BLOCK as u32,
        blocks: BLOCKS as u64,
        volatile_cache: true,
        deallocated_reads_zero: true,
        write_uncorrectable: false,
        deallocates: true,
        write_protected: false,
    };
    let backing = CommandBacking::new(Box::new(queue), config, &bounce).expect("backing");
    Rig { device, backing, bounce }
}

impl Rig {
    fn submit(&mut self, op: BackingOp, slba: u64, blocks: u64, data: &[Segment<'_>], tag: u64) -> Submitted {
        self.backing.submit(&BackingRequest { op, slba, blocks, data, tag })
    }

    fn finish(&mut self) -> Vec<(u64, Status)> {
        let mut ended = Vec::new();
        for turn in 0..100_000 {
            if self.backing.in_flight() == 0 {
                return ended;
            }
            self.backing.poll(Time(turn), &mut |tag, status| ended.push((tag, status)));
        }
        panic!("{} operations do not end", self.backing.in_flight());
    }
}

#[test]
fn what_is_not_mapped_goes_through_bounce_buffers_and_what_is_does_not() {
    let memory = DmaBuffer::allocate("guest", 64 << 10, Pages::Small).expect("memory");
    for mapped in [true, false] {
        let mut rig = rig(4, 64 << 10, 1 << 20, mapped);
        // 33 KiB in three odd pieces: more than a bounce buffer of 8 KiB (4 KiB of which two are one).
        let pieces = [memory.part(4, 1000), memory.part(2000, 31_000), memory.part(40_000, 1792)].map(|p| p.expect("piece"));
        memory.arena().fill(0, 64 << 10, 0x5a);
        assert_eq!(rig.submit(BackingOp::Write { fua: true }, 8, 66, &pieces, 7), Submitted::Pending);
        assert_eq!(rig.finish(), [(7, Status::SUCCESS)]);
        let device = rig.device.lock();
        assert!(device.media[8 * BLOCK..74 * BLOCK].iter().all(|&byte| byte == 0x5a) && device.media[74 * BLOCK] != 0x5a);
        assert_eq!(rig.backing.bounced() == 0, mapped, "{:?}", device.seen);
        assert_eq!(device.seen.len() == 1, mapped);
        drop(device);
        rig.device.lock().media[8 * BLOCK..74 * BLOCK].iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8);
        assert_eq!(rig.submit(BackingOp::Read, 8, 66, &pieces, 8), Submitted::Pending);
        assert_eq!(rig.finish(), [(8, Status::SUCCESS)]);
        let mut read = vec![0; 66 * BLOCK];
        let (head, tail) = read.split_at_mut(1000);
        let (body, tail) = tail.split_at_mut(31_000);
        for (piece, into) in pieces.iter().zip([head, body, tail]) {
            piece.read(into);
        }
        assert!(read.iter().enumerate().all(|(at, &byte)| byte == (at % 251) as u8));
        assert_eq!(rig.bounce.len(), 16 << 10);
    }
}

#[test]
fn what_the_device_lacks_is_done_without_it() {
    let mut with = rig(4, 8 << 10, 0, true);
    with.submit(BackingOp::WriteZeroes { deallocate: true, fua: false }, 3, 100, &[], 1);
    assert_eq!(with.finish(), [(1, Status::SUCCESS)]);
    let device = with.device.lock();
    assert!(device.media[3 * BLOCK..103 * BLOCK].iter().all(|&byte| byte == 0));
    assert!(device.seen.iter().all(|(opcode, ..)| *opcode == NvmOpcode::WRITE), "{:?}", device.seen);
    drop(device);
    with.submit(BackingOp::Deallocate, 200, 10, &[], 2);
    with.submit(BackingOp::Flush, 0, 0, &[], 3);
    let mut ended = with.finish();
    ended.sort_by_key(|end| end.0);
    assert_eq!(ended, [(2, Status::SUCCESS), (3, Status::SUCCESS)]);
    assert_eq!(with.device.lock().flushes, 1);
    assert!(with.device.lock().media[200 * BLOCK..210 * BLOCK].iter().all(|&byte| byte == 0));
    with.backing.config.deallocates = false;
    assert_eq!(with.submit(BackingOp::Deallocate, 0, 10, &[], 4), Submitted::Done(Status::SUCCESS));
    assert_eq!(with.submit(BackingOp::WriteUncorrectable, 0, 1, &[], 5), Submitted::Done(Status::INVALID_OPCODE));
}

#[test]
fn the_device_status_is_the_guests_and_an_unknown_outcome_is_an_error() {
    let memory = DmaBuffer::allocate("guest", 64 << 10, Pages::Small).expect("memory");
    let data = [memory.segment()];
    let mut broken = rig(4, 8 << 10, 0, true);
    broken.device.lock().fails = Some(Status::RESERVATION_CONFLICT);
    broken.submit(BackingOp::Write { fua: false }, 0, 128, &data, 1);
    assert_eq!(broken.finish(), [(1, Status::RESERVATION_CONFLICT)]);
    broken.device.lock().fails = None;
    broken.submit(BackingOp::Read, 0, 128, &data, 2);
    broken.backing.poll(Time(0), &mut |_, _| panic!("nothing has ended"));
    broken.device.lock().dead = true;
    assert_eq!(broken.finish(), [(2, Status::INTERNAL_ERROR)]);
    broken.submit(BackingOp::Read, 0, 128, &data, 3);
    assert_eq!(broken.finish(), [(3, Status::INTERNAL_ERROR)]);
}

#[test]
fn memory_is_in_use_until_what_began_before_has_ended() {
    let memory = DmaBuffer::allocate("guest", 4096, Pages::Small).expect("memory");
    let data = [memory.segment()];
    let mut rig = rig(64, 8 << 10, 0, true);
    let uses = rig.backing.uses_memory();
    assert!(uses.is_over(uses.mark()), "nothing is under way");
    for tag in 0..7 {
        rig.submit(BackingOp::Read, 0, 8, &data, tag);
    }
    let mark = uses.mark();
    let (mut ended, mut tag) = (0, 100);
    for turn in 0..1000 {
        if uses.is_over(mark) {
            assert_eq!(ended, 7, "after {turn} polls");
            assert!(rig.backing.in_flight() > 0, "others go on");
            return;
        }
        // Others come all the time.
        rig.submit(BackingOp::Read, 0, 8, &data, tag);
        tag += 1;
        rig.backing.poll(Time(turn), &mut |tag, _| ended += u32::from(tag < 7));
        let mut device = rig.device.lock();
        device.under_way.make_contiguous().reverse();
    }
    panic!("memory is in use for ever");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_operations_leave_what_a_model_has(
        depth in 1u32..9,
        max_transfer in prop::sample::select(vec![4096usize, 8192, 65536]),
        zeroes in prop::sample::select(vec![0u64, 1024, 1 << 20]),
        mapped in any::<bool>(),
        operations in prop::collection::vec((0u8..4, 0u64..400, 1u64..112, any::<u8>()), 1..40),
    ) {
        let mut rig = rig(depth, max_transfer, zeroes, mapped);
        let mut model = rig.device.lock().media.clone();
        let memory = DmaBuffer::allocate("guest", 64 << 10, Pages::Small).expect("memory");
        for (tag, (kind, slba, blocks, byte)) in operations.into_iter().enumerate() {
            let (from, len) = (slba as usize * BLOCK, blocks as usize * BLOCK);
            let data = [memory.part(0, len / 2 / 4 * 4).expect("piece"), memory.part(1 << 15, len - len / 2 / 4 * 4).expect("piece")];
            let (op, data) = match kind {
                0 => (BackingOp::Read, &data[..]),
                1 => (BackingOp::Write { fua: false }, &data[..]),
                2 => (BackingOp::WriteZeroes { deallocate: false, fua: true }, &[][..]),
                _ => (BackingOp::Deallocate, &[][..]),
            };
            memory.arena().fill(0, 64 << 10, byte);
            prop_assert_eq!(rig.submit(op, slba, blocks, data, tag as u64), Submitted::Pending);
            prop_assert_eq!(rig.finish(), [(tag as u64, Status::SUCCESS)]);
            match kind {
                0 => {
                    let mut read = vec![0; data[0].len()];
                    data[0].read(&mut read);
                    prop_assert_eq!(&read[..], &model[from..from + read.len()]);
                    let mut rest = vec![0; data[1].len()];
                    data[1].read(&mut rest);
                    prop_assert_eq!(&rest[..], &model[from + read.len()..from + len]);
                }
                1 => model[from..from + len].fill(byte),
                _ => model[from..from + len].fill(0),
            }
            prop_assert!(rig.device.lock().media == model);
            prop_assert_eq!(rig.backing.free_bounce.len(), rig.backing.bounce.len());
        }
    }
}

/// Begins a write of that byte and a read, of 8,192 bytes each, and a flush; one poll sends them.
fn begin_three(rig: &mut Rig, memory: &DmaBuffer, byte: u8) {
    memory.arena().fill(0, 8192, byte);
    let (write, read) = (memory.part(0, 8192).expect("piece"), memory.part(8192, 8192).expect("piece"));
    let requests = [
        BackingRequest { op: BackingOp::Write { fua: false }, slba: 8, blocks: 16, data: &[write], tag: 1 },
        BackingRequest { op: BackingOp::Read, slba: 64, blocks: 16, data: &[read], tag: 2 },
        BackingRequest { op: BackingOp::Flush, slba: 0, blocks: 0, data: &[], tag: 3 },
    ];
    for request in &requests {
        assert_eq!(rig.backing.submit(request), Submitted::Pending);
    }
    assert_eq!(rig.backing.poll(Time(1), &mut |_, _| panic!("too early")), 0);
}

fn ended(rig: &mut Rig) -> Vec<(u64, Status)> {
    let mut all = Vec::new();
    for turn in 0..64 {
        rig.backing.poll(Time(2 + turn), &mut |tag, status| all.push((tag, status)));
    }
    all.sort_by_key(|(tag, _)| *tag);
    all
}

#[test]
fn operations_outlive_a_dead_queue_and_are_carried_out_anew() {
    for mapped in [true, false] {
        // Eight blocks to a command: operations are of several, some of them under way, some not sent.
        let mut rig = rig(3, 4096, 0, mapped);
        rig.backing.outlive_queue();
        let memory = DmaBuffer::allocate("guest", 16384, Pages::Small).expect("memory");
        begin_three(&mut rig, &memory, 0xab);
        let mark = rig.backing.uses_memory().mark();
        rig.device.lock().dead = true;
        assert!(ended(&mut rig).is_empty(), "nobody is told of an end");
        assert!(rig.backing.is_stranded() && rig.backing.in_flight() == 3);
        assert!(!rig.backing.uses_memory().is_over(mark), "the guest's memory is still wanted");
        // What the device has done, and not told, does not count: it does it again.
        rig.device.lock().media[8 * BLOCK..24 * BLOCK].fill(0x11);
        rig.device.lock().dead = false;
        let before = rig.device.lock().seen.len();
        let only = (!mapped).then(|| Arc::clone(rig.bounce.arena()));
        let limits = rig.backing.limits;
        rig.backing.replace_queue(Box::new(Queue { device: rig.device.clone(), limits, only })).expect("stranded");
        assert_eq!(ended(&mut rig), [1, 2, 3].map(|tag| (tag, Status::SUCCESS)));
        let media = rig.device.lock().media.clone();
        assert!(media[8 * BLOCK..24 * BLOCK].iter().all(|byte| *byte == 0xab), "written on the new queue");
        let mut read = vec![0; 8192];
        memory.part(8192, 8192).expect("piece").read(&mut read);
        assert_eq!(read, media[64 * BLOCK..80 * BLOCK]);
        assert!(rig.device.lock().seen.len() >= before + 5, "all of it, from the beginning");
        assert_eq!((rig.backing.in_flight(), rig.backing.free_bounce.len()), (0, rig.backing.bounce.len()), "nothing is left behind");
        assert!(rig.backing.uses_memory().is_over(mark));
    }
}

#[test]
fn what_nobody_has_another_queue_for_fails_and_is_not_sent_again() {
    let mut rig = rig(3, 4096, 0, true);
    rig.backing.outlive_queue();
    let memory = DmaBuffer::allocate("guest", 16384, Pages::Small).expect("memory");
    begin_three(&mut rig, &memory, 0xab);
    rig.device.lock().dead = true;
    assert!(ended(&mut rig).is_empty());
    // Even a queue that is well again gets nothing of unknown outcome.
    rig.device.lock().dead = false;
    let before = rig.device.lock().seen.len();
    rig.backing.give_up();
    assert_eq!(ended(&mut rig), [1, 2, 3].map(|tag| (tag, Status::INTERNAL_ERROR)));
    assert_eq!((rig.device.lock().seen.len(), rig.backing.in_flight()), (before, 0));
}

#[test]
fn only_a_dead_queue_is_replaced_by_one_that_takes_as_much() {
    let mut rig = rig(3, 4096, 0, true);
    rig.backing.outlive_queue();
    let queue = |rig: &Rig, max_transfer| {
        let limits = QueueLimits { max_transfer, ..rig.backing.limits };
        Box::new(Queue { device: rig.device.clone(), limits, only: None })
    };
    let well = queue(&rig, 4096);
    assert_eq!(rig.backing.replace_queue(well), Err(CommandBackingError::InUse));
    rig.device.lock().dead = true;
    let flush = BackingRequest { op: BackingOp::Flush, slba: 0, blocks: 0, data: &[], tag: 1 };
    assert_eq!(rig.backing.submit(&flush), Submitted::Pending);
    assert!(ended(&mut rig).is_empty() && rig.backing.is_stranded(), "a dead queue that takes nothing strands too");
    let small = queue(&rig, 512);
    assert!(matches!(rig.backing.replace_queue(small), Err(CommandBackingError::NoRoom { .. })));
    assert!(rig.backing.is_stranded());
}
