//! Softmax attention inside each sequence: causal, with an optional sliding window and grouped key/value heads.
//!
//! Sequences up to [`LONGEST_PACKED`] tokens are packed head by head and go through batched matrix products, whose rate is
//! several times that of libtorch's CPU flash attention at such lengths; longer ones go through that, in memory linear in
//! their length.

use tch::{Kind, Tensor};

use crate::kernels::attention::{self as kernel, Group, Heads, Sight};

/// Longest sequence whose scores are held as a matrix. Unit: tokens.
const LONGEST_PACKED: i64 = 1024;

/// Heads of this rank and the keys that a query sees.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub q_heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    /// Keys that a query sees, itself included; None: all.
    pub window: Option<i64>,
}

/// What backward needs besides q, k, v and the output: the log-sum-exp of each query's scores.
pub struct Normalisers(Vec<Tensor>);

/// q, k and v: each `[tokens, row]` with its heads from element `first` of a row on. They may be the same tensor.
pub struct Projections<'a> {
    pub q: (&'a Tensor, i64),
    pub k: (&'a Tensor, i64),
    pub v: (&'a Tensor, i64),
}

/// Attention of one batch: `[tokens, q_heads * head_dim]`.
pub fn forward(inputs: &Projections, sequences: &[(i64, i64)], shape: Shape) -> (Tensor, Normalisers) {
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
    (out, Normalisers(normalisers))
}

/// Gradients of q, k and v in one tensor `[tokens, (q_heads + 2 kv_heads) * head_dim]`.
///
/// `grad, out: [tokens, q_heads * head_dim]`.
pub fn backward(
    grad: &Tensor,
    inputs: &Projections,
    out: &Tensor,
    normalisers: Normalisers,
    sequences: &[(i64, i64)],
    shape: Shape,
) -> Tensor {
    let (tokens, row) = (grad.size()[0], (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim);
    let mut grads = Tensor::empty([tokens, row], (grad.kind(), grad.device()));
    let (short, long) = partition(inputs.q.0, sequences);
    let mut normalisers = normalisers.0.into_iter();
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

/// Zeros for the tokens behind the last sequence.
fn clear_rest(x: &Tensor, sequences: &[(i64, i64)]) {
    let filled = sequences.last().map_or(0, |(start, len)| start + len);
    let _ = x.narrow(0, filled, x.size()[0] - filled).zero_();
}

/// Sequences for packed attention, and the others.
fn partition(q: &Tensor, sequences: &[(i64, i64)]) -> (Vec<(i64, i64)>, Vec<(i64, i64)>) {
    let packable = kernel::takes(q);
    sequences.iter().partition(|(_, len)| packable && *len <= LONGEST_PACKED)
}

impl Shape {
    fn sight(&self) -> Sight {
        Sight { window: self.window.map(|window| window as usize), scale: (self.head_dim as f32).powf(-0.5) }
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
            let mut scores = part(&q).bmm(&part(&k).transpose(1, 2));
            let log_sums = kernel::softmax(&mut scores, group, first as usize, shape.kv_heads as usize, shape.sight());
            let _ = scores.bmm_out(&part(&mixed), &part(&v));
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
        let mut p = q.bmm(&k.transpose(1, 2));
        kernel::probabilities(&mut p, &part(log_sums), group, first as usize, shape.kv_heads as usize, sight);
        let _ = p.transpose(1, 2).bmm_out(&part(&d_v), &d_out);
        let mut d_scores = d_out.bmm(&v.transpose(1, 2));
        kernel::softmax_backward(&mut d_scores, &p, sight.scale);
        let _ = d_scores.bmm_out(&part(&d_q), &k);
        let _ = d_scores.transpose(1, 2).bmm_out(&part(&d_k), &q);
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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Scores and softmax spelled out, one query at a time: `[tokens, q_heads * head_dim]` from `[tokens, heads, head_dim]`.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, sequences: &[(i64, i64)], window: Option<i64>) -> Tensor {
        let (tokens, heads, head_dim) = q.size3().unwrap();
        let group = heads / k.size()[1];
        let mut rows = Vec::new();
        for &(start, len) in sequences {
            for i in 0..len {
                let first = window.map_or(0, |w| (i + 1 - w).max(0));
                let heads: Vec<Tensor> = (0..heads)
                    .map(|head| {
                        let keys = k.select(1, head / group).narrow(0, start + first, i + 1 - first);
                        let values = v.select(1, head / group).narrow(0, start + first, i + 1 - first);
                        let scores = keys.mv(&q.select(1, head).get(start + i)) / (head_dim as f64).sqrt();
                        scores.softmax(0, Kind::Double).unsqueeze(0).matmul(&values)
                    })
                    .collect();
                rows.push(Tensor::cat(&heads, 1));
            }
        }
        Tensor::cat(&rows, 0).view([tokens, heads * head_dim])
    }

    /// Packed attention in f32 and bf16, flash attention in f64, both against plain attention in f64.
    #[test]
    fn values_and_gradients_match_plain_attention() {
        tch::manual_seed(6);
        let sequences = [(0, 7), (7, 1), (8, 20), (28, 3), (31, 16)];
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            for (kv_heads, window) in [(4, None), (2, None), (2, Some(5)), (1, Some(1)), (2, Some(20))] {
                let shape = Shape { q_heads: 4, kv_heads, head_dim: 6, window };
                let row = (4 + 2 * kv_heads) * 6;
                let qkv = Tensor::randn([47, row], (Kind::Double, Device::Cpu)).to_kind(kind);
                let grad = Tensor::randn([47, 24], (Kind::Double, Device::Cpu)).to_kind(kind);

                let leaf = qkv.to_kind(Kind::Double).set_requires_grad(true);
                let heads = leaf.view([47, 4 + 2 * kv_heads, 6]);
                let part = |first, count| heads.narrow(1, first, count);
                let want = plain(&part(0, 4), &part(4, kv_heads), &part(4 + kv_heads, kv_heads), &sequences, window);
                let loss = (&want * grad.to_kind(Kind::Double)).sum(Kind::Double);
                let d_want = Tensor::run_backward(&[loss], &[&leaf], false, false).remove(0);

                tch::no_grad(|| {
                    let inputs = Projections { q: (&qkv, 0), k: (&qkv, 24), v: (&qkv, 24 + 6 * kv_heads) };
                    let (out, log_sums) = forward(&inputs, &sequences, shape);
                    let d_qkv = backward(&grad, &inputs, &out, log_sums, &sequences, shape);
                    for (got, want) in [(&out, &want), (&d_qkv, &d_want)] {
                        let error = f64::try_from((got.to_kind(Kind::Double) - want).abs().max()).unwrap();
                        let scale = f64::try_from(want.abs().max()).unwrap();
                        assert!(error / scale < tolerance, "{kind:?} {kv_heads} {window:?}: {:e}", error / scale);
                    }
                });
            }
        }
    }

    /// Long sequences beside a short one, in the kinds that models compute in, with and without a window and shared heads.
    #[test]
    fn long_sequences_match_plain_attention() {
        tch::manual_seed(7);
        let sequences = [(0, 1100), (1100, 40), (1140, 1300)];
        let tokens = 2448; // eight belong to nobody
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            for (kv_heads, window) in [(2, None), (1, Some(700))] {
                let shape = Shape { q_heads: 2, kv_heads, head_dim: 8, window };
                let row = (2 + 2 * kv_heads) * 8;
                let qkv = Tensor::randn([tokens, row], (Kind::Double, Device::Cpu)).to_kind(kind);
                let grad = Tensor::randn([tokens, 16], (Kind::Double, Device::Cpu)).to_kind(kind);
                let leaf = qkv.to_kind(Kind::Double).set_requires_grad(true);
                let heads = leaf.view([tokens, 2 + 2 * kv_heads, 8]);
                let want = masked(&heads, &sequences, kv_heads, window);
                let loss = (&want * grad.narrow(0, 0, 2440).to_kind(Kind::Double)).sum(Kind::Double);
                let d_want = Tensor::run_backward(&[loss], &[&leaf], false, false).remove(0);
                tch::no_grad(|| {
                    let inputs = Projections { q: (&qkv, 0), k: (&qkv, 16), v: (&qkv, 16 + 8 * kv_heads) };
                    let (out, log_sums) = forward(&inputs, &sequences, shape);
                    let d_qkv = backward(&grad, &inputs, &out, log_sums, &sequences, shape);
                    for (got, want) in [(&out.narrow(0, 0, 2440), &want), (&d_qkv, &d_want)] {
                        let distance = f64::try_from((got.to_kind(Kind::Double) - want).norm()).unwrap();
                        let error = distance / f64::try_from(want.norm()).unwrap();
                        assert!(error < tolerance, "{kind:?} {kv_heads} {window:?}: {error:e}");
                    }
                });
            }
        }
    }

    /// Attention with a whole mask a sequence: `[tokens, q_heads * head_dim]`.
    fn masked(heads: &Tensor, sequences: &[(i64, i64)], kv_heads: i64, window: Option<i64>) -> Tensor {
        let q_heads = heads.size()[1] - 2 * kv_heads;
        let head_dim = heads.size()[2];
        let rows: Vec<Tensor> = sequences
            .iter()
            .map(|&(start, len)| {
                let part = |first: i64, count: i64| heads.narrow(0, start, len).narrow(1, first, count).transpose(0, 1);
                let spread = |t: Tensor| t.repeat_interleave_self_int(q_heads / kv_heads, 0, None);
                let (k, v) = (spread(part(q_heads, kv_heads)), spread(part(q_heads + kv_heads, kv_heads)));
                let seen =
                    Tensor::ones([len, len], (Kind::Bool, heads.device())).tril(0).triu(1 - window.unwrap_or(len));
                let scores = part(0, q_heads).matmul(&k.transpose(1, 2)) / (head_dim as f64).sqrt();
                let p = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY).softmax(-1, Kind::Double);
                p.matmul(&v).transpose(0, 1).reshape([len, q_heads * head_dim])
            })
            .collect();
        Tensor::cat(&rows, 0)
    }
}
