//! Which parameters may change, and what is done to them before training: names, adapters, masks and how they are found.
//!
//! Everything here is decided from the model, the data and the configuration alone, never from the layout: names by the sharding
//! table, masks by keys that every layout computes for the same weights, noise from (seed, tensor, element).

mod before;
mod choice;
mod elements;
mod error;
mod fila;
mod gradient;
mod mask_file;
mod names;
mod registry;
mod score;
mod top;

pub use before::intervene;
pub use error::ScopeError;
pub use fila::fila;
pub use gradient::Look;
pub use names::{is_partial, layer_of, narrow};
pub use registry::{SCORES, ScoreEntry};

use std::path::Path;

use tch::{Kind, Tensor};

use crate::abi::upload::upload_tensor;
use crate::config::{Config, Mask, Unit};
use crate::dist::World;
use crate::train::{Selection, Trainer};
use choice::Marks;
use elements::Elements;
use score::{Facts, Inputs};

/// The sets that a score looks at.
#[derive(Clone, Copy)]
pub struct Sets<'a> {
    /// Forget samples, or those to train on.
    pub forget: Look<'a>,
    pub retain: Option<Look<'a>>,
}

/// Finds out which weights may change, where names do not say it, and writes it to `path`; with `again`, reads it from there.
/// All ranks call it, before anything is allocated for training but gradients in f32 that stay.
///
/// `names`: of the tensors that may change, see [`narrow`].
///
/// # Errors
/// On all ranks: a score that is no number, a mask file that does not fit, an empty choice.
pub fn select(
    trainer: &mut Trainer,
    config: &Config,
    names: &[String],
    sets: Sets,
    path: &Path,
    again: bool,
    world: &World,
) -> Result<Option<Selection>, ScopeError> {
    let mask = config.scope.mask.as_ref();
    if mask.is_none() && !is_partial(&trainer.decoder.table, names) {
        return Ok(None);
    }
    let elements = Elements::new(&trainer.decoder.table, &trainer.parameters.layout, names, world);
    let marks = if again {
        mask_file::read(path, &elements, &trainer.decoder.table.tensors())?
    } else {
        let (mut marks, mut whole) = chosen(trainer, config, &elements, sets, world)?;
        if mask.is_some_and(|mask| mask.invert) {
            marks
                .iter_mut()
                .flatten()
                .chain(whole.iter_mut().flat_map(|(_, marks)| marks).flatten())
                .for_each(|mark| *mark = !*mark);
        }
        if let Some(other) = mask.and_then(|mask| mask.intersect.as_ref()) {
            let other = mask_file::read(other, &elements, &trainer.decoder.table.tensors())?;
            marks.iter_mut().flatten().zip(other.into_iter().flatten()).for_each(|(mark, other)| *mark &= other);
            whole = None;
        }
        let whole = whole.as_ref().map(|(unit, marks)| (*unit, marks.as_slice()));
        mask_file::write(path, &elements, &marks, whole, world)?;
        marks
    };
    let mine = elements.runs.iter().zip(&marks).filter(|(run, _)| run.counts);
    let mut count = [mine.map(|(_, marks)| marks.iter().filter(|&&mark| mark).count() as f64).sum::<f64>()];
    Elements::sum(&mut count, world);
    let (count, total) = (count[0] as u64, elements.total());
    if count == 0 {
        return Err(ScopeError::Score(format!("chooses none of {total} weights; raise scope.mask.fraction")));
    }
    tracing::info!(
        "mask: {count} of {total} weights ({:.2} %) may change, see {}",
        100.0 * count as f64 / total as f64,
        path.display()
    );
    let masks = on_device(trainer, &elements, &marks);
    Ok(Some(Selection::new(&trainer.parameters.layout, masks, count, total)))
}

/// The marks of groups, for each tensor.
type Whole = (Unit, Vec<Vec<bool>>);

fn chosen(
    trainer: &mut Trainer,
    config: &Config,
    elements: &Elements,
    sets: Sets,
    world: &World,
) -> Result<(Marks, Option<Whole>), ScopeError> {
    let Some(mask) = &config.scope.mask else {
        let all = vec![vec![true]; elements.tensors.len()];
        return Ok((choice::of_groups(elements, Unit::Tensor, &all), Some((Unit::Tensor, all))));
    };
    if let Some(path) = &mask.file {
        return Ok((mask_file::read(path, elements, &trainer.decoder.table.tensors())?, None));
    }
    let samples = |look: Look| match mask.samples.unwrap_or(0) {
        // as many of the retain set as there are to forget
        0 => sets.forget.set.samples.len().min(look.set.samples.len()),
        n => n.min(look.set.samples.len()),
    };
    let forget = Look { samples: samples(sets.forget), ..sets.forget };
    let retain = sets.retain.map(|look| Look { samples: samples(look), ..look });
    let inputs = Inputs { config: mask, forget, retain, seed: config.run.seed, batch: config.train.global_batch };
    let (unit, among) = (mask.unit.unwrap_or_default(), mask.among.unwrap_or_default());
    let fraction = mask.fraction.unwrap_or(Mask::FRACTION);
    let facts = Facts::gather(trainer, &inputs, elements, world)?;
    if unit == Unit::Weight {
        let keys = score::of_weights(&inputs, &facts, elements);
        return Ok((choice::weights(elements, &keys, fraction, among, world), None));
    }
    let rates = score::of_groups(trainer, &inputs, elements, &facts, world);
    if rates.iter().flatten().any(|rate| !rate.is_finite()) {
        return Err(ScopeError::Score("a rate is no number".to_owned()));
    }
    let groups = choice::whole_groups(elements, unit, &rates, fraction, among);
    Ok((choice::of_groups(elements, unit, &groups), Some((unit, groups))))
}

/// One bool tensor a bucket, of this rank's own part.
fn on_device(trainer: &Trainer, elements: &Elements, marks: &Marks) -> Vec<Tensor> {
    let device = trainer.decoder.device;
    let buckets = trainer.parameters.layout.buckets.iter().enumerate().map(|(index, bucket)| {
        let mut all = vec![0u8; bucket.own.len()];
        for (run, marks) in elements.runs.iter().zip(marks).filter(|(run, _)| run.bucket == index) {
            all[run.own.clone()].iter_mut().zip(marks).for_each(|(to, &mark)| *to = u8::from(mark));
        }
        upload_tensor(&Tensor::from_slice(&all), device).to_kind(Kind::Bool)
    });
    buckets.collect()
}
