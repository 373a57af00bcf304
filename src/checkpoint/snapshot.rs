//! A copy of a rank's state that a thread writes while training goes on.

use std::thread::JoinHandle;

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
    /// That memory while a thread touches it for the first time.
    coming: Option<JoinHandle<Tensor>>,
}

impl Snapshot {
    /// Has a thread make room for copies of `state`, once, so that the first save need not wait for the system to find the memory.
    pub fn prepare(&mut self, state: impl FnOnce() -> Vec<StateSlice>) {
        if self.memory.is_none() && self.coming.is_none() {
            let all = needed(&state());
            self.coming = Some(std::thread::spawn(move || {
                let mut memory = room(all);
                // a number in each page is enough
                slices::bytes_mut(&mut memory).iter_mut().step_by(4096).for_each(|byte| *byte = 0);
                memory
            }));
        }
    }

    /// Copies slices of any device. The copies share this memory: the last ones must be done with.
    pub fn take(&mut self, state: &[StateSlice]) -> Vec<StateSlice> {
        if let Some(coming) = self.coming.take() {
            self.memory = Some(coming.join().expect("invariant: touching memory does not panic"));
        }
        let all = needed(state);
        if self.memory.as_ref().is_none_or(|memory| memory.numel() < all) {
            self.memory = None;
        }
        let memory = self.memory.get_or_insert_with(|| room(all));
        let mut at = 0;
        let mut copy = |tensor: &Tensor| {
            let len = size(tensor) as i64;
            let mut copy = memory.narrow(0, at, len).view_dtype(tensor.kind());
            copy.copy_(tensor);
            at += size(tensor).next_multiple_of(ALIGN) as i64;
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

fn size(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Bytes of the copies.
fn needed(state: &[StateSlice]) -> usize {
    let aligned = |tensor: &Tensor| size(tensor).next_multiple_of(ALIGN);
    let scales = |slice: &StateSlice| slice.blocks.as_ref().map_or(0, |blocks| aligned(&blocks.scales));
    state.iter().map(|slice| aligned(&slice.values) + scales(slice)).sum()
}

fn room(bytes: usize) -> Tensor {
    let mut memory = Tensor::empty([bytes as i64], (Kind::Uint8, Device::Cpu));
    host::prefer_large_pages(slices::bytes_mut(&mut memory));
    memory
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
        snapshot.prepare(|| vec![slice(random(800, Kind::Float), None)]);
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
