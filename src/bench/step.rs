//! A step of NPO with a retain term on a random model and random samples.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::rate::{matrix_rate, settle};
use super::trace::Trace;
use crate::abi::{driver, host};
use crate::config;
use crate::data::{self, Dataset, Order, Text, Wanted};
use crate::dist::{Reduce, World};
use crate::model::{Architecture, ModelError, ReferenceHead};
use crate::plan;
use crate::telemetry::{PARTS, Part, table};
use crate::train::{Batches, Cuts, RandomTrainer, Reference, Trainer};
use crate::unlearn;

/// What to time.
#[derive(Clone, Debug)]
pub struct StepBench {
    pub arch: Architecture,
    pub parallel: config::Parallel,
    /// Epochs and steps in it are not used.
    pub train: config::Train,
    pub optimizer: config::Optimizer,
    pub device: Device,
    /// Mean length of a sample; they vary by a half up and down. Unit: tokens.
    pub length: usize,
    /// Share of a sample that is its answer.
    pub scored: f64,
    pub steps: usize,
    /// Record one more step.
    pub trace: bool,
}

/// Medians over the steps; the same on all ranks.
#[derive(Clone, Debug, Serialize)]
pub struct StepResult {
    pub seconds_per_step: f64,
    /// Of the whole job.
    pub tokens_per_step: usize,
    pub tokens_per_second: f64,
    /// Arithmetic of forward and backward without recomputation, of all ranks that are there. Unit: operations a step.
    pub flops_per_step: f64,
    /// Unit: operations a second, all ranks.
    pub flops_per_second: f64,
    /// One large matrix product in the same precision, on all ranks at once. Unit: operations a second, all ranks.
    pub matrix_rate: f64,
    /// `flops_per_second / matrix_rate`: model FLOPs utilisation (MFU) against what this machine reaches, not a data sheet.
    pub share_of_matrix_rate: f64,
    /// Seconds a step on rank 0; collectives are counted where they happen and once more as `communication`. On a GPU measured in
    /// two steps of their own, in which the host waits for the device after each part.
    pub split: Vec<(String, f64)>,
    pub peak_rss_bytes: u64,
    /// Memory of one rank that stays over the steps, by purpose. Unit: bytes.
    pub memory: Vec<(String, u64)>,
    /// What the GPU had given to this process at the end, beyond its own context: what stays, activations and workspace; 0 on a CPU.
    /// Unit: bytes.
    pub device_bytes: u64,
    pub parameters: i64,
    pub threads: i32,
    pub ranks: usize,
    pub device: String,
    /// One step of all ranks, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
}

/// Runs the steps. All ranks call it. With the groups of [`World::planned`] it times one rank of a mesh that is not there.
///
/// `seen` is called on this rank when the warm-up is over, with 0, and after every step that counts, with the number of those done.
pub fn step(bench: &StepBench, world: &World, mut seen: impl FnMut(usize)) -> Result<StepResult, ModelError> {
    let kind = match bench.train.precision {
        config::Precision::Bf16 => Kind::BFloat16,
        config::Precision::F32 => Kind::Float,
    };
    let context = used_bytes(bench.device);
    let (forget, retain) = (samples(bench, "forget"), samples(bench, "retain"));
    let mut trainer = trainer(bench, world)?;
    let reference = Fixed { logprobs: forget.samples.iter().map(|s| vec![-2.0; s.scored.len()]).collect() };
    let batches = Batches {
        order: Order::new(0, false, forget.samples.len(), retain.samples.len(), bench.train.global_batch),
        anchors: &forget,
        retain: Some(&retain),
        cuts: Cuts::default(),
        budget: bench.train.micro_batch_tokens,
    };
    let rate_before = matrix_rate(kind, bench.device);
    let mut next = 0;
    let mut run = |trainer: &mut Trainer| {
        let work = batches.step(next, world.mesh);
        world.world.barrier();
        settle(bench.device);
        let start = Instant::now();
        trainer.step(next, &work, Some(&reference), world).expect("invariant: random weights give finite numbers");
        world.world.barrier();
        settle(bench.device);
        next += 1;
        start.elapsed().as_secs_f64()
    };
    for _ in 0..WARM_UP {
        run(&mut trainer);
    }
    trainer.decoder.clock.reset();
    let traffic = communication(world);
    let mut seconds = Vec::new();
    seen(0);
    for step in 1..=bench.steps {
        seconds.push(run(&mut trainer));
        seen(step);
    }
    let communication = communication(world) - traffic;
    let device_bytes = used_bytes(bench.device).saturating_sub(context);
    // where the time goes: on a GPU only waiting tells
    let mut looked_at = seconds.clone();
    if bench.device != Device::Cpu {
        let device = bench.device;
        trainer.decoder.clock.settle_with(Some(Box::new(move || settle(device))));
        trainer.decoder.clock.reset();
        looked_at = (0..2).map(|_| run(&mut trainer)).collect();
    }
    let each = |x: f64| x / looked_at.len() as f64;
    let split_times: Vec<f64> = PARTS.iter().map(|&(part, _)| trainer.decoder.clock.get(part).as_secs_f64()).collect();
    let trace = bench.trace.then(|| {
        trainer.decoder.clock.settle_with(None);
        trainer.decoder.clock.record();
        trainer.gradients.record();
        let start = Instant::now();
        run(&mut trainer);
        Trace::of(&trainer.decoder.clock.recorded(), &trainer.gradients.recorded(), start, world)
    });
    let time = |part: Part| each(split_times[part as usize]);
    let mut split: Vec<(String, f64)> = PARTS.iter().map(|&(part, name)| (name.to_owned(), time(part))).collect();
    let known: f64 = split.iter().map(|(_, seconds)| seconds).sum();
    split.push(("other".to_owned(), each(looked_at.iter().sum()) - known));
    split.push(("communication".to_owned(), communication / bench.steps as f64));

    let ranks = world.mesh.world();
    let matrix_rate = rate_before.max(matrix_rate(kind, bench.device));
    let mut sums = [matrix_rate];
    world.world.all_reduce_f64(&mut sums, Reduce::Sum);
    let mut highest = [host::peak_resident_bytes() as f64, device_bytes as f64, median(&seconds)];
    world.world.all_reduce_f64(&mut highest, Reduce::Max);
    let [peak_rss, device_bytes, seconds_per_step] = highest;
    // a rank that runs alone has added up nothing, and speaks for itself
    let (matrix_rate, share) = if world.planned { (matrix_rate, 1.0 / ranks as f64) } else { (sums[0], 1.0) };
    let flops = share * operations(&bench.arch, &batches, WARM_UP);
    let tokens = batches.step(WARM_UP, world.mesh).tokens;
    let (weights, masters) = trainer.parameters.bytes();
    let memory = [
        ("weights", weights),
        ("master weights", masters),
        ("gradients", trainer.gradients.bytes()),
        ("optimizer", trainer.optimizer.bytes()),
    ];
    Ok(StepResult {
        seconds_per_step,
        tokens_per_step: tokens,
        tokens_per_second: tokens as f64 / seconds_per_step,
        flops_per_step: flops,
        flops_per_second: flops / seconds_per_step,
        matrix_rate,
        share_of_matrix_rate: flops / seconds_per_step / matrix_rate,
        split,
        peak_rss_bytes: peak_rss as u64,
        memory: memory.map(|(name, bytes)| (name.to_owned(), bytes as u64)).into(),
        device_bytes: device_bytes as u64,
        parameters: bench.arch.num_parameters(),
        threads: tch::get_num_threads(),
        ranks,
        device: name(bench.device),
        trace,
    })
}

/// A trainer after a few steps, and the seconds of the last of them.
pub(super) fn prepared(bench: &StepBench, world: &World) -> Result<(Trainer, f64), ModelError> {
    let (forget, retain) = (samples(bench, "forget"), samples(bench, "retain"));
    let mut trainer = trainer(bench, world)?;
    let reference = Fixed { logprobs: forget.samples.iter().map(|s| vec![-2.0; s.scored.len()]).collect() };
    let batches = Batches {
        order: Order::new(0, false, forget.samples.len(), retain.samples.len(), bench.train.global_batch),
        anchors: &forget,
        retain: Some(&retain),
        cuts: Cuts::default(),
        budget: bench.train.micro_batch_tokens,
    };
    let mut seconds = 0.0;
    for step in 0..WARM_UP + 1 {
        let work = batches.step(step, world.mesh);
        let start = Instant::now();
        trainer.step(step, &work, Some(&reference), world).expect("invariant: random weights give finite numbers");
        seconds = start.elapsed().as_secs_f64();
    }
    Ok((trainer, seconds))
}

/// Steps before those that count.
const WARM_UP: usize = 2;

/// Bytes of a GPU's memory that are in use, by whomever; 0 for a CPU.
fn used_bytes(device: Device) -> u64 {
    match device {
        Device::Cuda(index) => driver::memory_info(index).map_or(0, |(free, total)| total - free),
        _ => 0,
    }
}

fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => driver::device(index).map_or_else(|error| error.to_string(), |device| device.name),
        _ => "CPU".to_owned(),
    }
}

impl StepResult {
    /// For people.
    pub fn text(&self) -> String {
        let total: f64 = self.split.iter().filter(|(name, _)| name != "communication").map(|(_, s)| s).sum();
        let row = |(name, seconds): &(String, f64)| {
            vec![name.clone(), format!("{:.1}", seconds * 1e3), format!("{:.1} %", 100.0 * seconds / total)]
        };
        let rows: Vec<Vec<String>> = self.split.iter().map(row).collect();
        format!(
            "{:.1} M parameters, {} tokens a step, {} ranks with {} threads on {}\n\n{}\n{:.1} ms a step, {:.0} tokens/s, {:.0} GFLOP/s = {:.0} % of \
             this machine's {:.0} GFLOP/s in one large matrix product; peak memory {:.0} MiB a rank{}\n",
            self.parameters as f64 / 1e6,
            self.tokens_per_step,
            self.ranks,
            self.threads,
            self.device,
            table(&["part", "ms", "share"], &rows),
            self.seconds_per_step * 1e3,
            self.tokens_per_second,
            self.flops_per_second / 1e9,
            100.0 * self.share_of_matrix_rate,
            self.matrix_rate / 1e9,
            self.peak_rss_bytes as f64 / 1048576.0,
            if self.device_bytes > 0 {
                format!(" on the host, {:.1} GiB on the device", self.device_bytes as f64 / 1073741824.0)
            } else {
                String::new()
            }
        ) + &self.trace.as_ref().map_or_else(String::new, Trace::text)
    }
}

/// Two for each multiply-add: the layers' matrices three times for every token (forward, and two products backward), causal
/// attention's two products likewise, and the head three times for every scored row.
fn operations(arch: &Architecture, batches: &Batches, step: usize) -> f64 {
    let work = batches.order.batch(step);
    let retain = batches.retain.expect("invariant: the benchmark has retain samples");
    let forget = work.anchors.iter().map(|&i| &batches.anchors.samples[i]);
    let samples = forget.chain(work.partners.iter().map(|&i| &retain.samples[i]));
    let layers = arch.num_layers as f64;
    let width = (arch.num_heads * arch.head_dim) as f64;
    samples
        .map(|sample| {
            let (tokens, rows) = (sample.tokens.len() as f64, sample.scored.len() as f64);
            let matrices = layers * arch.layer_matrices() as f64 * tokens;
            let attention = layers * width * tokens * (tokens + 1.0);
            let head = (arch.vocab * arch.hidden) as f64 * rows;
            6.0 * (matrices + attention + head)
        })
        .sum()
}

fn trainer(bench: &StepBench, world: &World) -> Result<Trainer, ModelError> {
    let StepBench { arch, parallel, train, optimizer, device, steps, .. } = bench;
    let method = unlearn::method(&config::Method::new(config::Objective::Npo, config::Retain::Nll), 0, 1);
    let (device, steps) = (*device, steps + WARM_UP + 2);
    RandomTrainer { arch, parallel, train, optimizer, method, device, steps }.build(world)
}

/// Random tokens; lengths between a half and one and a half of the mean.
fn samples(bench: &StepBench, name: &str) -> Dataset {
    let (samples, length) = (bench.train.global_batch, bench.length);
    let assumed = plan::Assumed { samples, length, longest: usize::MAX, scored: bench.scored };
    plan::assumed(name, assumed, bench.arch.vocab, Wanted::Nothing)
}

struct Fixed {
    logprobs: Vec<Vec<f32>>,
}

impl Reference for Fixed {
    fn logprobs(&self, sample: usize, _: Text) -> &[f32] {
        &self.logprobs[sample]
    }

    fn head(&self) -> &ReferenceHead {
        unreachable!("invariant: the benchmark has no divergence")
    }

    fn rows(&self, _: data::Stream, _: usize) -> Tensor {
        unreachable!("invariant: the benchmark has no divergence")
    }

    fn hidden(&self, _: data::Stream, _: usize) -> Tensor {
        unreachable!("invariant: no hidden rows in this benchmark")
    }
}

fn communication(world: &World) -> f64 {
    [&world.tp, &world.dp].iter().map(|group| group.traffic().time.as_secs_f64()).sum()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

const _: () = assert!(PARTS.len() == Part::Optimizer as usize + 1);
