//! Looking over raw memory at memory speed: all zero, equal. No reference is made; bytes may change while they are read.
#![allow(unsafe_code)]

/// Whether `len` bytes from `at` are zero. The caller guarantees that they are readable.
pub(crate) fn is_zero(at: *const u8, len: usize) -> bool {
    // SAFETY: readable by contract of this crate's callers (a bounds-checked range of an arena).
    unsafe { fold(len, |i| word(at, i), |i| byte(at, i)) }
}

/// Whether `len` bytes from `left` and `right` are equal. The caller guarantees that they are readable.
pub(crate) fn equal(left: *const u8, right: *const u8, len: usize) -> bool {
    // SAFETY: readable by contract, as above.
    unsafe { fold(len, |i| word(left, i) ^ word(right, i), |i| byte(left, i) ^ byte(right, i)) }
}

/// ORs eight words at a time and stops at the first block that is not zero.
#[inline(always)]
unsafe fn fold(len: usize, word: impl Fn(usize) -> u64, byte: impl Fn(usize) -> u8) -> bool {
    let blocks = len / 64;
    for block in 0..blocks {
        let at = block * 64;
        let mut bits = 0;
        for lane in 0..8 {
            bits |= word(at + lane * 8);
        }
        if bits != 0 {
            return false;
        }
    }
    (blocks * 64..len).all(|i| byte(i) == 0)
}

#[inline(always)]
unsafe fn word(at: *const u8, i: usize) -> u64 {
    // SAFETY: the caller's range covers i..i + 8; unaligned reads are allowed.
    unsafe { at.add(i).cast::<u64>().read_unaligned() }
}

#[inline(always)]
unsafe fn byte(at: *const u8, i: usize) -> u8 {
    // SAFETY: the caller's range covers i.
    unsafe { at.add(i).read() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts() {
        for len in [0, 1, 63, 64, 65, 4096, 4097] {
            let zero = vec![0u8; len];
            assert!(is_zero(zero.as_ptr(), len));
            for at in 0..len {
                let mut one = zero.clone();
                one[at] = 1;
                assert!(!is_zero(one.as_ptr(), len), "byte {at} of {len}");
                assert!(!equal(one.as_ptr(), zero.as_ptr(), len));
                assert!(equal(one.as_ptr(), one.clone().as_ptr(), len));
            }
        }
    }
}
