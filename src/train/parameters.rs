//! The values of one rank's parameters: flat buffers in the kind that the model computes in, and f32 master weights for the
//! part that this rank owns. What is not trained is a tensor of its own, without a master.

use tch::{Device, Kind, Tensor};

use super::layout::Layout;
use super::selection::Selection;
use crate::abi::upload::fill;
use crate::dist::Group;
use crate::model::Weights;
use crate::model::sharding::{ParamId, Piece, Table};

/// Where the values of parameters come from.
pub trait Source {
    type Error;

    /// One piece, in any kind.
    fn read(&mut self, id: ParamId, piece: &Piece) -> Result<Tensor, Self::Error>;

    /// Pieces are read in ascending order of this: where they lie, for what is read from files.
    fn place(&self, _id: ParamId, _piece: &Piece) -> (usize, usize) {
        (0, 0)
    }
}

impl<E, F: FnMut(ParamId, &Piece) -> Result<Tensor, E>> Source for F {
    type Error = E;

    fn read(&mut self, id: ParamId, piece: &Piece) -> Result<Tensor, E> {
        self(id, piece)
    }
}

/// Flat weights and their masters.
///
/// When the model computes in f32 the masters are views of the flat weights and cost nothing.
pub struct Parameters {
    pub layout: Layout,
    pub weights: Weights,
    /// One buffer a bucket.
    flat: Vec<Tensor>,
    /// This rank's own part of each bucket, f32.
    pub masters: Vec<Tensor>,
    /// What is not trained, in the kind that the model computes in.
    frozen: Vec<Tensor>,
    /// Something of what is not trained is not what was read.
    pub frozen_moved: bool,
    /// Which weights of what is trained may change, where not all may.
    pub selection: Option<Selection>,
}

impl Parameters {
    /// Allocates, and fills every piece of every parameter from `source`. Needs the memory of one piece besides.
    ///
    /// # Errors
    /// The first error of `source`.
    pub fn new<S: Source>(
        table: &Table,
        layout: Layout,
        kind: Kind,
        device: Device,
        source: S,
    ) -> Result<Self, S::Error> {
        let still = table.params.iter().zip(&layout.places).filter(|(_, place)| place.is_none());
        let frozen = still.map(|(param, _)| Tensor::empty(&param.shape, (kind, device))).collect();
        let parameters = Self::allocate(table, layout, kind, device, frozen);
        parameters.fill(table, 0..table.params.len(), source)?;
        Ok(parameters)
    }

    /// As [`Self::new`] on top of `base`, whose tensors stand for what is not trained; `source` is asked for the rest alone.
    ///
    /// # Errors
    /// The first error of `source`.
    pub fn over<S: Source>(
        base: &Weights,
        table: &Table,
        layout: Layout,
        kind: Kind,
        device: Device,
        source: S,
    ) -> Result<Self, S::Error> {
        let (trained, still): (Vec<_>, Vec<_>) = (0..table.params.len()).partition(|&id| layout.places[id].is_some());
        let frozen = still.into_iter().map(|id| base.get(id).shallow_clone()).collect();
        let parameters = Self::allocate(table, layout, kind, device, frozen);
        parameters.fill(table, trained, source)?;
        Ok(parameters)
    }

    /// `frozen`: a tensor for each parameter that is not trained. What is trained is 0.
    fn allocate(table: &Table, layout: Layout, kind: Kind, device: Device, frozen: Vec<Tensor>) -> Self {
        let (mut flat, mut masters) = (Vec::new(), Vec::new());
        for bucket in &layout.buckets {
            let all = Tensor::zeros([bucket.len as i64], (kind, device));
            let own = (bucket.own.start as i64, bucket.own.len() as i64);
            masters.push(match kind {
                Kind::Float => all.narrow(0, own.0, own.1),
                _ => Tensor::zeros([own.1], (Kind::Float, device)),
            });
            flat.push(all);
        }
        let weights = Weights::new(views(table, &layout, &flat, &frozen));
        Self { layout, weights, flat, masters, frozen, frozen_moved: false, selection: None }
    }

    /// Fills the values of some parameters and the masters that this rank owns of them.
    fn fill<S: Source>(
        &self,
        table: &Table,
        ids: impl IntoIterator<Item = ParamId>,
        mut source: S,
    ) -> Result<(), S::Error> {
        let pieces = |id: ParamId| table.params[id].pieces.iter().map(move |piece| (id, piece));
        let mut all: Vec<(ParamId, &Piece)> = ids.into_iter().flat_map(pieces).collect();
        all.sort_by_key(|(id, piece)| source.place(*id, piece));
        for (id, piece) in all {
            let values = source.read(id, piece)?;
            fill(&self.weights.get(id).narrow(0, piece.row, piece.size[0]), &values);
            let Some((bucket, start)) = self.layout.places[id] else { continue };
            let master = &self.masters[bucket];
            if self.rounded(bucket).is_none() {
                continue; // the same memory
            }
            let columns = table.params[id].shape.get(1).copied().unwrap_or(1);
            let first = start + (piece.row * columns) as usize;
            let own = self.layout.buckets[bucket].owned(&(first..first + values.numel()));
            if !own.is_empty() {
                let skipped = self.layout.buckets[bucket].own.start + own.start - first;
                let part = values.reshape([-1]).narrow(0, skipped as i64, own.len() as i64);
                fill(&master.narrow(0, own.start as i64, own.len() as i64), &part);
            }
        }
        Ok(())
    }

    /// Gives a parameter that is not trained other values, piece by piece.
    ///
    /// # Errors
    /// The first error of `source`.
    pub fn put<E>(
        &self,
        table: &Table,
        id: ParamId,
        mut source: impl FnMut(&Piece) -> Result<Tensor, E>,
    ) -> Result<(), E> {
        assert!(self.layout.places[id].is_none(), "invariant: it is not trained");
        let target = self.weights.get(id);
        for piece in &table.params[id].pieces {
            fill(&target.narrow(0, piece.row, piece.size[0]), &source(piece)?);
        }
        Ok(())
    }

    /// This rank's own part of the model's weights in bucket `index`, where those are not the masters themselves.
    pub fn rounded(&self, index: usize) -> Option<Tensor> {
        let own = &self.layout.buckets[index].own;
        let part = self.flat[index].narrow(0, own.start as i64, own.len() as i64);
        (part.data_ptr() != self.masters[index].data_ptr()).then_some(part)
    }

    /// Brings the other owners' parts of the model's weights in bucket `index` to this rank. All ranks of `owners` call it.
    pub fn gather(&self, index: usize, owners: &Group) {
        let bucket = &self.layout.buckets[index];
        if bucket.own.len() < bucket.len {
            let mut flat = self.flat[index].shallow_clone();
            let own = flat.narrow(0, bucket.own.start as i64, bucket.own.len() as i64);
            owners.all_gather_into(&own, &mut flat);
        }
    }

    /// The f32 weights of bucket `index`, whole. All ranks of `owners` call it.
    pub fn gather_masters(&self, index: usize, owners: &Group) -> Tensor {
        let bucket = &self.layout.buckets[index];
        if bucket.own.len() == bucket.len {
            self.masters[index].shallow_clone()
        } else {
            owners.all_gather(&self.masters[index])
        }
    }

    /// What [`Self::bytes`] would be of numbers of kind `kind`.
    pub fn planned_bytes(table: &Table, layout: &Layout, kind: Kind) -> (usize, usize) {
        let all: usize = layout.buckets.iter().map(|bucket| bucket.len).sum();
        let own: usize = layout.buckets.iter().map(|bucket| bucket.own.len()).sum();
        let frozen = layout.places.iter().zip(&table.params).filter(|(place, _)| place.is_none());
        let frozen: usize = frozen.map(|(_, param)| param.num_elements() as usize).sum();
        ((all + frozen) * kind.elt_size_in_bytes(), if kind == Kind::Float { 0 } else { 4 * own })
    }

    /// Bytes of weights and of masters that are not the weights themselves.
    pub fn bytes(&self) -> (usize, usize) {
        let size = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        let weights = self.flat.iter().chain(&self.frozen).map(size).sum();
        let shared = self.flat.first().is_some_and(|flat| flat.kind() == Kind::Float);
        (weights, if shared { 0 } else { self.masters.iter().map(size).sum() })
    }
}

/// One tensor for each parameter of the table: a view into `flat` (one buffer a bucket), or the next of `frozen`.
fn views(table: &Table, layout: &Layout, flat: &[Tensor], frozen: &[Tensor]) -> Vec<Tensor> {
    let mut frozen = frozen.iter();
    let each = layout.places.iter().zip(&table.params).map(|(place, param)| match place {
        Some((bucket, start)) => {
            flat[*bucket].narrow(0, *start as i64, param.num_elements()).view(param.shape.as_slice())
        }
        None => frozen.next().expect("invariant: one for each that is not trained").shallow_clone(),
    });
    each.collect()
}
