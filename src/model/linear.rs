//! Products with a matrix and its low-rank adapters, and their gradients.
//!
//! An adapter's inner product `x A^T` is computed again in backward: it costs r columns.

use tch::Tensor;

use super::decoder::Decoder;
use super::sharding::{Adapter, ParamId};
use super::weights::{Gradients, Weights};
use crate::kernels::product::{add_product, product};

/// `x W^T` with the adapters' part: `[tokens, rows]` of `x: [tokens, columns]`, this rank's.
pub(super) fn forward(model: &Decoder, weights: &Weights, layer: usize, param: ParamId, x: &Tensor) -> Tensor {
    let y = product(x, &weights.get(param).tr());
    for adapter in adapters(model, layer, param) {
        let inner = inner(model, weights, adapter, x);
        add_product(&mut rows(&y, adapter), &inner, &weights.get(adapter.b).tr());
    }
    y
}

/// The gradient of `x` from that of the product.
pub(super) fn backward(model: &Decoder, weights: &Weights, layer: usize, param: ParamId, dy: &Tensor) -> Tensor {
    let mut dx = product(dy, weights.get(param));
    for adapter in adapters(model, layer, param) {
        add_product(&mut dx, &d_inner(model, weights, adapter, dy), weights.get(adapter.a));
    }
    dx
}

/// Gives the gradients of the matrix and of its adapters to `sink`.
pub(super) fn gradients(
    model: &Decoder,
    weights: &Weights,
    layer: usize,
    param: ParamId,
    dy: &Tensor,
    x: &Tensor,
    sink: &mut dyn Gradients,
) {
    sink.product(param, dy, x);
    for adapter in adapters(model, layer, param) {
        sink.product(adapter.b, &rows(dy, adapter).contiguous(), &inner(model, weights, adapter, x));
        sink.product(adapter.a, &d_inner(model, weights, adapter, dy), x);
    }
}

fn adapters(model: &Decoder, layer: usize, param: ParamId) -> impl Iterator<Item = &Adapter> {
    model.table.layers[layer].adapters.iter().filter(move |adapter| adapter.of == param)
}

/// `scale * x A^T`: `[tokens, r]`.
fn inner(model: &Decoder, weights: &Weights, adapter: &Adapter, x: &Tensor) -> Tensor {
    product(x, &weights.get(adapter.a).tr()) * model.table.adapter_scale
}

/// `scale * dy B`: `[tokens, r]`.
fn d_inner(model: &Decoder, weights: &Weights, adapter: &Adapter, dy: &Tensor) -> Tensor {
    product(&rows(dy, adapter), weights.get(adapter.b)) * model.table.adapter_scale
}

/// The adapter's part of `[tokens, rows of the matrix]`.
fn rows(y: &Tensor, adapter: &Adapter) -> Tensor {
    y.narrow(1, adapter.rows.start, adapter.rows.end - adapter.rows.start)
}
