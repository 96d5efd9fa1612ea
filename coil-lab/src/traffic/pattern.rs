//! A deterministic stream of bytes in which no two places look alike, so that loss, doubling and reordering all show in
//! a digest or a comparison.

use ring::digest::{Context, SHA256};
use std::fmt::Write;

/// Size of the pieces in which streams are made and sent.
pub(crate) const CHUNK: usize = 64 * 1024;

/// The stream of one seed.
#[derive(Clone)]
pub(crate) struct Pattern {
    state: u64,
    left: u64,
}

impl Pattern {
    /// The first `bytes` bytes of the stream of `seed`.
    pub(crate) fn new(seed: u64, bytes: u64) -> Self {
        Self {
            // xorshift must not start at zero.
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            left: bytes,
        }
    }

    fn word(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl Iterator for Pattern {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.left == 0 {
            return None;
        }
        let size = CHUNK.min(usize::try_from(self.left).unwrap_or(CHUNK));
        let mut chunk = vec![0; size.next_multiple_of(8)];
        for place in chunk.chunks_exact_mut(8) {
            place.copy_from_slice(&self.word().to_le_bytes());
        }
        chunk.truncate(size);
        self.left -= size as u64;
        Some(chunk)
    }
}

/// SHA-256 of pieces that come one after the other.
pub(crate) struct Digest {
    context: Context,
    bytes: u64,
}

impl Digest {
    pub(crate) fn new() -> Self {
        Self { context: Context::new(&SHA256), bytes: 0 }
    }

    pub(crate) fn add(&mut self, piece: &[u8]) {
        self.context.update(piece);
        self.bytes += piece.len() as u64;
    }

    /// How many bytes, and their digest in hexadecimal.
    pub(crate) fn finish(self) -> (u64, String) {
        let mut text = String::new();
        for byte in self.context.finish().as_ref() {
            // Writing to a string cannot fail.
            write!(text, "{byte:02x}").unwrap_or_default();
        }
        (self.bytes, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_bytes_of_the_right_number() {
        let of = |seed, bytes| {
            let mut digest = Digest::new();
            Pattern::new(seed, bytes).for_each(|chunk| digest.add(&chunk));
            digest.finish()
        };
        for bytes in [0, 1, 7, 8, CHUNK as u64, CHUNK as u64 + 1, 1_000_003] {
            assert_eq!(of(7, bytes), of(7, bytes));
            assert_eq!(of(7, bytes).0, bytes);
        }
        assert_ne!(of(7, 1000).1, of(8, 1000).1);
        assert_eq!(of(7, 0).1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
