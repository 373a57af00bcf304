//! What a trainer has to remember besides its configuration, as named slices: master weights and the optimizer's state.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::layout::Bucket;
use super::optimizer::Remembered;
use super::step::Trainer;
use crate::abi::slices::slice_mut;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::slices::Place;
use crate::checkpoint::state::{Blocks, StateFiles, StateSlice, Target, What};
use crate::dist::{Mesh, World};
use crate::kernels::moment::{self, BLOCK, Moment};
use crate::model::sharding::{Class, Param};

impl Trainer {
    /// This rank's share of the state, copied to the host: all ranks' together hold every element once.
    ///
    /// `optimizer`: with what the optimizer remembers.
    pub fn state(&self, mesh: Mesh, optimizer: bool) -> Vec<StateSlice> {
        let mut slices = Vec::new();
        let sharded = self.is_sharded();
        for (index, bucket) in self.parameters.layout.buckets.iter().enumerate() {
            // where all copies hold everything, each saves some buckets
            if !sharded && index % mesh.dp != mesh.dp_rank() {
                continue;
            }
            for (id, range) in &bucket.params {
                let param = &self.decoder.table.params[*id];
                if is_replicated(param) && mesh.tp_rank() > 0 {
                    continue;
                }
                for (place, own) in owned(bucket, param, range) {
                    let weights = host(&self.parameters.masters[index], &own);
                    slices.push(StateSlice {
                        what: What::Weights,
                        place: place.clone(),
                        values: weights,
                        blocks: None,
                    });
                    if optimizer {
                        self.remembered(index, &place, &own, &mut slices);
                    }
                }
            }
        }
        slices
    }

    /// Bytes that [`Self::state`] would copy.
    pub fn state_bytes(&self, mesh: Mesh, optimizer: bool) -> usize {
        let share = if self.is_sharded() { 1 } else { mesh.dp };
        let masters: usize = self.parameters.masters.iter().map(|own| own.numel() * 4).sum();
        (masters + if optimizer { self.optimizer.bytes() } else { 0 }) / share
    }

    /// Takes weights and, where the files have them, the optimizer's state from a checkpoint of any layout. All ranks call it.
    ///
    /// # Errors
    /// Elements that are not in the files.
    pub fn restore(
        &mut self,
        files: &StateFiles,
        optimizer_steps: usize,
        world: &World,
    ) -> Result<(), CheckpointError> {
        let whats = files.whats();
        for (index, bucket) in self.parameters.layout.buckets.iter().enumerate() {
            // straight to where it belongs, if that is on the host; what lies between parameters is 0 and stays
            let master = &self.parameters.masters[index];
            let mut weights = match master.device() {
                Device::Cpu => master.shallow_clone(),
                _ => Tensor::zeros([bucket.own.len() as i64], (Kind::Float, Device::Cpu)),
            };
            for (id, range) in &bucket.params {
                for (place, own) in owned(bucket, &self.decoder.table.params[*id], range) {
                    let numbers = slice_mut::<f32>(&mut weights);
                    let mut target = Target { numbers, codes: &mut [], scales: &mut [], exact: false };
                    files.fill(What::Weights, &place, own.start, &mut target)?;
                }
            }
            if master.device() != Device::Cpu {
                self.parameters.masters[index].copy_(&weights);
            }
            if let Some(mut own) = self.parameters.rounded(index) {
                own.copy_(&self.parameters.masters[index]);
            }
            for segment in self.optimizer.remembered(index) {
                let Remembered { what, own, moment } = segment;
                if whats.contains(&what) {
                    restore_moment(files, what, bucket, &self.decoder.table.params, &own, moment)?;
                }
            }
        }
        for index in (0..self.parameters.layout.buckets.len()).rev() {
            self.parameters.gather(index, &world.dp);
        }
        self.optimizer.set_steps(optimizer_steps);
        Ok(())
    }

    fn is_sharded(&self) -> bool {
        self.parameters.layout.buckets.iter().any(|bucket| bucket.own.len() < bucket.len)
    }

    /// What the optimizer remembers of one place of a bucket; `own`: where it lies in this rank's part.
    fn remembered(&self, bucket: usize, place: &Place, own: &Range<usize>, slices: &mut Vec<StateSlice>) {
        for (what, segment, moment) in self.optimizer.look(bucket) {
            if own.start < segment.start || own.end > segment.end {
                continue; // a place never crosses from one segment to another
            }
            let at = own.start - segment.start..own.end - segment.start;
            let blocks = moment.scales.as_ref().map(|scales| {
                let touched = at.start / BLOCK..at.end.div_ceil(BLOCK);
                Blocks { scales: host(scales, &touched), phase: at.start % BLOCK }
            });
            slices.push(StateSlice { what, place: place.clone(), values: host(&moment.values, &at), blocks });
        }
    }
}

/// Fills one segment's moment: exactly, codes included, where the files have cut the same blocks.
fn restore_moment(
    files: &StateFiles,
    what: What,
    bucket: &Bucket,
    params: &[Param],
    segment: &Range<usize>,
    moment: &mut Moment,
) -> Result<(), CheckpointError> {
    let len = segment.len();
    let coded = moment.scales.is_some();
    let mut numbers = Tensor::zeros([len as i64], (Kind::Float, Device::Cpu));
    // what lies between parameters is in no file, and is 0
    let zero = i64::from(moment::zero(moment.codes));
    let mut codes = Tensor::full([if coded { len as i64 } else { 0 }], zero, (Kind::Uint8, Device::Cpu));
    let blocks = if coded { len.div_ceil(BLOCK) as i64 } else { 0 };
    let mut scales = Tensor::zeros([blocks], (Kind::Float, Device::Cpu));
    let mut target = Target {
        numbers: slice_mut::<f32>(&mut numbers),
        codes: slice_mut::<u8>(&mut codes),
        scales: slice_mut::<f32>(&mut scales),
        exact: coded,
    };
    for (id, range) in &bucket.params {
        for (place, own) in owned(bucket, &params[*id], range) {
            if segment.start <= own.start && own.end <= segment.end {
                files.fill(what, &place, own.start - segment.start, &mut target)?;
            }
        }
    }
    match (target.exact, &mut moment.scales) {
        (true, Some(old)) => {
            moment.values.copy_(&codes);
            old.copy_(&scales);
        }
        _ => moment.write(&numbers.to_device(moment.values.device())),
    }
    Ok(())
}

/// The runs of a parameter that this rank owns: what they are, and where they lie in its own part of the bucket.
fn owned(bucket: &Bucket, param: &Param, range: &Range<usize>) -> Vec<(Place, Range<usize>)> {
    let columns = param.shape.get(1).copied().unwrap_or(1);
    let pieces = param.pieces.iter().filter_map(|piece| {
        let first = range.start + (piece.row * columns) as usize;
        let len: i64 = piece.size.iter().product();
        let own = bucket.owned(&(first..first + len as usize));
        let start = bucket.own.start + own.start;
        (!own.is_empty()).then(|| {
            let place = Place {
                tensor: piece.name.clone(),
                shape: piece.shape.clone(),
                offset: piece.offset.clone(),
                size: piece.size.clone(),
                start: (start - first) as i64,
                len: own.len() as i64,
            };
            (place, own)
        })
    });
    pieces.collect()
}

fn is_replicated(param: &Param) -> bool {
    // of what is not trained the class does not say; with one tensor-parallel rank it does not matter
    let whole = || param.pieces.iter().all(|piece| piece.size == piece.shape);
    matches!(param.class, Class::Vector | Class::PartialVector) || (param.class == Class::Frozen && whole())
}

/// A run of a flat tensor, as a tensor of its own on the host.
fn host(flat: &Tensor, range: &Range<usize>) -> Tensor {
    let part = flat.narrow(0, range.start as i64, range.len() as i64);
    if part.device() == Device::Cpu { part.copy() } else { part.to_device(Device::Cpu) }
}
