//! The subsystem: its controllers and namespaces, polled round robin.

use crate::admin::Event;
use crate::config::{ConfigError, ControllerRole, MAX_NSID, NamespaceConfig, SubsystemConfig};
use crate::controller::Controller;
use crate::deviations::Deviating;
use crate::engine::{ControllerCounters, NO_NAMESPACE};
use crate::manage::Management;
use crate::namespace::Namespace;
use crate::udmq::PostResult;
use dray_device::backing::Backing;
use dray_device::poll::{Next, Poll, Progress, Time};
use dray_device::slot::Plug;
use dray_nvme::event::AsyncEvent;
use dray_nvme::status::Status;
use std::os::fd::BorrowedFd;

/// Most memory ranges tracked for one controller (CMMRTD).
pub(crate) const MAX_TRACKED_RANGES: usize = 256;
/// Most of all controllers (NMMRTD).
pub(crate) const MAX_TRACKED_IN_ALL: usize = 4096;
/// MINMRTG and MAXMRTG: 4 KiB to 2 MiB.
pub(crate) const TRACK_GRANULARITY: (u8, u8) = (0, 9);

/// What the controllers have in common.
pub(crate) struct Shared {
    pub(crate) config: SubsystemConfig,
    /// CNTLIDs.
    pub(crate) controllers: Vec<u16>,
    pub(crate) namespaces: Vec<Namespace>,
    /// One-shot events for the management controller.
    one_shots: Vec<Event>,
    /// Namespaces whose attributes changed (index), and the controller that changed them.
    pub(crate) changed: Vec<(u16, u16)>,
    cached: bool,
    uncorrectable: bool,
    /// How the subsystem deviates from the specification: not at all, outside the simulator.
    pub(crate) deviating: Deviating,
}

impl Shared {
    /// Takes note of what posting to a controller data queue caused.
    #[inline]
    pub(crate) fn cdq_posted(&mut self, id: u16, posted: &PostResult) {
        if posted.tail_event {
            self.one_shots.push(Event::one_shot(AsyncEvent::CDQ_TAIL_POINTER, id));
        }
        if posted.full_event {
            self.one_shots.push(Event::one_shot(AsyncEvent::CDQ_FULL, id));
        }
    }

    /// Every namespace can be marked as unreadable. As Identify says: backings are only exchanged for such that keep it.
    pub(crate) fn can_write_uncorrectable(&self) -> bool {
        self.uncorrectable
    }

    /// Some namespace has a volatile write cache. As Identify says: it stays so when a backing is exchanged for one without.
    pub(crate) fn has_cache(&self) -> bool {
        self.cached
    }
}

/// A software NVMe subsystem: one management controller, migratable controllers, namespaces.
///
/// It has a single owner, who polls it; slots are pointed at its controllers through their plugs.
pub struct Subsystem {
    pub(crate) controllers: Vec<Controller>,
    pub(crate) shared: Shared,
    pub(crate) management: Management,
    ended: Vec<(u64, Status)>,
    next: usize,
}

impl std::fmt::Debug for Subsystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subsystem").field("controllers", &self.shared.controllers).finish_non_exhaustive()
    }
}

impl Subsystem {
    /// Makes a subsystem over its namespaces' backings.
    ///
    /// # Errors
    /// [`ConfigError`] when the parts do not fit together.
    pub fn new(
        mut config: SubsystemConfig,
        namespaces: Vec<(NamespaceConfig, Box<dyn Backing>)>,
    ) -> Result<Self, ConfigError> {
        config.check()?;
        check_namespaces(&config, &namespaces)?;
        if config.attachment {
            // It keeps those that it takes from others.
            let all: Vec<u32> = namespaces.iter().map(|(ns, _)| ns.nsid).collect();
            let managers = config.controllers.iter_mut().filter(|c| c.role == ControllerRole::Management);
            managers.for_each(|manager| manager.namespaces.clone_from(&all));
        }
        let highest = namespaces.iter().map(|(ns, _)| ns.nsid).max().unwrap_or(0);
        let namespaces: Vec<_> = namespaces
            .into_iter()
            .map(|(ns, backing)| Namespace::new(ns, backing))
            .collect();
        let deviating = Deviating::default();
        let mut controllers = Vec::new();
        for (index, controller) in config.controllers.iter().enumerate() {
            let mut active = vec![NO_NAMESPACE; highest as usize];
            for (i, namespace) in namespaces.iter().enumerate() {
                if is_attached(&config, index, namespace.config.nsid) {
                    active[namespace.config.nsid as usize - 1] = i as u16;
                }
            }
            let mut made = Controller::new(index as u16, controller.clone(), &config, active)?;
            made.engine.deviating = deviating.clone();
            controllers.push(made);
        }
        let contexts = usize::from(config.contexts) * controllers.len();
        let shared = Shared {
            controllers: config.controllers.iter().map(|c| c.cntlid).collect(),
            cached: namespaces.iter().any(|ns| ns.info.volatile_cache),
            uncorrectable: namespaces.iter().all(|ns| ns.backing.can_write_uncorrectable()),
            config,
            namespaces,
            one_shots: Vec::with_capacity(256),
            changed: Vec::new(),
            deviating,
        };
        let management = Management::default();
        Ok(Self { controllers, shared, management, ended: Vec::with_capacity(contexts), next: 0 })
    }

    /// The end of a controller to point slots at.
    #[must_use]
    pub fn plug(&self, cntlid: u16) -> Option<Plug> {
        self.controllers.iter().find(|c| c.config.cntlid == cntlid).map(|c| c.connector.plug())
    }

    /// Whether a controller has a namespace now.
    #[must_use]
    pub fn has_namespace(&self, cntlid: u16, nsid: u32) -> bool {
        let found = self.shared.config.controllers.iter().position(|controller| controller.cntlid == cntlid);
        found.is_some_and(|index| is_attached(&self.shared.config, index, nsid))
    }

    /// Ends the subsystem and gives the namespaces' backings back, by NSID. Operations under way end when a backing is
    /// dropped.
    #[must_use]
    pub fn into_backings(self) -> Vec<(u32, Box<dyn Backing>)> {
        self.shared.namespaces.into_iter().map(|ns| (ns.config.nsid, ns.backing)).collect()
    }

    /// What each controller has done: CNTLID and counters.
    pub fn counters(&self) -> impl Iterator<Item = (u16, ControllerCounters)> + '_ {
        self.controllers.iter().map(|c| (c.config.cntlid, c.engine.counters))
    }

    /// Whether no command is being carried out and no backing has anything under way (event requests that wait do not count): behind
    /// raised fences it stays so.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let idle = |c: &Controller| c.engine.contexts.in_use() == 0 && c.engine.jobs.is_empty();
        self.controllers.iter().all(idle) && self.shared.namespaces.iter().all(|ns| ns.pending == 0)
    }

    /// Takes in what backings have finished; returns how much it was.
    fn poll_backings(&mut self, now: Time) -> u32 {
        let mut count = 0;
        for i in 0..self.shared.namespaces.len() {
            let namespace = &mut self.shared.namespaces[i];
            if namespace.uncommitted {
                namespace.uncommitted = false;
                namespace.backing.commit();
            }
            if namespace.pending == 0 && !namespace.backing.wants_poll() {
                continue;
            }
            let ended = &mut self.ended;
            namespace.backing.poll(now, &mut |tag, status| ended.push((tag, status)));
            namespace.pending -= (self.ended.len() as u32).min(namespace.pending);
            count += self.ended.len() as u32;
            let ended = std::mem::take(&mut self.ended);
            for &(tag, status) in &ended {
                if let Some(controller) = self.controllers.get_mut((tag >> 16) as usize) {
                    controller.now = now;
                    controller.ended(tag as u16, status, &mut self.shared);
                }
            }
            self.ended = ended;
            self.ended.clear();
        }
        count
    }

    /// Carries over what controllers have for each other.
    fn exchange(&mut self) {
        if !self.shared.one_shots.is_empty() {
            let manager = self.controllers.iter_mut().find(|c| c.is_manager());
            if let Some(manager) = manager {
                self.shared.one_shots.drain(..).for_each(|event| manager.admin.report(event));
            }
            self.shared.one_shots.clear();
        }
        if self.shared.changed.is_empty() {
            return;
        }
        for (namespace, by) in std::mem::take(&mut self.shared.changed) {
            let Some(nsid) = self.shared.namespaces.get(usize::from(namespace)).map(|ns| ns.config.nsid) else { continue };
            for controller in &mut self.controllers {
                if controller.engine.index != by && controller.engine.active.contains(&namespace) {
                    controller.namespace_changed(nsid);
                }
            }
        }
    }
}

impl Poll for Subsystem {
    fn poll(&mut self, now: Time) -> Progress {
        let mut work = self.poll_backings(now);
        let count = self.controllers.len();
        let mut wish = Next::OnWake;
        for _ in 0..count {
            self.next = if self.next + 1 >= count { 0 } else { self.next + 1 };
            let index = self.next;
            let controller = &mut self.controllers[index];
            work += controller.poll(now, &mut self.shared);
            if controller.engine.has_runnable_job() || controller.lingers() {
                wish = Next::Now;
            }
            let deadline = controller.next_deadline();
            if deadline != Time::NEVER {
                wish = Progress { work: 0, next: wish }.and(Progress::idle_until(deadline)).next;
            }
            if controller.is_manager() {
                self.renew_data_queues(index);
            }
            let controller = &self.controllers[index];
            if controller.management.is_some() || controller.was_reset {
                work += 1;
                self.manage(index, now);
            }
        }
        work += self.finish_suspends();
        self.exchange();
        for namespace in &mut self.shared.namespaces {
            if namespace.uncommitted {
                namespace.uncommitted = false;
                namespace.backing.commit();
            }
        }
        // Nothing else tells that an operation of such a backing has ended.
        if self.shared.namespaces.iter().any(|namespace| namespace.pending > 0 && namespace.backing.is_polled_only()) {
            wish = Next::Now;
        }
        if work > 0 { Progress::busy(work) } else { Progress { work: 0, next: wish } }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>)) {
        for namespace in &self.shared.namespaces {
            if let Some(waker) = namespace.backing.waker() {
                visit(waker);
            }
        }
    }
}

/// A management controller has every namespace that some controller has.
pub(crate) fn is_attached(config: &SubsystemConfig, controller: usize, nsid: u32) -> bool {
    let controller = &config.controllers[controller];
    let named = controller.namespaces.contains(&nsid);
    let manages = controller.role == ControllerRole::Management;
    named || manages && config.controllers.iter().any(|c| c.namespaces.contains(&nsid))
}

fn check_namespaces(
    config: &SubsystemConfig,
    namespaces: &[(NamespaceConfig, Box<dyn Backing>)],
) -> Result<(), ConfigError> {
    for (i, (namespace, backing)) in namespaces.iter().enumerate() {
        let nsid = namespace.nsid;
        if !(1..=MAX_NSID).contains(&nsid) {
            return Err(ConfigError::Range { field: "nsid", value: nsid.into(), range: "1 to 1024" });
        }
        if namespaces[..i].iter().any(|(other, _)| other.nsid == nsid) {
            return Err(ConfigError::Duplicate { field: "nsid", value: nsid.into() });
        }
        let info = backing.info();
        let bytes = info.block_bytes;
        if !bytes.is_power_of_two() || !(512..=4096).contains(&bytes) {
            let range = "a power of two from 512 to 4096";
            return Err(ConfigError::Range { field: "block bytes", value: bytes.into(), range });
        }
        let most = u64::MAX / u64::from(bytes);
        if info.blocks == 0 || info.blocks > most {
            return Err(ConfigError::Range { field: "blocks", value: info.blocks, range: "at least 1" });
        }
        let users = config.controllers.iter().filter(|c| c.role == ControllerRole::Migratable);
        if !namespace.shared && users.filter(|c| c.namespaces.contains(&nsid)).count() > 1 {
            return Err(ConfigError::Private(nsid));
        }
    }
    for controller in &config.controllers {
        for &nsid in &controller.namespaces {
            if !namespaces.iter().any(|(ns, _)| ns.nsid == nsid) {
                return Err(ConfigError::NoNamespace { cntlid: controller.cntlid, nsid });
            }
        }
    }
    Ok(())
}
