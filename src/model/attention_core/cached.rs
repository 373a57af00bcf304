//! Attention of one new token a sequence to everything before it, whose keys and values are in a cache.

use tch::{Kind, Tensor};

use super::Shape;
use crate::abi::upload::upload;
use crate::kernels::cached_attention::{self as kernel, Sight};

/// What the new tokens attend to; their own keys and values are in it.
pub struct Cached<'a> {
    /// `[rows, kv_heads, capacity, head_dim]`; the first rows are in use.
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    /// Tokens of each row in use.
    pub lengths: &'a [usize],
}

/// The mixed values of one token a row: `[tokens, q_heads * head_dim]`, zeros behind the rows in use.
///
/// `q: [tokens, row]` with its heads from the given element of a row on.
pub fn one_more(q: (&Tensor, i64), cached: &Cached, shape: Shape) -> Tensor {
    let sight = Sight { window: shape.window.map(|window| window as usize), scale: shape.scale() as f32 };
    let share = (shape.q_heads / shape.kv_heads) as usize;
    let Cached { keys, values, lengths } = *cached;
    kernel::attend((q.0, q.1 as usize), share, keys, values, lengths, sight).unwrap_or_else(|| plain(q, cached, shape))
}

/// The same as batched products over all keys up to the longest row's end, in f32 inside.
fn plain((q, first): (&Tensor, i64), cached: &Cached, shape: Shape) -> Tensor {
    let (rows, tokens) = (cached.lengths.len() as i64, q.size()[0]);
    let Shape { q_heads, kv_heads, head_dim, window } = shape;
    let longest = cached.lengths.iter().copied().max().unwrap_or(0) as i64;
    let kind = if q.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let part = |x: &Tensor| x.narrow(0, 0, rows).narrow(2, 0, longest).to_kind(kind);
    let (keys, values) = (part(cached.keys), part(cached.values));
    let heads = q.narrow(0, 0, rows).narrow(1, first, q_heads * head_dim).to_kind(kind);
    let heads = heads.reshape([rows, kv_heads, q_heads / kv_heads, head_dim]);
    let lengths: Vec<i64> = cached.lengths.iter().map(|&len| len as i64).collect();
    let lengths = upload(&lengths, q.device()).view([rows, 1, 1, 1]);
    let at = Tensor::arange(longest, (Kind::Int64, q.device())).view([1, 1, 1, longest]);
    let mut hidden = at.ge_tensor(&lengths);
    // a weight of 0 does not silence what is no number there
    let values = values.masked_fill(&hidden.view([rows, 1, longest, 1]), 0.0);
    if let Some(window) = window {
        hidden = hidden.logical_or(&at.lt_tensor(&(&lengths - window)));
    }
    let scores = heads.matmul(&keys.transpose(2, 3)) * shape.scale();
    let mixed = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, kind).matmul(&values);
    let out = Tensor::zeros([tokens, q_heads * head_dim], (q.kind(), q.device()));
    out.narrow(0, 0, rows).copy_(&mixed.reshape([rows, q_heads * head_dim]));
    out
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::model::attention_core::{self, Projections, Sequences};

    /// The last token of each sequence, attending to a cache, gets what attention over the whole sequence gives it.
    #[test]
    fn the_last_token_gets_what_whole_sequences_give_it() {
        tch::manual_seed(8);
        let sequences = [(0, 7), (7, 1), (8, 20), (28, 3)];
        let capacity = 24;
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            for (kv_heads, window) in [(4, None), (2, None), (2, Some(5)), (1, Some(1)), (2, Some(20))] {
                let shape = Shape { q_heads: 4, kv_heads, head_dim: 6, window };
                let row = (4 + 2 * kv_heads) * 6;
                let qkv = Tensor::randn([31, row], (Kind::Double, Device::Cpu)).to_kind(kind);
                let inputs = Projections { q: (&qkv, 0), k: (&qkv, 24), v: (&qkv, 24 + 6 * kv_heads) };
                let whole = attention_core::forward(&inputs, Sequences { spans: &sequences, bounds: None }, shape).0;
                let last: Vec<i64> = sequences.iter().map(|(start, len)| start + len - 1).collect();
                let last = Tensor::from_slice(&last);
                // what is behind a row's end must not be looked at
                let empty = || Tensor::full([5, kv_heads, capacity, 6], f64::NAN, (kind, Device::Cpu));
                let (keys, values) = (empty(), empty());
                for (index, &(start, len)) in sequences.iter().enumerate() {
                    for (cached, (x, first)) in [(&keys, inputs.k), (&values, inputs.v)] {
                        let part = x.narrow(0, start, len).narrow(1, first, 6 * kv_heads);
                        let part = part.view([len, kv_heads, 6]).transpose(0, 1);
                        cached.get(index as i64).narrow(1, 0, len).copy_(&part);
                    }
                }
                let lengths: Vec<usize> = sequences.iter().map(|(_, len)| *len as usize).collect();
                let q = Tensor::cat(&[qkv.index_select(0, &last), Tensor::zeros([4, row], (kind, Device::Cpu))], 0);
                let cached = Cached { keys: &keys, values: &values, lengths: &lengths };
                let got = one_more((&q, 0), &cached, shape);
                assert_eq!(got.size(), [8, 24]);
                let spelled = plain((&q, 0), &cached, shape);
                let want = whole.index_select(0, &last).to_kind(Kind::Double);
                for got in [got, spelled] {
                    let error = (got.narrow(0, 0, 4).to_kind(Kind::Double) - &want).abs().max();
                    let error = f64::try_from(error).unwrap() / f64::try_from(want.abs().max()).unwrap();
                    assert!(error < tolerance, "{kind:?} {kv_heads} {window:?}: {error:e}");
                    assert_eq!(f64::try_from(got.narrow(0, 4, 4).abs().sum(Kind::Double)).unwrap(), 0.0);
                }
            }
        }
    }
}
