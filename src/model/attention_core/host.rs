//! Attention on CPUs: short sequences packed head by head for batched matrix products, long ones through libtorch's flash
//! kernel.

use tch::{Kind, Tensor};

use super::{Projections, Shape, clear_rest};
use crate::kernels::attention::{self as kernel, Group, Heads, Sight};
use crate::kernels::product::{product, product_into};

/// Longest sequence whose scores are held as a matrix. Unit: tokens.
const LONGEST_PACKED: i64 = 1024;

/// As [`super::forward`]; gives the log-sum-exp of each query's scores, one tensor a group of sequences.
pub(super) fn forward(inputs: &Projections, sequences: &[(i64, i64)], shape: Shape) -> (Tensor, Vec<Tensor>) {
    let (tokens, width) = (inputs.q.0.size()[0], shape.q_heads * shape.head_dim);
    let mut out = Tensor::empty([tokens, width], (inputs.q.0.kind(), inputs.q.0.device()));
    let (short, long) = partition(inputs.q.0, sequences);
    let mut normalisers = Vec::new();
    for group in Group::cut(&short) {
        normalisers.push(packed_forward(inputs, &group, shape, &mut out));
    }
    for sequence in long {
        normalisers.push(flash_forward(inputs, sequence, shape, &out));
    }
    clear_rest(&out, sequences);
    (out, normalisers)
}

/// As [`super::backward`].
pub(super) fn backward(
    grad: &Tensor,
    inputs: &Projections,
    out: &Tensor,
    normalisers: Vec<Tensor>,
    sequences: &[(i64, i64)],
    shape: Shape,
) -> Tensor {
    let mut grads = Tensor::empty([grad.size()[0], shape.row()], (grad.kind(), grad.device()));
    let (short, long) = partition(inputs.q.0, sequences);
    let mut normalisers = normalisers.into_iter();
    let mut next = || normalisers.next().expect("invariant: forward left one a group");
    for group in Group::cut(&short) {
        packed_backward(grad, inputs, &next(), &group, shape, &mut grads);
    }
    for sequence in long {
        flash_backward(grad, inputs, out, &next(), sequence, shape, &grads);
    }
    clear_rest(&grads, sequences);
    grads
}

/// Sequences for packed attention, and the others.
fn partition(q: &Tensor, sequences: &[(i64, i64)]) -> (Vec<(i64, i64)>, Vec<(i64, i64)>) {
    if kernel::takes(q) { by_length(sequences) } else { (Vec::new(), sequences.to_vec()) }
}

/// Sequences that are short enough for packed attention, and the others.
pub(super) fn by_length(sequences: &[(i64, i64)]) -> (Vec<(i64, i64)>, Vec<(i64, i64)>) {
    sequences.iter().partition(|(_, len)| *len <= LONGEST_PACKED)
}

impl Shape {
    fn sight(&self) -> Sight {
        Sight { window: self.window.map(|window| window as usize), scale: self.scale() as f32 }
    }

    /// The heads of one projection; `share`: of them for each key/value head.
    fn heads(&self, (x, first): (&Tensor, i64), share: i64) -> Heads {
        Heads {
            row: x.size()[1] as usize,
            first: first as usize,
            kv_heads: self.kv_heads as usize,
            share: share as usize,
            dim: self.head_dim as usize,
        }
    }

    fn share(&self) -> i64 {
        self.q_heads / self.kv_heads
    }
}

fn pack(inputs: &Projections, group: &Group, shape: Shape) -> (Tensor, Tensor, Tensor) {
    let one = |x: (&Tensor, i64), share| kernel::pack(x.0, group, shape.heads(x, share), shape.share() as usize);
    (one(inputs.q, shape.share()), one(inputs.k, 1), one(inputs.v, 1))
}

fn packed_forward(inputs: &Projections, group: &Group, shape: Shape, out: &mut Tensor) -> Tensor {
    let (q, k, v) = pack(inputs, group, shape);
    let mixed = q.empty_like();
    let (firsts, chunk) = chunks(&q, group, shape);
    let log_sums: Vec<Tensor> = firsts
        .map(|first| {
            let part = |t: &Tensor| t.narrow(0, first, chunk);
            let mut scores = product(&part(&q), &part(&k).transpose(1, 2));
            let log_sums = kernel::softmax(&mut scores, group, first as usize, shape.kv_heads as usize, shape.sight());
            product_into(&part(&mixed), &scores, &part(&v));
            log_sums
        })
        .collect();
    kernel::unpack(&mixed, group, shape.heads((out, 0), shape.share()), out);
    Tensor::cat(&log_sums, 0)
}

/// First entry of each chunk of a packed tensor, and the entries of one chunk.
fn chunks(q: &Tensor, group: &Group, shape: Shape) -> (impl Iterator<Item = i64> + use<>, i64) {
    let chunk = group.chunk(shape.share() as usize);
    ((0..q.size()[0]).step_by(chunk), chunk as i64)
}

/// With S the scaled scores, P their softmax: dV = P' dO, dP = dO V', dS = P (dP - sum P dP), dQ = dS K, dK = dS' Q.
fn packed_backward(
    grad: &Tensor,
    inputs: &Projections,
    log_sums: &Tensor,
    group: &Group,
    shape: Shape,
    grads: &mut Tensor,
) {
    let (q, k, v) = pack(inputs, group, shape);
    let d_out = kernel::pack(grad, group, shape.heads((grad, 0), shape.share()), shape.share() as usize);
    let sight = shape.sight();
    let (d_q, d_k, d_v) = (q.empty_like(), k.empty_like(), v.empty_like());
    let (firsts, chunk) = chunks(&q, group, shape);
    for first in firsts {
        let part = |t: &Tensor| t.narrow(0, first, chunk);
        let (q, k, v, d_out) = (part(&q), part(&k), part(&v), part(&d_out));
        let mut p = product(&q, &k.transpose(1, 2));
        kernel::probabilities(&mut p, &part(log_sums), group, first as usize, shape.kv_heads as usize, sight);
        product_into(&part(&d_v), &p.transpose(1, 2), &d_out);
        let mut d_scores = product(&d_out, &v.transpose(1, 2));
        kernel::softmax_backward(&mut d_scores, &p, sight.scale);
        product_into(&part(&d_q), &d_scores, &k);
        product_into(&part(&d_k), &d_scores.transpose(1, 2), &q);
    }
    let (q_end, kv) = (shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    for (values, first, share) in [(d_q, 0, shape.share()), (d_k, q_end, 1), (d_v, q_end + kv, 1)] {
        let heads = shape.heads((grads, first), share);
        kernel::unpack(&values, group, heads, grads);
    }
}

/// A view `[1, heads, len, head_dim]` of one sequence.
fn view((x, first): (&Tensor, i64), heads: i64, (start, len): (i64, i64), shape: Shape) -> Tensor {
    let part = x.narrow(0, start, len).narrow(1, first, heads * shape.head_dim);
    part.unflatten(1, [heads, shape.head_dim]).transpose(0, 1).unsqueeze(0)
}

fn views(inputs: &Projections, sequence: (i64, i64), shape: Shape) -> [Tensor; 3] {
    let one = |x, heads| view(x, heads, sequence, shape);
    [one(inputs.q, shape.q_heads), one(inputs.k, shape.kv_heads), one(inputs.v, shape.kv_heads)]
}

fn flash_forward(inputs: &Projections, sequence: (i64, i64), shape: Shape, out: &Tensor) -> Tensor {
    let [q, k, v] = views(inputs, sequence, shape);
    let mask = window_mask(sequence.1, shape.window, &q);
    let causal = mask.is_none();
    let (result, log_sums) =
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu(&q, &k, &v, 0.0, causal, mask.as_ref(), None);
    view((out, 0), shape.q_heads, sequence, shape).copy_(&result);
    log_sums
}

fn flash_backward(
    grad: &Tensor,
    inputs: &Projections,
    out: &Tensor,
    log_sums: &Tensor,
    sequence: (i64, i64),
    shape: Shape,
    grads: &Tensor,
) {
    let [q, k, v] = views(inputs, sequence, shape);
    let mask = window_mask(sequence.1, shape.window, &q);
    let of_q = |x: &Tensor| view((x, 0), shape.q_heads, sequence, shape);
    let results = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
        &of_q(grad),
        &q,
        &k,
        &v,
        &of_q(out),
        log_sums,
        0.0,
        mask.is_none(),
        mask.as_ref(),
        None,
    );
    let (q_end, kv) = (shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let targets =
        [(results.0, 0, shape.q_heads), (results.1, q_end, shape.kv_heads), (results.2, q_end + kv, shape.kv_heads)];
    for (values, first, heads) in targets {
        view((grads, first), heads, sequence, shape).copy_(&values);
    }
}

/// `[len, len]` with 0 where a query sees a key and -inf elsewhere; None where plain causal attention says the same.
fn window_mask(len: i64, window: Option<i64>, like: &Tensor) -> Option<Tensor> {
    let window = window.filter(|&window| window < len)?;
    let seen = Tensor::ones([len, len], (Kind::Bool, like.device())).tril(0).triu(1 - window);
    let hidden = seen.logical_not();
    Some(Tensor::zeros([len, len], (like.kind(), like.device())).masked_fill(&hidden, f64::NEG_INFINITY))
}
