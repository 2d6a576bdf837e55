//! Inputs to begin with of the targets at exports: whole sessions, written down as the bytes that their decoders read.

/// Sessions of the NVMe/TCP target: a flag byte, then steps.
#[must_use]
pub fn nvme_tcp() -> Vec<Vec<u8>> {
    // An I/O command on the second peer: step, peer, kind, which, NSID, SLBA, blocks, how its data comes.
    let io = |which: u8, slba: u8, blocks: u8, how: u8| vec![16, 1, 0, which, 0, slba, blocks, 0, how];
    let admin = |which: u8, rest: &[u8], how: u8| [&[13, 0, which], rest, &[how]].concat();
    let all_io: Vec<u8> = (0..8).flat_map(|kind| [io(kind, kind * 3, 3, 0), io(kind, kind * 3, 3, 8), vec![20, 1, 200, 7]]).flatten().collect();
    let pages: Vec<u8> = (0..8).flat_map(|cns| admin(0, &[cns, 0, 2, 0], 8)).collect();
    let all_admin: Vec<u8> = (0..12).flat_map(|which| admin(which, &[1, 1, 0, 0, 0, 0], 8)).collect();
    let silent = [vec![26, 1], io(2, 0, 31, 8), io(2, 0, 31, 8), io(2, 0, 31, 8), vec![2, 235, 4, 26, 1]].concat();
    let late = [vec![1, 1], io(0, 4, 3, 0), io(2, 4, 3, 8), vec![1, 9], io(2, 9, 3, 8), vec![27, 1, 5, 9, 1, 0]].concat();
    let reset = [io(0, 4, 3, 8), vec![11, 0, 0, 150, 7, 15, 11, 0, 0, 0, 7, 15], pages.clone()].concat();
    let shut_down = [vec![11, 0, 0, 180, 7, 15], pages.clone(), all_admin.clone()].concat();
    let broken: Vec<u8> = (0..24).flat_map(|place| [0, 8, 0, 0, 23, 0, 0, 0, 3, 0, 4, 0, 7, 0, place, 0xff, 0]).collect();
    let words: Vec<u8> = (0..12).flat_map(|kind| [0, 8, 0, 0, 22, 2, 24, kind, 0, 24, 0, 24, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 27, 2]).collect();
    let discovery: Vec<u8> =
        [&[0, 8, 0, 0, 9, 0, 0, 0, 1, 1, 4, 11, 0, 0, 0][..], &admin(8, &[0, 255, 0], 8), &admin(6, &[], 8), &admin(0, &[1, 0, 2, 0], 8)].concat();
    // Twelve log pages of 32 KiB for a host that reads none.
    let log = admin(8, &[0, 249, 0, 0x38, 233], 0);
    let slow: Vec<u8> = [&[0, 8, 0, 0, 9, 0, 0, 0, 1, 1, 4, 11, 0, 0, 0, 7, 9, 26, 0][..], &log[..log.len() - 1].repeat(12), &[7, 15, 2, 235, 4]].concat();
    let secret: Vec<u8> = [vec![0, 8, 0, 0, 9, 0, 0x13, 0, 1, 0, 4], [24, 0, 0].repeat(7), vec![24, 0, 7], pages.clone()].concat();
    let stray = [io(0, 4, 3, 8), vec![21, 1, 1, 0, 200, 1]].concat();
    let hasty = [vec![0, 0, 0], [8, 0, 3, 9, 0, 0x03, 0, 1, 0, 4, 28, 0].to_vec(), vec![2, 205]].concat();
    let cut: Vec<u8> = (0..20).flat_map(|byte| [0, 8, 2, 0, 30, 2, 0, 0, byte * 6, 0]).collect();
    let sessions: [(u8, &[u8]); 23] = [
        (0, &all_io),
        (12, &all_io),
        (4, &all_io),
        (2, &all_io),
        (0, &pages),
        (8, &all_admin),
        (0, &silent),
        (0, &late),
        (12, &late),
        (0, &reset),
        (0, &shut_down),
        (1, &broken),
        (1, &words),
        (1, &discovery),
        (1, &secret),
        (0, &stray),
        (1, &hasty),
        (1, &cut),
        (0, &[3, 1, 16, 1, 0, 2, 0, 0, 3, 0, 8, 3, 0]),
        (0, &[29, 1, 7, 9, 9, 1, 3, 1, 1, 0, 4]),
        (1, &[0, 0, 0, 0, 2, 225, 0, 0, 0, 2, 250]),
        (0, &[2, 250, 2, 250, 7, 15]),
        (1, &slow),
    ];
    sessions.iter().map(|(flags, steps)| [&[*flags][..], steps].concat()).collect()
}

/// Sessions of the vfio-user server: a flag byte, then steps.
#[must_use]
pub fn vfio_user() -> Vec<Vec<u8>> {
    // A command in the client's memory: step, queue and kind, SLBA, blocks, two pages.
    let nvme = |bits: u8, slba: u8, blocks: u8| vec![24, bits, slba, blocks, 8, 9];
    let all_nvme: Vec<u8> = (0..16).flat_map(|bits| nvme(bits, bits * 3, 7)).collect();
    let into_fixed: Vec<u8> = [0, 6].iter().flat_map(|kind| [24, 1 | kind, 3, 7, 0xc8, 0xc9]).collect();
    // A window: step, bits, offset, address, size; pages and what they come from.
    let map = |bits: u8, offset: u8, at: u8, pages: u8| vec![10, bits, 0, offset, 0, at, 0, pages];
    let windows: Vec<u8> = [vec![13, 0], (0..12).flat_map(|n| map(0, n, n, 1)).collect(), vec![13, 2, 2, 2, 13, 2, 5, 1, 13, 2, 30, 2], map(0, 1, 1, 3), map(0, 1, 1, 3), map(5, 0, 0, 1)].concat();
    let kinds: Vec<u8> = (0..8).flat_map(|kind| map(kind << 3, 0, 28, 1)).collect();
    let to = |state: u8| vec![18, state << 3];
    let arcs: Vec<u8> = (0..5).flat_map(|from| (0..5).flat_map(move |next| [18, from << 3, 18, next << 3])).collect();
    let stream = [to(2), vec![18, 3, 220, 0, 4], vec![18, 3, 100], vec![18, 3, 220, 0, 4], to(3), vec![18, 4, 0, 8], to(0), to(1)].concat();
    let stream_changed = [to(2), vec![18, 3, 220, 0, 4], vec![18, 3, 220, 0, 4], to(3), vec![18, 0x84, 0, 8, 9, 0, 1], to(1), vec![21]].concat();
    let withheld = [vec![1, 5, 31], to(4), vec![18, 3, 50, 18, 3, 50, 1, 4, 0], to(2), vec![18, 3, 50, 21, 6, 0, 1, 1]].concat();
    let failing: Vec<u8> = (0..8).flat_map(|manner| [vec![1, manner, 2], to(4), to(2), to(1), to(3), to(0), vec![21]].concat()).collect();
    let left: Vec<u8> = (0..5).flat_map(|state| [vec![1, 1, 9], to(state), vec![6, 0, 1, 1]].concat()).collect();
    let start = [19u8, 5, 0, 1, 0, 2, 1, 0, 0, 0];
    let report = [19u8, 5, 2, 0, 0, 3, 0, 0, 1, 1, 100];
    let logging = [&start[..], &report, &[19, 5, 1, 1, 0, 0, 20], &start, &[6, 0, 1, 1], &start, &report].concat();
    let queries: Vec<u8> = (1..20).flat_map(|command| [22, command, 4, 231, 0, 0, 0, 0]).collect();
    let empty: Vec<u8> = (1..20).flat_map(|command| [22, command, 0, 1]).collect();
    let irqs: Vec<u8> = (0..4).flat_map(|kind| [14, kind << 2, 0, 2, 2, 0, 0, 1, 1]).chain([14, 8, 1, 1, 1, 0, 9, 14, 0, 0, 1, 0, 0]).collect();
    let regions: Vec<u8> = (0..8).flat_map(|region| [15, region, 1, 0, 15, 0x80 | region, 1, 0, 7, 0]).collect();
    let many = [17u8, 5, 0, 1, 2, 0, 0, 1, 1, 3, 0, 0, 1, 0, 3, 0, 4, 0, 9, 4, 0, 7];
    let cut_short = [nvme(1, 3, 7), vec![8, 4], nvme(1, 3, 7), nvme(7, 3, 7), vec![2, 5, 2, 5], vec![6, 0, 1, 1]].concat();
    let late = [vec![0, 9], nvme(1, 3, 7), nvme(7, 3, 7), vec![13, 0, 4, 9, 24, 7, 1, 1, 8, 9, 0, 1]].concat();
    let late_end = [vec![0, 9], nvme(7, 3, 7), vec![6, 9, 0, 1]].concat();
    let silent = [vec![7], (0..8).flat_map(|_| [15, 0x20, 0, 0, 221, 0, 16]).collect::<Vec<u8>>(), vec![7]].concat();
    let raw = [9u8, 1, 1, 0, 2, 1, 231, 0, 4, 1, 2, 3, 4, 5, 9, 0, 3, 1, 2, 3, 17, 6, 0, 1, 1];
    let sessions: [(u8, &[u8]); 33] = [
        (0, &all_nvme),
        (1, &all_nvme),
        (2, &all_nvme),
        (0, &into_fixed),
        (0, &windows),
        (16, &windows),
        (16, &kinds),
        (0, &arcs),
        (0, &stream),
        (0, &stream_changed),
        (0, &withheld),
        (0, &failing),
        (0, &left),
        (0, &logging),
        (0, &queries),
        (8, &queries),
        (0, &empty),
        (0, &irqs),
        (0, &regions),
        (1, &regions),
        (2, &regions),
        (0, &many),
        (2, &many),
        (0, &cut_short),
        (0, &late),
        (0, &late_end),
        (0, &silent),
        (0, &raw),
        (0, &[9, 0, 0, 3]),
        (0, &[6, 20, 1, 1, 6, 3, 0, 0, 6, 33, 1, 1]),
        (8, &[22, 5, 8, 231, 0, 0, 0, 0, 0, 0, 0, 0]),
        (0, &[21, 21, 0x75, 0x35, 0x35, 5, 9]),
        (16, &[14, 0x24, 0, 0, 0, 0, 14, 0x28, 0, 4, 5, 0, 0, 0, 0, 0, 0]),
    ];
    sessions.iter().map(|(flags, steps)| [&[*flags][..], steps].concat()).collect()
}
