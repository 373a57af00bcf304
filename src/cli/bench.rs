//! The verb `bench`.

use std::time::Duration;

use anyhow::{Context as _, bail};

use super::arguments::{CheckpointBenchOptions, LoadOptions, RankBenchOptions, StepBenchOptions};
use super::device;
use super::launch::Launched;
use super::run::{Ranks, set_threads, with_ranks};
use crate::bench::{self, RankBench, StepBench};
use crate::config::{self, Precision, Recompute};
use crate::dist::{Mesh, World};
use crate::model::architecture::Packing;
use crate::model::{Architecture, Rope, Scaling, published};

/// Deadline of a collective.
const TIMEOUT: Duration = Duration::from_secs(600);

pub(super) fn step(options: &StepBenchOptions, launched: &Launched) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| step_on(ranks, options, launched))
}

fn step_on(ranks: &Ranks, options: &StepBenchOptions, launched: &Launched) -> anyhow::Result<()> {
    let (bench, world) = prepare(ranks, options, launched)?;
    let load = &options.load;
    let result = tch::no_grad(|| bench::step(&bench, &world, |_| ()))?;
    if world.is_first() {
        if let (Some(path), Some(trace)) = (&options.trace, &result.trace) {
            let text = serde_json::to_string(&trace.events)?;
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        print_result(load, &result, &result.text())?;
    }
    Ok(())
}

pub(super) fn checkpoint(options: &CheckpointBenchOptions, launched: &Launched) -> anyhow::Result<()> {
    if launched.world > 1 {
        bail!("`bench checkpoint` measures one rank: start it alone, without a launcher");
    }
    let folder = &options.folder;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    with_ranks(launched, |ranks| {
        let (bench, world) = prepare(ranks, &options.step, launched)?;
        let result = tch::no_grad(|| bench::checkpoint(&bench, &options.folder, &world))?;
        print_result(&options.step.load, &result, &result.text())
    })
}

/// The benchmark that the options describe, and the ranks that are there.
fn prepare(ranks: &Ranks, options: &StepBenchOptions, launched: &Launched) -> anyhow::Result<(StepBench, World)> {
    let world = ranks.world(options.tp, None, TIMEOUT, launched)?;
    set_threads(options.threads, &world)?;
    let arch = match &options.shape {
        Some(name) => published::architecture(name)
            .with_context(|| format!("--shape {name} is not known; known are {}", published::names().join(", ")))??,
        None => architecture(options),
    };
    let load = &options.load;
    let device::Chosen { world, device, .. } = device::choose(load.device, load.allow_shared_gpu, world, TIMEOUT)?;
    let bench = StepBench {
        arch,
        parallel: config::Parallel {
            tp: options.tp,
            sequence_parallel: options.sequence_parallel,
            zero: !options.no_zero,
            bucket_mib: options.bucket_mib,
            ..config::Parallel::default()
        },
        train: config::Train {
            epochs: None,
            steps: None,
            global_batch: options.samples,
            micro_batch_tokens: options.micro_batch_tokens,
            precision: if options.f32 { Precision::F32 } else { Precision::Bf16 },
            grad_dtype: options.grad_dtype,
            recompute: if options.recompute { Recompute::HalfBlock } else { Recompute::None },
            logits_mib: 256.0,
        },
        optimizer: config::Optimizer {
            name: config::OptimizerName::Adamw,
            lr: 1e-5,
            betas: None,
            eps: None,
            momentum: None,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            state_dtype: Some(options.state_dtype),
            in_backward: options.in_backward,
        },
        device,
        length: load.length,
        scored: scored(load)?,
        steps: load.steps.max(1),
        trace: options.trace.is_some(),
    };
    Ok((bench, world))
}

pub(super) fn rank(options: &RankBenchOptions, launched: &Launched) -> anyhow::Result<()> {
    if launched.world > 1 {
        bail!("`bench rank` imagines the other ranks: start it alone, without a launcher");
    }
    with_ranks(launched, |_| rank_on(options))
}

fn rank_on(options: &RankBenchOptions) -> anyhow::Result<()> {
    let config = config::from_file(&options.config, &options.set)?;
    let tp = config.parallel.tp;
    let config::Dp::Ranks(dp) = config.parallel.dp else {
        bail!("parallel.dp = \"auto\" needs ranks to count; write --set parallel.dp=N for the mesh that is meant");
    };
    if options.as_rank >= tp * dp {
        bail!("--as-rank {}: the mesh of tp {tp} x dp {dp} has ranks 0 to {}", options.as_rank, tp * dp - 1);
    }
    let arch = super::plan::architecture(&config.model.path)?;
    let alone = World::solo();
    set_threads(config.run.threads, &alone)?;
    let load = &options.load;
    let device::Chosen { device, .. } = device::choose(load.device, load.allow_shared_gpu, alone, TIMEOUT)?;
    let bench = StepBench {
        arch,
        parallel: config.parallel.clone(),
        train: config.train.clone(),
        optimizer: config.optimizer.clone(),
        device,
        length: load.length,
        scored: scored(load)?,
        steps: load.steps.max(1),
        trace: false,
    };
    let rank = RankBench {
        mesh: Mesh { rank: options.as_rank, tp, dp },
        tp_rate: options.tp_gbs * 1e9,
        dp_rate: options.dp_gbs * 1e9,
    };
    let result = tch::no_grad(|| bench::rank(&bench, &rank))?;
    print_result(load, &result, &result.text())
}

fn print_result(load: &LoadOptions, result: &impl serde::Serialize, text: &str) -> anyhow::Result<()> {
    if load.json {
        println!("{}", serde_json::to_string_pretty(result)?);
    } else {
        print!("{text}");
    }
    Ok(())
}

fn scored(load: &LoadOptions) -> anyhow::Result<f64> {
    if !(load.scored > 0.0 && load.scored <= 1.0) {
        bail!("--scored is {}; expected a share above 0 and not above 1", load.scored);
    }
    Ok(load.scored)
}

fn architecture(options: &StepBenchOptions) -> Architecture {
    let head_dim = options.hidden / options.heads;
    Architecture {
        family: "llama",
        hidden: options.hidden,
        num_layers: options.layers,
        num_heads: options.heads,
        num_kv_heads: options.kv_heads,
        head_dim,
        intermediate: options.intermediate,
        vocab: options.vocab,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, dim: head_dim, scaling: Scaling::None },
        tied: false,
        qkv_bias: false,
        qk_norm: false,
        windows: vec![None; options.layers],
        packing: Packing::Separate,
        max_positions: 1 << 20,
        initializer_range: 0.02,
    }
}
