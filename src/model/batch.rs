//! Packed sequences as the model reads them.

use tch::{Device, Tensor};

use super::rope::Rope;

/// Sequences one after the other without padding; attention never crosses from one to the next.
pub struct Batch {
    /// `[tokens]` i64.
    pub ids: Tensor,
    /// First token and length of each sequence; they cover all tokens in order.
    pub sequences: Vec<(i64, i64)>,
    /// `[tokens, rotary pairs]` f32: positions restart with each sequence.
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Batch {
    /// `lengths`: of the sequences, adding up to the number of `ids`.
    pub fn new(ids: &[i64], lengths: &[usize], rope: &Rope, device: Device) -> Self {
        assert_eq!(ids.len(), lengths.iter().sum::<usize>(), "invariant: the sequences cover all tokens");
        let mut positions = Vec::with_capacity(ids.len());
        let mut sequences = Vec::with_capacity(lengths.len());
        for &len in lengths {
            sequences.push((positions.len() as i64, len as i64));
            positions.extend(0..len as i64);
        }
        let (cos, sin) = rope.tables(&positions, device);
        Self { ids: Tensor::from_slice(ids).to_device(device), sequences, cos, sin }
    }

    pub fn num_tokens(&self) -> i64 {
        self.ids.size()[0]
    }
}
