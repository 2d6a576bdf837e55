//! The suite of the `cdq` role.

use super::{Bench, Dice, Finding, setups};
use crate::role::{Cdq, CdqQueue, CdqRequest, Role};
use crate::seam::{Factory, NamespaceInfo, Opening, Setup};

/// Largest batch that the host shows.
const FULL_BATCH: usize = 4096;

/// Runs the suite; an empty list is a pass.
pub fn suite_cdq(factory: &mut dyn Factory<Cdq>) -> Vec<Finding> {
    let mut bench = Bench::new(factory);
    for (name, setup) in setups() {
        for (kind, entry_bytes) in [(0, 32), (0, 64), (0xc0, 16)] {
            let extra =
                CdqQueue { id: 3, kind, cntlid: 2, slots: 8192, entry_bytes, phase_byte: entry_bytes - 1, phase_mask: 1 };
            let case = format!("{name}, kind {kind:#x}, entries of {entry_bytes} bytes");
            bench.begin(case, Opening { setup: setup.clone(), extra });
            batches(&mut bench, &setup, entry_bytes as usize);
        }
    }
    bench.findings
}

fn batches(bench: &mut Bench<'_, Cdq>, setup: &Setup, stride: usize) {
    let mut dice = Dice::new(setup.seed);
    let case = bench.case.clone();
    let mut last = CdqRequest::default();
    for (at, count) in [0, 1, 2, 63, 64, 512, FULL_BATCH, 3, 0].into_iter().enumerate() {
        for mix in [Mix::Adjacent, Mix::Random, Mix::Hostile] {
            bench.case = format!("{case}, batch of {count} ({mix:?})");
            let mut request = CdqRequest { now_us: 1000 + at as u64 * 50, waiting: dice.below(100) as u32, ..CdqRequest::default() };
            let phase = (at % 2) as u8;
            let mut next = 0;
            for index in 0..count {
                let entry = entry(&mut dice, setup, mix, phase, &mut next, index == 0);
                request.entries.extend_from_slice(&entry[..stride.min(32)]);
                request.entries.resize((index + 1) * stride, 0);
            }
            show(bench, &request);
            last = request;
        }
    }
    bench.case = case;
    bench.state(&last);
}

/// Shows a batch; what is named must be covered, and what is not given back comes again.
fn show(bench: &mut Bench<'_, Cdq>, request: &CdqRequest) {
    let Some(answer) = bench.ask(request) else { return };
    let Some(opening) = bench.opening.clone() else { return };
    if let Some(what) = Cdq::omission(&opening.setup, &opening.extra, request, &answer) {
        bench.found(what);
    }
    let stride = opening.extra.entry_bytes as usize;
    let rest = request.entries.get(answer.consumed as usize * stride..).unwrap_or_default().to_vec();
    if answer.consumed > 0 && !rest.is_empty() {
        bench.ask(&CdqRequest { now_us: request.now_us + 10, entries: rest, waiting: 0 });
    }
}

/// What a batch is made of.
#[derive(Clone, Copy, Debug)]
enum Mix {
    /// Mostly entries that follow one another.
    Adjacent,
    /// Anywhere within the namespaces, deallocated ones, whole namespaces and markers among them.
    Random,
    /// Any bytes: what a device may send that is wrong.
    Hostile,
}

fn entry(dice: &mut Dice, setup: &Setup, mix: Mix, phase: u8, next: &mut u64, first: bool) -> [u8; 32] {
    let pick = dice.below(setup.namespaces.len() as u64) as usize;
    let index = if matches!(mix, Mix::Adjacent) { 0 } else { pick };
    let NamespaceInfo { nsid, blocks: size, .. } = setup.namespaces[index];
    let mut fields = (nsid, dice.below(8.min(size)) as u32, dice.below(size), phase);
    match mix {
        Mix::Adjacent => {
            if dice.below(4) > 0 && *next < size {
                fields.2 = *next;
            }
            fields.3 |= (dice.below(16) == 0) as u8 * 0x20;
        }
        Mix::Random => match dice.below(32) {
            0 => fields = (nsid, 0, 0, 0x40 | phase),
            1 => fields = (0, 0, 0, [0x82, 0x84, 0x86, 0x8e][dice.below(4) as usize] | phase),
            2 => fields.3 |= 0x0e,
            3..8 => fields.3 |= 0x20,
            _ => {}
        },
        Mix::Hostile => {
            let draw = dice.next().to_le_bytes();
            let wide = [dice.next(), size.saturating_sub(1), u64::MAX, size];
            fields = (
                if draw[0] < 128 { nsid } else { dice.next() as u32 },
                if draw[1] < 128 { u32::MAX } else { dice.next() as u32 },
                wide[usize::from(draw[2] % 4)],
                draw[3],
            );
        }
    }
    if first && matches!(mix, Mix::Random) {
        fields = (0, 0, 0, 0x82 | phase);
    }
    let (nsid, nlb, slba, attributes) = fields;
    let nlb = if matches!(mix, Mix::Hostile) { nlb } else { u64::from(nlb).min((size - 1).saturating_sub(slba)) as u32 };
    *next = slba.saturating_add(u64::from(nlb) + 1);
    let mut bytes = [0; 32];
    bytes[0..4].copy_from_slice(&nsid.to_le_bytes());
    bytes[4..8].copy_from_slice(&nlb.to_le_bytes());
    bytes[8..16].copy_from_slice(&slba.to_le_bytes());
    bytes[31] = attributes;
    bytes
}
