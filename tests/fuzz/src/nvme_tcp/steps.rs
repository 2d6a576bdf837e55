//! What the hostile hosts do, decoded from the input.

use super::{CNTLIDS, ENABLED, HOSTILE, HOSTS, MOST_PEERS, QUIET, World};
use crate::commands;
use crate::input::Input;
use crate::media::Manner;
use crate::peer::{Kind, capsule, h2c, icreq};
use dray_nvme::command::{AdminOpcode, SglDescriptor, SubmissionEntry};
use dray_nvme::registers::offset;
use dray_nvme::tcp::fabrics::{DataDirection, direction};
use dray_nvme::tcp::pdu::{Digests, FatalError, TermReq};
use dray_nvme::tcp::{AnaState, DISCOVERY_NQN, PduType};
use zerocopy::IntoBytes;

impl World {
    pub(super) fn step(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        match what & 31 {
            0 if self.peers.len() < MOST_PEERS => {
                let peer = self.open();
                self.peers.push(peer);
            }
            1 => self.media[0].set_manner(Manner(input.u8())),
            2 => self.wait(input),
            3 => {
                let states = [AnaState::OPTIMIZED, AnaState::INACCESSIBLE, AnaState::CHANGE, AnaState::PERSISTENT_LOSS];
                self.target.set_ana_state(HOSTILE, None, states[input.below(4)]);
            }
            4 => self.neighbour_reads(),
            5..=7 => self.polls(input.below(16) + 1),
            what if !self.peers.is_empty() => {
                let at = input.below(self.peers.len());
                self.act(at, what, input);
            }
            _ => {}
        }
        if what & 0x20 == 0 {
            self.polls(3);
        }
    }

    fn wait(&mut self, input: &mut Input<'_>) {
        let ms = match input.u8() {
            ms @ 0..=199 => u64::from(ms),
            200..=219 => 1_001,
            220..=229 => 10_001,
            230..=239 => 30_001,
            240..=247 => 60_001,
            _ => 120_001,
        };
        self.now = self.now.after_ms(ms);
        self.polls(2);
    }

    fn act(&mut self, at: usize, what: u8, input: &mut Input<'_>) {
        if self.peers[at].closed {
            self.peers.swap_remove(at);
            return;
        }
        match what {
            8 => self.initialize(at, input),
            9 | 10 => self.some_connect(at, input),
            11 | 12 => self.property(at, input),
            13..=15 => self.admin(at, input),
            16..=19 => self.io(at, input),
            20 => _ = self.peers[at].give(input.number32() & 0x1fff),
            21 => self.wrong_data(at, input),
            22 => self.raw(at, input),
            23 => self.broken(at, input),
            24 | 25 => {
                let garbage = (input.u8() & 7 == 7).then(|| input.bytes(40)).filter(|bytes| !bytes.is_empty());
                let peer = &mut self.peers[at];
                if peer.initialized && peer.has_room() {
                    peer.authenticate(HOSTS[1], HOSTILE, &self.secret, garbage);
                }
            }
            26 => self.peers[at].reads = !self.peers[at].reads,
            27 => self.close(at),
            28 => {
                let term = TermReq::new(PduType::H2C_TERM_REQ, FatalError::SEQUENCE, 0, 0);
                self.peers[at].send(term.as_bytes());
                self.spoil(at);
            }
            29 if self.peers[at].initialized && self.peers[at].has_room() => {
                self.peers[at].command(SubmissionEntry::disconnect(), &[], Kind::Other);
            }
            _ => self.cut(at, input),
        }
    }

    /// From now on nobody knows what a peer has said.
    fn spoil(&mut self, at: usize) {
        let peer = &mut self.peers[at];
        peer.sane = false;
        self.associations_ended |= peer.link.is_none_or(|(_, qid)| qid == 0);
    }

    fn close(&mut self, at: usize) {
        let peer = self.peers.swap_remove(at);
        self.associations_ended |= peer.link.is_none_or(|(_, qid)| qid == 0);
    }

    fn initialize(&mut self, at: usize, input: &mut Input<'_>) {
        let bits = input.u8();
        let digests = Digests::new().with_header(bits & 1 != 0).with_data(bits & 2 != 0);
        let hpda = if bits < 0xc0 { 0 } else { bits & 63 };
        let again = self.peers[at].initialized || !self.peers[at].sane;
        self.peers[at].send(&icreq(digests, hpda));
        if again || hpda > 31 {
            self.spoil(at);
        }
        self.polls(2);
        if !self.peers[at].initialized {
            // What comes next may be in front of the answer, or behind it.
            self.spoil(at);
        }
    }

    fn some_connect(&mut self, at: usize, input: &mut Input<'_>) {
        if !self.peers[at].initialized || !self.peers[at].has_room() {
            return;
        }
        let bits = input.u8();
        let subsystem = match bits & 15 {
            0 => DISCOVERY_NQN,
            1 => QUIET,
            2 => "nqn.x:none",
            _ => HOSTILE,
        };
        let host = usize::from(bits >> 4) % 7 % 3;
        let qid = match input.u8() {
            qid @ 0..=247 => u16::from(qid) % 3,
            _ => input.number16(),
        };
        let cntlid = match input.u8() {
            any @ 0..=9 if any & 1 == 0 => input.number16(),
            _ if qid == 0 => 0xffff,
            which => CNTLIDS[usize::from(which) & 1],
        };
        let entries = if input.u8() < 0xf0 { 32 } else { input.number32() & 0xffff };
        // A queue that is shorter than what the peer has under way would be overrun.
        let entries = if (2..24).contains(&entries) { 24 } else { entries };
        self.connect(at, qid, subsystem, host, cntlid, entries, input.u8());
    }

    fn property(&mut self, at: usize, input: &mut Input<'_>) {
        if !self.peers[at].initialized || !self.peers[at].has_room() {
            return;
        }
        let offsets = [offset::CC, offset::CSTS, offset::CAP, offset::VS, offset::ASQ, offset::AQA];
        let what = input.u8();
        let at_offset = if what & 0x40 == 0 { offsets[usize::from(what & 15) % 6] } else { input.number32() };
        if what & 0x80 != 0 {
            self.peers[at].command(SubmissionEntry::property_get(at_offset, what & 0x20 != 0), &[], Kind::Other);
            return;
        }
        let value = match input.u8() {
            0..=119 => ENABLED,
            120..=169 => 0,
            170..=199 => ENABLED | 1 << 14,
            200..=219 => 1 << 14,
            _ => input.number(),
        };
        if at_offset == offset::CC && (value & 1 == 0 || value & 3 << 14 != 0) {
            self.resets();
        }
        self.peers[at].command(SubmissionEntry::property_set(at_offset, what & 0x20 != 0, value), &[], Kind::Other);
    }

    /// A peer is about to reset its controller or to shut it down: what is under way may have no answer.
    fn resets(&mut self) {
        self.associations_ended = true;
        for peer in &mut self.peers {
            peer.commands.iter_mut().for_each(|command| command.may_vanish = true);
        }
    }

    fn admin(&mut self, at: usize, input: &mut Input<'_>) {
        if !self.peers[at].initialized || !self.peers[at].has_room() {
            return;
        }
        let entry = commands::fabric_admin(input);
        self.any_command(at, entry, input);
    }

    fn io(&mut self, at: usize, input: &mut Input<'_>) {
        if !self.peers[at].initialized || !self.peers[at].has_room() {
            return;
        }
        let entry = commands::fabric_io(input);
        self.any_command(at, entry, input);
    }

    /// A command whose data pointer and data are most often as they should be.
    fn any_command(&mut self, at: usize, entry: SubmissionEntry, input: &mut Input<'_>) {
        let admin = self.peers[at].link.is_none_or(|(_, qid)| qid == 0);
        let blocks = (entry.cdw12 & 0xffff) + 1;
        let natural = if admin { 4096 } else { (blocks * 512).min(32 << 10) };
        let how = input.u8();
        let len = if how & 0x30 != 0x30 { natural } else { input.number32() & 0xffff };
        let (sgl, data) = match how & 15 {
            0..=7 if direction(&entry) == DataDirection::ToController && len <= 4096 => {
                (SglDescriptor::in_capsule(0, len), vec![how; len as usize])
            }
            15 => (SglDescriptor::in_capsule(input.number(), len), vec![how; input.number() as usize & 0xfff]),
            14 => (SglDescriptor { length: len, ..SglDescriptor::data_block(input.number(), len) }, Vec::new()),
            _ => (SglDescriptor::transport(len), Vec::new()),
        };
        let event = admin && entry.admin_opcode() == AdminOpcode::ASYNC_EVENT_REQUEST;
        let kind = if event { Kind::Event } else { Kind::Other };
        self.peers[at].command(entry.with_sgl(sgl), &data, kind);
    }

    /// H2CData that nobody has asked for, or not so.
    fn wrong_data(&mut self, at: usize, input: &mut Input<'_>) {
        let peer = &mut self.peers[at];
        let waiting = peer.commands.iter().find_map(|command| Some((command.entry.cdw0.cid(), command.r2t.clone()?)));
        let (cid, ttag, datao) = match (waiting, input.flag()) {
            (Some((cid, (ttag, range))), true) => (cid, ttag, range.start),
            _ => (input.number16(), input.number16(), input.number32()),
        };
        let len = input.number() as usize & 0x1fff;
        let bytes = h2c(cid, ttag, datao.wrapping_add(input.number32() & 0xff), input.flag(), &vec![1; len], peer.digests);
        peer.send(&bytes);
        self.spoil(at);
    }

    fn raw(&mut self, at: usize, input: &mut Input<'_>) {
        let len = usize::from(input.u8());
        let bytes = input.bytes(len).to_vec();
        self.peers[at].send(&bytes);
        self.spoil(at);
    }

    /// A command capsule with some of its bytes changed; digests are made right again if the input says so.
    fn broken(&mut self, at: usize, input: &mut Input<'_>) {
        let entry = if input.flag() { commands::fabric_admin(input) } else { commands::fabric_io(input) };
        let peer = &mut self.peers[at];
        let entry = entry.with_sgl(SglDescriptor::in_capsule(0, 64)).with_cid(input.u16());
        let mut bytes = capsule(entry, &[3; 64], peer.digests);
        for _ in 0..=input.below(4) {
            let place = input.below(bytes.len());
            bytes[place] ^= input.u8();
        }
        if peer.digests.header() && input.flag() {
            let crc = crc32c::crc32c(&bytes[..72]).to_le_bytes();
            bytes[72..76].copy_from_slice(&crc);
        }
        peer.send(&bytes);
        self.spoil(at);
    }

    /// The stream ends inside a PDU.
    fn cut(&mut self, at: usize, input: &mut Input<'_>) {
        let entry = SubmissionEntry::write(1, 0, 1).with_sgl(SglDescriptor::in_capsule(0, 512)).with_cid(input.u16());
        let bytes = capsule(entry, &[9; 512], self.peers[at].digests);
        let upto = usize::from(input.u16()) % bytes.len();
        self.peers[at].send(&bytes[..upto]);
        self.spoil(at);
        self.polls(1);
        self.close(at);
    }
}
