//! Forward and backward over the half blocks.
//!
//! A decoder layer is two half blocks, `x + attention(norm(x))` and `x + mlp(norm(x))`. Forward keeps of each what the
//! recompute policy says; backward walks them in reverse, one explicit vector-Jacobian product each. The tensor-parallel
//! collectives stand between the products, in plain sight; a recompute costs none that a backward without it has not.

use std::ops::Range;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::architecture::Architecture;
use super::attention::{self, AttentionTape};
use super::batch::Batch;
use super::head::LogitsPool;
use super::mlp::{self, MlpTape};
use super::sharding::Table;
use super::weights::{Gradients, Weights};
use crate::dist::{Group, Reduce};
use crate::telemetry::{Clock, Part};

/// The model without its weights: shape, shards and the ranks it is spread over.
pub struct Decoder {
    pub arch: Architecture,
    pub table: Table,
    pub tp: Rc<Group>,
    /// Between half blocks each rank holds its part of the tokens instead of all of them.
    pub sequence_parallel: bool,
    pub device: Device,
    /// Where the time goes.
    pub clock: Clock,
    pub logits: LogitsPool,
}

/// What forward keeps for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: no backward follows.
    Nothing,
    /// The input of each half block; backward computes the rest again.
    Inputs,
    /// All that backward needs.
    Everything,
}

/// What forward kept, one entry a half block.
pub struct Tape {
    attention: Vec<AttentionTape>,
    mlp: Vec<MlpTape>,
}

impl Tape {
    /// Bytes of everything that was kept.
    pub fn bytes(&self) -> usize {
        let attention: usize = self.attention.iter().map(AttentionTape::bytes).sum();
        attention + self.mlp.iter().map(MlpTape::bytes).sum::<usize>()
    }
}

/// Bytes of a tensor's elements.
pub(super) fn bytes(x: &Tensor) -> usize {
    x.numel() * x.kind().elt_size_in_bytes()
}

impl Decoder {
    /// Packs sequences for this model. `lengths` add up to the number of `tokens`.
    pub fn batch(&self, tokens: &[i64], lengths: &[usize]) -> Batch {
        Batch::new(tokens, lengths, self.token_multiple(), &self.arch.rope, self.device)
    }

    /// The number of tokens in a batch is a multiple of this.
    pub(super) fn token_multiple(&self) -> usize {
        if self.sequence_parallel { self.tp.size() } else { 1 }
    }

    /// The hidden states after the last layer, before the final norm: `[tokens, hidden]` on every rank.
    ///
    /// All ranks of the tensor-parallel group call it with the same batch.
    pub fn forward(&self, weights: &Weights, batch: &Batch, keep: Keep) -> (Tensor, Tape) {
        let x = self.enter(weights, batch);
        let (x, tape) = self.through(weights, batch, x, 0..self.arch.num_layers, keep);
        (self.all_tokens(&x), tape)
    }

    /// The rows that enter the first layer: this rank's part of the tokens with sequence parallelism, else all of them.
    pub fn enter(&self, weights: &Weights, batch: &Batch) -> Tensor {
        self.clock.time(Part::Embedding, || self.embed(weights, batch))
    }

    /// Runs some of the layers over the rows that enter the first of them; gives the rows that enter the one behind the last.
    pub fn through(
        &self,
        weights: &Weights,
        batch: &Batch,
        mut x: Tensor,
        layers: Range<usize>,
        keep: Keep,
    ) -> (Tensor, Tape) {
        let time = &self.clock;
        let mut tape = Tape { attention: Vec::new(), mlp: Vec::new() };
        for layer in layers {
            let (y, kept) = time.time(Part::Attention, || attention::forward(self, weights, layer, batch, x, keep));
            tape.attention.extend(kept);
            let (y, kept) = time.time(Part::Mlp, || mlp::forward(self, weights, layer, y, keep));
            tape.mlp.extend(kept);
            x = y;
        }
        (x, tape)
    }

    /// Walks the half blocks in reverse, handing every gradient to `sink`.
    ///
    /// `grad: [tokens, hidden]`, complete (not partial) on every rank. All ranks of the tensor-parallel group call it.
    pub fn backward(&self, weights: &Weights, batch: &Batch, tape: Tape, grad: Tensor, sink: &mut dyn Gradients) {
        let mut grad = if self.sequence_parallel { self.own_tokens(&grad).copy() } else { grad };
        self.back_through(weights, batch, tape, 0..self.arch.num_layers, &mut grad, sink);
        self.leave(batch, grad, sink);
    }

    /// The reverse of [`Self::through`]: turns the gradient of the rows behind the layers into that of the rows before them, in place.
    pub fn back_through(
        &self,
        weights: &Weights,
        batch: &Batch,
        tape: Tape,
        layers: Range<usize>,
        grad: &mut Tensor,
        sink: &mut dyn Gradients,
    ) {
        let Tape { mut attention, mut mlp } = tape;
        for layer in layers.rev() {
            let kept = mlp.pop().expect("invariant: forward kept one entry a half block");
            self.clock.time(Part::Mlp, || mlp::backward(self, weights, layer, kept, grad, sink));
            let kept = attention.pop().expect("invariant: forward kept one entry a half block");
            let run = || attention::backward(self, weights, layer, batch, kept, grad, sink);
            self.clock.time(Part::Attention, run);
        }
    }

    /// What enters a layer's down product, all tokens' of this rank's width: `[tokens, width / tp]`. `tape`: of all layers. All ranks
    /// of the tensor-parallel group call it.
    pub fn mlp_activation(&self, weights: &Weights, layer: usize, tape: &Tape) -> Tensor {
        mlp::activation(self, weights, layer, &tape.mlp[layer])
    }

    /// The reverse of [`Self::enter`]; the last of a backward pass.
    pub fn leave(&self, batch: &Batch, grad: Tensor, sink: &mut dyn Gradients) {
        let grad = self.all_tokens(&grad);
        self.clock.time(Part::Embedding, || self.embed_backward(batch, &grad, sink));
        sink.complete(0);
    }

    /// Enters a half block's column-parallel product: all tokens, from whatever this rank holds of them.
    pub(super) fn gather_tokens(&self, x: Tensor) -> Tensor {
        if self.sequence_parallel { self.tp.all_gather(&x) } else { x }
    }

    /// Leaves a row-parallel product, or a column-parallel one in backward: the sum over the ranks of `[tokens, hidden]`.
    pub(super) fn reduce_tokens(&self, mut partial: Tensor) -> Tensor {
        if self.sequence_parallel {
            self.tp.reduce_scatter_now(&partial)
        } else {
            self.tp.all_reduce(&mut partial, Reduce::Sum);
            partial
        }
    }

    /// All tokens' rows from whatever this rank holds of them between layers.
    pub fn all_tokens(&self, x: &Tensor) -> Tensor {
        if self.sequence_parallel { self.tp.all_gather(x) } else { x.shallow_clone() }
    }

    /// What this rank holds between layers of all tokens' rows: a view.
    pub fn own_tokens(&self, x: &Tensor) -> Tensor {
        if !self.sequence_parallel {
            return x.shallow_clone();
        }
        let each = x.size()[0] / self.tp.size() as i64;
        x.narrow(0, self.tp.rank() as i64 * each, each)
    }

    /// Each rank looks up the ids in its rows of the vocabulary; exactly one contributes to each token.
    fn embed(&self, weights: &Weights, batch: &Batch) -> Tensor {
        let weight = weights.get(self.table.embedding);
        if self.tp.size() == 1 {
            return weight.index_select(0, &batch.ids);
        }
        let (local, here) = self.local_ids(&batch.ids);
        let x = weight.index_select(0, &local) * here.unsqueeze(1).to_kind(weight.kind());
        self.reduce_tokens(x)
    }

    fn embed_backward(&self, batch: &Batch, grad: &Tensor, sink: &mut dyn Gradients) {
        if self.tp.size() == 1 {
            return sink.rows(self.table.embedding, &batch.ids, grad);
        }
        let (local, here) = self.local_ids(&batch.ids);
        if self.device != Device::Cpu {
            // how many are here is known to the device alone; zeros for row 0 cost less than asking it
            return sink.rows(self.table.embedding, &local, &(grad * here.unsqueeze(1).to_kind(grad.kind())));
        }
        let at = here.nonzero().squeeze_dim(1);
        sink.rows(self.table.embedding, &local.index_select(0, &at), &grad.index_select(0, &at));
    }

    /// Ids relative to this rank's rows, 0 where they are elsewhere, and which are here.
    pub(super) fn local_ids(&self, ids: &Tensor) -> (Tensor, Tensor) {
        let vocab = &self.table.vocab;
        let here = ids.ge(vocab.start).logical_and(&ids.lt(vocab.end));
        ((ids - vocab.start) * here.to_kind(Kind::Int64), here)
    }
}
