//! How bytes become values: a cursor that never fails. What lies past the end reads as zero, so that a shorter input is a
//! simpler session.

/// A cursor over an input.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// A cursor at the start of `data`.
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        Self { rest: data }
    }

    /// Nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `len` bytes, or what is left.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        now
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A byte as a number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.u8()) % bound
    }

    /// A bit of a byte.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// A number that is most often small, and now and then one at which things break.
    pub fn number(&mut self) -> u64 {
        match self.u8() {
            small @ 0..=219 => small.into(),
            220..=225 => self.u16().into(),
            226..=229 => self.u32().into(),
            230 => self.u64(),
            231 => u64::from(u32::MAX),
            232 => u64::MAX,
            233 => u64::from(u16::MAX),
            234 => 1 << 31,
            235 => i64::MAX as u64,
            236..=239 => u64::MAX - u64::from(self.u8()),
            power => (1u64 << (power - 240)) * 16 - 1,
        }
    }

    /// [`number`](Self::number) as 32 bits.
    pub fn number32(&mut self) -> u32 {
        self.number() as u32
    }

    /// [`number`](Self::number) as 16 bits.
    pub fn number16(&mut self) -> u16 {
        self.number() as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_end_all_is_zero() {
        let mut input = Input::new(&[1, 2, 3]);
        assert_eq!((input.u16(), input.u32(), input.u64(), input.number()), (0x201, 3, 0, 0));
        assert!(input.is_empty() && input.bytes(9).is_empty());
    }
}
