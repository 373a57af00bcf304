//! One optimizer step, readable from top to bottom: [`Trainer::step`].

use std::time::Instant;

use tch::{Kind, Tensor};
use thiserror::Error;

use super::batches::StepWork;
use super::gradients::GradientBuffers;
use super::objective::{Objective, Tokens};
use super::optimizer::{Optimizer, Update};
use super::parameters::Parameters;
use super::schedule::Schedule;
use crate::abi::slices::slice;
use crate::abi::upload::upload;
use crate::data::{MicroBatch, Stream};
use crate::dist::{Reduce, World};
use crate::kernels::reduce::sum_of_squares;
use crate::model::sharding::ParamId;
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
    /// Step each bucket as soon as its sum is there, while backward still runs, and free it. The norm of the whole gradient is not
    /// known then: each half block is clipped by its own.
    pub in_backward: bool,
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
    /// `[1]` f32 on the device: 1 once a loss or gradient was no number. From then on nothing changes any more, whenever the host
    /// comes to know.
    pub broken: Tensor,
}

/// A step that was started; its numbers may still be on their way.
#[must_use = "the numbers of a step say whether the run can go on"]
pub struct Launched {
    step: usize,
    lr: f64,
    start: Instant,
    /// Forget loss, retain loss, the objective's numbers, gradient norm: f64 on the device.
    numbers: Tensor,
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
    /// [`Trainer::broken`] of a run that begins.
    pub fn whole(device: tch::Device) -> Tensor {
        Tensor::zeros([1], (Kind::Float, device))
    }

    /// One optimizer step. All ranks call it with the same step and their own share of its work.
    ///
    /// # Errors
    /// On every rank when a loss or gradient on any rank is not finite; the weights are then what they were before.
    pub fn step(
        &mut self,
        step: usize,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> Result<StepReport, NonFinite> {
        let launched = self.launch(step, work, reference, world);
        self.read(launched, work, reference, world)
    }

    /// Starts a step. On a GPU it returns while the device still works; nothing here waits for it.
    pub fn launch(
        &mut self,
        step: usize,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> Launched {
        let start = Instant::now();
        let lr = self.schedule.lr(step);
        self.optimizer.begin();
        let mut early = Early { lr, squares: Vec::new() };
        let sums = self.accumulate_with(work, reference, world, self.options.in_backward.then_some(&mut early));
        let norm = if self.options.in_backward {
            let Self { decoder, parameters, gradients, optimizer, options, broken, .. } = self;
            decoder.clock.time(Part::Optimizer, || {
                early.take(parameters, gradients, optimizer, options, broken, world, true);
            });
            early.squares.iter().fold(sums.new_zeros([1], (Kind::Double, sums.device())), |a, b| a + b).sqrt()
        } else {
            let reduced = self.gradients.finish();
            let Self { decoder, parameters, optimizer, options, broken, .. } = self;
            decoder.clock.time(Part::Optimizer, || {
                let norm = reduced.norm.view([1]);
                note_broken(broken, &(sums.sum(Kind::Double) + &norm));
                let scale = clip(&norm, options.max_grad_norm);
                let update = Update { lr, scale: &|_| scale.shallow_clone(), skip: broken };
                for (bucket, grad) in reduced.own.iter().enumerate() {
                    optimizer.update(parameters, bucket, grad, &update);
                }
                for bucket in (0..parameters.layout.buckets.len()).rev() {
                    parameters.gather(bucket, &world.dp);
                }
                norm
            })
        };
        Launched { step, lr, start, numbers: Tensor::cat(&[sums, norm], 0) }
    }

    /// Waits for the numbers of a step. All ranks call it in the order of their steps, with what the step was started with.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn read(
        &mut self,
        launched: Launched,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> Result<StepReport, NonFinite> {
        let Launched { step, lr, start, numbers } = launched;
        let on_host = world.watchdog.watch_device(step + 1, || numbers.to_device(tch::Device::Cpu));
        let all = slice::<f64>(&on_host);
        let (losses, norm) = (self.losses(all), all[all.len() - 1]);
        if !(losses.total.is_finite() && norm.is_finite()) {
            return Err(self.explain(step, losses, norm, work, reference, world));
        }
        let numbers = all[2..all.len() - 1].to_vec();
        Ok(StepReport { losses, numbers, grad_norm: norm, lr, seconds: start.elapsed().as_secs_f64() })
    }

    fn losses(&self, sums: &[f64]) -> Losses {
        let Method { forget_weight, retain_weight, .. } = self.method;
        let total = forget_weight * sums[0] + retain_weight * sums[1];
        Losses { total, forget: sums[0], retain: sums[1] }
    }

    /// Forward and backward of all micro-batches; gives the losses and the objective's numbers of the whole step.
    pub fn accumulate(
        &mut self,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
    ) -> (Losses, Vec<f64>) {
        let sums = self.accumulate_with(work, reference, world, None).to_device(tch::Device::Cpu);
        let sums = slice::<f64>(&sums);
        (self.losses(sums), sums[2..].to_vec())
    }

    /// As [`Self::accumulate`]; the numbers stay on the device, f64. With `early`, buckets are stepped as they become complete.
    fn accumulate_with(
        &mut self,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
        mut early: Option<&mut Early>,
    ) -> Tensor {
        self.gradients.begin();
        let len = 2 + self.method.forget.numbers().len();
        let mut sums = Tensor::zeros([len as i64], (Kind::Double, self.decoder.device));
        for (index, micro_batch) in work.micro_batches.iter().enumerate() {
            let last = index + 1 == work.micro_batches.len();
            if last {
                self.gradients.last_micro_batch();
            }
            let early = early.as_deref_mut().filter(|_| last);
            for (at, part) in self.micro_batch(micro_batch, work, reference, world, early).into_iter().enumerate() {
                let _ = sums.narrow(0, at as i64, 1).g_add_(&part);
            }
        }
        match early {
            Some(early) => {
                let Self { parameters, gradients, optimizer, options, broken, .. } = self;
                while gradients.start_one(0) {
                    early.take(parameters, gradients, optimizer, options, broken, world, false);
                }
            }
            None => self.gradients.start_all(),
        }
        world.dp.all_reduce(&mut sums, Reduce::Sum);
        sums
    }

    /// One micro-batch: forward, pass 1 of the head, weights from the objectives, pass 2, backward. Gives its parts of the losses
    /// and of the objective's numbers.
    fn micro_batch(
        &mut self,
        micro_batch: &MicroBatch,
        work: &StepWork,
        reference: Option<&dyn Reference>,
        world: &World,
        early: Option<&mut Early>,
    ) -> Vec<Tensor> {
        let Self { decoder, parameters, gradients, optimizer, method, options, broken, .. } = self;
        let (weights, device) = (&parameters.weights, decoder.device);
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let (hidden, tape) = decoder.forward(weights, &batch, options.keep);
        let positions = upload(&micro_batch.positions, device);
        let mut d_hidden = hidden.zeros_like();
        let zero = || Tensor::zeros([], (Kind::Double, device));
        let mut told = vec![zero(), zero()];
        let mut sink = Walk { gradients, early, optimizer, parameters, options, broken, world };
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
                let targets = upload(&micro_batch.targets[..labelled as usize], device);
                let scores = decoder.scores(weights, &rows, &targets, true);
                let (parts, weight) = likelihood(method, micro_batch, work, &scores.logprob, reference);
                told = parts;
                let grad = decoder.scores_backward(weights, &rows, scores, &weight, &mut sink);
                let _ = d_hidden.index_copy_(0, &at, &grad);
            }
            if let Some(range) = divergent.filter(|range| !range.is_empty()) {
                let reference = reference.expect("invariant: a divergence has a reference");
                let at = positions.narrow(0, range.start as i64, range.len() as i64);
                let rows = decoder.rows(weights, &hidden, &at, options.logits_bytes);
                let factor = method.retain_weight / work.retain.tokens;
                let (kl, grad) = divergence(decoder, weights, &rows, micro_batch, reference, factor, &mut sink);
                told[1] = kl / work.retain.tokens;
                let _ = d_hidden.index_copy_(0, &at, &grad);
            }
        });
        drop(hidden);
        sink.complete(decoder.table.num_units() - 1);
        decoder.backward(weights, &batch, tape, d_hidden, &mut sink);
        told
    }

    /// Whether the weights after the last step are numbers; a step notices only those of the step before.
    ///
    /// # Errors
    /// On every rank when a weight on any rank is not finite. All ranks call it.
    pub fn check_weights(&self, steps: usize, world: &World) -> Result<(), NonFinite> {
        let finite = |own: &Tensor| sum_of_squares(own).double_value(&[0]).is_finite();
        let bad = !self.parameters.masters.iter().all(finite);
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
            let _ = self.micro_batch(micro_batch, work, reference, world, None);
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

/// Steps buckets while backward still runs.
struct Early {
    lr: f64,
    /// Squared norms of the buckets so far.
    squares: Vec<Tensor>,
}

impl Early {
    /// Steps the buckets whose sums have ended (with `all`, those under way too), publishes and frees them.
    #[expect(clippy::too_many_arguments, reason = "the parts of a trainer that are not lent out")]
    fn take(
        &mut self,
        parameters: &Parameters,
        gradients: &mut GradientBuffers,
        optimizer: &mut Optimizer,
        options: &TrainerOptions,
        broken: &mut Tensor,
        world: &World,
        all: bool,
    ) {
        while let Some((bucket, grad)) = gradients.next_summed(all) {
            let (units, squares) = gradients.unit_norms(bucket, &grad);
            self.squares.push(squares.sum(Kind::Double).view([1]));
            note_broken(broken, &squares.sum(Kind::Double));
            let scales = clip(&squares.sqrt(), options.max_grad_norm);
            let scale = |unit: usize| {
                let at = units.iter().position(|&other| other == unit).expect("invariant: units of the bucket");
                scales.narrow(0, at as i64, 1)
            };
            optimizer.update(parameters, bucket, &grad, &Update { lr: self.lr, scale: &scale, skip: broken });
            parameters.gather(bucket, &world.dp);
        }
    }
}

/// Takes the gradients of a walk and, where buckets are stepped early, steps them.
struct Walk<'a> {
    gradients: &'a mut GradientBuffers,
    early: Option<&'a mut Early>,
    optimizer: &'a mut Optimizer,
    parameters: &'a Parameters,
    options: &'a TrainerOptions,
    broken: &'a mut Tensor,
    world: &'a World,
}

impl Gradients for Walk<'_> {
    fn product(&mut self, param: ParamId, dy: &Tensor, x: &Tensor) {
        self.gradients.product(param, dy, x);
    }

    fn vector(&mut self, param: ParamId, grad: &Tensor) {
        self.gradients.vector(param, grad);
    }

    fn rows(&mut self, param: ParamId, rows: &Tensor, grad: &Tensor) {
        self.gradients.rows(param, rows, grad);
    }

    fn complete(&mut self, unit: usize) {
        let Self { gradients, early, optimizer, parameters, options, broken, world } = self;
        let Some(early) = early else { return gradients.complete(unit) };
        world.dp.progress();
        while gradients.start_one(unit) {
            early.take(parameters, gradients, optimizer, options, broken, world, false);
        }
    }
}

/// Factor that brings a norm down to `max`, 1 where it is shorter or `max` is 0: f32, of the shape of `norm`.
fn clip(norm: &Tensor, max: f64) -> Tensor {
    if max > 0.0 {
        ((norm + 1e-6).reciprocal() * max).clamp_max(1.0).to_kind(Kind::Float)
    } else {
        norm.ones_like().to_kind(Kind::Float)
    }
}

/// Sets the mark when `number` is none.
fn note_broken(broken: &mut Tensor, number: &Tensor) {
    let bad = number.isfinite().logical_not().to_kind(Kind::Float).view([1]);
    broken.copy_(&broken.maximum(&bad));
}

/// Losses and per-row weights of the likelihood terms of one micro-batch.
fn likelihood(
    method: &Method,
    micro_batch: &MicroBatch,
    work: &StepWork,
    logprob: &Tensor,
    reference: Option<&dyn Reference>,
) -> (Vec<Tensor>, Tensor) {
    let weight = logprob.zeros_like();
    let zero = || Tensor::zeros([], (Kind::Double, logprob.device()));
    let mut told = vec![zero(), zero()];
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
            let owner = upload(&owner, logprob.device());
            let before = objective.needs_reference().then(|| upload(&before, logprob.device()));
            let logprob = part(logprob);
            objective.term(&Tokens {
                logprob: &logprob,
                reference: before.as_ref(),
                sequence: &owner,
                num_sequences,
                totals,
            })
        };
        told[index] = term.loss.to_kind(Kind::Double);
        if stream == Stream::Forget {
            told.extend(term.numbers);
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
) -> (Tensor, Tensor) {
    let retain = micro_batch.sequences.iter().filter(|sequence| sequence.stream == Stream::Retain);
    let before: Vec<Tensor> = retain.map(|sequence| reference.rows(sequence.sample)).collect();
    let before = Tensor::cat(&before, 0);
    let divergence = decoder.divergence(weights, rows, reference.head(), &before);
    let kl = divergence.kl.sum(Kind::Double);
    let weight = Tensor::full([rows.len()], factor, (Kind::Float, decoder.device));
    let grad = decoder.divergence_backward(weights, rows, divergence, reference.head(), &before, &weight, sink);
    (kl, grad)
}
