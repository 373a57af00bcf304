//! The MLP half block: `x + down(silu(gate) * up)`.

use tch::Tensor;

use super::decoder::{Decoder, Keep, bytes};
use super::linear;
use super::sharding::mlp_unit;
use super::weights::{Gradients, Weights};
use crate::kernels::{rms_norm, swiglu};

/// What forward kept of one MLP half block.
pub(super) struct MlpTape {
    /// Input: `[tokens, hidden]`, or this rank's part of the tokens.
    x: Tensor,
    rest: Option<Rest>,
}

struct Rest {
    /// `1/rms` of each row of `x`.
    rstd: Tensor,
    /// `[tokens, 2 * width]` of this rank's width.
    gate_up: Tensor,
}

impl MlpTape {
    pub(super) fn bytes(&self) -> usize {
        let rest = |rest: &Rest| bytes(&rest.rstd) + bytes(&rest.gate_up);
        bytes(&self.x) + self.rest.as_ref().map_or(0, rest)
    }
}

/// Gives the half block's output and what `keep` asks for.
pub(super) fn forward(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    x: Tensor,
    keep: Keep,
) -> (Tensor, Option<MlpTape>) {
    let params = &model.table.layers[layer];
    let (rest, _) = inside(model, weights, layer, &x);
    let partial = linear::forward(model, weights, layer, params.down, &swiglu::forward(&rest.gate_up));
    let mut y = model.reduce_tokens(partial);
    let _ = y.g_add_(&x);
    let tape = match keep {
        Keep::Nothing => None,
        Keep::Inputs => Some(MlpTape { x, rest: None }),
        Keep::Everything => Some(MlpTape { x, rest: Some(rest) }),
    };
    (y, tape)
}

/// Gives what the half block adds to its input, from an activation that `change` may replace; keeps nothing.
pub(super) fn addition(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    x: &Tensor,
    change: &mut dyn FnMut(Tensor) -> Tensor,
) -> Tensor {
    let activation = change(swiglu::forward(&inside(model, weights, layer, x).0.gate_up));
    model.reduce_tokens(linear::forward(model, weights, layer, model.table.layers[layer].down, &activation))
}

/// Turns the gradient of the output into that of the input, in place.
pub(super) fn backward(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    tape: MlpTape,
    grad: &mut Tensor,
    sink: &mut dyn Gradients,
) {
    let params = &model.table.layers[layer];
    let MlpTape { x, rest } = tape;
    let (Rest { rstd, gate_up }, normed) = match rest {
        Some(rest) => (rest, None),
        None => {
            let (rest, normed) = inside(model, weights, layer, &x);
            (rest, Some(normed))
        }
    };
    let d_down = model.gather_tokens(grad.shallow_clone());
    let d_activation = linear::backward(model, weights, layer, params.down, &d_down);
    let (d_gate_up, activation) = swiglu::backward(&d_activation, &gate_up);
    drop((gate_up, d_activation));
    linear::gradients(model, weights, layer, params.down, &d_down, &activation, sink);
    drop((d_down, activation));
    let again = || model.gather_tokens(rms_norm::apply(&x, weights.get(params.mlp_norm), &rstd));
    linear::gradients(model, weights, layer, params.gate_up, &d_gate_up, &normed.unwrap_or_else(again), sink);
    let d_normed = model.reduce_tokens(linear::backward(model, weights, layer, params.gate_up, &d_gate_up));
    let d_norm = rms_norm::backward(grad, &d_normed, &x, weights.get(params.mlp_norm), &rstd);
    sink.vector(params.mlp_norm, &d_norm);
    sink.complete(mlp_unit(layer));
}

/// The activation that enters the down product, from a tape that kept inputs: `[tokens, width]` of this rank's width.
pub(super) fn activation(model: &Decoder, weights: &Weights, layer: usize, tape: &MlpTape) -> Tensor {
    swiglu::forward(&inside(model, weights, layer, &tape.x).0.gate_up)
}

/// Up to the activation, and all tokens after the norm; the down product is not needed again in backward.
fn inside(model: &Decoder, weights: &Weights, layer: usize, x: &Tensor) -> (Rest, Tensor) {
    let params = &model.table.layers[layer];
    let (normed, rstd) = rms_norm::forward(x, weights.get(params.mlp_norm), model.arch.norm_eps);
    let normed = model.gather_tokens(normed);
    let gate_up = linear::forward(model, weights, layer, params.gate_up, &normed);
    (Rest { rstd, gate_up }, normed)
}
