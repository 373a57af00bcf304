//! Packed sequences as the model reads them.

use tch::{Device, Tensor};

use super::attention_core::Sequences;
use super::rope::Rope;
use crate::abi::upload::upload;

/// Sequences one after the other; attention never crosses from one to the next.
///
/// Behind the last one come a few tokens that belong to nobody, attend to nothing and get no gradient: matrix products then
/// have one of a few recurring sizes. oneDNN generates code for every size that it meets, keeps it (tens of MB a step where
/// each step has another size) and likes round ones.
pub struct Batch {
    /// `[tokens]` i64.
    pub ids: Tensor,
    /// First token and length of each sequence, in order.
    pub sequences: Vec<(i64, i64)>,
    /// On a GPU, first token of each sequence and the end of the last: `[sequences + 1]` i32.
    pub bounds: Option<Tensor>,
    /// Tokens that belong to a sequence.
    pub filled: i64,
    /// `[tokens, rotary pairs]` f32: positions restart with each sequence.
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Batch {
    /// `lengths`: of the sequences, adding up to the number of `ids`; `multiple`: the number of tokens becomes one of it.
    pub fn new(ids: &[i64], lengths: &[usize], multiple: usize, rope: &Rope, device: Device) -> Self {
        assert_eq!(ids.len(), lengths.iter().sum::<usize>(), "invariant: the sequences cover all tokens");
        let mut positions = Vec::with_capacity(ids.len());
        let mut sequences = Vec::with_capacity(lengths.len());
        for &len in lengths {
            sequences.push((positions.len() as i64, len as i64));
            positions.extend(0..len as i64);
        }
        let bounds = (device != Device::Cpu).then(|| {
            let ends = sequences.iter().map(|&(start, len)| (start + len) as i32);
            upload(&std::iter::once(0).chain(ends).collect::<Vec<i32>>(), device)
        });
        let total = Self::padded(ids.len(), multiple);
        Self { sequences, bounds, ..Self::filled_up(ids, positions, total, rope, device) }
    }

    /// One token of each sequence, at the position that it has there; what stands before it is in a cache.
    pub(super) fn of_single_tokens(
        ids: &[i64],
        positions: &[i64],
        multiple: usize,
        rope: &Rope,
        device: Device,
    ) -> Self {
        // a single row is a product of another kind, with a vector, and faster than eight
        let total = if ids.len() == 1 { 1 } else { recurring_size(ids.len()) }.next_multiple_of(multiple);
        Self::filled_up(ids, positions.to_vec(), total, rope, device)
    }

    /// Tokens at their positions, without sequences.
    fn filled_up(ids: &[i64], mut positions: Vec<i64>, total: usize, rope: &Rope, device: Device) -> Self {
        let mut padded = ids.to_vec();
        padded.resize(total, 0);
        positions.resize(total, 0);
        let (cos, sin) = rope.tables(&positions, device);
        let filled = ids.len() as i64;
        Self { ids: upload(&padded, device), sequences: Vec::new(), bounds: None, filled, cos, sin }
    }

    /// Tokens of a batch of `filled`, those that belong to nobody included.
    pub fn padded(filled: usize, multiple: usize) -> usize {
        recurring_size(filled).next_multiple_of(multiple)
    }

    /// What attention needs to know.
    pub(super) fn attended(&self) -> Sequences<'_> {
        Sequences { spans: &self.sequences, bounds: self.bounds.as_ref() }
    }

    pub fn num_tokens(&self) -> i64 {
        self.ids.size()[0]
    }
}

/// `n` rounded up by at most a sixteenth (or to 8), so that numbers near each other become the same.
pub(super) fn recurring_size(n: usize) -> usize {
    let step = (n / 32).max(8);
    // the power of two below: a step of 1/64 to 1/32 of n
    n.next_multiple_of(1 << step.ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_grow_little_and_recur() {
        for n in [1usize, 7, 8, 100, 257, 1057, 8191, 100_000] {
            let size = recurring_size(n);
            assert!(size >= n && size - n < (n / 16).max(8), "{n} became {size}");
        }
        let distinct: std::collections::BTreeSet<usize> = (900..1200).map(recurring_size).collect();
        assert!(distinct.len() <= 14, "{distinct:?}");
        assert_eq!(recurring_size(0), 0);
    }
}
