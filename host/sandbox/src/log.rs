//! The one thing a component may ask for: a line in the host's log. Rate-limited, cut, escaped.

use crate::bindings::Level;
use crate::instance::Host;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, WasmStr};

/// Longest line in bytes, as the component wrote it.
const MAX_LINE_BYTES: usize = 1024;
/// Lines that may come at once.
const BURST: u32 = 16;
/// One more line is allowed every so many microseconds of the migration.
const REFILL_US: u64 = 250_000;

/// How many lines an instance may still write: a bucket that fills with the migration's own time, which comes in the calls.
#[derive(Debug)]
pub(crate) struct Gate {
    lines: u32,
    filled_us: u64,
    suppressed: u64,
}

impl Gate {
    pub(crate) fn new(now_us: u64) -> Self {
        Self { lines: BURST, filled_us: now_us, suppressed: 0 }
    }

    /// Time went on.
    pub(crate) fn advance(&mut self, now_us: u64) {
        let fresh = now_us.saturating_sub(self.filled_us) / REFILL_US;
        if fresh > 0 {
            self.filled_us += fresh * REFILL_US;
            self.lines = u32::try_from(fresh).unwrap_or(BURST).saturating_add(self.lines).min(BURST);
        }
    }

    /// May a line pass? If so, how many were held back since the last that did.
    fn pass(&mut self) -> Option<u64> {
        if self.lines == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// Gives components `dray:policy/host`.
pub(crate) fn add_to_linker(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    linker.instance("dray:policy/host@0.1.0")?.func_wrap("log", |mut store: StoreContextMut<'_, Host>, (level, text): (Level, WasmStr)| {
        // Asked first: a line that is held back must not cost the reading of its text.
        let Some(suppressed) = store.data_mut().log.pass() else { return Ok(()) };
        let text = clean(&text.to_str(&store)?);
        write(level, &store.data().component, &text, suppressed);
        Ok(())
    })
}

/// Cuts a line and escapes what could forge another one or steer a terminal.
fn clean(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_LINE_BYTES);
    let mut line = String::with_capacity(end + 4);
    for c in text[..end].chars() {
        if c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    if end < text.len() {
        line.push('…');
    }
    line
}

fn write(level: Level, component: &str, line: &str, suppressed: u64) {
    match level {
        Level::Debug => tracing::debug!(target: "dray::policy", component, suppressed, "{line}"),
        Level::Info => tracing::info!(target: "dray::policy", component, suppressed, "{line}"),
        Level::Warn => tracing::warn!(target: "dray::policy", component, suppressed, "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_held_back_and_counted() {
        let mut gate = Gate::new(1_000_000);
        let passed = (0..100).filter(|_| gate.pass().is_some()).count();
        assert_eq!(passed, BURST as usize);
        gate.advance(1_000_000 + REFILL_US - 1);
        assert_eq!(gate.pass(), None);
        gate.advance(1_000_000 + REFILL_US);
        assert_eq!(gate.pass(), Some(85));
        assert_eq!(gate.pass(), None);
        gate.advance(u64::MAX);
        assert_eq!((0..100).filter(|_| gate.pass().is_some()).count(), BURST as usize);
        gate.advance(0);
        assert_eq!(gate.pass(), None, "time that runs backwards gives nothing");
    }

    #[test]
    fn lines_are_cut_and_escaped() {
        assert_eq!(clean("plain ä"), "plain ä");
        assert_eq!(clean("a\nb\x1b[31m\u{202e}"), "a\\nb\\u{1b}[31m\\u{202e}");
        let long = clean(&"ä".repeat(1000));
        assert_eq!(long.len(), MAX_LINE_BYTES + '…'.len_utf8());
        assert!(clean(&"x".repeat(MAX_LINE_BYTES)).ends_with('x'));
    }
}
