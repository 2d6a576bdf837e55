use super::*;
use crate::destination::{LocalDestination, LocalFeatures};
use crate::media::Geometry;
use crate::tests::fake::{BLOCK, Drive, FakeQueue};

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

const BLOCKS: u64 = 256;

fn engine(read_ns: u64, write_ns: u64) -> (Drive, Drive, Engine, Media, Extents) {
    let log = std::sync::Arc::default();
    let (source, destination) = (Drive::new("s", 0, &[1], BLOCKS, &log), Drive::new("d", 0, &[1], BLOCKS, &log));
    (source.lock().delay, destination.lock().delay) = (read_ns, write_ns);
    let features = LocalFeatures::default();
    let local = LocalDestination::new(Box::new(FakeQueue::new(&destination)), AddressSpace::default(), features);
    let queue = Box::new(FakeQueue::new(&source));
    let engine = Engine::new(queue, &AddressSpace::default(), Box::new(local), CopyConfig::default()).expect("engine");
    let geometry = Geometry { source: 1, destination: 1, blocks: BLOCKS, block_bytes: BLOCK as u32 };
    let media = Media::new(&[geometry]).expect("media");
    (source, destination, engine, media, Extents::default())
}

/// Rule 1, at each moment of a copy: a change then leaves the block dirty, so that the last writer wins.
#[test]
fn a_change_at_any_moment_of_a_copy_is_copied_again() {
    for moment in 0..60 {
        let (source, destination, mut engine, mut media, mut extents) = engine(20_000, 20_000);
        source.lock().media.fill(1);
        media.plan(&[]);
        media.namespace(0).expect("namespace").mark(0, 8);
        extents.sweep();
        for poll in 0..200 {
            if poll == moment {
                source.lock().media[..BLOCK].fill(2);
                media.namespace(0).expect("namespace").mark(0, 1);
            }
            engine.poll(Time(poll * 1000), &mut media, Some(&mut extents));
        }
        assert!(media.is_clean() && engine.in_flight() == 0);
        assert!(destination.lock().media[..BLOCK].iter().all(|&byte| byte == 2), "moment {moment}");
    }
}

/// Rule 2: blocks that are dirtied and ordered again while their copy is under way wait, whatever the chunks.
#[test]
fn a_block_is_never_in_two_copies() {
    let (source, destination, mut engine, mut media, mut extents) = engine(2_000, 50_000);
    media.plan(&[]);
    extents.sweep();
    for poll in 0..3000u64 {
        if poll < 1500 {
            let slba = poll * 37 % 240;
            source.lock().media[slba as usize * BLOCK..(slba as usize + 9) * BLOCK].fill(poll as u8);
            media.namespace(0).expect("namespace").mark(slba, 9);
            media.plan(&[(poll % 7) as u8]);
        }
        engine.poll(Time(poll * 1000), &mut media, Some(&mut extents));
    }
    assert!(media.is_clean() && engine.in_flight() == 0);
    assert_eq!((source.lock().overlaps, destination.lock().overlaps), (0, 0));
    assert!(source.lock().media == destination.lock().media);
}

/// Rule 4: a zero range is left out only where the destination has proved to read zero and has not been written.
#[test]
fn zeroes_are_left_out_only_where_they_are_proved() {
    let (source, destination, _, mut media, mut extents) = engine(0, 0);
    let features = LocalFeatures { reads_zero: true, ..LocalFeatures::default() };
    let local = LocalDestination::new(Box::new(FakeQueue::new(&destination)), AddressSpace::default(), features);
    let queue = Box::new(FakeQueue::new(&source));
    let mut engine = Engine::new(queue, &AddressSpace::default(), Box::new(local), CopyConfig::default()).expect("engine");
    media.plan(&[]);
    extents.sweep();
    let mut copy = |fill: u8, media: &mut Media, engine: &mut Engine| {
        source.lock().media.fill(fill);
        media.namespace(0).expect("namespace").mark(0, BLOCKS);
        for poll in 0..50 {
            engine.poll(Time(poll), media, Some(&mut extents));
        }
        assert!(media.is_clean());
    };
    copy(0, &mut media, &mut engine);
    let skipped = engine.stats().skipped;
    assert_eq!(skipped, BLOCKS * BLOCK as u64);
    copy(3, &mut media, &mut engine);
    copy(0, &mut media, &mut engine);
    assert_eq!(engine.stats().skipped, skipped, "written meanwhile: the zeroes go out");
    assert!(destination.lock().media.iter().all(|&byte| byte == 0));
}

/// A mark is no zero: once the source has zeroes there, they go out and end the mark.
#[test]
fn zeroes_are_not_left_out_where_a_mark_was_made() {
    let (source, destination, _, mut media, mut extents) = engine(0, 0);
    let features = LocalFeatures { reads_zero: true, write_uncorrectable: true, ..LocalFeatures::default() };
    let local = LocalDestination::new(Box::new(FakeQueue::new(&destination)), AddressSpace::default(), features);
    let config = CopyConfig { on_media_error: OnMediaError::Mark, ..CopyConfig::default() };
    let queue = Box::new(FakeQueue::new(&source));
    let mut engine = Engine::new(queue, &AddressSpace::default(), Box::new(local), config).expect("engine");
    media.plan(&[]);
    extents.sweep();
    let mut copy = |media: &mut Media| {
        media.namespace(0).expect("namespace").mark(0, 8);
        for poll in 0..200 {
            engine.poll(Time(poll), media, Some(&mut extents));
        }
        assert!(media.is_clean());
        engine.uncorrectable().to_vec()
    };
    source.lock().unreadable.insert(3);
    assert_eq!(copy(&mut media), [Uncorrectable { nsid: 1, lba: 3 }]);
    assert!(destination.lock().unreadable.contains(&3));
    source.lock().unreadable.clear();
    assert_eq!(copy(&mut media), []);
    assert!(destination.lock().unreadable.is_empty(), "the block reads as zeroes at the source");
}

/// A queue that died before its first command has nothing to give back: the engine says so all the same.
#[test]
fn a_source_that_died_idle_is_noticed() {
    let (source, _, mut engine, mut media, mut extents) = engine(0, 0);
    media.plan(&[]);
    extents.sweep();
    source.lock().queue_epoch += 1;
    engine.poll(Time(1), &mut media, Some(&mut extents));
    assert_eq!(engine.error(), Some(CopyError::SourceDead));
}
