//! The next token's logits: which is the largest, or all of them. For generation; knows nothing of gradients.

use tch::{Kind, Tensor};

use crate::kernels::product::product;
use crate::kernels::{rms_norm, softmax};
use crate::model::{Decoder, Weights};

impl Decoder {
    /// The token with the largest logit of each row (the first, where several are equal), `[rows]` i64, the same on all ranks.
    ///
    /// `hidden: [rows, hidden]` before the final norm. One gather of four numbers a row. All ranks of the tensor-parallel group call
    /// it.
    pub fn first_choices(&self, weights: &Weights, hidden: &Tensor) -> Tensor {
        let logits = self.next_logits(weights, hidden);
        let nowhere = Tensor::full([hidden.size()[0]], -1, (Kind::Int64, self.device));
        self.combine(&softmax::statistics(&logits, &nowhere)).select(0, 2).to_kind(Kind::Int64)
    }

    /// All logits of each row, `[rows, vocabulary]` f32, the same bits on all ranks. All ranks of the tensor-parallel group call it.
    pub fn all_logits(&self, weights: &Weights, hidden: &Tensor) -> Tensor {
        let (rows, ranks) = (hidden.size()[0], self.tp.size() as i64);
        let logits = self.next_logits(weights, hidden).to_kind(Kind::Float);
        // shards may differ by a row of the vocabulary
        let width = (self.arch.vocab + ranks - 1) / ranks;
        let wide = Tensor::zeros([rows, width], (Kind::Float, self.device));
        wide.narrow(1, 0, logits.size()[1]).copy_(&logits);
        let all = self.tp.all_gather(&wide).view([ranks, rows, width]);
        let shards = (0..self.tp.size()).map(|rank| {
            let shard = crate::dist::part(self.arch.vocab as usize, self.tp.size(), rank);
            all.get(rank as i64).narrow(1, 0, shard.len() as i64)
        });
        Tensor::cat(&shards.collect::<Vec<_>>(), 1)
    }

    /// Logits of this rank's vocabulary: `[rows, vocabulary of this rank]`.
    fn next_logits(&self, weights: &Weights, hidden: &Tensor) -> Tensor {
        let norm = weights.get(self.table.final_norm);
        let (normed, _) = rms_norm::forward(&hidden.contiguous(), norm, self.arch.norm_eps);
        product(&normed, &weights.get(self.table.head).tr())
    }
}
