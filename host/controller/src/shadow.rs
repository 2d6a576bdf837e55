//! Shadow doorbells (Doorbell Buffer Config, Base 2.3 §5.3.5): for guests whose doorbells are trapped, so that each costs a
//! message.
//!
//! The guest stores an I/O queue's doorbell in the shadow page, and writes the register only when the move steps over the event
//! index that the controller has stored. A controller that is being polled wants no register writes: its indices say so. One that has
//! had nothing to do for a while may not be polled again before something wakes the core: it stores the doorbells that it has
//! seen as indices, and looks once more, with a full barrier between; the guest does the same the other way round. The admin
//! queue's doorbells are always registers.

use crate::admin::AdminResult;
use crate::controller::Controller;
use crate::engine::Engine;
use crate::queue::{Cq, QueueMemory, Sq};
use dray_device::memory::PAGE;
use dray_device::poll::Time;
use dray_device::slot::Port;
use dray_device::space::SpaceReader;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::doorbell_buffer::{EVENT_INDEX_POLLING, cq_head_offset, sq_tail_offset};
use dray_nvme::status::Status;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// Microseconds without anything to do after which the guest is asked to write registers again.
const AWAKE_US: u64 = 50;

/// The two pages, in the guest's memory.
#[derive(Debug)]
pub(crate) struct ShadowPages {
    bells: QueueMemory,
    events: QueueMemory,
}

impl ShadowPages {
    /// # Errors
    /// Invalid Field unless they are two pages of the guest's memory that may be written.
    pub(crate) fn find(reader: &SpaceReader, [bells, events]: [u64; 2]) -> Result<Self, Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        if bells == events || !bells.is_multiple_of(PAGE as u64) || !events.is_multiple_of(PAGE as u64) {
            return Err(invalid);
        }
        let page = |iova| QueueMemory::find(reader, iova, PAGE, true).map_err(|_| invalid);
        Ok(Self { bells: page(bells)?, events: page(events)? })
    }

    /// Their I/O virtual addresses: shadow, event index.
    pub(crate) fn addresses(&self) -> [u64; 2] {
        [self.bells.iova, self.events.iova]
    }

    /// A doorbell as the guest has stored it. 511 queue pairs are the most there are, so every place lies within the page.
    #[inline]
    pub(crate) fn bell(&self, place: u32) -> u32 {
        let (arena, at) = self.bells.at(place as usize);
        arena.load32(at, Ordering::Acquire)
    }

    fn set_bell(&self, place: u32, value: u32) {
        let (arena, at) = self.bells.at(place as usize);
        arena.store32(at, value, Ordering::Release);
    }

    fn set_event(&self, place: u32, value: u32) {
        let (arena, at) = self.events.at(place as usize);
        arena.store32(at, value, Ordering::Release);
    }

    /// A queue gets its place, with the doorbell as it stands.
    pub(crate) fn join_sq(self: &Arc<Self>, sq: &mut Sq, bell: u32) {
        self.set_bell(sq_tail_offset(sq.qid, 0), bell);
        sq.shadow = Some(Arc::clone(self));
        sq.event = None;
        sq.tell(sq.tail);
    }

    /// See [`join_sq`](Self::join_sq).
    pub(crate) fn join_cq(self: &Arc<Self>, cq: &mut Cq, bell: u32) {
        self.set_bell(cq_head_offset(cq.qid, 0), bell);
        cq.shadow = Some(Arc::clone(self));
        cq.event = None;
        cq.tell(EVENT_INDEX_POLLING);
    }

    /// Memory tracking: both pages were written.
    pub(crate) fn wrote(&self, engine: &mut Engine) {
        self.addresses().into_iter().for_each(|iova| engine.wrote(iova, PAGE));
    }
}

impl Sq {
    /// Stores the event index, if it is another than the last. Returns whether it was.
    pub(crate) fn tell(&mut self, index: u32) -> bool {
        let told = tell(self.shadow.as_deref(), &mut self.event, sq_tail_offset(self.qid, 0), index);
        told.is_some()
    }
}

impl Cq {
    /// See [`Sq::tell`].
    pub(crate) fn tell(&mut self, index: u32) -> bool {
        let told = tell(self.shadow.as_deref(), &mut self.event, cq_head_offset(self.qid, 0), index);
        told.is_some()
    }
}

fn tell(pages: Option<&ShadowPages>, last: &mut Option<u32>, place: u32, index: u32) -> Option<()> {
    let pages = pages.filter(|_| *last != Some(index))?;
    pages.set_event(place, index);
    *last = Some(index);
    Some(())
}

/// What a controller keeps of the guest's shadow doorbells.
#[derive(Debug)]
pub(crate) struct Shadow {
    pub(crate) pages: Arc<ShadowPages>,
    /// Until when registers need not be written although there is nothing to do.
    awake_until: Time,
    /// Some queue's index may ask for a register write.
    armed: bool,
    /// Wants to be polled again at once: the indices say that it is.
    lingers: bool,
}

impl Shadow {
    pub(crate) fn new(pages: Arc<ShadowPages>) -> Self {
        Self { pages, awake_until: Time::default(), armed: true, lingers: false }
    }
}

impl Controller {
    /// Whether Doorbell Buffer Config is offered (OACS bit 8): where doorbells are trapped, and not on a management controller.
    pub(crate) fn offers_shadow(&self) -> bool {
        self.traps && !self.is_manager()
    }

    /// Whether it must be polled again at once, since the guest believes that it is.
    #[inline]
    pub(crate) fn lingers(&self) -> bool {
        self.shadow.as_ref().is_some_and(|shadow| shadow.lingers)
    }

    /// Doorbell Buffer Config. The doorbells of the queues that there are go into the shadow page as they stand.
    pub(crate) fn doorbell_buffer_config(&mut self, entry: &SubmissionEntry, port: &Port) -> AdminResult {
        self.engine.reader.refresh();
        let pages = Arc::new(ShadowPages::find(&self.engine.reader, entry.dptr)?);
        for sq in self.sqs.iter_mut().skip(1).flatten() {
            let bell = sq.doorbell(port.bar());
            pages.join_sq(sq, bell);
        }
        for cq in self.cqs.iter_mut().skip(1).flatten() {
            let bell = cq.doorbell(port.bar());
            pages.join_cq(cq, bell);
        }
        pages.wrote(&mut self.engine);
        self.shadow = Some(Shadow::new(pages));
        Ok(0)
    }

    /// Takes over the pages of a restored state, or those at the same place after the address space has changed. Nothing is
    /// written: what the pages say is the guest's and the last controller's.
    pub(crate) fn put_shadow(&mut self, pages: Option<ShadowPages>) {
        self.shadow = pages.map(|pages| Shadow::new(Arc::new(pages)));
        self.share_shadow();
    }

    /// Every I/O queue has its doorbells where the controller's are.
    pub(crate) fn share_shadow(&mut self) {
        let pages = self.shadow.as_ref().map(|shadow| &shadow.pages);
        for sq in self.sqs.iter_mut().skip(1).flatten() {
            (sq.shadow, sq.event) = (pages.cloned(), None);
        }
        for cq in self.cqs.iter_mut().skip(1).flatten() {
            (cq.shadow, cq.event) = (pages.cloned(), None);
        }
    }

    /// Looks the pages up again; `false` when they have gone.
    pub(crate) fn renew_shadow(&mut self) -> bool {
        let Some(shadow) = &self.shadow else { return true };
        let Ok(pages) = ShadowPages::find(&self.engine.reader, shadow.pages.addresses()) else { return false };
        self.put_shadow(Some(pages));
        true
    }

    /// At the end of a poll that did so much `work`: says in the event indices what wakes the controller. Returns what the last
    /// look has found.
    #[inline(never)]
    pub(crate) fn tend_shadow(&mut self, port: &Port, work: u32) -> u32 {
        let fetching = self.enabled && self.may_fetch(port);
        let Some(shadow) = &mut self.shadow else { return 0 };
        shadow.lingers = false;
        if !fetching {
            return 0;
        }
        let mut written = false;
        if work > 0 {
            shadow.awake_until = self.now.after_us(AWAKE_US);
            if std::mem::take(&mut shadow.armed) {
                for &qid in &self.live {
                    let Some(sq) = self.sqs[usize::from(qid)].as_mut() else { continue };
                    written |= sq.tell(EVENT_INDEX_POLLING);
                }
            }
        } else if self.now < shadow.awake_until {
            shadow.lingers = true;
        } else {
            shadow.armed = true;
            for &qid in &self.live {
                let Some(sq) = self.sqs[usize::from(qid)].as_mut() else { continue };
                written |= sq.tell(sq.tail);
                if let Some(cq) = self.cqs[usize::from(sq.cqid)].as_mut() {
                    // A full queue's head is waited for; any other's is looked at when room is needed.
                    let index = if cq.is_full() { cq.head } else { EVENT_INDEX_POLLING };
                    written |= cq.tell(index);
                }
            }
        }
        if !written {
            return 0;
        }
        shadow.pages.wrote(&mut self.engine);
        if self.shadow.as_ref().is_some_and(|shadow| shadow.armed) { self.look_once_more(port) } else { 0 }
    }

    /// The guest may have stored a doorbell before it could see the index.
    fn look_once_more(&mut self, port: &Port) -> u32 {
        fence(Ordering::SeqCst);
        let (mut found, mut bad) = (0, 0);
        for &qid in &self.live {
            let Some(sq) = self.sqs[usize::from(qid)].as_mut() else { continue };
            let tail = sq.tail;
            bad += u32::from(sq.look(port.bar()).is_err());
            found += u32::from(sq.tail != tail);
            if let Some(cq) = self.cqs[usize::from(sq.cqid)].as_mut().filter(|cq| cq.is_full()) {
                bad += u32::from(cq.look(port.bar()).is_err());
                found += u32::from(!cq.is_full());
            }
        }
        (0..bad).for_each(|_| self.bad_doorbell());
        found + bad
    }
}
