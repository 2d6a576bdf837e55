//! What the hostile client does, decoded from the input.

use super::{BASE, FILL, JSON, Memory, NO_FDS, PAGE, PAGES, PATIENCE, World};
use crate::input::Input;
use crate::media::Manner;
use crate::pipe::Pipe;
use crate::vfio_client::Client;
use dray_device::vfio_user::wire::{
    DeviceFeature, DmaMap, DmaUnmap, Header, IrqSet, MigData, MultiWrite, RegionAccess, WriteMulti, command, dma, feature,
    region, state,
};
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId};
use dray_nvme::registers::sq_tail_doorbell;
use std::os::fd::{AsFd, BorrowedFd};
use zerocopy::IntoBytes;

impl World {
    pub(super) fn step(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        match what & 31 {
            0 => self.media[0].set_manner(Manner(input.u8())),
            1 => self.control.set(input.u8(), input.u8()),
            2 => {
                self.now = self.now.after_ms(u64::from(input.u8()));
                self.polls(2);
            }
            3 => self.neighbour(input.flag()),
            4 | 5 => self.polls(input.below(16) + 1),
            6 => self.leave(input),
            7 => self.seats[0].client.reads = !self.seats[0].client.reads,
            8 => {
                // The owner cuts its memory short, or gives it back.
                let pages = u64::from(input.u8()) % (PAGES as u64 + 1);
                rustix::fs::ftruncate(&self.seats[0].memory[0].fd, pages * PAGE as u64).expect("size");
            }
            9 => self.raw(input),
            _ if !self.seats[0].client.has_room() => self.polls(1),
            10..=12 => self.map_some(input),
            13 => self.unmap_some(input),
            14 => self.irqs(input),
            15 | 16 => self.access(input),
            17 => self.many_writes(input),
            18..=20 => self.migration(input),
            21 => self.send(command::RESET, &[], &[], what),
            22 | 23 => self.numbers(input, what),
            _ => self.nvme(input),
        }
        if what & 0x20 == 0 {
            self.polls(3);
        }
    }

    fn send(&mut self, command: u16, payload: &[u8], fds: &[usize], what: u8) {
        let Self { seats: [seat, _], other_fds, .. } = self;
        let all = [&seat.memory[0].fd, &seat.memory[1].fd].into_iter().chain(other_fds.iter());
        let all: Vec<BorrowedFd<'_>> = all.map(AsFd::as_fd).collect();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|&which| all[which % all.len()]).collect();
        seat.client.ask(command, payload, &fds, what & 0x40 != 0);
    }

    /// The client goes, perhaps in the middle of a message, and the next comes at once or later.
    fn leave(&mut self, input: &mut Input<'_>) {
        let cut = input.below(40);
        if cut > 0 {
            let bytes = [Header::command(1, command::REGION_WRITE, 20).as_bytes(), &[0; 20]].concat();
            self.seats[0].client.send(&bytes[..cut.min(35)], &[]);
        }
        self.lost_memory();
        if input.flag() {
            self.polls(4);
        }
        self.greet(0, if input.flag() { JSON } else { NO_FDS });
        self.polls(4);
    }

    /// The client ends; when the server says that nothing of it is in use any more, nothing of it is touched any more.
    pub(super) fn lost_memory(&mut self) {
        let (ours, _theirs) = Pipe::pair();
        let seat = &mut self.seats[0];
        drop(std::mem::replace(&mut seat.client, Client::new(ours)));
        let fixed = std::mem::replace(&mut seat.memory, [Memory::new(), Memory::new()]);
        self.media[0].set_manner(Manner::default());
        self.control.finish();
        for round in 0.. {
            assert!(round < PATIENCE, "the server is not done with a client that has gone");
            self.poll();
            if self.seats[0].server.is_idle() {
                break;
            }
        }
        assert!(fixed[1].is_all(FILL), "memory that was lent for reading has changed");
        rustix::fs::ftruncate(&fixed[0].fd, (PAGES * PAGE) as u64).expect("size");
        fixed[0].put(0, &[0xa5; PAGES * PAGE]);
        self.polls(20);
        assert!(fixed[0].is_all(0xa5), "memory of a client that has gone has changed");
        assert_eq!(self.seats[0].server.dma_windows(), 0, "windows of a client that has gone");
    }

    fn raw(&mut self, input: &mut Input<'_>) {
        let mut bytes = Vec::new();
        if input.flag() {
            let header = Header {
                id: input.u16(),
                command: u16::from(input.u8()) % 24,
                size: if input.flag() { input.number32() } else { input.u8().into() },
                flags: input.number32(),
                error: 0,
            };
            bytes.extend_from_slice(header.as_bytes());
        }
        let len = usize::from(input.u8());
        bytes.extend_from_slice(input.bytes(len));
        let fds: Vec<usize> = (0..input.below(18)).map(|which| if which % 2 == 1 { which + 1 } else { which }).collect();
        let Self { seats: [seat, _], other_fds, .. } = self;
        // What is only lent for reading does not go with bytes that nobody has looked into.
        let all = [&seat.memory[0].fd].into_iter().chain(other_fds.iter());
        let all: Vec<BorrowedFd<'_>> = all.map(AsFd::as_fd).collect();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|&which| all[which % all.len()]).collect();
        seat.client.sane = false;
        self.broken = true;
        if bytes.is_empty() {
            return;
        }
        seat.client.send(&bytes, if fds.len() > 16 { &fds[..16] } else { &fds });
    }

    fn map_some(&mut self, input: &mut Input<'_>) {
        let bits = input.u8();
        let which = usize::from(bits & 1);
        let mut flags = dma::READ | if which == 0 { dma::WRITE } else { 0 };
        if bits & 0xc0 == 0xc0 {
            flags ^= input.number32() & if which == 0 { u32::MAX } else { !dma::WRITE };
        }
        let pages = |input: &mut Input<'_>| if input.u8() < 0xf0 { (u64::from(input.u8()) % 16) << 12 } else { input.number() };
        let map = DmaMap {
            argsz: if bits & 0x30 == 0x30 { input.number32() } else { 32 },
            flags,
            offset: pages(input),
            address: if bits & 4 == 0 { BASE.wrapping_add(pages(input)) } else { input.number() << 12 },
            size: pages(input),
        };
        let fds: &[usize] = match bits >> 3 & 7 {
            0..=4 => &[which],
            5 => &[],
            6 => &[2 + which, which],
            _ => &[2],
        };
        // A read-only file is never lent for writing.
        let lent = fds.contains(&1) && map.flags & dma::WRITE != 0;
        if !lent {
            self.send(command::DMA_MAP, map.as_bytes(), fds, bits & 0x40);
        }
    }

    fn unmap_some(&mut self, input: &mut Input<'_>) {
        let bits = input.u8();
        let unmap = match bits & 3 {
            0 => DmaUnmap { argsz: 24, flags: dma::ALL, address: 0, size: 0 },
            1 => DmaUnmap { argsz: 24, flags: 0, address: BASE + ((bits as u64 >> 2 & 1) << 20), size: (PAGES * PAGE) as u64 },
            2 => {
                let (at, pages) = (u64::from(input.u8() % 16), u64::from(input.u8() % 16));
                DmaUnmap { argsz: 24, flags: 0, address: BASE + (at << 12), size: pages << 12 }
            }
            _ => DmaUnmap { argsz: input.number32(), flags: input.number32(), address: input.number(), size: input.number() },
        };
        self.send(command::DMA_UNMAP, unmap.as_bytes(), if bits & 0x30 == 0x30 { &[2] } else { &[] }, bits & 0x40);
    }

    fn irqs(&mut self, input: &mut Input<'_>) {
        let bits = input.u8();
        let set = IrqSet {
            argsz: if bits & 1 == 0 { 20 } else { input.number32() },
            flags: if bits & 2 == 0 { [0x21, 0x22, 0x24, 0x24][usize::from(bits >> 2 & 3)] } else { input.number32() & 0xff },
            index: if bits & 0x10 == 0 { 2 } else { input.number32() },
            start: input.u8().into(),
            count: input.number32(),
        };
        let set = if bits & 0x20 == 0 { IrqSet { start: set.start % 4, count: set.count % 5, ..set } } else { set };
        let fds: Vec<usize> = (0..input.below(6)).map(|which| if input.u8() < 0xd0 { 2 + which % 2 } else { which }).collect();
        let bools: Vec<u8> = (0..set.count.min(8)).map(|_| input.u8()).collect();
        self.send(command::SET_IRQS, &[set.as_bytes(), &bools].concat(), &fds, bits & 0x40);
    }

    fn access(&mut self, input: &mut Input<'_>) {
        let bits = input.u8();
        let region = if bits & 7 < 7 { u32::from(bits & 7) } else { input.number32() };
        let at = if bits & 8 == 0 { u64::from(input.u8()) * 4 } else { 0x1000 + u64::from(input.u8()) * 4 };
        let at = if bits & 0x30 == 0x30 { input.number() } else { at };
        let count = [4, 8, 1, 2][usize::from(input.u8() & 3)];
        let count = if bits & 0x30 == 0x20 { input.number32() } else { count };
        let access = RegionAccess { offset: at, region: [0, 0, 4, 5, 7, 7, 8, 0][region.min(7) as usize], count };
        if bits & 0x80 == 0 {
            return self.send(command::REGION_READ, access.as_bytes(), &[], bits & 0x40);
        }
        let data = vec![input.u8(); count.min(2000) as usize];
        let data = if input.flag() { input.number().to_le_bytes()[..data.len().min(8)].to_vec() } else { data };
        self.send(command::REGION_WRITE, &[access.as_bytes(), &data].concat(), &[], bits & 0x40);
    }

    fn many_writes(&mut self, input: &mut Input<'_>) {
        let count = input.below(6);
        let head = WriteMulti { count: if input.u8() < 0xe0 { count as u64 } else { input.number() } };
        let mut payload = head.as_bytes().to_vec();
        for _ in 0..count {
            let offset = if input.flag() { 0x1000 + u64::from(input.u8() & 7) * 4 } else { input.number() };
            let region = [0, 0, 0, 4, 7][input.below(5)];
            let write = MultiWrite { offset, region, count: 4 + u32::from(input.u8() & 7), data: input.number().to_le_bytes() };
            payload.extend_from_slice(write.as_bytes());
        }
        self.send(command::REGION_WRITE_MULTI, &payload, &[], 0);
    }

    fn migration(&mut self, input: &mut Input<'_>) {
        let bits = input.u8();
        match bits & 7 {
            0..=2 => {
                let states = [state::STOP, state::RUNNING, state::STOP_COPY, state::RESUMING, state::PRE_COPY];
                let to = if bits & 0x80 == 0 { states[usize::from(bits >> 3) % 5] } else { input.number32() };
                let head = DeviceFeature { argsz: 16, flags: feature::MIG_DEVICE_STATE | DeviceFeature::SET };
                self.send(command::DEVICE_FEATURE, &[head.as_bytes(), &to.to_le_bytes(), &[0; 4]].concat(), &[], bits & 0x40);
            }
            3 => {
                let size = input.number32();
                let argsz = if bits & 0x80 == 0 { size.saturating_add(8) } else { input.number32() };
                self.send(command::MIG_DATA_READ, MigData { argsz, size }.as_bytes(), &[], bits & 0x40);
            }
            4 => {
                // The control has what was read last, so that a stream can come back whole, in pieces or changed.
                let len = usize::from(input.u16()) % 2048;
                let mut bytes = self.control.piece(len);
                if bits & 0x80 != 0 && !bytes.is_empty() {
                    let at = usize::from(input.u16()) % bytes.len();
                    bytes[at] ^= input.u8();
                }
                let size = if bits & 0x20 == 0 { bytes.len() as u32 } else { input.number32() };
                let head = MigData { argsz: bytes.len() as u32 + 8, size };
                self.send(command::MIG_DATA_WRITE, &[head.as_bytes(), &bytes].concat(), &[], bits & 0x40);
            }
            _ => {
                use feature::{DMA_LOGGING_REPORT, DMA_LOGGING_START, DMA_LOGGING_STOP, MIG_DEVICE_STATE, MIGRATION};
                let index = [DMA_LOGGING_START, DMA_LOGGING_STOP, DMA_LOGGING_REPORT, MIGRATION, MIG_DEVICE_STATE][input.below(5)];
                let (get, set, probe) = (DeviceFeature::GET, DeviceFeature::SET, DeviceFeature::PROBE);
                let method = [get, set, probe, get | set][input.below(4)] | if bits & 0x80 != 0 { probe } else { 0 };
                let head = DeviceFeature { argsz: input.number32(), flags: index | method };
                let mut payload = head.as_bytes().to_vec();
                for _ in 0..input.below(6) {
                    payload.extend_from_slice(&(if input.flag() { 4096 } else { input.number() }).to_le_bytes());
                }
                if bits & 0x20 == 0 {
                    // As much as it is, and some room.
                    let argsz = payload.len() as u32 + u32::from(input.u8());
                    payload[..4].copy_from_slice(&argsz.to_le_bytes());
                }
                self.send(command::DEVICE_FEATURE, &payload, &[], bits & 0x40);
            }
        }
    }

    /// Any command with words that are near to something.
    fn numbers(&mut self, input: &mut Input<'_>, what: u8) {
        let command = u16::from(input.u8()) % 24;
        let words: Vec<u8> = (0..input.below(12)).flat_map(|_| input.number32().to_le_bytes()).collect();
        let fds: Vec<usize> = (0..input.below(5)).map(|which| [0, 2, 3, 4, 5][which]).collect();
        self.send(command, &words, &fds, what);
    }

    /// A command in the client's memory, and its doorbell.
    fn nvme(&mut self, input: &mut Input<'_>) {
        let bits = input.u8();
        let queue = usize::from(bits & 1);
        let page = |input: &mut Input<'_>| match input.u8() {
            at @ 0..=0xbf => BASE + (u64::from(at) % 16) * PAGE as u64,
            at @ 0xc0..=0xdf => BASE + 0x10_0000 + (u64::from(at) % 16) * PAGE as u64,
            _ => input.number(),
        };
        let (slba, blocks) = (u64::from(input.u8()), u32::from(input.u8() % 40) + 1);
        let entry = match (queue, bits >> 1 & 7) {
            (1, 0..=3) => SubmissionEntry::write(1, slba, blocks),
            (1, 4 | 5) => SubmissionEntry::read(1, slba, blocks),
            (1, _) => SubmissionEntry::flush(1),
            (_, 0..=3) => SubmissionEntry::identify(Cns::CONTROLLER, 0, 0, CommandSetId::NVM),
            (_, 4) => SubmissionEntry::async_event_request(),
            _ => SubmissionEntry::delete_io_sq(1),
        };
        let entry = entry.with_prps(page(input), page(input));
        self.put(0, queue, &entry);
        let tail = self.seats[0].tails[queue];
        let access = RegionAccess { offset: sq_tail_doorbell(queue as u16, 0).into(), region: region::BAR0, count: 4 };
        self.send(command::REGION_WRITE, &[access.as_bytes(), &tail.to_le_bytes()].concat(), &[], 0);
    }
}
