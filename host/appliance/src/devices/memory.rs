//! Guests' memory, mapped for a device: data goes between the two without a copy.
//!
//! A [`Follower`] of each guest's address space leaves word of what is mapped and unmapped there; the device's own thread carries it
//! out, since mapping gigabytes takes time. Until then (and for memory that the device cannot be given) data goes through
//! bounce buffers. Memory that is unmapped stays mapped for the device until no command uses it: whoever unmapped it waits for the same
//! commands, by the controller's reader of the space.

use dray_controller::UsesMemory;
use dray_device::memory::DmaBuffer;
use dray_device::space::{AddressSpace, MapFollower, Mapping};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is to be done.
#[derive(Debug)]
enum Order {
    Map(DmaBuffer, bool),
    Unmap(DmaBuffer),
}

/// Memory that is mapped for the device.
#[derive(Debug)]
struct Mapped {
    memory: DmaBuffer,
    iova: u64,
    /// Guests that have it mapped.
    users: u32,
}

/// Memory that goes when no command uses it any more.
struct Leaving {
    memory: DmaBuffer,
    marks: Vec<(UsesMemory, u64)>,
}

#[derive(Default)]
struct Inner {
    orders: Vec<Order>,
    mapped: Vec<Mapped>,
    leaving: Vec<Leaving>,
    uses: Vec<UsesMemory>,
}

/// The guests' memory of one device. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct GuestMemory(Arc<Mutex<Inner>>);

fn same(one: &DmaBuffer, other: &DmaBuffer) -> bool {
    Arc::ptr_eq(one.arena(), other.arena()) && (one.offset(), one.len()) == (other.offset(), other.len())
}

impl GuestMemory {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another backing whose commands use the memory.
    pub(super) fn used_by(&self, uses: UsesMemory) {
        self.lock().uses.push(uses);
    }

    /// Follows a guest's space.
    pub(super) fn follow(&self, space: &AddressSpace) -> io::Result<()> {
        space.follow(Box::new(Follower(self.clone()))).map_err(io::Error::other)
    }

    /// Carries out what has been ordered; whether something waits.
    pub(super) fn work(&self, device: &AddressSpace) -> bool {
        let mut inner = self.lock();
        for order in std::mem::take(&mut inner.orders) {
            match order {
                Order::Map(memory, writable) => inner.map(device, memory, writable),
                Order::Unmap(memory) => inner.leave(memory),
            }
        }
        let over = |leaving: &mut Leaving| leaving.marks.iter().all(|(uses, mark)| uses.is_over(*mark));
        let gone: Vec<_> = inner.leaving.extract_if(.., over).collect();
        for Leaving { memory, .. } in gone {
            inner.unmap(device, &memory);
        }
        !inner.leaving.is_empty()
    }
}

impl Inner {
    fn map(&mut self, device: &AddressSpace, memory: DmaBuffer, writable: bool) {
        if let Some(mapped) = self.mapped.iter_mut().find(|mapped| same(&mapped.memory, &memory)) {
            mapped.users += 1;
            return;
        }
        match device.map(&memory, writable) {
            Ok(iova) => self.mapped.push(Mapped { memory, iova, users: 1 }),
            // Its data goes through bounce buffers.
            Err(error) => tracing::warn!("{} bytes of a guest's memory are not mapped for a device: {error}", memory.len()),
        }
    }

    fn leave(&mut self, memory: DmaBuffer) {
        let marks = self.uses.iter().map(|uses| (uses.clone(), uses.mark())).collect();
        self.leaving.push(Leaving { memory, marks });
    }

    fn unmap(&mut self, device: &AddressSpace, memory: &DmaBuffer) {
        let Some(at) = self.mapped.iter().position(|mapped| same(&mapped.memory, memory)) else { return };
        self.mapped[at].users -= 1;
        if self.mapped[at].users == 0 {
            let Mapped { iova, .. } = self.mapped.swap_remove(at);
            // No command uses it any more: there is nothing to wait for.
            let _no_reader = device.unmap(iova);
        }
    }
}

/// Leaves word of a guest's maps and unmaps.
struct Follower(GuestMemory);

impl MapFollower for Follower {
    fn mapped(&mut self, mapping: &Mapping) -> io::Result<()> {
        self.0.lock().orders.push(Order::Map(mapping.memory.clone(), mapping.writable));
        Ok(())
    }

    fn unmapped(&mut self, mapping: &Mapping) {
        self.0.lock().orders.push(Order::Unmap(mapping.memory.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_device::memory::{PAGE, Pages};

    #[test]
    fn memory_is_mapped_once_and_goes_with_its_last_guest() {
        let (guests, device) = ([AddressSpace::default(), AddressSpace::default()], AddressSpace::default());
        let memory = DmaBuffer::allocate("guest", 4 * PAGE, Pages::Small).expect("memory");
        let all = GuestMemory::default();
        guests.iter().for_each(|guest| all.follow(guest).expect("followed"));
        let uses = UsesMemory::default();
        all.used_by(uses.clone());
        let at = guests.each_ref().map(|guest| guest.map(&memory, true).expect("mapped"));
        assert!(device.iova_of(&memory.segment()).is_none());
        assert!(!all.work(&device));
        assert!(device.iova_of(&memory.part(PAGE, PAGE).expect("part")).is_some());
        let _done = guests[0].unmap(at[0]).expect("unmapped");
        assert!(!all.work(&device));
        assert!(device.iova_of(&memory.segment()).is_some(), "the other guest has it");
        let _done = guests[1].unmap(at[1]).expect("unmapped");
        assert!(!all.work(&device) && device.iova_of(&memory.segment()).is_none());
    }
}
