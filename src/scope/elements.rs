//! The elements of the eligible matrices that this rank owns: where they lie here, and which they are in the model.

use std::ops::Range;

use crate::checkpoint::slices::Place;
use crate::dist::{Reduce, World};
use crate::model::sharding::Table;
use crate::train::Layout;

/// Elements of one tensor that lie side by side in this rank's part of a bucket.
pub struct Run {
    pub bucket: usize,
    /// In this rank's own part of the bucket.
    pub own: Range<usize>,
    /// Index of the tensor in [`Elements::tensors`].
    pub tensor: usize,
    pub place: Place,
    /// Whether it counts in sums over all ranks: of copies of the same elements one does.
    pub counts: bool,
}

/// A tensor of which weights may be chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub rows: usize,
    pub columns: usize,
}

/// All of this rank's runs.
pub struct Elements {
    /// The same on all ranks, in model order.
    pub tensors: Vec<Tensor>,
    pub runs: Vec<Run>,
}

impl Elements {
    /// Those of the tensors in `names` that are trained.
    pub fn new(table: &Table, layout: &Layout, names: &[String], world: &World) -> Self {
        let known = table.tensors().into_iter().filter(|(name, _)| names.iter().any(|known| known == name));
        let tensors: Vec<Tensor> = known
            .map(|(name, shape)| Tensor {
                name: name.to_owned(),
                rows: shape[0] as usize,
                columns: shape.get(1).map_or(1, |&n| n as usize),
            })
            .collect();
        let sharded = layout.buckets.iter().any(|bucket| bucket.own.len() < bucket.len);
        let first_copy = sharded || world.mesh.dp_rank() == 0;
        let mut runs = Vec::new();
        for (index, bucket) in layout.buckets.iter().enumerate() {
            for (id, range) in &bucket.params {
                let counts = first_copy && (world.tp.is_first() || !table.params[*id].class.is_replicated());
                for (place, own) in bucket.runs(&table.params[*id], range) {
                    if let Some(tensor) = tensors.iter().position(|tensor| tensor.name == place.tensor) {
                        runs.push(Run { bucket: index, own, tensor, place, counts });
                    }
                }
            }
        }
        Self { tensors, runs }
    }

    /// Number of elements over all ranks.
    pub fn total(&self) -> u64 {
        self.tensors.iter().map(|tensor| (tensor.rows * tensor.columns) as u64).sum()
    }

    /// Adds up what each rank has counted of its elements. All ranks call it.
    pub fn sum(values: &mut [f64], world: &World) {
        // messages of 4 MiB
        for part in values.chunks_mut(1 << 19) {
            world.world.all_reduce_f64(part, Reduce::Sum);
        }
    }
}

/// `visit(element of the run, row, column)` for every element, in order.
pub fn each(place: &Place, mut visit: impl FnMut(usize, usize, usize)) {
    for stretch in place.stretches() {
        for i in 0..stretch.len {
            visit((stretch.at + i) as usize, stretch.row as usize, (stretch.column + i) as usize);
        }
    }
}
