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
use crate::model::sharding::{Param, Piece};

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
            let remembered = if optimizer { self.optimizer.look(index) } else { Vec::new() };
            for (id, range) in &bucket.params {
                let param = &self.decoder.table.params[*id];
                if param.class.is_replicated() && mesh.tp_rank() > 0 {
                    continue;
                }
                for (place, own) in bucket.runs(param, range) {
                    let weights = host(&self.parameters.masters[index], &own);
                    slices.push(StateSlice {
                        what: What::Weights,
                        place: place.clone(),
                        values: weights,
                        blocks: None,
                    });
                    slices.extend(of_place(&remembered, &place, &own));
                }
            }
        }
        if self.parameters.frozen_moved && mesh.dp_rank() == 0 {
            slices.extend(self.frozen(mesh));
        }
        slices
    }

    /// What is not trained and is not what was read: this tensor-parallel rank's pieces.
    fn frozen(&self, mesh: Mesh) -> Vec<StateSlice> {
        let mut slices = Vec::new();
        for (id, param) in self.frozen_params() {
            for piece in &param.pieces {
                if mesh.tp_rank() > 0 && piece.size == piece.shape {
                    continue; // every tensor-parallel rank holds all of it
                }
                let part = self.parameters.weights.get(id).narrow(0, piece.row, piece.size[0]);
                slices.push(StateSlice {
                    what: What::Weights,
                    place: whole_box(piece),
                    values: part.reshape([-1]).to_device(Device::Cpu).copy(),
                    blocks: None,
                });
            }
        }
        slices
    }

    fn frozen_params(&self) -> impl Iterator<Item = (usize, &Param)> {
        let all = self.decoder.table.params.iter().enumerate();
        all.filter(|(id, _)| self.parameters.layout.places[*id].is_none())
    }

    /// Bytes that [`Self::state`] would copy.
    pub fn state_bytes(&self, mesh: Mesh, optimizer: bool) -> usize {
        let share = if self.is_sharded() { 1 } else { mesh.dp };
        let masters: usize = self.parameters.masters.iter().map(|own| own.numel() * 4).sum();
        (masters + if optimizer { self.optimizer.bytes() } else { 0 }) / share
    }

    /// Takes weights and, where the files have it, the optimizer's state from a checkpoint of any layout. All ranks call it.
    ///
    /// `optimizer_steps`: what the optimizer has counted. Gives false where it remembers something and the files have nothing of it: then
    /// it starts anew, its count too, because moments that are corrected for so many steps must have seen them.
    ///
    /// # Errors
    /// Elements that are not in the files.
    pub fn restore(
        &mut self,
        files: &StateFiles,
        optimizer_steps: usize,
        world: &World,
    ) -> Result<bool, CheckpointError> {
        let whats = files.whats();
        let (mut wanted, mut found) = (false, false);
        for (index, bucket) in self.parameters.layout.buckets.iter().enumerate() {
            // straight to where it belongs, if that is on the host; what lies between parameters is 0 and stays
            let master = &self.parameters.masters[index];
            let mut weights = match master.device() {
                Device::Cpu => master.shallow_clone(),
                _ => Tensor::zeros([bucket.own.len() as i64], (Kind::Float, Device::Cpu)),
            };
            for (id, range) in &bucket.params {
                for (place, own) in bucket.runs(&self.decoder.table.params[*id], range) {
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
                wanted = true;
                if whats.contains(&segment.what) {
                    found = true;
                    restore_moment(files, bucket, &self.decoder.table.params, segment)?;
                }
            }
        }
        for index in (0..self.parameters.layout.buckets.len()).rev() {
            self.parameters.gather(index, &world.dp);
        }
        let known = files.tensors();
        let mut moved = false;
        for (id, param) in self.frozen_params() {
            for piece in param.pieces.iter().filter(|piece| known.contains_key(piece.name.as_str())) {
                let place = whole_box(piece);
                let mut values = Tensor::zeros([place.len], (Kind::Float, Device::Cpu));
                let numbers = slice_mut::<f32>(&mut values);
                let mut target = Target { numbers, codes: &mut [], scales: &mut [], exact: false };
                files.fill(What::Weights, &place, 0, &mut target)?;
                let mut part = self.parameters.weights.get(id).narrow(0, piece.row, piece.size[0]);
                part.copy_(&values.view(piece.size.as_slice()));
                moved = true;
            }
        }
        self.parameters.frozen_moved |= moved;
        // a question that all ranks answer alike, also those that own nothing
        let none = whats.iter().all(|&what| what == What::Weights);
        self.optimizer.set_steps(if none { 0 } else { optimizer_steps });
        Ok(found || !wanted)
    }

    fn is_sharded(&self) -> bool {
        self.parameters.layout.buckets.iter().any(|bucket| bucket.own.len() < bucket.len)
    }
}

/// A piece as one run.
fn whole_box(piece: &Piece) -> Place {
    Place {
        tensor: piece.name.clone(),
        shape: piece.shape.clone(),
        offset: piece.offset.clone(),
        size: piece.size.clone(),
        start: 0,
        len: piece.size.iter().product(),
    }
}

/// What the optimizer remembers of one place of a bucket; `own`: where it lies in this rank's part.
fn of_place(remembered: &[(What, Range<usize>, Moment)], place: &Place, own: &Range<usize>) -> Vec<StateSlice> {
    let segments = remembered.iter().filter(|(_, segment, _)| {
        // a place never crosses from one segment to another
        segment.start <= own.start && own.end <= segment.end
    });
    let slices = segments.map(|(what, segment, moment)| {
        let at = own.start - segment.start..own.end - segment.start;
        let blocks = moment.scales.as_ref().map(|scales| {
            let touched = at.start / BLOCK..at.end.div_ceil(BLOCK);
            Blocks { scales: host(scales, &touched), phase: at.start % BLOCK }
        });
        StateSlice { what: *what, place: place.clone(), values: host(&moment.values, &at), blocks }
    });
    slices.collect()
}

/// Fills one segment's moment: exactly, codes included, where the files have cut the same blocks.
fn restore_moment(
    files: &StateFiles,
    bucket: &Bucket,
    params: &[Param],
    remembered: Remembered,
) -> Result<(), CheckpointError> {
    let Remembered { what, own: segment, chosen, moment } = remembered;
    let len = segment.len();
    let coded = moment.scales.is_some() && chosen.is_none();
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
    let runs = || bucket.params.iter().flat_map(|(id, range)| bucket.runs(&params[*id], range));
    let inside = || runs().filter(|(_, own)| segment.start <= own.start && own.end <= segment.end);
    for (place, own) in inside() {
        files.fill(what, &place, own.start - segment.start, &mut target)?;
    }
    let mut scales_of_chosen = None;
    if let Some(scale) = what.scale().filter(|scale| chosen.is_some() && files.whats().contains(scale)) {
        let mut each = Tensor::zeros([len as i64], (Kind::Float, Device::Cpu));
        let numbers = slice_mut::<f32>(&mut each);
        let mut target = Target { numbers, codes: &mut [], scales: &mut [], exact: false };
        for (place, own) in inside() {
            files.fill(scale, &place, own.start - segment.start, &mut target)?;
        }
        scales_of_chosen = Some(each);
    }
    match (target.exact, &mut moment.scales) {
        (true, Some(old)) => {
            moment.values.copy_(&codes);
            old.copy_(&scales);
        }
        _ => {
            let of_chosen = |numbers: &Tensor| {
                let numbers = numbers.to_device(moment.values.device());
                let chosen = chosen.map(|chosen| numbers.index_select(0, &chosen.to_kind(Kind::Int64)));
                chosen.unwrap_or(numbers)
            };
            let numbers = of_chosen(&numbers);
            let scales = scales_of_chosen.map(|scales| of_chosen(&scales));
            if !scales.is_some_and(|scales| moment.write_with_scales(&numbers, &scales)) {
                moment.write(&numbers);
            }
        }
    }
    Ok(())
}

/// A run of a flat tensor, as a tensor of its own on the host.
fn host(flat: &Tensor, range: &Range<usize>) -> Tensor {
    let part = flat.narrow(0, range.start as i64, range.len() as i64);
    if part.device() == Device::Cpu { part.copy() } else { part.to_device(Device::Cpu) }
}
