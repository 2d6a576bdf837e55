//! What all states of a migration work on, and what stands that an undo has to take back.

use crate::calls::Calls;
use crate::config::MigrationConfig;
use crate::copy::Engine;
use crate::departure::Departure;
use crate::extents::Extents;
use crate::hand_over::HandOver;
use crate::hooks::{Hooks, JournalError, Owner, Record, RecordPhase};
use crate::media::Media;
use crate::media_move::Way;
use crate::mmc::Mmc;
use crate::pump::{Pump, PumpStats};
use crate::report::Report;
use dray_device::planted::{self, Fault};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::feature::FeatureId;
use dray_policy::packed::REGION_BYTES;
use dray_policy::role::{Cdq, Copy, Tracking};
use dray_policy::seam::{Seat, Setup};

/// The seats of the three roles. A queue without a seat of its own is drained by the host.
pub struct Policies {
    /// One per migratable controller, in the order of [`MigrationConfig::controllers`].
    pub cdq: Vec<Box<dyn Seat<Cdq>>>,
    /// How change is tracked.
    pub tracking: Box<dyn Seat<Tracking>>,
    /// In which order the media is copied.
    pub copy: Box<dyn Seat<Copy>>,
}

impl std::fmt::Debug for Policies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policies").field("cdq", &self.cdq.len()).finish_non_exhaustive()
    }
}

/// Formats of the controller state that both sides know: 1-based indexes (0 = none).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Formats {
    pub(crate) source: (u8, u8),
    pub(crate) destination: (u8, u8),
}

/// What stands and has to be taken back by an undo, in the reverse order. Set before the step that makes it stand is begun,
/// so that a step of unknown outcome is taken back too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footing {
    /// A record of this migration has been written.
    pub(crate) recorded: bool,
    /// Suspend was sent to the source's controllers.
    pub(crate) suspended: bool,
    /// The fence is up.
    pub(crate) fenced: bool,
    /// The namespaces may be detached from the source's controllers (departure).
    pub(crate) detached: bool,
    /// The "moved" record may be durable.
    pub(crate) moved: bool,
    /// The slots point at the destination.
    pub(crate) pointed: bool,
    /// Backings may have been exchanged for their copies (media move).
    pub(crate) exchanged: bool,
    /// Resume was sent to the controllers that serve after the move: there may be no way back.
    pub(crate) resumed: bool,
    /// The log has a hole: tracking has to be started anew and everything copied again.
    pub(crate) hole: bool,
}

/// What steps cost of late, µs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    pub(crate) flush_us: u64,
    pub(crate) journal_us: u64,
    pub(crate) admin_us: u64,
}

/// A queue that is drained.
#[derive(Debug)]
pub(crate) struct Tap {
    pub(crate) key: usize,
    pub(crate) cntlid: u16,
    pub(crate) slots: u32,
    pub(crate) pump: Option<Pump>,
}

/// Whether the log of a queue has ended although it must not.
pub(crate) fn has_hole(tap: &Tap) -> bool {
    tap.pump.as_ref().is_some_and(Pump::has_hole)
}

/// Everything that the states share.
pub(crate) struct Parts {
    pub(crate) config: MigrationConfig,
    pub(crate) source: Box<dyn Mmc>,
    pub(crate) destination: Box<dyn Mmc>,
    pub(crate) way: Way,
    pub(crate) engine: Engine,
    pub(crate) media: Media,
    pub(crate) extents: Extents,
    /// The engine may start new copies.
    pub(crate) copying: bool,
    pub(crate) taps: Vec<Tap>,
    pub(crate) policies: Policies,
    pub(crate) hooks: Hooks,
    pub(crate) formats: Formats,
    pub(crate) footing: Footing,
    pub(crate) costs: Costs,
    pub(crate) report: Report,
    pub(crate) began: Time,
    pub(crate) epoch: u64,
    /// Suspend of the source's controllers, as long as it is not answered: what is undone meanwhile must wait for it, or it
    /// would suspend a controller that nobody resumes.
    pub(crate) suspends: Option<Calls>,
    /// A record is being written: no other may be begun.
    pub(crate) writing: bool,
    /// Why the drive's reports are a hint only; everything is compared then.
    pub(crate) hint: Option<String>,
    pub(crate) throttle: Throttle,
    pub(crate) late_plans: u64,
    pub(crate) late_orders: u64,
    pub(crate) added_blocks: u64,
    /// Counts of pumps that were replaced.
    pub(crate) past_pumps: PumpStats,
    /// Why a queue has gone.
    pub(crate) lost_queue: Option<String>,
}

/// The guest's limit, as it was last asked for.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    /// Commands per second; 0 = none.
    pub(crate) limit: u32,
    wanted: u32,
    calls: Option<Calls>,
    /// The controller does not know the feature.
    pub(crate) refused: bool,
}

impl Parts {
    /// Migratable controllers at the source.
    pub(crate) fn sources(&self) -> Vec<u16> {
        self.config.controllers.iter().map(|pair| pair.0).collect()
    }

    /// Migratable controllers at the destination; none in a media move, or a departure.
    pub(crate) fn destinations(&self) -> Vec<u16> {
        if self.has_destination() { self.config.controllers.iter().map(|pair| pair.1).collect() } else { Vec::new() }
    }

    /// There are controllers at the destination, which take the source's states.
    pub(crate) fn has_destination(&self) -> bool {
        matches!(self.way, Way::Controller | Way::HandOver(_))
    }

    /// The controllers leave, and nobody here takes them over.
    pub(crate) fn departure(&mut self) -> Option<&mut Departure> {
        match &mut self.way {
            Way::Departure(departure) => Some(departure),
            Way::Controller | Way::Media(_) | Way::HandOver(_) => None,
        }
    }

    /// The controllers stay before their guests.
    pub(crate) fn is_media_move(&self) -> bool {
        matches!(self.way, Way::Media(_))
    }

    /// Where the VM managers of a hand-over are met.
    pub(crate) fn hand_over(&self) -> Option<&HandOver> {
        match &self.way {
            Way::HandOver(hand_over) => Some(hand_over),
            Way::Controller | Way::Media(_) | Way::Departure(_) => None,
        }
    }

    /// The end whose controllers serve after the move.
    pub(crate) fn successor(&self) -> Owner {
        if self.is_media_move() { Owner::Source } else { Owner::Destination }
    }

    /// Those controllers.
    pub(crate) fn successors(&self) -> Vec<u16> {
        if self.is_media_move() { self.sources() } else { self.destinations() }
    }

    /// The management controller that resumes them, and the format that they tell their state in.
    pub(crate) fn successors_manager(&mut self) -> (&mut dyn Mmc, (u8, u8)) {
        match self.successor() {
            Owner::Source => (self.source.as_mut(), self.formats.source),
            Owner::Destination => (self.destination.as_mut(), self.formats.destination),
        }
    }

    /// The set-up that policies are opened with.
    pub(crate) fn setup(&self, now: Time, settings: &[(String, String)]) -> Setup {
        Setup {
            migration: self.config.id,
            seed: self.config.seed,
            now_us: now.us_since(self.began),
            namespaces: self.media.infos(),
            regions: self.media.regions() as u32,
            region_bytes: REGION_BYTES as u32,
            settings: settings.to_vec(),
        }
    }

    /// Begins to write a record.
    pub(crate) fn record(&mut self, owner: Owner, phase: RecordPhase, fenced: bool) {
        self.epoch += 1;
        self.footing.recorded = true;
        self.writing = true;
        let ([from, to], migration) = (self.config.ends, self.config.id);
        self.hooks.journal.write(&Record { migration, from, to, epoch: self.epoch, owner, phase, fenced });
    }

    /// How the record that is being written has ended; `None` while it has not, or when there is none.
    pub(crate) fn recorded(&mut self) -> Option<Result<(), JournalError>> {
        let ended = self.hooks.journal.poll()?;
        self.writing = false;
        Some(ended)
    }

    /// Drains every queue a bounded amount. Returns entries given back.
    pub(crate) fn drain(&mut self, now: Time) -> u32 {
        let mut work = 0;
        if self.overlooks_entries() {
            return work;
        }
        for (index, tap) in self.taps.iter_mut().enumerate() {
            let Some(pump) = &mut tap.pump else { continue };
            let mut seat: Option<&mut Box<dyn Seat<Cdq>>> = self.policies.cdq.get_mut(index);
            let media = &mut self.media;
            let mut result = Ok(0);
            self.source.with_queue(tap.key, &mut |queue| {
                let seat = seat.as_mut().map(|seat| seat.as_mut() as &mut dyn Seat<Cdq>);
                result = pump.poll(now, queue, seat, media);
            });
            match result {
                Ok(entries) => work += entries,
                Err(error) => self.lost_queue = Some(error.to_string()),
            }
        }
        work
    }

    /// What waits in the queues after Suspend is not looked at: never (rule 7).
    pub(crate) fn overlooks_entries(&self) -> bool {
        planted::on(Fault::SwitchWithEntryWaiting) && self.footing.suspended
    }

    /// Whether a queue shows nothing new and its policy has nothing that the map lacks.
    pub(crate) fn is_drained(&mut self, index: usize) -> bool {
        let Some(tap) = self.taps.get(index) else { return true };
        let settled = tap.pump.as_ref().is_none_or(Pump::is_settled);
        let mut waiting = 0;
        self.source.with_queue(tap.key, &mut |queue| waiting = queue.waiting());
        settled && waiting == 0 || self.overlooks_entries()
    }

    /// What a switch-over now would cost the guest, µs.
    pub(crate) fn estimate_us(&self, dirtied_per_s: u64) -> u32 {
        let rate = u128::from(self.engine.rate().unwrap_or(1 << 30).max(1 << 20));
        let in_flight = self.engine.in_flight_blocks() * self.media.block_bytes();
        let meanwhile = u128::from(dirtied_per_s) * u128::from(self.media.block_bytes()) * u128::from(self.costs.flush_us) / 1_000_000;
        let bytes = u128::from(self.media.dirty_bytes()) + u128::from(in_flight) + meanwhile;
        let copy_us = bytes * 1_000_000 / rate;
        let fixed = self.costs.flush_us + self.costs.journal_us + 6 * self.costs.admin_us;
        u32::try_from(copy_us.saturating_add(u128::from(fixed))).unwrap_or(u32::MAX)
    }

    /// Limits the guest's commands per second (0 = none), if the configuration allows it.
    pub(crate) fn limit_guest(&mut self, limit: u32) {
        if self.config.may_throttle && !self.throttle.refused {
            self.throttle.wanted = limit;
        }
    }

    /// Sends a changed limit; true when none is under way.
    pub(crate) fn settle_throttle(&mut self, now: Time) -> bool {
        if let Some(calls) = &mut self.throttle.calls {
            if !calls.poll(now, self.source.as_mut()) {
                return false;
            }
            self.throttle.refused |= calls.failure().is_some_and(|answer| !answer.unknown);
            self.throttle.calls = None;
        }
        if self.throttle.wanted == self.throttle.limit || self.throttle.refused {
            return true;
        }
        self.throttle.limit = self.throttle.wanted;
        let sources = self.sources();
        // A share of the limit for each controller, at least one command, since 0 is no limit.
        let share = match self.throttle.limit {
            0 => 0,
            limit => (limit / sources.len().max(1) as u32).max(1),
        };
        let entry = |cntlid: &u16| {
            let mut entry = SubmissionEntry::set_features(FeatureId::VENDOR_GUEST_LIMIT, u32::from(*cntlid), false);
            entry.cdw12 = share;
            entry
        };
        self.throttle.calls = Some(Calls::plain(sources.iter().map(entry)));
        false
    }

    /// Fills the report with what is counted elsewhere.
    pub(crate) fn fill_report(&mut self, now: Time) {
        let stats = *self.engine.stats();
        let report = &mut self.report;
        (report.retries, report.checksums) = (stats.retries, stats.checksums);
        (report.copied_bytes, report.zero_bytes) = (stats.copied, stats.zero);
        (report.compared_bytes, report.different_blocks) = (stats.compared, stats.different_blocks);
        report.uncorrectable = self.engine.uncorrectable().to_vec();
        report.uncorrectable.sort_unstable_by_key(|block| (block.nsid, block.lba));
        report.duration_us = now.us_since(self.began);
        report.pump = self.past_pumps;
        for pump in self.taps.iter().filter_map(|tap| tap.pump.as_ref()) {
            report.pump.add(&pump.stats());
        }
        report.hint_only.clone_from(&self.hint);
        report.policies.clear();
        let mut push = |name, identity, stats, omissions, late| {
            report.policies.push((name, crate::report::PolicyReport { identity, stats, omissions, late }));
        };
        for seat in &self.policies.cdq {
            push("cdq", seat.identity(), seat.stats(), report.pump.omitted_blocks, report.pump.late);
        }
        push("tracking", self.policies.tracking.identity(), self.policies.tracking.stats(), 0, self.late_plans);
        push("copy", self.policies.copy.identity(), self.policies.copy.stats(), self.added_blocks, self.late_orders);
    }
}
