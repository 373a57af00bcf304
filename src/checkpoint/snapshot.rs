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
    /// For each part of the state, `[bytes]` u8.
    memory: Vec<Tensor>,
    /// That memory while a thread touches it for the first time.
    coming: Option<JoinHandle<Vec<Tensor>>>,
}

impl Snapshot {
    /// Has a thread make room for copies of parts of `sizes` bytes (see [`bytes_of`]), once, so that the first save need not wait for
    /// the system to find the memory.
    pub fn prepare(&mut self, sizes: impl FnOnce() -> Vec<usize>) {
        if self.memory.is_empty() && self.coming.is_none() {
            let sizes = sizes();
            self.coming = Some(std::thread::spawn(move || {
                let touched = |bytes: usize| {
                    let mut memory = room(bytes);
                    // a number in each page is enough
                    slices::bytes_mut(&mut memory).iter_mut().step_by(4096).for_each(|byte| *byte = 0);
                    memory
                };
                sizes.into_iter().map(touched).collect()
            }));
        }
    }

    /// Copies slices of any device, part by part: what a part needs on its device is gone before the next one. The copies share this
    /// memory: the last ones must be done with.
    pub fn take(&mut self, parts: impl IntoIterator<Item = Vec<StateSlice>>) -> Vec<StateSlice> {
        if let Some(coming) = self.coming.take() {
            self.memory = coming.join().expect("invariant: touching memory does not panic");
        }
        let mut copies = Vec::new();
        for (index, part) in parts.into_iter().enumerate() {
            let bytes = bytes_of(&part);
            if index == self.memory.len() {
                self.memory.push(room(bytes));
            } else if (self.memory[index].numel()) < bytes {
                self.memory[index] = room(bytes);
            }
            let memory = &self.memory[index];
            let mut at = 0;
            let mut copy = |tensor: &Tensor| {
                let mut copy = memory.narrow(0, at, size(tensor) as i64).view_dtype(tensor.kind());
                copy.copy_(tensor);
                at += size(tensor).next_multiple_of(ALIGN) as i64;
                copy
            };
            copies.extend(part.iter().map(|slice| StateSlice {
                what: slice.what,
                place: slice.place.clone(),
                values: copy(&slice.values),
                blocks:
                    slice.blocks.as_ref().map(|blocks| Blocks { scales: copy(&blocks.scales), phase: blocks.phase }),
            }));
        }
        copies
    }
}

/// Bytes of the copies of a part.
pub fn bytes_of(part: &[StateSlice]) -> usize {
    let scales = |slice: &StateSlice| slice.blocks.as_ref().map_or(0, |blocks| aligned(size(&blocks.scales)));
    part.iter().map(|slice| aligned(size(&slice.values)) + scales(slice)).sum()
}

/// What so many bytes take up in a copy.
pub fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

fn size(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
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

    fn copies_of(state: &[StateSlice]) -> Vec<StateSlice> {
        let one = |slice: &StateSlice| StateSlice {
            what: slice.what,
            place: slice.place.clone(),
            values: slice.values.shallow_clone(),
            blocks: slice.blocks.as_ref().map(|b| Blocks { scales: b.scales.shallow_clone(), phase: b.phase }),
        };
        state.iter().map(one).collect()
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
        snapshot.prepare(|| vec![200, 9000]);
        let parts = || [copies_of(&state[..1]), copies_of(&state[1..])];
        let copies = snapshot.take(parts());
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
        let again = snapshot.take(parts());
        assert_eq!(again[0].values.data_ptr(), address);
        assert!(again[0].values.equal(&state[0].values));
    }
}
