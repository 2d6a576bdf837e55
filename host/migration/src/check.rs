//! Checking: whether the move can be made at all (rule 5, sizes, formats). Nothing has to be undone from here.

use crate::calls::{Calls, Data};
use crate::media::{Geometry, Media};
use crate::media_move::Way;
use crate::mmc::{Answer, Health, Trust};
use crate::open::Opening;
use crate::parts::{Formats, Parts};
use crate::reason::{Reason, Refusal};
use crate::state::{State, Turn};
use dray_device::poll::Time;
use dray_nvme::command::SubmissionEntry;
use dray_nvme::identify::{Cns, CommandSetId, ControllerStateFormats, IdentifyNamespace, controller_list, nsid_list};
use dray_nvme::state::STATE_VERSION;
use zerocopy::FromBytes;

const PAGE_BYTES: usize = 4096;

/// The checks of both sides.
#[derive(Debug, Default)]
pub(crate) struct Checking {
    since: Option<Time>,
    calls: Option<(Calls, Calls)>,
    /// A departure that is good so far.
    further: Option<Further>,
}

/// A departure: which namespaces there are besides those that move, and which controllers have them.
#[derive(Debug, Default)]
enum Further {
    /// Not asked yet.
    #[default]
    No,
    /// Which there are.
    Which(Calls),
    /// Who has them: NSIDs, a call each.
    Whose(Vec<u32>, Calls),
}

/// What one side said of the namespaces.
struct Side {
    name: &'static str,
    namespaces: Vec<Box<IdentifyNamespace>>,
    attached: Vec<Vec<u16>>,
    formats: Vec<u8>,
}

impl Checking {
    pub(crate) fn poll(&mut self, parts: &mut Parts, now: Time) -> Turn {
        let since = *self.since.get_or_insert(now);
        if self.calls.is_none() {
            for (name, mmc) in [("source", &parts.source), ("destination", &parts.destination)] {
                let late = now.us_since(since) / 1000 > parts.config.limits.undo_ms;
                match mmc.health() {
                    Health::Ready => {}
                    Health::Starting if !late => return Turn::Stay,
                    Health::Starting => return failed(name, "it does not become ready".to_owned()),
                    Health::Failed(why) => return failed(name, why),
                }
            }
            if parts.config.namespaces.is_empty() || parts.config.controllers.is_empty() {
                return Turn::Back(Refusal::Empty.into());
            }
            let source = ask(parts.config.namespaces.iter().map(|pair| pair.0));
            let destination = match parts.way {
                Way::Controller | Way::HandOver(_) => ask(parts.config.namespaces.iter().map(|pair| pair.1)),
                // What the copy is, the exchange knows.
                Way::Media(_) | Way::Departure(_) => Calls::default(),
            };
            self.calls = Some((source, destination));
        }
        if let Some(further) = &mut self.further {
            return further.poll(parts, now).map_or(Turn::Stay, verdict);
        }
        let Some((source, destination)) = &mut self.calls else { return Turn::Stay };
        let there = source.poll(now, parts.source.as_mut());
        if !(destination.poll(now, parts.destination.as_mut()) && there) {
            return Turn::Stay;
        }
        let judged = match parts.way {
            Way::Media(_) => judge_media(source, parts),
            Way::Departure(_) => judge_departure(source, parts),
            Way::Controller | Way::HandOver(_) => judge(source, destination, parts),
        };
        if judged.is_ok() && matches!(parts.way, Way::Departure(_)) {
            self.further = Some(Further::default());
            return Turn::Stay;
        }
        verdict(judged)
    }
}

fn verdict(judged: Result<(), Refusal>) -> Turn {
    match judged {
        Ok(()) => Turn::Next(State::Opening(Opening::default())),
        Err(refusal) => Turn::Back(refusal.into()),
    }
}

impl Further {
    /// A controller that leaves must not have a namespace that does not: `Some` when that is known.
    fn poll(&mut self, parts: &mut Parts, now: Time) -> Option<Result<(), Refusal>> {
        let refused = |command, answer: &Answer| Refusal::Command { side: "source", command, status: answer.status };
        let identify = |cns, nsid| SubmissionEntry::identify(cns, nsid, 0, CommandSetId::NVM);
        match self {
            Self::No => {
                let mut calls = Calls::default();
                calls.push(identify(Cns::ALLOCATED_NAMESPACES, 0), Data::In(PAGE_BYTES));
                *self = Self::Which(calls);
                None
            }
            Self::Which(calls) => {
                if !calls.poll(now, parts.source.as_mut()) {
                    return None;
                }
                if let Some(answer) = calls.failure() {
                    return Some(Err(refused("Identify (allocated namespaces)", answer)));
                }
                let all: Vec<u32> = calls.answers().flat_map(|answer| nsid_list(&answer.data).collect::<Vec<_>>()).collect();
                if all.len() >= PAGE_BYTES / 4 {
                    let what = "has more namespaces than are looked through (1,023)";
                    return Some(Err(Refusal::Controller { side: "source", what }));
                }
                let moves = |nsid: &u32| parts.config.namespaces.iter().any(|pair| pair.0 == *nsid);
                let others: Vec<u32> = all.into_iter().filter(|nsid| !moves(nsid)).collect();
                let mut calls = Calls::default();
                others.iter().for_each(|&nsid| calls.push(identify(Cns::NAMESPACE_CONTROLLERS, nsid), Data::In(PAGE_BYTES)));
                *self = Self::Whose(others, calls);
                None
            }
            Self::Whose(others, calls) => {
                if !calls.poll(now, parts.source.as_mut()) {
                    return None;
                }
                if let Some(answer) = calls.failure() {
                    return Some(Err(refused("Identify (controllers attached to a namespace)", answer)));
                }
                let moving = parts.sources();
                for (&nsid, answer) in others.iter().zip(calls.answers()) {
                    if let Some(cntlid) = controller_list(&answer.data).find(|cntlid| moving.contains(cntlid)) {
                        return Some(Err(Refusal::OtherNamespace { cntlid, nsid }));
                    }
                }
                Some(Ok(()))
            }
        }
    }
}

fn failed(side: &'static str, why: String) -> Turn {
    Turn::Back(if side == "source" { Reason::Source(why) } else { Reason::Destination(why) })
}

/// Identify Namespace and the controllers attached to it, for each namespace; the formats of the controller state.
fn ask(nsids: impl Iterator<Item = u32>) -> Calls {
    let mut calls = Calls::default();
    let csi = CommandSetId::NVM;
    for nsid in nsids {
        calls.push(SubmissionEntry::identify(Cns::NAMESPACE, nsid, 0, csi), Data::In(PAGE_BYTES));
        calls.push(SubmissionEntry::identify(Cns::NAMESPACE_CONTROLLERS, nsid, 0, csi), Data::In(PAGE_BYTES));
    }
    calls.push(SubmissionEntry::identify(Cns::CONTROLLER_STATE_FORMATS, 0, 0, csi), Data::In(PAGE_BYTES));
    calls
}

fn read(name: &'static str, calls: &Calls) -> Result<Side, Refusal> {
    let mut side = Side { name, namespaces: Vec::new(), attached: Vec::new(), formats: Vec::new() };
    let answers: Vec<&Answer> = calls.answers().collect();
    let accept = |answer: &Answer, command| {
        let bad = answer.unknown || answer.status.is_error();
        if bad { Err(Refusal::Command { side: name, command, status: answer.status }) } else { Ok(()) }
    };
    let Some((formats, namespaces)) = answers.split_last() else { return Err(Refusal::Empty) };
    for pair in namespaces.chunks_exact(2) {
        accept(pair[0], "Identify Namespace")?;
        accept(pair[1], "Identify (controllers attached to a namespace)")?;
        let page = IdentifyNamespace::read_from_prefix(&pair[0].data)
            .map_err(|_| Refusal::Controller { side: name, what: "answers Identify with too little data" })?;
        side.namespaces.push(Box::new(page.0));
        side.attached.push(controller_list(&pair[1].data).collect());
    }
    accept(formats, "Identify (controller state formats)")?;
    side.formats.clone_from(&formats.data);
    Ok(side)
}

fn judge(source: &Calls, destination: &Calls, parts: &mut Parts) -> Result<(), Refusal> {
    roles(parts)?;
    let (source, destination) = (read("source", source)?, read("destination", destination)?);
    let mut geometries = Vec::new();
    for (index, &(from, to)) in parts.config.namespaces.iter().enumerate() {
        geometries.push(geometry(from, to, &source, &destination, index)?);
        writers(&source, index, from, parts)?;
        attached(&destination, index, to, &parts.destinations())?;
    }
    parts.formats = formats(&source, &destination, parts.config.vendor_uuid)?;
    parts.media = Media::new(&geometries)?;
    trust(parts)
}

/// A media move: the namespaces and their writers at the source, and the copies as the exchange knows them.
fn judge_media(source: &Calls, parts: &mut Parts) -> Result<(), Refusal> {
    roles(parts)?;
    let source = read("source", source)?;
    let mut geometries = Vec::new();
    for (index, &(nsid, to)) in parts.config.namespaces.iter().enumerate() {
        writers(&source, index, nsid, parts)?;
        let Way::Media(exchange) = &mut parts.way else { return Err(Refusal::Empty) };
        let copy = exchange.copy_of(nsid).map_err(|why| Refusal::NotExchangeable { nsid, why })?;
        let page = &source.namespaces[index];
        movable("source", nsid, page)?;
        let source_bytes = page.block_bytes().unwrap_or(0);
        if source_bytes != copy.block_bytes {
            return Err(Refusal::OtherBlocks { nsid, source_bytes, destination_bytes: copy.block_bytes });
        }
        if page.nsze != copy.blocks {
            let why = format!("it has {} blocks, its copy {}", page.nsze, copy.blocks);
            return Err(Refusal::NotExchangeable { nsid, why });
        }
        geometries.push(Geometry { source: nsid, destination: to, blocks: page.nsze, block_bytes: source_bytes });
    }
    // The state itself is not read, only whether it is a suspended controller's.
    let format = ControllerStateFormats::parse(&source.formats).ok().and_then(|formats| formats.csvi_of(STATE_VERSION));
    parts.formats = Formats { source: (format.ok_or(Refusal::NoStateFormat)?, 0), destination: (0, 0) };
    parts.media = Media::new(&geometries)?;
    trust(parts)
}

/// A departure: as a media move, but that the controllers' state is read whole and the namespaces can be taken from them.
fn judge_departure(source: &Calls, parts: &mut Parts) -> Result<(), Refusal> {
    roles(parts)?;
    let own = parts.source.identify().map_or(u16::MAX, |identify| identify.cntlid);
    if !parts.source.identify().is_some_and(|identify| identify.oacs.namespace_management()) {
        let what = "cannot detach namespaces (OACS, Namespace Management): after a reset nothing would keep the controllers that have \
                    left from writing them";
        return Err(Refusal::Controller { side: "source", what });
    }
    let source = read("source", source)?;
    let (mut geometries, mut having) = (Vec::new(), Vec::new());
    let targets = parts.departure().map(|departure| departure.targets.clone()).unwrap_or_default();
    for (index, &(nsid, to)) in parts.config.namespaces.iter().enumerate() {
        writers(&source, index, nsid, parts)?;
        attached(&source, index, nsid, &[own])?;
        let (page, target) = (&source.namespaces[index], targets.get(index).ok_or(Refusal::Empty)?);
        movable("source", nsid, page)?;
        let block_bytes = page.block_bytes().unwrap_or(0);
        if block_bytes != target.block_bytes {
            return Err(Refusal::OtherBlocks { nsid, source_bytes: block_bytes, destination_bytes: target.block_bytes });
        }
        if target.blocks < page.nsze {
            return Err(Refusal::TooSmall { nsid, source_blocks: page.nsze, destination_blocks: target.blocks });
        }
        geometries.push(Geometry { source: nsid, destination: to, blocks: page.nsze, block_bytes });
        let moving = parts.sources();
        having.push((nsid, source.attached[index].iter().copied().filter(|cntlid| moving.contains(cntlid)).collect()));
    }
    parts.formats = Formats { source: own_format(&source, parts.config.vendor_uuid)?, destination: (0, 0) };
    parts.media = Media::new(&geometries)?;
    if let Some(departure) = parts.departure() {
        departure.attached = having;
    }
    trust(parts)
}

/// Version 0 and a vendor part: the one that is asked for, else the first that the source has.
fn own_format(source: &Side, uuid: Option<[u8; 16]>) -> Result<(u8, u8), Refusal> {
    let formats = ControllerStateFormats::parse(&source.formats).map_err(|_| Refusal::NoStateFormat)?;
    let csvi = formats.csvi_of(STATE_VERSION).ok_or(Refusal::NoStateFormat)?;
    let at = formats.uuids().position(|id| uuid.is_none_or(|uuid| uuid == id));
    Ok((csvi, at.and_then(|at| u8::try_from(at + 1).ok()).unwrap_or(0)))
}

/// The moving controllers reach the namespace, and nobody else can write it.
fn writers(source: &Side, index: usize, nsid: u32, parts: &Parts) -> Result<(), Refusal> {
    let moving = parts.sources();
    attached(source, index, nsid, &moving)?;
    let own = parts.source.identify().map(|identify| identify.cntlid);
    match source.attached[index].iter().find(|&&cntlid| Some(cntlid) != own && !moving.contains(&cntlid)) {
        Some(&cntlid) => Err(Refusal::OtherWriter { cntlid, nsid }),
        None => Ok(()),
    }
}

/// The management controllers must be such, and the source must log changes. Without a destination there is one of them.
fn roles(parts: &Parts) -> Result<(), Refusal> {
    let both = [("source", &parts.source), ("destination", &parts.destination)];
    for (side, mmc) in &both[..if parts.has_destination() { 2 } else { 1 }] {
        let Some(identify) = mmc.identify() else {
            return Err(Refusal::Controller { side, what: "is not identified" });
        };
        if !identify.oacs.hmlms() {
            return Err(Refusal::Controller { side, what: "does not support live migration (HMLMS)" });
        }
    }
    if !parts.source.identify().is_some_and(|identify| identify.trattr.tudcs()) {
        return Err(Refusal::Controller { side: "source", what: "cannot log user data changes (TUDCS)" });
    }
    Ok(())
}

fn geometry(from: u32, to: u32, source: &Side, destination: &Side, index: usize) -> Result<Geometry, Refusal> {
    let (here, there) = (&source.namespaces[index], &destination.namespaces[index]);
    metadata(destination.name, to, there)?;
    movable(source.name, from, here)?;
    let (source_bytes, destination_bytes) = (here.block_bytes().unwrap_or(0), there.block_bytes().unwrap_or(0));
    if source_bytes != destination_bytes {
        return Err(Refusal::OtherBlocks { nsid: from, source_bytes, destination_bytes });
    }
    if there.nsze < here.nsze {
        let (source_blocks, destination_blocks) = (here.nsze, there.nsze);
        return Err(Refusal::TooSmall { nsid: from, source_blocks, destination_blocks });
    }
    Ok(Geometry { source: from, destination: to, blocks: here.nsze, block_bytes: source_bytes })
}

fn metadata(side: &'static str, nsid: u32, page: &IdentifyNamespace) -> Result<(), Refusal> {
    match page.format().ms() {
        0 => Ok(()),
        bytes => Err(Refusal::Metadata { side, nsid, bytes }),
    }
}

fn movable(side: &'static str, nsid: u32, page: &IdentifyNamespace) -> Result<(), Refusal> {
    metadata(side, nsid, page)?;
    if page.rescap != 0 { Err(Refusal::Reservations(nsid)) } else { Ok(()) }
}

/// Each moving controller must reach each moving namespace.
fn attached(side: &Side, index: usize, nsid: u32, controllers: &[u16]) -> Result<(), Refusal> {
    // A namespace may be private to some of the controllers, but one that none of them reaches moves nothing.
    let list = &side.attached[index];
    match controllers.iter().find(|cntlid| list.contains(cntlid)) {
        Some(_) => Ok(()),
        None => Err(Refusal::NotAttached { side: side.name, cntlid: controllers.first().copied().unwrap_or(0), nsid }),
    }
}

fn formats(source: &Side, destination: &Side, uuid: Option<[u8; 16]>) -> Result<Formats, Refusal> {
    let parse = |side: &Side| ControllerStateFormats::parse(&side.formats).ok().map(|formats| {
        let uuids: Vec<[u8; 16]> = formats.uuids().collect();
        (formats.csvi_of(STATE_VERSION), uuids)
    });
    let (Some((here, here_uuids)), Some((there, there_uuids))) = (parse(source), parse(destination)) else {
        return Err(Refusal::NoStateFormat);
    };
    let (Some(here), Some(there)) = (here, there) else { return Err(Refusal::NoStateFormat) };
    let common = here_uuids.iter().find(|id| uuid.is_none_or(|uuid| uuid == **id) && there_uuids.contains(id));
    let index = |list: &[[u8; 16]]| {
        let found = common.and_then(|id| list.iter().position(|other| other == id));
        found.and_then(|at| u8::try_from(at + 1).ok()).unwrap_or(0)
    };
    Ok(Formats { source: (here, index(&here_uuids)), destination: (there, index(&there_uuids)) })
}

/// Whether everything has to be compared at the end (guarantee 1), and whether it can be.
fn trust(parts: &mut Parts) -> Result<(), Refusal> {
    let format = parts.source.identify_nvm().map_or(0, |page| page.lbamqf);
    let hint = match parts.source.trust() {
        Trust::Hint(why) => Some(why),
        Trust::Tested if format != 0 => Some(format!("the drive's entries are of format {format:#x}")),
        Trust::Tested => None,
    };
    let hint = hint.filter(|_| !parts.config.trust_drive);
    if let Some(why) = &hint
        && !parts.engine.destination().limits().can_compare
    {
        return Err(Refusal::CannotCompare(why.clone()));
    }
    parts.hint = hint;
    Ok(())
}
