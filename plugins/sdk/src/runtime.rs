//! What a component has instead of an operating system: an allocator, and a line of text for a panic.

extern crate alloc;
pub use alloc::format;
use core::fmt::{self, Write};
use core::panic::PanicInfo;

/// Lists are passed by allocation, so every call allocates and frees: dlmalloc reuses what was freed, a bump allocator would
/// need to know which of a policy's values outlive the call.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

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
