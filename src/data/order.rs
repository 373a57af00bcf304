//! Which samples an optimizer step sees: a pure function of (seed, epoch, position), the same for every layout.

use std::cell::RefCell;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The order of a run's samples.
///
/// The forget (or train) samples are the anchor: an epoch visits each of them once. Each brings along one retain sample.
pub struct Order {
    shuffle: bool,
    anchors: usize,
    partners: usize,
    global_batch: usize,
    anchor_epoch: Permutation,
    partner_epoch: Permutation,
}

/// The samples of one optimizer step, over all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepBatch {
    pub epoch: usize,
    /// Indices of forget (or train) samples.
    pub anchors: Vec<usize>,
    /// Index of the retain sample of each anchor; empty without retain samples.
    pub partners: Vec<usize>,
}

impl Order {
    /// `partners`: number of retain samples, 0 for none; `global_batch`: anchors of one step. Unit of all: samples.
    pub fn new(seed: u64, shuffle: bool, anchors: usize, partners: usize, global_batch: usize) -> Self {
        assert!(anchors > 0 && global_batch > 0, "invariant: an order has samples");
        let (anchor_epoch, partner_epoch) = (Permutation::new(seed, 0, anchors), Permutation::new(seed, 1, partners));
        Self { shuffle, anchors, partners, global_batch, anchor_epoch, partner_epoch }
    }

    /// Steps of one epoch; the last one may have fewer samples than `global_batch`.
    pub fn steps_per_epoch(&self) -> usize {
        self.anchors.div_ceil(self.global_batch)
    }

    /// The samples of step `step`, counted from 0.
    pub fn batch(&self, step: usize) -> StepBatch {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let first = within * self.global_batch;
        let positions = first..(first + self.global_batch).min(self.anchors);
        let anchors: Vec<usize> = positions.clone().map(|at| self.anchor(epoch, at)).collect();
        let partners = match self.partners {
            0 => Vec::new(),
            n if self.shuffle => positions
                .map(|at| {
                    let drawn = epoch * self.anchors + at;
                    self.partner_epoch.get(drawn / n, drawn % n)
                })
                .collect(),
            n => anchors.iter().map(|anchor| anchor % n).collect(),
        };
        StepBatch { epoch, anchors, partners }
    }

    fn anchor(&self, epoch: usize, position: usize) -> usize {
        if self.shuffle { self.anchor_epoch.get(epoch, position) } else { position }
    }
}

/// A permutation of `0..len` for each epoch; the last one asked for is kept.
struct Permutation {
    seed: u64,
    stream: u64,
    len: usize,
    kept: RefCell<(usize, Vec<u32>)>,
}

impl Permutation {
    fn new(seed: u64, stream: u64, len: usize) -> Self {
        Self { seed, stream, len, kept: RefCell::new((usize::MAX, Vec::new())) }
    }

    fn get(&self, epoch: usize, position: usize) -> usize {
        let mut kept = self.kept.borrow_mut();
        if kept.0 != epoch {
            *kept = (epoch, self.draw(epoch));
        }
        kept.1[position] as usize
    }

    /// Fisher and Yates' shuffle with a generator that is keyed by (seed, stream, epoch).
    fn draw(&self, epoch: usize) -> Vec<u32> {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.stream.to_le_bytes());
        key[16..24].copy_from_slice(&(epoch as u64).to_le_bytes());
        let mut random = ChaCha8Rng::from_seed(key);
        let mut order: Vec<u32> = (0..self.len as u32).collect();
        for i in (1..order.len()).rev() {
            // 64 bits onto i + 1 places by multiplication: the bias is below 2^-32
            let j = ((u128::from(random.next_u64()) * (i as u128 + 1)) >> 64) as usize;
            order.swap(i, j);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_visits_every_anchor_once_and_partners_evenly() {
        let order = Order::new(3, true, 50, 20, 8);
        assert_eq!(order.steps_per_epoch(), 7);
        for epoch in 0..3 {
            let steps: Vec<StepBatch> = (0..7).map(|step| order.batch(epoch * 7 + step)).collect();
            let mut anchors: Vec<usize> = steps.iter().flat_map(|step| step.anchors.clone()).collect();
            assert_eq!(steps[6].anchors.len(), 2);
            assert!(steps.iter().all(|step| step.epoch == epoch && step.partners.len() == step.anchors.len()));
            anchors.sort_unstable();
            assert_eq!(anchors, (0..50).collect::<Vec<_>>());
        }
        // 100 draws from 20 retain samples: each exactly 5 times over two epochs
        let mut counts = [0; 20];
        (0..14).flat_map(|step| order.batch(step).partners).for_each(|partner| counts[partner] += 1);
        assert_eq!(counts, [5; 20]);
    }

    #[test]
    fn it_depends_on_seed_and_epoch_only() {
        let batch = |seed, step| Order::new(seed, true, 1000, 1000, 10).batch(step);
        assert_eq!(batch(1, 5), batch(1, 5));
        assert_ne!(batch(1, 5).anchors, batch(2, 5).anchors);
        assert_ne!(batch(1, 5).anchors, batch(1, 105).anchors);
        assert_ne!(batch(1, 5).anchors, batch(1, 5).partners);
        // any step can be asked for in any order: nothing is a generator's state
        let order = Order::new(1, true, 1000, 1000, 10);
        let late = order.batch(250);
        order.batch(3);
        assert_eq!(late, order.batch(250));
    }

    #[test]
    fn file_order_puts_retain_i_beside_forget_i() {
        let order = Order::new(0, false, 5, 3, 4);
        assert_eq!(order.batch(0).anchors, [0, 1, 2, 3]);
        assert_eq!(order.batch(0).partners, [0, 1, 2, 0]);
        assert_eq!(order.batch(3), StepBatch { epoch: 1, anchors: vec![4], partners: vec![1] });
        assert!(Order::new(0, false, 5, 0, 4).batch(0).partners.is_empty());
    }
}
