//! Whether this job's ranks and devices compute what one CPU computes: the same few steps of small random models of several
//! families, once on each rank's own CPU and once together, compared number by number.

use std::convert::Infallible;
use std::rc::Rc;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::config;
use crate::data::{self, Dataset, Order, Sample, Text};
use crate::dist::{Reduce, World};
use crate::model::architecture::Packing;
use crate::model::init::{self, Stream};
use crate::model::sharding::{Class, Piece, Table};
use crate::model::{Architecture, Decoder, LogitsPool, ModelError, ReferenceHead, Rope, Scaling};
use crate::telemetry::{Clock, table};
use crate::train::{
    Batches, Cuts, GradientBuffers, GradientOptions, Layout, Optimizer, Parameters, Reference, Schedule, StepReport,
    Trainer, TrainerOptions,
};
use crate::unlearn;

/// Steps of each comparison.
const STEPS: usize = 3;
const SEED: u64 = 9;

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    pub device: Device,
    pub sequence_parallel: bool,
    pub zero: bool,
}

/// One family in one precision; the largest relative differences over steps and ranks.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub family: &'static str,
    pub precision: &'static str,
    pub in_backward: bool,
    pub loss: f64,
    pub norm: f64,
    pub parameters: f64,
    /// What the three may be at most: loss and norm, parameters.
    pub tolerance: (f64, f64),
    pub good: bool,
}

/// Runs all comparisons. All ranks call it; the lines are the same on all.
pub fn check(check: &Check, world: &World) -> Result<Vec<Line>, ModelError> {
    let mut lines = Vec::new();
    for arch in architectures() {
        if !arch.legal_tp().contains(&world.mesh.tp) {
            continue;
        }
        let one = Check { device: Device::Cpu, sequence_parallel: false, zero: true };
        let alone = World::solo();
        let (want, known) = run(&arch, Kind::Float, false, &one, &alone)?;
        for (kind, in_backward) in [(Kind::Float, false), (Kind::Float, true), (Kind::BFloat16, false)] {
            let (want, known) = if in_backward {
                &run(&arch, Kind::Float, true, &one, &alone)?
            } else {
                &(want.clone(), known.iter().map(|(piece, values)| (piece.clone(), values.copy())).collect())
            };
            let (got, found) = run(&arch, kind, in_backward, check, world)?;
            lines.push(compare(arch.family, kind, in_backward, (&got, &found), (want, known), world));
        }
    }
    Ok(lines)
}

type Boxes = Vec<(Piece, Tensor)>;

fn compare(
    family: &'static str,
    kind: Kind,
    in_backward: bool,
    (got, found): (&[StepReport], &Boxes),
    (want, known): (&[StepReport], &Boxes),
    world: &World,
) -> Line {
    let relative = |a: f64, b: f64| if a == b { 0.0 } else { (a / b - 1.0).abs() };
    let over = |of: fn(&StepReport) -> f64| {
        let each = got.iter().zip(want).map(|(a, b)| relative(of(a), of(b)));
        each.fold(0.0, |x, y| if x >= y { x } else { y })
    };
    let distances = found.iter().map(|(piece, values)| {
        let (_, whole) = known.iter().find(|(other, _)| other.name == piece.name).expect("invariant: the same tensors");
        let mut part = whole.shallow_clone();
        for (dim, (&start, &len)) in piece.offset.iter().zip(&piece.size).enumerate() {
            part = part.narrow(dim as i64, start, len);
        }
        let norm = |t: Tensor| f64::try_from(t.to_kind(Kind::Double).norm()).unwrap_or(f64::NAN);
        norm(values - &part) / norm(part).max(1e-12)
    });
    let parameters = distances.fold(0.0, |x, y| if x >= y { x } else { y });
    let mut worst = [over(|report| report.losses.total), over(|report| report.grad_norm), parameters];
    // a number that is none must not be lost on the way
    worst.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = f64::INFINITY);
    world.world.all_reduce_f64(&mut worst, Reduce::Max);
    let [loss, norm, parameters] = worst;
    let tolerance = if kind == Kind::Float { (1e-4, 1e-3) } else { (0.03, 0.03) };
    Line {
        family,
        precision: if kind == Kind::Float { "f32" } else { "bf16" },
        in_backward,
        loss,
        norm,
        parameters,
        tolerance,
        good: loss < tolerance.0 && norm < tolerance.0 && parameters < tolerance.1,
    }
}

/// For people; the second is whether all is good.
pub fn text(lines: &[Line]) -> (String, bool) {
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let number = |x: f64| format!("{x:.1e}");
            let step = if line.in_backward { "in backward" } else { "after" };
            vec![
                line.family.to_owned(),
                line.precision.to_owned(),
                step.to_owned(),
                number(line.loss),
                number(line.norm),
                number(line.parameters),
                if line.good { "good".to_owned() } else { "DIFFERS".to_owned() },
            ]
        })
        .collect();
    let head = ["family", "precision", "optimizer step", "loss", "gradient norm", "parameters", ""];
    (table(&head, &rows), lines.iter().all(|line| line.good))
}

/// Small models that differ in what families differ in.
fn architectures() -> Vec<Architecture> {
    let plain = Architecture {
        family: "llama",
        hidden: 64,
        num_layers: 3,
        num_heads: 8,
        num_kv_heads: 4,
        head_dim: 16,
        intermediate: 96,
        vocab: 203,
        norm_eps: 1e-5,
        rope: Rope { theta: 1e4, dim: 16, scaling: Scaling::None },
        tied: false,
        qkv_bias: false,
        qk_norm: false,
        windows: vec![None; 3],
        packing: Packing::Separate,
        max_positions: 1024,
        initializer_range: 0.02,
    };
    vec![
        Architecture { family: "qwen2 (biases, tied)", qkv_bias: true, tied: true, ..plain.clone() },
        Architecture { family: "qwen3 (q/k norms)", qk_norm: true, ..plain.clone() },
        Architecture { family: "mistral (windows)", windows: vec![Some(20), None, Some(7)], ..plain.clone() },
        Architecture {
            family: "phi3 (part of a head turned)",
            rope: Rope { dim: 8, ..plain.rope.clone() },
            ..plain.clone()
        },
        plain,
    ]
}

/// A few steps of NPO with a retain term: what was told, and this rank's boxes of the parameters on the host.
fn run(
    arch: &Architecture,
    kind: Kind,
    in_backward: bool,
    check: &Check,
    world: &World,
) -> Result<(Vec<StepReport>, Boxes), ModelError> {
    let mesh = world.mesh;
    let sharding = Table::new(arch, mesh.tp, mesh.tp_rank(), check.sequence_parallel)?;
    let (owners, owner) = if check.zero { (mesh.dp, mesh.dp_rank()) } else { (1, 0) };
    let layout = Layout::new(&sharding, 6000, owners, owner);
    let source = |id: usize, piece: &Piece| {
        let noise: &(dyn Fn(Stream, u64) -> f32 + Sync) = match sharding.params[id].class {
            Class::Vector | Class::PartialVector => &|stream, i| 1.0 + 0.25 * stream.symmetric(i),
            Class::Bias => &|stream, i| 0.5 * stream.symmetric(i),
            Class::Matrix | Class::PartialMatrix | Class::Frozen => &|stream, i| 0.25 * stream.symmetric(i),
        };
        Ok::<Tensor, Infallible>(init::fill(piece, noise, SEED))
    };
    let Ok(parameters) = Parameters::new(&sharding, layout, kind, check.device, source);
    let optimizer = config::Optimizer {
        name: config::OptimizerName::Adamw,
        lr: 1e-3,
        betas: None,
        eps: Some(1e-6),
        momentum: None,
        weight_decay: 0.1,
        max_grad_norm: 0.5,
        state_dtype: None,
        in_backward,
    };
    let method = config::Method::new(config::Objective::Npo, config::Retain::Nll);
    let decoder = Decoder {
        arch: arch.clone(),
        table: sharding,
        tp: Rc::clone(&world.tp),
        sequence_parallel: check.sequence_parallel,
        device: check.device,
        clock: Clock::default(),
        logits: LogitsPool::default(),
    };
    let holding = GradientOptions { release: in_backward, ..GradientOptions::f32(check.device) };
    let schedule = config::Schedule { name: config::ScheduleName::Constant, ..Default::default() };
    let mut trainer = Trainer {
        gradients: GradientBuffers::new(&decoder.table, &parameters.layout, &world.tp, &world.dp, holding),
        optimizer: Optimizer::new(&optimizer, &decoder.table, &parameters),
        schedule: Schedule::new(&schedule, optimizer.lr, STEPS, 1),
        method: unlearn::method(&method, SEED, 1),
        options: TrainerOptions {
            keep: crate::model::Keep::Inputs,
            logits_bytes: 8192.0,
            max_grad_norm: optimizer.max_grad_norm,
            in_backward,
        },
        broken: Trainer::whole(check.device),
        decoder,
        parameters,
    };
    let (forget, retain) = (samples(arch, "forget", 9), samples(arch, "retain", 7));
    let reference = Known(forget.samples.iter().map(|sample| vec![-4.0; sample.scored.len()]).collect());
    let batches = Batches {
        order: Order::new(SEED, true, forget.samples.len(), retain.samples.len(), 6),
        anchors: &forget,
        retain: Some(&retain),
        cuts: Cuts::default(),
        budget: 200,
    };
    let mut told = Vec::new();
    for step in 0..STEPS {
        let report = trainer.step(step, &batches.step(step, mesh), Some(&reference), world);
        // what is no number is told as a difference without bound
        told.push(report.unwrap_or_else(|_| StepReport { grad_norm: f64::NAN, ..StepReport::default() }));
    }
    let mut boxes = Vec::new();
    for (id, param) in trainer.decoder.table.params.iter().enumerate() {
        let values = trainer.parameters.weights.get(id).to_kind(Kind::Float).to_device(Device::Cpu);
        for piece in &param.pieces {
            boxes.push((piece.clone(), values.narrow(0, piece.row, piece.size[0]).copy()));
        }
    }
    Ok((told, boxes))
}

/// Random tokens, 5 to 90 a sample, the later ones scored.
fn samples(arch: &Architecture, name: &str, count: u64) -> Dataset {
    let draw = Stream::new(SEED, name);
    let samples = (0..count).map(|i| {
        let len = 5 + draw.bits(1000 + i) % 86;
        let prompt = 1 + draw.bits(2000 + i) % (len - 2);
        let id = |t| (draw.bits((i + 1) << 32 | t) % arch.vocab as u64) as i32;
        Sample { tokens: (0..len).map(id).collect(), scored: (prompt as u32..len as u32).collect() }
    });
    Dataset::from_samples(name, samples.collect())
}

struct Known(Vec<Vec<f32>>);

impl Reference for Known {
    fn logprobs(&self, sample: usize, _: Text) -> &[f32] {
        &self.0[sample]
    }

    fn head(&self) -> &ReferenceHead {
        unreachable!("invariant: no divergence here")
    }

    fn rows(&self, _: data::Stream, _: usize) -> Tensor {
        unreachable!("invariant: no divergence here")
    }

    fn hidden(&self, _: data::Stream, _: usize) -> Tensor {
        unreachable!("invariant: no hidden rows here")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::run_threads;

    #[test]
    fn a_cpu_agrees_with_itself_on_several_ranks() {
        let lines = run_threads(2, 2, |world| {
            let one = Check { device: Device::Cpu, sequence_parallel: true, zero: true };
            tch::no_grad(|| check(&one, &world).unwrap())
        });
        let (table, good) = text(&lines[0]);
        assert!(good && lines[0].len() == 15, "{table}");
        // f32 in another order is near, and not the same
        assert!(lines[0].iter().any(|line| line.parameters > 0.0));
    }

    #[test]
    fn what_differs_is_told() {
        let report = |loss| StepReport {
            losses: crate::train::Losses { total: loss, ..Default::default() },
            grad_norm: 1.0,
            ..Default::default()
        };
        let boxes = Vec::new();
        let (got, want) = ([report(1.01)], [report(1.0)]);
        let line = compare("x", Kind::Float, false, (&got, &boxes), (&want, &boxes), &World::solo());
        assert!(!line.good);
        let line = compare("x", Kind::Float, false, (&[report(f64::NAN)], &boxes), (&want, &boxes), &World::solo());
        assert!(!line.good && text(&[line]).0.contains("DIFFERS"));
    }
}
