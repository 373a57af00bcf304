//! Attention on GPUs: all sequences of a batch in one call of libtorch's flash kernel (arXiv 2307.08691).

use tch::{Kind, Tensor};

use super::{Projections, Shape, clear_rest};
use crate::abi::torch_cuda::{self, FlashState, Packed};

/// Whether the kernel has code for these numbers: 16 bits, heads of a multiple of 8 up to 256.
pub(super) fn takes(q: &Tensor, shape: Shape) -> bool {
    let kind = matches!(q.kind(), Kind::BFloat16 | Kind::Half);
    kind && shape.head_dim % 8 == 0 && shape.head_dim <= 256
}

/// As [`super::forward`].
pub(super) fn forward(
    inputs: &Projections,
    sequences: &[(i64, i64)],
    bounds: &Tensor,
    shape: Shape,
) -> (Tensor, FlashState) {
    let [q, k, v] = views(inputs, shape);
    let (out, state) = torch_cuda::flash_forward(&q, &k, &v, &packed(sequences, bounds, shape));
    let out = out.view([-1, shape.q_heads * shape.head_dim]);
    clear_rest(&out, sequences);
    (out, state)
}

/// As [`super::backward`].
pub(super) fn backward(
    grad: &Tensor,
    inputs: &Projections,
    out: &Tensor,
    state: &FlashState,
    sequences: &[(i64, i64)],
    bounds: &Tensor,
    shape: Shape,
) -> Tensor {
    let [q, k, v] = views(inputs, shape);
    let of_q = |x: &Tensor| view((x, 0), shape.q_heads, shape);
    let packed = packed(sequences, bounds, shape);
    let grads = torch_cuda::flash_backward(&of_q(&grad.contiguous()), [&q, &k, &v], &of_q(out), state, &packed);
    let grads = Tensor::cat(&grads.map(|grad| grad.flatten(1, 2)), 1);
    clear_rest(&grads, sequences);
    grads
}

fn packed<'a>(sequences: &[(i64, i64)], bounds: &'a Tensor, shape: Shape) -> Packed<'a> {
    let longest = sequences.iter().map(|(_, len)| *len).max().unwrap_or(0);
    Packed { bounds, longest, window: shape.window, scale: shape.scale() }
}

/// `[tokens, heads, head_dim]` of q, k and v, without a copy.
fn views(inputs: &Projections, shape: Shape) -> [Tensor; 3] {
    [view(inputs.q, shape.q_heads, shape), view(inputs.k, shape.kv_heads, shape), view(inputs.v, shape.kv_heads, shape)]
}

fn view((x, first): (&Tensor, i64), heads: i64, shape: Shape) -> Tensor {
    x.narrow(1, first, heads * shape.head_dim).unflatten(1, [heads, shape.head_dim])
}
