use super::*;
use crate::native::{Native, NativeFactory};
use crate::packed::{Choice, EXTENT_BYTES, Extent};
use crate::role::{Cdq, Copy, Then, Tracking};
use crate::seam::{Fault, Identity};

#[test]
fn native_policies_conform() {
    assert_eq!(suite_cdq(&mut NativeFactory::<Cdq>::new()), []);
    assert_eq!(suite_tracking(&mut NativeFactory::<Tracking>::new()), []);
    assert_eq!(suite_copy(&mut NativeFactory::<Copy>::new()), []);
}

/// A native policy whose answers are bent before they leave, with the number of the instance and of the call.
struct Bent<R: Native> {
    native: NativeFactory<R>,
    bend: fn(u32, &R::Request, &mut R::Answer),
    opened: u32,
}

struct BentPolicy<R: Role> {
    native: Box<dyn Policy<R>>,
    bend: fn(u32, &R::Request, &mut R::Answer),
    instance: u32,
}

impl<R: Role> Policy<R> for BentPolicy<R> {
    fn call(&mut self, request: &R::Request, answer: &mut R::Answer) -> Result<(), Fault> {
        self.native.call(request, answer)?;
        (self.bend)(self.instance, request, answer);
        Ok(())
    }

    fn save(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        Ok(Some(vec![0; 8]))
    }
}

impl<R: Native> Factory<R> for Bent<R> {
    fn identity(&self) -> &Identity {
        self.native.identity()
    }

    fn open(&mut self, opening: &Opening<R>, saved: Option<&[u8]>) -> Result<Box<dyn Policy<R>>, Fault> {
        self.opened += 1;
        let native = self.native.open(opening, saved)?;
        Ok(Box::new(BentPolicy { native, bend: self.bend, instance: self.opened }))
    }
}

fn bent<R: Native>(bend: fn(u32, &R::Request, &mut R::Answer)) -> Bent<R> {
    Bent { native: NativeFactory::new(), bend, opened: 0 }
}

fn names(findings: &[Finding], words: &str) {
    assert!(findings.iter().any(|finding| finding.what.contains(words)), "{words} is not in {findings:#?}");
}

#[test]
fn each_way_to_fail_is_found() {
    let mut cdq = bent::<Cdq>(|_, _, answer| answer.ranges.truncate(answer.ranges.len().saturating_sub(16)));
    names(&suite_cdq(&mut cdq), "are in no range");
    let mut cdq = bent::<Cdq>(|_, _, answer| answer.marks.first = false);
    names(&suite_cdq(&mut cdq), "the entries said");
    names(&suite_cdq(&mut bent::<Cdq>(|_, _, answer| answer.consumed += 1)), "consumed");
    names(&suite_cdq(&mut bent::<Cdq>(|instance, _, answer| answer.wait_us = instance)), "differently");

    let mut tracking = bent::<Tracking>(|_, _, answer| answer.choices.truncate(answer.choices.len().saturating_sub(1)));
    names(&suite_tracking(&mut tracking), "choices for");
    let mut tracking = bent::<Tracking>(|_, _, answer| answer.choices.fill(Choice { chunk_log2: 20, hold: false }.pack()));
    names(&suite_tracking(&mut tracking), "a chunk of 2^20");

    names(&suite_copy(&mut bent::<Copy>(|_, _, answer| answer.then = Then::GoOn)), "no switch-over");
    names(&suite_copy(&mut bent::<Copy>(|_, _, answer| answer.extents.clear())), "nothing queued");
    let mut copy = bent::<Copy>(|_, _, answer| {
        answer.extents.clear();
        answer.wait_us = 0;
        answer.then = Then::GoOn;
    });
    names(&suite_copy(&mut copy), "no extents and no wait");
    let mut copy = bent::<Copy>(|_, _, answer| {
        if let Some(first) = answer.extents.first_chunk::<EXTENT_BYTES>() {
            let first = Extent::unpack(first);
            Extent { blocks: first.blocks + 1, slba: u64::MAX >> 1, ..first }.push(&mut answer.extents);
        }
    });
    names(&suite_copy(&mut copy), "leaves namespace");
}

#[test]
fn a_policy_that_does_not_open_is_found() {
    struct Shut(Identity);
    impl Factory<Copy> for Shut {
        fn identity(&self) -> &Identity {
            &self.0
        }
        fn open(&mut self, _: &Opening<Copy>, _: Option<&[u8]>) -> Result<Box<dyn Policy<Copy>>, Fault> {
            Err(Fault::Refused("no".into()))
        }
    }
    let findings = suite_copy(&mut Shut(Identity { component: "shut".into(), sha256: String::new() }));
    names(&findings, "does not open: refused: no");
    assert!(findings.len() <= MAX_FINDINGS);
}
