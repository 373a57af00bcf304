//! What a trainer has to remember besides its configuration, as named slices: master weights and the optimizer's state.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::layout::Bucket;
use super::optimizer::{Form, Remembered};
use super::step::Trainer;
use crate::abi::slices::slice_mut;
use crate::checkpoint::slices::Place;
use crate::checkpoint::state::{Blocks, StateFiles, StateSlice, Target, What};
use crate::checkpoint::{CheckpointError, aligned, bytes_of};
use crate::dist::{Mesh, World};
use crate::kernels::moment::{self, BLOCK, Moment};
use crate::model::sharding::{Param, Piece};

impl Trainer {
    /// This rank's share of the state, where it lies: all ranks' together hold every element once. In the order in which
    /// [`Self::restore`] asks for it.
    ///
    /// `optimizer`: with what the optimizer remembers.
    pub fn state(&self, mesh: Mesh, optimizer: bool) -> Vec<StateSlice> {
        self.state_parts(mesh, optimizer).flatten().collect()
    }

    /// As [`Self::state`], bucket by bucket: under a mask, moments are spread out over all elements for as long as their part lives.
    pub fn state_parts(&self, mesh: Mesh, optimizer: bool) -> impl Iterator<Item = Vec<StateSlice>> {
        let of_bucket = move |(index, bucket)| {
            let runs = self.runs(bucket, mesh);
            let master = |(place, own): &(Place, Range<usize>)| StateSlice {
                what: What::Weights,
                place: place.clone(),
                values: part(&self.parameters.masters[index], own),
                blocks: None,
            };
            let mut slices: Vec<StateSlice> = runs.iter().map(master).collect();
            if optimizer {
                for (what, segment, moment) in self.optimizer.look(index) {
                    let inside = runs.iter().filter(|(_, own)| within(own, &segment));
                    slices.extend(inside.map(|(place, own)| of_place(what, &segment, &moment, place, own)));
                }
            }
            slices
        };
        self.buckets_to_save(mesh).map(of_bucket).chain(self.saves_frozen(mesh).then(|| self.frozen(mesh)))
    }

    /// Bytes of a copy of each of [`Self::state_parts`], without making them.
    pub fn state_sizes(&self, mesh: Mesh, optimizer: bool) -> Vec<usize> {
        let of_bucket = |(index, bucket)| {
            let runs = self.runs(bucket, mesh);
            let masters: usize = runs.iter().map(|(_, own)| aligned(4 * own.len())).sum();
            let remembered = self.optimizer.forms(index).filter(|_| optimizer).flat_map(|(segment, form)| {
                let inside: Vec<_> = runs.iter().map(|(_, own)| own).filter(|own| within(own, &segment)).collect();
                inside.into_iter().map(move |own| match form {
                    Form::Numbers { width } => aligned(width * own.len()),
                    Form::Codes => {
                        let at = own.start - segment.start..own.end - segment.start;
                        aligned(own.len()) + aligned(4 * (at.end.div_ceil(BLOCK) - at.start / BLOCK))
                    }
                })
            });
            masters + remembered.sum::<usize>()
        };
        let frozen = self.saves_frozen(mesh).then(|| bytes_of(&self.frozen(mesh)));
        self.buckets_to_save(mesh).map(of_bucket).chain(frozen).collect()
    }

    /// Where all copies hold everything, each saves some buckets.
    fn buckets_to_save(&self, mesh: Mesh) -> impl Iterator<Item = (usize, &Bucket)> {
        let sharded = self.is_sharded();
        let all = self.parameters.layout.buckets.iter().enumerate();
        all.filter(move |(index, _)| sharded || index % mesh.dp == mesh.dp_rank())
    }

    /// What this rank saves of a bucket, and where that lies in its own part.
    fn runs(&self, bucket: &Bucket, mesh: Mesh) -> Vec<(Place, Range<usize>)> {
        let params = bucket.params.iter().map(|(id, range)| (&self.decoder.table.params[*id], range));
        let mine = params.filter(|(param, _)| !param.class.is_replicated() || mesh.tp_rank() == 0);
        mine.flat_map(|(param, range)| bucket.runs(param, range)).collect()
    }

    fn saves_frozen(&self, mesh: Mesh) -> bool {
        self.parameters.frozen_moved && mesh.dp_rank() == 0
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
                let values = part.reshape([-1]);
                slices.push(StateSlice { what: What::Weights, place: whole_box(piece), values, blocks: None });
            }
        }
        slices
    }

    fn frozen_params(&self) -> impl Iterator<Item = (usize, &Param)> {
        let all = self.decoder.table.params.iter().enumerate();
        all.filter(|(id, _)| self.parameters.layout.places[*id].is_none())
    }

    /// Takes weights and, where the files have it, the optimizer's state from a checkpoint of any layout. All ranks call it.
    ///
    /// `optimizer_steps`: what the optimizer has counted. Gives false where it remembers something and the files do not have all of it:
    /// then it starts anew, its count too, because moments that are corrected for so many steps must have seen them.
    ///
    /// # Errors
    /// Elements that are not in the files.
    pub fn restore(
        &mut self,
        files: &StateFiles,
        optimizer_steps: usize,
        world: &World,
    ) -> Result<bool, CheckpointError> {
        // a question that all ranks answer alike, also those that own nothing
        let whats = files.whats();
        let complete = self.optimizer.whats().iter().all(|what| whats.contains(what));
        for (index, bucket) in self.parameters.layout.buckets.iter().enumerate() {
            let master = &self.parameters.masters[index];
            for (id, range) in &bucket.params {
                for (place, own) in bucket.runs(&self.decoder.table.params[*id], range) {
                    restore_numbers(files, What::Weights, &place, &part(master, &own))?;
                }
            }
            if let Some(mut own) = self.parameters.rounded(index) {
                own.copy_(&self.parameters.masters[index]);
            }
            for segment in self.optimizer.remembered(index) {
                if complete {
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
                let part = self.parameters.weights.get(id).narrow(0, piece.row, piece.size[0]);
                restore_numbers(files, What::Weights, &whole_box(piece), &part)?;
                moved = true;
            }
        }
        self.parameters.frozen_moved |= moved;
        self.optimizer.set_steps(if complete { optimizer_steps } else { 0 });
        Ok(complete)
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

/// Whether a place lies in a segment; it never crosses from one to another.
fn within(own: &Range<usize>, segment: &Range<usize>) -> bool {
    segment.start <= own.start && own.end <= segment.end
}

/// What a moment of a segment has of one place; `own`: where that lies in this rank's part of the bucket.
fn of_place(what: What, segment: &Range<usize>, moment: &Moment, place: &Place, own: &Range<usize>) -> StateSlice {
    let at = own.start - segment.start..own.end - segment.start;
    let blocks = moment.scales.as_ref().map(|scales| {
        let touched = at.start / BLOCK..at.end.div_ceil(BLOCK);
        Blocks { scales: part(scales, &touched), phase: at.start % BLOCK }
    });
    StateSlice { what, place: place.clone(), values: part(&moment.values, &at), blocks }
}

/// Fills a tensor of any kind, shape and device with the numbers of a place; needs memory of that size only where the files' f32
/// cannot go straight in.
fn restore_numbers(files: &StateFiles, what: What, place: &Place, tensor: &Tensor) -> Result<(), CheckpointError> {
    let mut tensor = tensor.shallow_clone();
    if tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.is_contiguous() {
        return files.fill(what, place, 0, &mut Target::Numbers(slice_mut::<f32>(&mut tensor)));
    }
    let mut numbers = Tensor::empty([place.len], (Kind::Float, Device::Cpu));
    files.fill(what, place, 0, &mut Target::Numbers(slice_mut::<f32>(&mut numbers)))?;
    tensor.copy_(&numbers.view(tensor.size().as_slice()));
    Ok(())
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
    let runs = bucket.params.iter().flat_map(|(id, range)| bucket.runs(&params[*id], range));
    // each with its place in the segment
    let inside: Vec<(Place, Range<usize>)> = runs
        .filter(|(_, own)| within(own, &segment))
        .map(|(place, own)| (place, own.start - segment.start..own.end - segment.start))
        .collect();
    let coded = moment.scales.is_some();
    if chosen.is_none() && !coded {
        return inside
            .iter()
            .try_for_each(|(place, at)| restore_numbers(files, what, place, &part(&moment.values, at)));
    }
    let same_blocks = |(place, at): &(Place, Range<usize>)| files.same_blocks(what, place, at.start);
    if let (Some(old), None, true) = (&mut moment.scales, chosen, inside.iter().all(same_blocks)) {
        // what lies between parameters is in no file, and is 0
        let zero = i64::from(moment::zero(moment.codes));
        let mut codes = Tensor::full([len as i64], zero, (Kind::Uint8, Device::Cpu));
        let mut scales = Tensor::full([len.div_ceil(BLOCK) as i64], f64::NAN, (Kind::Float, Device::Cpu));
        let mut mixed = false;
        let (to, blocks) = (slice_mut::<u8>(&mut codes), slice_mut::<f32>(&mut scales));
        let mut target = Target::Codes { codes: to, scales: blocks, mixed: &mut mixed };
        inside.iter().try_for_each(|(place, at)| files.fill(what, place, at.start, &mut target))?;
        if !mixed {
            moment.values.copy_(&codes);
            old.copy_(&scales.nan_to_num(0.0, None, None));
            return Ok(());
        }
    }
    let all = |what: What| {
        let mut numbers = Tensor::zeros([len as i64], (Kind::Float, Device::Cpu));
        let mut target = Target::Numbers(slice_mut::<f32>(&mut numbers));
        inside.iter().try_for_each(|(place, at)| files.fill(what, place, at.start, &mut target))?;
        let numbers = numbers.to_device(moment.values.device());
        let chosen = chosen.map(|chosen| numbers.index_select(0, &chosen.to_kind(Kind::Int64)));
        Ok::<_, CheckpointError>(chosen.unwrap_or(numbers))
    };
    let numbers = all(what)?;
    let scale = what.scale().filter(|scale| coded && chosen.is_some() && files.whats().contains(scale));
    let scales = scale.map(all).transpose()?;
    if !scales.is_some_and(|scales| moment.write_with_scales(&numbers, &scales)) {
        moment.write(&numbers);
    }
    Ok(())
}

/// A run of a flat tensor.
fn part(flat: &Tensor, range: &Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}
