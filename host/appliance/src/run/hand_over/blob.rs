//! What the controller's section of a migration stream has: which migration it is of, and the controller's state as Get Controller
//! State returns it (Base 2.3 §5.2.16, version 0, with the vendor part).

use super::Session;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"DRAYCTRL";
const VERSION: u32 = 1;

/// The start of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: u32,
    reserved: u32,
    /// The migration's number in the records.
    number: u64,
    token: [u8; 16],
    /// Bytes of the state, which follow.
    length: u64,
}

const _: () = assert!(size_of::<Head>() == 48);

/// The blob of a migration's state.
pub(super) fn pack(session: &Session, state: &[u8]) -> Vec<u8> {
    let (number, token, length) = (session.number, session.token, state.len() as u64);
    let mut blob = Head { magic: MAGIC, version: VERSION, reserved: 0, number, token, length }.as_bytes().to_vec();
    blob.extend_from_slice(state);
    blob
}

/// The state in a blob, if it is one of this migration.
///
/// # Errors
/// What is wrong with it.
pub(super) fn unpack<'a>(session: &Session, blob: &'a [u8]) -> Result<&'a [u8], &'static str> {
    let (head, state) = Head::read_from_prefix(blob).map_err(|_| "the controller's state has no head")?;
    if head.magic != MAGIC || head.version != VERSION || head.reserved != 0 {
        return Err("the controller's state is of another kind or version");
    }
    if (head.number, head.token) != (session.number, session.token) {
        return Err("the controller's state is of another migration");
    }
    if head.length != state.len() as u64 {
        return Err("the controller's state is not whole");
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dray_migration::{HandOver, Owner};

    #[test]
    fn a_blob_is_of_one_migration_and_whole_or_nothing() {
        let session = |number, last| {
            let mut token = [7; 16];
            token[15] = last;
            Session { number, token, from: Owner::Source, hand_over: HandOver::new() }
        };
        let (mine, state) = (session(4, 1), [3; 100]);
        let blob = pack(&mine, &state);
        assert_eq!(unpack(&mine, &blob), Ok(&state[..]));
        for foreign in [session(4, 2), session(5, 1)] {
            assert!(unpack(&foreign, &blob).is_err_and(|why| why.contains("another migration")));
        }
        for len in 0..blob.len() {
            assert!(unpack(&mine, &blob[..len]).is_err(), "{len}");
        }
        assert!(unpack(&mine, &[&blob[..], &[0]].concat()).is_err());
        for at in 0..size_of::<Head>() {
            let mut bad = blob.clone();
            bad[at] ^= 0x20;
            assert!(unpack(&mine, &bad).is_err(), "{at}");
        }
    }
}
