//! The passes between the matrix products of attention, on sequences that are packed head by head.
//!
//! A group holds sequences of similar length, each padded to the longest. Its q is `[sequences * kv_heads, share * width, dim]`
//! (the query heads that share a key head one below the other), k and v are `[sequences * kv_heads, width, dim]`, scores are
//! `[sequences * kv_heads, share * width, width]`: one batched product does all of them, and no key is copied for its heads.

use tch::{Kind, Tensor};

use super::real::{Real, exp, on_cpu, sum, vectorised};
use crate::abi::parallel;
use crate::abi::slices::{slice, slice_mut};

/// Sequences that go through one batched product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// First token and length of each.
    pub sequences: Vec<(usize, usize)>,
    /// Length of the longest.
    pub width: usize,
}

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
    fn first(self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

impl Group {
    /// Groups of at most `max_scores` scores a head, with little padding: the shortest has at least 3/4 of the longest's length.
    pub fn cut(sequences: &[(i64, i64)], max_scores: usize) -> Vec<Self> {
        let mut order: Vec<(usize, usize)> =
            sequences.iter().map(|&(start, len)| (start as usize, len as usize)).collect();
        order.sort_by_key(|&(start, len)| (std::cmp::Reverse(len), start));
        let mut groups = Vec::<Self>::new();
        for (start, len) in order {
            match groups.last_mut() {
                Some(group)
                    if 4 * len >= 3 * group.width
                        && (group.sequences.len() + 1) * group.width * group.width <= max_scores =>
                {
                    group.sequences.push((start, len));
                }
                _ => groups.push(Self { sequences: vec![(start, len)], width: len }),
            }
        }
        groups
    }
}

/// Heads of the group's tokens from `x: [tokens, row]`, packed head by head with zeros behind each sequence:
/// `[sequences * kv_heads, share * width, dim]`.
pub fn pack(x: &Tensor, group: &Group, heads: Heads) -> Tensor {
    let Heads { row, first, kv_heads, share, dim } = heads;
    let shape = [(group.sequences.len() * kv_heads) as i64, (share * group.width) as i64, dim as i64];
    let mut packed = Tensor::empty(shape, (x.kind(), x.device()));
    on_cpu!(x, T => {
        let input = slice::<T>(x);
        let chunk = group.width * dim;
        // one chunk is one head of one sequence
        parallel::for_chunks(slice_mut::<T>(&mut packed), chunk, 1, |index, out| {
            let (start, len) = group.sequences[index / (kv_heads * share)];
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

/// Turns scores into probabilities in place and gives the log-sum-exp of each query's scaled scores, f32.
///
/// What a query does not see, and the rows behind a sequence's end, become 0.
pub fn softmax(scores: &mut Tensor, group: &Group, kv_heads: usize, sight: Sight) -> Tensor {
    let (batch, rows, width) = scores.size3().expect("invariant: scores have three dimensions");
    let mut log_sums = Tensor::empty([batch, rows], (Kind::Float, scores.device()));
    on_cpu!(scores, T => {
        let (scores, width) = (slice_mut::<T>(scores), width as usize);
        let rows = rows as usize;
        parallel::for_chunks2((scores, width), (slice_mut::<f32>(&mut log_sums), 1), 8, |index, row, log_sum| {
            let len = group.sequences[index / rows / kv_heads].1;
            let position = index % rows % width;
            log_sum[0] = if position < len {
                let first = sight.first(position);
                softmax_row(row, first, position + 1, sight.scale)
            } else {
                row.fill(T::put(0.0));
                0.0
            };
        });
    })
    .expect("invariant: packed attention is for CPU tensors of f32 or bf16");
    log_sums
}

/// Probabilities again from scores and their log-sum-exp, in place.
pub fn probabilities(scores: &mut Tensor, log_sums: &Tensor, group: &Group, kv_heads: usize, sight: Sight) {
    let (_, rows, width) = scores.size3().expect("invariant: scores have three dimensions");
    on_cpu!(scores, T => {
        let (rows, width, log_sums) = (rows as usize, width as usize, slice::<f32>(log_sums));
        parallel::for_chunks(slice_mut::<T>(scores), width, 8, |index, row| {
            let len = group.sequences[index / rows / kv_heads].1;
            let position = index % rows % width;
            if position < len {
                let first = sight.first(position);
                probability_row(row, first, position + 1, sight.scale, log_sums[index]);
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
        let groups = Group::cut(&sequences, 1 << 20);
        let mut starts: Vec<usize> = groups.iter().flat_map(|g| g.sequences.iter().map(|s| s.0)).collect();
        starts.sort_unstable();
        assert_eq!(starts, [0, 90, 100, 180, 189, 259]);
        assert!(groups.iter().all(|g| g.sequences.iter().all(|s| 4 * s.1 >= 3 * g.width && s.1 <= g.width)));
        assert_eq!(groups.len(), 3);
        assert_eq!(Group::cut(&sequences, 90 * 90).len(), 5);
    }

    #[test]
    fn packing_and_unpacking_are_inverse() {
        let x = Tensor::arange(7 * 10, (Kind::Float, Device::Cpu)).view([7, 10]);
        let group = Group { sequences: vec![(3, 4), (0, 2)], width: 4 };
        // heads of width 2 from element 4 on: 1 key head, 3 query heads that share it
        let heads = Heads { row: 10, first: 4, kv_heads: 1, share: 3, dim: 2 };
        let packed = pack(&x, &group, heads);
        assert_eq!(packed.size(), [2, 12, 2]);
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
