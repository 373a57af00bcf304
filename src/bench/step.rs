//! A step of NPO with a retain term on a random model and random samples.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::rate::matrix_rate;
use crate::abi::host;
use crate::config;
use crate::data::{Dataset, Order, RowsOf, Sample};
use crate::dist::{Reduce, World};
use crate::model::init::{self, Stream};
use crate::model::sharding::Table;
use crate::model::{Architecture, Decoder, Keep, LogitsPool, ModelError, ReferenceHead};
use crate::telemetry::{Clock, PARTS, Part, table};
use crate::train::{
    Batches, GradientBuffers, GradientOptions, Layout, Optimizer, Parameters, Reference, Schedule, Trainer,
    TrainerOptions,
};
use crate::unlearn;

/// What to time.
#[derive(Clone, Debug)]
pub struct StepBench {
    pub arch: Architecture,
    pub precision: config::Precision,
    pub recompute: config::Recompute,
    pub sequence_parallel: bool,
    pub zero: bool,
    /// Unit: MiB of f32 gradients.
    pub bucket_mib: f64,
    /// Forget samples of a step; as many retain samples come along.
    pub samples: usize,
    /// Mean length of a sample; they vary by a half up and down. Unit: tokens.
    pub length: usize,
    /// Share of a sample that is its answer.
    pub scored: f64,
    /// Unit: tokens.
    pub micro_batch_tokens: usize,
    pub steps: usize,
}

/// Medians over the steps; the same on all ranks.
#[derive(Clone, Debug, Serialize)]
pub struct StepResult {
    pub seconds_per_step: f64,
    /// Of the whole job.
    pub tokens_per_step: usize,
    pub tokens_per_second: f64,
    /// Arithmetic of forward and backward without recomputation, all ranks. Unit: operations a step.
    pub flops_per_step: f64,
    /// Unit: operations a second, all ranks.
    pub flops_per_second: f64,
    /// One large matrix product in the same precision, on all ranks at once. Unit: operations a second, all ranks.
    pub matrix_rate: f64,
    /// `flops_per_second / matrix_rate`.
    pub share_of_matrix_rate: f64,
    /// Seconds a step on rank 0; collectives are counted where they happen and once more as `communication`.
    pub split: Vec<(String, f64)>,
    pub peak_rss_bytes: u64,
    pub parameters: i64,
    pub threads: i32,
    pub ranks: usize,
}

/// Runs the steps. All ranks call it.
pub fn step(bench: &StepBench, world: &World) -> Result<StepResult, ModelError> {
    let kind = match bench.precision {
        config::Precision::Bf16 => Kind::BFloat16,
        config::Precision::F32 => Kind::Float,
    };
    let (forget, retain) = (samples(bench, "forget"), samples(bench, "retain"));
    let mut trainer = trainer(bench, kind, world)?;
    let reference = Fixed { logprobs: forget.samples.iter().map(|s| vec![-2.0; s.scored.len()]).collect() };
    let batches = Batches {
        order: Order::new(0, false, forget.samples.len(), retain.samples.len(), bench.samples),
        anchors: &forget,
        retain: Some(&retain),
        retain_rows: RowsOf::Scored,
        count_padding: false,
        budget: bench.micro_batch_tokens,
    };
    let rate_before = matrix_rate(kind);
    let warm_up = 2;
    let mut seconds = Vec::new();
    let mut tokens = 0;
    let mut flops = 0.0;
    let mut traffic = 0.0;
    for step in 0..warm_up + bench.steps {
        if step == warm_up {
            trainer.decoder.clock.reset();
            traffic = communication(world);
        }
        let work = batches.step(step, world.mesh);
        world.world.barrier();
        let start = Instant::now();
        trainer.step(step, &work, Some(&reference), world).expect("invariant: random weights give finite numbers");
        world.world.barrier();
        if step >= warm_up {
            seconds.push(start.elapsed().as_secs_f64());
            tokens = work.tokens;
            flops = operations(&bench.arch, &batches, step);
        }
    }
    let mut matrix = [rate_before.max(matrix_rate(kind))];
    world.world.all_reduce_f64(&mut matrix, Reduce::Sum);
    let mut peak = [host::peak_resident_bytes() as f64];
    world.world.all_reduce_f64(&mut peak, Reduce::Max);
    let mut middle = [median(&seconds)];
    world.world.all_reduce_f64(&mut middle, Reduce::Max);
    let [seconds_per_step] = middle;
    let total: f64 = seconds.iter().sum::<f64>() / seconds.len() as f64;
    let each = |x: f64| x / bench.steps as f64;
    let mut split: Vec<(String, f64)> = PARTS
        .iter()
        .map(|(part, name)| ((*name).to_owned(), each(trainer.decoder.clock.get(*part).as_secs_f64())))
        .collect();
    let known: f64 = split.iter().map(|(_, seconds)| seconds).sum();
    split.push(("other".to_owned(), total - known));
    split.push(("communication".to_owned(), each(communication(world) - traffic)));
    Ok(StepResult {
        seconds_per_step,
        tokens_per_step: tokens,
        tokens_per_second: tokens as f64 / seconds_per_step,
        flops_per_step: flops,
        flops_per_second: flops / seconds_per_step,
        matrix_rate: matrix[0],
        share_of_matrix_rate: flops / seconds_per_step / matrix[0],
        split,
        peak_rss_bytes: peak[0] as u64,
        parameters: bench.arch.num_parameters(),
        threads: tch::get_num_threads(),
        ranks: world.mesh.world(),
    })
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
            "{:.1} M parameters, {} tokens a step, {} ranks with {} threads\n\n{}\n{:.1} ms a step, {:.0} tokens/s, {:.0} GFLOP/s = {:.0} % of \
             this machine's {:.0} GFLOP/s in one large matrix product; peak memory {:.0} MiB a rank\n",
            self.parameters as f64 / 1e6,
            self.tokens_per_step,
            self.ranks,
            self.threads,
            table(&["part", "ms", "share"], &rows),
            self.seconds_per_step * 1e3,
            self.tokens_per_second,
            self.flops_per_second / 1e9,
            100.0 * self.share_of_matrix_rate,
            self.matrix_rate / 1e9,
            self.peak_rss_bytes as f64 / 1048576.0
        )
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

fn trainer(bench: &StepBench, kind: Kind, world: &World) -> Result<Trainer, ModelError> {
    let mesh = world.mesh;
    let sequence_parallel = bench.sequence_parallel;
    let table = Table::new(&bench.arch, mesh.tp, mesh.tp_rank(), sequence_parallel)?;
    let (owners, owner) = if bench.zero { (mesh.dp, mesh.dp_rank()) } else { (1, 0) };
    let layout = Layout::new(&table, (bench.bucket_mib * 1048576.0 / 4.0) as usize, owners, owner);
    let source = |id: usize, piece: &_| Ok::<Tensor, Infallible>(init::initial(&table.params[id], piece, 0, 0.02));
    let Ok(parameters) = Parameters::new(&table, layout, kind, Device::Cpu, source);
    let optimizer = config::Optimizer {
        name: config::OptimizerName::Adamw,
        lr: 1e-5,
        betas: None,
        eps: None,
        momentum: None,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        state_dtype: None,
        in_backward: false,
    };
    let method = config::Method {
        objective: config::Objective::Npo,
        beta: None,
        forget_weight: None,
        retain: config::Retain::Nll,
        retain_weight: None,
        compat: None,
    };
    let decoder = Decoder {
        arch: bench.arch.clone(),
        table,
        tp: Rc::clone(&world.tp),
        sequence_parallel,
        device: Device::Cpu,
        clock: Clock::default(),
        logits: LogitsPool::default(),
    };
    Ok(Trainer {
        gradients: GradientBuffers::new(
            &decoder.table,
            &parameters.layout,
            &world.tp,
            &world.dp,
            GradientOptions::f32(Device::Cpu),
        ),
        optimizer: Optimizer::new(&optimizer, &decoder.table, &parameters),
        schedule: Schedule::new(&config::Schedule::default(), optimizer.lr, bench.steps + 2, 1),
        method: unlearn::method(&method),
        options: TrainerOptions {
            keep: match bench.recompute {
                config::Recompute::None => Keep::Everything,
                config::Recompute::HalfBlock => Keep::Inputs,
            },
            logits_bytes: 256.0 * 1048576.0,
            max_grad_norm: optimizer.max_grad_norm,
            in_backward: false,
        },
        broken: Trainer::whole(decoder.device),
        decoder,
        parameters,
    })
}

/// Random tokens; lengths between a half and one and a half of the mean.
fn samples(bench: &StepBench, name: &str) -> Dataset {
    let draw = Stream::new(0, name);
    let samples = (0..bench.samples as u64).map(|i| {
        let spread = 0.5 + (draw.bits(i) % 1001) as f64 / 1000.0;
        let len = ((bench.length as f64 * spread) as u64).max(2);
        let prompt = ((len as f64 * (1.0 - bench.scored)) as u64).clamp(1, len - 1);
        let id = |t| (draw.bits((i + 1) << 32 | t) % bench.arch.vocab as u64) as i32;
        Sample { tokens: (0..len).map(id).collect(), scored: (prompt as u32..len as u32).collect() }
    });
    Dataset::from_samples(name, samples.collect())
}

struct Fixed {
    logprobs: Vec<Vec<f32>>,
}

impl Reference for Fixed {
    fn logprobs(&self, sample: usize) -> &[f32] {
        &self.logprobs[sample]
    }

    fn head(&self) -> &ReferenceHead {
        unreachable!("invariant: the benchmark has no divergence")
    }

    fn rows(&self, _: usize) -> Tensor {
        unreachable!("invariant: the benchmark has no divergence")
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
