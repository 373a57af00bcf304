//! The attention half block: `x + output(attention(rotary(qkv(norm(x)))))`.

use tch::{Kind, Tensor};

use super::attention_core::{self, Normalisers, Projections};
use super::batch::Batch;
use super::decoder::{Decoder, Keep, bytes};
use super::linear;
use super::sharding::{LayerParams, attention_unit};
use super::weights::{Gradients, Weights};
use crate::kernels::{rms_norm, rotary};

/// What forward kept of one attention half block.
pub(super) struct AttentionTape {
    /// Input: `[tokens, hidden]`, or this rank's part of the tokens.
    x: Tensor,
    /// Everything else, unless it is to be computed again.
    rest: Option<Rest>,
}

/// All that lies between the norm and the output product.
struct Rest {
    /// `1/rms` of each row of `x`.
    rstd: Tensor,
    projected: Projected,
    /// `[tokens, heads * head_dim]` of this rank's heads.
    mixed: Tensor,
    normalisers: Normalisers,
}

/// q, k and v after norms and rotation.
struct Projected {
    /// `[tokens, (heads + 2 kv_heads) * head_dim]`: q, k rotated in place unless they are normalised; v.
    qkv: Tensor,
    /// q and k normalised and rotated, with what their norms' backward needs; only for models with q/k norms.
    normed: Option<(Normed, Normed)>,
}

struct Normed {
    /// `[tokens, heads * head_dim]`, rotated.
    values: Tensor,
    /// `1/rms` of each head: `[tokens * heads]`.
    rstd: Tensor,
}

impl AttentionTape {
    pub(super) fn bytes(&self) -> usize {
        let normed = |normed: &Normed| bytes(&normed.values) + bytes(&normed.rstd);
        let rest = |rest: &Rest| {
            let Projected { qkv, normed: both } = &rest.projected;
            let both = both.as_ref().map_or(0, |(q, k)| normed(q) + normed(k));
            bytes(&rest.rstd) + bytes(qkv) + both + bytes(&rest.mixed) + rest.normalisers.bytes()
        };
        bytes(&self.x) + self.rest.as_ref().map_or(0, rest)
    }
}

/// Gives the half block's output and what `keep` asks for.
pub(super) fn forward(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    batch: &Batch,
    x: Tensor,
    keep: Keep,
) -> (Tensor, Option<AttentionTape>) {
    let params = &model.table.layers[layer];
    let (rest, _) = inside(model, weights, layer, batch, &x);
    let partial = linear::forward(model, weights, layer, params.output, &rest.mixed);
    let mut y = model.reduce_tokens(partial);
    let _ = y.g_add_(&x);
    let tape = match keep {
        Keep::Nothing => None,
        Keep::Inputs => Some(AttentionTape { x, rest: None }),
        Keep::Everything => Some(AttentionTape { x, rest: Some(rest) }),
    };
    (y, tape)
}

/// Gives what the half block adds to its input, with attention as `attend(layer, q k v, shape)` computes it; keeps nothing.
pub(super) fn addition(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    batch: &Batch,
    x: &Tensor,
    attend: &mut dyn FnMut(usize, &Projections, attention_core::Shape) -> Tensor,
) -> Tensor {
    let (projected, _, _) = enter(model, weights, layer, batch, x);
    let mixed = attend(layer, &inputs(model, &projected), core_shape(model, layer));
    model.reduce_tokens(linear::forward(model, weights, layer, model.table.layers[layer].output, &mixed))
}

/// Turns the gradient of the output into that of the input, in place.
pub(super) fn backward(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    batch: &Batch,
    tape: AttentionTape,
    grad: &mut Tensor,
    sink: &mut dyn Gradients,
) {
    let params = &model.table.layers[layer];
    let AttentionTape { x, rest } = tape;
    let (rest, normed) = match rest {
        Some(rest) => (rest, None),
        None => {
            let (rest, normed) = inside(model, weights, layer, batch, &x);
            (rest, Some(normed))
        }
    };
    let d_output = model.gather_tokens(grad.shallow_clone());
    let d_mixed = linear::backward(model, weights, layer, params.output, &d_output);
    linear::gradients(model, weights, layer, params.output, &d_output, &rest.mixed, sink);
    drop(d_output);
    let Rest { rstd, projected, mixed, normalisers } = rest;
    let shape = core_shape(model, layer);
    let d_qkv =
        attention_core::backward(&d_mixed, &inputs(model, &projected), &mixed, normalisers, batch.attended(), shape);
    drop((d_mixed, mixed));
    let d_qkv = unproject(model, weights, params, batch, projected, d_qkv, sink);
    let again = || model.gather_tokens(rms_norm::apply(&x, weights.get(params.attention_norm), &rstd));
    linear::gradients(model, weights, layer, params.qkv, &d_qkv, &normed.unwrap_or_else(again), sink);
    if let Some(bias) = params.qkv_bias {
        sink.vector(bias, &d_qkv.sum_dim_intlist(0i64, false, Kind::Float));
    }
    let d_normed = model.reduce_tokens(linear::backward(model, weights, layer, params.qkv, &d_qkv));
    let d_norm = rms_norm::backward(grad, &d_normed, &x, weights.get(params.attention_norm), &rstd);
    sink.vector(params.attention_norm, &d_norm);
    sink.complete(attention_unit(layer));
}

/// Up to the mixed values, and all tokens after the norm.
fn inside(model: &Decoder, weights: &Weights, layer: usize, batch: &Batch, x: &Tensor) -> (Rest, Tensor) {
    let (projected, rstd, normed) = enter(model, weights, layer, batch, x);
    let (mixed, normalisers) =
        attention_core::forward(&inputs(model, &projected), batch.attended(), core_shape(model, layer));
    (Rest { rstd, projected, mixed, normalisers }, normed)
}

/// Up to q, k and v; with `1/rms` of each row of `x`, and all tokens after the norm.
fn enter(model: &Decoder, weights: &Weights, layer: usize, batch: &Batch, x: &Tensor) -> (Projected, Tensor, Tensor) {
    let params = &model.table.layers[layer];
    let (normed, rstd) = rms_norm::forward(x, weights.get(params.attention_norm), model.arch.norm_eps);
    let normed = model.gather_tokens(normed);
    let mut qkv = linear::forward(model, weights, layer, params.qkv, &normed);
    if let Some(bias) = params.qkv_bias {
        let _ = qkv.g_add_(weights.get(bias));
    }
    (project(model, weights, params, batch, qkv), rstd, normed)
}

/// Norms (where the model has them) and rotation of q and k.
fn project(model: &Decoder, weights: &Weights, params: &LayerParams, batch: &Batch, mut qkv: Tensor) -> Projected {
    let Shape { q_heads, kv_heads, head_dim } = Shape::of(model);
    let (Some(q_norm), Some(k_norm)) = (params.q_norm, params.k_norm) else {
        rotary::rotate(&mut qkv, q_heads + kv_heads, head_dim, &batch.cos, &batch.sin, false);
        return Projected { qkv, normed: None };
    };
    let norm = |first: i64, heads: i64, weight: &Tensor| {
        let rows = head_rows(&qkv, first, heads, head_dim);
        let (values, rstd) = rms_norm::forward(&rows, weight, model.arch.norm_eps);
        let mut values = values.view([-1, heads * head_dim]);
        rotary::rotate(&mut values, heads, head_dim, &batch.cos, &batch.sin, false);
        Normed { values, rstd }
    };
    let q = norm(0, q_heads, weights.get(q_norm));
    let k = norm(q_heads, kv_heads, weights.get(k_norm));
    Projected { qkv, normed: Some((q, k)) }
}

/// From the gradient of the rotated q, k (and v) to that of the product's output.
fn unproject(
    model: &Decoder,
    weights: &Weights,
    params: &LayerParams,
    batch: &Batch,
    projected: Projected,
    mut d_qkv: Tensor,
    sink: &mut dyn Gradients,
) -> Tensor {
    let Shape { q_heads, kv_heads, head_dim } = Shape::of(model);
    rotary::rotate(&mut d_qkv, q_heads + kv_heads, head_dim, &batch.cos, &batch.sin, true);
    let Some((q, k)) = projected.normed else { return d_qkv };
    for (param, first, heads, normed) in [(params.q_norm, 0, q_heads, q), (params.k_norm, q_heads, kv_heads, k)] {
        let param = param.expect("invariant: a model has both norms or none");
        let x = head_rows(&projected.qkv, first, heads, head_dim);
        let dy = head_rows(&d_qkv, first, heads, head_dim);
        let mut dx = dy.zeros_like();
        sink.vector(param, &rms_norm::backward(&mut dx, &dy, &x, weights.get(param), &normed.rstd));
        d_qkv.narrow(1, first * head_dim, heads * head_dim).copy_(&dx.view([-1, heads * head_dim]));
    }
    d_qkv
}

/// This rank's heads.
struct Shape {
    q_heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

impl Shape {
    fn of(model: &Decoder) -> Self {
        let tp = model.tp.size() as i64;
        let arch = &model.arch;
        Self { q_heads: arch.num_heads / tp, kv_heads: arch.num_kv_heads / tp, head_dim: arch.head_dim }
    }
}

/// `heads` heads of a row from head `first` on, one row each: `[tokens * heads, head_dim]`.
fn head_rows(x: &Tensor, first: i64, heads: i64, head_dim: i64) -> Tensor {
    x.narrow(1, first * head_dim, heads * head_dim).contiguous().view([-1, head_dim])
}

fn core_shape(model: &Decoder, layer: usize) -> attention_core::Shape {
    let Shape { q_heads, kv_heads, head_dim } = Shape::of(model);
    attention_core::Shape { q_heads, kv_heads, head_dim, window: model.arch.windows[layer] }
}

/// Where q, k and v lie.
fn inputs<'a>(model: &Decoder, projected: &'a Projected) -> Projections<'a> {
    let Shape { q_heads, kv_heads, head_dim } = Shape::of(model);
    let qkv = &projected.qkv;
    let (k_first, v_first) = (q_heads * head_dim, (q_heads + kv_heads) * head_dim);
    match &projected.normed {
        None => Projections { q: (qkv, 0), k: (qkv, k_first), v: (qkv, v_first) },
        Some((q, k)) => Projections { q: (&q.values, 0), k: (&k.values, 0), v: (qkv, v_first) },
    }
}
