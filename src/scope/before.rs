//! What is done to the weights before the first step: another checkpoint's values, blending, noise.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::ScopeError;
use super::elements::{Elements, each};
use crate::abi::slices::{slice, slice_mut};
use crate::checkpoint::Folder;
use crate::config::Config;
use crate::dist::World;
use crate::model::init::Stream;
use crate::train::Trainer;

/// Does what `[before]` says, in its order. All ranks call it, before the first step.
///
/// # Errors
/// Another checkpoint that cannot be read or is not of this model.
pub fn intervene(trainer: &mut Trainer, config: &Config, world: &World) -> Result<(), ScopeError> {
    let before = &config.before;
    if before.is_nothing() {
        return Ok(());
    }
    let other = before.other.as_ref().map(|path| open(path, trainer)).transpose()?;
    if let Some(other) = &other {
        if before.reset {
            mix(trainer, other, 1.0, true)?;
            tracing::info!(
                "before: what may change is reset to {}",
                config.before.other.as_deref().unwrap_or(Path::new("")).display()
            );
        }
        if let Some(share) = before.blend {
            mix(trainer, other, share, false)?;
            mix_frozen(trainer, other, share)?;
        }
    }
    if let Some(std) = before.noise {
        noise(trainer, std, before.noise_relative, config.run.seed, world);
        tracing::info!(
            "before: noise with a standard deviation of {std}{}",
            if before.noise_relative { " of each tensor's own" } else { "" }
        );
    }
    let parameters = &trainer.parameters;
    for index in (0..parameters.layout.buckets.len()).rev() {
        if let Some(mut own) = parameters.rounded(index) {
            own.copy_(&parameters.masters[index]);
        }
        parameters.gather(index, &world.dp);
    }
    Ok(())
}

fn open(path: &Path, trainer: &Trainer) -> Result<Folder, ScopeError> {
    let folder = Folder::open(path)?;
    folder.check(&trainer.decoder.table)?;
    Ok(folder)
}

/// `(1 - share) w + share other` for the masters; only where it may change, with `chosen`.
fn mix(trainer: &mut Trainer, other: &Folder, share: f64, chosen: bool) -> Result<(), ScopeError> {
    let Trainer { decoder, parameters, .. } = trainer;
    for (index, bucket) in parameters.layout.buckets.iter().enumerate() {
        let own = bucket.own.len() as i64;
        let theirs = Tensor::zeros([own], (Kind::Float, Device::Cpu));
        for (id, range) in &bucket.params {
            let param = &decoder.table.params[*id];
            if *id >= decoder.table.own {
                continue; // adapters are in no checkpoint of the model
            }
            for ((place, own), piece) in bucket.runs(param, range).iter().flat_map(|run| {
                let piece = param.pieces.iter().find(|p| p.name == run.0.tensor && p.offset == run.0.offset);
                piece.map(|piece| (run.clone(), piece))
            }) {
                let flat = other.slice(piece)?.to_kind(Kind::Float).reshape([-1]);
                let part = flat.narrow(0, place.start, place.len);
                theirs.narrow(0, own.start as i64, place.len).copy_(&part);
            }
        }
        let mut master = parameters.masters[index].shallow_clone();
        let theirs = theirs.to_device(master.device());
        let mixed = &master + (&theirs - &master) * share;
        let mixed = if share == 1.0 { theirs } else { mixed };
        match parameters.selection.as_ref().filter(|_| chosen) {
            Some(selection) => master.copy_(&mixed.where_self(selection.mask(index), &master)),
            None => master.copy_(&mixed),
        }
    }
    Ok(())
}

fn mix_frozen(trainer: &mut Trainer, other: &Folder, share: f64) -> Result<(), ScopeError> {
    let Trainer { decoder, parameters, .. } = trainer;
    for (id, param) in decoder.table.params[..decoder.table.own].iter().enumerate() {
        if parameters.layout.places[id].is_some() {
            continue;
        }
        for piece in &param.pieces {
            let mut mine = parameters.weights.get(id).narrow(0, piece.row, piece.size[0]);
            let theirs = other.slice(piece)?.to_kind(Kind::Float).to_device(mine.device());
            let wide = mine.to_kind(Kind::Float);
            mine.copy_(&(&wide + (theirs - &wide) * share));
        }
        parameters.frozen_moved = true;
    }
    Ok(())
}

/// Adds Gaussian noise to the masters of what may change.
fn noise(trainer: &mut Trainer, std: f64, relative: bool, seed: u64, world: &World) {
    let Trainer { decoder, parameters, .. } = trainer;
    let names: Vec<String> = decoder.table.tensors().into_iter().map(|(name, _)| name.to_owned()).collect();
    let elements = Elements::new(&decoder.table, &parameters.layout, &names, world);
    let stds = if relative { own_stds(parameters, &elements, world) } else { vec![1.0; elements.tensors.len()] };
    for (index, master) in parameters.masters.iter().enumerate() {
        let mut values = master.to_device(Device::Cpu).copy();
        let chosen = parameters.selection.as_ref().map(|s| s.mask(index).to_device(Device::Cpu).to_kind(Kind::Uint8));
        let numbers = slice_mut::<f32>(&mut values);
        for run in elements.runs.iter().filter(|run| run.bucket == index) {
            let tensor = &elements.tensors[run.tensor];
            let stream = Stream::new(seed, &format!("noise on {}", tensor.name));
            let scale = std * stds[run.tensor];
            let marks = chosen.as_ref().map(|chosen| &slice::<u8>(chosen)[run.own.clone()]);
            each(&run.place, |at, row, column| {
                if marks.is_none_or(|marks| marks[at] == 1) {
                    let normal = stream.normal((row * tensor.columns + column) as u64);
                    numbers[run.own.start + at] += (scale * normal) as f32;
                }
            });
        }
        master.shallow_clone().copy_(&values);
    }
}

/// Standard deviation of each tensor's weights, over the whole tensor.
fn own_stds(parameters: &crate::train::Parameters, elements: &Elements, world: &World) -> Vec<f64> {
    let count = elements.tensors.len();
    let mut sums = vec![0.0; 2 * count];
    for run in elements.runs.iter().filter(|run| run.counts) {
        let part = parameters.masters[run.bucket].narrow(0, run.own.start as i64, run.own.len() as i64);
        let part = part.to_kind(Kind::Double);
        sums[2 * run.tensor] += part.sum(Kind::Double).double_value(&[]);
        sums[2 * run.tensor + 1] += part.square().sum(Kind::Double).double_value(&[]);
    }
    Elements::sum(&mut sums, world);
    let std = |(tensor, sums): (&super::elements::Tensor, &[f64])| {
        let n = (tensor.rows * tensor.columns) as f64;
        (sums[1] / n - (sums[0] / n).powi(2)).max(0.0).sqrt()
    };
    elements.tensors.iter().zip(sums.chunks(2)).map(std).collect()
}
