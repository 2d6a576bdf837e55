//! Interrupts: a vector for each completion queue, coalesced where the guest wants it (Base 2.3 §5.2.26.1), or the pin.

use crate::controller::Controller;
use crate::queue::Cq;
use dray_device::poll::Time;
use dray_device::slot::Port;

impl Controller {
    pub(crate) fn raise_interrupts(&mut self, port: &Port) {
        while let Some(cqid) = self.signal.pop() {
            let Some(cq) = self.cqs.get_mut(usize::from(cqid)).and_then(Option::as_mut) else { continue };
            cq.listed = false;
            if !cq.ien {
                cq.unsignalled = 0;
                continue;
            }
            let (threshold, time_ns) = self.features.coalescing(cq.vector);
            if cq.qid == 0 || threshold == 0 || cq.unsignalled > threshold {
                Self::interrupt(cq, port, &mut self.engine.counters.interrupts);
            } else if cq.deadline == Time::NEVER {
                cq.deadline = self.now.after_ns(time_ns);
                self.coalescing = true;
            }
        }
    }

    pub(crate) fn interrupt(cq: &mut Cq, port: &Port, count: &mut u64) {
        port.raise(cq.vector);
        *count += 1;
        (cq.unsignalled, cq.deadline) = (0, Time::NEVER);
    }

    /// Raises the interrupts that have waited long enough.
    pub(crate) fn coalesced(&mut self, port: &Port) {
        self.coalescing = false;
        let count = &mut self.engine.counters.interrupts;
        for cq in self.cqs.iter_mut().flatten().filter(|cq| cq.deadline != Time::NEVER) {
            if cq.deadline <= self.now {
                Self::interrupt(cq, port, count);
            } else {
                self.coalescing = true;
            }
        }
    }

    /// The pin's level: some queue that interrupts has entries which the guest has not taken. Nothing is coalesced.
    #[cold]
    pub(crate) fn drive_pin(&mut self, port: &Port) {
        if self.lacks_queues() {
            return;
        }
        port.drive_pin(self.cqs.iter_mut().flatten().filter(|cq| cq.ien).filter_map(|cq| {
            let _refused = cq.look(port.bar());
            cq.has_entries().then_some(cq.vector)
        }));
    }
}
