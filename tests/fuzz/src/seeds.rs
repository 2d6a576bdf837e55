//! Inputs to begin with: whole sessions of each target, written down as the bytes that its decoder reads.

/// Sessions of the controller: a flag byte, then steps.
#[must_use]
pub fn controller() -> Vec<Vec<u8>> {
    // A step of a whole I/O command: step, queue, kind, NSID, SLBA, blocks, two addresses, kind of pointer. Where any command
    // may come, "a whole one" is a byte before the kind.
    let whole = |kind: u8, slba: u8, blocks: u8| vec![0, 0, kind, 0, slba, blocks, 12, 0, 13, 0, 0];
    let io = |kind: u8, slba: u8, blocks: u8| vec![0, 0, 0, kind, 0, slba, blocks, 12, 0, 13, 0, 0];
    let admin = |which: u8, rest: &[u8]| [&[7, which], rest, &[12, 0, 13, 0, 0]].concat();
    let host = |which: u8, rest: &[u8]| [&[0x87, which], rest, &[20, 0, 21, 0, 0]].concat();
    let all_io: Vec<u8> = (0..8).flat_map(|kind| io(kind, kind * 3, 7)).collect();
    let all_whole: Vec<u8> = (0..8).flat_map(|kind| whole(kind, kind * 3, 7)).collect();
    let all_admin: Vec<u8> = (0..18).flat_map(|which| admin(which, &[1, 1, 0, 0, 0])).collect();
    let log: Vec<u8> = [
        host(13, &[0, 1, 0, 0, 1]),
        host(13, &[5, 1, 1, 0]),
        io(0, 9, 3),
        io(0, 40, 3),
        host(13, &[3, 1, 0, 2, 0]),
        host(13, &[9, 1, 0, 0]),
        host(13, &[12, 1, 1, 1, 0, 100]),
        host(13, &[10, 1]),
    ]
    .concat();
    // A PRP list that is its own next page, and a read through it.
    let looped = [&[17u8, 96, 0, 1, 12, 0][..], &[0, 0, 0, 2, 0, 0, 39, 12, 0, 12, 0, 0]].concat();
    let later: Vec<u8> = [vec![22, 0, 1], io(0, 1, 30), io(2, 1, 30), vec![20], vec![28], vec![22, 0, 4], vec![30, 9]].concat();
    let meddled: Vec<u8> = [vec![24, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8, 25, 0, 48, 7, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], all_io.clone()].concat();
    // Eight blocks up to the namespace's end, and one beyond it.
    let at_the_end: Vec<u8> = (0..7).flat_map(|kind| [io(kind, 192, 7), io(kind, 193, 7)]).flatten().collect();
    let whole_at_the_end: Vec<u8> = (0..7).flat_map(|kind| [whole(kind, 192, 7), whole(kind, 193, 7)]).flatten().collect();
    // Ranges of Copy: four blocks to the end, and over it.
    let copied: Vec<u8> = [196, 198].iter().flat_map(|to| [21, 96, 3, 2, 5, 0, 0, 0, 5, 0, *to, 0, 12, 0, 0, 0, 0]).collect();
    // An SGL data block of which four bytes are mapped, for a read and a write; a completion queue that lies so.
    let beyond = |kind: u8| [0, 0, 0, kind, 0, 0, 7, 0x10, 0xc0, 0, 0, 201, 220, 0x00, 0x10, 0];
    let beyond = [&beyond(2)[..], &beyond(0), &[7, 1, 200, 0, 3, 220, 0xff, 0, 0x10, 0xc0, 1, 12, 0, 13, 0, 0]].concat();
    // A read into memory that is unmapped while the media holds the operation.
    let unmapped = [22u8, 0, 9, 0, 0, 0, 2, 0, 9, 7, 0x01, 0xa0, 0x01, 0xa0, 0, 20, 30, 9, 22, 0, 1, 30, 9, 30, 9];
    // Five pages by a PRP list that begins in the last two slots of a page.
    let chained = [17u8, 96, 0, 1, 14, 0, 17, 112, 0, 1, 15, 0, 0, 0, 0, 2, 0, 0, 39, 13, 0, 0xff, 0x4c, 0];
    let edges = [&copied[..], &beyond, &unmapped, &chained].map(<[u8]>::to_vec);
    let edges = edges.into_iter().map(|steps| [&[0], &steps[..]].concat());
    [(0u8, &at_the_end), (2, &whole_at_the_end), (0, &all_io), (0, &all_admin), (1, &log), (0, &looped), (0, &later), (2, &all_whole), (0xe0, &all_io), (8, &all_admin), (0, &meddled), (3, &log)]
        .into_iter()
        .map(|(flags, steps)| [&[flags][..], steps].concat())
        .chain(edges)
        .collect()
}

/// Sessions of the driver: a flag byte, then steps.
#[must_use]
pub fn driver() -> Vec<Vec<u8>> {
    let io: Vec<u8> = (0..6).flat_map(|i| [10, 0, i, 1, 0, 0, 220, 0, 16, 1]).collect();
    let lies = |which: u8, rest: &[u8]| [&[27, 15, 1, 0, 0, 0, 10, 0, 1, 0, 1, 29, 0, 0, which], rest, &[29, 3, 27, 29, 3]].concat();
    let queue = [20u8, 64, 0, 1, 29, 4, 0, 10, 0, 9, 8, 1, 0, 0, 0, 21, 0, 0, 9, 21, 0, 3, 4, 29, 3, 21, 0, 5, 1, 21, 0, 6, 0, 29, 3];
    let mut all = vec![[&[0][..], &io, &[29, 7]].concat(), [&[0][..], &queue].concat(), vec![4, 29, 7, 29, 7]];
    all.extend((0..16).map(|which| [&[0][..], &lies(which, &[1, 1, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4])].concat()));
    all.extend((0..9).map(|which| vec![0, 18, which, 1, 29, 5, 19, which, 200, 27, 29, 2, 0, 5, 0, 0xff, 1, 2, 3, 27, 29, 5]));
    // A reset, Identify answered as it should be, then far more queues granted than were asked for.
    let good = [0u8, 5, 0, 0, 29, 1];
    all.push([&[0, 27, 24, 29, 7, 29, 7, 29, 7][..], &good, &good, &[0, 5, 0, 1, 226, 0xff, 0, 0xff, 0, 29, 1, 27, 29, 7]].concat());
    // A completion with the CID of a command that has ended, then with another queue's SQID; one with a reserved status code type.
    for (wrong, rest) in [(129u8, [0, 32, 0, 0]), (65, [0, 3, 0, 0]), (9, [1, 4, 0, 0])] {
        let end = [&[0u8, 5, 0, wrong][..], &rest].concat();
        all.push([&[0, 29, 4, 10, 0, 0, 1, 0, 0, 220, 0, 16, 1, 29, 1, 27, 10, 0, 0, 1, 0, 0, 220, 0, 16, 1, 29, 1][..], &end, &[29, 1, 27, 29, 3]].concat());
    }
    // A controller state of 24,048 bytes, read.
    all.push([&[0u8, 0, 13, 16, 0x70, 0x17][..], &[0; 14], &[18, 7, 1, 29, 7, 29, 7, 29, 7]].concat());
    all.push([&[1][..], &io, &[28, 231, 28, 231, 28, 231]].concat());
    all.push([&[0, 25, 1][..], &io, &[0, 3, 1, 0, 28, 231, 29, 3, 24, 29, 7]].concat());
    all
}

/// Configurations: the one in the tree, small ones, broken ones.
#[must_use]
pub fn config() -> Vec<Vec<u8>> {
    let small = concat!(
        "[[subsystem]]\nname = \"a\"\nnqn = \"nqn.x:a\"\nserial = \"S1\"\n",
        "[[subsystem.namespace]]\nnsid = 1\nbacking = \"memory\"\nsize = \"1MiB\"\nnguid = \"000000000000000000000000000000a1\"\n",
        "[[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n",
        "[[subsystem.controller]]\ncntlid = 2\nrole = \"migratable\"\nnamespaces = [1]\n",
        "[[subsystem]]\nname = \"b\"\nnqn = \"nqn.x:b\"\nserial = \"S1\"\n",
        "[[subsystem.namespace]]\nnsid = 1\nbacking = \"file\"\npath = \"b.img\"\nsize = \"1MiB\"\n",
        "nguid = \"000000000000000000000000000000a1\"\n[[subsystem.controller]]\ncntlid = 1\nrole = \"management\"\n",
        "[migration]\nfrom = \"a\"\nto = \"b\"\n",
        "[policy.cdq]\ncomponent = \"native\"\n[policy.tracking]\ncomponent = \"native\"\n[policy.copy]\ncomponent = \"native\"\n",
    );
    let changed = [
        ("S1", ""),
        ("1MiB", "1MB"),
        ("1MiB", "5B"),
        ("\"1MiB\"", "7"),
        ("= 2", "= 1"),
        ("[1]", "[9]"),
        ("\"b\"", "\"a\""),
        ("to = \"b\"", "to = \"c\""),
        ("native", "x.wasm"),
        ("nsid = 1", "nsid = 0"),
        ("serial", "serail"),
        ("management", "manager"),
        ("\"b.img\"", "\"\""),
        ("a1\"", "zz\""),
        ("1MiB\"", "1MiB\"\nblock = \"512B\"\nshared = true"),
        // Each with one thing that only a check can refuse.
        ("1MiB\"", "1MiB\"\nblock = \"1KiB\""),
        ("00000000a1\"", "0000000a1\""),
        ("0000000000a1\"", "0000000000000\""),
        ("000000000000000000000000000000a1", "00000000000000000000000000000000"),
        ("000000000000000000000000000000a1", "+00000000000000000000000000000a1"),
        ("to = \"b\"", "to = \"a\""),
        ("nsid = 1\nbacking = \"file\"", "nsid = 1025\nbacking = \"file\""),
        ("nsid = 1\nbacking = \"file\"", "nsid = 0\nbacking = \"file\""),
        ("namespaces = [1]", "namespaces = [1, 0]"),
        ("[[subsystem.controller]]", "[[subsystem.namespace]]\nnsid = 1\nbacking = \"memory\"\nsize = \"1MiB\"\nnguid = \"000000000000000000000000000000a2\"\n[[subsystem.controller]]"),
        ("serial = \"S1\"", "serial = \"123456789012345678901\""),
        ("serial = \"S1\"", "serial = \"S1\"\nmodel = \"\u{b5}\""),
        ("cntlid = 2\nrole = \"migratable\"", "cntlid = 2\nrole = \"management\""),
        ("[[subsystem.controller]]", "[[subsystem.controller]]\ncntlid = 3\nrole = \"migratable\"\nnamespaces = [1]\n[[subsystem.controller]]"),
        ("[policy.cdq]", "[policy.cdq]\nsha256 = \"00\""),
        ("to = \"b\"", "to = \"b\"\ndowntime = \"12.5ms\"\nmax-time = \"90s\""),
        ("[migration]", "[core]\nidle = \"spin\"\n[guest]\nqueue-depth = 65536\n[migration]\ndowntime = \"1.5ms\""),
    ];
    let mut all = vec![small.as_bytes().to_vec(), include_bytes!("../../../appliance.toml").to_vec()];
    all.extend(changed.iter().map(|(from, to)| small.replacen(from, to, 1).into_bytes()));
    all
}

/// Sessions of controller state: flags, late commands, edits, pieces.
#[must_use]
pub fn state() -> Vec<Vec<u8>> {
    // No late commands; then one edit with its number and values; all parts; one piece; resume.
    let edited = (0..32u8).map(|which| [&[0u8, 0, 1, which, 0][..], &[1; 8], &[0, 0, 0, 0]].concat());
    let mut all: Vec<Vec<u8>> = edited.collect();
    // Completion queues in memory that may only be read: of a queue pair, and the admin queue's.
    all.push(vec![0, 0, 1, 6, 0, 205, 0, 0, 0, 0]);
    all.push(vec![0, 0, 1, 21, 0, 205, 0, 0, 0, 0]);
    all.push(vec![0, 3, 0, 5, 1, 1, 1, 6, 1, 0, 0, 7, 0, 0, 0, 0, 0, 2, 8, 0, 40, 0]);
    all.push(vec![4, 0, 0, 2, 16, 0, 64, 0]);
    all.push(vec![2, 0, 0, 0, 0, 0]);
    all.push(vec![12, 0, 3, 60, 0, 0xff, 70, 0, 1, 9, 0, 4]);
    all.push(vec![0x14, 0, 4, 0, 1, 0, 8, 1, 1, 5, 2, 20, 9, 1, 1, 0, 0, 30]);
    all
}

/// Sessions of policies: flags, then reports, answers and what follows from them.
#[must_use]
pub fn policy() -> Vec<Vec<u8>> {
    let report = [0u8, 3, 0, 8, 10, 0, 0, 7, 20, 0, 200, 1, 5, 0, 0, 9, 99, 0];
    let answer = |bytes: &[u8]| [&[3, bytes.len() as u8][..], bytes].concat();
    let drains = [6u8, 6, 6];
    // The copy: ask, take some; the tracking plan.
    let copies = [10u8, 5, 5, 1, 1, 1, 1, 0, 12, 9, 9, 0, 0, 0, 0, 0, 1, 1, 12, 15];
    let session = |flags: u8, bytes: &[u8]| [&[flags][..], &answer(bytes), &report, &drains, &copies].concat();
    vec![
        session(0, &[0, 0, 0, 0, 0, 0, 1, 0, 5, 9, 0]),
        session(0, &[0, 1, 255, 0, 0, 0]),
        session(2, &[255]),
        session(0, &[254]),
        session(2, &[251]),
        session(1, &[0, 0, 0, 8, 231, 231, 2, 0, 0, 231, 0, 200, 3, 4, 1, 230]),
        session(0, &[0, 0, 3, 0xf0, 0, 0, 0]),
        session(0, &[0, 1, 0, 0, 231, 231]),
        [&[0][..], &answer(&[0, 3, 0, 10, 40, 0, 200, 2, 7, 0]), &report, &[14, 0, 14, 1, 14, 2], &drains, &copies].concat(),
        [&[0][..], &answer(&[0, 0x83, 1, 2, 0x84, 0x0f, 3, 2, 1]), &[9, 0, 0, 0, 0, 1, 1, 1, 0], &copies].concat(),
    ]
}
