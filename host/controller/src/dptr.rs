//! Data pointers: PRP lists and SGLs into a list of memory pieces of fixed capacity (Base 2.3 §4.3).
//!
//! Nothing allocates. Whatever the guest wrote is read once and bounded: a PRP list by the length of the data, an SGL by
//! [`MAX_DESCRIPTORS`]. Adjacent pieces become one.

use arrayvec::ArrayVec;
use dray_device::memory::Segment;
use dray_device::space::SpaceReader;
use dray_nvme::command::{Psdt, SubmissionEntry};
use dray_nvme::status::Status;

/// Bytes of a memory page (CC.MPS is always 0).
pub(crate) const PAGE: usize = 4096;
/// Most pieces of one command: 1 MiB in pages, an unaligned one more.
pub(crate) const MAX_SEGMENTS: usize = 264;
/// Most SGL descriptors of one command, segment descriptors included.
const MAX_DESCRIPTORS: usize = 1024;

/// The pieces of one command's data, in order.
pub(crate) type Segments<'a> = ArrayVec<Segment<'a>, MAX_SEGMENTS>;

/// Translates a data pointer; `seen` gets every guest range (I/O virtual address, bytes).
struct Walk<'a, 'o, F> {
    reader: &'a SpaceReader,
    write: bool,
    out: &'o mut Segments<'a>,
    seen: F,
}

impl<'a, F: FnMut(u64, usize)> Walk<'a, '_, F> {
    #[inline]
    fn push(&mut self, iova: u64, len: usize) -> Result<(), Status> {
        let piece = self.reader.lookup(iova, len, self.write).ok_or(Status::DATA_TRANSFER_ERROR)?;
        (self.seen)(iova, len);
        if let Some(last) = self.out.last_mut()
            && let Some(joined) = last.joined(&piece)
        {
            *last = joined;
            return Ok(());
        }
        self.out.try_push(piece).map_err(|_| Status::INVALID_FIELD.with_dnr())
    }

    fn prp(&mut self, prp1: u64, prp2: u64, len: usize) -> Result<(), Status> {
        if !prp1.is_multiple_of(4) {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        let first = len.min(PAGE - (prp1 as usize & (PAGE - 1)));
        self.push(prp1, first)?;
        let rest = len - first;
        match rest {
            0 => Ok(()),
            _ if prp2 == 0 => Err(Status::INVALID_FIELD.with_dnr()),
            1..=PAGE => self.page(prp2, rest),
            _ => self.prp_list(prp2, rest),
        }
    }

    fn page(&mut self, entry: u64, len: usize) -> Result<(), Status> {
        if !entry.is_multiple_of(PAGE as u64) {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        self.push(entry, len)
    }

    fn prp_list(&mut self, mut list: u64, mut rest: usize) -> Result<(), Status> {
        if !list.is_multiple_of(8) {
            return Err(Status::PRP_OFFSET_INVALID.with_dnr());
        }
        let mut bytes = [0u8; PAGE];
        loop {
            let slots = (PAGE - (list as usize & (PAGE - 1))) / 8;
            let needed = rest.div_ceil(PAGE);
            let here = needed.min(slots);
            let page = self.reader.lookup(list, here * 8, false).ok_or(Status::DATA_TRANSFER_ERROR)?;
            page.read(&mut bytes[..here * 8]);
            let entry = |i: usize| bytes[i * 8..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
            let chained = needed > slots;
            let data = if chained { slots - 1 } else { here };
            for i in 0..data {
                let part = rest.min(PAGE);
                self.page(entry(i), part)?;
                rest -= part;
            }
            if !chained {
                return Ok(());
            }
            // A page-aligned list page has 512 slots, so every page from here on describes data: the walk ends.
            list = entry(slots - 1);
            if !list.is_multiple_of(PAGE as u64) {
                return Err(Status::PRP_OFFSET_INVALID.with_dnr());
            }
        }
    }

    fn sgl(&mut self, descriptor: Descriptor, len: usize) -> Result<(), Status> {
        let mut rest = len;
        let mut budget = MAX_DESCRIPTORS;
        let mut segment = match descriptor.kind()? {
            Kind::Data => {
                self.sgl_data(&descriptor, &mut rest)?;
                None
            }
            Kind::Segment(last) => Some((descriptor, last)),
        };
        while let Some((at, last)) = segment.take() {
            if at.len == 0 || !at.len.is_multiple_of(16) {
                return Err(Status::SGL_INVALID_SEGMENT.with_dnr());
            }
            let count = at.len as usize / 16;
            budget = budget.checked_sub(count).ok_or(Status::SGL_INVALID_COUNT.with_dnr())?;
            for i in 0..count {
                let descriptor = self.descriptor(at.address, i)?;
                let final_one = i + 1 == count;
                match descriptor.kind()? {
                    Kind::Data if final_one && !last => return Err(Status::SGL_INVALID_SEGMENT.with_dnr()),
                    Kind::Data => self.sgl_data(&descriptor, &mut rest)?,
                    Kind::Segment(next) if final_one && !last => segment = Some((descriptor, next)),
                    Kind::Segment(_) if final_one => return Err(Status::SGL_INVALID_SEGMENT.with_dnr()),
                    Kind::Segment(_) => return Err(Status::SGL_INVALID_COUNT.with_dnr()),
                }
            }
        }
        if rest == 0 { Ok(()) } else { Err(Status::SGL_DATA_LENGTH_INVALID.with_dnr()) }
    }

    fn descriptor(&self, segment: u64, index: usize) -> Result<Descriptor, Status> {
        let at = segment.checked_add(16 * index as u64).ok_or(Status::DATA_TRANSFER_ERROR)?;
        let mut bytes = [0u8; 16];
        self.reader.lookup(at, 16, false).ok_or(Status::DATA_TRANSFER_ERROR)?.read(&mut bytes);
        Ok(Descriptor::new(u128::from_le_bytes(bytes)))
    }

    fn sgl_data(&mut self, descriptor: &Descriptor, rest: &mut usize) -> Result<(), Status> {
        let len = descriptor.len as usize;
        *rest = rest.checked_sub(len).ok_or(Status::SGL_DATA_LENGTH_INVALID.with_dnr())?;
        if !descriptor.address.is_multiple_of(4) || !len.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let end = descriptor.address.checked_add(len as u64).ok_or(Status::DATA_TRANSFER_ERROR)?;
        if len > 0 && self.reader.lookup(descriptor.address, len, self.write).is_some() {
            return self.push(descriptor.address, len);
        }
        // The block may reach over several mappings: page by page.
        let mut at = descriptor.address;
        while at < end {
            let part = (PAGE as u64 - at % PAGE as u64).min(end - at);
            self.push(at, part as usize)?;
            at += part;
        }
        Ok(())
    }
}

enum Kind {
    Data,
    /// A segment; `true` for the last one.
    Segment(bool),
}

/// An SGL descriptor (Base 2.3 §4.3.2).
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    id: u8,
}

impl Descriptor {
    fn new(bits: u128) -> Self {
        Self { address: bits as u64, len: (bits >> 64) as u32, id: (bits >> 120) as u8 }
    }

    fn kind(&self) -> Result<Kind, Status> {
        match self.id {
            0x00 => Ok(Kind::Data),
            0x20 => Ok(Kind::Segment(false)),
            0x30 => Ok(Kind::Segment(true)),
            _ => Err(Status::SGL_TYPE_INVALID.with_dnr()),
        }
    }
}

/// The memory of an I/O command's data of `len` bytes; `write` when the controller writes it. PSDT has been checked to be a
/// legal value.
#[inline]
pub(crate) fn io<'a>(
    reader: &'a SpaceReader,
    entry: &SubmissionEntry,
    len: usize,
    write: bool,
    out: &mut Segments<'a>,
    seen: impl FnMut(u64, usize),
) -> Result<(), Status> {
    let mut walk = Walk { reader, write, out, seen };
    let [low, high] = entry.dptr;
    if entry.cdw0.psdt() == Psdt::PRP {
        walk.prp(low, high, len)
    } else {
        walk.sgl(Descriptor::new(u128::from(low) | u128::from(high) << 64), len)
    }
}

/// The memory of an admin command's data: always PRPs over PCIe.
pub(crate) fn admin<'a>(
    reader: &'a SpaceReader,
    entry: &SubmissionEntry,
    len: usize,
    write: bool,
    seen: impl FnMut(u64, usize),
) -> Result<Segments<'a>, Status> {
    let mut out = Segments::new();
    if len > 0 {
        Walk { reader, write, out: &mut out, seen }.prp(entry.dptr[0], entry.dptr[1], len)?;
    }
    Ok(out)
}

/// Copies `bytes` into the pieces, which have that many bytes.
pub(crate) fn scatter(segments: &[Segment<'_>], bytes: &[u8]) {
    let mut rest = bytes;
    for segment in segments {
        let Some((part, after)) = rest.split_at_checked(segment.len()) else { return };
        segment.write(part);
        rest = after;
    }
}

/// Copies the pieces into `bytes`, which holds as many.
pub(crate) fn gather(segments: &[Segment<'_>], bytes: &mut [u8]) {
    let mut rest = bytes;
    for segment in segments {
        let Some((part, after)) = rest.split_at_mut_checked(segment.len()) else { return };
        segment.read(part);
        rest = after;
    }
}
