//! One optimizer step, readable from top to bottom: [`Trainer::step`].

use std::time::Instant;

use tch::{Kind, Tensor};
use thiserror::Error;

use super::batches::StepWork;
use super::gradients::GradientBuffers;
use super::objective::{Objective, Tokens};
use super::optimizer::Optimizer;
use super::parameters::Parameters;
use super::schedule::Schedule;
use crate::data::{MicroBatch, Stream};
use crate::dist::{Reduce, World};
use crate::kernels::reduce::sum_of_squares;
use crate::model::{Decoder, Gradients, Keep, ReferenceHead, Rows};
use crate::telemetry::Part;

/// What is minimised.
pub struct Method {
    /// On forget samples, or on the samples to train on.
    pub forget: Box<dyn Objective>,
    pub forget_weight: f64,
    pub retain: Retain,
    pub retain_weight: f64,
}

/// What holds the model on the retain samples.
pub enum Retain {
    None,
    Likelihood(Box<dyn Objective>),
    /// KL(reference || model), summed over rows and divided by `Totals::tokens`.
    Divergence,
}

/// What the model before training says of the samples.
pub trait Reference {
    /// Log-probabilities of the scored tokens of a forget sample.
    fn logprobs(&self, sample: usize) -> &[f32];
    /// The head of the reference model; asked for only with [`Retain::Divergence`].
    fn head(&self) -> &ReferenceHead;
    /// Rows of a retain sample after the reference's final norm, `[tokens, hidden]` in the model's kind.
    fn rows(&self, sample: usize) -> Tensor;
}

/// Numbers that stay the same for a whole run.
#[derive(Clone, Copy, Debug)]
pub struct TrainerOptions {
    pub keep: Keep,
    /// Memory for one chunk of logits. Unit: bytes.
    pub logits_bytes: f64,
    /// 0 turns clipping off.
    pub max_grad_norm: f64,
}

/// Model, optimizer and method of one rank.
pub struct Trainer {
    pub decoder: Decoder,
    pub parameters: Parameters,
    pub gradients: GradientBuffers,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub method: Method,
    pub options: TrainerOptions,
}

/// What one step did; the same on every rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    pub losses: Losses,
    /// What the forget objective tells, see [`Objective::numbers`].
    pub numbers: Vec<f64>,
    pub grad_norm: f64,
    pub lr: f64,
    /// Unit: seconds on this rank.
    pub seconds: f64,
}

/// Loss of a step and its parts, unweighted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    pub total: f64,
    pub forget: f64,
    pub retain: f64,
}

/// A loss or gradient that is no number: the run cannot go on.
#[derive(Debug, Error)]
#[error(
    "step {step}: {what}; lower optimizer.lr, set optimizer.max_grad_norm, or stop earlier (gradient ascent has no lower bound)"
)]
pub struct NonFinite {
    pub step: usize,
    pub what: String,
}

impl Trainer {
    /// One optimizer step. All ranks call it with the same step and their own share of its work.
    ///
    /// # Errors
    /// On every rank when a loss or gradient on any rank is not finite, before anything is changed.
    pub fn step(
        &mut self,
        step: usize,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> Result<StepReport, NonFinite> {
        let start = Instant::now();
        let (losses, numbers) = self.accumulate(work, reference, world);
        let reduced = self.gradients.finish();
        let norm = reduced.norm;
        if !(losses.total.is_finite() && norm.is_finite()) {
            return Err(self.explain(step, losses, norm, work, reference, world));
        }
        let max = self.options.max_grad_norm;
        let scale = if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let lr = self.schedule.lr(step);
        self.decoder.clock.time(Part::Optimizer, || {
            self.optimizer.step(&self.decoder.table, &mut self.parameters, &reduced.own, scale, lr);
            for bucket in (0..self.parameters.layout.buckets.len()).rev() {
                self.parameters.publish(bucket, &world.dp);
            }
        });
        Ok(StepReport { losses, numbers, grad_norm: norm, lr, seconds: start.elapsed().as_secs_f64() })
    }

    /// Forward and backward of all micro-batches; gives the losses and the objective's numbers of the whole step.
    pub fn accumulate(
        &mut self,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> (Losses, Vec<f64>) {
        self.gradients.begin();
        let mut sums = vec![0.0; 2 + self.method.forget.numbers().len()];
        for (index, micro_batch) in work.micro_batches.iter().enumerate() {
            if index + 1 == work.micro_batches.len() {
                self.gradients.last_micro_batch();
            }
            let parts = self.micro_batch(micro_batch, work, reference);
            for (sum, part) in sums.iter_mut().zip(parts.losses.into_iter().chain(parts.numbers)) {
                *sum += part;
            }
        }
        self.gradients.start_all();
        world.dp.all_reduce_f64(&mut sums, Reduce::Sum);
        let Method { forget_weight, retain_weight, .. } = self.method;
        let total = forget_weight * sums[0] + retain_weight * sums[1];
        (Losses { total, forget: sums[0], retain: sums[1] }, sums.split_off(2))
    }

    /// One micro-batch: forward, pass 1 of the head, weights from the objectives, pass 2, backward.
    fn micro_batch(&mut self, micro_batch: &MicroBatch, work: &StepWork, reference: Option<&dyn Reference>) -> Parts {
        let Self { decoder, parameters, gradients, method, options, .. } = self;
        let (weights, device) = (&parameters.weights, decoder.device);
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let (hidden, tape) = decoder.forward(weights, &batch, options.keep);
        let positions = Tensor::from_slice(&micro_batch.positions).to_device(device);
        let mut d_hidden = hidden.zeros_like();
        let mut told = Parts::default();
        decoder.clock.time(Part::Head, || {
            let (labelled, divergent) = match method.retain {
                Retain::Divergence => {
                    (micro_batch.rows(Stream::Forget).len() as i64, Some(micro_batch.rows(Stream::Retain)))
                }
                _ => (positions.size()[0], None),
            };
            if labelled > 0 {
                let at = positions.narrow(0, 0, labelled);
                let rows = decoder.rows(weights, &hidden, &at, options.logits_bytes);
                let targets = Tensor::from_slice(&micro_batch.targets[..labelled as usize]).to_device(device);
                let scores = decoder.scores(weights, &rows, &targets, true);
                let (parts, weight) = likelihood(method, micro_batch, work, &scores.logprob, reference);
                told = parts;
                let grad = decoder.scores_backward(weights, &rows, scores, &weight, gradients);
                let _ = d_hidden.index_copy_(0, &at, &grad);
            }
            if let Some(range) = divergent.filter(|range| !range.is_empty()) {
                let reference = reference.expect("invariant: a divergence has a reference");
                let at = positions.narrow(0, range.start as i64, range.len() as i64);
                let rows = decoder.rows(weights, &hidden, &at, options.logits_bytes);
                let factor = method.retain_weight / work.retain.tokens;
                let (kl, grad) = divergence(decoder, weights, &rows, micro_batch, reference, factor, gradients);
                told.losses[1] = kl / work.retain.tokens;
                let _ = d_hidden.index_copy_(0, &at, &grad);
            }
        });
        drop(hidden);
        gradients.complete(decoder.table.num_units() - 1);
        decoder.backward(weights, &batch, tape, d_hidden, gradients);
        told
    }

    /// Whether the weights after the last step are numbers; a step notices only those of the step before.
    ///
    /// # Errors
    /// On every rank when a weight on any rank is not finite. All ranks call it.
    pub fn check_weights(&self, steps: usize, world: &World) -> Result<(), NonFinite> {
        let bad = self.parameters.masters.iter().any(|own| !sum_of_squares(own).is_finite());
        let mut ranks = [f64::from(u8::from(bad))];
        world.world.all_reduce_f64(&mut ranks, Reduce::Sum);
        if ranks[0] == 0.0 {
            return Ok(());
        }
        Err(NonFinite { step: steps, what: format!("weights on {} ranks are no numbers", ranks[0]) })
    }

    /// Says which rank and which tensor brought the first number that is none. All ranks call it.
    ///
    /// The sums over the ranks have mixed the gradients, so each rank computes its own once more and keeps them.
    fn explain(
        &mut self,
        step: usize,
        losses: Losses,
        norm: f64,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> NonFinite {
        self.gradients.begin();
        for micro_batch in &work.micro_batches {
            self.micro_batch(micro_batch, work, reference);
        }
        let mine = self.gradients.find_non_finite().unwrap_or_default();
        let found = world.world.gather_bytes(mine.as_bytes());
        let culprit = found.iter().enumerate().find(|(_, name)| !name.is_empty());
        let place = culprit.map_or_else(String::new, |(rank, name)| {
            format!(", first seen on rank {rank} in the gradient of {}", String::from_utf8_lossy(name))
        });
        let what = format!(
            "loss {} (forget {}, retain {}), gradient norm {norm}{place}",
            losses.total, losses.forget, losses.retain
        );
        NonFinite { step: step + 1, what }
    }
}

/// One micro-batch's parts of what a step tells.
#[derive(Default)]
struct Parts {
    /// Of the forget and the retain loss.
    losses: [f64; 2],
    /// Of the forget objective's numbers; empty without forget samples.
    numbers: Vec<f64>,
}

/// Losses and per-row weights of the likelihood terms of one micro-batch.
fn likelihood(
    method: &Method,
    micro_batch: &MicroBatch,
    work: &StepWork,
    logprob: &Tensor,
    reference: Option<&dyn Reference>,
) -> (Parts, Tensor) {
    let weight = logprob.zeros_like();
    let mut told = Parts::default();
    let retain = match &method.retain {
        Retain::Likelihood(objective) => Some((objective, method.retain_weight, work.retain)),
        _ => None,
    };
    let forget = Some((&method.forget, method.forget_weight, work.forget));
    for (index, (stream, term)) in [(Stream::Forget, forget), (Stream::Retain, retain)].into_iter().enumerate() {
        let range = micro_batch.rows(stream);
        let Some((objective, factor, totals)) = term.filter(|_| !range.is_empty()) else {
            continue;
        };
        let sequences = micro_batch.sequences.iter().filter(|sequence| sequence.stream == stream);
        let part = |t: &Tensor| t.narrow(0, range.start as i64, range.len() as i64);
        let term = {
            let mut owner = Vec::with_capacity(range.len());
            let mut before = Vec::new();
            let mut num_sequences = 0;
            for sequence in sequences {
                owner.resize(owner.len() + sequence.rows.len(), num_sequences);
                num_sequences += 1;
                if objective.needs_reference() {
                    let reference = reference.expect("invariant: the objective was given its reference");
                    before.extend_from_slice(reference.logprobs(sequence.sample));
                }
            }
            let owner = Tensor::from_slice(&owner).to_device(logprob.device());
            let before = objective.needs_reference().then(|| Tensor::from_slice(&before).to_device(logprob.device()));
            let logprob = part(logprob);
            objective.term(&Tokens {
                logprob: &logprob,
                reference: before.as_ref(),
                sequence: &owner,
                num_sequences,
                totals,
            })
        };
        told.losses[index] = f64::try_from(&term.loss).expect("invariant: a loss is one number");
        if stream == Stream::Forget {
            told.numbers = term.numbers;
        }
        part(&weight).copy_(&(term.weight * factor));
    }
    (told, weight)
}

/// Sum of KL(reference || model) over the rows, and the gradient of the rows for dloss/dkl = `factor`.
fn divergence(
    decoder: &Decoder,
    weights: &crate::model::Weights,
    rows: &Rows,
    micro_batch: &MicroBatch,
    reference: &dyn Reference,
    factor: f64,
    sink: &mut dyn Gradients,
) -> (f64, Tensor) {
    let retain = micro_batch.sequences.iter().filter(|sequence| sequence.stream == Stream::Retain);
    let before: Vec<Tensor> = retain.map(|sequence| reference.rows(sequence.sample)).collect();
    let before = Tensor::cat(&before, 0);
    let divergence = decoder.divergence(weights, rows, reference.head(), &before);
    let kl = f64::try_from(divergence.kl.sum(Kind::Double)).expect("invariant: a sum is one number");
    let weight = Tensor::full([rows.len()], factor, (Kind::Float, decoder.device));
    let grad = decoder.divergence_backward(weights, rows, divergence, reference.head(), &before, &weight, sink);
    (kl, grad)
}
