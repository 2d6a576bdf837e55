//! Copying: rounds of what is dirty, planned by the tracking policy, ordered by the copy policy, completed by the host.
//!
//! A round ends when each region that was dirty and not held has been passed; then the destination flushes (rule 3). What the
//! copy policy leaves out for longer than the host's patience, the host adds. When a queue was full, tracking is started anew
//! and a full round follows (rule 8, [`crate::relog`]).

use crate::extents::Piece;
use crate::hooks::{GuestSample, Owner, RecordPhase};
use crate::media::{Media, since_ms};
use crate::parts::{Parts, has_hole};
use crate::reason::Reason;
use crate::relog::Relog;
use crate::report::{ProgressView, Round};
use crate::state::{State, Turn};
use crate::switch::Switch;
use dray_device::poll::Time;
use dray_policy::role::{Copy, RoundReport, Then, Tracking};
use dray_policy::seam::Exchange;

/// Time between two rounds that begin while a switch-over would be within the budget: there is nothing to hurry for.
const CALM_US: u64 = 100_000;

/// Where a round stands.
#[derive(Debug)]
enum Stage {
    /// The tracking policy is asked.
    Plan { since: Time, asked: bool },
    /// Copying.
    Run,
    /// No new copies; those under way end.
    Settle,
    /// The destination flushes; `look`: only to see what that costs by now.
    Flush { since: Time, look: bool },
    /// Between two rounds.
    Pause { since: Time },
    /// Tracking is started anew.
    Relog(Relog),
}

/// The copy policy's side.
#[derive(Debug)]
struct Orders {
    spare: Option<Box<Exchange<Copy>>>,
    ask_at: Time,
    when_done: bool,
    /// The question that is out was put before this round began: its answer knows nothing of what is dirty now.
    of_before: bool,
    asked_at: Time,
    copied_then: u64,
    dirtied_then: u64,
    wish: bool,
    guest_limit: u32,
    bytes_per_s: u64,
}

/// The copying state.
#[derive(Debug)]
pub(crate) struct Rounds {
    stage: Stage,
    number: u32,
    full: bool,
    /// The full round has ended and nothing has undone that.
    complete: bool,
    began: Time,
    start_blocks: u64,
    start: (u64, u64, u64),
    last: Option<RoundReport>,
    plan: Option<Box<Exchange<Tracking>>>,
    orders: Orders,
    /// Since when nothing that was ordered has passed another region, and how many are left.
    idle: Option<Time>,
    unpassed: usize,
    guest: GuestSample,
    dirtied_per_s: u64,
    copied_per_s: u64,
    host_limit: u32,
    cut_at: Time,
    give_up_at: Option<Time>,
    /// How often logging was found stopped although nobody had asked for that.
    stops: u32,
    /// A record is written again, to see what the one of the switch-over will cost.
    probe: Option<Time>,
}

impl Rounds {
    /// The first, full round.
    pub(crate) fn new(now: Time) -> Self {
        let orders = Orders {
            spare: Some(Box::default()),
            ask_at: now,
            when_done: true,
            of_before: false,
            asked_at: now,
            copied_then: 0,
            dirtied_then: 0,
            wish: false,
            guest_limit: 0,
            bytes_per_s: 0,
        };
        Self {
            stage: Stage::Plan { since: now, asked: false },
            number: 0,
            full: true,
            complete: false,
            began: now,
            start_blocks: 0,
            start: (0, 0, 0),
            last: None,
            plan: Some(Box::default()),
            orders,
            idle: None,
            unpassed: usize::MAX,
            guest: GuestSample::default(),
            dirtied_per_s: 0,
            copied_per_s: 0,
            host_limit: 0,
            cut_at: now,
            give_up_at: None,
            stops: 0,
            probe: None,
        }
    }

    /// Copying again, after an attempt at the switch-over was undone. `hole`: the log is not complete.
    pub(crate) fn resume(mut self, now: Time, hole: bool) -> Self {
        self.orders.wish = false;
        self.orders.ask_at = now;
        self.stage = if hole { Stage::Relog(Relog::new(true)) } else { Stage::Pause { since: now } };
        self
    }

    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Turn {
        self.take_orders(parts, now);
        parts.settle_throttle(now);
        if let Some(turn) = self.probed(parts, now) {
            return turn;
        }
        if !matches!(self.stage, Stage::Relog(_)) && parts.taps.iter().any(has_hole) {
            if !parts.taps.iter().any(|tap| tap.pump.as_ref().is_some_and(|pump| pump.marks().full)) {
                // No queue is too small, so a larger one or a slower guest would not help: only how often counts.
                self.stops += 1;
                if self.stops > parts.config.limits.max_fills {
                    return Turn::Back(Reason::Source(format!("logging was stopped {} times although nobody had asked for it", self.stops)));
                }
            }
            self.stage = Stage::Relog(Relog::new(false));
        }
        if !matches!(self.stage, Stage::Relog(_))
            && let Some(turn) = self.decide(parts, now)
        {
            return turn;
        }
        match &mut self.stage {
            Stage::Plan { .. } => self.plan(parts, now),
            Stage::Run => self.run(parts, now),
            Stage::Settle => {
                parts.copying = false;
                if parts.engine.in_flight() == 0 {
                    self.probe(parts, now);
                    parts.engine.flush();
                    self.stage = Stage::Flush { since: now, look: false };
                }
            }
            Stage::Flush { since, look } => {
                let (since, look) = (*since, *look);
                if let Some(turn) = self.flushed(since, look, parts, now) {
                    return turn;
                }
            }
            Stage::Pause { since } => {
                let since = *since;
                self.pause(since, parts, now);
            }
            Stage::Relog(relog) => {
                parts.copying = false;
                match relog.poll(parts, now) {
                    Ok(false) => {}
                    Ok(true) => self.start_over(parts, now),
                    Err(reason) => return Turn::Back(reason),
                }
            }
        }
        Turn::Stay
    }

    /// What the record of the switch-over costs is known from one that was written. If that was dear, it is worth another look:
    /// a disk that was busy then must not keep a migration from converging.
    fn probe(&mut self, parts: &mut Parts, now: Time) {
        // Whoever waits for a VM manager to pause the guest does not need to know.
        let waits = parts.hand_over().is_some();
        if self.probe.is_none() && !waits && parts.costs.journal_us >= u64::from(parts.config.limits.downtime_budget_us) / 4 {
            parts.record(Owner::Source, RecordPhase::Copying, false);
            self.probe = Some(now);
        }
    }

    fn probed(&mut self, parts: &mut Parts, now: Time) -> Option<Turn> {
        let since = self.probe?;
        match parts.recorded() {
            Some(Ok(())) => parts.costs.journal_us = now.us_since(since),
            Some(Err(error)) => return Some(Turn::Back(Reason::Journal(error.to_string()))),
            None if now.us_since(since) / 1000 >= parts.config.limits.step_ms => {
                return Some(Turn::Back(Reason::Journal("a record was not written in time".into())));
            }
            None => return None,
        }
        self.probe = None;
        None
    }

    /// Everything is copied again: the log had a hole, but has none from here on.
    fn start_over(&mut self, parts: &mut Parts, now: Time) {
        parts.media.mark_everything();
        parts.media.open_first_copies();
        (self.full, self.complete) = (true, false);
        if self.last.is_some() || self.number > 0 {
            self.number += 1;
        }
        self.stage = Stage::Plan { since: now, asked: false };
    }

    /// Whether to switch over, or what to do at the host's own limits.
    fn decide(&mut self, parts: &mut Parts, now: Time) -> Option<Turn> {
        let limits = parts.config.limits;
        // A destination that is coming back gets what it lost in a round, not while the guest waits.
        if self.probe.is_some() || parts.engine.destination().is_dead() {
            return None;
        }
        let over = self.number >= limits.max_rounds || now.us_since(parts.began) / 1000 >= limits.max_time_ms;
        // A VM manager decides for itself, and the guest's pause is its own.
        if let Some(hand_over) = parts.hand_over() {
            return hand_over.wants_pause().then(|| self.switch_over(parts, now));
        }
        if !(self.complete && self.orders.wish || over) {
            return None;
        }
        let estimate_us = parts.estimate_us(self.dirtied_per_s);
        let within = self.complete && estimate_us <= limits.downtime_budget_us;
        if within && (self.orders.wish || over) {
            return Some(self.switch_over(parts, now));
        }
        let may_cut = parts.config.may_throttle && !parts.throttle.refused;
        if !over {
            return None;
        }
        if may_cut && self.complete && self.cut_guest(parts, now) {
            return None;
        }
        // A last time for what the throttle, or a round under way, achieves.
        let give_up_at = *self.give_up_at.get_or_insert(now.after_us(if may_cut { 2_000 * limits.throttle_ms } else { 0 }));
        let reason = Reason::NotConverging { estimate_us, budget_us: limits.downtime_budget_us };
        (now >= give_up_at).then_some(Turn::Back(reason))
    }

    /// Halves the guest's rate; false at the floor.
    fn cut_guest(&mut self, parts: &mut Parts, now: Time) -> bool {
        if now < self.cut_at {
            return true;
        }
        let current = if parts.throttle.limit == 0 { self.guest.iops } else { parts.throttle.limit };
        let limit = (current / 2).max(parts.config.limits.guest_floor.max(1));
        if parts.throttle.limit != 0 && limit >= parts.throttle.limit {
            return false;
        }
        self.cut_at = now.after_us(1_000 * parts.config.limits.throttle_ms);
        self.host_limit = limit;
        parts.limit_guest(limit);
        true
    }

    fn switch_over(&mut self, parts: &mut Parts, now: Time) -> Turn {
        if let Some(why) = &parts.hint {
            let rate = parts.engine.rate().unwrap_or(1 << 30).max(1);
            let estimate_us = u64::try_from(u128::from(parts.media.bytes()) * 1_000_000 / u128::from(rate)).unwrap_or(u64::MAX);
            let allowed_us = parts.config.limits.compare_budget_us;
            if estimate_us > allowed_us {
                return Turn::Back(Reason::CompareTooLong { why: why.clone(), estimate_us, allowed_us });
            }
        }
        let rounds = std::mem::replace(self, Self::new(now));
        Turn::Next(State::SwitchingOver(Box::new(Switch::new(rounds, now))))
    }

    fn plan(&mut self, parts: &mut Parts, now: Time) {
        let Stage::Plan { since, asked } = &mut self.stage else { return };
        if !*asked && parts.media.is_filling() {
            *since = now;
            return;
        }
        if !*asked
            && let Some(mut exchange) = self.plan.take()
        {
            parts.copying = false;
            exchange.request.now_us = now.us_since(parts.began);
            exchange.request.last = self.last;
            exchange.request.regions.clear();
            parts.media.pack(since_ms(parts.began, now), &mut exchange.request.regions);
            parts.policies.tracking.ask(exchange);
        }
        *asked = true;
        let patience = now.us_since(*since) >= parts.config.limits.patience_us;
        match parts.policies.tracking.poll() {
            Some(exchange) => {
                parts.media.plan(&exchange.answer.choices);
                self.plan = Some(exchange);
            }
            None if patience => {
                // No plan: nothing is held, chunks are as large as they can be.
                parts.media.plan(&[]);
                parts.late_plans += 1;
            }
            None => return,
        }
        self.begin(parts, now);
    }

    fn begin(&mut self, parts: &mut Parts, now: Time) {
        parts.media.begin_round();
        if parts.media.held_blocks() >= parts.media.dirty_blocks() {
            parts.media.release_held();
        }
        let stats = parts.engine.stats();
        self.began = now;
        self.start = (stats.copied, stats.zero, parts.media.dirtied_blocks());
        self.start_blocks = parts.media.dirty_blocks();
        self.orders.ask_at = now;
        self.orders.of_before = self.orders.spare.is_none();
        (self.idle, self.unpassed) = (None, usize::MAX);
        parts.extents.by_order();
        parts.copying = true;
        self.stage = Stage::Run;
    }

    fn run(&mut self, parts: &mut Parts, now: Time) {
        parts.copying = true;
        let patience_us = parts.config.limits.patience_us;
        let asked = self.orders.spare.is_none();
        // A policy that does not answer holds no round up.
        let late = asked && now.us_since(self.orders.asked_at.max(self.began)) >= patience_us;
        let heard = late || self.orders.asked_at >= self.began && !asked;
        let empty = parts.extents.queued() == 0;
        if empty && parts.media.all_passed() && (parts.media.is_clean() || heard) {
            parts.extents.by_order();
            self.stage = Stage::Settle;
            return;
        }
        if empty {
            // What counts is that regions are passed: a policy that orders the same ones over and over again leaves out the rest.
            let unpassed = unpassed(&parts.media);
            if unpassed < self.unpassed {
                self.idle = None;
            }
            self.unpassed = unpassed;
            self.idle.get_or_insert(now);
        }
        let copied = (parts.engine.stats().copied - self.start.0) / parts.media.block_bytes();
        let astray = copied > self.start_blocks.saturating_mul(3) + 65_536;
        let waited = empty && self.idle.is_some_and(|since| now.us_since(since) >= patience_us);
        if astray || waited {
            self.add_left_out(parts);
        }
    }

    /// What the copy policy has left out for too long is added by the host.
    fn add_left_out(&mut self, parts: &mut Parts) {
        parts.extents.by_order();
        // A policy that has not answered yet has left nothing out.
        let late = self.orders.spare.is_none();
        parts.late_orders += u64::from(late);
        let mut cursor = (0, 0);
        while let Some((namespace, slba, blocks)) = parts.media.next_unpassed(&mut cursor) {
            let dirty = parts.media.namespaces()[namespace].dirty_within(slba, blocks);
            if !parts.extents.push(Piece { namespace, slba, blocks }) {
                break;
            }
            parts.added_blocks += if late { 0 } else { dirty };
        }
        self.idle = None;
    }

    fn flushed(&mut self, since: Time, look: bool, parts: &mut Parts, now: Time) -> Option<Turn> {
        if !parts.engine.is_flushed() {
            return None;
        }
        if let Some(status) = parts.engine.take_flush_failure() {
            if parts.engine.destination().is_dead() || parts.engine.stats().restarts > 0 {
                // The destination restarts: what it had not flushed is dirty again and makes another round.
                self.stage = Stage::Plan { since: now, asked: false };
                return None;
            }
            return Some(Turn::Back(crate::copy::CopyError::Flush(status).into()));
        }
        parts.costs.flush_us = now.us_since(since);
        if look {
            self.stage = Stage::Pause { since: now };
        } else {
            self.end_round(parts, now);
        }
        None
    }

    fn end_round(&mut self, parts: &mut Parts, now: Time) {
        let stats = parts.engine.stats();
        let block_bytes = parts.media.block_bytes();
        let (bytes, zero_bytes) = (stats.copied - self.start.0, stats.zero - self.start.1);
        let dirtied_blocks = parts.media.dirtied_blocks() - self.start.2;
        let duration_us = now.us_since(self.began);
        self.last = Some(RoundReport {
            number: self.number,
            duration_us,
            copied_blocks: bytes / block_bytes,
            zero_blocks: zero_bytes / block_bytes,
            dirtied_blocks,
        });
        parts.report.rounds.push(Round {
            number: self.number,
            bytes,
            zero_bytes,
            duration_us,
            dirtied_bytes: dirtied_blocks * block_bytes,
            full: self.full,
        });
        if self.full {
            parts.media.close_first_copies();
        }
        (self.full, self.complete) = (false, true);
        self.number += 1;
        self.stage = Stage::Pause { since: now };
    }

    /// The next round begins at once while a switch-over would cost too much, else after a while.
    fn pause(&mut self, since: Time, parts: &mut Parts, now: Time) {
        parts.copying = false;
        let calm = parts.estimate_us(self.dirtied_per_s) <= parts.config.limits.downtime_budget_us;
        let rested = now.us_since(since) >= if calm { CALM_US } else { 0 };
        if !parts.media.is_clean() && rested {
            self.stage = Stage::Plan { since: now, asked: false };
        } else if self.complete && !calm && now.us_since(since) >= CALM_US {
            // Nothing is left to copy, and yet a switch-over would cost too much: what flush and record cost was seen at a bad
            // moment, perhaps, and no round will come that shows them again.
            self.probe(parts, now);
            parts.engine.flush();
            self.stage = Stage::Flush { since: now, look: true };
        }
    }

    /// Takes the copy policy's answer and asks it again when it is time.
    fn take_orders(&mut self, parts: &mut Parts, now: Time) {
        if self.orders.spare.is_none()
            && let Some(exchange) = parts.policies.copy.poll()
        {
            self.obey(exchange, parts, now);
        }
        let running = matches!(self.stage, Stage::Run | Stage::Pause { .. });
        let due = now >= self.orders.ask_at || self.orders.when_done && parts.extents.queued() == 0;
        if running
            && due
            && let Some(exchange) = self.orders.spare.take()
        {
            self.ask(exchange, parts, now);
        }
    }

    fn obey(&mut self, exchange: Box<Exchange<Copy>>, parts: &mut Parts, now: Time) {
        let answer = &exchange.answer;
        if matches!(self.stage, Stage::Run) {
            parts.extents.order(&answer.extents, &parts.media);
        }
        let most = parts.config.max_bytes_per_s;
        self.orders.bytes_per_s = match (answer.bytes_per_s, most) {
            (0, limit) | (limit, 0) => limit,
            (policy, most) => policy.min(most),
        };
        parts.engine.limit(now, self.orders.bytes_per_s);
        self.orders.guest_limit = answer.guest_iops_limit;
        // The host's own throttle stands until the end; a policy can only be stricter.
        let limit = match (self.orders.guest_limit, self.host_limit) {
            (0, limit) | (limit, 0) => limit,
            (policy, host) => policy.min(host),
        };
        parts.limit_guest(limit);
        self.orders.wish = answer.then == Then::SwitchOver;
        self.orders.when_done = !answer.extents.is_empty();
        let wait_us = if answer.wait_us == 0 && answer.extents.is_empty() { 1000 } else { u64::from(answer.wait_us) };
        // "Look again later" said of the time between two rounds must not let a round pass without a question.
        let again = std::mem::take(&mut self.orders.of_before);
        self.orders.ask_at = if again { now } else if wait_us == 0 { Time::NEVER } else { now.after_us(wait_us) };
        self.orders.spare = Some(exchange);
    }

    fn ask(&mut self, mut exchange: Box<Exchange<Copy>>, parts: &mut Parts, now: Time) {
        let block_bytes = parts.media.block_bytes();
        let (copied, dirtied) = (parts.engine.stats().copied / block_bytes, parts.media.dirtied_blocks());
        let us = now.us_since(self.orders.asked_at);
        if us > 0 {
            let per_s = |blocks: u64| (u128::from(blocks) * 1_000_000 / u128::from(us)) as u64;
            self.copied_per_s = per_s(copied - self.orders.copied_then);
            self.dirtied_per_s = per_s(dirtied - self.orders.dirtied_then);
            (self.orders.copied_then, self.orders.dirtied_then, self.orders.asked_at) = (copied, dirtied, now);
        }
        self.guest = parts.hooks.guest.sample();
        let in_flight = parts.engine.in_flight_blocks();
        let dirty = parts.media.dirty_blocks();
        let elapsed_us = now.us_since(parts.began);
        let request = &mut exchange.request;
        request.now_us = elapsed_us;
        request.unix_s = parts.config.unix_s.saturating_add(i64::try_from(elapsed_us / 1_000_000).unwrap_or(i64::MAX));
        request.utc_offset_min = parts.config.utc_offset_min;
        request.round = self.number;
        request.left_blocks = dirty + in_flight;
        request.queued_blocks = in_flight + parts.extents.queued_blocks(&parts.media).min(dirty);
        (request.dirtied_per_s, request.copied_per_s) = (self.dirtied_per_s, self.copied_per_s);
        request.peer_us = (parts.engine.stats().write_ns / 1000).min(u64::from(u32::MAX)) as u32;
        (request.guest_p50_us, request.guest_p99_us) = (self.guest.p50_us, self.guest.p99_us);
        (request.guest_p99_before_us, request.guest_iops) = (self.guest.p99_before_us, self.guest.iops);
        request.downtime_estimate_us = parts.estimate_us(self.dirtied_per_s);
        request.downtime_budget_us = parts.config.limits.downtime_budget_us;
        request.may_throttle = parts.config.may_throttle && !parts.throttle.refused;
        request.regions.clear();
        parts.media.pack(since_ms(parts.began, now), &mut request.regions);
        self.orders.ask_at = Time::NEVER;
        self.orders.asked_at = now;
        parts.policies.copy.ask(exchange);
        if let Some(exchange) = parts.policies.copy.poll() {
            self.obey(exchange, parts, now);
        }
    }

    /// A look from outside.
    pub(crate) fn view(&self, parts: &Parts) -> ProgressView {
        let block_bytes = parts.media.block_bytes();
        let left_bytes = parts.media.dirty_bytes();
        let copied_per_s = self.copied_per_s.saturating_mul(block_bytes);
        ProgressView {
            phase: "copying",
            round: self.number,
            round_bytes: parts.engine.stats().copied - self.start.0,
            round_total: self.start_blocks * block_bytes,
            left_bytes,
            copied_per_s,
            dirtied_per_s: self.dirtied_per_s.saturating_mul(block_bytes),
            eta_us: left_bytes.saturating_mul(1_000_000).checked_div(copied_per_s).unwrap_or(0),
            downtime_estimate_us: parts.estimate_us(self.dirtied_per_s),
            guest_limit: parts.throttle.limit,
            elapsed_us: 0,
        }
    }
}

/// Regions that are left to be passed in this round.
fn unpassed(media: &Media) -> usize {
    let mut cursor = (0, 0);
    std::iter::from_fn(|| media.next_unpassed(&mut cursor)).count()
}
