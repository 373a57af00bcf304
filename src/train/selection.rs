//! Which weights of what is trained may change: a mark for each element that this rank owns.
//!
//! Gradients of the others are 0 before norms and clipping. The optimizer gathers what is chosen, steps it, and puts it back, so
//! that neither weight decay nor momentum nor rounding touches the rest, and holds state for it alone.

use tch::{Kind, Tensor};

use super::layout::Layout;

/// One mask a bucket.
pub struct Selection {
    /// `[own part of the bucket]` bool.
    masks: Vec<Tensor>,
    /// Weights that were chosen and that could have been, over all ranks.
    pub chosen: u64,
    pub eligible: u64,
}

impl Selection {
    /// `masks`: bool, one a bucket, of the rank's own part.
    pub fn new(layout: &Layout, masks: Vec<Tensor>, chosen: u64, eligible: u64) -> Self {
        let fits = |(mask, own): (&Tensor, usize)| mask.kind() == Kind::Bool && mask.numel() == own;
        let own = layout.buckets.iter().map(|bucket| bucket.own.len());
        assert!(masks.iter().zip(own).all(fits), "invariant: a mark for each element of the own parts");
        Self { masks, chosen, eligible }
    }

    pub fn mask(&self, bucket: usize) -> &Tensor {
        &self.masks[bucket]
    }

    /// Where the chosen elements of a part of the bucket lie in it: `[chosen]` i32.
    pub(super) fn indices(&self, bucket: usize, part: &std::ops::Range<usize>) -> Tensor {
        let mask = self.masks[bucket].narrow(0, part.start as i64, part.len() as i64);
        mask.nonzero().squeeze_dim(1).to_kind(Kind::Int)
    }

    pub fn bytes(&self) -> usize {
        self.masks.iter().map(Tensor::numel).sum()
    }
}
