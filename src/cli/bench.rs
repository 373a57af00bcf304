//! The verb `bench`.

use std::time::Duration;

use super::arguments::StepBenchOptions;
use super::launch::Launched;
use super::run::{Ranks, set_threads, with_ranks};
use crate::bench::{self, StepBench};
use crate::config::{Precision, Recompute};
use crate::model::architecture::Packing;
use crate::model::{Architecture, Rope, Scaling};

pub(super) fn step(options: &StepBenchOptions, launched: &Launched) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| step_on(ranks, options, launched))
}

fn step_on(ranks: &Ranks, options: &StepBenchOptions, launched: &Launched) -> anyhow::Result<()> {
    let world = ranks.world(options.tp, None, Duration::from_secs(600), launched)?;
    set_threads(options.threads, &world)?;
    let bench = StepBench {
        arch: architecture(options),
        precision: if options.f32 { Precision::F32 } else { Precision::Bf16 },
        recompute: if options.recompute { Recompute::HalfBlock } else { Recompute::None },
        sequence_parallel: options.sequence_parallel,
        zero: !options.no_zero,
        bucket_mib: options.bucket_mib,
        samples: options.samples,
        length: options.length,
        scored: options.scored,
        micro_batch_tokens: options.micro_batch_tokens,
        steps: options.steps.max(1),
    };
    let result = tch::no_grad(|| bench::step(&bench, &world))?;
    if world.is_first() {
        if options.json {
            println!("{}", serde_json::to_string_pretty(&result)?);
        } else {
            print!("{}", result.text());
        }
    }
    Ok(())
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
