//! What a component has instead of an operating system: an allocator, and a line of text for a panic.

extern crate alloc;
pub use alloc::format;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::ptr;
use dlmalloc::GlobalDlmalloc;

/// Lists are passed by allocation, so every call allocates and frees blocks of the same few sizes.
#[global_allocator]
static ALLOCATOR: Shelves = Shelves { free: UnsafeCell::new([ptr::null_mut(); SHELVES]) };

/// Blocks of 2^4 to 2^19 bytes.
const SHELVES: usize = 16;
const SMALLEST_LOG2: u32 = 4;

/// Keeps freed blocks by size, a power of two each, and takes from there first; dlmalloc makes them, and all that are larger.
/// Taking and giving back are a few instructions, where dlmalloc splits and joins.
struct Shelves {
    /// The first free block of each size; a free block begins with the address of the next.
    free: UnsafeCell<[*mut u8; SHELVES]>,
}

// SAFETY: a component has one thread, and no import is called while an allocation runs.
unsafe impl Sync for Shelves {}

impl Shelves {
    /// The shelf of a layout and the layout of its blocks; nothing for what dlmalloc keeps itself.
    #[inline(always)]
    fn shelf(layout: Layout) -> Option<(usize, Layout)> {
        let log2 = usize::BITS - layout.size().max(1 << SMALLEST_LOG2).wrapping_sub(1).leading_zeros();
        let at = (log2 - SMALLEST_LOG2) as usize;
        if at >= SHELVES || layout.align() > 8 {
            return None;
        }
        // SAFETY: 8 is a power of two, and 2^19 does not overflow when rounded up to it.
        Some((at, unsafe { Layout::from_size_align_unchecked(1 << log2, 8) }))
    }
}

// SAFETY: a block is handed out by dlmalloc or from the shelf of its size, where it got when it was freed: it is as large as
// its layout says and nobody else has it.
unsafe impl GlobalAlloc for Shelves {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((at, block)) = Self::shelf(layout) else {
            // SAFETY: the caller's contract.
            return unsafe { GlobalDlmalloc.alloc(layout) };
        };
        // SAFETY: one thread; a block on a shelf holds the next one's address.
        unsafe {
            let shelf = &mut (*self.free.get())[at];
            let first = *shelf;
            if first.is_null() {
                return GlobalDlmalloc.alloc(block);
            }
            *shelf = *first.cast::<*mut u8>();
            first
        }
    }

    #[inline]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let Some((shelf, _)) = Self::shelf(layout) else {
            // SAFETY: the caller's contract; a layout without a shelf was allocated by dlmalloc.
            return unsafe { GlobalDlmalloc.dealloc(at, layout) };
        };
        // SAFETY: one thread; the block is at least 16 bytes, aligned to 8, and nobody's from now on.
        unsafe {
            let shelf = &mut (*self.free.get())[shelf];
            *at.cast::<*mut u8>() = *shelf;
            *shelf = at;
        }
    }
}

/// Text of up to 240 bytes on the stack: a panic may be due to memory that has run out.
pub struct Line {
    bytes: [u8; 240],
    used: usize,
}

impl Line {
    /// The panic's place in the source and its message, cut to what fits.
    pub fn of(info: &PanicInfo) -> Self {
        let mut line = Self { bytes: [0; 240], used: 0 };
        // An error means that the rest did not fit.
        let _ = write!(line, "{info}");
        line
    }

    /// The text.
    pub fn text(&self) -> &str {
        self.bytes.get(..self.used).and_then(|text| str::from_utf8(text).ok()).unwrap_or("panic")
    }
}

impl Write for Line {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let end = part.floor_char_boundary(self.bytes.len() - self.used);
        self.bytes[self.used..self.used + end].copy_from_slice(&part.as_bytes()[..end]);
        self.used += end;
        if end == part.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
