//! One optimizer step, readable from top to bottom: [`Trainer::step`].

use std::ops::Range;
use std::time::Instant;

use tch::{Kind, Tensor};
use thiserror::Error;

use super::batches::StepWork;
use super::gradients::GradientBuffers;
use super::method::{Method, Reference};
use super::optimizer::{Optimizer, Update};
use super::parameters::Parameters;
use super::schedule::Schedule;
use super::terms::{Look, Told};
use crate::abi::slices::slice;
use crate::abi::upload::upload;
use crate::data::{MicroBatch, Stream, Text};
use crate::dist::{Reduce, World};
use crate::kernels::reduce::sum_of_squares;
use crate::model::sharding::ParamId;
use crate::model::{Batch, Decoder, Gradients, Keep, Tape};
use crate::telemetry::Part;

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
    /// Collectives before this one belong to it or to steps before.
    calls: u64,
}

/// What one step did; the same on every rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    pub losses: Losses,
    /// What the method tells, see [`Method::numbers`].
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
        Launched { step, lr, start, numbers: Tensor::cat(&[sums, norm], 0), calls: world.watchdog.next_call() }
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
        let Launched { step, lr, start, numbers, calls } = launched;
        let on_host = world.watchdog.watch_device(step + 1, calls, || numbers.to_device(tch::Device::Cpu));
        let all = slice::<f64>(&on_host);
        let (losses, norm) = (self.losses(all), all[all.len() - 1]);
        if !(losses.total.is_finite() && norm.is_finite()) {
            return Err(self.explain(step, losses, norm, work, reference, world));
        }
        let numbers = all[2..all.len() - 1].to_vec();
        self.method.after(step, &losses);
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
        let looked = self.look(work, reference, world);
        let len = 2 + self.method.numbers().len();
        let mut sums = Tensor::zeros([len as i64], (Kind::Double, self.decoder.device));
        for (index, micro_batch) in work.micro_batches.iter().enumerate() {
            let last = index + 1 == work.micro_batches.len();
            if last {
                self.gradients.last_micro_batch();
            }
            let early = early.as_deref_mut().filter(|_| last);
            let at = Place { micro_batch, work, reference, looked: looked.as_ref() };
            let told = self.micro_batch(&at, world, early);
            for (at, part) in told.losses.iter().chain(&told.numbers).enumerate() {
                let _ = sums.narrow(0, at as i64, 1).g_add_(part);
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

    /// What an objective must know of the whole step before it can say anything: a pass without backward over the samples that it
    /// names, summed over the ranks. All ranks call it.
    fn look(&self, work: &StepWork, reference: Option<&dyn Reference>, world: &World) -> Option<Tensor> {
        self.method.looks_at()?;
        let objective = self.method.objective(Stream::Forget).expect("invariant: it looks");
        let Self { decoder, parameters, options, .. } = self;
        let mut sums: Option<Tensor> = None;
        for micro_batch in &work.looks {
            let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
            let (hidden, _) = decoder.forward(&parameters.weights, &batch, Keep::Nothing);
            let at = upload(&micro_batch.positions, decoder.device);
            let rows = decoder.rows(&parameters.weights, &hidden, &at, options.logits_bytes);
            let targets = upload(&micro_batch.targets, decoder.device);
            let logprob = decoder.scores(&parameters.weights, &rows, &targets, false).logprob;
            let look = Look { method: &self.method, micro_batch, work, reference, looked: None };
            let part =
                look.with_tokens(Stream::Forget, &logprob, work.forget, |tokens| objective.look(tokens), objective);
            sums = Some(sums.map_or_else(|| part.shallow_clone(), |sums| sums + &part));
        }
        let zeros = || Tensor::zeros([objective.num_looked()], (Kind::Double, decoder.device));
        let mut sums = sums.unwrap_or_else(zeros);
        world.dp.all_reduce(&mut sums, Reduce::Sum);
        Some(sums)
    }

    /// One micro-batch: forward, pass 1 of the head, weights from the objectives, pass 2, backward. Gives its parts of the losses
    /// and of the method's numbers.
    fn micro_batch(&mut self, at: &Place, world: &World, early: Option<&mut Early>) -> Told {
        let Self { decoder, parameters, gradients, optimizer, method, options, broken, .. } = self;
        let look =
            Look { method, micro_batch: at.micro_batch, work: at.work, reference: at.reference, looked: at.looked };
        let (micro_batch, weights, device) = (at.micro_batch, &parameters.weights, decoder.device);
        let batch = decoder.batch(&micro_batch.tokens, &micro_batch.lengths());
        let walked = walk(decoder, weights, &batch, &look, options);
        let positions = upload(&micro_batch.positions, device);
        let mut told = Told::nothing(&walked.x);
        let mut sink = Walk { gradients, early, optimizer, parameters, options, broken, world };
        let part = |t: &Tensor, rows: &Range<usize>| t.narrow(0, rows.start as i64, rows.len() as i64);
        let targets = |rows: &Range<usize>| upload(&micro_batch.targets[rows.clone()], device);
        let d_top = look.needs_head().then(|| {
            let hidden = decoder.all_tokens(&walked.x);
            let mut d_hidden = hidden.zeros_like();
            decoder.clock.time(Part::Head, || {
                let mut take =
                    |rows: &Range<usize>, grad: &Tensor| _ = d_hidden.index_copy_(0, &part(&positions, rows), grad);
                let select =
                    |rows: &Range<usize>| decoder.rows(weights, &hidden, &part(&positions, rows), options.logits_bytes);
                let likely = look.likelihood_rows();
                if !likely.is_empty() {
                    let rows = select(&likely);
                    let scores = decoder.scores(weights, &rows, &targets(&likely), true);
                    let weight = look.likelihood(&scores.logprob, likely.start, &mut told);
                    take(&likely, &decoder.scores_backward(weights, &rows, scores, &weight, &mut sink));
                }
                if let Some((range, on)) = look.distribution_rows() {
                    let (rows, targets) = (select(&range), targets(&range));
                    take(&range, &look.distribution(decoder, weights, &rows, &targets, on, &mut told, &mut sink));
                }
                if let Some(range) = look.divergence_rows() {
                    take(&range, &look.divergence(decoder, weights, &select(&range), &mut told, &mut sink));
                }
            });
            d_hidden
        });
        sink.complete(decoder.table.num_units() - 1);
        let d_watched = walked.watched.as_ref().map(|(edge, hidden)| (*edge, look.hidden(hidden, &mut told)));
        walk_back(decoder, weights, &batch, walked, d_top, d_watched, &mut sink);
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
        let looked = self.look(work, reference, world);
        for micro_batch in &work.micro_batches {
            self.micro_batch(&Place { micro_batch, work, reference, looked: looked.as_ref() }, world, None);
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

/// A micro-batch and what is known of its step.
struct Place<'a> {
    micro_batch: &'a MicroBatch,
    work: &'a StepWork,
    reference: Option<&'a dyn Reference>,
    looked: Option<&'a Tensor>,
}

/// What forward left.
struct Walked {
    /// Rows behind the last layer that was run: this rank's part of the tokens.
    x: Tensor,
    /// Layers and their tape, in order.
    tapes: Vec<(Range<usize>, Tape)>,
    /// The edge that the method looks at, and all tokens' rows there.
    watched: Option<(usize, Tensor)>,
}

/// Forward up to the last layer that the method needs, stopping at the edges that it perturbs or looks at.
fn walk(
    decoder: &Decoder,
    weights: &crate::model::Weights,
    batch: &Batch,
    look: &Look,
    options: &TrainerOptions,
) -> Walked {
    let forget = look.micro_batch.rows(Stream::Forget);
    let adversary = look.method.adversary.filter(|_| !forget.is_empty());
    let watched = look.method.watched();
    let depth = if look.needs_head() { decoder.arch.num_layers } else { watched.unwrap_or(decoder.arch.num_layers) };
    let first = decoder.table.first_trained_layer().min(depth);
    let mut stops: Vec<usize> =
        [adversary.map(|adversary| adversary.edge), watched, Some(first), Some(depth)].into_iter().flatten().collect();
    stops.sort_unstable();
    stops.dedup();
    let mut walked = Walked { x: decoder.enter(weights, batch), tapes: Vec::new(), watched: None };
    let mut from = 0;
    for stop in stops {
        let x = std::mem::replace(&mut walked.x, Tensor::new());
        // backward ends at the first layer that is trained
        let keep = if stop <= first { Keep::Nothing } else { options.keep };
        let (x, tape) = decoder.through(weights, batch, x, from..stop, keep);
        if stop > first {
            walked.tapes.push((from..stop, tape));
        }
        walked.x = match adversary.filter(|adversary| adversary.edge == stop) {
            Some(adversary) => {
                let target = super::attack::Target {
                    decoder,
                    weights,
                    batch,
                    micro_batch: look.micro_batch,
                    positions: &upload(&attacked(look.micro_batch, true), decoder.device),
                    targets: &upload(&attacked(look.micro_batch, false), decoder.device),
                    logits_bytes: options.logits_bytes,
                };
                let key = format!("attack {}", look.work.epoch);
                let delta = adversary.perturb(&target, &x, look.method.seed, &key);
                x + delta
            }
            None => x,
        };
        if watched == Some(stop) {
            walked.watched = Some((stop, decoder.all_tokens(&walked.x)));
        }
        from = stop;
    }
    walked
}

/// Positions or ids of the forget samples' scored tokens, those of preferred answers left out.
fn attacked(micro_batch: &MicroBatch, positions: bool) -> Vec<i64> {
    let of = if positions { &micro_batch.positions } else { &micro_batch.targets };
    let forget = micro_batch.sequences.iter().filter(|s| s.stream == Stream::Forget && s.text == Text::Answer);
    forget.flat_map(|sequence| of[sequence.rows.clone()].iter().copied()).collect()
}

/// Backward over what [`walk`] left, with the gradients of the top rows and of the watched ones, all tokens' of both.
fn walk_back(
    decoder: &Decoder,
    weights: &crate::model::Weights,
    batch: &Batch,
    walked: Walked,
    d_top: Option<Tensor>,
    d_watched: Option<(usize, Tensor)>,
    sink: &mut dyn Gradients,
) {
    let Walked { x, mut tapes, watched } = walked;
    drop(watched);
    let mut grad = match d_top {
        Some(d_top) if decoder.sequence_parallel => decoder.own_tokens(&d_top).copy(),
        Some(d_top) => d_top,
        None => x.zeros_like(),
    };
    drop(x);
    while let Some((layers, tape)) = tapes.pop() {
        if let Some((edge, d_watched)) = &d_watched
            && *edge == layers.end
        {
            let _ = grad.g_add_(&decoder.own_tokens(d_watched));
        }
        decoder.back_through(weights, batch, tape, layers, &mut grad, sink);
    }
    if decoder.table.first_trained_layer() == 0 {
        decoder.leave(batch, grad, sink);
    } else {
        sink.complete(0);
    }
}
