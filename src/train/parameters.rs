//! The values of one rank's parameters: flat buffers in the kind that the model computes in, and f32 master weights for the
//! part that this rank owns. What is not trained is a tensor of its own, without a master.

use tch::{Device, Kind, Tensor};

use super::layout::Layout;
use super::selection::Selection;
use crate::abi::upload::upload_tensor;
use crate::dist::Group;
use crate::model::Weights;
use crate::model::sharding::{ParamId, Piece, Table};

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
    /// Allocates, and fills every piece of every parameter from `source` (any kind, converted on the way).
    ///
    /// # Errors
    /// The first error of `source`.
    pub fn new<E>(
        table: &Table,
        layout: Layout,
        kind: Kind,
        device: Device,
        mut source: impl FnMut(ParamId, &Piece) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let (flat, masters) = buckets(table, &layout, kind, device, &mut source)?;
        let mut frozen = Vec::new();
        for (id, param) in table.params.iter().enumerate().filter(|(id, _)| layout.places[*id].is_none()) {
            let target = Tensor::empty(&param.shape, (kind, device));
            for piece in &param.pieces {
                fill(&target.narrow(0, piece.row, piece.size[0]), &source(id, piece)?);
            }
            frozen.push(target);
        }
        let weights = Weights::new(views(table, &layout, &flat, &frozen));
        Ok(Self { layout, weights, flat, masters, frozen, frozen_moved: false, selection: None })
    }

    /// As [`Self::new`] on top of `base`, whose tensors stand for what is not trained; `source` is asked for the rest alone.
    ///
    /// # Errors
    /// The first error of `source`.
    pub fn over<E>(
        base: &Weights,
        table: &Table,
        layout: Layout,
        kind: Kind,
        device: Device,
        mut source: impl FnMut(ParamId, &Piece) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        let (flat, masters) = buckets(table, &layout, kind, device, &mut source)?;
        let still = (0..table.params.len()).filter(|&id| layout.places[id].is_none());
        let frozen: Vec<Tensor> = still.map(|id| base.get(id).shallow_clone()).collect();
        let weights = Weights::new(views(table, &layout, &flat, &frozen));
        Ok(Self { layout, weights, flat, masters, frozen, frozen_moved: false, selection: None })
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

    /// Bytes of weights and of masters that are not the weights themselves.
    pub fn bytes(&self) -> (usize, usize) {
        let size = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        let weights = self.flat.iter().chain(&self.frozen).map(size).sum();
        let shared = self.flat.first().is_some_and(|flat| flat.kind() == Kind::Float);
        (weights, if shared { 0 } else { self.masters.iter().map(size).sum() })
    }
}

/// Flat weights and masters of what is trained.
fn buckets<E>(
    table: &Table,
    layout: &Layout,
    kind: Kind,
    device: Device,
    source: &mut impl FnMut(ParamId, &Piece) -> Result<Tensor, E>,
) -> Result<(Vec<Tensor>, Vec<Tensor>), E> {
    let mut flat = Vec::new();
    let mut masters = Vec::new();
    for bucket in &layout.buckets {
        let wide = Tensor::zeros([bucket.len as i64], (Kind::Float, device));
        for (id, range) in &bucket.params {
            let param = &table.params[*id];
            let target = wide.narrow(0, range.start as i64, range.len() as i64).view(param.shape.as_slice());
            for piece in &param.pieces {
                fill(&target.narrow(0, piece.row, piece.size[0]), &source(*id, piece)?);
            }
        }
        let own = wide.narrow(0, bucket.own.start as i64, bucket.own.len() as i64);
        if kind == Kind::Float {
            masters.push(own);
            flat.push(wide);
        } else {
            masters.push(own.copy());
            flat.push(wide.to_kind(kind));
        }
    }
    Ok((flat, masters))
}

/// Bytes that go to a device at once: the size of the page-locked buffer that libtorch keeps for it.
const STAGE: i64 = 64 << 20;

/// Copies a tensor of the host, mapped or computed, or of the device, into `target`, converted on the target's side.
fn fill(target: &Tensor, source: &Tensor) {
    let mut target = target.shallow_clone();
    if target.device() == source.device() {
        return target.copy_(source);
    }
    let row = (source.numel() as i64 / source.size()[0].max(1)).max(1) * source.kind().elt_size_in_bytes() as i64;
    let rows = (STAGE / row).max(1);
    for first in (0..source.size()[0]).step_by(rows as usize) {
        let len = rows.min(source.size()[0] - first);
        let part = upload_tensor(&source.narrow(0, first, len).contiguous(), target.device());
        target.narrow(0, first, len).copy_(&part);
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
