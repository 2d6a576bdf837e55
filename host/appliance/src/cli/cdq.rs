//! `dray cdq watch`: the demo's source and guest, and what the controller reports of the guest's writes, entry by entry.
//!
//! The guest writes, so the namespaces are always in memory here: no file of the configuration is opened. One thread polls
//! subsystem, driver, guest and queue in turn, so output that nobody reads stops the guest instead of filling the queue.

use crate::assembly::{self, Machine};
use crate::config::units::Size;
use crate::config::{BackingKind, Config, Subsystem};
use crate::core::clock::Clock;
use dray_device::command::SubmitError;
use dray_device::poll::{Poll, Time};
use dray_device::slot::Slot;
use dray_device::space::AddressSpace;
use dray_driver::mmc::{self, Query};
use dray_driver::{CdqConfig, CdqFormat, CdqOwner, CdqState, Driver, DriverConfig, DriverState};
use dray_nvme::cdq::{Changed, Esa, QueueType, UDMQ_ENTRY_BYTES, UdmqEntry};
use dray_workload::guest::{Guest, GuestConfig, GuestHandle};
use dray_workload::ledger::{Ledger, LedgerSpec};
use dray_workload::tag::BLOCK_BYTES;
use miette::{IntoDiagnostic, miette};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use toml::Spanned;
use zerocopy::FromBytes;

/// Most bytes of a namespace here.
const NAMESPACE_BYTES: u64 = 256 << 20;
/// Entries taken at a time.
const BATCH: usize = 512;
/// How long a step of the set-up or of the end may take, in milliseconds.
const PATIENCE_MS: u64 = 5_000;
/// How long the thread sleeps when nothing had anything to do.
const NAP: Duration = Duration::from_micros(50);
/// The guest's number in its tags, and the seed of what it writes.
const GUEST: (u32, u64) = (1, 1);

/// Watches the queue of the first migratable controller until `entries` (0 = any number) were shown, or until Ctrl-C.
/// `raw` adds the entries' bytes to the text.
pub(super) fn watch(config: &Path, entries: u64, as_json: bool, raw: bool) -> miette::Result<ExitCode> {
    let config = Config::read(config)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).into_diagnostic()?;
    }
    let mut watch = Watch::start(&config)?;
    let mut screen = Screen::new(io::stdout().lock(), Form { as_json, raw }, entries);
    let about = format!(
        "{}: namespaces in memory, at most {}; the configured files are not touched. Ctrl-C ends it.",
        watch.name,
        Size(NAMESPACE_BYTES)
    );
    screen.begin(&about).into_diagnostic()?;
    while !screen.is_done() && !stop.load(Ordering::Relaxed) {
        watch.show(&mut screen)?;
    }
    watch.end(&mut screen)?;
    screen.finish().into_diagnostic()?;
    Ok(ExitCode::SUCCESS)
}

/// How entries are shown.
#[derive(Clone, Copy, Debug)]
struct Form {
    as_json: bool,
    raw: bool,
}

/// An entry, where it was and when it was taken.
#[derive(Clone, Copy, Debug)]
struct Seen {
    ms: f64,
    slot: u64,
    entry: UdmqEntry,
}

const HEADING: &str = "   TIME/ms   SLOT P  ESA                NSID         SLBA     BLOCKS  DLBA";

impl Seen {
    fn text(&self, raw: bool) -> String {
        let esa = self.entry.esa().to_string();
        let dlba = if self.entry.lbamqa.dlba() { "deallocated" } else { "" };
        let [nsid, slba, blocks] = match self.entry.changed() {
            Changed::Range { nsid, slba, blocks } => [nsid.to_string(), slba.to_string(), blocks.to_string()],
            Changed::Namespace { nsid } => [nsid.to_string(), "all".into(), "all".into()],
            Changed::Nothing => ["-"; 3].map(Into::into),
            Changed::Unknown => ["?"; 3].map(Into::into),
        };
        let Self { ms, slot, .. } = self;
        let phase = u8::from(self.entry.phase());
        let mut line = format!("{ms:>10.3} {slot:>6} {phase}  {esa:<17} {nsid:>5} {slba:>12} {blocks:>10}  {dlba:<11}");
        if raw {
            // Writing to a string cannot fail.
            let _infallible = write!(line, "  {}", self.hex());
        }
        line.truncate(line.trim_end().len());
        line
    }

    fn hex(&self) -> String {
        use zerocopy::IntoBytes;
        self.entry.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn json(&self) -> Value {
        let (kind, nsid, slba, blocks) = match self.entry.changed() {
            Changed::Range { nsid, slba, blocks } => ("range", Some(nsid), Some(slba), Some(blocks)),
            Changed::Namespace { nsid } => ("namespace", Some(nsid), None, None),
            Changed::Nothing => ("none", None, None, None),
            Changed::Unknown => ("reserved", None, None, None),
        };
        json!({
            "time_ms": (self.ms * 1e3).round() / 1e3, "slot": self.slot, "phase": u8::from(self.entry.phase()),
            "esa": self.entry.esa().to_string(), "esa_code": self.entry.esa().0, "lbacir": kind, "nsid": nsid,
            "slba": slba, "blocks": blocks, "deallocated": self.entry.lbamqa.dlba(), "raw": self.hex(),
        })
    }
}

/// Where entries are shown, and how many were.
struct Screen<W: Write> {
    out: BufWriter<W>,
    form: Form,
    /// 0 = any number.
    limit: u64,
    shown: u64,
    blocks: u64,
    closed: bool,
}

impl<W: Write> Screen<W> {
    fn new(out: W, form: Form, limit: u64) -> Self {
        Self { out: BufWriter::new(out), form, limit, shown: 0, blocks: 0, closed: false }
    }

    /// Enough was shown, or nobody reads any more.
    fn is_done(&self) -> bool {
        self.closed || (self.limit > 0 && self.shown >= self.limit)
    }

    /// A reader that went away (`| head`) is the end, not an error.
    fn check(&mut self, written: io::Result<()>) -> io::Result<()> {
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            other => other,
        }
    }

    /// The first lines; with JSON they go to standard error.
    fn begin(&mut self, about: &str) -> io::Result<()> {
        if self.form.as_json {
            // Standard error may be closed: then nobody wants to know.
            let _unread = writeln!(io::stderr(), "{about}");
            return Ok(());
        }
        let bytes = if self.form.raw { "         BYTES" } else { "" };
        let written = writeln!(self.out, "{about}\n{HEADING}{bytes}").and_then(|()| self.out.flush());
        self.check(written)
    }

    fn show(&mut self, seen: &Seen) -> io::Result<()> {
        if self.is_done() {
            return Ok(());
        }
        self.shown += 1;
        if let Changed::Range { blocks, .. } = seen.entry.changed() {
            self.blocks += blocks;
        }
        let written = if self.form.as_json {
            writeln!(self.out, "{}", seen.json())
        } else {
            writeln!(self.out, "{}", seen.text(self.form.raw))
        };
        self.check(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.out.flush();
        self.check(written)
    }

    fn finish(&mut self) -> io::Result<()> {
        if !self.form.as_json && !self.closed {
            let written = writeln!(self.out, "entries: {}, blocks changed: {}", self.shown, self.blocks);
            self.check(written)?;
        }
        self.flush()
    }
}

/// The subsystem with namespaces in memory.
fn in_memory(subsystem: &Subsystem) -> Subsystem {
    let mut subsystem = subsystem.clone();
    for namespace in &mut subsystem.namespaces {
        let bytes = namespace.size.as_ref().map_or(NAMESPACE_BYTES, |size| size.get_ref().0.min(NAMESPACE_BYTES));
        namespace.size = Some(Spanned::new(0..0, Size(bytes)));
        (namespace.backing, namespace.path) = (BackingKind::Memory, None);
    }
    subsystem
}

/// Everything that is polled.
struct Watch {
    /// SUBSYSTEM:CNTLID of the controller that is watched.
    name: String,
    clock: Clock,
    machine: Machine,
    mmc: Driver,
    guest: Guest,
    handle: GuestHandle,
    queue: Option<CdqOwner>,
    slots: u64,
    taken: u64,
    started: Time,
    batch: Vec<u8>,
}

impl Watch {
    /// Brings everything up and starts to log.
    fn start(config: &Config) -> miette::Result<Self> {
        let from = config.file.migration.from.get_ref();
        let source = config.subsystem(from).ok_or_else(|| miette!("no subsystem \"{from}\""))?;
        let source = in_memory(source);
        let machine = assembly::machine(config, &source)?;
        let (cntlid, nsid) = watched(&source).ok_or_else(|| {
            miette!("\"{from}\" has no migratable controller with a namespace, so there is nothing to watch")
        })?;
        let name = format!("{from}:{cntlid}");
        let migratable = machine.migratable.iter().find(|m| m.cntlid == cntlid);
        let migratable = migratable.ok_or_else(|| miette!("{name}: the subsystem has no such controller"))?;
        let slot = Slot::new(AddressSpace::default(), migratable.io_queues.saturating_add(1)).into_diagnostic()?;
        slot.point_at(&migratable.plug);
        let driver = |slot: &Slot| Driver::new(slot.function(), DriverConfig::default()).into_diagnostic();
        let (guest, handle) = guest(config, &source, nsid, driver(&slot)?)?;
        let mmc = driver(&machine.management.1)?;
        let slots = config.file.migration.cdq_slots;
        let clock = Clock::new();
        let mut watch = Self {
            name,
            clock,
            machine,
            mmc,
            guest,
            handle,
            queue: None,
            slots: slots.into(),
            taken: 0,
            started: clock.now(),
            batch: Vec::with_capacity(BATCH * UDMQ_ENTRY_BYTES),
        };
        watch.until("the management controller", |watch, _| watch.mmc.is_ready().then_some(()))?;
        watch.create(cntlid, slots)?;
        watch.started = watch.clock.now();
        watch.track(true)?;
        Ok(watch)
    }

    fn create(&mut self, cntlid: u16, slots: u32) -> miette::Result<()> {
        let kind = QueueType::UDMQ.into_bits();
        let config = CdqConfig { kind, cntlid, slots, format: CdqFormat::UDMQ, arm_trigger: true };
        let now = self.clock.now();
        self.queue = Some(CdqOwner::create(&mut self.mmc, now, config).into_diagnostic()?);
        let live = self.until("creating the queue", |watch, _| match watch.queue.as_ref().map(CdqOwner::state) {
            Some(CdqState::Live { .. }) => Some(Ok(())),
            Some(CdqState::Gone(reason)) => Some(Err(reason)),
            _ => None,
        })?;
        live.map_err(|reason| miette!("{}: no controller data queue: {reason:?}", self.name))
    }

    /// Starts or stops logging.
    fn track(&mut self, start: bool) -> miette::Result<()> {
        let id = self.queue.as_ref().and_then(CdqOwner::id).ok_or_else(|| miette!("the queue is gone"))?;
        let what = if start { "Track Send, start" } else { "Track Send, stop" };
        let mut query: Option<Query<()>> = None;
        let answer = self.until(what, |watch, now| match &query {
            Some(query) => query.poll(&mut watch.mmc),
            None => match mmc::track_log(&mut watch.mmc, now, id, start) {
                Ok(sent) => {
                    query = Some(sent);
                    None
                }
                Err(SubmitError::Full) => None,
                Err(error) => Some(Err(error.into())),
            },
        })?;
        answer.into_diagnostic()
    }

    /// Polls everything once; sleeps a little if nothing had anything to do.
    fn poll(&mut self) -> miette::Result<Time> {
        let now = self.clock.now();
        let mut progress = self.machine.subsystem.poll(now).and(self.mmc.poll(now)).and(self.guest.poll(now));
        if let Some(queue) = &mut self.queue {
            progress = progress.and(queue.poll(&mut self.mmc, now));
            while let Some(event) = self.mmc.next_event() {
                queue.on_event(&event);
            }
        }
        if let DriverState::Failed(error) = self.mmc.state() {
            return Err(miette!("the management controller: {error}"));
        }
        if let Some(error) = self.handle.first_error() {
            return Err(miette!("the guest: {error}"));
        }
        if progress.work == 0 {
            std::thread::sleep(NAP);
        }
        Ok(now)
    }

    fn until<T>(&mut self, what: &str, mut step: impl FnMut(&mut Self, Time) -> Option<T>) -> miette::Result<T> {
        let deadline = self.clock.now().after_ms(PATIENCE_MS);
        loop {
            let now = self.poll()?;
            if let Some(found) = step(self, now) {
                return Ok(found);
            }
            if now >= deadline {
                return Err(miette!("{what}: not done after {PATIENCE_MS} ms"));
            }
        }
    }

    /// Polls once and shows what has arrived. After an entry that says that the queue was full logging starts again.
    fn show<W: Write>(&mut self, screen: &mut Screen<W>) -> miette::Result<()> {
        let now = self.poll()?;
        if self.take(now, screen)? == Some(Esa::FULL) {
            self.track(false)?;
            self.track(true)?;
        }
        Ok(())
    }

    /// Takes what has arrived, shows it and gives it back; the last end mark among it.
    fn take<W: Write>(&mut self, now: Time, screen: &mut Screen<W>) -> miette::Result<Option<Esa>> {
        let Some(queue) = &mut self.queue else { return Ok(None) };
        self.batch.clear();
        let count = queue.take(BATCH, &mut self.batch);
        if count == 0 {
            return Ok(None);
        }
        let mut last = None;
        for bytes in self.batch.chunks_exact(UDMQ_ENTRY_BYTES) {
            let Ok(entry) = UdmqEntry::read_from_bytes(bytes) else { continue };
            let ms = now.ns_since(self.started) as f64 / 1e6;
            screen.show(&Seen { ms, slot: self.taken % self.slots, entry }).into_diagnostic()?;
            self.taken += 1;
            last = Some(entry.esa()).filter(|esa| esa.is_last()).or(last);
        }
        screen.flush().into_diagnostic()?;
        queue.give_back(&mut self.mmc, now, count as u32).into_diagnostic()?;
        Ok(last)
    }

    /// Stops logging, drains the queue, deletes it and shuts everything down.
    fn end<W: Write>(&mut self, screen: &mut Screen<W>) -> miette::Result<()> {
        self.track(false)?;
        let drained = self.until("draining the queue", |watch, now| match watch.take(now, screen) {
            Ok(Some(_)) => Some(Ok(())),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        })?;
        drained?;
        self.handle.stop();
        self.until("stopping the guest", |watch, _| watch.handle.is_over().then_some(()))?;
        let now = self.clock.now();
        if let Some(queue) = &mut self.queue {
            queue.delete(&mut self.mmc, now);
        }
        self.until("deleting the queue", |watch, _| match watch.queue.as_ref().map(CdqOwner::state) {
            None | Some(CdqState::Gone(_)) => Some(()),
            _ => None,
        })?;
        let now = self.clock.now();
        self.mmc.shutdown(now);
        self.until("shutting down", |watch, _| (*watch.mmc.state() == DriverState::Stopped).then_some(()))
    }
}

/// CNTLID of the first migratable controller that has a namespace, and the NSID.
fn watched(subsystem: &Subsystem) -> Option<(u16, u32)> {
    let migratable = subsystem.controllers.iter().filter(|c| c.role == crate::config::Role::Migratable);
    migratable.filter_map(|c| Some((*c.cntlid.get_ref(), *c.namespaces.first()?.get_ref()))).next()
}

/// The demo's guest, writing anywhere in the namespace.
fn guest(config: &Config, source: &Subsystem, nsid: u32, driver: Driver) -> miette::Result<(Guest, GuestHandle)> {
    let namespace = source.namespaces.iter().find(|namespace| *namespace.nsid.get_ref() == nsid);
    let bytes = namespace.and_then(|n| n.size.as_ref()).map_or(0, |size| size.get_ref().0);
    let spec = LedgerSpec { seed: GUEST.1, guest: GUEST.0, blocks: (0..bytes / BLOCK_BYTES as u64).collect() };
    let ledger = Ledger::in_memory(&spec).into_diagnostic()?;
    let file = &config.file.guest;
    let settings = GuestConfig {
        nsid,
        rate: file.writes_per_second,
        read_percent: file.read_percent,
        depth: file.queue_depth,
        ..GuestConfig::default()
    };
    Guest::new(driver, settings, Arc::new(ledger)).into_diagnostic()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(entry: UdmqEntry) -> Seen {
        Seen { ms: 1.2345, slot: 8191, entry: entry.with_phase(true) }
    }

    #[test]
    fn entries_are_decoded_under_their_headings() {
        let line = seen(UdmqEntry::range(1, 4096, 7, true)).text(false);
        assert_eq!(line, "     1.234   8191 1  ordinary              1         4096          8  deallocated");
        for (title, value) in [("NSID", "1"), ("SLBA", "4096"), ("BLOCKS", "8")] {
            let end = HEADING.find(title).expect("a heading") + title.len();
            assert!(line[..end].ends_with(value), "{title}\n{HEADING}\n{line}");
        }
        let marker = seen(UdmqEntry::marker(Esa::SUSPENDED)).text(true);
        assert!(marker.contains("last, suspended") && marker.ends_with("87"), "{marker}");
    }

    #[test]
    fn json_has_names_and_bytes() {
        let json = seen(UdmqEntry::range(1, 9, 0, false)).json();
        assert_eq!((&json["slba"], &json["blocks"], &json["esa"]), (&9.into(), &1.into(), &"ordinary".into()));
        assert_eq!(json["raw"].as_str().map(str::len), Some(64));
        let json = seen(UdmqEntry::whole_namespace(4)).json();
        assert_eq!((&json["lbacir"], &json["nsid"], &json["slba"]), (&"namespace".into(), &4.into(), &Value::Null));
    }

    /// Fails as a pipe does whose reader has gone.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_goes_away_ends_it_quietly() {
        let mut screen = Screen::new(Gone, Form { as_json: false, raw: false }, 0);
        assert!(screen.show(&seen(UdmqEntry::marker(Esa::FIRST))).is_ok() && !screen.is_done());
        assert!(screen.flush().is_ok() && screen.is_done());
        assert!(screen.finish().is_ok());
    }

    #[test]
    fn no_more_than_asked_for_is_shown() {
        let mut text = Vec::new();
        let mut screen = Screen::new(&mut text, Form { as_json: true, raw: false }, 2);
        for _ in 0..5 {
            assert!(screen.show(&seen(UdmqEntry::range(1, 0, 0, false))).is_ok());
        }
        assert!(screen.is_done() && screen.finish().is_ok());
        drop(screen);
        assert_eq!(String::from_utf8(text).expect("text").lines().count(), 2);
    }
}
