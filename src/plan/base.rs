//! What a process on a CPU takes besides its tensors, measured by taking it: a step of a tiny model touches the code, the threads and the
//! transport's buffers that any step touches.

use tch::{Device, Kind, Tensor};

use super::machine::Base;
use super::samples::{Assumed, assumed};
use crate::abi::host;
use crate::config::{self, Config, Precision};
use crate::data::{Order, Wanted};
use crate::dist::{Reduce, World};
use crate::model::{Architecture, ModelError, Rope, Scaling};
use crate::train::{Batches, Cuts, RandomTrainer};
use crate::unlearn;

/// Takes it. All ranks call it.
///
/// # Errors
/// A model that does not divide into the mesh.
pub fn base(config: &Config, arch: &Architecture, world: &World) -> Result<Base, ModelError> {
    fill_transports(world);
    tiny_steps(config, arch, world)?;
    let product = bytes_of_a_product(config.train.precision);
    Ok(Base { process: settled_bytes(), product })
}

/// Resident bytes without what the allocator only keeps.
fn settled_bytes() -> u64 {
    host::give_back_freed_memory();
    host::resident_bytes()
}

/// Two steps of a model with the heads and norms of `arch` and hardly any width.
fn tiny_steps(config: &Config, arch: &Architecture, world: &World) -> Result<(), ModelError> {
    const HEAD: i64 = 16;
    let tp = world.mesh.tp as i64;
    let tiny = Architecture {
        hidden: HEAD * arch.num_heads,
        num_layers: 1,
        head_dim: HEAD,
        intermediate: 2 * HEAD * tp,
        vocab: 64 * tp,
        rope: Rope { theta: 1e4, dim: HEAD, scaling: Scaling::None },
        windows: vec![None],
        ..arch.clone()
    };
    let samples = 2 * world.mesh.dp;
    let few = Assumed { samples, length: 24, longest: 48, scored: 0.5 };
    let set = |name| assumed(name, few, tiny.vocab, Wanted::Nothing);
    let (anchors, retain) = (set("forget"), set("retain"));
    let method = unlearn::method(&config::Method::new(config::Objective::Ga, config::Retain::Nll), 0, 1);
    let batches = Batches {
        order: Order::new(0, false, samples, samples, samples),
        anchors: &anchors,
        retain: Some(&retain),
        cuts: Cuts::of(&method, false),
        budget: 64 * samples,
    };
    let Config { parallel, train, optimizer, .. } = config;
    let trainer = RandomTrainer { arch: &tiny, parallel, train, optimizer, method, device: Device::Cpu, steps: 2 };
    let mut trainer = trainer.build(world)?;
    for step in 0..2 {
        let work = batches.step(step, world.mesh);
        trainer.step(step, &work, None, world).expect("invariant: random weights give finite numbers");
    }
    Ok(())
}

/// A transport takes its buffers when it first has much to send.
fn fill_transports(world: &World) {
    for group in [&world.tp, &world.dp].into_iter().filter(|group| group.size() > 1) {
        let mut some = Tensor::zeros([(group.size() as i64) << 19], (Kind::Float, Device::Cpu));
        group.all_reduce(&mut some, Reduce::Sum);
        let _ = group.reduce_scatter(&some).wait();
    }
}

/// What a product of another size leaves behind.
fn bytes_of_a_product(precision: Precision) -> u64 {
    const MORE: i64 = 4;
    let kind = kind(precision);
    let random = || Tensor::randn([256, 256], (Kind::Float, Device::Cpu)).to_kind(kind);
    let (x, w) = (random(), random());
    let multiply = |rows: i64| _ = x.narrow(0, 0, rows).matmul(&w.tr());
    multiply(256);
    let before = settled_bytes();
    (1..=MORE).for_each(|i| multiply(256 - 8 * i));
    settled_bytes().saturating_sub(before) / MORE as u64
}

/// Of the numbers that the model computes with.
pub(super) fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F32 => Kind::Float,
    }
}
