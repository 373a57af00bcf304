//! The same step on every layout: losses, each gradient, the norm, and the parameters after ten steps, against one rank.

use std::collections::BTreeMap;

use dunlearn::config;
use dunlearn::data::{Dataset, Order, Sample, Stream as Samples, Text};
use dunlearn::dist::{Fault, World, run_threads_with};
use dunlearn::model::init::Stream;
use dunlearn::model::sharding::{Piece, Table};
use dunlearn::model::{Architecture, Keep, ReferenceHead, Rope, Scaling};
use dunlearn::train::{
    Batches, Cuts, GradientBuffers, GradientOptions, Losses, Optimizer, Reference, Schedule, Trainer, TrainerOptions,
};
use dunlearn::unlearn;
use tch::{Device, Kind, Tensor};

use crate::tiny::{self, Spread};

/// One way to run the test's steps.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tp: usize,
    dp: usize,
    sequence_parallel: bool,
    zero: bool,
    recompute: bool,
    /// Unit: tokens; small budgets make several micro-batches a step.
    budget: usize,
    bucket_elements: usize,
}

const ONE: Layout = Layout {
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
struct Case {
    tied: bool,
    retain: config::Retain,
    optimizer: config::OptimizerName,
    steps: usize,
    /// What the model computes in.
    kind: Kind,
}

/// Everything that layouts must agree on.
struct Outcome {
    losses: Vec<Losses>,
    norms: Vec<f64>,
    /// Gradients of the first step and parameters after the last, by Hugging Face name.
    gradients: BTreeMap<String, Tensor>,
    parameters: BTreeMap<String, Tensor>,
}

/// Four key/value heads so that TP 4 is possible; biases, q/k norms and an odd vocabulary so that nothing divides by luck.
fn architecture(tied: bool) -> Architecture {
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
fn samples(name: &str, count: usize) -> Dataset {
    let draw = Stream::new(5, name);
    let samples = (0..count as u64).map(|i| {
        let len = 4 + draw.bits(1000 + i) % 37;
        let prompt = 1 + draw.bits(2000 + i) % (len - 2);
        let tokens = (0..len).map(|t| (draw.bits(i * 100 + t) % 101) as i32).collect();
        Sample { tokens, scored: (prompt as u32..len as u32).collect() }
    });
    Dataset::from_samples(name, samples.collect())
}

struct SeedOne {
    logprobs: Vec<Vec<f32>>,
    head: ReferenceHead,
    rows: Vec<Tensor>,
}

impl SeedOne {
    /// Made-up log-probabilities for forget samples; rows and head of the seed-1 model, on this rank's layout.
    fn new(forget: &Dataset, retain: &Dataset, arch: &Architecture, world: &World, kind: Kind) -> Self {
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
}

/// Gives each rank's weights; tests of the tests put a wrong one here.
type Source = fn(&Architecture, &World, &Piece) -> Tensor;

fn right(_: &Architecture, _: &World, piece: &Piece) -> Tensor {
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
    }
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
    let Layout { sequence_parallel, zero, bucket_elements, .. } = layout;
    let spread = Spread { sequence_parallel, zero, bucket_elements };
    let (decoder, parameters) = tiny::model_from(arch, world, spread, case.kind, |piece| source(arch, world, piece));
    let reference = SeedOne::new(forget, retain, arch, world, case.kind);
    let mut method = config::Method::new(config::Objective::Npo, case.retain);
    method.retain_weight = Some(0.7);
    let method = unlearn::method(&method, 0, 1);
    let cuts = Cuts::of(&method, false);
    let optimizer = config::Optimizer {
        name: case.optimizer,
        lr: 0.01,
        betas: None,
        eps: None,
        momentum: (case.optimizer == config::OptimizerName::Sgd).then_some(0.9),
        weight_decay: 0.1,
        max_grad_norm: 0.5,
        state_dtype: None,
        in_backward: false,
    };
    let schedule = config::Schedule { name: config::ScheduleName::Constant, ..Default::default() };
    let mut trainer = Trainer {
        gradients: GradientBuffers::new(
            &decoder.table,
            &parameters.layout,
            &world.tp,
            &world.dp,
            GradientOptions::f32(Device::Cpu),
        ),
        optimizer: Optimizer::new(&optimizer, &decoder.table, &parameters),
        schedule: Schedule::new(&schedule, optimizer.lr, case.steps, 1),
        method,
        options: TrainerOptions {
            keep: if layout.recompute { Keep::Inputs } else { Keep::Everything },
            logits_bytes: 4096.0,
            max_grad_norm: optimizer.max_grad_norm,
            in_backward: false,
        },
        broken: Trainer::whole(decoder.device),
        decoder,
        parameters,
    };
    let batches = Batches {
        order: Order::new(3, true, forget.samples.len(), retain.samples.len(), 4),
        anchors: forget,
        retain: Some(retain),
        cuts,
        budget: layout.budget,
    };
    // gradients of the first step, before anything moves
    trainer.accumulate(&batches.step(0, world.mesh), Some(&reference), world);
    let reduced = trainer.gradients.finish();
    let buckets: Vec<Tensor> =
        reduced.own.iter().map(|own| if zero { world.dp.all_gather(own) } else { own.shallow_clone() }).collect();
    let gradients = boxes(&trainer, |id| {
        let (bucket, start) = trainer.parameters.layout.places[id];
        buckets[bucket].narrow(0, start as i64, trainer.decoder.table.params[id].num_elements())
    });
    let reports: Vec<_> = (0..case.steps)
        .map(|step| trainer.step(step, &batches.step(step, world.mesh), Some(&reference), world).unwrap())
        .collect();
    let parameters = boxes(&trainer, |id| trainer.parameters.weights.get(id).to_kind(Kind::Float));
    Said {
        losses: reports.iter().map(|report| report.losses).collect(),
        norms: reports.iter().map(|report| report.grad_norm).collect(),
        gradients,
        parameters,
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
        assert!(a.keys().eq(b.keys()));
        // NaN, for a box that nobody filled, must come out on top
        b.iter().map(|(name, b)| tiny::relative(&a[name], b)).fold(0.0, |x, y| if x >= y { x } else { y })
    };
    (first, tensors(&got.gradients, &want.gradients), tensors(&got.parameters, &want.parameters))
}

fn case(tied: bool) -> Case {
    Case { tied, retain: config::Retain::Nll, optimizer: config::OptimizerName::Adamw, steps: 1, kind: Kind::Float }
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
