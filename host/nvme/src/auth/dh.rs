//! Diffie-Hellman groups of DH-HMAC-CHAP (Base 2.3 §8.3.5.5.8): finite field groups of RFC 7919.

use alloc::vec::Vec;
use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd, Resize};

/// Bytes of a private exponent: more than twice the security strength of every group here (RFC 7919 §5.2).
pub const EXPONENT_BYTES: usize = 64;

/// A Diffie-Hellman group identifier that this crate computes with (Base 2.3 §8.3.5.5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DhGroup {
    /// No Diffie-Hellman exchange (`00h`).
    Null = 0,
    /// ffdhe2048 (`01h`).
    Ffdhe2048 = 1,
    /// ffdhe3072 (`02h`).
    Ffdhe3072 = 2,
    /// ffdhe4096 (`03h`).
    Ffdhe4096 = 3,
    /// ffdhe6144 (`04h`).
    Ffdhe6144 = 4,
    /// ffdhe8192 (`05h`).
    Ffdhe8192 = 5,
}

impl DhGroup {
    /// Every group, strongest first.
    pub const ALL: [Self; 6] =
        [Self::Ffdhe8192, Self::Ffdhe6144, Self::Ffdhe4096, Self::Ffdhe3072, Self::Ffdhe2048, Self::Null];

    /// The group of an identifier, `None` for a reserved one.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|group| group.id() == id)
    }

    /// The identifier.
    #[must_use]
    pub const fn id(self) -> u8 {
        self as u8
    }

    /// Bytes of a public value and of the shared secret; 0 for the null group.
    #[must_use]
    pub const fn value_bytes(self) -> usize {
        match self {
            Self::Null => 0,
            Self::Ffdhe2048 => 2048 / 8,
            Self::Ffdhe3072 => 3072 / 8,
            Self::Ffdhe4096 => 4096 / 8,
            Self::Ffdhe6144 => 6144 / 8,
            Self::Ffdhe8192 => 8192 / 8,
        }
    }

    /// The last eight digits before the closing ones, where the primes differ (RFC 7919 §A).
    const fn tail(self) -> &'static str {
        match self {
            Self::Null => "",
            Self::Ffdhe2048 => "61285C97",
            Self::Ffdhe3072 => "66C62E37",
            Self::Ffdhe4096 => "5E655F6A",
            Self::Ffdhe6144 => "D0E40E65",
            Self::Ffdhe8192 => "C5C6424C",
        }
    }

    /// The prime, big-endian; empty for the null group.
    fn prime(self) -> Vec<u8> {
        let len = self.value_bytes();
        if len == 0 {
            return Vec::new();
        }
        let ones = core::iter::repeat_n(0xFFu8, 8);
        let digits = E_DIGITS.as_bytes().iter().take(2 * len - 40).chain(self.tail().as_bytes());
        let mut high = None;
        let middle = digits.filter_map(move |digit| {
            let digit = (*digit as char).to_digit(16).unwrap_or(0) as u8;
            match high.take() {
                None => {
                    high = Some(digit);
                    None
                }
                Some(high) => Some(high << 4 | digit),
            }
        });
        ones.clone().chain(middle).chain(ones).collect()
    }

    fn params(self) -> Option<BoxedMontyParams> {
        let prime = BoxedUint::from_be_slice(&self.prime(), 8 * self.value_bytes() as u32).ok()?;
        Option::from(Odd::new(prime)).map(BoxedMontyParams::new_vartime)
    }

    /// `base` to the power `exponent` modulo the prime, big-endian with leading zeroes; empty for the null group. The time
    /// depends on the group alone. The largest group takes tens of milliseconds: not for a polling core.
    fn power(self, base: BoxedUint, exponent: &[u8; EXPONENT_BYTES]) -> Vec<u8> {
        let exponent = BoxedUint::from_be_slice(exponent, 8 * EXPONENT_BYTES as u32);
        let (Some(params), Ok(exponent)) = (self.params(), exponent) else { return Vec::new() };
        let mut value = BoxedMontyForm::new(base, &params).pow(&exponent).retrieve().to_be_bytes().into_vec();
        value.drain(..value.len().saturating_sub(self.value_bytes()));
        value
    }

    /// The public value of a private exponent, big-endian, [`Self::value_bytes`] long.
    #[must_use]
    pub fn public_value(self, exponent: &[u8; EXPONENT_BYTES]) -> Vec<u8> {
        if self == Self::Null {
            return Vec::new();
        }
        self.power(BoxedUint::from(2u64).resize(8 * self.value_bytes() as u32), exponent)
    }

    /// The shared secret, [`Self::value_bytes`] long; `None` if the peer's value has not the group's length or is not one
    /// that an honest peer sends (0, 1, p-1 and everything from p; RFC 7919 §5.1), or for the null group.
    #[must_use]
    pub fn shared_secret(self, exponent: &[u8; EXPONENT_BYTES], peer: &[u8]) -> Option<Vec<u8>> {
        if self == Self::Null || peer.len() != self.value_bytes() {
            return None;
        }
        let bits = 8 * self.value_bytes() as u32;
        let prime = self.prime();
        let mut last = prime.clone();
        *last.last_mut()? -= 1;
        // Big-endian of one length: bytes compare as the numbers do.
        let is_small = peer.iter().rev().skip(1).all(|byte| *byte == 0) && peer.last().is_none_or(|byte| *byte < 2);
        if is_small || peer >= last.as_slice() {
            return None;
        }
        Some(self.power(BoxedUint::from_be_slice(peer, bits).ok()?, exponent))
    }
}

/// The first digits of e that all primes have in common (RFC 7919 §A), the longest prime's worth of them.
const E_DIGITS: &str = "\
    ADF85458A2BB4A9AAFDC5620273D3CF1D8B9C583CE2D3695A9E13641146433FBCC939DCE249B3EF97D2FE363630C75D8F681B202AEC4617AD3DF\
    1ED5D5FD65612433F51F5F066ED0856365553DED1AF3B557135E7F57C935984F0C70E0E68B77E2A689DAF3EFE8721DF158A136ADE73530ACCA4F\
    483A797ABC0AB182B324FB61D108A94BB2C8E3FBB96ADAB760D7F4681D4F42A3DE394DF4AE56EDE76372BB190B07A7C8EE0A6D709E02FCE1CDF7\
    E2ECC03404CD28342F619172FE9CE98583FF8E4F1232EEF28183C3FE3B1B4C6FAD733BB5FCBC2EC22005C58EF1837D1683B2C6F34A26C1B2EFFA\
    886B4238611FCFDCDE355B3B6519035BBC34F4DEF99C023861B46FC9D6E6C9077AD91D2691F7F7EE598CB0FAC186D91CAEFE130985139270B413\
    0C93BC437944F4FD4452E2D74DD364F2E21E71F54BFF5CAE82AB9C9DF69EE86D2BC522363A0DABC521979B0DEADA1DBF9A42D5C4484E0ABCD06B\
    FA53DDEF3C1B20EE3FD59D7C25E41D2B669E1EF16E6F52C3164DF4FB7930E9E4E58857B6AC7D5F42D69F6D187763CF1D5503400487F55BA57E31\
    CC7A7135C886EFB4318AED6A1E012D9E6832A907600A918130C46DC778F971AD0038092999A333CB8B7A1A1DB93D7140003C2A4ECEA9F98D0ACC\
    0A8291CDCEC97DCF8EC9B55A7F88A46B4DB5A851F44182E1C68A007E5E0DD9020BFD64B645036C7A4E677D2C38532A3A23BA4442CAF53EA63BB4\
    54329B7624C8917BDD64B1C0FD4CB38E8C334C701C3ACDAD0657FCCFEC719B1F5C3E4E46041F388147FB4CFDB477A52471F7A9A96910B855322E\
    DB6340D8A00EF092350511E30ABEC1FFF9E3A26E7FB29F8C183023C3587E38DA0077D9B4763E4E4B94B2BBC194C6651E77CAF992EEAAC0232A28\
    1BF6B3A739C1226116820AE8DB5847A67CBEF9C9091B462D538CD72B03746AE77F5E62292C311562A846505DC82DB854338AE49F5235C95B9117\
    8CCF2DD5CACEF403EC9D1810C6272B045B3B71F9DC6B80D63FDD4A8E9ADB1E6962A69526D43161C1A41D570D7938DAD4A40E329CCFF46AAA36AD\
    004CF600C8381E425A31D951AE64FDB23FCEC9509D43687FEB69EDD1CC5E0B8CC3BDF64B10EF86B63142A3AB8829555B2F747C932665CB2C0F1C\
    C01BD70229388839D2AF05E454504AC78B7582822846C0BA35C35F5C59160CC046FD8251541FC68C9C86B022BB7099876A460E7451A8A9310970\
    3FEE1C217E6C3826E52C51AA691E0E423CFC99E9E31650C1217B624816CDAD9A95F9D5B8019488D9C0A0A1FE3075A577E23183F81D4A3F2FA457\
    1EFC8CE0BA8A4FE8B6855DFE72B0A66EDED2FBABFBE58A30FAFABE1C5D71A87E2F741EF8C1FE86FEA6BBFDE530677F0D97D11D49F7A8443D0822\
    E506A9F4614E011E2A94838FF88CD68C8BB7\
    ";

#[cfg(test)]
mod tests {
    use super::*;

    const EXCHANGED: [DhGroup; 5] =
        [DhGroup::Ffdhe2048, DhGroup::Ffdhe3072, DhGroup::Ffdhe4096, DhGroup::Ffdhe6144, DhGroup::Ffdhe8192];

    /// 2 generates the group of half the order (RFC 7919 §A): a wrong digit anywhere would break that.
    #[test]
    fn primes_are_those_of_the_rfc() {
        for group in EXCHANGED {
            let prime = group.prime();
            assert_eq!((prime.len(), prime[0], prime[prime.len() - 1]), (group.value_bytes(), 0xFF, 0xFF));
            let bits = 8 * group.value_bytes() as u32;
            let params = group.params().expect("a group");
            let half = BoxedUint::from_be_slice(&prime, bits).expect("a prime").shr_vartime(1).expect("a shift");
            let two = BoxedMontyForm::new(BoxedUint::from(2u64).resize(bits), &params);
            assert_eq!(two.pow(&half), BoxedMontyForm::one(&params), "{group:?}");
        }
    }

    #[test]
    fn both_ends_have_one_secret() {
        for group in [DhGroup::Ffdhe2048, DhGroup::Ffdhe8192] {
            let (a, b) = ([0x5A; EXPONENT_BYTES], [0xC3; EXPONENT_BYTES]);
            let (at_a, at_b) = (group.public_value(&a), group.public_value(&b));
            assert_eq!(at_a.len(), group.value_bytes());
            assert_ne!(at_a, at_b);
            let secret = group.shared_secret(&a, &at_b).expect("a secret");
            assert_eq!(group.shared_secret(&b, &at_a), Some(secret));
        }
    }

    #[test]
    fn dishonest_values_are_refused() {
        let (group, exponent) = (DhGroup::Ffdhe2048, [7; EXPONENT_BYTES]);
        let len = group.value_bytes();
        let prime = group.prime();
        let mut value = alloc::vec![0; len];
        assert_eq!(group.shared_secret(&exponent, &value), None, "0");
        value[len - 1] = 1;
        assert_eq!(group.shared_secret(&exponent, &value), None, "1");
        value[len - 1] = 2;
        assert!(group.shared_secret(&exponent, &value).is_some(), "2");
        assert_eq!(group.shared_secret(&exponent, &prime), None, "p");
        let mut value = prime.clone();
        value[len - 1] -= 1;
        assert_eq!(group.shared_secret(&exponent, &value), None, "p-1");
        value[len - 1] -= 1;
        assert!(group.shared_secret(&exponent, &value).is_some(), "p-2");
        assert_eq!(group.shared_secret(&exponent, &value[1..]), None, "short");
        assert_eq!(group.shared_secret(&exponent, &[]), None);
        assert_eq!(DhGroup::Null.shared_secret(&exponent, &[]), None);
        assert_eq!(DhGroup::from_id(6), None);
    }
}
