use super::*;

#[test]
fn a_checksum_tells_every_byte_and_the_length() {
    let memory = DmaBuffer::allocate("sum", 3 * PAGE, Pages::Small).expect("memory");
    let arena = memory.arena();
    let zero = checksum(arena, 0, 2 * PAGE);
    assert_ne!(zero, checksum(arena, 0, 3 * PAGE));
    for at in [0, 1, PAGE - 1, PAGE, 2 * PAGE - 1] {
        arena.store8(at, 1, std::sync::atomic::Ordering::Relaxed);
        assert_ne!(checksum(arena, 0, 2 * PAGE), zero, "byte {at}");
        arena.store8(at, 0, std::sync::atomic::Ordering::Relaxed);
    }
    assert_eq!(checksum(arena, PAGE, 2 * PAGE), zero);
}

#[test]
fn tags_find_their_slot_and_no_other_use_of_it() {
    let tag = slot::tag(255, u32::MAX);
    assert_eq!((slot::index(tag), slot::generation(tag)), (255, u32::MAX));
    assert!(!is_flush(tag) && is_flush(FLUSH_TAG));
}
