//! The passes between the matrix products of attention, on sequences that are packed head by head.
//!
//! A group holds sequences of similar length, each padded to the same width. Its entries are the pairs of a sequence and a
//! key/value head: q is `[entries, share * width, dim]` (the query heads that share a key head one below the other), k and v
//! are `[entries, width, dim]`, scores `[entries, share * width, width]`. No key is copied for its heads. Products run over
//! [`Group::chunk`] entries at a time: few distinct sizes, and scores that stay in the cache until they are used.

use tch::{Kind, Tensor};

use super::real::{Real, exp, on_cpu, sum, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

/// Sequences that go through one batched product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// First token and length of each.
    pub sequences: Vec<(usize, usize)>,
    /// Length of the longest, rounded up.
    pub width: usize,
}

/// Scores of one chunk: 1 MiB in bf16.
const CHUNK_SCORES: usize = 1 << 19;

/// Heads of one kind inside rows of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Elements of a row, all kinds of heads together.
    pub row: usize,
    /// Element of a row at which these heads begin.
    pub first: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Heads of this kind for each key/value head: 1 for k and v.
    pub share: usize,
    pub dim: usize,
}

/// Which keys a query sees, and how scores are scaled.
#[derive(Clone, Copy, Debug)]
pub struct Sight {
    /// Keys up to and including the query's own; None: all of them.
    pub window: Option<usize>,
    pub scale: f32,
}

impl Sight {
    /// First key that the query at `position` sees.
    pub(super) fn first(self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

impl Group {
    /// Groups with little padding: the shortest has at least 3/4 of the longest's length.
    pub fn cut(sequences: &[(i64, i64)]) -> Vec<Self> {
        let mut order: Vec<(usize, usize)> =
            sequences.iter().map(|&(start, len)| (start as usize, len as usize)).collect();
        order.sort_by_key(|&(start, len)| (std::cmp::Reverse(len), start));
        let mut groups = Vec::<Self>::new();
        for (start, len) in order {
            match groups.last_mut() {
                Some(group) if 4 * len >= 3 * group.sequences[0].1 => group.sequences.push((start, len)),
                _ => groups.push(Self { sequences: vec![(start, len)], width: len.next_multiple_of(16) }),
            }
        }
        groups
    }

    /// Entries of one batched product; depends on sizes alone, not on how many sequences there are.
    pub fn chunk(&self, share: usize) -> usize {
        let fitting = (CHUNK_SCORES / (share * self.width * self.width)).clamp(1, 32);
        1 << fitting.ilog2()
    }

    /// Length of an entry's sequence; 0 for entries that only fill up a chunk.
    fn len(&self, entry: usize, kv_heads: usize) -> usize {
        self.sequences.get(entry / kv_heads).map_or(0, |(_, len)| *len)
    }

    /// Entries, filled up to whole chunks.
    pub fn entries(&self, kv_heads: usize, share: usize) -> usize {
        (self.sequences.len() * kv_heads).next_multiple_of(self.chunk(share))
    }
}

/// Heads of the group's tokens from `x: [tokens, row]`, packed head by head with zeros behind each sequence and in entries
/// that fill up the last chunk: `[entries, share * width, dim]`.
///
/// `chunk_share`: query heads for each key/value head, which decides on the size of a chunk for q, k and v alike.
pub fn pack(x: &Tensor, group: &Group, heads: Heads, chunk_share: usize) -> Tensor {
    let Heads { row, first, kv_heads, share, dim } = heads;
    let entries = group.entries(kv_heads, chunk_share);
    let shape = [entries as i64, (share * group.width) as i64, dim as i64];
    let mut packed = Tensor::empty(shape, (x.kind(), x.device()));
    on_cpu!(x, T => {
        let input = slice::<T>(x);
        let chunk = group.width * dim;
        // one chunk is one head of one sequence
        parallel::for_chunks(slice_mut::<T>(&mut packed), chunk, 1, |index, out| {
            let (start, len) = group.sequences.get(index / (kv_heads * share)).copied().unwrap_or((0, 0));
            let head = first + index % (kv_heads * share) * dim;
            let (filled, rest) = out.split_at_mut(len * dim);
            for (token, out) in filled.chunks_mut(dim).enumerate() {
                out.copy_from_slice(&input[(start + token) * row + head..][..dim]);
            }
            rest.fill(T::put(0.0));
        });
    })
    .expect("invariant: packed attention is for CPU tensors of f32 or bf16");
    packed
}

/// Writes packed heads back to their places in `x: [tokens, row]`; other elements stay.
pub fn unpack(packed: &Tensor, group: &Group, heads: Heads, x: &mut Tensor) {
    let Heads { row, first, kv_heads, share, dim } = heads;
    let per_sequence = kv_heads * share;
    // sequence and position of each token; tokens of other groups have none
    let mut places = vec![None; x.size()[0] as usize];
    for (sequence, &(start, len)) in group.sequences.iter().enumerate() {
        for position in 0..len {
            places[start + position] = Some((sequence, position));
        }
    }
    on_cpu!(packed, T => {
        let input = slice::<T>(packed);
        parallel::for_chunks(slice_mut::<T>(x), row, 8, |token, out| {
            let Some((sequence, position)) = places[token] else { return };
            for (head, out) in out[first..].chunks_mut(dim).take(per_sequence).enumerate() {
                let at = ((sequence * per_sequence + head) * group.width + position) * dim;
                out.copy_from_slice(&input[at..at + dim]);
            }
        });
    })
    .expect("invariant: packed attention is for CPU tensors of f32 or bf16");
}

/// Turns the scores of a chunk into probabilities in place and gives the log-sum-exp of each query's scaled scores, f32.
///
/// `first`: entry of the group at which the chunk begins. What a query does not see, and the rows behind a sequence's end,
/// become 0.
pub fn softmax(scores: &mut Tensor, group: &Group, first: usize, kv_heads: usize, sight: Sight) -> Tensor {
    let (entries, rows, width) = scores.size3().expect("invariant: scores have three dimensions");
    let mut log_sums = Tensor::empty([entries, rows], (Kind::Float, scores.device()));
    on_cpu!(scores, T => {
        let (scores, width) = (slice_mut::<T>(scores), width as usize);
        let rows = rows as usize;
        parallel::for_chunks2((scores, width), (slice_mut::<f32>(&mut log_sums), 1), 8, |index, row, log_sum| {
            let position = index % rows % width;
            log_sum[0] = if position < group.len(first + index / rows, kv_heads) {
                softmax_row(row, sight.first(position), position + 1, sight.scale)
            } else {
                row.fill(T::put(0.0));
                0.0
            };
        });
    })
    .expect("invariant: packed attention is for CPU tensors of f32 or bf16");
    log_sums
}

/// Probabilities of a chunk again from scores and their log-sum-exp, in place.
pub fn probabilities(
    scores: &mut Tensor,
    log_sums: &Tensor,
    group: &Group,
    first: usize,
    kv_heads: usize,
    sight: Sight,
) {
    let (_, rows, width) = scores.size3().expect("invariant: scores have three dimensions");
    on_cpu!(scores, T => {
        let (rows, width, log_sums) = (rows as usize, width as usize, slice::<f32>(log_sums));
        parallel::for_chunks(slice_mut::<T>(scores), width, 8, |index, row| {
            let position = index % rows % width;
            if position < group.len(first + index / rows, kv_heads) {
                probability_row(row, sight.first(position), position + 1, sight.scale, log_sums[index]);
            } else {
                row.fill(T::put(0.0));
            }
        });
    })
    .expect("invariant: packed attention is for CPU tensors of f32 or bf16");
}

/// Gradient of the scores, in place of the gradient of the probabilities:
/// `probability * (gradient - sum over keys of probability * gradient) * scale`.
pub fn softmax_backward(grad: &mut Tensor, probabilities: &Tensor, scale: f32) {
    let width = grad.size()[2] as usize;
    on_cpu!(grad, T => {
        let p = slice::<T>(probabilities);
        parallel::for_chunks(slice_mut::<T>(grad), width, 8, |index, row| {
            backward_row(row, &p[index * width..][..width], scale);
        });
    })
    .expect("invariant: packed attention is for CPU tensors of f32 or bf16");
}

/// Whether packed attention can take a tensor.
pub fn takes(x: &Tensor) -> bool {
    on_cpu!(x, T => std::mem::size_of::<T>()).is_some()
}

vectorised! {
    fn softmax_row<T: Real>(row: &mut [T], first: usize, end: usize, scale: f32) -> f32 {
        let (before, rest) = row.split_at_mut(first);
        let (seen, after) = rest.split_at_mut(end - first);
        let mut maximum = f32::NEG_INFINITY;
        for x in seen.iter() {
            let x = x.get();
            maximum = if maximum >= x { maximum } else { x };
        }
        let shift = maximum * scale;
        let total = sum(seen.len(), |i| exp(seen[i].get() * scale - shift));
        let factor = 1.0 / total;
        for x in seen {
            *x = T::put(exp(x.get() * scale - shift) * factor);
        }
        before.fill(T::put(0.0));
        after.fill(T::put(0.0));
        shift + total.ln()
    }

    fn probability_row<T: Real>(row: &mut [T], first: usize, end: usize, scale: f32, log_sum: f32) {
        let (before, rest) = row.split_at_mut(first);
        let (seen, after) = rest.split_at_mut(end - first);
        for x in seen {
            *x = T::put(exp(x.get() * scale - log_sum));
        }
        before.fill(T::put(0.0));
        after.fill(T::put(0.0));
    }

    fn backward_row<T: Real>(grad: &mut [T], p: &[T], scale: f32) {
        let p = &p[..grad.len()];
        let dot = sum(grad.len(), |i| grad[i].get() * p[i].get());
        for (g, p) in grad.iter_mut().zip(p) {
            *g = T::put((g.get() - dot) * p.get() * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn groups_hold_every_sequence_once_with_little_padding() {
        let sequences = [(0, 90), (90, 10), (100, 80), (180, 9), (189, 70), (259, 1)];
        let groups = Group::cut(&sequences);
        let mut starts: Vec<usize> = groups.iter().flat_map(|g| g.sequences.iter().map(|s| s.0)).collect();
        starts.sort_unstable();
        assert_eq!(starts, [0, 90, 100, 180, 189, 259]);
        assert!(groups.iter().all(|g| g.sequences.iter().all(|s| 4 * s.1 >= 3 * g.sequences[0].1 && s.1 <= g.width)));
        assert_eq!(groups.iter().map(|g| g.width).collect::<Vec<_>>(), [96, 16, 16]);
        assert_eq!(groups[0].chunk(1), 32);
        assert_eq!(groups[0].chunk(8), 4);
    }

    #[test]
    fn packing_and_unpacking_are_inverse() {
        let x = Tensor::arange(7 * 10, (Kind::Float, Device::Cpu)).view([7, 10]);
        let group = Group { sequences: vec![(3, 4), (0, 2)], width: 4 };
        // heads of width 2 from element 4 on: 1 key head, 3 query heads that share it
        let heads = Heads { row: 10, first: 4, kv_heads: 1, share: 3, dim: 2 };
        let packed = pack(&x, &group, heads, 3);
        assert_eq!(packed.size(), [32, 12, 2]);
        assert_eq!(packed.double_value(&[0, 0, 0]), 34.0);
        assert_eq!(packed.double_value(&[0, 5, 1]), 47.0);
        assert_eq!(packed.double_value(&[1, 2, 0]), 0.0);
        let mut back = Tensor::full([7, 10], -1.0, (Kind::Float, Device::Cpu));
        unpack(&packed, &group, heads, &mut back);
        assert_eq!(back.double_value(&[4, 7]), 47.0);
        assert_eq!(back.double_value(&[2, 5]), -1.0);
        assert_eq!(back.double_value(&[4, 3]), -1.0);
    }
}
