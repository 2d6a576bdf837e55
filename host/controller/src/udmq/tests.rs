use super::*;
use dray_device::memory::Pages;
use dray_device::space::AddressSpace;
use dray_nvme::cdq::Changed;
use proptest::prelude::*;
use zerocopy::FromBytes;

const BASE: u64 = 0x10_0000;

fn space(pages: usize) -> (AddressSpace, DmaBuffer) {
    let space = AddressSpace::new(40);
    let memory = DmaBuffer::allocate("cdq", pages * PAGE, Pages::Small).expect("memory");
    space.map_at(BASE, &memory, true).expect("map");
    (space, memory)
}

/// A queue and the host that reads it, by phase.
struct Host {
    queue: Udmq,
    memory: DmaBuffer,
    slots: u32,
    next: u32,
    phase: bool,
}

impl Host {
    fn new(slots: u32) -> Self {
        let bytes = u64::from(slots) * UDMQ_ENTRY_BYTES as u64;
        let (space, memory) = space((bytes as usize).div_ceil(PAGE));
        let cdq = CdqMemory::contiguous(&space.reader(), BASE, bytes).expect("queue");
        Self { queue: Udmq::new(7, 5, cdq, slots), memory, slots, next: 0, phase: true }
    }

    /// Takes the new entries; gives them back if `give`.
    fn take(&mut self, give: bool) -> (Vec<UdmqEntry>, PostResult) {
        let mut entries = Vec::new();
        while entries.len() < self.slots as usize {
            let mut bytes = [0; UDMQ_ENTRY_BYTES];
            self.memory.part(self.next as usize * UDMQ_ENTRY_BYTES, UDMQ_ENTRY_BYTES).expect("slot").read(&mut bytes);
            let entry = UdmqEntry::read_from_bytes(&bytes).expect("entry");
            if entry.phase() != self.phase {
                break;
            }
            entries.push(entry);
            self.next = (self.next + 1) % self.slots;
            self.phase ^= self.next == 0;
        }
        let result = if give { self.queue.set_head(self.next, None).expect("head") } else { PostResult::default() };
        (entries, result)
    }

    fn marks(&mut self, give: bool) -> Vec<Esa> {
        self.take(give).0.iter().map(UdmqEntry::esa).collect()
    }
}

fn quiet(result: PostResult) {
    assert_eq!(result, PostResult::default());
}

fn full(result: PostResult) {
    assert!(result.full_event);
}

fn range(nsid: u32, slba: u64, blocks: u64) -> Changed {
    Changed::Range { nsid, slba, blocks }
}

#[test]
fn a_log_has_its_markers_and_the_bytes_of_the_reference() {
    let mut host = Host::new(16);
    assert!(!host.queue.logging());
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.start().expect("start"));
    assert_eq!(host.queue.start(), Err(Status::INVALID_CDQ.with_dnr()));
    quiet(host.queue.changed(1, 100, 8, false));
    quiet(host.queue.changed(1, 200, 8, true));
    quiet(host.queue.suspended());
    quiet(host.queue.suspended());
    quiet(host.queue.resumed());
    quiet(host.queue.stop());
    quiet(host.queue.stop());
    let (entries, _) = host.take(true);
    let attributes: Vec<u8> = entries.iter().map(|entry| entry.lbamqa.into_bits()).collect();
    assert_eq!(attributes, [0x83, 0x01, 0x21, 0x87, 0x83, 0x85]);
    assert_eq!(entries[1].changed(), range(1, 100, 8));
    assert_eq!(entries[2].changed(), range(1, 200, 8));
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.flush());
    assert!(host.take(true).0.is_empty());
}

#[test]
fn a_posted_entry_never_changes_and_a_held_one_merges() {
    let mut host = Host::new(16);
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 10, 2, false));
    assert_eq!(host.marks(false), [Esa::FIRST], "held");
    quiet(host.queue.changed(1, 12, 4, false));
    quiet(host.queue.changed(1, 8, 2, false));
    quiet(host.queue.changed(1, 9, 3, false));
    quiet(host.queue.flush());
    let (entries, _) = host.take(false);
    assert_eq!(entries.iter().map(UdmqEntry::changed).collect::<Vec<_>>(), [range(1, 8, 8)]);
    let before = entries[0];
    quiet(host.queue.changed(1, 16, 1, false));
    quiet(host.queue.changed(1, 17, 1, true));
    quiet(host.queue.changed(2, 18, 1, true));
    quiet(host.queue.changed(2, 20, 1, true));
    quiet(host.queue.changed(2, 20, 0, true));
    quiet(host.queue.flush());
    let changes: Vec<Changed> = host.take(false).0.iter().map(UdmqEntry::changed).collect();
    assert_eq!(changes, [range(1, 16, 1), range(1, 17, 1), range(2, 18, 1), range(2, 20, 1)]);
    let mut bytes = [0; UDMQ_ENTRY_BYTES];
    host.memory.part(UDMQ_ENTRY_BYTES, UDMQ_ENTRY_BYTES).expect("slot").read(&mut bytes);
    assert_eq!(UdmqEntry::read_from_bytes(&bytes).expect("entry"), before, "the visible entry is as it was");
}

#[test]
fn a_change_of_more_blocks_than_an_entry_says_is_split() {
    let mut host = Host::new(16);
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 5, (1 << 33) + 1, true));
    quiet(host.queue.changed(2, u64::MAX - 1, 9, false));
    quiet(host.queue.flush());
    let changes: Vec<Changed> = host.take(true).0.iter().skip(1).map(UdmqEntry::changed).collect();
    let most = 1 << 32;
    assert_eq!(
        changes,
        [range(1, 5, most), range(1, 5 + most, most), range(1, 5 + 2 * most, 1), range(2, u64::MAX - 1, 1)]
    );
}

#[test]
fn a_full_queue_ends_the_log_with_its_last_change_and_overwrites_nothing() {
    let mut host = Host::new(4);
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.changed(1, 10, 1, false));
    full(host.queue.changed(1, 20, 1, false));
    assert!(!host.queue.logging());
    for i in 0..9 {
        quiet(host.queue.changed(1, i * 3, 1, false));
        quiet(host.queue.flush());
    }
    quiet(host.queue.suspended());
    quiet(host.queue.resumed());
    quiet(host.queue.stop());
    let (entries, _) = host.take(false);
    let seen: Vec<_> = entries.iter().map(|entry| (entry.esa(), entry.changed())).collect();
    let expected =
        [(Esa::FIRST, Changed::Nothing), (Esa::ORDINARY, range(1, 0, 1)), (Esa::FULL, range(1, 10, 1))];
    assert_eq!(seen, expected);
    assert_eq!(host.queue.start(), Err(Status::CDQ_FULL), "nothing was given back");
    quiet(host.take(true).1);
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.flush());
    assert!(host.take(true).0.is_empty(), "the log goes on with a start alone");
    quiet(host.queue.start().expect("start"));
    assert_eq!(host.marks(true), [Esa::FIRST]);
}

#[test]
fn the_end_of_a_log_finds_room_in_a_queue_that_is_all_but_full() {
    for stop in [false, true] {
        let mut host = Host::new(4);
        quiet(host.queue.start().expect("start"));
        quiet(host.queue.changed(1, 0, 1, false));
        quiet(host.queue.flush());
        quiet(if stop { host.queue.stop() } else { host.queue.suspended() });
        let end = if stop { Esa::STOPPED } else { Esa::SUSPENDED };
        assert_eq!(host.marks(false), [Esa::FIRST, Esa::ORDINARY, end]);
    }
}

#[test]
fn a_resume_without_room_is_told_when_the_head_moves() {
    let mut host = Host::new(4);
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.suspended());
    quiet(host.queue.resumed());
    assert!(host.queue.logging());
    assert_eq!(host.marks(false), [Esa::FIRST, Esa::ORDINARY, Esa::SUSPENDED]);
    // Again, with FIRST still waiting, and once more so that an end waits behind it.
    quiet(host.queue.suspended());
    quiet(host.queue.resumed());
    quiet(host.queue.suspended());
    quiet(host.queue.set_head(1, None).expect("head"));
    assert!(host.take(false).0.is_empty(), "one slot is not enough for a log");
    quiet(host.queue.set_head(2, None).expect("head"));
    assert_eq!(host.marks(true), [Esa::FIRST, Esa::SUSPENDED]);
}

#[test]
fn a_change_that_cannot_be_told_is_a_hole_and_never_silent() {
    let mut host = Host::new(4);
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.suspended());
    quiet(host.queue.resumed());
    quiet(host.queue.changed(1, 50, 1, false));
    full(host.queue.flush());
    assert!(!host.queue.logging());
    assert_eq!(host.marks(true), [Esa::FIRST, Esa::ORDINARY, Esa::SUSPENDED]);
    assert_eq!(host.marks(true), [Esa::FULL]);
    // A change in a suspension breaks the promise of SUSPENDED.
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.suspended());
    full(host.queue.changed(1, 0, 1, false));
    assert_eq!(host.marks(true), [Esa::FIRST, Esa::SUSPENDED, Esa::FULL]);
}

#[test]
fn heads_and_triggers_are_checked() {
    let mut host = Host::new(8);
    let invalid = Err(Status::INVALID_FIELD.with_dnr());
    assert_eq!(host.queue.set_head(1, None), invalid, "empty: the head may not move");
    assert_eq!(host.queue.set_head(0, Some(8)), invalid);
    assert_eq!(host.queue.feature(), (false, 0, 0));
    quiet(host.queue.set_head(0, Some(3)).expect("arm"));
    assert_eq!(host.queue.feature(), (true, 0, 3));
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.flush());
    for bad in [3, 7, 8, u32::MAX] {
        assert_eq!(host.queue.set_head(bad, None), invalid, "{bad}");
    }
    quiet(host.queue.set_head(2, None).expect("all consumed"));
    assert_eq!(host.queue.set_head(1, None), invalid, "backwards");
    assert_eq!(host.queue.feature(), (false, 2, 0), "disarmed");
}

#[test]
fn the_tail_trigger_fires_once_by_either_reading() {
    // Armed at head + 1 on an empty queue: the first entry; armed at the head: the same.
    for trigger in [1, 0] {
        let mut host = Host::new(4);
        quiet(host.queue.set_head(0, Some(trigger)).expect("arm"));
        assert!(host.queue.start().expect("start").tail_event);
        assert_eq!(host.queue.feature(), (false, 0, 0));
        quiet(host.queue.stop());
    }
    let mut host = Host::new(4);
    quiet(host.queue.set_head(0, Some(3)).expect("arm"));
    quiet(host.queue.start().expect("start"));
    quiet(host.queue.changed(1, 0, 1, false));
    quiet(host.queue.flush());
    assert!(host.queue.stop().tail_event, "the tail is at 3");
    assert_eq!(host.marks(true).len(), 3);
    quiet(host.queue.set_head(3, Some(0)).expect("arm"));
    assert!(host.queue.start().expect("start").tail_event, "the tail has wrapped");
    quiet(host.queue.stop());
}

/// A list of `pages` page addresses in chained list pages from `BASE`; the pages of the queue come in falling order.
fn scattered(pages: usize) -> (AddressSpace, DmaBuffer) {
    let lists = 4;
    let (space, memory) = space(lists + pages);
    let slot = |list: usize, slot: usize| list * PAGE + slot * 8;
    let (mut list, mut at) = (0, 0);
    for page in 0..pages {
        if at == 511 && pages - page > 1 {
            memory.arena().store64(slot(list, at), BASE + ((list + 1) * PAGE) as u64, Ordering::Relaxed);
            (list, at) = (list + 1, 0);
        }
        let address = BASE + ((lists + pages - 1 - page) * PAGE) as u64;
        memory.arena().store64(slot(list, at), address, Ordering::Relaxed);
        at += 1;
    }
    (space, memory)
}

#[test]
fn a_prp_list_is_followed_over_its_pages() {
    for pages in [1, 2, 511, 512, 513, 1022, 1023, 1024] {
        let (space, memory) = scattered(pages);
        let bytes = (pages * PAGE - UDMQ_ENTRY_BYTES) as u64;
        let cdq = CdqMemory::from_prp_list(&space.reader(), BASE, bytes, 1024).expect("queue");
        assert_eq!(cdq.ranges(), pages);
        let slots = (bytes / UDMQ_ENTRY_BYTES as u64) as u32;
        cdq.store(slots - 1, &UdmqEntry::range(9, 1, 0, false));
        let at = 4 * PAGE + PAGE - 2 * UDMQ_ENTRY_BYTES;
        assert_eq!(memory.arena().load32(at, Ordering::Relaxed), 9, "{pages}: the last slot is in the lowest page");
    }
}

#[test]
fn queue_memory_of_a_hostile_host_is_refused() {
    let (space, memory) = scattered(600);
    let reader = space.reader();
    let contiguous = |prp1, bytes| CdqMemory::contiguous(&reader, prp1, bytes).err();
    let list = |prp1, bytes, most| CdqMemory::from_prp_list(&reader, prp1, bytes, most).err();
    let (offset, field) = (Status::PRP_OFFSET_INVALID.with_dnr(), Status::INVALID_FIELD.with_dnr());
    let missing = Status::DATA_TRANSFER_ERROR.with_dnr();
    assert_eq!(contiguous(BASE + 32, 4096), Some(offset));
    assert_eq!(contiguous(BASE, 4100), Some(field));
    assert_eq!(contiguous(BASE, 0), Some(field));
    assert_eq!(contiguous(0, 4096), Some(missing));
    assert_eq!(contiguous(u64::MAX - 0xfff, 1 << 20), Some(missing));
    assert_eq!(contiguous(BASE, 1 << 30), Some(missing));
    assert_eq!(list(BASE + 8, 4096, 9), Some(offset));
    assert_eq!(list(BASE, 600 << 12, 599), Some(field));
    assert_eq!(list(0, 4096, 9), Some(missing));
    memory.arena().store64(511 * 8, BASE + 0x1008, Ordering::Relaxed);
    assert_eq!(list(BASE, 600 << 12, 600), Some(offset), "the next list page");
    memory.arena().store64(511 * 8, BASE, Ordering::Relaxed);
    assert_eq!(list(BASE, 600 << 12, 600), None, "a list that is its own next page ends with the queue");
    memory.arena().store64(8, BASE + 4, Ordering::Relaxed);
    assert_eq!(list(BASE, 600 << 12, 600), Some(offset));
    memory.arena().store64(8, 1 << 39, Ordering::Relaxed);
    assert_eq!(list(BASE, 600 << 12, 600), Some(missing));
}

#[test]
fn memory_that_is_unmapped_is_noticed() {
    let (space, _memory) = space(2);
    let mut reader = space.reader();
    let mut cdq = CdqMemory::contiguous(&reader, BASE, 8192).expect("queue");
    assert!(cdq.renew(&reader));
    let _gone = space.unmap(BASE).expect("unmap");
    assert!(reader.refresh());
    assert!(!cdq.renew(&reader));
}

#[test]
fn a_queue_too_small_for_a_log_never_begins_one() {
    for slots in 1..MIN_SLOTS {
        let mut host = Host::new(slots);
        assert_eq!(host.queue.start(), Err(Status::CDQ_FULL));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Start,
    Stop,
    Suspend,
    Resume,
    Change(u64, u64),
    Flush,
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Start),
        1 => Just(Step::Stop),
        1 => Just(Step::Suspend),
        1 => Just(Step::Resume),
        8 => (0u64..64, 1u64..5).prop_map(|(slba, blocks)| Step::Change(slba, blocks)),
        3 => Just(Step::Flush),
        4 => Just(Step::Drain),
    ]
}

proptest! {
    /// Between FIRST and an end that is not FULL, the host has seen every change; a log that lost one ends with FULL.
    #[test]
    fn the_log_is_complete_or_says_that_it_is_not(slots in 3u32..9, steps in prop::collection::vec(step(), 1..200)) {
        let mut host = Host::new(slots);
        let mut told = std::collections::BTreeSet::new();
        let mut seen = std::collections::BTreeSet::new();
        let (mut on, mut suspended, mut was_full) = (false, false, false);
        for step in steps.into_iter().chain([Step::Flush, Step::Drain, Step::Drain]) {
            let result = match step {
                Step::Start if suspended => Ok(PostResult::default()),
                Step::Start => host.queue.start().inspect(|_| {
                    on = true;
                    was_full = false;
                    told.clear();
                    seen.clear();
                }),
                Step::Stop if suspended => Ok(PostResult::default()),
                Step::Stop => { on = false; Ok(host.queue.stop()) }
                Step::Suspend => { suspended = true; Ok(host.queue.suspended()) }
                Step::Resume => { suspended = false; Ok(host.queue.resumed()) }
                Step::Change(..) if suspended || !on => Ok(PostResult::default()),
                Step::Change(slba, blocks) => {
                    told.extend(slba..slba + blocks);
                    Ok(host.queue.changed(1, slba, blocks, false))
                }
                Step::Flush => Ok(host.queue.flush()),
                Step::Drain => {
                    let (entries, result) = host.take(true);
                    for entry in entries {
                        if let Changed::Range { slba, blocks, .. } = entry.changed() {
                            seen.extend(slba..slba + blocks);
                        }
                    }
                    Ok(result)
                }
            };
            was_full |= result.is_ok_and(|result| result.full_event);
        }
        prop_assert!(was_full || told.is_subset(&seen), "{told:?} {seen:?}");
    }
}
