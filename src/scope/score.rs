//! How weights, or groups of them, are rated. Larger goes first; formulas in docs/methods.md, sources at [`config::Score`].

use tch::{Device, Kind, Tensor};

use super::ScopeError;
use super::elements::{Elements, Run, each};
use super::gradient::{self, Look};
use super::names::layer_of;
use super::top::largest;
use crate::abi::slices::slice;
use crate::config::{self, Score, Unit};
use crate::dist::World;
use crate::model::init::Stream;
use crate::train::Trainer;

/// What a score is computed from.
pub struct Inputs<'a> {
    pub config: &'a config::Mask,
    pub forget: Look<'a>,
    pub retain: Option<Look<'a>>,
    pub seed: u64,
    /// Samples of one batch where squares are averaged over batches.
    pub batch: usize,
}

/// What has been found out about every weight of this rank: one tensor a bucket, of its own part, f32 on the host.
pub struct Facts {
    /// g_f, or E[g_f^2] for `fila`.
    forget: Vec<Tensor>,
    retain: Vec<Tensor>,
    weights: Vec<Tensor>,
    eps: f64,
}

impl Facts {
    /// Looks at the model. All ranks call it.
    pub fn gather(
        trainer: &mut Trainer,
        inputs: &Inputs,
        elements: &Elements,
        world: &World,
    ) -> Result<Self, ScopeError> {
        let score = inputs.config.score.expect("invariant: a score is asked for");
        let squares = score == Score::Fila;
        let mut look = |look: Look| match squares {
            true => gradient::mean_square(trainer, look, inputs.batch, world),
            false => gradient::mean(trainer, look, world),
        };
        let forget =
            if matches!(score, Score::Random | Score::Activations) { Vec::new() } else { look(inputs.forget)? };
        let retain = match (score, inputs.retain) {
            (Score::Gri | Score::Fila | Score::Wagle | Score::Memflex, Some(set)) => look(set)?,
            _ => Vec::new(),
        };
        let host = |master: &Tensor| master.to_device(Device::Cpu).to_kind(Kind::Float);
        let weights = trainer.parameters.masters.iter().map(host).collect();
        let mut facts = Self { forget, retain, weights, eps: 0.0 };
        facts.eps = match (score, inputs.config.eps) {
            (_, Some(eps)) => eps,
            (Score::Fila, None) => config::Mask::FILA_EPS,
            (Score::Gri, None) => facts.low_gradient(elements, world),
            _ => 0.0,
        };
        Ok(facts)
    }

    /// The 5th percentile of |g_r|: larger than or equal to 5 % of all.
    fn low_gradient(&self, elements: &Elements, world: &World) -> f64 {
        let total = elements.total();
        let above = total - total / 20;
        let show = |visit: &mut dyn FnMut(u32, u64)| {
            for run in elements.runs.iter().filter(|run| run.counts) {
                let values = &slice::<f32>(&self.retain[run.bucket])[run.own.clone()];
                // ids do not matter: only the key of the cut is looked at
                values.iter().for_each(|value| visit(value.abs().to_bits(), 0));
            }
        };
        f64::from(f32::from_bits(largest(above.max(1), &show, world).key))
    }
}

/// Rates of this rank's runs, in the order of [`Elements::runs`], as keys of the same order as the rates.
pub fn of_weights(inputs: &Inputs, facts: &Facts, elements: &Elements) -> Vec<Vec<u32>> {
    elements.runs.iter().map(|run| of_run(inputs, facts, elements, run)).collect()
}

fn of_run(inputs: &Inputs, facts: &Facts, elements: &Elements, run: &Run) -> Vec<u32> {
    let tensor = &elements.tensors[run.tensor];
    let score = inputs.config.score.expect("invariant: a score is asked for");
    if score == Score::Random {
        let stream = Stream::new(inputs.seed, &format!("mask of {}", tensor.name));
        let mut keys = Vec::with_capacity(run.own.len());
        each(&run.place, |_, row, column| {
            keys.push((stream.bits((row * tensor.columns + column) as u64) >> 32) as u32)
        });
        return keys;
    }
    let part =
        |of: &[Tensor]| of.get(run.bucket).map(|t| slice::<f32>(t)[run.own.clone()].to_vec()).unwrap_or_default();
    let (forget, retain, weights) = (part(&facts.forget), part(&facts.retain), part(&facts.weights));
    let (eps, mu) = (facts.eps, inputs.config.mu.unwrap_or(config::Mask::MU));
    let rate = |i: usize| {
        let (f, w) = (f64::from(forget[i]), f64::from(weights[i]));
        let r = retain.get(i).copied().map_or(0.0, f64::from);
        let rate = match score {
            Score::Gradient => f.abs(),
            Score::Gri => ratio(f.abs(), r.abs(), eps),
            Score::Fila => ratio(f, r, eps),
            Score::Wagle => ((w - r / mu) * f).abs(),
            Score::Del => (w * f).abs(),
            Score::Random | Score::Activations | Score::Memflex => unreachable!("invariant: rated elsewhere"),
        };
        (rate as f32).to_bits()
    };
    (0..run.own.len()).map(rate).collect()
}

/// `a / (b + eps)`, and 0 where there is nothing at all.
fn ratio(a: f64, b: f64, eps: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / (b + eps) }
}

/// Rates of all groups of every tensor, the same on all ranks. All ranks call it.
pub fn of_groups(
    trainer: &mut Trainer,
    inputs: &Inputs,
    elements: &Elements,
    facts: &Facts,
    world: &World,
) -> Vec<Vec<f64>> {
    let unit = inputs.config.unit.unwrap_or_default();
    match inputs.config.score.expect("invariant: a score is asked for") {
        Score::Random => {
            let tensors = elements.tensors.iter().map(|tensor| {
                let stream = Stream::new(inputs.seed, &format!("mask of {}", tensor.name));
                let count = groups(tensor, unit);
                (0..count).map(|group| (stream.bits(group as u64) >> 11) as f64).collect()
            });
            tensors.collect()
        }
        Score::Activations => {
            let lengths = sums(elements, unit, world, |run, i| {
                let w = f64::from(slice::<f32>(&facts.weights[run.bucket])[run.own.start + i]);
                w * w
            });
            let means = gradient::activations(&trainer.decoder, &trainer.parameters.weights, inputs.forget, world);
            let rate = |(tensor, lengths): (&super::elements::Tensor, Vec<f64>)| {
                let layer = layer_of(&tensor.name).expect("invariant: a value vector belongs to a layer");
                lengths.iter().zip(&means[layer]).map(|(square, mean)| mean * square.sqrt()).collect()
            };
            elements.tensors.iter().zip(lengths).map(rate).collect()
        }
        Score::Memflex => memflex(inputs, elements, facts, unit, world),
        score @ (Score::Gri | Score::Fila) => {
            let size = |of: &[Tensor]| {
                sums(elements, unit, world, |run, i| {
                    let value = f64::from(slice::<f32>(&of[run.bucket])[run.own.start + i]);
                    if score == Score::Gri { value.abs() } else { value }
                })
            };
            let (forget, retain) = (size(&facts.forget), size(&facts.retain));
            let tensors = elements.tensors.iter().zip(forget.into_iter().zip(retain));
            let rates = tensors.map(|(tensor, (forget, retain))| {
                let eps = facts.eps * weights_in_group(tensor, unit) as f64;
                forget.into_iter().zip(retain).map(|(f, r)| ratio(f, r, eps)).collect()
            });
            rates.collect()
        }
        _ => {
            let rates = of_weights(inputs, facts, elements);
            let mut sums = zeros(elements, unit);
            for (run, keys) in elements.runs.iter().zip(&rates).filter(|(run, _)| run.counts) {
                each(&run.place, |at, row, column| {
                    sums[run.tensor][group(unit, row, column)] += f64::from(f32::from_bits(keys[at]));
                });
            }
            let mut sums = total(sums, world);
            for (tensor, sums) in elements.tensors.iter().zip(&mut sums) {
                sums.iter_mut().for_each(|sum| *sum /= weights_in_group(tensor, unit) as f64);
            }
            sums
        }
    }
}

/// Groups whose gradients point apart and are large, by their mean |g_f|; then the others by theirs.
fn memflex(inputs: &Inputs, elements: &Elements, facts: &Facts, unit: Unit, world: &World) -> Vec<Vec<f64>> {
    let pair = |run: &Run, i: usize| {
        let at = |of: &[Tensor]| f64::from(slice::<f32>(&of[run.bucket])[run.own.start + i]);
        (at(&facts.forget), at(&facts.retain))
    };
    let dot = sums(elements, unit, world, |run, i| pair(run, i).0 * pair(run, i).1);
    let forget = sums(elements, unit, world, |run, i| pair(run, i).0.powi(2));
    let retain = sums(elements, unit, world, |run, i| pair(run, i).1.powi(2));
    let size = sums(elements, unit, world, |run, i| pair(run, i).0.abs());
    let max_cosine = inputs.config.max_cosine.unwrap_or(config::Mask::MAX_COSINE);
    let min_gradient = inputs.config.min_gradient.unwrap_or(config::Mask::MIN_GRADIENT);
    let largest = size.iter().flatten().fold(0.0, |a: f64, &b| a.max(b));
    let rate = |tensor: usize, group: usize| {
        let mean = size[tensor][group] / weights_in_group(&elements.tensors[tensor], unit) as f64;
        let lengths = (forget[tensor][group] * retain[tensor][group]).sqrt();
        let cosine = if lengths > 0.0 { dot[tensor][group] / lengths } else { 0.0 };
        // candidates stand above all others
        if cosine < max_cosine && mean > min_gradient { mean + largest } else { mean }
    };
    (0..size.len()).map(|tensor| (0..size[tensor].len()).map(|group| rate(tensor, group)).collect()).collect()
}

/// Sums over the weights of each group, over all ranks. All ranks call it.
fn sums(elements: &Elements, unit: Unit, world: &World, value: impl Fn(&Run, usize) -> f64) -> Vec<Vec<f64>> {
    let mut sums = zeros(elements, unit);
    for run in elements.runs.iter().filter(|run| run.counts) {
        each(&run.place, |at, row, column| sums[run.tensor][group(unit, row, column)] += value(run, at));
    }
    total(sums, world)
}

fn zeros(elements: &Elements, unit: Unit) -> Vec<Vec<f64>> {
    elements.tensors.iter().map(|tensor| vec![0.0; groups(tensor, unit)]).collect()
}

fn total(sums: Vec<Vec<f64>>, world: &World) -> Vec<Vec<f64>> {
    let mut flat = sums.concat();
    Elements::sum(&mut flat, world);
    let mut rest = flat.as_slice();
    let cut = |sums: &Vec<f64>| {
        let (part, others) = rest.split_at(sums.len());
        rest = others;
        part.to_vec()
    };
    sums.iter().map(cut).collect()
}

/// Groups of a tensor.
pub fn groups(tensor: &super::elements::Tensor, unit: Unit) -> usize {
    match unit {
        Unit::Weight => tensor.rows * tensor.columns,
        Unit::Row => tensor.rows,
        Unit::Column => tensor.columns,
        Unit::Tensor => 1,
    }
}

pub fn weights_in_group(tensor: &super::elements::Tensor, unit: Unit) -> usize {
    tensor.rows * tensor.columns / groups(tensor, unit).max(1)
}

/// The group of a weight.
pub fn group(unit: Unit, row: usize, column: usize) -> usize {
    match unit {
        Unit::Row => row,
        Unit::Column => column,
        Unit::Tensor => 0,
        Unit::Weight => unreachable!("invariant: a weight is no group"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Dataset;
    use crate::model::architecture::Packing;
    use crate::model::sharding::Table;
    use crate::model::sharding::tests::arch;
    use crate::train::Layout;

    /// GRIN's rate with its eps: both losses scaled by the same factor rate every weight as before, because eps is a percentile of |g_r|;
    /// with a fixed eps they do not.
    #[test]
    fn gri_does_not_see_the_scale_of_the_losses() {
        let world = World::solo();
        let table = Table::new(&arch(Packing::Separate, true), 1, 0, false).unwrap();
        let layout = Layout::new(&table, usize::MAX, 1, 0);
        let names: Vec<String> = table.tensors().into_iter().map(|(name, _)| name.to_owned()).collect();
        let names: Vec<String> = names.into_iter().filter(|name| name.contains("_proj.weight")).collect();
        let elements = Elements::new(&table, &layout, &names, &world);
        let drawn = |name: &str, scale: f64| -> Vec<Tensor> {
            let stream = Stream::new(1, name);
            let bucket = |(index, own): (usize, usize)| {
                let first = (index as u64) << 32;
                let values: Vec<f32> = (0..own as u64).map(|i| (scale * stream.normal(first + i)) as f32).collect();
                Tensor::from_slice(&values)
            };
            layout.buckets.iter().map(|bucket| bucket.own.len()).enumerate().map(bucket).collect()
        };
        let set = Dataset::from_samples("x", Vec::new());
        let look = Look { name: "x", set: &set, samples: 0, seed: 0, budget: 0 };
        let rated = |scale: f64, eps: Option<f64>| {
            let config: config::Mask = serde_json::from_value(serde_json::json!({ "score": "gri" })).unwrap();
            let inputs = Inputs { config: &config, forget: look, retain: Some(look), seed: 0, batch: 1 };
            let (forget, retain) = (drawn("f", scale), drawn("r", scale));
            let mut facts = Facts { forget, retain, weights: drawn("w", 1.0), eps: 0.0 };
            facts.eps = eps.unwrap_or_else(|| facts.low_gradient(&elements, &world));
            (of_weights(&inputs, &facts, &elements), facts.eps)
        };
        let (keys, eps) = rated(1.0, None);
        // 5 % of a standard normal lie within 0.0627 of 0
        assert!((eps - 0.0627).abs() < 0.03, "{eps}");
        // a power of two changes no rounding
        let (scaled, larger) = rated(64.0, None);
        assert!(scaled == keys && larger == 64.0 * eps);
        assert!(rated(64.0, Some(eps)).0 != keys, "a fixed eps rates otherwise");
    }
}
