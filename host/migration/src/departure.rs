//! The departure: controllers that another process drives (a VM its virtual function, say) leave their subsystem for a place that
//! nobody of ours has. Media goes with them, their state is kept, and whoever moves the VM carries that on.
//!
//! It is the migration's own state machine with another end. Tracking, rounds, Suspend, last round, flush and Get Controller State
//! are those of a controller move; then
//!
//! | controller move | departure |
//! |---|---|
//! | states kept in memory, set at the destination | states handed to whoever keeps them ([`StateKeeper`]), durable before anything else |
//! | fence up in memory | the namespaces are detached from the controllers (Namespace Attachment, Base 2.3 §5.2.20) |
//! | "moved" recorded | the same |
//! | slots pointed, states set, Resume at the destination | nothing: the controllers stay suspended, and have no namespace |
//!
//! **Why detached.** A suspension ends with the reset of either controller, and what drives the other one is not ours: no flag of
//! this process keeps it from fetching. An attachment is the drive's own state, outlives every reset and power cycle, and is
//! changed through the management controller alone. A drive without Namespace Attachment is refused: nothing would be left to fence
//! its controllers with. Controllers that have further namespaces are refused too: with one of them they would go on.
//!
//! **The order.** State kept, detached, behind that the question whether the controllers were suspended throughout and that nobody
//! else has the namespaces, then the record. A crash before the record is durable leaves controllers without their namespaces at
//! worst: by the record the source serves, so whoever reads it attaches them again ([`recovery`](crate::recovery)), and nothing
//! is lost, since nobody can have written meanwhile. From the record on, nobody attaches them.
//!
//! An undo records first that the source serves, then attaches, then resumes.

use crate::calls::{Calls, Data};
use crate::destination::Destination;
use crate::hooks::{FenceControl, GuestSlot, GuestView, Hooks, Journal, Owner};
use crate::media_move::{CopyGeometry, Nobody};
use crate::mmc::{Answer, Mmc};
use crate::parts::Policies;
use dray_device::command::CommandQueue;
use dray_device::space::AddressSpace;
use dray_nvme::command::{NamespaceAttachmentSelect, SubmissionEntry};
use dray_nvme::identify::{Cns, CommandSetId, IDENTIFY_BYTES, controller_list, write_controller_list};
use dray_nvme::status::Status;

/// Who keeps the states of the controllers that have left.
pub trait StateKeeper: Send {
    /// Begins to keep these states (CNTLID, and all that Get Controller State gave: Base 2.3 §5.2.17.1.3), in place of those of an
    /// attempt before, whose end is not told any more.
    fn keep(&mut self, states: Vec<(u16, Vec<u8>)>);
    /// `Some` once, when they are durable, or in words why they are not.
    fn poll(&mut self) -> Option<Result<(), String>>;
}

/// What a departure is made of.
pub struct DepartureIngredients {
    /// The management controller of the subsystem that is left.
    pub source: Box<dyn Mmc>,
    /// An I/O queue of it, to read the media: the namespaces are attached to it as well.
    pub source_queue: Box<dyn CommandQueue>,
    /// The address space of that queue.
    pub source_space: AddressSpace,
    /// Where the media goes. The second NSIDs of [`MigrationConfig::namespaces`](crate::MigrationConfig::namespaces) are those of
    /// this destination; the second CNTLIDs of its controllers are not looked at.
    pub media: Box<dyn Destination>,
    /// What the namespaces there hold, in the order of the configuration.
    pub targets: Vec<CopyGeometry>,
    /// The policies' seats.
    pub policies: Policies,
    /// Who keeps the states.
    pub keeper: Box<dyn StateKeeper>,
    /// The durable record.
    pub journal: Box<dyn Journal>,
    /// The guest's figures.
    pub guest: Box<dyn GuestView>,
}

impl std::fmt::Debug for DepartureIngredients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DepartureIngredients").field("policies", &self.policies).finish_non_exhaustive()
    }
}

/// The guest is behind a function that is not ours: nothing of it is pointed, and no flag of ours stops it.
struct Elsewhere;

impl GuestSlot for Elsewhere {
    fn point_at_destination(&mut self, _: u16) {}
    fn point_at_source(&mut self, _: u16) {}
}

impl FenceControl for Elsewhere {
    fn raise(&mut self, _: Owner) {}
    fn lower(&mut self, _: Owner) {}
}

impl DepartureIngredients {
    pub(crate) fn split(self) -> (crate::Ingredients, Departure) {
        let hooks = Hooks { slot: Box::new(Elsewhere), journal: self.journal, fence: Box::new(Elsewhere), guest: self.guest };
        let with = crate::Ingredients {
            source: self.source,
            source_queue: self.source_queue,
            source_space: self.source_space,
            destination: Box::new(Nobody),
            media: self.media,
            policies: self.policies,
            hooks,
        };
        (with, Departure { keeper: self.keeper, targets: self.targets, attached: Vec::new(), keeping: false })
    }
}

/// What the state machine has of it.
pub(crate) struct Departure {
    keeper: Box<dyn StateKeeper>,
    pub(crate) targets: Vec<CopyGeometry>,
    /// Of each namespace, the moving controllers that have it.
    pub(crate) attached: Vec<(u32, Vec<u16>)>,
    keeping: bool,
}

impl Departure {
    /// `Some` once, when the states are durable.
    pub(crate) fn keep(&mut self, states: impl FnOnce() -> Vec<(u16, Vec<u8>)>) -> Option<Result<(), String>> {
        if !std::mem::replace(&mut self.keeping, true) {
            self.keeper.keep(states());
        }
        let kept = self.keeper.poll()?;
        self.keeping = false;
        Some(kept)
    }

    /// An attempt that begins asks for all of it again.
    pub(crate) fn begin(&mut self) {
        self.keeping = false;
    }

    /// Detaches every namespace from the moving controllers, or attaches it to them again.
    pub(crate) fn attachment(&self, on: bool) -> Calls {
        let select = if on { NamespaceAttachmentSelect::ATTACH } else { NamespaceAttachmentSelect::DETACH };
        let mut calls = Calls::default();
        for (nsid, cntlids) in &self.attached {
            // One controller a command: of a list that holds only in part nobody would know which part.
            for &cntlid in cntlids {
                let mut list = vec![0; IDENTIFY_BYTES];
                write_controller_list([cntlid], &mut list);
                calls.push(SubmissionEntry::namespace_attachment(*nsid, select), Data::Out(list));
            }
        }
        calls
    }

    /// Which controllers have the namespaces.
    pub(crate) fn ask_attached(&self) -> Calls {
        let mut calls = Calls::default();
        for (nsid, _) in &self.attached {
            calls.push(SubmissionEntry::identify(Cns::NAMESPACE_CONTROLLERS, *nsid, 0, CommandSetId::NVM), Data::In(IDENTIFY_BYTES));
        }
        calls
    }
}

/// Whether an attachment, or the end of one, is as it was asked for: it may have been so before.
pub(crate) fn is_settled(answer: &Answer, on: bool) -> bool {
    let already = if on { Status::NAMESPACE_ALREADY_ATTACHED } else { Status::NAMESPACE_NOT_ATTACHED };
    !answer.unknown && (!answer.status.is_error() || answer.status.is(already))
}

/// A controller besides `own` that has one of the namespaces; an error when that was not answered.
pub(crate) fn other_than(own: u16, calls: &Calls) -> Result<Option<u16>, ()> {
    let mut found = None;
    for answer in calls.answers() {
        if answer.unknown || answer.status.is_error() {
            return Err(());
        }
        found = found.or_else(|| controller_list(&answer.data).find(|&cntlid| cntlid != own));
    }
    Ok(found)
}
