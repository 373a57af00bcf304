//! Every objective through the whole engine, losses and every gradient, against transformers' autograd in f64 and on several
//! layouts.

use std::collections::BTreeMap;

use dunlearn::config;
use dunlearn::data::{Dataset, Order, RowsOf, Sample, Stream, Text};
use dunlearn::dist::{Fault, World, run_threads_with};
use dunlearn::model::sharding::{Piece, Table, matches};
use dunlearn::model::{Architecture, Decoder, Keep, ReferenceHead, Weights};
use dunlearn::train::{
    Batches, Cuts, GradientBuffers, GradientOptions, Losses, Method, Optimizer, Reference, Schedule, Trainer,
    TrainerOptions,
};
use dunlearn::unlearn;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::layouts::{boxes, whole};
use crate::tiny::{self, Spread};

/// A way to cut the step.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tp: usize,
    dp: usize,
    sequence_parallel: bool,
    recompute: bool,
    budget: usize,
    logits_bytes: f64,
}

const ONE: Layout =
    Layout { tp: 1, dp: 1, sequence_parallel: false, recompute: false, budget: 100_000, logits_bytes: 1e9 };
/// Several ranks, micro-batches and chunks of the head at once.
const LAYOUTS: [Layout; 4] = [
    ONE,
    Layout { tp: 2, logits_bytes: 2000.0, ..ONE },
    Layout { tp: 2, dp: 2, sequence_parallel: true, recompute: true, budget: 30, ..ONE },
    Layout { dp: 3, budget: 1, logits_bytes: 1.0, ..ONE },
];

struct Golden {
    json: Value,
    forget: Dataset,
    retain: Dataset,
}

impl Golden {
    fn read() -> Self {
        let json: Value =
            serde_json::from_str(&std::fs::read_to_string(tiny::golden("methods.json")).unwrap()).unwrap();
        let samples = |name: &str| -> Vec<Sample> {
            let sequences = json["sequences"][name].as_array().unwrap();
            let sample = |sequence: &Value| {
                let tokens: Vec<i32> = serde_json::from_value(sequence["ids"].clone()).unwrap();
                let prompt = sequence["prompt"].as_u64().unwrap() as u32;
                Sample { scored: (prompt..tokens.len() as u32).collect(), tokens }
            };
            sequences.iter().map(sample).collect()
        };
        let set = |answers: &str, preferred: &str| {
            let mut set = Dataset::from_samples(answers, samples(answers));
            set.preferred = samples(preferred);
            set
        };
        let (forget, retain) = (set("forget", "preferred"), set("retain", "refused"));
        Self { json, forget, retain }
    }

    /// The tensors that are trained; all where the configuration does not say.
    fn update(&self, name: &str) -> Vec<String> {
        let update = &self.json["methods"][name]["config"]["update"];
        serde_json::from_value(update.clone()).unwrap_or_else(|_| vec!["*".to_owned()])
    }

    fn method(&self, name: &str) -> Method {
        let mut toml = self.json["methods"][name]["config"].clone();
        if toml["objective"] != "pdu" && toml["retain"] != "none" {
            toml["retain_weight"] = self.json["retain_weight"].clone();
        }
        let text = format!(
            "[run]\ndir = 'r'\n[model]\npath = 'm'\n[data]\nforget = {{ path = 'f', kind = 'qa' }}\n\
             retain = {{ path = 'r', kind = 'qa' }}\n[train]\nepochs = 1\n[optimizer]\nlr = 1.0\n[method]\n{}",
            toml::to_string(&toml).unwrap()
        );
        let config = config::from_str(&text, name, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
        unlearn::method(&config.method, 0, 1)
    }
}

/// The seed-1 model on this rank's layout, run sample by sample.
struct SeedOne {
    logprobs: [Vec<Vec<f32>>; 2],
    head: ReferenceHead,
    rows: [Vec<Tensor>; 2],
    hidden: [Vec<Tensor>; 2],
}

impl SeedOne {
    fn new(golden: &Golden, method: &Method, arch: &Architecture, world: &World) -> Self {
        let (decoder, parameters) = tiny::model(arch, world, Spread::default(), Kind::Float, 1);
        let weights = &parameters.weights;
        let sets = [&golden.forget, &golden.retain];
        let each = |of: &dyn Fn(Stream, &Sample) -> Tensor| {
            [Stream::Forget, Stream::Retain]
                .map(|stream| sets[stream as usize].samples.iter().map(|sample| of(stream, sample)).collect::<Vec<_>>())
        };
        let rows = each(&|stream, sample| {
            let hidden = hidden(&decoder, weights, sample, arch.num_layers);
            let at: Vec<i64> = match method.cut(stream).rows {
                RowsOf::Every => (0..sample.tokens.len() as i64).collect(),
                RowsOf::Scored => sample.scored.iter().map(|&t| i64::from(t) - 1).collect(),
            };
            decoder.rows(weights, &hidden, &Tensor::from_slice(&at), 1e9).normed()
        });
        let hidden = each(&|_, sample| {
            hidden(&decoder, weights, sample, method.watched().unwrap_or(0)).narrow(0, 0, sample.tokens.len() as i64)
        });
        let logprobs = [&golden.forget.samples, &golden.forget.preferred]
            .map(|samples| samples.iter().map(|sample| logprobs(&decoder, weights, sample)).collect::<Vec<_>>());
        let head = ReferenceHead { weight: weights.get(decoder.table.head).copy() };
        Self { logprobs, head, rows, hidden }
    }
}

fn hidden(decoder: &Decoder, weights: &Weights, sample: &Sample, edge: usize) -> Tensor {
    let ids: Vec<i64> = sample.tokens.iter().map(|&id| i64::from(id)).collect();
    let batch = decoder.batch(&ids, &[ids.len()]);
    let x = decoder.enter(weights, &batch);
    let (x, _) = decoder.through(weights, &batch, x, 0..edge, Keep::Nothing);
    decoder.all_tokens(&x)
}

fn logprobs(decoder: &Decoder, weights: &Weights, sample: &Sample) -> Vec<f32> {
    let hidden = hidden(decoder, weights, sample, decoder.arch.num_layers);
    let at: Vec<i64> = sample.scored.iter().map(|&t| i64::from(t) - 1).collect();
    let targets: Vec<i64> = sample.scored.iter().map(|&t| i64::from(sample.tokens[t as usize])).collect();
    let rows = decoder.rows(weights, &hidden, &Tensor::from_slice(&at), 1e9);
    Vec::try_from(decoder.scores(weights, &rows, &Tensor::from_slice(&targets), false).logprob).unwrap()
}

impl Reference for SeedOne {
    fn logprobs(&self, sample: usize, text: Text) -> &[f32] {
        &self.logprobs[text as usize][sample]
    }

    fn head(&self) -> &ReferenceHead {
        &self.head
    }

    fn rows(&self, stream: Stream, sample: usize) -> Tensor {
        self.rows[stream as usize][sample].shallow_clone()
    }

    fn hidden(&self, stream: Stream, sample: usize) -> Tensor {
        self.hidden[stream as usize][sample].shallow_clone()
    }
}

/// Losses and gradients of the one step, by Hugging Face name.
fn run(golden: &Golden, name: &str, layout: Layout) -> (Losses, BTreeMap<String, Tensor>) {
    let arch = tiny::architecture("llama_gqa");
    let said = run_threads_with(Fault::None, layout.tp, layout.dp, |world| {
        tch::no_grad(|| rank(golden, name, layout, &arch, &world))
    });
    assert!(said.iter().all(|(losses, _)| *losses == said[0].0), "{name}: ranks disagree on {layout:?}");
    (said[0].0, whole(said.iter().flat_map(|(_, boxes)| boxes)))
}

fn rank(
    golden: &Golden,
    name: &str,
    layout: Layout,
    arch: &Architecture,
    world: &World,
) -> (Losses, Vec<(Piece, Vec<f32>)>) {
    let method = golden.method(name);
    let reference = SeedOne::new(golden, &method, arch, world);
    let spread = Spread { sequence_parallel: layout.sequence_parallel, ..Spread::default() };
    let update = golden.update(name);
    let (decoder, parameters) =
        tiny::model_training(arch, world, spread, Kind::Float, &update, |piece| tiny::weights(piece, 0));
    let optimizer: config::Optimizer = serde_json::from_str(r#"{"name": "sgd", "lr": 0.1}"#).unwrap();
    let batches = Batches {
        order: Order::new(0, false, 2, 2, 2),
        anchors: &golden.forget,
        retain: Some(&golden.retain),
        cuts: Cuts::of(&method, false),
        budget: layout.budget,
    };
    let mut trainer = Trainer {
        gradients: GradientBuffers::new(
            &decoder.table,
            &parameters.layout,
            &world.tp,
            &world.dp,
            GradientOptions::f32(Device::Cpu),
        ),
        optimizer: Optimizer::new(&optimizer, &decoder.table, &parameters),
        schedule: Schedule::new(&config::Schedule::default(), 0.1, 1, 1),
        method,
        options: TrainerOptions {
            keep: if layout.recompute { Keep::Inputs } else { Keep::Everything },
            logits_bytes: layout.logits_bytes,
            max_grad_norm: 0.0,
            in_backward: false,
        },
        broken: Trainer::whole(Device::Cpu),
        decoder,
        parameters,
    };
    let (losses, _) = trainer.accumulate(&batches.step(0, world.mesh), Some(&reference), world);
    let reduced = trainer.gradients.finish();
    let buckets: Vec<Tensor> = reduced.own.iter().map(|own| world.dp.all_gather(own)).collect();
    let gradients = boxes(&trainer, |id| {
        let len = trainer.decoder.table.params[id].num_elements();
        match trainer.parameters.layout.places[id] {
            Some((bucket, start)) => buckets[bucket].narrow(0, start as i64, len),
            None => Tensor::zeros([len], (Kind::Float, Device::Cpu)),
        }
    });
    (losses, gradients)
}

/// What is the same for a whole tensor: its length, and its product with the test weights of seed 9.
fn told(name: &str, gradient: &Tensor) -> [f64; 2] {
    let shape = gradient.size();
    let piece = Piece { name: name.to_owned(), offset: vec![0; shape.len()], size: shape.clone(), shape, row: 0 };
    let weights = tiny::weights(&piece, 9).view_as(gradient).to_kind(Kind::Double);
    let gradient = gradient.to_kind(Kind::Double);
    let number = |t: Tensor| t.double_value(&[]);
    [number(gradient.norm()), number((gradient * weights).sum(Kind::Double))]
}

/// Largest error of losses (relative) and gradients (relative to their length).
fn error(golden: &Golden, name: &str, layout: Layout) -> f64 {
    let (losses, gradients) = run(golden, name, layout);
    let want = &golden.json["methods"][name];
    let mut worst = 0.0f64;
    let mut see = |what: &str, error: f64| {
        assert!(error < 2e-5, "{name} on {layout:?}: {what} is off by {error:e}");
        worst = worst.max(error);
    };
    for (key, got) in [("loss", losses.total), ("forget_loss", losses.forget), ("retain_loss", losses.retain)] {
        let want = want[key].as_f64().unwrap();
        see(&format!("{key} {got} instead of {want}"), (got - want).abs() / want.abs().max(1e-2));
    }
    let total =
        |of: &dyn Fn(&Value) -> f64| want["gradients"].as_object().unwrap().values().map(of).sum::<f64>().sqrt();
    let norm = total(&|pair| pair[0].as_f64().unwrap().powi(2));
    for (tensor, pair) in want["gradients"].as_object().unwrap() {
        let [length, product] = told(tensor, &gradients[tensor]);
        let [want_length, want_product] = [0, 1].map(|i| pair[i].as_f64().unwrap());
        // a gradient that is nothing beside the others has only their rounding
        let scale = want_length.max(1e-3 * norm);
        see(&format!("the length of the gradient of {tensor}"), (length - want_length).abs() / scale);
        see(&format!("the gradient of {tensor}"), (product - want_product).abs() / scale);
    }
    assert_eq!(gradients.len(), want["gradients"].as_object().unwrap().len());
    worst
}

#[test]
fn every_objective_matches_autograd_on_every_layout() {
    let golden = Golden::read();
    let names: Vec<String> = golden.json["methods"].as_object().unwrap().keys().cloned().collect();
    assert!(names.len() >= 27);
    for name in &names {
        let errors: Vec<String> =
            LAYOUTS.iter().map(|&layout| format!("{:.1e}", error(&golden, name, layout))).collect();
        println!("{name:20} {}", errors.join("  "));
    }
    let covered: std::collections::BTreeSet<&str> =
        names.iter().map(|name| golden.json["methods"][name]["config"]["objective"].as_str().unwrap()).collect();
    for listed in unlearn::list() {
        // fine-tuning, of the weight space's methods too, is the retain term; the others are DPO with answers from elsewhere
        let known = ["finetune", "idk_dpo", "altpo", "unlearn", "learn"].contains(&listed.name.as_str());
        assert!(known || covered.contains(listed.name.as_str()), "{} is in no golden step", listed.name);
    }
}

/// What `compat` changes is the denominator: here 2 samples x (22 - 1) positions instead of 21 scored tokens.
#[test]
fn compat_takes_the_denominators_of_padded_batches() {
    let mut golden = Golden::read();
    let (losses, _) = run(&golden, "undial", ONE);
    golden.json["methods"]["undial"]["config"]["compat"] = "openunlearning".into();
    let (padded, _) = run(&golden, "undial", LAYOUTS[2]);
    assert!((padded.forget / (losses.forget * 21.0 / 42.0) - 1.0).abs() < 1e-6, "{padded:?} {losses:?}");
}

/// Control: the numbers of one method are noticed not to be another's.
#[test]
fn wrong_methods_are_noticed() {
    let mut golden = Golden::read();
    for (name, key, value) in [
        ("wga", "beta", 0.51),
        ("kto_paper", "beta", 0.101),
        ("undial", "beta", 5.1),
        ("adv_npo", "attack_radius", 2.01),
    ] {
        golden.json["methods"][name]["config"][key] = value.into();
        let noticed = std::panic::catch_unwind(|| error(&golden, name, ONE)).is_err();
        assert!(noticed, "{name} with {key} = {value} passes for the golden one");
    }
}

/// Names decide on classes and on where backward ends.
#[test]
fn what_is_not_named_is_not_trained() {
    let arch = tiny::architecture("llama_gqa");
    let whole_table = Table::new(&arch, 1, 0, false).unwrap();
    let mut table = whole_table.clone();
    let named = ["model.layers.1.mlp.*", "model.norm.weight"];
    table.freeze(|param| named.iter().any(|pattern| matches(pattern, &param.pieces[0].name)));
    let trained: Vec<&str> = table
        .params
        .iter()
        .filter(|param| param.class != dunlearn::model::sharding::Class::Frozen)
        .flat_map(|param| param.pieces.iter().map(|piece| piece.name.as_str()))
        .collect();
    assert_eq!(trained.len(), 4, "{trained:?}");
    assert_eq!((table.first_trained_layer(), whole_table.first_trained_layer()), (1, 0));
}

/// Training two matrices alone gives them the gradients that they have among all others, and the others none; backward does not go
/// below them.
#[test]
fn a_few_trained_matrices_have_their_own_gradients() {
    let mut golden = Golden::read();
    let (_, all) = run(&golden, "rmu_adaptive", ONE);
    let names = ["model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"];
    golden.json["methods"]["rmu_adaptive"]["config"]["update"] = serde_json::json!(names);
    for layout in LAYOUTS {
        let (_, few) = run(&golden, "rmu_adaptive", layout);
        for (name, gradient) in &few {
            if names.contains(&name.as_str()) {
                assert!(tiny::relative(gradient, &all[name]) < 1e-5, "{name} on {layout:?}");
            } else {
                assert_eq!(gradient.abs().max().double_value(&[]), 0.0, "{name} on {layout:?}");
            }
        }
    }
}

/// The dual variable waits, rises while the retain loss is above its bound, falls below it to no less than 0, and survives a
/// checkpoint.
#[test]
fn the_dual_variable_follows_the_retain_loss() {
    let golden = Golden::read();
    let mut method = golden.method("pdu");
    let dual = method.dual.unwrap();
    assert_eq!((dual.bound, dual.rate, dual.warmup, method.retain_weight), (0.3, 5.0, 5, 0.7));
    let state = method.state();
    method.retain_weight = 3.0;
    method.restore(&state).unwrap();
    assert_eq!(method.retain_weight, 0.7);
    assert!(method.restore(&Value::Null).unwrap_err().contains("expected {\"dual\": number}"));
    assert_eq!(golden.method("npo").state(), Value::Null);
}
