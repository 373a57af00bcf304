//! A forward pass whose inner values may be looked at and replaced, for probes of what a model still knows.

use tch::Tensor;

use super::attention_core;
use super::batch::Batch;
use super::decoder::Decoder;
use super::weights::Weights;
use super::{attention, mlp};

/// A value inside a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// What attention adds to the residual stream: this rank's part of `[tokens, hidden]`.
    Attention,
    /// What enters the down product, the coefficients of the value vectors: `[tokens, width / tp]`.
    MlpActivation,
    /// The residual stream behind the layer: this rank's part of `[tokens, hidden]`.
    Layer,
}

impl Decoder {
    /// The hidden states after the last layer, before the final norm: `[tokens, hidden]` on every rank, with the value at each site as
    /// `change(layer, site, value)` gives it back.
    ///
    /// All ranks of the tensor-parallel group call it with the same batch.
    pub fn forward_changed(
        &self,
        weights: &Weights,
        batch: &Batch,
        change: &mut dyn FnMut(usize, Site, Tensor) -> Tensor,
    ) -> Tensor {
        let mut x = self.enter(weights, batch);
        for layer in 0..self.arch.num_layers {
            let attend = &mut |_: usize, inputs: &attention_core::Projections, shape| {
                attention_core::forward(inputs, batch.attended(), shape).0
            };
            let added = attention::addition(self, weights, layer, batch, &x, attend);
            x = change(layer, Site::Attention, added) + x;
            let added = mlp::addition(self, weights, layer, &x, &mut |value| change(layer, Site::MlpActivation, value));
            x = change(layer, Site::Layer, added + x);
        }
        self.all_tokens(&x)
    }
}
