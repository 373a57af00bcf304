//! What a process on a CPU takes besides its tensors, measured by taking it: a step of a tiny model touches the code, the threads and the
//! transport's buffers that any step touches.

use tch::{Device, Kind, Tensor};

use super::machine::Base;
use super::samples::{Assumed, assumed};
use crate::abi::host;
use crate::config::{self, Config, Precision};
use crate::data::{Order, Wanted};
use crate::dist::{Reduce, World};
use crate::kernels::product::product as multiply;
use crate::model::{Architecture, ModelError, Rope, Scaling};
use crate::train::{Batches, Cuts, RandomTrainer};
use crate::unlearn;

/// Takes it. All ranks call it.
///
/// # Errors
/// A model that does not divide into the mesh.
pub fn base(config: &Config, arch: &Architecture, world: &World) -> Result<Base, ModelError> {
    let reduce_share = fill_transports(world);
    tiny_steps(config, arch, world)?;
    let product = bytes_of_a_product(config.train.precision);
    Ok(Base { process: settled_bytes(), product, reduce_share })
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
    // whatever rate the run was given, this model's numbers stay numbers
    let optimizer = &config::Optimizer { lr: 0.0, weight_decay: 0.0, ..optimizer.clone() };
    let trainer = RandomTrainer { arch: &tiny, parallel, train, optimizer, method, device: Device::Cpu, steps: 2 };
    let mut trainer = trainer.build(world)?;
    for step in 0..2 {
        let work = batches.step(step, world.mesh);
        trainer.step(step, &work, None, world).expect("invariant: random weights give finite numbers");
    }
    Ok(())
}

/// A transport takes its buffers when it first has much to send; gives what an all-reduce takes beside its input and output, as a share
/// of them.
fn fill_transports(world: &World) -> f64 {
    const BYTES: usize = 2 * host::MAPPED;
    let groups = [&world.tp, &world.dp].into_iter().filter(|group| group.size() > 1);
    let shares = groups.map(|group| {
        let numbers = (BYTES / 4).next_multiple_of(group.size()) as i64;
        let mut some = Tensor::zeros([numbers], (Kind::Float, Device::Cpu));
        let _ = group.reduce_scatter(&some).wait();
        let before = settled_bytes();
        host::forget_peak();
        group.all_reduce(&mut some, Reduce::Sum);
        let more = host::peak_resident_bytes().saturating_sub(before) as f64 / (4 * numbers) as f64;
        // the output is one
        (more - 1.0).max(0.0)
    });
    shares.fold(0.0, f64::max)
}

/// What a product of another size leaves behind, when libraries have what they take for a large one.
fn bytes_of_a_product(precision: Precision) -> u64 {
    const SIZE: i64 = 1024;
    const MORE: i64 = 4;
    let whole = Tensor::full([SIZE, SIZE], 0.5, (kind(precision), Device::Cpu));
    for (a, b) in [(whole.shallow_clone(), whole.tr()), (whole.tr(), whole.shallow_clone())] {
        let _ = multiply(&a, &b);
    }
    let some = |rows: i64| _ = multiply(&whole.narrow(0, 0, rows), &whole.tr());
    let before = settled_bytes();
    (1..=MORE).for_each(|i| some(256 - 8 * i));
    settled_bytes().saturating_sub(before) / MORE as u64
}

/// Of the numbers that the model computes with.
pub(super) fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F32 => Kind::Float,
    }
}
