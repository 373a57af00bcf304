//! Gradients of the likelihood over whole sets, and what else a score reads off the model: sums that every layout agrees on.

use tch::{Device, Kind, Tensor};

use super::ScopeError;
use crate::abi::upload::upload;
use crate::data::{Dataset, Order, Stream, Texts};
use crate::dist::World;
use crate::model::{Decoder, Keep, Weights};
use crate::train::{Batches, Cuts, Forget, Method, Retain, StepWork, Trainer};
use crate::unlearn::NegativeLogLikelihood;

/// A set of samples and how many of them are looked at, in how large steps.
#[derive(Clone, Copy)]
pub struct Look<'a> {
    /// For errors.
    pub name: &'a str,
    pub set: &'a Dataset,
    /// Of all samples, so many, drawn from the seed; all where there are no more.
    pub samples: usize,
    pub seed: u64,
    /// Tokens of one micro-batch.
    pub budget: usize,
}

/// Runs `look` on a trainer that minimises the mean negative log-likelihood and changes nothing.
fn with_likelihood<T>(trainer: &mut Trainer, look: impl FnOnce(&mut Trainer) -> T) -> T {
    let method = std::mem::replace(&mut trainer.method, likelihood());
    let out = look(trainer);
    trainer.method = method;
    out
}

fn likelihood() -> Method {
    Method::new(Forget::Likelihood(Box::new(NegativeLogLikelihood { texts: Texts::Answer })), Retain::None)
}

/// The gradient of the mean negative log-likelihood over all scored tokens: this rank's own part of each bucket, f32 on the host.
/// All ranks call it.
///
/// # Errors
/// On all ranks, a gradient that is no number.
pub fn mean(trainer: &mut Trainer, look: Look, world: &World) -> Result<Vec<Tensor>, ScopeError> {
    let works = works(look, look.samples.min(look.set.samples.len()));
    Ok(gradient(trainer, look, &works(0, world), world)?.0)
}

/// The mean over batches of `batch` samples of the squared gradient of the batch's mean negative log-likelihood, each batch weighted by its scored
/// tokens (FILA, arXiv 2408.06621, as the authors' code). Else as [`mean`].
pub fn mean_square(trainer: &mut Trainer, look: Look, batch: usize, world: &World) -> Result<Vec<Tensor>, ScopeError> {
    let samples = look.samples.min(look.set.samples.len());
    let works = works(look, batch);
    let (mut sums, mut all) = (Vec::<Tensor>::new(), 0.0);
    for step in 0..samples.div_ceil(batch) {
        let (gradient, tokens) = gradient(trainer, look, &works(step, world), world)?;
        let squares = gradient.into_iter().map(|gradient| gradient.square() * tokens);
        sums = if sums.is_empty() {
            squares.collect()
        } else {
            sums.into_iter().zip(squares).map(|(a, b)| a + b).collect()
        };
        all += tokens;
    }
    Ok(sums.into_iter().map(|sum| sum / all).collect())
}

/// Steps of `batch` samples, in an order drawn from the seed.
fn works<'a>(look: Look<'a>, batch: usize) -> impl Fn(usize, &World) -> StepWork + 'a {
    let shuffle = look.samples < look.set.samples.len();
    let batches = Batches {
        order: Order::new(look.seed, shuffle, look.set.samples.len(), 0, batch),
        anchors: look.set,
        retain: None,
        cuts: Cuts::of(&likelihood(), false),
        budget: look.budget,
    };
    move |step, world| batches.step(step, world.mesh)
}

/// One step's gradient, and its scored tokens.
fn gradient(
    trainer: &mut Trainer,
    look: Look,
    work: &StepWork,
    world: &World,
) -> Result<(Vec<Tensor>, f64), ScopeError> {
    let reduced = with_likelihood(trainer, |trainer| {
        let _ = trainer.accumulate(work, None, world);
        trainer.gradients.finish()
    });
    if !reduced.norm.double_value(&[]).is_finite() {
        return Err(ScopeError::Score(format!(
            "the gradient of the likelihood of {} is no number; are the weights?",
            look.name
        )));
    }
    let host = |own: &Tensor| own.to_kind(Kind::Float).to_device(Device::Cpu).copy();
    Ok((reduced.own.iter().map(host).collect(), work.forget.tokens))
}

/// Mean over scored tokens of the absolute activation of each MLP unit: one tensor `[width]` f64 a layer, on every rank.
/// All ranks call it.
pub fn activations(decoder: &Decoder, weights: &Weights, look: Look, world: &World) -> Vec<Vec<f64>> {
    let works = works(look, look.samples.min(look.set.samples.len()));
    let work = works(0, world);
    let layers = decoder.arch.num_layers;
    let width = decoder.arch.intermediate as usize / decoder.tp.size();
    let first = decoder.tp.rank() * width;
    let mut sums = vec![vec![0.0; decoder.arch.intermediate as usize]; layers];
    for micro_batch in &work.micro_batches {
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let rows = micro_batch.rows(Stream::Forget);
        let rows = upload(&micro_batch.positions[rows], decoder.device);
        let (_, tape) = decoder.forward(weights, &batch, Keep::Inputs);
        for (layer, sums) in sums.iter_mut().enumerate() {
            let activation = decoder.mlp_activation(weights, layer, &tape);
            let sum = activation.index_select(0, &rows).abs().sum_dim_intlist(0i64, false, Kind::Double);
            let sum = Vec::<f64>::try_from(sum.to_device(Device::Cpu)).expect("invariant: a vector of f64");
            sums[first..first + width].iter_mut().zip(sum).for_each(|(all, part)| *all += part);
        }
    }
    let tokens = work.forget.tokens;
    for sums in &mut sums {
        world.world.all_reduce_f64(sums, crate::dist::Reduce::Sum);
        sums.iter_mut().for_each(|sum| *sum /= tokens);
    }
    sums
}
