//! A copy of a rank's state that a thread writes while training goes on.

use tch::{Device, Kind, Tensor};

use super::state::{Blocks, StateSlice};
use crate::abi::{host, slices};

/// Bytes to which slices are aligned in memory.
const ALIGN: usize = 64;

/// Host memory for copies of the state, kept from one save to the next: memory that is new costs more than the copy.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// `[bytes]` u8.
    memory: Option<Tensor>,
}

impl Snapshot {
    /// Copies slices of any device. The copies share this memory: the last ones must be done with.
    pub fn take(&mut self, state: &[StateSlice]) -> Vec<StateSlice> {
        let size = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()).next_multiple_of(ALIGN);
        let scales = |slice: &StateSlice| slice.blocks.as_ref().map_or(0, |blocks| size(&blocks.scales));
        let all = state.iter().map(|slice| size(&slice.values) + scales(slice)).sum::<usize>();
        if self.memory.as_ref().is_none_or(|memory| memory.numel() < all) {
            self.memory = None;
            let mut memory = Tensor::empty([all as i64], (Kind::Uint8, Device::Cpu));
            host::prefer_large_pages(slices::bytes_mut(&mut memory));
            self.memory = Some(memory);
        }
        let memory = self.memory.as_ref().expect("invariant: just made");
        let mut at = 0;
        let mut copy = |tensor: &Tensor| {
            let len = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as i64;
            let mut copy = memory.narrow(0, at, len).view_dtype(tensor.kind());
            copy.copy_(tensor);
            at += size(tensor) as i64;
            copy
        };
        let slices = state.iter().map(|slice| StateSlice {
            what: slice.what,
            place: slice.place.clone(),
            values: copy(&slice.values),
            blocks: slice.blocks.as_ref().map(|blocks| Blocks { scales: copy(&blocks.scales), phase: blocks.phase }),
        });
        slices.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::slices::Place;
    use crate::checkpoint::state::What;

    fn slice(values: Tensor, scales: Option<Tensor>) -> StateSlice {
        let len = values.numel() as i64;
        let place = Place { tensor: "w".into(), shape: vec![len], offset: vec![0], size: vec![len], start: 0, len };
        StateSlice { what: What::Weights, place, values, blocks: scales.map(|scales| Blocks { scales, phase: 3 }) }
    }

    #[test]
    fn a_copy_stays_what_it_was() {
        let random = |len: i64, kind| Tensor::randn([len], (Kind::Float, Device::Cpu)).to_kind(kind);
        let codes = Tensor::randint(255, [300], (Kind::Uint8, Device::Cpu));
        let state = [
            slice(random(7, Kind::Float), None),
            slice(codes, Some(random(2, Kind::Float))),
            slice(random(9, Kind::BFloat16), None),
            slice(random(5, Kind::Float), None),
        ];
        let seen: Vec<Tensor> = state.iter().map(|slice| slice.values.copy()).collect();
        let mut snapshot = Snapshot::default();
        let copies = snapshot.take(&state);
        for slice in &state {
            let _ = slice.values.shallow_clone().zero_();
        }
        for (copy, seen) in copies.iter().zip(&seen) {
            assert!(copy.values.equal(seen) && copy.values.kind() == seen.kind());
        }
        let blocks = copies[1].blocks.as_ref().unwrap();
        assert!(blocks.scales.equal(&state[1].blocks.as_ref().unwrap().scales) && blocks.phase == 3);
        // the same memory again
        let address = copies[0].values.data_ptr();
        drop(copies);
        let again = snapshot.take(&state[..2]);
        assert_eq!(again[0].values.data_ptr(), address);
        assert!(again[0].values.equal(&state[0].values));
    }
}
