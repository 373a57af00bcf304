//! Attention of one query a row to the row's cached keys and values: one pass over the cache, which is what it costs.

use tch::Tensor;

use super::real::{Real, exp, on_cpu, sum, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

pub use super::attention::Sight;

/// `[tokens, kv_heads * share * dim]`: each row's query heads mixed over its cached values, zeros behind the rows in use. None for
/// kinds and devices that it is not for.
///
/// `q: [tokens, row]` with its heads from element `first` of a row on; `keys, values: [rows, kv_heads, capacity, dim]`, contiguous;
/// `lengths`: keys of each row in use, at least 1, the query's own included; `share`: query heads for each key/value head.
pub fn attend(
    (q, first): (&Tensor, usize),
    share: usize,
    keys: &Tensor,
    values: &Tensor,
    lengths: &[usize],
    sight: Sight,
) -> Option<Tensor> {
    let (_, kv_heads, capacity, dim) = keys.size4().expect("invariant: a cache has four dimensions");
    let (kv_heads, capacity, dim) = (kv_heads as usize, capacity as usize, dim as usize);
    let (tokens, row) = (q.size()[0], q.size()[1] as usize);
    let width = kv_heads * share * dim;
    assert!(first + width <= row && lengths.len() <= tokens as usize, "invariant: every row has its query heads");
    assert!(lengths.iter().all(|len| (1..=capacity).contains(len)), "invariant: keys lie inside the cache");
    on_cpu!(q, T => {
        let mut out = Tensor::zeros([tokens, width as i64], (q.kind(), q.device()));
        let (q, keys, values) = (slice::<T>(q), slice::<T>(keys), slice::<T>(values));
        // one chunk: the query heads of a row that share a key head
        let used = &mut slice_mut::<T>(&mut out)[..lengths.len() * width];
        parallel::for_chunks(used, share * dim, 1, |index, out| {
            let (token, head) = (index / kv_heads, index % kv_heads);
            let queries = &q[token * row + first + head * share * dim..][..share * dim];
            let seen = sight.first(lengths[token] - 1)..lengths[token];
            let seen = (index * capacity + seen.start) * dim..(index * capacity + seen.end) * dim;
            for (query, out) in queries.chunks(dim).zip(out.chunks_mut(dim)) {
                attend_row(query, &keys[seen.clone()], &values[seen.clone()], sight.scale, out);
            }
        });
        out
    })
}

vectorised! {
    fn attend_row<T: Real>(query: &[T], keys: &[T], values: &[T], scale: f32, out: &mut [T]) {
        let dim = query.len();
        let mut scores: Vec<f32> = keys
            .chunks_exact(dim)
            .map(|key| sum(dim, |i| query[i].get() * key[i].get()) * scale)
            .collect();
        let maximum = scores.iter().copied().fold(f32::NEG_INFINITY, |a, b| if a >= b { a } else { b });
        let mut total = 0.0;
        for score in &mut scores {
            *score = exp(*score - maximum);
            total += *score;
        }
        let mut mixed = vec![0.0f32; dim];
        for (weight, value) in scores.iter().zip(values.chunks_exact(dim)) {
            for (mixed, value) in mixed.iter_mut().zip(value) {
                *mixed += weight * value.get();
            }
        }
        let factor = 1.0 / total;
        for (out, mixed) in out.iter_mut().zip(mixed) {
            *out = T::put(mixed * factor);
        }
    }
}
