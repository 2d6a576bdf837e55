//! Mutation for the time-boxed run: flips, splices, structured inserts, words of a dictionary; seeded, so that a run repeats.

/// Numbers at which registers, queues and ranges break, little-endian.
pub const NUMBERS: &[&[u8]] = &[
    &[0x00],
    &[0x01],
    &[0x7f],
    &[0x80],
    &[0xff],
    &[0xff, 0xff],
    &[0xff, 0xff, 0xff, 0xff],
    &[0x00, 0x10],
    &[0xff, 0x0f],
    &[0x01, 0x00, 0x46, 0x00],
    &[0x00, 0x00, 0x00, 0x00],
    &[0xff, 0xff, 0xff, 0x7f],
    &[0x00, 0x00, 0x10, 0x00],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    &[0x65, 0x4d, 0x56, 0x4e],
];

/// Makes inputs out of others.
#[derive(Debug)]
pub struct Mutator {
    dice: fastrand::Rng,
    words: &'static [&'static [u8]],
    most_bytes: usize,
}

impl Mutator {
    /// A mutator whose inputs follow from `seed`.
    #[must_use]
    pub fn new(seed: u64, words: &'static [&'static [u8]], most_bytes: usize) -> Self {
        Self { dice: fastrand::Rng::with_seed(seed), words, most_bytes }
    }

    /// Any of the corpus, changed in one to eight places; `into` is overwritten.
    pub fn next(&mut self, corpus: &[Vec<u8>], into: &mut Vec<u8>) {
        into.clear();
        match corpus.is_empty() {
            true => into.push(self.dice.u8(..)),
            false => into.extend_from_slice(&corpus[self.dice.usize(..corpus.len())]),
        }
        for _ in 0..=self.dice.usize(..8) {
            self.change(corpus, into);
        }
        into.truncate(self.most_bytes);
    }

    fn place(&mut self, bytes: &[u8]) -> usize {
        if bytes.is_empty() { 0 } else { self.dice.usize(..bytes.len()) }
    }

    fn change(&mut self, corpus: &[Vec<u8>], bytes: &mut Vec<u8>) {
        let at = self.place(bytes);
        match self.dice.u8(..10) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << self.dice.u8(..8),
            1 if !bytes.is_empty() => bytes[at] = self.dice.u8(..),
            2 if !bytes.is_empty() => bytes[at] = bytes[at].wrapping_add(self.dice.u8(..8).wrapping_sub(4)),
            3 => self.insert_noise(at, bytes),
            4 if !bytes.is_empty() => {
                let end = (at + 1 + self.dice.usize(..16)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 | 6 => self.word(at, bytes),
            7 => self.splice(at, corpus, bytes),
            8 => self.repeat(at, bytes),
            _ => bytes.truncate(bytes.len() - self.place(bytes).min(32)),
        }
    }

    fn insert_noise(&mut self, at: usize, bytes: &mut Vec<u8>) {
        let noise: Vec<u8> = (0..=self.dice.usize(..8)).map(|_| self.dice.u8(..)).collect();
        bytes.splice(at..at, noise);
    }

    fn word(&mut self, at: usize, bytes: &mut Vec<u8>) {
        let word = self.words[self.dice.usize(..self.words.len())];
        let end = if self.dice.bool() { at } else { (at + word.len()).min(bytes.len()) };
        bytes.splice(at..end, word.iter().copied());
    }

    /// A piece of another input goes in.
    fn splice(&mut self, at: usize, corpus: &[Vec<u8>], bytes: &mut Vec<u8>) {
        if corpus.is_empty() {
            return;
        }
        let other = &corpus[self.dice.usize(..corpus.len())];
        let from = self.place(other);
        let to = (from + 1 + self.dice.usize(..64)).min(other.len());
        bytes.splice(at..at, other[from..to].iter().copied());
    }

    fn repeat(&mut self, at: usize, bytes: &mut Vec<u8>) {
        let end = (at + 1 + self.dice.usize(..24)).min(bytes.len());
        let piece = bytes[at..end].to_vec();
        for _ in 0..=self.dice.usize(..4) {
            bytes.splice(at..at, piece.iter().copied());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_inputs_stay_short() {
        let corpus = [vec![1, 2, 3, 4], Vec::new(), vec![9; 60]];
        let run = |seed| {
            let mut mutator = Mutator::new(seed, NUMBERS, 64);
            let mut input = Vec::new();
            (0..500).map(|_| mutator.next(&corpus, &mut input)).for_each(drop);
            assert!(input.len() <= 64);
            input
        };
        assert_eq!(run(7), run(7));
        assert!((0..20).any(|seed| run(seed) != run(7)));
    }
}
