//! Attention with the scores of one sequence held as matrices, in f32 inside; for what no fused kernel of a GPU takes.
//!
//! Memory: `heads * length^2` numbers, one sequence at a time.

use tch::{Kind, Tensor};

use super::{Projections, Shape, clear_rest};

/// As [`super::forward`].
pub(super) fn forward(inputs: &Projections, sequences: &[(i64, i64)], shape: Shape) -> Tensor {
    let (tokens, width) = (inputs.q.0.size()[0], shape.q_heads * shape.head_dim);
    let out = Tensor::empty([tokens, width], (inputs.q.0.kind(), inputs.q.0.device()));
    for &sequence in sequences {
        let [q, k, v] = heads(inputs, sequence, shape);
        let mixed = probabilities(&q, &k, sequence.1, shape).matmul(&v);
        put(&mixed, (&out, 0), shape.q_heads, sequence, shape);
    }
    clear_rest(&out, sequences);
    out
}

/// As [`super::backward`]. With P the probabilities: dV = P' dO, dS = P (dP - sum P dP), dQ = dS K, dK = dS' Q.
pub(super) fn backward(grad: &Tensor, inputs: &Projections, sequences: &[(i64, i64)], shape: Shape) -> Tensor {
    let grads = Tensor::empty([grad.size()[0], shape.row()], (grad.kind(), grad.device()));
    let (q_end, kv) = (shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    for &sequence in sequences {
        let [q, k, v] = heads(inputs, sequence, shape);
        let d_out = grouped((grad, 0), shape.q_heads, sequence, shape);
        let p = probabilities(&q, &k, sequence.1, shape);
        let d_v = p.transpose(1, 2).matmul(&d_out);
        let d_p = d_out.matmul(&v.transpose(1, 2));
        let inner = (&p * &d_p).sum_dim_intlist(-1i64, true, p.kind());
        let d_scores = (d_p - inner) * p * shape.scale();
        put(&d_scores.matmul(&k), (&grads, 0), shape.q_heads, sequence, shape);
        put(&d_scores.transpose(1, 2).matmul(&q), (&grads, q_end), shape.kv_heads, sequence, shape);
        put(&d_v, (&grads, q_end + kv), shape.kv_heads, sequence, shape);
    }
    clear_rest(&grads, sequences);
    grads
}

/// `[kv_heads, share * len, len]`: the query heads of a key head one below the other.
fn probabilities(q: &Tensor, k: &Tensor, len: i64, shape: Shape) -> Tensor {
    let seen = Tensor::ones([len, len], (Kind::Bool, q.device())).tril(0).triu(1 - shape.window.unwrap_or(len));
    let hidden = seen.logical_not().repeat([shape.q_heads / shape.kv_heads, 1]);
    let scores = q.matmul(&k.transpose(1, 2)) * shape.scale();
    scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, q.kind())
}

fn heads(inputs: &Projections, sequence: (i64, i64), shape: Shape) -> [Tensor; 3] {
    [
        grouped(inputs.q, shape.q_heads, sequence, shape),
        grouped(inputs.k, shape.kv_heads, sequence, shape),
        grouped(inputs.v, shape.kv_heads, sequence, shape),
    ]
}

/// One sequence's heads by key head, f32 or f64: `[kv_heads, share * len, head_dim]`.
fn grouped((x, first): (&Tensor, i64), heads: i64, (start, len): (i64, i64), shape: Shape) -> Tensor {
    let part = x.narrow(0, start, len).narrow(1, first, heads * shape.head_dim);
    let part = part.unflatten(1, [heads, shape.head_dim]).transpose(0, 1);
    let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    part.to_kind(kind).reshape([shape.kv_heads, -1, shape.head_dim])
}

/// Writes what [`grouped`] would read.
fn put(values: &Tensor, (x, first): (&Tensor, i64), heads: i64, (start, len): (i64, i64), shape: Shape) {
    let values = values.view([heads, len, shape.head_dim]).transpose(0, 1).reshape([len, heads * shape.head_dim]);
    x.narrow(0, start, len).narrow(1, first, heads * shape.head_dim).copy_(&values);
}
