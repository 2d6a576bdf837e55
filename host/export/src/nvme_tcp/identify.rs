//! What a controller that is reached over fabrics says otherwise: bytes of the Identify pages that the software controller
//! gives, and the asymmetric namespace access log page, which it does not have.

use super::config::{AnaGroupConfig, Limits};
use super::target::Exported;
use dray_nvme::command::{IdentifyCdw10, SubmissionEntry};
use dray_nvme::identify::{Cns, IdentifyController, IdentifyNamespace, IdentifyNamespaceIndependent, Oaes, write_ascii};
use dray_nvme::tcp::fabrics::{ANA_OFFSET, AnaCapabilities, CAPABILITIES_OFFSET, FabricsCapabilities, SGLS_TCP};
use dray_nvme::tcp::{AnaGroup, AnaLogHeader, write_text};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of an Identify page.
pub(super) const PAGE: usize = 4096;

/// Changes a page of Identify that the controller has filled in.
pub(super) fn patch(entry: &SubmissionEntry, page: &mut [u8; PAGE], exported: &Exported, cntlid: u16, limits: &Limits) {
    let nsid = entry.nsid;
    match IdentifyCdw10::from_bits(entry.cdw10).cns() {
        Cns::CONTROLLER => controller(page, exported, cntlid, limits),
        Cns::NAMESPACE => change(page, |page: &mut IdentifyNamespace| {
            if page.nsze > 0 {
                page.anagrpid = exported.group_of(nsid);
            }
        }),
        Cns::NAMESPACE_INDEPENDENT => change(page, |page: &mut IdentifyNamespaceIndependent| page.anagrpid = exported.group_of(nsid)),
        _ => {}
    }
}

/// Changes bytes that may lie at any address.
fn change<T: FromBytes + IntoBytes + Immutable>(bytes: &mut [u8; PAGE], change: impl FnOnce(&mut T)) {
    if let Ok(mut page) = T::read_from_bytes(bytes) {
        change(&mut page);
        bytes.copy_from_slice(page.as_bytes());
    }
}

fn controller(bytes: &mut [u8; PAGE], exported: &Exported, cntlid: u16, limits: &Limits) {
    let groups = &exported.config.ana_groups;
    let ana = AnaCapabilities {
        anatt: 10,
        anacap: 0b1101_1111,
        anagrpmax: groups.iter().map(|group| group.id).max().unwrap_or(0),
        nanagrpid: groups.len() as u32,
    };
    let fabrics = FabricsCapabilities {
        ioccsz: (64 + limits.in_capsule_bytes) / 16,
        iorcsz: 1,
        icdoff: 0,
        fcatt: 0,
        msdbd: 1,
        ofcs: 1,
    };
    change(bytes, |page: &mut IdentifyController| {
        page.cntlid = cntlid;
        page.cmic = page.cmic.with_multi_controller(true).with_ana(!groups.is_empty());
        page.oaes = Oaes::from_bits(page.oaes.into_bits()).with_ana_change(!groups.is_empty());
        page.mdts = match (page.mdts, limits.mdts()) {
            (0, own) => own,
            (given, own) => given.min(own),
        };
        (page.kas, page.maxcmd, page.sgls) = (10, limits.queue_entries, SGLS_TCP);
        page.oacs.set_dbcs(false);
        if !exported.config.serial.is_empty() {
            write_ascii(&mut page.sn, &exported.config.serial);
        }
        write_text(&mut page.subnqn, &exported.config.nqn);
    });
    bytes[CAPABILITIES_OFFSET..][..14].copy_from_slice(fabrics.as_bytes());
    if !groups.is_empty() {
        bytes[ANA_OFFSET..][..10].copy_from_slice(&ana.bytes());
    }
}

/// The asymmetric namespace access log page; with `groups_only` (RGO) without NSIDs.
pub(super) fn ana_log(groups: &[AnaGroupConfig], changes: u64, groups_only: bool) -> Vec<u8> {
    let header = AnaLogHeader { chgcnt: changes, ngrps: groups.len() as u16, ..Default::default() };
    let mut log = header.as_bytes().to_vec();
    for group in groups {
        let nsids = if groups_only { &[] } else { group.nsids.as_slice() };
        let descriptor = AnaGroup {
            grpid: group.id,
            nnsids: nsids.len() as u32,
            chgcnt: changes,
            state: group.state,
            ..Default::default()
        };
        log.extend_from_slice(descriptor.as_bytes());
        nsids.iter().for_each(|nsid| log.extend_from_slice(&nsid.to_le_bytes()));
    }
    log
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_changed_at_any_address() {
        let mut room = [0u8; PAGE + 8];
        for at in 0..8 {
            let page = room[at..].first_chunk_mut::<PAGE>().expect("a page");
            page.fill(0);
            change(page, |page: &mut IdentifyNamespace| page.anagrpid = 7);
            assert_eq!(page[92..96], [7, 0, 0, 0], "at {at}");
        }
    }
}
