//! Draws for resampling: a function of the seed alone.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of draws.
pub(super) struct Draws(ChaCha8Rng);

impl Draws {
    /// `purpose` keeps the streams of different statistics apart.
    pub(super) fn new(seed: u64, purpose: &str) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..].iter_mut().zip(purpose.bytes()).for_each(|(to, byte)| *to = byte);
        Self(ChaCha8Rng::from_seed(key))
    }

    /// One of `0..n`; the bias of the product method is below 2^-32 for any sample that fits in memory.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }
}
