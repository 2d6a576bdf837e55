//! I/O commands of the NVM command set (NVMCS §3), from fetched entry to outcome.
//!
//! Checks come in the order of the specification: opcode, fused operation, data pointer type, namespace, length, range, write
//! protection. Commands that take several operations on the backing are [`job`](crate::job)s.

use crate::context::{Outcome, Work};
use crate::dptr::{self, PAGE, Segments};
use crate::engine::{Engine, Operation};
use crate::job::{CHUNK_BYTES, JobKind};
use crate::subsystem::Shared;
use dray_device::backing::{BackingOp, Submitted};
use dray_nvme::command::{
    CopyCdw12, CopyRange0, DsmCdw10, DsmCdw11, DsmRange, Fuse, NvmOpcode, Psdt, RwCdw12, SubmissionEntry,
};
use dray_nvme::status::Status;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Most source ranges of one Copy (MSRC + 1).
pub(crate) const COPY_RANGES: usize = 128;
/// Most blocks of one source range (MSSRL).
pub(crate) const COPY_RANGE_BLOCKS: u16 = 8192;
/// Most blocks of one Copy (MCL).
pub(crate) const COPY_BLOCKS: u32 = 65_536;

/// A checked range of a namespace.
#[derive(Clone, Copy)]
struct Range {
    namespace: u16,
    slba: u64,
    blocks: u64,
    len: usize,
}

/// Merges a range of guest memory into the list.
#[inline]
fn remember(ranges: &mut Vec<(u64, u32)>, iova: u64, len: usize) {
    match ranges.last_mut() {
        Some((start, bytes)) if *start + u64::from(*bytes) == iova => *bytes += len as u32,
        _ => ranges.push((iova, len as u32)),
    }
}

impl Engine {
    /// Executes an I/O command.
    #[inline]
    pub(crate) fn execute(&mut self, entry: &SubmissionEntry, sqid: u16, shared: &mut Shared) -> Outcome {
        let cdw0 = entry.cdw0;
        let opcode = entry.nvm_opcode();
        let known = matches!(
            opcode,
            NvmOpcode::READ
                | NvmOpcode::WRITE
                | NvmOpcode::FLUSH
                | NvmOpcode::WRITE_ZEROES
                | NvmOpcode::DATASET_MANAGEMENT
                | NvmOpcode::COMPARE
                | NvmOpcode::VERIFY
                | NvmOpcode::COPY
                | NvmOpcode::WRITE_UNCORRECTABLE
        );
        if !known {
            return Status::INVALID_OPCODE.with_dnr().into();
        }
        if cdw0.fuse() != Fuse::NORMAL || cdw0.psdt() > Psdt::SGL_MPTR_SGL {
            return Status::INVALID_FIELD.with_dnr().into();
        }
        let namespace = match self.namespace(entry.nsid) {
            Ok(index) => index,
            Err(status) => return status.into(),
        };
        let outcome = match opcode {
            NvmOpcode::READ => self.read(entry, sqid, namespace, shared),
            NvmOpcode::WRITE => self.write(entry, sqid, namespace, shared),
            NvmOpcode::FLUSH => self.flush(entry, sqid, namespace, shared),
            NvmOpcode::WRITE_ZEROES => self.write_zeroes(entry, sqid, namespace, shared),
            NvmOpcode::DATASET_MANAGEMENT => self.dsm(entry, sqid, namespace, shared),
            NvmOpcode::COMPARE => self.compare(entry, sqid, namespace, shared),
            NvmOpcode::VERIFY => self.verify(entry, sqid, namespace, shared),
            NvmOpcode::COPY => self.copy(entry, sqid, namespace, shared),
            _ => self.write_uncorrectable(entry, sqid, namespace, shared),
        };
        outcome.unwrap_or_else(Outcome::from)
    }

    /// The range of a command with SLBA and NLB: length (for commands with data), bounds, write protection.
    #[inline]
    fn range(
        &self,
        entry: &SubmissionEntry,
        namespace: u16,
        shared: &Shared,
        data: bool,
        change: bool,
    ) -> Result<(Range, RwCdw12), Status> {
        let found = shared.namespaces.get(usize::from(namespace)).ok_or(Status::INTERNAL_ERROR)?;
        let cdw12 = entry.rw_cdw12();
        let (slba, blocks) = (entry.slba(), u64::from(cdw12.blocks()));
        let len = (blocks << found.block_shift) as usize;
        if data && len > self.max_transfer {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        if !found.holds(slba, blocks) {
            return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
        }
        if change && found.write_protected {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
        }
        if change && data && cdw12.dtype() != 0 {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        Ok((Range { namespace, slba, blocks, len }, cdw12))
    }

    #[inline]
    fn read(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let (range, _) = self.range(entry, ns, shared, true, false)?;
        let outcome = self.transfer(entry, sqid, range, BackingOp::Read, shared)?;
        if outcome != Outcome::Busy {
            self.counters.reads += 1;
            self.counters.read_bytes += range.len as u64;
        }
        Ok(outcome)
    }

    #[inline]
    fn write(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let (range, cdw12) = self.range(entry, ns, shared, true, true)?;
        let fua = cdw12.fua() || !self.wce;
        let outcome = self.transfer(entry, sqid, range, BackingOp::Write { fua }, shared)?;
        if outcome != Outcome::Busy {
            self.counters.writes += 1;
            self.counters.written_bytes += range.len as u64;
        }
        Ok(outcome)
    }

    #[inline]
    fn transfer(
        &mut self,
        entry: &SubmissionEntry,
        sqid: u16,
        range: Range,
        op: BackingOp,
        shared: &mut Shared,
    ) -> Result<Outcome, Status> {
        let index = usize::from(range.namespace);
        let namespace = shared.namespaces.get_mut(index).ok_or(Status::INTERNAL_ERROR)?;
        let read = op == BackingOp::Read;
        self.ranges.clear();
        let work = if read { Work::Read } else { Work::Change };
        let Range { slba, blocks, len, .. } = range;
        let operation = Operation { op, work, namespace: range.namespace, slba, blocks, sqid, cid: entry.cdw0.cid() };
        let place = (self.index, self.reader.generation());
        let prp1 = entry.dptr[0];
        // One page, as most commands are: no list at all.
        let one_page = len <= PAGE - (prp1 as usize & (PAGE - 1)) && entry.cdw0.psdt() == Psdt::PRP && prp1 & 3 == 0;
        let submitted = if one_page {
            let piece = self.reader.lookup(prp1, len, read).ok_or(Status::DATA_TRANSFER_ERROR)?;
            self.ranges.push((prp1, len as u32));
            Self::submit(&mut self.contexts, &self.ranges, place, namespace, &operation, &[piece])
        } else {
            let mut pieces = Segments::new();
            let ranges = &mut self.ranges;
            dptr::io(&self.reader, entry, len, read, &mut pieces, |iova, n| remember(ranges, iova, n))?;
            Self::submit(&mut self.contexts, &self.ranges, place, namespace, &operation, &pieces)
        };
        self.moved += len;
        let status = match submitted {
            Submitted::Busy => return Ok(Outcome::Busy),
            Submitted::Pending => return Ok(Outcome::Pending),
            Submitted::Done(status) => status,
        };
        if read {
            if let Some(tracker) = &mut self.tracker {
                for &(iova, bytes) in &self.ranges {
                    tracker.written(iova, bytes as usize);
                }
            }
        } else {
            self.changed(shared, range.namespace, slba, blocks, false, status);
        }
        Ok(status.into())
    }

    fn flush(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let cid = entry.cdw0.cid();
        let operation =
            Operation { op: BackingOp::Flush, work: Work::Flush, namespace: ns, slba: 0, blocks: 0, sqid, cid };
        Ok(self.submit_plain(shared, &operation))
    }

    fn write_zeroes(
        &mut self,
        entry: &SubmissionEntry,
        sqid: u16,
        ns: u16,
        shared: &mut Shared,
    ) -> Result<Outcome, Status> {
        let (range, cdw12) = self.range(entry, ns, shared, false, true)?;
        let (deallocate, fua) = (cdw12.deac(), cdw12.fua() || !self.wce);
        let cid = entry.cdw0.cid();
        let Range { slba, blocks, .. } = range;
        if range.len > CHUNK_BYTES {
            return self.start_job(JobKind::Zero { deallocate, fua }, ns, sqid, cid, &[(slba, blocks)], 0, shared);
        }
        self.moved += range.len;
        let op = BackingOp::WriteZeroes { deallocate, fua };
        Ok(self.submit_plain(shared, &Operation { op, work: Work::Change, namespace: ns, slba, blocks, sqid, cid }))
    }

    fn write_uncorrectable(
        &mut self,
        entry: &SubmissionEntry,
        sqid: u16,
        ns: u16,
        shared: &mut Shared,
    ) -> Result<Outcome, Status> {
        let Range { slba, blocks, .. } = self.range(entry, ns, shared, false, true)?.0;
        let namespace = shared.namespaces.get(usize::from(ns)).ok_or(Status::INTERNAL_ERROR)?;
        if !namespace.backing.can_write_uncorrectable() {
            return Err(Status::INVALID_OPCODE.with_dnr());
        }
        let (op, cid) = (BackingOp::WriteUncorrectable, entry.cdw0.cid());
        Ok(self.submit_plain(shared, &Operation { op, work: Work::Change, namespace: ns, slba, blocks, sqid, cid }))
    }

    fn dsm(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let count = usize::from(DsmCdw10::from_bits(entry.cdw10).nr()) + 1;
        if !DsmCdw11::from_bits(entry.cdw11).ad() {
            return Ok(Status::SUCCESS.into());
        }
        let mut list = [DsmRange::new_zeroed(); 256];
        let Some(list) = list.get_mut(..count) else { return Err(Status::INVALID_FIELD) };
        self.fetch(entry, list.as_mut_bytes())?;
        let namespace = shared.namespaces.get(usize::from(ns)).ok_or(Status::INTERNAL_ERROR)?;
        if list.iter().any(|r| !namespace.holds(r.slba, u64::from(r.length))) {
            return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
        }
        if namespace.write_protected {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
        }
        let mut ranges = [(0, 0); 256];
        for (to, from) in ranges.iter_mut().zip(&*list) {
            *to = (from.slba, u64::from(from.length));
        }
        self.start_job(JobKind::Deallocate, ns, sqid, entry.cdw0.cid(), &ranges[..count], 0, shared)
    }

    /// Copies a command's data out of guest memory.
    fn fetch(&mut self, entry: &SubmissionEntry, into: &mut [u8]) -> Result<(), Status> {
        let mut pieces = Segments::new();
        dptr::io(&self.reader, entry, into.len(), false, &mut pieces, |_, _| {})?;
        dptr::gather(&pieces, into);
        Ok(())
    }

    fn compare(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let (range, _) = self.range(entry, ns, shared, true, false)?;
        let Some(job) = self.jobs.next() else { return Ok(Outcome::Busy) };
        let mut pieces = Segments::new();
        dptr::io(&self.reader, entry, range.len, false, &mut pieces, |_, _| {})?;
        self.jobs.keep_data(job, &pieces);
        drop(pieces);
        self.moved += range.len;
        self.start_job(JobKind::Compare, ns, sqid, entry.cdw0.cid(), &[(range.slba, range.blocks)], 0, shared)
    }

    fn verify(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let (range, _) = self.range(entry, ns, shared, false, false)?;
        self.start_job(JobKind::Verify, ns, sqid, entry.cdw0.cid(), &[(range.slba, range.blocks)], 0, shared)
    }

    fn copy(&mut self, entry: &SubmissionEntry, sqid: u16, ns: u16, shared: &mut Shared) -> Result<Outcome, Status> {
        let cdw12 = CopyCdw12::from_bits(entry.cdw12);
        let count = usize::from(cdw12.nr()) + 1;
        if cdw12.descfmt() != 0 || cdw12.dtype() != 0 {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        if count > COPY_RANGES {
            return Err(Status::COPY_SIZE_LIMIT.with_dnr());
        }
        let mut bytes = [0u8; COPY_RANGES * 32];
        let Some(bytes) = bytes.get_mut(..count * 32) else { return Err(Status::INVALID_FIELD) };
        self.fetch(entry, bytes)?;
        let namespace = shared.namespaces.get(usize::from(ns)).ok_or(Status::INTERNAL_ERROR)?;
        let mut ranges = [(0, 0); COPY_RANGES];
        let mut total = 0u64;
        for (to, from) in ranges.iter_mut().zip(bytes.chunks_exact(32)) {
            let from = CopyRange0::read_from_bytes(from).map_err(|_| Status::INTERNAL_ERROR)?;
            let blocks = u64::from(from.blocks());
            if blocks > u64::from(COPY_RANGE_BLOCKS) {
                return Err(Status::COPY_SIZE_LIMIT.with_dnr());
            }
            if !namespace.holds(from.slba, blocks) {
                return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
            }
            total += blocks;
            *to = (from.slba, blocks);
        }
        if total > u64::from(COPY_BLOCKS) {
            return Err(Status::COPY_SIZE_LIMIT.with_dnr());
        }
        if !namespace.holds(entry.slba(), total) {
            return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
        }
        if namespace.write_protected {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
        }
        let fua = cdw12.fua() || !self.wce;
        self.start_job(JobKind::Copy { fua }, ns, sqid, entry.cdw0.cid(), &ranges[..count], entry.slba(), shared)
    }
}
