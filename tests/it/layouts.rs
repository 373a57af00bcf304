//! The same step on every layout: losses, each gradient, the norm, and the parameters after ten steps, against one rank.

use std::collections::BTreeMap;

use dunlearn::config;
use dunlearn::data::{Dataset, Order, Sample, Stream as Samples, Text};
use dunlearn::dist::{Fault, World, run_threads_with};
use dunlearn::model::init::Stream;
use dunlearn::model::sharding::{Piece, Table};
use dunlearn::model::{Architecture, Keep, ReferenceHead, Rope, Scaling};
use dunlearn::train::{
    Batches, Cuts, GradientBuffers, GradientOptions, Losses, Optimizer, Parameters, Reference, Schedule, Selection,
    Trainer, TrainerOptions,
};
use dunlearn::unlearn;
use tch::{Device, Kind, Tensor};

use crate::tiny::{self, Spread};

/// One way to run the test's steps.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub tp: usize,
    pub dp: usize,
    pub sequence_parallel: bool,
    pub zero: bool,
    pub recompute: bool,
    /// Unit: tokens; small budgets make several micro-batches a step.
    pub budget: usize,
    pub bucket_elements: usize,
}

pub const ONE: Layout = Layout {
    tp: 1,
    dp: 1,
    sequence_parallel: false,
    zero: true,
    recompute: false,
    budget: 100_000,
    bucket_elements: 1 << 30,
};

/// What is trained.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub tied: bool,
    pub retain: config::Retain,
    pub optimizer: config::OptimizerName,
    pub steps: usize,
    /// What the model computes in.
    pub kind: Kind,
    pub max_grad_norm: f64,
    pub in_backward: bool,
    /// The learning rate falls to 0 over the steps.
    pub falling: bool,
    pub state: config::StateDtype,
    /// Of the gradient buffers, and of their sums over the data-parallel ranks.
    pub grads: (Kind, Kind),
    pub scope: Scope,
}

/// What of the model may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    All,
    /// Low-rank adapters beside every matrix of a layer.
    Adapters,
    /// Every third weight.
    Third,
}

/// Everything that layouts must agree on.
struct Outcome {
    losses: Vec<Losses>,
    norms: Vec<f64>,
    /// Gradients of the first step and parameters after the last, by Hugging Face name.
    gradients: BTreeMap<String, Tensor>,
    parameters: BTreeMap<String, Tensor>,
    /// Most bytes of gradients and bytes of optimizer state on the first rank.
    bytes: (usize, usize),
}

/// Four key/value heads so that TP 4 is possible; biases, q/k norms and an odd vocabulary so that nothing divides by luck.
pub fn architecture(tied: bool) -> Architecture {
    Architecture {
        family: "test",
        hidden: 32,
        num_layers: 3,
        num_heads: 8,
        num_kv_heads: 4,
        head_dim: 6,
        intermediate: 40,
        vocab: 101,
        norm_eps: 1e-5,
        rope: Rope { theta: 1e4, dim: 6, scaling: Scaling::None },
        tied,
        qkv_bias: true,
        qk_norm: true,
        windows: vec![None, Some(5), None],
        max_positions: 64,
        initializer_range: 0.02,
        packing: dunlearn::model::architecture::Packing::Fused,
    }
}

/// Samples of very different lengths, with prompts that are not scored.
pub fn samples(name: &str, count: usize) -> Dataset {
    let draw = Stream::new(5, name);
    let samples = (0..count as u64).map(|i| {
        let len = 4 + draw.bits(1000 + i) % 37;
        let prompt = 1 + draw.bits(2000 + i) % (len - 2);
        let tokens = (0..len).map(|t| (draw.bits(i * 100 + t) % 101) as i32).collect();
        Sample { tokens, scored: (prompt as u32..len as u32).collect() }
    });
    Dataset::from_samples(name, samples.collect())
}

pub struct SeedOne {
    logprobs: Vec<Vec<f32>>,
    head: ReferenceHead,
    rows: Vec<Tensor>,
}

impl SeedOne {
    /// Made-up log-probabilities for forget samples; rows and head of the seed-1 model, on this rank's layout.
    pub fn new(forget: &Dataset, retain: &Dataset, arch: &Architecture, world: &World, kind: Kind) -> Self {
        let (decoder, parameters) = tiny::model(arch, world, Spread::default(), kind, 1);
        let rows = retain.samples.iter().map(|sample| {
            let ids: Vec<i64> = sample.tokens.iter().map(|&id| i64::from(id)).collect();
            let batch = decoder.batch(&ids, &[ids.len()]);
            let (hidden, _) = decoder.forward(&parameters.weights, &batch, Keep::Nothing);
            let all = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
            decoder.rows(&parameters.weights, &hidden, &all, 1e9).normed()
        });
        let rows = rows.collect();
        let logprobs = forget.samples.iter().map(|s| s.scored.iter().map(|&t| -3.0 - 0.05 * t as f32).collect());
        let head = ReferenceHead { weight: parameters.weights.get(decoder.table.head).copy() };
        Self { logprobs: logprobs.collect(), head, rows }
    }
}

impl Reference for SeedOne {
    fn logprobs(&self, sample: usize, _: Text) -> &[f32] {
        &self.logprobs[sample]
    }

    fn head(&self) -> &ReferenceHead {
        &self.head
    }

    fn rows(&self, _: Samples, sample: usize) -> Tensor {
        self.rows[sample].shallow_clone()
    }

    fn hidden(&self, _: Samples, _: usize) -> Tensor {
        unreachable!("no hidden rows in these tests")
    }
}

/// A rank's word: losses and norms, and its boxes of gradients and parameters.
struct Said {
    losses: Vec<Losses>,
    norms: Vec<f64>,
    gradients: Vec<(Piece, Vec<f32>)>,
    parameters: Vec<(Piece, Vec<f32>)>,
    bytes: (usize, usize),
}

/// Gives each rank's weights; tests of the tests put a wrong one here.
pub type Source = fn(&Architecture, &World, &Piece) -> Tensor;

pub fn right(_: &Architecture, _: &World, piece: &Piece) -> Tensor {
    tiny::weights(piece, 0)
}

fn run(layout: Layout, case: Case, fault: Fault, source: Source) -> Outcome {
    let arch = architecture(case.tied);
    let (forget, retain) = (samples("forget", 7), samples("retain", 5));
    let said = run_threads_with(fault, layout.tp, layout.dp, |world| {
        tch::no_grad(|| rank(layout, case, &arch, &forget, &retain, &world, source))
    });
    for other in &said[1..] {
        assert_eq!((&other.losses, &other.norms), (&said[0].losses, &said[0].norms), "ranks disagree: {layout:?}");
    }
    Outcome {
        losses: said[0].losses.clone(),
        norms: said[0].norms.clone(),
        gradients: whole(said.iter().flat_map(|said| &said.gradients)),
        parameters: whole(said.iter().flat_map(|said| &said.parameters)),
        bytes: said[0].bytes,
    }
}

pub fn trainer(layout: Layout, case: Case, arch: &Architecture, world: &World, source: Source) -> Trainer {
    let Layout { sequence_parallel, zero, bucket_elements, .. } = layout;
    let spread = Spread { sequence_parallel, zero, bucket_elements };
    let narrow = |table: &mut Table| match case.scope {
        Scope::Adapters => table.adapt(|name| name.contains("_proj"), 3, 2.0),
        Scope::All | Scope::Third => (),
    };
    let from = |piece: &Piece| source(arch, world, piece);
    let (decoder, mut parameters) = tiny::model_narrowed(arch, world, spread, case.kind, narrow, from);
    if case.scope == Scope::Third {
        parameters.selection = Some(third(&parameters, &decoder.table));
    }
    let mut method = config::Method::new(config::Objective::Npo, case.retain);
    method.retain_weight = Some(0.7);
    let method = unlearn::method(&method, 0, 1);
    let optimizer = config::Optimizer {
        name: case.optimizer,
        lr: 0.01,
        betas: None,
        eps: None,
        momentum: (case.optimizer == config::OptimizerName::Sgd).then_some(0.9),
        weight_decay: 0.1,
        max_grad_norm: case.max_grad_norm,
        state_dtype: (case.optimizer == config::OptimizerName::Adamw).then_some(case.state),
        in_backward: case.in_backward,
    };
    let holding = GradientOptions {
        kind: case.grads.0,
        reduce: case.grads.1,
        release: case.in_backward,
        ..GradientOptions::f32(Device::Cpu)
    };
    let mut gradients = GradientBuffers::new(&decoder.table, &parameters.layout, &world.tp, &world.dp, holding);
    if let Some(selection) = &parameters.selection {
        gradients.select(selection);
    }
    let name = if case.falling { config::ScheduleName::Linear } else { config::ScheduleName::Constant };
    let schedule = config::Schedule { name, ..Default::default() };
    Trainer {
        gradients,
        optimizer: Optimizer::new(&optimizer, &decoder.table, &parameters),
        schedule: Schedule::new(&schedule, optimizer.lr, case.steps, 1),
        method,
        options: TrainerOptions {
            keep: if layout.recompute { Keep::Inputs } else { Keep::Everything },
            logits_bytes: 4096.0,
            max_grad_norm: optimizer.max_grad_norm,
            in_backward: case.in_backward,
        },
        broken: Trainer::whole(decoder.device),
        decoder,
        parameters,
    }
}

/// Every third weight of each tensor, counted in the whole tensor.
fn third(parameters: &Parameters, table: &Table) -> Selection {
    let mut chosen = 0;
    let masks = parameters.layout.buckets.iter().map(|bucket| {
        let mut marks = vec![false; bucket.own.len()];
        for (id, range) in &bucket.params {
            for (place, own) in bucket.runs(&table.params[*id], range) {
                let columns = place.shape.get(1).copied().unwrap_or(0);
                for stretch in place.stretches() {
                    for i in 0..stretch.len {
                        let element = stretch.row * columns + stretch.column + i;
                        marks[own.start + (stretch.at + i) as usize] = element % 3 == 1;
                    }
                }
            }
        }
        chosen += marks.iter().filter(|&&mark| mark).count() as u64;
        Tensor::from_slice(&marks)
    });
    let masks = masks.collect();
    Selection::new(&parameters.layout, masks, chosen, 3 * chosen)
}

fn rank(
    layout: Layout,
    case: Case,
    arch: &Architecture,
    forget: &Dataset,
    retain: &Dataset,
    world: &World,
    source: Source,
) -> Said {
    let zero = layout.zero;
    let mut trainer = trainer(layout, case, arch, world, source);
    let reference = SeedOne::new(forget, retain, arch, world, case.kind);
    let cuts = Cuts::of(&trainer.method, false);
    let batches = Batches {
        order: Order::new(3, true, forget.samples.len(), retain.samples.len(), 4),
        anchors: forget,
        retain: Some(retain),
        cuts,
        budget: layout.budget,
    };
    // gradients of the first step, before anything moves
    let mut own = Vec::new();
    if !case.in_backward {
        trainer.accumulate(&batches.step(0, world.mesh), Some(&reference), world);
    }
    while let Some((_, sum)) = trainer.gradients.next_summed(true) {
        own.push(sum.to_kind(Kind::Float).copy());
    }
    let buckets: Vec<Tensor> =
        own.iter().map(|own| if zero { world.dp.all_gather(own) } else { own.shallow_clone() }).collect();
    let gradients = if own.is_empty() {
        Vec::new()
    } else {
        boxes(&trainer, |id| {
            let (bucket, start) = trainer.parameters.layout.places[id].expect("it is trained");
            buckets[bucket].narrow(0, start as i64, trainer.decoder.table.params[id].num_elements())
        })
    };
    let reports: Vec<_> = (0..case.steps)
        .map(|step| trainer.step(step, &batches.step(step, world.mesh), Some(&reference), world).unwrap())
        .collect();
    let parameters = boxes(&trainer, |id| trainer.parameters.weights.get(id).to_kind(Kind::Float));
    Said {
        losses: reports.iter().map(|report| report.losses).collect(),
        norms: reports.iter().map(|report| report.grad_norm).collect(),
        gradients,
        parameters,
        bytes: (trainer.gradients.bytes(), trainer.optimizer.bytes()),
    }
}

/// This rank's boxes with the values that `of` gives for each parameter.
pub fn boxes(trainer: &Trainer, of: impl Fn(usize) -> Tensor) -> Vec<(Piece, Vec<f32>)> {
    let mut boxes = Vec::new();
    for (id, param) in trainer.decoder.table.params.iter().enumerate() {
        let values = of(id).view(param.shape.as_slice());
        for piece in &param.pieces {
            let part = values.narrow(0, piece.row, piece.size[0]).contiguous().view([-1]);
            boxes.push((piece.clone(), Vec::<f32>::try_from(part).unwrap()));
        }
    }
    boxes
}

/// Whole tensors from all ranks' boxes.
pub fn whole<'a>(boxes: impl Iterator<Item = &'a (Piece, Vec<f32>)>) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::<String, Tensor>::new();
    for (piece, values) in boxes {
        let whole = tensors
            .entry(piece.name.clone())
            .or_insert_with(|| Tensor::full(&piece.shape, f64::NAN, (Kind::Float, Device::Cpu)));
        let mut target = whole.shallow_clone();
        for (dim, (&start, &len)) in piece.offset.iter().zip(&piece.size).enumerate() {
            target = target.narrow(dim as i64, start, len);
        }
        target.copy_(&Tensor::from_slice(values).view(piece.size.as_slice()));
    }
    tensors
}

/// Largest relative differences: (loss and norm, gradients, parameters).
fn distance(got: &Outcome, want: &Outcome) -> (f64, f64, f64) {
    let rel = |a: f64, b: f64| (a / b - 1.0).abs();
    let losses = got.losses.iter().zip(&want.losses).map(|(got, want)| {
        let parts = [(got.total, want.total), (got.forget, want.forget), (got.retain, want.retain)];
        parts.into_iter().map(|(a, b)| rel(a, b)).fold(0.0, f64::max)
    });
    let norms = got.norms.iter().zip(&want.norms).map(|(got, want)| rel(*got, *want));
    // of all steps; later ones start from parameters that differ by rounding already
    let first = losses.chain(norms).fold(0.0, f64::max);
    let tensors = |a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>| {
        if a.is_empty() || b.is_empty() {
            return 0.0; // stepping inside backward leaves no gradients to compare
        }
        assert!(a.keys().eq(b.keys()));
        // NaN, for a box that nobody filled, must come out on top
        b.iter().map(|(name, b)| tiny::relative(&a[name], b)).fold(0.0, |x, y| if x >= y { x } else { y })
    };
    (first, tensors(&got.gradients, &want.gradients), tensors(&got.parameters, &want.parameters))
}

pub fn case(tied: bool) -> Case {
    Case {
        tied,
        retain: config::Retain::Nll,
        optimizer: config::OptimizerName::Adamw,
        steps: 1,
        kind: Kind::Float,
        max_grad_norm: 0.5,
        in_backward: false,
        falling: false,
        state: config::StateDtype::F32,
        grads: (Kind::Float, Kind::Float),
        scope: Scope::All,
    }
}

fn assert_equal(layout: Layout, case: Case, want: &Outcome) -> (f64, f64, f64) {
    let found = distance(&run(layout, case, Fault::None, right), want);
    assert!(found.0 < 1e-5 && found.1 < 1e-5 && found.2 < 1e-4, "{layout:?} {case:?}: {found:?}");
    found
}

/// Losses, norm and every gradient of one step on all layouts.
#[test]
fn every_layout_gives_the_gradients_of_one_rank() {
    let mut worst = (0.0f64, 0.0f64, 0.0f64);
    let mut count = 0;
    for tied in [false, true] {
        let want = run(ONE, case(tied), Fault::None, right);
        assert!(want.norms[0] > 0.5, "clipping is active");
        for (tp, sequence_parallel) in [(1, false), (2, false), (2, true), (4, false), (4, true)] {
            for dp in [1, 2, 4] {
                for (zero, bucket_elements) in [(true, 1), (true, 5000), (false, 5000)] {
                    for (recompute, budget) in [(false, 100_000), (true, 60)] {
                        let layout = Layout { tp, dp, sequence_parallel, zero, recompute, budget, bucket_elements };
                        let found = assert_equal(layout, case(tied), &want);
                        worst = (worst.0.max(found.0), worst.1.max(found.1), worst.2.max(found.2));
                        count += 1;
                    }
                }
            }
        }
    }
    println!(
        "{count} layouts; worst relative difference: loss and norm {:.1e}, gradient {:.1e}, parameters after a step {:.1e}",
        worst.0, worst.1, worst.2
    );
}

/// An odd vocabulary gives the ranks shards of different sizes; buckets of about a shard's size must still close at the same
/// layers on all of them.
#[test]
fn buckets_close_at_the_same_layers_on_all_ranks() {
    let want = run(ONE, case(false), Fault::None, right);
    for (tp, bucket_elements) in [(2, 3600), (4, 1810), (4, 1800)] {
        assert_equal(Layout { tp, sequence_parallel: true, bucket_elements, ..ONE }, case(false), &want);
    }
}

/// Ten steps of both optimizers with clipping, weight decay and momentum.
#[test]
fn ten_steps_end_at_the_same_parameters() {
    for optimizer in [config::OptimizerName::Sgd, config::OptimizerName::Adamw] {
        for tied in [false, true] {
            let case = Case { optimizer, steps: 10, ..case(tied) };
            let want = run(ONE, case, Fault::None, right);
            for (tp, dp, sequence_parallel, zero, recompute, budget) in [
                (2, 1, false, true, true, 100_000),
                (1, 2, false, false, false, 60),
                (2, 2, true, true, false, 60),
                (4, 1, true, true, true, 60),
                (1, 4, false, true, false, 100_000),
                (4, 4, true, true, true, 60),
            ] {
                let layout = Layout { tp, dp, sequence_parallel, zero, recompute, budget, bucket_elements: 3000 };
                let found = assert_equal(layout, case, &want);
                println!("{optimizer:?} tied {tied} tp {tp} dp {dp}: parameters differ by {:.1e}", found.2);
            }
        }
    }
}

/// Stepping buckets while backward runs changes nothing but the clipping, which then goes by half blocks, and is the same on
/// every layout; gradients of one micro-batch never lie in memory all at once.
#[test]
fn stepping_inside_backward_is_the_same_step() {
    for tied in [false, true] {
        for optimizer in [config::OptimizerName::Sgd, config::OptimizerName::Adamw] {
            let unclipped = Case { optimizer, steps: 5, max_grad_norm: 0.0, ..case(tied) };
            let want = run(ONE, unclipped, Fault::None, right);
            let small = Layout { bucket_elements: 1, ..ONE };
            let early = Case { in_backward: true, ..unclipped };
            let got = run(small, early, Fault::None, right);
            let found = distance(&got, &want);
            assert!(found.0 < 1e-6 && found.1 < 1e-6 && found.2 < 1e-6, "tied {tied} {optimizer:?}: {found:?}");
            assert!(2 * got.bytes.0 < want.bytes.0, "gradients: {} of {} bytes", got.bytes.0, want.bytes.0);

            let clipped = Case { max_grad_norm: 0.1, ..early };
            let want = run(ONE, clipped, Fault::None, right);
            assert!(distance(&want, &got).2 > 1e-3, "clipping is active");
            for (tp, dp, sequence_parallel, zero, recompute, budget) in [
                (2, 1, false, true, true, 100_000),
                (1, 2, false, false, false, 60),
                (2, 2, true, true, false, 60),
                (4, 3, true, true, true, 100_000),
                (1, 9, false, true, false, 100_000),
            ] {
                let layout = Layout { tp, dp, sequence_parallel, zero, recompute, budget, bucket_elements: 3000 };
                assert_equal(layout, clipped, &want);
            }
        }
    }
}

/// Moments of 16 and 8 bits, and gradients held or sent in bf16, stay near f32 and take the memory that they promise.
#[test]
fn smaller_state_stays_near_f32_on_every_layout() {
    let exact = Case { steps: 10, ..case(false) };
    let want = run(ONE, exact, Fault::None, right);
    let (half, wide) = (Kind::BFloat16, Kind::Float);
    for (state, grads, bytes, tolerance) in [
        (config::StateDtype::Bf16, (wide, wide), 4.0, 0.02),
        (config::StateDtype::Int8, (wide, wide), 2.0 + 2.0 / 64.0, 0.03),
        (config::StateDtype::F32, (wide, half), 8.0, 0.02),
        (config::StateDtype::F32, (half, wide), 8.0, 0.02),
        (config::StateDtype::Int8, (half, half), 2.0 + 2.0 / 64.0, 0.03),
    ] {
        for (tp, dp, zero) in [(1, 1, true), (2, 2, true), (1, 3, false), (4, 1, true)] {
            let layout = Layout { tp, dp, zero, bucket_elements: 3000, ..ONE };
            let got = run(layout, Case { state, grads, ..exact }, Fault::None, right);
            let (first, _, parameters) = distance(&got, &want);
            println!("{state:?} {grads:?} tp {tp} dp {dp}: losses and norms {first:.1e}, parameters {parameters:.1e}");
            assert!(
                first < tolerance && parameters < tolerance,
                "{state:?} {grads:?} {layout:?}: {first} {parameters}"
            );
            if (tp, dp) == (1, 1) {
                let each = got.bytes.1 as f64 / (want.bytes.1 as f64 / 8.0);
                assert!(each >= bytes * 0.99 && each < bytes * 1.1 + 0.1, "{state:?}: {each} bytes a parameter");
                let held = if grads.0 == half { want.bytes.0 / 2 } else { want.bytes.0 };
                assert_eq!(got.bytes.0, held);
            }
        }
    }
}

/// A gradient that is no number, found late: nothing has changed on any rank, whichever way buckets are stepped, nor does a later
/// step change anything.
#[test]
fn a_step_that_is_no_number_changes_nothing() {
    let arch = architecture(false);
    let (forget, retain) = (samples("forget", 7), samples("retain", 5));
    for in_backward in [false, true] {
        for optimizer in [config::OptimizerName::Sgd, config::OptimizerName::Adamw] {
            let case = Case { optimizer, in_backward, steps: 3, ..case(false) };
            let layout = Layout { tp: 2, dp: 2, bucket_elements: 3000, ..ONE };
            let told = run_threads_with(Fault::None, 2, 2, |world| {
                tch::no_grad(|| {
                    let mut trainer = trainer(layout, case, &arch, &world, right);
                    let mut reference = SeedOne::new(&forget, &retain, &arch, &world, case.kind);
                    let batches = Batches {
                        order: Order::new(3, false, 7, 5, 7),
                        anchors: &forget,
                        retain: Some(&retain),
                        cuts: Cuts::default(),
                        budget: 100_000,
                    };
                    let work = batches.step(0, world.mesh);
                    trainer.step(0, &work, Some(&reference), &world).unwrap();
                    let all = |trainer: &Trainer| boxes(trainer, |id| trainer.parameters.weights.get(id).copy());
                    let before = all(&trainer);
                    // one number of one sample, on the rank that has it
                    reference.logprobs[3][0] = f32::NAN;
                    let broken = trainer.launch(1, &work, Some(&reference), &world);
                    reference.logprobs[3][0] = -3.0;
                    let later = trainer.launch(2, &work, Some(&reference), &world);
                    assert!(all(&trainer) == before, "in backward {in_backward}, {optimizer:?}: weights have moved");
                    reference.logprobs[3][0] = f32::NAN;
                    let error = trainer.read(broken, &work, Some(&reference), &world).unwrap_err().to_string();
                    drop(later);
                    error
                })
            });
            assert!(told.iter().all(|text| text.starts_with("step 2: loss NaN")), "{told:?}");
        }
    }
}

/// A divergence needs the distributions of both models over the whole vocabulary.
#[test]
fn the_divergence_term_is_the_same_on_every_layout() {
    for tied in [false, true] {
        let case = Case { retain: config::Retain::Kl, ..case(tied) };
        let want = run(ONE, case, Fault::None, right);
        for (tp, dp, sequence_parallel) in [(2, 1, false), (4, 1, true), (1, 3, false), (2, 2, true)] {
            assert_equal(Layout { tp, dp, sequence_parallel, budget: 60, ..ONE }, case, &want);
        }
    }
}

/// Computing in bf16 (8 bits of mantissa: 0.4 % each rounding) stays near f32 on every layout.
#[test]
fn bf16_stays_near_f32_on_every_layout() {
    for retain in [config::Retain::Nll, config::Retain::Kl] {
        let exact = Case { retain, ..case(false) };
        let want = run(ONE, exact, Fault::None, right);
        for (tp, dp, sequence_parallel, recompute) in
            [(1, 1, false, false), (2, 2, false, true), (4, 1, true, false), (1, 3, false, true)]
        {
            let layout = Layout { tp, dp, sequence_parallel, recompute, budget: 60, bucket_elements: 3000, ..ONE };
            let (first, gradients, _) =
                distance(&run(layout, Case { kind: Kind::BFloat16, ..exact }, Fault::None, right), &want);
            println!("bf16 {retain:?} tp {tp} dp {dp}: loss and norm {first:.1e}, gradients {gradients:.1e}");
            assert!(first < 0.02 && gradients < 0.05, "{layout:?}: {first:e} {gradients:e}");
        }
    }
}

/// More ranks than samples: some have nothing to do and still take part in every collective.
#[test]
fn idle_ranks_change_nothing() {
    let want = run(ONE, case(false), Fault::None, right);
    for zero in [true, false] {
        assert_equal(Layout { dp: 9, zero, ..ONE }, case(false), &want);
        let spread = Layout { tp: 2, sequence_parallel: true, recompute: true, bucket_elements: 3000, ..ONE };
        assert_equal(Layout { dp: 9, zero, ..spread }, case(false), &want);
    }
}

/// Controls: mistakes that parallel programs make, put in on purpose, are noticed by the comparison above.
#[test]
fn injected_mistakes_are_caught() {
    let want = run(ONE, case(false), Fault::None, right);
    let two = Layout { tp: 2, ..ONE };
    let pair = Layout { dp: 2, ..ONE };
    let cases: [(&str, Layout, Fault, Source); 6] = [
        ("no sum over tensor-parallel ranks", two, Fault::NoSum("tp"), right),
        ("no sum over data-parallel ranks", pair, Fault::NoSum("dp"), right),
        ("no sum, without ZeRO", Layout { zero: false, ..pair }, Fault::NoSum("dp"), right),
        ("mean instead of sum over tensor-parallel ranks", two, Fault::Mean("tp"), right),
        ("mean instead of sum over data-parallel ranks", pair, Fault::Mean("dp"), right),
        ("down projection cut along the other axis", two, Fault::None, other_axis),
    ];
    for (what, layout, fault, source) in cases {
        let broken = match std::panic::catch_unwind(|| run(layout, case(false), fault, source)) {
            Ok(broken) => broken,
            // some mistakes already make the ranks disagree among themselves
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map_or("", String::as_str);
                assert!(text.contains("ranks disagree"), "{what}: {text}");
                println!("{what}: the ranks disagree");
                continue;
            }
        };
        let (first, gradients, _) = distance(&broken, &want);
        println!("{what}: loss and norm {first:.1e}, gradients {gradients:.1e}");
        assert!(!(first < 1e-5 && gradients < 1e-5), "{what} was not noticed");
    }
}

/// The down projection's shard taken from rows instead of columns.
fn other_axis(arch: &Architecture, world: &World, piece: &Piece) -> Tensor {
    if !piece.name.ends_with("mlp.down_proj.weight") {
        return tiny::weights(piece, 0);
    }
    let whole = Piece { offset: vec![0, 0], size: piece.shape.clone(), ..piece.clone() };
    let each = arch.intermediate / world.mesh.tp as i64;
    let rank = world.mesh.tp_rank() as i64;
    // rows instead of columns: right shape, wrong entries
    tiny::weights(&whole, 0).view([arch.intermediate, arch.hidden]).narrow(0, rank * each, each).tr().contiguous()
}

/// The table of one rank is the table of the model: names and shapes do not depend on the layout.
#[test]
fn tables_of_all_layouts_name_the_same_tensors() {
    let arch = architecture(false);
    let one = Table::new(&arch, 1, 0, false).unwrap();
    for tp in [2, 4] {
        for rank in 0..tp {
            let table = Table::new(&arch, tp, rank, true).unwrap();
            assert_eq!(table.tensors(), one.tensors());
        }
    }
}
