//! Softmax attention inside each sequence: causal, with an optional sliding window and grouped key/value heads.
//!
//! On CPUs (`host`) sequences up to 1024 tokens are packed head by head and go through batched matrix products, whose rate is
//! several times that of libtorch's CPU flash attention at such lengths; longer ones go through that. On GPUs (`varlen`) all
//! sequences of a batch go through one flash kernel, in bf16; what it does not take (`explicit`) holds the scores of one
//! sequence at a time.

mod cached;
mod explicit;
mod host;
mod varlen;

use tch::{Device, Tensor};

pub use cached::{Cached, one_more};

use crate::abi::torch_cuda::FlashState;
use crate::kernels::attention::Group;

/// Heads of this rank and the keys that a query sees.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub q_heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    /// Keys that a query sees, itself included; None: all.
    pub window: Option<i64>,
}

impl Shape {
    /// Elements of a row of q, k and v side by side.
    fn row(&self) -> i64 {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    fn scale(&self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }
}

/// What backward needs besides q, k, v and the output.
pub struct Normalisers(Kept);

enum Kept {
    /// The log-sum-exp of each query's scores, a group of sequences at a time.
    Host(Vec<Tensor>),
    Varlen(FlashState),
    Explicit,
}

impl Normalisers {
    /// Bytes on the device that computed them.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Kept::Host(log_sums) => log_sums.iter().map(super::decoder::bytes).sum(),
            Kept::Varlen(state) => state.bytes(),
            Kept::Explicit => 0,
        }
    }
}

/// q, k and v: each `[tokens, row]` with its heads from element `first` of a row on. They may be the same tensor.
pub struct Projections<'a> {
    pub q: (&'a Tensor, i64),
    pub k: (&'a Tensor, i64),
    pub v: (&'a Tensor, i64),
}

/// The sequences of a batch.
#[derive(Clone, Copy)]
pub struct Sequences<'a> {
    /// First token and length of each, one behind the other.
    pub spans: &'a [(i64, i64)],
    /// On a GPU the same for its kernels: first tokens and the end of the last, `[sequences + 1]` i32.
    pub bounds: Option<&'a Tensor>,
}

/// How a CPU cuts sequences: groups for packed attention, and those that are too long for it.
pub fn cut_on_host(sequences: &[(i64, i64)]) -> (Vec<Group>, Vec<(i64, i64)>) {
    let (short, long) = host::by_length(sequences);
    (Group::cut(&short), long)
}

/// Attention of one batch: `[tokens, q_heads * head_dim]`.
pub fn forward(inputs: &Projections, sequences: Sequences, shape: Shape) -> (Tensor, Normalisers) {
    let (out, kept) = match (inputs.q.0.device(), sequences.bounds) {
        (Device::Cpu, _) => {
            let (out, log_sums) = host::forward(inputs, sequences.spans, shape);
            (out, Kept::Host(log_sums))
        }
        (_, Some(bounds)) if varlen::takes(inputs.q.0, shape) => {
            let (out, state) = varlen::forward(inputs, sequences.spans, bounds, shape);
            (out, Kept::Varlen(state))
        }
        _ => (explicit::forward(inputs, sequences.spans, shape), Kept::Explicit),
    };
    (out, Normalisers(kept))
}

/// Gradients of q, k and v in one tensor `[tokens, (q_heads + 2 kv_heads) * head_dim]`.
///
/// `grad, out: [tokens, q_heads * head_dim]`.
pub fn backward(
    grad: &Tensor,
    inputs: &Projections,
    out: &Tensor,
    normalisers: Normalisers,
    sequences: Sequences,
    shape: Shape,
) -> Tensor {
    let spans = sequences.spans;
    match normalisers.0 {
        Kept::Host(log_sums) => host::backward(grad, inputs, out, log_sums, spans, shape),
        Kept::Explicit => explicit::backward(grad, inputs, spans, shape),
        Kept::Varlen(state) => {
            let bounds = sequences.bounds.expect("invariant: forward had them");
            varlen::backward(grad, inputs, out, &state, spans, bounds, shape)
        }
    }
}

/// Zeros for the tokens behind the last sequence.
fn clear_rest(x: &Tensor, sequences: &[(i64, i64)]) {
    let filled = sequences.last().map_or(0, |(start, len)| start + len);
    let _ = x.narrow(0, filled, x.size()[0] - filled).zero_();
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

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

    /// Packed attention in f32 and bf16, flash attention in f64, explicit attention in all, against plain attention in f64.
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
                    let all = Sequences { spans: &sequences, bounds: None };
                    let (out, log_sums) = forward(&inputs, all, shape);
                    let d_qkv = backward(&grad, &inputs, &out, log_sums, all, shape);
                    let scores = explicit::forward(&inputs, &sequences, shape);
                    let d_scores = explicit::backward(&grad, &inputs, &sequences, shape);
                    for (got, want) in [(&out, &want), (&d_qkv, &d_want), (&scores, &want), (&d_scores, &d_want)] {
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
                    let all = Sequences { spans: &sequences, bounds: None };
                    let (out, log_sums) = forward(&inputs, all, shape);
                    let d_qkv = backward(&grad, &inputs, &out, log_sums, all, shape);
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
